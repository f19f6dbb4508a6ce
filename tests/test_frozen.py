"""Frozen maps (law A6): what they compute, and that value is gradient times input, whatever the
code looks like.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from spd_lightning.attribution.linearize import Frozen

HELD = {"laplace", "sigmoid", "sqrtsoftplus"}
"""Activations that are not zero at zero, so that they have no secant."""
INEXACT = {"xielu"}
"""It clamps at a tensor, −1e-6."""


def inputs() -> Tensor:
    """Values of both signs, large and small, and zero itself."""
    x = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:4] = torch.tensor([0.0, 1e-12, -1e-12, 30.0])
    return x


def frozen(function, *, exact: float = 1e-14) -> Tensor | None:
    """The gradient under the frozen rules, after a check that value = Σ gradient × input; None of a
    constant.
    """
    x = inputs().requires_grad_()
    wanted = function(x.detach().clone())
    with Frozen():
        value = function(x.clone())
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-12, atol=1e-14)
    if not value.requires_grad:
        return None
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient * x.detach(), wanted, rtol=exact, atol=exact)
    return gradient


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - INEXACT))
def test_a6_every_activation_of_transformers_is_its_secant_or_a_constant(name):
    """By what it computes: fused, a formula, or several functions; φ(h) = h · secant where φ(0) =
    0.
    """
    activation = ACT2FN[name]
    if isinstance(activation, nn.Module):
        activation = activation.double().requires_grad_(False)
    assert (frozen(activation) is None) == (name in HELD)


def test_a6_secants_of_known_functions():
    """Φ(h) of GELU, σ(h) of SiLU, 1[h > 0] of ReLU, h·1[h > 0] of ReLU²; at zero the slope."""
    x = inputs()
    torch.testing.assert_close(frozen(F.gelu), torch.special.ndtr(x))
    torch.testing.assert_close(frozen(F.silu), torch.sigmoid(x))
    relu = frozen(torch.relu)
    assert relu is not None
    assert torch.equal(relu, (x > 0).double())
    torch.testing.assert_close(frozen(lambda h: h.relu().square()), x * (x > 0))
    torch.testing.assert_close(frozen(ACT2FN["quick_gelu"]), torch.sigmoid(1.702 * x))
    tanh = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(frozen(ACT2FN["gelu_new"]), 0.5 * (1 + torch.tanh(tanh)))
    capped: Any = frozen(lambda h: 5 * torch.tanh(h / 5))
    assert float(capped[0]) == pytest.approx(1)


def relu_in_place(h: Tensor) -> Tensor:
    F.relu(h, inplace=True)
    return h


def gate_in_place(h: Tensor) -> Tensor:
    gate = torch.tanh(h)
    gate += 1
    return h * gate


WRITTEN_OUT = {
    "soft cap": lambda h: 30 * torch.tanh(h / 30),
    "gelu by erf": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "swish": lambda h: h * torch.sigmoid(1.5 * h),
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "mish by logarithm": lambda h: h * torch.tanh(torch.log(1 + torch.exp(h))),
    "relu by comparison": lambda h: h * (h > 0),
    "relu by clamp": lambda h: h.clamp(min=0),
    "relu by where": lambda h: torch.where(h > 0, h, 0 * h),
    "relu squared": lambda h: F.relu(h) ** 2,
    "cube": lambda h: h * h * h,
    "gated": lambda h: F.silu(2 * h) * (h - 3 * h.tanh()),
    "relu in place": relu_in_place,
    "gate in place": gate_in_place,
    "one over": lambda h: h / (1 + h.abs()),
    "soft sign": F.softsign,
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a6_written_out_in_a_forward_pass(name):
    assert frozen(WRITTEN_OUT[name]) is not None


def test_a6_norms_divide_by_a_constant_however_they_are_written():
    """RMSNorm and LayerNorm: fused, by rsqrt, by sqrt, by the standard deviation. Gradient: the
    held scale.
    """
    x = inputs().view(4, 10)
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    forms = [
        lambda h: F.rms_norm(h, (10,), eps=1e-6),
        lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
        lambda h: h / torch.sqrt(torch.mean(h * h, -1, keepdim=True) + 1e-6),
    ]
    for form in forms:
        h = x.clone().requires_grad_()
        with Frozen():
            out = form(h)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), h)[0], scale.expand_as(x))
    h = x.clone().requires_grad_()
    with Frozen():
        out = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
    gradient = torch.autograd.grad(out, h, out.new_ones(out.shape) * x.new_tensor(range(10)))[0]
    torch.testing.assert_close((gradient * x).sum(), (out.detach() * x.new_tensor(range(10))).sum())


@pytest.mark.parametrize(
    ("by_place", "by_name"),
    [
        (lambda h: torch.mul(h, h.exp()), lambda h: torch.mul(h, other=h.exp())),
        (lambda h: torch.matmul(h, h.T), lambda h: torch.matmul(input=h, other=h.T)),
        (
            lambda h: torch.bmm(h[None], h.T[None]),
            lambda h: torch.bmm(input=h[None], mat2=h.T[None]),
        ),
        (lambda h: torch.div(h, h.exp()), lambda h: torch.div(h, other=h.exp())),
        (lambda h: torch.pow(h, 2), lambda h: torch.pow(h, exponent=2)),
        (lambda h: torch.softmax(h, -1) * h, lambda h: torch.softmax(input=h, dim=-1) * h),
        (lambda h: F.gelu(h), lambda h: F.gelu(input=h)),
        (lambda h: F.layer_norm(h, (10,)), lambda h: F.layer_norm(input=h, normalized_shape=(10,))),
        (lambda h: F.rms_norm(h, (10,)), lambda h: F.rms_norm(h, normalized_shape=(10,))),
        (
            lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None]),
            lambda h: F.scaled_dot_product_attention(query=h[None], key=h[None], value=h[None]),
        ),
        (
            lambda h: torch.where(h > 0, h, h * h),
            lambda h: torch.where(condition=h > 0, input=h, other=h * h),
        ),
    ],
)
def test_a6_operands_by_name_are_operands(by_place, by_name):
    """The rules hold however a forward pass writes a call."""
    gradients = []
    for form in (by_place, by_name):
        h = inputs().view(4, 10).requires_grad_()
        with Frozen():
            out = form(h)
        gradients.append(torch.autograd.grad(out.sum(), h)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a6_what_a_router_chooses_is_a_constant():
    """Experts chosen among softmax or plain scores: held in a second run, whatever the scores are
    there.
    """
    x = inputs().view(10, 4)
    for scores in (lambda h: F.softmax(h, -1), lambda h: 2 * h):
        kept = []

        def keep(value: Tensor, kept: list = kept) -> Tensor:
            kept.append(value.detach().clone())
            return value.detach()

        def route(h: Tensor, scores=scores) -> tuple[Tensor, Tensor]:
            values, chosen = torch.topk(scores(h), 2)
            return values, chosen

        with Frozen(keep):
            first = route(x.clone().requires_grad_())
        again = iter(kept)
        with Frozen(lambda value, again=again: next(again)):
            second = route((-x).requires_grad_())
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[1], torch.topk(scores(x), 2).indices)


def test_a_number_added_to_the_stream_leaves_it_a_path():
    """Only a non-linearity plus a number is a gate; a path stays a path, and a sum that overwrites
    one too.
    """

    def overwritten(h: Tensor) -> Tensor:
        y = torch.tanh(h)
        y += h
        return y

    x = inputs().requires_grad_()
    with Frozen():
        for value in (x + 1, 2 * x - 3, 1 - x, overwritten(x) + 1):
            assert value.requires_grad
        assert not (1 + 0.3 * torch.tanh(x)).requires_grad
