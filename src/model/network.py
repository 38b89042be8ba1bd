"""YOLOv3: Darknet-53 and its heads (Redmon & Farhadi 2018, https://arxiv.org/abs/1804.02767)."""

import copy
import json
import math
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

from src.model.pretrained import CONFIG, format_metadata, write_weights

# YOLOv3 (Redmon & Farhadi 2018), section 2.3: widths and heights in pixels of a 416 x 416 image,
# large objects (stride 32) first. Stored in 0..1 of the image.
ANCHORS = tuple(
    tuple((w / 416, h / 416) for w, h in scale)
    for scale in (
        ((116, 90), (156, 198), (373, 326)),
        ((30, 61), (62, 45), (59, 119)),
        ((10, 13), (16, 30), (33, 23)),
    )
)
STRIDES = (32, 16, 8)  # of the three scales; a further scale has half the stride of the one before
WEIGHTS = "model.safetensors"
CARD = """---
{{ card_data }}
---
# YOLOv3, width {{ model.width }}, {{ model.image_size }} px

Detects: {{ model.classes | join(", ") }}.

| | |
| --- | --- |
| parameters | {{ "{:,}".format(model.num_parameters) }} |
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
```python
from src.model.network import YOLOv3
model = YOLOv3.from_pretrained(".")  # this folder, or the model's id on the Hub
```
"""  # a template of Jinja


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, leaky ReLU: [B, in, H, W] -> [B, out, H/s, W/s]."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.LeakyReLU(0.1, inplace=True),
        )
        nn.init.kaiming_normal_(self[0].weight, 0.1, mode="fan_out", nonlinearity="leaky_relu")


