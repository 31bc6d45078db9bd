"""The parts of a training step, through train.py's own functions."""

import pytest

import train
from moe.benchmark import step_speed
from moe.benchmark.speed_tables import step_rows
from moe.benchmark.step_speed import StepTimes, TrainingLoop, measure_steps
from moe.config import ConfigError, load_config
from tests.support.paths import TINY

LOOP = TrainingLoop(train.prepare, train.build, train.train_step)
DENSE = ["moe.num_experts=1", "moe.top_k=1", "moe.normalize_gate_weights=false"]
KEYS = {
    "config", "params", "active_params", "tokens_per_step", "forward_ms", "backward_ms", "update_ms",
    "update_floor_ms", "rest_ms", "step_ms", "tokens_per_s", "forward_floor_ms", "backward_floor_ms",
    "relative_to_first",
}  # fmt: skip


def test_configurations_are_measured_side_by_side(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = [("sparse", load_config(TINY, small)), ("dense", load_config(TINY, [*small, *DENSE]))]
    sparse, dense = measure_steps(LOOP, configs, steps=2)
    assert set(sparse) == set(dense) == KEYS
    assert (sparse["config"], sparse["relative_to_first"]) == ("sparse", 1)
    assert dense["params"] == dense["active_params"] < sparse["active_params"] < sparse["params"]
    assert dense["relative_to_first"] == pytest.approx(dense["tokens_per_s"] / sparse["tokens_per_s"])
    for record in (sparse, dense):
        assert record["tokens_per_step"] == 4 * 32
        assert record["tokens_per_s"] == pytest.approx(4 * 32 / record["step_ms"] * 1e3)
        parts = [record[f"{part}_ms"] for part in ("forward", "backward", "update", "rest")]
        assert min(parts) > 0
        assert max(parts) < record["step_ms"]
        assert min(record[f"{part}_floor_ms"] for part in ("forward", "backward", "update")) > 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert len({len(row) for row in step_rows([sparse])}) == 2  # the floor's row is shorter


def test_each_step_is_the_next_of_the_training_and_its_floor_updates_the_same_weights(small, tmp_path):
    config = load_config(TINY, [*small, f"run.dir={tmp_path / 'run'}"])
    steps = []

    def step(run, engine, number):
        steps.append(number)
        return train.train_step(run, engine, number)

    training = step_speed._Training(TrainingLoop(train.prepare, train.build, step), config)
    floor = step_speed._Floor(training.run)
    for _ in range(3):
        training.step()
        times = floor.step()
        assert times.total == pytest.approx(times.forward + times.backward + times.update)
        assert all(weight.grad is None for weight in floor.updated)
    assert steps == [0, 1, 2]
    trained = dict(training._engine.module.named_parameters())
    for name, weight in floor.model.named_parameters():
        assert (weight - trained[name]).abs().max() < 1e-2, (
            name
        )  # it decays norms too, but is the same training


def test_in_bf16_the_floor_updates_fp32_weights(small, tmp_path):
    config = load_config(TINY, [*small, "parallel.precision=bf16", f"run.dir={tmp_path / 'run'}"])
    floor = step_speed._Floor(step_speed._Training(LOOP, config).run)
    before = [weight.clone() for weight in floor.updated]
    floor.step()
    assert {str(weight.dtype) for weight in floor.updated} == {"torch.float32"}
    rounded = [weight for name, weight in floor.model.named_parameters() if ".router." not in name]
    assert {str(weight.dtype) for weight in rounded} == {"torch.bfloat16"}
    assert all(not after.equal(weight) for after, weight in zip(floor.updated, before, strict=True))


def test_the_rest_is_what_no_part_takes():
    assert StepTimes(1.0, 2.0, 3.0, 10.0).rest == 4


def test_what_holds_for_a_whole_process_may_not_differ(small):
    configs = [("a", load_config(TINY, small))]
    configs += [("b", load_config(TINY, [*small, "parallel.keep_freed_memory=false"]))]
    with pytest.raises(ConfigError, match=r"parallel\.keep_freed_memory: differs"):
        measure_steps(LOOP, configs, steps=1)


def test_a_launcher_is_refused(small, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE: steps are measured in one process"):
        measure_steps(LOOP, [("a", load_config(TINY, small))], steps=1)
