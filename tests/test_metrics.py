"""Accuracies and average precision, compared with plain loops and pycocotools."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from src.model.boxes import decode
from src.model.network import ANCHORS
from src.training.metrics import (
    THRESHOLDS,
    CellAccuracy,
    DetectionAccumulator,
    coco_average_precision,
    confusion,
    match,
    mean_average_precision,
    per_class_table,
)
from tests.test_boxes import iou, slow_nms
from tests.test_loss import GRIDS, loop_assign, random_logits, random_targets

ANCHOR = torch.tensor(ANCHORS)
NAMES = ("a", "b", "c")
METHODS = {"ap": "area", "ap_11pt": "11pt", "ap_course": "course"}  # of each column


def test_cell_accuracies_equal_the_loop():
    metric, outcomes = CellAccuracy(), defaultdict(list)
    for seed in range(3):
        targets = random_targets(12, images=2, seed=seed)
        logits = [3 * level.detach() for level in random_logits(2, seed)]
        metric.update(logits, targets, ANCHOR)
        for level, grid, anchors in zip(logits, GRIDS, ANCHOR, strict=True):
            positives, ignored = loop_assign(targets, grid, anchors)
            for place in map(tuple, torch.ones(level.shape[:4]).nonzero().tolist()):
                logit, _, _, _, _, *classes = level[place].tolist()
                if place in positives:
                    label = int(targets[positives[place], 1])
                    outcomes["class"].append(classes[label] == max(classes))
                for threshold in THRESHOLDS if place not in ignored else ():
                    above = 1 / (1 + math.exp(-logit)) > threshold
                    name = "object" if place in positives else "no_object"
                    outcomes[f"{name}@{threshold}"].append(above == (place in positives))
    expected = {name: np.mean(values) for name, values in outcomes.items()}
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(expected)


def random_results(seed: int, images: int = 12):
    """Correct, duplicate and wrong detections with ground truth, as of DetectionAccumulator."""
    random = np.random.default_rng(seed)
    ground_truth, predictions = [], []
    for image in range(images):
        for _ in range(random.integers(0, 6)):
            corner, label = random.uniform(0, 0.6, 2), random.integers(3)
            box = np.r_[corner, corner + random.uniform(0.1, 0.4, 2)]
            ground_truth.append([image, label, random.random() < 0.2, *box])
            for _ in range(random.integers(0, 4)):
                other = random.integers(3) if random.random() < 0.2 else label
                predictions.append(
                    [image, other, random.uniform(0.02, 1), *(box + random.normal(0, 0.03, 4))]
                )
        corner = random.uniform(0, 0.6, 2)
        predictions.append(
            [image, random.integers(3), random.uniform(0.02, 1), *corner, *(corner + 0.2)]
        )
    return np.float32(predictions), np.float32(ground_truth)


def loop_curve(predictions, ground_truth, label, course):
    """Evaluate as VOC's devkit or the course, one by one -> [(precision, recall)]."""
    objects = [t for t in ground_truth if t[1] == label]
    total = sum(1 for o in objects if course or not o[2])
    taken, curve = set(), []
    detections = [f for f in predictions if f[1] == label and (not course or f[2] > 0.05)]
    for row in sorted(detections, key=lambda f: -f[2]):
        ious = [iou(row[3:], t[3:]) if t[0] == row[0] else 0 for t in objects]
        best = max(range(len(objects)), key=lambda number: ious[number], default=None)
        hit = bool(objects) and (ious[best] > 0.5 if course else ious[best] >= 0.5)
        if not hit or course or not objects[best][2]:
            taken |= {best} if hit else set()
            curve.append((len(taken) / (len(curve) + 1), len(taken) / max(total, 1)))
    return curve, total


def loop_average_precision(curve, method):
    if method == "11pt":
        levels = [t / 10 - 1e-9 for t in range(11)]
        return sum(max([p for p, r in curve if r >= level], default=0) for level in levels) / 11
    area, last_recall, last_precision = 0.0, 0.0, 1.0
    for number, (precision, recall) in enumerate(curve):
        height = max(p for p, _ in curve[number:])
        if method == "course":
            height = (precision + last_precision) / 2
        area += (recall - last_recall) * height
        last_recall, last_precision = recall, precision
    return area


@pytest.mark.parametrize("seed", range(6))
def test_average_precisions_equal_the_loops(seed):
    predictions, ground_truth = random_results(seed)
    rows = predictions.tolist(), ground_truth.tolist()
    for label, row in enumerate(per_class_table(predictions, ground_truth, NAMES)):
        for column, method in METHODS.items():
            curve, total = loop_curve(*rows, label, method == "course")
            expected = loop_average_precision(curve, method)
            assert row[column] == pytest.approx(expected, abs=1e-5), (method, label)
            assert total == row["num_gt"] or method == "course"


