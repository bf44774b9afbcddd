"""Jobs of one benchmark in several processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def spread(function: Callable[..., Any], jobs: Sequence[tuple], workers: int) -> Iterator[Any]:
    """Results of ``function(*job)`` in the order of the jobs, each as soon as it is there.

    Args:
        function: of a module, so that other processes find it.
        workers: processes, of one thread each; with 1 all runs in this one.
    """
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    # Spawned, since neither MLX nor torch survives a fork; a thread each, or they take turns.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True)) if jobs else ()
