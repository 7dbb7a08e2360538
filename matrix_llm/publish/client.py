"""A Hub client for one repository: requests are retried while that can help, and errors say what to do.

`huggingface_hub` makes the requests. Here each one is tried again on 5xx, 429 and on dropped or silent connections, and
what still fails becomes a PushError of one line. No message or log line shows a token.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # HTTPError: of httpx or httpx2, as it uses
from huggingface_hub.utils import get_session

from matrix_llm.base.errors import PushError, scrub

TRIES = 5  # of each request, the first included; the client's own retries of single requests come on top
FIRST_WAIT = 1.0  # seconds before the second try, doubled before each further one
LONGEST_WAIT = 300.0  # a longer Retry-After is reported instead of slept through
TIMEOUT = 120.0  # seconds without a byte; by default the client waits forever

# What huggingface_hub raises for a request that failed: ValueError for a name or front matter that the Hub refuses,
# RuntimeError around a failed upload. Anything else is a fault of ours or the client's, and keeps its traceback.
CLIENT_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class HubClient:
    """Requests about one repository, made with one token.

    >>> hub = HubClient("user/name", token=None)
    >>> hub.request(hub.api.repo_exists, "user/name")  # doctest: +SKIP
    False
    """

    def __init__(self, repo: str, token: str | None, way_out: str = "Try again later.") -> None:
        """
        Args:
            repo: user/name; without an owner where the token's user is still to be asked.
            token: None for HF_TOKEN, or else the token saved by `hf auth login`.
            way_out: the last sentence of errors for which nothing more specific can be advised.
        """
        self.repo, self.token, self.way_out = repo, token, way_out
        self.api = HfApi(token=token)

    @property
    def endpoint(self) -> str:
        return self.api.endpoint

    @property
    def secrets(self) -> list[str | None]:
        """Tokens that must not be printed."""
        return [self.token, get_token()]

    def request(
        self, method: Callable[Arguments, Answer], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Answer:
        """`method(*arguments, **options)`, a method of `api`, repeated after failures that may pass.

        Repeating is safe for every method used here: what has arrived is not sent twice.

        Raises:
            PushError: the request failed for good, or `TRIES` times.
        """
        for number in range(1, TRIES + 1):
            session = get_session()
            if session.timeout.read is None:
                session.timeout = TIMEOUT
            try:
                return method(*arguments, **options)
            except CLIENT_ERRORS as error:
                wait = max(FIRST_WAIT * 2 ** (number - 1), seconds_to_wait(error))
                if number == TRIES or wait > LONGEST_WAIT or not is_transient(error):
                    # The client's own traceback may quote what the server echoed, tokens included.
                    raise PushError(scrub(self._explain(error), *self.secrets)) from None
                line = f"=> {reason_of(error)}; trying again in {wait:.0f} s ({number} of {TRIES})"
                print(scrub(line, *self.secrets), file=sys.stderr, flush=True)
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def check_token(self) -> str:
        """The name of the user whose token this is.

        Raises:
            PushError: offline, no connection, no token, or one that is rejected, may only read, or belongs to somebody
                who cannot write to the repository.
        """
        if constants.HF_HUB_OFFLINE:
            name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            value = os.environ.get(name, "1")
            raise PushError(
                f"{name}={value} forbids network access, so nothing can be pushed. Unset it. {self.way_out}"
            )
        user, role, organisations = _read_whoami(self.request(self.api.whoami))
        if user is None:
            raise PushError(f"{self.endpoint} does not say whose token this is. {self.way_out}")
        if role == "read":
            raise PushError(
                f"the token of {user!r} can only read. Make one with write access at {self.endpoint}/settings/tokens."
            )
        # A fine-grained token is not checked further: it may not list every organisation that it can write to.
        if role == "write" and "/" in self.repo:
            owners = [user, *organisations]
            if self.repo.split("/")[0].lower() not in map(str.lower, owners):
                raise PushError(
                    f"the token of {user!r} cannot write to {self.repo!r}. Push to one of {' or '.join(owners)}."
                )
        return user

    def _explain(self, error: BaseException) -> str:
        """Why a request failed and what to do, in one line."""
        tokens, reason = f"{self.endpoint}/settings/tokens", reason_of(error)
        which = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved token"
        which = "the given token" if self.token else which
        response = response_of(error)
        status = None if response is None else response.status_code
        if has_no_token(error):
            return (
                f"no token for {self.endpoint}. Make one with write access at {tokens}, then set HF_TOKEN or run: "
                "hf auth login"
            )
        if status == 401:
            return (
                f"{self.endpoint} rejects {which} (401). Make a new one with write access at {tokens}, then set "
                "HF_TOKEN or run: hf auth login"
            )
        if status == 403:
            return (
                f"{which} may not write to {self.repo!r} (403: {reason}). Use a token with write access there "
                f"({tokens}), or another repository."
            )
        numbered = reason if status is None else f"{status}: {reason}"
        if is_transient(error):
            seconds = seconds_to_wait(error)
            tried = f", after {TRIES} tries"
            if seconds > LONGEST_WAIT:
                tried = f" and asks to wait {seconds:.0f} s"
            return f"{self.endpoint} fails ({numbered}){tried}. {self.way_out}"
        return f"{self.endpoint} refuses {self.repo!r} ({type(error).__name__}, {numbered}). {self.way_out}"


@contextmanager
def scrub_logs(secrets: list[str | None]) -> Iterator[None]:
    """While the block runs, log lines of huggingface_hub and the libraries below it show no secret."""

    def scrub_record(record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage(), *secrets), ()
        return True

    handlers = [handler for name in (None, "huggingface_hub") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(scrub_record)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(scrub_record)


def _read_whoami(answer: Any) -> tuple[str | None, str | None, list[str]]:
    """The user's name, the token's role and the organisations' names, as far as the Hub, or a proxy, says them."""

    def inside(value: Any, *keys: str) -> Any:
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    name, role = inside(answer, "name"), inside(answer, "auth", "accessToken", "role")
    listed = inside(answer, "orgs")
    organisations = [inside(each, "name") for each in listed] if isinstance(listed, list) else []
    texts = [each for each in organisations if isinstance(each, str)]
    return (name if isinstance(name, str) and name else None, role if isinstance(role, str) else None, texts)


