"""The web endpoints: the queries of `analysis.responses` over HTTP, described under `/docs`.

Results are exactly those of `analysis.responses`. Three headers say where a result comes from:
`spd-run`, `spd-harvest`, and `spd-complete`, which is `false` while the harvest is in progress.

Errors are one line, {"detail": "..."}. The status is 404 if the run, the harvest, or the component
or prompt in the path does not exist; 409 if files cannot be read at this moment; and 422 otherwise.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from spd_lightning.analysis import contexts, neighbors, prompt_view, responses, search, statistics
from spd_lightning.analysis.names import component_of
from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, shown
from spd_lightning.viewer import api_types as types
from spd_lightning.viewer.library import Library

ABOUT = """Queries about the components of a decomposition, and the graphs of its prompts.

Components are named `layer:component`, and nodes `layer:pos:component`. Ids of prompts are strings,
since they are larger than the whole numbers of JavaScript. Numbers that are not finite are null.
The headers `spd-run` and `spd-harvest` name the harvest that answered; `spd-complete` is `false`
while that harvest is in progress.
"""
PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {
        "model": types.Problem,
        "description": "The run, the harvest, or the component or prompt in the path is not found.",
    },
    409: {"model": types.Problem, "description": "A file cannot be read at this moment."},
    422: {
        "model": types.Problem,
        "description": "A parameter is unknown or out of range, or a file is damaged.",
    },
}
Name = Annotated[types.ComponentName, Path()]


def build(library: Library) -> FastAPI:
    """Return the endpoints as an application. They open only the runs of a library."""
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="spd_lightning",
        description=ABOUT,
        version=version("spd_lightning"),
        static_url="/static/docs",
        favicon_url="/favicon.ico",
        swagger_ui_parameters={"defaultModelsExpandDepth": -1, "validatorUrl": None},
        exception_handlers={
            BadInput: _report(422),
            OSError: _report(409),
            RequestValidationError: _report_parameter,
        },
    )
    app.state.library = library
    app.include_router(router)
    return app


router = APIRouter(prefix="/api", tags=["queries"], responses=PROBLEMS)


def _endpoint(path: str, model: type, *functions: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that registers a function for GET requests.

    Args:
        path: the path below /api.
        model: the type of the result, only for its description.
        functions: functions whose docstrings explain the result; the first one sums it up.
    """
    paragraphs = [paragraph for function in functions for paragraph in _explanation(function)]
    summary, *details = paragraphs
    return router.get(
        path,
        summary=summary.replace("\n", " "),
        description="\n\n".join(details),
        response_class=JSONResponse,
        response_model=None,
        responses={200: {"model": model, "description": "The result."}},
    )


def _explanation(function: Callable[..., Any]) -> list[str]:
    """Return the paragraphs of a function's docstring before its sections."""
    text = inspect.getdoc(function) or ""
    sections = ("Args:", "Raises:", "Returns:")
    paragraphs = text.split("\n\n")
    return list(itertools.takewhile(lambda one: not one.startswith(sections), paragraphs))


# ---- endpoints -----------------------------------------------------------------------------------


@_endpoint("/meta", types.Meta, responses.meta)
def get_meta(request: Request, query: Annotated[types.Where, Query()]) -> JSONResponse:
    """Answer with `responses.meta`."""
    answer = _open(request, query, "prompts")
    return answer(responses.meta(answer.store))


@_endpoint("/components", types.Page, responses.components, statistics.components)
def get_components(request: Request, query: Annotated[types.OfComponents, Query()]) -> JSONResponse:
    """Answer with `responses.components`."""
    answer = _open(request, query, "statistics")
    return answer(responses.components(answer.store, **query.question()))


@_endpoint("/stats/{name}", dict, responses.component, statistics.components, statistics.histogram)
@_endpoint(
    "/components/{name}", dict, responses.component, statistics.components, statistics.histogram
)
def get_component(
    request: Request, name: Name, query: Annotated[types.Where, Query()]
) -> JSONResponse:
    """Answer with `responses.component`."""
    answer = _open(request, query, "statistics", name)
    return answer(responses.component(answer.store, name))


@_endpoint("/activation_contexts", types.Contexts, responses.activation_contexts, contexts.contexts)
def get_activation_contexts(
    request: Request, query: Annotated[types.OfContexts, Query()]
) -> JSONResponse:
    """Answer with `responses.activation_contexts`."""
    answer = _open(request, query, "statistics")
    return answer(responses.activation_contexts(answer.store, **query.question()))


@_endpoint("/correlations/{name}", types.Page, responses.correlations, statistics.correlations)
def get_correlations(
    request: Request, name: Name, query: Annotated[types.OfCorrelations, Query()]
) -> JSONResponse:
    """Answer with `responses.correlations`."""
    answer = _open(request, query, "statistics", name)
    return answer(responses.correlations(answer.store, name, **query.question()))


