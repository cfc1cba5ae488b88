"""Small models trained on real text: sense comes out, through the C API and over REST too; what bfloat16 costs."""

import collections
import contextlib
import gzip
import json
import urllib.request

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.capi.loader import run
from tfvllm.errors import InputError
from tfvllm.graph import probes

from .byte_pairs import learn

M = keras_nlp.models
pytestmark = [pytest.mark.slow, pytest.mark.data]


@contextlib.contextmanager
def served(name, directory):
    """The URL of a server that holds one model."""
    from tfvllm.serving.manager import ModelConfig
    from tfvllm.serving.server import Options, Server

    options = Options([ModelConfig(name, directory)], rest_port=0, grpc_port=None, poll_s=0)
    with Server(options).in_thread() as server:
        yield f"{server.rest_url}/v1/models/{name}:predict"


def ask(url, signature, **inputs):
    body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
        return json.loads(answer.read())["outputs"]


def as_bytes(texts):
    return np.array([text.encode() for text in texts], object)


def adam(steps, rate):
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=rate, warmup_steps=steps // 10)
    return keras.optimizers.Adam(schedule, clipnorm=1.0)


# A language model -----------------------------------------------------------------------------------------------------

LENGTH = 64


@pytest.fixture
def shakespeare(data_dir):
    """A GPT-2 of 1.1 million parameters trained on tiny Shakespeare, and text it has not seen."""
    text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    vocabulary, merges = learn([train], 768, ("<pad>", "<|endoftext|>"))
    tokens = M.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    ids = np.asarray(tokens(train), np.int32)
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    keras.utils.set_random_seed(3)
    backbone = M.GPT2Backbone(len(vocabulary), 4, 4, 128, 512, dropout=0.0, max_sequence_length=2 * LENGTH)
    model = M.GPT2CausalLM(backbone, M.GPT2CausalLMPreprocessor(tokens, sequence_length=2 * LENGTH))
    bare = M.GPT2CausalLM(backbone)
    epochs, batch = 2, 16
    bare.compile(
        optimizer=adam(epochs * len(rows) // batch, 3e-3), loss=keras.losses.SparseCategoricalCrossentropy(True)
    )
    features = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}
    bare.fit(features, rows[:, 1:], batch_size=batch, epochs=epochs, verbose=0)
    return model, held_out


def test_language_model_on_tiny_shakespeare(shakespeare, tmp_path):
    model, held_out = shakespeare
    variants = {"float32": {}, "bfloat16": {"precision": "bfloat16", "target": "portable"}}
    with contextlib.suppress(InputError):  # without AVX-512 the portable one has to do
        probes.check_runs("onednn", "bfloat16")
        variants["bfloat16 by oneDNN"] = {"precision": "bfloat16", "target": "onednn"}
    paths = {
        name: tfvllm.export(model, tmp_path / name / "1", task="generate", max_new_tokens=24, warmup=False, **options)
        for name, options in variants.items()
    }
    signatures = {name: tf.saved_model.load(str(path)).signatures for name, path in paths.items()}

    # What bfloat16 costs, on text the model has not seen.
    speeches = [speech for speech in held_out.split("\n\n") if 80 < len(speech) < 200][:128]
    perplexity = {}
    for name, signature in signatures.items():
        scores = signature["score"](texts=tf.constant(speeches))
        count = (scores["lengths"].numpy() - 1).sum()
        perplexity[name] = float(np.exp(-scores["total"].numpy().sum() / count))
    print("perplexity", perplexity)
    assert perplexity["float32"] < 150.0  # of 1026 tokens, after two epochs
    for name in variants:
        assert abs(perplexity[name] / perplexity["float32"] - 1.0) < 0.005, name

    # keras-nlp's own answers, and the same from everywhere.
    prompts = ["KING RICHARD:\nWhat ", "First Citizen:\n", "\nO "]
    found = signatures["float32"]["serving_default"](prompts=tf.constant(prompts))
    texts = [text.decode() for text in found["texts"].numpy()]
    print(texts)
    model.compile(sampler="greedy")
    own = model.generate(prompts, max_length=2 * LENGTH)
    for text, expected, prompt in zip(texts, own, prompts):
        assert text.startswith(prompt)
        assert expected.startswith(text)
        assert sum(letter.isalpha() or letter in " \n,.':;!?-" for letter in text) == len(text)
    answer = run(paths["float32"], "serving_default", {"prompts": as_bytes(prompts)})
    assert [text.decode() for text in answer["texts"]] == texts
    with served("story", tmp_path / "float32") as url:
        assert ask(url, "serving_default", prompts=prompts)["texts"] == texts
        cut = ask(url, "generate", prompts=prompts[:1], max_new_tokens=24, stop_strings=["\n"], temperature=0.0)
        assert cut["completions"] == [texts[0].removeprefix(prompts[0]).split("\n")[0]]
        # Streaming: the caller holds the caches.
        state = ask(url, "prefill", prompts=prompts[:1], max_new_tokens=4)
        pieces = [state["token_ids"][0]]
        for _ in range(3):
            caches = {name: value for name, value in state.items() if name.startswith(("key_", "value_"))}
            state = ask(url, "decode", token_ids=state["token_ids"], positions=state["positions"], **caches)
            pieces.append(state["token_ids"][0])
    assert texts[0].startswith(prompts[0] + model.preprocessor.tokenizer.detokenize(pieces))


