"""The text that the study's base model is trained on."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from matrix_llm.base.files import write_text
from matrix_llm.data.forms import Row, parse_row
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import row_texts
from matrix_llm.data.wordproblems import generate

TEXT_SEED = 1_000_003  # of the generated problems in the text; no fine-tuning seed draws the same ones


def write_base_text(output: Path, sources: Sequence[Path], builtin: int) -> int:
    """Write {"text": ...} rows, shuffled, and return how many.

    Args:
        sources: files of question/answer (GSM8K), problem/solution (MATH) or query/response rows.
        builtin: number of rows of the built-in generator to add.
    """
    texts = []
    for path in sources:
        for where, row in Source(str(path)).read():
            row = {"query": row["problem"], "response": row["solution"]} if "problem" in row else row
            texts.append("".join(row_texts(parse_row(row, where), "plain")))
    for problem in generate(builtin, seed=TEXT_SEED, split="train"):
        texts.append("".join(row_texts(Row(question=problem.query, answer=problem.response), "plain")))
    random.Random(0).shuffle(texts)
    write_text(output, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return len(texts)