def test_perfect_detections_no_detections_and_a_class_without_objects():
    _, ground_truth = random_results(0)
    perfect = ground_truth.copy()
    perfect[:, 2] = 0.9
    cases = (
        (perfect, ground_truth, 1),
        (perfect[:0], ground_truth, 0),
        (perfect, perfect[:0], 0),
        (perfect, ground_truth[ground_truth[:, 1] > 0], 1),  # false detections of a class without
    )
    for predictions, objects, expected in cases:
        table = per_class_table(predictions, objects, NAMES)
        for column in METHODS:
            assert mean_average_precision(table, column) == pytest.approx(expected)


def as_coco(row: list[float], number: int) -> dict:
    """A row as an annotation of pycocotools; its third value is the score, or `iscrowd`."""
    image, label, third, x1, y1, x2, y2 = row
    width, height = 1000 * (x2 - x1), 1000 * (y2 - y1)
    box = {"bbox": [1000 * x1, 1000 * y1, width, height], "area": width * height}
    place = {"id": 1 + number, "image_id": int(image), "category_id": int(label)}
    return {**place, **box, "iscrowd": int(third), "score": third}


def test_coco_equals_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions, ground_truth = random_results(1)
    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": i} for i in range(3)],
        "annotations": list(map(as_coco, ground_truth.tolist(), range(len(ground_truth)))),
    }
    dataset.createIndex()
    results = dataset.loadRes(list(map(as_coco, predictions.tolist(), range(len(predictions)))))
    evaluation = COCOeval(dataset, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = coco_average_precision(predictions, ground_truth)
    assert values["COCO AP@.5:.95"] == pytest.approx(evaluation.stats[0], abs=1e-4)
    assert values["COCO AP@.5"] == pytest.approx(evaluation.stats[1], abs=1e-4)


def test_accumulator_equals_slow_nms():
    accumulator, rows, truth = DetectionAccumulator(), [], []
    for batch in range(2):
        logits = random_logits(2, seed=batch, grids=(1, 2, 4))
        targets = random_targets(4, images=2, seed=batch)
        accumulator.update(logits, targets, torch.tensor([True, False, False, True]), ANCHOR)
        for image, (boxes, scores) in enumerate(zip(*decode(logits, ANCHOR), strict=True)):
            kept = slow_nms(boxes.tolist(), scores.tolist(), 0.01, 0.45)[:100]
            for k, label in kept:
                clipped = boxes[k].clamp(0, 1).tolist()
                rows.append([2 * batch + image, label, scores[k, label].item(), *clipped])
        for (image, label, cx, cy, w, h), hard in zip(targets.tolist(), (1, 0, 0, 1), strict=True):
            edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            truth.append([2 * batch + image, label, hard, *edges])
    predictions, ground_truth = accumulator.compute()
    np.testing.assert_allclose(predictions, rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ground_truth, truth, rtol=1e-5, atol=1e-6)


def test_confusion_matrix_of_a_written_example():
    left, right = (0, 0, 0.4, 1), (0.6, 0, 1, 1)
    small = (0, 0, 0.16, 1)  # its IoU with left is 0.4
    ground_truth = np.float32(
        [[0, 0, 0, *left], [0, 1, 0, *right], [1, 1, 0, *left], [2, 0, 0, *left], [2, 1, 1, *right]]
    )
    predictions = np.float32(
        [
            [0, 0, 0.9, *left],
            [0, 0, 0.8, *left],  # right, and again
            [0, 0, 0.7, *right],  # class 1 taken for class 0
            [1, 1, 0.9, *small],  # too small
            [1, 1, 0.1, *left],  # below the threshold
        ]
    )
    # of image 2 nothing is found: one object is missed, and the difficult one doesn't count
    expected = [[1, 0, 1], [1, 0, 1], [1, 1, 0]]
    assert confusion(predictions, ground_truth, 2).tolist() == expected


@pytest.mark.parametrize("size", [96, 300, 416, 500, 1000])
def test_an_iou_of_exactly_half_is_kept_in_fractions(size):
    """VOC counts an IoU of 0.5, the course does not."""
    for left in range(0, 40, 3):
        ground_truth = np.float32([[0, 0, 0, *(np.array([left, 7, left + 50, 47]) / size)]])
        predictions = np.float32([[0, 0, 0.9, *(np.array([left, 7, left + 25, 47]) / size)]])
        assert match(predictions, ground_truth)[1].tolist() == [0.5]
        row = per_class_table(predictions, ground_truth, ("a",))[0]
        assert row["ap"] == 1 and row["ap_course"] == 0
