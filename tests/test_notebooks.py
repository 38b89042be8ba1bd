"""Notebooks: executed with small settings, and their committed form; tools.notebook."""

import base64
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import notebook
from tools.notebook import run

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "epochs": 1,
    "close_mosaic_epochs": 0,
    "width": 0.125,
    "pretrained_weights": "",
    "image_size": 64,
    "shapes_train": 8,
    "shapes_val": 8,
    "batch_size": 4,
    "num_workers": 0,
    "precision": "32-true",
}
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|content|kaggle/working)/|[A-Z]:\\\\")
WARNING = re.compile(r"Warning:|\bWARNING\b|Traceback")
NAMES = ("LICENSES.txt", "cow.jpg", "duck.jpg", "horses.jpg", "mariachi.jpg")
SAMPLES = [f"weights/samples/{name}" for name in NAMES]  # those that the notebooks name
books = pytest.mark.parametrize("name", notebook.NOTEBOOKS)


def check_outputs(book) -> str:
    """Check that no output is an error, and none has paths or warnings. Returns their texts."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    texts = [output.get("text", "") for output in outputs]
    for output in outputs:
        assert output.output_type != "error", output
        data = output.get("data", {})
        texts += [str(data[kind]) for kind in data if not kind.startswith("image/")]
    for text in texts:
        assert not MACHINE.search(text) and not WARNING.search(text), text[:500]
        assert "\x1b" not in text and "\r" not in text, text[:500]
    return "".join(texts)


@pytest.mark.parametrize(
    "name, settings, text, files",
    [
        (
            "s13_assignment.ipynb",
            SMALL,
            "class accuracy",
            [*map("runs/shapes/".__add__, ("metrics.csv", "best.ckpt", "space/app.py"))],
        ),
        ("multi_scale_s13_assignment.ipynb", SMALL, "epoch", ["runs/shapes-multi"]),
        ("app_with_gradCAM.ipynb", {}, "Nothing uploaded", ["space/app.py"]),
    ],
)
def test_notebook_runs_and_writes_its_files(name, settings, text, files, tmp_path):
    (tmp_path / "weights/samples").mkdir(parents=True)
    weights = (path.relative_to(ROOT) for path in (ROOT / "weights").glob("[!s]*"))
    for part in ("src", "tools", "images", "requirements.txt", *weights, *SAMPLES):
        (tmp_path / part).symlink_to(ROOT / part)
    source = tmp_path / f"copy of {name}"  # a link would run in the repository
    source.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert run(source, tmp_path / "executed.ipynb", settings) == ""
    assert text in check_outputs(nbformat.read(tmp_path / "executed.ipynb", as_version=4))
    assert all((tmp_path / file).exists() for file in files)


@books
def test_committed_outputs_are_clean(name):
    check_outputs(nbformat.read(ROOT / name, as_version=4))
    assert (ROOT / name).stat().st_size < 1.5e6


@books
def test_cells_are_few_and_short_and_code_follows_prose(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    assert len(cells) < 50 and cells[0].cell_type == "markdown"
    for before, cell in pairwise(cells):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert len(lines) <= 12 and max(map(len, lines)) <= 120, cell.source
        assert cell.cell_type == "code" or len(cell.source.split()) <= 250, cell.source


def test_all_notebooks_have_the_same_set_up_cell():
    cells = [nbformat.read(ROOT / name, as_version=4).cells for name in notebook.NOTEBOOKS]
    first = [next(cell for cell in book if cell.cell_type == "code") for book in cells]
    assert len({cell.source for cell in first}) == 1
    assert all(cell.metadata["cellView"] == "form" for cell in first)  # collapsed in Colab
    address = re.search(r'REPOSITORY = "(.*)"\n', first[0].source)[1]
    assert "!git clone" in first[0].source
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"git clone (--depth 1 )?{address} ", readme)


def execute(folder: Path, *cells) -> list:
    nbformat.write(new_notebook(cells=cells), folder / "in.ipynb")
    files = [str(folder / name) for name in ("in.ipynb", "out.ipynb")]
    command = [sys.executable, "-m", "tools.notebook", "run", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, nbformat.read(folder / "out.ipynb", as_version=4).cells


def test_a_failing_cell_is_named_and_the_notebook_still_saved(tmp_path):
    heading, code = new_markdown_cell("## Divide"), new_code_cell("print('before')\n1 / 0")
    done, cells = execute(tmp_path, heading, code)
    message = "in.ipynb: a cell under 'Divide' failed: ZeroDivisionError: division by zero"
    assert done.returncode == 1 and message in done.stderr
    assert cells[1].outputs[0].text == "before\n"


BAR = """from time import sleep
for n in range(3):
    print(f'\\r{n} of 2', end='', flush=True)
    sleep(0.1)
print()"""


def test_widgets_are_removed_and_progress_bars_keep_their_last_state(tmp_path):
    sources = (
        "from ipywidgets import IntSlider, Output\nout = Output()\ndisplay(IntSlider())",
        "with out:\n    print('captured')",
        "print(len(out.outputs), 'sent')",
        BAR,
    )
    _, cells = execute(tmp_path, *map(new_code_cell, sources))
    assert not cells[0].outputs and not cells[1].outputs
    assert [cell.outputs[0].text for cell in cells[2:]] == ["0 sent\n", "2 of 2\n"]


def test_figures_of_tagged_cells_are_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    monkeypatch.setattr(notebook, "NOTEBOOKS", ("a.ipynb",))
    (tmp_path / "runs/any").mkdir(parents=True)
    for folder, content in ((tmp_path, b"old"), (tmp_path / "runs/any", b"new")):
        data = {"image/png": base64.b64encode(content).decode()}
        outputs = [new_output("display_data", data)]
        cell = new_code_cell("", metadata={"tags": ["image:sizes"]}, outputs=outputs)
        nbformat.write(new_notebook(cells=[cell]), folder / "a.ipynb")
    assert notebook.export_images(tmp_path / "images") == [tmp_path / "images/sizes.png"]
    assert (tmp_path / "images/sizes.png").read_bytes() == b"new"
