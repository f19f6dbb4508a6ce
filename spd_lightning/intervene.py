"""intervene: edits components of a finished run on one prompt, and prints predictions beside the target's."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.decomposition.intervention import BASES, Intervened
from spd_lightning.errors import BadInput, Options, nearest
from spd_lightning.targets.data import StepData
from spd_lightning.training.checkpoint import load_decomposition
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.session import Settings


def intervene(words: Sequence[str]) -> None:
    """Runs a prompt through a run's model with and without edits; prints a line a position, or JSON."""
    asked = _asked(words)
    folder = runs.find(asked.run).path
    module, data = load_decomposition(folder), _data(folder)
    inputs = _inputs(asked, module, data)
    module.try_on(inputs)
    scale, values = _pairs("--scale", asked.scale), _pairs("--set", asked.set)
    outcome = module.intervene(inputs, asked.ablate, scale, values, _kept(asked.keep), asked.base)
    if not outcome.edited.isfinite().all():
        raise BadInput("edits: with them the outputs are no numbers any more; scale or set by less")
    facts = {"run": folder.resolve().name, "base": asked.base, **told(outcome, inputs, data, asked.top)}
    print(json.dumps(facts, indent=1, ensure_ascii=False) if asked.json else "\n".join(lines(facts)))


# ---- what is asked --------------------------------------------------------------------------------------------------


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = Options("intervene", "see: python -m spd_lightning --help")
    parser.add_argument("run", metavar="RUN")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--text")
    prompt.add_argument("--input")
    for option in ("--ablate", "--scale", "--set", "--keep"):
        parser.add_argument(option, action="extend", nargs="+")
    parser.add_argument("--base", default="unmasked")
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked, more = parser.parse_known_args(list(words))
    if more:
        options = [option for action in parser._actions for option in action.option_strings]
        raise BadInput(f"intervene: '{more[0]}' is none of its options; {nearest(more[0], options)}")
    if asked.base not in BASES:
        raise BadInput(f"--base '{asked.base}': no such run of the model; {nearest(asked.base, BASES)}")
    if asked.top < 1:
        raise BadInput(f"--top {asked.top}: it counts predictions; take 1 or more")
    asked.ablate = [name for word in asked.ablate or () for name in word.split(",")]
    return asked


def _pairs(option: str, words: Sequence[str] | None) -> dict[str, float]:
    """NAME=NUMBER as a map."""
    found = {}
    for word in words or ():
        name, equals, number = word.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not abs(found[name]) <= torch.finfo(torch.float32).max:
            raise BadInput(f"{option} '{word}': write a component and a number; for example: {option} h.0.mlp.c_fc:5=2")
    return found


def _kept(words: Sequence[str] | None) -> list[str] | None:
    """The names in words and in .json files: a list of names, or an object that has one under `nodes`."""
    if words is None:
        return None
    found: list[str] = []
    for word in words:
        found += _listed(Path(word)) if word.endswith(".json") else [name for name in word.split(",") if name]
    return found


def _listed(path: Path) -> list[str]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise BadInput(f"--keep '{path}': cannot be read ({why}); name a file with a list of components") from error
    names = held.get("nodes") if isinstance(held, dict) else held
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"--keep '{path}': it holds no list of names; write [\"h.0.mlp.c_fc:3:7\", …]")
    return names


def _data(folder: Path) -> StepData:
    """The data of a run, of which nothing is made before it is asked for."""
    if not (folder / "config.yaml").exists():
        raise BadInput(f"run '{folder}': no config.yaml in it, which says how texts become tokens; name another run")
    return Settings(configs.load(str((folder / "config.yaml").resolve()))).built("data")


