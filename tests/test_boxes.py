"""Decoding and NMS, compared with loops."""

import math
from itertools import product

import pytest
import torch

from src.model.boxes import cxcywh_to_xyxy, decode, nms
from src.model.network import ANCHORS

ANCHOR = torch.tensor(ANCHORS)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_conversion_to_corners():
    assert cxcywh_to_xyxy(torch.tensor([[3.0, 6, 4, 8]])).tolist() == [[1, 2, 5, 10]]


def test_decode_equals_the_papers_equations():
    logits = [torch.randn(2, 3, g, g, 7) for g in (1, 2, 4)]
    expected_boxes, expected_scores = [], []
    for level, anchors in zip(logits, ANCHORS, strict=True):
        grid = level.shape[2]
        for anchor, row, column in product(range(3), range(grid), range(grid)):
            o, x, y, w, h, *classes = level[1, anchor, row, column].tolist()
            cx, cy = (column + sigmoid(x)) / grid, (row + sigmoid(y)) / grid
            bw, bh = math.exp(w) * anchors[anchor][0], math.exp(h) * anchors[anchor][1]
            expected_boxes.append([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
            expected_scores.append([sigmoid(o) * sigmoid(c) for c in classes])
    boxes, scores = decode(logits, ANCHOR)
    torch.testing.assert_close(boxes[1], torch.tensor(expected_boxes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[1], torch.tensor(expected_scores), rtol=1e-4, atol=1e-6)


def test_decode_does_not_overflow_half_precision():
    logits = [torch.full((1, 3, g, g, 6), 60000.0, dtype=torch.float16) for g in (1, 2, 4)]
    boxes, scores = decode(logits, ANCHOR)
    assert boxes.dtype == torch.float32 and boxes.isfinite().all() and scores.isfinite().all()


def iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_nms(boxes, scores, confidence, iou_threshold):
    """Greedy, one box at a time -> [(index, label)]."""
    kept = []
    for k in sorted(range(len(boxes)), key=lambda k: -max(scores[k]))[:1000]:
        label = scores[k].index(max(scores[k]))
        rivals = [other for other, other_label in kept if other_label == label]
        is_new = all(iou(boxes[k], boxes[other]) <= iou_threshold for other in rivals)
        if is_new and max(scores[k]) > confidence:
            kept.append((k, label))
    return kept


@pytest.mark.parametrize(
    "count, seed, limit", [(0, 0, 300), (1, 0, 300), (60, 1, 300), (60, 2, 5), (1500, 3, 300)]
)
def test_nms_equals_a_loop(count, seed, limit):
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 0.5
    size = 0.1 + torch.rand(count, 2, generator=random) * 0.4
    boxes = torch.cat((corner, corner + size), dim=1)
    scores = torch.rand(count, 3, generator=random)
    index, labels = nms(boxes, scores, 0.4, 0.45, limit)
    expected = slow_nms(boxes.tolist(), scores.tolist(), 0.4, 0.45)[:limit]
    assert list(zip(index.tolist(), labels.tolist(), strict=True)) == expected
