"""What the runs support, in sentences."""

import re

import pytest

from moe.ablation.comparison import rows
from moe.ablation.conclusions import conclusions, headline
from tests.support.finished_runs import SHAPES, comparisons_of, write_run


def test_sentences_distinguish_better_worse_and_unclear(ablation):
    for seed, loss in enumerate((3.10, 3.15, 3.05)):
        write_run(ablation / f"bad-{seed}", ["moe.num_experts=32"], seed, loss)
    for seed, loss in enumerate((3.00, 3.20, 2.80)):
        write_run(ablation / f"noisy-{seed}", ["moe.num_experts=2"], seed, loss)
    (found,) = comparisons_of(ablation)
    said = list(conclusions(found))

    def one(beginning):
        (sentence,) = (sentence for sentence in said if sentence.startswith(beginning))
        return sentence

    better = one("Better than dense,width=512")
    assert all(f"num_experts={experts} -0." in better for experts in (4, 8, 16))
    assert "num_experts=8 -0.1000 [-0.1000, -0.1000]" in better
    assert re.search(r"width=2048 -0\.1967 \[.*\] \(with 2\.89 times its FLOPs\)", better)
    assert "num_experts=32 +0.1000" in one("Worse than dense,width=512")
    assert "num_experts=2 +0.0000" in one("Not significantly different from dense,width=512")
    steps = one("Consecutive cells along moe.num_experts")
    assert "num_experts=16 not significantly different from num_experts=8" in steps
    assert "num_experts=32 worse than num_experts=16" in steps
    assert "num_experts=8 0.80" in one("Tokens per second")
    assert "after 1.23M tokens per run" in one("All results")
    # By hand: the seeds of 2 experts differ from the dense ones by 0, 0.16, -0.16: t times 0.16 / sqrt(3).
    assert f"extend 0.0000 to {4.302653 * 0.16 / 3**0.5:.4f} nats to each side" in one(
        "The 95 % intervals of sparse models"
    )
    # 6 against dense, 1 at equal totals, 4 steps, 3 from the first, 2 exponents, 4 sizes: that of 2 experts
    # is too uncertain.
    assert "There are 20 intervals" in one("There are ")
    # 16 against 2: -0.09, -0.30, 0.08. 8 experts have 3,675,264 parameters, the wide dense model 3,671,168.
    assert "num_experts=16 not significantly different from num_experts=2: -0.1033" in one(
        "Compared with the first"
    )
    assert "num_experts=8 worse than dense,width=2048: +0.0967" in one("At equal total parameters")
    assert "so no power law is supported" in one("Loss as a power of total parameters")


def test_the_first_sentence_says_which_is_better_by_how_much_and_whether_it_may_be_chance(tmp_path):
    def said() -> str:
        (found,) = comparisons_of(tmp_path)
        return headline(found)

    write_run(tmp_path / "a", [*SHAPES["8"][0], "run.name=mine"], 0, 2.9)
    assert said() == "mine ends at a validation loss of 2.9000 nats per token."
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "run.name=other"], 0, 3.0)
    assert said() == (
        "mine is better than other by 0.1000 nats per token; with a single seed that may be chance."
    )
    write_run(tmp_path / "c", [*SHAPES["8"][0], "run.name=mine"], 1, 2.9)
    write_run(tmp_path / "d", [*SHAPES["dense"][0], "run.name=other"], 1, 3.1)
    # By hand: 0.15 +- 12.706 x 0.05, with one degree of freedom.
    interval = "(95 % interval -0.4853 to 0.7853, 2 seeds)"
    assert said() == f"mine and other do not differ significantly: 0.1500 nats per token {interval}."
    write_run(tmp_path / "e", [*SHAPES["16"][0], "run.name=large"], 0, 2.80)
    write_run(tmp_path / "f", [*SHAPES["16"][0], "run.name=large"], 1, 2.9001)
    # 0.2 and 0.1999, in four digits 0.2: it is the best, and is compared with the dense model.
    assert said().startswith("large is better than other by 0.2000 nats per token (95 % interval 0.1993 to ")


def test_a_size_whose_interval_spans_more_than_a_factor_of_ten_is_not_told(tmp_path):
    for seed, loss in ((0, 2.9), (1, 2.7)):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, 2.8)
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, loss)
        write_run(tmp_path / f"d{seed}", SHAPES["16"][0], seed, 2.9)
    (found,) = comparisons_of(tmp_path)
    assert (list(found.worth), found.vague) == (["num_experts=16"], ["num_experts=8"])
    said = list(conclusions(found))
    assert "No equivalent dense size of num_experts=8: its interval spans more than a factor of 10." in said
    (sentence,) = (one for one in said if one.startswith("Equivalent dense size"))
    assert "num_experts=8" not in sentence
    sizes = {row["cell"]: row["equivalent_dense_params_no_input_emb"] for row in rows(found)}
    assert sizes["num_experts=8"] is None
    assert sizes["num_experts=16"] > 1e6


