"""intervene: edit components of a finished run, and print predictions next to the target's.

1. Read the options and the file of interventions, and check them against the run's files. All wrong
   rows are reported together.
2. Load the model once. Turn the prompts into tokens, and check all of them again.
3. Run each intervention.
"""

from __future__ import annotations  # some types are of modules that load torch

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.commands.interventions import LARGEST, Row, each, rows_of
from spd_lightning.decomposition.names import check_within, parse_place
from spd_lightning.errors import BadInput
from spd_lightning.runs.kind import Kind, kind

if TYPE_CHECKING:
    from torch import Tensor

    from spd_lightning.data.modules import StepData
    from spd_lightning.decomposition.intervention import Intervened
    from spd_lightning.training.decompose import Decomposition


def main(argv: Sequence[str]) -> None:
    """Run prompts through a run's model with and without edits, and print both predictions."""
    arguments = options.read("intervene", argv)
    rows = rows_of(arguments)
    run = runs.find(arguments.run)
    run_kind = kind(run)

    def check(number: int) -> None:
        _check(rows[number], run_kind)

    each(rows, check)
    with loading.trainer():
        _run(arguments, rows, run.path)


def _run(arguments: argparse.Namespace, rows: Sequence[Row], folder: Path) -> None:
    from spd_lightning.training.decompose import Decomposition
    from spd_lightning.training.session import data_of

    module = Decomposition.from_pretrained(folder)
    data = data_of(folder)
    prompts = each(rows, lambda number: _inputs(rows[number], arguments.run, module, data))

    def answer(number: int) -> dict[str, Any]:
        row = rows[number]
        prompt = prompts[number]
        outcome = module.intervene(prompt, row.ablate, row.scale, row.set, row.keep, row.base)
        if not outcome.edited.isfinite().all():
            raise BadInput("edits: they make the outputs infinite or NaN; use smaller values")
        facts = {
            "run": folder.resolve().name,
            "base": row.base,
            **describe(outcome, prompt, data, arguments.top),
        }
        if row.line:
            facts = {"line": row.line, "name": row.name, **facts}
        return facts

    answers = each(rows, answer)
    if arguments.file is not None and arguments.json:
        lines = [json.dumps(facts, ensure_ascii=False) for facts in answers]
    elif arguments.file is not None:
        lines = table_of_rows(answers)
    elif arguments.json:
        lines = [json.dumps(answers[0], indent=1, ensure_ascii=False)]
    else:
        lines = table(answers[0])
    print("\n".join(lines))


# ---- checks --------------------------------------------------------------------------------------


def _check(row: Row, run_kind: Kind) -> None:
    """Check a row against everything that is known about its run without loading the model.

    Raises:
        BadInput: the run takes no texts, or has no such site or component.
    """
    if row.text is not None and not run_kind.takes_text:
        raise _no_texts(run_kind.name)
    if run_kind.counts:
        for name in row.components:
            parse_place(run_kind.counts, name)


def _no_texts(run: str) -> BadInput:
    return BadInput(
        f"--text: run '{run}' takes no texts; give --input, with numbers separated by commas"
    )


def _inputs(row: Row, run: str, module: Decomposition, data: StepData) -> Tensor:
    """Return the prompt, as features or as token ids, in a batch of one."""
    import torch

    from spd_lightning.data.modules import EncodesText
    from spd_lightning.targets.protocols import context_of, vocab_of

    vocab = vocab_of(module.network)
    context = context_of(module.network)
    if row.text is not None:
        if vocab is None or not isinstance(data, EncodesText):
            raise _no_texts(run)
        numbers = data.encode(row.text)
    else:
        numbers = _numbers(row.input, whole=vocab is not None)
    if not numbers:
        raise BadInput("prompt: it is empty; give at least one token")
    if vocab is not None:
        _check_tokens(numbers, vocab, context)
    positions = 1 if vocab is None else len(numbers)
    for name in row.components:
        check_within(parse_place(module.model.counts, name), positions)
    prompt = torch.tensor([numbers])  # [1, features] or [1, pos]
    module.try_on(prompt)
    return prompt


