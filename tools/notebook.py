"""Execute notebooks, extract the README's images from them, and write the repository's address into them.

python -m tools.notebook run s13_assignment.ipynb runs/shapes/s13_assignment.ipynb
python -m tools.notebook images
python -m tools.notebook address https://github.com/OWNER/REPOSITORY
"""

import argparse
import base64
import json
import re
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.output_widget import OutputWidget
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("s13_assignment.ipynb", "multi_scale_s13_assignment.ipynb", "app_with_gradCAM.ipynb")
EXTENSIONS = {"image/jpeg": "jpg", "image/png": "png"}
BADGES = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{0}) "
    "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    "(https://kaggle.com/kernels/welcome?src=https://github.com/{0})"
)
MARKER = "<!-- badges -->\n"


class Kernel(AsyncKernelManager):
    """A kernel of the current interpreter, whichever kernels are registered."""

    python = (sys.executable,)  # the command that starts the interpreter

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [
            *self.python,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=ERROR",
        ]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class LocalOutput(OutputWidget):
    """An output widget that doesn't send what it captures back to the kernel.

    nbclient's does, from outside asyncio, on the socket that awaits the end of the cell. It can lose that message, and then
    waits forever.
    """

    def send(self, *_, **__) -> None: ...


class LiveClient(NotebookClient):
    """Prints the headings and the output of the cells during execution."""

    heading = ""

    def process_message(
        self, msg: dict, cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        elif "text/markdown" in msg["content"].get("data", {}):  # a table
            print(msg["content"]["data"]["text/plain"].partition("<IPython")[0], flush=True)
        return super().process_message(msg, cell, cell_index)

    def print_heading(self, cell: NotebookNode, cell_index: int) -> None:
        """Called before each cell."""
        first_line = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and first_line.startswith("## "):
            self.heading = first_line.removeprefix("## ")
            print(
                f"\n== {self.heading} [cell {cell_index + 1} of {len(self.nb.cells)}]", flush=True
            )


def run(
    source: str | Path,
    target: str | Path,
    settings: dict | None = None,
    kernel: type[AsyncKernelManager] = Kernel,
) -> str:
    """Execute a notebook in its own folder, and write it with its outputs to `target`, even if a cell fails.

    settings: changes of `config`, applied after the cell tagged "settings".
    Returns an error message that names the cell's heading, or "" if all cells succeeded.
    """
    source, target, error_message, start = Path(source), Path(target), "", time.monotonic()
    book = nbformat.read(source, as_version=4)
    if settings:
        tagged = [
            number
            for number, cell in enumerate(book.cells)
            if "settings" in cell.metadata.get("tags", ())
        ]
        if not tagged:
            raise ValueError(
                f'{source.name} has no cell tagged "settings", so its config can\'t be changed.'
            )
        book.cells.insert(
            tagged[0] + 1, nbformat.v4.new_code_cell(f"config = config.replace(**{settings!r})")
        )
    client = LiveClient(
        book,
        kernel_manager_class=kernel,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=True,  # nbclient 0.11 fails without; _clean removes it
        resources={"metadata": {"path": str(source.resolve().parent)}},
    )
    client.on_cell_start = client.print_heading
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": LocalOutput}}
    about = book.metadata.get("about", {})
    print(
        f"{source.name}: {about.get('does', '')}\nTime: {about.get('takes', 'unknown')}", flush=True
    )
    try:
        client.execute()
    except CellExecutionError as error:
        error_message = (
            f"{source.name}: a cell under {client.heading!r} failed: {error.ename}: {error.evalue}"
        )
    except DeadKernelError:
        error_message = f"{source.name}: the kernel died in a cell under {client.heading!r}. Often there is too little memory."
    finally:
        _clean(book)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, target)
    print(
        f"\n{(time.monotonic() - start) / 60:.1f} minutes. Executed notebook: {target}", flush=True
    )
    return error_message


