"""The decoder: embedding, blocks of attention and feed-forward, head; and the one initialiser.

Shape suffixes: B sequences, S positions, D d_model, V vocabulary.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config.schema import Config, moe_layers
from moe.dispatch.all_to_all import Dispatcher
from moe.model.attention import NORM_EPS, Attention, rotary_tables
from moe.model.experts import GroupedExperts, SwiGLU
from moe.model.grouped_mm import ExpertPath
from moe.model.moe_layer import MoEAux, MoELayer

EMBEDDING_STD = 0.02
ROUTER_STD = 0.02


class TransformerOutput(NamedTuple):
    """Logits (B, S, V) in the model's dtype, and the MoE layers' reports stacked; None in a dense model."""

    logits: Tensor
    aux: MoEAux | None


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward part that is a `MoELayer` or a dense `SwiGLU`."""

    def __init__(self, config: Config, layer: int, dispatcher: Dispatcher, expert_path: ExpertPath):
        super().__init__()
        model, moe = config.model, config.moe
        self.attention_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        self.attention = Attention(model)
        self.ffn_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        if layer not in moe_layers(model, moe):
            self.ffn = SwiGLU(model.d_model, model.d_ff)
        elif moe.is_dense:  # one expert that every token goes to is a dense block, and needs no router
            self.ffn = SwiGLU(model.d_model, (1 + moe.num_shared_experts) * moe.d_ff_expert)
        else:
            self.ffn = MoELayer(model.d_model, moe, dispatcher, expert_path)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, MoEAux | None]:
        """Map (B, S, D) to (B, S, D) and the MoE layer's report, or None."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary)
        normed = self.ffn_norm(hidden)
        output, aux = self.ffn(normed) if isinstance(self.ffn, MoELayer) else (self.ffn(normed), None)
        return hidden + output, aux


class Transformer(nn.Module):
    """A causal language model; sparse at `moe_layers(config.model, config.moe)`.

    Weights are uninitialised until `init_weights` or a checkpoint fills them.

    Args:
        config: complete, with `model.vocab_size` resolved.
        dispatcher: how tokens reach their experts.
        expert_path: how the experts multiply; see `choose_expert_path`.
    """

    def __init__(self, config: Config, dispatcher: Dispatcher, expert_path: ExpertPath):
        super().__init__()
        model = config.model
        assert model.vocab_size is not None, "model.vocab_size must be resolved from the tokenizer"
        self.head_dim, self.rope_theta = model.head_dim, model.rope_theta
        self.max_seq_len = model.max_seq_len
        self.activation_checkpointing = config.train.activation_checkpointing
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(
            Block(config, layer, dispatcher, expert_path) for layer in range(model.n_layers)
        )
        self.final_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        self.head = None if model.tie_embeddings else nn.Linear(model.d_model, model.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> TransformerOutput:
        """Predict the token after each position.

        Args:
            tokens: (B, S) int64, S at most `model.max_seq_len`.
        """
        assert tokens.shape[1] <= self.max_seq_len, (tokens.shape, self.max_seq_len)
        hidden_BSD = self.embedding(tokens)
        rotary = rotary_tables(tokens.shape[1], self.head_dim, self.rope_theta, tokens.device)
        reports = []
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                hidden_BSD, aux = checkpoint(block, hidden_BSD, rotary, use_reentrant=False)
            else:
                hidden_BSD, aux = block(hidden_BSD, rotary)
            if aux is not None:
                reports.append(aux)
        head = self.embedding.weight if self.head is None else self.head.weight
        logits_BSV = F.linear(self.final_norm(hidden_BSD), head)
        stacked = MoEAux(*(torch.stack(field) for field in zip(*reports, strict=True))) if reports else None
        return TransformerOutput(logits_BSV, stacked)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter; each is a function of `(seed, name)`, an expert's of `(seed, name, expert id)`.

    So two models that share a name share its weights, whatever else differs: the number of experts, the
    topology, the order of construction. Normal, cut at three standard deviations: 1 / sqrt(fan in) for
    matrices, divided by sqrt(2 * n_layers) where they write to the residual stream (Radford et al. 2019);
    0.02 for embeddings and routers; norms start at 1.

    Args:
        model: a `Transformer` or any part of one.
        seed: `run.seed`.
    """
    n_layers = sum(isinstance(module, Attention) for module in model.modules())
    residual_scale = 1 / math.sqrt(2 * max(n_layers, 1))
    experts_of = {
        id(weight): module.expert_ids
        for module in model.modules()
        if isinstance(module, GroupedExperts)
        for weight in module.parameters()
    }
    for name, weight in model.named_parameters():
        kind = name.rpartition(".")[2]
        if "norm" in name:
            weight.fill_(1.0)
            continue
        if "embedding" in name:
            std = EMBEDDING_STD
        elif "router" in name:
            std = ROUTER_STD
        else:  # w_* are (..., in, out), nn.Linear weights (out, in)
            std = 1 / math.sqrt(weight.shape[-2] if kind.startswith("w_") else weight.shape[-1])
        if kind == "w_down" or name.endswith("attention.output.weight"):
            std *= residual_scale
        experts = experts_of.get(id(weight))
        parts = [(0, weight)] if experts is None else zip(experts, weight.unbind(0), strict=True)
        for expert, part in parts:
            values = torch.empty(part.shape, dtype=torch.float32)
            generator = torch.Generator().manual_seed(_derive_seed(seed, name, expert))
            nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
            part.copy_(values)


def _derive_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
