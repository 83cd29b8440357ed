"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a model with a larger grid, whose new experts are copies.

A grid dimension grows by whole blocks of its coordinates. A block's experts are copies of the old ones, with noise, and
so are its rows of the gate. A direction is added to these rows, which differs from block to block and raises or lowers
the scores of all experts in a block equally. So a token's best experts are copies of the same experts as before, all in
one block, with the same weights. Without product keys, the gate grows in the same way, as one table of the grid's
shape. Experts that attend to earlier rows see fewer of them, because a sequence is spread over blocks. If a bias
balances the load, the new blocks start with a low bias, so that the model starts exactly as it was.

Shapes: D columns that the gate reads, G size of a grid dimension, N rows that the gate saw.
"""

from collections.abc import Callable, Mapping
from math import prod

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import first_seed
from peer.errors import SettingsError
from peer.settings import describe_validation_error
from talkoot.model.folder import ModelFolder
from talkoot.model.opened import OpenedModel, open_model
from trainer_client.decoding import TextDecoder
from trainer_client.moe import RemoteMixtureOfExperts

_NOISE = 0.01
"""The noise of a copy, relative to the root mean square of each tensor."""
_SEPARATION = 4.0
"""The standard deviation of the difference between two blocks' scores, relative to that of a row's logits. At 4, the
loss of a model with feed-forward experts rises by 0.4% without a bias; at 8, by 0.2%, but the bias moves in larger
steps.
"""
_HELD_BACK = 1e6
"""A bias that is lower than all scores. Its first correction limits it to 8 standard deviations of the logits."""
_TEXTS, _TOKENS = 16, 48
"""How many texts the model writes, and of how many tokens, to measure the inputs of its gates."""


def grown_manifest(manifest: Manifest, grid: tuple[int, ...]) -> Manifest:
    """Raises SettingsError if the grid does not consist of whole copies of the model's."""
    old = manifest.experts.grid
    if len(grid) != len(old) or any(new % size for new, size in zip(grid, old, strict=True)) or grid == old:
        raise SettingsError(
            f"--grid: each size must be a multiple of the model's, {' '.join(map(str, old))}, and one of them larger"
        )
    values = manifest.model_dump()
    try:
        return Manifest.model_validate(values | {"experts": values["experts"] | {"grid": grid}})
    except ValidationError as error:
        raise SettingsError(f"--grid: {describe_validation_error(error, Manifest)}") from error


