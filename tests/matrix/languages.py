"""Exports every language model of keras-nlp for generation, and writes the table of it, docs/language_models.md.

    python -m tests.matrix.languages

Ten minutes of two cores. Each model is tiny, has random weights and no tokenizer.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import keras_nlp
import numpy as np

import tfvllm
from tests.generation import general_models, models, reference
from tests.generation.general_models import COUNT, ROOM
from tfvllm.errors import InputError
from tfvllm.families import has_reader
from tfvllm.savedmodel import manifest, parity

PAGE = Path(__file__).parents[2] / "docs" / "language_models.md"
BUILDERS: tuple[Callable, ...] = (
    *models.CAUSAL,
    *models.SEQ2SEQ,
    *(general_models.rwkv7, general_models.qwen3_5, general_models.qwen3_5_moe),
    *(general_models.gemma3n, general_models.gemma4, general_models.t5gemma2, general_models.ed_rec),
)
# What needs more than text; refused by the names of its inputs.
OTHERS = {
    "BLIP2CausalLM": "images",
    "BLIP2Seq2SeqLM": "images",
    "Gemma4AssistantCausalLM": "the hidden states of another model",
    "MoonshineAudioToText": "sound",
    "PARSeqCausalLM": "images",
    "PaliGemmaCausalLM": "images",
}
START = [2, 5]
HEAD = """# Language models

Every `CausalLM` and `Seq2SeqLM` of keras-nlp {version} that reads text, exported with `task="generate"` or
`"translate"`. *Same tokens*: the SavedModel, in a process that has TensorFlow only, writes keras-nlp's own greedy
tokens for prompts of mixed lengths; *forward pass*: those of the model's forward passes, because the cached step of
keras-nlp's `generate` computes something else there. *Shrunk*: `tfvllm.shrink(heads=0.5, ffn=0.5)` gives a smaller
model. Models are tiny, with random weights. `python -m tests.matrix.languages` makes this page.

A *reader* brings bfloat16, the target `onednn` and a faster step; the *general path* runs keras-nlp's own step
([what that means](generation.md#any-other-family-the-general-path)).

| model | family | path | same tokens | shrunk |
|---|---|---|---|---|
"""
TAIL = """
Not of text alone, and refused by the names of what else they read: {others}.
"""


def classes() -> set[str]:
    """Names of keras-nlp's language models; one class may have several."""
    bases = (keras_nlp.models.CausalLM, keras_nlp.models.Seq2SeqLM)
    found = {name: getattr(keras_nlp.models, name) for name in dir(keras_nlp.models)}
    kept = [cls for cls in found.values() if isinstance(cls, type) and issubclass(cls, bases) and cls not in bases]
    return {cls.__name__ for cls in kept}


def row(make: Callable) -> tuple[str, ...]:
    """(model, family, path, same tokens, shrunk) of a builder's model; AssertionError where the tokens differ."""
    model = models.build(make)
    model.compile(sampler="greedy", jit_compile=False)
    two_stacks = isinstance(model, keras_nlp.models.Seq2SeqLM)
    options = {"task": "translate", "start_token_ids": START} if two_stacks else {"task": "generate"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which says what path it takes, and so does the page
        path = tfvllm.export(model, Path(folder) / "1", max_length=ROOM, check=None, warmup=False, **options)
        found, by_forward_pass = _tokens(model, make, path, two_stacks)
        document = manifest.read(path)
    for answer, expected in found:
        np.testing.assert_array_equal(answer, expected)
    general = document.get("path") == "general"
    assert general != has_reader(model)
    return (
        type(model).__name__,
        make.__name__,
        "general" if general else "reader",
        "forward pass" if by_forward_pass else "yes",
        _shrunk(model),
    )


def _tokens(model, make, path: Path, two_stacks: bool):
    """((the SavedModel's, keras-nlp's) of each batch, whether the second are the forward pass's)."""
    batches = [models.prompts(lengths, low=6) for lengths in ([5], [3, 8, 1])]
    count = np.int32(COUNT)
    name = "serving_default"
    requests = [(name, {"token_ids": i, "padding_mask": m, "max_new_tokens": count}) for i, m in batches]
    answers = [answer["token_ids"] for answer in parity.run_fresh(path, requests)]
    wrong = make in general_models.WRONG or isinstance(model, reference.WRONG_STEPS)
    if make is general_models.rwkv7:
        model.generate_function = model.make_generate_function()
    expected = []
    for ids, mask in batches:
        if two_stacks:
            expected.append(reference.keras_translate(model, ids, mask, START, COUNT))
        elif make in general_models.WRONG:
            expected.append(general_models.forward_greedy(model, ids, mask))
        elif make is general_models.rwkv7:
            expected.append(general_models.keras_greedy(model, ids, mask))
        else:
            expected.append(reference.keras_generate(model, ids, mask, COUNT))
    return list(zip(answers, expected)), wrong


def _shrunk(model) -> str:
    try:
        small = tfvllm.shrink(model, heads=0.5, ffn=0.5, round_to=1)
    except InputError as error:
        return "no: " + str(error).split(".")[0]
    assert small.count_params() < model.count_params()
    return "yes"


def page() -> str:
    rows = sorted(row(make) for make in BUILDERS)
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    others = ", ".join(f"{name} ({what})" for name, what in OTHERS.items())
    return HEAD.format(version=version("keras-nlp")) + lines + TAIL.format(others=others)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
