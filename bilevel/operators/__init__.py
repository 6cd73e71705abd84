"""What the operators mean (``reference``, in loops) and their vectorised, trainable forms. Modules call them by ``bilevel.ops``."""
