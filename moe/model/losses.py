"""The cross-entropy, the auxiliary losses and the entropy of a router, as pure tensor functions.

Shape suffixes: T tokens, K experts per token, E experts, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.model import LOGITS_AT_ONCE
from moe.model.products import linear

NOT_COUNTED = -100  # a target that is left out, as in PyTorch's cross_entropy


def cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of the logits `hidden @ head_weight.T`, of which few exist at a time.

    With more than `LOGITS_AT_ONCE` of them, chunks of tokens go forward and backward one after the other, as
    in Liger Kernel (Hsu et al. 2024), and what is kept are the gradients of `hidden` and of the weight.

    Args:
        hidden: (T, D), any float type.
        head_weight: (V, D), of the same type.
        targets: (T,) int64; -100: not counted.

    Returns:
        () fp32, nats.
    """
    if len(targets) * len(head_weight) <= LOGITS_AT_ONCE:
        return _of_logits(hidden, head_weight, targets)
    return _ChunkedCrossEntropy.apply(hidden, head_weight, targets)


def check_targets(targets: Tensor, shape: Sequence[int]) -> None:
    """Check the targets of B sequences of S tokens.

    Raises:
        ValueError: they are not int64, or not (B, S).
    """
    if targets.dtype != torch.int64:
        raise ValueError(f"targets should be of int64, got {targets.dtype}")
    if tuple(targets.shape) != tuple(shape):
        expected, got = tuple(shape), tuple(targets.shape)
        raise ValueError(f"targets should be (batch, sequence) = {expected}, got {got}")


def not_in_vocabulary(targets: Tensor, vocab_size: int) -> ValueError:
    """The error for targets that PyTorch found to be out of bounds, which it does on a CPU."""
    counted = targets[targets != NOT_COUNTED]
    got = f"{counted.min()} to {counted.max()}"
    return ValueError(f"targets should be from 0 to {vocab_size - 1}, or {NOT_COUNTED}; got {got}")


def _of_logits(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(linear(hidden, head_weight).float(), targets, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        tokens = max(1, LOGITS_AT_ONCE // len(weight_VD))
        chunks = zip(hidden_TD.split(tokens), targets_T.split(tokens), strict=True)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        if not any(ctx.needs_input_grad):
            return sum((_of_logits(chunk, weight_VD, targets) for chunk, targets in chunks), total)
        hidden_grads, weight_grad = [], torch.zeros_like(weight_VD, dtype=torch.float32)
        weight = weight_VD.detach().requires_grad_()
        for chunk, targets in chunks:
            with torch.enable_grad():
                inputs = chunk.detach().requires_grad_(), weight
                loss = _of_logits(*inputs, targets)
            hidden_grad, grad = torch.autograd.grad(loss, inputs)
            hidden_grads.append(hidden_grad)
            weight_grad += grad
            total += loss.detach()
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None


def load_balancing_loss(router_probs: Tensor, expert_indices: Tensor, valid: Tensor | None = None) -> Tensor:
    """`E * sum_i f_i P_i`: exactly 1.0 at perfect balance for every K, and E when one expert gets everything.

    f_i is the share of the T * K assignments that expert i got before any dropping, P_i its mean
    probability. The gradient flows through P only. After Fedus et al. 2021 (Switch Transformers), eq. 4,
    with f averaged over the K choices. With a leading dimension of sequences it is the mean of the
    sequences' losses (DeepSeek-AI 2024, DeepSeek-V3, eq. 17 to 20), which no grouping of sequences into
    micro batches and ranks can change.

    Args:
        router_probs: (T, E) or (B, T, E) fp32, rows sum to 1.
        expert_indices: (T, K) or (B, T, K) int64; E: a choice that goes nowhere.
        valid: (T,) or (B, T) bool, false for padding, which counts in neither f nor P. None: every token
            counts.

    Returns:
        () fp32, dimensionless; 0 without tokens.
    """
    if not router_probs.numel():
        return router_probs.sum()
    valid = torch.ones_like(expert_indices.select(-1, 0), dtype=torch.bool) if valid is None else valid
    weights = valid.to(router_probs.dtype).unsqueeze(-1)
    num_experts = router_probs.shape[-1]
    counts = router_probs.new_zeros(*router_probs.shape[:-1], num_experts + 1)
    counts = counts.scatter_(-1, expert_indices, weights.expand(expert_indices.shape)).sum(-2)
    counts = counts.narrow(-1, 0, num_experts)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    mean_probs = (router_probs * weights).sum(-2) / weights.sum(-2)
    return num_experts * (shares * mean_probs).sum(-1).mean()


def load_balancing_loss_of_counts(mean_probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """`E * sum_i f_i P_i` of each layer, where f_i may come from more tokens than P_i.

    With f over the global batch and P over a micro batch, the mean over the micro batches is the loss of the
    global batch (Qiu et al. 2025, Demons in the Detail, section 3).

    Args:
        mean_probs: (L, E) fp32, rows sum to 1.
        tokens_per_expert: (L, E) int64.

    Returns:
        (L,) fp32.
    """
    counts = tokens_per_expert.to(mean_probs.dtype)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return mean_probs.shape[-1] * (shares * mean_probs).sum(-1)


def router_z_loss(router_logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over tokens of `logsumexp(router_logits) ** 2`, which keeps the logits small.

    After Zoph et al. 2022 (ST-MoE), eq. 5.

    Args:
        router_logits: (T, E) fp32.
        valid: (T,) bool, false for padding. None: every token counts.

    Returns:
        () fp32, dimensionless; 0 without tokens.
    """
    squares_T = router_logits.logsumexp(1).square()
    return _mean(squares_T) if valid is None else _masked_mean(squares_T, valid)


def router_entropy(router_probs: Tensor) -> Tensor:
    """Mean entropy of the routing distribution, in nats: log E when undecided, 0 when certain.

    Args:
        router_probs: (T, E) fp32, rows sum to 1.

    Returns:
        () fp32; 0 without tokens.
    """
    return _mean(torch.special.entr(router_probs).sum(1))


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    weights = valid.to(values.dtype)
    return torch.tensordot(weights, values, dims=1) / weights.sum()
