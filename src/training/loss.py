"""Assign ground-truth boxes to anchors, and compute the loss of the predictions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from src.config import Config
from src.model.boxes import MAX_LOG_SCALE, cxcywh_to_xyxy, decode_boxes

IGNORE_IOU = 0.5
EPSILON = 1e-7


@dataclass(frozen=True)
class Assigned:
    """The positives of one scale, one row per target, and the masks of its predictions."""

    image: Tensor  # int64 [N]
    anchor: Tensor  # int64 [N]
    row: Tensor  # int64 [N]
    column: Tensor  # int64 [N]
    valid: Tensor  # bool [N]: False if another object has the same cell and anchor
    positive: Tensor  # bool [B, 3, G, G]
    ignored: Tensor  # bool [B, 3, G, G]: not positive, but wh_iou with an object above 0.5; no accuracy counts it

    def gather(self, level: Tensor) -> Tensor:
        """Select the predictions of the positives: level [B, 3, G, G, F] -> [N, F]."""
        return level[self.image, self.anchor, self.row, self.column]


def wh_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes with a common centre: sizes [N, 2], anchors [A, 2] (width, height; same unit) -> [N, A]."""
    intersection = torch.minimum(sizes[:, None], anchors).prod(dim=-1)
    return intersection / (sizes.prod(dim=-1)[:, None] + anchors.prod(dim=-1) - intersection)


def assign_targets(
    targets: Tensor, grids: list[int], anchors: Tensor, batch: int
) -> list[Assigned]:
    """Assign each object one positive per scale: the anchor of best wh_iou, in the cell that holds its centre.

    targets float32 [N, 6]: image index, class, cx, cy, w, h in 0..1; grids: cells per side of each scale;
    anchors [3, 3, 2] in 0..1 of the image; batch: number of images. If several objects match the same cell and
    anchor, the last one gets it. No shape depends on the data, so a GPU never waits.
    """
    image, cells, columns, rows = targets[:, 0].long(), [], [], []
    sizes = [batch * 3 * grid * grid for grid in grids]
    for scale, grid in enumerate(grids):
        column, row = (targets[:, 2:4] * grid).long().clamp(0, grid - 1).unbind(dim=1)
        first = (
            (image * 3 * grid + row) * grid + column + sum(sizes[:scale])
        )  # index into the cells of all scales
        cells.append(torch.stack((first, first + grid * grid, first + 2 * grid * grid), dim=1))
        columns.append(column)
        rows.append(row)
    cells = torch.stack(cells)  # [scales, N, 3]: the cell of each anchor
    iou = (
        wh_iou(targets[:, 4:6], anchors.flatten(0, 1)).unflatten(1, (-1, 3)).transpose(0, 1)
    )  # [scales, N, 3]
    anchor = iou.argmax(dim=2)  # [scales, N]
    place = cells.gather(2, anchor[..., None]).squeeze(2)  # [scales, N]
    valid = ~(place[:, :, None] == place[:, None]).triu(1).any(
        dim=2
    )  # no later object has the same place
    positive, ignored = torch.zeros(
        2, sum(sizes) + 1, dtype=torch.bool, device=targets.device
    )  # the last: no cell
    positive.scatter_(0, place.flatten(), True)
    ignored.scatter_(0, torch.where(iou > IGNORE_IOU, cells, sum(sizes)).flatten(), True)
    ignored.scatter_(0, place.flatten(), False)
    shapes = [(batch, 3, grid, grid) for grid in grids]
    masks = [list(map(Tensor.view, flat[:-1].split(sizes), shapes)) for flat in (positive, ignored)]
    return [
        Assigned(image, *fields)
        for fields in zip(anchor, rows, columns, valid, *masks, strict=True)
    ]


