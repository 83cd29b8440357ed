"""Settings: one pydantic model per role, from a TOML file, the environment and flags; flags are strongest."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from peer.errors import SettingsError


class RoleSettings(BaseSettings):
    """Base of a role's settings. A subclass sets `env_prefix`, and gives each field a unit, bounds and a description."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Self:
        """Reads the file `config` (if any) and the environment; flags that are None were not given.

        Raises SettingsError with one line that names the setting that is wrong.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        if config is not None and not config.is_file():
            raise SettingsError(f"no settings file {config}")
        _refuse_unknown_environment(cls)

        class FromFile(cls):  # type: ignore[misc, valid-type]  # the file's path is known only here
            model_config = SettingsConfigDict(toml_file=config)

        try:
            # a FromFile is a cls: it differs only in where its values came from
            loaded = FromFile(**given)
            return cls.model_construct(**{name: getattr(loaded, name) for name in cls.model_fields})
        except ValidationError as error:
            raise SettingsError(describe_validation_error(error)) from error
        except ValueError as error:  # TOML that does not parse
            raise SettingsError(f"can't read {config}: {error}") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def _refuse_unknown_environment(cls: type[RoleSettings]) -> None:
    prefix = cls.model_config.get("env_prefix", "")
    known = {f"{prefix}{name}".upper() for name in cls.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
    if prefix and unknown:
        raise SettingsError(f"unknown setting {unknown[0]} in the environment; known: {', '.join(sorted(known))}")


def describe_validation_error(error: ValidationError) -> str:
    """One line that names each key that is wrong."""
    parts = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "the whole"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown setting {key!r}")
        else:
            parts.append(f"{key}: {problem['msg']}")
    return "; ".join(parts)
