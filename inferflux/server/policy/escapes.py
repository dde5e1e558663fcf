"""JSON's escapes, undone character by character as a text is written: how its strings will read to whoever parses it.

What only looks like an escape stays as it is. RFC 8259, section 7. Knows no blocklist.
"""

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Final

_BACKSLASH: Final = "\\"
_SHORT: Final = MappingProxyType(dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True)))
_HIGH: Final = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_WHOLE: Final = re.compile(rf'\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{{4}}|{_HIGH}\\u[dD][c-fC-F][0-9a-fA-F]{{2}}')
_BEGUN: Final = re.compile(rf"\\(u[0-9a-fA-F]{{0,3}})?|{_HIGH}(\\(u([dD]([c-fC-F][0-9a-fA-F]?)?)?)?)?")


class Unescaper:
    """One text's state. num_held: how many of the last characters may be part of an escape."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    @property
    def num_held(self) -> int:
        return len(self._held)

    def feed(self, character: str, place: int) -> Iterator[tuple[str, int]]:
        """Takes the character at `place`; yields what can be read now, each with the place where it begins."""
        if not self._held and character != _BACKSLASH:
            yield character, place
            return
        self._held += character
        if _WHOLE.fullmatch(self._held):
            held, self._held = self._held, ""
            yield _read(held), place - len(held) + 1
        elif not _BEGUN.fullmatch(self._held):
            yield from self._give_up(place)

    def finish(self, end: int) -> Iterator[tuple[str, int]]:
        """Takes the text's end, at the place `end`."""
        while self._held:
            yield from self._give_up(end - 1)

    def _give_up(self, last: int) -> Iterator[tuple[str, int]]:
        """What is held is no escape (or half a pair, which stands alone): its rest may begin another one."""
        held, self._held = self._held, ""
        first = last - len(held) + 1
        length = 6 if re.match(_HIGH, held) else 1
        yield _read(held[:length]), first
        for offset, character in enumerate(held[length:], first + length):
            yield from self.feed(character, offset)


def _read(escape: str) -> str:
    """Returns the character that an escape stands for; the text itself when it is none."""
    if escape[1:] in _SHORT:
        return _SHORT[escape[1:]]
    if len(escape) == 1:
        return escape
    units = [int(part, 16) for part in escape.split("\\u")[1:]]
    if len(units) == 2:
        return chr(0x10000 + ((units[0] & 0x3FF) << 10) + (units[1] & 0x3FF))
    return chr(units[0])
