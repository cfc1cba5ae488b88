"""`task: generate`: texts, by perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np

from tfvllm import data as text_data
from tfvllm.compress.batches import Tokens
from tfvllm.compress.recipe import GenerateRecipe
from tfvllm.compress.steps import StepResult
from tfvllm.compress.tasks import generate_products
from tfvllm.compress.tasks.base import AnyModel
from tfvllm.compress.tasks.language import LanguageTask, encoded, padded
from tfvllm.compress.vocabulary import learn_byte_pairs
from tfvllm.errors import InputError
from tfvllm.export import generate

_END = "<|endoftext|>"


class Generate(LanguageTask[GenerateRecipe]):
    """Text generation."""

    kind, units = "stories", "texts"

    def load(self, path: Path, **options: Any) -> text_data.Texts:
        return text_data.load_texts(path, **options)

    @property
    def _longest(self) -> int:
        """Positions of a teacher from scratch: what is exported may be longer than what is trained on."""
        export = self.recipe.export
        return max(self.recipe.data.max_length, (export and export.max_length) or 0)

    def shape(self) -> dict[str, Any]:
        return {**super().shape(), "positions": self._longest}

    def scratch(self) -> keras.Model:
        """A GPT-2 shape."""
        block = self.recipe.teacher
        texts = (f"{document.prompt}{document.text}" for document in self.text.train)
        vocabulary, merges = learn_byte_pairs(texts, block.vocabulary - 1, [])
        vocabulary[_END] = len(vocabulary)  # the last, as GPT-2's: keras-nlp pads with 0 and would stop at it
        tokenizer = keras_nlp.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
        longest = self._longest
        backbone = keras_nlp.models.GPT2Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=block.layers,
            num_heads=block.heads,
            hidden_dim=block.hidden,
            intermediate_dim=block.ffn,
            dropout=block.dropout,
            max_sequence_length=longest,
        )
        preprocessor = keras_nlp.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=longest)
        return keras_nlp.models.GPT2CausalLM(backbone, preprocessor)

    def settings_of(self, model: keras.Model) -> dict[str, Any]:
        settings = generate.settings(model.preprocessor, None, None)
        return {**settings, "end_ids": tuple(settings["stop_ids"][:1])}

    def adopt(self, teacher: keras.Model) -> None:
        super().adopt(teacher)
        longest, data = generate.positions_of(teacher), self.recipe.data.max_length
        if longest is not None and self._longest > longest:
            raise InputError(
                f"{'data' if data > longest else 'export'}.max_length: expected at most {longest} tokens, as the "
                f"teacher has positions for, found {self._longest if data <= longest else data}."
            )

    def rows_of(self, split: str, settings: Mapping[str, Any]) -> Tokens:
        """A document a row, its end token with it; longer ones in several. Of a prompt only the completion counts."""
        length, documents = self.recipe.data.max_length, getattr(self.text, split)
        start, end = list(settings["start_ids"]), list(settings["end_ids"])
        texts, prompts = _tokens(documents, settings["codec"])
        rows, given = [], []
        for text, prompt, document in zip(texts, prompts, documents, strict=True):
            if document.prompt:
                # As an export reads it: what does not fit of a prompt loses its beginning; half of the row is its own.
                room = length + 1 - len(start) - min(len(text) + len(end), length // 2)
                row = [*start, *prompt[max(len(prompt) - room, 0) :]]
                given.append(len(row))
                rows.append([*row, *text, *end][: length + 1])
                continue
            whole = [*start, *text, *end]
            for at in range(0, max(len(whole) - 1, 1), length):
                rows.append(whole[at : at + length + 1])
                given.append(1)
        keep = [i for i, row in enumerate(rows) if len(row) > given[i]]
        rows, firsts = [rows[i] for i in keep], np.asarray([given[i] for i in keep])
        if not rows:
            raise InputError(f"{self.text.source}: expected texts of at least two tokens in {split}, found none.")
        lengths = np.asarray([len(row) - 1 for row in rows])
        ids = padded([row[:-1] for row in rows], settings["pad_id"], length)
        labels = padded([row[1:] for row in rows], 0, length)
        real = np.arange(length) < lengths[:, None]
        learnt = real & (np.arange(length) >= firsts[:, None] - 1)
        features = {"token_ids": ids, "padding_mask": real.astype("int32")}
        return Tokens(features, lengths, labels, weights=learnt.astype("float32"))

    def prompt_length(self, x: Any, y: Any, sample_weight: Any) -> np.ndarray:
        """The prompt, or a third of a text that has none."""
        prompts = (np.cumsum(sample_weight > 0, axis=1) == 0).sum(axis=1) + 1
        lengths = np.asarray(x["padding_mask"]).sum(axis=1)
        return np.where(prompts > 1, prompts, np.maximum(lengths // 3, 1))

    def learnt_bytes(self, split: str) -> int:
        return self.text.num_bytes()[split]

    def export_options(self) -> dict[str, Any]:
        block = self.recipe.export
        return {
            "max_length": block.max_length or self.recipe.data.max_length,
            "max_new_tokens": min(block.max_new_tokens, (block.max_length or self.recipe.data.max_length) - 1),
            "precision": block.precision,
            "target": block.target,
        }

    def benchmark(
        self, products: Sequence[tuple[str, StepResult]], teacher: StepResult, model_of: AnyModel
    ) -> StepResult:
        return generate_products.benchmark(
            self.recipe, self.workspace, self.text, self.settings["codec"], products, teacher, model_of
        )


def _tokens(documents: Sequence[text_data.Document], codec: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of the texts and of the prompts.

    A text is read as it goes on from its prompt, where the prompt's tokens stay what they are by themselves:
    SentencePiece would begin it with a space of its own.
    """
    prompts = encoded(codec, [document.prompt for document in documents])
    texts = encoded(codec, [document.text for document in documents])
    rows = [at for at, document in enumerate(documents) if document.prompt]
    whole = encoded(codec, [documents[at].prompt + documents[at].text for at in rows])
    for at, tokens in zip(rows, whole, strict=True):
        size = len(prompts[at])
        if tokens[:size] == prompts[at]:
            texts[at] = tokens[size:]
    return texts, prompts
