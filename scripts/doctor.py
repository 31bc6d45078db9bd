"""Prove on your own configuration that a run is the same run on any topology.

python scripts/doctor.py CONFIG [section.key=value ...] [--ranks 1,2,4] [--steps N] [--every] [--real-shapes]

Trains a few steps on each number of ranks, with the experts replicated and split, through train.py itself,
and compares. Widths are shrunk unless --real-shapes; experts, routing, precision and data are yours.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from moe.accounting.memory import estimate_memory
from moe.checkpoint.saving import Checkpoint, newest_checkpoint
from moe.config.loading import OneLineParser, load_config
from moe.config.schema import Config, ConfigError
from moe.data.token_cache import TokenizedCorpus, num_samples, prepare_corpus, read_samples, sample_ids
from moe.data.tokenizer import vocabulary_size
from moe.dispatch.all_to_all import LocalDispatcher
from moe.distributed.launch import choose_device
from moe.model.grouped_mm import choose_expert_path
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer, init_weights
from moe.runs.metrics_log import read_metrics

# Largest differences that rounding explains over the steps: loss and norm relative, weights absolute.
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-2, 5e-1, 1e-1)}
NORM_BOUND = {"fp32": 1e-4, "bf16": 5e-3}  # of one step's norm, relative: no error has had time to grow
LAYER_BOUND = 1e-4
MEMORY_SLACK = 2**28  # libraries, buffers and the allocator, beside what the estimate counts


class Job(NamedTuple):
    """One run of train.py."""

    ranks: int
    ep_size: int
    zero_stage: int
    micro_batch_size: int

    @property
    def title(self) -> str:
        """For people."""
        experts = f"ranks {self.ranks}, ep {self.ep_size}"
        return f"{experts}, ZeRO {self.zero_stage}, micro batch {self.micro_batch_size}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"ranks{self.ranks}-ep{self.ep_size}-zero{self.zero_stage}-micro{self.micro_batch_size}"

    def overrides(self, folder: Path) -> list[str]:
        """For train.py."""
        return [
            f"run.dir={folder / self.name}",
            f"parallel.ep_size={self.ep_size}",
            f"parallel.zero_stage={self.zero_stage}",
            f"train.micro_batch_size={self.micro_batch_size}",
        ]


class Report:
    """Prints a line per check, and remembers whether all passed."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, check: str, figure: str, passed: bool) -> None:
        """Print one line."""
        self.failed += not passed
        print(f"{'pass' if passed else 'FAIL'}  {check:<58} {figure}", flush=True)


