"""Sizing: what a plan says of parameters, FLOPs and memory is what a real step of the same module
has.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spd_lightning import cli, config
from spd_lightning.commands import plan
from spd_lightning.decomposition.adversaries import Adversary
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.losses import Faithfulness, Losses, Minimality
from spd_lightning.decomposition.masks import RouteKind
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction
from spd_lightning.errors import BadInput
from spd_lightning.planning import devices, estimate, precision
from spd_lightning.planning.dry_run import (
    CLEAN,
    FAITHFULNESS,
    IMPORTANCE,
    CostCounter,
    StepCost,
    Work,
    fake_tensors,
    measure_step,
    step,
)
from spd_lightning.targets.toy import TMS
from spd_lightning.targets.transformer import Decoder
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.open_target import open_target
from spd_lightning.training.session import Settings, quiet

B, T, V, C = 4, 16, 60, 20


def decoder(fused: bool = False) -> Decoder:
    return Decoder(V, 32, 2, 4, T, n_kv_heads=2, fused_attention=fused)


def tokens() -> Tensor:
    return torch.zeros(B, T, dtype=torch.long)


def decomposition(
    *terms: Reconstruction, importance: Importance | None = None, fused: bool = False, **more
):
    """What makes a module on a small decoder with these reconstructions."""
    named = {f"term {k}": term for k, term in enumerate(terms)}
    losses = Losses(Faithfulness(1.0), Minimality(1e-3, 2.0, 0.3), reconstruction=named)
    sites = {"h.*.attn.*_proj": C, "h.*.mlp.*": C + 4}
    kind = importance or Importance("shared_mlp", 12)
    return lambda: Decomposition(decoder(fused), sites, importance=kind, losses=losses, **more)


STOCHASTIC = Reconstruction("stochastic", "all", "kl")
LAYERWISE = Reconstruction("stochastic", "layerwise", "kl")
SUBSET = Reconstruction("stochastic", "subset", "kl", 0.5)


def adversarial(steps: int, route: RouteKind = "all") -> Reconstruction:
    return Reconstruction("pgd", route, "kl", 0.5, adversary=Adversary(steps, 1.0))


MODULES: dict[str, Callable[[], Decomposition]] = {
    "two terms": decomposition(STOCHASTIC, adversarial(2)),
    "one site at a time": decomposition(LAYERWISE),
    "samples": decomposition(Reconstruction("stochastic", "all", "kl", samples=3)),
    "mlp": decomposition(STOCHASTIC, importance=Importance("mlp", 8)),
    "vector_mlp": decomposition(STOCHASTIC, importance=Importance("vector_mlp", 4)),
    "global_mlp": decomposition(STOCHASTIC, importance=Importance("global_mlp", 8)),
    "transformer": decomposition(
        STOCHASTIC, importance=Importance("transformer", d_model=16, layers=2, heads=2)
    ),
    "no delta": decomposition(STOCHASTIC, delta=False),
    "without reconstruction": decomposition(),
}


@cache
def planned(name: str) -> StepCost:
    """Return the cost of a step of one of these modules; a dry run takes seconds."""
    return measure_step(MODULES[name], tokens, None)


@cache
def tiny_size() -> estimate.Size:
    """Return the size of stories-1L-tiny."""
    return estimate.size_of(Settings(config.load("stories-1L-tiny")))


def real_flops(module: Decomposition, batch: Tensor, precision: torch.dtype | None = None) -> int:
    """Of one training step, counted by torch itself."""
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            run = LossContext.from_batch(module.model, batch, torch.Generator().manual_seed(0))
            loss = module.losses(run)[0]
        loss.backward()
    return counter.get_total_flops()


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_flops_are_those_that_torch_counts(name):
    """Of a whole real step, forward and backward, to the last one.

    The target's attention is written out. The importance transformer's is fused, which torch does
    not count on processors: two products of [T, T, width] forward and five backward, in each of two
    layers.
    """
    said = planned(name).total.flops
    fused = 2 * (2 + 5) * 2 * B * T * T * 16 if name == "transformer" else 0
    assert said == real_flops(MODULES[name](), tokens()) + fused > 1e6


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_flops_of_random_routes_are_their_expectation(precision):
    """How many positions are decomposed is drawn anew at each step: one real step is within 5 % of
    the plan.
    """
    make = decomposition(SUBSET, adversarial(1, "subset"))
    said = measure_step(make, lambda: torch.zeros(16, T, dtype=torch.long), precision).total.flops
    assert said == pytest.approx(
        real_flops(make(), torch.zeros(16, T, dtype=torch.long), precision), rel=0.05
    )


def test_fused_attention_counts_as_much_as_attention_written_out():
    """torch does not count the fused kernel of processors; the plan does, its backward pass
    included.
    """
    fused, plain = (
        measure_step(decomposition(STOCHASTIC, fused=f), tokens, None).parts for f in (True, False)
    )
    assert fused[CLEAN].forward == plain[CLEAN].forward
    term = "reconstruction/term 0"
    assert fused[term].forward == plain[term].forward
    assert fused[term].backward > plain[term].backward  # the pattern is computed again, not kept
    assert fused[term].backward == pytest.approx(plain[term].backward, rel=0.1)


def test_flops_of_every_part():
    """By pencil: 2mkn for every product, once forward and once for each factor that needs a
    gradient.
    """
    parts = measure_step(decomposition(STOCHASTIC), tokens, None).parts
    module = decomposition(STOCHASTIC)()
    sites = [
        (site.d_in, site.d_out, module.model.counts[name])
        for name, site in module.model.sites.items()
    ]
    assert parts[FAITHFULNESS].forward == sum(2 * i * c * o for i, o, c in sites)
    assert parts[FAITHFULNESS].backward == 2 * parts[FAITHFULNESS].forward
    first, last = (sum(2 * B * T * n * m for n, m in pairs) for pairs in _networks(sites))
    assert parts[IMPORTANCE].forward == first + last
    assert (
        parts[IMPORTANCE].backward == first + 2 * last
    )  # nobody asks for the gradient of a site's clean input
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder()(tokens())
    inner = sum(2 * B * T * i * c for i, _, c in sites)
    assert counter.get_total_flops() <= parts[CLEAN].forward <= counter.get_total_flops() + inner
    assert set(parts) >= {CLEAN, IMPORTANCE, FAITHFULNESS, "reconstruction/term 0"}


def _networks(
    sites: list[tuple[int, int, int]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Input and output width of both layers of every shared_mlp."""
    return [(i, 12) for i, _, _ in sites], [(12, c) for _, _, c in sites]


