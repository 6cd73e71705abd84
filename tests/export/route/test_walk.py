"""The layer-by-layer pass against the decoder itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bilevel.config import Experts, ModelConfig
from bilevel.export.route.walk import Packed, ask, make_choosers, read
from bilevel.model import CausalLM
from bilevel.state import DecoderState
from tests.export.route.models import BLOCK_SIZE, CONFIG, make_model, routing

CONTEXT = 10 * BLOCK_SIZE
QUESTIONS = (7, BLOCK_SIZE, 1)
EXPERTS = Experts(num_experts=4, n_group=2, topk_group=1, top_k=1, intermediate_size=6, layers=(1, 2), hash_layers=(2,))


def routed_model(dense: CausalLM, key: str, **changes: object) -> CausalLM:
    """The same weights with a routing section; gates at random."""
    model = make_model(dataclasses.replace(dense.config, routing=routing(key, **changes)), seed=1)
    model.load_state_dict(dense.state_dict(), strict=False)
    return model


def gates_of(model: CausalLM) -> dict[int, dict[str, Tensor]]:
    return {layer: model.model.layers[layer].self_attn.block_keys.state_dict() for layer in model.config.routed_layers}


def ids_of(length: int, seed: int) -> Tensor:
    return torch.randint(2, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key", ["dense", "mean", "bounds", "gate"])
@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["", "experts"])
def test_is_the_decoder(key: str, experts: Experts | None) -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, nope_layers=(2,), experts=experts)
    dense = make_model(config)
    model = dense if key == "dense" else routed_model(dense, key, dense_layers=(1,))
    chosen = routing(key, dense_layers=(1,)) if key != "dense" else None
    choosers = {} if chosen is None else make_choosers(config, chosen, gates_of(model) if key == "gate" else None)
    context, questions = ids_of(CONTEXT, 2), [ids_of(length, 3 + length) for length in QUESTIONS]

    prefix = read(dense, context, choosers)
    assert prefix.hidden is not None
    torch.testing.assert_close(dense.lm_head(prefix.hidden), model(context[None]), rtol=1e-4, atol=1e-4)

    packed = Packed.of(questions, CONTEXT)
    stream = ask(dense, prefix, packed, choosers)
    for question, (_, end) in zip(questions, packed.bounds, strict=True):
        state = DecoderState.empty(model.config, 1, CONTEXT + 2 * BLOCK_SIZE)
        past = torch.zeros(1, dtype=torch.int32)
        _, state = model.step(context[None], past, past + CONTEXT, state)
        logits, _ = model.step(question[None], past + CONTEXT, past + len(question), state)
        torch.testing.assert_close(dense.lm_head(stream[:, end - 1]), logits, rtol=1e-4, atol=1e-4)


def test_routing_matters() -> None:
    """The comparison above would pass an engine that reads everything, were every block chosen."""
    dense, context = make_model(), ids_of(CONTEXT, 2)
    hidden = [read(dense, context, choosers).hidden for choosers in ({}, make_choosers(CONFIG, routing("mean")))]
    assert hidden[0] is not None and hidden[1] is not None
    assert float((hidden[0] - hidden[1]).abs().max()) > 0.01


def test_goes_on_from_a_layer() -> None:
    """A layer's input is enough to go on from there, with another choice in that layer."""
    dense, choosers = make_model(), make_choosers(CONFIG, routing("bounds"))
    prefix, packed = read(dense, ids_of(CONTEXT, 2), {}), Packed.of([ids_of(5, 9)], CONTEXT)
    streams: list[Tensor] = []
    ask(dense, prefix, packed, choosers, streams=streams)
    fewer = {layer: chooser for layer, chooser in choosers.items() if layer != 1}
    torch.testing.assert_close(
        ask(dense, prefix, packed, fewer, start=(1, streams[1])), ask(dense, prefix, packed, fewer), rtol=0, atol=0
    )


def test_bfloat16_is_close() -> None:
    """Its own way through attention, which reads the same."""
    context, packed = ids_of(CONTEXT, 2), Packed.of([ids_of(5, 9)], CONTEXT)
    streams = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model().to(dtype)
        streams.append(ask(model, read(model, context, {}), packed, {}).float())
    assert float((streams[0] - streams[1]).norm() / streams[0].norm()) < 0.05
