"""`ignore_mask` compares few pairs of objects and predictions; its mask equals that of all pairs bit for bit."""

import pytest
import torch

from src.model.boxes import cell_boxes, cxcywh_to_xyxy
from src.model.network import ANCHORS
from src.training import loss
from src.training.loss import IGNORE_IOU, ignore_mask

IMAGES = 4


def full_comparison(level, targets, anchors):
    """Compare each object with all predictions of its image."""
    mask = torch.zeros(level.shape[:4], dtype=torch.bool)
    boxes = cell_boxes(level, anchors)
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    for row in targets:
        image, target = int(row[0]), cxcywh_to_xyxy(row[2:6])
        low, high = (
            torch.maximum(boxes[image, ..., :2], target[:2]),
            torch.minimum(boxes[image, ..., 2:], target[2:]),
        )
        inter_w, inter_h = (high - low).clamp(min=0).unbind(dim=-1)
        intersection = inter_w * inter_h
        mask[image] |= intersection > IGNORE_IOU * (areas[image] + row[4] * row[5] - intersection)
    return mask


def objects(kind, count, random):
    """Targets [count, 6], sorted by image: usual sizes, or extreme ones (tiny, thin, the whole image, partly outside)."""
    size = torch.rand(count, 2, generator=random) * 0.6 + 0.02
    centre = torch.rand(count, 2, generator=random)
    if kind == "extreme":
        choices = torch.tensor([1e-4, 1e-3, 0.024, 0.5, 1.0, 1.0])
        size = choices[torch.randint(len(choices), (count, 2), generator=random)]
        border = torch.tensor([0.0, 0.5, 1.0, 7 / 13, 5 / 52])
        centre = border[torch.randint(len(border), (count, 2), generator=random)]
    image = torch.randint(IMAGES, (count, 1), generator=random).sort(dim=0).values
    return torch.cat((image, torch.zeros_like(image), centre, size), dim=1)


def fitting_level(grid, targets, anchors, spread, random):
    """Logits whose boxes have the size of a random object of the image, about its centre, times exp(spread * noise)."""
    level = torch.randn(IMAGES, 3, grid, grid, 7, generator=random) * 3
    for image in range(IMAGES):
        rows = targets[targets[:, 0] == image]
        if len(rows):
            picked = rows[torch.randint(len(rows), (3, grid, grid), generator=random)]
            level[image, ..., 3:5] = (picked[..., 4:6] / anchors[:, None, None]).log()
    level[..., 3:5] += spread * torch.randn(IMAGES, 3, grid, grid, 2, generator=random)
    return level


@pytest.mark.parametrize("kind", ("usual", "extreme"))
@pytest.mark.parametrize("spread", (0.0, 0.3, 0.7, 10.0))
@pytest.mark.parametrize("size", (1.0, 0.5))
def test_equals_the_full_comparison(kind, spread, size):
    random, marked = torch.Generator().manual_seed(0), 0
    anchor_scales = torch.tensor(ANCHORS) * size
    for _ in range(4):
        targets = objects(kind, 24, random)
        for grid, anchors in zip((5, 13, 52), anchor_scales, strict=True):
            level = fitting_level(grid, targets, anchors, spread, random)
            expected = full_comparison(level, targets, anchors)
            assert torch.equal(ignore_mask(level, targets, anchors), expected)
            strided = (
                level.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
            )  # as the network returns it
            assert torch.equal(ignore_mask(strided, targets, anchors), expected)
            marked += int(expected.sum())
    assert marked > 10


def test_boxes_at_the_bounds():
    """Predictions with exactly the ratio 2, and centres at the edge of the region where IoU 0.5 is possible."""
    anchors = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.5, 0.5]])
    targets = torch.tensor(
        [[0, 0, 0.5, 0.5, 0.25, 0.25], [0, 0, 0.5, 0.5, 0.5, 0.25], [1, 0, 0.25, 0.25, 0.5, 0.5]]
    )
    for value in (-60.0, -1e-3, 0.0, 1e-3, 60.0):
        level = torch.zeros(2, 3, 8, 8, 6)
        level[..., 1:3] = value
        for scale in (-0.6932, -0.6931, 0.0, 0.6931, 0.6932, 60.0):
            level[..., 3:5] = scale
            assert torch.equal(
                ignore_mask(level, targets, anchors), full_comparison(level, targets, anchors)
            )


def test_gpu_branch_compares_all_pairs(monkeypatch):
    """The branch for GPUs, on the CPU: all pairs instead of the candidates."""

    def all_pairs(level, targets, anchors):
        sizes = len(targets), 3, *level.shape[2:4]
        return torch.meshgrid([torch.arange(size) for size in sizes], indexing="ij")

    monkeypatch.setattr(loss, "_ignore_candidates", all_pairs)
    random = torch.Generator().manual_seed(1)
    targets, anchors = objects("usual", 12, random), torch.tensor(ANCHORS[1])
    level = fitting_level(13, targets, anchors, 0.3, random)
    mask = ignore_mask(level, targets, anchors)
    assert mask.any() and torch.equal(mask, full_comparison(level, targets, anchors))


def test_few_pairs_are_compared():
    random = torch.Generator().manual_seed(2)
    targets, anchors = objects("usual", 40, random), torch.tensor(ANCHORS[2])
    level = torch.randn(IMAGES, 3, 52, 52, 7, generator=random)
    pairs = loss._ignore_candidates(level, targets, anchors)
    assert 0 < len(pairs[0]) < 0.05 * len(targets) * 3 * 52 * 52


def test_half_precision_and_invalid_logits():
    random = torch.Generator().manual_seed(3)
    targets, anchors = objects("usual", 12, random), torch.tensor(ANCHORS[1])
    level = fitting_level(13, targets, anchors, 0.3, random).bfloat16()
    assert torch.equal(
        ignore_mask(level, targets, anchors), full_comparison(level, targets, anchors)
    )
    level[0, 0] = float("nan")
    level[1, 1] = float("inf")
    assert torch.equal(
        ignore_mask(level, targets, anchors), full_comparison(level, targets, anchors)
    )
