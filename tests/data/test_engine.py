"""A server writes what the target would write here: the same rows, whatever the server can do, however it fails."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import struct
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from csdraft import MaxGram
from csdraft.data import engine as module
from csdraft.data.engine import KEY, WAYS, Engine, EngineError, checked_url
from csdraft.data.generate import GenerateArguments, generate
from csdraft.data.shards import finished
from tests.data.stand_in import MODEL, StandIn, slow
from tests.data.words import make_target, make_tokenizer, sentence, write_lines
from tests.forked import Forked
from tests.tiny import EOS

ROOT = Path(__file__).parent.parent.parent
ROWS = 24
OTHER_PROMPT = b'{"choices": [{"text": "x", "finish_reason": "stop", "token_ids": [5], "prompt_token_ids": [1]}]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    make_target(folder / "target")
    write_lines(folder / "prompts.jsonl", [{"prompt": sentence(2 + 5 * i % 17, i)} for i in range(ROWS)])
    return folder


@pytest.fixture(scope="module")
def here(folder) -> list[list[int]]:
    """What the target writes here, greedily."""
    return [row["input_ids"] for row in generate(arguments(folder, "here"), MaxGram())]


@pytest.fixture
def server(folder, monkeypatch) -> StandIn:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(GenerateArguments, "load_target", None)  # the weights are on the server
    return StandIn(AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32))


def settings(folder: Path, name: str, **changes: object) -> dict:
    return {
        "target": str(folder / "target"),
        "dataset": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / name),
        "max_new_tokens": 8,
        "sampled": 0,
        "batch_size": 4,
        "threads": 1,
    } | changes


def arguments(folder: Path, name: str, **changes: object) -> GenerateArguments:
    return GenerateArguments(**settings(folder, name, **changes))  # type: ignore[arg-type]


def written(folder: Path, name: str, server: StandIn, **changes: object) -> Any:
    with server.served() as url:
        return generate(arguments(folder, name, engine=url, **changes), None)


@pytest.mark.parametrize(
    ("can", "way"),
    [
        ({}, "token ids in and out"),
        ({"gives_ids": False, "numbers": True}, "token ids in, numbered tokens out"),
        ({"gives_ids": False}, "text in and out"),
        ({"gives_ids": False, "ignores": True}, "text in and out"),
        ({"reads_ids": False}, "text in and out"),
        ({"reads_ids": False, "knows_top_k": False}, "text in and out, with the server's own top_k"),
    ],
)
def test_rows_are_those_that_the_target_writes_here(folder, here, server, tmp_path, capsys, can, way):
    """In the best way that the server can do, which is said."""
    vars(server).update(can)
    rows = written(folder, str(tmp_path / "rows"), server)
    assert [row["input_ids"] for row in rows] == here
    assert f"writes as {MODEL}: {way}\n" in capsys.readouterr().out
    assert any(EOS in ids for ids in here), "no text ends, so nothing is shown of ends"
    assert 2 <= server.most <= 4
    assert server.bodies[-1].keys() >= WAYS[way].keys()


def test_sampled_rows_are_asked_for_as_such(folder, server, tmp_path):
    rows = written(folder, str(tmp_path / "rows"), server, sampled=0.5, temperature=0.7, count=20)
    asked = server.bodies[1:]
    assert sorted(body["temperature"] for body in asked) == [0.0] * 10 + [0.7] * 10
    assert {(body["top_p"], body["top_k"], body["max_tokens"]) for body in asked} == {(1.0, -1, 8)}
    assert len({body["seed"] for body in asked}) == 20
    again = written(folder, str(tmp_path / "again"), server, sampled=0.5, temperature=0.7, count=20)
    assert again["input_ids"][:] == rows["input_ids"][:]


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"out of memory"),
        (429, b""),
        (200, b"<html>"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"text": "w1", "finish_reason": "abort"}]}'),
        (200, b"[1"),
    ],
)
def test_what_fails_for_a_while_is_asked_again(folder, here, server, tmp_path, answer):
    failed: list[dict] = []

    def once(number: int, body: dict) -> Any:
        """Each second prompt's first request fails."""
        if number == 0 or len(body["prompt"]) % 2 or body in failed:
            return None
        failed.append(body)
        return answer

    server.fault = once
    rows = written(folder, str(tmp_path / "rows"), server)
    assert [row["input_ids"] for row in rows] == here
    assert len(server.bodies) == ROWS + 1 + len(failed) > ROWS + 8


