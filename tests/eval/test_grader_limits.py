"""The grader under attack and under load: every input gets a verdict, and the same one on a busy machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from eval.answers import BENCHMARKS, CONVENTIONS, accuracy_reward, answers_equal, extract_answer, grade
from eval.grader import symbolic
from eval.grader.errors import UngradedError
from tests.support.paths import ROOT

FALSE_DIGITS = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isdigit() and not chr(code).isdecimal()]
OTHER_DIGITS = [chr(code) for code in range(0x80, sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Nd"]

needs_math_verify = pytest.mark.skipif(not symbolic.available(), reason="math-verify is not installed")


# --- total ------------------------------------------------------------------------------------------------------------


def test_characters_that_only_look_like_digits_do_not_raise() -> None:
    assert len(FALSE_DIGITS) > 60
    for character in FALSE_DIGITS:
        for text in (f"The answer is {character}5.", f"#### {character}", rf"\boxed{character}"):
            assert "failed" not in grade(text, "5").reason
            assert "failed" not in grade("#### 5", character).reason
    for character in FALSE_DIGITS[::7]:
        assert "failed" not in grade(rf"\boxed{{{character}}}", "5", benchmark="math").reason


def test_digits_of_every_script_are_digits() -> None:
    for character in OTHER_DIGITS:
        value = str(unicodedata.decimal(character))
        assert answers_equal(f"1{character}", f"1{value}"), hex(ord(character))


STRANGE = [
    None, 7, 7.5, True, b"7", ["7"], {"answer": "7"}, "", " ", "\x00", "\ud800", "7\udfff", "\ud83d", "\x1b[31m7",
    "7" * 5000, "-" * 5000, "9" * 4301 + "/7", "1e99999", 10**5000, float("nan"), float("inf"), "nan", "inf",
]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
def test_any_value_gets_a_verdict_with_a_reason_as_response_and_as_gold(strange: object) -> None:
    for convention in CONVENTIONS:
        for benchmark in BENCHMARKS:
            for response, gold in ((strange, "7"), ("The answer is: 7", strange), (strange, strange)):
                how = {"benchmark": benchmark, "convention": convention}
                verdict = grade(response, gold, **how)  # type: ignore[arg-type]
                assert verdict.correct in (True, False, None)
                assert verdict.reason
                json.dumps(verdict.extracted).encode("utf-8")
            extract_answer(strange, convention=convention, benchmark=benchmark)  # type: ignore[arg-type]
    answers_equal(strange, strange)  # type: ignore[arg-type]
    assert accuracy_reward([strange], answer=["7"]) in ([0.0], [1.0])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "huge", ["0" * 10_000_000, "{" * 10_000_000, "\\boxed{" + "7" * 10_000_000 + "}"], ids=range(3)
)
def test_ten_million_characters_are_graded_at_once(huge: str) -> None:
    start = time.process_time()
    for benchmark in BENCHMARKS:
        grade(huge, "7", benchmark=benchmark)
        grade("The answer is 7", huge, benchmark=benchmark)
        grade(huge, huge, benchmark=benchmark, convention="flexible")
    assert time.process_time() - start < 5


def test_what_is_no_text_is_ungraded_and_a_number_is_its_digits() -> None:
    assert grade(None, "7").correct is None  # type: ignore[arg-type]
    assert "NoneType" in grade(None, "7").reason  # type: ignore[arg-type]
    assert "dict" in grade("#### 7", {}).reason  # type: ignore[arg-type]
    assert grade("#### 7", 7).correct is True  # type: ignore[arg-type]
    assert grade("#### 7", 10**5000).correct is not True  # type: ignore[arg-type]


def test_a_fault_of_the_grader_is_one_ungraded_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> bool:
        raise RecursionError("deep")

    monkeypatch.setattr("eval.grader.answers.compare", fail)
    verdict = grade("#### 7", "8")
    assert verdict.correct is None
    assert "RecursionError" in verdict.reason
    assert answers_equal("7", "8") is False


# --- the worker -------------------------------------------------------------------------------------------------------

HARD = (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}")
BOMB = ("9^{9^{9^{9}}}", "9^{9^{9^{8}}}")


@needs_math_verify
def test_a_bomb_is_ungraded_for_its_processor_time_and_the_next_pair_is_graded() -> None:
    with pytest.raises(UngradedError, match="processor time"):
        symbolic.equal(*BOMB, seconds=0.3)
    assert symbolic.equal(*HARD) is True


@needs_math_verify
def test_an_interrupt_between_request_and_reply_leaves_no_reply_for_the_next_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert symbolic.equal("2", "2") is True
    read = symbolic._read

    def interrupted(process: subprocess.Popen[bytes]) -> dict[str, object]:
        monkeypatch.setattr(symbolic, "_read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(symbolic, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        symbolic.equal("2", "3")
    for given, gold, right in (("2", "2", True), ("2", "3", False), ("5", "5", True)):
        assert symbolic.equal(given, gold) is right


@needs_math_verify
def test_a_reply_to_another_request_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    read = symbolic._read

    def late(process: subprocess.Popen[bytes]) -> dict[str, object]:
        reply = read(process)
        return {**reply, "id": -1} if isinstance(reply, dict) else reply

    monkeypatch.setattr(symbolic, "_read", late)
    with pytest.raises(UngradedError, match="another request"):
        symbolic.equal("2", "2")


@needs_math_verify
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_worker_has_a_memory_limit() -> None:
    assert symbolic.equal("2", "2") is True
    process = symbolic._worker._process
    assert process is not None
    limits = Path(f"/proc/{process.pid}/limits").read_text(encoding="utf-8")
    assert f"Max address space         {2 * 2**30}" in limits


@needs_math_verify
def test_the_worker_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import threading, time\n"
        "from eval.grader import symbolic\n"
        "symbolic.equal('2', '2')\n"
        "print(symbolic._worker._process.pid, flush=True)\n"
        f"symbolic.equal(*{BOMB!r}, seconds=100.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)  # into the bomb
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@needs_math_verify
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_grader_starts_a_worker_of_its_own() -> None:
    assert symbolic.equal("2", "2") is True
    child = os.fork()
    if child == 0:
        right = symbolic._worker._process is None and symbolic.equal(*HARD) is True
        symbolic._worker.stop()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert symbolic.equal("3", "3") is True


PAIRS = [
    HARD, (r"\int_0^1 x^2 dx", r"\frac13"), (r"\sum_{k=0}^{m} k^2", r"\sum_{k=1}^{m} k^2"), ("2", "3"),
    (r"\lim_{x \to 0} \frac{\sin x}{x}", "1"), (r"\sum_{k=1}^{n} 2k", "n^2"), (r"\overline{z}", "z"),
]  # fmt: skip
VERDICTS = (
    "import json, sys\n"
    "from eval.grader import symbolic\n"
    "from eval.grader.errors import UngradedError\n"
    "def verdict(pair, seconds):\n"
    "    try: return symbolic.equal(*pair, seconds=seconds)\n"
    "    except UngradedError as limit: return str(limit)\n"
    f"pairs = {PAIRS!r}\n"
    f"print(json.dumps([*[verdict(pair, 3.0) for pair in pairs], verdict({BOMB!r}, 0.2)]))\n"
)


@pytest.mark.slow
@needs_math_verify
def test_a_busy_machine_gives_the_same_verdicts() -> None:
    """A worker started under load pays for its imports before it is asked, and its pairs may take as long as ever."""

    def verdicts() -> list[object]:
        done = subprocess.run([sys.executable, "-c", VERDICTS], cwd=ROOT, capture_output=True, text=True, check=True)
        return list(json.loads(done.stdout))

    idle = verdicts()
    assert idle[-1] == "more processor time than the limit"
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
    try:
        busy = verdicts()
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    assert busy == idle
