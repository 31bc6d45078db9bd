"""The top-k gating router: which experts a token goes to, and with what weight.

Shape suffixes: T tokens, K experts per token, E experts, D d_model.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from moe.dispatch.interface import RouterOutput
from moe.model.products import is_autocast, linear, new_weight


class Router(nn.Module):
    """Softmax top-k gating over fp32 logits.

    Weight and arithmetic are fp32 whatever the dtype of the input, of the rest of the model and of
    `torch.autocast`, since what is rounded to bf16 changes which expert wins (Fedus et al. 2021, section
    2.4). The gate weights are the probabilities of the chosen experts (Shazeer et al. 2017), with
    `normalize_gate_weights` divided by their sum. The weights start as those of `nn.Linear`.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        normalize_gate_weights: whether a token's K weights sum to 1. With K = 1 that would cut the router off
            from the loss, and is refused.

    Raises:
        ValueError: a size is below 1, or `top_k` does not go with the other two.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, normalize_gate_weights: bool):
        super().__init__()
        for name, size in (("d_model", d_model), ("num_experts", num_experts), ("top_k", top_k)):
            if size < 1:
                raise ValueError(f"{name} should be at least 1, got {size}")
        if top_k > num_experts:
            raise ValueError(f"top_k ({top_k}) is more than num_experts ({num_experts})")
        if top_k == 1 and normalize_gate_weights:
            fix = "set normalize_gate_weights to False"
            raise ValueError(f"with top_k 1 every normalized gate weight is the constant 1; {fix}")
        self.top_k = top_k
        self.normalize_gate_weights = normalize_gate_weights
        self.weight = new_weight(num_experts, d_model, fan_in=d_model)

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        num_experts, d_model = self.weight.shape
        sizes = f"{d_model=}, {num_experts=}, top_k={self.top_k}"
        return f"{sizes}, normalize_gate_weights={self.normalize_gate_weights}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(...)` and `.bfloat16()` to the device, but not to less than fp32."""

        def in_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device, torch.float32)

        return super()._apply(in_fp32, recurse)

    def forward(self, hidden: Tensor) -> RouterOutput:
        """Route tokens.

        Args:
            hidden: (T, D), any float type.
        """
        if is_autocast(hidden.device):
            with torch.autocast(hidden.device.type, enabled=False):
                return self.forward(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # fp64 stays, for gradient checks
        logits_TE = linear(hidden.to(dtype), self.weight.to(dtype))
        probs_TE = logits_TE.softmax(dim=1)
        gate_weights_TK, expert_indices_TK = probs_TE.topk(self.top_k, dim=1)
        if self.normalize_gate_weights:
            gate_weights_TK = gate_weights_TK / gate_weights_TK.sum(dim=1, keepdim=True)
        return RouterOutput(expert_indices_TK, gate_weights_TK, logits_TE, probs_TE)
