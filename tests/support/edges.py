"""Edges as tests handle them: tables in a list, and what lazily computed edges consist of."""

from collections.abc import Callable

from spd_lightning.attribution.graph import EdgeTable, LazyEdges


class EdgeList:
    """Edges that are held already, in the place of edges that are computed."""

    def __init__(self, tables: list[EdgeTable]):
        self.tables = tables

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        for table in self.tables:
            visit(table)


def tables_of(edges: LazyEdges) -> list[EdgeTable]:
    """All pieces of some edges."""
    tables = list[EdgeTable]()
    edges.for_each(tables.append)
    return tables
