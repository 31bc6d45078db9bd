"""The step times of cells, measured before their runs: python -m moe.ablation.step_times TRAIN JOB.json.

A worker process builds all cells and trains them in turn, a few steps each time, so that whatever else the
machine does slows all of them. As many workers as there will be runs side by side do this at once.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from moe.ablation.ablation_folder import write_whole
from moe.ablation.cells import StepTime
from moe.ablation.runner import Conditions
from moe.config import Config, ConfigError, RunError, changed, parse_config
from moe.config.command_line import DONE, WRONG_INPUT, command
from moe.distributed.launch import leave, rank

ROUNDS = 10  # turns of each cell
STEPS = 4  # measured in a turn, after one that finds the processor's caches full of another cell
WARM_UP = 3  # steps before the first turn, in which memory is allocated


def measure_step_times(
    configs: Mapping[str, Config], train: Path, conditions: Conditions, rounds: int = ROUNDS
) -> dict[str, StepTime]:
    """Train each configuration for some steps, all in turn, under the conditions of the runs.

    No file is left but the tokenized text in its cache.

    Args:
        configs: by name. Each worker holds all their weights and optimizer states at once.
        train: train.py.
        conditions: how many workers, with how many threads each.
        rounds: turns of each configuration.

    Raises:
        ConfigError: a configuration cannot be trained.
        RunError: a worker failed.
    """
    print(f"measuring the step times of {len(configs)} cells, {conditions.jobs} side by side ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="step-times-") as scratch:
        folder, workers = Path(scratch), []
        try:
            for number in range(conditions.jobs):
                first = number * len(configs) // conditions.jobs  # each worker begins with another cell
                names = [*configs][first:] + [*configs][:first]
                job = folder / f"job-{number}.json"
                dumped = {name: configs[name].model_dump(mode="json") for name in names}
                settings = {"number": number, "workers": conditions.jobs, "rounds": rounds}
                job.write_text(json.dumps(settings | {"configs": dumped}))
                call = [*conditions.start, "-m", __name__, str(train), str(job)]
                with job.with_suffix(".log").open("w") as log:
                    environment = conditions.environment()
                    workers.append(subprocess.Popen(call, stdout=log, stderr=log, env=environment))
            _wait(workers, folder)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
        found = [json.loads(path.read_text()) for path in folder.glob("times-*")]
    return {name: StepTime.of([second for times in found for second in times[name]]) for name in configs}


def _wait(workers: Sequence["subprocess.Popen[bytes]"], folder: Path) -> None:
    """Wait until all workers are done; raise as soon as one fails."""
    while True:
        codes = [worker.poll() for worker in workers]
        if failed := [number for number, code in enumerate(codes) if code]:
            text = (folder / f"job-{failed[0]}.log").read_text()
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            error = lines[-1].removeprefix("error: ") if lines else f"\n{text[-3000:]}"
            if lines and codes[failed[0]] == WRONG_INPUT:
                key, _, message = error.partition(": ")
                raise ConfigError(key, message)
            raise RunError(f"measuring step times failed: {error}")
        if None not in codes:
            return
        time.sleep(0.2)


class _Trainee:
    """One cell in training, by the functions of train.py."""

    def __init__(self, functions: Mapping[str, Any], config: Config):
        self._run = functions["prepare"](config)
        self._engine = functions["build"](self._run)
        self._train_step, self._done = functions["train_step"], 0

    def train(self, steps: int) -> list[float]:
        """Seconds of the next steps."""
        seconds = []
        for _ in range(steps):
            seconds.append(self._train_step(self._run, self._engine, self._done)["perf/step_s"])
            self._done += 1
        return seconds


@command
def work(arguments: list[str]) -> int:
    """One worker of `measure_step_times`, or one rank of it under a launcher."""
    train, path = map(Path, arguments)
    functions, job = runpy.run_path(str(train)), json.loads(path.read_text())
    number, workers, parent = job["number"], job["workers"], os.getppid()
    trainees = {}
    for name, values in job["configs"].items():
        config = changed(parse_config(values), {"run.dir": str(path.parent / "runs" / str(number) / name)})
        trainees[name] = _Trainee(functions, config)
        trainees[name].train(WARM_UP)

    def stop_if_alone() -> None:
        if os.getppid() != parent:
            sys.exit("the ablation is gone")

    def all_have(what: str) -> bool:
        stop_if_alone()
        return all((path.parent / f"{what}-{other}").exists() for other in range(workers))

    (path.parent / f"ready-{number}").touch()
    while workers > 1 and not all_have("ready"):
        time.sleep(0.01)
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(job["rounds"]):
        for name, trainee in trainees.items():
            stop_if_alone()
            times[name] += trainee.train(1 + STEPS)[1:]
    if rank() == 0:
        write_whole(path.parent / f"times-{number}", json.dumps(times))
    if workers > 1:
        for trainee in cycle(trainees.values()):  # until the others are done, so that none measures alone
            if all_have("times"):
                break
            trainee.train(1)
    leave()
    return DONE


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
