"""Which topologies fit a GPU, and in which order they are proposed."""

import json

import pytest

from moe.accounting.gpus import named_gpu
from moe.accounting.placement import USABLE, placements
from moe.config import ConfigError, load_config
from tests.support.paths import CONFIGS

OLMOE = load_config(
    CONFIGS / "zoo" / "olmoe_1b_7b.yaml", ["train.global_batch_size=64", "train.micro_batch_size=1"]
)


def test_the_best_placement_fits_computes_nothing_twice_and_sends_least():
    gpu = named_gpu("--gpu", "h100")
    found = placements(OLMOE, 8, gpu.memory)
    assert len(found) == 4 * 2 * 2  # ep_size 1, 2, 4, 8; ZeRO 1 and 2; with and without recomputation
    fitting = [place for place in found if place.memory.peak <= USABLE * 80 * 2**30]
    assert found[: len(fitting)] == fitting
    best = found[0]
    assert not best.activation_checkpointing
    rivals = [place for place in fitting if not place.activation_checkpointing]
    assert best.communication.total == min(place.communication.total for place in rivals)
    assert [place.fits for place in found] == sorted((place.fits for place in found), reverse=True)


def test_where_nothing_fits_the_smallest_comes_first():
    found = placements(OLMOE, 2, 10**9)
    assert not any(place.fits for place in found)
    assert found[0].memory.peak == min(place.memory.peak for place in found)


def test_a_batch_that_does_not_split_over_the_gpus_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        placements(OLMOE, 3 * 64, 80 * 10**9)


def test_the_record_is_plain_json_with_sums():
    (best, *_) = placements(OLMOE, 8, 80 * 2**30)
    record = json.loads(json.dumps(best.record()))
    assert record["memory"]["peak"] == best.memory.peak
    sent = record["communication"]
    assert sent["total"] == sent["all_to_all"] + sent["gradients"] + sent["weights"]


@pytest.mark.parametrize(("name", "gpu", "gpus"), [("base_8gpu", "h100", 8), ("small_1gpu", "rtx 4090", 1)])
def test_shipped_configurations_are_near_the_best_of_their_placements(name, gpu, gpus):
    config = load_config(CONFIGS / f"{name}.yaml", ["model.vocab_size=50304"])
    best, *others = placements(config, gpus, named_gpu("--gpu", gpu).memory)
    own = (config.parallel.ep_size, config.parallel.zero_stage, config.train.activation_checkpointing)
    ways = [(way.ep_size, way.zero_stage, way.activation_checkpointing) for way in (best, *others)]
    shipped = (best, *others)[ways.index(own)]
    assert shipped.fits
    assert not shipped.activation_checkpointing
    assert shipped.communication.total <= 1.1 * best.communication.total
