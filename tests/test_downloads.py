"""The commands that fetch published models: the same in README, script heads and errors, and of what is needed."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from fastvideo_grpo.model_files.downloads import Source
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.rewards.models import sources

ROOT = Path(__file__).resolve().parent.parent
OWN = list(FAMILIES.own().values())
SOURCES = [*(family.source for family in OWN), *(value for value in vars(sources).values() if isinstance(value, Source))]
COMMANDS = {command for source in SOURCES for command in source.commands() if command.startswith("hf")}
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "train_scripts").glob("*.sh")]

FLUX = [
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
]
STABLE_DIFFUSION = [
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
]
DFN5B = ["open_clip_config.json", "open_clip_pytorch_model.bin", "pytorch_model.bin", "tokenizer.json"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_print_the_commands_that_errors_print(page):
    text = re.sub(r" \\\n#? *", " ", page.read_text(encoding="utf-8"))
    found = re.findall(r"hf download [^\n`]*", text)
    assert set(found) <= COMMANDS
    if page.name.endswith("_t2i.sh") or page.name.endswith("v.sh"):
        assert found


def test_every_family_says_where_its_checkpoint_is_to_be_had():
    for family in OWN:
        words = shlex.split(family.source.commands("/data/some where")[0])
        assert words[:2] == ["hf", "download"] and words[-2:] == ["--local-dir", "/data/some where"]
        assert "GB" in family.source.advice()


@pytest.mark.parametrize(
    "source,files,left",
    [
        (FAMILIES["flux"].source, FLUX, {"ae.safetensors", "flux1-dev.safetensors"}),
        (
            FAMILIES["stable_diffusion"].source,
            STABLE_DIFFUSION,
            {name for name in STABLE_DIFFUSION if re.search(r"safety|fp16|non_ema|\.bin", name)},
        ),
        (sources.DFN5B, DFN5B, {"pytorch_model.bin"}),
    ],
    ids=["flux", "stable_diffusion", "dfn5b"],
)
def test_the_patterns_leave_out_what_nobody_reads(source, files, left):
    (part,) = source.downloads
    taken = filter_repo_objects(files, allow_patterns=list(part.include) or None, ignore_patterns=list(part.exclude) or None)
    assert set(files) - set(taken) == left
    assert part.whole > part.gigabytes
