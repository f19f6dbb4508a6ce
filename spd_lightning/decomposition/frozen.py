"""The frozen linearisation: maps that add up (law A6 of docs/method.md).

A function mode changes what torch's own functions mean while it is open, so that any model can be frozen as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def gelu_secant(h: Tensor, approximate: str = "none") -> Tensor:
    """Φ(h), by erf or as the tanh that stands for it."""
    if approximate == "none":
        return torch.special.ndtr(h)
    return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))


_SECANTS: dict[Callable, Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), lambda h, **_: (h > 0).to(h.dtype)),
    F.gelu: gelu_secant,
    F.silu: lambda h, **_: torch.sigmoid(h),
}
_PATTERNS = {F.softmax, torch.softmax, Tensor.softmax}
_SCALES = {torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__}


class Frozen(TorchFunctionMode):
    """While open, maps are linear and add up (A6): constants stand for what scales, patterns and secants.

    Rule 2: a norm's denominator is a constant. Rule 3: so is an attention pattern, fused or not. Rule 4: a
    non-linearity multiplies by its secant. Rule 5: of a product of two paths each has half.

    Args:
        rows: for every row of a batch, the row that its constants are taken from: with them held, what is done to one
            row reaches its output in proportion. Each row has its own where left out.
    """

    def __init__(self, rows: Int[Tensor, " batch"] | None = None):
        super().__init__()
        self._rows = rows

    def constant(self, x: Tensor) -> Tensor:
        """A value held: without gradient, and that of another row where rows say so."""
        if self._rows is None or not x.requires_grad or not x.ndim or len(x) != len(self._rows):
            return x.detach()
        return x.detach()[self._rows]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if secant := _SECANTS.get(func):
            return args[0] * secant(self.constant(args[0]), **kwargs)
        if own := _FROZEN.get(func):
            return own(self.constant, *args, **kwargs)
        if func in _PRODUCTS and all(isinstance(x, Tensor) and x.requires_grad for x in args[:2]):
            a, b = args[:2]
            return 0.5 * (func(a, self.constant(b)) + func(self.constant(a), b))
        out = func(*args, **kwargs)
        return self.constant(out) if func in _PATTERNS or func in _SCALES else out


Constant = Callable[[Tensor], Tensor]


def _rms_norm(
    constant: Constant, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x * constant((x.square().mean(-1, keepdim=True) + eps).rsqrt())
    return scaled if weight is None else scaled * weight


def _layer_norm(
    constant: Constant, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    scaled = x * constant((x.square().mean(-1, keepdim=True) + eps).rsqrt())
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _attention(constant: Constant, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Linear in the values: what a fused kernel does to the identity is the pattern."""
    eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-1], v.shape[-2])
    with torch.no_grad():
        pattern = F.scaled_dot_product_attention(constant(q), constant(k), eye, *rest, **more)
    shared = pattern.shape[1] // v.shape[1] if more.get("enable_gqa") else 1
    return pattern @ (v if shared == 1 else v.repeat_interleave(shared, dim=1))


_FROZEN: dict[Callable, Callable[..., Tensor]] = {
    F.rms_norm: _rms_norm,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
}
