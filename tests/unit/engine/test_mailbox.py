"""Items arrive whole and in order, urgent ones at once."""

from __future__ import annotations

import threading
import time

from piecework.engine.mailbox import Mailbox


def test_items_of_another_thread_arrive_in_order() -> None:
    mailbox: Mailbox[int] = Mailbox()

    def write() -> None:
        for number in range(5000):
            (mailbox.put_urgent if number % 7 == 0 else mailbox.put)(number)

    writer = threading.Thread(target=write)
    writer.start()
    found: list[int] = []
    while len(found) < 5000:
        found += mailbox.wait()
    writer.join()
    assert found == list(range(5000))


def test_an_item_that_is_not_urgent_is_found_too() -> None:
    mailbox: Mailbox[str] = Mailbox()
    threading.Timer(0.01, mailbox.put, ["a"]).start()
    assert list(mailbox.wait()) == ["a"]


def test_an_urgent_item_wakes_its_reader() -> None:
    mailbox: Mailbox[str] = Mailbox()
    woken = threading.Event()

    def read() -> None:
        mailbox._urgent.wait(60)  # no look in between
        assert list(mailbox.wait()) == ["later", "now"]
        woken.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    mailbox.put("later")
    time.sleep(0.05)
    assert not woken.is_set()
    mailbox.put_urgent("now")
    assert woken.wait(10)
