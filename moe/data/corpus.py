"""Where text comes from: the standard library of the running Python, local files, or a hub dataset.

A corpus is split into train and validation by a hash of what identifies a document: the text of a record, or
the path of a file, relative to the deepest folder that holds all files.
"""

import hashlib
import logging
import os
import pydoc_data.topics
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe.config import ConfigError, DataConfig, first_line
from moe.data.files import PIECE, find_files, is_saved_dataset, kind_of, relative_names, text_pieces
from moe.data.fingerprint import content_hash, hash_of_parts
from moe.data.records import BadRecord, texts_of_file, texts_of_records

Split = Literal["train", "validation"]
FEW_FILES = 20  # fewer plain-text files than this are not split by file: each one's tail is validation text
NEWLINE_REACH = 2000  # how far a tail may start before its exact place, to start at a line


class Document(NamedTuple):
    """A text, or a piece of one.

    Attributes:
        text: at most `files.PIECE` characters.
        split: which it belongs to.
        domain: where it comes from: `code`, `prose`, `text`.
        ends: False if the next document continues it.
    """

    text: str
    split: Split
    domain: str
    ends: bool = True


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read more than once, in the same order each time.

    Attributes:
        fingerprint: hash of the content, or of the revision of a hub dataset.
        read: starts a new pass over the documents; in the place of a record without text, what is wrong.
        revision: the commit of a hub dataset.
    """

    fingerprint: str
    read: Callable[[], Iterator[Document | BadRecord]]
    revision: str | None = None


def open_corpus(data: DataConfig, cache: Path) -> Corpus:
    """Find the source named by `data.source`.

    Args:
        data: the section of the configuration.
        cache: the folder that remembers hashes of files, which are not read again unless they changed.

    Raises:
        ConfigError: it does not exist, cannot be read, or holds no text.
    """
    if data.source == "stdlib":
        return _stdlib(data)
    paths = find_files(data)
    return _hub(data) if paths is None else _local(data, paths, cache)


def _stdlib(data: DataConfig) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts and path.parts[-2:] != ("pydoc_data", "topics.py")
    ]
    texts = [(str(path.relative_to(root)), _python_source(path), "code") for path in files]
    texts += [
        (f"pydoc_data/topics/{name}", text, "prose")
        for name, text in sorted(pydoc_data.topics.topics.items())
    ]
    documents, seen = [], set()
    for name, text, domain in texts:
        if text.strip() and text not in seen:  # copies of a file must not sit on both sides of the split
            seen.add(text)
            documents.append(Document(text, split_of(name, data.validation_share), domain))
    identity = (part for document in documents for part in (document.split, document.text))
    return Corpus(hash_of_parts(identity), lambda: iter(documents))


def _python_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # CPython's own tests hold a few files in deliberately broken encodings


def _local(data: DataConfig, paths: list[str], cache: Path) -> Corpus:
    fingerprint = content_hash(paths, list(relative_names(paths)), cache, data.cache_timeout_s)

    def read() -> Iterator[Document | BadRecord]:
        if text_paths := [path for path in paths if kind_of(path) == "text"]:
            yield from _text_files(text_paths, data)
        for path in paths:
            if is_saved_dataset(path):
                yield from _saved_dataset(path, data)
            elif kind_of(path) != "text":
                yield from _documents(texts_of_file(path, data), None, data)

    return Corpus(fingerprint, read)


def _text_files(paths: list[str], data: DataConfig) -> Iterator[Document]:
    splits: list[Split] = [split_of(name, data.validation_share) for name in relative_names(paths)]
    by_file = len(paths) >= FEW_FILES and len(set(splits)) == 2
    seen: set[bytes] = set()
    for path, split in zip(paths, splits, strict=True):
        digest, size = hashlib.sha256(), 0
        for piece in text_pieces(path, data.encoding):
            digest.update(piece.encode(errors="surrogatepass"))
            size += len(piece)
        if digest.digest() in seen:  # copies of a file must not sit on both sides of the split
            continue
        seen.add(digest.digest())
        pieces = text_pieces(path, data.encoding)
        if by_file or data.validation_share == 0:
            yield from _one_document(pieces, split, "text")
        else:
            yield from _head_and_tail(pieces, size - int(size * data.validation_share))


def _head_and_tail(pieces: Iterator[str], cut: int) -> Iterator[Document]:
    """What comes before character `cut`, or the start of a line close before it, and what comes after."""

    def head() -> Iterator[str]:
        nonlocal first_of_tail
        begin = 0
        for piece in pieces:
            if begin + len(piece) > cut:
                at = cut - begin
                at = piece.rfind("\n", max(0, at - NEWLINE_REACH), at) + 1 or at
                first_of_tail = piece[at:]
                yield piece[:at]
                return
            begin += len(piece)
            yield piece

    def tail() -> Iterator[str]:
        yield first_of_tail
        yield from pieces

    first_of_tail = ""
    yield from _one_document(head(), "train", "text")
    yield from _one_document(tail(), "validation", "text")


def _one_document(pieces: Iterator[str], split: Split, domain: str) -> Iterator[Document]:
    """The pieces of one text."""
    piece = next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        yield Document(piece, split, domain, ends=following is None)
        piece = following


def _documents(
    found: Iterator[str | BadRecord], split: Split | None, data: DataConfig
) -> Iterator[Document | BadRecord]:
    """Each record is a document, in pieces if it is long. Without a given split its text decides."""
    for text in found:
        if isinstance(text, BadRecord):
            yield text
        else:
            side = split or split_of(text, data.validation_share)
            pieces = (text[at : at + PIECE] for at in range(0, max(1, len(text)), PIECE))
            yield from _one_document(pieces, side, "text")


def _saved_dataset(path: str, data: DataConfig) -> Iterator[Document | BadRecord]:
    import datasets  # takes 1.5 s, and the default source does not need it

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # datasets raises whatever its readers raise
        raise ConfigError("data.source", f"{path} cannot be read ({first_line(error)[:200]})") from None
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    yield from _splits(parts, os.path.basename(os.path.abspath(path)), data)


def _splits(parts: Any, origin: str, data: DataConfig) -> Iterator[Document | BadRecord]:
    """The validation split of a dataset, if it has one, and its training split."""
    if "train" not in parts:
        names = ", ".join(map(str, parts))
        raise ConfigError("data.source", f"{origin} has no split called train; it has {names}")
    sides: dict[str, Split | None] = {"train": None}
    if "validation" in parts:
        sides = {"validation": "validation", "train": "train"}
    for name, side in sides.items():
        yield from _documents(texts_of_records(parts[name], f"{origin}, {name}", data), side, data)


def _hub(data: DataConfig) -> Corpus:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # our own errors name the problem
    try:
        revision = data.revision or HfApi().dataset_info(data.source, timeout=20).sha
    except Exception as error:  # the hub client's errors differ from version to version
        problem = f"{data.source!r} is not a file here, and the hub has no answer for it"
        reason = f"({type(error).__name__}: {first_line(error)[:120]})"
        fix = "check the name, data.subset and the network"
        raise ConfigError("data.source", f"{problem} {reason}; {fix}") from None

    def read() -> Iterator[Document | BadRecord]:
        try:
            names = datasets.get_dataset_split_names(data.source, data.subset, revision=revision)
            parts = {
                name: datasets.load_dataset(
                    data.source, name=data.subset, split=name, streaming=True, revision=revision
                )
                for name in names
                if name in ("train", "validation")
            }
            yield from _splits(parts, data.source, data)
        except ConfigError:
            raise
        except Exception as error:  # datasets raises whatever the hub client and its readers raise
            reason = first_line(error)[:200]
            raise ConfigError("data.source", f"{data.source} cannot be read ({reason})") from None

    return Corpus(hash_of_parts([data.source, str(data.subset), str(revision)]), read, revision)


def split_of(identity: str, validation_share: float) -> Split:
    """The side of the document with this name or text, fixed by a hash of it."""
    number = int.from_bytes(hashlib.sha256(identity.encode(errors="surrogatepass")).digest()[:8], "big")
    # Twentieths first, and their parts after that: a share of 1/20 takes one whole twentieth.
    place = (number % 20 + (number // 20) / (2**64 // 20 + 1)) / 20
    return "validation" if place < validation_share else "train"


class BadRecords:
    """What becomes of records without text.

    Args:
        skip: whether they are counted instead of refused.

    Attributes:
        number: of those that were skipped.
        first: where the first of them is, and what is wrong with it.
    """

    def __init__(self, skip: bool):
        self._skip, self.number, self.first = skip, 0, ""

    def left_out(self, corpus: Corpus) -> Iterator[Document]:
        """The documents of a corpus without them.

        Raises:
            ConfigError: there is one, and it is not to be skipped.
        """
        for document in corpus.read():
            if isinstance(document, Document):
                yield document
                continue
            problem = f"{document.where}: {document.problem}"
            if not self._skip:
                fix = "fix it, or skip such records with data.on_bad_record=skip"
                raise ConfigError("data.text_field", f"{problem}; {fix}")
            self.number, self.first = self.number + 1, self.first or problem
