"""Initial weights: functions of the seed and of names, of the scales that the docstring says."""

import pytest
import torch

from moe.config import MoEConfig, parse_config
from moe.model.initialization import init_weights
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from moe.model.transformer import Transformer
from tests.support.models import SMALL, block_of, make_model, moe_of


def test_experts_differ_at_init_and_do_not_depend_on_how_many_there_are():
    few, many = make_model(), make_model(moe={"num_experts": 8})
    for layer in range(3):
        weights = moe_of(few, layer).experts.w_up
        assert all(not torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))
        assert torch.equal(weights, moe_of(many, layer).experts.w_up[:4])
    assert not torch.equal(moe_of(few, 0).experts.w_up[0], moe_of(few, 1).experts.w_up[0])
    assert torch.equal(block_of(few, 2).attention.query.weight, block_of(many, 2).attention.query.weight)
    other = make_model(seed=1)
    assert not torch.equal(few.embedding.weight, other.embedding.weight)


def test_initial_scales_are_those_of_the_docstring():
    model = make_model(
        model={"d_model": 256, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 500}, moe={"d_ff_expert": 512}
    )
    cut = 0.9866  # standard deviation of a unit normal cut at three sigma
    ffn, attention = moe_of(model, 0), block_of(model, 0).attention
    residual = 1 / (2 * 3) ** 0.5
    for weight, std in (
        (model.embedding.weight, 0.02),
        (ffn.router.weight, 0.02),
        (attention.query.weight, 1 / 16),
        (attention.output.weight, residual / 16),
        (ffn.experts.w_up, 1 / 16),
        (ffn.experts.w_down, residual / 512**0.5),
    ):
        assert weight.std().item() == pytest.approx(std * cut, rel=0.05)
        assert 2.5 * std < weight.abs().max() <= 3.0001 * std
    assert (block_of(model, 0).ffn_norm.weight == 1).all()


def test_a_model_is_initialized_from_the_seed_of_its_run():
    config = parse_config(SMALL | {"run": {"seed": 7}})
    made, again = Transformer(config), Transformer(parse_config(SMALL))
    assert not torch.equal(made.embedding.weight, again.embedding.weight)
    init_weights(again, 7)
    for (name, weight), other in zip(made.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_layer_alone_is_initialized_from_its_seed():
    moe = MoEConfig(num_experts=4, top_k=2, d_ff_expert=24)
    first, same, other = (MoELayer(16, moe, seed=seed) for seed in (0, 0, 1))
    for (name, weight), twin in zip(first.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, twin), name
        assert weight.std() > 0, name
    assert not torch.equal(first.router.weight, other.router.weight)
    for seed in ("0", 1.5):
        with pytest.raises(ValueError, match="seed should be an integer, got "):
            MoELayer(16, moe, seed=seed)  # pyright: ignore[reportArgumentType]


def test_without_a_seed_layers_start_as_linear_maps_from_pytorchs_random_numbers():
    moe = MoEConfig(num_experts=4, top_k=2, d_ff_expert=64, num_shared_experts=1)
    layers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layers += [MoELayer(16, moe), MoELayer(16, moe)]
    first, stacked, again, _, other, _ = (dict(layer.named_parameters()) for layer in layers)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert not torch.equal(weight, stacked[name]), name
        assert not torch.equal(weight, other[name]), name
        bound = (64 if name.endswith("w_down") else 16) ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound, name
    torch.manual_seed(0)
    router = Router(16, MoEConfig(num_experts=4, top_k=2))
    assert torch.equal(router.weight, first["router.weight"])


def test_on_the_meta_device_nothing_is_filled_in():
    with torch.device("meta"):
        model = Transformer(parse_config(SMALL))
    assert all(weight.is_meta for weight in model.parameters())
