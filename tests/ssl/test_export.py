"""Exported weights (export.py) give the same features in networks with the other libraries' names and semantics."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw
from torch import nn
from transformers import AutoImageProcessor, DetrForObjectDetection, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from matrix_llm.ssl.export import (
    ExportError,
    detectron2_config,
    detectron2_state,
    detr_model,
    from_torchvision,
    main,
    torchvision_state_dict,
)
from matrix_llm.ssl.modeling import SmallResNetConfig, SmallResNetModel
from tests.support.paths import ROOT

SCRIPT = ROOT / "matrix_llm" / "ssl" / "export.py"
BASIC = {"layer_type": "basic", "hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}
BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [16, 32, 64, 128], "depths": [3, 4, 6, 3]}
BOTH = pytest.mark.parametrize("sizes", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
SMALL_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "num_queries": 6, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0,
    "auxiliary_loss": True,
}  # fmt: skip


def resnet(**changes) -> ResNetModel:
    """Random weights and running statistics that no initialisation would give, so that a swap of any two shows."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, **changes))
    disturb(model)
    return model


def disturb(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(7)


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(
        2, channels, 67, 61, generator=torch.Generator().manual_seed(1)
    )  # odd sizes: strides and padding show


@torch.no_grad()
def stages(model: ResNetModel, x: torch.Tensor) -> list[torch.Tensor]:
    return list(model(x, output_hidden_states=True).hidden_states)


def assert_features_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) == 5  # the stem and four stages
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max()
        assert scale > 0.1
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)


# ------------------------------------------------------------ torchvision's ResNet v1.5, written anew: its names and
# semantics


