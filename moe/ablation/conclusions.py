"""What the runs of an ablation support and what they do not, in plain sentences."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from moe.ablation.cells import TOLERANCE
from moe.ablation.comparison import Comparison, Curve
from moe.ablation.results import CellResult
from moe.ablation.statistics import Interval, paired_difference, with_bounds
from moe.tables import short

_BETTER, _WORSE, _UNCLEAR = "better than", "worse than", "not told apart from"


def conclusions(comparison: Comparison) -> Iterator[str]:
    """What the runs support, and what they do not."""
    cells = comparison.cells
    if len(cells) == 1:
        yield f"{cells[0].label} is compared with nothing: no other run here has its settings outside moe.*."
        return
    said = list(_with_intervals(comparison))
    yield from said
    if intervals := sum(one.count(" [") for one in said):
        yield f"Of twenty intervals of 95 % one misses by chance; here are {intervals}."
    if comparison.baseline is not None:
        yield from _speed(cells, comparison.baseline)
    tokens = sorted({run.summary["tokens"] for cell in cells for run in cell.runs.values()})
    yield (
        f"All this is after {' to '.join(short(t) for t in dict.fromkeys((tokens[0], tokens[-1])))} tokens a "
        "run, with one set of hyperparameters; it says nothing of longer training or of larger models."
    )


def _with_intervals(comparison: Comparison) -> Iterator[str]:
    """All conclusions that hold intervals."""
    if comparison.baseline is None:
        yield "Nothing is compared with a dense model: there is no dense run."
    else:
        yield from _against_dense(comparison, comparison.baseline)
    for curve in comparison.curves:
        yield from _along(curve)
    yield from _equivalents(comparison)


def _against_dense(comparison: Comparison, baseline: CellResult) -> Iterator[str]:
    others = [cell for cell in comparison.cells if cell is not baseline]
    known = {
        c: d for c in others if (d := comparison.differences.get(c.label)) is not None and d.low is not None
    }
    outcomes: dict[str, list[str]] = {_BETTER: [], _WORSE: [], _UNCLEAR: []}
    for cell, difference in known.items():
        said = f"{cell.label} by {with_bounds(difference)}{_with_flops(cell, baseline)}"
        outcomes[_outcome(difference)].append(said)
    for outcome, found in outcomes.items():
        if found:
            what = f"{outcome.capitalize()} {baseline.label}"
            yield f"{what} (nats per token, paired by seed, 95 %): {'; '.join(found)}."
    single = [c.label for c in others if c not in known and c.label in comparison.differences]
    if single:
        yield f"One seed in common with {baseline.label} tells no spread; may be chance: {'; '.join(single)}."
    if none := [cell.label for cell in others if cell.label not in comparison.differences]:
        yield f"No seed in common with {baseline.label}, so not compared: {'; '.join(none)}."
    halves = [d.mean - d.low for cell, d in known.items() if not cell.is_dense and d.low is not None]
    if halves:
        yield (
            f"The intervals of sparse models reach {min(halves):.4f} to {max(halves):.4f} nats to either "
            "side: smaller differences are not resolved."
        )
    same = [
        _compared(cell, dense)
        for cell in comparison.sparse
        for dense in comparison.dense
        if dense is not baseline
        and abs(cell.counts.total / dense.counts.total - 1) <= TOLERANCE
        and _share_seeds(cell, dense)
    ]
    if same:
        yield f"At equal total parameters: {'; '.join(same)}."


def _along(curve: Curve) -> Iterator[str]:
    """Each cell against the one before it and against the first, and the power law."""
    first, *others = curve.cells
    along = f" along {curve.key}" if curve.key else ""
    steps = [
        _compared(after, before) for before, after in pairwise(curve.cells) if _share_seeds(after, before)
    ]
    if steps:
        yield f"Step by step{along}: {'; '.join(steps)}."
    if far := [_compared(cell, first) for cell in others[1:] if _share_seeds(cell, first)]:
        yield f"And from the first{along}: {'; '.join(far)}."
    if (law := curve.law) is not None:
        change = (curve.cells[-1].counts.total / first.counts.total) ** law.exponent.mean - 1
        supports = ""
        if law.exponent.low is None:
            supports = "; one seed tells no spread"
        elif _outcome(law.exponent) == _UNCLEAR:
            supports = "; it may be zero, so no law is supported"
        yield (
            f"Loss as a power of total parameters, from the dense model to {curve.cells[-1].label}: exponent "
            f"{with_bounds(law.exponent)} over seeds, {change:+.1%} from {first.label} on, residuals to "
            f"{max(map(abs, law.residuals)):.1%}{supports}."
        )


def _share_seeds(cell: CellResult, other: CellResult) -> bool:
    """Whether they can be compared with an interval."""
    return len(cell.runs.keys() & other.runs.keys()) > 1


def _compared(cell: CellResult, other: CellResult) -> str:
    difference = paired_difference(cell.losses, other.losses)
    said = f"{cell.label} {_outcome(difference)} {other.label}: {with_bounds(difference)}"
    return said + _with_flops(cell, other)


def _outcome(difference: Interval) -> str:
    if difference.high is not None and difference.high < 0:
        return _BETTER
    if difference.low is not None and difference.low > 0:
        return _WORSE
    return _UNCLEAR


def _with_flops(cell: CellResult, other: CellResult) -> str:
    times = cell.flops / other.flops
    return f" (with {times:.3g} times its FLOPs)" if abs(times - 1) > 2 * TOLERANCE else ""


def _equivalents(comparison: Comparison) -> Iterator[str]:
    law, dense = comparison.dense_law, [cell.counts.active_no_input_emb for cell in comparison.dense]
    if law is None or not comparison.sparse:
        return
    through = (
        "through the dense runs, loss is a power of active parameters (without the input embedding) with "
        f"exponent {with_bounds(law.exponent)}"
    )
    if not comparison.worth:
        why = ", which is not below zero on every seed and beyond doubt"
        if law.exponent.low is None:
            why = "; one seed tells no spread"
        yield f"What dense size the sparse models are worth is not told by these runs: {through}{why}."
        return
    found = []
    for label, size in comparison.worth.items():
        known = [bound for bound in size if bound is not None]
        bounds = f" [{short(known[1])}, {short(known[2])}]" if len(known) > 1 else ""
        beyond = ", extrapolated" if min(known) < min(dense) or max(known) > max(dense) else ""
        found.append(f"{label} {short(size.mean)}{bounds}{beyond}")
    fit = "two sizes, so it has no residual"
    if len(dense) > 2:
        fit = f"{len(dense)} sizes, residuals to {max(map(abs, law.residuals)):.2%} of the loss"
    yield f"Worth a dense model of so many parameters ({through}; {fit}): {'; '.join(found)}."


def _speed(cells: Sequence[CellResult], baseline: CellResult) -> Iterator[str]:
    found = [
        f"{cell.label} {cell.tokens_per_s / baseline.tokens_per_s:.2f}"
        for cell in cells
        if cell is not baseline
    ]
    yield f"Tokens per second as they were trained, those of {baseline.label} being 1: {'; '.join(found)}."
