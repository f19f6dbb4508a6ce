"""Optimized importance: the smallest circuit for one prediction (section A of docs/method.md).

The importance function has to suit every input and every output at once. For one prompt and one
position, fewer components can be enough:

    loss of a row = D under stochastic and ci masks [+ D under an adversary's] + λ · minimality (L2)

1. *Objective.* D compares the masked model's output at one position with the target's: it is the
   cross-entropy of a label, or the KL from the target (`objective`).
2. *Optimization.* AdamW on the pre-sigmoid values of the components with g > 0, starting from the
   values of the importance function. All other components keep importance 0, and the model does not
   change. A *row* is one prompt under one λ. Rows share nothing but the random draws of their
   prompt, so a row of a batch ends where it would have ended alone. A row whose loss has settled is
   not changed any more.
3. *Evaluation.* The number of components that are left, and the probability of the label under ci,
   stochastic and adversarial masks. A small circuit that an adversary can break is not a circuit.

Not here: the choice of λ is the caller's (`select_circuits` has a rule), and graphs of the result
are those of `attribution.prompt_graphs`.
"""

from collections.abc import Callable, Mapping
from math import inf, nan
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spd_lightning.circuits.objective import CircuitObjective, CircuitSearch
from spd_lightning.decomposition.losses import powered
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import Diverged


