"""Execute notebooks, and extract the README's images from them.

python -m tools.notebook run s13_assignment.ipynb runs/shapes/s13_assignment.ipynb
python -m tools.notebook images
"""

import argparse
import base64
import json
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


class Kernel(AsyncKernelManager):
    """A kernel of the current interpreter, whichever kernels are registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        arguments = "-m ipykernel_launcher -f {connection_file} --log-level=ERROR".split()
        command = [sys.executable, *arguments]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class LocalOutput(OutputWidget):
    """An output widget that doesn't send what it captures back to the kernel.

    nbclient's does, from outside asyncio, on the socket that awaits the end of the cell. It can
    lose that message, and then waits forever.
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
) -> str:
    """Execute a notebook in its folder; write it with its outputs, even if a cell fails.

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
        kernel_manager_class=Kernel,
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
        error_message = (
            f"{source.name}: the kernel died in a cell under {client.heading!r}. "
            "Often there is too little memory."
        )
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

    Reads the last executed notebooks in runs/, or this repository's if there are none.
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


def main() -> None:
    """The command line. Exit status 1 if a cell fails."""
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
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            sys.exit(run(arguments.source, arguments.target, arguments.settings) or 0)
        files = ", ".join(map(str, export_images()))
        print("Written:", files or "nothing. Execute the notebooks first.")
    except (OSError, ValueError) as error:  # a file that is missing or not a notebook; settings
        sys.exit(str(error))


if __name__ == "__main__":
    main()
