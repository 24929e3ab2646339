"""Random and crafted input to everything that reads a file or a text: only fastkd's own errors are raised."""

import contextlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastkd import artifacts, models, pipeline, prune, recipe, write
from fastkd.artifacts import Artifact, Built
from fastkd.errors import ArtifactError, FastkdError, InputError

many = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

MINIMAL = {
    "name": "x",
    "data": {"path": "d"},
    "student": {"model": "cifar/resnet8"},
    "optim": {"lr": 0.1},
    "train": {"epochs": 2, "batch_size": 8},
}
SECTIONS = [*recipe.Recipe.model_fields]
KEYS = sorted(
    {name for section in (recipe.Data, recipe.Prune, recipe.Train, recipe.Optim) for name in section.model_fields}
)

# --- recipes --------------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**30, max_value=10**60)
    | st.floats()
    | st.dates()
    | st.binary(max_size=8)
    | st.text(max_size=12)
    | st.sampled_from(["${oc.env:HOME}", "${name}", "${", "???", "!!python/name:os.system", "*a", "&a", "1:1:1", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(KEYS) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)
# What has a meaning in YAML comes up more often than by chance.
MARKS = """{ } [ ] & * !! ? | > ' " # % 0x 1e9 .inf ~ ${ @ ` name train &a *a !!int <<: --- ..."""
marks = st.sampled_from([*MARKS.split(), ": ", "- ", "\n", "\n  ", "\t", "---\n"])
yaml_text = st.lists(marks | st.text(max_size=3), max_size=25).map("".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


def loads(file: Path, content: bytes | str, overrides: tuple[str, ...] = ()) -> recipe.Recipe | None:
    """Load, if it is a recipe; any other error than the project's own fails the test."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        return recipe.load(file, overrides)
    except InputError as error:
        said = str(error)
    assert str(file) in said or "override" in said
    assert len(said) < 20_000
    return None


@many
@given(data=st.binary(max_size=60))
def test_random_bytes_as_a_recipe__are_read_or_refused_with_a_message(file, data):
    """No bytes whatever bring a recipe's reader down."""
    assert loads(file, data) is None


@many
@given(text=yaml_text)
def test_random_yaml_as_a_recipe__is_read_or_refused_with_a_message(file, text):
    """Nor does what looks like YAML, alone or behind a recipe that is right."""
    assert loads(file, text) is None
    loads(file, yaml.safe_dump(MINIMAL) + text)


@many
@given(
    section=st.sampled_from(SECTIONS) | st.text(max_size=6),
    key=st.sampled_from(KEYS) | st.text(max_size=6),
    value=values,
)
def test_random_values_of_recipe_keys__are_accepted_or_refused_with_a_message(file, section, key, value):
    """Known and unknown keys, whatever is under them; what loads, loads again as it was written down."""
    for tree in (MINIMAL | {section: value}, MINIMAL | {section: {key: value}}):
        with contextlib.suppress(yaml.YAMLError):  # not all of it can be written as YAML
            if loaded := loads(file, yaml.safe_dump(tree)):
                assert loads(file, recipe.dump(loaded)) is not None


names = st.lists(
    st.sampled_from([*SECTIONS, *KEYS, "0", "[0]", "[", "]", ".", "..", ""]) | st.text(max_size=4), max_size=4
)


@many
@given(name=names.map("".join), value=yaml_text | values.map(str))
@example(name="[", value="1")
def test_random_overrides__are_accepted_or_refused_with_a_message(file, name, value):
    """Overrides are read as safely as files; so are the ``--set`` of prune."""
    loads(file, yaml.safe_dump(MINIMAL), (f"{name}={value}",))
    loads(file, yaml.safe_dump(MINIMAL), (f"{name}{value}",))
    with contextlib.suppress(InputError):
        assert isinstance(recipe.settings_of([f"{name}={value}"]), dict)


@many
@given(value=yaml_text | values.map(str))
@example("2024-99-99")
@example("!!bool perhaps")
def test_random_options_of_a_writer__are_accepted_or_refused_with_a_message(value):
    """What is no plain value is the text that it is: a path may look like anything."""
    found = write._key_values([f"root={value}"])["root"]
    assert isinstance(found, str | bool | int | float | list | None)


BOMBS = {
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(30)),
    "recursive": "name: &a [*a]",
    "merge": "a: &a {x: 1}\nb: {<<: *a}",
    "deep lists": "a: " + "[" * 20_000,
    "deep maps": "a: " + "{a: " * 10_000,
    "deep blocks": "".join(f"{' ' * n}a:\n" for n in range(900)),
    "deep dashes": "a: " + "- " * 20_000,
    "many digits": "seed: " + "9" * 20_000,
    "many hex digits": "seed: 0x" + "f" * 20_000,
    "sexagesimal": "seed: 1" + ":1" * 5000,
    "huge float": "optim: {lr: 1.0e+999}",
    "huge key": "x" * 50_000 + ": 1",
    "python": "name: !!python/object/apply:os.system ['touch {owned}']",
    "python new": "name: !!python/object/new:os.system ['touch {owned}']",
    "python name": "name: !!python/name:os.system",
    "int tag": "seed: !!int ''",
    "bool tag": "seed: !!bool 'perhaps'",
    "time tag": "seed: !!timestamp 'noon'",
    "binary tag": "seed: !!binary 'é'",
    "own tag": "name: !mine x",
    "env": "name: x\ndata: {path: '${oc.env:FASTKD_SECRET}'}",
    "env key": "'${oc.env:FASTKD_SECRET}': 1",
    "double": "a: xx\nb: ${a}${a}",
    "decode": "name: ${oc.decode:'[1]'}",
    "bad date": "seed: 2024-99-99",
}


@pytest.mark.parametrize("name", BOMBS)
def test_crafted_yaml_with_tags_or_aliases_or_deep_nesting__is_refused_at_once(file, name, tmp_path, monkeypatch):
    """Nothing is run, filled in from the environment or blown up."""
    monkeypatch.setenv("FASTKD_SECRET", "hunter2")
    text = BOMBS[name].replace("{owned}", str(tmp_path / "owned"))
    for content in (text, yaml.safe_dump(MINIMAL) + text):
        file.write_text(content)
        with pytest.raises(InputError) as error:
            recipe.load(file)
        assert "hunter2" not in str(error.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", BOMBS)
def test_crafted_overrides__are_refused_at_once(file, name, tmp_path, monkeypatch):
    """A teacher's overrides stand in a recipe: they are no more to be trusted than that."""
    monkeypatch.setenv("FASTKD_SECRET", "hunter2")
    key, _, value = BOMBS[name].replace("{owned}", str(tmp_path / "owned")).partition(": ")
    file.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError) as error:
        recipe.load(file, [f"{key}={value}"])
    assert "hunter2" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_forbidden_contents_of_a_recipe__are_named_with_their_line(file):
    """Each with the line where it stands."""
    for text, word in (("a: &a 1\nb: *a", "an alias"), ("a: !x 1", "a tag"), ("a: ${b}", "an interpolation")):
        file.write_text(text)
        with pytest.raises(InputError, match=rf"r\.yaml: not YAML, or not plain: found {word}.*line \d"):
            recipe.load(file)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ".", "/", "/dev/null", "~"])
