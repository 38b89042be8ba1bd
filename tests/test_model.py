"""The network: parameters, shapes, files."""

import struct

import numpy as np
import pytest
import torch

from src.config import Config
from src.model.boxes import decode
from src.model.darknet import load_darknet
from src.model.network import ANCHORS, ConvBlock, Residual, YOLOv3
from src.training.callbacks import EMA
from src.training.module import YOLOv3Module, build_model


def random_net(**settings) -> YOLOv3:
    """A network whose batch norms have random statistics and weights."""
    network = YOLOv3(**settings)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return network.eval()


def assert_same_outputs(one: torch.nn.Module, other: torch.nn.Module) -> None:
    images = torch.rand(1, 3, 64, 64)
    for level, expected in zip(one(images), other(images), strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_classes", "width", "expected"),
    [(20, 1.0, 61_626_049), (80, 1.0, 61_949_149), (20, 0.5, 15_453_649), (20, 0.25, 3_887_065)],
)
def test_number_of_parameters_and_layers(num_classes, width, expected):
    with torch.device("meta"):
        network = YOLOv3(num_classes, width)
    assert network.num_parameters == expected
    blocks = [m for m in network.backbone.modules() if isinstance(m, ConvBlock)]
    assert len(blocks) == 52  # the 53rd is the classifier
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 75  # as in yolov3.cfg


