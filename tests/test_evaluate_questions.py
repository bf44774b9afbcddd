"""What each benchmark hands to the model, against what the released scripts hand to it."""

import hashlib
import json

import mlx.core as mx
import numpy as np
import pytest

from ferret_mlx.evaluate.ferret_bench import FerretBench
from ferret_mlx.evaluate.flickr import Flickr
from ferret_mlx.evaluate.lvis import LVIS
from ferret_mlx.evaluate.pictures import read_picture
from ferret_mlx.evaluate.point_grid import PointGrid
from ferret_mlx.evaluate.pope import POPE
from ferret_mlx.evaluate.refcoco import RefCOCO
from ferret_mlx.image import preprocess
from ferret_mlx.prompt import build_prompt, tokenize_prompt
from ferret_mlx.regions import describe_regions, sample_points
from ferret_mlx.tokenizer import Tokenizer

SIDE = 336


@pytest.fixture(scope="module")
def tokenizer(parity):
    """The real LLaMA vocabulary."""
    return Tokenizer(parity / "checkpoint")


def check(benchmark, items, images, released, tokenizer):
    means = {}
    for item, expected in zip(items, released, strict=True):
        if item.picture not in means:
            picture = read_picture(images / item.picture)
            pixels = preprocess(picture, SIDE).astype(np.float16).astype(np.float64)
            means[item.picture] = picture.shape[1::-1], pixels
        size, pixels = means[item.picture]
        question = benchmark.question(item, size)
        texts, masks = describe_regions(question.regions, size)
        prompt, order = build_prompt(question.prompt, texts)
        assert prompt == expected["prompt"]
        assert f"<image>\n{question.released} ASSISTANT:" in prompt
        assert order == list(range(len(masks)))
        assert tokenize_prompt(prompt, tokenizer) == expected["input_ids"]
        assert [1, *np.moveaxis(pixels, 2, 0).shape] == expected["pixel_values"]["shape"]
        assert pixels.mean((0, 1)).round(3).tolist() == expected["pixel_values"]["channel_means"]
        check_masks(masks, expected["region_masks"])


def check_masks(masks, expected):
    if expected is None or expected == "not passed":
        expected = []
    for mask, released in zip(masks, expected, strict=True):
        inside = np.argwhere(mask)
        assert list(mask.shape) == released["shape_wh"]
        assert len(inside) == released["count"]
        assert inside.min(0).tolist() == released["min_xy"]
        assert inside.max(0).tolist() == released["max_xy"]
        bytes_xy = np.ascontiguousarray(mask.astype(np.uint8)).tobytes()
        assert hashlib.sha256(bytes_xy).hexdigest() == released["sha256_uint8_c_order"]


def expected(folder):
    return json.loads((folder / "expected_inference.json").read_text())


@pytest.mark.parametrize(
    "split", ("finetune_refcoco_val", "finetune_refcoco+_testA", "finetune_refcocog_test")
)
def test_refcoco(evaluation, tokenizer, split):
    folder = evaluation / "refexp"
    benchmark = RefCOCO(folder / f"{split}.json")
    check(benchmark, benchmark.items, folder / "images", expected(folder)[split], tokenizer)


def test_flickr(evaluation, tokenizer):
    folder = evaluation / "flickr"
    benchmark = Flickr(folder / "final_flickr_mergedGT_test.json", folder / "flickr30k")
    check(benchmark, benchmark.items, folder / "images", expected(folder), tokenizer)


@pytest.mark.parametrize(
    "name, form, options",
    [
        ("point", "point", {}),
        ("box", "box", {}),
        ("free_shape", "free_shape", {}),
        ("box_without_region_feature", "box", {"region_feature": False}),
        ("point_no_coor", "point", {"coordinates": False}),
    ],
)
def test_lvis(evaluation, tokenizer, name, form, options):
    folder = evaluation / "lvis"
    benchmark = LVIS(folder / "lvis_eval.jsonl", form, **options)
    released = expected(folder)[name]
    check(
        benchmark, benchmark.items[: len(released)], folder / "images", released, tokenizer
    )  # fmt: skip


@pytest.mark.parametrize("split", ("random", "popular", "adversarial"))
def test_pope(evaluation, tokenizer, split):
    folder, name = evaluation / "pope", f"coco_pope_{split}"
    benchmark = POPE(folder / f"{name}.json")
    check(benchmark, benchmark.items, folder / "images", expected(folder)[name], tokenizer)


@pytest.mark.parametrize(
    "name, folder, options",
    [
        ("refer_caption", "refer_caption", {}),
        ("refer_reason", "refer_reason", {}),
        ("refer_reason_without_region_feature", "refer_reason", {"region_feature": False}),
        ("ground_conv", "ground_conv", {}),
    ],
)
def test_ferret_bench(evaluation, tokenizer, name, folder, options):
    root = evaluation / "ferret_bench"
    benchmark = FerretBench(root / folder, **options)
    check(benchmark, benchmark.items, root / "images", expected(root)[name], tokenizer)


def test_point_grid(evaluation, tokenizer):
    folder = evaluation / "point_cls"
    benchmark = PointGrid(folder / "picture.png")
    released = expected(folder)
    size = (132, 96)
    assert [item.record["coor"] for item in benchmark.items] == released["coor"]
    questions = [benchmark.question(item, size) for item in benchmark.items]
    assert [question.released for question in questions] == released["questions"]
    masks = [question.regions[0].mask(size) for question in questions]
    assert [int(mask.sum()) for mask in masks] == released["mask_counts"]
    chosen = [benchmark.items[index] for index in released["full_records_of"]]
    check(benchmark, chosen, folder, released["records"], tokenizer)


