"""Accuracies and average precision, compared with plain loops and pycocotools."""

import math

import numpy as np
import pytest
import torch

from src.model.boxes import decode
from src.model.network import ANCHORS
from src.training.metrics import (
    AP_METHODS,
    THRESHOLDS,
    CellAccuracy,
    DetectionAccumulator,
    average_precision,
    coco_average_precision,
    confusion,
    match,
    mean_average_precision,
    per_class_table,
)
from tests.test_boxes import slow_nms
from tests.test_loss import GRIDS, loop_assign, random_targets

ANCHOR = torch.tensor(ANCHORS)
NAMES = ("a", "b", "c")


def test_cell_accuracies_equal_the_loop():
    metric, counts = (
        CellAccuracy(),
        dict.fromkeys(("positive", "background", "class", *THRESHOLDS, "no0", "no1"), 0),
    )
    for seed in range(3):
        targets = random_targets(12, images=2, seed=seed)
        logits = [
            torch.randn(2, 3, g, g, 9, generator=torch.Generator().manual_seed(seed)) * 2
            for g in GRIDS
        ]
        metric.update(logits, targets, ANCHOR)
        for scale, level in enumerate(logits):
            positives, ignored = loop_assign(targets, GRIDS[scale], ANCHOR[scale])
            for place in map(tuple, torch.ones(level.shape[:4]).nonzero().tolist()):
                cell = level[place].tolist()
                probability = 1 / (1 + math.exp(-cell[0]))
                if place in positives:
                    counts["positive"] += 1
                    counts["class"] += max(range(4), key=lambda c: cell[5 + c]) == int(
                        targets[positives[place], 1]
                    )
                    for threshold in THRESHOLDS:
                        counts[threshold] += probability > threshold
                elif place not in ignored:
                    counts["background"] += 1
                    for number, threshold in enumerate(THRESHOLDS):
                        counts[f"no{number}"] += probability <= threshold
    values = {name: value.item() for name, value in metric.compute().items()}
    expected = {"class": counts["class"] / counts["positive"]}
    for number, threshold in enumerate(THRESHOLDS):
        expected[f"object@{threshold}"] = counts[threshold] / counts["positive"]
        expected[f"no_object@{threshold}"] = counts[f"no{number}"] / counts["background"]
    assert values == pytest.approx(expected)


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


