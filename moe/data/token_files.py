"""The token files of a corpus, joined out of tokenized chunks."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moe.data.chunks import Chunks


class Part(NamedTuple):
    """What one source gives to a token file.

    Attributes:
        source: its name.
        chunks: of the source.
        num_chunks: how many of them.
        limit: in tokens; no document is taken that would start there or behind.
    """

    source: str
    chunks: Chunks
    num_chunks: int
    limit: float


def join(parts: Iterable[Part], name: str, folder: Path) -> dict[str, Any]:
    """Write `NAME.bin`, the tokens, and `NAME.documents.bin`, two int64 per document: first token, domain.

    Returns:
        The number of `tokens`, the UTF-8 `bytes` of their text, the `dtype`, the names of the `domains`, and
        the tokens and bytes of each of the `sources`, which follow one another.
    """
    domains: list[str] = []
    sources: dict[str, dict[str, int]] = {}
    dtype, first = "", 0
    with (
        (folder / f"{name}.bin").open("wb") as tokens,
        (folder / f"{name}.documents.bin").open("wb") as places,
    ):
        for part in parts:
            sources[part.source] = _append(part, name, first, domains, tokens, places)
            first += sources[part.source]["tokens"]
            dtype = part.chunks.dtype.name
        for file in (tokens, places):
            file.flush()
            os.fsync(file.fileno())
    size = sum(count["bytes"] for count in sources.values())
    return {"tokens": first, "bytes": size, "dtype": dtype, "domains": domains, "sources": sources}


def _append(
    part: Part, name: str, first: int, domains: list[str], tokens: BinaryIO, places: BinaryIO
) -> dict[str, int]:
    """Append the documents of a source, whose first token is number `first`; `domains` gets its new ones."""
    num_tokens, num_bytes = 0, 0
    for number in range(part.num_chunks):
        ids, pieces, found = part.chunks.read(number, name)
        begins = num_tokens + np.cumsum(pieces[:, 0]) - pieces[:, 0]
        too_far = (pieces[:, 3] == 1) & (begins >= part.limit)
        kept = int(too_far.argmax()) if too_far.any() else len(pieces)
        lengths, sizes, kinds, starts = pieces[:kept].T
        found = found[: kinds.max(initial=-1) + 1]
        domains += [domain for domain in found if domain not in domains]
        known = np.array([domains.index(domain) for domain in found], dtype=np.int64)
        places.write(np.stack([first + begins[:kept], known[kinds]], axis=1)[starts == 1].tobytes())
        tokens.write(ids[: lengths.sum()].data)
        num_tokens, num_bytes = num_tokens + int(lengths.sum()), num_bytes + int(sizes.sum())
        if kept < len(pieces):
            break
    return {"tokens": num_tokens, "bytes": num_bytes}
