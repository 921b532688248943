"""HPS: open_clip's numbers from transformers' model, the published preparation, and files that are not what they should be."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.media.preprocessing import MEAN, STD, prepare_for_hps
from fastvideo_grpo.rewards.models.clip_backend import clean_prompt, tokens
from fastvideo_grpo.rewards.models.hps import HPS
from fastvideo_grpo.rewards.models.open_clip_weights import attention_heads, clip_config, clip_model, to_transformers
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.reward_set import RewardSet
from fastvideo_grpo.tiny.clip import EMBEDDING, GRID, HEADS, LAYERS, PATCH, WIDTH, open_clip_weights, write_hps
from fastvideo_grpo.tiny.tokenizer_files import CLIP_LENGTH as TEXT_LENGTH

PROMPTS = ["a red circle", "two blue squares over the sea", "a red circle", "white dog", ""]
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from fastvideo_grpo.models.flux.tiny import write_flux

    return write_flux(tmp_path_factory.mktemp("flux") / "flux") / "tokenizer"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    return write_hps(tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt", tokenizer_folder)


@pytest.fixture
def reward(checkpoint, tokenizer_folder):
    return create("hps", checkpoint=str(checkpoint), params={"tokenizer": str(tokenizer_folder)})


def pictures(count, height=40, width=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, height, width, 3), dtype=torch.uint8, generator=generator)


def request_of(prompts, media):
    return RewardRequest(list(prompts), media)


def rewritten(path, change):
    """The checkpoint with something changed, beside it."""
    content = change(torch.load(path))
    torch.save(content, path.with_name("changed.pt"))
    return path.with_name("changed.pt")


# --- open_clip's forward pass, from its description


def open_clip_tower(weights, prefix, x, mask):
    """x [B, L, WIDTH] through the blocks: pre-norm, attention with one matrix for query, key and value, GELU."""
    batch, length, _ = x.shape
    for layer in range(LAYERS):
        block = f"{prefix}transformer.resblocks.{layer}."

        def norm(name, value, block=block):
            return functional.layer_norm(value, (WIDTH,), weights[f"{block}{name}.weight"], weights[f"{block}{name}.bias"])

        def linear(name, value, block=block):
            return value @ weights[f"{block}{name}.weight"].T + weights[f"{block}{name}.bias"]

        joint = norm("ln_1", x) @ weights[block + "attn.in_proj_weight"].T + weights[block + "attn.in_proj_bias"]
        query, key, value = (
            joint[..., i * WIDTH : (i + 1) * WIDTH].reshape(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for i in range(3)
        )
        attention = (query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask).softmax(dim=-1)
        x = x + linear("attn.out_proj", (attention @ value).transpose(1, 2).reshape(batch, length, WIDTH))
        x = x + linear("mlp.c_proj", functional.gelu(linear("mlp.c_fc", norm("ln_2", x))))
    return x


def open_clip_norm(weights, name, x):
    return functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])


def open_clip_image(weights, pixels):
    patches = functional.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    start = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([start, patches], dim=1) + weights["visual.positional_embedding"]
    x = open_clip_tower(weights, "visual.", open_clip_norm(weights, "visual.ln_pre", x), torch.zeros(()))
    return functional.normalize(open_clip_norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"], dim=-1)


def open_clip_text(weights, ids):
    mask = torch.full((TEXT_LENGTH, TEXT_LENGTH), float("-inf")).triu(1)
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = open_clip_norm(weights, "ln_final", open_clip_tower(weights, "", x, mask))
    return functional.normalize(x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ weights["text_projection"], dim=-1)


def random_ids():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY - 1, (3, TEXT_LENGTH), generator=generator)
    for row, end in enumerate((2, 30, TEXT_LENGTH - 1)):
        ids[row, end] = VOCABULARY - 1
        ids[row, end + 1 :] = 0  # as open_clip pads; what follows the end must not count
    return ids


def test_the_mapped_model_gives_open_clips_embeddings():
    weights = open_clip_weights(VOCABULARY)
    model = clip_model(weights)
    pixels = torch.randn(3, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(2))
    ids = random_ids()
    with torch.no_grad():
        image = functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
    assert image.shape == text.shape == (3, EMBEDDING)
    torch.testing.assert_close(image, open_clip_image(weights, pixels), atol=2e-6, rtol=0)
    torch.testing.assert_close(text, open_clip_text(weights, ids), atol=2e-6, rtol=0)


def test_a_score_is_open_clips_cosine_not_multiplied(reward, checkpoint):
    weights = {name: tensor.float() for name, tensor in torch.load(checkpoint)["state_dict"].items()}
    media = pictures(len(PROMPTS))
    image = open_clip_image(weights, prepare_for_hps(media[:, 0], GRID * PATCH))
    text = open_clip_text(weights, tokens(reward.clip.tokenizer, PROMPTS, TEXT_LENGTH))
    result = reward.score(request_of(PROMPTS, media))
    assert result.scores["hps"].dtype == torch.float32 and result.valid.all()
    torch.testing.assert_close(result.scores["hps"], (image * text).sum(dim=-1), atol=2e-6, rtol=0)
    assert result.scores["hps"].abs().max() <= 1 and result.scores["hps"].std() > 0.01


def test_sizes_are_read_from_the_tensors():
    config = clip_config(open_clip_weights(VOCABULARY))
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (GRID * PATCH, PATCH)
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (VOCABULARY, LAYERS)
    assert config.text_config.hidden_act == "gelu"
    assert clip_config(open_clip_weights(VOCABULARY), quick_gelu=True).vision_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("width", "vision", "heads"), [(768, True, 12), (1024, True, 16), (1280, True, 16), (1024, False, 16), (1280, False, 20)]
)
def test_heads_are_those_of_the_published_models(width, vision, heads):
    assert attention_heads(width, vision=vision) == heads


@pytest.mark.parametrize(("width", "vision"), [(100, False), (1152, True)])
def test_a_width_that_no_open_clip_vit_has_is_refused(width, vision):
    with pytest.raises(ValueError, match=str(width)):
        attention_heads(width, vision=vision)


def test_weights_may_be_overwritten_after_they_are_mapped():
    weights = open_clip_weights(VOCABULARY)
    model = clip_model(weights)
    before = model.vision_model.embeddings.class_embedding.clone()
    weights["visual.class_embedding"].zero_()
    assert torch.equal(model.vision_model.embeddings.class_embedding, before)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("ln_final.bias"), "no tensor for text_model.final_layer_norm.bias"),
        (lambda weights: weights.pop("visual.proj"), "no tensor 'visual.proj'"),
        (lambda weights: weights.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "visual.layer1.0.conv1.weight"),
        (lambda weights: weights.update({"visual.positional_embedding": torch.zeros(15, WIDTH)}), "15 positions"),
        (lambda weights: weights.update({"visual.ln_post.bias": torch.zeros(3)}), r"is \[3\] instead of \[128\]"),
        (lambda weights: weights.update({"visual.conv1.weight": torch.zeros(3)}), "has 4 dimensions"),
    ],
)
def test_other_weights_are_refused_by_name(change, message):
    weights = open_clip_weights(VOCABULARY)
    change(weights)
    with pytest.raises(ValueError, match=message):
        clip_model(weights)


def test_the_causal_mask_of_old_files_is_not_a_weight():
    assert "attn_mask" not in to_transformers({**open_clip_weights(VOCABULARY), "attn_mask": torch.zeros(77, 77)})


# --- preparation


@pytest.mark.parametrize("shape", [(720, 720), (480, 832), (300, 101), (64, 96), (224, 100), (224, 224), (1, 900)])
def test_pictures_are_prepared_as_the_published_transform_does(shape):
    """To floats, longer side to 224 by torchvision's antialiased bicubic, black bars, normalised."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as vision

    media = pictures(2, *shape)[:, 0]
    prepared = prepare_for_hps(media, 224)
    height, width = shape
    size = [max(1, round(side * 224 / max(shape))) for side in (height, width)]
    for picture, got in zip(media, prepared, strict=True):
        expected = picture.permute(2, 0, 1).to(torch.float32) / 255
        expected = vision.resize(expected, size, InterpolationMode.BICUBIC, antialias=True)
        rows, columns = 224 - size[0], 224 - size[1]
        expected = vision.pad(expected, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
        expected = vision.normalize(expected, list(MEAN), list(STD))
        torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)


