"""Which prediction answers for which object, and what it costs to be wrong."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torchvision.ops import complete_box_iou_loss

from src.boxes import cxcywh_to_xyxy, decode_boxes
from src.config import Config

IGNORE_OVERLAP = 0.5


@dataclass(frozen=True)
class Assigned:
    """The positives of one scale, one row a target, and the cells that are no background."""

    image: Tensor  # int64 [N]
    anchor: Tensor  # int64 [N]
    row: Tensor  # int64 [N]
    column: Tensor  # int64 [N]
    owner: Tensor  # bool [N]: False where another object has the same cell and anchor
    positive: Tensor  # bool [B, 3, G, G]
    ignored: Tensor  # bool [B, 3, G, G]: not positive, but overlaps an object's shape by more than 0.5

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
    image = targets[:, 0].long()
    assigned = []
    for grid, scale_anchors in zip(grids, anchors, strict=True):
        overlap = shape_overlap(targets[:, 4:6], scale_anchors)  # [N, 3]
        anchor = overlap.argmax(dim=1)
        column, row = (targets[:, 2:4] * grid).long().clamp(0, grid - 1).unbind(dim=1)
        cell = (image * 3 * grid + row) * grid + column  # flat index of anchor 0
        place = cell + anchor * grid * grid
        number = torch.arange(1, len(targets) + 1, device=targets.device)
        last = torch.zeros(batch * 3 * grid * grid, dtype=torch.long, device=targets.device)
        last.scatter_reduce_(0, place, number, "amax")
        near = torch.zeros_like(last)
        for other in range(3):
            near.scatter_reduce_(0, cell + other * grid * grid, (overlap[:, other] > IGNORE_OVERLAP).long(), "amax")
        positive = (last > 0).view(batch, 3, grid, grid)
        ignored = (near > 0).view(batch, 3, grid, grid) & ~positive
        assigned.append(Assigned(image, anchor, row, column, last[place] == number, positive, ignored))
    return assigned


class YOLOLoss(nn.Module):
    """Box (complete IoU), objectness and class loss, each summed over the scales and divided by the positives.

    forward(logits: three [B, 3, G, G, 5 + C], targets [N, 6], anchors [3, 3, 2]) -> dict of scalars
    "loss", "box", "object", "no_object", "class". Computed in float32. Classes are independent logistic
    outputs (YOLOv3, section 2.2); complete IoU is Zheng et al. 2020, https://arxiv.org/abs/1911.08287.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.box_weight, self.object_weight = config.box_weight, config.object_weight
        self.class_weight, self.smoothing = config.class_weight, config.label_smoothing

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        grids = [level.shape[2] for level in logits]
        total = torch.zeros(4, device=targets.device)
        for level, found, scale_anchors in zip(
            logits, assign_targets(targets, grids, anchors, len(logits[0])), anchors, strict=True
        ):
            total = total + self._scale(level, found, scale_anchors, targets)
        box, positive, background, label = total / max(1, 3 * len(targets))
        loss = self.box_weight * box + self.object_weight * (positive + background) + self.class_weight * label
        return {"loss": loss, "box": box, "object": positive, "no_object": background, "class": label}

    def _scale(self, level: Tensor, found: Assigned, anchors: Tensor, targets: Tensor) -> Tensor:
        """Sums over one scale: box, object, background and class terms, [4]."""
        objectness = level[..., 0].float()
        background = bce(objectness, torch.zeros_like(objectness), reduction="none")
        background = (background * ~(found.positive | found.ignored)).sum()
        own = found.owner.float()
        rows = found.gather(level).float()  # [N, 5 + C]
        boxes = decode_boxes(rows[:, 1:5], found.column, found.row, anchors[found.anchor], level.shape[2])
        box = complete_box_iou_loss(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets[:, 2:6]), reduction="none")
        positive = bce(rows[:, 0], torch.ones_like(rows[:, 0]), reduction="none")
        wanted = nn.functional.one_hot(targets[:, 1].long(), rows.shape[1] - 5).float()
        wanted = wanted * (1 - self.smoothing) + self.smoothing / wanted.shape[1]
        label = bce(rows[:, 5:], wanted, reduction="none").sum(dim=1)
        return torch.stack(((box * own).sum(), (positive * own).sum(), background, (label * own).sum()))