def test_a_path_that_is_not_a_recipe__is_refused_with_a_message(path):
    """Names that no file can have, folders and devices."""
    with pytest.raises(InputError, match="recipe "):
        recipe.load(path)


# --- manifests ------------------------------------------------------------------------------------------------------


def fill(directory: Path) -> Built:
    np.save(directory / "indices.npy", np.arange(50))
    return Built(facts={"count": 50, "of": 100, "ratio": 0.5, "names": ["é", "b"]})


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("subset")
    return artifacts.build(folder / "subset", "SUBSET", {"a": 1, "b": [1, 2.5]}, fill, parents={"SCORES": "p"})[0]


def opens(artifact: Artifact, content: bytes) -> Artifact | None:
    (artifact.path / "manifest.json").write_bytes(content)
    try:
        return artifacts.load(artifact.path)
    except ArtifactError as error:
        said = str(error)
    assert str(artifact.path) in said
    return None


@many
@given(data=st.binary(max_size=100))
def test_random_bytes_as_a_manifest__are_refused_with_a_message(subset, data):
    """No bytes whatever are a manifest but a manifest."""
    assert opens(subset, data) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@many
@given(field=st.sampled_from([*artifacts.Manifest.model_fields, "other"]), value=json_values, sealed=st.booleans())
def test_random_json_in_fields_of_a_manifest__is_refused_with_a_message(subset, field, value, sealed):
    """Whether or not somebody made the digest right again."""
    fields = json.loads(subset.manifest.model_dump_json()) | {field: value}
    if sealed:
        with contextlib.suppress(ValueError):  # NaN has no canonical form
            fields["digest"] = artifacts.digest_of(fields)
    if loaded := opens(subset, json.dumps(fields).encode()):
        assert sealed or loaded.manifest == subset.manifest
        assert loaded.key == subset.key
        with contextlib.suppress(ArtifactError):
            assert loaded.array("indices.npy").shape == (50,)


