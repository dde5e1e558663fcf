"""Streams: hundreds of concurrent streams on the demo model, and how the server answers its probe meanwhile.

    python -m benchmarks.streams --streams 500

Every stream must end with [DONE] and all its tokens; /livez is asked over and over by a process of its own. Writes
benchmarks/results/streams.json unless --out says otherwise, and leaves with 1 when a stream failed.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import live, record
from benchmarks.serving import percentiles

# Asks once, and again every few milliseconds until its standard input ends, then prints the seconds of each answer.
_PROBE = """
import http.client, json, select, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
times = []
while not times or not select.select([sys.stdin], [], [], 0.02)[0]:
    start = time.perf_counter()
    connection.request("GET", "/livez")
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


async def run(num_streams: int, num_tokens: int, config: dict[str, Any]) -> dict[str, Any]:
    async with live.serving(config) as server, live.session() as client:
        probe = subprocess.Popen(
            [sys.executable, "-c", _PROBE, server.url.rpartition(":")[2]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        start = time.perf_counter()
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("streams", total=num_streams)

            async def one(number: int) -> live.Reply:
                body = {
                    "prompt": f"Question {number}: what is InferFlux?",
                    "max_tokens": num_tokens,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                reply = await live.ask(client, server.url, body)
                bar.advance(task)
                return reply

            replies = await asyncio.gather(*map(one, range(num_streams)))
        seconds = time.perf_counter() - start
        probe_times = json.loads(await asyncio.to_thread(lambda: probe.communicate("")[0]))
        samples = await live.settled(client, server.url)
        return {
            "streams": num_streams,
            "tokens_each": num_tokens,
            "failed": [f"{reply.outcome}: {reply.detail}" for reply in replies if reply.outcome != "ok"],
            "short": sum(reply.outcome == "ok" and reply.num_tokens != num_tokens for reply in replies),
            "seconds": round(seconds, 2),
            "output_tok_s": round(sum(reply.num_tokens for reply in replies) / seconds, 1),
            "ttft_s": percentiles([reply.first_s for reply in replies]),
            "end_to_end_s": percentiles([reply.total_s for reply in replies]),
            "livez_s": percentiles(probe_times) | {"max": round(max(probe_times), 4), "asked": len(probe_times)},
            "server_resident_mb": server.resident_mb(),
            "pages_left_in_use": live.total(samples, "inferflux_kv_pages_in_use"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    live.be_nice()
    results = asyncio.run(run(arguments.streams, arguments.tokens, live.configuration()))
    Console().print_json(data=results)
    print(record.write("streams", results, arguments.out))
    sys.exit(1 if results["failed"] or results["short"] else 0)


if __name__ == "__main__":
    main()
