"""intervene: edits components of a finished run on a prompt, or on many, and prints predictions
next to the target's.

1. The words and the file of interventions are read, and checked against the run's files: all
   offenders at once.
2. The model is loaded, once; prompts become tokens, and are checked again, all of them.
3. Each intervention runs by itself.
"""

from __future__ import annotations  # outcomes are of a module that loads torch

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import config as configs
from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.commands.interventions import Row, each, rows_of
from spd_lightning.decomposition.names import place, within
from spd_lightning.errors import BadInput
from spd_lightning.runs.kind import Kind, kind

if TYPE_CHECKING:
    from torch import Tensor

    from spd_lightning.data.modules import StepData
    from spd_lightning.decomposition.intervention import Intervened
    from spd_lightning.training.decompose import Decomposition


def main(argv: Sequence[str]) -> None:
    """Run prompts through a run's model with and without edits; print a line a position, a table,
    or JSON.
    """
    asked = options.read("intervene", argv)
    rows = rows_of(asked)
    found = runs.find(asked.run)
    of = kind(found)
    each(rows, lambda number: _check(rows[number], of))
    with loading.trainer():
        _run(asked, rows, found.path)


def _run(asked: argparse.Namespace, rows: Sequence[Row], folder: Path) -> None:
    from spd_lightning.training.decompose import Decomposition

    module = Decomposition.from_pretrained(folder)
    data = _data(folder)
    prompts = each(rows, lambda number: _inputs(rows[number], asked.run, module, data))

    def answer(number: int) -> dict[str, Any]:
        row = rows[number]
        prompt = prompts[number]
        outcome = module.intervene(prompt, row.ablate, row.scale, row.set, row.keep, row.base)
        if not outcome.edited.isfinite().all():
            raise BadInput("edits: they make the outputs infinite or NaN; use smaller values")
        facts = {
            "run": folder.resolve().name,
            "base": row.base,
            **told(outcome, prompt, data, asked.top),
        }
        return {"line": row.line, "name": row.name, **facts} if row.line else facts

    answers = each(rows, answer)
    if asked.file is None:
        facts = answers[0]
        print(
            json.dumps(facts, indent=1, ensure_ascii=False)
            if asked.json
            else "\n".join(lines(facts))
        )
    elif asked.json:
        print("\n".join(json.dumps(facts, ensure_ascii=False) for facts in answers))
    else:
        print("\n".join(table(answers)))


# ---- what is checked -----------------------------------------------------------------------------


def _check(row: Row, of: Kind) -> None:
    """Check a row against what is known of its run without loading it.

    Raises:
        BadInput: the run takes no texts, or has no such site or component.
    """
    if row.text is not None and not of.takes_text:
        raise BadInput(
            f"--text: run '{of.name}' takes no texts; give --input, numbers with commas between"
        )
    if of.counts:
        for name in row.components:
            place(of.counts, name)


def _inputs(row: Row, run: str, module: Decomposition, data: StepData) -> Tensor:
    """Return the prompt [1, features] or [1, pos]."""
    import torch

    vocab, context = (getattr(module.network, name, None) for name in ("vocab", "context"))
    if row.text is not None:
        encode = getattr(data, "encode", None)
        if encode is None or vocab is None:
            raise BadInput(
                f"--text: run '{run}' takes no texts; give --input, numbers with commas between"
            )
        numbers = encode(row.text)
    else:
        numbers = _numbers(row.input, whole=vocab is not None)
    if not numbers:
        raise BadInput("prompt: it is empty; give at least one token")
    if vocab is not None:
        if outside := [token for token in numbers if not 0 <= token < vocab]:
            raise BadInput(
                f"prompt: token {outside[0]} is outside the target's vocabulary, which ends at "
                f"{vocab - 1}"
            )
        if context is not None and len(numbers) > context:
            raise BadInput(
                f"prompt: it has {len(numbers)} tokens, and the target's context holds {context}; "
                "shorten it"
            )
    for name in row.components:
        within(place(module.model.counts, name), 1 if vocab is None else len(numbers))
    prompt = torch.tensor([numbers])
    module.try_on(prompt)
    return prompt


