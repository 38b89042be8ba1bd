"""Prediction: from an image of any size to detections in its own pixels."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.model.boxes import decode, nms
from src.model.network import YOLOv3, fuse_batch_norms
from src.serving.images import letterbox, load_image, to_network_input

MIN_SCORE = 0.01  # predictions with a lower score are dropped
CONFIDENCE = 0.45  # default: F1 of the shipped weights is 0.631, its best 0.633 at 0.44
IOU_THRESHOLD = 0.45  # of NMS


@dataclass(frozen=True)
class Detections:
    """The n detections of one image, best first."""

    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels of the image
    scores: np.ndarray  # float32 [n] objectness times class probability
    labels: np.ndarray  # int64 [n] index into the model's classes
    index: np.ndarray  # int64 [n] index into the network's K predictions, see boxes.decode

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Candidates:
    """The predictions of one forward pass over one image, before thresholds and NMS."""

    boxes: Tensor  # float32 [k, 4] xyxy in pixels of the image, not clipped
    scores: Tensor  # float32 [k, C]; k is at least 1
    index: Tensor  # int64 [k] index into the network's K predictions
    size: tuple[int, int]  # width and height of the image

    def detections(
        self, confidence: float = CONFIDENCE, iou_threshold: float = IOU_THRESHOLD
    ) -> Detections:
        """Apply the confidence threshold and NMS.

        Raises ValueError if a threshold is not in 0..1.
        """
        if not (0 <= confidence <= 1 and 0 <= iou_threshold <= 1):
            raise ValueError("confidence and iou_threshold must be in 0..1")
        return self._select(
            *nms(self.boxes, self.scores, max(confidence, MIN_SCORE), iou_threshold)
        )

    def top_candidate(self, label: int | None = None) -> Detections:
        """Return the candidate with the highest score, at any threshold; of one class if given."""
        index = (
            self.scores.amax(dim=1).argmax() if label is None else self.scores[:, label].argmax()
        )
        label = self.scores[index].argmax() if label is None else torch.tensor(label)
        return self._select(index[None], label[None])

    def _select(self, rows: Tensor, labels: Tensor) -> Detections:
        boxes = self.boxes[rows].clamp(min=0).minimum(torch.tensor(self.size * 2))
        return Detections(
            *(t.numpy() for t in (boxes, self.scores[rows, labels], labels, self.index[rows]))
        )


class Predictor:
    """Run a model on images: `predictor(image)` -> Detections.

    Images are whatever `load_image` takes. The first prediction makes a copy of the model with
    fused batch norms. Later changes of the model need a new Predictor.
    """

    def __init__(self, model: YOLOv3, image_size: int = 0, device: str | torch.device = ""):
        """Wrap a model.

        image_size: the network's input, default model.image_size.
        device: default CUDA if available, else the CPU.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.image_size = image_size or model.image_size
        self.classes = model.classes

    @classmethod
    def load(cls, source: str | Path, **options) -> "Predictor":
        """Load a folder of `save_pretrained`, or a model of the Hub by its id."""
        return cls(YOLOv3.from_pretrained(source), **options)

    def __call__(
        self, image, confidence: float = CONFIDENCE, iou_threshold: float = IOU_THRESHOLD
    ) -> Detections:
        """Detect objects. Boxes are in pixels of the upright image (EXIF applied)."""
        return self.candidates(image).detections(confidence, iou_threshold)

    @torch.inference_mode()
    def candidates(self, image) -> Candidates:
        """Run one forward pass; thresholds are applied later, to what it returns."""
        image = load_image(image)
        inputs, placement = self.preprocess(image)
        return self.postprocess(self.fused(inputs), placement, image)

    @cached_property
    @torch.inference_mode(False)  # so that Grad-CAM can use it too
    @torch.no_grad()
    def fused(self) -> YOLOv3:
        """The model with fused batch norms, a copy: 3-10% faster, scores within 1e-5."""
        return fuse_batch_norms(self.model).to(self.model.anchors.dtype)

    def preprocess(self, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """uint8 [H, W, 3] -> network input [1, 3, S, S] and the placement of `letterbox`."""
        square, placement = letterbox(image, self.image_size)
        inputs = to_network_input(torch.from_numpy(square).permute(2, 0, 1)[None].to(self.device))
        return inputs.to(self.model.anchors.dtype), placement

    def postprocess(
        self, logits: list[Tensor], placement: np.ndarray, image: np.ndarray
    ) -> Candidates:
        """Convert the three logits [1, 3, G, G, 5 + C] of an image. placement: of `letterbox`."""
        anchors = self.model.anchors_at(self.image_size)
        predictions = decode([level.detach() for level in logits], anchors)
        boxes, scores = (tensor[0].cpu() for tensor in predictions)  # [K, 4], [K, C]
        best = scores.amax(dim=1)
        # at least the best, so that there is always a top candidate
        index = torch.nonzero(best >= best.max().clamp(max=MIN_SCORE)).flatten()
        scale, bars = torch.from_numpy(placement).view(2, 2).repeat(1, 2)  # [4] of xyxy
        return Candidates(
            boxes=(boxes[index] * self.image_size - bars) / scale,
            scores=scores[index],
            index=index,
            size=image.shape[1::-1],
        )
