"""The decoder: embedding, blocks of attention and feed-forward, head.

Shape suffixes: B sequences, S positions, D d_model, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import Config, check_type
from moe.dispatch.interface import Dispatcher
from moe.dispatch.local import LocalDispatcher
from moe.model.attention import NORM_EPS, Attention, document_mask, rotary_tables
from moe.model.dropout import dropout, keys_of_places
from moe.model.experts import SwiGLU
from moe.model.grouped_swiglu import ExpertPath
from moe.model.initialization import init_weights
from moe.model.key_value_cache import KeyValueCache, LayerCache
from moe.model.losses import check_targets, cross_entropy, not_in_vocabulary
from moe.model.moe_layer import MoEAux, MoELayer
from moe.model.products import Linear, linear


class TransformerOutput(NamedTuple):
    """What the model makes of a batch.

    Attributes:
        logits: (B, S, V) in the model's dtype; None if targets were given.
        aux: the MoE layers' reports, stacked; None in a dense model, and with a cache.
        nats: () fp32, the sum of the targets' cross-entropies; None without targets.
    """

    logits: Tensor | None
    aux: MoEAux | None
    nats: Tensor | None = None


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward part that is a `MoELayer` or a dense `SwiGLU`.

    What each adds to its input passes a dropout (Vaswani et al. 2017, section 5.4).
    """

    def __init__(self, config: Config, layer: int, dispatcher: Dispatcher, expert_path: ExpertPath | None):
        super().__init__()
        model, moe = config.model, config.moe
        self.dropout = model.dropout
        self.attention_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        self.attention = Attention(model)
        self.ffn_norm = nn.RMSNorm(model.d_model, NORM_EPS)
        if layer not in config.moe_layers:
            self.ffn = SwiGLU(model.d_model, model.d_ff)
        elif moe.is_dense:  # one expert that every token goes to is a dense block, and needs no router
            self.ffn = SwiGLU(model.d_model, (1 + moe.num_shared_experts) * moe.d_ff_expert)
        else:
            self.ffn = MoELayer(model.d_model, moe, dispatcher, expert_path)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        keys: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, MoEAux | None]:
        """Map (B, S, D) to (B, S, D) and the MoE layer's report, None of a dense block or with a cache.

        The keys (3, B) are those of the dropout's two places and of the router's noise; None: no dropout, and
        noise from PyTorch's random numbers.
        """
        attended = self.attention(self.attention_norm(hidden), rotary, mask, cache)
        if self.dropout and keys is not None:
            attended = dropout(attended, self.dropout, keys[0])
        hidden = hidden + attended
        normed = self.ffn_norm(hidden)
        if isinstance(self.ffn, MoELayer):
            output, aux = self.ffn(normed, cache is None, token_ids, None if keys is None else keys[2])
        else:
            output, aux = self.ffn(normed), None
        if self.dropout and keys is not None:
            output = dropout(output, self.dropout, keys[1])
        return hidden + output, aux


