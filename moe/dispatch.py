"""Bring tokens to their experts and the results back: `dispatch`, then `combine`.

Shape suffixes: T tokens, K experts per token, E experts, N rows, D d_model.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moe.ops.permute import Permutation, permute, plan_permutation, unpermute


@dataclass(frozen=True)
class DispatchMetadata:
    """What `combine` needs to undo a `dispatch`.

    Attributes:
        permutation: which row holds which assignment.
        gate_weights: (T, K) fp32.
    """

    permutation: Permutation
    gate_weights: Tensor


class LocalDispatcher:
    """All experts live in this process: dispatching is a permutation."""

    def dispatch(
        self,
        hidden: Tensor,
        expert_indices: Tensor,
        gate_weights: Tensor,
        num_experts: int,
        expert_capacity: int | None,
    ) -> tuple[Tensor, Tensor, DispatchMetadata]:
        """Sort copies of the tokens by expert.

        Args:
            hidden: (T, D).
            expert_indices: (T, K) int64.
            gate_weights: (T, K) fp32.
            num_experts: E.
            expert_capacity: most assignments an expert takes; the lowest gate weights beyond it are dropped.
                None: dropless.

        Returns:
            Rows (N, D) sorted by expert, the rows of each expert (E,) int64 after dropping, and the metadata
            for `combine`.
        """
        permutation = plan_permutation(expert_indices, num_experts, gate_weights, expert_capacity)
        return (
            permute(hidden, permutation),
            permutation.tokens_per_expert,
            DispatchMetadata(permutation, gate_weights),
        )

    def combine(self, expert_rows: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Sum each token's expert outputs, weighted by its gate weights. A dropped assignment adds nothing.

        Args:
            expert_rows: (N, D) in the order of `dispatch`.
            metadata: of the same `dispatch`.

        Returns:
            (T, D), the dtype of `expert_rows`.
        """
        outputs_TKD = unpermute(expert_rows, metadata.permutation)
        gates_T1K = metadata.gate_weights.to(expert_rows.dtype).unsqueeze(1)
        return torch.bmm(gates_T1K, outputs_TKD).squeeze(1)


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """`ceil(capacity_factor * T * K / E)` assignments, with no hidden minimum (Fedus et al. 2021, eq. 3).

    The factor is taken as the decimal number it was written as: 1.1 * 10 tokens are 11 slots, not the 12
    that binary rounding would give.
    """
    return math.ceil(Fraction(str(capacity_factor)) * num_tokens * top_k / num_experts)
