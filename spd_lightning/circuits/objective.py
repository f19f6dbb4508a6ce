"""The objective of a circuit search: the distance of a masked model's output from the target's.

`search` minimizes this distance D at one position under stochastic and adversarial masks.
Several rows of a batch can hold the same prompt. The masks drawn for a prompt depend only on its
content, not on the other rows of the batch.
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
from spd_lightning.decomposition.divergences import kl_rows, mse_rows
from spd_lightning.decomposition.masks import (
    Sources,
    masks_from_sources,
    stochastic_sources,
    uniform,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput, check_range

Loss = Literal["ce", "kl", "mse"]
Masks = Literal["stochastic", "ci"]


@dataclass(frozen=True)
class CircuitSearch:
    """Settings of the search for the smallest circuits.

    Args:
        lambdas: weights of the minimality loss; each is tried on every prompt.
        p: exponent of the minimality loss (L2).
        masks: kinds of masks used in the objective; their losses are averaged. Include `ci` to draw
            `ci_masked` graphs: optimizing under stochastic masks alone does not make the model
            accurate under ci masks.
        loss: ce (the cross-entropy of a label) or kl (from the target) at one position, or mse over
            all outputs for models on vectors. If omitted: ce, or mse on vectors.
        position: the token position whose prediction should stay; negative ones count from the end.
        label: the token whose probability should stay; the target's most probable one if omitted.
        steps: the largest number of optimization steps.
        lr: the learning rate of AdamW.
        adversary: an adversary whose masks are added to the objective, started again in every
            step; none if omitted.
        adversarial: weight of the loss under its masks.
        patience: a row stops if its mean loss over this many steps has settled.
        tolerance: the relative change between two such means below which a row has settled.
        judge: the fresh adversary against which results are evaluated.
        draws: the number of stochastic masks over which results are averaged.
        threshold: the importance above which a component counts as important.
        seed: the seed of all draws.

    Examples:
        >>> import torch
        >>> from spd_lightning import CircuitSearch, ComponentModel, InductionHead, optimize
        >>> model = ComponentModel(InductionHead(8, d_model=6, seq_len=5), {"h.*.attn.*": 7})
        >>> search = CircuitSearch(lambdas=(0.01, 0.1), position=-1, label=7, steps=20)
        >>> frontier = optimize(model, torch.tensor([[0, 3, 7, 2, 3]]), search).frontier
        >>> frontier.lambdas.tolist()  # the first row is the importance function's own
        [nan, 0.01, 0.1]
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
            raise BadInput(
                "lambdas [] of a search: give at least one weight of the minimality loss"
            )
        if not self.masks:
            raise BadInput("masks [] of a search: give stochastic, ci or both")
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


def check_search(search: CircuitSearch, inputs: Tensor, vocab: int | None = None) -> Loss:
    """Return how a search compares outputs, once it is known to suit these prompts.

    inputs: [batch, features] or [batch, pos]. vocab: the number of tokens that the model knows.

    Raises:
        BadInput: the prompts have no such loss, position or label.
    """
    vectors = inputs.is_floating_point()
    usual: Loss = "mse" if vectors else "ce"
    loss = search.loss or usual
    is_for_vectors = loss == "mse"
    if vectors != is_for_vectors:
        suits = "vectors; take mse" if vectors else "tokens; take ce or kl"
        raise BadInput(f"loss '{loss}' of a search: the model is on {suits}")
    if vectors:
        return loss
    length = inputs.shape[1]
    if not -length <= search.position < length:
        raise BadInput(
            f"position {search.position} of a search: the prompt has {length} tokens; take one"
        )
    label = search.label
    if vocab is None or label is None:
        return loss
    if not 0 <= label < vocab:
        raise BadInput(f"label {label} of a search: the model knows tokens 0 to {vocab - 1}")
    return loss


