"""Generate text: sample one token after another from a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from moe.config import ConfigError, check_type
from moe.inference.trained_run import TrainedRun
from moe.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends.

    Attributes:
        max_new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together reach this mass (Holtzman et al. 2020).
        seed: of the first prompt's text, the next prompt has the next seed; the global random state is
            untouched.
        top_k: sample among this many of the likeliest tokens (Fan et al. 2018), of which `top_p` then keeps a
            part; None: among all.
        stop: the text ends before the first of these strings; a single one may be given as it is.

    Raises:
        ConfigError: a value is of another type or out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    top_k: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        number = int | float
        kinds = {"max_new_tokens": int, "temperature": number, "top_p": number, "seed": int}
        for name, kind in (kinds | {"top_k": int | None, "stop": Sequence}).items():
            check_type(name, getattr(self, name), kind)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for text in self.stop:
            check_type("stop", text, str)
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", f"should be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ConfigError("temperature", f"should be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"should be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", f"should be at least 0 and below 2**63, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", f"should be at least 1, got {self.top_k}")
        if "" in self.stop:
            raise ConfigError("stop", "should not be empty")


@overload
def generate(run: TrainedRun, prompt: str = "", sampling: Sampling | None = None) -> str: ...
@overload
def generate(run: TrainedRun, prompt: Sequence[str], sampling: Sampling | None = None) -> list[str]: ...
def generate(
    run: TrainedRun, prompt: str | Sequence[str] = "", sampling: Sampling | None = None
) -> str | list[str]:
    """The prompt and its continuation by a run from `load_run`; an empty prompt starts a document.

    Several prompts, of any lengths, are continued together. Each has the text that it would have alone with
    its seed. Raises what `stream` raises.
    """
    check_type("prompt", prompt, str | Sequence)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    for number, piece in stream(run, list(texts), sampling):
        texts[number] += piece
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    run: TrainedRun, prompts: str | Sequence[str], sampling: Sampling | None = None
) -> Iterator[tuple[int, str]]:
    """Continue one or several prompts piece by piece: the place in `prompts`, and the characters that follow.

    Raises:
        ConfigError: an argument is of another type, such as the path of a run.
    """
    check_type("run (see load_run)", run, TrainedRun)
    check_type("prompts", prompts, str | Sequence)
    prompts, sampling = [prompts] if isinstance(prompts, str) else prompts, sampling or Sampling()
    check_type("sampling", sampling, Sampling)
    for prompt in prompts:
        check_type("prompt", prompt, str)
    ids = [run.tokenizer.encode(prompt, add_special_tokens=False).ids or [run.end_id] for prompt in prompts]
    texts = [_Text(run, begin, sampling.stop) for begin in ids]
    decoding = Decoding(run.model, ids, sampling)
    while decoding.sequences:
        for number, token in decoding.step().items():
            yield number, texts[number].add(token)
            if texts[number].ended:
                decoding.drop(number)
    yield from ((number, text.rest) for number, text in enumerate(texts))


class _Text:
    """A continuation as it is written.

    Attributes:
        rest: what is held back, since a stop string may begin with it.
        ended: by the end of the document or a stop string.
    """

    def __init__(self, run: TrainedRun, begin: Sequence[int], stop: Sequence[str]):
        self._run, self._stop, self.rest, self.ended = run, stop, "", False
        self._decoder = DecodeStream(skip_special_tokens=True)
        for token in begin:  # how a token is written can depend on those before it
            self._decoder.step(run.tokenizer, token)

    def add(self, token: int) -> str:
        """The characters that can be written once this token is added."""
        if token == self._run.end_id:
            self.ended = True
            return ""
        text = self.rest + (self._decoder.step(self._run.tokenizer, token) or "")
        if found := [text.index(stop) for stop in self._stop if stop in text]:
            self.ended, self.rest = True, ""
            return text[: min(found)]
        held = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        certain = len(text) - max(held, default=0)
        self.rest = text[certain:]
        return text[:certain]


class Decoding:
    """Sequences that a model extends, each by a token at a time.

    A model sees as many tokens as `context_start` leaves. Their keys and values are kept, so that a step
    computes the newest tokens only.

    Args:
        model: in evaluation mode while it is used; then in the mode that it had.
        prompts: the tokens of each sequence, at least one.
        sampling: how tokens are chosen. A sequence ends after `max_new_tokens`.
        agree: makes new tokens (B,) the same on all ranks, where they share the experts.

    Attributes:
        sequences: those that have not ended, by their place in `prompts`.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    ):
        assert all(prompts), "an empty prompt"
        self.sequences = {number: list(prompt) for number, prompt in enumerate(prompts)}
        self._model, self._sampling, self._agree = model, sampling, agree
        self._ends = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        self._generators = [torch.Generator().manual_seed(sampling.seed + n) for n in range(len(prompts))]
        self._cache = model.new_cache(len(prompts))
        self._starts = [-1] * len(prompts)  # of the context whose keys and values are in the cache

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """The next token of each sequence."""
        was_training = self._model.training
        self._model.eval()
        for row, (number, tokens) in enumerate(self.sequences.items()):
            start = context_start(len(tokens), self._model.max_seq_len)
            if start != self._starts[number]:
                self._starts[number] = start
                self._fill(row, tokens[start:-1])
        newest = self._tensor([tokens[-1] for tokens in self.sequences.values()])
        logits = self._model(newest[:, None], cache=self._cache).logits[:, 0].float().cpu()
        self._model.train(was_training)
        drawn = zip(self.sequences, logits, strict=True)
        drawn = torch.cat([choose_token(row, self._sampling, self._generators[n]) for n, row in drawn])
        new = dict(zip(self.sequences, self._agree(drawn.to(newest.device)).tolist(), strict=True))
        for number, token in new.items():
            self.sequences[number].append(token)
            if len(self.sequences[number]) == self._ends[number]:
                self.drop(number)
        return new

    def drop(self, number: int) -> None:
        """End a sequence; one that has ended is left as it is."""
        if number in self.sequences:
            rows = [row for row, other in enumerate(self.sequences) if other != number]
            self._cache = self._cache.of(rows)
            del self.sequences[number]

    def _fill(self, row: int, tokens: list[int]) -> None:
        """Replace what is kept of a sequence."""
        cache = self._cache.of(slice(row, row + 1))
        cache.lengths.zero_()
        if tokens:
            self._model(self._tensor(tokens)[None], cache=cache)

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self._model.embedding.weight.device)


