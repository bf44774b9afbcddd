"""Processes started by ``mlx.launch`` on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(*words, count: int = 2) -> subprocess.CompletedProcess:
    """Run Python with these words in ``count`` processes; output and errors of all together."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    if launcher.exists():
        command = [launcher]
    else:
        code = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
        command = [sys.executable, "-c", code]
    # Where stdin has ended, the launcher reads it again and again, and takes a whole core.
    stdin, open_end = os.pipe()
    try:
        return subprocess.run(
            [*command, "-n", str(count), "--backend", "ring", "--starting-port",
             str(free_ports(count)), "--", sys.executable, *map(str, words)],
            cwd=ROOT, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # or they wait for each other
            stdin=stdin, check=True, timeout=300, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        os.close(stdin)
        os.close(open_end)


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(29000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for index, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + index))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise OSError("no free ports")