class Residual(nn.Module):
    """Residual block (section 2.4, table 1): a 1x1 and a 3x3 convolution beside a shortcut.

    Keeps the shape. Starts as the identity (Goyal et al. 2017, section 5.1).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(channels, channels // 2, 1), ConvBlock(channels // 2, channels, 3)
        )
        nn.init.zeros_(self.body[1][1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Darknet53(nn.Module):
    """The 52 convolutions before the classifier.

    forward(images [B, 3, S, S]) -> features at strides 32, 16, 8, ..., as many as `scales`.
    `channels`: of these features.
    """

    def __init__(self, width: float = 1.0, scales: int = 3):
        super().__init__()
        channels = [max(8, 8 * round(width * 2**power / 8)) for power in range(5, 11)]  # 32 to 1024
        self.channels = channels[::-1][:scales]  # coarsest first
        self.stem = ConvBlock(3, channels[0], 3)
        self.stages = nn.ModuleList()
        for before, after, repeats in zip(channels, channels[1:], (1, 2, 8, 8, 4), strict=False):
            residuals = [Residual(after) for _ in range(repeats)]
            self.stages.append(nn.Sequential(ConvBlock(before, after, 3, stride=2), *residuals))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[::-1][: len(self.channels)]


class Head(nn.Module):
    """Predict one scale from the backbone's features and the neck of the next coarser scale.

    forward(features [B, in, G, G], coarser [B, coarser, G/2, G/2] or None)
        -> neck [B, in/2, G, G], an input of the next finer scale, and logits [B, A, G, G, 5 + C].
    """

    def __init__(self, channels: int, channels_coarser: int, num_anchors: int, num_classes: int):
        super().__init__()
        mid = channels // 2
        self.num_anchors = num_anchors
        self.lateral = ConvBlock(channels_coarser, mid, 1) if channels_coarser else None
        joined = channels + (mid if channels_coarser else 0)
        self.neck = nn.Sequential(
            ConvBlock(joined, mid, 1),
            ConvBlock(mid, 2 * mid, 3),
            ConvBlock(2 * mid, mid, 1),
            ConvBlock(mid, 2 * mid, 3),
            ConvBlock(2 * mid, mid, 1),
        )
        self.expand = ConvBlock(mid, 2 * mid, 3)
        self.predict = nn.Conv2d(2 * mid, num_anchors * (5 + num_classes), 1)

        # Start with a low objectness: RetinaNet (Lin et al. 2017), section 4.1
        nn.init.normal_(self.predict.weight, std=0.01)
        bias = nn.init.zeros_(self.predict.bias).data.view(num_anchors, -1)  # [A, 5 + C]
        bias[:, 0] = -math.log(999)  # objectness 0.001
        bias[:, 5:] = -math.log(max(1, num_classes - 1))  # one class in C

    def forward(self, features: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.lateral is not None:
            coarser = self.lateral(coarser)
            upsampled = nn.functional.interpolate(coarser, scale_factor=2.0)  # nearest neighbour
            features = torch.cat((upsampled, features), dim=1)
        neck = self.neck(features)  # [B, in/2, G, G]
        logits = self.predict(self.expand(neck))  # [B, A * (5 + C), G, G]
        return neck, logits.unflatten(1, (self.num_anchors, -1)).permute(0, 1, 3, 4, 2)


class YOLOv3(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="pytorch",
    tags=["object-detection", "yolov3"],
    license="mit",
    pipeline_tag="object-detection",
    model_card_template=CARD,
):
    """Images float [B, 3, S, S] in 0..1 -> logits [B, A, S/stride, S/stride, 5 + C] per scale.

    Per cell and anchor: objectness, x, y, w, h, classes. `width` multiplies the channels of every
    layer. `anchors` [scales][A] are (width, height) in 0..1 of an image of `image_size` pixels, and
    say how many scales there are: strides 32, 16, 8, and so on. `metadata` holds facts about the
    training. config.json stores all arguments.
    Another backbone returns features from the coarsest to the finest, and has their `channels`.
    """

    def __init__(
        self,
        num_classes: int = 20,
        width: float = 1.0,
        classes: list | None = None,
        anchors: list = ANCHORS,
        image_size: int = 416,
        metadata: dict | None = None,
    ):
        super().__init__()
        self.classes = list(classes or map("class {}".format, range(num_classes)))
        self.width = width
        self.image_size = image_size
        self.metadata = metadata or {}
        self.anchor_sizes = anchors  # as given, for config.json: the tensor has fewer digits
        self.anchors = torch.tensor(anchors, dtype=torch.float32)  # [scales, A, 2]
        self.backbone = Darknet53(width, scales=len(anchors))
        self.heads = nn.ModuleList()
        coarser = 0
        for channels in self.backbone.channels:
            self.heads.append(Head(channels, coarser, len(anchors[0]), len(self.classes)))
            coarser = channels // 2

    def forward(self, images: Tensor) -> list[Tensor]:
        size = images.shape[-1]
        if images.dim() != 4 or images.shape[-2] != size or size == 0 or size % 32:
            raise ValueError(
                "YOLOv3 takes images [B, 3, S, S] with S a multiple of 32, "
                f"not {list(images.shape)}"
            )
        return self.forward_heads(self.backbone(images))

    def forward_heads(self, features: list[Tensor]) -> list[Tensor]:
        """Compute the logits of all scales from the backbone's features."""
        neck = None
        logits = []
        for head, level in zip(self.heads, features, strict=True):
            neck, level_logits = head(level, neck)
            logits.append(level_logits)
        return logits

    def _apply(self, fn, *args, **kwargs) -> "YOLOv3":
        """Move the anchors with the weights. They are no buffer, because EMA averages buffers."""
        self.anchors = fn(self.anchors)
        return super()._apply(fn, *args, **kwargs)

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_anchors(self, anchors: Tensor) -> None:
        """Use other anchors [scales, A, 2], relative to an image of `image_size` pixels."""
        self.anchor_sizes = anchors.tolist()
        self.anchors.copy_(anchors)

    def anchors_at(self, image_size: int) -> Tensor:
        """Return the anchors [scales, A, 2] in 0..1 of an image of `image_size` pixels.

        In pixels they don't depend on it.
        """
        return self.anchors * (self.image_size / image_size)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """Return the README.md that `save_pretrained` and `push_to_hub` write if there is none."""
        return super().generate_model_card(model=self, facts=format_metadata(self.metadata))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and the weights, for `save_pretrained` and `push_to_hub`."""
        settings = {
            "num_classes": len(self.classes),
            "width": self.width,
            "classes": self.classes,
            "anchors": self.anchor_sizes,
            "image_size": self.image_size,
            "metadata": self.metadata,
        }
        write_weights(self.state_dict(), save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "YOLOv3":
        """Load a folder written by `save_pretrained`, or a model of the Hub by its id.

        Reads safetensors only, never a pickle. Raises FileNotFoundError if there is neither.
        """
        folder = Path(source)
        if not (folder / WEIGHTS).exists():
            try:
                folder = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CONFIG]))
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"{source} is not a folder with {WEIGHTS}, and can't be loaded from the Hub. "
                    "Give a folder written by YOLOv3.save_pretrained, or the id of a model "
                    f"(owner/name). {error}"
                ) from None
        model = cls(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()


def fuse_batch_norms(model: YOLOv3) -> YOLOv3:
    """Return a float32 copy of a model in evaluation mode, batch norms fused into convolutions."""
    fused = copy.deepcopy(model).float().eval()
    for block in fused.modules():
        if isinstance(block, ConvBlock):
            block[0] = nn.utils.fuse_conv_bn_eval(block[0], block[1])
            block[1] = nn.Identity()
    return fused
