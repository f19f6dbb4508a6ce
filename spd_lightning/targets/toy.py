"""Small networks with known mechanisms, against which a decomposition can be checked.

They are plain modules that do not know about decomposition. Each has four methods:

- `forward`;
- `loss`, the training loss (labels follow from the inputs);
- `score`, the loss of any output;
- `unrepresented`, the features or tokens that the network has failed to learn.

Some seeds end in a local minimum that is hardly visible in the loss. If anything is unrepresented,
the target should be trained again from another seed.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.errors import BadInput

PROBE = 0.75  # value of a feature in an input in which all other features are zero


class TransposedLinear(nn.Linear):
    """A linear map that uses the transposed weight of another map; both share one parameter."""

    def __init__(self, partner: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would create a second weight
        self.in_features = partner.out_features
        self.out_features = partner.in_features
        self._partner = (partner,)  # inside a tuple, the partner is not registered a second time
        self.bias = nn.Parameter(partner.weight.new_zeros(self.out_features))

    @property
    def partner(self) -> nn.Linear:
        """The map to which the weight belongs."""
        return self._partner[0]

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:  # pyright: ignore
        """The partner's weight, transposed."""
        return self.partner.weight.T


class TMS(nn.Module):
    """The toy model of superposition, with more features than hidden dimensions.

    It computes `relu(linear2(hidden(linear1(x))))`. `linear2` is the transpose of `linear1`, with a
    bias that starts at zero; `hidden` consists of fixed identity maps.

    Sources: Elhage et al. 2022, "Toy models of superposition"; SPD (arXiv 2506.20790) section 3.1.

    Examples:
        >>> import torch
        >>> from spd_lightning import TMS
        >>> model = TMS(n_features=5, n_hidden=2, n_identity=1)
        >>> {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        {'linear1.weight': (2, 5), 'hidden.0.weight': (2, 2), 'linear2.bias': (5,)}
        >>> torch.equal(model.linear2.weight, model.linear1.weight.T)
        True
    """

    def __init__(self, n_features: int, n_hidden: int, n_identity: int = 0) -> None:
        """
        Args:
            n_features: number of features that the model reads and returns.
            n_hidden: number of hidden dimensions.
            n_identity: number of fixed identity maps between the two weights.
        """
        super().__init__()
        self.n_features = n_features
        self.n_hidden = n_hidden
        self.linear1 = nn.Linear(n_features, n_hidden, bias=False)
        self.hidden = nn.ModuleList(
            nn.Linear(n_hidden, n_hidden, bias=False) for _ in range(n_identity)
        )
        self.linear2 = TransposedLinear(self.linear1)
        for weight in self.hidden.parameters():
            nn.init.eye_(weight.requires_grad_(False))

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Return the features as reconstructed from the hidden dimensions."""
        x = self.linear1(inputs)
        for identity in self.hidden:
            x = identity(x)
        return torch.relu(self.linear2(x))

    def loss(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
        """Return the mean squared error between the features and their reconstruction."""
        output = self(inputs)
        return self.score(output, inputs)

    def score(
        self, output: Float[Tensor, "batch features"], inputs: Float[Tensor, "batch features"]
    ) -> Float[Tensor, ""]:
        """Return the loss of any output on these inputs."""
        error = output - inputs
        return error.square().mean()

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """Return the features that are not reconstructed from an input of 0.75 in them alone.

        A lost feature comes back below 0.15. A learned feature comes back at a value that depends
        on how often others interfere: 0.71 if 5 features share 2 dimensions, 0.61 if 40 share 10.
        Hence the tolerance is 0.1 for up to 3 features per dimension, and 0.3 for more.
        """
        tolerance = 0.1
        if self.n_features > 3 * self.n_hidden:
            tolerance = 0.3
        one_hot = torch.eye(self.n_features).to(self.linear1.weight)
        outputs = self(PROBE * one_hot)
        returned = outputs.diagonal()  # [features]
        error = (returned - PROBE).abs()
        is_lost = error > tolerance
        lost = is_lost.nonzero().flatten()
        return lost.tolist()


class ResidualBlock(nn.Module):
    """A residual step of an MLP, `x + mlp_out(relu(mlp_in(x)))`, without biases.

    Its initial weights are a tenth of PyTorch's. Training hardly changes the part of the initial
    weights outside the directions of the features. That part is useless, but a decomposition would
    have to reproduce it. With PyTorch's initial weights it accounts for 65 % of the squared norm of
    a trained mlp_out (one layer), with these for 7 %, at the same loss.
    """

    def __init__(self, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)
        with torch.no_grad():
            for linear in (self.mlp_in, self.mlp_out):
                linear.weight *= 0.1

    def forward(self, x: Float[Tensor, "batch d_embed"]) -> Float[Tensor, "batch d_embed"]:
        """Return the residual stream after this block."""
        hidden = self.mlp_in(x)
        neurons = torch.relu(hidden)  # [batch, d_mlp]
        update = self.mlp_out(neurons)
        return x + update


class ResidualMLP(nn.Module):
    """A residual MLP of one or more layers that computes `x + relu(x)` for many features.

    There are more features than neurons. They enter through fixed random directions of unit norm,
    and are read out along the same directions.

    Sources: SPD (arXiv 2506.20790) section 3.3; APD (arXiv 2501.14926).

    Examples:
        >>> import torch
        >>> from spd_lightning import ResidualMLP
        >>> model = ResidualMLP(n_features=100, d_embed=1000, d_mlp=50)
        >>> model(torch.rand(8, 100)).shape
        torch.Size([8, 100])
        >>> len(model.unrepresented())  # before training, no feature is computed
        100
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
            n_features: number of features that the model reads and computes.
            d_embed: width of the residual stream.
            d_mlp: neurons of each layer, or one number for all layers.
            n_layers: number of residual blocks.
            seed: determines the fixed embedding, independently of the global random state.
        """
        super().__init__()
        widths = [d_mlp] * n_layers if isinstance(d_mlp, int) else list(d_mlp)
        if len(widths) != n_layers:
            raise BadInput(
                f"d_mlp {widths} in ResidualMLP: n_layers is {n_layers}; give one width per layer, "
                "or one number"
            )
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, d_embed, generator=generator)
        norms = directions.norm(dim=1, keepdim=True)  # [features, 1]
        self.register_buffer("embedding", directions / norms)
        self.layers = nn.ModuleList(ResidualBlock(d_embed, width) for width in widths)

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Return the computed features, read from the residual stream."""
        x = inputs @ self.embedding
        for layer in self.layers:
            x = layer(x)
        return x @ self.embedding.T

    def loss(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
        """Return the mean squared error against `x + relu(x)`."""
        output = self._forward_in_few_directions(inputs)
        return self.score(output, inputs)

    def score(
        self, output: Float[Tensor, "batch features"], inputs: Float[Tensor, "batch features"]
    ) -> Float[Tensor, ""]:
        """Return the loss of any output on these inputs."""
        error = output - inputs - torch.relu(inputs)
        return error.square().mean()

    def _forward_in_few_directions(self, inputs: Tensor) -> Tensor:
        """Compute `forward` from inner products of directions.

        The residual stream is a sum of few directions: those of the features, and those of the
        neurons so far. So it can be represented by their coefficients, and only the directions'
        inner products with the readers are needed. That is much less work if the batch is large and
        d_embed exceeds the number of features and neurons.
        """
        coefficients = inputs  # [batch, directions]
        directions = self.embedding  # [directions, d_embed]
        for layer in cast("Iterable[ResidualBlock]", self.layers):
            readers = layer.mlp_in.weight.T  # [d_embed, neurons]
            writers = layer.mlp_out.weight.T  # [neurons, d_embed]
            products = directions @ readers  # [directions, neurons]
            neurons = torch.relu(coefficients @ products)  # [batch, neurons]
            coefficients = torch.cat([coefficients, neurons], dim=1)
            directions = torch.cat([directions, writers])
        products = directions @ self.embedding.T  # [directions, features]
        return coefficients @ products

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """Return the features that are not computed for an input of 0.75 in them alone.

        Their output differs from `x + relu(x)` = 1.5 by more than 0.5. With half as many neurons as
        features, none can be exact: trained models give 1.1 to 1.35, the embedding without any
        neurons gives 0.75.
        """
        n_features = len(self.embedding)
        one_hot = torch.eye(n_features).to(self.embedding)
        outputs = self(PROBE * one_hot)
        returned = outputs.diagonal()  # [features]
        expected = 2 * PROBE  # x + relu(x)
        error = (returned - expected).abs()
        is_lost = error > 0.5
        lost = is_lost.nonzero().flatten()
        return lost.tolist()


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
        """Return the heads' contribution to the residual stream."""
        q = self._split_heads(self.q_proj(x))
        k = self._split_heads(self.k_proj(x))
        v = self._split_heads(self.v_proj(x))
        d_head = q.shape[-1]
        scores = q @ k.transpose(-1, -2)  # [batch, head, query, key]
        scores = scores / d_head**0.5
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
        pattern = torch.softmax(scores, dim=-1)
        values = pattern @ v  # [batch, head, pos, d_head]
        joined = rearrange(values, "batch head pos d_head -> batch pos (head d_head)")
        return self.o_proj(joined)

    def _split_heads(self, x: Tensor) -> Float[Tensor, "batch head pos d_head"]:
        return rearrange(x, "batch pos (head d_head) -> batch head pos d_head", head=self.n_heads)


class AttentionBlock(nn.Module):
    """A residual step of attention, `x + attn(x)`."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.attn = Attention(d_model, n_heads)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block."""
        update = self.attn(x)
        return x + update


class InductionHead(nn.Module):
    """An attention-only transformer that continues `BOS T* S M T* S` with M.

    To do so, its first layer must write to each position which token precedes it, and its second
    layer must look that up.

    Source: Olsson et al. 2022, "In-context learning and induction heads".

    Examples:
        >>> import torch
        >>> from spd_lightning import InductionHead
        >>> model = InductionHead(vocab=8, d_model=16, seq_len=6)
        >>> model(torch.tensor([[0, 4, 3, 5, 2, 3]])).shape  # BOS T S M T S; M is 5
        torch.Size([1, 6, 8])
        >>> [name for name, _ in model.h[0].attn.named_children()]  # the matrices of a layer
        ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    """

    def __init__(
        self, vocab: int, d_model: int, seq_len: int, n_layers: int = 2, n_heads: int = 1
    ) -> None:
        """
        Args:
            vocab: number of tokens; token 0 is BOS.
            d_model: width of the residual stream.
            seq_len: positions per sequence, including BOS and the repeated token.
            n_layers: number of attention layers.
            n_heads: heads per layer, each of width d_model / n_heads.
        """
        super().__init__()
        if d_model % n_heads:
            raise BadInput(
                f"n_heads {n_heads} in InductionHead: it must divide d_model, which is {d_model}"
            )
        self.vocab = vocab
        self.seq_len = seq_len
        self.embed = nn.Embedding(vocab, d_model)
        self.pos_embed = nn.Embedding(seq_len, d_model)
        self.h = nn.ModuleList(AttentionBlock(d_model, n_heads) for _ in range(n_layers))
        self.unembed = nn.Linear(d_model, vocab, bias=False)

    def forward(self, inputs: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of the next token at every position."""
        length = inputs.shape[1]
        positions = torch.arange(length, device=inputs.device)
        token_vectors = self.embed(inputs)  # [batch, pos, d_model]
        position_vectors = self.pos_embed(positions)  # [pos, d_model]
        x = token_vectors + position_vectors
        for block in self.h:
            x = block(x)
        return self.unembed(x)

    def loss(self, inputs: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Return the cross-entropy of the induced token at the last position, in nats."""
        output = self(inputs)
        return self.score(output, inputs)

    def score(
        self, output: Float[Tensor, "batch pos vocab"], inputs: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, ""]:
        """Return the loss of any logits on these inputs."""
        logits = output[:, -1]  # [batch, vocab]
        induced = induced_token(inputs)
        return nn.functional.cross_entropy(logits, induced)

    @torch.no_grad()
    def unrepresented(self) -> list[int]:
        """Return the tokens M that are predicted in less than 95 % of the cases.

        They are measured on 4096 fresh sequences. The list is empty if more than 95 % of all
        predictions are correct.
        """
        generator = torch.Generator().manual_seed(0)
        repeated = torch.randint(low=1, high=self.vocab, size=(4096, 1), generator=generator)
        fresh = induction_tokens(repeated, self.vocab, self.seq_len, generator)
        inputs = fresh.to(self.unembed.weight.device)
        induced = induced_token(inputs)
        logits = self(inputs)[:, -1]  # [batch, vocab]
        predicted = logits.argmax(dim=-1)
        correct = (predicted == induced).float()  # [batch]
        if correct.mean() > 0.95:
            return []
        lost = list[int]()
        for token in induced.unique():
            accuracy = correct[induced == token].mean()
            if accuracy < 0.95:
                lost.append(int(token))
        return lost


def induction_tokens(
    repeated: Int[Tensor, "batch 1"], vocab: int, seq_len: int, generator: torch.Generator
) -> Int[Tensor, "batch seq_len"]:
    """Draw random sequences `BOS T* S M T* S` for given tokens S.

    S ends its sequence and occurs once before, followed by M. It can be any token but BOS (0); M
    and the filling T are drawn from all other tokens but BOS.
    """
    rows = len(repeated)
    tokens = torch.randint(low=1, high=vocab - 1, size=(rows, seq_len), generator=generator)
    tokens += tokens >= repeated  # uniform over all tokens but the repeated one
    earlier = torch.randint(low=1, high=seq_len - 2, size=(rows, 1), generator=generator)
    tokens.scatter_(1, earlier, repeated)
    tokens[:, :1] = 0
    tokens[:, -1:] = repeated
    return tokens


def induced_token(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Return the token M after the first occurrence of each sequence's last token."""
    repeated = tokens[:, -1:]
    matches = tokens == repeated
    first = matches.int().argmax(dim=1, keepdim=True)  # [batch, 1]
    following = first + 1
    induced = tokens.gather(1, following)  # [batch, 1]
    return induced.squeeze(1)
