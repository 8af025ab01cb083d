"""A page with Python blocks as a Jupyter notebook, and back."""

import json
import re

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page of Markdown, in order."""
    return BLOCK.findall(page)


def notebook(page: str) -> str:
    """The notebook of a page: its Python blocks are cells, and so is each text between them."""
    cells = []
    for number, part in enumerate(BLOCK.split(page)):  # text, code, text, ...
        if not part.strip():
            continue
        code = {"execution_count": None, "outputs": []} if number % 2 else {}
        cells.append(
            {
                "cell_type": "code" if number % 2 else "markdown",
                "id": f"cell-{number}",
                "metadata": {},
                "source": part.strip("\n").splitlines(keepends=True),
                **code,
            }
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def code_cells(text: str) -> list[str]:
    """The sources of the code cells of a notebook, in order."""
    cells = json.loads(text)["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
