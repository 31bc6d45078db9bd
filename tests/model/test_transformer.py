"""The decoder: causality, recomputation, where its MoE layers are, compilation, and devices that we lack."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.accounting.counts import count_parameters
from moe.config import MoEConfig, load_config, parse_config
from moe.model import losses
from moe.model.attention import rotary_tables
from moe.model.experts import SwiGLU
from moe.model.transformer import Transformer
from moe.training.loss import training_loss
from tests.support.models import SMALL, block_of, gradient_of, make_model, moe_of, on_fake_cuda
from tests.support.paths import CONFIGS


def loss_and_gradients(model, tokens):
    """Of the training loss; and the report of the MoE layers."""
    loss, _, aux = training_loss(model(tokens[:, :-1]), tokens[:, 1:], MoEConfig())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: gradient_of(p).clone() for name, p in model.named_parameters()}, aux


@pytest.mark.parametrize("moe", [{}, {"num_experts": 1, "top_k": 1}, {"capacity_factor": 0.5}], ids=str)
def test_a_later_token_never_changes_an_earlier_logit(moe):
    model = make_model(moe=moe).eval()
    tokens = torch.randint(0, 50, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-5, atol=1e-6)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_activation_checkpointing_changes_no_loss_gradient_or_count(capacity_factor):
    tokens = torch.randint(0, 50, (2, 20))
    results = []
    for on in (False, True):
        model = make_model(moe={"capacity_factor": capacity_factor}, train={"activation_checkpointing": on})
        with torch.no_grad():
            moe_of(model, 1).router.weight.zero_()  # exact ties in one layer
        results.append(loss_and_gradients(model, tokens))
    (loss_off, grads_off, aux_off), (loss_on, grads_on, aux_on) = results
    assert torch.equal(loss_off, loss_on)
    assert torch.equal(aux_off.tokens_per_expert, aux_on.tokens_per_expert)
    assert torch.equal(aux_off.dropped_tokens, aux_on.dropped_tokens)
    for name, gradient in grads_off.items():
        torch.testing.assert_close(grads_on[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_runs_each_block_once_more_in_the_backward_pass(on):
    model, calls = make_model(train={"activation_checkpointing": on}), []
    block_of(model, 0).attention.register_forward_hook(lambda *_: calls.append(1))
    loss_and_gradients(model, torch.randint(0, 50, (2, 20)))
    assert len(calls) == (2 if on else 1)
    model.eval()(torch.randint(0, 50, (2, 20)))
    assert len(calls) == (3 if on else 2)


def test_every_parameter_gets_a_finite_gradient():
    model = make_model(
        moe={"num_shared_experts": 1, "first_dense_layers": 1},
        model={"tie_embeddings": False, "qk_norm": True},
    )
    _, gradients, _ = loss_and_gradients(model, torch.randint(0, 50, (4, 30)))
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, True), (4, True)])
def test_cross_entropy_alone_teaches_every_router(top_k, normalize):
    model = make_model(moe={"top_k": top_k, "normalize_gate_weights": normalize})
    tokens = torch.randint(0, 50, (2, 20))
    F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer in range(len(model.blocks)):
        assert gradient_of(moe_of(model, layer).router.weight).abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_adds_each_part_of_a_norm_to_the_residual_and_norms_once_more_before_the_head(tied):
    torch.manual_seed(0)
    model = make_model(model={"tie_embeddings": tied}, moe={"first_dense_layers": 1})
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    tokens = torch.randint(0, 50, (2, 9))

    def norm(hidden, weight):
        return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    hidden = model.embedding.weight[tokens]
    rotary = rotary_tables(torch.arange(9), 8, 10_000.0)
    for layer in range(3):
        block = block_of(model, layer)
        hidden = hidden + block.attention(norm(hidden, block.attention_norm.weight), rotary)
        result = block.ffn(norm(hidden, block.ffn_norm.weight))
        hidden = hidden + (result if layer == 0 else result[0])
    head = model.embedding.weight if model.head is None else model.head.weight
    expected = norm(hidden, model.final_norm.weight) @ head.T
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_moe_layers_are_every_nth_after_the_first_dense_ones():
    model = make_model(model={"n_layers": 7}, moe={"first_dense_layers": 1, "every_n_layers": 2})
    assert [hasattr(block.ffn, "router") for block in model.blocks] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
    ]


def test_one_expert_is_the_dense_model_without_a_router():
    model = make_model(moe={"num_experts": 1, "top_k": 1, "d_ff_expert": 48})
    ffn = block_of(model, 0).ffn
    assert isinstance(ffn, SwiGLU)
    assert {name for name, _ in ffn.named_parameters()} == {"w_gate", "w_up", "w_down"}
    assert ffn.w_up.shape == (32, 48)
    assert model(torch.randint(0, 50, (1, 5))).aux is None


def test_tied_head_is_the_embedding():
    tied, untied = make_model(), make_model(model={"tie_embeddings": False})
    assert tied.head is None
    assert untied.head is not None
    assert untied.head.weight.shape == tied.embedding.weight.shape
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


@pytest.mark.parametrize("capacity", ["null", "1.25"])
@pytest.mark.parametrize("name", ["small_1gpu.yaml", "base_8gpu.yaml"])
def test_the_gpu_models_forward_meets_no_device_dtype_or_sync_error_on_fake_cuda(name, capacity):
    settings = [
        "model.vocab_size=50304",
        "train.activation_checkpointing=false",
        f"moe.capacity_factor={capacity}",
    ]
    config = load_config(CONFIGS / name, settings)
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_cuda(lambda: Transformer(config, expert_path="grouped_mm"), torch.bfloat16)
        tokens = torch.zeros(2, config.data.seq_len, dtype=torch.int64, device="cuda")
        logits, aux, _ = model(tokens)
    assert logits.shape == (2, config.data.seq_len, 50304)
    assert (logits.device.type, logits.dtype) == ("cuda", torch.bfloat16)
    assert (aux.router_z_loss.device.type, aux.router_z_loss.dtype) == ("cuda", torch.float32)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_the_rotary_angles_are_those_of_the_configured_theta(theta):
    """Position times theta^(-2 i / Q): a model of another theta with the same weights says something else."""
    model, tokens = make_model(model={"rope_theta": theta}), torch.arange(20).unsqueeze(0)
    seen = []
    block_of(model, 0).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    logits = model(tokens).logits
    assert not torch.allclose(logits, make_model()(tokens).logits, atol=1e-4)
    [(cosines, sines)] = seen
    angles = [[position * theta ** (-2 * i / 8) for i in range(4)] for position in range(20)]
    torch.testing.assert_close(cosines, torch.tensor(angles).cos())
    torch.testing.assert_close(sines, torch.tensor(angles).sin())


def test_fake_cuda_would_notice_a_host_sync():
    with FakeTensorMode(), torch.no_grad():
        model = on_fake_cuda(lambda: Transformer(parse_config(SMALL), expert_path="loop"), torch.bfloat16)
        with pytest.raises(Exception, match=r"data-dependent|DataDependent|aten\._local_scalar_dense"):
            model(torch.zeros(1, 8, dtype=torch.int64, device="cuda"))


@pytest.mark.slow
def test_torch_compile_gives_the_same_loss_and_gradients(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # see conftest.py
    tokens = torch.randint(0, 50, (2, 20))
    plain, compiled = make_model(model={"n_layers": 1}), make_model(model={"n_layers": 1})
    for block in compiled.blocks:
        block.compile()
    loss, gradients, _ = loss_and_gradients(plain, tokens)
    compiled_loss, compiled_gradients, _ = loss_and_gradients(compiled, tokens)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_of_documents_gives_the_same_losses_whatever_shares_the_batch():
    model = make_model().eval()
    tokens = torch.randint(0, 50, (3, 20))
    together = model(tokens).logits
    alone = torch.cat([model(row[None]).logits for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_with_targets_the_output_is_their_cross_entropy_with_the_same_gradients(monkeypatch, tied):
    """In chunks of 8 of the 30 tokens, one of which is not counted."""
    model = make_model(model={"tie_embeddings": tied})
    tokens = torch.randint(0, model.embedding.num_embeddings, (3, 11))
    targets = tokens[:, 1:].clone()
    targets[1, 4] = -100
    F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    expected = {name: gradient_of(parameter).clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 8 * model.embedding.num_embeddings)
    output = model(tokens[:, :-1], targets=targets)
    assert output.logits is None
    output.nats.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient_of(parameter), expected[name], rtol=1e-4, atol=1e-5, msg=name)
