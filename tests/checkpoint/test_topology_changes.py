"""Checkpoints that one topology writes and another reads, on real ranks."""

import ctypes
import gc
import re
import resource
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moe.checkpoint import saving
from moe.checkpoint.manifest import CheckpointError, Info
from moe.checkpoint.reading import open_checkpoint
from moe.checkpoint.saving import Fragment, Save, save_checkpoint
from moe.config import RunError, changed
from moe.dispatch.all_to_all import choose_dispatcher
from moe.model.transformer import Transformer
from moe.training.engine import Engine, start
from moe.training.optimizer import learning_rate
from tests.support.checkpoints import newest, whole_tensors
from tests.support.engines import batches, loss_of, make_config
from tests.support.memory_probe import resident
from tests.support.models import gradient_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.xdist_group("topology_changes")  # its runs are made once

REL_LOSS, REL_NORM = 1e-5, 1e-4  # fp32 sums in another order, after three more steps
EXPERTS = [f"blocks.{layer}.ffn.experts.{w}" for layer in (0, 1) for w in ("w_gate", "w_up", "w_down")]
SHAPES = {"w_gate": (4, 32, 48), "w_up": (4, 32, 48), "w_down": (4, 48, 32)}


def config_of(ep_size, **sections):
    parallel = {"ep_size": ep_size} | sections.pop("parallel", {})
    base = {"moe": {"d_ff_expert": 48}, "train": {"micro_batch_size": 1}}
    return make_config(parallel=parallel, **(base | sections))


def build(config, change=lambda model: None, seed=0):
    world = start(config.parallel)
    config = changed(config, {"run.seed": seed})
    model = Transformer(config, choose_dispatcher(world.groups, config.parallel), "grouped_mm")
    change(model)
    return Engine(model, config, world)


def train(engine, config, first, stop, at_rate=None):
    """Losses of this rank's share, to be averaged over the ranks, and gradient norms."""
    losses, norms = [], []
    micro, world = config.train.micro_batch_size, engine.world
    for step in range(first, stop):
        loss_of_step, norms_of_step = 0.0, None
        steps = config.accumulation_steps(world.size)
        rate = learning_rate(config, step) if at_rate is None else at_rate
        for i in range(steps):
            offset = (i * world.size + world.rank) * micro
            part = batches(10)[step][offset : offset + micro]
            loss = loss_of(engine(part[:, :-1]), part, config)
            engine.backward(loss)
            norms_of_step = engine.step(rate)
            loss_of_step += loss.item() / steps
        assert norms_of_step is not None
        losses.append(loss_of_step)
        norms.append(norms_of_step.total)
    return losses, norms


def over_ranks(results):
    """Mean losses, and the norms, on which all ranks agree."""
    losses = [sum(step) / len(step) for step in zip(*(losses for losses, _ in results), strict=True)]
    assert all(norms == results[0][1] for _, norms in results)
    return losses, results[0][1]


