"""Data for three tasks: labelled sentences, texts to generate, sentence pairs to translate; and synthetic ones of each.

`load`, `load_texts` and `load_pairs` read a folder of train, dev and test files, or one file that is split. All files
are UTF-8 (a name that ends in `.gz`: packed with gzip). What they refuse, they name by file and line; what whoever
trains on the data should know stands in `notes`.
"""

from tfvllm.data.labelled import HEADER, Split, TextData, load, read_tsv, write_tsv
from tfvllm.data.pairs import Pairs, PairSplit, load_pairs
from tfvllm.data.phrases import synthetic_phrases
from tfvllm.data.reviews import synthetic_reviews
from tfvllm.data.stories import synthetic_stories
from tfvllm.data.synthetic import SYNTHETIC_NOTE, SYNTHETIC_NOTES, write_synthetic
from tfvllm.data.texts import Document, Texts, load_texts

__all__ = [
    "HEADER",
    "SYNTHETIC_NOTE",
    "SYNTHETIC_NOTES",
    "Document",
    "PairSplit",
    "Pairs",
    "Split",
    "TextData",
    "Texts",
    "load",
    "load_pairs",
    "load_texts",
    "read_tsv",
    "synthetic_phrases",
    "synthetic_reviews",
    "synthetic_stories",
    "write_synthetic",
    "write_tsv",
]
