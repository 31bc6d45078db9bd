"""Expert capacity: how many assignments an expert takes, and which ones are dropped beyond that.

Shape suffixes: T tokens, K experts per token, E experts, A = T * K assignments.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from moe.dispatch.permutation import Permutation, inverse


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """`ceil(capacity_factor * T * K / E)` assignments, with no hidden minimum (Fedus et al. 2021, eq. 3).

    The factor is taken as the decimal number it was written as: 1.1 * 10 tokens are 11 places, not the 12
    that binary rounding would give.
    """
    return math.ceil(Fraction(str(capacity_factor)) * num_tokens * top_k / num_experts)


def plan_with_capacity(
    expert_indices: Tensor, tokens_per_expert: Tensor, gate_weights: Tensor, capacity: int
) -> Permutation:
    """Sort the assignments by expert, and drop the lowest gate weights of each expert beyond its capacity.

    Equal gate weights are kept in the order of choices, first choices before second ones, then of tokens. The
    plan has `min(T * K, E * capacity)` rows, a bound that needs no look at the data, so that the host never
    waits for the device.

    Args:
        expert_indices: (T, K) int64, best first.
        tokens_per_expert: (E,) int64, before dropping, from `count_assignments`.
        gate_weights: (T, K), any float type.
        capacity: most assignments that an expert takes.
    """
    T, K = expert_indices.shape
    # 1. Two stable sorts make one ordering by (expert, gate weight descending, choice, token).
    by_choice_A = torch.arange(T * K, device=expert_indices.device).view(T, K).t().flatten()
    gates_A = gate_weights.detach().flatten().gather(0, by_choice_A)
    by_gate_A = by_choice_A.gather(0, gates_A.argsort(descending=True, stable=True))
    experts_A, by_expert = expert_indices.flatten().gather(0, by_gate_A).sort(stable=True)
    order_A = by_gate_A.gather(0, by_expert)

    # 2. Each assignment's place in its expert's queue says whether it is dropped.
    first_row_E = tokens_per_expert.cumsum(0) - tokens_per_expert
    place_A = torch.arange(T * K, device=order_A.device) - first_row_E.gather(0, experts_A)

    # 3. Dropped assignments go behind all kept ones; what fits into the bound is cut off there.
    dropped_A, kept_first = (place_A >= capacity).to(torch.uint8).sort(stable=True)
    order_A = order_A.gather(0, kept_first)
    num_rows = min(T * K, len(tokens_per_expert) * capacity)
    row_A = inverse(order_A)
    return Permutation(
        assignment_of_row=order_A.narrow(0, 0, num_rows),
        row_of_assignment=row_A.clamp(max=num_rows - 1).view(T, K),
        rows_per_expert=tokens_per_expert.clamp(max=capacity),
        kept=(dropped_A.gather(0, row_A) == 0).view(T, K),
    )
