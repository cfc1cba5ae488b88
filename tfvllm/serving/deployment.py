"""What a cluster asks of a served model: a name it takes, and how much memory the server may use."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.files import digest

MIB = 1 << 20
# RFC 1035 labels end at 63 characters; KServe and Knative put up to 24 behind a service's name.
_LONGEST = 39
# TF Serving's image starts the server through a shell that splits its arguments.
_UNSAFE = re.compile(r"""[\s/:"'`$\\*?\[\](){}<>|&;!#~=,\x00-\x1f]""")


def check_name(name: str) -> str:
    """`name`, if TF Serving and its Docker image take it as a model's name (any script). Raises InputError."""
    found = _UNSAFE.search(name)
    if not name or name.startswith((".", "-")) or found:
        bad = "" if not found else f" (it has {found[0]!r})"
        raise InputError(
            f"a model's name must be non-empty, without spaces, slashes, colons and other signs of the shell; got "
            f"{name!r}{bad}. Rename the folder, or pass name=... to tfvllm.serving.kit.write."
        )
    return name


def cluster_name(name: str) -> str:
    """A name for Kubernetes: small letters, digits and dashes, a letter first, 39 characters at most.

    A name that is one already stays as it is. Any other loses its accents and gets a hash of itself at the end, so that
    two names never become the same.
    """
    if re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= _LONGEST:
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not plain[:1].isalpha():
        plain = f"model-{plain}".rstrip("-")
    return f"{plain[: _LONGEST - 9].rstrip('-')}-{digest(name)[:8]}"


@dataclass(frozen=True)
class Memory:
    """What a server of one model may use, in bytes.

    Attributes:
        base: TensorFlow itself.
        weights: variables, tables and graph of one version.
        packed: copies of weights that oneDNN keeps in a layout of its own.
        activations: what one run computes on the way.
        caches: keys and values of one generating run.
        runs: how many runs at once.
    """

    base: int
    weights: int
    packed: int
    activations: int
    caches: int
    runs: int

    @property
    def total(self) -> int:
        """base + 2 weights + packed + runs (activations + caches), a fifth more, in steps of 256 MiB.

        Weights count twice: a new version is loaded beside the one in service.
        """
        used = self.base + 2 * self.weights + self.packed + self.runs * (self.activations + self.caches)
        return -(-int(1.2 * used) // (256 * MIB)) * 256 * MIB

    @property
    def quantity(self) -> str:
        """The total as Kubernetes writes it."""
        mib = self.total // MIB
        return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"


_BASE = 512 * MIB
_NODES = 8  # bytes in memory for each byte of a stored graph or asset: nodes, functions and tables are built from it


def memory(folder: Path, document: Mapping[str, Any], *, target: str, rows: int, runs: int) -> Memory:
    """Reckons what serving the SavedModel in `folder` takes, from its files and its manifest.

    Args:
        document: its manifest, which declares lengths and caches.
        target: "portable" or "onednn".
        rows: rows of one run.
        runs: how many at once.

    Of a run, three tensors of the widest layer and two of attention's scores are counted for rows * length tokens, in
    float32; caches are `cache_bytes_per_token` (twice that in bfloat16, which a single row keeps in float32).
    """
    shapes = [shape for _, shape in _variables(folder)]
    stored = sum(file.stat().st_size for file in (folder / "variables").glob("*")) if shapes else 0
    graph = (folder / "saved_model.pb").stat().st_size
    graph += sum(file.stat().st_size for file in (folder / "assets").rglob("*") if file.is_file())
    length = int(document.get("max_length") or 128)
    tokens = length + int(document.get("max_source_length") or 0)
    matrices = [shape for shape in shapes if len(shape) >= 2]
    widest = max((int(shape[-1]) for shape in matrices), default=0)
    largest = max(matrices, key=lambda shape: int(np.prod(shape)), default=[0])
    hidden = int(min(largest))
    scores = rows * max(1, hidden // 64) * tokens * tokens if document.get("task") else 0
    vocabulary = rows * int(document.get("vocabulary_size") or 0)
    elements = 3 * rows * tokens * min(widest, 4 * hidden or widest) + 2 * scores + 2 * vocabulary
    cache = int(document.get("cache_bytes_per_token") or 0) * (2 if document.get("precision") == "bfloat16" else 1)
    return Memory(
        base=_BASE,
        weights=stored + _NODES * graph,
        packed=stored if target == "onednn" else 0,
        activations=4 * elements,
        caches=rows * tokens * cache,
        runs=runs,
    )


def _variables(folder: Path) -> list[tuple[str, list[int]]]:
    if not (folder / "variables" / "variables.index").is_file():
        return []
    found = tf.train.list_variables(str(folder / "variables" / "variables"))
    return [(name, shape) for name, shape in found if not name.startswith("_CHECKPOINTABLE")]
