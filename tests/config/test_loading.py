"""YAML files and overrides to a configuration and back."""

import pytest
import yaml

import train
from moe.config import Config, ConfigError, dump_config, flat_config, load_config
from tests.support.paths import CONFIGS, TINY

FILES = sorted(CONFIGS.glob("**/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_yaml_loads_and_opens_with_two_comment_lines(path):
    load_config(path)
    first, second, third = path.read_text().splitlines()[:3]
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert not third.startswith("#")


def test_print_config_round_trips(capsys, tmp_path):
    assert train.main(["moe.num_experts=16", "optim.betas=[0.8,0.9]", "--print-config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "c.yaml")
    assert (config.moe.num_experts, config.optim.betas) == (16, (0.8, 0.9))
    assert dump_config(config) == (tmp_path / "c.yaml").read_text()


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("moe: {num_experts: 4}")
    assert load_config(path).moe.num_experts == 4
    assert load_config(path, ["moe.num_experts=8", "moe.num_experts=32"]).moe.num_experts == 32
    assert load_config(path, ["moe.capacity_factor=1.5"]).moe.capacity_factor == 1.5
    assert load_config(path, ["moe.capacity_factor=null", "data.source=a=b.txt"]).data.source == "a=b.txt"
    assert load_config(path, ["data.source=*.txt"]).data.source == "*.txt"


def test_the_tiny_twins_differ_only_in_their_experts():
    tiny, dense = (flat_config(load_config(CONFIGS / f"{name}.yaml")) for name in ("tiny", "tiny_dense"))
    differ = {key for key in tiny if tiny[key] != dense[key]}
    assert differ == {"run.name", "run.dir", "moe.num_experts", "moe.top_k", "moe.d_ff_expert"}
    assert tiny["moe.top_k"] * tiny["moe.d_ff_expert"] == dense["moe.d_ff_expert"]


def test_yaml_of_a_config_is_plain():
    assert yaml.safe_load(dump_config(Config()))["optim"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("moe.top_k=1", r"^overrides: should be a list such as .*, got 'moe.top_k=1'"),
        ({"moe.top_k": 1}, r"^overrides: should be a list such as .*, got {'moe.top_k': 1}"),
        (["moe=4"], "^moe: names no key of this section; write one such as moe.num_experts=VALUE"),
    ],
)
def test_overrides_that_are_no_list_of_keys_and_values_are_refused_with_an_example(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, overrides)
