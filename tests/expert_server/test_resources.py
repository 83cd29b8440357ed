"""The memory that an owner allows is divided without ever exceeding it, and freed memory is kept between batches."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import run_preloaded

from dht.manifest import Manifest
from expert_server.experts.expert import expert_bytes
from expert_server.resources import (
    call_memory_of,
    checkpoint_bytes,
    disk_shortage,
    kept_bytes_of,
    most_bytes,
    require_room,
    smallest_memory,
    snapshots_of,
    within_memory,
)
from expert_server.serving.call import smallest_call_memory
from expert_server.settings import NodeSettings
from expert_server.state.transfer import largest_state_bytes
from peer.errors import SettingsError
from peer.formatting import bytes_in_words, parse_bytes


def manifest_of(hidden: int, context: int) -> Manifest:
    model = {"layers": 2, "hidden": hidden, "heads": 1, "context": context, "feed_forward": hidden}
    return Manifest.model_validate(
        {"name": "sauna", "model": model, "experts": {"grid": [3, 3]}, "routing": {"top_k": 2}}
    )


manifests = st.builds(manifest_of, st.sampled_from([8, 16, 64]), st.integers(2, 512))


@settings(max_examples=40)
@given(
    manifests,
    st.floats(1, 1000),
    st.none() | st.integers(0, 100),
    st.none() | st.integers(0, 100),
    st.none() | st.integers(0, 2**30),
)
def test_all_together_never_takes_more_than_is_allowed(
    manifest: Manifest, times: float, experts: int | None, spare: int | None, kept: int | None
) -> None:
    memory = int(smallest_memory(manifest) * times)
    asked = NodeSettings(memory=memory, experts=experts, spare=spare, max_kept_bytes=kept)
    fitted = within_memory(asked, manifest)
    assert fitted.experts is not None
    assert fitted.spare is not None
    kept_bytes = kept_bytes_of(fitted, 10**15)
    assert most_bytes(fitted, manifest, fitted.experts + fitted.spare, kept_bytes) <= memory
    assert fitted.experts >= (1 if experts is None else min(1, experts))
    assert fitted.experts <= (manifest.experts_total if experts is None else experts)
    assert fitted.spare <= (fitted.spare if spare is None else spare)
    assert kept is None or kept_bytes <= kept
    assert smallest_call_memory(manifest) <= call_memory_of(fitted)


@settings(max_examples=40)
@given(manifests)
def test_the_smallest_that_works_is_named(manifest: Manifest) -> None:
    smallest = smallest_memory(manifest)
    experts = within_memory(NodeSettings(memory=smallest), manifest).experts
    assert experts is not None
    assert experts >= 1
    with pytest.raises(SettingsError, match=re.escape(f"the smallest that works is {smallest} bytes")):
        within_memory(NodeSettings(memory=smallest - 1), manifest)


def test_an_expert_that_does_not_fit_is_refused_before_it_is_built() -> None:
    manifest = manifest_of(256, 16)
    each = expert_bytes(manifest)
    require_room(NodeSettings(), manifest, each)
    require_room(NodeSettings(experts=0, spare=0), manifest, each - 1)
    with pytest.raises(SettingsError, match="an expert of this swarm takes"):
        require_room(NodeSettings(), manifest, each - 1)


def test_what_is_left_is_for_experts_a_third_of_it_to_adopt() -> None:
    manifest = manifest_of(256, 16)
    memory = 16 * expert_bytes(manifest)
    fitted = within_memory(NodeSettings(memory=memory), manifest)
    assert (fitted.experts, fitted.spare) == (6, 3)
    assert fitted.max_kept_bytes == memory // 8
    assert snapshots_of(fitted, manifest) == memory // 8 // largest_state_bytes(manifest)


def test_checkpoints_that_may_not_fit_on_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(16, 8)
    needed = checkpoint_bytes(NodeSettings(), manifest, 8)
    assert needed == 24 * expert_bytes(manifest)
    free = SimpleNamespace(free=needed - 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    said = disk_shortage(tmp_path, NodeSettings(), manifest, 8)
    assert said.startswith(
        f"checkpoints of 8 experts may take {bytes_in_words(needed)}, and {bytes_in_words(free.free)} "
    )
    assert not disk_shortage(tmp_path, NodeSettings(), manifest, 7)
    earlier = tmp_path / "checkpoints" / "sauna" / "0.0"
    earlier.mkdir(parents=True)
    (earlier / "7").write_bytes(bytes(100))
    assert not disk_shortage(tmp_path, NodeSettings(), manifest, 8), "new ones replace those that are there"


def test_kept_forward_passes_have_what_is_asked_or_a_sixteenth_of_what_is_free() -> None:
    assert kept_bytes_of(NodeSettings(max_kept_bytes=7), 1600) == 7
    assert kept_bytes_of(NodeSettings(), 1600) == 100


def test_without_a_limit_nothing_changes() -> None:
    unbounded = NodeSettings()
    assert within_memory(unbounded, manifest_of(8, 8)) is unbounded


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("64 kb", 64_000),
        ("1TiB", 2**40),
        (" 5000000 ", 5_000_000),
        ("100b", 100),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert NodeSettings.load(memory=text).memory == size


@pytest.mark.parametrize("wrong", ["", "much", "2XB", "-2GB", "2 GB RAM", "1e9", "2000PB", "0"])
def test_what_is_no_size_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"memory(: | must )"):
        NodeSettings.load(memory=wrong)


@given(st.integers(0, 10**15))
def test_sizes_are_said_in_three_digits(size: int) -> None:
    words = bytes_in_words(size)
    assert len(words) <= 11
    number, unit = words.split()
    back = float(number) * 1000 ** ("bytes", "kB", "MB", "GB", "TB").index(unit)
    assert back == pytest.approx(size, rel=0.006, abs=0.01)


BATCHES = """
import resource
import torch
from peer.platform.processes import keep_freed_memory, return_freed_memory

keep_freed_memory()

def batch():
    gradients = [torch.ones(2**18) for _ in range(16)]
    return torch.ones(100)  # small, and above them in memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_bytes():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

kept = [batch() for _ in range(5)]
before = faults()
kept += [batch() for _ in range(20)]
print((faults() - before) // 20)
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""


def test_batches_use_memory_again_until_it_is_returned() -> None:
    ended = run_preloaded("-W", "ignore", "-c", BATCHES, env=os.environ)
    faults_per_batch, returned = map(int, ended.stdout.split())
    assert faults_per_batch < 400, "16 MiB are 4096 pages"
    assert returned > 8 * 2**20