def own(parameter, whole):
    """Elements of a whole tensor that this rank's parameter holds."""
    if parameter.shape == whole.shape:
        return whole
    here = len(parameter)
    first = torch.distributed.get_rank() % (len(whole) // here) * here
    return whole[first : first + here]


def assert_same_tensors(got, expected):
    assert {kind: set(named) for kind, named in got.items()} == {k: set(n) for k, n in expected.items()}
    for kind, named in expected.items():
        for name, tensor in named.items():
            assert torch.equal(got[kind][name], tensor), (kind, name)


# Experts are stored under their global ids.


def fill_with_global_ids(model):
    """The weights of expert e are all e + 1."""
    for block in model.blocks:
        for weight in block.ffn.experts.parameters():
            ids = torch.arange(1.0, 5.0).view(4, 1, 1)
            weight.data.copy_(own(weight, ids.expand(4, *weight.shape[1:])))


def save_constants_and_gradients(folder):
    for ep_size in (1, 2, 4):
        config = config_of(ep_size, optim={"grad_clip": 0.0})
        for name, change in (("constants", fill_with_global_ids), ("gradients", lambda model: None)):
            engine = build(config, change)
            train(engine, config, 0, 1, at_rate=0.0)  # so that there are moments, and the weights stay
            save = Save(folder / f"{name}_{ep_size}", 1, {}, Info(), 1)
            save_checkpoint(save, engine.training_state.fragments())


def gradients_in_plain_torch(config):
    model = Transformer(config, expert_path="grouped_mm")
    for part in batches(10)[0].split(1):
        (loss_of(model(part[:, :-1]), part, config) / 8).backward()
    return {name: gradient_of(parameter) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def constants_and_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    run_ranks(4, save_constants_and_gradients, folder)
    return folder


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_each_expert_is_stored_under_its_global_id(constants_and_gradients, ep_size):
    checkpoint, _ = newest(constants_and_gradients / f"constants_{ep_size}")
    for name in EXPERTS:
        shape = SHAPES[name.rpartition(".")[2]]
        assert tuple(checkpoint.tensors["weights"][name].shape) == shape
        stacked = checkpoint.read("weights", name).view(shape)
        for expert in range(4):
            assert stacked[expert].unique().tolist() == [expert + 1]


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_each_expert_is_stored_with_its_own_moments(constants_and_gradients, ep_size):
    """Against the gradients of the same model in plain torch, in one process."""
    whole = whole_tensors(constants_and_gradients / f"gradients_{ep_size}" / "step-00000001")
    for name, gradient in gradients_in_plain_torch(config_of(1)).items():
        # betas 0.9 and 0.95: after one step exp_avg = 0.1 g and exp_avg_sq = 0.05 g^2
        torch.testing.assert_close(whole["exp_avg"][name], 0.1 * gradient, rtol=1e-3, atol=1e-8, msg=name)
        squares = 0.05 * gradient**2
        torch.testing.assert_close(whole["exp_avg_sq"][name], squares, rtol=2e-3, atol=1e-10, msg=name)
    for name in EXPERTS:
        first, *others = whole["exp_avg"][name]
        assert all((first - other).norm() > 0.1 * first.norm() for other in others), "they differ"


# What one topology saved, every other one continues.


class Run(NamedTuple):
    ranks: int
    ep_size: int
    zero_stage: int
    precision: str = "fp32"

    def config(self):
        return config_of(self.ep_size, parallel={"zero_stage": self.zero_stage, "precision": self.precision})

    def folder(self, root):
        return root / "-".join(map(str, self))


SOURCES = [Run(1, 1, 1), Run(2, 2, 2), Run(4, 1, 1), Run(4, 2, 2), Run(4, 4, 1)]
OTHER_STAGE = [Run(1, 1, 2), Run(2, 2, 1), Run(4, 1, 2), Run(4, 2, 1), Run(4, 4, 2)]
BF16 = [Run(2, 2, 2, "bf16"), Run(4, 2, 2, "bf16")]


def train_save_go_on(root, runs):
    """For each run: three steps, a checkpoint, three more; the results of those."""
    results = []
    for run in runs:
        engine = build(run.config())
        train(engine, run.config(), 0, 3)
        save_checkpoint(Save(run.folder(root), 3, {}, Info(), 1), engine.training_state.fragments())
        results.append(train(engine, run.config(), 3, 6))
    return results


def load_check_go_on(root, again, pairs):
    """For each pair: load the one's checkpoint as the other, compare all that this rank holds, train on."""
    results = []
    for source, target in pairs:
        config = target.config()
        engine = build(config, seed=99)
        engine.training_state.load(open_checkpoint(source.folder(root), 3, check_content=False))
        whole = whole_tensors(source.folder(root) / "step-00000003")
        held = 0
        for kind, name, shape, first, values in engine.training_state.fragments():
            assert tuple(whole[kind][name].shape) == tuple(shape)
            expected = whole[kind][name].flatten()[first : first + len(values)]
            assert torch.equal(values, expected), (source, target, kind, name)
            held += len(values)
        assert held > 0
        for name, parameter in engine.module.named_parameters():
            expected = own(parameter, whole["weights"][name]).to(parameter.dtype)
            assert torch.equal(parameter, expected), (source, target, name)
        save = Save(source.folder(target.folder(again)), 3, {}, Info(), 1)
        save_checkpoint(save, engine.training_state.fragments())
        results.append(train(engine, config, 3, 6))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the checkpoints of all sources, and the results of the runs that went on."""
    root = tmp_path_factory.mktemp("sources")
    results = {}
    for ranks in (1, 2, 4):
        runs = [run for run in SOURCES + BF16 if run.ranks == ranks]
        results |= zip(runs, zip(*run_ranks(ranks, train_save_go_on, root, runs), strict=True), strict=True)
    return root, results


def check_continued(saved, again, ranks, pairs, rel_loss, rel_norm):
    root, uninterrupted = saved
    per_rank = run_ranks(ranks, load_check_go_on, root, again, pairs)
    for (source, target), *results in zip(pairs, *per_rank, strict=True):
        before = whole_tensors(source.folder(root) / "step-00000003")
        after = whole_tensors(source.folder(target.folder(again)) / "step-00000003")
        assert_same_tensors(after, before)
        if source == target:
            assert tuple(results) == uninterrupted[source], "the same topology goes on bit for bit"
        (losses, norms), (wanted_losses, wanted_norms) = map(over_ranks, (results, uninterrupted[source]))
        assert losses == pytest.approx(wanted_losses, rel=rel_loss, abs=0), (source, target)
        assert norms == pytest.approx(wanted_norms, rel=rel_norm, abs=0), (source, target)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_of_any_topology_is_continued_on_any_other(saved, tmp_path, ranks):
    """All pairs of topologies; to each also from two that have its other ZeRO stage."""
    pairs = [(source, target) for target in SOURCES if target.ranks == ranks for source in SOURCES]
    pairs += [
        (source, target)
        for target in OTHER_STAGE
        if target.ranks == ranks
        for source in SOURCES
        if source[:2] in ((4, 2), target[:2])
    ]
    check_continued(saved, tmp_path, ranks, pairs, REL_LOSS, REL_NORM)


@pytest.mark.slow
def test_bf16_weights_are_the_rounded_masters_on_any_topology(saved, tmp_path):
    """The relative step of bf16 is 2^-8; ZeRO stage 2 accumulates in fp32."""
    target = BF16[0]
    check_continued(saved, tmp_path, 2, [(source, target) for source in BF16], 2**-8, 2**-5)
    for run in BF16:
        weight = whole_tensors(run.folder(saved[0]) / "step-00000003")["weights"][EXPERTS[0]]
        assert not torch.equal(weight, weight.bfloat16().float()), "masters have bits that bf16 has not"


# Refusals and failures reach every rank.


def copies(engine):
    return [(*fragment[:4], fragment.values.clone()) for fragment in engine.training_state.fragments()]


def refuse_misfits(folder):
    config = config_of(2)
    engine = build(config)
    train(engine, config, 0, 1)
    gone = ("exp_avg", "blocks.1.ffn.experts.w_up")
    extra = Fragment("exp_avg_sq", "blocks.9.ffn.experts.w_up", (2,), engine.world.rank, torch.ones(1))
    odd = Fragment("weights", "final_norm.weight", (2, 16), 16 * engine.world.rank, torch.ones(16))
    misfits = {
        "missing": [fragment for fragment in engine.training_state.fragments() if fragment[:2] != gone],
        "unexpected": [*engine.training_state.fragments(), extra],
        "misshapen": [
            *(fragment for fragment in engine.training_state.fragments() if fragment[1] != odd[1]),
            odd,
        ],
    }
    for name, fragments in misfits.items():
        if name == "misshapen":  # its moments keep their shape, so that only the weights are odd
            fragments += [
                f for f in engine.training_state.fragments() if f[1] == odd[1] and f[0] != "weights"
            ]
        save_checkpoint(Save(folder / name, 1, {}, Info(), 1), fragments)
    train(engine, config, 1, 2)
    before = copies(engine)
    own_weights = [parameter.clone() for parameter in engine.module.parameters()]
    messages = {}
    for name in misfits:
        with pytest.raises(CheckpointError) as refusal:
            engine.training_state.load(open_checkpoint(folder / name, 1, check_content=True))
        messages[name] = str(refusal.value)
    for (*old_place, old), (*place, values) in zip(before, copies(engine), strict=True):
        assert place == old_place
        assert torch.equal(values, old)
    assert all(map(torch.equal, engine.module.parameters(), own_weights))
    return messages


def test_a_missing_unexpected_or_misshapen_tensor_is_refused_by_name_on_all_ranks(tmp_path):
    for messages in run_ranks(2, refuse_misfits, tmp_path, timeout_s=60):
        assert "exp_avg: missing ['blocks.1.ffn.experts.w_up'], unexpected []" in messages["missing"]
        assert "exp_avg_sq: missing [], unexpected ['blocks.9.ffn.experts.w_up']" in messages["unexpected"]
        assert "weights: final_norm.weight is (2, 16), not (32,)" in messages["misshapen"]


def not_finite(engine, monkeypatch):
    state = [*engine.training_state.fragments()]
    values = state[0].values.clone()
    values[0] = float("nan")
    return [state[0]._replace(values=values), *state[1:]]


def disk_full(engine, monkeypatch):
    def refuse(tensors, path):
        path.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", refuse)
    return engine.training_state.fragments()


def file_too_large(engine, monkeypatch):
    """A real write that fails half way, of the kind that a quota makes fail."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return engine.training_state.fragments()


FAILURES = {
    "not finite": (not_finite, r"rank 1: weights of .+ are not finite; the checkpoint was not saved"),
    "disk full": (disk_full, r"rank 1: .*No space left on device"),
    "file too large": (file_too_large, r"rank 1: .*File too large"),
}


def fail_on_rank_1(folder):
    config = config_of(2)
    engine = build(config)
    train(engine, config, 0, 1)
    save_checkpoint(Save(folder, 1, {}, Info(), 2), engine.training_state.fragments())
    before = copies(engine)
    train(engine, config, 1, 2)
    messages = {}
    for name, (harm, _) in FAILURES.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            fragments = (
                harm(engine, monkeypatch) if engine.world.rank == 1 else engine.training_state.fragments()
            )
            with pytest.raises(RunError) as failure:
                save_checkpoint(Save(folder, 2, {}, Info(), 2), fragments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        messages[name] = str(failure.value)
        torch.distributed.barrier()
        visible = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        assert visible == ["step-00000001"], name
        checkpoint, warnings = newest(folder)
        assert (checkpoint.step, warnings) == (1, [])
        torch.distributed.barrier()
    engine.training_state.load(newest(folder)[0])
    for (*_, old), (*_, values) in zip(before, copies(engine), strict=True):
        assert torch.equal(values, old)
    train(engine, config, 1, 2)
    save_checkpoint(Save(folder, 2, {}, Info(), 2), engine.training_state.fragments())
    return messages


def test_a_rank_that_cannot_write_stops_the_save_on_all_and_the_one_before_stays(tmp_path):
    for messages in run_ranks(2, fail_on_rank_1, tmp_path, timeout_s=60):
        for name, (_, message) in FAILURES.items():
            assert re.search(message, messages[name]), (name, messages[name])
    assert newest(tmp_path)[0].step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


# Memory.


def memory_of(action):
    """Bytes of this process at the highest point of the action, over those before it."""

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def return_freed_memory():
    """Tell glibc to return what is freed at once, so that the peak is of what is alive, not of what it keeps.

    What it keeps of freed tensors depends on all that the process did before: from 37 to 113 MiB here.
    """
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16) == 1


BIG = config_of(
    1,
    model={"d_model": 256, "n_layers": 3},
    moe={"num_experts": 16, "d_ff_expert": 1024},
    train={"global_batch_size": 1, "micro_batch_size": 1},
)


def save_big(folder):
    return_freed_memory()
    engine = build(BIG)
    train(engine, BIG, 0, 1)
    total = sum(fragment.values.nbytes for fragment in engine.training_state.fragments())
    return total, memory_of(
        lambda: save_checkpoint(Save(folder, 1, {}, Info(), 1), engine.training_state.fragments())
    )


def load_big(folder):
    """Without the moments, which it holds from then on."""
    return_freed_memory()
    engine = build(BIG)
    checkpoint = open_checkpoint(folder, 1, check_content=False)
    needed = memory_of(lambda: engine.training_state.load(checkpoint))
    return needed - sum(f.values.nbytes for f in engine.training_state.fragments() if f.kind != "weights")


@pytest.mark.slow
def test_saving_and_loading_take_less_memory_than_three_stacked_expert_tensors(tmp_path):
    stacked = 16 * 256 * 1024 * 4
    [(total, saving)] = run_ranks(1, save_big, tmp_path)
    [loading] = run_ranks(1, load_big, tmp_path)
    assert total > 20 * stacked
    assert saving < 3 * stacked, f"{saving / 2**20:.0f} MiB"
    assert loading < 3 * stacked, f"{loading / 2**20:.0f} MiB"
