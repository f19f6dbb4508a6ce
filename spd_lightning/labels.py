"""The labels of tokens, and the text of a row of labels.

A token is labeled by its text. A tokenizer that works on bytes can split one character into several
tokens. A token that is only a part of a character is labeled by its bytes: `é` becomes the tokens
`<0xC3>` and `<0xA9>`. A token whose text happens to look like such a label is labeled by its bytes,
too, so that every label can be decoded.

Anything that a tokenizer drops or changes before it makes tokens is lost; see
`analysis.prompts.search_key`.
"""

import re
from collections.abc import Iterable

_AS_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def token_label(content: bytes) -> str:
    """Return the label of a token: its text, or each of its bytes as `<0xC3>`.

    >>> token_label(b" time"), token_label(b"\\xc3")
    (' time', '<0xC3>')
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character
        return _byte_label(content)
    return _byte_label(content) if is_bytes(text) else text


def is_bytes(label: str) -> bool:
    """Return whether a label gives bytes rather than text."""
    return _AS_BYTES.fullmatch(label) is not None


def joined(labels: Iterable[str]) -> str:
    """Return the text of a row of labels; adjacent bytes become characters again.

    The bytes of an incomplete character, for example at the edge of a window, become U+FFFD.

    >>> joined(["caf", "<0xC3>", "<0xA9>"])
    'café'
    """
    content = b"".join(map(_content, labels))
    return content.decode("utf-8", errors="replace")


def _byte_label(content: bytes) -> str:
    return "".join(f"<0x{byte:02X}>" for byte in content)


def _content(label: str) -> bytes:
    """Return the bytes of the token with this label."""
    if not is_bytes(label):
        return label.encode("utf-8")
    digits = label.replace("<0x", "")
    digits = digits.replace(">", "")
    return bytes.fromhex(digits)
