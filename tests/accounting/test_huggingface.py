"""Every count is compared with a published number or with arithmetic written out from the architecture.

None of it uses the module's own rules or a model's `numel`.
"""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
import transformers
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting.counts import PARTS
from moe.accounting.huggingface import count_huggingface
from moe.config import ConfigError
from tests.support.paths import ROOT


def parsed(text):
    """A config.json, in YAML without braces."""
    return yaml.safe_load("{" + text + "}")


@pytest.fixture
def counts_of(tmp_path):
    """Write a config.json with these fields and count it."""

    def call(fields, seq_len=64):
        file = tmp_path / "model" / "config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(fields), encoding="utf-8")
        return count_huggingface(str(file), seq_len)

    return call


LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
MIXTRAL = LLAMA | parsed("""
    model_type: mixtral, hidden_size: 4096, intermediate_size: 14336, num_attention_heads: 32,
    num_hidden_layers: 32, num_key_value_heads: 8, num_experts_per_tok: 2, num_local_experts: 8,
    vocab_size: 32000, sliding_window: null
""")
OLMOE = LLAMA | parsed("""
    model_type: olmoe, hidden_size: 2048, intermediate_size: 1024, num_attention_heads: 16,
    num_key_value_heads: 16, num_hidden_layers: 16, num_experts: 64, num_experts_per_tok: 8,
    vocab_size: 50304
""")
QWEN3 = LLAMA | parsed("""
    model_type: qwen3_moe, hidden_size: 2048, intermediate_size: 6144, moe_intermediate_size: 768,
    head_dim: 128, num_attention_heads: 32, num_key_value_heads: 4, num_hidden_layers: 48, num_experts: 128,
    num_experts_per_tok: 8, decoder_sparse_step: 1, mlp_only_layers: [], use_sliding_window: false,
    sliding_window: null, vocab_size: 151936
""")
DBRX = parsed("""
    model_type: dbrx, d_model: 6144, n_heads: 48, n_layers: 40, max_seq_len: 32768, vocab_size: 100352,
    attn_config: {clip_qkv: 8, kv_n_heads: 8, model_type: "", rope_theta: 500000},
    ffn_config: {ffn_hidden_size: 10752, moe_num_experts: 16, moe_top_k: 4, model_type: ""},
    tie_word_embeddings: false
""")
GRANITE = LLAMA | parsed("""
    model_type: granitemoe, hidden_size: 1536, intermediate_size: 512, num_attention_heads: 24,
    num_key_value_heads: 8, num_hidden_layers: 32, num_local_experts: 40, num_experts_per_tok: 8,
    vocab_size: 49155, tie_word_embeddings: true
""")
DEEPSEEK_MOE = LLAMA | parsed("""
    model_type: deepseek, auto_map: {AutoModelForCausalLM: modeling_deepseek.DeepseekForCausalLM},
    hidden_size: 2048, intermediate_size: 10944, moe_intermediate_size: 1408, num_attention_heads: 16,
    num_key_value_heads: 16, num_hidden_layers: 28, n_routed_experts: 64, n_shared_experts: 2,
    num_experts_per_tok: 6, first_k_dense_replace: 1, moe_layer_freq: 1, norm_topk_prob: false,
    max_position_embeddings: 4096, vocab_size: 102400
""")
DEEPSEEK_V3 = LLAMA | parsed("""
    model_type: deepseek_v3, auto_map: {AutoConfig: configuration_deepseek.DeepseekV3Config},
    hidden_size: 7168, intermediate_size: 18432, moe_intermediate_size: 2048, num_attention_heads: 128,
    num_key_value_heads: 128, num_hidden_layers: 61, num_nextn_predict_layers: 1, n_routed_experts: 256,
    n_shared_experts: 1, num_experts_per_tok: 8, n_group: 8, topk_group: 4, topk_method: noaux_tc,
    first_k_dense_replace: 3, moe_layer_freq: 1, q_lora_rank: 1536, kv_lora_rank: 512,
    qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128, vocab_size: 129280,
    quantization_config: {quant_method: fp8, fmt: e4m3, weight_block_size: [128, 128]}
""")
QWEN3_235B = QWEN3 | parsed("""
    hidden_size: 4096, moe_intermediate_size: 1536, num_attention_heads: 64, num_hidden_layers: 94
""")
MIXTRAL_8X22B = MIXTRAL | parsed("""
    hidden_size: 6144, intermediate_size: 16384, num_attention_heads: 48, num_hidden_layers: 56,
    vocab_size: 32768
""")
PUBLISHED = [  # fields, total, and active: all, without the input embedding, without both embeddings
    (MIXTRAL, 46_702_792_704, 12_879_925_248, 12_748_853_248, 12_617_781_248),
    (MIXTRAL_8X22B, 140_630_071_296, 39_161_468_928, 38_960_142_336, 38_758_815_744),
    (OLMOE, 6_919_161_856, 1_282_017_280, 1_178_994_688, 1_075_972_096),
    (QWEN3, 30_532_122_624, 3_353_032_704, 3_041_867_776, 2_730_702_848),
    (QWEN3_235B, 235_093_634_560, 22_190_763_520, 21_568_433_664, 20_946_103_808),
    (DBRX, 131_596_523_520, 36_469_708_800, 35_853_146_112, 35_236_583_424),
    (GRANITE, 3_298_793_472, 882_874_368, 807_372_288, 807_372_288),
    (DEEPSEEK_MOE, 16_375_728_128, 2_828_650_496, 2_618_935_296, 2_409_220_096),
    (DEEPSEEK_V3, 671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392),
]


