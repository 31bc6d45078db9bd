"""Which updates are skipped, decided on the device without waiting for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import RunError

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


@dataclass
class SkipCount:
    """The steps of a run that had no update."""

    limit: int  # `optim.max_skips`
    total: int = 0
    in_a_row: int = 0  # those whose gradient was refused, up to now

    def add(self, step: int, norm: float) -> str:
        """Count one more skipped update, whose gradient had this norm, and return the warning.

        Raises:
            RunError: they are too many in a row.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise RunError(
                f"step {step}: {self.in_a_row} updates in a row were skipped; start a new run with a lower "
                "optim.lr, or go on from the last checkpoint with these steps in train.skip_steps"
            )
        return f"step {step}: update skipped, as its gradient norm is {norm:.4g}"
