"""A line from every rank to every other, for the watchdog alone: short words as JSON, and the news that a line ended.

A TCP mesh in plain sockets. The end of a process closes its lines, whatever ended it, so all others know at once and
for certain who is gone; a stopped process or a dead node closes none and is told by its silence. Each rank sees each
other by itself, so that losing any of them (rank 0, a whole node) blinds nobody. The cost is one socket and some 150
bytes a second per pair of ranks.

Rejected: a ``TCPStore`` on rank 0. Its calls were seen to block for ever, time-out or not, while the process that hosts
it is stopped; when that process dies every client prints pages of C++ frames; and nobody can ask about the others then.
Datagrams were rejected because they cannot tell a dead process from a slow one. Neither ``torch.distributed`` can be
used: its collectives are what hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_cht import dist

Word = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Who a rank is and where it listens while the lines are made."""

    host: str
    process: int
    address: str
    port: int
    secret: str
    """that of rank 0 opens a line: strangers who find the port stay outside"""


class _Line:
    """One end of the connection with one rank."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self.link = link
        self.received = b""
        self.unsent = b""

    def send(self, text: bytes) -> None:
        """Send what fits; while an earlier word is stuck (a stopped reader), a new one is dropped."""
        self.unsent = self.unsent or text
        try:
            self.unsent = self.unsent[self.link.send(self.unsent) :]
        except OSError:  # full, or ended, which is read as such
            return

    def read(self) -> list[Word | None]:
        """The words that came; a last None says that the line ended."""
        words: list[Word | None] = []
        while True:
            try:
                part = self.link.recv(65536)
            except BlockingIOError:
                return words
            except OSError:
                part = b""
            if not part:
                return [*words, None]
            *lines, self.received = (self.received + part).split(b"\n")
            words += [json.loads(line) for line in lines]


class Peers:
    """The open lines of this rank; one thread at a time uses them, any may ``wake`` it."""

    def __init__(self, addresses: list[Address], links: dict[int, socket.socket]) -> None:
        self.addresses = addresses
        self._lines = {rank: _Line(link) for rank, link in links.items()}
        self._selector = selectors.DefaultSelector()
        for rank, link in links.items():
            self._selector.register(link, selectors.EVENT_READ, rank)
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)

    def wake(self) -> None:
        """Let ``read`` return at once."""
        with contextlib.suppress(BlockingIOError):  # full of wakes already
            self._button.send(b".")

    def send(self, word: Word) -> None:
        """Tell a word to every rank; never blocks."""
        text = json.dumps(word).encode() + b"\n"
        for line in self._lines.values():
            line.send(text)

    def read(self, seconds: float) -> Iterator[tuple[int, Word | None]]:
        """Rank and word, of every word that comes; waits ``seconds`` at most for the first. None: its line ended."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._bell.recv(4096)
                continue
            for word in self._lines[key.data].read():
                if word is None:
                    self._selector.unregister(key.fileobj)
                    self._lines.pop(key.data).link.close()
                yield key.data, word

    def close(self) -> None:
        """Close every line; the other ends read that."""
        self._selector.close()
        for link in (self._bell, self._button, *(line.link for line in self._lines.values())):
            link.close()


def connect(seconds: float = 30) -> Peers | str:
    """Make the lines; every rank calls it, when ``dist.open_control`` was called. Returns why not, on all ranks alike.

    That a firewall lets the collectives through and not these lines is no reason not to train, hence no error.
    """
    own, me = _reachable_at(), dist.rank()
    links: dict[int, socket.socket] = {}
    failure = None
    with socket.create_server(("", 0), backlog=dist.world_size()) as listener:
        mine = [socket.gethostname(), os.getpid(), own, listener.getsockname()[1], secrets.token_hex(16)]
        addresses = [Address(*values) for values in dist.gather(mine)]
        end = time.monotonic() + seconds
        try:
            # first all calls, which need no answer, then all answers: no order of ranks can lock
            for rank in range(me):
                links[rank] = _call(addresses[rank], addresses[0].secret, me, end)
            while len(links) < dist.world_size() - 1:
                _answer(listener, addresses[0].secret, links, end)
            for rank in range(me):
                if _read_line(links[rank], end) != addresses[0].secret:
                    raise ConnectionError(f"what answers at {addresses[rank].address} is not rank {rank}")
        except OSError as error:
            failure = f"rank {me} ({addresses[me].host}): {error}"
        told = [text for text in dist.gather(failure) if text is not None]
    if told:
        for link in links.values():
            link.close()
        return str(told[0])
    return Peers(addresses, links)


def _reachable_at() -> str:
    """Address of this host as the others see it: that of the way to the host of rank 0, the name of the latter there.

    A host may resolve its own name to loopback, of no use to others, while the others resolve it well.
    """
    main = os.environ.get("MASTER_ADDR", "localhost")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(main, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: chooses the way, sends nothing
            address = str(probe.getsockname()[0])
    except OSError:
        return main
    return main if address.startswith("127.") else address


def _call(other: Address, secret: str, me: int, end: float) -> socket.socket:
    try:
        link = socket.create_connection((other.address, other.port), timeout=_left(end))
        link.sendall(f"{secret} {me}\n".encode())
    except OSError as error:
        raise ConnectionError(f"no way to {other.host} ({other.address}:{other.port}): {error}") from error
    return link


def _answer(listener: socket.socket, secret: str, links: dict[int, socket.socket], end: float) -> None:
    listener.settimeout(_left(end))
    link, _ = listener.accept()
    try:
        told, _, rank = _read_line(link, min(end, time.monotonic() + 5)).partition(" ")
    except OSError:
        told = ""
    if not secrets.compare_digest(told.encode(), secret.encode()):
        link.close()
        return
    link.sendall(f"{secret}\n".encode())
    links[int(rank)] = link


def _read_line(link: socket.socket, end: float) -> str:
    """One line, byte by byte: what follows it is not for us yet."""
    text = b""
    while not text.endswith(b"\n"):
        link.settimeout(_left(end))
        byte = link.recv(1)
        if not byte or len(text) > 100:
            raise ConnectionError("the other side hung up")
        text += byte
    return text.decode(errors="replace").strip()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left
