"""The auxiliary losses and the entropy of a router, as pure tensor functions.

Shape suffixes: T tokens, K experts per token, E experts.
"""

import torch
from torch import Tensor


def load_balancing_loss(router_probs: Tensor, expert_indices: Tensor, valid: Tensor | None = None) -> Tensor:
    """`E * sum_i f_i P_i`: exactly 1.0 at perfect balance for every K, and E when one expert gets everything.

    f_i is the share of the T * K assignments that expert i got before any dropping, P_i its mean
    probability. The gradient flows through P only. After Fedus et al. 2021 (Switch Transformers), eq. 4,
    with f averaged over the K choices. With a leading dimension of sequences it is the mean of the
    sequences' losses (DeepSeek-AI 2024, DeepSeek-V3, eq. 17 to 20), which no grouping of sequences into
    micro batches and ranks can change.

    Args:
        router_probs: (T, E) or (B, T, E) fp32, rows sum to 1.
        expert_indices: (T, K) or (B, T, K) int64.
        valid: (T,) or (B, T) bool, false for padding, which counts in neither f nor P. None: every token
            counts.

    Returns:
        () fp32, dimensionless; 0 without tokens.
    """
    if not router_probs.numel():
        return router_probs.sum()
    valid = torch.ones_like(expert_indices.select(-1, 0), dtype=torch.bool) if valid is None else valid
    weights = valid.to(router_probs.dtype).unsqueeze(-1)
    counts = torch.zeros_like(router_probs).scatter_(-1, expert_indices, weights.expand(expert_indices.shape))
    shares = counts.sum(-2) / (expert_indices.shape[-1] * weights.sum(-2))
    mean_probs = (router_probs * weights).sum(-2) / weights.sum(-2)
    return router_probs.shape[-1] * (shares * mean_probs).sum(-1).mean()


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
