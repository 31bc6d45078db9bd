"""The matrix products of a linear map in both passes, for one weight and for a stack of them.

Shape suffixes: N rows, E groups of rows, I and O the inner and outer widths.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
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
        output=lambda x, weight: F.grouped_mm(x, weight, offs=ends_E),
        input_grad=lambda y_grad, weight: F.grouped_mm(y_grad, weight.transpose(1, 2), offs=ends_E),
        weight_grad=lambda x, y_grad, out: F.grouped_mm(x.t(), y_grad, offs=ends_E),
    )


_onednn: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


def _linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight_OI.t()`. In fp32 on CPU by oneDNN, up to 1.6 times as fast as torch.mm, which is MKL's."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling()
    return x @ weight_OI.t() if plain or _onednn is None else _onednn(x, weight_OI, None, "none", [], "")


if _onednn is not None:

    @register_flop_formula(_onednn)
    def _linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
        return 2 * x_shape.numel() * weight_shape[0]


DENSE = Products(
    output=lambda x, weight: _linear(x, weight.t()),
    input_grad=_linear,
    # Sums over few rows, for which MKL is faster.
    weight_grad=lambda x, y_grad, out: torch.mm(x.t(), y_grad, out=out),
)
