"""Contenders compute the same or are refused, and one pass leaves nothing to the next."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.benchmark.contenders import DenseContender, ModuleContender
from moe.benchmark.contenders_by_name import (
    CONTENDERS,
    build_contender,
    check_names,
    is_comparable,
    reference_of,
)
from moe.benchmark.gemm_floor import GemmFloor
from moe.benchmark.layer_problem import LayerProblem, LayerShape, layer_shapes
from moe.config import ConfigError, RunError

CPU = torch.device("cpu")
SHAPE = LayerShape(num_experts=8, tokens=40, top_k=2, d_model=16, d_ff_expert=32)
LAYERS = ("moe", "moe_reference", "deepspeed", "hf_eager", "hf_grouped_mm")


@pytest.fixture
def problem():
    return LayerProblem(SHAPE, CPU)


@pytest.fixture
def expected(problem):
    return reference_of(problem).outcome()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_all_compute_the_same(top_k):
    shape = LayerShape(8, 40, top_k, 16, 32)
    problem = LayerProblem(shape, CPU)
    expected = reference_of(problem).outcome()
    for name in CONTENDERS:
        if is_comparable(name, shape):
            build_contender(name, problem).check(expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weight", range(3))
def test_other_weights_are_refused_by_name(problem, expected, name, weight):
    """One of a router's, of an expert's first and of its last product is changed, in a copy."""
    contender = build_contender(name, problem)
    assert isinstance(contender, ModuleContender)
    weights = dict(contender.module.named_parameters())
    changed = list(weights)[(0, len(weights) // 2, -1)[weight]]
    with torch.no_grad():
        weights = {key: value.clone() for key, value in contender.module.state_dict().items()}
        weights[changed] *= 1.01
    contender.module.load_state_dict(weights, assign=True)
    with pytest.raises(
        RunError, match=rf"^{name}: its \w+( \w+)? is not that of the reference .*nothing was timed"
    ):
        contender.check(expected)


def test_a_weight_without_gradient_is_refused():
    """Such a contender would save the time of a product."""
    problem = LayerProblem(SHAPE, CPU)
    expected = reference_of(problem).outcome()
    contender = build_contender("moe", problem)
    problem.layer.experts.w_up.requires_grad_(False)
    with pytest.raises(RunError, match="moe: 1 of its 4 weights got no gradient"):
        contender.check(expected)


def test_a_dense_block_that_computes_something_else_is_refused(problem, expected, monkeypatch):
    dense = DenseContender(problem)
    assert sum(weight.numel() for weight in dense.module.parameters()) == 3 * 16 * 2 * 32  # two experts'
    dense.check(expected)
    monkeypatch.setattr(
        dense.module, "forward", lambda hidden: hidden @ dense.module.w_gate @ dense.module.w_down
    )
    with pytest.raises(RunError, match="dense: "):
        dense.check(expected)


@pytest.mark.parametrize("name", ["moe", "hf_eager"])
def test_a_pass_leaves_nothing_behind(problem, name):
    contender = build_contender(name, problem)
    assert isinstance(contender, ModuleContender)
    for _ in range(2):
        timed = contender.timed_pass()
        assert 0 < timed.forward < timed.total
        assert contender.output is contender.hidden.grad is None
        assert all(weight.grad is None for weight in contender.module.parameters())
    first, second = contender.outcome(), contender.outcome()
    torch.testing.assert_close(first.gradient_norm, second.gradient_norm)  # gradients did not add up


def test_the_floor_has_nine_products_of_each_assignment(problem):
    floor = GemmFloor(problem)
    with FlopCounterMode(display=False) as counter:
        floor.forward()
    assert counter.get_total_flops() == 3 * 2 * (40 * 2) * 16 * 32
    with counter:
        floor.backward()
    assert counter.get_total_flops() == 6 * 2 * (40 * 2) * 16 * 32
    assert floor.peak_mib() is None


def test_memory_is_that_of_activations_not_of_weights(problem):
    """At least the two pre-activations of each row; less than the weights, whose gradients are as large."""
    for name in ("moe", "moe_reference"):
        peak = build_contender(name, problem).peak_mib()
        assert peak is not None
        assert 2 * 40 * 2 * 32 * 4 / 2**20 < peak < 8 * 3 * 16 * 32 * 4 / 2**20 * 2.5


def test_every_token_chooses_clearly(problem):
    logits = problem.hidden[0].double() @ problem.weights["router.weight"].double().T
    best = logits.topk(3, dim=1).values
    assert (best[:, 1] - best[:, 2]).min() > 1e-4 * logits.std()
    assert problem.tokens_per_expert.sum() == 40 * 2


def test_active_flops_are_equal_for_every_top_k():
    shapes = layer_shapes([8, 16], [64], [1, 2, 4], 512)
    assert [(shape.num_experts, shape.top_k, shape.d_ff_expert) for shape in shapes] == [
        (8, 1, 2048), (16, 1, 2048), (8, 2, 1024), (16, 2, 1024), (8, 4, 512), (16, 4, 512),
    ]  # fmt: skip
    (olmoe,) = layer_shapes([64], [64], [8], d_model=2048)
    assert (olmoe.d_model, olmoe.d_ff_expert) == (2048, 1024)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (([8], [64], [3]), "--top-k: 2048 / 3 is no multiple of 8"),
        (([2, 8], [64], [4]), "--experts: 2 is too few for top-4"),
        (([1], [64], [1]), "--experts: 1 is too few for top-1; use 2"),
    ],
)
def test_shapes_that_cannot_be_compared_are_refused(sizes, message):
    experts, tokens, top_ks = sizes
    with pytest.raises(ConfigError, match=f"^{message}"):
        layer_shapes(experts, tokens, top_ks, 512)


def test_a_contender_that_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--contenders: 'megablocks' is not one of moe, "):
        check_names(["moe", "megablocks"])
    monkeypatch.setattr("moe.benchmark.contenders_by_name.find_spec", lambda name: None)
    check_names(["moe", "deepspeed"])
    with pytest.raises(ConfigError, match="hf_eager needs transformers; pip install"):
        check_names(["moe", "hf_eager"])
