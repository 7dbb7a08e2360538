"""The numbers of a run: metrics.jsonl while it trains, then loss.png and the last values for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matrix_llm.base.files import atomic_path, read_jsonl, write_text
from matrix_llm.run.run_folder import METRICS, PLOT

__all__ = ["METRICS", "PLOT", "MetricsFileCallback", "last_values", "plot_losses"]

COLOURS = {"ce": "#1f77b4", "mce": "#d62728"}


class MetricsFileCallback(TrainerCallback):
    """Appends every log entry to metrics.jsonl in the output directory, one JSON object per line, as it is logged.

    A resumed run first removes the lines of the steps that it will repeat.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / METRICS
        kept = []
        for entry in read_jsonl(path) if state.global_step else []:
            # a line of a later step, or the summary at the end of a run: it and all that follow will be written again
            if entry.get("step", 0) > state.global_step or "train_runtime" in entry:
                break
            kept.append(entry)
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        if state.is_world_process_zero and logs:
            with (Path(str(args.output_dir)) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def plot_losses(entries: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Plot CE and MCE over optimizer steps to `path`: solid for training, dotted with markers for held-out rows.

    Args:
        entries: the lines of metrics.jsonl. A loss that they do not contain is not drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in COLOURS.items():
        for prefix, style, label in (("", "-", "training"), ("eval_", "o:", "held out")):
            points = [(e["step"], e[prefix + name]) for e in entries if prefix + name in e and "step" in e]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, markersize=4, label=f"{name.upper()}, {label}"
                )
    axes.set(xlabel="optimizer step", ylabel="nats per trained token", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def last_values(entries: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, float]:
    """The last logged value of each name that was ever logged."""
    found = {}
    for entry in entries:
        found.update({name: entry[name] for name in names if isinstance(entry.get(name), (int, float))})
    return found
