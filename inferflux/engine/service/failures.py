"""Turns failures reported by an engine into exceptions. Pure functions of frames."""

from inferflux.engine.interface import Output
from inferflux.engine.service.protocol import Failed, FromEngine
from inferflux.errors import ConfigError, EngineDeadError, EngineError, ModelLoadError, RequestError


def load_failure(model_id: str, frame: FromEngine | None) -> Exception:
    """Returns why an engine is not ready whose first frame was this; None: there was none."""
    if isinstance(frame, Failed):
        return (ConfigError if frame.kind == ConfigError.__name__ else ModelLoadError)(frame.message)
    return EngineDeadError(f"the engine of model {model_id} died while loading")


def request_failure(output: Output) -> Exception:
    """Returns why a sequence ended with an error."""
    message = output.error or "the request failed"
    if output.error_param is None:
        return EngineError(message)
    return RequestError(message, param=output.error_param, code=output.error_code)
