"""The prompts of a harvest, in the order and with the names by which a person looks for them."""

import unicodedata
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

import polars as pl

from spd_lightning import labels
from spd_lightning.errors import BadInput
from spd_lightning.store import Store

ALL_PROBES = 0
"""The id that stands for all probes of a harvest together; hashes of prompts are anything else."""


TEXT_SOURCES = ("given ", "file ", "validation ")
"""How the sources of prompts begin that `Text` makes."""


def probes(store: Store) -> pl.DataFrame:
    """The prompts that show one thing each."""
    return store.collect(store.scan("prompts").filter(pl.col("split") == "probe"))


def prompt_list(store: Store) -> pl.DataFrame:
    """All prompts with a readable label: columns prompt_id, label, split; probes first, then by
    number in `source`.
    """
    number = pl.col("source").str.extract(r"(\d+)").cast(pl.UInt64, strict=False)
    order = [
        pl.col("split") != "probe",
        pl.col("split"),
        number,
        pl.col("source"),
        pl.col("prompt_id"),
    ]
    prompts = store.collect(store.scan("prompts").sort(order, nulls_last=True))
    labels = [prompt_label(row) for row in prompts.iter_rows(named=True)]
    return prompts.select(
        "prompt_id", label=pl.Series("label", labels, dtype=pl.String), split="split"
    )


def graph_list(store: Store) -> pl.DataFrame:
    """List the graphs of a harvest: for probes that are vectors, all of them together first; then
    every prompt.
    """
    listed = prompt_list(store)
    count = int((listed["split"] == "probe").sum())
    if count < 2 or store.manifest["kind"] != "vectors":
        return listed
    together = {"prompt_id": [ALL_PROBES], "label": [together_label(count)], "split": ["probe"]}
    return pl.concat([pl.DataFrame(together, schema=listed.schema), listed])


def find_prompt(store: Store, asked: str) -> int:
    """Return the prompt that a person means: by its id, its number in `graph_list`, its source, or
    a part of its text.

    Raises:
        BadInput: no prompt matches, or several do.
    """
    listed = graph_list(store)
    ids = listed["prompt_id"].to_list()
    if asked.isdecimal() and len(asked) <= 20:
        number = int(asked)
        if number in ids:
            return number
        if number < len(ids):
            return ids[number]
    rows = store.collect(store.scan("prompts")).to_dicts()
    names = {row["prompt_id"]: prompt_label(row, most=10**6) for row in rows}
    keys = {row["prompt_id"]: [search_key(name) for name in _names(row)] for row in rows}
    wanted = search_key(asked)
    order = [one for one in ids if one in keys]  # without the entry that stands for all probes
    exact = [one for one in order if wanted in keys[one]]
    if wanted and exact:
        return exact[0]
    by_text = (
        bool(wanted) and not asked.isdecimal()
    )  # a number that is not a prompt would be found in many values
    matches = [one for one in order if by_text and any(wanted in key for key in keys[one])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = _numbered(matches[:MOST_LISTED], ids, names)
        more = f" and {len(matches) - MOST_LISTED} more" if len(matches) > MOST_LISTED else ""
        raise BadInput(
            f"prompt '{asked[:80]}': {len(matches)} contain it, {shown}{more}; write more of it, "
            "or a number"
        )
    closest = sorted(order, key=lambda one: -_resemblance(wanted[:200], search_key(names[one])))[:3]
    raise BadInput(
        f"prompt '{asked[:80]}': not in harvest '{store.path}', where numbers go to "
        f"{len(ids) - 1}; the nearest are "
        f"{_numbered(closest, ids, names)}"
    )


MOST_LISTED = 10
"""Prompts that an error message lists."""


def _numbered(chosen: list[int], ids: list[int], names: Mapping[int, str]) -> str:
    """Prompts by number and beginning, as a list in one line."""
    shown = [names[one] if len(names[one]) <= 60 else f"{names[one][:59]}…" for one in chosen]
    return "; ".join(f"{ids.index(one)} '{name}'" for one, name in zip(chosen, shown, strict=True))


def _resemblance(wanted: str, name: str) -> float:
    """Return how similar a prompt's name is to the wanted text, from 0 to 2.

    It is the share of the wanted text's runs of three characters that the name contains, plus the
    similarity of the two beginnings.
    """
    starts = range(max(1, len(wanted) - 2))
    runs = {wanted[start : start + 3] for start in starts}
    contained = sum(run in name for run in runs)
    share = contained / len(runs)

    beginning = name[: len(wanted) + 1]
    similarity = SequenceMatcher(None, wanted, beginning).ratio()
    return share + similarity


def together_label(count: int) -> str:
    """Return the label of all probes together."""
    return f"all {count} probes together"


def _names(prompt: Mapping[str, Any]) -> tuple[str, str, str]:
    """Everything that a person may call a prompt: its source, its text, its label."""
    return prompt["source"], prompt_text(prompt), prompt_label(prompt, most=10**6)


def prompt_text(prompt: Mapping[str, Any]) -> str:
    """Return the text of a row of the table `prompts`, with its blanks; of vectors, the features
    with a blank between.

    The tokens of a text bring their own blanks, and bytes of one character that are several tokens
    become that character again. Token ids without a text are listed with a blank between.
    """
    tokens = prompt["tokens"]
    of_text = prompt["source"].startswith(TEXT_SOURCES)
    bring_blanks = of_text or any(" " in token or labels.is_bytes(token) for token in tokens)
    return labels.joined(tokens) if bring_blanks else " ".join(tokens)


def search_key(text: str) -> str:
    """Return the form in which texts are compared when a person looks for one.

    Tokenizers drop or add blanks, fold case and compose characters before they make tokens. Two
    texts with the same key differ in nothing else, so that a prompt is found by the text that was
    given. To find prompts that contain some words, look for `search_key(words) in
    search_key(prompt_text(row))`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(unicodedata.normalize("NFKC", folded).split())


def prompt_label(prompt: Mapping[str, Any], most: int = 80) -> str:
    """Return the label of a row of the table `prompts`.

    A probe of one feature is "feature 3 = 0.75"; other vectors go by their source and non-zero
    features; a text by its source and its first `most` characters, each run of blanks as one.
    """
    source: str = prompt["source"]
    tokens: list[str] = prompt["tokens"]
    if len(tokens) == 1 and source.startswith("feature ") and "=" in tokens[0]:
        return f"{source} = {tokens[0].partition('=')[2]}"
    text = " ".join(prompt_text(prompt).split()) or ("(blank)" if tokens else "no active feature")
    return f"{source} · {text if len(text) <= most else text[:most] + '…'}"
