"""A server on the loopback that answers as OpenAI-compatible engines do, with a tiny target and faults of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.data.words import make_tokenizer
from tests.tiny import EOS

MODEL = "org/target"


class StandIn:
    """What the server does; tests set its attributes.

    Attributes:
        reads_ids, gives_ids, numbers, knows_top_k: what it understands. It refuses lists and keys beyond that.
        ignores: whether it ignores such keys instead.
        fault: called with the number of each request for a text, and the request; what it returns is sent instead, if
            it is not None.
        bodies: what was asked since it was last started.
        most: requests that were in work at once.
    """

    def __init__(self, target: Any):
        self.target, self.tokenizer, self.lock = target, make_tokenizer(), threading.Lock()
        self.reads_ids = self.gives_ids = self.knows_top_k = True
        self.numbers = self.ignores = False
        self.models = [MODEL]
        self.key: str | None = None
        self.fault: Callable[[int, dict], tuple[int, bytes] | None] = lambda number, body: None
        self.bodies: list[dict] = []
        self.working, self.most = 0, 0

    def complete(self, body: dict, bodies: list[dict]) -> tuple[int, bytes]:
        with self.lock:
            number, self.working = len(bodies), self.working + 1
            bodies.append(body)
            self.most = max(self.most, self.working)
        try:
            if (answer := self.fault(number, body)) is not None:
                return answer
            for key, known in (
                ("top_k", self.knows_top_k),
                ("return_token_ids", self.gives_ids),
                ("return_tokens_as_token_ids", self.numbers),
            ):
                if key in body and not known and not self.ignores:
                    return 400, json.dumps({"error": {"message": f"unknown key {key}"}}).encode()
            if isinstance(body["prompt"], list) and not self.reads_ids:
                return 422, b'{"detail": "prompt must be a string"}'
            return 200, json.dumps(self.answer(body)).encode()
        finally:
            with self.lock:
                self.working -= 1

    def answer(self, body: dict) -> dict:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        with self.lock, torch.no_grad():
            torch.manual_seed(body["seed"])
            sampled = body["temperature"] > 0
            how = {"temperature": body["temperature"], "top_k": 0} if sampled else {}
            output = self.target.generate(
                torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=sampled, **how
            )
        new = output[0, len(ids) :].tolist()
        choice: dict[str, Any] = {
            "index": 0,
            "text": " " + self.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if EOS in new else "length",
            "stop_reason": None,
        }
        if body.get("return_token_ids") and self.gives_ids:
            choice |= {"token_ids": new, "prompt_token_ids": ids}
        if body.get("return_tokens_as_token_ids") and self.numbers:
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in new]}
        return {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address."""
        stand_in, self.bodies = self, (bodies := [])

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                data = [{"id": name} for name in stand_in.models]
                self.reply(200, json.dumps({"data": data}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stand_in.key and self.headers["Authorization"] != f"Bearer {stand_in.key}":
                    self.reply(401, b'{"error": "no key"}')
                    return
                with suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
                    self.reply(*stand_in.complete(body, bodies))

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def slow(seconds: float) -> Callable[[int, dict], None]:
    return lambda number, body: time.sleep(seconds)
