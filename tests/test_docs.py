"""The documentation: what it tells people to type works, its generated parts are as the code is, and it builds."""

import argparse
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import yaml
from harness import command_file, seconds
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

from fastkd import artifacts, cli, models, recipe
from fastkd.__main__ import COMMANDS
from fastkd.study.grid import read_study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / name for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for name in entry.values()]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#]*)(#[^)]*)?\)")

PARSED_ONLY = {
    "bench": "measures for minutes; tests/bench runs each on little data",
    "doctor": "tells of the machine that it runs on, and so does its exit code; tests/test_doctor.py",
    "export data/pets.artifacts/subset-KEY pets_hf": "needs the library datasets; tests/export",
    "export runs/quickstart": "takes 4 s, and the first page's command that makes the same of another RUN is run",
    "report runs/quickstart": "takes 6 s; likewise",
    "report runs/savings": "takes 6 s; likewise, and tests/report compares RUNs",
    "study mine.yaml": "trains for a minute; tests/study runs one",
    "write image_folder data/imagenet root=~/imagenet max": "needs class folders of val; the same with others is run",
    "write fashion_mnist": "reads files that not every machine has, or downloads 30 MB; tests/writers",
}
"""Beginnings of commands that are not run here, and why; their arguments, options and recipes are parsed."""
HAS_DATASETS = importlib.util.find_spec("datasets") is not None
if not HAS_DATASETS:
    PARSED_ONLY["write hf_dataset"] = "needs the library datasets; tests/writers"

# What the pages call by these names, small: three classes that no teacher is trained for.
RECIPE = """
name: {name}
data: {{path: data/pets, input_px: 16, view: {{family: {family}}}}}
teacher: {{model: cifar/resnet8, weights: my_teacher.safetensors}}
prune: {{keep_ratio: 0.5}}
labels: {{views: {views}}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.01}}
train: {{epochs: 2, batch_size: 10, compile: false, precision: fp32, device: cpu}}
"""
FINETUNE = """
name: finetune_teacher
data: {path: data/pets, input_px: 16}
student: {model: cifar/resnet8, weights: my_teacher.safetensors, head: new}
optim: {lr: 0.01}
train: {epochs: 1, batch_size: 10, compile: false, precision: fp32, device: cpu}
"""
RECIPES = {
    "mine": {"family": "none", "views": "epochs"},
    "recipes/quickstart": {"family": "none", "views": "plain"},
    "recipes/rn50_r18": {"family": "random_resized_crop_flip", "views": 2},
}


@pytest.fixture(scope="module")
def generate():
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What is written ------------------------------------------------------------------------------------------------------


def test_the_generated_parts_are_as_the_code_is(generate):
    """Else: python docs/generate.py."""
    used = set()
    for page in [*PAGES, DOCS.parent / "README.md"]:
        text = page.read_text()
        used |= {name for _, name, _ in generate.MARKED.findall(text)}
        assert text == generate.renewed(text), f"{page.name} is stale: python docs/generate.py"
    assert used == set(generate.PARTS)


