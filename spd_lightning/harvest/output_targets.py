"""The outputs that prompt graphs explain, and their sources, as a user names them: tokens, nodes,
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from spd_lightning.attribution.outputs import (
    LogitAbove,
    OutputNodes,
    Outputs,
    Reading,
    at_positions,
    centered,
    given_tokens,
    logits,
)
from spd_lightning.decomposition.intervention import Place, place
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, nearest
from spd_lightning.harvest.rows import Names


@dataclass(frozen=True)
class OutputTargets:
    """The outputs of a language model that are nodes of its graphs, and the quantity they stand
    for.

    Args:
        tokens: these at every position, by what they look like or by id; those that are likely
            there if left out.
        contrast: nodes stand for their logit above this token's.
        centered: nodes stand for their logit above the mean of all.
        positions: output nodes at these positions only, counted from the end where negative; all if
            left out.
    """

    tokens: Sequence[int | str] | None = None
    contrast: int | str | None = None
    centered: bool = False
    positions: Sequence[int] | None = None

    def __post_init__(self):
        if self.centered and self.contrast is not None:
            raise BadInput(
                f"outputs: centered, and contrast {self.contrast!r}: a difference has no mean; "
                "leave one out"
            )

    def outputs(self, likely: OutputNodes, output: Tensor, names: Names) -> Outputs:
        """The output nodes of a batch with outputs [batch, pos, vocab]; names: what tokens look
        like.

        Raises:
            BadInput: there is no such token or position.
        """
        _, length, vocab = output.shape
        nodes = (
            likely
            if self.tokens is None
            else given_tokens([token_id(t, vocab, names) for t in self.tokens])
        )
        for position in self.positions or ():
            if not -length <= position < length:
                raise BadInput(
                    f"position {position} in outputs: a prompt has {length}; take −{length} to "
                    f"{length - 1}"
                )
        nodes = nodes if self.positions is None else at_positions(nodes, self.positions)
        return Outputs(nodes, self._reading(vocab, names))

    def _reading(self, vocab: int, names: Names) -> Reading:
        if self.contrast is not None:
            return LogitAbove(token_id(self.contrast, vocab, names))
        return centered if self.centered else logits


def token_id(token: int | str, vocab: int, names: Names) -> int:
    """A token's id, from the id or from what it looks like.

    Raises:
        BadInput: there is none.
    """
    if isinstance(token, int):
        if not 0 <= token < vocab:
            raise BadInput(
                f"token {token} in outputs: the vocabulary has {vocab}; take 0 to {vocab - 1}"
            )
        return token
    known = names(list(range(vocab)))
    if token not in known:
        raise BadInput(
            f"token {token!r} in outputs: not one of the vocabulary's; {nearest(token, known)}"
        )
    return known.index(token)


def thresholds(
    model: ComponentModel, names: Sequence[str], threshold: float, length: int
) -> dict[str, Tensor]:
    """Importances [pos, C] above which the components that are named are nodes; out of reach for
    all others.

    Args:
        names: `layer:component`, `layer:pos:component`, or an fnmatch pattern of layers for all of
            theirs.
        threshold: that of the named.
        length: how many positions there are; models without any have one.

    Raises:
        BadInput: a name names nothing.
    """
    device = next(model.parameters()).device
    found = {
        site: torch.full((length, C), torch.inf, device=device) for site, C in model.counts.items()
    }
    for name in names:
        for at in _places(model, name):
            if beyond := [p for p in at.positions or () if p >= length]:
                raise BadInput(
                    f"nodes '{name}': there is no position {beyond[0]}; a prompt has {length}"
                )
            rows = slice(None) if at.positions is None else list(at.positions)
            found[at.site][rows, at.component] = threshold
    return found


def _places(model: ComponentModel, name: str) -> list[Place]:
    if ":" in name:
        return [place(model, name)]
    sites = [site for site in model.sites if fnmatchcase(site, name)]
    if not sites:
        raise BadInput(f"nodes '{name}': no such layer; {nearest(name, model.sites)}")
    return [Place(site, c) for site in sites for c in range(model.counts[site])]
