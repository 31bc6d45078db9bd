"""The fast paths of the experts against their definition, for the output and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.dispatch import permutation as permutations
from moe.dispatch.capacity import plan_with_capacity
from moe.dispatch.permutation import Permutation, count_assignments, plan_permutation, plan_routed
from moe.model import activation, products
from moe.model.grouped_swiglu import ExpertPath, choose_expert_path, grouped_swiglu, swiglu

# Of the L2 norm of a tensor: a few roundings for each of its elements.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
NUM_EXPERTS = 5


FAST: list[ExpertPath] = ["loop", "grouped_mm"]


def assert_close(got: Tensor, wanted: Tensor, name: str) -> None:
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
    assert error < TOLERANCE[got.dtype], (name, float(error))


def plan(indices: Tensor, gates: Tensor, capacity: int | None = None) -> Permutation:
    counts = count_assignments(indices, NUM_EXPERTS)
    if capacity is None:
        return plan_permutation(indices, counts)
    return plan_with_capacity(indices, counts, gates, capacity)


def partly_elsewhere(indices: Tensor, gates: Tensor) -> Permutation:
    """As on a rank of many: experts 3 and 4 live on another one."""
    places = indices.where(indices < 3, NUM_EXPERTS)
    return plan_routed(places, NUM_EXPERTS, int((places < NUM_EXPERTS).sum()))


ROUTINGS: dict[str, Any] = {
    "random": lambda gates: plan(torch.rand(17, NUM_EXPERTS).topk(2, dim=1).indices, gates),
    "empty first, middle and last experts": lambda gates: plan(torch.tensor([[1, 3]]).repeat(17, 1), gates),
    "all on one expert": lambda gates: plan(torch.full((17, 1), 4), gates[:, :1]),
    "dropped choices": lambda gates: plan(torch.rand(17, NUM_EXPERTS).topk(2, dim=1).indices, gates, 3),
    "experts elsewhere": lambda gates: partly_elsewhere(
        torch.rand(17, NUM_EXPERTS).topk(2, dim=1).indices, gates
    ),
    "no tokens": lambda gates: plan(torch.zeros(0, 2, dtype=torch.int64), gates),
    "no tokens from elsewhere": lambda gates: partly_elsewhere(torch.zeros(0, 2, dtype=torch.int64), gates),
}
PATHS: list[tuple[ExpertPath, torch.dtype, tuple[int, int]]] = [
    ("loop", torch.float64, (7, 13)),
    ("loop", torch.float32, (7, 13)),
    ("loop", torch.float32, (16, 24)),
    ("loop", torch.bfloat16, (16, 24)),
    ("grouped_mm", torch.float32, (16, 24)),
    ("grouped_mm", torch.bfloat16, (16, 24)),
]


@pytest.fixture(params=["eager", "kernels"])
def _either_arithmetic(request, monkeypatch):
    """Eager operations as on a CPU, then the Triton kernels, which the interpreter runs on CPU tensors."""
    if request.param == "kernels":
        for module in (activation, permutations):
            monkeypatch.setattr(module, "has_kernels", lambda values: values.dtype != torch.float64)


def output_and_gradients(path: ExpertPath, inputs: list[Tensor], permutation: Permutation, upstream: Tensor):
    tokens, gates, *weights = inputs
    output = grouped_swiglu(tokens, gates, weights, permutation, path)
    return output, *torch.autograd.grad(output, inputs, upstream)


@pytest.mark.usefixtures("_either_arithmetic")
@pytest.mark.parametrize(("path", "dtype", "widths"), PATHS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_fast_path_equals_the_definition_with_every_gradient(path, dtype, widths, routing):
    torch.manual_seed(0)
    gates = torch.rand(17, 2, dtype=torch.promote_types(dtype, torch.float32))
    permutation = ROUTINGS[routing](gates)
    M, K = permutation.row_of_assignment.shape
    gates = gates[:M, :K].clone()
    D, F = widths
    shapes = [(M, D), (NUM_EXPERTS, D, F), (NUM_EXPERTS, D, F), (NUM_EXPERTS, F, D)]
    tokens, *weights = (torch.randn(shape, dtype=dtype) / shape[-2] ** 0.25 for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (tokens, gates, *weights)]
    upstream = torch.randn_like(tokens)

    fast = output_and_gradients(path, inputs, permutation, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = output_and_gradients("reference", exact, permutation, upstream.double())
    for name, got, wanted in zip(
        ("output", "tokens", "gates", "w_gate", "w_up", "w_down"), fast, expected, strict=True
    ):
        assert got.dtype == (gates.dtype if name == "gates" else dtype)
        assert_close(got.to(dtype), wanted, name)


@pytest.mark.parametrize("path", FAST)
def test_choices_are_summed_in_fp32_also_in_bf16(path):
    """One token, and experts that give 256, 1 and 1: 258 is a bf16 number, but in bf16 256 + 1 is 256."""
    indices = torch.tensor([[0, 1, 2]])
    gates = torch.tensor([[256.0, 1.0, 1.0]])
    weights = [torch.zeros(3, 8, 8, dtype=torch.bfloat16) for _ in range(3)]
    for weight, value in zip(weights, (16.0, 1 / 16, 1.0), strict=True):
        weight[:, 0, 0] = value  # silu(16) / 16 is 1 in bf16
    tokens = torch.zeros(1, 8, dtype=torch.bfloat16)
    tokens[0, 0] = 1
    permutation = plan_permutation(indices, count_assignments(indices, 3))
    output = grouped_swiglu(tokens.requires_grad_(), gates, weights, permutation, path)
    assert output[0].tolist() == [258.0] + [0.0] * 7


@pytest.mark.usefixtures("_either_arithmetic")
def test_the_gradient_of_a_gate_is_summed_in_fp32_also_in_bf16():
    """It is a sum of 257 ones, and 257 is no bf16 number."""
    gate = torch.full((1, 257), 16.0, dtype=torch.bfloat16)
    up, one = torch.full_like(gate, 1 / 16), torch.ones(1, 1, dtype=torch.bfloat16)
    *_, scale_grad = activation.activate_backward(gate, up, one, torch.ones_like(gate))
    assert scale_grad.item() == pytest.approx(257, abs=1e-3)


def test_the_definition_is_the_sum_over_choices_of_gate_times_expert():
    """Two tokens, two experts of width 1, by hand: silu(x g) (x u) d."""
    indices, gates = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    permutation = plan_permutation(indices, count_assignments(indices, 2))
    weights = [torch.tensor([value]).view(2, 1, 1) for value in ([1.0, 2.0], [3.0, 1.0], [1.0, -1.0])]
    expert_0 = [torch.sigmoid(torch.tensor(x)) * x * 3 * x for x in (1.0, 2.0)]
    expert_1 = [-torch.sigmoid(torch.tensor(2 * x)) * 2 * x * x for x in (1.0, 2.0)]
    expected = torch.stack(
        [0.75 * expert_0[0] + 0.25 * expert_1[0], 0.5 * expert_1[1] + 0.5 * expert_0[1]]
    ).unsqueeze(1)
    paths: list[ExpertPath] = ["reference", "loop"]
    for path in paths:
        output = grouped_swiglu(torch.tensor([[1.0], [2.0]]), gates, weights, permutation, path)
        torch.testing.assert_close(output, expected)


@pytest.mark.usefixtures("_either_arithmetic")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_dense_block_equals_its_formula_with_every_gradient(dtype):
    torch.manual_seed(0)
    shapes = [(2, 9, 7), (7, 13), (7, 13), (13, 7)]
    inputs = [torch.randn(shape, dtype=dtype).div(2).requires_grad_() for shape in shapes]
    upstream = torch.randn(2, 9, 7, dtype=dtype)
    output = swiglu(*inputs)
    fast = (output, *torch.autograd.grad(output, inputs, upstream))
    hidden, w_gate, w_up, w_down = exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = (torch.nn.functional.silu(hidden @ w_gate) * (hidden @ w_up)) @ w_down
    expected = (output, *torch.autograd.grad(output, exact, upstream.double()))
    for i, (got, wanted) in enumerate(zip(fast, expected, strict=True)):
        assert_close(got, wanted, ("output", "hidden", "w_gate", "w_up", "w_down")[i])
    with torch.no_grad():  # by other products
        assert_close(swiglu(*inputs), expected[0], "output without gradients")


@pytest.mark.parametrize("path", FAST)
def test_what_is_kept_per_token_does_not_grow_with_the_number_of_choices(path: ExpertPath):
    """Experts of half the width, twice as many choices: the same pre-activations, and no row of width D."""
    sizes = {}
    for top_k, width in ((1, 64), (8, 8)):
        indices = (torch.arange(32).unsqueeze(1) + torch.arange(top_k)) % 8
        permutation = plan_permutation(indices, count_assignments(indices, 8))
        shapes = [(32, 16), (32, top_k), (8, 16, width), (8, 16, width), (8, width, 16)]
        tokens, gates, *weights = (torch.randn(shape, requires_grad=True) for shape in shapes)
        inputs = {tensor.data_ptr() for tensor in (tokens, gates, *weights)}
        kept = {}

        def keep(tensor: Tensor, kept=kept, inputs=inputs) -> Tensor:
            if tensor.data_ptr() not in inputs:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = grouped_swiglu(tokens, gates, weights, permutation, path)
        assert output.requires_grad
        sizes[top_k] = sum(kept.values())
    assert sizes == {1: 2 * 32 * 64, 8: 2 * 32 * 64}


def test_an_expanded_gradient_is_accepted():
    indices = torch.tensor([[0], [1], [1], [1]])
    permutation = plan_permutation(indices, count_assignments(indices, 2))
    shapes = [(4, 8), (4, 1), (2, 8, 8), (2, 8, 8), (2, 8, 8)]
    for path in FAST:
        tokens, gates, *weights = (torch.randn(shape, requires_grad=True) for shape in shapes)
        grouped_swiglu(tokens, gates, weights, permutation, path).sum().backward()
        assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights)


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "rows", "path"),
    [
        ("cpu", torch.float32, (128, 256), 2 * 2**7, "loop"),  # 2^22 products for each of two experts
        ("cpu", torch.float32, (128, 256), 2 * 2**7 - 2, "grouped_mm"),
        ("cpu", torch.float32, (128, 341), 2, "loop"),  # no multiple of 16 bytes
        ("cpu", torch.bfloat16, (512, 1024), 4096, "grouped_mm"),
        ("cpu", torch.bfloat16, (128, 340), 2, "loop"),
        ("cpu", torch.float64, (128, 256), 2, "loop"),
        ("cuda", torch.bfloat16, (512, 1024), 4096, "grouped_mm"),
        ("cuda", torch.float32, (128, 256), 2, "loop"),
    ],
)
def test_the_path_fits_device_dtype_widths_and_rows(monkeypatch, device, dtype, widths, rows, path):
    monkeypatch.setattr(products, "PREFERS_ONEDNN", True)
    assert torch.get_num_threads() == 1
    assert choose_expert_path((2, *widths), dtype, torch.device(device), rows) == path


def test_without_onednns_products_all_experts_go_into_one_grouped_product(monkeypatch):
    monkeypatch.setattr(products, "PREFERS_ONEDNN", False)
    assert choose_expert_path((2, 128, 256), torch.float32, torch.device("cpu"), 2**20) == "grouped_mm"


@pytest.mark.parametrize(("num_experts", "path"), [(1023, "grouped_mm"), (1024, "loop")])
def test_a_gpu_gets_no_more_groups_than_its_grouped_gemm_takes(num_experts, path):
    """torch 2.11 to 2.13 ask for fewer than 1,024."""
    shape, gpu = (num_experts, 16, 16), torch.device("cuda")
    assert choose_expert_path(shape, torch.bfloat16, gpu, 2048) == path
