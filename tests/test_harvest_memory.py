"""The memory of a predict in a plan is what a real harvest of the same module needs."""

import gc

import pytest
import torch

from spd_lightning import Decomposition, Statistics, cli, config
from spd_lightning.data.modules import Prompts
from spd_lightning.planning.dry_run import CostCounter
from spd_lightning.planning.harvests import harvest_memory
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.session import Settings, quiet


def planned(*harvesters: str, **data) -> dict[str, int]:
    """The memory of harvests of stories-1L-tiny, by purpose."""
    given = config.load("stories-1L-tiny")
    given["trainer"]["callbacks"] = [{"class_path": name} for name in harvesters]
    given["data"]["init_args"] |= data
    with quiet():
        return harvest_memory(Settings(given))


def test_a_harvest_needs_what_the_plan_says():
    """The tensors of a real batch are at most the planned ones, and more than a third of them."""
    with quiet():
        settings = Settings(config.load("stories-1L-tiny"))
    said = planned("spd_lightning.Statistics", predict_batch_size=64)
    data = settings.built("data")
    torch.manual_seed(0)
    target = Decoder(300, 32, 1, 2, data.seq_len)
    module: Decomposition = settings.built("model", target=target)
    harvester = Statistics()
    harvester._settings = harvester.manifest(module)
    inputs = torch.randint(300, (64, data.seq_len))
    words = ["word"] * 64
    gc.collect()
    with CostCounter() as counter:
        harvester.rows(module, Prompts(inputs, words, words), list(range(64)))
    assert counter.peak / 3 < said["forward passes of a batch"]
    assert counter.peak < said["forward passes of a batch"] + said["statistics: firings of a batch"]


def test_memory_grows_with_the_batch():
    small = planned("spd_lightning.Statistics", predict_batch_size=8)
    large = planned("spd_lightning.Statistics", predict_batch_size=16)
    passes = "forward passes of a batch"
    assert large[passes] == pytest.approx(2 * small[passes], rel=0.05)
    assert large["statistics: counts"] == small["statistics: counts"]
    assert large["weights"] == small["weights"]


def test_harvesters_share_the_passes():
    both = planned("spd_lightning.Statistics", "spd_lightning.PromptGraphs")
    alone = planned("spd_lightning.Statistics")
    assert set(both) - set(alone) == {"graphs-unmasked: edges"}
    assert {key: both[key] for key in alone} == alone
    assert planned() == {}


def test_plan_prints_the_memory_of_predict(capsys):
    words = ["plan", "--config", "stories-1L-tiny", "--device", "h100"]
    assert cli.run([*words, "--config", "statistics"]) == 0
    lines = capsys.readouterr().out.splitlines()
    title = next(k for k, line in enumerate(lines) if line.startswith("memory of predict, at most"))
    block = {line.split("  ")[1]: float(line.split()[-1]) for line in lines[title + 1 :]}
    assert {"weights", "statistics: counts", "statistics: examples", "total"} <= set(block)
    total = block.pop("total")
    assert total == pytest.approx(sum(block.values()), abs=0.002)


def test_an_invalid_harvester_is_one_line(capsys):
    harvester = '[{"class_path": "spd_lightning.Statistics", "init_args": {"threshold": 2}}]'
    words = ["plan", "--config", "stories-1L-tiny", "--trainer.callbacks", harvester]
    assert cli.run(words) == 2
    message = capsys.readouterr().err
    assert "threshold 2" in message
    assert message.count("\n") == 1
