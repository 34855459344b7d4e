"""Shape checks for the core's tests: every annotated tensor, and nothing else.

beartype would also refuse a setting of the wrong type, before the core can say in its own words what is wrong with it.
"""

import typing

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# Python's numeric tower: 3 is as good a float as 3.0.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """Check the function's arguments and result if any of them is a tensor with a shape."""
    return _checked(function) if any(map(_has_shape, getattr(function, "__annotations__", {}).values())) else function


def _has_shape(hint):
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))
