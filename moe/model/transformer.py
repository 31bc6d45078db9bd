"""The decoder: embedding, blocks of attention and feed-forward, head.

Shape suffixes: B sequences, S positions, D d_model, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import Config
from moe.dispatch.interface import Dispatcher
from moe.dispatch.local import LocalDispatcher
from moe.model.attention import NORM_EPS, Attention, document_mask, rotary_tables
from moe.model.experts import SwiGLU
from moe.model.grouped_swiglu import ExpertPath
from moe.model.initialization import init_weights
from moe.model.key_value_cache import KeyValueCache, LayerCache
from moe.model.moe_layer import MoEAux, MoELayer
from moe.model.products import Linear, linear


class TransformerOutput(NamedTuple):
    """Logits (B, S, V) in the model's dtype, and the MoE layers' reports stacked; None in a dense model."""

    logits: Tensor
    aux: MoEAux | None


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward part that is a `MoELayer` or a dense `SwiGLU`."""

    def __init__(self, config: Config, layer: int, dispatcher: Dispatcher, expert_path: ExpertPath | None):
        super().__init__()
        model, moe = config.model, config.moe
        self.attention_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        self.attention = Attention(model)
        self.ffn_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        if layer not in config.moe_layers:
            self.ffn = SwiGLU(model.d_model, model.d_ff)
        elif moe.is_dense:  # one expert that every token goes to is a dense block, and needs no router
            self.ffn = SwiGLU(model.d_model, (1 + moe.num_shared_experts) * moe.d_ff_expert)
        else:
            self.ffn = MoELayer(model.d_model, moe, dispatcher, expert_path, seed=None)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, MoEAux | None]:
        """Map (B, S, D) to (B, S, D) and the MoE layer's report, or None."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask, cache)
        normed = self.ffn_norm(hidden)
        output, aux = self.ffn(normed) if isinstance(self.ffn, MoELayer) else (self.ffn(normed), None)
        return hidden + output, aux


class Transformer(nn.Module):
    """A causal language model whose layers `config.moe_layers` are sparse.

    Its weights are initialized from `config.run.seed`, except on the meta device.

    Args:
        config: complete, with `model.vocab_size` set.
        dispatcher: how tokens reach their experts. None: all experts are in this process.
        expert_path: how the experts multiply; see `GroupedExperts`.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """

    def __init__(
        self, config: Config, dispatcher: Dispatcher | None = None, expert_path: ExpertPath | None = None
    ):
        super().__init__()
        model, dispatcher = config.model, dispatcher or LocalDispatcher()
        self.model_config, self.max_seq_len = model, model.max_seq_len
        self.activation_checkpointing = config.train.activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(
            Block(config, layer, dispatcher, expert_path) for layer in range(model.n_layers)
        )
        self.final_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        self.head = None if model.tie_embeddings else Linear(model.d_model, config.vocab_size)
        init_weights(self, config.run.seed)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> TransformerOutput:
        """Predict the token after each position.

        Args:
            tokens: (B, S) int64, S at most `model.max_seq_len`.
            documents: (B, S) int64, the number of each token's document, which attention does not look
                beyond; None: each sequence is one document.
            cache: of the tokens before these, to which these are added; without gradients and documents.

        Raises:
            ValueError: the tokens have another shape or type, or are too many.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            got = f"{tuple(tokens.shape)} of {tokens.dtype}"
            raise ValueError(f"tokens should be (batch, sequence) of int64, got {got}")
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens are more than max_seq_len ({self.max_seq_len})")
        hidden_BSD = self.embedding(tokens)
        if cache is None:
            layer_caches = [None] * len(self.blocks)
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            mask = None if documents is None else document_mask(documents, hidden_BSD.dtype)
        else:
            layer_caches, positions, mask = cache.extend(tokens.shape[1])
        rotary = rotary_tables(positions, self.model_config.head_dim, self.model_config.rope_theta)
        reports = []
        for block, layer_cache in zip(self.blocks, layer_caches, strict=True):
            if self.activation_checkpointing and self.training:
                hidden_BSD, aux = checkpoint(block, hidden_BSD, rotary, mask, use_reentrant=False)
            else:
                hidden_BSD, aux = block(hidden_BSD, rotary, mask, layer_cache)
            if aux is not None:
                reports.append(aux)
        head = self.embedding.weight if self.head is None else self.head.weight
        logits_BSV = linear(self.final_norm(hidden_BSD), head)
        stacked = MoEAux(*(torch.stack(field) for field in zip(*reports, strict=True))) if reports else None
        return TransformerOutput(logits_BSV, stacked)

    def new_cache(self, sequences: int) -> KeyValueCache:
        """Room for `max_seq_len` tokens of each of B sequences, for `forward`."""
        return KeyValueCache.empty(self.model_config, sequences, like=self.embedding.weight)
