"""The processes that ``mlx.launch`` started, and what they tell each other."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np


class Ranks:
    """This process among all of one run; alone where ``mlx.launch`` did not start it.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
    """

    def __init__(self) -> None:
        self._group = mx.distributed.init()
        self.rank, self.count = self._group.rank(), self._group.size()

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

    def _all_gather(self, values: mx.array) -> mx.array:
        return mx.distributed.all_gather(values, group=self._group)
