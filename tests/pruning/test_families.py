"""What single families ask of shrinking."""

import keras_nlp
import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError

M = keras_nlp.models


def test_electra_keeps_its_narrow_embeddings():
    model = zoo.build("electra")
    small = tfvllm.shrink(model, width=8, vocabulary=[*range(30)])
    kept = small.backbone.get_config()
    assert (kept["hidden_dim"], kept["embedding_dim"], kept["vocab_size"]) == (8, 12, 30)
    table = np.asarray(model.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(np.asarray(small.backbone.token_embedding.embeddings), table[:30])
    with pytest.raises(InputError, match=r"width=12: blocks as wide as the embeddings .* another width than 12"):
        tfvllm.shrink(model, width=12)
