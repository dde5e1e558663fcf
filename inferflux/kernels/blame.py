"""An exception of somebody's kernels in words: what it says, the line of theirs that it comes from, and how the op is
called if it could not be.

Knows no backend.
"""

import inspect
import sysconfig
import traceback
from pathlib import Path
from typing import Any, Final

from inferflux.kernels import ops

# Libraries, which strangers' kernels call, and what calls kernels: neither is where the mistake is.
_OTHERS: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_FOLDER: Final = Path(__file__).parent
_CALLERS: Final = frozenset(
    _FOLDER / name for name in ("repeats.py", "backends.py", "cases/case.py", "bench/measure.py")
)


def describe_failure(error: BaseException, op: str | None = None) -> str:
    """op: which was called, if one was."""
    line = _line_of(error)
    if line is None and op is not None and isinstance(error, TypeError):
        return f"{_says(error)} (the op is {signature_of(op)}, see inferflux/kernels/ops.py)"
    return _says(error) + ("" if line is None else f" ({line})")


def _says(error: BaseException) -> str:
    """Some say nothing."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _line_of(error: BaseException) -> str | None:
    """Returns the last line that ran of a file which belongs to no library, or None when the call came to none.
    A syntax error says its own."""
    if isinstance(error, SyntaxError):
        return None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path in _CALLERS:
            return None
        if path.is_file() and not frame.filename.startswith(_OTHERS):
            return f"{path.name}, line {frame.lineno}"
    return None


def signature_of(op: str) -> str:
    """As the op is defined, without types: `norm(x, weight, eps)`."""
    return ", ".join(f"{op}{method and '.' + method}{signature}" for method, signature in _signatures(op).items())


def wrong_signature(op: str, implementation: Any) -> str | None:
    """Returns how the op is called where `implementation` cannot be called so, else None."""
    for method, signature in _signatures(op).items():
        called = getattr(implementation, method) if method else implementation
        try:
            own = inspect.signature(called)
        except (TypeError, ValueError):
            continue  # compiled, it does not say
        parameters = signature.parameters.values()
        keywords = {one.name: None for one in parameters if one.kind is one.KEYWORD_ONLY}
        try:
            own.bind(*[None] * (len(parameters) - len(keywords)), **keywords)
        except TypeError as error:
            return f"{error} (the op is {signature_of(op)}, see inferflux/kernels/ops.py)"
    return None


def _signatures(op: str) -> dict[str, inspect.Signature]:
    """Of the op, under "", or of its methods; without types and without self."""
    protocol = getattr(ops, "".join(word.title() for word in op.split("_")) + "Op")
    methods = [name for name in ("pack", "run") if hasattr(protocol, name)]
    return {name: _bare(getattr(protocol, name)) for name in methods} or {"": _bare(protocol.__call__)}


def _bare(method: object) -> inspect.Signature:
    assert callable(method)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])
