"""The grouped product against a loop over experts, in both passes."""

from typing import Any

import pytest
import torch

from moe.model.grouped_mm import choose_expert_path, grouped_mm, grouped_mm_reference
from tests.support.models import gradient_of

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
}
COUNTS = {
    "even": [4, 4, 4],
    "empty first and last": [0, 12, 0],
    "rows past the last group": [3, 0, 5],
    "no rows at all": [0, 0, 0],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_path_equals_the_loop_with_every_gradient(counts, dtype):
    torch.manual_seed(0)
    counts = torch.tensor(COUNTS[counts])
    used = int(counts.sum())
    rows = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 16, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(used, 24, dtype=dtype)
    results = []
    for path in (grouped_mm, grouped_mm_reference):
        out = path(rows, weights, counts)[:used]
        results.append((out, *torch.autograd.grad(out, (rows, weights), upstream)))
    (out, grad_rows, grad_weights), (out_ref, grad_rows_ref, grad_weights_ref) = results
    torch.testing.assert_close(out, out_ref, **TOLERANCE[dtype])
    torch.testing.assert_close(grad_rows[:used], grad_rows_ref[:used], **TOLERANCE[dtype])
    torch.testing.assert_close(grad_weights, grad_weights_ref, **TOLERANCE[dtype])


def test_an_expanded_gradient_is_accepted():
    rows, weights = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    grouped_mm(rows, weights, torch.tensor([1, 3])).sum().backward()
    assert torch.isfinite(gradient_of(weights)).all()


def test_the_path_fits_device_and_dtype():
    assert choose_expert_path(torch.device("cpu"), torch.float32) == "grouped_mm"
    assert choose_expert_path(torch.device("cpu"), torch.float64) == "loop"
    assert choose_expert_path(torch.device("cuda"), torch.bfloat16) == "grouped_mm"
    assert choose_expert_path(torch.device("cuda"), torch.float32) == "loop"
