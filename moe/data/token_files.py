"""Writing documents as tokens, in bounded memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from moe.data.corpus import Document
from moe.data.files import PIECE
from moe.data.tokenizer import vocabulary_size

_MOST_DOCUMENTS = 256  # that are tokenized at once, on all cores
_T = TypeVar("_T")


class TokenFiles:
    """For each name a file of tokens, `NAME.bin`, and one of its documents, `NAME.documents.bin`.

    The latter holds a pair of int64 per document: the place of its first token, and its domain.

    Args:
        folder: where the files are made.
        names: of the files.
        tokenizer: makes the tokens.
        end: the token that is written after each document.
        limits: a file that has this many tokens takes no further document.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], tokenizer: Tokenizer, end: str, limits: dict[str, int]
    ):
        self._tokenizer, self._end_id, self._limits = tokenizer, tokenizer.token_to_id(end), limits
        tokenizer.encode_special_tokens = True  # a document that spells out the end token does not end there
        self._dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
        self.counts: dict[str, dict[str, Any]] = {}
        self._files, self._documents, self._unfinished = {}, {}, set[str]()
        for name in names:
            self.counts[name] = {"tokens": 0, "bytes": 0, "dtype": self._dtype.name, "domains": []}
            self._files[name] = (folder / f"{name}.bin").open("wb")
            self._documents[name] = (folder / f"{name}.documents.bin").open("wb")

    def __enter__(self) -> "TokenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), *self._documents.values()):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def write(self, documents: Iterable[tuple[str, Document]], names: Iterable[str]) -> None:
        """Tokenize documents until there are no more, or the files that they go into are full.

        Args:
            documents: each with the name of its file.
            names: of these files.
        """
        names = list(names)
        batch, characters = [], 0
        for name, document in documents:
            batch.append((name, document))
            characters += len(document.text)
            if len(batch) == _MOST_DOCUMENTS or characters >= 2 * PIECE:
                self._write_batch(batch)
                batch, characters = [], 0
                if all(map(self._is_full, names)):
                    break
        self._write_batch(batch)

    def _is_full(self, name: str) -> bool:
        return self.counts[name]["tokens"] >= self._limits.get(name, float("inf"))

    def _write_batch(self, batch: list[tuple[str, Document]]) -> None:
        encodings = self._tokenizer.encode_batch_fast(
            [document.text for _, document in batch], add_special_tokens=False
        )
        for (name, document), encoding in zip(batch, encodings, strict=True):
            count, continues = self.counts[name], name in self._unfinished
            if not continues and (self._is_full(name) or (document.ends and not document.text.strip())):
                continue
            if document.domain not in count["domains"]:
                count["domains"].append(document.domain)
            if not continues:
                place = (count["tokens"], count["domains"].index(document.domain))
                self._documents[name].write(np.array(place, dtype=np.int64).tobytes())
            ids = np.array(encoding.ids + [self._end_id] * document.ends, dtype=self._dtype)
            self._files[name].write(ids.tobytes())
            count["tokens"] += len(ids)
            count["bytes"] += len(document.text.encode(errors="surrogatepass"))
            self._unfinished.discard(name) if document.ends else self._unfinished.add(name)


def with_progress(items: Iterable[_T], what: str) -> Iterator[_T]:
    """Show on a terminal how many documents were read."""
    yield from tqdm(items, desc=what, unit=" documents", disable=None, leave=False)
