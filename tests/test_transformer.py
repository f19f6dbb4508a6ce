"""The decoder: its logits are those of HuggingFace's models, and its parts do what their names
say.
"""

import math

import pytest
import torch
from support import tiny_checkpoints
from torch import nn

from spd_lightning import BadInput, Decoder, InductionHead
from spd_lightning.targets.conversion import decoder_from
from spd_lightning.targets.language import next_token_loss, sample
from spd_lightning.targets.transformer import attend, attention_pattern, rotary_tables, rotate


def tiny(**switches) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        **{"vocab": 61, "d_model": 24, "n_layers": 2, "n_heads": 6, "context": 24, **switches}
    )


STYLES = {
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "activation": "gelu_tanh",
        "bias": True,
        "tied_unembedding": True,
    },
    "llama": {"mlp": "gated", "activation": "silu", "n_kv_heads": 2},
    "bare": {"positions": "none", "norm": "none", "activation": "relu"},
}
in_every_style = pytest.mark.parametrize("style", STYLES)


# ---- HuggingFace's logits ------------------------------------------------------------------------

SAME = [
    ("gpt2", {}),
    (
        "gpt2",
        {
            "tie_word_embeddings": False,
            "n_inner": 40,
            "activation_function": "relu",
            "layer_norm_epsilon": 1e-3,
        },
    ),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-2}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 3}),
    ("qwen2", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "settings"), SAME, ids=lambda value: str(value)[:40])
def test_logits_are_transformers_own(tmp_path, kind, settings):
    """To 1e-5 of the largest, with every parameter random; and so after a rebuild from plain values
    and weights.
    """
    model = tiny_checkpoints.write(tmp_path, kind, **settings)
    decoder = decoder_from(str(tmp_path))
    tokens = tiny_checkpoints.tokens()
    wanted = model(tokens).logits
    assert wanted.std() > 0.3
    torch.testing.assert_close(
        decoder(tokens), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
    )
    again = Decoder(**decoder.init_args)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(tokens), decoder(tokens))


def test_loss_is_transformers_own(tmp_path):
    model = tiny_checkpoints.write(tmp_path, "gpt2")
    tokens = tiny_checkpoints.tokens()
    torch.testing.assert_close(
        decoder_from(str(tmp_path)).loss(tokens), model(tokens, labels=tokens).loss
    )


REFUSED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters {",
    ),
    ("llama", {"head_dim": 8}, "head_dim 8"),
    ("mistral", {"sliding_window": 8}, "sliding_window 8"),
    ("gpt_neox", {}, "model_type 'gpt_neox'"),
]


@pytest.mark.parametrize(("kind", "settings", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_it_has_no_switch_for_is_refused_by_name(tmp_path, kind, settings, said):
    tiny_checkpoints.write(tmp_path, kind, **settings)
    with pytest.raises(BadInput, match="as it is: hf:") as caught:
        decoder_from(str(tmp_path))
    assert f"decoder:{tmp_path}: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- parts ---------------------------------------------------------------------------------------


@in_every_style
def test_fused_attention_is_written_out_attention(style):
    """The same logits and the same gradients, in fp64."""
    fused, written = (
        tiny(**STYLES[style], fused_attention=flag).double() for flag in (True, False)
    )
    tokens = tiny_checkpoints.tokens()
    torch.testing.assert_close(fused(tokens), written(tokens), rtol=0, atol=1e-12)
    for model in (fused, written):
        model.loss(tokens).backward()
    for one, two in zip(fused.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-12)


def test_attention_is_a_weighted_mean_of_what_came_before():
    """Against a loop over every query."""
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    gathered = attend(q, k, v, fused=False)
    pattern = attention_pattern(q, k)
    for b, h, t in ((b, h, t) for b in range(2) for h in range(3) for t in range(5)):
        weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / 2) for s in range(t + 1)]
        mean = sum(w * v[b, h, s] for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(gathered[b, h, t], mean)
        assert pattern[b, h, t, t + 1 :].abs().sum() == 0


def test_rotary_scores_depend_on_distance_alone():
    q = torch.randn(8).double()
    k = torch.randn(8).double()
    rotary = rotary_tables(12, 8, 100.0)
    turned = [rotate(x.expand(1, 1, 12, 8), rotary)[0, 0] for x in (q, k)]
    scores = turned[0] @ turned[1].T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(12), rtol=0, atol=1e-5)


