"""requirements.txt names what src imports; what is missing can be installed without internet."""

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_rooms import FILES, imported
from tools import wheels

ROOT = Path(__file__).parents[1]
OPTIONAL = {"onnxscript", "onnxruntime"}  # of the ONNX export
DEPENDENCIES = {"ipython": "ipywidgets", "gradio-client": "gradio", "starlette": "gradio"}


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_an_upgrade_does_not_break_transformers():
    """Kaggle's gradio 5 is upgraded and takes the newest huggingface-hub that is allowed."""
    allowed = requirements()["huggingface-hub"].specifier
    assert allowed.contains("1.99") and not allowed.contains("2.0")  # transformers 5: below 2


def test_the_package_imports_only_what_requirements_install():
    names = (
        {name.partition(".")[0] for path in FILES for name in imported(path)}
        - {"src"}
        - set(sys.stdlib_module_names)
    )
    owners = packages_distributions()
    used = {canonicalize_name(owner) for name in names - OPTIONAL for owner in owners[name]}
    assert {DEPENDENCIES.get(name, name) for name in used} <= requirements().keys()


def write_wheel(folder: Path, name: str) -> None:
    """Write a wheel without code."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_wheels_of_missing_packages_install_without_an_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    write_wheel(tmp_path / "index", "missing")
    Path("requirements.txt").write_text("missing\nnumpy\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheels.main()
    assert [path.name for path in Path("wheels").iterdir()] == ["missing-1.0-py3-none-any.whl"]
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "-r", "requirements.txt"]
    done = subprocess.run(pip, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "Would install missing-1.0"
