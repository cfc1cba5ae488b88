"""Walks cells of the matrix: family x task x precision x target x entry point.

A cell passes when a SavedModel was written by its entry point, loaded where there is neither Keras nor tfvllm's model
code, and gave keras-nlp's own answers.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import tensorflow as tf

import tfvllm
from tests.generation.reference import WRONG_STEPS, filled_by_forward_passes, logits_of
from tfvllm import cli
from tfvllm.savedmodel import parity

from .families import LENGTH, TEXTS, Family, encoded

SETTINGS = tuple((precision, target) for precision in ("float32", "bfloat16") for target in ("portable", "onednn"))
ENTRIES = ("python", "cli", "rest")
TASKS = ("classify", "embed", "generate", "translate")
NEW_TOKENS = 8
# Scores and embeddings: how far from the Keras model's in float32. Log-probabilities in bfloat16: how far below the
# best token's the chosen one's may lie in the float32 model.
NEAR = {"float32": 1e-4, "bfloat16": 0.06}
NEARLY_BEST = 0.5
CONTROLS = {
    "max_new_tokens": np.int32(NEW_TOKENS),
    "temperature": np.float32(0.0),
    "top_k": np.int32(0),
    "top_p": np.float32(1.0),
    "repetition_penalty": np.float32(1.0),
    "no_repeat_ngram": np.int32(0),
    "seed": np.int32(0),
    "stop_strings": np.array([], object),
}


@dataclass(frozen=True, order=True)
class Cell:
    precision: str
    target: str
    entry: str


def every_cell() -> list[Cell]:
    return [Cell(*setting, entry) for setting in SETTINGS for entry in ENTRIES]


class Group:
    """One family at one task: its model, keras-nlp's answers, and the SavedModels of its cells."""

    def __init__(self, family: Family, task: str, folder: Path):
        self.family, self.task, self.folder = family, task, folder / f"{family.name}-{task}"
        self.model = family.task[task]()
        self.reference = _REFERENCES[task](self.model)

    def walk(self, cells: Iterable[Cell]) -> dict[Cell, str]:
        """Cell -> "" where it passed, else what went wrong."""
        written = {cell: self.write(cell) for cell in cells}
        paths = {cell: path for cell, path in written.items() if isinstance(path, Path)}
        fresh = [cell for cell in paths if cell.entry != "rest"]
        served = [cell for cell in paths if cell.entry == "rest"]
        answers: dict = {cell: error for cell, error in written.items() if cell not in paths}
        answers |= dict(zip(fresh, answers_of([(paths[cell], self.reference.request) for cell in fresh])))
        answers |= dict(zip(served, _over_rest([paths[cell] for cell in served], self.reference.body)))
        return {cell: self.judge(cell, answers[cell]) for cell in written}

    def judge(self, cell: Cell, answer) -> str:
        """What is wrong with `answer`, outputs or an exception; nothing where it is keras-nlp's."""
        try:
            if isinstance(answer, Exception):
                raise answer
            self.reference.compare(answer, cell.precision)
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return ""

    # Entry points ----------------------------------------------------------------------------------------------------

    def write(self, cell: Cell) -> Path | Exception:
        """The SavedModel of a cell, or what stopped its making."""
        by = "cli" if cell.entry == "cli" else "python"
        path = self.folder / by / f"{cell.precision}-{cell.target}" / "1"
        make = self._encoder if self.task in ("classify", "embed") else self._language_model
        try:
            if not path.exists():
                make(cell, path, by)
        except Exception as error:
            return error
        return path

    def _language_model(self, cell: Cell, path: Path, by: str) -> None:
        if by == "python":
            options = {"precision": cell.precision, "target": cell.target, "max_length": LENGTH}
            tfvllm.export(self.model, path, task=self.task, check=None, warmup=False, **options)
        else:
            options = ["--precision", cell.precision, "--option", f"target={cell.target}", "--max-length", str(LENGTH)]
            self._export_by_command(path, options)

    def _encoder(self, cell: Cell, path: Path, by: str) -> None:
        """Exported once in float32; precision and target are the simplifier's."""
        plain = self.folder / by / "plain" / "1"
        if by == "python":
            if not plain.exists():
                tfvllm.export(self.model, plain, task=self.task, check=None, warmup=False)
            tfvllm.simplify_saved_model(plain, path, precision=cell.precision, target=cell.target)
        else:
            if not plain.exists():
                self._export_by_command(plain, [])
            _command("simplify", str(plain), str(path), "--precision", cell.precision, "--target", cell.target)

    def _export_by_command(self, path: Path, options: list[str]) -> None:
        saved = self.folder / "model.keras"
        if not saved.exists():
            saved.parent.mkdir(parents=True, exist_ok=True)
            self.model.save(saved)
        _command("export", str(saved), str(path), "--task", self.task, "--check", "none", "--no-warmup", *options)


