"""`ignore_mask` equals a loop over the objects, also with extreme boxes."""

import pytest
import torch
from torchvision.ops import box_iou

from src.model.boxes import cell_boxes, cxcywh_to_xyxy
from src.model.network import ANCHORS
from src.training.loss import IGNORE_IOU, ignore_mask
from tests.test_loss import count_objects, random_targets

IMAGES = 4
ANCHOR = torch.tensor(ANCHORS)


def loop_mask(level, targets, anchors):
    """Compare each object with all predictions of its image."""
    mask = torch.zeros(level.shape[:4], dtype=torch.bool)
    boxes = cell_boxes(level, anchors)
    for row in targets:
        image, target = int(row[0]), cxcywh_to_xyxy(row[None, 2:6])
        overlap = box_iou(target, boxes[image].flatten(0, 2)) > IGNORE_IOU
        mask[image] |= overlap.view(level.shape[1:4])
    return mask


def extreme_targets(count, random):
    """Targets [count, 6], sorted by image: tiny, thin, large, at borders of cells and outside."""
    image = torch.randint(IMAGES, (count, 1), generator=random).sort(dim=0).values
    sizes = torch.tensor([1e-4, 1e-3, 0.024, 0.5, 1.0, 1.0])
    places = torch.tensor([0.0, 0.5, 1.0, 7 / 13, 5 / 52])
    size = sizes[torch.randint(len(sizes), (count, 2), generator=random)]
    centre = places[torch.randint(len(places), (count, 2), generator=random)]
    return torch.cat((image, torch.zeros_like(image), centre, size), dim=1)


def fitting_level(grid, targets, anchors, spread, random):
    """Logits whose boxes have the size of a random object of the image, times exp(noise)."""
    level = torch.randn(IMAGES, 3, grid, grid, 7, generator=random) * 3
    for image in range(IMAGES):
        rows = targets[targets[:, 0] == image]
        if len(rows):
            picked = rows[torch.randint(len(rows), (3, grid, grid), generator=random)]
            level[image, ..., 3:5] = (picked[..., 4:6] / anchors[:, None, None]).log()
    level[..., 3:5] += spread * torch.randn(IMAGES, 3, grid, grid, 2, generator=random)
    return level


@pytest.mark.parametrize("kind", ["usual", "extreme"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loop(kind, spread, dtype):
    random = torch.Generator().manual_seed(0)
    marked = 0
    for grid, anchors in zip((5, 13, 52), ANCHOR, strict=True):
        targets = random_targets(24, IMAGES) if kind == "usual" else extreme_targets(24, random)
        level = fitting_level(grid, targets, anchors, spread, random).to(dtype)
        mask = ignore_mask(level, targets, count_objects(targets, IMAGES), anchors)
        assert torch.equal(mask, loop_mask(level, targets, anchors))
        marked += int(mask.sum())
    assert marked > 3


def test_invalid_logits_are_not_ignored():
    targets = random_targets(12, IMAGES)
    level = torch.full((IMAGES, 3, 13, 13, 7), float("nan"))
    assert not ignore_mask(level, targets, count_objects(targets, IMAGES), ANCHOR[1]).any()
