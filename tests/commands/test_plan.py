"""scripts/plan.py: what a budget buys."""

import json

import pytest

from moe.accounting.scaling_laws import compute_optimal, effective_params
from scripts.plan import main
from tests.support.commands import exit_code

H100S = ["--gpu", "h100", "--gpus", "64"]


def run(capsys, *arguments):
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_budget_of_flops_is_spent_by_every_row_and_sizes_are_near_the_optimum(capsys):
    rows = json.loads(run(capsys, "--budget-flops", "1e21", *H100S, "--json")[1])
    assert [row["experts"] for row in rows] == [1, 8, 16, 32, 64, 128]
    dense = rows[0]
    assert dense["active_no_input_emb"] == pytest.approx(compute_optimal(1e21)[0], rel=0.1)
    for row in rows:
        assert row["cost"]["flops"] == pytest.approx(1e21)
        assert row["active_no_input_emb"] == pytest.approx(
            dense["active_no_input_emb"], rel=0.01
        )  # the router
        assert row["effective_params"] == effective_params(row["active_no_input_emb"], row["experts"])
    totals = [row["total"] for row in rows]
    assert totals == sorted(totals)


def test_a_budget_of_money_buys_slower_models_fewer_tokens(capsys):
    arguments = ["--budget-usd", "20000", *H100S, "--experts", "8", "--sparse-speed", "0.5", "--json"]
    dense, sparse = json.loads(run(capsys, *arguments)[1])
    hours = 20_000 / 3.00
    for row in (dense, sparse):
        assert row["cost"]["device_hours"] == pytest.approx(hours)
        assert row["cost"]["usd"] == pytest.approx(20_000)
    assert dense["cost"]["flops"] == pytest.approx(hours * 3600 * 989e12 * 0.4)
    assert sparse["tokens"] == pytest.approx(dense["tokens"] / 2, rel=0.01)


def test_the_table_states_the_range_of_the_laws_and_what_leaves_it(capsys):
    code, out, _ = run(capsys, "--budget-flops", "1e22", *H100S)
    assert code == 0
    assert "70M to 16B parameters" in out
    assert "from 15M to 1.3B active parameters" in out
    assert "* 8 experts: outside the range of the laws with" in out
    assert "fits" in out.splitlines()[2]
    assert out.splitlines()[0].endswith(" tokens; the table has the nearest shape and counts attention")
    assert "outside" not in run(capsys, "--budget-flops", "2e20", *H100S, "--experts", "8")[1]
    few = json.loads(run(capsys, "--budget-usd", "30", *H100S, "--experts", "8,1024", "--json")[1])
    assert any("tokens" in reason for reason in few[1]["outside_range"])
    assert "1024 experts" in few[2]["outside_range"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget-flops", "1e17", *H100S], "--budget-flops: is too small to plan"),
        (["--budget-usd", "1", *H100S], "--budget-usd: is too small to plan"),
        (["--budget-usd", "500", "--gpu", "l4", "--gpus", "8"], "--usd-per-hour: no price of the L4"),
        (["--budget-flops", "1e21", *H100S, "--experts", "8,two"], "--experts: should be numbers above 2"),
        (["--budget-flops", "1e29", *H100S], "--budget-flops: asks for a model of 35.1T parameters"),
        (
            ["--budget-flops", "1e21", *H100S, "--mfu", "40"],
            "argument --mfu: should be above 0 and at most 1",
        ),
        (["--budget-flops", "-1", *H100S], "argument --budget-flops: should be a number above 0"),
        (["--budget-flops", "1e21", "--gpu", "cray", "--gpus", "8"], "--gpu: 'cray' is not known"),
        (H100S, "one of the arguments"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(capsys, arguments, complaint):
    code = exit_code(main, arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith(f"error: {complaint}")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