def main(arguments: list[str]) -> int:
    """Parse the command line, run every check; 0 if all pass, 1 if any fails, 2 if the input is wrong."""
    if arguments[:1] == ["--worker"]:
        return work(Path(arguments[1]))
    parser = OneLineParser(
        prog="doctor.py",
        description="Prove on your own configuration that a run is the same run on any topology.",
    )
    parser.add_argument("items", nargs="+", metavar="CONFIG | key=value", help="a YAML file, then overrides")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks to try (default 1,2,4)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (default 8)")
    parser.add_argument(
        "--every", action="store_true", help="also both ZeRO stages, and micro batches 1 and 4"
    )
    parser.add_argument("--real-shapes", action="store_true", help="keep the widths, depth and batch sizes")
    options = parser.parse_intermixed_args(arguments)
    try:
        return examine(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def examine(options: argparse.Namespace) -> int:
    """Run every check on one configuration: in fp32, and in bf16 too if that is its precision."""
    path, overrides = Path(options.items[0]), options.items[1:]
    original, counts = load_config(path, overrides), rank_counts(options.ranks)
    device = choose_device(original.parallel)
    if device.type == "cuda":
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    if not options.real_shapes:
        overrides = [*overrides, *shrink(original, counts)]
    half, warmup = max(1, options.steps // 2), min(original.optim.warmup_steps, options.steps // 4)
    overrides += [f"train.steps={options.steps}", f"train.checkpoint_interval={half}", "train.eval_batches=1"]
    overrides += [f"train.eval_interval={half}", f"optim.warmup_steps={warmup}", "train.keep_checkpoints=2"]
    overrides += ["train.compile=false", "log.interval=1", "log.wandb=disabled", "run.resume=auto"]
    overrides += ["moe.capacity_factor=null"]
    if original.moe.capacity_factor is not None:
        print("moe.capacity_factor is left out: which tokens are dropped depends on the micro batch")

    report = Report()
    for precision in dict.fromkeys(("fp32", original.parallel.precision)):
        chosen = [*overrides, f"parallel.precision={precision}"]
        config = load_config(path, chosen)
        jobs = list(make_jobs(config, counts, options.every))
        for job in jobs:
            load_config(path, [*chosen, *job.overrides(Path())]).accumulation_steps(job.ranks)
        corpus = prepare_corpus(config)
        config = config.resolve(vocabulary_size(corpus.tokenizer))
        if precision == "fp32" and not config.moe.is_dense:
            check_layer(report, config, device)
        compare(report, config, corpus, jobs, [str(path), *chosen], device)
    print(f"{report.failed} failed" if report.failed else "all passed")
    return 1 if report.failed else 0


def compare(
    report: Report,
    config: Config,
    corpus: TokenizedCorpus,
    jobs: list[Job],
    call: list[str],
    device: torch.device,
) -> None:
    """Run every job, and compare it with the first one, with plain torch and with the memory estimate."""
    norm = first_norm(config, corpus, device)
    call = [*call, f"optim.grad_clip={norm / 4}"]  # so that the clipping bites
    with tempfile.TemporaryDirectory(prefix="doctor-") as scratch:
        folder = Path(scratch)
        peaks = {}
        for ranks in sorted({job.ranks for job in jobs}):
            calls = [[*call, *job.overrides(folder)] for job in jobs if job.ranks == ranks]
            peaks[ranks] = launch(folder, ranks, calls)
        steps, precision = config.train.steps, config.parallel.precision
        print(f"      {steps} clipped steps in {precision} of each topology against {jobs[0].title}:")
        print("      largest relative difference of loss and of gradient norm, absolute of final weights;")
        print("      then the first norm against plain torch's, and the families' norms against the whole.")
        if precision == "bf16":
            print(
                "      Rounding parts bf16 runs at once: of the bounds, only that of the first norm is tight."
            )
        for job in jobs:
            check_run(report, config, jobs[0], job, folder, norm)
        print("      Stopped at the middle and resumed, against the uninterrupted run:")
        check_resume(report, config, jobs, folder, call)
        if not config.moe.is_dense:
            check_experts(report, config, corpus, folder / jobs[0].name, device)
        # In bf16 on a CPU oneDNN keeps a kernel for every number of rows of an expert: 0.6 GiB in 50 steps.
        judged = precision == "fp32" or device.type == "cuda"
        for ranks, peak in peaks.items() if judged else ():
            check_memory(report, config, next(job for job in jobs if job.ranks == ranks), peak)


def shrink(config: Config, counts: list[int]) -> list[str]:
    """Overrides that make each step a matter of milliseconds."""
    model, moe = config.model, config.moe
    layers = min(model.n_layers, moe.first_dense_layers + 2 * moe.every_n_layers)
    heads = min(model.n_heads, 4)
    return [
        f"model.d_model={min(model.d_model, 64)}",
        f"model.n_layers={layers}",
        f"model.n_heads={heads}",
        f"model.n_kv_heads={max(1, heads * model.n_kv_heads // model.n_heads)}",
        f"model.head_dim={min(model.head_dim, 16)}",
        f"model.d_ff={min(model.d_ff, 128)}",
        f"moe.d_ff_expert={min(moe.d_ff_expert, 64)}",
        f"data.seq_len={min(config.data.seq_len, 64)}",
        f"train.global_batch_size={4 * math.lcm(*counts)}",
        "train.micro_batch_size=4",
    ]


def rank_counts(text: str) -> list[int]:
    """The argument of --ranks; one rank, the reference, always comes first."""
    counts = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0]
    if len(counts) != len(text.split(",")):
        raise ConfigError("--ranks", f"should be numbers such as 1,2,4, got {text!r}")
    return sorted({1, *counts})


def make_jobs(config: Config, counts: list[int], every: bool) -> Iterator[Job]:
    """Every topology; the first one is the reference."""
    stages = (1, 2) if every else (config.parallel.zero_stage,)
    micros = (4, 1) if every else (config.train.micro_batch_size,)
    for ranks in counts:
        for ep_size in range(1, ranks + 1):
            if ranks % ep_size == 0 and config.moe.num_experts % ep_size == 0:
                for stage in stages:
                    for micro in micros:
                        yield Job(ranks, ep_size, stage, micro)


def check_layer(report: Report, config: Config, device: torch.device) -> None:
    """The layer, and all its gradients, against a loop over tokens and their experts in fp64."""
    path = choose_expert_path(device, torch.float32)
    layer = MoELayer(config.model.d_model, config.moe, LocalDispatcher(), path).to(device)
    init_weights(layer, config.run.seed)
    torch.manual_seed(0)
    hidden = torch.randn(2, 32, config.model.d_model, device=device, requires_grad=True)
    upstream = torch.randn_like(hidden)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    fast = torch.autograd.grad(layer(hidden)[0], list(inputs.values()), upstream)

    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    rows = []
    for x in exact["hidden"].flatten(0, 1):
        probs = (exact["router.weight"] @ x).softmax(0)
        best = probs.topk(config.moe.top_k)
        scale = best.values.sum() if config.moe.normalize_gate_weights else 1.0
        row = torch.zeros_like(x)
        for gate, expert in zip(best.values / scale, best.indices.tolist(), strict=True):
            row = row + gate * _swiglu(
                x, *(exact[f"experts.w_{part}"][expert] for part in ("gate", "up", "down"))
            )
        if layer.shared_experts is not None:
            row = row + _swiglu(x, *(exact[f"shared_experts.w_{part}"] for part in ("gate", "up", "down")))
        rows.append(row)
    slow = torch.autograd.grad(torch.stack(rows).view_as(hidden), list(exact.values()), upstream.double())
    worst = max(
        float((got - want).norm() / want.norm()) for got, want in zip(fast, slow, strict=True) if want.any()
    )
    report.add("dropless layer = naive loop, every gradient (relative)", f"{worst:.1e}", worst < LAYER_BOUND)


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate) * (x @ up)) @ down


