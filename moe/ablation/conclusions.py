"""What the runs of an ablation support and what they do not, in sentences."""

import math
import statistics
from collections.abc import Iterable, Iterator
from itertools import product

from moe.ablation.cells import TOLERANCE
from moe.ablation.comparison import VAGUE, Comparison, Curve
from moe.ablation.results import CellResult
from moe.ablation.statistics import Interval
from moe.tables import plain, short

_BETTER, _WORSE, _UNCLEAR = "better than", "worse than", "not significantly different from"
_UNFAIR = 0.03  # of training time more or less than the dense baseline's, in a race by the clock


def conclusions(comparison: Comparison) -> Iterator[str]:
    """Sentences on what the runs support and what they do not."""
    cells, baseline = comparison.cells, comparison.baseline
    if len(cells) == 1:
        settings = f": {comparison.title}" if comparison.title else ""
        problem = f"no other run has the same settings outside moe.*{settings}"
        yield f"{cells[0].label} cannot be compared: {problem}."
        return
    if comparison.is_race and baseline is not None:
        yield from _fairness(comparison, baseline)
    said = ["There is no dense run, so nothing is compared with a dense model."]
    if baseline is not None:
        said = list(_against_dense(comparison, baseline))
    for curve in comparison.curves:
        said += _along(curve, baseline)
    said += _equivalents(comparison)
    yield from said
    if intervals := sum(one.count(" [") for one in said):
        here = "is one interval" if intervals == 1 else f"are {intervals} intervals"
        yield (
            f"There {here} of 95 % here. On average, one in twenty such intervals does not hold the true "
            "value."
        )
    if baseline is not None:
        others = [cell for cell in cells if cell is not baseline]
        speeds = [f"{cell.label} {cell.tokens_per_s / baseline.tokens_per_s:.2f}" for cell in others]
        yield f"Tokens per second during training, relative to {baseline.label}: {'; '.join(speeds)}."
    tokens = sorted({run.summary["tokens"] for cell in cells for run in cell.runs.values()})
    amount = short(tokens[0]) if len(tokens) == 1 else f"{short(tokens[0])} to {short(tokens[-1])}"
    yield (
        f"All results are after {amount} tokens per run, with one set of hyperparameters. They do not show "
        "what happens with longer training or larger models."
    )


def headline(comparison: Comparison) -> str:
    """One sentence: which cell is best, by how much, and whether that is more than chance.

    Cells that spend more FLOPs than the baseline are left out.
    """
    other = comparison.baseline
    most = other.flops * (1 + 2 * TOLERANCE) if other is not None else math.inf
    affordable = [cell for cell in comparison.cells if cell.flops <= most]
    best, *others = sorted(affordable, key=lambda cell: cell.mean_loss)
    if not others:
        return f"{best.label} ends at a validation loss of {best.mean_loss:.4f} nats per token."
    if other is None or other is best:
        other = others[0]
    difference = best.difference_to(other)
    if difference is None:
        return f"{best.label} has the lowest loss; no seed is in common with {other.label}."
    by = f"{-difference.mean:.4f} nats per token"
    if difference.low is None:
        return f"{best.label} is better than {other.label} by {by}; with a single seed that may be chance."
    interval = f"95 % interval {-(difference.high or 0):.4f} to {-difference.low:.4f}"
    seeds = f"{len(best.runs.keys() & other.runs.keys())} seeds"
    if _outcome(difference) == _BETTER:
        return f"{best.label} is better than {other.label} by {by} ({interval}, {seeds})."
    return f"{best.label} and {other.label} do not differ significantly: {by} ({interval}, {seeds})."


def _against_dense(comparison: Comparison, baseline: CellResult) -> Iterator[str]:
    others = [(c, comparison.differences.get(c.label)) for c in comparison.cells if c is not baseline]
    known = [(cell, d, d.mean - d.low) for cell, d in others if d is not None and d.low is not None]
    texts = [(_outcome(d), f"{c.label} {d}{_with_effort(c, baseline)}") for c, d, _ in known]
    what = "difference in nats per token, paired by seed, with 95 % interval"
    for outcome in (_BETTER, _WORSE, _UNCLEAR):
        if found := [text for its_outcome, text in texts if its_outcome == outcome]:
            time = _in_equal_time(baseline)
            yield f"{outcome.capitalize()} {baseline.label}{time} ({what}): {'; '.join(found)}."
    if single := [cell.label for cell, d in others if d is not None and d.low is None]:
        yield (
            f"Only one seed in common with {baseline.label}, so there is no interval and a difference may be "
            f"due to chance: {'; '.join(single)}."
        )
    if none := [cell.label for cell, difference in others if difference is None]:
        yield f"No seed in common with {baseline.label}, so not compared: {'; '.join(none)}."
    if halves := [half for cell, _, half in known if not cell.is_dense]:
        reach = " to ".join(dict.fromkeys(f"{half:.4f}" for half in (min(halves), max(halves))))
        yield (
            f"The 95 % intervals of sparse models extend {reach} nats to each side of the mean, so smaller "
            "differences cannot be resolved."
        )
    pairs = product(comparison.sparse, [cell for cell in comparison.dense if cell is not baseline])
    same_total = [(a, b) for a, b in pairs if abs(a.counts.total / b.counts.total - 1) <= TOLERANCE]
    if verdicts := _verdicts(same_total):
        yield f"At equal total parameters{_in_equal_time(baseline)}: {verdicts}."


