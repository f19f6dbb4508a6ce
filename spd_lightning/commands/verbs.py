"""The verbs of the command line, as one table: `options` parses words and prints help from it.

Not here: what a verb does. Each verb is a module of this package.
"""

from spd_lightning.commands.option import RUN, Option, Verb, share, whole
from spd_lightning.commands.query_verbs import QUERIES
from spd_lightning.errors import command

CONFIG = Option(
    "--config",
    "a config: a path, or a name that 'list' shows; repeat it to merge configs: later ones win; "
    "the callbacks of the second and later configs are combined, and replace those of the first",
    "NAME",
    many=True,
    needed=True,
    example="tms.yaml",
)
RUN_OPTIONS = (
    CONFIG,
    Option(
        "--run",
        "the run's name",
        "NAME",
        default_text="the name of the first config",
        example="mine",
    ),
    Option("--KEY", "any setting, for example --trainer.max_steps 500", "VALUE", passed=True),
    Option("--print_config", "print the merged settings, and exit", passed=True),
)
ALLOW = Option(
    "--allow_classes", "let configs and files name classes of this package", "PACKAGE", passed=True
)
DEBUG = Option("--debug", "print a traceback if there is an error", passed=True)
HELP = Option("--help", "print this page", passed=True)
SETTINGS = (
    f"All settings with their defaults: {command('fit --help model')}",
    "(or: data, trainer, reconstruction, or a class such as PromptGraphs)",
)
HARVESTS = (
    "The harvesters are the callbacks of the config. They run on the newest finished run of the",
    "first config, or on the one named by --run, and write Parquet tables into it.",
    "",
)

FORMATS = (
    "A component is named layer:pos:component, where pos is a position or a range such as 3-5, or",
    "layer:component, which edits it at all positions.",
    "",
    "A file has one intervention per row, as JSON lines (.jsonl) or as a YAML list (.yaml):",
    '  {"text": "Mia went", "ablate": ["h.0.mlp.c_fc:5"], "scale": {"h.1.attn.o_proj:3:7": 2}}',
    "Keys: text or input; ablate and keep (lists); scale and set (maps); base; name (any label).",
)

