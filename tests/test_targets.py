"""The toy targets and their data, against hand-written loops, hand-built solutions and the data's
stated law.
"""

import copy
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from scipy import stats
from support.tensors import gradient_of, sum_of
from torch import nn
from torch.overrides import TorchFunctionMode

from spd_lightning.data.modules import InductionTokens, Prompts, SparseFeatures
from spd_lightning.errors import BadInput
from spd_lightning.targets.toy import (
    TMS,
    AttentionBlock,
    InductionHead,
    ResidualBlock,
    ResidualMLP,
    induced_token,
    induction_tokens,
)

# --- TMS


@torch.no_grad()
@pytest.mark.parametrize("n_identity", [0, 2])
def test_tms_forward_is_the_formula_written_out(n_identity):
    model = TMS(4, 3, n_identity).double()
    x = torch.rand(5, 4).double()
    nn.init.normal_(model.linear2.bias)
    W = model.linear1.weight
    b = model.linear2.bias
    out = model(x)
    for row in range(5):
        hidden = [sum(W[h, f] * x[row, f] for f in range(4)) for h in range(3)]
        for f in range(4):
            expected = max(0.0, float(sum(W[h, f] * hidden[h] for h in range(3)) + b[f]))
            assert out[row, f].item() == pytest.approx(expected, abs=1e-12)
    assert model.loss(x).item() == pytest.approx(((out - x) ** 2).mean().item())


def test_tms_has_one_tied_weight_and_its_gradient_is_the_sum_of_both_uses():
    model = TMS(5, 2, n_identity=1).double()
    x = torch.rand(64, 5).double()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "linear1.weight",
        "linear2.bias",
    ]
    read, write = (model.linear1.weight.detach().clone().requires_grad_() for _ in range(2))
    (torch.relu(x @ read.T @ write) - x).square().mean().backward()
    model.loss(x).backward()
    torch.testing.assert_close(
        model.linear1.weight.grad, gradient_of(read) + gradient_of(write), rtol=1e-12, atol=1e-14
    )


def test_the_tie_survives_copies_and_state_dicts_and_keeps_them_apart():
    model = TMS(5, 2)
    x = torch.rand(8, 5)
    twin = copy.deepcopy(model)
    loaded = TMS(5, 2)
    loaded.load_state_dict(model.state_dict())
    assert sorted(model.state_dict()) == ["linear1.weight", "linear2.bias"]
    for other in (twin, loaded):
        assert torch.equal(other(x), model(x))
        nn.init.zeros_(other.linear1.weight)
        assert not other.linear2.weight.any()
        assert model.linear2.weight.any()


