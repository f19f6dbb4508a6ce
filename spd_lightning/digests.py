"""Digests of files: sixteen hex characters that identify a file's content."""

import hashlib
import time
from pathlib import Path

_SETTLED = 0.1
"""Seconds after which a further write changes a file's time, on any file system."""
_known: dict[tuple[str, int, int], str] = {}


def digest_of(content: bytes | memoryview) -> str:
    """Return the digest of bytes in memory."""
    digits = hashlib.sha256(content).hexdigest()
    return digits[:16]


def digest(path: Path) -> str:
    """Return the digest of a file, from a cache if the file has not changed.

    The cache compares the file's size and the time of its last change. The digest of a file that
    changed a moment ago is not cached, since another change could have the same time.
    """
    facts = path.stat()
    key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    if key in _known:
        return _known[key]
    with open(path, "rb") as file:
        digits = hashlib.file_digest(file, "sha256").hexdigest()
    digits = digits[:16]
    if time.time() - facts.st_mtime > _SETTLED:
        _known[key] = digits
    return digits
