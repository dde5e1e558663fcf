"""Loading a model: a folder becomes a Decoder. Assembles; reading is `weights`' work, computing the decoder's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.attention import Attention, AttentionShape
from inferflux.engine.layers.embedding import Embedding
from inferflux.engine.layers.head_norm import HeadNorm, PerHeadNorm, WholeNorm
from inferflux.engine.layers.linear import Linear, LoraLinear
from inferflux.engine.layers.mlp import GatedMlp
from inferflux.engine.layers.moe import MoeMlp, MoeShape, SharedExpert
from inferflux.engine.layers.rope import RopeTable
from inferflux.engine.models.adapter import Adapter
from inferflux.engine.models.common_keys import CheckpointDtype
from inferflux.engine.models.decoder import Decoder, DecoderLayer, Layer
from inferflux.engine.models.lora_weights import LoraLookup, no_lora, open_lora_weights
from inferflux.engine.models.partition import check_partition, num_heads, num_kv_heads
from inferflux.engine.models.spec import LayerSpec, ModelSpec, read_spec, with_max_model_len
from inferflux.engine.models.weight_table import LayerWeights, is_ignored, weight_table
from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.engine.weights.heap import release_free_memory
from inferflux.engine.weights.loader import WeightLoader, check_tensors
from inferflux.engine.weights.source import Weight
from inferflux.errors import ConfigError
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.quantized_weight import QuantizedWeight, Scheme, quantize_blocks

Tensor = torch.Tensor
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: Path,
    *,
    kernels: KernelSet,
    device: torch.device,
    dtype: torch.dtype,
    context: ParallelContext,
    max_model_len: int | None = None,
    quantization: Scheme | None = None,
    adapters: Sequence[Adapter] = (),
) -> Decoder:
    """Loads the folder `path` for this rank. max_model_len None: the config's own length. adapters: in the order of
    their numbers, from 1; they are in the model's type, whatever its matrices are rounded to.

    quantization: how the layers' matrices are rounded while they are read. The output matrix is too (to int8 where the
    others have 4 bits), and with it the embeddings where they are one; embeddings of their own, norms, biases and what
    chooses experts stay.

    Raises ModelLoadError when the folder is not sound or not supported, ConfigError when ranks cannot share it.
    """
    spec = with_max_model_len(read_spec(path), max_model_len)
    table = weight_table(spec)
    with Checkpoint(path) as checkpoint, open_lora_weights(adapters, context, device, dtype) as lora:
        check_tensors(checkpoint, table.sources(), lambda name: is_ignored(spec, name))
        loader = WeightLoader(checkpoint, context, device, dtype)
        return build_decoder(spec, loader, kernels, context, quantization, lora)


def build_decoder(
    spec: ModelSpec,
    loader: WeightLoader,
    kernels: KernelSet,
    context: ParallelContext,
    quantization: Scheme | None = None,
    lora: LoraLookup = no_lora,
) -> Decoder:
    """Puts the model together from what `loader` gives, onto its device."""
    table = weight_table(spec)
    builder = _Builder(spec, kernels, context, loader, quantization, lora)
    head_scheme: Scheme | None = "int8" if quantization == "int4" else quantization
    embedding, head = builder.ends(table.embedding, table.lm_head, head_scheme)
    layers: list[Layer] = [
        builder.layer(layer, weights) for layer, weights in zip(spec.layers, table.layers, strict=True)
    ]
    return Decoder(
        spec,
        kernels,
        context,
        embedding=embedding,
        layers=layers,
        final_norm=builder.norm(table.final_norm),
        lm_head=head,
        expert_load=builder.expert_load,
        is_adapted=builder.is_adapted,
        ropes=tuple(RopeTable(rope, spec.max_model_len, loader.dtype, loader.device) for rope in spec.ropes),
    )


def resolve_dtype(name: str, checkpoint_dtype: CheckpointDtype, device: torch.device) -> torch.dtype:
    """Returns the type to compute in. `auto`: the checkpoint's own on an accelerator; on a CPU bfloat16 where the
    checkpoint has 16 bits and the CPU computes in bfloat16, else float32.

    Raises ConfigError for an unknown name.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"dtype: must be one of auto, {', '.join(_DTYPES)} (got {name!r})")
        return _DTYPES[name]
    if device.type != "cpu":
        return _DTYPES[checkpoint_dtype]
    if checkpoint_dtype == "float32" or not torch.backends.mkldnn.is_available():
        return torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class _Builder:
    """Builds layers for one rank, one weight at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: KernelSet,
        context: ParallelContext,
        loader: WeightLoader,
        quantization: Scheme | None,
        lora: LoraLookup,
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.context = context
        self.loader = loader
        self._quantization = quantization
        self._lora = lora
        self.is_adapted = False
        num_experts = 0 if spec.moe is None else spec.moe.num_experts
        self.expert_load = torch.zeros(num_experts, dtype=torch.int64, device=context.device)
        check_partition(spec, context.size)
        self._num_heads = num_heads(spec, context.size)
        self._num_kv_heads = num_kv_heads(spec, context.size)

    def ends(self, embedding: Weight, lm_head: Weight | None, scheme: Scheme | None) -> tuple[Embedding, Linear]:
        """Returns the embedding and the output matrix, in memory once where they are one (lm_head None) and the packed
        matrix's rows can be read."""
        weight = self.matrix(embedding, scheme if lm_head is None else None)
        head = Linear(self.kernels, weight if lm_head is None else self.matrix(lm_head, scheme))
        table = (head.rows if lm_head is None else None) or weight
        return Embedding(table, self.spec.embedding_scale, self.context, self.loader.dtype), head

    def layer(self, layer: LayerSpec, weights: LayerWeights) -> DecoderLayer:
        output_norms = None
        if weights.attention_output_norm is not None and weights.mlp_output_norm is not None:
            output_norms = self.norm(weights.attention_output_norm), self.norm(weights.mlp_output_norm)
        release_free_memory()
        return DecoderLayer(
            self.kernels,
            self.spec.norm_eps,
            self._attention(layer, weights),
            self._moe(weights) if layer.sparse else self._mlp(weights),
            (self.norm(weights.input_norm), self.norm(weights.mlp_input_norm)),
            output_norms,
        )

    def _mlp(self, weights: LayerWeights) -> GatedMlp:
        assert weights.gate_up is not None
        assert weights.down is not None
        gate_up = self._linear(weights.gate_up, weights.gate_up_bias)
        return GatedMlp(
            self.kernels, self.context, self.spec.activation, gate_up, self._linear(weights.down, weights.down_bias)
        )

    def _moe(self, weights: LayerWeights) -> MoeMlp:
        moe, kernels = self.spec.moe, self.kernels
        assert moe is not None
        assert weights.router is not None
        mine = self.context.split(moe.num_experts, "num_experts")
        op: Any = kernels.moe if self._quantization is None else kernels.quantized_moe
        matrix = partial(self.matrix, scheme=self._quantization)
        experts = op.pack(map(matrix, weights.experts_gate_up[mine]), map(matrix, weights.experts_down[mine]))
        shape = MoeShape(moe.num_experts, moe.experts_per_token, moe.normalise, self.spec.activation)
        router, shared = self.loader.load(weights.router), self._shared_expert(weights)
        return MoeMlp(op, experts, self.context, shape, router=router, shared=shared, load=self.expert_load)

    def _shared_expert(self, weights: LayerWeights) -> SharedExpert | None:
        if weights.gate_up is None or weights.down is None or weights.shared_gate is None:
            return None
        gate_up, down = self._linear(weights.gate_up, None), self._linear(weights.down, None)
        return SharedExpert(self.kernels, self.spec.activation, gate_up, down, self.loader.load(weights.shared_gate))

    def norm(self, weight: Weight) -> Tensor:
        """Returns a norm's weight, Gemma's 1 + w computed in float32."""
        loaded = self.loader.load(weight, torch.float32)
        return (loaded + 1.0 if self.spec.norm_offset else loaded).to(self.loader.dtype)

    def _attention(self, layer: LayerSpec, weights: LayerWeights) -> Attention:
        spec = self.spec
        shape = AttentionShape(
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=spec.head_dim,
            window=layer.window,
            scale=spec.attention_scale,
            soft_cap=spec.attention_soft_cap,
            rope=layer.rope,
            clip=spec.qkv_clip,
        )
        return Attention(
            self.kernels,
            self.context,
            shape,
            self._linear(weights.qkv, weights.qkv_bias),
            self._linear(weights.o, weights.o_bias),
            self._head_norm(weights),
        )

    def _head_norm(self, weights: LayerWeights) -> HeadNorm | None:
        if weights.query_norm is None or weights.key_norm is None:
            return None
        spec, query, key = self.spec, self.norm(weights.query_norm), self.norm(weights.key_norm)
        if spec.qk_norm_whole:
            both = (query.view(self._num_heads, -1), key.view(self._num_kv_heads, -1))
            widths = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim)
            copies = self.context.size * self._num_kv_heads // spec.num_kv_heads
            return WholeNorm(self.context, both, widths, copies, spec.norm_eps)
        rows = torch.cat((query.expand(self._num_heads, -1), key.expand(self._num_kv_heads, -1)))
        return PerHeadNorm(self.kernels, rows, spec.norm_eps)

    def _linear(self, weight: Weight, bias: Weight | None) -> Linear:
        matrix = self.matrix(weight, self._quantization)
        added = None if bias is None else self.loader.load(bias)
        lora = self._lora(weight)
        if lora:
            self.is_adapted = True
            return LoraLinear(self.kernels, matrix, added, lora)
        return Linear(self.kernels, matrix, added)

    def matrix(self, weight: Weight, scheme: Scheme | None) -> Tensor | QuantizedWeight:
        """Returns the matrix in the model's type, or rounded as `scheme` says, block by block."""
        if scheme is None:
            return self.loader.load(weight)
        return quantize_blocks(self.loader.blocks(weight), self.loader.shape(weight), scheme)
