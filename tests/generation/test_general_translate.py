"""Sequence to sequence without a reader: keras-nlp's own step in the loop, through SavedModels in a fresh process."""

import numpy as np
import pytest

import tfvllm
from tfvllm.errors import InputError
from tfvllm.families import registry
from tfvllm.savedmodel import manifest, parity

from .general_models import t5gemma, t5gemma2
from .models import bart, build, families, prompts, t5
from .reference import keras_translate, seq2seq_log_probs
from .small_tokenizers import text_options

START, COUNT, ROOM = [2, 5], 6, 20


@pytest.fixture(scope="module", autouse=True)
def no_readers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "READERS", {})
        yield


@pytest.mark.parametrize("make", families((bart, t5, t5gemma, t5gemma2), quick=(t5gemma,), thorough=(bart, t5gemma2)))
def test_greedy_tokens_are_keras_own_in_a_fresh_process(make, tmp_path):
    model = build(make)
    for variable in model.variables if make in (t5gemma, t5gemma2) else ():
        if "embedding" in variable.path:  # tied and scaled: each token would follow itself
            variable.assign(variable * 0.2)
    with pytest.warns(UserWarning, match=r"general path.*and beam search"):
        path = tfvllm.export(
            model, tmp_path / "1", task="translate", max_length=ROOM, start_token_ids=START, warmup=False
        )
    sources = [prompts(lengths) for lengths in ([5], [3, 8, 1], [7, 7])]
    count = {"max_new_tokens": np.int32(COUNT)}
    ids, mask = sources[1]
    targets = np.int32([[2, 5, 9, 4], [2, 5, 11, 0], [2, 5, 3, 3]])
    target_mask = np.int32([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    scored = {"token_ids": ids, "padding_mask": mask, "target_ids": targets, "target_mask": target_mask}
    requests = [("serving_default", {"token_ids": i, "padding_mask": m, **count}) for i, m in sources]
    requests += [
        ("score", scored),
        ("serving_default", {"token_ids": ids[:0], "padding_mask": mask[:0], **count}),
        ("serving_default", {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(ROOM + 5)}),
    ]
    *found, scores, none, most = parity.run_fresh(path, requests)
    different = set()
    for (ids, mask), answer in zip(sources, found):
        expected = keras_translate(model, ids, mask, START, COUNT)
        assert answer["token_ids"].tolist() == expected.tolist()
        different |= set(expected.ravel().tolist())
        assert answer["lengths"].tolist() == [COUNT] * len(ids)
    assert len(different) > 4
    ids, mask = sources[1]
    for row, target in enumerate(targets):
        for place in range(1, target_mask[row].sum()):
            expected = seq2seq_log_probs(model, ids[row][mask[row] > 0], target[:place])[target[place]]
            np.testing.assert_allclose(scores["log_probs"][row, place], expected, atol=1e-3)
    assert none["token_ids"].shape == (0, COUNT)
    assert most["lengths"].tolist() == [ROOM - len(START)] * 3
    document = manifest.read(path)
    assert document["path"] == "general" and document["family"] == type(model.backbone).__name__
    assert set(document["signatures"]) == {"serving_default", "generate", "score"}


@pytest.mark.thorough
def test_text_in_text_out(tmp_path):
    model = build(bart, **text_options("bart"))
    path = tfvllm.export(model, tmp_path / "1", task="translate", max_length=16, max_source_length=16, check="here")
    texts = np.array([b"a quick brown fox", b"", "\u4f60\u597d".encode()], object)
    found = parity.run_fresh(path, [("serving_default", {"texts": texts})])[0]
    assert len(found["translations"]) == 3 and all(text.decode() for text in found["translations"])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"beams": 2}, "beam search needs a reader"),
        ({"precision": "bfloat16"}, "no reader knows T5GemmaBackbone, so that it runs as it is"),
    ],
)
def test_what_needs_a_reader_is_refused(options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        tfvllm.export(
            build(t5gemma), tmp_path / "1", task="translate", max_length=ROOM, start_token_ids=START, **options
        )
    assert not (tmp_path / "1").exists()
