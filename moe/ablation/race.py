"""A race by the clock: every cell trains for the time that the dense model of equal active FLOPs takes.

Step times are measured before any run starts, and each cell gets as many steps as fit into that time. Its
schedule is that of the reference, stretched to its steps: at any moment of the race all cells are at the same
point of their warm-up or cosine, and have the same learning rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import Cell, StepTime
from moe.accounting.counts import count_parameters
from moe.config import Config, changed
from moe.tables import plain, short

Measure = Callable[[Mapping[str, Config]], dict[str, StepTime]]  # configurations by name to their step times
UNCERTAIN = 0.01  # relative standard error of a step time that is worth a warning


def plan_race(cells: Sequence[Cell], config: Config, folder: AblationFolder, measure: Measure) -> list[Cell]:
    """Give every cell its steps, from the step times that the folder has recorded, or else from new ones.

    Cells that join later are measured together with the dense one. Only the ratio to it decides about their
    steps, so that a machine which is slower that day changes nothing.

    Args:
        cells: of equal active FLOPs, with their dense baselines.
        config: the reference, whose `train.steps` the dense cell of equal active FLOPs takes.
        folder: of the ablation; nothing is written.
        measure: called for cells without a recorded step time; not called if there are none.

    Raises:
        ConfigError: a cell was planned in this folder with other settings.
    """
    dense, recorded = dense_counterpart(cells, config), folder.step_times()
    names = {cell.name: folder.planned_as(cell) for cell in cells}
    known = {name: recorded[there] for name, there in names.items() if there in recorded}
    old = [cell for cell in cells if cell.name in known] if dense.name in known else []
    folder.check([raced(cell, known[cell.name], known[dense.name]) for cell in old])
    if missing := [cell for cell in cells if cell not in old]:
        found = measure({cell.name: cell.config for cell in cells if cell == dense or cell in missing})
        then, now = known.get(dense.name, found[dense.name]), found[dense.name]
        scaled = {name: _scaled(time, then.seconds / now.seconds) for name, time in found.items()}
        known = scaled | {cell.name: known[cell.name] for cell in old}
    return [raced(cell, known[cell.name], known[dense.name]) for cell in cells]


def _scaled(time: StepTime, factor: float) -> StepTime:
    return StepTime(time.seconds * factor, time.low * factor, time.high * factor, time.steps)


def dense_counterpart(cells: Sequence[Cell], config: Config) -> Cell:
    """The dense cell whose FLOPs are nearest to those of the reference."""
    flops = count_parameters(config).flops_per_token_forward
    dense = [cell for cell in cells if cell.is_dense]
    return min(dense, key=lambda cell: abs(cell.counts.flops_per_token_forward - flops))


def raced(cell: Cell, time: StepTime, dense: StepTime) -> Cell:
    """The cell with as many steps as fit into the time of the dense cell's `train.steps`."""
    steps = steps_in_time(cell.config.train.steps, dense.seconds, time.seconds)
    return replace(cell, config=stretched(cell.config, steps), step_time=time)


def steps_in_time(dense_steps: int, dense_step_s: float, step_s: float) -> int:
    """The number of steps whose time is nearest to that of the dense steps; at least one."""
    return max(1, round(dense_steps * dense_step_s / step_s))


def stretched(config: Config, steps: int) -> Config:
    """The configuration with another number of steps; warm-up, evaluations and checkpoints keep their shares.

    The warm-up keeps its share, not its number of steps: with a fixed number, a slow cell would spend more of
    its time at low learning rates. Intervals are rounded up, so that no cell is evaluated more often.
    """
    train, warm_up = config.train, config.warmup_steps
    changes = {
        "train.steps": steps,
        "train.eval_interval": -(-train.eval_interval * steps // train.steps),
        "train.checkpoint_interval": -(-train.checkpoint_interval * steps // train.steps),
        "optim.warmup_steps": min(steps, max(1, round(warm_up * steps / train.steps))) if warm_up else 0,
    }
    return changed(config, changes)


def race_table(cells: Sequence[Cell], config: Config) -> Iterator[list[str]]:
    """A row of headings, then one row per cell: its step time and what follows from it."""
    yield ["step times", "ms a step", "quartiles", "of", "to dense", "warm-up", "steps", "tokens", "seconds"]
    times = {cell.name: cell.step_time for cell in cells if cell.step_time is not None}
    dense = times[dense_counterpart(cells, config).name]
    for cell in cells:
        time = times[cell.name]
        yield [
            cell.name,
            plain(1000 * time.seconds),
            f"{plain(1000 * time.low)} to {plain(1000 * time.high)}",
            str(time.steps),
            f"{time.seconds / dense.seconds:.3f}",
            f"{cell.config.warmup_steps:,}",
            f"{cell.config.train.steps:,}",
            short(cell.tokens),
            plain(cell.config.train.steps * time.seconds),
        ]


def uncertain(cells: Sequence[Cell]) -> str:
    """A warning that names the cells whose step time is not known well; empty if there are none."""
    errors = {cell.name: cell.step_time.uncertainty for cell in cells if cell.step_time is not None}
    shown = [f"{name} {error:.1%}" for name, error in errors.items() if error > UNCERTAIN]
    if not shown:
        return ""
    return (
        f"the machine was not quiet: step times with a standard error above {UNCERTAIN:.0%}: "
        f"{'; '.join(shown)}. To measure again, stop, remove plan.json, and start when nothing else runs"
    )
