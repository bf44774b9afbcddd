"""Timing with warm-up, median and spread, and what the machine could do at best."""

import functools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

# GB/s of memory bandwidth and TFLOPS of the GPU, by the name that the system gives.
CHIPS = {
    "Apple M1": (68, 2.6),
    "Apple M2 Pro": (200, 6.8),
    "Apple M2 Ultra": (800, 27.2),
    "Apple M3 Max": (400, 14.2),
    "Apple M4": (120, 4.6),
    "Apple M4 Max": (546, 18.4),
    "Apple M5": (153, 5.7),
    "Apple M5 Max": (614, 22.8),
}


@dataclass(frozen=True)
class Timing:
    """Seconds: median, and the middle half of the runs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.4g} ms ({self.low * 1e3:.4g} to {self.high * 1e3:.4g})"

    def as_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 6) for name in ("median", "low", "high")}


def summary(seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def alternate(
    functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time functions in turns, so that a change of the machine's speed meets all of them.

    Each must have evaluated what it computes when it returns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def measure(function: Callable[[], object], repeats: int, warmup: int = 1) -> Timing:
    return alternate({"": function}, repeats, warmup)[""]


@functools.cache
def chip_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if mx.default_device().type == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1] if found else f"{platform.machine()} CPU"


@dataclass(frozen=True)
class Machine:
    """What a figure is compared with; None where nobody said.

    Attributes:
        name: of the chip.
        bandwidth: bytes per second between memory and processor.
        flops: floating point operations per second.
    """

    name: str
    bandwidth: float | None
    flops: float | None

    @classmethod
    def find(cls, bandwidth: float | None, flops: float | None) -> "Machine":
        """bandwidth in GB/s and flops in TFLOPS, for a chip that is not in the table."""
        known = CHIPS.get(chip_name(), (None, None))
        bandwidth, flops = bandwidth or known[0], flops or known[1]
        return cls(chip_name(), bandwidth and bandwidth * 1e9, flops and flops * 1e12)

    def least(self, nbytes: float = 0, operations: float = 0) -> float | None:
        """The roofline: seconds below which reading and computing cannot take."""
        if self.bandwidth is None or self.flops is None:
            return None
        return max(nbytes / self.bandwidth, operations / self.flops)

    def share(self, seconds: float, nbytes: float = 0, operations: float = 0) -> str:
        """The share of the roofline that was reached."""
        least = self.least(nbytes, operations)
        if least is None:
            return "no roofline: give --bandwidth and --tflops"
        return f"roofline {least * 1e3:.3g} ms, {100 * least / seconds:.0f} % of it reached"


def machine_line() -> str:
    return f"{platform.system()} {platform.machine()}, {chip_name()}, MLX on {mx.default_device()}"
