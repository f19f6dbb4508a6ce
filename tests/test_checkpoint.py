"""Weights on disk: what is read is what was written, bit for bit; what is damaged is told apart; no
pickles.
"""

import builtins
import json
import math
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from test_nodes import Ragged, decoder, harvested
from torch import nn

import spd_lightning
from spd_lightning import json_files, runs, stopping
from spd_lightning.data.modules import SparseFeatures
from spd_lightning.decomposition.importance import Importance
from spd_lightning.errors import BadInput
from spd_lightning.harvest.graphs import PromptGraphs
from spd_lightning.targets.toy import TMS
from spd_lightning.training import tensor_files
from spd_lightning.training.checkpoint import (
    LAST,
    PREVIOUS,
    Checkpoints,
    SafetensorsIO,
    make_room,
    pack,
    resumable,
    unpack,
)
from spd_lightning.training.decompose import Decomposition, FaithfulnessWarmup
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.interruption import Interruption
from spd_lightning.training.networks import build
from spd_lightning.training.saved import SCHEMA
from spd_lightning.training.tensor_files import write_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*",
    "ignore:.*does not have many workers.*",
    "ignore:.*in eval mode at the start.*",
)

TARGET = {"class_path": "spd_lightning.TMS", "init_args": {"n_features": 5, "n_hidden": 2}}


def decomposition(C: int = 7, **settings) -> Decomposition:
    """An untrained decomposition with importances of all sizes."""
    settings = {
        "sites": {"linear1": C, "linear2": C},
        "tied": {"linear2": "linear1"},
        "seed": 1,
    } | settings
    module = Decomposition(
        build(TARGET), evaluation=Evaluation(identity=("linear1",), pgd_steps=(2, 3)), **settings
    )
    module.target_spec = dict(TARGET)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.5
    return module


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    decomposition().save(tmp_path)
    runs.write_json(tmp_path / "summary.json", {})
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        Decomposition.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- trees of tensors ----------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw):
    """Any shape up to three dimensions, empty ones and views that are not contiguous among them."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = (
        torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 3
    )
    tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    return tensor.T if tensor.ndim == 2 and draw(st.booleans()) else tensor


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
NAMES = st.text("a/'\"0.", max_size=3) | st.integers(0, 2)
TREES = st.recursive(
    SCALARS | tensors(),
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["tensor", "items", "list", "tuple"]), inner, max_size=2)
    ),
    max_leaves=8,
)


def same(one, other) -> bool:
    """Equal in value and type everywhere, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    match one:
        case torch.Tensor():
            alike = one.dtype == other.dtype and one.shape == other.shape
            return (
                alike
                and one.contiguous().numpy(force=True).tobytes()
                == other.numpy(force=True).tobytes()
                if one.dtype != torch.bfloat16
                else alike and torch.equal(one, other)
            )
        case dict():
            return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            return one == other or (math.isnan(one) and math.isnan(other))
    return one == other


@given(TREES)
def test_trees_survive_a_file(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    SafetensorsIO().save_checkpoint({"tree": tree}, path)
    assert same(SafetensorsIO().load_checkpoint(path), {"tree": tree})


def test_named_tuples_come_back_as_tuples():
    held = {}
    assert unpack(json.loads(json.dumps(pack(torch.zeros(2, 3).shape, held))), held) == (2, 3)


@pytest.mark.parametrize("alien", [{1, 2}, object(), b"bytes", 1j, nn.Linear])
def test_what_has_no_safe_form_is_refused(alien):
    with pytest.raises(TypeError, match="at '/a/0'"):
        pack({"a": [alien]}, {})


# ---- no pickles ----------------------------------------------------------------------------------


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """A fit, its checkpoints, a resume and a load, while pickle, torch.save and torch.load refuse
    to work.
    """

    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for steps in (20, 30):
        module = decomposition(inner_steps=5, checkpoint_every=10, warm_up=FaithfulnessWarmup(2))
        resumed = str(tmp_path / LAST) if (tmp_path / LAST).exists() else None
        trainer(tmp_path, steps).fit(module, SparseFeatures(5, 0.3, 16), ckpt_path=resumed)
    module.save(tmp_path)
    Decomposition.from_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                assert list(file.keys())


def test_no_source_file_speaks_of_pickles():
    package = Path(spd_lightning.__file__).parent
    for path in package.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not re.search(
            r"^\s*(import|from) (pickle|joblib|dill|cloudpickle)", code, re.MULTILINE
        ), path
        assert not re.search(r"torch\.(save|load)\((?!.*weights_only=True)", code), path


def trainer(folder: Path, steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafetensorsIO()],
        callbacks=[Checkpoints(folder)],
        limit_val_batches=0,
    )


