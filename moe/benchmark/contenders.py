"""Something that is timed one forward and backward pass at a time, after its result was found to be right.

Shape suffixes: T tokens, D d_model.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.benchmark.layer_problem import LayerProblem
from moe.benchmark.measuring import now, peak_bytes
from moe.config import RunError
from moe.model.experts import SwiGLU
from moe.model.initialization import init_weights

# Largest relative difference, as a norm, of outputs and gradients that rounding explains.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Pass(NamedTuple):
    """Seconds of one forward and backward pass."""

    forward: float
    total: float


class Outcome(NamedTuple):
    """What one pass computes. The norm is over all weights, as contenders store them differently."""

    output: Tensor  # (1, T, D)
    input_gradient: Tensor  # (1, T, D)
    gradient_norm: Tensor  # ()


class Contender(ABC):
    """Something that is timed one forward and backward pass at a time."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device

    @abstractmethod
    def forward(self) -> None:
        """A forward pass in training."""

    @abstractmethod
    def backward(self) -> None:
        """Its backward pass, which must come next."""

    @abstractmethod
    def clear(self) -> None:
        """Drop the output and all gradients, so that the next pass adds to none."""

    @abstractmethod
    def check(self, expected: Outcome) -> None:
        """Refuse a contender that computes something else; at the same time the warm-up.

        Raises:
            RunError: naming it.
        """

    def timed_pass(self) -> Pass:
        """One pass. The clock is read when the device is done, and what the last pass left is gone before."""
        self.clear()
        started = now(self.device)
        self.forward()
        between = now(self.device)
        self.backward()
        ended = now(self.device)
        self.clear()
        return Pass(between - started, ended - started)

    def peak_mib(self) -> float | None:
        """Peak memory of one pass in MiB, without weights and their gradients; None: all is preallocated."""
        self.clear()
        peak = peak_bytes(self._run, self._weight_gradients, self.device)
        self.clear()
        return peak / 2**20

    def _run(self) -> None:
        self.forward()
        self.backward()

    def _weight_gradients(self) -> list[Tensor]:
        return []


class ModuleContender(Contender):
    """A module that maps (1, T, D) to the same, or to a tuple that begins with it."""

    def __init__(self, name: str, module: nn.Module, problem: LayerProblem):
        super().__init__(name, problem.device)
        self.problem, self.module, self.upstream = problem, module, problem.upstream
        self.hidden = problem.hidden.detach().requires_grad_()
        self.output: Tensor | None = None

    def forward(self) -> None:
        """Keep the output, and with it the graph."""
        output = self.module(self.hidden)
        self.output = output[0] if isinstance(output, tuple) else output

    def backward(self) -> None:
        """Free the graph, and leave new gradients of the input and of each weight."""
        assert self.output is not None
        self.output.backward(self.upstream)

    def clear(self) -> None:
        """No output, no gradients."""
        self.output = self.hidden.grad = None
        self.module.zero_grad(set_to_none=True)

    def outcome(self) -> Outcome:
        """Run one pass, and return what it computes.

        Raises:
            RunError: some weight has no gradient, so the pass left work out.
        """
        self.clear()
        self._run()
        gradients, weights = self._weight_gradients(), len(list(self.module.parameters()))
        if len(gradients) < weights:
            missing = weights - len(gradients)
            raise RunError(f"{self.name}: {missing} of its {weights} weights got no gradient")
        assert self.output is not None
        assert self.hidden.grad is not None
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        outcome = Outcome(self.output.detach(), self.hidden.grad, torch.stack(norms).norm())
        self.clear()
        return outcome

    def check(self, expected: Outcome) -> None:
        """Compare output, gradient of the input, and norm of all weights' gradients."""
        tolerance = _TOLERANCE[self.hidden.dtype]
        for what, ours, theirs in zip(Outcome._fields, self.outcome(), expected, strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error <= tolerance:
                difference = f"its {what.replace('_', ' ')} is not that of the reference"
                sizes = f"relative difference {error:.1e}, at most {tolerance:.0e} is rounding"
                raise RunError(f"{self.name}: {difference} ({sizes}); nothing was timed")

    def _weight_gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.module.parameters() if weight.grad is not None]


class DenseContender(ModuleContender):
    """One SwiGLU of the active width: the FLOPs of the experts that a token visits, without routing."""

    def __init__(self, problem: LayerProblem):
        shape = problem.shape
        block = SwiGLU(shape.d_model, shape.top_k * shape.d_ff_expert)
        init_weights(block, seed=0)
        super().__init__("dense", block.to(problem.device, problem.dtype), problem)

    def check(self, expected: Outcome) -> None:
        """Compare it with its formula: it has no experts, so the layers' outcome is not its own."""
        del expected
        weights = {name: weight.detach().clone() for name, weight in self.module.named_parameters()}
        super().check(ModuleContender("formula", _Formula(weights), self.problem).outcome())


class _Formula(nn.Module):
    """SwiGLU as it is written in the paper."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.w_gate, self.w_up, self.w_down = (
            nn.Parameter(weights[name]) for name in ("w_gate", "w_up", "w_down")
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return (F.silu(hidden @ self.w_gate) * (hidden @ self.w_up)) @ self.w_down
