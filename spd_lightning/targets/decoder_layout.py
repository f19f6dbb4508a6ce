"""The names of a decoder's parts, in the order in which a prompt passes through them.

Closed forms, weight graphs and searches for maps take every module name from this file.
"""

from collections.abc import Iterator
from typing import NamedTuple


class BlockLayout(NamedTuple):
    """The names of one block's parts.

    Attributes:
        norm_1: the norm before the attention.
        attn: the attention.
        norm_2: the norm before the MLP.
        mlp: the MLP.
        neuron_maps: the maps to the MLP's neurons, only `c_fc` or `gate_proj` and `up_proj`.
    """

    norm_1: str
    attn: str
    norm_2: str
    mlp: str
    neuron_maps: tuple[str, ...]

    @property
    def qkv(self) -> tuple[str, str, str]:
        """The maps to queries, keys and values."""
        return (f"{self.attn}.q_proj", f"{self.attn}.k_proj", f"{self.attn}.v_proj")

    @property
    def o_proj(self) -> str:
        """The map from the heads back to the residual stream."""
        return f"{self.attn}.o_proj"

    @property
    def attention_maps(self) -> tuple[str, str, str, str]:
        """All maps of the attention."""
        return (*self.qkv, self.o_proj)

    @property
    def down_proj(self) -> str:
        """The map from the neurons back to the residual stream."""
        return f"{self.mlp}.down_proj"


class DecoderLayout(NamedTuple):
    """The names of a decoder's parts."""

    blocks: tuple[BlockLayout, ...]
    embeddings: tuple[str, ...] = ("wte", "wpe")
    final_norm: str = "norm_f"
    unembedding: str = "lm_head"

    def maps(self) -> Iterator[str]:
        """Yield every linear map of the blocks."""
        for block in self.blocks:
            yield from block.attention_maps
            yield from block.neuron_maps
            yield block.down_proj

    def norms(self) -> Iterator[str]:
        """Yield every norm."""
        for block in self.blocks:
            yield block.norm_1
            yield block.norm_2
        yield self.final_norm

    def norm_before(self, reader: str) -> str:
        """Return the norm through which a map reads the residual stream."""
        for block in self.blocks:
            if reader in block.qkv:
                return block.norm_1
            if reader in block.neuron_maps:
                return block.norm_2
        assert reader == self.unembedding, f"{reader} does not read the residual stream"
        return self.final_norm


def decoder_layout(n_layers: int, gated: bool) -> DecoderLayout:
    """Return the names of the parts of a decoder with plain or gated MLPs.

    >>> decoder_layout(1, gated=False).norm_before("h.0.mlp.c_fc")
    'h.0.norm_2'
    """
    names = ("gate_proj", "up_proj") if gated else ("c_fc",)
    blocks = list[BlockLayout]()
    for k in range(n_layers):
        block = BlockLayout(
            norm_1=f"h.{k}.norm_1",
            attn=f"h.{k}.attn",
            norm_2=f"h.{k}.norm_2",
            mlp=f"h.{k}.mlp",
            neuron_maps=tuple(f"h.{k}.mlp.{name}" for name in names),
        )
        blocks.append(block)
    return DecoderLayout(tuple(blocks))
