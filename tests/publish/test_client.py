"""Requests to the Hub: repeated while that can help, and one line without a token where it cannot."""

import time

import pytest

from tests.support.finished_run import contents
from tests.support.hub_server import TOKEN

STEPS = [
    "whoami",
    "GET /api/models/user/x$",
    "create",
    "validate-yaml",
    "preupload",
    "objects/batch",
    "PUT",
    "/commit/",
    "/tree/",
]


@pytest.mark.parametrize("kind", [500, 503, 429, "drop", "stall"])
def test_every_step_is_tried_again(hub, client, run, kind):
    steps = ["PUT", "/commit/"] if kind == "stall" else STEPS  # half a second each
    for step in steps:
        hub.fail(step, kind)
    started = time.monotonic()
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    assert kind != "stall" or time.monotonic() - started < 50  # of 60 s without an answer
    assert [fault.pattern for fault in hub.faults if fault.times] == []
    assert len([wait for wait in outcome.waits if wait >= 1]) == len(steps)
    assert hub.repositories["user/x"].commits == 1


def test_a_lost_answer_to_a_commit_makes_no_second_commit(hub, client, run):
    hub.fail("/commit/", "lose the answer")
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 0, outcome.shown()
    assert outcome.waits  # the client noticed, and found its commit there
    assert hub.repositories["user/x"].commits == 1


def test_retry_after_is_honoured_and_an_hour_is_reported(hub, client, run):
    hub.fail("whoami", 429, Retry_After="7")
    assert 7.0 in client("hub", "push", run, "--repo", "user/x").waits
    hub.fail("whoami", 429, Retry_After="3600")
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert outcome.status == 1
    assert "asks to wait 3600 s" in outcome.error_line()
    assert not outcome.waits


@pytest.mark.parametrize(("step", "kind"), [("whoami", 500), ("PUT", 502), ("commit", "drop")])
def test_a_hub_that_stays_down_costs_one_line_and_no_file(hub, client, run, step, kind):
    before = contents(run)
    hub.fail(step, kind, times=1000)
    outcome = client("hub", "push", run, "--repo", "user/x", "--public")
    assert outcome.status == 1
    assert f"python -m matrix_llm.hub push {run} --repo user/x --public" in outcome.error_line()
    assert contents(run) == before
    assert len(hub.seen(step)) <= 2 * 5 * 6  # two files, our tries of the client's
    if step == "whoami":
        assert outcome.waits == [1.0, 2.0, 4.0, 8.0]


SECRET = "not_like_other_tokens_0123456789"


@pytest.mark.parametrize(
    ("arguments", "token", "step", "kind"),
    [
        (("--token", TOKEN), "", "whoami", 500),
        (("--token", SECRET), TOKEN, "whoami", 400),
        ((), SECRET, "whoami", 401),
        ((), TOKEN, "create", 418),
        ((), TOKEN, "PUT", 403),
        (("--token", TOKEN), "", "/commit/", 400),
        (("--tokn", TOKEN), "", "argparse", 0),
    ],
)
def test_no_token_is_ever_printed(hub, client, run, arguments, token, step, kind):
    hub.fail(step, kind, times=1000)  # and quotes what it was sent
    outcome = client("hub", "push", run, "--repo", "user/x", *arguments, HF_TOKEN=token)
    assert outcome.status != 0
    assert "***" in outcome.err or kind in (401, 403)  # whose lines quote nothing, or nothing secret
    assert TOKEN not in outcome.shown()
    assert SECRET not in outcome.shown()


@pytest.mark.parametrize("token", ["hf_aRejectedTokenOfThirtyFourLetters", "", "hf_no\nheader"])
def test_a_rejected_or_missing_token_is_one_line_with_the_way_out(hub, client, run, token):
    outcome = client("hub", "push", run, "--repo", "user/x", HF_TOKEN=token)
    assert outcome.status == 1
    assert "settings/tokens" in outcome.error_line()
    assert "hf auth login" in outcome.error_line()
    assert not hub.seen("POST|PUT")
    assert not outcome.waits
    assert not token or token not in outcome.shown()


def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(hub, client, run):
    hub.role = "read"
    outcome = client("hub", "push", run, "--repo", "user/x")
    assert "can only read" in outcome.error_line()
    assert not hub.seen("POST|PUT")
    hub.role = "write"
    outcome = client("hub", "push", run, "--repo", "someone/x")
    assert "'someone/x'" in outcome.error_line()
    assert "team" in outcome.error_line()
    assert not hub.seen("POST|PUT")
    hub.role = "fineGrained"
    hub.fail("repos/create", 403)
    outcome = client("hub", "push", run, "--repo", "someone/x")
    assert "may not write to 'someone/x' (403" in outcome.error_line()
    assert not hub.seen("PUT")
