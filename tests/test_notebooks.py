"""Notebooks: executed with small settings, and their committed outputs; tools.notebook."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

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
books = pytest.mark.parametrize("name", notebook.NOTEBOOKS)


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def texts(book):
    """Yield all texts of the outputs."""
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield "\n".join(
                value
                for kind, value in output.get("data", {}).items()
                if not kind.startswith("image/")
            )


def check_outputs(book):
    assert not [
        output
        for cell in book.cells
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    ]
    for text in texts(book):
        assert not MACHINE.search(text), text[:500]
        assert not WARNING.search(text), text[:500]
        assert "\x1b" not in text and "\r" not in text, text[:500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that contains only what the notebooks need."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("src", "tools", "weights", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def local(folder, name):
    """Copy the notebook to that folder. (A link would run in the repository.)"""
    path = folder / f"copy of {name}"
    path.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """The main notebook, executed by the command, and the command's output."""
    source = str(local(folder, "s13_assignment.ipynb"))
    command = [
        sys.executable,
        "-m",
        "tools.notebook",
        "run",
        source,
        "runs/out.ipynb",
        "--settings",
        json.dumps(SMALL),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return nbformat.read(folder / "runs/out.ipynb", as_version=4), done.stdout


def test_the_main_notebook_runs_and_writes_its_files(folder, trained):
    book, printed = trained
    check_outputs(book)
    assert (
        "minutes" in printed.splitlines()[1]
        and "training:" in printed
        and "class accuracy" in printed
    )
    for name in ("metrics.csv", "config.json", "best.ckpt", "last.ckpt"):
        assert (folder / "runs/shapes" / name).is_file(), name
    assert (folder / "runs/shapes/space/app.py").is_file()
    figures = sum("data" in output for cell in book.cells for output in cell.get("outputs", ()))
    assert figures >= 13


def test_the_multi_scale_notebook_runs_after_the_first(folder, trained):
    settings = SMALL | {"multiscale_sizes": [64, 96]}
    assert (
        run(local(folder, "multi_scale_s13_assignment.ipynb"), folder / "multi.ipynb", settings)
        == ""
    )
    book = nbformat.read(folder / "multi.ipynb", as_version=4)
    check_outputs(book)
    assert "one resolution (160)" in "".join(texts(book)), (
        "the run of the first notebook was not found"
    )


def test_the_app_notebook_runs_on_the_last_run(folder, trained):
    assert run(local(folder, "app_with_gradCAM.ipynb"), folder / "app.ipynb") == ""
    book = nbformat.read(folder / "app.ipynb", as_version=4)
    check_outputs(book)
    assert "Nothing uploaded" in "".join(texts(book))


@books
def test_committed_outputs_are_clean(name):
    check_outputs(read(name))
    assert (ROOT / name).stat().st_size < 1.5e6


@books
def test_every_code_cell_is_short_and_follows_prose(name):
    cells = read(name).cells
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert before.cell_type == "markdown" and len(before.source) > 80, cell.source
            assert sum(bool(line.strip()) for line in lines) <= 10, cell.source
            assert max(map(len, lines)) <= 120, cell.source
    assert cells[0].cell_type == "markdown"


def test_the_training_notebooks_have_20_to_60_cells_and_no_common_paragraph():
    paragraphs = []
    for name in notebook.NOTEBOOKS[:2]:
        cells = read(name).cells
        assert 20 <= len(cells) <= 60, name
        prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        paragraphs.append(
            {part.strip() for part in prose.split("\n\n") if len(part) > 60 and "badge" not in part}
        )
    assert not paragraphs[0] & paragraphs[1]


def test_all_notebooks_have_the_same_first_cell_and_the_readme_its_address():
    first = {
        next(cell.source for cell in read(name).cells if cell.cell_type == "code")
        for name in notebook.NOTEBOOKS
    }
    assert len(first) == 1
    address = re.search(r'^REPOSITORY = "https://github\.com/(.*)"$', first.pop(), re.MULTILINE)[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"git clone --depth 1 https://github.com/{address} " in readme


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """The first code cell in an empty folder, and the commands that it runs.

    Its repository doesn't exist.
    """
    source = next(
        cell.source for cell in read(notebook.NOTEBOOKS[0]).cells if cell.cell_type == "code"
    )
    source = source.replace(
        "https://github.com/OWNER/REPOSITORY", (tmp_path / "missing/yolo").as_uri()
    )
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    return source.replace("/kaggle/input", str(tmp_path / "input")), commands


def test_the_first_cell_copies_an_attached_repository_once(first_cell, tmp_path, monkeypatch):
    source, commands = first_cell
    package = tmp_path / "input/notebooks/ada/yolo/yolo/src"
    package.mkdir(parents=True)
    (package / "config.py").write_text("original")
    exec(source, {})
    assert Path.cwd() == tmp_path / "working/yolo" and commands[0][-2:] == [
        "-r",
        "requirements.txt",
    ]
    Path("src/config.py").write_text("edited")
    exec(source, {})
    assert Path.cwd() == tmp_path / "working/yolo"
    monkeypatch.chdir(tmp_path / "working")  # as after a restart of the kernel
    exec(source, {})
    assert (
        Path("src/config.py").read_text() == "edited"
        and (package / "config.py").read_text() == "original"
    )


def test_the_first_cell_without_a_repository_says_what_to_do(first_cell):
    with pytest.raises(
        RuntimeError,
        match=r"can.t be cloned: wrong or private\? Kaggle: turn on Internet, or see README",
    ):
        exec(first_cell[0], {})
    assert (
        "## Kaggle without internet" in (ROOT / "README.md").read_text(encoding="utf-8")
        and not first_cell[1]
    )


def test_a_failing_cell_is_named_and_the_notebook_still_saved(tmp_path):
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_markdown_cell("## Divide"),
        nbformat.v4.new_code_cell("print('before')\n1 / 0"),
    ]
    nbformat.write(book, tmp_path / "bad.ipynb")
    command = [
        sys.executable,
        "-m",
        "tools.notebook",
        "run",
        str(tmp_path / "bad.ipynb"),
        str(tmp_path / "out.ipynb"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "bad.ipynb: a cell under 'Divide' failed: ZeroDivisionError: division by zero"
        in done.stderr
    )
    assert (
        nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs[0].text == "before\n"
    )


def execute(tmp_path, *sources):
    """Execute code cells. Returns the outputs of each."""
    nbformat.write(
        nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources))),
        tmp_path / "in.ipynb",
    )
    assert run(tmp_path / "in.ipynb", tmp_path / "out.ipynb") == ""
    return [cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells]


