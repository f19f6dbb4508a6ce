"""Dry run: measure the cost of a training step on tensors that have shapes but no values.

1. The module is built and run under torch's fake tensors. Nothing is allocated or computed, so any
   size works.
2. A cost counter sees every operation. It counts the FLOPs of matrix products, the bytes that all
   other operations read and write, and the storage alive at each moment. It assigns each cost to a
   part of the step.
3. An operation of the backward pass belongs to the part whose forward pass created its node. Nodes
   are numbered in order.

The number of positions that a random route decomposes is known only once the route is drawn. The
dry run uses the expected number. With `whole` it uses all positions, as training on a GPU does.

A dry run does not cover the trainer, the data, or the memory that a device's kernels allocate for
themselves.
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
    """The cost of one part of a step.

    Attributes:
        forward: FLOPs of the matrix products of the forward pass.
        backward: FLOPs of the matrix products of the backward pass.
        moved: bytes that all other operations read and write.
        operations: number of operations.
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
        return Work(
            forward=self.forward * times,
            backward=self.backward * times,
            moved=self.moved * times,
            operations=self.operations * times,
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            moved=self.moved + other.moved,
            operations=self.operations + other.operations,
        )


@dataclass
class StepCost:
    """The cost of each part of a step, and the memory that the step needs.

    Attributes:
        parts: the work of each part, named as in the config.
        activations: bytes alive at the peak of the step, without the gradients of parameters.
        gradients: bytes of the gradients of trained parameters.
        state: bytes of optimizer state.
        adversaries: bytes of persistent adversaries.
        gathered: whether a cost depends on the number of positions that the routes decompose.
    """

    parts: dict[str, Work]
    activations: int
    gradients: int
    state: int
    adversaries: int = 0
    gathered: bool = False

    @property
    def total(self) -> Work:
        """The summed work of all parts."""
        return sum(self.parts.values(), Work())


# ---- the cost counter ----------------------------------------------------------------------------


class CostCounter(TorchDispatchMode):
    """Counts the cost of every operation inside its context, on fake and on real tensors.

    Args:
        whole: whether to assume that routes decompose every position.

    Attributes:
        work: the work of each part so far.
        alive: bytes of storage that are alive now.
        peak: largest value of `alive` so far.
        gathered: whether an operation depended on the number of positions that routes decompose.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.gathered = False
        self.work: dict[str, Work] = {}
        self.alive = 0
        self.peak = 0
        self.routed = 1.0
        self._part = PENALTIES
        self._begun = [(0, PENALTIES)]
        self._backward = False
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    # ---- parts -----------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str, routed: float = 1.0) -> Iterator[None]:
        """Assign the operations inside the context to a part.

        Args:
            name: the part.
            routed: share of positions that its routes decompose.
        """
        before = self._part, self.routed
        self._switch(name, routed)
        try:
            yield
        finally:
            self._switch(*before)

    def _switch(self, name: str, routed: float) -> None:
        self._part = name
        self.routed = routed
        torch_core: Any = torch._C  # its stubs do not declare the attribute
        next_node = torch_core._autograd._get_sequence_nr()
        self._begun.append((next_node, name))

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Count the step's backward pass; an adversary's counts as part of its caller."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def _owner(self) -> str:
        """Return the part that the current operation belongs to."""
        node = torch._C._current_autograd_node() if self._backward else None
        if node is None:
            return self._part
        number = node._sequence_nr()
        later = bisect_right(self._begun, number, key=lambda begun: begun[0])
        _, name = self._begun[later - 1]
        return name

    # ---- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stand_in = self._assumed(func, args)
        if stand_in is not None:
            return stand_in
        inputs = _tensors_of((args, kwargs))
        out = func(*args, **kwargs)
        outputs = _tensors_of(out)
        self._book(func, args, kwargs, out, inputs, outputs)
        for tensor in outputs:
            self._keep(tensor.untyped_storage())
        return out

    def _assumed(self, func: Any, args: Any) -> Any:
        """Return a stand-in for a result that depends on values, which fake tensors lack."""
        if not args or not is_fake(args[0]):
            return None
        match func:
            case aten.nonzero.default:
                self.gathered = True
                share = 1.0 if self.whole else self.routed
                rows = round(args[0].numel() * share)
                return args[0].new_empty(rows, args[0].ndim, dtype=torch.long)
            case aten.equal.default:
                return args[0].shape == args[1].shape
            case aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
        return None

    def _book(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """Add the cost of one operation to the part that it belongs to; views cost nothing."""
        if func.is_view or not outputs:
            return
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        shares_storage = outputs[0].untyped_storage()._cdata in input_storages
        if shares_storage and not func._schema.is_mutable:
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
            work.moved += sum(map(_bytes, (*inputs, *outputs)))

    def _keep(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as alive until it is freed."""
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.alive -= size


