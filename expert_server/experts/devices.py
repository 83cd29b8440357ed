"""The devices that a node computes on, their precision, and the copies of rows to them and back.

The choice is a function of what torch reports. Only `ComputeDevice` touches the device.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import psutil
import torch
from torch import Tensor

from expert_server.settings import PrecisionSetting
from peer.errors import SettingsError, StartError

Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]

_AMPERE = (8, 0)  # the first GPUs that support bfloat16


@dataclass(frozen=True)
class Found:
    """The devices that torch finds on this machine."""

    cuda: tuple[tuple[int, int], ...] = ()
    """The compute capability of each CUDA GPU."""
    mps: bool = False


def find() -> Found:
    """Asks torch. Raises StartError if there is a CUDA GPU that torch can't use."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    try:
        return Found(tuple(map(torch.cuda.get_device_capability, gpus)), torch.backends.mps.is_available())
    except RuntimeError as error:
        raise StartError(
            f"can't use the CUDA GPUs here: {first_line(error)}; --device cpu computes without them"
        ) from error


def choose_devices(setting: str, found: Found) -> tuple[str, ...]:
    """Device names in torch's notation. "auto": all CUDA GPUs, else MPS, else the CPU.

    Raises SettingsError if the setting is not a device, or names one that this machine lacks.
    """
    if setting == "auto":
        gpus = tuple(f"cuda:{number}" for number in range(len(found.cuda)))
        return gpus or (("mps",) if found.mps else ("cpu",))
    names = tuple(_device_name(part.strip(), found) for part in setting.split(","))
    if len(set(names)) < len(names):
        raise SettingsError(f"device {setting}: name each device once")
    return names


def _device_name(name: str, found: Found) -> str:
    kind, colon, number = ("cuda:0" if name == "cuda" else name).partition(":")
    if kind == "cuda" and number.isdecimal():
        if int(number) >= len(found.cuda):
            there = ", ".join(f"cuda:{n}" for n in range(len(found.cuda))) or "no CUDA GPU"
            raise SettingsError(
                f"device {name}: torch finds {there} on this machine; "
                "`python -m torch.utils.collect_env` shows GPUs, driver and what torch is built for"
            )
        return f"cuda:{int(number)}"
    if colon or kind not in ("cpu", "mps"):
        raise SettingsError(
            f"device {name!r}: expected auto, cpu, mps, cuda, cuda:1, or several such as cuda:0,cuda:1"
        )
    if kind == "mps" and not found.mps:
        raise SettingsError("device mps: torch finds no Metal GPU here")
    return kind


def choose_precision(setting: PrecisionSetting, device: str, found: Found) -> Precision:
    """The precision on one device of `choose_devices`. "auto": bf16 on CUDA GPUs that support it, else fp32.

    Raises SettingsError for tf32 on anything but a CUDA GPU.
    """
    kind, _, number = device.partition(":")
    if setting == "auto":
        return "bf16" if kind == "cuda" and found.cuda[int(number)] >= _AMPERE else "fp32"
    if setting == "tf32" and kind != "cuda":
        raise SettingsError(f"precision tf32 needs a CUDA GPU, and this node computes on {kind}")
    return setting


