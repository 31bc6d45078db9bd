"""Uneven all-to-all of rows, differentiable and asynchronous, and the one wait for the device it needs.

Shape suffixes: R ranks, N rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work, all_to_all_single


def exchange_counts(counts: Tensor, group: ProcessGroup) -> tuple[list[list[int]], list[list[int]]]:
    """Tell every rank how much it is about to get. Waits for the device: the one place in a MoE layer.

    Args:
        counts: (R, C) int64, C numbers for each rank of the group.
        group: of R ranks.

    Returns:
        The numbers that this rank sent and those that it got, as R lists of C each.
    """
    received = torch.empty_like(counts)
    all_to_all_single(received, counts.contiguous(), group=group)
    sent_here, received_here = torch.stack([counts, received]).tolist()
    return sent_here, received_here


class RowExchange:
    """One uneven all-to-all of rows, and in the backward pass the reverse one of their gradients.

    What autograd runs between `start` and `wait` overlaps with the transfer; in the backward pass, where the
    order is reversed, so do its gradients.

    Args:
        send: rows for each rank of the group, in the order of the rows.
        receive: rows from each rank.
        group: the ranks.
    """

    def __init__(self, send: list[int], receive: list[int], group: ProcessGroup):
        self.send, self.receive, self.group = send, receive, group
        self._under_way: tuple[Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Begin to send `rows` (sum(send), ...) of any dtype.

        Returns:
            (sum(receive), ...), for `wait` only: its content is still on the way.
        """
        return _Start.apply(rows, self)

    def wait(self, in_flight: Tensor) -> Tensor:
        """End the transfer: what `start` returned becomes (sum(receive), ...), what arrived.

        Raises:
            RuntimeError: from torch, if a rank of the group is gone or late.
        """
        return _Wait.apply(in_flight, self)

    def run(self, rows: Tensor) -> Tensor:
        """`start` and `wait` in one: (sum(send), ...) to (sum(receive), ...)."""
        return self.wait(self.start(rows))

    def _begin(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Start one transfer without autograd; `_end` must follow before the next."""
        assert self._under_way is None, "one transfer at a time"
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        rows = rows.contiguous()
        work = all_to_all_single(received, rows, receive, send, self.group, async_op=True)
        assert work is not None
        self._under_way = work, received, rows  # alive until the transfer ends
        return received

    def _end(self) -> Tensor:
        """Wait for what `_begin` started (on CPU the process, on a GPU its stream); what arrived."""
        assert self._under_way is not None, "nothing is under way"
        work, received, _ = self._under_way
        work.wait()
        self._under_way = None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._begin(rows, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._end(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        exchange._end()
        return in_flight.view_as(in_flight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: RowExchange = ctx.exchange
        exchange._begin(grads[0], exchange.receive, exchange.send)
        return grads[0], None  # of the right shape for autograd; _Start replaces it by what arrives
