"""A folder that runs by itself as a Hugging Face Space: the app, its weights, samples and pinned requirements."""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, get_token
from PIL import Image

from src.model.network import YOLOv3
from src.serving.images import load_image

ROOMS = ("model", "serving")  # what a Space is made of
PACKAGES = (
    "torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "safetensors", "huggingface_hub",
    "grad-cam", "gradio",
)  # fmt: skip
MARK = ".exported-space"  # lies in every exported folder; one without it is never emptied
CPU_NOTE = (
    "# These resolve from PyPI, whose PyTorch brings 2 GB of CUDA along. A Space on CPU builds faster with this line:",
    "# --extra-index-url https://download.pytorch.org/whl/cpu",
)
SAMPLE_SIDE = 640  # pixels of a sample's long side, at most
APP = '''"""The page of this Space."""

import os
from pathlib import Path

HERE = Path(__file__).parent
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from src.serving.app import build_app

demo = build_app(
    HERE / "weights",
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
{models}short_description: Objects in a photograph, and where the network looked
---

# {title}

Objects in a photograph, and the pixels that decided, by a YOLOv3 of {parameters:.1f} million parameters
({classes} classes). Trained on: {data}.

On your own machine: `pip install -r requirements.txt`, then `python app.py`.
{links}"""


def export_space(
    model: YOLOv3,
    folder: str | Path,
    samples: Sequence[np.ndarray | str | Path] = (),
    links: dict[str, str] | None = None,
    title: str = "YOLOv3: what is there, and why",
    hub_model: str = "",
) -> Path:
    """Write a Space into `folder` and return it; an older export there is replaced as a whole.

    samples: pictures to click, uint8 [H, W, 3] or files. links: what a link says -> its address.
    hub_model: the model's id on the hub ("name/model"), if it is there.
    Raises FileExistsError where `folder` holds anything but an export, and ValueError where a sample is no picture.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} was not made by export_space, so it is left as it is; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        _write(model, new, samples, dict(links or {}), title, hub_model)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    return folder


def _write(model: YOLOv3, folder: Path, samples: Sequence, links: dict, title: str, hub_model: str) -> None:
    """The files of a Space, into a folder that does not exist yet."""
    for part in ("src", "weights", "samples"):
        (folder / part).mkdir(parents=True)
    (folder / MARK).write_text("Made by export_space, which replaces this folder when it exports here again.\n")
    package = Path(__file__).parents[1]
    shutil.copyfile(package / "__init__.py", folder / "src" / "__init__.py")
    for room in ROOMS:
        shutil.copytree(package / room, folder / "src" / room, ignore=shutil.ignore_patterns("__pycache__"))
    model.save_pretrained(folder / "weights")
    for number, sample in enumerate(samples, start=1):
        picture = Image.fromarray(load_image(sample))
        picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        picture.save(folder / "samples" / f"{number:02d}.jpg", quality=90)
    (folder / "app.py").write_text(APP.format(title=title, links=links), encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(), encoding="utf-8")
    (folder / "README.md").write_text(_readme(model, links, title, hub_model), encoding="utf-8")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def requirements() -> str:
    """The packages of the serving half, at the versions installed here."""
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    return "\n".join([*CPU_NOTE, *pins]) + "\n"


def _readme(model: YOLOv3, links: dict, title: str, hub_model: str) -> str:
    """README.md with the header a Space is configured by, https://huggingface.co/docs/hub/spaces-config-reference."""
    listed = "".join(f"\n- [{name}]({address})" for name, address in links.items())
    return README.format(
        title=title,
        quoted=json.dumps(title, ensure_ascii=False),
        gradio=version("gradio"),
        python=".".join(map(str, sys.version_info[:2])),
        models=f"models:\n- {hub_model}\n" if hub_model else "",
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        classes=len(model.classes),
        data=model.metadata.get("data", "not stated"),
        links=listed,
    )


def push_space(folder: str | Path, repo_id: str, token: str | None = None) -> str:
    """Upload an exported folder to the Space `repo_id` ("name/space"), made if need be. Returns its address.

    token: one with write access; by default the one of `hf auth login` or the variable HF_TOKEN.
    Raises FileNotFoundError where the folder is no export, PermissionError that says what to do without a token.
    """
    if not (Path(folder) / MARK).is_file():
        raise FileNotFoundError(f"{folder} is no exported Space; make one with export_space(model, {str(folder)!r})")
    if not (token or get_token()):
        raise PermissionError(
            "No Hugging Face token: make one with write access at https://huggingface.co/settings/tokens, then run "
            "`hf auth login`, set HF_TOKEN, or hand it over as push_space(..., token=...). The folder also runs "
            "anywhere else with `pip install -r requirements.txt` and `python app.py`"
        )
    api = HfApi(token=token)
    address = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder, delete_patterns="*")
    return str(address)
