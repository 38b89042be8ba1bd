"""The commands that export and measure weights."""

import subprocess
import sys
from pathlib import Path

from src.config import PRESETS

ROOT = Path(__file__).parents[1]


def check(folder, voc_root):
    command = [sys.executable, "-m", "src.training.model_card", "check", str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "VOC_ROOT": str(voc_root)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_measuring_without_voc_says_what_is_missing_and_downloads_nothing(tmp_path):
    PRESETS["voc"].save(tmp_path / "run.json")
    result = check(tmp_path, tmp_path / "empty")
    assert result.returncode == 1 and not result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and "Traceback" not in result.stderr
    assert str(tmp_path / "empty") in lines[0] and "2007/test" in lines[0]
    assert "host.robots.ox.ac.uk" in lines[1] and "VOC_ROOT" in lines[1]
    assert not (tmp_path / "empty").exists()
