"""Export of the app as a Hugging Face Space: code, weights, samples and requirements in one folder."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, SpaceHardware, get_token
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from src.model.network import YOLOv3
from src.serving.images import load_image

PINNED = (
    "numpy",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "grad-cam",
    "gradio",
)  # gradio requires huggingface_hub
REQUIREMENTS = """# Spaces choose the versions of torch and torchvision. ZeroGPU refuses others.
torch
torchvision
"""
PYTHON = "3.12"  # ZeroGPU has 3.10 and 3.12
RUN_LOCALLY = "To run the folder without Hugging Face: `pip install -r requirements.txt`, then `python app.py`."
MARKER = ".exported-space"  # a file in every exported folder; a folder without it is never replaced
SAMPLE_SIZE = 640  # largest long side of a sample, in pixels
APP = '''"""Start the app."""

import os
from pathlib import Path

HERE = Path(__file__).parent
ZERO_GPU = os.environ.get("SPACES_ZERO_GPU") == "true"  # https://huggingface.co/docs/hub/spaces-zerogpu
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if ZERO_GPU:
    import spaces  # before torch

    @spaces.GPU
    def gpu_function():
        """Never called, because the app is fast enough on the CPU. ZeroGPU stops apps without a GPU function."""


from src.serving.app import build_app
from src.serving.predictor import Predictor

demo = build_app(
    Predictor.load(HERE / "weights", device="cpu" if ZERO_GPU else ""),
    samples=sorted((HERE / "samples").glob("*.jpg")),
    links={links!r},
    title={title!r},
)

if __name__ == "__main__":
    demo.launch()
'''
README = """---
title: {quoted}
emoji: 🔎
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: mit
{models}short_description: Object detection with Grad-CAM explanations
---

# {title}

Detects objects of {classes} classes with a YOLOv3 of {parameters:.1f} million parameters, and shows the Grad-CAM heatmap
of each detection. Training data: {data}.

To run it on your own machine: `pip install -r requirements.txt`, then `python app.py`.
{links}"""


def export_space(
    model: YOLOv3,
    folder: str | Path,
    samples: Sequence[np.ndarray | str | Path] = (),
    links: dict[str, str] | None = None,
    title: str = "YOLOv3 object detection with Grad-CAM",
    hub_model: str = "",
) -> Path:
    """Write a Space into `folder` and return its path. An older export is replaced as a whole.

    samples: example images, uint8 [H, W, 3] or files. links: text -> address.
    hub_model: the model's id on the Hub ("name/model"), if it was uploaded; the app then links to it.
    Raises FileExistsError if `folder` contains anything but an export, and ValueError if a sample is not an image.
    """
    folder = Path(folder)
    if (
        folder.exists()
        and not (folder / MARKER).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise FileExistsError(
            f"{folder} was not made by export_space and is not replaced. Choose another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        model_link = {"Model": f"https://huggingface.co/{hub_model}"} if hub_model else {}
        _write_space(model, new, samples, model_link | dict(links or {}), title, hub_model)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    return folder


def _write_space(
    model: YOLOv3, folder: Path, samples: Sequence, links: dict, title: str, hub_model: str
) -> None:
    """Write the files of a Space into a new folder."""
    source = Path(__file__).parents[1]
    for part in ("model", "serving"):
        shutil.copytree(
            source / part, folder / "src" / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copyfile(source / "__init__.py", folder / "src" / "__init__.py")
    for name in ("weights", "samples"):
        (folder / name).mkdir()
    model.save_pretrained(folder / "weights")
    for number, sample in enumerate(samples, start=1):
        image = Image.fromarray(load_image(sample))
        image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
        image.save(folder / "samples" / f"{number:02d}.jpg", quality=90)
    (folder / MARKER).write_text("Made by export_space. The next export replaces this folder.\n")
    (folder / "app.py").write_text(APP.format(title=title, links=links), encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(), encoding="utf-8")
    (folder / "README.md").write_text(_readme(model, links, title, hub_model), encoding="utf-8")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def requirements() -> str:
    """Pin the packages of a Space to the installed versions, except torch and torchvision."""
    return REQUIREMENTS + "".join(f"{name}=={version(name)}\n" for name in PINNED)


def _readme(model: YOLOv3, links: dict, title: str, hub_model: str) -> str:
    """Fill in README.md; its header configures the Space (https://huggingface.co/docs/hub/spaces-config-reference)."""
    return README.format(
        title=title,
        quoted=json.dumps(title, ensure_ascii=False),
        gradio=version("gradio"),
        python=PYTHON,
        models=f"models:\n- {hub_model}\n" if hub_model else "",
        parameters=model.num_parameters / 1e6,
        classes=len(model.classes),
        data=model.metadata.get("data", "not stated"),
        links="".join(f"\n- [{name}]({address})" for name, address in links.items()),
    )


def push_space(folder: str | Path, repo_id: str, token: str | None = None) -> str:
    """Upload an exported folder to the Space `repo_id` ("name/space"). Returns its address.

    A missing Space is created on ZeroGPU, the only hardware of free accounts; the app doesn't use its GPU.
    token: one with write access. Default: the one of `hf auth login` or of the variable HF_TOKEN.
    Raises FileNotFoundError if the folder is not an export, and PermissionError if there is no token or the account may
    not create the Space.
    """
    if not (Path(folder) / MARKER).is_file():
        raise FileNotFoundError(
            f"{folder} is not an exported Space. Make one with export_space(model, {str(folder)!r})."
        )
    if not (token or get_token()):
        raise PermissionError(
            "No Hugging Face token. Create one with write access at https://huggingface.co/settings/tokens. Then run "
            f"`hf auth login`, set HF_TOKEN, or use push_space(..., token=...). {RUN_LOCALLY}"
        )
    api, hardware = HfApi(token=token), SpaceHardware.ZERO_A10G  # the name of ZeroGPU
    try:
        address = api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", space_hardware=hardware, exist_ok=True
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (402, 403):
            raise
        raise PermissionError(
            f"Hugging Face doesn't create the Space {repo_id}: {error}\nThe token needs write access. Free accounts can have "
            "two Spaces if their e-mail address is verified and they are older than 30 days. Other accounts need PRO, "
            f"organizations Team. {RUN_LOCALLY}"
        ) from error
    api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder, delete_patterns="*")
    return str(address)
