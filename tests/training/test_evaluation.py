"""The validation loss is the mean cross-entropy over the samples that are evaluated, by arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.data.token_cache import prepare_corpus
from moe.inference.trained_run import load_run
from tests.support.runs import read_lines


@pytest.mark.parametrize("batches", [2, 50])
def test_it_is_over_the_samples_asked_for_or_all_there_are(run_main, tmp_path, batches):
    """2 batches of 4 of its 15 to 30 samples, evenly spread; or all, where there are fewer than asked for."""
    (tmp_path / "text").write_text("".join(f"this is line {line:06d}\n" for line in range(600)))
    code, folder, _, _ = run_main(
        f"data.source={tmp_path / 'text'}", "train.steps=2", f"train.eval_batches={batches}"
    )
    assert code == 0
    run = load_run(folder)
    tokens = prepare_corpus(run.config).validation.tokens.astype(np.int64)
    num = (len(tokens) - 1) // 32
    assert 15 <= num <= 30
    chosen = range(num) if batches == 50 else np.linspace(0, num - 1, 8).round().astype(int)
    losses = []
    with torch.no_grad():
        for i in chosen:
            sample = torch.from_numpy(tokens[32 * i : 32 * i + 33])
            losses.append(F.cross_entropy(run.model(sample[None, :-1]).logits[0], sample[1:]).item())
    last = [line for line in read_lines(folder) if "eval/loss" in line][-1]
    assert last["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