def _check_tokens(tokens: Sequence[int], vocab: int, context: int | None) -> None:
    """Raise BadInput if a token is not in the vocabulary, or the prompt exceeds the context."""
    outside = [token for token in tokens if not 0 <= token < vocab]
    if outside:
        raise BadInput(
            f"prompt: token {outside[0]} is outside the target's vocabulary, which ends at "
            f"{vocab - 1}"
        )
    if context is not None and len(tokens) > context:
        raise BadInput(
            f"prompt: it has {len(tokens)} tokens, and the target's context holds {context}; "
            "shorten it"
        )


def _numbers(prompt: Any, whole: bool) -> list[Any]:
    """Return the numbers of a prompt that is a list or text.

    Args:
        prompt: a list of numbers, or text with numbers separated by commas or blanks.
        whole: whether the numbers are token ids.
    """
    if isinstance(prompt, str):
        words = prompt.replace(",", " ").split()
        shown = prompt
    else:
        words = [str(number) for number in prompt]
        shown = ",".join(words)
    number_type = int if whole else float
    try:
        numbers = [number_type(word) for word in words]
    except ValueError as error:
        expected = "token ids" if whole else "numbers"
        raise BadInput(
            f"--input '{shown}': this run takes {expected}; for example: --input 0,1,0"
        ) from error
    if not all(abs(number) <= LARGEST for number in numbers):  # false for NaN, too
        raise BadInput(f"--input '{shown}': its numbers must be finite")
    return numbers


# ---- predictions ---------------------------------------------------------------------------------


def describe(outcome: Intervened, inputs: Tensor, data: StepData, top: int) -> dict[str, Any]:
    """Return the outputs of the target, the base and the edited model as JSON values.

    For logits, these are the `top` likeliest tokens at each position, and the divergence of each
    model from the target.
    """
    sides = {}
    for name, side in outcome._asdict().items():
        sides[name] = side[0].detach().double()
    if inputs.is_floating_point():
        return {"outputs": _outputs(sides)}

    log_probs = {}  # [pos, vocab] each
    columns = {}
    for name, logits in sides.items():
        log_probs[name] = logits.log_softmax(-1)
        columns[name] = _likeliest(log_probs[name], data, top)
    target = log_probs["target"]
    for name in ("base", "edited"):
        kl = divergence(target, log_probs[name])  # [pos]
        columns[f"kl_{name}"] = kl.tolist()

    positions = []
    tokens = inputs[0].tolist()
    words = data.names(tokens)
    for pos, (word, token) in enumerate(zip(words, tokens, strict=True)):
        values = {name: column[pos] for name, column in columns.items()}
        position = {"pos": pos, "token": word, "token_id": token}
        positions.append(position | values)
    return {"positions": positions}


