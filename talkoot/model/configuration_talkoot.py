"""The configuration of a model that a Talkoot swarm trained, for the library `transformers`.

This file is part of Talkoot and imports `transformers` alone: a model folder has a copy, and loads without Talkoot.
"""

from typing import Any

from transformers import PretrainedConfig


class TalkootConfig(PretrainedConfig):
    """The configuration of the model. Its sizes are those of the swarm's manifest."""

    model_type = "talkoot"

    def __init__(
        self,
        manifest: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        vocab_size: int = 256,
        missing_experts: list[str] | None = None,
        format_version: int = 1,
        memory: dict[str, Any] | None = None,
        beside: dict[str, list[int]] | None = None,
        **others: Any,
    ) -> None:
        """`routing`: router, top_k, balance. `missing_experts`: `layer.i.j` of experts that are not in the folder.

        `memory`: how Talkoot reads passages for the model. `beside` in it: the shapes of the tensors for that.
        """
        self.manifest: dict[str, Any] = manifest or {}
        self.routing: dict[str, Any] = routing or {}
        self.vocab_size = vocab_size
        self.missing_experts: list[str] = missing_experts or []
        self.format_version = format_version
        if memory is not None:
            self.memory: dict[str, Any] = memory
            self.beside: dict[str, list[int]] = beside or {}
        super().__init__(**{"tie_word_embeddings": False} | others)

    @property
    def hidden_size(self) -> int:
        return self._model["hidden"]

    @property
    def num_attention_heads(self) -> int:
        return self._model["heads"]

    @property
    def max_position_embeddings(self) -> int:
        """The most tokens in a sequence."""
        return self._model["context"]

    @property
    def mixture_layers(self) -> int:
        """How many pairs of a local part and a mixture of experts the model has."""
        return self._model["layers"]

    @property
    def attention_layers(self) -> int:
        """Layers with attention in one local part."""
        return self._model["local_layers"] + (self._model["local"] == "attention")

    @property
    def experts_attend(self) -> bool:
        """Whether an expert attends to the earlier rows of a sequence that went to it."""
        return self.manifest["experts"]["kind"] == "transformer"

    @property
    def prefix(self) -> int:
        """The number of tokens whose mean routes a whole sequence; 0: each token is routed by itself."""
        return self.manifest["routing"]["prefix"]

    @property
    def gate_width(self) -> int:
        """The number of columns that a gate reads."""
        return self.manifest["routing"]["gate_width"] or self.hidden_size

    @property
    def has_product_keys(self) -> bool:
        """Whether an expert's score is the sum of one for each grid dimension."""
        return self.manifest["routing"]["product_keys"]

    @property
    def cached_layers(self) -> int:
        """Cache layers for each mixture layer during generation: see `modeling_talkoot.Mixture`."""
        return self.attention_layers + self.experts_attend + 1

    @property
    def num_hidden_layers(self) -> int:
        """Layers of a cache."""
        return self.mixture_layers * self.cached_layers

    @property
    def expert_width(self) -> int:
        """The number of columns that an expert computes."""
        return self.manifest["experts"]["width"] or self.hidden_size

    @property
    def expert_heads(self) -> int:
        experts, heads = self.manifest["experts"], self.num_attention_heads
        if experts["heads"] or experts["head_size"]:
            return experts["heads"] or heads
        return next((n for n in range(heads, 1, -1) if self.expert_width % (2 * n) == 0), 1)

    @property
    def expert_feed_forward(self) -> int:
        return self.manifest["experts"]["feed_forward"] or self._model["feed_forward"]

    @property
    def _model(self) -> dict[str, Any]:
        return self.manifest["model"]
