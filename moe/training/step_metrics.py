"""The losses and router metrics of one step, summed on the device and read once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.distributed.launch import widest_float
from moe.training.loss import TrainingLoss

_ROUTER_METRICS = (
    "loss/load_balancing",
    "loss/router_z",
    "moe/load_imbalance",
    "moe/dropped_fraction",
    "moe/router_entropy",
    "moe/dead_experts",
    "comm/dispatch_bytes",
)


class StepMeter:
    """Sums of one global batch, kept on the device until they are read, once a step.

    Args:
        device: where the losses live.

    Attributes:
        tokens_per_expert: (MoE layers, E) int64; None in a dense model.
    """

    def __init__(self, device: torch.device):
        dtype = widest_float(device)
        self._means = torch.zeros(4, dtype=dtype, device=device)  # cross-entropy, balance, z, entropy
        self._totals = torch.zeros(2, dtype=dtype, device=device)  # dropped assignments, bytes sent
        self.tokens_per_expert: Tensor | None = None  # (MoE layers, E) assignments
        self._forwards = 0

    def add(self, loss: TrainingLoss) -> None:
        """Add one micro batch: its cross-entropy, and what the MoE layers report."""
        self._forwards += 1
        self._means[0] += loss.lm.detach()
        if (aux := loss.aux) is not None:
            losses = (aux.load_balancing_loss.detach(), aux.router_z_loss.detach(), aux.router_entropy)
            self._means[1:] += torch.stack([each.mean() for each in losses])
            self._totals += torch.stack([aux.dropped_tokens.sum(), aux.dispatch_bytes.sum()])
            before = 0 if self.tokens_per_expert is None else self.tokens_per_expert
            self.tokens_per_expert = before + aux.tokens_per_expert

    def tensors(self) -> Iterator[Tensor]:
        """The sums, to be added up over ranks in place."""
        yield self._means
        yield self._totals
        if self.tokens_per_expert is not None:
            yield self.tokens_per_expert

    def read(self, num_ranks: int) -> dict[str, float | None]:
        """The step's losses and router metrics, under the names of `metrics.jsonl`; null in a dense model."""
        lm_loss, balance, z_loss, entropy = (self._means / (self._forwards * num_ranks)).tolist()
        if self.tokens_per_expert is None:
            return {"loss/lm": lm_loss, **dict.fromkeys(_ROUTER_METRICS)}
        counts_LE, (dropped, sent_bytes) = self.tokens_per_expert.cpu().double(), self._totals.tolist()
        imbalance = float((counts_LE.amax(1) / counts_LE.mean(1)).mean())
        dropped_fraction, dead = dropped / float(counts_LE.sum()), int((counts_LE == 0).sum())
        values = (balance, z_loss, imbalance, dropped_fraction, entropy, dead, int(sent_bytes))
        return {"loss/lm": lm_loss, **dict(zip(_ROUTER_METRICS, values, strict=True))}
