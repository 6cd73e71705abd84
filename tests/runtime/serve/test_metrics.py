"""/metrics in Prometheus' own parser, and what the routing numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bilevel.bundle.format import load_bundle
from bilevel.runtime.backend.session import RouteArrays
from bilevel.runtime.schedule.route_stats import EVERY, RouteStats
from tests.support.http_server import RunningServer, running

R, K = 4, 3  # the tiny model's block size and kept blocks


def scrape(server: RunningServer) -> dict[tuple[str, str], float]:
    """{(sample, its labels' values): value}."""
    status, _, text = server.request("GET", "/metrics")
    assert status == 200
    families = text_string_to_metric_families(text.decode())
    return {(s.name, ",".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_what_the_server_did_is_counted(exported: Callable[..., tuple[Path, Path]]) -> None:
    with running(exported("two_level")[1]) as server:
        before = scrape(server)
        assert before["bilevel_generated_tokens_total", ""] == before["bilevel_rows", ""] == 0
        assert before["bilevel_rows_limit", ""] == 4 and before["bilevel_queue_limit", ""] == 8
        usages = [server.complete(list(range(2, 40)), max_tokens=30)["usage"] for _ in range(2)]
        server.request("POST", "/v1/completions", {"model": "other", "prompt": "a"})
        after = scrape(server)
        generated = sum(usage["completion_tokens"] for usage in usages)
        assert after["bilevel_generated_tokens_total", ""] == generated
        assert after["bilevel_prompt_tokens_total", ""] == 38 + 1  # the second time, one token was left to read
        assert after["bilevel_reused_tokens_total", ""] == 37
        assert sum(value for (name, _), value in after.items() if name == "bilevel_texts_total") == 2
        assert after["bilevel_http_requests_total", "404"] == 1
        assert after["bilevel_time_to_first_token_seconds_count", ""] == 2
        assert after["bilevel_time_per_token_seconds_count", ""] == generated - 2
        assert after["bilevel_tokens_per_second", ""] == pytest.approx(generated / 10)
        assert after["bilevel_queue", ""] == after["bilevel_rows", ""] == 0
        assert 0 < after["bilevel_cache_use_ratio", ""] <= 1
        for layer in ("0", "1"):
            # 38 to 68 tokens, of which 3 blocks of 4 are read
            assert 9 / 68 < after["bilevel_route_attended_ratio", layer] < 12 / 38
            assert 0 < after["bilevel_route_blocks_hit_ratio", layer] <= 1
            assert 0 <= after["bilevel_route_entropy_ratio", layer] <= 1
        assert 0 < after["bilevel_expert_hit_ratio", "1"] <= 1
        assert ("bilevel_expert_hit_ratio", "0") not in after


def sampled(bundle: Path, choose: Callable[[int], list[int]], experts: Callable[[int], list[int]]) -> RouteStats:
    """Statistics of a text whose word at each position reads ``choose(position)`` and goes to ``experts(position)``."""
    stats = RouteStats(load_bundle(bundle, verify=False), 96)
    for position in range(40, 80):
        blocks = np.full((2, 1, 2, 1, K), -1, np.int32)
        blocks[:, 0, :, 0] = choose(position)
        routes = RouteArrays(None, blocks, {1: np.array([[experts(position)]], np.int32)})
        for _ in range(EVERY):
            stats.sample([(0, position)], routes)
    return stats


def test_a_collapsed_router_is_seen(exported: Callable[..., tuple[Path, Path]]) -> None:
    bundle = exported("two_level")[1]
    collapsed = sampled(bundle, lambda position: [0, 5, position // R], lambda position: [3, 4])
    alive = sampled(bundle, lambda position: [0, 1 + position * 7 % 9, position // R], lambda position: [position % 6, 3])
    for layer in collapsed.layers:
        assert collapsed.entropy(layer) == 0 and collapsed.blocks_hit(layer) < 0.1
        assert alive.entropy(layer) > 0.7 and alive.blocks_hit(layer) > 0.4
        assert 0.1 < alive.attended(layer) < 0.3
    assert collapsed.experts_hit(1) == pytest.approx(2 / 6)
    assert collapsed.expert_entropy(1) == pytest.approx(np.log(2) / np.log(6))
    assert alive.experts_hit(1) == 1 and alive.expert_entropy(1) > 0.75


def test_what_has_to_be_read_is_no_choice(exported: Callable[..., tuple[Path, Path]]) -> None:
    stats = RouteStats(load_bundle(exported("two_level")[1], verify=False), 96)
    assert np.isnan([stats.entropy(0), stats.blocks_hit(0), stats.attended(0), stats.expert_entropy(1)]).all()
    blocks = np.full((2, 1, 2, 1, K), -1, np.int32)
    blocks[..., 0], blocks[..., 1] = 0, 1
    stats.sample([(0, 5)], RouteArrays(None, blocks, {1: np.array([[[0, 1]]], np.int32)}))
    assert stats.attended(0) == 1  # 6 tokens of 6
    assert np.isnan(stats.entropy(0))
