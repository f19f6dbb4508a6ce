"""The objective of a circuit search: how far the masked model's output is from the target's at one
position.

`circuit_search` minimizes this distance D under stochastic and adversarial masks. Several rows of a
batch may hold the same prompt. The masks drawn for a prompt depend on its content alone, not on the
other rows of the batch.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.masks import (
    Sources,
    masks_from_sources,
    stochastic_sources,
    uniform,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import kl_rows, mse_rows
from spd_lightning.errors import BadInput, check_range

Loss = Literal["ce", "kl", "mse"]
Masks = Literal["stochastic", "ci"]


@dataclass(frozen=True)
class CircuitSearch:
    """How the smallest circuits are looked for.

    Args:
        lambdas: weights of the minimality loss, each tried on every prompt.
        p: exponent of the minimality loss (L2).
        masks: what the answer is asked for under; several are averaged. Graphs of mode `ci_masked`
            show the model under ci masks, of which stochastic ones alone do not ask that it answers
            well.
        loss: how answers are compared: ce (a label's cross-entropy) or kl (from the target) at one
            position, mse over all outputs of models on vectors. Left out: ce, or mse on vectors.
        position: the token position that is asked about; negative ones count from the end.
        label: the token whose probability should stay; the target's most probable one if omitted.
        steps: of the descent, at most.
        lr: AdamW's.
        adversary: takes part in the descent, afresh in every step; none if omitted.
        adversarial: weight of the loss under its masks.
        patience: a row is finished when the mean loss of so many steps has settled: it is that of
            as many before.
        tolerance: how far apart the two may be, as a share of the loss.
        judge: the fresh adversary that results are judged by.
        draws: stochastic masks that results are averaged over.
        threshold: importance above which a component counts as important.
        seed: of all draws.
    """

    lambdas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    p: float = 0.3
    masks: tuple[Masks, ...] = ("stochastic", "ci")
    loss: Loss | None = None
    position: int = -1
    label: int | None = None
    steps: int = 400
    lr: float = 0.02
    adversary: Adversary | None = None
    adversarial: float = 1.0
    patience: int = 50
    tolerance: float = 0.01
    judge: Adversary = field(default_factory=Adversary)
    draws: int = 16
    threshold: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not self.lambdas:
            raise BadInput("lambdas [] of a search: they weigh a loss; give at least one")
        if not self.masks:
            raise BadInput(
                "masks [] of a search: answers are asked for under some; take stochastic, ci or "
                "both"
            )
        check_range(
            "search",
            least=0,
            lambdas=self.lambdas,
            adversarial=self.adversarial,
            tolerance=self.tolerance,
        )
        check_range("search", above=0, p=self.p, lr=self.lr)
        check_range("search", least=0, whole=True, steps=self.steps)
        check_range("search", least=1, whole=True, patience=self.patience, draws=self.draws)
        check_range("search", least=0, most=1, threshold=self.threshold)


def suited(search: CircuitSearch, inputs: Tensor, vocab: int | None = None) -> Loss:
    """How a search compares answers to these prompts [batch, features or pos]; vocab: how many
    tokens there are.

    Raises:
        BadInput: they have no such loss, position or label.
    """
    vectors = inputs.is_floating_point()
    loss: Loss = search.loss or ("mse" if vectors else "ce")
    if vectors != (loss == "mse"):
        suits = "vectors; take mse" if vectors else "tokens; take ce or kl"
        raise BadInput(f"loss '{loss}' of a search: the model is on {suits}")
    if not vectors and not -inputs.shape[1] <= search.position < inputs.shape[1]:
        raise BadInput(
            f"position {search.position} of a search: the prompt has {inputs.shape[1]} tokens; "
            "take one"
        )
    if (
        not vectors
        and vocab is not None
        and search.label is not None
        and not 0 <= search.label < vocab
    ):
        raise BadInput(f"label {search.label} of a search: the model knows tokens 0 to {vocab - 1}")
    return loss


class CircuitObjective:
    """The target's output for each prompt, and the distance of another output from it.

    Attributes:
        z: pre-activations {site: [prompts, (pos,) C]} of the importance function on the clean run.
        answer: the target's output at the position [prompts, K].
        label: the token whose probability should stay [prompts]; None on vectors.
    """

    def __init__(self, model: ComponentModel, inputs: Tensor, search: CircuitSearch):
        self.model, self.inputs, self.search = model, inputs, search
        for adversary in (search.adversary, search.judge):
            if adversary is not None:
                adversary.check_start(model.delta, "CircuitSearch")
        self.vectors = inputs.is_floating_point()
        with torch.no_grad():
            clean = model.clean(inputs)
            self.loss_kind: Loss = suited(search, inputs, clean.output.shape[-1])
            self.z = {
                n: z.detach()
                for n, z in model.importance_function(clean.inputs, clean.inner).items()
            }
        self.answer = self._here(clean.output)
        self.label = None if self.vectors else self._label()

    def _label(self) -> Int[Tensor, " prompts"]:
        asked = self.search.label
        return (
            self.answer.argmax(-1)
            if asked is None
            else torch.full_like(self.answer[:, 0], asked, dtype=torch.long)
        )

    def _here(self, output: Tensor) -> Float[Tensor, "rows K"]:
        return output.flatten(1) if self.vectors else output[:, self.search.position]

    def outputs(
        self, masks: Mapping[str, Mask], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows K"]:
        """The answer of rows of these prompts under masks, with gradient to the masks alone."""
        return self._here(self.model.masked(self.inputs[prompt], masks, detach=True))

    def loss(
        self, masks: Mapping[str, Mask], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """D of the answers under masks."""
        return self.distance(self.outputs(masks, prompt), prompt)

    def distance(
        self, answer: Float[Tensor, "rows K"], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """D of every row."""
        match self.loss_kind:
            case "kl":
                return kl_rows(answer, self.answer[prompt])
            case "mse":
                return mse_rows(answer, self.answer[prompt])
            case "ce":
                return -self.log_probability(answer, prompt)

    def log_probability(
        self, answer: Float[Tensor, "rows K"], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return the log probability of each row's label."""
        assert self.label is not None
        answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
        return answer.log_softmax(-1).gather(-1, self.label[prompt, None])[:, 0]

    # ---- sources ----

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One a prompt, by its content: what is drawn for it does not depend on what stands beside
        it.
        """
        rows = [row.cpu().contiguous().numpy().tobytes() for row in self.inputs]
        keys = [
            hashlib.blake2b(f"{self.search.seed} {purpose} ".encode() + row, digest_size=8)
            for row in rows
        ]
        return [
            torch.Generator(self.inputs.device).manual_seed(int.from_bytes(key.digest()))
            for key in keys
        ]

    def sample_masks(
        self,
        kind: Masks,
        g: Mapping[str, Tensor],
        prompt: Int[Tensor, " rows"],
        generators: list[torch.Generator],
    ) -> dict[str, Mask]:
        """ci masks, or stochastic ones from fresh sources that are the same for all rows of a
        prompt.
        """
        if kind == "ci":
            return {name: Mask(v, 0.0) for name, v in g.items()}
        like = {n: v[:1] for n, v in g.items()}
        binomial = self.model.importance.sampling == "binomial"
        return self.masks(
            g, _by_prompt(prompt, lambda p: stochastic_sources(like, generators[p], binomial))
        )

    def adversarial_masks(
        self,
        adversary: Adversary,
        g: Mapping[str, Tensor],
        prompt: Int[Tensor, " rows"],
        generators: list[torch.Generator],
    ) -> dict[str, Mask]:
        """Masks by which a fresh adversary raises D of every row; rows do not see one another."""
        fixed = {name: v.detach() for name, v in g.items()}

        def damage(sources: Sources) -> Tensor:
            return self.loss(self.masks(fixed, sources), prompt).sum()

        start = _by_prompt(prompt, lambda p: self._opening(adversary, fixed, generators[p]))
        return self.masks(g, pgd_sources(adversary, fixed, damage, None, start))

    def masks(self, g: Mapping[str, Tensor], sources: Sources) -> dict[str, Mask]:
        """m = g + (1 − g)·s at every site."""
        return masks_from_sources(g, sources, self.model.delta)

    def _opening(
        self, adversary: Adversary, g: Mapping[str, Tensor], generator: torch.Generator
    ) -> Sources:
        """Where an adversary of one row starts; under `per_batch` with one vector for all
        positions.
        """
        found = {}
        for name, v in g.items():
            lead = v.shape[1:-1] if adversary.scope == "per_position" else [1] * (v.ndim - 2)
            shape = (1, *lead, v.shape[-1] + 1)
            match adversary.init:
                case "random":
                    start = uniform(v, shape, generator)
                case "ones":
                    start = v.new_ones(shape)
                case "zeros":
                    start = v.new_zeros(shape)
            found[name] = (start[..., :-1], start[..., -1])
        return found


def _by_prompt(prompt: Int[Tensor, " rows"], of: Callable[[int], Sources]) -> Sources:
    """Sources of one prompt each, laid out by rows."""
    rows = prompt.tolist()
    each = {p: of(p) for p in dict.fromkeys(rows)}
    return {
        name: (
            torch.cat([each[p][name][0] for p in rows]),
            torch.cat([each[p][name][1] for p in rows]),
        )
        for name in each[rows[0]]
    }
