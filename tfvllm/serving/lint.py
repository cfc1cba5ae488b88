"""Would a stock TF Serving load and serve this SavedModel? Each problem, where it is, and its fix."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError
from tfvllm.savedmodel import manifest, protos
from tfvllm.serving import served_ops

ERROR, WARNING, NOTE = "error", "warning", "note"
_GIB = 1 << 30
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
_TABLE_WRITES = {"LookupTableInsert", "LookupTableInsertV2"}
_CLASSIFY = "tensorflow/serving/classify"
_REGRESS = "tensorflow/serving/regress"
_INTERNAL = ("__saved_model_init_op", "__saved_model_train_op")
# Ops of the runtime itself that begin with an underscore but are everywhere.
_PORTABLE_INTERNAL = {"_Arg", "_Retval", "_DeviceArg", "_DeviceRetval", "_Send", "_Recv", "_HostSend", "_HostRecv"}


@dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        code: its kind, such as "unknown-op".
        severity: "error" (will not load or answer), "warning" (will work badly or in part), "note".
        where: the node, signature or file.
        what: what is wrong.
        fix: what to do about it.
        fixable: whether `--fix` does it.
        signature: the signature it is about, if it is about one.

    Example:
        >>> from tfvllm.serving.lint import Finding, LintReport
        >>> finding = Finding("custom-op", "error", "layer", "op Mine is not linked", "replace that layer")
        >>> LintReport("folder", "2.20", "portable", [finding]).ok
        False
    """

    code: str
    severity: str
    where: str
    what: str
    fix: str
    fixable: bool = False
    signature: str | None = None


