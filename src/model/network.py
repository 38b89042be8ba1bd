"""YOLOv3: Darknet-53 and its three heads (Redmon & Farhadi 2018, https://arxiv.org/abs/1804.02767)."""

import copy
import json
import math
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.model.darknet import load_darknet
from src.model.pretrained import write_weights

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
STRIDES = (32, 16, 8)
CARD = """---
{{ card_data }}
---
# YOLOv3, width {{ width }}, {{ image_size }} px

{{ parameters }} million parameters. Detects: {{ classes }}.

| | |
| --- | --- |
{{ facts }}

```python
from src.model.network import YOLOv3
model = YOLOv3.from_pretrained(".")  # this folder, or the model's id on the Hub
```
"""  # a template of Jinja


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, leaky ReLU: [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.LeakyReLU(0.1, inplace=True),
        )


class Residual(nn.Module):
    """Residual block (section 2.4, table 1): a 1x1 and a 3x3 convolution beside a shortcut; keeps the shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(channels, channels // 2, 1), ConvBlock(channels // 2, channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Darknet53(nn.Module):
    """The 52 convolutions before the classifier: [B, 3, S, S] -> features at strides 32, 16 and 8."""

    def __init__(self, channels: list[int]):
        super().__init__()
        self.stem = ConvBlock(3, channels[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                ConvBlock(before, after, 3, stride=2), *(Residual(after) for _ in range(repeats))
            )
            for before, after, repeats in zip(channels, channels[1:], (1, 2, 8, 8, 4), strict=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[5], features[4], features[3]


class Head(nn.Module):
    """Predict one scale from the backbone's features and the neck of the next coarser scale, if there is one.

    forward(features [B, in, G, G], coarser [B, coarser, G/2, G/2] or None)
        -> neck [B, mid, G, G], an input of the next finer scale, and logits [B, 3, G, G, 5 + C].
    """

    def __init__(self, channels_in: int, channels_coarser: int, mid: int, num_classes: int):
        super().__init__()
        self.lateral = ConvBlock(channels_coarser, mid, 1) if channels_coarser else None
        joined = channels_in + (mid if channels_coarser else 0)
        self.neck = nn.Sequential(
            ConvBlock(joined, mid, 1),
            ConvBlock(mid, 2 * mid, 3),
            ConvBlock(2 * mid, mid, 1),
            ConvBlock(mid, 2 * mid, 3),
            ConvBlock(2 * mid, mid, 1),
        )
        self.expand = ConvBlock(mid, 2 * mid, 3)
        self.predict = nn.Conv2d(2 * mid, 3 * (5 + num_classes), 1)

    def forward(self, features: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        neck = self.forward_neck(features, coarser)
        return neck, self.forward_logits(neck)

    def forward_neck(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        """Compute the neck alone."""
        if self.lateral is not None:
            upsampled = nn.functional.interpolate(
                self.lateral(coarser), scale_factor=2.0, mode="nearest"
            )
            features = torch.cat((upsampled, features), dim=1)
        return self.neck(features)

    def forward_logits(self, neck: Tensor) -> Tensor:
        """Compute the logits from a neck."""
        logits = self.predict(self.expand(neck))  # [B, 3 * (5 + C), G, G]
        return logits.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2)


class YOLOv3(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="pytorch",
    tags=["object-detection", "yolov3"],
    license="mit",
    pipeline_tag="object-detection",
    model_card_template=CARD,
):
    """Images float [B, 3, S, S] in 0..1 -> three logits [B, 3, S/stride, S/stride, 5 + C], strides 32, 16, 8.

    Per cell and anchor: objectness, x, y, w, h, classes. `width` multiplies the channels of every layer.
    `anchors` [3][3] are (width, height) in 0..1 of an image of `image_size` pixels. config.json stores the arguments;
    `metadata` holds facts about the training.
    """

    def __init__(
        self,
        num_classes: int = 20,
        width: float = 1.0,
        classes: list | None = None,
        anchors: list = ANCHORS,
        image_size: int = 416,
        metadata: dict | None = None,
        about: dict | None = None,  # the former name of metadata, in older config.json files
    ):
        super().__init__()
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"YOLOv3: num_classes is {num_classes}, but classes has {len(classes)} names"
            )
        if num_classes < 1 or not 0 < width <= 4:
            raise ValueError(
                f"YOLOv3: num_classes must be at least 1 and width in 0..4, not {num_classes} and {width}"
            )
        self.classes = list(classes) if classes else [f"class {i}" for i in range(num_classes)]
        self.width, self.image_size, self.metadata = width, image_size, metadata or about or {}
        c = [max(8, 8 * round(channels * width / 8)) for channels in (32, 64, 128, 256, 512, 1024)]
        self.backbone = Darknet53(c)
        self.heads = nn.ModuleList(
            Head(channels_in, coarser, mid, num_classes)
            for channels_in, coarser, mid in (
                (c[5], 0, c[4]),
                (c[4], c[4], c[3]),
                (c[3], c[3], c[2]),
            )
        )
        self.anchor_sizes = anchors  # as given, for config.json: the buffer loses digits in .half()
        self.register_buffer(
            "anchors", torch.tensor(anchors, dtype=torch.float32), persistent=False
        )  # [3, 3, 2]
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu"
                )
            if isinstance(
                module, Residual
            ):  # start as the identity: Goyal et al. 2017, section 5.1
                nn.init.zeros_(module.body[1][1].weight)
        for (
            head
        ) in self.heads:  # start with a low objectness: RetinaNet (Lin et al. 2017), section 4.1
            nn.init.normal_(head.predict.weight, std=0.01)
            bias = head.predict.bias.data.zero_().view(3, -1)
            bias[:, 0] = -math.log(999)  # objectness 0.001
            bias[:, 5:] = -math.log(max(1, bias.shape[1] - 6))  # one class in C

    def forward(self, images: Tensor) -> list[Tensor]:
        size = images.shape[-1]
        if images.dim() != 4 or images.shape[-2] != size or size == 0 or size % 32:
            raise ValueError(
                f"YOLOv3 takes images [B, 3, S, S] with S a multiple of 32, not {list(images.shape)}"
            )
        return self.forward_heads(self.backbone(images))[1]

    def forward_heads(
        self, features: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the three necks and the three logits from the backbone's features at strides 32, 16 and 8."""
        necks, logits = [None], []
        for head, level_features in zip(self.heads, features, strict=True):
            neck, level = head(level_features, necks[-1])
            necks.append(neck)
            logits.append(level)
        return necks[1:], logits

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_anchors(self, anchors: Tensor) -> None:
        """Use other anchors [3, 3, 2] (width, height), relative to an image of `image_size` pixels."""
        self.anchor_sizes = anchors.tolist()
        self.anchors.copy_(anchors)

    def anchors_at(self, image_size: int) -> Tensor:
        """Return the anchors [3, 3, 2] in 0..1 of an image of `image_size` pixels; in pixels they don't depend on it."""
        return self.anchors * (self.image_size / image_size)

    def settings(self) -> dict:
        """Return the arguments that build this network again; config.json stores them."""
        return {
            "num_classes": len(self.classes),
            "width": self.width,
            "classes": self.classes,
            "anchors": self.anchor_sizes,
            "image_size": self.image_size,
            "metadata": self.metadata,
        }

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """Return the README.md that `save_pretrained` and `push_to_hub` write where there is none."""
        facts = "\n".join(
            f"| {name} | {value} |" for name, value in format_metadata(self.metadata).items()
        )
        return super().generate_model_card(
            width=f"{self.width:g}",
            image_size=self.image_size,
            parameters=f"{self.num_parameters / 1e6:.1f}",
            classes=", ".join(self.classes),
            facts=facts,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors for `save_pretrained`; an interrupted call leaves no partial weights."""
        write_weights(self.state_dict(), save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(
            json.dumps(self.settings(), indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, **options) -> "YOLOv3":
        """Load a folder written by `save_pretrained`, or a model of the Hub by its id. options: as for the Hub's mixin.

        Raises FileNotFoundError if there is neither, ValueError if the weights don't fit.
        """
        try:
            return super().from_pretrained(source, **options)
        except (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        ) as error:
            raise FileNotFoundError(
                f"{source} is not a folder here, and can't be loaded from the Hub. Give a folder written by "
                f"YOLOv3.save_pretrained, or the id of a model (owner/name). {error}"
            ) from None

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options) -> "YOLOv3":
        """Load a model for `from_pretrained`. Reads safetensors only, never a pickle; every tensor must be present and fit."""
        hub = {
            n: options.pop(n)
            for n in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        }
        for name in ("proxies", "resume_download"):  # huggingface-hub before 1.0 passes these too
            options.pop(name, None)
        path = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            path = Path(hf_hub_download(model_id, path.name, **hub))
        elif not path.exists():
            raise FileNotFoundError(
                f"{path} is missing. Give a folder written by YOLOv3.save_pretrained, or a Hub id."
            )
        model = cls(**options)
        try:
            model.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path} does not fit a YOLOv3 of {len(model.classes)} classes at width {model.width}. "
                f"num_classes and width come from config.json or from your arguments. {error}"
            ) from None
        return model.to(map_location).eval()

    def load_darknet(self, path: str | Path) -> str:
        """Load a weight file published for Darknet; see `src.model.darknet.load_darknet`.

        If it contains the detection heads, the anchors become Darknet's: the same pixels at any image size.
        """
        part = load_darknet(self, path)
        if part != "backbone":
            self.set_anchors(torch.tensor(ANCHORS, dtype=torch.float64) * (416 / self.image_size))
        return part


def format_metadata(metadata: dict) -> dict:
    """Return the metadata of weights with its metrics in one level, floats with three digits."""
    flat = metadata | metadata.get("metrics", {})
    return {
        name: f"{v:.3g}" if isinstance(v, float) else v
        for name, v in flat.items()
        if name != "metrics"
    }


def fuse_batch_norms(model: YOLOv3) -> YOLOv3:
    """Return a float32 copy of a model in evaluation mode, each batch norm fused into its convolution."""
    fused = copy.deepcopy(model).float().eval()
    for block in fused.modules():
        if isinstance(block, ConvBlock):
            block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
    return fused
