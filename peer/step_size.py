"""The step size of an optimizer over time, the same rule for the trainer's dense part and for experts."""

import math

LOWEST = 0.1
"""Of the highest, where the cosine ends."""


def step_size(step: int, highest: float, warmup: int, last: int) -> float:
    """Of a step (from 0): rises linearly in `warmup` steps, then falls as a cosine to a tenth at step `last`, where it
    stays. `last` 0: it does not fall.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    if not last:
        return highest
    done = (step - warmup) / max(1, last - warmup)
    share = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return highest * (LOWEST + (1 - LOWEST) * share)