@dataclass
class LintReport:
    """What lint found. `target` is "portable" (public ops only) or "onednn" (needs a server with oneDNN linked).

    Example:
        >>> from tfvllm.serving.lint import LintReport
        >>> LintReport("saved_models/sentiment/1", serving_version="2.20", target="portable").ok
        True
    """

    directory: str
    serving_version: str
    target: str
    findings: list[Finding] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing keeps the model from being served."""
        return not any(finding.severity == ERROR for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ok": self.ok}

    def codes(self) -> list[str]:
        """The kinds of the findings, in order."""
        return [finding.code for finding in self.findings]


def lint(
    directory: str | os.PathLike, *, serving_version: str | None = None, fix: bool = False, run: bool = True
) -> LintReport:
    """Checks the SavedModel in `directory` (or in its highest version folder).

    Args:
        serving_version: of TF Serving, such as "2.20".
        fix: apply the fixes that are safe: method names, compile-with-XLA attributes, missing warm-up requests.
        run: also load the model and replay its warm-up requests; False reads the files only.

    Raises InputError when there is no SavedModel to read.

    Example:
        >>> from tfvllm.serving.lint import lint
        >>> report = lint("saved_models/sentiment", run=False)
        >>> report.ok, report.target
        (True, 'portable')
    """
    version = served_ops.check_version(serving_version)
    folder, findings = _locate(Path(directory))
    proto = _read(folder)
    report = LintReport(str(directory), version, "portable")
    if fix:
        report.fixed = _fix(folder, proto)
    report.findings = findings
    if not proto.meta_graphs:
        findings.append(Finding("no-graph", ERROR, "saved_model.pb", "it holds no graph", "export the model again"))
        return report
    graph = proto.meta_graphs[0]
    findings += _check_tags(proto)
    operations, report.target = _check_ops(graph, version)
    findings += operations
    findings += _check_attributes(graph)
    findings += _check_signatures(graph)
    findings += _check_files(folder, graph)
    findings += _check_warmup(folder, run and report.ok)
    order = {ERROR: 0, WARNING: 1, NOTE: 2}
    findings.sort(key=lambda finding: order[finding.severity])
    return report


# --- finding the files ------------------------------------------------------------------------------------------------


def _locate(directory: Path) -> tuple[Path, list[Finding]]:
    from tfvllm.savedmodel import versions

    if not directory.is_dir():
        raise InputError(f"no folder {directory}; expected a SavedModel, or a folder with versions 1/, 2/, …")
    if (directory / "saved_model.pb").exists() or (directory / "saved_model.pbtxt").exists():
        name = directory.resolve().name
        if not name.isdigit():
            fix = "put it in a folder such as NAME/1 and give TF Serving the folder NAME"
            what = f"the folder is called {name}, which is no version number: TF Serving would not find it"
            return directory, [Finding("version-folder", WARNING, str(directory), what, fix)]
        return directory, []
    found = versions.find(directory)
    if not found:
        raise InputError(
            f"{directory} holds no saved_model.pb and no version folder (1/, 2/, …) with one. "
            "Export a model there first: tfvllm export MODEL.keras DST --task classify"
        )
    return found[max(found)], []


def _read(folder: Path):
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    file = folder / "saved_model.pb"
    if not file.exists():
        raise InputError(f"{folder} has a saved_model.pbtxt only; expected saved_model.pb. Export the model again.")
    try:
        return saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except DecodeError:
        raise InputError(f"{file} is no SavedModel (it cannot be decoded). Export the model again.") from None


def _nodes(graph) -> Iterator[tuple[str, Any]]:
    for node in graph.graph_def.node:
        yield "", node
    for function in graph.graph_def.library.function:
        for node in function.node_def:
            yield function.signature.name, node


# --- the checks -------------------------------------------------------------------------------------------------------


def _check_tags(proto) -> list[Finding]:
    tags = [set(graph.meta_info_def.tags) for graph in proto.meta_graphs]
    if {"serve"} in tags:
        return []
    shown = "; ".join(",".join(sorted(found)) or "none" for found in tags)
    what = f"no graph is tagged 'serve' (found: {shown})"
    return [Finding("no-serve-tag", ERROR, "saved_model.pb", what, "save it with the tag 'serve' (the default)")]


def _check_ops(graph, version: str) -> tuple[list[Finding], str]:
    known = served_ops.served(version)
    functions = {function.signature.name for function in graph.graph_def.library.function}
    unknown: dict[str, list[str]] = {}
    internal: dict[str, list[str]] = {}
    python: list[str] = []
    growing: list[str] = []
    for function, node in _nodes(graph):
        where = f"{node.name} in {function}" if function else node.name
        if node.op in functions:
            continue
        if node.op in _PYTHON_OPS:
            python.append(where)
        elif node.op not in known:
            unknown.setdefault(node.op, []).append(where)
        elif node.op.startswith("_") and node.op not in _PORTABLE_INTERNAL:
            internal.setdefault(node.op, []).append(where)
        elif node.op in _TABLE_WRITES:
            growing.append(where)
    findings = []
    for op, places in sorted(unknown.items()):
        first = served_ops.since(op)
        if first is not None:
            what = f"op {op} ({len(places)}x) came with TensorFlow {first}; TF Serving {version} does not know it"
            fix = f"serve with TF Serving {first} or newer, or export with TensorFlow {version}"
            findings.append(Finding("newer-op", ERROR, _layer(places[0]), what, fix))
        else:
            what = f"op {op} ({len(places)}x) is neither TensorFlow's nor TensorFlow Text's: the model will not load"
            fix = "replace that layer by TensorFlow ops, or build a server with the op's library linked in"
            findings.append(Finding("custom-op", ERROR, _layer(places[0]), what, fix))
    if python:
        what = f"{len(python)} op(s) call back into Python (tf.py_function, tf.numpy_function)"
        fix = "write that step with TensorFlow ops; a server has no Python"
        findings.append(Finding("python-op", ERROR, _layer(python[0]), what, fix))
    if growing:
        what = f"{len(growing)} op(s) write into a mutable table while serving: it may grow with every request"
        fix = "use a tf.lookup.StaticHashTable; keras-nlp's byte-pair tokenizers get one from tfvllm.export"
        findings.append(Finding("mutable-table", WARNING, _layer(growing[0]), what, fix))
    if internal:
        names = ", ".join(f"{op} {len(places)}x" for op, places in sorted(internal.items()))
        what = (
            f"target is onednn: {names}. Where oneDNN is off (TF_ENABLE_ONEDNN_OPTS=0, or a build without it) "
            "the model loads, but its runs fail; with warm-up requests such a server refuses the version and keeps "
            "the old one"
        )
        fix = "try it on the server image you deploy, or use the portable target: tfvllm simplify --target portable"
        findings.append(Finding("onednn-ops", WARNING, _layer(next(iter(internal.values()))[0]), what, fix))
    if "_QuantizedMatMul" in internal:
        what = (
            "int8 products take a CPU with VNNI or AMX: on others oneDNN adds them in 16 bits, which overflow, and "
            "answers are wrong without an error"
        )
        fix = "serve it on such CPUs only, or simplify with --precision float32 or bfloat16"
        findings.append(Finding("int8-products", WARNING, _layer(internal["_QuantizedMatMul"][0]), what, fix))
    return findings, "onednn" if internal else "portable"


def _check_attributes(graph) -> list[Finding]:
    from tensorflow.core.framework import types_pb2

    findings = []
    compiled = [name for name, attributes in _compiled(graph)]
    if compiled:
        what = f"{len(compiled)} function(s) or node(s) must be compiled with XLA, which TF Serving has off on CPUs"
        fix = "export with jit_compile=False, or run: tfvllm lint --fix"
        findings.append(Finding("xla", ERROR, compiled[0], what, fix, fixable=True))
    double, devices, sizes = [], [], []
    for function, node in _nodes(graph):
        where = f"{node.name} in {function}" if function else node.name
        kinds = {value.type for value in node.attr.values() if value.WhichOneof("value") == "type"}
        if types_pb2.DT_DOUBLE in kinds and node.op not in (
            "Const",
            "Cast",
            "Identity",
            "Assert",
            "SaveV2",
            "RestoreV2",
        ):
            double.append(where)
        if "GPU" in node.device.upper() or "TPU" in node.device.upper():
            devices.append(f"{where} on {node.device}")
        if node.op == "Const" and node.ByteSize() > 1 << 20:
            sizes.append((node.ByteSize(), where))
    if double:
        what = f"{len(double)} op(s) compute in float64: at half the speed of float32 or less, and rarely meant"
        fix = "cast to float32 before that layer (keras.backend.set_floatx('float32'))"
        findings.append(Finding("float64", WARNING, _layer(double[0]), what, fix))
    if devices:
        what = f"{len(devices)} node(s) are pinned to a device"
        fix = "save with tf.saved_model.SaveOptions(experimental_variable_policy=None) outside of tf.device"
        findings.append(Finding("device", NOTE, devices[0], what, fix))
    total = graph.ByteSize()
    if total > 1.8 * _GIB:
        what = f"the graph takes {total / _GIB:.2f} GiB; protobuf ends at 2 GiB"
        findings.append(Finding("graph-size", ERROR, "saved_model.pb", what, "keep the weights in variables"))
    elif sum(size for size, _ in sizes) > 64 << 20:
        big, where = max(sizes)
        what = (
            f"{sum(size for size, _ in sizes) >> 20} MiB of constants in the graph (the largest: {big >> 20} MiB): "
            "slow to load, several copies in memory"
        )
        findings.append(Finding("constants", WARNING, _layer(where), what, "keep the weights in variables"))
    return findings


def _compiled(graph) -> list[tuple[str, Any]]:
    """(where, attributes) of everything that asks for XLA."""
    found = []
    for function in graph.graph_def.library.function:
        if function.attr["_XlaMustCompile"].b if "_XlaMustCompile" in function.attr else False:
            found.append((f"function {function.signature.name}", function.attr))
    for function_name, node in _nodes(graph):
        if "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b:
            found.append((f"{node.name} in {function_name}" if function_name else node.name, node.attr))
    return found


def _check_signatures(graph) -> list[Finding]:
    findings = []
    signatures = {name: value for name, value in graph.signature_def.items() if name not in _INTERNAL}
    if not signatures:
        what = "there is no signature: nothing can be asked of the model"
        fix = "save it with signatures=, or export it: tfvllm export MODEL.keras DST --task …"
        return [Finding("no-signature", ERROR, "saved_model.pb", what, fix)]
    if "serving_default" not in signatures:
        what = f"no signature is called serving_default; requests must name one of: {', '.join(sorted(signatures))}"
        fix = "save the main signature as serving_default"
        findings.append(Finding("no-default-signature", WARNING, "signatures", what, fix))
    for name, signature in sorted(signatures.items()):
        findings += _check_method(name, signature)
        findings += _check_batching(name, signature)
    return findings


def _looks_like(signature) -> str | None:
    """The method a signature's names and dtypes speak for, if not predict."""
    from tensorflow.core.framework import types_pb2

    if list(signature.inputs) != ["inputs"] or signature.inputs["inputs"].dtype != types_pb2.DT_STRING:
        return None
    outputs = {name: info.dtype for name, info in signature.outputs.items()}
    if outputs and set(outputs) <= {"classes", "scores"}:
        fits = outputs.get("scores", types_pb2.DT_FLOAT) == types_pb2.DT_FLOAT
        return _CLASSIFY if fits and outputs.get("classes", types_pb2.DT_STRING) == types_pb2.DT_STRING else None
    return _REGRESS if outputs == {"outputs": types_pb2.DT_FLOAT} else None


