"""Matrix products in training: the same numbers as `x @ w`, by the quickest kernel at hand.

On processors torch hands single precision to MKL, which keeps to half-width vectors on chips of
other makers; oneDNN, which comes with torch too, uses the whole width: 2.2 times the speed on an
AMD EPYC, the same on Intel's. What its kernel does not know (other precisions and devices,
autocast, batched gradients, tiny matrices) goes the plain way.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

SMALL = 1 << 20
"""Multiplications below which the detour costs more than it saves."""
KERNEL = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w + bias` of vectors x [..., n] and a matrix w [n, m], with gradients to all three."""
    if _plain(x, w):
        return x @ w if bias is None else nn.functional.linear(x, w.T, bias)
    return _Product.apply(x, w, bias)  # pyright: ignore[reportReturnType]


class Linear(nn.Linear):
    """A linear map that is trained: torch's own, by `matmul`."""

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return matmul(input, self.weight.T, self.bias)


def _plain(x: Tensor, w: Tensor) -> bool:
    single = x.dtype == w.dtype == torch.float32 and x.device.type == "cpu"
    if (
        KERNEL is None
        or not single
        or x.numel() * w.shape[-1] < SMALL
        or torch.is_autocast_enabled("cpu")
    ):
        return True
    return is_in_torch_dispatch_mode()  # whoever counts operations should see one that it knows


def _multiplied(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product of two matrices, either of which may lie transposed in memory."""
    return KERNEL(x, w.T, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _multiplied(x.flatten(0, -2), w, bias).view(*x.shape[:-1], w.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias = ctx.needs_input_grad
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # pyright: ignore[reportAttributeAccessIssue]
        times = torch.matmul if batched else _multiplied
        flat = dy.reshape(-1, dy.shape[-1])
        dx = times(flat, w.T).reshape(x.shape) if of_x else None
        dw = times(x.flatten(0, -2).T, flat) if of_w else None
        return dx, dw, flat.sum(0) if of_bias else None
