"""What a rank computes and sends when experts are split."""

import pytest

from moe.benchmark import dispatch_speed
from moe.benchmark.dispatch_speed import measure_dispatch, measure_rank, split_configs
from moe.benchmark.speed_tables import dispatch_rows
from moe.config import ConfigError, RunError, parse_config
from tests.support.ranks import run_ranks

CONFIG = {
    "model": {"d_model": 16, "vocab_size": 50},
    "moe": {"num_experts": 4, "top_k": 2, "d_ff_expert": 8},
    "data": {"seq_len": 64},
    "train": {"global_batch_size": 8, "micro_batch_size": 8},
    "parallel": {"device": "cpu"},
}
ASSIGNMENTS = 8 * 64 * 2


def on_real_ranks(config, repeats):
    """In the place of `_launch`, whose ranks would import torch each time."""
    return run_ranks(config.parallel.ep_size, measure_rank, config, repeats)[0]


def test_the_global_batch_and_the_experts_are_split_evenly():
    configs = split_configs(parse_config(CONFIG), [1, 2, 4])
    assert [config.parallel.ep_size for config in configs] == [1, 2, 4]
    assert [config.train.micro_batch_size for config in configs] == [8, 4, 2]


@pytest.mark.parametrize("dispatch", ["once_per_rank", "once_per_expert"])
def test_ranks_share_the_rows_of_one_process_and_send_what_the_formula_says(monkeypatch, dispatch):
    monkeypatch.setattr(dispatch_speed, "_launch", on_real_ranks)
    parallel = {"parallel": CONFIG["parallel"] | {"dispatch": dispatch}}
    (config,) = split_configs(parse_config(CONFIG | parallel), [2])
    record = measure_dispatch(config, repeats=2)
    assert (record["ranks"], record["experts_per_rank"], record["tokens_per_rank"]) == (2, 2, 256)
    assert sum(record["rows_per_rank"]) == ASSIGNMENTS
    products = 3 * 3 * 2 * 16 * 8  # three passes, three products
    assert record["routed_flops_per_rank"] == [rows * products for rows in record["rows_per_rank"]]
    row = 16 * 4
    # A token stays only if both of its experts do: by chance 1 of 6. Once per expert, half of the rows leave.
    expected = 256 * row * (5 / 6 if dispatch == "once_per_rank" else 1.0)
    assert record["expected_dispatch_bytes"] == pytest.approx(expected)
    mean = sum(record["dispatch_bytes_per_rank"]) / 2
    assert mean % row == 0 or mean % (row / 2) == 0
    assert mean == pytest.approx(expected, rel=0.1)
    assert record["repeats"] == 2
    assert record["layer_ms"] > 0
    assert len({len(row) for row in dispatch_rows([record])}) == 1


@pytest.mark.slow
def test_one_rank_needs_no_launcher_and_sends_nothing():
    (config,) = split_configs(parse_config(CONFIG), [1])
    record = measure_dispatch(config, repeats=1)
    assert (record["rows_per_rank"], record["dispatch_bytes_per_rank"]) == ([ASSIGNMENTS], [0])
    assert (record["expected_dispatch_bytes"], record["expected_step_bytes"]) == (0, 0)


@pytest.mark.slow
def test_ranks_that_fail_are_shown():
    (config,) = split_configs(parse_config(CONFIG), [1])
    broken = config.model_copy(update={"moe": config.moe.model_copy(update={"top_k": 99})})
    with pytest.raises(RunError, match=r"the layer on 1 ranks failed:(.|\n)*moe.top_k: 99 is more than"):
        measure_dispatch(broken, repeats=1)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (
            {"moe": {"num_experts": 1, "top_k": 1, "normalize_gate_weights": False}},
            [1],
            "moe.num_experts: 1 is a",
        ),
        ({"moe": {"num_experts": 4, "capacity_factor": 1.0}}, [1], "moe.capacity_factor: rows are counted"),
        ({}, [1, 3], "--ranks: 3 ranks cannot share 4 experts and 8 sequences evenly"),
        ({"moe": {"num_experts": 16}}, [16], "--ranks: 16 ranks cannot share 16 experts and 8 sequences"),
    ],
)
def test_what_cannot_be_split_evenly_is_refused(changes, ranks, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        split_configs(parse_config(CONFIG | changes), ranks)
