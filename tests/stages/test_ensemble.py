"""Several teachers as one: the rows are the means of those of its members."""

import numpy as np
import pytest
import torch

from fastkd import models, pipeline, recipe
from fastkd.errors import InputError
from fastkd.pipeline import Pipeline

K = 3


@pytest.fixture
def checkpoints(tmp_path):
    files = []
    for seed, name in enumerate(("cifar/resnet8", "cifar/resnet8", "cifar/wrn_16_1")):
        torch.manual_seed(seed)
        files.append((name, tmp_path / f"{seed}.safetensors"))
        models.save_weights(models.build(name, K), files[-1][1])
    return files


@pytest.fixture
def ensemble(tiny_recipe, checkpoints):
    """Return a function that makes a recipe with an ensemble of the checkpoints."""
    mean = "mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]"

    def load(*overrides, weights=(1.0, 1.0, 1.0)):
        entries = [
            f"{{model: {name}, weights: {file}, weight: {weight}, {mean}}}"
            for (name, file), weight in zip(checkpoints, weights, strict=True)
        ]
        return tiny_recipe("teacher.recipe=null", f"teacher.ensemble=[{', '.join(entries)}]", *overrides)

    load.mean = mean
    return load


def rows(recipe_):
    return Pipeline(recipe_).scores.array("logits.npy").astype(np.float64)


@pytest.fixture
def own_rows(tiny_recipe, checkpoints):
    """The rows of each member alone."""
    settings = ["teacher.recipe=null", "teacher.mean=[0.5,0.5,0.5]", "teacher.std=[0.2,0.2,0.2]"]
    return [rows(tiny_recipe(*settings, f"teacher.model={n}", f"teacher.weights={f}")) for n, f in checkpoints]


def test_three_give_the_mean_of_their_rows(ensemble, own_rows):
    np.testing.assert_allclose(rows(ensemble()), np.mean(own_rows, axis=0), atol=1e-3)
    weighted = (2 * own_rows[0] + own_rows[1] + own_rows[2]) / 4
    np.testing.assert_allclose(rows(ensemble(weights=(2.0, 1.0, 1.0))), weighted, atol=1e-3)


def test_probabilities_are_averaged_where_the_recipe_says_so(ensemble, own_rows):
    def softmax(z):
        powers = np.exp(z - z.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    found = rows(ensemble("teacher.mix=probabilities"))
    np.testing.assert_allclose(np.exp(found), np.mean([softmax(z) for z in own_rows], axis=0), atol=1e-5)


def test_a_student_is_trained_from_stored_views_and_the_key_names_every_teacher(ensemble, checkpoints):
    views = ("data.view.family=flip", "labels.views=2", "train.epochs=2")
    pipe = Pipeline(ensemble(*views))
    run, built = pipe.train()
    assert built
    assert list(pipe.costs) == ["write", "score", "prune", "label", "train"]
    teacher = run.manifest.inputs["teacher"]
    assert (teacher["model"], teacher["mix"]) == ("ensemble of 3", "logits")
    for member, (name, file) in zip(teacher["members"], checkpoints, strict=True):
        net = models.build(name, K)
        models.load_weights(net, file)
        assert (member["model"], member["weights"], member["weight"]) == (name, models.weights_digest(net), 1.0)
    assert not pipeline.train(ensemble(*views))[1]
    other = Pipeline(ensemble(*views, weights=(1.0, 1.0, 3.0)))
    assert other.teacher_key_fields != teacher


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["teacher.mean=[0.5,0.5,0.5]", "teacher.std=[0.2,0.2,0.2]"], "`mean` is a setting of one network"),
        (["teacher.recipe=t.yaml"], "give either `recipe`, or `model` and `weights`, or `logits`, or `ensemble`"),
        (["teacher.ensemble=[]", "teacher.recipe=t.yaml", "teacher.mix=probabilities"], "`mix` belongs to `ensemble`"),
        (["teacher.ensemble=[{model: cifar/resnet8, weihgts: a}]"], "teacher.ensemble.0.weihgts: unknown key; did you"),
        (["teacher.ensemble=[{model: cifar/resnet8}]"], "teacher.ensemble.0.weights: missing"),
    ],
)
def test_what_an_ensemble_cannot_be_is_refused(ensemble, changes, told):
    with pytest.raises(InputError) as error:
        ensemble(*changes)
    assert told in str(error.value)


def test_no_code_concerns_every_member(ensemble, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTKD_NO_CODE", "1")
    with pytest.raises(InputError, match="the model is Python code"):
        ensemble("teacher.ensemble=[{model: 'net.py:f', weights: a.pth}]")
    assert recipe.Teacher(ensemble=ensemble().teacher.ensemble).models[-1] == "cifar/wrn_16_1"
