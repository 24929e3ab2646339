"""What `train.precision: auto` may give on a CPU, by a stand-in for its answer: all stages work, rows stay in bounds.

Emulated on a CPU that does not compute in bf16, the numbers are those of one that does, up to the order of sums.
"""

import numpy as np
import pytest
import torch

from fastkd import console, pipeline, recipe
from fastkd.engine.losses import kd_loss
from fastkd.errors import ArtifactError
from fastkd.pipeline import Pipeline
from fastkd.stages import checking
from fastkd.verification import check_recipe

VIEWS = ("data.view.family=pad_crop_flip", "labels.views=2", "labels.batch_size=32", "train.epochs=2")


@pytest.fixture(params=["bf16", "fp32"])
def answer(request, monkeypatch) -> str:
    """What `auto` means, because the CPU says that it does, or does not, compute in bf16."""
    monkeypatch.setenv("FASTKD_TEST_CPU_BF16", "yes" if request.param == "bf16" else "no")
    return request.param


def test_all_stages_compute_in_what_auto_gives_and_say_so(tiny_recipe, answer, capfd):
    """Precision is recorded in each artifact, and is in no key: what was made in the other one would be used."""
    loaded = tiny_recipe(*VIEWS, "train.precision=auto")
    pipe = Pipeline(loaded)
    run, _ = pipe.train()
    for artifact in (pipe.scores, pipe.subset, pipe.labels, run):
        assert artifact.manifest.settings["precision"] == answer
    assert [one["precision"] for one in pipe.labels.facts["each"]] == [answer] * 2
    assert f"on cpu in {answer}" in capfd.readouterr().out
    other = Pipeline(tiny_recipe(*VIEWS, f"train.precision={'fp32' if answer == 'bf16' else 'bf16'}"), build=False)
    assert other.labels.key == pipe.labels.key


def test_check_allows_what_the_precision_of_the_rows_makes_and_names_it(tiny_recipe, answer, capfd):
    """The rows are compared in the same precision again; then in the other, where the wider bound holds."""
    pipeline.label(tiny_recipe(*VIEWS, "train.precision=auto"))
    other = "fp32" if answer == "bf16" else "bf16"
    for now in ("auto", other):
        capfd.readouterr()
        found = check_recipe(tiny_recipe(*VIEWS, f"train.precision={now}"), pairs=999)
        allowed = checking.TOLERANCE["fp32" if now == "auto" and answer == "fp32" else "bf16"]
        assert [one.wrong for one in found] == [0, 0]
        assert [one.allowed for one in found] == [allowed, allowed]
        said = capfd.readouterr().out
        assert said.count(f"labelled in {answer}, compared in {answer if now == 'auto' else other}") == 2


def test_rows_beyond_the_bound_of_their_precision_are_found(tiny_recipe, answer, reseal):
    """An error of twice the bound, in one row of one view."""
    loaded = tiny_recipe(*VIEWS, "train.precision=auto")
    labels, _ = pipeline.label(loaded)
    file = labels.path / "views" / "v0001.npy"
    rows = np.load(file)
    largest = np.abs(rows[7].astype(np.float32)).max()
    rows[7, rows[7].argmax()] -= np.float16(2.5 * checking.TOLERANCE[answer] * largest)
    np.save(file, rows)
    reseal(labels.path)
    console.forget_warnings()
    with pytest.raises(ArtifactError, match=rf"1 of 150 rows differ from the teacher's.*labelled in {answer}"):
        check_recipe(loaded, pairs=999)


@pytest.mark.parametrize(
    "model",
    [
        *("cifar/resnet20", "cifar/wrn_16_1", "cifar/vgg8"),
        pytest.param("cifar/shufflev1", marks=pytest.mark.soak),  # grouped convolutions are slow where bf16 is emulated
    ],
)
def test_bf16_rows_stay_within_their_bound_and_hardly_change_the_loss(tiny, tmp_path, model):
    """docs/concepts.md states both: 2⁻³ of the row's largest logit, and 1 % of the mean KD loss at T = 4."""
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(
        f"name: t\ndata: {{path: {tiny.path}, input_px: 32}}\nstudent: {{model: {model}}}\noptim: {{lr: 0.05}}\n"
        f"train: {{epochs: 2, batch_size: 30, compile: false, precision: fp32, runs_dir: {tmp_path}}}\n"
    )
    student = tmp_path / "student.yaml"
    student.write_text(
        f"name: s\ndata: {{path: {tiny.path}, input_px: 32}}\nteacher: {{recipe: teacher.yaml}}\n"
        "student: {model: cifar/resnet8}\noptim: {lr: 0.05}\n"
        f"train: {{epochs: 2, batch_size: 30, compile: false, runs_dir: {tmp_path}}}\n"
    )
    rows, labels = {}, None
    for precision in ("fp32", "bf16"):
        loaded = recipe.load(student, [f"train.precision={precision}", f"data.artifacts_dir={tmp_path / precision}"])
        scores, _ = pipeline.score(loaded)
        z = scores.array("logits.npy").astype(np.float64)
        rows[precision], labels = z - z.mean(axis=1, keepdims=True), torch.tensor(scores.array("labels.npy"))
    exact, rounded = rows["fp32"], rows["bf16"]
    error_N = np.abs(rounded - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert 0 < error_N.max() <= checking.TOLERANCE["bf16"]
    z_student = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    a, b = (
        kd_loss(z_student, labels, torch.tensor(z, dtype=torch.float32), alpha=0.9, gamma=0.1, temperature=4.0).mean()
        for z in (exact, rounded)
    )
    assert abs(b - a) / a <= 0.01
