"""The page about runs: what it says, what it leaves out and why, and that nothing from outside gets in unescaped."""

import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from harness import seconds
from matplotlib.font_manager import findfont, get_font
from PIL import Image

from fastkd import artifacts, pipeline, recipe
from fastkd.errors import ArtifactError, InputError
from fastkd.pipeline import Pipeline
from fastkd.report import __main__ as command_module
from fastkd.report import builder, fonts, plots
from fastkd.report.inspection import Inspector, Selection, flaw_of
from fastkd.report.plots import ends
from fastkd.report.runs import differing, exports, grouped, noise_points, read, variant
from fastkd.report.summary import busy_note, conclusion, summarised
from fastkd.report.template import breakable

NAMES = ["<script>alert(1)</script>", '$x_1$ & "co"', "plain"]
"""Of the classes: what would run, what matplotlib would take for mathematics, and a peaceful one."""

BLACK_AND_FLAT = (4, 7)


@pytest.fixture(scope="module")
def place(tiny_npz, tmp_path_factory) -> Path:
    """A folder with a DATASET and a teacher's recipe."""
    folder = tmp_path_factory.mktemp("reported")
    arrays = dict(np.load(tiny_npz))
    arrays["images"][BLACK_AND_FLAT[0]], arrays["images"][BLACK_AND_FLAT[1]] = 0, (90, 130, 20)
    np.savez(folder / "named.npz", **arrays, classes=np.array(NAMES))
    pipeline.write("arrays", folder / "data", {"file": str(folder / "named.npz"), "workers": 1})
    (folder / "teacher.yaml").write_text(
        f"""
name: teacher
data: {{path: {folder / "data"}}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 2, batch_size: 30, compile: false}}
"""
    )
    (folder / "student.yaml").write_text(
        f"""
name: student
data: {{path: {folder / "data"}, holdout_ratio: 0.2}}
teacher: {{recipe: teacher.yaml}}
prune: {{method: medium, keep_ratio: 0.5}}
student: {{model: cifar/resnet8}}
optim: {{lr: 0.05}}
train: {{epochs: 3, batch_size: 20, compile: false, eval_every_epochs: 1, runs_dir: {folder / "runs"}}}
log: {{every_steps: 1}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Path]:
    """Two seeds of one way, vanilla KD, and the teacher itself."""

    def train(*overrides: str) -> Path:
        return pipeline.train(recipe.load(place / "student.yaml", overrides))[0].path

    live = "labels={mode: online, reshape: false}"
    found = {"seed0": train(), "seed1": train("seed=1"), "vanilla": train(live, "prune.keep_ratio=1")}
    (found["teacher"],) = (place / "runs").glob("teacher-*[0-9a-f]")
    return found


@pytest.fixture(scope="module")
def page(runs, place) -> Path:
    """The page about all of them."""
    return builder.report([runs["seed0"], runs["seed1"], runs["vanilla"]], place / "page")


class Reader(HTMLParser):
    """Collects tags, their attributes and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(page: Path) -> Reader:
    return Reader(page.read_text())


# --- what the page holds ----------------------------------------------------------------------------------------------


def test_the_page_tells_what_the_runs_hold(page, runs):
    """Top-1 and both times stand on the page as the RUNs have them."""
    told = " ".join(read_page(page).text.split())
    both = [read(runs[name]) for name in ("seed0", "seed1")]
    top1 = [100 * one.top1 for one in both]
    assert f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}" in told
    further = [one.timing["further_student_s"] for one in both]
    assert f"{np.mean(further):.1f} ± {np.std(further, ddof=1):.1f}" in told
    assert "vanilla KD" in told
    assert "Relative to vanilla KD, an additional student of medium, keep 0.5 takes" in told
    for run in both:
        assert run.artifact.key in told or run is both[1]


