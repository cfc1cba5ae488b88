"""A byte-level tokenizer learnt from text, for the tests that train."""

import collections
import itertools
import re

# As GPT-2 cuts text into words, near enough to learn pairs from.
_WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")


def learn(texts, merges: int, specials) -> tuple[dict[str, int], list[str]]:
    """(vocabulary, merges) for keras-nlp's tokenizers: the most frequent pair first (Sennrich et al. 2016)."""
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    byte_list, characters = bytes_to_unicode()
    character = {byte[0]: text for byte, text in zip(byte_list, characters)}
    counts = collections.Counter(word for text in texts for word in _WORDS.findall(text))
    words = [([character[byte] for byte in word.encode()], count) for word, count in counts.items()]
    pairs: collections.Counter = collections.Counter()
    where = collections.defaultdict(set)
    for index, (symbols, count) in enumerate(words):
        for pair in itertools.pairwise(symbols):
            pairs[pair] += count
            where[pair].add(index)
    found = []
    while len(found) < merges and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        found.append(" ".join(best))
        for index in where.pop(best):
            symbols, count = words[index]
            for pair in itertools.pairwise(symbols):
                pairs[pair] -= count
            joined, at = [], 0
            while at < len(symbols):
                both = tuple(symbols[at : at + 2]) == best
                joined.append("".join(best) if both else symbols[at])
                at += 2 if both else 1
            words[index] = (joined, count)
            for pair in itertools.pairwise(joined):
                pairs[pair] += count
                where[pair].add(index)
        del pairs[best]
    vocabulary: dict[str, int] = {}
    for text in [*specials, *characters, *(merge.replace(" ", "") for merge in found)]:
        vocabulary.setdefault(text, len(vocabulary))
    return vocabulary, found
