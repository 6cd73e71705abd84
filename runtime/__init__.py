"""Bundle to tokens: runs an exported bundle without PyTorch.

    backend/    what runs the graph: ONNX Runtime on the CPU or a GPU, TensorRT; which of them runs a bundle here
    generate/   prompts to text: rows, sampling, tokens to text that never splits a character
    schedule/   many jobs on one device: rows join and leave a running batch
    serve/      the scheduler over HTTP (extra "serve")
    bench/      speed and memory beside a dense twin
    quality/    facts, copies and loss beside a dense twin and beside sink + window
    cli/        the command line, one module per command

Importing these modules, but for serve/, needs the standard library and numpy only. onnxruntime, tokenizers and rich are
imported where they are used, so ``bilevel --help`` works on a bare board.
"""
