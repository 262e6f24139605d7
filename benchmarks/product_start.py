"""How long a host takes to start a matrix product on its GPU, with and without the variable that strict kernels ask for.

    python benchmarks/product_start.py

torch 2.11 parses CUBLAS_WORKSPACE_CONFIG before each product; `stages/harness/arithmetic.py` takes it away once it has been read.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from stages.harness.arithmetic import STRICT_WORK_SPACE, WORK_SPACE  # noqa: E402

STARTS = 300


def main() -> None:
    for value in (None, STRICT_WORK_SPACE):
        environment = {name: held for name, held in os.environ.items() if name != WORK_SPACE} | ({WORK_SPACE: value} if value else {})
        print(f"{WORK_SPACE}={value or ''}:", subprocess.check_output([sys.executable, __file__, "measure"], env=environment, text=True).strip())


def measure() -> str:
    import torch

    rows, weight, bias = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((128, 2560), (2560, 2560), (2560,)))
    return f"a product {microseconds(lambda: rows @ weight):.1f} µs, one with a bias {microseconds(lambda: torch.addmm(bias, rows, weight)):.1f}"


def microseconds(start) -> float:
    """Of the host, for a start while the GPU keeps up."""
    import torch

    start()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STARTS):
        start()
    took = time.perf_counter() - begun
    torch.cuda.synchronize()
    return 1e6 * took / STARTS


if __name__ == "__main__":
    print(measure()) if sys.argv[1:] == ["measure"] else main()
