"""Where text comes from: the standard library of the running Python, local files, or a hub dataset.

A corpus is split into train and validation by a hash of what identifies a document: the text of a record, or
the path of a file, relative to the deepest folder that holds all files.
"""

import glob
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

Split = Literal["train", "validation"]
VALIDATION_SHARE = 20  # one document in this many
FEW_FILES = 20  # fewer plain-text files than this are not split by file: each one's tail is validation text
NEWLINE_REACH = 2000  # how far a tail may start before its exact place, to start at a line

_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ".tex", ".c", ".h", ".html"}
_SUFFIXES = {*_READERS, *_TEXT_SUFFIXES}


class Document(NamedTuple):
    """One text, the split it belongs to, and where it comes from (`code`, `prose`, `text`)."""

    text: str
    split: Split
    domain: str


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read more than once, in the same order each time.

    Attributes:
        fingerprint: hash of the content, or of the revision of a hub dataset.
        read: starts a new pass over the documents.
    """

    fingerprint: str
    read: Callable[[], Iterator[Document]]


def open_corpus(data: DataConfig) -> Corpus:
    """Find the source named by `data.source`.

    Raises:
        ConfigError: it does not exist, cannot be read, or holds no text.
    """
    if data.source == "stdlib":
        return _stdlib()
    paths = _local_paths(data.source)
    return _hub(data) if paths is None else _local(data, paths)


def _stdlib() -> Corpus:
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
            documents.append(Document(text, _split(name), domain))
    identity = (part for document in documents for part in (document.split, document.text))
    return Corpus(_fingerprint(*identity), lambda: iter(documents))


def _python_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # CPython's own tests hold a few files in deliberately broken encodings


def _local_paths(source: str) -> list[Path] | None:
    """The files that the source names; None if it looks like a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not found:
            raise ConfigError("data.source", f"folder {source} holds no text, JSON, CSV or Parquet file")
        return found
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if found:
        return found
    looks_local = path.suffix.lower() in _SUFFIXES or source[0] in "./~" or glob.has_magic(source)
    if looks_local:
        raise ConfigError("data.source", f"no such file: {source}; give a path, a glob, stdlib or a hub name")
    return None


def _local(data: DataConfig, paths: list[Path]) -> Corpus:
    readers = {_READERS.get(path.suffix.lower(), "text") for path in paths}
    if len(readers) > 1:
        mixed = ", ".join(sorted(readers))
        raise ConfigError("data.source", f"{data.source} mixes file types ({mixed}); give one")
    try:
        names = _relative_names(paths)
        fingerprint = _fingerprint(*names, *(_file_hash(path) for path in paths))
    except OSError as error:
        raise ConfigError("data.source", f"cannot read {error.filename} ({error.strerror})") from None
    reader = readers.pop()
    if reader == "text":
        return Corpus(fingerprint, lambda: _text_files(paths, names))
    return Corpus(fingerprint, lambda: _records(data, reader, data_files=[str(path) for path in paths]))


def _text_files(paths: list[Path], names: list[str]) -> Iterator[Document]:
    splits: list[Split] = [_split(name) for name in names]
    by_file = len(paths) >= FEW_FILES and len(set(splits)) == 2
    seen: set[str] = set()
    for path, split in zip(paths, splits, strict=True):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError("data.source", f"{path} is not UTF-8 text; convert or remove it") from None
        if "\0" in text:
            raise ConfigError("data.source", f"{path} is a binary file; give text, JSON, CSV or Parquet")
        if text in seen:  # copies of a file must not sit on both sides of the split
            continue
        seen.add(text)
        if by_file:
            yield Document(text, split, "text")
            continue
        cut = len(text) - len(text) // VALIDATION_SHARE
        cut = text.rfind("\n", max(0, cut - NEWLINE_REACH), cut) + 1 or cut
        yield Document(text[:cut], "train", "text")
        yield Document(text[cut:], "validation", "text")


def _relative_names(paths: list[Path]) -> list[str]:
    parents = [str(path.absolute().parent) for path in paths]
    return [path.absolute().relative_to(os.path.commonpath(parents)).as_posix() for path in paths]


def _records(data: DataConfig, source: str, split: str = "train", /, **arguments: Any) -> Iterator[Document]:
    """Rows of a dataset that Hugging Face `datasets` can load, streamed: the token cache is the only copy."""
    import datasets  # takes 1.5 s, and the default source does not need it

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # our own errors name the problem
    try:
        rows = datasets.load_dataset(source, split=split, streaming=True, **arguments)
        for row in rows:
            if data.text_field not in row:
                problem = f"no field {data.text_field!r}; the records have {', '.join(sorted(row))}"
                raise ConfigError("data.text_field", problem)
            text = row[data.text_field]
            if not isinstance(text, str):
                raise ConfigError("data.text_field", f"field {data.text_field!r} is not text in every record")
            yield Document(text, "validation" if split == "validation" else _split(text), "text")
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        raise ConfigError("data.source", f"cannot be read as {source}: {first_line(error)[:200]}") from None


def _hub(data: DataConfig) -> Corpus:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        revision = data.revision or HfApi().dataset_info(data.source, timeout=20).sha
    except Exception as error:  # the hub client's errors differ from version to version
        problem = f"{data.source!r} is not a file here, and the hub has no answer for it"
        reason = f"({type(error).__name__}: {first_line(error)[:120]})"
        fix = "check the name, data.subset and the network"
        raise ConfigError("data.source", f"{problem} {reason}; {fix}") from None

    def read() -> Iterator[Document]:
        try:
            splits = datasets.get_dataset_split_names(data.source, data.subset, revision=revision)
        except Exception as error:  # datasets raises whatever the hub client raises
            reason = first_line(error)[:200]
            raise ConfigError("data.source", f"{data.source} cannot be read ({reason})") from None
        if "validation" in splits:
            yield from _records(data, data.source, "validation", name=data.subset, revision=revision)
        for document in _records(data, data.source, "train", name=data.subset, revision=revision):
            yield document._replace(split="train") if "validation" in splits else document

    return Corpus(_fingerprint(data.source, str(data.subset), str(revision)), read)


def _split(identity: str) -> Split:
    digest = hashlib.sha256(identity.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0 else "train"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()
