"""How a request's body becomes a struct: strictly, and with an error that names the field.

OpenAI's types are kept to: no booleans as numbers, no numbers as strings, no NaN; 1.0 is an integer (`integers`).
A field that nobody knows is refused, since dropping it would change the answer in silence; one that is known and not
built yet is refused by name, unless its value asks for nothing.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from inferflux.errors import RequestError, did_you_mean
from inferflux.sampling_params import Range
from inferflux.server.http.schemas.accepted import accepted_fields, accepted_values
from inferflux.server.http.schemas.integers import read_integers

T = TypeVar("T", bound=msgspec.Struct)

MAX_NAME_SHOWN = 100
MAX_WORDS_SHOWN = 300
_BYTE = re.compile(r"\(byte (\d+)\)")
_FLOAT = "got `float`"
_PATH = re.compile(r" - at (?:`key` in )?`\$?\.?(.*)`$")
_NAME_BEFORE = re.compile(rb'"([^"\\]{1,100})"\s*:[-\[{,\s\d.]*$')
# The same where the fault lies within a string.
_NAME_BEFORE_STRING = re.compile(rb'"([^"\\]{1,100})"\s*:[\[\s]*"(?:[^"\\]|\\.)*\\?$', re.DOTALL)
_LOOK_BACK_BYTES = 400
# As many as the other half of a surrogate pair takes.
_BLANKS = b" " * len(r"\uDC00")


class BodyReader(Generic[T]):
    """Reads one endpoint's bodies into `kind`.

    unsupported: fields the API has and this server does not: each with the values that ask for nothing (null always
    does). ignored: fields that do not change the answer. ranges: of numbers, and needs: of fields another one that is
    true, as the struct's own `check` has them.
    """

    def __init__(
        self,
        kind: type[T],
        *,
        unsupported: Mapping[str, tuple[Any, ...]] | None = None,
        ignored: Iterable[str] = (),
        ranges: Mapping[str, Range] | None = None,
        needs: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.unsupported = dict(unsupported or {})
        self.ignored = frozenset(ignored)
        self.ranges = dict(ranges or {})
        self.needs = dict(needs or {})
        self._fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._body = msgspec.json.Decoder(kind)
        self._names = frozenset(field.encode_name for field in msgspec.structs.fields(kind))
        self._known = self._names | self.unsupported.keys() | self.ignored

    def read(self, body: bytes) -> T:
        """Raises RequestError: `param` is the path of the field at fault, where there is one."""
        try:
            others = self._fields.decode(body)
            if not others.keys() <= self._names:
                self._check_others(others)
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise _invalid(str(error), self.kind) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _malformed(body, self._placed(body, error)) from None
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None

    def _decode(self, body: bytes) -> T:
        try:
            return self._body.decode(body)
        except msgspec.ValidationError as error:
            if _FLOAT not in str(error):
                raise
            return read_integers(body, self.kind)

    def _placed(self, body: bytes, error: Exception) -> Exception:
        """Of half a surrogate pair right at a body's end msgspec says that the body was cut off; with blanks behind it,
        where the half is."""
        if isinstance(error, UnicodeDecodeError) or _BYTE.search(str(error)):
            return error
        try:
            self._fields.decode(body + _BLANKS)
        except (msgspec.DecodeError, UnicodeDecodeError) as placed:
            return placed
        return error

    def _check_others(self, fields: Mapping[str, msgspec.Raw]) -> None:
        for name in fields.keys() - self._names:
            if name not in self._known:
                shown = name[:MAX_NAME_SHOWN]
                raise RequestError(
                    f"unknown field: {shown}{did_you_mean(shown, self._known)}", param=shown, code="unknown_parameter"
                )
            if name in self.unsupported:
                value = msgspec.json.decode(fields[name])
                if value is not None and not _is_among(value, self.unsupported[name]):
                    raise RequestError(f"{name}: not supported yet", param=name, code="unsupported_parameter")


def _is_among(value: Any, accepted: Iterable[Any]) -> bool:
    """Like `in`, but a boolean is no number."""
    return any(type(value) is type(one) and value == one for one in accepted)


def _invalid(message: str, kind: type[msgspec.Struct]) -> RequestError:
    """From "Expected `int`, got `str` - at `$.n`" to "n: expected int, got str"."""
    found = _PATH.search(message)
    words = _PATH.sub("", message).replace("`", "")[:MAX_WORDS_SHOWN]
    words = words[:1].lower() + words[1:]
    missing = re.fullmatch(r"object missing required field (\w+)", words)
    path = found[1].replace("[...]", "") if found else ""
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"{param}: is required", param=param, code="missing_required_parameter")
    if not path:
        return RequestError(f"the body must be a JSON object: {words}")
    unknown = re.fullmatch(r"object contains unknown field (.*)", words, re.DOTALL)
    if unknown:
        name = unknown[1][:MAX_NAME_SHOWN]
        hint = did_you_mean(name, accepted_fields(kind, path))
        return RequestError(f"{path}.{name}: unknown field{hint}", param=f"{path}.{name}", code="unknown_parameter")
    refused = re.fullmatch(r"invalid (?:enum )?value (.*)", words, re.DOTALL)
    accepted = accepted_values(kind, path) if refused else ()
    if refused and accepted:
        words = f"must be one of {', '.join(accepted)} (got {refused[1]})"
    return RequestError(f"{path}: {words}", param=path, code="invalid_type")


def _malformed(body: bytes, error: Exception) -> RequestError:
    """Names the field whose value is not JSON (NaN, say) or no Unicode text, when the fault has a place."""
    end = _place(body, error)
    if end is not None:
        before = body[max(0, end - _LOOK_BACK_BYTES) : end]
        name = _NAME_BEFORE.search(before) or _NAME_BEFORE_STRING.search(before)
        if name:
            field = name[1].decode("utf-8", "replace")
            return RequestError(f"{field}: is not valid JSON: {error}", param=field, code="invalid_json")
    return RequestError(f"the body is not valid JSON: {error}", code="invalid_json")


def _place(body: bytes, error: Exception) -> int | None:
    """Returns the byte at fault. What is no UTF-8 msgspec places within its string only."""
    if isinstance(error, UnicodeDecodeError):
        try:
            body.decode()
        except UnicodeDecodeError as whole:
            return whole.start
        return None
    found = _BYTE.search(str(error))
    return int(found[1]) if found else None
