from __future__ import annotations

from typing import Any, cast

import httpx
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from starlette.testclient import TestClient

from leadline.model.transformer import Transformer
from leadline.serve.app import create_app
from leadline.serve.limits import Keys
from leadline.serve.service import Policy, Service
from leadline.text.tokenizer import Tokenizer

EXAMPLES = 4
"""For each operation; each takes some milliseconds of a tiny model."""


def test_whatever_the_schema_allows_and_forbids_is_answered_in_order(short: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{short.url}/openapi.json")
    operations: list[Any] = [cast("Any", result).ok() for result in schema.get_all_operations()]
    assert len(operations) == 14
    for operation in operations:
        answers: list[int] = []

        @settings(
            max_examples=EXAMPLES,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            database=None,
            deadline=None,
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(base_url=short.url, timeout=30)
            answers.append(response.status_code)  # noqa: B023  # it is called within the iteration
            case.validate_response(response, checks=[not_a_server_error])
            assert response.status_code in (200, 400, 404)

        check()
        assert answers
    short.settle()
    assert short.service.worker.failure is None


def app_of(model: Transformer, tokenizer: Tokenizer, make_engine: Any, **options: Any) -> FastAPI:
    return create_app(Service(make_engine(model), tokenizer, Policy("tiny"), Keys([])), **options)


def test_foreign_pages_may_call_only_if_asked(model: Transformer, tokenizer: Tokenizer, make_engine: Any) -> None:
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with TestClient(app_of(model, tokenizer, make_engine)) as client:
        answer = client.options("/v1/chat/completions", headers=page)
        assert "access-control-allow-origin" not in answer.headers
    with TestClient(app_of(model, tokenizer, make_engine, origins=["https://page.example"])) as client:
        assert client.options("/v1/models", headers=page).headers["access-control-allow-origin"] == page["origin"]
        other = client.get("/v1/models", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_stopped_engine_makes_the_server_ill(short: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(short.service.worker, "failure", "ArithmeticError: broken")
    assert short.get("/health").status_code == 503
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert short.post("/v1/chat/completions", body).status_code == 503
    assert isinstance(short.get("/metrics"), httpx.Response)