def _inputs(asked: argparse.Namespace, module: Decomposition, data: StepData) -> Tensor:
    """The prompt [1, features] or [1, pos]."""
    vocab, context = (getattr(module.network, name, None) for name in ("vocab", "context"))
    if asked.text is not None:
        encode = getattr(data, "encode", None)
        if encode is None or vocab is None:
            raise BadInput(f"--text: run '{asked.run}' takes no texts; give --input, numbers with commas between")
        numbers = encode(asked.text)
    else:
        numbers = _numbers(asked.input, whole=vocab is not None)
    if not numbers:
        raise BadInput("prompt: it is empty; give it a token at least")
    if vocab is not None:
        if outside := [token for token in numbers if not 0 <= token < vocab]:
            raise BadInput(f"prompt: token {outside[0]} is outside the target's vocabulary, which ends at {vocab - 1}")
        if context is not None and len(numbers) > context:
            raise BadInput(
                f"prompt: it has {len(numbers)} tokens, and the target's context holds {context}; shorten it"
            )
    return torch.tensor([numbers])


def _numbers(words: str, whole: bool) -> list[Any]:
    try:
        found = [(int if whole else float)(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        kind = "token ids" if whole else "numbers"
        raise BadInput(f"--input '{words}': this run takes {kind}; for example: --input 0,1,0") from error
    if not all(map(math.isfinite, found)):
        raise BadInput(f"--input '{words}': its numbers must be finite")
    return found


# ---- what is answered -----------------------------------------------------------------------------------------------


def told(outcome: Intervened, inputs: Tensor, data: StepData, top: int) -> dict[str, Any]:
    """Predictions of the target, the base and the edited model, and how far they lie apart, as JSON values."""
    sides = {name: side[0].detach().double() for name, side in outcome._asdict().items()}
    if inputs.is_floating_point():
        columns = zip(*(side.flatten().tolist() for side in sides.values()), strict=True)
        return {"outputs": [{"output": k, **dict(zip(sides, row, strict=True))} for k, row in enumerate(columns)]}
    tokens, chances = inputs[0].tolist(), {name: side.log_softmax(-1) for name, side in sides.items()}
    kl = {f"kl_{name}": divergence(chances["target"], chances[name]).tolist() for name in ("base", "edited")}
    likely = {name: _likely(side, data, top) for name, side in chances.items()}
    positions = [
        {"pos": pos, "token": word, "token_id": token}
        | {name: of[pos] for name, of in likely.items()}
        | {name: of[pos] for name, of in kl.items()}
        for pos, (word, token) in enumerate(zip(data.names(tokens), tokens, strict=True))
    ]
    return {"positions": positions}


def divergence(target: Tensor, other: Tensor) -> Tensor:
    """KL(target ‖ other) [pos] of logarithms of probabilities [pos, vocab]."""
    return (target.exp() * (target - other)).sum(-1)


def _likely(chances: Tensor, data: StepData, top: int) -> list[list[dict[str, Any]]]:
    """At every position, the likeliest tokens."""
    best = chances.topk(min(top, chances.shape[-1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    return [
        [
            {"token": word, "token_id": token, "probability": p}
            for word, token, p in zip(data.names(ids), ids, chance, strict=True)
        ]
        for ids, chance in rows
    ]


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The answer as a table."""
    sides = ["target", "edited"] if facts["base"] == "unmasked" else ["target", "base", "edited"]
    if "outputs" in facts:
        yield f"{'output':>6}" + "".join(f"{side:>12}" for side in sides)
        for row in facts["outputs"]:
            yield f"{row['output']:>6}" + "".join(f"{row[side]:>12.5f}" for side in sides)
        return
    rows = [[_shown(row, side) for side in sides] for row in facts["positions"]]
    widths = [max(len(side), *(len(row[k]) for row in rows)) for k, side in enumerate(sides)]
    head = "  ".join(f"{side:<{width}}" for side, width in zip(sides, widths, strict=True))
    yield f"{'pos':>4}  {'token':<12}  {head}  {'KL base' if 'base' in sides else '':>9}{'KL edited':>11}".rstrip()
    for row, cells in zip(facts["positions"], rows, strict=True):
        words = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        base = f"{row['kl_base']:>9.4f}" if "base" in sides else f"{'':>9}"
        yield f"{row['pos']:>4}  {_plain(row['token']):<12}  {words}  {base}{row['kl_edited']:>11.4f}"


def _shown(row: dict[str, Any], side: str) -> str:
    return "  ".join(f"{_plain(held['token'])} {held['probability']:.2f}" for held in row[side])


def _plain(token: str) -> str:
    """A token on one line, its blanks visible."""
    return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)
