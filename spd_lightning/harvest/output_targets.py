"""The outputs that prompt graphs explain, and the components in them, as users name them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from spd_lightning.attribution.outputs import (
    LogitDifference,
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
    """The outputs of a language model that are nodes of its graphs.

    A node stands for the logit of its token, unless `contrast` or `centered` is set.

    Args:
        tokens: the tokens that are nodes at every position, as text or ids; the likely tokens of
            each position if omitted.
        contrast: a token whose logit is subtracted from the logits of all nodes, as text or id.
        centered: whether to subtract the mean logit of all tokens.
        positions: the positions of output nodes; negative ones count from the end. All positions if
            omitted.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import Decomposition, InductionHead, InductionTokens
        >>> from spd_lightning import OutputTargets, PromptGraphs, Store
        >>> graphs = PromptGraphs(outputs=OutputTargets(tokens=[2, 3], contrast=1, positions=[-1]))
        >>> module = Decomposition(InductionHead(8, d_model=6, seq_len=5), {"h.*.attn.*": 7})
        >>> trainer = L.Trainer(callbacks=[graphs], default_root_dir="mine")
        >>> _ = trainer.predict(module, InductionTokens(8, seq_len=5, batch_size=1))
        >>> set(Store("mine/harvest/graphs-unmasked").scan("outputs").collect()["token_id"])
        {2, 3}
    """

    tokens: Sequence[int | str] | None = None
    contrast: int | str | None = None
    centered: bool = False
    positions: Sequence[int] | None = None

    def __post_init__(self):
        if self.centered and self.contrast is not None:
            raise BadInput(
                f"outputs: centered and contrast {self.contrast!r} exclude each other; "
                "leave one out"
            )

    def outputs(self, likely: OutputNodes, output: Tensor, names: Names) -> Outputs:
        """Return the output nodes of a batch with outputs [batch, pos, vocab].

        Raises:
            BadInput: a token or position does not exist.
        """
        _, length, vocab = output.shape
        nodes = likely
        if self.tokens is not None:
            tokens = [token_id(token, vocab, names) for token in self.tokens]
            nodes = given_tokens(tokens)
        for position in self.positions or ():
            if not -length <= position < length:
                raise BadInput(
                    f"position {position} in outputs: a prompt has {length} positions; take "
                    f"−{length} to {length - 1}"
                )
        if self.positions is not None:
            nodes = at_positions(nodes, self.positions)
        reading = self._reading(vocab, names)
        return Outputs(nodes, reading)

    def _reading(self, vocab: int, names: Names) -> Reading:
        """Return the function of the logits that nodes stand for."""
        if self.contrast is not None:
            token = token_id(self.contrast, vocab, names)
            return LogitDifference(token)
        if self.centered:
            return centered
        return logits


def token_id(token: int | str, vocab: int, names: Names) -> int:
    """Return the id of a token that is given by its id or text.

    Raises:
        BadInput: the token does not exist.
    """
    if isinstance(token, int):
        if not 0 <= token < vocab:
            raise BadInput(
                f"token {token} in outputs: the vocabulary has {vocab} tokens; take 0 to "
                f"{vocab - 1}"
            )
        return token
    known = names(list(range(vocab)))
    if token not in known:
        raise BadInput(
            f"token {token!r} in outputs: not one of the vocabulary; {nearest(token, known)}"
        )
    return known.index(token)


def thresholds(
    model: ComponentModel, names: Sequence[str], threshold: float, length: int
) -> dict[str, Tensor]:
    """Return the importances [pos, C] above which the named components are nodes.

    The threshold of all other components is infinite.

    Args:
        model: the decomposed model.
        names: `layer:component`, `layer:pos:component`, or an fnmatch pattern of layers, which
            names all of their components.
        threshold: the importance above which a named component is a node.
        length: the number of positions; 1 for models without positions.

    Raises:
        BadInput: a layer, component or position does not exist.
    """
    parameter = next(model.parameters())
    device = parameter.device
    by_site = {}
    for site, C in model.counts.items():
        shape = (length, C)
        by_site[site] = torch.full(shape, torch.inf, device=device)
    for name in names:
        for named in _places(model, name):
            if named.positions is None:
                by_site[named.site][:, named.component] = threshold
                continue
            for position in named.positions:
                if position >= length:
                    raise BadInput(
                        f"nodes '{name}': there is no position {position}; a prompt has {length}"
                    )
            by_site[named.site][list(named.positions), named.component] = threshold
    return by_site


def _places(model: ComponentModel, name: str) -> list[Place]:
    """Return the components that a name or a pattern names."""
    if ":" in name:
        return [place(model, name)]
    sites = [site for site in model.sites if fnmatchcase(site, name)]
    if not sites:
        raise BadInput(f"nodes '{name}': no such layer; {nearest(name, model.sites)}")
    places = []
    for site in sites:
        C = model.counts[site]
        places += [Place(site, component) for component in range(C)]
    return places
