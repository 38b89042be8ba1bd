"""From an image of any size to detections in its own pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.model.boxes import decode, nms
from src.model.network import YOLOv3
from src.serving.images import letterbox, load_image, to_network_input

MIN_SCORE = 0.01  # candidates that score less are not kept


@dataclass(frozen=True)
class Detections:
    """n objects of one image, best first."""

    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels of the image
    scores: np.ndarray  # float32 [n] objectness times class probability
    labels: np.ndarray  # int64 [n] index into the model's classes
    index: np.ndarray  # int64 [n] which of the network's K predictions it was; see boxes.decode

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Candidates:
    """What one forward pass found in one image; thresholds are chosen later, as often as you like."""

    boxes: Tensor  # float32 [k, 4] xyxy in pixels of the image, not clipped to it
    scores: Tensor  # float32 [k, C]; k is at least 1
    index: Tensor  # int64 [k] into the network's K predictions
    size: tuple[int, int]  # width and height of the image

    def detections(self, confidence: float = 0.25, iou_threshold: float = 0.45) -> Detections:
        """Those that score above `confidence` and survive NMS at IoU `iou_threshold`; ValueError where one is no share."""
        for name, value in (("confidence", confidence), ("iou_threshold", iou_threshold)):
            if not (isinstance(value, Real) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a number in 0..1")
        return self._pick(*nms(self.boxes, self.scores, max(confidence, MIN_SCORE), iou_threshold))

    def top_candidate(self, label: int | None = None) -> Detections:
        """The one candidate that scores best, of one class if a label is given, however low."""
        kept = self.scores.amax(dim=1).argmax() if label is None else self.scores[:, label].argmax()
        label = self.scores[kept].argmax() if label is None else torch.tensor(label)
        return self._pick(kept[None], label[None])

    def _pick(self, kept: Tensor, labels: Tensor) -> Detections:
        boxes = self.boxes[kept].clamp(min=0).minimum(torch.tensor(self.size * 2))
        return Detections(*(t.numpy() for t in (boxes, self.scores[kept, labels], labels, self.index[kept])))


class Predictor:
    """A model ready to be asked: `predictor(image)` -> Detections."""

    def __init__(self, model: YOLOv3, image_size: int = 0, device: str | torch.device = ""):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.image_size = image_size or model.image_size
        self.classes = model.classes

    @classmethod
    def load(cls, source: str | Path, **options) -> "Predictor":
        """From a folder written by `YOLOv3.save_pretrained`, or a hub id."""
        return cls(YOLOv3.from_pretrained(source), **options)

    def preprocess(self, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """uint8 [H, W, 3] -> network input [1, 3, S, S] on the device, and the letterbox's placement."""
        square, placement = letterbox(image, self.image_size)
        inputs = to_network_input(torch.from_numpy(square).permute(2, 0, 1)[None].to(self.device))
        return inputs.to(next(self.model.parameters()).dtype), placement

    @torch.inference_mode()
    def candidates(self, image) -> Candidates:
        """One forward pass. image: whatever `load_image` takes."""
        image = load_image(image)
        inputs, placement = self.preprocess(image)
        return self.postprocess(self.model(inputs), placement, image.shape[1], image.shape[0])

    def postprocess(self, logits: list[Tensor], placement: np.ndarray, width: int, height: int) -> Candidates:
        """The network's logits for one image to candidates in its pixels; see `letterbox` for the placement."""
        boxes, scores = decode(logits, self.model.anchors_at(self.image_size))
        boxes, scores = boxes[0].cpu(), scores[0].cpu()
        best = scores.amax(dim=1)
        kept = best > MIN_SCORE
        kept[best.argmax()] = True  # something to show where nothing was found
        index = torch.nonzero(kept).flatten()
        boxes = boxes[index] * self.image_size - torch.from_numpy(placement[[2, 3, 2, 3]])
        return Candidates(boxes / torch.from_numpy(placement[[0, 1, 0, 1]]), scores[index], index, (width, height))

    def __call__(self, image, confidence: float = 0.25, iou_threshold: float = 0.45) -> Detections:
        """image: a path, PIL image or array. Boxes come in its pixels, after EXIF rotation."""
        return self.candidates(image).detections(confidence, iou_threshold)

    @torch.inference_mode()
    def batch(self, images: Sequence, confidence: float = 0.25, iou_threshold: float = 0.45) -> list[Detections]:
        """Several images in one forward pass; the same as asking for one after the other."""
        pictures = [load_image(image) for image in images]
        inputs, placements = zip(*map(self.preprocess, pictures), strict=True)
        logits = self.model(torch.cat(inputs))
        found = []
        for number, (placement, picture) in enumerate(zip(placements, pictures, strict=True)):
            own = [level[number : number + 1] for level in logits]
            found.append(
                self.postprocess(own, placement, picture.shape[1], picture.shape[0]).detections(confidence, iou_threshold)
            )
        return found
