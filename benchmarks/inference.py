"""One picture asked for, many asked for, one explained: each against the bare network."""

from collections.abc import Iterator

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

    ask, forward, heat = seconds(lambda: predictor(picture), bare, lambda: explain(predictor, picture), rounds=5)
    against = f"bare forward pass, {milliseconds(forward)}"
    yield Row("Predictor, a 500 x 375 picture", milliseconds(ask), against, ask / forward, 1.1, True)
    pictures = [picture] * MANY
    one, many = seconds(lambda: [predictor(p) for p in pictures], lambda: predictor.batch(pictures), rounds=2)
    ours = f"{MANY / many:.2f} pictures/s"
    yield Row(f"Predictor, batches of {MANY}", ours, f"one at a time, {MANY / one:.2f} pictures/s", one / many)
    yield Row("Grad-CAM, detections included", milliseconds(heat), against, heat / forward, 3.5, True)
