"""The transformer importance function (laws G1, D7): against loops over positions and heads; what
it cannot see.
"""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from support.networks import Branches, Perceptron, Tokens, decomposed
from support.tensors import gradient_of, sum_of
from torch import nn

from spd_lightning.decomposition.components import available
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.decomposition.importance_transformer import chunks_of_layers, rotated, rotation
from spd_lightning.decomposition.losses import Losses
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction
from spd_lightning.errors import BadInput

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
SMALL: dict[str, Any] = {"kind": "transformer", "d_model": 12, "layers": 2, "heads": 3, "d_mlp": 7}


def scrambled(network, **settings):
    """A model whose transformer has no zeros left and whose attention is neither flat nor sharp."""
    model = decomposed(network, importance=Importance(**SMALL | settings))
    for parameter in model.importance_function.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


# ---- the same, written out -----------------------------------------------------------------------


def scaled(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x, position):
    """A head's vector as complex numbers, each turned by an angle of its own."""
    half = len(x) // 2
    z = torch.complex(x[:half], x[half:])
    angles = torch.tensor(
        [position * 10_000.0 ** (-2 * i / len(x)) for i in range(half)], dtype=x.dtype
    )
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


def attended(block, h, heads, causal):
    """What attention adds at every position [pos d_model] of one sequence: query by query, head by
    head.
    """
    d = h.shape[1] // heads
    Wq, Wk, Wv = block.qkv.weight.chunk(3)
    mixed = []
    for s in range(len(h)):
        per_head = []
        for head in range(heads):
            part = slice(head * d, head * d + d)
            seen = range(s + 1) if causal else range(len(h))
            q = turned(Wq[part] @ scaled(h[s]), s)
            scores = torch.stack(
                [q @ turned(Wk[part] @ scaled(h[p]), p) for p in seen]
            ) / math.sqrt(d)
            weights = scores.exp() / scores.exp().sum()
            per_head.append(
                sum(w * (Wv[part] @ scaled(h[p])) for w, p in zip(weights, seen, strict=True))
            )
        mixed.append(block.o.weight @ torch.cat(per_head))
    return torch.stack(mixed)


def neurons(block, h):
    """What the MLP adds at every position."""
    u = scaled(h) @ block.up.weight.T + block.up.bias
    return (u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))) @ block.down.weight.T + block.down.bias


def written_out(function, inputs, config):
    """Pre-activations of all sites, one sequence after the other."""
    first = next(iter(inputs.values()))
    sequences = [{n: x[b] for n, x in inputs.items()} for b in range(len(first))]
    results = []
    for sequence in sequences:
        rows = [scaled(x if x.ndim == 2 else x[None]) for x in sequence.values()]
        h = torch.cat(rows, -1) @ function.first.weight.T + function.first.bias
        for block in function.blocks:
            h = h + attended(block, h, config.heads, config.causal)
            h = h + neurons(block, h)
        results.append(
            (h @ function.last.weight.T + function.last.bias).reshape(*first.shape[1:-1], -1)
        )
    z = torch.stack(results)
    start = 0
    cut = {}
    for name, C in function.counts.items():
        cut[name] = z[..., start : start + C]
        start = start + C
    return cut


