"""Requests made from the served description, valid and not: no answer is a 5xx, every one is what the description says.

``SERVE_FUZZ_EXAMPLES=2000 pytest tests/runtime/serve/test_fuzz.py`` looks for longer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import NoSuchExample, Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.doubles.bundle import predict
from tests.runtime.serve.test_openai import write_chat_bundle
from tests.support.http_server import RunningServer, running

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
SETTINGS = settings(
    max_examples=int(os.environ.get("SERVE_FUZZ_EXAMPLES", "10")),
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(write_chat_bundle(tmp_path_factory.mktemp("bundle"))) as server:
        yield server
        assert server.complete([5, 6], max_tokens=5)["usage"]["completion_tokens"] == len(predict([5, 6], 5))
        assert server.scheduler.num_active == server.scheduler.num_waiting == 0


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_breaks_the_server(server: RunningServer, mode: GenerationMode) -> None:
    # Not through schemathesis' pytest plugin, which does not run on pytest 9.
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) == 12
    statuses: set[int] = set()
    for operation in operations:

        @SETTINGS
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS, timeout=30).status_code)

        try:
            ask()
        except (Unsatisfiable, NoSuchExample):
            assert mode is GenerationMode.NEGATIVE  # nothing of this operation can be wrong
    assert (200 in statuses) if mode is GenerationMode.POSITIVE else ({400, 404} <= statuses)
