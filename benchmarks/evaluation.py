"""Decoding, NMS and all metrics for as many images as VOC2007 test has."""

import time
from collections.abc import Iterator

import torch

from benchmarks.synthetic_inputs import random_logits, random_objects
from benchmarks.timing import Row
from src.config import VOC_CLASSES
from src.model.network import ANCHORS
from src.training.metrics import (
    CellAccuracy,
    DetectionAccumulator,
    coco_average_precision,
    confusion,
    per_class_table,
)

IMAGES, BATCH = 4952, 32


def evaluate(images: int) -> float:
    """Return the seconds that the evaluation takes, without those that make its inputs."""
    cells, store = CellAccuracy(), DetectionAccumulator()
    anchors = torch.tensor(ANCHORS)
    logits = random_logits(BATCH)
    total = 0.0
    for first in range(0, images, BATCH):
        targets = random_objects(BATCH, 3, seed=first)
        difficult = torch.zeros(len(targets), dtype=torch.bool)
        start = time.perf_counter()
        cells.update(logits, targets, anchors)
        store.update(logits, targets, difficult, anchors)
        total += time.perf_counter() - start
    start = time.perf_counter()
    cells.compute()
    predictions, ground_truth = store.compute()
    per_class_table(predictions, ground_truth, VOC_CLASSES)
    coco_average_precision(predictions, ground_truth)
    confusion(predictions, ground_truth, len(VOC_CLASSES))
    return total + time.perf_counter() - start


def rows() -> Iterator[Row]:
    """Yield the time of the whole split."""
    taken = evaluate(IMAGES)
    yield Row(
        f"Evaluation, {IMAGES:,} images", f"{taken:.1f} s", "limit of 60 s", taken / 60, 1, True
    )
