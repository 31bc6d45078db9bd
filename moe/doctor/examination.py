"""Train one configuration on every topology, through train.py itself, and compare the runs."""

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe.accounting.memory import estimate_memory
from moe.checkpoint.reading import Checkpoint, newest_checkpoint
from moe.config import Config, changed
from moe.data.batches import read_batches
from moe.data.samples import samples_of_step, spread_starts
from moe.data.token_cache import TokenizedCorpus
from moe.distributed.launch import choose_device
from moe.doctor.layer_check import layer_error
from moe.doctor.variants import Variant
from moe.doctor.worker import launch
from moe.inference.trained_run import load_run
from moe.model.parameter_roles import family, parameter_roles
from moe.model.transformer import Transformer
from moe.runs.metrics_log import read_metrics
from moe.training.loss import training_loss

# Largest differences that rounding explains over the steps: loss and norm relative, weights absolute.
BOUNDS = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-2, 5e-1, 1e-1)}
NORM_BOUND = {"fp32": 1e-4, "bf16": 5e-3}  # of one step's norm, relative: no error has had time to grow
LAYER_BOUND = 1e-4
_TOTAL = "optim/grad_norm"  # in metrics.jsonl; its parts add /dense, /router and /experts
MEMORY_SLACK = 2**28  # for libraries, buffers and the allocator, which the estimate does not count
EXPLANATION = """\
      largest relative difference of loss and of gradient norm, absolute of final weights;
      then the norms of the first step, whole and by family, against plain torch's."""
BF16_EXPLANATION = "\n      In bf16 runs separate soon: only the bound of the first norm is tight."
OUT_OF_BOUNDS = """\
      Out of bounds from step {} on. If all was well before, two experts of a token were equal
      within rounding, and it went to the other one; run again with another run.seed"""


