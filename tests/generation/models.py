"""Tiny models of every family, with weights large enough that greedy answers differ from row to row."""

import keras_nlp
import numpy as np
import pytest

M = keras_nlp.models

VOCABULARY = 97


# Each takes how many tokens it knows, how many blocks it has, and, for text, its preprocessor.


def gpt2(vocabulary=VOCABULARY, layers=3, preprocessor=None):
    backbone = M.GPT2Backbone(vocabulary, layers, 4, 32, 64, max_sequence_length=64)
    return M.GPT2CausalLM(backbone, preprocessor)


def opt(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.OPTCausalLM(M.OPTBackbone(vocabulary, layers, 2, 32, 64, max_sequence_length=64), preprocessor)


def bloom(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    backbone = M.BloomBackbone(vocabulary, layers, 6, 48, 64)  # six heads: slopes of no power of two
    return M.BloomCausalLM(backbone, preprocessor)


def gpt_neo_x(vocabulary=VOCABULARY, layers=2, preprocessor=None, **options):
    backbone = M.GPTNeoXBackbone(vocabulary, layers, 2, 32, 64, **options)  # a quarter of 16 channels turns
    return M.GPTNeoXCausalLM(backbone, preprocessor)


def falcon(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.FalconCausalLM(M.FalconBackbone(vocabulary, layers, 6, 48, 64), preprocessor)  # six heads, as Bloom's


def smollm3(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    backbone = M.SmolLM3Backbone(
        vocabulary,
        hidden_dim=32,
        intermediate_dim=64,
        num_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        attention_dropout=0.0,
        rope_layer_enabled_list=[index % 2 == 0 for index in range(layers)],
        layer_types=["full_attention"] * layers,
        mlp_bias=True,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=64,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    )
    return M.SmolLM3CausalLM(backbone, preprocessor)


def phi3(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.Phi3CausalLM(M.Phi3Backbone(vocabulary, layers, 32, 64, 4, 2), preprocessor)


def llama(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    backbone = M.LlamaBackbone(vocabulary, layers, 4, 32, 64, 2, tie_word_embeddings=True)
    return M.LlamaCausalLM(backbone, preprocessor)


def llama3(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    scaling = {"rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    backbone = M.Llama3Backbone(vocabulary, layers, 4, 32, 64, 1, rope_pretraining_sequence_length=16, **scaling)
    return M.Llama3CausalLM(backbone, preprocessor)


def mistral(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.MistralCausalLM(M.MistralBackbone(vocabulary, layers, 4, 32, 64, 2, sliding_window=6), preprocessor)


def qwen(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    window = {"use_sliding_window_attention": True, "sliding_window_size": 6}
    return M.QwenCausalLM(M.QwenBackbone(vocabulary, layers, 4, 2, 32, 64, **window), preprocessor)


def qwen3(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.Qwen3CausalLM(M.Qwen3Backbone(vocabulary, layers, 4, 2, 16, 32, 64, sliding_window_size=8), preprocessor)


def gemma(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.GemmaCausalLM(M.GemmaBackbone(vocabulary, layers, 4, 1, 32, 64, 8), preprocessor)


def gemma2(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    backbone = M.GemmaBackbone(
        vocabulary,
        layers,
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
    return M.GemmaCausalLM(backbone, preprocessor)


def gemma3(vocabulary=VOCABULARY, layers=7, preprocessor=None):
    backbone = M.Gemma3Backbone(
        vocabulary,
        16,
        layers,
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
    return M.Gemma3CausalLM(preprocessor=preprocessor, backbone=backbone)


GEMMA4_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]


def gemma4(vocabulary=VOCABULARY, layers=6, preprocessor=None, task=None, **options):
    """As E2B: three own blocks, of two kinds and sizes of head, then blocks that attend to theirs, and token gates."""
    sizes = {
        "image_size": 16,
        "hidden_dim": 32,
        "intermediate_dim": 48,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 12,
        "global_rope_partial_rotary_factor": 0.5,
        "sliding_window_size": 5,
        "layer_types": (GEMMA4_TYPES * layers)[:layers],
        "num_kv_shared_layers": layers // 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "final_logit_soft_cap": 5.0,
    }
    backbone = M.Gemma4Backbone(vocabulary, num_layers=layers, **{**sizes, **options})
    return M.Gemma4CausalLM(preprocessor=preprocessor, backbone=backbone, **task or {})


def gemma4_wide(vocabulary=VOCABULARY, layers=3, preprocessor=None):
    """As 31B: values are the keys of fewer heads in the blocks that see all, nothing is shared, no token gates."""
    options = {"num_global_key_value_heads": 1, "attention_logit_soft_cap": 4.0, "global_rope_scaling_factor": 2.0}
    plain = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_soft_cap": None}
    return gemma4(vocabulary, layers, preprocessor, **options, **plain)


_GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
_EXPERTS = {**_GROUPED, "num_experts": 4, "top_k": 2}


def mixtral(vocabulary=VOCABULARY, layers=2, preprocessor=None, **options):
    backbone = M.MixtralBackbone(vocabulary, num_layers=layers, sliding_window=6, **{**_EXPERTS, **options})
    return M.MixtralCausalLM(backbone, preprocessor)


def qwen_moe(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    options = {"moe_intermediate_dim": 24, "shared_expert_intermediate_dim": 40, "layer_norm_epsilon": 1e-6}
    backbone = M.QwenMoeBackbone(vocabulary, num_layers=layers, **options, **_EXPERTS)
    return M.QwenMoeCausalLM(backbone, preprocessor)


def qwen3_moe(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    options = {"head_dim": 12, "moe_intermediate_dim": 24, "norm_top_k_prob": True, "sliding_window_size": 6}
    backbone = M.Qwen3MoeBackbone(vocabulary, num_layers=layers, **options, **_EXPERTS)
    return M.Qwen3MoeCausalLM(backbone, preprocessor)


def gpt_oss(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    backbone = M.GptOssBackbone(vocabulary, num_layers=layers, sliding_window=5, head_dim=12, **_EXPERTS)
    return M.GptOssCausalLM(backbone, preprocessor)


def bart(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.BartSeq2SeqLM(M.BartBackbone(vocabulary, layers, 4, 32, 64, max_sequence_length=64), preprocessor)


def t5(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    return M.T5Seq2SeqLM(M.T5Backbone(vocabulary, layers, 4, 32, 64), preprocessor)


def t5_untied(vocabulary=VOCABULARY, layers=2, preprocessor=None):
    options = {"key_value_dim": 12, "use_gated_activation": False, "tie_embedding_weights": False}
    return M.T5Seq2SeqLM(M.T5Backbone(vocabulary, layers, 4, 32, 64, **options), preprocessor)


def t5gemma(vocabulary=VOCABULARY, layers=2, preprocessor=None, **options):
    """Two widths, grouped heads, a window in every other block of the decoder, soft caps."""
    types = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    both = {"num_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": types}
    sides = {
        "encoder": {**both, "hidden_dim": 40, "intermediate_dim": 56, "head_dim": 12},
        "decoder": {**both, "hidden_dim": 32, "intermediate_dim": 48, "head_dim": 8},
    }
    sizes = {f"{side}_{name}": size for side, own in sides.items() for name, size in own.items()}
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    rest = {"query_pre_attn_scalar": 12, "sliding_window": 3, "tie_word_embeddings": False}  # tied, it repeats itself
    backbone = M.T5GemmaBackbone(vocabulary, **{**sizes, **caps, **rest, **options})
    return M.T5GemmaSeq2SeqLM(backbone, preprocessor)


def t5gemma2(vocabulary=VOCABULARY, layers=2, preprocessor=None, **options):
    """As T5Gemma's, of one width: one kernel gives the keys and values of both sides."""
    types = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    both = {"num_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": types}
    sizes = {"hidden_dim": 32, "intermediate_dim": 48, "head_dim": 12, **both}
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    turns = {"global_rope_scaling_factor": 2.0, "encoder_rope_max_wavelength": 5000.0}
    rest = {"query_pre_attn_scalar": 12, "sliding_window": 4, "tie_word_embeddings": False}
    backbone = M.T5Gemma2Backbone(vocabulary, **{**sides, **caps, **turns, **rest, **options})
    return M.T5Gemma2Seq2SeqLM(backbone, preprocessor)


CAUSAL = (
    *(gpt2, opt, bloom, gpt_neo_x, falcon, smollm3, phi3),
    *(llama, llama3, mistral, qwen, qwen3, gemma, gemma2, gemma3, gemma4, gemma4_wide),
    *(mixtral, qwen_moe, qwen3_moe, gpt_oss),
)
SEQ2SEQ = (bart, t5, t5_untied, t5gemma, t5gemma2)


def families(makes, quick=(), thorough=()):
    """Test parameters: all of `makes`, those in `thorough` marked so, those in neither marked slow."""

    def marks(make):
        return () if make in quick else pytest.mark.thorough if make in thorough else pytest.mark.slow

    return [pytest.param(make, id=make.__name__, marks=marks(make)) for make in makes]


def build(make, seed: int = 1, **options):
    """A model with random weights large enough to have opinions. `options` are those of `make`."""
    model = make(**options)
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
