"""A server that is gone, refuses, or is something else than vLLM is one line that says what to do."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from matrix_llm.base import vllm_server as module
from matrix_llm.base.errors import EvalError
from matrix_llm.base.vllm_server import VLLMServer
from tests.support.engines import free_port

INFO = {"vllm_config": {"model_config": {"model": "m", "dtype": "torch.bfloat16", "max_model_len": 64}}}
VLLM = {"/server_info?config_format=json": INFO, "/weight_info": {"weight_version": "default"}}


@contextmanager
def serving(answers):
    """A server with these answers by path: an object, or (status, content, headers); all it was asked is in `asked`."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            found = answers.get(self.path, (404, b"", {}))
            status, content, headers = found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_server_serves():
    with serving(VLLM) as (address, _):
        expected = {"model": "m", "dtype": "bfloat16", "max_model_len": 64}
        assert VLLMServer(address).describe() == expected
        assert VLLMServer(f"{address}/v1/").describe() == expected  # the form of OpenAI's clients


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, b"", {}), "VLLM_SERVER_DEV_MODE=1"),
        ((401, b"", {}), "VLLM_API_KEY"),
        ((500, b'{"error": {"message": "no\\nmemory"}}', {}), r"refuses /server_info.*\(500\): no memory"),
        ((500, b"[]", {}), r"refuses.*\(500\)"),
        ((302, b"", {"Location": "/elsewhere"}), r"refuses.*\(302\)"),
        ((200, b"<html>", {}), "does not answer as vLLM"),
        ((200, b"[" * 100_000, {}), "does not answer as vLLM"),
        ((200, b"", {"Content-Length": "999"}), "does not answer as vLLM"),
        ({"vllm_config": []}, "does not answer as vLLM"),
        ({"vllm_config": {"model_config": {"model": 1, "dtype": "x", "max_model_len": 1}}}, "does not answer as vLLM"),
    ],
)
def test_an_answer_that_is_not_vllms_is_one_line(answer, words):
    answers = {**VLLM, "/elsewhere": INFO, "/server_info?config_format=json": answer}
    with serving(answers) as (address, _), pytest.raises(EvalError, match=words) as error:
        VLLMServer(address).describe()
    assert "\n" not in str(error.value)


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_LIMIT", 10)
    with serving(VLLM) as (address, _), pytest.raises(EvalError, match="does not answer as vLLM"):
        VLLMServer(address).describe()


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(EvalError, match=r"cannot be reached: .*Start it \(VLLM_SERVER_DEV_MODE=1"):
        VLLMServer(f"http://127.0.0.1:{free_port()}").describe()


def test_token_ids_are_checked():
    for ids in (["5"], [True], [-1], None, "567"):
        with serving({**VLLM, "/tokenize": {"tokens": ids}}) as (address, _), pytest.raises(EvalError):
            VLLMServer(address).tokenize("x", special_tokens=False)


def test_the_key_of_the_server_is_sent(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with serving(VLLM) as (address, asked):
        VLLMServer(address).describe()
    assert asked[0] == ("/server_info?config_format=json", "Bearer secret")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://me:secret@host:8000", "VLLM_API_KEY"),
        ("http://", "http://HOST:PORT"),
        ("http://host:port", "http://HOST:PORT"),
        ("http://host:8000 x", "http://HOST:PORT"),
        ("http://host:8000/?a=1", "remove what follows"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(address, words):
    with pytest.raises(EvalError, match=words):
        VLLMServer(address)
