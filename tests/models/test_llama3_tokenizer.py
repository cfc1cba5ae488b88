"""A file holds the special tokens of a Llama 3 tokenizer."""

import keras
import keras_nlp
import numpy as np
import pytest

import tfvllm
from tfvllm.models.llama3_tokenizer import kept_whole

WORDS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ"]


def tokenizer(**special):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return keras_nlp.models.Llama3Tokenizer(vocabulary, ["a b"], **special)


def model(of):
    backbone = keras_nlp.models.Llama3Backbone(len(WORDS), 1, 2, 8, 8, 1)
    return keras_nlp.models.Llama3CausalLM(backbone, keras_nlp.models.Llama3CausalLMPreprocessor(of, 8))


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_special_tokens_come_back(end, tmp_path):
    made = kept_whole(model(tokenizer(bos_token="<s>", eos_token=end, misc_special_tokens={"<|im_start|>"})))
    made.save(tmp_path / "m.keras")
    found = tfvllm.models.load(tmp_path / "m.keras").preprocessor.tokenizer
    assert (found.start_token, found.end_token, found.end_token_id) == ("<s>", end, WORDS.index(end))
    assert sorted(found.special_tokens) == sorted({"<s>", end, "<|im_start|>"})
    np.testing.assert_array_equal(found("<|im_start|>ab"), [2, 6])


def test_without_it_keras_nlp_forgets_them(tmp_path):
    """Where this fails keras-nlp keeps them by itself, and the class here may go."""
    given = tokenizer(bos_token="<s>", eos_token="</s>", misc_special_tokens=set())
    with pytest.raises(ValueError, match="Llama3Tokenizer"):
        model(given).save(tmp_path / "m.keras")
        keras.saving.load_model(tmp_path / "m.keras")


def test_other_tokenizers_stay_as_they_are():
    preprocessor = keras_nlp.models.GPT2CausalLMPreprocessor(
        keras_nlp.models.GPT2Tokenizer({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, ["a b"])
    )
    backbone = keras_nlp.models.GPT2Backbone(4, 1, 1, 4, 4, max_sequence_length=4)
    kept = kept_whole(keras_nlp.models.GPT2CausalLM(backbone, preprocessor))
    assert type(kept.preprocessor.tokenizer) is keras_nlp.models.GPT2Tokenizer
