"""The exported Space: complete, ready for free accounts, independent, never over other files."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from unittest import mock

import httpx
import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from src.serving.images import load_image
from src.serving.predict import detections_to_dict
from src.serving.predictor import Predictor
from src.serving.space import MARKER, export_space, push_space
from tests.planted import CLASSES, blurred_noise, planted_model
from tests.visitor import serving

ROOT = Path(__file__).parents[1]
# Run inside an exported folder: reports the files and modules that it opens, and the detections.
START = """
import json, os, sys
opened = set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(os.path.realpath(arguments[0]))
sys.addaudithook(hook)
import app
from src.serving.predictor import Predictor
detections = Predictor.load("weights")("samples/first.jpg", 0.2)
report = [sorted(opened), sorted(sys.modules), detections.index.tolist()]
json.dump(report, open("report.json", "w"))
"""


@pytest.fixture
def folder(exported_space, tmp_path) -> Path:
    """A copy of the Space, for tests that change it."""
    return Path(shutil.copytree(exported_space, tmp_path / "space"))


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_folder_contains_what_a_space_needs(exported_space):
    code = [ROOT / "src/__init__.py", *ROOT.glob("src/model/*.*"), *ROOT.glob("src/serving/*.*")]
    code += ROOT.glob("src/serving/static/*.*")
    others = """
        app.py README.md requirements.txt .gitattributes weights/config.json weights/README.md
        weights/model.safetensors samples/first.jpg samples/second.jpg samples/LICENSES.txt
        samples/03.png"""
    assert files(exported_space) == {str(path.relative_to(ROOT)) for path in code} | {
        *others.split(),
        MARKER,
    }
    stored = load_file(exported_space / "weights" / "model.safetensors")
    assert stored.keys() == planted_model().state_dict().keys()  # not fused


def test_samples_are_copied_byte_for_byte_with_their_licences(exported_space, sample_files):
    """The same detections in the Space as in a notebook, and authors named."""
    for file in sample_files[0].parent.iterdir():
        assert (exported_space / "samples" / file.name).read_bytes() == file.read_bytes()
    array = load_image(exported_space / "samples" / "03.png")
    assert np.array_equal(array, blurred_noise(150, 90))


def test_the_readme_header_is_valid(exported_space):
    _, header, text = (exported_space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert (header["sdk"], header["sdk_version"]) == ("gradio", version("gradio"))
    assert (header["app_file"], header["models"]) == ("app.py", ["a/b"])
    assert header["python_version"] == "3.12" and len(header["short_description"]) <= 60
    assert {header["colorFrom"], header["colorTo"]} <= {
        *["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]
    }
    assert "nothing yet" in text
    for link in ("https://example.org/code", "https://huggingface.co/a/b"):  # also in the app
        assert link in text and link in (exported_space / "app.py").read_text(encoding="utf-8")


def test_the_weights_have_a_card(exported_space):
    text = (exported_space / "weights" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert (header["license"], header["pipeline_tag"]) == ("mit", "object-detection")
    for part in ("| data | nothing yet |\n| mAP50 | 0.123 |\n", ", ".join(CLASSES), "width 0.05"):
        assert part in text


def test_the_app_has_any_title_and_a_link_to_the_model(tmp_path, monkeypatch):
    title = 'It\'s "YOLO": {x} \\ é'
    folder = export_space(planted_model(), tmp_path / "space", title=title)
    header = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(header)["title"] == title
    monkeypatch.setenv("SPACE_ID", "someone/space")
    with mock.patch("src.serving.app.build_app") as build:
        runpy.run_path(str(folder / "app.py"))
    address = "https://huggingface.co/spaces/someone/space/tree/main/weights"
    options = build.call_args.kwargs
    assert (options["title"], options["links"]) == (title, {"Model": address})


def test_requirements_are_pinned_to_the_installed_versions_except_torch(exported_space):
    """ZeroGPU stops the build if torch is pinned to a version that it doesn't have."""
    text = (exported_space / "requirements.txt").read_text()
    lines = {line for line in text.splitlines() if not line.startswith("#")}
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert lines - {f"{name}=={version(name)}" for name in pins} == {"torch", "torchvision"}
    assert {"gradio", "grad-cam", "opencv-python-headless", "safetensors"} <= pins.keys()
    assert not {"pytorch-lightning", "albumentations"} & pins.keys()


