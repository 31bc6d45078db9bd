"""The experts of a layer: what one of them computes, and which product they use."""

import pytest
import torch

from moe.model.experts import GroupedExperts, SwiGLU
from moe.model.initialization import init_weights

D_MODEL = 16


def test_one_expert_equals_the_dense_block():
    experts = GroupedExperts(1, range(1), D_MODEL, 24, "grouped_mm")
    dense = SwiGLU(D_MODEL, 24)
    init_weights(dense, 0)
    experts.load_state_dict({name: weight[None] for name, weight in dense.state_dict().items()})
    hidden = torch.randn(10, D_MODEL)
    torch.testing.assert_close(experts(hidden, torch.tensor([10])), dense(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.float32, "grouped_mm"), (torch.bfloat16, "grouped_mm"), (torch.float64, "loop")],
)
def test_without_a_path_each_forward_takes_the_fast_one_where_the_dtype_allows_it(dtype, chosen):
    """The same experts before and after `.to(dtype)`: bit for bit what the named path gives."""
    free, named = (GroupedExperts(3, range(3), D_MODEL, 24, path) for path in (None, chosen))
    rows, counts = torch.randn(10, D_MODEL), torch.tensor([4, 0, 6])
    for experts in (free, named):
        init_weights(experts, 0)
    free(rows, counts)
    assert torch.equal(free.to(dtype)(rows.to(dtype), counts), named.to(dtype)(rows.to(dtype), counts))
