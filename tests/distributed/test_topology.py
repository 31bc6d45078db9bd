import pytest

from moe.config import ConfigError
from moe.distributed.topology import Topology


def test_rank_lists_of_eight_ranks_are_those_drawn_by_hand():
    assert Topology(8, 2).ep_groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Topology(8, 2).edp_groups == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert Topology(8, 4).ep_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Topology(8, 4).edp_groups == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (4, 1), (4, 4), (12, 3), (64, 16)])
def test_each_rank_is_in_one_group_of_each_kind_and_the_two_meet_in_it_alone(world_size, ep_size):
    topology = Topology(world_size, ep_size)
    for rank in range(world_size):
        (ep_group,) = (group for group in topology.ep_groups if rank in group)
        (edp_group,) = (group for group in topology.edp_groups if rank in group)
        assert len(ep_group) * len(edp_group) == world_size
        assert set(ep_group) & set(edp_group) == {rank}
        assert ep_group[topology.ep_rank(rank)] == rank


def test_ranks_that_cannot_be_split_are_refused_with_the_fix():
    with pytest.raises(
        ConfigError, match=r"parallel.ep_size: 4 does not divide the 6 ranks; .* start 8 ranks"
    ):
        Topology(6, 4)
