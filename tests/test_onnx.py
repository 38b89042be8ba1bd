"""The exported file gives what the network and its gradient give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.model.network import ANCHORS, fuse_batch_norms
from src.serving.gradcam import explain
from src.serving.onnx_model import OnnxModel, export_onnx
from src.serving.predictor import Predictor
from tests.planted import CLASSES, blurred_noise, planted_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    return planted_model(metadata={"data": "planted", "epochs": 3})


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_those_of_torch(batch, model, file):
    images = torch.rand(batch, 3, 96, 96, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = model(images)
    for output, logits in zip(OnnxModel(file)(images), expected, strict=True):
        torch.testing.assert_close(output, logits, rtol=0, atol=0.01)  # weights in half precision


@pytest.mark.parametrize("scale", [0, 1, 2, "all"])
def test_layercam_is_that_of_autograd(scale, model, file):
    """Seeds on one scale or on all. Autograd runs the network with the file's weights."""
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    net = fuse_batch_norms(model).half().float()
    features = [net.backbone.stem(images)]
    for stage in net.backbone.stages:
        features.append(stage(features[-1]))
    logits = net.forward_heads((features[5], features[4], features[3]))
    seeds = [torch.randn_like(level) * (scale in (i, "all")) for i, level in enumerate(logits)]
    gradients = torch.autograd.grad(
        logits, features[3:], seeds, allow_unused=True, materialize_grads=True
    )
    cams = OnnxModel(file).run(images, seeds)[:2:-1]
    for cam, gradient, feature in zip(cams, gradients, features[3:], strict=True):
        expected = (gradient.relu() * feature.detach()).sum(dim=1).relu()
        torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
    assert cams[2].any()


def test_the_file_is_complete_and_has_metadata(model, file):
    """One file, weights in half precision, no NMS, no paths, what other programs need to know."""
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(graph)
    assert any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.graph.initializer)
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()
    assert not any(node.op_type == "NonMaxSuppression" for node in graph.graph.node)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes["images"] == [1, 3, 96, 96] and shapes["cam32"] == [1, 3, 3]
    assert shapes["logits16"] == shapes["seed16"] == [1, 3, 6, 6, 5 + len(CLASSES)]
    facts = {prop.key: json.loads(prop.value) for prop in graph.metadata_props}
    assert facts["classes"] == CLASSES and facts["strides"] == [32, 16, 8]
    np.testing.assert_allclose(facts["anchors"], np.multiply(ANCHORS, 96), rtol=1e-6)
    loaded = OnnxModel(file)
    assert loaded.metadata == model.metadata and loaded.image_size == 96
    assert loaded.num_parameters == model.num_parameters


def test_the_predictor_gives_the_same_detections(model, file):
    predictors = Predictor(model, device="cpu"), Predictor.load(file, device="cpu")
    assert predictors[1].classes == CLASSES and predictors[1].image_size == 96
    images = [blurred_noise(150, 90, seed) for seed in range(3)]
    batches = [predictor.batch(images, confidence=0.2) for predictor in predictors]
    batches[1][2] = predictors[1](images[2], confidence=0.2)
    for expected, detections in zip(*batches, strict=True):
        assert len(expected) and detections.labels.tolist() == expected.labels.tolist()
        assert detections.index.tolist() == expected.index.tolist()
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-3)
        np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-3 * 150)


@pytest.mark.parametrize("layers", ["all", "3", "4", "5"])
def test_heatmaps_are_those_of_torch(layers, model, file):
    images = [blurred_noise(150, 90, seed) for seed in range(2)]
    for image in images:
        maps = [
            explain(predictor, image, "square", layers, confidence=0.2).heatmap
            for predictor in (Predictor(model, device="cpu"), Predictor.load(file, device="cpu"))
        ]
        assert maps[0].max() == 1 and np.corrcoef(*map(np.ravel, maps))[0, 1] > 0.99
    message = "Unknown method 'gradcam' for this model. Choose one of layercam"
    with pytest.raises(ValueError, match=message):
        explain(Predictor.load(file), images[0], method="gradcam")


def test_errors_say_what_to_do(file, tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:1000])
    for name in ("damaged.onnx", "missing.onnx"):
        with pytest.raises(ValueError, match=rf"{name} is not a file of export_onnx. Export it"):
            Predictor.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"S = 96, not \[1, 3, 128, 128\].*Leave out image_size"):
        Predictor.load(file, image_size=128)(blurred_noise())
