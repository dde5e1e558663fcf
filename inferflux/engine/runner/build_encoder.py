"""From the configuration to an EncoderRunner, for models that only embed: dtype, weights, warm-up."""

import math
from typing import NamedTuple

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.interface import ModelInfo
from inferflux.engine.models.encoder_spec import EncoderSpec, read_encoder_spec
from inferflux.engine.models.load import resolve_dtype
from inferflux.engine.models.load_encoder import load_encoder
from inferflux.engine.models.sentence_settings import read_pooling
from inferflux.engine.runner.budget import check_fits, weight_bytes
from inferflux.engine.runner.building import BuildSettings, Built, Phase
from inferflux.engine.runner.encoder_runner import EncoderRunner
from inferflux.engine.runner.fingerprint import fingerprint
from inferflux.engine.runner.memory import free_memory
from inferflux.engine.runner.reservations import Reservation
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.errors import ConfigError, RequestError
from inferflux.kernels.dtypes import dtype_name
from inferflux.kernels.kernel_set import KernelSet, select
from inferflux.sampling_params import SamplingParams


class _Prepared(NamedTuple):
    spec: EncoderSpec
    dtype: torch.dtype
    kernels: KernelSet


def build_encoder(settings: BuildSettings, context: ParallelContext, phase: Phase, reservation: Reservation) -> Built:
    """Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it."""
    path, model, runtime, _ = settings
    with phase("weights"):
        spec, dtype, kernels = prepare_encoder(settings, context)
        weights = weight_bytes(spec.num_parameters, dtype.itemsize, None)
        with reservation.turn() as reserved:
            check_fits(model, weights, free_memory(context.device).without(reserved))
            reservation.reserve(weights)
        encoder = load_encoder(path, spec, kernels=kernels, dtype=dtype, context=context)
    runner = EncoderRunner(encoder)
    with phase("warmup"):
        _warm_up(runner)
    page_tokens = runtime.paged_kv.page_tokens
    info = ModelInfo(
        architecture=spec.architecture,
        num_parameters=spec.num_parameters,
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        dtype=dtype_name(dtype),
        device=str(context.device),
        page_tokens=page_tokens,
        # Pages in the books only: as many as a full batch can ask for, so that they never limit anybody.
        device_pages=runtime.scheduler.max_batch_size * math.ceil(spec.max_model_len / page_tokens),
        eos_token_ids=[],
        pooling=read_pooling(path) or "mean",
        embedding_size=spec.hidden_size,
        generates=False,
    )
    return Built(runner, info, fingerprint(path, dtype), Grammars(_no_vocabulary), None)


def prepare_encoder(settings: BuildSettings, context: ParallelContext) -> _Prepared:
    """Decides what can be decided before weights are read. Raises as `build_encoder` does."""
    path, model, runtime, adapters = settings
    if adapters:
        raise ConfigError(f"adapters: {adapters[0].id}: {model.id} is an encoder, which takes none")
    if context.size > 1:
        raise ConfigError("distributed.world_size: must be 1 for an encoder model")
    if model.quantization is not None:
        raise ConfigError("models[].quantization: is not supported for encoder models")
    spec = read_encoder_spec(path, model.max_model_len)
    dtype = resolve_dtype(settings.dtype, spec.checkpoint_dtype, context.device)
    return _Prepared(spec, dtype, select(context.device, dtype, runtime.kernels))


def _no_vocabulary() -> Vocabulary:
    raise RequestError("this model does not generate text")


def _warm_up(runner: EncoderRunner) -> None:
    """Runs a text, so that the first request does not pay for first calls; slot 0 is free afterwards."""
    start = RowStart(
        slot=0,
        request_id=0,
        sampling=SamplingParams(pooling="mean"),
        seed=0,
        history=[0],
        num_prompt_tokens=1,
        eos_token_ids=[],
    )
    runner.execute(StepPlan(0, [start], [Row(0, 0, [0], [0], sample=True)]))
