"""Tokenizing a source chunk by chunk, by any number of processes, in bounded memory.

The documents of a source are cut into chunks of `CHUNK` characters, always in the same places. Each chunk is
tokenized by one process into a file, which gets its name when it is complete. So work that is done survives a
kill, and processes that share a folder, on one node or on many, share the work.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from moe.data.corpus import BadRecords, Corpus, Document
from moe.data.files import PIECE
from moe.data.tokenizer import vocabulary_size

CHUNK = 2**22  # characters: about a second of one core
LOG_INTERVAL_S = 5.0  # between lines that say how far tokenizing is
_MOST_DOCUMENTS = 256  # that are tokenized at once, on all cores
_T = TypeVar("_T")


@dataclass(frozen=True)
class Source:
    """A corpus, and what becomes of it.

    Attributes:
        name: of the source.
        corpus: its documents.
        files: the token files that they go into: `train` and `validation`, `train` alone, which leaves out
            held-out documents, or one of another name. If a corpus of validation text has a validation
            split of its own, as many hub datasets have, this alone counts; it comes first.
        limits: how many tokens a token file needs of this source, by its name; without one it needs all.
        skips_bad: whether records without text are skipped and counted, or refused.
    """

    name: str
    corpus: Corpus
    files: tuple[str, ...]
    limits: dict[str, int]
    skips_bad: bool

    def documents(self, bad: BadRecords) -> Iterator[tuple[str, Document]]:
        """A pass over the documents, each with the name of its token file."""
        has_split = False
        for document in bad.left_out(self.corpus):
            if "train" in self.files:
                if document.split in self.files:
                    yield document.split, document
            else:
                has_split = has_split or document.split == "validation"
                if not has_split or document.split == "validation":
                    yield self.files[0], document


class Piece(NamedTuple):
    """A document or a piece of one, with the number of its chunk and its token file."""

    chunk: int
    file: str
    document: Document
    starts: bool  # whether a document starts with it


class TokenizedChunk(NamedTuple):
    """The tokens of a chunk that go into one token file.

    Attributes:
        tokens: (n,) uint16 or uint32, each document followed by the end token.
        pieces: (pieces, 4) int64: tokens, UTF-8 bytes, the index of the domain, and 1 if a document starts.
        domains: the names of the domains, in the order in which they appear.
    """

    tokens: np.ndarray
    pieces: np.ndarray
    domains: list[str]


class Found(NamedTuple):
    """How many chunks a source has, or needs; the bad records among them, and the first of these."""

    chunks: int
    bad_records: int
    first_bad: str


class Chunks:
    """The chunks of one source.

    Args:
        folder: where they are kept.
        source: what is tokenized.
        tokenizer: makes the tokens.
        end: the token that is written after each document.
    """

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, end: str):
        self._folder, self._source, self._end = folder, source, folder / "end.json"
        self._tokenizer, self._end_id = tokenizer, tokenizer.token_to_id(end)
        tokenizer.encode_special_tokens = True  # a document that spells out the end token does not end there
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
        self._tokens, self._whole = dict.fromkeys(source.files, 0), 0  # of the chunks before the first gap
        folder.mkdir(parents=True, exist_ok=True)

    def complete(self) -> Found:
        """Tokenize all chunks that no process has tokenized yet, or as many as the limits need.

        Raises:
            ConfigError: the source cannot be read, or has a bad record that is not to be skipped.
        """
        for wait in (False, True):  # at last for chunks that others work at, or left undone
            if found := self._found():
                return found
            self._tokenize_missing(wait)
        found = self._found()
        assert found is not None, "the source changed meanwhile"
        return found

    def read(self, number: int, file: str) -> TokenizedChunk:
        """What a chunk has for one of the token files."""
        with np.load(self._path(number)) as arrays:
            domains = arrays[f"{file}.domains"].tolist()
            return TokenizedChunk(arrays[f"{file}.tokens"], arrays[f"{file}.pieces"], domains)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07d}.npz"

    def _found(self) -> Found | None:
        """What there is, if nothing is missing."""
        if self._is_full():
            with np.load(self._path(self._whole - 1)) as arrays:
                number, first = arrays["bad"].tolist()
            return Found(self._whole, int(number), first)
        if self._end.exists():
            found = Found(**json.loads(self._end.read_text(encoding="utf-8")))
            if all(self._path(number).exists() for number in range(found.chunks)):
                return found
        return None

    def _is_full(self) -> bool:
        """Whether the chunks before the first gap are as many as the limits need."""
        limits = self._source.limits
        while limits and self._path(self._whole).exists():
            for file in self._tokens:
                self._tokens[file] += int(self.read(self._whole, file).pieces[:, 0].sum())
            self._whole += 1
        return bool(limits) and all(self._tokens[file] >= limits[file] for file in self._tokens)

    def _tokenize_missing(self, wait: bool) -> None:
        """One pass over the source; a chunk that another process works at is left to it, or waited for."""
        bad, chunks = BadRecords(self._source.skips_bad), 0
        documents = with_progress(self._source.documents(bad), "tokenizing")
        with (self._folder / "claims").open("ab") as claims:
            for number, pieces in groupby(_pieces(documents), attrgetter("chunk")):
                if self._is_full():
                    return
                chunks = number + 1
                if not self._path(number).exists() and _claim(claims.fileno(), number, wait):
                    if not self._path(number).exists():
                        self._write(number, pieces, bad)
                    fcntl.lockf(claims, fcntl.LOCK_UN, 1, number)
        found = Found(chunks, bad.number, bad.first)
        unfinished = self._end.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found._asdict()), encoding="utf-8")
        unfinished.replace(self._end)

    def _write(self, number: int, pieces: Iterator[Piece], bad: BadRecords) -> None:
        tokens: dict[str, list[np.ndarray]] = {file: [] for file in self._source.files}
        rows: dict[str, list[tuple[int, int, int, bool]]] = {file: [] for file in self._source.files}
        domains: dict[str, list[str]] = {file: [] for file in self._source.files}
        for batch in _batches(pieces):
            for (_, file, document, starts), ids in zip(batch, self._encode(batch), strict=True):
                if document.domain not in domains[file]:
                    domains[file].append(document.domain)
                size = len(document.text.encode(errors="surrogatepass"))
                tokens[file].append(ids)
                rows[file].append((len(ids), size, domains[file].index(document.domain), starts))
        arrays: dict[str, Any] = {"bad": np.array([str(bad.number), bad.first])}
        for file in self._source.files:
            arrays[f"{file}.tokens"] = np.concatenate([*tokens[file], np.empty(0, self.dtype)])
            arrays[f"{file}.pieces"] = np.array(rows[file], dtype=np.int64).reshape(-1, 4)
            arrays[f"{file}.domains"] = np.array(domains[file], dtype=str)
        unfinished = self._path(number).with_suffix(".part")
        with unfinished.open("wb") as opened:
            np.savez(opened, **arrays)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(self._path(number))

    def _encode(self, batch: list[Piece]) -> list[np.ndarray]:
        texts = [piece.document.text for piece in batch]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(encoding.ids + [self._end_id] * piece.document.ends, dtype=self.dtype)
            for piece, encoding in zip(batch, encodings, strict=True)
        ]


def with_progress(documents: Iterable[_T], what: str) -> Iterator[_T]:
    """Show how many documents were read: on a terminal always, in a log every few seconds."""
    bar, said = tqdm(documents, desc=what, unit=" documents", disable=None, leave=False), time.monotonic()
    for number, document in enumerate(bar):
        yield document
        if bar.disable and time.monotonic() - said > LOG_INTERVAL_S:
            said = time.monotonic()
            print(f"{what}: {number + 1:,} documents", flush=True)


def _claim(claims: int, number: int, wait: bool) -> bool:
    """Lock one byte of a file for a chunk; the system unlocks it if the process is killed."""
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _pieces(documents: Iterable[tuple[str, Document]]) -> Iterator[Piece]:
    """The documents that have text, each with the number of its chunk."""
    unfinished, chunk, characters = set[str](), 0, 0
    for file, document in documents:
        starts = file not in unfinished
        if starts and document.ends and not document.text.strip():
            continue
        unfinished.discard(file) if document.ends else unfinished.add(file)
        if characters >= CHUNK:
            chunk, characters = chunk + 1, 0
        characters += len(document.text)
        yield Piece(chunk, file, document, starts)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.document.text)
        if len(batch) == _MOST_DOCUMENTS or characters >= 2 * PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
