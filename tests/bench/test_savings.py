import sys

import pytest
from PIL import Image

from fastkd import recipe
from fastkd.bench import charts
from fastkd.bench.breakdown import changed
from fastkd.bench.charts import STAGE_COLOURS
from fastkd.bench.savings import (
    break_even,
    differences,
    measure,
    noise_points,
    paired_difference,
    reference_column,
    savings_variants,
    train_reference,
)
from fastkd.bench.savings_report import conclusion, notes, table
from fastkd.errors import InputError


def recipes_of(loaded: recipe.Recipe) -> dict[str, recipe.Recipe]:
    return {variant.name: variant.recipe for variant in savings_variants(loaded)}


def report(own: float, random: float, seeds: int = 1) -> dict:
    def entry(title: str, seconds: float, top1: float) -> dict:
        return {
            "title": title,
            "further_student_s": seconds,
            "first_student_s": seconds + 10,
            "speedup_further_student_s": 100 / seconds,
            "speedup_first_student_s": 110 / (seconds + 10),
            "top1": top1,
            "top1_std": None if seeds == 1 else 0.004,
        }

    made = {
        "seeds": list(range(seeds)),
        "ways": {
            "vanilla": entry("vanilla KD", 100, 0.9),
            "recipe": entry("medium", 40, own),
            "random": entry("random", 40, random),
        },
    }
    made["noise_points"] = noise_points(made["ways"].values(), 10_000)
    return made


@pytest.mark.parametrize(
    ("own", "random", "verdict"),
    [
        (0.90, 0.88, "pays off here"),
        (0.88, 0.90, "costs accuracy here: 'random'"),
        (0.89, 0.892, "does not differ from 'random'"),
    ],
)
def test_the_conclusion_follows_from_the_figures(own, random, verdict):
    text = conclusion(report(own, random))
    assert verdict in text
    assert "takes 0.40 of vanilla KD's time (2.5× faster); the first" in text
    assert f"{100 * (own - 0.9):+.2f} points against vanilla KD" in text
    assert "One seed" in text


def test_noise_depends_on_the_test_set_and_the_seeds():
    one = list(report(0.9, 0.9)["ways"].values())
    assert noise_points(one, 10_000) == pytest.approx(100 * (2 * 0.09 / 10_000) ** 0.5)
    assert noise_points(one, 10**9) == 0.3
    assert noise_points(list(report(0.9, 0.9, seeds=3)["ways"].values()), 10**9) == pytest.approx(0.8)


def test_variants_differ_only_as_intended(tiny_recipe):
    columns = recipes_of(tiny_recipe("optim.warmup_epochs=1.0"))
    own = columns["recipe"]
    assert columns["vanilla"].labels == recipe.Labels(mode="online", reshape=False)  # a new view in each epoch
    assert columns["vanilla"].prune.keep_ratio == 1.0
    assert columns["random"].prune.method == "random"
    assert columns["same_compute"].train.epochs == own.train.epochs * own.prune.keep_ratio == 3
    assert columns["same_compute"].optim.warmup_epochs == 0.5
    for other in columns.values():
        assert (other.seed, other.student, other.loss, other.train.batch_size) == (
            own.seed, own.student, own.loss, own.train.batch_size,
        )  # fmt: skip
    assert list(recipes_of(tiny_recipe("prune.method=random"))) == ["vanilla", "recipe", "same_compute"]
    assert list(recipes_of(tiny_recipe("prune.keep_ratio=1.0"))) == ["vanilla", "recipe"]


def test_vanilla_uses_a_new_view_in_each_epoch(tiny_recipe):
    columns = recipes_of(tiny_recipe("data.view.family=flip", "labels.views=2"))
    assert columns["vanilla"].num_views == 6
    assert columns["recipe"].num_views == columns["random"].num_views == columns["same_compute"].num_views == 2
    with pytest.raises(
        InputError, match=r"teacher\.input_px=8: the live teacher of vanilla KD gets the student's images"
    ):
        savings_variants(tiny_recipe("teacher.input_px=8"))


