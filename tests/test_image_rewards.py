"""CLIP score, PickScore, aesthetic predictor and ImageReward: the numbers of open_clip, transformers and the published code,
and what is said of files that are not what they should be.
"""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch.nn import functional

from fastvideo_grpo.cli import main
from fastvideo_grpo.rewards.base import RewardRequest
from fastvideo_grpo.rewards.media.frames import Frames
from fastvideo_grpo.rewards.media.preprocessing import (
    Preprocessing,
    open_clip_preprocessing,
    openai_preprocessing,
    transformers_preprocessing,
)
from fastvideo_grpo.rewards.models.image_reward import SCORE_MEAN, SCORE_STD, TEXT_LENGTH, text_encoder, vision_tower
from fastvideo_grpo.rewards.models.open_clip_weights import clip_model
from fastvideo_grpo.rewards.models.weight_files import read_weights
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.tiny import clip as tiny_clip
from fastvideo_grpo.tiny import image_reward as tiny_blip
from fastvideo_grpo.tiny.clip import EMBEDDING, IMAGE_SIZE, LOGIT_SCALE, open_clip_weights, write_clip

PROMPTS = ["a red circle", "two blue squares over the sea", "a red circle", "white dog", ""]
CPU = torch.device("cpu")
# Wide, tall, square, smaller than the network's pictures, with odd and even margins.
SHAPES = [(40, 56), (71, 53), (32, 32), (20, 24), (64, 37), (90, 91)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def open_clip_folder(folder):
    return write_clip(folder / "dfn")


@pytest.fixture(scope="module")
def transformers_folder(folder):
    return write_clip(folder / "pickscore", layout="transformers", quick_gelu=False)


@pytest.fixture(scope="module")
def head(folder):
    torch.save(tiny_blip.head_weights(EMBEDDING), folder / "head.pth")
    return folder / "head.pth"


@pytest.fixture(scope="module")
def bert(folder):
    return tiny_blip.write_bert_tokenizer(folder / "bert")


@pytest.fixture(scope="module")
def blip(folder, bert):
    return tiny_blip.write_image_reward(folder / "ImageReward.pt", bert)


@pytest.fixture(scope="module")
def rewards(open_clip_folder, transformers_folder, head, blip, bert):
    """A function that makes a reward of a kind on its tiny checkpoint."""
    given = {
        "clip": (open_clip_folder, {}),
        "pickscore": (transformers_folder, {}),
        "aesthetic": (head, {"clip": str(transformers_folder)}),
        "image_reward": (blip, {"tokenizer": str(bert)}),
    }

    def make(kind, **params):
        checkpoint, own = given[kind]
        return create(kind, checkpoint=str(checkpoint), params={**own, **params})

    return make


KINDS = ["clip", "pickscore", "aesthetic", "image_reward"]


def pictures(count, height=40, width=56, frames=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Coarse noise, enlarged: sharp edges, on which the ways of resizing differ.
    coarse = torch.randint(0, 2, (count * frames, 3, (height + 7) // 8, (width + 7) // 8), generator=generator)
    enlarged = functional.interpolate(coarse * 255.0, scale_factor=8)[..., :height, :width]
    return enlarged.to(torch.uint8).permute(0, 2, 3, 1).reshape(count, frames, height, width, 3).contiguous()


def scores(reward, prompts, media):
    result = reward.score(RewardRequest(list(prompts), media))
    (values,) = result.scores.values()
    assert list(result.scores) == list(reward.outputs) and result.valid.all()
    assert values.dtype == torch.float32 and values.shape == (len(prompts),) and values.isfinite().all()
    return values


def changed(folder, to, change, file="open_clip_config.json"):
    """A copy of a folder with a JSON file changed."""
    shutil.copytree(folder, to)
    content = json.loads((to / file).read_text())
    change(content)
    (to / file).write_text(json.dumps(content))
    return to


# --- preparation, against the published code


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_prepared_as_open_clip_does(resize, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = {"resize_mode": resize, "interpolation": interpolation, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    published = image_transform_v2(PreprocessCfg(size=32, **config), is_train=False)
    ours = open_clip_preprocessing(config, 32)
    for shape in SHAPES:
        media = pictures(1, *shape)[:, 0]
        expected = published(Image.fromarray(media[0].numpy()))
        torch.testing.assert_close(ours(media, CPU)[0], expected, atol=1e-6, rtol=0)
    assert open_clip_preprocessing({}, 224) == openai_preprocessing(224) == Preprocessing(224)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 32, "crop_size": 32, "resample": 3},  # as the first published files had it
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5, 0.5, 0.5]},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"height": 37, "width": 37}, "crop_size": 32},
    ],
)
def test_pictures_are_prepared_as_transformers_does(config):
    from transformers import CLIPImageProcessorPil

    published, size = CLIPImageProcessorPil(**config), 32 if config else 224
    ours = transformers_preprocessing(config, size)
    for shape in SHAPES:
        media = pictures(1, *shape)[:, 0]
        expected = published(Image.fromarray(media[0].numpy()), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours(media, CPU), expected, atol=1e-6, rtol=0)


