import pytest

from moe.checkpoint import saving


@pytest.fixture
def four_elements_to_a_shard(monkeypatch):
    """Small tensors in many files, as large ones are."""
    monkeypatch.setattr(saving, "_SHARD_BYTES", 16)
