"""The rooms of src and who may import whom: a Space is a copy of `model` and `serving`, so these need nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # room -> the rooms it may import
    "config": {"model"},
    "model": set(),
    "serving": {"model"},
    "data": {"config", "model", "serving"},
    "training": {"config", "model", "serving", "data"},
    "figures": {"config", "model", "serving", "data", "training"},
}
LIBRARIES = {"torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "huggingface_hub"}
GRADIO = {"gradio", "gradio_client", "starlette"}  # gradio installs the others
EXTRA = {"gradcam.py": {"pytorch_grad_cam"}, "app.py": GRADIO, "guard.py": GRADIO}
FILES = sorted(ROOT.glob("src/*/*.py")) + [ROOT / "src/config.py"]
SERVED = sorted([*ROOT.glob("src/model/*.py"), *ROOT.glob("src/serving/*.py")])


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


def room(path: Path) -> str:
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{room(path)}/{path.name}")
def test_rooms_import_only_the_rooms_below_them(path):
    names = {name.split(".")[1] for name in imported(path) if name.startswith("src.")}
    assert names - {room(path)} <= ALLOWED[room(path)]


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.name)
def test_a_space_imports_only_its_own_packages(path):
    outside = {name.partition(".")[0] for name in imported(path)} - {"src"} - set(sys.stdlib_module_names)
    assert outside <= LIBRARIES | EXTRA.get(path.name, set())


def test_what_is_loaded():
    """Prediction loads neither page nor figures. The page loads grad-cam's matplotlib, but nothing of training."""
    code = (
        "import sys, src.serving.predictor, src.serving.drawing; print(*sys.modules); "
        "import src.serving.app; print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    predicting, serving = map(set, map(str.split, run.stdout.splitlines()))
    training = {"pytorch_lightning", "lightning", "albumentations", "torchmetrics", "skimage"}
    assert not predicting & {*training, "matplotlib", "gradio", "pytorch_grad_cam"}
    assert not serving & training
    assert {name.split(".")[1] for name in serving if name.startswith("src.")} == {"model", "serving"}
