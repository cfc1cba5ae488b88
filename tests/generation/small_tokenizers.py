"""Small tokenizers and preprocessors for the families of `tests.generation.models`."""

import functools
import io

import keras_nlp

M = keras_nlp.models

LEARNT_FROM = [
    "the quick brown fox jumps over the lazy dog",
    "a fox is quick and a dog is lazy",
    "\u4f60\u597d caf\u00e9",
]

# Family of a builder -> (the names of keras-nlp's classes begin so, its special tokens: padding, start, end, others).
# For byte pairs no end token stands at 0: keras-nlp pads with 0 and would take its own padding for the end.
BYTE_PAIRS = {
    "gpt2": ("GPT2", ["<unused>", "<|endoftext|>"]),
    "opt": ("OPT", ["<pad>", "</s>"]),
    "bloom": ("Bloom", ["<pad>", "<s>", "</s>"]),
    "gpt_neo_x": ("GPTNeoX", ["<unused>", "<|endoftext|>"]),
    "falcon": ("Falcon", ["<unused>", "<|endoftext|>"]),
    "smollm3": ("SmolLM3", ["<unused>", "<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>"]),
    "llama3": (
        "Llama3",
        ["<unused>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen": ("Qwen", ["<unused>", "<|endoftext|>"]),
    "qwen3": ("Qwen3", ["<unused>", "<|im_end|>", "<|endoftext|>"]),
    "qwen_moe": ("QwenMoe", ["<unused>", "<|endoftext|>"]),
    "qwen3_moe": ("Qwen3Moe", ["<unused>", "<|im_end|>", "<|endoftext|>"]),
    "gpt_oss": ("GptOss", ["<unused>", "<|endoftext|>"]),
    "bart": ("Bart", ["<pad>", "<s>", "</s>", "<mask>"]),
}
SENTENCE_PIECES = {
    "phi3": ("Phi3", "<unk>", "<s>", "</s>", ["<|endoftext|>"]),
    "llama": ("Llama", "<unk>", "<s>", "</s>", []),
    "mistral": ("Mistral", "<unk>", "<s>", "</s>", []),
    "mixtral": ("Mixtral", "<unk>", "<s>", "</s>", []),
    "gemma": ("Gemma", "<pad>", "<bos>", "<eos>", []),
    "gemma2": ("Gemma", "<pad>", "<bos>", "<eos>", []),
    "gemma3": ("Gemma3", "<pad>", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma4": ("Gemma4", "<pad>", "<bos>", "<eos>", ["<|turn>", "<turn|>"]),
    "gemma4_wide": ("Gemma4", "<pad>", "<bos>", "<eos>", ["<|turn>", "<turn|>"]),
    "t5": ("T5", "<pad>", "<s>", "</s>", []),
    "t5gemma": ("T5Gemma", "<pad>", "<bos>", "<eos>", []),
    "t5gemma2": ("T5Gemma2", "<pad>", "<bos>", "<eos>", []),
    "t5_untied": ("T5", "<pad>", "<s>", "</s>", []),
}


_OF_TEXT_ALONE = {
    "Gemma3": {"has_vision_tokens": False},
    "Gemma4": {"has_vision_tokens": False, "has_video_tokens": False},
}


def byte_level(kind, specials):
    """A byte-level tokenizer: every byte is a token, and a few words are."""
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    vocabulary = {special: index for index, special in enumerate(specials)}
    for character in bytes_to_unicode()[1]:
        vocabulary.setdefault(character, len(vocabulary))
    merges = ["\u0120 q", "u i", "c k", "ui ck", "\u0120q uick", "f o", "fo x", "\u0120 fox"]
    for merge in merges:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    return kind(vocabulary=vocabulary, merges=merges)


@functools.cache
def sentence_piece(first: str, start: str, end: str, others: tuple[str, ...]) -> bytes:
    """A SentencePiece model that falls back to bytes; `first` is token 0, padding or unknown."""
    import sentencepiece

    ids = {"pad_id": 0, "unk_id": 3} if first == "<pad>" else {"unk_id": 0}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNT_FROM * 5),
        model_writer=model,
        vocab_size=310,
        model_type="BPE",
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=1,
        eos_id=2,
        bos_piece=start,
        eos_piece=end,
        user_defined_symbols=list(others),
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


def tokenizer_of(family: str):
    """keras-nlp's tokenizer of a family, with few tokens."""
    if family in BYTE_PAIRS:
        name, specials = BYTE_PAIRS[family]
        return byte_level(getattr(M, f"{name}Tokenizer"), specials)
    name, first, start, end, others = SENTENCE_PIECES[family]
    options = _OF_TEXT_ALONE.get(name, {})
    return getattr(M, f"{name}Tokenizer")(proto=sentence_piece(first, start, end, tuple(others)), **options)


def preprocessor_of(family: str, length: int = 40):
    """keras-nlp's preprocessor of a family, of so many tokens (of source and target each)."""
    name = (BYTE_PAIRS.get(family) or SENTENCE_PIECES[family])[0]
    tokenizer = tokenizer_of(family)
    if name in ("Bart", "T5", "T5Gemma", "T5Gemma2"):
        return getattr(M, f"{name}Seq2SeqLMPreprocessor")(tokenizer, length, length)
    return getattr(M, f"{name}CausalLMPreprocessor")(tokenizer, sequence_length=length)


def text_options(family: str, length: int = 40) -> dict:
    """Options for `tests.generation.models.build` that make a family's model take text."""
    preprocessor = preprocessor_of(family, length)
    return {"vocabulary": preprocessor.tokenizer.vocabulary_size(), "preprocessor": preprocessor}
