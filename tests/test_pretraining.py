"""Targets trained when missing: what is kept of one, killed ones that go on, and references to
others' checkpoints.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from support import tiny_checkpoints
from support.tiny_run import done, killed

from spd_lightning import (
    BadInput,
    Decoder,
    Decomposition,
    InductionTokens,
    TargetTraining,
    Text,
    cli,
    runs,
)
from spd_lightning.training.open_target import open_target
from spd_lightning.training.pretraining import report, train_target
from spd_lightning.training.schedule import Schedule
from spd_lightning.training.session import quiet
from spd_lightning.training.tensor_files import read_tensors

CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "spd_lightning.TargetTraining",
        "init_args": {
            "lr": 1e-2,
            "weight_decay": 0.1,
            "decay": "matrices",
            "betas": [0.9, 0.95],
            "clip": 1.0,
            "schedule": {"kind": "cosine", "warmup": 5},
            "inner_steps": 5,
            "log_every": 5,
            "checkpoint_every": 20,
            "target": {
                "class_path": "spd_lightning.Decoder",
                "init_args": {
                    "vocab": 9,
                    "d_model": 16,
                    "n_layers": 1,
                    "n_heads": 2,
                    "context": 12,
                },
            },
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": 120, "val_check_interval": 8},
    "data": {
        "class_path": "spd_lightning.InductionTokens",
        "init_args": {"vocab": 9, "seq_len": 12, "batch_size": 16, "validation_batches": 2},
    },
}
FIT = ["fit", "--config", "tiny.yaml"]


@pytest.fixture(autouse=True)
def _quiet():
    """As the command line has it."""
    with quiet():
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working directory with a config of a second, and where its targets go."""
    here = tmp_path_factory.mktemp("pretraining")
    (here / "tiny.yaml").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("SPD_RUNS", str(here / "runs"))
        yield here


@pytest.fixture(scope="module")
def plain(here) -> Path:
    """The folder of a target trained by the command, undisturbed."""
    done(here / "runs", FIT)
    return next((here / "runs/targets").iterdir())


# ---- what is kept --------------------------------------------------------------------------------


def test_the_folder_of_a_trained_target(plain):
    names = {path.name for path in plain.iterdir()} - {".lock"}
    assert names == {"target.safetensors", "target.json", "metrics.jsonl", "figures", "samples.txt"}
    assert (plain / "figures/loss.png").read_bytes().startswith(b"\x89PNG")
    logged = runs.Run(plain).metrics()
    assert logged["train/loss"].drop_nulls().len() == 120 // 5 + 1
    assert logged["validation/loss"].drop_nulls().len() >= 3
    losses = logged["train/loss"].drop_nulls()
    assert losses[-1] < losses[0]
    assert min(logged["train/gradient_norm"].drop_nulls().to_list()) > 0


def validation_loss(folder: Path) -> float:
    """That of the kept weights, by a plain loop in float32."""
    network = Decoder(**CONFIG["model"]["init_args"]["target"]["init_args"])
    network.load_state_dict(read_tensors(folder / "target.safetensors")[0])
    data = InductionTokens(**CONFIG["data"]["init_args"])
    with torch.no_grad():
        return sum(float(network.loss(data.batch(step, split="val"))) for step in range(2)) / 2


def test_its_losses_are_those_of_its_weights(plain):
    losses = runs.read_json(plain / "target.json")["losses"]
    loss = validation_loss(plain)
    assert losses["validation"] == pytest.approx(loss, rel=1e-6)
    assert losses["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert runs.Run(plain).metrics()["validation/loss"].drop_nulls()[-1] == pytest.approx(
        loss, rel=1e-6
    )


def test_what_the_command_says(here, plain, capsys):
    """A target that is there is not trained again."""
    before = (plain / "target.safetensors").stat().st_mtime_ns
    assert cli.run(FIT) == 0
    losses = runs.read_json(plain / "target.json")["losses"]
    said = capsys.readouterr().out
    assert (
        f"validation loss {losses['validation']:.4g} nats, perplexity {losses['perplexity']:.4g}"
        in said
    )
    assert said.strip() == report(here / "runs/targets" / plain.name)
    assert (plain / "target.safetensors").stat().st_mtime_ns == before


def test_samples_begin_as_the_data_do(plain):
    """Where the data have no words, tokens are shown by number."""
    data = InductionTokens(**CONFIG["data"]["init_args"])
    lines = (plain / "samples.txt").read_text().splitlines()
    rows = [line for line in lines if line.startswith("(")]
    assert len(rows) == 6
    for row, wanted in zip(rows, data.batch(0, split="val"), strict=False):
        given, own = row.partition(") ")[2].split("▸")
        assert [int(token) for token in given.split()] == wanted[:6].tolist()
        assert len(own.split()) == 12 - 6


