"""What the README shows works: its Python, its commands, its make targets, its links to files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from src import config
from src.serving import predict
from tests.planted import blurred_noise
from tests.test_formats import write_yolo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {
    "width": 0.25,
    "image_size": 64,
    "epochs": 1,
    "batch_size": 2,
    "max_lr": 1e-3,
    "num_workers": 0,
    "cache_gb": 0,
    "precision": "32-true",
    "close_mosaic_epochs": 0,
}
LABELS = "0 0.3 0.5 0.4 0.5\n1 0.6 0.5 0.4 0.5\n"
DATA = "train: images/train\nval: images/val\nnames: [mask, no mask]\n"


def test_snippets_and_prediction_work_with_small_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    Image.fromarray(blurred_noise()).save("photo.jpg")
    images = ("images/train/1.jpg", "images/train/2.jpg", "images/val/3.jpg")
    write_yolo(tmp_path / "my_data", dict.fromkeys(images, LABELS), DATA)
    tiny = config.PRESETS["small"].replace(**TINY, data_root="my_data", run_dir="runs/voc")
    monkeypatch.setattr(config, "PRESETS", {"voc": tiny, "small": tiny})
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(snippet, "README.md", "exec"), {})
    assert Path("runs/mine/weights/model.safetensors").exists()
    assert Path("runs/mine/space/app.py").exists()
    for command in re.findall(r"^python -m (src\.serving\.predict [^#\n]+)", README, re.MULTILINE):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as end:
            predict.main()
        assert end.value.code == 0
    assert Path("runs/predict/photo_heatmap.jpg").exists()


def test_make_targets_and_linked_files_exist():
    targets = re.findall(r"`make ([a-z-]+)`", README) + re.findall(r"(?m)^make ([a-z-]+)", README)
    for target in set(targets):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
