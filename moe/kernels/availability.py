"""Whether a tensor is worked on by the kernels of this folder, or by eager operations."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernels(values: Tensor) -> bool:
    """Whether it is in bf16, fp16 or fp32 on a GPU that Triton knows, with Triton installed.

    Not while torch.compile traces, which makes kernels of its own from eager operations, and not for fake
    tensors.
    """
    is_real = type(values) is Tensor and not torch.compiler.is_compiling()
    return is_real and values.is_cuda and values.dtype in _DTYPES and _has_triton(values.device)


@cache
def _has_triton(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
