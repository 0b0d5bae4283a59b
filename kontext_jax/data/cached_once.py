"""A cached property for objects that several threads read."""

import functools
import threading


class cached_once(functools.cached_property):  # noqa: N801 (used as a decorator)
    """`functools.cached_property`, computed once even if several threads ask for it at once.

    Since Python 3.12 the standard library's does not lock. The lock belongs to the property and not
    to the object, which stays picklable.
    """

    def __init__(self, func):
        super().__init__(func)
        self._computing = threading.RLock()

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        with self._computing:
            return super().__get__(instance, owner)
