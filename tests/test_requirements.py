"""requirements.txt names what src imports; what is missing can be installed without internet."""

import subprocess
import sys
import zipfile
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_rooms import FILES, imported
from tools import wheels

ROOT = Path(__file__).parents[1]
DEPENDENCIES = {"ipython": "ipywidgets", "gradio-client": "gradio"}


def test_the_package_imports_only_what_requirements_install():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {canonicalize_name(Requirement(line).name) for line in lines if line[0] != "#"}
    names = {name.partition(".")[0] for path in FILES for name in imported(path)}
    names -= {"src", *sys.stdlib_module_names}
    owners = defaultdict(set)  # by module; Python 3.10's packages_distributions misses some
    for package in distributions():
        modules = (package.read_text("top_level.txt") or "").split()
        for module in modules or {
            file.parts[0].removesuffix(".py") for file in package.files or ()
        }:
            owners[module].add(canonicalize_name(package.name))
    assert all(owners[name] for name in names)
    used = {owner for name in names for owner in owners[name]}
    assert {DEPENDENCIES.get(name, name) for name in used} <= required


FILES_OF_A_WHEEL = {
    "METADATA": "Metadata-Version: 2.1\nName: missing\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


def test_wheels_of_missing_packages_install_without_an_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile("index/missing-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES_OF_A_WHEEL.items():
            wheel.writestr(f"missing-1.0.dist-info/{name}", text)
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