def test_a_language_model_of_text(here):
    """Its samples are text, and begin as the validation text does."""
    rhyme = json.dumps({"text": "Jack and Jill went up the hill to fetch a pail of water. " * 20})
    (here / "rhyme.jsonl").write_text(f"{rhyme}\n" * 60)
    config = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"]["target"]["init_args"]["vocab"] = 290
    text = {"corpus": str(here / "rhyme.jsonl"), "vocab": 290, "seq_len": 12, "batch_size": 16}
    config["data"] = {"class_path": "spd_lightning.Text", "init_args": text}
    folder = train_target("rhyme.yaml", config)
    samples = (folder / "samples.txt").read_text().partition("\n")[2]
    data = Text(**text)
    for number, row in enumerate(data.batch(0, split="val")[:6], 1):
        assert f"({number}) {data.decode(row[:6].tolist())}▸" in samples
    own = " ".join(part.partition("▸")[2] for part in samples.split("("))
    assert {"Jack", "hill", "water"} & set(own.replace(".", "").split())
    kept = Text(**text | {"tokenizer": str(folder)})
    assert kept.encode("Jill fetched a pail") == data.encode("Jill fetched a pail")


def test_a_decomposition_takes_it_by_its_config(here, plain):
    module = Decomposition("tiny.yaml", {"h.*.mlp.c_fc": 3})
    held = read_tensors(plain / "target.safetensors")[0]
    assert all(
        torch.equal(tensor, held[name]) for name, tensor in module.network.state_dict().items()
    )
    assert module.target_spec is not None
    assert module.target_spec["seconds"] > 0


# ---- killed ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [30, 95])
def test_a_killed_training_ends_as_if_never_killed(here, plain, step):
    """Weights and log, bit for bit."""
    root = here / f"killed{step}" / "runs"
    root.mkdir(parents=True)
    shutil.copy(here / "tiny.yaml", root.parent)
    folder = root / "targets" / plain.name

    def reached() -> bool:
        logged = (
            (folder / "metrics.jsonl").read_text().splitlines()
            if (folder / "metrics.jsonl").exists()
            else []
        )
        return (folder / "checkpoints/last.safetensors").exists() and any(
            f'"step": {step}' in line for line in logged
        )

    killed(root, FIT, reached)
    assert not (folder / "target.json").exists()
    done(root, FIT)
    for name in ("target.safetensors", "metrics.jsonl", "samples.txt"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes(), name
    assert not (folder / "checkpoints").exists()


def test_a_further_seed_begins_anew(here, monkeypatch):
    """Nothing of the failed attempt is gone on from, and a training killed in the second attempt
    stays there.
    """
    monkeypatch.setenv("SPD_RUNS", str(here / "seeds"))
    config = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"] |= {"retries": 2, "checkpoint_every": 5}
    config["trainer"]["max_steps"] = 20
    seen = []

    def failing(self):
        seen.append(self.wte.weight.detach().clone())
        return [0] if len(seen) == 1 else []

    monkeypatch.setattr(Decoder, "unrepresented", failing)
    folder = train_target("again.yaml", config)
    assert runs.read_json(folder / "target.json")["seed"] == 1
    monkeypatch.setattr(Decoder, "unrepresented", lambda self: [])
    other = train_target("other.yaml", {**config, "seed_everything": 1})
    assert (folder / "target.safetensors").read_bytes() == (
        other / "target.safetensors"
    ).read_bytes()
    assert len(seen) == 2
    assert not torch.equal(*seen)
    (folder / "target.json").unlink()
    runs.write_json(folder / "attempt.json", {"seed": 2})
    assert runs.read_json(train_target("again.yaml", config) / "target.json")["seed"] == 2


def test_a_further_seed_follows_the_one_of_the_command_line(here, monkeypatch):
    monkeypatch.setenv("SPD_RUNS", str(here / "said"))
    config = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"] |= {"retries": 2}
    config["trainer"]["max_steps"] = 2
    missed = [[0], []]
    monkeypatch.setattr(Decoder, "unrepresented", lambda self: missed.pop(0))
    folder = train_target("again.yaml", config, ["--seed_everything", "5"])
    assert runs.read_json(folder / "target.json")["seed"] == 6
    with pytest.raises(BadInput, match="seed_everything"):
        train_target("again.yaml", config | {"seed_everything": "abc"})


# ---- the optimizer -------------------------------------------------------------------------------


def fitted(precision: Any = "32-true", steps: int = 6, **settings) -> Decoder:
    torch.manual_seed(0)
    network = Decoder(9, 16, 1, 2, 12, bias=True)
    module = TargetTraining(network, log_every=1, **settings)
    data = InductionTokens(9, 12, 16, validation_batches=0)
    options: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision=precision,
        logger=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module, data)
    return network


