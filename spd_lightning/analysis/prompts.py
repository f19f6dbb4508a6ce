"""The prompts of a harvest, in the order and with the names by which a person looks for them."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.store import Store

ALL_PROBES = 0
"""The id that stands for all probes of a harvest together; hashes of prompts are anything else."""


def probes(store: Store) -> pl.DataFrame:
    """The prompts that show one thing each."""
    return store.collect(store.scan("prompts").filter(pl.col("split") == "probe"))


def prompt_list(store: Store) -> pl.DataFrame:
    """All prompts with a readable label: columns prompt_id, label, split; probes first, then by number in `source`."""
    number = pl.col("source").str.extract(r"(\d+)").cast(pl.UInt64, strict=False)
    order = [pl.col("split") != "probe", pl.col("split"), number, pl.col("source"), pl.col("prompt_id")]
    prompts = store.collect(store.scan("prompts").sort(order, nulls_last=True))
    labels = [prompt_label(row) for row in prompts.iter_rows(named=True)]
    return prompts.select("prompt_id", label=pl.Series("label", labels, dtype=pl.String), split="split")


def graph_list(store: Store) -> pl.DataFrame:
    """What there is a graph of: where probes are vectors, all of them together first; then every prompt."""
    listed = prompt_list(store)
    count = int((listed["split"] == "probe").sum())
    if count < 2 or store.manifest["kind"] != "vectors":
        return listed
    together = {"prompt_id": [ALL_PROBES], "label": [together_label(count)], "split": ["probe"]}
    return pl.concat([pl.DataFrame(together, schema=listed.schema), listed])


def find_prompt(store: Store, asked: str) -> int:
    """Return the prompt that a person means: by its id, its number in `graph_list`, its source, or a part of its text.

    Raises:
        BadInput: no prompt matches, or several do.
    """
    listed = graph_list(store)
    ids = listed["prompt_id"].to_list()
    if asked.isdecimal() and int(asked) in ids:
        return int(asked)
    if asked.isdecimal() and int(asked) < len(ids):
        return ids[int(asked)]
    rows = store.collect(store.scan("prompts")).to_dicts()
    sources = {row["prompt_id"]: row["source"] for row in rows}
    names = {row["prompt_id"]: prompt_label(row, most=10**6) for row in rows}
    texts = {one: name.partition(" · ")[2] or name for one, name in names.items()}
    wanted = " ".join(asked.split())
    exact = [one for one in names if wanted in (sources[one], texts[one])]
    if exact:
        return exact[0]
    order = [one for one in ids if one in names]
    matches = [one for one in order if wanted and wanted in names[one]]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = _numbered(matches[:MOST_LISTED], ids, names)
        more = f" and {len(matches) - MOST_LISTED} more" if len(matches) > MOST_LISTED else ""
        raise BadInput(
            f"prompt '{asked[:80]}': {len(matches)} contain it, {shown}{more}; write more of it, or a number"
        )
    nearest = sorted(order, key=lambda one: -_resemblance(wanted[:200], names[one]))[:3]
    raise BadInput(
        f"prompt '{asked[:80]}': not in harvest '{store.path}', where numbers go to {len(ids) - 1}; the nearest are "
        f"{_numbered(nearest, ids, names)}"
    )


MOST_LISTED = 10
"""Prompts that an error message lists."""


def _numbered(chosen: list[int], ids: list[int], names: Mapping[int, str]) -> str:
    """Prompts by number and beginning, as a list in one line."""
    shown = [names[one] if len(names[one]) <= 60 else f"{names[one][:59]}…" for one in chosen]
    return "; ".join(f"{ids.index(one)} '{name}'" for one, name in zip(chosen, shown, strict=True))


def _resemblance(wanted: str, text: str) -> float:
    """The share of the wanted text's runs of three characters that a text has too, whatever their case."""
    wanted, text = wanted.casefold(), text.casefold()
    runs = {wanted[start : start + 3] for start in range(max(1, len(wanted) - 2))}
    return sum(run in text for run in runs) / len(runs)


def together_label(count: int) -> str:
    """What all probes together are called."""
    return f"all {count} probes together"


def prompt_label(prompt: Mapping[str, Any], most: int = 80) -> str:
    """What a row of the table `prompts` is called.

    A probe of one feature is "feature 3 = 0.75"; other vectors go by their source and non-zero features; a text by its
    source and its first `most` characters, each run of blanks as one.
    """
    source, tokens = prompt["source"], prompt["tokens"]
    if len(tokens) == 1 and source.startswith("feature ") and "=" in tokens[0]:
        return f"{source} = {tokens[0].partition('=')[2]}"
    joint = "" if any(" " in token for token in tokens) else " "  # tokens of a text bring their own spaces
    text = " ".join(joint.join(tokens).split()) or ("(blank)" if tokens else "no active feature")
    return f"{source} · {text if len(text) <= most else text[:most] + '…'}"
