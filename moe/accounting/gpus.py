"""Data sheets and prices of common GPUs."""

import re
from dataclasses import dataclass

from moe.config import ConfigError

GB = 2**30  # a GPU sold with 80 GB has 80 GiB, less what error correction and the driver take


@dataclass(frozen=True)
class GPU:
    """A GPU, with figures from its data sheet."""

    name: str  # words that PyTorch's name of the device contains
    peak_flops: float  # dense bf16 FLOP/s (fp16 for the V100), without structured sparsity
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s
    watts: float  # thermal design power
    usd_per_hour: float | None  # a common rental price, None if we have no source for one


# From the vendors' data sheets. Prices: the middle of the range of specialized clouds in May 2026
# (mercatus-ai.com, Cloud GPU pricing); for the V100, the price in Lambda's estimate of GPT-3's cost in 2020.
# The most expensive cloud charges five times as much as the cheapest.
GPUS = (
    GPU("V100", 125e12, 32 * GB, 0.90e12, 300, 1.50),
    GPU("A100 40GB", 312e12, 40 * GB, 1.555e12, 400, None),
    GPU("A100", 312e12, 80 * GB, 2.039e12, 400, 1.30),
    GPU("L4", 121e12, 24 * GB, 0.30e12, 72, None),
    GPU("L40S", 362e12, 48 * GB, 0.864e12, 350, None),
    GPU("RTX 4090", 165e12, 24 * GB, 1.008e12, 450, None),
    GPU("H100", 989e12, 80 * GB, 3.35e12, 700, 3.00),
    GPU("H100 PCIe", 756e12, 80 * GB, 2.0e12, 350, None),
    GPU("H100 NVL", 835e12, 94 * GB, 3.9e12, 400, None),
    GPU("H200", 989e12, 140 * GB, 4.8e12, 700, 4.00),
    GPU("B200", 2250e12, 180 * GB, 8.0e12, 1000, None),
    GPU("MI300X", 1307e12, 192 * GB, 5.3e12, 750, None),
)
GPU_NAMES = ", ".join(gpu.name for gpu in GPUS)


def find_gpu(device: str | None) -> GPU | None:
    """Find a GPU by PyTorch's name (`NVIDIA H100 80GB HBM3`) or by the user's (`h100`); None if unknown."""
    words = set(re.split(r"[\s-]+", (device or "").lower()))
    known = [gpu for gpu in GPUS if set(gpu.name.lower().split()) <= words]
    return max(known, key=lambda gpu: len(gpu.name.split()), default=None)


def named_gpu(key: str, name: str) -> GPU:
    """Find the GPU that a user names.

    Raises:
        ConfigError: the GPU is unknown; the message starts with `key` and lists the known names.
    """
    if (gpu := find_gpu(name)) is None:
        raise ConfigError(key, f"{name!r} is not known; use one of {GPU_NAMES}")
    return gpu
