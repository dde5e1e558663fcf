"""From the configuration to a Runner: where it computes and from which folder; `build_decoder` and `build_encoder` do
the rest."""

from collections.abc import Sequence
from pathlib import Path

import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import STUB, AdapterConfig, DistributedConfig
from inferflux.dist.channel import Channel
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import backend_of
from inferflux.engine.demo import demo_model_path
from inferflux.engine.models.encoder_spec import encoder_architecture
from inferflux.engine.runner.build_decoder import build_decoder, prepare_decoder
from inferflux.engine.runner.build_encoder import build_encoder, prepare_encoder
from inferflux.engine.runner.building import BuildSettings, Built, Phase
from inferflux.engine.runner.cpu_quota import keep_to_quota
from inferflux.engine.runner.forks import compute_alone_in_forks
from inferflux.engine.runner.reservations import Reservation, reservations_folder
from inferflux.errors import ConfigError


def build_runner(
    model: ModelConfig, adapters: Sequence[AdapterConfig], runtime: RuntimeConfig, channel: Channel, phase: Phase
) -> Built:
    """Loads this rank's share of the model and its adapters, and makes it ready; `phase(name)` is entered around each
    part.

    Every rank builds at once, with the same settings, and ends with the same number of pages.
    Raises ModelLoadError when the model cannot be served here, ConfigError when a setting does not fit it.
    """
    compute_alone_in_forks()
    keep_to_quota()
    settings, context = BuildSettings(_model_path(model), model, runtime, adapters), channel.context
    with Reservation(str(context.device), reservations_folder() if context.size == 1 else None) as reservation:
        if encoder_architecture(settings.path) is not None:
            return build_encoder(settings, context, phase, reservation)
        return build_decoder(settings, channel, phase, reservation)


def check_settings(
    model: ModelConfig, adapters: Sequence[AdapterConfig], runtime: RuntimeConfig, distributed: DistributedConfig
) -> None:
    """Raises what `build_runner` would raise before it reads weights or measures memory."""
    device = choose_device(model, distributed)
    backend_of(distributed, device)
    settings = BuildSettings(_model_path(model), model, runtime, adapters)
    context = ParallelContext(distributed.rank, distributed.world_size, device)
    if encoder_architecture(settings.path) is not None:
        prepare_encoder(settings, context)
    else:
        prepare_decoder(settings, context)


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


def _model_path(model: ModelConfig) -> Path:
    if STUB in (model.backend, model.path):
        return demo_model_path()
    if model.path is None:
        raise ConfigError(f"models[].path: must be a model folder (none given for {model.id})")
    return Path(model.path)
