"""A server that speaks OpenAI's protocol and misbehaves by a seeded schedule; it writes down each request that it answered, at once.

    python tests/data_pipeline/rephrase_server.py --log answered.jsonl --faults 0.3 --seed 1

Its port is the first line that it prints. The text of an answer is a function of the request's last message.
"""

import argparse
import asyncio
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from aiohttp import web

FAULTS = ("429", "500", "503", "hang", "close", "no_choices", "null_content", "wrong_model", "not_json", "slow")


def answer_to(message: str) -> str:
    """What it says."""
    return f"In other words: {' '.join(reversed(message.split()))}"


class Server:
    """The schedule is by request and how often it was asked, so that no order of arrival changes it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.asked: dict[str, int] = {}
        self.kinds = options.kinds.split(",") if options.kinds else FAULTS
        self.at_once = self.most_at_once = 0
        self.places = asyncio.Semaphore(options.places) if options.places else None

    def fault(self, body: str) -> str:
        """Which fault, if any, this asking of a request meets."""
        mark = hashlib.sha256(body.encode()).hexdigest()[:12]
        self.asked[mark] = self.asked.get(mark, 0) + 1
        draw = random.Random(f"{self.options.seed}{mark}{self.asked[mark]}")
        if self.asked[mark] > self.options.most_faults or draw.random() >= self.options.faults:
            return ""
        return draw.choice(self.kinds)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """One completion, or a fault in its place."""
        raw = await request.text()
        body: dict[str, Any] = json.loads(raw)
        if self.options.key and request.headers.get("authorization") != f"Bearer {self.options.key}":
            return web.json_response({"error": {"message": f"no such key: {request.headers.get('authorization')}"}}, status=401)
        message = body["messages"][-1]["content"]
        if "TOO LONG" in message:
            return web.json_response({"error": {"message": "maximum context length exceeded"}}, status=400)
        fault = self.fault(raw) if self.options.only in message else ""
        if fault.isdigit():
            return web.json_response({"error": fault}, status=int(fault), headers={"retry-after": "0.05"} if fault == "429" else {})
        if fault == "hang":
            await asyncio.sleep(3600)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.places is not None:
                async with self.places:
                    await asyncio.sleep(self.options.seconds)
            elif self.options.seconds:
                await asyncio.sleep(self.options.seconds)
        finally:
            self.at_once -= 1
        said = {
            "model": "another" if fault == "wrong_model" else body["model"],
            "choices": [] if fault == "no_choices" else [{"message": {"content": None if fault == "null_content" else answer_to(message)}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(message.split()), "completion_tokens": len(message.split()) + 3},
        }  # fmt: skip
        text = json.dumps(said)
        if fault == "not_json":
            return web.Response(text=text[:-5], content_type="application/json")
        if fault in ("close", "slow"):
            response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(text.encode()))})
            await response.prepare(request)
            await response.write(text.encode()[:20])
            if fault == "close":
                assert request.transport is not None
                request.transport.abort()
                return response
            await asyncio.sleep(0.05)
            await response.write(text.encode()[20:])
            self.note(message, fault)
            return response
        if fault in ("", "slow"):
            self.note(message, fault)
        return web.Response(text=text, content_type="application/json")

    def note(self, message: str, fault: str) -> None:
        """Write down a request that is being answered well."""
        if self.options.log:
            with self.options.log.open("a") as log:
                log.write(json.dumps({"message": message, "fault": fault}) + "\n")

    async def counts(self, request: web.Request) -> web.Response:
        """What it has seen."""
        return web.json_response({"requests": sum(self.asked.values()), "most_at_once": self.most_at_once})


async def serve(options: argparse.Namespace) -> None:
    """Until it is killed."""
    server, app = Server(options), web.Application()
    app.add_routes([web.post("/v1/chat/completions", server.complete), web.get("/counts", server.counts)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.sleep(1e9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of askings that meet one")
    parser.add_argument("--kinds", default="", help="of faults, with commas between them; all of them without it")
    parser.add_argument("--only", default="", help="messages that hold this meet faults")
    parser.add_argument("--most-faults", type=int, default=4, help="of one request; then it is answered")
    parser.add_argument("--seconds", type=float, default=0.0, help="that a completion takes")
    parser.add_argument("--places", type=int, default=0, help="completions at once; others wait")
    parser.add_argument("--key", default="")
    asyncio.run(serve(parser.parse_args()))
