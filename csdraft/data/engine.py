"""A target on a server: an OpenAI-compatible engine (vLLM, SGLang, llama.cpp, ...) continues prompts.

Token ids are sent and received if the server supports it; otherwise text is, and the target's tokenizer turns it into
tokens. `WAYS` are tried in order on one token, and the first that the server accepts is used for all rows. A request
that fails is sent again a few times, after growing pauses; a request that the server refuses is an error at once, and
`Refused` if another prompt may be accepted. Errors name the URL and quote the answer.
"""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from typing import Any
from urllib.parse import urlsplit

from csdraft.data.messages import is_broken

__all__ = ["KEY", "Engine", "EngineError", "Refused", "checked_url", "each", "up_to_end"]

KEY = "OPENAI_API_KEY"
"""The environment variable with the server's key, if it needs one. The key is never written anywhere."""
PAUSES = (1, 2, 4, 8, 16, 30)
"""Seconds before each further attempt at a failed request."""
BUSY = (408, 409, 425, 429)
"""Statuses of temporary failures, besides all from 500 on."""
REFUSALS = (400, 413, 422)
"""Statuses of a request that is wrong in itself, such as a prompt that is longer than the server's context."""
LONGEST_ANSWER, QUOTED = 1 << 26, 300
"""Bytes of an answer that are read, and characters of it that messages quote."""
NUMBERED = re.compile(r"(?:token_id:)?(\d{1,18})")
"""A token whose name is its id."""
TAIL = 8
"""The last tokens of a prompt that may affect how its continuation is split into tokens."""
WAYS = {
    "token ids in and out": {"return_token_ids": True, "top_k": -1},  # vLLM from 0.10.2 on
    "token ids in, numbered tokens out": {"return_tokens_as_token_ids": True, "logprobs": 1, "top_k": -1},
    "text in and out": {"top_k": -1},
    "text in and out, with the server's own top_k": {},
}
"""Ways to ask, with the keys that each adds to a request. In the last way the server may sample differently."""


class EngineError(ValueError):
    """A server's answer is not a continuation by the target."""


class Unanswered(EngineError):
    """The server cannot answer a request, or not in this way."""


class Refused(Unanswered):
    """The server refuses this request; it may answer others."""


class Failed(Exception):
    """A request failed that may succeed if it is sent again."""


