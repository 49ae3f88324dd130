import socket
import time

import pytest

from llm_cht.train.peers import Address, Peers, _answer, _call


def pair() -> tuple[Peers, Peers]:
    """The lines of ranks 0 and 1 of two."""
    ends = socket.socketpair()
    return Peers([], {1: ends[0]}), Peers([], {0: ends[1]})


def test_words_arrive_whole_and_in_order_and_then_the_end():
    first, second = pair()
    long = {"text": "x" * 100_000}
    first.send({"number": 1})
    first.send(long)
    words = []
    while len(words) < 2:
        words += list(second.read(5))
        first.send({"number": 2})  # what of the long one did not fit goes before it
    assert words[:2] == [(0, {"number": 1}), (0, long)]
    first.close()
    assert list(second.read(5))[-1] == (0, None)
    second.send({"number": 3})  # to nobody
    second.close()


def test_reader_that_sleeps_holds_nobody():
    first, second = pair()
    start = time.monotonic()
    for number in range(5000):
        first.send({"number": number, "text": "x" * 500})
    assert time.monotonic() - start < 5
    numbers = [word["number"] for _, word in second.read(5)]
    assert numbers == list(range(len(numbers)))
    first.close()
    second.close()


def test_wake_ends_a_wait():
    first, second = pair()
    for _ in range(3):
        first.wake()
    start = time.monotonic()
    assert list(first.read(60)) == []
    assert time.monotonic() - start < 5
    first.close()
    second.close()


@pytest.mark.parametrize("rubbish", [b"GET / HTTP/1.1\r\n", b"\xff\n", b"x" * 200])
def test_stranger_gets_no_line(rubbish):
    links: dict[int, socket.socket] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(rubbish)
            _answer(listener, "secret", links, time.monotonic() + 5)
            assert links == {}
        link = _call(Address("a host", 1, "127.0.0.1", port, ""), "secret", 3, time.monotonic() + 5)
        _answer(listener, "secret", links, time.monotonic() + 5)
    assert list(links) == [3]
    for end in (link, links[3]):
        end.close()


def test_rank_out_of_reach_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"no way to node7 \(127.0.0.1:{port}\): "):
        _call(Address("node7", 1, "127.0.0.1", port, ""), "secret", 3, time.monotonic() + 5)
