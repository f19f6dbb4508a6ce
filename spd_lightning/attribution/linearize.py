"""The frozen linearization: maps that add up (law A6 of docs/method.md).

A function mode changes what torch's own functions mean while it is open, so that any model can be
frozen as it is. It goes by what is computed and not by the names of modules: an activation may be a
module, a function, or a formula written out in a forward pass. A tensor that depends on a leaf of
the graph is called a *path* here; it is one that requires a gradient. Whatever no rule covers keeps
its true derivative, and the gap of the graph shows it.
"""

from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

Hold = Callable[[Tensor], Tensor]
"""Turns a value into a constant: it is detached, or the value of another run is taken in its place.
"""


def gelu_secant(h: Tensor, approximate: str = "none") -> Tensor:
    """Φ(h), by erf or as the tanh that stands for it."""
    if approximate == "none":
        return torch.special.ndtr(h)
    return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))


# Functions go by name: `torch.tanh`, `Tensor.tanh` and `Tensor.tanh_` are all "tanh".

_SECANTS: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda h, **_: (h > 0).to(h.dtype),
    "gelu": gelu_secant,
    "silu": lambda h, **_: torch.sigmoid(h),
}
"""The secants that are known without a division."""

# fmt: off
_ELEMENTWISE = {
    "abs", "asinh", "atan", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "cosh", "elu",
    "erf", "erfc", "exp", "exp2", "expm1", "gelu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "log", "log1p", "log2", "logsigmoid", "mish", "pow", "reciprocal", "relu", "relu6",
    "rpow", "selu", "sigmoid", "silu", "sin", "sinh", "softplus", "softshrink", "softsign",
    "square", "tanh", "tanhshrink",
}
# fmt: on
_PATTERNS = {"softmax"}
_SCALES = {"rsqrt", "sqrt"}
_QUOTIENTS = {"div", "divide", "rdiv", "true_divide"}
_PRODUCTS = {"mul", "multiply", "matmul", "bmm"}
_SHIFTS = {"add", "sub", "rsub"}
_KEEP_CURVED = {"mul", "div", "neg"}


