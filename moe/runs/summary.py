"""What a run is and what came of it: the overview that it prints at the start, and `summary.json`."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe.accounting.communication import estimate_communication
from moe.accounting.cost import training_cost
from moe.accounting.counts import ModelCounts
from moe.accounting.gpus import GPU
from moe.accounting.memory import estimate_memory
from moe.config import Config
from moe.runs.metrics_log import losses_by_text
from moe.tables import memory_size, plain, short

_CLEAR_RISE = 0.01  # nats; a smaller one is noise of short runs


def overview(config: Config, counts: ModelCounts, text_tokens: int, world_size: int, device: str) -> str:
    """What a run prints at its start: the model, its parameters, FLOPs, memory, text, and what ranks send.

    Args:
        config: of the run.
        counts: of its model.
        text_tokens: of the training text.
        world_size: number of ranks.
        device: their type, `cpu` or `cuda`.
    """
    model, moe, train = config.model, config.moe, config.train
    memory, sent = estimate_memory(config, world_size, device), estimate_communication(config, world_size)
    where = "" if len(config.moe_layers) == model.n_layers else f" in {len(config.moe_layers)} of them"
    experts = "dense" if moe.is_dense else f"{moe.num_experts} experts, top-{moe.top_k}{where}"
    tokens = train.steps * train.global_batch_size * config.data.seq_len
    flops, epochs = counts.flops_per_token_train, plain(tokens / text_tokens)
    active = f"{counts.active_all:,} active for a token (total / active: {counts.sparsity:.2f})"
    lines = [
        f"model:       {model.n_layers} layers of width {model.d_model}, {experts}",
        f"parameters:  {counts.total:,}, {active}",
        f"FLOPs:       {short(flops)} a token in training, {short(flops * tokens)} in {train.steps:,} steps",
        f"memory:      about {memory_size(memory.peak)} on each {device}, without that of PyTorch itself",
        f"text:        {text_tokens:,} tokens; the run reads {tokens:,}, {epochs} epochs",
    ]
    if world_size > 1:
        lines.append(f"ranks:       {world_size}, each sends {memory_size(sent.total)} a step")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        lines.append("stopping:    torchrun kills ranks 30 s after SIGTERM; --shutdown-timeout sets more")
    return "\n".join(f"  {line}" for line in lines)


def summarize(
    config: Config,
    counts: ModelCounts,
    metrics: list[dict[str, Any]],
    spent: Mapping[str, float],
    gpu: GPU | None,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        config: its section `cost` holds the rates.
        counts: of the model.
        metrics: lines of `metrics.jsonl`.
        spent: `wall_s`, seconds from the first step on over all resumed parts, with evaluation and saving;
            `device_s`, the same times the GPUs (or CPU processes) of each part.
        gpu: those of the last part. None: not known, and without `cost.*` neither are money and energy.
    """
    train = [line for line in metrics if "loss/lm" in line]
    last_evaluation = next(line for line in reversed(metrics) if "eval/loss" in line)
    flops = train[-1]["tokens"] * counts.flops_per_token_train
    tokens_per_step = train[-1]["tokens"] / train[-1]["step"]
    mean_step_s = sum(line["perf/step_s"] for line in train) / len(train)
    return {
        "params_total": counts.total,
        "params_active": counts.active_all,
        "flops_per_token": counts.flops_per_token_train,
        "final_train_loss": train[-1]["loss/lm"],
        "final_eval_loss": last_evaluation["eval/loss"],
        "final_bits_per_byte": last_evaluation["eval/bits_per_byte"],
        "final_eval_loss_by_text": losses_by_text(last_evaluation),
        "tokens": train[-1]["tokens"],
        "wall_s": spent["wall_s"],
        "tokens_per_s": tokens_per_step / mean_step_s,
        "cost": asdict(training_cost(flops, spent["device_s"], gpu, config.cost)),
    }


def overfitting(metrics: list[dict[str, Any]]) -> str | None:
    """A sentence about a validation loss that rose while the training loss fell; None if it did not.

    Args:
        metrics: lines of `metrics.jsonl`.
    """
    evaluations = [line for line in metrics if "eval/loss" in line]
    best, last = min(evaluations, key=lambda line: line["eval/loss"]), evaluations[-1]
    if last["eval/loss"] < best["eval/loss"] + _CLEAR_RISE:
        return None
    train = [line for line in metrics if "loss/lm" in line]
    at_best = min(train, key=lambda line: abs(line["step"] - best["step"]))
    if train[-1]["loss/lm"] >= at_best["loss/lm"]:
        return None
    return (
        f"the validation loss was lowest at step {best['step']} ({best['eval/loss']:.4f}) and rose to "
        f"{last['eval/loss']:.4f} while the training loss fell: the model learns its text by heart; use "
        "fewer steps, more text or a smaller model"
    )
