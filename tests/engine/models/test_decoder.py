"""The decoder against transformers, for every family: the same logits, however a prompt is cut and paged."""

from pathlib import Path

import pytest
import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.attention import Step
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import load_model
from inferflux.kernels.kernel_set import select
from tests.support.models import (
    FAMILIES,
    Builder,
    gemma3_multimodal,
    make_tiny_model,
    olmoe_clipped,
    phi3_longrope_beyond,
    seed_oss,
)
from tests.support.paged import paged_logits, step_metadata

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 300, (75,), generator=torch.Generator().manual_seed(1)).tolist()
TOLERANCE = 1e-4


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    context = ParallelContext(rank=0, size=1, device=CPU)
    return load_model(folder, kernels=select(CPU, dtype), device=CPU, dtype=dtype, context=context)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_whole_and_in_chunks(tiny_model, family):
    """The prompt is longer than every window; chunks of 7 cross pages and windows at odd places."""
    model = tiny_model(family)
    decoder = load(model.folder)
    expected = model.logits(PROMPT)
    assert expected.std() > 1, "flat logits would hide mistakes"
    for chunk in (len(PROMPT), 7):
        (logits,) = paged_logits(decoder, [PROMPT], [chunk])
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("builder", [phi3_longrope_beyond, gemma3_multimodal, olmoe_clipped, seed_oss])
def test_logits_equal_transformers_special_cases(tmp_path: Path, builder: Builder):
    model = make_tiny_model(builder, tmp_path)
    (logits,) = paged_logits(load(model.folder), [PROMPT], [7])
    torch.testing.assert_close(logits, model.logits(PROMPT), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_rows_of_a_mixed_batch_do_not_touch_each_other(tiny_model, family):
    model = tiny_model(family)
    prompts = [PROMPT, PROMPT[:1], PROMPT[20:53]]
    results = paged_logits(load(model.folder), prompts, [7, 1, 33])
    for prompt, logits in zip(prompts, results, strict=True):
        torch.testing.assert_close(logits, model.logits(prompt), rtol=0, atol=TOLERANCE)


def test_only_the_asked_rows_are_scored(tiny_model):
    decoder = load(tiny_model("llama").folder)
    (expected,) = paged_logits(decoder, [PROMPT], [len(PROMPT)])
    shape = (5, decoder.spec.num_layers, 2, 16, decoder.spec.num_kv_heads, decoder.spec.head_dim)
    metadata = step_metadata([(0, len(PROMPT))], torch.arange(5, dtype=torch.int32)[None])
    for asked in ([74, 0, 3], []):
        indices = torch.tensor(asked, dtype=torch.int64)
        logits = decoder.forward(torch.tensor(PROMPT), metadata, torch.zeros(shape), indices)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected[indices], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma3"])
def test_bfloat16_stays_close_to_float32(tiny_model, family):
    """The same weights in 16 bits give the same ranking of tokens, nearly; a wrong cast anywhere would not."""
    model = tiny_model(family)
    (logits,) = paged_logits(load(model.folder, torch.bfloat16), [PROMPT], [7])
    similarity = torch.nn.functional.cosine_similarity(logits, model.logits(PROMPT), dim=-1)
    assert similarity.min() > 0.98


def test_a_layer_can_be_replaced_to_read_activations(tiny_model):
    model = tiny_model("qwen3")
    decoder = load(model.folder)
    streams = []

    def capture(index: int) -> None:
        layer = decoder.layers[index]

        def call(hidden: torch.Tensor, residual: torch.Tensor | None, kv_pages: torch.Tensor, step: Step):
            hidden, residual = layer(hidden, residual, kv_pages, step)
            streams.append(hidden + residual)
            return hidden, residual

        decoder.layers[index] = call

    capture(1)
    paged_logits(decoder, [PROMPT], [len(PROMPT)])
    with torch.inference_mode():
        expected = model.reference(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(streams[0], expected, rtol=0, atol=TOLERANCE)