def test_pictures_are_prepared_as_openai_does():
    """The transform of OpenAI's package, which the aesthetic predictor and ImageReward repeat."""
    from torchvision import transforms

    published = transforms.Compose([
        transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    for shape in SHAPES:
        media = pictures(1, *shape)[:, 0]
        expected = published(Image.fromarray(media[0].numpy()))
        torch.testing.assert_close(openai_preprocessing(32)(media, CPU)[0], expected, atol=1e-6, rtol=0)


def test_the_crops_of_torchvision_and_transformers_differ_by_a_pixel():
    media = pictures(1, 32, 35)[:, 0]
    torchvision, transformers = (Preprocessing(32, crop=crop)(media, CPU) for crop in ("torchvision", "transformers"))
    assert not torch.equal(torchvision, transformers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"height": 32, "width": 48}}, "size is"),
        ({"size": {"longest_edge": 224}}, "size is"),
        ({"size": 336, "crop_size": 336}, "do not give the 224x224 pixels"),
        ({"size": 200}, "do not give the 224x224 pixels"),
        ({"do_center_crop": False}, "no crop do not give"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*three numbers"),
    ],
)
def test_other_preparations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        transformers_preprocessing(config, 224)


def test_open_clips_unknown_preparations_are_refused():
    for config in ({"resize_mode": "stretch"}, {"interpolation": "nearest"}):
        with pytest.raises(ValueError, match=next(iter(config))):
            open_clip_preprocessing(config, 224)


# --- scores, against the published code


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("resize", ["squash", "shortest"])
def test_clip_gives_open_clips_cosine(tmp_path, quick_gelu, resize):
    """open_clip reads the same folder with its own code."""
    import open_clip

    def set_resize(config):
        config["preprocess_cfg"]["resize_mode"] = resize

    write_clip(tmp_path / "written", quick_gelu=quick_gelu, seed=3)
    checkpoint = changed(tmp_path / "written", tmp_path / "clip", set_resize)
    reward = create("clip", checkpoint=str(checkpoint))
    media = pictures(len(PROMPTS), 45, 60)
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{checkpoint}")
    pixels = torch.stack([prepare(Image.fromarray(picture.numpy())) for picture in media[:, 0]])
    ids = reward.clip.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = (model.encode_image(pixels, normalize=True) * model.encode_text(ids, normalize=True)).sum(dim=-1)
    got = scores(reward, PROMPTS, media)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert got.std() > 0.01


