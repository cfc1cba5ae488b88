"""Synthetic reviews: sentences that a generator writes together with their sentiment."""

import random
from collections.abc import Callable, Sequence

# Every sentence is built together with its meaning, a number whose sign is the label. The same words occur on both
# sides, so counting words is not enough: what decides is how clauses are negated, weighed and set against each other.

SYNTHETIC_NOTE = "synthetic reviews, written by a generator (tfvllm.data.synthetic_reviews); no person wrote them"

_GOOD = {
    "good": 1.0, "great": 1.5, "wonderful": 1.8, "charming": 1.2, "funny": 1.1, "clever": 1.2, "moving": 1.2,
    "brilliant": 1.8, "delightful": 1.6, "solid": 0.9, "fresh": 1.0, "gripping": 1.4, "superb": 1.8, "warm": 0.9,
    "elegant": 1.1, "impressive": 1.3, "enjoyable": 1.1, "memorable": 1.2, "sharp": 1.0, "beautiful": 1.4,
    "convincing": 1.0, "inventive": 1.2, "touching": 1.2, "satisfying": 1.2, "lively": 1.0, "honest": 0.9,
}  # fmt: skip
_BAD = {
    "bad": -1.0, "awful": -1.8, "terrible": -1.8, "boring": -1.2, "dull": -1.1, "weak": -0.9, "clumsy": -1.1,
    "silly": -0.9, "tedious": -1.3, "lifeless": -1.3, "predictable": -0.9, "shallow": -1.0, "messy": -1.0,
    "annoying": -1.2, "stale": -1.0, "pointless": -1.4, "horrible": -1.8, "forced": -0.9, "bland": -1.0,
    "confusing": -1.0, "cheap": -0.9, "dreadful": -1.7, "tiresome": -1.2, "painful": -1.3, "flat": -0.9, "cold": -0.8,
}  # fmt: skip
_DEGREES = {
    "very": 1.4, "really": 1.3, "extremely": 1.7, "truly": 1.5, "quite": 1.1, "remarkably": 1.5, "so": 1.3,
    "fairly": 0.8, "somewhat": 0.6, "slightly": 0.5, "a little": 0.5, "rather": 0.9, "incredibly": 1.7, "": 1.0,
}  # fmt: skip
_GOOD_VERBS = {"loved": 1.6, "enjoyed": 1.2, "admired": 1.1, "liked": 0.9, "adored": 1.7}
_BAD_VERBS = {"hated": -1.7, "disliked": -1.0, "regretted": -1.2, "despised": -1.7}
_THINGS = {
    "film": ["acting", "plot", "script", "ending", "music", "photography", "dialogue", "cast", "direction", "opening"],
    "book": ["plot", "prose", "ending", "first chapter", "hero", "dialogue", "translation", "style", "argument"],
    "hotel": ["room", "breakfast", "service", "view", "staff", "pool", "location", "bed", "lobby"],
    "phone": ["screen", "battery", "camera", "sound", "design", "keyboard", "software", "speaker"],
    "restaurant": ["food", "wine", "service", "dessert", "terrace", "menu", "soup", "coffee", "kitchen"],
    "show": ["acting", "music", "staging", "pacing", "humour", "first act", "costume work", "choir", "lighting"],
}
_NEUTRAL = [
    "we went on a friday", "i bought it last month", "my sister came along", "it was raining outside",
    "there are two versions of it", "this was my second time", "it lasts about two hours", "i had read about it",
    "everyone was talking about it", "we sat near the door", "the box is blue", "it comes from france",
    "a friend had recommended it", "they opened in march", "i paid with a card", "it is the third of its kind",
]  # fmt: skip


