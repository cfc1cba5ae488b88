"""The models in `saved_models/`: here, in a process without keras-nlp, through the C API and over REST: the same."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.capi import loader
from tfvllm.data import synthetic_phrases, synthetic_reviews, synthetic_stories
from tfvllm.savedmodel import parity
from tfvllm.serving.lint import lint
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server

SHIPPED = Path(__file__).resolve().parents[2] / "saved_models"
LARGEST = 3e6  # bytes: they are kept in the repository
SEED = 123  # not the recipes': these are sentences that the models have not seen
PROMPTS = ["One morning Sophie went to the park with her", "On Monday Ben and his aunt Julia were in the forest."]
# name of a model: (its text input, its answer, texts)
ASKED = {
    "sentiment": ("text", "classes", ["a truly wonderful film", "the plot was dull and the ending awful"]),
    "story": ("prompts", "texts", PROMPTS),
    "translate": (
        "texts",
        "translations",
        ["We ordered two cups of tea and three apples.", "My sister bought four umbrellas and three cameras."],
    ),
}
# What TF Serving has: TensorFlow and TensorFlow Text.
FRESH = """
import json, sys
import tensorflow as tf, tensorflow_text

answers = {}
for folder, signature, inputs in json.loads(sys.argv[1]):
    call = tf.saved_model.load(folder).signatures[signature]
    found = call(**{name: tf.constant(value) for name, value in inputs.items()})
    answers[f"{folder}:{signature}"] = {name: value.numpy().tolist() for name, value in found.items()}
assert not {"keras_nlp", "tfvllm"} & set(sys.modules), "the process has more than TensorFlow"
print(json.dumps(answers, default=bytes.decode))
"""


def fresh(*asked: tuple[str, str, dict]) -> list[dict]:
    """The answers of signatures, each (model, signature, inputs), in a process with TensorFlow alone."""
    calls = [(str(SHIPPED / name / "1"), signature, inputs) for name, signature, inputs in asked]
    told = subprocess.run([sys.executable, "-c", FRESH, json.dumps(calls)], capture_output=True, text=True, cwd="/")
    assert told.returncode == 0, told.stderr[-2000:]
    return list(json.loads(told.stdout.splitlines()[-1]).values())


def here(*asked: tuple[str, str, dict]) -> list[dict]:
    """The same in this process."""
    calls = [(SHIPPED / name / "1", signature, inputs) for name, signature, inputs in asked]
    return [
        {name: np.vectorize(_text)(value).tolist() for name, value in parity.run_here(folder, [call])[0].items()}
        for folder, *call in calls
    ]


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def test_they_do_their_task_on_data_they_have_not_seen():
    reviews = synthetic_reviews(100, seed=SEED)
    stories, phrases = synthetic_stories(40, seed=SEED), synthetic_phrases(60, seed=SEED)
    sentiment, scored, told, translated = here(
        ("sentiment", "serving_default", {"text": [text for text, _ in reviews]}),
        ("story", "score", {"texts": stories}),
        ("story", "serving_default", {"prompts": PROMPTS}),
        ("translate", "serving_default", {"texts": [english for english, _ in phrases]}),
    )
    best = np.argmax(sentiment["scores"], axis=-1)
    assert np.mean(best == [label for _, label in reviews]) > 0.9

    counts = np.asarray(scored["lengths"]) - 1
    assert np.exp(-np.sum(scored["total"]) / np.sum(counts)) < 2.0  # perplexity
    for prompt, text, reason in zip(PROMPTS, told["texts"], told["finish_reasons"]):
        assert text.startswith(prompt) and text.endswith(".") and reason == "stop"

    exact = [found == chinese for found, (_, chinese) in zip(translated["translations"], phrases)]
    assert np.mean(exact) > 0.6


@pytest.mark.parametrize("name", ASKED)
def test_they_are_small_and_nothing_is_wrong_with_them(name):
    files = [file for file in (SHIPPED / name / "1").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LARGEST
    assert lint(SHIPPED / name, run=False).ok
    manifest = json.loads((SHIPPED / name / "1" / "assets.extra" / "tfvllm.json").read_text())
    told = next(step for step in manifest["steps"] if step["step"] == "compress")
    assert told["recipe"]["name"] == name and told["data"]["synthetic"]


@pytest.mark.thorough
def test_a_fresh_process_rest_and_the_c_api_give_the_same_answers():
    asked = [(name, "serving_default", {given: texts}) for name, (given, _, texts) in ASKED.items()]
    alone, together = fresh(*asked), here(*asked)
    models = [ModelConfig(name, SHIPPED / name) for name in ASKED]
    with Server(Options(models, rest_port=0, grpc_port=None, poll_s=0)).in_thread() as server:
        for (name, (given, answer, texts)), expected in zip(ASKED.items(), together):
            assert alone[list(ASKED).index(name)][answer] == expected[answer], name
            request = {"inputs": {given: texts}}
            found = requests.post(f"{server.rest_url}/v1/models/{name}:predict", json=request, timeout=60)
            assert found.json()["outputs"][answer] == expected[answer], name
            served = loader.run(SHIPPED / name / "1", "serving_default", {given: np.array(texts, "S").astype(object)})
            assert np.vectorize(bytes.decode)(served[answer]).tolist() == expected[answer], name
