"""Measures one finished checkpoint of the controlled study; everything is fixed but the weights, so that runs compare pair by pair.

    python benchmarks/study_measure.py FOLDER --out measured.json [--problems 2000] [--sample_problems 64] [--text test.jsonl ...]
    python benchmarks/study_measure.py FOLDER --out measured.json --heldout gsm8k/test.jsonl      # large runs, after eval/gsm8k.py

1. greedy answers to the held-out problems (the generator's test split: other names, other numbers), each with its confidence
2. n samples at temperature 0.7 of the first few of them: pass@k and diversity
3. the likelihood of held-out responses, and of the texts given: CE a token, calibration of the next token
4. effective rank of the LM head and of the last hidden states, here and at each checkpoint-N of the run

With --heldout, 1 and 2 are left to eval/, and 3 and 4 read that set's questions and answers. Prompts are laid out as the run's recipe.yaml
says. On a GPU weights are read as bfloat16, else as float32.

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
import yaml
from study_statistics import SAMPLES, TEMPERATURE, distinct_answers, distinct_n, expected_calibration_error
from torch import Tensor

from eval.statistics import pass_at_k
from matrix_llm.base.files import write_text
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.config import DataArguments
from matrix_llm.data.forms import Row
from matrix_llm.data.prompts import format_prompt
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import Continuation, row_texts
from matrix_llm.data.wordproblems import Problem, generate
from matrix_llm.information import effective_rank
from matrix_llm.loss.vocabulary import unit_vectors
from matrix_llm.model.lm_head import head_effective_rank
from matrix_llm.run.decode import ANSWER_MARKER, final_answer
from matrix_llm.run.prepare import question_source

PROBLEM_SEED = 20_240_724  # of the held-out problems: the same for every run of every study
SAMPLING_SEED = 11
KS = (1, 4, 8)
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
    confidence: (
        float  # product of the probabilities of the answer's tokens and of the end of the text; NaN without an answer
    )


# --- decoding ----------------------------------------------------------------------------------------------------------------


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    longest = max(map(len, rows))
    blanks = [[pad] * (longest - len(row)) for row in rows]
    ids = [[*blank, *row] if left else [*row, *blank] for row, blank in zip(rows, blanks, strict=True)]
    mask = [
        [0] * len(b) + [1] * len(r) if left else [1] * len(r) + [0] * len(b) for r, b in zip(rows, blanks, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def decode(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, sizes: Sizes, temperature: float = 0.0, seed: int = 0
) -> list[tuple[list[int], list[float]]]:
    """New token ids of each prompt (with the end-of-text token, if it came) and the probability that the model gave each.

    Finished rows leave the batch. Probabilities are of the softmax at temperature 1, also where sampling is cooler.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
    device = _device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), sizes.batch_size):
            rows = order[start : start + sizes.batch_size]
            step_ids, mask = (each.to(device) for each in _padded([ids[i] for i in rows], pad, left=True))
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
                mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
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


def answers(
    model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, *, sizes: Sizes, **how: Any
) -> list[Response]:
    prompts = [format_prompt(template, problem.query) for problem in problems]
    return [to_response(tokenizer, *found) for found in decode(model, tokenizer, prompts, sizes=sizes, **how)]


# --- likelihood ----------------------------------------------------------------------------------------------------------------


def _batches(
    tokenizer: Any, texts: Sequence[tuple[str, str]], limit: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, labels), (B, T) each. Prompt and response are tokenised apart, as in training; the prompt's labels are -100."""
    rows, continued = [], Continuation(tokenizer)([response for _, response in texts])
    for (prompt, _), response in zip(texts, continued, strict=True):
        head, tail = tokenizer(prompt)["input_ids"], [*response, tokenizer.eos_token_id]
        rows.append(((head + tail)[:limit], ([-100] * len(head) + tail)[:limit]))
    rows.sort(key=lambda row: len(row[0]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        ids, mask = _padded([row for row, _ in chosen], pad, left=False)
        labels, _ = _padded([row for _, row in chosen], -100, left=False)
        yield ids, mask, labels


def likelihood(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], *, limit: int = 100_000, batch_size: int = 32
) -> dict:
    """CE a response token in nats, and the ECE of the likeliest next token, over the responses of (prompt, response) pairs."""
    total, confidences, right = 0.0, [], []
    with evaluation_mode(model), torch.no_grad():
        for batch in _batches(tokenizer, texts, limit, batch_size):
            ids, mask, labels = (each.to(_device_of(model)) for each in batch)
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
    width = model.config.get_text_config().hidden_size
    moment = torch.zeros(width, width, dtype=torch.float64, device=_device_of(model))
    count = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in _batches(tokenizer, texts, 100_000, 32):
            ids, mask, labels = (each.to(_device_of(model)) for each in batch)
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            rows = unit_vectors(hidden[labels[:, 1:] != -100], dtype=torch.float32)  # (N, H)
            moment += (rows.T @ rows).double()
            count += len(rows)
    return effective_rank(moment / count).item()


# --- one checkpoint ------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32).to(
        "cuda" if gpu else "cpu"
    )


