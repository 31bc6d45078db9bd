"""How well a text is predicted: every token once, from the tokens before it in its window."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

from moe.config import ConfigError, changed, parse_config
from moe.data.tokenizer import end_token, load_tokenizer
from moe.inference.perplexity import predict
from moe.inference.trained_run import TrainedRun
from moe.model.transformer import Transformer
from tests.support.models import SMALL

LENGTH = 10


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    """A token for each byte, windows of 10 tokens, three at a time."""
    tokenizer = load_tokenizer("bytes", ())
    end = tokenizer.token_to_id(end_token(tokenizer, None))
    assert end is not None
    config = parse_config(
        SMALL
        | {"model": SMALL["model"] | {"vocab_size": 257}}
        | {"data": {"seq_len": LENGTH}, "train": {"global_batch_size": 3, "micro_batch_size": 3}}
    )
    return TrainedRun(Transformer(config).eval(), tokenizer, config, end)


@torch.no_grad()
def naive(run: TrainedRun, documents: list[str], stride: int) -> float:
    """Nats of all tokens, one after the other."""
    tokens, ends = [run.end_id], [0]
    for number, document in enumerate(documents, 1):
        tokens += [*run.tokenizer.encode(document).ids, run.end_id]
        ends += [number] * (len(tokens) - len(ends))
    nats, start = 0.0, 0
    for place in range(1, len(tokens)):
        while place > start + LENGTH:
            start += stride
        own = torch.tensor([ends[start:place]]) if run.config.data.document_masks else None
        logits = run.model(torch.tensor([tokens[start:place]]), own).logits[0, -1]
        nats -= float(logits.double().log_softmax(0)[tokens[place]])
    return nats


def data_of(path, **changes):
    return parse_config({"data": {"source": str(path)} | changes}).data


@pytest.mark.parametrize("stride", [None, 10, 7, 1])
@pytest.mark.parametrize("size", [1, 5, 9, 10, 28, 29, 61])
def test_every_token_counts_once_whatever_the_length_and_the_stride(run, tmp_path, size, stride):
    (tmp_path / "text.txt").write_text(text := "".join(chr(97 + n * n % 26) for n in range(size)))
    found = predict(run, data_of(tmp_path / "text.txt"), stride)
    assert (found.documents, found.tokens, found.num_bytes) == (1, size + 1, size)
    want = naive(run, [text], stride or LENGTH)
    assert found.nats == pytest.approx(want, rel=1e-6)
    assert found.nats_per_token == pytest.approx(want / (size + 1), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(want / (size + 1)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(want / 0.693147 / size, rel=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_documents_follow_each_other_with_the_token_that_ends_them(run, tmp_path, masks):
    """With masks they see their own tokens only. None is held out, and empty ones are left out."""
    texts = [f"äé <|endoftext|> {n} " * (n % 3 + 1) for n in range(25)]
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in [*texts, " "])
    run = replace(run, config=changed(run.config, {"data.document_masks": masks}))
    found = predict(run, data_of(tmp_path / "texts.jsonl.gz", text_field="body"), stride=4)
    run.tokenizer.encode_special_tokens = True
    want = naive(run, texts, 4)
    run.tokenizer.encode_special_tokens = False
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.tokens, found.num_bytes) == (25, num_bytes + 25, num_bytes)
    assert found.nats == pytest.approx(want, rel=1e-6)


def test_figures_of_several_texts_are_those_of_all_their_tokens(run, tmp_path):
    parts = []
    for name, text in (("a", "x" * 40), ("b", "some other text")):
        (tmp_path / name).write_text(text)
        parts.append(predict(run, data_of(tmp_path / name)))
    both = parts[0] + parts[1]
    assert both.nats_per_token == pytest.approx((parts[0].nats + parts[1].nats) / (41 + 16))
    assert (both.documents, both.num_bytes) == (2, 55)


def test_what_cannot_be_predicted_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"data\.source: .*empty\.txt holds no text"):
        predict(run, data_of(tmp_path / "empty.txt"))
    for stride in (0, -5):
        with pytest.raises(ConfigError, match=f"stride: should be at least 1 .*; got {stride}"):
            predict(run, data_of(tmp_path / "text.txt"), stride)
    with pytest.raises(ConfigError, match="stride: should be of type int"):
        predict(run, data_of(tmp_path / "text.txt"), 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="data: should be of type DataConfig, got str"):
        predict(run, "text.txt")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="stride: should be at least 1 and at most 10"):
        predict(run, data_of(tmp_path / "empty.txt"), stride=11)