def by_hand(
    steps: int = 6,
    decay: float = 0.0,
    betas=(0.9, 0.999),
    clip: float | None = None,
    warmup: int = 0,
) -> Decoder:
    """A raw loop with torch's AdamW, matrices decayed, the schedule written out."""
    torch.manual_seed(0)
    network = Decoder(9, 16, 1, 2, 12, bias=True)
    data = InductionTokens(9, 12, 16)
    groups = [
        {
            "params": [p for p in network.parameters() if (p.ndim > 1) == matrix],
            "weight_decay": decay * matrix,
        }
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=betas)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / warmup if warmup else 1.0)
        optimizer.zero_grad()
        network.loss(data.batch(step)).backward()
        if clip:
            norm = sum(float(p.grad.double().square().sum()) for p in network.parameters()) ** 0.5
            for p in network.parameters():
                p.grad *= min(1.0, clip / norm)
        optimizer.step()
    return network


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"weight_decay": 0.5, "decay": "matrices"}, {"decay": 0.5}),
        ({"weight_decay": 0.0, "betas": (0.7, 0.9)}, {"betas": (0.7, 0.9)}),
        ({"weight_decay": 0.0, "clip": 0.05}, {"clip": 0.05}),
        ({"weight_decay": 0.0, "schedule": Schedule("constant", warmup=4)}, {"warmup": 4}),
    ],
    ids=["decay", "betas", "clip", "warm-up"],
)
def test_training_is_a_plain_loop(settings, wanted):
    one = fitted(lr=0.01, **settings)
    two = by_hand(**wanted)
    other = by_hand()
    for name, parameter in one.state_dict().items():
        torch.testing.assert_close(parameter, two.state_dict()[name], rtol=0, atol=2e-5)
    assert (
        max((p - q).abs().max() for p, q in zip(two.parameters(), other.parameters(), strict=True))
        > 1e-3
    )


def test_biases_decay_only_if_asked():
    groups = (
        TargetTraining(Decoder(9, 16, 1, 2, 12, bias=True), weight_decay=0.5)
        .configure_optimizers()
        .param_groups
    )
    assert [group["weight_decay"] for group in groups] == [0.5]


def test_mixed_precision_does_not_depend_on_inner_steps():
    """No copy of a weight in bfloat16 outlives the update of that weight."""
    one, two = (fitted("bf16-mixed", lr=0.01, inner_steps=inner) for inner in (1, 6))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.wte.weight, fitted(lr=0.01).wte.weight)


def test_mixed_precision_trains(here):
    """And what it comes to is measured in full precision."""
    config = json.loads(json.dumps(CONFIG))
    config["trainer"] |= {"precision": "bf16-mixed", "max_steps": 40}
    folder = train_target("mixed.yaml", config)
    loss = runs.read_json(folder / "target.json")["losses"]["validation"]
    assert loss < math.log(9)
    assert loss == pytest.approx(validation_loss(folder), rel=1e-6)


@pytest.mark.parametrize(("setting", "value"), [("lr", 0.0), ("clip", 0.0)])
def test_settings_that_cannot_be(setting, value):
    with pytest.raises(BadInput, match=f"{setting} 0.0 in TargetTraining"):
        TargetTraining(Decoder(9, 16, 1, 2, 12), **{setting: value})


# ---- data that do not fit ------------------------------------------------------------------------


def message_of(**data) -> str:
    config = json.loads(json.dumps(CONFIG))
    config["data"]["init_args"] |= data
    with pytest.raises(BadInput) as caught:
        train_target("unfit.yaml", config)
    return str(caught.value)


def test_tokens_beyond_the_vocabulary(here):
    assert message_of(vocab=1204).startswith("data: token 12")
    assert (
        "is outside the target's vocabulary of 9; use the tokenizer it was trained with"
        in message_of(vocab=1204)
    )


def test_sequences_longer_than_the_context(here):
    assert message_of(seq_len=13).startswith(
        "a sequence of 13 tokens in Decoder: its context holds 12"
    )


# ---- others' checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["hf", "decoder"])
def test_a_checkpoint_as_target(tmp_path, prefix):
    """Its logits; and rebuilt from what a decomposition keeps of it."""
    model = tiny_checkpoints.write(tmp_path, "gpt2")
    tokens = tiny_checkpoints.tokens()
    network, spec = open_target(f"{prefix}:{tmp_path}")
    wanted = model(tokens).logits
    torch.testing.assert_close(
        network.float()(tokens), wanted, rtol=0, atol=0.05 * wanted.abs().max().item()
    )
    assert spec["seconds"] == 0
    assert spec["class_path"] in ("spd_lightning.HuggingFaceLM", "spd_lightning.Decoder")


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(BadInput, match="no such folder"):
        open_target("decoder:./nothing")
