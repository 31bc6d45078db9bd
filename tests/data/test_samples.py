"""Which samples make up a step: a function of the seed and the step alone."""

import numpy as np
import pytest

from moe.config import parse_config
from moe.data.samples import (
    documents_of_samples,
    num_samples,
    read_samples,
    sample_ids,
    samples_of_step,
    spread_starts,
)
from moe.data.text import Text

LENGTH = 10


def settings(seed, size, **data):
    return parse_config(
        {
            "run": {"seed": seed},
            "data": {"seq_len": LENGTH, **data},
            "train": {"global_batch_size": size, "micro_batch_size": 1},
        }
    )


def text_of(samples):
    tokens = np.arange(samples * LENGTH + 1, dtype=np.uint16)
    return Text(tokens, np.zeros(1, dtype=np.int64), {"train": range(len(tokens))}, {"train": len(tokens)})


def ids_of_step(seed, step, size, samples, **data):
    starts = samples_of_step(settings(seed, size, **data), text_of(samples), step)
    assert (starts % LENGTH == 0).all()
    return starts // LENGTH


def test_every_epoch_visits_every_sample_once_in_another_order():
    drawn = np.concatenate([ids_of_step(7, step, 10, 25) for step in range(5)])
    first, second = drawn[:25], drawn[25:]
    assert sorted(first) == sorted(second) == list(range(25))
    assert first.tolist() != second.tolist()


def test_the_samples_of_a_step_are_a_function_of_seed_and_step_alone():
    assert ids_of_step(1, 3, 4, 1000).tolist() == [809, 48, 583, 262]  # a saved run is resumed with these
    both = np.concatenate([ids_of_step(1, step, 8, 1000) for step in (10, 11)])
    assert np.array_equal(ids_of_step(1, 5, 16, 1000), both)  # step 5 of 16 is steps 10 and 11 of 8
    assert not np.array_equal(ids_of_step(1, 3, 16, 1000), ids_of_step(2, 3, 16, 1000))
    # The second epoch of a seed is not the first epoch of the next seed.
    assert not np.array_equal(ids_of_step(1, 1, 1000, 1000), ids_of_step(2, 0, 1000, 1000))


def test_a_stream_comes_in_its_order():
    assert ids_of_step(0, 2, 4, 100, streaming=True).tolist() == [8, 9, 10, 11]
    assert ids_of_step(0, 2, 4, 10, streaming=True).tolist() == [8, 9, 0, 1]  # and again when it is over


def test_a_stream_is_shuffled_within_windows_and_a_longer_one_begins_alike():
    config = settings(3, 4, streaming=True, shuffle_buffer=8)
    short = sample_ids(config, np.arange(24), 24)
    for first in (0, 8, 16):
        window = short[first : first + 8]
        assert sorted(window) == list(range(first, first + 8))
        assert window.tolist() != sorted(window)
    assert (short[:8] != short[8:16] - 8).any(), "every window has an order of its own"
    assert np.array_equal(sample_ids(config, np.arange(24), 1000), short)
    epochs = sample_ids(config, np.arange(64), 16).reshape(4, 2, 8)  # four times two windows
    assert len({tuple(window - window.min()) for epoch in epochs for window in epoch}) == 8
    ended = sample_ids(config, np.arange(40), 20)  # the last window of a stream that ends is shorter
    assert sorted(ended[:20]) == sorted(ended[20:]) == list(range(20))
    assert ended[:20].tolist() != ended[20:].tolist()


def test_samples_tile_the_corpus_and_share_one_token():
    text = np.arange(101, dtype=np.uint16)
    assert num_samples(len(text), 10) == 10
    samples = read_samples(text, np.array([0, 90]), 10)
    assert samples.tolist() == [list(range(0, 11)), list(range(90, 101))]


def test_validation_samples_are_spread_over_the_text():
    assert spread_starts(1011, 10, 5).tolist() == [0, 250, 500, 750, 1000]
    assert spread_starts(31, 10, 8).tolist() == [0, 10, 20]
    assert len(set(spread_starts(10_001, 10, 128).tolist())) == 128


@pytest.mark.parametrize("start", [0, 3, 7])
def test_each_token_of_a_sample_knows_its_document(start):
    documents = np.array([0, 4, 5, 12])
    numbers = documents_of_samples(documents, np.array([start]), 6)[0]
    for place in range(6):
        for other in range(6):
            apart = any(min(place, other) < first - start <= max(place, other) for first in documents)
            assert (numbers[place] != numbers[other]) == apart
