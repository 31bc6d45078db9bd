"""The experts of a layer: what one of them computes, and which path they take."""

import pytest
import torch

from moe.dispatch.permutation import count_assignments, plan_permutation
from moe.model.experts import GroupedExperts, SwiGLU
from moe.model.initialization import init_weights

D_MODEL = 16


def test_one_expert_equals_the_dense_block():
    experts = GroupedExperts(1, range(1), D_MODEL, 24, "loop")
    dense = SwiGLU(D_MODEL, 24)
    init_weights(dense, 0)
    experts.load_state_dict({name: weight[None] for name, weight in dense.state_dict().items()})
    hidden, indices = torch.randn(10, D_MODEL), torch.zeros(10, 1, dtype=torch.int64)
    permutation = plan_permutation(indices, count_assignments(indices, 1))
    output = experts(hidden, torch.ones(10, 1), permutation)
    torch.testing.assert_close(output, dense(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "path"),
    [(torch.float32, "grouped_mm"), (torch.bfloat16, "grouped_mm"), (torch.float64, "loop")],
)
def test_without_a_path_each_forward_takes_the_fast_one_for_its_dtype(dtype, path):
    """The same experts before and after `.to(dtype)`: bit for bit what the named path gives."""
    free, named = (GroupedExperts(3, range(3), D_MODEL, 24, chosen) for chosen in (None, path))
    rows, indices = torch.randn(10, D_MODEL), torch.tensor([[0]] * 4 + [[2]] * 6)
    gates, permutation = torch.rand(10, 1), plan_permutation(indices, count_assignments(indices, 3))
    for experts in (free, named):
        init_weights(experts, 0)
    free(rows, gates, permutation)
    outputs = [experts.to(dtype)(rows.to(dtype), gates, permutation) for experts in (free, named)]
    assert torch.equal(*outputs)


def test_a_path_that_does_not_exist_is_a_value_error():
    with pytest.raises(
        ValueError, match="expert_path should be loop, grouped_mm, reference or None, got 'ba"
    ):
        GroupedExperts(3, range(3), D_MODEL, 24, "banana")  # pyright: ignore[reportArgumentType]
