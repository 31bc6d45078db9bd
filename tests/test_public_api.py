"""What `from moe import ...` gives: a layer for anyone's model, a model, and a trained run."""

import importlib.metadata
import importlib.resources
import subprocess
import sys

import pytest
import torch

import moe
from moe import (
    Config,
    MoEConfig,
    MoELayer,
    Sampling,
    Transformer,
    count_parameters,
    generate,
    load_config,
    load_run,
    training_loss,
)
from tests.support.models import SMALL
from tests.support.paths import TINY

NAMES = [(home, name) for home, names in moe._HOMES.items() for name in names]


@pytest.mark.parametrize(("home", "name"), NAMES)
def test_every_public_name_is_that_of_its_home(home, name):
    assert getattr(moe, name) is getattr(importlib.import_module(home), name)


def test_all_public_names_are_listed_and_come_with_a_star():
    assert sorted(moe.__all__) == sorted(name for _, name in NAMES)
    assert {*moe.__all__} <= {*dir(moe)}
    names: dict[str, object] = {}
    exec("from moe import *", names)
    assert names.keys() >= {*moe.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moe' has no attribute 'Layer'"):
        _ = moe.Layer  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_moe_imports_no_torch():
    script = "import sys, moe; moe.count_parameters; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_all_of_it_works_without_deepspeed():
    script = """
import sys
import torch
import moe
for names in moe._HOMES.values():
    for name in names:
        getattr(moe, name)
layer = moe.MoELayer(16, moe.MoEConfig(num_experts=4, top_k=2, d_ff_expert=32))
layer(torch.randn(1, 5, 16))[0].sum().backward()
assert "deepspeed" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_layer_in_a_plain_pytorch_loop_learns():
    """Each token is mapped to itself, permuted; its router is balanced by the report's loss."""
    torch.manual_seed(0)
    layer = MoELayer(d_model=16, moe=MoEConfig(num_experts=4, top_k=2, d_ff_expert=32))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    hidden = torch.randn(8, 10, 16)
    target = hidden.flip(-1)
    losses = []
    for _ in range(60):
        output, aux = layer(hidden)
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * aux.load_balancing_loss + 0.001 * aux.router_z_loss).backward()
        optimizer.step()
        losses.append(loss.item())
        assert aux.tokens_per_expert.sum() == 8 * 10 * 2
    assert losses[-1] < 0.2 * losses[0]


def test_a_transformer_in_a_plain_pytorch_loop_learns():
    config = load_config(TINY, ["model.vocab_size=50", "model.d_model=32", "model.n_layers=2"])
    assert isinstance(config, Config)
    model, tokens = Transformer(config), torch.randint(0, 50, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = training_loss(model(tokens[:, :-1]), tokens[:, 1:], config.moe)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.lm.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "moe_settings", [{}, {"num_experts": 1, "top_k": 1}, {"num_shared_experts": 2}], ids=str
)
def test_the_count_is_that_of_the_models_parameters(moe_settings):
    config = moe.config.parse_config(SMALL | {"moe": SMALL["moe"] | moe_settings})
    assert count_parameters(config).total == sum(
        weight.numel() for weight in Transformer(config).parameters()
    )


