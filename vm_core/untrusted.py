"""Parsing of text that may come from a stranger: bounded in depth and in size."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import ValidationError

MAX_DEPTH = 64
"""How deep lists and mappings of a YAML document may be nested."""

MAX_NODES = 100_000
"""How many values a YAML document may have, each alias counted in full."""


def parse_json(data: bytes | str) -> Any:
    """Parses JSON. Raises ValueError if it is no JSON, or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(data: bytes | str) -> Any:
    """Parses one YAML document of plain values.

    Raises ValueError if it is no YAML, nested deeper than MAX_DEPTH, or has more than
    MAX_NODES values, which a few lines of aliases reach.
    """
    try:
        loader = yaml.SafeLoader(data)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, 1, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _count(node: yaml.Node, depth: int, known: dict[int, int]) -> int:
    """How many values a node stands for. known: counts by a node's identity; 0 while open."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("it has a list or mapping that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    count = 1 + sum(_count(child, depth + 1, known) for child in children)
    if count > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES:,} values, aliases counted in full")
    known[id(node)] = count
    return count


def first_error(error: Exception) -> str:
    """The cause in one line; of pydantic's errors the field and what is wrong with it."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
    return str(error).partition("\n")[0]
