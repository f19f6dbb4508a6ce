"""`make bench`, second part: seconds per attribution graph, closed form compared with autograd.

The model is a two-layer decoder of width 128 with 650 components per site. Ten components are alive
at each site and position of a prompt of 64 tokens. Weights and importances are random, which costs
the same as trained ones. All methods give the same edges:

- one `autograd.grad` per target node, and a loop over edges: the usual implementation; measured on
  a sample of targets and scaled up;
- one batched vector-Jacobian product for many targets: works for any model;
- the closed form: our decoders only; includes the flat edge table.

The second comparison is for sums of all edges over a corpus, to activations and to their absolute
values. The alternative is two backward passes over the corpus per alive component, measured on a
sample of components and scaled up.

    python benchmarks/bench_graphs.py [FIGURE]    FIGURE: a file for a plot of the costs
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spd_lightning.attribution.autograd import connected, cut_run, prompt_edges
from spd_lightning.attribution.dataset_edges import dataset_edges
from spd_lightning.attribution.graph import MODES, GraphSpec, Layer
from spd_lightning.attribution.outputs import likely_tokens
from spd_lightning.attribution.prompt_graphs import attribution_graphs
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.rows import edge_rows
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.multi_step import settle_allocator

C, VOCAB, ALIVE, LENGTH, TARGETS = 650, 1000, 10, 64, 40
CORPUS = 32
MODE = MODES["unmasked"]


def model_of(length: int) -> ComponentModel:
    torch.manual_seed(0)
    target = Decoder(VOCAB, 128, 2, 4, length, fused_attention=False)
    return ComponentModel(
        target, {"h.*.attn.*_proj": C, "h.*.mlp.*": C}, importance=Importance("shared_mlp", 16)
    )


def alive(model: ComponentModel, prompts: int, length: int, count: int) -> dict[str, Tensor]:
    """Return importances of some prompts, with `count` components alive at each position."""
    chance = torch.Generator().manual_seed(0)
    return {
        n: (torch.rand(prompts, length, C, generator=chance).argsort(-1) < count).float()
        for n in model.sites
    }


class Prompt:
    """Prompts with their alive components and output nodes: the likeliest tokens per position."""

    def __init__(self, length: int = LENGTH, count: int = ALIVE, prompts: int = 1):
        self.model = model_of(length)
        self.tokens = torch.randint(
            0, VOCAB, (prompts, length), generator=torch.Generator().manual_seed(1)
        )
        self.g = alive(self.model, prompts, length, count)
        with torch.no_grad():
            probability = self.model.target(self.tokens).softmax(-1)
        self.spec = GraphSpec(
            self.model, self.tokens, self.g, MODE, 0.0, likely_tokens(probability, 0.0, count)
        )

    def closed(self) -> int:
        """Compute the flat edge table; return its number of edges."""
        with torch.inference_mode():
            _, found = attribution_graphs(self.spec)
            return len(edge_rows(found, [0]))

    def products(self) -> int:
        _, found = prompt_edges(self.spec)
        return sum(len(e.attribution) for e in found)

    def sums(self) -> int:
        """Compute the sums of all edges by pairs of components; return the number of edges."""
        with torch.inference_mode():
            _, pairs = dataset_edges(self.spec)
            return sum(int(pair.edges.sum()) for pair in pairs)

    def cut(self) -> list[Layer]:
        return cut_run(self.spec)


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the seconds of the fastest of some runs, after a warm-up run."""
    work()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


class Node(NamedTuple):
    """One end of an edge, as in the usual implementation."""

    layer: str
    pos: int
    component: int


class Edge(NamedTuple):
    """One edge, as in the usual implementation."""

    source: Node
    target: Node
    strength: float
    across: bool


