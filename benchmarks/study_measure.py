"""Measures one finished checkpoint of the controlled study; everything is fixed but the weights, so that runs compare pair by pair.

    python benchmarks/study_measure.py FOLDER --out measured.json [--problems 2000] [--sample_problems 64] [--text test.jsonl ...]

1. greedy answers to the held-out problems (the generator's test split: other names, other numbers), each with its confidence
2. n samples at temperature 0.7 of the first few of them: pass@k and diversity
3. the likelihood of held-out responses, and of the texts given: CE a token, calibration of the next token
4. effective rank of the LM head and of the last hidden states, here and at each checkpoint-N of the run

Legend: B batch, T tokens of a row, L new tokens, V vocabulary, H hidden width, N positions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from study_statistics import distinct_answers, distinct_n, expected_calibration_error
from torch import Tensor

from eval.statistics import pass_at_k
from matrix_llm.accuracy import ANSWER_MARKER, evaluation_mode, final_answer
from matrix_llm.data import row_texts
from matrix_llm.files import write_text
from matrix_llm.head import head_effective_rank
from matrix_llm.information import effective_rank
from matrix_llm.prompts import format_prompt
from matrix_llm.rows import Source
from matrix_llm.solvers import unit_rows
from matrix_llm.wordproblems import Problem, generate

PROBLEM_SEED = 20_240_724  # of the held-out problems: the same for every run of every study
SAMPLING_SEED = 11
TEMPERATURE, SAMPLES, KS = 0.7, 8, (1, 4, 8)
RANK_ROWS = 128  # held-out rows whose response positions give the effective rank of the hidden states
CHECKPOINTS = "checkpoint-*"


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `likelihood_rows` are the first held-out problems with their solutions."""

    problems: int = 2000
    sample_problems: int = 64
    likelihood_rows: int = 512
    text_rows: int = 200
    text_tokens: int = 256
    max_new_tokens: int = 72
    batch_size: int = 125


@dataclass(frozen=True)
class Response:
    text: str
    answer: str | None
    confidence: float  # product of the probabilities of the answer's tokens and of the end of the text; NaN without an answer


# --- decoding ----------------------------------------------------------------------------------------------------------------


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    longest = max(map(len, rows))
    blanks = [[pad] * (longest - len(row)) for row in rows]
    ids = [[*blank, *row] if left else [*row, *blank] for row, blank in zip(rows, blanks, strict=True)]
    mask = [[0] * len(b) + [1] * len(r) if left else [1] * len(r) + [0] * len(b) for r, b in zip(rows, blanks, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def decode(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, sizes: Sizes, temperature: float = 0.0, seed: int = 0
) -> list[tuple[list[int], list[float]]]:
    """New token ids of each prompt (with the end-of-text token, if it came) and the probability that the model gave each.

    Finished rows leave the batch. Probabilities are of the softmax at temperature 1, also where sampling is cooler.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
    generator = torch.Generator().manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), sizes.batch_size):
            rows = order[start : start + sizes.batch_size]
            step_ids, mask = _padded([ids[i] for i in rows], pad, left=True)
            positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
            for _ in range(sizes.max_new_tokens):
                out = model(
                    input_ids=step_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache, logits = out.past_key_values, out.logits[:, -1].float()  # (B, V)
                q = logits.softmax(-1)
                if temperature:
                    chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
                else:
                    chosen = logits.argmax(-1)
                chances = q.gather(1, chosen[:, None])[:, 0].tolist()
                for row, token, chance in zip(rows, chosen.tolist(), chances, strict=True):
                    found[row][0].append(token)
                    found[row][1].append(chance)
                going = torch.nonzero(chosen != end)[:, 0]
                if not len(going):
                    break
                if len(going) < len(rows):
                    cache.batch_select_indices(going)
                    rows = [rows[i] for i in going.tolist()]
                step_ids = chosen[going, None]
                mask = torch.cat([mask[going], torch.ones(len(going), 1, dtype=mask.dtype)], 1)
                positions = positions[going, -1:] + 1
    return found


def to_response(tokenizer: Any, ids: list[int], chances: list[float]) -> Response:
    """The text, its final answer, and how sure the model was of what follows the last answer marker."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    answer = final_answer(text)
    if answer is None:
        return Response(text, None, math.nan)
    wanted = text.rfind(ANSWER_MARKER) + len(ANSWER_MARKER.rstrip())
    first = next(i for i in range(len(ids)) if len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) > wanted)
    return Response(text, answer, math.prod(chances[first:]))


def answers(model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, *, sizes: Sizes, **how: Any) -> list[Response]:
    prompts = [format_prompt(template, problem.query) for problem in problems]
    return [to_response(tokenizer, *found) for found in decode(model, tokenizer, prompts, sizes=sizes, **how)]


# --- likelihood ----------------------------------------------------------------------------------------------------------------


def _batches(tokenizer: Any, texts: Sequence[tuple[str, str]], limit: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, labels), (B, T) each. Prompt and response are tokenised apart, as in training; the prompt's labels are -100."""
    rows = []
    for prompt, response in texts:
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(((head + tail)[:limit], ([-100] * len(head) + tail)[:limit]))
    rows.sort(key=lambda row: len(row[0]))
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        ids, mask = _padded([row for row, _ in chosen], tokenizer.pad_token_id, left=False)
        labels, _ = _padded([row for _, row in chosen], -100, left=False)
        yield ids, mask, labels


def likelihood(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], *, limit: int = 100_000, batch_size: int = 32) -> dict:
    """CE a response token in nats, and the ECE of the likeliest next token, over the responses of (prompt, response) pairs."""
    total, confidences, right = 0.0, [], []
    with evaluation_mode(model), torch.no_grad():
        for ids, mask, labels in _batches(tokenizer, texts, limit, batch_size):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            kept = labels[:, 1:] != -100
            log_q, target = logits[kept].float().log_softmax(-1), labels[:, 1:][kept]  # (N, V), (N,)
            total -= log_q.gather(1, target[:, None]).double().sum().item()
            best = log_q.max(-1)
            confidences += best.values.exp().tolist()
            right += (best.indices == target).tolist()
    return {"ce": total / len(right), "ece": expected_calibration_error(confidences, right), "tokens": len(right)}


