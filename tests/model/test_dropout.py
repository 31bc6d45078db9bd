"""Dropout: its masks follow from seed, step, sample and place, and from nothing else."""

import itertools

import numpy as np
import pytest
import torch

from moe.config import parse_config
from moe.data.batches import read_batches
from moe.data.text import Text
from moe.model.attention import rotary_tables
from moe.model.dropout import dropout, dropout_keys, keys_of_places
from tests.support.models import block_of, make_model


def mixed(number):
    """The 32-bit hash in Python's integers: xor-shifts by 16, 15, 15 and two odd factors."""
    number ^= number >> 16
    number = number * 0x21F0AAAD % 2**32
    number ^= number >> 15
    number = number * 0x735A2D97 % 2**32
    return number ^ number >> 15


def mask_of(rate, seed, step, sample, place, shape=(5, 8)):
    """(S, D) bool: whether an element is kept."""
    keys = keys_of_places(dropout_keys(seed, step, [sample]), place + 1)[place]
    return dropout(torch.ones(1, *shape), rate, keys)[0].ne(0)


def test_the_masks_are_those_of_the_hash_in_whole_numbers():
    keys = torch.tensor([17, -5], dtype=torch.int32)
    kept = dropout(torch.ones(2, 3, 4), 0.3, keys) != 0
    for sample, key in enumerate(keys.tolist()):
        hashes = [mixed((mixed(element) + key) % 2**32) for element in range(12)]
        uniform = [(number + 2**31) % 2**32 for number in hashes]  # as int32 are ordered
        assert kept[sample].flatten().tolist() == [number >= 0.3 * 2**32 for number in uniform]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_share_of_the_elements_is_dropped_and_the_others_make_up_for_it(rate):
    torch.manual_seed(0)
    hidden = torch.rand(16, 64, 32) + 1
    dropped = dropout(hidden, rate, dropout_keys(0, 0, range(16)))
    kept = dropped != 0
    deviation = (rate * (1 - rate) / hidden.numel()) ** 0.5
    assert 1 - kept.float().mean().item() == pytest.approx(rate, abs=4 * deviation)
    torch.testing.assert_close(dropped[kept], hidden[kept] / (1 - rate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rate_0_changes_nothing_and_the_dtype_stays(dtype):
    hidden = torch.randn(2, 3, 4).to(dtype)
    assert torch.equal(dropout(hidden, 0.0, dropout_keys(0, 0, [1, 2])), hidden)
    assert dropout(hidden, 0.999_999_999_99, dropout_keys(0, 0, [1, 2])).dtype == dtype


def test_only_kept_elements_have_a_gradient():
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    dropped = dropout(hidden, 0.4, dropout_keys(0, 0, [1, 2]))
    dropped.sum().backward()
    torch.testing.assert_close(hidden.grad, (dropped != 0) / 0.6)


def test_masks_of_other_seeds_steps_samples_and_places_are_unrelated():
    """At rate 1/2 two of them agree on half of the elements, within 4.5 standard deviations."""
    cases = itertools.product((0, 1), (0, 1), (0, 1, 64), (0, 1, 2))
    masks = torch.stack([mask_of(0.5, *case, shape=(64, 64)) for case in cases]).flatten(1)
    agreement = (masks[:, None] == masks[None]).float().mean(2)
    pairs = agreement[torch.ones_like(agreement).triu(1) == 1]
    assert len(pairs) == 36 * 35 / 2
    assert (pairs - 0.5).abs().max() < 4.5 * 0.5 / 4096**0.5


def test_neighbouring_elements_are_unrelated():
    masks = torch.stack([mask_of(0.5, 0, step, 3, 0, shape=(64, 64)) for step in range(20)]).float() - 0.5
    for shift in [(0, 1), (1, 0), (1, 1), (0, 32)]:
        product = masks[:, shift[0] :, shift[1] :] * masks[:, : 64 - shift[0], : 64 - shift[1]]
        assert abs(product.mean()) < 4.5 * 0.25 / product.numel() ** 0.5, shift


def test_a_sample_has_the_same_masks_whatever_shares_its_batch():
    hidden = torch.randn(3, 6, 8)
    keys = keys_of_places(dropout_keys(5, 7, [30, 10, 20]), 2)
    alone = keys_of_places(dropout_keys(5, 7, [10]), 2)
    for place in (0, 1):
        together = dropout(hidden, 0.5, keys[place])
        assert torch.equal(together[1:2], dropout(hidden[1:2], 0.5, alone[place]))


def test_the_model_drops_the_embedding_and_what_each_sublayer_adds_in_training_only():
    model, tokens = make_model(model={"dropout": 0.5}, moe={"first_dense_layers": 1}), torch.arange(18)
    tokens = tokens.view(2, 9)
    keys = dropout_keys(0, 0, [3, 4])
    embedding, *places = keys_of_places(keys, 7)
    hidden = dropout(model.embedding.weight[tokens], 0.5, embedding)
    rotary = rotary_tables(torch.arange(9), 8, 10_000.0)
    for layer in range(3):
        block = block_of(model, layer)
        hidden = hidden + dropout(
            block.attention(block.attention_norm(hidden), rotary), 0.5, places[2 * layer]
        )
        result = block.ffn(block.ffn_norm(hidden))
        hidden = hidden + dropout(result if layer == 0 else result[0], 0.5, places[2 * layer + 1])
    expected = model.final_norm(hidden) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens, dropout_keys=keys).logits, expected, rtol=1e-4, atol=1e-5)

    without = make_model(moe={"first_dense_layers": 1})
    assert torch.equal(model.eval()(tokens, dropout_keys=keys).logits, without(tokens).logits)