WRONG = [
    ((500, b"out of memory"), r"/v1/completions: status 500, 'out of memory'\. Asked 3 times"),
    ((200, b"<html>hello"), r"/v1/completions: no JSON in the answer '<html>hello'"),
    ((200, b'{"error": "x"}'), r"no finished continuation in the answer '{\"error\": \"x\"}'"),
    ((404, b'{"detail": "Not Found"}'), r"/v1/completions: status 404, '{\"detail\": \"Not Found\"}'"),
    ((307, b""), "status 307"),
    (
        (200, b'{"choices": [{"text": "x", "finish_reason": "length", "token_ids": [5, 9999]}]}'),
        r"wrote '9999', and .* has 97 tokens; is another model served there",
    ),
    ((200, OTHER_PROMPT), "has read other tokens than were sent"),
    (
        (200, b'{"choices": [{"text": "x", "finish_reason": "length", "token_ids": [5, 6]}]}'),
        r"wrote 2 of 8 tokens .* context is shorter",
    ),
]
"""Answers that fail for good, and what the error says of them."""
FAILING = [
    pytest.param(*case, after, marks=pytest.mark.slow if (number + bool(after)) % 2 else [])
    for number, case in enumerate(WRONG)
    for after in (0, 9)
]
"""Each at the first request or after some rows, by turns; both if slow."""


@pytest.mark.parametrize(("answer", "says", "after"), FAILING)
def test_what_fails_for_good_is_an_error_that_quotes_the_answer(folder, here, server, tmp_path, answer, says, after):
    """At the first request, or after some rows, which are kept: the same command continues."""
    if after == 0 and "context" in says:
        pytest.skip("the first request asks for one token")
    server.fault = lambda number, body: answer if number >= after else None
    name = str(tmp_path / "rows")
    with pytest.raises(ValueError, match=rf"http://127\.0\.0\.1:\d+.*{says}"):
        written(folder, name, server)
    kept = [row["index"] for row, _ in finished(tmp_path / "rows/parts")]
    assert len(kept) == len(set(kept))
    assert (len(kept) > 0) == (after > 0)
    server.fault = lambda number, body: None
    assert [row["input_ids"] for row in written(folder, name, server)] == here
    assert len(server.bodies) == ROWS - len(kept) + 1


def refusing(*wrong: list[int]) -> Any:
    """A fault: these prompts are too long for the server's context."""
    return lambda number, body: (400, b"maximum context length") if body["prompt"] in wrong else None


def test_rows_that_the_server_refuses_are_left_out_and_counted(folder, here, server, tmp_path, capsys):
    """And not asked for again, until the note of them is removed."""
    prompts = [row["input_ids"][: row["prompt_length"]] for row in generate(arguments(folder, "here"), None)]
    out = [3, 7, 23]
    server.fault = refusing(*(prompts[row] for row in out))
    kept = [ids for row, ids in enumerate(here) if row not in out]
    for requests in (ROWS + 1, 0):
        rows = written(folder, str(tmp_path / "rows"), server)
        assert [row["input_ids"] for row in rows] == kept
        assert rows["index"][:] == [row for row in range(ROWS) if row not in out]
        assert len(server.bodies) == requests
        said = capsys.readouterr().out
        assert "3 of 24 rows are left out: the server refuses their prompts. The first is row 3: http" in said
        assert f"status 400, 'maximum context length'. To ask again, remove {tmp_path / 'rows/refused'}\n" in said
    shutil.rmtree(tmp_path / "rows/refused")
    server.fault = lambda number, body: None
    assert [row["input_ids"] for row in written(folder, str(tmp_path / "rows"), server)] == here
    assert "left out" not in capsys.readouterr().out


