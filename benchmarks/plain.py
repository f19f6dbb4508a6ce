"""The training step of a decomposition, implemented literally from the laws in docs/method.md.

`make bench` compares it with ours. It uses every row of the batch, runs one masked forward pass of
the whole target for each term with different masks, builds `V U` and Δ at every use, computes the
importance MLPs with einsum, and computes all gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spd_lightning.decomposition.importance import Importance, lower_leaky, upper_leaky
from spd_lightning.decomposition.losses import Losses, anneal
from spd_lightning.decomposition.reconstruction import Reconstruction

Masks = dict[str, tuple[Tensor, Tensor]]
Routes = dict[str, Tensor | None]


class Plain(nn.Module):
    """V, U and importance MLPs (`mlp` or `shared_mlp`) of a target's maps, and their optimizer."""

    def __init__(
        self,
        target: nn.Module,
        C: int,
        tied: dict[str, str],
        importance: Importance,
        losses: Losses,
    ):
        super().__init__()
        self.target = target.requires_grad_(False)
        self.tied = tied
        self.losses = losses
        h = importance.hidden
        self.modules_by_name: dict[str, Any] = dict(target.named_modules())
        maps = {
            n: m
            for n, m in self.modules_by_name.items()
            if isinstance(m, nn.Linear) and n not in (*tied, "lm_head")
        }
        self.names = [*maps, *tied]
        self.V = {
            n: nn.Parameter(torch.randn(m.in_features, C) / m.in_features**0.5)
            for n, m in maps.items()
        }
        self.U = {n: nn.Parameter(torch.randn(C, m.out_features) / C**0.5) for n, m in maps.items()}
        self.alone = importance.kind == "mlp"
        self.mlps = {}
        for n in self.names:
            d = self.modules_by_name[n].in_features
            shapes = (
                ((C, 1, h), (C, h), (C, h, 1), (C, 1))
                if self.alone
                else ((d, h), (h,), (h, C), (C,))
            )
            self.mlps[n] = [nn.Parameter(torch.randn(s) / max(4, s[0] ** 0.5)) for s in shapes]
        trained = [
            *self.V.values(),
            *self.U.values(),
            *(p for mlp in self.mlps.values() for p in mlp),
        ]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        if partner := self.tied.get(name):
            return self.U[partner].T, self.V[partner].T
        return self.V[name], self.U[name]

    def run(
        self, x: Tensor, masks: Masks, routes: Routes, seen: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Run the target with masked sites (D3, D4), by hooks."""
        hooks = []
        for name in self.names:

            def hook(module, args, out, name=name):
                if seen is not None:
                    seen[name] = args[0]
                if name not in routes:
                    return out
                (V, U) = self.parts(name)
                (m, m_delta) = masks[name]
                where = routes[name]
                delta = module.weight - (V @ U).T
                y = (m * (args[0] @ V)) @ U + m_delta[..., None] * (args[0] @ delta.T)
                y = y if module.bias is None else y + module.bias
                return y if where is None else torch.where(where[..., None], y, out)

            hooks.append(self.modules_by_name[name].register_forward_hook(hook))
        try:
            return self.target(x)
        finally:
            for handle in hooks:
                handle.remove()

    def importance(self, name: str, x: Tensor) -> Tensor:
        """Return the pre-activations z (G1)."""
        W1, b1, W2, b2 = self.mlps[name]
        if not self.alone:
            return nn.functional.gelu(x @ W1 + b1) @ W2 + b2
        a = (x @ self.parts(name)[0])[..., None]
        h = nn.functional.gelu(torch.einsum("bci,cih->bch", a, W1) + b1)
        return (torch.einsum("bch,cho->bco", h, W2) + b2)[..., 0]

    def routes(self, kind: str, g: dict[str, Tensor]) -> list[Routes]:
        """Return the forward passes of a route (M1)."""
        if kind == "layerwise":
            return [{name: None} for name in self.names]
        if kind == "all":
            return [dict.fromkeys(self.names)]
        positions = next(iter(g.values())).shape[:-1]
        rank = torch.rand(len(self.names), *positions).argsort(0).argsort(0)
        size = torch.randint(1, len(self.names) + 1, positions)
        return [{name: rank[k] < size for k, name in enumerate(self.names)}]

    def masks(self, g: dict[str, Tensor], sources: dict[str, Tensor]) -> Masks:
        """Return the masks m = g + (1 − g) s; the last source is that of the delta component."""
        return {
            n: (g[n] + (1 - g[n]) * s[..., :-1], s[..., -1].expand(g[n].shape[:-1]))
            for n, s in sources.items()
        }

    def reconstruction(
        self, term: Reconstruction, x: Tensor, out: Tensor, g: dict[str, Tensor]
    ) -> Tensor:
        """Return the mean divergence over the passes of a route (L5).

        The masks are stochastic or found by PGD.
        """
        routes = self.routes(term.route, g)
        values = []

        def divergence(sources: dict[str, Tensor], route: Routes) -> Tensor:
            y = self.run(x, self.masks(g, sources), route)
            if term.divergence == "mse":
                return (y - out).square().mean()
            p = out.float().log_softmax(-1)
            q = y.float().log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1).mean()

        for route in routes:
            if term.source == "stochastic":
                sources = {n: torch.rand(*g[n].shape[:-1], g[n].shape[-1] + 1) for n in route}
            else:
                sources = {n: torch.rand(g[n].shape[-1] + 1, requires_grad=True) for n in route}
                for _ in range(term.adversary.steps):
                    gradients = torch.autograd.grad(
                        divergence(sources, route), list(sources.values())
                    )
                    sources = {
                        n: (s.detach() + term.adversary.step_size * d.sign())
                        .clamp(0, 1)
                        .requires_grad_()
                        for (n, s), d in zip(sources.items(), gradients, strict=True)
                    }
                sources = {n: s.detach() for n, s in sources.items()}
            values.append(divergence(sources, route))
        return torch.stack(values).mean()

    def objective(self, x: Tensor, progress: float) -> Tensor:
        """Return the total loss (L7)."""
        seen: dict[str, Tensor] = {}
        out = self.run(x, {}, {}, seen)
        z = {name: self.importance(name, seen[name]) for name in self.names}
        minimality = self.losses.minimality
        p = anneal(
            minimality.p,
            minimality.p if minimality.p_final is None else minimality.p_final,
            progress,
        )
        loss = minimality.coeff * sum(
            (upper_leaky(v) + 1e-12).pow(p).flatten(0, -2).mean(0).sum() for v in z.values()
        )
        g = {name: lower_leaky(v) for name, v in z.items()}
        for term in self.losses.reconstruction.values():
            loss = loss + term.coeff * self.reconstruction(term, x, out, g)
        entries = 0
        squares = torch.tensor(0.0)
        for name in self.names:
            V, U = self.parts(name)
            weight = self.modules_by_name[name].weight
            squares = squares + (weight - (V @ U).T).square().sum()
            entries = entries + weight.numel()
        return loss + self.losses.faithfulness.coeff * squares / entries
