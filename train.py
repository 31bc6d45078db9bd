"""Train a sparse mixture-of-experts language model.

    python train.py [CONFIG] [section.key=value ...]
    torchrun --nproc-per-node N train.py ...        deepspeed --num_gpus N train.py ...

CONFIG is a YAML file, configs/tiny.yaml unless given, or the folder of a run that goes on. This file is the
training loop; read it top to bottom.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A GPU's memory is otherwise lost in pieces, as the experts' rows are of another number in every step.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from moe.config.command_line import DONE, INTERRUPTED, command, end_on_ctrl_c
from moe.config.train_arguments import check_arguments, read_arguments
from moe.data.files import check_files

if __name__ == "__main__":  # before torch is imported, which takes seconds
    check_arguments(check_files)
    end_on_ctrl_c()

import torch

from moe.accounting.counts import count_parameters
from moe.accounting.gpus import find_gpu
from moe.checkpoint.background import BackgroundSaver
from moe.checkpoint.manifest import Info
from moe.checkpoint.reading import Checkpoint, newest_checkpoint
from moe.checkpoint.saving import Save, set_aside_newer
from moe.config import Config, ConfigError, RunError, changed
from moe.data.amounts import corpus_warnings
from moe.data.batches import read_batches
from moe.data.samples import samples_of_step
from moe.data.token_cache import TokenizedCorpus, prepare_corpus
from moe.data.tokenizer import vocabulary_size
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.agreement import on_all_ranks
from moe.distributed.groups import World
from moe.distributed.launch import leave, world_size
from moe.distributed.lost_ranks import why_lost
from moe.distributed.topology import Topology
from moe.inference.sample_text import sample_text
from moe.model.router_rules import find_router
from moe.model.transformer import Transformer
from moe.runs.environment import (
    check_installed,
    check_same_on_all_ranks,
    compile_failure,
    describe_environment,
)
from moe.runs.loss_plot import plot_losses
from moe.runs.metrics_log import read_metrics
from moe.runs.progress import Progress
from moe.runs.resuming import all_damaged, check_continues, open_run, what_is_saved, with_recorded_revisions
from moe.runs.router_plot import plot_routers
from moe.runs.router_warnings import RouterWarnings
from moe.runs.run_folder import RunFolder
from moe.runs.summary import overfitting, overview, summarize
from moe.training.balancing import GlobalCounts, update_expert_biases
from moe.training.engine import Engine, start
from moe.training.evaluation import check_finite, evaluate
from moe.training.garbage import GarbageCollection
from moe.training.loss import training_loss
from moe.training.optimizer import learning_rate
from moe.training.skipped_updates import SkipCount
from moe.training.step_metrics import StepMeter
from moe.training.stop_request import StopRequest


def train(config: Config) -> int:
    """Run the training that the configuration describes, from the start or from its newest checkpoint.

    Returns:
        The exit code: 0 when all steps are done, 130 when a signal stopped the run after a checkpoint.
    """
    run = prepare(config)
    with run.folder.in_use():
        check_continues(config, run.folder)  # once more, as another process may have trained meanwhile
        checkpoint, steps = find_checkpoint(run), config.train.steps
        finished = on_all_ranks(run.folder.summary.exists)[0]
        if checkpoint is not None and checkpoint.step == steps and finished:
            run.world.print(f"{run.folder.path} is finished; raise train.steps or set another run.name")
            return DONE
        engine = build(run, checkpoint)
        open_folder(run)
        done, stopping = run.first_step, False
        with (
            Progress(run.config, run.folder, run.world, run.first_step) as progress,
            StopRequest() as stop,
            BackgroundSaver() as saver,
            GarbageCollection() as garbage,
        ):
            run.started = time.perf_counter()
            while done < steps and not stopping:
                metrics = train_step(run, engine, done)
                progress.step(metrics)
                done = metrics["step"]
                if done % config.train.eval_interval == 0 or done == steps:
                    evaluation = evaluate(engine, run.corpus, run.config)
                    check_finite(evaluation["eval/loss"], done)
                    progress.evaluation({"step": done, "tokens": metrics["tokens"]} | evaluation)
                stop_asked, writing = engine.any_rank(stop.made, saver.is_writing)
                stopping = stop_asked and done < steps
                if not writing:
                    saver.finish()
                if done % config.train.checkpoint_interval == 0 or done == steps or stopping:
                    save(run, engine, saver, done)
                garbage.step(done)
        if stopping:
            run.world.print(f"stopped and saved at step {done} of {steps}; run the same command to resume")
            return INTERRUPTED
        finish(run, engine)
        return DONE


@dataclass
class Run:
    """What a run has before its first step, and how long it has taken."""

    config: Config  # complete, with model.vocab_size set
    folder: RunFolder
    corpus: TokenizedCorpus
    world: World
    first_step: int = 0  # steps that were done before, by the run that this one continues
    wall_s: float = 0.0  # seconds that they took
    device_s: float = 0.0  # the same, times the devices of each part
    started: float = 0.0  # when the first step of this process began, by time.perf_counter()

    def __post_init__(self) -> None:
        self.skips = SkipCount(self.config.optim.max_skips)
        self.router_warnings = RouterWarnings(self.config)
        self.counts = count_parameters(self.config)
        self.environment = describe_environment(self.world.size)
        self.gpu = find_gpu(self.environment["gpu"])

    def spent(self) -> dict[str, float]:
        """Seconds trained over all parts of the run, and the same times the devices of each part."""
        here = time.perf_counter() - self.started
        return {"wall_s": self.wall_s + here, "device_s": self.device_s + here * self.world.size}


def prepare(config: Config) -> Run:
    """Refuse whatever can be refused before anything is built or written; then join the other ranks."""
    folder = open_run(config)
    config.accumulation_steps(world_size())
    Topology(world_size(), config.parallel.ep_size)
    check_installed(config)
    find_router(config.moe.router)  # of one's own, it may not be there
    corpus = prepare_corpus(with_recorded_revisions(config, folder))
    config = changed(config, corpus.revisions).resolve(vocabulary_size(corpus.tokenizer))
    world = start(config.parallel)
    check_same_on_all_ranks(config, corpus.fingerprint, corpus.tokenizer.to_str())
    return Run(config, folder, corpus, world)


def find_checkpoint(run: Run) -> Checkpoint | None:
    """The newest sound checkpoint of the run; None if there is none yet."""
    checkpoint, warnings = newest_checkpoint(run.folder.checkpoints)
    if checkpoint is None and warnings:
        raise all_damaged(warnings)
    if checkpoint is not None and checkpoint.info.data_fingerprint != run.corpus.fingerprint:
        problem = f"the text or its tokens changed since {checkpoint.path} was saved"
        raise ConfigError("data.source", f"{problem}; restore it, or choose another run.name")
    for warning in warnings:
        run.world.print(f"warning: {warning}", file=sys.stderr)
    return checkpoint


def build(run: Run, checkpoint: Checkpoint | None = None) -> Engine:
    """The model under the engine, with its initial weights or those of a checkpoint."""
    config, world, device = run.config, run.world, run.world.device.type
    world.print(overview(config, run.counts, len(run.corpus.train.tokens), world.size, device))
    for warning in corpus_warnings(config, run.corpus.train, run.corpus.validation):
        world.print(f"warning: {warning}", file=sys.stderr)
    with torch.device("meta"):
        model = Transformer(config, choose_dispatcher(world.groups, config.parallel, config.train.compile))
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    engine = Engine(model, config, world)
    if checkpoint is None:
        engine.training_state.initialize(config.run.seed)
    else:
        resume(run, engine, checkpoint)
    return engine


def resume(run: Run, engine: Engine, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint of any topology."""
    on_all_ranks(lambda: engine.training_state.load(checkpoint))
    checkpoint.close()
    run.first_step = checkpoint.step
    info = checkpoint.info
    run.wall_s, run.device_s = info.wall_s, info.device_s
    run.skips.total = info.skipped_steps
    engine.update_guard.load(info.recent_norms)
    run.world.print(f"resumed from {checkpoint.path}")


