"""Configuration: files, options and overrides, and what an error tells."""

from __future__ import annotations

import pytest
from pydantic import Field

from vm_core import config, plugins
from vm_core.embedding import ImageSettings
from vm_core.encoders import Encoder
from vm_core.encoders import parse as parse_encoder
from vm_core.errors import VisualMemoryError
from vm_core.sources import Source, from_argument
from vm_core.sources import parse as parse_source


class Inner(plugins.Settings):
    depth: int = 1


class Run(plugins.Settings):
    name: str
    rate: float = 0.5
    images: ImageSettings = ImageSettings()
    maybe: Inner | None = None
    parts: tuple[str, ...] = ()
    table: dict = Field(default_factory=dict)


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_file_options_and_overrides_in_this_order(file):
    path = file("name: file\nrate: 0.1\nimages: {max_pixels: 7}\nparts: [a, b]\n")
    found = config.load(
        Run,
        path,
        ["rate=0.3", "images.thumbnail_pixels=0", "parts.1=c", "maybe.depth=4", "table.a.b=[1, x]"],
        {"rate": 0.2, "name": "option"},
    )
    assert (found.name, found.rate, found.parts) == ("option", 0.3, ("a", "c"))
    assert found.images == ImageSettings(max_pixels=7, thumbnail_pixels=0)
    assert found.maybe == Inner(depth=4)
    assert found.table == {"a": {"b": [1, "x"]}}


def test_no_file():
    assert config.load(Run, None, ["name=x=y"]).name == "x=y"


def test_a_key_left_empty_in_the_file_can_be_set(file):
    assert config.load(Run, file("name: x\nmaybe:\n"), ["maybe.depth=3"]).maybe == Inner(depth=3)


def test_options_are_not_changed_by_overrides():
    options = {"name": "x", "images": {"max_pixels": 7}}
    config.load(Run, None, ["images.max_pixels=8"], options)
    assert options == {"name": "x", "images": {"max_pixels": 7}}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("nam: x", [], r"unknown key 'nam'\. Known keys: name, rate, images, maybe, parts, table"),
        ("rate: 1", [], r"name is missing"),
        ("name: x\nrate: fast", [], r"rate = 'fast': .*valid number"),
        (
            "name: x\nimages: {max_pixel: 1}",
            [],
            r"unknown key .images\.max_pixel.\. Known keys: max_pixels, max_bytes, thumbnail",
        ),
        (
            "name: x\nmaybe: {deep: 1}",
            [],
            r"unknown key 'maybe\.deep'\. Known keys: depth$",
        ),
        ("name: [x", [], r"is not valid YAML"),
        ("- a\n- b", [], r"must hold KEY: VALUE lines"),
        ("", [], r"must hold KEY: VALUE lines"),
        (b"name: \xff\xfe", [], r"is not valid YAML"),
        ("name: x", ["rate"], r"--set 'rate' is not KEY=VALUE\. .*--set encoder\.batch_size=64"),
        ("name: x", ["=3"], r"--set '=3' is not KEY=VALUE"),
        ("name: x", ["rate=[1"], r"--set 'rate=\[1': not valid YAML"),
        ("name: x", ["name.first=1"], r"--set name\.first: name is a single value"),
        ("name: x\nparts: [a]", ["parts.1=b"], r"'1' must be a position from 0 to 0 in a list"),
        ("name: x\nparts: [a]", ["parts.x=b"], r"'x' must be a position from 0 to 0 in a list"),
        ("name: x\nparts: []", ["parts.0=b"], r"--set parts\.0: the list is empty"),
    ],
)
def test_errors_say_what_is_wrong(file, text, overrides, message):
    with pytest.raises(VisualMemoryError, match=message):
        config.load(Run, file(text), overrides)


def test_the_error_names_the_file(file):
    path = file("nam: x")
    with pytest.raises(VisualMemoryError, match=f"^configuration {path}: "):
        config.load(Run, path)


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(VisualMemoryError, match=r"does not exist\. Give a YAML file"):
            config.load(Run, str(path))


# --- plug-ins ---


def test_plugins_are_the_modules_of_a_package():
    assert plugins.known("vm_core.sources") == ["folder", "manifest", "tfrecord"]
    assert plugins.known("vm_core.encoders") == ["keras_hub", "saved_model"]
    for kind in plugins.known("vm_core.sources"):
        source = parse_source({"kind": kind, "path": "/data"})
        assert isinstance(source, Source)
        assert source.kind == kind
    assert isinstance(parse_encoder({"kind": "saved_model", "path": "/data"}), Encoder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "/d"}, r"sources: .* has no kind\. Write kind: folder \| manifest \| tfrecord"),
        ("/d", r"sources: '/d' has no kind"),
        ({"kind": "zip"}, r"kind 'zip' is unknown\. Known: folder, manifest, tfrecord"),
        ({"kind": "os"}, r"kind 'os' is unknown"),
        ({"kind": ["folder"]}, r"is unknown"),
        ({"kind": "folder"}, r"sources \(folder\): path is missing"),
        (
            {"kind": "folder", "path": "/d", "extension": ".png"},
            r"unknown key 'extension'\. Known keys: .*extensions",
        ),
        (
            {"kind": "folder", "path": "/d", "share": [0.5, 0.2]},
            r"share \[0\.5, 0\.2\] must be \[low, high\] with 0 <= low < high <= 1",
        ),
        ({"kind": "folder", "path": "/d", "share": [0, 2]}, r"must be \[low, high\]"),
    ],
)
def test_wrong_plugins(settings, message):
    with pytest.raises(VisualMemoryError, match=message):
        parse_source(settings)


def test_a_plugins_nested_settings_are_checked():
    wrong = {"kind": "saved_model", "path": "/d", "preprocessing": {"size": 3}}
    with pytest.raises(VisualMemoryError, match=r"unknown key 'preprocessing.size'.*resize, crop"):
        parse_encoder(wrong)


def test_settings_cannot_be_changed():
    source = parse_source({"kind": "folder", "path": "/d"})
    with pytest.raises(ValueError, match="frozen"):
        source.path = "/e"
    assert parse_source(source) is source


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ("images.csv", "manifest"),
        ("gs://b/images.parquet", "manifest"),
        ("/d/train.tfrecord-*", "tfrecord"),
        ("/d/tfrecord", "tfrecord"),
        ("/tfrecords/photos", "folder"),
        ("photos", "folder"),
    ],
)
def test_a_path_alone_tells_its_kind(argument, kind):
    assert from_argument(argument).kind == kind
