"""The record of a clean run, and its replay in masked runs of the same batch.

A masked run computes the same numbers as the clean run up to the first site that it changes. These
numbers are looked up instead of computed again.

1. *Record*: during a clean run, keep the input x and the output of every site, and the output of
   the outermost modules without sites (`Recorder`).
2. *Check*: a target that changes tensors in place makes the record useless, because the recorded
   tensors no longer hold what its code saw. PyTorch counts the changes of a tensor in `_version`,
   so the record is intact if no counter has moved. Otherwise the clean run is repeated with copies
   for a record, and nothing is replayed.
3. *Replay*: in a masked run, return recorded outputs until the first masked site. After it, a
   module without sites is always computed. A site is looked up only if its input is the recorded
   tensor itself, the same object: then no change has reached it, as in parallel branches
   (`Replay`).

This module does not run the target: see `model`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from spd_lightning.decomposition.components import Map, Mask, Site
from spd_lightning.errors import BadInput


class Inner(Mapping[str, Tensor]):
    """Inner activations a = x V of every site (D2), each computed when it is first read.

    Not every importance function reads them, and a masked run needs only a few.
    """

    def __init__(self, compute: Callable[[str], Tensor], names: Iterable[str]):
        self._compute = compute
        self._names = list(names)
        self._known = dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self._compute(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def known(self, name: str) -> bool:
        """Return whether the inner activations of a site have been computed."""
        return name in self._known


@dataclass
class Clean:
    """One clean run of the target.

    Attributes:
        output: the output of the target.
        inputs: x [..., d_in] of every site, or token ids [...] at embeddings.
        outputs: x Wᵀ + b [..., d_out] of every site.
        inner: a = x V [..., C] of every site.
        record: outputs of the modules without sites.
        masked: for some sites, a mask and the masked output on the clean input, which later passes
            with the same mask use again.
        matrices: V and U of some sites in the precision of autocast, cast once per batch.
    """

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inner: Inner = field(init=False)
    record: dict[nn.Module, Tensor] = field(default_factory=dict)
    masked: dict[str, tuple[Mask, Tensor]] = field(default_factory=dict)
    matrices: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Recorder:
    """Records a clean run while the target computes it (steps 1 and 2).

    Its methods take the place of the forward passes of sites and modules.

    Args:
        batch: the inputs.
        copies: whether to record copies, which later changes in place cannot reach.
    """

    def __init__(self, batch: Tensor, copies: bool):
        self.run = Clean(batch)  # the output follows in `finish`
        self._copies = copies
        self._repeated = set[nn.Module]()
        self._versions = list[tuple[Tensor, int]]()

    def at_site(self, site: Site, x: Tensor, forward: Map) -> Tensor:
        """Run a site, and record its input and output."""
        run = self.run
        name = site.name
        if name in run.inputs:
            raise BadInput(f"sites: the target uses '{name}' twice in one run; leave it out")
        run.inputs[name] = self._keep(x)
        out = forward(x)
        run.outputs[name] = self._keep(out)
        return out

    def at_module(self, module: nn.Module, forward: Map) -> Map:
        """Return a forward pass of a module without sites that records its output."""
        record = self.run.record

        def recorded(*args, **kwargs):
            arguments = (*args, *kwargs.values())
            for argument in arguments:
                if isinstance(argument, Tensor):
                    self._watch(argument)
            out = forward(*args, **kwargs)
            if module in record:
                self._repeated.add(module)
            elif isinstance(out, Tensor):
                record[module] = self._keep(out)
            return out

        return recorded

    def finish(self, output: Tensor) -> Clean:
        """Return the record; modules that ran more than once are not in it."""
        self.run.output = output
        for module in self._repeated:
            del self.run.record[module]
        return self.run

    def intact(self) -> bool:
        """Return whether no recorded tensor was changed in place during the run (step 2)."""
        unchanged = [tensor._version == version for tensor, version in self._versions]
        return all(unchanged)

    def _watch(self, tensor: Tensor) -> None:
        """Note the version of a tensor, to see later whether it was changed."""
        version = tensor._version
        self._versions.append((tensor, version))

    def _keep(self, tensor: Tensor) -> Tensor:
        """Watch a tensor, and return what to record of it."""
        self._watch(tensor)
        if self._copies:
            return tensor.clone()
        return tensor


class Replay:
    """The part of a clean run that a masked run of the same batch can use (step 3).

    Args:
        clean: the clean run; None to look nothing up.
    """

    def __init__(self, clean: Clean | None):
        self._clean = clean
        self._unchanged = clean is not None  # everything so far equals the clean run

    def lookup(self, site: Site, x: Tensor) -> Tensor | None:
        """Return the clean output of a site if x is its clean input; None if that is not known."""
        if self._clean is None:
            return None
        if self._unchanged or x is self._clean.inputs[site.name]:
            return self._clean.outputs[site.name]
        return None

    def leave(self) -> None:
        """Note that the run differs from the clean one from here on."""
        self._unchanged = False

    def at_module(self, module: nn.Module, forward: Map) -> Map:
        """Return a forward pass of a module without sites that returns its clean output if known.

        It computes the output after the run has left the clean one.
        """

        def replayed(*args, **kwargs):
            if self._clean is not None and self._unchanged:
                output = self._clean.record.get(module)
                if output is not None:
                    return output
            return forward(*args, **kwargs)

        return replayed
