"""Pictures: every mode opens upright as RGB, and pixel values meet the released ones."""

import numpy as np
import pytest
from PIL import Image

from ferret_mlx.image import open_image, preprocess


@pytest.fixture
def photo() -> Image.Image:
    """Smooth colours, different in every corner, so that a turn or a clip shows."""
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([x * 8, y * 10, 255 - x * 4 - y * 4], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def test_pixel_values_as_released(parity, manifest):
    for case in manifest:
        golden = np.load(parity / "golden" / f"{case['name']}.npz")["pixel_values"]
        pixels = preprocess(parity / "cases" / case["image"], 112)
        assert pixels.dtype == np.float32 and pixels.shape == (112, 112, 3)
        np.testing.assert_allclose(pixels.transpose(2, 0, 1), golden, rtol=0, atol=1e-5)


def test_array_path_and_pillow_agree(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    expected = np.asarray(photo)
    for source in (photo, expected, tmp_path / "photo.png", str(tmp_path / "photo.png")):
        np.testing.assert_array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, tmp_path, orientation):
    """A phone's photo stored sideways has to answer to upright coordinates."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(undo[orientation]) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    opened = open_image(tmp_path / "photo.png")
    assert opened.size == (32, 24)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(photo))
    # A picture that is upright already is not turned twice.
    np.testing.assert_array_equal(np.asarray(open_image(opened)), np.asarray(photo))


def test_transparency_is_laid_over_white(photo, tmp_path):
    rgba = photo.convert("RGBA")
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (0, 0, 16, 24))
    rgba.putalpha(alpha)
    rgba.save(tmp_path / "photo.png")
    opened = np.asarray(open_image(tmp_path / "photo.png"))
    assert (opened[:, :16] == 255).all()
    np.testing.assert_array_equal(opened[:, 16:], np.asarray(photo)[:, 16:])


def test_palette_with_transparent_entry(tmp_path):
    indexed = Image.new("P", (4, 2), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((3, 1), 1)
    indexed.save(tmp_path / "indexed.png", transparency=0)
    opened = open_image(tmp_path / "indexed.png")
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((3, 1)) == (200, 100, 50)


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    """Pillow's own conversion turns every 16-bit value above 255 white."""
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    opened = np.asarray(open_image(tmp_path / "deep.png"))
    assert opened[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(photo, mode):
    opened = open_image(photo.convert(mode))
    assert (opened.mode, opened.size) == ("RGB", photo.size)
    expected = photo.convert("L" if mode in ("L", "LA") else "RGB").convert("RGB")
    if mode != "1":  # which is dithered
        difference = np.asarray(opened).astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 3


def test_bad_pictures(photo, tmp_path):
    photo.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(FileNotFoundError, match="no picture at .*missing.png"):
        open_image(tmp_path / "missing.png")
    for name in ("cut.png", "text.png", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name} is not a readable picture") as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        open_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="got int"):
        open_image(3)