def test_site_names_and_kinds():
    def linears(model):
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    assert linears(TMS(5, 2, 2)) == ["linear1", "hidden.0", "hidden.1", "linear2"]
    assert linears(ResidualMLP(6, 8, 3, 2)) == [
        f"layers.{i}.mlp_{end}" for i in (0, 1) for end in ("in", "out")
    ]
    attention = [f"h.{i}.attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
    assert linears(InductionHead(8, 4, 6)) == [*attention, "unembed"]


def test_zero_inputs_are_inert_up_to_the_first_bias():
    outputs = []
    model = TMS(5, 2, n_identity=1)
    for layer in (model.linear1, model.hidden[0]):
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    model(torch.zeros(3, 5))
    outputs.append(ResidualMLP(6, 8, 3, 2)(torch.zeros(3, 6)))
    assert len(outputs) == 3
    assert not any(out.any() for out in outputs)


def test_tms_names_the_features_it_lost():
    model = TMS(3, 3)
    nn.init.eye_(model.linear1.weight)
    assert model.unrepresented() == []
    with torch.no_grad():
        model.linear1.weight[:, 1] = 0
        model.linear2.bias[2] = 0.11
    assert model.unrepresented() == [1, 2]


def test_tms_crowded_features_may_return_weaker():
    sparse = TMS(3, 2)
    crowded = TMS(4, 1)
    for model in (sparse, crowded):
        nn.init.zeros_(model.linear1.weight)
        nn.init.constant_(model.linear2.bias, 0.46)
    assert sparse.unrepresented() == [0, 1, 2]
    assert crowded.unrepresented() == []


def test_data_for_predict_needs_no_batch_size():
    """Only training depends on it; its default is that of the shipped toys."""
    assert SparseFeatures(5, 0.05).batch(0).shape == (1024, 5)
    assert InductionTokens(10, 8).batch(0).shape == (64, 8)


def test_a_trained_tms_represents_everything_and_an_untrained_one_does_not():
    torch.manual_seed(0)
    model = TMS(5, 2)
    data = SparseFeatures(5, 0.05, 1024)
    assert model.unrepresented()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        optimizer.zero_grad()
        model.loss(data.batch(step)).backward()
        optimizer.step()
        schedule.step()
    assert model.unrepresented() == []


# --- residual MLP


@torch.no_grad()
def test_residual_mlp_forward_is_the_formula_written_out():
    model = ResidualMLP(4, 6, [2, 3], n_layers=2).double()
    x = torch.randn(5, 4).double()
    for row, out in zip(x, model(x), strict=True):
        stream = sum_of(row[f] * model.embedding[f] for f in range(4))
        for layer in model.layers:
            assert isinstance(layer, ResidualBlock)
            neurons = [max(0.0, float(weights @ stream)) for weights in layer.mlp_in.weight]
            stream = stream + sum(
                n * column for n, column in zip(neurons, layer.mlp_out.weight.T, strict=True)
            )
        torch.testing.assert_close(out, torch.stack([stream @ e for e in model.embedding]))


def test_residual_mlp_loss_and_gradients_are_those_of_its_forward():
    model = ResidualMLP(7, 30, [4, 5], n_layers=2).double()
    x = torch.randn(16, 7).double()
    model.loss(x).backward()
    quick = [gradient_of(p).clone() for p in model.parameters()]
    model.zero_grad()
    loss = (model(x) - x - x.clamp(min=0)).square().mean()
    loss.backward()
    assert model.loss(x).item() == pytest.approx(loss.item(), rel=1e-12)
    for grad, parameter in zip(quick, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_the_embedding_is_unit_norm_frozen_and_depends_on_its_seed_alone():
    models = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        models.append(ResidualMLP(10, 50, 4, seed=seed))
    first, same, other = (model.embedding for model in models)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(10))
    assert not first.requires_grad
    assert "embedding" in models[0].state_dict()


def test_residual_mlp_names_the_features_it_does_not_compute():
    model = ResidualMLP(4, 4, 4)
    model.embedding = torch.eye(4)
    block = model.layers[0]
    assert isinstance(block, ResidualBlock)
    nn.init.eye_(block.mlp_in.weight)
    nn.init.eye_(block.mlp_out.weight)
    assert model.unrepresented() == []
    with torch.no_grad():
        block.mlp_out.weight[2] = 0
    assert model.unrepresented() == [2]


def test_residual_mlp_refuses_widths_that_do_not_fit():
    with pytest.raises(BadInput, match=r"d_mlp \[2, 3\].*n_layers is 3"):
        ResidualMLP(4, 6, [2, 3], n_layers=3)


# --- induction head


def test_attention_is_causal_softmax_attention():
    block = InductionHead(8, 12, 6, n_heads=3).double().h[0]
    assert isinstance(block, AttentionBlock)
    attention = block.attn
    x = torch.randn(2, 6, 12).double()
    q, k, v = (x @ getattr(attention, f"{p}_proj").weight.T for p in "qkv")
    q, k, v = (t.view(2, 6, 3, 4).transpose(1, 2) for t in (q, k, v))
    mixed = (
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        .transpose(1, 2)
        .reshape(2, 6, 12)
    )
    torch.testing.assert_close(attention(x), mixed @ attention.o_proj.weight.T)


def test_induction_head_sees_no_future_and_reads_shorter_rows():
    model = InductionHead(9, 8, 7)
    tokens = torch.randint(0, 9, (3, 7))
    torch.testing.assert_close(model(tokens)[:, :4], model(tokens[:, :4]))


def test_the_softmax_of_attention_can_be_intercepted():
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with Watch():
        InductionHead(8, 4, 6)(torch.zeros(1, 6, dtype=torch.long))
    assert seen.count(torch.softmax) == 2


def test_the_induced_token_followed_the_last_one_earlier():
    rows = torch.tensor([[0, 3, 7, 4, 5, 7], [0, 2, 1, 1, 1, 2]])
    assert induced_token(rows).tolist() == [4, 1]


@given(vocab=st.integers(3, 20), seq_len=st.integers(4, 12), seed=st.integers(0, 1000))
def test_induction_rows_have_their_form(vocab, seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    repeated = torch.randint(1, vocab, (16, 1), generator=generator)
    rows = induction_tokens(repeated, vocab, seq_len, generator)
    assert rows.shape == (16, seq_len)
    assert not rows[:, 0].any()
    assert rows[:, 1:].min() >= 1
    assert rows.max() < vocab
    assert torch.equal(rows[:, -1:], repeated)
    assert ((rows == repeated).sum(dim=1) == 2).all()
    assert (induced_token(rows) != repeated[:, 0]).all()


@pytest.mark.parametrize(("vocab", "lost"), [(8, [5]), (32, [])])
def test_induction_head_names_the_tokens_it_does_not_recall(vocab, lost):
    class AllButFive(InductionHead):
        def forward(self, inputs):
            answer = induced_token(inputs)
            answer[answer == 5] = 0
            return nn.functional.one_hot(answer, self.vocab).float().unsqueeze(1)

    assert AllButFive(vocab, 4, 8).unrepresented() == lost
    assert InductionHead(vocab, 4, 8).unrepresented() != []


def test_induction_loss_is_the_log_probability_of_the_last_answer():
    model = InductionHead(9, 8, 7)
    rows = InductionTokens(9, 7, 5).batch(0)
    log_p = torch.log_softmax(model(rows), dim=-1)
    expected = -sum(log_p[i, -1, token] for i, token in enumerate(induced_token(rows))) / 5
    torch.testing.assert_close(model.loss(rows), expected)


def test_heads_must_divide_the_width():
    with pytest.raises(BadInput, match="n_heads 3"):
        InductionHead(8, 4, 6, n_heads=3)


# --- data

MAKERS = {
    "sparse": lambda seed=0, **more: SparseFeatures(12, 0.2, 16, seed=seed, **more),
    "tokens": lambda seed=0, **more: InductionTokens(12, 8, 16, seed=seed, **more),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_batch_is_a_pure_function_of_seed_split_step_and_rank(make):
    places = [
        (step, rank, split) for step in range(4) for rank in range(3) for split in ("train", "val")
    ]
    one = make()
    two = make()
    forward = {place: one.batch(*place) for place in places}
    torch.manual_seed(99)
    backward = {place: two.batch(*place) for place in reversed(places)}
    assert all(torch.equal(forward[place], backward[place]) for place in places)
    other_seed = [make(seed=1).batch(*place) for place in places]
    distinct = {batch.numpy().tobytes() for batch in [*forward.values(), *other_seed]}
    assert len(distinct) == 2 * len(places)


@pytest.mark.parametrize(
    ("low", "high", "probability"), [(0.0, 1.0, 0.05), (-1.0, 1.0, 0.01), (0.5, 2.0, 1.0)]
)
def test_features_are_active_as_often_and_as_strongly_as_asked(low, high, probability):
    x = SparseFeatures(20, probability, 50_000, low, high).batch(0)
    active = x[x != 0]
    expected = x.numel() * probability
    spread = (x.numel() * probability * (1 - probability)) ** 0.5
    assert abs(len(active) - expected) <= 4 * spread + 1
    assert stats.kstest(active.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    if probability < 1:
        assert torch.corrcoef((x != 0).float().T).fill_diagonal_(0).abs().max() < 5 / 50_000**0.5


def test_neighboring_steps_and_ranks_are_independent():
    data = SparseFeatures(10, 0.5, 5_000)
    rows = torch.stack([data.batch(step, rank).flatten() for step in range(4) for rank in range(3)])
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / 50_000**0.5


def test_the_probe_set_is_every_feature_alone_then_random_rows():
    prompts = SparseFeatures(6, 0.05, 4, n_prompts=40).prompts()
    assert isinstance(prompts, Prompts)
    assert torch.equal(prompts.inputs[:6], 0.75 * torch.eye(6))
    assert prompts.sources == [f"feature {i}" for i in range(6)] + [
        f"random {i}" for i in range(40)
    ]
    assert prompts.splits == ["probe"] * 6 + ["random"] * 40
    assert prompts.inputs[6:].any(dim=1).all()
    assert len(prompts.inputs[6:].unique(dim=0)) == 40


def test_token_probes_repeat_every_token():
    prompts = InductionTokens(12, 8, 4, n_prompts=5).prompts()
    assert prompts.inputs[:11, -1].tolist() == list(range(1, 12))
    assert prompts.sources[:11] == [f"token {i}" for i in range(1, 12)]
    assert prompts.inputs.shape == (16, 8)


def on_trainer(data, **fields):
    data.trainer = SimpleNamespace(
        **{"global_rank": 0, "world_size": 1, "lightning_module": None} | fields
    )
    return data


@given(world=st.integers(1, 5), size=st.integers(1, 9), count=st.integers(0, 20))
def test_ranks_share_the_prompts_without_padding_or_repetition(world, size, count):
    def deal(rank):
        data = SparseFeatures(5, 0.3, 4, n_prompts=count, predict_batch_size=size)
        loader = on_trainer(data, global_rank=rank, world_size=world).predict_dataloader()
        assert len(list(loader)) == len(loader)
        return list(loader)

    whole = SparseFeatures(5, 0.3, 4, n_prompts=count).prompts()
    dealt = [part for rank in range(world) for part in deal(rank)]
    got = [
        (source, split, row.tolist())
        for part in dealt
        for row, source, split in zip(part.inputs, part.sources, part.splits, strict=True)
    ]
    expected = zip(whole.sources, whole.splits, whole.inputs.tolist(), strict=True)
    assert sorted(got) == sorted((source, split, row) for source, split, row in expected)
    assert all(1 <= len(part.sources) <= size for part in dealt)


@given(first=st.integers(0, 30), last=st.integers(0, 40), inner=st.integers(1, 9))
def test_training_lists_go_from_the_first_to_the_last_step_and_break_at_multiples(
    first, last, inner
):
    data = SparseFeatures(3, 0.5, 2)
    module = SimpleNamespace(inner_steps=inner)
    lists = list(
        on_trainer(
            data, global_step=first, max_steps=last, lightning_module=module, global_rank=2
        ).train_dataloader()
    )
    flat = [batch for batches in lists for batch in batches]
    assert len(flat) == max(0, last - first)
    assert all(torch.equal(batch, data.batch(first + i, rank=2)) for i, batch in enumerate(flat))
    starts = [first + sum(len(b) for b in lists[:i]) for i in range(1, len(lists))]
    assert all(start % inner == 0 for start in starts)
    assert all(1 <= len(batches) <= inner for batches in lists)


def test_without_a_trainer_training_batches_never_end():
    data = SparseFeatures(3, 0.5, 2)
    loader = data.train_dataloader()
    for _ in range(2):
        assert [len(batches) for batches in islice(loader, 50)] == [1] * 50
    assert torch.equal(next(iter(loader))[0], data.batch(0))


def test_validation_batches_are_fixed_and_each_rank_has_its_own():
    data = SparseFeatures(3, 0.5, 2, validation_batches=3)
    loader = data.val_dataloader()
    first = list(loader)
    again = list(loader)
    assert len(loader) == len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = list(on_trainer(SparseFeatures(3, 0.5, 64), global_rank=1).val_dataloader())
    assert torch.equal(other[0], SparseFeatures(3, 0.5, 64).batch(0, 1, "val"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseFeatures(3, 0.0, 2), "probability 0.0 in SparseFeatures"),
        (lambda: SparseFeatures(3, 1.5, 2), "probability 1.5 in SparseFeatures"),
        (lambda: SparseFeatures(3, 0.5, 0), "batch_size 0 in SparseFeatures"),
        (lambda: SparseFeatures(3, 0.5, 2, low=1.0), "low 1.0 in SparseFeatures"),
        (lambda: InductionTokens(2, 8, 2), "vocab 2 and seq_len 8 in InductionTokens"),
        (
            lambda: on_trainer(SparseFeatures(3, 0.5, 2), max_steps=-1).train_dataloader(),
            "max_steps -1 in trainer",
        ),
    ],
)
def test_bad_settings_are_named_in_one_line(make, message):
    with pytest.raises(BadInput, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# --- under Lightning, where every warning is an error


their_treespec = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning"
)  # Lightning's own


class Recorder(LightningModule):
    """Steps its optimizer once for each batch of a list and remembers what it saw."""

    def __init__(self, inner_steps):
        super().__init__()
        self.inner_steps = inner_steps
        self.seen = []
        self.validated = []
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batches, index):
        for batch in batches:
            self.seen.append(batch)
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            self.manual_backward((self.weight * batch.sum()).sum())
            optimizer.step()

    def validation_step(self, batch, index):
        self.validated.append(batch)

    def predict_step(self, prompts, index):
        return prompts

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **settings):
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "enable_checkpointing": False,
    }
    return Trainer(default_root_dir=folder, **quiet | settings)


