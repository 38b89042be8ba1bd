"""Inputs of the benchmarks, made from a seed: JPEG files, objects and logits."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.data.records import ImageRecord, make_record
from src.data.shapes import draw_shapes
from src.training.loss import assign_targets

WIDTH, HEIGHT = 500, 375  # the most frequent size in VOC
QUALITY, NOISE = 90, 13.0  # about 90 kB per file, as in VOC


def write_jpegs(folder: Path, count: int, seed: int = 0) -> list[ImageRecord]:
    """Write `count` synthetic images of VOC's size as JPEG files; return their records."""
    random, records = np.random.default_rng(seed), []
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


def background_logits(
    images: int, image_size: int = 416, classes: int = 20, seed: int = 0
) -> list[Tensor]:
    """Return logits of a trained network on images without objects: three [B, 3, G, G, 5 + C].

    Few objectnesses are above 0.01.
    """
    random, levels = torch.Generator().manual_seed(seed), []
    for stride in (32, 16, 8):
        grid = image_size // stride
        level = torch.randn(images, 3, grid, grid, 5 + classes, generator=random)
        level[..., 0] = level[..., 0] * 1.6 - 7
        level[..., 5:] -= 4
        level[..., 1:5] *= 0.5
        levels.append(level)
    return levels


def plant(logits: list[Tensor], targets: Tensor, anchors: Tensor, seed: int = 0) -> None:
    """Write predictions of a mediocre detector for the targets into the logits.

    On each scale the object's cell and its eight neighbours predict boxes near the ground truth,
    with a score that falls with the distance. One in six objects gets a wrong class. It makes about
    100 candidates per image above 0.01.
    """
    random = torch.Generator().manual_seed(seed)
    score = torch.randn(len(targets), generator=random) * 1.5 + 1
    label = targets[:, 1].long()
    other = torch.randint(logits[0].shape[-1] - 5, label.shape, generator=random)
    label = torch.where(torch.rand(len(label), generator=random) < 1 / 6, other, label)
    grids = [level.shape[2] for level in logits]
    scales = assign_targets(targets, grids, anchors, len(logits[0]))
    for level, assigned, scale_anchors, grid in zip(logits, scales, anchors, grids, strict=True):
        for step in torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).tolist():
            row = (assigned.row + step[0]).clamp(0, grid - 1)
            column = (assigned.column + step[1]).clamp(0, grid - 1)
            centre = targets[:, 2:4] * grid - torch.stack((column, row), dim=1)
            size = (targets[:, 4:6] / scale_anchors[assigned.anchor]).log()
            noise = torch.randn(len(targets), 4, generator=random) * 0.15
            cells = level[assigned.image, assigned.anchor, row, column]
            cells[:, 0] = score - 1.5 * (abs(step[0]) + abs(step[1])) + noise[:, 0]
            cells[:, 1:5] = torch.cat((centre.clamp(0.02, 0.98).logit(), size), dim=1) + noise
            cells[torch.arange(len(label)), 5 + label] = 3.0 + score
            level[assigned.image, assigned.anchor, row, column] = cells
