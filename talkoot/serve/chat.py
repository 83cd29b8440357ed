"""How a chat is written as one text, for a model that only continues texts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from peer.errors import ModelError
from peer.settings import describe_validation_error
from talkoot.model.folder import CHAT_FORMAT, read_file

_PLACE = "{content}"


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
    """Plain texts around the messages. They are not templates, and the messages' contents are never parsed."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: Turn = "{content}\n\n"
    user: Turn = "User: {content}\n"
    assistant: Turn = "Assistant: {content}\n"
    prompt: str = Field(default="Assistant:", max_length=4096)
    """Follows the last message. The answer begins after it."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=4, strict=False)
    ] = ("\nUser:",)
    """An answer ends before any of these texts."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A model folder's `chat_format.json`; if there is none, the default. Raises ModelError."""
        path = folder / CHAT_FORMAT
        if not os.path.lexists(path):
            return cls()
        try:
            return cls.model_validate_json(read_file(folder, CHAT_FORMAT))
        except ValidationError as error:
            raise ModelError(
                f"{path} is not a chat format: {describe_validation_error(error, cls)}"
            ) from error

    def text(self, messages: Sequence[Message]) -> str:
        turns = {
            "system": self.system,
            "developer": self.system,
            "user": self.user,
            "assistant": self.assistant,
        }
        written = (turns[each.role].replace(_PLACE, each.content.strip()) for each in messages)
        return "".join(written) + self.prompt
