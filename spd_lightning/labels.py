"""The labels of tokens, and the text that a row of labels adds up to.

A token is labeled by its text. A tokenizer that works on bytes may split one character over several
tokens. A token that holds only a part of a character is labeled by its bytes: `é` is the byte
tokens `<0xC3>` and `<0xA9>`. A token whose text happens to look like such a label is labeled by its
bytes too, so labels can always be read back.

What a tokenizer drops or changes before it makes tokens cannot be read back: see
`analysis.prompts.search_key`.
"""

import re
from collections.abc import Iterable

_AS_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def token_label(content: bytes) -> str:
    """Return the label of a token with this content: its text, or its bytes as `<0xC3>` each.

    >>> token_label(b" time"), token_label(b"\\xc3")
    (' time', '<0xC3>')
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character
        return _written_out(content)
    return _written_out(content) if is_bytes(text) else text


def is_bytes(label: str) -> bool:
    """Return whether a label gives bytes rather than text."""
    return _AS_BYTES.fullmatch(label) is not None


def joined(labels: Iterable[str]) -> str:
    """Return the text of a row of labels; bytes next to each other become characters again.

    Bytes of a character that is not whole, as at the edge of a window, become U+FFFD.

    >>> joined(["caf", "<0xC3>", "<0xA9>"])
    'café'
    """
    return b"".join(map(_content, labels)).decode("utf-8", errors="replace")


def _written_out(content: bytes) -> str:
    return "".join(f"<0x{byte:02X}>" for byte in content)


def _content(label: str) -> bytes:
    """The bytes behind a label."""
    if not is_bytes(label):
        return label.encode("utf-8")
    digits = label.replace("<0x", "").replace(">", "")
    return bytes.fromhex(digits)