@_endpoint("/tokens/{name}", types.Tokens, responses.tokens, statistics.tokens)
def get_tokens(
    request: Request, name: Name, query: Annotated[types.OfTokens, Query()]
) -> JSONResponse:
    """Answer with `responses.tokens`."""
    answer = _open(request, query, "statistics", name)
    return answer(responses.tokens(answer.store, name, **query.question()))


@_endpoint("/neighbors/{name}", types.Neighbors, responses.neighbors, neighbors.neighbors)
def get_neighbors(
    request: Request, name: Name, query: Annotated[types.OfNeighbors, Query()]
) -> JSONResponse:
    """Answer with `responses.neighbors`."""
    answer = _open(request, query, "edges", name)
    return answer(responses.neighbors(answer.store, name, **query.question()))


@_endpoint("/search", types.Page, responses.search, search.search)
def get_search(request: Request, query: Annotated[types.OfSearch, Query()]) -> JSONResponse:
    """Answer with `responses.search`."""
    answer = _open(request, query, "nodes")
    arguments = query.question()
    names = [name for name in arguments.pop("components").split(",") if name.strip()]
    return answer(responses.search(answer.store, names, **arguments))


@_endpoint("/prompts", types.Page, responses.prompts, search.prompts)
def get_prompts(request: Request, query: Annotated[types.OfPrompts, Query()]) -> JSONResponse:
    """Answer with `responses.prompts`."""
    answer = _open(request, query, "prompts")
    return answer(responses.prompts(answer.store, **query.question()))


@_endpoint("/prompt/{id}", types.Prompt, responses.prompt, prompt_view.prompt)
def get_prompt(
    request: Request,
    prompt_id: Annotated[types.PromptId, Path(alias="id")],
    query: Annotated[types.OfPrompt, Query()],
) -> JSONResponse:
    """Answer with `responses.prompt`."""
    answer = _open(request, query, "graph")
    store = answer.store
    number = int(prompt_id)
    known = store.collect(store.scan("prompts", number).select("prompt_id"))
    if known.is_empty():
        raise HTTPException(404, f"prompt {number}: not in harvest '{store.path.name}'")
    return answer(responses.prompt(store, number, **query.question()))


@router.get("/{rest:path}", include_in_schema=False)
def get_nothing(rest: str) -> JSONResponse:
    """Report that there is no such endpoint."""
    raise HTTPException(404, f"'/api/{shown(rest)}': not an endpoint; /docs lists them")


# ---- parts of endpoints --------------------------------------------------------------------------


class Answering(NamedTuple):
    """The harvest that answers a question, and the name of its run."""

    run: str
    store: Store

    def __call__(self, value: responses.Json) -> JSONResponse:
        """Return a result, with headers that say where it comes from."""
        headers = {
            "spd-run": quote(self.run),
            "spd-harvest": quote(self.store.path.name),
            "spd-complete": "true" if self.store.manifest["complete"] else "false",
        }
        return JSONResponse(value, headers=headers)


def _open(
    request: Request, where: types.Where, question: str, name: str | None = None
) -> Answering:
    """Open the harvest that answers a question.

    Args:
        request: the request.
        where: the names of the run and the harvest, if they are given.
        question: a key of `harvests.SOURCES`.
        name: the component in the request's path.

    Raises:
        HTTPException: the run, the harvest or the component does not exist (404).
        BadInput: the harvest is damaged.
    """
    library: Library = request.app.state.library
    with _not_found():
        run, folder = library.find(where.run, question, where.harvest)
    store = library.open(folder)
    with _not_found():
        if name is not None:
            component_of(store, name)
    return Answering(run.name, store)


@contextmanager
def _not_found() -> Iterator[None]:
    """Report bad input with the status 404."""
    try:
        yield
    except BadInput as problem:
        raise HTTPException(404, _one_line(str(problem))) from problem


# ---- errors --------------------------------------------------------------------------------------


def _report(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """Return a handler that reports an error in one line."""

    def report(request: Request, problem: Exception) -> JSONResponse:
        del request
        return _problem(status, str(problem))

    return report


def _report_parameter(request: Request, problem: Exception) -> JSONResponse:
    """Report the first parameter that has a wrong type or is out of range."""
    del request
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    name = shown(str(first["loc"][-1]))
    if first["type"] == "extra_forbidden":
        return _problem(422, f"unknown parameter '{name}'; /docs lists the parameters")
    if first["type"] == "missing":
        return _problem(422, f"parameter '{name}': missing; /docs describes it")
    given = shown(str(first["input"]))
    reason = first["msg"].replace("Input", "it").replace("String", "it")
    return _problem(422, f"{name} '{given}': {reason}; /docs describes it")


def _problem(status: int, text: str) -> JSONResponse:
    return JSONResponse({"detail": _one_line(text)}, status)


def _one_line(text: str) -> str:
    """Replace line breaks and control characters, which a name in a request can contain."""
    return "".join(character if character.isprintable() else " " for character in text)
