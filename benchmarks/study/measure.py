"""Measure one finished checkpoint. Everything is fixed but the weights, so that runs compare pair by pair.

    python -m benchmarks.study.measure FOLDER --out measured.json [--problems 2000] [--text test.jsonl ...]
    python -m benchmarks.study.measure FOLDER --out measured.json --heldout gsm8k/test.jsonl    # after eval/gsm8k.py

1. greedy answers to the held-out problems (the generator's test split: other names, other numbers), with confidences
2. samples at temperature 0.7 of the first few of them: pass@k and diversity
3. the likelihood of held-out responses, and of the texts given: CE per token, calibration of the next token
4. effective rank of the LM head and of the last hidden states, here and at each checkpoint-N of the run

With --heldout, 1 and 2 are left to eval/, and 3 and 4 read that set's questions and answers. Prompts are laid out as
the run's recipe.yaml asks. Weights are read as bfloat16 on a GPU and as float32 on a CPU.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.decoding import Decoding, Response, answer_problems
from benchmarks.study.design import SAMPLES, TEMPERATURE
from benchmarks.study.figures import distinct_answers, distinct_n, expected_calibration_error, mean
from benchmarks.study.likelihood import hidden_effective_rank, likelihood
from eval.statistics import pass_at_k
from matrix_llm.base.files import write_text
from matrix_llm.config import DataArguments
from matrix_llm.data.forms import Row
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import row_texts
from matrix_llm.data.wordproblems import Problem, generate
from matrix_llm.model.lm_head import head_effective_rank
from matrix_llm.run.decode import ANSWER_MARKER, final_answer
from matrix_llm.run.prepare import question_source

PROBLEM_SEED = 20_240_724  # of the held-out problems: the same for every run of every study
SAMPLING_SEED = 11
KS = (1, 4, 8)
RANK_ROWS = 128  # held-out rows whose response positions give the effective rank of the hidden states


@dataclass(frozen=True)
class Sizes:
    """How much is measured; each is an option of the command, and at least 1."""

    problems: int = 2000
    """Held-out problems answered greedily."""
    sample_problems: int = 64
    """The first of them, which are sampled as well."""
    likelihood_rows: int = 512
    """The first of them, whose reference solutions' likelihood is measured."""
    text_rows: int = 200
    """Rows read from each --text file."""
    text_tokens: int = 256
    """Tokens read from each of those rows."""
    max_new_tokens: int = 72
    """Length of an answer."""
    batch_size: int = 125
    """Problems answered together."""


@dataclass(frozen=True)
class Answers:
    """What the answers to the held-out problems showed."""

    figures: dict[str, float]
    """Accuracy, calibration and diversity, by name."""
    verdicts: dict[str, Any]
    """What the paired tests need: which problems were solved, and how often each sampled one was."""
    shown: list[dict[str, str]]
    """Three responses to look at."""


def load(folder: Path) -> Any:
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=dtype)
    return model.to("cuda" if gpu else "cpu")


def measure_answers(model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, sizes: Sizes) -> Answers:
    how = Decoding(sizes.max_new_tokens, sizes.batch_size)
    gold = [final_answer(ANSWER_MARKER + problem.answer) for problem in problems]

    # 1. Greedy answers to all problems.
    greedy = answer_problems(model, tokenizer, problems, template, how)
    right = [response.answer == answer for response, answer in zip(greedy, gold, strict=True)]
    answered = [i for i, response in enumerate(greedy) if response.answer is not None]
    confidences = [greedy[i].confidence for i in answered]

    # 2. Samples of the first few problems, grouped by problem.
    repeated = [problem for problem in problems[: sizes.sample_problems] for _ in range(SAMPLES)]
    warm = replace(how, temperature=TEMPERATURE, seed=SAMPLING_SEED)
    drawn = answer_problems(model, tokenizer, repeated, template, warm)
    groups: list[list[Response]] = [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]
    solved = [sum(r.answer == answer for r in group) for group, answer in zip(groups, gold, strict=False)]

    # 3. Figures.
    figures = {
        "accuracy_heldout": sum(right) / len(right),
        "unanswered": 1 - len(answered) / len(greedy),
        **{f"pass@{k}": sum(pass_at_k(SAMPLES, count, k) for count in solved) / len(solved) for k in KS},
        "ece_answer": expected_calibration_error(confidences, [right[i] for i in answered]),
        **{f"distinct_{n}": mean([distinct_n([r.text for r in group], n) for group in groups]) for n in (1, 2, 3)},
        "distinct_answers": mean([distinct_answers([r.answer for r in group]) for group in groups]),
    }
    correct = "".join("1" if each else "0" for each in right)
    verdicts = {"set": "heldout", "correct": correct, "samples": solved, "n": SAMPLES}
    shown = [
        {"query": problem.query, "gold": problem.answer, "response": response.text}
        for problem, response in zip(problems[:3], greedy[:3], strict=True)
    ]
    return Answers(figures, verdicts, shown)