class ComputeDevice:
    """One device with its precision, and the copies of rows to it and back. Several threads may use it at once.

    Parameters, gradients and optimizer state are float32 in every precision. bf16 uses torch's autocast in forward and
    backward; tf32 rounds the inputs of CUDA's matrix products; fp32 rounds nothing.

    On CUDA, rows are copied through pinned memory on a separate stream: loading overlaps with running kernels, and
    fetching overlaps with the optimizer's step.
    """

    def __init__(self, name: str = "cpu", precision: Precision = "fp32", memory_bytes: int = 1) -> None:
        """`memory_bytes`: the free memory before any expert was placed there, at least 1."""
        self.torch_device: torch.device = torch.device(name)
        self.precision: Precision = precision
        self.memory_bytes = memory_bytes
        self._copies: torch.cuda.Stream | None = None
        if self.torch_device.type == "cuda":
            self._copies = torch.cuda.Stream(self.torch_device)

    def __str__(self) -> str:
        return f"{self.torch_device} in {self.precision}"

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.torch_device.type, torch.bfloat16)

    def load(self, tensor: Tensor) -> Tensor:
        """Copies a tensor from the CPU. Later kernels wait for it; those already running do not."""
        if self._copies is None:
            return tensor.to(self.torch_device)
        with torch.cuda.stream(self._copies):
            loaded = tensor.pin_memory().to(self.torch_device, non_blocking=True)
        computing = torch.cuda.current_stream(self.torch_device)
        computing.wait_stream(self._copies)
        loaded.record_stream(computing)
        return loaded

    def is_finite(self, tensor: Tensor) -> bool:
        """Whether all numbers are finite."""
        if self.torch_device.type == "cpu":  # numpy is several times as fast for small tensors
            return bool(np.isfinite(tensor.detach().numpy()).all())
        return bool(tensor.isfinite().all())

    def fetch(self, tensor: Tensor) -> Tensor:
        """Starts the copy of a tensor to the CPU. It is complete after `wait`."""
        if self._copies is None:
            return tensor.cpu()
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._copies):
            fetched = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            fetched.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies)
        return fetched

    def wait(self) -> None:
        """Waits until everything that was fetched is complete."""
        if self._copies is not None:
            self._copies.synchronize()

    def require_working(self) -> None:
        """Raises StartError if it can't compute: torch may lack kernels for a GPU that it finds, and once a GPU has
        failed, all later calls of the same process fail. Memory that other programs take is no failure.
        """
        try:
            torch.ones(1, device=self.torch_device).add_(1).item()
        except torch.OutOfMemoryError:
            return
        except RuntimeError as error:
            raise StartError(
                f"{self.torch_device} does not compute: {first_line(error)}; if starting again does not help, "
                "choose others with --device"
            ) from error

    def return_freed_memory(self) -> None:
        """Returns a GPU's memory, which torch keeps after tensors are freed, to other programs."""
        if self.torch_device.type != "cpu":
            torch.get_device_module(self.torch_device).empty_cache()


def first_line(error: Exception) -> str:
    """What went wrong, without the advice to programmers that torch adds to CUDA's errors."""
    return str(error).partition("\n")[0]


def roomiest(devices: Sequence[ComputeDevice], hosted: Mapping[ComputeDevice, int]) -> ComputeDevice:
    """The device for the next expert, so that devices host experts in proportion to their free memory."""
    return min(devices, key=lambda device: (hosted.get(device, 0) + 1) / device.memory_bytes)


def check_devices(device: str, precision: PrecisionSetting) -> dict[str, Precision]:
    """The precision on each device of a node's settings. Raises SettingsError if one does not suit this machine."""
    found = Found() if device == "cpu" else find()  # finding GPUs takes time and memory
    return {name: choose_precision(precision, name, found) for name in choose_devices(device, found)}


def open_devices(device: str, precision: PrecisionSetting) -> list[ComputeDevice]:
    """Opens the devices of a node's settings. tf32 sets torch's switch for it, which affects the whole process.

    Raises SettingsError if a setting does not suit this machine, and StartError if a device does not compute.
    """
    chosen = check_devices(device, precision)
    if precision == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    opened = [ComputeDevice(name, its_precision, _free_bytes(name)) for name, its_precision in chosen.items()]
    for each in opened:
        each.require_working()
    return opened


def _free_bytes(name: str) -> int:
    if not name.startswith("cuda"):
        return psutil.virtual_memory().available  # Metal GPUs share the machine's memory
    try:
        free_bytes, _ = torch.cuda.mem_get_info(name)
    except RuntimeError as error:
        raise StartError(f"can't use {name}: {first_line(error)}; choose others with --device") from error
    return max(1, free_bytes)