def test_prompts_become_open_clips_tokens(tmp_path):
    """On the published vocabulary, which open_clip brings: 49408 tokens."""
    import open_clip
    from transformers import CLIPTokenizer

    from fastvideo_grpo.rewards.models.clip_backend import clean_prompt, tokens

    published = open_clip.SimpleTokenizer()
    names = {published.sot_token_id: "<|startoftext|>", published.eot_token_id: "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps({names.get(i, token): i for token, i in published.encoder.items()}))
    merges = sorted(published.bpe_ranks, key=published.bpe_ranks.get)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    prompts = ["A photo of 12 CATS,  on\tgrass!!", "schön &amp; naïve's 3.5mm 日本 🙂", "", "it's you're <b>", "long " * 100]
    expected = published(prompts)
    ids = tokens(tokenizer, [clean_prompt(prompt) for prompt in prompts], 77)
    # open_clip pads with 0, which comes after the end and does not count.
    before_end = expected.cumsum(dim=1) < expected.sum(dim=1, keepdim=True)
    assert torch.equal(ids[before_end], expected[before_end])
    assert torch.equal((ids == published.eot_token_id).int().argmax(dim=1), expected.argmax(dim=1))


def test_prompts_are_cleaned_as_the_layouts_library_does(rewards):
    media = pictures(1).expand(2, -1, -1, -1, -1)
    prompts = ["white &amp; black", "white & black"]
    assert scores(rewards("clip"), prompts, media).unique().numel() == 1, "open_clip resolves HTML entities"
    assert scores(rewards("pickscore"), prompts, media).unique().numel() == 2, "transformers does not"


@pytest.mark.parametrize("logit_scale", [False, True])
@pytest.mark.parametrize("preprocessor", [True, False])
def test_pickscore_gives_the_published_score(transformers_folder, tmp_path, logit_scale, preprocessor):
    """transformers' own model, processor and tokenizer on the same folder, put together as in PickScore's README."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    checkpoint = shutil.copytree(transformers_folder, tmp_path / "pickscore")
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint)
    if not preprocessor:
        (checkpoint / "preprocessor_config.json").unlink()
    media = pictures(len(PROMPTS), 45, 60)
    model = CLIPModel.from_pretrained(checkpoint).eval()
    pixels = processor([Image.fromarray(picture.numpy()) for picture in media[:, 0]], return_tensors="pt")
    text = CLIPTokenizer.from_pretrained(checkpoint)(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        words = functional.normalize(model.get_text_features(**text).pooler_output, dim=-1)
        expected = (model.logit_scale.exp() if logit_scale else 1) * (image * words).sum(dim=-1)
    reward = create("pickscore", checkpoint=str(checkpoint), params={"logit_scale": logit_scale})
    scale = math.exp(LOGIT_SCALE) if logit_scale else 1
    torch.testing.assert_close(scores(reward, PROMPTS, media), expected, atol=2e-6 * scale, rtol=0)


def test_both_layouts_hold_the_same_model(tmp_path):
    """open_clip's folder and transformers' are the same CLIP; only the preparation of pictures differs, so squares."""
    media = pictures(len(PROMPTS), 32, 32)
    folders = [write_clip(tmp_path / layout, layout=layout, seed=5) for layout in tiny_clip.LAYOUTS]
    first, second = (scores(create("clip", checkpoint=str(folder)), PROMPTS, media) for folder in folders)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def aesthetic_by_hand(folder, layers, media):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=openai_preprocessing(IMAGE_SIZE)(media[:, 0], CPU)).pooler_output
        x = features / features.norm(dim=-1, keepdim=True)
        for weight, bias in layers:
            x = x @ weight.T + bias
    return x[:, 0]


def test_aesthetic_is_the_published_head_on_the_embedding(rewards, transformers_folder, head):
    media = pictures(3, 45, 60)
    weights = torch.load(head)
    layers = [(weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]
    expected = aesthetic_by_hand(transformers_folder, layers, media)
    got = scores(rewards("aesthetic"), ["a", "b", "c"], media)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert len(set(got.tolist())) == 3
    same = scores(rewards("aesthetic"), ["anything"] * 3, media)
    assert torch.equal(got, same), "the prompt does not count"


def test_aesthetic_takes_the_older_linear_head(transformers_folder, tmp_path):
    linear = torch.nn.Linear(EMBEDDING, 1)
    torch.save(linear.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    reward = create(
        "aesthetic", checkpoint=str(tmp_path / "sa_0_4_vit_l_14_linear.pth"), params={"clip": str(transformers_folder)}
    )
    media = pictures(3, 45, 60)
    expected = aesthetic_by_hand(transformers_folder, [(linear.weight, linear.bias)], media)
    torch.testing.assert_close(scores(reward, ["a"] * 3, media), expected.detach(), atol=2e-6, rtol=0)


# --- ImageReward's forward pass, from its description


def blip_image_by_timm(weights, pixels):
    """BLIP's image tower is timm's ViT, without its last projection."""
    import timm

    prefix = "blip.visual_encoder."
    vit = timm.models.VisionTransformer(
        img_size=tiny_blip.IMAGE_SIZE,
        patch_size=tiny_blip.PATCH,
        embed_dim=tiny_blip.VISION_WIDTH,
        depth=tiny_blip.LAYERS,
        num_heads=tiny_blip.VISION_WIDTH // 64,
        num_classes=0,
    ).eval()
    vit.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)})
    return vit.forward_features(pixels)


def blip_text_by_hand(weights, ids, mask, seen):
    """BERT, post-norm, with cross attention to `seen` between self attention and the feed-forward layer; no causal mask."""
    width = tiny_blip.TEXT_WIDTH

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        return functional.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12)

    def attend(name, x, others, bias):
        query, key, value = (
            linear(f"{name}.self.{part}", source).unflatten(-1, (width // 64, 64)).transpose(1, 2)
            for part, source in (("query", x), ("key", others), ("value", others))
        )
        attention = (query @ key.transpose(-1, -2) / 8 + bias).softmax(dim=-1)
        together = (attention @ value).transpose(1, 2).flatten(2)
        return norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", together) + x)

    prefix = "blip.text_encoder."
    x = weights[prefix + "embeddings.word_embeddings.weight"][ids]
    x = x + weights[prefix + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(prefix + "embeddings.LayerNorm", x)
    bias = (1 - mask[:, None, None, :].float()) * -10000.0
    for layer in range(tiny_blip.LAYERS):
        block = f"{prefix}encoder.layer.{layer}"
        x = attend(f"{block}.attention", x, x, bias)
        x = attend(f"{block}.crossattention", x, seen, 0.0)
        inner = functional.gelu(linear(f"{block}.intermediate.dense", x))
        x = norm(f"{block}.output.LayerNorm", linear(f"{block}.output.dense", inner) + x)
    return x


def word_pieces(word, vocabulary):
    """BERT's: the longest piece that is known, and so on."""
    pieces, mark = [], ""
    while word:
        length = next(n for n in range(len(word), 0, -1) if mark + word[:n] in vocabulary)
        pieces.append(mark + word[:length])
        word, mark = word[length:], "##"
    return pieces


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_image_reward_gives_the_published_score(rewards, blip, bert, batch_size):
    weights = torch.load(blip)
    prompts = [*PROMPTS, "many words " * 30]  # longer than the 35 tokens that are read
    media = pictures(len(prompts), 45, 60)
    rows = []
    vocabulary = {token: index for index, token in enumerate((bert / "vocab.txt").read_text().splitlines())}
    for prompt in prompts:
        row = [vocabulary[piece] for word in prompt.split() for piece in word_pieces(word, vocabulary)]
        rows.append([vocabulary["[CLS]"], *row[: TEXT_LENGTH - 2], vocabulary["[SEP]"]])
    ids = torch.tensor([row + [vocabulary["[PAD]"]] * (TEXT_LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (TEXT_LENGTH - len(row)) for row in rows])
    with torch.no_grad():
        seen = blip_image_by_timm(weights, openai_preprocessing(tiny_blip.IMAGE_SIZE)(media[:, 0], CPU))
        x = blip_text_by_hand(weights, ids, mask, seen)[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = x @ weights[f"mlp.layers.{layer}.weight"].T + weights[f"mlp.layers.{layer}.bias"]
        expected = (x[:, 0] - SCORE_MEAN) / SCORE_STD
    got = scores(rewards("image_reward", batch_size=batch_size), prompts, media)
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=0)
    assert got.std() > 1e-3


def test_blips_image_tower_has_its_own_epsilon(blip):
    """1e-6, in all its norms: seen on faint activations only."""
    weights = torch.load(blip)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[f"blip.visual_encoder.{name}"] *= 0.003
    pixels = torch.randn(2, 3, tiny_blip.IMAGE_SIZE, tiny_blip.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = vision_tower(weights)(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(seen, blip_image_by_timm(weights, pixels), atol=2e-5, rtol=0)


def test_image_reward_reads_the_prompt_and_sees_the_picture(rewards):
    media = pictures(2)
    got = scores(rewards("image_reward"), ["a red circle"] * 2 + ["a blue square"], torch.cat([media, media[:1]]))
    assert len(set(got.tolist())) == 3


# --- videos


@pytest.mark.parametrize(
    ("choice", "frames", "expected"),
    [
        ("first", 9, [0]),
        ("middle", 9, [4]),
        ("middle", 4, [2]),
        ("uniform:1", 9, [4]),
        ("uniform:3", 9, [1, 4, 7]),
        ("uniform:4", 53, [6, 19, 33, 46]),
        ("uniform:9", 9, list(range(9))),
        ("uniform:20", 3, [0, 1, 2]),
        ("all", 4, [0, 1, 2, 3]),
        *((choice, 1, [0]) for choice in ("first", "middle", "uniform:4", "all")),
    ],
)
def test_frames_are_chosen_as_stated(choice, frames, expected):
    assert Frames(choice, "clip").positions(frames) == expected
    media = pictures(2, 8, 8, frames=frames)
    assert torch.equal(Frames(choice, "clip").of(media), media[:, expected])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", ["last", "uniform", "uniform:0", "uniform:-1", "uniform:2.5", 4, "uniform:²"])
def test_other_choices_are_refused(rewards, kind, frames):
    with pytest.raises(ValueError, match=f"{kind}: frames is .*first, middle, all, or uniform:N"):
        rewards(kind, frames=frames)


def test_a_choice_of_frames_can_be_given_on_the_command_line():
    from fastvideo_grpo.config import files as config_files
    from fastvideo_grpo.config.loading import reward_params

    assert reward_params("clip", ["frames=uniform:4"]) == {"frames": "uniform:4"}
    assert config_files.parse("frames: uniform:4").plain() == {"frames": "uniform:4"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_videos_score_is_the_mean_over_its_frames(rewards, kind):
    video = pictures(2, frames=5)
    prompts = ["a red circle", "white dog"]
    by_default = rewards(kind)
    alone = torch.stack([scores(by_default, prompts, video[:, [i]]) for i in range(5)], dim=1)
    assert alone.std(dim=1).min() > 1e-5
    torch.testing.assert_close(scores(by_default, prompts, video), alone[:, 2], atol=2e-6, rtol=0)
    for choice, expected in (("uniform:2", alone[:, [1, 3]].mean(1)), ("all", alone.mean(1))):
        got = scores(rewards(kind, frames=choice, batch_size=3), prompts, video)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


# --- parameters and devices


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_out_of_range_are_refused(rewards, kind):
    wrong = [{"batch_size": 0}, {"batch_size": True}]
    wrong += [{"precision": "fp16"}] if kind != "image_reward" else []
    wrong += [{"logit_scale": 1}] if kind == "pickscore" else []
    for params in wrong:
        with pytest.raises(ValueError, match=f"{kind}: {next(iter(params))}"):
            rewards(kind, **params)


@pytest.mark.parametrize("kind", ["clip", "aesthetic"])
def test_bf16_is_near_fp32(rewards, kind):
    media = pictures(len(PROMPTS))
    half = rewards(kind, precision="bf16")
    weight = half.clip.model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(scores(half, PROMPTS, media), scores(rewards(kind), PROMPTS, media), atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_stays_fp32_under_the_callers_autocast(rewards, kind):
    reward, media = rewards(kind), pictures(len(PROMPTS))
    expected = scores(reward, PROMPTS, media)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores(reward, PROMPTS, media), expected)
    reward.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_cpus_scores(rewards, kind):
    media = pictures(len(PROMPTS))
    expected = scores(rewards(kind), PROMPTS, media)
    got = scores(rewards(kind).to("cuda"), PROMPTS, media)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)  # convolutions are TF32 by default


# --- files


def test_weights_are_found_in_every_published_form(open_clip_folder, transformers_folder, tmp_path):
    """safetensors, torch files, shards, a text tower under `text.`, the key `state_dict`, and names after `module.`."""
    from safetensors.torch import save_file
    from transformers import CLIPModel

    media = pictures(len(PROMPTS), 32, 32)
    weights = torch.load(open_clip_folder / "open_clip_pytorch_model.bin")
    tower = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
    custom_text = {("text." if name.startswith(tower) else "") + name: value for name, value in weights.items()}
    first = {name: value for name, value in weights.items() if name < "transformer.resblocks.1"}
    rest = {name: value for name, value in weights.items() if name not in first}

    def write(name, save, folder=open_clip_folder, old="open_clip_pytorch_model.bin"):
        to = shutil.copytree(folder, tmp_path / name)
        (to / old).unlink()
        save(to)
        return to

    def shards(to):
        places = dict.fromkeys(first, "a.bin") | dict.fromkeys(rest, "b.bin")
        torch.save(first, to / "a.bin")
        torch.save(rest, to / "b.bin")
        (to / "open_clip_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))

    forms = [
        write("safetensors", lambda to: save_file(custom_text, to / "open_clip_model.safetensors")),
        write("shards", shards),
        write("trained", lambda to: torch.save(
            {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}},
            to / "open_clip_pytorch_model.bin")),
        write("vector_scale", lambda to: torch.save(
            weights | {"logit_scale": weights["logit_scale"][None]}, to / "open_clip_pytorch_model.bin")),
        write("old_torch", lambda to: torch.save(
            weights, to / "open_clip_pytorch_model.bin", _use_new_zipfile_serialization=False)),
    ]  # fmt: skip
    expected = scores(create("clip", checkpoint=str(open_clip_folder)), PROMPTS, media)
    for form in forms:
        assert torch.equal(scores(create("clip", checkpoint=str(form)), PROMPTS, media), expected), form.name
    model = CLIPModel.from_pretrained(transformers_folder)
    old_names = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    forms = [
        write("sharded", lambda to: model.save_pretrained(to, max_shard_size="1MB"), transformers_folder, "model.safetensors"),
        write("bin", lambda to: torch.save(old_names, to / "pytorch_model.bin"), transformers_folder, "model.safetensors"),
    ]
    assert (forms[0] / "model.safetensors.index.json").is_file()
    expected = scores(create("pickscore", checkpoint=str(transformers_folder)), PROMPTS, media)
    for form in forms:
        assert torch.equal(scores(create("pickscore", checkpoint=str(form)), PROMPTS, media), expected), form.name


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-H-14-378-quickgelu", "ViT-L-14", "ViT-L-14-336", "ViT-B-32", "ViT-bigG-14"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_the_published_sizes_map_completely(name, custom_text):
    """open_clip builds its own model on the meta device; every tensor of it has a place in CLIPModel, and the reverse."""
    import open_clip
    from open_clip.model import CLIP, CustomTextCLIP

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        published = (CustomTextCLIP if custom_text else CLIP)(**config)
    weights = published.state_dict()
    assert ("text.token_embedding.weight" in weights) == custom_text
    model = clip_model(weights, quick_gelu=config.get("quick_gelu", False))
    count = {of: sum(parameter.numel() for parameter in of.parameters()) for of in (model, published)}
    assert count[model] == count[published]
    heads = model.config.vision_config.num_attention_heads, model.config.text_config.num_attention_heads
    vision = config["vision_cfg"]
    assert heads == (vision["width"] // vision.get("head_width", 64), config["text_cfg"]["heads"])
    assert model.config.vision_config.image_size == vision["image_size"]


@pytest.mark.parametrize("vit", ["timm", "text"])
def test_image_rewards_published_size_maps_completely(vit):
    """The shapes of ImageReward.pt: a ViT-L/16 at 224 pixels, and BERT-base with cross attention to its 1024 channels."""
    import timm
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        if vit == "timm":
            published = timm.models.VisionTransformer(
                img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16, num_classes=0
            )
            model = vision_tower({f"blip.visual_encoder.{name}": value for name, value in published.state_dict().items()})
            assert model.config.num_attention_heads == 16 and model.config.image_size == 224
        else:
            config = BertConfig(vocab_size=30524, is_decoder=True, add_cross_attention=True)
            weights = BertModel(config, add_pooling_layer=False).state_dict()
            published = None
            for name in weights:
                if ".crossattention.self.key.weight" in name or ".crossattention.self.value.weight" in name:
                    weights[name] = torch.empty(768, 1024)
            weights = {name: value for name, value in weights.items() if "token_type" not in name}
            model = text_encoder({f"blip.text_encoder.{name}": value for name, value in weights.items()})
            assert model.config.num_attention_heads == 12 and model.config.encoder_hidden_size == 1024
            assert set(model.state_dict()) == set(weights)
    if published:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in published.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_path_is_told_before_anything_is_loaded(rewards, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    where = {"clip": "DFN5B", "pickscore": "PickScore_v1", "aesthetic": "linearMSE.pth", "image_reward": "THUDM/ImageReward"}
    params = {"aesthetic": {"clip": str(tmp_path)}, "image_reward": {"tokenizer": str(tmp_path)}}.get(kind, {})
    with pytest.raises(FileNotFoundError, match=rf"{kind}: .*absent.*{where[kind]}"):
        create(kind, checkpoint=str(tmp_path / "absent"), params=params)
    if kind in ("clip", "pickscore"):
        with pytest.raises(FileNotFoundError, match=rf"{kind}: .*holds no CLIP: expected open_clip_config.*it is empty"):
            create(kind, checkpoint=str(tmp_path))
        (tmp_path / "README.md").write_text("")
        with pytest.raises(FileNotFoundError, match=r"found README\.md"):
            create(kind, checkpoint=str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"is a file; set it to the folder"):
            create(kind, checkpoint=str(tmp_path / "README.md"))
        with pytest.raises(FileNotFoundError, match=rf"{kind}: the tokenizer .* has no vocab\.json"):
            rewards(kind, tokenizer=str(tmp_path))
    else:
        with pytest.raises(FileNotFoundError, match="is a folder, it must be a file"):
            create(kind, checkpoint=str(tmp_path), params=params)
        other = {"aesthetic": ("clip", "openai/clip-vit-large-patch14"), "image_reward": ("tokenizer", "bert-base-uncased")}
        with pytest.raises(FileNotFoundError, match=other[kind][1]):
            rewards(kind, **{other[kind][0]: str(tmp_path)})


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_other_files_are_told_as_such(
    rewards, kind, open_clip_folder, transformers_folder, head, blip, bert, tmp_path
):
    sources = {
        "clip": open_clip_folder / "open_clip_pytorch_model.bin",
        "pickscore": transformers_folder / "model.safetensors",
        "aesthetic": head,
        "image_reward": blip,
    }
    source = sources[kind]
    where = {"clip": "DFN5B", "pickscore": "PickScore_v1", "aesthetic": "linearMSE.pth", "image_reward": "THUDM/ImageReward"}
    folder = shutil.copytree(source.parent, tmp_path / "copy") if kind in ("clip", "pickscore") else tmp_path
    file = folder / source.name
    checkpoint = folder if kind in ("clip", "pickscore") else file
    params = {"aesthetic": {"clip": str(transformers_folder)}, "image_reward": {"tokenizer": str(bert)}}.get(kind, {})
    content = source.read_bytes()
    other = json.dumps({"a": 1}).encode()
    cases = [(content[:length], f"{length} bytes") for length in (0, 3, 1000, len(content) - 1)]
    cases += [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"<!doctype html>", "doctype")]
    cases += [(other, "bytes")]
    for data, message in cases:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{kind}: .*{source.name}: expected .*{message}.*{where[kind]}"):
            create(kind, checkpoint=str(checkpoint), params=params)
    if source.suffix == ".safetensors":
        return
    file.unlink()
    for content, message in (([1], "found a list"), ({"model": 3, "epoch": 1}, "found a dict with the keys model, epoch")):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"expected a dict of tensors, {message}.*{where[kind]}"):
            create(kind, checkpoint=str(checkpoint), params=params)
    torch.save({"weights": torch.nn.Linear(1, 1)}, file)
    with pytest.raises(ValueError, match=r"torch\.load refuses"):
        create(kind, checkpoint=str(checkpoint), params=params)
    torch.save({"conv.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=rf"{kind}: .*(conv\.weight|no tensor).*{where[kind]}"):
        create(kind, checkpoint=str(checkpoint), params=params)


def test_a_missing_shard_is_named(transformers_folder, tmp_path):
    from transformers import CLIPModel

    folder = shutil.copytree(transformers_folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(transformers_folder).save_pretrained(folder, max_shard_size="1MB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"pickscore: .*lists {shard.name}, which is not there.*PickScore_v1"):
        create("pickscore", checkpoint=str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="no 'weight_map'"):
        read_weights(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_cfg"), "expected model_cfg with vision_cfg and text_cfg"),
        (
            lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="vit_base"),
            r"vision_cfg\.timm_model_name is 'vit_base'",
        ),
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="roberta"), r"text_cfg\.hf_model_name is 'roberta'"),
        (lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True), r"text_cfg\.no_causal_mask"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg"), r"vision_cfg\.pool_type is 'avg'"),
        (lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"clean": "canonicalize"}), r"tokenizer_kwargs"),
        (lambda c: c["model_cfg"].update(init_logit_bias=-10), r"model_cfg\.init_logit_bias is -10"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(image_size=64), "pictures of 32x32 pixels, .* says 64"),
        (lambda c: c["preprocess_cfg"].update(resize_mode="stretch"), r"resize_mode is 'stretch'"),
    ],
)
def test_other_models_of_open_clip_are_refused(open_clip_folder, tmp_path, change, message):
    folder = changed(open_clip_folder, tmp_path / "copy", change)
    with pytest.raises(ValueError, match=f"clip: .*{message}.*DFN5B"):
        create("clip", checkpoint=str(folder))


def test_settings_that_change_nothing_are_accepted(open_clip_folder, tmp_path):
    def change(config):
        config["model_cfg"]["vision_cfg"].update(timm_pool="avg", pool_type="tok", ls_init_value=None, patch_dropout=0.5)
        config["model_cfg"]["text_cfg"].update(pool_type="argmax", eos_id=2, no_causal_mask=False)
        config["model_cfg"]["custom_text"] = True

    folder = changed(open_clip_folder, tmp_path / "copy", change)
    media = pictures(len(PROMPTS))
    got, expected = (scores(create("clip", checkpoint=str(path)), PROMPTS, media) for path in (folder, open_clip_folder))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(model_type="siglip"), "expected model_type 'clip', found 'siglip'"),
        ("config.json", lambda c: c["text_config"].update(num_hidden_layers=3), "no tensor for text_model.encoder.layers.2"),
        ("config.json", lambda c: c["vision_config"].update(image_size=64), "do not give the 64x64 pixels"),
        ("config.json", lambda c: c["text_config"].update(eos_token_id=7), "needs 473 and 7"),
        ("preprocessor_config.json", lambda c: c.update(do_resize=False), "do_resize is false"),
    ],
)
def test_other_models_of_transformers_are_refused(transformers_folder, tmp_path, file, change, message):
    folder = changed(transformers_folder, tmp_path / "copy", change, file)
    with pytest.raises(ValueError, match=message.replace("473", r"\d+")):
        create("pickscore", checkpoint=str(folder))