def iou(a, b):
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0, min(a[3], b[3]) - max(a[1], b[1])
    )
    return intersection / (
        (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    )


def loop_curve(predictions, ground_truth, label, course):
    """Evaluate as VOC's devkit or the course, one by one -> [(precision, recall)]."""
    objects = [t for t in ground_truth if t[1] == label]
    total = sum(1 for o in objects if course or not o[2])
    taken, true, false, curve = set(), 0, 0, []
    for row in sorted(
        (f for f in predictions if f[1] == label and (not course or f[2] > 0.05)),
        key=lambda f: -f[2],
    ):
        best, best_iou = None, 0.0
        for number, t in enumerate(objects):
            if t[0] == row[0] and iou(row[3:], t[3:]) > best_iou:
                best, best_iou = number, iou(row[3:], t[3:])
        if best is not None and (best_iou > 0.5 if course else best_iou >= 0.5):
            if not course and objects[best][2]:
                continue
            true, false = (true + 1, false) if best not in taken else (true, false + 1)
            taken.add(best)
        else:
            false += 1
        curve.append((true / (true + false), true / total if total else 0))
    return curve, total


def loop_average_precision(curve, method):
    if method == "11pt":
        return (
            sum(max([p for p, r in curve if r >= t / 10 - 1e-9], default=0) for t in range(11)) / 11
        )
    area, last_recall, last_precision = 0.0, 0.0, 1.0
    for number, (precision, recall) in enumerate(curve):
        height = (
            (precision + last_precision) / 2
            if method == "course"
            else max(p for p, _ in curve[number:])
        )
        area += (recall - last_recall) * height
        last_recall, last_precision = recall, precision
    return area


@pytest.mark.parametrize("seed", range(6))
def test_average_precisions_equal_the_loops(seed):
    predictions, ground_truth = random_results(seed)
    for label, row in enumerate(per_class_table(predictions, ground_truth, NAMES)):
        for column, method in AP_METHODS.items():
            curve, total = loop_curve(
                predictions.tolist(), ground_truth.tolist(), label, method == "course"
            )
            assert row[column] == pytest.approx(loop_average_precision(curve, method), abs=1e-5), (
                method,
                label,
            )
            if method == "area":
                assert row["num_gt"] == total


def test_perfect_detections_and_no_detections():
    _, ground_truth = random_results(0)
    perfect = ground_truth.copy()
    perfect[:, 2] = 0.9
    for column in AP_METHODS:
        assert mean_average_precision(
            per_class_table(perfect, ground_truth, NAMES), column
        ) == pytest.approx(1)
        assert (
            mean_average_precision(per_class_table(perfect[:0], ground_truth, NAMES), column) == 0
        )
    assert mean_average_precision(per_class_table(perfect, ground_truth[:0], NAMES)) == 0


def test_difficult_objects_count_neither_as_hits_nor_as_errors():
    ground_truth = np.float32([[0, 0, 0, 0.1, 0.1, 0.3, 0.3], [0, 0, 1, 0.5, 0.5, 0.9, 0.9]])
    predictions = np.float32([[0, 0, 0.9, 0.5, 0.5, 0.9, 0.9], [0, 0, 0.8, 0.1, 0.1, 0.3, 0.3]])
    for rows in (predictions, predictions[1:]):
        assert per_class_table(rows, ground_truth, ("a",))[0]["ap"] == pytest.approx(1)
    assert per_class_table(predictions[1:], ground_truth, ("a",))[0]["ap_course"] == pytest.approx(
        0.5
    )


def test_class_without_objects_does_not_enter_the_mean():
    ground_truth = np.float32([[0, 0, 0, 0.1, 0.1, 0.3, 0.3]])
    predictions = np.float32([[0, 0, 0.9, 0.1, 0.1, 0.3, 0.3], [0, 1, 0.9, 0.1, 0.1, 0.3, 0.3]])
    table = per_class_table(predictions, ground_truth, ("a", "b"))
    assert math.isnan(table[1]["ap"]) and mean_average_precision(table) == 1


def test_eleven_points_of_a_small_example():
    precision, recall = np.array([1, 1, 2 / 3]), np.array([0.25, 0.5, 0.5])
    assert average_precision(precision, recall, "11pt") == pytest.approx(6 / 11)
    assert average_precision(precision, recall, "area") == pytest.approx(0.5)


def test_coco_equals_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions, ground_truth = random_results(1)

    def as_coco(rows):
        boxes = [[v * 1000 for v in (r[3], r[4], r[5] - r[3], r[6] - r[4])] for r in rows.tolist()]
        return [
            {
                "id": n + 1,
                "image_id": int(r[0]),
                "category_id": int(r[1]),
                "bbox": b,
                "area": b[2] * b[3],
                "iscrowd": int(r[2]),
                "score": r[2],
            }
            for n, (r, b) in enumerate(zip(rows.tolist(), boxes, strict=True))
        ]

    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": i} for i in range(3)],
        "annotations": as_coco(ground_truth),
    }
    dataset.createIndex()
    evaluation = COCOeval(
        dataset, dataset.loadRes([d | {"iscrowd": 0} for d in as_coco(predictions)]), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = coco_average_precision(predictions, ground_truth)
    assert values["COCO AP@.5:.95"] == pytest.approx(evaluation.stats[0], abs=1e-4)
    assert values["COCO AP@.5"] == pytest.approx(evaluation.stats[1], abs=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The ``compute`` method"
)  # compute() is called without update() on purpose
def test_accumulator_equals_slow_nms():
    accumulator, rows = DetectionAccumulator(), []
    for batch in range(2):
        logits = [
            torch.randn(2, 3, g, g, 8, generator=torch.Generator().manual_seed(batch))
            for g in (1, 2, 4)
        ]
        targets = random_targets(4, images=2, classes=3, seed=batch)
        accumulator.update(logits, targets, torch.tensor([True, False, False, True]), ANCHOR)
        boxes, scores = decode(logits, ANCHOR)
        for image in range(2):
            kept = slow_nms(boxes[image].tolist(), scores[image].tolist(), 0.01, 0.45)[:100]
            rows += [
                [2 * batch + image, label, scores[image, k, label].item()] for k, label in kept
            ]
    predictions, ground_truth = accumulator.compute()
    np.testing.assert_allclose(predictions[:, :3], rows, rtol=1e-6)
    assert (
        ground_truth[:, 0].tolist() == sorted(ground_truth[:, 0])
        and ground_truth[:, 2].tolist() == [1, 0, 0, 1] * 2
    )
    accumulator.reset()
    assert [len(part) for part in accumulator.compute()] == [0, 0]


def test_confusion_matrix_counts_every_object_and_detection_once():
    predictions, ground_truth = random_results(2)
    counts = confusion(predictions, ground_truth, 3, confidence=0.25)
    assert (
        counts[:3].sum() <= len(ground_truth)
        and counts[:3].sum() >= (ground_truth[:, 2] == 0).sum()
    )
    assert counts[:, :3].sum() == (predictions[:, 2] > 0.25).sum()
    perfect = np.c_[
        ground_truth[:, :2], np.full(len(ground_truth), 0.9), ground_truth[:, 3:]
    ].astype(np.float32)
    assert (
        confusion(perfect, ground_truth, 3)[:3, :3].trace()
        == len(ground_truth)
        == confusion(perfect, ground_truth, 3).sum()
    )


def test_confusion_matrix_of_a_written_example():
    left, right, small = (
        (0, 0, 0.4, 1),
        (0.6, 0, 1, 1),
        (0, 0, 0.16, 1),
    )  # IoU of small with left: 0.4
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
    assert confusion(predictions, ground_truth, 2, confidence=0.25).tolist() == [
        [1, 0, 1],
        [1, 0, 1],
        [1, 1, 0],
    ]


@pytest.mark.parametrize("size", [96, 300, 416, 500, 1000])
def test_an_iou_of_exactly_half_is_kept_in_fractions(size):
    """VOC counts an IoU of 0.5, the course does not."""
    for left in range(0, 40, 3):
        ground_truth = np.float32([[0, 0, 0, *(np.array([left, 7, left + 50, 47]) / size)]])
        predictions = np.float32([[0, 0, 0.9, *(np.array([left, 7, left + 25, 47]) / size)]])
        assert match(predictions, ground_truth)[1].tolist() == [0.5]
        row = per_class_table(predictions, ground_truth, ("a",))[0]
        assert row["ap"] == 1 and row["ap_course"] == 0
