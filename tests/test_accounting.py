import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting import count, estimate_memory, peak_flops
from moe.config_io import load_config, parse_config
from moe.dispatch import LocalDispatcher
from moe.transformer import Transformer


def build_empty(config):
    with torch.device("meta"):
        return Transformer(config, LocalDispatcher(), "loop")


def test_mixtral_8x7b_to_the_last_digit():
    mixtral = parse_config(
        {
            "model": {
                "d_model": 4096,
                "n_layers": 32,
                "n_heads": 32,
                "n_kv_heads": 8,
                "d_ff": 14336,
                "vocab_size": 32000,
                "tie_embeddings": False,
            },
            "moe": {"num_experts": 8, "top_k": 2, "d_ff_expert": 14336},
        }
    )
    ledger = count(mixtral)  # the published safetensors total, and the active counts that follow from it
    assert ledger.params_total == 46_702_792_704
    assert ledger.params_active == 12_879_925_248
    assert ledger.params_active_no_input_emb == 12_748_853_248
    assert ledger.params_active_no_emb == 12_617_781_248


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
    ledger = count(granite)
    assert (ledger.params_total, ledger.params_active) == (3_298_793_472, 882_874_368)
    assert ledger.params_active_no_input_emb == ledger.params_active_no_emb == 807_372_288


GRID = list(
    product(
        [{"num_experts": 1, "top_k": 1}, {"num_experts": 4}, {"num_experts": 6, "top_k": 3}],
        [{}, {"num_shared_experts": 2}],
        [{}, {"first_dense_layers": 1, "every_n_layers": 2}],
        [{}, {"tie_embeddings": False, "qk_norm": True, "n_kv_heads": 2}],
    )
)


@pytest.mark.parametrize("parts", GRID, ids=range(len(GRID)))
def test_count_equals_the_built_models_parameters_part_by_part(parts):
    experts, shared, places, model_settings = parts
    model_section = {"d_model": 32, "n_layers": 5, "d_ff": 48, "vocab_size": 99} | model_settings
    config = parse_config({"model": model_section, "moe": {"d_ff_expert": 40} | experts | shared | places})
    ledger, model = count(config), build_empty(config)

    def total(*words, without=()):
        return sum(
            p.numel()
            for name, p in model.named_parameters()
            if all(word in name for word in words) and not any(word in name for word in without)
        )

    assert ledger.params_total == total()
    assert ledger.by_part["embedding"] == total("embedding")
    assert ledger.by_part["attention"] == total(".attention.", without=("norm",))
    assert ledger.by_part["norms"] == total("norm")
    assert ledger.by_part["router"] == total("router")
    assert ledger.by_part["routed_experts"] == total(".experts.")
    assert ledger.by_part["shared_experts"] == total("shared_experts")
    assert ledger.by_part["dense_blocks"] == total(".ffn.", without=("router", "experts"))


@pytest.mark.parametrize("name", ["tiny", "tiny_dense"])
def test_forward_flops_equal_those_that_torch_counts(name):
    config = load_config(
        Path(__file__).parent.parent / "configs" / f"{name}.yaml",
        ["model.vocab_size=1024", "data.seq_len=64"],
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Transformer(config, LocalDispatcher(), "loop")(torch.randint(0, 1024, (2, 64)))
    # torch counts attention in full, 4 S per head dimension; causal attention needs 2 (S + 1).
    full = config.model.n_layers * config.model.d_model * 4 * 64
    causal = config.model.n_layers * config.model.d_model * 2 * 65
    measured = counter.get_total_flops() / (2 * 64)
    router_bmm = (
        0 if config.moe.is_dense else config.model.n_layers * 2 * config.moe.top_k * config.model.d_model
    )
    assert measured - full + causal - router_bmm == pytest.approx(
        count(config).flops_per_token_forward, rel=1e-6
    )


def test_more_experts_add_parameters_but_only_the_routers_flops():
    few, many = (
        count(parse_config({"model": {"vocab_size": 100}, "moe": {"num_experts": e}})) for e in (8, 64)
    )
    assert many.params_total > 6 * few.params_total
    assert many.flops_per_token_forward - few.flops_per_token_forward == 4 * 2 * 128 * (64 - 8)


def test_memory_estimate_counts_the_states_of_adam():
    config = parse_config({"model": {"vocab_size": 100}})
    memory, params = estimate_memory(config, 1), count(config).params_total
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        4 * params,
        4 * params,
        12 * params,
    )
    assert estimate_memory(config, 4)["optimizer"] == 3 * params
    json.dumps(memory)


def test_peak_is_known_for_known_devices_only():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce 9999") is None
    assert peak_flops(None) is None
