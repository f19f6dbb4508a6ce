"""Digests of files: sixteen hex characters that stand for a file's content, checked where the file
is first opened.
"""

import hashlib
import time
from pathlib import Path

_SETTLED = 0.1  # seconds after which a further write shows in a file's time, on any file system
_known: dict[tuple[str, int, int], str] = {}


def digest_of(content: bytes | memoryview) -> str:
    """The digest of bytes in memory."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest(path: Path) -> str:
    """The digest of a file; it is computed once for each state of the file that this process sees.

    A state is the file's size and the time of its last change. One that changed a moment ago is not
    remembered, since another change may carry the same time.
    """
    facts = path.stat()
    state = str(path.resolve()), facts.st_size, facts.st_mtime_ns
    if state in _known:
        return _known[state]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if time.time() - facts.st_mtime > _SETTLED:
        _known[state] = found
    return found
