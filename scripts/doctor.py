"""Prove on your own configuration that a run is the same run on any topology.

python scripts/doctor.py CONFIG [section.key=value ...] [--ranks 1,2,4] [--steps N] [--every] [--real-shapes]
python scripts/doctor.py CONFIG [section.key=value ...] --world N [--gpu h100]

Trains a few steps on each number of ranks, with the experts replicated and split, through train.py itself,
and compares. Widths are reduced unless --real-shapes; experts, routing, precision and data are yours.
With --world, nothing is trained: shows what a run of N ranks would be, without its GPUs.
"""

import argparse
import sys
from pathlib import Path

from moe.config.command_line import OneLineParser, command, end_on_ctrl_c, positive_int

if __name__ == "__main__":
    end_on_ctrl_c()  # while torch is imported, which takes seconds

import torch

from moe.accounting.gpus import GPU_NAMES, named_gpu
from moe.config import Config, ConfigError, load_config
from moe.data.token_cache import prepare_corpus
from moe.data.tokenizer import vocabulary_size, with_vocabulary
from moe.distributed.launch import choose_device
from moe.doctor.dry_run import dry_run, refuse_impossible
from moe.doctor.examination import Examination
from moe.doctor.variants import parse_rank_counts, shrunk, variants

TRAIN = Path(__file__).parents[1] / "train.py"


@command
def main(arguments: list[str]) -> int:
    """Run every check in fp32, and in bf16 too if that is the precision; 1 if any fails."""
    options = parse(arguments)
    path, *overrides = options.items
    original = load_config(Path(path), overrides)
    if options.world:
        return show_dry_run(original, options)
    counts = parse_rank_counts(options.ranks)
    if choose_device(original.parallel).type == "cuda":
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    if not options.real_shapes:
        overrides += shrunk(original, counts)
    half, warmup = max(1, options.steps // 2), min(original.warmup_steps, options.steps // 4)
    overrides += [f"train.steps={options.steps}", f"train.checkpoint_interval={half}", "train.eval_batches=1"]
    overrides += [f"train.eval_interval={half}", f"optim.warmup_steps={warmup}", "train.keep_checkpoints=2"]
    overrides += ["train.compile=false", "log.interval=1", "log.wandb=disabled", "run.resume=auto"]
    overrides += ["moe.capacity_factor=null"]
    if original.moe.capacity_factor is not None:
        print("moe.capacity_factor is left out: which tokens are dropped depends on the micro batch")

    failed = 0
    for precision in dict.fromkeys(("fp32", original.parallel.precision)):
        call = [path, *overrides, f"parallel.precision={precision}"]
        config = load_config(Path(path), call[1:])
        tried = list(variants(config, counts, options.every))
        for variant in tried:  # refused before anything is trained
            its_config = load_config(Path(path), [*call[1:], *variant.overrides(Path())])
            its_config.accumulation_steps(variant.ranks)
        corpus = prepare_corpus(config)
        config = config.resolve(vocabulary_size(corpus.tokenizer))
        examination = Examination(config, corpus, TRAIN, call)
        examination.run(tried)
        failed += examination.failed
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of this command."""
    parser = OneLineParser(
        prog="doctor.py",
        description="Prove on your own configuration that a run is the same run on any topology.",
    )
    parser.add_argument("items", nargs="+", metavar="CONFIG | key=value", help="a YAML file, then overrides")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks to try (default 1,2,4)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (default 8)")
    parser.add_argument(
        "--every", action="store_true", help="also both ZeRO stages, micro batches of 1 and 4"
    )
    parser.add_argument("--real-shapes", action="store_true", help="keep the widths, depth and batch sizes")
    parser.add_argument("--world", type=positive_int, metavar="N", help="train nothing: dry run of N ranks")
    parser.add_argument("--gpu", help=f"with --world, whether a rank fits one of {GPU_NAMES}")
    options = parser.parse_intermixed_args(arguments)
    if options.gpu and not options.world:
        raise ConfigError("--gpu", "is for a dry run; give the number of ranks too, such as --world 64")
    for name in ("ranks", "steps", "every", "real_shapes") if options.world else ():
        if getattr(options, name) != parser.get_default(name):
            raise ConfigError("--world", f"trains nothing; remove --{name.replace('_', '-')}")
    return options


def show_dry_run(config: Config, options: argparse.Namespace) -> int:
    """Print what a run on this many ranks would be; 1 if a check fails."""
    gpu = named_gpu("--gpu", options.gpu) if options.gpu else None
    config = with_vocabulary(config)
    refuse_impossible(config, options.world, gpu)
    found = dry_run(config, options.world)
    print("\n".join(found.lines(gpu)))
    return 0 if all(check.passed for check in found.checks()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
