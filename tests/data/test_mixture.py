"""Samples of several sources: exact shares, an order that seed and place decide, epochs of each source."""

import numpy as np
import pytest

from moe.config import ConfigError, changed, parse_config
from moe.data.mixture import CYCLE, draw, samples_drawn
from moe.data.samples import read_samples, samples_of_step
from moe.data.token_cache import plan_build, prepare_corpus
from tests.support.corpora import corpus_config

WEIGHTS = {"code": 5.0, "prose": 3.0, "rare": 0.004}


def mixture(weights=WEIGHTS, seed=0, batch=8, annealed=None, anneal_step=None, **train):
    sources = {name: {"source": f"{name}.txt", "weight": weight} for name, weight in weights.items()}
    for name, weight in (annealed or {}).items():
        sources[name]["anneal_weight"] = weight
    return parse_config(
        {
            "run": {"seed": seed},
            "data": {"sources": sources, "anneal_step": anneal_step},
            "train": {"global_batch_size": batch, "micro_batch_size": 1, **train},
        }
    )


def draw_first(config, samples):
    return draw(config, np.arange(samples))


def test_after_each_cycle_every_source_has_had_its_share():
    sources, _ = draw_first(mixture(), 400 * CYCLE)
    total = sum(WEIGHTS.values())
    for cycles in (1, 2, 7, 100, 400):
        counts = np.bincount(sources[: cycles * CYCLE], minlength=3)
        for count, weight in list(zip(counts, WEIGHTS.values(), strict=True))[1:]:
            assert count == int(weight / total * cycles * CYCLE)
    assert counts[2] == 199, "a source of 0.05 % comes up as well"


def test_proportions_are_within_1_percent_over_1000_steps():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    sources, _ = draw_first(mixture(weights), 8000)
    assert np.bincount(sources) / 8000 == pytest.approx(list(weights.values()), rel=0.01)
    # And already early: as good as drawing without a plan.
    assert np.bincount(sources[:500]) / 500 == pytest.approx(list(weights.values()), abs=0.1)


def test_a_draw_depends_on_the_seed_and_the_place_alone():
    config = mixture()
    all_at_once = draw_first(config, 3000)
    for places in (np.array([2999]), np.arange(990, 1010), np.array([1, 1999, 5])):
        for found, whole in zip(draw(config, places), all_at_once, strict=True):
            assert np.array_equal(found, whole[places])
    other_batch, other_seed = draw_first(mixture(batch=2), 3000), draw_first(mixture(seed=1), 3000)
    assert np.array_equal(all_at_once[0], other_batch[0])
    assert not np.array_equal(all_at_once[0], other_seed[0])
    assert not np.array_equal(all_at_once[0][:CYCLE], all_at_once[0][CYCLE : 2 * CYCLE])


@pytest.mark.parametrize("anneal_step", [None, 100, 137])
def test_each_source_is_counted_without_a_gap(anneal_step):
    annealed = {"code": 0.0, "rare": 9.0} if anneal_step else None
    sources, earlier = draw_first(mixture(annealed=annealed, anneal_step=anneal_step), 5000)
    for source in range(3):
        of_it = earlier[sources == source]
        assert of_it.tolist() == list(range(len(of_it)))


@pytest.mark.parametrize("anneal_step", [125, 130])
def test_weights_change_at_their_step(anneal_step):
    """With 8 samples a step, after 1000 samples: at the end of a cycle; and after 1040: within one."""
    config = mixture({"a": 1.0, "b": 1.0}, annealed={"a": 3.0, "b": 0.0}, anneal_step=anneal_step)
    sources, _ = draw_first(config, 3000)
    change = anneal_step * 8
    assert set(sources[change - 8 : change]) == {0, 1}
    assert set(sources[change:]) == {0}


def test_the_samples_drawn_are_counted_as_they_come():
    config = mixture(annealed={"prose": 0.0}, anneal_step=137)
    sources, _ = draw_first(config, 8 * 300)
    for steps in (1, 125, 136, 137, 138, 300):
        counts = np.bincount(sources[: 8 * steps], minlength=3)
        assert samples_drawn(config, steps) == dict(zip(WEIGHTS, counts.tolist(), strict=True)), steps


@pytest.fixture
def three(tmp_path):
    """Three sources of one letter each, in pieces of ten letters of which the first tells the piece."""
    sources = {}
    for name, letter, pieces in (("a", "a", 400), ("b", "b", 90), ("c", "c", 300)):
        (tmp_path / f"{name}.txt").write_text(letter * 10 * pieces)
        sources[name] = {"source": str(tmp_path / f"{name}.txt"), "weight": {"a": 5, "b": 3, "c": 2}[name]}
    return corpus_config(tmp_path / "cache", sources=sources)


