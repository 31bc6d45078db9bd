"""Time, money and energy of training, against published runs."""

import pytest

from moe.accounting.cost import projected_cost, training_cost
from moe.accounting.gpus import GPU, named_gpu
from moe.config import CostConfig

DAY = 86_400.0

# Patterson et al. 2021, table 4: processors, days, watts, PUE, kg CO2e per kWh; MWh and tonnes as published.
PATTERSON = {
    "T5-11B": (512, 20, 310, 1.12, 0.545, 85.7, 46.7),
    "Meena": (1024, 30, 289, 1.08, 0.415, 232, 96.4),
    "GShard-600B": (1024, 3.1, 288, 1.09, 0.177, 24.1, 4.3),
    "Switch": (1024, 27, 245, 1.10, 0.330, 179, 59.1),
    "GPT-3": (10_000, 14.8, 330, 1.10, 0.429, 1287, 552.1),
}


@pytest.mark.parametrize("name", PATTERSON)
def test_energy_and_emissions_of_pattersons_five_models_within_1_percent(name):
    processors, days, watts, pue, kg_per_kwh, mwh, tonnes = PATTERSON[name]
    rates = CostConfig(watts=watts, pue=pue, kg_co2e_per_kwh=kg_per_kwh)
    cost = training_cost(1e20, days * DAY * processors, None, rates)
    assert cost.kwh == pytest.approx(1000 * mwh, rel=0.01)
    assert cost.tco2e == pytest.approx(
        tonnes, rel=0.02 if name == "GShard-600B" else 0.01
    )  # 4.3 has two digits


def test_gpt_3_takes_355_v100_years_and_4_6_million_dollars():
    v100 = named_gpu("--gpu", "v100")
    cost = projected_cost(3.14e23, 28e12 / v100.peak_flops, v100, CostConfig())
    assert cost.device_hours / (365.25 * 24) == pytest.approx(355, rel=0.005)
    assert cost.usd == pytest.approx(4.6e6, rel=0.02)


def test_hardware_burden_is_what_the_processors_could_have_done():
    gpu = GPU("toy", peak_flops=10.0, memory=1, bandwidth=1.0, watts=100.0, usd_per_hour=2.0)
    cost = training_cost(flops=18_000.0, device_s=4 * 1800.0, gpu=gpu, rates=CostConfig(pue=1.5))
    assert cost.hardware_burden_flops == 4 * 10 * 1800
    assert cost.utilisation == 0.25
    assert (cost.device_hours, cost.usd) == (2.0, 4.0)
    assert cost.kwh == pytest.approx(0.3)
    assert cost.tco2e == pytest.approx(0.3 * 0.429 / 1000)


def test_the_users_rates_go_before_the_data_sheets_and_a_free_gpu_costs_nothing():
    rates = CostConfig(peak_flops=1e12, watts=50.0, usd_per_hour=0.0)
    cost = training_cost(1e12, 3600.0, named_gpu("--gpu", "h100"), rates)
    assert (cost.hardware_burden_flops, cost.usd) == (3.6e15, 0.0)
    assert cost.kwh == pytest.approx(0.05 * 1.1)
    # Half of 1e12 FLOP/s for 3.6e15 FLOPs are two hours, whatever an H100 can do.
    assert projected_cost(3.6e15, 0.5, named_gpu("--gpu", "h100"), rates).device_hours == pytest.approx(2)


def test_what_is_not_known_is_none():
    cost = training_cost(1e12, 2 * 3600.0, None, CostConfig())
    assert cost.device_hours == 2.0
    assert cost.hardware_burden_flops is cost.utilisation is cost.usd is cost.kwh is cost.tco2e is None
