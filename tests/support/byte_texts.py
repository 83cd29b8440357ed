"""Texts whose bytes are the tokens."""

import numpy as np

from trainer_client.data.corpus import Dataset


def byte_dataset(text: bytes, context: int, seed: int = 0) -> Dataset:
    return Dataset(np.frombuffer(text, dtype=np.uint8), context, seed)