class VisionBlock(nn.Module):
    def __init__(self, inner: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outer = 4 * width if bottleneck else width
        if bottleneck:  # the stride is in the 3 x 3
            self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outer)
        else:
            self.conv1 = nn.Conv2d(inner, width, 3, stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class VisionResNet(nn.Module):
    def __init__(self, layer_type: str, hidden_sizes: list[int], depths: list[int]):
        super().__init__()
        bottleneck = layer_type == "bottleneck"
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.BatchNorm2d(8)
        inner = 8
        for i, (outer, depth) in enumerate(zip(hidden_sizes, depths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(
                    VisionBlock(inner, outer // 4 if bottleneck else outer, 2 if i and not j else 1, bottleneck)
                )
                inner = outer
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    @torch.no_grad()
    def features(self, x):
        found = [F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            found.append(layer(found[-1]))
        return found


@BOTH
def test_torchvision_features_are_the_backbones(sizes):
    model = resnet(**sizes)
    other = VisionResNet(**sizes).eval()
    other.load_state_dict(torchvision_state_dict(model), strict=True)
    assert_features_equal(other.features(images()), stages(model, images()))


@BOTH
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_torchvision_file_comes_back_bit_for_bit(sizes, ending, tmp_path):
    model = resnet(**sizes)
    model.save_pretrained(tmp_path / "run")
    main(["torchvision", "--model", str(tmp_path / "run"), "--output", str(tmp_path / f"weights{ending}")])
    back = from_torchvision(tmp_path / f"weights{ending}")
    wanted, found = model.state_dict(), back.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert (back.config.depths, back.config.hidden_sizes) == (sizes["depths"], sizes["hidden_sizes"])


def test_torchvisions_own_weights_load_without_fc_and_counters():
    other = VisionResNet(**BOTTLENECK)
    disturb(other)
    given = {key: value for key, value in other.state_dict().items() if not key.endswith("num_batches_tracked")}
    given["fc.weight"] = torch.zeros(10, 128)
    assert_features_equal(stages(from_torchvision(given), images()), other.features(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_a_float32_copy(dtype):
    model = resnet(**BASIC).to(dtype)
    state = torchvision_state_dict(model)
    before = state["conv1.weight"].clone()
    model.embedder.embedder.convolution.weight.data.zero_()
    assert before.dtype == torch.float32
    assert torch.equal(state["conv1.weight"], before)


# --------------------------------------------------------------- detectron2's ResNet, written anew: its names and
# semantics


class FrozenBN(nn.Module):
    """Four buffers and no counter, as detectron2's FrozenBatchNorm2d."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)


class NormedConv(nn.Conv2d):
    def __init__(self, inner: int, outer: int, size: int, stride: int, norm: type[nn.Module]):
        super().__init__(inner, outer, size, stride, padding=size // 2, bias=False)
        self.norm = norm(outer)

    def forward(self, x):
        return self.norm(super().forward(x))


class DetectronBlock(nn.Module):
    def __init__(
        self, inner: int, outer: int, stride: int, bottleneck: bool, stride_in_1x1: bool, norm: type[nn.Module]
    ):
        super().__init__()
        self.shortcut = NormedConv(inner, outer, 1, stride, norm) if inner != outer else None
        if bottleneck:
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            self.conv1 = NormedConv(inner, outer // 4, 1, first, norm)
            self.conv2 = NormedConv(outer // 4, outer // 4, 3, second, norm)
            self.conv3 = NormedConv(outer // 4, outer, 1, 1, norm)
        else:
            self.conv1, self.conv2 = NormedConv(inner, outer, 3, stride, norm), NormedConv(outer, outer, 3, 1, norm)

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        if hasattr(self, "conv3"):
            y = self.conv3(F.relu(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class DetectronResNet(nn.Module):
    def __init__(self, layer_type, hidden_sizes, depths, norm: type[nn.Module], stride_in_1x1: bool = False):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, 8, 7, 2, norm)
        inner = 8
        for i, (outer, depth) in enumerate(zip(hidden_sizes, depths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(
                    DetectronBlock(
                        inner, outer, 2 if i and not j else 1, layer_type == "bottleneck", stride_in_1x1, norm
                    )
                )
                inner = outer
            self.add_module(f"res{i + 2}", nn.Sequential(*blocks))

    @torch.no_grad()
    def features(self, x):
        found = [F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, padding=1)]
        for stage in (self.res2, self.res3, self.res4, self.res5):
            found.append(stage(found[-1]))
        return found


class OnlyArrays(pickle.Unpickler):
    """Reads what a file of arrays needs, by names that every NumPy has."""

    def find_class(self, module, name):
        assert (module, name) in {("numpy", "ndarray"), ("builtins", "bytearray")}
        return super().find_class(module, name)


def load_detectron2(path: Path) -> dict:
    with path.open("rb") as file:
        return OnlyArrays(file).load()


def run_folder(model: ResNetModel, folder: Path) -> str:
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@BOTH
@pytest.mark.parametrize("norm", [FrozenBN, nn.BatchNorm2d])
def test_detectron2_features_are_the_backbones(sizes, norm):
    model = resnet(**sizes)
    other = DetectronResNet(**sizes, norm=norm).eval()
    other.load_state_dict({key: torch.from_numpy(value) for key, value in detectron2_state(model).items()}, strict=True)
    assert_features_equal(other.features(images()), stages(model, images()))


def test_the_stride_is_where_the_detectron2_config_says():
    model = resnet(**BOTTLENECK, downsample_in_bottleneck=True)
    config = yaml.safe_load(detectron2_config(model.config, [0.5] * 3, [0.2] * 3, "r50.pkl"))
    state = {key: torch.from_numpy(value) for key, value in detectron2_state(model).items()}
    other = DetectronResNet(**BOTTLENECK, norm=FrozenBN, stride_in_1x1=config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"])
    other.load_state_dict(state, strict=True)
    assert_features_equal(other.features(images()), stages(model, images()))
    wrong = DetectronResNet(**BOTTLENECK, norm=FrozenBN, stride_in_1x1=False)
    wrong.load_state_dict(state, strict=True)
    assert not torch.allclose(wrong.features(images())[2], other.features(images())[2], atol=1e-2)


def test_the_detectron2_file_and_config_describe_the_run(tmp_path):
    model = resnet(**BOTTLENECK)
    main(["detectron2", "--model", run_folder(model, tmp_path / "run"), "--output", str(tmp_path / "r50.pkl")])
    found = load_detectron2(tmp_path / "r50.pkl")
    assert (found["__author__"], found["matching_heuristics"]) == ("matrix_llm", True)
    wanted = detectron2_state(model)
    assert found["model"].keys() == wanted.keys()
    assert all(np.array_equal(value, wanted[key]) and value.flags.writeable for key, value in found["model"].items())
    config = yaml.safe_load((tmp_path / "r50.yaml").read_text())
    assert config["MODEL"]["PIXEL_MEAN"] == [127.5, 102.0, 76.5]
    assert config["MODEL"]["PIXEL_STD"] == [51.0, 63.75, 76.5]
    assert config["INPUT"]["FORMAT"] == "RGB"
    assert config["MODEL"]["WEIGHTS"] == str(tmp_path / "r50.pkl")
    assert config["MODEL"]["BACKBONE"]["FREEZE_AT"] == 0
    assert config["MODEL"]["ROI_HEADS"]["NAME"] == "Res5ROIHeadsExtraNorm"
    assert config["MODEL"]["RESNETS"] == {
        "DEPTH": 50, "NORM": "SyncBN", "STRIDE_IN_1X1": False, "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16,
        "WIDTH_PER_GROUP": 4,
    }  # fmt: skip


def test_imagenets_normalisation_becomes_mocos_numbers():
    config = yaml.safe_load(detectron2_config(ResNetConfig(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "r50.pkl"))
    assert config["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert config["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]


def test_basic_layers_have_weights_but_no_c4_config(tmp_path, capsys):
    main(
        ["detectron2", "--model", run_folder(resnet(**BASIC), tmp_path / "run"), "--output", str(tmp_path / "r18.pkl")]
    )
    assert (tmp_path / "r18.pkl").exists()
    assert not (tmp_path / "r18.yaml").exists()
    assert "bottleneck layers" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# DETR


@pytest.mark.parametrize(
    "changes", [{}, {"downsample_in_bottleneck": True, "downsample_in_first_stage": True}], ids=["plain", "strides"]
)
@BOTH
def test_detrs_feature_maps_are_the_backbones_stages(sizes, changes):
    model = resnet(**sizes, **changes)
    encoder = detr_model(model, 3, **SMALL_DETR).eval().model.backbone
    with torch.no_grad():
        [(last, _)] = encoder(images(), torch.ones(2, 67, 61))
        found = encoder.model(images(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(last, found[-1])
    assert_features_equal(list(found), stages(model, images()))


def test_a_written_detr_loads_with_the_backbone_and_the_normalisation(tmp_path):
    model = resnet(**BASIC)
    main(
        [
            "detr",
            "--model",
            run_folder(model, tmp_path / "run"),
            "--output",
            str(tmp_path / "detr"),
            "--num_labels",
            "2",
        ]
    )
    detector, loading = DetrForObjectDetection.from_pretrained(tmp_path / "detr", output_loading_info=True)
    assert not any(loading.values())
    assert detector.config.num_labels == 2
    with torch.no_grad():
        found = detector.eval().model.backbone.model(images(), output_hidden_states=True).hidden_states
    assert_features_equal(list(found), stages(model, images()))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "detr")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


def coco_folder(folder: Path) -> Path:
    """Six images of 64 x 48 with one or two boxes: red is category 1, blue is category 3."""
    generator = np.random.default_rng(0)
    found: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}, {"id": 3, "name": "blue"}]}
    for i in range(6):
        image = Image.new("RGB", (64, 48), "grey")
        for _ in range(1 + i % 2):
            category = int(generator.choice([1, 3]))
            x, y, width, height = (int(value) for value in generator.integers([0, 0, 10, 10], [40, 28, 24, 20]))
            ImageDraw.Draw(image).rectangle(
                (x, y, x + width - 1, y + height - 1), fill="red" if category == 1 else "blue"
            )
            box = {
                "id": len(found["annotations"]) + 1,
                "image_id": i,
                "category_id": category,
                "bbox": [x, y, width, height],
            }
            found["annotations"].append(box | {"area": width * height, "iscrowd": 0})
        image.save(folder / f"{i}.png")
        found["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
    (folder / "instances.json").write_text(json.dumps(found))
    return folder / "instances.json"


def read_coco(path: Path) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """(N, 3, H, W) in about -1 to 1, and DETR's labels: boxes as centre, width and height in units of the image."""
    coco = json.loads(path.read_text())
    classes = {category["id"]: i for i, category in enumerate(coco["categories"])}
    pixels, labels = [], []
    for entry in coco["images"]:
        values = np.asarray(Image.open(path.parent / entry["file_name"]), dtype=np.float32)
        pixels.append(torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1)
        boxes = [box for box in coco["annotations"] if box["image_id"] == entry["id"]]
        corners = torch.tensor([box["bbox"] for box in boxes], dtype=torch.float32)
        unit = torch.tensor([entry["width"], entry["height"]], dtype=torch.float32)
        normalised = torch.cat([(corners[:, :2] + corners[:, 2:] / 2) / unit, corners[:, 2:] / unit], dim=1)
        labels.append(
            {"class_labels": torch.tensor([classes[box["category_id"]] for box in boxes]), "boxes": normalised}
        )
    return torch.stack(pixels), labels


def test_detr_trains_down_to_the_first_stage_on_a_coco_set(tmp_path):
    pytest.importorskip("scipy", reason="DETR's loss matches boxes with SciPy's linear_sum_assignment")
    pixels, labels = read_coco(coco_folder(tmp_path))
    assert sum(len(label["boxes"]) for label in labels) == 9
    torch.manual_seed(0)
    made = detr_model(resnet(**BASIC), 2, **SMALL_DETR)
    assert all(parameter.requires_grad for parameter in made.parameters())  # transformers' constructor freezes a ResNet
    made.save_pretrained(tmp_path / "detr")
    detector = DetrForObjectDetection.from_pretrained(tmp_path / "detr").train()
    backbone = detector.model.backbone.model
    detector.model.unfreeze_backbone()
    statistics = backbone.embedder.embedder.normalization.running_mean.clone()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        output = detector(pixel_values=pixels, labels=labels)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        first = backbone.encoder.stages[0].layers[0].layer[0].convolution.weight
        assert first.grad.isfinite().all()
        assert first.grad.abs().max() > 0
        optimizer.step()
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert torch.equal(backbone.embedder.embedder.normalization.running_mean, statistics)


# ----------------------------------------------------------------------------------------------------------------
# refusals


SMALL = SmallResNetModel(SmallResNetConfig(embedding_size=8, **BASIC))
VIT = ViTModel(
    ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
)
EXPORTS = (torchvision_state_dict, detectron2_state, lambda backbone: detr_model(backbone, 2, **SMALL_DETR))


@pytest.mark.parametrize("export", EXPORTS, ids=["torchvision", "detectron2", "detr"])
@pytest.mark.parametrize(
    ("backbone", "reason"), [(SMALL, "stem is a 3 x 3"), (VIT, "vit backbone")], ids=["small_resnet", "vit"]
)
def test_other_architectures_are_refused(export, backbone, reason):
    with pytest.raises(ExportError, match=reason):
        export(backbone)


@pytest.mark.parametrize(
    ("export", "changes", "reason"),
    [
        (torchvision_state_dict, BOTTLENECK | {"downsample_in_bottleneck": True}, "stride in the 1 x 1"),
        (torchvision_state_dict, BASIC | {"downsample_in_first_stage": True}, "first stage"),
        (detectron2_state, BASIC | {"downsample_in_first_stage": True}, "first stage"),
        (detectron2_state, BASIC | {"hidden_act": "gelu"}, "gelu"),
        (detectron2_state, BASIC | {"hidden_sizes": [8, 16, 16, 32]}, "no shortcut"),
        (torchvision_state_dict, BASIC | {"hidden_sizes": [8, 16], "depths": [1, 1]}, "four stages"),
        (lambda model: detr_model(model, 0), BASIC, "at least one class"),
        (
            lambda model: detectron2_config(model.config, [0.5] * 3, [0.2] * 3, "x"),
            BOTTLENECK | {"depths": [1, 1, 1, 1]},
            "known|describe",
        ),
        (lambda model: detectron2_config(model.config, [0.5], [0.2], "x"), BOTTLENECK, "one mean a channel"),
    ],
)
def test_what_a_library_would_compute_otherwise_is_refused(export, changes, reason):
    with pytest.raises(ExportError, match=reason):
        export(resnet(**changes))


def test_a_1x1_stride_flag_means_nothing_to_basic_layers():
    torchvision_state_dict(resnet(**BASIC, downsample_in_bottleneck=True))


def test_foreign_torchvision_files_are_refused_by_name(tmp_path):
    state = torchvision_state_dict(resnet(**BOTTLENECK))
    grouped = state | {"layer1.0.conv2.weight": state["layer1.0.conv2.weight"][:, :1]}
    for given, reason in (
        (grouped, r"layer1.0.conv2.weight is \(4, 1, 3, 3\), but \(4, 4, 3, 3\)"),
        (state | {"conv1.weight": torch.zeros(8, 3, 3, 3)}, "conv1.weight is"),
        (state | {"layer1.0.se.weight": torch.zeros(1)}, "layer1.0.se.weight is .*, but absent"),
        ({key: value for key, value in state.items() if key != "bn1.bias"}, "bn1.bias is absent"),
        ({"state_dict": state}, r"not a dict of tensors.*Give the state dict"),
        ({}, "no convolution conv1.weight"),
    ):
        with pytest.raises(ExportError, match=reason):
            from_torchvision(given)
    torch.save({"net": VisionResNet(**BASIC)}, tmp_path / "object.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for name, reason in (
        ("object.pth", "tensors alone"),
        ("cut.safetensors", "tensors alone"),
        ("gone.pth", r"gone\.pth is not a \.safetensors or \.pth"),
    ):
        with pytest.raises(ExportError, match=reason):
            from_torchvision(tmp_path / name)


def test_the_command_line_refuses_before_it_loads(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target, output, reason in (
        ("torchvision", "x.pkl", r"ending in \.pth or \.safetensors"),
        ("detectron2", "x.pth", r"ending in \.pkl"),
        ("detr", "full", r"--output.*not an empty folder"),
    ):
        with pytest.raises(SystemExit, match=reason):
            main([target, "--model", str(tmp_path / "absent"), "--output", str(tmp_path / output)])
    resnet(**BASIC).save_pretrained(tmp_path / "run")  # without a preprocessor_config.json
    with pytest.raises(SystemExit, match=r"no preprocessor_config\.json"):
        main(["detr", "--model", str(tmp_path / "run"), "--output", str(tmp_path / "detr")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


def test_the_script_runs_from_another_folder(tmp_path):
    run_folder(resnet(**BASIC), tmp_path / "run")
    command = [sys.executable, str(SCRIPT), "torchvision", "--model", "run", "--output", "out/r18.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        tmp_path / "out" / "r18.safetensors"
    ).exists()  # so transformers found the standard `ssl`, not matrix_llm/ssl


def test_a_folder_without_a_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: Unrecognized model"):
        main(["torchvision", "--model", str(tmp_path), "--output", str(tmp_path / "x.safetensors")])
    assert not (tmp_path / "x.safetensors").exists()
