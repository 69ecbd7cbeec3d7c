"""Image files of every awkward kind: read rightly, or one clear error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from tests.data.formats import jpeg_bytes
from visexpert.data.images import MAX_PIXELS, PAD_COLOR, ImageReader, read_image
from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import IMAGE_FORMATS

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(COLORS)))
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(COLORS).permute(2, 0, 1))


def test_grey_is_repeated(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(COLORS[..., 0])))
    assert torch.equal(image, torch.from_numpy(COLORS[..., 0]).expand(3, 5, 7))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = COLORS[..., 0] > 127
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(bits)))
    assert torch.equal(image, torch.from_numpy(bits * np.uint8(255)).expand(3, 5, 7))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129], [32896, 65406, 65535]], dtype=np.uint16)
    image = read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert image[0].tolist() == [[0, 0, 1], [128, 254, 255]]  # round(value / 257)
    assert torch.equal(image[0], image[2])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # magenta and yellow
    image = read_image(saved(tmp_path / "a.jpg", ink, quality=95))
    assert image[0].min() > 230 and image[1:].max() < 60


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    layer = np.zeros((1, 3, 4), dtype=np.uint8)
    layer[0, :, 3] = (0, 128, 255)
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(layer)))
    assert image[:, 0].tolist() == [[255, 127, 0]] * 3


def test_a_transparent_palette_is_laid_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    image = read_image(saved(tmp_path / "a.png", palette, transparency=0))
    assert image[:, 0].tolist() == [[255, 0], [255, 0], [255, 255]]


def test_the_rotation_of_the_camera_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(COLORS), exif=exif))
    assert torch.equal(image, torch.from_numpy(np.rot90(COLORS, k=-1).copy()).permute(2, 0, 1))


def test_a_single_pixel_is_an_image(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    assert image.flatten().tolist() == [1, 2, 3] and image.shape == (3, 1, 1)


def test_thirty_thousand_pixels_wide_is_fine_while_it_is_low(tmp_path: Path) -> None:
    assert read_image(saved(tmp_path / "a.png", Image.new("L", (30_000, 2)))).shape == (3, 2, 30_000)


@pytest.mark.parametrize("height", [3000, 30_000])
def test_a_small_file_that_claims_a_huge_image_is_refused(tmp_path: Path, height: int) -> None:
    path = saved(tmp_path / "bomb.png", Image.new("L", (1, 1)))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, height)  # width and height in the header, then its checksum
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bomb.png has .*pixels.*at most {MAX_PIXELS} are decoded"):
        read_image(path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    assert read_image(path, max_pixels=35).shape == (3, 5, 7)
    with pytest.raises(DataError, match="7 x 5 pixels, but at most 34 "):
        read_image(path, max_pixels=34)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(DataError, match="32-bit values"):
        read_image(saved(tmp_path / "a.tiff", Image.new(mode, (3, 3))))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"cut.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cut.* cannot be read"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="odd.png cannot be read"):
        read_image(path)


def test_a_damaged_image_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLORS))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.parametrize(("format", "suffix"), [(name, each[0]) for name, each in IMAGE_FORMATS.items()])
def test_each_listed_format_is_read(tmp_path: Path, format: str, suffix: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = saved(tmp_path / f"a{suffix}", Image.fromarray(np.full((8, 8, 3), 200, np.uint8)))
    assert (read_image(path).float() - 200).abs().max() < 8


def test_a_cameras_jpeg_of_two_pictures_is_read(tmp_path: Path) -> None:
    picture = Image.fromarray(COLORS)
    path = saved(tmp_path / "a.jpg", picture, format="MPO", save_all=True, append_images=[picture])
    assert Image.open(path).format == "MPO"
    assert read_image(path).shape == (3, 5, 7)


@pytest.mark.parametrize("format", ["EPS", "TGA", "PCX", "ICO", "SGI", "IM", "DDS"])
def test_other_decoders_are_never_opened(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is called; those of EPS would start Ghostscript."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, format=format)
    assert Image.open(path).format == format
    with pytest.raises(DataError, match=r"a\.png.*JPEG, PNG, .*AVIF"):
        read_image(path)


def test_the_listed_formats_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
    told = page.partition("## Broken images\n")[2].partition("\n## ")[0]
    spelled = {name.lower().replace("jpeg2000", "jpeg 2000") for name in IMAGE_FORMATS}
    assert not [name for name in spelled if name not in told.lower()]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "device.png"):
        with pytest.raises(DataError, match=f"{name}.*not a regular file"):
            read_image(tmp_path / name)
    saved(tmp_path / "a.png", Image.fromarray(COLORS))
    (tmp_path / "link.png").symlink_to("a.png")
    assert read_image(tmp_path / "link.png").shape == (3, 5, 7)


LEFT, RIGHT = (250, 0, 0), (0, 0, 250)


def halves(width: int = 24, height: int = 8) -> bytes:
    """Red on the left half, blue on the right one."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = LEFT, RIGHT
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def near(pixels: Any, color: tuple[int, int, int]) -> bool:
    """Equal but for what a bicubic filter overshoots at an edge."""
    return bool((np.abs(pixels.astype(int) - np.array(color)) < 30).all())


