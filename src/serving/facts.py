"""What the page says about the model and the example images."""

import html
import os
import re
from pathlib import Path

from src.model.network import YOLOv3
from src.serving.drawing import class_colours
from src.serving.predictor import Predictor

CARD = "model-card"  # address of the model card on the app's own server
LICENSES = "LICENSES.txt"  # in a folder of images: author, licence and source of each
LICENSE_TEXTS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
}
FACTS = {  # metadata of the weights -> what a visitor reads
    "data": "Training data",
    "epochs": "Training epochs",
    "mAP50": "Mean average precision (mAP)",
    "class accuracy": "Objects with the right class",
    "object accuracy": "Objects recognized as objects",
    "no-object accuracy": "Background recognized as background",
    "objectness threshold": "Threshold of these accuracies",
}


def model_address(source: Predictor | str | Path) -> str:
    """Return the address of the model: on the Hub, in this Space, or its card on this server."""
    if isinstance(source, str) and not Path(source).exists():
        return f"https://huggingface.co/{source}"
    if space := os.environ.get("SPACE_ID"):  # set by Spaces
        return f"https://huggingface.co/spaces/{space}/tree/main/weights"
    return CARD


def model_card(source: Predictor | str | Path, predictor: Predictor) -> str:
    """Return the README.md beside the weights, or a model card from the model's metadata."""
    if not isinstance(source, Predictor) and (Path(source) / "README.md").is_file():
        return (Path(source) / "README.md").read_text(encoding="utf-8")
    if isinstance(predictor.model, YOLOv3):
        return str(predictor.model.generate_model_card())
    return "\n".join(f"{name}: {value}" for name, value in page_facts(predictor).items())


def model_facts_html(predictor: Predictor, links: dict[str, str]) -> str:
    """List the model's classes, metadata, metrics and links."""
    colours = class_colours(len(predictor.classes))
    chips = "".join(
        f'<span class="chip"><i style="background:rgb{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(predictor.classes, colours, strict=True)
    )
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in page_facts(predictor).items()
    )
    anchors = " &middot; ".join(_link(text, address) for text, address in links.items())
    return (
        f'<section id="model"><h2>Classes</h2><p>{chips}</p><h2>Model</h2><dl>{rows}</dl>'
        f'<p class="links">{anchors}</p></section>'
    )


def page_facts(predictor: Predictor) -> dict[str, str]:
    """Return what the page says about the model: name -> value."""
    metadata = predictor.model.metadata
    facts = {}
    for name, value in (metadata | metadata.get("metrics", {})).items():
        if name == "metrics":
            continue
        if isinstance(value, float):
            value = f"{value:.1%}" if "accuracy" in name else f"{value:.3g}"
        facts[FACTS.get(name, name[:1].upper() + name[1:])] = str(value)
    facts["Parameters"] = f"{predictor.model.num_parameters / 1e6:.1f} million"
    facts["Image size"] = f"{predictor.image_size} x {predictor.image_size} pixels"
    return facts


def read_licenses(folder: str | Path) -> dict[str, dict[str, str]]:
    """Read LICENSES.txt: file name -> "author", "licence", "source" of each image in the folder.

    An entry starts with the file's name; lines such as "  author: NASA" follow. Returns {} if the
    folder has no such file.
    """
    path = Path(folder) / LICENSES
    if not path.is_file():
        return {}
    entries = re.findall(r"^(\S+).*\n((?:  .*\n?)+)", path.read_text(encoding="utf-8"), re.M)
    licenses = {name: dict(re.findall(r"^  (\w+): (.+)", lines, re.M)) for name, lines in entries}
    return {name: facts for name, facts in licenses.items() if (path.parent / name).is_file()}


def credits_html(samples: str | Path) -> str:
    """Name the authors of the example images, by licence, with links to sources and licences."""
    credits = {}
    for name, facts in sorted(read_licenses(samples).items()):
        author = f"{Path(name).stem} by {facts.get('author', 'unknown')}"
        link = _link(author, facts.get("source", ""))
        credits.setdefault(facts.get("licence", "unknown licence"), []).append(link)
    lines = [
        f"<p>{_link(licence, LICENSE_TEXTS.get(licence, ''))}: {', '.join(links)}</p>"
        for licence, links in sorted(credits.items())
    ]
    return "".join(lines)


def _link(text: str, address: str) -> str:
    """Return an HTML link, or only the text if the address is none, such as "(none named)"."""
    if not address.startswith(("https://", "http://", CARD)):
        return html.escape(text)
    href = html.escape(address, quote=True)
    return f'<a href="{href}" target="_blank" rel="noopener">{html.escape(text)}</a>'