def test_the_page_needs_nothing_else(page):
    """No address but of the page itself and of data it carries, and one script, its own."""
    reader = read_page(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", page.read_text())
    assert len(reader.all("script")) == 1


def test_what_comes_from_outside_is_escaped(page):
    """Class names are text: in tables, pictures' words and charts."""
    text = page.read_text()
    assert "<script>alert" not in text
    reader = read_page(page)
    assert any(NAMES[0] in image["alt"] for image in reader.all("img"))
    assert reader.text.count(NAMES[0]) >= 3  # axes of two charts, and tables
    assert NAMES[1] in reader.text


def test_ids_are_unique_and_pictures_have_words(page):
    """What a screen reader goes by is there."""
    reader = read_page(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(image.get("alt") for image in reader.all("img"))
    charts = [attributes for _, attributes in reader.tags if attributes.get("role") == "img"]
    assert len(charts) >= 7
    assert all(chart.get("aria-label") for chart in charts)
    assert all(head.get("scope") in ("col", "row") for head in reader.all("th"))


def test_charts_follow_the_theme_and_lie_beside_the_page(page):
    """In the page no colour is fixed; as PNG none is blank."""
    text = page.read_text()
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "var(--ink)" in chart or "var(--muted)" in chart
        assert not re.search(r"(?:fill|stroke): ?#(?!ffffff|000000)[0-9a-f]{6}", chart), chart[:200]
    files = sorted(page.parent.glob("*.png"))
    assert [file.stem for file in files] == [
        "accuracy-by-class", "classes", "data-wait", "difficulty", "loss", "samples", "time", "top1-over-epochs",
        "top1-over-time",
    ]  # fmt: skip
    for file in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("L"), np.float64)
        assert pixels.var() > 50, file.name
        assert min(pixels.shape) > 200


def test_contrast_is_enough_in_both_themes():
    """WCAG AA: 4.5 for text, 3 for lines and marks, on the panel and on the paper."""
    from fastkd.report.plots import PALETTE

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
        )

    for theme in (0, 1):
        for ground in ("paper", "panel"):
            for name, least in {"ink": 7, "muted": 4.5, **dict.fromkeys(("blue", "teal", "plum", "olive"), 3)}.items():
                a, b = sorted(luminance(PALETTE[n][theme]) for n in (name, ground))
                assert (b + 0.05) / (a + 0.05) >= least, (name, ground, theme)


def test_accuracy_by_class_is_the_runs_own(page, runs):
    """What the page measures again is what the RUN recorded."""
    run = read(runs["seed0"])
    found = Inspector(run).accuracy_by_class()
    assert found.student_top1 == pytest.approx(run.top1, abs=1e-6)
    assert found.teacher_top1 == pytest.approx(read(runs["teacher"]).top1, abs=1e-6)
    assert found.count.sum() == 60


def test_samples_are_of_their_difficulty_and_side(runs):
    """Easy ones score below hard ones, kept ones are in the SUBSET, and each shows its own pixels."""
    inspector = Inspector(read(runs["seed0"]))
    kept = set(np.asarray(inspector.selection.subset.array("indices.npy")).tolist())
    easy, _, hard = inspector.samples()
    for group in (easy, hard):
        assert {one.sample_id for one in group.kept} <= kept
        assert not {one.sample_id for one in group.dropped} & kept
    assert np.median([s.score for s in easy.dropped]) < np.median([s.score for s in hard.dropped])
    uris = [one.uri for group in (easy, hard) for one in group.dropped]
    assert len(set(uris)) == len(uris)


# --- several runs -----------------------------------------------------------------------------------------------------


def test_another_loss_is_named_and_is_not_vanilla_kd(place):
    def title(*overrides: str) -> str:
        return variant(recipe.load(place / "student.yaml", overrides).model_dump(mode="json"))

    vanilla = ("labels={mode: online, reshape: false}", "prune.keep_ratio=1")
    assert title(*vanilla) == "vanilla KD"
    assert title(*vanilla, "loss.name=dist") == "all data, live teacher, dist"
    assert title("loss.name=dkd") == f"{title()}, dkd"


def test_runs_that_differ_in_the_seed_alone_are_one_way(runs):
    """Anything else, be it one setting, makes another."""
    groups = grouped([read(runs[name]) for name in ("vanilla", "seed1", "seed0", "teacher")])
    assert [[run.path for run in group.runs] for group in groups] == [
        [runs["vanilla"]], [runs["seed1"], runs["seed0"]], [runs["teacher"]],
    ]  # fmt: skip
    assert [group.title.split(",")[0] for group in groups] == ["vanilla KD", "medium", "no teacher"]
    assert groups[0].is_vanilla
    assert groups[0].top1.std is None
    names = dict(differing([group.first_run for group in groups[:2]]))
    assert names["prune.keep_ratio"] == [1.0, 0.5]
    assert not {"seed", "name"} & names.keys()


