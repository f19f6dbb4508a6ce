"""Attribution graphs of decoders without a backward pass (section A of docs/method.md).

Between two sites of a decoder there is little: a norm, a non-linearity, or attention. The derivative of each is known,
so an edge is a few inner products of what the source writes with what the target reads:

    residual writer → reader        w_i U_i · Jᵀ V_j                  J: the norm's Jacobian at this position
    first MLP map → down            w_i U_i ∘ φ'(h) · V_j
    v → o                           w_i Σ_h p_h[s, s'] (U_i · V_j)_h
    q → o                           w_i Σ_h Σ_s' p_h[s, s'] (k_s' · R U_i)_h ((v_s' − v̄_s) · V_j)_h / √d
    k → o                           w_i Σ_h p_h[s, s'] (q_s · R U_i)_h ((v_s' − v̄_s) · V_j)_h / √d

with w = m ∘ a, p_h the attention pattern of head h, R the rotation to a position. One forward pass of the batch gives
all that these ask for; edges then come prompt by prompt, from the rows of U and V that are nodes there.
Maps that are not sites pass on what reaches them: `partial` has the edges through their blocks.
Not here: modes whose delta carries gradient (see `why_not`); those take the batched products of `autograd`, which
give the same numbers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.attribution.closed_form.partial import PartialWalk
from spd_lightning.attribution.closed_form.rows import Rows, batch_of, beside
from spd_lightning.attribution.closed_form.sinks import Across, T, Tables
from spd_lightning.attribution.graph import EdgeTable, Layer, Subject

# ---- edges of one prompt --------------------------------------------------------------------------------------------


class Graph(PartialWalk[T]):
    """The edges of one prompt of a traced batch; quicker than `PartialWalk` where all maps are sites."""

    def __iter__(self) -> Iterator[T]:
        edges = self._edges()
        while True:
            try:
                with torch.no_grad():  # whoever takes edges keeps a mode of their own
                    found = next(edges)
            except StopIteration:
                return
            yield found

    def _edges(self) -> Iterator[T]:
        stream = beside([self.writer(name) for name in ("wte", "wpe") if name in self.nodes or name in self.whole])
        for k, block in enumerate(self.target.h):
            attn, mlp = f"h.{k}.attn", f"h.{k}.mlp"
            maps, down = [f"{attn}.{x}_proj" for x in "qkv"], f"{mlp}.down_proj"
            if self.all_sites(*maps, f"{attn}.o_proj"):
                yield from self._read(stream, f"h.{k}.norm_1", *maps)
                yield from self._attention(k, block.attn, attn)
                stream = beside([stream, self.writer(f"{attn}.o_proj")])
            else:
                stream = yield from self.through_attention(k, stream)
            slopes = self.slopes(block.mlp, mlp)
            if self.all_sites(*slopes, down):
                yield from self._read(stream, f"h.{k}.norm_2", *slopes)
                yield from self._neurons_to(self.reader(down), slopes)
                stream = beside([stream, self.writer(down)])
            else:
                stream = yield from self.through_mlp(k, stream)
        if "lm_head" not in self.model.sites:
            yield from self._read(stream, "norm_f", "output")
            return
        yield from self._read(stream, "norm_f", "lm_head")
        head, out = self.writer("lm_head"), self.nodes["output"]
        tokens = out.component[:, None].expand(-1, head.vectors.shape[1], -1)
        yield self.taken.same(head.nodes, out, self.run.of.reading(head.vectors).gather(2, tokens))

    def _read(self, stream: Rows, norm: str, *names: str) -> Iterator[T]:
        """The residual stream, and the norm's bias where it is a node, → readers behind a norm."""
        readers, module = beside([self.reader(name) for name in names]), self.target.get_submodule(norm)
        inner = self.run.inner | {"output": self.run.output}
        a = torch.cat([self.nodes[name].pick(self.at(inner, name)) for name in names], dim=1)
        vectors = pulled_back(module, self.at(self.run.into, module), readers.vectors, a, self.frozen)
        yield self.same(stream, readers._replace(vectors=vectors))
        for bias in self.whole.get(norm, []):
            yield self.same(bias, readers)

    def _neurons_to(self, down: Rows, slopes: Mapping[str, Tensor]) -> Iterator[T]:
        """The first maps of an MLP → what its last one reads."""
        for name, moved in slopes.items():
            writer = self.writer(name)
            yield self.same(writer._replace(vectors=writer.vectors * moved[:, None]), down)

    # ---- edges through attention --------------------------------------------------------------------------------

    def of_head(self, block: int, head: int) -> Iterator[T]:
        """Yield one head's contribution to the edges q, k and v → o of a block."""
        return self._attention(block, self.target.h[block].attn, f"h.{block}.attn", slice(head, head + 1))

    def _attention(self, block: int, attn: Any, name: str, some: slice = slice(None)) -> Iterator[T]:
        """q, k and v → o, by way of some heads, or all."""
        q_site, k_site, v_site, o_site = (f"{name}.{x}_proj" for x in "qkvo")
        shared, (q, k, v, pattern) = attn.n_heads // attn.n_kv_heads, (x[some] for x in self.heads(block))
        scale = q.shape[-1] ** -0.5
        readers, mean = self.reader(o_site), pattern @ v

        def turned(writer: Rows, count: int) -> Float[Tensor, "head pos K d_head"]:
            """R U_i of every node."""
            return attn.turned(writer.vectors.transpose(0, 1), count, self.rotary).permute(1, 2, 0, 3)

        left = readers.vectors.unflatten(-1, (attn.n_heads, -1)).permute(2, 0, 1, 3)[some].contiguous()
        values = self.writer(v_site)
        written = values.vectors[values.nodes.real].unflatten(-1, (attn.n_kv_heads, -1)).transpose(0, 1)
        written = written.repeat_interleave(shared, dim=0)[some]
        weight = pattern.index_select(2, values.nodes.pos)
        own = left.shape[-1]
        yield from self.taken.across(Across(values.nodes, readers.nodes, weight, left, written, own))
        if self.frozen:  # a pattern is a constant then
            return

        beyond = torch.cat([left, -(left * mean[:, :, None]).sum(-1, keepdim=True)], dim=-1)
        values_and_one = nn.functional.pad(v, (0, 1), value=1.0)  # beyond · this = (v − v̄) · V_j
        queries, keys = self.writer(q_site), self.writer(k_site)
        asking = with_all(turned(queries, attn.n_heads)[some], k) * (pattern * scale)[:, :, None]
        asking, gained = (x.permute(1, 2, 0, 3).flatten(2) for x in (asking, with_all(beyond, values_and_one)))
        yield self.same(Rows(queries.nodes, asking), Rows(readers.nodes, gained))

        at = keys.nodes.pos
        rows = turned(keys, attn.n_kv_heads)[:, keys.nodes.real].repeat_interleave(shared, dim=0)[some]
        asked = pattern.index_select(2, at) * (q @ rows.transpose(1, 2)) * scale
        read = values_and_one.index_select(1, at)
        yield from self.taken.across(Across(keys.nodes, readers.nodes, asked, beyond, read, own))


