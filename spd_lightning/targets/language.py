"""The interface of language models here: a loss, a vocabulary, a context, and sampling.

A language model is a module whose `forward` turns tokens [batch pos] into the logits [batch pos
vocab] of the token that comes next at every position. Reading it out, scoring and sampling need
nothing else.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lightning.errors import BadInput


class LanguageModel(nn.Module, ABC):
    """A network that predicts the next token.

    Attributes:
        vocab: how many tokens it knows.
        context: how many positions it takes at most.
        init_args: the plain values it was built from.
    """

    vocab: int
    context: int
    init_args: dict

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The logits of the next token at every position."""

    def loss(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """How badly it predicts these tokens: mean cross-entropy of all but the first, in nats."""
        return self.score(self(tokens), tokens)

    def score(
        self, output: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, ""]:
        """The loss of any logits on these tokens, in float32 or better."""
        return next_token_loss(output, tokens)

    def unrepresented(self) -> list[int]:
        """Nothing: which tokens a language model should know is not for us to say."""
        return []


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the token that follows each position but the last."""
    predicted = logits[:, :-1].flatten(0, 1)
    if predicted.dtype in (torch.float16, torch.bfloat16):
        predicted = predicted.float()
    return nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten())


def fits(positions: int, context: int, model: str) -> None:
    """Raises BadInput where a sequence is longer than a model's context."""
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
    """Lets a language model go on from given tokens; beyond its context it sees the last `context`
    tokens only.

    Args:
        model: any language model with a `context`.
        tokens: what to go on from, at least one token a row.
        steps: how many tokens to add.
        temperature: logits are divided by it before drawing; 0 takes the likeliest token always.
        generator: draws the tokens; torch's global one if omitted.
    """
    if temperature < 0 or not tokens.shape[1]:
        raise BadInput(
            f"temperature {temperature} and {tokens.shape[1]} tokens in sample: give at least 0 "
            "and 1"
        )
    for _ in range(steps):
        logits = model(tokens[:, -int(model.context) :])[:, -1].float()  # pyright: ignore[reportArgumentType]
        if temperature == 0:
            following = logits.argmax(dim=-1, keepdim=True)
        else:
            following = torch.multinomial(
                torch.softmax(logits / temperature, dim=-1), 1, generator=generator
            )
        tokens = torch.cat([tokens, following.to(tokens.dtype)], dim=1)
    return tokens
