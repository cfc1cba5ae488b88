"""The student relates positions to each other as its teacher does."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.layer_map import LayerMap, check_layers
from tfvllm.distillation.losses.base import DistillationLoss, pairs_of_states, register
from tfvllm.errors import InputError

_KINDS = ("queries", "keys", "values")


@register
class Relations(DistillationLoss):
    """Sum over Q-Q, K-K and V-V of KL(R_teacher ‖ R_student), R = softmax(A Aᵀ / √d), mean over relation heads.

    MiniLMv2 (Wang et al. 2021, eq. 6 to 8). A holds the queries (keys, values) of all attention heads side by side, cut
    again into `relation_heads` heads of d channels each, so that the models may differ in heads and width.

    Args:
        layers: pairs (teacher layer, student layer) or a name (see `tfvllm.distillation.layer_pairs`). The default is
            the last layer of each; for a deep teacher the paper takes one somewhat below its last.
        relation_heads: how many; divides the widths of both models' queries, keys and values. The default is the
            largest such number up to 12, the attention heads of the paper's base models.
        kinds: which of "queries", "keys", "values".

    Example:
        >>> from tfvllm.families.outputs import BlockOutputs
        >>> vectors = tf.eye(3)[None]  # [batch, length, width]
        >>> block = BlockOutputs(queries=vectors, keys=vectors, values=vectors)
        >>> tfvllm.losses.Relations()([block], [block]).numpy()  # a model relates as it does itself
        array([[0., 0., 0.]], dtype=float32)
    """

    reads = "relations"

    def __init__(
        self,
        layers: LayerMap = ((-1, -1),),
        relation_heads: int | None = None,
        kinds: Sequence[str] = _KINDS,
    ):
        unknown = sorted(set(kinds) - set(_KINDS))
        if unknown or not kinds:
            raise InputError(f"Relations expects kinds among {list(_KINDS)}, found {unknown or 'none'}.")
        self.layers = check_layers(layers, "Relations", names=False)
        self.relation_heads = relation_heads
        self.kinds = tuple(kinds)

    def __call__(
        self,
        teacher: Sequence[Any],
        student: Sequence[Any],
        mask: tf.Tensor | None = None,
        step: int | tf.Tensor = 0,
    ) -> tf.Tensor:
        """Mean over the pairs, float32 [batch, length].

        Args:
            teacher, student: one object for each pair with `queries`, `keys`, `values` [batch, length, width]
                (`tfvllm.families.outputs.BlockOutputs`).
            mask: bool [batch, length]; positions that are not real relate to none.
        """
        values = [
            self._relation(*pair, mask)
            for kind in self.kinds
            for pair in pairs_of_states(self, *([getattr(b, kind) for b in side] for side in (teacher, student)))
        ]
        return sum(values) / float(len(teacher))

    def _relation(self, teacher: tf.Tensor, student: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        heads = self._heads(teacher.shape[-1], student.shape[-1])
        log_p = tf.stop_gradient(_log_relations(teacher, heads, mask))
        return tf.reduce_mean(divergences.forward_kl(log_p, _log_relations(student, heads, mask)), axis=1)

    def _heads(self, teacher: int, student: int) -> int:
        if self.relation_heads is None:
            return max(n for n in range(1, 13) if teacher % n == 0 and student % n == 0)
        if teacher % self.relation_heads or student % self.relation_heads:
            both = math.gcd(teacher, student)
            valid = [n for n in range(1, both + 1) if both % n == 0]
            raise InputError(
                f"relation_heads={self.relation_heads} does not divide the widths {teacher} (teacher) and {student} "
                f"(student) of queries, keys or values; valid are {valid}."
            )
        return self.relation_heads

    def get_config(self) -> dict[str, Any]:
        return {"layers": self.layers, "relation_heads": self.relation_heads, "kinds": list(self.kinds)}


def _log_relations(vectors: tf.Tensor, heads: int, mask: tf.Tensor | None) -> tf.Tensor:
    """log softmax of the scaled products between positions: [batch, heads, length, length]."""
    shape = tf.shape(vectors)
    depth = vectors.shape[-1] // heads
    split = tf.reshape(tf.cast(vectors, tf.float32), [shape[0], shape[1], heads, depth])
    split = tf.transpose(split, [0, 2, 1, 3])
    scores = tf.matmul(split, split, transpose_b=True) / math.sqrt(depth)
    if mask is not None:
        scores = tf.where(mask[:, None, None, :], scores, -1e9)
    return tf.nn.log_softmax(scores, axis=-1)
