"""Time, money and energy of training.

Hardware burden after Thompson et al. 2020, energy and emissions after Patterson et al. 2021.
"""

from dataclasses import dataclass

from moe.accounting.gpus import GPU
from moe.config import CostConfig

HOUR = 3600.0


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
