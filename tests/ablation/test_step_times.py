"""Step times: all cells in turn, by workers side by side, through the functions of train.py."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

from moe.ablation.cells import StepTime
from moe.ablation.runner import Conditions
from moe.ablation.step_times import STEPS, WARM_UP, measure_step_times
from moe.config import Config, ConfigError, RunError, changed, load_config
from tests.support.paths import TINY as TINY_FILE

TINY = load_config(TINY_FILE, ["model.vocab_size=1024"])
CELLS = {"slow": changed(TINY, {"moe.num_experts": 16}), "fast": TINY}

# Its steps take as many thousandths of a second as their number, after 100 for the cell with 16 experts; each
# worker notes what it trains in a file beside the script.
SCRIPT = """
    import json, os, time
    from pathlib import Path
    from moe.config import ConfigError, RunError

    class Run:
        def __init__(self, config):
            assert not Path(config.run.dir).exists(), "the folder is the run's own"
            self.config, self.cell = config, "slow" if config.moe.num_experts == 16 else "fast"

    def note(what):
        with open(__file__ + f".{os.getpid()}", "a") as file:
            print(what, time.monotonic(), os.environ.get("OMP_NUM_THREADS"), file=file)

    def prepare(config):
        return Run(config)

    def build(run):
        return run.cell

    def train_step(run, engine, step):
        assert engine == run.cell
        FAULT
        note(f"{run.cell} {step}")
        time.sleep(0.001)
        return {"perf/step_s": (step + (100 if run.cell == "slow" else 0)) / 1000}
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write a train.py with an optional statement in its step; scratch folders lie beside it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def write(fault: str = "pass") -> Path:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(SCRIPT).replace("FAULT", fault))
        return path

    return write


def measure(train: Path, jobs: int, rounds: int, cells: dict[str, Config] = CELLS) -> dict[str, StepTime]:
    return measure_step_times(cells, train, Conditions([sys.executable], jobs, threads=1), rounds)


def notes(train: Path) -> list[list[list[str]]]:
    """Of each worker, its steps: cell, number, time, threads."""
    found = train.parent.glob("train.py.*")
    return [[line.split() for line in path.read_text().splitlines()] for path in sorted(found)]


@pytest.mark.slow
def test_cells_take_turns_and_the_first_step_of_each_turn_is_not_counted(script, tmp_path):
    train = script()
    found = measure(train, jobs=1, rounds=2)
    (steps,) = notes(train)
    turns = [cell for cell, *_ in steps]
    warm_up, turn = ["slow"] * WARM_UP + ["fast"] * WARM_UP, 1 + STEPS
    assert turns == warm_up + (["slow"] * turn + ["fast"] * turn) * 2
    assert {threads for *_, threads in steps} == {"1"}
    # By hand: after 3 steps, 4 to 7 count in the first turn (0 is the first), and 9 to 12 in the second.
    assert (WARM_UP, STEPS) == (3, 4)
    assert found["fast"] == StepTime.of([0.004, 0.005, 0.006, 0.007, 0.009, 0.010, 0.011, 0.012])
    assert found["slow"].seconds == pytest.approx(0.108)
    assert found["slow"].steps == 8
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_workers_measure_side_by_side_from_the_first_step_to_the_last(script):
    """One worker is much slower; the other one goes on until it is done, and begins with another cell."""
    train = script("if run.config.run.dir.split('/')[-2] == '0': time.sleep(0.05)")
    found = measure(train, jobs=2, rounds=2)
    assert found["fast"].steps == 2 * 2 * STEPS
    workers = notes(train)
    assert {steps[0][0] for steps in workers} == {"slow", "fast"}
    (short, long) = sorted(workers, key=len)
    counted = 2 * (WARM_UP + 2 * (1 + STEPS))
    assert len(long) > len(short) >= counted
    measured_from = float(short[2 * WARM_UP][2])
    assert float(long[2 * WARM_UP][2]) == pytest.approx(measured_from, abs=0.5)
    # Its last step can start just before the other's last one; a step of the other takes 50 ms.
    assert float(long[-1][2]) >= float(short[counted - 2][2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("raise ConfigError('data.source', 'there is none')", ConfigError, "data.source: there is none"),
        ("raise RunError('step 3: nan')", RunError, "measuring step times failed: step 3: nan"),
        ("raise OSError('no such device')", RunError, "OSError: no such device"),
    ],
)
def test_a_failing_worker_ends_the_measurement_and_is_quoted(script, tmp_path, fault, error, message):
    """The other worker would go on for minutes."""
    one = f"if run.config.run.dir.split('/')[-2] == '1': {fault}"
    train = script(f"{one}\n    time.sleep(0.1)")
    with pytest.raises(error) as caught:
        measure(train, jobs=2, rounds=1000)
    assert message in str(caught.value)
    assert list((tmp_path / "scratch").iterdir()) == []
    for path in train.parent.glob("train.py.*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.suffix[1:]), 0)


@pytest.mark.slow
def test_real_steps_are_measured_and_leave_no_file(small, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    few = load_config(TINY_FILE, [*small, "model.vocab_size=257"])
    cells = {"narrow": few, "wide": changed(few, {"moe.d_ff_expert": 2048})}
    found = measure(Path(TINY_FILE).parents[1] / "train.py", 2, 2, cells)
    assert found["wide"].seconds > found["narrow"].seconds > 0
    assert list(tmp_path.iterdir()) == []
