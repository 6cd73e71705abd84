"""How many hidden facts a model finds, and at what price in nats, with any choice of what its layers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.export.route.rows import Case
from bilevel.export.route.walk import Choosers, Packed, Prefix, ask, read
from bilevel.model import CausalLM


@dataclass(frozen=True)
class Score:
    """found: hidden facts whose every token is the most probable one, as greedy decoding would write. asked: facts asked for.

    fact_nats, passage_nats: mean cross entropy of the tokens of facts' answers, and of passages that the context holds.
    text_nats: of the context's last quarter, None where it was not read.
    """

    found: int
    asked: int
    fact_nats: float
    passage_nats: float
    text_nats: float | None = None

    @property
    def nats(self) -> float:
        """Of what can only be known from far away: facts and passages count alike."""
        return (self.fact_nats + self.passage_nats) / 2

    def __str__(self) -> str:
        text = "" if self.text_nats is None else f", text {self.text_nats:.3f} nats"
        return f"{self.found} of {self.asked} facts, {self.fact_nats:.3f} nats, passages {self.passage_nats:.3f} nats{text}"


def pack(case: Case) -> Packed:
    """The questions of a case without the last token, which nothing is asked of."""
    return Packed.of([torch.from_numpy(question.ids[:-1]) for question in case.questions], len(case.context))


@torch.inference_mode()
def answer_nats(model: CausalLM, stream: Tensor, case: Case, packed: Packed) -> list[tuple[bool, float, bool]]:
    """Of each question: whether it is a fact, its answer's mean nats, whether it is found. stream: [1, T, d], normed."""
    told = []
    for question, (_, end) in zip(case.questions, packed.bounds, strict=True):
        logits = model.lm_head(stream[0, end - question.num_answer : end]).float()
        answer = torch.from_numpy(question.ids[-question.num_answer :])
        told.append((question.is_fact, float(F.cross_entropy(logits, answer)), bool((logits.argmax(-1) == answer).all())))
    return told


def score(told: Sequence[tuple[bool, float, bool]], text: Sequence[float] = ()) -> Score:
    """The sum of ``answer_nats`` over cases."""
    facts, passages = ([nats for is_fact, nats, _ in told if is_fact == kind] for kind in (True, False))
    return Score(
        found=sum(found for is_fact, _, found in told if is_fact),
        asked=len(facts),
        fact_nats=sum(facts) / max(1, len(facts)),
        passage_nats=sum(passages) / max(1, len(passages)),
        text_nats=sum(text) / len(text) if text else None,
    )


@torch.inference_mode()
def text_nats(model: CausalLM, prefix: Prefix, case: Case) -> float:
    """Mean cross entropy of the context's last quarter."""
    assert prefix.hidden is not None
    first = len(case.context) * 3 // 4
    logits = model.lm_head(prefix.hidden[0, first:-1]).float()
    return float(F.cross_entropy(logits, torch.from_numpy(case.context[first + 1 :])))


@torch.inference_mode()
def evaluate(model: CausalLM, cases: Sequence[Case], choosers: Choosers) -> Score:
    """Contexts and questions both read with ``choosers``, as the exported model does."""
    told, text = [], []
    for case in cases:
        packed = pack(case)
        prefix = read(model, torch.from_numpy(case.context), choosers)
        text.append(text_nats(model, prefix, case))
        told += answer_nats(model, ask(model, prefix, packed, choosers), case, packed)
    return score(told, text)
