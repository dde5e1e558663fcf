"""From the configuration to a Runner: device, dtype, kernels, weights, KV pool, warm-up."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import DistributedConfig
from inferflux.dist.channel import Channel
from inferflux.engine import large_pages
from inferflux.engine.demo import STUB, demo_model_path
from inferflux.engine.interface import ModelInfo
from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.engine.kv.store.opening import open_tiers
from inferflux.engine.kv.store.shared_moves import SharedMoves
from inferflux.engine.models.encoder_spec import encoder_architecture
from inferflux.engine.models.load import load_model, resolve_dtype
from inferflux.engine.models.partition import num_kv_heads
from inferflux.engine.models.sentence_settings import read_pooling
from inferflux.engine.models.spec import ModelSpec, read_spec
from inferflux.engine.runner.budget import check_fits, pool_memory, weight_bytes
from inferflux.engine.runner.build_draft import build_draft, find_draft
from inferflux.engine.runner.build_encoder import build_encoder
from inferflux.engine.runner.draft_model import DraftModel
from inferflux.engine.runner.encoder_runner import EncoderRunner
from inferflux.engine.runner.fingerprint import contents, fingerprint
from inferflux.engine.runner.memory import PoolPlan, free_memory, plan_pool
from inferflux.engine.runner.promises import Promise, promises_folder
from inferflux.engine.runner.runner import Runner
from inferflux.engine.runner.warm_up import warm_up
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import eos_token_id, load_tokenizer
from inferflux.errors import ConfigError, RequestError
from inferflux.kernels.kernel_set import select
from inferflux.kernels.narrow_kv import LARGEST_CODE, SCALE_BYTES
from inferflux.sampling_params import Pooling

_NARROW: Final = MappingProxyType({"int8": torch.int8, "fp8": torch.float8_e4m3fn})

Phase = Callable[[str], AbstractContextManager[None]]


class Built(NamedTuple):
    """A runner ready for its first plan. fingerprint: 32 bytes, naming what its pages' bytes depend on. grammars: where
    the runner will look for a request's grammar. moves: None without lower tiers. draft: None unless a model drafts."""

    runner: Runner | EncoderRunner
    info: ModelInfo
    fingerprint: bytes
    grammars: Grammars
    moves: SharedMoves | None
    draft: DraftModel | None = None


def build_runner(model: ModelConfig, runtime: RuntimeConfig, channel: Channel, phase: Phase) -> Built:
    """Loads this rank's share of the model and makes it ready; `phase(name)` is entered around each part.

    Every rank builds at once, with the same settings, and ends with the same number of pages.
    Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it.
    """
    path = _model_path(model)
    context = channel.context
    with Promise(str(context.device), promises_folder() if context.size == 1 else None) as promise:
        if encoder_architecture(path) is not None:
            encoder = build_encoder(path, model, runtime, context, phase, promise)
            return Built(encoder.runner, encoder.info, encoder.fingerprint, Grammars(_no_vocabulary), None)
        return _build_decoder(path, model, runtime, channel, phase, promise)


def _build_decoder(
    path: Path, model: ModelConfig, runtime: RuntimeConfig, channel: Channel, phase: Phase, promise: Promise
) -> Built:
    context = channel.context
    device = context.device
    with phase("weights"):
        spec = read_spec(path)
        dtype = resolve_dtype(runtime.dtype if model.dtype == "auto" else model.dtype, spec.checkpoint_dtype, device)
        kv_dtype = _kv_dtype(runtime, dtype)
        kernels = select(device, dtype, runtime.kernels, narrow_kv=kv_dtype in LARGEST_CODE)
        weights = weight_bytes(spec.num_parameters, dtype.itemsize, model.quantization) // context.size
        draft = find_draft(runtime, path, model.max_model_len, context)
        weights += 0 if draft is None else draft.weight_bytes
        with promise.turn() as promised:
            check_fits(model, weights, free_memory(device).without(promised).shared(context.size))
            promise.give(weights)
        decoder = load_model(
            path,
            kernels=kernels,
            device=device,
            dtype=dtype,
            context=context,
            max_model_len=model.max_model_len,
            quantization=model.quantization,
        )
        small = None if draft is None else draft.load(decoder.spec.max_model_len)
    large_pages.collapse_in_background(decoder)
    spec, page_tokens = decoder.spec, runtime.paged_kv.page_tokens
    ends = _eos_token_ids(path, spec)
    grammars = Grammars(lambda: Vocabulary(load_tokenizer(path), spec.vocab_size, ends))
    with phase("pool"):
        width = spec.head_dim + (SCALE_BYTES if kv_dtype in LARGEST_CODE else 0)
        page = PageShape(spec.num_layers, page_tokens, num_kv_heads(spec, context.size), width, kv_dtype)
        page_bytes = page.num_bytes + (0 if draft is None else draft.page.num_bytes)
        with promise.turn() as promised:
            free = pool_memory(model, weights, free_memory(device).without(promised).shared(context.size))
            plan = plan_pool(model, runtime, spec.max_model_len, page_bytes, free)
            promise.give(weights + plan.num_pages * page_bytes)
        channel.meet()
        context.require_same(_shared_settings(model, runtime, path))
        plan = PoolPlan(*context.smallest(plan))
        pool = allocate_pool(plan.num_pages, page, device)
        name = fingerprint(path, page, dtype, spec.max_model_len, context.rank, context.size, model.quantization)
        free = free_memory(torch.device("cpu")).shared(context.size)
        moves = open_tiers(runtime, pool, name, context, free.num_bytes)
        runner = Runner(
            decoder,
            kernels,
            pool,
            max_batch_size=runtime.scheduler.max_batch_size,
            max_pages_per_row=math.ceil(plan.max_model_len / page_tokens),
            grammars=grammars,
        )
    with phase("warmup"):
        warm_up(runner, min(page_tokens, plan.max_model_len), is_first=context.rank == 0)
        if runtime.cuda_graphs == "auto":
            runner.record_graphs(plan.max_model_len, channel.agree)
        drafter = None if draft is None or small is None else build_draft(draft, small, runtime, plan)
    if context.size == 1:
        runner.isolate_failures()
    info = _describe(spec, page, device, plan.num_pages, plan.max_model_len)
    pooling: Pooling = "mean" if read_pooling(path) == "mean" else "last"
    own_dtype = str(dtype).removeprefix("torch.")
    info = msgspec.structs.replace(
        info, dtype=own_dtype, quantization=model.quantization, pooling=pooling, eos_token_ids=ends
    )
    return Built(runner, info, name, grammars, moves, drafter)


