"""Export to ONNX: one file that gives detections and heatmaps in a browser, without PyTorch."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from src.model.network import STRIDES, YOLOv3, fuse_batch_norms

INPUTS = ("images", "seed32", "seed16", "seed8")
OUTPUTS = ("logits32", "logits16", "logits8", "cam32", "cam16", "cam8")


class HeatmapGraph(nn.Module):
    """YOLOv3 and LayerCAM (Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943).

    forward(images float [1, 3, S, S], seeds)
        seeds: three [1, 3, G, G, 5 + C], the gradient of a score with respect to the logits
        -> logits: three [1, 3, G, G, 5 + C], LayerCAM of the backbone's stages 5, 4, 3: three
           [1, G, G]; all in the order of the strides 32, 16, 8
    """

    def __init__(self, model: YOLOv3):
        super().__init__()
        self.model = fuse_batch_norms(model).cpu().half()  # as in the file

    def forward(self, images: Tensor, *seeds: Tensor) -> tuple[Tensor, ...]:
        features = self.model.backbone(images)
        logits = self.model.forward_heads(features)
        gradients = torch.autograd.grad(logits, features, seeds)
        pairs = zip(features, gradients, strict=True)
        return *logits, *[(x * gradient.relu()).sum(dim=1).relu() for x, gradient in pairs]


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, _, stride, padding, *others):
    """Compute the gradient at a convolution's input, of its three, by what ONNX has."""
    extra = stride[0] - 1
    return (
        nn.functional.conv_transpose2d(gradient, weight, None, stride, padding, extra),
        None,
        None,
    )


def upsampling_backward(gradient: Tensor, *sizes) -> Tensor:
    """Compute the gradient at the input of a nearest upsampling, which copies a pixel to 2 x 2."""
    return 4 * nn.functional.avg_pool2d(gradient, 2)


BACKWARD = {
    torch.ops.aten.convolution_backward.default: convolution_backward,
    torch.ops.aten.upsample_nearest2d_backward.default: upsampling_backward,
}


def export_onnx(model: YOLOv3, path: str | Path) -> Path:
    """Write the `HeatmapGraph` of a model as one ONNX file, weights in half precision.

    Inputs: images float [1, 3, S, S] in 0..1, RGB, letterboxed, S = model.image_size, and
    seed32, seed16, seed8, zeros if no heatmap is needed.
    Outputs: logits32, logits16, logits8, for `boxes.decode`, and cam32, cam16, cam8.
    metadata_props: `model_facts` as JSON. Needs the package onnxscript.
    """
    graph, size = HeatmapGraph(model), model.image_size

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        weights = {name: weight.float() for name, weight in graph.named_parameters()}
        return torch.func.functional_call(graph, weights, inputs)

    shapes = [(1, 3, size // stride, size // stride, 5 + len(model.classes)) for stride in STRIDES]
    inputs = tuple(torch.zeros(shape) for shape in [(1, 3, size, size), *shapes])
    traced = make_fx(run, BACKWARD)(*inputs)  # autograd's steps become steps of the graph
    program = torch.onnx.export(
        traced.eval(),
        inputs,
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamo=True,
        verbose=False,
    )
    for part in (program.model.graph, *program.model.graph):
        part.metadata_props.clear()  # the exporter's stack traces
    for name, value in model_facts(model).items():
        program.model.metadata_props[name] = json.dumps(value)
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
