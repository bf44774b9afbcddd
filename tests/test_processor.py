"""Image + turns + regions -> inputs, against the released ones."""

import numpy as np
import pytest
from PIL import Image

from ferret_mlx.config import FerretConfig, read_config
from ferret_mlx.processor import Processor
from ferret_mlx.regions import Box, FreeForm, Point
from ferret_mlx.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def processor(parity) -> Processor:
    return Processor.from_folder(parity / "checkpoint")


@pytest.fixture(scope="module")
def wide(parity):
    return parity / "cases" / "wide.png"


def case_arguments(parity, case):
    regions = []
    for spec in case["regions"]:
        if spec["kind"] == "point":
            regions.append(Point(*spec["xy"]))
        elif spec["kind"] == "box":
            regions.append(Box(*spec["xyxy"]))
        else:
            regions.append(FreeForm.from_file(parity / "cases" / spec["mask"]))
    turns = []
    for turn in case["turns"]:
        turns.append({"role": "user", "content": turn["user"]})
        if "assistant" in turn:
            turns.append({"role": "assistant", "content": turn["assistant"]})
    return parity / "cases" / case["image"], turns, regions


def test_inputs_as_released(parity, manifest, golden, processor):
    for case in manifest:
        inputs = processor(*case_arguments(parity, case))
        numbers = golden[case["name"]]
        assert inputs.text == case["prompt"]
        assert inputs.input_ids == numbers["input_ids"].tolist()
        assert inputs.region_order == case["region_order"]
        assert inputs.region_texts == case["region_texts"]
        assert inputs.pixel_values.shape == (1, 112, 112, 3)
        pixels = np.asarray(inputs.pixel_values)[0].transpose(2, 0, 1)
        np.testing.assert_allclose(pixels, numbers["pixel_values"], rtol=0, atol=1e-5)
        assert inputs.region_points.shape == (len(case["region_order"]), 512, 2)
        assert inputs.image_size == Image.open(parity / "cases" / case["image"]).size


def test_points_follow_the_text_order(processor, wide):
    """Region vectors go to the places of <region_fea> in text order, not as regions were given."""
    left, right = Box(0, 0, 40, 149), Box(160, 0, 199, 149)
    inputs = processor(wide, "Is [region1] like [region0] or [region1]?", [left, right])
    assert inputs.region_order == [1, 0, 1]
    points = np.asarray(inputs.region_points)
    assert (points[1, :, 0] < 0.3).all() and (points[[0, 2], :, 0] > 0.7).all()
    np.testing.assert_array_equal(points[0], points[2])


def test_seed_decides_the_points(processor, wide):
    def points(**options):
        inputs = processor(wide, "What?", [Box(0, 0, 100, 100)], **options)
        return np.asarray(inputs.region_points)

    np.testing.assert_array_equal(points(), points(seed=0))
    assert not np.array_equal(points(), points(seed=1))


def test_regions_are_in_upright_pixels(processor, tmp_path):
    """A photo stored sideways: size, texts and pixel values are those of the upright one."""
    y, x = np.mgrid[0:60, 0:90]
    upright = Image.fromarray(np.stack([x * 2, y * 4, x + y], axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    turned = processor(tmp_path / "sideways.png", "What?", [Point(89, 59)])
    plain = processor(np.asarray(upright), "What?", [Point(89, 59)])
    assert turned.image_size == (90, 60)
    assert turned.text == plain.text and "[988, 983]" in turned.text
    np.testing.assert_array_equal(turned.pixel_values, plain.pixel_values)


def test_wrapped_image(parity, wide):
    """mm_use_im_start_end of the config reaches the prompt."""
    config = FerretConfig.from_dict(
        read_config(parity / "checkpoint") | {"mm_use_im_start_end": True}
    )
    inputs = Processor(config, Tokenizer(parity / "checkpoint"))(wide, "What?")
    assert "<im_start><image><im_end>\nWhat?" in inputs.text


def test_prompt_up_to_the_context(processor, wide):
    """One token has to be left for the answer: L + 1 <= 2048."""
    base = len(processor(wide, "a").input_ids) - 1 + 64
    fits = "a" + " a" * (2047 - base)
    inputs = processor(wide, fits)
    assert len(inputs.input_ids) - 1 + 64 == 2047
    with pytest.raises(ValueError, match="2048 tokens, 64 of them .* context of 2048"):
        processor(wide, fits + " a")


@pytest.mark.parametrize(
    ("prompt", "regions", "message"),
    [
        (" ", [], "empty"),
        ([], [], "no turn"),
        (["What?"], [], "must be a dict"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            [],
            "end with a user turn",
        ),
        ("[region3]", [Point(1, 1), Point(2, 2)], r"\[region3\], but 2 given"),
        ("What?", [Point(1, 1), Point(200, 2)], r"\[region1\]: The point \(200, 2\) is outside"),
        ("What?", [(1, 1)], "must be a Point, Box or FreeForm, got tuple"),
        ("What?", [FreeForm(np.ones((9, 9), bool))], "9 x 9"),
    ],
)
def test_bad_input(processor, wide, prompt, regions, message):
    with pytest.raises(ValueError, match=message):
        processor(wide, prompt, regions)


def test_missing_picture_and_folder(processor, tmp_path):
    with pytest.raises(FileNotFoundError):
        processor(tmp_path / "missing.png", "What?")
    with pytest.raises(FileNotFoundError):
        Processor.from_folder(tmp_path / "missing")


def test_tokenizer_of_another_model(parity):
    config = FerretConfig.from_dict(
        read_config(parity / "checkpoint") | {"im_region_fea_token": 31999}
    )
    with pytest.raises(ValueError, match="32000.*31999"):
        Processor(config, Tokenizer(parity / "checkpoint"))