LARGEST = 3e38
"""The largest number that single precision holds, rounded down."""


def _numbers(given: Any, whole: bool) -> list[Any]:
    """Return the numbers of a prompt that is given as a list or as words."""
    words = (
        given.replace(",", " ").split()
        if isinstance(given, str)
        else [str(number) for number in given]
    )
    shown = given if isinstance(given, str) else ",".join(words)
    try:
        found = [(int if whole else float)(word) for word in words]
    except ValueError as error:
        kind = "token ids" if whole else "numbers"
        raise BadInput(
            f"--input '{shown}': this run takes {kind}; for example: --input 0,1,0"
        ) from error
    if not all(abs(number) <= LARGEST for number in found):  # not so for NaN
        raise BadInput(f"--input '{shown}': its numbers must be finite")
    return found


def _data(folder: Path) -> StepData:
    """Return the data of a run, of which nothing is made before it is needed."""
    from spd_lightning.training.session import Settings

    if not (folder / "config.yaml").exists():
        raise BadInput(
            f"run '{folder}': no config.yaml in it, which says how texts become tokens; name "
            "another run"
        )
    runs.Run(folder).checked_config()
    return Settings(configs.load(str((folder / "config.yaml").resolve()))).built("data")


# ---- what is answered ----------------------------------------------------------------------------


def told(outcome: Intervened, inputs: Tensor, data: StepData, top: int) -> dict[str, Any]:
    """Predictions of the target, the base and the edited model, and how far they lie apart, as JSON
    values.
    """
    sides = {name: side[0].detach().double() for name, side in outcome._asdict().items()}
    if inputs.is_floating_point():
        columns = zip(*(side.flatten().tolist() for side in sides.values()), strict=True)
        return {
            "outputs": [
                {"output": k, **dict(zip(sides, row, strict=True))} for k, row in enumerate(columns)
            ]
        }
    tokens = inputs[0].tolist()
    chances = {name: side.log_softmax(-1) for name, side in sides.items()}
    kl = {
        f"kl_{name}": divergence(chances["target"], chances[name]).tolist()
        for name in ("base", "edited")
    }
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
    yield (
        f"{'pos':>4}  {'token':<12}  {head}  "
        f"{'KL base' if 'base' in sides else '':>9}{'KL edited':>11}"
    ).rstrip()
    for row, cells in zip(facts["positions"], rows, strict=True):
        words = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        base = f"{row['kl_base']:>9.4f}" if "base" in sides else f"{'':>9}"
        place = f"{row['pos']:>4}  {_plain(row['token']):<12}"
        yield f"{place}  {words}  {base}{row['kl_edited']:>11.4f}"


def _shown(row: dict[str, Any], side: str) -> str:
    return "  ".join(f"{_plain(held['token'])} {held['probability']:.2f}" for held in row[side])


def _plain(token: str) -> str:
    """A token on one line, its blanks visible."""
    return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)


def table(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the answers to many interventions as a table, a line each: the last position's, or the
    largest change.
    """
    rows = [_summary(facts) for facts in answers]
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    yield _line(heads, widths)
    for row in rows:
        yield _line(row.values(), widths)


def _summary(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one answer's line."""
    first = {"line": str(facts["line"]), "name": _plain(facts["name"]), "base": facts["base"]}
    if "outputs" in facts:
        moved = max(facts["outputs"], key=lambda row: abs(row["edited"] - row["target"]))
        changed = {side: f"{moved[side]:.5f}" for side in ("target", "edited")}
        return {**first, "output": str(moved["output"]), **changed}
    last = facts["positions"][-1]
    largest = max(row["kl_edited"] for row in facts["positions"])
    predicted = {side: _shown(last, side) for side in ("target", "edited")}
    return {
        **first,
        "after": _plain(last["token"]),
        **predicted,
        "KL": f"{last['kl_edited']:.4f}",
        "largest KL": f"{largest:.4f}",
    }


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