def test_released_answer_lines_are_those_of_the_release(evaluation):
    """All fields, for every benchmark whose answers were written by the released scripts."""
    cases = [
        (
            RefCOCO(evaluation / "refexp" / "finetune_refcoco_val.json"),
            "refexp/answers/finetune_refcoco_val", (0, 0),
        ),
        (
            Flickr(
                evaluation / "flickr" / "final_flickr_mergedGT_test.json",
                evaluation / "flickr" / "flickr30k",
            ),
            "flickr/answers/final_flickr_mergedGT_test", (0, 0),
        ),
        (LVIS(evaluation / "lvis" / "lvis_eval.jsonl", "free_shape"),
         "lvis/answers/free_shape", (0, 0)),
        (POPE(evaluation / "pope" / "coco_pope_popular.json"),
         "pope/answers/coco_pope_popular", (0, 0)),
        (FerretBench(evaluation / "ferret_bench" / "refer_caption"),
         "ferret_bench/ferret_answers/refer_desc", (120, 90)),
        (PointGrid(evaluation / "point_cls" / "picture.png"), "point_cls/answers", (132, 96)),
    ]  # fmt: skip
    for benchmark, folder, size in cases:
        files = sorted((evaluation / folder).iterdir())
        lines = [json.loads(line) for file in files for line in file.open()]
        for item, line in zip(benchmark.items, lines, strict=True):
            ours = benchmark.answer_line(item, size, line[benchmark.answer_field])
            assert list(ours) == list(line)
            # Where the pictures lie is the user's choice.
            assert {**ours, "image_path": 0} == {**line, "image_path": 0}


def test_points_of_a_canvas_mask_lie_on_the_asked_place(evaluation):
    """The grid's mask is 1000 x 1000 whatever the picture's size; the model sees fractions."""
    benchmark = PointGrid(evaluation / "point_cls" / "picture.png")
    _, (mask,) = describe_regions(benchmark.question(benchmark.items[9], (132, 96)).regions, (1, 1))
    points = sample_points(mask, np.random.default_rng(0))
    assert np.abs(points - [0.09, 0.909]).max() <= 0.005 + 1e-6


def test_an_empty_mask_is_an_error(evaluation, tmp_path):
    """It opens a debugger in the released script."""
    lines = (evaluation / "lvis" / "lvis_eval.jsonl").read_text().splitlines()
    line = json.loads(lines[0])
    line["free_shape_segment_mask"] = [[0] * line["height"] for _ in range(line["width"])]
    data = tmp_path / "lvis.jsonl"
    data.write_text(json.dumps(line))
    benchmark = LVIS(data, "free_shape")
    with pytest.raises(ValueError, match="mask is empty"):
        benchmark.question(benchmark.items[0], (1, 1))


def test_a_point_far_outside_is_an_error(evaluation, tmp_path):
    """Left of the picture the window's end was negative, and most of the picture inside."""
    line = json.loads((evaluation / "lvis" / "lvis_eval.jsonl").read_text().splitlines()[0])
    data = tmp_path / "lvis.jsonl"
    for x in (-20, line["width"] + 20):
        data.write_text(json.dumps(line | {"sample_point": [x, 2]}))
        benchmark = LVIS(data, "point")
        with pytest.raises(ValueError, match="mask is empty"):
            benchmark.question(benchmark.items[0], (1, 1))


@pytest.mark.parametrize(
    "value", (float("inf"), float("nan"), 10**400), ids=("infinity", "nan", "huge")
)
def test_a_number_that_is_no_pixel_is_an_error(evaluation, tmp_path, value):
    """It ended in a traceback while asking, or with a wrong score."""
    line = json.loads((evaluation / "lvis" / "lvis_eval.jsonl").read_text().splitlines()[0])
    data = tmp_path / "lvis.jsonl"
    data.write_text(json.dumps(line | {"sample_point": [value, 2]}))
    with pytest.raises(ValueError, match="line 1: 'sample_point' is .*, expected 2 numbers"):
        LVIS(data, "point")


def test_a_benchmark_prompt_takes_its_region_vector(parity_model, parity, evaluation):
    """Text and mask of the data reach the model: another mask gives another vector."""
    from ferret_mlx.processor import Processor
    from ferret_mlx.session import Session

    processor = Processor.from_folder(parity / "checkpoint")
    folder = evaluation / "lvis"
    benchmark = LVIS(folder / "lvis_eval.jsonl", "point")
    first = benchmark.question(benchmark.items[0], (1, 1))
    picture = read_picture(folder / "images" / benchmark.items[0].picture)
    session = Session(parity_model, processor, picture)
    (answer,) = session.ask_many([(first.prompt, first.regions)], max_tokens=4)
    inputs = processor(picture, first.prompt, first.regions)
    assert first.released in inputs.text
    assert answer.prompt_tokens == len(inputs.input_ids) - len(session.prefix_ids)
    moved = benchmark.question(benchmark.items[1], (1, 1)).regions
    vectors = [
        parity_model.region_sampler(
            session.encode_image(), processor(picture, "[region0]", regions).region_points
        )
        for regions in (first.regions, moved)
    ]
    assert mx.abs(vectors[0] - vectors[1]).max().item() > 1e-3
