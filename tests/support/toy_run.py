"""A run of TMS 5-2 with a known answer, created without training.

`linear1` maps 5 features to 2 dimensions, and `linear2` is its transpose (tied). Of the 20
components, 5 are alive: each is one column of the weight, in shuffled order. So the attributions
can be derived from the weights by hand.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl

from spd_lightning.digests import digest
from spd_lightning.store import Writer, prompt_hash

FEATURES, C = 5, 20
ALIVE = [7, 2, 13, 11, 16]  # the component of feature 0, 1, …, the same in both sites
LAYERS = ["input", "linear1", "linear2", "output"]
ANGLES = 2 * np.pi * np.arange(FEATURES) / FEATURES
W = np.stack([np.cos(ANGLES), np.sin(ANGLES)])  # [2, 5], the columns of a pentagon
BIAS = -0.31
SCHEMAS = {
    "nodes": ["node", "kind", "layer", "pos", "component", "importance", "activation"],
    "edges": ["source", "target", "attribution"],
    "outputs": ["pos", "token_id", "token", "ci_logit", "target_logit"],
}


def make_run(folder: Path, harvests: tuple[str, ...] = ("probe",), finished: bool = True) -> Path:
    """Write the run to a folder: config, metrics, weights, a picture, and a harvest per name."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": 0,
        "model": {"sites": {"linear1": C, "linear2": C}, "threshold": 0.1},
    }
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  sites: {linear1: 20, linear2: 20}\n"
    )
    steps = [
        {"step": s, "train/loss": 3 * 0.995**s + 1e-4, "train/faithfulness": 0.99**s}
        for s in range(0, 2000, 20)
    ]
    steps += [
        {"step": s, "l0/linear1": 5 - s / 1000, "l0/linear2": 6 - s / 1000}
        for s in range(0, 2000, 500)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    _weights(folder)
    _picture(folder / "figures" / "importance.png")
    for name in harvests:
        make_harvest(folder / "harvest" / name, folder.name, config)
    if finished:
        reached = {
            "mmcs/linear1": 0.9998,
            "mmcs/linear2": 0.9997,
            "alive": {"linear1": 5, "linear2": 5},
            "seed": 0,
        }
        (folder / "summary.json").write_text(json.dumps(reached))
    return folder


def make_harvest(path: Path, run: str = "tms_5-2", config: dict | None = None) -> Path:
    """Write 5 probe prompts (one feature at 0.75) and 64 random ones, in two groups of shards."""
    manifest = {
        "harvest": path.name,
        "run": run,
        "kind": "vectors",
        "mode": "unmasked",
        "threshold": 0.0,
    }
    manifest |= {"checkpoint_digest": "0" * 12, "config": config or {}, "layers": LAYERS}
    writer = Writer(path, manifest | {"C": {"linear1": C, "linear2": C}})
    rng = np.random.default_rng(0)
    probes = [("probe", f"feature {f}", 0.75 * np.eye(FEATURES)[f]) for f in range(FEATURES)]
    active = [rng.random(FEATURES) * (rng.random(FEATURES) < 0.5) for _ in range(64)]
    randoms = [("random", f"random {i}", x) for i, x in enumerate(active)]
    for group in (probes, randoms):
        writer.write(_tables(group))
    writer.complete()
    return path


def _tables(prompts: list[tuple[str, str, np.ndarray]]) -> dict[str, pl.DataFrame]:
    rows: dict[str, list[dict]] = {"prompts": [], "nodes": [], "edges": [], "outputs": []}
    for split, source, x in prompts:
        prompt = prompt_hash(source.encode())
        features = np.flatnonzero(x).tolist()
        tokens = [f"f{f}={x[f]:.2f}" for f in features]
        own = {"token_ids": features, "tokens": tokens, "source": source, "split": split}
        rows["prompts"].append({"prompt_id": prompt, **own})
        for table, values in _graph(x, features).items():
            rows[table] += [
                {"prompt_id": prompt, **dict(zip(SCHEMAS[table], row, strict=True))}
                for row in values
            ]
    blank = {"ci_probability": None, "target_probability": None}
    rows["outputs"] = [row | blank for row in rows["outputs"]]
    frames = {table: _typed(table, values) for table, values in rows.items() if values}
    return frames | {"components": _counts(np.stack([x for _, _, x in prompts]))}


def _graph(x: np.ndarray, features: list[int]) -> dict[str, list]:
    """Return the nodes, edges and outputs of an input, computed from the weights.

    a1 = x, a2 = W[:,f]·(W x), y = relu(a2 + b).
    """
    hidden = W @ x
    a2 = W.T @ hidden
    y = np.maximum(W.T @ hidden + BIAS, 0)
    second = [f for f in range(FEATURES) if a2[f] > 0.02]
    nodes = [("input", "input", 0, f, None, x[f]) for f in features]
    nodes += [
        ("component", "linear1", 0, ALIVE[f], min(1.0, 0.4 + x[f]), x[f])
        for f in _by_component(features)
    ]
    nodes += [
        ("component", "linear2", 0, ALIVE[f], min(1.0, a2[f] + 0.2), a2[f])
        for f in _by_component(second)
    ]
    nodes += [("output", "output", 0, f, None, y[f]) for f in range(FEATURES)]
    numbers = {(layer, component): n for n, (_, layer, _, component, _, _) in enumerate(nodes)}
    edges = [(numbers["input", f], numbers["linear1", ALIVE[f]], x[f]) for f in features]
    for f in features:
        edges += [
            (numbers["linear1", ALIVE[f]], numbers["linear2", ALIVE[g]], x[f] * (W.T @ W)[f, g])
            for g in second
        ]
    edges += [
        (numbers["linear2", ALIVE[g]], numbers["output", g], a2[g] * float(y[g] > 0))
        for g in second
    ]
    outputs = [(0, f, str(f), y[f] + 0.01 * f, y[f]) for f in range(FEATURES)]
    return {
        "nodes": [(n, *node) for n, node in enumerate(nodes)],
        "edges": edges,
        "outputs": outputs,
    }


def _by_component(features: list[int]) -> list[int]:
    return sorted(features, key=lambda f: ALIVE[f])


def _counts(inputs: np.ndarray) -> pl.DataFrame:
    rows = []
    for layer, activations in {"linear1": inputs, "linear2": inputs @ W.T @ W}.items():
        for c in range(C):
            own = activations[:, ALIVE.index(c)] if c in ALIVE else np.zeros(len(inputs))
            fired = np.maximum(own, 0)
            sums = {
                "firings": int((fired > 0).sum()),
                "importance_sum": fired.sum(),
                "activation_sum": own.sum(),
            }
            norm = {"norm": 1.0 if c in ALIVE else 0.003, "alive": c in ALIVE}
            rows.append({"layer": layer, "component": c, "positions": len(inputs), **sums, **norm})
    return _typed("components", rows)


def _typed(table: str, rows: list[dict]) -> pl.DataFrame:
    from spd_lightning.store import TABLES

    words = {
        name: pl.String
        for name, dtype in TABLES[table].items()
        if dtype in (pl.Categorical, pl.Enum)
    }
    return pl.DataFrame(rows, schema=dict(TABLES[table]) | words)


def _weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    V = 0.02 * rng.normal(size=(FEATURES, C))
    U = 0.02 * rng.normal(size=(C, 2))
    V[:, ALIVE] = np.eye(FEATURES)
    U[ALIVE] = W.T
    tensors = {"components.linear1.V": V.astype("f4"), "components.linear1.U": U.astype("f4")}
    save_file(tensors, folder / "decomposition.safetensors")
    sites = {"linear1": {"C": C, "d_in": 5, "d_out": 2}, "linear2": {"C": C, "d_in": 2, "d_out": 5}}
    description = {
        "schema": 1,
        "model": {},
        "target": {},
        "sites": sites,
        "tied": {"linear2": "linear1"},
    }
    description["digest"] = digest(folder / "decomposition.safetensors")
    (folder / "decomposition.json").write_text(json.dumps(description))


def _picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir()
    ramp = np.add.outer(np.arange(90), np.arange(160))
    Image.fromarray(ramp.astype(np.uint8)).save(path)
