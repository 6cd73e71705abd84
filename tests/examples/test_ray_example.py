"""Two replicas behind Ray Serve on a CPU; only where Ray is installed (pip install 'ray[serve]')."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import ROOT
from tests.doubles.bundle import predict, write_bundle
from tests.support.http_server import free_port

ray = pytest.importorskip("ray", reason="Ray is not installed")
EXAMPLE = ROOT / "examples" / "ray_serve_replicas.py"


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_answer_like_one(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ray_serve_replicas", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    bundle, port = write_bundle(tmp_path), free_port()
    ray.init(num_cpus=3, include_dashboard=False)
    try:
        example.deploy(bundle, 2, capacity=100, threads=1, port=port)
        answers: dict[int, str] = {}

        def ask(index: int) -> None:
            body = {
                "model": bundle.name,
                "prompt": [index + 2, 5],
                "max_tokens": 20,
                "temperature": 0,
                "stream": True,
                "logprobs": 0,
            }
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                answers[index] = response.read().decode()

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(12):
            events = [json.loads(line[6:]) for line in answers[index].splitlines() if line.startswith("data: {")]
            assert len(events) == len(predict([index + 2, 5], 20))
            assert answers[index].endswith("data: [DONE]\n\n")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/other")
        from ray import serve

        (application,) = serve.status().applications.values()
        assert application.deployments["bilevel"].replica_states == {"RUNNING": 2}
    finally:
        ray.shutdown()
