"""Matrix products: the quick kernel gives what torch gives, whatever lies transposed, and steps
aside where it must.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spd_lightning.decomposition import matmul

M, N, K = 64, 160, 128  # more than SMALL multiplications


def operands(turned: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 32, N], w [N, K], maybe transposed in memory, and a bias."""
    torch.manual_seed(0)
    w = torch.randn(K, N, dtype=dtype).T if turned else torch.randn(N, K, dtype=dtype)
    x = torch.randn(2, M // 2, N, dtype=dtype)
    bias = torch.randn(K, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()


@pytest.mark.skipif(matmul.KERNEL is None, reason="torch was built without oneDNN")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_are_those_of_double_precision(turned: bool, biased: bool):
    x, w, bias = operands(turned)
    held = (x, w, bias) if biased else (x, w)
    y = matmul.matmul(*held)
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    exact = [v.detach().double().requires_grad_() for v in held]
    truth = exact[0] @ exact[1] + (exact[2] if biased else 0)
    dy = torch.randn_like(y)
    for mine, theirs in zip(
        [y, *torch.autograd.grad(y, held, dy)],
        [truth, *torch.autograd.grad(truth, exact, dy.double())],
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_batched_gradients():
    x, w, _ = operands(False)
    dy = torch.randn(3, *x.shape[:-1], K)
    y = matmul.matmul(x, w)
    (together,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    for one, d in zip(together, dy, strict=True):
        torch.testing.assert_close(
            one, torch.autograd.grad(y, x, d, retain_graph=True)[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("case", ["double", "autocast", "tiny"])
def test_the_plain_way_is_taken(case: str):
    x, w, _ = operands(False, torch.float64 if case == "double" else torch.float32)
    x = x[:, :1] if case == "tiny" else x
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = matmul.matmul(x, w)
        assert torch.equal(y, x @ w)
    assert type(y.grad_fn).__name__ != "_ProductBackward"


def test_whoever_counts_operations_sees_them():
    x, w, _ = operands(False)
    with FlopCounterMode(display=False) as counted:
        matmul.matmul(x, w)
    assert counted.get_total_flops() == 2 * M * N * K


def test_a_trained_linear_map_is_torchs_own():
    torch.manual_seed(0)
    mine = matmul.Linear(N, K)
    x = torch.randn(M, N)
    theirs = torch.nn.Linear(N, K)
    theirs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
