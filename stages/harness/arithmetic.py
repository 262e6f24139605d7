"""Arithmetic whose bits come again: on a CPU those of every x86-64 machine with AVX2, at full speed; on a GPU its own.

torch multiplies 32-bit matrices with MKL. MKL gives an Intel and an AMD machine different bits unless it is held to SSE2
(MKL_CBWR=COMPATIBLE, docker/determinism.env), which costs more than half of its speed. oneDNN, which torch carries too,
has AVX2 kernels that are the same code for both makers, so the products that training lives on go there:
about 95 GFLOP/s on one core against MKL's 38 in that mode. benchmarks/ measures it; a test shows the results agree.

MKL's square root differs between makers even in that mode, by a last bit now and then: 8-bit optimisers take it. Taken
in 64 bits and rounded to 32 it is the exact one on both (24 bits doubled, and two more, fit into 53).
"""

import os
import warnings

from stages.harness import measures

WORK_SPACE, STRICT_WORK_SPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # as in docker/determinism.env

_library = None  # torch drops the kernels when this object goes


def use_portable_arithmetic() -> None:
    """From now on 32-bit mm and addmm on the CPU go to oneDNN, and 32-bit sqrt goes by 64; all else stays as it is."""
    global _library
    if _library is not None:
        return
    import torch

    linear = torch.ops.mkldnn._linear_pointwise.default
    mm_out, addmm_out, sqrt_out = torch.ops.aten.mm.out, torch.ops.aten.addmm.out, torch.ops.aten.sqrt.out

    def suits(a, b) -> bool:
        return a.dtype == b.dtype == torch.float32 and a.numel() > 0 and b.numel() > 0

    def mm(a, b):
        if suits(a, b):
            return linear(a, b.t(), None, "none", [], "")
        return mm_out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    def addmm(added, a, b, *, beta=1, alpha=1):
        if suits(a, b) and added.dtype == torch.float32 and beta == 1 and alpha == 1:
            return linear(a, b.t(), None, "none", [], "").add_(added)
        return addmm_out(added, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    def sqrt(x):
        if x.dtype == torch.float32:
            wide = x.double()
            return sqrt_out(wide, out=wide).float()
        inexact = x.dtype if x.is_floating_point() or x.is_complex() else torch.get_default_dtype()
        return sqrt_out(x, out=x.new_empty(x.shape, dtype=inexact))

    def sqrt_(x):
        return x.copy_(sqrt(x))

    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns that a kernel is replaced: that is the purpose
        for kernel in (mm, addmm, sqrt, sqrt_):
            _library.impl(kernel.__name__, kernel, "CPU")


def use_strict_kernels(strict: bool) -> None:
    """Where `strict`, a GPU runs only kernels whose bits come again; the record says whether it does. CPUs here always do."""
    import torch

    if not torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for each tensor; nothing here reads unwritten memory
    if not strict:
        measures.note(level="statistical")


def read_work_space_once() -> None:
    """Has torch read the size of cuBLAS's work space now; before each product it would again, for 40 microseconds and more of a core.

    To be called when a library's own variables are set, for it begins to use the GPU. The size that torch goes by afterwards is its
    default, on Hopper the same 32 MiB (torch 2.11; see its pull request 179174). A work space that vLLM has taken away stays away.
    """
    import torch

    if torch.cuda.is_available() and os.environ.get(WORK_SPACE) == STRICT_WORK_SPACE:
        one = torch.ones(1, 1, device="cuda")
        one @ one  # at the first product torch asks whether this variable lets bits come again
        del os.environ[WORK_SPACE]