def _command(*arguments: str) -> None:
    """Runs the command line in this process (a process of its own for each would spend its time on imports)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"tfvllm {arguments[0]}: {end.code}: {said.getvalue()[-300:]}") from None


def answers_of(asked: list[tuple[Path, tuple]]) -> list:
    """What SavedModels answer to a request each, in a process that knows TensorFlow and TensorFlow Text only."""
    if not asked:
        return []
    found = parity.run_fresh_each([(path, [request]) for path, request in asked], keep_errors=True)
    return [answer if isinstance(answer, Exception) else answer[0] for answer in found]


def _over_rest(paths: list[Path], body: dict) -> list:
    """The answers of `tfvllm serve` to a client that speaks TF Serving's REST."""
    if not paths:
        return []
    names = [f"m{index}={path.parent}" for index, path in enumerate(paths)]
    command = [sys.executable, "-m", "tfvllm", "serve", "--rest-port", "0", "--no-batching", *names]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **quiet) as server:
        try:
            said = ""
            for line in server.stderr:
                said += line
                if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise AssertionError(f"no server: {said[-300:]}")
            found: list = []
            for index in range(len(paths)):
                answer = requests.post(f"{url[0]}/v1/models/m{index}:predict", json=body, timeout=120)
                found.append(_columns(answer.json()) if answer.ok else AssertionError(answer.text[:300]))
            return found
        finally:
            server.terminate()


def _columns(answer: dict) -> dict[str, np.ndarray]:
    outputs = answer["outputs"] if isinstance(answer["outputs"], dict) else {"": answer["outputs"]}
    return {name: np.asarray(value) for name, value in outputs.items()}


# --- keras-nlp's own answers ------------------------------------------------------------------------------------------


def _features(model):
    """The preprocessor's own, as in a tf.data pipeline; byte pairs that the vocabulary lacks are none of the texts'."""
    data = tf.data.Dataset.from_tensor_slices(list(TEXTS)).batch(len(TEXTS))
    return next(iter(data.map(model.preprocessor)))


_TEXTS_IN = ("serving_default", {"text": encoded(TEXTS)}), {"inputs": {"text": list(TEXTS)}}


class Scores:
    """Class probabilities."""

    def __init__(self, model):
        self.request, self.body = _TEXTS_IN
        self.expected = tf.nn.softmax(model(_features(model), training=False)).numpy()

    def compare(self, found, precision):
        _near(found["scores"], self.expected, NEAR[precision])


class Embeddings:
    """Mean over the real tokens, unit length."""

    def __init__(self, model):
        self.request, self.body = _TEXTS_IN
        features = _features(model)
        features = features[0] if isinstance(features, tuple) else features
        names = [tensor.name for tensor in model.backbone.inputs]
        outputs = model.backbone({name: features[name] for name in names}, training=False)
        outputs = np.asarray(outputs["sequence_output"] if isinstance(outputs, dict) else outputs, np.float64)
        padding = features["padding_mask"] if "padding_mask" in features else features["token_ids"] != 0
        mask = np.asarray(padding, np.float64)[..., None]
        vectors = (outputs * mask).sum(1) / mask.sum(1)
        self.expected = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def compare(self, found, precision):
        found = found["embeddings"] if "embeddings" in found else found[""]
        _near(found, self.expected, NEAR[precision])