def _along(curve: Curve, baseline: CellResult | None) -> Iterator[str]:
    """Each cell against the previous one and against the first one, and the power law."""
    first, *others = curve.cells
    along = (f" along {curve.key}" if curve.key else "") + _in_equal_time(first)
    if verdicts := _verdicts(zip(others, curve.cells[:-1], strict=True)):
        yield f"Consecutive cells{along}: {verdicts}."
    if verdicts := _verdicts((cell, first) for cell in others[1:]):
        yield f"Compared with the first cell{along}: {verdicts}."
    if (law := curve.law) is not None:
        last, supports = curve.cells[-1], ""
        change = (last.counts.total / first.counts.total) ** law.exponent.mean - 1
        if law.exponent.low is None:
            supports = "; a single seed gives no interval"
        elif _outcome(law.exponent) == _UNCLEAR:
            supports = "; the exponent is not significantly different from 0, so no power law is supported"
        yield (
            f"Loss as a power of total parameters, from {(baseline or first).label} to {last.label}: "
            f"exponent {law.exponent}, loss {change:+.1%} from {first.label} to {last.label}, "
            f"residuals up to {max(map(abs, law.residuals)):.1%}{supports}."
        )


def _verdicts(pairs: Iterable[tuple[CellResult, CellResult]]) -> str:
    """Compare the first cell of each pair with the second, for pairs with two or more seeds in common."""
    found = [(cell, other, cell.difference_to(other)) for cell, other in pairs]
    return "; ".join(
        f"{cell.label} {_outcome(d)} {other.label}: {d}{_with_effort(cell, other)}"
        for cell, other, d in found
        if d is not None and d.low is not None
    )


def _outcome(difference: Interval) -> str:
    if difference.high is not None and difference.high < 0:
        return _BETTER
    if difference.low is not None and difference.low > 0:
        return _WORSE
    return _UNCLEAR


def _in_equal_time(cell: CellResult) -> str:
    return "" if cell.planned_seconds is None else " in equal time"


def _with_effort(cell: CellResult, other: CellResult) -> str:
    """How much more or less went in than into the other cell, as far as that was not held equal."""
    efforts = [("FLOPs", cell.flops / other.flops, 2 * TOLERANCE)]
    if cell.planned_seconds is not None and other.planned_seconds is not None:
        tokens = cell.config.train.steps / other.config.train.steps
        time = cell.time_relative_to(other)
        efforts = [("tokens", tokens, 2 * TOLERANCE), ("training time", time, _UNFAIR)]
    shown = [f"{times:.3g} times its {what}" for what, times, limit in efforts if abs(times - 1) > limit]
    return f" (with {' and '.join(shown)})" if shown else ""


def _fairness(comparison: Comparison, baseline: CellResult) -> Iterator[str]:
    """Whether a race by the clock was one: how long the runs really took."""
    others = [cell for cell in comparison.cells if cell is not baseline]
    times = {cell.label: cell.time_relative_to(baseline) for cell in others}
    took, planned = plain(statistics.mean(baseline.seconds)), plain(baseline.planned_seconds or 0)
    yield (
        f"Equal time: each cell was planned for {planned} seconds of training steps. {baseline.label} took "
        f"{took}, the other cells {min(times.values()):.3f} to {max(times.values()):.3f} times that (means "
        "over seeds)."
    )
    for sign, word, consequence in ((1, "longer", "favors"), (-1, "shorter", "disfavors")):
        found = [f"{name} by {abs(t - 1):.1%}" for name, t in times.items() if sign * (t - 1) > _UNFAIR]
        if found:
            yield (
                f"Not equal time: runs that took more than {100 * _UNFAIR:.0f} % {word} than those of "
                f"{baseline.label}, which {consequence} them: {'; '.join(found)}."
            )


def _equivalents(comparison: Comparison) -> Iterator[str]:
    law, dense = comparison.dense_law, [cell.counts.active_no_input_emb for cell in comparison.dense]
    if law is None or not comparison.sparse:
        return
    fit = f"the power law through the dense runs has exponent {law.exponent}"
    if comparison.vague:
        labels = ", ".join(comparison.vague)
        yield f"No equivalent dense size of {labels}: its interval spans more than a factor of {VAGUE}."
    if not comparison.worth and not comparison.vague:
        why = ", which is not significantly below 0, or not below 0 for every seed"
        if law.exponent.low is None:
            why = "; a single seed gives no interval"
        yield f"The equivalent dense size of the sparse models cannot be estimated: {fit}{why}."
        return
    found = []
    for label, size in comparison.worth.items():
        known = [bound for bound in size if bound is not None]
        bounds = f" [{short(known[1])}, {short(known[2])}]" if len(known) > 1 else ""
        beyond = ", extrapolated" if min(known) < min(dense) or max(known) > max(dense) else ""
        found.append(f"{label} {short(size.mean)}{bounds}{beyond}")
    if not found:
        return
    residuals = "two sizes, so the fit has no residuals"
    if len(dense) > 2:
        residuals = f"{len(dense)} sizes, residuals up to {max(map(abs, law.residuals)):.2%} of the loss"
    what = "Equivalent dense size in active parameters without the input embedding"
    yield f"{what} ({fit}; {residuals}): {'; '.join(found)}."
