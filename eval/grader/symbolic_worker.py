"""The process behind `eval.grader.symbolic`: reads a JSON line [given, gold] and answers with a JSON line, true,
false or null.

Started as a script, so that nothing of the grader is imported. It holds at most MEMORY bytes of address space.
"""

import contextlib
import json
import sys

MEMORY = 2 * 2**30


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    limit_memory()
    from math_verify import LatexExtractionConfig, parse, verify

    how = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None, "raise_on_error": True}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        verdict: bool | None = False
        try:
            wanted, answer = parse(f"${gold}$", **how), parse(f"${given}$", **how)
            if wanted and answer:
                verdict = bool(verify(wanted, answer, timeout_seconds=None, raise_on_error=True))
        except MemoryError:
            verdict = None
        except Exception:  # sympy can raise anything on untrusted text, and then it has not found them equal
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