def hidden_effective_rank(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> float:
    """Effective rank of the second moment of the unit hidden states that the LM head reads, at the response's positions; 1 to H."""
    moment = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
    count = 0
    with evaluation_mode(model), torch.no_grad():
        for ids, mask, labels in _batches(tokenizer, texts, 100_000, 32):
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            rows = unit_rows(hidden[labels[:, 1:] != -100], dtype=torch.float32)  # (N, H)
            moment += (rows.T @ rows).double()
            count += len(rows)
    return effective_rank(moment / count).item()


# --- one checkpoint ------------------------------------------------------------------------------------------------------------


def pairs(problems: Sequence[Problem], template: str) -> list[tuple[str, str]]:
    return [row_texts({"query": each.query, "response": each.response}, template) for each in problems]


def measure(folder: Path, template: str, *, sizes: Sizes, texts: Sequence[Path] = (), problem_seed: int = PROBLEM_SEED) -> dict[str, Any]:
    """Everything of the module's list. `row` holds figures, `problems` what the paired tests need: one entry a held-out problem."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    problems = generate(sizes.problems, seed=problem_seed, split="test")
    gold = [final_answer(ANSWER_MARKER + problem.answer) for problem in problems]
    rows = pairs(problems[: sizes.likelihood_rows], template)

    greedy = answers(model, tokenizer, problems, template, sizes=sizes)
    right = [response.answer == answer for response, answer in zip(greedy, gold, strict=True)]
    answered = [i for i, response in enumerate(greedy) if response.answer is not None]

    few = problems[: sizes.sample_problems]
    drawn = answers(
        model, tokenizer, [p for p in few for _ in range(SAMPLES)], template, sizes=sizes, temperature=TEMPERATURE, seed=SAMPLING_SEED
    )
    groups = [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]
    counts = [sum(r.answer == answer for r in group) for group, answer in zip(groups, gold, strict=False)]

    held_out = likelihood(model, tokenizer, rows)
    row: dict[str, Any] = {
        "accuracy_heldout": sum(right) / len(right),
        "unanswered": 1 - len(answered) / len(greedy),
        **{f"pass@{k}": sum(pass_at_k(SAMPLES, c, k) for c in counts) / len(counts) for k in KS},
        "ce_heldout": held_out["ce"],
        "ece_token": held_out["ece"],
        "ece_answer": expected_calibration_error([greedy[i].confidence for i in answered], [right[i] for i in answered]),
        **{f"distinct_{n}": _mean([distinct_n([r.text for r in group], n) for group in groups]) for n in (1, 2, 3)},
        "distinct_answers": _mean([distinct_answers([r.answer for r in group]) for group in groups]),
        "rank_head": head_effective_rank(model),
        "rank_hidden": hidden_effective_rank(model, tokenizer, rows[:RANK_ROWS]),
    }
    for path in texts:
        source = [row_texts(each, template) for each in Source(str(path), max_rows=sizes.text_rows).checked()]
        whole = [("", prompt + response) for prompt, response in source]
        row[f"ce_{path.parent.name or 'text'}_{path.stem}"] = likelihood(model, tokenizer, whole, limit=sizes.text_tokens)["ce"]
    curve = []
    for checkpoint in sorted(folder.glob(CHECKPOINTS), key=lambda path: int(path.name.rsplit("-", 1)[1])):
        earlier = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        curve.append([int(checkpoint.name.rsplit("-", 1)[1]), round(hidden_effective_rank(earlier, tokenizer, rows[:RANK_ROWS]), 3)])
    row["measure_seconds"] = round(time.perf_counter() - started, 1)
    return {
        "row": {name: None if math.isnan(value) else round(value, 6) for name, value in row.items()} | {"curve_rank_hidden": curve},
        "problems": {"set": "heldout", "correct": "".join(map(str, map(int, right))), "samples": counts, "n": SAMPLES},
        "shown": [{"query": p.query, "gold": p.answer, "response": r.text} for p, r in zip(problems[:3], greedy[:3], strict=True)],
    }


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--template", default="plain", help="prompt_template of the run")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="question/answer files whose likelihood is measured")
    parser.add_argument("--problem_seed", type=int, default=PROBLEM_SEED, help="another for whatever is tuned before a study")
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    sizes = Sizes(**{name: options[name] for name in vars(Sizes())})
    found = measure(options["folder"], options["template"], sizes=sizes, texts=options["text"], problem_seed=options["problem_seed"])
    write_text(options["out"], json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
