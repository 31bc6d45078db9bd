"""Any tokenizer.json: its end token, its gaps, and what of it is not applied."""

import random

import numpy as np
import pytest
import tokenizers

from moe.config import ConfigError
from moe.data.token_cache import prepare_corpus
from moe.data.tokenizer import vocabulary_size
from tests.support.corpora import corpus_config


def test_a_tokenizers_truncation_and_padding_are_not_applied(tmp_path, text_file):
    plain = prepare_corpus(corpus_config(tmp_path / "c", source=str(text_file)))
    tokenizer = plain.tokenizer
    tokenizer.enable_truncation(100)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "t.json"))
    prepared = prepare_corpus(
        corpus_config(tmp_path / "c", source=str(text_file), tokenizer=str(tmp_path / "t.json"))
    )
    assert np.array_equal(prepared.train.tokens, plain.train.tokens)


def test_a_vocabulary_with_gaps_gets_the_rows_of_its_largest_id(tmp_path, text_file):
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 900, "def": 70000}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    prepared = prepare_corpus(
        corpus_config(tmp_path / "c", source=str(text_file), tokenizer=str(tmp_path / "t.json"))
    )
    assert vocabulary_size(prepared.tokenizer) == 70001
    assert set(prepared.train.tokens.tolist()) == {0, 900, 70000}
    assert prepared.train.tokens.dtype == np.uint32


def test_a_tokenizer_is_trained_on_training_text_only(tmp_path):
    """The last documents of one text file are validation text: a word that is only there stays in pieces."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(4000)]
    (tmp_path / "text.txt").write_text(" ".join(words) + " zyxwv" * 250)
    prepared = prepare_corpus(
        corpus_config(tmp_path / "c", source=str(tmp_path / "text.txt"), tokenizer="bpe:300")
    )
    assert prepared.tokenizer.decode(prepared.validation.tokens.tolist()).count("zyxwv") == 250
    assert "zyxwv" not in prepared.tokenizer.decode(prepared.train.tokens.tolist())
    assert len(prepared.tokenizer.encode("zyxwv").ids) == 5


def test_a_tokenizer_is_known_by_its_content_and_not_by_its_place(tmp_path, text_file):
    """Edited in place it makes new tokens; a copy elsewhere makes the same, and a run goes on with it."""

    def prepared_with(path, vocabulary):
        model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(path))
        return prepare_corpus(corpus_config(tmp_path / "c", source=str(text_file), tokenizer=str(path)))

    before = prepared_with(tmp_path / "t.json", {"<unk>": 0, "</s>": 1, "def": 2})
    edited = prepared_with(tmp_path / "t.json", {"<unk>": 0, "</s>": 1, "def": 3})
    copied = prepared_with(tmp_path / "copy.json", {"<unk>": 0, "</s>": 1, "def": 3})
    assert set(before.train.tokens.tolist()) == {0, 1, 2}
    assert set(edited.train.tokens.tolist()) == {0, 1, 3}
    assert before.fingerprint != edited.fingerprint == copied.fingerprint


def test_any_tokenizer_json_can_be_used_and_its_end_token_named(tmp_path, text_file):
    model = tokenizers.models.WordLevel({"<unk>": 0, "STOP": 1, "def": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    settings = {"source": str(text_file), "tokenizer": str(tmp_path / "t.json")}
    with pytest.raises(ConfigError, match=r"data.end_token: the tokenizer has no token"):
        prepare_corpus(corpus_config(tmp_path / "c", **settings))
    prepared = prepare_corpus(corpus_config(tmp_path / "c", **settings, end_token="STOP"))
    assert set(prepared.train.tokens.tolist()) == {0, 1, 2}
