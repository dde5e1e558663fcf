"""YAML: meanings that do not surprise, and files that cannot hurt."""

from pathlib import Path
from typing import Any

import pytest

from inferflux.config.values import InvalidValueError
from inferflux.config.yaml_file import MAX_BYTES, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("'7'", "7"),
        ('"true"', "true"),
        ("|\n a\n b\n", "a\nb\n"),
        ("9" * 5000, "9" * 5000),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("1: 2", {"1": 2}),
    ],
)
def test_meaning(text: str, value: Any) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "a: key given twice (line 3)"),
        ("m: [{k: 1, k: 2}]", "m[0].k: key given twice (line 1)"),
        ("a: !!python/object/apply:os.system [x]", "a: YAML tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !include x", "a: YAML tag !include is not accepted"),
        ("a: !!binary aGk=", "a: YAML tag"),
        ("a: [1", "line 1, column 6: not valid YAML"),
        ("a: *nobody", "line 1, column 4: not valid YAML: found undefined alias"),
        ("--- a\n--- b", "line 2, column 1: not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("? [x]\n: 1", "keys must be plain words (line 1)"),
        ("a: &a [*a]", "nested deeper than 20 levels"),
        ("[" * 50_000, "nested deeper than 20 levels"),
        (bomb(9, 20), "holds more than 100000 values"),
    ],
    ids=lambda text: text[:20],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError) as info:
        parse_yaml(text)
    assert str(info.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#" * (MAX_BYTES + 1), f"must be at most {MAX_BYTES} bytes"),
        (b"a: \xff", "must be UTF-8 text (byte 3 is not)"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=["large", "binary", "absent"],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidValueError) as info:
        read_yaml(path)
    assert str(info.value) == message


def test_folder_and_byte_order_mark(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes("\ufeffa: é".encode())
    assert read_yaml(tmp_path / "c.yaml") == {"a": "é"}
