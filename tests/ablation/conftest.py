import pytest

from tests.support.finished_runs import SHAPES, write_run


@pytest.fixture
def ablation(tmp_path):
    """Three seeds of each of `SHAPES`; the sparse ones are slower."""
    for name, (settings, losses) in SHAPES.items():
        for seed, loss in enumerate(losses):
            speed = 1000.0 if name == "dense" else 800.0
            write_run(tmp_path / f"{name}-{seed}", settings, seed, loss, speed)
    return tmp_path
