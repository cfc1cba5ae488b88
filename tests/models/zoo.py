"""Tiny models of every family, with weights large enough that a mistake shows."""

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.models import adapter_for

M = keras_nlp.models
VOCABULARY = 40
LENGTH = 12


def _classifier(backbone, task, **kwargs):
    return lambda: task(backbone(**kwargs), num_classes=3)


def _around_bert(backbone, **kwargs):
    """A classifier around a backbone that has none of its own but pools as BERT's does."""
    return _classifier(backbone, M.BertTextClassifier, **kwargs)


def _lm(backbone, task, **kwargs):
    return lambda: task(backbone=backbone(vocabulary_size=VOCABULARY, **kwargs), preprocessor=None)


_STACK = {"num_layers": 3, "num_heads": 4, "hidden_dim": 16, "intermediate_dim": 24, "max_sequence_length": 32}
_LLAMA = {
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}
_EXPERTS = {**_LLAMA, "num_experts": 4, "top_k": 2}

BUILDERS = {
    "bert": _classifier(M.BertBackbone, M.BertTextClassifier, vocabulary_size=VOCABULARY, **_STACK),
    "distil_bert": _classifier(M.DistilBertBackbone, M.DistilBertTextClassifier, vocabulary_size=VOCABULARY, **_STACK),
    "roberta": _classifier(M.RobertaBackbone, M.RobertaTextClassifier, vocabulary_size=VOCABULARY, **_STACK),
    "xlm_roberta": _classifier(M.XLMRobertaBackbone, M.XLMRobertaTextClassifier, vocabulary_size=VOCABULARY, **_STACK),
    "electra": _around_bert(M.ElectraBackbone, vocab_size=VOCABULARY, embedding_dim=12, **_STACK),
    "electra_wide": _around_bert(M.ElectraBackbone, vocab_size=VOCABULARY, embedding_dim=16, **_STACK),
    "deberta_v3": _classifier(
        M.DebertaV3Backbone, M.DebertaV3TextClassifier, vocabulary_size=VOCABULARY, bucket_size=4, **_STACK
    ),
    "albert": _classifier(
        M.AlbertBackbone, M.AlbertTextClassifier, vocabulary_size=VOCABULARY, embedding_dim=12, **_STACK
    ),
    "gpt2": _lm(M.GPT2Backbone, M.GPT2CausalLM, **_STACK),
    "opt": _lm(M.OPTBackbone, M.OPTCausalLM, **_STACK),
    "bloom": _lm(M.BloomBackbone, M.BloomCausalLM, **{k: v for k, v in _STACK.items() if k != "max_sequence_length"}),
    "llama": _lm(M.LlamaBackbone, M.LlamaCausalLM, **_LLAMA),
    "llama_tied": _lm(M.LlamaBackbone, M.LlamaCausalLM, tie_word_embeddings=True, **_LLAMA),
    "llama3": _lm(M.Llama3Backbone, M.Llama3CausalLM, **_LLAMA),
    "mistral": _lm(M.MistralBackbone, M.MistralCausalLM, sliding_window=4, **_LLAMA),
    "qwen": _lm(M.QwenBackbone, M.QwenCausalLM, **_LLAMA),
    "qwen3": _lm(M.Qwen3Backbone, M.Qwen3CausalLM, head_dim=8, **_LLAMA),
    "gpt_neo_x": _lm(M.GPTNeoXBackbone, M.GPTNeoXCausalLM, rotary_percentage=0.5, **_STACK),
    "falcon": _lm(
        M.FalconBackbone, M.FalconCausalLM, num_layers=3, num_attention_heads=4, hidden_dim=16, intermediate_dim=24
    ),
    "smollm3": _lm(
        M.SmolLM3Backbone,
        M.SmolLM3CausalLM,
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        attention_bias=True,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False, True],
        layer_types=["full_attention"] * 3,
        mlp_bias=False,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=32,
        rope_theta=10_000.0,
        partial_rotary_factor=1.0,
    ),
    "phi3": _lm(M.Phi3Backbone, M.Phi3CausalLM, **_LLAMA),
    "phi3_su": _lm(
        M.Phi3Backbone,
        M.Phi3CausalLM,
        rope_scaling_type="su",
        rope_scaling_short_factor=[1.0, 1.5],
        rope_scaling_long_factor=[2.0, 4.0],
        pretraining_sequence_length=6,
        max_sequence_length=24,
        **_LLAMA,
    ),
    "mixtral": _lm(M.MixtralBackbone, M.MixtralCausalLM, **_EXPERTS),
    "qwen_moe": _lm(
        M.QwenMoeBackbone, M.QwenMoeCausalLM, moe_intermediate_dim=24, shared_expert_intermediate_dim=24, **_EXPERTS
    ),
    "qwen3_moe": _lm(
        M.Qwen3MoeBackbone,
        M.Qwen3MoeCausalLM,
        head_dim=8,
        moe_intermediate_dim=24,
        mlp_only_layers=[1],
        norm_top_k_prob=True,
        **_EXPERTS,
    ),
    "gpt_oss": _lm(M.GptOssBackbone, M.GptOssCausalLM, sliding_window=3, head_dim=8, **_EXPERTS),
    "gemma": _lm(
        M.GemmaBackbone,
        M.GemmaCausalLM,
        head_dim=8,
        use_sliding_window_attention=True,
        sliding_window_size=4,
        **(_LLAMA | {"intermediate_dim": 48}),
    ),
    "gemma_mqa": _lm(
        M.GemmaBackbone, M.GemmaCausalLM, head_dim=8, **(_LLAMA | {"num_key_value_heads": 1, "intermediate_dim": 48})
    ),
    "gemma3": _lm(
        M.Gemma3Backbone,
        M.Gemma3CausalLM,
        head_dim=8,
        image_size=None,
        use_sliding_window_attention=True,
        sliding_window_size=4,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        **_LLAMA,
    ),
    "bart": _lm(M.BartBackbone, M.BartSeq2SeqLM, **_STACK),
    "t5": _lm(
        M.T5Backbone,
        M.T5Seq2SeqLM,
        num_layers=3,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=24,
        key_value_dim=8,
    ),
    "t5_plain": _lm(
        M.T5Backbone,
        M.T5Seq2SeqLM,
        num_layers=3,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=24,
        use_gated_activation=False,
        tie_embedding_weights=False,
    ),
    "t5gemma": lambda: t5gemma(),
}


