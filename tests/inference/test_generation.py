"""How a model extends a text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import ConfigError, parse_config
from moe.inference.generation import Decoding, Sampling, choose_token, generate, generate_tokens, stream
from moe.inference.trained_run import TrainedRun
from moe.model import products
from moe.model.transformer import Transformer
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


@torch.no_grad()
def naive(model: Transformer, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The definition: for each token the whole context anew, less half a window while it is too long."""
    generator, tokens = torch.Generator().manual_seed(sampling.seed), list(prompt)
    model.eval()
    for _ in range(sampling.max_new_tokens):
        context = tokens
        while len(context) > model.max_seq_len:
            context = context[(model.max_seq_len + 1) // 2 :]
        logits = model(torch.tensor([context])).logits[0, -1].float()
        tokens.append(int(choose_token(logits, sampling, generator)))
    return tokens


def decode(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    decoding, texts = Decoding(model, prompts, sampling), [list(prompt) for prompt in prompts]
    while decoding.sequences:
        for number, token in decoding.step().items():
            texts[number].append(token)
    return texts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"n_kv_heads": 1, "qk_norm": True, "rope_theta": 100.0}},
        {"model": {"max_seq_len": 7}, "data": {"seq_len": 7}},
        {"model": {"max_seq_len": 1}, "data": {"seq_len": 1}},
        {"moe": {"num_experts": 1, "top_k": 1}},
        {"moe": {"capacity_factor": 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 3, 30])
def test_kept_keys_and_values_give_the_tokens_of_the_whole_context(changes, length):
    model = make_model(**{"model": {"max_seq_len": 16}, "data": {"seq_len": 16}} | changes)
    prompt, sampling = torch.randint(0, 50, (length,)).tolist(), replace(SAMPLING, max_new_tokens=40)
    assert decode(model, [prompt], sampling) == [naive(model, prompt, sampling)]


def test_prompts_of_different_lengths_are_continued_together_as_each_alone_with_its_seed():
    model = make_model(model={"max_seq_len": 16}, data={"seq_len": 16})
    prompts = [torch.randint(0, 50, (length,)).tolist() for length in (5, 1, 40, 16, 5)]
    together = decode(model, prompts, SAMPLING)
    assert together == [naive(model, p, replace(SAMPLING, seed=n)) for n, p in enumerate(prompts)]


def test_a_sequence_that_ends_leaves_the_others_as_they_are():
    model, prompts = make_model(), [[1, 2], [3], [4, 5, 6]]
    want, decoding, texts = decode(model, prompts, SAMPLING), Decoding(model, prompts, SAMPLING), prompts
    for step in range(12):
        if step == 4:
            decoding.drop(0)
        for number, token in decoding.step().items():
            texts[number] = [*texts[number], token]
    assert texts == [want[0][: 2 + 4], *want[1:]]


def test_the_logits_of_a_kept_context_are_those_of_the_whole_one():
    """In fp64, for texts of two lengths that are fed in pieces."""
    model = make_model(model={"n_kv_heads": 1}).double().eval()
    tokens = torch.randint(0, 50, (2, 12))
    want = model(tokens).logits
    with torch.no_grad():
        cache = model.new_cache(2)
        first = model(tokens[:1, :5], cache=cache.of(slice(0, 1))).logits
        second = model(tokens[1:, :2], cache=cache.of(slice(1, 2))).logits
        third = model(torch.stack((tokens[0, 5:9], tokens[1, 2:6])), cache=cache).logits
    assert cache.lengths.tolist() == [9, 6]
    for got, expected in ((first[0], want[0, :5]), (second[0], want[1, :2])):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(third, torch.stack((want[0, 5:9], want[1, 2:6])), rtol=0, atol=1e-12)


def test_a_step_computes_one_token_and_a_window_that_moves_half_of_it():
    model, computed = make_model(model={"max_seq_len": 16}, data={"seq_len": 16}), []
    model.embedding.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].numel()))
    decode(model, [[1] * 10], replace(SAMPLING, max_new_tokens=16))
    # 9 and then 1 each for contexts of 10 to 16; at 17 and 25 tokens the context is 9 again, 8 of them anew.
    assert computed == [9, *[1] * 7, 8, *[1] * 8, 8, 1]


class _Operations(TorchDispatchMode):
    """Names of the operations that run meanwhile."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moe", [{}, {"num_experts": 1, "top_k": 1}])
def test_no_product_keeps_memory_for_each_length_of_text(monkeypatch, moe):
    """As those of oneDNN do, which training uses with AVX-512: half a MiB for every new number of rows."""
    monkeypatch.setattr(products, "PREFERS_ONEDNN", True)
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


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"),
    [(1, 1.0, {2}), (2, 1.0, {2, 0}), (9, 1.0, {0, 1, 2, 3}), (3, 0.95, {2, 0, 1}), (2, 0.6, {2})],
)
def test_top_k_keeps_the_likeliest_tokens_and_top_p_a_part_of_their_mass(top_k, top_p, allowed):
    """Of 0.5 and 0.3 the first has 0.625 of the mass, which reaches 0.6; of all four it has 0.5."""
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    generator, sampling = torch.Generator().manual_seed(0), replace(SAMPLING, top_k=top_k, top_p=top_p)
    assert {int(choose_token(logits, sampling, generator)) for _ in range(400)} == allowed


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
        ({"top_k": 0}, "top_k: should be at least 1, got 0"),
        ({"stop": ("a", "")}, "stop: should not be empty"),
        ({"seed": 2**63}, "seed: should be at least 0 and below 2**63"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(values, complaint):
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_generates_under_autocast(qk_norm):
    model = make_model(model={"qk_norm": qk_norm})
    sampling = replace(SAMPLING, temperature=0, max_new_tokens=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = generate_tokens(model, PROMPT, sampling)
        assert tokens.tolist() == naive(model, PROMPT.tolist(), sampling)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens: should be of type int, got float"),
        ({"temperature": "hot"}, r"temperature: should be of type int \| float, got str"),
        ({"seed": None}, "seed: should be of type int, got NoneType"),
        ({"top_k": 0.5}, r"top_k: should be of type int \| None, got float"),
        ({"stop": None}, "stop: should be of type Sequence, got NoneType"),
        ({"stop": [1]}, "stop: should be of type str, got int"),
        ({"stop": ""}, "stop: should not be empty"),
    ],
    ids=str,
)
def test_values_of_sampling_of_another_type_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
    assert Sampling(stop="end", temperature=1).stop == ("end",)


@pytest.mark.parametrize("prompt", [None, 5])
def test_a_prompt_of_another_type_is_refused(prompt):
    config = parse_config({"model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 50}})
    run = TrainedRun(Transformer(config), Tokenizer(models.BPE()), config, 0)
    with pytest.raises(ConfigError, match=r"prompt: should be of type str \| .*Sequence, got "):
        generate(run, prompt)
    with pytest.raises(ConfigError, match=r"prompts: should be of type str \| .*Sequence, got "):
        next(stream(run, prompt))