def test_clip_wants_to_know_how_pictures_are_prepared(transformers_folder, tmp_path):
    folder = shutil.copytree(transformers_folder, tmp_path / "copy")
    described = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        create("clip", checkpoint=str(folder))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    media = pictures(len(PROMPTS))
    got, expected = (scores(create("clip", checkpoint=str(path)), PROMPTS, media) for path in (folder, transformers_folder))
    assert torch.equal(got, expected)


def test_a_head_for_another_clip_is_refused(transformers_folder, tmp_path):
    for name, weights, message in (
        ("wide", tiny_blip.head_weights(768), "768"),
        ("two", {"weight": torch.zeros(2, EMBEDDING), "bias": torch.zeros(2)}, "gives 2 numbers"),
        ("relu", {"layers.0.weight": torch.zeros(8, EMBEDDING), "layers.3.weight": torch.zeros(1, 8)}, r"found 2: layers\.0"),
    ):
        torch.save(weights, tmp_path / name)
        with pytest.raises(ValueError, match=f"aesthetic: .*{message}.*linearMSE"):
            create("aesthetic", checkpoint=str(tmp_path / name), params={"clip": str(transformers_folder)})


def test_image_reward_refuses_another_vocabulary_and_incomplete_weights(blip, bert, tmp_path):
    shorter = shutil.copytree(bert, tmp_path / "bert")
    (shorter / "vocab.txt").write_text("\n".join((bert / "vocab.txt").read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(
        ValueError, match=r"image_reward: the tokenizer .*bert has \d+ tokens; .* needs \d+; .*bert-base-uncased"
    ):
        create("image_reward", checkpoint=str(blip), params={"tokenizer": str(shorter)})
    weights = torch.load(blip)
    for name in (
        "blip.text_encoder.encoder.layer.1.crossattention.self.query.bias",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
    ):
        torch.save({key: value for key, value in weights.items() if key != name}, tmp_path / "cut.pt")
        with pytest.raises(ValueError, match=r"no tensor for .*layers?\.1\..*bias"):
            create("image_reward", checkpoint=str(tmp_path / "cut.pt"), params={"tokenizer": str(bert)})


# --- fastvideo-grpo tiny clip


@pytest.mark.parametrize("layout", tiny_clip.LAYOUTS)
def test_the_command_writes_a_tiny_clip(tmp_path, capsys, layout):
    folder = tmp_path / "clip"
    assert main(["tiny", "clip", "--out", str(folder), "--layout", layout]) == 0
    scores(create("clip", checkpoint=str(folder)), ["a"], pictures(1))
    assert (folder / "open_clip_config.json").is_file() == (layout == "open_clip")
    assert main(["tiny", "clip", "--out", str(folder), "--layout", layout]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(["tiny", "clip", "--out", str(folder), "--layout", layout, "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert main(["tiny", "clip", "--out", str(tmp_path / "mine"), "--overwrite"]) == 1
    assert "something else than a CLIP" in capsys.readouterr().err


def test_open_clip_is_no_dependency_of_a_run():
    import ast
    from pathlib import Path

    import fastvideo_grpo

    for path in Path(fastvideo_grpo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == "open_clip" or name.startswith("open_clip.") for name in names), path


def test_a_random_model_is_the_same_for_the_same_seed():
    first, again, other = (open_clip_weights(50, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
