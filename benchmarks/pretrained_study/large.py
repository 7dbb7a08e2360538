"""What the same arms cost at 7B, and how large a sample finds the paper's gain there.

    python benchmarks/pretrained_study.py size       # prints the tables of docs/study_7b.md

Nothing here was run at 7B. The seconds of a step are those that docs/performance.md measured on one H100; everything
else that is assumed stands next to its figure.
"""

from collections.abc import Sequence

from benchmarks.output import markdown_table
from benchmarks.pretrained_study.design import CONTROL_SHARE, make_arms
from benchmarks.study.power import PAPER_CE, PAPER_MCE, problems_for_mcnemar, seeds_for_gain

STEP_TOKENS = 2048
STEP_SECONDS = {"ce": 0.279, "mce": 0.284}  # 7B Llama, pure bf16, gradient checkpointing, one H100
ROWS, EPOCHS, ROW_TOKENS = 395_000, 3, 265  # MetaMathQA; the tokens of a row are those of generated rows of its shape
GSM8K_PROBLEMS = 1319
DISCORDANT = (0.14, 0.18, 0.22, 0.30)
BETWEEN = (0.005, 0.010, 0.015)


def gpu_hours(step_seconds: float, rows: int = ROWS, epochs: float = EPOCHS, row_tokens: float = ROW_TOKENS) -> float:
    """GPU hours of one run, without padding, communication and scoring.

    >>> round(gpu_hours(0.279), 1)
    11.9
    """
    return rows * epochs * row_tokens / STEP_TOKENS * step_seconds / 3600


def hours_table(seeds: Sequence[int] = (3, 8)) -> str:
    """GPU hours of each arm."""
    lines, total = [], 0.0
    for arm in make_arms(ROWS):
        kind = "mce" if arm.overrides["mce_weight"] else "ce"
        share = CONTROL_SHARE if arm.group == "control" else 1.0
        hours = share * gpu_hours(STEP_SECONDS[kind])
        total += hours
        lines.append([arm.name, f"{hours:.1f}", *(f"{count * hours:.0f}" for count in seeds)])
    lines.append(["all six", f"{total:.1f}", *(f"{count * total:.0f}" for count in seeds)])
    return markdown_table(["arm", "H100 hours a run", *(f"{count} seeds" for count in seeds)], lines)


def sample_table() -> str:
    """What finds a gain of the paper's size with 80 % power: problems for two single runs, seeds for a study."""
    gain, lines = PAPER_MCE - PAPER_CE, []
    for discordant in DISCORDANT:
        problems = problems_for_mcnemar(gain, discordant)
        seeds = [str(seeds_for_gain(gain, GSM8K_PROBLEMS, discordant, between)) for between in BETWEEN]
        lines.append([f"{100 * discordant:.0f} %", f"{problems:,}", *seeds])
    header = [f"seeds, spread {100 * between:.1f} points" for between in BETWEEN]
    return markdown_table(["problems that one of two runs alone solves", "problems, one seed", *header], lines)
