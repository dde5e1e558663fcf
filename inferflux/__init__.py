"""InferFlux: an LLM inference server and research engine.

`LLM` and `SamplingParams` are the offline face. They load on first use, so that importing the package, as the server's
own process does, does not bring torch along.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferflux.llm import LLM as LLM
    from inferflux.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from inferflux.llm import LLM

        return LLM
    if name == "SamplingParams":
        from inferflux.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
