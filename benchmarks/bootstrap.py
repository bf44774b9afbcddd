"""Paired differences with bootstrap intervals."""

from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Difference(NamedTuple):
    """A mean difference and its interval, which holds 95 % of the bootstrap draws."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def paired_difference(values: np.ndarray, baseline: np.ndarray, seed: int = 0) -> Difference:
    """Mean of ``values - baseline`` over the same items, whole items drawn with replacement.

    Args:
        values, baseline: (N,), item by item.

    Raises ValueError when there is no item or the two differ in length.
    """
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"{len(values)} and {len(baseline)} values cannot be paired.")
    differences = np.asarray(values, float) - np.asarray(baseline, float)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(differences), size=(DRAWS, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))