class Frontier(NamedTuple):
    """The result of every row: the size of its circuit, and how accurate it is.

    prompt: the number of the prompt in the batch.
    lambdas: λ. The first row of every prompt has none (NaN): it is the importance function's own.
    steps: the number of steps taken.
    nodes: the number of components with g > 0, over all positions.
    important: the number of those above the threshold.
    loss: D [rows] under ci, stochastic and adversarial masks.
    probability: the label's probability [rows] under these masks and in the target; None for
        models on vectors.
    label: the token whose probability should stay.
    kept: the share that the adversary leaves of the label's probability; on vectors, of the mean
        square of the outputs.
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
    """Importances {site: [rows, (pos,) C]} prompt by prompt and λ by λ, and their frontier.

    The first row of every prompt is not optimized.
    """

    importances: dict[str, Tensor]
    frontier: Frontier


def optimize(
    model: ComponentModel, inputs: Tensor, search: CircuitSearch | None = None
) -> Circuits:
    """Find importances that preserve the output at one position with as few components as possible.

    inputs: [prompts, features] floating point, or [prompts, pos] token ids.

    Raises:
        BadInput: the model has no such position or label, or the loss does not suit it.
        Diverged: a loss is not finite.

    Examples:
        >>> import torch
        >>> from spd_lightning import TMS, CircuitSearch, ComponentModel, optimize
        >>> _ = torch.manual_seed(0)
        >>> model = ComponentModel(TMS(5, 2), sites={"linear*": 20})
        >>> one_feature = 0.75 * torch.eye(5)[:1]
        >>> circuits = optimize(model, one_feature, CircuitSearch(lambdas=(0.0001, 10.0), steps=50))
        >>> circuits.frontier.nodes.tolist()  # the importance function's own, then for each λ
        [22, 4, 0]
    """
    search = search or CircuitSearch()
    objective = CircuitObjective(model, inputs, search)
    optimization = ImportanceOptimization(objective)
    for _ in range(search.steps):
        if not optimization.running.any():
            break
        optimization.step()
    every_row = torch.arange(len(optimization.running), device=inputs.device)
    with torch.no_grad():
        g = optimization.importances(every_row)
    frontier = _evaluate(objective, optimization, g)
    _check_finite(optimization, frontier)
    return Circuits(g, frontier)


def _check_finite(optimization: "ImportanceOptimization", frontier: Frontier) -> None:
    """Raise Diverged if a loss is not finite."""
    losses = {"optimized": optimization.loss, **frontier.loss}
    for masks, loss in losses.items():
        is_finite = loss.isfinite()
        if is_finite.all():
            continue
        # The first row whose loss is not finite
        row = int(is_finite.int().argmin())
        prompt = int(frontier.prompt[row])
        lambda_ = float(frontier.lambdas[row])
        steps = int(frontier.steps[row])
        raise Diverged(
            f"the circuit search's loss ({masks}) of prompt {prompt} at lambda {lambda_} is "
            f"{float(loss[row])} after {steps} steps",
            "lower search.lr",
        )


def select_circuits(frontier: Frontier, share: float) -> list[int]:
    """Select one row per prompt: the smallest circuit that keeps a given share under the adversary.

    If no row of a prompt keeps that share, the row that keeps most is selected, to a hundredth. Of
    equal rows, the one with the smallest loss under ci masks is selected.
    """
    shares = frontier.kept.tolist()
    nodes = frontier.nodes.tolist()
    losses = frontier.loss["ci"].tolist()

    def rank(row: int) -> tuple[bool, float, float]:
        enough = shares[row] >= share
        size = float(nodes[row])
        quality = -size if enough else round(shares[row], 2)
        return enough, quality, -losses[row]

    is_optimized = ~frontier.lambdas.isnan()
    optimized = is_optimized.nonzero()[:, 0]
    prompts = frontier.prompt[optimized].tolist()
    rows_of_prompt = dict[int, list[int]]()
    for row, prompt in zip(optimized.tolist(), prompts, strict=True):
        rows = rows_of_prompt.setdefault(prompt, [])
        rows.append(row)
    return [max(rows, key=rank) for rows in rows_of_prompt.values()]


# ---- step 2: optimization ------------------------------------------------------------------------


class RowEntries:
    """Some entries of a matrix [rows, width], as a flat vector with a place for each of them.

    Args:
        chosen: which entries.

    Attributes:
        row: the row of every entry.
    """

    def __init__(self, chosen: Bool[Tensor, "rows width"]):
        self.rows, self.width = chosen.shape
        self.place = chosen.flatten().nonzero()[:, 0]  # in the flattened matrix
        self.row = self.place // self.width

    def gather(self, matrix: Float[Tensor, "rows width"]) -> Float[Tensor, " entries"]:
        """Select the entries of a matrix."""
        flat = matrix.flatten()
        return flat[self.place]

    def in_rows(self, rows: Int[Tensor, " some"]) -> Bool[Tensor, " entries"]:
        """Mark the entries that belong to some rows."""
        new_row = self._new_row(rows)[self.row]  # [entries]
        return new_row >= 0

    def scatter(
        self, values: Float[Tensor, " entries_there"], rows: Int[Tensor, " some"]
    ) -> Float[Tensor, "some width"]:
        """Lay out the values of the entries of some rows; other entries of these rows are 0."""
        there = self.in_rows(rows)
        old_row = self.row[there]  # [entries_there]
        new_row = self._new_row(rows)[old_row]
        moved_by = new_row - old_row
        # In a flattened matrix, a row is `width` places long.
        place = self.place[there] + moved_by * self.width
        zeros = values.new_zeros(len(rows) * self.width)
        flat = zeros.index_put((place,), values)
        return flat.view(len(rows), self.width)

    def sum_by_row(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " rows"]:
        """Add up values by row."""
        zeros = values.new_zeros(self.rows)
        return zeros.index_add(0, self.row, values)

    def _new_row(self, rows: Int[Tensor, " some"]) -> Int[Tensor, " rows"]:
        """Return the number of each row among some rows; -1 for others."""
        device = rows.device
        none = torch.full((self.rows,), -1, device=device)
        numbers = torch.arange(len(rows), device=device)
        return none.index_copy(0, rows, numbers)


class ImportanceOptimization:
    """Optimizes the importances of all rows at once.

    Attributes:
        values: pre-sigmoid values [entries] of the components with g > 0, for all rows and sites.
        prompt: the prompt of each row.
        lambdas: λ of each row [rows]; NaN for rows that are not optimized.
        loss: the loss of each row in its latest step [rows]; 0 for rows that are not optimized.
        running: which rows have not settled [rows].
        taken: the number of steps of each row [rows].
    """

    def __init__(self, objective: CircuitObjective):
        search = objective.search
        self.objective = objective
        self.search = search
        self.importance = objective.model.importance
        z = objective.z
        self.shapes = {name: values.shape[1:] for name, values in z.items()}
        first = next(iter(z.values()))  # [prompts, (pos,) C]
        self.positions = first[0, ..., 0].numel()
        flat = torch.cat([values.flatten(1) for values in z.values()], dim=1)  # [prompts, width]
        device, prompts = flat.device, len(objective.inputs)

        # The rows: every prompt once without λ, and once under each λ.
        lambdas = [nan, *search.lambdas]
        one_prompt = torch.tensor(lambdas, dtype=torch.float64, device=device)
        self.lambdas = one_prompt.repeat(prompts)
        every_prompt = torch.arange(prompts, device=device)
        self.prompt = every_prompt.repeat_interleave(len(lambdas))

        alive = self._lower_leaky(flat) > 0  # [prompts, width]
        self.entries = RowEntries(alive[self.prompt])
        start = self._cap(flat)[self.prompt]  # [rows, width]
        self.values = nn.Parameter(self.entries.gather(start))
        self.optimizer = torch.optim.AdamW([self.values], lr=search.lr, weight_decay=0.0)

        self.running = ~self.lambdas.isnan()
        self.taken = torch.zeros_like(self.prompt)
        self.loss = torch.zeros_like(self.lambdas)
        self._window_sum = torch.zeros_like(self.lambdas)
        self._last_mean = torch.full_like(self.lambdas, inf)
        self.generators = objective.generators("descent")

    def _lower_leaky(self, z: Tensor) -> Tensor:
        """Return g of pre-sigmoid values of any shape."""
        sigmoids = self.importance({"": z})
        return sigmoids.lower[""]

    def _upper_leaky(self, z: Tensor) -> Tensor:
        """Return ĝ of pre-sigmoid values of any shape."""
        sigmoids = self.importance({"": z})
        return sigmoids.upper[""]

    def _cap(self, z: Tensor) -> Tensor:
        """Lower values to 1 if g stays the same, so that they need not come down from far above."""
        capped = z.clamp(max=1)
        capped_g = self._lower_leaky(capped)
        stays = capped_g == self._lower_leaky(z)
        return torch.where(stays, capped, z)

    def importances(self, rows: Int[Tensor, " rows"]) -> dict[str, Tensor]:
        """Return g of some rows [rows, (pos,) C] by site; 0 for all other components."""
        there = self.entries.in_rows(rows)
        g = self._lower_leaky(self.values[there])
        matrix = self.entries.scatter(g, rows)  # [rows, width]: the sites side by side
        widths = [shape.numel() for shape in self.shapes.values()]
        parts = matrix.split(widths, dim=1)
        by_site = {}
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            by_site[name] = part.view(-1, *shape)
        return by_site

    def step(self) -> None:
        """Update all rows that are running; some of them may settle."""
        running = self.running
        rows = running.nonzero()[:, 0]
        self.optimizer.zero_grad()
        with torch.enable_grad():
            losses = self._losses(rows)
            total = losses.sum()
            total.backward()
        before = self.values.detach().clone()
        self.optimizer.step()
        with torch.no_grad():
            # The momentum of rows that have settled must not move them.
            moves = running[self.entries.row]  # [entries]
            values = torch.where(moves, self.values, before)
            self.values.copy_(values)
        self.taken += running
        self._settle(rows, losses.detach())

    def _losses(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the loss of some rows."""
        objective = self.objective
        search = self.search
        prompt = self.prompt[rows]
        g = self.importances(rows)
        losses = []
        for kind in search.masks:
            # D under one kind of masks, drawn again in every step
            masks = objective.sample_masks(kind, g, prompt, self.generators)
            loss = objective.loss(masks, prompt)
            losses.append(loss)
        total = torch.stack(losses).mean(0)
        adversary = search.adversary
        if adversary is not None:
            # Its climb starts again in every step.
            masks = objective.adversarial_masks(adversary, g, prompt, self.generators)
            loss = objective.loss(masks, prompt)
            total = total + search.adversarial * loss
        lambdas = self.lambdas[rows].to(total.dtype)
        minimality = self._minimality()[rows]
        return total + lambdas * minimality

    def _minimality(self) -> Float[Tensor, " rows"]:
        """Return L2 of every row, without the constant part of components with importance 0."""
        upper = self._upper_leaky(self.values)  # [entries]: ĝ
        powers = powered(upper, self.search.p)  # (ĝ + ε)^p
        by_row = self.entries.sum_by_row(powers)
        return by_row / self.positions

    def _settle(self, rows: Int[Tensor, " rows"], losses: Float[Tensor, " rows"]) -> None:
        """At the end of a window of steps, stop the rows whose mean loss has settled."""
        search = self.search
        losses = losses.double()
        self._window_sum[rows] += losses
        self.loss[rows] = losses
        steps = int(self.taken.max())
        if steps % search.patience:
            # All running rows have taken the same number of steps: the window is not over.
            return
        mean = self._window_sum / search.patience
        change = mean - self._last_mean
        self.running &= change.abs() > search.tolerance * mean.abs()
        self._last_mean = mean
        self._window_sum = torch.zeros_like(mean)


