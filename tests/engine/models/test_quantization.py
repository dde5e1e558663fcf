"""Quantised loading: the numbers of the rounded weights in transformers' own arithmetic, little lost, little held."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.quality import compare, load, logits_of
from inferflux import LLM, SamplingParams
from inferflux.dist.context import ParallelContext
from inferflux.engine.demo import demo_model_path
from inferflux.engine.models.spec import read_spec
from inferflux.engine.models.weight_table import weight_table
from inferflux.engine.runner.fingerprint import fingerprint
from inferflux.engine.weights import loader
from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.native.loading import library
from inferflux.kernels.quantized_weight import INT4_GROUP, Scheme, dequantize, quantize

PROMPT = torch.randint(3, 300, (75,), generator=torch.Generator().manual_seed(1)).tolist()
CPU = torch.device("cpu")
QUESTIONS = ("What is InferFlux?", "What is the prefix cache?", "How do I set an API key?", "What does a page hold?")
# What the demo model may lose: KL in nats, and the share of positions with the same top token.
DEMO_LIMITS = {"int8": (1e-4, 0.98), "int4": (5e-3, 0.96), "fp8": (1.5e-3, 0.96)}
# How far logits of the tiny models, which spread over some units, may lie off in the mean and at most. Inputs of int8
# products are rounded to 16 bits (measured: 4e-4, 0.01), or to halves of 7 bits where no native library is (1.6e-3,
# 0.02); fp8 products are those of floats.
TOLERANCES = {"int8": (2e-3, 2.5e-2), "int4": (2e-3, 2.5e-2), "fp8": (1e-5, 1e-4)}
# Inputs of int4 products are rounded to 8 bits in the native library, as they then are in the reference too; now and
# then there is one that goes the other way (7e-3, 0.11).
BYTES_TOLERANCE = (1.5e-2, 0.2)
# In the reference's experts they are not: of what rounding the weights does, this share at most (measured: 0.14).
EXPERTS_SHARE = 0.2
MIXTURES = ("mixtral", "qwen2_moe")


def takes_bytes(scheme: Scheme) -> bool:
    """Whether inputs beside weights of 4 bits are rounded to 8 here."""
    return scheme == "int4" and library().reason is None


def round_weights(model: PreTrainedModel, scheme: Scheme) -> None:
    """Replaces a transformers model's matrices with what quantised loading makes of them, in float32: all experts of a
    layer are one tensor there, and what chooses them stays as it is. Those of int4 take their inputs as ours do."""
    head_scheme: Scheme = "int8" if scheme == "int4" else scheme
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 3:
                weight.copy_(torch.stack([dequantize(quantize(expert, scheme), torch.float32) for expert in weight]))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("shared_expert_gate"):
                chosen = head_scheme if name == "lm_head" else scheme
                module.weight.copy_(dequantize(quantize(module.weight, chosen), torch.float32))
                if takes_bytes(chosen):
                    module.register_forward_pre_hook(lambda _, args: (rounded_to_bytes(args[0]),))


def rounded_to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Each 32 columns of a row in 8 bits, with a scale of their own."""
    blocks = functional.pad(x, (0, -x.shape[-1] % INT4_GROUP)).unflatten(-1, (-1, INT4_GROUP))
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(steps > 0, blocks / steps, 0).round() * steps
    return whole.flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen2", "llama_biased", "phi3", "gemma3", "mixtral", "qwen2_moe"])
def test_logits_are_those_of_the_rounded_weights(tiny_model, family, scheme):
    """Tied embeddings (qwen2, gemma3) follow the head's rounding by themselves: in transformers they are one tensor."""
    model = tiny_model(family)
    rounded = type(model.reference).from_pretrained(model.folder, attn_implementation="eager").eval()
    round_weights(rounded, scheme)
    with torch.inference_mode():
        expected = rounded(torch.tensor([PROMPT])).logits[0]
    effect = (expected - model.logits(PROMPT)).abs()
    mean, most = BYTES_TOLERANCE if takes_bytes(scheme) else TOLERANCES[scheme]
    if takes_bytes(scheme) and family in MIXTURES:
        mean, most = EXPERTS_SHARE * float(effect.mean()), float(effect.max())
    assert effect.mean() >= 5 * mean, "the rounding does not show"
    error = (logits_of(load(model.folder, scheme), PROMPT) - expected).abs()
    assert float(error.mean()) < mean
    assert float(error.max()) < most


def test_the_demo_model_keeps_its_words() -> None:
    """On answers of its own, float32: what it learned, whatever has become of the documentation since."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = LLM("stub", dtype="float32").generate(chats, SamplingParams(max_tokens=80, temperature=0), progress=False)
    texts = [answer.prompt_token_ids + answer.token_ids for answer in answers]
    folder = demo_model_path()
    float_model = load(folder, "float32")
    reference = torch.cat([logits_of(float_model, text) for text in texts])
    for scheme, (most_kl, least_top1) in DEMO_LIMITS.items():
        quantised = load(folder, scheme)
        quality = compare(reference, torch.cat([logits_of(quantised, text) for text in texts]))
        assert quality.kl < most_kl, scheme
        assert quality.top1 >= least_top1, scheme


def test_blocks_are_the_matrix_and_never_more_than_a_buffer(tiny_model, monkeypatch) -> None:
    folder = tiny_model("phi3").folder
    monkeypatch.setattr(loader, "BUFFER_BYTES", 5 * 64 * 4)
    with Checkpoint(folder) as checkpoint:
        context = ParallelContext(rank=0, size=1, device=CPU)
        weights = loader.WeightLoader(checkpoint, context, CPU, torch.float32)
        qkv = weight_table(read_spec(folder)).layers[0].qkv
        blocks = [block.clone() for block in weights.blocks(qkv)]
        assert torch.equal(torch.cat(blocks), weights.load(qkv))
        assert max(block.nbytes for block in blocks) <= loader.BUFFER_BYTES


def test_pages_of_the_float_model_are_not_those_of_the_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path, "page", None) != fingerprint(tmp_path, "page", "int8")