class UpcycledModel:
    """A folder's model with a larger grid, in place of a `ModelFolder`."""

    def __init__(self, folder: ModelFolder, manifest: Manifest, stage: Callable[[str], None]) -> None:
        """`manifest`: the `grown_manifest`. Opens the model. Raises UserError if memory does not suffice."""
        self.path, self.routing, self.tokenizer = folder.path, folder.routing, folder.tokenizer
        self.manifest = manifest
        self._folder = folder
        stage("looking at what the gates read")
        self._read = _gate_inputs(open_model(folder.path))

    def expert(self, uid: UID) -> dict[str, Tensor]:
        """Like `ModelFolder.expert`: the old expert's tensors, or those of a copy of it."""
        old = self._folder.manifest.experts.grid
        source = UID(uid.layer, tuple(x % size for x, size in zip(uid.coordinate, old, strict=True)))
        tensors = self._folder.expert(source)
        if uid == source:
            return tensors
        generator = torch.Generator().manual_seed(first_seed(self.manifest, uid))
        return {name: tensor + _noise(tensor, generator) for name, tensor in tensors.items()}

    def dense(self) -> dict[str, Tensor]:
        """Like `ModelFolder.dense`."""
        tensors = self._folder.dense()
        for layer in range(self.manifest.model.layers):
            self._grow_gate(tensors, layer)
            if f"mixtures.{layer}.balance.bias" in tensors:
                self._grow_bias(tensors, f"mixtures.{layer}.balance.")
        return tensors

    def _grow_gate(self, tensors: dict[str, Tensor], layer: int) -> None:
        prefix = f"mixtures.{layer}.gate."
        gate = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        # a sigmoid of the logit is not a softmax: there the copies tie, and the first wins
        separation = 0.0 if self.routing.router == "base" else _SEPARATION
        old, read_ND = self._folder.manifest, self._read[layer]
        generator = torch.Generator().manual_seed(self.manifest.model.seed + layer)
        grown = grown_gate(gate, old, self.manifest, read_ND, separation, generator)
        tensors |= {prefix + name: tensor for name, tensor in grown.items()}

    def _grow_bias(self, tensors: dict[str, Tensor], prefix: str) -> None:
        old, new = self._folder.manifest.experts.grid, self.manifest.experts.grid
        is_old = torch.zeros(new, dtype=torch.bool)
        is_old[tuple(slice(size) for size in old)] = True
        for name in ("bias", "average_bias", "average_load"):
            entries = tensors[prefix + name]
            table = _tiled(entries.repeat(-(-prod(old) // len(entries)))[: prod(old)], old, new)
            if name != "average_load":
                table = table.masked_fill(~is_old, -_HELD_BACK)
            tensors[prefix + name] = table.flatten()


def grown_gate(
    gate: Mapping[str, Tensor],
    old: Manifest,
    new: Manifest,
    read_ND: Tensor,
    separation: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A gate's tensors for a larger grid. `separation`: as `_SEPARATION`."""
    grids = list(zip(_gate_grids(old), _gate_grids(new), strict=True))
    parts = {name: torch.split(tensor, list(old.score_sizes)) for name, tensor in gate.items()}
    weights, biases = parts["linear.weight"], parts["linear.bias"]
    scores = [read_ND @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
    # the standard deviation of a sum of independent scores
    spread = sum(float(table.var(dim=1, correction=0).mean()) for table in scores) ** 0.5
    mean_D = read_ND.mean(dim=0)
    grown: dict[str, list[Tensor]] = {name: [] for name in gate}
    for table, (before, after) in enumerate(grids):
        tiled = {name: _tiled(some[table], before, after) for name, some in parts.items()}
        for axis, (size, larger) in enumerate(zip(before, after, strict=True)):
            for block in range(larger // size) if larger > size else ():
                direction_D = torch.randn(len(mean_D), generator=generator)
                width = float(((read_ND - mean_D) @ direction_D).std(correction=0))
                direction_D *= separation * spread / 2**0.5 / max(width, 1e-6)
                rows = axis, block * size, size
                tiled["linear.weight"].narrow(*rows).add_(direction_D)
                tiled["linear.bias"].narrow(*rows).sub_(direction_D @ mean_D)
        for name, tensor in tiled.items():
            grown[name].append(tensor.flatten(0, len(after) - 1))
    return {name: torch.cat(tables) for name, tables in grown.items()}


def _gate_grids(manifest: Manifest) -> list[tuple[int, ...]]:
    """The shape in which each score table of a gate grows: a grid dimension, or the grid without product keys."""
    grid = manifest.experts.grid
    return [(size,) for size in grid] if manifest.routing.product_keys else [grid]


def _tiled(rows: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Repeats rows [number of old coordinates, ...] to [*new, ...]."""
    times = [after // before for before, after in zip(old, new, strict=True)]
    return rows.view(*old, *rows.shape[1:]).repeat(*times, *[1] * (rows.dim() - 1))


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    size = _NOISE * tensor.square().mean().sqrt()
    return size * torch.randn(tensor.shape, generator=generator)


@torch.no_grad()
def _gate_inputs(opened: OpenedModel) -> list[Tensor]:
    """What each layer's gate reads while the model writes some text: [N, D], float32."""
    read: list[list[Tensor]] = []
    for mixture in opened.model.mixtures:
        assert isinstance(mixture, RemoteMixtureOfExperts)
        read.append([])
        mixture.gate.register_forward_pre_hook(_recorder(read[-1], opened.manifest.gate_width))
    generator = torch.Generator().manual_seed(opened.manifest.model.seed)
    decoder, first, vocabulary = (
        TextDecoder(opened.model),
        opened.model.first_scored,
        len(opened.tokenizer.token_bytes),
    )
    drawn = torch.randint(vocabulary, (_TEXTS, first), generator=generator)
    sequences = [decoder.begin(prompt) for prompt in drawn.tolist()]
    for _ in range(min(_TOKENS, opened.model.context - first)):
        chances_SV = decoder.logits(sequences).softmax(dim=1)
        for sequence, token in zip(
            sequences, torch.multinomial(chances_SV, 1, generator=generator).flatten().tolist(), strict=True
        ):
            sequence.append(token)
    for sequence in sequences:
        sequence.end()
    return [torch.cat(some) for some in read]


def _recorder(read: list[Tensor], width: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(gate: nn.Module, given: tuple[Tensor, ...]) -> None:
        read.append(given[0][:, :width].float())

    return record