def measure(
    folder: Path,
    sizes: Sizes,
    texts: Sequence[Path] = (),
    heldout: Source | None = None,
    problem_seed: int = PROBLEM_SEED,
) -> dict[str, Any]:
    """Everything on the list above.

    Returns:
        `row` holds the figures, `problems` what the paired tests need, `shown` three responses to look at.
    """
    started = time.perf_counter()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    layout = [recipe.get(name, getattr(DataArguments, name)) for name in ("prompt_template", "response_separator")]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    # 1. and 2. Answers, and the (prompt, response) pairs whose likelihood is measured.
    answers = Answers({}, {}, [])
    if heldout is None:
        problems = generate(sizes.problems, seed=problem_seed, split="test")
        answers = measure_answers(model, tokenizer, problems, layout[0], sizes)
        rows = [Row(question=p.query, answer=p.response) for p in problems[: sizes.likelihood_rows]]
    else:
        rows = list(heldout.rows())
    pairs = [row_texts(row, *layout) for row in rows]

    # 3. Likelihood of the held-out responses and of the texts.
    held_out = likelihood(model, tokenizer, pairs)
    row: dict[str, Any] = {**answers.figures, "ce_heldout": held_out.ce, "ece_token": held_out.ece}
    row |= {
        "rank_head": head_effective_rank(model),
        "rank_hidden": hidden_effective_rank(model, tokenizer, pairs[:RANK_ROWS]),
    }
    for path in texts:
        source = Source(str(path), max_rows=sizes.text_rows)
        whole = [("", "".join(row_texts(each, *layout))) for each in source.rows()]
        name = f"ce_{path.parent.name or 'text'}_{path.stem}"
        row[name] = likelihood(model, tokenizer, whole, sizes.text_tokens).ce

    # 4. Effective rank of the hidden states over training. A sharded checkpoint would have to be merged first.
    curve = []
    steps = {int(path.name.rsplit("-", 1)[1]): path for path in folder.glob("checkpoint-*")}
    for step, checkpoint in sorted(steps.items()):
        if any(checkpoint.glob("*.safetensors")):
            rank = hidden_effective_rank(load(checkpoint), tokenizer, pairs[:RANK_ROWS])
            curve.append([step, round(rank, 3)])

    row["measure_seconds"] = round(time.perf_counter() - started, 1)
    row = {name: None if math.isnan(value) else round(value, 6) for name, value in row.items()}
    return {"row": row | {"curve_rank_hidden": curve}, "problems": answers.verdicts, "shown": answers.shown}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--heldout", help="question/answer rows instead of the generator's: a file, or a Hub id with its configuration"
    )
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="question/answer files whose likelihood is measured"
    )
    parser.add_argument(
        "--problem_seed", type=int, default=PROBLEM_SEED, help="use another for whatever is tuned before a study"
    )
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    sizes = Sizes(**{name: options[name] for name in vars(Sizes())})
    heldout = question_source(options["heldout"]) if options["heldout"] else None
    found = measure(options["folder"], sizes, options["text"], heldout, options["problem_seed"])
    write_text(options["out"], json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