class CircuitObjective:
    """The target's output for each prompt, and the distance of another output from it.

    Attributes:
        z: pre-activations {site: [prompts, (pos,) C]} of the importance function on the clean run.
        answer: the target's output at the position [prompts, K].
        label: the token whose probability should stay [prompts]; None on vectors.
    """

    def __init__(self, model: ComponentModel, inputs: Tensor, search: CircuitSearch):
        self.model = model
        self.inputs = inputs
        self.search = search
        for adversary in (search.adversary, search.judge):
            if adversary is not None:
                adversary.check_start(model.delta, "CircuitSearch")
        self.vectors = inputs.is_floating_point()
        with torch.no_grad():
            clean = model.clean(inputs)
            vocab = clean.output.shape[-1]
            self.loss_kind: Loss = check_search(search, inputs, vocab)
            z = model.importance_function(clean.inputs, clean.inner)
        self.z = {site: values.detach() for site, values in z.items()}
        self.answer = self._at_position(clean.output)
        self.label = None if self.vectors else self._label()

    def _label(self) -> Int[Tensor, " prompts"]:
        """Return the token whose probability should stay, for each prompt."""
        label = self.search.label
        if label is None:
            return self.answer.argmax(-1)
        return torch.full_like(self.answer[:, 0], label, dtype=torch.long)

    def _at_position(self, output: Tensor) -> Float[Tensor, "rows K"]:
        """Select the outputs that the search explains: all on vectors, those at its position."""
        if self.vectors:
            return output.flatten(1)
        return output[:, self.search.position]

    # ---- distance --------------------------------------------------------------------------------

    def outputs(
        self, masks: Mapping[str, Mask], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows K"]:
        """Return the outputs of some prompts under masks, with gradients to the masks only."""
        inputs = self.inputs[prompt]  # [rows, ...]
        output = self.model.masked(inputs, masks, detach=True)
        return self._at_position(output)

    def loss(
        self, masks: Mapping[str, Mask], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return D of the outputs under masks."""
        outputs = self.outputs(masks, prompt)
        return self.distance(outputs, prompt)

    def distance(
        self, output: Float[Tensor, "rows K"], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return D of some outputs."""
        match self.loss_kind:
            case "kl":
                answer = self.answer[prompt]
                return kl_rows(output, answer)
            case "mse":
                answer = self.answer[prompt]
                return mse_rows(output, answer)
            case "ce":
                return -self.log_probability(output, prompt)

    def log_probability(
        self, output: Float[Tensor, "rows K"], prompt: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return the log probability of each row's label."""
        assert self.label is not None
        at_least_float32 = torch.promote_types(output.dtype, torch.float32)
        output = output.to(at_least_float32)
        log_probabilities = output.log_softmax(-1)  # [rows, vocab]
        label = self.label[prompt, None]  # [rows, 1]
        return log_probabilities.gather(-1, label)[:, 0]

    # ---- masks -----------------------------------------------------------------------------------

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a generator for each prompt, seeded by its content alone."""
        generators = []
        for row in self.inputs:
            content = row.cpu().contiguous().numpy().tobytes()
            prefix = f"{self.search.seed} {purpose} "
            digest = hashlib.blake2b(prefix.encode() + content, digest_size=8).digest()
            seed = int.from_bytes(digest)
            generator = torch.Generator(self.inputs.device)
            generators.append(generator.manual_seed(seed))
        return generators

    def sample_masks(
        self,
        kind: Masks,
        g: Mapping[str, Tensor],
        prompt: Int[Tensor, " rows"],
        generators: list[torch.Generator],
    ) -> dict[str, Mask]:
        """Return ci masks, or stochastic ones that all rows of a prompt share."""
        if kind == "ci":
            return {site: Mask(values, 0.0) for site, values in g.items()}
        one_row = {site: values[:1] for site, values in g.items()}
        binomial = self.model.importance.sampling == "binomial"

        def draw(p: int) -> Sources:
            """Draw the sources of one prompt."""
            generator = generators[p]
            return stochastic_sources(one_row, generator, binomial)

        sources = _by_prompt(prompt, draw)
        return self.masks(g, sources)

    def adversarial_masks(
        self,
        adversary: Adversary,
        g: Mapping[str, Tensor],
        prompt: Int[Tensor, " rows"],
        generators: list[torch.Generator],
    ) -> dict[str, Mask]:
        """Return masks with which a fresh adversary raises D of every row by itself."""
        fixed_g = {site: values.detach() for site, values in g.items()}

        def total_loss(sources: Sources) -> Tensor:
            """Return the sum of D over rows; its gradient is that of each row by itself."""
            masks = self.masks(fixed_g, sources)
            loss = self.loss(masks, prompt)
            return loss.sum()

        def start(p: int) -> Sources:
            """Return the sources from which the climbs of a prompt's rows start."""
            generator = generators[p]
            return self._start(adversary, fixed_g, generator)

        first = _by_prompt(prompt, start)
        worst = pgd_sources(adversary, fixed_g, total_loss, None, first)
        return self.masks(g, worst)

    def masks(self, g: Mapping[str, Tensor], sources: Sources) -> dict[str, Mask]:
        """Return the masks m = g + (1 − g)·s of every site."""
        return masks_from_sources(g, sources, self.model.delta)

    def _start(
        self, adversary: Adversary, g: Mapping[str, Tensor], generator: torch.Generator
    ) -> Sources:
        """Return the sources from which an adversary of one row starts.

        Under scope `per_batch`, all positions share one vector.
        """
        sources = {}
        for site, values in g.items():
            _, *positions, components = values.shape
            if adversary.scope != "per_position":
                positions = [1] * len(positions)
            shape = (1, *positions, components + 1)  # the components and the delta
            match adversary.init:
                case "random":
                    start = uniform(values, shape, generator)
                case "ones":
                    start = values.new_ones(shape)
                case "zeros":
                    start = values.new_zeros(shape)
            of_components = start[..., :-1]
            of_delta = start[..., -1]
            sources[site] = (of_components, of_delta)
        return sources


def _by_prompt(prompt: Int[Tensor, " rows"], draw: Callable[[int], Sources]) -> Sources:
    """Draw sources once for each prompt, and repeat them for all of its rows."""
    rows = prompt.tolist()
    prompts = dict.fromkeys(rows)  # each once, in order of their first rows
    by_prompt = {p: draw(p) for p in prompts}
    by_row = [by_prompt[p] for p in rows]
    sources = {}
    for site in by_row[0]:
        components, deltas = zip(*[row[site] for row in by_row], strict=True)
        sources[site] = (torch.cat(components), torch.cat(deltas))
    return sources
