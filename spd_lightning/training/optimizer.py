"""How components and importance functions are updated: AdamW, or Muon for matrices."""

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
        lr: full learning rate.
        importance_lr: that of the importance functions, where it differs.
        kind: adamw; or muon, which makes the updates of matrices orthogonal, scaled so that AdamW's
            learning rates suit it, and leaves biases and MLPs of single components to AdamW.
        betas: of AdamW.
        momentum: of Muon.
        schedule: how the learning rate moves.
        clip_components: largest gradient norm of all V and U together; none if omitted.
        clip_importance: largest gradient norm of all importance functions together; none if
            omitted.
        components: whether V and U are trained at all; if not they stay as drawn, which makes a
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
        hint = "leave it out for none"
        check_range("optimizer", above=0, hint=hint, clip_components=self.clip_components)
        check_range("optimizer", above=0, hint=hint, clip_importance=self.clip_importance)

    def over(self, model: ComponentModel) -> torch.optim.Optimizer:
        """The optimizer of a model; each group's `peak` is the learning rate that the schedule
        scales.
        """
        parts = [
            (model.components, self.lr if self.components else 0.0),
            (
                model.importance_function,
                self.lr if self.importance_lr is None else self.importance_lr,
            ),
        ]
        if self.kind == "adamw":
            return self._adamw(
                [{"params": list(part.parameters()), "peak": peak} for part, peak in parts]
            )
        split = [(matrices_of(part), list(part.parameters()), peak) for part, peak in parts]
        ids = {id(p) for matrices, _, _ in split for p in matrices}
        matrices = [{"params": found, "peak": peak} for found, _, peak in split if found]
        rest = [
            {"params": [p for p in all_ if id(p) not in ids], "peak": peak}
            for _, all_, peak in split
        ]
        return Together(self._muon(matrices), *(self._adamw([g]) for g in rest if g["params"]))

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
    """V and U, and the weights of linear maps: what is a matrix, and no stack of small vectors."""
    found = [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
    return found + [p for m in part.modules() if isinstance(m, Components) for p in (m.V, m.U)]


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one: Lightning counts a step once, and a checkpoint holds one
    state.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts: Sequence[torch.optim.Optimizer] = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups and state."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
