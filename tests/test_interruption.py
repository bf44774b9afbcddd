"""Conversions that are killed or interrupted at any moment, and what the next run makes of it."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import ferret_mlx.convert
import ferret_mlx.output
import ferret_mlx.plan
import ferret_mlx.writing
from ferret_mlx.checkpoint import open_checkpoint
from ferret_mlx.cli import convert_main
from ferret_mlx.convert import convert

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 400_000  # four shards of the parity delta at 8 bits


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(ferret_mlx.plan, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def arguments(parity) -> dict:
    return {
        "hf_path": str(parity / "delta" / "delta"),
        "base_path": str(parity / "delta" / "base"),
        "quantize": True,
        "q_bits": 8,
        "q_group_size": 32,
    }


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory) -> dict[str, bytes]:
    """The files of a conversion that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ferret_mlx.plan, "SHARD_BYTES", SHARD_BYTES)
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        convert(**arguments, mlx_path=out)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, int]:
    """File -> time of its last change: a shard that is written anew gets another one."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def forker():
    command = [sys.executable, str(Path(__file__).with_name("killed_conversion.py"))]
    with subprocess.Popen(
        [*command, str(SHARD_BYTES)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(arguments: dict, at: int | None = None) -> dict:
            print(json.dumps({"arguments": arguments, "at": at}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def test_killed_at_random_moments(arguments, expected, tmp_path, forker):
    """Ten moments of the whole run, twenty of those since the working folder exists.

    Catches a target that appears before it is whole, and leftovers that a rerun takes for
    finished or trips over.
    """
    undisturbed = forker(arguments | {"mlx_path": str(tmp_path / "counted")})
    begin, end = undisturbed["counts"]
    assert not undisturbed["killed"] and 0 < begin < end
    rng = random.Random(0)
    moments = [rng.randrange(end) + 1 for _ in range(10)]
    moments += [rng.randrange(begin, end) + 1 for _ in range(20)]
    killed = left = 0
    for i, moment in enumerate(moments):
        out = tmp_path / str(i) / "out"
        killed += forker(arguments | {"mlx_path": str(out)}, moment)["killed"]
        if out.exists():
            assert contents(out) == expected, moment
        else:
            left += out.parent.exists()
            convert(**arguments, mlx_path=out)
            assert contents(out) == expected, moment
            assert os.listdir(out.parent) == ["out"], moment
        shutil.rmtree(out.parent)
    # The calls differ a little from run to run, so the last moments may come too late.
    assert killed >= 25 and left >= 15


def interrupt_after(monkeypatch, count: int) -> None:
    """Ctrl-C when `count` shards are finished."""
    finish = ferret_mlx.output.WorkingFolder.finish

    def counted(self, name, report):
        finish(self, name, report)
        if len(list(self.model.glob("*.safetensors"))) == count:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ferret_mlx.output.WorkingFolder, "finish", counted)


def interrupted(arguments: dict, out: Path, capsys) -> str:
    flags = ["-q", "--q-bits", "8", "--q-group-size", "32", "--mlx-path", str(out)]
    flags += ["--hf-path", arguments["hf_path"], "--base-path", arguments["base_path"]]
    with pytest.raises(SystemExit) as exit:
        convert_main(flags)
    assert exit.value.code == 130 and not out.exists()
    return capsys.readouterr().err


def test_a_rerun_keeps_the_finished_shards(arguments, expected, tmp_path, monkeypatch, capsys):
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert "the same command goes on" in interrupted(arguments, out, capsys)
    finished = shards(work / "model")
    assert len(finished) == 2
    read = []
    original = ferret_mlx.writing.cast_blocks
    monkeypatch.setattr(
        ferret_mlx.writing,
        "cast_blocks",
        lambda source, layer: [read.append(layer.name), *original(source, layer)][1:],
    )
    convert(**arguments, mlx_path=out)
    assert contents(out) == expected and os.listdir(tmp_path) == ["out"]
    assert finished.items() <= shards(out).items()
    with open_checkpoint(out) as checkpoint:
        assert 0 < len(read) < len(checkpoint.names()) // 2
    # The table counts what was finished before, too.
    assert capsys.readouterr().err.count("language model       21") == 1


@pytest.mark.parametrize("change", ["options", "source", "job"])
def test_another_conversion_starts_anew(arguments, expected, tmp_path, monkeypatch, capsys, change):
    """Catches shards of other options, or of files that have changed since, in the result."""
    delta = tmp_path / "delta"
    shutil.copytree(arguments["hf_path"], delta)
    arguments = arguments | {"hf_path": str(delta)}
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        interrupted(arguments, out, capsys)
    finished = shards(work / "model")
    if change == "options":
        convert(**(arguments | {"q_bits": 4}), mlx_path=out)
        config = json.loads((out / "config.json").read_text())
        assert config["quantization"]["bits"] == 4
    elif change == "source":
        os.utime(delta / "pytorch_model-00002-of-00003.bin", (1, 1))
        convert(**arguments, mlx_path=out)
    else:
        (work / "job.json").write_text("{")
        convert(**arguments, mlx_path=out)
    assert "another conversion" in capsys.readouterr().err
    assert not finished.items() & shards(out).items()
    assert sorted(os.listdir(tmp_path)) == ["delta", "out"]


def test_only_one_process_at_a_time(arguments, tmp_path):
    work = tmp_path / ".out.partial"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            convert(**arguments, mlx_path=tmp_path / "out")
        assert os.listdir(work) == ["lock"]
    convert(**arguments, mlx_path=tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_disk_space_is_checked_before_the_start(arguments, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(ferret_mlx.convert, "write_shards", lambda *args: pytest.fail("written"))
    with pytest.raises(ValueError, match=r"needs 0\.01 GB on a disk with 0\.00 GB free"):
        convert(**arguments, mlx_path=tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("room", [100, 1_500_000])
def test_a_full_disk(arguments, tmp_path, monkeypatch, capsys, room):
    """One line, and finished shards stay for the time when there is space again."""
    pwrite, written = os.pwrite, 0

    def full(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > room:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    flags = ["--hf-path", arguments["hf_path"], "--base-path", arguments["base_path"]]
    flags += ["--mlx-path", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(os, "pwrite", full)
        convert_main(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert "No space left on device" in error and "run the same command again" in error
    assert os.listdir(tmp_path) == ([] if room == 100 else [".out.partial"])
    convert_main(flags)
    assert os.listdir(tmp_path) == ["out"]


def test_small_files_that_cannot_be_written(arguments, tmp_path, monkeypatch, capsys):
    """Catches a traceback: an error of a write, unlike one of opening, has no file name."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ferret_mlx.convert, "save_config", full)
    with pytest.raises(ValueError, match=r"out\.partial could not be written \(No space"):
        convert(**arguments, mlx_path=tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.partial"]


def test_leftovers_of_a_run_killed_after_its_rename(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="exists already"):
        convert(**arguments, mlx_path=tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_shards_are_those_of_one_file(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(ferret_mlx.plan, "SHARD_BYTES", 1 << 30)
    convert(**arguments, mlx_path=tmp_path / "out")
    whole = mx.load(str(tmp_path / "out" / "model.safetensors"))
    index = json.loads(expected["model.safetensors.index.json"])["weight_map"]
    assert set(index) == set(whole) and len(set(index.values())) >= 4
    for name, data in expected.items():
        if name.endswith(".safetensors"):
            (tmp_path / name).write_bytes(data)
            for tensor, value in mx.load(str(tmp_path / name)).items():
                assert index[tensor] == name and mx.array_equal(whole.pop(tensor), value)
    assert not whole
