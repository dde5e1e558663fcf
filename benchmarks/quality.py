"""What quantisation costs: each scheme's logits beside the float32 model's, on the demo model and on random weights.

    python -m benchmarks.quality                      # demo model, toy and S shapes: a minute
    python -m benchmarks.quality --models demo path/to/model

Figures per model and scheme: the mean KL divergence of the next-token distributions in nats, and the share of
positions where the likeliest token is the same. Trained models read this project's documentation, random weights random
tokens. Results go to benchmarks/results/quality.json unless --out says otherwise.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.shapes import SHAPES, VOCAB_SIZE, write_model
from inferflux.dist.context import ParallelContext
from inferflux.engine.demo import demo_model_path
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import load_model
from inferflux.engine.text import load_text
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.kernel_set import select
from inferflux.kernels.metadata import AttentionMetadata

PAGE_TOKENS = 16
NUM_TOKENS = 256
DOCS = Path(__file__).parent.parent / "docs"
CPU = torch.device("cpu")


class Quality(NamedTuple):
    """kl: mean over positions of KL(float || quantised) in nats. top1: share of positions with the same likeliest."""

    kl: float
    top1: float


def compare(reference: torch.Tensor, logits: torch.Tensor) -> Quality:
    """reference, logits: float32 [positions, V]."""
    true, ours = torch.log_softmax(reference.double(), dim=1), torch.log_softmax(logits.double(), dim=1)
    kl = (true.exp() * (true - ours)).sum(dim=1).mean()
    return Quality(float(kl), float((true.argmax(dim=1) == ours.argmax(dim=1)).double().mean()))


def load(folder: Path, variant: str) -> Decoder:
    """variant: a float type, or a scheme, which then computes in float32."""
    scheme = next((scheme for scheme in SCHEMES if scheme == variant), None)
    dtype = torch.float32 if scheme else getattr(torch, variant)
    context, kernels = ParallelContext(rank=0, size=1, device=CPU), select(CPU, dtype)
    return load_model(folder, kernels=kernels, device=CPU, dtype=dtype, context=context, quantization=scheme)


def logits_of(decoder: Decoder, token_ids: list[int]) -> torch.Tensor:
    """Returns the logits of every position of one prompt, float32 [tokens, V]."""
    spec, count = decoder.spec, len(token_ids)
    num_pages = -(-count // PAGE_TOKENS)
    positions = torch.arange(count)
    metadata = AttentionMetadata(
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        kv_lengths=torch.tensor([count], dtype=torch.int32),
        page_table=torch.arange(num_pages, dtype=torch.int32).unsqueeze(0),
        slots=positions,
        positions=positions,
        query_lengths_host=(count,),
        kv_lengths_host=(count,),
    )
    shape = (num_pages, spec.num_layers, 2, PAGE_TOKENS, spec.num_kv_heads, spec.head_dim)
    pool = torch.zeros(shape, dtype=decoder.dtype)
    return decoder.forward(torch.tensor(token_ids), metadata, pool, positions)


def prompts_of(name: str, folder: Path) -> list[list[int]]:
    """Random weights get random tokens, trained ones the documentation."""
    if name in SHAPES:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(300, VOCAB_SIZE, (NUM_TOKENS,), generator=generator).tolist() for _ in range(2)]
    tokenizer = load_text(folder).tokenizer
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))[:6]]
    return [tokenizer.encode(text, add_special_tokens=True)[:NUM_TOKENS] for text in texts]


def measure(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Returns the figures of one model by variant; bfloat16 shows what a change of type does already."""
    prompts = prompts_of(name, folder)
    reference = torch.cat([logits_of(load(folder, "float32"), prompt) for prompt in prompts])
    figures: dict[str, dict[str, float]] = {}
    for variant in ("bfloat16", *SCHEMES):
        decoder = load(folder, variant)
        quality = compare(reference, torch.cat([logits_of(decoder, prompt) for prompt in prompts]))
        figures[variant] = {"kl_nats": round(quality.kl, 6), "top1": round(quality.top1, 4)}
    return figures


def folder_of(name: str, cache: Path) -> Path:
    if name == "demo":
        return demo_model_path()
    return write_model(cache / f"{name}-float32", SHAPES[name], torch.float32) if name in SHAPES else Path(name)


def show(results: dict[str, Any]) -> None:
    table = Table(title="quantised beside float32")
    for column in ("model", "variant", "KL, nats", "same top token"):
        table.add_column(column)
    for name, variants in results.items():
        for variant, figures in variants.items():
            table.add_row(name, variant, f"{figures['kl_nats']:.2e}", f"{figures['top1']:.1%}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "toy", "S"], help="demo, a shape's name or a folder")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "inferflux-bench-models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {name: measure(name, folder_of(name, arguments.cache)) for name in arguments.models}
    show(results)
    print(record.write("quality", results, arguments.out))


if __name__ == "__main__":
    main()
