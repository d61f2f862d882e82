"""A run's metrics as a table, as JSON, for Prometheus."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from vm_core import run_report
from vm_core.errors import VisualMemoryError
from vm_core.run_report import Distribution

METRICS = {
    "write_work_ms": Distribution(3, 60, 10, 30),
    "write_written_bytes": 2_500_000,
    "embed_work_ms": Distribution(2, 3000, 1000, 2000),
    "embed_done_images": 1030,
    "embed_batch_images": Distribution(33, 1030, 6, 32),
    "embed_decode_ms": 1500,
    "embed_reused_splits": 1,
    "embed_fresh_splits": 3,
    "embed_quarantined_images": 5,
    "embed_quarantined_too_large_images": 5,
    "embed_quarantined_damaged_images": 0,
}


def shown(metrics) -> str:
    console = Console(file=io.StringIO(), width=250)
    console.print(run_report.of_run("build", metrics))
    return console.file.getvalue()


def test_the_table_has_a_line_a_stage_in_the_order_of_the_run():
    header, _, embed, write = [line for line in shown(METRICS).splitlines()[1:] if line.strip()]
    assert header.split()[:4] == ["stage", "calls", "done", "work"]
    for text in (
        "1,030 images",
        "3.0 s",
        "1,500 ms",
        "decode 1.5 s; batches of 6 to 32 images, mean 31; reused 25% of 4 splits; "
        "quarantined: too large 5",
    ):
        assert text in embed
    assert "damaged" not in embed
    assert re.match(r" *write +3 .*\b20 ms +2\.5 MB written", write)


def test_what_took_no_time_and_did_nothing_is_left_out():
    quick = {"train_work_ms": Distribution(1, 3, 3, 3), "home_done_rows": 7}
    text = shown({**METRICS, **quick})
    assert "train" not in text and "7 rows" in text


def test_a_runner_without_metrics_is_a_line():
    text = shown(None)
    assert len(text.splitlines()) == 1 and "keeps no metrics" in text


def test_distributions_merge():
    one, two = Distribution(2, 10, 3, 7), Distribution(1, 1, 1, 1)
    assert one.merged(two) == two.merged(one) == Distribution(3, 11, 1, 7)


def test_json(tmp_path):
    run_report.write(str(tmp_path / "m.json"), {"build": METRICS})
    read = json.loads((tmp_path / "m.json").read_text())
    assert read["build"]["embed_done_images"] == 1030
    assert read["build"]["write_work_ms"] == {"count": 3, "sum": 60, "min": 10, "max": 30}


def test_prometheus(tmp_path):
    runs = {"before": METRICS, "after": {"embed_done_images": 7}}
    run_report.write(str(tmp_path / "m.prom"), runs)
    text = (tmp_path / "m.prom").read_text()
    lines = text.splitlines()
    assert text.endswith("\n")
    types = [line.split()[2] for line in lines if line.startswith("#")]
    assert len(types) == len(set(types))  # a family stands in one piece, whatever the runs
    at = lines.index("# TYPE visual_memory_embed_done_images_total counter")
    assert lines[at + 1 : at + 3] == [
        'visual_memory_embed_done_images_total{run="before"} 1030',
        'visual_memory_embed_done_images_total{run="after"} 7',
    ]
    at = lines.index("# TYPE visual_memory_write_work_ms summary")
    assert lines[at + 1 : at + 3] == [
        'visual_memory_write_work_ms_sum{run="before"} 60',
        'visual_memory_write_work_ms_count{run="before"} 3',
    ]
    assert 'visual_memory_write_work_ms_max{run="before"} 30' in lines


def test_a_file_of_no_known_format_and_one_that_cannot_be_written(tmp_path):
    with pytest.raises(VisualMemoryError, match=r"--metrics-out m\.txt: .*\.json, or in \.prom"):
        run_report.check_path("m.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(VisualMemoryError, match="cannot be written.*The run itself is complete"):
        run_report.write(str(tmp_path / "file" / "m.json"), {})
