"""Why a detection was made: heatmap maps through pytorch-grad-cam."""

import copy
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM
from torch import Tensor, nn

from src.model.network import STRIDES, YOLOv3
from src.serving.images import load_image
from src.serving.predictor import Detections, Predictor

METHODS = {"hirescam": HiResCAM, "gradcam": GradCAM, "gradcam++": GradCAMPlusPlus, "eigencam": EigenCAM}
MAX_EXPLAINED = 24  # detections explained at once, the best
BATCH = 4  # of them in one backward pass


@dataclass(frozen=True)
class Explanation:
    """What was found in one image and where the network looked to find it."""

    heatmap: np.ndarray  # float32 [H, W] in 0..1, on the image's pixels; the hottest is 1, or all are 0
    detections: Detections  # what was found; where that is nothing, the top_candidate candidate
    explained: np.ndarray  # int64 [m] rows of `detections` that `heatmap` is about
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
        self.model = _frozen_copy(predictor.model)
        self.inputs, self.placement = predictor.preprocess(image)
        with torch.no_grad():
            self.features = self.model.backbone(self.inputs)
            self.necks, logits = self.model.detect(self.features)
            self.candidates = predictor.postprocess(logits, self.placement, *self.size)
        self.ends = np.cumsum([level[0, ..., 0].numel() for level in logits])  # where each scale's predictions end

    def explain(
        self,
        target: str | int = "all",
        layer: str | int = "own",
        method: str = "hirescam",
        confidence: float = 0.25,
        iou_threshold: float = 0.45,
    ) -> Explanation:
        """As the function `explain`, without its forward pass."""
        if method not in METHODS:
            raise ValueError(f"explain: no method {method!r}; choose one of {', '.join(METHODS)}")
        if layer not in ("own", "all", *range(len(self.ends))):
            raise ValueError(f'explain: no layer {layer!r}; choose "own", "all" or a scale of 0..{len(self.ends) - 1}')
        detections, rows, message = self._choose(target, confidence, iou_threshold)
        if len(rows) > MAX_EXPLAINED:
            message = f"The map is about the best {MAX_EXPLAINED} of {len(rows)}."
        rows, heatmap = rows[:MAX_EXPLAINED], np.zeros(self.inputs.shape[2:], np.float32)
        scales = np.searchsorted(self.ends, detections.index, side="right")
        if isinstance(layer, int):
            rows = rows[scales[rows] >= layer]
            message = message if len(rows) else f"Stride {STRIDES[layer]} had no part in this: coarser scales decided."
        for scale in sorted({*scales[rows].tolist()}):
            target_layers = {"own": [scale], "all": [*range(scale + 1)]}.get(layer, [layer])
            group = rows[scales[rows] == scale]
            for part in np.split(group, range(BATCH, len(group), BATCH)):
                one = self._heatmap(detections.index[part], detections.labels[part], scale, target_layers, method)
                heatmap = np.maximum(heatmap, one)
        if len(rows) and not (message or heatmap.any()):
            message = "No part of the picture speaks for it, seen with this method on this layer."
        return Explanation(self._crop_to_image(heatmap), detections, rows, message)

    def _choose(self, target: str | int, confidence: float, iou_threshold: float) -> tuple[Detections, np.ndarray, str]:
        """What was found, which rows of it `target` means, no message; or the top_candidate candidate, its row and why."""
        classes, found = self.predictor.classes, self.candidates.detections(confidence, iou_threshold)
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
        best = self.candidates.top_candidate(label)
        what = "Nothing" if label is None else f"No {target}"
        seen = f"the top_candidate candidate is {classes[best.labels[0]]} at {100 * best.scores[0]:.1f}%"
        return best, np.zeros(1, np.int64), f"{what} found above {100 * confidence:.0f}%; {seen}."

    def _heatmap(self, index: np.ndarray, labels: np.ndarray, scale: int, target_layers: list[int], method: str) -> np.ndarray:
        """The CAMs of predictions index [m], made by one scale, each at most 1, laid over each other: [S, S].

        The layer mapped is the neck of each scale in `target_layers`; a prediction sees 3 x 3 cells of its own scale's.
        """
        start = self.ends[scale - 1] if scale else 0
        scores = [_Score(*pair) for pair in zip((index - start).tolist(), labels.tolist(), strict=True)]
        scores = scores[:1] if method == "eigencam" else scores  # it is the same for every prediction
        part = slice(target_layers[0], scale + 1)
        heads = _Heads(self.model.heads[part], self.features[part], self.necks[target_layers[0]], len(scores))
        layers = [heads.tap, *(self.model.heads[tap].neck for tap in target_layers[1:])]
        cam = METHODS[method](heads, layers, reshape_transform=Tensor.float)  # numpy knows no bfloat16
        try:
            return cam(self.inputs, scores).max(axis=0)
        finally:
            cam.activations_and_grads.release()

    def _crop_to_image(self, heatmap: np.ndarray) -> np.ndarray:
        """[S, S] on the letterboxed square -> [H, W] on the image, without the grey bars, at most 1."""
        (width, height), (scale_x, scale_y, left, top) = self.size, self.placement
        right, bottom = round(left + width * scale_x), round(top + height * scale_y)
        heatmap = cv2.resize(heatmap[int(top) : bottom, int(left) : right], self.size, interpolation=cv2.INTER_LINEAR)
        return heatmap / max(heatmap.max(), 1e-7)


