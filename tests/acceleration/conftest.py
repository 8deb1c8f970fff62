"""Tests of `accelerate` begin without traces."""

import pytest
import torch


@pytest.fixture(autouse=True)
def own_traces():
    torch._dynamo.reset()
