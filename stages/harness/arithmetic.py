"""Matrix products on a CPU that come out the same on every x86-64 machine with AVX2, at full speed.

torch multiplies 32-bit matrices with MKL. MKL gives an Intel and an AMD machine different bits unless it is held to SSE2
(MKL_CBWR=COMPATIBLE, docker/determinism.env), which costs more than half of its speed. oneDNN, which torch carries too,
has AVX2 kernels that are the same code for both makers, so the products that training lives on go there:
about 95 GFLOP/s on one core against MKL's 38 in that mode. benchmarks/ measures it; a test shows the results agree.
"""

import warnings

_library = None  # torch drops the kernels when this object goes


def use_portable_products() -> None:
    """From now on aten::mm and aten::addmm of 32-bit matrices on the CPU go to oneDNN; others stay as they are."""
    global _library
    if _library is not None:
        return
    import torch

    linear = torch.ops.mkldnn._linear_pointwise
    mm_out, addmm_out = torch.ops.aten.mm.out, torch.ops.aten.addmm.out

    def suits(*matrices) -> bool:
        return all(matrix.dtype == torch.float32 and matrix.numel() > 0 for matrix in matrices)

    def mm(a, b):
        if suits(a, b):
            return linear(a, b.t(), None, "none", [], "")
        return mm_out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    def addmm(added, a, b, *, beta=1, alpha=1):
        if suits(added, a, b) and beta == 1 and alpha == 1:
            return linear(a, b.t(), None, "none", [], "").add_(added)
        return addmm_out(added, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns that a kernel is replaced: that is the purpose
        _library.impl("mm", mm, "CPU")
        _library.impl("addmm", addmm, "CPU")
