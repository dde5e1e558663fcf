"""From the configuration to a Runner of a decoder: dtype, kernels, weights, KV pool, lower tiers, warm-up."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec
import torch

from inferflux.config import RuntimeConfig
from inferflux.dist.channel import Channel
from inferflux.dist.context import ParallelContext
from inferflux.engine import large_pages
from inferflux.engine.interface import ModelInfo
from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.engine.kv.store.opening import open_tiers
from inferflux.engine.kv.store.shared_moves import SharedMoves
from inferflux.engine.models.adapter import Adapter, read_adapter
from inferflux.engine.models.decoder import Decoder
from inferflux.engine.models.load import load_model, resolve_dtype
from inferflux.engine.models.partition import num_kv_heads
from inferflux.engine.models.sentence_settings import read_pooling
from inferflux.engine.models.spec import ModelSpec, read_spec, with_max_model_len
from inferflux.engine.runner.budget import check_fits, pool_memory, weight_bytes
from inferflux.engine.runner.build_draft import Draft, build_draft, find_draft
from inferflux.engine.runner.building import BuildSettings, Built, Phase
from inferflux.engine.runner.fingerprint import adapter_contents, adapter_name, contents, fingerprint
from inferflux.engine.runner.memory import PoolPlan, free_memory, plan_cache, plan_pool
from inferflux.engine.runner.reservations import Reservation
from inferflux.engine.runner.runner import Runner
from inferflux.engine.runner.warm_up import warm_up
from inferflux.engine.runner.working_memory import step_bytes, working_bytes
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import eos_token_id, load_tokenizer
from inferflux.errors import ConfigError
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.kernel_set import KernelSet, select
from inferflux.kernels.quantized_kv import LARGEST_CODE, SCALE_BYTES

_QUANTIZED_TYPES: Final = MappingProxyType({"int8": torch.int8, "fp8": torch.float8_e4m3fn})


class _Prepared(NamedTuple):
    """What is decided before weights are read. num_bytes: they take no fewer. kv_dtype: of cached keys and values."""

    adapters: Sequence[Adapter]
    dtype: torch.dtype
    kv_dtype: torch.dtype
    kernels: KernelSet
    draft: Draft | None
    num_bytes: int


class _Loaded(NamedTuple):
    """A model with its kernels and adapters, and the one that drafts for it, if one does. num_bytes: the weights take
    no fewer. kv_dtype: of cached keys and values."""

    decoder: Decoder
    kernels: KernelSet
    num_bytes: int
    kv_dtype: torch.dtype
    draft: tuple[Draft, Decoder] | None
    adapters: Sequence[Adapter]


class _Pages(NamedTuple):
    """The KV pages that a model was given, and what moves them to lower tiers. cache_pages: see `ModelInfo`.
    fingerprint: names what they hold."""

    page: PageShape
    plan: PoolPlan
    cache_pages: int | None
    pool: torch.Tensor
    fingerprint: bytes
    moves: SharedMoves | None


def build_decoder(settings: BuildSettings, channel: Channel, phase: Phase, reservation: Reservation) -> Built:
    """Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it."""
    context, runtime = channel.context, settings.runtime
    with phase("weights"):
        loaded = _load(settings, context, reservation)
    decoder = loaded.decoder
    large_pages.collapse_in_background(decoder)
    ends = _eos_token_ids(settings.path, decoder.spec)
    grammars = Grammars(lambda: Vocabulary(load_tokenizer(settings.path), decoder.spec.vocab_size, ends))
    with phase("pool"):
        pages = _make_pages(settings, loaded, channel, reservation)
        max_model_len, page_tokens = pages.plan.max_model_len, pages.page.page_tokens
        runner = Runner(
            decoder,
            loaded.kernels,
            pages.pool,
            max_batch_size=runtime.scheduler.max_batch_size,
            max_pages_per_row=math.ceil(max_model_len / page_tokens),
            grammars=grammars,
        )
    with phase("warmup"):
        warm_up(runner, min(page_tokens, max_model_len), is_first=context.rank == 0)
        if runtime.cuda_graphs == "auto":
            runner.record_graphs(max_model_len, channel.agree)
        drafter = None if loaded.draft is None else build_draft(*loaded.draft, runtime, pages.plan)
    if context.size == 1:
        runner.isolate_failures()
    info, names = _describe(settings, decoder, pages, ends), [adapter_name(one.folder) for one in loaded.adapters]
    return Built(runner, info, pages.fingerprint, grammars, pages.moves, drafter, names)


def prepare_decoder(settings: BuildSettings, context: ParallelContext) -> _Prepared:
    """Decides what can be decided before weights are read. Raises as `build_decoder` does."""
    path, model, runtime, configs = settings
    device, spec = context.device, with_max_model_len(read_spec(path), model.max_model_len)
    adapters = [read_adapter(config, spec) for config in configs]
    dtype = resolve_dtype(settings.dtype, spec.checkpoint_dtype, device)
    kv_dtype = _kv_dtype(runtime, dtype)
    kernels = select(device, dtype, runtime.kernels, quantized_kv=kv_dtype in LARGEST_CODE)
    num_bytes = weight_bytes(spec.num_parameters, dtype.itemsize, model.quantization)
    num_bytes += dtype.itemsize * sum(adapter.num_parameters for adapter in adapters)
    num_bytes //= context.size
    draft = find_draft(runtime, path, model.max_model_len, context)
    num_bytes += 0 if draft is None else draft.weight_bytes
    return _Prepared(adapters, dtype, kv_dtype, kernels, draft, num_bytes)


def _load(settings: BuildSettings, context: ParallelContext, reservation: Reservation) -> _Loaded:
    """Reads the weights, once it is known that they fit."""
    path, model = settings.path, settings.model
    adapters, dtype, kv_dtype, kernels, draft, num_bytes = prepare_decoder(settings, context)
    with reservation.turn() as reserved:
        check_fits(model, num_bytes, free_memory(context.device).without(reserved).shared(context.size))
        reservation.reserve(num_bytes)
    decoder = load_model(
        path,
        kernels=kernels,
        device=context.device,
        dtype=dtype,
        context=context,
        max_model_len=model.max_model_len,
        quantization=model.quantization,
        adapters=adapters,
    )
    drafting = None if draft is None else (draft, draft.load(decoder.spec.max_model_len))
    return _Loaded(decoder, kernels, num_bytes, kv_dtype, drafting, adapters)


def _make_pages(settings: BuildSettings, loaded: _Loaded, channel: Channel, reservation: Reservation) -> _Pages:
    """Gives the model KV pages, on every rank as many as fit on the one with the least room."""
    path, model, runtime, _ = settings
    context, spec, dtype = channel.context, loaded.decoder.spec, loaded.decoder.dtype
    width = spec.head_dim + (SCALE_BYTES if loaded.kv_dtype in LARGEST_CODE else 0)
    num_heads = num_kv_heads(spec, context.size)
    page = PageShape(spec.num_layers, runtime.paged_kv.page_tokens, num_heads, width, loaded.kv_dtype)
    page_bytes = page.num_bytes + (0 if loaded.draft is None else loaded.draft[0].page.num_bytes)
    with reservation.turn() as reserved:
        free = free_memory(context.device).without(reserved).shared(context.size)
        memory = pool_memory(model, loaded.num_bytes, free)._replace(working=_working_bytes(runtime, loaded))
        plan = plan_pool(model, runtime, spec.max_model_len, page_bytes, memory)
        reservation.reserve(loaded.num_bytes + plan.num_pages * page_bytes + memory.working)
    channel.barrier()
    context.require_same(_shared_settings(settings, loaded.adapters))
    plan = PoolPlan(*context.all_reduce_min(plan))
    pool = allocate_pool(plan.num_pages, page, context.device)
    name = fingerprint(path, page, dtype, spec.max_model_len, context.rank, context.size, model.quantization)
    host = free_memory(torch.device("cpu")).shared(context.size)
    cache_pages = plan_cache(runtime, loaded.num_bytes, page_bytes, memory)
    return _Pages(page, plan, cache_pages, pool, name, open_tiers(runtime, pool, name, context, host.num_bytes))


def _working_bytes(runtime: RuntimeConfig, loaded: _Loaded) -> int:
    """What steps need beside weights and pages. On a CPU the pool's share leaves them more than they ever take."""
    decoder = loaded.decoder
    if decoder.context.device.type == "cpu":
        return 0
    steps = [step_bytes(decoder.spec, decoder.dtype.itemsize, runtime, decoder.context.size)]
    if loaded.draft is not None:
        draft = loaded.draft[1]
        steps.append(step_bytes(draft.spec, draft.dtype.itemsize, runtime))
    return working_bytes(steps)