def test_a_server_that_refuses_all_of_the_first_rows_is_an_error_at_once(folder, here, server, tmp_path):
    """Its context is too short for the new tokens; nothing is noted of these rows."""
    server.fault = lambda number, body: (400, b"too long") if body["max_tokens"] > 1 else None
    with pytest.raises(ValueError, match=r"status 400, 'too long'\. All of the first rows are refused\. Start the"):
        written(folder, str(tmp_path / "rows"), server)
    assert len(server.bodies) < ROWS
    assert not (tmp_path / "rows/refused").exists()
    server.fault = lambda number, body: None
    assert [row["input_ids"] for row in written(folder, str(tmp_path / "rows"), server)] == here


def test_all_rows_that_are_left_may_be_refused(folder, here, server, tmp_path):
    """When a run continues; those that it has refused before are not asked for again."""
    prompts = [row["input_ids"][: row["prompt_length"]] for row in generate(arguments(folder, "here"), None)]
    server.fault = refusing(prompts[3], *prompts[12:])
    for count, requests in ((12, 13), (ROWS, 13)):
        rows = written(folder, str(tmp_path / "rows"), server, count=count)
        assert rows["input_ids"][:] == here[:3] + here[4:12]
        assert len(server.bodies) == requests


def test_a_silent_server_is_given_up(folder, server, tmp_path):
    server.fault = slow(1.0)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"/v1/completions: Timeout.*Asked 3 times"):
        written(folder, str(tmp_path / "rows"), server, engine_timeout=0.1)
    assert time.monotonic() - begun < 30


def test_a_server_that_is_not_there_is_named(folder, server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match=rf"{url}/v1/models: URLError: .*refused.*Asked 3 times"):
        generate(arguments(folder, str(tmp_path / "rows"), engine=url), None)


def test_the_model_is_the_target(folder, here, server, tmp_path):
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"/v1/models names a, b .*engine_model=NAME"):
        written(folder, str(tmp_path / "rows"), server)
    server.models = ["a", str(folder / "target")]
    rows = written(folder, str(tmp_path / "rows"), server)
    assert server.bodies[-1]["model"] == str(folder / "target")
    written(folder, str(tmp_path / "other"), server, engine_model="b")
    assert server.bodies[-1]["model"] == "b"
    assert [row["input_ids"] for row in rows] == here


def test_a_key_is_sent_and_written_nowhere(folder, server, tmp_path, monkeypatch):
    server.key = "sesame"
    with pytest.raises(ValueError, match=f"401.*put it into {KEY}"):
        written(folder, str(tmp_path / "rows"), server)
    monkeypatch.setenv(KEY, "sesame")
    written(folder, str(tmp_path / "rows"), server)
    assert "sesame" not in (tmp_path / "rows/arguments.json").read_text()
    assert "127.0.0.1" not in (tmp_path / "rows/arguments.json").read_text()


@pytest.mark.parametrize("key", ["sesame\nopen", "sesam€"])
def test_a_key_that_cannot_be_sent_is_not_shown(folder, server, tmp_path, monkeypatch, key):
    """The end of a line behind it does no harm."""
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ValueError, match=f"{KEY} has characters") as error:
        written(folder, str(tmp_path / "rows"), server)
    assert "sesam" not in "".join(traceback.format_exception(error.value))
    server.key = "sesame"
    monkeypatch.setenv(KEY, "sesame\r\n")
    written(folder, str(tmp_path / "rows"), server)


@pytest.mark.parametrize(
    "sent",
    [b"Content-Length: 1000\r\n\r\nabc", b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"],
)
@pytest.mark.parametrize("silent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_error_that_breaks_off_is_asked_again(monkeypatch, sent, silent):
    """What a server says beside its status may be cut short, or never come."""
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.02))
    asked = []

    def answer(listener: socket.socket) -> None:
        for _ in range(3):
            connection, _ = listener.accept()
            asked.append(connection)
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 500 Internal\r\n" + sent)
            if not silent:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(ValueError, match=r"/v1/models: .*Asked 3 times"):
            engine(f"http://127.0.0.1:{listener.getsockname()[1]}").ask("models")
        for connection in asked:
            connection.close()
    assert len(asked) == 3


def engine(url: str) -> Engine:
    return Engine(url, "model", "target", make_tokenizer(), 97, {EOS}, timeout=0.2)


