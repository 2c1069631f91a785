"""Stop signals are noted, never obeyed; a second Ctrl-C is; the handlers from before come back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from moe.train.stop_request import STOP_SIGNALS, StopRequests


def _handlers() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_stop_signal_is_noted_by_name(name: str) -> None:
    number = signal.Signals[name]
    with StopRequests() as requests:
        assert requests.signal_name is None
        os.kill(os.getpid(), number)
        assert requests.signal_name == number.name


def test_more_signals_do_not_kill_and_the_first_is_kept() -> None:
    with StopRequests() as requests:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert requests.signal_name == "SIGUSR1"


def test_the_note_can_be_read_after_the_context() -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
    assert requests.signal_name == "SIGTERM"


def test_handlers_are_restored_also_after_an_error() -> None:
    def own(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, own)
    try:
        installed = _handlers()
        with contextlib.suppress(RuntimeError), StopRequests():
            assert signal.getsignal(signal.SIGUSR1) is not own
            raise RuntimeError("in the body")
        assert _handlers() == installed
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal: this process may have been started as a job that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_interrupts_at_once_where_nothing_is_to_be_saved(interrupts: None) -> None:
    with StopRequests() as requests:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.signal_name is None


def test_the_first_ctrl_c_in_training_is_noted_and_the_second_ends_at_once(
    interrupts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequests() as requests, requests.until_saved():
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "\nCtrl-C: saving after this step; again ends at once.\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once_after_another_signal_too(interrupts: None) -> None:
    with StopRequests() as requests, requests.until_saved():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert requests.signal_name == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_nohup_or_a_background_job_ignores_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequests() as requests, requests.until_saved():
            os.kill(os.getpid(), number)
            assert requests.signal_name is None
    finally:
        signal.signal(number, before)


def test_another_thread_does_nothing_and_raises_nothing() -> None:
    before, seen = _handlers(), []

    def body() -> None:
        with StopRequests() as requests:
            seen.append((_handlers() == before, requests.signal_name))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(True, None)]
    assert _handlers() == before


def test_a_system_call_of_a_library_goes_on_after_the_signal() -> None:
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(8)

    def disturb() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(0.2)
        os.write(writer, b"whole")

    thread = threading.Thread(target=disturb)
    with StopRequests() as requests:
        thread.start()
        count = libc.read(reader, buffer, 8)
        thread.join()
    os.close(reader)
    os.close(writer)
    assert (count, buffer.value, requests.signal_name) == (5, b"whole", "SIGTERM")