def _eos_token_ids(path: Path, spec: ModelSpec) -> list[int]:
    """What ends an answer by the model's settings, and by its tokenizer's: a fine-tuned model that ends its turns with
    another token than the one it came from may say so there only."""
    own = eos_token_id(path)
    if own is None or own >= spec.vocab_size or own in spec.eos_token_ids:
        return list(spec.eos_token_ids)
    return [*spec.eos_token_ids, own]


def _shared_settings(settings: BuildSettings, adapters: Sequence[Adapter]) -> dict[str, str]:
    """What ranks must agree on, each as text: all that decides shapes, page moves, and how steps are computed; not
    where files are, nor who runs when."""
    path, model, runtime, _ = settings
    file = runtime.nvme_offload
    shared: dict[str, object] = {
        **{f"models[].{name}": getattr(model, name) for name in ("dtype", "quantization", "max_model_len")},
        **{f"runtime.{name}": getattr(runtime, name) for name in ("dtype", "paged_kv", "kernels", "cuda_graphs")},
        "runtime.scheduler.max_batch_size": runtime.scheduler.max_batch_size,
        "runtime.prefix_cache.enabled": runtime.prefix_cache.enabled,
        "runtime.nvme_offload": [file.path is not None, file.queue_depth, file.max_gb],
        "models[].path": contents(path),
        "adapters": [adapter_contents(adapter.folder) for adapter in adapters],
    }
    return {name: msgspec.json.encode(value).decode() for name, value in shared.items()}