def test_without_keys_each_call_draws_new_masks_from_pytorchs_random_numbers():
    model, tokens = make_model(model={"dropout": 0.2}), torch.arange(12).view(2, 6)
    logits = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_recomputation_meets_the_masks_of_the_forward_pass():
    gradients = []
    for on in (False, True):
        model = make_model(model={"dropout": 0.3}, train={"activation_checkpointing": on})
        torch.manual_seed(0)
        model(torch.arange(12).view(2, 6)).logits.square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)


def test_a_training_step_has_keys_of_seed_step_and_sample_and_an_evaluation_has_none():
    def config_of(rate):
        return parse_config({
            "run": {"seed": 6}, "model": {"dropout": rate}, "train": {"micro_batch_size": 2},
            "data": {"seq_len": 4},
        })  # fmt: skip

    text = Text(np.arange(40, dtype=np.uint16), np.array([0]), {"": range(40)}, {"": 40})
    starts, cpu = np.array([8, 0, 4]), torch.device("cpu")
    batches = read_batches(config_of(0.1), text, starts, cpu, step=9)
    keys = [batch.dropout_keys for batch in batches]
    assert torch.equal(torch.cat([key for key in keys if key is not None]), dropout_keys(6, 9, [8, 0, 4]))
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [[8, 0], [4]]
    for rate, step in ((0.1, None), (0.0, 9)):
        batches = read_batches(config_of(rate), text, starts, cpu, step)
        assert all(batch.dropout_keys is None for batch in batches)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_keys_of_other_integers_count_by_their_lowest_32_bits(dtype):
    hidden, keys = torch.randn(3, 6, 8), dropout_keys(0, 0, [1, 2, 3])
    wide = keys.to(torch.int64) % 2**32
    if dtype == torch.int64:
        wide += 5 * 2**32
    places = keys_of_places(keys, 2)
    assert torch.equal(keys_of_places(wide.to(dtype), 2), places)
    assert torch.equal(dropout(hidden, 0.1, wide.to(dtype)), dropout(hidden, 0.1, keys))


@pytest.mark.parametrize(
    ("hidden", "rate", "keys", "message"),
    [
        (torch.zeros(3, 4, 8), 0.1, torch.arange(1), "keys should be one for each of 3 samples, got 1"),
        (torch.zeros(3, 4, 8), 0.1, torch.zeros(3), r"keys should be \(batch,\) of int32, .*float32"),
        (
            torch.zeros(3, 4, 8),
            0.1,
            torch.zeros(3, 1).int(),
            r"keys should be \(batch,\) of int32, .*\(3, 1\)",
        ),
        (torch.zeros(3, 8), 0.1, torch.arange(3), r"hidden should be \(batch, sequence, d_model\)"),
        (torch.zeros(3, 4, 8).int(), 0.1, torch.arange(3), "of a float type, got .* of torch.int32"),
        (torch.zeros(3, 4, 8), 1.0, torch.arange(3), "rate should be at least 0 and below 1, got 1.0"),
    ],
)
def test_other_shapes_types_and_rates_are_value_errors(hidden, rate, keys, message):
    with pytest.raises(ValueError, match=message):
        dropout(hidden, rate, keys)