def test_vanilla_kd_of_other_data_is_no_measure(runs):
    """Neither another data set's nor another student's times and accuracies are set against a run's."""
    ours, vanilla = grouped([read(runs["seed0"]), read(runs["vanilla"])])
    assert vanilla.is_baseline_of(ours)
    assert not ours.is_baseline_of(vanilla)
    for name in ("data", "student", "teacher"):
        artifact = vanilla.first_run.artifact
        inputs = artifact.manifest.inputs | {name: "another"}
        other = replace(artifact, manifest=artifact.manifest.model_copy(update={"inputs": inputs}))
        assert not replace(vanilla, runs=(replace(vanilla.first_run, artifact=other),)).is_baseline_of(ours)


def test_a_run_given_twice_is_one_seed_and_what_is_no_run_is_left_out(runs, tmp_path, capfd):
    """Globs bring along copies of a RUN, reports beside it, and what is not finished."""
    copy = shutil.copytree(runs["seed0"], tmp_path / "copy")
    beside = tmp_path / "copy.report"
    beside.mkdir()
    page = builder.report([runs["seed0"], copy, beside, runs["seed1"]], tmp_path / "page", evaluate=False)
    assert "mean ± std of 2 seeds" in " ".join(read_page(page).text.split())
    said = " ".join(capfd.readouterr().err.split())
    assert "left out 1 duplicate runs" in said
    assert "copy.report: it is not a finished RUN" in said
    with pytest.raises(InputError, match="is not a RUN"):
        builder.report([beside], tmp_path / "page")


def test_times_of_another_machine_are_not_compared(runs, monkeypatch):
    """No speed-up is claimed, and the page says why."""
    groups = grouped([read(runs["seed0"]), read(runs["vanilla"])])
    assert "×" in conclusion(groups[0], groups[1])
    assert [tile.label.split(":")[0] for tile in summarised(groups).tiles[2:]] == [
        "shortest time of an additional student", "shortest time of the first student",
    ]  # fmt: skip
    groups[1].first_run.env["machine"]["cpu"] = "another"
    assert len(summarised(groups).tiles) == 2
    said = conclusion(groups[0], groups[1])
    assert "another machine" in said
    assert "×" not in said


def test_the_noise_is_at_least_that_of_so_few_images(runs):
    """With 60 images of val, points mean little."""
    groups = grouped([read(runs["seed0"]), read(runs["vanilla"])])
    p = groups[0].top1.mean
    assert noise_points(groups) >= 100 * np.sqrt(2 * p * (1 - p) / 60)
    assert noise_points(groups) >= 0.3


def test_reproducing_finds_the_very_run(runs):
    """The command on the page leads to the key of the RUN that it is about."""
    run = read(runs["seed0"])
    (_, command), (_, another), *_ = builder.commands(grouped([run, read(runs["seed1"])])[0])
    assert "seed=2" in another
    _, _, _, path, *overrides = command.split()
    from fastkd.stages.training import run_key_fields

    again = Pipeline(recipe.load(path, overrides), build=False)
    assert artifacts.key_of("RUN", run_key_fields(again.training_inputs)) == run.artifact.key


def test_several_runs_are_headed_by_their_comparison(page, runs):
    """Title and figures are of all of them: the best of each, and who has it."""
    groups = grouped([read(runs[name]) for name in ("seed0", "seed1", "vanilla")])
    best = max(groups, key=lambda group: group.top1.mean)
    text = page.read_text()
    title = "student: medium, keep 0.5 compared with vanilla KD"
    assert f"<title>{title}: fastkd report</title>" in text
    assert f"<h1>{title}</h1>" in text
    (head,) = re.findall(r'<dl class="figures".*?</dl>', text, re.DOTALL)
    told = " ".join(Reader(head).text.split())
    assert f"highest top-1 on val: {best.title}" in told
    assert f"{100 * best.top1.mean:.2f}" in told
    fastest = min(groups, key=lambda group: group.further_s.mean)
    assert f"shortest time of an additional student: {fastest.title}" in told
    three = summarised(grouped([read(runs[name]) for name in ("seed0", "vanilla", "teacher")]))
    assert three.title == "student, teacher: 3 variants"
    assert three.networks is None  # not all have a teacher
    assert summarised(groups[:1]).title == "student: medium, keep 0.5"


@pytest.mark.parametrize(("gap", "said"), [(0.4, "40.00 points above"), (0.001, "is only 0.10 points below")])
def test_a_gap_within_the_noise_is_called_that(runs, gap, said):
    """The first is not said to be better."""
    groups = grouped([read(runs["seed0"]), read(runs["vanilla"])])
    for group, top1 in zip(groups, (0.5, 0.5 + gap), strict=True):
        group.first_run.artifact.facts["top1"]["val"] = top1
    assert said in summarised(groups).conclusions[0]


