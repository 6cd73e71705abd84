"""What a call leaves on a GPU, copied when it is first read: logits and routes. See ``device_caches``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bilevel.runtime.backend.ranking import Best

if TYPE_CHECKING:
    from bilevel.runtime.backend.device_caches import DeviceCaches
    from bilevel.runtime.backend.session import Routes

BEST = ("top_logits", "top_ids", "log_sum")  # outputs of an engine that ranks its logits: fp32 and int32 [B, K], fp32 [B]


class DeviceLogits:
    """Logits [B, vocab] of the last call, on the GPU. ``logits[row]`` is what a sampler takes; as an array they are copied."""

    def __init__(self, caches: DeviceCaches) -> None:
        self._caches, self._call = caches, caches.last_call
        self._group = BEST if caches.places(1).keys() >= set(BEST) else ("logits",)
        self._fetched: dict[str, NDArray[Any]] = {}

    def start(self) -> None:
        """Enqueue the copy of what a sampler looks at first; the caller synchronises."""
        self._fetched |= self._caches.start_fetch(self._group)

    def _get(self, group: tuple[str, ...]) -> list[NDArray[Any]]:
        self._caches.check_call(self._call, "logits")
        if group[0] not in self._fetched:
            self._fetched |= self._caches.fetch(group)
        return [self._fetched[name] for name in group]

    def best(self, row: int) -> Best | None:
        """The best of a row, where the engine ranks them."""
        if self._group != BEST:
            return None
        values, ids, log_sum = self._get(BEST)
        order = np.argsort(ids[row])
        return Best(ids[row][order], values[row][order], float(log_sum[row]), self._caches.vocab_size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.float32]:
        (logits,) = self._get(("logits",))
        return np.array(logits, dtype) if copy else np.asarray(logits, dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._caches.tensor("logits").__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        """See ``DeviceTensor``: the logits where they lie, which the next call overwrites."""
        self._caches.check_call(self._call, "logits")
        return self._caches.tensor("logits").__dlpack__(**asked)

    def __getitem__(self, row: int) -> DeviceRow:
        return DeviceRow(self, row)


class DeviceRow:
    """One row of them; see ``RemoteLogits``."""

    def __init__(self, logits: DeviceLogits, row: int) -> None:
        self._logits, self._row = logits, row

    @property
    def best(self) -> Best | None:
        """See ``RemoteLogits``."""
        return self._logits.best(self._row)

    def fetch(self) -> NDArray[np.float32]:
        """See ``RemoteLogits``."""
        return self._logits.__array__()[self._row]


class DeviceRoutes:
    """``Routes`` of the last call, copied when the first of their fields is looked at."""

    def __init__(self, caches: DeviceCaches) -> None:
        self._caches, self._call = caches, caches.last_call

    def _read(self) -> Routes:
        self._caches.check_call(self._call, "routes")
        return self._caches.read_routes()

    @property
    def candidates(self) -> NDArray[np.int32] | None:
        """See ``Routes``."""
        return self._read().candidates

    @property
    def blocks(self) -> NDArray[np.int32]:
        """See ``Routes``."""
        return self._read().blocks

    @property
    def experts(self) -> Mapping[int, NDArray[np.int32]]:
        """See ``Routes``."""
        return self._read().experts
