"""Matrix products for training: `x @ w` by the fastest kernel available.

On CPUs, torch passes float32 products to MKL, which uses only half of the vector width on
processors that Intel did not make. oneDNN is part of torch too, and uses all of it: it is 2.2 times
as fast on an AMD EPYC and equally fast on Intel's processors. A product takes one of two ways:

1. *Plain*: torch's own product, for everything that the oneDNN kernel does not support (other
   precisions and devices, autocast, batched gradients) and for small matrices.
2. *Kernel*: oneDNN's `y = x w + b` forwards, and two products of it backwards:
   `dx = dy wᵀ` and `dw = xᵀ dy`.

Source: https://github.com/uxlfoundation/oneDNN.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

SMALL = 1 << 20
"""Number of multiplications below which the call of the kernel costs more than it saves."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients to x, w and the bias."""


def _find_kernel() -> Callable[..., Tensor] | None:
    """Return oneDNN's product, or None if torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None


KERNEL = _find_kernel()


def matmul(
    x: Float[Tensor, "... n"], w: Float[Tensor, "n m"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "... m"]:
    """Return `x w + bias`, differentiable with respect to all three."""
    if _plain(x, w):  # way 1
        if bias is None:
            return x @ w
        return nn.functional.linear(x, w.T, bias)
    y = _Product.apply(x, w, bias)  # way 2
    assert isinstance(y, Tensor)
    return y


class Linear(nn.Linear):
    """A trainable linear map: `nn.Linear`, computed by `matmul`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        w = self.weight.T  # [n, m]
        return matmul(input, w, self.bias)


def _plain(x: Tensor, w: Tensor) -> bool:
    """Return whether a product takes the plain way."""
    if KERNEL is None:
        return True
    if torch.is_autocast_enabled("cpu"):
        return True
    if not x.dtype == w.dtype == torch.float32:
        return True
    if x.device.type != "cpu":
        return True
    multiplications = x.numel() * w.shape[-1]
    if multiplications < SMALL:
        return True
    return is_in_torch_dispatch_mode()  # modes that count operations know only torch's product


def _multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x w + bias of two matrices; both can be transposed views."""
    assert KERNEL is not None
    transposed = w.T  # the kernel expects a weight as `nn.Linear` stores it, [m, n]
    return KERNEL(x, transposed, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The product by the kernel, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        rows = x.flatten(0, -2)  # [rows, n]
        y = _multiply(rows, w, bias)  # [rows, m]
        places = x.shape[:-1]
        return y.view(*places, w.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy,) = grad_outputs
        return _gradients(ctx, dy)


@once_differentiable
def _gradients(ctx: Any, dy: Tensor) -> Gradients:
    """Return dx, dw and db; None for those that are not needed."""
    x, w = ctx.saved_tensors
    needs_dx, needs_dw, needs_db = ctx.needs_input_grad
    torch_c: Any = torch._C
    batched = torch_c._functorch.is_legacy_batchedtensor(dy)
    multiply = torch.matmul if batched else _multiply
    dy_rows = dy.reshape(-1, dy.shape[-1])  # [rows, m]
    dx = None
    dw = None
    db = None
    if needs_dx:
        dx_rows = multiply(dy_rows, w.T)  # [rows, n]
        dx = dx_rows.reshape(x.shape)
    if needs_dw:
        x_rows = x.flatten(0, -2)  # [rows, n]
        dw = multiply(x_rows.T, dy_rows)  # [n, m]
    if needs_db:
        db = dy_rows.sum(0)
    return dx, dw, db
