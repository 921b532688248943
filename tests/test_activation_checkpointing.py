"""Which blocks are recomputed: all that stand in a network's lists, or an error that names what is not known."""

import pytest
import torch
from torch import nn

from fastvideo_grpo.engines.activation_checkpointing import checkpoint_blocks, find_blocks
from fastvideo_grpo.errors import UserError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


class Sampler(nn.Module):
    pass


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.samplers = nn.ModuleList([Sampler()])


class Network(nn.Module):
    """Lists under names of their own, one of them inside another module, and stages that hold lists."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(5)])
        self.text = nn.Module()
        self.text.refiner = nn.ModuleList([Block(), Block()])
        self.stages = nn.ModuleList([Stage()])
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        for block in (*self.text.refiner, *self.layers, *self.stages[0].blocks):
            x = block(x)
        return self.out(x)


NAMES = [*(f"layers.{i}" for i in range(5)), "text.refiner.0", "text.refiner.1", "stages.0.blocks.0", "stages.0.blocks.1"]


def test_every_list_of_blocks_is_found_wherever_it_stands():
    assert find_blocks(Network(), ["Block"], ["Sampler"]) == {"Block": NAMES}


def test_a_list_of_modules_that_are_not_named_is_an_error_that_says_where():
    with pytest.raises(UserError, match=r"Network .*: stages\.0\.samplers \(Sampler\)\. Name .*not_recomputed"):
        find_blocks(Network(), ["Block"])
    with pytest.raises(UserError, match=r": layers \(Block\), text\.refiner \(Block\), stages\.0\.blocks \(Block\)\. Name"):
        find_blocks(Network(), ["Sampler"])
    for none in (["OtherBlock"], []):
        with pytest.raises(UserError, match="none of the blocks"):
            find_blocks(Network(), none)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputed_blocks_give_the_same_output_and_gradients(every):
    plain, recomputed = Network(), Network()
    recomputed.load_state_dict(plain.state_dict())
    ran = []
    for name in NAMES:
        recomputed.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    checkpoint_blocks(recomputed, find_blocks(recomputed, ["Block"], ["Sampler"]), every)
    x = torch.randn(3, 4)
    outputs = [network(x) for network in (plain, recomputed)]
    assert torch.equal(*outputs) and sorted(ran) == sorted(NAMES)
    for output in outputs:
        output.square().mean().backward()
    assert sorted(ran) == sorted([*NAMES, *NAMES[::every]])
    gradients = [[p.grad for p in network.parameters()] for network in (plain, recomputed)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
