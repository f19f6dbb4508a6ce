"""The verbs of the command line: one table, from which `options` reads their words and prints their
help.

Not here: what a verb does. Each verb is a module of this package.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROGRAM = "python -m spd_lightning"


# ---- kinds of values -----------------------------------------------------------------------------


LARGEST = 2**31 - 1
"""The largest whole number that an option takes."""


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `LARGEST`."""

    def read_whole(word: str) -> int:
        shown = word if len(word) <= 20 else f"{word[:17]}..."
        is_whole = word.isascii() and word.isdecimal()
        if is_whole and (len(word) > len(str(LARGEST)) or int(word) > LARGEST):
            raise argparse.ArgumentTypeError(f"'{shown}': too large")
        if not is_whole or int(word) < least:
            raise argparse.ArgumentTypeError(f"'{shown}': not a number from {least} up")
        return int(word)

    return read_whole


def share(word: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{word}': a share; take a number from 0 to 1")
    return value


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One argument or option of a verb.

    Attributes:
        name: `--option`, or the name of an argument in capitals.
        help: one sentence or less, without a period.
        value: what its value is called; None for a switch that takes none.
        default: its value if omitted.
        kind: reads the value.
        choices: the values there are, where they can be counted.
        many: whether it takes several values, and may be given more than once.
        needed: whether it must be given.
        example: a value it could take.
        passed: whether it is only shown here, and read elsewhere.
    """

    name: str
    help: str
    value: str | None = None
    default: Any = None
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    many: bool = False
    needed: bool = False
    example: str = ""
    passed: bool = False

    @property
    def dest(self) -> str:
        """Return the attribute that holds its value after reading."""
        return self.name.lstrip("-").lower()

    @property
    def shown(self) -> str:
        """Return its name with its value, as help shows it."""
        return self.name if self.value is None else f"{self.name} {self.value}"


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: what is typed.
        brief: its most common words, for the list of all verbs.
        purpose: one sentence.
        example: the words of a command that works.
        options: its arguments in order, and its options.
        settings: whether any setting of a config may be given as `--KEY VALUE`.
        notes: more that its help should say.
        module: the module of `commands` whose `main` it calls; that of its name if empty.
    """

    name: str
    brief: str
    purpose: str
    example: str
    options: tuple[Option, ...] = ()
    settings: bool = False
    notes: tuple[str, ...] = ()
    module: str = ""

    @property
    def arguments(self) -> list[Option]:
        """Return the options that are given by their place."""
        return [option for option in self.options if not option.name.startswith("-")]


RUN = Option(
    "RUN", "a run's name, its folder, or a tracker's reference; 'runs' lists the names", needed=True
)
CONFIG = Option(
    "--config",
    "a config: a path, or a name that 'list' shows; several are merged, later ones win (callbacks "
    "add up)",
    "NAME",
    many=True,
    needed=True,
    example="tms.yaml",
)
CHOSEN = (
    CONFIG,
    Option(
        "--run", "the run's name (default: the name of the first config)", "NAME", example="mine"
    ),
    Option(
        "--KEY",
        "any setting, as --trainer.max_steps 500 or --seed_everything 7",
        "VALUE",
        passed=True,
    ),
    Option("--print_config", "print the merged settings without running anything", passed=True),
)
ALLOW = Option(
    "--allow_classes", "let configs and files name classes of this package", "PACKAGE", passed=True
)
DEBUG = Option("--debug", "show where an error came from", passed=True)
HELP = Option("--help", "print this page", passed=True)
SETTINGS = (
    (
        f"All settings with their defaults: {PROGRAM} fit --help model, or --help data, --help "
        "trainer,"
    ),
    "--help reconstruction, --help CLASS (for example --help PromptGraphs).",
)

FORMATS = (
    (
        "Components are named layer:pos:component (pos a number or a range, 3-5), or "
        "layer:component at all positions."
    ),
    "A file of interventions has one row each, as JSON lines (.jsonl) or a YAML list (.yaml):",
    '  {"text": "Mia went", "ablate": ["h.0.mlp.c_fc:5"], "scale": {"h.1.attn.o_proj:3:7": 2}}',
    (
        "Its keys: text or input; ablate and keep (lists), scale and set (maps), base, name (a "
        "label of yours)."
    ),
)

_ALL = (
    Verb(
        "fit",
        "--config tms.yaml",
        "Train the target if need be, decompose it, and leave a run.",
        "fit --config tms.yaml",
        CHOSEN,
        True,
        SETTINGS,
    ),
    Verb(
        "plan",
        "--config tms.yaml",
        "Print what a fit will take: parameters, memory, FLOPs, hours.",
        "plan --config stories-2L.yaml --device a100",
        (
            *CHOSEN,
            Option(
                "--device",
                "the machine to plan for, 'this' for the one at hand (default: all of them)",
                "NAME",
                choices=("this", "h200", "h100", "a100", "rtx4090", "t4", "laptop"),
                example="a100",
            ),
        ),
        True,
        SETTINGS,
    ),
    Verb(
        "sites",
        "TARGET",
        "List the maps of a target that can be decomposed; write a first config for it.",
        "sites targets/tms_5-2",
        (
            Option(
                "TARGET",
                "hf:FOLDER or hf:NAME (a HuggingFace model as it is), decoder:FOLDER (on our "
                "decoder), or a config "
                "that trains a target",
                needed=True,
            ),
            Option(
                "--write", "write a first config that decomposes it", "FILE", example="mine.yaml"
            ),
            Option("--all", "list every map by itself, not groups of alike ones"),
            Option("--json", "print JSON"),
        ),
    ),
    Verb(
        "predict",
        "--config tms.yaml",
        "Run the harvesters of a config on the newest run of that name: graphs, importances, sums, "
        "as Parquet tables.",
        "predict --config tms.yaml --config frozen.yaml",
        CHOSEN,
        True,
        SETTINGS,
    ),
    Verb(
        "validate",
        "--config tms.yaml",
        "Evaluate a finished run again and print its figures.",
        "validate --config tms.yaml",
        CHOSEN,
        True,
        SETTINGS,
    ),
    Verb(
        "intervene",
        'RUN --text "..."',
        "Ablate, scale or set components; print predictions next to the target's.",
        "intervene tms --input 0,0.75,0,0,0 --ablate linear1:3",
        (
            RUN,
            Option("--text", "the prompt", "TEXT", example="Mia"),
            Option(
                "--input",
                "the prompt as numbers with commas: features, or token ids",
                "NUMBERS",
                example="0,1",
            ),
            Option(
                "--file", "many interventions, one a row (see below)", "FILE", example="edits.jsonl"
            ),
            Option(
                "--ablate", "components to switch off", "NAME", many=True, example="h.0.mlp.c_fc:5"
            ),
            Option(
                "--scale", "components to multiply", "NAME=X", many=True, example="h.0.mlp.c_fc:5=2"
            ),
            Option(
                "--set",
                "components and inner activations to set",
                "NAME=X",
                many=True,
                example="h.0.mlp.c_fc:5=1",
            ),
            Option(
                "--keep",
                "components to keep while all others are switched off; names, or a .json file with "
                "a list of them",
                "NAMES",
                many=True,
                example="h.0.mlp.c_fc:5",
            ),
            Option(
                "--base",
                "the model to edit: the target itself, or under its importances",
                "BASE",
                "unmasked",
                choices=("unmasked", "ci"),
                example="ci",
            ),
            Option("--top", "how many predictions to show", "N", 3, whole(1), example="5"),
            Option("--json", "print JSON; of a file, one line a row"),
        ),
        notes=FORMATS,
    ),
    Verb(
        "view",
        "[PATH] [--port N] [--host NAME] [--no_browser]",
        "Look at runs in the browser.",
        "view --port 7860",
        (
            Option("PATH", "a folder of runs, a run or a harvest (default: all runs)"),
            Option(
                "--port",
                "the port to listen on (default: the first free one from 7860)",
                "N",
                None,
                whole(1),
                example="7860",
            ),
            Option(
                "--host",
                "the name or address to listen on; others than this machine can then open it",
                "NAME",
                "127.0.0.1",
                example="127.0.0.1",
            ),
            Option("--no_browser", "open no browser"),
        ),
    ),
    Verb(
        "edges",
        "RUN LAYER:NUMBER",
        "Print what drives a component over a corpus, and what it drives.",
        "edges stories-2L h.0.mlp.c_fc:5 --sources --top_k 10",
        (
            RUN,
            Option("COMPONENT", "layer:number", needed=True),
            Option(
                "--harvest",
                "a harvest of sums (default: the latest)",
                "NAME",
                example="dataset_edges-unmasked",
            ),
            Option("--sources", "print only what drives it"),
            Option("--targets", "print only what it drives"),
            Option(
                "--scale",
                "what sums are divided by",
                "SCALE",
                "normalized",
                choices=("sum", "mean", "normalized"),
                example="mean",
            ),
            Option(
                "--metric",
                "what edges go to: the activation, or its size",
                "METRIC",
                "activation",
                choices=("activation", "size"),
                example="size",
            ),
            Option("--top_k", "how many to print of each", "N", 20, whole(1), example="20"),
            Option(
                "--min_edges",
                "leave out pairs with fewer edges than this",
                "N",
                10,
                whole(1),
                example="3",
            ),
            Option("--json", "print JSON"),
        ),
    ),
    Verb(
        "weights",
        "RUN",
        "Write which component can drive which by the weights alone, as Parquet.",
        "weights stories-2L --to weights.parquet",
        (
            RUN,
            Option(
                "--min_share",
                "the share of the largest weight into a component that others must reach",
                "S",
                0.3,
                share,
                example="0.3",
            ),
            Option(
                "--to", "the file to write", "FILE", "weights.parquet", example="weights.parquet"
            ),
        ),
    ),
    Verb(
        "export",
        "RUN",
        "Write one prompt's graph for circuit-tracer (.json) or as GraphML (.graphml).",
        "export tms --to graph.graphml",
        (
            RUN,
            Option(
                "--prompt",
                "its id, its number in the viewer's list from 0 up, or a part of its text",
                "P",
                "0",
                example="0",
            ),
            Option(
                "--harvest",
                "a harvest of graphs (default: the newest, as in the viewer)",
                "NAME",
                example="graphs-unmasked",
            ),
            Option("--to", "the file to write", "FILE", "graph.json", example="graph.json"),
            Option(
                "--position",
                "ask about the outputs at one position, from 0 up (default: all)",
                "N",
                None,
                whole(0),
                example="12",
            ),
            Option(
                "--nodes",
                "keep the nodes that make up this share of the influence on the outputs (default: "
                "0.8)",
                "S",
                None,
                share,
                example="0.8",
            ),
            Option(
                "--edges",
                "keep the edges that make up this share of theirs (default: 0.98; with --budget 1)",
                "S",
                None,
                share,
                example="0.98",
            ),
            Option(
                "--budget",
                "instead of --nodes: all outputs and tokens, and the N other nodes with most "
                "influence",
                "N",
                None,
                whole(0),
                example="100",
            ),
        ),
    ),
    Verb(
        "runs",
        "[--table]",
        "List the runs there are: path, state, and what they reached.",
        "runs --table",
        (
            Option("--table", "print a table of results"),
            Option("--json", "print JSON"),
        ),
    ),
    Verb(
        "list",
        "",
        "List the configs there are: what they do, and what they reach.",
        "list",
        module="configs",
    ),
    Verb("push", "RUN", "Send a finished run to its trackers again.", "push tms", (RUN,)),
    Verb(
        "pull",
        "REFERENCE",
        "Fetch a run from a tracker.",
        "pull mlflow:tms",
        (
            Option(
                "REFERENCE",
                "mlflow:<run> or wandb:<entity>/<project>/<artifact>:<version>",
                needed=True,
            ),
        ),
    ),
)
VERBS = {verb.name: verb for verb in _ALL}