def _check_method(name: str, signature) -> list[Finding]:
    meant = _looks_like(signature)
    where = f"signature {name}"
    if meant is not None and signature.method_name != meant:
        verb = meant.rpartition("/")[2]
        what = (
            f"it is shaped for :{verb}, but its method name is {signature.method_name!r}: a TF Serving with "
            "--enable_signature_method_name_check refuses it"
        )
        fix = f"set the method name to {meant}, or run: tfvllm lint --fix"
        return [Finding("method-name", WARNING, where, what, fix, fixable=True)]
    if signature.method_name in (_CLASSIFY, _REGRESS) and meant != signature.method_name:
        wanted = "classes and/or scores" if signature.method_name == _CLASSIFY else "outputs"
        what = f"its method is {signature.method_name}, but it is not string 'inputs' to {wanted}"
        fix = "name the input 'inputs' (serialised tf.Examples) and the outputs so, or use the predict method"
        return [Finding("method-shape", ERROR, where, what, fix)]
    return []


# Under these findings requests fail, or answers may be wrong, behind TF Serving's --enable_batching.
_REFUSED_IN_BATCHES = {
    "scalar": "has no rows",
    "default-input": "has a default and is no row",
    "fixed-batch": "has a fixed number of rows",
    "unknown-rank": "may have any rank",
    "variable-length": "differs in length from request to request, and without a padding_mask may not be padded",
}


