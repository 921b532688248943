"""Where published models are to be had, and which of their files are needed: what README, scripts and errors print."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Download:
    """Files of a Hugging Face repository.

    Attributes:
        repository: its name.
        folder: where recipes look for them.
        gigabytes: (1e9 bytes) of the files that are needed; None: not known.
        whole: of all files of the repository, where that is more.
        files: names of single files; none: all, as ``include`` and ``exclude`` say.
        include, exclude: patterns of names.
        inside: the folder below ``folder`` that they go to.
        gated: its terms have to be accepted on its page first.
    """

    repository: str
    folder: str
    gigabytes: float | None = None
    whole: float | None = None
    files: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    inside: str = ""
    gated: bool = False

    def command(self, folder: str | Path | None = None) -> str:
        """The command line that fetches them.

        Args:
            folder: another than the recipes'.
        """
        words = ["hf", "download", self.repository, *self.files]
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            words += [word for pattern in patterns for word in (flag, pattern)]
        return shlex.join([*words, "--local-dir", str(Path(folder or self.folder) / self.inside)])


@dataclass(frozen=True)
class Source:
    """What makes up a model's folder.

    Attributes:
        downloads: into the same folder.
        edit: a command that runs behind them, with ``{folder}`` in it; "": none.
    """

    downloads: tuple[Download, ...]
    edit: str = ""

    @property
    def folder(self) -> str:
        """Where recipes look for it."""
        return self.downloads[0].folder

    def commands(self, folder: str | Path | None = None) -> list[str]:
        """The command lines that make the folder, in their order."""
        lines = [part.command(folder) for part in self.downloads]
        return lines + ([self.edit.format(folder=shlex.quote(str(folder or self.folder)))] if self.edit else [])

    def advice(self, folder: str | Path | None = None) -> str:
        """How to get it, for the end of an error: the commands as one line, and how much they fetch."""
        known = [part.gigabytes for part in self.downloads if part.gigabytes is not None]
        whole = sum(part.whole or part.gigabytes or 0.0 for part in self.downloads)
        notes = [f"{sum(known):.3g} GB" + (f" of {whole:.3g}" if whole > sum(known) else "")] if known else []
        notes += ["after you accepted its terms on its page and ran hf auth login"] * any(part.gated for part in self.downloads)
        return " && ".join(self.commands(folder)) + (f" ({'; '.join(notes)})" if notes else "")


def _one(*arguments: object, **settings: object) -> Source:
    return Source((Download(*arguments, **settings),))  # type: ignore[arg-type]


_HUNYUAN_VIDEO = Download("hunyuanvideo-community/HunyuanVideo", "checkpoints/HunyuanVideo", 41.9)
_SKYREELS = "checkpoints/SkyReels-V1-I2V"
_CLIP = Download(
    "openai/clip-vit-large-patch14",
    "checkpoints/clip-vit-large-patch14",
    1.71,
    6.85,
    include=("*.json", "*.txt", "model.safetensors"),
)

FLUX_1_DEV = _one(
    "black-forest-labs/FLUX.1-dev",
    "checkpoints/FLUX.1-dev",
    33.7,
    57.9,
    exclude=("flux1-dev.safetensors", "ae.safetensors"),
    gated=True,
)
HUNYUAN_VIDEO = Source((_HUNYUAN_VIDEO,))
SKYREELS_V1_I2V = Source(
    (
        Download(_HUNYUAN_VIDEO.repository, _SKYREELS, 16.2, 41.9, exclude=("transformer/*",)),
        Download("Skywork/SkyReels-V1-Hunyuan-I2V", _SKYREELS, 25.6, include=("*.json", "*.safetensors"), inside="transformer"),
    ),
    edit='sed -i \'s/"HunyuanVideoPipeline"/"HunyuanSkyreelsImageToVideoPipeline"/\' {folder}/model_index.json',
)
WAN_2_1_1_3B = _one(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "checkpoints/Wan2.1-T2V-1.3B-Diffusers",
    28.9,
    exclude=("assets/*", "examples/*"),
)
STABLE_DIFFUSION_V1_4 = _one(
    "CompVis/stable-diffusion-v1-4",
    "checkpoints/stable-diffusion-v1-4",
    4.3,
    24.0,
    include=(
        "*.json",
        "*.txt",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ),
    exclude=("safety_checker/*",),
)

HPS_V2_1 = _one("xswu/HPSv2", "checkpoints", 1.97, files=("HPS_v2.1_compressed.pt",))
DFN5B = _one(
    "apple/DFN5B-CLIP-ViT-H-14-378",
    "checkpoints/DFN5B-CLIP-ViT-H-14-378",
    3.95,
    7.9,
    exclude=("pytorch_model.bin",),
)
PICKSCORE = _one("yuvalkirstain/PickScore_v1", "checkpoints/PickScore_v1", 3.95, 7.9, exclude=("*.bin",))
CLIP_VIT_L = Source((_CLIP,))
CLIP_TOKENIZER = _one(
    _CLIP.repository, _CLIP.folder, files=("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
)
IMAGE_REWARD = _one("THUDM/ImageReward", "checkpoints", 1.79, files=("ImageReward.pt",))
BERT_VOCABULARY = _one("google-bert/bert-base-uncased", "checkpoints/bert-base-uncased", files=("vocab.txt",))
VIDEO_REWARD = _one("KlingTeam/VideoReward", "checkpoints/VideoReward")
QWEN2_VL_2B = _one("Qwen/Qwen2-VL-2B-Instruct", "checkpoints/Qwen2-VL-2B-Instruct", 4.4)
VIDEOSCORE2 = _one("TIGER-Lab/VideoScore2", "checkpoints/VideoScore2", 16.6)

REWARDS = {
    "clip": DFN5B,
    "hps": HPS_V2_1,
    "image_reward": IMAGE_REWARD,
    "pickscore": PICKSCORE,
    "videoalign": VIDEO_REWARD,
    "videoscore2": VIDEOSCORE2,
}
"""Reward kind -> where its checkpoint is to be had."""
