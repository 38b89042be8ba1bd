"""The network: parameters, shapes, files."""

import json
import struct

import numpy as np
import pytest
import torch

from src.config import Config
from src.model import network as network_module
from src.model.boxes import decode
from src.model.darknet import PUBLISHED, load_darknet
from src.model.network import ANCHORS, ConvBlock, Darknet53, Residual, YOLOv3
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
def test_number_of_parameters(num_classes, width, expected):
    with torch.device("meta"):
        assert YOLOv3(num_classes, width).num_parameters == expected


def test_backbone_is_darknet53():
    with torch.device("meta"):
        network = YOLOv3()
    blocks = [m for m in network.backbone.modules() if isinstance(m, ConvBlock)]
    assert len(blocks) == 52  # the 53rd is the classifier
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 75  # as in yolov3.cfg


@pytest.mark.parametrize("size", [32, 64, 96, 160])
def test_any_multiple_of_32(size):
    logits = YOLOv3(7, 0.125)(torch.rand(2, 3, size, size))
    grids = [size // stride for stride in (32, 16, 8)]
    assert [tuple(level.shape) for level in logits] == [(2, 3, grid, grid, 12) for grid in grids]


@pytest.mark.parametrize("shape", [(1, 3, 100, 100), (1, 3, 64, 96), (3, 64, 64), (1, 3, 0, 0)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        YOLOv3(2, 0.125)(torch.zeros(shape))


@pytest.mark.parametrize(("scales", "anchors"), [(1, 5), (2, 3), (4, 2)])
def test_anchors_say_how_many_scales_there_are(tmp_path, scales, anchors):
    sizes = [[[0.5 / 2**scale, 0.1 * (1 + a)] for a in range(anchors)] for scale in range(scales)]
    model = build_model(Config(width=0.125, anchors=sizes))
    model.save_pretrained(tmp_path)
    grids = [64 // stride for stride in (32, 16, 8, 4)[:scales]]
    for network in (model, YOLOv3.from_pretrained(tmp_path)):
        logits = network(torch.rand(2, 3, 64, 64))
        assert [tuple(level.shape) for level in logits] == [(2, anchors, g, g, 25) for g in grids]
        assert decode(logits, network.anchors)[0].shape == (
            2,
            sum(anchors * g * g for g in grids),
            4,
        )


def test_anchors_in_pixels_do_not_depend_on_the_size():
    network = YOLOv3(2, 0.125, image_size=160)
    assert torch.equal(network.anchors_at(160), network.anchors)
    for size in (96, 224):
        torch.testing.assert_close(network.anchors_at(size) * size, network.anchors * 160)


def test_anchors_move_with_the_weights_and_are_not_averaged():
    """A run that is resumed with other pretrained weights validates with its own anchors."""
    config = Config(width=0.125, classes=("a", "b"))
    detector, ema = YOLOv3Module(config), EMA(0.9)
    assert detector.to("meta").model.anchors.is_meta
    detector = YOLOv3Module(config)
    ema.setup(None, detector, "fit")
    own = torch.rand(3, 3, 2)
    state = {"classes": ["a", "b"], "anchors": own.tolist(), "metadata": {}}
    detector.on_load_checkpoint(state)
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


def test_a_pretrained_backbone_keeps_its_weights(monkeypatch):
    trained = Darknet53(0.125)
    torch.nn.init.constant_(trained.stem[0].weight, 0.5)
    monkeypatch.setattr(network_module, "Darknet53", lambda width, scales: trained)
    assert (YOLOv3(2, 0.125).backbone.stem[0].weight == 0.5).all()


def test_save_and_load(tmp_path):
    facts = {"classes": ["a", "b", "c"], "image_size": 96, "metadata": {"epochs": 2}}
    network = random_net(num_classes=3, width=0.125, **facts)
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


def test_weights_of_another_class_count_are_refused(tmp_path):
    YOLOv3(3, 0.125).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_classes": 4, "classes": list("abcd")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit a YOLOv3 of 4 classes"):
        YOLOv3.from_pretrained(tmp_path)


def test_missing_and_damaged_weights_are_named(tmp_path):
    YOLOv3(3, 0.125).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        YOLOv3.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        YOLOv3.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["runs/mistyped/weights", "mistyped", "owner/mistyped"])
def test_a_folder_that_does_not_exist_is_named(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{source} is not a folder here"):
        YOLOv3.from_pretrained(source)


def write_darknet(network: YOLOv3, path, backbone_only: bool = False, version=(0, 2, 5)) -> None:
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
        file.write(struct.pack("<3i", *version))
        file.write(struct.pack("<q" if version[1] >= 2 else "<i", 32_013_312))
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


@pytest.mark.parametrize("version", [(0, 2, 5), (0, 1, 0)])
def test_darknet_weights_whole(tmp_path, version):
    network, other = random_net(num_classes=5, width=0.125), random_net(num_classes=5, width=0.125)
    write_darknet(network, tmp_path / "yolov3.weights", version=version)
    assert load_darknet(other, tmp_path / "yolov3.weights") == "everything"
    assert_same_outputs(network, other)


def test_darknet_backbone(tmp_path):
    network, other = random_net(num_classes=5, width=0.125), YOLOv3(2, 0.125, image_size=608).eval()
    write_darknet(network, tmp_path / "darknet53.conv.74", backbone_only=True)
    assert load_darknet(other, tmp_path / "darknet53.conv.74") == "the backbone"
    assert_same_outputs(network.backbone, other.backbone)
    assert torch.equal(other.anchors, torch.tensor(ANCHORS))


def test_darknet_80_classes_into_another_count(tmp_path):
    network, other = random_net(num_classes=80, width=0.125), random_net(num_classes=2, width=0.125)
    before = [head.predict.weight.clone() for head in other.heads]
    write_darknet(network, tmp_path / "yolov3.weights")
    assert load_darknet(other, tmp_path / "yolov3.weights") == "all but the last layers"
    for head, source, expected in zip(other.heads, network.heads, before, strict=True):
        assert torch.equal(head.expand[0].weight, source.expand[0].weight)
        assert torch.equal(head.predict.weight, expected)


def test_truncated_and_other_files_are_refused(tmp_path):
    network, path = random_net(num_classes=5, width=0.125), tmp_path / "yolov3.weights"
    write_darknet(network, path)
    whole = path.read_bytes()
    before = network.state_dict()["backbone.stem.0.weight"].clone()
    noise, not_finite = np.random.default_rng(0).bytes(1000), b"\xff" * (len(whole) - 20)
    for content in (whole[:-4], whole + b"1234", noise, b"", whole[:10], whole[:20] + not_finite):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{len(content):,} bytes"):
            load_darknet(network, path)
    assert torch.equal(network.state_dict()["backbone.stem.0.weight"], before)
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{len(whole):,}"):
        load_darknet(network, path)


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
    for model in (network, YOLOv3.from_pretrained(tmp_path / "saved")):
        torch.testing.assert_close(model.anchors_at(size) * size, CFG_ANCHORS.float())
        grids = [size // stride for stride in (32, 16, 8)]
        logits = [torch.zeros(1, 3, grid, grid, 5 + num_classes) for grid in grids]
        boxes = decode(logits, model.anchors_at(size))[0][0] * size
        for level, expected in zip(
            boxes.split([3 * g * g for g in grids]), CFG_ANCHORS, strict=True
        ):
            sizes = (level[:, 2:] - level[:, :2]).unflatten(0, (3, -1))[:, 0]
            torch.testing.assert_close(sizes, expected.float(), rtol=0, atol=1e-3)


def count_values(*convolutions: tuple[int, int, int]) -> int:
    """Values of (channels in, channels out, kernel) with batch norm; kernel 0: 1x1 with a bias."""
    return sum(i * o * k**2 + 4 * o if k else i * o + o for i, o, k in convolutions)


BACKBONE = [(3, 32, 3)]
for channels, repeats in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
    BACKBONE += [
        (channels // 2, channels, 3),
        *[(channels, channels // 2, 1), (channels // 2, channels, 3)] * repeats,
    ]
HEADS = [
    (1024, 512, 1),
    (512, 1024, 3),
    (1024, 512, 1),
    (512, 1024, 3),
    (1024, 512, 1),
    (512, 1024, 3),
    (1024, 255, 0),
    (512, 256, 1),
    (768, 256, 1),
    (256, 512, 3),
    (512, 256, 1),
    (256, 512, 3),
    (512, 256, 1),
    (256, 512, 3),
    (512, 255, 0),
    (256, 128, 1),
    (384, 128, 1),
    (128, 256, 3),
    (256, 128, 1),
    (128, 256, 3),
    (256, 128, 1),
    (128, 256, 3),
    (256, 255, 0),
]
TINY = [
    (3, 16, 3),
    (16, 32, 3),
    (32, 64, 3),
    (64, 128, 3),
    (128, 256, 3),
    (256, 512, 3),
    (512, 1024, 3),
    (1024, 256, 1),
    (256, 512, 3),
    (512, 255, 0),
    (256, 128, 1),
    (384, 256, 3),
    (256, 255, 0),
]
FILES = {
    "yolov3.weights": BACKBONE + HEADS,
    "darknet53.conv.74": BACKBONE,
    "darknet53.weights": [*BACKBONE, (1024, 1000, 0)],
    "yolov3-spp.weights": [*BACKBONE, *HEADS, (2048, 512, 1)],
    "yolov3-tiny.weights": TINY,
}


def sparse_darknet_file(path, convolutions) -> None:
    """Write a file of zeros with a Darknet header; it takes no disk space."""
    with open(path, "wb") as file:
        file.write(struct.pack("<3iq", 0, 2, 5, 0))
        file.truncate(20 + 4 * count_values(*convolutions))


@pytest.mark.parametrize("name", FILES)
def test_published_darknet_files_are_recognized(tmp_path, name):
    assert len(BACKBONE) == 52 and len(BACKBONE + HEADS) == 75 and len(TINY) == 13
    sparse_darknet_file(tmp_path / "file", FILES[name])
    with torch.device("meta"):
        full, narrow = YOLOv3(80), YOLOv3(80, 0.25)
    width = "Published weights fit width 1 only; this network has width 0.25"
    with pytest.raises(ValueError, match=f"file is {name}.*{width}"):
        load_darknet(narrow, tmp_path / "file")
    if name in ("yolov3.weights", "darknet53.conv.74"):
        assert PUBLISHED[count_values(*FILES[name])] == name
    else:
        advice = "Use yolov3.weights or darknet53.conv.74"
        with pytest.raises(ValueError, match=f"file is {name}, .*{advice}"):
            load_darknet(full, tmp_path / "file")


def test_a_truncated_darknet_file_of_width_1_is_downloaded_again(tmp_path):
    sparse_darknet_file(tmp_path / "file", [*BACKBONE, *HEADS[:-1]])
    with torch.device("meta"), pytest.raises(ValueError, match="248,007,048.* Download it again"):
        load_darknet(YOLOv3(80), tmp_path / "file")
