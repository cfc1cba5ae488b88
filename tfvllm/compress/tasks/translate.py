"""`task: translate`: sentence pairs, by BLEU and chrF."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np

from tfvllm import data as text_data
from tfvllm.compress.batches import Tokens
from tfvllm.compress.recipe import TranslateRecipe
from tfvllm.compress.steps import StepResult
from tfvllm.compress.tasks import translate_products
from tfvllm.compress.tasks.base import AnyModel
from tfvllm.compress.tasks.language import LanguageTask, encoded, padded
from tfvllm.compress.vocabulary import learn_byte_pairs
from tfvllm.errors import InputError
from tfvllm.export import translate
from tfvllm.generation.model_generator import positions_of

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class Translate(LanguageTask[TranslateRecipe]):
    """Machine translation."""

    kind, units = "phrases", "pairs"

    @property
    def lengths(self) -> tuple[int, int]:
        """The most tokens of a source and of a translation."""
        block = self.recipe.data
        return block.max_source_length or block.max_length, block.max_length

    def load(self, path: Path, **options: Any) -> text_data.Pairs:
        block = self.recipe.data
        found = text_data.load_pairs(path, source=block.source, target=block.target, **options)
        if not block.swap:
            return found
        turned = {name: text_data.PairSplit(p.targets, p.sources) for name, p in found.splits().items()}
        return text_data.Pairs(turned["train"], turned["dev"], turned.get("test"), found.source, found.notes)

    def scratch(self) -> keras.Model:
        """A BART shape with one vocabulary for both languages."""
        block = self.recipe.teacher
        train = self.text.train
        vocabulary, merges = learn_byte_pairs([*train.sources, *train.targets], block.vocabulary, _SPECIAL)
        tokenizer = keras_nlp.models.BartTokenizer(vocabulary=vocabulary, merges=merges)
        backbone = keras_nlp.models.BartBackbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=block.layers,
            num_heads=block.heads,
            hidden_dim=block.hidden,
            intermediate_dim=block.ffn,
            dropout=block.dropout,
            max_sequence_length=max(self.lengths),
        )
        return self.restored(keras_nlp.models.BartSeq2SeqLM(backbone, self._bart_preprocessor(tokenizer)))

    def _bart_preprocessor(self, tokenizer: Any) -> Any:
        source, target = self.lengths
        return keras_nlp.models.BartSeq2SeqLMPreprocessor(
            tokenizer, encoder_sequence_length=source, decoder_sequence_length=target
        )

    def restored(self, model: keras.Model) -> keras.Model:
        """keras-nlp saves no lengths with the preprocessor: they are the recipe's."""
        preprocessor: Any = model.preprocessor
        source, target = self.lengths
        if (preprocessor.encoder_sequence_length, preprocessor.decoder_sequence_length) != (source, target):
            preprocessor.encoder_sequence_length, preprocessor.decoder_sequence_length = source, target
            if preprocessor.built:
                preprocessor.build(None)
        return model

    def settings_of(self, model: keras.Model) -> dict[str, Any]:
        settings = translate.settings(model.preprocessor, (None, None), self.lengths[1], self.lengths[0])
        return {**settings, "end_ids": tuple(settings["stop_ids"][:1])}

    def adopt(self, teacher: keras.Model) -> None:
        super().adopt(teacher)
        longest = positions_of(teacher)
        for name, asked in zip(("max_source_length", "max_length"), self.lengths):
            if longest is not None and asked > longest:
                raise InputError(
                    f"data.{name}: expected at most {longest} tokens, as the teacher has positions for, found {asked}."
                )

    def rows_of(self, split: str, settings: Mapping[str, Any]) -> Tokens:
        pairs = getattr(self.text, split)
        return self._rows(pairs.sources, pairs.targets, settings)

    def _rows(self, sources: Sequence[str], targets: Sequence[str], settings: Mapping[str, Any]) -> Tokens:
        """A pair a row: the source as an export reads it; the target after what a decoder starts from."""
        longest, length = self.lengths
        codec, pad_id = settings["codec"], settings["pad_id"]
        before, after = list(settings["source_start_ids"]), list(settings["source_end_ids"])
        start, end = list(settings["start_ids"]), list(settings["end_ids"])
        room = longest - len(before) - len(after)
        read = [[*before, *tokens[:room], *after] for tokens in encoded(codec, sources)]
        most = length + 1 - len(start) - len(end)
        rows = [[*start, *tokens[:most], *end] for tokens in encoded(codec, targets)]
        source_lengths, lengths = (np.asarray([len(row) - cut for row in part]) for part, cut in ((read, 0), (rows, 1)))
        real = np.arange(length) < lengths[:, None]
        features = {
            "encoder_token_ids": padded(read, pad_id, longest),
            "encoder_padding_mask": (np.arange(longest) < source_lengths[:, None]).astype("int32"),
            "decoder_token_ids": padded([row[:-1] for row in rows], pad_id, length),
            "decoder_padding_mask": real.astype("int32"),
        }
        labels = padded([row[1:] for row in rows], 0, length)
        weights = (real & (np.arange(length) >= len(start) - 1)).astype("float32")
        return Tokens(features, lengths, labels, weights=weights, sources=source_lengths)

    def taught(self, objective: Any, teacher: StepResult, model_of: AnyModel) -> Tokens:
        """The references, or what the teacher itself makes of the sources (Kim and Rush 2016, arXiv:1606.07947)."""
        if objective.targets == "references":
            return self.rows("train")
        beams, sources = objective.beams, self.text.train.sources

        def build(directory: Path, work: Path) -> dict[str, Any]:
            from tfvllm.distillation import write_targets
            from tfvllm.rollouts import Answers

            model = model_of(teacher)
            answer = Answers(model, beams=beams, max_length=self.lengths[1])
            with self.console.progress("teacher's translations", len(sources)) as progress:
                done = 0

                def counted(texts: list[str]) -> list[str]:
                    nonlocal done
                    found = answer(texts)
                    done += len(texts)
                    progress.at(done)
                    return found

                # In the work folder first: a batch that is written stays written, whatever ends this run.
                written = write_targets(
                    *(model, sources, work / "targets.jsonl"),
                    beams=beams,
                    max_length=self.lengths[1],
                    batch_size=64,
                    generate=counted,
                )
            written.replace(directory / "targets.jsonl")
            return {"beams": beams, "sources": len(sources)}

        done = self.workspace.do("teacher-translations", {"beams": beams, "lengths": self.lengths}, [teacher], build)
        lines = (done.directory / "targets.jsonl").read_text(encoding="utf-8").split("\n")[1:-1]
        return self._rows(sources, [_target(line) for line in lines], self.settings)

    def prompt_length(self, x: Any, y: Any, sample_weight: Any) -> np.ndarray:
        """What a decoder starts from: all else is the student's."""
        return np.full(len(sample_weight), len(self.settings["start_ids"]))

    def learnt_bytes(self, split: str) -> int:
        return sum(len(target.encode()) for target in getattr(self.text, split).targets)

    def scores(self, model: keras.Model) -> dict[str, float]:
        """Perplexity, and BLEU and chrF (sacrebleu) of greedy translations."""
        from tfvllm.rollouts import Answers

        answer, found = Answers(model, max_length=self.lengths[1]), super().scores(model)
        for split in ("dev", "test"):
            if self.has(split):
                pairs = getattr(self.text, split)
                translations = translate_products.in_batches(answer, pairs.sources)
                for name, value in translate_products.quality(translations, pairs.targets).items():
                    if name != "signatures":
                        found[f"{split}_{name}"] = value
        return found

    def shown(self, result: Mapping[str, Any]) -> list[str]:
        return super().shown(result) + [
            f"{split} BLEU {result[f'{split}_bleu']:.2f}" for split in ("dev", "test") if f"{split}_bleu" in result
        ]

    def export_options(self) -> dict[str, Any]:
        block = self.recipe.export
        return {
            "max_length": self.lengths[1],
            "max_source_length": self.lengths[0],
            "beams": block.beams,
            "length_penalty": block.length_penalty,
            "precision": block.precision,
            "target": block.target,
        }

    def benchmark(
        self, products: Sequence[tuple[str, StepResult]], teacher: StepResult, model_of: AnyModel
    ) -> StepResult:
        return translate_products.benchmark(
            self.recipe, self.workspace, self.text, self.settings["codec"], products, teacher, model_of
        )


def _target(line: str) -> str:
    return json.loads(line)["target"]
