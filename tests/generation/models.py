"""Tiny models of every family, with weights large enough that greedy answers differ from row to row."""

import keras_nlp
import numpy as np
import pytest

M = keras_nlp.models

VOCABULARY = 97


def gpt2():
    return M.GPT2CausalLM(M.GPT2Backbone(VOCABULARY, 3, 4, 32, 64, max_sequence_length=64))


def opt():
    return M.OPTCausalLM(M.OPTBackbone(VOCABULARY, 2, 2, 32, 64, max_sequence_length=64))


def bloom():
    return M.BloomCausalLM(M.BloomBackbone(VOCABULARY, 2, 6, 48, 64))  # six heads: slopes of no power of two


def phi3():
    return M.Phi3CausalLM(M.Phi3Backbone(VOCABULARY, 2, 32, 64, 4, 2))


def llama():
    return M.LlamaCausalLM(M.LlamaBackbone(VOCABULARY, 2, 4, 32, 64, 2, tie_word_embeddings=True))


def llama3():
    scaling = {"rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    return M.Llama3CausalLM(
        M.Llama3Backbone(VOCABULARY, 2, 4, 32, 64, 1, rope_pretraining_sequence_length=16, **scaling)
    )


def mistral():
    return M.MistralCausalLM(M.MistralBackbone(VOCABULARY, 2, 4, 32, 64, 2, sliding_window=6))


def qwen():
    backbone = M.QwenBackbone(VOCABULARY, 2, 4, 2, 32, 64, use_sliding_window_attention=True, sliding_window_size=6)
    return M.QwenCausalLM(backbone)


def qwen3():
    return M.Qwen3CausalLM(M.Qwen3Backbone(VOCABULARY, 2, 4, 2, 16, 32, 64, sliding_window_size=8))


def gemma():
    return M.GemmaCausalLM(M.GemmaBackbone(VOCABULARY, 2, 4, 1, 32, 64, 8))


def gemma2():
    backbone = M.GemmaBackbone(
        VOCABULARY,
        2,
        4,
        2,
        32,
        64,
        12,
        query_head_dim_normalize=False,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=5.0,
        final_logit_soft_cap=3.0,
        use_sliding_window_attention=True,
        sliding_window_size=6,
    )
    return M.GemmaCausalLM(backbone)


def gemma3():
    backbone = M.Gemma3Backbone(
        VOCABULARY,
        16,
        7,
        4,
        2,
        32,
        64,
        8,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=6,
        global_rope_scaling_factor=2.0,
    )
    return M.Gemma3CausalLM(preprocessor=None, backbone=backbone)


def bart():
    return M.BartSeq2SeqLM(M.BartBackbone(VOCABULARY, 2, 4, 32, 64, max_sequence_length=64))


def t5():
    return M.T5Seq2SeqLM(M.T5Backbone(VOCABULARY, 2, 4, 32, 64))


def t5_untied():
    backbone = M.T5Backbone(
        VOCABULARY, 2, 4, 32, 64, key_value_dim=12, use_gated_activation=False, tie_embedding_weights=False
    )
    return M.T5Seq2SeqLM(backbone)


CAUSAL = (gpt2, opt, bloom, phi3, llama, llama3, mistral, qwen, qwen3, gemma, gemma2, gemma3)
SEQ2SEQ = (bart, t5, t5_untied)


def families(makes, quick):
    """Test parameters: all of `makes`, those not in `quick` marked slow."""
    return [pytest.param(make, id=make.__name__, marks=[] if make in quick else pytest.mark.slow) for make in makes]


def build(make, seed: int = 1):
    """A model with random weights large enough to have opinions."""
    model = make()
    random = np.random.default_rng(seed)
    for variable in model.variables:
        shape = variable.shape
        if len(shape) > 1:
            variable.assign(random.normal(size=shape) * 0.25)
        else:
            variable.assign(np.asarray(variable) + random.normal(size=shape) * 0.1)
    return model


def prompts(lengths, seed: int = 0, low: int = 1):
    """ids int32[batch, longest], mask of that shape, padded on the right."""
    random = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    mask = (np.arange(max(lengths.max(), 1)) < lengths[:, None]).astype(np.int32)
    return (random.integers(low, VOCABULARY, mask.shape) * mask).astype(np.int32), mask
