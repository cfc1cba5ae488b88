"""Every family as a SavedModel on ids, in a process that knows only TensorFlow: keras-nlp's own greedy tokens."""

import numpy as np
import pytest

import tfvllm
from tfvllm.errors import InputError
from tfvllm.graph.probes import check_runs
from tfvllm.savedmodel import manifest, parity

from .models import CAUSAL, SEQ2SEQ, build, prompts
from .reference import keras_generate, keras_prompts, keras_translate, log_probs, seq2seq_log_probs
from .small_tokenizers import text_options

TEXTS = ["a quick brown fox jumps", "the dog", "\u4f60\u597d caf\u00e9"]
COUNT = 8
FAMILIES = (*CAUSAL, *SEQ2SEQ)


def exported(make, directory, *, text=True, layers=None, **options):
    """(a family's model, where its SavedModel lies), on text or on ids."""
    options.setdefault("check", None)
    depth = {} if layers is None else {"layers": layers}
    model = build(make, **depth, **(text_options(make.__name__) if text else {}))
    if make in CAUSAL:
        path = tfvllm.export(model, directory, task="generate", max_length=40, warmup=False, **options)
    else:
        starts = {} if text else {"start_token_ids": [2, 5]}
        path = tfvllm.export(model, directory, task="translate", max_length=24, warmup=False, **starts, **options)
    return model, path


def asks(make, *, text=True):
    """The (signature, inputs) that asks for the answer to TEXTS, or to ids."""
    if text:
        name = "prompts" if make in CAUSAL else "texts"
        inputs = {name: np.array([text.encode() for text in TEXTS], object)}
    else:
        ids, mask = prompts([5, 2, 9], low=6)
        inputs = {"token_ids": ids, "padding_mask": mask}
    given = {
        "max_new_tokens": np.int32(COUNT),
        "temperature": np.float32(0.0),
        "top_k": np.int32(0),
        "top_p": np.float32(1.0),
        "repetition_penalty": np.float32(1.0),
        "no_repeat_ngram": np.int32(0),
        "seed": np.int32(0),
    }
    if text and make in CAUSAL:
        given["stop_strings"] = np.array([], object)
    return "generate", {**inputs, **given}


def own_tokens(make, model, path, *, text=True):
    """(ids, mask, start, keras-nlp's new tokens int32[batch, COUNT]) of the same request."""
    ids, mask = keras_prompts(model, TEXTS) if text else prompts([5, 2, 9], low=6)
    if make in CAUSAL:
        return ids, mask, [], keras_generate(model, ids, mask, COUNT)
    start = manifest.read(path)["start_token_ids"]
    return ids, mask, start, keras_translate(model, ids, mask, start, COUNT)


def assert_same(found, expected, stops):
    """Each row of an answer is keras-nlp's up to its first stop token."""
    assert len(np.unique(expected)) > 2  # a test that any constant would pass is none
    for row, tokens in enumerate(expected):
        hits = np.flatnonzero(np.isin(tokens, stops))
        length = hits[0] + 1 if len(hits) else COUNT
        assert found["lengths"][row] == length
        np.testing.assert_array_equal(found["token_ids"][row, :length], tokens[:length])


def computed_here(target, precision):
    try:
        check_runs(target, precision)
    except InputError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_greedy_tokens_of_ids_in_a_fresh_process(make, tmp_path):
    """On text tests/matrix has them."""
    text, work, models = False, [], []
    for precision, target in (("float32", "portable"), ("bfloat16", "onednn")):
        if not computed_here(target, precision):
            continue
        options = {"precision": precision, "target": target, "check": "here"}
        model, path = exported(make, tmp_path / f"{precision}-{target}" / "1", text=text, **options)
        work.append((path, [asks(make, text=text)]))
        models.append((model, path, text, precision))
    for (model, path, text, precision), (found,) in zip(models, parity.run_fresh_each(work), strict=True):
        ids, mask, start, expected = own_tokens(make, model, path, text=text)
        stops = manifest.read(path)["stop_token_ids"]
        if precision == "float32":
            assert_same(found, expected, stops)
            continue
        for row, length in enumerate(found["lengths"]):  # what float32 finds as likely as its own choice
            for step in range(length):
                tokens = [*start, *found["token_ids"][row, :step]]
                source = ids[row][mask[row] > 0]
                if make in CAUSAL:
                    scores = log_probs(model, [*source, *tokens])[-1]
                else:
                    scores = seq2seq_log_probs(model, source, tokens)
                assert scores.max() - scores[found["token_ids"][row, step]] < 0.35
