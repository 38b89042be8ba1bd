"""A notebook executed from top to bottom, its output shown as it comes."""

import re
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.output_widget import OutputWidget
from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"


class ThisPython(KernelSpecManager):
    """The interpreter that runs this, whatever kernels are registered."""

    def get_kernel_spec(self, _: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return ThisPython()


class SilentOutput(OutputWidget):
    """An output widget that keeps what it captures, instead of telling the kernel.

    nbclient's tells it past asyncio, on the socket where it awaits the end of the cell. If that end arrives in the same moment,
    asyncio never hears of it, and the notebook stands still.
    """

    def send(self, *_, **__) -> None: ...


class LiveClient(NotebookClient):
    """Prints headings when they are reached, and what cells print when they print it, progress bars included."""

    heading = ""

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        if msg["msg_type"] == "stream":
            sys.stdout.write(msg["content"]["text"])
            sys.stdout.flush()
        return super().process_message(msg, cell, cell_index)

    def announce(self, cell: NotebookNode, cell_index: int) -> None:
        """Called before each cell."""
        title = cell.source.splitlines()[0] if cell.source else ""
        if cell.cell_type == "markdown" and title.startswith("## "):
            self.heading = title.removeprefix("## ")
            print(f"\n== {self.heading} [cell {cell_index + 1} of {len(self.nb.cells)}]", flush=True)


def inject(book: NotebookNode, settings: dict) -> None:
    """Add a cell that changes `config`, after the one tagged "settings". Raises ValueError where there is none."""
    tagged = [index for index, cell in enumerate(book.cells) if "settings" in cell.metadata.get("tags", ())]
    if not tagged:
        raise ValueError('no cell of this notebook is tagged "settings", so there is no config to change')
    source = f"config = config.replace(**{settings!r})"
    book.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-settings"]}))


def rendered(text: str) -> str:
    """What a terminal shows after printing `text`: of a progress bar only its last state."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\n\r]|[^\n\r\x1b]+|\x1b", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":  # a line up; tqdm's way to keep several bars
            row = max(0, row - 1)
        else:
            line = rows[row].ljust(column)
            rows[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in rows)


def tidy(book: NotebookNode) -> None:
    """Outputs as a page shows them: a cell's text in one piece, and nothing that only a running kernel can show."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        kept, streams = [], {}
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if output.output_type == "stream" and output.name in streams:
                streams[output.name].text += output.text
            elif WIDGET not in data and "<iframe" not in data.get("text/html", ""):
                kept.append(output)
                if output.output_type == "stream":
                    streams[output.name] = output
        for output in streams.values():
            output.text = rendered(output.text)
        if cell.cell_type == "code":
            cell.outputs = kept


def run(source: str | Path, target: str | Path, settings: dict | None = None) -> str:
    """Execute the notebook `source`, in its own folder, and write it with its outputs to `target`, also where it fails.

    settings: changes to `config`, for a smaller run. Of a progress bar only the last state is kept.
    Returns what went wrong, naming the cell, in one line; empty where all went well.
    """
    source, target, problem, start = Path(source), Path(target), "", time.monotonic()
    book = nbformat.read(source, as_version=4)
    if settings:
        inject(book, settings)
    client = LiveClient(
        book, kernel_manager_class=Kernel, timeout=None, record_timing=False,
        store_widget_state=True,  # else nbclient 0.11 fails at the first widget; tidy drops it
        resources={"metadata": {"path": str(source.resolve().parent)}},
    )  # fmt: skip
    client.on_cell_start = client.announce
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": SilentOutput}}
    about = book.metadata.get("about", {})
    print(f"{source.name}: {about.get('does', 'executing it')}\nTime: {about.get('takes', 'not known')}", flush=True)
    try:
        client.execute()
    except CellExecutionError as error:
        problem = f"{source.name}: a cell under {client.heading!r} failed: {error.ename}: {error.evalue}"
    except DeadKernelError:
        problem = f"{source.name}: Python died in a cell under {client.heading!r}, often for want of memory"
    finally:
        tidy(book)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, target)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. The notebook with its outputs: {target}", flush=True)
    return problem
