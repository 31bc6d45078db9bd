"""Reading records from files: JSON lines, JSON, CSV, TSV, Parquet and saved datasets, one at a time."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple, TextIO

from moe.config import ConfigError, DataConfig, first_line
from moe.data.chat import render_chat
from moe.data.files import PIECE, kind_of, open_text

csv.field_size_limit(sys.maxsize)
_LARGEST_VALUE = 2**26  # characters of one record in a JSON file


class BadRecord(NamedTuple):
    """A record without text.

    Attributes:
        where: its file or split and its number, from 1.
        problem: what is wrong with it.
    """

    where: str
    problem: str


def texts_of_file(path: str, data: DataConfig) -> Iterator[str | BadRecord]:
    """The text of each record of a file.

    Raises:
        ConfigError: the file as a whole cannot be read.
    """
    return texts_of_records(_records(path, data), os.path.basename(path), data)


def texts_of_records(records: Iterator[Any], origin: str, data: DataConfig) -> Iterator[str | BadRecord]:
    """The text of each record; `origin` says where they come from."""
    for number, record in enumerate(records, 1):
        text, problem = _text_of(record, data.text_field)
        yield text if problem is None else BadRecord(f"{origin}, record {number}", problem)


def _text_of(record: Any, field: str) -> tuple[str, str | None]:
    """The text of a record, and what is wrong with it."""
    if isinstance(record, json.JSONDecodeError):
        return "", f"is not JSON ({record.msg})"
    if isinstance(record, RecursionError):
        return "", "is nested too deeply"
    if not isinstance(record, dict):
        return "", f"is {_type_name(record)}, not an object with fields"
    if field not in record:
        return "", f"no field {field!r}; the records have {', '.join(sorted(filter(None, record)))}"
    value = record[field]
    text = render_chat(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        return "", f"field {field!r} is {'null' if value is None else f'{_type_name(value)}, not text'}"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell it, UTF-8 cannot
        return "", f"field {field!r} holds half of a surrogate pair, which is no character"
    return text, None


def _records(path: str, data: DataConfig) -> Iterator[Any]:
    """The records; in the place of one that is not JSON, the error."""
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet(path)
        return
    with open_text(path, data.encoding, newline="" if kind in ("csv", "tsv") else None) as file:
        if kind == "json lines":
            yield from _json_lines(file)
        elif kind == "json":
            yield from _json(path, file)
        else:
            try:
                head = file.readline()
                is_semicolon = ";" in head and "," not in head  # Excel's where decimals have a comma
                delimiter = "\t" if kind == "tsv" else ";" if is_semicolon else ","
                yield from csv.DictReader(chain([head], file), delimiter=delimiter)
            except csv.Error as error:
                raise ConfigError("data.source", f"{path} cannot be read as {kind} ({error})") from None


def _json_lines(file: TextIO) -> Iterator[Any]:
    for line in file:
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield error


def _json(path: str, file: TextIO) -> Iterator[Any]:
    """The elements of an array, or values one after the other; a value is held at a time, not the file."""
    decoder, text, at = json.JSONDecoder(), file.read(PIECE), 0
    separators = " \t\r\n"
    if text.lstrip().startswith("["):
        text, separators = text.lstrip()[1:], separators + ","
    while True:
        while at < len(text) and text[at] in separators:
            at += 1
        if text.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # its end may not have been read yet
            text, at = text[at:], 0
            more = file.read(max(PIECE, len(text)))
            if not more and not text:
                return
            if not more or len(text) > _LARGEST_VALUE:
                raise ConfigError("data.source", f"{path} is not JSON ({first_line(error)})") from None
            text += more
        except RecursionError:
            raise ConfigError("data.source", f"{path} is nested too deeply") from None
        else:
            yield value


def _parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet  # with datasets, which takes a second

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ConfigError(
            "data.source", f"{path} cannot be read as parquet ({first_line(error)[:200]})"
        ) from None


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "text")