@pytest.mark.parametrize("network", [Branches, Perceptron, Tokens])
@pytest.mark.parametrize("causal", [False, True])
def test_g1_the_transformer_is_its_loops_in_value_and_gradient(network, causal):
    model = scrambled(network, causal=causal)
    clean = model.clean(model.target.batch(3))
    inputs = {
        n: x.clone().requires_grad_() for n, x in clean.inputs.items() if x.is_floating_point()
    }
    function: Any = model.importance_function
    if network is Tokens:
        function = function.parts[1]
    wanted = [*function.parameters(), *inputs.values()]
    both = [function(inputs, {}), written_out(function, inputs, model.importance)]
    weighed = [
        sum_of((v * torch.linspace(-1, 2, v.numel()).reshape(v.shape)).sum() for v in z.values())
        for z in both
    ]
    assert list(both[0]) == list(inputs)
    assert {name: z.shape[-1] for name, z in both[0].items()} == {
        name: model.counts[name] for name in inputs
    }
    for name, z in both[0].items():
        torch.testing.assert_close(z, both[1][name], **EXACT)
    for a, b in zip(*(torch.autograd.grad(number, wanted) for number in weighed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_g1_beside_an_embedding_the_transformer_has_all_other_sites():
    model = scrambled(Tokens)
    clean = model.clean(model.target.batch())
    function: Any = model.importance_function
    z = function(clean.inputs, clean.inner)
    assert list(z) == list(model.sites)
    mlp, transformer = function.parts
    assert torch.equal(z["embed"], mlp.networks[0](clean.inner["embed"]))
    assert torch.equal(z["readout"], transformer(clean.inputs, {})["readout"])


# ---- what it sees --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("moved", [0, 2, 3])
def test_g1_the_future_reaches_the_past_unless_causal(causal, moved):
    model = scrambled(Branches, causal=causal)
    inputs = {name: torch.randn(2, 4, site.d_in).double() for name, site in model.sites.items()}
    other = {name: x.clone() for name, x in inputs.items()}
    other["up"][0, moved] += torch.randn(model.sites["up"].d_in).double()
    before, after = (model.importance_function(x, {})["q"] for x in (inputs, other))
    changed = [bool((before[0, s] - after[0, s]).abs().max() > 1e-6) for s in range(4)]
    assert changed == [s >= moved or not causal for s in range(4)]
    assert torch.equal(before[1], after[1]), "another sequence"


def test_g1_the_size_of_a_sites_input_is_not_seen():
    model = scrambled(Branches)
    inputs = {name: torch.randn(2, 4, site.d_in).double() for name, site in model.sites.items()}
    scales = {name: k + 0.5 for k, name in enumerate(inputs)}
    before = model.importance_function(inputs, {})
    after = model.importance_function({name: scales[name] * x for name, x in inputs.items()}, {})
    for name, z in before.items():
        torch.testing.assert_close(z, after[name])


def test_g1_without_a_position_axis_every_row_is_one_position():
    model = scrambled(Perceptron)
    inputs = {name: torch.randn(5, site.d_in).double() for name, site in model.sites.items()}
    flat = model.importance_function(inputs, {})
    for name, z in model.importance_function(
        {n: x[:, None] for n, x in inputs.items()}, {}
    ).items():
        assert torch.equal(flat[name], z[:, 0])
    folded = model.importance_function(
        {n: torch.stack([x, 2 - x])[:, :, None] for n, x in inputs.items()}, {}
    )
    for name, z in folded.items():
        torch.testing.assert_close(flat[name], z[0, :, 0])


def test_rotary_attention_knows_distances_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6).double()
    turn = rotation(40, 6, q)

    def score(s, p):
        there = [rotated(x.expand(1, 1, 40, 6), turn)[0, 0] for x in (q, k)]
        return (there[0][s] @ there[1][p]).item()

    for s, p, shift in ((3, 1, 7), (0, 5, 30), (9, 9, 20), (2, 11, 28)):
        assert score(s, p) == pytest.approx(score(s + shift, p + shift), abs=1e-12)
        assert score(s, p) == pytest.approx((turned(q, s) @ turned(k, p)).item(), abs=1e-12)
    assert score(7, 7) == pytest.approx((q @ k).item())
    assert abs(score(3, 1) - score(1, 3)) > 1e-3, "before and behind are two things"


def test_late_positions_keep_their_angles_in_float32():
    cos, sin = rotation(20_000, 64, torch.zeros(1))
    exact = rotation(20_000, 64, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(cos, exact[0].float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, exact[1].float(), rtol=0, atol=1e-7)


# ---- how it is run -------------------------------------------------------------------------------


def gradients(model):
    losses = Losses(
        reconstruction={"ci": Reconstruction("ci"), "random": Reconstruction("stochastic")}
    )
    total, _ = losses(
        LossContext.from_batch(model, model.target.batch(), torch.Generator().manual_seed(0))
    )
    return torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("causal", [False, True])
def test_checkpointed_activations_give_equal_gradients_and_keep_less(causal):
    kept = []
    found = []
    for checkpointed in (False, True):
        model = scrambled(Branches, causal=causal, checkpoint_activations=checkpointed)
        torch.manual_seed(1)
        found.append(gradients(model))
        inputs = {name: torch.randn(2, 4, site.d_in).double() for name, site in model.sites.items()}
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model.importance_function(inputs, {})
        kept.append(sum(sizes))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert any(g.any() for g in found[0])
    assert kept[1] < kept[0] / 2


NAMES = ["wte.pre", "h.0.attn.q", "h.0.mlp.up", "h.1.attn.q", "h.2.mlp.0.up", "h.10.attn.q", "head"]


def test_chunks_go_by_the_first_number_of_a_name():
    assert chunks_of_layers(NAMES, None) == [NAMES]
    assert chunks_of_layers(NAMES, 2) == [
        ["wte.pre", *NAMES[1:4], "head"],
        ["h.2.mlp.0.up"],
        ["h.10.attn.q"],
    ]
    assert chunks_of_layers(NAMES, 1)[:2] == [
        ["wte.pre", "h.0.attn.q", "h.0.mlp.up", "head"],
        ["h.1.attn.q"],
    ]
    assert chunks_of_layers(NAMES, 11) == [NAMES]
    assert chunks_of_layers(["h.4.x", "head", "h.7.x"], 4) == [["h.4.x", "head", "h.7.x"]]
    assert chunks_of_layers(["a", "b"], 3) == [["a", "b"]]


def test_g1_chunks_are_transformers_of_their_own():
    torch.manual_seed(0)
    target = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model = ComponentModel(
        target, {"*": 3}, importance=Importance(**SMALL, chunk_layers=2)
    ).double()
    function: Any = model.importance_function
    assert [list(part.counts) for part in function.parts] == [["0", "1"], ["2", "3"], ["4"]]
    inputs = {name: torch.randn(2, 6, 4).double() for name in model.sites}
    z = function(inputs, {})
    assert list(z) == list(model.sites)
    for part in function.parts:
        sites = {name: (available(target)[name], 3) for name in part.counts}
        alone = importance_function(Importance(**SMALL), sites).double()
        alone.load_state_dict(part.state_dict())
        for name, value in alone({n: inputs[n] for n in sites}, {}).items():
            assert torch.equal(z[name], value)


def test_d7_the_transformer_starts_with_the_stated_deviations():
    torch.manual_seed(0)
    settings = Importance("transformer", d_model=64, layers=1, heads=2)
    model = ComponentModel(nn.Sequential(nn.Linear(80, 3)), {"*": 200}, importance=settings)
    function: Any = model.importance_function
    drawn = {
        (name, parameter.shape[-1]): parameter for name, parameter in function.named_parameters()
    }
    assert function.blocks[0].up.weight.shape == (256, 64), (
        "four times as wide where nothing is said"
    )
    for (name, fan_in), values in drawn.items():
        if name.endswith("bias"):
            assert not values.any()
            continue
        sd = math.sqrt((1 if name == "last.weight" else 2) / fan_in)
        assert stats.kstest(values.detach().flatten().numpy() / sd, "norm").pvalue > 0.01, name


def test_the_transformer_trains_under_bf16_autocast():
    results = []
    for enabled in (False, True):
        function: Any = scrambled(Branches).float().importance_function
        torch.manual_seed(1)
        inputs = {name: torch.randn(2, 4, 8 if name == "down" else 4) for name in function.counts}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = function(inputs, {})
        sum_of(value.float().tanh().sum() for value in z.values()).backward()
        results.append(torch.cat([gradient_of(p).flatten() for p in function.parameters()]))
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"d_model": 10, "heads": 4}, "d_model 10 with heads 4.*take d_model 8"),
        ({"d_model": 12, "heads": 4}, "even width"),
        ({"heads": 0}, "heads 0 in importance: it must be at least 1"),
        ({"chunk_layers": 0}, "chunk_layers 0"),
        ({"layers": -1}, "layers -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, told):
    with pytest.raises(BadInput, match=told):
        Importance(**SMALL | settings)
