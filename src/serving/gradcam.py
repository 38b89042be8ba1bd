"""Grad-CAM heatmaps for detections, computed with pytorch-grad-cam."""

import copy
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM
from torch import Tensor, nn

from src.model.network import STRIDES, YOLOv3
from src.serving.images import load_image
from src.serving.onnx_model import OnnxModel
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

CAMS = {
    "hirescam": HiResCAM,
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "eigencam": EigenCAM,
}
METHODS = {
    "hirescam": "HiResCAM",
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "eigencam": "EigenCAM",
}
METHOD_NAMES = METHODS
LAYERS = {
    "own": "The detection's own scale",
    "all": "Mean of all scales",
    0: "Stride 32 (large objects)",
    1: "Stride 16 (medium objects)",
    2: "Stride 8 (small objects)",
}
MAX_EXPLAINED = 24  # detections per heatmap; the best are taken
BATCH_SIZE = 4  # detections per backward pass
ONNX_MESSAGE = "Grad-CAM needs gradients, and an .onnx file has none. Load the PyTorch weights that it was exported from."


@dataclass(frozen=True)
class Explanation:
    """A heatmap for one or more detections of an image."""

    heatmap: (
        np.ndarray
    )  # float32 [H, W] in 0..1 on the image's pixels; its maximum is 1, or all are 0
    detections: Detections  # of the image; if there are none, the top candidate
    explained: np.ndarray  # int64 [m] rows of `detections` that the heatmap shows
    message: str  # for the reader: no detection found, or the heatmap is empty; else ""
    is_candidate: (
        bool  # nothing was detected, `detections` is the top candidate below the threshold
    )


class Explainer:
    """Run one forward pass over one image, then compute any number of heatmaps from it.

    `candidates` are those of `Predictor.candidates`. The predictor's model is not changed: a copy of its layers is run,
    which shares the weights and computes no gradients for them.
    """

    def __init__(self, predictor: Predictor, image):
        """image: whatever `load_image` takes."""
        image = load_image(image)
        self.predictor = predictor
        self.size = image.shape[1], image.shape[0]  # width, height
        if isinstance(predictor.model, OnnxModel):
            self.model, self.candidates = None, predictor.candidates(image)
            return
        self.model = _frozen_copy(predictor.fused)
        self.inputs, self.placement = predictor.preprocess(image)
        with torch.no_grad():
            self.features = self.model.backbone(self.inputs)
            self.necks, logits = self.model.forward_heads(self.features)
            boxes, scores = predictor.decode(logits)
        self.candidates = predictor.postprocess(
            boxes[0].cpu(), scores[0].cpu(), self.placement, *self.size
        )
        self.scale_ends = np.cumsum(
            [level[0, ..., 0].numel() for level in logits]
        )  # end of each scale in the K predictions

    def explain(
        self,
        target: str | int = "all",
        layer: str | int = "own",
        method: str = "hirescam",
        confidence: float = CONFIDENCE,
        iou_threshold: float = IOU_THRESHOLD,
    ) -> Explanation:
        """Compute a heatmap; see the function `explain` for the arguments."""
        if self.model is None:
            raise ValueError(ONNX_MESSAGE)
        if method not in METHODS:
            raise ValueError(f"Unknown method {method!r}. Choose one of {', '.join(METHODS)}.")
        if layer not in ("own", "all", *range(len(STRIDES))):
            raise ValueError(
                f'Unknown layer {layer!r}. Choose "own", "all" or a scale from 0 to {len(STRIDES) - 1}.'
            )
        detections, rows, message = self._select(target, confidence, iou_threshold)
        is_candidate = bool(message)
        if len(rows) > MAX_EXPLAINED:
            message = f"The heatmap shows the best {MAX_EXPLAINED} of {len(rows)} detections."
        rows, heatmap = rows[:MAX_EXPLAINED], np.zeros(self.inputs.shape[2:], np.float32)
        scales = np.searchsorted(self.scale_ends, detections.index, side="right")
        if isinstance(layer, int):
            rows = rows[scales[rows] >= layer]
            if not len(rows):
                message = f"Stride {STRIDES[layer]} does not contribute: the detections come from coarser scales."
        for scale in sorted({*scales[rows].tolist()}):
            target_scales = {"own": [scale], "all": [*range(scale + 1)]}.get(layer, [layer])
            group = rows[scales[rows] == scale]
            for batch in np.split(group, range(BATCH_SIZE, len(group), BATCH_SIZE)):
                cam = self._heatmap(
                    detections.index[batch], detections.labels[batch], scale, target_scales, method
                )
                heatmap = np.maximum(heatmap, cam)
        if len(rows) and not (message or heatmap.any()):
            message = "No part of the image raises the score, by this method on this layer."
        return Explanation(self._crop_to_image(heatmap), detections, rows, message, is_candidate)

    def _select(
        self, target: str | int, confidence: float, iou_threshold: float
    ) -> tuple[Detections, np.ndarray, str]:
        """Return the detections, the rows `target` selects and no message; if there are none, the top candidate and why."""
        classes, detections = (
            self.predictor.classes,
            self.candidates.detections(confidence, iou_threshold),
        )
        label, rows = None, np.arange(len(detections))
        if target in classes:
            label = classes.index(target)
            rows = rows[detections.labels == label]
        elif isinstance(target, str) and target != "all":
            raise ValueError(
                f'Unknown target {target!r}. Choose "all", the row of a detection, or one of {classes}.'
            )
        elif target != "all" and len(detections):
            if not 0 <= target < len(detections):
                raise ValueError(
                    f"Unknown target {target}. There are {len(detections)} detections, numbered from 0."
                )
            rows = rows[[target]]
        if len(rows):
            return detections, rows, ""
        top = self.candidates.top_candidate(label)
        missing = "No detection" if label is None else f"No {target}"
        candidate = f"The top candidate is {classes[top.labels[0]]} at {100 * top.scores[0]:.1f}%."
        return top, np.zeros(1, np.int64), f"{missing} above {100 * confidence:.0f}%. {candidate}"

    def _heatmap(
        self,
        index: np.ndarray,
        labels: np.ndarray,
        scale: int,
        target_scales: list[int],
        method: str,
    ) -> np.ndarray:
        """Return the maximum [S, S] over the heatmaps (0..1) of the predictions index [m], all from one scale.

        The target layers are the necks of `target_scales`. A prediction sees 3 x 3 cells of its own scale's neck.
        """
        start = self.scale_ends[scale - 1] if scale else 0
        scores = [
            partial(_score, index=i, label=c)
            for i, c in zip((index - start).tolist(), labels.tolist(), strict=True)
        ]
        scores = (
            scores[:1] if method == "eigencam" else scores
        )  # its heatmap is the same for every prediction
        first = target_scales[0]
        part = slice(first, scale + 1)
        heads = _Heads(self.model.heads[part], self.features[part], self.necks[first], len(scores))
        target_layers = [
            heads.first_neck,
            *(self.model.heads[target].neck for target in target_scales[1:]),
        ]
        cam = CAMS[method](
            heads, target_layers, reshape_transform=Tensor.float
        )  # numpy has no bfloat16
        try:
            return cam(self.inputs, scores).max(axis=0)
        finally:
            cam.activations_and_grads.release()

    def _crop_to_image(self, heatmap: np.ndarray) -> np.ndarray:
        """[S, S] on the letterboxed square -> [H, W] on the image without the bars, scaled to a maximum of 1."""
        (width, height), (scale_x, scale_y, left, top) = self.size, self.placement
        right, bottom = round(left + width * scale_x), round(top + height * scale_y)
        heatmap = cv2.resize(
            heatmap[int(top) : bottom, int(left) : right], self.size, interpolation=cv2.INTER_LINEAR
        )
        return heatmap / max(heatmap.max(), 1e-7)


