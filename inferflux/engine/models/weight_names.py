"""WeightNames: under which names a family's checkpoints keep their tensors. Shapes are `weight_table`'s; no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names of one family; the defaults are Llama's.

    prefix: before all names but the output head's. Names of a layer follow `{prefix}layers.N.` and, except in the
    last three fields, are followed by `.weight` or `.bias`.
    qkv, gate_up: the tensors to stack, or the one tensor of checkpoints that have them stacked already.
    router, experts, shared_expert: of mixtures of experts only; expert N's are `{experts}.N.{name}`, the shared one's
    as an MLP's, and `{shared_expert}_gate`.
    attention_output_norm, mlp_output_norm: of families with sandwich norms only.
    adapter_prefixes: what else adapters' files may have in the prefix's place: the names of the modules in memory.
    ignored_in_layer: full names in a layer that may be there and are not needed. ignored_prefixes: whole parts of a
    checkpoint that are not served (a vision tower).
    """

    prefix: str = "model."
    lm_head: str = "lm_head.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    shared_expert: str = "mlp.shared_expert"
    attention_output_norm: str = ""
    mlp_input_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = ""
    ignored_in_layer: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    ignored_prefixes: tuple[str, ...] = ()
    adapter_prefixes: tuple[str, ...] = ()


LLAMA_NAMES = WeightNames()
MIXTRAL_NAMES = WeightNames(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    expert_gate_up=("w1", "w3"),
    expert_down="w2",
)
FUSED_NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
GEMMA_NAMES = WeightNames(
    attention_output_norm="post_attention_layernorm",
    mlp_input_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
GEMMA_MULTIMODAL_NAMES = WeightNames(
    prefix="language_model.model.",
    lm_head="language_model.lm_head.weight",
    attention_output_norm="post_attention_layernorm",
    mlp_input_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    ignored_prefixes=("vision_tower.", "multi_modal_projector."),
    adapter_prefixes=("model.language_model.",),
)