@many
@given(cut=st.integers(0, 1000), much=st.integers(0, 40), put=st.binary(max_size=20))
def test_a_manifest_with_changed_bytes__is_refused_with_a_message(subset, cut, much, put):
    """What is let through is the same manifest, written otherwise."""
    text = subset.manifest.model_dump_json(indent=2).encode()
    if loaded := opens(subset, text[:cut] + put + text[cut + much :]):
        assert loaded.manifest == subset.manifest


parts = st.sampled_from(["..", ".", "", "/", "\\", "a", "b.npy", "\0", "~", "C:", "indices.npy", "é", "views"])


@many
@given(name=st.lists(parts, max_size=5).map("/".join) | st.text(max_size=10))
def test_a_file_name_that_points_outside_of_an_artifact__is_refused(subset, name):
    """Right checksums or not: the only file that can be loaded is the one that lies there."""
    fields = json.loads(subset.manifest.model_dump_json())
    fields["files"] = {name: fields["files"]["indices.npy"]}
    fields["digest"] = artifacts.digest_of(fields)
    if loaded := opens(subset, json.dumps(fields).encode()):
        assert list(loaded.manifest.files) == ["indices.npy"]


# --- arrays ---------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def with_header(header: bytes, data: bytes = b"\0" * 64, version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


headers = st.fixed_dictionaries(
    {},
    optional={
        "descr": st.sampled_from(
            ["<i8", ">i8", "|O", "<f4", "<U3", "|V8", "", "<i8,<i4", "M8[ns]", [("a", "<i8")], "x", 1, None, []]
        )
        | st.text(max_size=5),
        "fortran_order": st.booleans() | st.integers() | st.none(),
        "shape": st.lists(st.integers() | st.integers(0, 20) | st.booleans(), max_size=4).map(tuple)
        | st.none()
        | st.text(max_size=3),
        "more": st.none(),
    },
)
arrays_bytes = (
    st.binary(max_size=100)
    | headers.map(lambda h: with_header(repr(h).encode("utf-8", "replace")))
    | st.tuples(
        st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace")),
        st.sampled_from([1, 2, 3]),
    ).map(lambda hv: with_header(hv[0], version=hv[1]))
    | st.tuples(st.integers(0, 200), st.integers(0, 20), st.binary(max_size=10)).map(
        lambda c: (whole := npy(np.arange(8.0))) and whole[: c[0]] + c[2] + whole[c[0] + c[1] :]
    )
)


@many
@given(data=arrays_bytes)
def test_random_bytes_as_an_array__are_refused_with_a_message(file, data):
    """What is opened is an array of plain numbers, no larger than its file."""
    path = file.with_suffix(".npy")
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        array = artifacts.open_array(path)
        assert not array.dtype.hasobject
        assert array.nbytes <= len(data)


