"""Figures of a router's logits and probabilities, besides its losses.

Shape suffixes: T tokens, E experts.
"""

import torch
from torch import Tensor

HEALTH = ("top1_margin", "logit_square", "logit_max")  # in the order of `router_health`


@torch.no_grad()
def router_health(router_logits: Tensor, router_probs: Tensor) -> Tensor:
    """How decided a router is, and how large its logits are.

    Args:
        router_logits: (T, E) fp32.
        router_probs: (T, E) fp32, rows sum to 1.

    Returns:
        (3,) fp32: the mean over tokens of the difference between the two largest probabilities (1 with a
        single expert), the mean square of the logits, and the largest absolute logit. 0 without tokens.
    """
    if not router_logits.numel():
        return router_logits.new_zeros(len(HEALTH))
    best_T2 = router_probs.topk(min(2, router_probs.shape[1]), dim=1).values
    best_T, second_T = best_T2.select(1, 0), best_T2.select(1, best_T2.shape[1] - 1)
    margin = (best_T - second_T).mean() if best_T2.shape[1] == 2 else torch.ones_like(best_T[0])
    return torch.stack([margin, router_logits.square().mean(), router_logits.abs().amax()])
