"""The attributes on routed nodes against the model's: those that came later than their operator may be missing."""

from __future__ import annotations

import dataclasses

from bilevel.contract import BY_NAME
from bilevel.export.check.graph_parts import RoutedNode
from bilevel.export.check.structure import expected_attributes, expected_nodes, structure_differences
from tests.support.tiny_models import make_model


def older_nodes() -> list[RoutedNode]:
    """The nodes that a bundle of "two_level" had before attributes were added."""
    config = make_model("two_level").config
    nodes = []
    for name, op_type, layer in expected_nodes(config):
        later = {each.name for each in BY_NAME[op_type].attributes if each.default is not None}
        given = {key: value for key, value in expected_attributes(config, op_type, layer).items() if key not in later}
        nodes.append(RoutedNode(name, op_type, layer, (), (), (), given))
    return nodes


def test_a_graph_that_is_older_than_an_attribute_says_what_it_meant_then() -> None:
    config = make_model("two_level").config
    assert structure_differences(config, older_nodes()) == []
    assert config.experts is not None
    changed = dataclasses.replace(config, experts=dataclasses.replace(config.experts, norm_floor=0.5, zero_fill=True))
    found = {(each.attribute, each.graph, each.model) for each in structure_differences(changed, older_nodes())}
    assert found == {("norm_floor", 0.0, 0.5), ("zero_fill", 0, 1)}
