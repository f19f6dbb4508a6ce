"""weights: the weights between the components of a run, as a Parquet file; no prompt is run."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import runs
from spd_lightning.commands import loading, options
from spd_lightning.errors import BadInput, command
from spd_lightning.runs.kind import kind


def main(argv: Sequence[str]) -> None:
    """Write the largest weights between the components of a finished run."""
    arguments = options.read("weights", argv)
    path = Path(arguments.to)
    if path.suffix != ".parquet":
        raise BadInput(f"--to '{path}': unknown file type; end it in .parquet")
    if not path.parent.is_dir():
        raise BadInput(f"--to '{path}': folder '{path.parent}' does not exist; create it first")
    run = runs.find(arguments.run)
    run_kind = kind(run)
    if not run_kind.decoder:
        model = run_kind.target
        if run_kind.model_type:
            model = f"{model} ({run_kind.model_type})"
        raise BadInput(
            f"weights: run '{run_kind.name}': {model} is not a supported decoder; "
            "weights alone give edges only in decoders: use a run of our Decoder, or of a GPT-2, "
            f"Llama, Mistral or Qwen2 model; for example: {command('fit --config stories-2L.yaml')}"
        )
    with loading.trainer():
        _write(run, path, arguments.min_share)


def _write(run: runs.Run, path: Path, min_share: float) -> None:
    from tqdm.auto import tqdm

    from spd_lightning.harvest.weights import weight_table
    from spd_lightning.training.decompose import Decomposition

    def with_progress(groups: Sequence[Any]) -> Iterable[Any]:
        return tqdm(groups, "weights", unit=" targets", leave=False)

    model = Decomposition.from_pretrained(run.path).model
    table = weight_table(model, min_share, with_progress)
    with runs.write_whole(path) as temporary:
        table.write_parquet(temporary)
    rows = f"{len(table):,} rows, each at least {min_share:g} of the largest into its target"
    print(f"weights: {path}    {rows}")