def test_the_teachers_top1_stands_beside_the_students(page, runs, place):
    """In the first figure, and as a line in the charts; but not if the runs have several teachers."""
    teacher = 100 * read(runs["teacher"]).top1
    assert f"the teacher has {teacher:.2f} %" in read_page(page).text
    for name in ("top1-over-time", "top1-over-epochs"):
        (chart,) = re.findall(f'<figure class="chart" id="{name}">.*?</figure>', page.read_text(), re.DOTALL)
        assert ">teacher</text>" in chart
    found = builder.inspect([read(runs["seed0"])], evaluate=True)
    groups = grouped([read(runs["seed0"]), read(runs["teacher"])])
    assert 100 * found.teacher_top1(groups[:1]) == pytest.approx(teacher)
    assert found.teacher_top1(groups) is None


def test_a_busy_machine_is_noted_beside_the_times(runs, tmp_path):
    """With the runs that it concerns."""
    groups = grouped([read(runs["seed0"]), read(runs["vanilla"])])
    for group in groups:
        group.first_run.timing.update(busy=False, load_at_start=0.5)
    assert busy_note(groups) == ""
    groups[1].first_run.timing.update(busy=True, load_at_start=7.25)
    assert f"when {runs['vanilla'].name} (load 7.25) started" in busy_note(groups)
    found = builder.inspect([groups[0].first_run], evaluate=False)
    assert busy_note(groups) in " ".join(Reader(builder.render(groups, found, [])).text.split())


# --- what is not there ------------------------------------------------------------------------------------------------


def test_a_run_without_a_teacher_has_a_page_too(runs, place):
    """What it has no use for is left out, with a line that says so."""
    told = read_page(builder.report([runs["teacher"]], place / "teacher-page")).text
    assert "trained on its whole data set" in told
    assert "trained without a teacher" in told
    assert "vanilla" not in told


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("data", "no data set there"),
        ("data.artifacts", "the SUBSET that this student was trained on no longer exists"),
        ("runs/teacher-*", "no RUN for this recipe yet"),
        ("teacher.yaml", "no such file"),
    ],
)
def test_what_is_gone_is_left_out_and_said(runs, place, tmp_path, gone, said):
    """The page is made from what is left."""
    with hidden(place, gone):
        page = builder.report([runs["seed0"]], tmp_path / "page")
    told = read_page(page).text
    assert "left out" in told
    assert said in told
    assert f"{100 * read(runs['seed0']).top1:.2f}" in told


@contextmanager
def hidden(place: Path, *patterns: str) -> Iterator[None]:
    """Move some of a folder's contents away for a while."""
    moved = [path for one in patterns for path in place.glob(one) if not path.name.endswith((".lock", ".report"))]
    assert len(moved) == len(patterns)
    aside = {path: place / f"hidden-{number}" for number, path in enumerate(moved)}
    for path, elsewhere in aside.items():
        path.rename(elsewhere)
    try:
        yield
    finally:
        for path, elsewhere in aside.items():
            elsewhere.rename(path)


@pytest.mark.parametrize(
    ("gone", "labelled", "guessed"),
    [
        (("runs/teacher-*", "teacher.yaml"), True, True),
        (("data.artifacts/scores-*",), True, False),
        (("data",), True, True),
        (("data", "data.artifacts/scores-*"), False, False),
    ],
)
def test_the_subset_is_found_by_its_key_and_shows_what_it_alone_can(runs, place, gone, labelled, guessed):
    """Without the teacher, the SCORES or the data; what is missing then is told."""
    facts = read(runs["seed0"])
    with hidden(place, *gone):
        found = builder.inspect([facts], evaluate=False)
    subset = artifacts.load(found.selection.subset.path)
    assert subset.key == facts.artifact.manifest.parents["SUBSET"]
    assert found.selection.kept.sum() == len(subset.array("indices.npy")) == 60
    assert found.selection.class_counts.sum() == 60
    assert (found.selection.class_sizes is not None) == labelled
    if labelled:
        assert found.selection.class_sizes.sum() == len(found.selection.kept) == 120
    charts = builder.of_classes(found, NAMES)
    assert [chart.name for chart in charts] == ["difficulty", "classes"]
    assert ("the DATASET and the SCORES are gone" in charts[1].caption) != labelled
    told = " ".join(Reader(builder.render(grouped([facts]), found, charts)).text.split())
    if "data" in gone:
        assert "Samples are left out:" in told
        assert "no data set there" in told
    else:
        assert found.guesses_missing != guessed
        assert ("The SCORES are gone, so there are no predictions." in told) != guessed