# Translation ----------------------------------------------------------------------------------------------------------


def multi30k(folder):
    """(German, English) pairs to train on and to test on."""

    def lines(name):
        return gzip.decompress((folder / "multi30k" / name).read_bytes()).decode().split("\n")[:-1]

    return [
        list(zip(lines(f"{part}.de.gz"), lines(f"{part}.en.gz")))[:count]
        for part, count in (("train", 16000), ("test_2016_flickr", 200))
    ]


def tatoeba(folder):
    """(Chinese, English) pairs; no sentence of the test occurs in training on either side."""
    text = gzip.decompress((folder / "tatoeba_zh_en" / "cmn.txt.gz").read_bytes()).decode()
    pairs = [tuple(line.split("\t")[1::-1]) for line in text.split("\n") if line]
    pairs = [pair for pair in pairs if len(pair[1].split()) > 3]
    random = np.random.default_rng(0)
    test = [pairs[i] for i in random.permutation(len(pairs))[:200]]
    known = {sentence for pair in test for sentence in pair}
    train = [pair for pair in pairs if not known & set(pair)]
    return [train[i] for i in random.permutation(len(train))[:16000]], test


@pytest.mark.parametrize(("read", "least"), [(multi30k, 20.0), (tatoeba, 10.0)], ids=["de-en", "zh-en"])
def test_translation(read, least, data_dir, tmp_path):
    import sacrebleu

    train, test = read(data_dir)
    vocabulary, merges = learn([side for pair in train for side in pair], 2000, ("<s>", "<pad>", "</s>"))
    tokens = M.BartTokenizer(vocabulary=vocabulary, merges=merges)
    length = 32
    preprocessor = M.BartSeq2SeqLMPreprocessor(tokens, encoder_sequence_length=length, decoder_sequence_length=length)
    keras.utils.set_random_seed(3)
    backbone = M.BartBackbone(len(vocabulary), 2, 4, 128, 512, dropout=0.0, max_sequence_length=length)
    model = M.BartSeq2SeqLM(backbone, preprocessor)
    bare = M.BartSeq2SeqLM(backbone)
    sources, targets = (list(side) for side in zip(*train))
    features, labels, weights = preprocessor({"encoder_text": sources, "decoder_text": targets})
    epochs, batch = 8, 64
    bare.compile(
        optimizer=adam(epochs * len(train) // batch, 1.5e-3), loss=keras.losses.SparseCategoricalCrossentropy(True)
    )
    numpy = {name: np.asarray(value) for name, value in features.items()}
    bare.fit(numpy, np.asarray(labels), sample_weight=np.asarray(weights), batch_size=batch, epochs=epochs, verbose=0)

    path = tfvllm.export(model, tmp_path / "t" / "1", task="translate", beams=3, warmup=False)
    signatures = tf.saved_model.load(str(path)).signatures
    texts, references = (list(side) for side in zip(*test))
    beam = [text.decode() for text in signatures["serving_default"](texts=tf.constant(texts))["translations"].numpy()]
    found = signatures["generate"](texts=tf.constant(texts), **neutral(length))
    greedy = [text.decode() for text in found["translations"].numpy()]
    scores = {
        name: sacrebleu.corpus_bleu(got, [references]).score for name, got in (("greedy", greedy), ("beam", beam))
    }
    print(scores, list(zip(texts, references, beam))[:6])
    assert scores["beam"] > least and scores["greedy"] > least - 1.0
    assert len(set(beam)) > 150
    assert collections.Counter(found["finish_reasons"].numpy())[b"stop"] > 150

    few = texts[:5]
    model.compile(sampler="greedy")
    assert [text.strip() for text in model.generate(few)] == [text.strip() for text in greedy[:5]]
    answer = run(path, "serving_default", {"texts": as_bytes(few)})
    assert [text.decode() for text in answer["translations"]] == beam[:5]
    with served("translate", tmp_path / "t") as url:
        assert ask(url, "serving_default", texts=few)["translations"] == beam[:5]


def neutral(count):
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram": 0, "seed": 0}
    return {name: tf.constant(value) for name, value in {**values, "max_new_tokens": count}.items()}
