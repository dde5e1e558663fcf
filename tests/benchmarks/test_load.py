"""The server under load, as the benchmarks drive it, for seconds instead of minutes: real engine, real sockets."""

from benchmarks import kills, live, soak, streams


async def test_many_streams_at_once_all_end_whole() -> None:
    results = await streams.run(60, 8, live.configuration())
    assert results["failed"] == []
    assert results["short"] == 0
    assert results["pages_left_in_use"] == 0
    # The longest may be the machine's: one that stands still for seconds does so between any two instructions.
    assert results["livez_s"]["p90"] < 5, "the event loop does not stand still"


async def test_mixed_traffic_leaves_nothing_behind() -> None:
    results = await soak.run(4)
    assert results["faults"] == []
    assert results["statuses"].keys() >= {"200", "400", "499"}


async def test_a_killed_engine_under_load_costs_clean_errors_only() -> None:
    results = await kills.run(num_rounds=1, num_clients=6)
    assert results["server_lives"]
    assert results["broken"] == []
    assert results["restarts_counted"] == 1
