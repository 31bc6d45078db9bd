"""What SwiGLU does between its matrix products. Each program works on one row.

Shape suffixes: N rows, F hidden width.
"""

# Triton annotates arguments as the inside of a kernel sees them.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns at a time: 16 bytes of bf16 for each of 128 threads


def activate(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """`silu(gate) * up * scale`; see `moe.model.activation.activate`."""
    N, F = gate.shape
    hidden = torch.empty_like(gate)
    if N:
        _activate[(N, triton.cdiv(F, _BLOCK))](gate, up, scale, hidden, F, scale is not None, _BLOCK)
    return hidden


def activate_backward(
    gate: Tensor, up: Tensor, scale: Tensor | None, hidden_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `moe.model.activation.activate_backward`."""
    N, F = gate.shape
    hidden, gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(gate), hidden_grad
    scale_grad = gate.new_empty(0 if scale is None else N, dtype=torch.float32)
    if N:
        tensors = (gate, up, scale, hidden_grad, hidden, gate_grad, up_grad, scale_grad)
        _activate_backward[(N,)](*tensors, F, scale is not None, _BLOCK)
    return hidden, gate_grad, up_grad, scale_grad


@triton.jit
def _activate(gate, up, scale, hidden, F, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = column < F, row * F + column
    gates = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
    ups = tl.load(up + place, mask=inside, other=0).to(tl.float32)
    values = gates * tl.sigmoid(gates) * ups
    if HAS_SCALE:
        values *= tl.load(scale + row).to(tl.float32)
    tl.store(hidden + place, values.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    gate, up, scale, hidden_grad, hidden, gate_grad, up_grad, scale_grad, F,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, place = column < F, row * F + column
        gates = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
        ups = tl.load(up + place, mask=inside, other=0).to(tl.float32)
        grads = tl.load(hidden_grad + place, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gates)
        silu = gates * sigmoid
        values = silu * ups
        total += grads * values
        grads *= factor
        tl.store(hidden + place, (values * factor).to(hidden.dtype.element_ty), mask=inside)
        tl.store(up_grad + place, (grads * silu).to(up_grad.dtype.element_ty), mask=inside)
        slope = sigmoid + silu * (1 - sigmoid)
        tl.store(gate_grad + place, (grads * ups * slope).to(gate_grad.dtype.element_ty), mask=inside)
    if HAS_SCALE:
        tl.store(scale_grad + row, tl.sum(total))