def unbatched(report: LintReport) -> dict[str, str]:
    """The signatures that TF Serving's --enable_batching must not be switched on for: name to the first reason.

    It is switched on for all signatures of a server at once. The serving kit asks here.
    """
    reasons: dict[str, str] = {}
    for finding in report.findings:
        if finding.signature is None or finding.code not in _REFUSED_IN_BATCHES:
            continue
        if finding.code == "variable-length" and finding.fix == _PAD:
            continue
        place = finding.where.partition(", ")[2]
        reasons.setdefault(finding.signature, f"{place} {_REFUSED_IN_BATCHES[finding.code]}")
    return reasons


def pads(report: LintReport) -> bool:
    """Whether requests of different lengths batch when they are padded, as pad_variable_length_inputs does."""
    return any(finding.code == "variable-length" and finding.fix == _PAD for finding in report.findings)


_PAD = "set pad_variable_length_inputs in the batching parameters, or export with the tokenizer inside"
_NO_PAD = "serve this signature without batching: zeros at the end of an input may change its answer"


def _check_batching(name: str, signature) -> list[Finding]:
    findings = []

    def found(code: str, severity: str, what: str, fix: str) -> None:
        findings.append(Finding(code, severity, where, what, fix, signature=name))

    for kind, tensors in (("input", signature.inputs), ("output", signature.outputs)):
        for key, info in sorted(tensors.items()):
            shape = None if info.tensor_shape.unknown_rank else [dim.size for dim in info.tensor_shape.dim]
            where = f"signature {name}, {kind} {key}"
            if shape is None:
                what = "its rank is unknown: it batches only if every request agrees"
                found("unknown-rank", NOTE, what, "give the signature a TensorSpec")
            elif not shape:
                what = "it is a scalar: TF Serving's --enable_batching refuses this signature"
                fix = "serve this signature without batching (or with tfvllm serve, which groups equal scalars)"
                found("scalar", NOTE, what, fix)
            elif kind == "input" and key in signature.defaults:
                what = "it has a default and is no row, but TF Serving's --enable_batching joins it like one"
                fix = "serve this signature without batching (or with tfvllm serve, which groups equal values)"
                found("default-input", NOTE, what, fix)
            elif shape[0] >= 0:
                what = f"its first dimension is fixed to {shape[0]}: requests cannot be batched together"
                found("fixed-batch", WARNING, what, "export with a first dimension of None")
            elif kind == "input" and -1 in shape[1:]:
                what = "other dimensions than the first are free: requests of different lengths batch only when padded"
                found("variable-length", NOTE, what, _PAD if "padding_mask" in signature.inputs else _NO_PAD)
    return findings


