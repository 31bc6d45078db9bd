"""Tokens per second of generation."""

import pytest

from moe.benchmark import generation_speed
from moe.benchmark.generation_speed import measure_generation
from moe.benchmark.speed_tables import generation_rows
from tests.support.models import make_model


def test_it_is_the_median_of_runs_that_all_generate_the_same_number_of_tokens(monkeypatch):
    model, lengths = make_model(), []

    def generate_tokens(*arguments):
        tokens = generation_speed_tokens(*arguments)
        lengths.append(len(tokens))
        return tokens

    generation_speed_tokens = generation_speed.generate_tokens
    monkeypatch.setattr(generation_speed, "generate_tokens", generate_tokens)
    record = measure_generation(model.eval(), new_tokens=5, repeats=3)
    assert lengths == [1 + 5] * 4  # one is the warm-up
    assert record["params"] == sum(weight.numel() for weight in model.parameters())
    assert (record["new_tokens"], record["context"], record["repeats"]) == (5, model.max_seq_len, 3)
    assert record["tokens_per_s"] == pytest.approx(1e3 / record["ms_per_token"])
    low, high = record["tokens_per_s_quartiles"]
    assert low <= record["tokens_per_s"] <= high
    assert len({len(row) for row in generation_rows({"model": "m"} | record)}) == 1
