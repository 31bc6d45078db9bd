"""Tokenize the corpus of a configuration before it is trained on, on many cores and many nodes.

python scripts/tokenize_corpus.py CONFIG [section.key=value ...] [--processes N]

Start it on as many nodes as you like, with the same configuration and a `data.cache_dir` that all see: they
share the work. Stop or kill it at any time; started again, it goes on.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from moe.config import Config, ConfigError, load_config
from moe.config.command_line import INTERRUPTED, OneLineParser, command, positive_int
from moe.data.building import Build
from moe.data.chunks import CHUNK
from moe.data.token_cache import plan_build, prepare_corpus


@command
def main(arguments: Sequence[str]) -> int:
    """Parse the command line, tokenize, say what there is."""
    parser = OneLineParser(
        prog="tokenize_corpus.py", description="Tokenize the corpus of a configuration with many processes."
    )
    parser.add_argument("items", nargs="+", metavar="CONFIG | key=value", help="a YAML file, then overrides")
    parser.add_argument(
        "--processes", type=positive_int, default=os.cpu_count(), help="on this node; default: its cores"
    )
    options = parser.parse_intermixed_args(list(arguments))
    path, *overrides = options.items
    config = load_config(Path(path), overrides)
    started, build = time.perf_counter(), plan_build(config)
    known = build.is_published()
    try:
        if not known:
            tokenize(config, build, options.processes)
        corpus = prepare_corpus(config)
    except KeyboardInterrupt:
        print("interrupted; started again, it goes on", file=sys.stderr)
        return INTERRUPTED
    for name, text in {"training": corpus.train, "validation": corpus.validation}.items():
        for source, tokens in text.sources.items():
            of_source = f" of {source}" if config.data.sources else ""
            print(f"{len(tokens):,} {name} tokens{of_source}")
    took = "was tokenized before" if known else f"{time.perf_counter() - started:.1f} s"
    print(f"{took}; {build.folder}")
    return 0


def tokenize(config: Config, build: Build, processes: int) -> None:
    """Tokenize what is missing with so many processes, each of one thread."""
    build.make_tokenizer()  # on all cores
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # of the processes
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(share, config) for _ in range(processes)]
        every = 1 if sys.stderr.isatty() else 60  # seconds; lines of a log are kept
        with tqdm(desc="tokenizing", unit=f" x {CHUNK:,} characters", disable=False, delay=every) as progress:
            while wait(shares, every).not_done:
                progress.update(build.tokenized_chunks() - progress.n)
            progress.update(build.tokenized_chunks() - progress.n)
    for problem in [done.result() for done in shares]:
        if problem is not None:
            raise ConfigError(*problem)


def share(config: Config) -> tuple[str, str] | None:
    """One process's share of the work; the key and the message of what is wrong with the configuration."""
    build = plan_build(config)
    try:
        list(build.tokenize())
    except ConfigError as error:
        return error.key, error.message
    except FileNotFoundError:
        if not build.is_published():  # where it is, another node was faster, and has tidied up
            raise
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
