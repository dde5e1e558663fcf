"""What an engine's process holds once its model is loaded: the weights once, no page yet, and little besides.

The model is large enough that a second copy of its weights, or of their float twins, breaks the bound.
"""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.shapes import VOCAB_SIZE, Shape, write_model
from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import PagedKvConfig
from inferflux.engine.service.client import EngineClient

SHAPE = Shape("llama", "LlamaForCausalLM", 512, 10, 8, 4, 2048, qkv_bias=False)
LAYER_WEIGHTS = SHAPE.num_layers * 512 * (2 * 512 + 2 * 256 + 3 * 2048)
EMBEDDING = VOCAB_SIZE * 512
NUM_PAGES = 500
# float32; int8 with a scale per row, which 1.15 covers.
WEIGHT_BYTES = {None: 4 * (LAYER_WEIGHTS + EMBEDDING), "int8": LAYER_WEIGHTS + EMBEDDING}
# Tables, buffers, what is free between the weights, and embeddings that a product's layout has no rows of: 40 MB where
# the products have been measured before, 130 where the native library is yet to be built.
SLACK_BYTES = 150e6
IMPORTS = """
import inferflux.engine.service.host, inferflux.engine.runner.build, psutil
print(psutil.Process().memory_info().rss)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory") / "model", SHAPE, torch.float32)


@pytest.mark.parametrize("quantization", [None, "int8"])
async def test_resident_size_after_load(folder: Path, quantization: str | None) -> None:
    runtime = RuntimeConfig(dtype="float32", paged_kv=PagedKvConfig(device_pages=NUM_PAGES))
    model = ModelConfig(id="model", path=str(folder), quantization=quantization, max_model_len=1024)
    client = EngineClient(model, runtime)
    try:
        await client.start()
        assert client.pid is not None
        resident = psutil.Process(client.pid).memory_info().rss
    finally:
        await client.close()
    imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout
    assert resident - int(imports) < 1.15 * WEIGHT_BYTES[quantization] + SLACK_BYTES
