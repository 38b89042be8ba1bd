"""What is measured on: pictures, objects and logits, made on the spot from a seed."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.data.records import ImageRecord, make_record
from src.data.shapes import draw_shapes
from src.training.loss import assign_targets

WIDTH, HEIGHT = 500, 375  # most of VOC's photographs
QUALITY, NOISE = 90, 13.0  # about 90 kB a file, as VOC's


def photographs(folder: Path, count: int, seed: int = 0) -> list[ImageRecord]:
    """`count` records whose pictures are JPEG files of VOC's size, in `folder`."""
    random, records = np.random.default_rng(seed), []
    for number, record in enumerate(draw_shapes(count, WIDTH, seed)):
        noise = random.normal(0, NOISE, (HEIGHT, WIDTH, 1))
        picture = (record.image[:HEIGHT] + noise).clip(0, 255).astype(np.uint8)
        path = folder / f"{number:06}.jpg"
        Image.fromarray(picture).save(path, quality=QUALITY)
        boxes = np.minimum(record.boxes, np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT]))
        seen = boxes[:, 3] - boxes[:, 1] > 8
        records.append(make_record(str(path), boxes[seen], record.labels[seen], record.difficult[seen]))
    return records


def objects(images: int, each: int, classes: int = 20, seed: int = 0) -> Tensor:
    """Targets [N, 6] (image, class, cx, cy, w, h in 0..1) with 1 to 2 * each - 1 objects an image."""
    random = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), random.integers(1, 2 * each, images))
    side = 0.06 * 12 ** random.random((len(image), 1)) * np.exp(random.uniform(-0.3, 0.3, (len(image), 2)))
    side = side.clip(0.02, 0.95)
    centre = side / 2 + random.random(side.shape) * (1 - side)
    label = random.integers(classes, size=len(image))
    return torch.from_numpy(np.column_stack([image, label, centre, side])).float()


def empty_logits(images: int, side: int = 416, classes: int = 20, seed: int = 0) -> list[Tensor]:
    """Logits of a trained net that sees nothing: three [B, 3, G, G, 5 + C], a few cells above 0.01."""
    random, levels = torch.Generator().manual_seed(seed), []
    for stride in (32, 16, 8):
        grid = side // stride
        level = torch.randn(images, 3, grid, grid, 5 + classes, generator=random)
        level[..., 0] = level[..., 0] * 1.6 - 7
        level[..., 5:] -= 4
        level[..., 1:5] *= 0.5
        levels.append(level)
    return levels


def plant(logits: list[Tensor], targets: Tensor, anchors: Tensor, seed: int = 0) -> None:
    """Write into the logits what a fair detector says of the targets: some 100 candidates an image above 0.01.

    On each scale the object's cell and those around it answer with boxes near the truth, less sure the farther
    away, and one in six objects gets a wrong class.
    """
    random = torch.Generator().manual_seed(seed)
    sure = torch.randn(len(targets), generator=random) * 1.5 + 1
    label = targets[:, 1].long()
    other = torch.randint(logits[0].shape[-1] - 5, label.shape, generator=random)
    label = torch.where(torch.rand(len(label), generator=random) < 1 / 6, other, label)
    grids = [level.shape[2] for level in logits]
    found = assign_targets(targets, grids, anchors, len(logits[0]))
    for level, assigned, scale_anchors, grid in zip(logits, found, anchors, grids, strict=True):
        for step in torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).tolist():
            row = (assigned.row + step[0]).clamp(0, grid - 1)
            column = (assigned.column + step[1]).clamp(0, grid - 1)
            centre = targets[:, 2:4] * grid - torch.stack((column, row), dim=1)
            side = (targets[:, 4:6] / scale_anchors[assigned.anchor]).log()
            noise = torch.randn(len(targets), 4, generator=random) * 0.15
            box = torch.cat((centre.clamp(0.02, 0.98).logit(), side), dim=1) + noise
            cells = level[assigned.image, assigned.anchor, row, column]
            cells[:, 0] = sure - 1.5 * (abs(step[0]) + abs(step[1])) + noise[:, 0]
            cells[:, 1:5] = box
            cells[torch.arange(len(label)), 5 + label] = 3.0 + sure
            level[assigned.image, assigned.anchor, row, column] = cells
