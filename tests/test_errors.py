"""How commands end when nothing more can be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRINTS = """
from ferret_mlx.errors import run_command

@run_command
def main(argv):
    while True:
        print("caf\u00e9", flush=True)

main()
"""


def run(stdout, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=os.environ | variables, stdout=stdout,
        stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def unread():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_no_reader(unread):
    result = run(unread)
    assert (result.returncode, result.stderr) == (1, "")


def test_no_reader_in_a_locale_without_utf8(unread):
    """Catches an error of the encoding, told as bad input."""
    result = run(unread, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_full_disk():
    with open("/dev/full", "w") as full:
        result = run(full)
    assert result.returncode == 2
    assert result.stderr == "-c: error: [Errno 28] No space left on device\n"
