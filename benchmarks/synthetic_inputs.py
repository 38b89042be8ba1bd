"""Inputs of the benchmarks, made from a seed: JPEG files, objects and logits."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.data.records import ImageRecord, make_record
from src.data.shapes import draw_shapes

WIDTH, HEIGHT = 500, 375  # the most frequent size in VOC
QUALITY, NOISE = 90, 13.0  # about 90 kB per file, as in VOC


def write_jpegs(folder: Path, count: int, seed: int = 0) -> list[ImageRecord]:
    """Write `count` synthetic images of VOC's size as JPEG files; return their records."""
    random = np.random.default_rng(seed)
    records = []
    for number, record in enumerate(draw_shapes(count, WIDTH, seed)):
        noise = random.normal(0, NOISE, (HEIGHT, WIDTH, 1))
        image = (record.image[:HEIGHT] + noise).clip(0, 255).astype(np.uint8)
        path = folder / f"{number:06}.jpg"
        Image.fromarray(image).save(path, quality=QUALITY)
        boxes = np.minimum(record.boxes, np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT]))
        visible = boxes[:, 3] - boxes[:, 1] > 8
        records.append(
            make_record(
                str(path), boxes[visible], record.labels[visible], record.difficult[visible]
            )
        )
    return records


def random_objects(images: int, mean: int, classes: int = 20, seed: int = 0) -> Tensor:
    """Return targets [N, 6] with 1 to 2 * mean - 1 objects per image.

    Their columns: image, class, cx, cy, w, h in 0..1.
    """
    random = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), random.integers(1, 2 * mean, images))
    size = (
        0.06
        * 12 ** random.random((len(image), 1))
        * np.exp(random.uniform(-0.3, 0.3, (len(image), 2)))
    )
    size = size.clip(0.02, 0.95)
    centre = size / 2 + random.random(size.shape) * (1 - size)
    label = random.integers(classes, size=len(image))
    return torch.from_numpy(np.column_stack([image, label, centre, size])).float()


def random_logits(
    images: int, image_size: int = 416, classes: int = 20, seed: int = 0
) -> list[Tensor]:
    """Return logits of a mediocre detector: three [B, 3, G, G, 5 + C].

    At 416 pixels about 100 predictions per image score above 0.01.
    """
    random = torch.Generator().manual_seed(seed)
    levels = []
    for stride in (32, 16, 8):
        grid = image_size // stride
        level = torch.randn(images, 3, grid, grid, 5 + classes, generator=random)
        level[..., 0] = level[..., 0] * 1.6 - 6
        level[..., 5:] -= 4
        level[..., 1:5] *= 0.5
        levels.append(level)
    return levels
