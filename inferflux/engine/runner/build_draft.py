"""From the configuration to a DraftModel. It computes on rank 0 alone, whole: it is small."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from inferflux.config import RuntimeConfig
from inferflux.config.tree import STUB
from inferflux.dist.context import ParallelContext
from inferflux.engine import large_pages
from inferflux.engine.demo import demo_model_path
from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import load_model, resolve_dtype
from inferflux.engine.models.spec import ModelSpec, read_spec, with_max_model_len
from inferflux.engine.runner.budget import weight_bytes
from inferflux.engine.runner.draft_model import DraftModel
from inferflux.engine.runner.memory import PoolPlan
from inferflux.engine.runner.runner import Runner
from inferflux.engine.runner.warm_up import warm_up
from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.errors import ConfigError
from inferflux.kernels.kernel_set import KernelSet, select

_KEY = "runtime.speculative_decoding.draft_model"
# Models that read it alike share a tokenizer, as far as drafts go.
_SAMPLE = "Speculative décoding: 3 + 14 = 17;\n\tdef f(x): return x  # 草稿 🙂"


class Draft(NamedTuple):
    """A draft model that fits the model it is to draft for. page: what it adds to a page. num_known: tokens that both
    models know."""

    path: Path
    spec: ModelSpec
    kernels: KernelSet
    device: torch.device
    dtype: torch.dtype
    page: PageShape
    num_known: int

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.spec.num_parameters, self.dtype.itemsize, None)

    def load(self, max_model_len: int) -> Decoder:
        """Reads the weights. Raises ModelLoadError when they are not sound."""
        decoder = load_model(
            self.path,
            kernels=self.kernels,
            device=self.device,
            dtype=self.dtype,
            context=ParallelContext(0, 1, self.device),
            max_model_len=max_model_len,
        )
        large_pages.collapse_in_background(decoder)
        return decoder


def find_draft(runtime: RuntimeConfig, path: Path, max_model_len: int | None, context: ParallelContext) -> Draft | None:
    """Returns what is to draft for the model in `path`, read with at most max_model_len tokens (None: its own window).
    None when the configuration wants no draft model, and on ranks that have no part in it.

    Raises ConfigError when the two do not go together or there is no such model, ModelLoadError when it is damaged.
    """
    settings = runtime.speculative_decoding
    if not settings.uses_model or context.rank:
        return None
    if settings.draft_model is None:
        raise ConfigError(f"{_KEY}: must be a model folder where the method is draft_model")
    if runtime.paged_kv.cpu_pages or runtime.nvme_offload.path is not None:
        raise ConfigError(f"{_KEY}: must be unset with lower KV tiers, which keep the large model's pages only")
    folder = demo_model_path() if settings.draft_model == STUB else Path(settings.draft_model)
    if not folder.is_dir():
        raise ConfigError(f"{_KEY}: must be a model folder (got {folder}, which is none)")
    own, spec = read_spec(folder), with_max_model_len(read_spec(path), max_model_len)
    window = spec.max_model_len
    if own.longest_model_len < window:
        raise ConfigError(
            f"{_KEY}: supports {own.longest_model_len} tokens, the model's window is {window}; lower "
            "models[].max_model_len, or choose another"
        )
    ours, theirs = (load_tokenizer(each).encode(_SAMPLE, add_special_tokens=False) for each in (path, folder))
    if ours != theirs:
        raise ConfigError(f"{_KEY}: {folder} has another tokenizer than the model")
    device = context.device
    dtype = resolve_dtype(runtime.dtype, own.checkpoint_dtype, device)
    page = PageShape(own.num_layers, runtime.paged_kv.page_tokens, own.num_kv_heads, own.head_dim, dtype)
    kernels, num_known = select(device, dtype, runtime.kernels), min(own.vocab_size, spec.vocab_size)
    return Draft(folder, own, kernels, device, dtype, page, num_known)


def build_draft(draft: Draft, decoder: Decoder, runtime: RuntimeConfig, plan: PoolPlan) -> DraftModel:
    """Gives a loaded draft model its pages and makes it ready."""
    runner = Runner(
        decoder,
        draft.kernels,
        allocate_pool(plan.num_pages, draft.page, draft.device),
        max_batch_size=runtime.scheduler.max_batch_size,
        max_pages_per_row=math.ceil(plan.max_model_len / draft.page.page_tokens),
    )
    warm_up(runner, min(draft.page.page_tokens, plan.max_model_len))
    if runtime.cuda_graphs == "auto":
        runner.record_graphs(plan.max_model_len, lambda yes: yes)
    runner.isolate_failures()
    return DraftModel(runner, draft.num_known)
