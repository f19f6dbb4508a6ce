"""Sites and the rank-one components they are split into (laws D1–D4, D7–D9 of docs/method.md).

A *site* is one linear map of the frozen target model, with weight `W [d_out, d_in]`. Component c of
a site is the rank-one matrix `U[c]ᵀ V[:, c]ᵀ`; what all of them together miss, `Δ = W − (V U)ᵀ`, is
the *delta component*. Under component masks m and delta mask m_Δ the site computes

    y = (m ∘ a) U + m_Δ (x Δᵀ) + b,          a = x V                                       (D3)
      = m_Δ (x Wᵀ) + ((m − m_Δ) ∘ a) U + b,

the second form being the one computed: it builds neither `V U` nor Δ and needs no gradient through
W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.matmul import matmul
from spd_lightning.errors import BadInput, nearest

Kind = Literal["linear", "conv1d", "embedding", "identity"]
IDENTITY = ".pre_identity"


@dataclass(frozen=True)
class Site:
    """One linear map of the target: where it is, what kind it is, how wide."""

    name: str
    kind: Kind
    module: nn.Module
    d_in: int
    d_out: int

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W as the law writes it, whatever way round the module stores it."""
        match self.kind:
            case "linear":
                return self.module.weight  # pyright: ignore[reportReturnType]
            case "conv1d" | "embedding":
                return self.module.weight.T  # pyright: ignore[reportReturnType]
            case "identity":
                parameter = next(self.module.parameters())
                return torch.eye(self.d_in, dtype=parameter.dtype, device=parameter.device)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """b, or None where the map has none."""
        return None if self.kind in ("identity", "embedding") else self.module.bias  # pyright: ignore[reportReturnType]

    def inner(self, x: Tensor, V: Float[Tensor, "d_in C"]) -> Float[Tensor, "... C"]:
        """Inner activations `a = x V` (D2); for embeddings x holds token ids and rows of V are
        picked.
        """
        return nn.functional.embedding(x, V) if self.kind == "embedding" else matmul(x, V)


class Components(nn.Module):
    """The C rank-one components of one site: `V [d_in, C]` reads, `U [C, d_out]` writes (D1), drawn
    by D7.
    """

    def __init__(self, d_in: int, d_out: int, C: int):
        super().__init__()
        self.V = nn.Parameter(torch.randn(d_in, C) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(C, d_out) / C**0.5)


class TiedComponents(nn.Module):
    """Components of a site whose weight is the transpose of a partner's (D9): the partner's own,
    read the other way.
    """

    def __init__(self, partner: Components):
        super().__init__()
        self._partner = (partner,)  # in a tuple: the parameters belong to the partner alone

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        return self._partner[0].U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        return self._partner[0].V.T


class Mask(NamedTuple):
    """The masks of one site in one forward pass.

    components: m [..., C], or None for all ones. delta: m_Δ [...], or a number. route: r [...]
    boolean, where False leaves the position to the target's own map (D4); None decomposes every
    position. rows: the flat numbers of positions, all that the route decomposes at least; where
    given, components and delta hold these alone ([rows, C] and [rows]), and all other positions
    cost nothing.
    """

    components: Tensor | None
    delta: Tensor | float
    route: Tensor | None = None
    rows: Tensor | None = None

    @property
    def bare(self) -> bool:
        """Whether the site's own output plays no part: no delta, and every position decomposed."""
        return self.route is None and isinstance(self.delta, float | int) and self.delta == 0


def masked_output(
    clean: Tensor | None,
    bias: Tensor | None,
    a: Float[Tensor, "... C"],
    U: Float[Tensor, "C d_out"],
    mask: Mask,
) -> Float[Tensor, "... d_out"]:
    """A site's output under masks (D3, D4).

    clean: the site's own output x Wᵀ + b; may be None where the mask is bare. a: x V, of the mask's
    rows alone where it names them.
    """
    if mask.rows is not None:
        assert clean is not None
        assert mask.route is not None
        flat = clean.flatten(0, -2)
        here = mask.route.flatten().index_select(0, mask.rows)
        own = flat.index_select(0, mask.rows)
        y = _decomposed(own, bias, a, U, mask).to(flat.dtype)
        return flat.index_copy(0, mask.rows, torch.where(here.unsqueeze(-1), y, own)).view_as(clean)
    y = _decomposed(clean, bias, a, U, mask)
    if mask.route is None:
        return y
    assert clean is not None
    return torch.where(mask.route.unsqueeze(-1), y, clean)


