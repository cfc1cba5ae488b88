"""A causal language model of any family as the functions that its SavedModel serves, by the model's own step."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.generation import model_step
from tfvllm.generation.generator import Generator
from tfvllm.generation.loop import Result
from tfvllm.generation.text import GraphTokenizer
from tfvllm.savedmodel.write import weights_module

TEXT = {"token_ids", "padding_mask"}  # what a model of text alone reads


class ModelGenerator(Generator):
    """Generates by the general path: see `tfvllm.generation.model_step`.

    Its caches are the model's own business: they are not handed out, so that there is neither `prefill` nor `decode`.

    Args:
        model: a keras-nlp `CausalLM` that `refuse_more_than_text` lets pass. It stays as it is.
        fixed: whether rows are always `max_length` long, for a model that must know how long they are.
        codec, max_length, start_ids, stop_ids, pad_id: as for `Generator`.
    """

    def __init__(
        self,
        model: Any,
        *,
        fixed: bool = False,
        codec: GraphTokenizer | None = None,
        max_length: int | None = None,
        start_ids: tuple[int, ...] = (),
        stop_ids: tuple[int, ...] = (),
        pad_id: int = 0,
    ):
        tf.Module.__init__(self, name="generator")
        self.weights = weights_module(model)
        object.__setattr__(self, "_model", model)  # past tf.Module, which would save the Keras model
        self.vocabulary_size = model.backbone.vocabulary_size
        self._hold(codec, (max_length, positions_of(model)), start_ids, stop_ids, pad_id)
        self.fixed = fixed

    def _decoded(self, *prompts, **options) -> Result:
        return model_step.generate(self._model, *prompts, fixed=self.fixed, **options)

    def step_error(self, steps: int = 3) -> float:
        """How far log-probabilities of greedy tokens by the step, traced as it is stored, lie from the model's own.

        The own ones are those of the model's forward pass over the same tokens. One row, the largest difference.
        """
        ids, lengths = tf.constant([[1, 2]]), tf.constant([2])
        every, known = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)

        def run(ids, lengths):  # whatever would end a row
            found = self._decoded(ids, lengths, tf.constant(steps), max_length=self.max_length, log_probs=True)
            return found.token_ids, found.log_probs

        tokens, scores = tf.function(run, input_signature=[every, known], autograph=False)(ids, lengths)
        own = self.score(tf.concat([ids, tokens], axis=1), lengths + steps)["log_probs"][:, 2:]
        return float(tf.reduce_max(tf.abs(own - scores)))

    def _scores_of(self, targets, ids, lengths, context) -> tf.Tensor:
        if self.fixed:
            length = tf.shape(ids)[1]
            room = [[0, 0], [0, self.max_length - length]]
            ids, targets = (tf.ensure_shape(tf.pad(part, room), [None, self.max_length]) for part in (ids, targets))
        mask = tf.sequence_mask(lengths, tf.shape(ids)[1])
        logits = self._model({"token_ids": ids * tf.cast(mask, ids.dtype), "padding_mask": mask}, training=False)
        logits = tf.cast(logits, tf.float32)
        scores = -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
        return scores[:, :length] if self.fixed else scores


def refuse_more_than_text(model: Any) -> None:
    """Raises InputError for a model that needs images or sound beside tokens, or that is no keras-nlp `CausalLM`."""
    kind = type(model).__name__
    inputs = getattr(model, "input", None)
    if not (hasattr(model, "generate_step") and hasattr(model, "sampler") and isinstance(inputs, dict)):
        raise InputError(f"cannot generate with {kind}; expected a keras-nlp CausalLM.")
    if any(name.startswith("encoder_") for name in inputs):
        raise InputError(f"{kind} is sequence to sequence and no reader knows it; expected a causal LM.")
    more = sorted(set(inputs) - TEXT)
    if more:
        raise InputError(
            f"{kind} reads {', '.join(more)} beside text; expected a model of text alone. Build its backbone without "
            "them, where it can be."
        )


def positions_of(model: Any) -> int | None:
    """How many positions a model has, where it says so."""
    said = (getattr(model.backbone, name, None) for name in ("max_sequence_length", "max_position_embeddings"))
    return next((int(value) for value in said if isinstance(value, int)), None)
