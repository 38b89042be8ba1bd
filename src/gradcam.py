"""Why a detection was made: heat maps through pytorch-grad-cam."""

import copy
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM
from torch import Tensor, nn

from src.config import STRIDES
from src.model import YOLOv3
from src.predict import Detections, Predictor, load_image

TAP = 0
METHODS = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus, "hirescam": HiResCAM, "eigencam": EigenCAM}


@dataclass(frozen=True)
class Explanation:
    """What was found in one image and where the network looked to find it."""

    heat: np.ndarray  # float32 [H, W] in 0..1, on the image's pixels; the hottest is 1, or all are 0
    detections: Detections  # what was found; where that is nothing, the strongest candidate
    explained: np.ndarray  # int64 [m] rows of `detections` that `heat` is about
    message: str  # empty, or what the reader should know: that nothing was found, or that the map is empty


class Explainer:
    """One forward pass over one image; explains from it as often as you like.

    `candidates` are those of `Predictor.candidates`. The predictor's model is never touched: its layers are copied
    (not its weights, which are shared and ask for no gradients), and only the copy is run.
    """

    def __init__(self, predictor: Predictor, image):
        """image: whatever `load_image` takes."""
        image = load_image(image)
        self.predictor = predictor
        self.size = image.shape[1], image.shape[0]  # width, height
        self.model = _twin(predictor.model)
        self.inputs, self.placement = predictor.input(image)
        with torch.no_grad():
            self.features = self.model.backbone(self.inputs)
            logits = self.model.detect(self.features)
            self.candidates = predictor.read(logits, self.placement, *self.size)
        self.last = np.cumsum([level[0, ..., 0].numel() for level in logits])  # scale s ends before prediction last[s]

    def explain(
        self,
        target: str | int = "all",
        layer: str | int = "own",
        method: str = "gradcam",
        confidence: float = 0.25,
        overlap: float = 0.45,
    ) -> Explanation:
        """As the function `explain`, without its forward pass."""
        if method not in METHODS:
            raise ValueError(f"explain: no method {method!r}; choose one of {', '.join(METHODS)}")
        detections, rows, message = self._choose(target, confidence, overlap)
        scales = np.searchsorted(self.last, detections.index, side="right")
        if layer == "own":
            parts = [(rows[scales[rows] == scale], [scale]) for scale in sorted({*scales[rows].tolist()})]
        elif layer == "all":
            parts = [(rows, [*range(scales[rows].max() + 1)])]
        elif layer in range(len(self.last)):
            rows = rows[scales[rows] >= layer]
            parts = [(rows, [layer])] if len(rows) else []
            message = message if len(rows) else f"Stride {STRIDES[layer]} had no part in this: coarser scales decided."
        else:
            raise ValueError(f'explain: no layer {layer!r}; choose "own", "all" or a scale of 0..{len(self.last) - 1}')
        maps = [self._heat(detections.index[part], detections.labels[part], taps, method) for part, taps in parts]
        heat = np.max(maps, axis=0) if maps else np.zeros(self.inputs.shape[2:], np.float32)
        if not (message or heat.any()):
            message = "No part of the picture speaks for it, seen with this method on this layer."
        return Explanation(self._cut(heat), detections, rows, message)

    def _choose(self, target: str | int, confidence: float, overlap: float) -> tuple[Detections, np.ndarray, str]:
        """What was found, which rows of it `target` means, no message; or the strongest candidate, its row and why."""
        classes, found = self.predictor.classes, self.candidates.detections(confidence, overlap)
        label, rows = None, np.arange(len(found))
        if target in classes:
            label = classes.index(target)
            rows = rows[found.labels == label]
        elif isinstance(target, str) and target != "all":
            raise ValueError(f'explain: no class {target!r}; choose "all", a row of the detections or one of {classes}')
        elif target != "all" and len(found):
            if not 0 <= target < len(found):
                raise ValueError(f"explain: no detection {target}; there are {len(found)}, counted from 0")
            rows = rows[[target]]
        if len(rows):
            return found, rows, ""
        best = self.candidates.strongest(label)
        what = "Nothing" if label is None else f"No {target}"
        seen = f"the strongest candidate is {classes[best.labels[0]]} at {100 * best.scores[0]:.1f}%"
        return best, np.zeros(1, np.int64), f"{what} found above {100 * confidence:.0f}%; {seen}."

    def _heat(self, index: np.ndarray, labels: np.ndarray, taps: list[int], method: str) -> np.ndarray:
        """One CAM for the summed scores of predictions index [m], on the scales `taps`: [S, S] in 0..1."""
        heads = _Heads(self.model, self.features, taps)
        layers = [self.model.heads[scale].neck[TAP] for scale in taps]
        cam = METHODS[method](heads, layers, reshape_transform=Tensor.float)  # numpy knows no bfloat16
        try:
            return cam(self.inputs, [_Score(torch.from_numpy(index), torch.from_numpy(labels))])[0]
        finally:
            cam.activations_and_grads.release()

    def _cut(self, heat: np.ndarray) -> np.ndarray:
        """[S, S] on the letterboxed square -> [H, W] on the image, without the grey bars, at most 1."""
        (width, height), (scale_x, scale_y, left, top) = self.size, self.placement
        right, bottom = round(left + width * scale_x), round(top + height * scale_y)
        heat = cv2.resize(heat[int(top) : bottom, int(left) : right], self.size, interpolation=cv2.INTER_LINEAR)
        return heat / max(heat.max(), 1e-7)


def explain(
    predictor: Predictor,
    image,
    target: str | int = "all",
    layer: str | int = "own",
    method: str = "gradcam",
    confidence: float = 0.25,
    overlap: float = 0.45,
) -> Explanation:
    """Where the network looked when it found `target` in an image (whatever `load_image` takes).

    target: "all" that is found, the name of a class, or one detection's row (0: the best).
    layer: "own", the scale that made a detection; "all", the mean over the scales with a part in it; or one scale,
        0 to 2 (strides 32, 16, 8), of the detections it had a part in.
    method: a key of METHODS. confidence, overlap: thresholds of the detections; only those that survive count.
    Raises ValueError that lists the choices where target, layer or method is none of them.
    """
    return Explainer(predictor, image).explain(target, layer, method, confidence, overlap)


def _twin(model: YOLOv3) -> YOLOv3:
    """The same layers around the same weights, in evaluation mode, frozen: gradients pass through and none stay."""
    shared = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


class _Heads(nn.Module):
    """The heads on features the backbone has computed, as the classifier that pytorch-grad-cam asks for.

    forward(images, which only tell the library the size of the map) -> [1, K, 5 + C], in the order of boxes.decode.
    """

    def __init__(self, model: YOLOv3, features: tuple[Tensor, ...], taps: list[int]):
        super().__init__()
        self.model, self.features, self.taps = model, features, taps

    def forward(self, images: Tensor) -> Tensor:
        features = [f.detach().requires_grad_(scale in self.taps) for scale, f in enumerate(self.features)]
        return torch.cat([level.flatten(1, 3) for level in self.model.detect(features)], dim=1)


class _Score:
    """What is explained: the objectness and class logits of chosen predictions, summed.

    Logits, since the product of probabilities is flat where the network is sure.
    """

    def __init__(self, index: Tensor, labels: Tensor):
        self.index, self.labels = index, labels

    def __call__(self, output: Tensor) -> Tensor:
        """output [K, 5 + C] -> scalar."""
        rows = output[self.index].float()
        return rows[:, 0].sum() + rows[torch.arange(len(rows)), 5 + self.labels].sum()
