"""Settings: one pydantic model per role, from a TOML file, the environment and flags; flags are strongest."""

import os
import tomllib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from peer.errors import SettingsError


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name is one line of printable characters")
    return text


PeerName = Annotated[str, Field(min_length=1, max_length=32), AfterValidator(_printable)]
"""What the owner of a peer calls it."""
MetricsHost = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        description="IP address that /metrics listens on; any but loopback is announced to the swarm",
    ),
]
MetricsPort = Annotated[int, Field(ge=0, le=65535, description="TCP port of /metrics; 0: any free one")]


def _several(value: object) -> object:
    """From the environment they come as one text."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Denied = Annotated[
    tuple[str, ...],
    BeforeValidator(_several),
    Field(description="PeerIDs of peers to have nothing to do with, beside those in the denylist"),
]
DenylistPath = Annotated[
    Path | None,
    Field(
        description="file of such PeerIDs, one a line; it is read again when it changes; unset: `denylist` in the "
        "state folder"
    ),
]
DENYLIST = "denylist"
"""Its name in a state folder."""


class RoleSettings(BaseModel):
    """Base of a role's settings. A subclass sets `env_prefix`, and gives each field a unit, bounds, a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env_prefix: ClassVar[str]

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Self:
        """Reads the file `config` (if any) and the environment; flags that are None were not given.

        Raises SettingsError with one line that names the setting that is wrong.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        from_file = {} if config is None else read_toml(config)
        try:
            return cls.model_validate({**from_file, **cls._from_environment(), **given})
        except ValidationError as error:
            raise SettingsError(describe_validation_error(error, cls)) from error

    @classmethod
    def _from_environment(cls) -> dict[str, str]:
        known = {f"{cls.env_prefix}{name}".upper(): name for name in cls.model_fields}
        found = {
            name: value for name, value in os.environ.items() if name.startswith(cls.env_prefix) and value
        }
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise SettingsError(
                f"unknown setting {unknown[0]} in the environment{_nearest(unknown[0], known)}; docs/settings.md "
                "lists all"
            )
        return {known[name]: value for name, value in found.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Raises SettingsError that names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no file {path}: pass the path of one that is there") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"can't read {path}: {error}") from error


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One line that names each key of the model that is wrong."""
    parts = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown setting {key!r}{_nearest(key, _keys(model))}")
        elif problem["type"] == "string_pattern_mismatch":  # all patterns are of names
            parts.append(
                f"{key}: small letters, digits and '-' between them make a name, such as 'our-swarm-2'"
            )
        else:
            parts.append(f"{key}: {problem['msg']}".removeprefix(": ").replace("Value error, ", "", 1))
    return "; ".join(parts)


def _keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield above + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{above}{name}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean {each}?)" for each in get_close_matches(name, list(known), 1))
