import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastkd import pipeline, recipe
from fastkd.bench.breakdown import changed, reference_recipe
from fastkd.bench.reference import Reference, augmentation, export_images, step
from fastkd.bench.savings import savings_variants
from fastkd.data.loader import Loader
from fastkd.engine.inference import evaluate
from fastkd.engine.prefetch import prefetch_to_device
from fastkd.engine.step import train_batch, train_step
from fastkd.pipeline import Pipeline
from fastkd.recipe import View
from fastkd.stages.training_setup import prepare


def reference_pipeline(loaded: recipe.Recipe) -> Pipeline:
    return Pipeline(reference_recipe(savings_variants(loaded)[0].recipe))


def test_a_step_matches_the_formulas_of_loss_and_sgd():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    x, labels, T, loss = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]), 3.0, recipe.Loss(temperature=3.0)
    weight = student.weight.detach().double().requires_grad_()
    logits, target = x.double() @ weight.T, F.softmax(teacher(x).double() / T, 1).detach()
    q = F.softmax(logits / T, 1)
    kl = (target * (target / q).log()).sum() / 5
    ce = -F.softmax(logits, 1)[torch.arange(5), labels].log().mean()
    expected = 0.1 * ce + 0.9 * T**2 * kl
    expected.backward()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    value, top1 = step(student, teacher, optimizer, loss, x, labels)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    updated = weight - 0.5 * (weight.grad + 0.01 * weight)
    torch.testing.assert_close(student.weight.double(), updated, rtol=1e-4, atol=1e-6)
    assert teacher.weight.grad is None


def test_a_step_matches_fastkds_in_fp32(tiny_recipe):
    pipe = reference_pipeline(tiny_recipe())
    setup, student = prepare(pipe.training_inputs), prepare(pipe.training_inputs).student
    optim = pipe.recipe.optim
    optimizer = torch.optim.SGD(
        student.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    for batch in itertools.islice(prefetch_to_device(setup.batches(setup.ids, 0), pipe.runtime), 2):
        images = batch.images
        _, loss_B = train_step(setup.state, train_batch(batch, setup.teacher.live))
        normalised = torch.addcmul(student.shift, images.float(), student.scale)
        loss, _ = step(student.net, pipe.teacher.net.net, optimizer, pipe.recipe.loss, normalised, batch.labels)
        assert loss == pytest.approx(loss_B.mean().item(), rel=1e-4)
    for a, b in zip(setup.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_it_trains_on_all_images_and_evaluates_as_fastkd(tiny_recipe, tiny, tmp_path):
    pipe = reference_pipeline(tiny_recipe())
    reference = Reference(pipe, tmp_path / "images")
    assert (reference.steps_per_epoch, reference.images_per_epoch) == (6, 150)
    mean, std = (torch.tensor(pipe.teacher.key_fields[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    images_of = {int(b.sample_ids[0]): b for b in Loader(tiny, "train", 1).batches(np.arange(150), last="pad")}
    labels_of = Loader(tiny, "train", 1).labels()
    seen = []
    for _ in range(6):
        lr, images, labels = next(reference._batches)
        assert 0 < lr <= pipe.recipe.optim.lr
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        pixels = (255 * (images * std + mean)).round().to(torch.uint8)
        ids = pixels[:, 0, 0, 0].int() + 256 * pixels[:, 1, 0, 0].int()  # the tiny images hold their number
        assert labels.tolist() == labels_of[ids].tolist()
        seen += ids.tolist()
    assert sorted(seen) == list(range(150))
    assert seen != sorted(seen)
    assert len(images_of) == 150

    before = [p.clone() for p in reference.student.parameters()]
    assert reference.advance(4) > 0
    assert all((a != b).any() for a, b in zip(before, reference.student.parameters(), strict=True))
    student = prepare(pipe.training_inputs).student
    student.net.load_state_dict(reference.student.state_dict())
    val = pipe.loader("val", 20).batches(np.arange(60), last="pad")
    assert reference.evaluate() == pytest.approx(evaluate(pipe.runtime, student.eval(), val))


def test_most_images_limits_the_exported_images(tiny_recipe, tmp_path):
    pipe = reference_pipeline(changed(tiny_recipe(), train={"batch_size": 20}))
    Reference(pipe, tmp_path, most_images=40)
    files = list(tmp_path.glob("train/*/*.png"))
    assert len(files) == 40
    assert {file.parent.name for file in files} == {"000000", "000001", "000002"}


def test_jpegs_are_exported_unchanged(tiny_npz, tmp_path):
    written, _ = pipeline.write("arrays", tmp_path / "jpegs", {"file": str(tiny_npz), "workers": 1, "mode": "jpg"})
    export_images(written, "val", np.array([3, 59]), tmp_path / "images")
    files = sorted((tmp_path / "images").glob("*/*"), key=lambda file: file.name)
    assert [file.name for file in files] == ["0000000003.jpg", "0000000059.jpg"]
    assert [file.parent.name for file in files] == ["000000", "000002"]
    batch = next(Loader(written, "val", 1).batches(np.array([3]), last="pad"))
    pixels = np.asarray(Image.open(files[0])).astype(int)
    assert np.abs(pixels - batch.images[0].permute(1, 2, 0).numpy()).mean() < 2  # two decoders


@pytest.mark.parametrize("family", ["none", "flip", "pad_crop_flip", "random_resized_crop_flip"])
def test_augmentations_match_the_recipes_family(family):
    pixels = np.random.default_rng(0).integers(1, 256, (12, 16, 3), dtype=np.uint8)
    mirrored = pixels[:, ::-1]
    different = set()
    for _ in range(40):
        image = Image.fromarray(pixels)
        for transform in augmentation(View(family=family), (12, 16)):
            image = transform(image)
        found = np.asarray(image)
        assert found.shape == (12, 16, 3)
        different.add(found.tobytes())
        if family in ("none", "flip"):
            assert (found == pixels).all() or (family == "flip" and (found == mirrored).all())
        if family == "pad_crop_flip":  # shifted by up to an eighth of each side: 2 columns, 2 rows (1.5 rounded)
            inside = found[2:-2, 2:-2]
            places = [(y, x) for y in range(5) for x in range(5)]
            assert any((inside == side[y : y + 8, x : x + 12]).all() for side in (pixels, mirrored) for y, x in places)
    assert len(different) == {"none": 1, "flip": 2}.get(family, len(different))
    assert len(different) > 10 or family in ("none", "flip")
