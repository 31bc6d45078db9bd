"""What a run shows and records while it trains: a progress bar or lines of text, and `metrics.jsonl`."""

import time
from typing import Any

from tqdm import tqdm

from moe.config import Config, first_line
from moe.distributed.groups import World
from moe.runs.metrics_log import MetricsLog, losses_by_text
from moe.runs.run_folder import RunFolder


class Progress:
    """The progress of a run. Every rank may call it; only rank 0 shows and writes anything.

    Args:
        config: of the run.
        folder: of the run; its `metrics.jsonl` is cut back to `first_step`.
        world: this process among all ranks.
        first_step: steps that were done before, by the run that is continued.
    """

    def __init__(self, config: Config, folder: RunFolder, world: World, first_step: int):
        self._steps, self._interval = config.train.steps, config.log.interval
        self._first_step, self._started = first_step, time.perf_counter()
        self._folder = folder
        self._log = MetricsLog(folder.metrics, first_step, config) if world.rank == 0 else None
        disable = None if world.rank == 0 else True  # None: shown on a terminal only
        self._bar = tqdm(total=self._steps, initial=first_step, unit="step", disable=disable, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()
            if isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
                self._folder.failure.write_text(f"{first_line(error)}\n", encoding="utf-8")

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a step, and record it where `log.interval` says so. One without an update has no figures."""
        if "loss/lm" not in metrics:
            self._bar.update()
            return
        step, loss, speed = metrics["step"], metrics["loss/lm"], metrics["perf/tokens_per_s"]
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._log is not None and (step % self._interval == 0 or step in (1, self._steps)):
            self._log.write(metrics)
            if self._bar.disable:
                figures = f"loss {loss:.4f}, {speed:,.0f} tokens/s, {self._time_left(step)} left"
                print(f"step {step}/{self._steps}: {figures}", flush=True)

    def _time_left(self, step: int) -> str:
        """By the mean time of the steps so far, with their evaluations and checkpoints."""
        seconds = (time.perf_counter() - self._started) / (step - self._first_step)
        return tqdm.format_interval(round(seconds * (self._steps - step)))

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Show and record an evaluation."""
        if self._log is not None:
            self._log.write(metrics)
            loss, bits = metrics["eval/loss"], metrics["eval/bits_per_byte"]
            figures = f"validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte"
            figures += "".join(f"; {name} {its:.4f}" for name, its in losses_by_text(metrics).items())
            self._bar.write(f"step {metrics['step']}/{self._steps}: {figures}")
