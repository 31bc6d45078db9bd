"""Grouped-query attention with rotary positions.

Shape suffixes: B sequences, S positions, H query heads, G key and value heads, Q head width, D d_model.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.key_value_cache import LayerCache
from moe.model.products import Linear

NORM_EPS = 1e-5


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles `position * theta ** (-2 i / Q)` (Su et al. 2021, eq. 15).

    Computed per forward pass rather than kept in a buffer: a bf16 engine would round a buffer, and in bf16
    neighbouring positions past 256 are the same number.

    Args:
        positions: (S,) or (B, S) int64.
        head_dim: Q.
        theta: the base of the angles.

    Returns:
        Two tensors (S, Q / 2) or (B, 1, S, Q / 2), fp32.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * theta**-exponents
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)  # the same for all heads
    return angles.cos(), angles.sin()


def apply_rotary(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate dimension i against i + Q / 2 by the position's angle, in fp32.

    Args:
        heads: (B, H, S, Q), any float type.
        rotary: what `rotary_tables` returned for these S positions.

    Returns:
        (B, H, S, Q), same dtype.
    """
    cos, sin = rotary  # in fp32, and so are the products with them
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores so that it looks at earlier positions of the same document only.

    Positions need not start again with a document, as rotary angles count by their differences only.

    Args:
        documents: (B, S) int64, the number of each position's document.
        dtype: of queries and keys.

    Returns:
        (B, 1, S, S) of that dtype, 0 or minus infinity; made once for all layers.
    """
    same_BSS = documents[:, :, None] == documents[:, None, :]
    return torch.zeros_like(same_BSS, dtype=dtype).masked_fill(~same_BSS.tril(), float("-inf"))[:, None]


class Attention(nn.Module):
    """Causal self-attention; G key and value heads serve H query heads (Ainslie et al. 2023).

    Args:
        model: the section `model` of the configuration. With `qk_norm`, queries and keys pass an RMSNorm
            before rotation, per head or, with `qk_norm_scope: all_heads`, over all heads together.
    """

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.head_dim = model.head_dim
        self.query = Linear(model.d_model, model.n_heads * model.head_dim)
        self.key = Linear(model.d_model, model.n_kv_heads * model.head_dim)
        self.value = Linear(model.d_model, model.n_kv_heads * model.head_dim)
        self.output = Linear(model.n_heads * model.head_dim, model.d_model)
        together = (1, 1) if model.qk_norm_scope == "head" else (model.n_heads, model.n_kv_heads)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(heads * model.head_dim, NORM_EPS) if model.qk_norm else None for heads in together
        )

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            hidden: (B, S, D).
            rotary: what `rotary_tables` returned for S positions.
            mask: of `document_mask` or `KeyValueCache`; None: each position sees itself and all earlier ones.
            cache: of earlier positions, to which these are added.

        Returns:
            (B, S, D), same dtype.
        """
        query = _normalize(self.query(hidden), self.query_norm)
        key, value = _normalize(self.key(hidden), self.key_norm), self.value(hidden)
        query_BHSQ, key_BGSQ, value_BGSQ = (
            rearrange(rows, "b s (h q) -> b h s q", q=self.head_dim) for rows in (query, key, value)
        )
        query_BHSQ, key_BGSQ = apply_rotary(query_BHSQ, rotary), apply_rotary(key_BGSQ, rotary)
        if cache is not None:
            key_BGSQ, value_BGSQ = cache.append(key_BGSQ, value_BGSQ)
        attended_BHSQ = query_BHSQ  # of no sequence, as on a rank that has none left to evaluate
        if len(hidden):
            attended_BHSQ = F.scaled_dot_product_attention(
                query_BHSQ, key_BGSQ, value_BGSQ, mask, is_causal=mask is None, enable_gqa=True
            )
        return self.output(rearrange(attended_BHSQ, "b h s q -> b s (h q)"))


def _normalize(projected: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Norm as many features at a time as the norm has weights; None: leave them as they are."""
    if norm is None:
        return projected
    return norm(projected.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)