@pytest.mark.parametrize(
    ("way", "choice"),
    [
        *(
            ("token ids in, numbered tokens out", {"logprobs": said})
            for said in ([1], "x", {"tokens": 5}, {"tokens": ["token_id:" + "9" * 5000]})
        ),
        ("text in and out", {"text": "\ud800"}),
    ],
)
def test_a_choice_of_another_form_is_quoted(server, monkeypatch, way, choice):
    server.fault = lambda number, body: (
        200,
        json.dumps({"choices": [{"text": "x", "finish_reason": "stop"} | choice]}).encode(),
    )
    with server.served() as url:
        asks = engine(url)
        asks.way = way
        with pytest.raises(EngineError, match="finish_reason"):
            asks.write([5, 6], 4, 0.0, 0)


@pytest.mark.parametrize("stop", [None, True, 1.0, [1], {}, "x", 99])
def test_a_text_that_stopped_ends_by_a_token(server, stop):
    choice = {"text": "x", "finish_reason": "stop", "token_ids": [5], "stop_reason": stop}
    server.fault = lambda number, body: (200, json.dumps({"choices": [choice]}).encode())
    with server.served() as url:
        asks = engine(url)
        asks.way = "token ids in and out"
        found = asks.write([5, 6], 4, 0.0, 0)
    assert found == [5, EOS]
    assert {type(token) for token in found} == {int}


def test_half_a_character_at_the_end_of_a_text_is_left_out(server):
    """Where the text was cut; one that has ended is as the model wrote it."""
    texts = iter([("w7 w8", "length"), ("w7 w8\ufffd\ufffd", "length"), ("w7 w8\ufffd\ufffd", "stop")])

    def choice() -> dict:
        return dict(zip(("text", "finish_reason"), next(texts), strict=True))

    server.fault = lambda number, body: (200, json.dumps({"choices": [choice()]}).encode())
    with server.served() as url:
        asks = engine(url)
        asks.way = "text in and out"
        whole, cut, ended = (asks.write([5, 6], 9, 0.0, 0) for _ in range(3))
    assert whole == cut != []
    assert ended[:-1] not in (cut, [])


def test_an_answer_that_is_nested_too_deeply_is_none(server):
    server.fault = lambda number, body: (200, b"[" * 200_000)
    with server.served() as url, pytest.raises(EngineError, match="no JSON in the answer"):
        engine(url).ask("completions", {"prompt": [5], "max_tokens": 1})


@pytest.mark.parametrize(
    ("url", "says"),
    [("localhost:8000", "give the server's address"), ("http://me:secret@host/v1", "put a key into"), (3, "address")],
)
def test_addresses_that_are_refused(folder, url, says):
    with pytest.raises(ValueError, match=says) as error:
        arguments(folder, "refused", engine=url)
    assert "secret" not in str(error.value)


def test_addresses():
    assert checked_url("http://host:8000") == checked_url("http://host:8000/v1/") == "http://host:8000/v1"
    assert checked_url("https://host/serve/v1") == "https://host/serve/v1"


@pytest.mark.slow
def test_a_killed_run_continues(folder, here, server, tmp_path):
    """The script itself, killed among its rows; those that it had are not asked for again."""
    server.fault = slow(0.05)
    with server.served() as url:
        options = settings(folder, str(tmp_path / "rows"), engine=url, batch_size=2)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
        process = Forked([str(ROOT / "scripts/generate_data.py"), "--config", str(tmp_path / "run.yaml")])
        part, deadline = tmp_path / "rows/parts/00000.jsonl", time.monotonic() + 180
        try:
            while not (part.exists() and part.read_bytes().count(b"\n") > 4):
                assert process.poll() is None, process.said()
                assert time.monotonic() < deadline, "the script wrote no rows"
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = part.read_bytes()
        time.sleep(0.3)  # the server finishes what it was asked
        before = len(server.bodies)
        rows = generate(GenerateArguments(**options), None)
        assert [row["input_ids"] for row in rows] == here
        assert part.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        assert len(server.bodies) - before == ROWS - kept.count(b"\n") + 1
    assert [json.loads(line)["index"] for line in part.read_bytes().splitlines()] != list(range(ROWS))