@pytest.mark.parametrize(
    ("first", "further", "students"), [(50.0, 40.0, 1), (130.0, 40.0, 2), (400.0, 50.0, 7), (200.0, 100.0, None)]
)
def test_break_even_is_where_the_totals_cross(first, further, students):
    variant = {"first_student_s": first, "further_student_s": further}
    vanilla = {"first_student_s": 103.0, "further_student_s": 100.0}
    assert break_even(variant, vanilla) == students
    if students:
        assert first + (students - 1) * further < 103 + (students - 1) * 100
        if students > 1:
            assert first + (students - 2) * further >= 103 + (students - 2) * 100


def test_vanilla_uses_all_samples_if_the_recipes_method_is_dynamic(tiny_recipe):
    columns = recipes_of(tiny_recipe("prune.method=infobatch", "prune.keep_ratio=1.0"))
    assert columns["recipe"].prune.dynamic
    assert columns["vanilla"].prune == recipe.Prune()


def test_the_confidence_interval_is_students_t_over_paired_seeds():
    found = paired_difference([3.0, 5.0, 9.0], [2.0, 3.0, 5.0])  # 1, 2, 4: 7/3, standard deviation 1.5275
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["ci95"] == pytest.approx(4.3027 * 1.5275 / 3**0.5, rel=1e-4)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == {"mean": 0.0, "ci95": 0.0}


def full_report(seeds: int, reference: dict | None) -> dict:
    made = report(0.9, 0.9, seeds)
    for k, entry in enumerate(made["ways"].values()):
        entry |= {
            "stages": {"write": 1.0, "setup": 2.0, "train": entry["further_student_s"] - 3, "evaluate": 1.0},
            "break_even_students": 1,
            "stored_bytes": 0,
            "images_per_s": 1000,
            "data_wait_share": 0.1,
            "runs": [{"top1": 0.9 + 0.01 * k + 0.001 * k * seed} for seed in range(seeds)],
        }
        if reference:
            entry |= {
                f"reference_speedup_{which}_student_s": 400 / entry[f"{which}_student_s"]
                for which in ("first", "further")
            }
    made |= {"recipe": "tiny"} | ({"reference": reference} if reference else {})
    return made | {"differences": differences(made)}


EXTRAPOLATED = {
    "title": "reference implementation (extrapolated)",
    "extrapolated_from_steps": 300,
    "stages": {"train": 400.0},
    "first_student_s": 400.0,
    "further_student_s": 400.0,
    "speedup_first_student_s": 0.275,
    "speedup_further_student_s": 0.25,
    "reference_speedup_first_student_s": 1.0,
    "reference_speedup_further_student_s": 1.0,
    "images_per_s": 250,
}  # fmt: skip


def cells(grid, column: int) -> dict[str, str]:
    return dict(zip(grid.columns[0].cells, grid.columns[column].cells, strict=True))


def test_the_reference_implementation_is_the_first_column():
    grid = table(full_report(1, EXTRAPOLATED))
    assert [str(column.header) for column in grid.columns[1:]] == [
        "reference implementation\n(extrapolated)", "vanilla KD", "medium", "random",
    ]  # fmt: skip
    first, own = cells(grid, 1), cells(grid, 3)
    assert first["train (s)"] == first["each additional student (s)"] == "400.0"
    assert (
        first["setup (s)"] == first["test top-1 (%)"] == first["pays off from student no."] == first["data wait"] == "–"
    )
    assert first["speed-up over vanilla, additional"] == "0.25×"
    assert own["speed-up over vanilla, additional"] == "2.50×"
    assert own["speed-up over reference, additional"] == "10.00×"
    assert "recipe minus this (points)" not in own
    text = conclusion(full_report(1, EXTRAPOLATED))
    assert (
        "the reference implementation, extrapolated from 300 steps, an additional student is 10.0× faster, "
        "the first 8.0×" in text
    )

    alone = table(full_report(1, None))
    assert [str(column.header) for column in alone.columns[1:]] == ["vanilla KD", "medium", "random"]
    assert "speed-up over reference, additional" not in cells(alone, 1)