def context_start(length: int, max_seq_len: int) -> int:
    """The first token that a model sees of a text of this length.

    A text that is longer than `max_seq_len` loses half of that at a time, so that the keys and values of the
    others, which depend on all before them, are computed anew once for many tokens.
    """
    half = (max_seq_len + 1) // 2
    return -(-max(0, length - max_seq_len) // half) * half


def generate_tokens(
    model: Transformer,
    prompt: Tensor,
    sampling: Sampling,
    end_id: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Tensor:
    """Extend a prompt (S,) int64 by `Decoding` to (S + new,); the text ends after the token `end_id`."""
    decoding, tokens = Decoding(model, [prompt.tolist()], sampling, agree), prompt.tolist()
    while decoding.sequences:
        tokens += decoding.step().values()
        if tokens[-1] == end_id:
            decoding.drop(0)
    return torch.tensor(tokens, device=prompt.device)


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token (1,) int64 from its logits (V,) fp32."""
    if sampling.temperature == 0:
        return logits.argmax()[None]
    logits, order = logits.sort(descending=True, stable=True)
    logits, order = logits[: sampling.top_k], order[: sampling.top_k]
    probs = ((logits - logits[0]) / sampling.temperature).softmax(0)
    outside = probs.cumsum(0) - probs >= sampling.top_p  # the token that crosses top_p still belongs
    return order[probs.masked_fill(outside, 0).multinomial(1, generator=generator)]
