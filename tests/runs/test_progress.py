"""Which steps a run shows and records."""

from tests.support.runs import read_lines


def test_the_first_the_last_and_every_tenth_step_are_shown_and_recorded(run_main):
    code, run, out, _ = run_main("train.steps=23", "log.interval=10", "train.eval_interval=23")
    assert code == 0
    assert [line["step"] for line in read_lines(run) if "loss/lm" in line] == [1, 10, 20, 23]
    shown = [line.split(":")[0] for line in out.splitlines() if ": loss" in line]
    assert shown == [f"step {step}/23" for step in (1, 10, 20, 23)]
