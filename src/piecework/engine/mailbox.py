"""Items from one thread to another that would rather not be woken for each of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Final, Generic, TypeVar, final

Item = TypeVar("Item")

LATEST_S: Final = 0.05


@final
class Mailbox(Generic[Item]):
    """Takes items; its reader sleeps until one is urgent, and looks every `LATEST_S` seconds.

    Where cores are few and all of them compute, every wake-up takes one from a computation that its other threads wait
    for. Three a token cost a model of 100 M parameters some percent of its speed.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._urgent = threading.Event()

    def put(self, item: Item) -> None:
        """Leave an item for later."""
        self._items.append(item)

    def put_urgent(self, item: Item) -> None:
        """Leave an item, and wake the reader."""
        self._items.append(item)
        self._urgent.set()

    def wait(self) -> Iterator[Item]:
        """Yield what there is, in order, once there is something; to be called by one thread."""
        while not self._items:
            self._urgent.wait(LATEST_S)
        self._urgent.clear()  # before the last look, so that what comes meanwhile is seen now or sets it again
        while self._items:
            yield self._items.popleft()
