"""Read parts of large files, and compare what is read with digests: one for each block of 64 KB.

The index of a group holds the digests of the blocks of its files. So the rows of one prompt can be
trusted after reading a few blocks, on a disk or in an object store, and not the whole file.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from spd_lightning.errors import BadInput

BLOCK = 1 << 16
_KEPT = 8
"""Blocks of a file in memory, since the parts of a row group lie next to each other."""


class CheckedFile(io.RawIOBase):
    """A file for reading whose blocks are compared with their digests when they are read.

    Args:
        read_range: returns the bytes of the file from one place to another.
        size: the size of the file.
        digests: the first eight bytes of the SHA-256 digest of each block, as one number.
        error: returns the error to raise, given what is wrong.
    """

    def __init__(
        self,
        read_range: Callable[[int, int], bytes],
        size: int,
        digests: np.ndarray,
        error: Callable[[str], BadInput],
    ):
        super().__init__()
        self._read_range = read_range
        self._size = size
        self._digests = digests
        self._error = error
        self._at = 0
        self._blocks = OrderedDict[int, bytes]()
        if len(digests) != -(-size // BLOCK):
            raise error("its index is of another file")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
        self._at = origin[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes from the current place, after checking their blocks.

        Raises:
            BadInput: a block is missing, or has another digest.
        """
        stop = self._size if size < 0 else min(self._at + size, self._size)
        start = self._at
        if start >= stop:
            return b""
        first = start // BLOCK
        last = (stop - 1) // BLOCK
        self._load(first, last)
        content = b"".join(self._blocks[k] for k in range(first, last + 1))
        self._at = stop
        offset = first * BLOCK
        self._forget()
        return content[start - offset : stop - offset]

    def _load(self, first: int, last: int) -> None:
        """Read and check the blocks from `first` to `last` that are not in memory."""
        missing = [k for k in range(first, last + 1) if k not in self._blocks]
        if not missing:
            return
        start = missing[0] * BLOCK
        stop = min((missing[-1] + 1) * BLOCK, self._size)
        try:
            content = self._read_range(start, stop)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error
        if len(content) != stop - start:
            raise self._error(f"{start + len(content)} of {self._size} bytes")
        for k in range(missing[0], missing[-1] + 1):
            offset = k * BLOCK - start
            block = content[offset : offset + BLOCK]
            if block_digest(block) != self._digests[k]:
                raise self._error("its content does not match its digests in the index")
            self._blocks[k] = block

    def _forget(self) -> None:
        while len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)


class DigestedFile(io.RawIOBase):
    """A file for writing that computes the digests of its content and of its blocks.

    Once it is `abandoned`, nothing more is written.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__()
        self._file = file
        self._whole = hashlib.sha256()
        self._rest = b""
        self._digests = list[int]()
        self.size = 0
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, content: Any) -> int:
        content = bytes(content)
        if self.abandoned:
            return len(content)
        self._file.write(content)
        self._whole.update(content)
        self.size += len(content)
        rest = self._rest + content
        full = len(rest) - len(rest) % BLOCK
        for start in range(0, full, BLOCK):
            self._digests.append(block_digest(rest[start : start + BLOCK]))
        self._rest = rest[full:]
        return len(content)

    def digest(self) -> str:
        """Return the digest of what was written, as `digests.digest` does."""
        return self._whole.hexdigest()[:16]

    def blocks(self) -> np.ndarray:
        """Return the digests of all blocks."""
        digests = list(self._digests)
        if self._rest:
            digests.append(block_digest(self._rest))
        return np.array(digests, dtype=np.uint64)


def block_digest(content: bytes) -> int:
    """Return the first eight bytes of the SHA-256 digest of a block, as one number."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
