"""What type checkers know of the public names: calls.py, and that it is what these do when they are called."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import iio_kernels
from iio_kernels.nn import SlotAttention

ROOT = Path(__file__).parents[1]
CALLS = Path("tests/calls.py")

x, picture, decoded = torch.ones(1, 2, 3), torch.ones(1, 3, 11, 11), torch.ones(1, 2, 4, 11, 11)
square = torch.ones(3, 3)
weights = iio_kernels.SlotAttentionWeights(
    *(torch.ones(shape) for shape in (3, 3, (3, 3), (3, 3), (3, 3), (9, 3), (9, 3), 9, 9, 3, 3, (4, 3), 4, (3, 4), 3))
)

#: The public functions that have options, and what they are called on.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "broadcast_conv2d": (iio_kernels.broadcast_conv2d, (x, torch.ones(2, 3, 1, 1), torch.ones(2, 5, 5), 5)),
    "compose": (iio_kernels.compose, (decoded,)),
    "composition_error": (iio_kernels.composition_error, (picture, decoded)),
    "conditional_entropies": (iio_kernels.conditional_entropies, (picture, picture)),
    "iio_loss": (iio_kernels.iio_loss, (picture, picture)),
    "inpaint": (iio_kernels.inpaint, (picture, picture)),
    "interaction_information": (iio_kernels.interaction_information, (picture, picture)),
    "mixture_log_likelihood": (iio_kernels.mixture_log_likelihood, (picture, decoded)),
    "slot_attention": (iio_kernels.slot_attention, (x, x, x)),
    "slot_attention_from_inputs": (iio_kernels.slot_attention_from_inputs, (x, x, square, None, square, None)),
    "slot_attention_module": (iio_kernels.slot_attention_module, (x, x, weights, 1)),
    "spatial_mixture": (iio_kernels.spatial_mixture, (picture, decoded)),
    "SlotAttention": (SlotAttention, (3, 3)),
}

OVERLOADED = (
    iio_kernels.composition_error,
    iio_kernels.slot_attention,
    iio_kernels.slot_attention_from_inputs,
    iio_kernels.slot_attention_module,
    SlotAttention.__init__,
)


def test_calls_type_check_or_do_not():
    command = ("mypy", "--no-pretty", "--no-color-output", "--hide-error-context", "--no-error-summary", str(CALLS))
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode < 2, done.stdout + done.stderr  # 2: it could not run
    found = re.findall(rf"^{re.escape(str(CALLS))}:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    lines = (ROOT / CALLS).read_text().splitlines()
    wanted = {
        (str(number), code) for number, line in enumerate(lines, 1) for code in re.findall(r"# E: ([a-z-]+)$", line)
    }
    assert set(found) == wanted, done.stdout


def literals() -> Iterator[tuple[str, str, set[str | None]]]:
    """Function, option, and the words of its type."""
    for name, (function, _) in FUNCTIONS.items():
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
        for option, hint in hints.items():
            alternatives = (hint, *typing.get_args(hint))
            words = {w for x in alternatives if typing.get_origin(x) is Literal for w in typing.get_args(x)}
            if words:
                yield name, option, words | {None} if type(None) in alternatives else words


@pytest.mark.parametrize(("name", "option", "words"), list(literals()))
def test_an_option_has_the_words_that_type_checkers_know(name, option, words):
    function, arguments = FUNCTIONS[name]

    def call() -> None:
        module = function(*arguments, **{option: "another"})
        module(x)  # its backend is chosen when it is called

    with pytest.raises(ValueError, match=rf"^{option}: expected one of ") as refused:
        call()
    listed = re.search("expected one of (.*), got 'another'$", str(refused.value))
    assert words == set(ast.literal_eval(f"[{listed[1]}]")) - {"written_out"}  # the tests' own backend


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
@pytest.mark.parametrize("function", OVERLOADED, ids=lambda function: function.__qualname__)
def test_overloads_have_the_parameters_of_the_function(function):
    own = inspect.signature(function).parameters
    overloads = [inspect.signature(overload).parameters for overload in typing.get_overloads(function)]
    assert len(overloads) == 3  # of a flag that is False, True, or either
    flags = {"return_attention", "return_masks", "attention"}
    for parameters in overloads:
        assert [(p.name, p.kind) for p in parameters.values()] == [(p.name, p.kind) for p in own.values()]
        unlike = {name for name in own if parameters[name].annotation != own[name].annotation}
        assert unlike <= flags | {"self"}
        required, needed = ({p.name for p in ps.values() if p.default is p.empty} for ps in (parameters, own))
        assert needed <= required <= needed | flags
