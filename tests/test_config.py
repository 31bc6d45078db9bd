from pathlib import Path

import pytest
import yaml

import train
from moe.config import Config, ConfigError, dump_config, flat_config, load_config, moe_layers, parse_config
from moe.config.reference import describe_keys

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))

# The keys that other tools rely on.
CONTRACT = """
run.name run.dir run.seed run.resume
model.d_model model.n_layers model.n_heads model.n_kv_heads model.head_dim model.d_ff model.max_seq_len
model.rope_theta model.tie_embeddings model.qk_norm model.vocab_size
moe.num_experts moe.top_k moe.d_ff_expert moe.num_shared_experts moe.capacity_factor
moe.normalize_gate_weights moe.aux_loss_coef moe.z_loss_coef moe.every_n_layers moe.first_dense_layers
data.source data.text_field data.tokenizer data.seq_len data.streaming
train.steps train.global_batch_size train.micro_batch_size train.eval_interval train.eval_batches
train.checkpoint_interval train.keep_checkpoints train.activation_checkpointing train.compile
optim.lr optim.min_lr_ratio optim.warmup_steps optim.betas optim.weight_decay optim.grad_clip
parallel.ep_size parallel.zero_stage parallel.precision parallel.timeout_s
log.interval log.wandb log.wandb_project
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_yaml_loads_and_opens_with_two_comment_lines(path):
    load_config(path)
    first, second, third = path.read_text().splitlines()[:3]
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert not third.startswith("#")


def test_the_contract_keys_exist_and_help_lists_every_key_with_a_meaning(capsys):
    keys = flat_config(Config())
    assert set(CONTRACT.split()) <= set(keys)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    for key in keys:
        assert f"  {key} " in shown, key
    assert all(len(line.split()) > 3 for line in describe_keys().splitlines())


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


def test_derived_defaults():
    config = parse_config({"run": {"name": "x"}, "model": {"d_model": 64, "n_heads": 8}})
    assert (config.run.dir, config.model.head_dim, config.model.n_kv_heads) == ("runs/x", 8, 8)


def test_the_tiny_twins_differ_only_in_their_experts():
    tiny, dense = (
        flat_config(load_config(CONFIGS[0].parent / f"{name}.yaml")) for name in ("tiny", "tiny_dense")
    )
    differ = {key for key in tiny if tiny[key] != dense[key]}
    assert differ == {"run.name", "run.dir", "moe.num_experts", "moe.top_k", "moe.d_ff_expert"}
    assert tiny["moe.top_k"] * tiny["moe.d_ff_expert"] == dense["moe.d_ff_expert"]


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
        Config().moe.num_experts = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("first", "n", "expected"), [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (1, 2, [2])]
)
def test_moe_layer_positions(first, n, expected):
    config = parse_config({"moe": {"first_dense_layers": first, "every_n_layers": n}})
    assert moe_layers(config.model, config.moe) == expected


def test_yaml_of_a_config_is_plain():
    assert yaml.safe_load(dump_config(Config()))["optim"]["betas"] == [0.9, 0.95]
