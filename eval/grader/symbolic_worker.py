"""The process behind `eval.grader.symbolic`: a JSON line for each request, a JSON line for each reply.

    {"id": 7, "given": "2^{-1}", "gold": "\\frac12", "seconds": 3.0}  ->  {"id": 7, "verdict": true, "reason": "..."}

Started as a script with its parent's process id, so that nothing of the grader is imported. MEMORY bounds its address
space; a timer over its own processor time, which the operating system keeps, ends it in a pair that takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

MEMORY = 2 * 2**30
START_SECONDS = 120.0  # of processor time for the imports and the first pairs
WARMING = ((r"\frac{1}{2}", "0.5"), (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"), (r"\{1,2\}", "1, 2"), ("x<2", "2>x"))
AGREEING = 20  # digits


def main() -> None:
    limit_memory()
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what sympy prints is no reply
    limit_processor_time(START_SECONDS)
    for given, gold in WARMING:  # the first pairs pay for imports and caches, which must not count for an answer
        decide(given, gold)
    limit_processor_time(0)
    print(json.dumps("ready"), file=replies, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        limit_processor_time(request["seconds"])
        verdict, reason = decide(request["given"], request["gold"])
        limit_processor_time(0)
        reply = {"id": request["id"], "verdict": verdict, "reason": reason}
        print(json.dumps(reply), file=replies, flush=True)


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_processor_time(seconds: float) -> None:
    """From now on; 0 takes the limit away. Without a handler the signal ends the process, inside C code too."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def end_with(parent: int) -> None:
    """A parent that was killed closes no pipe while a child of its own holds it, so its process id is watched."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def decide(given: str, gold: str) -> tuple[bool | None, str]:
    """math-verify's verdict and its reason; None where it fails."""
    from math_verify import LatexExtractionConfig, parse, verify

    how = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None, "raise_on_error": True}
    try:
        wanted, answer = parse(f"${gold}$", **how), parse(f"${given}$", **how)
        if not wanted or not answer:
            return None, "neither our algebra nor math-verify can read it"
        if not verify(wanted, answer, timeout_seconds=None, raise_on_error=True):
            return False, "unequal to math-verify"
        return confirm(wanted[0], answer[0]), "equal to math-verify, and to so many digits"
    except MemoryError:
        return None, "more memory than the limit"
    except Exception as fault:  # sympy can raise anything on untrusted text
        return None, f"math-verify failed: {type(fault).__name__}"


def confirm(wanted: Any, answer: Any) -> bool | None:
    """math-verify rounds numbers to six places, where all small ones are alike: compare their digits instead."""
    import sympy

    if isinstance(wanted, str) or isinstance(answer, str):
        return bool(wanted == answer)
    if not all(isinstance(each, sympy.Expr) and not each.free_symbols for each in (wanted, answer)):
        return True
    x, y = wanted.evalf(2 * AGREEING), answer.evalf(2 * AGREEING)
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return None
    return bool(abs(x - y) <= sympy.Float(10) ** -AGREEING * max(abs(x), abs(y)))


if __name__ == "__main__":
    main()
