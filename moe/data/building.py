"""Building a folder of the cache: the tokenizer, the chunks of each source, and the files joined out of them.

All of it is built beside the folder, which appears under its name when it is complete. What is built before,
the tokenizer and the chunks, is kept until then, and that of a stream for longer: a longer run appends to it.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moe.config import Config, ConfigError
from moe.data.amounts import refuse_too_little
from moe.data.build_lock import alone
from moe.data.chunks import Chunks, Found, Source, with_progress
from moe.data.corpus import BadRecords
from moe.data.token_files import Part, join
from moe.data.tokenizer import (
    BPE_TRAINING_BYTES,
    end_token,
    first_bytes,
    load_tokenizer,
    read_tokenizer,
    vocabulary_size,
)

_ABANDONED_S = 30 * 86_400  # so old is what a run left that was killed and never started again


@dataclass(frozen=True)
class Build:
    """What is built.

    Attributes:
        config: of the run.
        sources: all that is tokenized into the folder.
        fingerprint: hash of content and settings.
        folder: of the cache.
        work: where the tokenizer and the chunks are kept meanwhile.
        tokenizer: the one to use; None: that of the configuration.
    """

    config: Config
    sources: list[Source]
    fingerprint: str
    folder: Path
    work: Path
    tokenizer: Tokenizer | None

    def is_published(self) -> bool:
        """Whether the folder is there."""
        return (self.folder / "meta.json").exists()

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer, which the first process that comes here makes.

        Raises:
            ConfigError: it does not exist, does not fit the configuration, or cannot be saved.
        """
        data, file = self.config.data, self._tokenizer_file
        try:
            with alone(self.work.parent, f"{self.work.name}-tokenizer", data.cache_timeout_s):
                if not file.exists():
                    tokenizer = self.tokenizer or load_tokenizer(
                        data.tokenizer, self._training_texts(), data.tokenizer_revision
                    )
                    self.config.resolve(vocabulary_size(tokenizer))  # refuses a vocabulary that does not fit
                    end_token(tokenizer, data.end_token)
                    self.work.mkdir(exist_ok=True)
                    unfinished = file.with_suffix(".part")
                    tokenizer.save(str(unfinished))
                    unfinished.replace(file)
        except OSError as error:
            problem = f"cannot write to {self.work.parent} ({error.strerror})"
            raise ConfigError("data.cache_dir", problem) from None
        return read_tokenizer(file, "data.cache_dir")

    def tokenized_chunks(self) -> int:
        """How many there are by now."""
        return sum(1 for _ in self.work.glob("*/*.npz"))

    def tokenize(self) -> Iterator[tuple[Source, Chunks, Found]]:
        """Tokenize every source, together with all processes that call this now; the results stay in `work`.

        Raises:
            ConfigError: anything wrong with a source, the tokenizer or the cache folder.
        """
        tokenizer = self.make_tokenizer()
        end = end_token(tokenizer, self.config.data.end_token)
        for source in self.sources:
            chunks = Chunks(self.work / source.name, source, tokenizer, end)
            yield source, chunks, chunks.complete()

    def publish(self) -> None:
        """Tokenize what is missing, and make the folder; one process at a time calls this.

        Raises:
            ConfigError: as above, or there is too little text; nothing is left in the cache then.
        """
        _remove_abandoned(self.folder.parent)
        for orphan in self.folder.parent.glob(f".{self.folder.name}-*"):  # of a process that was killed
            shutil.rmtree(orphan, ignore_errors=True)
        scratch = self.folder.with_name(f".{self.folder.name}-{os.getpid()}")
        try:
            found = list(self.tokenize())
            scratch.mkdir()
            shutil.copy(self._tokenizer_file, scratch)
            tokenizer = read_tokenizer(self._tokenizer_file, "data.cache_dir")
            counts = {}
            for name in dict.fromkeys(file for source in self.sources for file in source.files):
                parts = [
                    Part(source.name, chunks, count.chunks, source.limits.get(name, float("inf")))
                    for source, chunks, count in found
                    if name in source.files
                ]
                counts[name] = join(parts, name, scratch)
            bad = sum(count.bad_records for *_, count in found)
            first_bad = next((count.first_bad for *_, count in found if count.bad_records), "")
            end = end_token(tokenizer, self.config.data.end_token)
            meta = {"end_token": end, "splits": counts, "bad_records": bad, "first_bad": first_bad}
            refuse_too_little(self.config, meta, vocabulary_size(tokenizer))
            (scratch / "meta.json").write_text(json.dumps(meta))
            scratch.rename(self.folder)
        except ConfigError:
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not self.config.data.streaming:
            shutil.rmtree(self.work, ignore_errors=True)

    @property
    def _tokenizer_file(self) -> Path:
        return self.work / "tokenizer.json"

    def _training_texts(self) -> Iterator[str]:
        """The first training text of each source, of each as much."""
        sources = [source for source in self.sources if "train" in source.files]
        for source in sources:
            documents = with_progress(source.documents(BadRecords(skip=True)), "training the tokenizer")
            texts = (document.text for file, document in documents if file == "train")
            yield from first_bytes(texts, BPE_TRAINING_BYTES // len(sources))


def _remove_abandoned(cache: Path) -> None:
    """Remove what was left long ago by builds that were killed, and by streams."""
    for work in cache.glob("*-chunks"):
        with suppress(FileNotFoundError):  # another process removes it
            if time.time() - max(path.stat().st_mtime for path in (work, *work.iterdir())) > _ABANDONED_S:
                shutil.rmtree(work, ignore_errors=True)