_ALL = (
    Verb(
        "fit",
        "--config tms.yaml",
        "Train the target if necessary, decompose it, and save the run.",
        "fit --config tms.yaml",
        RUN_OPTIONS,
        True,
        SETTINGS,
    ),
    Verb(
        "plan",
        "--config tms.yaml",
        "Estimate the parameters, memory, FLOPs and hours of a fit.",
        "plan --config stories-2L.yaml --device a100",
        (
            *RUN_OPTIONS,
            Option(
                "--device",
                "the machine to plan for; 'this' is the current one",
                "NAME",
                default_text="all of them",
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
        "List the modules of a target that can be decomposed.",
        "sites targets/tms_5-2",
        (
            Option(
                "TARGET",
                "a config that trains a target, or a HuggingFace checkpoint: hf:FOLDER, hf:NAME or "
                "hf:FILE.gguf to use the model as it is, decoder:FOLDER, decoder:NAME or "
                "decoder:FILE.gguf to load it into our decoder",
                needed=True,
            ),
            Option("--write", "also write a config to start from", "FILE", example="mine.yaml"),
            Option("--all", "list every module separately instead of in groups"),
            Option("--json", "print JSON"),
        ),
    ),
    Verb(
        "predict",
        "--config tms.yaml",
        "Harvest attribution graphs, importances or edge sums for the prompts of a run.",
        "predict --config tms.yaml --config frozen.yaml",
        RUN_OPTIONS,
        True,
        (*HARVESTS, *SETTINGS),
    ),
    Verb(
        "validate",
        "--config tms.yaml",
        "Evaluate a finished run again, and print its metrics.",
        "validate --config tms.yaml",
        RUN_OPTIONS,
        True,
        SETTINGS,
    ),
    Verb(
        "intervene",
        'RUN --text "..."',
        "Ablate, scale or set components, and compare predictions.",
        "intervene tms --input 0,0.75,0,0,0 --ablate linear1:3",
        (
            RUN,
            Option("--text", "the prompt", "TEXT", example="Mia"),
            Option(
                "--input",
                "the prompt as numbers separated by commas: features, or token ids",
                "NUMBERS",
                example="0,1",
            ),
            Option("--file", "a file of interventions (see below)", "FILE", example="edits.jsonl"),
            Option("--ablate", "components to ablate", "NAME", many=True, example="h.0.mlp.c_fc:5"),
            Option(
                "--scale",
                "components to multiply by X",
                "NAME=X",
                many=True,
                example="h.0.mlp.c_fc:5=2",
            ),
            Option(
                "--set",
                "set the inner activation of these components to X",
                "NAME=X",
                many=True,
                example="h.0.mlp.c_fc:5=1",
            ),
            Option(
                "--keep",
                "components to keep while all others are ablated: names, or a .json file with a "
                "list of names",
                "NAMES",
                many=True,
                example="h.0.mlp.c_fc:5",
            ),
            Option(
                "--base",
                "the model to edit: unmasked, or masked by its causal importances",
                "BASE",
                "unmasked",
                choices=("unmasked", "ci"),
                example="ci",
            ),
            Option(
                "--top", "the number of predictions to show", "N", 3, kind=whole(1), example="5"
            ),
            Option("--json", "print JSON; with --file, one line per row"),
        ),
        notes=FORMATS,
    ),
    Verb(
        "view",
        "[PATH]",
        "Look at runs in the browser.",
        "view --port 7860",
        (
            Option("PATH", "a folder of runs, a run, or a harvest", default_text="all runs"),
            Option(
                "--port",
                "the port to listen on",
                "N",
                default_text="the first free one from 7860",
                kind=whole(1),
                example="7860",
            ),
            Option(
                "--host",
                "the name or address to listen on; with any other than the default, other machines "
                "can open the viewer",
                "NAME",
                "127.0.0.1",
                example="127.0.0.1",
            ),
            Option("--no_browser", "do not open a browser"),
        ),
    ),
    Verb(
        "edges",
        "RUN COMPONENT",
        "Print the strongest sources and targets of a component.",
        "edges stories-2L h.0.mlp.c_fc:5 --sources --top_k 10",
        (
            RUN,
            Option("COMPONENT", "layer:number", needed=True),
            Option(
                "--harvest",
                "the harvest of sums over a corpus",
                "NAME",
                default_text="the newest",
                example="dataset_edges-unmasked",
            ),
            Option("--sources", "print only the sources"),
            Option("--targets", "print only the targets"),
            Option(
                "--scale",
                "the scale of the sums over the corpus",
                "SCALE",
                "normalized",
                choices=("sum", "mean", "normalized"),
                example="mean",
            ),
            Option(
                "--metric",
                "the quantity that is attributed: the target's activation, or its absolute value",
                "METRIC",
                "activation",
                choices=("activation", "size"),
                example="size",
            ),
            Option(
                "--top_k",
                "the largest number of sources and of targets to print",
                "N",
                20,
                kind=whole(1),
                example="20",
            ),
            Option(
                "--min_edges",
                "omit pairs with fewer edges than this",
                "N",
                10,
                kind=whole(1),
                example="3",
            ),
            Option("--json", "print JSON"),
        ),
    ),
    Verb(
        "weights",
        "RUN",
        "Write the weights between the components of a decoder as a Parquet file.",
        "weights stories-2L --to weights.parquet",
        (
            RUN,
            Option(
                "--min_share",
                "omit weights below this share of the largest into the same component",
                "S",
                0.3,
                kind=share,
                example="0.3",
            ),
            Option("--to", "the file to write", "FILE", "weights.parquet", example="x.parquet"),
        ),
    ),
    Verb(
        "export",
        "RUN",
        "Write the graph of a prompt for circuit-tracer or as GraphML.",
        "export tms --to graph.graphml",
        (
            RUN,
            Option(
                "--prompt",
                "the prompt: its id, its number in the viewer (from 0), or a part of its text",
                "P",
                "0",
                example="0",
            ),
            Option(
                "--harvest",
                "the harvest of graphs",
                "NAME",
                default_text="the newest, as in the viewer",
                example="graphs-unmasked",
            ),
            Option(
                "--to",
                "the file to write: .json for circuit-tracer, .graphml for GraphML",
                "FILE",
                "graph.json",
                example="graph.json",
            ),
            Option(
                "--position",
                "measure the influence on the outputs at this position, from 0",
                "N",
                default_text="all positions",
                kind=whole(0),
                example="12",
            ),
            Option(
                "--nodes",
                "keep the nodes that carry this share of the influence on the outputs",
                "S",
                default_text="0.8",
                kind=share,
                example="0.8",
            ),
            Option(
                "--edges",
                "keep the edges that carry this share of the influence on the outputs",
                "S",
                default_text="0.98, or 1 with --budget",
                kind=share,
                example="0.98",
            ),
            Option(
                "--budget",
                "instead of --nodes: keep all outputs and tokens, and the N other nodes with the "
                "most influence",
                "N",
                kind=whole(0),
                example="100",
            ),
        ),
    ),
    *QUERIES,
    Verb(
        "runs",
        "[--table]",
        "List the runs with their states and results.",
        "runs --table",
        (Option("--table", "print a table of results"), Option("--json", "print JSON")),
    ),
    Verb(
        "store",
        "ACTION HARVEST",
        "Describe, verify, compact or copy a harvest.",
        "store info tms/graphs-unmasked",
        (
            Option(
                "ACTION",
                "info: sizes, and bytes per edge; verify: compare every file with its digest; "
                "compact: merge small files into large ones; push: copy it to --to",
                needed=True,
                choices=("info", "verify", "compact", "push"),
            ),
            Option(
                "HARVEST",
                "its folder, RUN/HARVEST, or an address such as s3://BUCKET/HARVEST",
                needed=True,
            ),
            Option("--to", "where push copies it", "ADDRESS", example="s3://bucket/run/graphs"),
            Option("--json", "print JSON"),
        ),
    ),
    Verb("list", "", "List the configs that come with this package.", "list", module="configs"),
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
