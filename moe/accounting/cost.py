"""Time, money and energy of training.

Hardware burden after Thompson et al. 2020, energy and emissions after Patterson et al. 2021.
"""

from dataclasses import dataclass

from moe.accounting.gpus import GPU
from moe.config import CostConfig

HOUR = 3600.0


@dataclass(frozen=True)
class Cost:
    """Cost of a training run. Values are None if a rate that they need is unknown."""

    flops: float  # of the model, without recomputation
    device_hours: float
    hardware_burden_flops: float | None  # devices x peak rate x time: what they could have done (Thompson)
    utilisation: float | None  # flops / hardware_burden_flops, the MFU over the whole run
    usd: float | None  # price of the device hours
    kwh: float | None  # electricity, including the overhead of the data center (PUE)
    tco2e: float | None  # metric tons of CO2 equivalent of that electricity


def training_cost(flops: float, device_s: float, gpu: GPU | None, rates: CostConfig) -> Cost:
    """Cost of a run of `flops` that took `device_s`, seconds times the number of GPUs (or CPU processes).

    `rates`, the section `cost` of the configuration, override the GPU's values; `gpu` is None if unknown.
    """
    peak = rates.peak_flops or (gpu and gpu.peak_flops)
    watts = rates.watts or (gpu and gpu.watts)
    price = rates.usd_per_hour if rates.usd_per_hour is not None else (gpu and gpu.usd_per_hour)
    hours = device_s / HOUR
    burden = None if peak is None else device_s * peak
    kwh = None if watts is None else hours * watts * rates.pue / 1000
    return Cost(
        flops=flops,
        device_hours=hours,
        hardware_burden_flops=burden,
        utilisation=flops / burden if burden else None,
        usd=None if price is None else hours * price,
        kwh=kwh,
        tco2e=None if kwh is None else kwh * rates.kg_co2e_per_kwh / 1000,
    )


def projected_cost(flops: float, mfu: float, gpu: GPU, rates: CostConfig) -> Cost:
    """Cost of a run with the utilization `mfu`. For the other arguments see `training_cost`."""
    return training_cost(flops, flops / (mfu * (rates.peak_flops or gpu.peak_flops)), gpu, rates)