def open_folder(run: Run) -> None:
    """Write what is known before the first step."""
    if run.world.rank == 0:
        run.folder.create(run.config)
        run.folder.tokenizer.write_text(run.corpus.tokenizer.to_str(pretty=True))
        run.folder.environment.write_text(json.dumps(run.environment, indent=1))
        set_aside_newer(run.folder.checkpoints, run.first_step)


def train_step(run: Run, engine: Engine, step: int) -> dict[str, Any]:
    """One optimizer step: forward and backward over this rank's micro batches, then the update.

    Returns:
        The line of `metrics.jsonl`; without an update, only how far the run is.
    """
    started, config, world, done = time.perf_counter(), run.config, run.world, step + 1
    metrics = {"step": done, "tokens": done * config.train.global_batch_size * config.data.seq_len}
    if done in config.train.skip_steps:
        run.skips.total += 1
        return metrics
    micro, lr = config.train.micro_batch_size, learning_rate(config, step)
    starts = samples_of_step(config, run.corpus.train, step)
    starts_here = starts.reshape(-1, world.size, micro)[:, world.rank].flatten()
    batches = read_batches(config, run.corpus.train, starts_here, world.device, step)
    meter, norms, counts = StepMeter(world.device), None, GlobalCounts(engine, batches, config.moe)
    for batch in batches:
        output = engine(batch.tokens, batch.documents, batch.dropout_keys, batch.targets)
        loss = training_loss(output, batch.targets, config.moe, counts.of(output))
        meter.add(loss)
        engine.backward(loss.total)
        norms = engine.step(lr)
    assert norms is not None, "no optimizer step after the last micro batch"
    meter.reduce(engine)
    if norms.skipped:
        world.print(f"warning: {run.skips.add(done, norms.total)}", file=sys.stderr)
        return metrics
    run.skips.in_a_row, ranges = 0, None
    if meter.tokens_per_expert is not None and config.moe.bias_update_rate:
        ranges = update_expert_biases(engine.module, meter.tokens_per_expert, config.moe.bias_update_rate)
    metrics |= meter.read(world.size, config.parallel.ep_size, ranges)
    if meter.counts_on_host is not None and world.rank == 0:
        for warning in run.router_warnings.of_step(meter.counts_on_host, metrics):
            print(f"warning: step {done}: {warning}", file=sys.stderr)
    metrics |= {"optim/lr": lr, "optim/skipped_steps": run.skips.total, "optim/grad_norm": norms.total}
    metrics |= {f"optim/grad_norm/{family}": norm for family, norm in norms.families().items()}
    return metrics | speed(run, time.perf_counter() - started)


