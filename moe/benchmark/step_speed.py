"""Where the time of a training step goes, through train.py itself, beside what plain PyTorch needs for it."""

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.benchmark.measuring import in_turns, now, spread_ms
from moe.config import Config, ConfigError, changed
from moe.data.batches import read_batches
from moe.data.samples import samples_of_step
from moe.distributed.launch import world_size
from moe.model.transformer import Transformer
from moe.training.loss import training_loss
from moe.training.optimizer import learning_rate

WARM_UP = 2  # steps that are not timed: the first makes the optimizer's state


class TrainingLoop(NamedTuple):
    """The functions of train.py, which the library does not import."""

    prepare: Callable[[Config], Any]
    build: Callable[[Any], Any]
    train_step: Callable[[Any, Any, int], Any]


class StepTimes(NamedTuple):
    """Seconds of one optimizer step."""

    forward: float
    backward: float
    update: float
    total: float

    @property
    def rest(self) -> float:
        """Reading samples, the loss, metrics."""
        return self.total - self.forward - self.backward - self.update


class _TimedEngine:
    """Stands in for an engine, and adds up the seconds of its three calls."""

    def __init__(self, engine: Any, device: torch.device):
        self._engine, self._device = engine, device
        self.seconds: dict[str, float] = {"forward": 0.0, "backward": 0.0, "update": 0.0}

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._timed("forward", self._engine, *inputs)

    def backward(self, loss: Tensor) -> None:
        self._timed("backward", self._engine.backward, loss)

    def step(self, learning_rate: float) -> Any:
        return self._timed("update", self._engine.step, learning_rate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        started = now(self._device)
        result = call(*arguments)
        self.seconds[part] += now(self._device) - started
        return result


class _Training:
    """One configuration under train.py, a step at a time."""

    def __init__(self, loop: TrainingLoop, config: Config):
        self._loop, self._steps = loop, itertools.count()
        with redirect_stdout(io.StringIO()):
            self.run = loop.prepare(config)
            self._engine = loop.build(self.run)

    def step(self) -> StepTimes:
        """The next step."""
        device = self.run.world.device
        timed = _TimedEngine(self._engine, device)
        started = now(device)
        self._loop.train_step(self.run, timed, next(self._steps))
        return StepTimes(**timed.seconds, total=now(device) - started)


class _Floor:
    """The same model, samples and AdamW in plain PyTorch, without an engine.

    AdamW updates fp32 weights and gets gradients that are new in every step, as in training: they are there
    before the clock starts and gone after it stops.
    """

    def __init__(self, run: Any):
        config: Config = run.config
        self.config, self.corpus, self.device = config, run.corpus, run.world.device
        dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
        self.model = Transformer(config).to(self.device, dtype)
        self.parameters = list(self.model.parameters())
        self.updated = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self.parameters
        ]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.updated, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        self._steps = itertools.count()

    def step(self) -> StepTimes:
        """Forward and backward over the micro batches of the next step, then clip and update."""
        forward = backward = 0.0
        step = next(self._steps)
        starts = samples_of_step(self.config, self.corpus.train, step)
        for batch in read_batches(self.config, self.corpus.train, starts, self.device, step):
            started = now(self.device)
            output = self.model(batch.tokens, batch.documents, dropout_keys=batch.dropout_keys)
            forward += now(self.device) - started
            loss = training_loss(output, batch.targets, self.config.moe).total
            del output
            started = now(self.device)
            loss.backward()
            backward += now(self.device) - started
        for weight, updated in zip(self.parameters, self.updated, strict=True):
            if weight is not updated and weight.grad is not None:
                updated.grad, weight.grad = weight.grad.float(), None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        started = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.updated, self.config.optim.grad_clip or float("inf"))
        self.optimizer.step()
        update = now(self.device) - started
        self.optimizer.zero_grad(set_to_none=True)
        return StepTimes(forward, backward, update, forward + backward + update)


def measure_steps(
    loop: TrainingLoop, configs: Sequence[tuple[str, Config]], steps: int
) -> list[dict[str, Any]]:
    """Train several configurations in turns, one step of each at a time, and their floors in between.

    Args:
        loop: the functions of train.py.
        configs: each with its name.
        steps: that are timed.

    Returns:
        A record per configuration.

    Raises:
        ConfigError: the configurations cannot run side by side in one process.
    """
    if world_size() > 1:
        raise ConfigError("WORLD_SIZE", "steps are measured in one process; start without a launcher")
    for key in ("device", "keep_freed_memory"):
        if len({getattr(config.parallel, key) for _, config in configs}) > 1:
            raise ConfigError(f"parallel.{key}", "differs, but is one for a process; measure one at a time")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        trainings = [
            _Training(loop, changed(config, {"run.dir": str(Path(scratch) / str(i))}))
            for i, (_, config) in enumerate(configs)
        ]
        floors = [_Floor(training.run) for training in trainings]
        runs = {f"{i} training": training.step for i, training in enumerate(trainings)}
        runs |= {f"{i} floor": floor.step for i, floor in enumerate(floors)}
        in_turns(runs, WARM_UP)
        times = in_turns(runs, steps)
    records: list[dict[str, Any]] = []
    for i, ((name, _), training) in enumerate(zip(configs, trainings, strict=True)):
        record = _record(name, training.run, times[f"{i} training"], times[f"{i} floor"])
        first = records[0] if records else record
        records.append(record | {"relative_to_first": record["tokens_per_s"] / first["tokens_per_s"]})
    return records


def _record(name: str, run: Any, times: Sequence[StepTimes], floors: Sequence[StepTimes]) -> dict[str, Any]:
    def median(values: Iterator[float]) -> float:
        return spread_ms(list(values)).median

    step_ms = median(time.total for time in times)
    tokens = run.config.train.global_batch_size * run.config.data.seq_len
    return {
        "config": name,
        "params": run.counts.total,
        "active_params": run.counts.active_all,
        "tokens_per_step": tokens,
        "forward_ms": median(time.forward for time in times),
        "backward_ms": median(time.backward for time in times),
        "update_ms": median(time.update for time in times),
        "update_floor_ms": median(floor.update for floor in floors),
        "rest_ms": median(time.rest for time in times),
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * tokens / step_ms,
        "forward_floor_ms": median(floor.forward for floor in floors),
        "backward_floor_ms": median(floor.backward for floor in floors),
    }