def _outputs(sides: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return the value of every output in each model."""
    columns = [side.flatten().tolist() for side in sides.values()]
    outputs = []
    for number, values in enumerate(zip(*columns, strict=True)):
        named = dict(zip(sides, values, strict=True))
        output = {"output": number, **named}
        outputs.append(output)
    return outputs


def divergence(target: Tensor, other: Tensor) -> Tensor:
    """Return KL(target ‖ other) at every position, from log-probabilities [pos, vocab]."""
    probability = target.exp()
    difference = target - other
    terms = probability * difference
    return terms.sum(-1)


def _likeliest(log_probs: Tensor, data: StepData, top: int) -> list[list[dict[str, Any]]]:
    """Return the likeliest tokens at every position, from log-probabilities [pos, vocab]."""
    best = log_probs.topk(min(top, log_probs.shape[-1]), dim=-1)
    positions = []
    for tokens, probabilities in zip(
        best.indices.tolist(), best.values.exp().tolist(), strict=True
    ):
        named = zip(data.names(tokens), tokens, probabilities, strict=True)
        positions.append(
            [
                {"token": word, "token_id": token, "probability": probability}
                for word, token, probability in named
            ]
        )
    return positions


# ---- tables --------------------------------------------------------------------------------------


def table(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of one intervention: one per output, or one per position."""
    sides = ["target", "edited"]
    if facts["base"] != "unmasked":
        sides = ["target", "base", "edited"]
    if "outputs" in facts:
        outputs = facts["outputs"]
        return _table_of_outputs(outputs, sides)
    positions = facts["positions"]
    return _table_of_positions(positions, sides)


def _table_of_outputs(rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> Iterator[str]:
    yield f"{'output':>6}" + "".join(f"{side:>12}" for side in sides)
    for row in rows:
        values = "".join(f"{row[side]:>12.5f}" for side in sides)
        yield f"{row['output']:>6}{values}"


def _table_of_positions(rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> Iterator[str]:
    cells = [[_likely_words(row[side]) for side in sides] for row in rows]
    widths = _widths([sides, *cells])
    with_base = "base" in sides
    heads = _padded(sides, widths)
    kl_base = "KL base" if with_base else ""
    yield f"{'pos':>4}  {'token':<12}  {heads}  {kl_base:>9}{'KL edited':>11}"
    for row, words in zip(rows, cells, strict=True):
        kl_base = f"{row['kl_base']:.4f}" if with_base else ""
        position = f"{row['pos']:>4}  {_visible(row['token']):<12}"
        yield f"{position}  {_padded(words, widths)}  {kl_base:>9}{row['kl_edited']:>11.4f}"


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """Return the width of every column."""
    columns = zip(*rows, strict=True)
    return [max(map(len, column)) for column in columns]


def _padded(cells: Iterable[str], widths: Sequence[int]) -> str:
    """Return cells as a line in which every cell has the width of its column."""
    padded = []
    for cell, width in zip(cells, widths, strict=True):
        filled = cell.ljust(width)
        padded.append(filled)
    return "  ".join(padded)


def _likely_words(tokens: Iterable[Mapping[str, Any]]) -> str:
    """Return the likeliest tokens with their probabilities."""
    words = []
    for token in tokens:
        text = _visible(token["token"])
        probability = token["probability"]
        word = f"{text} {probability:.2f}"
        words.append(word)
    return "  ".join(words)


def _visible(token: str) -> str:
    """Return a token on one line, with its blanks visible."""
    return "".join(map(_visible_character, token))


def _visible_character(character: str) -> str:
    if character == " ":
        return "·"
    if character.isprintable():
        return character
    return repr(character)[1:-1]


def table_of_rows(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of many interventions, one line each.

    A line shows the last position, or the output that changed most.
    """
    rows = [_summary(facts) for facts in answers]
    heads = list(rows[0])
    cells = [heads, *(list(row.values()) for row in rows)]
    widths = _widths(cells)
    for line in cells:
        yield _padded(line, widths).rstrip()


def _summary(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of one intervention's line."""
    cells = {"line": str(facts["line"]), "name": _visible(facts["name"]), "base": facts["base"]}
    if "outputs" in facts:

        def change(row: Mapping[str, Any]) -> float:
            return abs(row["edited"] - row["target"])

        changed = max(facts["outputs"], key=change)
        cells["output"] = str(changed["output"])
        for side in ("target", "edited"):
            cells[side] = f"{changed[side]:.5f}"
        return cells
    last = facts["positions"][-1]
    largest = max(row["kl_edited"] for row in facts["positions"])
    cells["after"] = _visible(last["token"])
    for side in ("target", "edited"):
        cells[side] = _likely_words(last[side])
    cells["KL"] = f"{last['kl_edited']:.4f}"
    cells["largest KL"] = f"{largest:.4f}"
    return cells
