"""ONNX: detections and heatmaps from one file that runs without PyTorch, also in a browser."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.model.network import STRIDES, ConvBlock, Head, Residual, YOLOv3, fuse_batch_norms

INPUTS = ("images", "seed32", "seed16", "seed8")
OUTPUTS = ("logits32", "logits16", "logits8", "cam8", "cam16", "cam32")


class HeatmapGraph(nn.Module):
    """YOLOv3 with fused batch norms, and its backward pass down to stage 3, as one forward pass.

    forward(images float [B, 3, S, S], seeds)
        seeds: three [B, 3, G, G, 5 + C], the gradient of a score with respect to the logits
        -> logits: three [B, 3, G, G, 5 + C], strides 32, 16, 8
        -> LayerCAM (Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943) of the backbone's
           stages 3, 4, 5: three [B, G, G], strides 8, 16, 32

    Each `run_` function below runs a part of the network. Besides the output it returns a function:
    gradient at the output -> gradient at the input.
    """

    def __init__(self, model: YOLOv3):
        super().__init__()
        self.model = fuse_batch_norms(model).cpu().half()  # as in the file; cast before each use

    def forward(
        self, images: Tensor, seed32: Tensor, seed16: Tensor, seed8: Tensor
    ) -> tuple[Tensor, ...]:
        stem, stages, heads = self.model.backbone.stem, self.model.backbone.stages, self.model.heads
        stage3, _ = run_chain([stem, *stages[0], *stages[1], *stages[2]], images)
        stage4, backward4 = run_chain(stages[3], stage3)
        stage5, backward5 = run_chain(stages[4], stage4)
        neck32, logits32, backward32 = run_head(heads[0], stage5, None)
        neck16, logits16, backward16 = run_head(heads[1], stage4, neck32)
        _, logits8, backward8 = run_head(heads[2], stage3, neck16)

        gradient3, gradient_neck16 = backward8(seed8, 0)
        gradient4, gradient_neck32 = backward16(seed16, gradient_neck16)
        gradient5, _ = backward32(seed32, gradient_neck32)
        gradient4 = gradient4 + backward5(gradient5)
        gradient3 = gradient3 + backward4(gradient4)
        pairs = (stage3, gradient3), (stage4, gradient4), (stage5, gradient5)
        cams = [(x * gradient.relu()).sum(dim=1).relu() for x, gradient in pairs]
        return logits32, logits16, logits8, *cams


def run_block(block: ConvBlock, x: Tensor) -> tuple[Tensor, Callable]:
    """Run a convolution and its leaky ReLU."""
    conv, slope = block[0], block[2].negative_slope
    output = F.leaky_relu(convolve(conv, x), slope)

    def backward(gradient: Tensor) -> Tensor:
        gradient = gradient * torch.where(output > 0, 1.0, slope)
        weight, extra = conv.weight.float(), conv.stride[0] - 1
        return F.conv_transpose2d(gradient, weight, None, conv.stride, conv.padding, extra)

    return output, backward


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Run a convolution in float32, whatever the precision of its weights."""
    return F.conv2d(x, conv.weight.float(), conv.bias.float(), conv.stride, conv.padding)


def run_residual(residual: Residual, x: Tensor) -> tuple[Tensor, Callable]:
    """Run a residual block."""
    change, backward = run_chain(residual.body, x)
    return x + change, lambda gradient: gradient + backward(gradient)


def run_chain(modules: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Callable]:
    """Run convolution blocks and residual blocks one after the other."""
    backwards = []
    for module in modules:
        run = run_residual if isinstance(module, Residual) else run_block
        x, backward = run(module, x)
        backwards.append(backward)

    def backward_chain(gradient: Tensor) -> Tensor:
        for backward in reversed(backwards):
            gradient = backward(gradient)
        return gradient

    return x, backward_chain


def run_head(
    head: Head, features: Tensor, coarser: Tensor | None
) -> tuple[Tensor, Tensor, Callable]:
    """Run a head: neck [B, mid, G, G], logits [B, 3, G, G, 5 + C], backward.

    backward(gradient at the logits, gradient at the neck from the next finer scale or 0)
        -> gradient at the features, gradient at the neck of the next coarser scale
    """
    if coarser is not None:
        lateral, backward_lateral = run_block(head.lateral, coarser)
        upsampled = F.interpolate(lateral, scale_factor=2.0, mode="nearest")
        features = torch.cat((upsampled, features), dim=1)
    neck, backward_neck = run_chain(head.neck, features)
    expanded, backward_expand = run_block(head.expand, neck)
    logits = convolve(head.predict, expanded).unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2)

    def backward(seed: Tensor, gradient_neck: Tensor | int) -> tuple[Tensor, Tensor | int]:
        seed = seed.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [B, 3 * (5 + C), G, G]
        gradient = backward_expand(F.conv_transpose2d(seed, head.predict.weight.float()))
        gradient = backward_neck(gradient + gradient_neck)
        if coarser is None:
            return gradient, 0
        channels = lateral.shape[1]
        summed = 4 * F.avg_pool2d(gradient[:, :channels], 2)  # each pixel was copied to 2 x 2
        return gradient[:, channels:], backward_lateral(summed)

    return neck, logits, backward


