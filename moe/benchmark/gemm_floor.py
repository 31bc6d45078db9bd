"""The floor of a MoE layer: the matrix products of its experts and nothing else."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe.benchmark.contenders import Contender, Outcome
from moe.benchmark.layer_problem import LayerProblem
from moe.model.products import DENSE


class GemmFloor(Contender):
    """Three products of each expert forward and six backward, on as many rows as it has in the layer.

    They are those of the layer's path `loop`. There is no routing, no activation, no autograd.
    """

    def __init__(self, problem: LayerProblem):
        super().__init__("gemm_floor", problem.device)
        shape, like = problem.shape, problem.hidden
        rows = problem.tokens_per_expert.tolist()

        def groups(width: int) -> tuple[Tensor, ...]:
            return torch.randn(sum(rows), width, device=like.device, dtype=like.dtype).split(rows)

        x, dy = (groups(shape.d_model) for _ in range(2))
        act, d_gate, d_up = (groups(shape.d_ff_expert) for _ in range(3))
        stacked = [problem.weights[f"experts.{name}"] for name in ("w_gate", "w_up", "w_down")]
        gradients = [torch.zeros_like(weights) for weights in stacked]
        self._forward: list[Callable[[], object]] = []
        self._backward: list[Callable[[], object]] = []
        for e in (expert for expert, number in enumerate(rows) if number):
            w_gate, w_up, w_down = (weights[e] for weights in stacked)
            dw_gate, dw_up, dw_down = (weights[e] for weights in gradients)
            for left, weight in ((x, w_gate), (x, w_up), (act, w_down)):
                self._forward.append(partial(DENSE.output, left[e], weight))
            for left, weight, grad, into in (
                (act, w_down, dy, dw_down),
                (x, w_gate, d_gate, dw_gate),
                (x, w_up, d_up, dw_up),
            ):
                self._backward.append(partial(DENSE.input_grad, grad[e], weight))
                self._backward.append(partial(DENSE.weight_grad, left[e], grad[e], into))

    def forward(self) -> None:
        """The products of the forward pass."""
        _multiply(self._forward)

    def backward(self) -> None:
        """Those of the backward pass."""
        _multiply(self._backward)

    def clear(self) -> None:
        """Nothing is left."""

    def check(self, expected: Outcome) -> None:
        """Warm up; there is no result to compare."""
        del expected
        self._run()

    def peak_mib(self) -> None:
        """Not measured: results are dropped at once."""
        return None


@torch.no_grad()
def _multiply(products: list[Callable[[], object]]) -> None:
    for product in products:
        product()
