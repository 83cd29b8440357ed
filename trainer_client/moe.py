"""A decentralized mixture of experts as a torch layer.

Ryabinin & Gusev 2020 (arXiv 2002.04013), section 3.1: y = sum of w_k f_k(x) over the experts that answered. An expert
returns its update f_k(x) - x. So the sum needs no weights that add up to 1, and a row without answers stays as it is.
If a row has several experts at one node, the node returns the weighted mean of their updates, and that mean weighs as
much as all of them together. The router decides which experts a row is sent to, and the weights of their answers.

Experts may be narrower than the model (LatentMoE, arXiv 2601.18089): rows are then projected to their width before they
are sent, and the sum of updates is projected back. There may also be a shared expert at the trainer, through which
every token passes (DeepSeekMoE, arXiv 2401.06066).

Shapes: B sequences, T positions, R = B * T rows, U routed rows (each token, or each sequence as a whole), K experts for
each row, D hidden size, W width of the experts, G_d size of score table d.
"""

import operator
import threading
import warnings
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dht.beam_search import Selection
from dht.directory import LiveExperts, PrefixTables
from dht.manifest import Manifest, ModelSpec
from peer.codec import Floats, Integers
from peer.errors import SettingsError
from peer.formatting import in_brief
from peer.layers import make_feed_forward, make_norm
from trainer_client.balancing import LoadBias, LoadSpread, LoadSum, balancing_loss, load_spread
from trainer_client.dispatch.batches import ForwardPass, HeldSequence, RoutedRows, Segments
from trainer_client.routers import Gate, NodeLimit, Routing, noisy_scores

T = TypeVar("T")

RunOnLoop = Callable[[Coroutine[Any, Any, T]], T]
"""Runs a coroutine on the loop's thread and waits for it."""


_MOST_UNBALANCED_STEPS = 10
"""After so many optimizer steps without `rebalance`, a mixture warns."""


class Experts(Protocol):
    """All experts of a swarm, as a mixture sees them."""

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        """The experts of a layer that can be called now. They include each row's best k by its `scores` and the
        experts' `bias`, of the grid's shape.
        """
        ...

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        """Sends each row to the experts selected for it among the `live` ones, and returns their answers.

        With `rows.held`, experts also see the earlier rows of each sequence, and hold these for the next call.
        """
        ...

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        """Sends the gradients of the updates [R, K, W] to the nodes that answered. Returns those of the inputs [R, W],
        and those of the experts' logits [R, K] through their shares in the updates.
        """
        ...


@dataclass(frozen=True)
class Routed:
    """The routing of a forward pass in training."""

    balancing_loss: Tensor | None
    """Added to the loss; None if the router has no balancing loss."""
    spread: LoadSpread | None
    """None if no expert was live."""


@dataclass(eq=False)
class RoutedSequence:
    """What one mixture keeps of a sequence's rows, to compute the next ones without them."""

    held: HeldSequence
    """What the experts keep of it, unless they compute each row by itself."""
    scores: tuple[Tensor, ...] = ()
    """If the whole sequence is routed as one: one [G_d] of each score table, or empty before its first rows."""


