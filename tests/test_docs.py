"""The documentation keeps up: every configuration key, variable and command is named in docs/."""

from pathlib import Path

from inferflux.cli import COMMANDS
from inferflux.config.env import SHORT_NAMES
from inferflux.config.load import check_servable, load_config
from inferflux.config.reference import markdown
from inferflux.config.schema import format_key, schema_leaves

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "ConfigReference.md"


def read_docs() -> str:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(page.read_text() for page in pages if page.exists())


def test_config_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == markdown(), "run: python -m inferflux.config.reference > docs/ConfigReference.md"


def test_every_key_and_variable_is_documented() -> None:
    docs = read_docs()
    names = [format_key(key) for key, _ in schema_leaves()] + list(SHORT_NAMES)
    assert [name for name in names if f"`{name}`" not in docs] == []


def test_every_command_is_documented() -> None:
    docs = read_docs()
    assert [name for name in COMMANDS if f"inferflux {name}" not in docs] == []


def test_sample_configurations_are_valid() -> None:
    for path in sorted((ROOT / "config").glob("*.yaml")):
        load_config(path, {}, {})
    check_servable(load_config(ROOT / "config" / "server.yaml", {}, {}))
