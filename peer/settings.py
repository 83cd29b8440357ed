"""Settings: one pydantic model per role, read from a TOML file, the environment and flags; later ones take
precedence.
"""

import logging
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from peer.errors import SettingsError

logger: logging.Logger = logging.getLogger(__name__)


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

P2pd = Annotated[
    Literal["auto", "off"],
    Field(
        description="whether to run the libp2p daemon, which punches holes through routers; auto: if hivemind includes "
        "one for this system; off: never, which saves about 50 MB, but peers behind routers are then reached only "
        "through relays"
    ),
]


def several(value: object) -> object:
    """Splits a value from the environment, where several values are one text."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Denied = Annotated[
    tuple[str, ...],
    BeforeValidator(several),
    Field(description="PeerIDs of peers to refuse, in addition to those in the denylist"),
]
DenylistPath = Annotated[
    Path | None,
    Field(
        description="file of PeerIDs to refuse, one per line, which is read again when it changes; unset: `denylist` "
        "in the state folder"
    ),
]
DENYLIST = "denylist"
"""The file's name in a state folder."""


_IN_WORDS = {
    "missing": "must be given",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    # all patterns describe names
    "string_pattern_mismatch": "small letters, digits and '-' between them make a name, such as 'our-swarm-2'",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "path_type": "must be a path",
    **dict.fromkeys(("model_type", "model_attributes_type"), "must be a table"),
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "finite_number": "must be finite",
}
"""Our messages for pydantic's kinds of errors. For other kinds, pydantic's own message is shown."""
_LONGEST_SHOWN = 40
"""The most characters of a wrong value that a message shows."""
_MOST_NAMED = 20
"""The most wrong keys that a message names. A stranger's file may have very many."""


class RoleSettings(BaseModel):
    """Base of a role's settings. A subclass sets `env_prefix`, and gives each field a unit, bounds and a
    description.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    env_prefix: ClassVar[str]
    removed: ClassVar[Mapping[str, str]] = {}
    """Settings of the previous release that no longer exist, and what replaces each, if anything. For one release they
    are ignored with a warning, so that files, variables and command lines keep working.
    """

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Self:
        """Reads the file `config` (if any) and the environment. Flags that are None were not given.

        Raises SettingsError with one line that names the wrong setting.
        """
        flags = {name: value for name, value in flags.items() if value is not None}
        from_file = {} if config is None else read_toml(config)
        given = {**from_file, **cls._from_environment(), **flags}
        for name in sorted(cls.removed.keys() & given.keys()):
            advice = cls.removed[name] or "remove it"
            logger.warning("the setting %s no longer exists and is ignored: %s", name, advice)
            del given[name]
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise SettingsError(describe_validation_error(error, cls)) from error

    @classmethod
    def _from_environment(cls) -> dict[str, str]:
        known = {f"{cls.env_prefix}{name}".upper(): name for name in (*cls.model_fields, *cls.removed)}
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
    """Raises SettingsError, which names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}: pass the path of an existing file") from None
    except OSError as error:
        raise SettingsError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a TOML file: it is not text in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not a TOML file: {error}") from error


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One line that names the wrong keys of the model, or the first of very many."""
    parts: list[str] = []
    said: dict[str, list[ErrorDetails]] = {}
    problems = error.errors()
    for problem in problems[:_MOST_NAMED]:
        if problem["type"] == "extra_forbidden":
            key = ".".join(map(str, problem["loc"]))
            parts.append(f"unknown setting {key!r}{_nearest(key, _keys(model))}")
        else:
            # an entry that is not an identifier names one of several types that a value may have
            places = [
                str(part) for part in problem["loc"] if str(part).isidentifier() or isinstance(part, int)
            ]
            said.setdefault(".".join(places), []).append(problem)
    parts += [describe_problems(key, of_one_key) for key, of_one_key in said.items()]
    more = len(problems) - _MOST_NAMED
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])


def describe_problems(name: str, problems: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value, such as "steps must be a whole number, not 'ten'"."""
    words = [_in_words(problem) for problem in problems]
    if not name or not all(each.startswith("must ") for each in words):
        return f"{name}: {' or '.join(words)}".removeprefix(": ")
    first, *others = words
    text = " or ".join([f"{name} {first}", *(each.removeprefix("must be ") for each in others)])
    given = problems[0]["input"]
    if not text.startswith(f"{name} must be ") or not isinstance(given, str | int | float):
        return text
    return f"{text}, not {repr(given)[:_LONGEST_SHOWN]}"


def _in_words(problem: ErrorDetails) -> str:
    bounds = {
        name: f"{bound:g}" if isinstance(bound, float) else bound
        for name, bound in problem.get("ctx", {}).items()
    }
    words = _IN_WORDS.get(problem["type"])
    return (
        problem["msg"].removeprefix("Value error, ").removesuffix(".")
        if words is None
        else words.format(**bounds)
    )


def _keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield above + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{above}{name}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean {each}?)" for each in get_close_matches(name, list(known), 1))


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Raises SettingsError, which says how to install the extra."""
    if find_spec(module) is None:
        raise SettingsError(
            f"{purpose} needs the package {module}: install Talkoot with the extra {extra}, as docs/install.md says"
        )
