"""A run of many processes that loses a rank, or waits for one too long, ends on all ranks with one message.

Without this a collective whose peer is gone hangs (NCCL) or raises on every rank (gloo), and nothing says who is to
blame. Here a thread on each rank tells all others, every second, where its training thread is, and judges what it hears
over lines of its own (``peers``). No collective decides anything, for none can be trusted then:

- A rank whose line ended is gone: all end at once, without waiting for the time-out; a launcher that kills the rest
  some seconds after a death would else be first, and a rank inside an NCCL call never reads its signal.
- Otherwise ranks end when those to blame made no progress for the time-out: silent ones; else those furthest behind;
  else, where all are in the same phase, those that wait in no collective, or passed the fewest ``enter``. Who waits for
  a rank that makes progress (one that validates, exports) waits on: only the blamed one's clock counts.
- The lowest rank that is not to blame speaks and tells the others that it did; they leave silently. Should it not
  speak, the next one does some seconds later.

A rank that runs but is slow leads to one warning. Rejected: ending on silence alone (a rank that holds the interpreter
lock, as long writes may, is silent and well), and killing the blamed one by its process id (it may be on another host).
A stopped rank is left to the launcher, or ends itself when it runs on.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn

from llm_cht import dist
from llm_cht.train.peers import Peers, Word, connect
from llm_cht.train.rendezvous import meeting

_CODE = 1
_GRACE_S = 5.0  # longer than it takes to find and name who is gone, and shorter than launchers wait
_NAMED = 8  # of many blamed ranks, so many are named
_SPEAKERS = 10


@dataclass(frozen=True)
class Place:
    """Where the training thread of a rank is."""

    step: int = 0
    phase: str = "start"
    changes: int = 0
    """of step or phase since the start"""
    calls: int = 0
    """of ``enter`` since the start"""
    limit_s: float = math.inf
    """how long it may be here without progress; the start has no limit, since data may be prepared for hours"""
    seconds: float = 0.0
    """since the last ``enter``"""
    waits: bool = False
    """whether it is inside a collective, where Python can see that"""
    line: str = ""
    """module and line, of ours"""

    def __str__(self) -> str:
        if self.phase in ("start", "step"):
            return f"step {self.step}" if self.phase == "step" else "the start"
        return f"the {self.phase} of step {self.step}"


@dataclass
class Seen:
    """What a rank knows of one rank, itself included."""

    name: str
    place: Place
    heard: float
    """when, on the own monotonic clock"""
    ended: float | None = None
    """when its line ended or it said why it leaves"""
    reason: str | None = None
    """why it says it left"""
    done: bool = False
    """whether it left because it was through"""

    def idle(self, now: float) -> float:
        """Seconds without progress."""
        return self.place.seconds + now - self.heard


@dataclass(frozen=True)
class Group:
    """Ranks that may be to blame together."""

    named: list[int]
    timed: list[int]
    """those who all must be over time, before the named are blamed"""


class Watchdog:
    """Context manager around start and training loop of every rank; alone it does nothing.

    An exception from a collective that lost its peer does not leave the block: the process ends with code 1 and the
    message of the rank that speaks. Every other exception leaves it, and the others then learn of this rank's end.

    Args:
        timeout_s: how long a rank may be in one phase without progress.
        resume_command: what a user types to go on from the last checkpoint.
        say: prints a text on whatever rank it is called; called from a thread.
    """

    def __init__(self, timeout_s: float, resume_command: str, say: Callable[[str], None]) -> None:
        self.timeout_s, self.resume_command, self.say = timeout_s, resume_command, say
        self.beat_s = min(1.0, timeout_s / 30)
        self.silent_s = 5 * self.beat_s
        self.warn_s = min(60.0, timeout_s / 4)
        self._me = dist.rank()
        self._place, self._since = Place(), time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = threading.get_ident()
        self._closing = threading.Event()
        self._failed: tuple[float, str] | None = None
        self._warned = -1
        self._warned_of_all = False
        self._suspected: dict[tuple[int, ...], float] = {}  # since when
        self._peers: Peers | None = None
        self._seen: dict[int, Seen] = {}
        self._old_handler: Any = None

    def enter(self, step: int, phase: str, allowance: float = 1.0) -> None:
        """Say where this rank is; again in the same place: that it makes progress. Costs a microsecond.

        All ranks enter the same phases in the same order; ``allowance`` times the time-out may pass without progress.
        """
        old, limit = self._place, allowance * self.timeout_s
        changes = old.changes + ((old.step, old.phase) != (step, phase))
        self._since = time.monotonic()
        self._place = Place(step, phase, changes, old.calls + 1, limit)
        if phase != old.phase and self._peers is not None:  # steps may be short, and are told every second
            self._peers.wake()

    def __enter__(self) -> Watchdog:
        if dist.world_size() == 1:
            return self
        with meeting():
            peers = connect()
        if isinstance(peers, str):
            if dist.is_main():
                self.say(
                    f"warning: lost or stuck ranks will not be named, because the ranks cannot connect for it: {peers}"
                )
            return self
        now = time.monotonic()
        for rank, address in enumerate(peers.addresses):
            name = f"rank {rank} ({address.host}, process {address.process})"
            self._seen[rank] = Seen(name, self._place, now)
        self._peers, self._since = peers, now
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM outside of ``StopSignals`` ends this process, but a launcher sends it because another rank is gone.

        Who is to say so must live long enough for it.
        """
        time.sleep(_GRACE_S)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers is None:
            return
        if isinstance(error, Exception) and dist.lost_connection(error):
            self._failed = (time.monotonic(), _first_line(error))
            self._thread.join()  # which ends the process
        self._closing.set()
        self._peers.wake()
        self._thread.join()
        self._peers.send({"left": None if error is None else f"{type(error).__name__}: {_first_line(error)}"})
        self._peers.close()
        self._peers = None
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)

    def _watch(self) -> None:
        assert self._peers is not None
        due, phase = 0.0, ""
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= due or self._place.phase != phase:
                due, phase = now + self.beat_s, self._place.phase
                self._peers.send({"place": asdict(self._look())})
            self._listen(max(0.0, due - now))
            # of before listening: a process that was stopped in between must not take its own absence for the others'
            self._judge(now)

    def _look(self) -> Place:
        """The own place, now."""
        place, seconds = self._place, time.monotonic() - self._since
        waits, line = _whereabouts(self._watched)
        own = Place(place.step, place.phase, place.changes, place.calls, place.limit_s, seconds, waits, line)
        self._seen[self._me].place, self._seen[self._me].heard = own, time.monotonic()
        return own

    def _listen(self, seconds: float) -> None:
        assert self._peers is not None
        for rank, word in self._peers.read(seconds):
            self._note(self._seen[rank], word)

    def _note(self, seen: Seen, word: Word | None) -> None:
        now = time.monotonic()
        if word is None:
            seen.ended = seen.ended or now
        elif "over" in word:  # another rank said it for all
            os._exit(_CODE)
        elif "left" in word:
            seen.done, seen.reason, seen.ended = word["left"] is None, word["left"], now
        else:
            seen.place, seen.heard = Place(**word["place"]), now

    def _judge(self, now: float) -> None:
        """End the run or warn, where that is due."""
        lost = [rank for rank, seen in self._seen.items() if seen.ended and not seen.done]
        if lost:
            # for the rest of a node, and for the own training thread that may leave by the same error
            patience = 3.0 if any(self._seen[rank].reason for rank in lost) else 1.0
            if now - min(self._seen[rank].ended or now for rank in lost) > patience:
                self._end(lost)
            return
        present = {rank: seen for rank, seen in self._seen.items() if not seen.done}
        if self._failed is not None:
            if now - self._failed[0] > self.silent_s + 3:  # whoever is silent is known to be by then
                self._end_failed(present, now)
            return
        for group in self._lasting(present, now):
            if all(present[rank].idle(now) > present[rank].place.limit_s for rank in group.timed):
                self._end(group.named)
            self._warn(group, now)

    def _lasting(self, present: dict[int, Seen], now: float) -> list[Group]:
        """Suspects without progress for a while, who have been so for some beats.

        After a long wait the first to go on is heard before the others are, who for a moment seem to be behind.
        """
        groups = suspects(present, now, self.silent_s) if self._seen[self._me].idle(now) > self.warn_s else []
        slow = [group for group in groups if all(present[rank].idle(now) > self.warn_s for rank in group.timed)]
        self._suspected = {tuple(group.named): self._suspected.get(tuple(group.named), now) for group in slow}
        return [group for group in slow if now - self._suspected[tuple(group.named)] >= self.silent_s]

    def _end_failed(self, present: dict[int, Seen], now: float) -> NoReturn:
        """A collective failed here and nobody is gone: end whoever is to blame, where somebody is."""
        group = suspects(present, now, self.silent_s)[0]
        stuck = all(present[rank].idle(now) > self.warn_s for rank in group.timed)
        self._end(group.named if stuck else list(present))

    def _warn(self, group: Group, now: float) -> None:
        """Once per place, by one rank, where somebody in particular is waited for and has made no progress.

        Where that cannot be seen (DDP waits inside the backward pass) once a run: it may be that steps are long.
        """
        own = self._seen[self._me]
        present = [rank for rank, seen in self._seen.items() if not seen.done]
        others = [rank for rank in present if rank not in group.named]
        if own.place.changes == self._warned or math.isinf(own.place.limit_s):
            return
        if (others or present)[:1] != [self._me] or (not others and self._warned_of_all):
            return
        self._warned, self._warned_of_all = own.place.changes, self._warned_of_all or not others
        told = []
        for seen in (self._seen[rank] for rank in group.named):
            silent = ", without an answer" if now - seen.heard > self.silent_s else ""
            told.append(f"{seen.name}: in {seen.place} for {seen.idle(now):.0f} s{silent}")
        of_all = "" if others else "one of all ranks, "
        self._tell(f"warning: waiting {own.idle(now):.0f} s for {of_all}{_listed(told, '; ')}")

    def _end(self, blamed: Sequence[int]) -> NoReturn:
        """Leave the process; the first rank that is not to blame says why, for all."""
        assert self._peers is not None
        text = self._message(blamed)
        present = [rank for rank, seen in self._seen.items() if not seen.ended]
        order = [*[rank for rank in present if rank not in blamed], *[rank for rank in present if rank in blamed]]
        turn = order.index(self._me)
        until = time.monotonic() + 3.0 * min(turn, _SPEAKERS)
        while time.monotonic() < until:
            self._listen(0.1)
        if turn < _SPEAKERS:
            guard = threading.Timer(5, os._exit, (_CODE,))  # the training thread may hold what a print needs
            guard.daemon = True
            guard.start()
            self._tell(text)
            self._peers.send({"over": True})  # last: a launcher kills the rest as soon as one is gone
        os._exit(_CODE)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more; the watch goes on
            self.say(text)
            sys.stdout.flush()
            sys.stderr.flush()

    def _message(self, blamed: Sequence[int]) -> str:
        now, own = time.monotonic(), self._seen[self._me]
        if any(not seen.done and rank not in blamed for rank, seen in self._seen.items()):
            told = [self._accuse(self._seen[rank], now) for rank in blamed]
            why = f"{len(blamed)} of {len(self._seen)} ranks {'is' if len(blamed) == 1 else 'are'} lost or stuck"
        else:
            told = [f"all answer; {own.name} has been there for {own.idle(now):.0f} s"]
            told += sorted({f"some are at {seen.place.line}" for seen in self._seen.values() if seen.place.line})
            why = "the ranks wait for each other"
            if self._failed is not None:
                why = "a collective failed"
                told.append(self._failed[1])
        if own.place.phase == "start":
            kept = "No step was taken and no checkpoint touched; start it again as before"
        else:
            kept = f"Its checkpoints are whole; go on from the last one with: {self.resume_command}"
        return f"error: the run ended in {own.place}, because {why}:\n  {_listed(told)}\n{kept}"

    def _accuse(self, seen: Seen, now: float) -> str:
        place, silence = seen.place, now - seen.heard
        where = f"{place} ({place.line})" if place.line else f"{place}"
        if seen.reason:
            return f"{seen.name} stopped in {where} by {seen.reason}"
        if seen.ended:
            return f"{seen.name} is gone (killed, out of memory, crashed?), last seen {silence:.1f} s ago in {where}"
        if silence > self.silent_s:
            return (
                f"{seen.name} does not answer, last seen {silence:.0f} s ago in {where}, "
                f"for {place.seconds:.0f} s then (`train.timeout_s` = {self.timeout_s:g})"
            )
        return (
            f"{seen.name} answers, but has been in {where} for {seen.idle(now):.0f} s "
            f"(`train.timeout_s` = {self.timeout_s:g})"
        )


