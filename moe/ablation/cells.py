"""The cells of an ablation: configurations that differ in the varied settings while one quantity stays equal.

The width of the experts is adjusted to keep that quantity equal. Runs of one seed share the order of samples,
the evaluation batches and all initial weights outside experts and routers, because these depend only on the
seed and on parameter names.
"""

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from moe.accounting.counts import ModelCounts, count_parameters
from moe.accounting.memory import estimate_memory
from moe.config import DENSE_KEYS, Config, ConfigError, changed

Hold = Literal["active_flops", "total_params", "memory", "none"]
Vary = Mapping[str, Sequence[Any]]
Settings = Mapping[str, Any]
# g: E, k and shared experts times g, width divided by g (Dai et al. 2024, DeepSeekMoE, section 3.1)
GRANULARITY = "granularity"
TOLERANCE = 0.01
WIDTH_STEP, WIDEST = 8, 2**14  # WIDEST in steps
AFFORDABLE = 4  # largest FLOPs of the dense baseline of equal total parameters, relative to the reference
_DENSE = {"moe.num_experts": 1, "moe.top_k": 1, "moe.num_shared_experts": 0, "parallel.ep_size": 1}
_BASELINES: Sequence[tuple[str, Hold, float]] = (
    ("dense,equal_active", "active_flops", 1.0),
    ("dense,double_active", "active_flops", 2.0),
    ("dense,equal_total", "total_params", 1.0),
)


class StepTime(NamedTuple):
    """Seconds of a training step of one cell, measured before its runs."""

    seconds: float  # the median
    low: float  # quartiles
    high: float
    steps: int  # how many were measured

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "StepTime":
        """The step time from the seconds of two or more steps."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, relative to it; as in a normal distribution with these quartiles."""
        return 0.929 * (self.high - self.low) / math.sqrt(self.steps) / self.seconds


@dataclass(frozen=True)
class Cell:
    """One configuration of an ablation, to be trained once per seed."""

    name: str  # of its folders, such as `num_experts=8`
    settings: Settings  # the varied settings; for a dense baseline those that make it dense
    config: Config
    counts: ModelCounts
    mismatch: float  # relative deviation of the held quantity from its target; 0 if nothing is held
    is_dense: bool  # whether the model has no router
    step_time: StepTime | None = None  # in a race by the clock; `train.steps` follows from it

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        return self.config.train.steps * self.config.train.global_batch_size * self.config.data.seq_len

    @property
    def planned_seconds(self) -> float | None:
        """Training time of a run in a race by the clock."""
        return None if self.step_time is None else self.step_time.seconds * self.config.train.steps


def plan_cells(
    config: Config, vary: Vary, hold: Hold, device: str = "cpu", baselines: bool = True
) -> list[Cell]:
    """All combinations of the varied settings, and the dense baselines.

    The baselines have the active FLOPs of the reference, twice those, and its total parameters. The last is
    left out if it has more than `AFFORDABLE` times the FLOPs of the reference.

    Args:
        config: the sparse reference, with `model.vocab_size` set. Its held quantity is the target.
        vary: keys of the section `moe`, or `granularity`, with their values.
        hold: the quantity that stays equal.
        device: `cpu` or `cuda`, used for `hold="memory"`.
        baselines: whether to add the dense baselines.

    Raises:
        ConfigError: a setting is invalid, or no width keeps the quantity within `TOLERANCE` of the target.
    """
    known = [GRANULARITY, *(f"moe.{name}" for name in type(config.moe).model_fields)]
    if unknown := [key for key in vary if key not in known]:
        problem = f"{unknown[0]!r} is not granularity or a key of moe"
        raise ConfigError("--vary", f"{problem}; set other keys with key=value, one value per ablation")
    if hold != "none" and "moe.d_ff_expert" in vary:
        raise ConfigError("--hold", f"{hold} is held by the width of the experts; use --hold none to vary it")
    measures: Mapping[Hold, Callable[[Config], float]] = {
        "active_flops": lambda some: count_parameters(some).flops_per_token_forward,
        "total_params": lambda some: count_parameters(some).total,
        "memory": lambda some: estimate_memory(some, config.parallel.ep_size, device).peak,
    }
    largest = AFFORDABLE * measures["active_flops"](config)
    cells: dict[str, Cell] = {}
    dense = _BASELINES if baselines else ()
    for name, settings, variant, held, times in _variants(config, vary, hold, dense):
        solved, mismatch = variant, 0.0
        if held != "none":
            solved, mismatch = _solve(variant, measures[held], times * measures[held](config))
        cell = Cell(name, settings, solved, count_parameters(solved), mismatch, solved.moe.is_dense)
        if name == "dense,equal_total" and cell.counts.flops_per_token_forward > largest:
            continue
        if abs(mismatch) > TOLERANCE:
            problem = f"{name} misses {held} by {mismatch:+.1%} with experts {solved.moe.d_ff_expert} wide"
            fix = "use wider experts in the reference or fewer of them per token"
            raise ConfigError("--hold", f"{problem} (multiples of {WIDTH_STEP}); {fix}")
        cells.setdefault(solved.model_dump_json(), cell)  # a cell with one expert may equal a dense baseline
    return list(cells.values())


