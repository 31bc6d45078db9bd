"""Documents that share a sample: attention does not look from one into another."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.config import load_config
from moe.data.batches import read_batches
from moe.data.text import Text
from tests.support.models import gradient_of, make_model
from tests.support.paths import TINY

LENGTHS = [5, 1, 17, 9]  # of the documents in a sample
CPU = torch.device("cpu")


def documents_of(lengths):
    return torch.cat([torch.full((length,), number) for number, length in enumerate(lengths, 3)])[None]


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("moe", "model"),
    [({}, {"qk_norm": True}), ({"num_shared_experts": 1}, {}), ({"num_experts": 1, "top_k": 1}, {})],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_and_gradients_are_those_of_each_document_alone(moe, model, recompute):
    packed, alone = (
        make_model(moe=moe, model=model, train={"activation_checkpointing": recompute}) for _ in range(2)
    )
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 50, (2, 1, sum(LENGTHS)))
    logits = packed(tokens, documents_of(LENGTHS)).logits
    loss_of(logits, targets).backward()
    at = 0
    for length in LENGTHS:
        own = alone(tokens[:, at : at + length]).logits
        torch.testing.assert_close(logits[:, at : at + length], own, rtol=0, atol=1e-5)
        loss_of(own, targets[:, at : at + length]).backward()
        at += length
    for (name, weight), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(gradient_of(weight), gradient_of(other), rtol=1e-4, atol=1e-5, msg=name)


def test_without_documents_a_sample_is_one_document():
    model, tokens = make_model(), torch.randint(0, 50, (2, 12))
    same = model(tokens, torch.full((2, 12), 7)).logits
    torch.testing.assert_close(model(tokens).logits, same, rtol=0, atol=1e-5)


def test_samples_of_a_batch_have_documents_of_their_own():
    model, tokens = make_model(), torch.randint(0, 50, (2, 12))
    documents = torch.cat([documents_of([4, 8]), documents_of([7, 5])])
    both = model(tokens, documents).logits
    for row in range(2):
        alone = model(tokens[row : row + 1], documents[row : row + 1]).logits
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.fixture
def text():
    """100 tokens, with documents at 0, 15, 16 and 60."""
    tokens, documents = np.arange(100, dtype=np.uint16), np.array([0, 15, 16, 60])
    return Text(tokens, documents, {"train": range(100)}, {"train": 100})


def config_of(masks, micro):
    overrides = ["data.seq_len=10", "model.max_seq_len=10", f"train.micro_batch_size={micro}"]
    return load_config(TINY, [*overrides, "train.global_batch_size=4", f"data.document_masks={masks}"])


def test_a_batch_is_masked_only_where_a_sample_has_more_than_one_document(text):
    starts = np.array([0, 10, 20, 30])  # the second has documents that start at 15 and 16
    batches = read_batches(config_of("true", 1), text, starts, CPU)
    assert [batch.documents is not None for batch in batches] == [False, True, False, False]
    numbers = batches[1].documents
    assert numbers is not None
    assert (numbers - numbers[0, 0]).tolist() == [[0] * 5 + [1] + [2] * 4]
    first, second = read_batches(config_of("true", 2), text, starts, CPU)
    assert first.documents is not None
    assert first.documents.shape == (2, 10)
    assert second.documents is None
    assert all(batch.documents is None for batch in read_batches(config_of("false", 2), text, starts, CPU))


def test_the_inputs_of_a_batch_are_followed_by_its_targets(text):
    [batch] = read_batches(config_of("true", 2), text, np.array([20, 3]), CPU)
    assert batch.tokens.tolist() == [list(range(20, 30)), list(range(3, 13))]
    assert batch.targets.tolist() == [list(range(21, 31)), list(range(4, 14))]


def test_ranks_without_samples_get_a_batch_of_none(text):
    [batch] = read_batches(config_of("true", 2), text, np.array([], dtype=np.int64), CPU)
    assert batch.tokens.shape == (0, 10)
