"""Scenes as training samples: pixels and dense labels, drawn on the fly by worker processes."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .config import IMAGE_MEAN, IMAGE_STD
from .glyphs import NAMES
from .scenes import Scene, compose
from .vision import IGNORE


def pixels_of(image: Image.Image, size: int) -> np.ndarray:
    """Squashed to (size, size) on 8-bit pixels with bicubic filtering; uint8 (size, size, 3)."""
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), CLIP's mean and deviation applied."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device)
    std = torch.tensor(IMAGE_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def cell_shares(scene: Scene, grid: int) -> np.ndarray:
    """(objects, n*n) share of each cell, in [0, 1], that an object's visible pixels cover."""
    masks = [Image.fromarray(np.uint8(o.mask) * 255) for o in scene.objects]
    shares = [np.asarray(m.resize((grid, grid), Image.Resampling.BOX)) / 255 for m in masks]
    return np.reshape(shares, (len(masks), grid * grid))


def own_cells(shares: np.ndarray) -> np.ndarray:
    """(objects, n*n) bool: the cells that show an object better than any other object, at least
    by a quarter; the best one where there is none."""
    own = (shares >= 0.25) & (shares == shares.max(0))
    best = shares == shares.max(1, keepdims=True)
    return np.where(own.any(1, keepdims=True), own, best)


def dense_labels(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Per cell the object that covers most of it: labels (n*n,), 0 = background, IGNORE where an
    object covers only a sliver; boxes (n*n, 4) in [0, 1]."""
    cover = cell_shares(scene, grid)
    most, share = cover.argmax(0), cover.max(0)
    kinds = np.array([NAMES.index(o.name) + 1 for o in scene.objects])
    labels = np.where(share >= 0.1, kinds[most], np.where(share > 0.02, IGNORE, 0))
    extent = np.array(scene.size * 2, np.float32)
    boxes = np.array([o.box for o in scene.objects], np.float32) / extent
    return labels.astype(np.int64), boxes[most]


class SceneStream(IterableDataset):
    """Endless samples of a split from scene ``start`` on; ``make(scene, rng)`` builds a sample.

    Worker k of n takes the scenes start + k, start + k + n, ...
    """

    def __init__(self, split: str, start: int, make):
        self.split, self.start, self.make = split, start, make

    def __iter__(self):
        worker = get_worker_info()
        number, step = (self.start + worker.id, worker.num_workers) if worker else (self.start, 1)
        if worker:
            torch.set_num_threads(1)
        while True:
            scene = compose(self.split, number)
            if scene.objects:
                yield self.make(scene, np.random.default_rng([7, number]))
            number += step


class DenseSample:
    def __init__(self, image_size: int, grid: int):
        self.image_size, self.grid = image_size, grid

    def __call__(self, scene: Scene, rng: np.random.Generator):
        labels, boxes = dense_labels(scene, self.grid)
        return pixels_of(scene.image, self.image_size), labels, boxes
