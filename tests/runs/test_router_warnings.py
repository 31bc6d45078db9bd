"""A router that goes wrong is named once, in words; a healthy one is left alone."""

import json

import pytest
import torch

from moe.config import parse_config
from moe.runs.router_plot import plot_routers
from moe.runs.router_warnings import RouterWarnings

SETTINGS = {"model": {"n_layers": 3, "vocab_size": 50}, "moe": {"num_experts": 16, "first_dense_layers": 1}}
HEALTHY = [64] * 16


def warnings_of(steps, settings=SETTINGS):
    """By step from 1 on: what is said, of pairs of the loads of two layers and their largest logits."""
    watch, said = RouterWarnings(parse_config(settings)), {}
    for step, (loads, logits) in enumerate(steps, 1):
        texts = watch.of_step(torch.tensor(loads), {"moe/layers/logit_max": logits})
        if texts:
            said[step] = texts
    return said


def test_a_healthy_run_says_nothing():
    generator = torch.Generator().manual_seed(0)
    skewed = torch.arange(1, 17) / 136  # the least used expert gets a eighth of the mean
    draws = [torch.multinomial(skewed.expand(2, 16), 256, True, generator=generator) for _ in range(300)]
    loads = [torch.stack([torch.bincount(row, minlength=16) for row in draw]).tolist() for draw in draws]
    assert not warnings_of([(each, [8.0, 12.0]) for each in loads])


def test_small_steps_of_many_experts_say_nothing():
    """8 choices among 64 experts a step, so that most get none in most steps."""
    generator = torch.Generator().manual_seed(0)
    settings = {"model": {"n_layers": 1, "vocab_size": 50}, "moe": {"num_experts": 64}}
    draws = [torch.randint(64, (8,), generator=generator) for _ in range(400)]
    loads = [[torch.bincount(draw, minlength=64).tolist()] for draw in draws]
    assert not warnings_of([(each, [1.0]) for each in loads], settings)


def test_a_collapse_is_said_once_and_again_after_it_was_well():
    collapsed = [440, 480] + [4] * 10 + [16] + [8] * 3
    steps = [([HEALTHY, collapsed], [1.0, 1.0])] * 100 + [([HEALTHY, HEALTHY], [1.0, 1.0])] * 50
    said = warnings_of(steps + steps)
    text = "layer 2: 2 of 16 experts take 92% of the tokens; raise moe.aux_loss_coef or moe.bias_update_rate"
    first, second = said
    assert list(said.values()) == [[text], [text]]
    assert first == 50
    assert 200 <= second < 230, "what was well before counts for some steps"


def test_few_experts_of_few_are_no_collapse():
    settings = {"model": {"n_layers": 1, "vocab_size": 50}, "moe": {"num_experts": 2, "top_k": 2}}
    assert not warnings_of([([[64, 64]], [1.0])] * 100, settings)


def test_dead_experts_are_said_once_and_again_after_they_had_a_token():
    dead = [0, 0, *[64] * 14]
    steps = [([dead, HEALTHY], [1.0, 1.0])] * 150 + [([HEALTHY, HEALTHY], [1.0, 1.0])]
    said = warnings_of(steps + steps)
    assert list(said) == [100, 251]
    [text] = said[100]
    assert text.startswith("layer 1: 2 of 16 experts got no token in 100 steps; raise moe.aux_loss_coef")


def test_an_expert_without_tokens_is_dead_only_after_enough_tokens_of_others():
    """15 tokens to 16 experts: 200 have come to the mean expert after 213.3 steps."""
    few = [0, *[1] * 15]
    assert list(warnings_of([([few, few], [1.0, 1.0])] * 300)) == [214]


def test_large_logits_are_said_once_until_they_were_small():
    logits = [20.0, 49.0, 51.0, 90.0, 45.0, 55.0, 30.0, 85.4]
    said = warnings_of([([HEALTHY, HEALTHY], [value, 1.0]) for value in logits])
    text = "layer 1: router logits reach {}; raise moe.z_loss_coef or lower optim.lr"
    assert said == {3: [text.format(51)], 8: [text.format(85)]}


def test_a_run_whose_router_blows_up_says_so_and_the_default_one_does_not(run_main, monkeypatch):
    code, run, _, err = run_main()
    assert code == 0
    assert "warning: step" not in err
    code, _, _, err = run_main("moe.z_loss_coef=0", "optim.lr=50", "optim.grad_clip=0", folder="large")
    assert code in (0, 1)
    assert "warning: step" in err
    assert "router logits reach" in err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[0]["moe/layers/max_vio"]) == 2
    assert (run / "router.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_run_has_no_picture_of_routers(run_main):
    code, run, _, _ = run_main("moe.num_experts=1", "moe.top_k=1")
    assert code == 0
    assert (run / "loss.png").exists()
    assert not (run / "router.png").exists()


@pytest.mark.parametrize("layers", [1, 4])
def test_the_picture_has_a_line_for_each_layer_and_their_mean(tmp_path, monkeypatch, layers):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot

    def keep(axes, steps, values, **style):
        drawn.append(values.tolist())
        return plot(axes, steps, values, **style)

    monkeypatch.setattr(Axes, "plot", keep)
    names = ("max_vio", "dead_experts", "load_entropy", "router_entropy", "top1_margin", "logit_max")
    lines = [
        {"step": step} | {f"moe/layers/{name}": [float(step + i) for i in range(layers)] for name in names}
        for step in (1, 2)
    ]
    plot_routers([*lines, {"step": 2, "eval/loss": 1.0}], "title", tmp_path / "router.png")
    of_panel = [[1.0 + i, 2.0 + i] for i in range(layers)]
    mean = [1 + (layers - 1) / 2, 2 + (layers - 1) / 2]
    assert drawn == 6 * [*of_panel, mean]
