"""Each operation, forward alone and with its gradients: the formula as printed, eager PyTorch, torch.compile, ours.

`bench/operations/<operation>.py` has the contenders. Each call has inputs of its own, one call after the other, where
a cache could hold them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.operations import MEASURED
from bench.races import SIZES, Race, direction


def parameters() -> Iterator[object]:
    for measured in MEASURED.values():
        for race in measured.RACES:
            for case in race.benchmarks[SIZES]:
                for dtype in race.dtypes(case):
                    for backward in (True, False):
                        for name in race.contenders(case):
                            label = f"{race.function}-{case.name}-{dtype}-{direction(backward)}-{name}"
                            yield pytest.param(race, case, dtype, backward, name, id=label)


@pytest.mark.parametrize(("contest", "case", "dtype", "backward", "contender"), list(parameters()))
def test_operation(race, device, machine, sets_of_inputs, contest: Race, case, dtype, backward, contender):
    if not contest.practical(case, contender):
        pytest.skip("at this size only ours is practical")
    call = contest.contenders(case)[contender]
    if contender == "torch.compile":
        torch.compiler.reset()
        call = torch.compile(call)

    def step(seed: int):
        inputs = contest.make(case, dtype, device, seed, contender)
        for leaf in inputs.leaves if backward else ():
            leaf.requires_grad_()

        def run():
            results = call(*inputs.arguments)
            if not backward:
                return results
            if isinstance(results, tuple):
                results = results[: len(inputs.incoming)]
            return torch.autograd.grad(results, inputs.leaves, inputs.incoming)

        return run

    race(
        [step(seed) for seed in sets_of_inputs(contest.nbytes(case, dtype))],
        group=contest.group(case, dtype, backward),
        name=contender,
        floor=contest.floor(case, machine, dtype, backward),
    )