@pytest.mark.parametrize("labels", ["labels.mode=stored", "labels={mode: online, reshape: false}"])
def test_of_a_method_that_chooses_while_it_trains_the_share_is_told(place, labels):
    """It is no selection by medium that keeps all."""
    asked = ("prune={method: infobatch, keep_ratio: 1}", "train={epochs: 2, batch_size: 20, compile: false}", labels)
    changed = recipe.load(place / "student.yaml", (*asked, f"train.runs_dir={place / 'runs'}"))
    facts = read(pipeline.train(changed)[0].path)
    found = builder.inspect([facts], evaluate=False)
    told = " ".join(Reader(builder.render(grouped([facts]), found, builder.of_classes(found, NAMES))).text.split())
    share = f"{100 * facts.artifact.facts['trained_share']:.1f}"
    assert f"on {share} % of their images, selected by infobatch" in told
    assert f"trained on {share}% of the images of all epochs" in told
    assert not re.search(r"medium kept \d", told)
    assert "No sample dropped" not in told


def test_an_exported_student_is_told_of_where_it_lies_beside_its_run_or_is_given(tiny_run, tiny_student, tmp_path):
    """Another RUN's is not."""
    run = tmp_path / "runs" / tiny_run.path.name
    shutil.copytree(tiny_run.path, run)
    assert exports(read(run), []) == []
    page = builder.report([run, tiny_student.path], tmp_path / "page", evaluate=False)
    assert "Exported" in read_page(page).text
    assert f"python -m fastkd.predict {tiny_student.path} IMAGES…" in read_page(page).text
    shutil.copytree(tiny_student.path, run.with_name("student"))
    (one,) = exports(read(run), [])
    assert one.path == run.with_name("student")
    assert {name for name, *_ in one.files} == {"model.json", "student.onnx", "student.pt2", "student.safetensors"}
    assert all(off < 1e-3 for _, _, off in one.files if off is not None)
    with pytest.raises(InputError, match="is not a RUN; give the RUN that it was exported from"):
        builder.report([tiny_student.path], tmp_path / "page")


# --- letters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_fonts(monkeypatch):
    """A machine that has the fonts that come with matplotlib, and no others."""
    own = [one for one in fonts._fonts() if one[0].startswith(("DejaVu", "STIX", "cm"))]
    monkeypatch.setattr(fonts, "_fonts", lambda: own)
    fonts._family_of.cache_clear()
    yield
    fonts._family_of.cache_clear()


def test_letters_that_the_usual_font_lacks_are_taken_from_others(few_fonts):
    """Only those: it has Latin, Greek, Cyrillic and more itself."""
    assert fonts.families(["kočka", "кошка", "αβγ"]) == ["DejaVu Sans"]
    usual, other = fonts.families(["⌢ cat"])
    assert usual == "DejaVu Sans"
    assert ord("⌢") in get_font(findfont(other)).get_charmap()


def test_names_that_no_font_can_write_are_told_apart_in_a_png_and_whole_in_the_page(few_fonts, tmp_path):
    """No warning, no box: a number stands for them."""
    names = ["猫", "кошка", "犬", "αβγ\t"]
    assert fonts.class_names(names) == ["class 0", "кошка", "class 2", "class 3"]
    assert fonts.writable("ccs (猫-0123)") == "ccs (?-0123)"
    values = (np.arange(4), np.full(4, 5), np.linspace(1, 2, 4))
    with warnings.catch_warnings(), plots.style(names):
        warnings.simplefilter("error")
        plots.png(plots.classes(fonts.class_names(names), *values), tmp_path / "classes.png")
        assert ">猫</text>" in plots.svg(plots.classes(names, *values), "classes")
    assert (tmp_path / "classes.png").stat().st_size > 5000


def test_no_evaluate_runs_no_net(runs, tmp_path, monkeypatch):
    """Nothing is predicted, and the page says that it was not asked to."""
    monkeypatch.setattr("fastkd.report.inspection.predict", None)
    told = read_page(builder.report([runs["vanilla"]], tmp_path, evaluate=False)).text
    assert "--no-evaluate was given" in told


