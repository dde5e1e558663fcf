"""The documentation keeps up: every configuration key, variable, route, metric and command is named in docs/."""

import re
from pathlib import Path

from inferflux.cli import COMMANDS
from inferflux.config.env import SHORT_NAMES
from inferflux.config.load import check_servable, load_config
from inferflux.config.reference import markdown
from inferflux.config.schema import format_key, schema_leaves
from inferflux.ctl.admin.areas import AREAS
from inferflux.server.http.routes import ROUTES
from tests.support.http_server import OPEN, running_server

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


def test_every_route_is_documented() -> None:
    docs = read_docs()
    paths = {route.path.replace(":.+}", "}") for route in ROUTES if route.path != "/ui/{file}"}
    assert {path for path in paths if path not in docs} == set()


def test_every_area_of_inferctl_is_documented() -> None:
    docs = read_docs()
    assert [name for name in AREAS if f"inferctl admin {name}" not in docs] == []


async def test_metrics_page_is_complete() -> None:
    async with running_server(OPEN) as site, site.session.get(site.url + "/metrics") as response:
        exposed = set(re.findall(r"^# TYPE (\w+)", await response.text(), re.MULTILINE))
    listed = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "Metrics.md").read_text(), re.MULTILINE))
    assert listed == exposed


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_sample_configurations_are_valid() -> None:
    for path in sorted((ROOT / "config").glob("*.yaml")):
        load_config(path, {}, {})
    check_servable(load_config(ROOT / "config" / "server.yaml", {}, {}))


def test_every_file_at_the_engines_root_is_in_the_developer_guide() -> None:
    """A newcomer finds there what each is for."""
    guide = (ROOT / "docs" / "DeveloperGuide.md").read_text()
    names = [path.name for path in (ROOT / "inferflux" / "engine").glob("[!_]*.py")]
    assert [name for name in sorted(names) if f"`{name}`" not in guide] == []
