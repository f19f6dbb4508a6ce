"""Sites, and the rank-one components they are split into (laws D1–D4, D7–D9 of docs/method.md).

A *site* is one linear map of the frozen target model, with weight `W [d_out, d_in]`. SPD writes W
as a sum of C rank-one matrices, its components, plus a remainder:

    W = Σ_c U[c]ᵀ V[:, c]ᵀ + Δ          V [d_in, C] reads, U [C, d_out] writes             (D1)

The remainder Δ is the *delta component*. Under component masks m and a delta mask m_Δ, the site
computes its output in three steps:

1. Inner activations: `a = x V`                                                            (D2)
2. Masked output:
       y = (m ∘ a) U + m_Δ (x Δᵀ) + b                                                      (D3)
         = ((m − m_Δ) ∘ a) U + m_Δ (x Wᵀ) + b
   The code uses the second form. It builds neither `V U` nor Δ, and it needs no gradient through W.
3. Routing: a position that the route skips keeps the output of the target             (D4)

Source: SPD (Bushnaq et al., 2025, arXiv 2506.20790). This module does not decide which masks to
use: see `masks`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.matmul import matmul
from spd_lightning.errors import BadInput, nearest

Kind = Literal["linear", "conv1d", "embedding", "identity"]
IDENTITY = ".pre_identity"
"""Ending of the names of identity sites (D8)."""
Map = Callable[[Tensor], Tensor]
"""The forward pass of a module."""


@dataclass(frozen=True)
class Site:
    """One linear map of the target: its name, kind, module and widths."""

    name: str
    kind: Kind
    module: nn.Module
    d_in: int
    d_out: int

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W [d_out, d_in], also if the module stores its transpose."""
        if self.kind == "identity":
            parameter = next(self.module.parameters())
            return torch.eye(self.d_in, dtype=parameter.dtype, device=parameter.device)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if self.kind == "linear":
            return weight
        return weight.T

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """b, or None if the map has no bias."""
        if self.kind in ("identity", "embedding"):
            return None
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    def inner(self, x: Tensor, V: Float[Tensor, "d_in C"]) -> Float[Tensor, "... C"]:
        """Return the inner activations `a = x V` (D2).

        At an embedding, x holds token ids, and the result consists of the rows of V at these ids.
        """
        if self.kind == "embedding":
            return nn.functional.embedding(x, V)
        return matmul(x, V)


class Components(nn.Module):
    """The C rank-one components of one site: V reads, U writes (D1); drawn as D7 says."""

    def __init__(self, d_in: int, d_out: int, C: int):
        super().__init__()
        V = torch.randn(d_in, C)
        U = torch.randn(C, d_out)
        root_d_in = d_in**0.5
        root_C = C**0.5
        self.V = nn.Parameter(V / root_d_in)
        self.U = nn.Parameter(U / root_C)


class TiedComponents(nn.Module):
    """Components of a site whose weight is the transpose of its partner's (D9).

    They have no parameters: V is the transpose of the partner's U, and U that of its V.
    """

    def __init__(self, partner: Components):
        super().__init__()
        self._partner = (partner,)  # in a tuple: the parameters belong to the partner alone

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        (partner,) = self._partner
        return partner.U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        (partner,) = self._partner
        return partner.V.T


class Mask(NamedTuple):
    """The masks of one site in one forward pass.

    Attributes:
        components: m [..., C]; None means all ones.
        delta: m_Δ [...], or a number.
        route: r [...], boolean. A position where it is False keeps the output of the target (D4).
            None means that every position is decomposed.
        rows: flat indices of positions, among them all that the route decomposes. If given,
            components and delta have values for these positions only ([rows, C] and [rows]), and
            the other positions cost nothing.
    """

    components: Tensor | None
    delta: Tensor | float
    route: Tensor | None = None
    rows: Tensor | None = None

    @property
    def bare(self) -> bool:
        """Whether the target's output at this site is not needed: no delta, no route."""
        if self.route is not None:
            return False
        return self.without_delta

    @property
    def without_delta(self) -> bool:
        """Whether the delta component is switched off everywhere."""
        if isinstance(self.delta, Tensor):  # its values are not checked: that would stall a GPU
            return False
        return self.delta == 0


