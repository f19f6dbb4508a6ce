"""weights: which component can drive which by the weights of a run alone, as one Parquet file; no
prompt is run.
"""

from collections.abc import Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.errors import BadInput
from spd_lightning.runs.kind import kind


def main(argv: Sequence[str]) -> None:
    """Write the strongest weights between the components of a finished run."""
    asked = options.read("weights", argv)
    path = Path(asked.to)
    if path.suffix != ".parquet":
        raise BadInput(f"--to '{path}': not a kind of file that is written; end it in .parquet")
    if not path.parent.is_dir():
        raise BadInput(f"--to '{path}': there is no folder '{path.parent}'; make it first")
    found = runs.find(asked.run)
    if not (of := kind(found)).decoder:
        described = f"{of.target} ({of.model_type})" if of.model_type else of.target
        raise BadInput(
            f"weights: run '{of.name}': {described} is not a supported decoder; "
            "use a run of a GPT-2, Llama, Mistral or Qwen2 model on our decoder"
        )
    with loading.trainer():
        _write(found, path, asked.min_share)


def _write(found: runs.Run, path: Path, min_share: float) -> None:
    from tqdm.auto import tqdm

    from spd_lightning.harvest.weights import weight_table
    from spd_lightning.training.decompose import Decomposition

    model = Decomposition.from_pretrained(found.path).model
    table = weight_table(
        model, min_share, lambda groups: tqdm(groups, "weights", unit=" targets", leave=False)
    )
    with runs.write_whole(path) as temporary:
        table.write_parquet(temporary)
    print(
        f"weights: {path}    {len(table):,} rows, at least {min_share:g} of the largest into their "
        "target"
    )
