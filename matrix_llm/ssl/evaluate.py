"""How good a backbone's features are: a linear probe, nearest neighbours, fine-tuning on few labels, few labels on
frozen features.

    python matrix_llm/ssl/evaluate.py linear --model runs/x --data digits                    # LARS, as in the paper
    python matrix_llm/ssl/evaluate.py linear --model runs/x --data digits --protocol lbfgs   # quick: features once
    python matrix_llm/ssl/evaluate.py knn    --model runs/x --data digits
    python matrix_llm/ssl/evaluate.py semi --model runs/x --data imagenet --test_split val --split 1percent.txt
    python matrix_llm/ssl/evaluate.py few    --model random:runs/x --data digits --labels_per_class 5

--model is a run, or one of its checkpoints. `random:runs/x` is the same network before any training, `pixels:runs/x`
the pixels it would see, and `pixels` the pixels of the images as they are. A score means little without these two as
comparison.

1. Labels, classes, splits and the result's path are checked before any weight is loaded.
2. Images are read by the loader's workers; one that cannot be read is left out and named in the result.
3. The result is one line on stdout and RUN/eval/<name>.json, written completely or not at all.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])
if __name__ == "__main__":
    from matrix_llm.base.threads import wait_passively

    wait_passively()  # before torch is imported

import importlib.metadata
import json
import os
import time
from functools import partial

import torch
import transformers

from matrix_llm.base.console import fail
from matrix_llm.base.errors import MatrixLLMError, ProbeError
from matrix_llm.base.files import write_text
from matrix_llm.publish.card import versions
from matrix_llm.ssl.evaluation.features import Features, effective_ranks
from matrix_llm.ssl.evaluation.linear import few_label_accuracy, linear_accuracy
from matrix_llm.ssl.evaluation.neighbours import knn_accuracy
from matrix_llm.ssl.evaluation.passes import extract_features
from matrix_llm.ssl.evaluation.protocols import Job, Result, run_protocol
from matrix_llm.ssl.evaluation.settings import CommonSettings, read_settings
from matrix_llm.ssl.evaluation.splits import aligned
from matrix_llm.ssl.evaluation.subjects import find_subject, pixels_of
from matrix_llm.ssl.evaluation.trained import fine_tune
from matrix_llm.ssl.images.load import load_images

__all__ = [
    "Features",
    "ProbeError",
    "effective_ranks",
    "evaluate",
    "extract_features",
    "few_label_accuracy",
    "fine_tune",
    "knn_accuracy",
    "linear_accuracy",
    "main",
]


def evaluate(settings: CommonSettings) -> str:
    """Run one protocol and write its result; returns the line to print.

    Raises:
        MatrixLLMError: settings, images or a network that cannot be used.
    """
    started = time.perf_counter()
    # 1. The place of the result
    out = settings.result_path
    if out.exists() and not settings.force:
        raise ProbeError(f"{out} exists. Read it, name another with --out, or overwrite it with --force.")
    place = next(p for p in (out.parent, *out.parent.parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise ProbeError(f"{out} cannot be written: {place} is not writable. Name another place with --out.")
    # 2. The device, the network and the images, before any weight is loaded
    device = _find_device(settings.device)
    subject = None if settings.model == "pixels" else find_subject(settings.model)
    load = partial(load_images, image_column=settings.image_column, label_column=settings.label_column)
    train, test, classes = aligned(
        load(settings.data, split=settings.train_split),
        load(settings.test_data or settings.data, split=settings.test_split),
    )
    subject = subject or pixels_of(train, settings.image_size)
    # 3. The protocol
    found = run_protocol(Job(settings, subject, train, test, classes, device))
    # 4. The result
    result = {
        "protocol": found.pop("protocol"),
        "model": settings.model,
        "data": settings.data,
        "test_data": settings.test_data,
        **found,
        "seed": settings.seed,
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(device),
        "versions": {**versions(), **_probe_versions()},
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
    return _line_of(result, out)


def _line_of(result: Result, out: Path) -> str:
    low, high = result.get("top1_interval_over_draws") or result["top1_interval"]
    over = "draws" if "top1_interval_over_draws" in result else f"{result['n_test']} test images"
    top5 = f", top-5 {result['top5']:.2%}" if "top5" in result else ""
    skipped = sum(map(len, result["skipped"].values()))
    unreadable = f", {skipped} unreadable" if skipped else ""
    what = f"{result['protocol']}: {result['model']} on {result['data']}"
    how = f"{result['n_train']} labels{unreadable}, {result['seconds']:.1f} s"
    return f"{what}: top-1 {result['top1']:.2%} ({low:.2%} to {high:.2%} over {over}){top5}; {how}; {out}"


def _find_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ProbeError(f"--device {name} is not available ({reason}). Give cpu, or leave it out.") from None
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def _probe_versions() -> dict[str, str]:
    """Versions of the libraries that only the probes use."""
    found = {}
    for name in ("scikit-learn", "pillow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr if the evaluation is impossible."""
    transformers.utils.logging.disable_progress_bar()
    try:
        print(evaluate(read_settings(arguments, __doc__)))
    except MatrixLLMError as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        print("error: aborted, without a result.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
