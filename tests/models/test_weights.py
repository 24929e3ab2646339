import argparse
import copy
import json
import os
import pathlib
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from fastkd import artifacts, console, models
from fastkd.errors import ArtifactError, InputError
from fastkd.models.weights import _head_entries


def net(seed: int, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    made = models.build("cifar/resnet8", num_classes)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return made


def make_run(path, module):
    def fill(directory):
        models.save_weights(module, directory / "student.safetensors")
        (directory / "model.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
        return artifacts.Built()

    artifacts.build(path, "RUN", {"seed": 0}, fill)
    return path


def refused(weights, name=None, num_classes=10) -> str:
    """Load what cannot be loaded; return the message after checking that the net stayed as it was."""
    module = net(1, num_classes)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InputError) as error:
        models.load_weights(module, weights, name=name)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    return str(error.value)


CHECKPOINTS = {
    "bare": lambda sd: sd,
    "model": lambda sd: {"epoch": 240, "model": sd, "best_acc": torch.tensor(72.3)},
    "state_dict": lambda sd: {"state_dict": sd, "arch": "resnet8", "betas": (0.9, 0.99)},
    "net": lambda sd: {"net": sd, "acc": 93.1},
    "namespace": lambda sd: {
        "opt": argparse.Namespace(lr=0.05, out=pathlib.Path("runs"), steps=[150, 180]),
        "model": sd,
    },
    "numpy": lambda sd: {
        "model": sd,
        "best_acc": np.float64(72.3),
        "top5": np.float32(91.0),
        "epoch": np.int64(240),
        "curve": np.arange(3.0),
    },
    "optimizer": lambda sd: {"model": sd, "optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()},
    "module.": lambda sd: {f"module.{k}": v for k, v in sd.items()},
    "_orig_mod.": lambda sd: {"model": {f"_orig_mod.{k}": v for k, v in sd.items()}},
    "both": lambda sd: {f"module._orig_mod.{k}": v for k, v in sd.items()},
    "no counters": lambda sd: {k: v for k, v in sd.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda sd: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", CHECKPOINTS)
def test_torch_checkpoints(tmp_path, form, legacy):
    source, target = net(0), net(1)
    file = tmp_path / "weights.pth"
    torch.save(CHECKPOINTS[form](source.state_dict()), file, _use_new_zipfile_serialization=not legacy)
    assert models.weights_digest(source) != models.weights_digest(target)
    models.load_weights(target, file)
    assert models.weights_digest(source) == models.weights_digest(target)


@pytest.mark.parametrize("suffix", [".pt", ".tar", ".ckpt"])
def test_other_suffixes(tmp_path, suffix):
    source, target = net(0), net(1)
    torch.save(source.state_dict(), tmp_path / f"w{suffix}")
    models.load_weights(target, str(tmp_path / f"w{suffix}"))
    assert models.weights_digest(source) == models.weights_digest(target)


def test_scalars_written_by_numpy_1(tmp_path):
    source, target = net(0), net(1)
    file = tmp_path / "old.pth"
    torch.save({"model": source.state_dict(), "best_acc": np.float64(1)}, file, _use_new_zipfile_serialization=False)
    assert b"cnumpy._core.multiarray\n" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    models.load_weights(target, file)
    assert models.weights_digest(source) == models.weights_digest(target)


def test_safetensors_round_trip(tmp_path):
    source, target = net(0).to(memory_format=torch.channels_last), net(1)
    models.save_weights(source, tmp_path / "w.safetensors")
    written = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert written.keys() == source.state_dict().keys()
    assert all(torch.equal(written[k], v) for k, v in source.state_dict().items())
    models.load_weights(target, tmp_path / "w.safetensors")
    assert models.weights_digest(source) == models.weights_digest(target)


def test_shared_tensors_are_written_each(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    models.save_weights(module, tmp_path / "w.safetensors")
    written = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(written["0.weight"], module[0].weight)
    assert torch.equal(written["1.weight"], module[0].weight)


def test_a_compiled_net_is_saved_and_loaded_by_its_own_names(tmp_path):
    source, target = net(0), net(1)
    models.save_weights(torch.compile(source), tmp_path / "w.safetensors")
    assert safetensors.torch.load_file(tmp_path / "w.safetensors").keys() == source.state_dict().keys()
    models.load_weights(torch.compile(target), tmp_path / "w.safetensors")
    assert models.weights_digest(target) == models.weights_digest(source)


def test_run(tmp_path):
    source, target = net(0), net(1)
    run = make_run(tmp_path / "run", source)
    models.load_weights(target, run)
    assert models.weights_digest(source) == models.weights_digest(target)


def test_damaged_run(tmp_path):
    run = make_run(tmp_path / "run", net(0))
    with (run / "student.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"oops")
    with pytest.raises(ArtifactError, match="damaged"):
        models.load_weights(net(1), run)
    assert "damaged" in refused(run)


def test_artifact_of_another_kind(tmp_path):
    artifacts.build(tmp_path / "subset", "SUBSET", {}, lambda _: artifacts.Built())
    assert "holds a SUBSET, where a RUN is expected" in refused(tmp_path / "subset")


def test_missing(tmp_path):
    missing = str(tmp_path / "nothing.pth")
    assert refused(missing) == f"{missing}: no such weights; expected a file or a RUN"
    assert str(tmp_path) in refused(tmp_path)
    assert "unknown kind of weights; expected .safetensors, .pth" in refused(__file__)


@pytest.mark.parametrize("keep", [0, 1, 500, -100])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_pickle(tmp_path, keep, legacy):
    file = tmp_path / "w.pth"
    torch.save(net(0).state_dict(), file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(file)
    assert f"{file}: not a whole torch checkpoint" in message
    assert message.endswith("Copy or download it again.")


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "w.safetensors"
    models.save_weights(net(0), file)
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(file)
    assert f"{file}: not a whole safetensors file" in message
    assert message.endswith("Copy or download it again.")


def test_noise_is_no_checkpoint(tmp_path):
    for seed in range(10):
        (tmp_path / "w.pt").write_bytes(np.random.default_rng(seed).bytes(200))
        assert "not a whole torch checkpoint" in refused(tmp_path / "w.pt")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    file, marker = tmp_path / "evil.pth", tmp_path / "marker"
    checkpoint = {"model": net(0).state_dict(), "best_acc": Evil(marker)}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    message = refused(file)
    assert not marker.exists()
    assert f"{file}: holds objects other than tensors (posix.system)" in message
    assert "torch.save(net.state_dict(), 'weights.pth')" in message
    # The file is what it claims to be: an unsafe reader would have run it.
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_code_behind_an_allowed_name_is_not_run(tmp_path):
    """The stand-ins keep nothing: what an allowed class holds cannot come back as something else."""
    file = tmp_path / "w.pth"
    torch.save({"model": np.float64(1), "opt": argparse.Namespace(model=net(0).state_dict())}, file)
    assert "holds no state_dict" in refused(file)


def test_whole_model_is_refused_and_the_advice_works(tmp_path):
    torch.save(source := net(0), tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "holds objects other than tensors (fastkd.models.resnet.CifarResNet)" in message
    code = message.partition("where it was made: ")[2].partition(". For a checkpoint")[0]
    assert code == "net = torch.load(FILE, weights_only=False); torch.save(net.state_dict(), 'weights.pth')"
    code = code.replace("FILE", repr(str(tmp_path / "w.pt"))).replace("'weights.pth'", repr(str(tmp_path / "ok.pth")))
    exec(code, {"torch": torch})
    models.load_weights(target := net(1), tmp_path / "ok.pth")
    assert models.weights_digest(target) == models.weights_digest(source)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "holds objects other than tensors (a TorchScript program)" in message
    assert "net = torch.jit.load(FILE)" in message


def test_reading_widens_nothing_for_others(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"model": net(0).state_dict(), "opt": argparse.Namespace(lr=1)}, file)
    before = set(torch.serialization.get_safe_globals())
    models.load_weights(net(1), file)
    added = set(torch.serialization.get_safe_globals()) - before
    assert {one.__module__.partition(".")[0] for one in added} <= {"torch"}  # its own lazily imported parts


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ({"epoch": 3, "weights": {}}, "found epoch, weights"),
        ({}, "found dict"),
        (torch.zeros(3), "found Tensor"),
        ([1, 2], "found list"),
        ({"model": {"fc.weight": np.zeros(3)}}, "found model"),
        ({"fc.weight": torch.zeros(3, device="meta")}, "found fc.weight"),
    ],
)
def test_no_state_dict(tmp_path, checkpoint, found):
    torch.save(checkpoint, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    assert "holds no state_dict; expected one (entry name → tensor) bare or under state_dict, model" in message
    assert message.endswith(found)


def test_other_class_count_is_said_in_words(tmp_path):
    models.save_weights(net(0, num_classes=1000), tmp_path / "w.safetensors")
    assert refused(tmp_path / "w.safetensors", name="cifar/resnet8") == (
        f"{tmp_path / 'w.safetensors'}: these weights do not fit the model cifar/resnet8: "
        "the checkpoint's classifier has 1000 classes, the model is built for 10; "
        "2 of another shape: fc.weight is [1000, 64], expected [10, 64], fc.bias is [1000], expected [10]. "
        "Build the model for 1000 classes, or give weights trained on its 10."
    )


def test_all_that_differs_is_listed_at_once(tmp_path):
    state = {k: v for k, v in net(0).state_dict().items() if not k.startswith("layer3")}
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    state["fc.weight"] = torch.zeros(10, 32)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    listed = "layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias, layer3.0.bn1.running_mean, "
    assert f"15 missing: {listed}layer3.0.bn1.running_var, …" in message
    assert "1 unknown to the model: extra" in message
    assert "2 of another shape: conv1.weight is [8, 3, 3, 3], expected [16, 3, 3, 3], fc.weight" in message
    assert "classes" not in message
    assert message.endswith("Check the model's name, or give weights that were trained with it.")


def test_half_precision_weights_are_widened(tmp_path):
    source, target = net(0), net(1)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    models.load_weights(target, tmp_path / "w.pt")
    assert target.fc.weight.dtype == torch.float32
    assert torch.equal(target.fc.weight, source.fc.weight.half().float())


# What people's training scripts write

FORMS = {
    "epoch beside flat": lambda sd: {**sd, "epoch": 3, "best_acc": 71.2, "optimizer": {"lr": 0.1}},
    "model.": lambda sd: {"state_dict": {f"model.{k}": v for k, v in sd.items()}, "pytorch-lightning_version": "2"},
    "net.": lambda sd: {f"net.{k}": v for k, v in sd.items()},
    "backbone.": lambda sd: {"model": {f"backbone.{k}": v for k, v in sd.items()}},
    "any_name.": lambda sd: {f"any_name.{k}": v for k, v in sd.items()},
    "module.model.": lambda sd: {f"module.model.{k}": v for k, v in sd.items()},
    "network": lambda sd: {"network": sd},
    "module": lambda sd: {"module": sd, "global_steps": 5},
    "student": lambda sd: {"student": sd},
    "nested": lambda sd: {"state": 1, "model": {"state_dict": sd, "name": "resnet8"}},
    "averaged": lambda sd: {"model_ema": {"n_averaged": torch.tensor(4), **{f"module.{k}": v for k, v in sd.items()}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_more_forms_of_checkpoints(tmp_path, form):
    source, target = net(0), net(1)
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pth")
    models.load_weights(target, tmp_path / "w.pth")
    assert models.weights_digest(source) == models.weights_digest(target)
    assert not console.warnings_since(0)


@pytest.mark.parametrize(
    ("raw", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("net", "ema_model")],
)
def test_an_average_is_taken_before_raw_weights_and_both_are_named(tmp_path, raw, average):
    source, averaged, target = net(0), net(2), net(1)
    torch.save({raw: source.state_dict(), average: averaged.state_dict(), "epoch": 9}, tmp_path / "w.pth")
    models.load_weights(target, tmp_path / "w.pth")
    assert models.weights_digest(target) == models.weights_digest(averaged)
    (warning,) = console.warnings_since(0)
    assert f"holds weights under '{average}' and under '{raw}': those under '{average}' are used" in warning
    assert models.takes_average(tmp_path / "w.pth")
    torch.save({raw: source.state_dict()}, tmp_path / "raw.pth")
    assert not models.takes_average(tmp_path / "raw.pth")


def test_of_two_nets_the_one_that_is_taken_is_named(tmp_path):
    source, other, target = net(0), net(2), net(1)
    torch.save({"model": source.state_dict(), "teacher": other.state_dict()}, tmp_path / "w.pth")
    models.load_weights(target, tmp_path / "w.pth")
    assert models.weights_digest(target) == models.weights_digest(source)
    assert "'model' and under 'teacher'" in console.warnings_since(0)[0]


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "student.", "module.model.", "_orig_mod.net."])
def test_entries_under_a_known_prefix_are_used_beside_others(tmp_path, prefix, capsys):
    """As Lightning writes them, with the weights of a loss or of a projection beside those of the network."""
    source, target = net(0), net(1)
    state = {f"{prefix}{k}": v for k, v in source.state_dict().items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2"}, tmp_path / "w.ckpt")
    models.load_weights(target, tmp_path / "w.ckpt")
    assert models.weights_digest(source) == models.weights_digest(target)
    told = " ".join(capsys.readouterr().out.split())
    assert f"the entries under 'state_dict.{prefix.removesuffix('.')}' are used, and 1 others are not" in told
    assert "criterion.weight" in told


def test_of_several_prefixes_that_fit_the_average_is_used_and_all_are_named(tmp_path):
    raw, averaged, target = net(0), net(2), net(1)
    state = {f"model.{k}": v for k, v in raw.state_dict().items()}
    state |= {f"model_ema.module.{k}": v for k, v in averaged.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    models.load_weights(target, tmp_path / "w.ckpt")
    assert models.weights_digest(target) == models.weights_digest(averaged)
    (warning,) = console.warnings_since(0)
    assert "under 'state_dict.model_ema.module' and under 'state_dict.model': those under" in warning
    assert "an exponential moving average of the others" in warning


def test_of_a_teacher_and_a_student_the_one_that_fits_is_loaded(tmp_path):
    source, target = net(0), net(1)
    torch.save(
        {"student": models.build("cifar/resnet14", 10).state_dict(), "teacher": source.state_dict()}, tmp_path / "w.pth"
    )
    models.load_weights(target, tmp_path / "w.pth")
    assert models.weights_digest(target) == models.weights_digest(source)
    assert not console.warnings_since(0)


def test_a_prefix_that_does_not_lead_to_a_fit_is_named(tmp_path):
    state = {f"encoder.{k}": v for k, v in net(0).state_dict().items() if not k.startswith("fc")}
    torch.save({**state, "head.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    assert (
        f"{len(state)} of its {len(state) + 1} entries begin with 'encoder.', and none of the model's does" in message
    )


# A new classifier


@pytest.mark.parametrize("form", [lambda sd: sd, lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}}])
def test_a_new_head_is_left_as_it_was_and_the_rest_is_loaded(tmp_path, form):
    source, target = net(0, num_classes=20), net(1, num_classes=5)
    torch.save(form(source.state_dict()), tmp_path / "w.pth")
    fc = target.fc.weight.clone()
    new = models.load_weights(target, tmp_path / "w.pth", name="cifar/resnet8", new_head=5)
    assert new == ["fc.weight", "fc.bias"]
    assert torch.equal(target.fc.weight, fc)
    expected = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(target.state_dict()[k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("torchvision/squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
        ("torchvision/vgg11", ["classifier.6.weight", "classifier.6.bias"]),
        ("torchvision/vit_b_32", ["heads.head.weight", "heads.head.bias"]),
        ("cifar/mobilenetv2", ["classifier.0.weight", "classifier.0.bias"]),
    ],
)
def test_the_classifier_is_found_by_its_shape(name, head):
    state = torch.get_rng_state()
    assert _head_entries(name, 5) == head
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_head_does_not_need_an_old_one_but_all_the_rest(tmp_path):
    """Self-supervised checkpoints have another head, or none."""
    target, state = net(1), {k: v for k, v in net(0).state_dict().items() if not k.startswith("fc.")}
    torch.save(state | {"fc.0.weight": torch.zeros(8, 64), "fc.2.weight": torch.zeros(2, 8)}, tmp_path / "moco.pth")
    for file in ("moco.pth", "none.pth"):
        models.load_weights(target, tmp_path / file, name="cifar/resnet8", new_head=10)
        torch.save(state, tmp_path / "none.pth")
    assert torch.equal(target.conv1.weight, state["conv1.weight"])
    state.pop("conv1.weight")
    torch.save(state, tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"1 missing: conv1\.weight"):
        models.load_weights(target, tmp_path / "none.pth", name="cifar/resnet8", new_head=10)


def test_other_classes_are_an_error_of_their_own_below_any_prefix(tmp_path):
    torch.save({"model": {f"backbone.{k}": v for k, v in net(0, 20).state_dict().items()}}, tmp_path / "w.pth")
    with pytest.raises(models.OtherClassesError, match="classifier has 20 classes, the model is built for 10"):
        models.load_weights(net(1), tmp_path / "w.pth")
    models.save_weights(models.build("cifar/resnet8x4", 20), tmp_path / "wide.safetensors")
    with pytest.raises(InputError) as error:
        models.load_weights(net(1), tmp_path / "wide.safetensors")
    assert type(error.value) is InputError


BAD = {
    "nan": (lambda t: t.fill_(float("nan")), "fc.weight (640 of 640)"),
    "one inf": (lambda t: t.index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))), "(1 of 640)"),
    "too large": (lambda t: t.double().fill_(1e300), "fc.weight (640 of 640)"),
    "complex": (lambda t: t.to(torch.complex64), "fc.weight is complex64, expected float32"),
    "bool": (lambda t: t > 0, "fc.weight is bool, expected float32"),
    "int8": (lambda t: (t * 100).to(torch.int8), "fc.weight is int8, expected float32"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("fault", BAD)
def test_tensors_that_cannot_be_weights_are_refused_by_name(tmp_path, fault, suffix):
    change, told = BAD[fault]
    state = {k: v.clone() for k, v in net(0).state_dict().items()}
    state["fc.weight"] = change(state["fc.weight"])
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save(state, tmp_path / f"w.{suffix}")
    assert told in refused(tmp_path / f"w.{suffix}")


@pytest.mark.parametrize("level", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_checkpoint_is_refused_before_it_is_inflated(tmp_path, level):
    torch.save(net(0).state_dict(), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "w.pth", "w", level) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member) + bytes(1 << 20))
    message = refused(tmp_path / "w.pth")
    assert "a zip file with compressed or overlapping members" in message
    models.load_weights(net(1), tmp_path / "plain.pth")


# What lies beside a file


def described_run(path, module, kind="RUN", **told):
    def fill(directory):
        models.save_weights(module, directory / "student.safetensors")
        described = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "model": "cifar/resnet8", "num_classes": 10}
        (directory / "model.json").write_text(json.dumps(described | told))
        return artifacts.Built()

    return artifacts.build(path, kind, {"seed": 0}, fill)[0].path


@pytest.mark.parametrize("kind", ["RUN", "STUDENT"])
@pytest.mark.parametrize("inside", ["", "student.safetensors"])
def test_what_lies_beside_is_read_of_a_folder_and_of_its_file(tmp_path, kind, inside):
    source, target = net(0), net(1)
    place = described_run(tmp_path / "made", source, kind) / inside
    assert models.description(place)["model"] == "cifar/resnet8"
    models.load_weights(target, place, name="cifar/resnet8")
    assert models.weights_digest(source) == models.weights_digest(target)
    message = refused(place, name="torchvision/resnet18")
    assert "are the weights of cifar/resnet8 by their model.json, and are requested for torchvision/resnet18" in message
    (tmp_path / "link.safetensors").symlink_to(place / "student.safetensors" if not inside else place)
    assert models.description(tmp_path / "link.safetensors")["mean"] == [0.1, 0.2, 0.3]


def test_a_copied_pair_is_read_as_well_and_other_files_are_not(tmp_path):
    run = described_run(tmp_path / "made", net(0))
    (tmp_path / "copy").mkdir()
    for name in ("student.safetensors", "model.json"):
        (tmp_path / "copy" / name).write_bytes((run / name).read_bytes())
    assert models.description(tmp_path / "copy" / "student.safetensors")["std"] == [0.4, 0.5, 0.6]
    models.save_weights(net(0), tmp_path / "copy" / "other.safetensors")
    assert models.description(tmp_path / "copy" / "other.safetensors") is None


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no", '{"mean": [1, 2], "std": [1, 1, 1]}', '{"mean": [1,2,3], "std": [0, 1, 1]}']
)
def test_a_description_without_a_normalisation_is_refused(tmp_path, text):
    models.save_weights(net(0), tmp_path / "student.safetensors")
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.json: does not contain the mean and std"):
        models.description(tmp_path / "student.safetensors")


# Weights that torchvision and timm publish


def small(num_classes: int) -> nn.Module:
    torch.manual_seed(num_classes)
    return models.build("torchvision/squeezenet1_1", num_classes)


@pytest.mark.parametrize("weights", ["pretrained", "DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_published_torchvision_weights(monkeypatch, weights):
    source, asked = small(1000), []

    def fetch(entry, **options):
        asked.append((entry, options["check_hash"]))
        return source.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    torch.manual_seed(1)
    target = models.build("torchvision/squeezenet1_1", 1000)
    models.load_weights(target, weights, name="torchvision/squeezenet1_1")
    assert models.weights_digest(target) == models.weights_digest(source)
    assert asked == [(torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1, True)]
    with pytest.raises(InputError, match="the checkpoint's classifier has 1000 classes, the model is built for 10"):
        models.load_weights(small(10), weights, name="torchvision/squeezenet1_1")


def test_published_weights_that_cannot_be_fetched(monkeypatch):
    def fetch(entry, **_):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    message = refused("DEFAULT", name="torchvision/resnet18")
    assert "could not fetch ResNet18_Weights.IMAGENET1K_V1 from https://" in message
    assert "no route to host" in message
    assert "A local file (.safetensors, .pth) may be given instead." in message


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1"])
def test_unknown_published_weights(weights):
    message = refused(weights, name="torchvision/resnet50")
    assert f"{weights}: no such weights" in message
    assert "torchvision publishes for resnet50: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT" in message


def test_published_names_mean_nothing_to_cifar_nets():
    assert refused("DEFAULT", name="cifar/resnet8") == "DEFAULT: no such weights; expected a file or a RUN"


def test_old_names_in_torchvision_files(tmp_path):
    """Files of DenseNet and of vision transformers bear names that torchvision's loaders translate; so do we."""
    dense = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in dense.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "dense.pth")
    target = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    models.load_weights(target, tmp_path / "dense.pth", name="torchvision/densenet121")
    assert models.weights_digest(target) == models.weights_digest(dense)

    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in vit.state_dict().items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in old
    torch.save(old, tmp_path / "vit.pth")
    target = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    models.load_weights(target, tmp_path / "vit.pth", name="torchvision/vit_b_16")
    assert models.weights_digest(target) == models.weights_digest(vit)


def test_auxiliary_classifiers_in_torchvision_files_are_dropped(tmp_path):
    source = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "googlenet.pth")
    target = models.build("torchvision/googlenet", 3)
    models.load_weights(target, tmp_path / "googlenet.pth", name="torchvision/googlenet")
    assert torch.equal(target.fc.weight, source.fc.weight)
    assert torch.equal(target.conv1.conv.weight, source.conv1.conv.weight)


def test_timm_pretrained(monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source, target = (models.build("timm/resnet10t", 1000) for _ in range(2))

    def pretrained(net, pretrained):
        assert (net, pretrained) == ("resnet10t", True)
        torch.rand(3)
        return source

    monkeypatch.setattr(timm, "create_model", pretrained)
    state = torch.get_rng_state()
    models.load_weights(target, "pretrained", name="timm/resnet10t")
    assert models.weights_digest(target) == models.weights_digest(source)
    assert torch.equal(torch.get_rng_state(), state)

    def offline(*_, **__):
        raise FileNotFoundError("cannot reach the hub\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    message = refused("pretrained", name="timm/resnet10t")
    assert message.startswith(
        "could not fetch timm's pretrained weights of resnet10t: cannot reach the hub. A local file"
    )
    assert "or 'pretrained'" in refused("pretraind", name="timm/resnet10t")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A timm network as it lies on the Hugging Face hub, in a folder that takes the hub's place."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    source = models.build("timm/resnet10t", 20)
    models.save_weights(source, tmp_path / "model.safetensors")
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "classifier": "fc", "input_size": [3, 64, 64]}
    described = {"architecture": "resnet10t", "num_classes": 20, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(described))

    def download(repo_id, filename, **_):
        assert repo_id == "someone/pets"
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return source


def test_weights_of_the_hub_are_loaded_by_timm(hub):
    target, weights = models.build("timm/resnet10t", 20), "hf-hub:someone/pets"
    models.load_weights(target, weights, name="timm/resnet10t")
    assert models.weights_digest(target) == models.weights_digest(hub)
    assert models.published_digest(weights, "timm/resnet10t") == models.weights_digest(hub)
    normalisation = models.native_normalisation("timm/resnet10t", weights)
    assert normalisation == models.Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert not normalisation.guessed
    assert not models.is_cached(weights, "timm/resnet10t")
    new = models.load_weights(models.build("timm/resnet10t", 5), weights, name="timm/resnet10t", new_head=5)
    assert new == ["fc.weight", "fc.bias"]


def test_weights_of_the_hub_are_for_timm_and_say_what_they_do_not_fit(hub):
    assert "are for networks of timm" in refused("hf-hub:someone/pets", name="cifar/resnet8")
    with pytest.raises(InputError, match="do not fit the model timm/resnet18"):
        models.load_weights(models.build("timm/resnet18", 20), "hf-hub:someone/pets", name="timm/resnet18")
    with pytest.raises(InputError, match="could not fetch hf-hub:other/net"):
        models.load_weights(models.build("timm/resnet18", 20), "hf-hub:other/net", name="timm/resnet18")


# The digest


def test_digest_ignores_memory_format_counters_wrapping_and_order():
    module = net(0)
    digest = models.weights_digest(module)
    assert len(digest) == 32
    assert int(digest, 16) > 0
    assert models.weights_digest(copy.deepcopy(module).to(memory_format=torch.channels_last)) == digest
    assert models.weights_digest(nn.DataParallel(module)) == digest
    assert models.weights_digest(torch.compile(module)) == digest
    module.bn1.num_batches_tracked += 5
    assert models.weights_digest(module) == digest
    swapped = nn.Module()
    for child in reversed(list(dict(module.named_children()))):
        swapped.add_module(child, module.get_submodule(child))
    assert list(swapped.state_dict()) != list(module.state_dict())
    assert models.weights_digest(swapped) == digest


def test_digest_sees_every_value_name_shape_and_dtype():
    module = nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8))
    digests = {models.weights_digest(module)}
    for entry, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.view(-1)[-1] += 1e-3
            digests.add(models.weights_digest(module))
            assert len(digests) > 1, entry
    assert len(digests) == 6  # weight, weight, bias, mean, variance, and the first one
    zeros = nn.Linear(2, 8, bias=False)
    nn.init.zeros_(zeros.weight)
    reshaped = nn.Linear(8, 2, bias=False)
    nn.init.zeros_(reshaped.weight)
    renamed = nn.Sequential(zeros)
    wide = copy.deepcopy(zeros)
    wide.weight.data = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert len({models.weights_digest(m) for m in (zeros, reshaped, renamed, wide)}) == 4