def with_all(rows: Float[Tensor, "head pos K e"], others: Float[Tensor, "head pos e"]) -> Tensor:
    """Inner products of every row with what its head has at every position [head, pos, K, pos]."""
    return (rows.flatten(1, 2) @ others.transpose(1, 2)).unflatten(1, rows.shape[1:3])


def pulled_back(
    norm: nn.Module,
    r: Float[Tensor, "pos d"],
    columns: Float[Tensor, "pos K d"],
    a: Float[Tensor, "pos K"],
    frozen: bool = False,
) -> Float[Tensor, "pos K d"]:
    """Gradients to a norm's input r of `a = norm(r) · column`; frozen, its denominator is a constant."""
    match norm:
        case nn.RMSNorm():
            eps = torch.finfo(r.dtype).eps if norm.eps is None else norm.eps
            inverse = (r.square().mean(-1) + eps).rsqrt()[:, None, None]
            moved = 0.0 if frozen else r[:, None] * (a[..., None] * inverse / r.shape[-1])
            return (columns * norm.weight - moved) * inverse
        case nn.LayerNorm():
            r = r - r.mean(-1, keepdim=True)
            inverse = (r.square().mean(-1) + norm.eps).rsqrt()[:, None, None]
            scaled = columns * norm.weight
            without = a if norm.bias is None else a - columns @ norm.bias
            scaled = scaled - scaled.mean(-1, keepdim=True)
            moved = 0.0 if frozen else r[:, None] * (without[..., None] * inverse / r.shape[-1])
            return (scaled - moved) * inverse
    return columns


def closed_form(of: Subject) -> tuple[list[Layer], Iterator[Graph[EdgeTable]]]:
    """The graphs of a batch of prompts: their layers, and of each prompt its edges, to be computed.

    `why_not` must have nothing to say against it.
    """
    batch = batch_of(of)
    return batch.layers, (Graph(batch, prompt, Tables(prompt)) for prompt in range(len(of.inputs)))
