"""The maker of synthetic reviews."""

import collections

from tfvllm import data
from tfvllm.data import reviews


def test_synthetic_reviews_are_the_same_on_every_machine():
    rows = data.synthetic_reviews(200, seed=1)
    assert rows == data.synthetic_reviews(200, seed=1)
    assert rows != data.synthetic_reviews(200, seed=2)
    assert len({text for text, _ in rows}) == 200
    assert sum(label for _, label in rows) == 100
    # both labels are spread over the whole list, not gathered at its end
    assert 15 < sum(label for _, label in rows[-50:]) < 35


def test_synthetic_sentiment_needs_composition_not_word_counts():
    """A bag of words, trained on the same data, must stay far below what the labels' own rule reaches (all)."""
    rows = data.synthetic_reviews(6000, seed=5)
    train, held_out = rows[:5000], rows[5000:]
    weight = collections.Counter()
    for text, label in train:
        for word in set(text.split()):
            weight[word] += 1 if label else -1
    total = collections.Counter(word for text, _ in train for word in set(text.split()))
    right = sum(
        (sum(weight[word] / total[word] for word in set(text.split()) if total[word]) > 0) == bool(label)
        for text, label in held_out
    )
    assert right / len(held_out) < 0.80


def test_synthetic_meaning_composes():
    import random

    writer = reviews._Writer(random.Random(0))
    seen = {"negated": 0, "feared": 0, "unmet": 0}
    for _ in range(300):
        words, meaning = writer.negated()
        bad = next((word for word in reviews._BAD if word in words.split()), None)
        assert (meaning > 0) == (bad is not None), words
        seen["negated"] += bad is not None
        words, meaning = writer.feared()
        assert meaning > 0 and any(word in words.replace(",", "").split() for word in reviews._BAD)
        words, meaning = writer.unmet()
        assert meaning < 0 and any(word in words.replace(",", "").split() for word in reviews._GOOD)
    assert 0 < seen["negated"] < 300
