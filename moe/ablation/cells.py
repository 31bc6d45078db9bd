"""The cells of an ablation: configurations that differ in named settings while a held quantity stays equal.

The quantity is held by the width of the experts. Runs of one seed share the order of their samples, the
evaluation batches, and all initial weights outside experts and routers, because those depend on the seed and
on names only.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from moe.accounting.counts import ModelCounts, count_parameters
from moe.accounting.memory import estimate_memory
from moe.config import Config, ConfigError, changed

Hold = Literal["active_flops", "total_params", "memory", "none"]
# g: E, k and shared experts times g, width over g (Dai et al. 2024, DeepSeekMoE, section 3.1)
GRANULARITY = "granularity"
TOLERANCE = 0.01
WIDTH_STEP, WIDEST = 8, 2**14  # WIDEST in steps
AFFORDABLE = 4  # times the reference's FLOPs, for the dense baseline of equal total parameters
# What a model without a router has of the section moe.
DENSE_KEYS = (
    "moe.num_experts",
    "moe.num_shared_experts",
    "moe.d_ff_expert",
    "moe.every_n_layers",
    "moe.first_dense_layers",
)
_DENSE: dict[str, Any] = {
    "moe.num_experts": 1,
    "moe.top_k": 1,
    "moe.num_shared_experts": 0,
    "parallel.ep_size": 1,
}
_BASELINES: Sequence[tuple[str, Hold, float]] = (
    ("dense,equal_active", "active_flops", 1.0),
    ("dense,double_active", "active_flops", 2.0),
    ("dense,equal_total", "total_params", 1.0),
)


@dataclass(frozen=True)
class Cell:
    """One configuration of an ablation, to be trained once per seed.

    Attributes:
        name: of its folders, such as `num_experts=8`.
        settings: what was varied, and to what; for a dense baseline what it is.
        config: complete.
        counts: parameters and FLOPs of the config.
        mismatch: relative deviation of the held quantity from the reference; 0 where nothing is held.
        is_dense: a baseline without a router.
    """

    name: str
    settings: Mapping[str, Any]
    config: Config
    counts: ModelCounts
    mismatch: float
    is_dense: bool


def plan_cells(
    config: Config, vary: Mapping[str, Sequence[Any]], hold: Hold, device: str = "cpu"
) -> list[Cell]:
    """Every combination of the varied settings, and the dense baselines, solved for what they should equal.

    The baselines have the reference's active FLOPs, twice those, and its total parameters (where affordable).

    Args:
        config: the reference, sparse, with `model.vocab_size` resolved; the held quantity is its own.
        vary: keys of the section `moe`, or `granularity`, and their values.
        hold: what stays equal.
        device: `cpu` or `cuda`, whose memory is held.

    Raises:
        ConfigError: a setting is impossible, or no width holds the quantity within `TOLERANCE`.
    """
    for key in vary:
        section, _, name = key.partition(".")
        if key != GRANULARITY and (section != "moe" or name not in type(config.moe).model_fields):
            raise ConfigError(
                "--vary", f"{key!r} is not granularity or a key of moe; run the others one by one"
            )
    if hold != "none" and "moe.d_ff_expert" in vary:
        raise ConfigError("--hold", f"{hold} is held by the width of the experts; use --hold none to vary it")

    def flops_of(some: Config) -> int:
        return count_parameters(some).flops_per_token_forward

    measures: Mapping[Hold, Callable[[Config], float]] = {
        "active_flops": flops_of,
        "total_params": lambda some: count_parameters(some).total,
        "memory": lambda some: estimate_memory(some, config.parallel.ep_size, device).peak,
    }
    cells: dict[str, Cell] = {}

    def add(name: str, settings: Mapping[str, Any], variant: Config, held: Hold, times: float) -> None:
        solved, mismatch = variant, 0.0
        if held != "none":
            solved, mismatch = _solve(variant, measures[held], times * measures[held](config))
        cell = Cell(name, settings, solved, count_parameters(solved), mismatch, solved.moe.is_dense)
        flops = cell.counts.flops_per_token_forward
        if (
            name == "dense,equal_total"
            and flops > AFFORDABLE * count_parameters(config).flops_per_token_forward
        ):
            return
        if abs(mismatch) > TOLERANCE:
            raise ConfigError(
                "--hold",
                f"{name} misses {held} by {mismatch:+.1%} with experts {solved.moe.d_ff_expert} wide "
                f"(multiples of {WIDTH_STEP}); use wider experts in the reference or fewer of them per token",
            )
        cells.setdefault(solved.model_dump_json(), cell)  # one expert may be a dense baseline already

    for values in product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={spelled(value)}" for key, value in settings.items())
        add(name, settings, _apply(config, settings), hold, 1.0)
    for name, held, times in _BASELINES:
        add(name, _DENSE, changed(config, _DENSE), held, times)
    return list(cells.values())


def spelled(value: Any) -> str:
    """A value as in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _solve(variant: Config, measure: Callable[[Config], float], target: float) -> tuple[Config, float]:
    """The variant with the expert width that brings a measure nearest to a target, and how far it is off."""

    def at(steps: int) -> Config:
        return changed(variant, {"moe.d_ff_expert": steps * WIDTH_STEP})

    below = bisect_right(range(1, WIDEST), target, key=lambda steps: measure(at(steps)))
    candidates = (at(below + 1), at(max(below, 1)))  # the wider one where both miss by as much
    nearest = min(candidates, key=lambda config: abs(measure(config) - target))
    return nearest, measure(nearest) / target - 1


def _apply(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with its settings; one expert means the dense model, which has no routing to vary."""
    changes = {key: value for key, value in settings.items() if key != GRANULARITY}
    experts = changes.get("moe.num_experts")
    if type(experts) is int and experts == 1:
        return changed(config, {k: v for k, v in changes.items() if k in DENSE_KEYS} | _DENSE)
    varied = changed(config, changes)
    factor, moe = settings.get(GRANULARITY, 1), varied.moe
    if type(factor) is not int or factor < 1:
        raise ConfigError(GRANULARITY, f"should be a whole number above 0, got {spelled(factor)}")
    if moe.d_ff_expert % (factor * WIDTH_STEP):
        raise ConfigError(
            GRANULARITY, f"{factor} does not divide moe.d_ff_expert ({moe.d_ff_expert}) into multiples of 8"
        )
    finer = {
        "moe.num_experts": moe.num_experts * factor,
        "moe.top_k": moe.top_k * factor,
        "moe.num_shared_experts": moe.num_shared_experts * factor,
        "moe.d_ff_expert": moe.d_ff_expert // factor,
    }
    return changed(varied, finer) if factor > 1 else varied


def shortened(config: Config, times: int) -> Config:
    """The configuration with so many times fewer steps, evaluated twice."""
    steps = max(config.train.steps // times, 1)
    half = math.ceil(steps / 2)
    return changed(
        config,
        {
            "train.steps": steps,
            "train.eval_interval": half,
            "train.checkpoint_interval": half,
            "optim.warmup_steps": config.optim.warmup_steps // times,
        },
    )
