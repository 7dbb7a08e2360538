"""How good a backbone's features are: the linear probe, nearest neighbours, fine-tuning on few labels, few labels on frozen features.

    python matrix_llm/ssl/evaluate.py linear --model runs/x --data digits                     # the paper's: LARS on augmented images
    python matrix_llm/ssl/evaluate.py linear --model runs/x --data digits --protocol lbfgs    # quick: features computed once
    python matrix_llm/ssl/evaluate.py knn    --model runs/x --data digits
    python matrix_llm/ssl/evaluate.py semi   --model runs/x --data imagenet --test_split val --percent 1 --split 1percent.txt
    python matrix_llm/ssl/evaluate.py few    --model random:runs/x --data digits --labels_per_class 5

--model is a run, or one of its checkpoints; `random:runs/x` is the same network before any training, `pixels:runs/x` the pixels it
would see, and `pixels` those of the images as they are. A score means little without these two beside it.

1. Everything that can be refused is, before any weight is loaded: labels, classes, splits, the place of the result.
2. Images are read by the loader's workers; one that cannot be read is left out and named in the result.
3. One line on stdout, and RUN/eval/<name>.json, written whole or not at all.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])
if __name__ == "__main__":
    from matrix_llm.base.threads import wait_passively

    wait_passively()  # before torch is imported

import argparse
import json
import os
import re
import time

import torch
import transformers

from matrix_llm.base.errors import ImageDataError, ProbeError
from matrix_llm.base.files import write_text
from matrix_llm.publish.card import versions
from matrix_llm.ssl.data import load_images
from matrix_llm.ssl.loops import extract_features, fine_tune, labels_of
from matrix_llm.ssl.probes import (
    Features,
    effective_ranks,
    few_label_accuracy,
    few_label_draws,
    knn_accuracy,
    linear_accuracy,
)
from matrix_llm.ssl.protocols import Job, Result, run_few, run_knn, run_linear, run_semi, split_file
from matrix_llm.ssl.subjects import aligned, choose_split, find_subject, pixels_of, recipe_flip

__all__ = [
    "Features", "ProbeError", "effective_ranks", "extract_features", "few_label_accuracy", "fine_tune", "knn_accuracy",
    "linear_accuracy", "main",
]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = common.add_argument
    add("--model", required=True, help="a run's folder, random:FOLDER, pixels:FOLDER or pixels")
    add("--data", required=True, help="what data.py loads: digits, a folder, an .npz, a Hub id, ...")
    add("--test_data", help="where the test images are, if not in --data")
    add("--train_split", default="train")
    add("--test_split", default="test")
    add("--image_column")
    add("--label_column")
    add("--out", type=Path, help="the result's file; MODEL/eval/<name>.json if not given")
    add("--force", action="store_true", help="overwrite an earlier result")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--workers", type=int, help="processes that read images; chosen by the number of images if not given")
    add("--eval_batch_size", type=int, default=256)
    add("--bf16", action="store_true", help="run the network in bfloat16")
    add("--image_size", type=int, help="of --model pixels; the first image's if not given")
    trained = argparse.ArgumentParser(add_help=False)
    add = trained.add_argument
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", type=float, default=0.0)
    add("--flip_prob", type=float, help="of training images; the recipe's if not given, or 0.5")
    add("--crop_scale_min", type=float, default=0.08, help="smallest share of a training image that is cropped")
    whole = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "linear", parents=[common, trained], help="a linear classifier on frozen features"
    ).add_argument
    add("--protocol", choices=["trained", "lbfgs"], default="trained", help="trained: on augmented images, the paper's")
    add("--optimizer", choices=["lars", "sgd"], help="lars if not given, or sgd where lars would have too few steps")
    add("--epochs", type=int, default=100)
    add("--batch_size", type=int, default=4096)
    add("--base_learning_rate", type=float, default=0.03, help="for 256 images")
    add(
        "--C",
        type=_number_or_auto,
        default=1.0,
        help="of lbfgs: a number, or auto: chosen on a fifth of the training part",
    )
    add = commands.add_parser("knn", parents=[common], help="nearest neighbours").add_argument
    add("--k", type=int, nargs="+", default=[20, 200])
    add("--temperature", type=float, default=0.07)
    add = commands.add_parser(
        "semi", parents=[common, trained], help="fine-tuning on a part of the labels"
    ).add_argument
    add("--percent", type=float, help="of the training images, as many of each class")
    add("--split", help="a file that names the images, one a line")
    add("--epochs", type=int, default=20)
    add("--batch_size", type=int, default=256)
    add("--backbone_learning_rate", type=float, default=0.002, help="Barlow Twins' for 1 %%, as is the head's")
    add("--head_learning_rate", type=float, default=0.5)
    add = commands.add_parser("few", parents=[common], help="few labels on frozen features").add_argument
    add("--labels_per_class", type=int, default=5)
    add("--draws", type=int, default=20)
    add("--C", type=float, default=1.0)
    return whole


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def check_settings(args: argparse.Namespace) -> None:
    """Of the command line alone.

    Raises:
        ProbeError: a setting that cannot work.
    """
    given = vars(args)
    for name in ("epochs", "batch_size", "eval_batch_size"):
        if name in given and given[name] < 1:
            raise ProbeError(f"--{name} {given[name]} must be 1 or more.")
    if given.get("batch_size") == 1:
        raise ProbeError("--batch_size 1, but batch normalisation needs at least 2 images.")
    for name in (
        "base_learning_rate",
        "backbone_learning_rate",
        "head_learning_rate",
        "weight_decay",
        "workers",
        "seed",
    ):
        if given.get(name) is not None and given[name] < 0:
            raise ProbeError(f"--{name} {given[name]} must not be negative.")
    if not 0 <= given.get("momentum", 0) < 1:
        raise ProbeError(f"--momentum {args.momentum} must be from 0 to below 1.")
    if not 0 <= (given.get("flip_prob") or 0) <= 1:
        raise ProbeError(f"--flip_prob {args.flip_prob} is no probability. Give 0 to 1.")
    if not 0 < given.get("crop_scale_min", 1) <= 1:
        raise ProbeError(
            f"--crop_scale_min {args.crop_scale_min} is no share of an image. Give a number above 0, 1 at most."
        )
    if given.get("temperature", 1) <= 0 or (given.get("C", 1.0) != "auto" and given.get("C", 1.0) <= 0):
        raise ProbeError("--temperature and --C must be above 0.")
    if args.command == "few" and args.draws < 2:
        raise ProbeError(f"--draws {args.draws}: one draw says nothing about how draws differ. Make at least 2.")
    if args.image_size is not None and (args.model != "pixels" or args.image_size < 4):
        raise ProbeError(
            f"--image_size {args.image_size} is for --model pixels alone, 4 or more; a network has a size of its own."
        )
    if args.command == "semi" and args.percent is None and args.split is None:
        raise ProbeError("semi needs to know which labels it may use. Give --percent 1, or --split FILE.")
    if args.command == "semi" and args.percent is not None and not 0 < args.percent <= 100:
        raise ProbeError(f"--percent {args.percent:g}, but a share of the training images is above 0 and at most 100.")
    if args.model.partition(":")[0] == "pixels" and (args.command == "semi" or given.get("protocol") == "trained"):
        raise ProbeError(
            f"--model {args.model} has no network to put augmented images through. Use knn, few, or linear --protocol lbfgs."
        )


def default_result(args: argparse.Namespace) -> Path:
    """MODEL/eval/<name>.json, or runs/pixels/eval/<name>.json."""
    prefix, _, rest = args.model.rpartition(":")
    kind, folder = (f"{prefix}-", rest) if prefix in ("random", "pixels") else ("", args.model)
    name = {"linear": "linear", "knn": "knn", "semi": "semi", "few": "few"}[args.command]
    if args.command == "linear" and args.protocol == "lbfgs":
        name = "lbfgs"
    elif args.command == "semi":
        name += f"-{args.percent:g}" if args.percent is not None else f"-{Path(args.split).stem}"
    elif args.command == "few":
        name += f"-{args.labels_per_class}"
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(args.data).name or "data")
    seed = f"-seed{args.seed}" if args.seed else ""
    return (
        (Path("runs/pixels") if folder == "pixels" else Path(folder)).expanduser()
        / "eval"
        / f"{kind}{name}-{data}{seed}.json"
    )


def evaluate(args: argparse.Namespace) -> str:
    """Runs one protocol and writes its result; returns the line to print."""
    started = time.perf_counter()
    check_settings(args)
    args.out = args.out or default_result(args)
    if args.out.exists() and not args.force:
        raise ProbeError(f"{args.out} exists. Read it, name another with --out, or overwrite it with --force.")
    if (place := next(p for p in (args.out.parent, *args.out.parent.parents) if p.exists())) and not os.access(
        place, os.W_OK
    ):
        raise ProbeError(f"{args.out} cannot be written: {place} is not writable. Name another place with --out.")
    device = _device(args.device)
    subject = None if args.model == "pixels" else find_subject(args.model)
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    train, test, classes = aligned(
        load_images(args.data, split=args.train_split, **columns),
        load_images(args.test_data or args.data, split=args.test_split, **columns),
    )
    subject = subject or pixels_of(train, args.image_size)
    job = Job(args, subject, train, test, classes, device)
    if args.command in ("linear", "semi") and args.flip_prob is None:
        args.flip_prob = recipe_flip(subject.folder)
    if (
        args.command == "linear"
        and args.C == "auto"
        and int(torch.bincount(labels_of(train).unique(return_inverse=True)[1]).min()) < 2
    ):
        raise ProbeError(
            "--C auto, but a class has one training image, which cannot be both trained on and held out. Give --C a number."
        )
    if args.command == "few":
        few_label_draws(labels_of(train), labels_per_class=args.labels_per_class, draws=1, seed=args.seed)
    if args.command == "knn" and not 1 <= min(args.k) <= max(args.k) <= len(train):
        raise ProbeError(
            f"--k {' '.join(map(str, args.k))}, but there are {len(train)} training images. Give numbers between 1 and that."
        )
    if args.command == "semi":
        places = choose_split(train, test, percent=args.percent, file=args.split, seed=args.seed)
        if len(places) < 2:
            raise ProbeError(f"{len(places)} labelled image(s), but batch normalisation needs at least 2.")
        found = run_semi(job, places)
        if args.split is None:
            write_text(split_file(args.out), "".join(f"{train.ids[i]}\n" for i in places.tolist()))
    else:
        found = {"linear": run_linear, "knn": run_knn, "few": run_few}[args.command](job)
    seconds = round(time.perf_counter() - started, 2)
    result = {
        "protocol": found.pop("protocol"), "model": args.model, "data": args.data, "test_data": args.test_data, **found, "seed": args.seed,
        "seconds": seconds, "device": str(device), "versions": {**versions(), **_probe_versions()},
    }  # fmt: skip
    write_text(args.out, json.dumps(result, indent=2) + "\n")
    return _line(result, args.out)


def _line(result: Result, out: Path) -> str:
    low, high = result.get("top1_interval_over_draws") or result["top1_interval"]
    over = "draws" if "top1_interval_over_draws" in result else f"{result['n_test']} test images"
    top5 = f", top-5 {result['top5']:.2%}" if "top5" in result else ""
    skipped = sum(map(len, result["skipped"].values()))
    unreadable = f", {skipped} unreadable" if skipped else ""
    what = f"{result['protocol']}: {result['model']} on {result['data']}"
    how = f"{result['n_train']} labels{unreadable}, {result['seconds']:.1f} s"
    return f"{what}: top-1 {result['top1']:.2%} ({low:.2%} to {high:.2%} over {over}){top5}; {how}; {out}"


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ProbeError(
                f"--device {name} is not there ({str(error).splitlines()[0]}). Give cpu, or leave it out."
            ) from None
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def _probe_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("scikit-learn", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where the evaluation cannot be made."""
    args = parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        print(evaluate(args))
    except (ProbeError, ImageDataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: aborted, without a result.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
