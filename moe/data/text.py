"""Tokenized text, memory-mapped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import ConfigError


@dataclass(frozen=True)
class Text:
    """Tokenized documents in order, those of several sources one source after the other.

    Attributes:
        tokens: (n,) uint16 or uint32, memory-mapped; each document is followed by the end token.
        documents: (documents,) int64, the first token of each.
        sources: the tokens of each source.
        num_bytes: UTF-8 bytes of each source's documents.
    """

    tokens: np.ndarray
    documents: np.ndarray
    sources: dict[str, range]
    num_bytes: dict[str, int]

    @property
    def bytes_per_token(self) -> float:
        """Bytes over tokens, end tokens included: what turns nats per token into bits per byte."""
        return sum(self.num_bytes.values()) / len(self.tokens)

    def of_source(self, name: str) -> "Text":
        """The text of one source."""
        of_it = self.sources[name]
        first, last = np.searchsorted(self.documents, [of_it.start, of_it.stop])
        return Text(
            tokens=self.tokens[of_it.start : of_it.stop],
            documents=self.documents[first:last] - of_it.start,
            sources={name: range(len(of_it))},
            num_bytes={name: self.num_bytes[name]},
        )


def open_text(folder: Path, name: str, count: dict[str, Any]) -> Text:
    """Open the files that `token_files.join` wrote.

    Args:
        folder: where they are.
        name: of the token files.
        count: what `join` returned.

    Raises:
        ConfigError: they do not have the right sizes.
    """
    path, places = folder / f"{name}.bin", folder / f"{name}.documents.bin"
    size = count["tokens"] * np.dtype(count["dtype"]).itemsize
    if not path.is_file() or path.stat().st_size != size or not places.is_file():
        raise ConfigError("data.cache_dir", f"{folder} is damaged; delete that folder and start again")
    sources, first = {}, 0
    of_sources = count.get("sources", {name: count})  # caches of one source did not always list it
    for source, its in of_sources.items():
        sources[source] = range(first, first + its["tokens"])
        first += its["tokens"]
    return Text(
        tokens=np.memmap(path, dtype=count["dtype"], mode="r"),
        documents=np.memmap(places, dtype=np.int64, mode="r").reshape(-1, 2)[:, 0],
        sources=sources,
        num_bytes={source: its["bytes"] for source, its in of_sources.items()},
    )
