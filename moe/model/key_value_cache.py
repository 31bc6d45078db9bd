"""Keys and values of the tokens that a model has seen, so that generating a token computes that token alone.

Shape suffixes: B sequences, S new tokens, L tokens that fit, C tokens kept so far in the longest sequence,
G key and value heads, Q head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's part of a `KeyValueCache`, and the positions of the new tokens.

    Attributes:
        keys, values: (B, G, L, Q).
        positions: (B, S) int64, of the new tokens in their sequences.
        length: C, with the new tokens.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: int

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values (B, G, S, Q); return all that is kept, (B, G, C, Q)."""
        sequences_B1 = torch.arange(len(key), device=key.device)[:, None]
        for kept, new in ((self.keys, key), (self.values, value)):
            # What is new may have the dtype of torch.autocast.
            kept[sequences_B1, :, self.positions] = new.transpose(1, 2).to(kept.dtype)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KeyValueCache(NamedTuple):
    """Keys and values of all layers, for sequences of different lengths.

    Attributes:
        keys, values: (layers, B, G, L, Q).
        lengths: (B,) int64 on the CPU, the tokens kept of each sequence.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, model: ModelConfig, sequences: int, like: Tensor) -> "KeyValueCache":
        """Room for `max_seq_len` tokens of each sequence, on the device and in the dtype of `like`."""
        shape = (model.n_layers, sequences, model.n_kv_heads, model.max_seq_len, model.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), torch.zeros(sequences, dtype=torch.int64))

    def of(self, sequences: slice | list[int]) -> "KeyValueCache":
        """The cache of some sequences; a slice shares the memory, a list copies it."""
        return KeyValueCache(self.keys[:, sequences], self.values[:, sequences], self.lengths[sequences])

    def extend(self, tokens: int) -> tuple[list[LayerCache], Tensor, Tensor]:
        """Reserve the places of S more tokens of each sequence.

        Returns:
            The caches of the layers; the positions of the new tokens, (B, S) int64; and the mask (B, 1, S, C)
            of bool: whether a new token sees a kept one.

        Raises:
            ValueError: they do not fit.
        """
        device = self.keys.device
        positions_BS = self.lengths.to(device)[:, None] + torch.arange(tokens, device=device)
        length, room = int(self.lengths.max()) + tokens, self.keys.shape[3]
        if length > room:
            raise ValueError(f"the cache has room for {room} tokens (max_seq_len), not for {length}")
        self.lengths.add_(tokens)
        seen_B1SC = torch.arange(length, device=device) <= positions_BS[:, None, :, None]
        layers = [
            LayerCache(*kept, positions_BS, length) for kept in zip(self.keys, self.values, strict=True)
        ]
        return layers, positions_BS, seen_B1SC
