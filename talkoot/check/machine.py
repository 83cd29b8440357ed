"""What of this machine can be checked without a network: speed, memory, cores and disk."""

import errno
import os
import shutil
import time
from pathlib import Path

import psutil
import torch

from dht.manifest import Manifest
from expert_server.experts.expert import BackwardPart, Expert, expert_bytes
from expert_server.machine import usable_cores
from expert_server.resources import within_memory
from expert_server.settings import NodeSettings, bytes_in_words
from peer.errors import SettingsError
from peer.formatting import counted
from talkoot.check.report import Finding, Verdict

_SLOW_ROWS_PER_S = 200.0
"""Slower than that, one sequence of a few hundred tokens takes longer than trainers like to wait."""
_MEASURE_S = 1.5
_ROWS = 512
_FREE_MEMORY_SHARE = 0.25
"""What a node takes by itself."""
_DISK_TEST_BYTES = 16 * 2**20
_SLOW_DISK_BYTES_PER_S = 5e6


def check_speed(settings: NodeSettings, manifest: Manifest) -> Finding:
    """Trains one expert of the manifest for a moment. It blocks; not for the event loop."""
    cores = usable_cores()
    threads = min(settings.threads or cores, cores)
    rows_per_s = _rows_per_s(manifest, threads)
    model, kind = manifest.model, manifest.experts.kind
    says = f"{rows_per_s:,.0f} rows/s, forward and backward, through a {kind} expert of hidden size {model.hidden}"
    slow = rows_per_s < _SLOW_ROWS_PER_S
    return Finding(
        name="speed",
        verdict=Verdict.WEAK if slow else Verdict.OK,
        says=says,
        fix="close other programs; else this swarm's experts are too large for this machine" if slow else "",
        values={"rows_per_s": rows_per_s, "threads": threads},
    )


def check_memory(settings: NodeSettings, manifest: Manifest) -> Finding:
    """How many experts fit."""
    free, each = psutil.virtual_memory().available, expert_bytes(manifest)
    values = {"free_bytes": free, "expert_bytes": each, "experts_that_fit": free // each}
    name, says = "memory", f"{bytes_in_words(free)} free; an expert takes {bytes_in_words(each)}"
    try:
        wanted = within_memory(settings, manifest).experts
    except SettingsError as error:
        return Finding(name=name, verdict=Verdict.PROBLEM, says=says, fix=str(error), values=values)
    if each > free:
        fix = "close other programs: not one expert fits"
        return Finding(name=name, verdict=Verdict.PROBLEM, says=says, fix=fix, values=values)
    if wanted is not None and wanted * each > free:
        fix = f"no room for {counted(wanted, 'expert')}: pass --experts {free // each} or fewer"
        return Finding(name=name, verdict=Verdict.WEAK, says=says, fix=fix, values=values)
    hosts = wanted
    if hosts is None:
        hosts = min(max(1, int(_FREE_MEMORY_SHARE * free / each)), manifest.experts_total)
    says += f"; it would host {hosts}, and {free // each} would fit"
    return Finding(name=name, verdict=Verdict.OK, says=says, values=values | {"experts": hosts})


def check_cores() -> Finding:
    cores, load = usable_cores(), os.getloadavg()[0]
    says = f"{counted(cores, 'core')}, {load:.1f} busy in the last minute"
    busy = load > 0.75 * cores
    return Finding(
        name="cores",
        verdict=Verdict.WEAK if busy else Verdict.OK,
        says=says,
        fix="other programs need the machine: --only-when-idle lets a node wait for them" if busy else "",
        values={"cores": cores, "load": load},
    )


def check_disk(state: Path, settings: NodeSettings, manifest: Manifest, experts: int) -> Finding:
    """Free room and write speed of the state folder, tried with 16 MiB. It blocks; not for the event loop."""
    try:
        speed, free = _write_speed(state), shutil.disk_usage(state).free
    except OSError as error:
        return Finding(
            name="disk",
            verdict=Verdict.PROBLEM,
            says=f"can't write in {state}: {error.strerror}",
            fix=("make room there, or " if error.errno == errno.ENOSPC else "") + "pass another --state",
        )
    needed = experts * (settings.checkpoints_kept + 1) * expert_bytes(manifest)
    says = f"{bytes_in_words(free)} free in {state}, {bytes_in_words(speed)}/s"
    values = {"free_bytes": free, "needed_bytes": needed, "write_bytes_per_s": speed}
    verdict, fix = Verdict.OK, ""
    if free < needed:
        verdict = Verdict.WEAK
        needs = f"checkpoints of {counted(experts, 'expert')} may take {bytes_in_words(needed)}"
        fix = f"{needs}: make room, or host fewer"
    elif speed < _SLOW_DISK_BYTES_PER_S:
        verdict, fix = Verdict.WEAK, "saving checkpoints would be slow: pass a --state on a faster disk"
    return Finding(name="disk", verdict=verdict, says=says, fix=fix, values=values)


def _rows_per_s(manifest: Manifest, threads: int) -> float:
    torch.set_num_threads(threads)
    expert = Expert(manifest.uids()[0], manifest)
    length = min(manifest.model.context, _ROWS)
    segments = max(1, _ROWS // length)
    rows, hidden = segments * length, manifest.model.hidden
    lengths, positions = torch.full((segments,), length), torch.arange(length).repeat(segments)
    inputs, gradients = torch.randn(rows, hidden), torch.randn(rows, hidden)
    done, began = 0, 0.0
    while not done or time.perf_counter() - began < _MEASURE_S:
        if not began:  # the first round sets up what the others use
            _train(expert, inputs, gradients, lengths, positions)
            began = time.perf_counter()
        _train(expert, inputs, gradients, lengths, positions)
        done += rows
    return done / (time.perf_counter() - began)


def _train(expert: Expert, *tensors: torch.Tensor) -> None:
    inputs, gradients, lengths, positions = tensors
    _, graph = expert.forward_with_graph(inputs, lengths, positions)
    expert.backward([BackwardPart(inputs, gradients, lengths, positions, graph)])


def _write_speed(folder: Path) -> float:
    """Bytes per second that reach the disk."""
    path = folder / ".check"
    data = os.urandom(_DISK_TEST_BYTES)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(data) / max(time.perf_counter() - began, 1e-6)
    finally:
        path.unlink(missing_ok=True)