def test_the_output_of_an_output_widget_is_not_sent_to_the_kernel(tmp_path):
    """Sent while nbclient waits on the same socket, it could hide the end of the cell."""
    outputs = execute(
        tmp_path,
        "from ipywidgets import Output\nout = Output()",
        "with out:\n    print('captured')",
        "print(len(out.outputs), 'sent')",
    )
    assert not outputs[0] and not outputs[1] and outputs[2][0].text == "0 sent\n"


def test_widgets_are_removed_and_progress_bars_keep_their_last_state(tmp_path):
    bar = (
        "from time import sleep\n"
        "for n in range(3):\n"
        "    print(f'\\r{n} of 2', end='', flush=True)\n"
        "    sleep(0.1)\n"
        "print()"
    )
    outputs = execute(tmp_path, "from ipywidgets import IntSlider\ndisplay(IntSlider())", bar)
    assert not outputs[0] and outputs[1][0].text == "2 of 2\n"


def test_settings_need_a_tagged_cell(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "in.ipynb")
    with pytest.raises(ValueError, match='tagged "settings"'):
        run(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"epochs": 1})


def test_figures_of_tagged_cells_are_exported(tmp_path, monkeypatch):
    code = "from src.figures.curves import plot_multiscale_sizes\nplot_multiscale_sizes([64, 96])"
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code, metadata={"tags": ["image:sizes"]})]
    )
    (tmp_path / "src").symlink_to(ROOT / "src")
    nbformat.write(book, tmp_path / "app_with_gradCAM.ipynb")
    for name in notebook.NOTEBOOKS[:2]:
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / name)
    target = tmp_path / "runs/any/app_with_gradCAM.ipynb"
    assert run(tmp_path / "app_with_gradCAM.ipynb", target) == ""
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    assert notebook.export_images(tmp_path / "images") == [tmp_path / "images/sizes.png"]
    assert (tmp_path / "images/sizes.png").read_bytes().startswith(b"\x89PNG")