def masked_output(
    clean: Tensor | None,
    bias: Tensor | None,
    a: Float[Tensor, "... C"],
    U: Float[Tensor, "C d_out"],
    mask: Mask,
) -> Float[Tensor, "... d_out"]:
    """Return the output of a site under masks (D3, D4).

    Args:
        clean: the target's output x Wᵀ + b at this site; it can be None if the mask is bare.
        bias: b.
        a: x V; at the mask's rows only, if the mask has rows.
        U: what the components write.
        mask: the masks and the route.
    """
    route = mask.route
    if mask.rows is not None:
        assert clean is not None
        assert route is not None
        return _masked_rows(clean, bias, a, U, mask, route, mask.rows)
    y = _decomposed(clean, bias, a, U, mask)  # step 2
    if route is None:
        return y
    assert clean is not None
    by_vector = route.unsqueeze(-1)  # [..., 1]
    return torch.where(by_vector, y, clean)  # step 3


def _masked_rows(
    clean: Tensor,
    bias: Tensor | None,
    a: Tensor,
    U: Tensor,
    mask: Mask,
    route: Tensor,
    rows: Tensor,
) -> Tensor:
    """Do steps 2 and 3 at some positions, and copy the target's output everywhere else."""
    flat_clean = clean.flatten(0, -2)  # [positions, d_out]
    original = flat_clean.index_select(0, rows)  # [rows, d_out]
    y = _decomposed(original, bias, a, U, mask)  # [rows, d_out]: step 2
    y = y.to(flat_clean.dtype)  # autocast can have lowered it
    flat_route = route.flatten()  # [positions]
    routed = flat_route.index_select(0, rows)  # [rows]
    by_vector = routed.unsqueeze(-1)  # [rows, 1]
    chosen = torch.where(by_vector, y, original)  # [rows, d_out]: step 3
    out = flat_clean.index_copy(0, rows, chosen)
    return out.view_as(clean)


def _decomposed(
    clean: Tensor | None, bias: Tensor | None, a: Tensor, U: Tensor, mask: Mask
) -> Tensor:
    """Compute step 2, `((m − m_Δ) ∘ a) U + m_Δ (x Wᵀ) + b`, at the positions of a."""
    m = mask.components
    gate = mask.delta
    if mask.without_delta:
        w = a if m is None else m * a  # [..., C]
        y = matmul(w, U)  # [..., d_out]
    else:
        assert clean is not None
        if isinstance(gate, Tensor):
            gate = gate.unsqueeze(-1)  # [..., 1]
        if m is None:
            strength = 1 - gate
        else:
            strength = m - gate  # [..., C]
        w = strength * a  # [..., C]
        y = matmul(w, U)  # [..., d_out]
        y = y + gate * _without_bias(clean, bias)
    if bias is None:
        return y
    return y + bias


