"""The engine against plain torch, and the DeepSpeed internals that it relies on."""

import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.checkpoint.manifest import CheckpointError, Info
from moe.checkpoint.saving import Save, save_checkpoint
from moe.config import changed
from moe.model.transformer import Transformer
from moe.training.engine import start
from moe.training.optimizer import learning_rate, parameter_groups
from tests.support.checkpoints import newest
from tests.support.engines import batches, loss_of, make_config, make_engine, run_engine
from tests.support.models import gradient_of, moe_of

WAYS = [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")]  # ZeRO stage and precision


@pytest.fixture
def process_group():
    return start(make_config().parallel)


def full_state(engine):
    """Kind -> name -> tensor, put together from the fragments of one rank."""
    state = {}
    for kind, name, shape, first, values in engine.training_state.fragments():
        whole = state.setdefault(kind, {}).setdefault(name, torch.full(shape, float("nan")))
        whole.view(-1)[first : first + len(values)] = values
    return state


def saved(engine, folder, step, change=lambda fragments: fragments):
    save_checkpoint(Save(folder, step, {}, Info(), 1), change(engine.training_state.fragments()))
    return newest(folder)[0]


def run_plain(config, steps):
    """The same training in ten lines of torch, without DeepSpeed."""
    model = Transformer(config, expert_path="grouped_mm")
    groups = parameter_groups(model, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optim.betas)
    losses, norms = [], []
    for step in range(steps):
        tokens = batches(20)[step]
        loss = loss_of(model(tokens[:, :-1]), tokens, config)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("grad_clip", [0.5, 0.9, 0.0])  # 0.9: some steps are clipped, and some after them not
def test_engine_equals_plain_adamw_with_clipping(process_group, zero_stage, grad_clip):
    if grad_clip == 0.0:
        config = make_config(optim={"grad_clip": 0.0}, parallel={"zero_stage": zero_stage})
        plain_config = make_config(optim={"grad_clip": 1e9})
    else:
        config = plain_config = make_config(
            optim={"grad_clip": grad_clip}, parallel={"zero_stage": zero_stage}
        )
    engine = make_engine(config, process_group)
    losses, norms = run_engine(engine, config, 8)
    model, plain_losses, plain_norms = run_plain(plain_config, 8)
    assert max(plain_norms[:3]) > grad_clip, "the clipping must bite"
    assert grad_clip != 0.9 or min(plain_norms[3:]) < 0.9, "and then not"
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, plain_norms, rtol=1e-4, atol=0)
    for name, parameter in engine.module.named_parameters():
        expected = dict(model.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulation_gives_the_cross_entropy_gradient_of_the_whole_batch(process_group, precision):
    gradients = []
    for micro in (8, 2):
        parallel = {"precision": precision, "zero_stage": 2}
        config = make_config(train={"micro_batch_size": micro}, optim={"grad_clip": 0.0}, parallel=parallel)
        engine = make_engine(config, process_group)
        for part in batches(1)[0].split(micro):
            logits = engine(part[:, :-1]).logits
            assert logits is not None
            engine.backward(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()))
            engine.step(1e-3)
        gradients.append({name: moment / 0.1 for name, moment in full_state(engine)["exp_avg"].items()})
    tolerance: dict[str, Any] = {"fp32": dict(rtol=1e-3, atol=1e-7), "bf16": dict(rtol=0.1, atol=2e-3)}[
        precision
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **tolerance, msg=name)


@pytest.mark.parametrize(("zero_stage", "precision"), WAYS)
def test_training_goes_on_bit_for_bit_after_saving_and_loading(
    process_group, zero_stage, precision, tmp_path
):
    config = make_config(parallel={"zero_stage": zero_stage, "precision": precision})
    first = make_engine(config, process_group)
    run_engine(first, config, 4)
    checkpoint = saved(first, tmp_path, 4)
    expected, _ = run_engine(first, config, 4, first=4)

    second = make_engine(changed(config, {"run.seed": 99}), process_group)
    second.training_state.load(checkpoint)
    got, _ = run_engine(second, config, 4, first=4)
    assert got == expected
    for kind, named in full_state(first).items():
        for name, tensor in named.items():
            assert torch.equal(full_state(second)[kind][name], tensor), (kind, name)


def test_state_is_under_parameter_names_in_fp32_and_moments_are_those_of_adam(process_group):
    config = make_config(parallel={"precision": "bf16"})
    engine = make_engine(config, process_group)
    run_engine(engine, config, 1)
    state = full_state(engine)
    shapes = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    assert state.keys() == {"weights", "exp_avg", "exp_avg_sq"}
    for named in state.values():
        assert {name: tuple(tensor.shape) for name, tensor in named.items()} == shapes
        assert all(torch.isfinite(tensor).all() for tensor in named.values())
    # After one step exp_avg = 0.1 g and exp_avg_sq = 0.05 g^2, whatever g is.
    for name, moment in state["exp_avg"].items():
        gradient = moment / 0.1
        torch.testing.assert_close(
            state["exp_avg_sq"][name], 0.05 * gradient**2, rtol=1e-3, atol=1e-12, msg=name
        )


