"""What the operators mean (``reference``, in loops) and their vectorised, trainable forms. Called by ``bilevel.ops``."""
