"""Attention against its definition, one query and one head at a time."""

import math

import pytest
import torch

from moe.config import ModelConfig
from moe.model.attention import Attention, apply_rotary, rotary_tables
from moe.model.initialization import init_weights


def plain_attention(layer, hidden, model):
    """Attention from its definition: one query, one head, one complex rotation at a time."""
    batch, length, _ = hidden.shape
    q_heads, kv_heads, width = model.n_heads, model.n_kv_heads, model.head_dim
    weights = {name: parameter.double() for name, parameter in layer.named_parameters()}

    def heads_of(name, count):
        return (hidden.double() @ weights[f"{name}.weight"].T).reshape(batch, length, count, width)

    def norm(x, name):
        if not model.qk_norm:
            return x
        over = -1 if model.qk_norm_scope == "head" else (-2, -1)
        weight = weights[f"{name}_norm.weight"].reshape(-1, width)
        return x / (x.square().mean(over, keepdim=True) + 1e-5).sqrt() * weight

    def rotate(x):  # pairs (i, i + width / 2) as complex numbers, times exp(i * position * theta^(-2i/width))
        half = width // 2
        numbers = torch.complex(x[..., :half], x[..., half:])
        frequencies = torch.tensor(
            [model.rope_theta ** (-2 * i / width) for i in range(half)], dtype=torch.float64
        )
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    query = rotate(norm(heads_of("query", q_heads), "query"))
    key = rotate(norm(heads_of("key", kv_heads), "key"))
    value = heads_of("value", kv_heads)
    out = torch.zeros(batch, length, q_heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(q_heads):
            group = h // (q_heads // kv_heads)
            for t in range(length):
                scores = key[b, : t + 1, group] @ query[b, t, h] / math.sqrt(width)
                out[b, t, h] = scores.softmax(0) @ value[b, : t + 1, group]
    return out.reshape(batch, length, -1) @ weights["output.weight"].T


@pytest.mark.parametrize(
    "settings",
    [
        {"n_kv_heads": 4},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "qk_norm": True},
        {"n_kv_heads": 2, "qk_norm": True, "qk_norm_scope": "all_heads"},
        {"head_dim": 16, "n_kv_heads": 2},
    ],
    ids=["multi-head", "grouped", "multi-query with qk-norm", "norm over all heads", "wide heads"],
)
def test_attention_equals_a_plain_implementation(settings):
    model = ModelConfig(d_model=32, n_heads=4, **settings)
    layer = Attention(model)
    init_weights(layer, 0)
    for name, parameter in layer.named_parameters():
        if "norm" in name:  # with equal weights the norm would commute with the rotation
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    hidden = torch.randn(2, 7, 32)
    got = layer(hidden, rotary_tables(torch.arange(7), model.head_dim, model.rope_theta))
    torch.testing.assert_close(got.double(), plain_attention(layer, hidden, model), rtol=1e-4, atol=1e-5)


def test_rotated_scores_depend_on_the_distance_only():
    cos, sin = rotary_tables(torch.arange(40), 8, 10_000.0)
    query, key = torch.randn(8), torch.randn(8)

    def score(t, s):
        turned = [
            apply_rotary(x.view(1, 1, 1, 8), (cos[p : p + 1], sin[p : p + 1]))
            for x, p in ((query, t), (key, s))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(37, 34), rtol=1e-4, atol=1e-4)


def test_positions_keep_fp32_precision_under_bf16():
    cos, sin = rotary_tables(torch.arange(2048), 8, 10_000.0)
    heads = torch.ones(1, 1, 2048, 8, dtype=torch.bfloat16)
    turned = apply_rotary(heads, (cos, sin))
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[0, 0, 2000], turned[0, 0, 2001])


def test_rotation_of_bf16_heads_rounds_once():
    torch.manual_seed(0)
    heads = torch.randn(1, 2, 300, 16, dtype=torch.bfloat16)
    cos, sin = (table.double() for table in rotary_tables(torch.arange(300), 16, 10_000.0))
    first, second = heads.double().chunk(2, dim=-1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).bfloat16()
    rotated = apply_rotary(heads, rotary_tables(torch.arange(300), 16, 10_000.0))
    assert rotated.dtype == torch.bfloat16
    assert (rotated == expected).float().mean() > 0.999  # all but ties of the last bit
