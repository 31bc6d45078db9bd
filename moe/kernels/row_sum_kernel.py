"""Sums of rows by token. Each program works on some columns of one token.

Shape suffixes: T tokens, K choices per token, N rows, D d_model.
"""

# Triton annotates arguments as the inside of a kernel sees them.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns at a time: 16 bytes of bf16 for each of 128 threads


def sum_rows(rows: Tensor, places: Tensor, kept: Tensor | None) -> Tensor:
    """Sum some rows for each token, in fp32.

    Args:
        rows: (N, D), in bf16, fp16 or fp32 on a GPU.
        places: (T, K) int64, the rows of each token.
        kept: (T, K) bool, which of them are read. None: all.

    Returns:
        (T, D), same dtype.
    """
    (T, K), D = places.shape, rows.shape[1]
    sums = rows.new_empty(T, D)
    if T:
        kept = None if kept is None else kept.to(torch.int32, memory_format=torch.contiguous_format)
        grid = (T, triton.cdiv(D, _BLOCK))
        _sum[grid](rows.contiguous(), places.contiguous(), kept, sums, D, K, kept is not None, _BLOCK)
    return sums


@triton.jit
def _sum(rows, places, kept, sums, D, K: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        width = D
        if HAS_KEPT:  # nothing is read of a dropped choice
            width = D * tl.load(kept + token * K + choice)
        row = tl.load(places + token * K + choice)
        total += tl.load(rows + row * D + column, mask=column < width, other=0).to(tl.float32)
    tl.store(sums + token * D + column, total.to(sums.dtype.element_ty), mask=column < D)
