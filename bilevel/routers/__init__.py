"""Published routers as modules: scores in plain PyTorch, then ``bilevel.ops.select_blocks``. One file each, with its source."""
