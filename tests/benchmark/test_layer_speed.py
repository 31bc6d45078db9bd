"""Records of layers, from contenders in this process and in others."""

import multiprocessing
from contextlib import contextmanager

import pytest
import torch

from moe.benchmark.contenders import ModuleContender, Outcome, Pass
from moe.benchmark.contenders_by_name import CONTENDERS, reference_of
from moe.benchmark.layer_problem import LayerProblem, LayerShape
from moe.benchmark.layer_speed import measure_layers
from moe.benchmark.processes import running_contenders
from moe.benchmark.speed_plot import plot_speeds
from moe.benchmark.speed_tables import layer_rows
from moe.config import RunError

SHAPE = LayerShape(num_experts=4, tokens=16, top_k=2, d_model=16, d_ff_expert=32)
OUTCOME = Outcome(torch.zeros(1), torch.zeros(1), torch.zeros(()))


class Scripted:
    """A contender whose passes take what the test says."""

    def __init__(self, seconds, error=None):
        self.seconds, self.error, self.passes = seconds, error, 0

    def check(self, expected):
        if self.error is not None:
            raise self.error

    def peak_mib(self):
        return 1.5

    def timed_pass(self):
        self.passes += 1
        return Pass(self.seconds / 4, self.seconds)


def measure(contenders, repeats=3):
    @contextmanager
    def run(names, shape):
        yield {name: contenders[name] for name in names}, OUTCOME

    return list(measure_layers([SHAPE], list(contenders), run, repeats, 100.0))


def test_a_record_has_medians_and_the_speed_relative_to_dense():
    ((dense, moe),) = measure({"dense": Scripted(0.010), "moe": Scripted(0.040)})
    assert moe == {
        "contender": "moe",
        "num_experts": 4,
        "tokens": 16,
        "top_k": 2,
        "d_model": 16,
        "d_ff_expert": 32,
        "forward_ms": pytest.approx(10),
        "forward_backward_ms": pytest.approx(40),
        "backward_ms": pytest.approx(30),
        "peak_mib": 1.5,
        "relative_to_dense": pytest.approx(0.25),
        "forward_backward_quartiles_ms": pytest.approx([40, 40]),
        "repeats": 3,
    }
    assert dense["relative_to_dense"] == 1
    ((alone,),) = measure({"moe": Scripted(0.040)})
    assert alone["relative_to_dense"] is None


def test_nothing_is_timed_if_one_is_wrong():
    contenders = {"moe": Scripted(0.01), "deepspeed": Scripted(0.01, RunError("deepspeed: differs"))}
    with pytest.raises(RunError, match="deepspeed: differs"):
        measure(contenders)
    assert contenders["moe"].passes == 0


def test_all_contenders_at_every_shape_where_they_compute_the_same(tmp_path):
    shapes = [SHAPE, LayerShape(8, 16, 2, 16, 32), LayerShape(4, 16, 1, 16, 64)]
    records = list(measure_layers(shapes, CONTENDERS, running_contenders, 1, 1.0))
    assert [[record["contender"] for record in of_shape] for of_shape in records] == [
        list(CONTENDERS),
        list(CONTENDERS),
        [name for name in CONTENDERS if not name.startswith("hf_")],
    ]
    for record in (record for of_shape in records for record in of_shape):
        assert 0 < record["forward_ms"] < record["forward_backward_ms"]
        assert (record["peak_mib"] is None) == (record["contender"] == "gemm_floor")
    lines = list(layer_rows(records[0]))
    assert len(lines) == 1 + len(CONTENDERS)
    assert len({len(line) for line in lines}) == 1
    plot_speeds([record for of_shape in records for record in of_shape], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_contender_in_a_process_of_its_own_is_checked_and_timed():
    """All in one test, since each process imports torch."""
    names = ["dense", "moe", "hf_grouped_mm"]
    with running_contenders(names, SHAPE, own=["dense", "hf_grouped_mm"], keep_memory=["dense"]) as (
        contenders,
        expected,
    ):
        (records,) = measure_layers([SHAPE], names, reuse(contenders, expected), 2, 10.0)
        assert [record["repeats"] for record in records] == [2, 2, 2]
        assert isinstance(contenders["moe"], ModuleContender)
        assert all(record["forward_backward_ms"] > 0 for record in records)
        here = reference_of(LayerProblem(SHAPE, torch.device("cpu"))).outcome()
        torch.testing.assert_close(here, expected)
        wrong = expected._replace(output=expected.output + 1)
        with pytest.raises(RunError, match=r"^hf_grouped_mm: its output is not that of the reference"):
            contenders["hf_grouped_mm"].check(wrong)
        process = next(each for each in multiprocessing.active_children() if each.name == "dense")
        process.kill()
        process.join()
        with pytest.raises(RunError, match=r"^dense: its process died"):
            contenders["dense"].timed_pass()
    assert "hf_grouped_mm" not in {each.name for each in multiprocessing.active_children()}


def reuse(contenders, expected):
    """Runs contenders that exist."""

    @contextmanager
    def run(names, shape):
        yield contenders, expected

    return run
