"""Time, money and energy of training.

Hardware burden after Thompson et al. 2020, energy and emissions after Patterson et al. 2021.
"""

import argparse
import re
from dataclasses import dataclass

from moe.config.schema import CostConfig

HOUR = 3600.0
GB = 2**30  # what is sold as 80 GB is 80 GiB, but for what error correction and the driver take


@dataclass(frozen=True)
class GPU:
    """A processor, from its data sheet.

    Attributes:
        name: words that torch's name of the device contains.
        peak_flops: dense bf16 FLOP/s (fp16 for the V100), without structured sparsity.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        watts: thermal design power.
        usd_per_hour: a common price to rent one, or None where we have no source.
    """

    name: str
    peak_flops: float
    memory: int
    bandwidth: float
    watts: float
    usd_per_hour: float | None


# From the makers' data sheets. Prices: the middle of specialised clouds' range in May 2026 (mercatus-ai.com,
# Cloud GPU pricing); of the V100, Lambda's in its estimate of GPT-3's cost in 2020. Vendors differ fivefold.
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


def find_gpu(device: str | None) -> GPU | None:
    """The GPU that torch's name (`NVIDIA H100 80GB HBM3`) or the user's (`h100`) means, or None."""
    words = set(re.split(r"[\s-]+", (device or "").lower()))
    known = [gpu for gpu in GPUS if set(gpu.name.lower().split()) <= words]
    return max(known, key=lambda gpu: len(gpu.name.split()), default=None)


def known_gpu(name: str) -> GPU:
    """The argument of an option that names a GPU."""
    gpu = find_gpu(name)
    if gpu is None:
        names = ", ".join(gpu.name for gpu in GPUS)
        raise argparse.ArgumentTypeError(f"{name!r} is not known; use one of {names}")
    return gpu


@dataclass(frozen=True)
class Cost:
    """What a training run takes, or took. None where a rate that it needs is not known.

    Attributes:
        flops: floating-point operations that the model needed, nothing counted twice.
        device_hours: processors times hours.
        hardware_burden_flops: processors x peak rate x time, what they could have done (Thompson).
        utilisation: `flops / hardware_burden_flops`; MFU over the whole run.
        usd: price of the device hours.
        kwh: electricity, with the data centre's overhead (PUE).
        tco2e: tonnes of CO2 equivalent of that electricity.
    """

    flops: float
    device_hours: float
    hardware_burden_flops: float | None
    utilisation: float | None
    usd: float | None
    kwh: float | None
    tco2e: float | None


def training_cost(flops: float, device_s: float, gpu: GPU | None, rates: CostConfig) -> Cost:
    """Cost of `flops` done in `device_s`.

    Args:
        flops: FLOPs of the whole run.
        device_s: seconds times GPUs, or CPU processes.
        gpu: what they are; None: unknown.
        rates: the section `cost` of the configuration; what it names goes before the GPU's own figures.
    """
    peak = rates.peak_flops or (gpu.peak_flops if gpu else None)
    watts = rates.watts or (gpu.watts if gpu else None)
    price = rates.usd_per_hour if rates.usd_per_hour is not None else (gpu.usd_per_hour if gpu else None)
    hours = device_s / HOUR
    burden = None if peak is None else device_s * peak
    kwh = None if watts is None else hours * watts * rates.pue / 1000
    return Cost(
        flops=flops,
        device_hours=hours,
        hardware_burden_flops=burden,
        utilisation=None if not burden else flops / burden,
        usd=None if price is None else hours * price,
        kwh=kwh,
        tco2e=None if kwh is None else kwh * rates.kg_co2e_per_kwh / 1000,
    )


def projected_cost(flops: float, mfu: float, gpu: GPU, rates: CostConfig) -> Cost:
    """Cost of a run that reaches the utilisation `mfu`; the others as in `training_cost`."""
    return training_cost(flops, flops / (mfu * (rates.peak_flops or gpu.peak_flops)), gpu, rates)