def test_every_ascent_costs_the_same():
    """An adversary's ascents are forward work of its term, and its backward pass is that of one
    without ascents.
    """
    none, one, three = (
        measure_step(decomposition(adversarial(n)), tokens, None).parts["reconstruction/term 0"]
        for n in (0, 1, 3)
    )
    assert none.forward < one.forward
    assert three.forward - none.forward == 3 * (one.forward - none.forward)
    assert none.backward == one.backward == three.backward


def test_positions_of_a_route_are_expected_or_all():
    """A mask without numbers has as many positions as its route has on average, on a GPU all."""
    found = {}
    for whole in (False, True):
        with fake_tensors(whole) as counter:
            mask = torch.rand(10, 20) < 0.1
            with counter.part("a term", routed=0.25):
                found[whole] = len(mask.flatten().nonzero()[:, 0])
            assert counter.gathered
            assert len(mask.nonzero()) == 200
    assert found == {False: 50, True: 200}


def test_work_grows_with_the_batch():
    """Products of activations grow with the number of sequences, faithfulness does not."""
    small = planned("two terms").parts
    large = measure_step(MODULES["two terms"], lambda: tokens().repeat(5, 1), None).parts
    for name, work in small.items():
        assert large[name].flops == (work.flops if name == FAITHFULNESS else 5 * work.flops), name


# ---- memory --------------------------------------------------------------------------------------


