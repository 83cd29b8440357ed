"""The gate, which scores grid coordinates or experts, and the routers, which turn its scores into chosen experts and
weights.

Routers are pure functions over live experts. The same scores determine the choice and the weights, so noise is added
before both. A bias that balances the load only affects the choice. All routers but `base` leave the choice to the beam
search over live prefixes, which needs no list of the experts. `switch` needs the softmax over all live experts, whose
total `log_total` computes without a list: the exponential of a sum of scores is a product. `base` compares every row
with every expert, so it needs the list, and at most `MOST_BALANCED` experts in a layer.

If a trainer limits the nodes of each row, experts are chosen among those of the row's best nodes first, as in
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). A row travels once to each node, so fewer nodes mean less traffic.

`rng` is None in evaluation. Then nothing is random, and each row's choice depends only on its own scores.

Shapes: R rows, D hidden size, G_d size of score table d, K chosen experts for each row, E live experts, P prefixes
of all dimensions but the last.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dht.beam_search import Selection, default_beam_size, score_columns, select_experts
from dht.directory import LiveExperts, PrefixTables
from dht.manifest import MOST_KNOWN_EXPERTS, Manifest
from peer.codec import Floats, Integers
from peer.errors import SettingsError
from peer.formatting import counted
from peer.identity import PeerID
from trainer_client.balancing import balanced_assignment
from trainer_client.settings import Balance, RouterName, TrainerSettings

MOST_BALANCED = 256
"""The most experts in a layer that `base` can balance."""

_MOST_LISTED = MOST_KNOWN_EXPERTS
"""If nodes are limited, up to this many live experts are scored one by one. A layer that is known as a whole has no
more.
"""
_CANDIDATES = 16
"""If there are more, only each row's best experts are considered: this many times k."""


@dataclass(frozen=True)
class NodeLimit:
    """Limits how many nodes a row's experts are on, as long as these nodes have k experts."""

    nodes: Integers
    """The number of the node of each expert, in the grid's shape; -1 for experts without a host."""
    most: int

    @classmethod
    def of(cls, live: LiveExperts, most: int) -> Self:
        """The limit for the replicas that will be called."""
        numbers: dict[PeerID, int] = {}
        nodes = np.full(live.tables[-1].shape, -1)
        for uid, peer_id in live.hosts.items():
            nodes[uid.coordinate] = numbers.setdefault(peer_id, len(numbers))
        return cls(nodes, most)


class Choose(Protocol):
    """How experts are chosen."""

    def __call__(
        self,
        scores: Sequence[Floats],
        alive: PrefixTables,
        k: int,
        rng: np.random.Generator | None = None,
        bias: Floats | None = None,
        limit: NodeLimit | None = None,
    ) -> Selection:
        """k experts for each row, best first, given a `Gate`'s scores and a bias of the grid's shape."""
        ...


Weigh = Callable[[Sequence[Tensor], PrefixTables, Tensor, Tensor], Tensor]
"""(scores, prefix tables, logits [R, K], which experts answered [R, K]) -> weights [R, K]; 0 for experts that did not
answer.

The weights of a row's experts must be proportional to exp(logit), whichever of them answered, because a node mixes the
updates of its experts in these ratios (`relative_weights`), and the mean that it returns weighs as much as all of them
together.
"""