def _without_bias(clean: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ from x Wᵀ + b."""
    if bias is None:
        return clean
    return clean - bias


# ---- finding sites -------------------------------------------------------------------------------


def _kind(module: nn.Module) -> Kind | None:
    """Return the kind of site that a module can be, or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__ == "Conv1D" and "nf" in vars(module):  # HuggingFace's, with Wᵀ
        return "conv1d"
    return None


def _width(module: Any, kind: Kind) -> tuple[int, int]:
    """Return d_in and d_out."""
    if kind == "embedding":
        return module.num_embeddings, module.embedding_dim
    rows, columns = module.weight.shape
    if kind == "conv1d":
        return rows, columns
    return columns, rows


def available(model: nn.Module) -> dict[str, Site]:
    """Return every map of a model that can be a site, by name.

    The name `M.pre_identity` means an identity map in front of M (D8).
    """
    sites = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        d_in, d_out = _width(module, kind)
        if kind != "embedding":
            identity = name + IDENTITY
            sites[identity] = Site(identity, "identity", module, d_in, d_in)
        sites[name] = Site(name, kind, module, d_in, d_out)
    return sites


def find_sites(model: nn.Module, patterns: Mapping[str, int]) -> dict[str, tuple[Site, int]]:
    """Return the sites that fnmatch patterns match, each with its number of components.

    The sites are in the order of the model. `*` matches maps only; a pattern that ends in
    `.pre_identity` matches identity sites.

    Raises:
        BadInput: a pattern matches nothing, a module is matched twice, or a count is not positive.
    """
    sites = available(model)
    owner: dict[str, str] = {}
    for pattern, C in patterns.items():
        if C < 1:
            raise BadInput(
                f"sites: '{pattern}: {C}' must have at least one component; give a positive number"
            )
        matched = _match(pattern, sites)
        if not matched:
            modules = [name for name in sites if not name.endswith(IDENTITY)]
            _reject_experts(model, pattern, modules)
            raise BadInput(
                f"sites: pattern '{pattern}' matches no module of the target; "
                f"{nearest(pattern, modules)}"
            )
        for name in matched:
            if name in owner:
                raise BadInput(
                    f"sites: '{name}' is matched by both '{owner[name]}' and '{pattern}'; narrow "
                    "one of them"
                )
            owner[name] = pattern
            _reject_other_maps(sites[name])
    return {name: (site, patterns[owner[name]]) for name, site in sites.items() if name in owner}


def _match(pattern: str, sites: Mapping[str, Site]) -> list[str]:
    """Return the names of the sites that a pattern matches."""
    means_identities = pattern.endswith(IDENTITY)
    matched = []
    for name in sites:
        is_identity = name.endswith(IDENTITY)
        if is_identity == means_identities and fnmatchcase(name, pattern):
            matched.append(name)
    return matched


def _reject_experts(model: nn.Module, pattern: str, modules: Sequence[str]) -> None:
    """Raise BadInput if a pattern that matches no map refers to experts kept as one tensor."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3 or not _refers_to_experts(pattern, name):
            continue
        experts = _parent(name)
        block = _parent(_parent(experts))
        neighbors = [module for module in modules if module.startswith(f"{block}.")]
        candidates = neighbors or list(modules)
        examples = candidates[:4]
        raise BadInput(
            f"sites: pattern '{pattern}' refers to experts stored as one three-dimensional "
            f"tensor, '{name}' {list(parameter.shape)}, which cannot be a site; decompose the maps "
            f"next to them, for example {', '.join(examples)}"
        )


def _refers_to_experts(pattern: str, name: str) -> bool:
    """Return whether a pattern means the parameter of that name, or the module that holds it."""
    module = _parent(name)
    if "experts" in module and "experts" in pattern:
        return True
    if fnmatchcase(name, pattern):
        return True
    if fnmatchcase(module, pattern):
        return True
    return fnmatchcase(pattern, f"{module}.*")


def _parent(name: str) -> str:
    """Return the name of the module that holds a module or a parameter.

    >>> _parent("h.0.mlp.experts")
    'h.0.mlp'
    """
    parent, _, _ = name.rpartition(".")
    return parent


@torch.no_grad()
def _reject_other_maps(site: Site) -> None:
    """Raise BadInput if a module does not compute what its weight and bias say (D3).

    A subclass can do more: scale the rows that it looks up, look up other rows, or keep its weight
    packed.
    """
    module = site.module
    kind = type(module)
    if site.kind == "identity" or site.weight.is_meta:
        return
    if kind.forward in (nn.Linear.forward, nn.Embedding.forward):
        return
    if _computes_its_weight(site):
        return
    lacks = "compute x Wᵀ + b"
    if site.kind == "embedding":
        lacks = "look up the rows of its weight"
    raise BadInput(
        f"sites: '{site.name}' is a {kind.__name__}, which does not {lacks}; leave it out"
    )


def _computes_its_weight(site: Site) -> bool:
    """Return whether the module of a site gives the expected outputs on some inputs."""
    W = site.weight
    x, expected = _probe(site, W)
    try:
        out = site.module(x)
        error = (out - expected).abs().max()
    except Exception:  # the module takes other inputs
        return False
    eps = torch.finfo(W.dtype).eps
    tolerance = eps**0.5 * expected.abs().max()
    return bool(error <= tolerance)  # False if the error is not a number


def _probe(site: Site, W: Float[Tensor, "d_out d_in"]) -> tuple[Tensor, Tensor]:
    """Return some inputs of a site, and the outputs that its weight and bias give on them."""
    if site.kind == "embedding":
        count = min(site.d_in, 16)
        tokens = torch.arange(count, device=W.device)
        x = tokens[None]  # [1, tokens]
        return x, W.T[x]
    generator = torch.Generator()
    generator.manual_seed(0)
    x = torch.randn(1, 4, site.d_in, generator=generator)
    x = x.to(W.device, W.dtype)
    expected = nn.functional.linear(x, W, site.bias)  # [1, 4, d_out]
    return x, expected