def real_step(make: Callable[[], Decomposition]) -> tuple[StepCost, Decomposition]:
    """The ledger's reading of a step with real numbers."""
    module = make()
    batch = tokens()
    with CostCounter() as counter:
        for tensor in (*module.parameters(), *module.buffers()):
            counter._keep(tensor.untyped_storage())
        return step(counter, module, batch, None, counter.alive), module


@pytest.mark.parametrize("name", ["two terms", "one site at a time", "transformer", "mlp"])
def test_memory_is_that_of_real_tensors(name):
    """Gradients and the optimizer's state to the byte; what a step keeps, as the same step with
    numbers keeps it.
    """
    said = planned(name)
    real, module = real_step(MODULES[name])
    trained = [p for p in module.parameters() if p.requires_grad]
    assert said.gradients == sum(p.grad.numel() * 4 for p in trained if p.grad is not None) > 0
    optimizer = module.configure_optimizers()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert said.state == sum(t.numel() * t.element_size() for t in moments)
    assert said.activations == pytest.approx(real.activations, rel=0.02)


@pytest.mark.parametrize("parts", [1, 2])
def test_persistent_adversaries_stay_in_memory(parts):
    """Per sample, position and site: C + 1 sources with two moments each; activations are a part's
    alone.
    """
    persistent = Reconstruction("persistent_pgd", "all", "kl", 0.5)
    build = decomposition(persistent)

    def make() -> Decomposition:
        module = build()
        module.micro_batches = parts
        return module

    said = measure_step(make, tokens, None)
    once = measure_step(decomposition(adversarial(3)), tokens, None)
    sources = sum(B * T * (C + 1) for C in build().model.counts.values())
    assert said.adversaries == 3 * 4 * sources
    assert said.activations == pytest.approx(once.activations / parts, rel=0.25)
    assert said.state == once.state


