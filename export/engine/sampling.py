"""Outputs of an engine that spare the host its logits: the K best of every row, and the log of the sum of exponentials.

``runtime/backend/ranking.py`` says what follows from them, and what it is worth.
"""

from __future__ import annotations

from bilevel.export.engine.network import Network

NUM_BEST = 64
# The measurements in runtime/backend/ranking.py: below, a row's logits are copied and ranked on the host in a few microseconds,
# or drawn from with top-p in half a millisecond; three more layers in every call would buy little.
LEAST_VOCAB = 16_384


def add_best_logits(parsed: Network, least: int = LEAST_VOCAB) -> bool:
    """Add ``top_logits`` fp32 [B, K], ``top_ids`` int32 [B, K] and ``log_sum`` fp32 [B] to a network whose vocabulary has
    ``least`` tokens or more; whether it has. K: NUM_BEST, or the whole vocabulary where it is smaller.
    """
    trt, network = parsed.flavour.trt, parsed.network
    logits = next(each for each in map(network.get_output, range(network.num_outputs)) if each.name == "logits")
    vocab_size, axis = logits.shape[1], 1 << 1
    if vocab_size < least:
        return False
    best = network.add_topk(logits, trt.TopKOperation.MAX, min(NUM_BEST, vocab_size), axis)
    # Less the largest, so that no exponential overflows.
    largest = network.add_reduce(logits, trt.ReduceOperation.MAX, axis, True).get_output(0)
    shifted = network.add_elementwise(logits, largest, trt.ElementWiseOperation.SUB).get_output(0)
    powers = network.add_unary(shifted, trt.UnaryOperation.EXP).get_output(0)
    total = network.add_reduce(powers, trt.ReduceOperation.SUM, axis, True).get_output(0)
    log = network.add_unary(total, trt.UnaryOperation.LOG).get_output(0)
    log_sum = network.add_shuffle(network.add_elementwise(log, largest, trt.ElementWiseOperation.SUM).get_output(0))
    log_sum.reshape_dims = (-1,)
    named = {"top_logits": best.get_output(0), "top_ids": best.get_output(1), "log_sum": log_sum.get_output(0)}
    for name, tensor in named.items():
        tensor.name = name
        network.mark_output(tensor)
    return True
