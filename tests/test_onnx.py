"""The exported file gives what the network gives, at other sizes and batches than those of its export."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from src.model.boxes import decode
from src.model.network import ANCHORS
from src.serving.gradcam import explain
from src.serving.onnx_model import OnnxModel, export_onnx
from src.serving.predictor import Predictor
from tests.planted import CLASSES, blurred_noise, planted_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with bfloat16 weights, then converted to float32, and its file."""
    model = planted_model(metadata={"data": "planted", "epochs": 3}).bfloat16()
    file = export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")
    assert next(model.parameters()).dtype == torch.bfloat16
    return model.float(), file


@pytest.fixture
def model(exported):
    return exported[0]


@pytest.fixture
def file(exported):
    return exported[1]


@pytest.mark.parametrize("batch, size", [(1, 32), (1, 96), (5, 64), (2, 160), (1, 224), (3, 416)])
def test_any_batch_and_size_gives_what_torch_gives(batch, size, model, file):
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = decode(model(images), model.anchors_at(size))
    for output, value in zip(OnnxModel(file)(images), expected, strict=True):
        torch.testing.assert_close(output, value, rtol=0, atol=1e-4)


def test_the_file_is_complete_and_has_metadata(model, file):
    """One file, no NMS, and what a program without this project needs to know."""
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(graph)
    assert all(
        tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.graph.initializer
    )
    assert not any(node.op_type == "NonMaxSuppression" for node in graph.graph.node)
    inputs, boxes, scores = (
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    )
    assert inputs == ["batch", 3, "size", "size"]
    assert boxes == ["batch", "predictions", 4] and scores == ["batch", "predictions", len(CLASSES)]
    facts = {prop.key: json.loads(prop.value) for prop in graph.metadata_props}
    assert (
        facts["classes"] == CLASSES
        and facts["strides"] == [32, 16, 8]
        and facts["image_size"] == 96
    )
    np.testing.assert_allclose(facts["anchors"], np.multiply(ANCHORS, 96), rtol=1e-6)
    loaded = OnnxModel(file)
    assert loaded.metadata == model.metadata and loaded.num_parameters == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("image_size", [0, 160])
def test_the_predictor_gives_the_same_detections(image_size, model, file):
    predictors = (
        Predictor(model, image_size, device="cpu"),
        Predictor.load(file, image_size=image_size),
    )
    assert predictors[1].classes == CLASSES and predictors[1].image_size == (image_size or 96)
    images = [blurred_noise(150, 90, seed) for seed in range(3)]
    batches = [predictor.batch(images, confidence=0.2) for predictor in predictors]
    batches[1][2] = predictors[1](images[2], confidence=0.2)
    for expected, detections in zip(*batches, strict=True):
        assert len(expected) and detections.labels.tolist() == expected.labels.tolist()
        assert detections.index.tolist() == expected.index.tolist()
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-3)
        np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-3 * 150)


def test_gradcam_needs_the_pytorch_weights(file):
    with pytest.raises(ValueError, match=r"Grad-CAM needs gradients.*Load the PyTorch weights"):
        explain(Predictor.load(file), blurred_noise())


def test_the_app_detects_and_says_why_there_is_no_heatmap(file, tmp_path):
    from src.serving.app import analyze_image, build_app, render_detections

    Image.fromarray(blurred_noise()).save(tmp_path / "image.png")
    handlers = {event.name: event.fn for event in build_app(file).fns.values()}
    session = analyze_image(Predictor.load(file), tmp_path / "image.png")
    assert render_detections(session, 0.2, 0.45)[2]
    heatmap, message = handlers["explain"](session, "all", "own", "hirescam", 0.7, 0.2, 0.45)
    assert heatmap is None and "Load the PyTorch weights" in message


def test_errors_say_what_to_do(file, tmp_path, monkeypatch):
    from src.serving.app import build_app

    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"damaged.onnx is not a file of export_onnx.*Export it again"
    ):
        Predictor.load(tmp_path / "damaged.onnx")
    with pytest.raises(
        FileNotFoundError, match="missing.onnx is missing. Write it with export_onnx"
    ):
        Predictor.load(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match="multiple of 32"):
        Predictor.load(file, image_size=100)(blurred_noise())
    with pytest.raises(ValueError, match="on the CPU, not on cuda"):
        Predictor.load(file, device="cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install onnxruntime`.*Space.*requirements\.txt"):
        build_app(file)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        export_onnx(planted_model(), tmp_path / "model.onnx")
