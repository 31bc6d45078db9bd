"""Feed-forward blocks: one SwiGLU, and E of them stacked over expert-sorted rows.

Shape suffixes: N rows, E experts, D d_model, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model.grouped_mm import ExpertPath, choose_expert_path, grouped_mm, grouped_mm_reference


class SwiGLU(nn.Module):
    """`(silu(x w_gate) * (x w_up)) w_down` (Shazeer 2020, GLU Variants, eq. 6), without biases.

    Args:
        d_model: D.
        d_ff: F.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(d_model, d_ff))
        self.w_up = nn.Parameter(torch.empty(d_model, d_ff))
        self.w_down = nn.Parameter(torch.empty(d_ff, d_model))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return (F.silu(hidden @ self.w_gate) * (hidden @ self.w_up)) @ self.w_down


class GroupedExperts(nn.Module):
    """The SwiGLU experts of one process in stacked weights `w_gate`, `w_up` (E, D, F) and `w_down` (E, F, D).

    Args:
        num_experts: of the layer, in all processes.
        expert_ids: E consecutive ones, those of this process.
        d_model: D.
        d_ff_expert: F.
        path: `grouped_mm` (fast) or `loop` (the reference; any dtype and width). None: the fast one where the
            device and dtype of the rows allow it.
    """

    def __init__(
        self, num_experts: int, expert_ids: range, d_model: int, d_ff_expert: int, path: ExpertPath | None
    ):
        super().__init__()
        self.num_experts, self.expert_ids = num_experts, expert_ids
        self.w_gate = nn.Parameter(torch.empty(len(expert_ids), d_model, d_ff_expert))
        self.w_up = nn.Parameter(torch.empty(len(expert_ids), d_model, d_ff_expert))
        self.w_down = nn.Parameter(torch.empty(len(expert_ids), d_ff_expert, d_model))
        self.path = path

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: (N, D), sorted by expert.
            tokens_per_expert: (E,) int64; the rows past their sum come back undefined.

        Returns:
            (N, D), same dtype. An expert without rows has zero gradients, not none.
        """
        path = self.path or choose_expert_path(rows.device, rows.dtype)
        product = grouped_mm if path == "grouped_mm" else grouped_mm_reference
        gate_NF = product(rows, self.w_gate, tokens_per_expert)
        up_NF = product(rows, self.w_up, tokens_per_expert)
        return product(F.silu(gate_NF) * up_NF, self.w_down, tokens_per_expert)