def first_norm(config: Config, corpus: TokenizedCorpus, device: torch.device) -> float:
    """Norm of the first step's gradient from plain torch: one process, no engine, no clipping."""
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    model = Transformer(config, LocalDispatcher(), choose_expert_path(device, dtype))
    init_weights(model, config.run.seed)
    model = model.to(device, dtype)
    parts = list(first_batch(config, corpus, device))
    for tokens in parts:
        logits, aux = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if aux is not None:
            loss = loss + config.moe.aux_loss_coef * aux.load_balancing_loss.mean()
            loss = loss + config.moe.z_loss_coef * aux.router_z_loss.mean()
        (loss / len(parts)).backward()
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )


def first_batch(config: Config, corpus: TokenizedCorpus, device: torch.device) -> Iterator[torch.Tensor]:
    """The micro batches (B, S + 1) of the first step."""
    size, seq_len = config.train.global_batch_size, config.data.seq_len
    ids = sample_ids(
        config.run.seed, 0, size, num_samples(corpus.train, seq_len), shuffle=not config.data.streaming
    )
    for start in range(0, size, config.train.micro_batch_size):
        samples = read_samples(corpus.train, ids[start : start + config.train.micro_batch_size], seq_len)
        yield torch.from_numpy(samples).to(device)


def launch(folder: Path, ranks: int, calls: list[list[str]]) -> int:
    """Run train.py with each list of arguments, one after the other, on so many ranks.

    Returns:
        The largest memory of a rank during the first of them, in bytes beyond that of the libraries.
    """
    print(f"      training {len(calls)} x on {ranks} rank{'s' if ranks > 1 else ''} ...", flush=True)
    jobs, log = folder / f"jobs{ranks}.json", folder / f"ranks{ranks}.log"
    jobs.write_text(json.dumps(calls))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, "--worker", str(jobs)]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with log.open("w") as output:
        code = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if code:
        raise SystemExit(f"FAIL  a run on {ranks} ranks broke off:\n" + log.read_text()[-3000:])
    return max(int(path.read_text()) for path in folder.glob(f"jobs{ranks}.json.peak*"))


def work(jobs: Path) -> int:
    """One rank of `launch`."""
    before = _peak_memory()
    for i, call in enumerate(json.loads(jobs.read_text())):
        with redirect_stdout(sys.stderr), redirect_stderr(sys.stderr):
            if code := train.main(call):
                return code
        if i == 0:
            rank = os.environ.get("RANK", "0")
            jobs.with_name(f"{jobs.name}.peak{rank}").write_text(str(_peak_memory() - before))
    train.leave()
    return 0


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss/lm" in line]


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run."""
    checkpoint, warnings = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None, warnings
    return checkpoint


def differences(run: Path, reference: Path) -> tuple[float, float, float]:
    """Largest differences of loss and norm (relative, over the steps) and of final weights (absolute)."""
    pairs = list(zip(steps_of(run), steps_of(reference), strict=True))
    loss, norm = (max(abs(a[key] / b[key] - 1) for a, b in pairs) for key in ("loss/lm", "optim/grad_norm"))
    ours, theirs = newest(run), newest(reference)
    weights = max(
        float((ours.read("weights", name) - theirs.read("weights", name)).abs().max())
        for name in theirs.tensors["weights"]
    )
    return loss, norm, weights


def check_run(report: Report, config: Config, reference: Job, job: Job, folder: Path, norm: float) -> None:
    """A topology against the reference, its norm against plain torch, and its families' against the whole."""
    run, bounds = folder / job.name, BOUNDS[config.parallel.precision]
    found = differences(run, folder / reference.name)
    lines = steps_of(run)
    first = abs(lines[0]["optim/grad_norm"] / norm - 1)
    parts = ("dense", "router", "experts")
    squares = [sum((line[f"optim/grad_norm/{part}"] or 0) ** 2 for part in parts) for line in lines]
    families = max(
        abs(math.sqrt(square) / line["optim/grad_norm"] - 1)
        for square, line in zip(squares, lines, strict=True)
    )
    if not within(found, bounds):
        step = first_apart(run, folder / reference.name, bounds)
        print(f"      Out of bounds from step {step} on. If all was well before, a token whose experts tie")
        print("      within rounding went the other way there (README, ties); another run.seed tells")
    report.add(
        job.title,
        f"{show(found)}  torch {first:.1e}  families {families:.1e}",
        within(found, bounds) and max(first, families) <= NORM_BOUND[config.parallel.precision],
    )


