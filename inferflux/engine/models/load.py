"""Loading a model: a folder becomes a Decoder. Assembles; reading is `weights`' work, computing the decoder's."""

from pathlib import Path

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.attention import Attention, AttentionShape
from inferflux.engine.layers.embedding import Embedding
from inferflux.engine.layers.linear import Linear
from inferflux.engine.layers.mlp import GatedMlp
from inferflux.engine.layers.rope import RopeTable
from inferflux.engine.models.decoder import Decoder, DecoderLayer, Layer
from inferflux.engine.models.partition import check_partition, num_heads, num_kv_heads
from inferflux.engine.models.spec import CheckpointDtype, LayerSpec, ModelSpec, read_spec, with_max_model_len
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
) -> Decoder:
    """Loads the folder `path` for this rank. max_model_len None: the config's own length.

    quantization: how the layers' matrices are rounded while they are read. The output matrix is too (to int8 where the
    others have 4 bits), and with it the embeddings where they are one; embeddings of their own, norms and biases stay.

    Raises ModelLoadError when the folder is not sound or not supported, ConfigError when ranks cannot share it.
    """
    spec = with_max_model_len(read_spec(path), max_model_len)
    table = weight_table(spec)
    with Checkpoint(path) as checkpoint:
        check_tensors(checkpoint, table.sources(), lambda name: is_ignored(spec, name))
        builder = _Builder(spec, kernels, context, WeightLoader(checkpoint, context, device, dtype), quantization)
        head_scheme: Scheme | None = "int8" if quantization == "int4" else quantization
        embedding = builder.matrix(table.embedding, head_scheme if table.lm_head is None else None)
        layers: list[Layer] = [
            builder.layer(layer, weights) for layer, weights in zip(spec.layers, table.layers, strict=True)
        ]
        head = embedding if table.lm_head is None else builder.matrix(table.lm_head, head_scheme)
        return Decoder(
            spec,
            kernels,
            context,
            embedding=Embedding(embedding, spec.embedding_scale, context, dtype),
            layers=layers,
            final_norm=builder.norm(table.final_norm),
            lm_head=Linear(kernels, head),
            ropes=tuple(RopeTable(rope, spec.max_model_len, dtype, device) for rope in spec.ropes),
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
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.context = context
        self.loader = loader
        self._quantization = quantization
        check_partition(spec, context.size)
        self._num_heads = num_heads(spec, context.size)
        self._num_kv_heads = num_kv_heads(spec, context.size)

    def layer(self, layer: LayerSpec, weights: LayerWeights) -> DecoderLayer:
        output_norms = None
        if weights.attention_output_norm is not None and weights.mlp_output_norm is not None:
            output_norms = self.norm(weights.attention_output_norm), self.norm(weights.mlp_output_norm)
        release_free_memory()
        return DecoderLayer(
            self.kernels,
            self.spec.norm_eps,
            self._attention(layer, weights),
            GatedMlp(
                self.kernels,
                self.context,
                self.spec.activation,
                self._linear(weights.gate_up, weights.gate_up_bias),
                self._linear(weights.down, weights.down_bias),
            ),
            (self.norm(weights.input_norm), self.norm(weights.mlp_input_norm)),
            output_norms,
        )

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
            norm_eps=spec.norm_eps,
        )
        return Attention(
            self.kernels,
            self.context,
            shape,
            self._linear(weights.qkv, weights.qkv_bias),
            self._linear(weights.o, weights.o_bias),
            self._head_norm(weights),
        )

    def _head_norm(self, weights: LayerWeights) -> Tensor | None:
        """Returns [H + K, D]: the query norm's weight for each query head, the key norm's for each key head."""
        if weights.query_norm is None or weights.key_norm is None:
            return None
        query = self.norm(weights.query_norm).expand(self._num_heads, -1)
        return torch.cat((query, self.norm(weights.key_norm).expand(self._num_kv_heads, -1)))

    def _linear(self, weight: Weight, bias: Weight | None) -> Linear:
        matrix = self.matrix(weight, self._quantization)
        return Linear(self.kernels, matrix, None if bias is None else self.loader.load(bias))

    def matrix(self, weight: Weight, scheme: Scheme | None) -> Tensor | QuantizedWeight:
        """Returns the matrix in the model's type, or rounded as `scheme` says, block by block."""
        if scheme is None:
            return self.loader.load(weight)
        return quantize_blocks(self.loader.blocks(weight), self.loader.shape(weight), scheme)
