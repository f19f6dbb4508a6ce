"""The prompts of a harvest, with readable labels, in the order in which people look for them."""

import unicodedata
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

import polars as pl

from spd_lightning import labels
from spd_lightning.errors import BadInput
from spd_lightning.store import Store

ALL_PROBES = 0
"""The id that means all probes of a harvest together; no hash of a prompt is 0."""

TEXT_SOURCES = ("given ", "file ", "validation ", "training ")
"""The first words of the sources of prompts that come from the data module `Text`."""

MOST_LISTED = 10
"""The number of prompts that an error message lists."""


def probes(store: Store) -> pl.DataFrame:
    """Return the prompts that show one thing each."""
    is_probe = pl.col("split") == "probe"
    prompts = store.scan("prompts").filter(is_probe)
    return store.collect(prompts)


def prompt_list(store: Store) -> pl.DataFrame:
    """List all prompts with readable labels: columns prompt_id, label, split.

    Probes come first. Within a split, prompts are ordered by the number in their `source`.
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
    names = [prompt_label(row) for row in prompts.iter_rows(named=True)]
    return prompts.select(
        "prompt_id", label=pl.Series("label", names, dtype=pl.String), split="split"
    )


def graph_list(store: Store) -> pl.DataFrame:
    """List the graphs of a harvest: one for every prompt.

    If the probes are vectors, a graph of all probes together comes first.
    """
    prompts = prompt_list(store)
    probes = prompts["split"] == "probe"
    count = int(probes.sum())
    if count < 2 or store.manifest["kind"] != "vectors":
        return prompts
    together = {"prompt_id": [ALL_PROBES], "label": [together_label(count)], "split": ["probe"]}
    first = pl.DataFrame(together, schema=prompts.schema)
    return pl.concat([first, prompts])


def find_prompt(store: Store, name: str) -> int:
    """Return the prompt that a user names.

    A prompt can be named by its id, its number in `graph_list`, its source, or part of its text.

    Raises:
        BadInput: no prompt matches, or several do.
    """
    ids = graph_list(store)["prompt_id"].to_list()
    by_number = _prompt_by_number(ids, name)
    if by_number is not None:
        return by_number

    rows = store.collect(store.scan("prompts")).to_dicts()
    full_labels = {row["prompt_id"]: prompt_label(row, most=10**6) for row in rows}
    keys = {row["prompt_id"]: _search_keys(row) for row in rows}
    wanted = search_key(name)
    prompts = [prompt for prompt in ids if prompt in keys]  # without the entry for all probes
    exact = [prompt for prompt in prompts if wanted in keys[prompt]]
    if wanted and exact:
        return exact[0]

    # A number that is not a prompt would be found in many values, so it is not searched for.
    matches: list[int] = []
    if wanted and not name.isdecimal():
        matches = [prompt for prompt in prompts if _contains(keys[prompt], wanted)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = _numbered(matches[:MOST_LISTED], ids, full_labels)
        unlisted = len(matches) - MOST_LISTED
        more = f" and {unlisted} more" if unlisted > 0 else ""
        raise BadInput(
            f"prompt '{name[:80]}': {len(matches)} prompts contain it, {listed}{more}; give more "
            "of the text, or a number"
        )
    closest = _closest(wanted, prompts, full_labels)
    raise BadInput(
        f"prompt '{name[:80]}': not in harvest '{store.path}', whose prompts have the numbers 0 "
        f"to {len(ids) - 1}; the nearest are {_numbered(closest, ids, full_labels)}"
    )


def _contains(keys: list[str], wanted: str) -> bool:
    return any(wanted in key for key in keys)


def _closest(wanted: str, prompts: list[int], names: Mapping[int, str]) -> list[int]:
    """Return the three prompts whose names resemble the wanted text most."""
    beginning = wanted[:200]

    def distance(prompt: int) -> float:
        name = names[prompt]
        key = search_key(name)
        return -_resemblance(beginning, key)

    ranked = sorted(prompts, key=distance)
    return ranked[:3]


def _prompt_by_number(ids: list[int], name: str) -> int | None:
    """Return the prompt with this id or number; None if there is no such prompt."""
    if not name.isdecimal() or len(name) > 20:
        return None
    number = int(name)
    if number in ids:
        return number
    if number < len(ids):
        return ids[number]
    return None


def _numbered(chosen: list[int], ids: list[int], names: Mapping[int, str]) -> str:
    """List prompts on one line, each as its number and the beginning of its name."""
    entries: list[str] = []
    for prompt in chosen:
        number = ids.index(prompt)
        name = names[prompt]
        if len(name) > 60:
            beginning = name[:59]
            name = f"{beginning}…"
        entry = f"{number} '{name}'"
        entries.append(entry)
    return "; ".join(entries)


def _resemblance(wanted: str, name: str) -> float:
    """Return how similar a prompt's name is to the wanted text, from 0 to 2.

    It is the share of the wanted text's runs of three characters that the name contains, plus the
    similarity of the two beginnings.
    """
    count = max(1, len(wanted) - 2)  # a text of one or two characters is a run by itself
    runs = {wanted[start : start + 3] for start in range(count)}
    contained = sum(run in name for run in runs)
    share = contained / len(runs)

    length = len(wanted) + 1
    beginning = name[:length]
    matcher = SequenceMatcher(None, wanted, beginning)
    return share + matcher.ratio()


def together_label(count: int) -> str:
    """Return the label of all probes together."""
    return f"all {count} probes together"


def _search_keys(prompt: Mapping[str, Any]) -> list[str]:
    """Return the search keys of a prompt's source, text and label."""
    names = [prompt["source"], prompt_text(prompt), prompt_label(prompt, most=10**6)]
    return [search_key(name) for name in names]


def prompt_text(prompt: Mapping[str, Any]) -> str:
    """Return the text of a row of the table `prompts`, with its spaces.

    The tokens of a text contain their spaces, and a character whose bytes are several tokens
    becomes one character again. Token ids without a text, and the features of a vector, are joined
    by spaces.
    """
    tokens = prompt["tokens"]
    from_text = prompt["source"].startswith(TEXT_SOURCES)
    contain_spaces = from_text or any(" " in token or labels.is_bytes(token) for token in tokens)
    if contain_spaces:
        return labels.joined(tokens)
    return " ".join(tokens)


def search_key(text: str) -> str:
    """Return the form in which texts are compared in a search.

    Tokenizers drop or add spaces, fold case and compose characters before they make tokens. Two
    texts with the same key differ in nothing else, so a prompt is found by the text that was given.
    To find prompts that contain some words, look for `search_key(words) in
    search_key(prompt_text(row))`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = unicodedata.normalize("NFKC", folded).split()
    return "".join(words)


def prompt_label(prompt: Mapping[str, Any], most: int = 80) -> str:
    """Return the label of a row of the table `prompts`.

    A probe of one feature is "feature 3 = 0.75". Other vectors are labeled by their source and
    non-zero features. A text is labeled by its source and its first `most` characters, with each
    run of spaces as one.
    """
    source: str = prompt["source"]
    tokens: list[str] = prompt["tokens"]
    if len(tokens) == 1 and source.startswith("feature "):
        _, is_vector, value = tokens[0].partition("=")  # for example, "f3=0.75"
        if is_vector:
            return f"{source} = {value}"
    words = prompt_text(prompt).split()
    text = " ".join(words)
    if not text:
        text = "(blank)" if tokens else "no active feature"
    if len(text) > most:
        text = f"{text[:most]}…"
    return f"{source} · {text}"
