"""What a budget buys: the compute-optimal dense model, and sparse ones of the same active size.

python scripts/plan.py --budget-usd 20000 --gpu h100 --gpus 64
python scripts/plan.py --budget-flops 1e21 --gpu a100 --gpus 32 --experts 16,64
"""

import argparse
import json
import sys

from moe.accounting.budget import SPARSE_SPEED, TOP_K, Budget, budget_notes, budget_rows
from moe.accounting.gpus import GPU_NAMES, named_gpu
from moe.config import ConfigError
from moe.config.command_line import OneLineParser, command, fraction, positive, positive_int
from moe.tables import align, short


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, plan, print."""
    options = parse(arguments)
    budget = Budget(
        flops=options.budget_flops,
        usd=options.budget_usd,
        gpu=named_gpu("--gpu", options.gpu),
        gpus=options.gpus,
        mfu=options.mfu,
        sparse_speed=options.sparse_speed,
        usd_per_hour=options.usd_per_hour,
        vocab_size=options.vocab_size,
        seq_len=options.seq_len,
    )
    counts = expert_counts(options.experts)
    size, tokens = budget.dense_optimum()
    models = [budget.model(size, experts) for experts in (1, *counts)]
    if options.json:
        print(json.dumps(models, indent=1))
        return 0
    optimum = f"{short(size)} parameters and {short(tokens)} tokens"
    print(
        f"{budget.flops_at(budget.mfu):.3g} FLOPs: a dense model does best with {optimum}; the table has the "
        "nearest shape and counts attention"
    )
    print(align(list(budget_rows(models))))
    print("\n".join(budget_notes(models, budget)))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of this command."""
    parser = OneLineParser(
        prog="plan.py",
        description="What a budget buys: a compute-optimal dense model, sparse ones of its active size.",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-flops", type=positive, help="FLOPs of the model's training")
    budget.add_argument("--budget-usd", type=positive, help="price of the GPU-hours")
    add = parser.add_argument
    add("--gpu", required=True, help=f"one of {GPU_NAMES}")
    add("--gpus", type=positive_int, required=True, help="how many")
    add("--experts", default="8,16,32,64,128", help="default 8,16,32,64,128")
    add("--mfu", type=fraction, default=0.4, help="utilisation, dense (default 0.4)")
    speed_help = f"tokens/s of a sparse model over a dense one's of equal FLOPs (default {SPARSE_SPEED})"
    add("--sparse-speed", type=fraction, default=SPARSE_SPEED, help=speed_help)
    add("--usd-per-hour", type=positive, help="price of a GPU (default: a common one)")
    add("--vocab-size", type=positive_int, default=50304, help="default 50304")
    add("--seq-len", type=positive_int, default=4096, help="per sample (default 4096)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def expert_counts(text: str) -> list[int]:
    """The argument of --experts."""
    counts = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > TOP_K]
    if len(counts) != len(text.split(",")):
        raise ConfigError("--experts", f"should be numbers above {TOP_K} such as 8,64, got {text!r}")
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
