"""Checks of annotations while tests run, and of shapes only where there are some.

pytest's plugin of jaxtyping puts `jaxtyped` on every function of the package. Its checks of one
call take about 70 µs, which doubled the time of the whole suite. Nine of ten calls are of functions
without shapes, which beartype can check alone, in about a microsecond.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping


def has_shapes(annotation: Any) -> bool:
    """Return whether a shape may occur in an annotation.

    One that is written as a string may contain a shape. It may also name something that is imported
    for type checking only, which jaxtyping leaves unchecked and beartype rejects.
    """
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(has_shapes(part) for part in typing.get_args(annotation))


def check_shapes_where_there_are_some() -> None:
    """Let jaxtyping's import hook leave functions without shapes to the type checker alone.

    To be called before the package is imported.
    """
    with_shapes = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def decorate(checked: Any) -> Any:
            annotations = getattr(checked, "__annotations__", {}).values()
            if inspect.isclass(checked) or any(map(has_shapes, annotations)):
                return with_shapes(typechecker=typechecker)(checked)
            return typechecker(checked)

        return decorate

    jaxtyping.jaxtyped = jaxtyped
