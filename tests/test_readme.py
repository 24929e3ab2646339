"""What the README tells people to type works."""

import re
from pathlib import Path

import numpy as np

from fastkd import pipeline, recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAX_LINES = 130


def block(text: str, language: str, containing: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if containing in b]
    assert len(found) == 1
    return found[0]


def test_the_ten_line_writer_writes(tmp_path):
    text = block((ROOT / "docs" / "writers.md").read_text(), "python", "class Options(WriterOptions)")
    assert len([line for line in text.splitlines() if line.strip()]) <= 12
    (tmp_path / "my_writer.py").write_text(text)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        np.save(tmp_path / f"{split}_images.npy", rng.integers(0, 256, (count, 9, 9), dtype=np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count) % 2)
    dataset, _ = pipeline.write(str(tmp_path / "my_writer.py"), tmp_path / "mine", {"root": str(tmp_path)})
    assert dataset.facts["counts"] == {"train": 12, "val": 4}
    assert dataset.facts["classes"] == ["no", "yes"]


def test_the_recipe_of_the_tour_is_valid(tmp_path):
    (tmp_path / "mine.yaml").write_text(block(README, "yaml", "name: mine"))
    assert recipe.load(tmp_path / "mine.yaml", ["train.epochs=10", "prune.method=random"]).train.epochs == 10


def test_the_readme_names_every_recipe_and_no_placeholder_is_left():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README or path.stem.endswith("_teacher")
    assert not re.search(r"\b(DEMO|LABELS|PRUNE|STUDY)_[A-Z]+", README)


def test_the_readme_is_one_screen_after_another():
    """Status and the two commands come first; nothing makes it longer than people read."""
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    first = "\n".join(lines[:35])
    assert "No part of it has run on a GPU" in first
    assert "make demo" in first
    assert "make test" in first


def test_every_file_that_readme_and_contributing_name_exists():
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)} - {""}
        named = set(re.findall(r"`((?:fastkd|tests|docs|writers)/[\w./]+)`", text))
        assert [one for one in sorted(links | named) if not (ROOT / one).exists()] == []
