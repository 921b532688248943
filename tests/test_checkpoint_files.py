"""Which files of a checkpoint are read, and what is said of one that cannot be loaded before anything of it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo_grpo.checkpoints.export import copy_components
from fastvideo_grpo.config.keys import RewardConfig
from fastvideo_grpo.engines.sharded_loading import CheckpointReader, WeightFilesError
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.model_files.clean_folder import clean_folder
from fastvideo_grpo.model_files.json_files import read_json
from fastvideo_grpo.model_files.selection import select
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.registry import FAMILIES
from fastvideo_grpo.planning import plan
from fastvideo_grpo.planning.checkpoint_checks import checkpoint_problems, unread_files
from fastvideo_grpo.prompts.embeddings import encoder_identity
from fastvideo_grpo.rewards.models.weight_files import files_read
from tests.decoys import add_decoys, others
from tests.tiny_models import tiny_checkpoint  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parent.parent
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9949328904\n"
DIFFUSERS, TRANSFORMERS = {"_class_name": "AutoencoderKL"}, {"architectures": ["CLIPTextModel"]}
KINDS = ("flux", "hunyuan_video", "skyreels_i2v", "wan", "stable_diffusion")


@pytest.fixture
def copy_of(tiny_checkpoint, tmp_path):  # noqa: F811
    """A checkpoint of a kind that a test may damage."""
    return lambda kind: shutil.copytree(tiny_checkpoint(kind), tmp_path / kind)


def config_of(kind, folder):
    values = {
        "model": {"kind": kind, "path": str(folder)},
        "rewards": {"models": {"size": {"kind": "jpeg_size"}}},
        "prompts": {"path": str(ROOT / "data" / "prompts" / "flux_examples.txt")},
        "run": {"dir": "unused"},
    }
    return run_config.build(values, [])


def problems_of(kind, folder):
    config = config_of(kind, folder)
    return checkpoint_problems(config, model_facts(config))


def write(folder: Path, config, *names):
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for number, name in enumerate(names):
        if name.endswith(".index.json"):
            shard = name.replace(".safetensors.index.json", "-00001-of-00001.safetensors")
            save_file({"x": torch.full((2,), 100.0 + number)}, folder / shard)
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
        elif name.endswith(".bin"):
            torch.save({"x": torch.full((2,), float(number))}, folder / name)
        else:
            save_file({"x": torch.full((2,), float(number))}, folder / name)
    return folder


# --- which files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config,names,read",
    [
        (DIFFUSERS, ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"), 101),
        (DIFFUSERS, ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.safetensors"), 1),
        (DIFFUSERS, ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "ema.safetensors"), 0),
        (TRANSFORMERS, ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"), 1),
        (TRANSFORMERS, ("pytorch_model.bin", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors"), 101),
        (TRANSFORMERS, ("model.fp16.safetensors", "pytorch_model.bin"), 1),
        (None, ("a.safetensors", "model.safetensors"), 1),
    ],
)
def test_the_files_are_those_that_the_components_library_reads(tmp_path, config, names, read):
    folder = write(tmp_path / "part", config, *names)
    reader = CheckpointReader(folder)
    assert reader.read("x").tolist() == [read, read]
    out = torch.empty(2, dtype=torch.bfloat16)
    reader.read_into("x", out)
    assert out.tolist() == [read, read]
    selection = select(folder)
    assert selection.names.isdisjoint(selection.left_out)
    assert selection.names | set(selection.left_out) == {path.name for path in folder.iterdir()} - {"config.json"}


@pytest.mark.parametrize(
    "config,names,said",
    [
        (None, ("diffusion_pytorch_model.safetensors", "model.safetensors"), "no config.json says whose"),
        (DIFFUSERS, ("one.safetensors", "two.safetensors"), "holds no .*: found one.safetensors, two.safetensors"),
        (DIFFUSERS, ("diffusion_pytorch_model.fp16.safetensors",), "variant 'fp16' only .*ln -s"),
        (TRANSFORMERS, ("model.fp16.safetensors", "pytorch_model.fp16.bin"), "variant 'fp16' only .model.fp16.safetensors"),
        (DIFFUSERS, (), "found no weights"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tmp_path, config, names, said):
    with pytest.raises(WeightFilesError, match=said):
        select(write(tmp_path / "part", config, *names))


def test_a_cache_of_links_is_read_and_a_broken_link_is_named(copy_of, tmp_path):
    """As Hugging Face's cache lays a snapshot out: links to files that are called by their checksums."""
    folder, blobs = copy_of("flux"), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert problems_of("flux", folder) == []
    (tmp_path / "linked").mkdir()
    copy_components(folder, tmp_path / "linked", "transformer", link=True)
    exported = tmp_path / "linked" / "vae" / "diffusion_pytorch_model.safetensors"
    assert exported.samefile(folder / "vae" / exported.name) and not exported.is_symlink()
    (folder / "vae" / exported.name).resolve().unlink()
    (problem,) = problems_of("flux", folder)
    assert "is a link to" in problem and "vae/diffusion_pytorch_model.safetensors" in problem


