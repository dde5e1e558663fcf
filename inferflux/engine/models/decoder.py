"""Decoder: token ids in, logits out; one class for every family, driven by its spec.

Knows the order of the parts; the parts are in `layers`, the arithmetic in `kernels`. Holds weights and nothing of
any request: all that a forward needs comes as arguments.
"""

from collections.abc import Callable

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.attention import Attention, Step
from inferflux.engine.layers.embedding import Embedding
from inferflux.engine.layers.linear import Linear
from inferflux.engine.layers.lora import StepAdapters
from inferflux.engine.layers.mlp import GatedMlp
from inferflux.engine.layers.moe import MoeMlp
from inferflux.engine.layers.rope import Angles, RopeTable
from inferflux.engine.models.spec import ModelSpec
from inferflux.engine.transfer import Array
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.metadata import AttentionMetadata

Tensor = torch.Tensor
Layer = Callable[[Tensor, Tensor | None, Tensor, Step], tuple[Tensor, Tensor]]


class DecoderLayer:
    """Attention, then MLP, each after a norm and added to the residual stream.

    The stream is passed on as two tensors whose sum it is, so that each addition happens inside the next norm.
    output_norms (Gemma): normalise what attention and MLP add; None elsewhere.
    """

    def __init__(
        self,
        kernels: KernelSet,
        eps: float,
        attention: Attention,
        mlp: GatedMlp | MoeMlp,
        input_norms: tuple[Tensor, Tensor],
        output_norms: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._kernels = kernels
        self._eps = eps
        self.attention = attention
        self.mlp = mlp
        self._attention_norm, self._mlp_norm = input_norms
        self._output_norms = output_norms

    def __call__(self, hidden: Tensor, residual: Tensor | None, kv_pages: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """hidden, residual [T, hidden]; residual None in the first layer. May overwrite both. Returns the new pair."""
        kernels, eps = self._kernels, self._eps
        if residual is None:
            hidden, residual = kernels.norm(hidden, self._attention_norm, eps), hidden
        else:
            hidden, residual = kernels.add_norm(hidden, residual, self._attention_norm, eps)
        hidden = self.attention(hidden, kv_pages, step)
        if self._output_norms is not None:
            hidden = kernels.norm(hidden, self._output_norms[0], eps)
        hidden, residual = kernels.add_norm(hidden, residual, self._mlp_norm, eps)
        hidden = self.mlp(hidden) if step.adapters is None else self.mlp(hidden, step.adapters)
        if self._output_norms is not None:
            hidden = kernels.norm(hidden, self._output_norms[1], eps)
        return hidden, residual


class Decoder:
    """A loaded model.

    context: the ranks that share it. expert_load int64 [experts]: tokens that went to each expert so far, all layers
    together. is_adapted: whether adapters add to any matrix.
    `layers` is a plain list of callables (see DecoderLayer.__call__). To read or change activations, put a callable of
    your own in a layer's place; the stream after a layer is hidden + residual, and both may be overwritten later, so
    clone what you keep.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kernels: KernelSet,
        context: ParallelContext,
        *,
        embedding: Embedding,
        layers: list[Layer],
        final_norm: Tensor,
        lm_head: Linear,
        ropes: tuple[RopeTable, ...],
        expert_load: Tensor | None = None,
        is_adapted: bool = False,
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.expert_load = expert_load
        self.is_adapted = is_adapted
        self.dtype = final_norm.dtype
        self._kernels = kernels
        self.context = context
        self._embedding = embedding
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._ropes = ropes

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, metadata: AttentionMetadata, kv_pool: Tensor, logit_indices: Tensor) -> Tensor:
        """`hidden_states` and `logits` at once: returns logits float32 [S, vocab_size] of the tokens asked for."""
        return self.logits(self.hidden_states(token_ids, metadata, kv_pool, logit_indices))

    @torch.inference_mode()
    def hidden_states(
        self,
        token_ids: Tensor,
        metadata: AttentionMetadata,
        kv_pool: Tensor,
        indices: Tensor,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """Computes one step's tokens, writing their keys and values into the pool.

        token_ids int64 [T]; kv_pool [P, num_layers, 2, N, K, D]; indices int64 [S], which of the T tokens are wanted.
        Positions are below spec.max_model_len. adapters: see `Step`. Returns their hidden states behind the last norm,
        [S, hidden].
        """
        hidden, angles = self.embed(token_ids, metadata.positions)
        hidden, residual = self.run_layers(hidden, kv_pool, Step(metadata, angles, adapters))
        return self.apply_final_norm(hidden.index_select(0, indices), residual.index_select(0, indices))

    def embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Angles, ...]]:
        """Returns the layers' inputs: the tokens' embeddings [T, hidden] and their angles, see `Step`."""
        return self._embedding(token_ids), tuple(rope.gather(positions) for rope in self._ropes)

    def writer(self, hidden: Tensor, angles: tuple[Tensor, ...]) -> Callable[[Array, Array], None]:
        """Returns a function of tokens and positions, int64 [T] each, that writes what `embed` returns into `hidden`
        [T, hidden] and `angles` [T, 2, R] of each rope. For one rank on a CPU, where it is faster than torch."""
        write_tokens = self._embedding.writer(hidden)
        write_positions = [rope.writer(own) for rope, own in zip(self._ropes, angles, strict=True)]

        def write(token_ids: Array, positions: Array) -> None:
            write_tokens(token_ids)
            for write_angles in write_positions:
                write_angles(positions)

        return write

    def run_layers(self, hidden: Tensor, kv_pool: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden], which is overwritten. Returns the stream after the last layer, as two addends."""
        residual = None
        for layer, kv_pages in zip(self.layers, kv_pool.unbind(1), strict=True):
            hidden, residual = layer(hidden, residual, kv_pages, step)
        assert residual is not None, "a model has at least one layer"
        return hidden, residual

    def apply_final_norm(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Overwrites residual. Returns the normalised stream [T, hidden]."""
        return self._kernels.add_norm(hidden, residual, self._final_norm, self.spec.norm_eps)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [S, hidden], as from `hidden_states`. Returns logits float32 [S, vocab_size], which may be
        overwritten; in `out` if that is given.

        On ranks other than 0 it returns some part of them: only rank 0 samples.
        """
        if not hidden.shape[0]:
            return hidden.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
        return self.finish_logits(self.local_logits(hidden), out)

    def local_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden]. Returns the product with this rank's part of the output matrix, the last rank's
        padded."""
        return self._lm_head(hidden)

    def are_final(self, local_logits: Tensor) -> bool:
        """Whether the local logits of a single rank are the logits already."""
        is_whole = local_logits.dtype == torch.float32 and local_logits.shape[1] == self.spec.vocab_size
        return is_whole and self.spec.final_soft_cap is None

    def finish_logits(self, local_logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns the logits made of these: gathered, float32, soft-capped; in `out` if that is given, else they may
        share memory."""
        gathered = self.context.gather(local_logits)[:, : self.spec.vocab_size]
        logits = gathered.float().contiguous() if out is None else out[:, : gathered.shape[1]].copy_(gathered)
        cap = self.spec.final_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
