"""Show source code in a notebook."""

import inspect
from textwrap import dedent

from IPython.display import Markdown


def show(*functions) -> Markdown:
    """Return the source of functions, methods or classes with syntax colours, for GitHub too."""
    sources = [dedent(inspect.getsource(function)) for function in functions]
    return Markdown("```python\n" + "\n\n".join(sources) + "```")
