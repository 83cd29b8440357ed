"""Homes and public machines in network namespaces of the kernel, and a swarm that is small enough for them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from preloaded import Preloaded

from benchmarks.homes import Village
from benchmarks.namespaces import Machine, internet

MANIFEST = """
name = "homes"
preset = "none"
[model]
layers = 1
hidden = 32
heads = 2
context = 32
feed_forward = 64
[experts]
grid = [4]
kind = "ffn"
[routing]
top_k = 4
"""
"""There are four experts, and each token goes to all of them: a step is complete only with all nodes that host one."""


class _QuickVillage(Village):
    """Its programs need not import torch."""

    def _start(self, machine: Machine, words: Sequence[str], out: BinaryIO, err: BinaryIO) -> Preloaded:
        return Preloaded(*words, stdout=out, stderr=err, network=machine.namespace)


@contextlib.contextmanager
def village_in(folder: Path) -> Iterator[Village]:
    with internet() as net, contextlib.closing(_QuickVillage(net, folder)) as made:
        yield made


def manifest_in(folder: Path) -> Path:
    """Writes the manifest of a new swarm."""
    path = folder / "swarm.toml"
    path.write_text(MANIFEST)
    return path
