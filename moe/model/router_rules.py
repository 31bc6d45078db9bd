"""More rules of routing, and which class a name stands for.

Shape suffixes: B sequences, S positions, T = B * S tokens, K experts per token, E experts, C tokens that an
expert takes of a sequence, D d_model.
"""

import os
import sys
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ConfigError, MoEConfig, first_line
from moe.dispatch.capacity import expert_capacity
from moe.dispatch.interface import RouterOutput, TokenContext
from moe.model.dropout import random_int32, uniform_numbers
from moe.model.products import new_weight
from moe.model.router import GroupLimitedRouter, Router, SigmoidRouter


class SwitchRouter(Router):
    """Top-1 of a softmax; in training each input is multiplied by noise (Fedus et al. 2021, section 2.2).

    The noise is uniform in 1 +- `moe.router_jitter`.
    """

    def __init__(self, d_model: int, moe: MoEConfig):
        super().__init__(d_model, moe)
        self.jitter = moe.router_jitter

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """See `Router.forward`."""
        if self.training and self.jitter:
            noise_TD = 2 * _uniform(hidden, hidden.shape[1], context) - 1
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = hidden * (1 + self.jitter * noise_TD)
        return super().route(hidden, context)


class NoisyTopKRouter(Router):
    """Top-k of logits with noise in training, and a softmax of the K chosen ones (Shazeer et al. 2017, 2.1).

    The noise is normal, and a second weight learns its size for each expert, `softplus(x w_noise)`.
    """

    gates_are_probs: ClassVar = False

    def __init__(self, d_model: int, moe: MoEConfig):
        super().__init__(d_model, moe)
        self.w_noise = new_weight(moe.num_experts, d_model, fan_in=d_model)

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        if self.training:
            uniform_TE = _uniform(hidden, self.num_experts, context)
            normal_TE = torch.erfinv(2 * uniform_TE - 1) * 2**0.5
            logits_TE = logits_TE + normal_TE * F.softplus(self.logits(hidden, self.w_noise))
        return self.route_by(logits_TE)

    def gates(self, scores: Tensor, experts: Tensor) -> Tensor:
        """The softmax of the chosen logits is each chosen probability's share of them."""
        gates_TK = scores.gather(1, experts)
        return gates_TK / gates_TK.sum(dim=1, keepdim=True) * self.route_scale


class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens of a sequence that suit it best (Zhou et al. 2022, section 3.2).

    C is `S * top_k / E`, rounded up, so every expert has the same load, and a token has 0 to E experts. The
    choice looks at later tokens of the sequence: a causal model that is trained so predicts worse where it
    cannot see them.
    """

    gates_are_probs: ClassVar = False

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = self.scores(logits_TE)
        length, num_experts = context.sequence_length, self.num_experts
        capacity = min(length, expert_capacity(1.0, length, self.top_k, num_experts))
        probs_BSE = probs_TE.detach().unflatten(0, (-1, max(length, 1)))
        best_BCE = probs_BSE.topk(capacity, dim=1).indices
        chosen_TE = torch.zeros_like(probs_BSE, dtype=torch.bool).scatter(1, best_BCE, True).flatten(0, 1)
        ids_E = torch.arange(num_experts, device=hidden.device)
        return RouterOutput(
            ids_E.where(chosen_TE, num_experts),
            probs_TE.where(chosen_TE, 0) * self.route_scale,
            logits_TE,
            probs_TE,
            num_assignments=best_BCE.numel(),
        )


class HashRouter(Router):
    """The experts of a token follow from its id alone, and nothing is learned (Roller et al. 2021)."""

    gates_are_probs: ClassVar = False

    def __init__(self, d_model: int, moe: MoEConfig):
        super().__init__(d_model, moe)
        del self.weight

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """See `Router.forward`."""
        if context.token_ids is None:
            raise ValueError("moe.router=hash needs token_ids, the tokens of each position")
        numbers_E = torch.arange(self.num_experts, device=hidden.device)
        draws_TE = random_int32(random_int32(context.token_ids).unsqueeze(1) + numbers_E)
        experts_TK = draws_TE.topk(self.top_k, dim=1).indices
        logits_TE = torch.zeros(draws_TE.shape, device=hidden.device)
        gates_TK = torch.full(experts_TK.shape, self.route_scale / self.top_k, device=hidden.device)
        return RouterOutput(experts_TK, gates_TK, logits_TE, logits_TE.scatter(1, experts_TK, 1 / self.top_k))


class UniformRouter(Router):
    """Perfect balance by the place in the sequence, to measure speed; gate weights as of `topk`."""

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        choices = torch.arange(len(hidden) * self.top_k, device=hidden.device)
        experts_TK = (choices % (context.sequence_length * self.top_k) % self.num_experts).view(
            -1, self.top_k
        )
        probs_TE = self.scores(logits_TE)
        return RouterOutput(experts_TK, self.gates(probs_TE, experts_TK), logits_TE, probs_TE)


ROUTERS: dict[str, type[Router]] = {
    "topk": Router,
    "sigmoid": SigmoidRouter,
    "group_limited": GroupLimitedRouter,
    "switch": SwitchRouter,
    "noisy_topk": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "uniform": UniformRouter,
}


def find_router(name: str) -> Any:
    """The class that `moe.router` stands for: one of `ROUTERS`, or MODULE:CLASS of your own.

    Raises:
        ConfigError: there is no such module or class, or it is no `torch.nn.Module`.
    """
    if ":" not in name:
        return ROUTERS[name]
    module, _, leaf = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # scripts/*.py and launchers put another folder there
    try:
        found = getattr(import_module(module), leaf)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        fix = "start in its folder, or add that to PYTHONPATH"
        raise ConfigError("moe.router", f"{name} cannot be imported ({first_line(error)}); {fix}") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError("moe.router", f"{name} is not a class of torch.nn.Module; make it one")
    return found


def make_router(d_model: int, moe: MoEConfig) -> nn.Module:
    """The router of a layer, of the class that `moe.router` names.

    Raises:
        ConfigError: there is no such class, or it has no biases although they are wanted.
    """
    router = find_router(moe.router)(d_model, moe)
    if moe.bias_update_rate and getattr(router, "expert_bias", None) is None:
        fix = "derive it from moe.Router, or set it to 0"
        raise ConfigError("moe.bias_update_rate", f"{moe.router} has no buffer expert_bias; {fix}")
    return router


def count_router(d_model: int, moe: MoEConfig) -> int:
    """The parameters of a router, which is built on the meta device."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in make_router(d_model, moe).parameters())


def _uniform(hidden: Tensor, width: int, context: TokenContext) -> Tensor:
    """(T, width) fp32 between 0 and 1; see `TokenContext.noise_keys`."""
    if context.noise_keys is None:
        return torch.rand(len(hidden), width, device=hidden.device)
    return uniform_numbers(context.noise_keys, (context.sequence_length, width)).flatten(0, 1)
