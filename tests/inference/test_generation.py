"""How a model extends a text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import ConfigError
from moe.inference.generation import Sampling, choose_token, generate_tokens
from tests.support.models import make_model

PROMPT = torch.tensor([1, 2, 3])
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=0)


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_state_alone():
    model = make_model()
    before = torch.get_rng_state()
    first, second = (generate_tokens(model, PROMPT, SAMPLING) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, generate_tokens(model, PROMPT, replace(SAMPLING, seed=1)))
    assert model.training
    assert first[:3].tolist() == [1, 2, 3]
    assert len(first) == 15


def test_a_model_in_evaluation_mode_stays_in_it():
    model = make_model().eval()
    generate_tokens(model, PROMPT, replace(SAMPLING, max_new_tokens=1))
    assert not model.training


def test_temperature_zero_takes_the_likeliest_token_each_time():
    model = make_model().eval()
    tokens = generate_tokens(model, PROMPT, replace(SAMPLING, temperature=0))
    for length in range(3, 15):
        assert tokens[length] == model(tokens[None, :length]).logits[0, -1].argmax()


def test_the_end_token_ends_the_text():
    model = make_model()
    free = generate_tokens(model, PROMPT, SAMPLING)
    end = int(free[6])
    stopped = generate_tokens(model, PROMPT, SAMPLING, end_id=end)
    assert stopped.tolist() == free[: free[3:].tolist().index(end) + 4].tolist()


def test_a_context_longer_than_the_model_is_cut_from_the_left():
    model = make_model(model={"max_seq_len": 16}, data={"seq_len": 16})
    prompt = torch.randint(0, 50, (40,))
    cut = generate_tokens(model, prompt[-16:], SAMPLING)
    assert torch.equal(generate_tokens(model, prompt, SAMPLING)[40:], cut[16:])


class _Operations(TorchDispatchMode):
    """Names of the operations that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moe", [{}, {"num_experts": 1, "top_k": 1}])
def test_no_product_keeps_memory_for_each_length_of_text(moe):
    """As those of oneDNN do, which training uses: half a MiB for every new number of rows."""
    model = make_model(moe=moe)
    with _Operations() as generating:
        generate_tokens(model, PROMPT, SAMPLING)
    with _Operations() as training:
        model(PROMPT[None]).logits.sum().backward()
    assert not [name for name in generating.names if "mkldnn" in name]
    assert [name for name in training.names if "mkldnn" in name]


def test_every_token_is_the_one_that_the_ranks_agree_on():
    tokens = generate_tokens(make_model(), PROMPT, SAMPLING, agree=lambda token: token.fill_(7))
    assert tokens.tolist() == [1, 2, 3] + 12 * [7]


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.3, {2}), (0.5, {2}), (0.6, {2, 0}), (0.95, {2, 0, 1}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p, allowed):
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    generator, sampling = torch.Generator().manual_seed(0), replace(SAMPLING, top_p=top_p)
    drawn = {int(choose_token(logits, sampling, generator)) for _ in range(400)}
    assert drawn == allowed


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([choose_token(logits, SAMPLING, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.03)


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_the_temperature_is_a_power_of_the_probabilities(top_p):
    """At temperature 2 they go with their square roots: 0.64, 0.32 and 0.04 as 0.8, 0.57 and 0.2."""
    logits, sampling = torch.tensor([0.64, 0.32, 0.04]).log(), replace(SAMPLING, temperature=2.0, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([choose_token(logits, sampling, generator) for _ in range(4000)])
    roots = torch.tensor([0.8, 0.5657, 0.2])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, roots / roots.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize(("temperature", "allowed"), [(0.5, {0}), (1.0, {0}), (2.0, {0, 1})])
def test_top_p_counts_the_mass_after_the_temperature(temperature, allowed):
    """At temperature 2, 0.81, 0.09, 0.06 and 0.04 become 0.55, 0.18, 0.15 and 0.12."""
    logits = torch.tensor([0.81, 0.09, 0.06, 0.04]).log()
    sampling = replace(SAMPLING, temperature=temperature, top_p=0.7)
    generator = torch.Generator().manual_seed(0)
    assert {int(choose_token(logits, sampling, generator)) for _ in range(400)} == allowed


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: should be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: should be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: should be at least 0, got nan"),
        ({"top_p": 0.0}, "top_p: should be above 0 and at most 1, got 0.0"),
        ({"seed": 2**63}, "seed: should be at least 0 and below 2**63"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(values, complaint):
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert str(caught.value).startswith(complaint)
