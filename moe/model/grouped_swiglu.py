"""The SwiGLU experts over the tokens that chose them: gather, multiply, weigh, sum by token.

Each fast path is one autograd function, so that little is kept for the backward pass: the tokens, and two
pre-activations of width F for each row. No copy of a token per expert is kept and no expert's output: where
`y = (s a) w_down`, the gradient of the gate weight s is `<dy w_down^T, a>` (Guo et al. 2025, SonicMoE).

Shape suffixes: M tokens, K choices per token, N rows, one for each choice that is kept, E experts, D d_model,
F hidden width. A lower-case n stands for the rows that are multiplied at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch.permutation import (
    Permutation,
    permute_reference,
    sum_by_token,
    unpermute_reference,
    used_rows,
)
from moe.model import products
from moe.model.activation import activate, activate_backward
from moe.model.products import DENSE, Products, cast_in_autocast, grouped_products

ExpertPath = Literal["loop", "grouped_mm", "reference"]
_WORK_OF_EXPERT = 2**22  # rows times elements of a matrix, for each thread
_MOST_GROUPS = 1023  # of torch's grouped GEMM on a GPU
Weights = Sequence[Tensor]  # w_gate, w_up (E, D, F), w_down (E, F, D); those of one expert have no E


def choose_expert_path(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, num_rows: int
) -> ExpertPath:
    """The faster path for weights of a shape (E, D, F) and this number of rows; see `grouped_swiglu`.

    In fp32 on a CPU, `grouped_mm` has fewer operations, and `loop` has faster products if they are oneDNN's,
    so what counts then is the work of an expert on a thread. Measured on a Zen 5 with 1 and 2 threads, 8 to
    64 experts of 128 x 64 to 256 x 512 and 2,048 to 16,384 rows; and on an AMD EPYC with AVX2 alone.
    """
    num_experts, d_model, d_ff = shape
    width = dtype.itemsize
    if d_model * width % 16 or d_ff * width % 16 or num_experts > _MOST_GROUPS:
        return "loop"
    if dtype == torch.bfloat16:
        return "grouped_mm"
    if dtype != torch.float32 or device.type != "cpu" or torch.compiler.is_compiling():
        return "loop"
    if not products.PREFERS_ONEDNN:
        return "grouped_mm"
    is_little = num_rows * d_model * d_ff < _WORK_OF_EXPERT * num_experts * torch.get_num_threads()
    return "grouped_mm" if is_little else "loop"


def one_after_the_other(shape: Sequence[int], num_rows: int) -> bool:
    """Whether experts with weights of a shape (E, D, F) work so in fp32 on this machine's CPU."""
    return choose_expert_path(shape, torch.float32, torch.device("cpu"), num_rows) == "loop"


def grouped_swiglu(
    tokens: Tensor, gate_weights: Tensor, weights: Weights, permutation: Permutation, path: ExpertPath
) -> Tensor:
    """Sum each token's expert outputs by gate weight.

    Args:
        tokens: (M, D), any float type.
        gate_weights: (M, K), any float type.
        weights: `w_gate`, `w_up` (E, D, F) and `w_down` (E, F, D), the dtype of `tokens`.
        permutation: which row holds which choice of which token.
        path: `loop`: expert by expert, any dtype and width; the host reads the numbers of rows, for which it
            waits on a GPU. `grouped_mm`: all experts in one call, without waiting; fp32 (CPU only) or bf16,
            with D and F times the bytes of an element multiples of 16. `reference`: the definition,
            differentiated by autograd.

    Returns:
        (M, D), same dtype. A dropped choice adds nothing. An expert without rows gets gradients of zero.

    Raises:
        RuntimeError: from torch, on a dtype or width that `grouped_mm` does not take.
    """
    if path == "reference":
        return grouped_swiglu_reference(tokens, gate_weights, weights, permutation)
    function = _Loop if path == "loop" else _GroupedMM
    return function.apply(tokens, gate_weights, *weights, permutation)


def grouped_swiglu_reference(
    tokens: Tensor, gate_weights: Tensor, weights: Weights, permutation: Permutation
) -> Tensor:
    """`grouped_swiglu` as it is defined, in plain operations."""
    counts = permutation.rows_per_expert.tolist()
    rows_ND = permute_reference(tokens, permutation)
    dropped = rows_ND.shape[0] - sum(counts)
    # unbind once: indexing w_gate[e] in the loop would make the backward pass O(E^2).
    experts = zip(rows_ND.split([*counts, dropped]), *(weight.unbind(0) for weight in weights), strict=False)
    outputs = [(F.silu(rows @ w_gate) * (rows @ w_up)) @ w_down for rows, w_gate, w_up, w_down in experts]
    outputs_ND = torch.cat([*outputs, rows_ND.new_zeros(dropped, tokens.shape[1])])
    return unpermute_reference(outputs_ND, permutation, gate_weights.to(tokens.dtype))


