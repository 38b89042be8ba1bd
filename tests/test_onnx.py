"""The exported file gives what the network and its gradient give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.model.network import ANCHORS, fuse_batch_norms
from src.serving.onnx_model import INPUTS, OUTPUTS, export_onnx
from tests.planted import planted_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


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
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
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
        assert facts[name] == getattr(model, name)
