"""The matrix products of linear maps against fp64, for values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from moe.model import products
from moe.model.products import DENSE, Linear, linear

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}
SHAPES = [(1, 1, 1), (2, 7, 3), (5, 3, 7), (64, 128, 256), (33, 256, 128), (9, 24, 24)]


@pytest.fixture(params=["onednn", "pytorchs"] if products._onednn else ["pytorchs"])
def library(monkeypatch, request):
    """Each library that can multiply in fp32, whichever one this machine would choose."""
    monkeypatch.setattr(products, "PREFERS_ONEDNN", request.param == "onednn")


def assert_close(got, wanted):
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
    assert error < TOLERANCE[got.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
def test_the_three_products_are_those_of_a_linear_map(library, dtype, rows, inner, outer):
    torch.manual_seed(0)
    x, weight, y_grad = (torch.randn(s).to(dtype) for s in ((rows, inner), (inner, outer), (rows, outer)))
    assert_close(DENSE.output(x, weight), x.double() @ weight.double())
    assert_close(DENSE.input_grad(y_grad, weight), y_grad.double() @ weight.double().T)
    expected = x.double().T @ y_grad.double()
    grad = DENSE.weight_grad(x, y_grad, None)
    assert grad.is_contiguous()
    assert_close(grad, expected)
    out = torch.full((3, inner, outer), float("nan"), dtype=dtype)
    DENSE.weight_grad(x, y_grad, out[1])
    assert_close(out[1], expected)
    assert out[0].isnan().all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 0, 6), (0, 6)])
@pytest.mark.parametrize("grad", ["dense", "expanded", "transposed"])
def test_linear_equals_pytorchs_with_every_gradient(library, shape, grad):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    output = linear(x, weight)
    upstream = {
        "dense": torch.randn_like(output),
        "expanded": torch.ones(()).expand(output.shape),
        "transposed": torch.randn(output.shape[::-1]).permute(*reversed(range(output.dim()))),
    }[grad]
    got = torch.autograd.grad(output, (x, weight), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.linear(*exact)
    assert_close(output, expected)
    for mine, theirs in zip(got, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert_close(mine, theirs)


def test_a_module_keeps_the_weight_of_pytorchs_and_has_no_bias(library):
    module = Linear(6, 5)
    assert {name: tuple(weight.shape) for name, weight in module.named_parameters()} == {"weight": (5, 6)}
    x = torch.randn(2, 3, 6)
    assert_close(module(x), F.linear(x.double(), module.weight.double()))


def test_without_onednn_the_products_are_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "PREFERS_ONEDNN", False)
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(DENSE.weight_grad(x, x, None), x.T @ x)


def test_no_rows_give_no_output_and_gradients_of_zero_without_a_grouped_gemm(monkeypatch):
    monkeypatch.setattr(products.F, "grouped_mm", lambda *_, **__: pytest.fail("a GPU may refuse it"))
    grouped = products.grouped_products(torch.zeros(3, dtype=torch.int64))
    weight = torch.randn(3, 8, 16)
    assert grouped.output(torch.zeros(0, 8), weight).shape == (0, 16)
    assert grouped.input_grad(torch.zeros(0, 16), weight).shape == (0, 8)
    grad = grouped.weight_grad(torch.zeros(0, 8), torch.zeros(0, 16), None)
    assert torch.equal(grad, torch.zeros(3, 8, 16))


def test_under_autocast_a_linear_map_is_that_of_pytorch(monkeypatch):
    monkeypatch.setattr(products, "PREFERS_ONEDNN", True)
    ours, x = Linear(8, 16), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), F.linear(x, ours.weight))
