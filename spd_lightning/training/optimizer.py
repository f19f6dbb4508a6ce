"""The optimizer of components and importance functions: AdamW, or Muon for matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_lightning.decomposition.components import Components
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import check_range
from spd_lightning.training.schedule import Schedule


@dataclass(frozen=True)
class Optimizer:
    """An optimizer without weight decay on components and importance functions.

    Args:
        lr: peak learning rate.
        importance_lr: peak learning rate of the importance functions; `lr` if omitted.
        kind: adamw, or muon. Muon makes the updates of matrices orthogonal, scaled so that AdamW's
            learning rates suit it. It leaves biases and MLPs of single components to AdamW.
        betas: betas of AdamW.
        momentum: momentum of Muon.
        schedule: how the learning rate changes.
        clip_components: maximum gradient norm of all V and U together; no bound if omitted.
        clip_importance: maximum gradient norm of all importance functions together; no bound if
            omitted.
        components: whether V and U are trained. If not, they keep their initial values, which is a
            baseline.
    """

    lr: float = 1e-3
    importance_lr: float | None = None
    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.95
    schedule: Schedule = field(default_factory=lambda: Schedule("cosine"))
    clip_components: float | None = None
    clip_importance: float | None = None
    components: bool = True

    def __post_init__(self):
        check_range("optimizer", above=0, lr=self.lr)
        check_range("optimizer", least=0, importance_lr=self.importance_lr)
        check_range("optimizer", least=0, below=1, betas=self.betas, momentum=self.momentum)
        hint = "omit it for no bound"
        check_range("optimizer", above=0, hint=hint, clip_components=self.clip_components)
        check_range("optimizer", above=0, hint=hint, clip_importance=self.clip_importance)

    def over(self, model: ComponentModel) -> torch.optim.Optimizer:
        """Return the optimizer of a model.

        Each group's `peak` is the learning rate that the schedule scales.
        """
        components_lr = self.lr if self.components else 0.0
        importance_lr = self.lr if self.importance_lr is None else self.importance_lr
        parts = [(model.components, components_lr), (model.importance_function, importance_lr)]
        if self.kind == "adamw":
            groups = []
            for part, peak in parts:
                groups.append({"params": list(part.parameters()), "peak": peak})
            return self._adamw(groups)
        matrix_groups = []
        others = list[torch.optim.Optimizer]()
        for part, peak in parts:
            matrices = matrices_of(part)
            ids = {id(matrix) for matrix in matrices}
            rest = [p for p in part.parameters() if id(p) not in ids]
            if matrices:
                matrix_groups.append({"params": matrices, "peak": peak})
            if rest:
                others.append(self._adamw([{"params": rest, "peak": peak}]))
        return Together(self._muon(matrix_groups), *others)

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=0.0, fused=True)

    def _muon(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            groups,
            lr=self.lr,
            weight_decay=0.0,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )


def matrices_of(part: nn.Module) -> list[Tensor]:
    """Return the matrices among the parameters: V, U and the weights of linear maps.

    Stacks of small vectors are not matrices.
    """
    weights = list[Tensor]()
    factors = list[Tensor]()
    for module in part.modules():
        if isinstance(module, nn.Linear):
            weights.append(module.weight)
        if isinstance(module, Components):
            factors += [module.V, module.U]
    return weights + factors


class Together(torch.optim.Optimizer):
    """Several optimizers that act as one, so that a step counts once and there is one state."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts: Sequence[torch.optim.Optimizer] = parts
        groups = list[dict[str, Any]]()
        for part in parts:
            groups += part.param_groups
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let the parts use this optimizer's groups and state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with each optimizer."""
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