def _tensors_of(tree: Any) -> list[Tensor]:
    """Return all tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Return the size of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()


def is_fake(value: Any) -> bool:
    """Return whether a value is a fake tensor."""
    if not isinstance(value, Tensor):
        return False
    return getattr(value, "fake_mode", None) is not None


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
"""torch counts the fused attention of GPUs, but not that of CPUs."""


def flops_of(func: Any) -> Callable[..., int] | None:
    """Return the FLOP formula of an operation; None if it is not a matrix product."""
    packet: Any = getattr(func, "_overloadpacket", None)
    return _FUSED.get(packet) or flop_registry.get(packet)


@contextmanager
def fake_tensors(whole: bool = False) -> Iterator[CostCounter]:
    """Make new tensors fake inside the context, and count what is done with them."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, CostCounter(whole) as counter:
        yield counter


# ---- the step ------------------------------------------------------------------------------------


def measure_step(
    build: Callable[[], Decomposition],
    batch: Callable[[], Tensor],
    precision: torch.dtype | None,
    whole: bool = False,
) -> StepCost:
    """Return the cost of one training step, measured in a dry run.

    Args:
        build: makes the module; called while new tensors are fake.
        batch: makes a batch; called while new tensors are fake.
        precision: data type of autocast; None for no autocast.
        whole: whether to assume that routes decompose every position.
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
    """Run one step of a module and return its cost.

    All micro-batches cost the same, so only one is run.

    Args:
        counter: the open counter.
        module: the module.
        batch: the batch of the whole step.
        precision: data type of autocast; None for no autocast.
        held: bytes alive before the step.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    count = module.micro_batches
    with torch.autocast("cpu", precision, enabled=precision is not None):
        micro_batch = batch.chunk(count)[0]
        loss = total_loss(counter, module, micro_batch)
    adversaries = module.lasting_bytes()
    held += adversaries
    forward = counter.peak - held
    with counter.backward():
        loss.backward()
    del loss
    gradients = 0
    for parameter in trained:
        if parameter.grad is not None:
            gradients += _bytes(parameter.grad)
    activations = max(forward, counter.peak - held - gradients)
    with counter.part(OPTIMISER):
        state = optimizer_state(module)
    parts = {}
    for name, work in counter.work.items():
        parts[name] = work if name == OPTIMISER else work * count
    return StepCost(
        parts=parts,
        activations=activations,
        gradients=gradients,
        state=state,
        adversaries=adversaries * count,
        gathered=counter.gathered,
    )


def total_loss(counter: CostCounter, module: Decomposition, batch: Tensor) -> Tensor:
    """Return the training loss of a batch, with the cost of each part under its name."""
    model = module.model
    generator = torch.Generator().manual_seed(0)
    with counter.part(CLEAN):
        clean = model.clean(batch)
    with counter.part(IMPORTANCE):
        importances = model.importances(clean, generator)
    run = LossContext(model, batch, clean, importances, generator)
    run.adversaries = module.adversaries(run)
    losses = with_cost_labels(counter, module.losses, len(model.sites))
    return losses(run)[0]


def optimizer_state(module: Decomposition) -> int:
    """Return the bytes that the module's optimizer keeps between two steps."""
    optimizer: Any = module.configure_optimizers()
    optimizer.step()
    tensors = _tensors_of(list(optimizer.state.values()))
    return sum(_bytes(tensor) for tensor in tensors if tensor.ndim)


def with_cost_labels(counter: CostCounter, losses: Losses, sites: int) -> Losses:
    """Return a copy of the losses in which each term is its own part of the counter."""
    terms = {}
    for name, term in losses.reconstruction.items():
        label = f"reconstruction/{name}"
        terms[name] = _with_cost_label(counter, term, label, _routed(term, sites))
    return replace(
        losses,
        faithfulness=_with_cost_label(counter, losses.faithfulness, FAITHFULNESS),
        reconstruction=terms,
    )


def _routed(term: Reconstruction, sites: int) -> float:
    """Return the expected share of positions at which a site is decomposed in a pass (M1)."""
    match term.route:
        case "subset":
            return (sites + 1) / (2 * sites)
        case "static":
            return term.probability
    return 1.0


def _with_cost_label(counter: CostCounter, term: T, name: str, routed: float = 1.0) -> T:
    """Return a copy of a loss term whose operations are assigned to the part `name`."""
    kind: Any = type(term)

    class Labeled(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with counter.part(name, routed):
                return super().__call__(*args, **kwargs)

        def terms(self, *args: Any, **kwargs: Any) -> Any:
            with counter.part(name, routed):
                return super().terms(*args, **kwargs)

    settings = {field.name: getattr(term, field.name) for field in fields(kind)}
    return Labeled(**settings)
