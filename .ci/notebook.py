"""Runs a notebook from top to bottom in this folder. The file itself is left as it is unless --inplace is given.

python .ci/notebook.py FILE.ipynb [--inplace]
"""

import base64
import io
import os
import sys

import nbclient
import nbformat
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def smaller(png: str) -> str:
    """The same figure in 64 colours, a third of the size: notebooks are kept in the repository."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image, io.BytesIO() as file:
        image.convert("RGB").quantize(64).save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode() + "\n"


def clean(notebook) -> None:
    """Takes out what differs from run to run, or speaks of the machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for before, after in zip(cell.outputs[:-1], cell.outputs[1:]):
                if before.get("name") == after.get("name") == "stdout":  # one print in several pieces
                    after.text, before.text = before.text + after.text, ""
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}


def main(path: str, *options: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    if "--inplace" in options:
        clean(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