def test_an_older_export_is_replaced_as_a_whole(folder):
    (folder / "weights" / "stale.bin").write_text("old")
    export_space(planted_model(), folder, [blurred_noise()])
    assert not {"weights/stale.bin", "samples/first.jpg"} & files(folder)
    assert "samples/01.png" in files(folder)


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("five years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is not an exported Space"):
            export_space(planted_model(), folder)
    assert files(tmp_path) == {"thesis.txt"}


def test_it_starts_from_its_own_files_only(folder):
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, "-c", START], cwd=folder, env=environment, check=True)
    opened, modules, index = json.loads((folder / "report.json").read_text())
    interpreter = (os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix))
    assert not [
        path for path in opened if path.startswith(f"{ROOT}/") and not path.startswith(interpreter)
    ]
    packages = {name.partition(".")[0] for name in modules}
    assert not {"pytorch_lightning", "lightning", "albumentations"} & packages
    expected = Predictor(planted_model(), device="cpu")(folder / "samples" / "first.jpg", 0.2)
    assert index == expected.index.tolist()


def test_it_starts_on_zerogpu_and_predicts_on_the_cpu(exported_space):
    """The package `spaces` reports the GPU function to its server, and makes torch claim a GPU."""
    reports = []

    class DeviceServer(BaseHTTPRequestHandler):
        def do_POST(self):
            reports.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), DeviceServer)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    variables = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": address}
    image = exported_space / "samples" / "first.jpg"
    with server, serving(exported_space, **variables) as (space, _):
        client = Client(space, verbose=False)
        answer = client.predict(handle_file(image), 0.3, 0.6, api_name="/detect")
        server.shutdown()
    assert reports == ["/startup-report"]
    expected = Predictor(planted_model(), device="cpu")(image, 0.3, 0.6)
    assert answer == detections_to_dict(expected, CLASSES, (96, 96))


@pytest.mark.parametrize(("sdk", "hardware"), [("gradio", "zero-a10g"), ("static", None)])
def test_pushing_uploads_the_folder(folder, monkeypatch, sdk, hardware):
    """A Space of either kind; README.md says which."""
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(readme.replace("sdk: gradio", f"sdk: {sdk}"))
    hub = mock.Mock()
    hub.return_value.create_repo.return_value = "https://huggingface.co/spaces/someone/space"
    monkeypatch.setattr("src.serving.space.HfApi", hub)
    address = push_space(folder, "someone/space", token="secret")
    assert address == "https://huggingface.co/spaces/someone/space"
    hub.assert_called_once_with(token="secret")
    created = hub.return_value.create_repo.call_args.kwargs
    assert (created["space_sdk"], created["space_hardware"]) == (sdk, hardware)
    uploaded = hub.return_value.upload_folder.call_args.kwargs
    assert uploaded["folder_path"] == folder and uploaded["repo_type"] == "space"


@pytest.mark.parametrize(
    ("status", "error"), [(401, PermissionError), (402, PermissionError), (500, HfHubHTTPError)]
)
def test_a_refused_space_explains_what_to_do(exported_space, monkeypatch, status, error):
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    refusal = HfHubHTTPError("needs PRO", response=httpx.Response(status, request=request))
    create_repo = mock.Mock(side_effect=refusal)
    monkeypatch.setattr("src.serving.space.HfApi.create_repo", create_repo)
    help = ".*huggingface.co/settings/tokens.*export_static_space works\\s*with\\s*any account"
    with pytest.raises(error, match="(?s)needs PRO" + help * (status < 500)):
        push_space(exported_space, "someone/space", token="secret")