def test_a_trained_run_is_loaded_and_writes_text(run_main):
    _, folder, _, _ = run_main()
    run = load_run(folder)
    assert not run.model.training
    assert (run.config.moe.num_experts, run.config.run.dir) == (4, str(folder))
    assert run.tokenizer.decode([run.end_id], skip_special_tokens=False) == "<|endoftext|>"
    sampling = Sampling(max_new_tokens=10, seed=3)
    text = generate(run, "def f(", sampling)
    assert text.startswith("def f(")
    assert len(text) > len("def f(")
    assert generate(run, "def f(", sampling) == text
    assert generate(run, sampling=sampling) != text  # a document from nothing
    with pytest.raises(moe.ConfigError, match=r"^RUN: .* is not a run folder"):
        load_run(folder / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, r"top_k \(5\) is more than num_experts \(4\)"),
        ({"num_experts": 4, "top_k": 1}, "with top_k 1 every normalized gate weight is the constant 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_value_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(16, MoEConfig(d_ff_expert=32, **settings))


@pytest.mark.parametrize(
    "hidden", [torch.zeros(5, 16), torch.zeros(1, 5, 8), torch.zeros(1, 5, 16).long()], ids=str
)
def test_an_input_of_a_wrong_shape_or_type_is_a_value_error(hidden):
    layer = MoELayer(16, MoEConfig(num_experts=4, d_ff_expert=32))
    with pytest.raises(ValueError, match=r"^hidden should be \(batch, sequence, 16\) of a float type"):
        layer(hidden)


def test_an_input_in_another_dtype_than_the_experts_is_a_value_error():
    layer = MoELayer(16, MoEConfig(num_experts=4, d_ff_expert=32))
    expected = "hidden is of torch.bfloat16 and the experts are of torch.float32; convert one of them, or use"
    with pytest.raises(ValueError, match=expected):
        layer(torch.zeros(1, 5, 16, dtype=torch.bfloat16))
    layer.bfloat16()(torch.zeros(1, 5, 16, dtype=torch.bfloat16))


def test_settings_of_another_type_are_a_value_error():
    with pytest.raises(ValueError, match="moe: should be of type MoEConfig, got Config"):
        MoELayer(16, Config())  # pyright: ignore[reportArgumentType]


def test_tokens_and_targets_of_a_wrong_shape_or_type_are_value_errors():
    config = moe.config.parse_config(SMALL)
    model, tokens = Transformer(config), torch.zeros(2, 9, dtype=torch.int64)
    for wrong in (tokens[0], tokens.float(), tokens.byte()):
        with pytest.raises(ValueError, match=r"^tokens should be \(batch, sequence\) of int64, got \("):
            model(wrong)
    with pytest.raises(ValueError, match=r"^257 tokens are more than max_seq_len \(256\)"):
        model(torch.zeros(1, 257, dtype=torch.int64))
    for token in (-1, 50):
        with pytest.raises(ValueError, match=r"should be from 0 to 49 \(model.vocab_size\), got "):
            model(tokens + token)
    output, targets = model(tokens[:, :-1]), tokens[:, 1:]
    with pytest.raises(ValueError, match=r"^targets should be \(batch, sequence\) = \(2, 8\), got \(2, 9\)"):
        training_loss(output, tokens, config.moe)
    with pytest.raises(ValueError, match=r"^targets should be of int64, got torch.int32"):
        training_loss(output, targets.int(), config.moe)
    with pytest.raises(ValueError, match=r"^output: should be of type TransformerOutput, got Tensor"):
        training_loss(output.logits, targets, config.moe)
    with pytest.raises(ValueError, match=r"^moe: should be of type MoEConfig, got Config"):
        training_loss(output, targets, config)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^config: should be of type Config, got ModelConfig"):
        Transformer(config.model)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_a_cache_of_other_sequences_or_without_room_is_a_value_error():
    model, tokens = Transformer(moe.config.parse_config(SMALL)), torch.zeros(1, 200, dtype=torch.int64)
    with pytest.raises(ValueError, match="the cache is of 3 sequences, and tokens of 1"):
        model(tokens, cache=model.new_cache(3))
    cache = model.new_cache(1)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"use it under torch.no_grad\(\)"):
        model(tokens, cache=cache)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"has room for 256 tokens \(max_seq_len\), not for 400"):
        model(tokens, cache=cache)
    assert cache.lengths.tolist() == [200]


def test_the_version_is_that_of_the_package_and_its_types_are_marked():
    assert moe.__version__ == importlib.metadata.version("gatework")
    assert importlib.resources.files("moe").joinpath("py.typed").is_file()


def test_paths_and_devices_may_be_strings(run_main):
    _, folder, _, _ = run_main()
    run = load_run(str(folder), "cpu")
    assert generate(run, "def ").startswith("def ")
    with pytest.raises(moe.ConfigError, match=r"^device: nowhere cannot be used: "):
        load_run(str(folder), "nowhere")