def swiglu(hidden: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`(silu(x w_gate) * (x w_up)) w_down` (Shazeer 2020, GLU Variants, eq. 6).

    In training it uses the products of `loop`, without gradients PyTorch's; see `products.linear`.

    Args:
        hidden: (..., D), any float type.
        w_gate: (D, F), same dtype.
        w_up: (D, F), same dtype.
        w_down: (F, D), same dtype.

    Returns:
        (..., D), same dtype, or that of `torch.autocast`.
    """
    hidden, w_gate, w_up, w_down = cast_in_autocast(hidden, w_gate, w_up, w_down)
    if not torch.is_grad_enabled():
        return (F.silu(hidden @ w_gate) * (hidden @ w_up)) @ w_down
    return _Dense.apply(hidden.reshape(-1, hidden.shape[-1]), w_gate, w_up, w_down).view(hidden.shape)


class _SwiGLU(NamedTuple):
    """The arithmetic of one expert, or of all at once. A scale multiplies a row before its last product."""

    weights: Weights
    products: Products

    def forward(self, rows_nD: Tensor, scale_n1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The two pre-activations (n, F), and the output (n, D)."""
        w_gate, w_up, w_down = self.weights
        gate_nF, up_nF = (self.products.output(rows_nD, weight) for weight in (w_gate, w_up))
        return gate_nF, up_nF, self.products.output(activate(gate_nF, up_nF, scale_n1), w_down)

    def backward(
        self,
        grad_nD: Tensor,
        kept: "_Kept",
        scale_n1: Tensor | None,
        into: Sequence[Tensor | None] = (None, None, None),
    ) -> tuple[Tensor, Tensor, Weights]:
        """Gradients of rows (n, D), of scales (n,), or (0,) without them, and of weights; see `Products`."""
        rows_nD, gate_nF, up_nF = kept
        w_gate, w_up, w_down = self.weights
        # 1. Back through w_down, to the product of the two branches.
        hidden_grad_nF = self.products.input_grad(grad_nD, w_down)
        # 2. Through the activation, to the two pre-activations.
        hidden_nF, gate_grad_nF, up_grad_nF, scale_grads_n = activate_backward(
            gate_nF, up_nF, scale_n1, hidden_grad_nF
        )
        down_grad = self.products.weight_grad(hidden_nF, grad_nD, into[2])
        del hidden_nF
        weight_grads = [self.products.weight_grad(rows_nD, gate_grad_nF, into[0])]
        weight_grads += [self.products.weight_grad(rows_nD, up_grad_nF, into[1]), down_grad]
        # 3. Through w_gate and w_up, to the rows.
        rows_grad_nD = self.products.input_grad(gate_grad_nF, w_gate)
        rows_grad_nD.add_(self.products.input_grad(up_grad_nF, w_up))
        return rows_grad_nD, scale_grads_n, weight_grads


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    rows: Tensor  # (n, D)
    gate: Tensor  # (n, F), before the activation
    up: Tensor  # (n, F)


class _Loop(torch.autograd.Function):
    """Expert by expert: what is computed for the rows of one of them stays in the cache meanwhile.

    The number of rows is rounded up, because every new shape costs oneDNN half a millisecond and half a MiB.
    The additional rows are the next ones in the order of experts; their results are not used.
    """

    @staticmethod
    def forward(ctx: Any, tokens_MD: Tensor, gates_MK: Tensor, *rest: Any) -> Tensor:
        *weights, permutation = rest
        order_N = _with_rows_behind(permutation.assignment_of_row)
        token_N, gates_N1 = _token_and_gate(order_N, gates_MK, tokens_MD.dtype)
        sums_MD, pre_activations = _zeros_to_add_to(tokens_MD), []
        for e, number, rows in _rows_of_experts(permutation):
            token_n, expert = token_N[rows], _SwiGLU([weight[e] for weight in weights], DENSE)
            *kept, output_nD = expert.forward(tokens_MD.index_select(0, token_n), gates_N1[rows])
            sums_MD.index_add_(0, token_n[:number], output_nD[:number].to(sums_MD.dtype))
            pre_activations += kept
        ctx.permutation = permutation
        ctx.save_for_backward(tokens_MD, gates_MK, *weights, *pre_activations)
        return sums_MD.to(tokens_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        permutation: Permutation = ctx.permutation
        tokens_MD, gates_MK, w_gate, w_up, w_down, *pre_activations = ctx.saved_tensors
        weights, of_experts = (w_gate, w_up, w_down), iter(pre_activations)
        order_N = _with_rows_behind(permutation.assignment_of_row)
        token_N, gates_N1 = _token_and_gate(order_N, gates_MK, tokens_MD.dtype)
        weight_grads = [torch.empty_like(weight) for weight in weights]
        sums_MD, gate_grads_A = _zeros_to_add_to(tokens_MD), torch.zeros_like(gates_MK).flatten()
        idle = set(range(len(w_gate)))
        for e, number, rows in _rows_of_experts(permutation):
            idle.remove(e)
            token_n, expert = token_N[rows], _SwiGLU([weight[e] for weight in weights], DENSE)
            grad_nD = grads[0].index_select(0, token_n)
            grad_nD[number:] = 0
            kept = _Kept(tokens_MD.index_select(0, token_n), next(of_experts), next(of_experts))
            into = [grad[e] for grad in weight_grads]
            rows_grad_nD, gate_grads_n, _ = expert.backward(grad_nD, kept, gates_N1[rows], into)
            sums_MD.index_add_(0, token_n[:number], rows_grad_nD[:number].to(sums_MD.dtype))
            gate_grads_A[order_N[rows][:number]] = gate_grads_n[:number].to(gate_grads_A.dtype)
        for grad in weight_grads:
            for e in idle:
                grad[e].zero_()
        return sums_MD.to(tokens_MD.dtype), gate_grads_A.view_as(gates_MK), *weight_grads, None


class _GroupedMM(torch.autograd.Function):
    """All experts at once. Rows past the last expert's are undefined throughout, and nothing reads them."""

    @staticmethod
    def forward(ctx: Any, tokens_MD: Tensor, gates_MK: Tensor, *rest: Any) -> Tensor:
        *weights, permutation = rest
        token_N, gates_N1 = _token_and_gate(permutation.assignment_of_row, gates_MK, tokens_MD.dtype)
        experts = _SwiGLU(weights, grouped_products(permutation.rows_per_expert))
        *kept, output_ND = experts.forward(tokens_MD.index_select(0, token_N), gates_N1)
        ctx.permutation = permutation
        ctx.save_for_backward(tokens_MD, gates_MK, *weights, *kept)
        return sum_by_token(output_ND, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        permutation: Permutation = ctx.permutation
        tokens_MD, gates_MK, w_gate, w_up, w_down, *pre_activations = ctx.saved_tensors
        token_N, gates_N1 = _token_and_gate(permutation.assignment_of_row, gates_MK, tokens_MD.dtype)
        experts = _SwiGLU((w_gate, w_up, w_down), grouped_products(permutation.rows_per_expert))
        kept = _Kept(tokens_MD.index_select(0, token_N), *pre_activations)
        grad_ND = grads[0].index_select(0, token_N)
        rows_grad_ND, gate_grads_N, weight_grads = experts.backward(grad_ND, kept, gates_N1)
        gate_grads_N = gate_grads_N.where(used_rows(permutation), 0).to(gates_MK.dtype)
        gate_grads_A = torch.zeros_like(gates_MK).flatten()
        gate_grads_A = gate_grads_A.scatter(0, permutation.assignment_of_row, gate_grads_N)
        return sum_by_token(rows_grad_ND, permutation), gate_grads_A.view_as(gates_MK), *weight_grads, None


class _Dense(torch.autograd.Function):
    """One expert for all rows."""

    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, *weights: Tensor) -> Tensor:
        gate_nF, up_nF, output_nD = _SwiGLU(weights, DENSE).forward(rows_nD, None)
        ctx.save_for_backward(rows_nD, gate_nF, up_nF, *weights)
        return output_nD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_nD, gate_nF, up_nF, *weights = ctx.saved_tensors
        kept = _Kept(rows_nD, gate_nF, up_nF)
        rows_grad_nD, _, weight_grads = _SwiGLU(weights, DENSE).backward(grads[0], kept, None)
        return rows_grad_nD, *weight_grads


def _rows_of_experts(permutation: Permutation) -> Iterator[tuple[int, int, slice]]:
    """Each expert that has rows, their number, and a slice of them whose length is rounded up."""
    start = 0
    for expert, number in enumerate(permutation.rows_per_expert.tolist()):
        if number:
            step = _step(number)
            yield expert, number, slice(start, start + -(-number // step) * step)
        start += number


def _step(number: int) -> int:
    """A number of rows is rounded up to a multiple of this: 1/32 to 1/16 of it, and at least 4."""
    return max(4, 1 << max(number.bit_length() - 5, 0))


def _with_rows_behind(order_N: Tensor) -> Tensor:
    """Enough rows after the last one for the last slice to be rounded up."""
    return F.pad(order_N, (0, _step(len(order_N)))) if len(order_N) else order_N


def _token_and_gate(order_N: Tensor, gates_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The token (N,) and the gate weight (N, 1) of each row."""
    return order_N // gates_MK.shape[1], gates_MK.flatten().index_select(0, order_N).to(dtype).unsqueeze(1)


def _at_least_fp32(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _zeros_to_add_to(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=_at_least_fp32(rows))
