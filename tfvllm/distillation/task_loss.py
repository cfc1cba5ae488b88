"""A task's cross-entropy that was given by name."""

from typing import Any

import keras

from tfvllm.families.heads import Head


@keras.saving.register_keras_serializable(package="tfvllm")
class CrossEntropyByName(keras.losses.Loss):
    """A Keras cross-entropy that was given by name, told by the model's head whether it sees logits.

    Keras takes what it sees for probabilities where it is given a name, and models often give logits.

    Args:
        identifier: Keras's name, such as "sparse_categorical_crossentropy".

    Attributes:
        head: of the model, set before the first call.
    """

    def __init__(self, identifier: str, name: str | None = None, **kwargs: Any):
        super().__init__(name=name or identifier, **kwargs)
        self.identifier = identifier
        self._kind = _CLASSES[_bare(identifier)]
        self.head: Head | None = None

    def call(self, y_true: Any, y_pred: Any) -> Any:
        assert self.head is not None, "the Distiller sets it"
        return self._kind(from_logits=self.head.kind == "logits").call(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "identifier": self.identifier}


_CLASSES = {
    "sparsecategoricalcrossentropy": keras.losses.SparseCategoricalCrossentropy,
    "categoricalcrossentropy": keras.losses.CategoricalCrossentropy,
    "binarycrossentropy": keras.losses.BinaryCrossentropy,
    "bce": keras.losses.BinaryCrossentropy,
    "categoricalfocalcrossentropy": keras.losses.CategoricalFocalCrossentropy,
    "binaryfocalcrossentropy": keras.losses.BinaryFocalCrossentropy,
}


def _bare(identifier: str) -> str:
    return identifier.lower().replace("_", "")


def by_name(loss: Any) -> Any:
    """`loss`, or where it is the name of a cross-entropy that may see logits, a `CrossEntropyByName`."""
    return CrossEntropyByName(loss) if isinstance(loss, str) and _bare(loss) in _CLASSES else loss
