"""What a run's features look like: matrix information of two views, effective ranks over training, t-SNE maps.

    python matrix_llm/ssl/figures.py runs/ssl/digits [MORE RUNS] --data digits --output figures/

writes information.json, effective_rank.png (from the runs' metrics.jsonl; runs with `eval_strategy` have the classes'
ranks) and tsne.png.

Legend: B rows, d width of the embedding, F of the features.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.base.console import fail
from matrix_llm.base.errors import ImageDataError, MatrixLLMError
from matrix_llm.base.files import atomic_path, read_jsonl, write_text
from matrix_llm.information import effective_rank, matrix_cross_entropy, matrix_kl

__all__ = ["batch_information", "plot_lines", "plot_tsne", "trajectory", "two_view_embeddings"]

RIDGE = 1e-3


def batch_information(
    z1: Tensor,  # (B, d)
    z2: Tensor,  # (B, d)
    *,
    ridge: float = RIDGE,
) -> dict[str, float]:
    """Matrix information of one batch of two views: how uniform the first is, and how far the second is from it
    (section 5).

    With rows of length one and C_i = Z_i^T Z_i / B, which has trace 1 and is not centred:
    matrix_kl_to_uniform = MKL(C_1 || I / d), which is 0 where C_1 is uniform; effective_rank = d exp(-MKL) (prop. 5.1);
    matrix_kl_views = MKL(C_1 + ridge I || C_2 + ridge I); matrix_cross_entropy_views = MCE of the same two, whose
    smallest value, where the views agree, is the matrix entropy of C_1 + ridge I.

    Args:
        z1, z2: embeddings of two views of the same images. The paper's batches have 512.
        ridge: keeps the logarithm of a rank-deficient C_2 finite; its size decides how much a missing direction costs.

    Returns:
        These four, in nats except for the effective rank, and `rows` = B, on which all of them depend.

    >>> found = batch_information(torch.eye(4), torch.eye(4))
    >>> round(found["matrix_kl_to_uniform"], 6), round(found["effective_rank"], 4), round(found["matrix_kl_views"], 6)
    (0.0, 4.0, 0.0)
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(
            f"z1 is {tuple(z1.shape)} and z2 is {tuple(z2.shape)}, but two views of the same B >= 2 images are "
            "compared."
        )
    c1, c2 = ((z.T @ z) / len(z) for z in (F.normalize(z.detach().double(), dim=1) for z in (z1, z2)))
    eye = torch.eye(len(c1), dtype=c1.dtype, device=c1.device)
    return {
        "rows": len(z1),
        "width": len(c1),
        "ridge": ridge,
        "effective_rank": float(effective_rank(c1)),
        "matrix_kl_to_uniform": float(matrix_kl(c1, eye / len(c1))),
        "matrix_kl_views": float(matrix_kl(c1 + ridge * eye, c2 + ridge * eye)),
        "matrix_cross_entropy_views": float(matrix_cross_entropy(c1 + ridge * eye, c2 + ridge * eye)),
    }


def two_view_embeddings(run: Path, data: str, *, split: str, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings of two augmented views of the first `rows` images by a run's full network, with the run's own
    augmentation.
    """
    from transformers import AutoModel

    import matrix_llm.ssl.modeling  # noqa: F401  (registers the model)
    from matrix_llm.ssl.config import load_ssl_recipe
    from matrix_llm.ssl.images.augment import Augment
    from matrix_llm.ssl.images.crops import TwoViewCollator
    from matrix_llm.ssl.images.dataset import TrainImages
    from matrix_llm.ssl.images.load import load_images

    recipe = load_ssl_recipe(run / "recipe.yaml", dry_run=True)
    images = TrainImages(load_images(data, split=split, max_rows=rows))
    batch = TwoViewCollator(recipe.augment, seed=seed, labels=None)([images[(0, i)] for i in range(len(images))])
    model = AutoModel.from_pretrained(run / "pretraining", trust_remote_code=False).eval()
    with torch.no_grad():
        views = Augment(recipe.augment)(batch["crops"], batch["draws"])
        return model(views[0]).embedding, model(views[1]).embedding


def trajectory(run: Path, name: str) -> list[tuple[float, float]]:
    """(epoch, value) of one logged name."""
    from matrix_llm.run.metrics import METRICS

    return [(entry["epoch"], entry[name]) for entry in read_jsonl(run / METRICS) if name in entry and "epoch" in entry]


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, *, x: str) -> None:
    """One panel for each title, and in it one line of (x, y) points for each label."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    _save(plt, figure, path)


def plot_tsne(
    features: Mapping[str, Tensor],  # title -> (B, F)
    labels: Tensor,  # (B,)
    path: Path,
    *,
    seed: int = 0,
) -> None:
    """t-SNE maps (scikit-learn, perplexity 30) of the same images by several networks, coloured by class.

    Distances between clusters in such a map mean nothing, and a map is not a score.
    """
    from sklearn.manifold import TSNE

    plt = _pyplot()
    figure, axes = plt.subplots(1, len(features), figsize=(3.6 * len(features), 3.8), squeeze=False)
    for axis, (title, rows) in zip(axes[0], features.items(), strict=True):
        where = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed).fit_transform(rows.numpy())
        axis.scatter(where[:, 0], where[:, 1], c=labels.numpy(), s=6, cmap="tab10")
        axis.set(title=title, xticks=[], yticks=[])
    _save(plt, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr where the runs or the images cannot be used."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=512, help="images in a batch (the paper's 512)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        draw_figures(args.runs, args.data, args.split, args.rows, args.output)
    except MatrixLLMError as error:
        return fail(str(error), 2)
    return 0


def draw_figures(runs: Sequence[Path], data: str, split: str, rows: int, output: Path) -> None:
    """Write information.json, tsne.png (of labelled images) and effective_rank.png (if the runs logged any) to
    `output`.

    Raises:
        MatrixLLMError: a folder that is not a finished run, or images that cannot be used.
    """
    from matrix_llm.ssl.evaluation.passes import extract_features
    from matrix_llm.ssl.images.eval_transform import EvalTransform
    from matrix_llm.ssl.images.load import load_images
    from matrix_llm.ssl.models.loading import load_backbone

    # 1. Refuse what cannot be drawn.
    for run in runs:
        if not (run / "pretraining").is_dir():
            raise ImageDataError(
                f"{str(run)!r} has no pretraining/, so it is not a finished run of pretrain.py. Give its output_dir."
            )
    images = load_images(data, split=split, max_rows=rows)
    # 2. Information and features of each run
    found, maps = {}, {}
    for run in runs:
        found[str(run)] = batch_information(*two_view_embeddings(run, data, split=split, rows=rows))
        features = extract_features(load_backbone(run), images, EvalTransform.load(run))
        maps[run.name] = features.x
        print(f"{run}: " + ", ".join(f"{name} {value:.4g}" for name, value in found[str(run)].items()))
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "information.json", json.dumps(found, indent=1) + "\n")
    # 3. The figures
    if images.labels is not None:
        plot_tsne(maps, features.y, output / "tsne.png")
    names = ("feature_effective_rank", "eval_intra_class_effective_rank", "eval_inter_class_effective_rank")
    panels = {name: {run.name: points for run in runs if (points := trajectory(run, name))} for name in names}
    if panels := {name: lines for name, lines in panels.items() if lines}:
        plot_lines(panels, output / "effective_rank.png", x="epoch")


if __name__ == "__main__":
    sys.exit(main())
