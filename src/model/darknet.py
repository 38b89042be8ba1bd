"""Weight files published for Darknet: yolov3.weights (everything), darknet53.conv.74 (backbone)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from src.model.network import ConvBlock, YOLOv3
from src.model.pretrained import transfer_weights

HEADER = 20  # bytes: version 3 x int32, number of images seen int64
FILE_CLASSES = 80  # of COCO, on which yolov3.weights was trained
OBJECTNESS_FIRST = [4, 0, 1, 2, 3, *range(5, 5 + FILE_CLASSES)]  # Darknet has x, y, w, h before it


@torch.no_grad()
def load_darknet(model: YOLOv3, path: str | Path) -> str:
    """Copy the weights of yolov3.weights or darknet53.conv.74 into a network of width 1.

    After its header the file has float32: per convolution its batch norm (bias, weight, mean,
    variance) or its bias, then the kernel. PyTorch's epsilon, 1e-5 added to the variance, is that
    of Darknet's GPU code. yolov3.weights brings Darknet's anchors, the same pixels at any image
    size, and its class logits if the network has 80 classes, too.
    Returns what was loaded. Raises ValueError if the file has another size.
    """
    classes = model.classes if len(model.classes) == FILE_CLASSES else None
    source = YOLOv3(FILE_CLASSES, model.width, classes)
    layers = {}  # by the size of the file
    for part in (source, source.backbone):
        tensors = _tensors_in_file_order(part)
        layers[HEADER + 4 * sum(map(torch.numel, tensors))] = tensors
    size = Path(path).stat().st_size
    if size not in layers:
        raise ValueError(
            f"{path} has {size:,} bytes. At width {model.width:g}, yolov3.weights has "
            f"{max(layers):,} and darknet53.conv.74 {min(layers):,}. Download it again, or use one "
            "of these files. Published weights fit width 1 only."
        )

    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=HEADER))
    nn.utils.vector_to_parameters(values, layers[size])
    if size == min(layers):
        model.backbone.load_state_dict(source.backbone.state_dict())
        return "the backbone"
    for head in source.heads:
        for tensor in head.predict.parameters():
            rows = tensor.unflatten(0, (head.num_anchors, -1))  # [A, 5 + C, ...]
            tensor.copy_(rows[:, OBJECTNESS_FIRST].flatten(0, 1))
    return transfer_weights(model, source)


def _tensors_in_file_order(module: nn.Module) -> list[Tensor]:
    """Return the weights and the statistics of all convolutions, in the order of the file."""
    tensors = []
    for layer in module.modules():
        if isinstance(layer, ConvBlock):
            conv, norm, _ = layer
            tensors += [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight]
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
            tensors += [layer.bias, layer.weight]
    return tensors