def explain(
    predictor: Predictor,
    image,
    target: str | int = "all",
    layer: str | int = "own",
    method: str = "hirescam",
    confidence: float = CONFIDENCE,
    iou_threshold: float = IOU_THRESHOLD,
) -> Explanation:
    """Compute where in an image (whatever `load_image` takes) the evidence for `target` is.

    target: "all" detections, the name of a class, or the row of one detection (0 is the best). Each detection has its
        own heatmap in 0..1; the maximum over them is returned.
    layer: "own", the neck of the scale that made the detection; "all", the mean over the scales that contribute to it;
        or one scale 0, 1, 2 (stride 32, 16, 8), for the detections it contributes to.
    method: "hirescam" multiplies activations by gradients cell by cell (Draelos & Carin 2020,
        https://arxiv.org/abs/2011.08891). "gradcam" (Selvaraju et al. 2017) and "gradcam++" average the gradients over
        the map, which suits a score of the whole image. A detection is the score of one cell, so they also highlight
        other objects of its class. "eigencam" doesn't depend on the target. Measured with 252 detections in 100
        validation images of the synthetic data set, at 256 pixels:

                                hirescam  gradcam  gradcam++  eigencam
            peak in own box          94%      74%        56%       28%
            mass in own box          80%      43%        18%       18%

    confidence, iou_threshold: thresholds of the detections.
    Raises ValueError with the choices if target, layer or method is unknown, and if the model is an OnnxModel.
    """
    return Explainer(predictor, image).explain(target, layer, method, confidence, iou_threshold)


def _frozen_copy(model: YOLOv3) -> YOLOv3:
    """Copy the layers, share the weights: in evaluation mode, and without gradients for parameters."""
    shared = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


class _Heads(nn.Module):
    """The heads from the first target layer to the predictions, as the classifier that pytorch-grad-cam expects.

    forward(images, used by the library only for their size) -> predictions of the last head [copies, 3 * G * G, 5 + C],
    in the order of boxes.decode. It starts from `copies` of the first head's neck, a target layer as `first_neck`.
    """

    def __init__(
        self, heads: nn.ModuleList, features: tuple[Tensor, ...], neck: Tensor, copies: int
    ):
        super().__init__()
        self.heads, self.first_neck = heads, nn.Identity()
        self.features = [level.expand(copies, -1, -1, -1) for level in features]
        self.neck = neck.expand(copies, -1, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        neck = self.first_neck(self.neck.requires_grad_())
        for head, features in zip(self.heads[1:], self.features[1:], strict=True):
            neck = head.forward_neck(features, neck)
        return self.heads[-1].forward_logits(neck).flatten(1, 3)


def _score(output: Tensor, index: int, label: int) -> Tensor:
    """The score to explain, objectness logit plus class logit of one prediction: output [3 * G * G, 5 + C] -> scalar.

    Logits, because the product of the probabilities has almost no gradient if the network is confident.
    """
    return output[index, 0].float() + output[index, 5 + label].float()