@their_treespec
def test_a_resumed_fit_sees_the_batches_that_an_unbroken_one_sees(tmp_path):
    whole, first, second = (Recorder(inner_steps=4) for _ in range(3))
    trainer(tmp_path, max_steps=23).fit(whole, SparseFeatures(3, 0.5, 2))
    broken = trainer(tmp_path, max_steps=10)
    broken.fit(first, SparseFeatures(3, 0.5, 2))
    broken.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=23).fit(
        second, SparseFeatures(3, 0.5, 2), ckpt_path=tmp_path / "half.ckpt"
    )
    seen = first.seen + second.seen
    assert len(first.seen) == 10
    assert len(whole.seen) == len(seen) == 23
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, seen, strict=True))


@their_treespec
def test_validation_and_prediction_run_through_the_trainer(tmp_path):
    model = Recorder(inner_steps=1)
    data = SparseFeatures(3, 0.5, 2, n_prompts=6, predict_batch_size=4)
    trainer(tmp_path, max_steps=4, num_sanity_val_steps=0, val_check_interval=2).fit(model, data)
    assert len(model.validated) == 2 * 4
    parts: Any = trainer(tmp_path).predict(model, data)
    assert [part.sources for part in parts] == [
        ["feature 0", "feature 1", "feature 2", "random 0"],
        ["random 1", "random 2", "random 3", "random 4"],
        ["random 5"],
    ]
    assert all(isinstance(part, Prompts) for part in parts)
