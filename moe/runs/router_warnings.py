"""Warnings, in words, when a router goes wrong.

Shape suffixes: L MoE layers, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from moe.config import Config

_KEPT = 0.9  # of the counts of earlier steps, from step to step: those of about ten steps together
_BUSY_SHARE = 0.9  # of the tokens; how many experts take them
_COLLAPSED_STEPS = 50  # in a row
_IDLE_STEPS, _IDLE_TOKENS = (
    100,
    200.0,
)  # in a row without a token; tokens that came to the mean expert meanwhile
_LARGE_LOGIT, _SMALL_LOGIT = 50.0, 40.0  # said above the one, and again once it was below the other
_FIX = "raise moe.aux_loss_coef or moe.bias_update_rate"
_Kind = tuple[str, int]  # what is wrong, and the number of the MoE layer


class RouterWarnings:
    """Looks at every step, and says what is wrong once, and again only after it was well meanwhile.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config):
        self._layers, self._moe = config.moe_layers, config.moe
        shape = len(config.moe_layers), config.moe.num_experts
        self._recent_LE, self._idle_tokens_LE = torch.zeros(shape), torch.zeros(shape)
        self._idle_steps_LE = torch.zeros(shape)
        self._collapsed_steps = [0] * len(config.moe_layers)
        self._said: set[_Kind] = set()

    def of_step(self, tokens_per_expert: Tensor, metrics: dict[str, Any]) -> list[str]:
        """What went wrong with this step.

        Args:
            tokens_per_expert: (L, E) on the CPU, of the global batch.
            metrics: of the step.
        """
        counts_LE = tokens_per_expert.float()
        self._recent_LE = _KEPT * self._recent_LE + counts_LE
        self._idle_steps_LE = torch.where(counts_LE > 0, 0, self._idle_steps_LE + 1)
        mean_L1 = counts_LE.mean(1, keepdim=True)
        self._idle_tokens_LE = torch.where(counts_LE > 0, 0, self._idle_tokens_LE + mean_L1)
        found: dict[_Kind, str] = {}
        for i, largest in enumerate(metrics["moe/layers/logit_max"]):
            found |= self._of_loads(i)
            key = "logits", i
            if largest > (_SMALL_LOGIT if key in self._said else _LARGE_LOGIT):
                problem = f"router logits reach {largest:.0f}"
                found[key] = f"layer {self._layers[i]}: {problem}; raise moe.z_loss_coef or lower optim.lr"
        new = [text for key, text in found.items() if key not in self._said]
        self._said = set(found)
        return new

    def _of_loads(self, i: int) -> dict[_Kind, str]:
        """Whether few experts take nearly all tokens of a layer, or else some get none."""
        experts, top_k, layer = self._moe.num_experts, self._moe.top_k, self._layers[i]
        shares_E = (self._recent_LE[i] / self._recent_LE[i].sum()).sort(descending=True).values.cumsum(0)
        busy = int((shares_E < _BUSY_SHARE).sum()) + 1
        is_collapsed = top_k < experts and busy <= max(top_k, experts // 4)
        self._collapsed_steps[i] = self._collapsed_steps[i] + 1 if is_collapsed else 0
        if self._collapsed_steps[i] >= _COLLAPSED_STEPS:
            share = f"{shares_E[busy - 1]:.0%}"
            return {
                (
                    "collapse",
                    i,
                ): f"layer {layer}: {busy} of {experts} experts take {share} of the tokens; {_FIX}"
            }
        idle_E = (self._idle_steps_LE[i] >= _IDLE_STEPS) & (self._idle_tokens_LE[i] >= _IDLE_TOKENS)
        if not idle_E.any():
            return {}
        problem = f"{int(idle_E.sum())} of {experts} experts got no token in {_IDLE_STEPS} steps"
        return {("dead", i): f"layer {layer}: {problem}; {_FIX}, or use fewer experts"}