def test_a_damaged_run_is_refused(runs, tmp_path):
    """No page is made from figures that were changed."""
    shutil.copytree(runs["seed0"], tmp_path / "run")
    timing = tmp_path / "run" / "timing.json"
    timing.write_text(timing.read_text().replace("1", "2", 1))
    with pytest.raises(ArtifactError, match=r"timing\.json: damaged"):
        builder.report([tmp_path / "run"], tmp_path / "page")


def test_an_artifact_is_never_written_to(runs):
    """A page does not go into a RUN, nor into a folder of it."""
    before = sorted(runs["seed0"].rglob("*"))
    for out in (runs["seed0"], runs["seed0"] / "deep" / "page"):
        with pytest.raises(InputError, match="is inside an artifact"):
            builder.report([runs["seed0"]], out)
    assert sorted(runs["seed0"].rglob("*")) == before


def test_the_page_goes_beside_the_first_run(command, runs):
    """The command says where; a second call writes it anew."""
    expected = runs["vanilla"].with_name(runs["vanilla"].name + ".report") / "report.html"
    for _ in range(2):
        code, text = command(command_module.main, runs["vanilla"], "--no-evaluate")
        assert code == 0
        assert str(expected) in text
        assert expected.is_file()
    assert command(command_module.main, "nowhere")[0] == 2


# --- a training that was broken off -----------------------------------------------------------------------------------


def test_a_resumed_run_says_so(place, tmp_path, stop_after):
    """Where it went on stands on the page, and the chart of its loss has a mark there."""
    loaded = recipe.load(place / "teacher.yaml", ["log.every_steps=1"])
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(loaded, out=tmp_path / "run")
    stop_after(10**9)
    path = pipeline.train(loaded, out=tmp_path / "run")[0].path
    run = read(path)
    ((step, lost_s),) = run.resumes
    assert step == 4
    assert lost_s >= 0
    groups = grouped([run])
    found = builder.inspect([run], evaluate=False)
    charts = builder.over_time(groups)
    told = " ".join(Reader(builder.render(groups, found, charts)).text.split())
    assert "interrupted and resumed from a checkpoint at step 4" in told
    (loss_chart,) = [chart for chart in charts if chart.name == "loss"]
    assert "resumed from a checkpoint" in loss_chart.svg


def test_of_two_lines_about_one_step_the_later_counts(runs):
    """A curve has each step once, from the first epoch to the last."""
    run = read(runs["vanilla"])
    first = next(e for e in run.events if e["event"] == "steps")
    run.events.insert(0, first | {"loss": 1e6})
    x, loss = run.curve("loss")
    assert loss.max() < 1e6
    assert len(x) == len(set(x)) == 18
    assert x[-1] == 3.0


def test_events_say_when_they_happened(runs):
    """The last look comes when the student is done, and what is logged goes forward."""
    run = read(runs["seed0"])
    times = [e["at_s"] for e in run.events]
    assert times == sorted(times)
    assert times[-1] <= run.further_s + 0.001  # rounded
    assert run.evaluations[-1].images == 60
    assert json.loads(run.artifact.file("metrics.jsonl").read_text().splitlines()[0])["at_s"] > 0


# --- small things -----------------------------------------------------------------------------------------------------


def test_of_many_classes_both_ends_are_named():
    """Twelve of each, in order, and the chart says so."""
    values = np.random.default_rng(0).permutation(100).astype(float)
    shown, told = ends(values)
    assert values[shown].tolist() == [*range(12), *range(88, 100)]
    assert "12 lowest and highest of 100" in told
    assert ends(values[:24])[1] == ""


def curve_of(figure) -> list:
    return [line for line in figure.axes[0].lines if len(line.get_xdata())]


def test_an_epoch_that_was_logged_once_is_a_point_of_each_chart(runs):
    """Not an empty chart, and no axis that is stretched around it."""
    run = read(runs["vanilla"])
    events = [event for event in run.events if event["event"] == "steps"]
    one = replace(run, events=[events[-1]])
    for draw in (plots.loss_over_epochs, plots.data_wait_over_epochs):
        (line,) = curve_of(draw(grouped([one])))
        assert len(line.get_xdata()) == 1
        assert line.get_marker() == "o"
        (line,) = curve_of(draw(grouped([replace(run, events=events[:6])])))
        assert line.get_marker() == "."
    low, high = plots.loss_over_epochs(grouped([one])).axes[0].get_ylim()
    assert low == 0
    assert high > events[-1]["loss"]