def _kv_dtype(runtime: RuntimeConfig, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of cached keys and values of a model that computes in `dtype`."""
    name, own = runtime.paged_kv.dtype, dtype_name(dtype)
    if name in _QUANTIZED_TYPES:
        return _QUANTIZED_TYPES[name]
    if name not in ("auto", own):
        raise ConfigError(
            f'runtime.paged_kv.dtype: must be auto, int8, fp8 or the model\'s dtype, {own} (got "{name}")'
        )
    return dtype


def _describe(settings: BuildSettings, decoder: Decoder, pages: _Pages, eos_token_ids: list[int]) -> ModelInfo:
    spec = decoder.spec
    return ModelInfo(
        architecture=spec.architecture,
        num_parameters=spec.num_parameters,
        vocab_size=spec.vocab_size,
        max_model_len=pages.plan.max_model_len,
        dtype=dtype_name(decoder.dtype),
        device=str(decoder.context.device),
        page_tokens=pages.page.page_tokens,
        device_pages=pages.plan.num_pages,
        eos_token_ids=eos_token_ids,
        quantization=settings.model.quantization,
        page_bytes=pages.page.num_bytes,
        cache_pages=pages.cache_pages,
        pooling="mean" if read_pooling(settings.path) == "mean" else "last",
        embedding_size=spec.hidden_size,
    )
