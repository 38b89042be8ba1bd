"""The notebooks: executed small from top to bottom, and what is committed of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import notebook
from tools.execution import rendered, run

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "epochs": 1, "close_mosaic_epochs": 0, "width": 0.125, "image_size": 64, "shapes_train": 8, "shapes_val": 6,
    "batch_size": 4, "num_workers": 0, "precision": "32-true",
}  # fmt: skip
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|content|kaggle/working)/|[A-Z]:\\\\")
WARNING = re.compile(r"Warning:|\bWARNING\b|Traceback")
books = pytest.mark.parametrize("name", notebook.NOTEBOOKS)


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def texts(book):
    """Everything that outputs say."""
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield "\n".join(value for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def check_outputs(book):
    assert not [output for cell in book.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    for text in texts(book):
        assert not MACHINE.search(text), text[:500]
        assert not WARNING.search(text), text[:500]
        assert "\x1b" not in text and "\r" not in text, text[:500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh clone, as it were: nothing but what the notebooks need."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("src", "tools", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def local(folder, name):
    """The notebook in that folder; a copy, so that it runs there and not where the link leads."""
    path = folder / f"copy of {name}"
    path.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """The executed main notebook, through the command line, and what the terminal showed."""
    command = [
        sys.executable,
        "-m",
        "tools.notebook",
        "run",
        str(local(folder, "s13_assignment.ipynb")),
        "runs/out.ipynb",
    ]
    done = subprocess.run([*command, "--settings", json.dumps(SMALL)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return nbformat.read(folder / "runs/out.ipynb", as_version=4), done.stdout


def test_the_main_notebook_runs_and_leaves_what_it_promises(folder, trained):
    book, shown = trained
    check_outputs(book)
    assert "minutes" in shown.splitlines()[1] and "training:" in shown and "class accuracy" in shown
    for name in ("metrics.csv", "config.json", "best.ckpt", "last.ckpt"):
        assert (folder / "runs/shapes" / name).is_file(), name
    assert (folder / "space/app.py").is_file()
    figures = sum("data" in output for cell in book.cells for output in cell.get("outputs", ()))
    assert figures >= 13


def test_the_multi_scale_notebook_runs_beside_the_first(folder, trained):
    settings = SMALL | {"multiscale_sizes": [64, 96]}
    assert run(local(folder, "multi_scale_s13_assignment.ipynb"), folder / "multi.ipynb", settings) == ""
    book = nbformat.read(folder / "multi.ipynb", as_version=4)
    check_outputs(book)
    assert "trained at 160 only" in "".join(texts(book)), "the run of the first notebook was not found"


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
def test_prose_stands_before_every_short_cell_of_code(name):
    cells = read(name).cells
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert before.cell_type == "markdown" and len(before.source) > 80, cell.source
            assert sum(bool(line.strip()) for line in lines) <= 10, cell.source
            assert max(map(len, lines)) <= 120, cell.source
    assert cells[0].cell_type == "markdown"


def test_the_two_training_notebooks_have_their_length_and_share_no_paragraph():
    paragraphs = []
    for name in notebook.NOTEBOOKS[:2]:
        cells = read(name).cells
        assert 20 <= len(cells) <= 35, name
        prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        paragraphs.append({part.strip() for part in prose.split("\n\n") if len(part) > 60 and "badge" not in part})
    assert not paragraphs[0] & paragraphs[1]


def test_all_three_begin_with_the_same_first_cell_and_the_same_address():
    first = {next(cell.source for cell in read(name).cells if cell.cell_type == "code") for name in notebook.NOTEBOOKS}
    assert len(first) == 1
    assert f'REPOSITORY = "{notebook.REPOSITORY}"' in first.pop()
    for name in notebook.NOTEBOOKS:
        badges = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)/blob", read(name).cells[0].source)
        assert badges == ["/".join(notebook.REPOSITORY.split("/")[-2:])] * 2


def test_one_command_writes_the_address_everywhere(tmp_path, monkeypatch):
    for name in (*notebook.NOTEBOOKS, "tools/notebook.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    assert notebook.set_address("https://github.com/ada/detector.git") == [*notebook.NOTEBOOKS, "tools/notebook.py"]
    for name in (*notebook.NOTEBOOKS, "tools/notebook.py"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "github.com/ada/detector" in text
        assert notebook.REPOSITORY not in text
        nbformat.reads(text, as_version=4) if name.endswith("ipynb") else compile(text, name, "exec")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        notebook.set_address("detector")


def test_only_what_is_missing_or_too_old_is_installed(tmp_path, monkeypatch):
    (tmp_path / "needed.txt").write_text("# comment\nnumpy>=1.0\ntqdm>=999\nno-such-package>=1  # why\n")
    asked = []
    monkeypatch.setattr(notebook.subprocess, "run", lambda command, check: asked.extend(command))
    notebook.install_missing(tmp_path / "needed.txt")
    assert asked[-2:] == ["tqdm>=999", "no-such-package>=1"]
    asked.clear()
    (tmp_path / "needed.txt").write_text("numpy>=1.0\n")
    notebook.install_missing(tmp_path / "needed.txt")
    assert not asked


def test_a_failing_cell_is_named_and_the_notebook_still_saved(tmp_path):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_markdown_cell("## Divide"), nbformat.v4.new_code_cell("print('before')\n1 / 0")]
    nbformat.write(book, tmp_path / "bad.ipynb")
    command = [sys.executable, "-m", "tools.notebook", "run", str(tmp_path / "bad.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bad.ipynb: a cell under 'Divide' failed: ZeroDivisionError: division by zero" in done.stderr
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs[0].text == "before\n"


def test_what_an_output_widget_captures_is_not_sent_to_the_kernel(tmp_path):
    """Sent while the end of the cell is awaited on the same socket, it could hide that end for good."""
    book = nbformat.v4.new_notebook()
    sources = (
        "from ipywidgets import Output\nout = Output()",
        "with out:\n    print('captured')",
        "print(len(out.outputs), 'told')",
    )
    book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(book, tmp_path / "widget.ipynb")
    assert run(tmp_path / "widget.ipynb", tmp_path / "out.ipynb") == ""
    first, second, third = (cell.outputs for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells)
    assert not first and not second and third[0].text == "0 told\n"


def test_figures_of_tagged_cells_become_images(tmp_path, monkeypatch):
    code = "from src.figures.curves import plot_multiscale_sizes\ndrawn_sizes([64, 96])"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code, metadata={"tags": ["image:drawn"]})])
    (tmp_path / "src").symlink_to(ROOT / "src")
    nbformat.write(book, tmp_path / "app_with_gradCAM.ipynb")
    for name in notebook.NOTEBOOKS[:2]:
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / name)
    target = tmp_path / "runs/any/app_with_gradCAM.ipynb"
    assert run(tmp_path / "app_with_gradCAM.ipynb", target) == ""
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    assert notebook.keep_images(tmp_path / "images") == [tmp_path / "images/drawn.png"]
    assert (tmp_path / "images/drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "printed, page",
    [
        ("\r10%|#   |\r100%|####|\n", "100%|####|\n"),
        ("\rlong text\rshort    \n", "short\n"),
        ("\rbar 1/2\r       \rline\n\rbar 1/2\rbar 2/2\n", "line\nbar 2/2\n"),
        ("one\n\rtwo\x1b[A\rONE", "ONE\ntwo"),
    ],
)
def test_of_a_progress_bar_the_last_state_is_kept(printed, page):
    assert rendered(printed) == page
