"""Which prediction answers for which object, and what it costs to be wrong."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from src.config import Config
from src.model.boxes import cell_boxes, cxcywh_to_xyxy, decode_boxes

IGNORE_OVERLAP = 0.5


EPSILON = 1e-7


@dataclass(frozen=True)
class Assigned:
    """The positives of one scale, one row a target, and which cells no accuracy counts."""

    image: Tensor  # int64 [N]
    anchor: Tensor  # int64 [N]
    row: Tensor  # int64 [N]
    column: Tensor  # int64 [N]
    owner: Tensor  # bool [N]: False where another object has the same cell and anchor
    positive: Tensor  # bool [B, 3, G, G]
    ignored: Tensor  # bool [B, 3, G, G]: not positive, but its anchor overlaps an object's shape by more than 0.5; not rated

    def gather(self, level: Tensor) -> Tensor:
        """level [B, 3, G, G, F] -> the rows of the positives [N, F]."""
        return level[self.image, self.anchor, self.row, self.column]


def shape_overlap(sides: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes that share their centre: sides [N, 2], anchors [A, 2] (same unit) -> [N, A]."""
    shared = torch.minimum(sides[:, None], anchors).prod(dim=-1)
    return shared / (sides.prod(dim=-1)[:, None] + anchors.prod(dim=-1) - shared)


def assign_targets(targets: Tensor, grids: list[int], anchors: Tensor, batch: int) -> list[Assigned]:
    """One positive a scale for every object: the anchor of best shape overlap, in the cell of its centre.

    targets float32 [N, 6]: image index, class, cx, cy, w, h in 0..1; grids: cells a side on each scale;
    anchors [3, 3, 2] in sides of the image; batch: number of images. Of objects that want the same cell and
    anchor the last has it. All shapes are known beforehand, so a GPU is never waited for.
    """
    image, cells, columns, rows = targets[:, 0].long(), [], [], []
    sizes = [batch * 3 * grid * grid for grid in grids]
    for number, grid in enumerate(grids):
        column, row = (targets[:, 2:4] * grid).long().clamp(0, grid - 1).unbind(dim=1)
        first = (image * 3 * grid + row) * grid + column + sum(sizes[:number])  # in a list of all cells of all scales
        cells.append(torch.stack((first, first + grid * grid, first + 2 * grid * grid), dim=1))
        columns.append(column)
        rows.append(row)
    cells = torch.stack(cells)  # [scales, N, 3]: the cell of each anchor
    overlap = shape_overlap(targets[:, 4:6], anchors.flatten(0, 1)).unflatten(1, (-1, 3)).transpose(0, 1)
    anchor = overlap.argmax(dim=2)  # [scales, N]
    place = cells.gather(2, anchor[..., None]).squeeze(2)
    owner = ~(place[:, :, None] == place[:, None]).triu(1).any(dim=2)  # no later object has the same place
    positive, ignored = torch.zeros(2, sum(sizes) + 1, dtype=torch.bool, device=targets.device)  # one more, for "none"
    positive.scatter_(0, place.flatten(), True)
    ignored.scatter_(0, torch.where(overlap > IGNORE_OVERLAP, cells, sum(sizes)).flatten(), True)
    ignored.scatter_(0, place.flatten(), False)
    shapes = [(batch, 3, grid, grid) for grid in grids]
    maps = [list(map(Tensor.view, flat[:-1].split(sizes), shapes)) for flat in (positive, ignored)]
    return [Assigned(image, *fields) for fields in zip(anchor, rows, columns, owner, *maps, strict=True)]


@torch.no_grad()
def near_objects(level: Tensor, targets: Tensor, anchors: Tensor) -> Tensor:
    """Which cells of one scale predict a box that overlaps an object of their image by more than 0.5: bool [B, 3, G, G].

    Darknet's rule (yolo_layer.c, ignore_thresh). level [B, 3, G, G, 5 + C]; targets as in `assign_targets`; anchors [3, 2].
    """
    image, wanted = targets[:, 0].long(), cxcywh_to_xyxy(targets[:, 2:6])
    left, top, right, bottom = cell_boxes(level, anchors).flatten(1, 3).unbind(dim=2)  # [B, K]; those of image: [N, K]
    across = torch.minimum(right[image], wanted[:, 2:3]) - torch.maximum(left[image], wanted[:, 0:1])
    down = torch.minimum(bottom[image], wanted[:, 3:4]) - torch.maximum(top[image], wanted[:, 1:2])
    shared = across.clamp(min=0) * down.clamp(min=0)
    areas = ((right - left) * (bottom - top))[image] + targets[:, 4:5] * targets[:, 5:6]
    near = shared > IGNORE_OVERLAP * (areas - shared)
    return torch.zeros_like(left).index_add(0, image, near.float()).view(level.shape[:-1]) > 0


