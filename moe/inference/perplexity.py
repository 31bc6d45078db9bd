"""How well a trained run predicts a text: perplexity, nats per token, bits per byte."""

import math
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config import ConfigError, DataConfig, check_type
from moe.data.corpus import BadRecords, open_corpus
from moe.inference.trained_run import TrainedRun
from moe.model.losses import NOT_COUNTED


@dataclass(frozen=True)
class Prediction:
    """How well a text was predicted.

    Attributes:
        documents: of the text.
        tokens: that were predicted, with the one that ends each document.
        num_bytes: of the documents in UTF-8.
        nats: cross-entropy, summed over the tokens.
    """

    documents: int
    tokens: int
    num_bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy, as in `eval/loss`."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(nats_per_token)`; to be compared between runs of one tokenizer only."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in a unit that no tokenizer changes."""
        return self.nats / math.log(2) / self.num_bytes

    def __add__(self, other: "Prediction") -> "Prediction":
        return Prediction(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def record(self) -> dict[str, Any]:
        """All figures by name."""
        derived = ("nats_per_token", "perplexity", "bits_per_byte")
        return asdict(self) | {name: getattr(self, name) for name in derived}


class Tokenized(NamedTuple):
    """A text after the end token, so that its first token can be predicted too.

    Attributes:
        tokens: (1 + n,) int64.
        documents: (1 + n,) int64, the number of each token's document.
        num_bytes: of the documents.
    """

    tokens: Tensor
    documents: Tensor
    num_bytes: int


def predict(run: TrainedRun, data: DataConfig, stride: int | None = None) -> Prediction:
    """Predict each token of a text from those before it.

    As in training, documents follow each other, each with a token that ends it, and are cut into windows of
    `data.seq_len` tokens, as the run's configuration says.

    Args:
        run: from `load_run`.
        data: its `source` names the text. All of it is predicted, whatever is held out in training.
        stride: by how many tokens a window moves on; of each but the first, only the tokens that are new are
            counted. None: by all, as in training, so that the first tokens of a window have little context.

    Raises:
        ConfigError: the source cannot be read or holds no text, or the stride is below 1 or longer than a
            window.
    """
    check_type("run", run, TrainedRun)
    check_type("data", data, DataConfig)
    check_type("stride", stride, int | None)
    length, batch = run.config.data.seq_len, run.config.train.micro_batch_size
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        expected = f"at least 1 and at most {length}, data.seq_len of the run"
        raise ConfigError("stride", f"should be {expected}; got {stride}")
    text = tokenize(run, data)
    last = len(text.tokens) - 1  # no token comes after this one
    starts = [0, *range(stride, last - length + stride, stride)]
    full = [start for start in starts if start + length <= last]
    nats = 0.0
    for first in range(0, len(full), batch):
        nats += _nats(run, text, full[first : first + batch], length, stride)
    if len(full) < len(starts):
        rest = last - starts[-1]
        nats += _nats(run, text, starts[-1:], rest, new=rest - (length - stride))
    return Prediction(int(text.documents[-1]), last, text.num_bytes, nats)


@torch.no_grad()
def _nats(run: TrainedRun, text: Tokenized, starts: list[int], length: int, new: int) -> float:
    """Cross-entropy of the last `new` tokens of windows; of all for the window at the start of the text."""
    device = run.model.embedding.weight.device
    windows = torch.stack([text.tokens[start : start + length + 1] for start in starts]).to(device)
    documents = None
    if run.config.data.document_masks:
        documents = torch.stack([text.documents[start : start + length] for start in starts]).to(device)
    counted = torch.tensor([length if start == 0 else new for start in starts], device=device)
    is_new = torch.arange(length, device=device) >= length - counted[:, None]
    targets = windows[:, 1:].where(is_new, NOT_COUNTED)
    return float(run.model(windows[:, :-1], documents, targets=targets).nats)


def tokenize(run: TrainedRun, data: DataConfig) -> Tokenized:
    """All of a text as tokens of a run.

    Raises:
        ConfigError: the source cannot be read or holds no text.
    """
    tokens, documents, num_bytes, number = [run.end_id], [0], 0, 1
    run.tokenizer.encode_special_tokens = (
        True  # as in training: an end token that is spelled out ends nothing
    )
    with tempfile.TemporaryDirectory() as cache:
        corpus = open_corpus(data.model_copy(update={"validation_share": 0.0}), Path(cache))
    for document in BadRecords(data.on_bad_record == "skip").left_out(corpus):
        starts = documents[-1] < number
        if starts and document.ends and not document.text.strip():
            continue
        ids = run.tokenizer.encode(document.text, add_special_tokens=False).ids
        ids += [run.end_id] * document.ends
        tokens += ids
        documents += [number] * len(ids)
        num_bytes += len(document.text.encode(errors="surrogatepass"))
        number += document.ends
    run.tokenizer.encode_special_tokens = False
    if not num_bytes:
        raise ConfigError("data.source", f"{data.source} holds no text")
    return Tokenized(torch.tensor(tokens), torch.tensor(documents), num_bytes)
