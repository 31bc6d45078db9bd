"""List the runs below a folder: how each stands, its size, loss and speed.

python scripts/runs.py [FOLDER] [--sort loss] [--plot curves.png] [--watch]
"""

import sys
import time
from pathlib import Path

from moe.config import ConfigError
from moe.config.command_line import DONE, OneLineParser, command, positive
from moe.runs.run_list import ListedRun, list_runs, plot_runs, table

# Low to high, runs without the value last.
_SORT = {
    "name": lambda run: run.name,
    "loss": lambda run: (run.loss is None, run.loss),
    "parameters": lambda run: run.counts.total,
    "tokens": lambda run: run.tokens,
    "speed": lambda run: (run.tokens_per_s is None, run.tokens_per_s),
    "written": lambda run: run.written,
}


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, print the table."""
    parser = OneLineParser(prog="runs.py", description="List the runs below a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--sort", choices=_SORT, default="name", help="from low to high (default: name)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the validation losses, such as a.png")
    watch_help = "print the table again every so many seconds (default 5), until Ctrl-C"
    parser.add_argument("--watch", type=positive, nargs="?", const=5.0, metavar="SECONDS", help=watch_help)
    options = parser.parse_args(arguments)
    while True:
        runs = _find(options.folder, options.sort)
        if options.watch is not None and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")  # clear the terminal
        print(table(runs), flush=True)
        if options.plot is not None:
            _plot(runs, options.plot)
        if options.watch is None:
            return DONE
        time.sleep(options.watch)


def _find(folder: Path, sort: str) -> list[ListedRun]:
    if not folder.is_dir():
        raise ConfigError("FOLDER", f"{folder} is no folder; give one that holds runs, such as runs")
    runs = list_runs(folder)
    if not runs:
        raise ConfigError("FOLDER", f"{folder} holds no run; python train.py leaves one in runs/tiny")
    return sorted(runs, key=_SORT[sort])


def _plot(runs: list[ListedRun], path: Path) -> None:
    try:
        plot_runs(runs, path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError("--plot", f"cannot write {path} ({reason})") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
