"""Protocols for features that a target network can have.

Any `nn.Module` can be decomposed. A network that has the attributes of a protocol is treated as
such; it does not need to inherit from anything in this module.
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


@runtime_checkable
class HasNetwork(Protocol):
    """A LightningModule around a target network."""

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        ...


def vocab_of(network: nn.Module) -> int | None:
    """Return the number of tokens that a language model knows; None for other networks.

    >>> from spd_lightning.targets.toy import TMS
    >>> vocab_of(TMS(5, 2)) is None
    True
    """
    if isinstance(network, LanguageTarget):
        return int(network.vocab)
    return None


def context_of(network: nn.Module) -> int | None:
    """Return the number of positions that a network accepts; None if it has no limit."""
    if isinstance(network, HasContext):
        return int(network.context)
    return None
