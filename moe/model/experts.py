"""Feed-forward blocks: one SwiGLU, and E of them in stacked weights."""

from typing import get_args

from torch import Tensor, nn

from moe.dispatch.permutation import Permutation
from moe.model.grouped_swiglu import ExpertPath, choose_expert_path, grouped_swiglu, swiglu
from moe.model.products import cast_in_autocast, new_weight


class SwiGLU(nn.Module):
    """`(silu(x w_gate) * (x w_up)) w_down` (Shazeer 2020, GLU Variants, eq. 6), without biases.

    Args:
        d_model: D.
        d_ff: F.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w_gate = new_weight(d_model, d_ff, fan_in=d_model)
        self.w_up = new_weight(d_model, d_ff, fan_in=d_model)
        self.w_down = new_weight(d_ff, d_model, fan_in=d_ff)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return swiglu(hidden, self.w_gate, self.w_up, self.w_down)


class GroupedExperts(nn.Module):
    """The SwiGLU experts of one process in stacked weights `w_gate`, `w_up` (E, D, F) and `w_down` (E, F, D).

    Args:
        num_experts: of the layer, in all processes.
        expert_ids: E consecutive ones, those of this process.
        d_model: D.
        d_ff_expert: F.
        path: how they multiply, see `grouped_swiglu`. None: the faster way for the device and dtype.

    Raises:
        ValueError: there is no such path.
    """

    def __init__(
        self, num_experts: int, expert_ids: range, d_model: int, d_ff_expert: int, path: ExpertPath | None
    ):
        super().__init__()
        if path not in (None, *get_args(ExpertPath)):
            raise ValueError(f"expert_path should be {', '.join(get_args(ExpertPath))} or None, got {path!r}")
        self.num_experts, self.expert_ids = num_experts, expert_ids
        self.w_gate = new_weight(len(expert_ids), d_model, d_ff_expert, fan_in=d_model)
        self.w_up = new_weight(len(expert_ids), d_model, d_ff_expert, fan_in=d_model)
        self.w_down = new_weight(len(expert_ids), d_ff_expert, d_model, fan_in=d_ff_expert)
        self.path: ExpertPath | None = path

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        _, d_model, d_ff_expert = self.w_gate.shape
        return f"num_experts={self.num_experts}, {d_model=}, {d_ff_expert=}, path={self.path}"

    def forward(self, tokens: Tensor, gate_weights: Tensor, permutation: Permutation) -> Tensor:
        """Sum each token's expert outputs by gate weight; see `grouped_swiglu`.

        Args:
            tokens: (M, D).
            gate_weights: (M, K).
            permutation: which row of the E experts holds which choice of these tokens.

        Returns:
            (M, D), same dtype, or that of `torch.autocast`.
        """
        tokens, *weights = cast_in_autocast(tokens, self.w_gate, self.w_up, self.w_down)
        path: ExpertPath | None = self.path
        if path is None:
            rows = len(permutation.assignment_of_row)
            path = choose_expert_path(weights[0].shape, tokens.dtype, tokens.device, rows)
        return grouped_swiglu(tokens, gate_weights, weights, permutation, path)