@in_every_style
def test_the_future_is_not_seen(style):
    model = tiny(**STYLES[style])
    tokens = tiny_checkpoints.tokens()
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 61
    assert torch.equal(model(tokens)[:, :10], model(other)[:, :10])
    assert not torch.equal(model(tokens)[:, 10:], model(other)[:, 10:])


@in_every_style
def test_module_names(style):
    names = {
        name
        for name, module in tiny(**STYLES[style]).named_modules()
        if isinstance(module, nn.Linear)
    }
    mlp = {"gate_proj", "up_proj", "down_proj"} if style == "llama" else {"c_fc", "down_proj"}
    parts = {f"attn.{m}_proj" for m in "qkvo"} | {f"mlp.{m}" for m in mlp}
    assert names == {f"h.{i}.{part}" for i in range(2) for part in parts} | {"lm_head"}


def test_tied_unembedding_is_one_parameter():
    model = tiny(**STYLES["gpt2"])
    assert model.lm_head.weight is model.wte.weight
    again = tiny(**STYLES["gpt2"])
    again.load_state_dict(model.state_dict())
    assert again.lm_head.weight is again.wte.weight
    assert tiny().lm_head.weight is not tiny().wte.weight


def test_initial_weights_are_gpt2s():
    """N(0, 0.02), smaller by √(2 layers) where they write into the residual stream; drawn from
    torch's own state.
    """
    model = tiny(d_model=96, n_layers=8, bias=True)
    for name, parameter in model.named_parameters():
        std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(parameter.mean().item()) < std / 10, name
        else:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]
    assert torch.equal(tiny().wte.weight, tiny().wte.weight)


def test_rotary_tables_are_no_part_of_the_weights():
    assert not {"cos", "sin"} & set(tiny().state_dict())


# ---- bad input -----------------------------------------------------------------------------------


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(BadInput, match="a sequence of 25 tokens in Decoder: its context holds 24"):
        tiny()(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"n_heads": 5}, "n_heads 5 in Decoder: it must divide d_model, which is 24"),
        ({"n_kv_heads": 4}, "n_kv_heads 4 in Decoder: it must divide n_heads, which is 6"),
        ({"n_heads": 8}, "rotary positions need an even d_head"),
        ({"n_layers": 0}, "n_layers 0 in Decoder"),
    ],
)
def test_sizes_that_cannot_be(switches, said):
    with pytest.raises(BadInput) as caught:
        tiny(**switches)
    assert said in str(caught.value)


# ---- loss and sampling ---------------------------------------------------------------------------


def test_loss_is_the_mean_surprise_at_the_next_token():
    model = tiny()
    tokens = tiny_checkpoints.tokens()
    surprise = -model(tokens).double().log_softmax(dim=-1)
    each = [surprise[b, t, tokens[b, t + 1]] for b in range(3) for t in range(23)]
    torch.testing.assert_close(model.loss(tokens).double(), torch.stack(each).mean())
    assert next_token_loss(model(tokens).bfloat16(), tokens).dtype == torch.float32


def test_greedy_samples_are_the_likeliest_tokens():
    model = tiny()
    tokens = tiny_checkpoints.tokens(length=5)
    longer = sample(model, tokens, 8, temperature=0.0)
    assert torch.equal(longer[:, :5], tokens)
    assert torch.equal(longer[:, 5:], model(longer)[:, 4:-1].argmax(-1))


def test_samples_follow_the_distribution_and_the_generator():
    model = tiny()
    model.lm_head.weight.data *= 30
    tokens = tiny_checkpoints.tokens(rows=1, length=4).expand(4000, 4)
    one, two = (sample(model, tokens, 1, 0.7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    wanted = (model(tokens[:1])[0, -1] / 0.7).softmax(-1)
    found = one[:, -1].bincount(minlength=61) / 4000
    assert (found - wanted).abs().max() < 0.03
    assert wanted.max() > 0.1


def test_samples_beyond_the_context_see_its_last_tokens():
    model = tiny()
    tokens = tiny_checkpoints.tokens()
    longer = sample(model, tokens, 3, temperature=0.0)
    assert longer.shape == (3, 27)
    assert torch.equal(longer[:, -1], model(longer[:, 2:26])[:, -1].argmax(-1))


def test_sampling_refuses_what_cannot_be():
    with pytest.raises(BadInput, match="temperature -1"):
        sample(tiny(), tiny_checkpoints.tokens(), 1, temperature=-1.0)


def test_a_toy_is_no_language_model():
    """An induction head is trained on its last position alone, and has no context to sample in."""
    assert not hasattr(InductionHead(8, 8, 8), "context")
