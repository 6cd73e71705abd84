"""PyTorch to ONNX to a bundle, and the proof that nothing was lost on the way.

Export any ``nn.Module`` whose ``forward`` calls the operators of ``bilevel.ops``::

    from bilevel import ops
    from bilevel.export.graph.module import save_onnx

    class Block(nn.Module):
        def forward(self, q, k, v, block_key, past_len, new_len):
            routes = ops.coarse_route(q, block_key, past_len, new_len, block_size=64, topk=8, num_selection_heads=2,
                                      init_blocks=1, local_blocks=1, causal=1)
            return ops.routed_attention(q, k, v, routes, past_len, new_len, block_size=64, causal=1, scale=0.125)

    save_onnx(Block(), example_inputs, "block.onnx", output_names=["out"], dynamic={"q": {0: "batch", 2: "tokens"}, ...})

Nothing is subclassed or registered. Each call becomes one ONNX node of domain ``bilevel`` with a model-local function of the
same name in standard operators: ONNX Runtime runs the function, TensorRT with our library the plugin.
``examples/export_own_module.py`` is a complete one. What a module has to keep to:

* Routes stay tensors: ``.tolist()``, ``.item()`` or numpy on them would freeze them, and the export refuses that.
* ``k`` and ``v`` hold a multiple of ``block_size`` tokens (``ops.pad_to_blocks``); ``past_len`` and ``new_len`` say which are
  valid.
* Caches are inputs and outputs; ``ops.write_cache`` extends one in place.

The rooms: ``graph`` (any module to ONNX), ``decoder`` (a checkpoint to a bundle), ``engine`` (a bundle to a plan of TensorRT),
``check`` (parity: PyTorch and the graph, both part by part, and the judgement of what they chose and computed), ``report``
(what it found, to read), ``quality`` (a checkpoint that chooses by true attention mass), ``cli``. Importing this package
imports nothing heavy.
"""
