"""Prompts with images: their files, how images are read and brought to size, and what is found before training."""

import hashlib
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo_grpo.engines.parallel import World
from fastvideo_grpo.prompts import images
from fastvideo_grpo.prompts.files import Prompt, PromptFileError, read_prompts, text_id
from fastvideo_grpo.prompts.images import check_images, image_digest, load_image


def _write(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def _noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _ramp(height, width):
    """Red grows to the right, green downwards: what was cut off can be read from the corners."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.zeros_like(red)], -1).round().astype(np.uint8)


# --- prompt files -----------------------------------------------------------------------------------------------------


def test_image_and_negative_prompt_are_read(tmp_path):
    elsewhere = str(tmp_path / "far" / "b.png")
    file = _write(
        tmp_path / "a.jsonl",
        {"prompt": "a cat", "image": "images/a.png", "negative_prompt": "blur", "style": "ink"},
        {"prompt": "a dog", "image": elsewhere, "id": 7},
    )
    cat, dog = read_prompts(file, images=True)
    assert cat.image == tmp_path / "images" / "a.png" and str(dog.image) == elsewhere
    assert (cat.negative_prompt, dog.negative_prompt) == ("blur", None)
    assert cat.metadata == {"style": "ink"} and dog.metadata == {} and dog.id == "7"


def test_without_images_an_image_is_metadata_and_the_id_is_the_texts(tmp_path):
    (prompt,) = read_prompts(_write(tmp_path / "a.jsonl", {"prompt": "a cat", "image": 5, "negative_prompt": ""}))
    assert prompt == Prompt(text_id("a cat"), "a cat", negative_prompt="")
    assert prompt.metadata == {"image": 5}


def test_one_text_with_two_images_is_two_prompts(tmp_path):
    entries = [{"prompt": "a cat", "image": "a.png"}, {"prompt": "a cat", "image": "b.png"}]
    first, second = read_prompts(_write(tmp_path / "a.jsonl", *entries), images=True)
    assert len({first.id, second.id, text_id("a cat")}) == 3
    (tmp_path / "other").mkdir()  # the entry counts as it is written, not where the file lies
    assert read_prompts(_write(tmp_path / "other" / "a.jsonl", *entries), images=True)[0].id == first.id
    assert read_prompts(_write(tmp_path / "a.jsonl", entries[0], entries[0]), images=True) == [first]
    with pytest.raises(PromptFileError, match=r"a\.jsonl:2.*line 1 already, with another image"):
        read_prompts(tmp_path / "other" / "a.jsonl")


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.txt", "# a\na cat\n", r"a\.txt:2: .*\{\"prompt\": \.\.\., \"image\": \.\.\.\}.*make-references"),
        ("a.jsonl", '{"prompt": "x", "image": "a.png"}\n{"prompt": "y"}\n', r"a\.jsonl:2: .*starts from an image.*make-ref"),
        ("a.jsonl", '{"prompt": "x", "image": null}', r"a\.jsonl:1: .*make-references"),
        ("a.jsonl", '{"prompt": "x", "image": 3}', r"a\.jsonl:1: \"image\" is 3"),
        ("a.jsonl", '{"prompt": "x", "image": " "}', r"a\.jsonl:1: \"image\" is ' '"),
        ("a.jsonl", '{"prompt": "x", "image": "a.png", "negative_prompt": 5}', r"a\.jsonl:1: \"negative_prompt\" is 5"),
    ],
)
def test_prompts_without_images_name_the_line_and_the_way_out(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompts(tmp_path / name, images=True)


def test_a_negative_prompt_that_is_no_text_is_always_an_error(tmp_path):
    with pytest.raises(PromptFileError, match=r"a\.jsonl:1.*negative_prompt"):
        read_prompts(_write(tmp_path / "a.jsonl", {"prompt": "x", "negative_prompt": ["blur"]}))


# --- reading and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff"])
def test_an_image_of_the_exact_size_comes_back_as_it_is(tmp_path, kind):
    pixels = _noise(24, 40)
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    loaded = load_image(tmp_path / f"a.{kind}", 24, 40)
    assert loaded.dtype == torch.uint8 and loaded.shape == (24, 40, 3) and loaded.is_contiguous()
    assert np.array_equal(loaded.numpy(), pixels)


def test_what_is_only_too_wide_or_too_tall_loses_whole_pixels_on_both_sides(tmp_path):
    pixels = _noise(24, 45)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert np.array_equal(load_image(tmp_path / "wide.png", 24, 40).numpy(), pixels[:, 2:42])
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert np.array_equal(load_image(tmp_path / "tall.png", 40, 24).numpy(), pixels[:, 2:42].transpose(1, 0, 2))


@pytest.mark.parametrize("size,red,green", [((60, 240), (63.75, 191.25), (0, 255)), ((240, 60), (0, 255), (63.75, 191.25))])
def test_a_wide_and_a_tall_image_are_scaled_by_one_factor_and_the_centre_is_cut_out(tmp_path, size, red, green):
    """60 x 240 to 30 x 60: halved to 30 x 120, of which the middle half is kept."""
    Image.fromarray(_ramp(*size)).save(tmp_path / "a.png")
    wanted = (30, 60) if size[1] > size[0] else (60, 30)
    loaded = load_image(tmp_path / "a.png", *wanted).float()
    assert loaded.shape == (*wanted, 3)
    corners = [loaded[0, 0, 0], loaded[0, -1, 0], loaded[0, 0, 1], loaded[-1, 0, 1]]
    assert np.allclose(corners, [*red, *green], atol=5)
    whole = Image.fromarray(_ramp(*size)).resize((size[1] // 2, size[0] // 2), Image.Resampling.LANCZOS)
    top, left = (size[0] // 2 - wanted[0]) // 2, (size[1] // 2 - wanted[1]) // 2
    cut = whole.crop((left, top, left + wanted[1], top + wanted[0]))
    assert np.array_equal(loaded.numpy(), np.asarray(cut))


def test_every_size_can_be_brought_to_every_other(tmp_path):
    pick = random.Random(0)
    for _ in range(300):
        height, width = (pick.randint(1, 40) if pick.random() < 0.5 else pick.randint(1, 400) for _ in range(2))
        Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / "a.bmp")
        wanted = pick.randint(1, 100), pick.randint(1, 100)
        loaded = load_image(tmp_path / "a.bmp", *wanted)
        assert loaded.shape == (*wanted, 3) and (loaded == torch.tensor([10, 20, 30])).all()


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
def test_the_orientation_of_exif_is_applied(tmp_path, kind):
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:16] = 255  # upright: white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / f"a.{kind}", exif=exif)
    loaded = load_image(tmp_path / f"a.{kind}", 32, 16)
    assert loaded[2:14].min() > 240 and loaded[18:30].max() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_put_on_white(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), np.uint8)  # black: left transparent, right opaque
    pixels[:, 4:, 3] = 255
    image = Image.fromarray(pixels)
    file = tmp_path / ("a.tiff" if mode == "PA" else "a.png")
    if mode == "P":
        image = Image.fromarray(pixels[..., 3] // 255)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.save(file, transparency=0)
    elif mode == "PA":
        alpha = Image.fromarray(pixels[..., 3])
        image = Image.new("P", (8, 8))
        image.putpalette([0, 0, 0])
        image = image.convert("PA")
        image.putalpha(alpha)
        image.save(file)
    else:
        image.convert(mode).save(file)
    loaded = load_image(file, 8, 8)
    assert (loaded[:, :4] == 255).all() and (loaded[:, 4:] == 0).all()


def test_half_transparent_is_mixed_with_white_and_opaque_is_kept(tmp_path):
    pixels = _noise(6, 6, 4)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png", 6, 6).numpy(), pixels[..., :3])
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png", 4, 4)[0, 0].tolist() == [255, 127, 127]


def test_palette_grey_and_sixteen_bits_become_rgb(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png")
    assert load_image(tmp_path / "p.png", 2, 2)[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    Image.fromarray(np.full((2, 2), 77, np.uint8)).save(tmp_path / "l.png")
    assert (load_image(tmp_path / "l.png", 2, 2) == 77).all()
    values = np.array([[0, 257 * 3], [257 * 128 + 100, 65535]], np.uint16)
    for name in ("i.png", "i.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        assert load_image(tmp_path / name, 2, 2)[..., 1].tolist() == [[0, 3], [128, 255]]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(values).save(tmp_path / "i.png", exif=exif)
    assert load_image(tmp_path / "i.png", 2, 2)[..., 0].tolist() == [[255, 128], [3, 0]]
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert load_image(tmp_path / "c.jpg", 2, 2).min() > 250


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif", 4, 4)[0, 0].tolist() == [255, 0, 0]


def test_the_digest_is_that_of_the_bytes_when_they_were_checked(tmp_path):
    file = tmp_path / "a.png"
    digests = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(file)
        check_images([Prompt("a", "a", image=file)], 8, 8, World())
        digests.append(image_digest(str(file)))
        assert digests[-1] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests[0] != digests[1]
    file.unlink()  # encoded already, and nobody's business any more
    assert image_digest(file) == digests[1]
    with pytest.raises(PromptFileError, match=r"none\.png does not exist"):
        image_digest(tmp_path / "none.png")
    with pytest.raises(PromptFileError, match="cannot be read"):
        image_digest(tmp_path)


# --- checking ---------------------------------------------------------------------------------------------------------


def _truncated_jpeg(path):
    Image.fromarray(_noise(64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _truncated_png(path):
    Image.fromarray(_noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-4000])


def _bomb(path):
    """A small file that unfolds to 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(path)


def _large(path):
    Image.new("1", (11_000, 11_000)).save(path)  # below what Pillow itself refuses


def _damaged_chunk(path):
    Image.fromarray(_noise(64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[2000] ^= 0xFF
    path.write_bytes(content)


BAD = {
    "truncated.jpg": (_truncated_jpeg, "cannot be read: .*truncated"),
    "truncated.png": (_truncated_png, "cannot be read"),
    "damaged.png": (_damaged_chunk, "cannot be read"),
    "empty.png": (lambda path: path.write_bytes(b""), "no image of a kind"),
    "text.png": (lambda path: path.write_text("not an image"), "no image of a kind"),
    "header.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "no image of a kind|cannot be read"),
    "drawing.eps": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image of a kind"),
    "folder.png": (lambda path: path.mkdir(), "is no file"),
    "pipe.png": (lambda path: os.mkfifo(path), "is no file"),
    "missing.png": (lambda path: None, "does not exist"),
    "bomb.png": (_bomb, "too many pixels"),
    "large.png": (_large, "too many pixels .11000x11000.*at most 100,000,000"),
    "float.tiff": (lambda path: Image.fromarray(np.ones((64, 64), np.float32)).save(path), "floating-point"),
    "deep.tiff": (lambda path: Image.fromarray(np.full((64, 64), 70_000, np.int32)).save(path), "32-bit"),
    "small.png": (lambda path: Image.new("RGB", (64, 15)).save(path), r"64x15 pixels.*enlarged 4\.3 times to cover 64x64"),
    "nul\0.png": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_a_bad_image_is_named_with_what_is_wrong_and_whose_it_is(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(PromptFileError, match=message) as raised:
        check_images([Prompt("cat", "a cat", image=tmp_path / name)], 64, 64, World())
    assert "1 of 1 images" in str(raised.value) and f"{tmp_path / name} (prompt 'cat')" in str(raised.value)
    if name != "small.png":
        with pytest.raises(PromptFileError, match=message):
            load_image(tmp_path / name, 64, 64)


def test_the_smallest_image_that_will_do(tmp_path):
    Image.new("RGB", (16, 300)).save(tmp_path / "a.png")
    prompt = Prompt("1", "x", image=tmp_path / "a.png")
    check_images([prompt], 64, 64, World())
    with pytest.raises(PromptFileError, match=r"enlarged 4\.1 times"):
        check_images([prompt], 64, 65, World())


class _Rank(World):
    """A rank whose exchange waits for nobody: what the others say was written down before."""

    def __init__(self, rank, said):
        super().__init__(rank, 2)
        self.said = said

    def all_gather_object(self, value):
        self.said[self.rank] = value
        return [self.said.get(rank, ({}, {})) for rank in range(self.size)]


def test_ranks_share_the_work_and_raise_the_same_error(tmp_path, monkeypatch):
    prompts = []
    for i in range(20):
        file = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8)).save(file)
        if i in (1, 2, 5, 8, 11, 14, 17):
            file.write_bytes(b"")
        prompts.append(Prompt(f"p{i}", "x", image=file))
    prompts.append(Prompt("again", "x", image=prompts[0].image))  # read once
    prompts.append(Prompt("none", "x"))
    read = []
    original = images._read
    monkeypatch.setattr(images, "_read", lambda path: read.append(path.stem) or original(path))
    said, messages, shown = {}, [], []
    for rank in (0, 1, 0):  # the last one has heard both
        with pytest.raises(PromptFileError) as raised:
            check_images(prompts, 8, 8, _Rank(rank, said), lambda done, total: shown.append((done, total)))
        messages.append(str(raised.value))
        assert shown[-1] == ((11, 11) if rank == 0 else (10, 10))
    assert messages[1] == messages[2]
    assert sorted(read[:20]) == sorted(str(i) for i in range(20))
    assert set(read[:10]) == {str(i) for i in range(0, 20, 2)}
    assert "8 of 21 images cannot be used" in messages[1] and "and 3 more" in messages[1]
    assert [line.split("'")[1] for line in messages[1].splitlines() if "(prompt" in line] == ["p1", "p2", "p5", "p8", "p11"]
    check_images(prompts[:1], 8, 8, _Rank(1, {}))  # more ranks than images
