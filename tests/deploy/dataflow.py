"""Jobs as Dataflow's runner makes them, up to where it would send them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import apache_beam as beam
from apache_beam.coders import Coder
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.internal import apiclient
from apache_beam.runners.pipeline_context import PipelineContext
from apache_beam.runners.portability.fn_api_runner import translations

from pipelines import running

IMAGE = "europe-west4-docker.pkg.dev/a-project/visual-memory/worker:latest"
OPTIONS = (
    *("--runner=DataflowRunner", "--project=a-project", "--region=europe-west4"),
    *("--temp_location=gs://a-bucket/tmp", f"--sdk_container_image={IMAGE}"),
    *("--sdk_location=container", "--dry_run=True"),
)
ACCELERATOR = "type:nvidia-tesla-t4;count:1;install-nvidia-driver"
HINTED = (
    *(f"--encode_accelerator={ACCELERATOR}", "--encode_min_ram=8GB", "--partition_min_ram=26GB"),
)
HINTS = common_urns.resource_hints


class Job(NamedTuple):
    """pipeline: the graph that would be staged. environment: what workers would be started."""

    pipeline: beam_runner_api_pb2.Pipeline
    environment: apiclient.dataflow.Environment


def make_job(define: Callable[[beam.Pipeline], object], *arguments: str) -> Job:
    pipeline = beam.Pipeline(options=running.pipeline_options([*OPTIONS, *arguments]))
    define(pipeline)
    job = pipeline.run().job
    environment = apiclient.Environment(
        [], job.options, "8", "gs://a-bucket/pipeline.pb", proto_pipeline=job.proto_pipeline
    )
    return Job(job.proto_pipeline, environment.proto)


def hints_of_steps(job: Job) -> dict[str, dict[str, bytes]]:
    """The resource hints of every step that has some, by its name."""
    components = job.pipeline.components
    hints = {
        step.unique_name: dict(components.environments[step.environment_id].resource_hints)
        for step in components.transforms.values()
        if step.environment_id and not step.subtransforms
    }
    return {name: found for name, found in hints.items() if found}


def fused(job: Job) -> list[tuple[set[str], dict[str, bytes]]]:
    """Stages of fused steps, by Beam's own optimiser: the steps' names and the hints.

    What writes and reads a collection between two stages is left out.
    """
    context, stages = translations.create_and_optimize_stages(
        job.pipeline,
        [
            translations.annotate_downstream_side_inputs,
            translations.fix_side_input_pcoll_coders,
            translations.lift_combiners,
            translations.expand_gbk,
            translations.sink_flattens,
            translations.greedily_fuse,
        ],
        known_runner_urns=frozenset([common_urns.primitives.FLATTEN.urn]),
    )
    environments = context.components.environments
    return [
        (
            {
                step.unique_name
                for step in stage.transforms
                if not step.unique_name.startswith("ref_PCollection_")
            },
            dict(environments[stage.environment].resource_hints) if stage.environment else {},
        )
        for stage in stages
    ]


def keys_of_groupings(job: Job) -> Iterator[tuple[str, Coder]]:
    """The name of every GroupByKey and the coder of its keys."""
    context = PipelineContext(job.pipeline.components)
    for step in job.pipeline.components.transforms.values():
        if step.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn:
            (collection,) = step.inputs.values()
            coder = job.pipeline.components.pcollections[collection].coder_id
            yield step.unique_name, context.coders[coder].key_coder()
