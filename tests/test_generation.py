import pytest
import torch

from moe.inference.generation import _sample, generate
from tests.test_transformer import make_model

PROMPT = torch.tensor([1, 2, 3])
ARGUMENTS = dict(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=0, max_context=64)


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_state_alone():
    model = make_model()
    before = torch.get_rng_state()
    first, second = (generate(model, PROMPT, **ARGUMENTS) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, generate(model, PROMPT, **(ARGUMENTS | {"seed": 1})))
    assert model.training
    assert first[:3].tolist() == [1, 2, 3]
    assert len(first) == 15


def test_temperature_zero_takes_the_likeliest_token_each_time():
    model = make_model().eval()
    tokens = generate(model, PROMPT, **(ARGUMENTS | {"temperature": 0}))
    for length in range(3, 15):
        assert tokens[length] == model(tokens[None, :length]).logits[0, -1].argmax()


def test_the_end_token_ends_the_text():
    model = make_model()
    free = generate(model, PROMPT, **ARGUMENTS)
    end = int(free[6])
    stopped = generate(model, PROMPT, **ARGUMENTS, end_id=end)
    assert stopped.tolist() == free[: free[3:].tolist().index(end) + 4].tolist()


def test_a_context_longer_than_the_model_is_cut_from_the_left():
    model = make_model(model={"max_seq_len": 16}, data={"seq_len": 16})
    prompt = torch.randint(0, 50, (40,))
    cut = generate(model, prompt[-16:], **(ARGUMENTS | {"max_context": 16}))
    assert torch.equal(generate(model, prompt, **(ARGUMENTS | {"max_context": 16}))[40:], cut[16:])


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.3, {2}), (0.5, {2}), (0.6, {2, 0}), (0.95, {2, 0, 1}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p, allowed):
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {int(_sample(logits, 1.0, top_p, generator)) for _ in range(400)}
    assert drawn == allowed


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([_sample(logits, 1.0, 1.0, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.03)
