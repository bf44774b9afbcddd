"""The terminal conversation, line by line, on a model whose answer is known."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_cli import ANSWER, BOX, ROOT, parrot, wide  # noqa: F401

from ferret_mlx.chat import chat_main
from ferret_mlx.draw import BOX_COLORS
from ferret_mlx.model import Model
from ferret_mlx.session import Session


@pytest.fixture
def talk(parrot, wide, monkeypatch, capsys):  # noqa: F811
    """Lines in, stdout and stderr out; an exception among the lines is raised by the prompt."""

    def run(*lines, image=wide, options=()):
        left = iter(lines)

        def read(prompt):
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        chat_main(["--image", str(image), "--model", str(parrot), *options])
        return capsys.readouterr()

    return run


@pytest.fixture
def asked(monkeypatch) -> list:
    """The questions and regions that reach the session."""
    seen = []
    ask = Session.ask

    def noting(self, prompt, regions=(), **options):
        seen.append((prompt, [region.text(self.image_size) for region in regions]))
        return ask(self, prompt, regions, **options)

    monkeypatch.setattr(Session, "ask", noting)
    return seen


def test_answers_on_stdout_the_rest_on_stderr(talk):
    output, errors = talk("What is this?", "", "  Sure?  ", KeyboardInterrupt(), "/quit", "Never.")
    assert output == f"{ANSWER}\n{ANSWER}\n\n"
    assert "200 x 150 pixels" in errors and errors.count("of 400 tokens, keys and values") == 2


def test_regions_keep_their_names(talk, asked, parity):
    _, errors = talk(
        "/point 40,60", "/box 20,10,90,80", "What is it?", "And now?",
        f"/mask {parity / 'cases/wide_freeform.png'}", "/polygon 0,0 50,0 0,50",
        "Is [region3] like [region1]?", "/stroke 10,10 90,90", "/regions", "Hm?",
    )  # fmt: skip
    point, box, polygon = "[200, 400]", "[100, 66, 450, 533]", "[0, 0, 250, 333]"
    assert asked[:3] == [
        ("What is it?", [point, box]),
        ("And now?", []),
        ("Is [region1] like [region0]?", [box, polygon]),
    ]
    assert [len(regions) for _, regions in asked] == [2, 0, 2, 1]
    assert "[region2] is the mask [150, 133, 600, 800]." in errors
    assert "[region0] Point(x=40.0, y=60.0)" in errors and "[region4] FreeForm" in errors


def test_reset_and_another_picture(talk, asked, tmp_path):
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    _, errors = talk(
        "/point 150,100", "What?", "/reset", "/regions", "What?", "[region0]?",
        f"/image {tmp_path / 'red.png'}", "/point 150,100", "What?",
    )  # fmt: skip
    assert asked == [("What?", ["[750, 666]"]), ("What?", []), ("What?", [])]
    assert "No region was given." in errors and "There is no [region0], 0 were given" in errors
    assert "80 x 60 pixels" in errors and "outside the picture of 80 x 60" in errors


def test_saved_picture(talk, wide, tmp_path):  # noqa: F811
    target = tmp_path / "out.png"
    _, errors = talk("/point 150,100", "What?", f"/save {target}")
    assert "with 1 box." in errors
    saved = np.asarray(Image.open(target))
    x1, y1, x2, y2 = BOX
    assert (saved[40:y2, x1] == BOX_COLORS[0]).all()
    before = wide.read_bytes()
    _, errors = talk("What?", f"/save {wide}", f"/save {tmp_path / 'missing' / 'out.png'}")
    assert "would overwrite the picture" in errors and "no folder" in errors.lower()
    assert wide.read_bytes() == before


def test_mistakes_end_nothing(talk):
    output, errors = talk(
        "/nothing", "/image missing.png", "/image", "/save", "/point 5", "/box 9,1,8,2",
        "/mask missing.png", "<image>", "/help", "What?",
    )  # fmt: skip
    assert output == ANSWER + "\n"
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    for line, message in zip(
        lines,
        ["There is no /nothing", "missing.png", "/image needs", "/save needs", "/point: got '5'",
         "x1 <= x2", "missing.png", "<image>"],
        strict=True,
    ):  # fmt: skip
        assert message in line
    assert "/polygon" in errors


def test_full_context_forgets_the_oldest_turns(talk):
    _, errors = talk(*["What is this? " + "a " * 20] * 6, options=["--max-tokens", "20"])
    assert "the oldest turn was forgotten" in errors and "error" not in errors


def test_interrupted_answer(talk, monkeypatch):
    """Ctrl-C ends the answer; the conversation goes on with what was said."""
    call, calls = Model.__call__, []

    def interrupting(self, *args, **options):
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, *args, **options)

    monkeypatch.setattr(Model, "__call__", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    output, errors = talk("What is this?", "Sure?")
    first, second = output.splitlines()
    assert ANSWER.startswith(first) and 0 < len(first) < len(ANSWER)
    assert second == ANSWER and "error" not in errors
    assert signal.getsignal(signal.SIGINT) is handler


def test_nobody_reads_the_answers(talk, monkeypatch):
    """`... | head` for one: the questions that are left are not worth an answer."""
    tried = []

    def fail(*args, **options):
        tried.append(args)
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("ferret_mlx.chat.print", fail, raising=False)
    monkeypatch.setattr("ferret_mlx.errors._give_up_stdout", lambda: None)
    with pytest.raises(SystemExit) as exit:
        talk("What is this?", "Sure?")
    assert exit.value.code == 1 and len(tried) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "missing.png"),
        ([], "required: --image"),
        (["--image", "a.png", "--temp", "-1"], "--temp: got '-1'"),
    ],
)
def test_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        chat_main(arguments)
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and message in errors and errors.count("\n") == 1


def test_help_needs_no_model_code():
    code = "import sys; from ferret_mlx.chat import chat_main\ntry: chat_main(['--help'])\n"
    code += "finally: print({'mlx', 'numpy', 'PIL', 'mlx_lm'} & set(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "/stroke X,Y X,Y ..." in result.stdout
    assert result.stderr == "set()\n"
