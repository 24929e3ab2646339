"""Networks from a user's own code."""

import sys

import pytest
import torch

from fastkd import models
from fastkd.errors import InputError

SOURCE = """
from collections import OrderedDict
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, form="tensor"):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes)
        self.form = form

    def forward(self, images):
        logits = self.fc(self.conv(images).relu().mean((2, 3)))
        return {"tensor": logits, "tuple": (logits, 0), "mapping": OrderedDict(loss=None, logits=logits)}[self.form]

class Without(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = Net(num_classes + 1)

    def forward(self, images):
        return self.net(images)[:, 1:]

def with_tuple(num_classes):
    return Net(num_classes, "tuple")

def with_mapping(num_classes):
    return Net(num_classes, "mapping")

def always_seven(num_classes):
    return Net(7)

def broken(num_classes):
    raise KeyError("layers")

def no_module(num_classes):
    return 3

number = 5
"""


@pytest.fixture
def net_py(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(SOURCE)
    return file


def test_a_file_and_a_module_on_the_path_build_the_same_net(net_py, monkeypatch, tmp_path):
    (tmp_path / "mine_package").mkdir()
    (tmp_path / "mine_package" / "__init__.py").touch()
    (tmp_path / "mine_package" / "nets.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    images = torch.rand(2, 3, 8, 8)
    outputs = []
    for name in (f"{net_py}:Net", "mine_package.nets:Net"):
        torch.manual_seed(0)
        outputs.append(models.build(name, 5)(images))
        assert models.model_key_fields(name)["source"] == models.source_digest(f"{net_py}:Net")
    assert outputs[0].shape == (2, 5)
    assert torch.equal(*outputs)
    assert models.model_key_fields(f"{net_py}:Net")["model"] == "net.py:Net"  # without its folder
    assert models.model_key_fields("cifar/resnet8") == {"model": "cifar/resnet8"}
    del sys.modules["mine_package.nets"], sys.modules["mine_package"]


def test_a_changed_file_is_imported_again_and_has_another_digest(net_py):
    name = f"{net_py}:Net"
    before = models.source_digest(name)
    assert models.build(name, 5).conv.out_channels == 4
    net_py.write_text(SOURCE.replace("Conv2d(3, 4, 3)", "Conv2d(3, 6, 3)").replace("Linear(4,", "Linear(6,"))
    assert models.build(name, 5).conv.out_channels == 6
    assert models.source_digest(name) != before


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("absent", "has no function absent; expected absent(num_classes)"),
        ("number", "has no function number"),
        ("broken", r"broken\(num_classes=5\) failed: KeyError: 'layers'"),
        ("no_module", r"no_module returned int, expected a torch\.nn\.Module"),
    ],
)
def test_a_factory_that_makes_no_net_is_refused(net_py, function, told):
    with pytest.raises(InputError, match=told.replace("(num_classes)", r"\(num_classes\)")):
        models.build(f"{net_py}:{function}", 5)


def test_code_that_is_not_there_or_cannot_be_imported_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.py: no such file"):
        models.build(f"{tmp_path}/none.py:Net", 5)
    with pytest.raises(InputError, match="there is no module fastkd_nowhere on the Python path"):
        models.build("fastkd_nowhere:Net", 5)
    (tmp_path / "bad.py").write_text("import fastkd_nowhere")
    with pytest.raises(InputError, match=r"bad\.py cannot be imported: ModuleNotFoundError"):
        models.build(f"{tmp_path}/bad.py:Net", 5)


def test_no_code_forbids_it(net_py, monkeypatch):
    monkeypatch.setenv("FASTKD_NO_CODE", "1")
    with pytest.raises(InputError, match="the model is Python code"):
        models.build(f"{net_py}:Net", 5)


@pytest.mark.parametrize("function", ["with_tuple", "with_mapping"])
def test_logits_are_taken_out_of_a_teachers_output_and_a_student_must_return_them_alone(net_py, function):
    name = f"{net_py}:{function}"
    torch.manual_seed(0)
    net, images = models.build(name, 5), torch.rand(2, 3, 8, 8)
    output = net(images)
    expected = output["logits"] if function == "with_mapping" else output[0]
    assert torch.equal(models.LogitsOnly(net)(images), expected)
    assert models.refusal(name, 5, 8, 8, only_logits=False) == ""
    assert "expected logits [2, 5]" in models.refusal(name, 5, 8, 8)


def test_a_net_of_a_fixed_number_of_classes_passes_until_the_data_set_is_known(net_py):
    name = f"{net_py}:always_seven"
    assert models.refusal(name, None, 8, 8) == ""
    assert models.refusal(name, 7, 8, 8) == ""
    assert models.refusal(name, 5, 8, 8) == "it returns [2, 7], expected logits [2, 5]"


def test_a_new_head_of_a_users_net_and_one_that_has_none(net_py, tmp_path):
    source = models.build(f"{net_py}:Net", 20)
    models.save_weights(source, tmp_path / "w.safetensors")
    target = models.build(f"{net_py}:Net", 5)
    before = target.fc.weight.clone()
    new = models.load_weights(target, tmp_path / "w.safetensors", name=f"{net_py}:Net", new_head=5)
    assert new == ["fc.weight", "fc.bias"]
    assert torch.equal(target.conv.weight, source.conv.weight)
    assert torch.equal(target.fc.weight, before)
    with pytest.raises(InputError, match="no layer depends on the number of classes"):
        models.load_weights(target, tmp_path / "w.safetensors", name=f"{net_py}:always_seven", new_head=5)


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_a_wrapper_loads_the_weights_of_the_net_inside(net_py, tmp_path, prefix):
    """Which has one class more than the wrapper: 1,001, of which the first is dropped."""
    inner, wrapped = models.build(f"{net_py}:Net", 6), models.build(f"{net_py}:Without", 5)
    torch.save({prefix + k: v for k, v in inner.state_dict().items()}, tmp_path / "w.pth")
    models.load_weights(wrapped, tmp_path / "w.pth", name=f"{net_py}:Without")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(wrapped(images), inner(images)[:, 1:])
    with pytest.raises(models.OtherClassesError, match="classifier has 6 classes, the model is built for 5"):
        models.load_weights(models.build(f"{net_py}:Without", 4), tmp_path / "w.pth", name=f"{net_py}:Without")
