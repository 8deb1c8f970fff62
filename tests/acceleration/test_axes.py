"""Axes, followed through reshapes."""

from __future__ import annotations

import pytest

from iio_kernels.acceleration.recognition.axes import Unlike, atoms, fresh, identify, regroup


def test_axes():
    (b, n, d) = fresh((2, 5, 12))
    q, h, f = regroup((b, n, d), (10, 3, 4))
    assert atoms(q) == b + n
    assert [axis.size for axis in h + f] == [3, 4]
    (other,) = fresh((12,))
    identify(other, d)
    assert atoms(other) == h + f
    assert regroup((b, (), n), (2, 1, 5, 1)) == (b, (), n, ())
    with pytest.raises(Unlike):
        regroup((b, n), (5, 2))
    with pytest.raises(Unlike):
        identify(b, n)
