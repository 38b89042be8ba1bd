"""`python -m benchmarks heatmaps [--per-stride N] [--default]`: insertion and deletion.

Measures the shipped weights on PASCAL VOC's validation splits if VOC_ROOT is set, else the weights
of `make run` on the synthetic validation split. Two maps that explain nothing are measured beside
the methods: a Gaussian at the detection's box, and random values.
"""

import argparse
import os
from collections.abc import Iterator

import numpy as np

from benchmarks.timing import markdown
from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.model.network import STRIDES
from src.serving.gradcam import LAYERS, METHODS, Explainer
from src.serving.images import load_image
from src.serving.predictor import Predictor
from src.training.faithfulness import insertion_deletion
from src.training.fit import load_detector

CONFIDENCE = 0.5  # of the detections that are measured
HEADER = ["map", "insertion", *map("at stride {}".format, STRIDES)]
HEADER += ["deletion", *HEADER[2:]]


def load() -> tuple[Predictor, list]:
    """Return the predictor, and the images of its validation splits in random order."""
    if "VOC_ROOT" in os.environ:
        predictor = Predictor.load("weights")
        config = Config.load("weights/run.json").replace(data_root=os.environ["VOC_ROOT"])
    else:
        detector = load_detector("runs/shapes")
        predictor, config = Predictor(detector.model), detector.config
    data = DetectionDataModule(config.replace(cache_gb=0))
    data.setup()
    order = np.random.default_rng(0).permutation(len(data.val_records))
    return predictor, [data.val_records[i].image for i in order]


def select(predictor: Predictor, images: list, per_stride: int) -> list[tuple]:
    """Take each image's best detection at each stride, until there are `per_stride` of each.

    Returns (image, row of the detection, stride).
    """
    ends = np.cumsum([3 * (predictor.image_size // stride) ** 2 for stride in STRIDES])
    found = {stride: [] for stride in STRIDES}
    for image in map(load_image, images):
        scales = np.searchsorted(ends, predictor(image, CONFIDENCE).index, side="right")
        for scale, row in zip(*np.unique(scales, return_index=True), strict=True):
            found[STRIDES[scale]].append((image, int(row), STRIDES[scale]))
        if all(len(samples) >= per_stride for samples in found.values()):
            break
    return [sample for samples in found.values() for sample in samples[:per_stride]]


def heatmaps(explainer: Explainer, row: int, stride: int, default: bool) -> Iterator[tuple]:
    """Yield name and heatmap [H, W] of each map of a detection; if `default`, of few methods."""
    combinations = [(layers, method) for method in METHODS for layers in LAYERS]
    for layers, method in [("all", "layercam")] if default else combinations:
        heatmap = explainer.explain(row, layers, method, CONFIDENCE).heatmap
        yield f"{METHODS[method]}, {LAYERS[layers]}", heatmap
    own_stage = {8: "3", 16: "4", 32: "5"}[stride]
    heatmap = explainer.explain(row, own_stage, "hirescam", CONFIDENCE).heatmap
    yield "HiResCAM, the detection's own stage", heatmap
    box, (width, height) = explainer.candidates.detections(CONFIDENCE).boxes[row], explainer.size
    yield "Gaussian at the box", gaussian(box, width, height)
    yield "random", np.random.default_rng(0).random((height, width))


def gaussian(box: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a Gaussian [H, W] at a box, xyxy in pixels; sigma is a quarter of its sides."""
    x1, y1, x2, y2 = box
    u = (np.arange(width) + 0.5 - (x1 + x2) / 2) / ((x2 - x1) / 4)
    v = (np.arange(height) + 0.5 - (y1 + y2) / 2) / ((y2 - y1) / 4)
    return np.exp(-(u**2 + v[:, None] ** 2) / 2)


def main(arguments: list[str]) -> None:
    """Measure, and print the means over the detections."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks heatmaps")
    parser.add_argument("--per-stride", type=int, default=20, help="detections at each stride")
    parser.add_argument("--default", action="store_true", help="measure the default map alone")
    options = parser.parse_args(arguments)
    predictor, images = load()
    results = {}  # map -> (stride, insertion, deletion) of each detection
    for image, row, stride in select(predictor, images, options.per_stride):
        explainer = Explainer(predictor, image)
        detections = explainer.candidates.detections(CONFIDENCE)
        for name, heatmap in heatmaps(explainer, row, stride, options.default):
            measured = insertion_deletion(predictor, image, detections, row, heatmap)
            results.setdefault(name, []).append((stride, *measured))
    print(f"{len(results['random'])} detections")
    print(markdown([HEADER, *(cells(name, np.array(rows)) for name, rows in results.items())]))


def cells(name: str, rows: np.ndarray) -> list[str]:
    """Return a line of the table. rows [n, 3]: stride, insertion, deletion of each detection."""
    groups = [rows, *(rows[rows[:, 0] == stride] for stride in STRIDES)]
    return [name, *(f"{group[:, column].mean():.3f}" for column in (1, 2) for group in groups)]
