"""The options of the verbs that answer questions about a run's components and prompts.

Names that an option can take are written out here, so that `--help` imports no analysis. A test
compares them with those that the queries accept.
"""

from spd_lightning.commands.option import RUN, Option, Verb, share, whole

_COMPONENT = Option(
    "COMPONENT", "a component, as layer:component", needed=True, example="h.0.mlp.c_fc:5"
)
_HARVEST = Option(
    "--harvest",
    "the harvest to read",
    "NAME",
    default_text="the newest one that can answer",
    example="statistics",
)
_SIZE = Option("--size", "rows to a page", "N", 20, kind=whole(1), example="50")
_PAGE = Option("--page", "the page, from 0", "N", 0, kind=whole(0), example="1")
_TOP = Option("--top", "the largest number of rows", "N", 20, kind=whole(1), example="50")
_FORMATS = (
    Option("--json", "print JSON, as the web endpoint returns it"),
    Option("--csv", "write all rows to a CSV file", "FILE", example="rows.csv"),
    Option("--parquet", "write all rows to a Parquet file", "FILE", example="rows.parquet"),
)
_NEEDS_STATISTICS = (
    "This needs statistics: predict with --config statistics.yaml as the last config.",
)

QUERIES = (
    Verb(
        "components",
        "RUN",
        "List the components of a run with their statistics.",
        "components stories-2L --sort firings --layer h.0.mlp.c_fc",
        (
            RUN,
            Option("--layer", "only the components of this layer", "LAYER", example="h.0.mlp.c_fc"),
            Option(
                "--sort",
                "what to sort by, from large to small",
                "NAME",
                "density",
                choices=(
                    "density",
                    "firings",
                    "prompts",
                    "mean_importance",
                    "mean_activation",
                    "firing_importance",
                    "firing_activation",
                    "norm",
                    "layer",
                ),
                example="firings",
            ),
            _SIZE,
            _PAGE,
            _HARVEST,
            *_FORMATS,
        ),
        module="queries:components",
    ),
    Verb(
        "component",
        "RUN COMPONENT",
        "Show what one component is about: statistics, tokens, correlations and examples.",
        "component stories-2L h.0.mlp.c_fc:5",
        (
            RUN,
            _COMPONENT,
            Option(
                "--examples",
                "which examples to show",
                "KIND",
                "importance",
                choices=("importance", "uniform", "positive", "negative"),
                example="uniform",
            ),
            Option("--window", "tokens around a firing", "N", 10, kind=whole(0), example="10"),
            Option("--top", "rows of each list", "N", 8, kind=whole(1), example="8"),
            _HARVEST,
            _FORMATS[0],
        ),
        notes=_NEEDS_STATISTICS,
        module="queries:component",
    ),
    Verb(
        "correlations",
        "RUN COMPONENT",
        "List the components that fire together with a component.",
        "correlations stories-2L h.0.mlp.c_fc:5",
        (
            RUN,
            _COMPONENT,
            Option(
                "--sort",
                "what to sort by; pmi by the lower end of its interval",
                "NAME",
                "pmi",
                choices=("pmi", "jaccard", "p_other", "p_this", "together"),
                example="jaccard",
            ),
            _SIZE,
            _PAGE,
            _HARVEST,
            *_FORMATS,
        ),
        notes=_NEEDS_STATISTICS,
        module="queries:correlations",
    ),
    Verb(
        "tokens",
        "RUN COMPONENT",
        "List the tokens on which a component fires, and those that are predicted there.",
        "tokens stories-2L h.0.mlp.c_fc:5 --of output",
        (
            RUN,
            _COMPONENT,
            Option(
                "--of",
                "the tokens where it fires, or the next tokens that the target predicts",
                "SIDE",
                default_text="both",
                choices=("input", "output"),
                example="output",
            ),
            Option(
                "--sort",
                "what to sort by; pmi by the lower end of its interval",
                "NAME",
                "pmi",
                choices=("pmi", "recall", "precision", "count"),
                example="recall",
            ),
            _TOP,
            _HARVEST,
            *_FORMATS,
        ),
        notes=_NEEDS_STATISTICS,
        module="queries:tokens",
    ),
    Verb(
        "neighbors",
        "RUN COMPONENT",
        "List what drives a component, and what it drives.",
        "neighbors stories-2L h.0.mlp.c_fc:5",
        (
            RUN,
            _COMPONENT,
            Option(
                "--side",
                "what drives it, or what it drives",
                "SIDE",
                default_text="both",
                choices=("sources", "targets"),
                example="sources",
            ),
            _TOP,
            _HARVEST,
            *_FORMATS,
        ),
        notes=("This needs graphs or sums of edges: predict with --config dataset_edges.yaml.",),
        module="queries:neighbors",
    ),
    Verb(
        "search",
        "RUN COMPONENTS",
        "List the prompts on which all of the given components fire, or any of them.",
        "search stories-2L h.0.mlp.c_fc:5,h.1.mlp.c_fc:12 --mode any",
        (
            RUN,
            Option(
                "COMPONENTS",
                "components, as layer:component, separated by commas",
                needed=True,
                example="h.0.mlp.c_fc:5,h.1.mlp.c_fc:12",
            ),
            Option(
                "--mode",
                "whether all must fire on a prompt, or any of them",
                "MODE",
                "all",
                choices=("all", "any"),
                example="any",
            ),
            Option(
                "--min_importance",
                "a component counts where its importance is at least this",
                "S",
                0.0,
                kind=share,
                example="0.5",
            ),
            _SIZE,
            _PAGE,
            _HARVEST,
            *_FORMATS,
        ),
        module="queries:search",
    ),
    Verb(
        "prompts",
        "RUN",
        "List the prompts of a harvest, or those whose text matches.",
        "prompts stories-2L --text mom",
        (
            RUN,
            Option(
                "--text",
                "only prompts with this text; case and spaces are ignored",
                "TEXT",
                example="mom",
            ),
            Option(
                "--regex",
                "only prompts in which this regular expression is found",
                "REGEX",
                example="cats?",
            ),
            _SIZE,
            _PAGE,
            _HARVEST,
            *_FORMATS,
        ),
        module="queries:prompts",
    ),
    Verb(
        "prompt",
        "RUN P",
        "Show the strongest edges of one prompt's graph, and what the model predicts.",
        "prompt stories-2L 0 --top_k 20 --normalize target",
        (
            RUN,
            Option(
                "P",
                "the prompt: its id, its number in the viewer (from 0), or a part of its text",
                needed=True,
                example="0",
            ),
            Option("--top_k", "the largest number of edges", "N", 20, kind=whole(0), example="200"),
            Option(
                "--ci_threshold",
                "keep components with at least this importance",
                "S",
                0.0,
                kind=share,
                example="0.1",
            ),
            Option(
                "--max_mean_ci",
                "keep components whose mean importance over the harvest is at most this",
                "S",
                1.0,
                kind=share,
                example="0.5",
            ),
            Option(
                "--output_prob_threshold",
                "keep outputs with at least this probability",
                "S",
                0.0,
                kind=share,
                example="0.1",
            ),
            Option(
                "--normalize",
                "the scale of the edges",
                "HOW",
                "none",
                choices=("none", "target", "target_l2", "layer_l2"),
                example="target",
            ),
            _HARVEST,
            *_FORMATS,
        ),
        notes=("--csv and --parquet write the edges.",),
        module="queries:prompt",
    ),
)
