"""Any training loop gets a recipe's samples in their views, with what the teacher says of those very views."""

import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import seconds

import fastkd
from fastkd import console, public_loader
from fastkd.engine import losses
from fastkd.errors import InputError, LoaderError
from fastkd.export.dataset import export_dataset
from fastkd.pipeline import Pipeline

VIEWS = ("data.view.family=pad_crop_flip", "labels.views=3", "labels.reshape=false")


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("overrides", [VIEWS, ("labels.reshape=false",)], ids=["views", "plain"])
def test_a_plain_loop_trains_on_views_whose_logits_are_the_live_teachers(tiny_recipe, overrides):
    """The teacher is asked again about the very images that came; another view would be far off."""
    loader = fastkd.Loader(tiny_recipe.path, overrides, normalise=False)
    normalised = fastkd.Loader(tiny_recipe.path, overrides)
    teacher = Pipeline(tiny_recipe(*overrides)).teacher.net
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    trace, seen = [], []
    for _ in range(4):
        for raw, (images, labels, teacher_logits, sample_ids) in zip(loader, normalised, strict=True):
            torch.testing.assert_close(raw.sample_ids, sample_ids)
            mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (loader.mean, loader.std))
            torch.testing.assert_close(images, (raw.images / 255 - mean) / std, atol=1e-5, rtol=1e-5)
            live = centred(teacher(raw.images))
            torch.testing.assert_close(teacher_logits, live, atol=2**-10 * live.abs().max().item(), rtol=0)
            loss = fastkd.kd_loss(net(images), labels, teacher_logits, alpha=0.9, gamma=0.1, temperature=4.0).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            trace.append(loss.item())
            seen.append((sample_ids, images))
    assert len(trace) == 4 * len(loader) == 12
    assert np.mean(trace[-3:]) < 0.8 * np.mean(trace[:3])
    first, second = (torch.cat([ids for ids, _ in seen[start : start + 3]]) for start in (0, 3))
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_epochs_are_those_of_fastkds_own_training(tiny_recipe):
    """The same order and pixels; `epoch` goes on by itself, and may be set."""
    from fastkd.stages.training_setup import prepare

    job = prepare(Pipeline(tiny_recipe(*VIEWS)).training_inputs)
    loader = fastkd.Loader(tiny_recipe(*VIEWS), normalise=False)
    loader.epoch = 4
    for number in (4, 5):
        for theirs, ours in zip(job.batches(job.epoch_ids(number), number), loader, strict=True):
            assert torch.equal(theirs.images, ours.images)
            assert torch.equal(theirs.labels, ours.labels)
            assert torch.equal(theirs.stored[0].float(), ours.teacher_logits)
    assert loader.epoch == 6


def test_a_loop_within_a_loop_over_one_loader_is_an_error_and_a_new_loop_is_none(tiny_recipe):
    """As in a notebook, whose cell is run again: what was broken off is forgotten; two loaders go side by side."""
    loader, other = fastkd.Loader(tiny_recipe.path), fastkd.Loader(tiny_recipe.path)
    outer = iter(loader)
    next(outer)
    assert len(list(loader)) == len(loader)
    with pytest.raises(LoaderError, match="this epoch was interrupted"):
        next(outer)
    for _ in loader:
        break
    assert sum(len(list(other)) for _ in loader) == len(loader) * len(other)


def test_batches_may_be_kept(tiny_recipe):
    """fastkd's own loop gets buffers that are used again; here a list of all batches holds what it should."""
    for normalise in (False, True):
        loader = fastkd.Loader(tiny_recipe(*VIEWS), normalise=normalise)
        copies = [tuple(tensor.clone() for tensor in batch) for batch in loader]
        loader.epoch = 0
        for kept, copy in zip(list(loader), copies, strict=True):
            assert all(map(torch.equal, kept, copy))