def test_an_axis_is_not_stretched_around_a_single_value(runs):
    """Of accuracies it covers many points, within 0 and 100 % and their marks."""
    run = read(runs["vanilla"])
    alone = replace(run, events=[])
    for top1 in (0.0, 0.5, 0.885, 1.0):
        alone.artifact.facts["top1"]["val"] = top1
        low, high = plots.top1_over_time(grouped([alone])).axes[0].get_ylim()
        assert high - low > 10
        assert -5 < low < 100 * top1 < high < 105
    figure = plots.accuracy_by_class(NAMES, np.full(3, 0.9), np.full(3, 0.9))
    assert np.diff(figure.axes[0].get_xlim()) > 10
    same = plots.difficulty(np.full(9, 2.0), np.arange(9) < 4, "margin")
    assert np.diff(same.axes[0].get_xlim()) >= 1


@pytest.mark.parametrize(
    ("longest_s", "unit", "last"),
    [(0.5, "s", 0.5), (110, "s", 100), (400, "min", 6), (7000, "min", 100), (30000, "h", 8)],
)
def test_an_axis_of_time_has_one_unit(runs, longest_s, unit, last):
    """It is in the label; the ticks are plain numbers."""
    run = read(runs["vanilla"])
    run.timing.update(further_student_s=longest_s / 2, first_student_s=longest_s)
    axes = plots.top1_over_time(grouped([replace(run, events=[])])).axes[0]
    assert axes.get_xlabel() == f"time ({unit})"
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert float(ticks[0]) == 0
    assert float(ticks[-1]) == last
    assert 3 <= len(ticks) <= 8


@pytest.mark.parametrize("known", [True, False])
def test_bars_that_are_all_alike_become_a_sentence(runs, known):
    """Of the kept share of each class, if it is the same to a percent."""
    counts, sizes = np.array([50, 101, 25]), np.array([100, 200, 50])
    labels = np.repeat(np.arange(3), sizes)
    selection = Selection(
        None, "medium", "margin", np.zeros(350), labels < 1, labels if known else None, counts, np.array([1.0, 2, 3])
    )
    if known:
        assert selection.kept_alike == "50% of each class was kept. "
        assert replace(selection, class_counts=np.array([50, 110, 25])).kept_alike == ""
    else:
        assert selection.kept_alike == ""
        assert replace(selection, class_counts=np.full(3, 1200)).kept_alike == "1,200 samples of each class were kept. "
    found = builder.Found(None, selection, None, None, None, {})
    found = replace(found, run=read(runs["seed0"]))
    chart = builder.of_classes(found, NAMES)[1]
    titles = [axes.get_title() for axes in chart.figure.axes]
    assert titles == (["σ of its logits"] if known else ["Kept", "σ of its logits"])
    assert ("50% of each class was kept" in chart.caption) == known


def test_black_and_flat_images_are_flagged(runs):
    """Under each, and above them all."""
    facts = read(runs["seed0"])
    flaws = [flaw for _, flaw in Inspector(facts)._images(np.array([0, *BLACK_AND_FLAT])).values()]
    assert sorted(flaws) == ["", "black", "one colour"]
    assert flaw_of(np.full((9, 9, 3), 255, np.uint8)) == "one colour"
    assert flaw_of(np.random.default_rng(0).integers(0, 9, (9, 9, 3), dtype=np.uint8)) == "black"
    found = builder.inspect([facts], evaluate=False)
    easy, *others = found.samples
    shown = easy.kept or easy.dropped
    shown[0] = replace(shown[0], flaw="black")
    shown[1] = replace(shown[1], flaw="one colour")
    for group in others:
        for samples in (group.kept, group.dropped):
            samples[:] = [replace(one, flaw="") for one in samples]
    text = builder.render(grouped([facts]), found, [])
    assert re.findall(r'<span class="flaw">(.*?)</span>', text)[:2] == ["black", "one colour"]
    assert f"{found.flawed} of these images are black or of one colour:" in Reader(text).text


