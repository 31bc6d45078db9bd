"""What a run says of itself: the table it opens with, `summary.json` and `sample.txt`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from moe.accounting.cost import GPU, training_cost
from moe.accounting.counts import Ledger
from moe.accounting.memory import estimate_memory, estimate_wire
from moe.config.schema import Config
from moe.data.token_cache import TokenizedCorpus
from moe.inference.generation import generate
from moe.tables import align, gib

_PROMPT_TOKENS, _NEW_TOKENS = 48, 200
_TEMPERATURE, _TOP_P = 0.7, 0.95


def describe(config: Config, ledger: Ledger, world_size: int, device: str) -> str:
    """The table that a run opens with: parameters, total and active, FLOPs, memory, bytes on the wire."""
    memory, wire = estimate_memory(config, world_size, device), estimate_wire(config, world_size)
    sparse = f"{config.moe.num_experts} experts, top-{config.moe.top_k}"
    rows = [
        ("model", "dense" if config.moe.is_dense else sparse),
        ("parameters, total", f"{ledger.total:,}"),
        ("parameters, active per token", f"{ledger.active_all:,}"),
        ("  without input embedding", f"{ledger.active_no_input_emb:,}"),
        ("  without both embeddings", f"{ledger.active_no_emb:,}"),
        ("total / active", f"{ledger.sparsity:.2f}"),
        ("FLOPs per token, forward", f"{ledger.flops_per_token_forward:,}"),
        ("FLOPs per token, training", f"{ledger.flops_per_token_train:,}"),
        ("memory of a rank, at its peak", gib(memory.peak)),
        *((f"  {part}", gib(size)) for part, size in memory.by_part().items()),
        ("sent by a rank in a step", gib(wire.total)),
    ]
    return "\n".join(f"  {line}" for line in align(rows).splitlines())


def summarize(
    metrics: list[dict[str, Any]],
    ledger: Ledger,
    config: Config,
    wall_s: float,
    device_s: float,
    gpu: GPU | None,
) -> dict[str, Any]:
    """The figures of `summary.json`.

    Args:
        metrics: lines of `metrics.jsonl`.
        ledger: counts of the model.
        config: its section `cost` holds the rates.
        wall_s: seconds from the first step on, evaluation and saving included, over all resumed parts.
        device_s: the same, times the GPUs (or CPU processes) of each part.
        gpu: what they are, in the last part; None: unknown, and without `cost.*` so are utilisation, money
            and energy.
    """
    train = [line for line in metrics if "loss/lm" in line]
    last_evaluation = next(line for line in reversed(metrics) if "eval/loss" in line)
    flops = train[-1]["tokens"] * ledger.flops_per_token_train
    tokens_per_step = train[-1]["tokens"] / train[-1]["step"]
    mean_step_s = sum(line["perf/step_s"] for line in train) / len(train)
    return {
        "params_total": ledger.total,
        "params_active": ledger.active_all,
        "flops_per_token": ledger.flops_per_token_train,
        "final_train_loss": train[-1]["loss/lm"],
        "final_eval_loss": last_evaluation["eval/loss"],
        "final_bits_per_byte": last_evaluation["eval/bits_per_byte"],
        "tokens": train[-1]["tokens"],
        "wall_s": wall_s,
        "tokens_per_s": tokens_per_step / mean_step_s,
        "cost": asdict(training_cost(flops, device_s, gpu, config.cost)),
    }


def write_samples(
    model: torch.nn.Module,
    corpus: TokenizedCorpus,
    config: Config,
    device: torch.device,
    agree: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    """Text from the model: one document from nothing, and the continuation of two validation texts.

    All ranks write the same text together: each may hold a part of the experts; `agree` as in `generate`.
    """
    end_id = corpus.tokenizer.token_to_id(corpus.end_token)
    assert end_id is not None
    middle = len(corpus.validation) // 2
    prompts = [[end_id]] + [corpus.validation[i : i + _PROMPT_TOKENS].tolist() for i in (0, middle)]
    parts = []
    for seed, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt, device=device)
        tokens = generate(
            model, tokens, _NEW_TOKENS, _TEMPERATURE, _TOP_P, seed, config.model.max_seq_len, end_id, agree
        ).tolist()
        title = "from nothing" if prompt == [end_id] else "a validation text, continued after the bar"
        given = corpus.tokenizer.decode(prompt).rstrip("\n") + " ||" if prompt != [end_id] else ""
        parts.append(f"----- {title}\n{given}{corpus.tokenizer.decode(tokens[len(prompt) :])}\n")
    return "\n".join(parts)