class Gate(nn.Module):
    """A small linear map of a row's first columns. An expert's logit is the sum of one score per grid dimension
    (product keys), or a score of its own.

    It computes in float32, whatever the precision of x and of its own parameters, and even under autocast.
    """

    def __init__(
        self, width: int, sizes: tuple[int, ...], *, scale: float | None = None, has_noise: bool = False
    ) -> None:
        """`width`: how many columns it reads. `sizes`: of its score tables, see `Manifest.score_sizes`. With a `scale`,
        the initial weights are from a normal distribution of standard deviation sqrt(scale / width), truncated at twice
        that, and there is no bias (Switch Transformer, arXiv 2101.03961, section 2.4).
        """
        super().__init__()
        self.sizes = sizes
        self.linear: nn.Linear = nn.Linear(width, sum(sizes))
        if scale is not None:
            spread = math.sqrt(scale / width)
            nn.init.trunc_normal_(self.linear.weight, std=spread, a=-2 * spread, b=2 * spread)
            nn.init.zeros_(self.linear.bias)
        self.noise: nn.Linear | None = None
        if has_noise:  # starts at zero, as in Shazeer et al. 2017, appendix A
            self.noise = nn.Linear(width, sum(sizes), bias=False)
            nn.init.zeros_(self.noise.weight)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """One float32 score tensor [R, G_d] per grid dimension, or one [R, E] for all experts in row-major order."""
        return self._map(self.linear, x_RD)

    def spreads(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """The width of the noise for each score, before the softplus: like `forward`, for a gate with noise."""
        assert self.noise is not None, "this gate has no noise"
        return self._map(self.noise, x_RD)

    def _map(self, linear: nn.Linear, x_RD: Tensor) -> tuple[Tensor, ...]:
        bias = None if linear.bias is None else linear.bias.float()
        with torch.autocast(x_RD.device.type, enabled=False):
            read_RC = x_RD[:, : linear.in_features].float()
            scores = F.linear(read_RC, linear.weight.float(), bias)  # (R, sum of sizes)
        return torch.split(scores, list(self.sizes), dim=-1)

    @staticmethod
    def logits(scores: tuple[Tensor, ...], coordinates: Integers, grid: tuple[int, ...]) -> Tensor:
        """Logits [R, K] of the experts at `coordinates` [R, K, dims] of the grid; differentiable in the scores."""
        columns = score_columns(scores, coordinates, grid)
        gathered = [
            scores_RG.gather(1, torch.from_numpy(column_RK).to(scores_RG.device))
            for scores_RG, column_RK in zip(scores, columns, strict=True)
        ]
        return torch.stack(gathered).sum(dim=0)


def mixture_weights(logits_RK: Tensor, answered_RK: Tensor) -> Tensor:
    """Softmax over the experts that answered: [R, K]. The others weigh 0, as do all experts of a row without answers.

    The paper, section 3.1: experts that fail are left out, and the weights of the rest sum to 1.
    """
    left_out_RK = ~answered_RK
    lowest = torch.finfo(logits_RK.dtype).min  # not -inf: for a row of those, softmax and gradient are NaN
    return logits_RK.masked_fill(left_out_RK, lowest).softmax(dim=-1).masked_fill(left_out_RK, 0)


# Choosing


def best(
    scores: Sequence[Floats],
    alive: PrefixTables,
    k: int,
    rng: np.random.Generator | None = None,
    bias: Floats | None = None,
    limit: NodeLimit | None = None,
) -> Selection:
    """The k live experts with the highest scores, including the bias. If nodes are limited, those at the best nodes."""
    if limit is None or limit.most >= k:
        return select_experts(scores, alive, k, default_beam_size(k), bias)
    count = int(np.count_nonzero(alive[-1]))
    count = max(k, count if count <= _MOST_LISTED else _CANDIDATES * k)
    return of_best_nodes(select_experts(scores, alive, count, count, bias), limit, k)


def of_best_nodes(found: Selection, limit: NodeLimit, k: int) -> Selection:
    """Each row's best k of the experts `found` [R, C], which are sorted best first, that are at its best nodes.

    A node's score is the logsumexp of its best k scores. If those nodes have fewer than k experts, the row's best
    experts elsewhere follow, so that each row has k.
    """
    rows, count = found.valid.shape
    node_RC = np.where(found.valid, limit.nodes[tuple(np.moveaxis(found.coordinates, -1, 0))], -1)
    nodes = int(limit.nodes.max(initial=-1)) + 1
    # sorted by node, and by score within a node
    node_rank_RC, rank_RC = np.divmod(np.sort(node_RC * count + np.arange(count), axis=1), count)
    place_C = np.arange(count)
    begins_RC = np.ones((rows, count), np.bool_)
    begins_RC[:, 1:] = node_rank_RC[:, 1:] != node_rank_RC[:, :-1]
    first_RC = np.maximum.accumulate(np.where(begins_RC, place_C, 0), axis=1)
    counted_RC = (node_rank_RC >= 0) & (place_C - first_RC < k)
    weight_RC = np.exp(found.scores.astype(np.float64) - found.scores[:, :1])
    weight_RC = np.where(counted_RC, np.take_along_axis(weight_RC, rank_RC, axis=1), 0)
    at_RC = np.arange(rows)[:, None] * (nodes + 1) + node_rank_RC + 1  # 0: no node
    size_RN = np.bincount(at_RC.ravel(), weight_RC.ravel(), rows * (nodes + 1)).reshape(rows, nodes + 1)
    size_RN[:, 0] = -1
    allowed_RN = np.zeros(size_RN.shape, np.bool_)
    np.put_along_axis(allowed_RN, np.argsort(-size_RN, axis=1, kind="stable")[:, : limit.most], True, axis=1)
    allowed_RN[:, 0] = False
    usable_RC = np.take_along_axis(allowed_RN, node_RC + 1, axis=1)
    chosen_Rk = np.argsort(~usable_RC, axis=1, kind="stable")[:, :k]
    valid_Rk = np.take_along_axis(node_RC >= 0, chosen_Rk, axis=1)
    coordinates = np.take_along_axis(found.coordinates, chosen_Rk[..., None], axis=1)
    scores_Rk = np.take_along_axis(found.scores, chosen_Rk, axis=1)
    return Selection(
        np.where(valid_Rk[..., None], coordinates, 0), np.where(valid_Rk, scores_Rk, np.float32(0)), valid_Rk
    )


def best_others_by_chance(
    scores: Sequence[Floats],
    alive: PrefixTables,
    k: int,
    rng: np.random.Generator | None = None,
    bias: Floats | None = None,
    limit: NodeLimit | None = None,
) -> Selection:
    """The best expert, and each of the k - 1 next with probability min(1, k g), where g is its weight among the k.

    GShard (arXiv 2006.16668), algorithm 1, "random routing", there with k = 2. In evaluation, all k.
    """
    selection = best(scores, alive, k, bias=bias, limit=limit)
    if rng is None:
        return selection
    chance_RK = rng.random(selection.valid.shape, dtype=np.float32)
    logits_RK = Gate.logits(tuple(map(torch.from_numpy, scores)), selection.coordinates, alive[-1].shape)
    valid_RK = torch.from_numpy(selection.valid)
    kept_RK = chance_RK < k * mixture_weights(logits_RK, valid_RK).numpy()
    kept_RK[:, 0] = True
    return replace(selection, valid=selection.valid & kept_RK)


def balanced(
    scores: Sequence[Floats],
    alive: PrefixTables,
    k: int,
    rng: np.random.Generator | None = None,
    bias: Floats | None = None,
    limit: NodeLimit | None = None,
) -> Selection:
    """In training, one expert for each row and R / E rows for each live expert (BASE, arXiv 2103.16716, section 3.1).

    In training, a row's expert depends on all rows. In evaluation it is the row's best, so that no row affects another.
    There is no bias, because all experts get equally many rows.
    """
    assert bias is None, "base balances without a bias"
    live = np.argwhere(alive[-1])
    if rng is None or not len(live):
        return best(scores, alive, k)
    columns = score_columns(scores, live, alive[-1].shape)
    logits_RE = np.sum([scores_RG[:, c_E] for scores_RG, c_E in zip(scores, columns, strict=True)], axis=0)
    expert_R = balanced_assignment(logits_RE)
    chosen_R1 = np.take_along_axis(logits_RE, expert_R[:, None], axis=1)
    return Selection(live[expert_R][:, None], chosen_R1, np.ones(chosen_R1.shape, dtype=np.bool_))


# Weighing


def softmax_of_answered(
    scores: Sequence[Tensor], alive: PrefixTables, logits_RK: Tensor, answered_RK: Tensor
) -> Tensor:
    """The gate's softmax, renormalised over the chosen experts that answered."""
    return mixture_weights(logits_RK, answered_RK)


def probability_among_live(
    scores: Sequence[Tensor], alive: PrefixTables, logits_RK: Tensor, answered_RK: Tensor
) -> Tensor:
    """The softmax over all live experts, not renormalised: otherwise a single expert would weigh 1, and the gate would
    learn nothing (Switch Transformer, arXiv 2101.03961, equation 2).
    """
    total_R1 = log_total(scores, alive).unsqueeze(1)
    logits_RK = logits_RK.masked_fill(~answered_RK, torch.finfo(logits_RK.dtype).min)
    # an expert that has become live since was not in the total
    return (logits_RK - total_R1).exp().clamp(max=1).to(logits_RK.dtype)


def sigmoid_of_logit(
    scores: Sequence[Tensor], alive: PrefixTables, logits_RK: Tensor, answered_RK: Tensor
) -> Tensor:
    """BASE (arXiv 2103.16716), section 3: an expert's weight depends on its own score alone."""
    return logits_RK.masked_fill(~answered_RK, 0).sigmoid().masked_fill(~answered_RK, 0)


def log_total(scores: Sequence[Tensor], alive: PrefixTables) -> Tensor:
    """The logarithm of the sum of exp(logit) over all live experts, float64 [R]. Never lists the experts."""
    highest = [scores_RG.detach().double().amax(dim=1, keepdim=True) for scores_RG in scores]
    factors = [(s_RG.double() - top_R1).exp() for s_RG, top_R1 in zip(scores, highest, strict=True)]
    live_PG = torch.from_numpy(alive[-1]).to(factors[-1]).reshape(-1, factors[-1].shape[1])
    total_RP = factors[-1] @ live_PG.T
    for factor_RG in reversed(factors[:-1]):
        rows, size = factor_RG.shape
        total_RP = (total_RP.view(rows, -1, size) * factor_RG.unsqueeze(1)).sum(dim=2)
    smallest = torch.finfo(torch.float64).tiny  # no live expert: log(0) would have no gradient
    return total_RP.squeeze(1).clamp_min(smallest).log() + torch.cat(highest, dim=1).sum(dim=1)


# Noise


def noisy_scores(
    scores: Sequence[Tensor], spreads: Sequence[Tensor], rng: np.random.Generator
) -> tuple[Tensor, ...]:
    """H = score + normal noise * softplus(spread) (Shazeer et al. 2017, arXiv 1701.06538, equation 4)."""
    noisy = []
    for scores_RG, spread_RG in zip(scores, spreads, strict=True):
        noise_RG = torch.from_numpy(rng.standard_normal(scores_RG.shape, dtype=np.float32))
        noisy.append(scores_RG + noise_RG.to(scores_RG.device) * F.softplus(spread_RG))
    return tuple(noisy)


# Routers


@dataclass(frozen=True)
class Router:
    """The properties of a router."""

    choose: Choose = best
    weigh: Weigh = softmax_of_answered
    k: int | None = None
    """Experts for each row; None: the manifest's top_k."""
    only_k: bool = False
    """Whether this k is the only possible one."""
    has_noise: bool = False
    balance: Balance = "loss"
    """How the load is balanced unless the settings say otherwise."""
    starts_small: bool = False
    """Whether its gate starts with smaller parameters."""
    drops_updates: bool = False
    """Whether some of the experts' updates are dropped in training."""


ROUTERS: dict[RouterName, Router] = {
    # the paper, section 3.1
    "product-key": Router(balance="bias"),
    # Shazeer et al. 2017 with GShard's choice of the second expert
    "noisy-top-k": Router(best_others_by_chance, k=2, has_noise=True),
    # Fedus et al. 2021
    "switch": Router(
        weigh=probability_among_live, k=1, only_k=True,
        starts_small=True, drops_updates=True,
    ),
    # Lewis et al. 2021
    "base": Router(balanced, sigmoid_of_logit, k=1, only_k=True, balance="none"),
    # Du et al. 2021 (arXiv 2112.06905)
    "glam": Router(k=2),
}  # fmt: skip


ChooseBy: TypeAlias = Literal["token", "sequence"]


@dataclass(frozen=True)
class Routing:
    """A router with its parameters."""

    name: RouterName = "product-key"
    k: int = 4
    """Experts for each row."""
    choose_by: ChooseBy = "token"
    """How experts are chosen. With "sequence", the mean of a sequence's first `prefix` tokens chooses the experts of
    all of its tokens.
    """
    prefix: int = 0
    """0: the mean of all tokens decides, which is not for causal models. With a prefix, a model is causal only from the
    prediction of the token after it on: tokens of the prefix may not be predicted in the loss.
    """
    balance: Balance | None = None
    """How the load is balanced; None: the router's own way."""
    balance_weight: float = 0.01
    """The weight of the balancing loss in the loss."""
    expert_dropout: float = 0.1
    gate_scale: float = 0.1
    nodes_per_token: int | None = None
    """How many nodes the experts of a row may be on; None: any number."""
    seed: int = 0
    """The seed of noise, random choices and dropout."""

    @classmethod
    def of(cls, settings: TrainerSettings, manifest: Manifest, own_seed: int) -> Self:
        """The routing for a trainer's settings and the manifest. `own_seed` is used if the settings have no seed.

        Raises SettingsError if the router does not fit the swarm or the other settings.
        """
        if settings.router == "base" and settings.balance not in (None, "none"):
            raise SettingsError(
                f"balance: the router base balances the load itself: leave {settings.balance} out"
            )
        return cls(
            settings.router,
            experts_for_each_row(settings.router, settings.top_k, manifest),
            "sequence" if manifest.routing.prefix else "token",
            manifest.routing.prefix,
            settings.balance,
            settings.balance_weight,
            settings.expert_dropout,
            settings.gate_scale,
            settings.nodes_per_token,
            own_seed if settings.seed is None else settings.seed,
        )

    @property
    def router(self) -> Router:
        return ROUTERS[self.name]

    @property
    def has_bias(self) -> bool:
        """Whether a bias for each expert balances the load."""
        return (self.balance or self.router.balance) in ("bias", "both")

    @property
    def has_balancing_loss(self) -> bool:
        return (self.balance or self.router.balance) in ("loss", "both")


def experts_for_each_row(name: RouterName, asked: int | None, manifest: Manifest) -> int:
    """K of this router in this swarm: at most the manifest's top_k. Raises SettingsError if it can't be the `asked`
    number.
    """
    router, most = ROUTERS[name], manifest.routing.top_k
    if name == "base" and manifest.experts.count > MOST_BALANCED:
        raise SettingsError(
            f"router: base balances at most {MOST_BALANCED} experts in a layer, but this swarm has "
            f"{manifest.experts.count}: use switch"
        )
    if asked is None:
        return most if router.k is None else min(router.k, most)
    if router.only_k and asked != router.k:
        raise SettingsError(f"top_k: {name} sends each token to {router.k} expert, not to {asked}")
    if asked > most:
        raise SettingsError(
            f"top_k: this swarm's manifest allows {counted(most, 'expert')} for each token, not {asked}"
        )
    return asked
