"""The settings of an evaluation; tests/integration/test_evaluate.py has the rest."""

import pytest

from vm_core import plugins
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.001}, "softmax temperature 0.001 is out of range: .* Use 0.002 or more"),
        ({"temperature": float("nan")}, "softmax temperature nan is out of range"),
        ({"rank_offset": 0}, "rank offset 0.0 is out of range: .* Use a positive number"),
        ({"headline_voter": "majority"}, "headline_voter must be one of plurality"),
        ({"leave_one_out": True, "embeddings": "*"}, "give one of queries, embeddings"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(given, message):
    settings = {"memory": "m", "output": "o", "embeddings": "q/*", **given}
    with pytest.raises(VisualMemoryError, match=f"^options: {message}"):
        plugins.validate(EvaluationConfig, settings, "options")
