"""The losses and router metrics of one step, summed on the device and read once.

Shape suffixes: L MoE layers, E experts, R ranks that split the experts.
"""

import math

import torch
from torch import Tensor

from moe.distributed.launch import widest_float
from moe.training.engine import Engine
from moe.training.loss import TrainingLoss

# How the figures of the layers, each a key moe/layers/NAME, become one figure moe/NAME of the model.
_OVER_LAYERS = {
    "load_imbalance": "mean", "max_vio": "mean", "load_cv": "mean", "load_entropy": "mean",
    "dead_experts": "sum", "router_entropy": "mean", "top1_margin": "mean", "logit_rms": "mean",
    "logit_max": "max", "dropped_fraction": "mean", "rank_imbalance": "mean", "bias_range": "max",
}  # fmt: skip
_OF_MODEL = tuple(f"moe/{name}" for name in _OVER_LAYERS)
_ROUTER_METRICS = ("loss/load_balancing", "loss/router_z", *_OF_MODEL, "comm/dispatch_bytes")


class StepMeter:
    """Sums of one global batch, kept on the device until they are read, once a step.

    Args:
        device: where the losses live.

    Attributes:
        tokens_per_expert: (L, E) int64, of the global batch once `reduce` was called; None in a dense model.
        counts_on_host: the same once `read` was called, (L, E) fp64 on the CPU.
    """

    def __init__(self, device: torch.device):
        self._dtype, self._device = widest_float(device), device
        self._lm = torch.zeros((), dtype=self._dtype, device=device)
        # (7, L): balance, z, entropy, margin, squared logit; dropped assignments, bytes sent
        self._sums: Tensor | None = None
        self._logit_max: Tensor | None = None  # (L,)
        self.tokens_per_expert: Tensor | None = None
        self.counts_on_host: Tensor | None = None
        self._forwards = 0

    def add(self, loss: TrainingLoss) -> None:
        """Add one micro batch: its cross-entropy, and what the MoE layers report."""
        self._forwards += 1
        self._lm += loss.lm.detach()
        if (aux := loss.aux) is None:
            return
        losses = aux.load_balancing_loss.detach(), aux.router_z_loss.detach(), aux.router_entropy
        figures = *losses, *aux.health.unbind(1), aux.dropped_tokens, aux.dispatch_bytes
        *means, logit_max, dropped, sent_bytes = (each.to(self._dtype) for each in figures)
        sums = torch.stack([*means, dropped, sent_bytes])
        if self._sums is None or self._logit_max is None or self.tokens_per_expert is None:
            self._sums, self._logit_max = torch.zeros_like(sums), torch.zeros_like(logit_max)
            self.tokens_per_expert = torch.zeros_like(aux.tokens_per_expert)
        self._sums += sums
        self._logit_max = torch.maximum(self._logit_max, logit_max)
        self.tokens_per_expert += aux.tokens_per_expert

    def reduce(self, engine: Engine) -> None:
        """Take all ranks together, which call this together."""
        engine.sum_over_ranks(self._lm)
        if self._sums is not None and self._logit_max is not None and self.tokens_per_expert is not None:
            engine.sum_over_ranks(self._sums)
            engine.sum_over_ranks(self.tokens_per_expert)
            engine.max_over_ranks(self._logit_max)

    def read(
        self, num_ranks: int, ep_size: int = 1, bias_ranges: Tensor | None = None
    ) -> dict[str, float | list[float] | None]:
        """The step's losses and router metrics, under the names of `metrics.jsonl`; null in a dense model.

        Args:
            num_ranks: how many ranks were reduced.
            ep_size: R.
            bias_ranges: (L,), the largest less the smallest `expert_bias`; None without biases.
        """
        forwards = self._forwards * num_ranks
        if self._sums is None or self._logit_max is None or self.tokens_per_expert is None:
            return {
                "loss/lm": float(self._lm) / forwards,
                **dict.fromkeys((*_ROUTER_METRICS, "comm/dispatch_bytes")),
            }
        if bias_ranges is None:
            bias_ranges = torch.zeros_like(self._logit_max)
        layers, experts = self.tokens_per_expert.shape
        # Counts are exact in fp64, and in fp32 up to 2**24.
        parts = self._lm, self._sums, self._logit_max, bias_ranges, self.tokens_per_expert
        on_host = torch.cat([part.to(self._dtype).flatten() for part in parts]).cpu().double()
        lm, sums, logit_max, ranges, counts = on_host.split([1, 7 * layers, layers, layers, layers * experts])
        *means, dropped, sent_bytes = sums.view(7, layers)
        balance, z_loss, entropy, margin, squares = (each / forwards for each in means)
        self.counts_on_host = counts_LE = counts.view(layers, experts)
        of_layers = _of_load(counts_LE, ep_size) | {
            "router_entropy": entropy,
            "top1_margin": margin,
            "logit_rms": squares.sqrt(),
            "logit_max": logit_max,
            "dropped_fraction": dropped / counts_LE.sum(1),
            "bias_range": ranges,
        }
        metrics: dict[str, float | list[float] | None] = {
            "loss/lm": float(lm) / forwards,
            "loss/load_balancing": float(balance.mean()),
            "loss/router_z": float(z_loss.mean()),
        }
        for name, way in _OVER_LAYERS.items():
            metrics[f"moe/{name}"] = float(getattr(of_layers[name], way)())
        metrics["moe/dead_experts"] = int(of_layers["dead_experts"].sum())
        metrics["comm/dispatch_bytes"] = int(sent_bytes.sum())
        for name in _OVER_LAYERS:
            metrics[f"moe/layers/{name}"] = [float(f"{value:.4g}") for value in of_layers[name].tolist()]
        return metrics


def _of_load(counts_LE: Tensor, ep_size: int) -> dict[str, Tensor]:
    """What the numbers of assignments say about balance, each (L,)."""
    means_L = counts_LE.mean(1)
    shares_LE = counts_LE / counts_LE.sum(1, keepdim=True)
    by_rank_LR = counts_LE.unflatten(1, (ep_size, -1)).sum(2)
    imbalance_L = counts_LE.amax(1) / means_L
    return {
        "load_imbalance": imbalance_L,
        "max_vio": imbalance_L - 1,
        "load_cv": counts_LE.std(1, correction=0) / means_L,
        "load_entropy": torch.special.entr(shares_LE).sum(1) / math.log(max(counts_LE.shape[1], 2)),
        "dead_experts": (counts_LE == 0).sum(1),
        "rank_imbalance": by_rank_LR.amax(1) / by_rank_LR.mean(1),
    }