def test_a_row_of_samples_without_one_side_closes_up(runs):
    """Its samples take the width, and a word says what is missing; a row without samples is left out."""
    facts = read(runs["seed0"])
    found = builder.inspect([facts], evaluate=False)
    easy, medium, hard = found.samples
    many = (easy.kept + easy.dropped + medium.kept)[:3]
    rows = [
        replace(easy, kept=[], dropped=many),
        replace(medium, kept=many, dropped=many),
        replace(hard, kept=[], dropped=[]),
    ]
    text = builder.render(grouped([facts]), replace(found, samples=rows), [])
    (sheet,) = re.findall(r'<div class="sheet">.*?</section>', text, re.DOTALL)
    assert sheet.count('<div class="one">') == 1
    assert re.findall(r"<h3>(.*?)</h3>", sheet) == ["easy", "medium"]
    assert re.findall(r'<p class="none">(.*?)</p>', sheet) == ["none kept"]
    assert re.findall(r"<h4>(.*?)</h4>", sheet) == ["dropped", "kept", "dropped"]


def test_long_class_names_break_at_separators():
    """In the page where the browser needs it, in charts on a second line."""
    assert breakable("n01440764_tench-fish") == "n01440764_<wbr>tench-<wbr>fish"
    assert breakable("<b>/__a") == "&lt;b&gt;/__<wbr>a"
    assert breakable("plain") == "plain"
    assert breakable("") == ""
    labels, row_in = plots._class_labels(["cat", "n01440764_tinca_tinca", "x" * 30, "one_" + "y" * 40], 18)
    assert labels == ["cat", "n01440764_tinca_\ntinca", "x" * 17 + "…", "one_\n" + "y" * 17 + "…"]
    assert row_in > plots.ROW_IN == plots._class_labels(["cat"], 18)[1]


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), seen = [];
  const column = () => [...table.tBodies[0].rows].map(row => Number(row.cells[3].dataset.value));
  const button = table.tHead.rows[0].cells[3].querySelector("button");
  for (let i = 0; i < 2; i++) { button.click(); seen.push(column()); }
  parent.postMessage({
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    charts: [...document.querySelectorAll(".chart svg")].map(s => {
      const box = s.getBoundingClientRect();
      const letters = Math.min(...[...s.querySelectorAll("text")].map(t => t.getBoundingClientRect().height));
      return {width: box.width, height: box.height, paths: s.querySelectorAll("path").length, letters};
    }),
    images: [...document.images].map(i => i.naturalWidth),
    background: getComputedStyle(document.body).backgroundColor,
    sorted: seen,
  }, "*");
});
</script>
"""
FRAME = """<!DOCTYPE html><body><iframe src="{page}" width="{width}" height="900"></iframe><script>
addEventListener("message", told => {{
  const pre = document.createElement("pre");
  pre.textContent = JSON.stringify(told.data);
  document.body.append(pre);
}});
</script>"""


def open_in_browser(page: str, folder: Path, width: int) -> tuple[dict, list[str]]:
    """Open a page in a frame of a width: return what the probe in it tells, and the browser's console."""
    (folder / "page.html").write_text(page + PROBE)
    (folder / "frame.html").write_text(FRAME.format(page="page.html", width=width))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=1400,1000",
            "--dump-dom", (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=seconds(120),
    )  # fmt: skip
    told = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert told, done.stderr
    return json.loads(told[1].replace("&amp;", "&")), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_renders(page, tmp_path, width):
    """On a desk and on a phone: no errors, nothing wider than the window, every figure there and legible."""
    told, console = open_in_browser(page.read_text(), tmp_path, width)
    assert console == []
    assert told["width"] == width
    assert told["content"] <= width
    assert len(told["charts"]) == 8
    for chart in told["charts"]:
        assert chart["width"] > 0.75 * min(width, 500)
        assert chart["height"] > 90
        assert chart["paths"] > 5
        assert chart["letters"] > 8
    assert told["images"]
    assert min(told["images"]) == 16


@in_a_browser
def test_a_click_sorts_a_table(page, tmp_path):
    """By the column's figures: up, and with another click down."""
    told, _ = open_in_browser(page.read_text(), tmp_path, 1280)
    up, down = told["sorted"]
    assert len(up) == 2
    assert up == sorted(up)
    assert down == up[::-1]


@in_a_browser
def test_the_browser_test_sees_errors(tmp_path):
    """A broken page is told from a sound one."""
    broken = '<table class="sortable"><thead><tr><th><th><th><th><button>x</button></tr></thead><tbody></tbody></table>'
    broken += '<p style="width: 2000px">wide</p><script>nothing.there()</script>'
    told, console = open_in_browser(broken, tmp_path, 390)
    assert told["content"] > 390
    assert any("ReferenceError" in line for line in console)
