"""What a model accepts: the same checks for the engine and for the server, which applies them before a request waits.

Pure functions; know no queue, no HTTP and no torch.
"""

from collections.abc import Sequence

from inferflux.engine.interface import ModelInfo
from inferflux.errors import RequestError
from inferflux.sampling_params import Pooling


def check_prompt(prompt_token_ids: Sequence[int], info: ModelInfo, *, param: str, ends: bool) -> None:
    """Raises RequestError when a prompt is empty, too long for the model's window, or not of its vocabulary.

    param: the request's field to name. ends: nothing follows the prompt, so that it may fill the window.
    """
    if not prompt_token_ids:
        raise RequestError(f"{param}: must have at least one token", param=param)
    if len(prompt_token_ids) > info.max_model_len - (not ends):
        excess = "is more than" if ends else "leaves no room for an answer in"
        raise RequestError(
            f"{param}: has {len(prompt_token_ids)} tokens, which {excess} the model's window of {info.max_model_len}",
            param=param,
            code="context_length_exceeded",
        )
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= info.vocab_size:
        raise RequestError(f"{param}: token ids must be >= 0 and < {info.vocab_size}", param=param)


def check_pooling(pooling: Pooling | None, info: ModelInfo) -> None:
    """Raises RequestError for a pooling that does not depend on the prompt."""
    if pooling == "cls" and info.generates:
        raise RequestError("pooling: must be last or mean: this model's first token sees no other", param="pooling")
