"""registry.yaml is taken whole or refused whole, in words that say what is wrong."""

import pytest

from inferflux.config.registry_file import parse_registry
from inferflux.errors import ConfigError

FULL = """
models:
  - {id: a, path: /models/a, default: true, idle_unload_s: 60}
  - {id: org/b, backend: stub}
"""


def test_a_sound_file():
    a, b = parse_registry(FULL)
    assert (a.id, a.path, a.default, a.idle_unload_s) == ("a", "/models/a", True, 60.0)
    assert (b.id, b.backend) == ("org/b", "stub")
    assert parse_registry("models: []") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "models: is required"),
        ("models:", "models: must be a list"),
        ("models: [{id: a, pa", "line 1, column 20: not valid YAML"),
        ("\0", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("modles: []", 'modles: unknown key; did you mean "models"'),
        ("models: []\nserver: {}", "server: unknown key"),
        ("models: [{id: a, pth: x}]", r'models\[0\]\.pth: unknown key; did you mean "path"'),
        ("models: [{path: x}]", r"models\[0\]\.id: is required"),
        ("models: [{id: a}]", r"models\[0\]\.path: is required, unless backend is stub"),
        ("models: [{id: a, path: x, backend: tpu}]", r"models\[0\]\.backend: must be one of auto, cpu, cuda, stub"),
        ("models: [{id: a, path: x}, {id: a, path: y}]", r"models\[1\]\.id: must be unique"),
        ("models: [{id: a, path: x, id: b}]", "key given twice"),
        (
            "models: [{id: a, path: x, default: true}, {id: b, path: x, default: true}]",
            r"models\[1\]\.default: only one model may be the default",
        ),
    ],
)
def test_what_is_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_registry(text)


def test_a_model_may_not_have_an_adapters_id() -> None:
    with pytest.raises(ConfigError, match=r"^models\[1\]\.id: must not be an adapter's \(got \"b\""):
        parse_registry("models: [{id: a, path: x}, {id: b, path: x}]", {"b"})
