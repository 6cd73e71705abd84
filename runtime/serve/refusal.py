"""An answer that is a refusal, as every part of the server raises it."""

from __future__ import annotations


class ApiError(Exception):
    """An answer other than 2xx. param: the field to blame. code: a word that programs look for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
