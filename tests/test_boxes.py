"""Decoding and NMS, compared with loops."""

import math

import torch

from src.model.boxes import cxcywh_to_xyxy, decode, decode_above, nms
from src.model.network import ANCHORS

ANCHOR = torch.tensor(ANCHORS)


def test_conversion_to_corners():
    assert cxcywh_to_xyxy(torch.tensor([[3.0, 6, 4, 8]])).tolist() == [[1, 2, 5, 10]]


def test_decode_equals_the_papers_equations():
    logits = [torch.randn(2, 3, g, g, 7) for g in (1, 2, 4)]
    boxes, scores = decode(logits, ANCHOR)
    k = 0
    for scale, level in enumerate(logits):
        grid = level.shape[2]
        for anchor in range(3):
            for row in range(grid):
                for column in range(grid):
                    o, x, y, w, h, *classes = level[1, anchor, row, column].tolist()
                    cx, cy = (
                        (column + 1 / (1 + math.exp(-x))) / grid,
                        (row + 1 / (1 + math.exp(-y))) / grid,
                    )
                    bw, bh = (
                        math.exp(s) * a for s, a in zip((w, h), ANCHORS[scale][anchor], strict=True)
                    )
                    expected = torch.tensor([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
                    torch.testing.assert_close(boxes[1, k], expected, rtol=1e-4, atol=1e-5)
                    expected = [1 / (1 + math.exp(-o)) / (1 + math.exp(-c)) for c in classes]
                    torch.testing.assert_close(
                        scores[1, k], torch.tensor(expected), rtol=1e-4, atol=1e-6
                    )
                    k += 1
    assert k == boxes.shape[1] == scores.shape[1]


def test_decode_does_not_overflow_half_precision():
    boxes, scores = decode(
        [torch.full((1, 3, g, g, 6), 60000.0, dtype=torch.float16) for g in (1, 2, 4)], ANCHOR
    )
    assert boxes.dtype == torch.float32 and boxes.isfinite().all() and scores.isfinite().all()


def test_decode_above_equals_decode_of_all_cells():
    logits = [torch.randn(3, 3, g, g, 7) for g in (1, 2, 4)]
    boxes, scores = decode(logits, ANCHOR)
    above = torch.cat([level[..., 0].flatten(1) for level in logits], dim=1).sigmoid() > 0.7
    assert 0 < above.sum() < above.numel() / 2
    for image, (some_boxes, some_scores) in enumerate(decode_above(logits, ANCHOR, 0.7)):
        torch.testing.assert_close(some_boxes, boxes[image][above[image]])
        torch.testing.assert_close(some_scores, scores[image][above[image]])
        assert (scores[image][~above[image]] <= 0.7).all()


def slow_nms(boxes, scores, confidence, iou_threshold):
    """Greedy, one box at a time."""
    order = sorted(range(len(boxes)), key=lambda k: -max(scores[k]))
    kept = []
    for k in order:
        label = scores[k].index(max(scores[k]))
        if max(scores[k]) <= confidence:
            continue
        for other, other_label in kept:
            a, b = boxes[k], boxes[other]
            intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
                0, min(a[3], b[3]) - max(a[1], b[1])
            )
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
            if other_label == label and intersection / union > iou_threshold:
                break
        else:
            kept.append((k, label))
    return kept


def test_nms_equals_a_loop():
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        corner = torch.rand(60, 2, generator=random) * 0.5
        boxes = torch.cat((corner, corner + 0.1 + torch.rand(60, 2, generator=random) * 0.4), dim=1)
        scores = torch.rand(60, 3, generator=random)
        index, labels = nms(boxes, scores, 0.4, 0.45)
        assert list(zip(index.tolist(), labels.tolist(), strict=True)) == slow_nms(
            boxes.tolist(), scores.tolist(), 0.4, 0.45
        )


def test_nms_without_predictions():
    index, labels = nms(torch.zeros(0, 4), torch.zeros(0, 3), 0.1, 0.5)
    assert len(index) == len(labels) == 0
