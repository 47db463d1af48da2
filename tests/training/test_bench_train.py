"""The summary of bench_train.py: ratios of runs in the same round, to each plain loop and to the faster one."""

from commands import module_of


def run(speed: float, beyond: float) -> dict:
    return {"tokens_per_second": speed, "beyond_gb": beyond, "losses": [2.0, 1.0], "parameters": 10}


def test_ratios_are_those_of_one_round():
    """The machine is half as fast in the second round, which changes no ratio; in the third, another loop is faster."""
    bench = module_of("bench_train")
    rounds = [
        {"plain": run(100, 1.0), "plain_compiled": run(110, 2.0), "ours": run(132, 0.1)},
        {"plain": run(50, 1.0), "plain_compiled": run(55, 2.0), "ours": run(66, 0.1)},
        {"plain": run(120, 3.0), "plain_compiled": run(110, 2.0), "ours": run(132, 0.3)},
    ]
    found = bench.summary("ours", rounds)
    assert found["tokens_per_second"] == [132, 66, 132]
    assert found["speed"] == {"plain": [1.1, 1.32, 1.32], "plain_compiled": [1.2, 1.2, 1.2]}
    assert found["to_better"] == [1.1, 1.2, 1.2]
    assert found["memory"] == {"plain": 0.1, "plain_compiled": 0.05}
    assert "speed" not in bench.summary("plain", rounds)
    alone = [{"ours": one["ours"]} for one in rounds]
    assert "to_better" not in bench.summary("ours", alone)