class Transformer(nn.Module):
    """A causal language model whose layers `config.moe_layers` are sparse.

    Its weights are initialized from `config.run.seed`, except on the meta device.

    Args:
        config: complete, with `model.vocab_size` set.
        dispatcher: how tokens reach their experts. None: all experts are in this process.
        expert_path: how the experts multiply; see `GroupedExperts`.

    Raises:
        ConfigError: `config` is of another type, or its `model.vocab_size` is null.
    """

    def __init__(
        self, config: Config, dispatcher: Dispatcher | None = None, expert_path: ExpertPath | None = None
    ):
        super().__init__()
        check_type("config", config, Config)
        model, dispatcher = config.model, dispatcher or LocalDispatcher()
        self.dispatcher = dispatcher
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
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        dropout_keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> TransformerOutput:
        """Predict the token after each position.

        Args:
            tokens: (B, S) int64, S at most `model.max_seq_len`.
            documents: (B, S) int64, the number of each token's document, which attention does not look
                beyond; None: each sequence is one document.
            cache: of the tokens before these, to which these are added; without gradients, documents and
                the reports of the MoE layers.
            dropout_keys: (B,) int32 of `dropout.dropout_keys`, of which the masks of `model.dropout` and the
                noise of a router are functions in training. None: new ones in each call, from PyTorch's
                random numbers.
            targets: (B, S) int64, the tokens that follow; -100: not counted. Then the output is their
                cross-entropy instead of the logits, of which only some exist at a time.

        Raises:
            ValueError: tokens or targets have another shape or type, or are too many; on a CPU, also one that
                is not in the vocabulary. The cache is of another number of sequences, or used with gradients.
        """
        if targets is not None:
            check_targets(targets, tokens.shape)
        hidden_BSD = self._embed(tokens, cache)
        block_keys: list[Tensor | None] = [None] * len(self.blocks)
        if self.training and (self.model_config.dropout or dropout_keys is not None):
            keys_PB = self._keys_of_places(dropout_keys, tokens)
            if self.model_config.dropout:
                hidden_BSD = dropout(hidden_BSD, self.model_config.dropout, keys_PB[0])
            of_dropout, of_routers = keys_PB[1:].split([2 * len(self.blocks), len(self.blocks)])
            block_keys = list(torch.cat([of_dropout.unflatten(0, (-1, 2)), of_routers[:, None]], 1))
        if cache is None:
            layer_caches = [None] * len(self.blocks)
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            mask = None if documents is None else document_mask(documents, hidden_BSD.dtype)
        else:
            layer_caches, positions, mask = cache.extend(tokens.shape[1])
        rotary = rotary_tables(positions, self.model_config.head_dim, self.model_config.rope_theta)
        reports = []
        recomputes = self.activation_checkpointing and self.training
        for block, layer_cache, keys in zip(self.blocks, layer_caches, block_keys, strict=True):
            if recomputes:
                hidden_BSD, aux = self._recomputed(block, hidden_BSD, rotary, mask, None, keys, tokens)
            else:
                hidden_BSD, aux = block(hidden_BSD, rotary, mask, layer_cache, keys, tokens)
            if aux is not None:
                reports.append(aux)
        head = self.embedding.weight if self.head is None else self.head.weight
        stacked = MoEAux(*(torch.stack(field) for field in zip(*reports, strict=True))) if reports else None
        normed_BSD = self.final_norm(hidden_BSD)
        if targets is None:
            return TransformerOutput(linear(normed_BSD, head), stacked)
        return TransformerOutput(None, stacked, self._nats(normed_BSD, head, targets))

    def _embed(self, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
        """The embeddings (B, S, D) of tokens that are checked, as the cache is; see `forward`."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            got = f"{tuple(tokens.shape)} of {tokens.dtype}"
            raise ValueError(f"tokens should be (batch, sequence) of int64, got {got}")
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens are more than max_seq_len ({self.max_seq_len})")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache is for generating: use it under torch.no_grad()")
        if cache is not None and len(cache.lengths) != len(tokens):
            raise ValueError(f"the cache is of {len(cache.lengths)} sequences, and tokens of {len(tokens)}")
        try:
            return self.embedding(tokens)
        except IndexError:
            expected, got = f"0 to {len(self.embedding.weight) - 1}", f"{tokens.min()} to {tokens.max()}"
            raise ValueError(f"tokens should be from {expected} (model.vocab_size), got {got}") from None

    def _nats(self, normed_BSD: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """The sum of the targets' cross-entropies."""
        try:
            return cross_entropy(normed_BSD.flatten(0, 1), head, targets.flatten())
        except IndexError:
            raise not_in_vocabulary(targets, len(head)) from None

    def _recomputed(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, MoEAux | None]:
        """Run a block that keeps its inputs only, and runs again in the backward pass."""
        again = self.dispatcher.recomputation
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=again)

    def _keys_of_places(self, keys: Tensor | None, tokens: Tensor) -> Tensor:
        """Keys (P, B): of the embedding's dropout, of two more in each block, and of each router's noise."""
        if keys is None:
            keys = torch.randint(2**31, tokens.shape[:1], dtype=torch.int32).to(tokens.device)
        return keys_of_places(keys, 1 + 3 * len(self.blocks))

    def new_cache(self, sequences: int) -> KeyValueCache:
        """Room for `max_seq_len` tokens of each of B sequences, for `forward`."""
        return KeyValueCache.empty(self.model_config, sequences, like=self.embedding.weight)