# ---- step 3: evaluation --------------------------------------------------------------------------


def _evaluate(
    objective: CircuitObjective, optimization: ImportanceOptimization, g: Mapping[str, Tensor]
) -> Frontier:
    """Measure the circuits of all rows."""
    prompt = optimization.prompt
    answer = objective.answer[prompt]  # [rows, K]
    outputs = _outputs(objective, g, prompt)
    loss = _means(outputs, lambda output: objective.distance(output, prompt))
    label = None
    probability = None
    if objective.label is None:
        size = answer.square().mean(1).clamp(min=1e-30)  # [rows]
        share = 1 - loss["adversarial"] / size
    else:
        label = objective.label[prompt]
        outputs = {"target": [answer], **outputs}
        probability = _means(outputs, lambda x: objective.log_probability(x, prompt).exp())
        share = probability["adversarial"] / probability["target"]
    return Frontier(
        prompt=prompt,
        lambdas=optimization.lambdas,
        steps=optimization.taken,
        nodes=_count_above(g, 0.0),
        important=_count_above(g, objective.search.threshold),
        loss=loss,
        probability=probability,
        label=label,
        kept=share,
    )


def _count_above(g: Mapping[str, Tensor], threshold: float) -> Int[Tensor, " rows"]:
    """Count the components of each row above a threshold, over all sites and positions."""
    counts = []
    for values in g.values():
        above = values > threshold  # [rows, (pos,) C]
        counts.append(above.flatten(1).sum(1))
    return torch.stack(counts).sum(0)


def _outputs(
    objective: CircuitObjective, g: Mapping[str, Tensor], prompt: Int[Tensor, " rows"]
) -> dict[str, list[Tensor]]:
    """Return the outputs [rows, K] of every row under each kind of masks, one for each draw."""
    search = objective.search
    generators = objective.generators("judge")
    ci = objective.sample_masks("ci", g, prompt, generators)
    stochastic = [
        objective.sample_masks("stochastic", g, prompt, generators) for _ in range(search.draws)
    ]
    # The adversary draws last, so that the other draws do not depend on it.
    adversarial = objective.adversarial_masks(search.judge, g, prompt, generators)
    masks = {"ci": [ci], "stochastic": stochastic, "adversarial": [adversarial]}
    with torch.no_grad():
        return {
            kind: [objective.outputs(draw, prompt) for draw in draws]
            for kind, draws in masks.items()
        }


def _means(
    outputs: Mapping[str, list[Tensor]], measure: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Average a measure of outputs over draws, for each kind of masks."""
    return {
        kind: torch.stack([measure(output) for output in draws]).mean(0)
        for kind, draws in outputs.items()
    }
