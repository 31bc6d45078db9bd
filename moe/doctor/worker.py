"""Run train.py several times on ranks that start once: python -m moe.doctor.worker TRAIN JOBS.json."""

import json
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from moe.config import RunError
from moe.distributed.launch import leave


def launch(train: Path, folder: Path, ranks: int, calls: Sequence[Sequence[str]]) -> int:
    """Run train.py with each list of arguments, one after the other; what they print goes into `folder`.

    Returns:
        The largest memory of a rank during the first of them, in bytes beyond that of the libraries.

    Raises:
        RunError: a run failed.
    """
    print(f"      training {len(calls)} x on {ranks} rank{'s' if ranks > 1 else ''} ...", flush=True)
    jobs, log = folder / f"jobs{ranks}.json", folder / f"ranks{ranks}.log"
    jobs.write_text(json.dumps(calls))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", __name__, str(train), str(jobs)]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with log.open("w") as output:
        code = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if code:
        raise RunError(f"a run on {ranks} ranks failed:\n" + log.read_text()[-3000:])
    return max(int(path.read_text()) for path in folder.glob(f"jobs{ranks}.json.peak*"))


def work(train: Path, jobs: Path) -> int:
    """One rank of `launch`."""
    main, before = runpy.run_path(str(train))["main"], _peak_memory()
    for i, call in enumerate(json.loads(jobs.read_text())):
        with redirect_stdout(sys.stderr), redirect_stderr(sys.stderr):
            if code := main(call):
                return code
        if i == 0:
            rank = os.environ.get("RANK", "0")
            jobs.with_name(f"{jobs.name}.peak{rank}").write_text(str(_peak_memory() - before))
    leave()
    return 0


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Path(sys.argv[2])))
