import signal
import threading

import pytest

from llm_cht.train.signals import StopSignals

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(("number", "name"), [(INT, "SIGINT"), (TERM, "SIGTERM"), (USR1, "SIGUSR1")])
def test_first_signal_is_only_noted(number, name):
    with StopSignals() as signals:
        assert signals.requested is None
        signal.raise_signal(number)
        assert signals.requested == name


def test_second_interrupt_raises_at_once():
    with StopSignals() as signals:
        signal.raise_signal(INT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)
        assert signals.requested == "SIGINT"


def test_sigterm_never_raises_and_is_no_first_interrupt():
    with StopSignals() as signals:
        for number in (TERM, TERM, USR1, USR1, INT):
            signal.raise_signal(number)
        assert signals.requested == "SIGTERM"


def test_hold_defers_the_second_interrupt_to_its_end():
    reached = False
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.hold():  # noqa: PT012
            for _ in range(3):
                signal.raise_signal(INT)
            reached = True
        with signals.hold():  # raised once, not again by the save that follows it
            pass
    assert reached


def test_launched_process_never_raises():
    with StopSignals(launched=True) as signals:
        with signals.hold():
            for _ in range(2):
                signal.raise_signal(INT)
        signal.raise_signal(INT)
        assert signals.requested == "SIGINT"


def test_hold_lets_an_error_of_its_block_through():
    with StopSignals() as signals:
        signal.raise_signal(INT)
        with pytest.raises(OSError, match="disk"), signals.hold():  # noqa: PT012
            signal.raise_signal(INT)
            raise OSError("disk")


def test_old_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number in (INT, TERM, USR1)]
    with pytest.raises(RuntimeError), StopSignals():  # noqa: PT012
        assert [signal.getsignal(number) for number in (INT, TERM, USR1)] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (INT, TERM, USR1)] == before


def test_in_another_thread_it_changes_nothing():
    before, seen = signal.getsignal(INT), []

    def run():
        with StopSignals() as signals, signals.hold():
            seen.extend([signal.getsignal(INT), signals.requested])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, None]
