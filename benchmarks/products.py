"""Measures 32-bit matrix products at the embedded model's shapes: MKL as docker/determinism.env holds it, and oneDNN.

    set -a; . docker/determinism.env; python -m benchmarks.products
"""

import time

import torch

from stages.harness.arithmetic import use_portable_arithmetic

SHAPES = [(1152, 128, 512), (1152, 512, 128), (128, 1152, 512), (2000, 128, 16), (2000, 16, 128)]
REPEATS = 60


def gflops(rows: int, inner: int, columns: int) -> float:
    """The best of many products, in billions of multiplications and additions a second."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best / 1e9


before = [gflops(*shape) for shape in SHAPES]
use_portable_arithmetic()
after = [gflops(*shape) for shape in SHAPES]
print("| rows x inner x columns | torch's own, GFLOP/s | here, GFLOP/s |\n| --- | --- | --- |")
for shape, slow, fast in zip(SHAPES, before, after):
    print(f"| {' x '.join(map(str, shape))} | {slow:.0f} | {fast:.0f} |")
