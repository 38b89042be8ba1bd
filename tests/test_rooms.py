"""Which package of src may import which. A Space is a copy of `model` and `serving` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # package -> the packages it may import
    "config": {"model"},
    "model": set(),
    "serving": {"model"},
    "data": {"config", "model", "serving"},
    "training": {"config", "model", "serving", "data"},
    "figures": {"config", "model", "serving", "data", "training"},
}
LIBRARIES = {"torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "huggingface_hub"}
GRADIO = {"gradio", "gradio_client"}  # gradio installs the other
ONNX = {"onnxscript", "onnxruntime"}  # a Space runs without them
EXTRA = {
    "gradcam.py": {"pytorch_grad_cam"},
    "app.py": GRADIO,
    "guard.py": GRADIO,
}
FILES = [*sorted(ROOT.glob("src/*/*.py")), ROOT / "src/config.py"]
SERVED = sorted([*ROOT.glob("src/model/*.py"), *ROOT.glob("src/serving/*.py")])


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at any level of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package(path: Path) -> str:
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{package(path)}/{path.name}")
def test_packages_import_only_the_packages_below_them(path):
    names = {name.split(".")[1] for name in imported(path) if name.startswith("src.")}
    assert names - {package(path)} <= ALLOWED[package(path)]


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.name)
def test_a_space_imports_only_its_requirements(path):
    outside = {name.partition(".")[0] for name in imported(path)} - {"src"}
    assert outside - sys.stdlib_module_names <= LIBRARIES | EXTRA.get(path.name, set())


def test_loaded_modules():
    """Prediction loads neither the app nor figures. The app loads no training code."""
    code = (
        "import sys, src.serving.predictor, src.serving.drawing; print(*sys.modules); "
        "import src.serving.app; print(*sys.modules)"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    predicting, serving = map(set, map(str.split, run.stdout.splitlines()))
    training = {"pytorch_lightning", "lightning", "albumentations", "torchmetrics", "skimage"}
    assert not predicting & {*training, *ONNX, "matplotlib", "gradio", "pytorch_grad_cam"}
    assert not serving & {*training, *ONNX}
    assert {name.split(".")[1] for name in serving if name[:4] == "src."} == {"model", "serving"}