def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(process_group, tmp_path):
    config = make_config()
    engine = make_engine(config, process_group)
    run_engine(engine, config, 1)
    gone = ("exp_avg", "blocks.1.ffn.experts.w_up")
    checkpoint = saved(engine, tmp_path, 1, lambda all_of: (f for f in all_of if f[:2] != gone))
    before = {name: tensor.clone() for name, tensor in full_state(engine)["weights"].items()}
    run_engine(engine, config, 1)
    after = full_state(engine)["weights"]
    with pytest.raises(CheckpointError, match=r"exp_avg: missing \['blocks.1.ffn.experts.w_up'\]"):
        engine.training_state.load(checkpoint)
    for name, tensor in full_state(engine)["weights"].items():
        assert torch.equal(tensor, after[name])
        assert not torch.equal(tensor, before[name])


def test_the_norms_of_the_families_are_those_of_their_gradients(process_group):
    config = make_config(moe={"num_shared_experts": 1})
    engine = make_engine(config, process_group)
    tokens = batches(1)[0]
    engine.backward(loss_of(engine(tokens[:, :-1]), tokens, config))
    norms = engine.step(1e-3)
    model = Transformer(config, expert_path="grouped_mm")
    loss_of(model(tokens[:, :-1]), tokens, config).backward()
    families = {"router": [], "experts": [], "dense": []}
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2]
        families[part if part in families else "dense"].append(gradient_of(parameter))
    assert norms is not None
    assert norms.total > config.optim.grad_clip, "the clipping must bite"
    for family, gradients in families.items():
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert norms.families()[family] == pytest.approx(expected, rel=1e-5), family


def test_the_norm_of_a_parameter_of_many_elements_has_the_precision_of_fp32(process_group):
    """A sum of as many fp32 squares one after the other would be off by up to 1 %."""
    model = {"vocab_size": 2**18, "d_model": 64, "tie_embeddings": False}
    config = make_config(model=model, optim={"grad_clip": 0.0})
    engine = make_engine(config, process_group)
    assert engine.module.head is not None
    engine.module.head.weight.register_hook(torch.rand_like)  # else a few rows are most of the norm
    tokens = batches(1)[0][:1]
    engine.backward(loss_of(engine(tokens[:, :-1]), tokens, config))
    norms = engine.step(1e-3)
    gradients = [moment.double() / 0.1 for moment in full_state(engine)["exp_avg"].values()]
    expected = sum(gradient.square().sum().item() for gradient in gradients) ** 0.5
    assert norms is not None
    assert norms.total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("zero_stage", "precision"), WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_norm(process_group, zero_stage, precision, bad):
    config = make_config(parallel={"zero_stage": zero_stage, "precision": precision})
    engine = make_engine(config, process_group)
    moe_of(engine.module, 1).experts.w_down.register_hook(lambda gradient: gradient * bad)
    assert not math.isfinite(run_engine(engine, config, 1)[1][0])


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_is_shortened_to_the_limit_and_a_shorter_one_is_left_alone(
    process_group, zero_stage, share
):
    """Adam's first moment shows it, 0.1 g after one step; its weights hardly, as Adam divides by the size."""
    config = make_config(optim={"grad_clip": 0.0})
    model, tokens = Transformer(config), batches(1)[0]
    loss_of(model(tokens[:, :-1]), tokens, config).backward()
    gradients = {name: gradient_of(parameter) for name, parameter in model.named_parameters()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    config = make_config(optim={"grad_clip": share * norm}, parallel={"zero_stage": zero_stage})
    engine = make_engine(config, process_group)
    run_engine(engine, config, 1)
    for name, moment in full_state(engine)["exp_avg"].items():
        expected = 0.1 * min(share, 1.0) * gradients[name]
        torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-8, msg=name)


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("bf16", False)])
def test_in_fp32_adamw_updates_the_weights_themselves(process_group, precision, shared):
    config = make_config(parallel={"precision": precision})
    engine = make_engine(config, process_group)
    run_engine(engine, config, 1)
    masters = {
        values.data_ptr() for kind, *_, values in engine.training_state.fragments() if kind == "weights"
    }
    weights = {parameter.data_ptr() for parameter in engine.module.parameters()}
    assert (masters == weights) == shared


def test_every_parameter_moves_after_a_step(process_group):
    config = make_config(moe={"num_shared_experts": 1}, model={"qk_norm": True, "tie_embeddings": False})
    engine = make_engine(config, process_group)
    run_engine(engine, config, 1)
    initial = dict(Transformer(config, expert_path="grouped_mm").named_parameters())
    for name, weight in full_state(engine)["weights"].items():
        assert not torch.equal(weight, initial[name]), name


@pytest.mark.slow
def test_one_process_needs_no_launcher_compiler_or_mpi_and_deepspeed_keeps_quiet(tmp_path):
    code = textwrap.dedent("""
        import sys
        sys.modules["mpi4py"] = None
        import subprocess, torch.utils.cpp_extension as cpp
        def refuse(*_, **__): raise AssertionError("tried to compile")
        cpp.load = cpp.load_inline = refuse
        from moe.distributed.launch import leave
        from moe.training.engine import start
        from tests.support.engines import make_config, make_engine, run_engine
        config = make_config()
        run_engine(make_engine(config, start(config.parallel)), config, 2)
        leave()
    """)
    environment = {"PATH": "", "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (
        tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    ).touch()  # what a killed compilation leaves behind
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
