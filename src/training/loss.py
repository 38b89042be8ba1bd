"""Assign ground-truth boxes to anchors, and compute the loss of the predictions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torchvision.ops import box_iou

from src.config import Config
from src.model.boxes import cell_boxes, cxcywh_to_xyxy, decode_boxes

IGNORE_IOU = 0.5
EPSILON = 1e-7  # avoids 0 / 0


@dataclass(frozen=True)
class Assigned:
    """The positives of one scale, one row per object, and the masks of its predictions."""

    image: Tensor  # int64 [N]
    anchor: Tensor  # int64 [N]
    row: Tensor  # int64 [N]
    column: Tensor  # int64 [N]
    valid: Tensor  # bool [N]: False if another object has the same cell and anchor
    positive: Tensor  # bool [B, A, G, G]
    ignored: Tensor  # bool [B, A, G, G]: others with wh_iou above 0.5 with an object in their cell

    def gather(self, level: Tensor) -> Tensor:
        """Select the predictions of the positives: level [B, A, G, G, F] -> [N, F]."""
        return level[self.image, self.anchor, self.row, self.column]


def wh_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes with a common centre: sizes [N, 2], anchors [A, 2] (width, height) -> [N, A]."""
    intersection = torch.minimum(sizes[:, None], anchors).prod(dim=-1)
    return intersection / (sizes.prod(dim=-1)[:, None] + anchors.prod(dim=-1) - intersection)


def assign_targets(
    targets: Tensor, grids: list[int], anchors: Tensor, batch: int
) -> list[Assigned]:
    """Assign each object one positive per scale: the best anchor, in the cell of its centre.

    targets float32 [N, 6]: image index, class, cx, cy, w, h in 0..1. grids: cells per side of each
    scale. anchors [scales, A, 2] in 0..1 of the image. batch: number of images.
    The best anchor has the highest wh_iou. If several objects have the same cell and anchor, the
    last one gets it. No shape depends on the data, so a GPU never waits.
    """
    image = targets[:, 0].long()  # [N]
    number = torch.arange(len(targets), device=targets.device)  # [N]
    scales = []
    for grid, sizes in zip(grids, anchors, strict=True):  # sizes [A, 2]
        column = (targets[:, 2] * grid).long().clamp(0, grid - 1)  # [N]
        row = (targets[:, 3] * grid).long().clamp(0, grid - 1)  # [N]
        iou = wh_iou(targets[:, 4:6], sizes)  # [N, A]
        anchor = iou.argmax(dim=1)  # [N]

        # Flat index of the object's cell for each anchor, and for the best one
        anchor_index = torch.arange(len(sizes), device=image.device)  # [A]
        planes = image[:, None] * len(sizes) + anchor_index  # [N, A]
        cells = (planes * grid + row[:, None]) * grid + column[:, None]  # [N, A]
        best = cells.gather(1, anchor[:, None]).squeeze(1)  # [N]

        # The object of each prediction (-1: none), and its anchor's best overlap with an object
        shape = (batch, len(sizes), grid, grid)
        owner = torch.full((math.prod(shape),), -1, device=image.device)
        owner = owner.scatter_reduce(0, best, number, "amax")
        overlap = torch.zeros(math.prod(shape), device=image.device)
        overlap = overlap.scatter_reduce(0, cells.flatten(), iou.flatten(), "amax")

        valid = owner[best] == number  # [N]
        positive = (owner >= 0).view(shape)
        ignored = (overlap > IGNORE_IOU).view(shape) & ~positive
        scales.append(Assigned(image, anchor, row, column, valid, positive, ignored))
    return scales


@torch.no_grad()
def ignore_mask(level: Tensor, targets: Tensor, counts: list[int], anchors: Tensor) -> Tensor:
    """Mark the predictions of one scale that overlap an object of their image with IoU above 0.5.

    Darknet's rule (yolo_layer.c, ignore_thresh). level [B, A, G, G, 5 + C]; targets [N, 6] as in
    `assign_targets`, sorted by image; counts: objects of each image; anchors [A, 2].
    Returns bool [B, A, G, G].
    """
    predictions = cell_boxes(level, anchors).flatten(1, 3)  # [B, K, 4]
    objects = cxcywh_to_xyxy(targets[:, 2:6]).split(counts)  # B x [n, 4]
    masks = torch.zeros(predictions.shape[:2], dtype=torch.bool, device=level.device)  # [B, K]
    for mask, boxes, image_objects in zip(masks, predictions, objects, strict=True):
        mask |= (box_iou(image_objects, boxes) > IGNORE_IOU).any(dim=0)  # [n, K] -> [K]
    return masks.view(level.shape[:4])


