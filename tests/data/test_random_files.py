"""Random files of every kind, encoding and size, many damaged: their text to the letter, or one line."""

import csv
import gzip
import io
import json
import random
import string

import pytest

from moe.config import ConfigError
from moe.data.token_cache import TokenizedCorpus, prepare_corpus
from tests.support.corpora import corpus_config

ALPHABETS = [string.ascii_letters + " \n", 'aß日🎉 \n\t"', "x,;\"' \n", "0 "]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]


def random_texts(rng):
    """Between one and 40 texts, some empty, some long."""
    alphabet = rng.choice(ALPHABETS)
    sizes = [rng.choice([0, 1, 20, 300, 5000]) for _ in range(rng.choice([1, 3, 25, 40]))]
    return ["".join(rng.choices(alphabet, k=size)) for size in sizes]


def as_file(kind, texts):
    if kind == "txt":
        return texts[0]
    if kind == "jsonl":
        return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if kind == "json":
        return json.dumps([{"text": text, "n": i} for i, text in enumerate(texts)], ensure_ascii=False)
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
    writer.writerows([["n", "text"], *enumerate(texts)])
    return file.getvalue()


def damaged(rng, content):
    """Cut off, with bytes changed, inserted or made zero; or whole."""
    content, at = bytearray(content), rng.randrange(len(content) or 1)
    match rng.choice(["whole", "whole", "cut", "changed", "inserted", "zero"]):
        case "cut":
            return bytes(content[:at]), True
        case "changed" if content:
            content[at] = rng.randrange(256)
        case "inserted":
            content[at:at] = rng.randbytes(rng.choice([1, 50]))
        case "zero" if content:
            content[at] = 0
        case _:
            return bytes(content), False
    return bytes(content), True


def documents_in(corpus: TokenizedCorpus) -> list[str]:
    text = corpus.tokenizer.decode(corpus.train.tokens.tolist(), skip_special_tokens=False)
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("seed", range(200))
def test_a_random_file_is_read_to_the_letter_or_refused_in_one_line(tmp_path, seed):
    rng = random.Random(seed)
    texts, kind = random_texts(rng), rng.choice(["txt", "jsonl", "json", "csv", "tsv"])
    encoding, skip = rng.choice(ENCODINGS), rng.choice(["error", "skip"])
    content, is_damaged = damaged(rng, as_file(kind, texts).encode(encoding, errors="ignore"))
    if rng.random() < 0.3:
        kind, content = f"{kind}.gz", gzip.compress(content)
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content)
    declared = encoding if rng.random() < 0.8 else "utf-8"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_bytes(json.dumps({"text": "some words " * 9}).encode(declared))
    keys = {"encoding": declared, "on_bad_record": skip, "validation": str(held_out)}
    config = corpus_config(tmp_path / "c", source=str(path), **keys)
    found, refusal = None, ""
    try:
        found = documents_in(prepare_corpus(config))
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if found is None or is_damaged or declared != encoding:
        return  # what was damaged or declared wrong cannot be known
    whole = [text.encode(encoding, errors="ignore").decode(encoding) for text in texts]
    if kind.startswith("txt"):
        assert "".join(found) == whole[0]
    else:
        assert sorted(found) == sorted(text for text in whole if text.strip())
