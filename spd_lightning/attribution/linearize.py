"""The frozen linearization: maps that add up (law A6 of docs/method.md).

While the function mode `Frozen` is open, torch's own functions follow the rules of A6, so any model
can be frozen without changing it. The rules depend on what is computed and not on names of modules:
an activation can be a module, a function, or a formula written out in a forward pass. A *path* is a
tensor that depends on a leaf of the graph, that is, one that requires a gradient. A function that
no rule covers keeps its true derivative, and the gap of the graph shows the difference.
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
"""Turns a value into a constant: detaches it, or returns the value of another run instead."""


def gelu_secant(h: Tensor, approximate: str = "none") -> Tensor:
    """Return GELU(h)/h = Φ(h), exactly or by its approximation with tanh."""
    if approximate == "none":
        return torch.special.ndtr(h)
    factor = (2 / torch.pi) ** 0.5
    inner = factor * (h + 0.044715 * h**3)
    return 0.5 * (1 + torch.tanh(inner))


# Functions are identified by name: `torch.tanh`, `Tensor.tanh` and `Tensor.tanh_` are all "tanh".

_SECANTS: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda h, **_: (h > 0).to(h.dtype),
    "gelu": gelu_secant,
    "silu": lambda h, **_: torch.sigmoid(h),
}
"""Secants that need no division."""

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
    """A function mode under which maps are linear and add up (A6).

    - Rule 2: the denominator of a norm is a constant, and so is every other denominator.
    - Rule 3: an attention pattern is a constant, fused or not. So is a choice, for example of
      experts by a router, or the result of a comparison.
    - Rule 4: a non-linearity with φ(0) = 0 multiplies its input by its secant. Another one is a
      constant: it is a gate, such as `sigmoid(h)` or `1 + tanh(h)`.
    - Rule 5: in a product of two paths, each path counts for half of it.

    Args:
        hold: turns a value into a constant.
    """

    def __init__(self, hold: Hold = Tensor.detach):
        super().__init__()
        self._hold = hold
        self._curved = WeakIdKeyDictionary()
        """Outputs of non-linearities, also times a number; 1 + such a path is a gate."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        settings = dict(kwargs or {})
        args, settings = _operands_first(func, args, settings)
        values = (*args, *settings.values())
        if not any(map(_is_path, values)):
            return func(*args, **settings)

        full_name = func.__name__  # "mul", "mul_" and "__mul__" are all "mul"
        name = full_name.strip("_")
        is_operator = full_name.endswith("__")
        overwrites = full_name.endswith("_") and not is_operator
        if overwrites or settings.get("inplace"):
            return self._in_place(func, name, args, settings)
        out = self._by_rule(func, name, args, settings)
        if out is None:
            return self._natural(func, name, args, settings)
        return out

    def _in_place(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Apply a function that overwrites its first argument, by the same rules."""
        target, *others = args
        settings = {key: value for key, value in kwargs.items() if key != "inplace"}
        like = func  # a function that computes the same without overwriting
        if "inplace" not in kwargs:
            like = getattr(Tensor, name, func)
        before = target.clone()  # gradients can need the value that is overwritten
        if target in self._curved:
            self._marked(before)
        out = self._by_rule(like, name, (before, *others), settings)
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
        if name in _FUSED:
            rule = _FUSED[name]
            return rule(hold, *args, **kwargs)
        if name in _PATTERNS or name in _SCALES:
            # An attention pattern, or 1/ρ written by hand (rules 2 and 3)
            constant = func(*args, **kwargs)
            return hold(constant)
        if name == "topk":
            return _topk(hold, *args, **kwargs)

        x: Any = None
        if args:
            x = args[0]
        others = args[1:]
        if name in _ELEMENTWISE and _is_path(x):
            has_tensors = any(isinstance(other, Tensor) for other in others)
            if not has_tensors:
                # φ(h), perhaps with settings such as an exponent (rule 4)
                out = _elementwise(hold, func, name, args, kwargs)
                return self._marked(out)
        return self._by_rule_of_two(func, name, x, others, kwargs)

    def _by_rule_of_two(
        self, func: Callable, name: str, x: Any, others: tuple, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return a quotient, a product or a sum by the rules of A6; None if no rule covers it.

        others: all operands except the first.
        """
        hold = self._hold
        other: Any = others[0] if others else None
        if name == "rdiv":
            # other / x: the denominator is a constant (rule 2)
            if not _is_path(x):
                return None
            return func(hold(x), other)
        if name in _QUOTIENTS and _is_path(other):
            # x / other
            return func(x, hold(other), *others[1:], **kwargs)
        two_paths = _is_path(x) and _is_path(other)
        if two_paths and name in _PRODUCTS:
            # x · other is split evenly: ½ x · const(other) + ½ const(x) · other (rule 5)
            of_x = func(x, hold(other))
            of_other = func(hold(x), other)
            halves = of_x + of_other
            return self._marked(0.5 * halves)
        if name in _SHIFTS and isinstance(other, Number):
            if x in self._curved:
                # A number added to a non-linearity, as in 1 + tanh(h) (rule 4)
                gate = func(x, *others, **kwargs)
                return hold(gate)
        return None

    def _natural(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the true result of a function that no rule covers; choices become constants."""
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not out.is_floating_point():
            return self._hold(out)
        if name in _KEEP_CURVED:
            x = args[0]
            if x in self._curved:
                return self._marked(out)
        return out

    def _marked(self, out: Tensor) -> Tensor:
        """Remember that a tensor is the output of a non-linearity."""
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
    """Make operands positional that were given by name, as in `torch.mul(x, other=y)`."""
    operands = _OPERANDS.get(func.__name__, ("input", "other", "exponent"))
    given_by_name = [name for name in operands if name in kwargs]
    values = [kwargs.pop(name) for name in given_by_name]
    return (*args, *values), kwargs


def _is_path(x: Any) -> bool:
    """Return whether something is a tensor that depends on a leaf of the graph."""
    return isinstance(x, Tensor) and x.requires_grad


# ---- rules of single functions -------------------------------------------------------------------


def _elementwise(
    hold: Hold, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """Return φ(h) as h · secant if φ(0) = 0, and otherwise as a constant (rule 4)."""
    h, *numbers = args
    constant = hold(h)
    if name in _SECANTS:
        secant_of = _SECANTS[name]
        return h * secant_of(constant, **kwargs)
    value = func(constant, *numbers, **kwargs)  # φ(h)
    eps = torch.finfo(h.dtype).eps
    step = eps**2
    near_zero = constant.new_tensor([0.0, step])
    at_zero, at_step = func(near_zero, *numbers, **kwargs)
    if at_zero != 0:
        # A gate: it has no secant, and is constant as a whole.
        return value
    # The secant is φ(h)/h, and at 0 the slope.
    slope_at_zero = at_step / step
    secant = value / constant
    secant = torch.where(constant == 0, slope_at_zero, secant)
    return h * secant


def _topk(
    hold: Hold, x: Tensor, k: int, dim: int = -1, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """Return the entries that were chosen, whatever their values are now."""
    top = torch.topk(x, k, dim, *rest, **more)
    chosen = hold(top.indices)
    values = x.gather(dim, chosen)
    return torch.return_types.topk((values, chosen))


def _rms_norm(
    hold: Hold,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return an RMSNorm whose denominator is a constant (rule 2)."""
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    mean_square = x.square().mean(-1, keepdim=True)
    inverse = hold((mean_square + eps).rsqrt())
    scaled = x * inverse
    if weight is None:
        return scaled
    return scaled * weight


def _layer_norm(
    hold: Hold,
    x: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Return a LayerNorm whose denominator is a constant; its mean is not (rule 2)."""
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    squares = centered.square()
    variance = squares.mean(-1, keepdim=True)
    inverse = hold((variance + eps).rsqrt())
    out = centered * inverse
    if weight is not None:
        out = out * weight
    if bias is None:
        return out
    return out + bias


def _attention(hold: Hold, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Return attention as a map that is linear in the values (rule 3).

    The pattern is the output of the fused kernel for values that are the identity.
    """
    positions = v.shape[-2]
    eye = torch.eye(positions, dtype=v.dtype, device=v.device)
    identity = eye.expand(*v.shape[:-1], positions)  # [batch, head, pos, pos]
    with torch.no_grad():
        q, k = hold(q), hold(k)
        pattern = F.scaled_dot_product_attention(q, k, identity, *rest, **more)
    if more.get("enable_gqa"):
        heads = pattern.shape[1]
        value_heads = v.shape[1]
        queries_per_value = heads // value_heads
        if queries_per_value > 1:
            v = v.repeat_interleave(queries_per_value, dim=1)
    return pattern @ v


_FUSED: Mapping[str, Callable[..., Tensor]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
