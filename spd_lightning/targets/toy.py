"""Small networks whose mechanisms are known, so that a decomposition of them can be judged.

They are plain modules that have never heard of decomposition. Each has `forward`, the `loss` that
it is trained on (labels follow from the inputs) with the `score` behind it, and `unrepresented`:
what it has failed to learn. Some seeds end in a local minimum which the loss hardly shows; a target
that leaves something unrepresented is to be trained again from another seed.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.errors import BadInput

PROBE = 0.75  # the height at which a feature is shown alone


class TransposedLinear(nn.Linear):
    """A linear map whose weight is another map's, transposed: one parameter, two uses, gradients
    summed.
    """

    def __init__(self, partner: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a second weight
        self.in_features, self.out_features = partner.out_features, partner.in_features
        self._partner = (partner,)  # a tuple keeps the partner from being registered twice
        self.bias = nn.Parameter(partner.weight.new_zeros(self.out_features))

    @property
    def partner(self) -> nn.Linear:
        """The map that owns the weight."""
        return self._partner[0]

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The partner's weight, transposed."""
        return self.partner.weight.T


class TMS(nn.Module):
    """The toy model of superposition: more features than hidden dimensions,
    `relu(linear2(hidden(linear1(x))))`.

    `linear2` is the transpose of `linear1`, with a bias that starts at zero; `hidden` holds fixed
    identity maps. Source: Elhage et al. 2022, "Toy models of superposition"; SPD (arXiv 2506.20790)
    section 3.1.
    """

    def __init__(self, n_features: int, n_hidden: int, n_identity: int = 0) -> None:
        """
        Args:
            n_features: how many features the model reads and gives back.
            n_hidden: how many dimensions it has to hold them.
            n_identity: how many fixed identity maps stand between its two weights.
        """
        super().__init__()
        self.n_features, self.n_hidden = n_features, n_hidden
        self.linear1 = nn.Linear(n_features, n_hidden, bias=False)
        self.hidden = nn.ModuleList(
            nn.Linear(n_hidden, n_hidden, bias=False) for _ in range(n_identity)
        )
        self.linear2 = TransposedLinear(self.linear1)
        for weight in self.hidden.parameters():
            nn.init.eye_(weight.requires_grad_(False))

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The features as read back from the hidden dimensions."""
        x = self.linear1(inputs)
        for identity in self.hidden:
            x = identity(x)
        return torch.relu(self.linear2(x))

    def loss(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
        """Mean squared error between the features and what is read back."""
        return self.score(self(inputs), inputs)

    def score(
        self, output: Float[Tensor, "batch features"], inputs: Float[Tensor, "batch features"]
    ) -> Float[Tensor, ""]:
        """The loss of any output on these inputs."""
        return (output - inputs).square().mean()

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """The features that do not come back when shown alone at 0.75.

        A lost feature returns below 0.15. What a kept one returns depends on how often others
        disturb it: 0.71 where 5 features share 2 dimensions, 0.61 where 40 share 10. Hence 0.1 of
        tolerance up to 3 features a dimension, and 0.3 beyond.
        """
        tolerance = 0.1 if self.n_features <= 3 * self.n_hidden else 0.3
        returned = self(PROBE * torch.eye(self.n_features).to(self.linear1.weight)).diagonal()
        return torch.nonzero((returned - PROBE).abs() > tolerance).flatten().tolist()


class ResidualBlock(nn.Module):
    """One residual step of an MLP, `x + mlp_out(relu(mlp_in(x)))`, without biases.

    Its weights start at a tenth of PyTorch's usual size. Training hardly touches what a start
    leaves outside the directions of the features; it serves nothing, yet a decomposition would have
    to reproduce it. Of the trained mlp_out's squared norm (one layer) that is 65 % from the usual
    start, 7 % from this one, at the same loss.
    """

    def __init__(self, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)
        with torch.no_grad():
            for linear in (self.mlp_in, self.mlp_out):
                linear.weight *= 0.1

    def forward(self, x: Float[Tensor, "batch d_embed"]) -> Float[Tensor, "batch d_embed"]:
        """The residual stream after this block."""
        return x + self.mlp_out(torch.relu(self.mlp_in(x)))


class ResidualMLP(nn.Module):
    """A residual MLP that computes `x + relu(x)` for more features than it has neurons, across one
    or more layers.

    Features enter through fixed random directions of unit norm and are read out along the same
    directions. Source: SPD (arXiv 2506.20790) section 3.3; APD (arXiv 2501.14926).
    """

    embedding: Float[Tensor, "features d_embed"]

    def __init__(
        self,
        n_features: int,
        d_embed: int,
        d_mlp: int | Sequence[int],
        n_layers: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            n_features: how many features the model reads and computes.
            d_embed: the width of the residual stream.
            d_mlp: neurons of each layer, or one number for all of them.
            n_layers: how many residual blocks.
            seed: chooses the fixed embedding, independently of the global random state.
        """
        super().__init__()
        widths = [d_mlp] * n_layers if isinstance(d_mlp, int) else list(d_mlp)
        if len(widths) != n_layers:
            raise BadInput(
                f"d_mlp {widths} in ResidualMLP: n_layers is {n_layers}; give one width a layer, "
                "or one number"
            )
        directions = torch.randn(n_features, d_embed, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("embedding", directions / directions.norm(dim=1, keepdim=True))
        self.layers = nn.ModuleList(ResidualBlock(d_embed, width) for width in widths)

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The computed features, read out of the residual stream."""
        x = inputs @ self.embedding
        for layer in self.layers:
            x = layer(x)
        return x @ self.embedding.T

    def loss(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
        """Mean squared error against `x + relu(x)`."""
        return self.score(self._forward_in_few_directions(inputs), inputs)

    def score(
        self, output: Float[Tensor, "batch features"], inputs: Float[Tensor, "batch features"]
    ) -> Float[Tensor, ""]:
        """The loss of any output on these inputs."""
        return (output - inputs - torch.relu(inputs)).square().mean()

    def _forward_in_few_directions(self, inputs: Tensor) -> Tensor:
        """`forward`, for much less work where the batch is large and d_embed exceeds features and
        neurons together.

        The residual stream is a sum of few directions (features and neurons written so far), so
        their coefficients stand for it, and only the directions' inner products with the readers
        are needed.
        """
        coefficients, directions = inputs, self.embedding
        for layer in cast("Iterable[ResidualBlock]", self.layers):
            neurons = torch.relu(coefficients @ (directions @ layer.mlp_in.weight.T))
            coefficients = torch.cat([coefficients, neurons], dim=1)
            directions = torch.cat([directions, layer.mlp_out.weight.T])
        return coefficients @ (directions @ self.embedding.T)

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """The features whose output, shown alone at 0.75, is off `x + relu(x)` = 1.5 by more than
        0.5.

        With half as many neurons as features none can be exact: trained models give 1.1 to 1.35,
        the embedding without any neuron 0.75.
        """
        returned = self(PROBE * torch.eye(len(self.embedding)).to(self.embedding)).diagonal()
        return torch.nonzero((returned - 2 * PROBE).abs() > 0.5).flatten().tolist()


class Attention(nn.Module):
    """Causal softmax attention written out in plain operations, without biases."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Compute the heads' contribution to the residual stream."""
        q, k, v = (
            rearrange(
                project(x), "batch pos (head d_head) -> batch head pos d_head", head=self.n_heads
            )
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        pattern = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        return self.o_proj(
            rearrange(pattern @ v, "batch head pos d_head -> batch pos (head d_head)")
        )


class AttentionBlock(nn.Module):
    """One residual step of attention, `x + attn(x)`."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.attn = Attention(d_model, n_heads)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        return x + self.attn(x)


class InductionHead(nn.Module):
    """An attention-only transformer that completes `BOS T* S M T* S` with M, as induction heads do.

    Its first layer must write into each position which token came before, its second must look that
    up. Source: Olsson et al. 2022, "In-context learning and induction heads".
    """

    def __init__(
        self, vocab: int, d_model: int, seq_len: int, n_layers: int = 2, n_heads: int = 1
    ) -> None:
        """
        Args:
            vocab: how many tokens there are; token 0 is BOS.
            d_model: the width of the residual stream.
            seq_len: how many positions a sequence has, BOS and the repeated token included.
            n_layers: how many attention layers.
            n_heads: heads of each layer; they share d_model evenly.
        """
        super().__init__()
        if d_model % n_heads:
            raise BadInput(
                f"n_heads {n_heads} in InductionHead: it must divide d_model, which is {d_model}"
            )
        self.vocab, self.seq_len = vocab, seq_len
        self.embed = nn.Embedding(vocab, d_model)
        self.pos_embed = nn.Embedding(seq_len, d_model)
        self.h = nn.ModuleList(AttentionBlock(d_model, n_heads) for _ in range(n_layers))
        self.unembed = nn.Linear(d_model, vocab, bias=False)

    def forward(self, inputs: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The logits of the next token at every position."""
        x = self.embed(inputs) + self.pos_embed(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.h:
            x = block(x)
        return self.unembed(x)

    def loss(self, inputs: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Cross-entropy of the induced token at the last position, in nats."""
        return self.score(self(inputs), inputs)

    def score(
        self, output: Float[Tensor, "batch pos vocab"], inputs: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, ""]:
        """The loss of any logits on these inputs."""
        return nn.functional.cross_entropy(output[:, -1], induced_token(inputs))

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """The tokens M that 4096 fresh sequences ask for and get less than 95 % of the time.

        Empty, too, where all sequences together are answered correctly more than 95 % of the time.
        """
        generator = torch.Generator().manual_seed(0)
        repeated = torch.randint(1, self.vocab, (4096, 1), generator=generator)
        fresh = induction_tokens(repeated, self.vocab, self.seq_len, generator)
        inputs = fresh.to(self.unembed.weight.device)
        wanted = induced_token(inputs)
        correct = (self(inputs)[:, -1].argmax(dim=-1) == wanted).float()
        if correct.mean() > 0.95:
            return []
        return [int(token) for token in wanted.unique() if correct[wanted == token].mean() < 0.95]


def induction_tokens(
    repeated: Int[Tensor, "batch 1"], vocab: int, seq_len: int, generator: torch.Generator
) -> Int[Tensor, "batch seq_len"]:
    """Random sequences `BOS T* S M T* S` for given S: it ends the sequence and occurs once before,
    where M follows.

    S is any token but BOS (0); M and the filling T are drawn from all others.
    """
    rows = len(repeated)
    tokens = torch.randint(1, vocab - 1, (rows, seq_len), generator=generator)
    tokens += tokens >= repeated  # uniform over all tokens but the repeated one
    earlier = torch.randint(1, seq_len - 2, (rows, 1), generator=generator)
    tokens.scatter_(1, earlier, repeated)
    tokens[:, :1], tokens[:, -1:] = 0, repeated
    return tokens


def induced_token(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """The token M that followed the first occurrence of each sequence's last token."""
    first = (tokens == tokens[:, -1:]).int().argmax(dim=1, keepdim=True)
    return tokens.gather(1, first + 1).squeeze(1)
