"""``fastvideo-grpo measure-family`` on a model of another package whose blocks can be counted by hand. (The models in here:
trainer/test_measure_family.py.)"""

import pytest
import torch
from torch import nn

from fastvideo_grpo import cli
from fastvideo_grpo.models.family import Activations, Family
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.trainers.base import GRPOTrainer

CONFIGS = {
    "transformer": {
        "_class_name": "Toy",
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 12,
        "ffn_dim": 128,
        "in_channels": 4,
    },
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "up_block_types": ["UpDecoderBlock2D"] * 2},
    "text_encoder": {"hidden_size": 8},
}


class Block(nn.Module):
    """``inner`` keeps its input, 1 hidden vector; tanh and ``outer`` keep the same MLP-wide one. Frozen, with an adapter on
    ``outer``, the first of them is not needed."""

    def __init__(self, width, mlp):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, hidden):
        return hidden + self.outer(torch.tanh(self.inner(hidden)))


class AllWithAll(Block):
    """Keeps a matrix of all tokens with all, too."""

    def forward(self, hidden):
        return super().forward(torch.softmax(hidden @ hidden.mT, -1) @ hidden)


class Toy(nn.Module):
    def __init__(self, config, block):
        super().__init__()
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.image, self.text = nn.Linear(config["in_channels"], width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(block(width, config["ffn_dim"]) for _ in range(config["num_layers"]))
        self.out = nn.Linear(width, config["in_channels"])  # keeps its input, 1 hidden vector outside the blocks

    def forward(self, sample, text):
        tokens = sample.flatten(2).mT
        hidden = torch.cat([self.image(tokens), self.text(text)], 1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden[:, : tokens.shape[1]]).mT.reshape(sample.shape)


class ToyTrainer(GRPOTrainer):
    def network_output(self, sample, level, conditioning):
        return self.network(sample.to(self.dtype), conditioning["encoder_hidden_states"].to(self.dtype))

    def _nothing_is_loaded(self, *arguments, **settings):
        raise AssertionError("only the network is there")

    __init__ = encode = pixels = generate = get_module = release_text_encoders = _nothing_is_loaded


class ToyFamily(Family):
    block = Block

    def size_multiple(self, facts):
        return facts.spatial_compression

    def latent_shape(self, facts, sample):
        return facts.denoiser["in_channels"], sample.height // 2, sample.width // 2

    def image_tokens(self, facts, sample):
        return sample.height // 2 * (sample.width // 2)

    def network(self, denoiser, *, as_trained=False):
        with torch.device("meta"):
            return Toy(denoiser, self.block)


class QuadraticFamily(ToyFamily):
    block = AllWithAll


@pytest.fixture
def toy(monkeypatch):
    """``toy(family class)`` -> its kind, as that of a package that is installed."""

    def register(cls):
        family = cls(
            kind="toy",
            name="Toy",
            pipeline="ToyPipeline",
            trainer=f"{__name__}:ToyTrainer",
            folders=tuple(CONFIGS),
            configs=CONFIGS,
            sequence_encoder=("text_encoder", "hidden_size"),
            lora_targets=("outer",),
            activations=dict.fromkeys(("fp32", "bf16"), Activations(1, 0, (1, 1), 9, mlp=1)),
            decode=1,
            decode_kept=1,
            parameters={},
            blocks=("Block", "AllWithAll"),
        )
        monkeypatch.setitem(FAMILIES._registered, "toy", family)
        return "toy"

    return register


def test_what_blocks_keep_is_what_the_formulas_say(toy, capsys):
    """MLPs of four times the hidden width: a forward holds a hidden vector and two MLP-wide ones."""
    assert cli.main(["measure-family", toy(ToyFamily), "--precision", "fp32"]) == 0
    out, told = capsys.readouterr()
    found = eval(f"dict({out})", {"Activations": Activations})
    assert found["activations"] == {"fp32": Activations(1, 0, (1, 1), 9, mlp=1)}
    assert found["lora_activations"] == {"fp32": Activations(0, 0, (0, 0), 9, mlp=1, adapters=(1, 0))}
    assert found["decode"] > 1 and found["decode_kept"] > 10
    assert told.count("counted, by these factors") == 6
    assert told.count("by what the family has") == 3  # it has none of LoRA


def test_a_network_that_is_no_sum_over_tokens_is_refused(toy, capsys):
    assert cli.main(["measure-family", toy(QuadraticFamily), "--precision", "fp32"]) == 1
    told = capsys.readouterr().err
    assert "TOO FAR" in told
    assert "figures are too far off at other sizes (fp32, all weights, kept, nothing recomputed)" in told
