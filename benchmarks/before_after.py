"""One model before and after fine-tuning, as `make demo-pretrained` ends: scores, sample answers, and where things are.

    python benchmarks/before_after.py models/smollm2-135m runs/smollm2

Both folders hold the scores that eval/gsm8k.py left in their eval/. Every set of problems that both were asked is a
line of the table.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from eval.compare import Run, compare
from eval.text import visible
from matrix_llm.base.console import fail
from matrix_llm.base.errors import EvalError, MatrixLLMError
from matrix_llm.base.files import read_jsonl

TITLES = {
    "gsm8k_builtin": "kinds it trained on: other names and numbers",
    "gsm8k_builtin_new_kinds": "kinds it never trained on",
}
WIDTH = 100


def find_pairs(before: Path, after: Path) -> list[tuple[str, Path, Path]]:
    """(name, summary before, summary after) of each set of problems that both were asked.

    Raises:
        EvalError: there is none.
    """
    summaries = [file for file in sorted((after / "eval").glob("*.json")) if not file.stem.endswith(".settings")]
    pairs = [(file.stem, before / "eval" / file.name, file) for file in summaries]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    if not pairs:
        raise EvalError(
            f"{before}/eval and {after}/eval hold no scores on the same problems. Score both with eval/gsm8k.py first."
        )
    return pairs


def table(pairs: list[tuple[str, Path, Path]]) -> Iterator[str]:
    """The lines of the table: accuracies with Wilson's 95 % intervals, and McNemar's p on the pairs of verdicts."""
    yield f"{'accuracy on problems of':46}{'before':>22}{'after':>22}{'problems':>10}"
    for name, before, after in pairs:
        found = compare(before, after)
        sides = "".join(f"{_accuracy(found[side]):>22}" for side in ("a", "b"))
        yield f"{TITLES.get(name, visible(name)):46}{sides}{found['problems']:>10}"
        gain = f"{100 * found['difference']:+.1f} points"
        interval = f"{100 * found['difference_low']:+.1f} to {100 * found['difference_high']:+.1f}"
        yield f"  {gain} (95 %: {interval}), {found['test']} p = {found['p']:.1g}"
    yield "In brackets: 95 % intervals, over problems. An answer counts when its final number is right, in any form."


def _accuracy(side: Mapping[str, Any]) -> str:
    return f"{100 * side['accuracy']:.1f} % ({100 * side['low']:.1f} to {100 * side['high']:.1f})"


def cut_answers(pairs: list[tuple[str, Path, Path]]) -> Iterator[str]:
    """A line for each set of problems where answers were cut at the limit of tokens."""
    for name, *paths in pairs:
        runs = [Run.load(path).summary for path in paths]
        cut = [run["truncated"] for run in runs]
        if any(cut):
            limit = runs[0]["settings"]["max_tokens"]
            yield f"{TITLES.get(name, visible(name))}: cut at {limit} tokens: {cut[0]} answers before, {cut[1]} after."


def samples(before: Path, after: Path, count: int) -> Iterator[str]:
    """The first `count` problems of a set with both answers."""
    a, b = Run.load(before), Run.load(after)
    shared = [problem for problem in b.rows if problem in a.rows][:count]
    for problem in shared:
        row = b.rows[problem][0]
        yield f"\nproblem: {_wrapped(row['problem'])}\n  gold:  {visible(row['gold'])}"
        for name, run in (("before", a), ("after", b)):
            verdict = "right" if run.verdicts("verified")[problem][0].correct else "wrong"
            yield f"{name:>6}, {verdict}: {_wrapped(run.rows[problem][0]['response'])}"


def _wrapped(text: str) -> str:
    shown = visible(" ".join(text.split()))
    return textwrap.fill(textwrap.shorten(shown, 400, placeholder=" ..."), WIDTH, subsequent_indent=" " * 9)


def losses(run: Path) -> Iterator[str]:
    """Held-out CE and MCE, first and last, from the run's metrics.jsonl; nothing where they were not measured."""
    measured = [entry for entry in read_jsonl(run / "metrics.jsonl") if "eval_ce" in entry]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        pairs = [(name, first.get(f"eval_{name}"), last.get(f"eval_{name}")) for name in ("ce", "mce")]
        shown = [f"{name.upper()} {x:.3f} -> {y:.3f}" for name, x, y in pairs if x is not None and y is not None]
        yield f"on held-out rows, steps {first['step']} -> {last['step']}: {', '.join(shown)}"


def cost(run: Path, pairs: list[tuple[str, Path, Path]]) -> Iterator[str]:
    """How long training and scoring took, and the memory at the peak of training."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    peaks = [entry["peak_memory_gib"] for entry in read_jsonl(run / "metrics.jsonl") if "peak_memory_gib" in entry]
    memory = f", {max(peaks):.1f} GiB of memory at the peak" if peaks else ""
    yield f"training: {results['steps']} steps in {results['train_seconds']:.0f} s{memory}"
    seconds = [sum(Run.load(pair[place]).summary["wall_seconds"] for pair in pairs) for place in (1, 2)]
    yield f"scoring: {seconds[0]:.0f} s before (what was on file takes none), {seconds[1]:.0f} s after"


def describe(before: Path, after: Path, count: int = 3) -> str:
    """Everything that the command prints.

    Raises:
        EvalError: there are no scores to compare.
    """
    pairs = find_pairs(before, after)
    lines = ["", *samples(pairs[-1][1], pairs[-1][2], count), "", *table(pairs), *cut_answers(pairs)]
    lines += [*losses(after), *cost(after, pairs), "", f"{after}/README.md     the model card, with these scores"]
    lines += [f"{after}/loss.png      CE and MCE while it trained", f"{after}/eval/*.html   every problem and answer"]
    lines += ["", "What next: your own rows (docs/start.md), real GSM8K (recipes/smollm2_gsm8k.yaml), CE alone:"]
    lines += [f"  python matrix_llm/train.py {after}/recipe.yaml --mce_weight 0 --output_dir {after}_ce"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of the base model, scored by eval/gsm8k.py")
    parser.add_argument("after", type=Path, help="folder of the finished run, scored in the same way")
    options = parser.parse_args(arguments)
    try:
        print(describe(options.before, options.after))
    except (MatrixLLMError, OSError) as error:
        return fail(str(error), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
