"""How a chat is written as one text, for a model that only continues texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from peer.errors import DataError
from peer.settings import describe_validation_error

CHAT_FORMAT = "chat_format.json"
"""Its name in a model folder."""
_PLACE = "{content}"
_LONGEST = 64 * 2**10


@dataclass(frozen=True)
class Message:
    role: str
    content: str


def _has_one_place(text: str) -> str:
    if text.count(_PLACE) != 1:
        raise ValueError(f"must have {_PLACE} once, where the message goes")
    return text


Turn = Annotated[str, Field(max_length=4096), AfterValidator(_has_one_place)]


class ChatFormat(BaseModel):
    """Plain texts around the messages. Nothing in them is run, and what a message says is never looked at."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: Turn = "{content}\n\n"
    user: Turn = "User: {content}\n"
    assistant: Turn = "Assistant: {content}\n"
    prompt: str = Field(default="Assistant:", max_length=4096)
    """Stands after the last message, where the answer begins."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=4, strict=False)
    ] = ("\nUser:",)
    """Texts before which an answer ends."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A model folder's `chat_format.json`; if there is none, the default. Raises DataError."""
        path = folder / CHAT_FORMAT
        try:
            with path.open("rb") as file:
                data = file.read(_LONGEST + 1)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}") from error
        if len(data) > _LONGEST:
            raise DataError(f"{path} is no chat format: it is longer than {_LONGEST >> 10} KiB")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise DataError(f"{path} is no chat format: {describe_validation_error(error, cls)}") from error

    def text(self, messages: Sequence[Message]) -> str:
        turns = {
            "system": self.system,
            "developer": self.system,
            "user": self.user,
            "assistant": self.assistant,
        }
        written = (turns[each.role].replace(_PLACE, each.content.strip()) for each in messages)
        return "".join(written) + self.prompt
