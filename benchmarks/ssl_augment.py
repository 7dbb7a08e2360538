"""Images a second of one core: decoding, crops in the loader's workers, and the batched rest of the augmentation.

    OMP_NUM_THREADS=1 python benchmarks/ssl_augment.py [--repeats 5]

Medians. The JPEG is generated (500 x 375, smooth), so real photographs decode more slowly. The batched part makes both
views of the ImageNet recipe at 224 pixels.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from matrix_llm.ssl.augment import Augment, AugmentConfig, TwoViewCollator
from matrix_llm.ssl.data import load_images


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    # 1. A photograph to decode
    noise = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    decode = seconds(lambda: Image.open(io.BytesIO(file.getvalue())).convert("RGB"), 20 * repeats)
    # 2. Batches for both sizes
    large, digits = (
        AugmentConfig(),
        AugmentConfig(image_size=16, channels=1, flip_prob=0.0, blur_prob=0.0, blur_prob2=0.0, solarize_prob2=0.0),
    )
    batch = [(0, i, photo, None) for i in range(32)]
    crop, rest = TwoViewCollator(large, 0), Augment(large)
    ready = crop(batch)
    images = load_images("digits")
    small = [(0, i, images.read(i), None) for i in range(256)]
    crop_small, rest_small = TwoViewCollator(digits, 0), Augment(digits)
    ready_small = crop_small(small)
    # 3. Seconds per image of each step
    rows = {
        "decode a JPEG of 500 x 375": decode,
        "two crops of 224 x 224, RGB": seconds(lambda: crop(batch), repeats) / 32,
        "the rest at 224 x 224, both views": seconds(lambda: rest(ready["crops"], ready["draws"]), repeats) / 32,
        "two crops of 16 x 16, grey": seconds(lambda: crop_small(small), repeats) / 256,
        "the rest at 16 x 16, both views": seconds(
            lambda: rest_small(ready_small["crops"], ready_small["draws"]), 4 * repeats
        )
        / 256,
    }
    print("| step, one core | ms an image | images a second |\n|---|---|---|")
    for name, taken in rows.items():
        print(f"| {name} | {1000 * taken:.3f} | {1 / taken:,.0f} |")


if __name__ == "__main__":
    main()
