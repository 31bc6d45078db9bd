"""Which updates are skipped, decided on the device without waiting for it."""

import torch
from torch import Tensor

_WINDOW, _FEWEST = 128, 16  # norms of which the median is taken: at most, and at least


class UpdateGuard:
    """Skips updates whose gradient is not finite, or whose norm is far above the median of the last ones.

    Args:
        norm_limit: `optim.skip_norm_above`, in medians; None: only what is not finite is skipped.
        device: where the norms are.
    """

    def __init__(self, norm_limit: float | None, device: torch.device):
        self._norm_limit = norm_limit
        self._recent = torch.full((_WINDOW,), torch.nan, device=device)  # norms of updates, newest last

    def skips(self, norm: Tensor) -> Tensor:
        """Whether to skip the update with this norm: 1 or 0, () fp32. If not, the norm joins the window."""
        norm = norm.to(self._recent.dtype)
        bad = norm.isfinite().logical_not()
        if self._norm_limit is not None:
            known = self._recent.isfinite().sum() >= _FEWEST
            bad = bad | (known & (norm > self._norm_limit * self._recent.nanmedian()))
            shifted = torch.cat([self._recent[1:], norm.unsqueeze(0)])
            self._recent = torch.where(bad, self._recent, shifted)
        return bad.float()

    @property
    def recent_norms(self) -> list[float]:
        """The norms in the window, oldest first. Waits for the device."""
        return [norm for norm in self._recent.tolist() if norm == norm]

    def load(self, recent_norms: list[float]) -> None:
        """Continue with the window of a checkpoint."""
        norms = self._recent.new_tensor(recent_norms[-_WINDOW:])
        self._recent = torch.cat([self._recent.new_full((_WINDOW - len(norms),), torch.nan), norms])