def test_every_key_of_a_recipe_has_a_meaning(generate):
    """In the code, where the pages, the schema and editors find it."""
    rows = [line.split(" | ") for line in generate.recipe_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [key for key, *_, meaning in rows if meaning.strip(" |") == ""]


def test_every_command_is_told_of_and_no_other():
    """On the page of commands, with an example; a name that is no command is nowhere."""
    commands = (DOCS / "commands.md").read_text()
    for name in COMMANDS:
        assert f"\n## {name}\n" in commands
        assert re.search(rf"^python -m fastkd\.{name}\b", commands, re.MULTILINE)
    for page in PAGES:
        assert set(re.findall(r"python -m fastkd\.(\w+)", page.read_text())) <= {*COMMANDS, "NAME"}


def test_the_page_of_commands_has_the_values_that_options_take():
    """Choices, types and bounds, as ``--help`` shows them."""
    lines = (DOCS / "commands.md").read_text().splitlines()

    def values(option: str) -> set[str]:
        return {line.split(" | ")[1] for line in lines if line.startswith(f"| `{option}`")}

    assert values("--reference") == {"`none`, `measure`, `full`"}
    assert values("--top") == {"integer ≥ 1"}
    assert values("--node-gb-s") == {"number ≥ 0.001"}
    assert values("--vary") == {"`KEY=A,B,…`"}
    assert values("--json") == {"–"}


def test_all_pages_are_in_the_nav_and_links_lead_somewhere():
    """Links to files here; those to headings are followed by Zensical, below."""
    assert sorted(PAGES) == sorted(DOCS.glob("*.md"))
    for page in PAGES:
        for target, _ in LINK.findall(FENCED.sub("", page.read_text())):
            assert not target.startswith("http"), "nothing here leans on the network"
            assert not target or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_network(tmp_path):
    """Pages, styles, scripts and pictures lie in the site; only links may lead out of it."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed: pip install -c constraints.txt -e '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=seconds(120),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / page.name).with_suffix(".html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", html)
        assert loaded
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)]


@pytest.mark.parametrize("page", [p for p in PAGES if "```yaml" in p.read_text()], ids=lambda page: page.name)
def test_recipes_on_the_pages_are_valid(page, tmp_path):
    """As they stand there."""
    for language, text in FENCED.findall(page.read_text()):
        if language == "yaml" and "\nvary:" in text:
            (tmp_path / "study.yaml").write_text(text)
            assert read_study(str(tmp_path / "study.yaml"), {}).vary
        elif language == "yaml":
            (tmp_path / "mine.yaml").write_text(text)
            assert recipe.load(tmp_path / "mine.yaml").name


# What is to be typed --------------------------------------------------------------------------------------------------


def blocks_of(page: Path) -> list[str]:
    """Return a page's blocks of commands, with lines that go on as one."""
    found = [text for language, text in FENCED.findall(page.read_text()) if language in ("bash", "")]
    return [text.replace("\\\n", " ") for text in found]


def commands_of(page: Path) -> list[str]:
    """Return what follows ``python -m fastkd.`` on the lines of a page's blocks."""
    lines = [line for block in blocks_of(page) for line in block.splitlines()]
    return [line.removeprefix("python -m fastkd.") for line in lines if line.startswith("python -m fastkd.")]


def words_of(command: str) -> list[str]:
    """Split as a shell does, up to a redirection; a key, or one that stands for it, becomes what there is."""
    words = []
    for word in shlex.split(command, comments=True):
        if word == ">":
            break
        pattern = re.sub(r"(?<=-)(KEY|[0-9a-f]{8,12})\b", "*", word)
        found = [path for path in glob(pattern) if (Path(path) / artifacts.MANIFEST).exists()]
        found.sort(key=lambda path: (Path(path) / artifacts.MANIFEST).stat().st_mtime_ns)  # a KEY is the first one made
        assert found or "*" not in pattern, f"{command}: there is no {word}"
        words += found if "*" in word else found[:1] if "*" in pattern else [word]
    return words


def run(command: str, *, parse_only: bool = False) -> None:
    """Run a command in this process as ``python -m`` does, or only have it parsed; it must end with 0."""
    name, *words = words_of(command)
    parse_only = parse_only or any(command.startswith(one) for one in PARSED_ONLY)
    told = io.StringIO()
    with contextlib.ExitStack() as stack:
        if parse_only:
            stack.enter_context(mock.patch.object(cli, "as_command", parsed(cli.as_command)))
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parsed_by_argparse))
        stack.enter_context(mock.patch.object(sys, "argv", [name, *words]))
        stack.enter_context(contextlib.redirect_stdout(told))
        stack.enter_context(contextlib.redirect_stderr(told))
        stop = stack.enter_context(pytest.raises(SystemExit))
        runpy.run_path(command_file(name), run_name="__main__")
    assert not stop.value.code, f"python -m fastkd.{command}: exit code {stop.value.code}\n{told.getvalue()}"


def parsed(as_command: Callable[..., Callable[..., None]]) -> Callable[..., Callable[..., None]]:
    """Make commands that do nothing, but for loading the recipe that they would."""

    def idle(command: Callable[..., cli.CommandResult], *, together: bool = False) -> Callable[..., None]:
        @functools.wraps(command)
        def nothing(**given):
            if "overrides" in given:
                recipe.load(given["path"], given["overrides"] or ())

        return as_command(nothing)

    return idle


def parsed_by_argparse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
    unknown = parser.parse_known_args(arguments)[1]
    sys.exit(2 if unknown else 0)


def python_blocks(page: str) -> list[str]:
    return [text for language, text in FENCED.findall((DOCS / page).read_text()) if language == "python"]