@torch.no_grad()
def ignore_mask(level: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
    """Mark the predictions of one scale whose box has IoU above 0.5 with an object of their image: bool [B, 3, G, G].

    Darknet's rule (yolo_layer.c, ignore_thresh). level [B, 3, G, G, 5 + C]; targets as in `assign_targets`; anchors [3, 2].
    On a CPU only the pairs of `_ignore_candidates` are compared; on a GPU all, because their number would make it wait.
    """
    grid = level.shape[2]
    if level.is_cpu:
        pairs = _ignore_candidates(level, targets, anchors)  # [P]
    else:
        sizes = len(targets), 3, grid, grid
        pairs = torch.meshgrid(
            [torch.arange(size, device=level.device) for size in sizes], indexing="ij"
        )  # [N, 3, G, G]
    number, anchor, row, column = pairs
    image, objects = targets[number, 0].long(), cxcywh_to_xyxy(targets[number, 2:6])
    boxes = decode_boxes(level[image, anchor, row, column, 1:5], column, row, anchors[anchor], grid)
    boxes = cxcywh_to_xyxy(boxes)
    low, high = (
        torch.maximum(boxes[..., :2], objects[..., :2]),
        torch.minimum(boxes[..., 2:], objects[..., 2:]),
    )
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) + targets[number, 4] * targets[number, 5]
    above = intersection > IGNORE_IOU * (areas - intersection)
    cell = ((image * 3 + anchor) * grid + row) * grid + column
    mask = torch.zeros(
        level[..., 0].numel() + 1, dtype=torch.bool, device=level.device
    )  # the last: no cell
    mask.scatter_(0, torch.where(above, cell, len(mask) - 1).flatten(), True)
    return mask[:-1].view(level.shape[:4])


