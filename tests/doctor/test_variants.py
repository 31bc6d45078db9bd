"""Which ways to run a configuration the doctor compares."""

from pathlib import Path

import pytest

from moe.config import ConfigError, load_config, parse_config
from moe.doctor.variants import parse_rank_counts, shrunk, variants
from tests.support.paths import CONFIGS


def test_one_rank_comes_first_and_experts_are_split_where_they_split_evenly():
    config = parse_config({"moe": {"num_experts": 6}, "train": {"micro_batch_size": 8}})
    ways = [(way.ranks, way.ep_size) for way in variants(config, [1, 2, 4], every=False)]
    assert ways == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]  # 4 does not divide 6
    every = list(variants(config, [1, 2], every=True))
    assert {(way.zero_stage, way.micro_batch_size) for way in every} == {(1, 4), (1, 1), (2, 4), (2, 1)}
    assert len(every) == len({way.name for way in every}) == 3 * 4


def test_rank_counts_are_sorted_and_hold_one():
    assert parse_rank_counts("4,2") == [1, 2, 4]
    for text in ("two", "0", "2,", ""):
        with pytest.raises(ConfigError, match=r"^--ranks: should be numbers such as 1,2,4"):
            parse_rank_counts(text)


def test_a_shrunk_model_keeps_its_experts_and_loads():
    for name in ("tiny.yaml", "base_8gpu.yaml", "zoo/deepseek_moe_16b.yaml"):
        original = load_config(CONFIGS / name)
        small = load_config(CONFIGS / name, shrunk(original, [1, 2, 4]))
        assert small.model.d_model <= 64
        assert small.moe.model_copy(update={"d_ff_expert": original.moe.d_ff_expert}) == original.moe
        ways = list(variants(small, [1, 2, 4], every=True))
        for way in ways:
            small.accumulation_steps(way.ranks)
        load_config(CONFIGS / name, [*shrunk(original, [1, 2, 4]), *ways[-1].overrides(Path("x"))])
