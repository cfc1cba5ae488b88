"""Sampled text over REST: a seed decides it, whoever else asks at the same time."""

import threading

import pytest
import requests

import tfvllm
from tests.generation.models import build
from tests.generation.test_export import tokenizer
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server

PROMPTS = ["a quick fox", "", "quick a quick"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    import keras_nlp

    models = keras_nlp.models
    tokens = tokenizer()
    backbone = models.GPT2Backbone(tokens.vocabulary_size(), 1, 2, 16, 32, max_sequence_length=48)
    model = build(lambda: models.GPT2CausalLM(backbone, models.GPT2CausalLMPreprocessor(tokens, sequence_length=32)))
    base = tmp_path_factory.mktemp("story")
    tfvllm.export(model, base / "story" / "1", task="generate", max_new_tokens=12)
    with Server(Options([ModelConfig("story", base / "story")], rest_port=0, poll_s=0)).in_thread() as server:
        yield f"{server.rest_url}/v1/models/story:predict"


def ask(url, seed, prompts=PROMPTS, **more):
    inputs = {"prompts": prompts, "max_new_tokens": 8, "temperature": 1.0, "seed": seed, **more}
    answer = requests.post(url, json={"signature_name": "generate", "inputs": inputs}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]["texts"]


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_text(url):
    first = ask(url, 5)
    assert ask(url, 5) == first
    others = {tuple(ask(url, seed)) for seed in (6, 7, 8)}
    assert len(others | {tuple(first)}) == 4
    assert ask(url, 1, temperature=0.0) == ask(url, 2, temperature=0.0)  # greedy: no seed plays a part


@pytest.mark.thorough
def test_others_at_the_same_time_change_nothing(url):
    wanted = {seed: ask(url, seed) for seed in range(4)}
    found, failures = {}, []

    def client(seed):
        try:
            found[seed] = [ask(url, seed) for _ in range(3)]
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert found == {seed: [texts] * 3 for seed, texts in wanted.items()}
