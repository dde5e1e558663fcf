"""CallScanner: one tool call written as a JSON object, read as it comes, in time linear in its length.

`{"name": "f", "arguments": {...}}` in any order of keys, `parameters` for `arguments`. Hands the arguments on as the
text they are, so a stream need not wait for their end; a caller parses them anyway.
"""

import enum
import json
import re
from typing import Any, Final

_SPACE: Final = " \t\r\n"
# Characters that are the value's and change nothing: in a string, and between strings and brackets in brackets.
_IN_STRING: Final = re.compile(r'(?:[^"\\]++|\\.)++', re.DOTALL)
_IN_BRACKETS: Final = re.compile(r"(?:[^\W_]|[,:+\-. \t\r\n])++")
_ARGUMENTS: Final = ("arguments", "parameters")
NO_ARGUMENTS: Final = "{}"


class _State(enum.Enum):
    OBJECT = enum.auto()
    KEY = enum.auto()
    IN_KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    IN_VALUE = enum.auto()
    COMMA = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class CallScanner:
    """One call. name: once it is known. `bare`: the name is known beforehand and the text is the arguments alone."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._bare = name is not None
        self._state = _State.OBJECT if name is None else _State.VALUE
        self._key = "" if name is None else _ARGUMENTS[0]
        self._parts: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._arguments: list[str] = []
        self._has_arguments = False
        self._streams = False

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    @property
    def failed(self) -> bool:
        """It is no call: no JSON object, or one without a name."""
        return self._state is _State.FAILED

    @property
    def begun(self) -> bool:
        """Whether the name is known and the arguments are under way."""
        return self.name is not None and (self._has_arguments or self.done)

    def feed(self, text: str) -> int:
        """Reads on; returns how many characters are the call's (all of them, unless it has ended or failed)."""
        place = 0
        while place < len(text) and not self.done:
            run = self._run(text, place)
            if run is not None:
                self._take(run[0])
                place = run.end()
            elif self._step(text[place]):
                place += 1
            else:
                break
        return place

    def take_arguments(self) -> str:
        """Returns the arguments' text since the last time."""
        taken, self._arguments = "".join(self._arguments), []
        return taken

    def _run(self, text: str, place: int) -> re.Match[str] | None:
        """Returns the characters from `place` on that only add to the key or the value."""
        if self._state not in (_State.IN_KEY, _State.IN_VALUE) or self._escaped:
            return None
        if self._in_string:
            return _IN_STRING.match(text, place)
        return _IN_BRACKETS.match(text, place) if self._depth else None

    def _step(self, character: str) -> bool:
        """Reads one character; returns whether it was the call's."""
        if self._state in (_State.IN_KEY, _State.IN_VALUE):
            return self._inside(character)
        if character in _SPACE:
            return True
        match self._state, character:
            case _State.OBJECT, "{":
                self._state = _State.KEY
            case _State.KEY, '"':
                self._state, self._parts, self._in_string = _State.IN_KEY, ['"'], True
            case _State.COLON, ":":
                self._state = _State.VALUE
            case _State.VALUE, _:
                self._begin_value()
                return self._inside(character)
            case _State.COMMA, ",":
                self._state = _State.KEY
            case ((_State.COMMA | _State.KEY), "}"):
                self._close()
            case _:
                self._state = _State.FAILED
        return not self.failed

    def _begin_value(self) -> None:
        self._state, self._parts, self._depth, self._in_string = _State.IN_VALUE, [], 0, False
        self._streams = self._key in _ARGUMENTS and not self._has_arguments

    def _inside(self, character: str) -> bool:
        """Reads a character of a key or a value."""
        if self._in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self._in_string = False
        elif not self._outside_string(character):
            return not self.failed and self._step(character)
        self._take(character)
        if not self._in_string and self._depth == 0 and character in '"]}':
            self._end_text()
        return not self.failed

    def _outside_string(self, character: str) -> bool:
        """Reads a character that is in no string; returns False when it is not the value's any more, or wrong."""
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "]}" and self._depth > 0:
            self._depth -= 1
        elif self._depth == 0 and (character in _SPACE or character in ",]}"):
            self._end_text()
            return False
        elif character not in _SPACE and not (character.isalnum() or character in ",:+-."):
            self._state = _State.FAILED
            return False
        return True

    def _take(self, characters: str) -> None:
        self._parts.append(characters)
        if self._state is _State.IN_VALUE and self._streams and self._parts[0] == "{":
            self._has_arguments = True
            self._arguments.append(characters)

    def _end_text(self) -> None:
        """A key or a value is complete."""
        text = "".join(self._parts)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            # Arguments that are not quite JSON are the caller's to judge; anything else is no call.
            value = None
            if not (self._state is _State.IN_VALUE and self._streams and text[:1] == "{"):
                self._state = _State.FAILED
                return
        if self._state is _State.IN_KEY:
            self._key, self._state = value, _State.COLON
            return
        self._note(value, text)
        if self._bare:
            self._close()
        elif not self.failed:
            self._state = _State.COMMA

    def _note(self, value: Any, text: str) -> None:
        if self._key == "name" and self.name is None:
            self.name = value if isinstance(value, str) else None
            if not self.name:
                self._state = _State.FAILED
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            self._arguments.append(value if isinstance(value, str) else NO_ARGUMENTS if value is None else text)

    def _close(self) -> None:
        if self.name is None:
            self._state = _State.FAILED
            return
        if not self._has_arguments:
            self._arguments, self._has_arguments = [NO_ARGUMENTS], True
        self._state = _State.DONE