def test_a_sample_is_of_one_source_and_no_source_repeats_before_it_is_over(three):
    corpus = prepare_corpus(three)
    starts = np.concatenate([samples_of_step(three, corpus.train, step) for step in range(400)])
    samples = read_samples(corpus.train.tokens, starts, 16)
    letters = [corpus.tokenizer.token_to_id(letter) for letter in "abc"]
    end = corpus.tokenizer.token_to_id(corpus.end_token)
    assert all(len(set(sample) - {end}) == 1 for sample in samples.tolist())
    for letter, tokens, drawn in zip(
        letters, corpus.train.sources.values(), samples_drawn(three, 400).values(), strict=True
    ):
        own = starts[(samples[:, 0] == letter)]
        assert len(own) == drawn
        num = (len(tokens) - 1) // 16
        for first in range(0, len(own) - num + 1, num):
            assert len(set(own[first : first + num].tolist())) == num, "an epoch has each sample once"


def test_weights_change_no_token_and_each_source_has_held_out_text(three):
    corpus = prepare_corpus(three)
    assert list(corpus.extra_validation) == ["a", "b", "c"]
    parts = [text.tokens for text in corpus.extra_validation.values()]
    assert np.array_equal(np.concatenate(parts), corpus.validation.tokens)
    for name, text in corpus.extra_validation.items():
        decoded = corpus.tokenizer.decode(text.tokens.tolist(), skip_special_tokens=True)
        assert set(decoded) == {name}
        assert text.bytes_per_token == (len(text.tokens) - 1) / len(text.tokens)
        assert text.documents.tolist() == [0]
    sources = {
        name: {**source, "weight": 1.0} for name, source in three.model_dump()["data"]["sources"].items()
    }
    other_config = changed(three, {"data.sources": sources})
    assert prepare_corpus(other_config).fingerprint == corpus.fingerprint
    assert plan_build(other_config).folder == plan_build(three).folder


def test_a_source_that_would_be_read_too_often_is_refused(three):
    sources = three.model_dump()["data"]["sources"]
    drawn = samples_drawn(three, 1000)["b"]
    for factor, refused in ((1.01, False), (0.99, True)):
        num = (int(90 * 10 * 0.95) + 1 - 1) // 16  # samples in what is not held out
        sources["b"]["max_epochs"] = drawn / num * factor
        config = changed(three, {"data.sources": sources, "train.steps": 1000})
        if refused:
            with pytest.raises(
                ConfigError, match=r"^data.sources.b.max_epochs: .* reads it 11.* times; lower"
            ):
                prepare_corpus(config)
        else:
            prepare_corpus(config)


def test_a_stream_of_several_sources_is_read_as_far_as_each_is_needed(three):
    streamed = changed(three, {"data.streaming": True, "train.steps": 40})
    whole, corpus = prepare_corpus(three), prepare_corpus(streamed)
    for step in range(40):
        starts = samples_of_step(streamed, corpus.train, step)
        assert (read_samples(corpus.train.tokens, starts, 16)[:, 1:] >= 0).all()
    assert whole.fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"source": "x.txt"}, "data.source: has no meaning beside data.sources"),
        (
            {"anneal_step": 3},
            "data.anneal_step: needs a source with an anneal_weight, and such a source needs",
        ),
        ({"extra_validation": {"a": "x"}}, "data.extra_validation: 'a' is one of data.sources as well"),
        ({"source_revisions": {"x": "abc"}}, "data.source_revisions: 'x' is not one of data.sources"),
        ({"sources": {"a/b": {"source": "x", "weight": 1}}}, "data.sources: 'a/b' cannot name a text"),
        ({"sources": {"a": {"source": "x"}}}, "data.sources.a.weight: "),
        ({"sources": {"a": {"source": "x", "weight": 0}}}, "data.sources.a.weight: should be greater than 0"),
        (
            {"sources": {str(i): {"source": "x", "weight": 1} for i in range(33)}},
            "data.sources: there are 33, at most 32 can be mixed",
        ),
        (
            {"anneal_step": 3, "sources": {"a": {"source": "x", "weight": 1, "anneal_weight": 0}}},
            "data.sources: no source has a weight above 0 after data.anneal_step",
        ),
        ({"sources": {}, "anneal_step": 3}, "data.anneal_step: is of data.sources, and there are none"),
        ({"shuffle_buffer": 3}, "data.shuffle_buffer: is for streams"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_by_name(data, complaint):
    sources = {"a": {"source": "x", "weight": 1}, "b": {"source": "y", "weight": 1}}
    with pytest.raises(ConfigError) as refused:
        parse_config({"data": {"sources": sources, **data}})
    assert str(refused.value).startswith(complaint)
