"""The store: each harvest is one folder of Parquet files, which all analyses and pages read.

    <harvest>/manifest.json                     the settings; fixed while rows arrive
    <harvest>/manifest-<rank>.json              the rank's ledger: its shards, sizes and digests
    <harvest>/manifest-<rank>.jsonl             the shards since then, one line per group
    <harvest>/<table>/part-<rank>-<n>.parquet   rows
    <harvest>/index/part-<rank>-<n>.safetensors where the rows of each prompt and component are

Each `write` commits one group of shards, which holds all tables of one batch of prompts. First the
shard of every table is written under a temporary name and renamed; then a line is appended to the
ledger. Readers ignore a shard that no ledger names. So a process can be killed at any moment and
leaves a readable store, and the next process resumes after the last group in the ledger. What a
process reads is compared with digests: a whole file when it first opens it, or the blocks with the
rows of one prompt. Rows are additive: ranks and later runs append rows, and readers merge them with
`group_by().sum()`.
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
