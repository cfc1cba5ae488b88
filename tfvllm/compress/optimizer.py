"""AdamW as the recipe trains with it."""

from __future__ import annotations

import keras
import tensorflow as tf

COMPILED_FROM = 300  # steps


@keras.saving.register_keras_serializable(package="tfvllm")
class CompiledAdamW(keras.optimizers.AdamW):
    """Keras's AdamW with the whole update compiled by XLA: one pass over each variable instead of a dozen.

    Updates are Keras's up to rounding. Gradients of embeddings are made dense, as AdamW updates every row anyway; the
    global norm is then that of the gradient, where Keras takes a row that comes twice for two.
    """

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, as `keras.optimizers.Optimizer.apply`."""
        if tf.executing_eagerly():  # `run_eagerly`: it would be compiled anew at every step
            return super().apply(grads, trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        grads = [None if grad is None else tf.convert_to_tensor(grad) for grad in grads]
        if not self.built:  # makes variables, which a compiled function may not
            self.build(variables)
        update = super().apply
        return tf.function(lambda found: update(found, variables), jit_compile=True, autograph=False)(grads)


def adamw(learning_rate: float, steps: int, warmup: float, weight_decay: float) -> keras.optimizers.Optimizer:
    """AdamW with linear warm-up and cosine decay to zero over `steps`; biases and norms are not decayed."""
    rising = max(1, round(steps * warmup))
    # Compiling takes as long as it saves in some hundred steps.
    optimizer = (CompiledAdamW if steps >= COMPILED_FROM else keras.optimizers.AdamW)(
        keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - rising), warmup_target=learning_rate, warmup_steps=rising
        ),
        weight_decay=weight_decay,
        global_clipnorm=1.0,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
