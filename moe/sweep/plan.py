"""Plan a sweep: configurations that differ in named settings while a held quantity stays equal.

The quantity is held by the width of the experts. Runs of one seed share the order of their samples, the
evaluation batches, and all initial weights outside experts and routers, because those depend on the seed and
on names only.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from moe.accounting import Ledger, count
from moe.config import Config, ConfigError
from moe.config_io import parse_config
from moe.memory import estimate_memory

Hold = Literal["active_flops", "total_params", "memory", "none"]
GRANULARITY = "granularity"  # g: E and k times g, width over g (Dai et al. 2024, DeepSeekMoE, section 3.1)
TOLERANCE = 0.01
WIDTH_STEP, WIDEST = 8, 2**14  # WIDEST in steps
AFFORDABLE = 4  # times the reference's FLOPs, for the dense baseline of equal total parameters
_DENSE: Mapping[str, Any] = {"moe.num_experts": 1, "moe.top_k": 1, "moe.num_shared_experts": 0}
_BASELINES: Sequence[tuple[str, Hold, float]] = (
    ("equal_active", "active_flops", 1.0),
    ("double_active", "active_flops", 2.0),
    ("equal_total", "total_params", 1.0),
)
_MEASURES: Mapping[str, Callable[[Config], float]] = {
    "active_flops": lambda config: count(config).flops_per_token_forward,
    "total_params": lambda config: count(config).total,
    "memory": lambda config: estimate_memory(config, 1, "cpu").peak,
}


@dataclass(frozen=True)
class Cell:
    """One configuration of the sweep, to be trained once per seed.

    Attributes:
        name: of its folders, such as `num_experts=8`.
        settings: what was varied, and to what; for a dense baseline what it is.
        config: complete.
        ledger: counts of the config.
        mismatch: relative deviation of the held quantity from the reference; 0 where nothing is held.
        is_dense: a baseline without a router.
    """

    name: str
    settings: Mapping[str, Any]
    config: Config
    ledger: Ledger
    mismatch: float
    is_dense: bool


def plan(config: Config, vary: Mapping[str, Sequence[Any]], hold: Hold) -> list[Cell]:
    """Every combination of the varied settings, and the dense baselines, solved for what they should equal.

    The baselines have the reference's active FLOPs, twice those, and its total parameters (where affordable).

    Args:
        config: the reference, sparse, with `model.vocab_size` resolved; the held quantity is its own.
        vary: keys of the section `moe`, or `granularity`, and their values.
        hold: what stays equal.

    Raises:
        ConfigError: a setting is impossible, or no width holds the quantity within `TOLERANCE`.
    """
    for key in vary:
        section, _, name = key.partition(".")
        if key != GRANULARITY and (section != "moe" or name not in type(config.moe).model_fields):
            raise ConfigError(
                "--vary", f"{key} is not granularity or a key of moe.*; other settings need a sweep per value"
            )
    if hold != "none" and "moe.d_ff_expert" in vary:
        raise ConfigError("--hold", f"{hold} is held by the width of the experts; use --hold none to vary it")
    variants: list[tuple[str, Mapping[str, Any], Config, Hold, float]] = []
    for values in product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
        variants.append((name, settings, _apply(config, settings), hold, 1.0))
    dense = _with(config, _DENSE)
    variants.extend((f"dense,{name}", _DENSE, dense, held, times) for name, held, times in _BASELINES)
    limit = AFFORDABLE * count(config).flops_per_token_forward
    cells: dict[str, Cell] = {}
    for name, settings, variant, held, times in variants:
        solved, mismatch = _solve(name, variant, held, config, times)
        cell = Cell(name, settings, solved, count(solved), mismatch, solved.moe.is_dense)
        if name != "dense,equal_total" or cell.ledger.flops_per_token_forward <= limit:
            cells.setdefault(solved.model_dump_json(), cell)  # one expert may be a dense baseline already
    return list(cells.values())


def _solve(name: str, variant: Config, hold: Hold, reference: Config, times: float) -> tuple[Config, float]:
    """The variant with the expert width that brings what is held nearest to so many times the reference's."""
    if hold == "none":
        return variant, 0.0
    measure = _MEASURES[hold]
    target = times * measure(reference)

    def at(steps: int) -> Config:
        return _with(variant, {"moe.d_ff_expert": steps * WIDTH_STEP})

    below = bisect_right(range(1, WIDEST), target, key=lambda steps: measure(at(steps)))
    candidates = (at(below + 1), at(max(below, 1)))  # the wider one where both miss by as much
    nearest = min(candidates, key=lambda config: abs(measure(config) - target))
    mismatch = measure(nearest) / target - 1
    if abs(mismatch) > TOLERANCE:
        raise ConfigError(
            "--hold",
            f"{name} misses {hold} by {mismatch:+.1%} with experts {nearest.moe.d_ff_expert} wide (multiples "
            f"of {WIDTH_STEP}); use wider experts in the reference or fewer of them per token",
        )
    return nearest, mismatch


def _apply(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with its settings; one expert means one per token."""
    changes = {key: value for key, value in settings.items() if key != GRANULARITY}
    factor = settings.get(GRANULARITY, 1)
    if factor != 1:
        moe = config.moe
        if moe.d_ff_expert % (factor * WIDTH_STEP):
            raise ConfigError(
                GRANULARITY,
                f"{factor} does not divide moe.d_ff_expert ({moe.d_ff_expert}) into multiples of 8",
            )
        changes |= {
            "moe.num_experts": moe.num_experts * factor,
            "moe.top_k": moe.top_k * factor,
            "moe.d_ff_expert": moe.d_ff_expert // factor,
        }
    if changes.get("moe.num_experts") == 1:
        changes |= _DENSE
    return _with(config, changes)


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with some dotted keys changed, checked again as a whole."""
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return parse_config(values)
