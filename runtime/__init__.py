"""Bundle to tokens: runs an exported bundle on ONNX Runtime, without PyTorch.

    bundle.py     the bundle format: what is in the folder, and whether it is whole
    tensors.py    dtypes and shapes as a bundle names them
    session.py    what a backend is, and ONNX Runtime on the CPU; onnx_cuda.py, engine_session.py: on a GPU, by its CUDA provider and by
                  TensorRT (device_*.py: memory, rows and results there; dlpack.py: for other libraries)
    backends.py   which of them runs a bundle here (machine.py, engines.py)
    sampling.py   logits to the next token (ranking.py: from the few best, where they are enough)
    text.py       tokens to text, never splitting a character
    rows.py       one row of a batch
    generate.py   prompts to a stream of events
    scheduler.py  many jobs on one device: rows join and leave a running batch (jobs.py, slots.py, pacing.py)
    serve_*.py    the scheduler over HTTP; these need the extra "serve"
    cli*.py       the command line, one module per command

Importing these modules, but for serve_*, needs the standard library and numpy only. onnxruntime, tokenizers and rich are imported
where they are used, so ``bilevel --help`` works on a bare board.
"""
