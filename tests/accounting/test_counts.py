"""Parameters and FLOPs of an architecture: against published numbers, built models, and torch's own count."""

import json
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting.counts import count_parameters
from moe.config import ConfigError, load_config, parse_config
from moe.model.transformer import Transformer
from tests.support.paths import CONFIGS

# Published architectures: total (safetensors headers, model cards), and the active counts that follow:
# total - layers * (E - k) * 3 * d * ff, then without one and without both of the V * d embeddings.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248, 12_617_781_248),
    "mixtral_8x22b": (140_630_071_296, 39_161_468_928, 38_960_142_336, 38_758_815_744),
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280, 1_178_994_688, 1_075_972_096),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776, 2_730_702_848),
    "qwen3_235b_a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664, 20_946_103_808),
    "qwen3_coder_480b_a35b": (480_154_875_392, 35_474_765_312, 34_541_270_528, 33_607_775_744),
    "deepseek_moe_16b": (16_375_728_128, 2_828_650_496, 2_618_935_296, 2_409_220_096),
}


def build_empty(config):
    with torch.device("meta"):
        return Transformer(config, expert_path="reference")


@pytest.mark.parametrize("path", sorted((CONFIGS / "zoo").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_architecture_of_the_zoo_has_its_published_counts_to_the_last_digit(path):
    config = load_config(path)
    counts = count_parameters(config)
    found = (counts.total, counts.active_all, counts.active_no_input_emb, counts.active_no_emb)
    assert found == PUBLISHED[path.stem]
    assert counts.total == sum(p.numel() for p in build_empty(config).parameters())


def test_granite_3b_a800m_with_tied_embeddings_to_the_last_digit():
    granite = parse_config(
        {
            "model": {
                "d_model": 1536,
                "n_layers": 32,
                "n_heads": 24,
                "n_kv_heads": 8,
                "d_ff": 512,
                "vocab_size": 49155,
            },
            "moe": {"num_experts": 40, "top_k": 8, "d_ff_expert": 512},
        }
    )
    counts = count_parameters(granite)
    assert (counts.total, counts.active_all) == (3_298_793_472, 882_874_368)
    assert counts.active_no_input_emb == counts.active_no_emb == 807_372_288


GRID = list(
    product(
        [{"num_experts": 1, "top_k": 1}, {"num_experts": 4}, {"num_experts": 6, "top_k": 3}],
        [{}, {"num_shared_experts": 2}, {"num_shared_experts": 1, "shared_expert_gate": True}],
        [{}, {"first_dense_layers": 1, "every_n_layers": 2}, {"first_dense_layers": 4}],
        [{"tie_embeddings": False}, {"head_dim": 12}],
        [{}, {"qk_norm": True}, {"qk_norm": True, "qk_norm_scope": "all_heads", "n_kv_heads": 2}],
    )
)


def small(parts):
    experts, shared, places, heads, norms = parts
    model = {"d_model": 32, "n_layers": 5, "d_ff": 48, "vocab_size": 99} | heads | norms
    return parse_config(
        {
            "model": model,
            "moe": {"d_ff_expert": 40} | experts | shared | places,
            "data": {"seq_len": 16},
            "train": {"micro_batch_size": 2},
        }
    )


@pytest.mark.parametrize("parts", GRID, ids=range(len(GRID)))
def test_count_equals_the_built_models_parameters_part_by_part_and_layer_by_layer(parts):
    config = small(parts)
    counts, model = count_parameters(config), build_empty(config)

    def total(*words, without=()):
        return sum(
            p.numel()
            for name, p in model.named_parameters()
            if all(word in name for word in words) and not any(word in name for word in without)
        )

    modules = {
        "embedding": total("embedding"),
        "attention": total(".attention.", without=("norm",)),
        "norms": total("norm"),
        "router": total("router"),
        "routed_experts": total(".experts."),
        "shared_experts": total("shared_"),
        "dense_blocks": total(".ffn.", without=("router", "experts", "shared_gate")),
        "head": total("head."),
    }
    assert counts.total == total()
    assert counts.by_part == {part: size for part, size in modules.items() if size}
    for layer, counted in enumerate(counts.layers):
        assert sum(counted.values()) == total(f"blocks.{layer}.")
    assert sum(number for number, _ in counts.layer_kinds()) == 5


def test_the_grid_is_large_enough():
    assert len(GRID) >= 100


@pytest.mark.parametrize("parts", GRID[::4], ids=range(0, len(GRID), 4))
def test_forward_flops_equal_those_that_torch_counts(parts):
    config = small(parts)
    model = config.model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        Transformer(config, expert_path="reference").eval()(torch.randint(0, 99, (2, 16)))
    # torch counts attention in full, 4 S per dimension of the heads; causal attention needs 2 (S + 1).
    width = model.n_heads * model.head_dim
    causal_instead_of_full = model.n_layers * width * (2 * 17 - 4 * 16)
    measured = counter.get_total_flops() / (2 * 16) + causal_instead_of_full
    assert measured == pytest.approx(count_parameters(config).flops_per_token_forward, rel=1e-9)


@pytest.mark.parametrize("name", ["tiny", "tiny_dense"])
def test_training_flops_equal_those_that_torch_counts_with_and_without_recomputation(name):
    for checkpointing in (False, True):
        config = load_config(
            CONFIGS / f"{name}.yaml",
            [
                "model.vocab_size=1024",
                "data.seq_len=64",
                f"train.activation_checkpointing={str(checkpointing).lower()}",
            ],
        )
        counts, model = count_parameters(config), Transformer(config, expert_path="reference")
        whole_blocks = set_checkpoint_early_stop(False)  # else a block's last product is not repeated
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), whole_blocks:
            model(torch.randint(0, 1024, (2, 64))).logits.sum().backward()
        width, layers = config.model.d_model, config.model.n_layers
        passes = 4 if checkpointing else 3
        causal_instead_of_full = layers * width * (2 * 65 - 4 * 64)
        measured = counter.get_total_flops() / (2 * 64) + passes * causal_instead_of_full
        expected = counts.flops_per_token_recompute if checkpointing else counts.flops_per_token_train
        assert measured == pytest.approx(expected, rel=1e-9)


def test_more_experts_add_parameters_but_only_the_routers_flops():
    few, many = (
        count_parameters(parse_config({"model": {"vocab_size": 100}, "moe": {"num_experts": e}}))
        for e in (8, 64)
    )
    assert many.total > 6 * few.total
    assert many.flops_per_token_forward - few.flops_per_token_forward == 4 * 2 * 128 * (64 - 8)


def test_causal_attention_flops_are_those_of_the_keys_that_each_position_meets():
    for seq_len in (1, 2, 7, 64):
        config = parse_config(
            {"model": {"vocab_size": 100, "n_layers": 1}, "data": {"seq_len": seq_len}}
        )  # 4 heads of 32
        counts = count_parameters(config)
        keys_met = sum(position + 1 for position in range(seq_len))
        scores_and_values = 2 * 2 * 4 * 32 * keys_met  # a product and a sum, for scores and for values
        projections = 2 * counts.by_part["attention"]
        assert (counts.flops_by_part["attention"] - projections) * seq_len == scores_and_values


def test_the_record_is_plain_json():
    record = json.loads(json.dumps(count_parameters(small(GRID[5])).record()))
    assert sum(record["by_part"].values()) == record["total"]
    assert sum(record["flops_by_part"].values()) == record["flops_per_token_forward"]


def test_without_the_size_of_the_vocabulary_nothing_is_counted():
    with pytest.raises(ConfigError, match=r"^config: should be of type Config, got str"):
        count_parameters("configs/tiny.yaml")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: is null; .*, as in config.resolve\(4096\)"):
        count_parameters(parse_config({}))
