"""A job's way to a row: which place it takes, and what of its prompt is there already, of another text or stored."""

from __future__ import annotations

import logging
import time

from bilevel.bundle.format import Bundle
from bilevel.runtime.backend.session import Caches
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import Sampler
from bilevel.runtime.schedule.jobs import TextJob
from bilevel.runtime.schedule.prefix_store import PrefixStore
from bilevel.runtime.schedule.slots import Slots, common_prefix

_LOG = logging.getLogger("bilevel.scheduler")


class Admission:
    """Gives jobs their rows. prefixes: closed with it."""

    def __init__(self, bundle: Bundle, slots: Slots, caches: Caches, row_tokens: int, prefixes: PrefixStore | None) -> None:
        self._bundle, self._slots, self._caches, self._row_tokens = bundle, slots, caches, row_tokens
        self._prefixes = prefixes

    def is_ready(self, job: TextJob) -> bool:
        """Whether waiting would not save reading: not while a prompt is being read that begins like this one."""
        reading = [row for row in self._slots.active if row.num_pending > 1]
        if job.scores_prompt or not reading:  # a prompt that is scored is read in any case
            return True
        _, length = self._slots.longest_prefix(job.prompt)
        if self._prefixes is not None:
            length = max(length, self._prefixes.longest(job.prompt)[1])
        shared = max(common_prefix(row.prompt_ids, job.prompt[:-1]) for row in reading)
        return shared < length + self._bundle.block_size

    def enter(self, job: TextJob) -> Row:
        """The job's row, in its place."""
        # Of a prompt that is scored every token is read again: what it is worth is not kept.
        source, length = (0, 0) if job.scores_prompt else self._slots.longest_prefix(job.prompt)
        if self._prefixes is not None and not job.scores_prompt:
            source, length = self._prefixes.bring(job.prompt, self._slots, self._caches, source, length)
        target = self._slots.choose(source, length)
        if target != source and length:
            self._caches.copy_prefix(source, target, length)
        sampler = Sampler(job.params, self._bundle.vocab_size, job.prompt, job.stream, job.constraint)
        row = Row(target, job.prompt, sampler, () if job.params.ignore_eos else self._bundle.eos, self._row_tokens)
        row.num_cached = job.num_reused = length
        job.started = time.perf_counter()
        self._slots.enter(row)
        return row

    def close(self) -> None:
        """Store what the places hold, once nothing runs any more."""
        prefixes, self._prefixes = self._prefixes, None
        if prefixes is not None:
            try:
                prefixes.keep(self._slots, self._caches)
            except Exception:  # noqa: BLE001 - the end of a server does not depend on it
                _LOG.exception("the rows' prefixes are not stored")
            prefixes.close()
