"""Open Policy Agent's data API over a real Rego interpreter: `POST /v1/data/PATH` with `{"input": ...}`."""

import json
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from regopy import Interpreter


def rego_service(policy: str) -> TestServer:
    """Returns a service, to be used as an async context. An undefined decision has no `result`, as with OPA."""
    interpreter = Interpreter()
    interpreter.add_module("policy.rego", policy)

    async def decide(request: web.Request) -> web.Response:
        interpreter.set_input_term(json.dumps((await request.json())["input"]))
        reference = ".".join(("data", *request.match_info["path"].split("/")))
        return web.json_response(_result(interpreter, reference))

    app = web.Application()
    app.router.add_post("/v1/data/{path:.+}", decide)
    return TestServer(app)


def _result(interpreter: Interpreter, reference: str) -> dict[str, Any]:
    answer = str(interpreter.query(f"x := {reference}"))
    return {} if answer == "undefined" else {"result": json.loads(answer)["bindings"]["x"]}
