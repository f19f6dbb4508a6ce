"""One training step with tensors that have shapes but no numbers: what it multiplies, moves and
keeps.

1. The module is built and run under torch's fake tensors: nothing is allocated, nothing computed,
   any size goes.
2. A cost counter sees every operation. It counts the FLOPs of matrix products, the bytes that all
   others read and write, and the storage alive at each moment, and books them under the part of the
   step they belong to.
3. An operation of the backward pass belongs to the part whose forward pass made its node: nodes are
   numbered in order.

How many positions a random route decomposes is known only once it is drawn: here it is the expected
number, or all of them where asked for, as on GPUs, which would have to wait for the draw. What it
leaves out: the trainer, the data, and what a device's own kernels allocate for themselves.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from spd_lightning.decomposition.losses import Losses
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction
from spd_lightning.training.decompose import Decomposition

aten = torch.ops.aten
T = TypeVar("T")

CLEAN, IMPORTANCE, FAITHFULNESS = "clean run", "importance function", "faithfulness"
PENALTIES, OPTIMISER = "penalties", "optimizer"


@dataclass
class Work:
    """The cost of one part of a step: FLOPs of matrix products, bytes moved by other operations,
    their number.
    """

    forward: int = 0
    backward: int = 0
    moved: int = 0
    operations: int = 0

    @property
    def flops(self) -> int:
        """FLOPs of the forward and the backward pass."""
        return self.forward + self.backward

    def __mul__(self, times: int) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(self)))

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class StepCost:
    """The cost of a step, part by part, and the memory that it keeps.

    Attributes:
        parts: the work of each part, named as in the config.
        activations: bytes alive at the worst moment of the step, gradients of parameters apart.
        gradients: bytes of the gradients of trained parameters.
        state: bytes that the optimizer keeps.
        adversaries: bytes of adversaries that live across steps.
        gathered: whether anything depends on how many positions the routes decompose.
    """

    parts: dict[str, Work]
    activations: int
    gradients: int
    state: int
    adversaries: int = 0
    gathered: bool = False

    @property
    def total(self) -> Work:
        """The cost of all parts together."""
        return sum(self.parts.values(), Work())


# ---- the cost counter ----------------------------------------------------------------------------


class CostCounter(TorchDispatchMode):
    """Sees every operation while it is open, of fake tensors and of real ones alike.

    Args:
        whole: routes are taken to decompose every position.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole, self.gathered = whole, False
        self.work: dict[str, Work] = {}
        self.alive = self.peak = 0
        self.routed = 1.0
        self._part = PENALTIES
        self._begun = [(0, PENALTIES)]
        self._backward = False
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    # ---- parts -----------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str, routed: float = 1.0) -> Iterator[None]:
        """Count the operations inside under this part; `routed` is the share of positions that its
        routes decompose.
        """
        before = self._part, self.routed
        self._switch(name, routed)
        try:
            yield
        finally:
            self._switch(*before)

    def _switch(self, name: str, routed: float) -> None:
        self._part, self.routed = name, routed
        self._begun.append((torch._C._autograd._get_sequence_nr(), name))  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The step's own backward pass; an adversary's is part of what calls it."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def _owner(self) -> str:
        node = torch._C._current_autograd_node() if self._backward else None
        if node is None:
            return self._part
        return self._begun[
            bisect_right(self._begun, node._sequence_nr(), key=lambda begun: begun[0]) - 1
        ][1]

    # ---- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (known := self._assumed(func, args)) is not None:
            return known
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._book(func, args, kwargs, out, given, made)
        for tensor in made:
            self._keep(tensor.untyped_storage())
        return out

    def _assumed(self, func: Any, args: Any) -> Any:
        """Return stand-ins for values that depend on the content of tensors, which have none
        here.
        """
        if not args or not is_fake(args[0]):
            return None
        match func:
            case aten.nonzero.default:
                self.gathered = True
                share = 1.0 if self.whole else self.routed
                return args[0].new_empty(
                    round(args[0].numel() * share), args[0].ndim, dtype=torch.long
                )
            case aten.equal.default:
                return args[0].shape == args[1].shape
            case aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
        return None

    def _book(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        inputs = {t.untyped_storage()._cdata for t in given}
        if (
            func.is_view
            or not made
            or (made[0].untyped_storage()._cdata in inputs and not func._schema.is_mutable)
        ):
            return
        work = self.work.setdefault(self._owner(), Work())
        work.operations += 1
        if formula := flops_of(func):
            count = formula(*args, **kwargs, out_val=out)
            if self._backward:
                work.backward += count
            else:
                work.forward += count
        else:
            work.moved += sum(t.numel() * t.element_size() for t in (*given, *made))

    def _keep(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.alive -= size


def is_fake(value: Any) -> bool:
    """Whether it is a tensor without numbers."""
    return isinstance(value, Tensor) and getattr(value, "fake_mode", None) is not None


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_back(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, out_val: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)


_FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}
"""torch counts the fused attention of GPUs, but not that of processors."""


def flops_of(func: Any) -> Callable[..., int] | None:
    """How to count the FLOPs of an operation; None for those that are not matrix products."""
    packet: Any = getattr(func, "_overloadpacket", None)
    return _FUSED.get(packet) or flop_registry.get(packet)


@contextmanager
def fake_tensors(whole: bool = False) -> Iterator[CostCounter]:
    """While open, new tensors have shapes but no numbers, and a cost counter sees what is done with
    them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), CostCounter(whole) as counter:
        yield counter


# ---- the step ------------------------------------------------------------------------------------


def measure_step(
    build: Callable[[], Decomposition],
    batch: Callable[[], Tensor],
    precision: torch.dtype | None,
    whole: bool = False,
) -> StepCost:
    """Takes one training step without numbers.

    Args:
        build: makes the module; called where tensors are fake.
        batch: makes a batch.
        precision: of autocast; None for none.
        whole: routes are taken to decompose every position.
    """
    with fake_tensors(whole) as counter:
        module = build()
        inputs = batch()
        counter.work.clear()
        held = counter.alive
        counter.peak = held
        return step(counter, module, inputs, precision, held)


def step(
    counter: CostCounter,
    module: Decomposition,
    batch: Tensor,
    precision: torch.dtype | None,
    held: int,
) -> StepCost:
    """One step of a module, booked by part; `held` are the bytes alive before it.

    Micro-batches are alike: one is measured.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    count = module.micro_batches
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = total_loss(counter, module, batch.chunk(count)[0])
    adversaries = module.lasting_bytes()
    held += adversaries
    forward = counter.peak - held
    with counter.backward():
        loss.backward()
    del loss
    gradients = sum(_bytes(p.grad) for p in trained if p.grad is not None)
    activations = max(forward, counter.peak - held - gradients)
    with counter.part(OPTIMISER):
        state = optimizer_state(module)
    parts = {
        name: work if name == OPTIMISER else work * count for name, work in counter.work.items()
    }
    return StepCost(parts, activations, gradients, state, adversaries * count, counter.gathered)


def total_loss(counter: CostCounter, module: Decomposition, batch: Tensor) -> Tensor:
    """The training loss of a batch, each part of it booked under its name."""
    model = module.model
    generator = torch.Generator().manual_seed(0)
    with counter.part(CLEAN):
        clean = model.clean(batch)
    with counter.part(IMPORTANCE):
        importances = model.importances(clean, generator)
    run = LossContext(model, batch, clean, importances, generator)
    run.adversaries = module.adversaries(run)
    return with_cost_labels(counter, module.losses, len(model.sites))(run)[0]


def optimizer_state(module: Decomposition) -> int:
    """Bytes that the module's optimizer keeps between two steps."""
    optimizer: Any = module.configure_optimizers()
    optimizer.step()
    return sum(
        _bytes(t)
        for t in tree_leaves(list(optimizer.state.values()))
        if isinstance(t, Tensor) and t.ndim
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def with_cost_labels(counter: CostCounter, losses: Losses, sites: int) -> Losses:
    """Return the same losses, each labeled in the counter while it is computed."""
    terms = {
        name: _with_cost_label(counter, term, f"reconstruction/{name}", _routed(term, sites))
        for name, term in losses.reconstruction.items()
    }
    return replace(
        losses,
        faithfulness=_with_cost_label(counter, losses.faithfulness, FAITHFULNESS),
        reconstruction=terms,
    )


def _routed(term: Reconstruction, sites: int) -> float:
    """The share of positions at which a site is decomposed in one pass (M1)."""
    match term.route:
        case "subset":
            return (sites + 1) / (2 * sites)
        case "static":
            return term.probability
    return 1.0


def _with_cost_label(counter: CostCounter, term: T, name: str, routed: float = 1.0) -> T:
    kind: Any = type(term)

    class Noted(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with counter.part(name, routed):
                return super().__call__(*args, **kwargs)

        def terms(self, *args: Any, **kwargs: Any) -> Any:
            with counter.part(name, routed):
                return super().terms(*args, **kwargs)

    return Noted(**{f.name: getattr(term, f.name) for f in fields(kind)})
