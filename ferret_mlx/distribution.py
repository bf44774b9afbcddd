"""The processes that ``mlx.launch`` started, and what they tell each other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import describe

# One of them is set in every process that mlx.launch, or mpirun for it, starts.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


class Ranks:
    """This process among all of one run; alone where ``mlx.launch`` did not start it.

    Attributes:
        group: of all processes, MLX's; None for one that is alone.
        rank: of this process, from 0.
        count: of processes.
    """

    def __init__(self) -> None:
        self.group: mx.distributed.Group | None = None
        self.rank, self.count = 0, 1
        # Otherwise MLX would start MPI where that is installed, for nothing.
        if any(name in os.environ for name in _LAUNCHED):
            self.group = mx.distributed.init()
            self.rank, self.count = self.group.rank(), self.group.size()

    @property
    def leads(self) -> bool:
        """Whether this process scores, writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks; waits for all of them.

        value: anything that JSON can hold.
        """
        if self.count == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.array(self._all_gather(mx.array([data.size], mx.int32)))
        # All must send the same number of bytes.
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: data.size] = data
        rows = np.array(self._all_gather(mx.array(padded))).reshape(self.count, -1)
        return [
            json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """A block that succeeds in all processes or ends all of them.

        The first process raises the error, its own or the first of another one, and so tells it
        once. The others exit in silence, and with 0, since ``mlx.launch`` kills all processes as
        soon as one exits with anything else.
        """
        error = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        told = self.gather(None if error is None else describe(error))
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if failed and not self.leads:
            sys.exit(0)
        if error is not None:
            raise error
        if failed:
            raise ValueError(f"Process {failed[0]}: {told[failed[0]]}")

    def require_same(self, what: str, value: Any) -> None:
        """Raises ValueError as `agree` does where a process has another value (JSON) of `what`.

        value: of this process, or a function that gives it and is not called where it is alone.
        """
        if self.count == 1:
            return
        values = self.gather(value() if callable(value) else value)
        with self.agree():
            for rank, other in enumerate(values):
                if other != values[0]:
                    raise ValueError(
                        f"Process {rank} has another {what} than process 0; give all machines "
                        "the same files."
                    )

    def _all_gather(self, values: mx.array) -> mx.array:
        return mx.distributed.all_gather(values, group=self.group)
