"""From results to HTML. What stands where is in the templates, what is counted in ``views``.

Ids and class names are untrusted: every value passes Jinja's escaping, and the page's
content security policy runs no script but its own and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from vm_core.classes import ClassTable
from vm_core.gallery import KINDS, Example
from vm_core.report import plots, views


def render_evaluation(
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]],
    classes: ClassTable,
    thumbnails: Mapping[str, bytes],
) -> str:
    """The report of an evaluation.

    results: what metrics.json holds. examples: queries to show, by kind of the gallery.
    thumbnails: JPEG bytes by id, of neighbours and of queries without a picture of
    their own; an id without one is shown by name.
    """
    test = results["test"]
    return (
        _environment()
        .get_template("evaluation.html.j2")
        .render(
            results=results,
            digits=views.digits(test["queries"]),
            facts=views.evaluation_facts(results),
            tiles=views.tiles(results),
            accuracy=views.accuracy_table(results),
            accuracy_chart=plots.accuracy_over_k(test["accuracy_at_k"], results["chosen_k"]),
            reliability_chart=plots.reliability_by_rank(test["reliability_at_k"]),
            calibration_chart=plots.calibration(test["calibration"]),
            distance_chart=plots.first_distances(test["first_neighbor_distance"]),
            per_class=views.class_table(test, classes),
            confusions=views.confusions(test, classes),
            gallery={
                kind: [
                    views.card(example, classes, thumbnails, labelled=True)
                    for example in examples.get(kind, ())
                ]
                for kind in KINDS
            },
        )
    )


def render_explanations(
    examples: Sequence[Example],
    classes: ClassTable,
    thumbnails: Mapping[str, bytes],
    title: str,
    facts: Mapping[str, str],
) -> str:
    """Single classifications with the neighbours that decided them, in the order given.

    An example with the label UNKNOWN has no true class: its neighbours are marked by
    whether they voted for the prediction. facts: what to say of the memory, by name.
    """
    cards = [views.card(example, classes, thumbnails, labelled=False) for example in examples]
    template = _environment().get_template("explanations.html.j2")
    return template.render(title=title, facts=list(facts.items()), cards=cards)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vm_core", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=views.percent, number=views.number, distance=views.distance)
    # The policy names the one script by its hash, so no text of a data set can run as one.
    script = environment.get_template("script.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(script=Markup(script), script_hash=digest)
    return environment
