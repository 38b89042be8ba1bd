"""One picture asked for, many asked for, one explained: each against the bare network."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.measure import Row, milliseconds, seconds
from src.gradcam import explain
from src.model import YOLOv3
from src.predict import Predictor
from src.shapes import draw_shapes

SIDE, MANY = 416, 8


def rows() -> Iterator[Row]:
    """At width 1 and 416, on all cores."""
    torch.manual_seed(0)
    model = YOLOv3(20, 1.0).eval()
    with torch.no_grad():
        for head in model.heads:  # so that some hundred cells have something to say
            head.predict.bias.view(3, -1)[:, 0] += 1
            head.predict.weight.normal_(std=0.05)
    predictor = Predictor(model, SIDE, device="cpu")
    picture = np.ascontiguousarray(draw_shapes(1, 500)[0].image[:375])
    inputs, _ = predictor.input(picture)

    @torch.inference_mode()
    def bare() -> None:
        predictor.model(inputs)

    ask, forward = seconds(lambda: predictor(picture), bare, rounds=5)
    against = f"bare forward pass, {milliseconds(forward)}"
    yield Row("Predictor, a 500 x 375 picture", milliseconds(ask), against, ask / forward, 1.1, True)
    yield from _heat(predictor, picture, bare)
    half = Predictor(copy.deepcopy(model).bfloat16(), SIDE, device="cpu")
    pictures = [picture] * MANY
    ways = lambda: [predictor(p) for p in pictures], lambda: predictor.batch(pictures), lambda: half.batch(pictures)
    one, many, fast = seconds(*ways, rounds=2)
    against = f"one at a time, {MANY / one:.2f} pictures/s"
    yield Row(f"Predictor, batches of {MANY}", f"{MANY / many:.2f} pictures/s", against, one / many)
    yield Row(f"Predictor, batches of {MANY}, bfloat16", f"{MANY / fast:.2f} pictures/s", against, one / fast)


def _heat(predictor: Predictor, picture: np.ndarray, bare: Callable[[], None]) -> Iterator[Row]:
    """Grad-CAM with its detections: of the best one, and of three, a map for each."""
    scores = predictor(picture, confidence=0.01).scores
    least = float(scores[2] + scores[3]) / 2
    found = Counter(np.searchsorted((507, 2535), predictor(picture, least).index, side="right").tolist())
    ways = [partial(explain, predictor, picture, target, confidence=least) for target in (0, "all")]
    best, everything, forward = seconds(*ways, bare, rounds=3)
    against = f"bare forward pass, {milliseconds(forward)}"
    yield Row("Grad-CAM, the best detection", milliseconds(best), against, best / forward, 3.5, True)
    what = f"Grad-CAM, {found.total()} detections on {len(found)} of 3 scales"
    yield Row(what, milliseconds(everything), against, everything / forward, 3.5, True)