class Tokens:
    """Greedy tokens of `generate`, each row from its own end to the first end token."""

    def __init__(self, model):
        self.model, self.source = model, "prompts"
        tokenizer = model.preprocessor.tokenizer
        self.body = {
            "signature_name": "generate",
            "inputs": {self.source: list(TEXTS), "max_new_tokens": NEW_TOKENS},
        }
        self.request = ("generate", {self.source: encoded(TEXTS), **CONTROLS})
        self.stops = _stops(tokenizer)
        self.prompts = self._prompts()
        self.expected = self._greedy()

    def _prompts(self):
        features = self.model.preprocessor.generate_preprocess(list(TEXTS))
        return {name: np.asarray(value) for name, value in features.items() if name in ("token_ids", "padding_mask")}

    def _greedy(self) -> list[list[int]]:
        starts = self.prompts["padding_mask"].astype(int).sum(1)
        places = starts.max() + NEW_TOKENS  # keras-nlp computes to the end of what it is given
        answers = self._generated({name: tf.constant(value[:, :places]) for name, value in self.prompts.items()})
        return [self._until_stop(row[start : start + NEW_TOKENS]) for row, start in zip(answers, starts)]

    def _generated(self, prompts) -> np.ndarray:
        if isinstance(self.model, WRONG_STEPS):
            lengths = prompts["padding_mask"].numpy().astype(int).sum(1)
            return filled_by_forward_passes(self.model, prompts["token_ids"], lengths)
        self.model.compile(sampler="greedy", run_eagerly=True)
        return np.asarray(self.model.make_generate_function()(prompts, stop_token_ids=None)["token_ids"])

    def _until_stop(self, row) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self.stops]
        return [int(token) for token in row[: ends[0] + 1 if ends else None]]

    def compare(self, found, precision):
        rows = [self._until_stop(row[:length]) for row, length in zip(found["token_ids"], found["lengths"])]
        if precision == "float32":
            assert rows == self.expected, f"tokens {rows} where keras-nlp gives {self.expected}"
        else:
            worst = max(self._below_best(index, row) for index, row in enumerate(rows))
            assert worst <= NEARLY_BEST, f"a token lies {worst:.3g} below the best one's log-probability"

    def _below_best(self, index: int, row: list[int]) -> float:
        start = int(self.prompts["padding_mask"][index].sum())
        ids = np.concatenate([self.prompts["token_ids"][index, :start], row]).astype(np.int32)[None]
        logits = self._logits(index, ids)[0, start - 1 : -1]
        return float((logits.max(-1) - np.take_along_axis(logits, np.array(row)[:, None], 1)[:, 0]).max(initial=0.0))

    def _logits(self, index: int, ids: np.ndarray) -> np.ndarray:
        return np.asarray(logits_of(self.model, ids))


class Translations(Tokens):
    """The same of an encoder and its decoder."""

    def __init__(self, model):
        super().__init__(model)
        self.body["inputs"]["texts"] = self.body["inputs"].pop("prompts")
        values = dict(self.request[1])
        values["texts"] = values.pop("prompts")
        del values["stop_strings"]
        self.request = ("generate", values)

    def _prompts(self):
        found = {k: np.asarray(v) for k, v in self.model.preprocessor.generate_preprocess(list(TEXTS)).items()}
        self.sources = {name: value for name, value in found.items() if name.startswith("encoder_")}
        return {name.removeprefix("decoder_"): value for name, value in found.items() if name.startswith("decoder_")}

    def _generated(self, prompts):
        self.model.compile(sampler="greedy", run_eagerly=True)
        inputs = {f"decoder_{name}": value for name, value in prompts.items()}
        inputs |= {name: tf.constant(value) for name, value in self.sources.items()}
        return np.asarray(self.model.make_generate_function()(inputs, stop_token_ids=None)["decoder_token_ids"])

    def _logits(self, index, ids):
        sources = {name: value[index : index + 1] for name, value in self.sources.items()}
        inputs = {**sources, "decoder_token_ids": ids, "decoder_padding_mask": np.ones_like(ids)}
        return np.asarray(self.model(inputs, training=False))


_REFERENCES = {"classify": Scores, "embed": Embeddings, "generate": Tokens, "translate": Translations}


def _stops(tokenizer) -> set[int]:
    names = ("end_token_id", "end_token2_id")
    return {int(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None) is not None}


def _near(found, expected, atol: float) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape} where keras-nlp gives {expected.shape}"
    worst = float(np.abs(found - expected).max())
    assert worst <= atol, f"{worst:.3g} from keras-nlp's; allowed {atol}"
