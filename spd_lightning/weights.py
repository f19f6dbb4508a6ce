"""weights: which component can drive which by the weights of a run alone, as one Parquet file; no prompt is run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from spd_lightning import runs
from spd_lightning.errors import BadInput, Options
from spd_lightning.harvest.weights import AT_LEAST, weight_table
from spd_lightning.training.checkpoint import load_decomposition


def weights(words: Sequence[str]) -> None:
    """Writes the strongest weights between the components of a finished run."""
    asked = _asked(words)
    found = runs.find(asked.run)
    model = load_decomposition(found.path).model
    table = weight_table(model, asked.at_least, lambda groups: tqdm(groups, "weights", unit=" targets", leave=False))
    with runs.write_whole(asked.to) as temporary:
        table.write_parquet(temporary)
    print(f"weights: {asked.to}    {len(table):,} rows, at least {asked.at_least:g} of the largest into their target")


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = Options("weights", f"for example: weights stories-2L --at_least {AT_LEAST} --to weights.parquet")
    parser.add_argument("run")
    parser.add_argument("--at_least", type=float, default=AT_LEAST)
    parser.add_argument("--to", type=Path, default=Path("weights.parquet"))
    asked = parser.parse_args(list(words))
    if not 0 <= asked.at_least <= 1:
        raise BadInput(f"--at_least {asked.at_least:g}: it is a share; take one from 0 to 1, for example {AT_LEAST}")
    if asked.to.suffix != ".parquet":
        raise BadInput(f"--to '{asked.to}': not a kind of file that is written; end it in .parquet")
    if not asked.to.parent.is_dir():
        raise BadInput(f"--to '{asked.to}': there is no folder '{asked.to.parent}'; make it first")
    return asked
