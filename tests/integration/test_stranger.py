"""A memory that a stranger made: nothing outside of it is read or written, and no program runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import faults
from vm_core import sealed, storage
from vm_core.encoders import _trust
from vm_core.errors import VisualMemoryError
from vm_core.memory import Memory

opened: list[str] = []


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        opened.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(_note)  # for the rest of the process


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a memory that has every kind of file, weights included."""
    folder = tmp_path_factory.mktemp("stranger")
    cases, _ = faults.make_cases(folder)
    shutil.copytree(cases[-1].template, folder / "hostile" / "memory")
    secret = folder / "hostile" / "outside"
    secret.mkdir()
    (secret / "secret").write_text("secret")
    return folder / "hostile"


def paths_of(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Every place in a manifest that names a file or folder of the memory, keys included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "config":
                continue
            if "/" in key or key.endswith((".npy", ".parquet")):
                yield (*place, ("key", key)), key
            yield from paths_of(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from paths_of(inner, (*place, number))
    elif isinstance(value, str) and value.startswith(("builds/", "weights/")):
        yield place, value


def replaced(manifest: dict, place: tuple, new: str) -> dict:
    manifest = json.loads(json.dumps(manifest))
    inner: Any = manifest
    for step in place[:-1]:
        inner = inner[step]
    last = place[-1]
    if isinstance(last, tuple):
        inner[new] = inner.pop(last[1])
    else:
        inner[last] = new
    return manifest


def use(root: str) -> None:
    memory = Memory(root)
    faults.answers(memory)
    memory.check_files()


def test_paths_of_a_manifest_stay_in_the_memory(made):
    root = made / "memory"
    outside = made / "outside"
    before = sorted(path.name for path in outside.iterdir())
    version = (root / "CURRENT").read_text().split()[-1]
    path = root / "versions" / f"{version}.json"
    whole = path.read_bytes()
    manifest = sealed.verify(whole)
    places = list(paths_of(manifest))
    assert len({str(place) for place, _ in places}) > 30
    variants = 0
    for place, value in places:
        name = value.rpartition("/")[2]
        for hostile in (
            f"{outside}/secret",
            "../outside/secret",
            f"builds/../../outside/{name}",
            f"file://{outside}/secret",
            f"{value}/../../../../outside/secret",
            "gs://bucket/x",
            "",
        ):
            path.write_bytes(sealed.sign(replaced(manifest, place, hostile)))
            opened.clear()
            with pytest.raises(VisualMemoryError, match="not below the memory|plain relative path"):
                use(str(root))
            assert not [name for name in opened if "outside" in name]
            variants += 1
    path.write_bytes(whole)
    use(str(root))
    assert variants > 200
    assert sorted(path.name for path in outside.iterdir()) == before


def test_links_out_of_the_memory_are_not_followed(made):
    root, outside = made / "memory", made / "outside"
    links = 0
    for target in [path for path in root.rglob("*") if path.parent != root / "versions"]:
        if not target.exists() or target.name in ("work", "versions"):
            continue
        relative = target.relative_to(root)
        moved = outside / f"moved-{links}"
        shutil.move(target, moved)
        target.symlink_to(moved)
        opened.clear()
        try:
            use(str(root))
            followed = [name for name in opened if name.startswith(str(moved))]
            assert not followed, relative
        except VisualMemoryError as error:
            assert "is a link to" in str(error) or "missing" in str(error), relative
        finally:
            target.unlink()
            shutil.move(moved, target)
        links += 1
    assert links > 20
    use(str(root))


@pytest.mark.parametrize(
    "pointer",
    ["../../outside/secret", "/etc/passwd", "000001/../000001", "a\0b", "", "\x1b[2J", "1e9"],
)
def test_names_of_versions(made, pointer):
    root = made / "memory"
    current = root / "CURRENT"
    before = current.read_bytes()
    try:
        for data in (pointer.encode(), sealed.seal(pointer.encode()), b"\xff\xfe" * 40):
            current.write_bytes(data)
            with pytest.raises(VisualMemoryError):
                Memory(str(root))
    finally:
        current.write_bytes(before)
    if pointer:
        with pytest.raises(VisualMemoryError, match="is not a number such as 000001"):
            Memory(str(root), pointer)


def test_a_bucket_whose_files_have_names_that_lead_outside(made, make_bucket):
    """Copied to this machine they would be written anywhere."""
    bucket = make_bucket()
    root = made / "memory"
    for file in storage.walk(str(root)):
        storage.write_bytes(
            bucket + "/m" + file.path.removeprefix(str(root)), Path(file.path).read_bytes()
        )
    use(f"{bucket}/m")
    folder = Memory(f"{bucket}/m").manifest.partitions[0].folder
    escape = "../" * 8 + str(made / "outside" / "written").lstrip("/")
    storage.write_bytes(f"{bucket}/m/{folder}/{escape}", b"stranger")
    with pytest.raises(VisualMemoryError, match="copied to another place"):
        with storage.local_copy(f"{bucket}/m/{folder}"):
            pass
    assert not (made / "outside" / "written").exists()


def test_a_model_that_only_a_memory_names_does_not_run(made, tmp_path, monkeypatch):
    """A SavedModel that writes a file when it is called, inside the memory itself."""
    monkeypatch.setenv(_trust.VARIABLE, str(tmp_path / "trusted"))
    written = tmp_path / "written"
    root = made / "memory"
    code = """
        import sys
        import tensorflow as tf

        class Writes(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32)])
            def __call__(self, images):
                with tf.control_dependencies([tf.io.write_file(sys.argv[2], "was here")]):
                    return tf.ones((tf.shape(images)[0], 16))

        tf.saved_model.save(Writes(), sys.argv[1])
    """
    model = root / "model"
    command = [sys.executable, "-c", textwrap.dedent(code), str(model), str(written)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    image = next((made.parent / "images").rglob("0001.png"))
    memory = Memory(str(root))
    settings = memory.manifest.encoder.model_copy(update={"path": str(model)})
    manifest = memory.manifest.model_copy(
        update={"encoder": settings, "encoder_fingerprint": settings.fingerprint()}
    )
    path = root / "versions" / f"{manifest.version}.json"
    before = path.read_bytes()
    path.write_bytes(sealed.sign(manifest.model_dump(mode="json")))
    try:
        hostile = [sys.executable, "-m", "pipelines.classify", str(image), "--memory", str(root)]
        done = subprocess.run(hostile, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "you have not used before" in done.stderr
        assert "--encoder PATH" in done.stderr and "Traceback" not in done.stderr
        assert not written.exists()
        # Named by the user it runs, which also shows that it would have written.
        done = subprocess.run(
            [*hostile, "--encoder", str(model)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert written.exists()
    finally:
        path.write_bytes(before)
        shutil.rmtree(model)
