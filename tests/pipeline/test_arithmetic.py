"""The products and roots that replace torch's own: right in every layout, in gradients, and left alone where they do not suit."""

import subprocess
import sys

from tests.imports import ROOT

CODE = """
import torch
from torch.testing import assert_close
from stages.harness.arithmetic import use_portable_arithmetic

draw = torch.Generator().manual_seed(0)
normal = lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=draw, dtype=dtype)
cases = [(a, b) for k in (1, 16, 130) for m in (1, 7, 256) for n in (1, 33)
         for a in (normal(m, k), normal(k, m).t(), normal(m, 2 * k)[:, ::2]) for b in (normal(k, n), normal(n, k).t())]
before = [(a @ b, torch.addmm(normal(b.shape[1]), a, b, alpha=2)) for a, b in cases]
doubles, halves = (normal(5, 6, dtype=kind) for kind in (torch.float64, torch.bfloat16))
empty = normal(0, 4) @ normal(4, 3)
left_alone = [doubles @ doubles.t(), halves @ halves.t(), empty]
x, w, bias = normal(4, 9, 12).requires_grad_(), normal(5, 12).requires_grad_(), normal(5).requires_grad_()
torch.nn.functional.linear(x, w, bias).square().sum().backward()
gradients = [t.grad.clone() for t in (x, w, bias)]
for t in (x, w, bias): t.grad = None

use_portable_arithmetic()
for (a, b), (product, _) in zip(cases, before):
    assert_close(a @ b, product, rtol=1e-4, atol=1e-4)
    added = normal(b.shape[1])
    assert_close(torch.addmm(added, a, b), added + product, rtol=1e-4, atol=1e-4)
    assert_close(torch.addmm(added, a, b, alpha=2, beta=3), 3 * added + 2 * product, rtol=1e-4, atol=1e-4)
for now, was in zip([doubles @ doubles.t(), halves @ halves.t(), empty], left_alone):
    assert torch.equal(now, was) and now.dtype == was.dtype
assert (normal(3, 0) @ normal(0, 2)).eq(0).all()
torch.nn.functional.linear(x, w, bias).square().sum().backward()
for t, was in zip((x, w, bias), gradients):
    assert_close(t.grad, was, rtol=1e-4, atol=1e-4)
for name in ("mm", "addmm", "sqrt", "sqrt_"):
    assert "arithmetic.py" in torch._C._dispatch_dump(f"aten::{name}"), name

from decimal import Decimal, localcontext
squares = normal(2000).abs().square()
with localcontext(prec=40):  # far more digits than a float has: rounding them once gives the nearest float
    exact = torch.tensor([float(Decimal(x).sqrt()) for x in squares.tolist()], dtype=torch.float32)
assert torch.equal(squares.sqrt(), exact)
assert torch.equal(squares.clone().sqrt_(), exact)
assert torch.equal(torch.tensor([4, 9]).sqrt(), torch.tensor([2.0, 3.0]))
assert torch.tensor([-1.0, 0.0]).sqrt().isnan().tolist() == [True, False]
assert (normal(3, dtype=torch.bfloat16).abs().sqrt().dtype, doubles.abs().sqrt().dtype) == (torch.bfloat16, torch.float64)
leaf = squares[:5].clone().requires_grad_()
leaf.sqrt().sum().backward()
assert_close(leaf.grad, 0.5 / exact[:5])
"""


def test_portable_arithmetic_agrees_with_torchs_own_and_really_replaces_it():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
