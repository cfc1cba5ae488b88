"""Tiny models of families that go the general path, and keras-nlp's own answers of theirs."""

import keras_nlp
import numpy as np

from .models import VOCABULARY, build
from .reference import filled_by_forward_passes

M = keras_nlp.models
ROOM, COUNT = 32, 6
SMALL = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "top_k": 2}


def rwkv7():
    backbone = keras_nlp.models.RWKV7Backbone(
        hidden_size=32,
        head_size=8,
        intermediate_dim=64,
        vocabulary_size=VOCABULARY,
        num_layers=2,
        gate_lora=8,
        mv_lora=8,
        aaa_lora=8,
        decay_lora=8,
    )
    return keras_nlp.models.RWKV7CausalLM(backbone, None)


_LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    **GROUPED,
}


def qwen3_5():
    return M.Qwen3_5CausalLM(M.Qwen3_5Backbone(**_LINEAR, **SMALL), None)


def qwen3_5_moe():
    sizes = {name: SMALL[name] for name in ("vocabulary_size", "num_layers", "hidden_dim")}
    inside = {"moe_intermediate_dim": 24, "shared_expert_intermediate_size": 24, **EXPERTS}
    return M.Qwen3_5MoeCausalLM(backbone=M.Qwen3_5MoeBackbone(**_LINEAR, **sizes, **inside), preprocessor=None)


TWO_KINDS = ["sliding_attention", "full_attention"]


def gemma3n():
    backbone = keras_nlp.models.Gemma3nBackbone(
        text_vocab_size=VOCABULARY,
        text_hidden_size=32,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=[48, 48],
        hidden_activation="gelu_approximate",
        layer_types=TWO_KINDS,
        sliding_window=6,
        rope_theta=1e6,
        max_position_embeddings=64,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=8,
    )
    return keras_nlp.models.Gemma3nCausalLM(backbone=backbone, preprocessor=None)


def gemma4():
    backbone = keras_nlp.models.Gemma4Backbone(
        image_size=16, head_dim=8, sliding_window_size=6, layer_types=TWO_KINDS, **SMALL, **GROUPED
    )
    return keras_nlp.models.Gemma4CausalLM(backbone=backbone, preprocessor=None)


_GEMMA = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "hidden_dim": 32,
        "intermediate_dim": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }.items()
}
_MORE = {
    "dropout_rate": 0.0,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 8.0,
    "attention_bias": False,
    "hidden_activation": "gelu_approximate",
    "sliding_window": 4,
}


def t5gemma(vocabulary=VOCABULARY, preprocessor=None):
    return M.T5GemmaSeq2SeqLM(M.T5GemmaBackbone(vocabulary, **_GEMMA, **_MORE), preprocessor)


def t5gemma2(vocabulary=VOCABULARY, preprocessor=None):
    return M.T5Gemma2Seq2SeqLM(M.T5Gemma2Backbone(vocabulary, **_GEMMA, **_MORE), preprocessor)


def ed_rec(vocabulary=VOCABULARY, preprocessor=None):
    return M.EdRecSeq2SeqLM(backbone=M.EdRecBackbone(vocabulary, 2, 2, 32, 48, 4), preprocessor=preprocessor)


FIXED = (rwkv7,)  # must know how long rows are
WRONG = (gemma3n, qwen3_5, qwen3_5_moe)  # the cached step of keras-nlp 0.32 computes something else than the model


def built(make):
    model = build(make)
    model.compile(sampler="greedy", run_eagerly=True)  # sooner than tracing its step
    return model


def keras_greedy(model, ids: np.ndarray, mask: np.ndarray, room: int = COUNT) -> np.ndarray:
    """keras-nlp's own `generate` -> the new tokens [rows, COUNT]."""
    lengths = mask.sum(1)
    if isinstance(model, keras_nlp.models.RWKV7CausalLM):
        read = np.zeros([len(ids), 16], "int32")
        for row, length in enumerate(lengths):
            read[row, 16 - (length - 1) :] = ids[row, : length - 1]
        last = ids[np.arange(len(ids)), lengths - 1]
        inputs = {
            "token_ids": read,
            "input_padding_mask": np.arange(16) >= 16 - np.maximum(lengths[:, np.newaxis] - 1, 1),  # one token: a 0
            "predict_token_ids": np.pad(last[:, np.newaxis], [(0, 0), (0, COUNT)]),
            "padding_mask": np.pad(np.ones([len(ids), 1], bool), [(0, 0), (0, COUNT)]),
        }
        return np.asarray(model.generate_function(inputs)["token_ids"])[:, -COUNT:]
    padded = {
        "token_ids": np.pad(ids, [(0, 0), (0, room)]),
        "padding_mask": np.pad(mask.astype(bool), [(0, 0), (0, room)]),
    }
    found = np.asarray(model.generate(padded, stop_token_ids=None)["token_ids"])
    return np.stack([row[length : length + COUNT] for row, length in zip(found, lengths)])


def forward_greedy(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The new tokens [rows, COUNT] by forward passes."""
    filled = filled_by_forward_passes(model, np.pad(ids, [(0, 0), (0, COUNT)]), mask.sum(1))
    return np.stack([row[length : length + COUNT] for row, length in zip(filled, mask.sum(1))])