def _variants(
    config: Config, vary: Vary, hold: Hold, baselines: Sequence[tuple[str, Hold, float]]
) -> Iterator[tuple[str, Settings, Config, Hold, float]]:
    """Name, settings, configuration, held quantity, and target as a multiple of the reference's quantity."""
    for values in product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={spelled(value)}" for key, value in settings.items())
        yield name, settings, _apply(config, settings), hold, 1.0
    for name, held, times in baselines:
        yield name, _DENSE, changed(config, _DENSE), held, times


def spelled(value: Any) -> str:
    """The value as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _solve(variant: Config, measure: Callable[[Config], float], target: float) -> tuple[Config, float]:
    """The variant whose expert width brings the measure nearest to the target, and its relative deviation."""

    def at(steps: int) -> Config:
        return changed(variant, {"moe.d_ff_expert": steps * WIDTH_STEP})

    below = bisect_right(range(1, WIDEST), target, key=lambda steps: measure(at(steps)))
    candidates = (at(below + 1), at(max(below, 1)))  # the wider one first, so that it wins a tie
    nearest = min(candidates, key=lambda config: abs(measure(config) - target))
    return nearest, measure(nearest) / target - 1


def _apply(config: Config, settings: Settings) -> Config:
    """Apply the settings. With one expert the result is the dense model, which has no routing settings."""
    changes = {key: value for key, value in settings.items() if key != GRANULARITY}
    experts = changes.get("moe.num_experts")
    if type(experts) is int and experts == 1:
        return changed(config, {k: v for k, v in changes.items() if k in DENSE_KEYS} | _DENSE)
    varied = changed(config, changes)
    factor, moe = settings.get(GRANULARITY, 1), varied.moe
    if type(factor) is not int or factor < 1:
        raise ConfigError(GRANULARITY, f"should be a whole number above 0, got {spelled(factor)}")
    if moe.d_ff_expert % (factor * WIDTH_STEP):
        width = f"moe.d_ff_expert ({moe.d_ff_expert})"
        raise ConfigError(GRANULARITY, f"{factor} does not divide {width} into multiples of {WIDTH_STEP}")
    more = ("num_experts", "top_k", "num_shared_experts")
    finer = {f"moe.{key}": getattr(moe, key) * factor for key in more}
    return changed(varied, finer | {"moe.d_ff_expert": moe.d_ff_expert // factor})


def shortened(config: Config, times: int) -> Config:
    """The configuration with its steps divided by `times`, evaluated and saved twice."""
    steps = max(config.train.steps // times, 1)
    half = math.ceil(steps / 2)
    changes = {"train.steps": steps, "train.eval_interval": half, "train.checkpoint_interval": half}
    return changed(config, changes | {"optim.warmup_steps": config.warmup_steps // times})