def t5gemma(**options):
    """Blocks of two types. Both stacks have the same sizes, but for `options`."""
    sizes = {
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    both = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    scores = {"sliding_window": 3, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}
    backbone = M.T5GemmaBackbone(VOCABULARY, **{**both, **scores, **options})
    return M.T5GemmaSeq2SeqLM(backbone=backbone, preprocessor=None)


CLASSIFIERS = ("bert", "distil_bert", "roberta", "xlm_roberta", "electra", "electra_wide", "deberta_v3", "albert")
SEGMENTS = ("bert", "electra", "electra_wide", "albert")
SEQ2SEQ = ("bart", "t5", "t5_plain", "t5gemma")
EXPERTS = ("mixtral", "qwen_moe", "qwen3_moe", "gpt_oss")
# Tested by the tests over families in the thorough round, and by a brief one in `tests/pruning/test_families.py`.
THOROUGH = (
    *("electra", "albert", "deberta_v3", "bloom", "phi3", "gpt_neo_x", "falcon", "smollm3", "t5gemma"),
    *EXPERTS,
)
CAUSAL = tuple(name for name in BUILDERS if name not in CLASSIFIERS + SEQ2SEQ)
# Fewer key than query heads.
_ALL_HEADS = ("gpt2", "opt", "bloom", "gpt_neo_x", "falcon")
GROUPED = (*(name for name in CAUSAL if name not in _ALL_HEADS), "t5gemma")


def families(quick, names=tuple(BUILDERS)):
    """Test parameters: those in `quick` run always, those in THOROUGH in the thorough round, the others are slow."""

    def marks(name):
        return () if name in quick else pytest.mark.thorough if name in THOROUGH else pytest.mark.slow

    return [pytest.param(name, marks=marks(name)) for name in names]


def build(name):
    """A tiny task of family `name` with random weights of size 0.3."""
    model = BUILDERS[name]()
    rng = np.random.default_rng(sum(map(ord, name)))
    for weight in adapter_for(model).weights(model):
        shape = tuple(weight.variable.shape)
        centre = 1.0 if "norm" in weight.name and "gemma" not in name and "beta" not in weight.name else 0.0
        weight.variable.assign(centre + rng.normal(0, 0.3, shape))
    return model


def inputs(name, rows=3, length=LENGTH, seed=0):
    """Random inputs with padded rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCABULARY, (rows, length)).astype("int32")
    lengths = rng.integers(2, length + 1, rows)
    lengths[0] = length
    mask = (np.arange(length)[None] < lengths[:, None]).astype("int32")
    if name in SEQ2SEQ:
        other = rng.integers(3, VOCABULARY, (rows, length - 4)).astype("int32")
        return {
            "encoder_token_ids": tokens * mask,
            "encoder_padding_mask": mask,
            "decoder_token_ids": other,
            "decoder_padding_mask": np.ones_like(other),
        }
    found = {"token_ids": tokens * mask, "padding_mask": mask}
    if name in SEGMENTS:
        found["segment_ids"] = np.zeros_like(tokens)
    return found


def prompts(name, rows=3, length=LENGTH, seed=1):
    """Inputs of `generate`: prompts of unlike length, room to the right."""
    found = inputs(name, rows, length, seed)
    mask = (np.arange(length)[None] < np.asarray([[2], [4], [3]])[:rows]).astype("int32")
    if name in SEQ2SEQ:
        start = (np.arange(length - 4)[None] < np.full((rows, 1), 2)).astype("int32")
        found["decoder_token_ids"] = found["decoder_token_ids"] * start
        found["decoder_padding_mask"] = start
        return found
    found["token_ids"] = np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length)).astype("int32") * mask
    found["padding_mask"] = mask
    return found


def generated(model, found):
    """Greedy tokens of `generate` without a stop token."""
    model.compile(sampler="greedy", loss="mse")
    if isinstance(model, M.Gemma3CausalLM):  # its `generate` cannot join batches without images
        tensors = {key: tf.constant(value) for key, value in found.items()}
        result = model.make_generate_function()(tensors, stop_token_ids=None)
    else:
        result = model.generate(dict(found), stop_token_ids=None)
    key = "decoder_token_ids" if "decoder_token_ids" in result else "token_ids"
    return np.asarray(result[key])
