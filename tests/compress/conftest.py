"""A small labelled data set that a tiny model learns in seconds, and a recipe that walks the whole road on it."""

import random
from pathlib import Path

import pytest

from tfvllm.data import write_tsv

RECIPE = """
name: tiny
seed: 3
data: {{path: {data}, labels: {{0: negative, 1: positive}}, max_length: 16}}
teacher:
  {{layers: 2, hidden: 32, heads: 2, ffn: 64, vocabulary: 200, dropout: 0.0, epochs: 4, batch_size: 32,
   learning_rate: 5e-3}}
student: {{layers: 1}}
distill: {{epochs: 2, batch_size: 32, learning_rate: 3e-3}}
prune: {{sparsity: 0.5, end: 0.6}}
shrink: {{ffn: 0.5, epochs: 1, batch_size: 32, learning_rate: 1e-3, calibration: 64}}
export: {{}}
simplify: {{}}
benchmark: {{shapes: [[1, 8], [3, 16]], repeats: 3, warmup: 1}}
"""


def sentences(count: int, seed: int, chinese: bool = False) -> list[tuple[str, int]]:
    """Sentences whose one telling word gives the label."""
    rng = random.Random(seed)
    if chinese:
        things, good, bad = (
            ["酒店", "早餐", "房间", "电脑", "这本书"],
            ["很好", "不错", "喜欢"],
            ["太差", "失望", "难吃"],
        )
        return [
            (f"{rng.choice(things)}{rng.choice(good if i % 2 else bad)}，{rng.choice(things)}也去过。", i % 2)
            for i in range(count)
        ]
    things = ["film", "plot", "Hotel", "room", "book", "café", "staff"]
    good, bad = ["good", "Great", "lovely", "fine"], ["bad", "Awful", "dull", "poor"]
    return [
        (f"the {rng.choice(things)} was {rng.choice((bad, good)[i % 2])} , we saw the {rng.choice(things)} .", i % 2)
        for i in range(count)
    ]


def write_data(folder: Path, chinese: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, count, seed in (("train", 320, 1), ("dev", 60, 2), ("test", 40, 3)):
        write_tsv(folder / f"{name}.tsv", sentences(count, seed, chinese))
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "reviews")


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, small_data) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE.format(data=small_data), encoding="utf-8")
    return file
