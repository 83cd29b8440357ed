"""An expert: one trainable block with its optimizer, and the guard that keeps its numbers finite.

Shape suffixes: R = rows, S = segments, D = hidden.
"""

from itertools import chain

import torch
from grpc import StatusCode
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block, builder_of
from peer.errors import ExpertError


class Expert:
    """One replica of an expert. Not safe for several threads: the compute thread alone calls it.

    `update_count` is the number of optimizer steps taken, `skipped_updates` of those that the guard refused.
    Tensors come and go on the CPU, in float32, whatever the device.
    """

    def __init__(self, uid: UID, manifest: Manifest, device: torch.device | str = "cpu") -> None:
        self.uid = uid
        self.device = torch.device(device)
        self.update_count = 0
        self.skipped_updates = 0
        self.block = build_block(manifest, uid).to(self.device)
        self._settings = manifest.optimizer
        self.optimizer = torch.optim.AdamW(
            self.block.parameters(),
            lr=self._settings.learning_rate,
            weight_decay=self._settings.weight_decay,
            fused=True,
        )

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        """Gives the outputs [R, D]. Raises ExpertError (INTERNAL) when one of them is not finite."""
        with torch.no_grad():
            y_RD: Tensor = self.block(x_RD.to(self.device), lengths_S, positions_R.to(self.device))
        return self._finite(y_RD, "outputs")

    def backward(self, x_RD: Tensor, grad_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        """Gives the gradient of the inputs [R, D], before the one optimizer step that this call takes.

        The step is skipped when the gradient of a parameter is not finite. Raises ExpertError (INTERNAL), and
        takes no step, when the gradient of the inputs is not finite.
        """
        x_RD = x_RD.detach().to(self.device).requires_grad_()
        y_RD = self.block(x_RD, lengths_S, positions_R.to(self.device))
        try:
            y_RD.backward(grad_RD.to(self.device))
            assert x_RD.grad is not None, "a block must use its input"
            if not x_RD.grad.isfinite().all():
                self.skipped_updates += 1
            grad_input_RD = self._finite(x_RD.grad, "gradients of the inputs")
            self._step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return grad_input_RD

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and optimizer state now; before the first step the optimizer has none."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = filter(torch.is_tensor, chain(self.block.parameters(), moments))
        return sum(tensor.nbytes for tensor in tensors)

    def _step(self) -> None:
        gradients = [p.grad for p in self.block.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if not norm.isfinite():
            self.skipped_updates += 1
            return
        clip_grads_with_norm_(self.block.parameters(), self._settings.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.update_count += 1

    def _learning_rate(self) -> float:
        """Of the next step: it rises linearly over the first `warmup_updates` steps."""
        warmup = max(1, self._settings.warmup_updates)
        return self._settings.learning_rate * min(1.0, (self.update_count + 1) / warmup)

    def _finite(self, tensor_RD: Tensor, name: str) -> Tensor:
        if not tensor_RD.isfinite().all():
            raise ExpertError(StatusCode.INTERNAL, f"the {name} of expert {self.uid} are not finite")
        return tensor_RD.cpu()


def expert_bytes(manifest: Manifest) -> int:
    """Estimates the memory of one expert: weights, gradients and AdamW's two moments. Allocates nothing."""
    with torch.device("meta"):
        block = builder_of(manifest.experts.kind)(manifest.model)
    return 4 * sum(parameter.nbytes for parameter in block.parameters())
