"""How a model in a folder reads a memory, and which memory it was trained with. The memory is not in the folder."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.memory import MAX_DIMENSIONS
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.model import LanguageModel
from trainer_client.retrieval.answering import QueryEncoder, RagModel, Reader
from trainer_client.retrieval.attention import Retrieval, RetrievalSpec
from trainer_client.settings import Objective, TrainerSettings

QUESTIONS = "questions."
"""The prefix of the tensors with which a model finds passages for a question."""


class FolderMemory(BaseModel):
    """The trainer's settings that determine how the model reads."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    memory: Annotated[str, Field(min_length=1, max_length=200)]
    """The memory's name or id in the swarm."""
    objective: Objective
    memory_chunk: int
    memory_passages: int | None
    memory_length: int
    memory_layers: tuple[int, ...]
    encoder: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """For models that answer questions: the SHA-256 of the file of the memory's encoder."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    """For models that answer questions: how many numbers the memory's vectors have."""

    @classmethod
    def of(
        cls, settings: TrainerSettings, manifest: Manifest, encoder: str | None, tensors: dict[str, Tensor]
    ) -> Self | None:
        """None for a model that reads no memory. `encoder`, `tensors`: from its checkpoint."""
        if settings.memory is None:
            return None
        names = cls.model_fields.keys() - {"encoder", "dimensions"}
        values: dict[str, Any] = {name: getattr(settings, name) for name in names}
        values["memory_chunk"] = settings.chunk_in(manifest.model.context)
        if settings.answers_questions:
            change = tensors.get(f"model.{QUESTIONS}change.weight")
            values |= {"encoder": encoder, "dimensions": None if change is None else len(change)}
        return cls.model_validate(values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.settings.answers_questions and (self.encoder is None or self.dimensions is None):
            raise ValueError("encoder and dimensions say how a model finds passages that answers questions")
        return self

    @property
    def settings(self) -> TrainerSettings:
        return TrainerSettings.model_validate(self.model_dump(exclude={"encoder", "dimensions"}))

    def retrieval(self, manifest: Manifest) -> RetrievalSpec | None:
        """How the model reads while it writes; None if it answers questions. Raises UserError if it can't."""
        return RetrievalSpec.of(self.settings, manifest.model)

    def modules(self, manifest: Manifest) -> dict[str, nn.Module]:
        """The model's modules in addition to its language model, by the prefix of their tensors. Raises UserError."""
        if (spec := self.retrieval(manifest)) is not None:
            return {"retrieval.": Retrieval(manifest.model, spec)}
        assert self.dimensions is not None, "it answers questions"
        return {QUESTIONS: QueryEncoder(self.dimensions)}

    def answering(
        self, generator: LanguageModel, manifest: Manifest, tokenizer: Tokenizer
    ) -> RagModel | None:
        """The model that answers questions with this generator; None if it reads while it writes. Raises UserError."""
        settings = self.settings
        if not settings.answers_questions:
            return None
        assert self.dimensions is not None, "it answers questions"
        reader = Reader(tokenizer, manifest.model, self.memory_length)
        return RagModel(generator, reader, self.dimensions, settings.marginal, settings.passages_read)