def test_what_is_not_read_is_named_and_changes_nothing(copy_of, tmp_path):
    folder = copy_of("stable_diffusion")
    config = config_of("stable_diffusion", folder)
    parts = ("unet", "vae", "text_encoder")
    before = {part: encoder_identity(folder, [part], {}) for part in parts}
    assert unread_files(config) is None
    added = {part: add_decoys(folder / part) for part in parts}
    (folder / "unet" / "notes.txt").write_text("mine")
    (folder / "unet" / "optimizer.pt").write_bytes(b"mine")
    assert problems_of("stable_diffusion", folder) == []
    assert before == {part: encoder_identity(folder, [part], {}) for part in parts}
    assert "unet/a.safetensors" in unread_files(config) and "more" in unread_files(config)
    assert f"note         {unread_files(config)}" in plan.describe(config, model_facts(config), 1).splitlines()
    (tmp_path / "out").mkdir()
    copy_components(folder, tmp_path / "out", "unet")
    copied = {path.name for path in (tmp_path / "out" / "vae").iterdir()}
    assert copied.isdisjoint(added["vae"]) and "diffusion_pytorch_model.safetensors" in copied


# --- what is wrong, in a line -----------------------------------------------------------------------------------------


def index_of(folder):
    return next(iter(folder.glob("*.index.json")))


def shrink(file: Path):
    file.write_bytes(file.read_bytes()[:-10])


