"""`ignore_mask` equals a loop over the objects."""

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


def test_equals_the_loop():
    targets, level = random_targets(24, IMAGES), torch.zeros(IMAGES, 3, 13, 13, 7)
    mask = ignore_mask(level, targets, count_objects(targets, IMAGES), ANCHOR[0])
    assert torch.equal(mask, loop_mask(level, targets, ANCHOR[0])) and mask.sum() > 3


def test_invalid_logits_are_not_ignored():
    targets = random_targets(12, IMAGES)
    level = torch.full((IMAGES, 3, 13, 13, 7), float("nan"))
    assert not ignore_mask(level, targets, count_objects(targets, IMAGES), ANCHOR[1]).any()
