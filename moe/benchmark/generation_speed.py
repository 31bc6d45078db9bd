"""Tokens per second of text generation."""

from typing import Any

import torch

from moe.benchmark.measuring import in_turns, now, spread_ms
from moe.inference.generation import Sampling, generate_tokens
from moe.model.transformer import Transformer


def measure_generation(model: Transformer, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Let a model continue a single token, and go on after every token that would end a document.

    Args:
        model: in evaluation mode.
        new_tokens: to generate in each run.
        repeats: timed runs, after one that is not timed.

    Returns:
        `new_tokens`, `context` (tokens that the model sees at most), `params`, `ms_per_token`,
        `tokens_per_s`, its quartiles, and `repeats`.
    """
    device = model.embedding.weight.device
    prompt, sampling = torch.zeros(1, dtype=torch.int64, device=device), Sampling(new_tokens)

    def generate() -> float:
        started = now(device)
        tokens = generate_tokens(model, prompt, sampling)
        seconds = now(device) - started
        assert len(tokens) == 1 + new_tokens, "it stopped before the end"
        return seconds / new_tokens

    generate()
    ms = spread_ms(in_turns({"": generate}, repeats)[""])
    return {
        "params": sum(weight.numel() for weight in model.parameters()),
        "new_tokens": new_tokens,
        "context": model.max_seq_len,
        "ms_per_token": ms.median,
        "tokens_per_s": 1e3 / ms.median,
        "tokens_per_s_quartiles": [1e3 / ms.high, 1e3 / ms.low],
        "repeats": repeats,
    }
