from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def read(server: Any) -> dict[str, float]:
    text = server.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name
        + "".join(
            f" {value}" for key, value in sorted(sample.labels.items()) if key not in ("model_name", "le")
        ): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


def test_an_answer_is_counted_once(server: Any) -> None:
    server.settle()
    before = read(server)
    body = {"messages": [{"role": "user", "content": "hello" * 40}], "max_tokens": 12, "thinking_budget": 4, "seed": 1}
    usage = server.post("/v1/chat/completions", body).json()["usage"]
    server.post("/v1/chat/completions", {**body, "n": 0})
    after = read(server)

    def grown(name: str) -> float:
        return after[f"leadline:{name}"] - before.get(f"leadline:{name}", 0)

    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == usage["prompt_tokens"]
    assert grown("prefix_cache_hits_total") == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown("generation_tokens_total") == 12
    assert grown("request_thinking_tokens_sum high") == 5
    assert grown("request_answer_tokens_sum high") == 7
    assert grown("thinking_budget_spent_total high") == 1
    assert grown("request_success_total length") == 1
    assert grown("request_refused_total 400") == 1
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert grown(f"{name}_count") == 1
    assert after["leadline:num_requests_running"] == after["leadline:num_requests_waiting"] == 0
    assert 0 < after["leadline:kv_cache_usage_perc"] < 1
    assert after["leadline:num_preemptions_total"] == 0
    assert after["leadline:num_free_slots"] == 4
    assert after["leadline:kv_cache_pages"] == after["leadline:prefix_cache_pages"] > 0  # at rest, only the cache holds


def test_guesses_are_counted_by_their_place(server: Any) -> None:
    before = read(server)
    server.service.metrics.guesses((5, 4, 2), (3, 1, 0))
    server.service.metrics.guesses((2,), (1,))
    server.service.metrics.guesses((), ())
    after = read(server)
    grown = {
        name: after[name] - before.get(name, 0) for name in after if "spec_decode" in name and "created" not in name
    }
    start = "leadline:spec_decode_num"
    assert grown[f"{start}_draft_tokens_total"] == 13
    assert grown[f"{start}_accepted_tokens_total"] == 5
    assert [grown[f"{start}_draft_tokens_per_pos_total {place}"] for place in range(3)] == [7, 4, 2]
    assert [grown[f"{start}_accepted_tokens_per_pos_total {place}"] for place in range(3)] == [4, 1, 0]