def complete_iou_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Complete IoU loss (Zheng et al. 2020, https://arxiv.org/abs/1911.08287), and the IoU.

    predictions and targets: boxes cxcywh [N, 4]. Returns [N] and [N]. The loss equals torchvision's
    complete_box_iou_loss, which selects the boxes that intersect and so makes a GPU wait.
    """
    boxes = cxcywh_to_xyxy(predictions)  # [N, 4]
    target_boxes = cxcywh_to_xyxy(targets)  # [N, 4]

    # Of each coordinate. The intersection begins at the larger left and top and ends at the smaller
    # right and bottom; the enclosing box begins at the smaller and ends at the larger ones.
    larger = torch.maximum(boxes, target_boxes)  # [N, 4]
    smaller = torch.minimum(boxes, target_boxes)  # [N, 4]
    intersection = (smaller[:, 2:] - larger[:, :2]).clamp(min=0).prod(dim=1)
    union = predictions[:, 2:].prod(dim=1) + targets[:, 2:].prod(dim=1) - intersection
    iou = intersection / (union + EPSILON)

    # rho^2 / d^2: distance of the centres, relative to the diagonal of the enclosing box
    diagonal = (larger[:, 2:] - smaller[:, :2]).square().sum(dim=1)
    distance = (predictions[:, :2] - targets[:, :2]).square().sum(dim=1) / (diagonal + EPSILON)

    # v: difference of the aspect ratios; alpha: its weight, which gets no gradient
    angle = torch.atan(predictions[:, 2] / predictions[:, 3])
    target_angle = torch.atan(targets[:, 2] / targets[:, 3])
    v = 4 / math.pi**2 * (target_angle - angle).square()
    alpha = (v / (1 - iou + v + EPSILON)).detach()
    return 1 - iou + distance + alpha * v, iou


class YOLOLoss(nn.Module):
    """Box (complete IoU), objectness, background and class loss, averaged over the positives.

    forward(logits: one [B, A, G, G, 5 + C] per scale, targets [N, 6] sorted by image, counts:
    objects of each image, anchors [scales, A, 2]) -> dict of scalars "loss", "box", "objectness",
    "background", "class". Computed in float32. Classes are independent logistic outputs (YOLOv3,
    section 2.2). The objectness target of a positive is the IoU of its box (YOLO, Redmon et al.
    2016, section 2: confidence is Pr(object) * IoU), so the best of an object's predictions scores
    best. The target of the background is 0; predictions under the `ignore_mask` have none.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def forward(
        self, logits: list[Tensor], targets: Tensor, counts: list[int], anchors: Tensor
    ) -> dict[str, Tensor]:
        grids = [level.shape[2] for level in logits]
        scales = assign_targets(targets, grids, anchors, len(counts))
        sums = []
        for level, assigned, sizes in zip(logits, scales, anchors, strict=True):
            overlaps = ignore_mask(level, targets, counts, sizes)  # [B, A, G, G]
            sums.append(self.sum_terms(level, targets, assigned, overlaps, sizes))
        positives = max(1, len(logits) * len(targets))
        terms = {name: sum(scale[name] for scale in sums) / positives for name in sums[0]}
        loss = (
            self.config.box_weight * terms["box"]
            + self.config.objectness_weight * terms["objectness"]
            + self.config.background_weight * terms["background"]
            + self.config.class_weight * terms["class"]
        )
        return {"loss": loss, **terms}

    def sum_terms(
        self, level: Tensor, targets: Tensor, assigned: Assigned, overlaps: Tensor, anchors: Tensor
    ) -> dict[str, Tensor]:
        """Sum each term over one scale; `overlaps` is its `ignore_mask`, anchors are [A, 2]."""
        grid = level.shape[2]
        logits = assigned.gather(level).float()  # [N, 5 + C]
        sizes = anchors[assigned.anchor]  # [N, 2]
        boxes = decode_boxes(logits[:, 1:5], assigned.column, assigned.row, sizes, grid)  # [N, 4]
        box_loss, iou = complete_iou_loss(boxes, targets[:, 2:6])  # [N], [N]
        objectness_loss = bce(logits[:, 0], iou.detach(), reduction="none")  # [N]

        labels = torch.arange(logits.shape[1] - 5, device=level.device)  # [C]
        classes = (targets[:, 1:2] == labels).float()  # one-hot [N, C]
        class_loss = bce(logits[:, 5:], classes, reduction="none").sum(dim=1)  # [N]

        objectness = level[..., 0].float()  # logits [B, A, G, G]
        background_loss = bce(objectness, torch.zeros_like(objectness), reduction="none")
        return {
            "box": (box_loss * assigned.valid).sum(),
            "objectness": (objectness_loss * assigned.valid).sum(),
            "background": background_loss.masked_fill(assigned.positive | overlaps, 0).sum(),
            "class": (class_loss * assigned.valid).sum(),
        }
