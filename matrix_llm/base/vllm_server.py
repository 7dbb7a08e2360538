"""A running vLLM server: `vllm serve MODEL`, started with VLLM_SERVER_DEV_MODE=1 so that its weights can be replaced.

The server reads the weights itself, from a folder that it must see under the same path. VLLM_API_KEY in this process's
environment is sent as the server's key.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"
ANSWER_LIMIT = 2**26  # bytes; an answer holds one response of a model at most
SHORT, LONG = 20.0, 900.0  # seconds to wait for an answer: a question, and weights or a response
KEY = "VLLM_API_KEY"  # the variable from which vLLM's own server reads it


def is_server(engine: str) -> bool:
    """Whether the name of an engine is the address of a server.

    >>> is_server("http://localhost:8000"), is_server("vllm")
    (True, False)
    """
    return engine.startswith(("http://", "https://"))


def what_is_wrong(address: str) -> str | None:
    """Why this cannot be the address of a server, as a clause; None if it can.

    >>> what_is_wrong("http://me@localhost:8000")
    'holds a user name or password, which would be written down: put the key of the server into VLLM_API_KEY'
    >>> what_is_wrong("http://localhost:8000") is None
    True
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urllib.parse.urlsplit("")
    if not host or any(character.isspace() for character in address):
        return "is not an address: write http://HOST:PORT"
    if parts.username or parts.password:
        return f"holds a user name or password, which would be written down: put the key of the server into {KEY}"
    if parts.query or parts.fragment:
        return "has more than a host, a port and a path: remove what follows"
    return None


class VLLMServer:
    """One server.

    Every method raises an EvalError, in one line, if the server is gone, is slow, refuses, or answers with something
    else than vLLM does.

    >>> VLLMServer("http://localhost:8000").describe()  # doctest: +SKIP
    {'model': 'runs/base', 'dtype': 'bfloat16', 'max_model_len': 2048}
    """

    def __init__(self, address: str) -> None:
        if wrong := what_is_wrong(address):
            raise EvalError(f"{address} {wrong}.")
        self.address = address.rstrip("/").removesuffix("/v1")

    def describe(self) -> dict[str, Any]:
        """The model that the server was started with, its `dtype` and its `max_model_len`."""
        info = self._ask("/server_info?config_format=json")
        found = self._inside(info, "vllm_config", "model_config")
        names = {"model": str, "dtype": str, "max_model_len": int}
        described = {name: self._inside(found, name) for name in names}
        if not all(isinstance(described[name], kind) for name, kind in names.items()):
            raise self._not_vllm("/server_info")
        self.version()
        return {**described, "dtype": described["dtype"].removeprefix("torch.")}

    def load(self, folder: str, version: str) -> None:
        """Replace the weights by those in `folder`, which must be of the same shapes, and note `version`.

        Weights of other shapes would end the server.
        """
        request = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        try:
            self._ask("/collective_rpc", request, seconds=LONG)
        except EvalError as error:
            raise EvalError(f"{error} It must see the folder {folder} under this path.") from None
        self._ask("/update_weight_version", {"new_version": version})

    def version(self) -> str:
        """The version that the last `load` noted, of this process or of another."""
        return str(self._inside(self._ask("/weight_info"), "weight_version"))

    def tokenize(self, text: str, *, special_tokens: bool) -> list[int]:
        """The token ids of a text, by the server's tokenizer."""
        answer = self._ask("/tokenize", {"prompt": text, "add_special_tokens": special_tokens})
        return self._token_ids(self._inside(answer, "tokens"))

    def complete(self, model: str, prompt_ids: list[int], settings: dict[str, Any]) -> tuple[list[int], str]:
        """The token ids that the model continues a prompt with, and "stop" or "length": why it ended."""
        request = {"model": model, "prompt": prompt_ids, "return_token_ids": True, **settings}
        choices = self._inside(self._ask("/v1/completions", request, seconds=LONG), "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise self._not_vllm("/v1/completions")
        reason = self._inside(choices[0], "finish_reason")
        if reason not in ("stop", "length"):
            raise EvalError(f"the vLLM server {self.address} ended a response with {reason!r}.")
        return self._token_ids(self._inside(choices[0], "token_ids")), reason

    def served_name(self) -> str:
        """The name by which requests ask for the model."""
        models = self._inside(self._ask("/v1/models"), "data")
        return str(self._inside(models[0] if isinstance(models, list) and models else None, "id"))

    # -- one request --------------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: dict[str, Any] | None = None, *, seconds: float = SHORT) -> Any:
        """GET, or POST of a JSON object. Only what `self.address` names is asked: a redirect is not followed."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds) as answer:
                content = answer.read(ANSWER_LIMIT)
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from None
        except TimeoutError:
            raise EvalError(f"the vLLM server {self.address} did not answer within {seconds:.0f} seconds.") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {seconds:.0f} seconds"
            raise EvalError(
                f"the vLLM server {self.address} cannot be reached: {reason}. Start it ({START}), or correct its "
                "address."
            ) from None
        except Exception as error:  # http.client has a dozen kinds for answers that are not HTTP
            raise EvalError(f"the vLLM server {self.address} broke off: {type(error).__name__}.") from None
        try:
            return parse_json(content) if content else None
        except ValueError:
            raise self._not_vllm(path) from None

    def _refused(self, path: str, error: urllib.error.HTTPError) -> EvalError:
        if error.code == 404:
            return EvalError(
                f"the vLLM server {self.address} has no {path.split('?')[0]}, so its weights cannot be replaced. Start "
                f"it with VLLM_SERVER_DEV_MODE=1: {START}"
            )
        if error.code in (401, 403):
            return EvalError(f"the vLLM server {self.address} wants a key. Put it into {KEY}.")
        try:
            said = " ".join(str(parse_json(error.read(2**16))["error"]["message"]).split())[:300]
        except (OSError, ValueError, KeyError, TypeError):
            said = str(error.reason)
        return EvalError(f"the vLLM server {self.address} refuses {path} ({error.code}): {said.rstrip('.')}.")

    def _not_vllm(self, path: str) -> EvalError:
        return EvalError(
            f"{self.address}{path.split('?')[0]} does not answer as vLLM 0.32 and later do. Start the server "
            f"with: {START}"
        )

    def _inside(self, answer: Any, *names: str) -> Any:
        for name in names:
            if not isinstance(answer, dict) or name not in answer:
                raise self._not_vllm(f" (without {name!r})")
            answer = answer[name]
        return answer

    def _token_ids(self, found: Any) -> list[int]:
        if not isinstance(found, list) or not all(type(token) is int and token >= 0 for token in found):
            raise self._not_vllm(" (token ids)")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # urllib then raises the answer as an HTTPError
