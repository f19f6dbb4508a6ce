"""Optimized importance: the smallest circuit that answers one objective about one prompt (section A
of docs/method.md).

The importance function answers for every input and every output at once. For one prompt and one
position its answer can be made smaller:

    loss of a row = D under stochastic and ci masks [+ D under an adversary's] + λ · minimality (L2)

1. *Ask.* What the target says at one position; D is the cross-entropy of a label there, or the KL
   from the target.
2. *Descend.* AdamW on the pre-sigmoid values of the components with g > 0, from where the
   importance function puts them; all others stay at importance 0, and the model stands still. A
   *row* is one prompt under one λ. Rows share nothing but the random draws of their prompt, so in a
   batch each ends where it would have ended alone; a row whose loss has settled is left as it is.
3. *Judge.* How many components are left, and how probable the label is under ci, stochastic and
   adversarial masks. A small circuit that an adversary can break is not a circuit.

Not here: which λ to take is up to the caller (`select_circuits` has a rule), graphs of the result
are in `prompt_graphs`.
"""

from collections.abc import Callable, Mapping
from math import inf, nan
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.attribution.circuit_objective import CircuitObjective, CircuitSearch
from spd_lightning.decomposition.losses import powered
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import Diverged


class Frontier(NamedTuple):
    """The result of every row: how small, and how accurate.

    prompt, lambdas, steps [rows]: which prompt under which λ, steps taken; the first row of every
    prompt has no λ (NaN) and is what the importance function says itself. nodes: components with g
    > 0 at all positions; important: those above the threshold. loss: D [rows] under ci, stochastic
    and adversarial masks. probability: the label's [rows] under these and under the target; None on
    vectors. label [rows]: that token. kept: the share of the target's answer that the adversary
    leaves: of the label's probability, or on vectors of the outputs' mean square.
    """

    prompt: Int[Tensor, " rows"]
    lambdas: Float[Tensor, " rows"]
    steps: Int[Tensor, " rows"]
    nodes: Int[Tensor, " rows"]
    important: Int[Tensor, " rows"]
    loss: dict[str, Tensor]
    probability: dict[str, Tensor] | None
    label: Int[Tensor, " rows"] | None
    kept: Float[Tensor, " rows"]


class Circuits(NamedTuple):
    """Importances of every row, prompt by prompt and λ by λ: {site: [rows, (pos,) C]}, and the
    frontier.

    The first row of every prompt is not optimized.
    """

    importances: dict[str, Tensor]
    frontier: Frontier


def optimize(
    model: ComponentModel, inputs: Tensor, search: CircuitSearch | None = None
) -> Circuits:
    """The importances that keep what the target says at one position with as few components as λ
    makes worth while.

    inputs: [prompts, features] floating point, or [prompts, pos] token ids.

    Raises:
        BadInput: a position or a label that the model does not have, or a loss that does not suit
            it.
    """
    search = search or CircuitSearch()
    objective = CircuitObjective(model, inputs, search)
    descent = ImportanceOptimization(objective)
    for _ in range(search.steps):
        if not descent.running.any():
            break
        descent.step()
    with torch.no_grad():
        g = descent.importances(torch.arange(len(descent.running), device=inputs.device))
    frontier = _frontier(objective, descent, g)
    for masks, loss in {"optimized": descent.loss, **frontier.loss}.items():
        if not loss.isfinite().all():
            row = int(loss.isfinite().int().argmin())
            where = f"prompt {int(descent.prompt[row])} at lambda {float(descent.lambdas[row])}"
            raise Diverged(
                f"the circuit search's loss ({masks}) of {where} is {float(loss[row])} "
                f"after {int(descent.taken[row])} steps",
                "lower search.lr",
            )
    return Circuits(g, frontier)


