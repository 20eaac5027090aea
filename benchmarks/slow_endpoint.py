"""A chat endpoint that takes its time: every request is answered after a fixed latency, as many at once as come.

    python benchmarks/slow_endpoint.py --latency-s 2 --log timeline.jsonl

Prints its base URL first. It marks the middle segment of whatever it is sent; what it costs the machine is the cost of
HTTP, as a remote server would have it. The log has one line a request: when it came, and when it was answered, in
seconds of `time.time`.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web


def annotation(body: dict[str, Any]) -> str:
    """The reply of an annotator that marks one segment in the middle."""
    document = json.loads(body["messages"][-1]["content"])
    middle = (document["num_segments"] + 1) // 2
    schema = body["response_format"]["json_schema"]["schema"]["properties"]
    name = schema["spans"]["items"]["properties"]["type"]["enum"][0]
    return json.dumps({"spans": [{"start": middle, "end": middle, "type": name, "importance": 3}], "reflection": ""})


async def serve(latency_s: float, log: Path) -> None:
    """Answer until the process is ended."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        came = time.time()
        text = annotation(await request.json())
        await asyncio.sleep(latency_s)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"came": came, "answered": time.time()}) + "\n")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 500, "completion_tokens": 30}})

    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


def main(
    log: Annotated[Path, typer.Option(help="File that gets one line a request.")],
    latency_s: Annotated[float, typer.Option(min=0, help="Seconds from a request to its answer.")] = 2.0,
) -> None:
    """Serve on a free port of this machine."""
    asyncio.run(serve(latency_s, log))


if __name__ == "__main__":
    typer.run(main)
