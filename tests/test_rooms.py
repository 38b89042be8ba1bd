"""The serving half never reaches into the training half, nor for what only training needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from src.serving.space import SERVING

ROOT = Path(__file__).parents[1]
LIBRARIES = {"torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "huggingface_hub"}
GRADIO = {"gradio", "gradio_client", "starlette"}  # gradio brings the others
EXTRA = {"gradcam.py": {"pytorch_grad_cam"}, "app.py": GRADIO, "guard.py": GRADIO}
SERVED = {f"src.{Path(name).stem}" for name in SERVING}


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names |= {f"src.{alias.name}" for alias in node.names} if node.module == "src" else {node.module}
    return names


@pytest.mark.parametrize("name", SERVING)
def test_serving_files_import_only_what_a_space_has(name):
    names = imported(ROOT / "src" / name)
    assert {module for module in names if module.startswith("src")} <= SERVED
    outside = {module.partition(".")[0] for module in names} - {"src"} - set(sys.stdlib_module_names)
    assert outside <= LIBRARIES | EXTRA.get(name, set())


def test_what_is_loaded():
    """Predicting needs no page and no figures. The page loads grad-cam's matplotlib, but nothing of training."""
    code = "import sys, src.predict, src.drawing; print(*sys.modules); import src.app; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    predicting, serving = map(set, map(str.split, run.stdout.splitlines()))
    training = {"pytorch_lightning", "lightning", "albumentations", "torchmetrics", "skimage"}
    assert not predicting & {*training, "matplotlib", "gradio", "pytorch_grad_cam"}
    assert not serving & training
    assert {module for module in serving if module.startswith("src.")} <= SERVED
