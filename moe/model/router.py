"""The top-k gating router: which experts a token goes to, and with what weight.

Shape suffixes: T tokens, K experts per token, E experts, G groups of experts, D d_model.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.dispatch.interface import RouterOutput, TokenContext
from moe.model.products import is_autocast, linear, new_weight


class Router(nn.Module):
    """Softmax top-k gating over fp32 logits, and the base of the other rules.

    Arithmetic is fp32 whatever the dtype of the input, of the rest of the model and of `torch.autocast`, and
    so is the weight in a `MoELayer`, since what is rounded to bf16 changes which expert wins (Fedus et al.
    2021, section 2.4). The gate weights are the scores of the chosen experts (Shazeer et al. 2017), with
    `moe.normalize_gate_weights` divided by their sum, times `moe.route_scale`. With `moe.bias_update_rate`
    the buffer `expert_bias` (E,) is added to the scores for the choice, not for the gate weights (Wang et al.
    2024, auxiliary-loss-free balancing). The weights start as those of `nn.Linear`.

    A rule overrides `scores`, `choose` or `route`.

    Args:
        d_model: D.
        moe: the section `moe` of the configuration.

    Raises:
        ValueError: a size is below 1, or `top_k` does not go with the other settings.
    """

    gates_are_probs: ClassVar = True  # and may be normalized

    def __init__(self, d_model: int, moe: MoEConfig):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model should be at least 1, got {d_model}")
        if moe.top_k > moe.num_experts:
            raise ValueError(f"top_k ({moe.top_k}) is more than num_experts ({moe.num_experts})")
        self.top_k, self.num_experts, self.route_scale = moe.top_k, moe.num_experts, moe.route_scale
        self.normalize_gate_weights = moe.normalize_gate_weights and self.gates_are_probs
        if moe.top_k == 1 and self.normalize_gate_weights:
            fix = "set normalize_gate_weights to False"
            raise ValueError(f"with top_k 1 every normalized gate weight is the constant 1; {fix}")
        self.weight = new_weight(moe.num_experts, d_model, fan_in=d_model)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.bias_update_rate else None)

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        num_experts, d_model = self.weight.shape
        sizes = f"{d_model=}, {num_experts=}, top_k={self.top_k}"
        return f"{sizes}, normalize_gate_weights={self.normalize_gate_weights}"

    def forward(self, hidden: Tensor, context: TokenContext | None = None) -> RouterOutput:
        """Route tokens.

        Args:
            hidden: (T, D), any float type.
            context: what else is known of these tokens; None: they are one sequence.
        """
        context = context or TokenContext(sequence_length=len(hidden))
        if not is_autocast(hidden.device):
            return self.route(hidden, context)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.route(hidden, context)

    def route(self, hidden: Tensor, context: TokenContext) -> RouterOutput:
        """`forward` outside of `torch.autocast`."""
        del context
        return self.route_by(self.logits(hidden))

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """(T, E) fp32, of (T, D); by another weight (E, D) than that of the router if one is given."""
        weight = self.weight if weight is None else weight
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # fp64 stays, for gradient checks
        return linear(hidden.to(dtype), weight.to(dtype))

    def route_by(self, logits: Tensor) -> RouterOutput:
        """Choose experts by the scores of these logits (T, E)."""
        scores_TE = self.scores(logits)
        wanted_TE = scores_TE.detach()
        if self.expert_bias is not None:
            wanted_TE = wanted_TE + self.expert_bias
        experts_TK = self.choose(wanted_TE)
        return RouterOutput(experts_TK, self.gates(scores_TE, experts_TK), logits, self.probs(scores_TE))

    def scores(self, logits: Tensor) -> Tensor:
        """How well each expert suits a token, (T, E), above 0."""
        return logits.softmax(dim=1)

    def probs(self, scores: Tensor) -> Tensor:
        """The scores as probabilities (T, E), for the load-balancing loss."""
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """The experts (T, K) int64 of each token, best first, by their scores and biases (T, E)."""
        return scores.topk(self.top_k, dim=1).indices

    def gates(self, scores: Tensor, experts: Tensor) -> Tensor:
        """The gate weights (T, K) of the chosen experts (T, K), from the scores (T, E)."""
        gates_TK = scores.gather(1, experts)
        if self.normalize_gate_weights:
            gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)
        return gates_TK if self.route_scale == 1 else gates_TK * self.route_scale


class SigmoidRouter(Router):
    """Each expert's score is a sigmoid of its own logit (DeepSeek-AI 2024, DeepSeek-V3, eq. 12 to 16)."""

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoids, kept above 0 so that they can be divided by their sum."""
        return logits.sigmoid().clamp(min=1e-20)

    def probs(self, scores: Tensor) -> Tensor:
        """Each score's share of a token's scores (eq. 19)."""
        return scores / scores.sum(dim=1, keepdim=True)


class GroupLimitedRouter(SigmoidRouter):
    """Top-k within the best `moe.top_groups` of `moe.num_groups` groups of consecutive experts.

    With expert parallelism a token then goes to few ranks. A group is as good as the sum of its two best
    scores (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2, and its published code), biases included.
    """

    def __init__(self, d_model: int, moe: MoEConfig):
        super().__init__(d_model, moe)
        if moe.num_groups is None or moe.top_groups is None:
            raise ValueError("group_limited needs num_groups and top_groups")
        self.num_groups, self.top_groups = moe.num_groups, moe.top_groups

    def choose(self, scores: Tensor) -> Tensor:
        """Top-k with all other groups masked out."""
        scores_TGe = scores.unflatten(1, (self.num_groups, -1))
        of_groups_TG = scores_TGe.topk(min(2, scores_TGe.shape[2]), dim=2).values.sum(2)
        best_TG = of_groups_TG.topk(self.top_groups, dim=1).indices
        outside_TG = torch.ones_like(of_groups_TG, dtype=torch.bool).scatter(1, best_TG, False)
        return super().choose(scores_TGe.masked_fill(outside_TG.unsqueeze(2), float("-inf")).flatten(1))
