"""A decoder of which one layer of each kind is traced is, node by node, the decoder traced whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from bilevel.config import Experts, ModelConfig, Routing
from bilevel.errors import ExportError
from bilevel.export.decoder import decoder as decoder_module
from bilevel.export.decoder.decoder import ExportableDecoder, save_decoder
from bilevel.export.decoder.dense_twin import save_dense_twin
from bilevel.export.decoder.fused import fused_projections
from bilevel.export.decoder.layers import alike
from bilevel.export.graph.repeat import NotRepeatable
from bilevel.model import Attention, CausalLM, DecoderLayer
from bilevel.state import LayerState, Step

TWO_LEVEL = Routing(block_size=4, coarse_topk=6, topk=3, window=2, route_dim=6)
MOBA = Routing(preset="moba", block_size=4, topk=3)
EXPERTS = Experts(num_experts=6, top_k=2, intermediate_size=5, layers=(1, 3), n_group=3, topk_group=2, select_bias=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "experts and layers without positions": {
        "num_hidden_layers": 5,
        "routing": TWO_LEVEL,
        "experts": EXPERTS,
        "nope_layers": (2,),
        "qk_norm": "head",
    },
    "gates beside dense layers": {
        "num_hidden_layers": 4,
        "routing": Routing(preset="moba_gqa", block_size=4, topk=3, key="gate", dense_layers=(1, 3)),
    },
    "biases, bf16": {"routing": MOBA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "dense, norm of all heads, some channels turn": {
        "routing": Routing(preset="dense", block_size=4),
        "qk_norm": "projection",
        "rotary_dim": 4,
    },
}


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    """A tiny decoder, two layers unless told otherwise; no two tensors of it are equal, norms included."""
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(
        **{**sizes, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **changes}  # type: ignore[arg-type]
    )
    model = CausalLM(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, std=0.2)
    return model.to(dtype)


def both(save: Callable[..., onnx.ModelProto], model: CausalLM, folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The graph as it is exported and as a trace of everything gives it, with their weights."""
    for name, trace_all in (("some", False), ("all", True)):
        save(model, folder / f"{name}.onnx", trace_all=trace_all)
    return onnx.load(folder / "some.onnx"), onnx.load(folder / "all.onnx")


def assert_equal(some: onnx.ModelProto, whole: onnx.ModelProto) -> None:
    """Ports, functions, nodes in order, attributes, wiring, weights, types of all values; only inner names may differ."""
    assert list(some.graph.input) == list(whole.graph.input)
    assert list(some.graph.output) == list(whole.graph.output)
    assert list(some.functions) == list(whole.functions)
    assert list(some.opset_import) == list(whole.opset_import)
    called: dict[str, object] = {port.name: port.name for port in whole.graph.input}
    given: dict[str, object] = {port.name: port.name for port in some.graph.input}
    for names, graph in ((called, whole.graph), (given, some.graph)):
        names |= {w.name: (w.data_type, tuple(w.dims), onnx.numpy_helper.to_array(w).tobytes()) for w in graph.initializer}
        names[""] = ""
    assert len(some.graph.node) == len(whole.graph.node)
    ports = {port.name: port.type.SerializeToString() for port in whole.graph.input}
    public = {f"hidden.{i}" for i in range(100)} | {port.name for port in whole.graph.output}
    for index, (ours, theirs) in enumerate(zip(some.graph.node, whole.graph.node, strict=True)):
        assert (ours.domain, ours.op_type) == (theirs.domain, theirs.op_type), index
        assert sorted(map(str, ours.attribute)) == sorted(map(str, theirs.attribute)), index
        if ours.op_type == "Shape" and ours.input[0] in ports:
            assert ports[ours.input[0]] == ports[theirs.input[0]], index  # which cache tells a size is the same
        else:
            assert [given[name] for name in ours.input] == [called[name] for name in theirs.input], (index, ours.name)
        for mine, other in zip(ours.output, theirs.output, strict=True):
            given[mine] = called[other] = (index, mine if mine in public or other in public else "")
            assert mine == other or not {mine, other} & public
    types = [
        {str(names[v.name]): (v.type.SerializeToString()) for v in graph.value_info if v.name in names}
        for names, graph in ((given, some.graph), (called, whole.graph))
    ]
    assert types[0] == types[1]
    assert len({node.name for node in some.graph.node}) == len(some.graph.node)


@pytest.mark.parametrize(
    "name", [next(iter(CONFIGS)), *(pytest.param(name, marks=pytest.mark.thorough) for name in [*CONFIGS][1:])]
)
def test_a_trace_of_some_layers_is_a_trace_of_all(tmp_path: Path, name: str) -> None:
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    assert_equal(*both(save_decoder, model_of(dtype, **CONFIGS[name]), tmp_path))


