"""The demo's assets as they are fetched: real wheels, the real encoder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import demo.fetch
from demo import encoder, images
from demo.fetch import STAMP, STEPS, DemoAssets, Step, fetch, main, run_step
from demo.wheels import Wheel, downloaded
from vm_core import storage
from vm_core.errors import VisualMemoryError

# Embeddings of `structured_images` by an independent conversion of the same checkpoint: the
# mean and the maximum of five groups of 256 features.
GOLDEN_MEAN = [
    [0.0522070, 0.0494939, 0.0373590, 0.0288174, 0.0243785],
    [0.0555265, 0.0494986, 0.0401026, 0.0301560, 0.0256097],
    [0.0531659, 0.0535462, 0.0427562, 0.0314020, 0.0260231],
]
GOLDEN_MAX = [
    [3.317321, 3.848868, 2.389876, 2.190345, 1.055857],
    [3.716395, 3.748238, 2.553975, 2.364294, 1.221519],
    [3.171629, 4.106993, 2.626313, 2.357390, 1.055957],
]
FLOWERS_PER_SPECIES = {
    "aquilegia": 18,
    "bellflower": 25,
    "calendula": 19,
    "iris": 22,
    "leucanthemum": 21,
    "peony": 26,
    "phlox": 21,
    "rose": 20,
    "rudbeckia": 15,
    "viola": 23,
}
TOLERANCE = 1e-5 * 4.106993  # of the largest feature


@pytest.fixture(scope="session")
def cache() -> str:
    """Kept between test runs, so that only the first one downloads."""
    return os.environ.get("VISUAL_MEMORY_CACHE", ".cache")


@pytest.fixture(scope="session")
def assets(cache: str) -> DemoAssets:
    return fetch(cache)


@pytest.fixture(scope="session")
def encode(assets: DemoAssets) -> Callable[[np.ndarray], np.ndarray]:
    hub = pytest.importorskip("tensorflow_hub")
    encoder = hub.load(assets.encoder)
    return lambda batch: np.asarray(encoder(batch))


def structured_images() -> np.ndarray:
    """Coloured squares over gradients, (3, 224, 224, 3) float32 in [0, 1]."""
    squares = np.random.default_rng(7).random((3, 8, 8, 3)).astype(np.float32)
    squares = squares.repeat(28, axis=1).repeat(28, axis=2)
    ramp = np.linspace(0, 1, 224, dtype=np.float32)
    tint = np.array([1, 0.5, 0], np.float32)
    return (squares + ramp[:, None, None] + ramp[None, :, None] * tint) / 3


def test_encoder_agrees_with_the_golden_embeddings(encode):
    embeddings = encode(structured_images())
    assert embeddings.shape == (3, 1280)
    assert embeddings.dtype == np.float32
    groups = embeddings.reshape(3, 5, 256)
    np.testing.assert_allclose(groups.mean(axis=2), GOLDEN_MEAN, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(groups.max(axis=2), GOLDEN_MAX, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 224, 224, 3), (2, 160, 192, 3)])
def test_encoder_takes_any_batch_and_image_size(encode, shape):
    embeddings = encode(np.full(shape, 0.5, np.float32))
    assert embeddings.shape == (shape[0], 1280)
    assert np.isfinite(embeddings).all()


@pytest.mark.slow
def test_conversion_writes_the_same_bytes_in_every_process(assets, tmp_path):
    def digests(folder: str) -> dict[str, str]:
        files = [Path(folder, "saved_model.pb"), *sorted(Path(folder, "variables").iterdir())]
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    with downloaded(encoder.WHEEL, str(tmp_path)) as wheel:
        encoder.build(wheel, str(tmp_path / "again"))
    assert digests(str(tmp_path / "again")) == digests(assets.encoder)


def test_images_are_in_one_folder_per_class(assets):
    def counts(name: str) -> dict[str, int]:
        folders = [path for path in Path(assets.images, name).iterdir() if path.is_dir()]
        return {folder.name: len(list(folder.iterdir())) for folder in folders}

    flowers = counts("flowers")
    assert flowers == FLOWERS_PER_SPECIES
    assert sum(flowers.values()) == images.FLOWER_COUNT
    assert counts("textiles") == {"nominal": 1000, "local-defect": 500, "global-defect": 500}
    assert "MIT" in Path(assets.images, "SOURCES.txt").read_text()


def test_second_fetch_does_nothing_and_loads_no_tensorflow(assets, cache, capsys):
    outcomes = []
    assert fetch(cache, outcomes.append) == assets
    assert [outcome.seconds for outcome in outcomes] == [None] * len(STEPS)
    assert main(["--cache", cache]) == 0
    assert capsys.readouterr().out.count("up to date") == len(STEPS)
    program = "import sys, demo.fetch; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def step(monkeypatch) -> Step:
    """A step without a download that writes its wheel's version."""
    wheel = Wheel("package", "1", "0" * 64)
    monkeypatch.setattr(demo.fetch, "downloaded", lambda w, _: contextlib.nullcontext(w.version))
    return Step("step", "a/b", wheel, recipe=1, build=write_version)


