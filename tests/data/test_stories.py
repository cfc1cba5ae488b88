"""The maker of synthetic stories: what a story says later follows from what it said before."""

import hashlib
import re

import pytest

from tfvllm import data
from tfvllm.data import stories

STORIES = data.synthetic_stories(600, seed=1)
NUMBER = {word: i for i, word in enumerate(stories._NUMBERS)}
NAMES = {name: kind for kind, names in stories._NAMES.items() for name in names.split()}


def test_they_are_the_same_on_every_machine():
    assert data.synthetic_stories(600, seed=1) == STORIES
    assert data.synthetic_stories(600, seed=2)[:3] != STORIES[:3]
    assert data.synthetic_stories(5, seed=1) == STORIES[:5]
    assert hashlib.sha256("\n".join(STORIES).encode()).hexdigest()[:16] == "6ed0a3db3e408912"


def test_they_are_short_different_and_of_few_words():
    assert len(set(STORIES)) == 600
    lengths = [len(story.split()) for story in STORIES]
    assert min(lengths) >= 40 and max(lengths) <= 90
    words = {word.lower() for story in STORIES for word in re.findall(r"[A-Za-z]+", story)}
    assert 250 < len(words) < 400
    assert all("{" not in story and ".." not in story for story in STORIES)
    assert not [story for story in STORIES if re.search(r"\ba [aeiou]|\ban (?!hour)[^aeiou]", story)]


def test_pronouns_agree_with_the_hero():
    for story in STORIES:
        hero = next(word for word in re.findall(r"[A-Z][a-z]+", story) if word in NAMES)
        wrong = {"he": r"\b(she|her)\b", "she": r"\b(he|him|his)\b"}[NAMES[hero]]
        assert not re.search(wrong, story.lower()), story


def test_numbers_add_up():
    kinds = {
        r"found (\w+) \w+ and \w+ found (\w+), so they had (\w+)": lambda a, b, c: a + b == c,
        r"found (\w+) \w+, \w+ found (\w+) more, and that made (\w+)": lambda a, b, c: a + b == c,
        r"found (\w+) \w+, but (\w+) were bad, so they kept (\w+)": lambda a, b, c: a - b == c,
        r"found (\w+) \w+ and gave (\w+) to \w+, so s?he had (\w+) left": lambda a, b, c: a - b == c,
        r"found (\w+) \w+, and each of them took (\w+)": lambda a, b: a == 2 * b,
    }
    seen = dict.fromkeys(kinds, 0)
    for story in STORIES:
        for kind, holds in kinds.items():
            if found := re.search(kind, story):
                numbers = [NUMBER[word] for word in found.groups()]
                assert holds(*numbers), story
                seen[kind] += 1
                if gift := re.search(r"(?:mother the|surprised by the|drew all) (\w+) \w+\.$", story):
                    assert NUMBER[gift[1]] == numbers[-1], story  # the end counts what was left
    assert min(seen.values()) > 20


def test_what_was_taken_comes_back_for_a_reason():
    helped = {text for _, _, helps in stories._THEFTS for text in helps}
    for story in STORIES:
        thing = re.search(rf"({'|'.join(stories._COLOURS)}) (lunch box|\w+)", story)[0]
        assert story.count(thing) >= 3 and re.search(rf"(gave the|got (his|her)) {thing} back", story), story
        _, reasons, helps = next(theft for theft in stories._THEFTS if thing.split(" ", 1)[1] in theft[0])
        assert any(reason in story for reason in reasons)
        assert [text for text in helped if text in story and text not in helps] == [], story


def test_the_end_answers_the_beginning():
    for beginning, end in (
        ("was afraid of the dark", "was not afraid of the dark any more"),
        ("could not swim", "how to swim"),
        ("wanted to see a rainbow", "saw a rainbow over the"),
        ("needed a gift for", "mother the"),
    ):
        told = [story for story in STORIES if re.search(rf"(?<!not ){beginning}", story.rpartition(". ")[0])]
        assert len(told) > 10
        assert all(end in story.rpartition(". ")[2] for story in told)
        assert sum(end in story.rpartition(". ")[2] for story in STORIES) == len(told)


@pytest.mark.thorough
def test_there_are_as_many_as_one_likes():
    assert len(data.synthetic_stories(30_000, seed=3)) == 30_000