def _decomposed(
    clean: Tensor | None, bias: Tensor | None, a: Tensor, U: Tensor, mask: Mask
) -> Tensor:
    """The second form of D3, at the positions of a."""
    m, delta = mask.components, mask.delta
    fixed = isinstance(delta, float | int)
    gate = delta if fixed else delta.unsqueeze(-1)
    if m is None:
        w = a if fixed and delta == 0 else (1 - gate) * a
    else:
        w = m * a if fixed and delta == 0 else (m - gate) * a
    y = matmul(w, U)
    if not (fixed and delta == 0):
        assert clean is not None
        y = y + gate * (clean if bias is None else clean - bias)
    return y if bias is None else y + bias


def _kind(module: nn.Module) -> Kind | None:
    match module:
        case nn.Linear():
            return "linear"
        case nn.Embedding():
            return "embedding"
        case _ if type(module).__name__ == "Conv1D" and hasattr(
            module, "nf"
        ):  # HuggingFace's, weight transposed
            return "conv1d"
    return None


def _width(module: nn.Module, kind: Kind) -> tuple[int, int]:
    if kind == "embedding":
        return module.num_embeddings, module.embedding_dim  # pyright: ignore[reportReturnType]
    rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues]
    return (rows, columns) if kind == "conv1d" else (columns, rows)  # pyright: ignore[reportReturnType]


def available(model: nn.Module) -> dict[str, Site]:
    """Every map of a model that can be a site, by name; `M.pre_identity` stands for the identity
    before M (D8).
    """
    found = {}
    for name, module in model.named_modules():
        if kind := _kind(module):
            d_in, d_out = _width(module, kind)
            if kind != "embedding":
                found[name + IDENTITY] = Site(name + IDENTITY, "identity", module, d_in, d_in)
            found[name] = Site(name, kind, module, d_in, d_out)
    return found


def _refuse_experts(model: nn.Module, pattern: str, modules: Sequence[str]) -> None:
    """Raise BadInput if a pattern that matches no map means experts that are kept as one tensor."""
    for name, parameter in model.named_parameters():
        holder = name.rpartition(".")[0]
        meant = (
            fnmatchcase(name, pattern)
            or fnmatchcase(holder, pattern)
            or fnmatchcase(pattern, f"{holder}.*")
        )
        if parameter.ndim == 3 and (meant or ("experts" in holder and "experts" in pattern)):
            block = holder.rpartition(".")[0].rpartition(".")[0]
            others = [m for m in modules if m.startswith(f"{block}.")] or list(modules)
            raise BadInput(
                f"sites: pattern '{pattern}' refers to experts stored as one three-dimensional "
                f"tensor, '{name}' "
                f"{list(parameter.shape)}, which cannot be a site; decompose the maps next to "
                f"them, for example {', '.join(others[:4])}"
            )


@torch.no_grad()
def _refuse_other_maps(site: Site) -> None:
    """Raise BadInput if a module does not compute what its weight and bias say (D3).

    A subclass may do more: scale what it looks up, look up other rows than it is given, or keep its
    weight packed.
    """
    module, W = site.module, site.weight
    if (
        site.kind == "identity"
        or W.is_meta
        or type(module).forward in (nn.Linear.forward, nn.Embedding.forward)
    ):
        return
    if site.kind == "embedding":
        x = torch.arange(min(site.d_in, 16), device=W.device)[None]
        wanted = W.T[x]
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, site.d_in, generator=generator).to(W.device, W.dtype)
        wanted = nn.functional.linear(x, W, site.bias)
    try:
        apart = (module(x) - wanted).abs().max()
    except Exception:  # it takes something else
        apart = torch.inf
    if not apart <= torch.finfo(W.dtype).eps ** 0.5 * wanted.abs().max():
        lacks = "look up the rows of its weight" if site.kind == "embedding" else "compute x Wᵀ + b"
        raise BadInput(
            f"sites: '{site.name}' is a {type(module).__name__}, which does not {lacks}; leave it "
            "out"
        )


def find_sites(model: nn.Module, patterns: Mapping[str, int]) -> dict[str, tuple[Site, int]]:
    """The sites that fnmatch patterns name, in the model's own order, each with its number of
    components.

    `*` reaches maps only; identity sites are named by patterns that end in `.pre_identity`.

    Raises:
        BadInput: a pattern matches nothing, a module is matched twice, or a count is not positive.
    """
    sites = available(model)
    owner = {}
    counts = {}
    for pattern, C in patterns.items():
        if C < 1:
            raise BadInput(
                f"sites: '{pattern}: {C}' must have at least one component; give a positive number"
            )
        identity = pattern.endswith(IDENTITY)
        matched = [
            name
            for name in sites
            if fnmatchcase(name, pattern) and name.endswith(IDENTITY) == identity
        ]
        if not matched:
            modules = [name for name in sites if not name.endswith(IDENTITY)]
            _refuse_experts(model, pattern, modules)
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
            owner[name], counts[name] = pattern, C
            _refuse_other_maps(sites[name])
    return {name: (site, counts[name]) for name, site in sites.items() if name in counts}
