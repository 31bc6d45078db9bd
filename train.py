"""Train a sparse mixture-of-experts language model.

    python train.py [CONFIG] [section.key=value ...]
    torchrun --nproc-per-node N train.py ...        deepspeed --num_gpus N train.py ...

CONFIG is a YAML file, configs/tiny.yaml unless given. This file is the training loop; read it top to bottom.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from moe.accounting.cost import find_gpu
from moe.accounting.counts import count
from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.saving import newest_checkpoint, on_all_ranks, save_checkpoint, set_aside_newer
from moe.config.loading import OneLineParser, describe_keys, dump_config, load_config
from moe.config.schema import Config, ConfigError
from moe.data.token_cache import TokenizedCorpus, num_samples, prepare_corpus, read_samples, sample_ids
from moe.data.tokenizer import vocabulary_size
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.launch import choose_device, leave, why_lost, world_size
from moe.distributed.topology import Topology
from moe.model.grouped_mm import choose_expert_path
from moe.model.transformer import Transformer, init_weights
from moe.runs.loss_plot import plot_losses
from moe.runs.metrics_log import MetricsLog, StepMeter, describe_environment, read_metrics
from moe.runs.run_folder import all_damaged, open_run
from moe.runs.summary import describe, summarize, write_samples
from moe.training.engine import Engine, start
from moe.training.evaluation import evaluate
from moe.training.optimizer import learning_rate

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


class TrainingError(Exception):
    """The run cannot go on; what was saved stays good."""


def train(config: Config) -> int:
    """Run the training that the configuration describes, from the start or from its newest checkpoint.

    Returns:
        The exit code: 0 when all steps are done, 130 when a signal stopped the run after a checkpoint.
    """
    # 1. Everything that can be refused is refused before anything is built or written.
    folder = open_run(config)
    accumulation_steps = config.accumulation_steps(world_size())
    Topology(world_size(), config.parallel.ep_size)
    on_cpu = choose_device(config.parallel).type == "cpu"
    if config.train.compile and on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ConfigError("train.compile", "needs a C++ compiler on CPU; install g++ or set it to false")
    corpus = prepare_corpus(config)
    config = config.resolve(vocabulary_size(corpus.tokenizer))

    # 2. Join the other ranks, and find the checkpoint to continue from.
    world = start(config.parallel)
    is_writer = world.rank == 0
    say = print if is_writer else lambda *_, **__: None
    _check_same_on_all_ranks(config, corpus)
    checkpoint, warnings = newest_checkpoint(folder.checkpoints)
    if checkpoint is None and warnings:
        raise all_damaged(warnings)
    finished = on_all_ranks(folder.summary.exists)[0]
    if checkpoint is not None and checkpoint.info["data_fingerprint"] != corpus.fingerprint:
        raise ConfigError("data.source", f"the text or its tokens changed since {checkpoint.path} was saved")
    if checkpoint is not None and checkpoint.step == config.train.steps and finished:
        say(f"{folder.path} is finished ({checkpoint.step} steps); raise train.steps or set another run.name")
        return 0

    # 3. The model and the engine.
    for warning in warnings:
        say(f"warning: {warning}", file=sys.stderr)
    ledger = count(config)
    say(f"{folder.path}: {len(corpus.train):,} training tokens, {world.size} x {world.device.type}")
    say(describe(config, ledger, world.size, world.device.type))
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    dispatcher = choose_dispatcher(world.groups, config.parallel)
    model = Transformer(config, dispatcher, choose_expert_path(world.device, dtype))
    init_weights(model, config.run.seed)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    engine = Engine(model, config, world)

    first_step, wall_s, device_s = 0, 0.0, 0.0
    if checkpoint is not None:
        on_all_ranks(lambda: engine.load_state(checkpoint))
        checkpoint.close()
        first_step, wall_s = checkpoint.step, checkpoint.info["wall_s"]
        device_s = checkpoint.info["device_s"]
        say(f"resumed from {checkpoint.path}")
    environment = describe_environment(world.size)
    log = None
    if is_writer:
        folder.create(config)
        folder.tokenizer.write_text(corpus.tokenizer.to_str(pretty=True))
        folder.environment.write_text(json.dumps(environment, indent=1))
        set_aside_newer(folder.checkpoints, first_step)
        log = MetricsLog(folder.metrics, first_step, config)

    # 4. Train.
    steps, batch_size, seq_len = config.train.steps, config.train.global_batch_size, config.data.seq_len
    micro, train_samples = config.train.micro_batch_size, num_samples(corpus.train, seq_len)
    gpu = find_gpu(environment["gpu"])
    peak = config.cost.peak_flops or (gpu.peak_flops if gpu else None)
    stop_request = StopRequest()
    started = time.perf_counter()

    def spent() -> dict[str, float]:
        """Seconds since the first step, and the same times the devices of each part of the run."""
        part_s = time.perf_counter() - started
        return {"wall_s": wall_s + part_s, "device_s": device_s + part_s * world.size}

    bar = tqdm(total=steps, initial=first_step, unit="step", disable=None if is_writer else True, leave=False)
    for step in range(first_step, steps):
        step_started = time.perf_counter()
        ids = sample_ids(config.run.seed, step, batch_size, train_samples, shuffle=not config.data.streaming)
        lr = learning_rate(step, steps, config.optim)
        meter, norms = StepMeter(world.device), None
        for i in range(accumulation_steps):
            mine = (i * world.size + world.rank) * micro
            samples = read_samples(corpus.train, ids[mine : mine + micro], seq_len)
            tokens = torch.from_numpy(samples).to(world.device)
            logits, aux = engine(tokens[:, :-1])
            lm_loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss = lm_loss
            if aux is not None:
                loss = loss + config.moe.aux_loss_coef * aux.load_balancing_loss.mean()
                loss = loss + config.moe.z_loss_coef * aux.router_z_loss.mean()
            meter.add(lm_loss, aux)
            engine.backward(loss)
            norms = engine.step(lr)
        for sums in meter.tensors():
            engine.sum_over_ranks(sums)
        assert norms is not None, "the last micro batch updates"
        done, losses = step + 1, meter.read(world.size)
        _check_finite("loss", losses["loss/lm"], done)
        _check_finite("gradient norm", norms.total, done)

        # 5. Report, evaluate, save.
        position = {"step": done, "tokens": done * batch_size * seq_len}
        step_s = time.perf_counter() - step_started
        tokens_per_s = batch_size * seq_len / step_s
        metrics = position | losses
        bar.set_postfix_str(f"loss {metrics['loss/lm']:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        bar.update()
        if log is not None and (done % config.log.interval == 0 or done in (1, steps)):
            mfu = tokens_per_s * ledger.flops_per_token_train / (peak * world.size) if peak else None
            log.write(
                metrics
                | {"optim/lr": lr, "optim/grad_norm": norms.total}
                | {f"optim/grad_norm/{family}": norm for family, norm in norms.families().items()}
                | {"perf/tokens_per_s": tokens_per_s, "perf/step_s": step_s, "perf/mfu": mfu}
            )
            if bar.disable:
                say(
                    f"step {done}/{steps}: loss {metrics['loss/lm']:.4f}, {tokens_per_s:,.0f} tokens/s",
                    flush=True,
                )
        if done % config.train.eval_interval == 0 or done == steps:
            evaluation = evaluate(engine, corpus, config)
            _check_finite("validation loss", evaluation["eval/loss"], done)
            if log is not None:
                log.write(position | evaluation)
                bar.write(
                    f"step {done}/{steps}: validation loss {evaluation['eval/loss']:.4f} nats per token, "
                    f"{evaluation['eval/bits_per_byte']:.4f} bits per byte"
                )
        stopping = engine.any_rank(stop_request.made) and done < steps
        if done % config.train.checkpoint_interval == 0 or done == steps or stopping:
            info = {"data_fingerprint": corpus.fingerprint} | spent()
            save_checkpoint(
                folder.checkpoints,
                done,
                engine.state(),
                config.model_dump(mode="json"),
                info,
                config.train.keep_checkpoints,
            )
        if stopping:
            bar.close()
            if log is not None:
                log.close()
            say(f"stopped and saved at step {done} of {steps}; run the same command again to resume")
            stop_request.close()
            return INTERRUPTED
    bar.close()
    stop_request.close()

    # 6. Leave behind what a person wants to look at.
    samples = write_samples(engine.module, corpus, config, world.device, engine.from_rank_0)
    if log is not None:
        summary = summarize(read_metrics(folder.metrics), ledger, config, **spent(), gpu=gpu)
        log.close()
        total, active = ledger.total / 1e6, ledger.active_all / 1e6
        title = f"{config.run.name}: {total:.1f}M parameters, {active:.1f}M active"
        plot_losses(read_metrics(folder.metrics), title, folder.loss_plot)
        folder.sample.write_text(samples, encoding="utf-8")
        folder.finish(summary)
        say(json.dumps(summary, indent=1))
        say(f"see {folder.loss_plot} and {folder.sample}; scripts/generate.py {folder.path} writes more")
    return 0


def _check_same_on_all_ranks(config: Config, corpus: TokenizedCorpus) -> None:
    """Nodes with files of their own must not train on different texts, or differently."""
    settings = config.model_dump_json(exclude={"run": {"dir"}, "data": {"cache_dir"}})
    here = hashlib.sha256((settings + corpus.fingerprint + corpus.tokenizer.to_str()).encode()).hexdigest()
    digests = on_all_ranks(lambda: here)
    if len(set(digests)) > 1:
        odd = next(i for i, there in enumerate(digests) if there != digests[0])
        raise ConfigError(
            "data.source",
            f"text, tokenizer or another key differ between ranks 0 and {odd}; give all the same",
        )


def _check_finite(what: str, value: float | None, step: int) -> None:
    if value is None or not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {what} is {value}; nothing of this step was saved, earlier checkpoints are "
            "sound. Start a new run with a lower optim.lr or optim.grad_clip"
        )


class StopRequest:
    """Turns Ctrl-C or SIGTERM into a wish to stop after the step; a second Ctrl-C stops at once.

    A second SIGTERM does not: a scheduler and a launcher each pass on the one that they got.
    """

    def __init__(self) -> None:
        self.made = False
        self._interrupted = False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.made:
            print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.made = True


def main(arguments: list[str]) -> int:
    """Parse the command line, train, and turn errors into exit codes."""
    parser = OneLineParser(
        prog="train.py",
        description="Train a sparse mixture-of-experts language model.",
        epilog="keys, with the defaults of those that the file leaves out:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG | key=value",
        help=f"a YAML file (default {DEFAULT_CONFIG.name}), then overrides",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete configuration and exit"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    options = parser.parse_intermixed_args(arguments)
    items: list[str] = options.items
    names_file = bool(items) and ("=" not in items[0] or items[0].endswith((".yaml", ".yml")))
    path = Path(items.pop(0)) if names_file else DEFAULT_CONFIG
    try:
        config = load_config(path, items)
        if options.print_config:
            print(dump_config(config), end="")
            return 0
        return train(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if (reason := why_lost(error)) is None:
            raise
        print(f"error: {reason}; what was saved before stays good", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; what was saved before stays good", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was saved before stays good", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == 0 or world_size() == 1:
        leave()
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # leaving in order would wait for ranks that are gone
