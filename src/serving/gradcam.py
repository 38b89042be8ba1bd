"""Grad-CAM heatmaps for detections, by the formulas of pytorch-grad-cam."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM

from src.serving.images import load_image
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

CAMS = {
    "layercam": LayerCAM,  # Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943
    "hirescam": HiResCAM,  # Draelos & Carin 2020, https://arxiv.org/abs/2011.08891
    "gradcam": GradCAM,  # Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391
    "gradcam++": GradCAMPlusPlus,  # Chattopadhay et al. 2018, https://arxiv.org/abs/1710.11063
    "eigencam": EigenCAM,  # Muhammad & Yeasin 2020, https://arxiv.org/abs/2008.00299
}
METHODS = {
    "layercam": "LayerCAM",
    "hirescam": "HiResCAM",
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "eigencam": "EigenCAM",
}
LAYERS = {  # the backbone's features, by their stride
    "all": "All levels",
    "8": "Objects' parts (stride 8)",
    "16": "Parts and objects (stride 16)",
    "32": "Whole objects (stride 32)",
}
MAX_EXPLAINED = 24  # detections per heatmap, the best; each costs a backward pass


@dataclass(frozen=True)
class Explanation:
    """A heatmap for one or more detections of an image."""

    heatmap: np.ndarray  # float32 [H, W] on the image's pixels; the maximum is 1, or all are 0
    detections: Detections  # of the image; if there are none, the top candidate
    explained: np.ndarray  # int64 [m] rows of `detections` that the heatmap shows
    message: str  # "", or no detection found, not all are shown, or the heatmap is empty
    is_candidate: bool  # nothing was detected, `detections` is a candidate below the threshold


class Explainer:
    """Run one forward pass over one image, then compute any number of heatmaps from it.

    image: whatever `load_image` takes. `candidates` are those of `Predictor.candidates`, `size` is
    the image's (width, height).
    """

    def __init__(self, predictor: Predictor, image):
        image = load_image(image)
        self.predictor = predictor
        self.size = image.shape[1::-1]
        self.inputs, self.placement = predictor.preprocess(image)
        self.logits = self._run()
        self.predictions = torch.cat([level[0].flatten(0, 2) for level in self.logits])
        self.candidates = predictor.postprocess(self.logits, self.placement, image)

    def _run(self) -> list[torch.Tensor]:
        """Run the network, keep the features of stages 3, 4, 5, and return the logits."""
        model = self.predictor.fused
        stages = model.backbone.stages
        with torch.no_grad():  # gradients end at stage 3
            stage3 = torch.nn.Sequential(model.backbone.stem, *stages[:3])(self.inputs)
        stage3.requires_grad_()  # [1, C3, S/8, S/8]
        stage4 = stages[3](stage3)  # [1, C4, S/16, S/16]
        stage5 = stages[4](stage4)  # [1, C5, S/32, S/32]
        self.features = {"8": stage3, "16": stage4, "32": stage5}
        return model.forward_heads((stage5, stage4, stage3))

    def explain(
        self,
        target: str | int = "all",
        layers: str = "all",
        method: str = "layercam",
        confidence: float = CONFIDENCE,
        iou_threshold: float = IOU_THRESHOLD,
    ) -> Explanation:
        """Compute where in the image the evidence for `target` is.

        target: "all" detections, the name of a class, or the row of one detection (0 is the best).
            Each detection has its own heatmap in 0..1; the maximum over them is returned.
        layers: a key of LAYERS. method: a key of METHODS; "eigencam" doesn't depend on the target.
        confidence, iou_threshold: thresholds of the detections.
        Raises ValueError with the choices if target, layers or method is unknown.
        """
        for name, value, choices in (("layers", layers, LAYERS), ("method", method, METHODS)):
            if value not in choices:
                raise ValueError(f"Unknown {name} {value!r}. Choose one of {', '.join(choices)}.")
        detections, rows, missing = self._select(target, confidence, iou_threshold)
        explained = rows[:MAX_EXPLAINED]
        maps = [
            self._heatmap(detections.index[row], detections.labels[row], layers, method)
            for row in (explained[:1] if method == "eigencam" else explained)
        ]
        heatmap = scale(cv2.resize(np.max(maps, axis=0), self.size))
        message = missing or ("" if heatmap.any() else "Nothing raises the score, by this method.")
        if len(rows) > MAX_EXPLAINED:
            message = f"The heatmap shows the best {MAX_EXPLAINED} of {len(rows)} detections."
        return Explanation(heatmap, detections, explained, message, is_candidate=bool(missing))

    def _select(
        self, target: str | int, confidence: float, iou_threshold: float
    ) -> tuple[Detections, np.ndarray, str]:
        """Return detections, the rows to explain, and ""; if none, the top candidate and why."""
        classes = self.predictor.classes
        detections = self.candidates.detections(confidence, iou_threshold)
        rows = np.arange(len(detections))
        choices = {
            "all": rows,
            **{name: rows[detections.labels == label] for label, name in enumerate(classes)},
            **{row: rows[row : row + 1] for row in range(max(len(rows), 1))},
        }
        if target not in choices:
            raise ValueError(f"Unknown target {target!r}. Choose one of {[*choices]}.")
        if len(choices[target]):
            return detections, choices[target], ""
        label = classes.index(target) if target in classes else None
        top = self.candidates.top_candidate(label)
        missing = (
            f"No {'detection' if label is None else target} above {100 * confidence:.0f}%. "
            f"The top candidate is {classes[top.labels[0]]} at {100 * top.scores[0]:.1f}%."
        )
        return top, np.array([0]), missing

    def _heatmap(self, index: int, label: int, layers: str, method: str) -> np.ndarray:
        """Return one prediction's heatmap [h, w] in 0..1, on the letterbox without its bars.

        It explains the log of the score, objectness times class probability: if the network is
        confident, the score itself has almost no gradient. Sum over the layers, each map M [G, G]
        as max(M, 0) / its maximum, upsampled. The library also subtracts each map's minimum; here
        0 keeps its meaning, no evidence.
        """
        logits = self.predictions[index, [0, 5 + label]].float()  # objectness and class
        log_score = torch.nn.functional.logsigmoid(logits).sum()
        heatmap = sum(  # [S, S]
            cv2.resize(scale(np.maximum(layer, 0)), self.inputs.shape[2:])
            for layer in self._maps(log_score, layers, method)
        )
        left, top = self.placement[2:].astype(int)
        width, height = np.rint(self.placement[:2] * self.size).astype(int)
        return scale(heatmap[top : top + height, left : left + width])

    def _maps(self, log_score: torch.Tensor, layers: str, method: str) -> list[np.ndarray]:
        """Return the map [G, G] of each layer."""
        features = [self.features[stride] for stride in self.features if layers in ("all", stride)]
        gradients = torch.autograd.grad(log_score, features, retain_graph=True)
        cam = CAMS[method](self.predictor.fused, target_layers=[])
        features, gradients = (
            [tensor.float().numpy(force=True) for tensor in tensors]
            for tensors in (features, gradients)
        )
        return [
            cam.get_cam_image(None, None, None, feature, gradient, False)[0]
            for feature, gradient in zip(features, gradients, strict=True)
        ]


def scale(heatmap: np.ndarray) -> np.ndarray:
    """Divide a heatmap without negative values by its maximum; zeros stay zeros."""
    return heatmap / max(heatmap.max(), np.finfo(np.float32).tiny)


def explain(predictor: Predictor, image, *arguments, **options) -> Explanation:
    """Explain the detections in an image; arguments as for `Explainer.explain`."""
    return Explainer(predictor, image).explain(*arguments, **options)
