"""The losses and router metrics of one step, summed on the device and read once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.training.loss import TrainingLoss


class StepMeter:
    """Sums of one global batch, kept on the device until they are read, once a step.

    Args:
        device: where the losses live.
    """

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._counts: Tensor | None = None
        self._dropped = torch.zeros((), dtype=torch.float64, device=device)
        self._bytes = torch.zeros((), dtype=torch.int64, device=device)
        self._forwards = 0

    def add(self, loss: TrainingLoss) -> None:
        """Add one micro batch: its cross-entropy, and what the MoE layers report."""
        aux = loss.aux
        self._forwards += 1
        self._sums[0] += loss.lm.detach()
        if aux is not None:
            self._sums[1] += aux.load_balancing_loss.detach().mean()
            self._sums[2] += aux.router_z_loss.detach().mean()
            self._sums[3] += aux.router_entropy.mean()
            self._counts = aux.tokens_per_expert + (0 if self._counts is None else self._counts)
            self._dropped += aux.dropped_tokens.sum()
            self._bytes += aux.dispatch_bytes.sum()

    def tensors(self) -> Iterator[Tensor]:
        """The sums, to be added up over ranks in place."""
        yield self._sums
        yield self._dropped
        yield self._bytes
        if self._counts is not None:
            yield self._counts

    def read(self, num_ranks: int) -> dict[str, float | None]:
        """The step's losses and router metrics, under the names of `metrics.jsonl`; null in a dense model."""
        lm_loss, balance, z_loss, entropy = (self._sums / (self._forwards * num_ranks)).tolist()
        if self._counts is None:
            names = ("loss/load_balancing", "loss/router_z", *_ROUTER_METRICS)
            return {"loss/lm": lm_loss, **dict.fromkeys(names)}
        counts_LE = self._counts.double()
        return {
            "loss/lm": lm_loss,
            "loss/load_balancing": balance,
            "loss/router_z": z_loss,
            "moe/load_imbalance": float((counts_LE.amax(1) / counts_LE.mean(1)).mean()),
            "moe/dropped_fraction": float(self._dropped / counts_LE.sum()),
            "moe/router_entropy": entropy,
            "moe/dead_experts": int((counts_LE == 0).sum()),
            "comm/dispatch_bytes": int(self._bytes),
        }


_ROUTER_METRICS = (
    "moe/load_imbalance",
    "moe/dropped_fraction",
    "moe/router_entropy",
    "moe/dead_experts",
    "comm/dispatch_bytes",
)
