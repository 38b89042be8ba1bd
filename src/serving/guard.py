"""Protection of a public app: it reads no files but uploaded ones."""

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj, traverse

NOT_UPLOADED = (
    "Only uploaded files are read, no URLs and no paths. "
    "In Python, upload with gradio_client.handle_file(path)."
)


class GuardedBlocks(gr.Blocks):
    """Blocks whose functions accept uploaded files only.

    Gradio itself downloads from URLs, of any size, and accepts the path of a file that isn't marked
    as one.
    """

    def validate_inputs(self, block_fn, inputs):
        """Check the inputs before each function call. Raises gradio.Error."""
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, _require_upload, is_file_obj)


def _require_upload(file: dict) -> None:
    if not is_in_or_equal(file["path"], get_upload_folder()):
        raise gr.Error(NOT_UPLOADED, print_exception=False)
