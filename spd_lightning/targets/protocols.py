"""What the rest of the project may expect of a target network, as protocols.

Any `nn.Module` can be decomposed. These protocols name what a network offers in addition; a network
of one's own takes part by having the attributes, without inheriting from anything here.
"""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class LanguageTarget(Protocol):
    """A network that maps token ids [batch, pos] to logits [batch, pos, vocab].

    vocab: the number of tokens that it knows.
    """

    vocab: int


@runtime_checkable
class HasContext(Protocol):
    """A network that accepts at most `context` positions."""

    context: int


def vocab_of(network: nn.Module) -> int | None:
    """Return the number of tokens that a language model knows; None for other networks.

    >>> from spd_lightning.targets.toy import TMS
    >>> vocab_of(TMS(5, 2)) is None
    True
    """
    return int(network.vocab) if isinstance(network, LanguageTarget) else None


def context_of(network: nn.Module) -> int | None:
    """Return the number of positions that a network accepts; None if it has no limit."""
    return int(network.context) if isinstance(network, HasContext) else None