def test_one_seed_no_common_seed_and_no_dense_run_are_said(tmp_path):
    write_run(tmp_path / "a", SHAPES["8"][0], 0, 2.9)
    (found,) = comparisons_of(tmp_path)
    assert list(conclusions(found)) == [
        "tiny cannot be compared: no other run has the same settings outside moe.*."
    ]
    write_run(tmp_path / "c", SHAPES["16"][0], 7, 2.8)
    (found,) = comparisons_of(tmp_path)
    assert next(conclusions(found)) == "There is no dense run, so nothing is compared with a dense model."
    write_run(tmp_path / "b", SHAPES["dense"][0], 0, 3.0)
    (found,) = comparisons_of(tmp_path)
    said = list(conclusions(found))
    assert said[0] == (
        "Only one seed in common with dense, so there is no interval and a difference may be due to chance: "
        "num_experts=8."
    )
    assert said[1] == "No seed in common with dense, so not compared: num_experts=16."
    write_run(tmp_path / "d", SHAPES["16"][0], 0, 2.8)  # one seed in common with 8 experts: no verdict
    (found,) = comparisons_of(tmp_path)
    assert not [one for one in conclusions(found) if one.startswith("Consecutive cells")]


def test_a_size_below_the_smallest_dense_one_is_said_to_be_extrapolated(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, 2.8)
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, 3.05)
        write_run(tmp_path / f"d{seed}", SHAPES["16"][0], seed, 2.9)
    (found,) = comparisons_of(tmp_path)
    (sentence,) = (one for one in conclusions(found) if one.startswith("Equivalent dense size"))
    assert re.search(r"num_experts=8 [^;]*, extrapolated; num_experts=16 [^;,]*, [^;,]*\.$", sentence)


def test_a_size_between_two_dense_ones_is_found_by_the_law_through_them(tmp_path):
    dense, large = 1311872 - 1024 * 128, 3671168 - 1024 * 128  # without the input embedding
    halfway = (3.0 * 2.8) ** 0.5  # of the losses, as logarithms
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, 2.8)
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, halfway)
        write_run(tmp_path / f"d{seed}", SHAPES["16"][0], seed, 2.7)
    (found,) = comparisons_of(tmp_path)
    assert found.worth["num_experts=8"].mean == pytest.approx((dense * large) ** 0.5, rel=1e-6)
    (sentence,) = (one for one in conclusions(found) if one.startswith("Equivalent dense size"))
    assert "two sizes, so the fit has no residuals" in sentence
    assert re.search(
        r"num_experts=8 2\.\d+M \[2\.\d+M, 2\.\d+M\]; num_experts=16 .*, extrapolated\.", sentence
    )


@pytest.mark.parametrize(("large", "told"), [((2.80, 2.81), True), ((2.70, 2.99), False)])
def test_no_size_is_told_where_the_dense_law_may_be_flat(tmp_path, large, told):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, large[seed])
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, 2.9)
    (found,) = comparisons_of(tmp_path)
    assert list(found.worth) == (["sparse"] if told else [])
    said = list(conclusions(found))
    for beginning, expected in (("Equivalent dense size", told), ("The equivalent dense size", not told)):
        assert any(sentence.startswith(beginning) for sentence in said) == expected, beginning


def test_one_seed_tells_no_dense_size(tmp_path):
    for name, loss in (("dense", 3.0), ("dense,large", 2.8), ("8", 2.9)):
        write_run(tmp_path / name, SHAPES[name][0], 0, loss)
    (found,) = comparisons_of(tmp_path)
    assert found.worth == {}
    (sentence,) = (
        one
        for one in conclusions(found)
        if one.startswith("The equivalent dense size of the sparse models cannot be estimated")
    )
    assert sentence.endswith("a single seed gives no interval.")


def test_one_interval_is_spoken_of_as_one(tmp_path):
    """By hand: the differences -0.1 and -0.3 have a standard error of 0.1; t is 12.706."""
    for seed, loss in ((0, 2.9), (1, 2.7)):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["8"][0], seed, loss)
    (found,) = comparisons_of(tmp_path)
    said = " ".join(conclusions(found))
    assert "intervals of sparse models extend 1.2706 nats to each side" in said
    assert "There is one interval of 95 % here." in said


def test_a_run_that_differs_outside_the_experts_is_told_in_which_keys(tmp_path):
    write_run(tmp_path / "a", SHAPES["8"][0], 0, 2.9)
    (alone,) = comparisons_of(tmp_path)
    end = "cannot be compared: no other run has the same settings outside moe.*"
    assert list(conclusions(alone)) == [f"tiny {end}."]
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "optim.lr=1e-3", "train.steps=600"], 0, 3.0)
    said = [sentence for found in comparisons_of(tmp_path) for sentence in conclusions(found)]
    assert said == [
        f"tiny {end}: train.steps=1200, optim.lr=0.003.",
        f"tiny {end}: train.steps=600, optim.lr=0.001.",
    ]