def rewrite(file: Path, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def header_only(file: Path, header: bytes):
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def move(file: Path, by):
    """Let the last tensor begin `by` bytes later; 0: where the first one does."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + by, end + by] if by else [0, end - begin]
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :] + bytes(by))


def edit(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "a missing shard": (SHARD, Path.unlink, "of which 1 is not there: diffusion_pytorch_model-00002"),
    "a pointer": (SHARD, lambda file: file.write_text(POINTER), "Git LFS pointer"),
    "a cut file": (SHARD, shrink, "is no whole safetensors file: it has"),
    "a cut header": (VAE, lambda file: file.write_bytes(file.read_bytes()[:100]), "header is longer than the file"),
    "an empty file": (VAE, lambda file: file.write_bytes(b""), "is no whole safetensors file"),
    "a tensor that lies in another": (VAE, lambda file: move(file, 0), "begins at byte"),
    "a gap between tensors": (VAE, lambda file: move(file, 8), "begins at byte"),
    "a header that nests without end": (VAE, lambda file: header_only(file, b"[" * 100_000), "no whole safetensors file"),
    "a header of another kind": (VAE, lambda file: header_only(file, b"[1]"), "no whole safetensors file"),
    "metadata that are no texts": (VAE, lambda file: header_only(file, b'{"__metadata__": 5}'), "__metadata__ is no object"),
    "quantised weights": (
        VAE,
        lambda file: rewrite(file, lambda t: t.update({"decoder.conv_in.bias": t["decoder.conv_in.bias"].to(torch.int8)})),
        "decoder.conv_in.bias is torch.int8 in the files",
    ),
    "a missing tensor": (VAE, lambda file: rewrite(file, lambda t: t.pop("decoder.conv_in.bias")), "conv_in.bias is missing"),
    "a strange tensor": (VAE, lambda file: rewrite(file, lambda t: t.update(z=torch.ones(1))), "z is not in the model"),
    "another shape": (
        VAE,
        lambda file: rewrite(file, lambda t: t.update({"decoder.conv_in.bias": torch.ones(3)})),
        r"decoder.conv_in.bias is \[3\] instead of",
    ),
    "a text encoder's tensor": (
        "text_encoder/model.safetensors",
        lambda file: rewrite(file, lambda t: t.pop("text_model.final_layer_norm.bias")),
        "final_layer_norm.bias is missing",
    ),
    "another network's configuration": (
        "transformer/config.json",
        lambda file: edit(file, num_layers=7),
        "are missing; the two belong together",
    ),
    "an index without a map": (
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        lambda file: file.write_text("{}"),
        "no 'weight_map'",
    ),
    "an index that leaves the folder": (
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        lambda file: file.write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        "is no file of this folder",
    ),
    "an empty index": (
        "text_encoder_2/model.safetensors.index.json",
        lambda file: file.write_text(""),
        "found an empty file",
    ),
    "a damaged tokenizer": (
        "tokenizer_2/tokenizer.json",
        lambda file: file.write_text('{"a": '),
        "expected JSON, found 6 bytes",
    ),
    "a pointer for a vocabulary": ("tokenizer_2/spiece.model", lambda file: file.write_text(POINTER), "Git LFS pointer"),
    "no configuration": ("text_encoder/config.json", Path.unlink, "text_encoder/config.json is not there"),
    "no architecture": (
        "text_encoder/config.json",
        lambda file: edit(file, architectures=[]),
        "names no class under 'architectures'",
    ),
    "an architecture that is none": (
        "text_encoder/config.json",
        lambda file: edit(file, architectures=["Nothing"]),
        "names Nothing, which transformers does not have",
    ),
    "numbers that make no encoder": ("text_encoder/config.json", lambda file: edit(file, hidden_size=33), "hidden size"),
    "another VAE": ("vae/config.json", lambda file: edit(file, _class_name="AutoencoderTiny"), "flux reads an AutoencoderKL"),
    "a class that is none": ("transformer/config.json", lambda file: edit(file, _class_name="Nothing"), "no network can"),
    "a scheduler without a class": (
        "scheduler/scheduler_config.json",
        lambda file: file.write_text("{}"),
        "_class_name is None; FastVideo knows FlowMatchEuler",
    ),
    "a scheduler that FastVideo lacks": (
        "scheduler/scheduler_config.json",
        lambda file: edit(file, _class_name="DDIMScheduler"),
        "_class_name is 'DDIMScheduler'; FastVideo knows",
    ),
    "a component without a class": ("model_index.json", lambda file: edit(file, vae=None), "vae is None; expected"),
    "a component of another library": (
        "model_index.json",
        lambda file: edit(file, vae=["transformers", "AutoencoderKL"]),
        "vae is .*; expected",
    ),
    "no vocabulary": ("tokenizer/vocab.json", Path.unlink, "holds no vocabulary"),
}
FACTS = {
    "an empty model_index.json": (
        "model_index.json",
        lambda file: file.write_text(""),
        "model_index.json: expected JSON, .*empty",
    ),
    "a list": ("model_index.json", lambda file: file.write_text("[]"), "expected a JSON object, found a list"),
    "a pointer for a configuration": ("vae/config.json", lambda file: file.write_text(POINTER), "Git LFS pointer"),
    "a text where a number is": ("transformer/config.json", lambda file: edit(file, in_channels="16"), "in_channels is '16'"),
    "nothing where a list is": (
        "vae/config.json",
        lambda file: edit(file, block_out_channels=None),
        "block_out_channels is None",
    ),
    "a key that is not there": (
        "transformer/config.json",
        lambda file: file.write_text(json.dumps(without(json.loads(file.read_text()), "num_attention_heads"))),
        "has no 'num_attention_heads'",
    ),
}


@pytest.mark.parametrize("name,damage,said", [*DAMAGE.values(), *FACTS.values()], ids=[*DAMAGE, *FACTS])
def test_damage_is_told_before_anything_is_loaded(copy_of, name, damage, said):
    folder = copy_of("flux")
    damage(folder / name)
    config = config_of("flux", folder)
    with pytest.raises(ConfigError, match=said) as found:
        plan.check_run(config, model_facts(config), 1, here=False, training=False)
    (line,) = [line for line in str(found.value).splitlines() if str(folder / Path(name).parts[0]) in line]
    assert "hf download black-forest-labs/FLUX.1-dev" in line or "has no 'num_attention_heads'" in line or " is " in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_passes(tiny_checkpoint, kind):  # noqa: F811
    assert problems_of(kind, tiny_checkpoint(kind)) == []


@pytest.mark.parametrize("kind", ["hunyuan_video", "wan"])
def test_a_video_vae_that_lacks_a_tensor_is_refused(copy_of, kind):
    """FastVideo's loader would leave random numbers there."""
    folder = copy_of(kind)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    first = sorted(load_file(file))[0]
    rewrite(file, lambda tensors: tensors.pop(first))
    (problem,) = problems_of(kind, folder)
    assert f"{first} is missing" in problem


def test_a_tensor_in_two_shards_is_refused(copy_of):
    folder = copy_of("flux")
    first, second = sorted((folder / "transformer").glob("*00001*.safetensors")) + sorted(
        (folder / "transformer").glob("*00002*.safetensors")
    )
    name = sorted(load_file(second))[0]
    rewrite(first, lambda tensors: tensors.update({name: load_file(second)[name]}))
    (problem,) = problems_of("flux", folder)
    assert f"holds {name}, which the index places in {second.name}" in problem


def test_only_half_precision_or_only_bin(copy_of):
    folder = copy_of("stable_diffusion")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        right = load_file(file)
        save_file({name: tensor.half() for name, tensor in right.items()}, file.with_name(f"{file.stem}.fp16.safetensors"))
        torch.save(right, file.with_name("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"))
        file.unlink()
    assert problems_of("stable_diffusion", folder) == []  # diffusers takes the .bin files
    for file in folder.glob("*/*.bin"):
        file.unlink()
    problems = problems_of("stable_diffusion", folder)
    assert len(problems) == 3 and all("variant 'fp16' only" in line for line in problems)
    assert sum("hf download" in line for line in problems) == 1  # the same for all

    flux = copy_of("flux")
    file = flux / VAE
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    (problem,) = problems_of("flux", flux)
    assert "FastVideo does not read" in problem and "AutoencoderKL.from_pretrained(" in problem


def test_a_bin_that_would_run_something_is_refused(copy_of, tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = copy_of("stable_diffusion")
    (folder / VAE).unlink()
    torch.save({"x": Runs()}, (folder / VAE).with_suffix(".bin"))
    (problem,) = problems_of("stable_diffusion", folder)
    assert "torch.load refuses" in problem and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark_is_read(copy_of, tmp_path, encoding):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = copy_of("stable_diffusion")
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    assert problems_of("stable_diffusion", folder) == []
    with clean_folder(folder, ("vae", "text_encoder", "tokenizer")) as clean:
        vae = AutoencoderKL.from_pretrained(clean / "vae")
        CLIPTextModel.from_pretrained(clean / "text_encoder")
        CLIPTokenizer.from_pretrained(clean / "tokenizer")
    assert torch.equal(vae.decoder.conv_in.weight, load_file(folder / VAE)["decoder.conv_in.weight"].float())
    (tmp_path / "out").mkdir()
    copy_components(folder, tmp_path / "out", "unet")
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text(encoding="utf-8")) == read_json(
        folder / "vae" / "config.json"
    )
    json.loads((tmp_path / "out" / "model_index.json").read_text(encoding="utf-8"))


def test_an_export_does_not_promise_components_that_are_not_there(copy_of, tmp_path):
    """The safety checker is 1.2 GB that the printed download leaves out."""
    folder = copy_of("stable_diffusion")
    shutil.rmtree(folder / "safety_checker")
    (tmp_path / "out").mkdir()
    copy_components(folder, tmp_path / "out", "unet")
    assert read_json(tmp_path / "out" / "model_index.json")["safety_checker"] == [None, None]
    shutil.copytree(folder / "unet", tmp_path / "out" / "unet")
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker is None


# --- which model, and where it is to be had ---------------------------------------------------------------------------


def test_skyreels_before_its_index_is_edited(copy_of):
    folder = copy_of("skyreels_i2v")
    edit(folder / "model_index.json", _class_name="HunyuanVideoPipeline")
    command = f"""sed -i 's/"HunyuanVideoPipeline"/"HunyuanSkyreelsImageToVideoPipeline"/' {folder}/model_index.json"""
    for kind in ("skyreels_i2v", "hunyuan_video"):
        with pytest.raises(ConfigError, match="transformer of SkyReels-V1-I2V") as found:
            model_facts(config_of(kind, folder))
        assert command in str(found.value)
        assert ("set model.kind=skyreels_i2v" in str(found.value)) == (kind == "hunyuan_video")
    edit(folder / "model_index.json", _class_name="HunyuanSkyreelsImageToVideoPipeline")
    with pytest.raises(ConfigError, match=r"makes clips from images; set model\.kind=skyreels_i2v"):
        model_facts(config_of("hunyuan_video", folder))
    model_facts(config_of("skyreels_i2v", folder))


def test_a_broken_configuration_says_where_the_real_one_is_to_be_had(copy_of):
    """Whoever reads it first: it is asked whose checkpoint it is, too."""
    folder = copy_of("flux")
    folder = folder.rename(folder.with_name("FLUX.1-dev"))
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"transformer/config\.json: .*hf download black-forest-labs/FLUX"):
        model_facts(config_of("flux", folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_checkpoint_says_where_the_real_one_is_to_be_had(tmp_path, kind):
    folder = tmp_path / "FLUX.1-dev"
    with pytest.raises(ConfigError) as found:
        model_facts(config_of(kind, folder))
    text = str(found.value)
    assert " && ".join(FAMILIES[kind].source.commands(folder)) in text and "GB" in text
    assert f"fastvideo-grpo tiny {kind} --out checkpoints/tiny-" in text and f"--out {folder}" not in text


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_of_a_reward_folder_with_two_libraries_weights_one_is_counted(tmp_path):
    """apple/DFN5B-CLIP-ViT-H-14-378 holds its weights as open_clip's and as transformers' .bin."""
    for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(bytes(100))
    assert [file.name for file in files_read(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert [file.name for file in files_read(tmp_path)] == ["open_clip_pytorch_model.bin"]
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "non_lora_state_dict.safetensors", "other.bin"):
        (tmp_path / "adapter" / name).write_bytes(bytes(100))
    assert len(files_read(tmp_path / "adapter")) == 2


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("HPS.pt", POINTER.encode(), "HPS.pt: expected weights, found a Git LFS pointer"),
        ("HPS.pt", b"", "HPS.pt: expected weights, found an empty file"),
        ("HPS.pt", b"PK\3\4" + bytes(100), "HPS.pt: it is the beginning of a torch file"),
        ("model.safetensors", b"x" * 100, "model.safetensors is no whole safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "one.safetensors"}}', "one.safetensors is listed in the index"),
        ("checkpoint-5/model.pth", POINTER.encode(), "checkpoint-5/model.pth: expected weights, found a Git LFS pointer"),
    ],
)
def test_a_rewards_files_are_looked_at_before_anything_is_loaded(tmp_path, name, content, said):
    file = tmp_path / "reward" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    config = config_of("flux", tmp_path / "absent")
    place = file if name == "HPS.pt" else tmp_path / "reward"
    config.rewards.models["size"] = RewardConfig(kind="jpeg_size", checkpoint=str(place))
    facts = model_facts(config, published_if_missing=True)
    with pytest.raises(ConfigError, match=f"rewards.models.size.checkpoint: .*{said}"):
        plan.check_run(config, facts, 1, here=False, training=False)


def test_a_missing_reward_says_where_it_is_to_be_had(tmp_path):
    config = config_of("flux", tmp_path / "absent")
    config.rewards.models["hps"] = RewardConfig(kind="hps", checkpoint=str(tmp_path / "HPS.pt"))
    with pytest.raises(ConfigError, match=r"hps.checkpoint=.* does not exist.*hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        plan.check_run(config, model_facts(config, published_if_missing=True), 1, training=False)


def test_decoys_are_other_numbers():
    some = {"x": torch.zeros(3), "count": torch.ones(1, dtype=torch.long)}
    assert not torch.equal(others(some)["x"], some["x"]) and torch.equal(others(some)["count"], some["count"])