def first_apart(run: Path, reference: Path, bounds: tuple[float, float, float]) -> int | None:
    """The first step whose loss or norm differ by more than their bounds; None where only weights do."""
    for a, b in zip(steps_of(run), steps_of(reference), strict=True):
        for key, bound in zip(("loss/lm", "optim/grad_norm"), bounds, strict=False):
            if not abs(a[key] / b[key] - 1) <= bound:
                return a["step"]
    return None


def show(found: tuple[float, float, float]) -> str:
    """Differences of loss, norm and weights."""
    return "loss {:.1e}  norm {:.1e}  weights {:.1e}".format(*found)


def within(found: tuple[float, float, float], bounds: tuple[float, float, float]) -> bool:
    """Whether none is more than its bound; NaN is."""
    return all(a <= b for a, b in zip(found, bounds, strict=True))


def check_resume(report: Report, config: Config, jobs: list[Job], folder: Path, call: list[str]) -> None:
    """Cut runs back to their middle; continue each on its own topology, and on another."""
    widest = jobs[-1]
    for source, target in dict.fromkeys([(widest, widest), (jobs[0], widest), (widest, jobs[0])]):
        again = folder / f"{source.name}-then-{target.name}"
        shutil.copytree(folder / source.name, again)
        (again / "summary.json").unlink()
        shutil.rmtree(newest(again).path)
        launch(folder, target.ranks, [[*call, *target.overrides(folder), f"run.dir={again}"]])
        found = differences(again, folder / target.name)
        bounds = (0.0, 0.0, 0.0) if source == target else BOUNDS[config.parallel.precision]
        topologies = [f"ranks {job.ranks}, ep {job.ep_size}" for job in (source, target)]
        report.add(
            f"saved at {topologies[0]}; resumed at {topologies[1]}",
            show(found),
            within(found, bounds),
        )


def check_experts(
    report: Report, config: Config, corpus: TokenizedCorpus, run: Path, device: torch.device
) -> None:
    """After the last step, each expert gets tokens of the training text."""
    model = Transformer(config, LocalDispatcher(), choose_expert_path(device, torch.float32)).to(device)
    checkpoint, counts = newest(run), torch.zeros((), dtype=torch.int64)
    wanted = 32 * config.moe.num_experts / config.moe.top_k  # tokens for 32 assignments an expert
    samples = math.ceil(max(wanted / config.data.seq_len, config.train.global_batch_size))
    ids = sample_ids(
        config.run.seed, 0, samples, num_samples(corpus.train, config.data.seq_len), shuffle=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.read("weights", name).view(parameter.shape))
        for i in range(samples):
            sample = read_samples(corpus.train, ids[i : i + 1], config.data.seq_len)
            counts = counts + model(torch.from_numpy(sample[:, :-1]).to(device)).aux.tokens_per_expert.cpu()
    dead, share = int((counts == 0).sum()), float(counts.min() / counts.double().mean())
    report.add(
        f"no dead expert on {samples} samples", f"{dead} dead, least used {share:.2f} of the mean", not dead
    )


def check_memory(report: Report, config: Config, job: Job, peak: int) -> None:
    """What a rank took, against the estimate that a run prints at its start."""
    parallel = config.parallel.model_copy(update={"ep_size": job.ep_size, "zero_stage": job.zero_stage})
    variant, device = config.model_copy(update={"parallel": parallel}), choose_device(config.parallel)
    estimate = estimate_memory(variant, job.ranks, device.type).peak
    report.add(
        f"ranks {job.ranks}: memory fits the estimate (plus {MEMORY_SLACK / 2**20:.0f} MiB for libraries)",
        f"{peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB",
        peak <= estimate + MEMORY_SLACK,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