@pytest.mark.parametrize("shape", [(1, 3, 100, 100), (1, 3, 64, 96), (3, 64, 64), (1, 3, 0, 0)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        YOLOv3(2, 0.125)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("size", "scales", "anchors"), [(32, 3, 3), (160, 3, 3), (64, 1, 5), (64, 2, 3), (96, 4, 2)]
)
def test_anchors_say_how_many_scales_there_are(tmp_path, size, scales, anchors):
    sizes = [[[0.5 / 2**scale, 0.1 * (1 + a)] for a in range(anchors)] for scale in range(scales)]
    model = build_model(Config(width=0.125, anchors=sizes))
    model.save_pretrained(tmp_path)
    grids = [size // stride for stride in (32, 16, 8, 4)[:scales]]
    for network in (model, YOLOv3.from_pretrained(tmp_path)):
        logits = network(torch.rand(2, 3, size, size))
        assert [tuple(level.shape) for level in logits] == [(2, anchors, g, g, 25) for g in grids]
        count = sum(anchors * g * g for g in grids)
        assert decode(logits, network.anchors)[0].shape == (2, count, 4)


def test_anchors_move_with_the_weights_and_are_not_averaged():
    """A run that is resumed with other pretrained weights validates with its own anchors."""
    config = Config(width=0.125, classes=("a", "b"))
    detector, ema = YOLOv3Module(config), EMA(0.9)
    assert detector.to("meta").model.anchors.is_meta
    detector = YOLOv3Module(config)
    ema.setup(None, detector, "fit")
    own = torch.rand(3, 3, 2)
    detector.on_load_checkpoint({"anchors": own.tolist(), "metadata": {}})
    ema._swap_models(detector)
    assert torch.equal(detector.model.anchors, own)


def test_residual_blocks_start_as_the_identity():
    blocks = [module for module in YOLOv3(2, 0.125).modules() if isinstance(module, Residual)]
    assert len(blocks) == 1 + 2 + 8 + 8 + 4
    for block in blocks:
        x = torch.randn(2, block.body[1][0].out_channels, 4, 4)
        assert torch.equal(block(x), x)
        block(x).sum().backward()
        assert block.body[1][1].weight.grad.abs().sum() > 0  # and it can be learned


def test_initial_objectness_is_low():
    logits = YOLOv3(20, 0.25)(torch.rand(4, 3, 64, 64))
    objectness = torch.cat([level[..., 0].flatten() for level in logits]).sigmoid()
    assert 0.0001 < objectness.mean() < 0.01


def test_save_and_load(tmp_path):
    facts = {"classes": ["a", "b", "c"], "image_size": 96, "metadata": {"epochs": 2}}
    network = random_net(width=0.125, **facts)
    network.save_pretrained(tmp_path)
    loaded = YOLOv3.from_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert "| epochs | 2 |" in (tmp_path / "README.md").read_text()
    assert {name: getattr(loaded, name) for name in facts} == facts and loaded.width == 0.125
    assert_same_outputs(network, loaded)


def test_half_precision_weights_load_as_float32(tmp_path):
    random_net(num_classes=3, width=0.125).half().save_pretrained(tmp_path)
    loaded = YOLOv3.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.anchors, torch.tensor(ANCHORS))


@pytest.mark.parametrize("source", ["tests", "runs/mistyped/weights", "owner/mistyped"])
def test_a_folder_without_weights_is_named(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{source} is not a folder with model.safetensors"):
        YOLOv3.from_pretrained(source)


def write_darknet(network: YOLOv3, path, backbone_only: bool = False) -> None:
    """Write a Darknet file layer by layer in the order of yolov3.cfg."""
    layers = [network.backbone.stem]
    for stage in network.backbone.stages:
        layers.append(stage[0])
        for residual in list(stage)[1:]:
            layers.extend(residual.body)
    for head in [] if backbone_only else network.heads:
        layers += [head.lateral] if head.lateral is not None else []
        layers += [*head.neck, head.expand, head.predict]
    with open(path, "wb") as file:
        file.write(struct.pack("<3iq", 0, 2, 5, 32_013_312))
        for layer in layers:
            if isinstance(layer, torch.nn.Conv2d):
                channels = np.arange(len(layer.bias)).reshape(3, -1)
                order = channels[:, [1, 2, 3, 4, 0, *range(5, channels.shape[1])]].ravel()
                tensors = [layer.bias[order], layer.weight[order]]
            else:
                conv, norm, _ = layer
                tensors = [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight]
            for tensor in tensors:
                file.write(tensor.detach().numpy().astype("<f4").tobytes())


def test_darknet_weights_whole(tmp_path):
    names = list(map("name {}".format, range(80)))
    network, other = (random_net(num_classes=80, width=0.125, classes=names) for _ in range(2))
    write_darknet(network, tmp_path / "yolov3.weights")
    loaded = load_darknet(other, tmp_path / "yolov3.weights")
    assert loaded == "all layers, anchors, and the logits of 80 of 80 classes"
    assert_same_outputs(network, other)


def test_darknet_backbone(tmp_path):
    network, other = random_net(num_classes=80, width=0.125), YOLOv3(2, 0.125, image_size=608)
    write_darknet(network, tmp_path / "darknet53.conv.74", backbone_only=True)
    assert load_darknet(other, tmp_path / "darknet53.conv.74") == "the backbone"
    assert_same_outputs(network.backbone, other.backbone.eval())
    assert torch.equal(other.anchors, torch.tensor(ANCHORS))


def test_darknet_80_classes_into_another_count(tmp_path):
    """All but the class logits, which belong to other classes."""
    network = random_net(num_classes=80, width=0.125)
    other = YOLOv3(2, 0.125, classes=["a", "b"])
    before = [head.predict.weight.clone() for head in other.heads]
    write_darknet(network, tmp_path / "yolov3.weights")
    load_darknet(other, tmp_path / "yolov3.weights")
    for head, source, initial in zip(other.heads, network.heads, before, strict=True):
        assert torch.equal(head.expand[0].weight, source.expand[0].weight)
        weights = (head.predict.weight, source.predict.weight, initial)
        logits, expected, initial = (weight.unflatten(0, (3, -1)) for weight in weights)
        assert torch.equal(logits[:, :5], expected[:, :5])
        assert torch.equal(logits[:, 5:], initial[:, 5:])


def test_truncated_and_other_files_are_refused(tmp_path):
    network, path = random_net(num_classes=2, width=0.125), tmp_path / "yolov3.weights"
    write_darknet(random_net(num_classes=80, width=0.125), path)
    whole = path.read_bytes()
    before = network.state_dict()["backbone.stem.0.weight"].clone()
    for content in (whole[:-4], whole + b"1234", b"noise" * 200, b"", whole[:10]):
        path.write_bytes(content)
        message = f"{len(content):,} bytes.* yolov3.weights has {len(whole):,} .*Download it again"
        with pytest.raises(ValueError, match=message):
            load_darknet(network, path)
    assert torch.equal(network.state_dict()["backbone.stem.0.weight"], before)
    published = "yolov3.weights has 248,007,048 and darknet53.conv.74 162,482,580"
    with torch.device("meta"), pytest.raises(ValueError, match=published):
        load_darknet(YOLOv3(20), path)


CFG_ANCHORS = torch.tensor(  # of yolov3.cfg, in pixels; masks 6-8 (stride 32), 3-5, 0-2
    [[116, 90], [156, 198], [373, 326], [30, 61], [62, 45], [59, 119], [10, 13], [16, 30], [33, 23]]
).view(3, 3, 2)


@pytest.mark.parametrize("num_classes", [80, 2])
@pytest.mark.parametrize("size", [320, 416, 608])
def test_darknet_anchors_are_pixels_at_any_image_size(tmp_path, num_classes, size):
    path, classes = tmp_path / "yolov3.weights", tuple(map(str, range(num_classes)))
    write_darknet(random_net(num_classes=80, width=0.125), path)
    config = Config(width=0.125, image_size=size, classes=classes, pretrained_weights=str(path))
    network = build_model(config)
    network.save_pretrained(tmp_path / "saved")
    loaded = YOLOv3.from_pretrained(tmp_path / "saved")
    for anchors in (network.anchors_at(size), loaded.anchors_at(size)):
        torch.testing.assert_close(anchors * size, CFG_ANCHORS.float())
