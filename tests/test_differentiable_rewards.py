"""Rewards with a gradient: they agree with `score`, their gradients are right, and what has none is refused with its key."""

import importlib.metadata
import math
import threading

import pytest
import torch
from torch.nn import functional

from fastvideo_grpo import extensions
from fastvideo_grpo.rewards import registry
from fastvideo_grpo.rewards.base import DifferentiableReward, RewardRequest, RewardResult
from fastvideo_grpo.rewards.media.preprocessing import HPSPreprocessing, Image, Preprocessing
from fastvideo_grpo.rewards.placement.inline import InlineReward
from fastvideo_grpo.rewards.registry import create, kinds, register
from fastvideo_grpo.rewards.reward_set import RewardSet, check_differentiable
from fastvideo_grpo.rewards.rules.colour_match import PALETTE
from fastvideo_grpo.tiny import image_reward as tiny_blip
from fastvideo_grpo.tiny import shapes
from fastvideo_grpo.tiny.clip import EMBEDDING, write_clip, write_hps

PROMPTS = ["a red circle", "two blue squares over the sea", "a green dog", "cyan"]
CLIP_KINDS = ["hps", "clip", "pickscore", "aesthetic", "image_reward"]
KINDS = [*CLIP_KINDS, "colour_distance"]
# Wide, tall, square, smaller than the network's pictures, with odd and even margins.
SHAPES = [(40, 56), (71, 53), (32, 32), (20, 24), (64, 37), (90, 91)]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """A function that makes a reward of a kind on its tiny checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    clip, pickscore = write_clip(folder / "clip"), write_clip(folder / "pickscore", layout="transformers", quick_gelu=False)
    torch.save(tiny_blip.head_weights(EMBEDDING), folder / "head.pth")
    bert = tiny_blip.write_bert_tokenizer(folder / "bert")
    given = {
        "hps": (write_hps(folder / "hps.pt", pickscore), {"tokenizer": str(pickscore)}),
        "clip": (clip, {}),
        "pickscore": (pickscore, {}),
        "aesthetic": (folder / "head.pth", {"clip": str(pickscore)}),
        "image_reward": (tiny_blip.write_image_reward(folder / "blip.pt", bert), {"tokenizer": str(bert)}),
    }

    def make(kind, **params):
        checkpoint, own = given.get(kind, (None, {}))
        return create(kind, checkpoint=checkpoint and str(checkpoint), params={**own, **params})

    return make


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch):
    """Those of the package, whatever other tests of this process have registered, and put back afterwards."""
    kinds()
    own = {kind: made for kind, made in registry.REWARDS._registered.items() if made.__module__.startswith("fastvideo_grpo.")}
    monkeypatch.setattr(registry.REWARDS, "_registered", own)


def smooth(count, height=40, width=56, frames=1, seed=0):
    """Random smooth pictures, float [count, frames, height, width, 3] in 0.05..0.95."""
    coarse = torch.rand(count * frames, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pictures = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (0.05 + 0.9 * pictures).permute(0, 2, 3, 1).reshape(count, frames, height, width, 3).contiguous()


def in_bytes(pixels):
    return (pixels * 255).round().to(torch.uint8)


def exact(reward, pixels, prompts):
    return reward.score(RewardRequest(prompts, in_bytes(pixels))).scores[reward.outputs[0]]


def differentiable(reward, pixels, prompts):
    (scores,) = reward.score_differentiably(pixels, prompts, [{} for _ in prompts]).values()
    return scores


def gradient(reward, pixels, prompts):
    pixels = pixels.clone().requires_grad_()
    return torch.autograd.grad(differentiable(reward, pixels, prompts).sum(), pixels)[0]


# --- preparation


@pytest.mark.parametrize("chosen", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(
    "how",
    [
        {"resize": "shortest"},
        {"resize": "shortest", "resize_to": 37, "crop": "transformers"},
        {"resize": "squash", "resize_to": 37},
        {"resize": "longest", "fill": 90},
    ],
)
def test_the_differentiable_preparation_is_the_published_one_without_its_rounding(how, chosen):
    """On noise, whose edges are as sharp as can be: where PIL cuts off, this does."""
    plain = Preprocessing(32, filter=chosen, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **how)
    for shape in SHAPES:
        media = torch.randint(0, 256, (2, *shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        apart = 255 * (plain.differentiable(media / 255) - plain(media, torch.device("cpu")))
        assert apart.abs().max() < 1.3 and apart.square().mean().sqrt() < 0.45, shape


def test_hps_has_one_preparation_for_bytes_and_for_numbers():
    media = in_bytes(smooth(2))[:, 0]
    prepare = HPSPreprocessing(32)
    assert torch.equal(prepare(media, torch.device("cpu")), prepare.differentiable(media / 255))


@pytest.mark.parametrize("prepare", [Preprocessing(16), Preprocessing(16, "longest"), HPSPreprocessing(16)])
def test_every_part_of_the_picture_that_is_kept_has_a_gradient(prepare):
    pixels = smooth(1, 24, 24)[:, 0].requires_grad_()
    prepare.differentiable(pixels).square().sum().backward()
    assert (pixels.grad.abs().sum(dim=-1) > 0).all()


# --- scores and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 56), (32, 32)])
def test_the_differentiable_score_is_the_score(rewards, kind, shape):
    """On the same bytes, and on pictures before they are rounded to bytes, to 10 % of what random pictures differ by (up to 5 %
    were measured; where nothing is resized, and for HPS, the same bytes give the same score)."""
    reward, pixels = rewards(kind), smooth(len(PROMPTS), *shape)
    expected = exact(reward, pixels, PROMPTS)
    for given in (in_bytes(pixels) / 255, pixels):
        got = differentiable(reward, given, PROMPTS)
        assert got.dtype == torch.float32 and got.shape == (len(PROMPTS),)
        assert (got - expected).abs().max() < 0.1 * expected.std()
    if kind == "hps" or shape == (32, 32):
        torch.testing.assert_close(differentiable(reward, in_bytes(pixels) / 255, PROMPTS), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_score(rewards, kind):
    """Central differences along the gradient and along random directions."""
    reward, pixels = rewards(kind), smooth(1)
    slope = gradient(reward, pixels, PROMPTS[:1])
    generator = torch.Generator().manual_seed(2)
    uphill = slope / slope.norm()
    for direction in (uphill, (uphill + functional.normalize(torch.randn(slope.shape, generator=generator).flatten(), dim=0)
                               .view_as(slope)) / 2**0.5):  # fmt: skip
        step = 0.05 * direction
        with torch.no_grad():
            up, down = (differentiable(reward, pixels + sign * step, PROMPTS[:1]) for sign in (1, -1))
        assert (up - down).item() / 0.1 == pytest.approx((slope * direction).sum().item(), rel=0.02)
    assert slope.norm() > 1e-3


def test_pickscores_factor_and_the_mean_over_frames_are_in_the_gradient(rewards):
    plain, scaled = rewards("pickscore", frames="all"), rewards("pickscore", frames="all", logit_scale=True)
    pixels = smooth(1, frames=3)
    own = gradient(plain, pixels, ["a"])
    torch.testing.assert_close(gradient(scaled, pixels, ["a"]), scaled.factor * own, rtol=1e-4, atol=1e-5)
    alone = torch.stack([gradient(plain, pixels[:, [frame]], ["a"])[0, 0] for frame in range(3)])
    torch.testing.assert_close(own[0], alone / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_only_the_chosen_frames_and_no_weights_get_a_gradient(rewards, kind):
    reward = rewards(kind, frames="first", batch_size=1)
    pixels = smooth(2, frames=2).requires_grad_()
    differentiable(reward, pixels, PROMPTS[:2]).sum().backward()
    assert pixels.grad[:, 0].abs().sum(dim=(1, 2, 3)).min() > 0 and not pixels.grad[:, 1].any()
    parts = [getattr(reward.clip, "model", None)] if hasattr(reward, "clip") else [reward.vision, reward.text]
    parameters = [parameter for part in [*parts, getattr(reward, "head", None)] if part for parameter in part.parameters()]
    assert parameters and not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_score_itself_keeps_no_graph_and_the_callers_autocast_changes_nothing(rewards, kind):
    reward, pixels = rewards(kind), smooth(2)
    assert not exact(reward, pixels, PROMPTS[:2]).requires_grad
    expected = gradient(reward, pixels, PROMPTS[:2])
    pixels.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = differentiable(reward, pixels, PROMPTS[:2])
    assert torch.equal(torch.autograd.grad(scores.sum(), pixels)[0], expected)  # a backward pass belongs outside of an autocast


@pytest.mark.parametrize("kind", ["hps", "clip"])
def test_bf16_has_a_gradient_near_that_of_fp32(rewards, kind):
    pixels = smooth(2)
    half, full = (gradient(rewards(kind, precision=precision), pixels, PROMPTS[:2]) for precision in ("bf16", "fp32"))
    assert functional.cosine_similarity(half.flatten(1), full.flatten(1)).min() > 0.95


# --- colour_distance


def drawn(count=200, seed=1):
    """Pictures of tiny/shapes.py, uint8 [count, 1, 32, 32, 3], and the colour of each."""
    pictures, captions = shapes.dataset(count, seed=seed)
    return torch.from_numpy(pictures)[:, None], [shapes.COLOURS[caption // len(shapes.SHAPES)] for caption in captions]


def distance_scores(media, colours, kind="colour_distance", **params):
    result = create(kind, params=params).score(RewardRequest([f"a {colour} thing" for colour in colours], media))
    assert result.valid.all()
    return result.scores[kind]


def block(colour, rows, grey=120):
    """A grey picture whose first rows have the colour."""
    media = torch.full((1, 1, 32, 32, 3), grey, dtype=torch.uint8)
    media[:, :, :rows] = torch.tensor(PALETTE[colour], dtype=torch.uint8)
    return media


def test_the_right_colour_is_well_above_every_other_and_none():
    media, colours = drawn()
    right = distance_scores(media, colours)
    assert right.min() > -0.13 and right.max() < -0.015
    names = list(PALETTE)
    for shift in range(1, len(names)):
        others = [names[(names.index(colour) + shift) % len(names)] for colour in colours]
        assert (right - distance_scores(media, others)).min() > 0.14
    bare = media.float().mean(dim=-1, keepdim=True).expand_as(media).to(torch.uint8)
    assert (right - distance_scores(bare, colours)).min() > 0.14


@pytest.mark.parametrize("colour", PALETTE)
def test_a_flood_of_the_colour_is_worse_than_a_shape(colour):
    flood, shape, bare = (distance_scores(block(colour, rows), [colour]).item() for rows in (32, 6, 0))
    assert flood < shape - 0.2 and flood == pytest.approx(-0.32, abs=0.02) and shape > -0.04 and bare < -0.25
    assert distance_scores(block(colour, 32), [colour], max_area=1.0).item() == pytest.approx(0, abs=0.001)


def test_more_area_gains_little_and_a_spot_is_no_thing():
    by_rows = {rows: distance_scores(block("red", rows), ["red"]).item() for rows in (0, 1, 3, 10, 12)}
    assert by_rows[0] < by_rows[1] < by_rows[3] < by_rows[10] <= by_rows[12] + 0.01
    assert by_rows[12] - by_rows[3] < 0.05 and by_rows[12] - by_rows[1] > 0.1
    spot = block("red", 0)
    spot[..., 0, :2, :] = torch.tensor(PALETTE["red"], dtype=torch.uint8)
    assert distance_scores(spot, ["red"]).item() - by_rows[0] < 0.04


def test_tints_noise_and_two_colours_do_not_win():
    whole = distance_scores(block("red", 8), ["red"]).item()
    tint = (block("red", 0).float() + 0.3 * (block("red", 32).float() - block("red", 0).float())).to(torch.uint8)
    noise = torch.randint(0, 256, (1, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = block("red", 8)
    both[:, :, 16:24] = torch.tensor(PALETTE["blue"], dtype=torch.uint8)
    for media, lost in ((tint, 0.15), (noise, 0.4), (both, 0.2)):
        assert distance_scores(media, ["red"]).item() < whole - lost


def test_form_is_not_looked_at_as_the_docstring_says():
    stripes = block("red", 0)
    stripes[:, :, ::4] = torch.tensor(PALETTE["red"], dtype=torch.uint8)
    assert distance_scores(stripes, ["red"]) == pytest.approx(distance_scores(block("red", 8), ["red"]), abs=1e-5)


def test_its_gradient_is_exact_and_there_on_grey_too():
    reward, generator = create("colour_distance"), torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 2, 3, 4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: differentiable(reward, given, ["a red dog", "cyan"]), pixels)
    at_the_colour = (torch.tensor(PALETTE["red"], dtype=torch.float64) / 255).expand(1, 1, 2, 2, 3)
    assert gradient(reward, at_the_colour, ["red"]).isfinite().all()
    grey = torch.full((1, 1, 8, 8, 3), 0.5)
    slope = gradient(reward, grey, ["red"])
    assert (slope[..., 0] > 0).all() and (slope[..., 1:] < 0).all()


def test_climbing_it_wins_colour_match_too():
    """From pictures of another colour and from almost grey ones: 100 steps on the pixels."""
    media, colours = drawn(12)
    names = list(PALETTE)
    asked = [names[(names.index(colour) + 1) % len(names)] for colour in colours]
    bare = media.float().mean(dim=-1, keepdim=True)
    faint = (bare + 0.25 * (media - bare)).to(torch.uint8)
    reward = create("colour_distance")
    for start, wanted in ((media, asked), (faint, colours)):
        pixels = start / 255
        for _ in range(100):
            pixels = (pixels + 5 * gradient(reward, pixels, wanted)).clamp(0, 1)
        before, after = (distance_scores(given, wanted, "colour_match") for given in (start, in_bytes(pixels)))
        assert before.max() < 0.1 and after.min() > 0.9
        assert (distance_scores(in_bytes(pixels), wanted) > distance_scores(start, wanted) + 0.1).all()


def test_frames_are_averaged_and_prompts_without_one_colour_are_invalid():
    reward, clip = create("colour_distance"), torch.cat([block("red", 8), block("blue", 8)], dim=1)
    apart = [distance_scores(clip[:, [frame]], ["red"]).item() for frame in range(2)]
    assert distance_scores(clip, ["red"]).item() == pytest.approx(sum(apart) / 2)
    prompts = ["a circle", "red and blue", "a Red circle"]
    result = reward.score(RewardRequest(prompts, clip.expand(3, -1, -1, -1, -1)))
    assert result.valid.tolist() == [False, False, True] and "exactly one of red" in result.invalid_because
    pixels = (clip / 255).repeat(3, 1, 1, 1, 1).requires_grad_()
    scores = differentiable(reward, pixels, prompts)
    assert scores.isnan().tolist() == [True, True, False]
    scores.nansum().backward()
    assert not pixels.grad[:2].any() and pixels.grad[2].any() and pixels.grad.isfinite().all()


@pytest.mark.parametrize("params", [{"saturation": 0}, {"saturation": 256}, {"max_area": 0}, {"max_area": True}])
def test_colour_distance_refuses_other_parameters(params):
    with pytest.raises(ValueError, match=f"colour_distance: {next(iter(params))} is"):
        create("colour_distance", params=params)


def test_check_reward_sees_that_it_sees_wrong_prompts(tmp_path, capsys):
    from fastvideo_grpo import cli

    (tmp_path / "run.yaml").write_text(
        "model: {path: nowhere}\nprompts: {path: nowhere.txt}\nrun: {dir: nowhere}\n"
        "rewards: {models: {it: {kind: colour_distance}}}\n"
    )
    assert cli.main(["check-reward", str(tmp_path / "run.yaml")]) == 0
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert float(rows["untouched"][0]) > -0.15 and rows["with another's prompt"][1] not in ("0%", "")


# --- which kinds


def test_kinds_with_a_gradient_are_known_without_making_one(monkeypatch):
    assert registry.differentiable_kinds() == sorted(KINDS)
    assert all(registry.differentiable(kind) == (kind in KINDS) for kind in kinds())
    points = [("outside", "fastvideo_grpo.rewards.rules.colour_distance:ColourDistance"), ("broken", "no_such_package:Reward")]
    points = [importlib.metadata.EntryPoint(*point, registry.REWARDS.group) for point in points]
    monkeypatch.setattr(extensions, "entry_points", lambda group: points)
    assert registry.differentiable("outside") and "outside" in registry.differentiable_kinds()
    register("made")(lambda: create("colour_distance"))
    assert not registry.differentiable("made"), "a function's reward is not known before it is made"
    with pytest.raises(ValueError, match=r"unknown reward kind 'colour_distanc'.*did you mean 'colour_distance'"):
        registry.differentiable("colour_distanc")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "jpeg_size"}, r"rewards.models.it.kind is 'jpeg_size'.*one: .*colour_distance.*hps.*weight=0"),
        ({"kind": "nothing"}, "rewards.models.it: unknown reward kind 'nothing'"),
        ({"kind": "hps", "placement": "process"}, "rewards.models.it.placement is 'process'.*set it to inline"),
        ({"kind": "hps", "placement": "http", "url": "http://127.0.0.1:1"}, "rewards.models.it.placement is 'http'"),
        (
            {"kind": "clip", "outputs": {"clip": {"threshold": 0.3}}},
            "rewards.models.it.outputs.clip.threshold is 0.3.*remove it.*weight=0",
        ),
    ],
)
def test_an_entry_without_a_gradient_is_refused_with_its_key(entry, message):
    with pytest.raises(ValueError, match=message):
        check_differentiable("it", entry)


def test_entries_with_a_gradient_and_those_that_are_only_watched_pass():
    watched = {"weight": 0.0, "threshold": 0.5}
    for entry in (
        {"kind": "colour_distance"},
        {"kind": "clip", "outputs": {"clip": {"affine": [2.0, 0.0], "clamp": [0.0, 1.0], "invert": True}}},
        {"kind": "jpeg_size", "outputs": {"jpeg_size": watched}},
        {"kind": "hps", "placement": "process", "outputs": {"hps": watched}},
    ):
        check_differentiable("it", entry)


# --- the set


class Scripted:
    """Two outputs: the mean of the picture times a weight, and its square."""

    outputs, media_kind = ("mean", "square"), "any"

    def __init__(self, *, answer=None):
        self.weight = torch.nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.answer, self.asked, self.moves = answer, [], []

    def score(self, request):
        zeros = torch.zeros(len(request))
        return RewardResult({"mean": zeros, "square": zeros}, zeros == 0)

    def score_differentiably(self, pixels, prompts, metadata):
        assert pixels.dtype == torch.float32, "whatever the set was given"
        self.asked.append((threading.current_thread(), prompts, metadata, list(self.moves)))
        if self.answer is not None:
            return self.answer(pixels)
        mean = self.weight * pixels.mean(dim=(1, 2, 3, 4))
        return {"mean": mean, "square": mean * mean * self.weight}

    def to(self, device):
        self.moves.append(str(device))
        return self

    def close(self):
        pass


@pytest.fixture
def scripted():
    register("scripted")(Scripted)

    def make(answer=None, *, offload_idle=False, **entry):
        return RewardSet({"it": {"kind": "scripted", "params": {"answer": answer}, **entry}}, offload_idle=offload_idle)

    return make


def test_a_set_gives_transformed_scores_of_what_counts_with_gradients(scripted):
    outputs = {"mean": {"affine": [2.0, 1.0], "invert": True}, "square": {"weight": 0.0}}
    rewards = scripted(outputs=outputs)
    pixels = smooth(3).to(torch.float64).requires_grad_()
    scores = rewards.differentiable(pixels, ["a", "b", "c"], [{"n": i} for i in range(3)])
    assert list(scores) == ["it/mean"] and scores["it/mean"].dtype == torch.float32
    torch.testing.assert_close(scores["it/mean"], -(6 * pixels.mean(dim=(1, 2, 3, 4)) + 1).float())
    scores["it/mean"][1].backward()
    torch.testing.assert_close(pixels.grad[1], torch.full_like(pixels[1], -6 / pixels[1].numel()))
    assert not pixels.grad[[0, 2]].any()
    (thread, prompts, metadata, _) = rewards.rewards["it"].reward.asked[0]
    assert thread is threading.current_thread()
    assert (prompts, metadata) == (["a", "b", "c"], [{"n": 0}, {"n": 1}, {"n": 2}])
    rewards.close()


def test_a_clamp_keeps_the_gradient_within_and_rewards_of_weight_0_are_not_asked(scripted):
    rewards = scripted(outputs={"mean": {"clamp": [0.0, 1.5]}})
    pixels = torch.stack([torch.full((1, 4, 4, 3), value) for value in (0.2, 0.9)]).requires_grad_()
    rewards.differentiable(pixels, ["a", "b"], [])["it/mean"].sum().backward()
    assert pixels.grad[0].all() and not pixels.grad[1].any()
    watched = scripted(lambda pixels: pytest.fail("was asked"), outputs={"mean": {"weight": 0.0}})
    assert watched.differentiable(pixels, ["a", "b"], []) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_without_a_score_is_nan_and_sends_no_gradient(scripted, bad):
    def answer(pixels):
        mean = pixels.mean(dim=(1, 2, 3, 4))
        return {"mean": torch.where(torch.tensor([True, False]), mean, bad), "square": mean}

    pixels = smooth(2).requires_grad_()
    scores = scripted(answer).differentiable(pixels, ["a", "b"], [])
    assert scores["it/mean"].isnan().tolist() == [False, True] and scores["it/square"].isfinite().all()
    scores["it/mean"].nansum().backward()
    assert pixels.grad[0].any() and not pixels.grad[1].any()


def test_a_reward_that_leaves_the_device_has_no_gradient(scripted):
    with pytest.raises(ValueError, match=r"offload_idle is true.*use false"):
        scripted(offload_idle=True).differentiable(smooth(2).requires_grad_(), ["a", "b"], [])


def test_prompts_that_no_sample_can_be_judged_by_are_no_error():
    rewards = RewardSet({"it": {"kind": "colour_distance"}})
    scores = rewards.differentiable(smooth(2).requires_grad_(), ["a dog", "a cat"], [])
    assert scores["it/colour_distance"].isnan().all()
    pixels = smooth(2).requires_grad_()
    scores = rewards.differentiable(pixels, ["a dog", "red"], [])["it/colour_distance"]
    scores.nansum().backward()
    assert not pixels.grad[0].any() and pixels.grad[1].any() and pixels.grad.isfinite().all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda pixels: {"mean": pixels.mean(dim=(1, 2, 3, 4))}, "it/square: .*lacks the output; it has mean"),
        (lambda pixels: {}, "it/mean: .*lacks the output; it has none"),
        (lambda pixels: {"mean": pixels.mean()}, r"it/mean: .*float32 \[\]; it must be floating \[2\]"),
        (lambda pixels: {"mean": 0.5}, r"it/mean: .*gave float; it must be floating \[2\]"),
        (lambda pixels: {"mean": torch.zeros(2, dtype=torch.long)}, r"int64 \[2\]; it must be floating"),
        (lambda pixels: {"mean": pixels.detach().mean(dim=(1, 2, 3, 4))}, "it/mean: .*carry no gradient"),
    ],
)
def test_answers_of_the_wrong_form_are_refused_by_name(scripted, answer, message):
    with pytest.raises(ValueError, match=message):
        scripted(answer).differentiable(smooth(2).requires_grad_(), ["a", "b"], [])


def test_what_a_reward_raises_passes_through_with_its_name(scripted):
    def answer(pixels):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no") as caught:
        scripted(answer).differentiable(smooth(1), ["a"], [])
    assert "the reward it " in caught.value.__notes__[0]


def test_media_of_another_form_are_refused(scripted):
    rewards = scripted()
    with pytest.raises(ValueError, match=r"uint8 \[2, 1, 40, 56, 3\]; they must be floating"):
        rewards.differentiable(in_bytes(smooth(2)), ["a", "b"], [])
    with pytest.raises(ValueError, match=r"float32 \[2, 40, 56, 3\]; they must be"):
        rewards.differentiable(smooth(2)[:, 0], ["a", "b"], [])
    with pytest.raises(ValueError, match="1 prompts and 1 metadata entries for 2 samples"):
        rewards.differentiable(smooth(2), ["a"], [])


def test_a_set_without_gradients_says_what_its_configuration_lacks(scripted):
    pixels = smooth(1)
    with pytest.raises(ValueError, match=r"rewards\.models\.it\.kind is 'jpeg_size'"):
        RewardSet({"it": {"kind": "jpeg_size"}}).differentiable(pixels, ["a"], [])
    with pytest.raises(ValueError, match=r"rewards\.models\.it\.outputs\.mean\.threshold is 0\.5"):
        scripted(outputs={"mean": {"threshold": 0.5}}).differentiable(pixels, ["a"], [])
    http = RewardSet({"it": {"kind": "hps", "placement": "http", "url": "http://127.0.0.1:1"}}, elsewhere={"it": ("hps",)})
    with pytest.raises(RuntimeError, match="with another process"):
        http.differentiable(pixels, ["a"], [])
    with pytest.raises(TypeError, match="JpegSize has no score_differentiably"):
        InlineReward(create("jpeg_size")).score_differentiably(pixels, ["a"], [{}])


def test_the_rewards_are_differentiable_ones(rewards):
    for kind in KINDS:
        assert isinstance(rewards(kind), DifferentiableReward)
    assert not isinstance(create("jpeg_size"), DifferentiableReward)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_cpus_gradient(rewards, kind):
    pixels = smooth(2)
    expected = gradient(rewards(kind), pixels, PROMPTS[:2]).flatten(1)
    inline = InlineReward(rewards(kind), device="cuda")
    got = gradient(inline, pixels.to("cuda"), PROMPTS[:2]).cpu().flatten(1)
    assert functional.cosine_similarity(got, expected).min() > 0.99  # convolutions are TF32 by default
    inline.close()
