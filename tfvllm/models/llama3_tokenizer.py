"""Llama 3's tokenizer, whose special tokens a file holds."""

from typing import Any

import keras
import keras_nlp


@keras.saving.register_keras_serializable(package="tfvllm", name="Llama3Tokenizer")
class Llama3Tokenizer(keras_nlp.models.Llama3Tokenizer):
    """keras-nlp's, which leaves its special tokens out of its config: SmolLM2's came back with those of Llama 3."""

    def __init__(self, *args: Any, misc_special_tokens: Any = (), **kwargs: Any):
        # keras-nlp takes tokens out of the very set that it is given.
        super().__init__(*args, misc_special_tokens=set(misc_special_tokens), **kwargs)

    def get_config(self) -> dict[str, Any]:
        start, end = self.start_token, self.end_token
        other = sorted(set(self.special_tokens) - {start, end, getattr(self, "end_token2", end)})
        return {**super().get_config(), "bos_token": start, "eos_token": end, "misc_special_tokens": other}


def kept_whole(model: Any) -> Any:
    """The same model, whose tokenizer, where it is Llama 3's, is one that a file holds whole."""
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if type(tokenizer) is keras_nlp.models.Llama3Tokenizer:
        tokenizer.__class__ = Llama3Tokenizer  # nothing else differs
    return model
