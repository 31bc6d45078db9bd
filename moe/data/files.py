"""Which files a source names, what kind each is, and reading them as text.

Files may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`): what counts is the suffix before that one.
"""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from moe.config import ConfigError, DataConfig

Kind = Literal["text", "json lines", "json", "csv", "tsv", "parquet", "saved dataset"]
PIECE = 2**18  # characters of a text that are held at a time

_KINDS: dict[str, Kind] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".jsonlines": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ".tex", ".c", ".h", ".html"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def check_files(data: DataConfig) -> None:
    """Refuse a section whose sources name files that are not here; whether they hold text shows later.

    Raises:
        ConfigError: under the key of the first one.
    """
    named = [("data.source", data.source)]
    if data.sources:
        named = [(f"data.sources.{name}.source", one.source) for name, one in data.sources.items()]
    named += [("data.extra_validation", source) for source in data.extra_validation.values()]
    for key, source in [*named, ("data.validation", data.validation)]:
        if source not in (None, "stdlib"):
            try:
                find_files(data.model_copy(update={"source": source}))
            except ConfigError as error:
                raise ConfigError(key, error.message) from None


def find_files(data: DataConfig) -> list[str] | None:
    """The files that `data.source` names, in a fixed order; None if it looks like a hub name.

    In a folder those of a known suffix count, or of `data.suffixes`; a file that is named counts always.
    The folder of a dataset that was written by `save_to_disk` counts as one file.

    Raises:
        ConfigError: there is none, or they are of several kinds and `data.suffixes` does not choose.
    """
    source, path = data.source, os.path.expanduser(data.source)
    if is_saved_dataset(path) or os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = [name for name in _walk(path) if _is_wanted(name, data.suffixes)]
        if not found:
            wanted = " or ".join(data.suffixes) if data.suffixes else "text, JSON, CSV or Parquet"
            raise ConfigError("data.source", f"folder {source} holds no {wanted} file")
    else:
        found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)), key=_parts)
        if data.suffixes is not None:
            found = [name for name in found if _is_wanted(name, data.suffixes)]
        if not found:
            looks_local = source[0] in "./~" or glob.has_magic(source) or _kind(path) is not None
            if not looks_local:
                return None
            fix = "give a path, a glob, stdlib or a hub name"
            raise ConfigError("data.source", f"no such file: {source}; {fix}")
    kinds = {kind_of(name) for name in found}
    if len(kinds) > 1 and data.suffixes is None:
        mixed = ", ".join(sorted(kinds))
        raise ConfigError("data.source", f"{source} mixes file types ({mixed}); choose with data.suffixes")
    return found


def is_saved_dataset(path: str) -> bool:
    """Whether Hugging Face's `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def kind_of(path: str) -> Kind:
    """What a file holds, by its suffix; unknown ones are text."""
    return "saved dataset" if os.path.isdir(path) else _kind(path) or "text"


def relative_names(paths: list[str]) -> Iterator[str]:
    """The paths relative to the deepest folder that holds all of them, with forward slashes."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath({os.path.dirname(path) for path in absolute})
    return (os.path.relpath(path, root).replace(os.sep, "/") for path in absolute)


@contextmanager
def open_text(path: str, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, decompressed and decoded; a byte-order mark is no part of its text.

    Raises:
        ConfigError: while it is open, it turns out to be in another encoding, damaged, or not readable.
    """
    try:
        with _open(path) as raw:
            start = raw.peek(5)
            if start.startswith(b"%PDF-"):
                raise ConfigError("data.source", f"{path} is a PDF, not text; extract its text first")
            if codecs.lookup(encoding).name == "utf-8":
                encoding = unicode_encoding(start)
            with io.TextIOWrapper(raw, encoding, newline=newline) as file:
                yield file
    except UnicodeError:
        problem = f"{path} is not {encoding.removesuffix('-sig')} text"
        raise ConfigError("data.encoding", f"{problem}; name its encoding, or convert or remove it") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise ConfigError("data.source", f"cannot read {path} ({reason})") from None


def unicode_encoding(start: bytes) -> str:
    """UTF-16 or UTF-8, by the byte-order mark at the start of a text."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def text_pieces(path: str, encoding: str) -> Iterator[str]:
    """The text of a file in pieces of at most `PIECE` characters, which end with a line where they can.

    Raises:
        ConfigError: see `open_text`; or it is no text.
    """
    with open_text(path, encoding) as file:
        rest = ""
        while chunk := file.read(PIECE - len(rest)):
            if "\0" in chunk:
                raise ConfigError("data.source", f"{path} is a binary file; give text, JSON, CSV or Parquet")
            rest += chunk
            if len(rest) == PIECE:
                cut = rest.rfind("\n") + 1 or PIECE
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def _walk(folder: str) -> list[str]:
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(paths, key=_parts)


def _parts(path: str) -> list[str]:
    return path.split(os.sep)


def _is_wanted(path: str, suffixes: list[str] | None) -> bool:
    if suffixes is None:
        return _kind(path) is not None
    return path.lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def _kind(path: str) -> Kind | None:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    return "text" if suffix in _TEXT_SUFFIXES else _KINDS.get(suffix)


def _open(path: str) -> Any:
    """The bytes of a file, decompressed."""
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".zst":
        import pyarrow  # with datasets

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    return opener(path, "rb")
