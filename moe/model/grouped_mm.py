"""One matrix product per expert over rows sorted by expert: a grouped GEMM and its reference loop.

Shape suffixes: N rows, E experts, I and O the inner and outer widths.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertPath = Literal["grouped_mm", "loop"]


def choose_expert_path(device: torch.device, dtype: torch.dtype) -> ExpertPath:
    """The path that runs on this device and dtype: CUDA's grouped GEMM takes bf16 only, CPU's not fp64."""
    supported = (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32)
    return "grouped_mm" if dtype in supported else "loop"


def grouped_mm(rows: Tensor, weights: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's rows by its own matrix, in one call and without waiting for the device.

    Args:
        rows: (N, I), fp32 (CPU only) or bf16, sorted by expert.
        weights: (E, I, O), same dtype; I and O times the bytes of an element must be multiples of 16.
        tokens_per_expert: (E,) int64, rows of each expert. Their sum may be less than N: the rows past it
            come back undefined, in both passes, and no weight's gradient depends on them.

    Returns:
        (N, O), same dtype.

    Raises:
        RuntimeError: from torch, on a dtype or width it does not take.
    """
    offsets_E = tokens_per_expert.cumsum(0).to(torch.int32)
    product = F.grouped_mm if rows.dtype == torch.bfloat16 else _uncompiled_grouped_mm
    return _ContiguousGradient.apply(product(rows, weights, offs=offsets_E))


# torch 2.13's compiler takes the operator in bf16 only; in fp32 torch.compile steps around it.
_uncompiled_grouped_mm: Any = torch.compiler.disable(F.grouped_mm)


def grouped_mm_reference(rows: Tensor, weights: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """`grouped_mm` as a loop over experts, for any dtype and width; the rows past the last group are zero.

    Reads `tokens_per_expert` on the host, which waits for the device.
    """
    counts = tokens_per_expert.tolist()
    rest = rows.shape[0] - sum(counts)
    # unbind once: indexing weights[e] in the loop would make the backward pass O(E^2).
    groups = zip(rows.split([*counts, rest]), weights.unbind(0), strict=False)
    products = [group @ weight for group, weight in groups]
    return torch.cat([*products, rows.new_zeros(rest, weights.shape[2])])


class _ContiguousGradient(torch.autograd.Function):
    """Identity. torch 2.13's grouped_mm backward refuses an expanded gradient, such as that of `.sum()`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