# -------------------------------------------------------------------------------------------------- reading an error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes, the innermost last.

    Only explicit causes: the context of a failed `create_repo` is the 404 that led to it, and would mislead.
    """
    while error is not None:
        yield error
        error = error.__cause__


def reason_of(error: BaseException) -> str:
    """What the server said, or else the innermost reason; on one line of at most 300 characters."""
    chain = list(causes(error))
    said = next((message for each in chain if (message := getattr(each, "server_message", None))), None)
    without_queries = re.sub(
        r"(https?://[^\s?']+)\?[^\s']*", r"\1", str(said or chain[-1])
    )  # signed addresses are secrets
    return (" ".join(without_queries.split()) or type(chain[-1]).__name__)[:300]


def response_of(error: BaseException) -> Any:
    """The server's answer, or None if there was none."""
    responses = (getattr(each, "response", None) for each in causes(error))
    return next((response for response in responses if response is not None), None)


def has_no_token(error: BaseException) -> bool:
    return any(isinstance(each, LocalTokenNotFoundError) for each in causes(error))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if has_no_token(error):
        return False
    if (response := response_of(error)) is not None:
        return response.status_code in (408, 409, 412, 429) or response.status_code >= 500
    # An HTTPError without an answer is a broken connection; an answer that is not JSON is a proxy's error page.
    passing = (ConnectionError, TimeoutError, HTTPError, json.JSONDecodeError)
    return any(isinstance(each, passing) for each in causes(error))


def seconds_to_wait(error: BaseException) -> float:
    """What the server asks for in Retry-After, a number of seconds or a date; 0 where it asks for nothing."""
    response = response_of(error)
    value = "" if response is None else response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):  # no date, or none that can be read
        return 0.0
