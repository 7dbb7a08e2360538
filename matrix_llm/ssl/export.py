"""A pretrained ResNet for other libraries: torchvision's names, detectron2's, or the backbone of a DETR.

    python matrix_llm/ssl/export.py torchvision --model runs/x --output resnet50.safetensors  # or .pth
    python matrix_llm/ssl/export.py detectron2 --model runs/x --output r50.pkl    # also writes r50.yaml, a C4 config
    python matrix_llm/ssl/export.py detr --model runs/x --output detr/

The weights are renamed, never changed, so the features stay equal. Only transformers' ResNetModel is exported.
Neither torchvision nor detectron2 is needed. The renaming is in `transfer/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os
import tempfile

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from matrix_llm.base.errors import ExportError, MatrixLLMError
from matrix_llm.base.files import atomic_path, write_text
from matrix_llm.ssl.models.loading import load_backbone
from matrix_llm.ssl.transfer.detectron2 import detectron2_config, detectron2_state, write_pickle
from matrix_llm.ssl.transfer.detr import detr_model
from matrix_llm.ssl.transfer.layers import check_resnet
from matrix_llm.ssl.transfer.torchvision import from_torchvision, torchvision_state_dict

__all__ = [
    "ExportError",
    "detectron2_config",
    "detectron2_state",
    "detr_model",
    "from_torchvision",
    "torchvision_state_dict",
]

ENDINGS = {"torchvision": (".pth", ".safetensors"), "detectron2": (".pkl",)}  # a DETR is a folder


def main(arguments: list[str] | None = None) -> None:
    """Write what the command line asks for; an error that the user can correct ends the process with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["torchvision", "detectron2", "detr"])
    parser.add_argument("--model", required=True, help="a run's folder, one of its checkpoints, or a name on the Hub")
    parser.add_argument("--output", required=True, type=Path, help=".pth or .safetensors; .pkl; a new folder")
    parser.add_argument(
        "--num_labels", type=int, default=91, help="detr: classes without 'no object'; COCO's ids need 91, the default"
    )
    options = parser.parse_args(arguments)
    try:
        export(options.target, options.model, options.output, options.num_labels)
    except (MatrixLLMError, OSError) as error:  # OSError: the output cannot be written
        raise SystemExit(f"error: {error}") from None


def export(target: str, model: str, output: Path, num_labels: int) -> None:
    """Load the backbone of `model` and write it for `target`.

    Raises:
        ExportError: the model cannot be loaded or exported, or the output has the wrong form.
    """
    _check_output(target, output)
    try:
        backbone = load_backbone(model, dtype=torch.float32)
    except MatrixLLMError:
        raise
    except (ValueError, OSError) as error:  # what transformers raises where there is no model, or an unknown one
        raise ExportError(str(error)) from None
    if target == "torchvision":
        _write_torchvision(backbone, output)
    elif target == "detectron2":
        _write_detectron2(backbone, output, model)
    else:
        _write_detr(backbone, output, model, num_labels)


def _check_output(target: str, output: Path) -> None:
    if target not in ENDINGS:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ExportError(f"--output {output} exists and is not an empty folder. Give a new folder.")
    elif output.suffix not in ENDINGS[target] or output.is_dir():
        endings = " or ".join(ENDINGS[target])
        raise ExportError(f"--output {output}, but weights for {target} are a file ending in {endings}. Rename it.")


def _write_torchvision(backbone: PreTrainedModel, output: Path) -> None:
    state = torchvision_state_dict(backbone)
    with atomic_path(output) as temporary:
        if output.suffix == ".safetensors":
            safetensors.torch.save_file(state, temporary)
        else:
            torch.save(state, temporary)
    print(f"{output}: {len(state)} tensors. Load with strict=False: the classifier fc is not in it.")


def _write_detectron2(backbone: PreTrainedModel, output: Path, model: str) -> None:
    state = detectron2_state(backbone)
    with atomic_path(output) as temporary, temporary.open("wb") as file:
        write_pickle(state, file)
    print(f"{output}: {len(state)} arrays.")
    written = output.with_suffix(".yaml")
    try:
        config = detectron2_config(check_resnet(backbone).config, *_normalisation(model), weights=str(output))
    except ExportError as error:  # the weights are useful without it
        print(f"{written} is not written: {error}", file=sys.stderr)
        return
    write_text(written, config)
    print(f"{written}: a configuration for it.")


def _write_detr(backbone: PreTrainedModel, output: Path, model: str, num_labels: int) -> None:
    detector, (mean, std) = detr_model(backbone, num_labels), _normalisation(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        detector.save_pretrained(folder)
        DetrImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)
        os.replace(folder, output)
    print(f"{output}: a DETR with a pretrained backbone, otherwise untrained. "
          "Load it with DetrForObjectDetection.from_pretrained and train it.")  # fmt: skip


def _normalisation(model: str) -> tuple[list[float], list[float]]:
    """(mean, std) for pixels in 0 to 1, from the run's preprocessor_config.json."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(model)
        return list(found["image_mean"]), list(found["image_std"])
    except (OSError, KeyError):
        raise ExportError(
            f"{model} has no preprocessor_config.json with image_mean and image_std. Give the folder of a finished run."
        ) from None


if __name__ == "__main__":
    main()
