"""What SwiGLU does between its matrix products: `silu(gate) * up`, and the way back.

On a GPU in bf16, fp16 or fp32 a Triton kernel reads and writes every element once, in fp32 arithmetic; eager
operations would do it seven times forward and over twenty times backward.

Shape suffixes: N rows, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.availability import has_kernels


def activate(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """`silu(gate) * up * scale`.

    Args:
        gate: (N, F), any float type.
        up: (N, F), same dtype.
        scale: (N, 1), same dtype. None: 1.

    Returns:
        (N, F), same dtype.
    """
    if has_kernels(gate):
        from moe.kernels import activation_kernels

        return activation_kernels.activate(gate, up, scale)
    hidden = F.silu(gate).mul_(up)
    return hidden if scale is None else hidden.mul_(scale)


def activate_backward(
    gate: Tensor, up: Tensor, scale: Tensor | None, hidden_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result of `activate` once more, and its gradients.

    Args:
        gate: (N, F), any float type.
        up: (N, F), same dtype.
        scale: (N, 1), same dtype, or None.
        hidden_grad: (N, F), same dtype, the gradient of the result. It is overwritten.

    Returns:
        The result (N, F), the gradients of `gate` and `up` (N, F), all of the same dtype, and that of `scale`
        (N,), in fp32 or the dtype if that is wider; (0,) without a scale.
    """
    if has_kernels(gate):
        from moe.kernels import activation_kernels

        return activation_kernels.activate_backward(gate, up, scale, hidden_grad)
    silu = F.silu(gate)
    hidden, scale_grad = silu * up, gate.new_empty(0)
    if scale is not None:
        scale_grad = (hidden_grad * hidden).sum(1, dtype=torch.promote_types(gate.dtype, torch.float32))
        hidden.mul_(scale)
        hidden_grad.mul_(scale)
    up_grad = silu.mul_(hidden_grad)
    gate_grad = torch.ops.aten.silu_backward(hidden_grad.mul_(up), gate)
    return hidden, gate_grad, up_grad, scale_grad
