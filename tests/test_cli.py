"""generate.py: every flag, every refusal, and Ctrl-C, on a model whose answer is known."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from ferret_mlx import hub, loading
from ferret_mlx.cli import generate_main
from ferret_mlx.config import read_config
from ferret_mlx.draw import BOX_COLORS, REGION_COLORS

ROOT = Path(__file__).parent.parent
# Every piece occurs once, so that each can be the successor of the one before.
SENTENCE = (
    "▁a ▁dog ▁[ 1 0 , 2 <0x30> ▁, 7 <0x37> 3 <0x2C> 8 <0x38> 4 ] ▁here </s>".split()  # noqa: SIM905
)
ANSWER = "a dog [10,20 ,773,884] here"
BOX = [2, 3, 154, 132]


@pytest.fixture(scope="module")
def parrot(parity, parity_model, parity_weights, tmp_path_factory) -> Path:
    """The parity model with weights that make it say SENTENCE after any prompt.

    Its layers add nothing, embeddings are one-hot, and the output layer maps each piece to the
    next: a real model, run as any other.
    """
    from ferret_mlx.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("models") / "parrot"
    folder.mkdir()
    values = read_config(parity / "checkpoint") | {"max_position_embeddings": 400}
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(parity / "checkpoint" / name, folder)
    vocab = Tokenizer(folder).vocab
    weights = parity_model.sanitize(parity_weights)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    embeddings, logits = np.zeros((2, 32001, 48), np.float16)
    for state, (piece, following) in enumerate(zip([":", *SENTENCE], SENTENCE, strict=False)):
        embeddings[vocab[piece], state] = 1
        logits[vocab[following], state] = 10
    weights["language_model.model.norm.weight"] = mx.ones(48)
    weights["language_model.model.embed_tokens.weight"] = mx.array(embeddings)
    weights["language_model.lm_head.weight"] = mx.array(logits)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture
def wide(parity) -> Path:
    return parity / "cases" / "wide.png"


@pytest.fixture
def ask(parrot, wide):
    def run(*arguments, image=wide, model=parrot, prompt="What is this?"):
        generate_main(
            ["--image", str(image), "--prompt", prompt, "--model", str(model), *map(str, arguments)]
        )

    return run


@pytest.fixture
def refused(ask, capsys):
    """The one line on stderr of a command that exits with 2."""

    def run(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as exit:
            ask(*arguments, **options)
        output, errors = capsys.readouterr()
        assert exit.value.code == 2 and output == ""
        assert errors.endswith("\n") and errors.count("\n") == 1 and ": error: " in errors
        return errors

    return run


def test_text_on_stdout_the_rest_on_stderr(ask, capsys):
    ask("--verbose")
    output, errors = capsys.readouterr()
    assert output == ANSWER + "\n"
    assert "Loaded" in errors and "generation_tps" in errors


def test_bundled_model(parrot, wide, monkeypatch, capsys):
    """Without --model; a prompt beyond its context is refused before the weights are read."""
    monkeypatch.setattr(hub, "BUNDLED_MODEL", str(parrot))
    generate_main(["--image", str(wide), "--prompt", "What is this?"])
    output, errors = capsys.readouterr()
    assert output == ANSWER + "\n"
    assert re.search("no --model given.*full-size weights.*convert.py.*--model OUT", errors)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        generate_main(["--image", str(wide), "--prompt", "a " * 300])
    errors = capsys.readouterr().err
    assert "context of 400" in errors and errors.count("\n") == 1


def test_json_is_the_only_output(ask, parity, capsys):
    ask(
        "--json", "--verbose", "--point", "40,60", "--mask", parity / "cases/wide_freeform.png",
        "--box", "20,10,90,80", "--polygon", "0,0 50,0 0,50", "--stroke", "10,10 90,90",
        "--stroke-width", 5, prompt="[region4] [region3] [region2] [region1] [region0]?",
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert list(result) == [
        "text", "boxes", "regions", "prompt_tokens", "generation_tokens", "timings",
    ]  # fmt: skip
    assert result["text"] == ANSWER
    assert result["boxes"] == [{"label": "a dog", "box": BOX}]
    # In the order of the command line, across the kinds.
    assert result["regions"] == [
        {"kind": "point", "text": "[200, 400]"},
        {"kind": "mask", "text": "[150, 133, 600, 800]"},
        {"kind": "box", "text": "[100, 66, 450, 533]"},
        {"kind": "polygon", "text": "[0, 0, 250, 333]"},
        {"kind": "stroke", "text": "[40, 53, 460, 613]"},
    ]
    assert result["generation_tokens"] == len(SENTENCE)
    assert result["prompt_tokens"] > 64
    assert all(value >= 0 for value in result["timings"].values())


def test_answer_as_in_python(parity, parity_model, parity_weights, wide, tmp_path, capsys):
    """Flags reach the generation: a random model, sampled, with another seed."""
    from ferret_mlx import Point, generate, load

    folder = tmp_path / "random"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(read_config(parity / "checkpoint")))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(parity / "checkpoint" / name, folder)
    weights = parity_model.sanitize(parity_weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    options = {"max_tokens": 9, "temp": 0.9, "top_p": 0.8, "seed": 3}
    generate_main(
        ["--image", str(wide), "--prompt", "What is [region0]?", "--point", "40,60"]
        + ["--model", str(folder), "--max-tokens", "9", "--temp", "0.9", "--top-p", "0.8"]
        + ["--seed", "3"]
    )
    expected = generate(*load(folder), wide, "What is [region0]?", [Point(40, 60)], **options)
    assert capsys.readouterr().out == expected + "\n"


def test_saved_picture(ask, wide, tmp_path, capsys):
    ask("--save-image", tmp_path / "out.png", "--point", "150,100")
    assert "1 box" in capsys.readouterr().err
    saved, original = (np.asarray(Image.open(path)) for path in (tmp_path / "out.png", wide))
    assert saved.shape == original.shape
    x1, y1, x2, y2 = BOX
    assert (saved[40:y2, x1] == BOX_COLORS[0]).all() and (saved[y2, x1:x2] == BOX_COLORS[0]).all()
    assert np.abs(saved[100, 150].astype(int) - REGION_COLORS[0]).max() < 20


def test_saved_without_boxes(ask, tmp_path, capsys):
    """--save-image writes its file whatever the answer says."""
    ask("--save-image", tmp_path / "out.jpg", "--max-tokens", 2)
    assert capsys.readouterr().out == "a dog\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jpg"]
    assert Image.open(tmp_path / "out.jpg").size == (200, 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens: got '0', expected a whole number of at least 1"),
        (["--max-tokens", "2.5"], "--max-tokens: got '2.5'"),
        (["--temp", "-0.1"], "--temp: got '-0.1', expected a number of at least 0"),
        (["--temp", "nan"], "--temp: got 'nan'"),
        (["--temp", "inf"], "--temp: got 'inf'"),
        (["--top-p", "0"], "--top-p: got '0', expected a number above 0 and at most 1"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--kv-bits", "3"], "--kv-bits: invalid choice"),
        (["--kv-bits", "8"], "kv_bits"),
        (["--point", "5"], "--point: got '5', expected X,Y in pixels"),
        (["--point", "5,x"], "--point: got '5,x'"),
        (["--point", "5,nan"], "--point: got '5,nan'"),
        (["--point", "1,2,3"], "--point: got '1,2,3'"),
        (["--box", "1,2,3"], "--box: got '1,2,3', expected X1,Y1,X2,Y2"),
        (["--polygon", "1,2 3,4"], "--polygon: got '1,2 3,4'"),
        (["--polygon", "1,2 3,4 5"], "--polygon: got"),
        (["--stroke", ""], "--stroke: got ''"),
        (["--stroke", "1,2", "--stroke-width", "0"], "--stroke-width: got '0'"),
        (["--point", "200,5"], r"\[region0\].*200, 5.*outside the picture of 200 x 150"),
        (["--point", "-5,10"], r"\[region0\].*-5, 10.*outside"),
        (["--point", "1,1", "--box", "9,1,8,2"], r"\[region1\].*x1 <= x2"),
        (["--polygon", "1,1 5,1 1,500"], r"\[region0\] \(--polygon\).*outside"),
        (["--mask", "missing.png"], "missing.png"),
        (["--save-image", "out"], "out has no ending of a picture format"),
        (["--save-image", "missing/out.png"], "no folder missing"),
        (["--model", "/missing/model"], "/missing/model"),
        (["--max", "3"], "unrecognized"),
    ],
)
def test_refused_arguments(refused, arguments, message):
    assert re.search(message, refused(*arguments))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ("  ", "prompt is empty"),
        ("[region3]?", r"\[region3\], but 2 given"),
        ("[region0]?", r"not \[region1\]"),
        ("<image>", "<image>"),
        ("caf\udce9", "is no character"),
        ("a " * 300, r"takes \d+ tokens.*context of 400"),
    ],
)
def test_refused_prompts(refused, prompt, message):
    line = refused("--point", "1,1", "--point", "2,2", prompt=prompt)
    assert re.search(message, line)


def test_refused_files(refused, wide, tmp_path):
    (tmp_path / "cut.png").write_bytes(wide.read_bytes()[:300])
    Image.new("L", (200, 150)).save(tmp_path / "empty.png")
    Image.new("L", (20, 15), 255).save(tmp_path / "small.png")
    assert "missing.png" in refused(image=tmp_path / "missing.png")
    assert "not a readable picture" in refused(image=tmp_path / "cut.png")
    assert "empty" in refused("--mask", tmp_path / "empty.png")
    assert "20 x 15" in refused("--mask", tmp_path / "small.png")
    assert "overwrite" in refused("--save-image", wide)
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in refused(model=tmp_path)


def test_nothing_is_written_when_refused(refused, parity, tmp_path):
    refused("--save-image", tmp_path / "out.png", prompt="")
    refused("--save-image", tmp_path / "out.png", model=parity / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def run_script(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "generate.py", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_help_needs_no_model_code():
    """--help must not wait for mlx, numpy or Pillow."""
    code = "import sys; from ferret_mlx.cli import generate_main\ntry: generate_main(['--help'])\n"
    code += "finally: print({'mlx', 'numpy', 'PIL', 'mlx_lm'} & set(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--stroke-width" in result.stdout
    assert result.stderr == "set()\n"


def test_interrupted_answer(parrot, wide, tmp_path):
    """Ctrl-C: what was said stays, the picture is written, no traceback."""
    endless = tmp_path / "endless"
    shutil.copytree(parrot, endless)
    weights = dict(mx.load(str(endless / "model.safetensors")))
    mx.eval(weights)
    # All logits alike: the first piece again and again, until the context ends.
    weights["language_model.lm_head.weight"] *= 0
    mx.save_safetensors(str(endless / "model.safetensors"), weights)
    values = json.loads((endless / "config.json").read_text())
    values["max_position_embeddings"] = 10**6
    (endless / "config.json").write_text(json.dumps(values))
    process = run_script(
        "--image", wide, "--prompt", "What?", "--model", endless, "--max-tokens", 10**6,
        "--save-image", tmp_path / "out.png",
    )  # fmt: skip
    said = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "<unk>" and rest.endswith("\n")
    assert "Interrupted" in errors and "Traceback" not in errors
    assert Image.open(tmp_path / "out.png").size == (200, 150)
    assert [path.name for path in tmp_path.glob("*.png")] == ["out.png"]
