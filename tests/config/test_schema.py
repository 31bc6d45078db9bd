"""What follows from the keys of a configuration together."""

from typing import Any, cast

import pytest

from moe.config import Config, ConfigError, parse_config


def test_derived_defaults():
    config = parse_config({"run": {"name": "x"}, "model": {"d_model": 64, "n_heads": 8}})
    assert (config.run.dir, config.model.head_dim, config.model.n_kv_heads) == ("runs/x", 8, 8)


def test_accumulation_follows_from_the_batch_sizes():
    config = parse_config({"train": {"global_batch_size": 24, "micro_batch_size": 4}})
    assert [config.accumulation_steps(world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(
        ConfigError, match=r"train.global_batch_size: 24 is not a multiple of .*5 ranks; use 20"
    ):
        config.accumulation_steps(5)
    with pytest.raises(
        ConfigError, match=r"24 is not a multiple of .*\(4\) x 8 ranks; use train.micro_batch_size=3"
    ):
        config.accumulation_steps(8)  # changing the global batch would change the experiment


def test_configuration_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        cast(Any, Config().moe).num_experts = 3


@pytest.mark.parametrize(
    ("first", "n", "expected"), [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (1, 2, [2])]
)
def test_moe_layer_positions(first, n, expected):
    config = parse_config({"moe": {"first_dense_layers": first, "every_n_layers": n}})
    assert config.moe_layers == expected


def test_the_vocabulary_is_the_tokenizers_unless_it_is_set_and_large_enough():
    config = parse_config({})
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: is null"):
        _ = config.vocab_size
    assert config.resolve(300).vocab_size == 300
    larger = parse_config({"model": {"vocab_size": 512}})
    assert larger.vocab_size == larger.resolve(300).vocab_size == 512
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: 512 is less than the tokenizer's 600"):
        larger.resolve(600)


def test_a_default_that_is_too_long_is_called_so():
    with pytest.raises(ConfigError, match=r"^data.seq_len: 256, the default, is longer than model"):
        parse_config({"model": {"max_seq_len": 32}})
    with pytest.raises(ConfigError, match=r"33 is longer .*; lower data.seq_len or raise model.max_seq_len"):
        parse_config({"model": {"max_seq_len": 32}, "data": {"seq_len": 33}})
