"""The official OpenAI SDK for Node understands every answer. Skipped where there is no npm or no package registry."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.http.test_tools import CITY, REPLIES
from tests.support.fake_engine import EMBEDDING_SIZE
from tests.support.http_server import KEY, KEYED, MODEL, running_server
from tests.support.templates import bundle

SOURCE = Path(__file__).parent.parent / "node"
INSTALL = ("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0", "--fetch-timeout=20000")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the script and the SDK it needs."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in SOURCE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    try:
        done = subprocess.run(INSTALL, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm cannot reach a package registry in time")
    if done.returncode != 0:
        pytest.skip(f"npm cannot install the SDK: {done.stderr.strip()[-200:]}")
    return folder


async def test_the_node_sdk_understands_every_answer(installed: Path) -> None:
    async with running_server(KEYED, text=bundle()) as site:
        site.engine.reply = REPLIES["hermes"]
        process = await asyncio.create_subprocess_exec(
            "node", "check.mjs", f"{site.url}/v1", KEY, MODEL, cwd=installed, stdout=-1, stderr=-1
        )
        out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    told = json.loads(out)
    assert told["whole"] == {
        "content": "So.",
        "calls": [["weather", CITY], ["now", "{}"]],
        "finish_reason": "tool_calls",
    }
    assert told["streamed"] == told["whole"]
    assert told["usage"]
    assert told["embeddings"] == [EMBEDDING_SIZE, EMBEDDING_SIZE]
    assert told["shaped"] == "stop"
    assert told["models"] == [MODEL]
    assert told["refused"] == {"name": "BadRequestError", "param": "temperature"}
    assert told["missing"] == {"name": "NotFoundError", "code": "model_not_found"}
