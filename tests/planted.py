"""A small untrained network with detections, and an image, for tests of what is done with them."""

import numpy as np
import torch
from PIL import Image

from src.model.network import YOLOv3

CLASSES = ["circle", "square", "star"]


def planted_model(image_size: int = 96, **options) -> YOLOv3:
    """The same network in every call: 8 to 30 boxes per class, scores of 0.2 to 0.6.

    The scores depend on the image.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(18)
        model = YOLOv3(len(CLASSES), width=0.05, classes=CLASSES, image_size=image_size, **options)
        model.eval()
        logits = model(torch.rand(1, 3, image_size, image_size))
        for head, level in zip(model.heads, logits, strict=True):
            head.predict.weight.mul_(0.4 / level.std(dim=(0, 2, 3)).mean())  # standard deviation
        large, middle, _ = (head.predict.bias.view(3, -1) for head in model.heads)
        large[0] = torch.tensor([0.5, 0, 0, 0.2, 0.2, 2, -3, -3])
        large[1] = torch.tensor([0, 0, 0, 0.2, 0.2, -3, 2, -3])
        middle[2] = torch.tensor([-0.3, 0, 0, 0, 0, -3, -3, 2])
    return model


def blurred_noise(width: int = 96, height: int = 96, seed: int = 3) -> np.ndarray:
    """An image of soft coloured patches, uint8 [height, width, 3]."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))
