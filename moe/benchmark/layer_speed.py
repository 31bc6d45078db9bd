"""Speed and memory of one layer at several shapes, contender by contender."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from moe.benchmark.contenders import Outcome, Pass
from moe.benchmark.contenders_by_name import is_comparable
from moe.benchmark.layer_problem import LayerShape
from moe.benchmark.measuring import in_turns, spread_ms


class Timed(Protocol):
    """What is measured of a contender, whether it is in this process or in another."""

    def check(self, expected: Outcome) -> None:
        """See `Contender.check`."""
        ...

    def peak_mib(self) -> float | None:
        """See `Contender.peak_mib`."""
        ...

    def timed_pass(self) -> Pass:
        """See `Contender.timed_pass`."""
        ...


# Makes contenders of these names, for as long as they are measured, and what they should compute.
RunContenders = Callable[
    [Sequence[str], LayerShape], AbstractContextManager[tuple[Mapping[str, Timed], Outcome]]
]


def measure_layers(
    shapes: Sequence[LayerShape], names: Sequence[str], run: RunContenders, repeats: int, budget_s: float
) -> Iterator[list[dict[str, Any]]]:
    """Compare the contenders at each shape, those left out that compute something else there.

    Args:
        shapes: one after the other.
        names: of the contenders.
        run: `running_contenders`, with its last arguments given.
        repeats: timed passes of each contender at most.
        budget_s: seconds of a contender at one shape after which it is not timed again.

    Yields:
        For each shape, a record per contender.

    Raises:
        RunError: a contender's output or gradients are not those of the reference; nothing was timed then.
    """
    for shape in shapes:
        comparable = [name for name in names if is_comparable(name, shape)]
        with run(comparable, shape) as (contenders, expected):
            passes, peaks = _measure(contenders, expected, repeats, budget_s)
        del contenders, expected  # before those of the next shape are made
        yield _records(shape, passes, peaks)


def _measure(
    contenders: Mapping[str, Timed], expected: Outcome, repeats: int, budget_s: float
) -> tuple[dict[str, list[Pass]], dict[str, float | None]]:
    for contender in contenders.values():
        contender.check(expected)
    peaks = {name: contender.peak_mib() for name, contender in contenders.items()}
    runs = {name: contender.timed_pass for name, contender in contenders.items()}
    return in_turns(runs, repeats, budget_s), peaks


def _records(
    shape: LayerShape, passes: Mapping[str, Sequence[Pass]], peaks: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    both = {name: spread_ms([one.total for one in timed]) for name, timed in passes.items()}
    dense = both["dense"].median if "dense" in both else None
    records = []
    for name, timed in passes.items():
        forward = spread_ms([one.forward for one in timed]).median
        records.append(
            {
                "contender": name,
                "num_experts": shape.num_experts,
                "tokens": shape.tokens,
                "top_k": shape.top_k,
                "d_model": shape.d_model,
                "d_ff_expert": shape.d_ff_expert,
                "forward_ms": forward,
                "forward_backward_ms": both[name].median,
                "backward_ms": both[name].median - forward,
                "peak_mib": peaks[name],
                "relative_to_dense": None if dense is None else dense / both[name].median,
                "forward_backward_quartiles_ms": both[name].quartiles,
                "repeats": len(timed),
            }
        )
    return records
