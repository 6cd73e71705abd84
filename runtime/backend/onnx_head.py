"""The output head alone in ONNX Runtime: logits of tokens whose last layer's output is there already."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import DTYPES
from bilevel.runtime.backend.onnx_graph import translated


class OnnxHead:
    """A bundle's ``graph.head``, opened when it is first asked: it takes the memory of its weights a second time.

    width: of what it reads, the decoder's output ``hidden``. options: ONNX Runtime's, as the decoder has them.
    """

    def __init__(self, ort: ModuleType, bundle: Bundle, options: Any, width: int) -> None:
        assert bundle.graph.head is not None
        self.hidden, self.width = bundle.graph.head.hidden, width
        self._ort, self._bundle, self._options = ort, bundle, options
        self._path = bundle.folder / bundle.graph.head.file
        self._session: Any = None

    def logits(self, hidden: NDArray[Any]) -> NDArray[np.float32]:
        """Logits [N, vocab] of N tokens. hidden: [N, d] in the bundle's precision."""
        if self._session is None:
            with translated(f"{self._path} cannot be opened by ONNX Runtime", self._bundle.remedy):
                self._session = self._ort.InferenceSession(self._path, self._options, providers=["CPUExecutionProvider"])
        count = len(hidden)
        # Rows of one token each.
        feeds = {
            self.hidden: self._value(hidden[:, None], self._bundle.precision),
            "input_ids": self._value(np.zeros((count, 1), np.int64), "int64"),
            "past_len": self._value(np.zeros(count, np.int32), "int32"),
            "new_len": self._value(np.ones(count, np.int32), "int32"),
        }
        feeds = {each.name: feeds[each.name] for each in self._session.get_inputs()}
        with translated(f"ONNX Runtime could not run {self._path}", self._bundle.remedy):
            (logits,) = self._session.run_with_ort_values(["logits"], feeds)
        array: NDArray[np.float32] = logits.numpy()
        return array

    def _value(self, array: NDArray[Any], dtype: str) -> Any:
        array = np.ascontiguousarray(array)
        return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, DTYPES[dtype].onnx_type)