def export_onnx(model: YOLOv3, path: str | Path) -> Path:
    """Write the `HeatmapGraph` of a model as one ONNX file, weights in half precision.

    Inputs: images float [batch, 3, S, S] in 0..1, RGB, letterboxed, S = model.image_size, and
    seed32, seed16, seed8, zeros if no heatmap is needed.
    Outputs: logits32, logits16, logits8, for `boxes.decode`, and cam8, cam16, cam32.
    metadata_props: `model_facts` as JSON. Needs the package onnxscript.
    """
    size = model.image_size
    shapes = [(2, 3, size // stride, size // stride, 5 + len(model.classes)) for stride in STRIDES]
    program = torch.onnx.export(
        HeatmapGraph(model).eval(),
        tuple(torch.zeros(shape) for shape in [(2, 3, size, size), *shapes]),
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamic_shapes=[{0: torch.export.Dim("batch")} for _ in INPUTS],
        dynamo=True,
        verbose=False,
    )
    for part in (program.model.graph, *program.model.graph):
        part.metadata_props.clear()  # the exporter's stack traces
    for name, value in model_facts(model).items():
        program.model.metadata_props[name] = json.dumps(value)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=False)
    return Path(path)


def model_facts(model: YOLOv3) -> dict:
    """Return what other programs need to know. Anchors are (width, height) in pixels."""
    return {
        "classes": model.classes,
        "image_size": model.image_size,
        "strides": STRIDES,
        "anchors": (torch.tensor(model.anchor_sizes) * model.image_size).tolist(),
        "num_parameters": model.num_parameters,
        "metadata": model.metadata,
    }


class OnnxModel(nn.Module):
    """A file of `export_onnx` as a model for `Predictor`; onnxruntime runs it on the CPU.

    `classes`, `image_size`, `metadata` and `num_parameters` are those of the exported YOLOv3.
    """

    def __init__(self, path: str | Path):
        """Load a file. Raises ValueError if it is missing, damaged or not an export."""
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            facts = self.session.get_modelmeta().custom_metadata_map
            for name in ("classes", "image_size", "metadata", "num_parameters"):
                setattr(self, name, json.loads(facts[name]))
            anchors = torch.tensor(json.loads(facts["anchors"])) / self.image_size
        except Exception as error:  # onnxruntime has an exception class per error code
            message = f"{path} is not a file of export_onnx. Export it again. {error!r}"
            raise ValueError(message) from None
        self.register_buffer("anchors", anchors)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images float [B, 3, S, S] in 0..1 -> three logits [B, 3, G, G, 5 + C], as YOLOv3."""
        shapes = [value.shape[1:] for value in self.session.get_inputs()]
        if list(images.shape[1:]) != shapes[0]:
            raise ValueError(
                f"The file takes images [B, 3, S, S] with S = {self.image_size}, not "
                f"{list(images.shape)}. Leave out image_size, or export another file."
            )
        return self._run(images, [torch.zeros(len(images), *shape) for shape in shapes[1:]])[:3]

    def layercam(self, images: Tensor, seeds: list[Tensor]) -> list[Tensor]:
        """Return the LayerCAM maps [B, G, G] of stages 3, 4, 5; seeds as in `HeatmapGraph`."""
        return self._run(images, seeds)[3:]

    def _run(self, images: Tensor, seeds: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.float().numpy(force=True) for tensor in (images, *seeds)]
        outputs = self.session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
        return [torch.from_numpy(output).to(images.device) for output in outputs]

    def anchors_at(self, image_size: int) -> Tensor:
        """Return the anchors [3, 3, 2] in 0..1 of an image of `image_size` pixels, as YOLOv3."""
        return self.anchors * (self.image_size / image_size)

    def __deepcopy__(self, memo: dict) -> "OnnxModel":
        """Return the model itself: it never changes, and its session can't be copied."""
        return self
