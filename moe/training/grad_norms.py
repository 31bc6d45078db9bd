"""The norm of an update's gradient, and its parts."""

from typing import NamedTuple

FAMILIES = ("dense", "router", "experts")  # of parameters, in the order of the fields below


class GradNorms(NamedTuple):
    """L2 norms of the gradient of one update, before clipping; a parameter counts once, wherever it lives.

    `total^2 = dense^2 + router^2 + experts^2`. A part is None if the model has no such parameters.
    """

    total: float
    dense: float | None
    router: float | None
    experts: float | None
    skipped: bool  # whether the update was skipped, see `UpdateGuard`

    def families(self) -> dict[str, float | None]:
        """The norms by family of parameters."""
        return {name: getattr(self, name) for name in FAMILIES}
