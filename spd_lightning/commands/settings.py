"""`VERB --help X`: the settings of the model, the data, the trainer, or a public class."""

from collections.abc import Sequence

from spd_lightning.commands import loading


def main(argv: Sequence[str]) -> None:
    """Print the settings that the last word names, with their defaults."""
    with loading.trainer():
        from spd_lightning.training.parsing import settings_of

        print(settings_of(argv[-1]), end="")