def read(source: bytes, rng: np.random.Generator | None = None, **options: Any) -> Any:
    reader = ImageReader(**({"size": 8} | options))
    return np.asarray(reader.read(source, name="a.png", rng=rng).image_CHW.permute(1, 2, 0))


def test_crop_takes_the_center() -> None:
    image_HW3 = read(halves())
    assert image_HW3.shape == (8, 8, 3)
    assert (image_HW3[:, :4] == LEFT).all() and (image_HW3[:, 4:] == RIGHT).all()  # columns 8 to 16 of 24, not resized


def test_stretch_takes_everything() -> None:
    image_HW3 = read(halves(32), resize="stretch")
    assert near(image_HW3[:, :3], LEFT) and near(image_HW3[:, 5:], RIGHT)


def test_pad_adds_clips_mean_color() -> None:
    image_HW3 = read(halves(16), resize="pad")
    assert (image_HW3[[0, 1, 6, 7]] == PAD_COLOR).all()
    assert near(image_HW3[2:6, :3], LEFT)


def test_the_original_size_is_kept() -> None:
    picture = ImageReader(size=4).read(jpeg_bytes("red", size=(30, 20)), name="a")
    assert picture.original_hw == (20, 30) and picture.image_CHW.shape == (3, 4, 4)


def test_augmentation_is_drawn_from_the_generator_alone() -> None:
    source = halves(64, 64)
    options = {"crop_scale": 0.2, "size": 16}
    first, again = (read(source, np.random.default_rng(3), **options) for _ in range(2))
    assert (first == again).all()
    others = [read(source, np.random.default_rng(seed), **options) for seed in range(8)]
    assert any((first != other).any() for other in others)
    assert (read(source, None, **options) == read(source, size=16)).all()  # evaluation: none


def test_random_crops_keep_their_share() -> None:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(ramp[None, :, None], 256, 0).repeat(3, 2)).save(buffer, "PNG")
    spans = []
    for seed in range(30):
        image_HW3 = read(buffer.getvalue(), np.random.default_rng(seed), crop_scale=0.5, size=256)
        spans.append(int(image_HW3[..., 0].max()) - int(image_HW3[..., 0].min()))
    # 50 to 100 % of the area at 3:4 to 4:3: at least sqrt(0.5 * 0.75) of the width, and rarely all of the 256 px.
    assert min(spans) >= 256 * np.sqrt(0.5 * 0.75) * 0.95 and min(spans) < 230 and max(spans) > 200


def test_flips_come_half_of_the_time() -> None:
    mirrored = [bool(read(halves(8), np.random.default_rng(seed), flip=True)[0, 0, 2] > 100) for seed in range(60)]
    assert 18 < sum(mirrored) < 42


def test_a_broken_image_is_named() -> None:
    with pytest.raises(DataError, match="The image shard/03 cannot be read"):
        ImageReader(size=8).read(jpeg_bytes("red")[:90], name="shard/03")


@pytest.mark.parametrize("options", [{"resize": "squash"}, {"size": 0}, {"crop_scale": 0.0}])
def test_settings_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ImageReader(**({"size": 8} | options))
