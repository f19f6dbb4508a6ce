"""The parameters of the web endpoints, with their bounds and help texts, and the forms of results.

The defaults are those of `analysis.responses`. Names are checked by the analysis, whose messages
list the nearest ones.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from spd_lightning.analysis.contexts import ExampleKind
from spd_lightning.analysis.names import LONGEST
from spd_lightning.analysis.neighbors import Side
from spd_lightning.analysis.normalize import Normalization
from spd_lightning.analysis.responses import LARGEST_PAGE
from spd_lightning.analysis.search import LONGEST_TEXT, MOST_COMPONENTS, Mode
from spd_lightning.analysis.statistics import COMPONENT_SORTS, CORRELATION_SORTS, TOKEN_SORTS, Of

Omitted = SkipJsonSchema[None]
"""None, for parameters that were omitted; a request cannot contain it."""

LAST_PAGE = 10**9
LARGEST_GRAPH = 100_000
"""The largest number of edges in one result."""

LARGEST_WINDOW = 10_000
"""The largest number of tokens on either side of a firing."""


def _name(options: tuple[str, ...], default: str, text: str) -> Any:
    """Return a parameter that is one of some names. The analysis checks it."""
    return Field(default, description=text, json_schema_extra={"enum": list(options)})


def _share(default: float, text: str) -> Any:
    """Return a parameter that is a number from 0 to 1."""
    return Field(default, ge=0, le=1, allow_inf_nan=False, description=text)


def _number(default: int, least: int, most: int, text: str) -> Any:
    """Return a parameter that is a whole number."""
    return Field(default, ge=least, le=most, description=text)


ComponentName = Annotated[
    str, Field(max_length=LONGEST, description="The component, as `layer:component`.")
]
PromptId = Annotated[
    str, Field(pattern="^[0-9]{1,20}$", description="The prompt's id, as `/api/prompts` lists it.")
]

# ---- parameters ----------------------------------------------------------------------------------


class Where(BaseModel):
    """The harvest that a question is about."""

    model_config = ConfigDict(extra="forbid")

    run: str | Omitted = Field(
        None,
        max_length=LONGEST,
        description="The run's name; if omitted, the latest run that has a harvest.",
    )
    harvest: str | Omitted = Field(
        None,
        max_length=LONGEST,
        description="The harvest's name; if omitted, the newest one that can answer the question.",
    )

    def question(self) -> dict[str, Any]:
        """Return the parameters of the question itself, by name."""
        return self.model_dump(exclude={"run", "harvest"})


class Paged(Where):
    """A question whose results come in pages."""

    page: int = _number(0, 0, LAST_PAGE, "The number of the page; the first is 0.")
    size: int = _number(100, 1, LARGEST_PAGE, "The number of items on a page.")


class OfComponents(Paged):
    """Parameters of `/api/components`."""

    layer: str | Omitted = Field(
        None, max_length=LONGEST, description="Only components of this site."
    )
    sort: str = _name(COMPONENT_SORTS, "density", "The column to sort by.")


class OfCorrelations(Paged):
    """Parameters of `/api/correlations/{name}`."""

    sort: str = _name(
        CORRELATION_SORTS, "pmi", "The column to sort by; PMI by the lower end of its interval."
    )


class OfTokens(Where):
    """Parameters of `/api/tokens/{name}`."""

    of: Of | Omitted = Field(
        None, description="The tokens where it fires, or the predicted ones; both if omitted."
    )
    sort: str = _name(
        TOKEN_SORTS, "pmi", "The column to sort by; PMI by the lower end of its interval."
    )
    top: int = _number(20, 1, LARGEST_PAGE, "The number of tokens.")


class OfContexts(Where):
    """Parameters of `/api/activation_contexts`."""

    name: ComponentName
    kind: ExampleKind = Field(
        "importance",
        description="A random sample of all firings, those with the largest importance, or those "
        "with the largest activation of one sign.",
    )
    window: int = _number(20, 0, LARGEST_WINDOW, "The number of tokens before and after a firing.")
    top: int = _number(20, 1, LARGEST_PAGE, "The number of examples.")


class OfPrompts(Paged):
    """Parameters of `/api/prompts`."""

    text: str | Omitted = Field(
        None,
        max_length=LONGEST_TEXT,
        description="Only prompts that contain this text; case and spaces are ignored.",
    )
    regex: str | Omitted = Field(
        None,
        max_length=LONGEST_TEXT,
        description="Only prompts in whose text this regular expression is found.",
    )


class OfPrompt(Where):
    """Parameters of `/api/prompt/{id}`."""

    top_k: int = _number(200, 0, LARGEST_GRAPH, "The largest number of edges.")
    ci_threshold: float = _share(0.0, "Keep components with at least this importance.")
    max_mean_ci: float = _share(
        1.0, "Keep components whose mean importance over the harvest is at most this."
    )
    output_prob_threshold: float = _share(
        0.0, "Keep outputs with at least this probability under importances as masks."
    )
    normalize: Normalization = Field("none", description="The scale of the edges.")


class OfSearch(Paged):
    """Parameters of `/api/search`."""

    components: str = Field(
        max_length=MOST_COMPONENTS * (LONGEST + 1),
        description=f"Names of at most {MOST_COMPONENTS} components, separated by commas.",
    )
    mode: Mode = Field("all", description="Whether all of them must fire on a prompt, or any.")
    min_importance: float = _share(0.0, "A component counts where its importance is at least this.")


class OfNeighbors(Where):
    """Parameters of `/api/neighbors/{name}`."""

    side: Side | Omitted = Field(
        None, description="What drives the component, or what it drives; both if omitted."
    )
    top: int = _number(20, 1, LARGEST_PAGE, "The number of neighbors on each side.")


# ---- results -------------------------------------------------------------------------------------

Row = dict[str, Any]


class Problem(BaseModel):
    """An error, in one line."""

    detail: str


class Meta(BaseModel):
    """A harvest: its run, settings, layers, and numbers of rows."""

    harvest: str
    run: str
    kind: str
    mode: str
    threshold: float
    layers: list[str]
    C: dict[str, int]
    rows: dict[str, int]
    prompts: int
    complete: bool
    checkpoint: str | None


class Page(BaseModel):
    """A page of a long list: `next` is the number of the next page, null on the last."""

    items: list[Row]
    total: int
    next: int | None


class Contexts(BaseModel):
    """Examples of firings, out of a total of stored ones."""

    items: list[Row]
    total: int


class TokenList(BaseModel):
    """Tokens, out of a total of counted ones; `remainder` is the count of all others together."""

    items: list[Row]
    total: int
    remainder: float


class Tokens(BaseModel):
    """Tokens where a component fires, and predicted ones."""

    input: TokenList | None = None
    output: TokenList | None = None


class Edge(BaseModel):
    """An edge between nodes, named `layer:pos:component`; `val` is null if it is not finite."""

    src: str
    tgt: str
    val: float | None


class Prompt(BaseModel):
    """One prompt: its tokens, its nodes and strongest edges, and the likely next tokens."""

    prompt_id: str
    text: str
    tokens: list[str]
    nodes: list[Row]
    edges: list[Edge]
    edges_total: int
    outputs: list[Row]


class Neighbors(BaseModel):
    """The strongest sources and targets of a component."""

    sources: list[Row] | None = None
    targets: list[Row] | None = None
