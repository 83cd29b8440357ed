"""hivemind.moe's beam search, with the one fix that is needed to measure it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from hivemind.moe.client.beam_search import MoEBeamSearcher


class RepairedSearcher(MoEBeamSearcher):  # type: ignore[misc]  # hivemind has no types
    """Passes an expiration time where hivemind 1.1.12 passes `num_workers`, which fails as soon as a prefix
    is missing.
    """

    @classmethod
    async def _batch_find_best_experts(
        cls,
        dht: Any,
        node: Any,
        prefix: str,
        batch_grid_scores: Sequence[Any],
        beam_size: int,
        negative_caching: bool,
        num_workers: int | None,
    ) -> Any:
        rows = [[tuple(grid[i]) for grid in batch_grid_scores] for i in range(len(batch_grid_scores[0]))]
        return await asyncio.gather(
            *(
                cls._find_best_experts(
                    dht, node, prefix, scores, beam_size, negative_caching, 300.0, num_workers
                )
                for scores in rows
            )
        )
