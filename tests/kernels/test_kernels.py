"""The Triton kernels against their formulas, by Triton's interpreter, which needs no GPU."""

import pytest
import torch

from moe.kernels import activation_kernels, row_sum_kernel
from moe.kernels.availability import has_kernels

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of the norm; bf16: one rounding


def assert_close(got, wanted):
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < TOLERANCE[got.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(5, 13), (3, 1024), (2, 2500)])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_activation_and_its_gradients_equal_autograd(dtype, rows, width, scaled):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(rows, width).to(dtype) for _ in range(3))
    scale = torch.rand(rows, 1).to(dtype) if scaled else None
    exact = [x.double().requires_grad_() for x in (gate, up, torch.ones(rows, 1) if scale is None else scale)]
    expected = torch.nn.functional.silu(exact[0]) * exact[1] * exact[2]
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    assert_close(activation_kernels.activate(gate, up, scale), expected)
    hidden, gate_grad, up_grad, scale_grad = activation_kernels.activate_backward(
        gate, up, scale, grad.clone()
    )
    assert_close(hidden, expected)
    assert_close(gate_grad, expected_grads[0])
    assert_close(up_grad, expected_grads[1])
    if scaled:
        assert scale_grad.dtype == torch.float32
        assert_close(scale_grad, expected_grads[2][:, 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [7, 1500])
@pytest.mark.parametrize("drops", [True, False])
def test_rows_are_summed_by_token_and_dropped_ones_not_read(dtype, width, drops):
    torch.manual_seed(0)
    rows, places = torch.randn(9, width).to(dtype), torch.randint(8, (6, 3))
    kept = torch.rand(6, 3) > 0.4 if drops else None
    if kept is not None:
        rows[8] = float("nan")  # as an undefined row
        places = places.where(kept, 8)
    weights = torch.zeros(6, 9, dtype=torch.float64)
    for token in range(6):
        for choice in range(3):
            if kept is None or kept[token, choice]:
                weights[token, places[token, choice]] += 1
    assert_close(row_sum_kernel.sum_rows(rows, places, kept), weights[:, :8] @ rows[:8].double())


def test_no_rows_are_no_launch():
    empty = torch.zeros(0, 8)
    assert activation_kernels.activate(empty, empty, None).shape == (0, 8)
    assert activation_kernels.activate_backward(empty, empty, empty[:, :1], empty)[3].shape == (0,)
    assert row_sum_kernel.sum_rows(empty, torch.zeros(0, 2, dtype=torch.int64), None).shape == (0, 8)


def test_a_cpu_has_no_kernels():
    assert not has_kernels(torch.zeros(2, 2))