@pytest.mark.parametrize(
    ("fields", "total", "active", "active_no_input_emb", "active_no_emb"),
    PUBLISHED,
    ids=["mixtral", "mixtral-8x22b", "olmoe", "qwen3", "qwen3-235b", "dbrx", "granite", "deepseek", "v3"],
)
def test_published_models_to_the_last_digit(
    counts_of, fields, total, active, active_no_input_emb, active_no_emb
):
    counts = counts_of(fields, 4096)
    assert counts.total == total
    assert counts.active_all == active
    assert counts.active_no_input_emb == active_no_input_emb
    assert counts.active_no_emb == active_no_emb
    assert list(counts.by_part) == [part for part in PARTS if part in counts.by_part]
    assert counts.name == "model"


def test_gpt_oss_20b_has_biases_everywhere_and_a_sink_per_head(counts_of):
    fields = parsed("""
        model_type: gpt_oss, hidden_size: 2880, intermediate_size: 2880, head_dim: 64,
        num_attention_heads: 64, num_key_value_heads: 8, num_hidden_layers: 24, num_local_experts: 32,
        num_experts_per_tok: 4, sliding_window: 128, vocab_size: 201088, tie_word_embeddings: false
    """)
    counts = counts_of(fields, seq_len=1000)
    q, kv, o, sinks = 2880 * 4096 + 4096, 2880 * 512 + 512, 4096 * 2880 + 2880, 64
    expert = 2880 * 5760 + 5760 + 2880 * 2880 + 2880
    assert counts.total == 20_914_757_184
    assert counts.by_part["attention"] == 24 * (q + 2 * kv + o + sinks)
    assert counts.by_part["router"] == 24 * (2880 * 32 + 32)
    assert counts.by_part["routed_experts"] == 24 * 32 * expert
    assert counts.idle == 24 * 28 * expert
    # FLOPs: no biases; every other layer meets at most 128 keys; 64 heads of 64 for scores and for values.
    assert counts.flops_by_part["routed_experts"] == 2 * 24 * 4 * (2880 * 5760 + 2880 * 2880)
    full = 4 * 64 * 64 * sum(range(1, 1001)) // 1000
    sliding = 4 * 64 * 64 * sum(min(keys, 128) for keys in range(1, 1001)) // 1000
    matrices = 2 * 24 * (2 * 2880 * 4096 + 2 * 2880 * 512)
    assert counts.flops_by_part["attention"] == matrices + 12 * full + 12 * sliding


def test_qwen15_moe_a27b_has_a_gate_on_its_shared_expert_and_biased_queries_keys_values(counts_of):
    fields = parsed("""
        model_type: qwen2_moe, hidden_size: 2048, moe_intermediate_size: 1408,
        shared_expert_intermediate_size: 5632, intermediate_size: 5632, num_attention_heads: 16,
        num_key_value_heads: 16, num_hidden_layers: 24, num_experts: 60, num_experts_per_tok: 4,
        sliding_window: 32768, use_sliding_window: false, vocab_size: 151936, tie_word_embeddings: false
    """)
    counts = counts_of(fields)
    expert = 3 * 2048 * 1408
    assert counts.total == 14_315_784_192
    assert counts.by_part["attention"] == 24 * (4 * 2048 * 2048 + 3 * 2048)
    assert counts.by_part["shared_experts"] == 24 * (3 * 2048 * 5632 + 2048)
    assert counts.by_part["router"] == 24 * 60 * 2048
    assert counts.active_all == 14_315_784_192 - 24 * 56 * expert
    assert counts.flops_by_part["shared_experts"] == 2 * 24 * (3 * 2048 * 5632 + 2048)
    assert counts.flops_by_part["attention"] == 24 * (2 * 4 * 2048 * 2048 + 2 * 2048 * 65)


LLAMA4_TEXT = parsed("""
    model_type: llama4_text, hidden_size: 64, intermediate_size: 96, intermediate_size_mlp: 160,
    head_dim: 16, num_attention_heads: 6, num_key_value_heads: 2, num_hidden_layers: 4,
    num_local_experts: 5, num_experts_per_tok: 1, interleave_moe_layer_step: 2, attention_chunk_size: 24,
    vocab_size: 300, tie_word_embeddings: false
""")


