"""The copy of the metrics for TensorBoard."""

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.runs.metrics_log import read_metrics


def test_tensorboard_reads_every_metric_of_every_line_also_after_a_resume(run_main):
    """It gets the evaluation of step 4, the last one of the first part, as well."""
    assert run_main("train.steps=4", "log.tensorboard=true")[0] == 0
    code, run, _, _ = run_main("train.steps=6", "log.tensorboard=true")
    assert code == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    written: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        lists = {name: value for name, value in line.items() if isinstance(value, list)}
        assert "eval/loss" in line or len(lists) == 12
        of_layers = {f"{name}/{i}": each for name, value in lists.items() for i, each in enumerate(value)}
        for name, value in (line | of_layers).items():
            if name != "step" and value is not None and name not in lists:
                written.setdefault(name, []).append((line["step"], value))
    assert set(events.Tags()["scalars"]) == written.keys()
    assert {"loss/lm", "eval/loss", "tokens", "moe/layers/max_vio/1"} <= written.keys()
    for name, values in written.items():
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in read] == [step for step, _ in values], name
        assert [value for _, value in read] == pytest.approx([value for _, value in values], rel=1e-6), name


def test_a_missing_tensorboard_is_refused_in_one_line(run_main, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "moe.runs.environment.find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    code, run, out, error = run_main("log.tensorboard=true")
    assert (code, out, run.exists()) == (2, "", False)
    assert error == ("error: log.tensorboard: needs a package; pip install tensorboard, or set it to false\n")