def furnish(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Put everything there that the pages take for granted."""
    for split, images, labels in (("train", "images", "labels"), ("val", "val_images", "val_labels")):
        for number, (image, label) in enumerate(zip(arrays[images][:60], arrays[labels], strict=False)):
            file = folder / "home" / "pets" / split / ("cat", "dog", "fox")[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    furnish_formats(folder, folder / "home" / "pets")
    shutil.copytree(folder / "home" / "pets" / "val" / "cat", folder / "photos")
    shutil.copy(folder / "photos" / "0.png", folder / "boot.png")
    (folder / "home" / "mine").mkdir()
    for split, count in (("train", 12), ("val", 4)):
        np.save(folder / "home" / "mine" / f"{split}_images.npy", arrays["images"][:count])
        np.save(folder / "home" / "mine" / f"{split}_labels.npy", np.arange(count) % 2)
    np.savez(folder / "mine.npz", **arrays)
    logits = np.random.default_rng(0).standard_normal((90, 3)).astype(np.float32)
    for names, array in ((("logits", "Z"), logits), (("labels", "Y"), np.arange(90) % 3)):
        for name in names:
            np.save(folder / f"{name}.npy", array)
    np.save(folder / "pets_logits.npy", logits[:60])
    (folder / "my_writer.py").write_text(python_blocks("writers.md")[0])
    models.save_weights(models.build("cifar/resnet8", 3), folder / "my_teacher.safetensors")
    (folder / "recipes").mkdir()
    for name, settings in RECIPES.items():
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=Path(name).name, **settings))
    (folder / "recipes" / "finetune_teacher.yaml").write_text(FINETUNE)


def furnish_formats(folder: Path, pets: Path) -> None:
    """Put the images of a folder there in the other formats that writers read."""
    shutil.copytree(pets / "train", folder / "home" / "all_pets" / "train")
    shutil.copytree(pets / "train", folder / "home" / "flat" / "train")
    (folder / "home" / "flat" / "val").mkdir()
    rows, labels = ["image,label,split"], []
    for file in sorted(pets.glob("*/*/*.png")):
        split, name = file.parts[-3:-1]
        rows.append(f"{file.relative_to(folder)},{name},{split}")
        if split == "val":
            shutil.copy(file, folder / "home" / "flat" / "val")
            labels.append(f"{file.name} {name}")
    (folder / "pets.csv").write_text("\n".join(rows))
    (folder / "home" / "flat" / "val.txt").write_text("\n".join(labels))
    furnish_imagenet(folder / "home", labels)
    if HAS_DATASETS:
        furnish_datasets(folder, pets)
    (folder / "shards").mkdir()
    for number in range(2):
        with tarfile.open(folder / "shards" / f"pets-{number:03}.tar", "w") as archive:
            for file in sorted((pets / "train").glob("*/*.png"))[number::2]:
                archive.add(file, f"{file.stem}.png")
                label = tarfile.TarInfo(f"{file.stem}.cls")
                label.size = 3
                archive.addfile(label, io.BytesIO(file.parent.name.encode()))


def furnish_imagenet(home: Path, labels: list[str]) -> None:
    """Put the folder without class folders of val there as ImageNet, and the devkit with its classes."""
    names, data = ("cat", "dog", "fox"), home / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (home / "imagenet").symlink_to("flat")
    ids = [f"{1 + names.index(line.split()[1])}\n" for line in sorted(labels)]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(ids))
    synsets = np.array(list(enumerate(names, 1)), [("ILSVRC2012_ID", object), ("WNID", object)])
    scipy.io.savemat(data / "meta.mat", {"synsets": synsets.reshape(-1, 1)})


def furnish_datasets(folder: Path, pets: Path) -> None:
    """Put the images there as the library `datasets` saves them."""
    import datasets

    names = ["cat", "dog", "fox"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, part in (("train", "train"), ("test", "val")):
        files = sorted((pets / part).glob("*/*.png"))
        columns = {"image": [str(file) for file in files], "label": [names.index(file.parent.name) for file in files]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder / "pets_hf")


@pytest.fixture(scope="module")
def after_the_first_page(tiny_npz, tmp_path_factory):
    """A folder in which the first page's commands have been run: what the other pages go on from."""
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder, dict(np.load(tiny_npz)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        for command in commands_of(PAGES[0]):
            run(command)
    (folder / "data" / "cifar10.artifacts").symlink_to("pets.artifacts")
    (folder / "runs" / "savings-quickstart").mkdir()
    for number, path in enumerate(sorted((folder / "runs").glob("mine-????????"))):
        (folder / "runs" / "savings-quickstart" / f"medium-seed{number}").symlink_to(Path("..") / path.name)
    return folder


@pytest.fixture
def reader(after_the_first_page, tmp_path, monkeypatch):
    """A copy of that folder, to work in, and the same home."""
    shutil.copytree(after_the_first_page, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.setenv("HOME", str(after_the_first_page / "home"))


def test_the_first_pages_commands_do_what_it_says(after_the_first_page):
    """A data set, two students, a report and an export come of it."""
    assert artifacts.load(after_the_first_page / "data" / "pets", "DATASET").facts["counts"]["train"] == 60
    assert len(list(after_the_first_page.glob("runs/mine-????????/student.safetensors"))) == 2
    assert list(after_the_first_page.glob("runs/mine-????????.report/report.html"))
    assert (after_the_first_page / "pets_student" / "student.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    "page", [*[p for p in PAGES[1:] if commands_of(p)], ROOT / "README.md"], ids=lambda page: page.name
)
def test_every_command_of_a_page_works(page, reader):
    """In order, as it stands there, on data and recipes that are small and bear the names of the page."""
    for command in commands_of(page):
        run(command)


@pytest.mark.parametrize(
    "page", [p for p in [*PAGES, ROOT / "README.md"] if "torchrun --" in p.read_text()], ids=lambda page: page.name
)
def test_every_torchrun_line_of_a_page_is_one(page, reader):
    """By torchrun's own parser; what it is to start is parsed too. tests/distributed starts some."""
    lines = [line for text in blocks_of(page) for line in text.splitlines() if re.match(r"(srun )?torchrun ", line)]
    assert lines
    for line in lines:
        given = torchrun_parser().parse_args(shlex.split(line.partition("torchrun ")[2]))
        assert given.module
        assert given.training_script.startswith("fastkd.")
        words = [given.training_script.removeprefix("fastkd."), *given.training_script_args]
        run(shlex.join(words), parse_only=True)


def test_the_python_of_the_page_about_it_runs(reader):
    """Every block, one after the other."""
    names: dict[str, object] = {}
    for block in python_blocks("api.md"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "api.md", "exec"), names)
    assert names["hits"] >= 0
    assert names["again"].key == names["run"].key


def test_the_python_of_the_page_of_exports_reads_them(reader):
    """Each block, of what the page's commands have made."""
    blocks = python_blocks("exports.md")
    commands = commands_of(DOCS / "exports.md")
    shutil.rmtree("pets_hf", ignore_errors=True)  # a command makes it
    if not HAS_DATASETS:
        blocks, commands = blocks[:2], [command for command in commands if "--format hf" not in command]
    names: dict[str, object] = {}
    with mock.patch.dict(PARSED_ONLY, {}, clear=True):
        for command in commands:
            run(command)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        for block in blocks:
            exec(compile(block, "exports.md", "exec"), names)
    read = {sample_id: (image, label, row) for image, label, row, sample_id in names["samples"]("pets_shards")}
    assert len(read) == len(names["images"]) > 20
    arrays = [names[name] for name in ("images", "labels", "logits", "sample_ids")]
    for image, label, row, sample_id in zip(*arrays, strict=True):
        assert np.abs(read[sample_id][0].astype(int) - image).mean() < 3  # Pillow's and FFCV's decoders
        assert read[sample_id][1] == label
        assert np.array_equal(read[sample_id][2], row)
    assert len(told.getvalue().splitlines()) == len(read) + len(blocks) - 2


def test_no_exception_is_made_for_nothing_and_a_wrong_command_is_noticed(reader):
    """Also among those that are only parsed."""
    told = [command for page in [*PAGES, ROOT / "README.md"] for command in commands_of(page)]
    for beginning in PARSED_ONLY:
        assert any(command.startswith(beginning) for command in told)
    for wrong in (
        "bench plan mine.yaml --nonsense",
        "bench plan",
        "doctor --nonsense",
        "train mine.yaml --nonsense",
        "artifacts lost",
    ):
        with pytest.raises(AssertionError, match="exit code 2"):
            run(wrong)
    with pytest.raises(Exception, match="unknown key"):
        run("bench plan mine.yaml trian.epochs=3")
