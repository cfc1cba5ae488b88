"""Runs a notebook from top to bottom in this folder. The file itself is left as it is unless --inplace is given.

python .ci/notebook.py FILE.ipynb [--inplace | --brief]

`--brief`: every epoch of a `fit` has a few steps only. All cells run, in a third of the time; what they print is less.
"""

import base64
import io
import os
import sys

import nbclient
import nbformat
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


BRIEF = """
import os
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
import keras

def _brief(fit):
    def brief(self, *given, **options):
        for name, most in (("steps_per_epoch", 12), ("validation_steps", 4)):
            if name == "steps_per_epoch" or options.get("validation_data") is not None:
                options[name] = min(options.get(name) or most, most)
        return fit(self, *given, **options)

    return brief

keras.Model.fit = _brief(keras.Model.fit)
"""


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
    if "--brief" in options:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(BRIEF))
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    if "--inplace" in options:
        clean(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