class _Direct(urllib.request.HTTPErrorProcessor):
    """Returns answers of every status. So it follows no redirect, which would send the key to another server."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def checked_url(url: str) -> str:
    """The address to which `/completions` is appended; ValueError if `url` is not a server's address."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"engine={url!r}: give the server's address, such as http://localhost:8000/v1")
    if parts.username is not None:
        raise ValueError(f"engine={parts.hostname!r} with a name or password in its address; put a key into {KEY}")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def up_to_end(text: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first end-of-text token, which is included."""
    last = next((place for place, token in enumerate(text) if token in ends), len(text))
    return text[: last + 1]


@dataclass
class Engine:
    """A server and a model on it.

    Args:
        url: see `checked_url`.
        model: the model's name on the server; None if it is the only one there, or called `target`.
        timeout: seconds without an answer after which a request has failed.
    """

    url: str
    model: str | None
    target: str
    tokenizer: Any
    vocab: int
    ends: set[int]
    timeout: float = 600.0
    way: str = ""

    def __post_init__(self) -> None:
        self.url, self.stopped = checked_url(self.url), threading.Event()

    def open(self, prompt: Sequence[int]) -> str:
        """Finds the model's name, and a way to ask that works for this prompt; returns both in a sentence."""
        if self.model is None:
            served = self.ask("models")
            try:
                known = [str(model["id"]) for model in served["data"]]
            except (KeyError, TypeError):
                known = []
            if not known or (len(known) > 1 and self.target not in known):
                raise EngineError(
                    f"{self.url}/models names {', '.join(known) or 'no model'} ({_quoted(served)}); say which one is "
                    f"{self.target} by engine_model=NAME"
                )
            self.model = self.target if self.target in known else known[0]
        refusals = []
        for way in WAYS:
            self.way = way
            try:
                self.write(prompt, 1, 0.0, 0)
            except Unanswered as error:
                refusals.append(f"{way}: {error}")
            else:
                return f"{self.url} writes as {self.model}: {way}"
        raise EngineError(f"{self.url} cannot write for {self.target}. " + "; ".join(refusals))

    def write(self, prompt: Sequence[int], new_tokens: int, temperature: float, seed: int) -> list[int]:
        """At most `new_tokens` tokens after a prompt, with the end-of-text token; temperature 0 is greedy."""
        in_tokens = not self.way.startswith("text")
        body = {
            "model": self.model,
            "prompt": list(prompt) if in_tokens else self._text_of(prompt),
            "max_tokens": new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "seed": seed,
        }
        choice = self.ask("completions", body | WAYS[self.way], _continuation)
        text, cut = choice["text"], choice["finish_reason"] == "length"  # perhaps within a character
        text = text.rstrip("\ufffd") if cut else text
        ids = self._ids_of(choice) if in_tokens else self._tokens_of(text, prompt)
        read = choice.get("prompt_token_ids")
        if in_tokens and read is not None and read != list(prompt):
            raise EngineError(f"{self.url}/completions has read other tokens than were sent: {_quoted(read)}")
        if choice["finish_reason"] == "stop" and not self.ends.intersection(ids):
            stop = choice.get("stop_reason")
            stop = stop if type(stop) is int and stop in self.ends else self.tokenizer.eos_token_id
            ids += [] if stop is None else [stop]
        elif cut and in_tokens and len(ids) < new_tokens:
            raise EngineError(
                f"{self.url}/completions wrote {len(ids)} of {new_tokens} tokens after {len(prompt)}: the server's "
                "context is shorter; start it with a longer one (vLLM: --max-model-len), or lower max_new_tokens"
            )
        return up_to_end(ids, self.ends)[:new_tokens]

    def _ids_of(self, choice: Mapping[str, Any]) -> list[int]:
        found = choice.get("token_ids")
        if "logprobs" in WAYS[self.way]:
            try:
                found = [int(NUMBERED.fullmatch(name)[1]) for name in choice["logprobs"]["tokens"]]  # type: ignore[index]
            except (KeyError, TypeError):
                found = None
        if not isinstance(found, list) or not found:
            raise Unanswered(f"{self.url}/completions sent no token ids: {_quoted(choice)}")
        if wrong := [token for token in found if type(token) is not int or not 0 <= token < self.vocab]:
            raise EngineError(
                f"{self.url}/completions wrote {_quoted(wrong[0])}, and {self.target} has {self.vocab} tokens; is "
                "another model served there? Say which by engine_model=NAME"
            )
        return list(found)

    def _text_of(self, prompt: Sequence[int]) -> str:
        """A prompt as text, without a begin-of-text token that the server's tokenizer will add."""
        opens = prompt[:1] == [self.tokenizer.bos_token_id] and self.tokenizer("")["input_ids"][:1] == prompt[:1]
        return self.tokenizer.decode(prompt[1:] if opens else prompt, clean_up_tokenization_spaces=False)

    def _tokens_of(self, text: str, prompt: Sequence[int]) -> list[int]:
        """A text's tokens, split as they are after this prompt."""
        before = self.tokenizer.decode(prompt[-TAIL:], clean_up_tokenization_spaces=False)
        start, whole = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, before + text))
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # Requests.

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, read: Callable[[Any], Any] = lambda answer: answer
    ) -> Any:
        """What `read` makes of the server's answer, after as many attempts as `PAUSES` allows.

        Args:
            read: raises Failed if it cannot use an answer.
        """
        where = f"{self.url}/{path}"
        for pause in (*PAUSES, None):
            try:
                return read(self._once(where, body))
            except Failed as error:
                if pause is None or self.stopped.wait(pause):
                    raise Unanswered(
                        f"{where}: {error}. Asked {1 + len(PAUSES)} times; see the server's log. Rows that are "
                        "written are kept: the same command continues"
                    ) from error

    def _once(self, where: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise EngineError(f"{KEY} has characters that no key has, such as the end of a line; set it again")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(where, None if body is None else json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(_Direct).open(request, timeout=self.timeout) as response:
                content = response.read(LONGEST_ANSWER).decode(errors="replace")
        except (OSError, HTTPException) as error:  # among them URLError and timeouts
            raise Failed(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error
        said = f"status {response.status}, {_quoted(content)}"
        if response.status in BUSY or response.status >= 500:
            raise Failed(said)
        if response.status != 200:
            advice = f" It needs a key: put it into {KEY}." if response.status in (401, 403) else ""
            raise (Refused if response.status in REFUSALS else Unanswered)(f"{where}: {said}.{advice}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Failed(f"no JSON in the answer {_quoted(content)}") from error


def _continuation(answer: Any) -> dict[str, Any]:
    """The one finished continuation in an answer, with the prompt's token ids if there are any; else raises Failed."""
    try:
        (choice,) = answer["choices"]
        if choice["finish_reason"] in ("stop", "length") and not is_broken(choice["text"]):
            return {"prompt_token_ids": answer.get("prompt_token_ids"), **choice}
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise Failed(f"no finished continuation in the answer {_quoted(answer)}")


def _quoted(answer: Any) -> str:
    """The beginning of an answer, on one line."""
    text = " ".join((answer if isinstance(answer, str) else json.dumps(answer)).split())
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


def each(
    work: Callable[[Any], Any], items: Collection[Any], at_once: int, stopped: threading.Event
) -> Iterator[tuple[Any, Any]]:
    """Each item with the result of `work`, in the order in which they finish; stops at the first error.

    The threads are daemons, so a server that does not answer cannot keep the process alive.

    Args:
        at_once: number of threads.
        stopped: set at the end, so that `work` can stop waiting.
    """
    pool = ThreadPool(max(min(at_once, len(items)), 1))
    try:
        yield from pool.imap_unordered(lambda item: (item, work(item)), items)
    finally:
        stopped.set()
        pool.terminate()