def _check_files(folder: Path, graph) -> list[Finding]:
    findings = []
    variables = any(node.op in ("VarHandleOp", "VariableV2") for _, node in _nodes(graph))
    if variables and not (folder / "variables" / "variables.index").exists():
        what = "the graph has variables, but variables/variables.index is missing"
        findings.append(Finding("no-variables", ERROR, str(folder), what, "copy the whole folder, or export again"))
    for asset in graph.asset_file_def:
        if not (folder / "assets" / asset.filename).exists():
            what = f"the asset {asset.filename} is missing"
            findings.append(Finding("no-asset", ERROR, "assets", what, "copy the whole folder, or export again"))
    if not manifest.path(folder).exists():
        what = "it carries no tfvllm.json: how it was made is not recorded"
        findings.append(Finding("no-manifest", NOTE, "assets.extra", what, "export it with tfvllm to get one"))
    return findings


def _check_warmup(folder: Path, run: bool) -> list[Finding]:
    from tfvllm.errors import TfvllmError
    from tfvllm.savedmodel import warmup

    file = warmup.path(folder)
    if not file.exists():
        what = "no warm-up requests: the first real requests of each version will be slow"
        fix = "run: tfvllm lint --fix (for a text input), or write them with tfvllm.savedmodel.warmup.write"
        return [Finding("no-warmup", WARNING, warmup.NAME, what, fix, fixable=True)]
    try:
        requests = warmup.read(folder)
        if len(requests) > warmup.LIMIT:
            what = f"{len(requests)} warm-up requests; TF Serving takes at most {warmup.LIMIT}"
            return [Finding("warmup-count", ERROR, warmup.NAME, what, "write fewer")]
        if run:
            warmup.replay(folder, requests)
    except TfvllmError as error:
        fix = "export again, or delete the file: TF Serving does not load a version whose warm-up fails"
        return [Finding("broken-warmup", ERROR, warmup.NAME, str(error), fix)]
    return []


# --- the fixes --------------------------------------------------------------------------------------------------------


def _fix(folder: Path, proto) -> list[str]:
    from tfvllm.savedmodel import warmup

    fixed = []
    for graph in proto.meta_graphs:
        for where, attributes in _compiled(graph):
            attributes["_XlaMustCompile"].b = False
            fixed.append(f"xla: {where} need not be compiled any more")
        for name, signature in graph.signature_def.items():
            meant = _looks_like(signature)
            if meant is not None and signature.method_name != meant:
                signature.method_name = meant
                fixed.append(f"method-name: signature {name} is {meant} now")
    if fixed:
        protos.write_proto(folder, proto)
    if proto.meta_graphs and not warmup.path(folder).exists():
        examples = _warmup_examples(proto.meta_graphs[0])
        if examples:
            written = warmup.write(folder, examples)
            fixed.append(f"no-warmup: {written['records']} requests written and replayed")
    return fixed


def _warmup_examples(graph) -> list[dict]:
    """Requests for the signatures whose only input is text."""
    import numpy as np
    from tensorflow.core.framework import types_pb2

    examples = []
    for name, signature in sorted(graph.signature_def.items()):
        if name in _INTERNAL or signature.method_name in (_CLASSIFY, _REGRESS) or len(signature.inputs) != 1:
            continue
        key, info = next(iter(signature.inputs.items()))
        if info.dtype != types_pb2.DT_STRING or len(info.tensor_shape.dim) != 1 or key.endswith("_bytes"):
            continue
        for rows in (["warm up"], ["a somewhat longer text to warm up with", "short"] * 4):
            array = np.array([row.encode() for row in rows], object)
            examples.append({"signature_name": name, "inputs": {key: array}})
    return examples


def _layer(where: str) -> str:
    return where if len(where) <= 160 else "…" + where[-159:]
