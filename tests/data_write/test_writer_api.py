import numpy as np
import pytest

from fastkd.data.writer_api import load_writer, stratified_split, writer_names
from fastkd.errors import InputError


def test_shipped_writers_load_and_say_what_they_read():
    names = writer_names()
    assert {"arrays", "cifar10", "cifar100", "digits", "fashion_mnist", "image_folder"} <= set(names)
    for name in names:
        doc = load_writer(name).doc
        assert ": " in doc.splitlines()[0]
        assert f"python -m fastkd.write {name} data/" in doc


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fashion_mnits", "did you mean 'fashion_mnist'.*Known: arrays, cifar10"),
        ("zzz", "unknown.*Known: arrays"),
        ("my/own.py", "no such file"),
    ],
)
def test_unknown_writer(name, text):
    with pytest.raises(InputError, match=text):
        load_writer(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('boom')", "cannot be imported: ValueError: boom"),
        ("def read(options): ...", "needs a class `Options"),
        ("from fastkd.data.writer_api import WriterOptions as Options", "and a function `read"),
    ],
)
def test_broken_writer(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_writer(str(tmp_path / "own.py"))


def test_all_wrong_options_at_once():
    with pytest.raises(InputError) as caught:
        load_writer("digits").options({"jpeg_qualty": 5, "jpeg_quality": 101, "px": 30, "mode": "png"})
    text = str(caught.value)
    assert "jpeg_qualty: unknown key; did you mean 'jpeg_quality'?" in text
    assert "jpeg_quality: 101" in text
    assert "px: 30" in text
    assert "mode: 'png'" in text


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.999])
def test_stratified_split(ratio):
    labels = np.repeat([0, 1, 2, 3], [40, 10, 2, 1])
    train, val = stratified_split(labels, ratio, 0)
    assert sorted([*train, *val]) == list(range(53))
    expected = [min(max(1, round(ratio * n)), n - 1) for n in (40, 10, 2, 1)]
    assert np.bincount(labels[val], minlength=4).tolist() == expected


def test_stratified_split_depends_on_the_seed_alone():
    labels = np.arange(100) % 3
    assert stratified_split(labels, 0.2, 5)[1].tolist() == stratified_split(labels.tolist(), 0.2, 5)[1].tolist()
    assert stratified_split(labels, 0.2, 5)[1].tolist() != stratified_split(labels, 0.2, 6)[1].tolist()
    assert stratified_split(np.zeros(10), 0.2, 0)[1].tolist() == [1, 6]
