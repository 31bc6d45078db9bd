"""Compare two sets of finished runs, paired by seed.

python scripts/compare.py --runs runs/tiny-* --against runs/tiny_dense-*
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from moe.ablation.statistics import paired_difference, with_bounds
from moe.config.loading import OneLineParser, load_config
from moe.config.schema import ConfigError
from moe.runs.run_folder import RunFolder


def main(arguments: list[str]) -> int:
    """Parse the command line, print the table."""
    parser = OneLineParser(
        prog="compare.py", description="Compare two sets of finished runs, paired by seed."
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders, one per seed")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="the baselines, same seeds")
    options = parser.parse_args(arguments)
    try:
        runs, baselines = by_seed("--runs", options.runs), by_seed("--against", options.against)
        if runs.keys() != baselines.keys():
            seeds = f"{sorted(runs)} against {sorted(baselines)}"
            raise ConfigError("--against", f"the seeds differ ({seeds}); give one run per seed on both sides")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("seed   runs: bits/byte    against: bits/byte    difference")
    for seed in sorted(runs):
        ours, theirs = runs[seed]["final_bits_per_byte"], baselines[seed]["final_bits_per_byte"]
        print(f"{seed:>4} {ours:>18.4f} {theirs:>21.4f} {ours - theirs:>+13.4f}")
    difference = paired_difference(
        {seed: run["final_bits_per_byte"] for seed, run in runs.items()},
        {seed: run["final_bits_per_byte"] for seed, run in baselines.items()},
    )
    print(f"mean difference {with_bounds(difference)}, with the 95 % interval of the paired t-test")
    for name, side in (("runs", runs), ("against", baselines)):
        any_run = next(iter(side.values()))
        speed = statistics.median(summary["tokens_per_s"] for summary in side.values())
        print(
            f"{name}: {any_run['params_total']:,} parameters, {any_run['params_active']:,} active, "
            f"{any_run['flops_per_token']:,} FLOPs per token, median {speed:,.0f} tokens/s"
        )
    return 0


def by_seed(option: str, folders: list[Path]) -> dict[int, dict[str, Any]]:
    """Seed -> summary of each finished run."""
    found = {}
    for path in folders:
        folder = RunFolder(path)
        if not folder.summary.exists():
            raise ConfigError(option, f"{path} is no finished run (it has no summary.json)")
        try:
            summary = json.loads(folder.summary.read_text())
        except ValueError:
            raise ConfigError(option, f"{folder.summary} is not JSON; run that training again") from None
        found[load_config(folder.config).run.seed] = summary
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
