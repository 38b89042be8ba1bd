"""`python -m benchmarks heatmaps [--detections N] [--default]`: insertion and deletion.

Measures the shipped weights on PASCAL VOC's validation splits if VOC_ROOT is set, else the weights
of `make run` on the synthetic validation split. Two maps that explain nothing are measured beside
the methods: a Gaussian at the detection's box, and random values.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice

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


def select(predictor: Predictor, images: list) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each image that has a detection, and the stride of its best one."""
    ends = np.cumsum([3 * (predictor.image_size // stride) ** 2 for stride in STRIDES])
    for image in map(load_image, images):
        index = predictor(image, CONFIDENCE).index
        if len(index):
            yield image, STRIDES[np.searchsorted(ends, index[0], side="right")]


def heatmaps(explainer: Explainer, stride: int, default: bool) -> Iterator[tuple]:
    """Yield name and heatmap [H, W] of each map of the best detection; if `default`, of few."""
    combinations = [(layers, method) for method in METHODS for layers in LAYERS]
    for layers, method in [("all", "layercam")] if default else combinations:
        heatmap = explainer.explain(0, layers, method, CONFIDENCE).heatmap
        yield f"{METHODS[method]}, {LAYERS[layers]}", heatmap
    heatmap = explainer.explain(0, str(stride), "hirescam", CONFIDENCE).heatmap
    yield "HiResCAM, the detection's own stage", heatmap
    box, (width, height) = explainer.candidates.detections(CONFIDENCE).boxes[0], explainer.size
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
    parser.add_argument("--detections", type=int, default=60, help="the best of as many images")
    parser.add_argument("--default", action="store_true", help="measure the default map alone")
    options = parser.parse_args(arguments)
    predictor, images = load()
    results = {}  # map -> (stride, insertion, deletion) of each detection
    for image, stride in islice(select(predictor, images), options.detections):
        explainer = Explainer(predictor, image)
        detections = explainer.candidates.detections(CONFIDENCE)
        for name, heatmap in heatmaps(explainer, stride, options.default):
            measured = insertion_deletion(predictor, image, detections, 0, heatmap)
            results.setdefault(name, []).append((stride, *measured))
    strides = [sample[0] for sample in results["random"]]
    print(f"{len(strides)} detections; by stride: {dict(Counter(strides))}")
    print(markdown([HEADER, *(cells(name, np.array(rows)) for name, rows in results.items())]))


def cells(name: str, rows: np.ndarray) -> list[str]:
    """Return a line of the table. rows [n, 3]: stride, insertion, deletion of each detection."""
    groups = [rows, *(rows[rows[:, 0] == stride] for stride in STRIDES)]
    means = [g[:, column].mean() if len(g) else np.nan for column in (1, 2) for g in groups]
    return [name, *(f"{mean:.3f}" for mean in means)]