def test_topk_labels_are_given_as_logits_of_all_classes(tiny_recipe):
    """Their softmax at T has the stored mass."""
    recipe = tiny_recipe(*VIEWS, "labels.topk=2")
    whole, some = fastkd.Loader(tiny_recipe(*VIEWS)), fastkd.Loader(recipe)
    for a, b in zip(whole, some, strict=True):
        assert b.teacher_logits.shape == (25, 3)
        p, q = ((batch.teacher_logits / 4).softmax(1) for batch in (a, b))
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # two of three, and what remains


def test_val_comes_whole_and_in_order(tiny_recipe, tiny_npz):
    """Without a teacher, and with a last batch that is not full."""
    loader = fastkd.Loader(tiny_recipe(), split="val", normalise=False)
    batches = list(loader)
    assert len(loader) == len(batches)
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, np.load(tiny_npz)["val_images"])
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(60))
    assert {batch.teacher_logits for batch in batches} == {None}


def test_a_recipe_without_a_teacher_has_no_logits(tiny_recipe):
    """All samples, in batches, and None where logits would be."""
    loader = fastkd.Loader(tiny_recipe("teacher=null", "prune.keep_ratio=1.0"))
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert all(batch.teacher_logits is None for batch in batches)


def test_an_export_is_read_with_the_recipe(tiny_recipe, tmp_path):
    """On a machine that has neither the teacher nor the rest."""
    whole = list(fastkd.Loader(tiny_recipe(*VIEWS), normalise=False))
    (subset,) = (tmp_path / "artifacts").glob("subset-*")
    export_dataset(subset, tmp_path / "half", data=tiny_recipe().data.path)
    own = (f"data.path={tmp_path / 'half'}", "teacher={recipe: null, model: cifar/resnet8, weights: gone.pth}")
    for a, b in zip(whole, fastkd.Loader(tiny_recipe(*VIEWS, *own), normalise=False), strict=True):
        assert all(map(torch.equal, a, b))
    with pytest.raises(InputError, match=r"is an artifact; give the recipe, and for an export data\.path="):
        fastkd.Loader(tmp_path / "half")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune={method: infobatch, keep_ratio: 1.0}",), "selects again in each epoch of fastkd's own loop"),
        (
            ("prune={method: stratified, keep_ratio: 0.5, rotate: true}",),
            r"prune\.method=stratified selects again in each epoch",
        ),
        (
            ("prune={method: stratified, keep_ratio: 0.5, tilt: 0.5, weight_power: 0.5}",),
            r"prune\.weight_power=0\.5: losses are weighted in fastkd's own loop",
        ),
        (("labels.mode=online",), "run a live teacher in your own loop"),
        (("train.batch_size=1000",), "larger than the 75 samples"),
    ],
)
def test_what_only_fastkds_own_loop_can_do_is_refused(tiny_recipe, overrides, message):
    """With what to do instead."""
    with pytest.raises(InputError, match=message):
        fastkd.Loader(tiny_recipe(*overrides))


def test_examples_of_docstrings_run(tiny_recipe):
    """As they stand there."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for thing in (public_loader.Loader, losses.kd_loss):
        globs = {"recipe": tiny_recipe.path, thing.__name__: thing}
        tests = [test for test in finder.find(thing, thing.__name__, globs=globs) if test.examples]
        assert tests
        for test in tests:
            report: list[str] = []
            with console.quieted():  # it tells what it builds
                runner.run(test, out=report.append)
            assert not runner.failures, "".join(report)


def test_the_top_level_is_lazy_and_says_what_it_has():
    """``import fastkd`` imports nothing heavy; asking does."""
    code = (
        "import sys, fastkd; assert 'torch' not in sys.modules; fastkd.load_recipe; assert 'torch' not in sys.modules; "
        "fastkd.kd_loss; assert 'torch' in sys.modules and 'ffcv' not in sys.modules; "
        "assert {'Loader', 'kd_loss', 'load_recipe'} <= set(fastkd.__all__)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=seconds(120), check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastkd.nonsense  # noqa: B018