CRAFTED_HEADERS = {
    "deep": b"(" * 5000,
    "deep lists": b"{'descr': " + b"[" * 900 + b"]" * 900 + b", 'fortran_order': False, 'shape': ()}",
    "unhashable": b"{[]: 1}",
    "call": b"__import__('os').system('touch owned')",
    "unfinished": b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,",
    "long integers": b"{'descr': '<i8', 'fortran_order': False, 'shape': (3L,)}",
    "huge": b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"9" * 4000 + b",)}",
    "tabs": b"{'a':\n\t1\n  2",
    "null": b"\0" * 100,
    "records of objects": b"{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}",
}


@pytest.mark.parametrize("name", CRAFTED_HEADERS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_array_headers_of_pickles_or_terabytes__are_refused_before_memory_is_allocated(tmp_path, name, version):
    """In each version of the format; nothing is run."""
    (tmp_path / "a.npy").write_bytes(with_header(CRAFTED_HEADERS[name], version=version))
    with contextlib.chdir(tmp_path), pytest.raises(InputError, match=r"a\.npy: not a plain \.npy array"):
        artifacts.open_array(tmp_path / "a.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@settings(many, max_examples=60)
@given(data=arrays_bytes, which=st.sampled_from(["z", "y", "ids"]))
def test_random_bytes_as_user_logits_or_labels_or_lists__are_refused_with_a_message(file, data, which):
    """python -m fastkd.prune on arrays that are none ends in one error, and leaves nothing."""
    folder = file.parent
    contents = {"z": npy(np.eye(6, 3, dtype=np.float32)), "y": npy(np.arange(6) % 3), "ids": npy(np.arange(6))} | {
        which: data
    }
    for name, content in contents.items():
        (folder / f"{name}.npy").write_bytes(content)
    chosen = (
        recipe.Prune(method="list", ids=str(folder / "ids.npy")) if which == "ids" else recipe.Prune(keep_ratio=0.5)
    )
    with pytest.raises(InputError, match=rf"{which}\.npy|logits|classes have no samples"):
        pipeline.prune_arrays(folder / "z.npy", folder / "y.npy", folder / "out", chosen)
    assert not (folder / "out").exists()


Z, Y = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), np.arange(9) % 3
NAN = np.where(np.arange(27).reshape(9, 3) == 13, np.nan, Z)


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (Z.astype(">f4"), Y, "K ≥ 2, of 2, 4 or 8 bytes and little-endian, got >f4"),
        (Z.astype(np.longdouble), Y, "z.npy: expected floating-point logits"),
        (Z.astype(np.complex64), Y, "z.npy: expected floating-point logits"),
        (Z.astype(object), Y, "z.npy: not a plain .npy array"),
        (Z[:, :1], Y, "z.npy: expected floating-point logits"),
        (Z[0], Y, "z.npy: expected floating-point logits"),
        (Z[:0], Y[:0], "z.npy: holds no rows to select from"),
        (NAN.astype(np.float32), Y, "1 rows of the teacher's logits are not finite, first row 4"),
        (np.where(np.isnan(NAN), np.inf, NAN), Y, "1 rows of the teacher's logits are not finite, first row 4"),
        (Z.astype(np.float64) * 1e300, Y, "rows of the teacher's logits are not finite"),
        (Z, Y[:-1], "y.npy: expected 9 integer labels [N], got int64 [8]"),
        (Z, Y[:0], "y.npy: expected 9 integer labels [N], got int64 [0]"),
        (Z, Y - 1, "y.npy: label -1 at row 0 is out of range 0 … 2"),
        (Z, Y + 1, "y.npy: label 3 at row 2 is out of range 0 … 2"),
        (Z, np.full(9, 2**64 - 1, np.uint64), "y.npy: label 18446744073709551615 at row 0 is out of range"),
        (Z, Y.astype(object), "y.npy: not a plain .npy array"),
        (Z, Y.astype(bool), "y.npy: expected 9 integer labels"),
        (Z, Y.astype("U1"), "y.npy: expected 9 integer labels"),
        (Z, Y[:, None], "y.npy: expected 9 integer labels"),
    ],
)  # fmt: skip
def test_invalid_user_arrays__are_refused_with_specific_errors(command, tmp_path, z, y, message):
    """One message, exit code 2, and nothing is left behind."""
    np.save(tmp_path / "z.npy", z, allow_pickle=True)
    np.save(tmp_path / "y.npy", y, allow_pickle=True)
    code, said = command(
        prune.main, "--logits", tmp_path / "z.npy", "--labels", tmp_path / "y.npy", "--out", tmp_path / "out"
    )
    assert code == 2
    assert message in said
    assert said.count("error: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["y.npy", "z.npy"]


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: (z, y.astype(">i8")),
        lambda z, y: (z, y.astype(np.uint8)),
        lambda z, y: (np.asfortranarray(z), y),
        lambda z, y: (z.astype(np.float64), y),
    ],
)
def test_user_arrays_in_another_memory_layout__are_read_correctly(tmp_path, change: Callable):
    """Other integers, column by column, wider numbers: the same SUBSET."""
    found = []
    for name, (z, y) in {"plain": (Z, Y), "other": change(Z, Y)}.items():
        np.save(tmp_path / "z.npy", z)
        np.save(tmp_path / "y.npy", y)
        made, _ = pipeline.prune_arrays(
            tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / name, recipe.Prune(keep_ratio=0.5)
        )
        found.append((made.array("indices.npy").tolist(), made.array("logits.npy").tolist()))
    assert found[0] == found[1]