def complete_iou_loss(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Complete IoU loss of boxes cxcywh [N, 4] -> [N], and their IoU [N]; Zheng et al. 2020, https://arxiv.org/abs/1911.08287.

    The loss equals torchvision's complete_box_iou_loss, which selects the boxes that meet and so makes a GPU wait.
    """
    corners, wanted_corners = cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted)
    larger, smaller = torch.maximum(corners, wanted_corners), torch.minimum(corners, wanted_corners)
    across, down = (smaller[:, 2:] - larger[:, :2]).clamp(min=0).unbind(dim=1)
    shared = across * down
    iou = shared / (found[:, 2] * found[:, 3] + wanted[:, 2] * wanted[:, 3] - shared + EPSILON)
    diagonal = (larger[:, 2:] - smaller[:, :2]).square().sum(dim=1)
    apart = (found[:, :2] - wanted[:, :2]).square().sum(dim=1) / (diagonal + EPSILON)
    angle = torch.atan(wanted[:, 2] / wanted[:, 3]) - torch.atan(found[:, 2] / found[:, 3])
    shape = 4 / math.pi**2 * angle.square()
    trade = (shape / (1 - iou + shape + EPSILON)).detach()
    return 1 - iou + apart + trade * shape, iou


class YOLOLoss(nn.Module):
    """Box (complete IoU), objectness and class loss, each summed over the scales and divided by the positives.

    forward(logits: three [B, 3, G, G, 5 + C], targets [N, 6], anchors [3, 3, 2]) -> dict of scalars
    "loss", "box", "object", "no_object", "class". Computed in float32. Classes are independent logistic
    outputs (YOLOv3, section 2.2). A positive's objectness should be its box's IoU (YOLO, Redmon et al. 2016,
    section 2: confidence is Pr(object) * IoU): of an object's three predictions the best box then scores best.
    Others cost nothing where they do find an object (`near_objects`), and else for every bit of objectness.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.box_weight, self.object_weight = config.box_weight, config.object_weight
        self.no_object_weight = config.no_object_weight
        self.class_weight, self.smoothing = config.class_weight, config.label_smoothing

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        grids = [level.shape[2] for level in logits]
        found = assign_targets(targets, grids, anchors, len(logits[0]))
        near = [near_objects(level, targets, sides) for level, sides in zip(logits, anchors, strict=True)]
        background = sum(map(self._background, logits, found, near))
        terms = torch.stack((*self._positives(logits, found, targets, anchors), background))
        box, positive, label, background = terms / max(1, 3 * len(targets))
        loss = self.box_weight * box + self.object_weight * positive
        loss = loss + self.no_object_weight * background + self.class_weight * label
        return {"loss": loss, "box": box, "object": positive, "no_object": background, "class": label}

    @staticmethod
    def _background(level: Tensor, found: Assigned, near: Tensor) -> Tensor:
        """Sum over the background of one scale; softplus is the cross entropy of a logit whose answer is no."""
        cost = softplus(level[..., 0].float().contiguous())
        return cost.masked_fill(found.positive | near, 0).sum()

    @staticmethod
    def _confidence(logit: Tensor, overlap: Tensor) -> Tensor:
        """Cross entropy of positives' objectness, whose answer is the overlap of their boxes."""
        return softplus(-logit) + (1 - overlap.detach()) * logit

    def _positives(self, logits: list[Tensor], found: list[Assigned], targets: Tensor, anchors: Tensor) -> Tensor:
        """Sums over the positives of all scales, 3 N rows at once: box, object and class terms, [3]."""
        scales = range(len(logits))
        rows = torch.cat([found[scale].gather(logits[scale]) for scale in scales]).float()  # [3 N, 5 + C]
        column, row, own = (torch.cat([getattr(part, name) for part in found]) for name in ("column", "row", "owner"))
        anchor = torch.cat([anchors[scale][found[scale].anchor] for scale in scales])
        grid = torch.cat([torch.full_like(targets[:, 0], logits[scale].shape[2]) for scale in scales])
        boxes = decode_boxes(rows[:, 1:5], column, row, anchor, grid)
        wanted = targets.repeat(len(logits), 1)
        box, overlap = complete_iou_loss(boxes, wanted[:, 2:6])
        classes = (wanted[:, 1:2] == torch.arange(rows.shape[1] - 5, device=rows.device)).float()
        classes = classes * (1 - self.smoothing) + self.smoothing / classes.shape[1]
        label = bce(rows[:, 5:], classes, reduction="none").sum(dim=1)
        return (torch.stack((box, self._confidence(rows[:, 0], overlap), label)) * own).sum(dim=1)
