"""The interface of language models: a loss, a vocabulary, a context, and sampling.

A language model is a module whose `forward` maps tokens [batch, pos] to the logits
[batch, pos, vocab] of the next token at every position. Scoring and sampling need nothing else.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.errors import BadInput


class LanguageModel(nn.Module, ABC):
    """A network that predicts the next token.

    Attributes:
        vocab: number of tokens.
        context: largest number of positions.
        init_args: arguments of its constructor, as plain values.
    """

    vocab: int
    context: int
    init_args: dict

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of the next token at every position."""

    def loss(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of all tokens but the first, in nats."""
        logits = self(tokens)
        return self.score(logits, tokens)

    def score(
        self, output: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, ""]:
        """Return the loss of any logits on these tokens, in float32 or better."""
        return next_token_loss(output, tokens)

    def unrepresented(self) -> list[int]:
        """Return an empty list: language models have no known set of tokens to represent."""
        return []


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats, of the token after each position but the last."""
    predicted = logits[:, :-1]
    predicted = predicted.flatten(0, 1)  # [batch * (pos - 1), vocab]
    if predicted.dtype in (torch.float16, torch.bfloat16):
        predicted = predicted.float()
    following = tokens[:, 1:]
    following = following.flatten()  # [batch * (pos - 1)]
    return nn.functional.cross_entropy(predicted, following)


def fits(positions: int, context: int, model: str) -> None:
    """Raise BadInput if a sequence is longer than a model's context."""
    if positions > context:
        raise BadInput(
            f"a sequence of {positions} tokens in {model}: its context holds {context}; lower "
            "data.seq_len"
        )


@torch.no_grad()
def sample(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    steps: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch longer"]:
    """Sample continuations of tokens from a language model, which sees the last `context` tokens.

    Args:
        model: any language model with a `context`.
        tokens: the tokens to continue, at least one per row.
        steps: number of tokens to add.
        temperature: divides the logits before drawing; 0 always picks the likeliest token.
        generator: draws the tokens; torch's global one if omitted.
    """
    if temperature < 0 or not tokens.shape[1]:
        raise BadInput(
            f"temperature {temperature} and {tokens.shape[1]} tokens in sample: give at least 0 "
            "and 1"
        )
    context = int(model.context)  # pyright: ignore[reportArgumentType]
    for _ in range(steps):
        visible = tokens[:, -context:]
        logits = model(visible)[:, -1].float()  # [batch, vocab]
        if temperature == 0:
            following = logits.argmax(dim=-1, keepdim=True)  # [batch, 1]
        else:
            probability = torch.softmax(logits / temperature, dim=-1)
            following = torch.multinomial(probability, 1, generator=generator)  # [batch, 1]
        following = following.to(tokens.dtype)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens
