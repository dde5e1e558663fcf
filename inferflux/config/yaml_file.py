"""Reads one YAML file into plain data: mappings with string keys, lists, strings, numbers, booleans, null.

Safe against hostile files: bounded in bytes, values and depth, no tags, no key twice. Plain scalars mean what YAML
1.2 says (`off`, `yes` and 010 are text, text and ten), because YAML 1.1's readings surprise people. Knows no keys.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from inferflux.config.schema import Key
from inferflux.config.values import InvalidValueError

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 20

_STRING_TAG: Final = "tag:yaml.org,2002:str"
_WORDS: Final = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER: Final = re.compile(r"[-+]?[0-9]{1,30}")
_PREFIXED: Final = re.compile(r"0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """Leaves every plain scalar a string, which `_scalar` resolves; gives up early on deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (read by PyYAML, never changed)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InvalidValueError((), f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(path: Path) -> Any:
    """Returns the file's one document; None for an empty one.

    Raises InvalidValueError (with an empty key where the whole file is at fault) when it cannot be read or is refused.
    """
    return parse_yaml(read_text(path))


def parse_yaml(text: str) -> Any:
    """As `read_yaml`, from text."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidValueError((), f"{place}not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise InvalidValueError((), f"not valid YAML: {error.reason} at character {error.position}") from None
    return None if node is None else _Builder().build(node, ())


class _Builder:
    """Turns YAML nodes into plain data, counting values so that aliases cannot multiply without end."""

    def __init__(self) -> None:
        self._num_values = 0

    def build(self, node: yaml.Node, key: Key) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise InvalidValueError((), f"holds more than {MAX_VALUES} values")
        if len(key) > MAX_DEPTH:
            raise InvalidValueError((), f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.ScalarNode) and node.tag == _STRING_TAG:
            return node.value if node.style else _scalar(node.value)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.build(item, (*key, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._build_mapping(node, key)
        raise InvalidValueError(key, f"YAML tag {node.tag} is not accepted; write a plain value")

    def _build_mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise InvalidValueError(key, f"keys must be plain words (line {line})")
            if name.value in mapping:
                raise InvalidValueError((*key, name.value), f"key given twice (line {line})")
            mapping[name.value] = self.build(value, (*key, name.value))
        return mapping


def _scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan")) if len(text) < 400 else text
    return text


def read_text(path: Path) -> str:
    """Returns a file's text, at most MAX_BYTES of it. Raises InvalidValueError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidValueError((), f"cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise InvalidValueError((), f"must be at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValueError((), f"must be UTF-8 text (byte {error.start} is not)") from None
