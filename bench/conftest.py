"""What every benchmark shares: contenders on the same inputs, timed side by side, and their ratios at the end.

`pytest bench --benchmark-only` prints the table; `--benchmark-json=FILE` keeps it. Times are of one call, forward
and backward, in float32 with the threads that torch uses.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(params=["cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def race(benchmark, device: str) -> Callable[..., None]:
    """Time `call` under the group and name given, warmed up, waiting for the device."""

    def run(call: Callable[[], object], *, group: str, name: str) -> None:
        def synchronised() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group, benchmark.name = group, name
        benchmark.pedantic(synchronised, warmup_rounds=2, rounds=7)

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """Each contender's median, and how many times faster it is than the slowest of its group."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups: dict[str, list[tuple[str, float]]] = {}
    for done in getattr(session, "benchmarks", []):
        if done.stats is not None and not done.has_error:
            groups.setdefault(done.group, []).append((done.name, done.stats.median))
    for group, rows in groups.items():
        slowest = max(median for _, median in rows)
        terminalreporter.write_line(f"\n{group}")
        for name, median in rows:
            terminalreporter.write_line(f"  {name:28}{1e3 * median:10.2f} ms{slowest / median:9.1f}x")