# --- weights --------------------------------------------------------------------------------------------------------


def safetensors_file(header: bytes, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "C64", "I64", "BOOL", "F4", "X", "", None, 1]),
        "shape": st.lists(st.integers(-1, 20) | st.integers(), max_size=3) | st.none(),
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), max_size=3) | st.none(),
        "more": st.none(),
    },
)
weight_names = st.sampled_from(
    ["conv1.weight", "fc.weight", "fc.bias", "__metadata__", "module.fc.weight", ""]
) | st.text(max_size=4)
safetensors_bytes = (
    st.binary(max_size=100)
    | st.binary(max_size=60).map(safetensors_file)
    | st.dictionaries(weight_names, entries | json_values, max_size=3).map(
        lambda h: safetensors_file(json.dumps(h).encode())
    )
    | st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=30)).map(lambda c: struct.pack("<Q", c[0]) + c[1])
)


@pytest.fixture(scope="module")
def net_and_weights(tmp_path_factory) -> tuple[object, bytes]:
    net = models.build("cifar/resnet8", 3)
    file = tmp_path_factory.mktemp("net") / "w.safetensors"
    models.save_weights(net, file)
    return net, file.read_bytes()


@many
@given(data=safetensors_bytes)
def test_random_bytes_as_weights__are_refused_with_a_message(file, net_and_weights, data):
    """No header brings the reader down, and the net stays as it was."""
    net, _ = net_and_weights
    path = file.with_suffix(".safetensors")
    path.write_bytes(data)
    before = models.weights_digest(net)
    with pytest.raises(InputError, match=r"r\.safetensors"):
        models.load_weights(net, path)
    assert models.weights_digest(net) == before


@settings(many, max_examples=200)
@given(at=st.integers(0, 6000), put=st.binary(min_size=1, max_size=6))
def test_weights_with_changed_header_bytes__are_refused_with_a_message(file, net_and_weights, at, put):
    """Refused, or weights that fit: a header has no checksum, and is why RUNs have a manifest."""
    net, whole = net_and_weights
    path = file.with_suffix(".safetensors")
    path.write_bytes(whole[:at] + put + whole[at + len(put) :])
    with contextlib.suppress(FastkdError):
        models.load_weights(net, path)


def test_data_that_would_run_as_code__are_never_unpickled_or_evaluated():
    """What would run code from a file does not stand in the sources."""
    words = ("import pickle", "marshal", " eval(", " exec(", "unsafe_load", "full_load", "allow_pickle=True")
    for source in Path(artifacts.__file__).parent.parent.rglob("*.py"):
        text = source.read_text()
        assert not [word for word in words if word in text], source
        assert text.count("yaml.load(") == text.count(", _PlainLoader)"), source
        assert text.count(" torch.load(") == text.count(", weights_only=True"), source
