"""Which devices a node computes on and with what precision, and that rows come back whole."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_server.experts import devices
from expert_server.experts.devices import (
    ComputeDevice,
    Found,
    check_devices,
    choose_devices,
    choose_precision,
    open_devices,
    roomiest,
)
from expert_server.resources import batch_rows_of
from expert_server.settings import NodeSettings, PrecisionSetting
from peer.errors import SettingsError, StartError

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none"
)

NOTHING, MAC = Found(), Found(mps=True)
TWO_GPUS = Found(cuda=((8, 0), (7, 5)))

found_things = st.builds(
    Found, st.lists(st.tuples(st.integers(5, 12), st.integers(0, 9)), max_size=4).map(tuple), st.booleans()
)


@pytest.mark.parametrize(
    ("setting", "found", "expected"),
    [
        ("auto", NOTHING, ("cpu",)),
        ("auto", MAC, ("mps",)),
        ("auto", TWO_GPUS, ("cuda:0", "cuda:1")),
        ("cpu", TWO_GPUS, ("cpu",)),
        ("cuda", TWO_GPUS, ("cuda:0",)),
        ("cuda:1", TWO_GPUS, ("cuda:1",)),
        ("cuda:1, cuda:0", TWO_GPUS, ("cuda:1", "cuda:0")),
        ("cuda:0,cpu", TWO_GPUS, ("cuda:0", "cpu")),
        ("mps", MAC, ("mps",)),
    ],
)
def test_the_setting_names_devices(setting: str, found: Found, expected: tuple[str, ...]) -> None:
    assert choose_devices(setting, found) == expected


@pytest.mark.parametrize(
    ("setting", "found", "said"),
    [
        (
            "cuda",
            NOTHING,
            "device cuda: torch finds no CUDA GPU on this machine; `python -m torch.utils.collect_env`",
        ),
        ("cuda:2", TWO_GPUS, "device cuda:2: torch finds cuda:0, cuda:1 on this machine"),
        ("mps", NOTHING, "device mps: torch finds no Metal GPU here"),
        ("cuda:0,cuda", TWO_GPUS, "name each device once"),
        ("gpu", TWO_GPUS, "device 'gpu': expected auto, cpu, mps, cuda"),
        ("cuda:", TWO_GPUS, "device 'cuda:': expected"),
        ("cpu:0", TWO_GPUS, "device 'cpu:0': expected"),
        ("cuda:0,", TWO_GPUS, "device '': expected"),
        ("cuda:0,auto", TWO_GPUS, "device 'auto': expected"),
    ],
)
def test_a_device_that_is_not_there_is_refused_and_named(setting: str, found: Found, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose_devices(setting, found)
    assert said in str(caught.value)


@given(
    st.one_of(
        st.text(max_size=20), st.lists(st.sampled_from(["cpu", "cuda", "cuda:1", "mps"])).map(",".join)
    ),
    found_things,
)
def test_any_setting_gives_devices_that_are_there_or_an_error(setting: str, found: Found) -> None:
    there = {"cpu", *(f"cuda:{n}" for n in range(len(found.cuda))), *(["mps"] if found.mps else [])}
    try:
        chosen = choose_devices(setting, found)
    except SettingsError:
        return
    assert chosen
    assert set(chosen) <= there
    assert len(set(chosen)) == len(chosen)


@given(found_things)
def test_auto_always_finds_something(found: Found) -> None:
    assert all(choose_precision("auto", name, found) for name in choose_devices("auto", found))


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("auto", "cpu", "fp32"),
        ("auto", "mps", "fp32"),
        ("auto", "cuda:0", "bf16"),
        ("auto", "cuda:1", "fp32"),
        ("bf16", "cpu", "bf16"),
        ("fp32", "cuda:0", "fp32"),
        ("tf32", "cuda:0", "tf32"),
    ],
)
def test_the_precision_is_what_the_device_can(setting: PrecisionSetting, device: str, expected: str) -> None:
    assert choose_precision(setting, device, Found(TWO_GPUS.cuda, mps=True)) == expected


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_tf32_is_for_cuda_alone(device: str) -> None:
    with pytest.raises(SettingsError, match=f"precision tf32 .* computes on {device}"):
        choose_precision("tf32", device, MAC)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=4), st.integers(1, 60))
def test_experts_are_spread_in_proportion_to_memory(memory: list[int], experts: int) -> None:
    places = [ComputeDevice(memory_bytes=size) for size in memory]
    hosted: Counter[ComputeDevice] = Counter()
    for _ in range(experts):
        hosted[roomiest(places, hosted)] += 1
    # Handing an expert over would leave no device less crowded.
    crowding = max(hosted[place] / place.memory_bytes for place in places)
    assert all((hosted[place] + 1) / place.memory_bytes >= crowding for place in places)


def test_the_cpu_is_opened_without_looking_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find", lambda: pytest.fail("looked for GPUs"))
    (cpu,) = open_devices("cpu", "bf16")
    assert str(cpu) == "cpu in bf16"
    assert cpu.memory_bytes > 2**20


def test_a_gpu_that_torch_cannot_use_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: int) -> tuple[int, int]:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    with pytest.raises(StartError, match=r"busy or unavailable; --device cpu computes without"):
        check_devices("auto", "auto")


def test_a_device_that_does_not_compute_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available\nSearch for `cudaErrorNoKernel"
        )

    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(
        StartError, match=r"^cpu does not compute: CUDA error: no kernel image is available; if"
    ):
        open_devices("cpu", "fp32")


def test_a_device_whose_memory_others_take_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", allocate)
    ComputeDevice().require_working()


def test_memory_that_torch_keeps_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("mps"))
    for name in ("cpu", "mps"):
        ComputeDevice(name).return_freed_memory()
    assert calls == ["mps"]


def test_settings_refuse_an_unknown_precision(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('precision = "fp8"\n')
    with pytest.raises(SettingsError, match="precision must be 'auto', 'fp32', 'tf32' or 'bf16'"):
        NodeSettings.load(config)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_rows_come_back_as_they_were_sent(name: str) -> None:
    device = ComputeDevice(name)
    sent = [torch.randn(1000, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    doubled = [device.load(rows) * 2 for rows in sent]
    assert all(rows.device.type == name for rows in doubled)
    fetched = [device.fetch(rows) for rows in doubled]
    device.wait()
    for rows, came_back in zip(sent, fetched, strict=True):
        assert came_back.device.type == "cpu"
        assert torch.equal(came_back, rows * 2)


@needs_cuda
def test_tf32_is_switched_on_for_matrices() -> None:
    matrices = torch.backends.cuda.matmul
    before, matrices.fp32_precision = matrices.fp32_precision, "ieee"
    try:
        open_devices("cuda", "tf32")
        assert matrices.fp32_precision == "tf32"
    finally:
        matrices.fp32_precision = before


def test_works_are_merged_up_to_what_a_device_gains_by() -> None:
    assert batch_rows_of(["cpu"]) == 128
    assert batch_rows_of(["cuda", "cuda"]) == 2048
