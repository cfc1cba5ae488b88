"""A function of each row of large logits, a few rows at a time, forwards and backwards."""

from collections.abc import Callable

import tensorflow as tf

CHUNK = 2**22  # logits at a time: 16 MB in float32 for each temporary of a loss
SMALL = 4096  # classes up to which all rows at once cost little


def over_rows(
    function: Callable[..., tf.Tensor], student: tf.Tensor, *teacher: tf.Tensor, chunk: int = CHUNK, small: int = SMALL
) -> tf.Tensor:
    """`function(student, *teacher)` where every row stands for itself, with temporaries of about `chunk` numbers.

    The temporaries of a divergence (log-probabilities, probabilities, their gradients) are several times the size of
    the logits. Here they exist for a few rows at a time; the backward pass computes each chunk again. What remains is
    the student's logits and their gradient.

    Args:
        function: of student rows [n, classes] and teacher rows [n, ...], returns float32 [n].
        student: [..., classes]; the only argument with a gradient.
        teacher: tensors [..., anything] with the student's leading axes.
        chunk: numbers in the student's rows of one chunk.
        small: with this many classes or fewer, all rows are computed at once.
    Returns:
        Float32 [...].
    """
    classes = student.shape[-1]
    lead = tf.shape(student)[:-1]
    known = student.shape[:-1]
    axes = student.shape.rank - 1
    flat = tf.reshape(student, [-1, classes])
    rows = [tf.reshape(t, [-1, *t.shape[axes:]]) for t in map(tf.stop_gradient, teacher)]
    if classes <= small:
        values = function(flat, *rows)
    else:
        values = _chunked(function, max(1, chunk // classes), flat, rows)
    values = tf.reshape(values, lead)
    values.set_shape(known)
    return values


def _chunked(function: Callable[..., tf.Tensor], size: int, flat: tf.Tensor, teacher: list[tf.Tensor]) -> tf.Tensor:
    def loop(step: Callable[..., tf.Tensor], tensors: list[tf.Tensor], tail: list[int]) -> tf.Tensor:
        """step(*rows) for each chunk, one below the other; `tail` is the shape of a row of the result."""
        count = tf.shape(tensors[0])[0]
        steps = -(-count // size)
        first = tf.TensorArray(
            flat.dtype if tail else tf.float32, size=tf.maximum(steps, 1), element_shape=[size, *tail]
        )

        def body(i: tf.Tensor, array: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            at = tf.minimum(i * size + tf.range(size), count - 1)  # the last chunk repeats the last row, cut off below
            return i + 1, array.write(i, step(*[tf.gather(t, at) for t in tensors]))

        _, done = tf.while_loop(lambda i, _: i < steps, body, (0, first), parallel_iterations=1)
        return tf.reshape(done.stack(), [-1, *tail])[:count]

    @tf.custom_gradient
    def apply(flat: tf.Tensor, *teacher: tf.Tensor) -> tuple[tf.Tensor, Callable[..., list[tf.Tensor | None]]]:
        def backwards(upstream: tf.Tensor) -> list[tf.Tensor | None]:
            def step(weights: tf.Tensor, student: tf.Tensor, *of_teacher: tf.Tensor) -> tf.Tensor:
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(student)
                    values = function(student, *of_teacher)
                return tape.gradient(values, student, output_gradients=weights)

            return [loop(step, [upstream, flat, *teacher], [flat.shape[-1]]), *[None] * len(teacher)]

        return loop(function, [flat, *teacher], []), backwards

    return apply(flat, *teacher)
