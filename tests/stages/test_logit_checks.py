"""Logits that are not what they are taken for: said once, with numbers, in the manifest and to machines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd import artifacts, console, models, pipeline, prune, recipe, score
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline
from fastkd.recipe import Prune

N, K = 300, 5


def own_logits(folder, change=lambda z, y: z, labels=None):
    """Write logits of a good teacher, changed; return the SUBSET that is made of them."""
    rng = np.random.default_rng(0)
    y_N = np.arange(N) % K
    z_NK = rng.normal(0, 1, (N, K)).astype(np.float32)
    z_NK[np.arange(N), y_N] += 4
    np.save(folder / "z.npy", np.ascontiguousarray(change(z_NK, y_N), np.float32))
    np.save(folder / "y.npy", y_N if labels is None else labels(y_N))
    return pipeline.prune_arrays(folder / "z.npy", folder / "y.npy", folder / "out", Prune(keep_ratio=0.5))[0]


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


FORMS = {
    "probabilities": (lambda z, y: softmax(z), "are probabilities: none is negative and every row sums to 1"),
    "half precision": (lambda z, y: softmax(z).astype(np.float16), "are probabilities"),
    "one-hot": (lambda z, y: np.eye(K)[y], "are probabilities"),
    "votes": (lambda z, y: np.round(4 * z), "are whole numbers"),
    "one row": (lambda z, y: np.repeat(z[:1], len(z), axis=0), "gives all samples the same values"),
    "noise": (lambda z, y: z[:, ::-1][::-1] * 0 + np.random.default_rng(1).normal(size=z.shape), "is at chance"),
    "another order": (lambda z, y: z[:, [1, 2, 3, 4, 0]], "the classes of z.npy are in another order than the labels"),
    "two exchanged": (lambda z, y: z[:, [1, 0, 2, 3, 4]], "'0' is predicted as '1'"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_logits_is_told_and_stays_in_the_manifest(tmp_path, form):
    change, told = FORMS[form]
    warnings = own_logits(tmp_path, change).facts[artifacts.WARNINGS]
    assert any(told in one for one in warnings), warnings


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: z,
        lambda z, y: np.log(softmax(z)),
        lambda z, y: z - z.min(),
        lambda z, y: z / 100,
    ],
    ids=["logits", "log-probabilities", "not negative", "small"],
)
def test_of_logits_nothing_is_said(tmp_path, change):
    assert artifacts.WARNINGS not in own_logits(tmp_path, change).facts


def test_labels_in_another_order_are_told_with_the_evidence(tmp_path):
    (warning,) = [
        one
        for one in own_logits(tmp_path, labels=lambda y: (y + 1) % K).facts[artifacts.WARNINGS]
        if "another order" in one
    ]
    assert "for 5 classes, more than half of the images are predicted as one other class" in warning
    top1, exchanged = (float(part.split("%")[0]) for part in warning.split("is ")[-1].split("would be "))
    assert top1 < 10
    assert exchanged > 90


@pytest.mark.parametrize(("value", "told"), [(-np.inf, "contains -inf; to mask a class"), (np.nan, "contains NaN")])
def test_logits_that_are_not_finite_are_refused_with_what_they_hold(tmp_path, value, told):
    def change(z, y):
        z[7, 2] = value
        return z

    with pytest.raises(InputError, match=f"z.npy: 1 rows of .* are not finite, first row 7, which {told}"):
        own_logits(tmp_path, change)
    assert not (tmp_path / "out").exists()


def with_teacher(tiny_recipe, tmp_path, weights, *overrides):
    given = tmp_path / "other.yaml"
    text = tiny_recipe.path.read_text()
    given.write_text(text.replace("{recipe: teacher.yaml}", f"{{model: cifar/resnet8, weights: {weights}}}"))
    return given


def test_a_teacher_at_chance_is_told_to_people_and_machines(tiny_recipe, tmp_path, command):
    torch.manual_seed(0)
    net = models.build("cifar/resnet8", 3)
    torch.nn.init.zeros_(net.fc.weight)
    net.fc.bias.data.copy_(torch.tensor([0.3, 0.2, 0.1]))
    models.save_weights(net, tmp_path / "dead.safetensors")
    given = with_teacher(tiny_recipe, tmp_path, tmp_path / "dead.safetensors")
    code, said = command(score.main, str(given), "--json", "train.device=cpu")
    assert code == 0, said
    told = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert (told["at_chance"], told["moved_classes"]) == (True, 0)
    assert told["chance"] == pytest.approx(1 / 3)
    for words in ("score: the teacher is at chance: its top-1 is 33.33%", "gives all samples the same values"):
        assert any(words in one for one in told["warnings"])
        stored = artifacts.load(Path(told["path"]), "SCORES").facts[artifacts.WARNINGS]
        assert any(words in one for one in stored)


def test_a_teacher_whose_classes_are_in_another_order_is_told(tiny_recipe, tiny_teacher, tmp_path):
    net = models.build("cifar/resnet8", 3)
    models.load_weights(net, tiny_teacher)
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight[[1, 2, 0]].clone())
        net.fc.bias.copy_(net.fc.bias[[1, 2, 0]].clone())
    models.save_weights(net, tmp_path / "turned.safetensors")
    given = with_teacher(tiny_recipe, tmp_path, tmp_path / "turned.safetensors")
    scores, _ = pipeline.score(recipe.load(given))
    assert scores.facts["moved_classes"] == 3
    assert any("the classes of the teacher are in another order" in one for one in scores.facts[artifacts.WARNINGS])


def test_a_good_teacher_is_not_warned_of(tiny_recipe):
    pipe = Pipeline(tiny_recipe())
    assert artifacts.WARNINGS not in pipe.scores.facts
    assert not pipe.scores.facts["at_chance"]
    assert not console.warnings_since(0)


def test_classes_that_keep_nothing_are_told_by_number_and_names(tmp_path, command):
    rng = np.random.default_rng(0)
    y_N = np.concatenate([np.repeat(np.arange(5), 100), np.arange(5, 30)])
    z_NK = rng.normal(size=(len(y_N), 30)).astype(np.float32)
    z_NK[np.arange(len(y_N)), y_N] += 4
    np.save(tmp_path / "z.npy", z_NK)
    np.save(tmp_path / "y.npy", y_N)
    arguments = ["--logits", tmp_path / "z.npy", "--labels", tmp_path / "y.npy", "--keep-ratio", "0.3"]
    code, said = command(prune.main, *map(str, arguments), "--out", str(tmp_path / "out"))
    assert code == 0
    shown = ", ".join(str(c) for c in range(5, 15))
    assert f"prune: 25 of 30 classes keep no sample: {shown}, …." in said.replace("\n", " ")
    assert "25 of 30 classes keep nothing; they and the 10 most unusual others" in " ".join(said.split())
    assert any("25 of 30" in one for one in artifacts.load(tmp_path / "out").facts[artifacts.WARNINGS])

    code, said = command(prune.main, *map(str, arguments), "--out", str(tmp_path / "all"), "--min-per-class", "1")
    assert code == 0
    floored = artifacts.load(tmp_path / "all")
    assert min(floored.facts["class_counts"]) == 1
    assert floored.facts["count"] == round(0.3 * len(y_N))
    assert floored.manifest.inputs["min_per_class"] == 1
    assert artifacts.WARNINGS not in floored.facts