class _Writer:
    """Writes one review: methods return `(words, meaning)`."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.topic = rng.choice(list(_THINGS))

    def subject(self) -> str:
        things = _THINGS[self.topic]
        return self.rng.choice([f"the {self.rng.choice(things)}", f"the {self.topic}", f"this {self.topic}", "it"])

    def quality(self) -> tuple[str, float]:
        word, value = self.rng.choice(list((_GOOD if self.rng.random() < 0.5 else _BAD).items()))
        degree, factor = self.rng.choice(list(_DEGREES.items()))
        if self.rng.random() < 0.5:
            degree, factor = "", 1.0
        return f"{degree} {word}".strip(), value * factor

    def plain(self) -> tuple[str, float]:
        words, value = self.quality()
        verb = self.rng.choice(["is", "was", "felt", "seemed", "turned out"])
        return f"{self.subject()} {verb} {words}", value

    def negated(self) -> tuple[str, float]:
        """Negation turns the sign and takes some of the strength: `not great` is milder than `awful`."""
        word, value = self.rng.choice(list((_GOOD if self.rng.random() < 0.5 else _BAD).items()))
        form = self.rng.choice(
            ["is not {}", "is not {} at all", "was never {}", "is far from {}", "is anything but {}", "is hardly {}",
             "isn't {}", "wasn't even {}", "was by no means {}", "failed to be {}"]
        )  # fmt: skip
        strength = 1.0 if any(mark in form for mark in ("at all", "anything but", "by no means", "far from")) else 0.8
        return f"{self.subject()} {form.format(word)}", -strength * value

    def doubly_negated(self) -> tuple[str, float]:
        word, value = self.rng.choice(list((_GOOD if self.rng.random() < 0.5 else _BAD).items()))
        form = self.rng.choice(["nobody could say that {} is not {}", "it would be wrong to say that {} is not {}"])
        return form.format(self.subject(), word), 0.8 * value

    def reaction(self) -> tuple[str, float]:
        word, value = self.rng.choice(list((_GOOD_VERBS if self.rng.random() < 0.5 else _BAD_VERBS).items()))
        if self.rng.random() < 0.35:
            return f"{self.rng.choice(['i never', 'nobody in our group'])} {word} {self.subject()}", -0.8 * value
        return f"{self.rng.choice(['i', 'we', 'my friends', 'my whole family'])} {word} {self.subject()}", value

    def unmet(self) -> tuple[str, float]:
        """A hope that was not met: the praise is in words only."""
        word, value = self.rng.choice(list(_GOOD.items()))
        form = self.rng.choice(
            ["i wish {} had been {}", "{} could have been {}", "i was told that {} would be {}, and was misled",
             "{} tries hard to be {} and fails", "they promised that {} would be {}, which was a lie"]
        )  # fmt: skip
        return form.format(self.subject(), word), -0.8 * abs(value)

    def feared(self) -> tuple[str, float]:
        """A fear that did not come true: the blame is in words only."""
        word, value = self.rng.choice(list(_BAD.items()))
        form = self.rng.choice(
            ["i feared that {} would be {}, and was wrong", "{} never becomes {}", "critics called {} {}, unfairly",
             "{} could easily have been {} and avoids it", "i expected {} to be {}, and was happily mistaken"]
        )  # fmt: skip
        return form.format(self.subject(), word), 0.8 * abs(value)

    def clause(self) -> tuple[str, float]:
        kinds: Sequence[Callable[[], tuple[str, float]]] = (
            self.plain, self.negated, self.reaction, self.unmet, self.feared, self.doubly_negated,
        )  # fmt: skip
        return self.rng.choices(kinds, weights=(38, 26, 14, 8, 8, 6))[0]()

    def joined(self) -> tuple[str, float]:
        """Two clauses: equal weights under `and`, unequal ones where the sentence sets one against the other."""
        (first, a), (second, b) = self.clause(), self.clause()
        form, weight_a, weight_b = self.rng.choice(
            [("{}, and {}", 1, 1), ("{}; {}", 1, 1), ("{} while {}", 1, 1), ("{}, but {}", 0.4, 1.2),
             ("although {}, {}", 0.4, 1.2), ("even if {}, {}", 0.4, 1.2), ("{}, even though {}", 1.2, 0.4),
             ("{}, however {}", 0.4, 1.2), ("{}, although {}", 1.2, 0.4), ("{} and yet {}", 0.4, 1.2),
             ("granted, {}, still {}", 0.4, 1.2)]
        )  # fmt: skip
        return form.format(first, second), weight_a * a + weight_b * b

    def review(self) -> tuple[str, float]:
        words, value = self.clause() if self.rng.random() < 0.4 else self.joined()
        if self.rng.random() < 0.2:
            more, extra = self.clause()
            words, value = f"{words}. overall, {more}", 0.5 * value + 1.5 * extra
        if self.rng.random() < 0.3:
            neutral = self.rng.choice(_NEUTRAL)
            words = f"{neutral}, {words}" if self.rng.random() < 0.5 else f"{words}. {neutral}"
        return words + self.rng.choice([" .", " .", " !", ""]), value


def synthetic_reviews(count: int, seed: int, *, margin: float = 0.5) -> list[tuple[str, int]]:
    """Writes `count` different synthetic reviews with compositional sentiment, the same ones for the same `seed`.

    Negation, intensifiers, contrast (`but`, `although`, `even though`), unmet hopes, feigned blame and mixed clauses
    decide the label together. These sentences are synthetic: they show that the road works, not how good a model is
    on what people write.

    Args:
        count: how many; half of each label (to one).
        seed: of `random.Random`, which is the same on every platform.
        margin: meanings nearer to 0 than this are thrown away as neither good nor bad.

    Returns:
        `(sentence, label)` pairs; label 1 is positive, 0 negative.

    Example:
        >>> from tfvllm.data import synthetic_reviews
        >>> rows = synthetic_reviews(10, seed=1)
        >>> len(rows), sum(label for _, label in rows), rows == synthetic_reviews(10, seed=1)
        (10, 5, True)
    """
    rng = random.Random(seed)
    wanted = {0: count // 2, 1: count - count // 2}
    seen: set[str] = set()
    rows: list[tuple[str, int]] = []
    while len(rows) < count:
        words, value = _Writer(rng).review()
        label = int(value > 0)
        if abs(value) < margin or words in seen or not wanted[label]:
            continue
        seen.add(words)
        wanted[label] -= 1
        rows.append((words, label))
    rng.shuffle(rows)  # else the rarer label would gather at the end
    return rows