def select_circuits(frontier: Frontier, share: float) -> list[int]:
    """Choose one optimized row per prompt: the smallest whose answer keeps a given share under the
    adversary.

    Where none does, the one that keeps most, to a hundredth; of equals, the one with the least loss
    under ci masks.
    """
    kept, nodes, loss = (
        column.tolist() for column in (frontier.kept, frontier.nodes, frontier.loss["ci"])
    )

    def rank(row: int) -> tuple[bool, float, float]:
        enough = kept[row] >= share
        return enough, float(-nodes[row]) if enough else round(kept[row], 2), -loss[row]

    of_prompt = dict[int, list[int]]()
    for row in (~frontier.lambdas.isnan()).nonzero()[:, 0].tolist():
        of_prompt.setdefault(int(frontier.prompt[row]), []).append(row)
    return [max(rows, key=rank) for rows in of_prompt.values()]


# ---- the descent ---------------------------------------------------------------------------------


class ImportanceOptimization:
    """The importances of all rows, on their way down.

    Attributes:
        values: pre-sigmoid values [nodes] of the components with g > 0, of all rows and sites.
        lambdas [rows]: NaN where nothing is optimized.
        loss [rows]: of the newest step; 0 where nothing is optimized.
        running [rows]: whose loss has not settled. taken [rows]: steps so far.
    """

    def __init__(self, objective: CircuitObjective):
        self.objective, search = objective, objective.search
        z = objective.z
        prompts = len(objective.inputs)
        lambdas = [nan, *search.lambdas]
        self.importance = objective.model.importance
        self.shapes = {name: v.shape[1:] for name, v in z.items()}
        flat = torch.cat([v.flatten(1) for v in z.values()], dim=1)
        self.width = flat.shape[1]
        self.positions = next(iter(z.values()))[0, ..., 0].numel()
        alive = self._lower(flat) > 0
        self.at = alive.repeat_interleave(len(lambdas), 0).flatten().nonzero()[:, 0]
        self.row = self.at // self.width
        self.prompt = torch.arange(prompts, device=flat.device).repeat_interleave(len(lambdas))
        self.lambdas = torch.tensor(lambdas, dtype=torch.float64, device=flat.device).repeat(
            prompts
        )
        self.values = nn.Parameter(self._capped(flat)[self.prompt].flatten()[self.at])
        self.optimizer = torch.optim.AdamW([self.values], lr=search.lr, weight_decay=0.0)
        self.running = ~self.lambdas.isnan()
        self.taken = torch.zeros_like(self.prompt)
        self.loss = torch.zeros_like(self.lambdas)  # of each row's newest step
        self.sum = torch.zeros_like(self.lambdas)
        self.last = torch.full_like(self.lambdas, inf)
        self.generators = objective.generators("descent")

    def _lower(self, z: Tensor) -> Tensor:
        return self.importance({"": z}).lower[""]

    def _capped(self, z: Tensor) -> Tensor:
        """Where a sigmoid is flat above 1, one need not come down from far above to be heard."""
        capped = z.clamp(max=1)
        return torch.where(self._lower(capped) == self._lower(z), capped, z)

    def importances(self, rows: Int[Tensor, " rows"]) -> dict[str, Tensor]:
        """g of some rows [rows, (pos,) C], by site; 0 where no value is."""
        place = torch.full_like(self.prompt, -1).index_copy(
            0, rows, torch.arange(len(rows), device=rows.device)
        )
        mine = place[self.row] >= 0
        at = self.at[mine] + (place[self.row[mine]] - self.row[mine]) * self.width
        g = self._lower(self.values[mine])
        flat = g.new_zeros(len(rows) * self.width).index_put((at,), g).view(len(rows), self.width)
        parts = flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            n: part.view(-1, *shape)
            for (n, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def step(self) -> None:
        """One update of all rows that are running; afterwards some of them may be finished."""
        rows = self.running.nonzero()[:, 0]
        self.optimizer.zero_grad()
        with torch.enable_grad():
            losses = self._losses(rows)
            losses.sum().backward()
        before = self.values.detach().clone()
        self.optimizer.step()
        with torch.no_grad():  # the momentum of what is finished must not move it
            self.values.copy_(torch.where(self.running[self.row], self.values, before))
        self.taken += self.running
        self._finish(rows, losses.detach())

    def _losses(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        objective = self.objective
        search = self.objective.search
        prompt = self.prompt[rows]
        g = self.importances(rows)
        masks = [objective.sample_masks(kind, g, prompt, self.generators) for kind in search.masks]
        loss = torch.stack([objective.loss(each, prompt) for each in masks]).mean(0)
        if search.adversary is not None:
            worst = objective.adversarial_masks(search.adversary, g, prompt, self.generators)
            loss = loss + search.adversarial * objective.loss(worst, prompt)
        return loss + self.lambdas[rows].to(loss.dtype) * self._minimality()[rows]

    def _minimality(self) -> Float[Tensor, " rows"]:
        """L2 of every row, less what components of importance 0 add to it, which is constant."""
        upper = powered(self.importance({"": self.values}).upper[""], self.objective.search.p)
        return upper.new_zeros(len(self.prompt)).index_add(0, self.row, upper) / self.positions

    def _finish(self, rows: Int[Tensor, " rows"], losses: Float[Tensor, " rows"]) -> None:
        """At the end of every window of steps, rows whose mean loss has settled are finished."""
        search = self.objective.search
        self.sum[rows] += losses.double()
        self.loss[rows] = losses.double()
        if int(self.taken.max()) % search.patience:
            return
        mean = self.sum / search.patience
        self.sum = torch.zeros_like(self.sum)
        self.running &= (mean - self.last).abs() > search.tolerance * mean.abs()
        self.last = mean


# ---- the judgment --------------------------------------------------------------------------------


def _frontier(
    objective: CircuitObjective, descent: ImportanceOptimization, g: Mapping[str, Tensor]
) -> Frontier:
    search, prompt = objective.search, descent.prompt
    answers = _answers(objective, g, prompt)
    loss = _means(answers, lambda answer: objective.distance(answer, prompt))
    label, probability = None, None
    if objective.label is not None:
        label = objective.label[prompt]
        answers = {"target": [objective.answer[prompt]], **answers}
        probability = _means(
            answers, lambda answer: objective.log_probability(answer, prompt).exp()
        )
    if probability is None:
        kept = 1 - loss["adversarial"] / objective.answer.square().mean(1).clamp(min=1e-30)[prompt]
    else:
        kept = probability["adversarial"] / probability["target"]
    nodes, important = (
        sum((v > t).flatten(1).sum(1) for v in g.values()) for t in (0.0, search.threshold)
    )
    assert isinstance(nodes, Tensor)
    assert isinstance(important, Tensor)
    return Frontier(
        prompt, descent.lambdas, descent.taken, nodes, important, loss, probability, label, kept
    )


def _answers(
    objective: CircuitObjective, g: Mapping[str, Tensor], prompt: Int[Tensor, " rows"]
) -> dict[str, list[Tensor]]:
    """The answers [rows, K] of every row under each kind of masks, as many as there are draws."""
    search = objective.search
    generators = objective.generators("judge")
    masks = {  # the adversary draws last: the others do not depend on it
        "ci": [objective.sample_masks("ci", g, prompt, generators)],
        "stochastic": [
            objective.sample_masks("stochastic", g, prompt, generators) for _ in range(search.draws)
        ],
        "adversarial": [objective.adversarial_masks(search.judge, g, prompt, generators)],
    }
    with torch.no_grad():
        return {
            kind: [objective.outputs(each, prompt) for each in drawn]
            for kind, drawn in masks.items()
        }


def _means(
    answers: Mapping[str, list[Tensor]], of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {
        name: torch.stack([of(answer) for answer in each]).mean(0) for name, each in answers.items()
    }
