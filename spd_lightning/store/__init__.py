"""The store: each harvest is one folder of Parquet files, which all analyses and pages read.

    <harvest>/manifest.json                     the settings; fixed while rows arrive
    <harvest>/manifest-<rank>.json              the rank's ledger: its shards, sizes and digests
    <harvest>/<table>/part-<rank>-<n>.parquet   rows

Each `write` commits one group of shards, which holds all tables of one batch of prompts. First the
shard of every table is written under a temporary name and renamed; then the ledger is. Readers
ignore a shard that no ledger names. So a process can be killed at any moment and leaves a readable
store, and the next process resumes after the last group in the ledger. A process compares a shard
with its digest when it first opens it. Rows are additive: ranks and later runs append rows, and
readers merge them with `group_by().sum()`.
"""

from spd_lightning.store.columns import KINDS
from spd_lightning.store.manifest import ADDS_UP, gap_warning
from spd_lightning.store.reader import Store
from spd_lightning.store.tables import (
    AGREEMENT,
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