def test_bars_are_black_and_centred():
    white = torch.full((1, 50, 100, 3), 255, dtype=torch.uint8)
    prepared = prepare_for_hps(white, 32)[0]
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    torch.testing.assert_close(prepared[:, 7, 16], -mean / std)
    torch.testing.assert_close(prepared[:, 8, 16], (1 - mean) / std)
    torch.testing.assert_close(prepared[:, 23, 16], (1 - mean) / std)
    torch.testing.assert_close(prepared[:, 24, 16], -mean / std)


def test_prompts_are_cleaned_as_open_clip_does():
    assert clean_prompt("  A Red\tPanda\n\n &amp;lt;3  schÃ¶n ") == "a red panda <3 schön"


def test_a_long_prompt_keeps_its_end_of_text(reward):
    ids = tokens(reward.clip.tokenizer, ["red " * 200, "red"], TEXT_LENGTH)
    start, end = reward.clip.tokenizer.bos_token_id, reward.clip.tokenizer.eos_token_id
    assert ids.shape == (2, TEXT_LENGTH)
    assert ids[0, 0] == ids[1, 0] == start
    assert ids[0, -1] == end and (ids[0, :-1] != end).all()
    assert ids[1, 2] == end


def test_a_prompt_cannot_spell_its_own_end(reward):
    ids = tokens(reward.clip.tokenizer, ["red <|endoftext|> blue"], TEXT_LENGTH)[0]
    assert int((ids == reward.clip.tokenizer.eos_token_id).int().argmax()) > 5