def speed(run: Run, seconds: float) -> dict[str, float | None]:
    """The `perf/` metrics of a step; the utilisation (MFU) is None if the device's peak is not known."""
    tokens_per_s = run.config.train.global_batch_size * run.config.data.seq_len / seconds
    peak = run.config.cost.peak_flops or (run.gpu.peak_flops if run.gpu else None)
    mfu = tokens_per_s * run.counts.flops_per_token_train / (peak * run.world.size) if peak else None
    return {"perf/tokens_per_s": tokens_per_s, "perf/step_s": seconds, "perf/mfu": mfu}


def save(run: Run, engine: Engine, saver: BackgroundSaver, done: int) -> None:
    """Begin to save a checkpoint after `done` steps, together with all other ranks."""
    info = Info(
        data_fingerprint=run.corpus.fingerprint,
        **run.spent(),
        skipped_steps=run.skips.total,
        recent_norms=engine.update_guard.recent_norms,
    )
    config, keep = run.config.model_dump(mode="json"), run.config.train.keep_checkpoints
    saver.start(Save(run.folder.checkpoints, done, config, info, keep), engine.training_state.fragments())


def finish(run: Run, engine: Engine) -> None:
    """Write what a person wants to look at: the summary, the curves, and text from the model."""
    spent, folder = run.spent(), run.folder
    samples = sample_text(engine.module, run.corpus, run.world.device, engine.from_rank_0)
    if run.world.rank == 0:
        metrics = read_metrics(folder.metrics)
        summary = summarize(run.config, run.counts, metrics, spent, run.gpu)
        total, active = run.counts.total / 1e6, run.counts.active_all / 1e6
        title = f"{run.config.run.name}: {total:.1f}M parameters, {active:.1f}M active"
        plot_losses(metrics, title, folder.loss_plot)
        if not run.config.moe.is_dense:
            plot_routers(metrics, title, folder.router_plot)
        folder.sample.write_text(samples, encoding="utf-8")
        folder.finish(summary)
        print(json.dumps(summary, indent=1))
        if warning := overfitting(metrics):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"see {folder.loss_plot} and {folder.sample}; to write more: scripts/generate.py {folder.path}")


@command
def main(arguments: list[str]) -> int:
    """Read the command line and train."""
    config = read_arguments(arguments, Path(__file__).parent)
    if config is None:
        return DONE
    folder = RunFolder(Path(config.run.dir).expanduser())
    try:
        return train(config)
    except BrokenPipeError:
        raise
    except (RuntimeError, OSError) as error:
        problem = compile_failure(error, folder)
        problem = problem or (why_lost(error) if isinstance(error, RuntimeError) else str(error))
        if problem is None:
            raise
        raise RunError(f"{problem}; {what_is_saved(folder)}") from None
    except KeyboardInterrupt:
        print(f"interrupted; {what_is_saved(folder)}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    code, alone = main(sys.argv[1:]), os.environ.get("WORLD_SIZE", "1") == "1"
    if code == DONE or alone:
        leave()
    if alone:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # An end in order would wait for ranks that are gone, and a thread of gloo at times aborts or blocks it.
    os._exit(code)