def _clean(book: NotebookNode) -> None:
    """Remove the outputs that need a running kernel: widgets and embedded pages."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if not _needs_kernel(output.get("data", {}))
            ]


def _needs_kernel(data: dict) -> bool:
    return "application/vnd.jupyter.widget-view+json" in data or "<iframe" in data.get(
        "text/html", ""
    )


def export_images(folder: str | Path = "images") -> list[Path]:
    """Write the first figure of each cell tagged "image:NAME" to `folder`, and return the files.

    Reads the last executed notebooks in runs/, or the notebooks of this repository if there are none.
    """
    files = []
    for name in NOTEBOOKS:
        executed = sorted(ROOT.glob(f"runs/*/{name}"), key=lambda path: path.stat().st_mtime)
        for cell in nbformat.read([ROOT / name, *executed][-1], as_version=4).cells:
            names = [
                tag.removeprefix("image:")
                for tag in cell.metadata.get("tags", ())
                if tag.startswith("image:")
            ]
            data = [
                item
                for output in cell.get("outputs", ())
                for item in output.get("data", {}).items()
            ]
            images = [(EXTENSIONS[kind], image) for kind, image in data if kind in EXTENSIONS]
            if names and images:
                extension, image = images[0]
                files.append(Path(folder) / f"{names[0]}.{extension}")
                files[-1].parent.mkdir(exist_ok=True)
                files[-1].write_bytes(base64.b64decode(image))
    return files


def set_address(url: str) -> list[str]:
    """Write the repository's address into the notebooks, with badges there and in the README. Return the changed files.

    An address and badges of an earlier call are replaced. Raises ValueError if it isn't https://github.com/OWNER/REPOSITORY.
    """
    url = url.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(
            f"{url!r} is not the address of a repository. Use https://github.com/OWNER/REPOSITORY."
        )
    badges = {
        name: BADGES.format(f"{url.removeprefix('https://github.com/')}/blob/main/{name}")
        for name in NOTEBOOKS
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "".join(f"- `{name}` {line}\n" for name, line in badges.items())
    texts = {"README.md": re.sub(MARKER + r"(- .*colab-badge\.svg.*\n)*", MARKER + lines, text)}
    for name in NOTEBOOKS:
        book = json.loads((ROOT / name).read_text(encoding="utf-8"))
        for number, cell in enumerate(book["cells"]):
            source = "".join(cell["source"])
            if number == 0:
                title, _, body = re.sub(r"\n\n.*colab-badge\.svg.*", "", source).partition("\n")
                source = f"{title}\n\n{badges[name]}\n{body}"
            elif cell["cell_type"] == "code":
                source = re.sub(
                    r'^REPOSITORY = ".*"', f'REPOSITORY = "{url}"', source, flags=re.MULTILINE
                )
            cell["source"] = source.splitlines(keepends=True)
        texts[name] = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    changed = [
        name for name, text in texts.items() if text != (ROOT / name).read_text(encoding="utf-8")
    ]
    for name in changed:
        (ROOT / name).write_text(texts[name], encoding="utf-8")
    return changed


def main() -> None:
    """The command line. Exit status 1 if a cell fails or the address is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.notebook", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="execute a notebook and show its output")
    run_parser.add_argument("source", help="the notebook")
    run_parser.add_argument("target", help="file for the executed notebook")
    run_parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="""e.g. '{"epochs": 1}'"""
    )
    commands.add_parser(
        "images", help="extract the README's images from the last executed notebooks"
    )
    address = commands.add_parser(
        "address", help="write the repository's address and badges into notebooks and README"
    )
    address.add_argument("url", help="https://github.com/OWNER/REPOSITORY")
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            sys.exit(run(arguments.source, arguments.target, arguments.settings) or 0)
        if arguments.command == "images":
            print(
                "Written:",
                ", ".join(map(str, export_images())) or "nothing. Execute the notebooks first.",
            )
        else:
            print("Changed:", ", ".join(set_address(arguments.url)) or "nothing")
    except (
        OSError,
        ValueError,
    ) as error:  # a file that is missing or not a notebook, settings, an address
        sys.exit(str(error))


if __name__ == "__main__":
    main()
