"""Tiny random models of every family, made and run by transformers: the oracle of the model tests.

`FAMILIES[name](folder)` writes a whole model folder (config, safetensors, generation config) and returns the
transformers model, float32, eager attention. Weights are drawn far wider than at training's start, so that logits
differ clearly, greedy choices have no ties and mistakes show; norms and biases are random too. Everything is a
function of the family's name. Fit for serving: `write_tokenizer(folder)` adds a tokenizer the ids of which they know.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel

VOCAB_SIZE = 320
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
MAX_POSITIONS = 1024
WEIGHT_STD = 0.2
EMBEDDING_STD = 0.25
CLEAR_GAP = 1e-3
MAX_DRAWS = 20

Builder = Callable[[Path], PreTrainedModel]

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.5 * i for i in range(6)],
    "attention_factor": 1.2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "decoder_sparse_step": 1}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, "sliding_window": 20}


def build(folder: Path, name: str, architecture: str, **changes: Any) -> PreTrainedModel:
    """Writes a model folder; `changes` are config keys. `name` seeds the weights."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**_SIZES, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, seed=zlib.crc32(name.encode()))
    model.save_pretrained(folder)
    return model


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draws every weight: matrices around 0, norms around what leaves a vector as it is, biases wide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embed_tokens" in name or "lm_head" in name:
                weight.copy_(noise * EMBEDDING_STD)
            elif weight.dim() >= 2:  # all experts of a layer are one tensor
                weight.copy_(noise * WEIGHT_STD)
            elif name.endswith("bias"):
                weight.copy_(noise * 0.3)
            else:
                weight.add_(noise * 0.2)
            if "post_feedforward_layernorm" in name:
                weight.add_(5.0)  # else Gemma's large embeddings drown what its layers add


FAMILIES: Mapping[str, Builder] = {
    name: partial(build, name=name, architecture=architecture, **changes)
    for name, architecture, changes in (
        ("llama", "LlamaForCausalLM", {}),
        ("llama_biased", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("llama_linear", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("llama3", "LlamaForCausalLM", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
        ("mistral", "MistralForCausalLM", {"sliding_window": 24}),
        ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("qwen2_yarn", "Qwen2ForCausalLM", {"rope_parameters": _YARN_ROPE}),
        ("qwen2_window", "Qwen2ForCausalLM", {
            "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2,
        }),
        ("qwen3", "Qwen3ForCausalLM", {"head_dim": 24}),
        ("mixtral", "MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 24}),
        ("qwen2_moe", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
        ("qwen3_moe", "Qwen3MoeForCausalLM", {**_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
        ("olmoe", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("smollm3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0]}),
        ("phi3", "Phi3ForCausalLM", {"partial_rotary_factor": 0.75, "sliding_window": 40}),
        ("phi3_longrope", "Phi3ForCausalLM", {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": _LONG_ROPE,
        }),
        ("gemma2", "Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
        ("gemma3", "Gemma3ForCausalLM", {**_GEMMA, "num_hidden_layers": 7}),
    )
}  # fmt: skip


def phi3_longrope_beyond(folder: Path) -> PreTrainedModel:
    """Phi-3 that is served for longer than its original length, which turns to LongRoPE's long list.

    Not among FAMILIES: transformers changes lists in the middle of a request, so only prompts of more than 32 tokens
    compare.
    """
    return build(
        folder,
        "phi3_longrope_beyond",
        "Phi3ForCausalLM",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        rope_parameters={key: value for key, value in _LONG_ROPE.items() if key != "attention_factor"},
    )


def olmoe_clipped(folder: Path) -> PreTrainedModel:
    """OLMoE whose queries, keys and values are cut off at less than many of them have."""
    return build(folder, "olmoe_clipped", "OlmoeForCausalLM", num_experts=8, num_experts_per_tok=2, clip_qkv=0.7)


def seed_oss(folder: Path) -> PreTrainedModel:
    """Llama with biases at two doors of attention, each by a key of its own."""
    return build(folder, "seed_oss", "SeedOssForCausalLM", head_dim=24, attention_out_bias=True)


def gemma3_multimodal(folder: Path) -> PreTrainedModel:
    """Gemma 3 with a vision tower in its checkpoint."""
    text = {**_SIZES, **_GEMMA}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build(
        folder,
        "gemma3_multimodal",
        "Gemma3ForConditionalGeneration",
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision, image_size=56, patch_size=14),
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
        image_token_index=VOCAB_SIZE - 1,
    )


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer: special tokens, the 256 bytes, a few merges; at most VOCAB_SIZE ids."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges = [(left, right) for left, right in ("he", "in", "er", "an", "on", "Ġa", "Ġt", ("Ġt", "he"), ("in", "g"))]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    assert len(vocab) <= VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


class TinyModel(NamedTuple):
    """A model folder, servable, and the transformers model that was saved to it."""

    folder: Path
    reference: PreTrainedModel

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Returns the reference's logits of every position, float32 [tokens, VOCAB_SIZE]."""
        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids]), use_cache=False).logits[0].float()

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Returns the reference's greedy continuation; end-of-text does not stop it."""
        output = self.reference.generate(
            torch.tensor([token_ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        return output[0, len(token_ids) :].tolist()

    def clear_case(self, num_prompt_tokens: int, num_tokens: int) -> tuple[list[int], list[int]]:
        """Returns a prompt and its greedy continuation in which no choice is close; see `clear_cases`."""
        return self.clear_cases([num_prompt_tokens], num_tokens)[0]

    def clear_cases(self, lengths: Sequence[int], num_tokens: int) -> list[tuple[list[int], list[int]]]:
        """Returns a prompt of each length and its greedy continuation in which no choice is close.

        Of some thousand greedy choices one is between two logits nearer than float32's own error (it happened), and
        no implementation can be held to it. Prompts are drawn in a fixed order until every choice is clear.
        Continuations are generated together, padded, which is faster; what counts is that each of their tokens is the
        likeliest, by far enough, after the prompt and the tokens before it alone.
        """
        generators = [torch.Generator().manual_seed(length) for length in lengths]
        cases: dict[int, tuple[list[int], list[int]]] = {}
        for _ in range(MAX_DRAWS):
            drawn = {
                index: torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (length,), generator=generators[index]).tolist()
                for index, length in enumerate(lengths)
                if index not in cases
            }
            answers = self._greedy_together(list(drawn.values()), num_tokens)
            for (index, prompt), answer in zip(drawn.items(), answers, strict=True):
                if self._smallest_lead(prompt, answer) > CLEAR_GAP:
                    cases[index] = prompt, answer
            if len(cases) == len(lengths):
                return [cases[index] for index in range(len(lengths))]
        raise AssertionError(f"{MAX_DRAWS} prompts of {lengths} tokens, and none of some length has a clear answer")

    def _greedy_together(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        output = self.reference.generate(
            torch.tensor([[PAD_ID] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return output[:, longest:].tolist()

    def _smallest_lead(self, prompt: list[int], answer: list[int]) -> float:
        """How far at least an answer's tokens are ahead of the likeliest other ones; below 0: not greedy."""
        logits = self.logits(prompt + answer)[len(prompt) - 1 : -1]
        chosen = torch.tensor(answer)[:, None]
        others = logits.scatter(1, chosen, float("-inf")).amax(dim=1)
        return (logits.gather(1, chosen)[:, 0] - others).min().item()


def make_tiny_model(builder: Builder, folder: Path) -> TinyModel:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = builder(folder)
    write_tokenizer(folder)
    return TinyModel(folder, model)