def suspects(present: dict[int, Seen], now: float, silent_s: float) -> list[Group]:
    """Who may be to blame for the others' waiting, the likeliest group first."""
    places = {rank: seen.place for rank, seen in present.items()}
    groups = []
    silent = [rank for rank, seen in present.items() if now - seen.heard > silent_s]
    if silent:
        groups.append(Group(silent, [max(silent, key=lambda rank: present[rank].idle(now))]))
    first = min(place.changes for place in places.values())
    behind = [rank for rank, place in places.items() if place.changes == first]
    if len(behind) < len(places):
        return [*groups, Group(behind, behind)]
    # all are in one phase: who makes progress may be waited for, so nobody is to blame before all are over time
    busy = [rank for rank, place in places.items() if not place.waits]
    fewest = min(place.calls for place in places.values())
    slow = [rank for rank, place in places.items() if place.calls == fewest]
    named = next((ranks for ranks in (busy, slow) if 0 < len(ranks) < len(places)), list(places))
    return [*groups, Group(named, list(places))]


def _whereabouts(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and the innermost line of ours that it runs."""
    frame = sys._current_frames().get(thread)
    waits = False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("torch.distributed") or name == "llm_cht.dist":
            waits = True
        elif (name.startswith("llm_cht.") and name not in (__name__, Peers.__module__)) or name == "__main__":
            return waits, f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return waits, ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _listed(texts: Sequence[str], between: str = "\n  ") -> str:
    rest = [f"and {len(texts) - _NAMED} more"] if len(texts) > _NAMED else []
    return between.join([*texts[:_NAMED], *rest])