def test_what_does_not_apply_is_left_out_with_a_word():
    """Baselines that a recipe does not have, and the compiler's caches where nothing is compiled."""
    made = full_report(1, None)
    made["environment"] = {
        "machine": {"cpu": "a CPU", "cores": 2},
        "gpu": None,
        "precision": "fp32",
        "compile": "default",
    }
    made |= {"teacher_training_s": None, "cold_compile_s": 12.5, "conclusion": "done"}
    said = " ".join(notes(made))
    assert "filling the compiler's caches, 12.5 s" in said
    assert "this recipe has no such baseline: all data for as many steps" in said
    made["environment"]["compile"] = False
    made["ways"]["same_compute"] = made["ways"]["random"]
    said = " ".join(notes(made))
    assert "caches" not in said
    assert "train.compile is false: nothing is compiled, the step only warms up" in said
    assert "left out" not in said


def test_the_reference_includes_vanillas_setup_and_evaluation():
    vanilla = {"stages": {"write": 9.0, "setup": 2.0, "compile": 5.0, "train": 50.0, "evaluate": 1.0}}
    column = reference_column({"title": "t", "stages": {"train": 100.0}}, vanilla)
    assert column["stages"] == {"setup": 2.0, "train": 100.0, "evaluate": 1.0}
    assert column["first_student_s"] == column["further_student_s"] == 103.0


def test_several_seeds_give_differences_with_confidence_intervals():
    trained = EXTRAPOLATED | {"runs": [{"top1": 0.9}, {"top1": 0.91}], "top1": 0.905, "top1_std": 0.005}
    made = full_report(2, trained)
    assert set(made["differences"]) == {"vanilla", "random", "reference"}
    assert made["differences"]["vanilla"]["mean"] == pytest.approx(1.05)  # 1.0 and 1.1
    assert made["differences"]["vanilla"]["ci95"] == pytest.approx(12.706 * 0.05, rel=1e-3)
    grid = table(made)
    assert cells(grid, 2)["recipe minus this (points)"] == "+1.05 ± 0.64"
    assert cells(grid, 3)["recipe minus this (points)"] == "–"
    assert cells(grid, 1)["test top-1 (%)"] == "90.50 ± 0.50"
    assert full_report(1, trained)["differences"] == {}


def test_the_chart_shows_the_stages_as_bars(tmp_path):
    made = full_report(1, EXTRAPOLATED)
    figure = charts.savings(made)
    figure.savefig(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert {(31, 119, 180), (34, 48, 60), (255, 255, 255)} <= {c[:3] for _, c in picture.getcolors(1 << 20)}
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "reference implementation\n(extrapolated)", "vanilla KD", "medium", "random",
    ]  # fmt: skip
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert list(widths) == list(STAGE_COLOURS)
    assert widths["train"] == [400.0, 97.0, 37.0, 37.0]
    assert [note.get_text() for note in axes.texts] == ["400.0 s", "100.0 s, 4.0×", "40.0 s, 10.0×", "40.0 s, 10.0×"]


def test_the_reference_implementation_can_be_trained_completely(tiny_recipe, tmp_path):
    vanilla = changed(savings_variants(tiny_recipe())[0].recipe, train={"epochs": 4})
    run = train_reference(vanilla, tmp_path)
    assert run["top1"] > 0.5
    (stage,) = run["stages"]
    assert stage["stage"] == "train"
    assert run["images_per_s"] == pytest.approx(4 * 150 / stage["seconds"])
    assert not list(tmp_path.glob("images-*"))


def test_missing_scipy_is_an_error_before_training(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"several seeds needs scipy, not installed: pip install scipy$"):
        measure(tiny_recipe(), tmp_path / "out", seeds=2)
    assert not (tmp_path / "artifacts").exists()


def test_a_recipe_without_a_teacher_is_an_error(tiny_recipe):
    with pytest.raises(InputError, match="has no teacher"):
        savings_variants(tiny_recipe().model_copy(update={"teacher": None}))
