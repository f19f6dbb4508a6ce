"""The neck between the network and everything that reads about it: one folder of Parquet a harvest.

    <harvest>/manifest.json                     what was harvested, and how; fixed while rows arrive
    <harvest>/manifest-<rank>.json              the rank's ledger: its shards, sizes and digests
    <harvest>/<table>/part-<rank>-<n>.parquet   rows

One `write` is one group of shards: all tables of one batch of prompts. A commit goes in this order:
every table's shard under a temporary name, renamed; then the ledger, renamed. A shard that no
ledger names does not exist for readers, so a process killed at any moment leaves a readable store,
and the next one goes on after the last group that the ledger has. A shard's digest is compared with
its content when a process first opens it. Rows are additive: ranks and sittings append, and readers
merge with `group_by().sum()`.
"""

from spd_lightning.store.manifest import ADDS_UP, gap_warning
from spd_lightning.store.reader import Store
from spd_lightning.store.tables import (
    AGREEMENT,
    KINDS,
    SCHEMA_VERSION,
    TABLES,
    added,
    finite,
    prompt_hash,
    schema,
)
from spd_lightning.store.writer import Writer

__all__ = [
    "ADDS_UP",
    "AGREEMENT",
    "KINDS",
    "SCHEMA_VERSION",
    "TABLES",
    "Store",
    "Writer",
    "added",
    "finite",
    "gap_warning",
    "prompt_hash",
    "schema",
]
