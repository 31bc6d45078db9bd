"""`sample.txt`: what the final model of a run writes."""

from collections.abc import Callable
from dataclasses import replace

import torch

from moe.data.token_cache import TokenizedCorpus
from moe.inference.generation import Sampling, generate_tokens
from moe.model.transformer import Transformer

PROMPT_TOKENS = 48
SAMPLING = Sampling(max_new_tokens=200, temperature=0.7, top_p=0.95)


def sample_text(
    model: Transformer,
    corpus: TokenizedCorpus,
    device: torch.device,
    agree: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    """A document from nothing, and the continuation of two validation texts.

    All ranks call this and write the same text, since each may hold a part of the experts; `agree` is that of
    `generate_tokens`.
    """
    tokenizer, end_id = corpus.tokenizer, corpus.tokenizer.token_to_id(corpus.end_token)
    assert end_id is not None
    texts = corpus.validation.tokens
    prompts = [[end_id]] + [texts[i : i + PROMPT_TOKENS].tolist() for i in (0, len(texts) // 2)]
    parts = []
    for seed, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt, device=device)
        tokens = generate_tokens(model, tokens, replace(SAMPLING, seed=seed), end_id, agree).tolist()
        title = "from nothing" if prompt == [end_id] else "a validation text, continued after the bar"
        given = tokenizer.decode(prompt).rstrip("\n") + " ||" if prompt != [end_id] else ""
        parts.append(f"----- {title}\n{given}{tokenizer.decode(tokens[len(prompt) :])}\n")
    return "\n".join(parts)