class RemoteMixtureOfExperts(nn.Module):
    """Sends each token to the live experts that its router chooses, and adds the weighted sum of their updates to it.

    It contains the gate; the shared expert, if the model has one; and, if experts are narrower than the model, a norm
    and the projections to their width and back. If no expert answers, a token gets only the shared expert's update.
    """

    def __init__(
        self,
        layer: int,
        manifest: Manifest,
        experts: Experts,
        run: "RunOnLoop[Any]",
        routing: Routing,
        gradient_scale: Callable[[], float] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`layer`: in the model, from 0. `gradient_scale`: a GradScaler's `get_scale`, if one is used: experts receive
        unscaled gradients. `check`: called before each forward pass, which raises what it raises. Raises SettingsError
        if the swarm has no such layer, and TypeError if it is not a number.
        """
        super().__init__()
        last = manifest.model.layers - 1
        try:
            self.layer: int = operator.index(layer)
        except TypeError:
            raise TypeError(
                f"pass the layer as a whole number from 0 to {last}, and not {in_brief(layer)}"
            ) from None
        if not 0 <= layer <= last:
            raise SettingsError(f"layer {layer}: this swarm has layers 0 to {last}")
        self.hidden: int = manifest.model.hidden
        self.k: int = routing.k
        self._grid = manifest.experts.grid
        self._kind = manifest.experts.kind
        self._is_causal = manifest.model.is_causal(layer)
        self._routing = routing
        self._router = routing.router
        scale = routing.gate_scale if self._router.starts_small else None
        self.gate: Gate = Gate(
            manifest.gate_width, manifest.score_sizes, scale=scale, has_noise=self._router.has_noise
        )
        # created after the gate, so that the gate starts the same as without them
        self.projections: Projections | None = Projections(manifest) if manifest.width < self.hidden else None
        self.shared: nn.Module | None = _shared_expert(manifest.model)
        self.balance: LoadBias | None = LoadBias(manifest.experts.grid) if routing.has_bias else None
        self.unanswered_rows: int = 0
        """The rows of all forward passes in evaluation that no expert answered."""
        self._loads = LoadSum()
        self._versions: set[int] = set()
        """The versions of the gate's weights that computed forward passes in training since the last `rebalance`."""
        self._experts = experts
        self._run = run
        self._gradient_scale = gradient_scale
        self._check = check
        self._rng = np.random.default_rng((routing.seed, layer))
        self._last = threading.local()  # several threads may train the same layer

    @property
    def routed(self) -> Routed | None:
        """The routing of this thread's last forward pass in training; None before the first."""
        routed: Routed | None = getattr(self._last, "routed", None)
        return routed

    def begin_step(self, number: int) -> None:
        """From now on, draws noise, random choices and dropout for this training step. A resumed run draws the same."""
        self._rng = np.random.default_rng((self._routing.seed, self.layer, number))
        self._loads.take()  # drops the load of a skipped step
        self._versions.clear()

    def disable_compiling(self) -> None:
        """Makes `torch.compile` leave this layer as it is, because calls to nodes can't be compiled.

        It imports torch's compiler, which takes seconds, unless an optimizer has done so before.
        """
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign]  # for torch.compile

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a mixture belongs to its SwarmClient, and can't be copied or pickled: save `state_dict()`, and load it "
            "into another `swarm.mixture(layer)`"
        )

    def rebalance(self, computed: "RemoteMixtureOfExperts") -> None:
        """Corrects the bias of each expert by the rows that it got from `computed`, this mixture or a copy, since the
        last call.
        """
        load = computed._loads.take()
        self._versions.clear()
        computed._versions.clear()
        if self.balance is not None and load is not None:
            self.balance.correct(load)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """[..., D] -> [..., D], of the same dtype and on the same device.

        [T, D] is one sequence, [B, T, D] are B sequences, and further dimensions mean more sequences. Each sequence is
        computed by itself, and causally unless the layer is an encoder's. Mixes in float32, even under autocast.

        `segments`: if x is packed rows [R, D] of several sequences, which rows belong to which.
        """
        assert x.shape[-1] == self.hidden, f"{x.shape[-1]} columns, and this swarm's model has {self.hidden}"
        if self._check is not None:
            self._check()
        if not x.numel():
            return x
        x_RD = x.reshape(-1, self.hidden)
        if segments is None:
            length = x.shape[-2] if x.dim() > 1 else 1
            segments = Segments.whole(len(x_RD) // length, length)
        with torch.autocast(x.device.type, enabled=False):
            y_RD = self._mix(x_RD.float(), segments)
        return y_RD.to(x.dtype).view(x.shape)

    @property
    def can_extend(self) -> bool:
        """Whether the next rows can be computed without sending the earlier ones again. No row's experts may depend on
        later rows, and experts must compute each row by itself or keep the earlier ones.
        """
        is_routed_causally = self._routing.choose_by == "token" or self._routing.prefix > 0
        return self._is_causal and is_routed_causally and self._kind in ("ffn", "transformer")

    def extend(self, x_RD: Tensor, segments: Segments, states: Sequence["RoutedSequence"]) -> Tensor:
        """Computes the next rows of sequences [R, D], as `forward` does for whole sequences in evaluation.

        `states`: for each segment, what was computed of the earlier rows; these rows are added to it.
        """
        with torch.autocast(x_RD.device.type, enabled=False):
            return self._mix(x_RD.float(), segments, states).to(x_RD.dtype)

    def _mix(
        self, x_RD: Tensor, segments: Segments, states: Sequence["RoutedSequence"] | None = None
    ) -> Tensor:
        """[R, D] -> [R, D], float32. One step of a layer: score, find, choose, send, weigh."""
        rng = self._rng if self.training else None
        h_RD = x_RD if self.projections is None else self.projections.normed(x_RD)
        scores = (
            self._score(h_RD, segments, rng) if states is None else self._scores_of(h_RD, segments, states)
        )
        bias = None if self.balance is None else self.balance.table()
        arrays = _arrays(scores)
        live: LiveExperts = self._run(self._experts.find(self.layer, arrays, self.k, bias))
        most = self._routing.nodes_per_token
        limit = None if most is None else NodeLimit.of(live, most)
        selection = self._router.choose(arrays, live.tables, self.k, rng, bias, limit)
        if self.training:
            self._note_routing(scores, selection, live.tables)
        if self._routing.choose_by == "sequence":
            scores, selection = _for_each_row(scores, selection, segments.lengths)
            arrays = _arrays(scores)
        z_RW = h_RD if self.projections is None else self.projections.narrowed(h_RD)
        inputs = z_RW.detach().cpu().numpy()
        keep, held = torch.is_grad_enabled(), None
        if states is not None and self._kind != "ffn":
            held = [state.held for state in states]
        rows = RoutedRows(self.layer, self._grid, inputs, arrays, self.k, segments, keep, bias, held)
        result = self.send(rows, selection, live)
        if not self.training:
            self.unanswered_rows += int((~result.answered.any(axis=1)).sum())
        logits_RK = self.gate.logits(scores, result.coordinates, self._grid)
        updates_RKW: Tensor = _Updates.apply(z_RW, logits_RK, self.gate.linear.weight, self, result)
        answered_RK, leads_RK = (
            torch.from_numpy(array).to(z_RW.device) for array in (result.answered, result.leads)
        )
        weights_RK = self._router.weigh(scores, live.tables, logits_RK, answered_RK).float()
        if self.training and self._router.drops_updates:
            updates_RKW = self._drop(updates_RKW)
        # an answer weighs as much as all experts in it together
        weights_RK = torch.zeros_like(weights_RK).scatter_add(1, leads_RK, weights_RK)
        sum_RW = (weights_RK.unsqueeze(1) @ updates_RKW).squeeze(1)
        y_RD = x_RD + (sum_RW if self.projections is None else self.projections.widened(sum_RW))
        return y_RD if self.shared is None else y_RD + _through(self.shared, x_RD)

    def _score(self, x_RD: Tensor, segments: Segments, rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """The gate's tables [U, G_d], with the router's noise in training."""
        x_UD = x_RD
        if self._routing.choose_by == "sequence":
            parts = torch.split(x_RD, segments.lengths.tolist())
            x_UD = torch.stack([part[: self._routing.prefix or None].mean(dim=0) for part in parts])
        scores: tuple[Tensor, ...] = self.gate(x_UD)
        if rng is not None and self._router.has_noise:
            scores = noisy_scores(scores, self.gate.spreads(x_UD), rng)
        return scores

    def _scores_of(
        self, x_RD: Tensor, segments: Segments, states: Sequence["RoutedSequence"]
    ) -> tuple[Tensor, ...]:
        """Like `_score` in evaluation. The first rows of a sequence decide the scores of all of it."""
        scores = self._score(x_RD, segments, None)
        if self._routing.choose_by == "token":
            return scores
        for state, own in zip(states, zip(*scores, strict=True), strict=True):
            state.scores = state.scores or own
            state.held.is_routed_as_one = True
        return tuple(torch.stack(table) for table in zip(*(state.scores for state in states), strict=True))

    def _note_routing(self, scores: Sequence[Tensor], selection: Selection, alive: PrefixTables) -> None:
        loss = None
        if self.balance is not None and selection.valid.any():
            self._loads.add(self.balance.measure(scores, selection, alive))
            self._warn_if_not_rebalanced()
        if self._routing.has_balancing_loss:
            loss = self._routing.balance_weight * balancing_loss(scores, selection, alive)
        self._last.routed = Routed(loss, load_spread(selection, alive))

    def _warn_if_not_rebalanced(self) -> None:
        """Every optimizer step gives the weights another version."""
        self._versions.add(self.gate.linear.weight._version)
        if len(self._versions) > _MOST_UNBALANCED_STEPS:
            self._versions.clear()
            warnings.warn(
                f"{_MOST_UNBALANCED_STEPS} optimizer steps without talkoot.rebalance(model): call it after each step, "
                "or a few experts get most of the tokens",
                stacklevel=2,
            )

    def _drop(self, updates_RKW: Tensor) -> Tensor:
        rate = self._routing.expert_dropout
        kept = torch.from_numpy(self._rng.random(updates_RKW.shape, dtype=np.float32) >= rate)
        return updates_RKW * kept.to(updates_RKW) / (1 - rate)

    def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        result: ForwardPass = self._run(self._experts.send(rows, selection, live))
        return result

    def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        """Sends gradients back, like the experts' `send_back`. If a gradient is not finite, calls no node and returns
        NaN, because experts would refuse it.
        """
        if not np.isfinite(gradients).all():
            return np.full_like(forward.rows.inputs, np.nan), np.full_like(forward.shares, np.nan)
        if self._gradient_scale is None:
            unscaled: tuple[Floats, Floats] = self._run(self._experts.send_back(forward, gradients))
            return unscaled
        scale = np.float32(self._gradient_scale())
        inputs, logits = self._run(self._experts.send_back(forward, gradients / scale))
        return inputs * scale, logits * scale


class Projections(nn.Module):
    """A norm, and the linear maps from the model to the experts' width and back, without biases."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        hidden, width = manifest.model.hidden, manifest.width
        self.norm: nn.Module = make_norm(manifest.model.norm, hidden)
        self.down: nn.Linear = nn.Linear(hidden, width, bias=False)
        self.up: nn.Linear = nn.Linear(width, hidden, bias=False)

    def normed(self, x_RD: Tensor) -> Tensor:
        """The input of the gate and of `narrowed`."""
        return _through(self.norm, x_RD)

    def narrowed(self, h_RD: Tensor) -> Tensor:
        """[R, D] -> [R, W]"""
        return _through(self.down, h_RD)

    def widened(self, sum_RW: Tensor) -> Tensor:
        """[R, W] -> [R, D]"""
        return _through(self.up, sum_RW)


def _shared_expert(model: ModelSpec) -> nn.Module | None:
    """A feed-forward block [R, D] -> [R, D] with its norm, without a residual connection."""
    if not model.shared_feed_forward:
        return None
    layers = make_feed_forward(model.hidden, model.shared_feed_forward, model.activation)
    return nn.Sequential(make_norm(model.norm, model.hidden), *layers)


def _through(module: nn.Module, rows: Tensor) -> Tensor:
    """Computes in the precision of the module's parameters. Returns float32."""
    output: Tensor = module(rows.to(next(module.parameters()).dtype))
    return output.float()


def rebalance(model: nn.Module, computed: nn.Module | None = None) -> None:
    """Corrects the biases of all mixtures in a model. Call it after each optimizer step, on its thread.

    `computed`: the copy of the model in which the step was computed; None: the model itself. Raises TypeError if it is
    not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pass the model that contains the mixtures, an nn.Module, and not {in_brief(model)}")
    for own, other in zip(model.modules(), (computed or model).modules(), strict=True):
        if isinstance(own, RemoteMixtureOfExperts) and isinstance(other, RemoteMixtureOfExperts):
            own.rebalance(other)


def _arrays(scores: Sequence[Tensor]) -> list[Floats]:
    return [table.detach().cpu().numpy() for table in scores]


def _for_each_row(
    scores: Sequence[Tensor], selection: Selection, lengths: Integers
) -> tuple[tuple[Tensor, ...], Selection]:
    """Repeats one entry of each sequence for each of its rows: U to R."""
    repeats = torch.from_numpy(lengths).to(scores[0].device)
    return tuple(table.repeat_interleave(repeats, dim=0) for table in scores), Selection(
        selection.coordinates.repeat(lengths, axis=0),
        selection.scores.repeat(lengths, axis=0),
        selection.valid.repeat(lengths, axis=0),
    )


class _Updates(torch.autograd.Function):
    """The results of a forward pass. Their backward pass calls all nodes at once."""

    @staticmethod
    def forward(
        ctx: Any,
        z_RW: Tensor,
        logits_RK: Tensor,
        anchor: Tensor,
        mixture: RemoteMixtureOfExperts,
        result: ForwardPass,
    ) -> Tensor:
        """The answers [R, K, W], each in the first of its slots. They depend on the inputs and on the logits. `anchor`
        is any parameter, so that experts receive gradients even if neither of these needs one, as in a model's first
        layer.
        """
        ctx.mixture, ctx.forward_pass = mixture, result
        return torch.from_numpy(result.updates).to(z_RW.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        numbers = np.ascontiguousarray(gradients[0].detach().cpu().numpy())
        found = ctx.mixture.send_back(ctx.forward_pass, numbers)
        inputs_RW, logits_RK = (torch.from_numpy(array).to(gradients[0].device) for array in found)
        return inputs_RW, logits_RK, None, None, None