# --- scores


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_score_does_not_depend_on_the_batch(checkpoint, tokenizer_folder, batch_size):
    media = pictures(len(PROMPTS))
    reward = HPS(checkpoint=str(checkpoint), tokenizer=str(tokenizer_folder), batch_size=batch_size)
    together = reward.score(request_of(PROMPTS, media)).scores["hps"]
    alone = [reward.score(request_of([prompt], media[i : i + 1])).scores["hps"] for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    assert together.isfinite().all()


def test_flat_pictures_and_empty_prompts_have_a_score(reward):
    media = torch.stack([torch.zeros(1, 32, 32, 3), torch.full((1, 32, 32, 3), 255.0)]).to(torch.uint8)
    assert reward.score(request_of(["", "  "], media)).scores["hps"].isfinite().all()


def test_the_prompt_and_the_picture_count(reward):
    media = pictures(2)
    scores = reward.score(request_of(["a red circle"] * 2 + ["a blue square"], torch.cat([media, media[:1]]))).scores["hps"]
    assert len(set(scores.tolist())) == 3


def test_bf16_is_near_fp32_and_halves_the_matrices(checkpoint, tokenizer_folder, reward):
    media = pictures(len(PROMPTS))
    half = HPS(checkpoint=str(checkpoint), tokenizer=str(tokenizer_folder), precision="bf16")
    dtypes = {name: parameter.dtype for name, parameter in half.clip.model.named_parameters()}
    assert dtypes["vision_model.encoder.layers.0.mlp.fc1.weight"] == torch.bfloat16
    assert dtypes["vision_model.post_layernorm.weight"] == torch.float32
    request = request_of(PROMPTS, media)
    torch.testing.assert_close(half.score(request).scores["hps"], reward.score(request).scores["hps"], atol=0.01, rtol=0)


def test_fp32_stays_fp32_under_the_callers_autocast(reward):
    request = request_of(PROMPTS, pictures(len(PROMPTS)))
    expected = reward.score(request).scores["hps"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.score(request).scores["hps"], expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 1e-2)])  # convolutions are TF32 by default
def test_a_gpu_gives_the_cpus_scores(checkpoint, tokenizer_folder, reward, precision, tolerance):
    request = request_of(PROMPTS, pictures(len(PROMPTS)))
    expected = reward.score(request).scores["hps"]
    on_gpu = HPS(checkpoint=str(checkpoint), tokenizer=str(tokenizer_folder), precision=precision).to("cuda")
    scores = on_gpu.score(request).scores["hps"]
    assert scores.device.type == "cpu"
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


