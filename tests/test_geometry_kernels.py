"""The GPU kernels: their shipped text run on the CPU, and what happens where they do not work."""

import ctypes
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ferret_mlx import geometry, geometry_kernels
from ferret_mlx.geometry_kernels import CUDA_SOURCE, LANES, METAL_HEADER, METAL_SOURCE
from ferret_mlx.regions import Box, Point, sample_points

SHIM = Path(__file__).parent / "data" / "shim"
STAGES = ((128, 24), (32, 24))
# (points, kept) of the point sets, and how many sets: 10,500 in all.
SHAPES = {
    (512, 128): 300,
    (128, 32): 3000,
    (64, 16): 5200,
    (33, 33): 1000,
    (5, 5): 900,
    (1, 1): 100,
}
CONTRACTING = ["-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else [])]

PROGRAM = """
#include "lockstep.h"
{header}
static const float* points;
static const unsigned* starts;
static int* chosen;
template <int POINTS, int KEPT>
static void body() {{
    constexpr int PER_LANE = (POINTS + 31) / 32;
    {source}
}}
extern "C" int run(const float* p, const unsigned* s, int* c, unsigned count, int size, int kept) {{
    points = p; starts = s; chosen = c;
    {cases}
    return 1;
}}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A kernel's text as a function of points, count and starts."""
    if platform.system() != "Linux" or shutil.which("g++") is None:
        pytest.skip("needs g++ and ucontext")
    folder = tmp_path_factory.mktemp("shim")

    def build(name, source, flags=(), header=""):
        cases = "".join(
            f"if (size == {size} && kept == {kept}) "
            f"{{ run_groups(count, body<{size}, {kept}>); return 0; }}\n"
            for size, kept in SHAPES
        )
        text = PROGRAM.format(header=header, source=source, cases=cases)
        (folder / f"{name}.cpp").write_text(text)
        command = ["g++", "-std=c++17", "-O2", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        command += [*flags, f"-I{SHIM}", f"{name}.cpp", "-o", f"{name}.so"]
        subprocess.run(command, cwd=folder, check=True)
        library = ctypes.CDLL(str(folder / f"{name}.so"))

        def farthest_points(points, count, starts):
            points = np.ascontiguousarray(points, dtype=np.float32)
            starts = np.ascontiguousarray(starts, dtype=np.uint32)
            chosen = np.full((len(points), count), -1, dtype=np.int32)
            arrays = (array.ctypes.data_as(ctypes.c_void_p) for array in (points, starts, chosen))
            assert library.run(*arrays, len(points), points.shape[1], count) == 0
            return chosen

        return farthest_points

    return build


@pytest.fixture(scope="module")
def point_sets():
    """Per shape: random sets, sets that tie often, and sets of one point repeated."""
    rng = np.random.default_rng(0)
    sets = {}
    for (size, kept), count in SHAPES.items():
        points = rng.random((count, size, 2), dtype=np.float32)
        # Pixels of pictures of different sizes: few values, many ties, products that round.
        extents = rng.integers(2, 700, (count, 1, 2))
        pixels = (points * extents).astype(int) / extents
        points = np.where((np.arange(count) % 3 != 0)[:, None, None], pixels, points)
        points[count // 2 :: 7] = points[count // 2 :: 7, :1]
        points[::5, size // 2 :] = points[::5, : size - size // 2]
        points = points.astype(np.float32)
        starts = rng.integers(0, size, count)
        sets[size, kept] = points, starts, geometry.farthest_points(points, kept, starts)
    assert sum(len(points) for points, _, _ in sets.values()) >= 10_000
    return sets


def differing(kernel, point_sets) -> int:
    """How many point sets a kernel chooses otherwise in."""
    return sum(
        int((kernel(points, kept, starts) != expected).any(axis=1).sum())
        for (_, kept), (points, starts, expected) in point_sets.items()
    )


@pytest.mark.parametrize("flags", [[], CONTRACTING], ids=["plain", "contracting"])
def test_metal_kernel(compiled, point_sets, flags):
    kernel = compiled(f"metal{len(flags)}", METAL_SOURCE, flags, METAL_HEADER)
    assert differing(kernel, point_sets) == 0


def test_cuda_kernel(compiled, point_sets):
    assert differing(compiled("cuda", CUDA_SOURCE), point_sets) == 0


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("fma(dx, dx, 0.0f) + fma(dy, dy, 0.0f)", "dx * dx + dy * dy"),
        ("nearest[k] > best", "nearest[k] >= best"),
        ("simd_min(best == farthest ? best_index : 0xffffffffu)", "best_index"),
        ("distance < nearest[k] ? distance : nearest[k]", "distance"),
    ],
)
def test_a_wrong_kernel_is_noticed(compiled, point_sets, text, other):
    """Contraction, the last instead of the first of equals, no reduction, no running minimum."""
    assert text in METAL_SOURCE
    source = METAL_SOURCE.replace(text, other)
    kernel = compiled(f"wrong{len(other)}", source, CONTRACTING)
    assert differing(kernel, point_sets) > 0


def numpy_kernel(points: mx.array, count: int, starts: mx.array) -> mx.array:
    return mx.array(geometry.farthest_points(np.array(points), count, np.array(starts)))


def regions_points() -> np.ndarray:
    rng = np.random.default_rng(0)
    regions = [Box(3, 5, 60, 40), Point(20, 20), Box(0, 0, 99, 79), Box(7, 7, 7, 7)]
    return np.stack([sample_points(region.mask((100, 80)), rng) for region in regions])


@pytest.mark.parametrize("starts", [None, [np.array([0, 7, 511, 3]), np.array([1, 127, 0, 5])]])
def test_indices_on_the_device_are_those_of_the_host(starts):
    """Neighbours, too, and the points handed from block to block."""
    points = regions_points()
    expected = geometry.sampling_indices(points, STAGES, starts)
    found = geometry_kernels.sampling_indices(mx.array(points), STAGES, numpy_kernel, starts)
    for (centers, near), (own_centers, own_near) in zip(found, expected, strict=True):
        assert near.dtype == mx.int32
        assert np.array_equal(centers, own_centers)
        assert np.array_equal(np.sort(near, axis=-1), own_near)


def test_given_neighbors_on_the_device():
    points = regions_points()
    given = [np.zeros((4, 128, 24), int), np.ones((4, 32, 24), int)]
    run = partial(geometry_kernels.sampling_indices, mx.array(points), STAGES, numpy_kernel)
    assert [np.array(near).max() for _, near in run(neighbors=given)] == [0, 1]
    with pytest.raises(ValueError, match=r"neighbors\[1\] has indices outside of 0\.\.127"):
        run(neighbors=[given[0], given[1] * 128])


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a machine whose kernel is the given function."""
    geometry_kernels._checked_kernel.cache_clear()

    def use(kernel):
        gpu = type("Device", (), {"type": mx.gpu})()
        monkeypatch.setattr(mx, "default_device", lambda: gpu)
        monkeypatch.setattr(geometry_kernels, "build_kernel", lambda backend: kernel)
        return geometry_kernels.farthest_points_kernel

    yield use
    geometry_kernels._checked_kernel.cache_clear()


def test_a_kernel_that_agrees_is_used(on_gpu, recwarn):
    assert on_gpu(numpy_kernel)() is numpy_kernel
    assert not recwarn.list


def test_a_kernel_that_fails_is_reported_once(on_gpu, recwarn):
    def broken(points, count, starts):
        raise RuntimeError("no such function")

    kernel = on_gpu(broken)
    with pytest.warns(RuntimeWarning, match="does not run .*no such function.*the CPU does"):
        assert kernel() is None
    assert kernel() is None
    assert len(recwarn.list) == 0


def test_a_kernel_that_disagrees_is_not_used(on_gpu):
    """Taking the last of equals passes on random points, but not on those that tie."""

    def last_of_equals(points, count, starts):
        size = points.shape[1]
        mirrored = geometry.farthest_points(
            np.array(points)[:, ::-1], count, size - 1 - np.array(starts).astype(int)
        )
        return mx.array((size - 1 - mirrored).astype(np.int32))

    kernel = on_gpu(last_of_equals)
    with pytest.warns(RuntimeWarning, match="gives other indices than NumPy"):
        assert kernel() is None


def test_no_kernel_on_the_cpu():
    if mx.default_device().type == mx.cpu:
        assert geometry_kernels.farthest_points_kernel() is None


@pytest.mark.skipif(mx.default_device().type != mx.gpu, reason="needs a GPU")
def test_kernel_on_this_gpu(point_sets):
    kernel = geometry_kernels.farthest_points_kernel()
    assert kernel is not None

    def run(points, count, starts):
        return np.array(kernel(mx.array(points), count, mx.array(starts)))

    assert differing(run, point_sets) == 0


def test_lanes_are_those_of_the_text():
    assert LANES == 32 and "* 32 +" in METAL_SOURCE and "* 32 +" in CUDA_SOURCE