def test_strangers_cannot_run_code(saved):
    """A decomposition pulled from a tracker names the class of its target: only networks are
    built.
    """
    for path, args in (
        ("os.system", {"command": f"touch {saved}/done"}),
        ("os.nothing", {}),
        ("nowhere.X", {}),
    ):
        change(saved, target={"class_path": path, "init_args": args})
        assert f"target '{path}': cannot be built" in refused(saved)
    assert not (saved / "done").exists()


# ---- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error")]
)
def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / LAST
    io = SafetensorsIO()
    io.save_checkpoint({"step": 1, "w": torch.ones(3)}, path)

    def half(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensor_files, "save_file", half)
    with pytest.raises(BadInput, match="cannot be written"):
        io.save_checkpoint({"step": 2, "w": torch.zeros(3)}, path)
    assert same(io.load_checkpoint(path), {"step": 1, "w": torch.ones(3)})
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_process_that_dies_while_saving_leaves_the_old_one(tmp_path, monkeypatch):
    """What was written under the temporary name never has the real one: seen by stopping before
    every system call.
    """
    path = tmp_path / "t.safetensors"
    SafetensorsIO().save_checkpoint({"step": 1}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        SafetensorsIO().save_checkpoint({"step": 2}, path)
    assert SafetensorsIO().load_checkpoint(path) == {"step": 1}


# ---- decompositions ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "vector_mlp", "shared_mlp", "global_mlp"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_loaded_is_what_was_saved(tmp_path, kind, tied):
    """Weights and importances bit for bit, whatever the importance function."""
    tie = {"linear2": "linear1"} if tied else {}
    module = decomposition(importance=Importance(kind, hidden=3), tied=tie, delta=not tied)
    module.save(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    loaded = Decomposition.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.origin == tmp_path.name
    assert loaded.settings == module.settings
    assert same(dict(loaded.state_dict()), dict(module.state_dict()))
    x = torch.rand(32, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (m.model.importances(m.model.clean(x)) for m in (module, loaded))
        assert torch.equal(module.model.target(x), loaded.model.target(x))
    assert same(one.lower, other.lower)
    assert same(one.upper, other.upper)
    spread = torch.cat([g.flatten() for g in one.lower.values()])
    assert 0.1 < (spread > 0).float().mean() < 1  # not all dead, which would prove nothing


def test_an_object_as_target_is_asked_for(tmp_path):
    module = decomposition()
    module.target_spec = None
    module.save(tmp_path)
    assert "target=" in refused(tmp_path)
    again = Decomposition.from_pretrained(tmp_path, target=TMS(5, 2))
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_an_unfinished_run_holds_none(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    assert "let its fit finish" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(saved, keep):
    path = saved / "decomposition.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "decomposition.safetensors': cannot be read" in refused(saved)


def test_a_flipped_bit(saved):
    path = saved / "decomposition.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "not the weights that decomposition.json describes" in refused(saved)


def test_files_of_two_decompositions(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    decomposition(seed=2).save(other)
    shutil.copy(other / "decomposition.safetensors", saved)
    assert "not the weights" in refused(saved)


def change(folder: Path, **changes) -> None:
    path = folder / "decomposition.json"
    runs.write_json(path, json_files.unsealed(json.loads(path.read_text())) | changes)


def test_weights_of_another_model(saved):
    """Same digest, but sites of another width, other sites, or another target."""
    facts = json.loads((saved / "decomposition.json").read_text())
    change(saved, model=facts["model"] | {"sites": {"linear1": 8, "linear2": 8}})
    assert "weights of another model" in refused(saved)
    change(saved, model=facts["model"] | {"tied": {}})
    assert "weights of another model" in refused(saved)
    change(
        saved, model=facts["model"], target=TARGET | {"init_args": {"n_features": 6, "n_hidden": 2}}
    )
    assert "weights of another model" in refused(saved)
    change(saved, model=facts["model"] | {"unheard_of": 1}, target=TARGET)
    assert "model.unheard_of: expected one of sites, tied" in refused(saved)


def test_newer_schema(saved):
    change(saved, schema=SCHEMA + 1)
    assert f"schema {SCHEMA + 1} is newer" in refused(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"schema": 1}', "\x00"])
def test_broken_description(saved, text):
    (saved / "decomposition.json").write_text(text)
    assert "decomposition.json'" in refused(saved)


# ---- checkpoints ---------------------------------------------------------------------------------


def resume(folder: Path, module: Decomposition) -> str:
    with pytest.raises(BadInput) as caught:
        trainer(folder, 30).fit(module, SparseFeatures(5, 0.3, 16), ckpt_path=str(folder / LAST))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_checkpoints(tmp_path):
    module = decomposition(inner_steps=5, checkpoint_every=10, warm_up=FaithfulnessWarmup(2))
    trainer(tmp_path, 20).fit(module, SparseFeatures(5, 0.3, 16))
    path = tmp_path / LAST
    content = (tmp_path / LAST).read_bytes()
    assert "weights of another model" in resume(tmp_path, decomposition(C=8))
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"x" * 50):
        path.write_bytes(damaged)
        assert (
            "delete the folder 'checkpoints', and run the same fit again to start over"
            in resume(tmp_path, decomposition())
        )
    write_tensors({"w": torch.ones(1)}, path)
    assert "not a checkpoint of this tool" in resume(tmp_path, decomposition())


def test_opening_imports_no_tracker(saved, monkeypatch):
    """Loading imports what the target needs and nothing that speaks to a tracker."""
    real = builtins.__import__
    asked = []
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: asked.append(name) or real(name, *a, **k)
    )
    Decomposition.from_pretrained(saved)
    assert not {"mlflow", "wandb"} & {name.partition(".")[0] for name in asked}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*predict returned None")
def test_a_target_in_half_precision_comes_back_in_single(tmp_path):
    """Graphs and interventions multiply its weights with those of components."""
    module = decoder()
    module.model.target.to(torch.bfloat16)
    module.save(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    found = Decomposition.from_pretrained(
        tmp_path, target=decoder().model.target.to(torch.bfloat16)
    )
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    (store,) = harvested(tmp_path, found, Ragged(lengths=(5,)), PromptGraphs())
    assert store.manifest["rows"]["checks"] > 0
    assert found.intervene(torch.tensor([[1, 2]]), ablate=["lm_head:0"]).edited.isfinite().all()


# ---- when they are written -----------------------------------------------------------------------


class Signalled(Decomposition):
    """Gets SIGTERM while it takes the step 13."""

    def objective(self, batch, step, part=0):
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().objective(batch, step, part)


def small(kind: type[Decomposition], **settings) -> Decomposition:
    sites = {"linear1": 7, "linear2": 7}
    tied = {"linear2": "linear1"}
    return kind(
        build(TARGET), sites, tied, warm_up=FaithfulnessWarmup(0), inner_steps=5, **settings
    )


def step_of(path: Path) -> int:
    return SafetensorsIO().load_checkpoint(path)["global_step"]


def test_a_signal_in_mid_training_saves_after_the_block_of_steps(tmp_path):
    """Steps 10 to 14 are one block: the training ends at step 15 with a checkpoint of it, though
    none was due.
    """
    fitting: Any = trainer(tmp_path, 40)
    fitting.callbacks.append(Interruption())
    with stopping.listening(), pytest.raises(stopping.Stopped) as caught:
        fitting.fit(small(Signalled), SparseFeatures(5, 0.3, 16))
    assert caught.value.code == 143
    assert caught.value.place == "at step 15"
    assert step_of(tmp_path / LAST) == 15


def test_lightning_does_not_take_the_signals(tmp_path):
    """Its handler would end a training without a checkpoint and with exit code 0."""

    class Looking(Decomposition):
        def objective(self, batch, step, part=0):
            seen.append(signal.getsignal(signal.SIGTERM))
            return super().objective(batch, step, part)

    seen: list = []
    with stopping.listening():
        own = signal.getsignal(signal.SIGTERM)
        fitting: Any = trainer(tmp_path, 5)
        fitting.callbacks.append(Interruption())
        fitting.fit(small(Looking), SparseFeatures(5, 0.3, 16))
        assert set(seen) == {own}
        assert signal.getsignal(signal.SIGTERM) is own


def test_checkpoints_by_time_and_the_two_that_are_kept(tmp_path):
    """Where no time may pass between two, every block of steps has one, and the one before the last
    is kept.
    """
    fitting: Any = trainer(tmp_path, 20)
    fitting.callbacks[:] = [Checkpoints(tmp_path, seconds=0.0)]
    fitting.fit(small(Decomposition), SparseFeatures(5, 0.3, 16))
    assert step_of(tmp_path / LAST) == 15
    assert step_of(tmp_path / PREVIOUS) == 10


def test_a_checkpoint_before_the_last_steps(tmp_path):
    """What follows them, evaluation, figures, copies, may take long."""
    fitting: Any = trainer(tmp_path, 20)
    fitting.callbacks[:] = [Checkpoints(tmp_path, worth_keeping=0.0)]
    fitting.fit(small(Decomposition), SparseFeatures(5, 0.3, 16))
    assert step_of(tmp_path / LAST) == 15


def write_two(folder: Path) -> tuple[Path, Path]:
    for step in (1, 2):
        SafetensorsIO().save_checkpoint(
            {"step": step, "w": torch.full((3,), float(step))}, folder / LAST
        )
    return folder / LAST, folder / PREVIOUS


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "foreign"])
def test_a_bad_last_checkpoint_is_passed_over_with_a_line(tmp_path, caplog, harm):
    last, _ = write_two(tmp_path)
    match harm:
        case "truncated":
            last.write_bytes(last.read_bytes()[:-5])
        case "empty":
            last.write_bytes(b"")
        case "missing":
            last.unlink()
        case "foreign":
            write_tensors({"w": torch.ones(1)}, last, {"something": "else"})
    assert SafetensorsIO().load_checkpoint(last)["step"] == 1
    assert resumable(tmp_path) == last
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(last) in line
    assert line.endswith("; resuming from 'previous.safetensors' instead")
    assert "\n" not in line


def test_where_both_are_bad_the_line_says_what_to_delete(tmp_path):
    last, before = write_two(tmp_path)
    for path in (last, before):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        BadInput, match="delete the folder 'checkpoints', and run the same fit again to start over"
    ):
        SafetensorsIO().load_checkpoint(last)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    """Then `last` is missing, and the newer of the others is read."""
    last, before = write_two(tmp_path)
    replace = os.replace

    def die(source, target):
        if Path(source).name == "next.safetensors" and Path(target) == last:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        SafetensorsIO().save_checkpoint({"step": 3}, last)
    monkeypatch.undo()
    assert not last.exists()
    assert SafetensorsIO().load_checkpoint(last)["step"] == 3
    assert SafetensorsIO().load_checkpoint(before)["step"] == 2


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    """One is written every five steps; a training that is run with a lower number removes more."""
    fitting: Any = trainer(tmp_path, 40)
    fitting.callbacks[:] = [Checkpoints(tmp_path)]
    module = small(Decomposition, checkpoint_every=5, keep_checkpoints=keep)
    fitting.fit(module, SparseFeatures(5, 0.3, 16))
    names = ["last", "previous", "previous-2", "previous-3", "previous-4"]
    kept = [tmp_path / "checkpoints" / f"{name}.safetensors" for name in names[:keep]]
    assert set((tmp_path / "checkpoints").iterdir()) == set(kept)
    assert [step_of(path) for path in kept] == [35, 30, 25, 20, 15][:keep]
    for path in kept[:-1]:
        path.write_bytes(b"")
    assert SafetensorsIO().load_checkpoint(kept[0])["global_step"] == step_of(kept[-1])
    make_room(tmp_path / "checkpoints", 2)
    assert set((tmp_path / "checkpoints").iterdir()) == set(kept[:2])


def training(folder: Path, digest: str) -> Path:
    """A run's folder with two checkpoints; returns the last."""
    folder.mkdir()
    runs.write_json(folder / "run.json", {"family": "a", "digest": digest, "started": 1.0})
    last, _ = write_two(folder)
    return last


def test_the_checkpoint_of_another_training_is_rejected(tmp_path, caplog):
    """One that was copied from another run's folder would end in that run's weights."""
    mine = training(tmp_path / "a", "1" * 12)
    other = training(tmp_path / "b", "2" * 12)
    mine.write_bytes(other.read_bytes())
    assert SafetensorsIO().load_checkpoint(mine)["step"] == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "the checkpoint of another training; resuming from 'previous.safetensors' instead"
    )
    mine.with_name(PREVIOUS.name).unlink()
    with pytest.raises(
        BadInput, match="the checkpoint of another training; delete the folder 'checkpoints'"
    ):
        SafetensorsIO().load_checkpoint(mine)


def test_a_run_that_was_renamed_keeps_its_checkpoints(tmp_path):
    last = training(tmp_path / "a", "1" * 12)
    (tmp_path / "a").rename(tmp_path / "c")
    assert (
        SafetensorsIO().load_checkpoint(tmp_path / "c" / last.relative_to(tmp_path / "a"))["step"]
        == 2
    )
