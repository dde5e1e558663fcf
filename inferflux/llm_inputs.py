"""Checks what callers pass to `LLM` and brings it into one form: lists of prompts, with one setting for each.

Pure functions; know no engine. All raise RequestError, and `adapter_configs` ConfigError, for what cannot be used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferflux.config.constructed import checked
from inferflux.config.tree import AdapterConfig
from inferflux.engine.text import TextBundle
from inferflux.errors import ConfigError, RequestError
from inferflux.sampling_params import SamplingParams

Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def as_batch(prompts: Any) -> list[Any]:
    """Returns a list of prompts; a single one (a string, a list of ints or of messages) becomes a list of one."""
    if not isinstance(prompts, str) and not _is_list(prompts):
        raise RequestError(f"prompts: must be one prompt or a list of them (got {type(prompts).__name__})")
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | dict)):
        return [prompts]
    return list(prompts)


def params_for(num_prompts: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """Returns the parameters of each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError(f"params: must be SamplingParams, one or a list of them (got {type(params).__name__})")
    if len(params) != num_prompts:
        raise RequestError(f"params: must be one for all or one per prompt ({num_prompts}, got {len(params)})")
    return list(params)


def adapter_configs(adapters: Mapping[str, str | Path] | None) -> list[AdapterConfig]:
    """Returns the adapters, given as folders by name, as the configuration has them."""
    given = {} if adapters is None else adapters
    if not isinstance(given, Mapping):
        raise ConfigError(f"adapters: must be folders by name (got {type(given).__name__})")
    return [
        checked(AdapterConfig, {"id": name, "path": str(path), "base": "model"}, ("adapters",))
        for name, path in given.items()
    ]


def adapters_for(num_prompts: int, adapter: str | Sequence[str | None] | None) -> list[str | None]:
    """Returns the adapter of each prompt; None: the model without one."""
    if adapter is None or isinstance(adapter, str):
        return [adapter] * num_prompts
    if not _is_list(adapter) or not all(name is None or isinstance(name, str) for name in adapter):
        raise RequestError(f"adapter: must be a name, or a list of names and None (got {type(adapter).__name__})")
    if len(adapter) != num_prompts:
        raise RequestError(f"adapter: must be one for all or one per prompt ({num_prompts}, got {len(adapter)})")
    return list(adapter)


def check_generates(params: SamplingParams) -> None:
    """Refuses parameters that make a vector instead of text."""
    if params.pooling is not None:
        raise RequestError("pooling: gives a vector instead of text; use embed()", param="pooling")


def token_ids_of(prompt: Prompt, text: TextBundle) -> list[int]:
    """Encodes a prompt: a string, chat messages, or token ids, which stay as they are."""
    if isinstance(prompt, str):
        return text.tokenizer.encode(prompt, add_special_tokens=True)
    items: Sequence[Any] = prompt if _is_list(prompt) else (prompt,)
    messages = [item for item in items if isinstance(item, dict)]
    token_ids = [item for item in items if type(item) is int]
    if len(messages) == len(items) > 0:
        return text.encode_chat(messages)
    if len(token_ids) == len(items):
        return token_ids
    raise RequestError("prompt: must be a string, a list of token ids or a list of messages", param="prompt")


def _is_list(value: Any) -> bool:
    """Whether it is a sequence that may hold prompts or token ids; bytes are not."""
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview)
