"""An expert: its updates, gradients and steps."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from expert_samples import (
    AN_UID,
    HIDDEN,
    LENGTHS,
    POSITIONS,
    ROWS,
    backward,
    gradients_that_overflow_when_summed,
    make_manifest,
    parameters_of,
    random_rows,
)
from grpc import StatusCode
from torch import Tensor

from dht.uid import UID
from expert_server.blocks import build_block
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import StepOutcome
from peer.errors import ExpertError


def test_every_node_starts_an_expert_from_the_same_parameters() -> None:
    first, second = build_block(make_manifest(), AN_UID), build_block(make_manifest(), AN_UID)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("seed", "uid"),
    [(3, UID(0, (0, 1))), (3, UID(1, (1, 0))), (4, AN_UID)],
    ids=["layer", "coordinate", "seed"],
)
def test_another_uid_or_seed_gives_other_parameters(seed: int, uid: UID) -> None:
    first, other = build_block(make_manifest(), AN_UID), build_block(make_manifest(seed), uid)
    assert not torch.equal(
        first.state_dict()["attention_input.weight"], other.state_dict()["attention_input.weight"]
    )


def test_first_parameters_stay_the_same_between_releases() -> None:
    weight = build_block(make_manifest(), AN_UID).state_dict()["attention_input.weight"]
    torch.testing.assert_close(
        weight[0, :3], torch.tensor([-0.008971, 0.090666, -0.186289]), atol=1e-6, rtol=0
    )


def test_forward_gives_what_the_block_adds_to_its_input_without_a_graph() -> None:
    expert = Expert(AN_UID, make_manifest())
    update = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS))
    assert not update.requires_grad
    assert update.dtype == torch.float32
    torch.testing.assert_close(random_rows(0) + update, expert.block(random_rows(0), LENGTHS, POSITIONS))


@pytest.mark.parametrize("kept", [False, True])
def test_backward_gives_the_gradient_of_the_inputs_before_the_step(kept: bool) -> None:
    """It is the gradient of the update. The gradient of the block adds the incoming gradient, which the residual
    connection passes on.
    """
    expert = Expert(AN_UID, make_manifest())
    x = random_rows(0).requires_grad_()
    output = build_block(make_manifest(), AN_UID)(x, LENGTHS, POSITIONS)
    (of_output,) = torch.autograd.grad(output, x, random_rows(1))
    graph = expert.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))[1] if kept else None
    found = backward(expert, random_rows(0), random_rows(1), graph)
    torch.testing.assert_close(found + random_rows(1), of_output)


@pytest.mark.parametrize(
    ("name", "momentum", "reference"),
    [
        ("adamw", None, torch.optim.AdamW),
        ("adam", None, torch.optim.Adam),
        ("sgd", None, partial(torch.optim.SGD, momentum=0.9)),
        ("sgd", 0.0, partial(torch.optim.SGD, momentum=0.0)),
    ],
)
def test_backward_takes_the_clipped_step_of_the_manifests_optimizer(
    name: Literal["adamw", "adam", "sgd"],
    momentum: float | None,
    reference: Callable[..., torch.optim.Optimizer],
) -> None:
    manifest = make_manifest(clip_norm=0.5, warmup_updates=2, name=name, momentum=momentum)
    expert, block = Expert(AN_UID, manifest), build_block(manifest, AN_UID)
    optimizer = reference(
        [
            {
                "params": [p for name, p in block.named_parameters() if not is_vector(name)],
                "weight_decay": 0.1,
            },
            {"params": [p for name, p in block.named_parameters() if is_vector(name)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        fused=True,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2))
    for seed in range(4):
        optimizer.zero_grad()
        block(random_rows(seed), LENGTHS, POSITIONS).backward(random_rows(seed + 10))
        torch.nn.utils.clip_grad_norm_(block.parameters(), 0.5)
        optimizer.step()
        warm_up.step()
        backward(expert, random_rows(seed), random_rows(seed + 10))
    assert expert.update_count == 4
    torch.testing.assert_close(
        parameters_of(expert), [p.detach() for p in block.parameters()], atol=0, rtol=0
    )


def is_vector(name: str) -> bool:
    return "norm" in name or name.endswith("bias")


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_biases_and_norms_do_not_decay(name: Literal["adamw", "adam", "sgd"]) -> None:
    expert = Expert(AN_UID, make_manifest(name=name, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in expert.block.named_parameters()}
    backward(expert, random_rows(0), torch.zeros(ROWS, HIDDEN))
    changed = {n for n, p in expert.block.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if not is_vector(name)}


def test_steps_reduce_a_loss() -> None:
    expert, target = Expert(AN_UID, make_manifest()), random_rows(1)
    losses = []
    for _ in range(30):
        output = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS))
        losses.append((output - target).square().mean().item())
        backward(expert, random_rows(0), 2 * (output - target) / target.numel())
    assert losses[-1] < 0.3 * losses[0]


def test_step_size_rises_linearly_through_the_warm_up() -> None:
    expert = Expert(AN_UID, make_manifest(learning_rate=0.1, warmup_updates=4))
    sizes = []
    for seed in range(6):
        backward(expert, random_rows(seed), random_rows(seed + 10))
        sizes.append(expert.optimizer.learning_rate)
    assert sizes == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_step_size_falls_to_a_tenth_where_the_manifest_says_so() -> None:
    expert = Expert(AN_UID, make_manifest(learning_rate=0.1, warmup_updates=1, decay_updates=5))
    sizes = []
    for seed in range(7):
        backward(expert, random_rows(seed), random_rows(seed + 10))
        sizes.append(expert.optimizer.learning_rate)
    assert sizes[:2] == [0.1, 0.1]
    assert sizes[1:6] == sorted(sizes[1:6], reverse=True)
    assert sizes[3] == pytest.approx(0.055)  # half-way
    assert sizes[5:] == pytest.approx([0.01, 0.01])


def test_parameter_gradients_that_are_not_finite_skip_the_update() -> None:
    expert = Expert(AN_UID, make_manifest())
    before = parameters_of(expert)
    rows = Rows(random_rows(0), LENGTHS, POSITIONS, gradients_that_overflow_when_summed())
    (gradient,), outcome = expert.backward([rows])
    assert gradient.isfinite().all()
    torch.testing.assert_close(parameters_of(expert), before, atol=0, rtol=0)
    assert (expert.update_count, outcome) == (0, StepOutcome.SKIPPED)


@pytest.mark.parametrize(
    "call",
    [
        lambda expert: expert.forward(Rows(torch.full((ROWS, HIDDEN), 3e38), LENGTHS, POSITIONS)),
        lambda expert: backward(expert, random_rows(0), torch.full((ROWS, HIDDEN), 3e38)),
    ],
    ids=["forward", "backward"],
)
def test_numbers_that_overflow_are_an_error_and_change_nothing(call: Callable[[Expert], Tensor]) -> None:
    expert = Expert(AN_UID, make_manifest())
    before = parameters_of(expert)
    with pytest.raises(ExpertError, match=r"of expert 1\.0\.1 are not finite") as caught:
        call(expert)
    assert caught.value.status is StatusCode.INTERNAL
    torch.testing.assert_close(parameters_of(expert), before, atol=0, rtol=0)
    assert expert.update_count == 0


def test_an_expert_goes_on_after_a_skipped_update() -> None:
    expert, untouched = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    with pytest.raises(ExpertError):
        backward(expert, random_rows(0), torch.full((ROWS, HIDDEN), 3e38))
    for replica in (expert, untouched):
        backward(replica, random_rows(0), random_rows(1))
    torch.testing.assert_close(parameters_of(expert), parameters_of(untouched), atol=0, rtol=0)
    assert expert.update_count == 1


def test_estimating_an_expert_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    expert_bytes(make_manifest())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kept_graph_gives_what_computing_again_gives() -> None:
    kept, plain = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    output, graph = kept.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))
    torch.testing.assert_close(output, plain.forward(Rows(random_rows(0), LENGTHS, POSITIONS)))
    torch.testing.assert_close(
        backward(kept, random_rows(0), random_rows(1), graph), backward(plain, random_rows(0), random_rows(1))
    )
    torch.testing.assert_close(parameters_of(kept), parameters_of(plain))


def test_parts_of_one_backward_take_one_step_on_the_sum_of_their_gradients() -> None:
    expert, plain = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    _, graph = expert.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))
    expert.backward(
        [
            Rows(random_rows(0), LENGTHS, POSITIONS, random_rows(1), graph),
            Rows(random_rows(2), LENGTHS, POSITIONS, random_rows(3)),
        ]
    )
    joined = Rows(
        torch.cat([random_rows(0), random_rows(2)]),
        torch.cat([LENGTHS, LENGTHS]),
        torch.cat([POSITIONS, POSITIONS]),
        torch.cat([random_rows(1), random_rows(3)]),
    )
    plain.backward([joined])
    assert expert.update_count == plain.update_count == 1
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain))


def test_the_memory_of_a_graph_grows_with_its_rows() -> None:
    expert = Expert(AN_UID, make_manifest())
    _, small = expert.forward_with_graph(Rows(random_rows(0)[:5], LENGTHS[:1], POSITIONS[:5]))
    _, large = expert.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))
    assert 5 * HIDDEN * 4 < small.bytes < large.bytes
