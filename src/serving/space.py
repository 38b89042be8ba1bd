"""Export of the app as a Hugging Face Space: one folder of code, weights, samples, requirements."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, SpaceHardware, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from src.model.network import YOLOv3
from src.serving.images import LICENSES

# Not torch and torchvision: Spaces choose their versions, and ZeroGPU refuses others.
PINNED = (
    "numpy",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "grad-cam",
    "gradio",
)  # gradio requires huggingface_hub
REFUSED = """\
Hugging Face doesn't create the Space {repo_id}: {error}
A token with write access is needed, from https://huggingface.co/settings/tokens. Give it to
`hf auth login`, in HF_TOKEN, or as push_space(..., token=...). A Gradio Space needs PRO
(organizations: Team), or an account that is older than 30 days, has a verified e-mail address and
fewer than two Spaces. A static Space from src.serving.static_space.export_static_space works with
any account."""
MARKER = ".exported-space"  # a file in every export; a folder without it is never replaced
APP = '''"""Start the app."""

import os
from pathlib import Path

HERE = Path(__file__).parent
# https://huggingface.co/docs/hub/spaces-zerogpu
ZERO_GPU = os.environ.get("SPACES_ZERO_GPU") == "true"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if ZERO_GPU:
    import spaces  # before torch

    @spaces.GPU
    def gpu_function():
        """Never called: the app is fast enough on the CPU. ZeroGPU stops apps without one."""


from src.serving.app import build_app
from src.serving.predictor import Predictor

links = {links!r}
if "SPACE_ID" in os.environ:
    space = f"https://huggingface.co/spaces/{{os.environ['SPACE_ID']}}"
    links = {{"Model": f"{{space}}/tree/main/weights"}} | links
demo = build_app(
    Predictor.load(HERE / "weights", device="cpu" if ZERO_GPU else ""),
    samples=HERE / "samples",
    links=links,
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
python_version: "3.12"
app_file: app.py
license: mit
{models}short_description: Object detection with Grad-CAM explanations
---

# {title}

Detects objects of {classes} classes with a YOLOv3 of {parameters:.1f} million parameters, and
shows the Grad-CAM heatmap of each detection. Training data: {data}.

To run it on your own machine: `pip install -r requirements.txt`, then `python app.py`.
{links}"""


def export_space(
    model: YOLOv3,
    folder: str | Path,
    samples: Sequence[str | Path | np.ndarray] = (),
    links: dict[str, str] | None = None,
    title: str = "YOLOv3 object detection with Grad-CAM",
    hub_model: str = "",
) -> Path:
    """Write a Gradio Space into `folder` and return its path. An older export is replaced.

    samples: see `write_samples`. links: text -> address.
    hub_model: the model's id on the Hub ("name/model"), if it was uploaded; the app links to it.
    Raises FileExistsError, see `new_folder`.
    """
    links = ({"Model": f"https://huggingface.co/{hub_model}"} if hub_model else {}) | (links or {})
    source = Path(__file__).parents[1]
    folder = new_folder(folder)
    for part in ("model", "serving"):
        shutil.copytree(
            source / part, folder / "src" / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copyfile(source / "__init__.py", folder / "src" / "__init__.py")
    model.save_pretrained(folder / "weights")
    write_samples(samples, folder / "samples")
    for name, text in {
        "app.py": APP.format(title=title, links=links),
        "requirements.txt": "torch\ntorchvision\n"
        + "".join(f"{p}=={version(p)}\n" for p in PINNED),
        "README.md": _readme(model, links, title, hub_model),
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def new_folder(folder: str | Path) -> Path:
    """Create an empty folder for an export, in place of an older export.

    Raises FileExistsError if there is something else than an export.
    """
    folder = Path(folder)
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise FileExistsError(
                f"{folder} is not an exported Space and is not replaced. Choose another folder."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("An exported Space. The next export replaces this folder.\n")
    return folder


def write_samples(samples: Sequence[str | Path | np.ndarray], folder: Path) -> None:
    """Write example images into a new folder.

    Files are copied unchanged, with the LICENSES.txt beside them; uint8 [H, W, 3] become PNG.
    """
    folder.mkdir()
    for number, sample in enumerate(samples, start=1):
        if isinstance(sample, np.ndarray):
            Image.fromarray(sample).save(folder / f"{number:02d}.png")
        else:
            shutil.copy(sample, folder)
            licenses = Path(sample).with_name(LICENSES)
            if licenses.is_file():
                shutil.copy(licenses, folder)


def _readme(model: YOLOv3, links: dict, title: str, hub_model: str) -> str:
    """Fill in README.md, whose header configures the Space.

    Its fields: https://huggingface.co/docs/hub/spaces-config-reference
    """
    return README.format(
        title=title,
        quoted=json.dumps(title, ensure_ascii=False),
        gradio=version("gradio"),
        models=f"models:\n- {hub_model}\n" if hub_model else "",
        parameters=model.num_parameters / 1e6,
        classes=len(model.classes),
        data=model.metadata.get("data", "not stated"),
        links="".join(f"\n- [{name}]({address})" for name, address in links.items()),
    )


def push_space(folder: str | Path, repo_id: str, token: str | None = None) -> str:
    """Upload an exported folder, Gradio or static, to the Space `repo_id` ("name/space").

    Returns the Space's address. A missing Space is created. Gradio ones are created on ZeroGPU, the
    only hardware of free accounts; the app doesn't use its GPU.
    token: one with write access. Default: the one of `hf auth login` or of the variable HF_TOKEN.
    Raises PermissionError if there is no token or the account may not create the Space.
    """
    sdk = metadata_load(Path(folder) / "README.md")["sdk"]
    api = HfApi(token=token)
    try:
        address = api.create_repo(
            repo_id,
            repo_type="space",
            space_sdk=sdk,
            space_hardware=SpaceHardware.ZERO_A10G if sdk == "gradio" else None,  # ZeroGPU
            exist_ok=True,
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 402, 403):
            raise
        raise PermissionError(REFUSED.format(repo_id=repo_id, error=error)) from error
    api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder, delete_patterns="*")
    return str(address)
