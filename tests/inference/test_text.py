"""Texts as they are written: pieces, stop strings, the end of a document."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from moe.config import ConfigError, parse_config
from moe.data.tokenizer import end_token, load_tokenizer
from moe.inference.generation import Sampling, generate, stream
from moe.inference.trained_run import TrainedRun
from moe.model.transformer import Transformer
from tests.support.models import SMALL

TEXT = "def x→ü😀,stop!"  # no byte occurs twice
SAMPLING = Sampling(max_new_tokens=100, temperature=0)


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    """A model that knows `TEXT` by heart: after each byte the next one is the likeliest, at last the end."""
    tokenizer = load_tokenizer("bytes", ())
    end = tokenizer.token_to_id(end_token(tokenizer, None))
    assert end is not None
    own = {"vocab_size": 257, "d_model": 128, "tie_embeddings": False}
    config = parse_config(SMALL | {"model": SMALL["model"] | own})
    model = Transformer(config)
    assert model.head is not None
    with torch.no_grad():
        for block in model.blocks:  # nothing is added to the embedding of the last token
            for name, weight in block.named_parameters():
                if name.endswith(("output.weight", "w_down")):
                    weight.zero_()
        nn.init.normal_(model.embedding.weight)
        for token, following in pairwise([*tokenizer.encode(TEXT).ids, end]):
            model.head.weight[following] = nn.functional.normalize(model.embedding.weight[token], dim=0) * 9
    return TrainedRun(model.eval(), tokenizer, config, end)


def test_a_text_is_written_up_to_the_end_of_the_document(run):
    assert generate(run, "d", SAMPLING) == TEXT
    assert generate(run, ["x", "def"], SAMPLING) == [TEXT[4:], TEXT]


def test_no_piece_has_a_part_of_a_character(run):
    pieces = [piece for _, piece in stream(run, ["d"], SAMPLING) if piece]
    assert pieces == list(TEXT[1:])


@pytest.mark.parametrize(
    ("stop", "written"),
    [
        (["→"], "def x"),
        (["st", "x"], "def "),
        (["😀,s", "üh", " stopped"], "def x→ü"),
        (["! "], TEXT),
        (["ef"], "d"),
        (["op!", "top!"], "def x→ü😀,s"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(run, stop, written):
    assert generate(run, "d", Sampling(100, temperature=0, stop=stop)) == written


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain(run):
    """`ü😀` is not written before the comma has come: `ü😀!` would have been a stop string."""
    pieces = [piece for _, piece in stream(run, ["x"], Sampling(4 + 2 + 3, temperature=0, stop=["ü😀!"]))]
    assert [piece for piece in pieces if piece] == ["→", "ü😀"]
    pieces = [piece for _, piece in stream(run, ["x"], Sampling(100, temperature=0, stop=["ü😀!"]))]
    assert [piece for piece in pieces if piece] == ["→", "ü😀,", *"stop!"]


def test_the_number_of_tokens_is_bounded(run):
    assert generate(run, "d", Sampling(3, temperature=0)) == "def "
    assert generate(run, "x", Sampling(4, temperature=0)) == "x→"  # and a half of the next character


def test_one_prompt_and_one_stop_string_need_no_list(run):
    pieces = [
        piece for number, piece in stream(run, "d", Sampling(100, temperature=0, stop=",")) if number == 0
    ]
    assert "d" + "".join(pieces) == TEXT.partition(",")[0]


def test_arguments_of_another_type_are_refused(run):
    with pytest.raises(ConfigError, match=r"^run \(see load_run\): should be of type TrainedRun, got str"):
        generate("runs/tiny", "d")  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ConfigError, match=r"^prompt: should be of type str, got int"):
        generate(run, [1, 2])  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ConfigError, match=r"^sampling: should be of type Sampling, got int"):
        generate(run, "d", 20)  # pyright: ignore[reportArgumentType, reportCallIssue]
