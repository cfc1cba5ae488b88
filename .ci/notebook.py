"""Runs a notebook from top to bottom in this folder. The file itself is left as it is unless --inplace is given.

python .ci/notebook.py FILE.ipynb [--inplace]
"""

import os
import sys

import nbclient
import nbformat

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main(path: str, *options: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    if "--inplace" in options:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day: every run would change the file
            if cell.cell_type == "code":  # what libraries say as they start is about the machine
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
