"""Which GPU a name means."""

import pytest

from moe.accounting.gpus import GPUS, find_gpu, named_gpu
from moe.config import ConfigError


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_by_torchs_name_and_by_the_users(device, name):
    gpu = find_gpu(device)
    assert gpu is not None
    assert gpu.name == name
    assert named_gpu("--gpu", device) is gpu


def test_an_unknown_device_is_none():
    assert find_gpu("NVIDIA GeForce 9999") is None
    assert find_gpu(None) is None


def test_a_users_name_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"^--gpu: 'abacus' is not known; use one of ") as caught:
        named_gpu("--gpu", "abacus")
    assert all(gpu.name in str(caught.value) for gpu in GPUS)
