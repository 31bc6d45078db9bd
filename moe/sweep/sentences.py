"""Plain sentences of what a sweep supports, and what it does not."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from moe.sweep.findings import CellResult, Findings
from moe.sweep.plan import TOLERANCE
from moe.sweep.statistics import Interval, paired_difference, with_bounds
from moe.tables import short


def sentences(findings: Findings) -> Iterator[str]:
    """What the runs support, and what they do not."""
    cells = findings.cells
    sparse = [cell for cell in cells if not cell.is_dense]
    if len(cells) == 1:
        yield f"{cells[0].label} is compared with nothing: no other run here has its settings outside moe.*."
        return
    if findings.baseline is None:
        names = "; ".join(cell.label for cell in sparse)
        yield f"Nothing is compared with a dense model: there is no dense run beside {names}."
    else:
        yield from _against_dense(findings, findings.baseline)
    yield from _step_by_step(sparse)
    if findings.law is not None:
        exponent = findings.law.exponent
        yield (
            "Loss against total parameters at equal active FLOPs, as a power law: exponent "
            f"{with_bounds(exponent)}, residuals to {max(map(abs, findings.law.residuals)):.2%} of the loss."
        )
    yield from _equivalents(findings)
    yield from _speed(findings)
    tokens = sorted({run.summary["tokens"] for cell in cells for run in cell.runs.values()})
    yield (
        f"All this is after {' to '.join(short(t) for t in dict.fromkeys((tokens[0], tokens[-1])))} tokens a "
        "run, with one set of hyperparameters; it says nothing of longer training or of larger models."
    )


def _against_dense(findings: Findings, baseline: CellResult) -> Iterator[str]:
    known = {
        label: d for label, d in findings.differences.items() if d.low is not None and d.high is not None
    }
    single = [label for label in findings.differences if label not in known]
    if single:
        yield f"One seed in common with {baseline.label} tells no spread; may be chance: {'; '.join(single)}."
    flops = {cell.label: cell.ledger.flops_per_token_forward for cell in findings.cells}
    outcomes: dict[str, list[str]] = {"Better than": [], "Worse than": [], "Not told apart from": []}
    for label, difference in known.items():
        times = flops[label] / flops[baseline.label]
        cost = f" (with {times:.2g} times its FLOPs)" if abs(times - 1) > 2 * TOLERANCE else ""
        outcomes[_outcome(difference)].append(f"{label} by {with_bounds(difference)}{cost}")
    for outcome, found in outcomes.items():
        if found:
            yield f"{outcome} {baseline.label} (nats per token, paired by seed, 95 %): {'; '.join(found)}."
    if known:
        halves = sorted((d.high - d.low) / 2 for d in known.values())  # type: ignore[operator]
        yield (
            f"Differences from {baseline.label} below about {halves[len(halves) // 2]:.4f} nats are not "
            f"resolved by {len(baseline.runs)} seeds. Each interval holds for one comparison, not for all."
        )


def _outcome(difference: Interval) -> str:
    if difference.high is not None and difference.high < 0:
        return "Better than"
    if difference.low is not None and difference.low > 0:
        return "Worse than"
    return "Not told apart from"


def _step_by_step(sparse: Sequence[CellResult]) -> Iterator[str]:
    """Each model against the next smaller one."""
    steps = [
        (smaller, larger, paired_difference(larger.losses, smaller.losses))
        for smaller, larger in pairwise(sparse)
        if len(smaller.runs.keys() & larger.runs.keys()) > 1
    ]
    if steps:
        found = [
            f"{larger.label} {_outcome(d).lower()} {smaller.label}: {with_bounds(d)}"
            for smaller, larger, d in steps
        ]
        yield f"Step by step: {'; '.join(found)}."


def _equivalents(findings: Findings) -> Iterator[str]:
    dense = [cell.ledger.active_no_input_emb for cell in findings.cells if cell.is_dense]
    if findings.worth and findings.dense_law is not None:
        law = findings.dense_law
        found = []
        for label, size in findings.worth.items():
            bounds = (
                "" if size.low is None or size.high is None else f" [{short(size.low)}, {short(size.high)}]"
            )
            beyond = "" if min(dense) <= size.mean <= max(dense) else ", extrapolated"
            found.append(f"{label} {short(size.mean)}{bounds}{beyond}")
        fit = (
            "two sizes, so it has no residual"
            if len(dense) == 2
            else f"{len(dense)} sizes, residuals up to {max(map(abs, law.residuals)):.2%} of the loss"
        )
        yield (
            "Worth a dense model of so many active parameters (without the input embedding), by a power law "
            f"of exponent {with_bounds(law.exponent)} through the dense runs ({fit}): {'; '.join(found)}."
        )


def _speed(findings: Findings) -> Iterator[str]:
    if findings.baseline is not None:
        speed = findings.baseline.tokens_per_s
        found = [
            f"{cell.label} {cell.tokens_per_s / speed:.2f}"
            for cell in findings.cells
            if cell is not findings.baseline
        ]
        if found:
            base = findings.baseline.label
            yield f"Tokens per second on this machine, those of {base} being 1: {'; '.join(found)}."
