"""Which samples make up a step: a function of the seed and the step alone."""

import numpy as np

from moe.config import parse_config
from moe.data.samples import num_samples, read_samples, sample_ids, samples_of_step, validation_ids


def test_every_epoch_visits_every_sample_once_in_another_order():
    drawn = np.concatenate([sample_ids(7, step, 10, 25, shuffle=True) for step in range(5)])
    first, second = drawn[:25], drawn[25:]
    assert sorted(first) == sorted(second) == list(range(25))
    assert first.tolist() != second.tolist()


def test_sample_ids_are_a_function_of_seed_and_step_alone():
    assert sample_ids(1, 3, 4, 1000, True).tolist() == [
        809,
        48,
        583,
        262,
    ]  # a saved run is resumed with these
    both = np.concatenate([sample_ids(1, step, 8, 1000, True) for step in (10, 11)])
    assert np.array_equal(sample_ids(1, 5, 16, 1000, True), both)  # step 5 of 16 is steps 10 and 11 of 8
    assert not np.array_equal(sample_ids(1, 3, 16, 1000, True), sample_ids(2, 3, 16, 1000, True))
    # The second epoch of a seed is not the first epoch of the next seed.
    assert not np.array_equal(sample_ids(1, 1, 1000, 1000, True), sample_ids(2, 0, 1000, 1000, True))
    assert sample_ids(0, 2, 4, 100, shuffle=False).tolist() == [8, 9, 10, 11]


def test_samples_tile_the_corpus_and_share_one_token():
    text = np.arange(101, dtype=np.uint16)
    assert num_samples(text, 10) == 10
    samples = read_samples(text, np.array([0, 9]), 10)
    assert samples.tolist() == [list(range(0, 11)), list(range(90, 101))]


def test_validation_samples_are_spread_over_the_split():
    assert validation_ids(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert validation_ids(3, 8).tolist() == [0, 1, 2]
    assert len(set(validation_ids(1000, 128).tolist())) == 128


def test_the_samples_of_a_step_are_those_of_the_configurations_seed_batch_and_length():
    text = np.arange(4001, dtype=np.uint16)
    settings = {
        "run": {"seed": 3},
        "data": {"seq_len": 40},
        "train": {"global_batch_size": 6, "micro_batch_size": 1},
    }
    shuffled = samples_of_step(parse_config(settings), text, 5)
    assert np.array_equal(shuffled, sample_ids(3, 5, 6, 100, shuffle=True))
    settings["data"]["streaming"] = True
    assert samples_of_step(parse_config(settings), text, 5).tolist() == [30, 31, 32, 33, 34, 35]
