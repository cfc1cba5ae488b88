"""A language model of any family as the functions that its SavedModel serves, by the model's own step."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.generation import model_step
from tfvllm.generation.generator import Generator
from tfvllm.generation.loop import Result
from tfvllm.generation.translator import Translator
from tfvllm.savedmodel.write import weights_module

# What a model of text alone may read, by the class of the task.
TEXT = {
    "CausalLM": {"token_ids", "padding_mask", "position_ids"},
    "Seq2SeqLM": {f"{side}_{name}" for side in ("encoder", "decoder") for name in ("token_ids", "padding_mask")},
}


class _OwnStep(Generator):
    """Goes the general path: see `tfvllm.generation.model_step`.

    Its caches are the model's own business: they are not handed out, so that there is neither `prefill` nor `decode`.
    """

    def _take(self, model: Any, fixed: bool, cached: bool) -> None:
        tf.Module.__init__(self, name="generator")
        self.weights = weights_module(model)
        object.__setattr__(self, "_model", model)  # past tf.Module, which would save the Keras model
        self.vocabulary_size = int(model.output.shape[-1])
        self.fixed, self.cached = fixed, cached

    def _decoded(self, *prompts, **options) -> Result:
        return model_step.generate(self._model, *prompts, fixed=self.fixed, cached=self.cached, **options)

    def _probe(self) -> tuple[list[int], Any]:
        """A prompt, and what goes with it as `context`."""
        return [1, 2], None

    def step_error(self, steps: int = 3) -> float:
        """How far log-probabilities of greedy tokens by the step, traced as it is stored, lie from the model's own.

        The own ones are those of the model's forward pass over the same tokens. One row, the largest difference.
        """
        prompt, context = self._probe()
        ids, lengths = tf.constant([prompt], tf.int32), tf.constant([len(prompt)])
        every, known = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)
        sources = [] if context is None else [every, tf.TensorSpec([None, None], tf.bool)]

        def run(ids, lengths, *source):  # whatever would end a row
            options = {"max_length": self.max_length, "log_probs": True, "context": source or None}
            found = self._decoded(ids, lengths, tf.constant(steps), **options)
            return found.token_ids, found.log_probs

        traced = tf.function(run, input_signature=[every, known, *sources], autograph=False)
        tokens, scores = traced(ids, lengths, *context or ())
        own = Generator.score(self, tf.concat([ids, tokens], axis=1), lengths + steps, context)
        return float(tf.reduce_max(tf.abs(own["log_probs"][:, len(prompt) :] - scores)))

    def _scores_of(self, targets, ids, lengths, context) -> tf.Tensor:
        length = tf.shape(ids)[1]
        if self.fixed:
            room = [[0, 0], [0, self.max_length - length]]
            ids, targets = (tf.ensure_shape(tf.pad(part, room), [None, self.max_length]) for part in (ids, targets))
        inputs = model_step.model_inputs(self._model, ids, tf.sequence_mask(lengths, tf.shape(ids)[1]), context)
        logits = tf.cast(self._model(inputs, training=False), tf.float32)
        scores = -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
        return scores[:, :length]


class ModelGenerator(_OwnStep):
    """A causal language model by its own step.

    Args:
        model: a keras-nlp `CausalLM` that `refuse_more_than_text` lets pass. It stays as it is.
        fixed: whether rows are always `max_length` long, for a model that must know how long they are.
        cached: whether tokens come by the model's own step; else each by a forward pass.
        codec, max_length, start_ids, stop_ids, pad_id: as for `Generator`.
    """

    def __init__(
        self, model, *, fixed=False, cached=True, codec=None, max_length=None, start_ids=(), stop_ids=(), pad_id=0
    ):
        self._take(model, fixed, cached)
        self._hold(codec, (max_length, positions_of(model)), start_ids, stop_ids, pad_id)


class ModelTranslator(_OwnStep, Translator):
    """A sequence-to-sequence model by its own step. There is no beam search.

    Args:
        model: a keras-nlp `Seq2SeqLM` that `refuse_more_than_text` lets pass. It stays as it is.
        fixed: whether decoder rows are always `max_length` long.
        cached: as for `ModelGenerator`.
        max_source_length, source_start_ids, source_end_ids: as for `Translator`.
        codec, max_length, start_ids, stop_ids, pad_id: as for `Generator`.
    """

    def __init__(
        self,
        model,
        *,
        fixed=False,
        cached=True,
        max_source_length=None,
        source_start_ids=(),
        source_end_ids=(),
        codec=None,
        max_length=None,
        start_ids=(),
        stop_ids=(),
        pad_id=0,
    ):
        self._take(model, fixed, cached)
        self._hold(codec, (max_length, positions_of(model)), start_ids, stop_ids, pad_id)
        self._hold_sources((max_source_length, positions_of(model)), source_start_ids, source_end_ids)

    def _probe(self):
        return list(self.start_ids), (tf.constant([[3, 1, 2]]), tf.constant([[True] * 3]))

    def _encoded(self, ids, padding_mask):
        return ids, padding_mask  # the step encodes them


def refuse_more_than_text(model: Any, kind: str) -> None:
    """Raises InputError for a model that needs images or sound beside tokens, or that is no keras-nlp `kind`."""
    name, inputs = type(model).__name__, model_step.input_names(model)
    if not (hasattr(model, "generate_step") and hasattr(model, "sampler") and inputs):
        raise InputError(f"cannot generate with {name}; expected a keras-nlp {kind}.")
    two_stacks = any(side.startswith("encoder_") for side in inputs)
    if two_stacks and kind == "CausalLM":
        raise InputError(f"{name} is sequence to sequence; expected a causal LM. Use task='translate'.")
    if not two_stacks and kind == "Seq2SeqLM":
        raise InputError(f"{name} has no encoder; expected a Seq2SeqLM. Use task='generate'.")
    more = sorted(set(inputs) - TEXT[kind])
    if more:
        raise InputError(
            f"{name} reads {', '.join(more)} beside text; expected a model of text alone. Build its backbone without "
            "them, where it can be."
        )


def positions_of(model: Any) -> int | None:
    """How many positions a model has, where it says so."""
    said = (getattr(model.backbone, name, None) for name in ("max_sequence_length", "max_position_embeddings"))
    return next((int(value) for value in said if isinstance(value, int)), None)