def _ignore_candidates(level: Tensor, targets: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
    """Pairs of an object and a prediction that can have IoU above 0.5: target, anchor, row and column, int64 [P] each.

    IoU > 0.5 requires |dx| / w + |dy| / h < 0.5 for the distance of the centres and the object's w and h, and ratios of
    the widths and of the heights between 0.5 and 2. The bounds here are slightly wider, for rounding.
    """
    grid = level.shape[2]
    cells, centre = torch.arange(grid), targets[:, 2:4, None] * grid
    distance = (
        torch.maximum(cells - centre, centre - cells - 1).clamp(min=0) - 0.01
    )  # of the nearest point in a column, row
    distance = distance / (targets[:, 4:6, None] * grid)  # [N, 2, G]
    number, row, column = (distance[:, 0, None] + distance[:, 1, :, None] < 0.5).nonzero(
        as_tuple=True
    )
    cell = (targets[:, 0].long()[number] * grid + row) * grid + column
    log_scale = (
        level[..., 3:5]
        .permute(0, 2, 3, 1, 4)
        .reshape(-1, 6)
        .index_select(0, cell)
        .float()
        .clamp(max=MAX_LOG_SCALE)
    )
    log_ratio = log_scale + (anchors / targets[:, None, 4:6]).log().flatten(1).index_select(
        0, number
    )
    fits = (log_ratio.abs() < math.log(2) + 1e-3).unflatten(1, (3, 2))
    pair, anchor = (fits[..., 0] & fits[..., 1]).nonzero(as_tuple=True)
    return number[pair], anchor, row[pair], column[pair]


def complete_iou_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Complete IoU loss of boxes cxcywh [N, 4] -> [N], and their IoU [N]; Zheng et al. 2020, https://arxiv.org/abs/1911.08287.

    The loss equals torchvision's complete_box_iou_loss, which selects the boxes that intersect and so makes a GPU wait.
    """
    corners, target_corners = cxcywh_to_xyxy(predictions), cxcywh_to_xyxy(targets)
    larger, smaller = torch.maximum(corners, target_corners), torch.minimum(corners, target_corners)
    inter_w, inter_h = (smaller[:, 2:] - larger[:, :2]).clamp(min=0).unbind(dim=1)
    intersection = inter_w * inter_h
    areas = predictions[:, 2] * predictions[:, 3] + targets[:, 2] * targets[:, 3]
    iou = intersection / (areas - intersection + EPSILON)
    diagonal = (larger[:, 2:] - smaller[:, :2]).square().sum(dim=1)  # squared, of the enclosing box
    distance = (predictions[:, :2] - targets[:, :2]).square().sum(dim=1) / (diagonal + EPSILON)
    angle = torch.atan(targets[:, 2] / targets[:, 3]) - torch.atan(
        predictions[:, 2] / predictions[:, 3]
    )
    shape = 4 / math.pi**2 * angle.square()
    trade_off = (shape / (1 - iou + shape + EPSILON)).detach()
    return 1 - iou + distance + trade_off * shape, iou


class YOLOLoss(nn.Module):
    """Box (complete IoU), objectness and class loss, each summed over the scales and divided by the positives.

    forward(logits: three [B, 3, G, G, 5 + C], targets [N, 6], anchors [3, 3, 2]) -> dict of scalars
    "loss", "box", "objectness", "background", "class". Computed in float32. Classes are independent
    logistic outputs (YOLOv3, section 2.2). The objectness target of a positive is the IoU of its box (YOLO, Redmon
    et al. 2016, section 2: confidence is Pr(object) * IoU), so the best of an object's three predictions scores
    best. The target of the background is 0; predictions under the `ignore_mask` have none.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        grids = [level.shape[2] for level in logits]
        assigned = assign_targets(targets, grids, anchors, len(logits[0]))
        masks = [
            ignore_mask(level, targets, sizes) for level, sizes in zip(logits, anchors, strict=True)
        ]
        no_object = sum(map(self._background, logits, assigned, masks))
        sums = torch.stack((*self._positives(logits, assigned, targets, anchors), no_object))
        box, positive, label, no_object = sums / max(1, 3 * len(targets))
        loss = self.config.box_weight * box + self.config.objectness_weight * positive
        loss = loss + self.config.background_weight * no_object + self.config.class_weight * label
        terms = {
            "box": box,
            "objectness": positive,
            "background": no_object,
            "class": label,
        }
        return {"loss": loss, **terms}

    @staticmethod
    def _background(level: Tensor, assigned: Assigned, mask: Tensor) -> Tensor:
        """Sum over the background of one scale; softplus is the cross entropy of a logit with target 0."""
        cost = softplus(level[..., 0].float().contiguous())
        return cost.masked_fill(assigned.positive | mask, 0).sum()

    @staticmethod
    def _objectness(logit: Tensor, iou: Tensor) -> Tensor:
        """Cross entropy of the positives' objectness logits [n] with their boxes' IoU [n] as target."""
        return softplus(-logit) + (1 - iou.detach()) * logit

    def _positives(
        self, logits: list[Tensor], assigned: list[Assigned], targets: Tensor, anchors: Tensor
    ) -> Tensor:
        """Sums over the positives of all scales, 3 N rows at once: box, objectness and class terms, [3]."""
        scales = range(len(logits))
        rows = torch.cat(
            [assigned[scale].gather(logits[scale]) for scale in scales]
        ).float()  # [3 N, 5 + C]
        column, row, valid = (
            torch.cat([getattr(part, name) for part in assigned])
            for name in ("column", "row", "valid")
        )
        anchor = torch.cat([anchors[scale][assigned[scale].anchor] for scale in scales])
        grid = torch.cat(
            [torch.full_like(targets[:, 0], logits[scale].shape[2]) for scale in scales]
        )
        boxes = decode_boxes(rows[:, 1:5], column, row, anchor, grid)
        targets = targets.repeat(len(logits), 1)
        box, iou = complete_iou_loss(boxes, targets[:, 2:6])
        classes = (targets[:, 1:2] == torch.arange(rows.shape[1] - 5, device=rows.device)).float()
        label = bce(rows[:, 5:], classes, reduction="none").sum(dim=1)
        return (torch.stack((box, self._objectness(rows[:, 0], iou), label)) * valid).sum(dim=1)