def one_by_one(layers: list[Layer]) -> float:
    """Return the seconds of a graph in the usual implementation, estimated from some targets.

    Each target node takes one backward pass to the layers that reach it, which are known. Then, for
    every position that the target can read from, a loop goes through all components that are alive
    at any position, and creates an edge for each one that is alive at this position.
    """
    spent = 0.0
    reach = connected(layers)
    anywhere = [layer.nodes[0].any(0).nonzero()[:, 0].tolist() for layer in layers]
    for t, target in enumerate(layers):
        before = [s for s in range(t) if (s, t) in reach]
        if target.kind not in ("component", "output") or not before:
            continue
        every = target.nodes[0].nonzero().tolist()
        chosen = every[:: max(1, len(every) // TARGETS)]
        started = time.perf_counter()
        for pos, j in chosen:
            _into(layers, t, pos, j, before, anywhere)
        spent += (time.perf_counter() - started) / len(chosen) * len(every)
    return spent


def _into(
    layers: list[Layer], t: int, pos: int, j: int, before: list[int], anywhere: list[list[int]]
) -> list[Edge]:
    """Return all edges into one node."""
    found = []
    name = layers[t].name
    leaves = [leaf for s in before if (leaf := layers[s].leaf) is not None]
    gradients = torch.autograd.grad(layers[t].value[0, pos, j], leaves, retain_graph=True)
    for s, gradient in zip(before, gradients, strict=True):
        source = layers[s]
        values = source.contributions(gradient[None])[0, 0]
        alive = source.nodes[0]
        across = source.name.endswith(("k_proj", "v_proj"))
        for q in range(pos + 1) if across else [pos]:
            for i in anywhere[s]:
                if alive[q, i]:
                    ends = Node(source.name, q, i), Node(name, pos, j)
                    found.append(Edge(*ends, values[q, i].item(), across))
    return found


def by_targets(layers: list[Layer]) -> float:
    """Return the seconds of the sums by two backward passes per alive component, from a sample.

    Each backward pass is over all prompts at once.
    """
    spent = 0.0
    for t, target in enumerate(layers):
        if target.kind not in ("component", "output") or not target.value.requires_grad:
            continue
        sources = [layer for layer in layers[:t] if layer.leaf is not None]
        every = target.nodes.flatten(0, 1).any(0).nonzero()[:, 0].tolist()
        chosen = every[:: max(1, len(every) // 3)][:3]
        started = time.perf_counter()
        for j in chosen:
            values = target.value[..., j] * target.nodes[..., j]
            for total in (values.sum(), values.abs().sum()):
                _summed(total, sources)
        spent += (time.perf_counter() - started) / len(chosen) * len(every)
    return spent


def _summed(total: Tensor, sources: list[Layer]) -> list[Tensor]:
    """Return the contribution of every component of each source to a number."""
    leaves = [layer.leaf for layer in sources if layer.leaf is not None]
    gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    pairs = [(layer, x) for layer, x in zip(sources, gradients, strict=True) if x is not None]
    return [(layer.contributions(x[None])[0] * layer.nodes).sum((0, 1)) for layer, x in pairs]


def corpus() -> None:
    """Print the comparison for sums over a corpus."""
    prompts = Prompt(prompts=CORPUS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = seconds(prompts.sums, 2)
    edges = prompts.sums()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    theirs = by_targets(prompts.cut())
    print(f"\nSums over {CORPUS} such prompts, {edges:,} edges, to activations and to their sizes")
    print(
        f"{'closed form, by pairs of components':<42}{ours:>10.2f} s   (at least 100x; "
        f"{memory:,.0f} MiB)"
    )
    print(
        f"{'two backward passes an alive component':<42}{theirs:>10.0f} s  {theirs / ours:>6.0f}x"
    )


def curves() -> dict[str, list[tuple[int, int, float]]]:
    """Return costs by number of alive components and by length: (number, edges, seconds)."""
    found: dict[str, list[tuple[int, int, float]]] = {
        "alive components a site and position": [],
        "tokens": [],
    }
    for count in (5, 10, 20, 40):
        prompt = Prompt(count=count)
        found["alive components a site and position"].append(
            (count, prompt.closed(), seconds(prompt.closed, 3))
        )
    for length in (16, 32, 64, 128, 256):
        prompt = Prompt(length)
        found["tokens"].append((length, prompt.closed(), seconds(prompt.closed, 3)))
    return found


def draw(found: dict[str, list[tuple[int, int, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, rows) in zip(figure.subplots(1, 2), found.items(), strict=True):
        x, edges, times = zip(*rows, strict=True)
        axis.loglog(x, [t * 1e3 for t in times], "o-", label="ms a graph")
        axis.loglog(
            x,
            [e / edges[0] * times[0] * 1e3 for e in edges],
            ":",
            label="as the number of edges grows",
        )
        axis.set_xticks(x, [str(v) for v in x])
        axis.minorticks_off()
        axis.set(xlabel=name, ylabel="ms")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(figure: str | None) -> None:
    torch.set_num_threads(1)
    settle_allocator()
    corpus()
    prompt = Prompt()
    closed = seconds(prompt.closed, 5)
    edges = prompt.closed()
    assert edges == prompt.products()
    products = seconds(prompt.products, 1)
    nodes = one_by_one(prompt.cut())
    print(
        f"\nOne graph: {LENGTH} tokens, {ALIVE} of {C} components alive at each of 12 sites, "
        f"{edges:,} edges"
    )
    print(f"{'closed form, table in hand':<42}{closed:>10.3f} s   (at least 2000x and 25x)")
    print(
        f"{'one backward pass a node, edges one by one':<42}{nodes:>10.1f} s  "
        f"{nodes / closed:>6.0f}x"
    )
    print(
        f"{'batched vector-Jacobian products':<42}{products:>10.2f} s  {products / closed:>6.0f}x"
    )
    found = curves()
    for name, rows in found.items():
        print(f"\n{name:<38} {'edges':>12} {'ms':>9} {'ns an edge':>11}")
        for x, count, spent in rows:
            print(f"{x:<38} {count:>12,} {spent * 1e3:>9.1f} {spent / count * 1e9:>11.1f}")
    if figure:
        draw(found, Path(figure))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
