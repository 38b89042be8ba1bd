"""The exported file gives what the network and its gradient give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.model.network import ANCHORS, fuse_batch_norms
from src.serving.gradcam import explain
from src.serving.onnx_model import INPUTS, OUTPUTS, OnnxModel, export_onnx
from src.serving.predictor import Predictor
from tests.planted import blurred_noise, planted_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    return planted_model(metadata={"data": "planted", "epochs": 3})


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.parametrize("scale", [0, 1, 2, "all"])
def test_the_graph_is_that_of_torch_and_autograd(scale, model, file):
    """Seeds on one scale or on all. Autograd runs the network with the file's weights."""
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    net = fuse_batch_norms(model).half().float()
    features = net.backbone(images)
    logits = net.forward_heads(features)
    seeds = [torch.randn_like(level) * (scale in (i, "all")) for i, level in enumerate(logits)]
    gradients = torch.autograd.grad(logits, features, seeds)
    pairs = zip(features, gradients, strict=True)
    cams = [(gradient.relu() * feature).sum(dim=1).relu() for feature, gradient in pairs]
    arrays = [tensor.numpy() for tensor in (images, *seeds)]
    outputs = OnnxModel(file).session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
    for output, expected in zip(outputs, [*logits, *cams], strict=True):
        largest = expected.abs().max().item()
        expected = expected.detach().numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5 * largest)


def test_the_file_is_complete_and_has_metadata(model, file):
    """One file, weights in half precision, no paths, what other programs need to know."""
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(graph)
    assert any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.graph.initializer)
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()
    facts = {prop.key: json.loads(prop.value) for prop in graph.metadata_props}
    assert facts["strides"] == [32, 16, 8]
    np.testing.assert_allclose(facts["anchors"], np.multiply(ANCHORS, 96), rtol=1e-6)
    for name in ("classes", "image_size", "metadata", "num_parameters"):
        assert getattr(OnnxModel(file), name) == getattr(model, name)


def test_detections_are_those_of_torch(model, file):
    pytorch, ours = Predictor(model, device="cpu"), Predictor.load(file, device="cpu")
    images = [blurred_noise(150, 90, seed) for seed in range(3)]
    for image in images:
        detections, expected = ours(image, confidence=0.2), pytorch(image, confidence=0.2)
        assert len(expected) and detections.index.tolist() == expected.index.tolist()
        np.testing.assert_array_equal(detections.labels, expected.labels)
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-3)
        np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-3 * 150)


def test_errors_say_what_to_do(file, tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:1000])
    for name in ("damaged.onnx", "missing.onnx"):
        with pytest.raises(ValueError, match=rf"{name} is not a file of export_onnx. Export it"):
            Predictor.load(tmp_path / name)
    with pytest.raises(ValueError, match="Heatmaps need PyTorch weights"):
        explain(Predictor.load(file), blurred_noise())