def test_activations_cover_what_autograd_saves():
    """An independent reading: the storages that the graph holds when the backward pass begins.

    Without ascents, whose graphs are gone by then and whose storages may have been taken by others.
    """
    module = MODULES["samples"]()
    saved = dict[int, int]()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    run = LossContext.from_batch(module.model, tokens(), torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.losses(run)[0]
    held = sum(saved.values())
    said = planned("samples").activations
    assert loss.requires_grad
    assert held <= said <= 2.5 * held


def test_nothing_is_allocated():
    """A model far too large for any machine is rehearsed as well as a small one."""
    gc.collect()
    large = decomposition(STOCHASTIC)().losses

    def make() -> Decomposition:
        target = Decoder(V, 8192, 2, 64, T)
        return Decomposition(
            target, {"h.*.mlp.*": 500_000}, importance=Importance("shared_mlp", 1000), losses=large
        )

    said = measure_step(make, tokens, None)
    assert said.gradients > 100 * 2**30


def test_the_ledger_forgets_what_is_dropped():
    with CostCounter() as counter:
        a = torch.ones(1000)
        b = a.view(10, 100)
        assert counter.alive == 4000
        del a, b
        assert (counter.alive, counter.peak) == (0, 4000)


# ---- configs -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def unlogged(tmp_path, monkeypatch):
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    with quiet():
        yield


def test_parameters_are_those_of_the_module():
    """Of a shipped config, against its module on a real network."""
    settings = Settings(config.load("stories-1L-tiny"))
    size = estimate.size_of(settings)
    module = settings.built("model", target=estimate.outline("pretrain/stories-1L-tiny.yaml")())
    model = module.model

    def count(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    assert size.target == count(model.target)
    assert size.importance == count(model.importance_function)
    assert [(s.name, s.C, s.parameters) for s in size.sites] == [
        (n, c, count(model[n])) for n, c in model.counts.items()
    ]
    assert size.weights == 4 * (
        size.target + size.importance + sum(s.parameters for s in size.sites)
    ) + sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert size.memory["gradients"] == 4 * (size.importance + sum(s.parameters for s in size.sites))
    assert size.memory["optimizer"] == 2 * size.memory["gradients"]
    assert (size.steps, size.warm_up, size.mixed, size.tokens) == (300, 50, False, 8 * 32)


def test_tied_sites_have_no_parameters_of_their_own():
    size = estimate.size_of(Settings(config.load("tms_5-2")))
    assert [site.parameters for site in size.sites] == [7 * 20, 0]
    assert size.target == sum(p.numel() for p in TMS(5, 2).parameters())


def test_no_target_is_trained(tmp_path):
    estimate.size_of(Settings(config.load("stories-1L-tiny")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["hf", "decoder"])
def test_of_a_checkpoint_its_configuration_is_enough(tmp_path, kind):
    """Its weights are not read: here there are none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "model")
    reference = f"{kind}:{tmp_path / 'model'}"
    network, _ = open_target(reference)
    (tmp_path / "model" / "model.safetensors").unlink()
    like = estimate.outline(reference)()
    assert {n: p.shape for n, p in like.named_parameters()} == {
        n: p.shape for n, p in network.named_parameters()
    }
    pattern = "transformer.h.*.mlp.c_fc" if kind == "hf" else "h.*.mlp.c_fc"
    given = config.load("stories-1L-tiny")
    given["model"]["init_args"] |= {"target": reference, "sites": {pattern: 12}}
    (site,) = estimate.size_of(Settings(given)).sites
    assert site.parameters == 12 * (16 + 64)


# ---- hours ---------------------------------------------------------------------------------------


def test_hours_are_work_over_speed():
    device = estimate.Device(
        "mine", half=4e12, single=1e12, bandwidth=1e9, memory=1e9, launch=1e-3, share=0.5
    )
    work = Work(forward=3 * 10**12, backward=10**12, moved=5 * 10**9, operations=100)
    assert device.seconds(work, mixed=False) == pytest.approx(4 / 0.5 + 10 + 0.1)
    assert device.seconds(work, mixed=True) == pytest.approx(4 / 2 + 10 + 0.1)
    size = estimate.Size(
        1, [], 1, 1, StepCost({FAITHFULNESS: work, CLEAN: work}, 0, 0, 0), 10, 20, True, 1
    )
    assert size.hours(device) == pytest.approx((10 * 2 * 12.1 + 20 * 18.1) / 3600)


def test_this_machine_is_measured():
    here = devices.measured()
    assert 1e8 < here.single < 1e16
    assert 1e8 < here.bandwidth < 1e14
    assert 1e-8 < here.launch < 1e-2
    assert here.memory <= 2**50


def test_plan_prints_what_it_will_take(capsys):
    assert (
        cli.run(["plan", "--config", "stories-1L-tiny", "--device", "h100", "--data.batch_size=16"])
        == 0
    )
    out = capsys.readouterr().out
    given = config.load("stories-1L-tiny")
    given["data"]["init_args"]["batch_size"] = 16
    size = estimate.size_of(Settings(given), gpu=True)
    rows = {
        line.split("  ")[1].strip(): line.split()
        for line in out.splitlines()
        if line.startswith("  ")
    }
    assert rows["target"][-1] == f"{size.target:,}"
    assert rows["h.0.mlp.c_fc"][-2:] == ["24", f"{24 * (32 + 128):,}"]
    assert rows["activations"][-1] == f"{size.memory['activations'] / 2**30:.3f}"
    assert rows["clean run"][2] == f"{size.step.parts[CLEAN].forward / 1e9:,.3f}"
    assert "NVIDIA H100" in rows
    assert "NVIDIA A100 80 GB" not in rows
    assert f"{16 * 32:,}" in out


def test_slow_bfloat16_is_reported(monkeypatch):
    """A plan has a line about each device that is slower in bfloat16 than in float32."""
    size = replace(tiny_size(), mixed=True)
    fast = devices.device_named("h100")
    slow = replace(fast, name="old CPU", half=1.3e9, single=87e9)
    line = (
        "  old CPU: bfloat16 runs at 1.3 GFLOP/s, and float32 at 87 GFLOP/s; to train in float32, "
        "add --trainer.precision 32-true"
    )
    lines = list(plan.table([(fast, size), (slow, size)]))
    assert [text for text in lines if "to train in float32" in text] == [line]
    plain = replace(size, mixed=False)
    assert line not in plan.table([(slow, plain)])
    monkeypatch.setattr(precision, "products_per_second", lambda place: (1.3e9, 87e9))
    on_cpu = {"accelerator": "cpu", "precision": "bf16-mixed"}
    assert precision.slow_here(on_cpu).startswith("bfloat16 runs at 1.3 GFLOP/s")
    assert precision.slow_here(on_cpu | {"precision": "32-true"}) == ""


def test_columns_of_a_plan_are_as_wide_as_its_names():
    """Each part of a plan has its numbers below each other, however long the names of modules
    are.
    """
    size = tiny_size()
    name = "model.layers.11.block_sparse_moe.experts.3.down_proj"
    long = replace(size, sites=[replace(size.sites[0], name=name), *size.sites[1:]])
    device = devices.device_named("h100")
    for one, width in ((size, plan.LEAST_WIDTH), (long, len(name))):
        lines = list(plan.table([(device, one)]))
        parts = "\n".join(lines).split("\n\n")
        for part in parts[:3]:
            assert len({len(line) for line in part.splitlines()}) == 1
        assert parts[0].splitlines()[1].startswith(f"  {'target':<{width}} ")
        assert any(line.startswith(f"  {one.sites[0].name:<{width}} ") for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device h10", "--device 'h10': unknown value; did you mean 'h100'?"),
        ("--modle.x 3", "config: modle"),
        ("--model.sites={'nope':3}", "sites: pattern 'nope' matches no module of the target"),
        (
            "--model.target pretrain/none",
            "target 'pretrain/none': config 'pretrain/none': no such file",
        ),
    ],
)
def test_plan_refuses(words, said, capsys):
    assert cli.run(["plan", "--config", "stories-1L-tiny", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_a_target_has_no_plan(capsys):
    assert cli.run(["plan", "--config", "pretrain/stories-1L-tiny"]) == 2
    assert "not a Decomposition" in capsys.readouterr().err


# ---- what does not fit ---------------------------------------------------------------------------


def test_more_components_than_memory_allows(tmp_path, capsys):
    """Refused at once, with the plan's figure, before a target is trained or a folder is made."""
    words = [
        "fit",
        "--config",
        "stories-1L-tiny",
        "--model.sites",
        "{h.*.mlp.c_fc: 400000000, h.*.attn.*_proj: 24}",
    ]
    assert cli.run(words) == 2
    err = capsys.readouterr().err.strip()
    given = config.load("stories-1L-tiny")
    given["model"]["init_args"]["sites"] = {"h.*.mlp.c_fc": 400_000_000, "h.*.attn.*_proj": 24}
    needed = sum(estimate.size_of(Settings(given)).memory.values()) / 2**30
    assert (
        f"sites: 'h.0.mlp.c_fc: 400000000' and the others take {needed:.1f} GiB with batches of 8"
        in err
    )
    assert err.count("\n") == 0
    assert not (tmp_path / "runs").exists()


def test_what_fits_just_so(monkeypatch):
    """The bound lies where the plan puts it; the rough one, which saves most fits the plan, lies
    above it.
    """
    plan_of = cache(estimate.size_of)  # a plan takes seconds, and three of these need the same one
    monkeypatch.setattr(estimate, "size_of", lambda given, gpu=False: plan_of(given, gpu))
    settings = Settings(config.load("stories-2L"))
    needed = float(sum(estimate.size_of(settings).memory.values()))
    estimate.check_memory(settings, available=needed)
    with pytest.raises(BadInput, match="use fewer components or a smaller batch"):
        estimate.check_memory(settings, available=needed - 1)
    others = ("stories-1L-tiny", "code-2L", "ss_llama_simple_mlp-2L", "resid_mlp1", "tms_40-10-id")
    for chosen in (settings, *(Settings(config.load(name)) for name in others)):
        assert estimate.rough_bound(chosen) > sum(estimate.size_of(chosen).memory.values())


def test_memory_of_this_machine():
    words = Path("/proc/meminfo").read_text().split()
    assert (
        0
        < devices.machine_memory(torch.device("cpu"))
        <= 1024 * int(words[words.index("MemTotal:") + 1])
    )
