"""The recipes that ship: listed, shown, copied, described to editors."""

import json
from pathlib import Path

import pytest

from fastkd import recipe, recipes

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """Return a function that runs ``fastkd.recipes`` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    functions = {"list": recipes.list_, "show": recipes.show, "copy": recipes.copy, "schema": recipes.schema}
    return lambda name, *arguments: command(functions[name], name, *arguments, named=True)


def test_list_tells_each_recipe_with_a_whole_sentence(run):
    """The first of the comment at its top, which may take several lines there."""
    code, text = run("list", "--json")
    assert code == 0
    told = {one["name"]: one["about"] for one in json.loads(text.splitlines()[0])["recipes"]}
    assert set(told) == {file.stem for file in SHIPPED}
    for file in SHIPPED:
        about = told[file.stem]
        assert about.endswith(".")
        assert about[:60] == file.read_text()[2:62]
        assert about.count("(") == about.count(")")
        assert about in " ".join(file.read_text().split("\n#\n")[0].replace("\n#", "").removeprefix("# ").split())
    assert told["quickstart"].endswith("half of the data.")
    code, text = run("list")
    assert "".join(told["rn50_r18"].split()) in "".join(text.split())


def test_show_prints_a_recipe_as_it_is(run):
    """With or without .yaml; one that is unknown is an error with the nearest."""
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert run("show", name) == (0, (ROOT / "recipes" / "quickstart.yaml").read_text())
    code, text = run("show", "quickstrat")
    assert code == 2
    assert "there is no included recipe of that name; did you mean 'quickstart'?" in text


def test_copy_takes_the_teacher_along_and_overwrites_nothing(run, tmp_path):
    """What was copied loads; a file of one's own stays, and then nothing at all is copied."""
    assert run("copy", "quickstart")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"quickstart.yaml", "quickstart_teacher.yaml", "recipe.schema.json"}
    loaded = recipe.load("quickstart.yaml")
    assert recipe.load(loaded.teacher.recipe).name == "quickstart-teacher"
    code, text = run("copy", "quickstart")
    assert code == 0
    assert "all files exist already" in text
    Path("rn50_r18.yaml").write_text("mine")
    (tmp_path / "recipe.schema.json").unlink()
    code, text = run("copy", "rn50_r18")
    assert code == 2
    assert "rn50_r18.yaml: exists with other contents" in text
    assert Path("rn50_r18.yaml").read_text() == "mine"
    assert not Path("recipe.schema.json").exists()


def test_the_schema_is_that_of_the_recipes_and_each_recipe_names_it(run):
    """Make it anew: python -m fastkd.recipes schema > recipes/recipe.schema.json."""
    file = ROOT / "recipes" / recipes.SCHEMA
    assert run("schema") == (0, file.read_text())
    for path in SHIPPED:
        assert f"\n# yaml-language-server: $schema={file.name}\n" in path.read_text()


def test_the_schema_knows_every_key_its_meaning_and_what_is_wrong():
    """So that an editor can complete, explain and underline."""
    schema = recipe.schema()
    prune = schema["$defs"]["Prune"]
    assert prune["additionalProperties"] is False
    assert "infobatch" in prune["properties"]["method"]["enum"]
    assert prune["properties"]["drop_ratio"] == {
        "default": 0.1,
        "description": "Share of the hardest samples that `ccs` drops first.",
        "exclusiveMaximum": 1,
        "minimum": 0,
        "title": "Drop Ratio",
        "type": "number",
    }
    assert set(schema["required"]) == {"name", "data", "student", "optim", "train"}
