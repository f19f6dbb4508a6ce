"""Edges through blocks of a decoder of which only some maps are sites (section A of docs/method.md).

Maps that are not sites pass on what reaches them. So what each node wrote walks on as a *tangent* (`jvp`), and the
edge to a reader is `V_j · tangent`. Up to attention a tangent stands at its node's position, many nodes side by side
(`Rows`); through attention whose maps pass it on it spreads to later positions (`Far`), and walks from there to the
logits, some nodes at a time. A node that reaches a reader on several ways, through queries and values or through a map
and past it, has one tangent, their sum.
"""

from collections.abc import Generator, Mapping
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.attribution.closed_form.jvp import Heads, pushed
from spd_lightning.attribution.closed_form.rows import PromptRows, Rows, beside
from spd_lightning.attribution.closed_form.sinks import Places, T

CHUNK = 1 << 22
"""Numbers held at once for nodes whose tangents have spread."""


class Far(NamedTuple):
    """Single nodes, and a tangent of each at every position; zero before its own."""

    places: Places
    vectors: Float[Tensor, "pos n d"]


Part = TypeVar("Part", Rows, Far)
Moved = dict[str, Tensor]
"""Tangents of queries, keys and values, by the letters q, k and v."""


class PartialWalk(PromptRows[T]):
    """The edges of one prompt in blocks of which only some maps are sites.

    Walks yield edges and return what flows on, or None where nothing does.
    """

    def all_sites(self, *names: str) -> bool:
        """Whether maps are sites, one and all."""
        return all(name in self.model.sites for name in names)

    # ---- attention ----------------------------------------------------------------------------------------------

    def through_attention(self, block: int, stream: Rows) -> Generator[T, None, Rows]:
        """The residual stream → q, k, v → o; what stands at its own position behind them."""
        name, norm, o = f"h.{block}.attn", f"h.{block}.norm_1", f"h.{block}.attn.o_proj"
        asking = yield from self._projected(stream, self._behind(norm, stream), name)
        yield from self._spread(block, stream, asking, stream.vectors)
        for bias in self.whole.get(norm, []):
            moved = yield from self._projected(bias, bias.vectors, name)
            yield from self._spread(block, bias, moved)
        for x in "v" if self.frozen else "qkv":  # a pattern is a constant then
            if self.writes(f"{name}.{x}_proj"):
                writer = self.writer(f"{name}.{x}_proj")
                yield from self._spread(block, writer, {x: writer.vectors})
        staying = none_of(stream) if asking and not self.all_sites(o) else stream
        return beside([staying, self.writer(o)]) if self.writes(o) else staying

    def _projected(self, part: Part, vectors: Tensor, name: str) -> Generator[T, None, Moved]:
        """Tangents behind a norm → those of q, k, v that are sites; what the others make of them."""
        moved = {}
        for x in "qkv":
            if self.all_sites(site := f"{name}.{x}_proj"):
                yield self.met(part, vectors, site)
            elif x == "v" or not self.frozen:
                moved[x] = self._mapped(vectors, site)
        return moved

    def _spread(self, block: int, rows: Rows, moved: Moved, past: Tensor | None = None) -> Generator[T, None, None]:
        """Tangents of q, k, v, each at its own position → o, or through it onward with what goes past it."""
        if not moved:
            return
        real, pos = rows.nodes.real, rows.nodes.pos
        number, held = rows.nodes.number[real], {x: vectors[real] for x, vectors in moved.items()}
        for some in torch.arange(len(pos), device=pos.device).split(self._at_once()):
            at, heads = pos[some], self.heads(block)
            turned = {x: self._turned(block, x, vectors[some][None], at)[0] for x, vectors in held.items()}
            far = Far(Places(number[some], at), heads.spread(turned, at))
            out = yield from self._through(far, far.vectors, f"h.{block}.attn.o_proj")
            if out is not None:
                if past is not None:
                    out[at, torch.arange(len(at), device=at.device)] += past[real][some]
                yield from self._onward(block, far._replace(vectors=out))

    def _turned(self, block: int, x: str, vectors: Tensor, pos: Tensor) -> Float[Tensor, "n head pos d_head"]:
        """Tangents of q, k or v, cut into heads as these are."""
        attn, rotary = self.target.h[block].attn, None if x == "v" else self.rotary
        count = attn.n_heads if x == "q" else attn.n_kv_heads
        turned = attn.turned(vectors, count, rotary and tuple(table[pos] for table in rotary))
        return turned.repeat_interleave(attn.n_heads // count, dim=1)

    def heads(self, block: int) -> Heads:
        """The attention of a block on this prompt."""
        attn = self.target.h[block].attn
        projected = (self.at(self.run.out, m)[None] for m in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k, v = attn.heads_of(*projected, self.rotary)
        return Heads(q[0], k[0], v[0], attn.pattern(q, k)[0])

    # ---- neurons ------------------------------------------------------------------------------------------------

    def through_mlp(self, block: int, stream: Rows) -> Generator[T, None, Rows]:
        """The residual stream → the first maps of an MLP → down; what stands at each position behind them."""
        name, norm = f"h.{block}.mlp", f"h.{block}.norm_2"
        slopes, down = self.slopes(self.target.h[block].mlp, name), f"{name}.down_proj"
        out = yield from self._neurons(stream, self._behind(norm, stream), slopes, down)
        behind = [stream if out is None else stream._replace(vectors=stream.vectors + out)]
        for bias in self.whole.get(norm, []):
            out = yield from self._neurons(bias, bias.vectors, slopes, down)
            behind += [] if out is None else [bias._replace(vectors=out)]
        for first in filter(self.writes, slopes):
            writer = self.writer(first)
            out = yield from self._through(writer, writer.vectors * slopes[first][:, None], down)
            behind += [] if out is None else [writer._replace(vectors=out)]
        return beside([*behind, self.writer(down)] if self.writes(down) else behind)

    def _neurons(
        self, part: Part, vectors: Tensor, slopes: Mapping[str, Tensor], down: str
    ) -> Generator[T, None, Tensor | None]:
        """Tangents behind a norm → first maps that are sites, and through the others → down."""
        moved = []
        for first, slope in slopes.items():
            if self.all_sites(first):
                yield self.met(part, vectors, first)
            else:
                moved.append(self._mapped(vectors, first) * slope[:, None])
        return (yield from self._through(part, sum(moved[1:], moved[0]), down)) if moved else None

    # ---- the rest of the way ------------------------------------------------------------------------------------

    def _onward(self, block: int, far: Far) -> Generator[T, None, None]:
        """Add the edges from tangents that attention has spread to all readers after it."""
        for later in range(block, len(self.target.h)):
            if later > block:
                far = yield from self._attention_far(later, far)
            name, vectors = f"h.{later}.mlp", self._behind(f"h.{later}.norm_2", far)
            slopes = self.slopes(self.target.h[later].mlp, name)
            far = plus(far, (yield from self._neurons(far, vectors, slopes, f"{name}.down_proj")))
        yield self.met(far, self._behind("norm_f", far), "lm_head" if self.all_sites("lm_head") else "output")

    def _attention_far(self, block: int, far: Far) -> Generator[T, None, Far]:
        """Push tangents that have spread through q, k and v to o, and beyond."""
        name = f"h.{block}.attn"
        moved = yield from self._projected(far, self._behind(f"h.{block}.norm_1", far), name)
        if not moved:
            return far
        every = torch.arange(len(far.vectors), device=far.vectors.device)
        turned = {x: self._turned(block, x, vectors.transpose(0, 1), every) for x, vectors in moved.items()}
        gathered = self.heads(block).gathered(turned)
        return plus(far, (yield from self._through(far, gathered, f"{name}.o_proj")))

    def met(self, part: Part, vectors: Tensor, name: str) -> T:
        """Edges to a layer: inner products of what it reads with tangents at its input."""
        if isinstance(part, Rows):
            return self.same(Rows(part.nodes, vectors), self.reader(name))
        readers = self.reader(name)
        return self.taken.far(part.places, readers.nodes, readers.vectors @ vectors.transpose(1, 2))

    def _through(self, part: Part, vectors: Tensor, name: str) -> Generator[T, None, Tensor | None]:
        """Tangents at the input of a map: edges where it is a site, else what it makes of them."""
        if self.all_sites(name):
            yield self.met(part, vectors, name)
            return None
        return self._mapped(vectors, name)

    def _mapped(self, vectors: Tensor, name: str) -> Tensor:
        """Push tangents through a map that is not a site."""
        return vectors @ self.target.get_submodule(name).weight.T

    def _behind(self, norm: str, part: Part) -> Tensor:
        """The residual stream's tangents behind a norm."""
        module = self.target.get_submodule(norm)
        return pushed(module, self.at(self.run.into, module), part.vectors, self.frozen)

    def _at_once(self) -> int:
        """How many nodes may spread together."""
        length, block = len(self.run.output[self.prompt]), self.target.h[0]
        widest = max(block.mlp.down_proj.in_features, block.attn.n_heads * length)
        return max(1, CHUNK // (length * widest))


def plus(far: Far, vectors: Tensor | None) -> Far:
    """Tangents with more of the same nodes."""
    return far if vectors is None else far._replace(vectors=far.vectors + vectors)


def none_of(rows: Rows) -> Rows:
    """No nodes, in as many positions."""
    nodes, vectors = rows
    return Rows(type(nodes)(*(column[:, :0] for column in nodes)), vectors[:, :0])
