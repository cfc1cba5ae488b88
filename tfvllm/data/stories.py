"""Synthetic stories: a generator's small stories, for models that generate."""

import random

# What comes later follows from what came before, so that more than the last few words is worth knowing: pronouns agree
# with names, the thief's reason decides what helps, numbers add up, and the end answers the beginning.

STORIES_NOTE = "synthetic stories, written by a generator (tfvllm.data.synthetic_stories); no person wrote them"
SHORTEST, LONGEST = 40, 90  # words

_NAMES = {
    "he": "Tom Ben Max Leo Sam Jack Finn Hugo Oscar Adam Paul Noah Felix Daniel Luke Peter Simon Oliver David Theo",
    "she": "Mia Anna Lily Emma Rosa Clara Nora Julia Ella Sara Ida Lucy Grace Maria Ruth Alice Zoe Eva Hannah Sophie",
}
_FORMS = {"he": {"he": "he", "him": "him", "his": "his"}, "she": {"he": "she", "him": "her", "his": "her"}}
_COMPANIONS = {"he": ["brother", "uncle", "cousin", "grandfather"], "she": ["sister", "aunt", "cousin", "grandmother"]}
_WHEN = ["One morning", "One day", "One spring day", "One summer day", "One autumn day", "On Sunday", "On Monday"]
# Place: how one is there, what is found there.
_PLACES = {
    "forest": ("in", ["berries", "nuts", "mushrooms", "feathers"]),
    "garden": ("in", ["apples", "flowers", "carrots", "pears"]),
    "park": ("in", ["leaves", "flowers", "nuts"]),
    "beach": ("at", ["shells", "stones", "crabs"]),
    "market": ("at", ["eggs", "pears", "candles"]),
    "farm": ("on", ["eggs", "carrots", "apples"]),
    "hill": ("on", ["stones", "berries", "flowers"]),
    "river": ("by", ["stones", "frogs", "feathers"]),
    "lake": ("by", ["shells", "feathers", "frogs"]),
}
_HIDING = [
    "behind a rock",
    "in a hollow tree",
    "under a bridge",
    "in an old boat",
    "behind a wall",
    "in the tall grass",
]
_COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "pink"]
_SIZES = ["small", "little", "young", "old", "clever", "quick", "shy"]
_ANIMALS = ["fox", "dog", "cat", "monkey", "crow", "goat", "rabbit", "squirrel", "bear", "donkey", "magpie", "mouse"]
# What is taken, why, and what helps then.
_THEFTS = [
    (
        ["scarf", "coat", "hat", "blanket", "sweater"],
        ["it was cold", "it was freezing", "it had no warm bed"],
        ["made it a bed of dry leaves", "lit a small fire for it", "gave it an old sock to sleep in"],
    ),
    (
        ["key", "bell", "ring", "spoon", "coin", "button"],
        ["it liked shiny things", "its nest needed something that shines"],
        ["gave it a piece of glass", "gave it a shiny nail", "polished a stone for it"],
    ),
    (
        ["ball", "kite", "drum", "boat", "doll", "whistle"],
        ["it wanted to play", "it had no toys", "nobody played with it"],
        ["played with it for an hour", "threw sticks for it", "ran races with it"],
    ),
    (
        ["basket", "bag", "sack", "lunch box"],
        ["it was hungry", "it had not eaten all day", "its children were hungry"],
        ["gave it some bread", "shared a lunch with it", "brought it a bowl of milk"],
    ),
]
# What the hero is or wants at first, and how that ends.
_ARCS = [
    ("{he} had nobody to play with", "{hero} had a new friend, the {animal}"),
    ("{he} wanted to have a friend", "the {animal} was {his} friend"),
    ("{he} was afraid of the dark", "{hero} was not afraid of the dark any more"),
    ("{he} was afraid of animals", "{hero} was not afraid of animals any more"),
    ("{he} was angry with {companion}", "{hero} was not angry with {companion} any more"),
    ("{he} was very bored", "{hero} was not bored any more"),
    ("{he} was sad", "{hero} was happy again"),
    ("{he} could not swim", "the {animal} taught {him} how to swim"),
    ("{he} could not whistle", "the {animal} taught {him} how to whistle"),
    ("{he} wanted to see a rainbow", "{hero} saw a rainbow over the {place}"),
    ("{he} wanted to learn a song", "the {animal} sang a song for {him}"),
    ("{he} had lost {his} way twice before", "{hero} found the way home alone"),
]
# The same, where things are found: the end counts them.
_GIFTS = [
    ("{he} needed a gift for {his} mother", "{he} gave {his} mother the {left} {items}"),
    ("{he} wanted to surprise {his} teacher", "{his} teacher was surprised by the {left} {items}"),
    ("{he} wanted to draw what {he} found", "{he} drew all {left} {items}"),
]
_WEATHER = [
    ("It had rained all night, so the path was wet", ["{he} fell into the mud", "{his} shoes became wet"]),
    ("The sun was hot, so they were thirsty", ["they drank cold water", "they rested under a tree"]),
    ("The wind was strong, so the trees bent", ["a branch fell beside {him}", "{he} held {companion} by the hand"]),
    ("The fog was thick, so they saw little", ["{he} walked slowly", "{companion} carried a lamp"]),
]
_NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class _Writer:
    """Chooses who, where and what of one story, then tells it."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        gender, other = rng.choice(["he", "she"]), rng.choice(["he", "she"])
        hero = rng.choice(_NAMES[gender].split())
        friend = rng.choice([name for name in _NAMES[other].split() if name != hero])
        place = rng.choice(list(_PLACES))
        things, reasons, helps = rng.choice(_THEFTS)
        colour = rng.choice(_COLOURS)
        self.words = {
            **_FORMS[gender],
            "hero": hero,
            "companion": friend,
            "relation": rng.choice(_COMPANIONS[other]),
            "place": place,
            "at": f"{_PLACES[place][0]} the {place}",
            "thing": f"{colour} {rng.choice(things)}",
            "animal": rng.choice(_ANIMALS),
            "items": rng.choice(_PLACES[place][1]),
            "hiding": rng.choice(_HIDING),
            "reason": rng.choice(reasons),
            "help": rng.choice(helps),
        }
        self.words["a_thing"] = _article(self.words["thing"])
        self.words["an_animal"] = _article(f"{rng.choice(_SIZES)} {self.words['animal']}")

    def say(self, *forms: str) -> str:
        """One of the forms, filled in, as a sentence."""
        words = self.rng.choice(forms).format(**self.words)
        return words[0].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")

    def found(self) -> str:
        """A sentence that adds, takes away or shares; `left` is what it comes to."""
        first, second = self.rng.randint(2, 10), self.rng.randint(2, 10)
        kind = self.rng.choice(["add", "take", "share"])
        if kind == "add":
            left, numbers = first + second, (first, second, first + second)
            forms = ["{hero} found {0} {items} and {companion} found {1}, so they had {2} together",
                     "{companion} found {0} {items}, {hero} found {1} more, and that made {2}"]  # fmt: skip
        elif kind == "take":
            left, numbers = first, (first + second, second, first)
            forms = ["they found {0} {items}, but {1} were bad, so they kept {2}",
                     "{hero} found {0} {items} and gave {1} to {companion}, so {he} had {2} left"]  # fmt: skip
        else:
            left, numbers = first, (2 * first, first, first)
            forms = ["they found {0} {items}, and each of them took {1}"]
        self.words["left"] = _NUMBERS[left]
        words = self.rng.choice(forms).format(*[_NUMBERS[number] for number in numbers], **self.words)
        return words[0].upper() + words[1:] + "."

    def opening(self) -> list[str]:
        """Who, where, and the thing that will be missed."""
        when = self.rng.choice(_WHEN)
        if self.rng.random() < 0.5:
            return [
                self.say(
                    f"{when} {{hero}} took {{his}} {{thing}} to the {{place}}",
                    f"{when} {{hero}} was {{at}} with {{his}} {{thing}}",
                ),
                self.say("{his} {relation} {companion} came too", "{companion}, {his} {relation}, was with {him}"),
            ]
        return [
            self.say(
                f"{when} {{hero}} went to the {{place}} with {{his}} {{relation}} {{companion}}",
                f"{when} {{hero}} and {{his}} {{relation}} {{companion}} were {{at}}",
            ),
            self.say("{he} had {a_thing} with {him}", "{he} carried {a_thing}"),
        ]

    def theft(self) -> list[str]:
        """The thing is taken, and why."""
        if self.rng.random() < 0.4:
            return [
                self.say(
                    "{an_animal} took the {thing} because {reason}", "{an_animal} stole {his} {thing}, since {reason}"
                )
            ]
        return [
            self.say(
                "then {an_animal} took the {thing} and hid {hiding}",
                "suddenly {an_animal} was gone with the {thing}",
                "while they rested, {an_animal} stole the {thing}",
            ),
            self.say(
                "they found the {animal} {hiding}, and {companion} saw why: {reason}",
                "{hero} asked why, and the {animal} said that {reason}",
                '"Why did you take it?" {hero} asked. The {animal} said that {reason}',
            ),
        ]

    def story(self) -> str:
        """All of it."""
        opening, counted = self.opening(), self.found() if self.rng.random() < 0.6 else None
        begin, end = self.rng.choice(_ARCS + 2 * _GIFTS if counted else _ARCS)
        told = [*opening, self.say(begin)]
        if self.rng.random() < (0.3 if counted else 0.7):
            cause, effects = self.rng.choice(_WEATHER)
            told.append(self.say(*[f"{cause}, and {effect}" for effect in effects]))
        if counted:
            told.append(counted)
        return " ".join(
            [
                *told,
                *self.theft(),
                self.say(
                    "so {he} {help}, and the {animal} gave the {thing} back",
                    "{he} {help}, and so {he} got {his} {thing} back",
                ),
                self.say(f"in the end {end}", f"that evening {end}", f"before they went home, {end}"),
            ]
        )


def synthetic_stories(count: int, seed: int) -> list[str]:
    """Writes `count` different synthetic stories of 40 to 90 words, the same ones for the same `seed`.

    Of a few hundred words; yet what a pronoun, a colour, a number or the end has to be was decided sentences before.
    These stories are synthetic: they show that the road works, not how good a model is on what people write.

    Args:
        count: how many.
        seed: of `random.Random`, which is the same on every platform.

    Returns:
        Stories of one paragraph each, in a random order.

    Example:
        >>> from tfvllm.data import synthetic_stories
        >>> stories = synthetic_stories(10, seed=1)
        >>> len(set(stories)), stories == synthetic_stories(10, seed=1)
        (10, True)
    """
    rng = random.Random(seed)
    stories: dict[str, None] = {}
    while len(stories) < count:
        story = _Writer(rng).story()
        if SHORTEST <= len(story.split()) <= LONGEST:
            stories[story] = None
    return list(stories)
