"""Edges as lists of tables, which are easier to test than lazily computed ones."""

from collections.abc import Callable

from spd_lightning.attribution.graph import EdgeTable, LazyEdges


class EdgeList:
    """A list of tables with the interface of lazily computed edges."""

    def __init__(self, tables: list[EdgeTable]):
        self.tables = tables

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        for table in self.tables:
            visit(table)


def tables_of(edges: LazyEdges) -> list[EdgeTable]:
    """Return all pieces of lazily computed edges."""
    tables = list[EdgeTable]()
    edges.for_each(tables.append)
    return tables