def explain(
    predictor: Predictor,
    image,
    target: str | int = "all",
    layer: str | int = "own",
    method: str = "hirescam",
    confidence: float = 0.25,
    iou_threshold: float = 0.45,
) -> Explanation:
    """Where the network looked when it found `target` in an image (whatever `load_image` takes).

    target: "all" that is found, the name of a class, or one detection's row (0: the best). Each detection has its own
        map of 0 to 1; several are laid over each other.
    layer: "own", the scale that made a detection; "all", the mean over the scales with a part in it; or one scale,
        0 to 2 (strides 32, 16, 8), of the detections it had a part in.
    method: "hirescam" multiplies activations by gradients cell by cell (Draelos & Carin 2020,
        https://arxiv.org/abs/2011.08891). "gradcam" (Selvaraju et al. 2017) and "gradcam++" first average the
        gradients over the map: made for a score of the whole picture, they also light up other objects of the kind,
        while a detection is the score of one cell. "eigencam" knows no target. On 100 held-out built-in pictures, 252
        detections at 256 pixels: the peak lies in the own box for 94 %, 74 %, 56 % and 28 %; of the mass 80 %, 43 %,
        18 % and 18 %.
    confidence, iou_threshold: thresholds of the detections; only those that survive count.
    Raises ValueError that lists the choices where target, layer or method is none of them.
    """
    return Explainer(predictor, image).explain(target, layer, method, confidence, iou_threshold)


def _frozen_copy(model: YOLOv3) -> YOLOv3:
    """The same layers around the same weights, in evaluation mode, frozen: gradients pass through and none stay."""
    shared = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


class _Heads(nn.Module):
    """Heads from the first tap to the last scale, as the classifier pytorch-grad-cam asks for.

    forward(images, which only tell the library the size of a map) -> predictions of the last scale
    [copies, 3 * G * G, 5 + C] in the order of boxes.decode. What is known is not computed again: it starts from
    `copies` of the first head's neck, which are seen at `tap`.
    """

    def __init__(self, heads: nn.ModuleList, features: tuple[Tensor, ...], neck: Tensor, copies: int):
        super().__init__()
        self.heads, self.tap = heads, nn.Identity()
        self.features = [level.expand(copies, -1, -1, -1) for level in features]
        self.neck = neck.expand(copies, -1, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        neck = self.tap(self.neck.requires_grad_())
        for head, features in zip(self.heads[1:], self.features[1:], strict=True):
            neck = head.join(features, neck)
        return self.heads[-1].read(neck).flatten(1, 3)


class _Score:
    """What is explained: objectness and class logit of one prediction, summed.

    Logits, since the product of the probabilities is flat where the network is sure.
    """

    def __init__(self, index: int, label: int):
        self.index, self.label = index, label

    def __call__(self, output: Tensor) -> Tensor:
        """output [3 * G * G, 5 + C] -> scalar."""
        return output[self.index, 0].float() + output[self.index, 5 + self.label].float()
