"""Encoder: whole texts in, one state per token out; every token sees every other (BERT, arXiv 1810.04805).

Holds weights and nothing of any request. B texts padded to L tokens; H heads of D numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F

from inferflux.engine.layers.linear import Linear
from inferflux.engine.models.encoder_spec import EncoderActivation, EncoderSpec

Tensor = torch.Tensor

_ACTIVATIONS: Final[Mapping[EncoderActivation, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}
)


class Norm(NamedTuple):
    """A layer norm's weights, [hidden] each."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """qkv [3 * hidden, hidden]. Each half is added to its input and normalised."""

    qkv: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


class Encoder:
    """A loaded model. words [V, hidden]; positions [P, hidden]: with the type that all tokens have added.

    on_layer: called before each layer, since a long text may take minutes.
    """

    def __init__(
        self, spec: EncoderSpec, words: Tensor, positions: Tensor, norm: Norm, layers: list[EncoderLayer]
    ) -> None:
        self.spec = spec
        self.layers = layers
        self._words = words
        self._positions = positions
        self._norm = norm
        self._activation = _ACTIVATIONS[spec.activation]
        self.on_layer: Callable[[], object] = _nothing

    @property
    def device(self) -> torch.device:
        return self._words.device

    @torch.inference_mode()
    def states(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """token_ids int64 [B, L], anything behind a text's end; lengths int64 [B]. Returns states [B, L, hidden]."""
        num_texts, length = token_ids.shape
        first = self.spec.first_position
        hidden = self._words[token_ids] + self._positions[first : first + length]
        hidden = self._normalise(hidden.view(num_texts * length, -1), self._norm)
        seen = torch.arange(length, device=token_ids.device) < lengths.unsqueeze(1)
        mask = seen.view(num_texts, 1, 1, length)
        for layer in self.layers:
            self.on_layer()
            mixed = self._attend(layer.qkv(hidden), mask, length)
            hidden = self._normalise(hidden + layer.output(mixed), layer.attention_norm)
            hidden = self._normalise(hidden + layer.down(self._activation(layer.up(hidden))), layer.mlp_norm)
        return hidden.view(num_texts, length, -1)

    def _attend(self, qkv: Tensor, mask: Tensor, length: int) -> Tensor:
        """qkv [B * L, 3 * hidden], mask [B, 1, 1, L] -> [B * L, hidden]."""
        heads = self.spec.num_heads
        query, key, value = qkv.view(-1, length, 3, heads, self.spec.hidden_size // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(-1, self.spec.hidden_size)

    def _normalise(self, hidden: Tensor, norm: Norm) -> Tensor:
        return F.layer_norm(hidden, (self.spec.hidden_size,), norm.weight, norm.bias, self.spec.norm_eps)


def _nothing() -> None:
    """Nobody wants to know."""