def test_llama4_alternates_dense_and_sparse_layers_and_attends_within_chunks(counts_of):
    counts = counts_of(LLAMA4_TEXT, seq_len=64)
    attention = {"attention": 2 * 64 * 96 + 2 * 64 * 32, "norms": 2 * 64}
    dense = attention | {"dense_blocks": 3 * 64 * 160}
    sparse = attention | {"router": 5 * 64, "routed_experts": 5 * 3 * 64 * 96, "shared_experts": 3 * 64 * 96}
    assert counts.layers == (dense, sparse, dense, sparse)
    assert counts.total == 2 * sum(dense.values()) + 2 * sum(sparse.values()) + 2 * 300 * 64 + 64
    assert counts.idle == 2 * 4 * 3 * 64 * 96
    # Three of four layers attend within chunks of 24: 24 + 24 + 16 tokens, 6 heads of 16.
    chunked = 4 * 6 * 16 * (24 * 25 // 2 + 24 * 25 // 2 + 16 * 17 // 2) // 64
    full = 4 * 6 * 16 * (64 * 65 // 2) // 64
    matrices = 4 * 2 * (2 * 64 * 96 + 2 * 64 * 32)
    assert counts.flops_by_part["attention"] == matrices + 3 * chunked + full


def test_llama4_scouts_vision_tower_is_other_and_active_and_costs_a_token_of_text_nothing(counts_of):
    text = LLAMA4_TEXT | parsed("""
        hidden_size: 5120, intermediate_size: 8192, intermediate_size_mlp: 16384, head_dim: 128,
        num_attention_heads: 40, num_key_value_heads: 8, num_hidden_layers: 48, num_local_experts: 16,
        interleave_moe_layer_step: 1, attention_chunk_size: 8192, vocab_size: 202048
    """)
    vision = parsed("""
        model_type: llama4_vision_model, hidden_size: 1408, intermediate_size: 5632,
        num_attention_heads: 16, num_hidden_layers: 34, image_size: 336, patch_size: 14,
        projector_input_dim: 4096, projector_output_dim: 4096, vision_output_dim: 4096
    """)
    alone = counts_of(text, 4096)
    scout = counts_of({"model_type": "llama4", "text_config": text, "vision_config": vision}, 4096)
    assert scout.total == 108_641_793_536
    assert scout.total - scout.by_part["other"] == alone.total == 107_769_861_120
    assert scout.active_all - alone.active_all == scout.by_part["other"]
    assert scout.flops_by_part == alone.flops_by_part


def test_deepseek_v2_lite_projects_queries_at_once(counts_of):
    fields = DEEPSEEK_V3 | parsed("""
        model_type: deepseek_v2, auto_map: {}, hidden_size: 2048, intermediate_size: 10944,
        moe_intermediate_size: 1408, num_attention_heads: 16, num_key_value_heads: 16,
        num_hidden_layers: 27, n_routed_experts: 64, n_shared_experts: 2, num_experts_per_tok: 6,
        first_k_dense_replace: 1, topk_method: greedy, n_group: 1, topk_group: 1, q_lora_rank: null,
        vocab_size: 102400
    """)
    counts = counts_of(fields, seq_len=63)
    query, key_value, output = 2048 * 16 * 192, 2048 * (512 + 64) + 512 * 16 * (128 + 128), 16 * 128 * 2048
    assert counts.total == 15_706_484_224
    assert counts.by_part["attention"] == 27 * (query + key_value + output)
    assert counts.by_part["norms"] == 27 * (2 * 2048 + 512) + 2048
    assert counts.by_part["router"] == 26 * 64 * 2048  # no correction bias before V3
    assert counts.by_part["shared_experts"] == 26 * 2 * 3 * 2048 * 1408
    assert counts.by_part["dense_blocks"] == 3 * 2048 * 10944
    assert counts.idle == 26 * 58 * 3 * 2048 * 1408
    scores = 2 * 16 * (192 + 128) * 32  # keys of 128 + 64, values of 128; 32 of 63 keys on average
    assert counts.flops_by_part["attention"] == 27 * (2 * (query + key_value + output) + scores)


def test_deepseek_v2_compresses_queries_too(counts_of):
    fields = DEEPSEEK_V3 | parsed("""
        model_type: deepseek_v2, auto_map: {}, hidden_size: 5120, intermediate_size: 12288,
        moe_intermediate_size: 1536, num_hidden_layers: 60, n_routed_experts: 160, n_shared_experts: 2,
        num_experts_per_tok: 6, topk_method: group_limited_greedy, topk_group: 3, first_k_dense_replace: 1,
        vocab_size: 102400
    """)
    counts = counts_of(fields)
    query = 5120 * 1536 + 1536 * 128 * 192
    key_value = 5120 * (512 + 64) + 512 * 128 * (128 + 128)
    assert counts.total == 235_741_434_880
    assert counts.by_part["attention"] == 60 * (query + key_value + 128 * 128 * 5120)
    assert counts.by_part["norms"] == 60 * (2 * 5120 + 1536 + 512) + 5120


def test_kimi_k2_is_a_trillion_with_its_correction_biases(counts_of):
    k2 = DEEPSEEK_V3 | parsed("""
        num_attention_heads: 64, num_key_value_heads: 64, n_routed_experts: 384, n_group: 1, topk_group: 1,
        first_k_dense_replace: 1, vocab_size: 163840
    """)
    assert counts_of(k2).total == 1_026_408_232_448


def test_jetmoe_8b_has_experts_in_attention(counts_of):
    fields = parsed("""
        model_type: jetmoe, hidden_size: 2048, intermediate_size: 5632, kv_channels: 128,
        num_key_value_heads: 16, num_hidden_layers: 24, num_local_experts: 8, num_experts_per_tok: 2,
        vocab_size: 32000, tie_word_embeddings: true
    """)
    counts = counts_of(fields, seq_len=63)
    query_and_output, mlp = 2 * 2048 * 2048, 3 * 2048 * 5632  # of one expert
    assert counts.total == 8_522_237_952
    assert counts.by_part["routed_experts"] == 24 * 8 * (query_and_output + mlp)
    assert counts.idle == 24 * 6 * (query_and_output + mlp)
    assert counts.by_part["router"] == 24 * 2 * 8 * 2048
    assert counts.by_part["attention"] == 24 * (2 * 2048 * 2048 + 2048)  # keys, values, a bias
    assert counts.by_part["other"] == 24 * 2048  # the bias of the other mixture
    assert "head" not in counts.by_part
    assert counts.flops_by_part["head"] == 2 * 32000 * 2048
    scores = 4 * 32 * 128 * 32  # two experts' 16 heads; 32 of 63 keys on average
    assert counts.flops_by_part["attention"] == 24 * (2 * 2 * 2048 * 2048 + scores)


def test_phi35_moe_has_layer_norms_with_biases_and_a_biased_head(counts_of):
    fields = parsed("""
        model_type: phimoe, hidden_size: 4096, intermediate_size: 6400, num_attention_heads: 32,
        num_key_value_heads: 8, num_hidden_layers: 32, num_local_experts: 16, num_experts_per_tok: 2,
        attention_bias: true, lm_head_bias: true, sliding_window: 40, vocab_size: 32064,
        tie_word_embeddings: false
    """)
    counts = counts_of(fields, seq_len=80)
    matrices, biases = 2 * 4096 * 4096 + 2 * 4096 * 1024, 2 * 4096 + 2 * 1024
    assert counts.total == 41_873_153_344
    assert counts.by_part["attention"] == 32 * (matrices + biases)
    assert counts.by_part["norms"] == (32 * 2 + 1) * 2 * 4096
    assert counts.by_part["head"] == 32064 * 4096 + 32064
    assert counts.flops_by_part["head"] == 2 * 32064 * 4096
    scores = 4 * 4096 * (sum(range(1, 41)) + 40 * 40) // 80  # one window for all layers
    assert counts.flops_by_part["attention"] == 32 * (2 * matrices + scores)


SMALL = LLAMA | parsed("""
    hidden_size: 48, intermediate_size: 88, moe_intermediate_size: 40, head_dim: 16, num_attention_heads: 4,
    num_key_value_heads: 2, num_hidden_layers: 3, num_experts_per_tok: 2, vocab_size: 211
""")
SMALL_ATTENTION = 2 * 48 * 64 + 2 * 48 * 32  # query and output, key and value
SQUARE = SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1}  # heads as wide as the residual stream
SQUARE_ATTENTION = 2 * 48 * 48 + 2 * 48 * 16


def test_glm4_moe_routes_with_a_bias_buffer_after_its_dense_layers(counts_of):
    fields = SMALL | parsed("""
        model_type: glm4_moe, n_routed_experts: 6, n_shared_experts: 3, n_group: 1, topk_group: 1,
        first_k_dense_replace: 2, attention_bias: true, use_qk_norm: true
    """)
    counts = counts_of(fields)
    attention, norms = SMALL_ATTENTION + 64 + 2 * 32, 2 * 48 + 2 * 16
    dense = {"attention": attention, "norms": norms, "dense_blocks": 3 * 48 * 88}
    sparse = {
        "attention": attention,
        "norms": norms,
        "router": 6 * 48 + 6,
        "routed_experts": 6 * 3 * 48 * 40,
        "shared_experts": 3 * 3 * 48 * 40,
    }
    assert counts.layers == (dense, dense, sparse)
    assert counts.total == 2 * sum(dense.values()) + sum(sparse.values()) + 48 + 2 * 211 * 48
    assert counts.active_all == counts.total - 4 * 3 * 48 * 40
    assert counts.flops_by_part["router"] == 2 * 6 * 48


def test_ernie45_moe_keeps_its_correction_bias_as_a_matrix_of_one_row(counts_of):
    fields = SQUARE | parsed("""
        model_type: ernie4_5_moe, moe_num_experts: 8, moe_k: 3, moe_num_shared_experts: 2,
        moe_layer_start_index: 1, moe_layer_end_index: 2, moe_layer_interval: 1, use_bias: false,
        tie_word_embeddings: true
    """)
    del fields["num_experts_per_tok"]
    counts = counts_of(fields)
    sparse = 8 * 48 + 8 + (8 + 2) * 3 * 48 * 40
    assert counts.total == 3 * (SQUARE_ATTENTION + 2 * 48) + 3 * 48 * 88 + 2 * sparse + 48 + 211 * 48
    assert counts.by_part["router"] == 2 * (8 * 48 + 8)
    assert counts.flops_by_part["router"] == 2 * 2 * 8 * 48
    assert counts.active_all == counts.total - 2 * 5 * 3 * 48 * 40
    assert counts.active_no_input_emb == counts.active_all - 211 * 48 == counts.active_no_emb


def test_qwen3_next_attends_with_gated_queries_in_one_layer_of_four_and_recurs_in_the_others(counts_of):
    fields = SMALL | parsed("""
        model_type: qwen3_next, num_hidden_layers: 4, num_experts: 6, shared_expert_intermediate_size: 24,
        linear_num_key_heads: 2, linear_key_head_dim: 8, linear_num_value_heads: 4,
        linear_value_head_dim: 12, linear_conv_kernel_dim: 4, partial_rotary_factor: 0.5
    """)
    counts = counts_of(fields, seq_len=33)
    keys, values = 2 * 8, 4 * 12
    matrices = 48 * (2 * keys + 2 * values) + 48 * 2 * 4 + values * 48 + (2 * keys + values) * 4
    attention = 48 * 2 * 64 + 2 * 48 * 32 + 64 * 48  # as wide again for the gate of the output
    assert counts.by_part["other"] == 3 * (matrices + 2 * 4)  # a decay and a step per head
    assert counts.by_part["attention"] == attention
    assert counts.by_part["norms"] == 4 * 2 * 48 + 3 * 12 + 2 * 16 + 48
    assert counts.by_part["shared_experts"] == 4 * (3 * 48 * 24 + 48)
    assert counts.idle == 4 * 4 * 3 * 48 * 40
    assert counts.flops_by_part["other"] == 2 * 3 * matrices
    assert counts.flops_by_part["attention"] == 2 * attention + 4 * 4 * 16 * 17


def test_minimax_attention_without_softmax_is_other_and_has_no_scores(counts_of):
    fields = SMALL | parsed("""
        model_type: minimax, num_local_experts: 6, block_size: 32,
        layer_types: [linear_attention, full_attention, linear_attention]
    """)
    counts = counts_of(fields, seq_len=33)
    linear = 48 * 3 * 64 + 2 * 48 * 64  # query, key and value; gate and output
    assert counts.by_part["other"] == 2 * linear
    assert counts.flops_by_part["other"] == 2 * 2 * linear
    assert counts.by_part["attention"] == SMALL_ATTENTION
    assert counts.flops_by_part["attention"] == 2 * SMALL_ATTENTION + 4 * 4 * 16 * 17


def test_laguna_has_another_number_of_heads_in_each_layer(counts_of):
    fields = SMALL | parsed("""
        model_type: laguna, num_experts: 6, shared_expert_intermediate_size: 24, sliding_window: 10,
        num_attention_heads_per_layer: [4, 6, 4],
        layer_types: [full_attention, sliding_attention, full_attention]
    """)
    counts = counts_of(fields, seq_len=40)
    few = SMALL_ATTENTION + 48 * 4  # a gate per head
    many = 2 * 48 * 96 + 2 * 48 * 32 + 48 * 6
    assert counts.by_part["attention"] == 2 * few + many
    full, windowed = 4 * 64 * sum(range(1, 41)) // 40, 4 * 96 * (sum(range(1, 11)) + 30 * 10) // 40
    assert counts.flops_by_part["attention"] == 2 * (2 * few + many) + 2 * full + windowed
    assert counts.by_part["router"] == 2 * (6 * 48 + 6)  # a bias that is a parameter


def test_jamba_counts_state_spaces_as_other_and_alternates_them_with_attention_and_experts(counts_of):
    fields = SQUARE | parsed("""
        model_type: jamba, num_hidden_layers: 4, num_experts: 3, expert_layer_period: 2,
        expert_layer_offset: 1, attn_layer_period: 4, attn_layer_offset: 2, mamba_d_state: 6,
        mamba_d_conv: 4, mamba_expand: 2, mamba_dt_rank: 5
    """)
    counts = counts_of(fields)
    matrices = 48 * 192 + 96 * (5 + 2 * 6) + 5 * 96 + 96 * 48 + 96 * 4 + 96 * 6  # the last two: conv and A
    assert counts.by_part["other"] == 3 * (matrices + 3 * 96)  # biases of conv and step, and D
    assert counts.by_part["norms"] == 4 * 2 * 48 + 3 * (5 + 6 + 6) + 48
    assert counts.by_part["attention"] == SQUARE_ATTENTION
    assert counts.by_part["dense_blocks"] == 2 * 3 * 48 * 88
    assert counts.by_part["routed_experts"] == 2 * 3 * 3 * 48 * 88
    assert counts.idle == 2 * 1 * 3 * 48 * 88
    assert counts.flops_by_part["other"] == 2 * 3 * matrices
    assert [set(layer) - {"norms"} for layer in counts.layers] == [
        {"other", "dense_blocks"},
        {"other", "router", "routed_experts"},
        {"attention", "dense_blocks"},
        {"other", "router", "routed_experts"},
    ]


def test_nemotron_h_does_one_thing_per_layer_under_one_name(counts_of):
    fields = SMALL | parsed("""
        model_type: nemotron_h, layers_block_type: [linear_attention, moe, full_attention, mlp],
        num_hidden_layers: 4, n_routed_experts: 5, n_shared_experts: 1,
        moe_shared_expert_intermediate_size: 56, moe_latent_size: null, n_group: 1, topk_group: 1,
        mamba_num_heads: 4, mamba_head_dim: 24, n_groups: 2, ssm_state_size: 6, conv_kernel: 4,
        use_conv_bias: true
    """)
    counts = counts_of(fields)
    inner, states = 4 * 24, 2 * 2 * 6
    mamba = 48 * (2 * inner + states + 4) + (inner + states) * (4 + 1) + 3 * 4 + inner * 48
    assert counts.layers == (
        {"norms": 48 + inner, "other": mamba},
        {
            "norms": 48,
            "router": 5 * 48 + 5,
            "routed_experts": 5 * 2 * 48 * 40,  # no gate: up and down only
            "shared_experts": 2 * 48 * 56,
        },
        {"attention": SMALL_ATTENTION, "norms": 48},
        {"norms": 48, "dense_blocks": 2 * 48 * 88},
    )


def test_granitemoeshared_calls_its_shared_expert_an_mlp(counts_of):
    fields = {"model_type": "granitemoeshared", "num_local_experts": 7, "shared_intermediate_size": 72}
    counts = counts_of(SQUARE | fields)
    assert counts.by_part["shared_experts"] == 3 * 3 * 48 * 72
    assert counts.by_part["routed_experts"] == 3 * 7 * 3 * 48 * 88
    assert counts.idle == 3 * 5 * 3 * 48 * 88
    layer = SQUARE_ATTENTION + 2 * 48 + 7 * 48 + 3 * 48 * 72 + 7 * 3 * 48 * 88
    assert counts.total == 3 * layer + 48 + 2 * 211 * 48


def test_an_mlp_called_shared_is_a_dense_block_where_there_are_no_experts_to_share_with(counts_of):
    fields = SQUARE | parsed("""
        model_type: granitemoehybrid, num_local_experts: 0, num_experts_per_tok: 0, mamba_n_heads: 4,
        shared_intermediate_size: 72, layer_types: [full_attention, full_attention, full_attention]
    """)
    counts = counts_of(fields)
    assert counts.by_part["dense_blocks"] == 3 * 3 * 48 * 72
    assert counts.idle == 0
    assert "shared_experts" not in counts.by_part


def test_lfm2_moe_mixes_with_convolutions_and_holds_its_router_bias_in_the_block(counts_of):
    fields = SQUARE | parsed("""
        model_type: lfm2_moe, num_experts: 5, use_expert_bias: true, num_dense_layers: 1, conv_L_cache: 3,
        layer_types: [conv, full_attention, conv], tie_word_embeddings: true
    """)
    counts = counts_of(fields)
    assert counts.by_part["other"] == 2 * (48 * 3 * 48 + 48 * 48 + 48 * 3)
    assert counts.by_part["attention"] == SQUARE_ATTENTION
    assert counts.by_part["router"] == 2 * (5 * 48 + 5)
    assert counts.by_part["dense_blocks"] == 3 * 48 * 88
    assert counts.idle == 2 * 3 * 3 * 48 * 40


def test_hunyuan_lists_its_experts_per_token_layer_by_layer(counts_of):
    fields = SMALL | {"model_type": "hunyuan_v1_moe", "num_experts": 6, "moe_topk": [1, 2, 5]}
    del fields["num_experts_per_tok"]
    counts = counts_of(fields)
    assert counts.by_part["routed_experts"] == 3 * 6 * 3 * 48 * 88
    assert counts.idle == (5 + 4 + 1) * 3 * 48 * 88
    assert counts.by_part["shared_experts"] == 3 * 3 * 48 * 88
    assert counts.by_part["router"] == 3 * 6 * 48


def test_gemma4_has_experts_beside_a_dense_block_and_an_embedding_per_layer(counts_of):
    fields = SMALL | parsed("""
        model_type: gemma4_text, num_hidden_layers: 2, layer_types: [sliding_attention, full_attention],
        sliding_window: 10, global_head_dim: 32, enable_moe_block: true, num_experts: 6, top_k_experts: 2,
        hidden_size_per_layer_input: 8, vocab_size_per_layer_input: 101, num_kv_shared_layers: 0,
        tie_word_embeddings: true
    """)
    del fields["num_experts_per_tok"]
    counts = counts_of(fields, seq_len=40)
    assert counts.by_part["embedding"] == 211 * 48 + 101 * 2 * 8
    assert counts.by_part["dense_blocks"] == 2 * 3 * 48 * 88
    assert counts.by_part["routed_experts"] == 2 * 6 * 3 * 48 * 40
    assert counts.idle == 2 * 4 * 3 * 48 * 40
    assert counts.by_part["router"] == 2 * (6 * 48 + 48 + 6)  # a scale per channel and one per expert
    assert counts.by_part["other"] == 48 * 2 * 8 + 2 * 2 * 48 * 8
    sliding, full = SMALL_ATTENTION, 2 * SMALL_ATTENTION  # heads of the second are twice as wide
    assert counts.by_part["attention"] == sliding + full
    scores = 4 * 4 * 16 * (sum(range(1, 11)) + 30 * 10) // 40 + 4 * 4 * 32 * sum(range(1, 41)) // 40
    assert counts.flops_by_part["attention"] == 2 * (sliding + full) + scores


def test_doge_keeps_an_expert_in_each_row_of_two_embeddings(counts_of):
    fields = {"model_type": "doge", "is_moe": True, "num_experts": 64, "num_experts_per_tok": 5}
    counts = counts_of(SQUARE | fields)
    assert counts.by_part["routed_experts"] == 3 * 64 * 2 * 48
    assert counts.idle == 3 * 59 * 2 * 48
    assert counts.flops_by_part["routed_experts"] == 2 * 3 * 5 * 2 * 48
    assert counts.by_part["router"] == 3 * 48 * 16  # the keys of a grid of 8 x 8


def test_an_index_bounds_the_keys_that_deepseek_v32_meets(counts_of):
    fields = DEEPSEEK_V3 | parsed("""
        model_type: deepseek_v32, hidden_size: 48, intermediate_size: 88, moe_intermediate_size: 40,
        num_attention_heads: 4, num_key_value_heads: 4, num_hidden_layers: 2, first_k_dense_replace: 1,
        n_routed_experts: 8, n_group: 1, topk_group: 1, num_experts_per_tok: 2, q_lora_rank: 20,
        kv_lora_rank: 12, qk_nope_head_dim: 10, qk_rope_head_dim: 6, v_head_dim: 14, index_n_heads: 3,
        index_head_dim: 16, index_topk: 7, vocab_size: 211
    """)
    counts = counts_of(fields, seq_len=20)
    latent = 48 * 20 + 20 * 4 * 16 + 48 * (12 + 6) + 12 * 4 * (10 + 14) + 4 * 14 * 48
    index = 20 * 3 * 16 + 48 * 16 + 48 * 3
    assert counts.by_part["attention"] == 2 * (latent + index)
    scores = 2 * 4 * (16 + 14) * (sum(range(1, 8)) + 13 * 7) // 20
    assert counts.flops_by_part["attention"] == 2 * (2 * (latent + index) + scores)


def test_sequences_are_no_longer_than_the_model_takes(counts_of):
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9}
    assert counts_of(gpt2 | {"n_positions": 1024}, seq_len=None).seq_len == 1024
    assert counts_of(gpt2 | {"n_positions": 8192}, seq_len=None).seq_len == 4096
    assert counts_of(DEEPSEEK_MOE | {"max_position_embeddings": 512}, seq_len=None).seq_len == 512


