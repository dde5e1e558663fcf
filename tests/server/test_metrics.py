"""The server's series by themselves: their labels stay bounded, whatever is loaded and asked for."""

import pytest

from inferflux.server.metrics import OTHER, Metrics


def test_models_beyond_the_bound_share_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferflux.server.metrics.MAX_MODEL_LABELS", 2)
    metrics = Metrics()
    assert [metrics.add_model(name) for name in ("first", "second", "third", "first")] == [
        "first",
        "second",
        OTHER,
        "first",
    ]
    assert [metrics.model_label(name) for name in ("second", "third", None)] == ["second", OTHER, ""]
    metrics.for_model("third").stream_tokens.inc(3)
    metrics.model_event("third", "failed")
    page = metrics.render("")[0].decode()
    assert 'inferflux_stream_tokens_total{model="other"} 3.0' in page
    assert 'inferflux_model_events_total{event="failed",model="other"} 1.0' in page
    assert "third" not in page


def test_events_begin_at_zero() -> None:
    """Else the first switch of a model, or the first refused edit of the registry, is no growth to Prometheus."""
    metrics = Metrics()
    metrics.add_model("m")
    for labels in ({"model": "m", "event": "switched"}, {"model": "", "event": "registry_refused"}):
        assert metrics.registry.get_sample_value("inferflux_model_events_total", labels) == 0.0