def test_a_video_is_scored_by_the_frames_that_were_chosen(checkpoint, tokenizer_folder, reward):
    """Until now one frame was all that HPS took; which frames of a video it looks at is a parameter."""
    params = {"tokenizer": str(tokenizer_folder)}
    video = pictures(2 * 9, height=32, width=32).view(2, 9, 32, 32, 3)
    alone = torch.stack([reward.score(request_of(["a dog"] * 2, video[:, [i]])).scores["hps"] for i in range(9)], dim=1)
    for frames, expected in (("first", alone[:, 0]), ("uniform:3", alone[:, [1, 4, 7]].mean(1)), ("all", alone.mean(1))):
        models = {"hps": {"kind": "hps", "checkpoint": str(checkpoint), "params": {**params, "frames": frames}}}
        rewards = RewardSet(models)
        rewards.check_frames(9)
        batch = rewards.score(RewardRequest(["a dog"] * 2, video, fps=8))
        torch.testing.assert_close(batch.raw["hps/hps"], expected, atol=1e-6, rtol=0)
        rewards.close()


def test_transformers_is_not_imported_for_other_rewards():
    code = (
        "import sys; from fastvideo_grpo.rewards import kinds; assert 'hps' in kinds(); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- files


@pytest.mark.parametrize("params", [{"batch_size": 0}, {"batch_size": 2.0}, {"precision": "fp16"}])
def test_parameters_out_of_range_are_refused(checkpoint, tokenizer_folder, params):
    with pytest.raises(ValueError, match=next(iter(params))):
        HPS(checkpoint=str(checkpoint), tokenizer=str(tokenizer_folder), **params)


def test_a_missing_path_is_told_before_anything_is_loaded(checkpoint, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    no_merges = tmp_path / "tokenizer"
    no_merges.mkdir()
    (no_merges / "vocab.json").write_text("{}")
    cases = [
        (tmp_path / "absent.pt", tokenizer_folder, r"absent\.pt.*HPS_v2\.1_compressed\.pt of xswu/HPSv2"),
        (tmp_path, tokenizer_folder, "is a folder"),
        (checkpoint.parent, tokenizer_folder, "set it to .*HPS_v2.1_compressed.pt"),
        (checkpoint, tmp_path / "absent", "absent is not there; .*FLUX"),
        (checkpoint, checkpoint, "is not a folder"),
        (checkpoint, no_merges, "no merges.txt.*FLUX"),
        (checkpoint, tokenizer_folder.with_name("tokenizer_2"), "no vocab.json.*T5"),
    ]
    for weights, tokenizer, message in cases:
        with pytest.raises(FileNotFoundError, match=message):
            HPS(checkpoint=str(weights), tokenizer=str(tokenizer))


def test_a_truncated_file_is_told_as_such(checkpoint, tokenizer_folder, tmp_path):
    content = checkpoint.read_bytes()
    for length in (0, 3, 1000, len(content) - 1000, len(content) - 1):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{length} bytes.*xswu/HPSv2"):
            HPS(checkpoint=str(cut), tokenizer=str(tokenizer_folder))


def test_another_file_is_told_by_what_it_is(checkpoint, tokenizer_folder, tmp_path):
    pointer = tmp_path / "pointer.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1972298538\n")
    page = tmp_path / "page.pt"
    page.write_text("<!doctype html>")
    cases = [
        (lambda: pointer, "Git LFS pointer"),
        (lambda: page, "doctype"),
        (lambda: rewritten(checkpoint, lambda content: content["state_dict"]), "plain CLIP"),
        (lambda: rewritten(checkpoint, lambda content: {"model": {}, "epoch": 3}), "found a dict with the keys model, epoch"),
        (lambda: rewritten(checkpoint, lambda content: [1]), "found a list"),
        (lambda: rewritten(checkpoint, lambda content: {"state_dict": {}}), "no tensor .* among 0"),
        (lambda: rewritten(checkpoint, lambda content: {"state_dict": torch.nn.Linear(1, 1)}), "torch.load refuses"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=f"{message}.*xswu/HPSv2"):
            HPS(checkpoint=str(make()), tokenizer=str(tokenizer_folder))


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer_folder, tmp_path):
    torch.save({"state_dict": open_clip_weights(VOCABULARY)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"needs {VOCABULARY} and {VOCABULARY - 1}"):
        HPS(checkpoint=str(tmp_path / "other.pt"), tokenizer=str(tokenizer_folder))


def test_a_damaged_tokenizer_is_told_as_such(checkpoint, tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path} cannot be read"):
        HPS(checkpoint=str(checkpoint), tokenizer=str(tmp_path))
