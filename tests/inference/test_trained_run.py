"""A trained run is loaded as it was trained."""

import pytest
import tokenizers

from moe.inference.generation import Sampling, generate
from moe.inference.trained_run import load_run


@pytest.fixture
def run_with_own_tokens(run_main, tmp_path):
    """A run on a tokenizer with two end tokens, which begins what it encodes with a token of its own."""
    vocabulary = {"<unk>": 0, "BEGIN": 1, "</s>": 2, "STOP": 3, "def": 4, "self": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="BEGIN $A", special_tokens=[("BEGIN", 1)]
    )
    tokenizer.save(str(tmp_path / "t.json"))
    code, folder, _, _ = run_main(f"data.tokenizer={tmp_path / 't.json'}", "data.end_token=STOP")
    assert code == 0
    return folder


def test_the_end_token_of_the_configuration_ends_a_text_and_begins_one(run_with_own_tokens):
    run, sampling = load_run(run_with_own_tokens), Sampling(max_new_tokens=200, temperature=100.0)
    text = generate(run, "", sampling)
    assert len(text.split()) < 200
    assert "STOP" not in text
    assert generate(run, "STOP", sampling) == "STOP" + text


def test_a_prompt_is_the_beginning_of_the_text_and_nothing_else_is(run_with_own_tokens):
    run = load_run(run_with_own_tokens)
    assert generate(run, "def self", Sampling(max_new_tokens=3)).split()[:2] == ["def", "self"]
