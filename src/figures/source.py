"""Show source code in a notebook."""

import inspect
from textwrap import dedent

from IPython.display import Markdown


def show(function) -> Markdown:
    """Return the source of a function, method or class with syntax colours, on GitHub and Colab."""
    return Markdown(f"```python\n{dedent(inspect.getsource(function))}```")