def _eos_token_ids(path: Path, spec: ModelSpec) -> list[int]:
    """What ends an answer by the model's settings, and by its tokenizer's: a fine-tuned model that ends its turns with
    another token than the one it came from may say so there only."""
    own = eos_token_id(path)
    if own is None or own >= spec.vocab_size or own in spec.eos_token_ids:
        return list(spec.eos_token_ids)
    return [*spec.eos_token_ids, own]


def _no_vocabulary() -> Vocabulary:
    raise RequestError("this model generates nothing")


def choose_device(model: ModelConfig, distributed: DistributedConfig) -> torch.device:
    """Returns where this rank runs. Raises ConfigError when CUDA is asked for and there is none, or not this rank's
    device."""
    if model.backend == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"models[].backend: must be auto or cpu: no CUDA device is available (got cuda for {model.id})"
        )
    use_cuda = model.backend == "cuda" or (model.backend == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    index = distributed.rank % num_devices if distributed.local_rank is None else distributed.local_rank
    if index >= num_devices:
        raise ConfigError(f"distributed.local_rank: must be < the host's CUDA devices, {num_devices} (got {index})")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _shared_settings(model: ModelConfig, runtime: RuntimeConfig, path: Path) -> dict[str, str]:
    """What ranks must agree on, each as text: all that decides shapes, page moves, and how steps are computed; not
    where files are, nor who runs when."""
    file = runtime.nvme_offload
    settings: dict[str, object] = {
        **{f"models[].{name}": getattr(model, name) for name in ("dtype", "quantization", "max_model_len")},
        **{f"runtime.{name}": getattr(runtime, name) for name in ("dtype", "paged_kv", "kernels", "cuda_graphs")},
        "runtime.scheduler.max_batch_size": runtime.scheduler.max_batch_size,
        "runtime.prefix_cache.enabled": runtime.prefix_cache.enabled,
        "runtime.nvme_offload": [file.path is not None, file.queue_depth, file.max_gb],
        "models[].path": contents(path),
    }
    return {name: msgspec.json.encode(value).decode() for name, value in settings.items()}


def _model_path(model: ModelConfig) -> Path:
    if model.backend == "stub" or model.path == STUB:
        return demo_model_path()
    if model.path is None:
        raise ConfigError(f"models[].path: must be a model folder (none given for {model.id})")
    return Path(model.path)


def _kv_dtype(runtime: RuntimeConfig, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of cached keys and values of a model that computes in `dtype`."""
    name, own = runtime.paged_kv.dtype, str(dtype).removeprefix("torch.")
    if name in _NARROW:
        return _NARROW[name]
    if name not in ("auto", own):
        raise ConfigError(
            f'runtime.paged_kv.dtype: must be auto, int8, fp8 or the model\'s dtype, {own} (got "{name}")'
        )
    return dtype


def _describe(spec: ModelSpec, page: PageShape, device: torch.device, num_pages: int, max_model_len: int) -> ModelInfo:
    return ModelInfo(
        architecture=spec.architecture,
        num_parameters=spec.num_parameters,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        dtype=str(page.dtype).removeprefix("torch."),
        device=str(device),
        page_tokens=page.page_tokens,
        device_pages=num_pages,
        eos_token_ids=list(spec.eos_token_ids),
        page_bytes=page.num_bytes,
        embedding_size=spec.hidden_size,
    )