def test_a_dense_model_has_no_idle_parameters_and_learned_positions_are_embeddings(counts_of):
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    counts = counts_of(gpt2 | {"vocab_size": 50257}, seq_len=1023)
    assert counts.total == counts.active_all == 124_439_808
    assert counts.by_part["embedding"] == 50257 * 768 + 1024 * 768
    assert counts.by_part["attention"] == 12 * (4 * 768 * 768 + 4 * 768)
    assert counts.by_part["dense_blocks"] == 12 * (8 * 768 * 768 + 5 * 768)
    assert counts.flops_by_part == {
        "attention": 12 * (2 * 4 * 768 * 768 + 4 * 768 * 512),
        "dense_blocks": 2 * 12 * 8 * 768 * 768,
        "head": 2 * 50257 * 768,
    }


class MadeUpConfig(transformers.PretrainedConfig):
    """Of a model that no table can know."""

    model_type = "made_up"
    vocab_size: int = 90
    hidden_size: int = 12
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_experts_per_tok: int | None = 2


class Bank(nn.Module):
    """Experts stacked in one tensor, in a class whose name does not say so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 12, 20))
        self.router = nn.Linear(12, 5)


class Listed(nn.Module):
    """Experts as a list of modules, beside shared ones; two classes of its router are no experts."""

    def __init__(self):
        super().__init__()
        self.shared_experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(9))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 12)) for _ in range(4))
        self.gate = nn.Linear(12, 6, bias=False)


class Layer(nn.Module):
    def __init__(self, feed_forward):
        super().__init__()
        self.feed_forward = feed_forward
        self.table = nn.Embedding(7, 12)  # looked up


class MadeUpForCausalLM(transformers.PreTrainedModel):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(Bank()), Layer(Listed())])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@pytest.fixture(scope="module")
def made_up():
    transformers.AutoConfig.register("made_up", MadeUpConfig)
    transformers.AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)
    return {"model_type": "made_up"}


def test_an_unknown_models_experts_are_found_by_structure_stacked_or_listed(counts_of, made_up):
    counts = counts_of(made_up)
    pair = 12 * 30 + 30 + 30 * 12 + 12
    assert counts.layers == (
        {"router": 12 * 5 + 5, "routed_experts": 5 * 12 * 20, "other": 7 * 12},
        {"router": 12 * 6, "routed_experts": 4 * pair, "shared_experts": 9 * (12 * 12 + 12), "other": 7 * 12},
    )
    assert counts.idle == 3 * 12 * 20 + 2 * pair
    assert counts.flops_by_part["routed_experts"] == 2 * (2 * 12 * 20 + 2 * 2 * 12 * 30)
    assert "other" not in counts.flops_by_part


WITH_TOP_K_EXPERTS = {  # and the parameters of the router that are lost on the way
    "mixtral": (MIXTRAL, {"num_local_experts": 2}, 32 * 6 * 4096),
    "qwen3": (QWEN3, {"num_experts": 8}, 48 * 120 * 2048),
    "v3": (DEEPSEEK_V3, {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}, 58 * 248 * (7168 + 1)),
    "dbrx": (DBRX, {"ffn_config": DBRX["ffn_config"] | {"moe_num_experts": 4}}, 40 * 12 * 6144),
}


@pytest.mark.parametrize("model", WITH_TOP_K_EXPERTS)
def test_active_parameters_are_those_of_the_model_with_only_the_experts_that_a_token_meets(counts_of, model):
    fields, fewer, lost = WITH_TOP_K_EXPERTS[model]
    small = counts_of(fields | fewer)
    assert small.idle == 0
    assert counts_of(fields).active_all == small.total + lost


REAL = {  # fields, and the heads and their widths in scores and values
    "mixtral": (SMALL | {"model_type": "mixtral", "num_local_experts": 6}, 4, 16, 16),
    "qwen2_moe": (
        SQUARE | {"model_type": "qwen2_moe", "num_experts": 6, "shared_expert_intermediate_size": 24},
        *(3, 16, 16),
    ),
    "gpt_oss": (
        SMALL | {"model_type": "gpt_oss", "num_local_experts": 6, "layer_types": ["full_attention"] * 3},
        *(4, 16, 16),
    ),
    "deepseek_v3": (
        SMALL
        | parsed("""
            model_type: deepseek_v3, head_dim: 6, num_key_value_heads: 4, n_routed_experts: 6,
            n_shared_experts: 2, n_group: 1, topk_group: 1, first_k_dense_replace: 1, q_lora_rank: 20,
            kv_lora_rank: 12, qk_nope_head_dim: 10, qk_rope_head_dim: 6, v_head_dim: 14
        """),
        *(4, 16, 14),
    ),
}


@pytest.mark.parametrize("family", REAL)
def test_forward_flops_equal_those_that_torch_counts_in_a_real_model(counts_of, family):
    fields, n_heads, qk_dim, v_dim = REAL[family]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 211, (2, 32)), use_cache=False)
    # Eager attention computes the square that the mask then hides: 32 keys, where (32 + 1) / 2 are met.
    hidden = 3 * n_heads * (qk_dim + v_dim) * (2 * 32 - 33)
    assert counter.get_total_flops() / (2 * 32) - hidden == counts_of(fields, 32).flops_per_token_forward


BAD = {  # the content of config.json, None for none; and a piece of the message
    "no file": (None, "no such file"),
    "not JSON": ("{", "JSONDecodeError"),
    "not text": (b"\xff\xfe\x00", "UnicodeDecodeError"),
    "JSON of another kind": ([1], "causal language model"),
    "nested beyond reason": ("[" * 100_000, "RecursionError"),
    "no model type": ({}, "no model_type None"),
    "an unknown model type": ({"model_type": "made_down"}, "no model_type 'made_down'"),
    "a model type of the wrong type": ({"model_type": ["mixtral"]}, "TypeError"),
    "an encoder and decoder": ({"model_type": "t5"}, "no causal language model"),
    "an encoder and decoder that sees": ({"model_type": "florence2"}, "no causal language model"),
    "no language model": ({"model_type": "vit"}, "no causal language model"),
    "a width of the wrong type": (MIXTRAL | {"hidden_size": "wide"}, "expected int, got str"),
    "a negative width": (MIXTRAL | {"hidden_size": -4096}, "negative dimension"),
    "an impossible width": (MIXTRAL | {"hidden_size": 10**30}, "cannot count"),
    "no heads": (MIXTRAL | {"num_attention_heads": 0}, "ZeroDivisionError"),
    "no vocabulary": (MIXTRAL | {"vocab_size": 0}, "no vocabulary"),
    "a null where a number belongs": (MIXTRAL | {"num_hidden_layers": None}, "got NoneType"),
    "layer types that do not match": (QWEN3 | {"layer_types": ["full_attention"]}, "layer_types"),
    "a window of no keys": (MIXTRAL | {"sliding_window": -1}, "window of -1"),
    "more experts per token than experts": (MIXTRAL | {"num_experts_per_tok": 9}, "9 of 8 experts"),
    "experts but no number per token": (DEEPSEEK_V3 | {"num_experts_per_tok": None}, "num_experts_per_tok"),
    "DeepSeek-MoE without a field": (
        {"model_type": "deepseek", "moe_layer_freq": 1},
        "KeyError: 'hidden_size'",
    ),
    "DeepSeek-MoE with a wrong field": (DEEPSEEK_MOE | {"hidden_size": "wide"}, "model.d_model"),
    "DeepSeek-MoE of another pattern": (DEEPSEEK_MOE | {"moe_layer_freq": 2}, "moe_layer_freq"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_counted_is_refused_in_one_line(tmp_path, capfd, case):
    content, expected = BAD[case]
    file = tmp_path / "config.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        count_huggingface(str(tmp_path), 64)
    message = str(caught.value)
    assert message.startswith("--hf: ")
    assert expected in message
    assert "\n" not in message
    assert "; " in message  # the fix
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, file in {
        "nowhere/mixtral.json": "nowhere/mixtral.json",
        "nowhere": "nowhere",
        "empty": "empty/config.json",
    }.items():
        with pytest.raises(ConfigError, match=f"^--hf: no such file: {tmp_path}/{file}; give a config.json"):
            count_huggingface(f"{tmp_path}/{source}")


def test_the_number_of_experts_per_token_is_never_guessed(counts_of, made_up):
    with pytest.raises(ConfigError, match="a token uses None of 5 experts; set num_experts_per_tok"):
        counts_of(made_up | {"num_experts_per_tok": None})


def test_a_name_that_the_hub_does_not_answer_for_is_refused_at_once():
    with pytest.raises(
        ConfigError, match=r"cannot count nobody/nothing \(.*\); give a config.json"
    ) as caught:
        count_huggingface("nobody/nothing", 64)
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_fetched_and_kept_as_the_name(monkeypatch, tmp_path):
    import huggingface_hub

    class Hub:
        def model_info(self, name, timeout):
            assert name == "some/mixtral"

    def fetch(name, file):
        (tmp_path / file).write_text(json.dumps(MIXTRAL), encoding="utf-8")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    counts = count_huggingface("some/mixtral", 64)
    assert (counts.name, counts.total) == ("some/mixtral", 46_702_792_704)


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch, counts_of):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"^--hf: this needs transformers; pip install -e '\.\[hf\]'$"):
        counts_of(MIXTRAL)
    assert counts_of(DEEPSEEK_MOE).total == 16_375_728_128  # this one does not


def test_a_folder_and_a_file_of_another_name_count_the_same_and_nothing_is_printed(tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3), encoding="utf-8")
    (tmp_path / "v3.json").write_text(json.dumps(DEEPSEEK_V3), encoding="utf-8")
    folder, file = count_huggingface(str(tmp_path), 64), count_huggingface(str(tmp_path / "v3.json"), 64)
    assert (folder.name, file.name) == (tmp_path.name, "v3")
    assert (folder.by_part, folder.flops_by_part) == (file.by_part, file.flops_by_part)
    assert capfd.readouterr() == ("", "")


def test_layers_embedding_head_and_final_norm_make_up_every_part(counts_of):
    counts = counts_of(DEEPSEEK_V3)
    outside = Counter(embedding=129280 * 7168, head=129280 * 7168, norms=7168)
    assert sum(map(Counter, counts.layers), outside) == Counter(counts.by_part)


def run(script, *arguments):
    """The last line that a process of its own prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_the_module_imports_neither_torch_nor_transformers():
    assert (
        run("import sys, moe.accounting.huggingface; print({'torch', 'transformers'} & set(sys.modules))")
        == "set()"
    )


MEASURE = """
import resource, sys, time
from moe.accounting.huggingface import count_huggingface
count_huggingface(sys.argv[1], 4096)
for source in sys.argv[1:]:
    start = time.perf_counter()
    print(count_huggingface(source, 4096).total, time.perf_counter() - start, end=" ")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, end=" ")
"""


@pytest.mark.slow
def test_a_trillion_parameters_take_no_more_memory_and_hardly_more_time_than_a_few(tmp_path):
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_text(json.dumps(REAL["deepseek_v3"][0]), encoding="utf-8")
    large.write_text(json.dumps(DEEPSEEK_V3 | {"n_routed_experts": 384}), encoding="utf-8")
    few, seconds_few, peak_few, many, seconds_many, peak_many = map(float, run(MEASURE, small, large).split())
    assert (few, many) == pytest.approx((1.3e5, 1e12), rel=0.2)
    assert peak_many - peak_few < 64  # MiB; 1e12 parameters in bf16 are two million
    assert seconds_many - seconds_few < 5