class Frozen(TorchFunctionMode):
    """While open, maps are linear and add up (A6): constants stand for what scales, patterns,
    secants and choices.

    Rule 2: a norm's denominator is a constant, and so is every other denominator. Rule 3: so is an
    attention pattern, fused or not, and a choice: which experts a router takes, what a comparison
    gives. Rule 4: a non-linearity multiplies by its secant where φ(0) = 0, and is a constant where
    it is not: a gate, such as `sigmoid(h)` or `1 + tanh(h)`. Rule 5: of a product of two paths each
    has half.

    Args:
        hold: what makes a constant of a value.
    """

    def __init__(self, hold: Hold = Tensor.detach):
        super().__init__()
        self._hold = hold
        self._curved = WeakIdKeyDictionary()
        """Paths that come out of a non-linearity, or are a number times one: 1 + such a path is a
        gate.
        """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = _operands_first(func, args, dict(kwargs or {}))
        if not any(map(_is_path, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        name = func.__name__.strip("_")
        overwrites = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if overwrites or kwargs.get("inplace"):
            return self._in_place(func, name, args, kwargs)
        out = self._by_rule(func, name, args, kwargs)
        return self._natural(func, name, args, kwargs) if out is None else out

    def _in_place(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Apply a function that overwrites its first argument: by the same rules, then copied into
        it.
        """
        target = args[0]
        like = func if "inplace" in kwargs else getattr(Tensor, name, func)
        settings = {key: value for key, value in kwargs.items() if key != "inplace"}
        before = target.clone()  # what is overwritten may be needed for gradients
        if target in self._curved:
            self._marked(before)
        out = self._by_rule(like, name, (before, *args[1:]), settings)
        if out is None:
            if name not in _KEEP_CURVED:
                self._curved.pop(target, None)
            return self._natural(func, name, args, kwargs)
        assert isinstance(out, Tensor)
        target.copy_(out)
        if not _is_path(out):
            # `y += 1` continues with the returned value, a constant; y itself is still a path.
            return out
        return self._marked(target)

    def _by_rule(
        self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor | tuple | None:
        """Return the result of a function by the rules of A6; None if no rule covers it."""
        hold = self._hold
        others = args[1:]
        x: Any = args[0] if args else None
        other: Any = others[0] if others else None
        if own := _FUSED.get(name):
            return own(hold, *args, **kwargs)
        if name in _PATTERNS or name in _SCALES:
            return hold(func(*args, **kwargs))
        if name == "topk":
            return _topk(hold, *args, **kwargs)
        if name in _ELEMENTWISE and _is_path(x) and not any(isinstance(y, Tensor) for y in others):
            return self._marked(_elementwise(hold, func, name, args, kwargs))
        if name in _QUOTIENTS:
            denominator = x if name == "rdiv" else other
            if _is_path(denominator):
                held = hold(denominator)
                return func(held, other) if name == "rdiv" else func(x, held, *others[1:], **kwargs)
        if name in _PRODUCTS and _is_path(x) and _is_path(other):
            return self._marked(0.5 * (func(x, hold(other)) + func(hold(x), other)))
        if name in _SHIFTS and isinstance(other, Number) and x in self._curved:
            return hold(func(*args, **kwargs))
        return None

    def _natural(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the true result of a function. Choices are held; a number times a curved path is
        curved.
        """
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not out.is_floating_point():
            return self._hold(out)
        if name in _KEEP_CURVED and args[0] in self._curved:
            return self._marked(out)
        return out

    def _marked(self, out: Tensor) -> Tensor:
        if out.requires_grad:
            self._curved[out] = True
        return out


_OPERANDS = {
    "scaled_dot_product_attention": ("query", "key", "value"),
    "bmm": ("input", "mat2"),
    "where": ("condition", "input", "other"),
}
"""Names of the operands of functions that do not call them `input`, `other` and `exponent`."""


def _operands_first(
    func: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Put operands that were given by name, as in `torch.mul(x, other=y)`, into the places where
    the rules look.
    """
    operands = _OPERANDS.get(func.__name__, ("input", "other", "exponent"))
    return args + tuple(kwargs.pop(name) for name in operands if name in kwargs), kwargs


def _is_path(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


# ---- rules of single functions -------------------------------------------------------------------


def _elementwise(
    hold: Hold, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """φ(h) as h · secant where φ(0) = 0, else as a constant (rule 4)."""
    h, *numbers = args
    held = hold(h)
    if secant := _SECANTS.get(name):
        return h * secant(held, **kwargs)
    step = torch.finfo(h.dtype).eps ** 2
    at_zero, beside = func(held.new_tensor([0.0, step]), *numbers, **kwargs)
    value = func(held, *numbers, **kwargs)
    if at_zero != 0:
        return value
    return h * torch.where(held == 0, beside / step, value / held)


def _topk(
    hold: Hold, x: Tensor, k: int, dim: int = -1, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """The entries that were chosen, whatever they are now."""
    chosen = hold(torch.topk(x, k, dim, *rest, **more).indices)
    return torch.return_types.topk((x.gather(dim, chosen), chosen))


def _rms_norm(
    hold: Hold,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean_square = x.square().mean(-1, keepdim=True)
    scaled = x * hold((mean_square + eps).rsqrt())
    return scaled if weight is None else scaled * weight


def _layer_norm(
    hold: Hold,
    x: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    scaled = x * hold((x.square().mean(-1, keepdim=True) + eps).rsqrt())
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _attention(hold: Hold, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Linear in the values: what a fused kernel does to the identity is the pattern."""
    eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-1], v.shape[-2])
    with torch.no_grad():
        pattern = F.scaled_dot_product_attention(hold(q), hold(k), eye, *rest, **more)
    shared = pattern.shape[1] // v.shape[1] if more.get("enable_gqa") else 1
    return pattern @ (v if shared == 1 else v.repeat_interleave(shared, dim=1))


_FUSED: Mapping[str, Callable[..., Tensor]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
