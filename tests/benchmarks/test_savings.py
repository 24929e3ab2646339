import pytest

from fastkd import recipe
from fastkd.benchmarks.savings import break_even, conclusion, noise_points, ways
from fastkd.errors import InputError


def report(own: float, random: float, seeds: int = 1) -> dict:
    def way(title: str, seconds: float, top1: float) -> dict:
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
            "vanilla": way("vanilla KD", 100, 0.9),
            "recipe": way("medium", 40, own),
            "random": way("random", 40, random),
        },
    }
    made["noise_points"] = noise_points(made["ways"].values(), 10_000)
    return made


@pytest.mark.parametrize(
    ("own", "random", "verdict"),
    [
        (0.90, 0.88, "paid off"),
        (0.88, 0.90, "cost accuracy here: 'random'"),
        (0.89, 0.892, "not told apart from 'random'"),
    ],
)
def test_the_conclusion_says_what_the_figures_allow(own, random, verdict):
    text = conclusion(report(own, random))
    assert verdict in text
    assert "costs 0.40 of vanilla KD's time (2.5× faster); the first" in text
    assert f"{100 * (own - 0.9):+.2f} points against vanilla KD" in text
    assert "One seed" in text


def test_noise_is_what_the_test_set_and_the_seeds_leave_open():
    one = list(report(0.9, 0.9)["ways"].values())
    assert noise_points(one, 10_000) == pytest.approx(100 * (2 * 0.09 / 10_000) ** 0.5)
    assert noise_points(one, 10**9) == 0.3
    assert noise_points(list(report(0.9, 0.9, seeds=3)["ways"].values()), 10**9) == pytest.approx(0.8)


def test_ways_differ_in_what_they_claim_to(tiny_recipe):
    columns = {w.name: w.recipe for w in ways(tiny_recipe("optim.warmup_epochs=1.0"))}
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
    assert [w.name for w in ways(tiny_recipe("prune.method=random"))] == ["vanilla", "recipe", "same_compute"]
    assert [w.name for w in ways(tiny_recipe("prune.keep_ratio=1.0"))] == ["vanilla", "recipe"]


def test_vanilla_sees_a_new_view_each_epoch_whatever_the_recipe_stores(tiny_recipe):
    columns = {w.name: w.recipe for w in ways(tiny_recipe("data.view.family=flip", "labels.views=2"))}
    assert columns["vanilla"].num_views == 6
    assert columns["recipe"].num_views == columns["random"].num_views == columns["same_compute"].num_views == 2
    with pytest.raises(InputError, match=r"teacher\.input_px=8: vanilla KD's live teacher sees the student's images"):
        ways(tiny_recipe("teacher.input_px=8"))


@pytest.mark.parametrize(
    ("first", "further", "students"), [(50.0, 40.0, 1), (130.0, 40.0, 2), (400.0, 50.0, 7), (200.0, 100.0, None)]
)
def test_break_even_is_where_the_sums_cross(first, further, students):
    way = {"first_student_s": first, "further_student_s": further}
    vanilla = {"first_student_s": 103.0, "further_student_s": 100.0}
    assert break_even(way, vanilla) == students
    if students:
        assert first + (students - 1) * further < 103 + (students - 1) * 100
        if students > 1:
            assert first + (students - 2) * further >= 103 + (students - 2) * 100


def test_no_teacher_no_savings(tiny_recipe):
    with pytest.raises(InputError, match="has no teacher"):
        ways(tiny_recipe().model_copy(update={"teacher": None}))
