"""Features, images and a backbone made for the probes: what a probe must find in them is known."""

import numpy as np
import torch
from PIL import Image

from matrix_llm.ssl.augment import EvalTransform
from matrix_llm.ssl.data import Images
from matrix_llm.ssl.evaluation.features import Features, correct_at
from matrix_llm.ssl.evaluation.trained import fit_linear
from matrix_llm.ssl.modeling import SmallResNetConfig, SmallResNetModel

K = 6  # classes
TRANSFORM = EvalTransform(8, 1)


def clusters(n, spread, *, width=12, seed=0):
    """K classes around fixed unit directions; spread 0.1 is separable, and no single feature tells them apart."""
    means = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99)))[0][:K]
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    return Features(means[y] + spread * torch.randn(n, width, generator=g), y)


def noise(n, *, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, width, generator=g), torch.randint(K, (n,), generator=g))


def feature_batches(train, batch_size):
    """Fixed features in a new order each epoch, whole batches only."""

    def batches(epoch):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(train.y)))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield train.x[rows], train.y[rows]

    return batches


def trained_accuracy(train, test, optimizer, rate):
    batch = 40
    probe = fit_linear(
        feature_batches(train, batch), width=train.x.shape[1], classes=K, epochs=30, steps=len(train.y) // batch,
        learning_rate=rate, optimizer=optimizer,
    )  # fmt: skip
    return correct_at(probe(test.x), test.y) / len(test.y)


def striped(n, *, seed=0, broken=()):
    """Grey 8 x 8 images: bright left, right, top or bottom halves under noise, 4 classes. Ids are file paths."""
    rng = np.random.default_rng(seed)
    y = torch.arange(n) % 4
    pixels = rng.integers(0, 100, (n, 8, 8)).astype(np.uint8)
    for i, half in enumerate(y.tolist()):
        part = [np.s_[:, :4], np.s_[:, 4:], np.s_[:4], np.s_[4:]][half]
        pixels[i][part] += 100

    def read(i):
        if i in broken:
            raise OSError("truncated")
        return Image.fromarray(pixels[i])

    return Images(
        "striped", [f"class{k}/{i}.png" for i, k in enumerate(y.tolist())], read, y, [f"class{k}" for k in range(4)]
    )


def tiny_backbone(seed=0):
    torch.manual_seed(seed)
    config = SmallResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return SmallResNetModel(config).eval()
