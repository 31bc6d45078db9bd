"""The floor of a MoE layer: the matrix products of its experts and nothing else."""

import torch
from torch import Tensor

from moe.benchmark.contenders import Contender, Outcome
from moe.benchmark.layer_problem import LayerProblem

_Product = tuple[Tensor, Tensor, Tensor]  # two factors, and where their product goes


class GemmFloor(Contender):
    """Three products of each expert forward and six backward, on as many rows as it has in the layer.

    Rows, weights and results are allocated beforehand; there is no routing, no activation, no autograd.
    """

    def __init__(self, problem: LayerProblem):
        super().__init__("gemm_floor", problem.device)
        shape, like = problem.shape, problem.hidden
        rows = problem.tokens_per_expert.tolist()

        def groups(width: int) -> tuple[Tensor, ...]:
            return torch.randn(sum(rows), width, device=like.device, dtype=like.dtype).split(rows)

        x, y, dy, dx_gate, dx_up = (groups(shape.d_model) for _ in range(5))
        gate, up, act, d_act, d_gate, d_up = (groups(shape.d_ff_expert) for _ in range(6))
        stacked = [problem.weights[f"experts.{name}"] for name in ("w_gate", "w_up", "w_down")]
        gradients = [torch.zeros_like(weights) for weights in stacked]
        self._forward: list[_Product] = []
        self._backward: list[_Product] = []
        for e in (expert for expert, number in enumerate(rows) if number):
            w_gate, w_up, w_down = (weights[e] for weights in stacked)
            dw_gate, dw_up, dw_down = (weights[e] for weights in gradients)
            self._forward += [(x[e], w_gate, gate[e]), (x[e], w_up, up[e]), (act[e], w_down, y[e])]
            self._backward += [
                *((dy[e], w_down.T, d_act[e]), (act[e].T, dy[e], dw_down)),
                *((d_gate[e], w_gate.T, dx_gate[e]), (x[e].T, d_gate[e], dw_gate)),
                *((d_up[e], w_up.T, dx_up[e]), (x[e].T, d_up[e], dw_up)),
            ]

    @property
    def flops(self) -> int:
        """Of one pass."""
        factors = [(left, right) for left, right, _ in (*self._forward, *self._backward)]
        return sum(2 * left.numel() * right.shape[1] for left, right in factors)

    def forward(self) -> None:
        """The products of the forward pass."""
        _multiply(self._forward)

    def backward(self) -> None:
        """Those of the backward pass."""
        _multiply(self._backward)

    def clear(self) -> None:
        """Nothing is left: results are overwritten."""

    def check(self, expected: Outcome) -> None:
        """Warm up; there is no result to compare."""
        del expected
        self._run()

    def peak_mib(self) -> None:
        """All is allocated beforehand."""
        return None


@torch.no_grad()
def _multiply(products: list[_Product]) -> None:
    for left, right, result in products:
        torch.mm(left, right, out=result)