@pytest.mark.thorough
def test_half_precision(tmp_path: Path) -> None:
    """What is computed from weights alone (an fp32 copy of a gate's, centroids over their length) is a constant here too."""
    model = model_of(torch.float16, routing=MOBA, experts=replace(EXPERTS, layers=(0, 1)))
    assert_equal(*both(save_decoder, model, tmp_path))


@pytest.mark.parametrize(
    "changes", [{"nope_layers": (1,), "num_hidden_layers": 3}, pytest.param({"head_dim": 16}, marks=pytest.mark.thorough)]
)
def test_dense_twin(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Heads of 16: the operator turns them itself, and all layers read one table of cos and sin."""
    assert_equal(*both(save_dense_twin, model_of(routing=MOBA, **changes), tmp_path))


def test_layers_alike() -> None:
    """By structure: experts, positions, classes, attributes, extra modules; by nothing else."""

    def template(model: CausalLM, ports: tuple[str, ...] = ()) -> list[int]:
        return list(alike(ExportableDecoder(model), model, ports).template)

    config = CONFIGS["experts and layers without positions"]
    assert template(model_of(**config)) == [0, 1, 2, 1, 0]
    model = model_of(routing=MOBA, num_hidden_layers=3)
    assert template(model) == [0, 0, 0]
    assert template(model, ("past.key.0", "past.key.1", "past.key.2", "past.gate.2")) == [0, 0, 2]
    for change in (
        lambda layer: layer.self_attn.__setattr__("is_dense", True),
        lambda layer: layer.self_attn.__setattr__("gate", nn.Linear(24, 1)),
        lambda layer: layer.mlp.__setattr__("__class__", type("Other", (type(layer.mlp),), {})),
        lambda layer: layer.mlp.__setattr__("table", torch.ones(3)),
        lambda layer: layer.mlp.__setattr__("names", ["a", "b"]),
        lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_buffer("scale", torch.ones(1)),
        lambda layer: layer.input_layernorm.__setattr__("eps", 1e-3),
        lambda layer: layer.mlp.up_proj.__setattr__("bias", nn.Parameter(torch.zeros(20))),
        lambda layer: layer.mlp.up_proj.__setattr__("weight", layer.mlp.gate_proj.weight),
    ):
        model = model_of(routing=MOBA, num_hidden_layers=3)
        change(model.model.layers[1])
        assert template(model) == [0, 1, 0]
    for index, layer in enumerate(model.model.layers):
        layer.get_submodule("mlp").__setattr__("index", index)
    assert template(model) == [0, 1, 2]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = model_of(routing=MOBA)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    save_decoder(model, tmp_path / "m.onnx")
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert [type(layer) for layer in model.model.layers] == [DecoderLayer] * 2 and len(after) == len(before)


def test_an_unread_parameter_is_refused(tmp_path: Path) -> None:
    model = model_of(routing=MOBA)
    for layer in model.model.layers:
        layer.get_submodule("mlp").register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(ExportError, match=r"1 parameter\(s\), the first is 'model.model.layers.0.mlp.extra'"):
        save_decoder(model, tmp_path / "m.onnx")


class _Residual(Attention):
    """Adds what the first layer cached to every layer's keys: layers that are not apart from each other."""

    def forward(self, x: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, LayerState]:
        assert state is not None
        first = step.__dict__.setdefault("first", state.key)
        return super().forward(x + 0 * first.mean(), step, state)


def test_layers_that_read_each_other_are_all_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[tuple[nn.Module, list[str]]] = []
    monkeypatch.setattr(
        decoder_module, "save_onnx", lambda module, *_, output_names, **__: whole.append((module, output_names))
    )
    kinds = type("Fused", (_Residual, decoder_module.FusedAttention), {})
    model = model_of(routing=MOBA, nope_layers=(1,), num_hidden_layers=3)
    layers = alike(ExportableDecoder(model), model, ())
    assert list(layers.template) == [0, 1, 0]
    save_decoder(model, tmp_path / "m.onnx", kinds)
    ((decoder, outputs),) = whole
    assert isinstance(decoder, ExportableDecoder) and list(decoder.traced) == [0, 1, 2] and "blocks.2" in outputs
    assert not list(tmp_path.iterdir())
    with fused_projections(model, kinds), pytest.raises(NotRepeatable, match=r"belongs to the layers \[0, 1\]"):
        example = decoder_module._example(model, range(3), "fp32")
        decoder_module._trace_some(ExportableDecoder(model), layers, example, "fp32")