def write_version(version: str, folder: str) -> None:
    Path(folder, f"version-{version}").touch()


def test_step_is_done_once(step, tmp_path):
    assert run_step(step, str(tmp_path)).seconds is not None
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"version-1", STAMP}
    assert run_step(step, str(tmp_path)).seconds is None


def test_step_in_a_bucket(step, bucket):
    assert run_step(step, f"{bucket}/cache").seconds is not None
    names = [file.path for file in storage.walk(bucket)]
    assert names == [f"{bucket}/cache/a/b/{name}" for name in (STAMP, "version-1")]
    assert run_step(step, f"{bucket}/cache").seconds is None


@pytest.mark.parametrize(
    "change",
    [{"wheel": Wheel("package", "2", "1" * 64)}, {"recipe": 2}],
    ids=["wheel", "recipe"],
)
def test_step_is_redone_when_its_stamp_differs(step, tmp_path, change):
    run_step(step, str(tmp_path))
    (tmp_path / "a/b/left-over").touch()
    changed = step._replace(**change)
    assert run_step(changed, str(tmp_path)).seconds is not None
    names = {path.name for path in (tmp_path / "a/b").iterdir()}
    assert names == {f"version-{changed.wheel.version}", STAMP}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert run_step(changed, str(tmp_path)).seconds is None


@pytest.mark.parametrize("stamp", [None, b"", b"{"])
def test_folder_without_a_whole_stamp_is_redone(step, tmp_path, stamp):
    (tmp_path / "a/b").mkdir(parents=True)
    if stamp is not None:
        (tmp_path / "a/b" / STAMP).write_bytes(stamp)
    assert run_step(step, str(tmp_path)).seconds is not None
    assert run_step(step, str(tmp_path)).seconds is None


def test_failed_step_keeps_what_was_there(step, tmp_path):
    def fail(wheel: str, folder: str) -> None:
        raise VisualMemoryError("no")

    run_step(step, str(tmp_path))
    with pytest.raises(VisualMemoryError, match="no"):
        run_step(step._replace(recipe=2, build=fail), str(tmp_path))
    assert run_step(step, str(tmp_path)).seconds is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path):
    wrong = STEPS[0].wheel._replace(sha256="0" * 64)
    with pytest.raises(VisualMemoryError, match="not the one that was checked") as error:
        run_step(STEPS[0]._replace(wheel=wrong), str(tmp_path))
    assert wrong.requirement in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_package_that_is_not_there_names_value_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = Wheel("clustimage", "0.0.0", "0" * 64)
    with (
        pytest.raises(VisualMemoryError, match=r"(?s)clustimage==0\.0\.0.*Check the network"),
        downloaded(missing, str(tmp_path)),
    ):
        pass


def test_command_reports_an_error_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["--cache", str(tmp_path)]) == 1
    assert "error: cannot download" in capsys.readouterr().err


def flower_wheel(path: Path, table: str, extra: dict[str, bytes]) -> str:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("flower_images/flower_labels.csv", table)
        for number in range(1, images.FLOWER_COUNT + 1):
            archive.writestr(f"flower_images/{number:04d}.png", b"png")
        for name, data in extra.items():
            archive.writestr(name, data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clustimage/data/flower_images.zip", inner.getvalue())
    return str(path)


def label_table(label: str) -> str:
    rows = (f"{number:04d}.png,{label}" for number in range(1, images.FLOWER_COUNT + 1))
    return "\n".join(["file,label", *rows])


def test_unexpected_members_are_ignored(tmp_path):
    extra = {"../outside.png": b"x", "/absolute.png": b"x", "flower_images/9999.png": b"x"}
    table = label_table("1") + "\n../../9999.png,2\n9999.png,2"
    wheel = flower_wheel(tmp_path / "flowers.whl", table, extra)
    images.unpack_flowers(wheel, str(tmp_path / "deep" / "out"))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".png"]
    assert len(written) == images.FLOWER_COUNT
    assert {path.parent for path in written} == {tmp_path / "deep" / "out" / "rose"}


@pytest.mark.parametrize("label", ["10", "-1", "../rose", ""])
def test_label_outside_the_species_is_refused(tmp_path, label):
    wheel = flower_wheel(tmp_path / "flowers.whl", label_table(label), {})
    with pytest.raises(VisualMemoryError, match="not 0 to 9"):
        images.unpack_flowers(wheel, str(tmp_path / "out"))


def test_missing_and_oversized_members_are_refused(tmp_path, monkeypatch):
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(VisualMemoryError, match="restore the pinned one"):
        images.unpack_textiles(str(empty), str(tmp_path / "out"))
    wheel = flower_wheel(tmp_path / "flowers.whl", label_table("1"), {})
    monkeypatch.setattr(images, "_MAX_IMAGE_BYTES", 10)
    with pytest.raises(VisualMemoryError, match="is over 10 bytes"):
        images.unpack_flowers(wheel, str(tmp_path / "out"))