def measure_answers(
    model: Any, tokenizer: Any, problems: Sequence[Problem], template: str, sizes: Sizes
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, str]]]:
    """Figures, what the paired tests need (one entry a problem), and three responses to look at."""
    gold = [final_answer(ANSWER_MARKER + problem.answer) for problem in problems]
    greedy = answers(model, tokenizer, problems, template, sizes=sizes)
    right = [response.answer == answer for response, answer in zip(greedy, gold, strict=True)]
    answered = [i for i, response in enumerate(greedy) if response.answer is not None]

    few = [p for p in problems[: sizes.sample_problems] for _ in range(SAMPLES)]
    drawn = answers(model, tokenizer, few, template, sizes=sizes, temperature=TEMPERATURE, seed=SAMPLING_SEED)
    groups = [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]
    counts = [sum(r.answer == answer for r in group) for group, answer in zip(groups, gold, strict=False)]
    figures = {
        "accuracy_heldout": sum(right) / len(right),
        "unanswered": 1 - len(answered) / len(greedy),
        **{f"pass@{k}": sum(pass_at_k(SAMPLES, c, k) for c in counts) / len(counts) for k in KS},
        "ece_answer": expected_calibration_error(
            [greedy[i].confidence for i in answered], [right[i] for i in answered]
        ),
        **{f"distinct_{n}": _mean([distinct_n([r.text for r in group], n) for group in groups]) for n in (1, 2, 3)},
        "distinct_answers": _mean([distinct_answers([r.answer for r in group]) for group in groups]),
    }
    verdicts = {"set": "heldout", "correct": "".join(map(str, map(int, right))), "samples": counts, "n": SAMPLES}
    shown = [
        {"query": p.query, "gold": p.answer, "response": r.text} for p, r in zip(problems[:3], greedy[:3], strict=True)
    ]
    return figures, verdicts, shown


def measure(
    folder: Path,
    *,
    sizes: Sizes,
    texts: Sequence[Path] = (),
    heldout: Source | None = None,
    problem_seed: int = PROBLEM_SEED,
) -> dict[str, Any]:
    """Everything of the module's list. `row` holds figures, `problems` what the paired tests need."""
    from transformers import AutoTokenizer

    started = time.perf_counter()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    layout = [recipe.get(name, getattr(DataArguments, name)) for name in ("prompt_template", "response_separator")]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    row: dict[str, Any] = {}
    verdicts, shown = {}, []
    if heldout is None:
        problems = generate(sizes.problems, seed=problem_seed, split="test")
        row, verdicts, shown = measure_answers(model, tokenizer, problems, layout[0], sizes)
        rows = [row_texts(Row(question=p.query, answer=p.response), *layout) for p in problems[: sizes.likelihood_rows]]
    else:
        rows = [row_texts(each, *layout) for each in heldout.rows()]

    held_out = likelihood(model, tokenizer, rows)
    row |= {"ce_heldout": held_out["ce"], "ece_token": held_out["ece"]}
    row |= {
        "rank_head": head_effective_rank(model),
        "rank_hidden": hidden_effective_rank(model, tokenizer, rows[:RANK_ROWS]),
    }
    for path in texts:
        whole = [("", "".join(row_texts(each, *layout))) for each in Source(str(path), max_rows=sizes.text_rows).rows()]
        row[f"ce_{path.parent.name or 'text'}_{path.stem}"] = likelihood(
            model, tokenizer, whole, limit=sizes.text_tokens
        )["ce"]
    curve = []
    for checkpoint in sorted(folder.glob(CHECKPOINTS), key=lambda path: int(path.name.rsplit("-", 1)[1])):
        if any(checkpoint.glob("*.safetensors")):  # a sharded one has to be merged first
            rank = hidden_effective_rank(load(checkpoint), tokenizer, rows[:RANK_ROWS])
            curve.append([int(checkpoint.name.rsplit("-", 1)[1]), round(rank, 3)])
    row["measure_seconds"] = round(time.perf_counter() - started, 1)
    row = {name: None if math.isnan(value) else round(value, 6) for name, value in row.items()}
    return {"row": row | {"curve_rank_hidden": curve}, "problems": verdicts, "shown": shown}


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--heldout", help="question/answer rows instead of the generator's: a file or a Hub id with its configuration"
    )
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="question/answer files whose likelihood is measured"
    )
    parser.add_argument(
        "--problem_seed", type=int, default=PROBLEM_SEED, help="another for whatever is tuned before a study"
    )
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    sizes = Sizes(**{name: options[name] for name in vars(Sizes())})
    heldout = question_source(options["heldout"]) if options["heldout"] else None
    found = measure(
        options["folder"], sizes=sizes, texts=options["text"], heldout=heldout, problem_seed=options["problem_seed"]
    )
    write_text(options["out"], json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
