"""Runs conversions that kill themselves, for test_interruption.py: one JSON job per line.

Imports once and forks for each job, because importing takes longer than converting. A job dies by
SIGKILL at the n-th call or return of a Python or C function, counted from the first one inside
`convert`; without `at` it reports how many there are.
"""

import json
import os
import signal
import sys

import mlx.core as mx

import ferret_mlx.plan
from ferret_mlx.convert import convert


def run(arguments: dict, at: int | None) -> list[int]:
    """Events until the working folder is made, and in all."""
    mx.set_default_device(mx.cpu)  # a GPU's driver does not survive a fork
    count = before_output = 0

    def hook(frame, event, _argument):
        nonlocal count, before_output
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not before_output and frame.f_code.co_name == "working_folder":
            before_output = count

    sys.setprofile(hook)
    try:
        convert(**arguments)
    finally:
        sys.setprofile(None)
    return [before_output, count]


def main() -> None:
    ferret_mlx.plan.SHARD_BYTES = int(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, json.dumps(run(**job)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as counts:
            answer = {"killed": os.WIFSIGNALED(status), "counts": json.loads(counts.read() or "[]")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
