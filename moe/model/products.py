"""The matrix products of a linear map in both passes, for one weight and for a stack of them.

Shape suffixes: N rows, E groups of rows, I and O the inner and outer widths.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula


class Products(NamedTuple):
    """The products of `y = x w`, with x (N, I), w (I, O) and y (N, O); grouped, w is (E, I, O)."""

    output: Callable[[Tensor, Tensor], Tensor]  # x, w: x w
    input_grad: Callable[[Tensor, Tensor], Tensor]  # dy, w: dy w^T
    weight_grad: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x, dy, out: x^T dy; one weight's, in out


def grouped_products(rows_per_group: Tensor) -> Products:
    """Group e of the rows is multiplied by w[e], by torch's grouped GEMM, which never waits for the device.

    Args:
        rows_per_group: (E,) int64. Rows past their sum come back undefined, and no weight's gradient depends
            on them.
    """
    ends_E = rows_per_group.cumsum(0).to(torch.int32)
    return Products(
        output=lambda x, weight: _grouped_mm(x, weight, ends_E),
        input_grad=lambda y_grad, weight: _grouped_mm(y_grad, weight.transpose(1, 2), ends_E),
        weight_grad=lambda x, y_grad, out: _grouped_mm(x.t(), y_grad, ends_E),
    )


def _grouped_mm(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """The grouped GEMM of torch. It is not called without rows, which a GPU's kernels may refuse."""
    if left.numel() == 0:
        groups = [] if right.dim() == 3 else [len(ends_E)]
        return left.new_zeros(*groups, left.shape[0], right.shape[-1])
    return F.grouped_mm(left, right, offs=ends_E)


_onednn: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None

# On AMD: with AVX-512, which MKL does not use there, oneDNN is up to twice as fast; with AVX2 it takes a
# tenth longer.
PREFERS_ONEDNN = _onednn is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_for_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies it: in fp32 on a CPU where it is faster."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling()
    return PREFERS_ONEDNN and not plain and x.numel() > 0


def _times_transposed(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight_OI.t()`."""
    return _onednn(x, weight_OI, None, "none", [], "") if _is_for_onednn(x) else x @ weight_OI.t()


def _weight_grad(x: Tensor, y_grad: Tensor, out: Tensor | None) -> Tensor:
    """`x.t() @ y_grad`, contiguous; in `out` if there is one."""
    if not _is_for_onednn(x):
        return torch.mm(x.t(), y_grad, out=out)
    # oneDNN copies its transposed first argument, so that is the narrower one.
    if x.shape[1] <= y_grad.shape[1]:
        grad = _times_transposed(x.t(), y_grad.t())
    else:
        grad = _times_transposed(y_grad.t(), x.t()).t()
    return grad.contiguous() if out is None else out.copy_(grad)


if _onednn is not None:

    @register_flop_formula(_onednn)
    def _linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
        return 2 * x_shape.numel() * weight_shape[0]


DENSE = Products(
    output=lambda x, weight: _times_transposed(x, weight.t()),
    input_grad=_times_transposed,
    weight_grad=_weight_grad,
)


def is_autocast(device: torch.device) -> bool:
    """Whether `torch.autocast` is on for a kind of device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast_in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Float tensors of one device in the dtype of `torch.autocast` where it is on, else as they are.

    PyTorch does so itself for its own products, but not for what is called within an autograd function. Like
    PyTorch, this leaves fp64 alone.
    """
    if not is_autocast(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.t()`, in training by the products of `DENSE`.

    Without gradients it is PyTorch's: oneDNN takes half a millisecond and half a MiB for every new number of
    rows, and a text that is being generated has another one for each token.

    Args:
        x: (..., I), any float type.
        weight: (O, I), same dtype.

    Returns:
        (..., O), same dtype, or that of `torch.autocast`.
    """
    is_training = torch.is_grad_enabled() and _is_for_onednn(x) and not is_autocast(x.device)
    return _Linear.apply(x, weight) if is_training else F.linear(x, weight)


def new_weight(*shape: int, fan_in: int) -> nn.Parameter:
    """A weight of this shape that starts as that of `nn.Linear`, from PyTorch's random numbers."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Linear(nn.Linear):
    """`torch.nn.Linear` without a bias, by `linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(input, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return DENSE.output(x, weight_OI.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OI = ctx.saved_tensors
        y_grad = grads[0].contiguous()
        weight_grad = DENSE.weight_grad(y_grad.flatten(0, -2), x.flatten(0, -2), None)
        return DENSE.input_grad(y_grad, weight_OI.t()), weight_grad
