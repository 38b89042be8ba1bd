"""Box conversions, decoding of logits, and non-maximum suppression."""

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

MAX_LOG_SCALE = math.log(1000 / 16)  # bounds exp(w), exp(h), as torchvision's detectors do
PRE_NMS_TOPK = 1000  # predictions of an image that NMS compares


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) -> (left, top, right, bottom); any unit."""
    return box_convert(boxes, "cxcywh", "xyxy")


def decode_boxes(offsets: Tensor, column: Tensor, row: Tensor, anchor: Tensor, grid: int) -> Tensor:
    """Apply the paper's box equations (YOLOv3, section 2.1) in float32.

    offsets [..., 4]: the network's x, y, w, h. column, row [...]: the cell. anchor [..., 2]: width
    and height in 0..1 of the image. grid: cells per side.
    Returns boxes [..., 4] cxcywh in 0..1 of the image.
    """
    offsets = offsets.float()
    centre_x = (offsets[..., 0].sigmoid() + column) / grid
    centre_y = (offsets[..., 1].sigmoid() + row) / grid
    size = offsets[..., 2:4].clamp(max=MAX_LOG_SCALE).exp() * anchor
    return torch.cat((centre_x[..., None], centre_y[..., None], size), dim=-1)


def cell_boxes(level: Tensor, anchors: Tensor) -> Tensor:
    """Decode the boxes of one scale -> [B, A, G, G, 4] xyxy in 0..1.

    level [B, A, G, G, 5 + C], anchors [A, 2].
    """
    grid = level.shape[2]
    column = torch.arange(grid, device=level.device)  # [G]
    row = column[:, None]  # [G, 1]
    boxes = decode_boxes(level[..., 1:5], column, row, anchors[:, None, None], grid)
    return cxcywh_to_xyxy(boxes)


def decode(logits: list[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Decode every prediction, largest stride first, each scale in the order anchor, row, column.

    logits: one [B, A, G, G, 5 + C] per scale. anchors [scales, A, 2] in 0..1 of the image.
    Returns boxes [B, K, 4] xyxy in 0..1 (not clipped) and scores [B, K, C]: objectness times
    class probability.
    """
    boxes, scores = [], []
    for level, sizes in zip(logits, anchors.to(logits[0].device), strict=True):  # sizes [A, 2]
        objectness = level[..., :1].float().sigmoid()  # [B, A, G, G, 1]
        probabilities = level[..., 5:].float().sigmoid()  # [B, A, G, G, C]
        score = objectness * probabilities  # [B, A, G, G, C]
        box = cell_boxes(level, sizes)  # [B, A, G, G, 4]
        boxes.append(box.flatten(1, 3))  # [B, A * G * G, 4]
        scores.append(score.flatten(1, 3))  # [B, A * G * G, C]
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)


def nms(
    boxes: Tensor,
    scores: Tensor,
    confidence: float,
    iou_threshold: float,
    max_detections: int = 300,
) -> tuple[Tensor, Tensor]:
    """Apply non-maximum suppression per class to the predictions of one image.

    boxes [K, 4] xyxy, scores [K, C]. A prediction has one label, its best class, and is dropped
    unless that score is above `confidence`. Of two predictions with the same label and an IoU above
    `iou_threshold`, the better is kept.
    The best PRE_NMS_TOPK are compared, and at most `max_detections` returned, best first.
    Returns (index into K [n], label [n]).
    """
    best, label = scores.max(dim=1)  # [K], [K]
    index = torch.nonzero(best > confidence).flatten()  # [k]
    if len(index) > PRE_NMS_TOPK:
        index = index[best[index].topk(PRE_NMS_TOPK).indices]
    kept = batched_nms(boxes[index], best[index], label[index], iou_threshold)  # best first
    index = index[kept[:max_detections]]  # [n]
    return index, label[index]