class Examination:
    """All checks of one configuration in one precision.

    Args:
        config: complete, with `model.vocab_size` set.
        corpus: its text.
        train: train.py.
        call: the arguments that give train.py this configuration.
    """

    def __init__(self, config: Config, corpus: TokenizedCorpus, train: Path, call: Sequence[str]):
        self.config, self.corpus, self.train = config, corpus, train
        self.precision, self.device = config.parallel.precision, choose_device(config.parallel)
        self.bounds = BOUNDS[self.precision]
        self.norms = self._first_norms()
        self.call = [*call, f"optim.grad_clip={self.norms[_TOTAL] / 4}"]  # so that the clipping takes effect
        self.failed = 0  # how many checks failed so far

    def run(self, variants: Sequence[Variant]) -> None:
        """Train every variant, and compare each run with that of the first one."""
        sparse, reference = not self.config.moe.is_dense, variants[0]
        if self.precision == "fp32" and sparse:
            error = layer_error(self.config, self.device)
            check = "dropless layer = naive loop, every gradient (relative)"
            self._report(check, f"{error:.1e}", error < LAYER_BOUND)
        with tempfile.TemporaryDirectory(prefix="doctor-") as scratch:
            folder = Path(scratch)
            peaks = {}
            for ranks in sorted({variant.ranks for variant in variants}):
                calls = [[*self.call, *each.overrides(folder)] for each in variants if each.ranks == ranks]
                peaks[ranks] = launch(self.train, folder, ranks, calls)
            steps = f"{self.config.train.steps} clipped steps in {self.precision}"
            print(f"      {steps} against {reference.title}:")
            print(EXPLANATION + (BF16_EXPLANATION if self.precision == "bf16" else ""))
            for variant in variants:
                self._check_run(folder / variant.name, folder / reference.name, variant.title)
            print("      Stopped at the middle and resumed, against the uninterrupted run:")
            self._check_resume(variants, folder)
            if sparse:
                self._check_experts(folder / reference.name)
            # In bf16 on a CPU oneDNN keeps a kernel per number of rows: 0.6 GiB in 50 steps.
            if self.precision == "fp32" or self.device.type == "cuda":
                for ranks, peak in peaks.items():
                    self._check_memory(next(each for each in variants if each.ranks == ranks), peak)

    def _report(self, check: str, figure: str, passed: bool) -> None:
        self.failed += not passed
        print(f"{'pass' if passed else 'FAIL'}  {check:<58} {figure}", flush=True)

    def _first_norms(self) -> dict[str, float]:
        """Norms of the first step's gradient from plain torch: one process, no engine, no clipping."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        model = Transformer(self.config).to(self.device, dtype)
        starts = samples_of_step(self.config, self.corpus.train, 0)
        batches = read_batches(self.config, self.corpus.train, starts, self.device, step=0)
        for batch in batches:
            output = model(batch.tokens, batch.documents, dropout_keys=batch.dropout_keys)
            loss = training_loss(output, batch.targets, self.config.moe).total
            (loss / len(batches)).backward()
        squares, roles = defaultdict[str, float](float), parameter_roles(model)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                for key in (_TOTAL, f"{_TOTAL}/{family(roles[name])}"):
                    squares[key] += float(parameter.grad.double().square().sum())
        return {key: math.sqrt(square) for key, square in squares.items()}

    def _check_run(self, run: Path, reference: Path, title: str) -> None:
        """A variant against the reference, and its first norms against those of plain torch."""
        found, first = _differences(run, reference), _steps(run)[0]
        torch_norms = max(abs(first[key] / norm - 1) for key, norm in self.norms.items())
        passed = _within(found, self.bounds)
        if not passed:
            print(OUT_OF_BOUNDS.format(_first_step_out_of_bounds(run, reference, self.bounds)))
        passed = passed and torch_norms <= NORM_BOUND[self.precision]
        self._report(title, f"{_show(found)}  torch {torch_norms:.1e}", passed)

    def _check_resume(self, variants: Sequence[Variant], folder: Path) -> None:
        """Cut runs back to their middle; continue each on its own topology, and on another."""
        first, widest = variants[0], variants[-1]
        for source, target in dict.fromkeys([(widest, widest), (first, widest), (widest, first)]):
            again = folder / f"{source.name}-then-{target.name}"
            shutil.copytree(folder / source.name, again)
            (again / "summary.json").unlink()
            shutil.rmtree(_newest(again).path)
            call = [*self.call, *target.overrides(folder), f"run.dir={again}"]
            launch(self.train, folder, target.ranks, [call])
            found = _differences(again, folder / target.name)
            bounds = (0.0, 0.0, 0.0) if source == target else self.bounds
            places = [f"ranks {variant.ranks}, ep {variant.ep_size}" for variant in (source, target)]
            check = f"saved at {places[0]}; resumed at {places[1]}"
            self._report(check, _show(found), _within(found, bounds))

    def _check_experts(self, run: Path) -> None:
        """After the last step, each expert gets tokens of the training text."""
        model, moe = load_run(run, self.device).model, self.config.moe
        text, seq_len = self.corpus.train, self.config.data.seq_len
        wanted = 32 * moe.num_experts / moe.top_k  # tokens for 32 assignments an expert
        samples = math.ceil(max(wanted / seq_len, self.config.train.global_batch_size))
        starts = spread_starts(len(text.tokens), seq_len, samples)
        counts = torch.zeros((), dtype=torch.int64)
        with torch.no_grad():
            for batch in read_batches(self.config, text, starts, self.device):
                counts = counts + model(batch.tokens, batch.documents).aux.tokens_per_expert.cpu()
        dead, share = int((counts == 0).sum()), float(counts.min() / counts.double().mean())
        figures = f"{dead} dead, least used {share:.2f} of the mean"
        self._report(f"no dead expert on {samples} samples", figures, not dead)

    def _check_memory(self, variant: Variant, peak: int) -> None:
        """What a rank took, against the estimate that a run prints at its start."""
        parallel = {"parallel.ep_size": variant.ep_size, "parallel.zero_stage": variant.zero_stage}
        estimate = estimate_memory(changed(self.config, parallel), variant.ranks, self.device.type).peak
        slack = f"plus {MEMORY_SLACK / 2**20:.0f} MiB for libraries"
        self._report(
            f"ranks {variant.ranks}: memory fits the estimate ({slack})",
            f"{peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB",
            peak <= estimate + MEMORY_SLACK,
        )


_Differences = tuple[float, float, float]  # loss and norm relative, final weights absolute


def _steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss/lm" in line]


def _newest(run: Path) -> Checkpoint:
    checkpoint, warnings = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None, warnings
    return checkpoint


def _differences(run: Path, reference: Path) -> _Differences:
    pairs = list(zip(_steps(run), _steps(reference), strict=True))
    loss, norm = (max(abs(a[key] / b[key] - 1) for a, b in pairs) for key in ("loss/lm", "optim/grad_norm"))
    ours, theirs = _newest(run), _newest(reference)
    weights = max(
        float((ours.read("weights", name) - theirs.read("weights", name)).abs().max())
        for name in theirs.tensors["weights"]
    )
    return loss, norm, weights


def _first_step_out_of_bounds(run: Path, reference: Path, bounds: _Differences) -> int | None:
    """The first step whose loss or norm differ by more than their bounds; None if only weights do."""
    for a, b in zip(_steps(run), _steps(reference), strict=True):
        for key, bound in zip(("loss/lm", "optim/grad_norm"), bounds, strict=False):
            if not abs(a[key] / b[key] - 1) <= bound:
                return a["step"]
    return None


def _show(found: _Differences) -> str:
    return "loss {:.1e}  norm {:.1e}  weights {:.1e}".format(*found)


def _within(found: _Differences, bounds: _Differences) -> bool:
    return all(a <= b for a, b in zip(found, bounds, strict=True))  # false for NaN
