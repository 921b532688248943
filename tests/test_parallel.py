"""Sequence-parallel groups of a world, and what is resident where."""

import pytest
import torch

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.residency import resident


def test_groups_are_consecutive_ranks_with_one_leader():
    worlds = [World(rank=rank, size=8, sequence_parallel=4) for rank in range(8)]
    assert [world.data_rank for world in worlds] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {world.data_size for world in worlds} == {2}
    assert [world.rank for world in worlds if world.leads] == [0, 4]
    assert World().leads and World().data_size == 1


@pytest.mark.parametrize("shared", [0, 3, 16])
def test_groups_must_divide_the_processes(shared):
    with pytest.raises(ValueError, match=r"engine\.sequence_parallel"):
        World(rank=0, size=8, sequence_parallel=shared)


def test_resident_brings_it_back_to_the_host_whatever_happens():
    class Moves:
        def __init__(self):
            self.places = []

        def to(self, device):
            self.places.append(torch.device(device))

    moves, device = Moves(), torch.device("meta")
    with pytest.raises(KeyError), resident(moves, device):
        assert moves.places == [device]
        raise KeyError
    assert moves.places == [device, torch.device("cpu")]
