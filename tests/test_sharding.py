"""The language model split over processes: the same answers, and refusals that are told once."""

import json
from types import SimpleNamespace

import pytest

from ferret_mlx import Box, Point, Session, generate, load
from ferret_mlx.chat import chat_main
from ferret_mlx.cli import generate_main
from ferret_mlx.config import FerretConfig
from ferret_mlx.convert import convert
from ferret_mlx.distribution import Ranks
from ferret_mlx.hub import bundled_model
from ferret_mlx.model import Model
from ferret_mlx.quantization import Quantization, quantize_model_parts
from ferret_mlx.sharding import common_parameters, shard_language_model
from reference.glyphs import NAMES, with_article
from tests.launching import ROOT, launch
from tests.sharded_cases import PICTURE, QUESTION

PICTURE = str(ROOT / PICTURE)


class Group:
    """Stands for processes that are not there; nothing is sent before a model is refused."""

    def __init__(self, count):
        self.count = count

    def size(self):
        return self.count


def model_of(**changes):
    values = FerretConfig.from_folder(bundled_model()).raw | changes
    values.pop("quantization", None)
    return Model(FerretConfig.from_dict(values))


@pytest.mark.parametrize(
    "changes, count, words",
    (
        ({}, 3, "num_attention_heads is 4, no multiple of 3; 2, 4 would do"),
        ({"num_key_value_heads": 2}, 4, "num_key_value_heads is 2, no multiple of 4; 2 would do"),
        ({"intermediate_size": 510}, 4, "intermediate_size is 510, no multiple of 4; 2 would do"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, 2, "start a single one"),
    ),
)
def test_what_does_not_divide_is_refused(changes, count, words):
    """mlx-lm shards 4 heads over 3 processes without a word, and answers nonsense."""
    with pytest.raises(ValueError, match=words):
        shard_language_model(model_of(**changes), Group(count))


def test_groups_that_share_a_scale_are_not_cut():
    model = model_of(num_attention_heads=8, num_key_value_heads=8)
    quantize_model_parts(model, {}, Quantization(4, 64))
    with pytest.raises(ValueError, match="256 quantized weights of a row in groups of 64.*2, 4 w"):
        shard_language_model(model, Group(8))


def test_common_parameters_are_those_that_sharding_leaves_alone(tmp_path):
    model = load()[0]
    seen = []
    model.language_model.shard = seen.append
    shard_language_model(model, Group(2))
    assert len(seen) == 1  # mlx-lm's, once
    split = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, _ in model.named_modules():
        last = name.split(".")[-1]
        whole = not name.startswith("language_model.") or last not in split
        assert common_parameters(f"{name}.weight") == whole


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """100 of them: points, boxes, finding, yes / no."""
    places = [(x, y) for x in range(20, 380, 36) for y in (60, 135, 210, 285)]
    entries = [{"point": place} for place in places]
    entries += [{"box": [x - 15, y - 40, x + 90, y + 40]} for x, y in places[4:24]]
    entries += [{"prompt": f"Where is the {name}?"} for name in NAMES[:20]]
    entries += [{"prompt": f"Is there {with_article(n)} in the image?"} for n in NAMES[20:40]]
    assert len(entries) == 100
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_text(json.dumps(entries))
    return ["--image", PICTURE, "--regions", str(path), "--prompt", QUESTION]


def test_two_processes_answer_100_questions_as_one(questions, capsys):
    generate_main(questions)
    alone = capsys.readouterr().out
    assert len({json.loads(line)["text"] for line in alone.splitlines()}) > 20
    two = launch("generate.py", *questions)
    assert two.stdout == alone
    assert two.stderr.count("Loaded ferret-tiny") == 1


@pytest.fixture(scope="module")
def happened(tmp_path_factory, mlx_folders):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("sharded")
    other = tmp_path_factory.mktemp("model") / "float16"
    convert("reference/ferret-tiny", other)
    launch("-m", "tests.sharded_cases", folder, other, mlx_folders["parity"])
    files = sorted(file.name for file in folder.iterdir())
    return SimpleNamespace(
        files=files, ranks=[json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    )


def test_sessions_and_samples_are_those_of_one(happened):
    model, processor = load()
    session = Session(model, processor, PICTURE)
    first = "".join(chunk.text for chunk in session.ask(QUESTION, [Box(16, 189, 139, 313)]))
    turns = [first, "".join(chunk.text for chunk in session.ask("Where is the clock?"))]
    question = (model, processor, PICTURE, QUESTION, [Point(275, 135)])
    for found in happened.ranks:
        assert found["heads"] == 2
        assert found["turns"] == turns
        assert found["sampled"] == generate(*question, temp=1.0, seed=3)


def test_the_first_process_chooses_the_tokens(happened):
    """Two chips round differently: once the tokens differ, so do the keys that they share."""
    question = (*load(), PICTURE, QUESTION, [Point(275, 135)])
    for found in happened.ranks:
        assert found["disturbed"] == generate(*question)
        assert found["disturbed many"][0] == generate(*question)
        assert found["disturbed sampled"] == generate(*question, temp=1.0, seed=3)


@pytest.mark.parametrize(
    "case, words",
    (
        ("missing here", "There is no picture at"),
        ("missing there", "Process 1: There is no picture at"),
        ("no model there", "Process 1: "),
        ("other picture", "Process 1 has another picture than process 0"),
        ("other mask", "Process 1 has another mask than process 0"),
        ("other model", "Process 1 has another model than process 0"),
        ("narrow heads", "this model's are 12 wide"),
        ("stdin", "mlx.launch keeps stdin open"),
    ),
)
def test_a_refusal_is_told_once(happened, case, words):
    (status, errors), (quiet, nothing) = (found[case] for found in happened.ranks)
    assert status == 2 and words in errors
    assert errors.count("\n") == 1
    assert (quiet, nothing) == (0, "")


def test_the_first_process_alone_writes(happened):
    assert [found["files"][0] for found in happened.ranks] == [0, 0]
    assert happened.files == ["0.json", "0.png", "1.json"]


def test_a_conversation_is_not_shared(monkeypatch, capsys):
    monkeypatch.setattr(Ranks, "__init__", lambda self: vars(self).update(rank=0, count=2))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    with pytest.raises(SystemExit) as exit:
        chat_main(["--image", PICTURE])
    assert exit.value.code == 2
    assert "start it without mlx.launch" in capsys.readouterr().err
