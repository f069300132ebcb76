# SPDX-License-Identifier: Apache-2.0
"""Tests of posttroll.py and posttroll_ns.py, in the order of their sections: real sockets, real processes.

Each test has ports and a multicast group of its own, on the loopback interface, and must leave nothing behind.
"""

from __future__ import annotations

import argparse
import array
import ast
import asyncio
import base64
import collections
import contextlib
import copy
import datetime as dt
import enum
import errno
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import logging.handlers
import multiprocessing
import os
import pickle
import pickletools
import queue
import random
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
import zipapp
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import posttroll.address_receiver
import posttroll.backends.zmq
import posttroll.backends.zmq.socket
import posttroll.bbmcast
import posttroll.listener
import posttroll.logger
import posttroll.message
import posttroll.message_broadcaster
import posttroll.ns
import posttroll.publisher
import posttroll.subscriber
import posttroll.testing
import pytest
import zmq
from freezegun import freeze_time
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from posttroll.message import Message, MessageError
from prometheus_client.parser import text_string_to_metric_families

import posttroll
import posttroll_ns
from posttroll import ConfigurationError, config

if sys.platform != "win32":
    import fcntl
    import pty
    import pwd
    import termios

HERE = Path(posttroll.__file__).resolve().parent
LIBRARY = HERE / "posttroll.py"
NAMESERVER = HERE / "posttroll_ns.py"
chance = random.SystemRandom()  # that no test plug-in seeds: ports and groups must differ
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
LONG = float(os.environ.get("POSTTROLL_LONG_SECONDS", "600"))  # what the tests marked as long may take, roughly
DEADLINE = 20.0  # seconds until a test gives up waiting; nothing here should take more than a fraction of it


# ======================================================================================================================
# Tools
# ======================================================================================================================


def wait_for(condition: Callable[[], Any], timeout: float = DEADLINE, what: str = "") -> Any:
    """Wait until *condition* gives something true, and return that; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"Waited {timeout} s in vain for {what or condition}")
        time.sleep(0.005)


@functools.cache
def own_ports() -> tuple[int, Iterator[int]]:
    """Return the first of 600 ports that no other process with tests uses, and half of them one after the other.

    The system gives none of them to outgoing connections.
    """
    for first in chance.sample(range(10000, 32000, 600), 36):
        with socket.socket() as claim, contextlib.suppress(OSError):
            claim.bind(("127.0.0.1", first))
            claim.detach()  # it stays open as long as this process lives
            return first, itertools.cycle(range(first + 1, first + 300))
    return pytest.fail("All ports are taken by others who run these tests")


def free_port() -> int:
    """Return a port that is free for TCP and UDP, and that nobody else takes."""
    for port in own_ports()[1]:
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            with contextlib.suppress(OSError):
                tcp.bind(("", port))
                udp.bind(("", port))
                return port
    raise AssertionError


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give each test settings of its own (subprocesses inherit them), and look for what it leaves behind."""
    for name in [name for name in os.environ if name.startswith(("POSTTROLL_", "PYTROLL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NAMESERVER_PORT", raising=False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # each process would compile the same two files again
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # which hides what is written late, or not at all
    (tmp_path / "config").mkdir()
    first, _ = own_ports()
    settings = {
        "ROOT_CONFIG": str(tmp_path / "etc"),
        "CONFIG": str(tmp_path / "config"),
        "NAMESERVER_PORT": str(free_port()),
        "ADDRESS_PUBLISH_PORT": str(free_port()),
        "BROADCAST_PORT": str(free_port()),
        "PUB_MIN_PORT": str(first + 300),
        "PUB_MAX_PORT": str(first + 600),
        "MC_GROUP": f"239.{first // 600}.{chance.randrange(256)}.{chance.randrange(1, 255)}",
        "MULTICAST_INTERFACE": "127.0.0.1",
        "DISCOVERY_SECONDS": "0",  # what waits for it sets it
    }
    for name, value in settings.items():
        monkeypatch.setenv("POSTTROLL_" + name, value)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    config.refresh()
    for log in vars(posttroll).values():
        if isinstance(log, posttroll.LimitedLogger):
            monkeypatch.setattr(log, "_kinds", {})  # it has not said enough yet
    threads, root = set(threading.enumerate()), logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)  # commands that a test has run here set it
    config.refresh()
    posttroll._idle_sockets.clear()
    wait_for(lambda: set(threading.enumerate()) <= threads, what=f"the end of {set(threading.enumerate()) - threads}")
    expected = posttroll._lingering_monitors  # of sockets that ZeroMQ closes when the last message is out
    open_sockets = [sock for sock in posttroll.get_context()._sockets if not sock.closed and sock not in expected]
    posttroll.destroy_context(0)
    assert open_sockets == []


@contextlib.contextmanager
def process(*args: Any, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process with pipes to its stdin, stdout and stderr; it has ended at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([str(arg) for arg in args], text=True, **{**pipes, **kwargs})
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


def python(code: str, *args: Any, **kwargs: Any) -> Any:
    """Run Python *code* in a process of its own, as `process` does."""
    return process(sys.executable, "-u", "-c", code, *args, **kwargs)


def finish(running: subprocess.Popen[str], timeout: float = DEADLINE) -> tuple[int, str, str]:
    """Wait for the end of a process; return its status, output and errors."""
    out, err = running.communicate(timeout=timeout)
    return running.returncode, out, err


def run_here(*args: Any, main: Callable[[list[str]], int] = posttroll.main) -> tuple[Any, str, str]:
    """Run a command in this process, where no process of its own is needed; return status, output and errors."""
    config.refresh()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def nameserver_process(*args: str, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """Run the nameserver as operators do; it is ready when this gives it."""
    with process(sys.executable, "-u", NAMESERVER, *args, **kwargs) as running:
        await_line(running, "answers on port")
        yield running


def await_line(running: subprocess.Popen[str], text: str) -> str:
    """Read the output of a process up to the line with *text*, and return that line."""
    assert running.stdout is not None
    for line in running.stdout:
        if text in line:
            return line
    _, err = running.communicate()
    pytest.fail(f"The process ended without {text!r}: {err}")


@contextlib.contextmanager
def nameserver(**kwargs: Any) -> Iterator[posttroll_ns.NameServer]:
    """Run a nameserver in a thread; it is ready when this gives it."""
    kwargs.setdefault("multicast_enabled", False)
    server = posttroll_ns.NameServer(**kwargs)
    ready = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run(when_ready=ready.set)
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(DEADLINE)
        yield server
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()
        for failure in failures:
            raise failure


def receive(subscriber: posttroll.Subscriber, count: int = 1, timeout: float = DEADLINE) -> list[posttroll.Message]:
    """Return the next *count* messages, fewer if they do not come in time."""
    messages: list[posttroll.Message] = []
    deadline = time.monotonic() + timeout
    while len(messages) < count and time.monotonic() < deadline:
        message = next(subscriber.recv(timeout=0.2))
        if message is not None:
            messages.append(message)
    return messages


def raw_request(port: int, *frames: bytes, timeout: float = DEADLINE) -> list[bytes] | None:
    """Send a request to a local port, as any ZeroMQ program could; return the answer, None if there is none."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger = 0
        sock.connect(f"tcp://127.0.0.1:{port}")
        sock.send_multipart(frames)
        return sock.recv_multipart() if sock.poll(timeout * 1000) else None


# ======================================================================================================================
# 1. Configuration
# ======================================================================================================================


def write(directory: Path, name: str, content: str) -> Path:
    """Write a file, and the directory that it is in."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(content)
    return path


class TestConfigLayers:
    """What was set in code, the environment, files, defaults: the first that has the key wins."""

    def test_documented_defaults(self, monkeypatch):
        for name in [name for name in os.environ if name.startswith("POSTTROLL_")]:
            if not name.endswith("CONFIG"):
                monkeypatch.delenv(name)
        expected = {
            "backend": "unsecure_zmq",
            "nameserver_port": 5557,
            "address_publish_port": 16543,
            "broadcast_port": 21200,
            "mc_group": "225.0.0.212",
            "mc_ttl": 31,
            "pub_min_port": 49152,
            "pub_max_port": 65536,
            "message_version": "v1.2",
        }
        assert {key: config.get(key) for key in expected} == expected

    @pytest.mark.parametrize(
        "key",
        [
            "secure_zmq_nameserver_port",
            "multicast_interface",
            "tcp_keepalive",
            "tcp_keepalive_cnt",
            "tcp_keepalive_idle",
            "tcp_keepalive_intvl",
            "client_secret_key_file",
            "server_public_key_file",
            "server_secret_key_file",
            "clients_public_keys_directory",
            "authorized_client_addresses",
        ],
    )
    def test_documented_keys_without_a_default(self, key, monkeypatch):
        monkeypatch.delenv("POSTTROLL_" + key.upper(), raising=False)
        assert config.get(key) is None
        assert config.get(key, "mine") == "mine"
        assert key not in config

    def test_the_environment_is_read_when_the_value_is_asked_for(self, monkeypatch):
        assert config.get("tcp_keepalive") is None
        monkeypatch.setenv("POSTTROLL_TCP_KEEPALIVE", "1")
        assert config.get("tcp_keepalive") == 1
        monkeypatch.setenv("POSTTROLL_TCP_KEEPALIVE", "0")
        assert config.get("tcp_keepalive") == 0
        monkeypatch.delenv("POSTTROLL_TCP_KEEPALIVE")
        assert config.get("tcp_keepalive") is None

    def test_each_layer_hides_the_next(self, monkeypatch, tmp_path):
        monkeypatch.delenv("POSTTROLL_BROADCAST_PORT")
        assert config.lookup("broadcast_port") == (21200, "default")
        path = write(tmp_path / "config", "a.json", '{"broadcast_port": 2}')
        config.refresh()
        assert config.lookup("broadcast_port") == (2, str(path))
        monkeypatch.setenv("POSTTROLL_BROADCAST_PORT", "3")
        assert config.lookup("broadcast_port") == (3, "$POSTTROLL_BROADCAST_PORT")
        config.set(broadcast_port=4)
        assert config.lookup("broadcast_port") == (4, "code")
        config.refresh()
        assert config.get("broadcast_port") == 3

    def test_values_in_the_environment_are_literals_or_text(self, monkeypatch):
        for text, value in [
            ("7", 7),
            ("[1, 'b']", [1, "b"]),
            ("{'a': None}", {"a": None}),
            ("True", True),
            ("plain text", "plain text"),
            ("10.0.0.1", "10.0.0.1"),
            ("(" * 2000, "(" * 2000),
            ("", ""),
        ]:
            monkeypatch.setenv("POSTTROLL_OWN_KEY", text)
            assert config.get("own_key") == value

    def test_nested_keys_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_CHAIN__STEP", "3")
        monkeypatch.setenv("POSTTROLL_CHAIN__DEEP__NAME", "x")
        assert config.get("chain.step") == 3
        assert config.get("chain.deep.name") == "x"
        assert config.get("chain") == {"step": 3, "deep": {"name": "x"}}

    def test_nested_keys_come_together_from_all_layers(self, monkeypatch, tmp_path):
        write(tmp_path / "config", "a.json", '{"chain": {"a": "file", "b": "file", "c": "file"}}')
        own = posttroll.Config()
        own.update_defaults({"chain": {"a": "default", "d": "default"}})
        monkeypatch.setenv("POSTTROLL_CHAIN__B", "environment")
        monkeypatch.setenv("POSTTROLL_CHAIN__C", "environment")
        own.set(chain__c="code")
        expected = {"a": "file", "b": "environment", "c": "code", "d": "default"}
        assert own.get("chain") == expected
        assert {key: own.get(f"chain.{key}") for key in "abcd"} == expected

    def test_a_key_that_nobody_has(self):
        with pytest.raises(KeyError, match="nonesuch"):
            config.get("nonesuch")
        with pytest.raises(KeyError, match="nonesuch"):
            config["nonesuch"]
        assert config.get("nonesuch", None) is None
        assert config.get("nonesuch", default=5) == 5
        assert "nonesuch" not in config

    def test_an_override_wins(self):
        assert config.get("nameserver_port", override_with=9) == 9
        assert config.get("mc_ttl", override_with=None) == 31

    def test_a_backend_asked_for_twice_follows_the_change_in_between(self, monkeypatch):
        """Values are remembered for speed; that must not show."""
        seen = [config.get("backend")]
        monkeypatch.setenv("POSTTROLL_BACKEND", "secure_zmq")
        seen.append(config.get("backend"))
        with config.set(backend="unsecure_zmq"):
            seen.append(config.get("backend"))
        seen.append(config.get("backend"))
        monkeypatch.delenv("POSTTROLL_BACKEND")
        seen.append(config.get("backend"))
        assert seen == ["unsecure_zmq", "secure_zmq", "unsecure_zmq", "secure_zmq", "unsecure_zmq"]


class TestConfigSet:
    """Settings from code."""

    def test_as_a_plain_call(self):
        config.set(mc_ttl=3)
        assert config["mc_ttl"] == 3
        config.set({"mc_ttl": 4}, broadcast_port=5)
        assert (config["mc_ttl"], config["broadcast_port"]) == (4, 5)

    def test_as_a_context_manager_it_restores(self):
        config.set(mc_ttl=3)
        with config.set(mc_ttl=4, own=1) as inside:
            assert inside is config
            assert (config["mc_ttl"], config["own"]) == (4, 1)
            with config.set(mc_ttl=5):
                assert config["mc_ttl"] == 5
            assert config["mc_ttl"] == 4
        assert config["mc_ttl"] == 3
        assert "own" not in config

    def test_it_restores_after_an_exception(self):
        with pytest.raises(ZeroDivisionError), config.set(mc_ttl=4):
            raise ZeroDivisionError
        assert config["mc_ttl"] == 31

    def test_nested_keys(self):
        config.set({"a.b": 1})
        config.set(a__c=2)
        config.set({"a": {"b": 3}})
        assert config.get("a") == {"b": 3}  # it sets a key, it does not merge into it
        with config.set({"a.d.e": 4}):
            assert config.get("a") == {"b": 3, "d": {"e": 4}}
        assert config.get("a") == {"b": 3}
        config.set({"a.b.c": 5})
        assert config.get("a.b.c") == 5

    def test_hyphens_and_underscores_are_alike(self):
        config.set({"mc-ttl": 7, "own-key": {"sub-key": 1}})
        assert config.get("mc_ttl") == config.get("mc-ttl") == 7
        assert config.get("own_key.sub-key") == config.get("own-key.sub_key") == 1
        assert "own-key" in config
        assert "own_key" in config

    def test_the_caller_s_dictionary_is_not_touched(self):
        mine = {"a": {"b": 1}}
        config.set(mine)
        config.set({"a.b": 2})
        config.update({"a": {"c": 3}})
        assert mine == {"a": {"b": 1}}

    def test_update_merges(self):
        config.set({"a": {"b": 1}})
        config.update({"a": {"c": 2}, "mc-ttl": 9})
        assert config.get("a") == {"b": 1, "c": 2}
        assert config.get("mc_ttl") == 9

    def test_update_with_priority_old_fills_gaps_only(self):
        config.set(own=1)
        config.update({"own": 2, "other": 3}, priority="old")
        assert (config["own"], config["other"]) == (1, 3)

    def test_merge_takes_several_the_last_wins(self):
        config.merge({"a": {"b": 1}, "x": 1}, {"a": {"c": 2}, "x": 2})
        assert config.get("a") == {"b": 1, "c": 2}
        assert config["x"] == 2

    def test_update_defaults_has_the_last_word_only(self):
        own = posttroll.Config()
        own.update_defaults({"own": 1, "sub": {"a": 1}})
        own.set(own=2, sub__b=2)
        assert own["own"] == 2
        assert own["sub"] == {"a": 1, "b": 2}
        own.refresh()
        assert own["own"] == 1

    def test_clear_forgets_code_and_files(self, tmp_path):
        write(tmp_path / "config", "a.json", '{"own_a": 1}')
        config.refresh()
        config.set(own_b=1)
        assert "own_a" in config
        config.clear()
        assert "own_a" not in config
        assert "own_b" not in config
        config.refresh()
        assert "own_a" in config

    def test_to_dict_and_pprint_show_all_layers(self, monkeypatch, tmp_path, capsys):
        write(tmp_path / "config", "a.json", '{"of_file": 1}')
        config.refresh()
        monkeypatch.setenv("POSTTROLL_OF_ENVIRONMENT", "2")
        config.set(of_code=3)
        everything = config.to_dict()
        assert everything.items() >= {"of_file": 1, "of_environment": 2, "of_code": 3, "mc_ttl": 31}.items()
        config.pprint()
        printed = capsys.readouterr().out
        assert "'of_file': 1" in printed
        assert "'mc_ttl': 31" in printed
        stream = io.StringIO()
        config.pprint(stream=stream)
        assert stream.getvalue() == printed

    def test_a_context_takes_back_its_own_keys_only(self):
        config.set(mc_ttl=1, broadcast_port=1)
        with config.set(mc_ttl=2):
            config.set(broadcast_port=3, own=3)
            config.update({"nameserver_port": 3})
        keys = ("mc_ttl", "broadcast_port", "own", "nameserver_port")
        assert [config[key] for key in keys] == [1, 3, 3, 3]

    def test_a_context_leaves_what_others_have_set_meanwhile(self):
        config.set(mc_ttl=1)
        with config.set(mc_ttl=2):
            config.set(mc_ttl=3)
        assert config["mc_ttl"] == 3

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_overlapping_contexts_may_end_in_any_order(self, order):
        """As those of threads do: what stays is the newest of those that have not ended."""
        config.set(mc_ttl=10, sub={"a": 10, "b": 10})
        contexts = [config.set({"mc_ttl": number, "sub.a": number}) for number in range(3)]
        open_ones = [0, 1, 2]
        for context in contexts:
            context.__enter__()
        for number in order:
            assert config["mc_ttl"] == config["sub.a"] == max(open_ones)
            contexts[number].__exit__(None, None, None)
            open_ones.remove(number)
        assert config["mc_ttl"] == 10
        assert config["sub"] == {"a": 10, "b": 10}

    def test_nested_keys_of_overlapping_contexts(self):
        outer = config.set({"a.b": 1})
        inner = config.set(a={"c": 2})
        config.set({"a.d": 3})
        assert config["a"] == {"c": 2, "d": 3}
        with inner:
            pass
        assert config["a"] == {"b": 1, "d": 3}
        with outer:
            pass
        assert config["a"] == {"d": 3}

    def test_contexts_in_many_threads_leave_nothing(self):
        """Each sees its own key as it has set it, and the backend as somebody has."""
        seen = []

        def work(number: int) -> None:
            for turn in range(100):
                with config.set({"backend": "secure_zmq", f"own{number}": turn}):
                    seen.append((config.get("backend"), config[f"own{number}"] == turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(seen) == {("secure_zmq", True)}
        assert config.get("backend") == "unsecure_zmq"
        assert [key for key in config.to_dict() if key.startswith("own")] == []

    def test_a_value_looked_up_while_it_is_set_does_not_stay(self, monkeypatch):
        """Whoever is in the middle of looking a key up, with the old value in hand, must not keep it for others."""
        own = posttroll.Config()
        find = own._find

        def find_slowly(*args: Any) -> Any:
            found = find(*args)
            monkeypatch.setattr(own, "_find", find)
            own.set(backend="secure_zmq")  # what another thread does meanwhile
            return found

        monkeypatch.setattr(own, "_find", find_slowly)
        assert own.get("backend") == "unsecure_zmq"
        assert own.get("backend") == "secure_zmq"

    def test_setting_the_same_keys_again_and_again_takes_no_memory(self):
        with config.set(own=0):
            for number in range(1000):
                config.set({"mc_ttl": number % 9, "sub.a": number})
                with config.set(mc_ttl=3):
                    pass
            assert len(config._changes) < 10
        assert (config["mc_ttl"], config["sub.a"]) == (999 % 9, 999)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_child_can_use_it_whatever_another_thread_did_at_the_fork(self):
        code = """
import os, threading, posttroll
held, leave = threading.Event(), threading.Event()
def hold():
    with posttroll.config._lock:
        held.set()
        leave.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    posttroll.config.set(mc_ttl=3)
    os._exit(posttroll.config.get("mc_ttl"))
leave.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        with python(code, stderr=subprocess.DEVNULL) as running:  # newer Pythons warn of forks with threads
            assert finish(running)[:2] == (0, "3\n")

    def test_settings_made_in_many_threads_all_stand(self):
        def work(number):
            for key in range(50):
                config.set({f"own{number}": key})

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [config[f"own{number}"] for number in range(8)] == [49] * 8


class TestConfigFiles:
    """JSON always, TOML from Python 3.11 on, YAML if PyYAML is there; with a file that cannot be used, nothing goes."""

    def test_json_in_both_directories(self, tmp_path):
        write(tmp_path / "etc", "a.json", '{"own-a": 1, "own_b": 1}')
        write(tmp_path / "config", "a.json", '{"own_b": 2}')
        config.refresh()
        assert (config["own_a"], config["own_b"]) == (1, 2)

    def test_the_last_file_of_a_directory_wins(self, tmp_path):
        write(tmp_path / "config", "20.json", '{"own": "later"}')
        write(tmp_path / "config", "10.json", '{"own": "earlier"}')
        config.refresh()
        assert config["own"] == "later"

    def test_the_variable_may_name_a_file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("POSTTROLL_CONFIG", str(write(tmp_path, "mine.json", '{"own": 1}')))
        config.refresh()
        assert config["own"] == 1

    def test_files_of_the_home_directory_and_of_the_installation(self, tmp_path, monkeypatch):
        home = tmp_path / "home"
        write(home / ".config" / "posttroll", "a.json", '{"own": "home"}')
        monkeypatch.setenv("HOME", str(home))
        write(tmp_path / "prefix" / "etc" / "posttroll", "a.json", '{"own": "prefix", "other": 1}')
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
        config.refresh()
        assert (config["own"], config["other"]) == ("home", 1)

    def test_the_system_directory(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_ROOT_CONFIG")
        assert config.paths[0] == os.path.join("/etc", "posttroll")

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no tomllib")
    def test_toml(self, tmp_path):
        write(tmp_path / "config", "a.toml", 'mc_ttl = 3\n[chain]\nstep-name = "x"\n')
        config.refresh()
        assert config["mc_ttl"] == 3
        assert config["chain.step_name"] == "x"

    @pytest.mark.skipif(sys.version_info >= (3, 11), reason="there is tomllib")
    def test_toml_without_a_reader(self, tmp_path):
        path = write(tmp_path / "config", "a.toml", "mc_ttl = 3\n")
        config.refresh()
        with pytest.raises(ConfigurationError, match=rf"{path} cannot be used: TOML needs Python 3.11"):
            config.get("mc_ttl")

    def test_yaml_if_there_is_a_reader(self, tmp_path, monkeypatch):
        try:
            import yaml  # noqa: F401
        except ImportError:
            write(tmp_path / "lib", "yaml.py", "import json\nsafe_load = json.loads\n")
            monkeypatch.syspath_prepend(str(tmp_path / "lib"))
        write(tmp_path / "config", "a.yaml", '{"mc_ttl": 3}')
        write(tmp_path / "config", "b.yml", '{"own": [1, 2]}')
        config.refresh()
        try:
            assert config["mc_ttl"] == 3
            assert config["own"] == [1, 2]
        finally:
            sys.modules.pop("yaml", None)

    def test_hidden_files_are_what_editors_leave_behind(self, tmp_path):
        write(tmp_path / "config", "a.json", '{"own": 1}')
        write(tmp_path / "config", "._a.json", "").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        (tmp_path / "config" / ".#a.json").symlink_to("somebody@host.4711:1767225600")
        config.refresh()
        assert config["own"] == 1

    def test_a_link_to_what_is_gone_is_an_error(self, tmp_path):
        link = tmp_path / "config" / "a.json"
        write(tmp_path / "config", "b.json", "{}")
        link.symlink_to("gone.json")
        config.refresh()
        with pytest.raises(ConfigurationError, match=rf"{link} cannot be used: .*No such file"):
            config.get("own")

    @pytest.mark.parametrize("ending", ["json", "toml", "yaml"])
    def test_byte_order_marks(self, tmp_path, ending):
        """As the editors of Windows write them."""
        pytest.importorskip({"json": "json", "toml": "tomllib", "yaml": "yaml"}[ending])
        path = write(tmp_path / "config", f"a.{ending}", "")
        path.write_bytes(b"\xef\xbb\xbf" + {"json": b'{"own": 1}', "toml": b"own = 1", "yaml": b"own: 1"}[ending])
        config.refresh()
        assert config["own"] == 1

    def test_yaml_without_a_reader(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        path = write(tmp_path / "config", "a.yaml", "backend: secure_zmq\n")
        config.refresh()
        with pytest.raises(ConfigurationError, match=rf"{path} cannot be used: YAML needs PyYAML"):
            config.get("backend")

    @pytest.mark.parametrize(
        "content",
        [b"{", b"[1, 2]", b"3", b"\xff\xfe", b"[" * 100_000, b'"text"'],
        ids=lambda content: repr(content[:9]),
    )
    def test_with_a_broken_file_every_use_of_a_key_is_an_error_until_it_is_mended(self, tmp_path, content):
        write(tmp_path / "config", "a.json", '{"own": 1}')
        broken = write(tmp_path / "config", "b.json", "")
        broken.write_bytes(content)
        config.refresh()
        config.set(of_code=1)
        uses: list[Callable[[], Any]] = [
            lambda: config.get("own"),
            lambda: config.get("of_code"),
            lambda: config.get("nonesuch", 5),
            lambda: config["nameserver_port"],  # the environment has it
            lambda: "own" in config,
            config.to_dict,
            config.pprint,
            lambda: config.lookup("own", check=False),
        ]
        for use in uses * 2:
            with pytest.raises(ConfigurationError, match=rf"{broken} cannot be used: ."):
                use()
        broken.write_text('{"other": 2}')
        with pytest.raises(ConfigurationError):
            config.get("own")
        config.refresh()
        assert (config["own"], config["other"]) == (1, 2)

    def test_a_file_that_breaks_later_is_noticed_when_the_files_are_read_again(self, tmp_path):
        path = write(tmp_path / "config", "a.json", '{"own": 1}')
        config.refresh()
        assert config["own"] == 1
        path.write_text("{")
        assert config["own"] == 1
        config.refresh()
        with pytest.raises(ConfigurationError):
            config["own"]
        config.clear()  # nothing of files is asked for any more
        assert config.get("own", None) is None

    def test_a_variable_that_names_nothing(self, tmp_path, monkeypatch):
        missing = tmp_path / "mine.json"
        monkeypatch.setenv("POSTTROLL_CONFIG", str(missing))
        config.refresh()
        with pytest.raises(ConfigurationError, match=rf"\$POSTTROLL_CONFIG names {missing}, but there is no such file"):
            config.get("backend")
        monkeypatch.setenv("POSTTROLL_CONFIG", "")  # as good as not set
        config.refresh()
        assert config.get("backend") == "unsecure_zmq"

    def test_a_link_to_nothing_is_an_error(self, tmp_path):
        (tmp_path / "config" / "a.json").symlink_to(tmp_path / "gone.json")
        config.refresh()
        with pytest.raises(ConfigurationError, match=r"config/a\.json cannot be used: .*No such file"):
            config.get("backend")

    def test_an_empty_file_of_nothing_is_fine(self, tmp_path):
        write(tmp_path / "config", "a.json", "null")
        config.refresh()
        assert config["mc_ttl"] == 31

    def test_other_files_are_left_alone(self, tmp_path):
        write(tmp_path / "config", "notes.txt", "{")
        write(tmp_path / "config", "old.json.bak", "{")
        config.refresh()
        assert config["mc_ttl"] == 31

    def test_a_broken_file_does_not_stop_the_import(self, tmp_path):
        """A program that needs no key runs; one that does has the error there."""
        broken = write(tmp_path / "config", "b.json", "{")
        code = "import posttroll; print(1); posttroll.Publisher('tcp://127.0.0.1:0')"
        with python(code) as running:
            status, out, err = finish(running)
        assert (status, out) == (1, "1\n")
        assert f"ConfigurationError: The configuration in {broken} cannot be used: " in err.splitlines()[-1]

    @pytest.mark.parametrize(
        "command",
        [
            ["posttroll.py", "publish", "/a", "info", "x", "--wait", "0"],
            ["posttroll.py", "subscribe", "--timeout", "1"],
            ["posttroll.py", "services"],
            ["posttroll.py", "config"],
            ["posttroll.py", "config", "--set", "mc_ttl=3"],
            ["posttroll.py", "top", "-n", "1"],
            ["posttroll.py", "logger"],
            ["posttroll.py", "nameserver"],
            ["posttroll_ns.py", "--no-multicast"],
            ["posttroll_ns.py", "-d", "start"],
            ["posttroll_ns.py", "-d", "restart", "--pid-file", "{tmp}/pid"],
        ],
        ids=" ".join,
    )
    def test_commands_refuse_to_start(self, tmp_path, command):
        """In a world with everything else in order: other files, keys in the environment."""
        write(tmp_path / "config", "a.json", '{"mc_ttl": 3}')
        broken = write(tmp_path / "config", "b.json", '{"backend": "secure_zmq",}')
        write(tmp_path / "config", "c.json", '{"pub_min_port": 50000}')
        script, *args = [word.format(tmp=tmp_path) for word in command]
        main = {"posttroll.py": posttroll.main, "posttroll_ns.py": posttroll_ns.main}[script]
        status, out, err = run_here(*args, main=main)
        assert (status, out, len(err.splitlines())) == (1, "", 1), err
        assert f"The configuration in {broken} cannot be used: " in err

    def test_a_daemon_with_a_broken_file_is_not_restarted_but_can_be_stopped(self, tmp_path):
        def daemon(action: str) -> tuple[int, str, str]:
            words = ["-d", action, "--no-multicast", "--pid-file", tmp_path / "pid", "-l", tmp_path / "log"]
            with process(sys.executable, NAMESERVER, *words) as running:
                return finish(running)

        assert daemon("start")[0] == 0
        try:
            pid = (tmp_path / "pid").read_text().splitlines()[0]
            write(tmp_path / "config", "a.json", "{")
            status, _, err = daemon("restart")
            assert status == 1
            assert "a.json cannot be used" in err
            assert daemon("status") == (0, f"nameserver: running (process {pid})\n", "")
        finally:
            assert daemon("stop")[0] == 0
        assert not (tmp_path / "pid").exists()

    @pytest.mark.parametrize("module", [posttroll, posttroll_ns], ids=lambda module: module.__name__)
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("nameserver_prot=5600", "there is no key 'nameserver_prot'"),
            ("backend.x=secure_zmq", "there is no key 'backend.x'"),
            ("backend", "'backend' is not KEY=VALUE"),
            ("=1", "'=1' is not KEY=VALUE"),
        ],
    )
    def test_an_unknown_key_for_a_command_is_refused(self, module, text, said):
        words = ["--set", text] if module is posttroll_ns else ["config", "--set", text]
        status, out, err = run_here(*words, main=module.main)
        assert (status, out) == (2, "")
        assert said in err

    def test_a_wrong_value_in_a_file_names_the_file(self, tmp_path):
        path = write(tmp_path / "config", "a.json", '{"mc_ttl": "far"}')
        config.refresh()
        with pytest.raises(ConfigurationError) as raised:
            config.get("mc_ttl")
        assert str(raised.value) == (
            f"posttroll configuration: mc_ttl is 'far' (from {path}), but must be a whole number."
        )


class TestConfigOldNamesAndWrongValues:
    """Old variables still work; a value of the wrong type is an error that says which, what and where from."""

    @pytest.mark.parametrize(
        ("old", "key", "text", "value"),
        [
            ("NAMESERVER_PORT", "nameserver_port", "6000", 6000),
            ("PYTROLL_MC_GROUP", "mc_group", "239.1.2.3", "239.1.2.3"),
            ("PYTROLL_MC_TTL", "mc_ttl", "2", 2),
        ],
    )
    def test_old_names(self, monkeypatch, old, key, text, value):
        new = "POSTTROLL_" + key.upper()
        monkeypatch.delenv(new, raising=False)
        monkeypatch.setenv(old, text)
        for _ in range(2):
            with pytest.warns(PendingDeprecationWarning, match=rf"\${old} is deprecated, use \${new}"):
                assert config.get(key) == value
        monkeypatch.setenv(new, text[:-1] + "1")
        assert str(config.get(key)) == text[:-1] + "1"  # the new name wins, and there is no warning

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("nameserver_port", "x", "a whole number"),
            ("nameserver_port", 1.5, "a whole number"),
            ("nameserver_port", 70000, "a whole number from 1 to 65535"),
            ("broadcast_port", 0, "a whole number from 1 to 65535"),
            ("address_publish_port", None, "a whole number"),
            ("pub_min_port", [], "a whole number"),
            ("pub_max_port", float("inf"), "a whole number"),
            ("tcp_keepalive", "yes", "a whole number"),
            ("tcp_keepalive", 2, "a whole number from -1 to 1"),
            ("tcp_keepalive_cnt", 128, "a whole number from -1 to 127"),
            ("tcp_keepalive_idle", 32768, "a whole number from -1 to 32767"),
            ("send_high_water_mark", -1, "a whole number from 0 to 2147483647"),
            ("history_messages", -1, "a whole number from 0 to 2147483647"),
            ("history_bytes", -1, "a whole number from 0 to 9223372036854775807"),
            ("mc_ttl", {}, "a whole number"),
            ("mc_group", 4, "a text"),
            ("mc_group", None, "a text"),
            ("multicast_interface", 1, "a text"),
            ("message_version", "v7", "one of v1.2, v1.01, auto"),
            ("message_version", [], "one of v1.2, v1.01, auto"),
            ("zmtp_heartbeat_interval", -1, "a number from 0 to 1000000"),
            ("zmtp_heartbeat_interval", float("nan"), "a number"),
            ("zmtp_heartbeat_timeout", "soon", "a number"),
            ("authorized_client_addresses", 3, "a list of strings"),
            ("authorized_client_addresses", [1], "a list of strings"),
            ("server_secret_key_file", 3, "a text"),
        ],
    )
    def test_a_wrong_value_names_key_value_and_source(self, key, value, expected):
        config.set({key: value})
        with pytest.raises(ConfigurationError) as raised:
            config.get(key)
        assert str(raised.value) == f"posttroll configuration: {key} is {value!r} (from code), but must be {expected}."

    def test_a_wrong_value_in_the_environment_names_the_variable(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_NAMESERVER_PORT", "abc")
        with pytest.raises(ConfigurationError, match=r"nameserver_port is 'abc' \(from \$POSTTROLL_NAMESERVER_PORT\)"):
            config.get("nameserver_port")

    def test_a_wrong_value_under_an_old_name_names_that(self, monkeypatch):
        monkeypatch.setenv("PYTROLL_MC_TTL", "abc")
        message = r"mc_ttl is 'abc' \(from \$PYTROLL_MC_TTL\)"
        with pytest.warns(PendingDeprecationWarning), pytest.raises(ConfigurationError, match=message):
            config.get("mc_ttl")

    def test_an_unknown_backend_is_not_implemented(self):
        with config.set(backend="carrier_pigeon"), pytest.raises(NotImplementedError, match="carrier_pigeon"):
            config.get("backend")

    @pytest.mark.parametrize(
        "make",
        [
            lambda: posttroll.Publisher("tcp://127.0.0.1:0"),
            lambda: posttroll.Subscriber([]),
            lambda: posttroll.Subscriber(["tcp://127.0.0.1:9"]),
            posttroll_ns.NameServer,
        ],
    )
    def test_an_unknown_backend_is_an_error_of_the_constructors(self, make):
        with config.set(backend="carrier_pigeon"), pytest.raises(NotImplementedError, match="carrier_pigeon"):
            make()

    @pytest.mark.parametrize(
        "command", [["posttroll.py", "subscribe"], ["posttroll_ns.py"], ["posttroll_ns.py", "-d", "start"]]
    )
    def test_an_unknown_backend_ends_a_command_with_one_line(self, command):
        script, *args = command
        with process(sys.executable, HERE / script, *args, "--set", "backend=carrier_pigeon") as running:
            status, out, err = finish(running)
        assert (status, out, len(err.splitlines())) == (1, "", 1), err
        assert "carrier_pigeon" in err

    def test_a_wrong_value_shows_in_to_dict_all_the_same(self):
        with config.set(mc_ttl="far"):
            assert config.to_dict()["mc_ttl"] == "far"
            assert "mc_ttl" in config

    @pytest.mark.parametrize("value", ["a, 10.0.0.0/8", ["a", "10.0.0.0/8"], ("a", "10.0.0.0/8"), "a 10.0.0.0/8"])
    def test_lists_are_lists_or_text(self, value):
        config.set(authorized_client_addresses=value)
        assert config.get("authorized_client_addresses") == ["a", "10.0.0.0/8"]

    def test_numbers_may_be_given_as_text_and_paths_as_paths(self, tmp_path):
        config.set(mc_ttl="3", zmtp_heartbeat_interval="1.5", server_secret_key_file=tmp_path)
        assert config.get("mc_ttl") == 3
        assert config.get("zmtp_heartbeat_interval") == 1.5
        assert config.get("server_secret_key_file") == str(tmp_path)


# ======================================================================================================================
# 2. Messages
# ======================================================================================================================

UTC = dt.timezone.utc
NOON = dt.datetime(2010, 12, 1, 12, 21, 11, 123456, tzinfo=UTC)
ODD_OFFSET = dt.timedelta(hours=1, minutes=30, seconds=15, microseconds=1)
HEADER = "pytroll://DC/juhu info henry@prodsat 2010-12-01T12:21:11.123456"


def message_of(data: Any = "", **kwargs: Any) -> Message:
    """Return a message with a fixed time and sender."""
    message = Message("/DC/juhu", "info", data, **kwargs)
    message.sender = "henry@prodsat"
    message.time = NOON
    return message


def same(one: Any, other: Any) -> bool:
    """Whether two data are equal, of the same types, with the same time zones."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dt.datetime):
        return one.isoformat() == other.isoformat()
    return bool(one == other)


class TestWireFormat:
    """The exact text of a message; other implementations read it."""

    @pytest.mark.parametrize(
        ("data", "binary", "tail"),
        [
            ("", False, ""),
            ("jhuuuu !!!", False, " text/ascii jhuuuu !!!"),
            ("æøå", False, " text/ascii æøå"),
            ("two\nlines\t ", False, " text/ascii two\nlines\t "),
            (" leading blank", False, ' application/json " leading blank"'),
            (" ", False, ' application/json " "'),
            ("\ud800", False, ' application/json "\\ud800"'),
            ({}, False, " application/json {}"),
            ([], False, " application/json []"),
            (0, False, " application/json 0"),
            (False, False, " application/json false"),
            (None, False, " application/json null"),
            (1.5, False, " application/json 1.5"),
            ((1, "b"), False, ' application/json [1, "b"]'),
            ({"a": 1, "b": "ø"}, False, ' application/json {"a": 1, "b": "\\u00f8"}'),
            (NOON, False, ' application/json "2010-12-01T12:21:11.123456+00:00"'),
            ([NOON], False, ' application/json ["2010-12-01T12:21:11.123456+00:00"]'),
            ("some text", True, " binary/octet-stream some text"),
            (b"\x00\x01\xff", True, " binary/octet-stream data:application/octet-stream;base64,AAH/"),
            (b"\x00\x01\xff", False, " binary/octet-stream data:application/octet-stream;base64,AAH/"),
            (b"", True, " binary/octet-stream data:application/octet-stream;base64,"),
            ("", True, " binary/octet-stream data:text/plain;charset=utf-8;base64,"),
            (" x", True, " binary/octet-stream data:text/plain;charset=utf-8;base64,IHg="),
        ],
    )
    def test_exact_text(self, data, binary, tail):
        message = message_of(data, binary=binary)
        assert message.encode() == f"{HEADER}+00:00 v1.2{tail}"
        assert message.head == f"{HEADER}+00:00 v1.2"
        assert str(message) == repr(message) == message.encode()

    @pytest.mark.parametrize("binary", [False, True])
    def test_text_of_other_classes_is_sent_as_its_text(self, binary):
        """Also that of an enum, which newer Pythons format as its name."""

        class Platform(str, enum.Enum):
            METOP = "Metop-C"

        class Odd(str):
            __slots__ = ()

            def __str__(self) -> str:
                return "odd"

            def __format__(self, spec: str) -> str:
                return "odd"

        for text in (Platform.METOP, Odd("Metop-C")):
            mime = "binary/octet-stream" if binary else "text/ascii"
            message = message_of(text, binary=binary)
            assert message.encode() == f"{HEADER}+00:00 v1.2 {mime} Metop-C"
            nested = message_of({"a": text, text: [text]}).encode()
            assert nested == HEADER + '+00:00 v1.2 application/json {"a": "Metop-C", "Metop-C": ["Metop-C"]}'
            message.subject = message.type = message.sender = text
            assert message.head == f"pytroll:/Metop-C Metop-C Metop-C {NOON.isoformat()} v1.2"

    def test_the_documented_message(self):
        raw = 'pytroll://DC/juhu info henry@prodsat 2010-12-01T12:21:11.123456 v1.01 application/json "jhuuuu !!!"'
        message = Message.decode(raw)
        assert message.subject == "/DC/juhu"
        assert message.type == "info"
        assert message.sender == "henry@prodsat"
        assert message.user == "henry"
        assert message.host == "prodsat"
        assert message.time == dt.datetime(2010, 12, 1, 12, 21, 11, 123456)
        assert message.version == "v1.01"
        assert message.data == "jhuuuu !!!"
        assert message.binary is False
        assert message.encode() == raw

    def test_time_zones_are_kept_by_v1_2_and_dropped_by_v1_01(self):
        data = {"at": dt.datetime(2020, 1, 1, 3, tzinfo=dt.timezone(dt.timedelta(hours=2)))}
        new = message_of(data, version="v1.2").encode()
        assert new == HEADER + '+00:00 v1.2 application/json {"at": "2020-01-01T03:00:00+02:00"}'
        old = message_of(data, version="v1.01").encode()
        assert old == HEADER + ' v1.01 application/json {"at": "2020-01-01T03:00:00"}'

    @pytest.mark.parametrize("count", range(1, 5))
    def test_runs_of_blanks_between_the_fields_are_tolerated(self, count):
        raw = (" " * count).join(["pytroll://a", "b", "c@d", "2020-01-01T00:00:00", "v1.01", "text/ascii"]) + " x"
        message = Message.decode(raw)
        assert (message.type, message.data) == ("b", "x")
        assert message.encode() == raw

    def test_from_string_and_rawstr(self):
        raw = message_of([1]).encode()
        for decode in (Message.decode, Message.from_string, lambda text: Message(rawstr=text)):
            message = decode(raw)
            assert (message.subject, message.data) == ("/DC/juhu", [1])
            assert isinstance(message, Message)

    def test_bytes_are_utf_8_or_else_latin_1(self):
        raw = message_of("smørrebrød").encode()
        assert Message.decode(raw.encode()).data == "smørrebrød"
        assert Message.decode(raw.encode("latin-1")).data == "smørrebrød"
        assert Message.decode(bytearray(raw.encode())).data == "smørrebrød"

    def test_a_text_file_of_messages(self, tmp_path):
        path = tmp_path / "messages.txt"
        path.write_text("".join(f"{message_of({'n': number})}\n" for number in range(3)))
        with path.open() as lines:
            assert [Message(rawstr=line).data for line in lines] == [{"n": number} for number in range(3)]

    def test_sender_is_user_and_host_of_this_process(self):
        message = Message("/a", "b")
        assert message.host == socket.gethostname()
        assert message.sender == f"{message.user}@{message.host}"

    def test_a_sender_without_host(self):
        message = Message.decode("pytroll://a b nobody 2020-01-01T00:00:00 v1.01")
        assert (message.sender, message.user, message.host) == ("nobody", "", "")

    def test_time_is_now_in_utc(self):
        before = dt.datetime.now(UTC)
        moment = Message("/a", "b").time
        assert before <= moment <= dt.datetime.now(UTC)
        assert moment.utcoffset() == dt.timedelta(0)

    def test_magick(self):
        assert posttroll.message._MAGICK == "pytroll:/"


class TestVersions:
    """The version is chosen when the message is encoded, by the message or by the configuration."""

    def test_the_default_is_v1_2(self):
        assert Message("/a", "b").version == "v1.2"
        assert " v1.2" in Message("/a", "b").head

    def test_the_configuration_at_encoding_time_decides(self, monkeypatch):
        message = message_of(NOON)
        with config.set(message_version="v1.01"):
            assert message.encode() == HEADER + ' v1.01 application/json "2010-12-01T12:21:11.123456"'
        assert message.encode() == HEADER + '+00:00 v1.2 application/json "2010-12-01T12:21:11.123456+00:00"'
        monkeypatch.setenv("POSTTROLL_MESSAGE_VERSION", "v1.01")
        assert " v1.01 " in message.encode()

    def test_the_constructor_s_choice_wins(self):
        with config.set(message_version="v1.01"):
            assert " v1.2" in message_of(version="v1.2").encode()
        assert " v1.01" in message_of(version="v1.01").encode()

    def test_an_assigned_version_counts(self):
        message = message_of(NOON)
        message.version = "v1.01"
        assert message.encode() == HEADER + ' v1.01 application/json "2010-12-01T12:21:11.123456"'

    @pytest.mark.parametrize(
        ("data", "version"),
        [
            ("", "v1.01"),
            ("text", "v1.01"),
            (" text", "v1.01"),
            ({"a": [1, None]}, "v1.01"),
            (b"abc", "v1.01"),
            (NOON, "v1.2"),
            ({"a": [{"b": NOON}]}, "v1.2"),
        ],
    )
    def test_auto_is_the_lowest_that_loses_nothing(self, data, version):
        for message in (message_of(data, version="auto"), message_of(data)):
            with config.set(message_version="auto"):
                raw = message.encode()
            assert raw.split()[4] == version
            assert same(Message.decode(raw).data, data)

    @pytest.mark.parametrize("version", ["v1.3", "v2.0", "v1.20001", "1.01", "vx", "v", "", "v1", "v-1.0", "v1.0.1"])
    def test_other_versions_are_refused(self, version):
        with pytest.raises(MessageError, match="version"):
            Message("/a", "b", version=version)
        if version:
            with pytest.raises(MessageError, match="version"):
                Message.decode(f"pytroll://a b c@d 2020-01-01T00:00:00 {version} text/ascii x")

    @pytest.mark.parametrize("version", [None, 1.01, [], b"v1.01"])
    def test_versions_that_are_no_text_are_refused(self, version):
        with pytest.raises(MessageError, match="version"):
            Message("/a", "b", version=version)

    def test_an_older_version_is_read(self):
        message = Message.decode("pytroll://a b c@d 2020-01-01T00:00:00 v1.0 text/ascii x")
        assert (message.version, message.data) == ("v1.0", "x")
        assert message.encode() == "pytroll://a b c@d 2020-01-01T00:00:00 v1.0 text/ascii x"

    @pytest.mark.parametrize("version", ["v1.01", "v1.2"])
    def test_a_decoded_message_keeps_its_version(self, version):
        raw = message_of({"at": NOON}, version=version).encode()
        for setting in ("v1.01", "v1.2", "auto"):
            with config.set(message_version=setting):
                message = Message.decode(raw)
                assert message.version == version
                assert message.encode() == raw

    def test_a_wrong_setting_is_an_error_that_says_so(self):
        message = message_of()
        with config.set(message_version="v3"), pytest.raises(ConfigurationError, match="message_version is 'v3'"):
            message.encode()


class TestHeaderFields:
    """Header fields are not empty and free of white space: a blank in one would forge the others."""

    BROKEN = ("", " ", "a b", "a\nb", " a", "a ", "\t", "a\u00a0b", "a\u2028b", "a\x1cb", None, 5, b"/a", ["/a"], {})

    @pytest.mark.parametrize("field", BROKEN, ids=repr)
    def test_refused_at_construction(self, field):
        Message("/good", "good")
        with pytest.raises(MessageError, match="subject"):
            Message(field, "good")
        with pytest.raises(MessageError, match="type"):
            Message("/good", field)

    @pytest.mark.parametrize("field", BROKEN, ids=repr)
    @pytest.mark.parametrize("name", ["subject", "type", "sender"])
    def test_refused_at_encoding(self, field, name):
        message = message_of([1])
        message.encode()
        setattr(message, name, field)
        with pytest.raises(MessageError, match=name):
            message.encode()

    def test_a_message_without_arguments_is_refused(self):
        with pytest.raises(MessageError, match="subject"):
            Message()

    def test_the_checks(self):
        checks = [
            posttroll.message.is_valid_subject,
            posttroll.message.is_valid_type,
            posttroll.message.is_valid_sender,
        ]
        for check in checks:
            assert check("/a") is True
            assert [field for field in self.BROKEN if check(field)] == []

    def test_a_stranger_s_sender_is_made_one_field(self):
        code = "import pwd; pwd.getpwuid = lambda uid: pwd.struct_passwd(('John Q. Public', '', uid, 0, '', '', ''))\n"
        code += "import posttroll; print(posttroll.Message('/a', 'b').user)"
        with python(code) as running:
            assert finish(running)[1] == "John_Q._Public\n"

    def test_the_sender_is_the_account_of_the_process(self, monkeypatch):
        """After `sudo` or in a service, the variables name somebody else."""
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.setenv(name, "somebody_else")
        with python("import posttroll; print(posttroll.Message('/a', 'b').user)") as running:
            assert finish(running)[1] == f"{pwd.getpwuid(os.getuid()).pw_name}\n"

    def test_a_user_id_without_a_name(self):
        unnamed = next(uid for uid in range(54321, 60000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})
        code = f"import os; os.getuid = lambda: {unnamed}\nimport posttroll; print(posttroll.Message('/a', 'b').user)"
        with python(code) as running:
            assert finish(running)[1] == f"{unnamed}\n"


class TestBrokenMessages:
    """What is no message raises MessageError and nothing else."""

    def test_the_text_that_it_was_decoded_from(self):
        text = "pytroll://a info a@b 2026-01-01T00:00:00 v1.01 text/ascii \u4eac"
        for raw in (text, text.encode()):
            message = posttroll.Message.decode(raw)
            message.sender, message.data = "c@d", "x"
            assert message.raw == text
        assert posttroll.Message("/a", "info").raw is None

    @pytest.mark.parametrize(
        "raw",
        [
            "",
            " ",
            "x",
            "pytroll:/",
            "pytroll://a",
            "pytroll://a b c@d",
            "pytroll://a b c@d 2020-01-01T00:00:00",
            "pytroll:/ a b c@d 2020-01-01T00:00:00 v1.01",
            " pytroll://a b c@d 2020-01-01T00:00:00 v1.01",
            "Pytroll://a b c@d 2020-01-01T00:00:00 v1.01",
            "mytroll://a b c@d 2020-01-01T00:00:00 v1.01 text/ascii x",
            "pytroll://a b c@d yesterday v1.01 text/ascii x",
            "pytroll://a b c@d 2020-13-01T00:00:00 v1.01 text/ascii x",
            "pytroll://a b c@d 2020-02-30T00:00:00 v1.01 text/ascii x",
            "pytroll://a b c@d 2020-01-01T25:00:00 v1.01 text/ascii x",
            "pytroll://a b c@d 2020-01-01T00:00:00+99:00 v1.01 text/ascii x",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 text/ascii",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json ",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json {",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json {} x",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json {}\u00a0",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json " + "[" * 100_000,
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json " + '{"a":' * 100_000,
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json " + "[" * 900 + "]" * 900,
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 application/json " + "9" * 100_000,
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 image/png x",
            "pytroll://a b c@d 2020-01-01T00:00:00 v1.01 x",
            b"",
            b"\xff\xfe",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            None,
            5,
            [],
            object(),
        ],
        ids=lambda raw: repr(raw).partition(" at 0x")[0][:70],
    )
    def test_refused(self, raw):
        with pytest.raises(MessageError):
            Message.decode(raw)

    def test_json_with_blanks_around_it_is_read(self):
        assert Message.decode(HEADER + " v1.01 application/json \t\r\n {} \t\r\n ").data == {}

    def test_the_error_does_not_repeat_a_long_message(self):
        with pytest.raises(MessageError) as raised:
            Message.decode("x" * 1_000_000)
        assert len(str(raised.value)) < 200

    def test_what_python_s_limit_takes_can_be_printed_and_pickled_everywhere(self):
        """Nothing that decodes fails later, deeper in the stack of the program that got it."""
        raw = HEADER + " v1.01 application/json " + "[" * 200 + "]" * 200

        def deeper(levels):
            if levels:
                return deeper(levels - 1)
            message = Message.decode(raw)
            return str(message), pickle.loads(pickle.dumps(message)).encode()

        assert deeper(100) == (raw, raw)

    def test_broken_base64_is_what_it_is(self):
        """Not a message of ours, but one that somebody may have sent."""
        text = "data:application/octet-stream;base64,?"
        message = Message.decode(f"{HEADER} v1.01 binary/octet-stream {text}")
        assert message.data == text
        assert message.binary is True


class TestDataThatCannotBeEncoded:
    @pytest.mark.parametrize(
        "data",
        [object(), {1, 2}, {"a": object()}, [1j], {(1, 2): 3}, {"a": b"bytes"}, dt.timedelta(1), Message],
        ids=lambda data: repr(data).partition(" at 0x")[0][:40],
    )
    def test_refused_by_constructor_and_encode(self, data):
        with pytest.raises(MessageError, match="data"):
            Message("/a", "b", data)
        assert posttroll.message.is_valid_data(data) is False
        message = message_of({"good": 1})
        message.data = data
        with pytest.raises(MessageError, match="data"):
            message.encode()

    @pytest.mark.parametrize("levels", [201, 900, 100_000])
    @pytest.mark.parametrize("wrap", [lambda data: [data], lambda data: {"a": data}, lambda data: (data,)])
    def test_nested_too_deep(self, levels, wrap):
        data = []
        for _ in range(levels - 1):
            data = wrap(data)
        with pytest.raises(MessageError, match="nested"):
            Message("/a", "b", data)

    def test_nested_too_deep_when_assigned(self):
        message = message_of()
        message.data = []
        for _ in range(100_000):
            message.data = [message.data]
        with pytest.raises(MessageError, match="nested"):
            message.encode()

    def test_data_that_hold_themselves(self):
        data = {}
        data["self"] = [data]
        with pytest.raises(MessageError, match="nested"):
            Message("/a", "b", data)

    def test_brackets_in_text_do_not_count(self):
        data = ["[" * 1000, {"{" * 1000: "]"}]
        assert Message.decode(message_of(data).encode()).data == data

    def test_wide_data_are_not_deep(self):
        data = [[{"a": []}] for _ in range(10_000)]
        assert Message.decode(message_of(data).encode()).data == data

    def test_is_valid_data(self):
        is_valid = posttroll.message.is_valid_data
        good = ["", "ø", 0, None, {}, [NOON], {"a": {"b": (1, NOON)}}]
        assert [data for data in good if not is_valid(data)] == []
        assert is_valid({"a": NOON}, version="v1.01") is True


class TestChangedAfterConstruction:
    """What is encoded is the message as it is now."""

    def test_data_changed_in_place(self):
        message = message_of({"a": [1]})
        message.encode()
        message.data["a"].append(2)
        assert message.encode().endswith('{"a": [1, 2]}')

    def test_data_assigned(self):
        message = message_of({"a": 1})
        message.data = "text"
        assert message.encode().endswith(" text/ascii text")
        message.data = b"\x00"
        assert Message.decode(message.encode()).data == b"\x00"

    def test_decoded_message_changed_in_place(self):
        raw = message_of({"a": [1]}).encode()
        message = Message.decode(raw)
        message.data["a"].append(NOON)
        assert message.encode() == raw.replace("[1]", '[1, "2010-12-01T12:21:11.123456+00:00"]')
        message.data["a"].pop()
        assert message.encode() == raw

    @pytest.mark.parametrize(
        ("name", "value"),
        [("subject", "/other"), ("type", "other"), ("sender", "x@y"), ("time", NOON.replace(year=2011))],
    )
    def test_decoded_header_changed(self, name, value):
        message = Message.decode(message_of([1]).encode())
        setattr(message, name, value)
        assert getattr(Message.decode(message.encode()), name) == value
        assert Message.decode(message.encode()).data == [1]

    def test_odd_spelling_of_a_decoded_message_is_kept(self):
        raw = 'pytroll://a   b c@d 2020-01-01T00:00:00Z v1.2 application/json {"a":1,"b":"2020-01-01"}'
        assert Message.decode(raw).encode() == raw


class TestIsoForms:
    """ISO 8601 date-times in JSON come back as datetimes, on every Python alike."""

    @pytest.mark.parametrize(
        ("text", "moment"),
        [
            ("2010-12-01T12:21:11.123456+00:00", NOON),
            ("2010-12-01T12:21:11.123456Z", NOON),
            ("2010-12-01T12:21:11.123456", NOON.replace(tzinfo=None)),
            ("2010-12-01T12:21:11", dt.datetime(2010, 12, 1, 12, 21, 11)),
            ("2010-12-01T12:21:11Z", dt.datetime(2010, 12, 1, 12, 21, 11, tzinfo=UTC)),
            ("2010-12-01T12:21:11.5", dt.datetime(2010, 12, 1, 12, 21, 11, 500000)),
            ("2010-12-01T12:21:11,5", dt.datetime(2010, 12, 1, 12, 21, 11, 500000)),
            ("2010-12-01T12:21:11.123456789Z", NOON),
            ("2010-12-01T12:21", dt.datetime(2010, 12, 1, 12, 21)),
            ("2010-12-01T12:21+01", dt.datetime(2010, 12, 1, 12, 21, tzinfo=dt.timezone(dt.timedelta(hours=1)))),
            ("2010-12-01T12:21-01:30:15.000001", dt.datetime(2010, 12, 1, 12, 21, tzinfo=dt.timezone(-ODD_OFFSET))),
            ("2010-12-01T12:21-01:30", dt.datetime(2010, 12, 1, 12, 21, tzinfo=dt.timezone(-dt.timedelta(hours=1.5)))),
            ("2010-12-01 12:21:11", dt.datetime(2010, 12, 1, 12, 21, 11)),
            ("2010-12-01 12:21:11.123456Z", NOON),
            ("20101201T122111", dt.datetime(2010, 12, 1, 12, 21, 11)),
            ("20101201 122111", dt.datetime(2010, 12, 1, 12, 21, 11)),
            ("20101201T1221", dt.datetime(2010, 12, 1, 12, 21)),
            ("20101201T122111.123456789Z", NOON),
            ("20101201T122111,5", dt.datetime(2010, 12, 1, 12, 21, 11, 500000)),
            ("20101201T122111+0130", dt.datetime(2010, 12, 1, 12, 21, 11, tzinfo=dt.timezone(dt.timedelta(hours=1.5)))),
            ("2010-12-01T12:21:11.123456+0000", NOON),  # as strftime writes it
            ("20101201T122111.123456+00:00", NOON),
            ("20101201T122111-01", dt.datetime(2010, 12, 1, 12, 21, 11, tzinfo=dt.timezone(-dt.timedelta(hours=1)))),
            ("2010-12-01", dt.datetime(2010, 12, 1)),
            ("0001-01-01T00:00:00", dt.datetime(1, 1, 1)),
            ("9999-12-31T23:59:59.999999", dt.datetime.max),
        ],
    )
    def test_datetimes(self, text, moment):
        for data, expected in [(text, moment), ([text], [moment]), ({"a": [{"b": text}]}, {"a": [{"b": moment}]})]:
            message = Message.decode(f"{HEADER} v1.2 application/json {json.dumps(data)}")
            assert same(message.data, expected)

    @pytest.mark.parametrize(
        "text",
        [
            "20101201",
            "20101201122111",
            "20101201 ",
            "20101201T",
            "20101201T12",
            "20101201T12211",
            "20101201T12:21:11",
            "20101201T122111+01:",
            "20101301T122111",
            "20101201T242111",
            "20101201T122111.",
            "20101201  122111",
            "1201T1221",
            "12345678 items",
            "2010-W48-3",
            "2010-335",
            "2010-12",
            "2010-12-1",
            "2010-12-01 122111",
            "2010-12-01  12:21:11",
            "2010-1201T12:21:11",
            "2010-12-01T",
            "2010-12-01T12",
            "2010-12-01t12:21:11",
            "2010-12-01T12:21:11 ",
            " 2010-12-01",
            "2010-12-01T24:00:00",
            "2010-12-01T12:60:00",
            "2010-12-01T12:21:60",
            "2010-02-30",
            "2010-12-01T12:21:11+24:00",
            "2010-12-01T12:21:11.",
            "2010-12-01T12:21:11Zulu",
            "2010-12-01\n",
            "0000-01-01",
            "12010-12-01",
            "\uff12\uff10\uff11\uff10-12-01",
            "segment-2010-12-01",
        ],
    )
    def test_text_stays_text(self, text):
        message = Message.decode(f"{HEADER} v1.2 application/json {json.dumps([text, {'a': text}])}")
        assert message.data == [text, {"a": text}]
        assert Message.decode(f"{HEADER} v1.2 application/json {json.dumps(text)}").data == text

    def test_all_forms_among_others(self):
        """The first form in the text alone must not decide what is looked for."""
        data = {
            "basic": ["20240419T111411", "x"],
            "deep": {"blank": "2024-04-19 11:14:11", "number": "20240419", "day": "2024-04-19"},
            "text": "segment 20240419T111411",
        }
        moment = dt.datetime(2024, 4, 19, 11, 14, 11)
        assert Message.decode(f"{HEADER} v1.2 application/json {json.dumps(data)}").data == {
            "basic": [moment, "x"],
            "deep": {"blank": moment, "number": "20240419", "day": dt.datetime(2024, 4, 19)},
            "text": "segment 20240419T111411",
        }

    @pytest.mark.parametrize("version", ["v1.2", "v1.01", "auto"])
    def test_dates_and_times_of_day_are_sent_in_iso_form(self, version):
        zone = dt.timezone(dt.timedelta(hours=2))
        data = {"day": dt.date(2024, 4, 19), "times": [dt.time(11, 14), dt.time(11, 14, 11, 5, tzinfo=zone)]}
        text = message_of(data, version=version).encode()
        offset = "" if version == "v1.01" else "+02:00"  # auto: the lowest version that loses nothing
        assert text.split(" ")[4] == ("v1.2" if version == "auto" else version)
        assert text.endswith(f'{{"day": "2024-04-19", "times": ["11:14:00", "11:14:11.000005{offset}"]}}')
        assert Message.decode(text).data == {
            "day": dt.datetime(2024, 4, 19),
            "times": ["11:14:00", f"11:14:11.000005{offset}"],
        }
        assert posttroll.message.is_valid_data(data)

    def test_dates_and_times_without_zone_lose_nothing_in_the_lowest_version(self):
        text = message_of([dt.date(2024, 4, 19), dt.time(11, 14)], version="auto").encode()
        assert text.endswith(' v1.01 application/json ["2024-04-19", "11:14:00"]')

    def test_keys_stay_text(self):
        raw = f'{HEADER} v1.2 application/json {{"2010-12-01": 1}}'
        assert Message.decode(raw).data == {"2010-12-01": 1}

    def test_text_messages_stay_text(self):
        assert Message.decode(f"{HEADER} v1.2 text/ascii 2010-12-01").data == "2010-12-01"

    def test_the_documented_functions(self):
        functions = posttroll.message
        aware = NOON
        assert functions.create_datetime_encoder_for_version()(aware) == "2010-12-01T12:21:11.123456+00:00"
        assert functions.create_datetime_encoder_for_version("v1.01")(aware) == "2010-12-01T12:21:11.123456"
        encode = functions.create_datetime_json_encoder_for_version
        assert json.dumps([aware], default=encode()) == '["2010-12-01T12:21:11.123456+00:00"]'
        assert json.dumps([aware], default=encode(version="v1.01")) == '["2010-12-01T12:21:11.123456"]'
        assert functions.datetime_encoder(aware, lambda moment: moment.isoformat()) == aware.isoformat()
        for encoder in (encode(), lambda obj: functions.datetime_encoder(obj, lambda moment: moment.isoformat())):
            with pytest.raises(TypeError):
                encoder(object())
        with pytest.raises(MessageError):
            encode("v9")
        text = aware.isoformat()
        assert functions.datetime_decoder({"a": text, "b": ["x", text]}) == {"a": aware, "b": ["x", aware]}
        assert functions.datetime_decoder([text, 1]) == [aware, 1]
        assert json.loads(f'{{"a": {{"b": "{text}"}}}}', object_hook=functions.datetime_decoder) == {"a": {"b": aware}}


class TestPickling:
    def test_what_did_not_come_in_utf_8(self):
        """It is sent on as it came; its pickle is as plain as any other, for other implementations."""
        raw = "pytroll://a info user@host 2026-11-24T12:00:00 v1.01 text/ascii Zürich".encode("iso-8859-1")
        message = Message.decode(raw)
        assert message.encode().encode() == raw
        assert message.data.encode() == "Zürich".encode()
        assert type(message.__getstate__()) is str
        assert pickle.loads(pickle.dumps(message)).data == "Zürich"
        message.data = "Genève"
        assert message.encode().encode().endswith("Genève".encode())

    """Pickles name the documented path, so that each implementation loads the other's."""

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_round_trip(self, protocol):
        message = message_of({"at": NOON, "list": [1, "two"]})
        again = pickle.loads(pickle.dumps(message, protocol))
        assert isinstance(again, Message)
        assert again.encode() == message.encode()
        assert again.data == message.data

    def test_the_path_in_the_pickle(self):
        names = [value for _, value, _ in pickletools.genops(pickle.dumps(message_of(), 2)) if isinstance(value, str)]
        assert "posttroll.message Message" in names
        assert Message.__module__ == MessageError.__module__ == "posttroll.message"

    def test_a_pickle_of_the_known_package(self):
        raw = b'pytroll://a b root@vm 2026-11-23T19:55:48.252992 v1.01 application/json {"x": 1}'
        old = b"\x80\x02cposttroll.message\nMessage\nq\x00)\x81q\x01X" + bytes([len(raw), 0, 0, 0]) + raw + b"q\x02b."
        message = pickle.loads(old)
        assert message.data == {"x": 1}
        assert message.encode() == raw.decode()

    def test_a_fresh_process_loads_it(self, tmp_path):
        path = tmp_path / "message.pickle"
        path.write_bytes(pickle.dumps(message_of({"at": NOON})))
        with python("import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).data['at'])", path) as running:
            assert finish(running)[:2] == (0, f"{NOON}\n")

    def test_copies(self):
        message = message_of({"a": [1]})
        for again in (copy.copy(message), copy.deepcopy(message)):
            again.data["a"].append(2)
            assert message.data == {"a": [1]}
            assert again.encode().endswith('{"a": [1, 2]}')

    def test_errors_travel_too(self):
        error = pickle.loads(pickle.dumps(MessageError("no message")))
        assert isinstance(error, posttroll.message.MessageError)
        assert str(error) == "no message"


# -- properties, for any input --

zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.integers(-86399, 86399).map(lambda seconds: dt.timezone(dt.timedelta(seconds=seconds))),
)
moments = st.builds(lambda moment, zone: moment.replace(tzinfo=zone), st.datetimes(), zones)
# Two halves of a surrogate pair side by side are one character to JSON.
any_text = st.text(st.characters()).map(
    lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
)
not_a_date = any_text.filter(lambda text: text[4:5] != "-" or text[7:8] != "-")
floats = st.floats(allow_nan=False)
json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | not_a_date | moments,
    lambda children: st.lists(children, max_size=5) | st.dictionaries(any_text, children, max_size=5),
    max_leaves=25,
)
blanks = st.sampled_from([" ", "  ", "\n", "\t", "\u00a0", "\x1c", ""])
stamps = st.sampled_from(
    ["2020-01-01T00:00:00", "2020-01-01", "2020-99-01T00:00:00", "2020-01-01T00:00:00+99:99", "now"]
)
tails = st.sampled_from(["{", "[]", '"', '{"a": "2020-01-01"}', "1e999", "NaN", "9" * 5000, "data:;base64,x", "-", ""])
nearly_messages = st.builds(
    lambda fields, separators: "".join(chain_of(fields, separators)),
    st.tuples(
        st.sampled_from(["pytroll://a", "pytroll:/", "pytroll:/\x00", "x"]),
        st.sampled_from(["info", "", "\ud800"]) | any_text,
        st.sampled_from(["a@b", "@", ""]) | any_text,
        stamps | any_text,
        st.sampled_from(["v1.01", "v1.2", "v0.0", "v9", "v1.2e5", "v1.٢"]) | any_text,
        st.sampled_from(["text/ascii", "application/json", "binary/octet-stream", "x/y", ""]) | any_text,
        tails | any_text,
    ),
    st.lists(blanks, min_size=7, max_size=7),
)


def chain_of(fields: Any, separators: Any) -> Iterator[str]:
    for field, separator in zip(fields, separators):
        yield field
        yield separator


many = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
even_more = settings(many, max_examples=int(50_000 * min(1, LONG / 600)), derandomize=False)


def check_decoding(raw: Any) -> None:
    try:
        message = Message.decode(raw)
    except MessageError:
        return
    text = raw if isinstance(raw, str) else posttroll.message._as_text(raw)
    assert message.encode() == text
    assert str(message) == text
    assert Message.decode(text).data == message.data or message.data != message.data


def check_round_trip(data: Any, **kwargs: Any) -> None:
    message = message_of(data, **kwargs)
    raw = message.encode()
    for sent in (raw, raw.encode("utf-8")):
        again = Message.decode(sent)
        assert same(again.data, data)
        assert (again.subject, again.type, again.sender, again.time) == ("/DC/juhu", "info", "henry@prodsat", NOON)
        assert again.encode() == raw
    with config.set(message_version="auto"):
        assert same(Message.decode(message.encode()).data, data)


class TestProperties:
    """Decoding gives a message or raises MessageError; what is encoded comes back the same."""

    @many
    @given(st.text() | any_text | nearly_messages)
    def test_decoding_any_text(self, raw):
        check_decoding(raw)

    @many
    @given(st.binary() | nearly_messages.map(lambda text: text.encode("utf-8", "surrogatepass")))
    def test_decoding_any_bytes(self, raw):
        check_decoding(raw)

    @many
    @given(json_data, st.data())
    def test_decoding_broken_copies_of_good_messages(self, data, draw):
        raw = message_of(data).encode()
        start = draw.draw(st.integers(0, len(raw)))
        end = draw.draw(st.integers(start, len(raw)))
        check_decoding(raw[:start] + draw.draw(any_text) + raw[end:])

    @many
    @given(json_data)
    def test_json(self, data):
        check_round_trip(data)

    @many
    @given(json_data, st.sampled_from([json.encoder.c_make_encoder, None, lambda markers: None]))
    def test_json_is_as_the_standard_library_writes_it(self, data, c_make_encoder):
        with mock.patch.object(json.encoder, "c_make_encoder", c_make_encoder):  # not every Python has one, or this one
            encode = posttroll._json_encoder(dt.date.isoformat)
        assert encode(data) == json.dumps(data, default=dt.date.isoformat)

    @many
    @given(st.datetimes() | st.datetimes(timezones=st.sampled_from([UTC, dt.timezone(dt.timedelta(0, 5))])))
    @example(dt.datetime.min.replace(microsecond=1, tzinfo=UTC))
    @example(dt.datetime.max.replace(tzinfo=UTC))
    @example(NOON.replace(microsecond=0))
    def test_time_is_as_the_standard_library_writes_it(self, moment):
        message = posttroll.Message("/a", "info", "", version="v1.2")
        message.time = moment
        assert message.encode().split()[3] == moment.isoformat()
        message.version = "v1.01"
        assert message.encode().split()[3] == moment.replace(tzinfo=None).isoformat()

    @many
    @given(st.lists(json_data, max_size=3))
    def test_json_lists(self, data):
        check_round_trip(data)

    @many
    @given(any_text)
    def test_text(self, data):
        check_round_trip(data)
        check_round_trip(data, binary=True)

    @many
    @given(blanks, blanks, any_text, blanks)
    def test_blanks_around_text(self, first, second, text, last):
        check_round_trip(first + second + text + last)
        check_round_trip(first + second + text + last, binary=True)

    @many
    @given(st.binary())
    def test_binary(self, data):
        check_round_trip(data, binary=True)
        check_round_trip(data)

    @many
    @given(json_data)
    def test_v1_01_drops_only_time_zones(self, data):
        def naive(value):
            if isinstance(value, dict):
                return {key: naive(item) for key, item in value.items()}
            if isinstance(value, list):
                return [naive(item) for item in value]
            return value.replace(tzinfo=None) if isinstance(value, dt.datetime) else value

        message = Message.decode(message_of(data, version="v1.01").encode())
        assert same(message.data, naive(data))
        assert message.time == NOON.replace(tzinfo=None)

    @many
    @given(json_data)
    def test_pickles(self, data):
        assert same(pickle.loads(pickle.dumps(message_of(data))).data, data)

    @many
    @given(any_text, any_text)
    def test_any_header_field_is_carried_or_refused(self, subject, atype):
        try:
            message = Message(subject, atype, "data")
        except MessageError:
            assert not (posttroll.message.is_valid_subject(subject) and posttroll.message.is_valid_type(atype))
        else:
            again = Message.decode(message.encode())
            assert (again.subject, again.type, again.data) == (subject, atype, "data")

    @pytest.mark.parametrize(
        "data", ["", " ", "  x", "\n", {}, [], 0, False, None, [[]], [None], {"": ""}, 0.0, -0.0, b""]
    )
    def test_empty_looking_data(self, data):
        check_round_trip(data)

    def test_a_megabyte_of_random_bytes(self):
        data = random.Random(1).randbytes(1_000_000) if hasattr(random, "randbytes") else os.urandom(1_000_000)
        check_round_trip(data, binary=True)

    def test_every_byte_and_many_characters(self):
        check_round_trip(bytes(range(256)) * 2, binary=True)
        check_round_trip("".join(map(chr, range(0x3000))))
        check_round_trip(["".join(map(chr, range(0xD000, 0xDC00))), "".join(map(chr, range(0xDC00, 0xE010)))])

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @even_more
    @given(st.text() | any_text | nearly_messages | st.binary())
    def test_decoding_anything_longer(self, raw):
        check_decoding(raw)

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @even_more
    @given(json_data | any_text | st.binary())
    def test_round_trip_longer(self, data):
        check_round_trip(data)


# ======================================================================================================================
# 3. The loop
# ======================================================================================================================


class TestTimers:
    def test_what_is_due_is_called_in_order(self):
        """By time; of those with the same, the first that was set."""
        called: list[str] = []
        with contextlib.closing(posttroll.Loop()) as loop:
            for name, when in [
                ("b", 2),
                ("d", 3),
                ("a", 1),
                ("never", float("inf")),
                ("c", 2),
                ("e", 3),
                ("cancelled", 2),
            ]:
                timer = loop.at(when, partial(called.append, name))
            timer.cancel()
            loop.turn(0)
        assert called == ["a", "b", "c", "d", "e"]

    def test_who_runs_the_loop_sees_what_a_timer_has_done_before_it_waits(self):
        called: list[str] = []
        with contextlib.closing(posttroll.Loop()) as loop:
            loop.at(0, partial(called.append, "due"))
            try:
                with in_thread(loop.turn):
                    wait_for(lambda: called)
            finally:
                loop.wake()


class TestQuietSockets:
    """What is watched by its descriptor, which tells only once that something has come."""

    @pytest.fixture
    def pair(self):
        """Give a loop, a socket whose messages it collects, and its other end, which has sent 200 before."""
        context = posttroll.get_context()
        with contextlib.closing(posttroll.Loop()) as loop, contextlib.closing(context.socket(zmq.PAIR)) as sender:
            sender.linger = 0
            sender.bind("inproc://quiet")
            sock = context.socket(zmq.PAIR)
            sock.connect("inproc://quiet")
            came: list[bytes] = []

            def take() -> None:
                with contextlib.suppress(zmq.Again):
                    while True:
                        came.append(sock.recv(zmq.NOBLOCK))

            for _ in range(200):
                sender.send(b"before")
            loop.watch_quiet(sock, take)
            yield loop, sock, sender, came
            sock.close()

    def test_all_that_comes(self, pair):
        loop, _, sender, came = pair
        wait_for(lambda: loop.turn(time.monotonic() + 0.01) or len(came) == 200)
        for count in range(201, 220):
            sender.send(b"after")
            wait_for(lambda: loop.turn(time.monotonic() + 0.01) or len(came) == count)  # noqa: B023

    def test_one_that_is_watched_no_longer(self, pair):
        loop, sock, sender, came = pair
        loop.unwatch(sock)
        loop.unwatch(sock)
        del came[:]
        sender.send(b"after")
        for _ in range(3):
            loop.turn(time.monotonic() + 0.01)
        assert came == []

    def test_it_is_closed_with_the_loop(self, pair):
        loop, sock, *_ = pair
        loop.close()
        assert sock.closed


# ======================================================================================================================
# 4. Multicast sockets
# ======================================================================================================================


@contextlib.contextmanager
def multicast(port: int, group: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Give a sender and a receiver of a multicast group; both are closed at the end."""
    receiver = posttroll.MulticastReceiver(port, group)
    try:
        receiver.settimeout(DEADLINE)
        sender = posttroll.MulticastSender(port, group)
        try:
            yield sender, receiver
        finally:
            sender.close()
    finally:
        receiver.close()


class TestMulticastSockets:
    @pytest.mark.parametrize("data", ["a text", b"some bytes", "übergroß"])
    def test_what_is_sent_to_a_group_is_received(self, data):
        with multicast(free_port()) as (sender, receiver):
            sender(data)
            text, (host, port) = receiver()
        assert text == (data if isinstance(data, str) else data.decode())
        assert (host, port > 0) == ("127.0.0.1", True)

    def test_a_long_datagram_is_received_whole(self):
        with multicast(free_port()) as (sender, receiver):
            sender("x" * 60000)
            assert receiver()[0] == "x" * 60000

    def test_the_documented_buffer_size(self):
        assert posttroll.MulticastReceiver.BUFSIZE == 1024

    def test_bytes_that_are_no_text_do_not_stop_the_receiver(self):
        with multicast(free_port()) as (sender, receiver):
            sender(b"\xff\xfe")
            sender(b"good")
            assert [receiver()[0], receiver()[0]] == ["\ufffd\ufffd", "good"]

    def test_several_receivers_on_a_host_share_a_port(self):
        port = free_port()
        with multicast(port) as (sender, first), multicast(port) as (_, second):
            sender("to both")
            assert first()[0] == second()[0] == "to both"

    def test_a_receiver_gets_nothing_from_other_groups(self):
        port = free_port()
        with multicast(port, "239.1.2.3") as (sender, receiver), multicast(port, "239.1.2.4") as (other, _):
            other("not for us")
            sender("for us")
            assert receiver()[0] == "for us"

    def test_the_broadcast_group(self):
        """The group 0.0.0.0 stands for broadcast."""
        sender, group = posttroll.mcast_sender("0.0.0.0")
        receiver, receiver_group = posttroll.mcast_receiver(free_port(), "0.0.0.0")
        with sender, receiver:
            assert group == receiver_group == "<broadcast>"
            assert sender.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
            receiver.settimeout(DEADLINE)
            sender.sendto(b"to everybody here", ("127.255.255.255", receiver.getsockname()[1]))
            assert receiver.recv(1024) == b"to everybody here"

    def test_the_functions_give_a_socket_and_a_group(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_MC_GROUP", "239.9.8.7")
        port = free_port()
        sender, group = posttroll.mcast_sender()
        receiver, receiver_group = posttroll.mcast_receiver(port)
        with sender, receiver:
            assert group == receiver_group == "239.9.8.7"
            assert receiver.getsockname()[1] == port
            receiver.settimeout(DEADLINE)
            sender.sendto(b"hello", (group, port))
            assert receiver.recv(1024) == b"hello"

    def test_the_group_as_an_argument(self):
        sender, group = posttroll.mcast_sender("239.4.4.4")
        sender.close()
        assert group == "239.4.4.4"

    @pytest.mark.parametrize(
        "group", ["127.0.0.1", "223.255.255.255", "240.0.0.1", "no.such.host.invalid", "1.2.3.4.5", ""]
    )
    def test_an_invalid_group_is_an_error_that_names_it(self, group):
        for opening in (posttroll.mcast_sender, lambda group: posttroll.mcast_receiver(free_port(), group)):
            with pytest.raises(OSError, match=rf"Invalid multicast address '{group}' .mc_group."):
                opening(group)

    @pytest.mark.parametrize("group", ["127.0.0.1", "240.0.0.1"])
    def test_the_error_says_what_programs_look_for(self, group):
        with pytest.raises(OSError, match="Invalid argument") as raised:
            posttroll.bbmcast.MulticastReceiver(free_port(), group)
        assert raised.value.errno == errno.EINVAL

    def test_an_invalid_group_in_the_configuration_is_an_error_of_the_call(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_MC_GROUP", "10.0.0.1")
        with pytest.raises(OSError, match=r"'10\.0\.0\.1'"), posttroll.Publish("a_service"):
            pytest.fail("It was not noticed.")
        with pytest.raises(OSError, match=r"'10\.0\.0\.1'"):
            posttroll_ns.NameServer().run()

    def test_a_timeout(self):
        receiver = posttroll.MulticastReceiver(free_port())
        receiver.settimeout(0.01)
        with pytest.raises(posttroll.SocketTimeout):
            receiver()
        receiver.close()
        assert posttroll.SocketTimeout is socket.timeout

    def test_close_twice(self):
        with multicast(free_port()) as (sender, receiver):
            for _ in range(2):
                sender.close()
                receiver.close()
            with pytest.raises(OSError, match=r"closed|descriptor"):
                receiver()

    def test_a_taken_port_leaves_no_socket(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("", 0))
            with pytest.raises(OSError, match="in use"):
                posttroll.MulticastReceiver(taken.getsockname()[1])

    @pytest.mark.parametrize("ttl", ["0", "7", "255", "1000"])
    def test_how_many_routers_it_may_pass(self, monkeypatch, ttl):
        monkeypatch.setenv("POSTTROLL_MC_TTL", ttl)
        sender, _ = posttroll.mcast_sender()
        with sender:
            assert sender.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == min(int(ttl), 255)


class TestMulticastInterface:
    @pytest.mark.parametrize("interface", ["127.0.0.1", "lo"])
    def test_by_address_or_by_name(self, monkeypatch, interface):
        if interface == "lo" and sys.platform != "linux":
            pytest.skip("names of interfaces are for Linux")
        monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", interface)
        sender, _ = posttroll.mcast_sender()
        with sender:
            chosen = sender.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, 4)
        assert socket.inet_ntoa(chosen) == "127.0.0.1"
        with multicast(free_port()) as (sender, receiver):
            sender("by loopback")
            assert receiver()[1][0] == "127.0.0.1"

    def test_nonsense_is_an_error_that_names_it(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", "no_such_device")
        for opening in (posttroll.mcast_sender, lambda: posttroll.mcast_receiver(free_port())):
            with pytest.raises(OSError, match="multicast_interface 'no_such_device'"):
                opening()

    def test_a_publisher_waits_for_its_interface(self, monkeypatch, caplog):
        """A device that is not there (yet) is a warning; when it is there, the publisher is found."""
        with nameserver(multicast_enabled=True):
            monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", "no_such_device")
            with posttroll.Publish("a_service", broadcast_interval=0.02):
                wait_for(lambda: "Cannot announce by multicast" in caplog.text)
                assert posttroll.get_pub_address("a_service") == []
                monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", "127.0.0.1")
                wait_for(lambda: posttroll.get_pub_address("a_service"))

    def test_a_nameserver_waits_for_its_interface(self, monkeypatch, caplog):
        monkeypatch.setattr(posttroll_ns._MulticastSource, "RETRY", 0.02)
        monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", "no_such_device")
        with nameserver(multicast_enabled=True):
            assert "Cannot receive multicast" in caplog.text
            monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", "127.0.0.1")
            with posttroll.Publish("a_service", broadcast_interval=0.02):
                wait_for(lambda: posttroll.get_pub_address("a_service"))


class TestOwnAddress:
    def test_it_is_an_address_of_this_host(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
        with socket.socket() as sock:
            sock.bind((posttroll.get_own_ip(), 0))  # fails for an address that is not our own

    @pytest.mark.parametrize("interface", ["127.0.0.1", "no_such_device"])
    def test_it_does_not_depend_on_multicast(self, monkeypatch, interface):
        monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
        own = posttroll.get_own_ip()
        monkeypatch.setenv("POSTTROLL_MULTICAST_INTERFACE", interface)
        assert posttroll.get_own_ip() == own

    def test_all_addresses_of_this_host(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
        addresses = posttroll.address_receiver.get_local_ips()
        assert {"127.0.0.1", posttroll.get_own_ip()} <= set(addresses)
        assert len(set(addresses)) == len(addresses)
        for address in addresses:
            with socket.socket() as sock:
                sock.bind((address, 0))  # fails for an address that is not our own

    @pytest.mark.network
    def test_all_addresses_of_a_host_with_many_and_no_route_to_elsewhere(self, two_hosts):
        host, _ = two_hosts
        more = ["10.77.1.9", "10.77.1.10", "10.77.5.1"]  # the first two in one network: secondary addresses
        for address in more:
            host.ip("addr", "add", f"{address}/24", "dev", host.device)
        code = "import posttroll; print(*posttroll.get_local_ips()); print(posttroll.get_own_ip())"
        with host.run("-c", code) as running:
            status, out, err = finish(running)
        assert (status, err) == (0, "")
        addresses, own = out.splitlines()
        assert sorted(addresses.split()) == sorted(["127.0.0.1", *more])
        assert own in more


# ======================================================================================================================
# 5. ZeroMQ sockets
# ======================================================================================================================


class TestContexts:
    def test_it_is_the_same_until_it_is_destroyed(self):
        first = posttroll.get_context()
        assert posttroll.get_context() is first
        posttroll.destroy_context(0)
        assert first.closed
        assert posttroll.get_context() is not first
        assert not posttroll.get_context().closed

    def test_destroying_closes_the_sockets(self):
        sock = posttroll.set_up_client_socket(zmq.SUB, "tcp://127.0.0.1:1")
        posttroll.destroy_context(0)
        assert sock.closed

    def test_destroying_twice(self):
        posttroll.get_context()
        posttroll.destroy_context()
        posttroll.destroy_context()

    def test_one_that_was_terminated_elsewhere_is_replaced(self):
        posttroll.get_context().term()
        assert not posttroll.get_context().closed

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_gets_its_own(self):
        """After use in the parent, publisher and subscriber of the child work, and so do those of the parent."""
        code = """
import os, posttroll
def check():
    with posttroll.Publisher("tcp://*:0") as pub:
        with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
            assert pub.wait_for_subscribers(1, 20)
            pub.send(posttroll.Message("/a", "info", os.getpid()))
            assert next(sub.recv(20)).data == os.getpid()
context = posttroll.get_context()
check()
with posttroll.Publisher("tcp://*:0") as outer:
    child = os.fork()
    if not child:
        assert posttroll.get_context() is not context
        check()
        try:
            outer.send("pytroll://a b c@d 2020-01-01T00:00:00 v1.01")
        except RuntimeError as error:
            assert "fork" in str(error)
            outer.stop()
            os._exit(7)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert posttroll.get_context() is context
    check()
print("parent", status >> 8)
"""
        with python(code) as running:
            assert finish(running, 60)[:2] == (0, "parent 7\n")  # newer Pythons warn of forks on stderr

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is open")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    @pytest.mark.parametrize("address", ["tcp://*:0", "tcp://localhost:0", "tcp://[::1]:0", "ipc://{}/socket"])
    def test_a_forked_child_keeps_no_connections_and_ports(self, address, tmp_path):
        """But those of others, with the same port at another address, too."""
        with contextlib.ExitStack() as all_ends, contextlib.ExitStack() as stack:
            pub = all_ends.enter_context(posttroll.Publisher(address.format(tmp_path)))
            port = pub.port_number
            host = {"*": "127.0.0.1", "localhost": "127.0.0.1", "[::1]": "[::1]"}.get(address[6:-2])
            sub = all_ends.enter_context(posttroll.Subscriber([f"tcp://{host}:{port}" if host else pub.address]))
            assert pub.wait_for_subscribers(1, DEADLINE)
            # It may just have been another test's: so not without SO_REUSEADDR.
            other_port = port if address == "tcp://localhost:0" else 0
            others = all_ends.enter_context(socket.create_server(("127.0.0.2", other_port)))
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                os.close(writing)
                os.read(reading, 1)  # until the parent is done
                others.accept()
                os._exit(7)
            stack.callback(os.close, reading)
            stack.callback(os.kill, child, signal.SIGKILL)
            sub.close()
            wait_for(lambda: pub.subscriber_count == 0)
            pub.stop()
            with posttroll.Publisher(pub.address.replace(":0", f":{port}")):
                pass
            stack.pop_all()
            with socket.create_connection(others.getsockname()):
                os.close(writing)
                assert os.waitpid(child, 0)[1] >> 8 == 7
            os.close(reading)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_child_may_be_forked_while_a_publisher_announces_itself(self):
        code = """
import os, posttroll
with posttroll.Publish("a_service", nameservers=["localhost"], broadcast_interval=0.01) as pub:
    child = os.fork()
    if not child:
        pub.stop()
        with posttroll.Publish("b_service", nameservers=["localhost"], broadcast_interval=0.01):
            while not posttroll.get_pub_address("b_service", timeout=20): pass
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    while not posttroll.get_pub_address("a_service", timeout=20): pass
print("done")
"""
        with nameserver(), python(code) as running:
            assert finish(running, 60)[:2] == (0, "done\n")


class TestSocketOptions:
    def test_no_keep_alive_by_default(self):
        assert posttroll.get_tcp_keepalive_options() == {}

    def test_keep_alive_through_the_environment(self, monkeypatch):
        for name, value in {"": "1", "_CNT": "10", "_IDLE": "3", "_INVTL": "", "_INTVL": "4"}.items():
            monkeypatch.setenv("POSTTROLL_TCP_KEEPALIVE" + name, value)
        expected = {
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_CNT: 10,
            zmq.TCP_KEEPALIVE_IDLE: 3,
            zmq.TCP_KEEPALIVE_INTVL: 4,
        }
        assert posttroll.get_tcp_keepalive_options() == expected
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            for sock in (pub._audience.socket, *sub.subscribers):
                assert {option: sock.getsockopt(option) for option in expected} == expected

    def test_keep_alive_from_code(self):
        with config.set(tcp_keepalive=0):
            assert posttroll.get_tcp_keepalive_options() == {zmq.TCP_KEEPALIVE: 0}

    def test_a_wrong_keep_alive_is_an_error_that_names_it(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_TCP_KEEPALIVE_CNT", "often")
        with pytest.raises(posttroll.ConfigurationError, match=r"tcp_keepalive_cnt.*often"):
            posttroll.Subscriber(["tcp://127.0.0.1:1"])

    def test_peers_that_are_gone_are_noticed_by_default(self):
        """By ZMTP heartbeats, or by TCP keepalive where the queue of received messages is limited."""
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            assert pub._audience.socket.getsockopt(zmq.TCP_KEEPALIVE_IDLE) == 10
            [sock] = sub.subscribers
            assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
            assert (sock.getsockopt(zmq.TCP_KEEPALIVE_IDLE), sock.getsockopt(zmq.TCP_KEEPALIVE_INTVL)) == (10, 10)
        with config.set(receive_high_water_mark=0), posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            [sock] = sub.subscribers
            assert sock.getsockopt(zmq.HEARTBEAT_IVL) == 10000
            assert sock.getsockopt(zmq.HEARTBEAT_TIMEOUT) == 30000

    def test_the_times_are_configurable(self):
        with config.set(zmtp_heartbeat_interval=0.5, zmtp_heartbeat_timeout=2, receive_high_water_mark=0):
            with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
                assert pub._audience.socket.getsockopt(zmq.TCP_KEEPALIVE_IDLE) == 1
                assert sub.subscribers[0].getsockopt(zmq.HEARTBEAT_TIMEOUT) == 2000
        with config.set(zmtp_heartbeat_interval=0), posttroll.Publisher("tcp://*:0") as pub:
            assert pub._audience.socket.getsockopt(zmq.HEARTBEAT_IVL) == 0

    @pytest.mark.parametrize(
        "settings",
        [
            {"zmtp_heartbeat_timeout": 3600},
            {"zmtp_heartbeat_interval": 1, "zmtp_heartbeat_timeout": 128},
            {"zmtp_heartbeat_interval": 1e6, "zmtp_heartbeat_timeout": 1e6},
            {"zmtp_heartbeat_interval": 0.05, "zmtp_heartbeat_timeout": 0},
            {"tcp_keepalive": 1, "tcp_keepalive_cnt": 127, "tcp_keepalive_idle": 32767, "tcp_keepalive_intvl": 32767},
            {"tcp_keepalive": 1, "tcp_keepalive_cnt": 0, "tcp_keepalive_idle": 0, "tcp_keepalive_intvl": 0},
        ],
    )
    def test_whatever_the_times_are_it_connects(self, settings):
        """The system refuses a socket with more than 127 probes or 32,767 seconds, and libzmq says nothing of it."""
        with config.set(settings), posttroll.Publisher("tcp://127.0.0.1:0") as pub:
            with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                if "tcp_keepalive" not in settings:
                    options = zmq.TCP_KEEPALIVE_CNT, zmq.TCP_KEEPALIVE_INTVL
                    probes, seconds = map(sub.subscribers[0].getsockopt, options)
                    timeout = settings["zmtp_heartbeat_timeout"]
                    assert timeout / 2 < probes * seconds <= max(timeout, 1)

    def test_a_connection_that_is_silent_is_given_up(self):
        """A host that has lost its power says nothing any more: the subscriber connects anew."""
        times = {"zmtp_heartbeat_interval": 0.05, "zmtp_heartbeat_timeout": 0.2}
        with socket.socket() as silent, config.set(receive_high_water_mark=0, **times):
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            silent.settimeout(DEADLINE)
            with posttroll.Subscriber([f"tcp://127.0.0.1:{silent.getsockname()[1]}"]):
                with silent.accept()[0] as first:
                    first.sendall(  # the greeting and READY of a publisher, and then silence
                        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL".ljust(64, b"\0")
                        + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB"
                    )
                    with silent.accept()[0]:
                        pass

    def test_where_memory_is_short_less_is_kept(self):
        """Queues of 200,000 messages are more than a small container has."""
        code = """
            import posttroll, resource, zmq
            resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
            assert posttroll._usable_memory() <= 2**28
            with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber([]) as sub:
                sub.add(f"tcp://127.0.0.1:{pub.port_number}")
                assert 1000 < sub.subscribers[0].rcvhwm <= 2**16
                assert pub._audience._queue_limit._bytes <= 2**25
        """
        with python(inspect.cleandoc(code)) as running:
            assert finish(running) == (0, "", "")

    def test_where_there_is_enough_it_is_what_it_always_was(self):
        with mock.patch("posttroll._usable_memory", return_value=2**34), posttroll.Subscriber(["tcp://h:1"]) as sub:
            sub.add("tcp://127.0.0.1:1")
            assert sub.subscribers[0].rcvhwm == 200000

    def test_high_water_marks(self):
        with config.set(send_high_water_mark=11, receive_high_water_mark=12), posttroll.Publisher("tcp://*:0") as pub:
            with posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
                assert pub._audience.socket.getsockopt(zmq.SNDHWM) == 11
                assert sub.subscribers[0].getsockopt(zmq.RCVHWM) == 12

    def test_options_of_the_call_win(self):
        sock = posttroll.set_up_client_socket(zmq.SUB, "tcp://127.0.0.1:1", {zmq.RCVHWM: 5, zmq.HEARTBEAT_IVL: 77})
        assert (sock.getsockopt(zmq.RCVHWM), sock.getsockopt(zmq.HEARTBEAT_IVL)) == (5, 77)
        posttroll.close_socket(sock)

    def test_an_option_that_does_not_exist_leaves_no_socket(self):
        with pytest.raises(zmq.ZMQError):
            posttroll.set_up_client_socket(zmq.SUB, "tcp://127.0.0.1:1", {zmq.HEARTBEAT_IVL: -5})

    @pytest.mark.parametrize("set_up", ["set_up_client_socket", "set_up_server_socket"])
    def test_an_unknown_backend(self, set_up):
        with pytest.raises(NotImplementedError, match="'carrier_pigeon'"):
            getattr(posttroll, set_up)(zmq.SUB, "tcp://127.0.0.1:9000", backend="carrier_pigeon")


class TestServerAndClientSockets:
    def test_inproc(self):
        server, port, authenticator = posttroll.set_up_server_socket(zmq.PUSH, "inproc://here")
        client = posttroll.set_up_client_socket(zmq.PULL, "inproc://here")
        server.send(b"hello")
        assert (port, authenticator, client.recv()) == (None, None, b"hello")
        posttroll.close_socket(client)
        posttroll.close_socket(server)

    def test_ipc(self, tmp_path):
        server, port, _ = posttroll.set_up_server_socket(zmq.PUSH, f"ipc://{tmp_path}/s")
        client = posttroll.set_up_client_socket(zmq.PULL, f"ipc://{tmp_path}/s")
        server.send(b"hello")
        assert (port, client.poll(DEADLINE * 1000), client.recv()) == (None, zmq.POLLIN, b"hello")
        posttroll.close_socket(client)
        posttroll.close_socket(server)

    @pytest.mark.parametrize(
        "address", ["", "nonsense", "tcp://", "tcp://*", "tcp://*:99999", "foo://bar:1", "tcp://*:1\n", None, 9000]
    )
    def test_a_publisher_refuses_a_bad_address(self, address):
        with pytest.raises(ValueError, match="an address looks like"):
            posttroll.Publisher(address)

    @pytest.mark.parametrize(
        "address",
        ["", "nonsense", "tcp://", "tcp://host", "tcp://*:9000", "tcp://h:0", "tcp://h:99999", "tcp://a b:1", None, 5],
    )
    def test_a_subscriber_refuses_a_bad_address(self, address):
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.Subscriber([address])
        with posttroll.Subscriber([]) as sub:
            with pytest.raises(ValueError, match="Cannot connect to"):
                sub.add(address)
            assert sub.addresses == []

    def test_a_port_in_use_is_named_and_nothing_is_left_behind(self):
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            address = f"tcp://*:{taken.getsockname()[1]}"
            with pytest.raises(zmq.ZMQError, match=re.escape(address)) as caught:
                posttroll.Publisher(address, name="name").start()
            assert caught.value.errno == zmq.EADDRINUSE
            with pytest.raises(zmq.ZMQError, match=re.escape(address)):
                posttroll.NoisyPublisher("name", taken.getsockname()[1], nameservers=["localhost"]).start()
            with pytest.raises(zmq.ZMQError, match=re.escape(address)):
                posttroll.set_up_server_socket(zmq.REP, address, local_only=True)

    def test_a_socket_receiver(self):
        server, port, _ = posttroll.set_up_server_socket(zmq.PUSH, "tcp://127.0.0.1:0")
        clients = [posttroll.set_up_client_socket(zmq.PULL, f"tcp://127.0.0.1:{port}") for _ in range(2)]
        receiver = posttroll.SocketReceiver()
        for client in clients:
            receiver.register(client)
        message = posttroll.Message("/a", "info", "text")
        server.send(message.encode().encode())
        [(received, sock)] = list(receiver.receive(*clients, timeout=DEADLINE))
        assert (received.subject, received.data) == ("/a", "text")
        assert sock in clients
        with pytest.raises(TimeoutError):
            list(receiver.receive(*clients, timeout=0.01))
        receiver.unregister(clients[0])
        for sock in (server, *clients):
            posttroll.close_socket(sock)

    @pytest.mark.skipif(os.name != "posix", reason="descriptors are of POSIX")
    @pytest.mark.parametrize(
        "make",
        [
            "posttroll.Publisher('tcp://127.0.0.1:0').start()",
            "posttroll.Subscriber([address])",
            "posttroll.NSSubscriber('a', addr_listener=True, addresses=[address], timeout=0).start()",
        ],
    )
    def test_descriptors_run_out_half_way(self, keys, make):
        """However few are left: an error, and all else that the process has goes on."""
        code = f"""
            import errno, os, resource, zmq, posttroll
            steady = posttroll.Publisher("tcp://127.0.0.1:0").start()
            address = f"tcp://127.0.0.1:{{steady.port_number}}"
            reader = posttroll.Subscriber([address])
            assert steady.wait_for_subscribers(1, {DEADLINE})
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            outcomes = []
            for left in range(12):
                taken = []
                try:
                    while True:
                        taken.append(os.dup(0))
                except OSError:
                    pass
                for _ in range(left):
                    os.close(taken.pop())
                try:
                    {make}.close()
                    outcomes.append("made")
                except (OSError, posttroll.ConfigurationError, zmq.ZMQError) as error:
                    # libzmq may tell of what it could not close either, as it was never opened.
                    assert "Too many open files" in str(error) or error.errno == errno.EBADF, error
                    outcomes.append("error")
                for descriptor in taken:
                    os.close(descriptor)
                steady.send(posttroll.Message("/a", "info", left))
                assert next(reader.recv({DEADLINE})).data == left
            reader.close()
            steady.stop()
            print(*outcomes)
        """
        with python(inspect.cleandoc(code)) as running:
            status, out, err = finish(running)
        assert status == 0, err
        assert (out.split()[0], out.split()[-1]) == ("error", "made")


class TestPortRanges:
    @staticmethod
    def free_range(size: int) -> int:
        """Return the first of some ports in a row that are free."""
        while True:
            ports = [free_port() for _ in range(size)]
            if ports == list(range(ports[0], ports[0] + size)):
                return ports[0]

    def test_the_default_range(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_PUB_MIN_PORT")
        monkeypatch.delenv("POSTTROLL_PUB_MAX_PORT")
        with posttroll.Publisher("tcp://*:0") as pub:
            assert 49152 <= pub.port_number < 65536

    def test_from_arguments(self):
        first = self.free_range(3)
        with posttroll.Publisher("tcp://*:0", min_port=first, max_port=first + 3) as pub:
            assert first <= pub.port_number < first + 3
        with posttroll.Publish("name", 0, nameservers=["localhost"], min_port=first, max_port=first + 3) as pub:
            assert first <= pub.port_number < first + 3

    def test_from_the_environment(self, monkeypatch):
        first = self.free_range(3)
        monkeypatch.setenv("POSTTROLL_PUB_MIN_PORT", str(first))
        monkeypatch.setenv("POSTTROLL_PUB_MAX_PORT", str(first + 3))
        with contextlib.ExitStack() as stack:
            ports = {stack.enter_context(posttroll.Publisher("tcp://*:0")).port_number for _ in range(3)}
        assert ports == {first, first + 1, first + 2}

    def test_an_exhausted_range_is_an_error_that_names_it(self):
        first = self.free_range(2)
        limits = {"min_port": first, "max_port": first + 2}
        with posttroll.Publisher("tcp://*:0", **limits), posttroll.Publisher("tcp://*:0", **limits):
            with pytest.raises(zmq.ZMQError, match=f"All ports from {first} to {first + 1} are in use"):
                posttroll.Publisher("tcp://*:0", **limits).start()

    @pytest.mark.parametrize(("low", "high"), [(5000, 5000), (6000, 5000), (0, 5), (65000, 70000)])
    def test_an_impossible_range(self, low, high):
        with pytest.raises(posttroll.ConfigurationError, match=f"from {low} up to .not including. {high}"):
            posttroll.Publisher("tcp://*:0", min_port=low, max_port=high).start()


class TestNumbersAndNames:
    """In brackets only an IPv6 address, and ZeroMQ is handed numbers only: it resolves names where it serves all."""

    @pytest.mark.parametrize(
        "host",
        [
            "[some.name]",
            "[localhost]",
            "[127.0.0.1]",
            "[]",
            "[1:2]",
            "[::g]",
            "[:::]",
            "[::1%]",
            "[::1",
            "::1",
            "[::1]]",
        ],
    )
    def test_what_is_no_address(self, host):
        address = f"tcp://{host}:9000"
        assert not posttroll.is_connectable(address)
        with posttroll.Subscriber([]) as sub, pytest.raises(ValueError, match="Cannot connect to"):
            sub.add(address)
        announcement = Message("/address/a", "info", {"URI": address, "service": ["a"]})
        with pytest.raises(posttroll_ns.AnnouncementError, match="no TCP address"):
            posttroll_ns.AddressBook(600).parse(announcement)

    @pytest.mark.parametrize(
        ("host", "handed_on"),
        [
            ("[::1]", "[::1]"),
            ("[2001:DB8:0::1]", "[2001:db8::1]"),
            ("[fe80::1%eth0]", "[fe80::1%eth0]"),
            ("[::ffff:10.0.0.1]", "10.0.0.1"),
            ("10.0.0.1", "10.0.0.1"),
        ],
    )
    def test_a_number_is_handed_on_as_zeromq_writes_it(self, host, handed_on):
        assert posttroll.is_connectable(f"tcp://{host}:9000")
        assert posttroll._Resolution(f"tcp://{host}:9000").endpoint == f"tcp://{handed_on}:9000"

    @pytest.mark.parametrize("host", ["999.1.1.1", "1.2.3.4.5", "1.2.3", "some.name", "1.2.3.256"])
    def test_what_is_no_number_has_to_be_resolved(self, host):
        assert posttroll.is_connectable(f"tcp://{host}:9000")
        assert posttroll._Resolution(f"tcp://{host}:9000").endpoint is None

    @pytest.mark.parametrize("host", ["localhost", "some.name", "*", "127.1", "[::1]"])
    def test_only_numbers_are_own_addresses(self, host, monkeypatch):
        monkeypatch.setattr(socket, "getaddrinfo", None)
        assert not posttroll.is_own_address(host)


SILENT_NAME_SERVER = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.1", 53))
    print("hears", flush=True)
    while True:
        print("asked", sock.recv(1024), flush=True)
"""


@pytest.fixture
def host_without_names(two_hosts):
    """Give a host whose name server never answers: whoever resolves a name waits longer than any test."""
    host = two_hosts[0]
    host.connect()
    directory = Path("/etc/netns") / host.name
    directory.mkdir(parents=True)
    try:
        (directory / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
        with host.run("-c", SILENT_NAME_SERVER) as silent:
            await_line(silent, "hears")
            yield host
    finally:
        shutil.rmtree(directory)


@pytest.mark.network
class TestNameServerThatNeverAnswers:
    """What resolves a name does so where nobody waits for it."""

    @pytest.mark.parametrize("multicast", [True, False])
    @pytest.mark.parametrize("uri", ["tcp://some.name:9000", "tcp://999.1.1.1:9000"])
    def test_the_nameserver_goes_on_whatever_is_announced(self, host_without_names, multicast, uri):
        """Among three publishers that register, and lookups."""
        code = """
import posttroll, sys, time
uri, multicast = sys.argv[1], sys.argv[2] == "True"
config, Message = posttroll.config, posttroll.Message
text = Message("/address/named", "info", {"URI": uri, "service": ["named"]}, version="v1.01").encode()
if multicast:
    posttroll.MulticastSender(config.get("broadcast_port"))(text)
else:
    sock = posttroll.set_up_client_socket(posttroll.zmq.REQ, f"tcp://127.0.0.1:{config.get('broadcast_port')}")
    sock.send_string(text)
    assert sock.recv() == b"ok"
    sock.close()
hosts = None if multicast else ["127.0.0.1"]
publishers = [posttroll.Publish(name, nameservers=hosts, broadcast_interval=0.1).publisher for name in "abc"]
for publisher in publishers:
    publisher.start()
while {entry["name"] for entry in posttroll.get_pub_address("", 5, "127.0.0.1")} != {"named", "a", "b", "c"}:
    time.sleep(0.01)
for publisher in publishers:
    publisher.stop()
print("all known")
"""
        host = host_without_names
        words = [] if multicast else ["--no-multicast"]
        with host.run(NAMESERVER, *words) as running:
            await_line(running, "answers on port")
            with host.run("-c", code, uri, multicast) as asking:
                assert finish(asking) == (0, "all known\n", "")

    def test_publishers_and_subscribers_go_on(self, host_without_names):
        """Three publishers, of which one has a name for its address, and five subscribers that also want names."""
        code = """
import posttroll
publishers = [posttroll.Publisher(f"tcp://{host}:0").start() for host in ("127.0.0.1", "127.0.0.2", "some.name")]
addresses = [f"tcp://127.0.0.{n}:{pub.port_number}" for n, pub in enumerate(publishers, 1)]
names = ["tcp://some.name:9000", "tcp://999.1.1.1:9000", "tcp://1.2.3.4.5:9000"]
for bad in ("tcp://[some.name]:9000", "tcp://[1:2]:9000"):
    try:
        posttroll.Subscriber([bad])
    except ValueError as error:
        print("refused")
subscribers = [posttroll.Subscriber([*names, *addresses]) for _ in range(5)]
for number, publisher in enumerate(publishers):
    assert publisher.wait_for_subscribers(5, 15)
    publisher.send(posttroll.Message("/a", "info", number))
for subscriber in subscribers:
    received = []
    while len(received) < 3:
        received.append(next(subscriber.recv()).data)
    assert sorted(received) == [0, 1, 2]
print("all received", flush=True)
import os
os._exit(0)  # threads that resolve go on for minutes
"""
        with host_without_names.run("-c", code) as running:
            assert finish(running)[:2] == (0, "refused\nrefused\nall received\n")

    def test_who_asks_a_nameserver_by_name_holds_up_nobody(self, host_without_names):
        """Two threads wait for their lookups, a publisher for its nameserver; all else in the process goes on."""
        code = """
import os, posttroll, threading
def ask(names):
    try:
        posttroll.get_pub_address("a_service", 20, names)
    except TimeoutError:
        pass
threads = [threading.Thread(target=ask, args=[names], daemon=True) for names in ("some.name", ["a.name", "b.name"])]
for thread in threads:
    thread.start()
settings = {"nameservers": ["c.name", "127.0.0.1"], "broadcast_interval": 0.1}
with posttroll.Publish("a_service", **settings) as pub:
    with posttroll.Subscribe("a_service", nameserver=["some.name", "127.0.0.1"], addr_listener=True) as sub:
        while not pub.subscriber_count:
            next(sub.recv(0.01))
        pub.send(posttroll.Message("/a", "info", "on time"))
        print(next(sub.recv(10)).data)
    found = posttroll.get_pub_address("a_service", 5, ["some.name", "127.0.0.1"])
    print(len(found), [thread.is_alive() for thread in threads], flush=True)
os._exit(0)  # threads that resolve go on for minutes
"""
        host = host_without_names
        with host.run(NAMESERVER, "--no-multicast") as server:
            await_line(server, "answers on port")
            assert host.say(code).splitlines() == ["on time", "1 [True, True]"]


@pytest.fixture
def hosts_with_names(two_hosts):
    """Give two hosts, and a function that lets names of the first point elsewhere: ``move(hub="10.77.1.2")``."""
    for host in two_hosts:
        host.connect()
    directory = Path("/etc/netns") / two_hosts[0].name
    directory.mkdir(parents=True)

    def move(**names: str) -> None:
        lines = [f"{address} {name}" for name, address in {"localhost": "127.0.0.1", **names}.items()]
        (directory / "hosts").write_text("\n".join([*lines, ""]))  # in place: the hosts see this file

    try:
        yield (*two_hosts, move)
    finally:
        shutil.rmtree(directory)


IMPATIENT = "import posttroll, time\nposttroll._Resolution.RETRY = posttroll._Link.RENEWAL = 0.2\n"


@pytest.mark.network
class TestNamesThatMove:
    """Each name is asked for again and again; where it leads to now is found, whoever is still at the old place."""

    def test_a_nameserver_moves(self, hosts_with_names):
        """A publisher, a subscriber that listens, one that does not, and lookups; the old nameserver lives on."""
        one, two, move = hosts_with_names
        code = (
            IMPATIENT
            + """
posttroll._Follower.SELDOM = 0.2
settings = {"nameservers": ["hub"], "broadcast_interval": 0.1}
listening = posttroll.NSSubscriber(["first", "second"], addr_listener=True, timeout=0, nameserver="hub").start()
asking = posttroll.NSSubscriber(["first", "second"], timeout=0, nameserver=["hub", "localhost"]).start()
with posttroll.Publish("first", **settings) as first:
    while first.subscriber_count < 2:
        next(listening.recv(0.01)), next(asking.recv(0.01))
    print("found", flush=True)
    while not posttroll.get_pub_address("second", 5, "hub"):
        next(listening.recv(0.01)), next(asking.recv(0.01))
    while not (len(listening.addresses) == len(asking.addresses) == 2):
        next(listening.recv(0.01)), next(asking.recv(0.01))
    print(first.subscriber_count, flush=True)
    input()
listening.close(), asking.close()
"""
        )
        move(hub="10.77.1.1")
        with one.run(NAMESERVER, "--no-multicast") as old, two.run(NAMESERVER, "--no-multicast") as new:
            for server in (old, new):
                await_line(server, "answers on port")
            with one.run("-c", code) as running:
                await_line(running, "found")
                with two.run("-c", PUBLISHING.replace("a_service", "second"), "60", "10.77.1.2"):
                    assert two.ask("first") == []
                    move(hub="10.77.1.2")
                    assert await_line(running, "2") == "2\n"  # no connection was cut
                    wait_for(lambda: two.ask("first"))  # the publisher asks for the name at times of its own
                    running.communicate("\n", timeout=DEADLINE)
                    assert running.returncode == 0

    @pytest.mark.parametrize("end", ["ended", "lost"])
    def test_a_publisher_moves(self, hosts_with_names, end, monkeypatch):
        """To a subscriber with its name, and to one that was told the name by a nameserver."""
        one, two, move = hosts_with_names
        monkeypatch.setenv("POSTTROLL_ZMTP_HEARTBEAT_INTERVAL", "0.3")
        monkeypatch.setenv("POSTTROLL_ZMTP_HEARTBEAT_TIMEOUT", "1")
        monkeypatch.setenv("POSTTROLL_ANNOUNCED_ADDRESS", "pod")
        code = """
import posttroll, sys
with posttroll.Publish("a_service", 9000, nameservers=["10.77.1.1"], broadcast_interval=0.1) as pub:
    print("up", flush=True)
    while not sys.stdin.closed:
        pub.send(posttroll.Message("/a", "info", sys.argv[1]))
        if pub.wait_for_subscribers(10, 0.05):
            break
"""
        subscribing = (
            IMPATIENT
            + """
import sys
addresses = ["tcp://pod:9000"] if sys.argv[1] == "fixed" else []
names = {"nameserver": False} if addresses else {"services": "a_service", "timeout": 0}
last = ""
for message in posttroll.Subscribe(addresses=addresses, **names).subscriber:
    if message.data != last:
        last = message.data
        print(last, flush=True)
"""
        )
        move(pod="10.77.1.2")
        two.ip("addr", "add", "10.77.1.3/32", "dev", two.device)  # it stays when the other one goes
        with (
            one.run(NAMESERVER, "--no-multicast") as server,
            one.run("-c", subscribing, "fixed") as fixed,
            one.run("-c", subscribing, "told") as told,
        ):
            await_line(server, "answers on port")
            with two.run("-c", code, "old") as old:
                for subscriber in (fixed, told):
                    await_line(subscriber, "old")
                if end == "lost":  # no packet of it comes any more
                    two.ip("route", "add", "blackhole", "10.77.1.1/32")
                    two.ip("addr", "del", "10.77.1.2/24", "dev", two.device)
                old.kill()
            if end == "lost":
                two.ip("route", "del", "blackhole", "10.77.1.1/32")
            move(pod="10.77.1.3")
            with two.run("-c", code, "new"):
                for subscriber in (fixed, told):
                    await_line(subscriber, "new")

    def test_a_client_moves(self, monkeypatch):
        """One that is let in by its name; while no name server answers, what it last said holds."""
        numbers = {"pod": "192.0.2.1"}

        def resolve(name: str, *args: Any, **kwargs: Any) -> Any:
            if numbers["pod"] == "down":
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return [(None, None, None, None, (numbers[name], 0))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(posttroll._AddressList, "REFRESH", 0.01)
        with config.set(authorized_client_addresses=["pod"]):
            rules = posttroll.AccessRules()
        assert not rules.refuses_address("192.0.2.1")
        numbers["pod"] = "192.0.2.9"
        wait_for(lambda: not rules.refuses_address("192.0.2.9"))
        assert rules.refuses_address("192.0.2.1")
        numbers["pod"] = "down"
        asked = rules._addresses._asked
        wait_for(lambda: rules.refuses_address("192.0.2.1") and rules._addresses._asked > asked + 0.05)
        assert not rules.refuses_address("192.0.2.9")
        rules._addresses._thread.join()

    def test_a_name_of_several_hosts_is_no_reason_to_move(self, monkeypatch):
        """Name servers say them in another order each time."""
        answers = itertools.cycle([["10.0.0.9", "10.0.0.8"], ["10.0.0.8", "10.0.0.9"]])
        moved: list[str] = []
        monkeypatch.setattr(posttroll, "_numbers_of", lambda name: next(answers))
        monkeypatch.setattr(posttroll._Resolution, "RETRY", 0)
        resolution = posttroll._Resolution("tcp://pod:9000", lambda: moved.append("moved"))
        wait_for(resolution.check)
        for _ in range(5):
            wait_for(lambda: not resolution._is_asking)
            resolution.ask()
        wait_for(lambda: not resolution._is_asking)
        assert (resolution.endpoint, moved) == ("tcp://10.0.0.9:9000", ["moved"])


# ======================================================================================================================
# 6. Keys and access; on several hosts see further below
# ======================================================================================================================


class TestAccessWithOldReleasesOfPyzmq:
    """ZAP_ENFORCE_DOMAIN, 93 in libzmq's zmq.h, has no name in pyzmq before release 23."""

    @pytest.mark.parametrize("local_only", [True, False])
    def test_nobody_gets_in_while_nobody_answers(self, local_only):
        sock, _, rules = posttroll.set_up_server_socket(zmq.REP, "tcp://127.0.0.1:0", local_only=local_only)
        assert sock.getsockopt(93) == local_only
        sock.close(0)
        if rules is not None:
            rules.stop()
        assert (rules is not None) == local_only


# ======================================================================================================================
# 7. Asking the nameserver
# ======================================================================================================================


@contextlib.contextmanager
def answering(answer: bytes | list[bytes] | None, port: int | None = None) -> Iterator[list[bytes]]:
    """Be a nameserver that gives the same *answer* to everything, None for none; gives the list of the requests."""
    requests: list[bytes] = []
    context = zmq.Context()
    sock = context.socket(zmq.REP)
    sock.linger = 0
    sock.bind(f"tcp://127.0.0.1:{config.get('nameserver_port') if port is None else port}")
    end = threading.Event()

    def serve() -> None:
        while not end.is_set():
            if sock.poll(20):
                requests.append(sock.recv())
                if answer is None:
                    end.wait()
                else:
                    sock.send_multipart([answer] if isinstance(answer, bytes) else answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        end.set()
        thread.join()
        sock.close()
        context.term()


def answer_with(data: Any, version: str = "v1.01") -> bytes:
    """Return a nameserver's answer with *data*."""
    return posttroll.Message("/oper/ns", "info", data, version=version).encode().encode()


class TestAskingTheNameserver:
    def test_the_address_of_a_service(self):
        with nameserver(), posttroll.Publish("a_service", aliases=["b"], nameservers=["localhost"]) as pub:
            [entry] = wait_for(lambda: posttroll.get_pub_address("a_service"))
            assert entry["URI"] == f"tcp://{posttroll.get_own_ip()}:{pub.port_number}"
            assert entry["service"] == ["a_service", "b"]
            assert [found["URI"] for found in posttroll.get_pub_address("b", timeout=DEADLINE)] == [entry["URI"]]

    def test_an_unknown_service_has_no_address(self):
        with nameserver():
            assert posttroll.get_pub_address("nobody", timeout=DEADLINE, nameserver="localhost") == []

    def test_all_services_and_several(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]):
            with posttroll.Publish("b", nameservers=["localhost"]):
                wait_for(lambda: len(posttroll.get_pub_address("")) == 2)
                assert len(posttroll.get_pub_addresses()) == 2
                assert [found["name"] for found in posttroll.get_pub_addresses(["b", "a"])] == ["b", "a"]
                assert [found["name"] for found in posttroll.get_pub_addresses("b")] == ["b"]
                assert posttroll.get_pub_addresses(["c"]) == []

    @pytest.mark.parametrize("timeout", [0, 0.05])
    def test_without_a_nameserver(self, timeout):
        for ask in (posttroll.get_pub_address, lambda *args, **kwargs: posttroll.get_pub_addresses(["a"], **kwargs)):
            with pytest.raises(TimeoutError, match="no answer from the nameserver on localhost"):
                ask("a_service", timeout=timeout)

    def test_a_nameserver_that_does_not_answer(self):
        with answering(None), pytest.raises(TimeoutError):
            posttroll.get_pub_address("a_service", timeout=0.1)

    def test_a_nameserver_that_comes_back_is_asked_again(self):
        """Also on a connection that was kept from an earlier lookup."""
        for _ in range(3):
            with answering(answer_with([{"URI": "tcp://h:1"}])):
                assert len(posttroll.get_pub_address("a", timeout=DEADLINE)) == 1
            with pytest.raises(TimeoutError):
                posttroll.get_pub_address("a", timeout=0.05)

    def test_the_request_is_in_the_version_that_everybody_reads(self):
        with answering(answer_with("")) as requests:
            assert posttroll.get_pub_address("a_service", timeout=DEADLINE) == []
        request = posttroll.Message.decode(requests[0])
        assert (request.subject, request.type, request.version) == ("/oper/ns", "request", "v1.01")
        assert request.data == {"service": "a_service"}

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"\xff\xfe",
            b"nonsense",
            b"pytroll://oper/ns info a@b 2020-01-01T00:00:00 v9.9 application/json []",
            b"pytroll://oper/ns info a@b yesterday v1.01 application/json []",
            b"pytroll://oper/ns info a@b 2020-01-01T00:00:00 v1.01 application/json " + b"[" * 100000,
            answer_with(""),
            answer_with("text"),
            answer_with({"URI": "tcp://h:1"}),
            answer_with(5),
            answer_with([None, 1, "tcp://h:1", {}, {"URI": None}, {"URI": 5}, {"URI": "foo://bar"}, {"URI": "tcp://"}]),
        ],
        ids=range(11),
    )
    def test_a_broken_answer_is_one_without_addresses(self, answer):
        with answering(answer):
            assert posttroll.get_pub_address("a_service", timeout=DEADLINE) == []

    def test_the_good_entries_of_an_answer_are_used(self, caplog):
        entries = [{"URI": "tcp://"}, {"URI": "tcp://good:9000", "service": ["a"]}, "nonsense"]
        with answering(answer_with(entries)):
            assert posttroll.get_pub_address("a", timeout=DEADLINE) == [entries[1]]
        assert "Skipped 2 broken entries" in caplog.text

    def test_an_answer_of_several_frames(self):
        with answering([answer_with([{"URI": "tcp://h:1"}]), b"more"]):
            assert posttroll.get_pub_address("a", timeout=DEADLINE) == [{"URI": "tcp://h:1"}]

    def test_several_nameservers_are_merged_and_one_that_is_down_is_left_out(self):
        ports = [free_port() for _ in range(3)]
        both, one, two = ({"URI": f"tcp://h:{number}"} for number in (1, 2, 3))
        with answering(answer_with([both, one]), ports[0]), answering(answer_with([both, two]), ports[1]):
            hosts = [f"localhost:{port}" for port in ports]
            found = posttroll.get_pub_address("a", timeout=DEADLINE, nameserver=hosts)
            assert sorted(entry["URI"] for entry in found) == ["tcp://h:1", "tcp://h:2", "tcp://h:3"]
        with pytest.raises(TimeoutError, match=f"{hosts[0]}, {hosts[1]}"):
            posttroll.get_pub_address("a", timeout=0.05, nameserver=hosts)

    def test_one_that_is_silent_beside_others_is_told_of(self, caplog):
        ports = [free_port() for _ in range(2)]
        hosts = [f"localhost:{port}" for port in ports]
        with answering(answer_with([{"URI": "tcp://h:1"}]), ports[0]):
            for nameserver in (hosts, [*hosts, hosts[1]]):
                assert posttroll.get_pub_address("a", timeout=DEADLINE, nameserver=nameserver) == [{"URI": "tcp://h:1"}]
                assert f"No answer from the nameserver on {hosts[1]}:" in caplog.text
                caplog.clear()
            assert len(posttroll.get_pub_address("a", timeout=DEADLINE, nameserver=hosts[:1])) == 1
        assert not caplog.text

    def test_a_nameserver_that_is_far_away_is_waited_for(self):
        near, far = ({"URI": f"tcp://h:{number}"} for number in (1, 2))
        ports = [free_port() for _ in range(2)]
        with answering(answer_with([near]), ports[0]), answering(answer_with([far]), ports[1]):
            with Relay(ports[1], delay=0.05) as cable:
                hosts = [f"127.0.0.1:{ports[0]}", f"127.0.0.1:{cable.port}"]
                found = posttroll.get_pub_address("a", timeout=DEADLINE, nameserver=hosts)
        assert sorted(entry["URI"] for entry in found) == ["tcp://h:1", "tcp://h:2"]

    @pytest.mark.parametrize("nameserver", ["", "a b", "host:99999", "tcp://"])
    def test_a_nameserver_that_cannot_be_an_address(self, nameserver):
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.get_pub_address("a", timeout=0.1, nameserver=nameserver)

    def test_the_port(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_NAMESERVER_PORT")
        assert posttroll.get_configured_nameserver_port() == 5557
        monkeypatch.setenv("POSTTROLL_NAMESERVER_PORT", "5599")
        assert posttroll.get_configured_nameserver_port() == 5599
        monkeypatch.delenv("POSTTROLL_NAMESERVER_PORT")
        monkeypatch.setenv("NAMESERVER_PORT", "5600")
        with pytest.warns(PendingDeprecationWarning, match="NAMESERVER_PORT"):
            assert posttroll.get_configured_nameserver_port() == 5600

    def test_lookups_from_many_threads(self):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]):
            wait_for(lambda: posttroll.get_pub_address("a_service"))
            counts: list[int] = []

            def ask() -> None:
                for _ in range(20):
                    counts.append(len(posttroll.get_pub_address("a_service", timeout=DEADLINE)))

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert counts == [1] * 160


# ======================================================================================================================
# 8. Announcing an address
# ======================================================================================================================


class TestDescribeNameserver:
    def test_ours(self):
        with nameserver():
            assert posttroll.describe_nameserver(timeout=DEADLINE) == {"version": posttroll.__version__}

    def test_others(self):
        port = free_port()
        with answering(answer_with(""), port) as requests:
            assert posttroll.describe_nameserver(f"localhost:{port}", DEADLINE) == {}
        (request,) = requests
        assert Message.decode(request).version == "v1.01"

    @pytest.mark.parametrize("about", ["yes", 1, None, [True]])
    def test_only_who_asks_for_it_is_told(self, about):
        """All else is a lookup."""
        with nameserver():
            request = posttroll.Message("/oper/ns", "request", {"service": "", "about": about})
            (answer,) = raw_request(config.get("nameserver_port"), request.encode().encode())
        assert Message.decode(answer).data == ""

    def test_nobody(self):
        with pytest.raises(TimeoutError, match="no answer from the nameserver on localhost"):
            posttroll.describe_nameserver(timeout=0.1)


@pytest.fixture
def hub():
    """Give a nameserver on ports of which only the keys ``nameserver`` and ``nameservers`` know."""
    with nameserver():
        hosts = {"nameserver": f"127.0.0.1:{config.get('nameserver_port')}"}
        hosts["nameservers"] = f"127.0.0.1:{config.get('broadcast_port')}"
        with config.set(nameserver_port=free_port(), broadcast_port=free_port()):
            yield hosts


class TestConfiguredNameservers:
    """The keys ``nameserver`` and ``nameservers`` stand in for the defaults of programs that have no option for it."""

    @pytest.mark.parametrize(
        ("value", "hosts"),
        [
            ("a b:5600", ["a", "b:5600"]),
            ("a,b:5600, [::1]:7", ["a", "b:5600", "[::1]:7"]),
            ("['a', 'b']", ["a", "b"]),
            ("none", []),
            ("False", []),
            ("false", []),
            ("", []),
        ],
    )
    def test_hosts_in_the_environment(self, value, hosts, monkeypatch):
        monkeypatch.setenv("POSTTROLL_NAMESERVER", value)
        monkeypatch.setenv("POSTTROLL_NAMESERVERS", value)
        assert posttroll.hosts_to_ask("localhost") == posttroll.hosts_to_register_with(None) == hosts

    @pytest.mark.parametrize(("value", "hosts"), [('["a", "b"]', ["a", "b"]), ("false", []), ('"none"', [])])
    def test_hosts_in_a_file(self, value, hosts, tmp_path):
        write(tmp_path / "config", "a.json", f'{{"nameserver": {value}}}')
        config.refresh()
        assert posttroll.hosts_to_ask(None) == hosts

    @pytest.mark.parametrize("value", [7, [7], {"a": 1}, True])
    def test_what_are_no_hosts(self, value):
        with (
            config.set(nameservers=value),
            pytest.raises(ConfigurationError, match=r"nameservers is .* list of strings"),
        ):
            posttroll.NoisyPublisher("a_service").start()

    @pytest.mark.parametrize(
        ("given", "asked", "registered"),
        [
            (None, ["ns"], ["regs"]),
            ("localhost", ["ns"], ["regs"]),
            (True, ["ns"], ["regs"]),
            (False, [], None),
            ([], [], ["regs"]),
            ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"]),
            (["localhost"], ["localhost"], ["localhost"]),
            (("a", "b:1"), ["a", "b:1"], ["a", "b:1"]),
        ],
    )
    def test_they_stand_in_for_the_default_only(self, given, asked, registered):
        with config.set(nameserver="ns", nameservers=["regs"]):
            assert posttroll.hosts_to_ask(given) == asked
            assert posttroll.hosts_to_register_with(given) == registered

    def test_without_them_all_is_as_ever(self):
        assert posttroll.hosts_to_ask(None) == posttroll.hosts_to_ask("localhost") == ["localhost"]
        assert posttroll.hosts_to_register_with(None) is None
        assert posttroll.hosts_to_register_with("localhost") == ["localhost"]

    @pytest.mark.parametrize(
        "publish",
        [
            lambda: posttroll.Publish("a_service", broadcast_interval=0.02).publisher,
            lambda: posttroll.NoisyPublisher("a_service", broadcast_interval=0.02),
            lambda: posttroll.publisher.create_publisher_from_dict_config({"name": "a_service", "nameservers": None}),
            lambda: posttroll.message_broadcaster.sendaddressservice("a_service", "tcp://h:9", ["a_service"], 0.02),
        ],
    )
    def test_unedited_publishers_register_there(self, hub, publish):
        with config.set(hub):
            publisher = publish()
            publisher.start()
            (found,) = wait_for(lambda: posttroll.get_pub_addresses(["a_service"]))
            assert found["name"] == "a_service"
            assert posttroll.get_pub_address("a_service", nameserver="localhost") != []
            publisher.stop()

    @pytest.mark.parametrize(
        "subscribe",
        [
            lambda: posttroll.Subscribe("a_service").subscriber,
            lambda: posttroll.NSSubscriber("a_service", nameserver="localhost").start(),
            lambda: posttroll.NSSubscriber("a_service", addr_listener=True, timeout=0).start(),
            lambda: posttroll.subscriber.create_subscriber_from_dict_config({"services": "a_service"}),
            lambda: posttroll.subscriber.create_subscriber_from_dict_config({"nameserver": False}),
        ],
    )
    def test_unedited_subscribers_ask_there(self, hub, subscribe):
        with config.set(hub), posttroll.Publish("a_service", broadcast_interval=0.02) as pub:
            wait_for(lambda: posttroll.get_pub_address("a_service"))
            with contextlib.closing(subscribe()) as sub:
                wait_for(lambda: next(sub.recv(0.01)) or pub.subscriber_count)
                pub.send(Message("/a", "info", "found"))
                assert [message.data for message in receive(sub)] == ["found"]

    def test_a_listener_and_a_logger_ask_there(self, hub):
        with config.set(hub), posttroll.Publish("a_service", broadcast_interval=0.02) as pub:
            listener = posttroll.listener.ListenerContainer(topics=["/a"], services="a_service")
            logger = posttroll.logger.Logger(nameserver_port=config.get("address_publish_port"))
            logger.start()
            assert pub.wait_for_subscribers(2, DEADLINE)
            logger.stop()
            listener.stop()

    def test_commands_honour_them(self, hub, monkeypatch):
        for key, value in hub.items():
            monkeypatch.setenv(f"POSTTROLL_{key.upper()}", value)
        for key in ("nameserver_port", "broadcast_port"):
            monkeypatch.setenv(f"POSTTROLL_{key.upper()}", str(config.get(key)))
        status, out, err = run_here("doctor")
        assert status == 0, out + err
        assert f"(by {hub['nameserver']})" in out
        with posttroll.Publish("a_service", broadcast_interval=0.02):
            wait_for(lambda: posttroll.get_pub_address("a_service"))
            assert run_here("services", "a_service")[0] == 0

    def test_nowhere(self, hub, caplog):
        """A publisher that is announced nowhere is there all the same, and a subscriber asks nobody."""
        with multicast(config.get("broadcast_port")) as (_, receiver), config.set(nameservers="none"):
            receiver.settimeout(0.1)
            with posttroll.Publish("a_service", broadcast_interval=0.01) as pub, pytest.raises(posttroll.SocketTimeout):
                receiver()
            with posttroll.Publish("a_service", broadcast_interval=0.01) as pub, config.set(nameserver=False):
                assert posttroll.get_pub_address("a_service") == []
                address = f"tcp://127.0.0.1:{pub.port_number}"
                with posttroll.Subscribe("a_service", addresses=[address]) as sub:
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    pub.send(Message("/a", "info", "found"))
                    assert [message.data for message in receive(sub)] == ["found"]
                assert "No nameserver is asked" not in caplog.text
                posttroll.Subscribe("a_service").subscriber.close()
                assert "No nameserver is asked for ['a_service']" in caplog.text

    def test_commands_that_can_ask_nobody_say_so(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_NAMESERVER", "none")
        monkeypatch.setenv("POSTTROLL_NAMESERVERS", "none")
        status, _, err = run_here("services")
        assert (status, "say --nameserver HOST" in err) == (1, True)
        status, _, err = run_here("publish", "/a", "info", "x")
        assert (status, "needs --port" in err) == (1, True)
        status, out, _ = run_here("doctor")
        assert "not tried, as publishers are announced nowhere" in out
        assert status == 0


class TestMessageBroadcaster:
    def test_by_multicast_until_it_is_stopped(self):
        port = free_port()
        with multicast(port) as (_, receiver):
            broadcaster = posttroll.MessageBroadcaster("a message", port, 0.01)
            assert not broadcaster.is_running()
            broadcaster.start()
            assert broadcaster.is_running()
            assert [receiver()[0] for _ in range(3)] == ["a message"] * 3
            broadcaster.stop()
            assert not broadcaster.is_running()

    def test_by_request_to_designated_receivers(self):
        port = free_port()
        with answering(b"ok", port) as requests:
            broadcaster = posttroll.MessageBroadcaster("a message", port, 0.01, ["localhost"]).start()
            wait_for(lambda: len(requests) >= 3)
            broadcaster.stop()
        assert set(requests) == {b"a message"}

    @pytest.mark.parametrize("interval", [0, -1, -0.5])
    def test_nothing_is_sent_with_an_interval_that_is_not_positive(self, interval):
        broadcaster = posttroll.MessageBroadcaster("a message", free_port(), interval, ["localhost"])
        assert not broadcaster.start().is_running()
        broadcaster.stop()

    def test_start_and_stop_twice_before_start_and_again(self):
        port = free_port()
        with multicast(port) as (_, receiver):
            broadcaster = posttroll.MessageBroadcaster("a message", port, 0.01)
            broadcaster.stop()
            for _ in range(2):
                broadcaster.start()
                loop = broadcaster._loop
                assert broadcaster.start()._loop is loop
                assert receiver()[0] == "a message"
                broadcaster.stop()
                broadcaster.stop()
                assert not broadcaster.is_running()

    def test_stop_does_not_wait_for_the_interval(self):
        broadcaster = posttroll.MessageBroadcaster("a message", free_port(), 3600, ["localhost"]).start()
        start = time.monotonic()
        broadcaster.stop()
        assert time.monotonic() - start < DEADLINE

    @pytest.mark.parametrize("receiver", ["", "a b", "tcp://", "x\ny"])
    def test_a_receiver_that_cannot_be_a_host(self, receiver):
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.MessageBroadcaster("a message", 9000, 1, [receiver])

    def test_an_answer_that_is_not_ok_is_logged(self, caplog):
        port = free_port()
        with answering(b"go away", port):
            broadcaster = posttroll.MessageBroadcaster("a message", port, 0.01, "localhost").start()
            wait_for(lambda: "did not register us: go away" in caplog.text)
            broadcaster.stop()

    @pytest.mark.parametrize("answer", [[b"ok", b"ok"], [b""], [b"\xff" * 1000]])
    def test_no_answer_stops_it(self, answer):
        port = free_port()
        with answering(answer, port) as requests:
            broadcaster = posttroll.MessageBroadcaster("a message", port, 0.01, ["localhost"]).start()
            wait_for(lambda: len(requests) >= 3)
            broadcaster.stop()


class TestAddressBroadcasters:
    def test_what_an_address_broadcaster_announces(self):
        with multicast(config.get("broadcast_port")) as (_, receiver):
            broadcaster = posttroll.sendaddress("a_name", "tcp://127.0.0.1:9000", 0.01).start()
            message = posttroll.Message.decode(receiver()[0])
            broadcaster.stop()
        assert (message.subject, message.type, message.version) == ("/address/a_name", "info", "v1.01")
        assert message.data == {"URI": "tcp://127.0.0.1:9000"}

    def test_what_a_service_broadcaster_announces(self):
        with multicast(config.get("broadcast_port")) as (_, receiver):
            broadcaster = posttroll.sendaddressservice("a_name", "tcp://*:9000", ["one", "two"], 0.01).start()
            message = posttroll.Message.decode(receiver()[0])
            broadcaster.stop()
        assert message.version == "v1.01"
        assert message.data == {
            "URI": "tcp://127.0.0.1:9000",  # the configured interface
            "service": ["one", "two"],
            "supported_message_version": "v1.2",
            "backend": "unsecure_zmq",
        }

    def test_a_single_service(self):
        with nameserver():
            broadcaster = posttroll.sendaddressservice("a_name", "tcp://h:9000", "one", 0.01, ["localhost"]).start()
            wait_for(lambda: posttroll.get_pub_address("one"))
            broadcaster.stop()

    def test_by_name_without_services(self):
        """An announcement without services is one of the service of that name."""
        with nameserver():
            broadcaster = posttroll.AddressBroadcaster("a_name", "tcp://h:9000", 0.01, ["localhost"]).start()
            wait_for(lambda: posttroll.get_pub_address("a_name"))
            broadcaster.stop()

    def test_a_nameserver_that_is_down_gets_the_registration_when_it_is_up(self):
        broadcaster = posttroll.sendaddressservice("a_name", "tcp://h:9000", ["one"], 0.05, ["localhost"]).start()
        for _ in range(2):
            with nameserver():
                wait_for(lambda: posttroll.get_pub_address("one"))
        broadcaster.stop()

    def test_nameservers_that_are_down_or_silent_do_not_delay_another(self):
        """With an interval of an hour, the first announcement is the one that counts."""
        with socket.socket() as silent, nameserver():
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            silent_one = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            hosts = ["tcp://127.0.0.1:1", silent_one, "no-such-host.invalid", "localhost"]
            broadcaster = posttroll.sendaddressservice("a_name", "tcp://h:9000", ["one"], 3600, hosts).start()
            wait_for(lambda: posttroll.get_pub_address("one"))
            start = time.monotonic()
            broadcaster.stop()
            assert time.monotonic() - start < 5

    def test_a_nameserver_that_dies_after_it_has_taken_a_registration_holds_nobody_up(self):
        port = config.get("broadcast_port")
        broadcaster = posttroll.sendaddressservice("a_name", "tcp://h:9000", ["one"], 0.05, ["localhost"])
        with answering(None, port) as requests:
            broadcaster.start()
            wait_for(lambda: requests)
        with nameserver():
            wait_for(lambda: posttroll.get_pub_address("one"))
        broadcaster.stop()

    def test_a_host_that_does_not_resolve_is_a_warning_and_tried_again(self, monkeypatch, caplog):
        """It is registered with once its name is known: here with the help of a resolver that learns it."""
        monkeypatch.setattr(posttroll._Resolution, "RETRY", 0.02)
        names: dict[str, str] = {}
        resolve = socket.getaddrinfo

        def learning(host: Any, *args: Any, **kwargs: Any) -> Any:
            return resolve(names.get(host, host), *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", learning)
        host = "no-such-host.invalid"
        broadcaster = posttroll.sendaddressservice("a_name", "tcp://h:9000", ["one"], 0.05, [host]).start()
        wait_for(lambda: f"{host} does not resolve" in caplog.text)
        target_connected: list[str] = []
        connect = posttroll.set_up_client_socket

        def connecting(kind: int, address: str, *args: Any, **kwargs: Any) -> Any:
            target_connected.append(address)
            return connect(kind, address, *args, **kwargs)

        monkeypatch.setattr(posttroll, "set_up_client_socket", connecting)
        names[host] = "localhost"
        wait_for(lambda: target_connected)
        broadcaster.stop()
        assert target_connected == [f"tcp://127.0.0.1:{config.get('broadcast_port')}"]

    @pytest.mark.parametrize("name", ["", "two words", "line\nbreak"])
    def test_a_name_that_cannot_be_announced(self, name):
        with pytest.raises(ValueError, match="name"):
            posttroll.NoisyPublisher(name)
        if name:
            with pytest.raises(posttroll.MessageError):
                posttroll.sendaddressservice(name, "tcp://h:9000", ["one"])


# ======================================================================================================================
# 9. Publishing
# ======================================================================================================================


@contextlib.contextmanager
def connected(topics: Any = "", count: int = 1, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
    """Give a publisher and *count* subscribers that are connected to it."""
    with contextlib.ExitStack() as stack:
        pub = stack.enter_context(posttroll.Publisher("tcp://*:0", "a_publisher"))
        address = f"tcp://127.0.0.1:{pub.port_number}"
        subs = [stack.enter_context(posttroll.Subscriber([address], topics, **kwargs)) for _ in range(count)]
        assert pub.wait_for_subscribers(count, DEADLINE)
        yield (pub, *subs)


def text_message(text: Any, subject: str = "/a") -> str:
    """Return an encoded message with *text* as its data."""
    return posttroll.Message(subject, "info", text).encode()


def received_data(sub: Any, count: int = 1) -> list[Any]:
    """Return the data of the next *count* messages."""
    return [message.data for message in receive(sub, count)]


@contextlib.contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[threading.Thread]:
    """Run *function* in a thread, which must end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(DEADLINE)
        assert not thread.is_alive()
        assert errors == []


class TestPublisher:
    @pytest.mark.parametrize("form", ["str", "bytes", "Message", "str subclass"])
    def test_what_can_be_sent(self, form):
        message = posttroll.Message("/a", "info", {"key": "välue"})
        forms = {"str": message.encode(), "bytes": message.encode().encode(), "Message": message}
        forms["str subclass"] = type("Text", (str,), {})(message.encode())
        with connected() as (pub, sub):
            pub.send(forms[form])
            pub.send_string(forms[form])
            assert received_data(sub, 2) == [{"key": "välue"}] * 2

    @pytest.mark.parametrize("wrong", [None, 5, ["text"], bytearray(b"text")])
    def test_what_cannot_be_sent(self, wrong):
        with posttroll.Publisher("tcp://*:0") as pub, pytest.raises(TypeError, match=type(wrong).__name__):
            pub.send(wrong)

    def test_a_message_is_encoded_as_it_is_now(self):
        message = posttroll.Message("/a", "info", "before")
        with connected() as (pub, sub):
            message.data = "after"
            pub.send(message)
            message.data = object()
            with pytest.raises(posttroll.MessageError):
                pub.send(message)
            assert received_data(sub) == ["after"]

    def test_name_address_and_port(self):
        pub = posttroll.Publisher("tcp://localhost:0", name="a_name")
        assert (pub.name, pub.port_number) == ("a_name", None)
        assert pub.start() is pub
        assert pub.port_number > 0
        pub.close()

    def test_it_binds_when_it_is_used(self):
        """Without start(), as in the documented example."""
        pub = posttroll.Publisher("tcp://*:0")
        pub.send(text_message("nobody hears it"))
        assert pub.port_number
        pub.stop()

    def test_start_twice_stop_twice_and_stop_before_start(self):
        pub = posttroll.Publisher("tcp://*:0")
        pub.stop()
        pub.start()
        port = pub.port_number
        assert pub.start().port_number == port
        pub.stop()
        pub.stop()
        pub.close()

    def test_restart_after_stop(self):
        port = free_port()
        pub = posttroll.Publisher(f"tcp://*:{port}")
        with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
            for number in range(3):  # who waits for messages is subscribed again
                pub.start()
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message(number))
                pub.stop()
                wait_for(lambda number=number: data == list(range(number + 1)))

    def test_no_sending_after_stop(self):
        with posttroll.Publisher("tcp://*:0", "a_name") as pub:
            pass
        with pytest.raises(RuntimeError, match="a_name has been stopped"):
            pub.send(text_message("too late"))

    @pytest.mark.parametrize("expected", [RuntimeError, zmq.ZMQError, posttroll.PublisherStoppedError])
    def test_programs_catch_either_error(self, expected):
        noisy = posttroll.NoisyPublisher("a_name").start()
        for pub in (posttroll.Publisher("tcp://*:0").start(), posttroll.Publisher("tcp://*:0"), noisy):
            pub.stop()
            for send in (pub.send, pub.send_string):
                with pytest.raises(expected, match=r"has been stopped|is not started") as caught:
                    send(text_message("too late"))
                assert caught.value.errno == zmq.ENOTSOCK

    def test_an_exception_in_the_block_stops_it(self):
        with pytest.raises(KeyError), posttroll.Publisher("tcp://*:0") as pub:
            raise KeyError
        with pytest.raises(RuntimeError):
            pub.send("text")

    def test_heartbeats(self):
        with connected() as (pub, sub):
            pub.heartbeat()
            pub.heartbeat(3600)  # too soon
            pub.heartbeat(0)
            beats = receive(sub, 2)
            pub.send(text_message("no third one before this"))
            assert received_data(sub) == ["no third one before this"]
        assert [(beat.subject, beat.type) for beat in beats] == [("/heartbeat/a_publisher", "beat")] * 2
        assert [beat.data for beat in beats] == [{"min_interval": 0}] * 2

    def test_the_first_heartbeat_waits_for_nothing(self):
        with connected() as (pub, sub):
            pub.heartbeat(3600)
            assert received_data(sub) == [{"min_interval": 3600}]

    def test_heartbeats_by_themselves(self):
        """Of every publisher, without an edit; those that the program sends take the place of the next one."""
        with config.set(heartbeat_interval=0.05), connected() as (pub, sub):
            beats = receive(sub, 3)
            assert [(beat.subject, beat.type, beat.data) for beat in beats] == [
                ("/heartbeat/a_publisher", "beat", {"min_interval": 0.05})
            ] * 3
            times = [beat.time.timestamp() for beat in beats]
            assert all(later - earlier > 0.04 for earlier, later in zip(times, times[1:]))
        with connected() as (pub, sub):
            pub.send(text_message("not a single one"))
            assert received_data(sub) == ["not a single one"]

    def test_heartbeats_by_hand_and_by_themselves(self):
        """Whoever sends it: no two within the interval, and no interval without one."""
        publisher = posttroll.Publisher("tcp://*:0", "both of us")
        publisher.heartbeat_interval = 0.3
        with publisher, posttroll.Subscriber([local_address(publisher.port_number)]) as sub:
            assert publisher.wait_for_subscribers(1, DEADLINE)
            publisher.heartbeat(3600)  # the first one waits for nothing
            assert [beat.data["min_interval"] for beat in receive(sub, 2)] == [3600, 0.3]
            pauses = [timedelta(seconds=1)]
            while pauses[-1] > timedelta(seconds=0.42):  # the machine is busy, or too long passed without one
                assert len(pauses) < 20
                publisher.heartbeat(3600)  # too soon
                beats = [wait_for(lambda: publisher.heartbeat(0.1) or next(sub.recv(0.01))), *receive(sub, 1)]
                assert [beat.data["min_interval"] for beat in beats] == [0.1, 0.3]
                pauses.append(beats[1].time - beats[0].time)
            assert {beat.subject for beat in beats} == {"/heartbeat/both_of_us"}
            assert min(pauses) > timedelta(seconds=0.29)

    def test_heartbeats_end_with_their_publisher(self, caplog):
        """Of one that is stopped, dropped or started again, while the loop goes on for others."""
        with config.set(heartbeat_interval=0.02), connected() as (_, sub):
            stopped, dropped, restarted = (posttroll.Publisher("tcp://*:0", name).start() for name in "abc")
            restarted.stop()
            port = restarted.start().port_number
            sub.add(local_address(port))
            stopped.stop()
            reference = weakref.ref(dropped)
            del dropped
            gc.collect()
            assert reference() is None
            wait_for(lambda: receive(sub)[0].subject == "/heartbeat/c")
            assert len(receive(sub, 10)) == 10
            restarted.stop()
            wait_for(lambda: {beat.subject for beat in receive(sub, 5)} == {"/heartbeat/a_publisher"})
        assert caplog.text == ""

    def test_50_publishers_beat_in_one_thread(self):
        with contextlib.ExitStack() as world, config.set(heartbeat_interval=0.2):
            before = threading.active_count()
            names = {f"name{number}" for number in range(50)}
            publishers = [world.enter_context(posttroll.Publisher("tcp://*:0", name)) for name in names]
            assert threading.active_count() == before + 1
            with posttroll.Subscriber([local_address(publisher.port_number) for publisher in publishers]) as sub:
                missing = {f"/heartbeat/{name}" for name in names}
                for message in sub:
                    missing.discard(message.subject)
                    if not missing:
                        break

    def test_sending_from_8_threads(self):
        with connected() as (pub, sub):

            def send(thread: int) -> None:
                for number in range(500):
                    pub.send(text_message([thread, number]))

            with contextlib.ExitStack() as stack:
                for thread in range(8):
                    stack.enter_context(in_thread(lambda thread=thread: send(thread)))
                data = received_data(sub, 4000)
        for thread in range(8):
            assert [number for sender, number in data if sender == thread] == list(range(500))

    def test_stop_while_others_send(self):
        """They get a RuntimeError, and nothing hangs."""
        pub = posttroll.Publisher("tcp://*:0").start()
        sent = threading.Event()

        def send() -> None:
            with pytest.raises(RuntimeError, match="stopped"):
                while True:
                    pub.send(text_message("text"))
                    sent.set()

        with in_thread(send), in_thread(send):
            assert sent.wait(DEADLINE)
            pub.stop()


class TestStopWhileOthersSend:
    def test_who_stops_it_waits_and_those_who_send_do_not(self, monkeypatch):
        drained: list[int] = []
        drain = posttroll.Publisher._drain
        monkeypatch.setattr(
            posttroll.Publisher,
            "_drain",
            lambda pub, audience: drained.append(threading.get_ident()) or drain(pub, audience),
        )

        def send_on(pub: Any) -> None:
            with pytest.raises(posttroll.PublisherStoppedError):
                while True:
                    pub.send("pytroll:/a info x@h 2026-01-01T00:00:00 v1.01 text/ascii x")

        for _ in range(30):
            with posttroll.Publisher("tcp://127.0.0.1:0") as pub:
                with in_thread(partial(send_on, pub)), in_thread(partial(send_on, pub)):
                    wait_for(lambda: pub.history_length)
                    pub.stop()
        assert set(drained) == {threading.get_ident()}


class TestCountingSubscribers:
    def test_they_come_and_go(self):
        with connected(count=3) as (pub, first, second, third):
            assert pub.subscriber_count == 3
            for left, sub in enumerate((third, first, second)):
                sub.close()
                wait_for(lambda left=left: pub.subscriber_count == 2 - left)

    def test_one_with_several_topics_counts_once(self):
        with connected(["/a", "/b", "/c"]) as (pub, _):
            assert pub.subscriber_count == 1
            with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"], ["/b", "/d"]) as other:
                assert pub.wait_for_subscribers(2, DEADLINE)
                assert pub.subscriber_count == 2
                other.close()
                wait_for(lambda: pub.subscriber_count == 1)

    def test_whoever_is_counted_has_subscribed_to_all_its_topics(self):
        topics = [f"/topic{number:02}" for number in range(50)]
        with posttroll.Publisher("tcp://*:0") as pub:
            for _ in range(10):
                with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"], topics) as sub:
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    pub.send(text_message("last", topics[-1]))
                    pub.send(text_message("first", topics[0]))
                    assert received_data(sub, 2) == ["last", "first"]
                wait_for(lambda: pub.subscriber_count == 0)

    def test_subscribers_of_other_programs_count_too(self):
        with posttroll.Publisher("tcp://*:0") as pub, zmq.Context() as context, context.socket(zmq.SUB) as sock:
            sock.linger = 0
            sock.subscribe(b"pytroll:/")
            sock.connect(f"tcp://127.0.0.1:{pub.port_number}")
            assert pub.wait_for_subscribers(1, DEADLINE)
            pub.send(text_message("hello"))
            assert sock.poll(DEADLINE * 1000)

    def test_the_first_is_noticed_by_who_sends(self):
        """To send takes the news that somebody has come, of which the loop, which is busy here, hears nothing then."""
        found, is_free = threading.Event(), threading.Event()
        with posttroll.Publisher("tcp://*:0") as pub, zmq.Context() as context, context.socket(zmq.SUB) as sock:
            pub._use(lambda audience: audience.when_there_are(1, found.set))
            pub._audience.loop.call(lambda: is_free.wait(DEADLINE))
            try:
                for _ in range(2):  # the loop is to look after that
                    pub.send(text_message("nobody hears it"))
                sock.linger = 0
                sock.subscribe(b"pytroll:/")
                sock.connect(f"tcp://127.0.0.1:{pub.port_number}")
                wait_for(lambda: pub.send(text_message("hello")) or sock.poll(10))
                assert found.is_set()
            finally:
                is_free.set()

    def test_in_vain(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            assert pub.wait_for_subscribers(1, 0) is False
            assert pub.wait_for_subscribers(1, 0.02) is False
            assert pub.wait_for_subscribers(0, 0) is True
            assert pub.subscriber_count == 0

    def test_stop_ends_the_waiting(self):
        pub = posttroll.Publisher("tcp://*:0").start()
        results: list[bool] = []
        with in_thread(lambda: results.append(pub.wait_for_subscribers())):
            wait_for(lambda: pub._audience._waiting)
            pub.stop()
        assert results == [False]

    @pytest.mark.parametrize("has_come", [True, False])
    def test_the_event_loop_of_who_waits_is_closed(self, has_come, caplog):
        """Nobody is told when somebody comes, or when it stops; nobody else is concerned."""
        loop = asyncio.new_event_loop()
        pub = posttroll.Publisher("tcp://*:0").start()
        waiting = loop.create_task(pub.wait_for_subscribers_async())
        while not pub._audience._waiting:
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        if has_come:
            with posttroll.Subscriber([local_address(pub.port_number)]):
                assert pub.wait_for_subscribers(1, DEADLINE)
                wait_for(lambda: not pub._audience._waiting)
        pub.stop()
        assert caplog.text == ""
        waiting._log_destroy_pending = False
        waiting.get_coro().close()

    def test_sending_goes_on_while_somebody_waits(self):
        with connected() as (pub, sub), in_thread(lambda: pub.wait_for_subscribers(2, DEADLINE)):
            pub.send(text_message("in the meantime"))
            assert received_data(sub) == ["in the meantime"]
            with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]):
                wait_for(lambda: pub.subscriber_count == 2)

    def test_what_strangers_send_to_a_publisher_does_not_matter(self):
        """A stranger sends junk where subscriptions are expected, and forged marks of subscribers."""
        with connected() as (pub, sub), zmq.Context() as context, context.socket(zmq.XSUB) as stranger:
            stranger.linger = 0
            stranger.connect(f"tcp://127.0.0.1:{pub.port_number}")
            for junk in (b"", b"\x02", b"\x00never subscribed", b"x" * 10000, b"\x01\xff\xfe"):
                stranger.send(junk)
            assert pub.wait_for_subscribers(2, DEADLINE)
            pub.send(text_message("good"))
            assert received_data(sub) == ["good"]
        wait_for(lambda: pub.subscriber_count == 0)


class TestInquiry:
    @contextlib.contextmanager
    def asking(self, pub: Any) -> Iterator[posttroll.Inquiry]:
        with contextlib.closing(posttroll.Inquiry(local_address(pub.port_number))) as inquiry:
            yield inquiry

    def test_what_is_told(self):
        with connected(["/a", "b"]) as (pub, sub), raw_socket(zmq.SUB, pub.port_number) as other:
            other.subscribe(b"pytroll://a/b")
            wait_for(lambda: pub.subscriber_count == 2)
            pub.send(text_message("x"))
            assert received_data(sub) == ["x"]  # it has told its topics by the time that it hears nothing more
            assert next(sub.recv(0.1)) is None
            with self.asking(pub) as inquiry:
                about = inquiry.ask(DEADLINE)
        assert about == {
            "version": posttroll.__version__,
            "name": "a_publisher",
            "subscribers": 2,
            "known": [{"host": LOOPBACK, "topics": ["/a", "/b"]}],
            "topics": {"/a": 1, "/b": 1, "/a/b": 1},
            "sent": 1,
            "kept": 1,
        }

    def test_who_asks_is_no_subscriber_and_leaves_nothing(self):
        """Who waits for a subscriber is not taken in."""
        with posttroll.Publisher("tcp://*:0") as pub, self.asking(pub) as inquiry:
            for _ in range(3):
                assert inquiry.ask(DEADLINE)["subscribers"] == 0
            assert not pub.wait_for_subscribers(1, 0.05)
            audience = pub._audience
            assert (audience.peers, audience._topics, audience._seen, audience._by_topic) == ({}, 0, set(), {})
        assert pub.reached == 0

    def test_topics_that_are_gone_are_not_told(self):
        with posttroll.Publisher("tcp://*:0") as pub, self.asking(pub) as inquiry:
            with posttroll.Subscriber([local_address(pub.port_number)], "/a"):
                wait_for(lambda: inquiry.ask(DEADLINE)["topics"] == {"/a": 1})
            wait_for(lambda: inquiry.ask(DEADLINE)["topics"] == {})

    def test_a_flood_of_questions_and_topics_is_bounded(self):
        """Subscribers go on to hear, and later questions are answered."""
        with connected() as (pub, sub), raw_socket(zmq.SUB, pub.port_number) as flood:
            flood.rcvhwm = 0
            for number in range(3000):
                flood.subscribe(b"~posttroll-subscriber/%016x/?" % number)
                flood.subscribe(b"pytroll://%d" % number)
            wait_for(lambda: pub.subscriber_count > 2000)
            pub.send(text_message("heard"))
            assert received_data(sub) == ["heard"]
            audience = pub._audience
            assert len(audience._by_topic) == audience.TOPICS
            with self.asking(pub) as inquiry:
                wait_for(lambda: inquiry.ask(0.2))
                assert len(inquiry.ask(DEADLINE)["topics"]) == audience.ANSWERS
            answers = 0
            while flood.poll(100):
                answers += flood.recv().startswith(b"~")
            assert 0 < answers < 3000

    @pytest.mark.parametrize("question", ["~posttroll-subscriber/?", "~posttroll-subscriber/xyz/?", "~?"])
    def test_what_is_no_question_is_not_answered(self, question):
        with posttroll.Publisher("tcp://*:0") as pub, raw_socket(zmq.SUB, pub.port_number) as other:
            other.subscribe(question.encode())
            with self.asking(pub) as inquiry:
                assert inquiry.ask(DEADLINE)  # so the other one has come
            assert not other.poll(50)

    def test_others_do_not_hear_the_answer(self):
        with posttroll.Publisher("tcp://*:0") as pub, raw_socket(zmq.SUB, pub.port_number) as other:
            for topic in (b"", b"~", b"~posttroll-subscriber/"):
                other.subscribe(topic)
            wait_for(lambda: pub.subscriber_count == 2)  # the last one is no topic
            with self.asking(pub) as inquiry:
                assert inquiry.ask(DEADLINE)
            assert not other.poll(50)

    def test_nobody_there_or_somebody_else(self):
        with raw_publisher() as (_, address):
            for where in (address, local_address(free_port())):
                with contextlib.closing(posttroll.Inquiry(where)) as inquiry:
                    assert inquiry.ask(0.05) is None

    @pytest.mark.parametrize("about", [b"", b"5", b"[]", b"{}", b'{"known": 5}', b"[" * 5000, b'{"known": [{}]}', None])
    def test_a_false_answer_is_none(self, about):
        """Anybody can be at an address."""
        good = {"version": "1", "name": "a", "subscribers": 1, "known": [], "topics": {"/a": 1}, "sent": "x", "kept": 1}
        text = json.dumps(good).encode() if about is None else about
        with zmq.Context() as context, context.socket(zmq.XPUB) as false:
            false.linger = 0
            port = false.bind_to_random_port("tcp://127.0.0.1")

            def answer() -> None:
                assert false.poll(1000 * DEADLINE)
                false.send(false.recv()[1:] + b"\0" + text)

            with in_thread(answer), contextlib.closing(posttroll.Inquiry(local_address(port))) as inquiry:
                assert inquiry.ask(DEADLINE) is None


class TestLoss:
    def test_a_full_queue_is_counted_and_logged_and_others_lose_nothing(self, caplog):
        """A subscriber that never reads: the publisher does not wait for it, and the other one gets everything."""
        with config.set(send_high_water_mark=2, receive_high_water_mark=2):
            with connected() as (pub, sub), zmq.Context() as context, context.socket(zmq.SUB) as slow:
                slow.linger = 0
                slow.setsockopt(zmq.RCVHWM, 1)
                slow.setsockopt(zmq.RCVBUF, 4096)
                slow.subscribe(b"")
                slow.connect(f"tcp://127.0.0.1:{pub.port_number}")
                assert pub.wait_for_subscribers(2, DEADLINE)
                for number in range(50):
                    pub.send(posttroll.Message("/a", "info", b"%02d" % number + bytes(1000000), binary=True))
                    [message] = receive(sub)
                    assert message.data[:2] == b"%02d" % number
                assert pub.dropped >= 1
        warnings = [record for record in caplog.records if "queue of a slow subscriber is full" in record.message]
        assert 1 <= len(warnings) <= 5  # not one for each
        assert warnings[0].name == "posttroll.publisher"

    def test_without_loss_nothing_is_counted(self):
        with connected() as (pub, sub):
            for number in range(100):
                pub.send(text_message(number))
            assert received_data(sub, 100) == list(range(100))
            assert pub.dropped == 0

    def test_without_subscribers_nothing_is_lost(self):
        with config.set(send_high_water_mark=1), posttroll.Publisher("tcp://*:0") as pub:
            for _ in range(100):
                pub.send(text_message("text"))
            assert pub.dropped == 0

    def test_a_burst_to_a_busy_subscriber(self):
        """What comes while it does something else waits in its queue."""
        with connected() as (pub, sub):
            for number in range(20000):
                pub.send(text_message([number, "x" * 500]))
            assert [data[0] for data in received_data(sub, 20000)] == list(range(20000))
            assert pub.dropped == 0

    @pytest.mark.parametrize("noisy", [False, True])
    def test_1000_sent_and_stop_at_once(self, noisy):
        pub: Any = posttroll.Publisher("tcp://*:0")
        if noisy:
            pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost"])
        pub.start()
        with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
            assert pub.wait_for_subscribers(1, DEADLINE)
            for number in range(1000):
                pub.send(text_message(number))
            pub.stop()
            assert received_data(sub, 1000) == list(range(1000))

    @pytest.mark.parametrize("end", ["", "raise KeyError", "sys.exit(3)"])
    @pytest.mark.parametrize("kind", ["Publisher('tcp://*:%d')", "NoisyPublisher('a', %d, nameservers=['localhost'])"])
    def test_a_program_that_ends_without_stopping_its_publisher(self, kind, end):
        """It ends, and what it has sent arrives."""
        port = free_port()
        code = f"""
import sys, posttroll
pub = posttroll.{kind % port}
pub.start()
assert pub.wait_for_subscribers(1, 20)
for number in range(1000):
    pub.send(posttroll.Message("/a", "info", number))
{end}
"""
        with posttroll.Subscriber([f"tcp://127.0.0.1:{port}"]) as sub, python(code) as running:
            assert received_data(sub, 1000) == list(range(1000))
            status, _, err = finish(running)
            assert status == {"": 0, "raise KeyError": 1, "sys.exit(3)": 3}[end]
            assert err.count("Traceback") == ("raise" in end)


class TestNoisyPublisher:
    def test_it_is_found_by_its_name_and_its_aliases(self):
        with nameserver(), posttroll.NoisyPublisher("a_name", aliases=["b", "c"], nameservers=["localhost"]) as pub:
            for name in ("a_name", "b", "c"):
                [found] = wait_for(lambda name=name: posttroll.get_pub_address(name))
                assert found["URI"].endswith(f":{pub.port_number}")
                assert found["name"] == "a_name"

    def test_an_alias_as_text(self):
        with nameserver(), posttroll.NoisyPublisher("a_name", aliases="alias", nameservers="localhost"):
            wait_for(lambda: posttroll.get_pub_address("alias"))

    def test_by_multicast(self):
        with nameserver(multicast_enabled=True), posttroll.NoisyPublisher("a_name", aliases=["b"]):
            wait_for(lambda: posttroll.get_pub_address("b"))

    def test_many_aliases_are_announced_whole(self):
        """An announcement of much more than 1,024 bytes."""
        aliases = [f"alias_number_{number}" for number in range(300)]
        with nameserver(multicast_enabled=True), posttroll.NoisyPublisher("a_name", aliases=aliases):
            [found] = wait_for(lambda: posttroll.get_pub_address(aliases[-1]))
            assert found["service"] == ["a_name", *aliases]

    def test_before_start(self):
        pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost"])
        assert pub.name == "a_name"
        pub.stop()
        for use in (lambda: pub.port_number, lambda: pub.send("text"), pub.heartbeat):
            with pytest.raises(RuntimeError, match="a_name is not started"):
                use()

    def test_start_twice_stop_twice_and_restart(self):
        pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost"], broadcast_interval=0.02)
        with nameserver():
            for _ in range(2):
                assert pub.start().start() is pub
                wait_for(lambda: [e for e in posttroll.get_pub_address("a_name") if str(pub.port_number) in e["URI"]])
                pub.stop()
                pub.close()

    def test_stop_is_prompt_while_the_nameserver_is_down(self):
        pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost", "no-such-host.invalid"]).start()
        start = time.monotonic()
        pub.stop()
        assert time.monotonic() - start < 5

    def test_a_forgotten_one_says_goodbye(self):
        with nameserver(), posttroll.Publisher("tcp://*:0"):  # the program goes on
            pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost"]).start()
            wait_for(lambda: posttroll.get_pub_address("a_name"))
            del pub
            wait_for(lambda: posttroll.get_pub_address("", timeout=DEADLINE) == [])

    def test_stop_in_the_midst_of_sending(self, monkeypatch):
        """By a signal handler: what was being sent still arrives, then it counts, and says goodbye."""
        order = []
        pub = posttroll.NoisyPublisher("a_name", nameservers=["localhost"]).start()
        drain, goodbye = pub._publisher._drain, pub._broadcaster._say_goodbye
        monkeypatch.setattr(pub._publisher, "_drain", lambda audience: drain(audience) or order.append("sent"))
        monkeypatch.setattr(pub._broadcaster, "_say_goodbye", lambda done: order.append("goodbye") or goodbye(done))
        with posttroll.Subscriber([local_address(pub.port_number)]) as sub:
            assert pub.wait_for_subscribers(1, DEADLINE)
            append = pub._publisher._audience.history.append
            monkeypatch.setattr(
                pub._publisher._audience.history, "append", lambda *args: pub.stop() or append(*args)
            )  # under the lock, as in a signal handler
            pub.send(text_message("the last one"))
            assert received_data(sub) == ["the last one"]
        assert (order, pub.reached, pub.dropped) == (["sent", "goodbye"], 1, 0)

    def test_what_it_hands_through(self):
        with posttroll.NoisyPublisher("a_name", nameservers=["localhost"]) as pub:
            with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                assert (pub.subscriber_count, pub.dropped) == (1, 0)
                pub.send_string(text_message("text"))
                pub.heartbeat()
                assert received_data(sub, 2) == ["text", {"min_interval": 0}]


class TestBinding:
    """A publisher is reached by the address that it is given; by all, if that is none of this host."""

    @staticmethod
    def reached_by(port: int | None) -> set[str]:
        found = set()
        for address in {*posttroll.get_local_ips(), "127.0.0.1", "127.0.0.2"}:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((address, port or 0)):
                found.add(address)
        return found

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2"])
    def test_an_address_for_this_host_only(self, host):
        with posttroll.Publisher(f"tcp://{host}:0") as pub:
            address = "127.0.0.1" if host.islower() or host.isupper() else host
            assert pub.address == f"tcp://{address}:0"
            assert self.reached_by(pub.port_number) == {address}

    def test_an_address_of_this_host(self):
        for address in posttroll.get_local_ips():
            with posttroll.Publisher(f"tcp://{address}:0") as pub:
                assert self.reached_by(pub.port_number) == {address}

    @pytest.mark.parametrize(
        "host", ["*", "0.0.0.0", "192.0.2.1", "somewhere.else.invalid", "224.0.0.1", "[2001:db8::1]"]
    )
    def test_what_is_no_address_of_this_host(self, host):
        with posttroll.Publisher(f"tcp://{host}:0") as pub:
            assert pub.address == "tcp://*:0"
            assert self.reached_by(pub.port_number) == {*posttroll.get_local_ips(), "127.0.0.1", "127.0.0.2"}

    def test_publishers_on_one_port_of_several_addresses(self):
        """Each with two subscribers, who hear their own publisher and no other."""
        port = free_port()
        hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
        with contextlib.ExitStack() as stack:
            pubs = {host: stack.enter_context(posttroll.Publisher(f"tcp://{host}:{port}")) for host in hosts}
            subs = [(host, stack.enter_context(posttroll.Subscriber([f"tcp://{host}:{port}"]))) for host in hosts * 2]
            for host, pub in pubs.items():
                assert pub.wait_for_subscribers(2, DEADLINE)
                pub.send(text_message(host))
            for pub in pubs.values():
                pub.send(text_message("end"))
            assert [received_data(sub, 2) for _, sub in subs] == [[host, "end"] for host, _ in subs]
            with pytest.raises(zmq.ZMQError, match=f"in use.*127.0.0.2:{port}"):
                posttroll.Publisher(f"tcp://127.0.0.2:{port}").start()

    def test_a_port_of_the_range_is_free_if_it_is_free_on_that_address(self):
        first = free_port()
        limits = {"min_port": first, "max_port": first + 1}
        with (
            posttroll.Publisher("tcp://127.0.0.1:0", **limits),
            posttroll.Publisher("tcp://127.0.0.2:0", **limits) as pub,
        ):
            assert pub.port_number == first
            with pytest.raises(zmq.ZMQError, match="are in use"):
                posttroll.Publisher("tcp://127.0.0.2:0", **limits).start()

    @pytest.mark.parametrize(
        "address", ["tcp://[some.name]:0", "tcp://[1.2.3.4]:0", "tcp://[::g]:0", "tcp://127.0.0.1"]
    )
    def test_what_is_no_address(self, address):
        with pytest.raises(ValueError, match="Cannot publish on"):
            posttroll.Publisher(address)


class TestPublishAndItsFactory:
    def test_publish_announces_itself(self):
        with nameserver(), posttroll.Publish("a_name", nameservers=["localhost"]) as pub:
            assert isinstance(pub, posttroll.NoisyPublisher)
            wait_for(lambda: posttroll.get_pub_address("a_name"))

    def test_an_exception_in_the_block_stops_it(self):
        with pytest.raises(KeyError), posttroll.Publish("a_name", nameservers=["localhost"]) as pub:
            raise KeyError
        with pytest.raises(RuntimeError):
            pub.send("text")

    def test_a_port_and_no_nameservers(self):
        port = free_port()
        pub = posttroll.create_publisher_from_dict_config({"port": port, "nameservers": False})
        assert isinstance(pub, posttroll.Publisher)
        assert pub.start().port_number == port
        pub.stop()

    @pytest.mark.parametrize("port", [None, 0, 9000])
    def test_an_address_and_no_nameservers(self, port, tmp_path):
        """Several at once, of both kinds, each with a subscriber: everybody hears its own."""
        with contextlib.ExitStack() as stack:
            addresses = [f"ipc://{tmp_path}/{number}" for number in range(2)]
            addresses += [f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.2:{free_port()}"]
            heard = []
            for address in addresses:
                settings = {"address": address, "nameservers": False, "name": "a_name", "min_port": 9000}
                if port is not None:
                    settings["port"] = port
                pub = stack.enter_context(posttroll.create_publisher_from_dict_config(settings))
                assert type(pub) is posttroll.Publisher
                sub = stack.enter_context(posttroll.Subscriber([address]))
                heard.append((pub, sub, address))
            for pub, _, address in heard:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message(address))
            assert [received_data(sub) for _, sub, _ in heard] == [[address] for address in addresses]

    @pytest.mark.parametrize("place", [{"port": 9000}, {"address": "tcp://*:9000"}])
    def test_an_unknown_setting_is_named(self, place):
        known = {"name": "a", "nameservers": False, "aliases": ["b"], "broadcast_interval": 2, "max_port": None}
        assert isinstance(posttroll.create_publisher_from_dict_config({**place, **known}), posttroll.Publisher)
        with pytest.raises(TypeError, match="'broadcast_intervall'"):
            posttroll.create_publisher_from_dict_config({**place, **known, "broadcast_intervall": 2})

    @pytest.mark.parametrize("name", ["a/b", "/a", "a/", "/"])
    def test_a_name_that_no_nameserver_would_take(self, name):
        for make in (posttroll.Publish, posttroll.NoisyPublisher):
            with pytest.raises(ValueError, match=f"without white space and '/' .*{name!r}"):
                make(name)

    def test_nameservers_on_other_ports(self, monkeypatch):
        """A publisher that registers with three on one host, each with ports of its own, two of them not configured."""
        with contextlib.ExitStack() as stack:
            places = [f"localhost:{config.get('broadcast_port')}"]
            lookups = [f"localhost:{config.get('nameserver_port')}"]
            stack.enter_context(nameserver_process("--no-multicast"))
            for _ in range(2):
                ports = {key: free_port() for key in ("nameserver_port", "address_publish_port", "broadcast_port")}
                words = [word for key, port in ports.items() for word in ("--set", f"{key}={port}")]
                stack.enter_context(nameserver_process("--no-multicast", *words))
                places.append(f"127.0.0.1:{ports['broadcast_port']}")
                lookups.append(f"127.0.0.1:{ports['nameserver_port']}")
            stack.enter_context(posttroll.Publish("everywhere", nameservers=places))
            stack.enter_context(posttroll.Publish("there", nameservers=[places[1], "localhost"]))
            for lookup, expected in zip(lookups, (["everywhere", "there"], ["everywhere", "there"], ["everywhere"])):
                wait_for(
                    lambda lookup=lookup, expected=expected: (
                        expected == sorted(entry["name"] for entry in posttroll.get_pub_address("", DEADLINE, lookup))
                    )
                )

    @pytest.mark.parametrize("nameservers", [["localhost"], "localhost", None, False])
    def test_a_name_without_a_port(self, nameservers):
        settings = {"name": "a_name", "port": 0, "nameservers": nameservers}
        assert isinstance(posttroll.create_publisher_from_dict_config(settings), posttroll.NoisyPublisher)

    @pytest.mark.parametrize("settings", [{}, {"port": 0, "nameservers": None}, {"name": ""}, {"nameservers": ["h"]}])
    def test_without_a_name(self, settings):
        with pytest.raises(KeyError, match="name"):
            posttroll.create_publisher_from_dict_config(settings)


# ======================================================================================================================
# 10. Connections; on several hosts see further below, under Catching up
# ======================================================================================================================


class TestGivenUpConnections:
    """ZeroMQ gives a connection up for good when the other side breaks the protocol."""

    def test_a_publisher_is_heard_after_another_program_had_its_port(self, monkeypatch):
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.2)
        port = free_port()
        with posttroll.Subscriber([f"tcp://127.0.0.1:{port}"]) as subscriber:
            with zmq.Context() as context, context.socket(zmq.REP) as other:
                monitor = other.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                other.bind(f"tcp://*:{port}")
                assert monitor.poll(DEADLINE * 1000)  # it has been connected, and has been given up
                other.disable_monitor()
                monitor.close(0)
            next(subscriber.recv(timeout=0.1))
            with posttroll.Publisher(f"tcp://*:{port}") as publisher:

                def is_heard() -> bool:
                    publisher.send(posttroll.Message("/a", "info", "x"))
                    return next(subscriber.recv(timeout=0.05)) is not None

                wait_for(is_heard)

    def test_one_that_is_given_up_each_time_does_not_fill_the_memory(self, monkeypatch):
        """What others send lies in ZeroMQ's queue, which has a bound, until it is handed out."""
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.02)
        monkeypatch.setattr(posttroll._Link, "LONGEST_RENEWAL", 0.02)
        with zmq.Context() as context, context.socket(zmq.REP) as other, posttroll.Publisher("tcp://*:0") as pub:
            address = f"tcp://127.0.0.1:{other.bind_to_random_port('tcp://*')}"
            with posttroll.Subscriber([local_address(pub.port_number), address]) as subscriber:
                assert pub.wait_for_subscribers(1, DEADLINE)
                given_up = next(link for (_, end), link in subscriber._connections._links.items() if end == address)
                for number in range(500):
                    pub.send(text_message(number))
                renewed = set()
                for number in range(50):
                    assert received_data(subscriber, 1) == [number]
                    time.sleep(0.01)
                    renewed.add(given_up.changed)
                assert len(renewed) > 2
                assert len(subscriber._inbox._unread) == 0

    def test_one_that_has_come_up_while_nobody_looked_is_not_renewed(self):
        """The program was busy with a message; what lies unread is not thrown away."""
        port = free_port()
        with posttroll.Subscriber([local_address(port)]) as subscriber:
            connections = subscriber._connections
            with zmq.Context() as context, context.socket(zmq.REP) as other:
                other.bind(f"tcp://*:{port}")
                links = connections._links
                wait_for(lambda: next(subscriber.recv(0.01)) is None and not next(iter(links.values())).is_tried)
            [((sock, endpoint), link)] = links.items()
            with raw_socket(zmq.XPUB) as publisher:
                publisher.bind(f"tcp://*:{port}")
                for _ in range(2):
                    link.changed = 0.0
                    connections._renew(sock, endpoint, next(iter(connections._wanted.values()))[0])
                    assert publisher.poll(DEADLINE * 1000)
                    for number in range(5):
                        publisher.send(text_message(number).encode())
                assert sorted(received_data(subscriber, 10)) == sorted([*range(5)] * 2)

    def test_a_connection_that_is_given_up_each_time_is_renewed_more_and_more_seldom(self, monkeypatch):
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.01)
        monkeypatch.setattr(posttroll._Link, "LONGEST_RENEWAL", 0.04)
        with zmq.Context() as context, context.socket(zmq.REP) as other:
            address = f"tcp://127.0.0.1:{other.bind_to_random_port('tcp://*')}"
            with posttroll.Subscriber([address]) as subscriber:

                def pauses() -> list[float]:
                    next(subscriber.recv(timeout=0.01))
                    return [link.pause for link in subscriber._connections._links.values()]

                wait_for(lambda: pauses() == [0.04])
                assert subscriber.addresses == [address]


WITHOUT_OWN_TWINS = posttroll._without_own_twins


class TestConnectionsThatFail:
    """ZeroMQ tries again, and does not tell why it could not."""

    @pytest.mark.skipif(os.name != "posix", reason="descriptors are of POSIX")
    def test_too_few_descriptors_are_told_of_and_once_there_are_more_all_are_heard(self):
        code = """if True:
            import logging, os, resource, sys, posttroll
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

            class Help(logging.Handler):
                def emit(self, record):
                    print(record.getMessage(), file=sys.stderr)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))

            logging.getLogger().addHandler(Help())
            limit = os.dup(0) + 25  # some of them for the sockets
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            with posttroll.Subscriber(sys.argv[1:], since=60) as subscriber:
                messages = subscriber.recv()
                print(limit, *[next(messages).data for _ in sys.argv[1:]])
            """
        with contextlib.ExitStack() as stack:
            publishers = [stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0")) for _ in range(30)]
            for number, publisher in enumerate(publishers):
                publisher.send(text_message(number))
            with python(code, *[local_address(publisher.port_number) for publisher in publishers]) as running:
                status, out, err = finish(running)
        assert status == 0, err
        limit, *heard = map(int, out.split())
        assert sorted(heard) == list(range(30))
        what = rf"Too many open files \(at most {limit}\): raise the limit"
        assert re.match(rf"Cannot connect to tcp://127.0.0.1:\d+ \(trying again\): {what}", err)

    def test_a_publisher_that_is_down_is_no_want_of_descriptors(self, monkeypatch, caplog):
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.1)
        with posttroll.Subscriber([local_address(free_port())]) as subscriber:
            [link] = subscriber._connections._links.values()
            with zmq.Context() as context, context.socket(zmq.REP) as other:
                other.bind(next(iter(subscriber._connections._links))[1])
                wait_for(lambda: next(subscriber.recv(0.01)) is None and not link.is_tried)
            wait_for(lambda: next(subscriber.recv(0.01)) is None and link.is_tried)
        assert "open files" not in caplog.text


class TestNamesWithSeveralAddresses:
    """As that of a headless service of Kubernetes, which stands for all its pods, or of a host on several networks."""

    @pytest.fixture(autouse=True)
    def names(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
        """What names stand for; it may change, and is looked up often.  The loopback network stands for others."""
        names: dict[str, list[str]] = {}
        resolve = socket.getaddrinfo

        def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
            if host not in names:
                return resolve(host, *args, **kwargs)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 0)) for number in names[host]]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(posttroll, "_without_own_twins", lambda endpoints: endpoints)
        monkeypatch.setattr(posttroll._Resolution, "RETRY", 0.05)
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.1)
        monkeypatch.setattr(posttroll._Connections, "LOOK_AGAIN", 1.05)
        return names

    @staticmethod
    def connected(subscriber: posttroll.Subscriber) -> list[str]:
        """Return the hosts that it is connected to."""
        subscriber_links = subscriber._connections._links
        return sorted(endpoint[6:].partition(":")[0] for (_, endpoint), link in subscriber_links.items() if link.is_up)

    @staticmethod
    def until(subscriber: posttroll.Subscriber, condition: Callable[[], Any]) -> list[Any]:
        """Receive until *condition* holds; return the data of what came."""
        messages: list[Any] = []
        wait_for(lambda: messages.append(next(subscriber.recv(0.02))) or condition())
        return [message.data for message in messages if message is not None]

    def test_all_are_connected(self, names):
        port = free_port()
        names["pods"] = hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        with contextlib.ExitStack() as stack:
            publishers = [stack.enter_context(posttroll.Publisher(f"tcp://{host}:{port}")) for host in hosts]
            sub = stack.enter_context(posttroll.Subscriber([f"tcp://pods:{port}"]))
            self.until(sub, lambda: self.connected(sub) == hosts)
            for number, publisher in enumerate(publishers):
                publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(Message("/a", "b", number))
            assert sorted(message.data for message in receive(sub, 3)) == [0, 1, 2]
            assert sub.addresses == [f"tcp://pods:{port}"]
            sub.remove(f"tcp://pods:{port}")
            assert sub.subscribers == []
            wait_for(lambda: not any(publisher.subscriber_count for publisher in publishers))

    def test_they_are_let_go_and_come_again(self, names, monkeypatch):
        """In another order: each has its own again, of which it is known what has come."""
        monkeypatch.setattr(posttroll._Twins, "LIMIT", 1)
        port = free_port()
        names["pods"] = hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        address = f"tcp://pods:{port}"
        with contextlib.ExitStack() as stack:
            publishers = [stack.enter_context(posttroll.Publisher(f"tcp://{host}:{port}")) for host in hosts]
            sub = stack.enter_context(posttroll.Subscriber([address]))
            self.until(sub, lambda: self.connected(sub) == hosts)
            for number, publisher in enumerate(publishers):
                publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(Message("/a", "b", number))
            assert sorted(message.data for message in receive(sub, 3)) == [0, 1, 2]
            self.until(sub, lambda: positions_of(sub) == [1, 1, 1])
            sub.remove(address)
            wait_for(lambda: not any(publisher.subscriber_count for publisher in publishers))
            names["pods"] = hosts[::-1]
            for publisher in publishers:
                publisher.send(Message("/a", "b", "away"))
            sub._add(address, None, sub._begin)
            assert [message.data for message in receive(sub, 3)] == ["away"] * 3
            self.until(sub, lambda: sub.up_to_date == 3)
            assert sub.caught_up == 3

    def test_they_come_and_go(self, names):
        port = free_port()
        names["pods"] = ["127.0.0.2"]
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(posttroll.Publisher(f"tcp://127.0.0.2:{port}"))
            sub = stack.enter_context(posttroll.Subscriber([f"tcp://pods:{port}"]))
            self.until(sub, lambda: self.connected(sub) == ["127.0.0.2"])
            second = stack.enter_context(posttroll.Publisher(f"tcp://127.0.0.3:{port}"))
            names["pods"] = ["127.0.0.3", "127.0.0.2"]
            self.until(sub, lambda: self.connected(sub) == ["127.0.0.2", "127.0.0.3"])
            names["pods"] = ["127.0.0.3"]
            wait_for(lambda: len(sub._connections._names[f"tcp://pods:{port}"].endpoints) == 1 or next(sub.recv(0.02)))
            self.until(sub, lambda: True)
            for number in range(500):  # it is not in the name any more, but it lives
                first.send(Message("/a", "b", number))
                second.send(Message("/a", "b", -1))
            first.stop()
            heard = self.until(sub, lambda: len(sub._connections._connected[f"tcp://pods:{port}"]) == 1)
            heard += [message.data for message in receive(sub, 1000 - len(heard))]
            assert [number for number in heard if number >= 0] == list(range(500))
            assert len(heard) == 1000
            assert self.connected(sub) == ["127.0.0.3"]
            third = stack.enter_context(posttroll.Publisher(f"tcp://127.0.0.4:{port}"))
            names["pods"] = ["127.0.0.4", "127.0.0.3"]
            self.until(sub, lambda: self.connected(sub) == ["127.0.0.3", "127.0.0.4"])
            assert len(sub.subscribers) == 2  # the socket of the one that has gone is used again
            third.send(Message("/a", "b", "third"))
            assert receive(sub)[0].data == "third"

    def test_a_host_with_several_addresses_is_heard_once(self, names):
        port = free_port()
        names["host"] = ["127.0.0.2", "127.0.0.3"]
        with posttroll.Publisher(f"tcp://*:{port}") as pub, posttroll.Subscriber([f"tcp://host:{port}"]) as sub:
            self.until(sub, lambda: self.connected(sub) == ["127.0.0.2", "127.0.0.3"] and pub.subscriber_count == 2)
            messages = [Message("/a", "b", number) for number in range(200)]
            for message in messages:
                pub.send(message)
            pub.send(messages[-1])  # on purpose
            pub.send(Message("/a", "b", "end"))
            heard = self.until(sub, lambda: sub._inbox._streams == [] and not sub._inbox.accepted)
            heard += [message.data for message in receive(sub, 202 - len(heard), 5)]
            assert heard == [*range(200), 199, "end"]
            pub.send(Message("/a", "b", "the last"))
            assert [message.data for message in receive(sub, 2, 0.5)] == ["the last"]

    def test_many_names_have_their_turn(self, names, monkeypatch):
        """However many are asked for at once: here one, and each takes a while."""
        monkeypatch.setattr(posttroll._Resolution, "_free_threads", threading.Semaphore(1))
        monkeypatch.setattr(posttroll._Connections, "ASK_SOON", 0.05)
        port = free_port()
        all_names = [f"name{number}" for number in range(30)]
        names.update({name: ["127.0.0.2"] for name in all_names})
        with posttroll.Publisher(f"tcp://*:{port}"):
            with posttroll.Subscriber([f"tcp://{name}:{port}" for name in all_names]) as sub:
                resolutions = sub._connections._names
                self.until(sub, lambda: all(resolution.endpoints for resolution in resolutions.values()))
                monkeypatch.setattr(posttroll._Link, "RENEWAL", 100)
                names.update({name: ["127.0.0.2", "127.0.0.3"] for name in all_names})
                self.until(sub, lambda: all(len(resolution.endpoints) == 2 for resolution in resolutions.values()))

    def test_of_its_own_addresses_a_host_uses_one(self, names, monkeypatch):
        port = free_port()
        monkeypatch.setattr(posttroll, "_without_own_twins", WITHOUT_OWN_TWINS)
        monkeypatch.setattr(posttroll, "is_own_address", lambda address: address != "127.0.0.4")
        names["host"] = ["127.0.0.3", "127.0.0.4", "127.0.0.2"]
        with posttroll.Publisher(f"tcp://*:{port}"), posttroll.Subscriber([f"tcp://host:{port}"]) as sub:
            self.until(sub, lambda: self.connected(sub) == ["127.0.0.2", "127.0.0.4"])
            names["host"] = ["127.0.0.2", "127.0.0.4", "127.0.0.3"]
            self.until(sub, lambda: sub._connections._timer is not None)
            assert self.connected(sub) == ["127.0.0.2", "127.0.0.4"]


# ======================================================================================================================
# 11. Subscribing
# ======================================================================================================================


class TestSubscriber:
    def test_what_is_caught_up_and_who_is_up_to_date(self):
        """Only publishers of ours tell of the past, and that there is no more of it."""
        with posttroll.Publisher("tcp://*:0") as pub, zmq.Context() as context, context.socket(zmq.PUB) as other:
            for number in range(5):
                pub.send(text_message(number))
            port = other.bind_to_random_port("tcp://127.0.0.1")
            addresses = [local_address(pub.port_number), local_address(port)]
            with posttroll.Subscriber(addresses, since=60) as sub:
                assert (sub.caught_up, sub.up_to_date) == (0, 0)
                assert received_data(sub, 5) == [0, 1, 2, 3, 4]
                wait_for(lambda: next(sub.recv(0.01)) is None and sub.up_to_date == 1)
                pub.send(text_message("live"))
                assert received_data(sub) == ["live"]
                assert (sub.caught_up, sub.up_to_date, sub.missed) == (5, 1, 0)

    def test_who_has_only_said_hello_is_not_up_to_date(self):
        with zmq.Context() as context, context.socket(zmq.XPUB) as sock:
            sock.linger = 0
            port = sock.bind_to_random_port("tcp://127.0.0.1")
            with posttroll.Subscriber([local_address(port)]) as sub:
                mark = wait_for(lambda: next(sub.recv(0.01)) or (sock.poll(0) and sock.recv()[1:]))
                while not mark.startswith(posttroll._MARK):
                    mark = sock.recv()[1:]
                sock.send(mark + b"\0H 0123456789abcdef 0 0 0 0 a_publisher")
                wait_for(lambda: next(sub.recv(0.01)) or sock.poll(0))  # it asks
                assert sub.up_to_date == 0
                sock.send(mark + b"\0E 0123456789abcdef 0 1 0 0 1")
                wait_for(lambda: next(sub.recv(0.01)) or sub.up_to_date)
                assert sub.up_to_date == 1

    def test_messages_that_come_together_after_a_silence(self, monkeypatch):
        """Each is taken alone, without trying whether there is another one, and all of them come."""
        monkeypatch.setattr(posttroll._Inbox, "SILENCE", -1)  # it is always silent
        with connected() as (pub, sub):
            assert next(sub.recv(0.05)) is None
            (stream,) = sub._streams.values()
            recv, in_vain = stream.recv, []

            def receive_counting(flags: int) -> bytes:
                try:
                    return recv(flags)
                except zmq.Again:
                    in_vain.append(flags)
                    raise

            stream.recv = receive_counting
            for number in range(50):
                pub.send(text_message(number))
            assert received_data(sub, 50) == list(range(50))
            assert in_vain == []

    def test_last_heard(self):
        """Messages and heartbeats count, also those that the filter skips, but not those of other topics."""
        with connected(["/a", "/heartbeat"], message_filter=lambda message: message.subject != "/a/skipped") as pair:
            publisher, sub = pair
            assert sub.last_heard is None
            assert next(sub.recv(0.05)) is None
            assert sub.last_heard is None
            publisher.send(text_message("text"))
            assert received_data(sub) == ["text"]
            for send in (lambda: publisher.send(text_message("text", "/a/skipped")), publisher.heartbeat):
                wait_for(lambda: next(sub.recv(0.06)) is None)  # so what came before is in an earlier batch
                start = time.monotonic()
                send()
                wait_for(lambda: next(sub.recv(0.01)) or sub.last_heard >= start - 0.05)  # noqa: B023
                assert start - 0.05 <= sub.last_heard <= time.monotonic()
            before = sub.last_heard
            publisher.send(text_message("text", "/b"))
            publisher.send("pytroll://a but no message")
            assert next(sub.recv(0.2)) is None
            assert sub.last_heard == before

    def test_topics_are_the_beginnings_of_subjects(self):
        with connected(["/one", "two", "pytroll://three"]) as (pub, sub):
            for subject in ("/zero", "/one", "/one/and/more", "/other", "/two", "/three", "/onerous"):
                pub.send(text_message(subject, subject))
            assert received_data(sub, 5) == ["/one", "/one/and/more", "/two", "/three", "/onerous"]

    def test_a_timeout_yields_none_and_goes_on(self):
        with connected() as (pub, sub):
            messages = sub.recv(timeout=0.01)
            assert [next(messages), next(messages)] == [None, None]
            pub.send(text_message("after that"))
            assert next(message for message in messages if message).data == "after that"

    def test_calling_and_iterating(self):
        with connected() as (pub, sub):
            for number in range(3):
                pub.send(text_message(number))
            assert next(sub(timeout=DEADLINE)).data == 0
            assert next(sub()).data == 1
            assert next(iter(sub)).data == 2

    def test_leaving_the_loop_loses_nothing(self):
        with connected() as (pub, sub):
            for number in range(50):
                pub.send(text_message(number))
            for number in range(50):
                for message in sub.recv(timeout=DEADLINE):
                    assert message.data == number
                    break
            assert not sub.running

    def test_running(self):
        with connected() as (pub, sub):
            assert not sub.running
            pub.send(text_message("text"))
            for _ in sub.recv(timeout=DEADLINE):
                assert sub.running
                sub.stop()
            assert not sub.running

    def test_add_remove_update_and_what_it_tells(self):
        with posttroll.Subscriber([]) as sub:
            one, two, three = (f"tcp://127.0.0.1:{number}" for number in (1, 2, 3))
            assert (sub.addresses, sub.subscribers) == ([], [])
            sub.add(one)
            sub.add(one)
            sub.add({"URI": two})
            assert sub.addresses == [one, two]
            assert len(sub.subscribers) == 1  # they share a socket
            sub.add(three, ["/other"])
            assert len(sub.subscribers) == 2
            sub.remove(three)
            sub.remove(three)
            sub.remove("tcp://never:1")
            assert sub.addresses == [one, two]
            assert sub.update([two, {"URI": three}]) is True
            assert sub.update([two, three]) is False
            assert sub.addresses == [two, three]
            assert sub.update([]) is True
            assert (sub.addresses, sub.subscribers) == ([], [])

    def test_addresses_in_every_form(self):
        for addresses in ("tcp://h:1", ["tcp://h:1"], ({"URI": "tcp://h:1"},), {"tcp://h:1"}):
            with posttroll.Subscriber(addresses) as sub:
                assert sub.addresses == ["tcp://h:1"]

    def test_adding_and_removing_while_another_thread_receives(self):
        with posttroll.Publisher("tcp://*:0") as first, posttroll.Publisher("tcp://*:0") as second:
            data: list[Any] = []
            sub = posttroll.Subscriber([])

            def consume() -> None:
                for message in sub.recv():
                    data.append(message.data)

            with in_thread(consume):
                for pub in (first, second):
                    sub.add(f"tcp://127.0.0.1:{pub.port_number}")
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    pub.send(text_message(pub.port_number))
                    wait_for(lambda pub=pub: data[-1:] == [pub.port_number])
                    sub.remove(f"tcp://127.0.0.1:{pub.port_number}")
                    wait_for(lambda pub=pub: pub.subscriber_count == 0)
                sub.close()

    def test_an_address_with_other_topics(self):
        with connected(["/a"]) as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
            sub.add(f"tcp://127.0.0.1:{other.port_number}", ["/b"])
            assert other.wait_for_subscribers(1, DEADLINE)
            for sender in (pub, other):
                sender.send(text_message(f"a from {sender.name}", "/a"))
                sender.send(text_message(f"b from {sender.name}", "/b"))
            assert sorted(received_data(sub, 2)) == ["a from a_publisher", "b from "]

    def test_topics_are_added_and_stay(self):
        """Also those of an address alone, when all are given once more."""
        with connected(["/a"]) as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
            first, second = (local_address(sender.port_number) for sender in (pub, other))
            sub.add(second, ["/b"])
            assert sub.update([first, second]) is False
            sub.add(first, ["/c"])
            for sender, topics in ((pub, 2), (other, 1)):
                wait_for(
                    lambda sender=sender, topics=topics: (
                        sender.subscriber_count and len(sender._audience._by_topic) == topics
                    )
                )
                for topic in ("/a", "/b", "/c"):
                    sender.send(text_message(topic, topic))
            assert sorted(received_data(sub, 3)) == ["/a", "/b", "/c"]

    def test_broken_messages_between_good_ones(self, caplog):
        """Every good one is delivered, and the log does not grow with the broken ones."""
        broken = [
            b"pytroll://a",
            b"pytroll://a info me@here never v1.01 text/ascii x",
            b"pytroll://a info me@here 2020-01-01T00:00:00 v9.0 text/ascii x",
            b"pytroll://a info me@here 2020-01-01T00:00:00 v1.01 application/json {",
            b"pytroll://a info me@here 2020-01-01T00:00:00 v1.01 application/json " + b"[" * 100000,
            b"pytroll:/\xff\xfe\x00",
        ]
        with connected() as (pub, sub):
            for number in range(60):
                pub.send(broken[number % len(broken)])
                pub.send(text_message(number))
            assert received_data(sub, 60) == list(range(60))
        assert 1 <= caplog.text.count("Skipped a bad message") <= 5

    def test_several_frames(self):
        """The first is the message; what a stranger appends does no harm."""
        with zmq.Context() as context, context.socket(zmq.PUB) as stranger:
            stranger.linger = 0
            port = stranger.bind_to_random_port("tcp://127.0.0.1")
            with posttroll.Subscriber([f"tcp://127.0.0.1:{port}"]) as sub:
                messages = sub.recv(timeout=0.05)
                for message in messages:
                    if message is not None:
                        break
                    stranger.send_multipart([text_message("good").encode(), b"junk"])
                assert message.data == "good"

    def test_translate(self):
        with connected(translate=True) as (pub, sub):
            pub.send("pytroll://a info me@elsewhere.example 2020-01-01T00:00:00 v1.01 text/ascii x")
            [message] = receive(sub)
            assert (message.sender, message.user, message.host) == ("me@127.0.0.1", "me", "127.0.0.1")

    def test_a_host_that_does_not_resolve_does_not_hold_up_others(self, caplog):
        with posttroll.Publisher("tcp://*:0") as pub:
            addresses = ["tcp://no-such-host.invalid:9000", f"tcp://127.0.0.1:{pub.port_number}"]
            with posttroll.Subscriber(addresses) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("text"))
                assert received_data(sub) == ["text"]
                assert sub.addresses == addresses
                wait_for(lambda: "no-such-host.invalid does not resolve" in caplog.text)

    def test_a_publisher_that_is_restarted_on_its_port_is_heard_again(self):
        """Killed, not stopped; its subscribers do nothing."""
        port = free_port()
        code = f"""
import posttroll, os, signal
with posttroll.Publisher("tcp://*:{port}") as pub:
    assert pub.wait_for_subscribers(1, 60)
    pub.send(posttroll.Message("/a", "info", "text"))
    signal.pause()
"""
        with posttroll.Subscriber([f"tcp://127.0.0.1:{port}"]) as sub:
            for _ in range(2):
                with python(code) as running:
                    assert received_data(sub) == ["text"]
                    running.kill()


class TestMessageFilter:
    @staticmethod
    def is_even(message: Any) -> bool:
        return message.data % 2 == 0

    def test_in_a_subscriber(self):
        with connected(message_filter=self.is_even) as (pub, sub):
            for number in range(6):
                pub.send(text_message(number))
            assert received_data(sub, 3) == [0, 2, 4]

    @pytest.mark.parametrize("kind", ["Subscribe", "NSSubscriber", "factory", "factory without nameserver"])
    def test_in_those_with_a_nameserver(self, kind):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
            if kind == "factory without nameserver":
                kwargs: dict[str, Any] = {"addresses": [f"tcp://127.0.0.1:{pub.port_number}"], "nameserver": False}
            else:
                kwargs = {"services": "a_service"}
            kwargs.update(message_filter=self.is_even)
            if kind.startswith("factory"):
                context: Any = posttroll.create_subscriber_from_dict_config(kwargs)
            else:
                context = getattr(posttroll, kind)(**kwargs)
            with context as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                for number in range(6):
                    pub.send(text_message(number))
                assert received_data(sub, 3) == [0, 2, 4]

    def test_with_asyncio(self):
        async def consume(sub: Any) -> list[int]:
            numbers = [(await sub.receive(DEADLINE)).data]
            async for message in sub:
                numbers.append(message.data)
                if len(numbers) == 3:
                    return numbers
            raise AssertionError

        with connected(message_filter=self.is_even) as (pub, sub):
            for number in range(6):
                pub.send(text_message(number))
            assert asyncio.run(consume(sub)) == [0, 2, 4]

    def test_the_time_of_refused_messages_does_not_count_as_received(self):
        """A stream of refused messages does not put off the timeout for ever."""
        end = threading.Event()
        with connected(message_filter=lambda message: False) as (pub, sub):

            def send() -> None:
                while not end.wait(0.01):
                    pub.send(text_message("refused"))

            with in_thread(send):
                try:
                    assert next(sub.recv(timeout=0.1)) is None
                finally:
                    end.set()


def copy_of(uid: Any, seconds: float = 0, **kwargs: Any) -> posttroll.Message:
    """Return one of several messages about *uid*, made so many seconds after noon."""
    message = posttroll.Message("/a", "file", {"uid": uid, "of": {"pass": 7}}, **kwargs)
    message.time = datetime(2026, 11, 24, 12, tzinfo=timezone.utc) + timedelta(seconds=seconds)
    return message


class TestUnique:
    def test_one_of_two_copies(self):
        is_new = posttroll.unique("uid", seconds=300)
        copies = [copy_of("a"), copy_of("b", 1), copy_of("a", 2), copy_of("b", -299)]
        assert list(map(is_new, copies)) == [True, True, False, False]
        assert is_new.dropped == 2

    def test_what_is_sent_anew_is_no_copy(self):
        """Also when all of it is caught up at once, publisher by publisher."""
        is_new = posttroll.unique("uid", seconds=10)
        times = [0, 10, 10.1, 20, 500, 1, 505]
        assert [is_new(copy_of("a", seconds)) for seconds in times] == [True, False, True, False, True, False, False]

    @pytest.mark.parametrize("data", ["uid", {"other": 1}, {"uid": None}, {}, ["uid"], 5, b"uid"])
    def test_messages_without_the_key_pass(self, data):
        is_new = posttroll.unique("uid")
        assert [is_new(posttroll.Message("/a", "info", data)) for _ in range(3)] == [True] * 3
        assert is_new.dropped == 0

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("a.b", {"a": {"b": 1}}),
            ("a.b", {"a.b": 1}),
            ("a.1.b", {"a": [0, {"b": 1}]}),
            ("uid", {"uid": {"list": [1, datetime(2026, 1, 1, tzinfo=timezone.utc)]}}),
            (lambda message: message.data["uid"], {"uid": 1}),
            (lambda message: (message.subject, message.data), "text"),
        ],
    )
    def test_keys(self, key, value):
        is_new = posttroll.unique(key)
        assert [is_new(posttroll.Message("/a", "info", value)) for _ in range(2)] == [True, False]

    @pytest.mark.parametrize("values", [(1, "1"), ("a", "b"), (0, False), ([1], [2]), ("None", "null")])
    def test_different_values(self, values):
        is_new = posttroll.unique("uid")
        assert [is_new(copy_of(value)) for value in values] == [True, True]

    def test_names_in_another_order_are_the_same(self):
        is_new = posttroll.unique("uid")
        assert [is_new(copy_of(uid)) for uid in ({"a": 1, "b": 2}, {"b": 2, "a": 1})] == [True, False]

    def test_versions_with_and_without_time_zone(self):
        is_new = posttroll.unique("uid", seconds=1)
        without = posttroll.Message.decode(copy_of("a", version="v1.01").encode())
        assert without.time.tzinfo is None
        assert [is_new(without), is_new(copy_of("a"))] == [True, False]

    def test_memory_is_bounded(self):
        is_new = posttroll.unique("uid", limit=100)
        for number in range(1000):
            assert is_new(copy_of(number))
        assert len(is_new._passed) == len(is_new._order) == 100
        assert [is_new(copy_of(number)) for number in (999, 901, 5)] == [False, False, True]

    def test_what_is_old_is_forgotten(self, monkeypatch):
        is_new = posttroll.unique("uid", seconds=0.001)
        monkeypatch.setattr(is_new, "LATE", -0.001)
        for number in range(100):
            assert is_new(copy_of(number % 2))
        assert len(is_new._order) <= 2

    def test_in_several_threads(self):
        """Of 8 copies of each message exactly one passes."""
        is_new = posttroll.unique("uid")
        passed: list[int] = []
        begin = threading.Barrier(8)

        def run() -> None:
            begin.wait(DEADLINE)
            passed.extend(number for number in range(500) if is_new(copy_of(number)))

        with contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(in_thread(run))
        assert sorted(passed) == list(range(500))
        assert is_new.dropped == 7 * 500

    def test_two_antennas_over_one_subscriber_or_two(self):
        is_new = posttroll.unique("uid")
        with posttroll.Publisher("tcp://*:0", "north") as north, posttroll.Publisher("tcp://*:0", "south") as south:
            addresses = [local_address(pub.port_number) for pub in (north, south)]
            subscriber, own = posttroll.Subscriber, posttroll.unique("uid")
            with subscriber(addresses, "", is_new) as both, subscriber(addresses[:1], "", own) as other:
                assert north.wait_for_subscribers(2, DEADLINE)
                assert south.wait_for_subscribers(1, DEADLINE)
                for number in range(20):
                    north.send(copy_of(number))
                    south.send(copy_of(number, 2))
                for pub in (north, south):
                    pub.send(copy_of(pub.name))
                data = receive(both, 22)
                assert sorted(str(message.data["uid"]) for message in data) == sorted(
                    [*map(str, range(20)), "north", "south"]
                )
                assert len(receive(other, 21)) == 21  # a filter of its own
            with subscriber(addresses[:1], "", is_new) as one, subscriber(addresses[1:], "", is_new) as two:
                for pub in (north, south):
                    assert pub.wait_for_subscribers(1, DEADLINE)
                north.send(copy_of("shared"))
                south.send(copy_of("shared"))
                south.send(copy_of("end"))
                assert [message.data["uid"] for message in receive(one)] == ["shared"]
                assert [message.data["uid"] for message in receive(two)] == ["end"]


class TestHooks:
    def test_sub(self):
        with connected(["/a"]) as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
            called: list[Any] = []
            address = f"tcp://127.0.0.1:{other.port_number}"
            sub.add_hook_sub(address, ["/hooked"], lambda message: called.append((message.data, threading.get_ident())))
            other.wait_for_subscribers(1, DEADLINE)
            other.send(text_message("not for it", "/a"))
            other.send(b"pytroll://hooked broken")
            other.send(text_message("for the hook", "/hooked"))
            wait_for(lambda: next(sub.recv(timeout=0.01)) is None and called)
            pub.send(text_message("for the loop"))
            assert received_data(sub) == ["for the loop"]
            assert called == [("for the hook", threading.get_ident())]

    def test_pull(self):
        with connected() as (pub, sub):
            push, _, _ = posttroll.set_up_server_socket(zmq.PUSH, "inproc://commands")
            called: list[Any] = []
            sub.add_hook_pull("inproc://commands", lambda message: called.append(message.data))
            push.send(text_message("a command").encode())
            wait_for(lambda: next(sub.recv(timeout=0.01)) is None and called)
            assert called == ["a command"]
            pub.send(text_message("still there"))
            assert received_data(sub) == ["still there"]
            posttroll.close_socket(push)

    def test_a_hook_that_is_added_while_another_thread_receives(self):
        sub = posttroll.Subscriber([])
        called: list[Any] = []
        with posttroll.Publisher("tcp://*:0") as pub, in_thread(lambda: list(sub.recv())):
            wait_for(lambda: sub.running)
            sub.add_hook_sub(f"tcp://127.0.0.1:{pub.port_number}", [""], called.append)
            assert pub.wait_for_subscribers(1, DEADLINE)
            pub.send(text_message("text"))
            wait_for(lambda: called)
            sub.close()

    def test_a_hook_may_stop_the_subscriber(self):
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber([]) as sub:
            sub.add_hook_sub(f"tcp://127.0.0.1:{pub.port_number}", [""], lambda message: sub.stop())
            assert pub.wait_for_subscribers(1, DEADLINE)
            pub.send(text_message("text"))
            assert list(sub.recv()) == []

    def test_a_bad_address(self):
        with posttroll.Subscriber([]) as sub, pytest.raises(ValueError, match="Cannot connect to"):
            sub.add_hook_pull("nonsense", print)


class TestEndsOfSubscribers:
    @pytest.mark.parametrize("how", ["stop", "close"])
    @pytest.mark.parametrize("timeout", [None, 3600])
    def test_from_another_thread_while_it_waits(self, how, timeout):
        with posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            with in_thread(lambda: list(sub.recv(timeout=timeout))):
                wait_for(lambda: sub.running)
                getattr(sub, how)()
            assert not sub.running

    @pytest.mark.parametrize("how", ["stop", "close"])
    def test_from_another_thread_while_messages_come(self, how):
        end = threading.Event()
        with connected() as (pub, sub):

            def send() -> None:
                while not end.is_set():
                    pub.send(text_message("text"))

            with in_thread(send):
                try:
                    with in_thread(lambda: [None for _ in sub.recv()]):
                        wait_for(lambda: sub.running)
                        getattr(sub, how)()
                finally:
                    end.set()

    def test_receiving_again_after_stop(self):
        with connected() as (pub, sub):
            for number in range(3):
                pub.send(text_message(number))
                for message in sub.recv():
                    assert message.data == number
                    sub.stop()
                    sub.stop()

    def test_close_twice_and_receiving_after_it(self):
        sub = posttroll.Subscriber(["tcp://127.0.0.1:1"])
        sub.stop()
        for _ in range(2):
            sub.close()
        assert list(sub.recv()) == list(sub.recv(timeout=1)) == []
        sub.stop()
        sub.add("tcp://127.0.0.1:2")
        sub.remove("tcp://127.0.0.1:2")

    def test_close_inside_the_loop(self):
        with connected() as (pub, sub):
            for _ in range(5):
                pub.send(text_message("text"))
            messages = sub.recv()
            next(messages)
            sub.close()
            assert list(messages) == []

    def test_an_exception_in_the_block(self):
        with pytest.raises(KeyError), posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            next(sub.recv(timeout=0))
            raise KeyError
        assert list(sub.recv()) == []

    @pytest.mark.parametrize("how", ["stop", "close"])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_from_a_signal_handler(self, how, number):
        code = f"""
import os, posttroll, signal, threading, time
sub = posttroll.Subscriber(["tcp://127.0.0.1:1"])
signal.signal({int(number)}, lambda *_: sub.{how}())
def interrupt():
    while not sub.running:
        time.sleep(0.001)
    os.kill(os.getpid(), {int(number)})
threading.Thread(target=interrupt).start()
for message in sub.recv():
    pass
print("the loop has ended")
sub.close()
"""
        with python(code) as running:
            assert finish(running) == (0, "the loop has ended\n", "")

    def test_ctrl_c_in_a_loop(self):
        code = """
import posttroll
try:
    with posttroll.Subscribe(None, addresses=["tcp://127.0.0.1:1"]) as sub:
        print("ready", flush=True)
        for message in sub.recv():
            pass
except KeyboardInterrupt:
    print("terminating")
"""
        with python(code) as running:
            await_line(running, "ready")
            running.send_signal(signal.SIGINT)
            assert finish(running) == (0, "terminating\n", "")

    def test_a_program_that_ends_without_closing(self):
        code = """
import posttroll
posttroll.get_own_ip()
sub = posttroll.Subscriber(["tcp://127.0.0.1:1", "tcp://no-such-host.invalid:1"])
following = posttroll.NSSubscriber("a_service", addr_listener=True, timeout=0).start()
listening = posttroll.ListenerContainer(topics=["/a"])
publisher = posttroll.NoisyPublisher("name", nameservers=["localhost"]).start()
next(sub.recv(timeout=0))
messages = following.recv(timeout=0.01)
next(messages)
"""
        with python(code) as running:
            status, out, err = finish(running)
            assert (status, out, [line for line in err.splitlines() if "Can't get any address" not in line]) == (
                0,
                "",
                [line for line in err.splitlines() if "resolve" in line or "Didn't get an address" in line],
            )


class TestAsyncio:
    def test_receive_and_iterate(self):
        async def consume(pub: Any, sub: Any) -> list[Any]:
            assert await sub.receive(0.01) is None
            for number in range(5):
                pub.send(text_message(number))
            data = [(await sub.receive(DEADLINE)).data, (await sub.receive()).data]
            async for message in sub:
                data.append(message.data)
                if len(data) == 5:
                    break
            return data

        with connected() as (pub, sub):
            assert asyncio.run(consume(pub, sub)) == list(range(5))

    def test_a_task_that_has_waited_does_not_forget_the_next_one(self):
        """The news that the last one has ended may come when another receiver has begun the next one."""

        async def consume(pub: Any, sub: Any) -> Any:
            receiving = asyncio.ensure_future(sub.receive(DEADLINE))
            while sub._turning is None:
                await asyncio.sleep(0)
            turning, earlier = sub._turning, asyncio.ensure_future(asyncio.sleep(0))
            await earlier
            sub._end_turning(earlier)
            assert sub._turning is turning
            pub.send(text_message("after that"))
            return await receiving

        with connected() as (pub, sub):
            assert asyncio.run(consume(pub, sub)).data == "after that"

    @pytest.mark.parametrize("how", ["stop", "close"])
    def test_the_end_from_another_thread(self, how):
        async def consume(sub: Any) -> None:
            async for _ in sub:
                pytest.fail("There is nobody who sends.")

        with posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:

            def end() -> None:
                wait_for(lambda: sub.running)
                getattr(sub, how)()

            with in_thread(end):
                asyncio.run(asyncio.wait_for(consume(sub), DEADLINE))

    @pytest.mark.parametrize("how", ["stop", "close"])
    def test_the_end_from_another_task(self, how):
        async def consume(sub: Any) -> Any:
            waiting = asyncio.ensure_future(sub.receive())
            while not sub.running:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            getattr(sub, how)()
            return await asyncio.wait_for(waiting, DEADLINE)

        with posttroll.Subscriber(["tcp://127.0.0.1:1"]) as sub:
            assert asyncio.run(consume(sub)) is None

    def test_a_cancelled_task(self):
        async def consume(pub: Any, sub: Any) -> Any:
            waiting = asyncio.ensure_future(sub.receive())
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            pub.send(text_message("after that"))
            return await sub.receive(DEADLINE)

        with connected() as (pub, sub):
            assert asyncio.run(consume(pub, sub)).data == "after that"

    def test_other_tasks_go_on(self):
        async def consume(pub: Any, sub: Any) -> Any:
            waiting = asyncio.ensure_future(sub.receive(DEADLINE))
            await asyncio.sleep(0.01)
            pub.send(text_message("from another task"))
            return await waiting

        with connected() as (pub, sub):
            assert asyncio.run(consume(pub, sub)).data == "from another task"

    def test_the_end_while_its_loop_stands_still(self, tmp_path):
        """As after Control-C in the midst of `run_until_complete`: the loop may run again, or never."""
        loop = asyncio.new_event_loop()
        with config.set(durable_directory=str(tmp_path)):
            sub = posttroll.Subscriber(["tcp://127.0.0.1:1"], durable="a_name")
            waiting = loop.create_task(sub.receive())
            while not sub._is_awaited:
                loop.run_until_complete(asyncio.sleep(0))
            sub.close()
            assert sub.subscribers == []
            posttroll.Subscriber([], durable="a_name").close()  # others can have it
            assert loop.run_until_complete(asyncio.wait_for(waiting, DEADLINE)) is None
        loop.close()

    def test_following(self):
        async def consume(sub: Any) -> Any:
            with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
                waiting = asyncio.ensure_future(sub.receive(DEADLINE))
                while not pub.subscriber_count:
                    await asyncio.sleep(0.01)
                pub.send(text_message("found"))
                return await waiting

        with posttroll.Subscribe("a_service", addr_listener=True, timeout=0) as sub:
            assert asyncio.run(consume(sub)).data == "found"


class TestContextsOfAsyncio:
    def test_they_start_and_end_without_waiting_in_the_thread(self):
        """No nameserver answers; what else the program does goes on at once."""

        async def talk():
            ticks = []

            async def tick():
                while True:
                    ticks.append(time.monotonic())
                    await asyncio.sleep(0.01)

            ticking = asyncio.ensure_future(tick())
            async with posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
                address = f"tcp://127.0.0.1:{pub.port_number}"
                async with posttroll.Subscribe("b_service", addresses=[address], timeout=DEADLINE) as sub:
                    assert await pub.wait_for_subscribers_async(1, DEADLINE)
                    assert not await pub.wait_for_subscribers_async(2, 0.1)
                    pub.send(text_message("here"))
                    assert (await sub.receive(DEADLINE)).data == "here"
                async with posttroll.NSSubscriber("b_service", timeout=DEADLINE) as sub:
                    assert await sub.receive(0) is None
                async with posttroll.Publisher("tcp://*:0") as plain, posttroll.Subscriber([]) as sub:
                    assert (plain.port_number is None, sub.addresses) == (False, [])
            ticking.cancel()
            return max(later - earlier for earlier, later in zip(ticks, ticks[1:]))

        assert asyncio.run(talk()) < DEADLINE / 4

    def test_without_async_it_waits(self):
        """In a program with an event loop, too, but not before it is used."""

        async def make():
            return posttroll.Subscribe("a_service", addresses=["tcp://127.0.0.1:1"], nameserver=False)

        context = asyncio.run(make())
        with context as sub:
            assert sub is context.subscriber
            assert sub.addresses == ["tcp://127.0.0.1:1"]


class TestSubscribeAndItsFactory:
    def test_it_gives_a_subscriber(self):
        with posttroll.Subscribe(None, addresses="tcp://127.0.0.1:1") as sub:
            assert type(sub) is posttroll.Subscriber

    @pytest.mark.parametrize(
        ("services", "expected"), [(None, ""), ([], ""), ("", "abc"), ("a", "a"), (["a", "c"], "ac")]
    )
    @pytest.mark.parametrize("listen", [False, True])
    def test_which_services(self, services, expected, listen):
        with nameserver(), contextlib.ExitStack() as stack:
            ports = {
                stack.enter_context(posttroll.Publish(name, nameservers=["localhost"])).port_number: name
                for name in "abc"
            }
            wait_for(lambda: len(posttroll.get_pub_address("")) == 3)
            with posttroll.Subscribe(services, addr_listener=listen, timeout=DEADLINE) as sub:
                names = sorted(ports[int(address.rpartition(":")[2])] for address in sub.addresses)
        assert names == list(expected)

    def test_more_addresses(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with posttroll.Subscribe("a", addresses=["tcp://127.0.0.1:1"]) as sub:
                assert sub.addresses == ["tcp://127.0.0.1:1", f"tcp://{posttroll.get_own_ip()}:{pub.port_number}"]

    def test_addresses_only(self):
        settings = {"addresses": ["tcp://127.0.0.1:1"], "nameserver": False}
        with posttroll.create_subscriber_from_dict_config(settings) as sub:
            assert type(sub) is posttroll.Subscriber
            assert sub.addresses == ["tcp://127.0.0.1:1"]

    @pytest.mark.parametrize("settings", [{"nameserver": False}, {"nameserver": False, "addresses": []}])
    def test_neither_address_nor_nameserver_asks_localhost(self, settings):
        """As chains of programs rely on; with several services, of which each of two subscribers wants its own."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(nameserver())
            pubs = [stack.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in "abc"]
            subs = [
                stack.enter_context(
                    posttroll.create_subscriber_from_dict_config({**settings, "services": name, "topics": "/x"})
                )
                for name in "ab"
            ]
            assert [len(sub.addresses) for sub in subs] == [1, 1]
            for pub in pubs[:2]:
                assert pub.wait_for_subscribers(1, DEADLINE)
            for name, pub in zip("abc", pubs):
                pub.send(text_message(name, "/x"))
            assert [received_data(sub) for sub in subs] == [["a"], ["b"]]

    def test_addresses_only_with_settings_for_others(self):
        """Those that some programs always give are known; one that nobody knows is named."""
        settings = {
            "addresses": ["tcp://127.0.0.1:1"],
            "nameserver": False,
            "port": 9000,
            "services": ["a"],
            "addr_listener": True,
            "timeout": 3,
            "topics": ["/a"],
            "message_filter": None,
            "translate": True,
        }
        with posttroll.create_subscriber_from_dict_config(settings) as sub:
            assert sub.addresses == ["tcp://127.0.0.1:1"]
        with pytest.raises(TypeError, match="'adresses'"):
            posttroll.create_subscriber_from_dict_config({**settings, "adresses": []})

    def test_a_nameserver_by_name(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]):
            settings = {"services": "a", "nameserver": "127.0.0.1"}
            with posttroll.create_subscriber_from_dict_config(settings) as sub:
                assert len(sub.addresses) == 1

    def test_no_nameserver_is_a_warning(self, caplog):
        with posttroll.Subscribe("a_service", timeout=0.01) as sub:
            assert sub.addresses == []
        assert "Can't get any address for a_service" in caplog.text

    def test_nobody_receives_for_a_while_is_no_warning(self, caplog, monkeypatch):
        """The nameserver's answer lies there, unread."""
        monkeypatch.setattr(posttroll._Follower, "SOON", 0.1)
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]):
            wait_for(lambda: posttroll.get_pub_address("a"))
            with posttroll.Subscribe("a", timeout=0) as sub:
                lookups = sub._loop._poller
                wait_for(lambda: lookups.poll(0))
                due = time.monotonic() + 0.2
                wait_for(lambda: time.monotonic() > due)
                next(sub.recv(0.5))
                assert len(sub.addresses) == 1
        assert not caplog.text

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.Subscribe("a", addresses=["nonsense"])
        with pytest.raises(ValueError, match="A topic is a text"):
            posttroll.Subscribe("a", topics=[5])
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.Subscribe("a", nameserver="not a host")

    def test_an_ns_subscriber(self):
        following = posttroll.NSSubscriber("a", timeout=0)
        following.stop()
        sub = following.start()
        assert following.start() is sub
        following.stop()
        following.close()
        assert list(sub.recv()) == []
        again = following.start()
        assert again is not sub
        following.close()

    def test_an_exception_in_the_block(self):
        with pytest.raises(KeyError), posttroll.Subscribe("a", timeout=0) as sub:
            raise KeyError
        assert list(sub.recv()) == []

    def test_translate(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with posttroll.Subscribe("a", translate=True) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send("pytroll://a info me@elsewhere.example 2020-01-01T00:00:00 v1.01 text/ascii x")
                assert receive(sub)[0].host == posttroll.get_own_ip()


@pytest.fixture
def impatient(monkeypatch):
    """Let subscribers look up more often than in real life, so that tests need not wait."""
    monkeypatch.setattr(posttroll._Follower, "SOON", 0.1)
    monkeypatch.setattr(posttroll._Follower, "SELDOM", 0.2)


@contextlib.contextmanager
def serving(sub: Any) -> Iterator[list[Any]]:
    """Receive in a thread; gives the list of the data that came."""
    data: list[Any] = []

    def consume() -> None:
        for message in sub.recv():
            data.append(message.data)

    with in_thread(consume):
        wait_for(lambda: sub.running)
        try:
            yield data
        finally:
            sub.stop()


def announced(**kwargs: Any) -> Any:
    """Return a context with a publisher of ``a_service`` that announces itself often."""
    return posttroll.Publish("a_service", broadcast_interval=0.1, **kwargs)


class TestFollowing:
    def check(self, pub: Any, data: list[Any], text: str) -> None:
        """Check that a message of *pub* arrives: the first one that it sends."""
        assert pub.wait_for_subscribers(1, DEADLINE)
        pub.send(text_message(text))
        wait_for(lambda: data[-1:] == [text])

    @pytest.mark.parametrize("listen", [True, False])
    @pytest.mark.parametrize("multicast_enabled", [True, False])
    def test_a_publisher_that_starts_after_the_subscriber(self, listen, multicast_enabled, impatient):
        with nameserver(multicast_enabled=multicast_enabled):
            with posttroll.Subscribe("a_service", addr_listener=listen, timeout=0) as sub, serving(sub) as data:
                with announced(nameservers=None if multicast_enabled else ["localhost"]) as pub:
                    self.check(pub, data, "first")

    @pytest.mark.parametrize("listen", [True, False])
    def test_a_nameserver_that_starts_after_the_subscriber(self, listen, impatient):
        with posttroll.Subscribe("a_service", addr_listener=listen, timeout=0) as sub, serving(sub) as data:
            with announced(nameservers=["localhost"]) as pub, nameserver():
                self.check(pub, data, "first")

    def test_all_services(self):
        with nameserver(), posttroll.Subscribe("", addr_listener=True, timeout=0) as sub, serving(sub) as data:
            for name in ("a", "b"):
                with posttroll.Publish(name, nameservers=["localhost"]) as pub:
                    self.check(pub, data, name)

    @pytest.mark.parametrize("listen", [True, False])
    def test_a_publisher_that_restarts_on_another_port(self, listen, impatient):
        with nameserver(), posttroll.Subscribe("a_service", addr_listener=listen, timeout=0) as sub:
            with serving(sub) as data:
                for number in range(3):
                    with announced(nameservers=["localhost"]) as pub:
                        self.check(pub, data, f"number {number}")

    def test_a_publisher_that_restarts_on_its_port(self):
        port = free_port()
        with nameserver(), posttroll.Subscribe("a_service", addr_listener=True, timeout=0) as sub:
            with serving(sub) as data:
                for number in range(3):
                    with announced(port=port, nameservers=["localhost"]) as pub:
                        self.check(pub, data, f"number {number}")
                assert len(sub.addresses) == 1

    @pytest.mark.parametrize("multicast_enabled", [True, False])
    def test_a_nameserver_that_is_killed_and_restarted(self, multicast_enabled):
        """Publishers are registered again, and running subscribers hear of new ones."""
        arguments = [] if multicast_enabled else ["--no-multicast"]
        nameservers = None if multicast_enabled else ["localhost"]
        with posttroll.Subscribe("a_service", addr_listener=True, timeout=0) as sub, serving(sub) as data:
            with nameserver_process(*arguments) as server, announced(nameservers=nameservers) as old:
                self.check(old, data, "old")
                server.kill()
                server.wait()
                with nameserver_process(*arguments):
                    wait_for(lambda: posttroll.get_pub_address("a_service", timeout=DEADLINE))
                    with announced(nameservers=nameservers) as new:
                        self.check(new, data, "new")
                        self.check(old, data, "old again")

    def test_without_its_nameserver_it_keeps_its_publishers(self):
        with posttroll.Subscribe("a_service", addr_listener=True, timeout=0) as sub, serving(sub) as data:
            with announced(nameservers=["localhost"]) as pub:
                with nameserver():
                    self.check(pub, data, "with nameserver")
                self.check(pub, data, "without")

    def test_any_order_of_start_again_and_again(self):
        """No first message is lost, without a pause anywhere."""
        orders = [list(order) for order in ("psn", "pns", "spn", "snp", "nps", "nsp")]
        for number in range(24):
            with contextlib.ExitStack() as stack:
                started: dict[str, Any] = {}
                for what in orders[number % len(orders)]:
                    if what == "p":
                        started[what] = stack.enter_context(announced(nameservers=["localhost"]))
                    elif what == "s":
                        context = posttroll.Subscribe("a_service", addr_listener=True, timeout=0)
                        data = stack.enter_context(serving(stack.enter_context(context)))
                    else:
                        stack.enter_context(nameserver())
                self.check(started["p"], data, f"number {number}")
                assert data == [f"number {number}"]

    def test_a_vanished_publisher_is_removed_after_max_age(self, monkeypatch):
        monkeypatch.setattr(posttroll._Follower, "SELDOM", 1.0)  # it may not listen yet when it is told
        with nameserver(max_age=0.3), posttroll.Subscribe("a", addr_listener=True, timeout=0) as sub, serving(sub):
            broadcaster = posttroll.sendaddressservice("a", "tcp://127.0.0.1:1", ["a"], 0.05, ["localhost"]).start()
            wait_for(lambda: sub.addresses == ["tcp://127.0.0.1:1"])
            broadcaster.stop()
            wait_for(lambda: sub.addresses == [])

    def test_one_nameserver_knows_it_and_is_down(self, impatient, monkeypatch):
        """That the other one does not know it says nothing: it is connected again when it is back."""
        monkeypatch.setattr(posttroll._Follower, "SOON", 100)  # after the start, when nobody knows who told of it
        monkeypatch.setattr(posttroll._Follower, "PATIENCE", 2)
        port, others_port = free_port(), free_port()
        ports = {"POSTTROLL_NAMESERVER_PORT": others_port, "POSTTROLL_ADDRESS_PUBLISH_PORT": free_port()}
        environment = {**os.environ, **{name: str(value) for name, value in ports.items()}}
        environment["POSTTROLL_BROADCAST_PORT"] = str(broadcast_port := free_port())
        address = f"tcp://127.0.0.1:{port}"
        announcement = Message("/address/a", "info", {"URI": address, "service": ["a"]}).encode().encode()
        with nameserver(), contextlib.ExitStack() as stack:
            with nameserver_process("--no-multicast", env=environment):
                assert raw_request(broadcast_port, announcement) == [b"ok"]
                sub = stack.enter_context(
                    posttroll.Subscribe("a", nameserver=["localhost", f"localhost:{others_port}"])
                )
            monkeypatch.setattr(posttroll._Follower, "SOON", 0.1)
            [follower] = [timer.callback.__self__ for timer in sub._loop._timers if timer.callback.__name__ == "_run"]
            data = stack.enter_context(serving(sub))
            sub._change(follower._run)
            [publisher] = follower._known.values()
            wait_for(lambda: [times >= 5 for _, times in publisher.denials.values()] == [True] or not follower._known)
            with posttroll.Publisher(f"tcp://*:{port}") as pub:
                self.check(pub, data, "it is back")

    @pytest.mark.parametrize("fault", [zmq.ZMQError(errno.EMFILE), ConfigurationError("The key is being replaced.")])
    @pytest.mark.parametrize("what", ["address", "hook"])
    def test_what_is_added_while_another_thread_receives_and_there_are_no_descriptors(self, what, fault, monkeypatch):
        """Nobody can be told, so it is tried again."""
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.05)
        set_up, failures = posttroll.set_up_client_socket, []

        def fail_at_first(*args: Any) -> Any:
            if len(failures) < 5:
                failures.append(args)
                raise fault
            return set_up(*args)

        with posttroll.Publisher("tcp://127.0.0.1:0") as pub, posttroll.Subscriber([], "/a") as sub:
            address = local_address(pub.port_number)
            with serving(sub) as data:
                monkeypatch.setattr(posttroll, "set_up_client_socket", fail_at_first)
                if what == "address":
                    sub.add(address)
                else:
                    sub.add_hook_sub(address, ["/a"], lambda message: data.append(message.data))
                assert pub.wait_for_subscribers(1, DEADLINE)
                assert len(failures) == 5
                pub.send(text_message("heard", "/a"))
                wait_for(lambda: data == ["heard"])

    def test_what_could_not_be_connected_and_is_removed_meanwhile_is_not_tried_again(self, monkeypatch):
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.05)
        change_later, tried = posttroll._SubscriberSockets._change_later, []

        def note(sockets: Any, change: Any) -> None:
            change_later(sockets, change)
            tried.append(change)

        monkeypatch.setattr(posttroll._SubscriberSockets, "_change_later", note)
        with posttroll.Subscriber([]) as sub, serving(sub):
            with mock.patch("posttroll.set_up_client_socket", side_effect=zmq.ZMQError(errno.EMFILE)):
                sub.add(local_address(free_port()))
                wait_for(lambda: tried)
                sub.remove(sub.addresses[0])
            wait_for(lambda: tried.count(tried[0]) == 2)
            assert (sub.addresses, sub._connections._links) == ([], {})

    @pytest.mark.parametrize("fault", [zmq.ZMQError(errno.EMFILE), ConfigurationError("The key is being replaced.")])
    @pytest.mark.parametrize("what", ["lookups", "news", "their monitor"])
    def test_nameservers_that_cannot_be_asked_for_a_while(self, impatient, monkeypatch, what, fault):
        """Of the tries nothing is left, and what is published meanwhile comes."""
        arguments = {
            "lookups": lambda args: args[0] == zmq.DEALER,
            "news": lambda args: args == (zmq.SUB, ""),
            "their monitor": lambda args: args[-1] == zmq.EVENT_HANDSHAKE_SUCCEEDED,
        }[what]
        failures: list[Any] = []
        made: list[Any] = []

        def failing(make: Any, *args: Any) -> Any:
            if arguments(args) and len(failures) < 5:
                failures.append(args)
                raise fault
            sock = make(*args)
            if args[0] == zmq.DEALER or args == (zmq.SUB, "") or args[1:] == (zmq.EVENT_HANDSHAKE_SUCCEEDED,):
                made.append(sock)
            return sock

        for name in ("set_up_client_socket", "_open_monitor"):
            monkeypatch.setattr(posttroll, name, partial(failing, getattr(posttroll, name)))
        hosts = ["localhost", f"127.0.0.1:{config.get('nameserver_port')}"]
        with nameserver(), posttroll.Subscribe("a_service", addr_listener=True, timeout=0, nameserver=hosts) as sub:
            with serving(sub) as data, announced(nameservers=["localhost"]) as pub:
                self.check(pub, data, "first")
                wait_for(lambda: len(failures) == 5)
                wait_for(lambda: [sock in sub._loop._callbacks for sock in made if not sock.closed] == [True] * 6)

    def test_a_vanished_publisher_is_removed_without_listening(self, impatient, monkeypatch):
        monkeypatch.setattr(posttroll._Follower, "PATIENCE", 2)
        with nameserver(max_age=0.3), posttroll.Subscribe("a", timeout=0) as sub, serving(sub):
            broadcaster = posttroll.sendaddressservice("a", "tcp://127.0.0.1:1", ["a"], 0.05, ["localhost"]).start()
            wait_for(lambda: sub.addresses == ["tcp://127.0.0.1:1"])
            broadcaster.stop()
            wait_for(lambda: sub.addresses == [])

    def test_several_nameservers_one_of_them_down(self):
        hosts = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{config.get('nameserver_port')}"]
        with nameserver(), announced(nameservers=["localhost"]) as pub:
            context = posttroll.Subscribe("a_service", addr_listener=True, timeout=DEADLINE, nameserver=hosts)
            with context as sub, serving(sub) as data:
                self.check(pub, data, "from the other one")

    def test_broken_announcements_and_removals_do_no_harm(self, caplog):
        """A program that takes the nameserver's place on the address port."""
        news = [
            b"pytroll://address",
            b"pytroll://address/a info me@here never v1.01 application/json {}",
            text_message("text", "/address/a").encode(),
            text_message({"URI": "tcp://h:1"}, "/address/a").encode(),
            text_message({"URI": "tcp://h:1", "service": "a"}, "/address/a").encode(),
            text_message({"URI": 5, "service": ["a"]}, "/address/a").encode(),
            text_message({"URI": "foo://bar", "service": ["a"]}, "/address/a").encode(),
            text_message({"URI": "tcp://h:1", "service": ["a"], "backend": [1]}, "/address/a").encode(),
            text_message({"URI": "tcp://h:1", "service": ["a"], "backend": "pigeon"}, "/address/a").encode(),
            text_message({"service": ["a"], "status": False}, "/address/a").encode(),
            text_message({"URI": {}, "service": ["a"], "status": False}, "/address/a").encode(),
            text_message({"URI": "tcp://h:1", "service": [{}, None]}, "/address/a").encode(),
        ]
        with posttroll.Publisher(f"tcp://*:{config.get('address_publish_port')}") as fake:
            with posttroll.Subscribe("a", addr_listener=True, timeout=0) as sub, serving(sub):
                assert fake.wait_for_subscribers(1, DEADLINE)
                for item in news:
                    fake.send(item)
                fake.send(text_message({"URI": "tcp://127.0.0.1:1", "service": ["a", None]}, "/address/a"))
                wait_for(lambda: sub.addresses)
                assert sub.addresses == ["tcp://127.0.0.1:1"]
                fake.send(text_message({"URI": "tcp://127.0.0.1:1", "service": ["a"], "status": False}, "/address/a"))
                wait_for(lambda: sub.addresses == [])


# ======================================================================================================================
# 12. Listening
# ======================================================================================================================


class TestListenerContainer:
    def test_messages_come_into_the_queue(self):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
            with posttroll.ListenerContainer(topics=["/counter"]) as container:
                assert pub.wait_for_subscribers(1, DEADLINE)
                for number in range(5):
                    pub.send(text_message(number, "/other"))
                    pub.send(text_message(number, "/counter"))
                    assert container.output_queue.get(timeout=DEADLINE).data == number

    def test_addresses_without_a_nameserver(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            addresses = [f"tcp://127.0.0.1:{pub.port_number}"]
            with posttroll.ListenerContainer(addresses=addresses, nameserver=False) as container:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("text"))
                assert container.output_queue.get(timeout=DEADLINE).data == "text"

    def test_restart_with_other_topics(self):
        def next_from(output: Any) -> str:
            """Send messages until one gets through."""
            while True:
                for subject in ("/a", "/b", "/c"):
                    pub.send(text_message(subject, subject))
                with contextlib.suppress(queue.Empty):
                    return output.get(timeout=0.1).data

        with posttroll.Publisher("tcp://*:0") as pub:
            addresses = [f"tcp://127.0.0.1:{pub.port_number}"]
            with posttroll.ListenerContainer(["/a"], addresses=addresses, nameserver=False) as container:
                output = container.output_queue
                assert next_from(output) == "/a"
                for topic in ("/b", "/c"):
                    container.restart_listener([topic])
                    assert container.output_queue is output
                    while not output.empty():
                        output.get()
                    assert next_from(output) == topic

    def test_stop_at_any_time_and_twice(self):
        """Before anything is received, and before the thread has begun to receive."""
        for _ in range(50):
            container = posttroll.ListenerContainer(addresses=["tcp://127.0.0.1:1"], nameserver=False)
            thread = container.thread
            container.stop()
            assert not thread.is_alive()
            container.stop()
            assert container.thread is None
            assert container.listener.running is False  # it can still be asked, and has its logger
            assert container.listener.logger.name == "posttroll.listener.Listener"

    def test_restart_after_stop(self):
        container = posttroll.ListenerContainer(addresses=["tcp://127.0.0.1:1"], nameserver=False)
        container.stop()
        ended = container.listener
        container.restart_listener(["/a"])
        assert container.thread.is_alive()
        assert container.listener is not ended
        assert container.listener.topics == ["/a"]
        container.stop()

    def test_it_stops_promptly_while_there_is_no_nameserver(self):
        start = time.monotonic()
        for _ in range(10):
            posttroll.ListenerContainer(services=["a"], nameserver="127.0.0.1").stop()
        assert time.monotonic() - start < DEADLINE

    def test_wrong_arguments_are_errors_of_the_call(self):
        with pytest.raises(ValueError, match="Cannot connect to"):
            posttroll.ListenerContainer(addresses=["nonsense"])

    def test_a_stop_by_the_thread_that_reads_the_queue(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            addresses = [f"tcp://127.0.0.1:{pub.port_number}"]
            container = posttroll.ListenerContainer(addresses=addresses, nameserver=False)

            def consume() -> None:
                container.output_queue.get(timeout=DEADLINE)
                container.stop()

            with in_thread(consume):
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("text"))


class TestListener:
    def make(self, address: str) -> Any:
        return posttroll.Listener(topics=["/a"], queue=queue.Queue(), addresses=[address], nameserver=False)

    def test_run_and_stop(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            listener = self.make(f"tcp://127.0.0.1:{pub.port_number}")
            with in_thread(listener.run):
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("text"))
                assert listener.queue.get(timeout=DEADLINE).data == "text"
                assert listener.running
                listener.stop()
            assert not listener.running

    def test_stop_before_run(self):
        listener = self.make("tcp://127.0.0.1:1")
        listener.stop()
        listener.stop()
        listener.run()
        assert not listener.running

    def test_run_again_after_restart(self):
        listener = self.make("tcp://127.0.0.1:1")
        for _ in range(2):
            with in_thread(listener.run):
                wait_for(lambda: listener.subscriber is not None and listener.subscriber.running)
                listener.restart()
        listener.stop()

    def test_run_again_before_it_has_ended(self):
        """It still has a message in hand, for which there is no room, when it is to listen anew."""
        with posttroll.Publisher("tcp://*:0") as pub:
            listener = self.make(f"tcp://127.0.0.1:{pub.port_number}")
            listener.queue = queue.Queue(maxsize=1)
            with in_thread(listener.run):
                assert pub.wait_for_subscribers(1, DEADLINE)
                for number in range(2):
                    pub.send(text_message(str(number)))
                wait_for(listener.queue.full)
                (stream,) = listener.subscriber._streams.values()
                wait_for(lambda: stream._live.index == 2 and not listener.subscriber._inbox.accepted)
                listener.restart()
                with in_thread(listener.run):
                    assert [listener.queue.get(timeout=DEADLINE).data for _ in range(2)] == ["0", "1"]
                    wait_for(lambda: pub._use(lambda audience: audience.reached) == 2)  # the new one
                    pub.send(text_message("again"))
                    assert listener.queue.get(timeout=DEADLINE).data == "again"
                    listener.stop()
            assert not listener.running

    def test_stopped_and_started_while_it_looks_for_its_publishers(self, monkeypatch):
        """That takes its time; of two runs only the last one listens, and it can be stopped."""
        make, may_go_on, is_there = posttroll.create_subscriber_from_dict_config, threading.Event(), threading.Event()

        def slowly(settings: Any) -> Any:
            is_there.set()
            assert may_go_on.wait(DEADLINE)
            return make(settings)

        monkeypatch.setattr(posttroll, "create_subscriber_from_dict_config", slowly)
        with posttroll.Publisher("tcp://*:0") as pub:
            listener = self.make(f"tcp://127.0.0.1:{pub.port_number}")
            with in_thread(listener.run) as first:
                assert is_there.wait(DEADLINE)
                listener.restart()
                with in_thread(listener.run):
                    may_go_on.set()
                    wait_for(lambda: not first.is_alive())
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    pub.send(text_message("once"))
                    assert listener.queue.get(timeout=DEADLINE).data == "once"
                    listener.stop()
            assert listener.queue.empty()

    def test_what_goes_into_the_queue_can_be_changed(self):
        class Doubling(posttroll.Listener):
            def add_to_queue(self, msg: Any) -> None:
                self.queue.put(2 * msg.data)

        with posttroll.Publisher("tcp://*:0") as pub:
            address = f"tcp://127.0.0.1:{pub.port_number}"
            listener = Doubling(queue=queue.Queue(), addresses=[address], nameserver=False)
            with in_thread(listener.run):
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message(21))
                assert listener.queue.get(timeout=DEADLINE) == 42
                listener.stop()


# ======================================================================================================================
# 13. Logging over messages
# ======================================================================================================================


def log_record(text: str = "hello %s", *args: Any, level: int = logging.INFO, name: str = "a.logger") -> Any:
    """Return a log record."""
    return logging.LogRecord(name, level, "file.py", 1, text, args, None)


class TestFormatters:
    def test_a_record_as_a_message(self):
        text = posttroll.PytrollFormatter().format(log_record("hello %s", "world", level=logging.WARNING))
        message = posttroll.Message.decode(text)
        assert (message.subject, message.type, message.data) == ("log/WARNING/a.logger", "log.warning", "hello world")

    def test_a_name_with_blanks_and_no_name(self):
        for name, subject in (("two words", "log/INFO/two_words"), ("", "log/INFO/root")):
            text = posttroll.PytrollFormatter().format(log_record("x", name=name))
            assert posttroll.Message.decode(text).subject == subject

    def test_formats(self):
        text = posttroll.PytrollFormatter("%(levelname)s %(message)s %(asctime)s", "%Y").format(log_record("x"))
        assert re.fullmatch(r"INFO x \d{4}", posttroll.Message.decode(text).data)

    def test_an_exception(self):
        try:
            raise KeyError("lost")
        except KeyError:
            record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "failed", (), sys.exc_info())
        assert "KeyError: 'lost'" in posttroll.Message.decode(posttroll.PytrollFormatter().format(record)).data

    def test_colours(self):
        record = log_record("x", level=logging.ERROR)
        assert posttroll.ColoredFormatter("%(levelname)s %(message)s", False).format(record) == "ERROR x"
        assert posttroll.ColoredFormatter("%(levelname)s %(message)s").format(record) == "\033[1;31mERROR\033[0m x"
        assert record.levelname == "ERROR"  # other handlers get it as it was


class TestHandlerAndLogger:
    def test_records_travel(self, caplog):
        """From a program that logs, over messages, into the log of another (here the same)."""
        caplog.set_level(logging.DEBUG)
        with nameserver(multicast_enabled=True):
            handler = posttroll.PytrollHandler("a_program")
            logger = posttroll.Logger("localhost", config.get("address_publish_port"))
            logger.start()
            logger.start()
            try:
                assert handler._publisher.wait_for_subscribers(1, DEADLINE)
                for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
                    handler.handle(log_record("level %d", level, level=level, name="far.away"))
                handler._publisher.send(posttroll.Message("/granule", "file", "no log record").encode())
                handler._publisher.send(b"pytroll://log/x broken")
                handler._publisher.heartbeat()
                wait_for(lambda: "/heartbeat/a_program" in caplog.text)
            finally:
                logger.stop()
                logger.stop()
                handler.close()
        far = [
            (record.levelno, record.message.rpartition(": ")[2])
            for record in caplog.records
            if record.name == "far.away"
        ]
        assert far == [(level, f"level {level}") for level in (10, 20, 30, 40, 50)]
        names = {record.name: record for record in caplog.records if "no log record" in record.getMessage()}
        assert names["posttroll.logger"].levelno == logging.INFO

    def test_logging_after_close_does_not_stop_the_program(self, capsys):
        handler = posttroll.PytrollHandler("a_program")
        handler.close()
        handler.close()
        handler.handle(log_record("too late"))
        assert capsys.readouterr().err == ""

    def test_only_the_end_is_no_error(self, capsys):
        """After the publisher has stopped, and in a forked child, there is nothing to say; of all else there is."""
        handler = posttroll.PytrollHandler("a_program")
        handler.handle(log_record("%d", "no number"))
        assert "TypeError" in capsys.readouterr().err
        handler._publisher.stop()  # as at the end of the program
        handler.handle(log_record("too late"))
        handler.close()
        assert capsys.readouterr().err == ""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_in_a_forked_worker(self):
        code = """
            import logging, multiprocessing, warnings, posttroll
            warnings.simplefilter("ignore")
            logging.getLogger().addHandler(posttroll.PytrollHandler("a_program"))
            worker = multiprocessing.get_context("fork").Process(target=logging.warning, args=("from a worker",))
            worker.start()
            worker.join()
            print(worker.exitcode)
        """
        with python(inspect.cleandoc(code)) as running:
            assert finish(running) == (0, "0\n", "")

    @pytest.mark.parametrize(
        "end", ["logging.shutdown()", "logging.config.dictConfig({'version': 1})", "handler.close()"]
    )
    def test_it_is_closed_while_the_loop_logs(self, end):
        """Everything is logged over messages, of the library too, and its thread is in the midst of it."""
        code = f"""
            import logging, logging.config, time, posttroll
            handler = posttroll.PytrollHandler("a_program")
            handler.flush = lambda: time.sleep(0.05)  # so the loop logs just before it is closed, too
            logging.getLogger().addHandler(handler)
            logging.getLogger().setLevel(logging.DEBUG)
            others = [posttroll.Publisher("tcp://127.0.0.1:0", name=name).start() for name in "abc"]
            loop = posttroll._background.join("test")

            log = logging.getLogger("chat")

            def chat():
                log.info("x")
                posttroll._log("publisher").info("x")
                loop.at(time.monotonic(), chat)

            loop.call(chat)
            time.sleep(0.1)
            {end}
            posttroll._background.leave("test", loop)
            print("ended")
        """
        with python(inspect.cleandoc(code)) as running:
            assert finish(running) == (0, "ended\n", "")

    def test_levels_of_all_kinds(self, caplog):
        """Levels without a name, and with a name of the program's own, travel with their number."""
        caplog.set_level(1)
        logging.addLevelName(25, "NOTICE")
        try:
            with nameserver(multicast_enabled=True), posttroll.Publish("another", nameservers=["localhost"]):
                handler = posttroll.PytrollHandler("a_program")
                logger = posttroll.Logger(["localhost"], config.get("address_publish_port"))
                logger.start()
                try:
                    assert handler._publisher.wait_for_subscribers(1, DEADLINE)
                    for level in (1, 15, 20, 25, 99):
                        handler.handle(log_record("level %d", level, level=level, name="far.away"))
                    wait_for(lambda: [record.name for record in caplog.records].count("far.away") == 5)
                finally:
                    logger.stop()
                    handler.close()
        finally:
            del logging._levelToName[25], logging._nameToLevel["NOTICE"]
        far = [record for record in caplog.records if record.name == "far.away"]
        assert [(record.levelno, record.message.rpartition(" ")[2]) for record in far] == [
            (1, "1"),
            (15, "15"),
            (20, "20"),
            (25, "25"),
            (99, "99"),
        ]

    @pytest.mark.parametrize("name", ["Level 15", "two words", ""])
    def test_a_level_name_that_is_no_word(self, name):
        record = log_record("x")
        record.levelname, record.levelno = name, 15
        message = posttroll.Message.decode(posttroll.PytrollFormatter().format(record))
        level = "_".join(name.split()) or "15"
        assert (message.subject, message.type, message.data) == (f"log/{level}/a.logger", f"log.{level.lower()}", "x")


class TestLoggerCommand:
    CODE = "import posttroll, sys; sys.exit(posttroll.run_logger())"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_logs_messages_and_ends_on_a_signal(self, number):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with python(self.CODE) as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_of_log("hello"))
                pub.heartbeat()
                assert "INFO" in await_line(running, "hello")
                running.send_signal(number)
                status, out, err = finish(running)
                assert (status, err) == (0, "")
                assert "heartbeat" not in out

    def test_a_signal_as_soon_as_it_listens(self):
        code = """
import os, posttroll, signal, sys
start = posttroll.Logger.start
posttroll.Logger.start = lambda self: (start(self), os.kill(os.getpid(), signal.SIGTERM))
sys.exit(posttroll.run_logger())
"""
        with python(code) as running:
            assert finish(running)[::2] == (0, "")

    def test_server_and_port_choose_the_server(self):
        """The settings of this host lead nowhere, the options lead to the nameserver."""
        nowhere = {"POSTTROLL_NAMESERVER_PORT": str(free_port()), "POSTTROLL_ADDRESS_PUBLISH_PORT": str(free_port())}
        server, port = f"127.0.0.1:{config.get('nameserver_port')}", config.get("address_publish_port")
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with python(self.CODE, "-s", server, "-p", str(port), "-v", env={**os.environ, **nowhere}) as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                with posttroll.Publish("b", nameservers=["localhost"]) as other:  # which only the port tells of
                    assert other.wait_for_subscribers(1, DEADLINE)
                    other.heartbeat()
                    await_line(running, "/heartbeat/b")

    @pytest.mark.parametrize("script", ["pytroll-logger", "posttroll logger"])
    @pytest.mark.parametrize("output", ["full", "closed"])
    def test_an_output_that_takes_nothing_ends_it(self, script, output):
        """With a success only if whoever reads has had enough."""
        start = ("-c", self.CODE) if script == "pytroll-logger" else (LIBRARY, "logger")
        with contextlib.ExitStack() as world:
            if output == "full":
                if not os.path.exists("/dev/full"):
                    pytest.skip("this needs /dev/full")
                out = world.enter_context(open("/dev/full", "w"))
            else:
                out = subprocess.PIPE
            world.enter_context(nameserver())
            pub = world.enter_context(posttroll.Publish("a", nameservers=["localhost"]))
            running = world.enter_context(process(sys.executable, "-u", *start, stdout=out))
            if output == "closed":
                running.stdout.close()
                running.stdout = None
            wait_for(lambda: pub.heartbeat() or running.poll() is not None)
            _, err = running.communicate(timeout=DEADLINE)
        assert running.returncode == (1 if output == "full" else 0)
        assert err == (f"{script}: [Errno 28] No space left on device\n" if output == "full" else "")

    def test_a_log_file(self, tmp_path):
        log = tmp_path / "messages.log"
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with process(sys.executable, LIBRARY, "logger", "-r", log, "-v") as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_of_log("hello"))
                wait_for(lambda: log.exists() and "hello" in log.read_text())
                running.terminate()
                assert finish(running)[:2] == (0, "")

    def test_help(self):
        with python(self.CODE, "--help") as running:
            status, out, _ = finish(running)
        assert status == 0
        for option in ("-r", "--rotated", "-v", "--verbose", "-s", "--server", "-p", "--port"):
            assert option in out

    @pytest.mark.parametrize("words", [["-r", "/no/such/directory/log"], ["-s", "a b"], ["--nameserver", "a b"]])
    @pytest.mark.parametrize("script", ["pytroll-logger", "posttroll logger"])
    def test_what_cannot_be_used_is_one_line(self, script, words):
        start = ("-c", self.CODE) if script == "pytroll-logger" else (LIBRARY, "logger")
        with process(sys.executable, *start, *words) as running:
            status, out, err = finish(running)
        assert (status, out) == (1, "")
        assert err.startswith(f"{script}: ")
        assert words[1] in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("option", ["--nameserver", "-s"])
    @pytest.mark.parametrize("script", ["pytroll-logger", "posttroll logger"])
    def test_several_nameservers(self, script, option):
        """One that is not there, and one that is; what is not said is asked of localhost."""
        start = ("-u", "-c", self.CODE) if script == "pytroll-logger" else ("-u", LIBRARY, "logger")
        hosts = (option, "127.0.0.9:1", option, f"127.0.0.1:{config.get('nameserver_port')}")
        nowhere = {**os.environ, "POSTTROLL_NAMESERVER_PORT": str(free_port())}
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with process(sys.executable, *start, *hosts, env=nowhere) as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_of_log("hello"))
                await_line(running, "hello")
                running.terminate()
                assert finish(running)[::2] == (0, "")

    def test_messages_cannot_give_orders_to_the_terminal(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as pub:
            with on_terminal("logger") as (_, read_to, _):
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_of_log("first line \033[2J\nsecond line"))
                pub.send(posttroll.Message("/x", "info", "no log record \x9b2J"))
                seen = read_to("no log record")
                seen = read_to("2J")
        assert "first line \\u001b[2J\r\nsecond line" in seen
        assert "\033[2J" not in seen
        assert "\x9b" not in seen


def text_of_log(text: str) -> str:
    """Return the message of a log record."""
    return posttroll.PytrollFormatter().format(log_record(text))


# ======================================================================================================================
# 14. Testing helpers
# ======================================================================================================================


class TestPatchedSubscriberRecv:
    """Subscribers receive what a test says, without a nameserver."""

    def test_everybody_receives_the_messages(self):
        messages = [Message("/a", "info", number) for number in range(3)]
        with posttroll.testing.patched_subscriber_recv(messages):
            with posttroll.subscriber.Subscribe("a_service", "/a") as sub:
                assert list(sub.recv()) == messages
                assert list(sub.recv(timeout=5)) == messages
                assert list(sub()) == messages
                assert list(sub(timeout=1)) == messages
            subscriber = posttroll.subscriber.Subscriber(["tcp://127.0.0.1:9"])
            assert list(subscriber.recv()) == messages
            assert list(subscriber) == messages
            subscriber.close()

    def test_nobody_is_asked_for_an_address(self):
        with posttroll.testing.patched_subscriber_recv([]):
            with mock.patch("posttroll.subscriber.get_pub_addresses") as ask:
                with posttroll.subscriber.Subscribe("a_service", timeout=100) as sub:
                    assert list(sub.recv()) == []
            ask.assert_not_called()

    def test_listener_container(self):
        with posttroll.testing.patched_subscriber_recv(["one", "two"]):
            container = posttroll.listener.ListenerContainer(topics=["/a"])
            assert [container.output_queue.get(timeout=DEADLINE) for _ in range(2)] == ["one", "two"]
            container.stop()

    def test_restored_afterwards(self):
        before = posttroll.Subscriber.recv
        with pytest.raises(ZeroDivisionError), posttroll.testing.patched_subscriber_recv([]):
            raise ZeroDivisionError
        assert posttroll.Subscriber.recv is before
        with posttroll.testing.patched_subscriber_recv([]):
            assert posttroll.Subscriber.recv is not before


class TestPatchedPublisher:
    """What publishers would have sent is in a list."""

    def test_the_strings_are_collected(self):
        with posttroll.testing.patched_publisher() as published:
            with posttroll.publisher.Publish("a_service", nameservers=["localhost"], port=9000) as pub:
                pub.send("one")
                pub.send_string("two")
            with posttroll.publisher.Publish("a_service", port=9000, nameservers=False) as pub:
                pub.send("three")
            publisher = posttroll.publisher.Publisher("tcp://*:9000", "name")
            publisher.start()
            publisher.send(str(Message("/a", "info", "four")))
            publisher.heartbeat()
            publisher.stop()
        assert published[:3] == ["one", "two", "three"]
        assert Message.decode(published[3]).data == "four"
        assert Message.decode(published[4]).type == "beat"
        assert len(published) == 5

    def test_a_publisher_by_its_dictionary(self):
        with posttroll.testing.patched_publisher() as published:
            pub = posttroll.publisher.create_publisher_from_dict_config({"name": "a", "port": 0, "nameservers": None})
            pub.start()
            pub.send("text")
            pub.stop()
        assert published == ["text"]

    def test_without_start(self):
        with posttroll.testing.patched_publisher() as published:
            publisher = posttroll.publisher.Publisher("tcp://*:9000")
            with pytest.raises(RuntimeError):
                publisher.send("text")
            noisy = posttroll.publisher.NoisyPublisher("a_service")
            with pytest.raises(RuntimeError):
                noisy.send("text")
        assert published == []

    @pytest.mark.parametrize("data", [b"bytes", None, 5, {}])
    def test_anything_but_str_is_refused(self, data):
        with posttroll.testing.patched_publisher() as published:
            publisher = posttroll.publisher.Publisher("tcp://*:9000")
            publisher.start()
            with pytest.raises(TypeError):
                publisher.send(data)
        assert published == []

    def test_nothing_is_bound_and_no_thread_started(self):
        threads = threading.active_count()
        with posttroll.testing.patched_publisher():
            with posttroll.publisher.Publish("a_service", port=1) as pub:  # a port that is not ours to bind
                pub.send("text")
                assert threading.active_count() == threads

    def test_restored_afterwards(self):
        names = ("start", "send", "stop", "close")
        before = [getattr(posttroll.Publisher, name) for name in names]
        with pytest.raises(ZeroDivisionError), posttroll.testing.patched_publisher():
            raise ZeroDivisionError
        assert [getattr(posttroll.Publisher, name) for name in names] == before


# ======================================================================================================================
# 15. Command line
# ======================================================================================================================


def command(*args: Any, **kwargs: Any) -> Any:
    """Run ``posttroll`` with *args* in a process; by name, as Python compiles a file that it is given each time."""
    return process(sys.executable, "-u", "-m", "posttroll", *args, **kwargs)


def run_command(*args: Any, stdin: str | None = None, **kwargs: Any) -> tuple[int, str, str]:
    """Run ``posttroll`` with *args* to its end; return status, output and errors."""
    with command(*args, **kwargs) as running:
        out, err = running.communicate(stdin, timeout=60)
        return running.returncode, out, err


@contextlib.contextmanager
def on_terminal(
    *args: Any, size: tuple[int, int] | None = None, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[..., str], int]]:
    """Run ``posttroll`` on a pseudo-terminal; gives the process, what reads up to a text, the terminal."""
    master, slave = pty.openpty()
    if size is not None:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    environment = {**os.environ, "TERM": "xterm", **variables}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "posttroll", *args], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    seen = ""

    def read_to(text: str, times: int = 1) -> str:
        nonlocal seen
        deadline = time.monotonic() + DEADLINE
        while seen.count(text) < times:
            assert time.monotonic() < deadline, seen
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096).decode("utf-8", "replace")
        return seen

    try:
        yield running, read_to, master
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
        os.close(master)


class TestCommands:
    """What holds for every command."""

    @pytest.mark.parametrize(
        "name", ["publish", "subscribe", "services", "top", "doctor", "config", "demo", "generate-keys", "logger"]
    )
    def test_help(self, name):
        status, out, _ = run_here(name, "--help")
        assert status == 0
        assert f"posttroll {name}" in out
        for text in ("--nameserver", "--no-color", "--set", "examples:"):
            assert text in out

    def test_help_of_the_nameserver_is_its_own(self):
        status, out, _ = run_here("nameserver", "--help")
        assert status == 0
        assert "--no-multicast" in out
        assert "examples:" in out

    def test_keys_of_the_nameserver_can_be_set(self):
        port = free_port()
        with command("nameserver", "--no-multicast", "--set", f"nameserver_port={port}") as running:
            assert str(port) in await_line(running, "answers on port")
            running.send_signal(signal.SIGTERM)
            assert finish(running)[0] == 0

    def test_version(self):
        assert run_command("--version") == (0, f"posttroll {posttroll.__version__}\n", "")

    def test_no_command_is_an_error(self):
        status, out, err = run_here()
        assert (status, out) == (2, "")
        assert "COMMAND" in err

    def test_any_key_can_be_set(self):
        status, out, _ = run_here("config", "mc_ttl", "--json", "--set", "mc_ttl=3")
        assert status == 0
        assert json.loads(out)[0]["value"] == 3

    def test_a_wrong_value_is_one_clear_line(self):
        status, out, err = run_here("services", "--set", "nameserver_port=abc")
        assert (status, out) == (1, "")
        assert err.startswith("posttroll services: posttroll configuration: nameserver_port is 'abc'")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("words", "status", "reason"),
        [
            ("publish /a info x --service", 1, "--service needs a name"),
            ("publish /a info x --service=a\tb", 1, "without white space"),
            ("publish /a info x --port 70000", 2, "no whole number from 0 to 65535"),
            ("publish /a info x --wait nan", 2, "no number from 0"),
            ("publish /a info x --nameserver a\tb", 1, "Cannot connect to 'tcp://a\\tb"),
            ("subscribe --nameserver a\tb", 1, "Cannot connect to 'tcp://a\\tb"),
            ("subscribe --count 0", 2, "no whole number from 1"),
            ("services --watch inf", 2, "no number from 0.1"),
            ("services --timeout -1", 2, "no number from 0"),
            ("services --nameserver a\tb", 1, "Cannot connect to 'tcp://a\\tb"),
            ("top --interval 0", 2, "no number from 0.1"),
            ("top --nameserver a\tb", 1, "Cannot connect to 'tcp://a\\tb"),
            ("publish /a info x --lines --subscribers 0", 1, "--lines needs a file or stdin"),
            (f"publish /a --replay {LIBRARY} --subscribers 0", 1, "--replay takes neither SUBJECT nor --file"),
            ("check receiver --topic /a", 3, "--topic says what has to come within --silent SECONDS"),
            ("config --set foo", 2, "'foo' is not KEY=VALUE"),
            ("config --set foo=1", 2, "there is no key 'foo'"),
            ("demo --nameserver a\tb", 1, "Cannot connect to 'tcp://a\\tb"),
        ],
    )
    def test_what_cannot_be_used_is_one_line(self, words, status, reason):
        arguments = [word.replace("\t", " ") for word in words.split(" ")]
        ended, _, err = run_here(*arguments, *([""] if words.endswith("--service") else []))
        assert ended == status
        assert "Traceback" not in err
        assert reason.replace("\\t", " ").replace("\t", " ") in err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("words", "status", "err"),
        [
            (
                "publish /a info - --subscribers 0 <&-",
                1,
                "posttroll publish: there is no standard input to read from.\n",
            ),
            (
                "publish --replay - --subscribers 0 <&-",
                1,
                "posttroll publish: there is no standard input to read from.\n",
            ),
            ("subscribe --timeout 0.1 >&-", 1, "posttroll subscribe: there is no standard output to print to.\n"),
            ("top -n 1 >&-", 1, "posttroll top: there is no standard output to print to.\n"),
            ("config >/dev/full", 1, "posttroll: [Errno 28] No space left on device\n"),
            ("publish /a info x --subscribers 0 >&-", 0, "1 message to 0 subscribers\n"),
            ("publish /a info x --subscribers 0 2>&-", 0, ""),
            ("--help >/dev/full", 1, "posttroll: [Errno 28] No space left on device\n"),
            ("help map >/dev/full", 1, "posttroll: [Errno 28] No space left on device\n"),
            ("config mc_ttl >/dev/full", 1, "posttroll: [Errno 28] No space left on device\n"),
            ("config nonesuch 2>/dev/full", 1, ""),
            ("publish /a info x --subscribers 0 2>/dev/full", 0, ""),
        ],
    )
    def test_streams_that_are_closed_or_full(self, words, status, err):
        with process("sh", "-c", f'exec "$0" "$1" {words}', sys.executable, LIBRARY) as running:
            assert finish(running) == (status, "", err)

    @pytest.mark.parametrize(
        ("words", "status"),
        [("--help", 0), ("help map", 0), ("config mc_ttl", 0), ("check tcp://localhost:1", 2), ("config nonesuch", 1)],
    )
    @pytest.mark.parametrize("streams", ["stdout", "stdout stderr"])
    def test_a_reader_that_has_gone(self, words, status, streams):
        """It changes nothing of the status, and nobody is told."""
        reader, writer = os.pipe()
        os.close(reader)
        kwargs = dict.fromkeys(streams.split(), writer)
        with process(sys.executable, "-m", "posttroll", *words.split(), **kwargs) as running:
            os.close(writer)
            ended, _, err = finish(running)
        assert ended == status
        assert not err or err == "posttroll config: there is no key nonesuch.\n"

    @pytest.mark.parametrize(("name", "status"), [("services", 2), ("ping", 2), ("check", 3)])
    def test_an_empty_name_does_not_mean_all(self, name, status):
        ended, out, err = run_here(name, "")
        assert (ended, out) == (status, "")
        assert "is a name missing?" in err

    @pytest.mark.parametrize(
        ("words", "data"),
        [
            ("/a --subscribers 0 info x --speed 1 y", "x y"),
            ("/a info --subscribers 0 -5", "-5"),
            ("/a info --subscribers 0 -- --text -x", "--text -x"),
            ("/a info x -- --lines", "x --lines"),
            ("--text /a info a=b --subscribers 0 c=d", "a=b c=d"),
        ],
    )
    def test_options_may_stand_between_other_words(self, words, data):
        options = posttroll._parsers()[1]["publish"].parse_intermixed_args(words.split())
        assert (options.subject, options.type) == ("/a", "info")
        assert posttroll._data_of_words(options) == data
        status, _, err = run_here("publish", "--nameserver", "none", *words.split())
        assert (status, err.count("\n")) == (1, 1), err  # as there is no --port


class TestPublishAndSubscribe:
    """From the shell into the shell."""

    @pytest.mark.parametrize("unbuffered", ["-u", "-X utf8"])
    def test_a_signal_while_the_reader_is_slow_cuts_no_line_short(self, unbuffered):
        """What is being written comes to its end, whether Python buffers it or not."""
        if not os.path.exists("/proc/self/status"):
            pytest.skip("this needs /proc")
        import fcntl
        import termios

        with posttroll.Publisher("tcp://*:0") as pub:
            words = [*unbuffered.split(), LIBRARY, "subscribe", "--json", "--address", local_address(pub.port_number)]
            with process(sys.executable, *words) as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                for number in range(8):
                    pub.send(posttroll.Message("/a", "info", [number, "x" * 50_000]))
                waiting = array.array("i", [0])

                def is_full() -> bool:
                    fcntl.ioctl(running.stdout, termios.FIONREAD, waiting)
                    return waiting[0] > 55_000  # in the midst of the second line

                def has_signal() -> bool:
                    return any(int(each, 16) for each in re.findall(r"Pnd:\t(\w+)", proc.read_text()))

                wait_for(is_full)
                running.terminate()
                proc = Path(f"/proc/{running.pid}/status")
                wait_for(lambda: not has_signal())
                status, out, err = finish(running)
        assert (status, err) == (0, "")
        assert [json.loads(line)["data"][0] for line in out.splitlines()] == list(range(out.count("\n")))

    @pytest.mark.parametrize(
        ("words", "data"),
        [
            (["disk is full"], "disk is full"),
            (["two", "words"], "two words"),
            ([], ""),
            (
                ["uri=/data/a", "size=12", "ok=true", "note=a b"],
                {"uri": "/data/a", "size": 12, "ok": True, "note": "a b"},
            ),
            (["--text", "a=b"], "a=b"),
            (["--json", '{"a": [1, {"b": null}]}'], {"a": [1, {"b": None}]}),
        ],
    )
    def test_data_of_the_command_line(self, words, data):
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            with command("publish", "/a", "info", *words, "--port", port, "--nameservers", "none") as publish:
                [message] = receive(subscriber)
                assert finish(publish) == (0, "", "1 message to 1 subscriber\n")
        assert (message.subject, message.type, message.data) == ("/a", "info", data)

    def test_through_the_nameserver_as_json_lines(self):
        with nameserver(), command("subscribe", "/log", "--json", "-n", 3, "--timeout", 30) as subscribe:
            status, out, err = run_command(
                "publish", "/log", "line", "-", "--lines", "--nameservers", "localhost", stdin="one\ntwo\nthree\n"
            )
            assert (status, out, err) == (0, "", "3 messages to 1 subscriber\n")
            status, out, _ = finish(subscribe)
        lines = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert [line["data"] for line in lines] == ["one", "two", "three"]
        assert {(line["subject"], line["type"]) for line in lines} == {("/log", "line")}

    def test_an_input_that_does_not_block(self):
        """As that of a program which has its own loop: it ends where the other end is closed, not at a pause."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        port = free_port()
        words = ("publish", "/a", "info", "-", "--lines", "--port", port, "--nameserver", "none")
        with posttroll.Subscriber([local_address(port)]) as subscriber:
            with command(*words, stdin=read_end) as publish, os.fdopen(write_end, "w") as stdin:
                for text in ("one", "two"):
                    print(text, file=stdin, flush=True)
                    assert received_data(subscriber) == [text]
                stdin.close()
                assert finish(publish) == (0, "", "2 messages to 1 subscriber\n")
        os.close(read_end)

    def test_a_file(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text('{"start_time": "2026-11-23T12:00:00+00:00"}\n')
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            arguments = ("publish", "/a", "info", "--file", path, "--json", "--port", port, "--nameservers", "none")
            with command(*arguments) as publish:
                [message] = receive(subscriber)
                assert finish(publish)[0] == 0
        assert message.data["start_time"].isoformat() == "2026-11-23T12:00:00+00:00"

    def test_without_a_subscriber_nothing_is_sent(self):
        status, out, err = run_here("publish", "/a", "info", "x", "--nameservers", "localhost", "--wait", 0.1)
        assert (status, out) == (1, "")
        assert "0 of 1 subscribers after 0.1 s: nothing was sent" in err

    def test_without_waiting(self):
        arguments = ("publish", "/a", "info", "x", "--nameservers", "localhost", "--subscribers", 0)
        assert run_here(*arguments) == (0, "", "1 message to 0 subscribers\n")

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["/a"], "SUBJECT and TYPE are needed"),
            (["/a b", "info"], "Invalid subject"),
            (["/a", "info", "--json", "{"], "DATA is no JSON"),
            (["/a", "info", "x", "--nameservers", "none"], "needs --port"),
            (["/a", "info", "--file", "/nonesuch"], "/nonesuch"),
        ],
    )
    def test_wrong_words(self, words, reason):
        status, out, err = run_here("publish", *words, "--subscribers", 0)
        assert (status, out) == (1, "")
        assert reason in err
        assert err.count("\n") == 1

    def test_a_port_in_use(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            port = publisher.port_number
            status, _, err = run_here("publish", "/a", "info", "--port", port, "--nameservers", "none")
        assert status == 1
        assert str(port) in err

    def test_types_are_filtered(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            arguments = ("subscribe", "--address", address, "--type", "file", "-n", 1, "--timeout", 30)
            with command(*arguments) as subscribe:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info", "x"))
                publisher.send(posttroll.Message("/b", "file", "y"))
                status, out, _ = finish(subscribe)
        assert status == 0
        assert posttroll.Message.decode(out.rstrip("\n")).data == "y"

    def test_a_timeout_without_message_is_no_success(self):
        port = free_port()
        status, out, err = run_command("subscribe", "--address", f"tcp://localhost:{port}", "--timeout", 0.1)
        assert (status, out) == (1, "")
        assert "0 of 1 messages came" in err

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_end_it(self, number):
        with posttroll.Publisher("tcp://*:0") as publisher:
            with command("subscribe", "--address", f"tcp://localhost:{publisher.port_number}") as subscribe:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info", "up"))
                await_line(subscribe, "up")  # it may be connected before it is prepared for signals
                subscribe.send_signal(number)
                assert finish(subscribe) == (0, "", "")

    def test_record_and_replay(self, tmp_path):
        messages = [
            posttroll.Message("/a", "info", "text"),
            posttroll.Message("/a", "info", "two\nlines, and a \\ and \r"),
            posttroll.Message("/a", "info", "pytroll://looks like one\npytroll://b info x"),
            posttroll.Message("/b", "file", {"a": [1, None, "\n"]}),
            posttroll.Message("/c", "info", b"\0\xff"),
            posttroll.Message("/d", "info"),
            posttroll.Message("/e", "info", "old", version="v1.01"),
        ]
        expected = [message.encode() for message in messages]
        recording = tmp_path / "recording"
        with posttroll.Publisher("tcp://*:0") as publisher, recording.open("w") as stream:
            address = f"tcp://localhost:{publisher.port_number}"
            with command("subscribe", "--address", address, "--raw", "-n", len(messages), stdout=stream) as subscribe:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                for text in expected:
                    publisher.send(text)
                assert subscribe.wait(DEADLINE) == 0
        assert len(recording.read_text().splitlines()) == len(messages)
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            arguments = ("publish", "--replay", recording, "--speed", 0, "--port", port, "--nameservers", "none")
            with command(*arguments) as publish:
                received = receive(subscriber, len(messages))
                assert finish(publish)[0] == 0
        assert [message.encode() for message in received] == expected

    def test_replay_keeps_the_pace(self, tmp_path):
        start = posttroll.datetime(2026, 11, 23, 12, tzinfo=posttroll.timezone.utc)
        recording = tmp_path / "recording"
        with recording.open("w") as stream:
            for seconds in (0, 20, 40):
                message = posttroll.Message("/a", "info", seconds)
                message.time = start.replace(second=seconds)
                stream.write(f"{message}\n")
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            arguments = ("publish", "--replay", recording, "--speed", 100, "--port", port, "--nameservers", "none")
            with command(*arguments) as publish:
                begin = time.monotonic()
                assert len(receive(subscriber, 3)) == 3
                assert time.monotonic() - begin > 0.2  # 40 s at a hundred times the speed, less how late the first came
                assert finish(publish)[0] == 0

    def test_a_broken_recording_names_the_line(self, tmp_path):
        recording = tmp_path / "recording"
        recording.write_text(f"{posttroll.Message('/a', 'info')}\nnonsense\n")
        status, _, err = run_here("publish", "--replay", recording, "--subscribers", 0)
        assert status == 1
        assert "recording, line 2" in err

    def test_a_reader_that_goes_away_ends_it(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            with command("subscribe", "--address", f"tcp://localhost:{publisher.port_number}") as subscribe:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                subscribe.stdout.close()
                subscribe.stdout = None

                def ended() -> bool:
                    publisher.send(posttroll.Message("/a", "info", "x"))
                    return subscribe.poll() is not None

                wait_for(ended)
                assert subscribe.returncode == 0

    @pytest.mark.parametrize(
        ("typed", "value"),
        [
            ("12", 12),
            ("-1.5", -1.5),
            ("1.10", "1.10"),
            ("007", "007"),
            ("1e3", "1e3"),
            ("1e999", "1e999"),
            ("NaN", "NaN"),
            ("-Infinity", "-Infinity"),
            ("[NaN]", "[NaN]"),
            ("9" * 5000, "9" * 5000),
            (" 1", " 1"),
            ("true", True),
            ("null", None),
            ("[1, 1.10]", [1, 1.1]),
            ('{"a": [null]}', {"a": [None]}),
            ('"12"', "12"),
            ("a=b", "a=b"),
            ("", ""),
        ],
    )
    def test_a_value_is_a_number_only_if_it_is_written_like_one(self, typed, value):
        options = posttroll._parsers()[0].parse_args(["publish", "/a", "info", f"k={typed}", "n=1"])
        [message] = posttroll._messages_to_publish(options, None)
        received = posttroll.Message.decode(message.encode())
        assert received.data == {"k": value, "n": 1}
        assert type(received.data["k"]) is type(value)

    def test_infinities_are_no_json(self):
        for text in ("NaN", "[1e999]", '{"a": -Infinity}'):
            status, _, err = run_here("publish", "/a", "info", "--json", text, "--subscribers", 0)
            assert status == 1
            assert "is no number in JSON" in err

    @pytest.mark.parametrize("source", ["stdin", "file", "lines"])
    def test_bytes(self, source, tmp_path):
        """All the bytes there are, also those of line ends."""
        content = bytes(range(256)) + b"\r\n\n\xff"
        path = tmp_path / "image.png"
        path.write_bytes(content)
        words = {"stdin": ["-"], "file": ["--file", path], "lines": ["-", "--lines"]}[source]
        expected = content.split(b"\n") if source == "lines" else [content]
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber, path.open("rb") as stdin:
            arguments = ("publish", "/a", "image", *words, "--binary", "--port", port, "--nameserver", "none")
            with command(*arguments, stdin=stdin) as publish:
                received = receive(subscriber, len(expected))
                assert finish(publish)[:2] == (0, "")
        assert [message.data for message in received] == expected

    def test_bytes_need_a_file_and_text_must_be_text(self, tmp_path):
        path = tmp_path / "image.png"
        path.write_bytes(b"\xff\xfe")
        status, _, err = run_here("publish", "/a", "image", "--file", path, "--subscribers", 0)
        assert (status, err.count("\n")) == (1, 1)
        assert "--binary" in err
        status, _, err = run_here("publish", "/a", "image", "word", "--binary", "--subscribers", 0)
        assert (status, err) == (1, "posttroll publish: --binary needs a file or stdin.\n")

    @pytest.mark.parametrize("replay", [False, True])
    def test_five_subscribers_get_all_of_every_publish(self, replay, tmp_path, monkeypatch):
        """Among three other publishers; each publish is found by all of them, though one would be enough for it."""
        monkeypatch.setenv("POSTTROLL_DISCOVERY_SECONDS", "3")
        recording = tmp_path / "recording"
        rounds, subscribers = 2, 5
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            for name in ("a", "b", "c"):
                world.enter_context(posttroll.Publish(name, nameservers=["localhost"]))
            arguments = ("subscribe", "/counted", "--json", "-n", rounds, "--timeout", DEADLINE)
            listening = [world.enter_context(command(*arguments)) for _ in range(subscribers)]
            with posttroll.Publish("ready", nameservers=["localhost"]) as ready:
                assert ready.wait_for_subscribers(subscribers, DEADLINE)
            for number in range(rounds):
                words = ["/counted", "info", f"number={number}"]
                if replay:
                    recording.write_text(f"{posttroll.Message('/counted', 'info', {'number': number})}\n")
                    words = ["--replay", recording]
                status, _, err = run_command("publish", *words, "--nameserver", "localhost")
                assert (status, err) == (0, "1 message to 5 subscribers\n")
            for each in listening:
                status, out, _ = finish(each)
                assert status == 0
                assert [json.loads(line)["data"]["number"] for line in out.splitlines()] == list(range(rounds))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_publish_that_is_ended_says_goodbye(self, number):
        with nameserver(), posttroll.Subscribe("lines", addr_listener=True, timeout=0) as sub:
            words = ("/a", "info", "-", "--lines", "--name", "lines", "--nameserver", "localhost")
            with command("publish", *words) as publish:
                publish.stdin.write("one\n")
                publish.stdin.flush()
                assert received_data(sub) == ["one"]
                assert posttroll.get_pub_address("lines")
                publish.send_signal(number)
                assert publish.wait(DEADLINE) == 130
                assert re.fullmatch(r"[01] messages? sent until then\n", publish.stderr.read())  # send may not be over
            assert posttroll.get_pub_address("lines") == []

    def test_subscribers_that_come_later_are_counted(self):
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as first:
            arguments = ("publish", "/a", "info", "-", "--lines", "--port", port, "--nameserver", "none")
            with command(*arguments) as publish:
                publish.stdin.write("one\n")
                publish.stdin.flush()
                assert receive(first)[0].data == "one"
                with posttroll.Subscriber([f"tcp://localhost:{port}"]) as second:

                    def came() -> bool:
                        publish.stdin.write("more\n")
                        publish.stdin.flush()
                        return bool(receive(second, 1, 0.1))

                    wait_for(came)
                    publish.stdin.close()
                    publish.stdin = None
                    assert publish.wait(DEADLINE) == 0
                    _, err = publish.communicate()
        assert re.fullmatch(r"\d+ messages to 2 subscribers\n", err)

    def test_lost_messages_are_no_success(self):
        """A subscriber that does not read; its queue and the publisher's hold ten messages each."""
        port = free_port()
        with zmq.Context() as context, context.socket(zmq.SUB) as slow:
            slow.setsockopt(zmq.RCVHWM, 1)
            slow.setsockopt(zmq.RCVBUF, 4096)
            slow.setsockopt(zmq.LINGER, 0)
            slow.subscribe(b"")
            slow.connect(f"tcp://127.0.0.1:{port}")
            lines = f"{'x' * 10000}\n" * 3000
            arguments = ("publish", "/a", "info", "-", "--lines", "--port", port, "--nameserver", "none")
            with command(*arguments, "--set", "send_high_water_mark=10") as publish:
                publish.stdin.write(lines)
                publish.stdin.close()
                publish.stdin = None
                assert any("the queue of a slow subscriber is full" in line for line in publish.stderr)
                slow.close()
                err = publish.communicate(timeout=60)[1]
            assert "3000 messages to " in err
            assert publish.returncode == 1
        assert re.search(r"posttroll publish: \d+ messages were lost: a subscriber was too slow", err)

    @pytest.mark.parametrize("option", ["--nameserver", "--nameservers"])
    def test_one_nameserver_each_and_what_follows_is_not_swallowed(self, option):
        hosts = (option, "127.0.0.9", option, "localhost")
        with nameserver(), command("subscribe", "/x", "--json", "-n", 1, "--timeout", 30) as subscribe:
            status, _, err = run_command("publish", *hosts, "/x", "info", "foo", "bar")
            assert (status, err) == (0, "1 message to 1 subscriber\n")
            assert json.loads(finish(subscribe)[1])["data"] == "foo bar"

    def test_a_nameserver_without_multicast_is_hinted_at(self):
        with nameserver(multicast_enabled=False), posttroll.Subscribe("", "", addr_listener=True, timeout=0):
            status, _, err = run_command("publish", "/a", "info", "x", "--wait", 0.3)
        assert (status, err.count("\n")) == (1, 1)
        assert "0 of 1 subscribers after 0.3 s: nothing was sent" in err
        assert "--nameserver HOST" in err
        assert "--no-multicast" in err

    @pytest.mark.parametrize("cut", [1, 8, 80])
    def test_a_truncated_recording_is_replayed_up_to_where_it_ends(self, cut, tmp_path):
        recording = tmp_path / "recording"
        data = [{"number": number} for number in range(3)] + ["text at the end of the file"]
        whole = "".join(f"{posttroll.Message('/a', 'info', item)}\n" for item in data)
        recording.write_text(whole[:-cut])
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            arguments = ("publish", "--replay", recording, "--speed", 0, "--port", port, "--nameserver", "none")
            with command(*arguments) as publish:
                received = receive(subscriber, 3)
                status, _, err = finish(publish)
                assert next(subscriber.recv(0)) is None
        assert [message.data for message in received] == data[:3]
        assert status == 1
        assert err.startswith("3 messages sent until then\nposttroll publish: ")
        assert "recording, line 4: " in err

    def test_a_replay_does_not_wait_for_the_end_of_the_recording(self):
        port = free_port()
        with posttroll.Subscriber([f"tcp://localhost:{port}"]) as subscriber:
            arguments = ("publish", "--replay", "-", "--speed", 0, "--port", port, "--nameserver", "none")
            with command(*arguments) as publish:
                for number in range(3):
                    publish.stdin.write(f"{posttroll.Message('/a', 'info', number)}\n")
                    publish.stdin.flush()
                    assert receive(subscriber)[0].data == number
                publish.stdin.close()
                publish.stdin = None
                assert publish.wait(DEADLINE) == 0

    def test_recordings_are_utf_8_in_any_locale(self, tmp_path):
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
            for form in ("--raw", "--json"):
                arguments = ("subscribe", "--address", address, form, "-n", 2)
                with command(*arguments, env=environment, encoding="utf-8") as subscribe:
                    wait_for(lambda: publisher.subscriber_count == 1)
                    publisher.send(posttroll.Message("/a", "info", "Zürich → \u4eac"))
                    publisher.send(posttroll.Message("/a", "info", {"half": "\ud83d"}))
                    status, out, _ = finish(subscribe)
                first, second = out.splitlines()
                assert status == 0
                if form == "--json":
                    assert [json.loads(first)["data"], json.loads(second)["data"]["half"]] == [
                        "Zürich → \u4eac",
                        "\ud83d",
                    ]
                else:
                    assert posttroll.Message.decode(first).data == "Zürich → \u4eac"
                wait_for(lambda: publisher.subscriber_count == 0)


class TestTerminal:
    """What people see."""

    def test_subscribe_is_readable_and_coloured(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            with on_terminal("subscribe", "--address", address, "-n", "1") as (running, read_to, _):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a/b", "file", {"uri": "/data/x", "evil": "\033[2J"}))
                seen = read_to("/data/x")
                assert running.wait(DEADLINE) == 0
                seen = read_to("[2J")
        assert "\033[1;32m/a/b\033[0m" in seen
        assert "\033[2J" not in seen  # data cannot give orders to the terminal

    @pytest.mark.parametrize("how", ["option", "variable"])
    def test_no_color(self, how, monkeypatch):
        words = ["--no-color"] if how == "option" else []
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            master, slave = pty.openpty()
            environment = {**os.environ, **({"NO_COLOR": "1"} if how == "variable" else {})}
            arguments = ("subscribe", "--address", address, "-n", "1", *words)
            with command(*arguments, stdout=slave, env=environment) as running:
                os.close(slave)
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a/b", "file", {"uri": "/data/x"}))
                assert running.wait(DEADLINE) == 0
                seen = os.read(master, 4096).decode()
            os.close(master)
        assert "/data/x" in seen
        assert "\033" not in seen

    def test_a_quiet_replay_from_where_stdin_stands(self, tmp_path):
        recording = tmp_path / "recording"
        lines = [f"{posttroll.Message('/a', 'info', n)}\n" for n in range(4)]
        recording.write_text("not a message\n" + "".join(lines))
        for words, expected in (([], "4/4\r\n"), (["-q"], "")):
            with recording.open("rb") as stdin:
                os.lseek(stdin.fileno(), len("not a message\n"), os.SEEK_SET)
                master, slave = pty.openpty()
                arguments = ("publish", "--replay", "-", "--subscribers", 0, "--speed", 0, *words)
                with command(*arguments, "--nameserver", "localhost", stdin=stdin, stderr=slave) as running:
                    os.close(slave)
                    assert running.wait(DEADLINE) == 0
                os.set_blocking(master, False)
                seen = ""
                with contextlib.suppress(OSError):
                    while text := os.read(master, 4096):
                        seen += text.decode()
                os.close(master)
            assert seen.endswith(f"{expected}4 messages to 0 subscribers\r\n" if expected else "")
            assert bool(seen) == bool(expected)

    def test_a_replay_shows_its_progress(self, tmp_path):
        recording = tmp_path / "recording"
        recording.write_text("".join(f"{posttroll.Message('/a', 'info', n)}\n" for n in range(4)))
        arguments = ("publish", "--replay", str(recording), "--subscribers", "0", "--speed", "0")
        with on_terminal(*arguments, "--nameservers", "localhost") as (running, read_to, _):
            seen = read_to("4/4")
            assert running.wait(DEADLINE) == 0
        assert "[##############################] 4/4" in seen

    def test_top_is_live_and_quits_on_q(self):
        with nameserver(), posttroll.Publish("feeder", nameservers=["localhost"]) as publisher:
            with on_terminal("top", "--interval", "0.3") as (running, read_to, terminal):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                stop = threading.Event()

                def feed() -> None:
                    while not stop.wait(0.02):
                        publisher.send(posttroll.Message("/fed", "info", "x" * 50))
                        publisher.heartbeat(0.1)

                feeder = threading.Thread(target=feed)
                feeder.start()
                try:
                    seen = read_to("/fed")
                    seen = read_to("/heartbeat/feeder")
                finally:
                    stop.set()
                    feeder.join()
                os.write(terminal, b"q")
                assert running.wait(DEADLINE) == 0
        assert "\033[H\033[J" in seen
        assert re.search(r"feeder +/fed +info +[1-9]", seen)

    @pytest.mark.parametrize("form", [None, "--json", "--raw"])
    def test_messages_cannot_give_orders_to_the_terminal(self, form):
        """Wherever they have them: in subject, type, sender, keys, values."""
        evil = "\033[2J\x9b3J\u202e"
        orders = posttroll.Message(f"/subject{evil}", f"type{evil}", {f"key{evil}": f"value{evil}", "text": f"a{evil}"})
        orders.sender = f"sender{evil}"
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            words = ["subscribe", "--address", address, "-n", "2", "--no-color", *([form] if form else [])]
            with on_terminal(*words) as (running, read_to, _):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(orders)
                publisher.send(posttroll.Message("/last", "info"))
                seen = read_to("/last")
                assert running.wait(DEADLINE) == 0
        for word in ("/subject", "type", "sender", "key", "value"):
            assert word + "\\u001b[2J\\u009b3J\\u202e" in seen
        assert not set("\033\x9b\u202e") & set(seen)
        if form == "--json":
            assert json.loads(seen.splitlines()[0])["data"]["text"] == f"a{evil}"

    def test_what_a_terminal_cannot_show_ends_nothing(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://localhost:{publisher.port_number}"
            words = ("subscribe", "--address", address, "-n", "3")
            with on_terminal(*words, PYTHONIOENCODING="ascii") as (running, read_to, _):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info", "Zürich → Tokyo"))
                publisher.send(posttroll.Message("/a", "info", {"half": "\ud83d"}))
                publisher.send(posttroll.Message("/last", "info"))
                seen = read_to("/last")
                assert running.wait(DEADLINE) == 0
        assert "Z\\xfcrich \\u2192 Tokyo" in seen

    def test_the_progress_of_a_replay_that_ends_early(self, tmp_path):
        recording = tmp_path / "recording"
        recording.write_text("".join(f"{posttroll.Message('/a', 'info', n)}\n" for n in range(3)) + "broken\n")
        arguments = ("publish", "--replay", str(recording), "--subscribers", "0", "--speed", "0")
        with on_terminal(*arguments, "--nameserver", "localhost") as (running, read_to, _):
            seen = read_to("line 4")
            assert running.wait(DEADLINE) == 1
        assert "[######################........] 3/4\r\n3 messages sent until then\r\n" in seen

    def test_top_restores_the_terminal(self):
        """With q as with a signal."""
        for end in (b"q", signal.SIGTERM, signal.SIGINT):
            with nameserver(), on_terminal("top", "--interval", "0.1") as (running, read_to, terminal):
                before = termios.tcgetattr(terminal)[3]
                assert before & termios.ICANON
                wait_for(lambda: not termios.tcgetattr(terminal)[3] & termios.ICANON)
                read_to("posttroll top")
                os.write(terminal, end) if isinstance(end, bytes) else running.send_signal(end)
                wait_for(lambda: running.poll() is not None)
                assert termios.tcgetattr(terminal)[3] == before
                assert running.returncode == 0

    def test_top_in_the_background_is_not_stopped(self):
        """As by ``top &``: it leaves the terminal alone."""
        master, slave = pty.openpty()

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        job = (sys.executable, "-m", "posttroll", "top", "-n", "1", "--interval", "0.1")
        words = ("bash", "-c", 'set -m; "$0" "$@" & wait $!', *job)
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        with nameserver(), process(*words, **streams, preexec_fn=own_terminal) as shell:
            os.close(slave)
            assert shell.wait(DEADLINE) == 0
            assert "posttroll top" in os.read(master, 4096).decode()
        os.close(master)

    def test_top_into_a_file_leaves_the_terminal_alone(self, tmp_path):
        master, slave = pty.openpty()
        views = tmp_path / "views"
        with nameserver(), views.open("w") as stdout:
            with command("top", "-n", 99, "--interval", 0.1, stdin=slave, stdout=stdout) as top:
                wait_for(lambda: "posttroll top" in views.read_text())
                assert termios.tcgetattr(slave)[3] & termios.ICANON
                top.terminate()
                assert finish(top)[::2] == (0, "")
        os.close(slave)
        os.close(master)

    def test_top_shortens_subjects_so_that_the_numbers_are_seen(self):
        subject = "/a/subject" + "/with/many/words" * 10 + "/end"
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            names = ["a", "the_publisher_with_a_rather_long_name_for_a_table"]
            publishers = [world.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in names]
            running, read_to, terminal = world.enter_context(on_terminal("top", "--interval", "0.5", size=(100, 9)))
            for publisher in publishers:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.heartbeat(1)
                for _ in range(30):
                    publisher.send(posttroll.Message(subject, "info", "x"))
            read_to("/end")
            os.write(terminal, b"q")
            assert running.wait(DEADLINE) == 0
            seen = read_to("/end")
        view = next(view for view in seen.split("\033[H\033[J") if "/end" in view).replace("\r", "")
        lines = view.splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 8
        headings = "PUBLISHER SUBJECT TYPE MSG/S BYTES/S SEEN OVERDUE LAST MINUTE"
        assert lines[2].split() == headings.split()
        for line in lines[3:]:
            assert re.search(r" +(beat +\d+\.\d +\d+ +\d+ s ago +0|info +\d+\.\d +\d+ +\d+ s ago) +█$", line)
        assert any(re.search(r"^a  .*  /a/s\S*\.\.\.\S*/end  ", line) for line in lines)
        assert any(re.search(r"^the_p\S*\.\.\.\S*ble  ", line) for line in lines)

    def test_services_are_watched_on_a_terminal_through_a_restart_of_the_nameserver(self):
        """The heading stays in sight, whatever there is, and the table comes back."""
        with contextlib.ExitStack() as world:
            for number in range(12):
                world.enter_context(posttroll.Publish(f"name{number:02}", nameservers=["localhost"]))
            first = world.enter_context(contextlib.ExitStack())
            first.enter_context(nameserver())
            wait_for(lambda: len(posttroll.get_pub_address("")) == 12)
            words = ("services", "--watch", "0.1", "--timeout", "0.2", "--no-color")
            running, read_to, _ = world.enter_context(on_terminal(*words, size=(100, 10)))
            read_to("name05")
            first.close()
            read_to("no answer from the nameserver on localhost")
            world.enter_context(nameserver())
            wait_for(lambda: len(posttroll.get_pub_address("")) == 12)
            before = read_to("no answer")
            read_to("name00", before.count("name00") + 2)
            read_to("\033[H\033[J", read_to("NAME").count("\033[H\033[J") + 2)
            running.send_signal(signal.SIGINT)
            assert running.wait(DEADLINE) == 0
            seen = read_to("NAME")
        for view in seen.split("\033[H\033[J")[1:-1]:
            lines = view.replace("\r", "").splitlines()
            assert lines[0].startswith("NAME  ")
            assert len(lines) <= 10
        assert "no answer" not in view
        assert lines[1].startswith("name00")


class TestLookingIn:
    """What ``subscribe`` can choose, and how it can show that."""

    MESSAGES = (
        ("/a", "file", {"uri": "/data/a", "size": 5, "of": {"pass": 7}, "list": [{"uid": "x"}]}),
        ("/a", "info", "text"),
        ("/b", "file", {"uri": "/data/b", "size": 12.5, "start": datetime(2026, 11, 24, 12, tzinfo=timezone.utc)}),
        ("/b", "file", {"uri": "/data/c", "size": "12", "type": "other", "ok": True}),
    )

    def look(self, *words: Any, messages: Any = MESSAGES) -> list[str]:
        """Return the lines that ``subscribe`` prints of messages and then of an end."""
        with posttroll.Publisher("tcp://*:0") as publisher:
            for message in messages:
                publisher.send(posttroll.Message(*message))
            address = local_address(publisher.port_number)
            status, out, err = run_command("subscribe", "--address", address, "--since", "1m", "--timeout", 1, *words)
        assert (status, err) == (0, ""), err
        return out.splitlines()

    @pytest.mark.parametrize(
        ("conditions", "uris"),
        [
            (["uri=/data/a"], "a"),
            (["size>5"], "b"),
            (["size>=5", "size<100"], "ab"),
            (["size==12.50"], "b"),
            (["size!=5", "type=file"], "bc"),
            (["of.pass=7"], "a"),
            (["list.0.uid=x"], "a"),
            (["start>2026-11-24T11:59Z"], "b"),
            (["start<=2026-11-24T13:00:00+01:00"], "b"),
            (["data.type=other"], "c"),
            (["subject=/b", "ok=true"], "c"),
            (["subject=/b", "ok=null"], "b"),
            (["age<60", "type=file"], "abc"),
            (["time>2026-11-24", "time < 9999-12-31T23:59:59-23:59", "type=file"], "abc"),
            (["size > 5"], "b"),
            ([" uri = /data/a "], "a"),
        ],
    )
    def test_where(self, conditions, uris):
        words = [word for condition in conditions for word in ("--where", condition)]
        assert self.look(*words, "--format", "{data[uri]}") == [f"/data/{uri}" for uri in uris]

    @pytest.mark.parametrize(
        ("option", "text", "reason"),
        [
            ("--where", "size", "not KEY=VALUE"),
            ("--where", "=5", "not KEY=VALUE"),
            ("--where", " =5", "not KEY=VALUE"),
            ("--where", "size=>5", "not KEY=VALUE"),
            ("--where", "size<>5", "not KEY=VALUE"),
            ("--where", "age<1m", "'1m' is not a number of seconds"),
            ("--where", "time>12:00", "'12:00' is not an ISO date-time"),
            ("--format", "{data[uri}", "cannot be used"),
            ("--format", "{data.}", "cannot be used"),
            ("--format", "{data!x}", "cannot be used"),
            ("--format", "{uri}", "there is no {uri}, but {subject}"),
            ("--sample", "0", "no whole number"),
        ],
    )
    def test_wrong_words(self, option, text, reason):
        status, out, err = run_here("subscribe", "--address", "tcp://localhost:1", option, text, "--timeout", 0)
        assert (status, out) == (2, "")
        assert reason in err

    def test_format(self):
        form = "{subject}|{data[uri]}|{data[size]:.1f}|{time:%Y}|{version}|{sender}|{data[of][pass]}|{{}}"
        sender, year = posttroll.get_sender(), datetime.now().year
        assert self.look("--format", form) == [
            f"/a|/data/a|5.0|{year}|v1.2|{sender}|7|{{}}",
            f"/a|||{year}|v1.2|{sender}||{{}}",
            f"/b|/data/b|12.5|{year}|v1.2|{sender}||{{}}",
            f"/b|/data/c|12|{year}|v1.2|{sender}||{{}}",
        ]

    def test_numbers_that_are_too_large_for_a_format_end_nothing(self):
        form = posttroll._Format("{data[size]:.1f}")
        assert form(posttroll.Message("/a", "info", {"size": 10**400})) == str(10**400)

    def test_a_format_in_a_format_and_what_holds_others(self):
        when = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
        messages = [("/a", "info", {"width": 6, "of": {"when": when, "list": [None, True]}})]
        assert self.look("--format", "{type:>{data[width]}}|{data[of]}", messages=messages) == [
            '  info|{"when": "2026-11-24T12:00:00+00:00", "list": [null, true]}'
        ]
        message = posttroll.Message(*messages[0])
        assert '    of     {"when": "2026-11-24T12:00:00+00:00", ' in posttroll._as_readable(message, color=False)

    @pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
    @pytest.mark.parametrize(
        ("words", "count"),
        [
            (["--where", "time>2026-01-01"], 2),
            (["--where", "when<2026-01-01"], 2),
            (["--format", "{time}{data}"], 4),
            (["--count-by", "time"], 5),
            ([], 4),
        ],
    )
    def test_times_at_the_ends_of_the_calendar_end_nothing(self, zone, words, count):
        """Whatever a sender says."""
        moments = (
            "0001-01-01T00:00:00",
            "9999-12-31T23:59:59",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
        )
        with posttroll.Publisher("tcp://*:0") as publisher:
            for moment in moments:
                head = f"pytroll://a info a@b {moment} v1.2 application/json "
                publisher.send(f'{head}{{"when": "{moment}"}}')
            address = local_address(publisher.port_number)
            arguments = ("subscribe", "--address", address, "--since", "1m", "--timeout", 0.5, *words)
            status, out, err = run_command(*arguments, env={**os.environ, "TZ": zone})
        assert (status, err, out.count("\n")) == (0, "", count)

    @pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
    @pytest.mark.parametrize("moment", ["0001-01-01", "9999-12-31", "0001-01-01T00:00+23:59", "9999-12-31T23:00-23:59"])
    def test_since_the_ends_of_the_calendar(self, zone, moment):
        arguments = ("subscribe", "--address", "tcp://localhost:1", "--timeout", 0, "--since", moment)
        status, _, err = run_command(*arguments, env={**os.environ, "TZ": zone})
        assert (status, err.count("\n")) == (1, 1)
        assert re.search(r"0 of 1 messages came|since has no local time: ....-..-.. 00:00:00", err)

    def test_infinities_are_null_in_json(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            publisher.send(
                'pytroll://a info a@b 2026-01-01T00:00:00 v1.2 application/json {"a": [NaN, 1e999, 1.5], "n": "é"}'
            )
            publisher.send('pytroll://a info a@b 2026-01-01T00:00:00 v1.2 application/json ["NaN", -Infinity]')
            words = ("--address", local_address(publisher.port_number), "--since", "1m", "-n", 2, "--json")
            _, out, _ = run_command("subscribe", *words)
        data = [json.loads(line, parse_constant=pytest.fail)["data"] for line in out.splitlines()]
        assert data == [{"a": [None, None, 1.5], "n": "é"}, ["NaN", None]]

    def test_there_is_no_warning_if_all_is_well(self):
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as publisher:
            with command("subscribe", "-n", 1) as running:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(text_message("x"))
                status, out, err = finish(running)
        assert (status, out.count("\n"), err) == (0, 1, "")

    def test_the_last_count_is_seen_on_a_terminal(self):
        """Also if nothing more comes."""
        with posttroll.Publisher("tcp://*:0") as publisher:
            words = ("subscribe", "--address", local_address(publisher.port_number), "--count-by", "type")
            with on_terminal(*words) as (running, read_to, _):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                for number in range(7):
                    publisher.send(text_message(number))
                assert re.search(r"7 +info", read_to("7 "))
                running.send_signal(signal.SIGTERM)
                assert running.wait(DEADLINE) == 0

    def test_origin_and_age(self):
        """By two publishers, each is told of its own."""
        with posttroll.Publisher("tcp://*:0") as one, posttroll.Publisher("tcp://*:0") as two:
            addresses = [local_address(pub.port_number) for pub in (one, two)]
            words = [
                "--address",
                addresses[0],
                "--address",
                addresses[1],
                "-n",
                2,
                "--format",
                "{data} {origin} {sender} {age}",
            ]
            with command("subscribe", *words) as running:
                for pub, text in ((one, "one"), (two, "two")):
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    message = posttroll.Message("/a", "info", text)
                    message.sender = "user@elsewhere"
                    pub.send(message)
                _, out, _ = finish(running)
        found = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
        assert [found[text][:2] for text in ("one", "two")] == [[address, "user@elsewhere"] for address in addresses]
        assert all(0 <= float(age) < 60 for *_, age in found.values())

    @pytest.mark.parametrize(
        ("key", "counts"),
        [
            ("type", {"file": 3, "info": 1}),
            ("subject", {"/a": 2, "/b": 2}),
            ("data.type", {"": 3, "other": 1}),
            ("of.pass", {"": 3, "7": 1}),
        ],
    )
    def test_count_by(self, key, counts):
        heading, *rows = self.look("--count-by", key)
        assert heading.split() == ["MESSAGES", key.upper()]
        assert {kind: int(number) for number, _, kind in (row.partition("  ") for row in rows)} == {} or {
            row[len("MESSAGES") + 2 :]: int(row.split()[0]) for row in rows
        } == counts

    @pytest.mark.parametrize("key", ["messages", "data.my key"])
    def test_count_by_any_key_on_a_narrow_terminal(self, key):
        """Whatever the heading: also that of the other column, and one with a blank."""
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = local_address(publisher.port_number)
            publisher.send(posttroll.Message("/a", "info", {"my key": "x" * 50, "messages": "x" * 50}))
            words = ("--since", "1m", "-n", "1", "--count-by", key)
            with on_terminal("subscribe", "--address", address, *words, size=(40, 9)) as (running, read_to, _):
                assert running.wait(DEADLINE) == 0
                seen = read_to("xxx")
        assert re.search(rf"MESSAGES  {key.upper()}\r\n1         x{{14}}\.\.\.x{{13}}\r\n", seen)

    def test_sample(self):
        messages = [("/a", "info", str(number)) for number in range(10)]
        assert self.look("--sample", 3, "--format", "{data}", messages=messages) == ["2", "5", "8"]
        assert self.look("--sample", 3, "-n", 2, "--format", "{data}", messages=messages) == ["2", "5"]

    def test_unique(self):
        messages = [("/a", "info", {"uid": uid}) for uid in "abacab"]
        assert self.look("--unique", "uid", "--format", "{data[uid]}", messages=messages) == ["a", "b", "c"]

    def test_json_tells_origin_and_age_if_asked(self):
        (line,) = self.look("--json", "--type", "info")
        assert set(json.loads(line)) == {"subject", "type", "sender", "time", "version", "data"}

    def test_days_are_told_if_it_is_not_today(self, monkeypatch):
        monkeypatch.setenv("TZ", "XYZ-3")
        time.tzset()
        try:
            with freeze_time("2026-11-24 12:00:00", tz_offset=3):
                message = posttroll.Message("/a", "info", "text")
                shown = []
                for moment in (
                    datetime(2026, 11, 24, 11, 59, 59, tzinfo=timezone.utc),
                    datetime(2026, 11, 24, 11, 59),  # of a message v1.01: in UTC
                    datetime(2026, 11, 23, 21, 30, tzinfo=timezone.utc),
                    datetime(2026, 11, 23, 20, 30, tzinfo=timezone.utc),
                    datetime(2025, 11, 24, 12, tzinfo=timezone.utc),
                ):
                    message.time = moment
                    shown.append(posttroll._as_readable(message, False))
        finally:
            monkeypatch.undo()
            time.tzset()
        sender = posttroll.get_sender()
        assert shown == [
            f"14:59:59 /a info {sender} (1.000 s old) text",
            f"14:59:00 /a info {sender} (60 s old) text",
            f"00:30:00 /a info {sender} (14 h old) text",
            f"2026-11-23 23:30:00 /a info {sender} (16 h old) text",
            f"2025-11-24 15:00:00 /a info {sender} (365 d old) text",
        ]

    def test_a_terminal_sees_origins_with_verbose(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            address = local_address(publisher.port_number)
            with on_terminal("subscribe", "--address", address, "-n", "1", "-v") as (running, read_to, _):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a/b", "file", "text"))
                assert re.search(rf"\(0\.\d+ s old, from {address}\) text", read_to("text"))
                assert running.wait(DEADLINE) == 0

    def test_quiet_and_verbose(self):
        words = ["subscribe", "--service", "nobody", "--nameserver", "127.0.0.1:1", "--timeout", 2.5, "-q"]
        assert run_command(*words)[2] == "posttroll subscribe: 0 of 1 messages came.\n"  # without the warning
        told = []
        for loudness in ("-v", "-vv"):
            address = local_address(free_port())
            told.append(run_command("subscribe", "--address", address, "--timeout", 0.1, loudness)[2])
        assert "DEBUG" not in told[0]
        assert "DEBUG posttroll.subscriber: Subscribed to tcp://" in told[1]
        assert run_command("publish", "/a", "info", "--subscribers", 0, "-q")[1:] == ("", "")

    def test_verbose_tells_of_publishers(self):
        with nameserver(), posttroll.Publish("a_name", nameservers=["localhost"]) as pub:
            wait_for(lambda: posttroll.get_pub_address("a_name"))
            with command("subscribe", "--service", "a_name", "-n", 1, "-v") as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("x"))
                assert "INFO posttroll.subscriber: New publisher at tcp://" in finish(running)[2]


class TestPing:
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_nameserver_and_a_publisher_of_ours(self, count):
        with nameserver(), posttroll.Publish("a_name", nameservers=["localhost"]) as pub:
            wait_for(lambda: posttroll.get_pub_address("a_name"))
            status, out, err = run_command("ping", "a_name", "-c", count, "--interval", 0.01)
            assert pub.subscriber_count == 0
            address = posttroll.get_pub_address("a_name")[0]["URI"]
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert lines[:2] == [
            f"PING nameserver localhost: posttroll {posttroll.__version__}",
            f"PING a_name {address}: posttroll {posttroll.__version__}, 0 subscribers, 0 messages kept",
        ]
        assert len(lines) == 4 + 2 * count
        for number, line in enumerate(lines[2:-2]):
            peer = ["nameserver localhost", f"a_name {address}"][number % 2]
            assert re.fullmatch(rf"{peer}: seq={number // 2 + 1} time=\d+\.\d\d\d ms", line)
        for line in lines[-2:]:
            assert f"{count} asked, {count} answered, 0% lost, min/avg/max/mdev = " in line
            low, mean, high, deviation = map(float, line.split()[-2].split("/"))
            assert 0 < low <= mean <= high
            assert deviation <= high - low

    def test_a_publisher_of_another_kind(self):
        with raw_publisher() as (sock, address), raw_socket(zmq.SUB, int(address.rpartition(":")[2])) as listener:
            listener.subscribe(b"")
            status, out, err = run_command("ping", "--address", address, "-c", 2, "--interval", 0.01, "--timeout", 1)
            sock.send(b"still there")
            assert listener.poll(1000 * DEADLINE)
            assert listener.recv() == b"still there"
        assert (status, err) == (0, "")
        assert f"PING {address}: version unknown (time until ZeroMQ greets)" in out
        assert "2 asked, 2 answered" in out

    def test_nobody_answers(self):
        address = local_address(free_port())
        words = ("--address", address, "-c", 2, "--interval", 0.01, "--timeout", 0.1)
        status, out, err = run_command("ping", *words)
        assert status == 1
        assert f"{address}: seq=2 no answer after 0.1 s\n--- {address}: 2 asked, 0 answered, 100% lost\n" in out
        assert err == f"posttroll ping: no answer from {address}.\n"

    def test_unknown_names_and_no_nameserver(self):
        with nameserver():
            status, _, err = run_command("ping", "nobody", "-c", 1)
        assert (status, err) == (1, "posttroll ping: the nameserver on localhost knows no publisher nobody.\n")
        status, out, err = run_command("ping", "-c", 1, "--timeout", 0.1)
        assert (status, err) == (1, "posttroll ping: no answer from nameserver localhost.\n")
        assert "PING nameserver localhost: no answer yet" in out

    def test_an_answer_that_is_no_message(self):
        """It ends nothing: the others are asked."""
        port = free_port()
        with answering(b"\xffjunk", port), nameserver():
            hosts = ("--nameserver", f"localhost:{port}", "--nameserver", "localhost")
            status, out, err = run_here("ping", *hosts, "-c", 1, "--timeout", DEADLINE)
        assert (status, err) == (1, f"posttroll ping: no answer from nameserver localhost:{port}.\n")
        assert "--- nameserver localhost: 1 asked, 1 answered" in out

    def test_control_c_ends_it_with_the_summary_and_quiet_shows_that_alone(self):
        summary = r"--- nameserver localhost: \d+ asked, \d+ answered, \d+% lost.*\n"
        with nameserver():
            with command("ping", "--interval", 0.01) as running:
                await_line(running, "seq=1 time")
                running.send_signal(signal.SIGINT)
                status, out, _ = finish(running)
            assert status == 0
            assert re.fullmatch(summary, out.splitlines(keepends=True)[-1])
            with command("ping", "-q", "-c", 2, "--interval", 0.01) as running:
                status, out, _ = finish(running)
            assert status == 0
            assert re.fullmatch("PING .*\n" + summary, out)

    def test_control_c_during_the_first_question(self, monkeypatch):
        """Which is not counted: so nobody can be said not to have answered."""

        def interrupt(*args: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            raise TimeoutError

        monkeypatch.setattr(posttroll, "describe_nameserver", interrupt)
        status, out, err = run_here("ping", "--interval", 0.01)
        assert (status, out.splitlines()[-1], err) == (0, "--- nameserver localhost: 0 asked, 0 answered, 0% lost", "")

    def test_names_that_do_not_resolve_for_minutes(self, monkeypatch):
        over, ended = threading.Event(), []

        def resolve(*args: Any, **kwargs: Any) -> Any:
            over.wait(DEADLINE)
            ended.append(True)
            raise OSError("no answer from the name server")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "create_connection", resolve)
        try:
            status, out, err = run_here("ping", "--address", "tcp://slow.invalid:9", "-c", 2, "--timeout", 0.1)
            assert not ended
        finally:
            over.set()
        assert (status, err) == (1, "posttroll ping: no answer from tcp://slow.invalid:9.\n")
        assert out.endswith("--- tcp://slow.invalid:9: 2 asked, 0 answered, 100% lost\n")

    def test_a_publisher_that_ends_meanwhile_is_counted_as_lost(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            words = ("--address", local_address(pub.port_number), "-c", 20, "--interval", 0.05, "--timeout", 0.05)
            with command("ping", *words) as running:
                await_line(running, "seq=1 time")
                pub.stop()
                status, out, err = finish(running)
        assert (status, err) == (0, "")
        assert re.search(r"20 asked, 1?\d answered, [1-9]\d?% lost", out)


class TestRelayCommand:
    @pytest.fixture(autouse=True)
    def directory(self, monkeypatch, tmp_path):
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(tmp_path / "durable"))

    @pytest.fixture
    def source(self):
        with posttroll.Publisher("tcp://*:0", "source") as pub:
            yield pub

    @contextlib.contextmanager
    def relay(self, source: Any, port: int, *words: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a relay that listens to a publisher, and publishes on *port*."""
        addresses = ("--address", local_address(source.port_number), "--out-nameserver", "none", "--port", port)
        before = set(source._audience.peers)
        with command("relay", *addresses, *words, start_new_session=True) as running:
            wait_for(lambda: set(source._audience.peers) - before or running.poll() is not None)
            yield running

    def end(self, running: Any, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        running.send_signal(number)
        return finish(running)

    def test_byte_for_byte(self, source):
        """What is chosen, in its order; also a message in ISO-8859-1, as old programs send."""
        port = free_port()
        old = "pytroll://a/old info user@host 2026-11-24T12:00:00 v1.01 text/ascii M\xfcnchen".encode("iso-8859-1")
        wanted = [posttroll.Message("/a/x", "info", data).encode().encode() for data in ("é", {"n": [1.50]}, b"\0", "")]
        with self.relay(source, port, "/a", "--type", "info") as running, raw_socket(zmq.SUB, port) as other:
            other.subscribe(b"")
            with contextlib.closing(posttroll.Inquiry(local_address(port))) as inquiry:
                wait_for(lambda: inquiry.ask(DEADLINE)["subscribers"])
            for raw in (old, *wanted, text_message("x", "/b").encode(), old):
                source.send(raw)
            source.send(posttroll.Message("/a", "file", "x"))
            source.send(text_message("end"))
            got = []
            while not got or b" end" not in got[-1]:
                assert other.poll(1000 * DEADLINE)
                got.append(other.recv())
            assert got[:-1] == [old, *wanted, old]
            status, out, err = self.end(running)
        assert (status, out, err) == (0, "", "7 messages relayed\n")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_a_restart_loses_nothing(self, source, number):
        """While messages are sent; only the one in hand may come twice, after SIGKILL."""
        port = free_port()
        numbers = Numbers(source)
        words = ("--durable", "name", "--out-set", "discovery_seconds=1.5")  # longer than until it is found again
        with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
            with self.relay(source, port, *words) as running:
                numbers.send(200, 0.0005)
                wait_for(lambda: data)
                if number == signal.SIGINT:  # from the terminal: to both processes
                    os.killpg(running.pid, number)
                else:
                    running.send_signal(number)
                numbers.send(100, 0.0005)
                status = running.wait(DEADLINE)
            assert status == (0 if number != signal.SIGKILL else -number)
            with self.relay(source, port, *words) as running:
                wait_for(lambda: len(set(data)) == numbers.count)
                assert running.poll() is None
            counts = collections.Counter(data)
        assert sorted(counts) == list(range(numbers.count))
        assert sum(counts.values()) - len(counts) <= (number == signal.SIGKILL)

    def test_two_relays_in_a_circle(self, source):
        """Nothing goes round twice; the same text sent twice is sent twice."""
        ports = [free_port(), free_port()]
        addresses = list(map(local_address, ports))
        with contextlib.ExitStack() as world:
            one = world.enter_context(self.relay(source, ports[0], "--address", addresses[1]))
            words = ("relay", "--address", addresses[0], "--port", ports[1], "--out-nameserver", "none")
            two = world.enter_context(command(*words))
            subs = [world.enter_context(posttroll.Subscriber([address])) for address in addresses]
            data = [world.enter_context(serving(sub)) for sub in subs]
            for address, count in zip(addresses, (2, 2)):  # the other relay, and ours
                with contextlib.closing(posttroll.Inquiry(address)) as inquiry:
                    wait_for(lambda inquiry=inquiry, count=count: (inquiry.ask(1) or {}).get("subscribers") == count)
            numbers = Numbers(source)
            numbers.send(50)
            for _ in range(2):
                source.send(text_message("twice"))
            for number in range(3):  # what goes round has come again by then
                source.send(text_message(f"round {number}"))
                wait_for(lambda number=number: all(f"round {number}" in each for each in data))
            expected = sorted([*range(50), "twice", "twice", "round 0", "round 1", "round 2"], key=str)
            assert [sorted(each, key=str) for each in data] == [expected, expected]
            assert [self.end(running)[0] for running in (one, two)] == [0, 0]

    def test_by_nameservers_from_plain_to_secure(self, keys, monkeypatch):
        """Each end has a configuration, a nameserver and a backend of its own."""
        plain = free_port()
        with contextlib.ExitStack() as world:
            with config.set(backend="unsecure_zmq"):
                source = world.enter_context(posttroll.Publisher("tcp://*:0", "source"))
            world.enter_context(nameserver(multicast_enabled=False))
            words = ["--address", local_address(source.port_number), "--in-set", "backend=unsecure_zmq"]
            words += ["--out-set", f"pub_min_port={plain}", "--out-set", f"pub_max_port={plain + 1}"]
            running = world.enter_context(command("relay", *words, "--name", "site", "--out-nameserver", "localhost"))
            sub = world.enter_context(posttroll.Subscribe("site", timeout=DEADLINE))
            assert sub.addresses[0].endswith(f":{plain}")
            assert posttroll.get_pub_address("site")[0]["backend"] == "secure_zmq"
            assert source.wait_for_subscribers(1, DEADLINE)
            source.send(text_message("through"))
            assert received_data(sub) == ["through"]
            with subscribing(plain, **keys.of("no CURVE")) as stranger:
                source.send(text_message("again"))
                assert received_data(sub) == ["again"]
                assert next(stranger.recv(0.2)) is None
            assert self.end(running)[0] == 0

    def test_what_is_lost_on_the_way_is_no_success(self, source):
        """A subscriber that does not read; its queue and the relay's hold ten messages each."""
        port = free_port()
        with zmq.Context() as context, context.socket(zmq.SUB) as slow:
            slow.linger = 0
            slow.rcvhwm, slow.rcvbuf = 1, 4096
            slow.subscribe(b"")
            with self.relay(source, port, "--out-set", "send_high_water_mark=10") as running:
                slow.connect(local_address(port))
                with contextlib.closing(posttroll.Inquiry(local_address(port))) as inquiry:
                    wait_for(lambda: inquiry.ask(DEADLINE)["subscribers"])
                for _ in range(300):
                    source.send(text_message("x" * 100_000))
                assert any("the queue of a slow subscriber is full" in line for line in running.stderr)
                slow.close()
                status, _, err = self.end(running)
        assert status == 1
        assert re.search(r"0 messages were gone before they could be relayed, [1-9]\d* on their way", err)

    def test_an_end_that_dies_is_told_and_nothing_is_taken_for_relayed(self, source):
        port = free_port()
        numbers = Numbers(source)
        with self.relay(source, port, "--durable", "name") as running:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
            (child,) = children.read_text().split()
            os.kill(int(child), signal.SIGKILL)
            numbers.send(5)
            status, out, err = finish(running)
        assert (status, out) == (1, "")
        assert err == "0 messages relayed\nposttroll relay: the end that publishes has ended, with status -9.\n"
        with posttroll.Subscriber([local_address(port)]) as sub, self.relay(source, port, "--durable", "name"):
            assert sorted(received_data(sub, 5)) == list(range(5))

    def test_an_end_that_dies_is_noticed_before_the_next_message(self, source):
        """A supervisor that starts it again must not wait for one."""
        with self.relay(source, free_port()) as running:
            (child,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            status, out, err = finish(running)
        assert (status, out) == (1, "")
        assert err == "0 messages relayed\nposttroll relay: the end that publishes has ended, with status -9.\n"

    def test_only_one_of_several_copies(self, source):
        port = free_port()
        with self.relay(source, port, "--unique", "uid") as running, posttroll.Subscriber([local_address(port)]) as sub:
            for uid in "aabab":
                source.send(copy_of(uid))
            source.send(text_message("end"))
            # In whatever order: the first may have been sent before the subscriber was there, and are caught up.
            assert sorted(data if data == "end" else data["uid"] for data in received_data(sub, 3)) == ["a", "b", "end"]
            assert self.end(running)[2] == "3 messages relayed\n"

    def test_control_c_does_not_reach_the_end_that_publishes(self, source):
        """Also while it starts, when it could not do anything but show a traceback."""
        with self.relay(source, free_port()) as running:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
            assert os.getpgid(int(children)) != os.getpgid(running.pid)
            os.killpg(running.pid, signal.SIGINT)
            status, out, err = finish(running)
            assert status in (0, 130)  # the latter if it has only just subscribed
            assert (out, err) == ("", "0 messages relayed\n")

    def test_what_hinders_the_start(self, source):
        with posttroll.Publisher("tcp://*:0") as other, self.relay(source, other.port_number) as running:
            status, _, err = finish(running)
        assert status == 1
        assert "posttroll relay: Address already in use" in err
        with posttroll.Subscriber([], durable="name"):
            status, _, err = run_command("relay", "--address", "tcp://localhost:1", "--durable", "name")
        assert status == 1
        assert "posttroll relay: The durable name 'name' is in use by process" in err
        status, _, err = run_command("relay", "--out-set", "no_key=1")
        assert status == 2
        assert "there is no key 'no_key'" in err

    def test_memory_of_echoes_is_bounded(self):
        echoes = posttroll._Echoes()
        for number in range(2 * echoes.LIMIT):
            assert not echoes.is_echo(b"%d" % number, "here")
        assert len(echoes._origins) == echoes.LIMIT
        assert echoes.is_echo(b"%d" % number, "there")
        assert not echoes.is_echo(b"0", "there")


class TestServicesAndTop:
    """What there is on the network."""

    def test_services_as_table_and_json(self):
        gone = posttroll.Publisher("tcp://*:0", "gone").start()
        with nameserver(), posttroll.Publish("alive", aliases=["other"], nameservers=["localhost"]):
            registration = posttroll.Message(
                "/address/gone", "info", {"URI": f"tcp://127.0.0.1:{gone.port_number}", "service": ["gone"]}
            )
            gone.stop()
            assert raw_request(config.get("broadcast_port"), registration.encode().encode()) == [b"ok"]
            wait_for(lambda: posttroll.get_pub_address("alive"))
            status, table, err = run_command("services")
            assert (status, err) == (0, "")
            status, out, err = run_command("services", "--json")
            assert (status, err) == (0, "")
            status, only, _ = run_command("services", "other", "--json")
        rows = {row["name"]: row for row in json.loads(out)}
        assert rows["alive"]["answers"] is True
        assert rows["alive"]["aliases"] == ["other"]
        assert rows["gone"]["answers"] is False
        assert [row["name"] for row in json.loads(only)] == ["alive"]
        lines = table.splitlines()
        assert lines[0].split() == ["NAME", "ALIASES", "ADDRESS", "BACKEND", "VERSION", "AGE", "ANSWERS"]
        assert lines[1].startswith("alive")
        assert lines[1].endswith("yes")
        assert lines[2].endswith("no")

    def test_services_without_a_nameserver(self):
        status, out, err = run_command("services", "--timeout", 0.2)
        assert (status, out) == (1, "")
        assert "no answer from the nameserver on localhost" in err

    def test_services_again_and_again(self):
        with nameserver(), command("services", "--watch", 0.1) as watch:
            for _ in range(3):
                await_line(watch, "ANSWERS")
            watch.send_signal(signal.SIGINT)
            assert finish(watch)[0] == 0

    def test_top_without_a_terminal_prints_so_many_views(self):
        with nameserver(), posttroll.Publish("feeder", nameservers=["localhost"]) as publisher:
            wait_for(lambda: posttroll.get_pub_address("feeder"))
            with command("top", "--interval", 0.5, "-n", 2) as top:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                while top.poll() is None:
                    publisher.send(posttroll.Message("/fed", "info", "x"))
                    time.sleep(0.01)
                status, out, _ = finish(top)
        assert status == 0
        assert out.count("PUBLISHER") == 2
        assert "\033" not in out
        assert re.search(r"feeder +tcp://\S+ +/fed +info +[1-9]", out)

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_top_without_a_nameserver_is_no_success(self, form):
        status, out, err = run_command("top", "--interval", 0.1, *form)
        assert (status, out.count("no answer")) == (1, not form)
        assert "posttroll top: Didn't get an address after 1.0 seconds: no answer from the nameserver" in err

    def test_hosts_that_cannot_even_be_asked_for_hold_up_nothing(self):
        """Anybody can announce anything."""
        with nameserver(), posttroll.Publish("alive", nameservers=["localhost"]):
            for host in ("x" * 70, "a..b"):
                assert register(registration_of(URI=f"tcp://{host}:9", service=["odd"])) == b"ok"
            wait_for(lambda: posttroll.get_pub_address("alive"))
            status, out, err = run_command("services", "--json")
            assert (status, err) == (0, "")
            assert sorted(row["answers"] for row in json.loads(out)) == [False, False, True]
            assert run_command("check", "odd")[0::2] == (2, "")
            status, out, err = run_command("ping", "odd", "-c", 1, "--timeout", 2)
            assert (status, out.count("no answer after 2 s")) == (1, 2)
        assert "FAIL  nameserver a..b: the name does not resolve" in run_command("doctor", "--nameserver", "a..b")[1]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_question_that_fails_is_not_waited_for(self):
        before = set(threading.enumerate())
        services = [posttroll._Service({"URI": f"tcp://127.0.0.1:{port}"}) for port in (1, 2, 3)]

        def ask(service: Any) -> str:
            if service is services[1]:
                raise RuntimeError("a fault")
            return service.address

        assert sorted(posttroll._ask_each(ask, services)) == [(each.address,) * 2 for each in services[::2]]
        assert list(posttroll._ask_each(ask, services[1:], workers=1)) == []
        wait_for(lambda: set(threading.enumerate()) <= before)

    def test_who_has_not_been_asked_in_time_is_not_taken_for_dead(self):
        """Hundreds that take a connection and say nothing do not hide one that answers."""
        with socket.create_server(("", 0), backlog=1000) as mute, nameserver():
            for number in range(300):
                uri = f"tcp://127.0.{1 + number // 250}.{1 + number % 250}:{mute.getsockname()[1]}"
                assert register(registration_of(URI=uri, service=["pub"])) == b"ok"
            with posttroll.Publish("alive", nameservers=["localhost"]):
                wait_for(lambda: posttroll.get_pub_address("alive"))
                _, out, _ = run_here("services", "--json", "--timeout", 5)
                assert {(row["name"], row["answers"]) for row in json.loads(out)} == {("pub", False), ("alive", True)}
                _, table, _ = run_here("services", "--timeout", 2)
        assert {line.split()[-1] for line in table.splitlines() if "pub" in line} >= {"?"}

    def test_services_are_sorted_by_name(self):
        names = ["zebra", "ant", "mouse", "bee", "yak", "cat"]
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            for name in names:
                world.enter_context(posttroll.Publish(name, nameservers=["localhost"]))
            wait_for(lambda: len(posttroll.get_pub_address("")) == len(names))
            _, table, _ = run_command("services")
            _, as_json, _ = run_command("services", "--json")
        assert [line.split()[0] for line in table.splitlines()[1:]] == sorted(names)
        assert [row["name"] for row in json.loads(as_json)] == sorted(names)

    def test_a_service_that_is_unknown_or_does_not_answer_is_no_success(self):
        with nameserver(), posttroll.Publish("alive", aliases=["other"], nameservers=["localhost"]) as alive:
            wait_for(lambda: posttroll.get_pub_address("alive"))
            silent = posttroll.Message(
                "/address/silent", "info", {"URI": f"tcp://127.0.0.1:{free_port()}", "service": ["silent", "both"]}
            )
            both = posttroll.Message(
                "/address/b", "info", {"URI": f"tcp://localhost:{alive.port_number}", "service": ["both"]}
            )
            for registration in (silent, both):
                assert raw_request(config.get("broadcast_port"), registration.encode().encode()) == [b"ok"]
            for words, missing in [
                (["alive"], None),
                (["alive", "other", "both"], None),
                (["nonesuch"], "nonesuch"),
                (["silent"], "silent"),
                (["silent", "alive", "nonesuch"], "silent, nonesuch"),
                ([], None),
            ]:
                status, out, err = run_command("services", *words)
                assert (status, err) == (
                    (0, "") if missing is None else (1, f"posttroll services: no publisher of {missing} answers.\n")
                )
                assert out.startswith("NAME")

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_services_are_watched_through_a_restart_of_the_nameserver(self, form):
        with contextlib.ExitStack() as world, posttroll.Publish("alive", nameservers=["localhost"]):
            first = world.enter_context(contextlib.ExitStack())
            first.enter_context(nameserver())
            watch = world.enter_context(command("services", "--watch", 0.1, "--timeout", 0.2, *form))
            await_line(watch, "alive")
            first.close()
            for line in watch.stderr:
                if "no answer from the nameserver on localhost" in line:
                    break
            with nameserver():
                wait_for(lambda: posttroll.get_pub_address("alive"))
                for _ in range(12):  # what was known is shown meanwhile
                    line = await_line(watch, "alive")
            watch.send_signal(signal.SIGINT)
            assert finish(watch)[0] == 0
        if form:
            assert json.loads(line)[0]["name"] == "alive"

    def test_all_of_many_secure_services_answer_each_time(self, keys):
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            for number in range(6):
                world.enter_context(posttroll.Publish(f"name{number}", nameservers=["localhost"]))
            wait_for(lambda: len(posttroll.get_pub_address("")) == 6)
            for _ in range(3):
                status, out, err = run_command("services", "--json", *(f"name{number}" for number in range(6)))
                assert (status, err) == (0, "")
                assert [row["answers"] for row in json.loads(out)] == [True] * 6

    @pytest.mark.parametrize("hard", [None, 256])
    def test_top_with_more_publishers_than_files(self, hard, tmp_path):
        """One socket that listens on 400 ports is as good as 400 publishers."""
        with nameserver(), zmq.Context() as context, context.socket(zmq.XPUB) as sock:
            sock.setsockopt(zmq.XPUB_VERBOSE, 1)
            sock.linger = 0
            for number in range(400):
                port = sock.bind_to_random_port("tcp://127.0.0.1", 33000, 49000)
                data = {"URI": f"tcp://127.0.0.1:{port}", "service": [f"name{number}"]}
                register = posttroll.Message(f"/address/name{number}", "info", data)
                assert posttroll.ask_nameserver(
                    f"tcp://127.0.0.1:{config.get('broadcast_port')}", register.encode().encode(), 9
                )
            limit = "ulimit -Sn 1024" if hard is None else f"ulimit -n {hard}"
            shell = ("sh", "-c", f'{limit}; exec "$0" "$@"', sys.executable, LIBRARY)
            views = tmp_path / "views"
            with (
                views.open("w") as stdout,
                process(*shell, "top", "--interval", "0.5", "-n", "99", stdout=stdout) as top,
            ):
                wanted = 400 if hard is None else 40
                subscriptions, sent = 0, 0.0

                def seen() -> list[str]:
                    nonlocal subscriptions, sent
                    while sock.poll(0):
                        subscriptions += sock.recv()[:1] == b"\1"
                    if (
                        subscriptions >= 2 * wanted and time.monotonic() > sent + 0.2
                    ):  # to all messages, and to its mark
                        sock.send(posttroll.Message("/seen", "info", "x").encode().encode())
                        sent = time.monotonic()
                    return [
                        view for view in views.read_text().split("posttroll top") if view.count(" /seen ") >= wanted
                    ]

                wait_for(lambda: len(seen()) > 1)
                top.terminate()
                assert finish(top)[::2] == (0, "")
            view = seen()[-1]
        count = int(re.search(r"(\d+) publishers", view)[1])
        assert len(re.findall(r"^name\d+ .* /seen  ", view, re.MULTILINE)) == count
        if hard is None:
            assert count == 400
        else:
            assert 40 <= count < hard
            assert f"Only {count} of 400 publishers: allow more open files (ulimit -n)." in view

    def test_top_counts_missed_heartbeats(self):
        with nameserver(), posttroll.Publish("late", nameservers=["localhost"]) as late:
            with posttroll.Publish("none", nameservers=["localhost"]) as none:
                with command("top", "--interval", 0.5, "-n", 30) as top:
                    for publisher in (late, none):
                        assert publisher.wait_for_subscribers(1, DEADLINE)
                    late.heartbeat(1)
                    none.send(posttroll.Message("/quiet", "info"))
                    assert self.beats_missed(await_line(top, "/heartbeat/late")) == "0"
                    while int(self.beats_missed(await_line(top, "/heartbeat/late"))) < 2:
                        pass
                    assert self.beats_missed(await_line(top, "/quiet")) == ""
                    late.heartbeat()  # which promises nothing, so what the one before has promised holds
                    while self.beats_missed(await_line(top, "/heartbeat/late")) != "0":
                        pass
                    top.terminate()
                    assert finish(top)[0] == 0

    @staticmethod
    def beats_missed(line: str) -> str:
        """Return what stands behind SEEN in a line of top."""
        return re.search(r"s ago *(\d*)", line)[1]

    def test_no_heartbeats_are_expected_of_a_publisher_that_has_said_goodbye(self, monkeypatch):
        """One that came back on another port is another one; but one nameserver alone cannot tell."""
        monkeypatch.setattr(posttroll._Heartbeats, "overdue", lambda beats, now: 3)
        ports = old, new = free_port(), free_port()
        with contextlib.ExitStack() as world:
            first, life = (world.enter_context(contextlib.ExitStack()) for _ in range(2))
            first.enter_context(nameserver())
            publisher = life.enter_context(posttroll.Publish("a", old, nameservers=["localhost"]))
            loop = world.enter_context(contextlib.closing(posttroll.Loop()))
            other = free_port()
            world.enter_context(answering(answer_with([]), other))
            hosts = ["localhost", f"127.0.0.1:{other}"]
            network = world.enter_context(contextlib.closing(posttroll._Network([], hosts, loop)))
            network.LOOKUP, network.PATIENCE = 0.05, 0.1

            def overdue() -> list[Any]:
                """Return the numbers of heartbeats that are overdue, of the old publisher and of the new one."""
                publisher.heartbeat(1)
                assert network.run(time.monotonic() + 0.1)
                found = {row["address"].rpartition(":")[2]: row for row in network.view()["traffic"]}
                return [str(port) in found and found[str(port)]["heartbeats_overdue"] for port in ports]

            wait_for(lambda: overdue() == [3, False])
            first.close()
            wait_for(lambda: overdue() == [3, False] and "no answer" in network.problem)
            world.enter_context(nameserver())
            wait_for(lambda: overdue() == [3, False] and not network.problem)
            life.close()
            publisher = world.enter_context(posttroll.Publish("a", new, nameservers=["localhost"]))
            wait_for(lambda: overdue() == [None, 3])

    def test_odd_heartbeats(self):
        """Nothing is expected after one that promises nothing, whatever it is."""
        head = "pytroll://odd beat a@b 2026-01-01T00:00:00 v1.01 application/json "
        for interval in ["NaN", "-Infinity", "-1", "0", "false", "null", '"often"', "[]", "1" + "0" * 400, "true"]:
            heartbeats = posttroll._Heartbeats()
            heartbeats.take(posttroll.Message.decode(f'{head}{{"min_interval": {interval}}}'), 100.0)
            expected = {"1" + "0" * 400: (1e6, 8), "true": (1.0, 9000000 - 1)}.get(interval, (None, 0))
            assert (heartbeats.interval, heartbeats.overdue(9000100.4)) == expected
        heartbeats.take(posttroll.Message.decode(head + "[]"), 200.0)
        assert heartbeats.interval == 1.0

    def test_which_heartbeats_are_overdue(self):
        """Half an interval late is not late; what was missed is counted once, and stays so."""
        heartbeats = posttroll._Heartbeats()
        other = posttroll.Message("/a", "info", {"min_interval": 1})
        heartbeats.take(other, 0.0)
        assert (heartbeats.overdue(1000.0), heartbeats.missed(1000.0)) == (0, 0)
        beat = posttroll.Message("/heartbeat/a", "beat", {"min_interval": 10})
        for came, before, missed in ((1000.0, 0, 0), (1014.9, 0, 0), (1050.0, 3, 3), (1060.0, 0, 3)):
            assert heartbeats.overdue(came) == before
            heartbeats.take(beat, came)
            assert (heartbeats.overdue(came), heartbeats.missed(came)) == (0, missed)
        early = posttroll._Heartbeats()
        early.take(beat, -50.0)  # made before this host was started
        assert (early.overdue(0.0), early.last) == (4, -50.0)
        heartbeats.take(beat, 1000.0)  # caught up, after newer ones
        assert (heartbeats.overdue(1100.0), heartbeats.missed(1100.0)) == (3, 6)

    def test_top_forgets_what_is_gone_and_survives_a_restart_of_the_nameserver(self, monkeypatch):
        """A subject that is silent goes, a publisher goes when no nameserver knows it either."""
        with contextlib.ExitStack() as world:
            first = world.enter_context(contextlib.ExitStack())
            first.enter_context(nameserver())
            publishers = {
                name: world.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in "abc"
            }
            loop = world.enter_context(contextlib.closing(posttroll.Loop()))
            network = world.enter_context(contextlib.closing(posttroll._Network([], ["localhost"], loop)))
            network.LOOKUP, network.PATIENCE = 0.05, 0.1
            monkeypatch.setattr(posttroll._Network, "KEEP", 0.6)

            def subjects() -> set[str]:
                assert network.run(time.monotonic() + 0.1)
                for name in publishers:
                    publishers[name].send(posttroll.Message(f"/steady/{name}", "info"))
                lines = posttroll._top_lines(network.view(), {"seconds": 0.0, "traffic": []}, network.problem, 0)
                return {line.split()[2] for line in lines[3:]}

            steady = {f"/steady/{name}" for name in publishers}
            wait_for(lambda: subjects() >= steady)
            publishers["a"].send(posttroll.Message("/once", "info"))
            wait_for(lambda: "/once" in subjects())
            wait_for(lambda: subjects() == steady)
            first.close()
            wait_for(lambda: subjects() == steady and "no answer from the nameserver" in network.problem)
            assert network.view()["nameservers"] == {"localhost": False}
            world.enter_context(nameserver())
            wait_for(lambda: subjects() == steady and not network.problem and len(posttroll.get_pub_address("")) == 3)
            silent = publishers.pop("b")
            silent._publisher._at_end = lambda: None  # it is still announced
            silent._publisher.stop()
            wait_for(lambda: subjects() == {"/steady/a", "/steady/c"})
            addresses = {each["publisher"]: each["address"] for each in network.view()["publishers"]}
            assert posttroll.get_pub_address("b")[0]["URI"] == addresses["b"]  # it may come back as long as it is known
            silent.stop()
            wait_for(
                lambda: {each["publisher"] for each in network.view()["publishers"]} == {"a", "c"} or not subjects()
            )
            assert subjects() == {"/steady/a", "/steady/c"}


class TestSparkline:
    """The picture of the last minute in ``posttroll top``."""

    def test_its_heights_and_widths(self, monkeypatch):
        minute = [0] * 30 + [1] * 10 + [2] * 10 + [4] * 10
        output = io.TextIOWrapper(io.BytesIO(), "utf-8")
        monkeypatch.setattr(sys, "stdout", output)
        assert posttroll._sparkline(minute, 60) == " " * 30 + "▂" * 10 + "▄" * 10 + "█" * 10
        assert posttroll._sparkline(minute, 12) == "      ▂▂▄▄██"
        assert posttroll._sparkline([0] * 60, 12) == " " * 12
        assert posttroll._sparkline([0] * 59 + [1], 7) == "      █"
        assert posttroll._sparkline([1000] + [1] * 59, 60) == "█" + "▁" * 59  # what is little is seen, too
        assert all(len(posttroll._sparkline(minute, width)) == width for width in range(61))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert posttroll._sparkline(minute, 12) == "      ::==@@"

    def test_narrow_tables(self):
        """Columns that are narrow anyway do not become wider, and there is a table before there is a picture."""
        rows = [["a", "/a", "12"], ["b" * 30, "/b", "3"]]
        lines = posttroll._table(rows, ["NAME", "SUBJECT", "MSG/S"], 28, [0, 1])
        assert lines == ["NAME          SUBJECT  MSG/S", "a             /a       12", "bbbbb...bbbb  /b       3"]
        assert posttroll._table(rows[:1], ["NAME", "SUBJECT", "MSG/S"], 12, [0, 1]) == [
            "NAME  SUBJEC",
            "a     /a",
        ]
        row = {"publisher": "name", "address": "a", "subject": "/b", "type": "info", "heartbeats_overdue": None}
        row.update({"messages": 1, "bytes": 50, "ago": 1.0, "last_minute": [1] * 60})
        view = {"seconds": 2.0, "publishers": [], "caught_up": 0, "missed": 0, "traffic": [row]}
        for width in (1, 10, 20, 40, 60, 70, 80, 200):
            lines = posttroll._top_lines(view, {"seconds": 0.0, "traffic": []}, "", width)
            assert max(map(len, lines)) <= width
            assert ("LAST MINUTE" in lines[2]) == (width >= 70)
            assert lines[2].startswith("PUBLISHER  SUBJECT  TYPE  MSG/S  BYTES/S"[:width].rstrip()) or width == 200

    @pytest.mark.parametrize("height", [1, 2, 3])
    def test_views_on_low_terminals(self, height, monkeypatch, capsys):
        monkeypatch.setattr(posttroll, "_view_size", lambda: (80, height))
        posttroll._show(["one", "two", "three"])
        assert capsys.readouterr().out == "\033[H\033[Jone\n"

    def test_what_is_overdue_stays_in_sight(self):
        """Other rows are left out after a while."""
        numbers = {"messages": 1, "bytes": 50, "ago": 1000.0, "last_minute": [0] * 60}
        rows = [
            {
                "publisher": name,
                "address": "a",
                "subject": "/b",
                "type": "beat",
                "heartbeats_overdue": overdue,
                **numbers,
            }
            for name, overdue in (("late", 3), ("slow", 0), ("other", None))
        ]
        publishers = [{"publisher": "late", "address": "a", "ago": 1000.0, "kept": None}]
        view = {"seconds": 2000.0, "publishers": publishers, "caught_up": 0, "missed": 0, "traffic": rows}
        lines = posttroll._top_lines(view, {**view, "seconds": 0.0}, "", 0)
        assert [line.split() for line in lines[3:]] == [
            ["late", "a", "/b", "beat", "0.0", "0", "1000", "s", "ago", "3"]
        ]

    def test_what_came_in_each_second(self):
        traffic = posttroll._Traffic()
        for when in (100.0, 100.9, 101.0, 103.5):
            traffic.count(10, 0.5, when)
        assert traffic.minute(103.9) == [0] * 56 + [2, 1, 0, 1]
        assert traffic.minute(110.0) == [0] * 49 + [2, 1, 0, 1] + [0] * 7
        assert traffic.minute(160.0) == [1, 0, 1] + [0] * 57
        assert traffic.minute(162.0) == [1] + [0] * 59
        assert traffic.minute(1e6) == [0] * 60
        traffic.count(10, 0.5, 1e6)
        assert traffic.minute(1e6) == [0] * 59 + [1]
        assert (traffic.messages, traffic.size) == (5, 50)

    @pytest.mark.parametrize(("encoding", "highest"), [("utf-8", "█"), ("ascii", "@")])
    @pytest.mark.parametrize("columns", [70, 100, 200])
    def test_it_fits_the_terminal(self, columns, encoding, highest):
        with nameserver(), posttroll.Publish("feeder", nameservers=["localhost"]) as publisher:
            words = ("top", "--interval", "0.2")
            with on_terminal(*words, size=(columns, 12), PYTHONIOENCODING=encoding) as (running, read_to, terminal):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.heartbeat(60)
                publisher.send(posttroll.Message("/a/rather/long/subject/for/a/table", "info", "x"))
                seen = read_to(highest, 5)
                os.write(terminal, b"q")
                assert running.wait(DEADLINE) == 0
        view = next(view for view in seen.split("\033[H\033[J") if highest in view).replace("\r", "")
        lines = view.splitlines()
        assert max(map(len, lines)) <= columns
        assert max(map(len, lines[3:])) <= len(lines[2].partition("LAST MINUTE")[0]) + 60
        assert all(re.search(r"s ago +0? +\S$", line) for line in lines[3:])
        assert "LAST MINUTE" in lines[2]
        assert ("ADDRESS" in lines[2]) == (columns >= 110)
        assert columns < 100 or "0 caught up, 0 missed" in lines[0]

    def test_top_tells_how_much_history_there_is(self):
        """Of publishers of ours; others tell nothing."""
        with nameserver(), contextlib.ExitStack() as world:
            for name, number in (("a", 3), ("b", 5)):
                publisher = world.enter_context(posttroll.Publish(name, nameservers=["localhost"]))
                Numbers(publisher).send(number)
            other = posttroll.Message("/address/other", "info", {"URI": "tcp://127.0.0.1:1", "service": ["other"]})
            assert raw_request(config.get("broadcast_port"), other.encode().encode()) == [b"ok"]
            running = world.enter_context(command("top", "--json", "--interval", 0.3, "-n", 60))
            views = (json.loads(line)["publishers"] for line in running.stdout)
            kept = ({each["publisher"]: each["kept"] for each in publishers} for publishers in views)
            assert {"a": 3, "b": 5, "other": None} in kept
            running.terminate()
            assert finish(running)[0] == 0


class TestCheck:
    """``posttroll check``: the exit status and the line that monitors read."""

    @staticmethod
    def check(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, dict[str, str]]:
        """Run it; return its status, what it says, and the performance data by their labels."""
        status = posttroll.main(["check", *map(str, words)])
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        match = re.fullmatch(r"POSTTROLL (OK|WARNING|CRITICAL|UNKNOWN) - ([^|\n]+?)(?: \| ([^|\n]+))?\n", line)
        assert ("OK", "WARNING", "CRITICAL", "UNKNOWN").index(match[1]) == status
        data = re.findall(r"'([^'=|\s]+)'=(U|[\d.]+s?)((?:;[\d.:]*){2})(?: |$)", match[3] or "")
        assert " ".join(f"'{label}'={value}{bounds}" for label, value, bounds in data) == (match[3] or "")
        return status, match[2], {label: value + bounds for label, value, bounds in data}

    def test_all_is_well(self, capsys):
        """What was sent a while ago is seen at once, in the history."""
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            for name in ("a", "b", "other"):
                publisher = world.enter_context(
                    posttroll.Publish(name, aliases=[f"{name}2"], nameservers=["localhost"])
                )
                publisher.send(posttroll.Message(f"/sent/{name}", "info"))
                publisher.heartbeat(30)
                wait_for(lambda: posttroll.get_pub_address(name))  # noqa: B023
            status, text, data = self.check(capsys, "a", "b2", "--silent", 60, "--timeout", 20)
            assert (status, len(text.split("; "))) == (0, 5)
            assert re.fullmatch(r"0\.\d+s;;20", data.pop("nameserver"))
            assert re.fullmatch(r"\d\.\ds;;60", data.pop("a_silent"))
            assert re.fullmatch(r"\d\.\ds;;60", data.pop("b2_silent"))
            beats = {"a_heartbeats_overdue": "0;0;", "b2_heartbeats_overdue": "0;0;"}
            assert data == {"a": "1;1:;1:", "b2": "1;1:;1:", **beats}
            assert self.check(capsys)[0] == 0
            assert self.check(capsys, "--silent", 60)[0] == 0
            assert self.check(capsys, "a", "--silent", 60, "--topic", "/sent/a")[0] == 0
            status, text, data = self.check(capsys, "a", "b", "--silent", 60, "--topic", "/sent/a")
            assert (status, text.partition(";")[0]) == (2, "nothing from b in 60 s")
            assert data["b_silent"] == "U;;60"

    def test_what_is_wrong(self, capsys):
        with nameserver(), posttroll.Publish("alive", nameservers=["localhost"]) as alive:
            for name, address in (
                ("dead", f"tcp://127.0.0.1:{free_port()}"),
                ("half", f"tcp://127.0.0.1:{free_port()}"),
                ("half", f"tcp://localhost:{alive.port_number}"),
            ):
                announcement = posttroll.Message(f"/address/{name}", "info", {"URI": address, "service": [name]})
                assert raw_request(config.get("broadcast_port"), announcement.encode().encode()) == [b"ok"]
            wait_for(lambda: posttroll.get_pub_address("alive"))
            for words, expected, reasons in [
                (["alive"], 0, []),
                (["nonesuch"], 2, ["nonesuch is not registered"]),
                (["none", "alive", "nor that"], 2, ["none is not registered", "nor that is not registered"]),
                (["dead"], 2, ["dead does not answer at tcp://127.0.0.1:"]),
                (["half"], 1, ["half does not answer at tcp://127.0.0.1:"]),
                (["half", "dead"], 2, ["dead does not answer", "half does not answer"]),
                ([f"tcp://127.0.0.1:{alive.port_number}"], 0, []),
                ([f"tcp://127.0.0.1:{alive.port_number}", "--nameserver", "none.invalid"], 0, []),
                ([f"tcp://127.0.0.1:{free_port()}", "alive"], 2, ["tcp://127.0.0.1:"]),
                (["alive", "--set", "backend=nonesuch"], 3, ["backend is 'nonesuch'"]),
            ]:
                status, text, _ = self.check(capsys, *words)
                assert (status, text) == (expected, text)
                wrong = text.split("; ")[: len(reasons)]
                assert all(found.startswith(reason) or reason in found for found, reason in zip(wrong, reasons)), text
            down = ["--nameserver", f"127.0.0.1:{free_port()}", "--timeout", "1.5"]
            assert self.check(capsys, *down)[0] == 2
            assert self.check(capsys, "--local", *down, "alive")[0] == 0
        status, text, data = self.check(capsys, "alive", "--timeout", 0.5)
        assert (status, text, data) == (2, "no answer from the nameserver on localhost", {})

    def test_one_of_the_nameservers_is_down(self, capsys):
        """That takes no time from the rest."""
        hosts = ["--nameserver", "localhost", "--nameserver", f"127.0.0.1:{free_port()}"]
        with nameserver(), posttroll.Publish("alive", nameservers=["localhost"]) as alive:
            wait_for(lambda: posttroll.get_pub_address("alive"))
            alive.send(text_message("sent"))
            status, text, data = self.check(capsys, "alive", "--silent", 60, *hosts, "--timeout", 4)
            assert status == 1
            assert text.startswith("no answer from the nameserver on 127.0.0.1:")
            assert data["alive"] == "1;1:;1:"
            assert data["alive_silent"] != "U;;60"

    def test_localhost_beside_other_nameservers(self, capsys, monkeypatch):
        """Of several it is this host, not once more what is configured."""
        port = free_port()
        monkeypatch.setenv("POSTTROLL_NAMESERVER", f"localhost 127.0.0.1:{port}")
        with answering(answer_with([]), port):
            status, text, _ = self.check(capsys, "--timeout", 2)
            assert (status, text) == (1, "no answer from the nameserver on localhost")
            status, text, _ = self.check(capsys, "--nameserver", "localhost", "--timeout", 1)
            assert (status, text) == (2, "no answer from the nameserver on localhost")
            _, out, _ = run_here("top", "--json", "-n", 1, "--interval", 2)
        assert json.loads(out)["nameservers"] == {"localhost": False, f"127.0.0.1:{port}": True}

    def test_odd_names(self, capsys):
        """They break neither the line nor the performance data."""
        name = "it's=odd|\u4eac\x07"
        with nameserver(), posttroll.Publish(name, nameservers=["localhost"]) as publisher:
            wait_for(lambda: posttroll.get_pub_address(name))
            publisher.send(posttroll.Message("/a", "info"))
            status, text, data = self.check(capsys, name, "--silent", 60)
            assert (status, text.split("; ")[1]) == (0, "it's=odd/\u4eac\\u0007 answers")
            assert set(data) == {"nameserver", "it_s_odd_\u4eac\\u0007", "it_s_odd_\u4eac\\u0007_silent"}

    def test_what_can_only_be_known_by_waiting(self, capsys):
        """Other implementations keep no history: something has to come while the check listens."""
        with zmq.Context() as context, context.socket(zmq.XPUB) as sock:
            sock.linger = 0
            address = f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}"
            status, text, _ = self.check(capsys, address, "--silent", 60, "--timeout", 0.5)
            assert status == 3
            assert text.startswith(f"nothing from {address} in 0 s (it may keep no history")
            status, text, _ = self.check(capsys, address, "--silent", 0.3)
            assert (status, text.partition(";")[0]) == (2, f"nothing from {address} in 0.3 s")
            results: list[tuple[int, str, dict[str, str]]] = []
            with in_thread(lambda: results.append(self.check(capsys, address, "--silent", 20))) as thread:
                while thread.is_alive():
                    sock.send(posttroll.Message("/a", "info").encode().encode())
                    time.sleep(0.01)
            assert results[0][0] == 0

    def test_what_is_not_in_the_history_any_more(self, capsys):
        """It has come all the same."""
        with config.set(history_messages=0), posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://127.0.0.1:{publisher.port_number}"
            assert self.check(capsys, address, "--silent", 60)[0] == 2
            publisher.send(posttroll.Message("/a", "info"))
            status, text, _ = self.check(capsys, address, "--silent", 60)
            assert (status, text) == (0, f"{address} answers; {address} sent something in the last 60 s")

    def test_what_is_not_in_the_history_any_more_may_have_been_of_another_topic(self, capsys):
        """That is known once one has listened oneself for so long, or something comes."""
        with config.set(history_messages=1), posttroll.Publisher("tcp://*:0") as publisher:
            address = f"tcp://127.0.0.1:{publisher.port_number}"
            for _ in range(3):
                publisher.send(posttroll.Message("/other", "info"))
            words = (address, "--topic", "/segment", "--silent")
            status, text, _ = self.check(capsys, *words, 60, "--timeout", 0.8)
            assert (status, "what it keeps does not reach back 60 s: raise its history_seconds" in text) == (3, True)
            publisher.send(posttroll.Message("/other", "info"))
            status, text, _ = self.check(capsys, *words, 0.3)
            assert (status, text.partition(";")[0]) == (2, f"nothing from {address} in 0.3 s")
            results: list[tuple[int, str, dict[str, str]]] = []
            with in_thread(lambda: results.append(self.check(capsys, *words, 60, "--timeout", 20))) as thread:
                while thread.is_alive():
                    publisher.send(posttroll.Message("/segment", "info"))
                    publisher.send(posttroll.Message("/other", "info"))
                    time.sleep(0.01)
            assert results[0][0] == 0

    def test_overdue_heartbeats(self, capsys):
        """One that promised to beat has stopped to do so, while it says other things."""
        with posttroll.Publisher("tcp://*:0", "late") as publisher:
            address = f"tcp://127.0.0.1:{publisher.port_number}"
            publisher.heartbeat(1)
            publisher.send(posttroll.Message("/a", "info"))
            assert self.check(capsys, address, "--silent", 60)[0] == 0
            status, text, data = wait_for(
                lambda: next((found for found in [self.check(capsys, address, "--silent", 60)] if found[0]), None)
            )
            assert (status, text.partition(";")[0]) == (1, f"{address}: 1 heartbeats are overdue")
            assert data[f"{address}_heartbeats_overdue"] == "1;0;"

    def test_a_heartbeat_that_falls_due_meanwhile(self, capsys, monkeypatch):
        """What it measures and what it finds are of the same moment."""
        overdue = itertools.count()
        monkeypatch.setattr(posttroll._Heartbeats, "overdue", lambda *args: next(overdue))
        with posttroll.Publisher("tcp://*:0", "late") as publisher:
            publisher.heartbeat(1)
            publisher.send(posttroll.Message("/a", "info"))
            address = f"tcp://127.0.0.1:{publisher.port_number}"
            status, text, data = self.check(capsys, address, "--silent", 60)
        measured = data[f"{address}_heartbeats_overdue"].partition(";")[0]
        assert status == int(measured != "0")
        assert text.startswith(f"{address}: {measured} heartbeats are overdue") == (measured != "0")

    @pytest.mark.parametrize(
        "words",
        [["--frob"], ["a", "--timeout", "soon"], ["--silent", "-1"], ["--set", "nonesuch=1"], ["a", "--topic"], ["-n"]],
    )
    def test_a_wrong_command_line_is_unknown(self, words, capsys):
        assert posttroll.main(["check", *words]) == 3
        assert "usage: posttroll check" in capsys.readouterr().err
        assert posttroll.main(["services", *words]) == 2

    @pytest.mark.parametrize("name", ["a", "tcp://slow.invalid:9000", "stuck"])
    def test_never_longer_than_the_timeout(self, name, capsys, monkeypatch):
        """Even if names do not resolve for minutes."""
        over = threading.Event()

        def resolve(*args: Any, **kwargs: Any) -> Any:
            over.wait(DEADLINE)
            raise OSError("no answer from the name server")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "create_connection", resolve)
        if name == "stuck":  # in whatever it is
            monkeypatch.setattr(posttroll, "get_pub_address", resolve)
        try:
            start = time.monotonic()
            status, text, _ = self.check(capsys, name, "--nameserver", "slow.invalid", "--timeout", 0.5, "--silent", 60)
            assert time.monotonic() - start < DEADLINE / 2
            assert status == 2
            assert (text == "no result after 0.5 s") == (name == "stuck")
        finally:
            over.set()

    def test_an_error_that_nobody_expects(self, capsys, monkeypatch):
        monkeypatch.setattr(posttroll, "get_pub_address", mock.Mock(side_effect=RuntimeError("a | b\nc")))
        assert self.check(capsys)[:2] == (3, "a / b\\nc")
        monkeypatch.setattr(posttroll, "get_pub_address", mock.Mock(side_effect=KeyError()))
        assert self.check(capsys)[:2] == (3, "KeyError()")

    def test_as_a_process(self):
        """Never a traceback, whatever is configured, and not a word too much."""
        with nameserver(), posttroll.Publish("alive", nameservers=["localhost"]):
            wait_for(lambda: posttroll.get_pub_address("alive"))
            status, out, err = run_command("check", "alive", "--silent", 1, "--timeout", 20)
            assert (status, err) == (2, "")
            assert out.startswith("POSTTROLL CRITICAL - nothing from alive in 1 s; the nameserver answers in ")
        Path(os.environ["POSTTROLL_CONFIG"], "broken.json").write_text("{")
        status, out, err = run_command("check", "alive")
        assert (status, err) == (3, "")
        assert "broken.json" in out
        status, out, err = run_command("check", stdout=None, preexec_fn=lambda: os.close(1))
        assert (status, "Traceback" in err) == (3, False)

    def test_secure(self, keys, capsys):
        with nameserver(), posttroll.Publish("alive", nameservers=["localhost"]) as publisher:
            wait_for(lambda: posttroll.get_pub_address("alive"))
            publisher.send(posttroll.Message("/a", "info"))
            assert self.check(capsys, "alive", "--silent", 60)[0] == 0
            assert self.check(capsys, "alive", "--set", "backend=unsecure_zmq", "--timeout", "0.5")[0] == 2


class TestExporter:
    """``posttroll exporter``, read by Prometheus' own parser."""

    @staticmethod
    @contextlib.contextmanager
    def exporter(*words: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
        """Run it on a free port; gives the process and the port."""
        with command("exporter", "--port", 0, *words) as running:
            yield running, int(running.stderr.readline().rpartition(":")[2].partition("/")[0])
            running.terminate()
            assert finish(running)[:2] == (0, "")

    @staticmethod
    def get(port: int, path: str = "/metrics", host: str = "127.0.0.1") -> tuple[str, str]:
        """Return the head and the body of an answer."""
        with socket.create_connection((host, port), DEADLINE) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            with connection.makefile("rb") as stream:
                head, _, body = stream.read().decode().partition("\r\n\r\n")
        return head, body

    @classmethod
    def metrics(cls, port: int) -> dict[tuple[str, ...], float]:
        """Return the samples, by their name and the values of their labels but for the address."""
        return cls.samples(cls.get(port)[1])

    @staticmethod
    def samples(text: str) -> dict[tuple[str, ...], float]:
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        by_labels = {
            (sample.name, *(value for label, value in sample.labels.items() if label != "address")): sample.value
            for sample in found
        }
        assert len(by_labels) == len(found)
        return by_labels

    def test_what_it_tells(self):
        """Of several publishers, subjects and types, whatever characters they have; ``top --json`` tells the same."""
        odd = '/odd/"quoted"\\n\\\\{a="b"}/\u4eac'
        sent = {("a", "/x", "file"): 3, ("a", "/x", "info"): 2, ("b", odd, "file"): 4, ("b", "/x", "file"): 1}
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            publishers = {
                name: world.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in "abc"
            }
            wait_for(lambda: len(posttroll.get_pub_address("")) == 3)
            _, port = world.enter_context(self.exporter())
            top = world.enter_context(command("top", "--json", "--interval", 0.5, "-n", 99))
            sizes: dict[tuple[str, str, str], int] = collections.Counter()
            for publisher in publishers.values():
                assert publisher.wait_for_subscribers(2, DEADLINE)
            for (name, subject, kind), count in sent.items():
                for number in range(count):
                    message = posttroll.Message(subject, kind, {"number": number, "text": "\u4eac" * number})
                    publishers[name].send(message)
                    sizes[name, subject, kind] += len(message.encode().encode())
            late = posttroll.Message("/late", "file")
            late.time -= timedelta(seconds=100)
            publishers["b"].send(late)
            publishers["c"].heartbeat(1)
            missed, beats = (
                ("posttroll_heartbeats_missed_total", "c", "/heartbeat/c", "beat"),
                ("posttroll_messages_total", "c", "/heartbeat/c", "beat"),
            )
            wait_for(lambda: self.metrics(port).get(missed) == 1)
            publishers["c"].send(posttroll.Message("/heartbeat/c", "beat", {"min_interval": 5}))
            found = wait_for(lambda: next((now for now in [self.metrics(port)] if now[beats] == 2), None))
            view = json.loads(await_line(top, '"heartbeat_interval": 5.0'))
            head, text = self.get(port)
            top.terminate()
            assert finish(top)[0] == 0
        assert "Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
        counts = {key[1:]: value for key, value in found.items() if key[0] == "posttroll_messages_total"}
        assert counts == {**sent, ("b", "/late", "file"): 1, ("c", "/heartbeat/c", "beat"): 2}
        for labels, size in sizes.items():
            assert found[("posttroll_message_bytes_total", *labels)] == size
            assert abs(found[("posttroll_last_message_timestamp_seconds", *labels)] - time.time()) < 3600
        ages = [
            found["posttroll_message_age_seconds_bucket", "b", "/late", "file", le] for le in ("60.0", "600.0", "+Inf")
        ]
        assert ages == [0, 1, 1]
        assert 100 <= found["posttroll_message_age_seconds_sum", "b", "/late", "file"] < 200
        assert found["posttroll_message_age_seconds_bucket", "a", "/x", "file", "60.0"] == 3
        assert found["posttroll_message_age_seconds_count", "a", "/x", "file"] == 3
        assert (found["posttroll_heartbeats_overdue", "c", "/heartbeat/c", "beat"], found[missed]) == (0, 1)
        assert found["posttroll_heartbeat_interval_seconds", "c", "/heartbeat/c", "beat"] == 5
        assert ("posttroll_heartbeats_overdue", "a", "/x", "file") not in found
        assert (found["posttroll_known_services",], found["posttroll_nameserver_up", "localhost"]) == (3, 1)
        assert found["posttroll_build_info", posttroll.__version__] == 1
        self.check_conventions(text)
        same = self.samples(posttroll._exposition(view))
        assert set(same) == set(found)
        numbers = [key for key in found if key[0].endswith(("messages_total", "bytes_total", "_count"))]
        assert {key: same[key] for key in numbers} == {key: found[key] for key in numbers}
        assert same["posttroll_message_age_seconds_bucket", "b", "/late", "file", "600.0"] == 1

    @staticmethod
    def check_conventions(text: str) -> None:
        """Prefix, base units, ``_total`` for counters alone, ``_info`` for what is always 1, a help text."""
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert len(families) >= 13
        for name, family in families.items():
            assert re.fullmatch(r"posttroll(_[a-z]+)+", name)
            assert family.type in ("counter", "gauge", "histogram")
            assert family.documentation.endswith(".")
            assert all((sample.name == f"{name}_total") == (family.type == "counter") for sample in family.samples)
            assert not re.search(r"milli|minute|hour|kilo|_ms$", name)
            assert all(sample.value == 1 for sample in family.samples) or not name.endswith("_info")
        assert re.findall(r"^# TYPE (\S+_total) (?!counter)", text, re.MULTILINE) == []

    def test_there_are_not_too_many_series(self, monkeypatch):
        """What exceeds is counted all the same, as something else; what has been silent for long makes room."""
        monkeypatch.setattr(posttroll._Meter, "KINDS", 5)
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            publishers = [world.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in "ab"]
            loop = world.enter_context(contextlib.closing(posttroll.Loop()))
            network = world.enter_context(contextlib.closing(posttroll._Network([], ["localhost"], loop)))
            network.LOOKUP = 0.05
            wait_for(lambda: network.run(time.monotonic() + 0.05) and all(each.subscriber_count for each in publishers))

            def counts() -> dict[tuple[str, str, str], int]:
                assert network.run(time.monotonic() + 0.05)
                rows = network.view()["traffic"]
                return {(row["publisher"], row["subject"], row["type"]): row["messages"] for row in rows}

            publishers[1].send(posttroll.Message("/first", "info"))
            wait_for(lambda: counts() == {("b", "/first", "info"): 1})
            for number in range(10):
                for publisher in publishers:
                    publisher.send(posttroll.Message(f"/{number}" + "x" * 100000, "info" * 1000))
            wait_for(lambda: sum(counts().values()) == 21)
            assert all(len("".join(kind)) < 300 for kind in counts())
            assert len(counts()) == 7
            assert counts()["a", "other", "other"] + counts()["b", "other", "other"] == 21 - 5
            network.KEEP = 0.1
            wait_for(lambda: counts() == {})
            network.KEEP = 300
            publishers[0].send(posttroll.Message("/again", "info"))
            wait_for(lambda: counts() == {("a", "/again", "info"): 1})

    def test_requests_hold_up_nothing(self):
        """Slow ones, broken ones, very many: all that is sent meanwhile is counted, and a good one has its answer."""
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver())
            publisher = world.enter_context(posttroll.Publish("busy", nameservers=["localhost"]))
            wait_for(lambda: posttroll.get_pub_address("busy"))
            running, port = world.enter_context(self.exporter())
            assert publisher.wait_for_subscribers(1, DEADLINE)
            slow = [world.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE)) for _ in range(80)]
            for connection in slow:
                connection.sendall(b"GET /metr")
            broken = (b"\0" * 5000 + b"\r\n\r\n", b"GET\r\n\r\n", b"POST /metrics HTTP/1.0\r\n\r\n", b"G" * 100000, b"")
            over = threading.Event()

            def hammer() -> None:
                for content in itertools.cycle((*broken, b"GET /metrics HTTP/1.0\r\n\r\n")):
                    if over.is_set():
                        return
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
                        connection.sendall(content)

            threads = [threading.Thread(target=hammer) for _ in range(4)]
            for thread in threads:
                thread.start()
            try:
                for number in range(2000):
                    publisher.send(posttroll.Message("/busy", "info", number))
                key = ("posttroll_messages_total", "busy", "/busy", "info")
                wait_for(lambda: self.metrics(port).get(key) == 2000)
            finally:
                over.set()
                for thread in threads:
                    thread.join(DEADLINE)
            assert int(Path(f"/proc/{running.pid}/status").read_text().partition("Threads:")[2].split()[0]) < 60
            assert self.get(port, "/nonesuch")[0].startswith("HTTP/1.0 404 ")
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
                connection.sendall(b"HEAD /metrics HTTP/1.0\r\n\r\n")
                with connection.makefile("rb") as stream:
                    answer = stream.read()
            assert answer.startswith(b"HTTP/1.0 200 ")
            assert answer.endswith(b"\r\n\r\n")

    def test_after_an_outage(self, short_heartbeats):
        """What was caught up and what was missed; that the nameserver is away, and back."""
        with contextlib.ExitStack() as world:
            first = world.enter_context(contextlib.ExitStack())
            first.enter_context(nameserver())
            with config.set(history_messages=16):
                publisher = world.enter_context(posttroll.Publisher("tcp://*:0"))
            relay = world.enter_context(Relay(publisher.port_number))
            data = {"URI": f"tcp://127.0.0.1:{relay.port}", "service": ["relayed"]}
            announcement = posttroll.Message("/address/relayed", "info", data).encode().encode()
            assert raw_request(config.get("broadcast_port"), announcement) == [b"ok"]
            _, port = world.enter_context(self.exporter())
            assert publisher.wait_for_subscribers(1, DEADLINE)
            publisher.send(posttroll.Message("/a", "info", "before"))
            key = ("posttroll_messages_total", "relayed", "/a", "info")
            wait_for(lambda: self.metrics(port).get(key) == 1)
            relay.cut()
            wait_for(lambda: publisher.subscriber_count == 0)
            for number in range(100):
                publisher.send(posttroll.Message("/a", "info", number))
            first.close()
            relay.mend()
            wait_for(lambda: self.metrics(port)["posttroll_missed_messages_total",] > 0)
            found = self.metrics(port)
            caught_up, missed = (found[f"posttroll_{what}_messages_total",] for what in ("caught_up", "missed"))
            assert caught_up + missed in (100, 101)  # it may not have been confirmed yet that the first had come
            assert caught_up >= 16
            assert found[key] == 1 + caught_up
            wait_for(lambda: self.metrics(port)["posttroll_nameserver_up", "localhost"] == 0)
            assert self.metrics(port)["posttroll_known_services",] == 1
            world.enter_context(nameserver())
            wait_for(lambda: self.metrics(port)["posttroll_nameserver_up", "localhost"] == 1)

    def test_numbers_do_not_stand_still_in_silence(self, monkeypatch, recwarn):
        """What fails in the thread that counts ends the command."""
        monkeypatch.setattr(posttroll, "_age", mock.Mock(side_effect=RuntimeError("a fault")))
        with nameserver(), posttroll.Publish("a", nameservers=["localhost"]) as publisher:
            with contextlib.closing(posttroll.Loop()) as loop:
                with contextlib.closing(posttroll._Network([], ["localhost"], loop)) as network:
                    network.LOOKUP = 0.05
                    wait_for(lambda: network.run(time.monotonic() + 0.05) and publisher.subscriber_count)
                    publisher.send(posttroll.Message("/a", "info"))
                    with pytest.raises(posttroll._CommandError, match="the counting has failed"):
                        network.run(time.monotonic() + DEADLINE)
        monkeypatch.undo()

    @pytest.mark.parametrize(
        "moment",
        ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00", "9999-12-31T23:59:59"],
    )
    def test_how_old_a_message_is(self, moment):
        """Whatever its sender says."""
        age = posttroll._age(posttroll.Message.decode(f"pytroll://a info a@b {moment} v1.2 text/ascii x"))
        assert age > 6e10 if moment.startswith("0001") else age == 0

    def test_who_may_ask(self):
        """This host, unless another address is given."""
        with nameserver(), self.exporter() as (_, port):
            self.get(port)
            with pytest.raises(ConnectionRefusedError):
                self.get(port, host="127.0.0.2")
            status, out, err = run_command("exporter", "--port", port)
            assert (status, out) == (1, "")
            assert f"posttroll exporter: cannot be asked on 127.0.0.1, port {port}: " in err
            with self.exporter("--bind", "0.0.0.0") as (_, other):
                assert "posttroll_build_info" in self.get(other, host="127.0.0.2")[1]

    def test_secure(self, keys):
        with nameserver(), posttroll.Publish("secret", nameservers=["localhost"]) as publisher:
            with self.exporter() as (_, port):
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info"))
                wait_for(lambda: self.metrics(port).get(("posttroll_messages_total", "secret", "/a", "info")) == 1)


class TestMap:
    @pytest.fixture
    def world(self):
        """Two publishers of ours, one that is not, and who listens to them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(nameserver())
            names = ['a"b', "b`&lt;c"]
            pubs = [stack.enter_context(posttroll.Publish(name, nameservers=["localhost"])) for name in names]
            other, address = stack.enter_context(raw_publisher())
            register(registration_of(URI=address, service=["other"]))
            ours = [local_address(pub.port_number) for pub in pubs]
            subs = [
                stack.enter_context(posttroll.Subscriber(ours[:1], ["/a", "/b"])),
                stack.enter_context(posttroll.Subscriber(ours)),
                stack.enter_context(posttroll.Subscriber(ours)),
            ]
            stranger = stack.enter_context(raw_socket(zmq.SUB, pubs[0].port_number))
            stranger.subscribe(b"pytroll://a/x")
            for sub in subs:
                stack.enter_context(serving(sub))
            ended = threading.Event()

            def send() -> None:
                while not ended.wait(0.02):
                    for subject in ("/a/x", "/z"):
                        pubs[0].send(text_message("x", subject))
                    other.send_string(text_message("x", "/of_other"))

            wait_for(lambda: [pub.subscriber_count for pub in pubs] == [4, 2])
            with in_thread(send):
                try:
                    yield [posttroll.get_pub_address(name)[0]["URI"] for name in [*names, "other"]]
                finally:
                    ended.set()

    def test_all_forms(self, world):
        """One after the other, as the network takes its time."""
        first, second, other = world
        status, out, err = run_command("map", "--seconds", 0.5)
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            f'a"b  {first}',
            "  sends  /a/x",
            "  sends  /z",
            "  to     somebody  /a/x",
            "  to     127.0.0.1  everything (2 times)",
            "  to     127.0.0.1  /a, /b",
            f"b`&lt;c  {second}",
            "  sends  nothing while we listened",
            "  to     127.0.0.1  everything (2 times)",
            f"pub  {other}",
            "  sends  /of_other",
            "  to     (it does not tell)",
        ]
        status, out, err = run_command("map", "/z", "--seconds", 0.5, "--dot")
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            "digraph posttroll {",
            "  rankdir=LR;",
            f'  publisher0 [shape=box, label="a\\"b\\n{first}\\n/z"];',
            f'  publisher1 [shape=box, label="b`&amp;lt;c\\n{second}"];',
            f'  publisher2 [shape=box, label="pub\\n{other}"];',
            '  listener0 [label="somebody"];',
            '  listener1 [label="127.0.0.1"];',
            '  publisher0 -> listener0 [label="/a/x"];',
            '  publisher0 -> listener1 [label="everything (2 times)"];',
            '  publisher0 -> listener1 [label="/a, /b"];',
            '  publisher1 -> listener1 [label="everything (2 times)"];',
            "}",
        ]
        status, out, err = run_command("map", "/z", "--seconds", 0.5, "--mermaid")
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            "graph LR",
            f'  publisher0["a#34;b<br/>{first}<br/>/z"]',
            f'  publisher1["b#96;#38;lt;c<br/>{second}"]',
            f'  publisher2["pub<br/>{other}"]',
            '  listener0(["somebody"])',
            '  listener1(["127.0.0.1"])',
            '  publisher0 -->|"/a/x"| listener0',
            '  publisher0 -->|"everything (2 times)"| listener1',
            '  publisher0 -->|"/a, /b"| listener1',
            '  publisher1 -->|"everything (2 times)"| listener1',
        ]
        status, out, err = run_command("map", "--seconds", 0.1, "--json")
        assert (status, err) == (0, "")
        rows = json.loads(out)
        assert [row["name"] for row in rows] == ['a"b', "b`&lt;c", "pub"]
        assert rows[2]["listeners"] is None
        assert {"host": "", "topics": ["/a/x"], "count": 1} in rows[0]["listeners"]

    def test_nobody_listens_and_nobody_is_there(self):
        with nameserver():
            assert run_command("map", "--seconds", 0) == (0, "\n", "")
            with posttroll.Publish("a_name", nameservers=["localhost"]):
                wait_for(lambda: posttroll.get_pub_address("a_name"))
                out = run_command("map", "--seconds", 0)[1]
        assert out.splitlines()[1:] == ["  sends  nothing while we listened", "  to     nobody"]


class TestHelpAndCompletion:
    def test_without_a_command_it_shows_all(self):
        status, out, _ = run_here("help")
        assert status == 0
        assert all(f"\n    {name}" in out for name in [*posttroll._commands, "nameserver"])

    @pytest.mark.parametrize("name", [*posttroll._commands, "nameserver"])
    def test_of_each_command(self, name):
        status, out, _ = run_here("help", name)
        _, usage, _ = run_here(name, "--help")
        assert status == 0
        assert re.search(rf"^NAME\n    posttroll {name} - [a-z]", out)
        headings = ["SYNOPSIS", "OPTIONS", "EXAMPLES", "CONFIGURATION"]
        for heading in headings + ["EXIT STATUS"] * (name != "check"):  # which has statuses of its own
            assert f"\n{heading}\n    " in out
        options = [set(re.findall(r"^  (?:  )?(-[-\w]+)", text, re.MULTILINE)) for text in (usage, out)]
        assert options[0] == options[1] != set()
        examples = usage.partition("examples:\n")[2].split("\n")
        assert all(example.strip() in out for example in examples)

    def test_what_it_says_of_arguments(self):
        _, out, _ = run_here("help", "completion")
        assert "\nARGUMENTS\n    shell\n        whose script to print\n" in out
        _, out, _ = run_here("help", "subscribe")
        assert "\n    -n COUNT, --count COUNT\n        end after so many messages\n" in out
        _, out, _ = run_here("help", "relay")
        assert "\nDESCRIPTION\n    Each end is a process, with a configuration of its own." in out

    def test_unknown_ones(self):
        for words in (("help", "nothing"), ("completion", "fish")):
            status, _, err = run_here(*words)
            assert status == 2
            assert "invalid choice" in err

    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("s", {"subscribe", "services"}),
            ("--v", {"--version"}),
            ("subscribe --si", {"--since"}),
            ("subscribe --where ", set()),
            ("subscribe --set back", {"backend="}),
            ("config mc_", {"mc_group", "mc_ttl"}),
            ("relay --out-set mc_t", {"mc_ttl="}),
            ("completion z", {"zsh"}),
            ("help gen", {"generate-keys"}),
            ("nameserver -d st", {"start", "stop", "status"}),
            ("demo --ro", set()),
        ],
    )
    def test_bash(self, line, words):
        """With its names, and nothing hidden."""
        _, script, _ = run_here("completion", "bash")
        code = f"""{script}
            compopt() {{ :; }}
            IFS=' '; COMP_WORDS=(posttroll {line}"$1"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _posttroll; echo "${{COMPREPLY[@]}}"
        """
        arguments = [code, "bash"] if not line.endswith(" ") else [code.replace('"$1"', " ''"), "bash"]
        done = subprocess.run(["bash", "-c", *arguments], capture_output=True, text=True, check=True)
        assert (set(done.stdout.split()), done.stderr) == (words, "")

    def test_zsh(self):
        _, script, _ = run_here("completion", "zsh")
        assert script.startswith("#compdef posttroll\n")
        for name in [*posttroll._commands, "nameserver"]:
            assert f"'{name}:" in script
            assert f"\n    {name}) _arguments " in script
        assert "'*--sample[only one of N messages]:N:_files'" in script
        assert "--role" not in script
        if shutil.which("zsh"):
            subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


class TestConfigCommand:
    """``posttroll config``."""

    def test_every_key_with_its_source(self, tmp_path, monkeypatch):
        (tmp_path / "config" / "a.json").write_text('{"mc_ttl": 7}')
        status, out, err = run_here("config", "--json")
        assert (status, err) == (0, "")
        rows = {row["key"]: row for row in json.loads(out)}
        assert set(posttroll.OPTIONS) <= set(rows)
        assert rows["mc_ttl"]["source"] == str(tmp_path / "config" / "a.json")
        assert rows["nameserver_port"]["source"] == "$POSTTROLL_NAMESERVER_PORT"
        assert rows["backend"]["source"] == "default"
        assert all(rows[key]["meaning"] for key in posttroll.OPTIONS)

    def test_the_readme_shows_the_same_table(self):
        text = (HERE / "README.md").read_text()
        for key, option in posttroll.OPTIONS.items():
            default = "" if option.default is None else f"`{option.default}`"
            assert f"| `{key}` | {default} | {option.meaning} |" in text

    def test_an_unknown_key(self):
        status, out, err = run_here("config", "nonesuch")
        assert (status, out) == (1, "")
        assert "nonesuch" in err


class TestDoctor:
    """It names the cause."""

    def test_all_is_well(self):
        with nameserver_process("--no-multicast"):
            status, out, err = run_command("doctor", "--no-multicast")
        assert (status, err) == (0, "")
        assert "FAIL" not in out
        assert "publisher, nameserver and subscriber hear each other" in out

    def test_all_is_well_with_multicast(self):
        with nameserver_process():
            status, out, _ = run_command("doctor")
        assert (status, "FAIL" in out) == (0, False), out
        assert "a datagram came back" in out

    @pytest.mark.parametrize(
        ("settings", "cause"),
        [
            ({"NAMESERVER_PORT": "abc"}, "nameserver_port is 'abc' (from $POSTTROLL_NAMESERVER_PORT)"),
            ({"BACKEND": "pigeon"}, "backend is 'pigeon'"),
            ({"MC_GROUP": "10.0.0.1"}, "Invalid multicast address '10.0.0.1'"),
            ({"MULTICAST_INTERFACE": "nonesuch0"}, "multicast_interface 'nonesuch0' has no address here"),
            ({}, "nobody answers at"),
        ],
    )
    def test_a_wrong_setting(self, settings, cause, monkeypatch):
        for name, value in settings.items():
            monkeypatch.setenv("POSTTROLL_" + name, value)
        status, out, _ = run_here("doctor")
        assert status == 1
        assert any(line.startswith("FAIL") and cause in line and "->" in line for line in out.splitlines()), out

    def test_a_file_that_cannot_be_used(self, tmp_path):
        path = tmp_path / "config" / "a.json"
        path.write_text("{")
        status, out, _ = run_command("doctor")
        assert status == 1
        assert re.search(rf"FAIL  configuration: .*{re.escape(str(path))} cannot be used: ", out)

    def test_a_misspelt_key(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_NAMESERVERPORT", "5557")
        assert "nameserverport = 5557" in run_command("doctor")[1]

    def test_another_program_on_the_port(self):
        with socket.socket() as other:
            other.bind(("", config.get("nameserver_port")))
            other.listen()
            stop = threading.Event()

            def serve() -> None:
                other.settimeout(0.1)
                while not stop.is_set():
                    with contextlib.suppress(OSError):
                        connection, _ = other.accept()
                        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                        connection.close()

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                status, out, _ = run_command("doctor", "--no-multicast")
            finally:
                stop.set()
                thread.join()
        assert status == 1
        assert re.search("FAIL  nameserver localhost: what answers .* is not ZeroMQ", out)
        assert re.search(rf"taken by process {os.getpid()} ", out)

    def test_an_answer_that_is_no_message(self):
        """It ends nothing: the others are asked."""
        port = free_port()
        with answering(b"\xffjunk", port), nameserver():
            hosts = ("--nameserver", f"localhost:{port}", "--nameserver", "localhost")
            status, out, _ = run_here("doctor", "--no-multicast", *hosts)
        assert status == 1
        (line,) = [line for line in out.splitlines() if line.startswith("FAIL")]
        assert line.startswith(f"FAIL  nameserver localhost:{port}: what answers at ")
        assert line.endswith("  -> another program has this port")
        assert "hear each other (by localhost)" in out

    def test_a_nameserver_that_listens_to_multicast_only(self):
        with nameserver_process():
            status, out, _ = run_command("doctor", "--no-multicast")
        assert status == 1
        assert re.search("FAIL  round trip: .*by registration", out)

    def test_a_nameserver_without_multicast(self):
        with nameserver_process("--no-multicast"):
            status, out, _ = run_command("doctor")
        assert status == 1
        assert re.search("FAIL  round trip: .*by multicast.*--no-multicast", out)

    def test_another_backend(self, monkeypatch, tmp_path):
        posttroll.write_key_pair("server", tmp_path)
        posttroll.write_key_pair("client", tmp_path)
        (tmp_path / "clients").mkdir()
        (tmp_path / "clients" / "client.key").write_bytes((tmp_path / "client.key").read_bytes())
        with nameserver_process("--no-multicast"):
            monkeypatch.setenv("POSTTROLL_BACKEND", "secure_zmq")
            monkeypatch.setenv("POSTTROLL_SERVER_SECRET_KEY_FILE", str(tmp_path / "server.key_secret"))
            monkeypatch.setenv("POSTTROLL_SERVER_PUBLIC_KEY_FILE", str(tmp_path / "server.key"))
            monkeypatch.setenv("POSTTROLL_CLIENT_SECRET_KEY_FILE", str(tmp_path / "client.key_secret"))
            monkeypatch.setenv("POSTTROLL_CLIENTS_PUBLIC_KEYS_DIRECTORY", str(tmp_path / "clients"))
            status, out, _ = run_command("doctor", "--no-multicast")
        assert status == 1
        assert "it speaks NULL, this program CURVE" in out

    def test_a_clock_that_is_wrong(self):
        with zmq.Context() as context, context.socket(zmq.REP) as late:
            late.bind(f"tcp://*:{config.get('nameserver_port')}")
            stop = threading.Event()

            def serve() -> None:
                while not stop.is_set():
                    if late.poll(50):
                        late.recv()
                        late.send(b"pytroll://oper/ns info me@here 2020-01-01T00:00:00 v1.01")

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                status, out, _ = run_command("doctor", "--no-multicast")
            finally:
                stop.set()
                thread.join()
        assert status == 1
        assert re.search(r"FAIL  clocks: that of nameserver localhost differs by -\d+.* -> synchronise them", out)

    def test_a_name_that_does_not_resolve(self):
        status, out, _ = run_command("doctor", "--no-multicast", "--nameserver", "nonesuch.invalid")
        assert status == 1
        assert re.search("FAIL  nameserver nonesuch.invalid: the name does not resolve", out)

    @pytest.mark.network
    def test_a_host_without_a_network(self, monkeypatch):
        monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
        namespace = f"posttroll-doctor-{os.getpid()}"
        if not may_make_namespaces():
            pytest.skip("this needs network namespaces")
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        try:
            subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
            with process("ip", "netns", "exec", namespace, sys.executable, LIBRARY, "doctor") as doctor:
                status, out, _ = finish(doctor)
            subprocess.run(["ip", "-n", namespace, "route", "add", "224.0.0.0/4", "dev", "lo"], check=True)
            inside = ("ip", "netns", "exec", namespace, sys.executable)
            with process(*inside, "-u", NAMESERVER), process(*inside, LIBRARY, "doctor") as doctor:
                looped = finish(doctor)
        finally:
            subprocess.run(["ip", "netns", "delete", namespace], check=True)
        assert status == 1
        assert "note  own address: 127.0.0.1: other hosts cannot reach publishers here" in out
        assert re.search("FAIL  multicast route: .*unreachable.*-> ip route add 224.0.0.0/4 dev INTERFACE", out)
        assert (looped[0], looped[1].count("FAIL")) == (0, 0), looped[1]
        assert re.search("ok    multicast route: to group .* from 127.0.0.1", looped[1])

    def test_keys(self, monkeypatch, tmp_path):
        _, secret = posttroll.write_key_pair("server", tmp_path)
        os.chmod(secret, 0o644)
        (tmp_path / "clients").mkdir()
        monkeypatch.setenv("POSTTROLL_SERVER_SECRET_KEY_FILE", secret)
        monkeypatch.setenv("POSTTROLL_SERVER_PUBLIC_KEY_FILE", str(tmp_path / "nonesuch.key"))
        monkeypatch.setenv("POSTTROLL_CLIENTS_PUBLIC_KEYS_DIRECTORY", str(tmp_path / "clients"))
        _, out, _ = run_command("doctor")
        assert f"FAIL  keys: {secret} can be read by others (mode 644)  -> chmod 600 {secret}" in out
        assert re.search(r"FAIL  keys: server_public_key_file: cannot read a key from .*nonesuch.key", out)
        assert re.search("FAIL  keys: 0 clients may connect", out)

    def test_the_secure_commands_of_the_readme(self, tmp_path, monkeypatch):
        """As printed; only the copy to another host is left out."""
        text = (HERE / "README.md").read_text().partition("## Secure set-up")[2].partition("\n## ")[0]
        first, second = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        assert "doctor" in second
        for name, file in (("posttroll", LIBRARY), ("nameserver", NAMESERVER)):
            (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{file}" "$@"\n')
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", os.environ["POSTTROLL_NAMESERVER_PORT"])
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        script = "".join(line for line in first.splitlines(True) if not line.startswith("scp"))
        nameserver_line, doctor_line = second.splitlines()[-2:]
        assert (nameserver_line, doctor_line) == ("nameserver --no-multicast &", "posttroll doctor --no-multicast")
        settings = "\n".join(second.splitlines()[:-2])
        ready = "while ! posttroll services >/dev/null 2>&1; do sleep 0.1; done"
        end = "status=$?; kill $!; wait $!; exit $status"
        script += f"{settings}\n{nameserver_line}\n{ready}\n{doctor_line}\n{end}\n"
        with process("bash", "-c", script, cwd=tmp_path) as running:
            status, out, err = finish(running, 60)
        assert (status, "FAIL" in out) == (0, False), out + err
        assert "publisher, nameserver and subscriber hear each other" in out

    @pytest.mark.parametrize("multicast", [False, True])
    def test_all_is_well_among_others(self, multicast):
        """Many publishers, and subscribers of everything that could be taken for its own."""
        words = [] if multicast else ["--no-multicast"]
        with contextlib.ExitStack() as world:
            world.enter_context(nameserver_process(*words))
            hosts = None if multicast else ["localhost"]
            for name in "abc":
                world.enter_context(posttroll.Publish(name, nameservers=hosts))
            for _ in range(4):
                listener = posttroll.ListenerContainer(topics=[""])
                world.callback(listener.stop)
            for _ in range(3):
                status, out, err = run_command("doctor", *words)
                assert (status, err, "FAIL" in out) == (0, "", False), out

    def test_several_nameservers(self):
        """Those that answer are tried, those that do not are named."""
        with nameserver_process("--no-multicast"):
            hosts = ("--nameserver", "127.0.0.9:1", "--nameserver", "localhost")
            status, out, _ = run_command("doctor", "--no-multicast", *hosts)
        assert status == 1
        assert [line for line in out.splitlines() if line.startswith("FAIL")] == [
            "FAIL  nameserver 127.0.0.9:1: nobody answers at tcp://127.0.0.9:1  -> start it (nameserver), or open the "
            "port in the firewall"
        ]
        assert "hear each other (by localhost)" in out

    def test_localhost_is_this_host_whatever_is_configured(self, monkeypatch):
        with nameserver_process("--no-multicast"):
            monkeypatch.setenv("POSTTROLL_NAMESERVER", "127.0.0.9:1")
            status, out, err = run_command("doctor", "--no-multicast", "--nameserver", "localhost")
        assert (status, err, "FAIL" in out) == (0, "", False), out
        assert "hear each other (by localhost)" in out

    def test_a_plain_program_that_looks_at_a_secure_nameserver(self, keys, monkeypatch):
        with nameserver_process("--no-multicast"):
            status, out, _ = run_command("doctor", "--no-multicast")
            assert (status, "FAIL" in out) == (0, False), out
            monkeypatch.setenv("POSTTROLL_BACKEND", "unsecure_zmq")
            status, out, _ = run_command("doctor", "--no-multicast")
        assert status == 1
        assert "it speaks CURVE, this program NULL" in out

    @pytest.mark.parametrize("missing", ["SERVER_SECRET_KEY_FILE", "CLIENTS_PUBLIC_KEYS_DIRECTORY"])
    def test_a_host_that_only_subscribes(self, keys, monkeypatch, missing):
        """It has no keys of a publisher, and shall have none."""
        with nameserver_process("--no-multicast"):
            monkeypatch.delenv("POSTTROLL_" + missing)
            status, out, _ = run_command("doctor", "--no-multicast")
        assert (status, "FAIL" in out) == (0, False), out
        assert re.search("note  round trip: not tried, .*keys", out)

    def test_a_publisher_that_cannot_be_reached(self):
        """The nameserver takes its registration, but tells of an address where nothing comes from."""
        with contextlib.ExitStack() as world:
            context = world.enter_context(zmq.Context())
            kinds = (zmq.REP, zmq.REP, zmq.PUB)
            lookups, registrations, silent = (world.enter_context(context.socket(kind)) for kind in kinds)
            lookups.bind(f"tcp://*:{config.get('nameserver_port')}")
            registrations.bind(f"tcp://*:{config.get('broadcast_port')}")
            address = f"tcp://127.0.0.1:{silent.bind_to_random_port('tcp://127.0.0.1')}"
            stop = threading.Event()

            def serve() -> None:
                poller = zmq.Poller()
                for sock in (lookups, registrations):
                    sock.linger = 0
                    poller.register(sock, zmq.POLLIN)
                while not stop.is_set():
                    for sock, _ in poller.poll(50):
                        request = posttroll.Message.decode(sock.recv())
                        entries = [{"URI": address, "service": [request.data["service"]]}] if sock is lookups else []
                        answer = posttroll.Message("/oper/ns", "info", entries).encode().encode()
                        sock.send(answer if sock is lookups else b"ok")

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                status, out, err = run_command("doctor", "--no-multicast")
            finally:
                stop.set()
                thread.join()
        assert (status, err) == (1, "posttroll doctor: 1 check failed.\n")
        assert re.search(rf"FAIL  round trip: nothing comes from {address}.*-> open the publishers' ports", out)

    def test_findings_cannot_give_orders_to_the_terminal(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_MC_GROUP", "\033[2J")
        _, out, _ = run_command("doctor")
        assert "\033" not in out
        assert "u001b[2J" in out or "x1b[2J" in out


class TestDemo:
    """``posttroll demo``."""

    def test_it_succeeds(self):
        status, out, err = run_command("demo")
        assert (status, err) == (0, "")
        assert out.count("received pytroll://demo/") == 3
        assert out.splitlines()[-1] == "All 3 messages arrived: posttroll works on this machine."

    def test_it_fails_if_a_message_does_not_arrive(self, tmp_path):
        library = tmp_path / "posttroll.py"
        text = LIBRARY.read_text().replace("for message in _demo_messages():", "for message in _demo_messages()[1:]:")
        library.write_text(text.replace("_DEMO_SECONDS = 20", "_DEMO_SECONDS = 2"))
        (tmp_path / "posttroll_ns.py").write_text(NAMESERVER.read_text())
        with process(sys.executable, library, "demo") as demo:
            status, out, err = finish(demo)
        assert status == 1
        assert "2 of 3 messages arrived" in err
        assert "The demo failed" in err
        assert "All 3 messages" not in out

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_ends_all_of_it(self, number):
        with command("demo", start_new_session=True) as demo:
            children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")
            started = wait_for(lambda: len(children.read_text().split()) == 2 and children.read_text().split())
            demo.send_signal(number)
            assert finish(demo)[0] == 130
            wait_for(lambda: not any(os.path.exists(f"/proc/{child}") for child in started))

    def test_with_a_nameserver_that_runs_already(self):
        """It is asked, and told, in place of one of the demo's own."""
        with nameserver(), posttroll.Subscribe("demo", "/demo", addr_listener=True, timeout=0) as subscriber:
            with command("demo", "--nameserver", "127.0.0.9", "--nameserver", "localhost") as demo:
                received = receive(subscriber, 3)
                status, out, err = finish(demo, 60)
        assert (status, err) == (0, "")
        assert "Nameserver on 127.0.0.9, localhost" in out
        assert out.count("received pytroll://demo/") == 3
        assert len(received) == 3


# ======================================================================================================================
# 16. Documented import paths
# ======================================================================================================================

PATHS = [
    "message",
    "publisher",
    "subscriber",
    "listener",
    "ns",
    "address_receiver",
    "message_broadcaster",
    "bbmcast",
    "logger",
    "testing",
    "backends",
    "backends.zmq",
    "backends.zmq.socket",
    "backends.zmq.publisher",
    "backends.zmq.subscriber",
    "backends.zmq.ns",
    "backends.zmq.address_receiver",
    "backends.zmq.message_broadcaster",
]

DOCUMENTED_SIGNATURES = (
    """
posttroll.publisher.NoisyPublisher(name, port=0, aliases=None, broadcast_interval=2, nameservers=None, min_port=None, \
max_port=None)
posttroll.publisher.NoisyPublisher.close(self)
posttroll.publisher.NoisyPublisher.heartbeat(self, min_interval=0)
posttroll.publisher.NoisyPublisher.send(self, msg)
posttroll.publisher.NoisyPublisher.start(self)
posttroll.publisher.NoisyPublisher.stop(self)
posttroll.publisher.Publish(name, port=0, aliases=None, broadcast_interval=2, nameservers=None, min_port=None, \
max_port=None)
posttroll.publisher.Publisher(address, name='', min_port=None, max_port=None)
posttroll.publisher.Publisher.close(self)
posttroll.publisher.Publisher.heartbeat(self, min_interval=0)
posttroll.publisher.Publisher.send(self, msg)
posttroll.publisher.Publisher.send_string(self, msg)
posttroll.publisher.Publisher.start(self)
posttroll.publisher.Publisher.stop(self)
posttroll.publisher.create_publisher_from_dict_config(settings)
posttroll.publisher.get_own_ip()
posttroll.subscriber.NSSubscriber(services='', topics='pytroll:/', addr_listener=False, addresses=None, timeout=10, \
translate=False, nameserver='localhost')
posttroll.subscriber.NSSubscriber.close(self)
posttroll.subscriber.NSSubscriber.start(self)
posttroll.subscriber.NSSubscriber.stop(self)
posttroll.subscriber.Subscribe(services='', topics='pytroll:/', addr_listener=False, addresses=None, timeout=10, \
translate=False, nameserver='localhost', message_filter=None)
posttroll.subscriber.Subscriber(addresses, topics='', message_filter=None, translate=False)
posttroll.subscriber.Subscriber.add(self, address, topics=None)
posttroll.subscriber.Subscriber.add_hook_pull(self, address, callback)
posttroll.subscriber.Subscriber.add_hook_sub(self, address, topics, callback)
posttroll.subscriber.Subscriber.close(self)
posttroll.subscriber.Subscriber.recv(self, timeout=None)
posttroll.subscriber.Subscriber.remove(self, address)
posttroll.subscriber.Subscriber.stop(self)
posttroll.subscriber.Subscriber.update(self, addresses)
posttroll.subscriber.create_subscriber_from_dict_config(settings)
posttroll.message.Message(subject='', atype='', data='', binary=False, rawstr=None, version='v1.2')
posttroll.message.Message.decode(rawstr)
posttroll.message.Message.encode(self)
posttroll.message.create_datetime_encoder_for_version(version='v1.2')
posttroll.message.create_datetime_json_encoder_for_version(version='v1.2')
posttroll.message.datetime_decoder(dct)
posttroll.message.datetime_encoder(obj, encoder)
posttroll.message.is_valid_data(obj, version='v1.2')
posttroll.message.is_valid_sender(obj)
posttroll.message.is_valid_subject(obj)
posttroll.message.is_valid_type(obj)
posttroll.address_receiver.AddressReceiver(max_age=datetime.timedelta(seconds=600), port=None, do_heartbeat=True, \
multicast_enabled=True, restrict_to_localhost=False)
posttroll.address_receiver.AddressReceiver.get(self, name='')
posttroll.address_receiver.AddressReceiver.is_running(self)
posttroll.address_receiver.AddressReceiver.process_address_message(self, data, pub)
posttroll.address_receiver.AddressReceiver.set_up_address_receiver(self, port)
posttroll.address_receiver.AddressReceiver.start(self)
posttroll.address_receiver.AddressReceiver.stop(self)
posttroll.ns.NameServer(max_age=None, multicast_enabled=True, restrict_to_localhost=False)
posttroll.ns.NameServer.run(self, address_receiver=None, nameserver_address=None)
posttroll.ns.NameServer.stop(self)
posttroll.ns.get_active_address(name, arec, message_version='v1.2')
posttroll.ns.get_configured_nameserver_port()
posttroll.ns.get_pub_address(name, timeout=10, nameserver='localhost')
posttroll.ns.get_pub_addresses(names=None, timeout=10, nameserver='localhost')
posttroll.ns.main()
posttroll.ns.run(ns, logger)
posttroll.ns.setup_logging(opts)
posttroll.message_broadcaster.AddressBroadcaster(name, address, interval, nameservers)
posttroll.message_broadcaster.MessageBroadcaster(msg, port, interval, designated_receivers=None)
posttroll.message_broadcaster.MessageBroadcaster.is_running(self)
posttroll.message_broadcaster.MessageBroadcaster.start(self)
posttroll.message_broadcaster.MessageBroadcaster.stop(self)
posttroll.bbmcast.MulticastReceiver(port, mcgroup=None)
posttroll.bbmcast.MulticastReceiver.close(self)
posttroll.bbmcast.MulticastReceiver.settimeout(self, tout=None)
posttroll.bbmcast.MulticastSender(port, mcgroup=None)
posttroll.bbmcast.MulticastSender.close(self)
posttroll.bbmcast.mcast_receiver(port, mcgroup=None)
posttroll.bbmcast.mcast_sender(mcgroup=None)
posttroll.get_context()
posttroll.backends.zmq.get_context()
posttroll.backends.zmq.destroy_context(linger=None)
posttroll.backends.zmq.get_tcp_keepalive_options()
posttroll.backends.zmq.generate_keys()
posttroll.backends.zmq.socket.set_up_client_socket(socket_type, address, options=None, backend=None)
posttroll.backends.zmq.socket.set_up_server_socket(socket_type, destination, options=None, \
port_interval=(None, None), backend=None)
posttroll.backends.zmq.socket.close_socket(sock)
posttroll.backends.zmq.socket.SocketReceiver()
posttroll.backends.zmq.socket.SocketReceiver.register(self, sock)
posttroll.backends.zmq.socket.SocketReceiver.unregister(self, sock)
posttroll.testing.patched_subscriber_recv(messages)
posttroll.testing.patched_publisher()
""".strip()
    .replace("\\\n", "")
    .split("\n")
)

DOCUMENTED_NAMES = [
    "publisher.Publisher.name",
    "publisher.Publisher.port_number",
    "publisher.NoisyPublisher.port_number",
    "subscriber.Subscriber.addresses",
    "subscriber.Subscriber.subscribers",
    "subscriber.Subscriber.running",
    "subscriber.Subscriber.__call__",
    "subscriber.get_pub_address",
    "subscriber.get_pub_addresses",
    "message.Message.head",
    "message.Message.host",
    "message.Message.user",
    "message.Message.from_string",
    "message.MessageError",
    "message._MAGICK",
    "listener.Listener",
    "listener.ListenerContainer.restart_listener",
    "listener.ListenerContainer.stop",
    "address_receiver.getaddress",
    "message_broadcaster.sendaddress",
    "message_broadcaster.sendaddressservice",
    "message_broadcaster.AddressServiceBroadcaster",
    "bbmcast.SocketTimeout",
    "bbmcast.MulticastReceiver.BUFSIZE",
    "logger.PytrollFormatter",
    "logger.PytrollHandler",
    "logger.ColoredFormatter",
    "logger.Logger",
    "logger.run",
    "backends.zmq.socket.ConfigurationError",
    "backends.zmq.socket.SocketReceiver.receive",
    "config.get",
]


def look_up(path: str) -> Any:
    """Return what a dotted path names, by importing as much of it as there is."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


class TestDocumentedNames:
    """Every name of the documentation by its path, with its arguments and their defaults."""

    @pytest.mark.parametrize("documented", DOCUMENTED_SIGNATURES, ids=lambda text: text.split("(")[0])
    def test_signature(self, documented):
        path, _, arguments = documented.partition("(")
        function = ast.parse(f"def f({arguments}: pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        names = [argument.arg for argument in function.args.args]
        defaults = [eval(ast.unparse(node), {"datetime": dt}) for node in function.args.defaults]
        expected = dict(zip(names[len(names) - len(defaults) :], defaults))
        parameters = list(inspect.signature(look_up(path)).parameters.values())
        assert [parameter.name for parameter in parameters[: len(names)]] == names
        for parameter in parameters:
            if parameter.name in expected:
                assert parameter.default == expected[parameter.name]
            elif parameter.name not in names:
                assert parameter.default is not parameter.empty  # what is added can be left out

    @pytest.mark.parametrize("path", DOCUMENTED_NAMES)
    def test_name(self, path):
        assert look_up(f"posttroll.{path}") is not None

    def test_aliases(self):
        assert posttroll.address_receiver.getaddress is posttroll.address_receiver.AddressReceiver
        assert posttroll.message_broadcaster.sendaddress is posttroll.message_broadcaster.AddressBroadcaster
        services = posttroll.message_broadcaster
        assert services.sendaddressservice is services.AddressServiceBroadcaster
        assert posttroll.bbmcast.SocketTimeout is socket.timeout
        assert posttroll.bbmcast.MulticastReceiver.BUFSIZE == 1024
        assert issubclass(posttroll.message.MessageError, Exception)

    def test_names_that_existing_programs_use(self, monkeypatch):
        assert posttroll.bbmcast.DEFAULT_MC_GROUP == "225.0.0.212"
        assert posttroll.bbmcast.DEFAULT_BROADCAST_PORT == 21200
        assert posttroll.ns.DEFAULT_UNSECURE_ZMQ_NAMESERVER_PORT == 5557
        assert posttroll.ns.DEFAULT_SECURE_ZMQ_NAMESERVER_PORT == 5558
        assert posttroll.address_receiver.DEFAULT_ADDRESS_PUBLISH_PORT == 16543
        functions = {
            "broadcast_port": [
                posttroll.bbmcast.get_configured_broadcast_port,
                posttroll.address_receiver.get_configured_broadcast_port,
                posttroll.message_broadcaster.get_configured_broadcast_port,
            ],
            "address_publish_port": [posttroll.address_receiver.get_configured_address_port],
            "nameserver_port": [
                posttroll.ns.get_configured_nameserver_port,
                posttroll.ns.get_configured_unsecure_zmq_nameserver_port,
            ],
            "secure_zmq_nameserver_port": [posttroll.ns.get_configured_secure_zmq_nameserver_port],
        }
        for key in functions:
            monkeypatch.delenv("POSTTROLL_" + key.upper(), raising=False)
        found = {key: {function() for function in group} for key, group in functions.items()}
        assert list(found.values()) == [{21200}, {16543}, {5557}, {5558}]
        for number, (key, group) in enumerate(functions.items(), 7000):
            monkeypatch.setenv("POSTTROLL_" + key.upper(), str(number))
            assert {function() for function in group} == {number}

    def test_properties(self):
        for path in ("publisher.Publisher.name", "publisher.Publisher.port_number", "subscriber.Subscriber.running"):
            assert isinstance(look_up(f"posttroll.{path}"), property)

    def test_everything_documented_has_a_docstring(self):
        paths = [text.split("(")[0] for text in DOCUMENTED_SIGNATURES]
        classes_and_functions = [path for path in paths if not inspect.getdoc(look_up(path))]
        assert classes_and_functions == []

    @pytest.mark.parametrize(
        ("used", "name"),
        [
            ("publisher", "posttroll.publisher"),
            ("listener", "posttroll.listener.ListenerContainer"),
        ],
    )
    def test_logger_names(self, used, name, caplog):
        caplog.set_level("DEBUG")
        if used == "publisher":
            with posttroll.Publisher("tcp://*:0"):
                pass
        else:
            posttroll.listener.ListenerContainer(addresses=["tcp://127.0.0.1:9"], nameserver=False).stop()
        assert name in {record.name for record in caplog.records}


class TestImportForms:
    """Each path in each form of the import statement."""

    FORMS = (
        "import {full}; found = {full}",
        "import {full} as found",
        "from {parent} import {last} as found",
        "import importlib; found = importlib.import_module('{full}')",
        "from {full} import *; import sys; found = sys.modules['{full}']",
        "import posttroll; found = {full}",
        "__import__('{full}'); import sys; found = sys.modules['{full}']",
    )

    @pytest.mark.parametrize("form", FORMS)
    def test_every_path(self, form):
        """In a fresh interpreter for each form, and another path is the first in each."""
        first = len(PATHS) - 1 - 2 * self.FORMS.index(form)
        code = []
        for path in PATHS[first:] + PATHS[:first]:
            parent, _, last = f"posttroll.{path}".rpartition(".")
            statement = form.format(full=f"posttroll.{path}", parent=parent, last=last)
            code += [statement, "import types", f"assert isinstance(found, types.ModuleType), {statement!r}"]
        with python("\n".join(code)) as running:
            assert finish(running) == (0, "", "")

    def test_the_chain_does_not_meet_other_modules(self):
        """`zmq` and `socket` are also names of other modules that the library uses."""
        code = """
            import socket, zmq
            import posttroll.backends.zmq.socket as ours
            import posttroll.backends.zmq
            from posttroll.backends import zmq as our_zmq
            from posttroll.backends.zmq import socket as our_socket
            assert our_zmq is posttroll.backends.zmq and our_zmq is not zmq
            assert our_socket is ours and our_socket is not socket
            assert callable(ours.set_up_client_socket) and callable(our_zmq.get_context)
            assert posttroll.zmq is zmq and posttroll.socket.gethostname is socket.gethostname
        """
        with python(inspect.cleandoc(code)) as running:
            assert finish(running) == (0, "", "")

    def test_documented_imports(self):
        statements = [
            "from posttroll import config, get_context, message",
            "from posttroll.message import Message, MessageError, _MAGICK, datetime_decoder",
            "from posttroll.publisher import Publish, Publisher, NoisyPublisher, get_own_ip",
            "from posttroll.subscriber import Subscribe, Subscriber, NSSubscriber, get_pub_address",
            "from posttroll.ns import NameServer, get_pub_address, get_pub_addresses, get_active_address, main, run",
            "from posttroll.address_receiver import AddressReceiver, getaddress",
            "from posttroll.message_broadcaster import sendaddress, sendaddressservice",
            "from posttroll.bbmcast import MulticastReceiver, SocketTimeout",
            "from posttroll.testing import patched_publisher, patched_subscriber_recv",
            "from posttroll.backends.zmq import get_context, destroy_context, get_tcp_keepalive_options, generate_keys",
            "from posttroll.backends.zmq.socket import set_up_client_socket, set_up_server_socket, close_socket",
            "from posttroll.backends.zmq.socket import SocketReceiver, ConfigurationError",
            "from posttroll.logger import PytrollHandler, PytrollFormatter, ColoredFormatter, Logger",
        ]
        with python("\n".join(statements)) as running:
            assert finish(running) == (0, "", "")

    def test_a_path_that_there_is_not(self):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("posttroll.nonesuch")
        with pytest.raises(AttributeError, match="nonesuch"):
            posttroll.nonesuch  # noqa: B018
        with pytest.raises(AttributeError, match="nonesuch"):
            posttroll.ns.nonesuch  # noqa: B018
        with pytest.raises(ImportError):
            from posttroll.publisher import nonesuch  # noqa: F401

    def test_one_class_by_all_paths(self):
        assert posttroll.message.Message is posttroll.Message is posttroll.publisher.Message
        assert posttroll.ns.NameServer is posttroll_ns.NameServer
        assert posttroll.ns.get_pub_address is posttroll.subscriber.get_pub_address
        assert posttroll.backends.zmq.get_context is posttroll.get_context

    def test_the_nameserver_is_imported_only_when_it_is_needed(self):
        code = "import sys, posttroll.publisher, posttroll.ns; print('posttroll_ns' in sys.modules); "
        code += "posttroll.ns.NameServer; print('posttroll_ns' in sys.modules)"
        with python(code) as running:
            assert finish(running)[1] == "False\nTrue\n"

    def test_programs_import_only_what_they_need(self):
        """Not what parses a command line; a nameserver not what finds out the width of a terminal."""
        code = "import sys, posttroll; print('argparse' in sys.modules); "
        code += "import posttroll_ns; posttroll_ns._parser(); print('shutil' in sys.modules)"
        with python(code) as running:
            assert finish(running)[1] == "False\nFalse\n"

    def test_directories_of_names(self):
        assert "Publisher" in dir(posttroll.publisher)
        assert {"NameServer", "get_pub_address"} <= set(dir(posttroll.ns))
        assert {"zmq"} <= set(dir(posttroll.backends))
        assert {"socket", "publisher"} <= set(dir(posttroll.backends.zmq))

    def test_help_and_other_tools_can_walk_over_it(self):
        modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "posttroll"]
        assert len(modules) > len(PATHS)
        for module in modules:
            for name in dir(module):
                getattr(module, name, None)
            assert isinstance(module, types.ModuleType)
            assert repr(module)
            inspect.getdoc(module)
            assert not hasattr(module, "__wrapped__")
            assert not hasattr(module, "__path__") or module.__name__.startswith("posttroll")


class TestPatching:
    """`mock.patch` by string reaches the code that runs, through each path, and is undone after."""

    @pytest.mark.parametrize(
        "path",
        ["posttroll.publisher.Publisher", "posttroll.Publisher", "posttroll.backends.zmq.publisher.Publisher"],
    )
    def test_publisher(self, path):
        original = posttroll.Publisher
        with mock.patch(path) as fake:
            posttroll.publisher.create_publisher_from_dict_config({"port": 40000, "nameservers": False, "name": "a"})
            fake.assert_called_once_with("tcp://*:40000", name="a")
        assert posttroll.Publisher is original

    def test_publisher_without_a_name(self):
        with mock.patch("posttroll.publisher.Publisher") as fake:
            posttroll.publisher.create_publisher_from_dict_config({"port": 40000, "nameservers": False})
        fake.assert_called_once_with("tcp://*:40000", name="")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {"name": "a", "port": 0, "nameservers": None},
                {"port": 0, "aliases": None, "nameservers": None, "min_port": None, "max_port": None},
            ),
            (
                {"name": "a", "port": 9000, "nameservers": ["host"], "aliases": ["b"], "min_port": 1, "max_port": 2},
                {"port": 9000, "aliases": ["b"], "nameservers": ["host"], "min_port": 1, "max_port": 2},
            ),
        ],
    )
    def test_noisy_publisher(self, settings, expected):
        with mock.patch("posttroll.publisher.NoisyPublisher") as fake:
            posttroll.publisher.create_publisher_from_dict_config(settings)
            fake.assert_called_once_with("a", broadcast_interval=2, **expected)
            with posttroll.publisher.Publish("a", **{key: settings[key] for key in ("port", "nameservers")}) as pub:
                pub.send("text")
        assert fake.call_count == 2
        fake.return_value.start.assert_called_once_with()
        fake.return_value.send.assert_called_once_with("text")
        fake.return_value.stop.assert_called_once_with()

    def test_publisher_inside_a_noisy_publisher(self):
        with mock.patch("posttroll.publisher.Publisher") as fake:
            fake.return_value.port_number = 12345
            with mock.patch("posttroll.message_broadcaster.AddressServiceBroadcaster") as broadcaster:
                noisy = posttroll.publisher.NoisyPublisher("a", port=7, min_port=1, max_port=2)
                noisy.start()
                noisy.send("text")
                noisy.stop()
        fake.assert_called_once_with("tcp://*:7", name="a", min_port=1, max_port=2)
        fake.return_value.send.assert_called_once_with("text")
        fake.return_value.stop.assert_called_once_with()
        assert broadcaster.call_args[0][:2] == ("a", "tcp://*:12345")
        broadcaster.return_value.start.assert_called_once_with()
        broadcaster.return_value.stop.assert_called_once_with()

    def test_replaced_methods_inside_a_noisy_publisher(self):
        """A fake `start` that returns None and binds nothing is enough."""
        sent = []
        with mock.patch.multiple(
            "posttroll.publisher.Publisher", start=lambda self: None, send=lambda self, text: sent.append(text),
            stop=lambda self: None,
        ):  # fmt: skip
            with posttroll.publisher.Publish("a_service", nameservers=["localhost"]) as pub:
                pub.send("text")
                pub.heartbeat()
        assert sent[0] == "text"
        assert Message.decode(sent[1]).type == "beat"

    def test_send(self):
        with mock.patch("posttroll.publisher.Publisher.send") as send, posttroll.Publisher("tcp://*:0") as pub:
            pub.send("text")
        send.assert_called_once_with("text")

    @pytest.mark.parametrize(
        "path", ["posttroll.subscriber.Subscriber", "posttroll.backends.zmq.subscriber.Subscriber"]
    )
    def test_subscriber(self, path):
        original = posttroll.Subscriber
        settings = {"addresses": ["tcp://localhost:9000"], "nameserver": False, "topics": ["/a"]}
        with mock.patch(path) as fake:
            found = posttroll.subscriber.create_subscriber_from_dict_config(settings)
            assert found is fake.return_value
            fake.assert_called_once_with(["tcp://localhost:9000"], topics=["/a"], message_filter=None, translate=False)
        assert posttroll.Subscriber is original

    def test_subscriber_inside_subscribe(self):
        with mock.patch("posttroll.subscriber.Subscriber") as fake:
            with posttroll.subscriber.Subscribe(None, "/topic", addresses=["tcp://127.0.0.1:9"]) as sub:
                assert sub is fake.return_value
        assert fake.call_args[0] == (["tcp://127.0.0.1:9"], "/topic")
        fake.return_value.close.assert_called_once_with()

    @pytest.mark.parametrize("method", ["recv", "__call__"])
    def test_receiving(self, method):
        with mock.patch(f"posttroll.subscriber.Subscriber.{method}", return_value=iter(["a message"])):
            with posttroll.subscriber.Subscribe(addresses=["tcp://127.0.0.1:9"], nameserver=False) as sub:
                assert list(getattr(sub, method)()) == ["a message"]

    def test_ns_subscriber(self):
        with mock.patch("posttroll.subscriber.NSSubscriber") as fake:
            with posttroll.subscriber.Subscribe("a_service", "/topic") as sub:
                assert sub is fake.return_value.start.return_value
        assert fake.call_args[1]["services"] == "a_service"
        assert fake.call_args[1]["topics"] == "/topic"

    @pytest.mark.parametrize("path", ["posttroll.subscriber.get_pub_addresses", "posttroll.ns.get_pub_addresses"])
    def test_lookups_of_subscribers(self, path):
        answer = [{"URI": "tcp://127.0.0.1:9", "name": "a_service", "service": ["a_service"]}]
        with mock.patch(path, return_value=answer) as ask:
            with posttroll.subscriber.Subscribe("a_service") as sub:
                assert sub.addresses == ["tcp://127.0.0.1:9"]
        assert ask.call_args[0][0] == ["a_service"]

    @pytest.mark.parametrize("path", ["posttroll.ns.get_pub_address", "posttroll.subscriber.get_pub_address"])
    def test_single_lookups(self, path):
        original = posttroll.get_pub_address
        with mock.patch(path, return_value=[{"URI": "tcp://127.0.0.1:9"}]) as ask:
            assert posttroll.ns.get_pub_addresses(["a", "b"], nameserver="host") == [{"URI": "tcp://127.0.0.1:9"}] * 2
            assert posttroll.subscriber.get_pub_address is ask
        assert [call[0][0] for call in ask.call_args_list] == ["a", "b"]
        assert posttroll.get_pub_address is original

    @pytest.mark.parametrize(
        "path",
        ["posttroll.ns.AddressReceiver", "posttroll.address_receiver.AddressReceiver", "posttroll_ns.AddressReceiver"],
    )
    def test_address_receiver_of_the_nameserver(self, path):
        original = posttroll_ns.AddressReceiver
        with mock.patch(path) as fake:
            fake.return_value.get.return_value = [{"URI": "tcp://127.0.0.1:9"}]
            with nameserver():
                assert posttroll.get_pub_address("a")[0]["URI"] == "tcp://127.0.0.1:9"
            fake.return_value.stop.assert_called()
        assert posttroll_ns.AddressReceiver is original
        assert posttroll.ns.AddressReceiver is original

    @pytest.mark.parametrize("path", ["posttroll.address_receiver.Publish", "posttroll.publisher.Publish"])
    def test_publish_of_the_address_receiver(self, path):
        with mock.patch(path) as fake:
            receiver = posttroll.address_receiver.AddressReceiver(multicast_enabled=False, port=free_port())
            receiver.start()
            wait_for(lambda: fake.called)
            receiver.stop()
        assert fake.call_args[0][0] == "address_receiver" or fake.call_args[1].get("name") == "address_receiver"

    def test_active_address(self):
        answer = Message("/oper/ns", "info", [{"URI": "tcp://127.0.0.1:9"}])
        with mock.patch("posttroll.ns.get_active_address", return_value=answer) as look, nameserver():
            assert posttroll.get_pub_address("a")[0]["URI"] == "tcp://127.0.0.1:9"
        assert look.call_args[0][0] == "a"

    def test_factory_of_the_listener(self):
        with mock.patch("posttroll.listener.create_subscriber_from_dict_config") as create:
            create.return_value.recv.return_value = iter(["a message"])
            container = posttroll.listener.ListenerContainer(topics=["/a"], services="a_service")
            assert container.output_queue.get(timeout=DEADLINE) == "a message"
            container.stop()
        assert create.call_args[0][0]["topics"] == ["/a"]
        assert create.call_args[0][0]["services"] == "a_service"

    @pytest.mark.parametrize("path", ["posttroll.listener.Listener", "posttroll.Listener"])
    def test_listener(self, path):
        with mock.patch(path) as fake:
            posttroll.listener.ListenerContainer(topics=["/a"]).stop()
        fake.return_value.stop.assert_called_once_with()

    def test_multicast(self):
        with mock.patch("posttroll.bbmcast.MulticastSender") as fake:
            broadcaster = posttroll.message_broadcaster.MessageBroadcaster("text", 9, 100)
            broadcaster.start()
            wait_for(lambda: fake.return_value.called)
            broadcaster.stop()
        assert fake.return_value.call_args[0][0] == "text"

    def test_broadcaster_classes(self):
        with mock.patch("posttroll.message_broadcaster.AddressServiceBroadcaster") as fake:
            with posttroll.publisher.Publish("a", nameservers=["localhost"]) as pub:
                assert fake.call_args[0][1] == f"tcp://*:{pub.port_number}"

    @pytest.mark.parametrize("path", ["posttroll.backends.zmq.socket", "posttroll.backends.zmq", "posttroll"])
    def test_server_sockets(self, path):
        original = posttroll.set_up_server_socket
        with mock.patch(f"{path}.set_up_server_socket", return_value=(mock.MagicMock(), 7, None)) as make:
            pub = posttroll.publisher.Publisher("tcp://*:0")
            pub.start()
            assert pub.port_number == 7
        assert make.call_args[0][0] == zmq.XPUB
        posttroll._live_publishers.discard(pub)
        assert posttroll.backends.zmq.socket.set_up_server_socket is original

    def test_client_sockets(self):
        with mock.patch("posttroll.backends.zmq.socket.set_up_client_socket", side_effect=ZeroDivisionError) as make:
            with pytest.raises(ZeroDivisionError):
                posttroll.get_pub_address("a", timeout=0.1)
        assert make.call_args[0][0] == zmq.REQ

    def test_get_context(self):
        with mock.patch("posttroll.backends.zmq.get_context", side_effect=ZeroDivisionError):
            with pytest.raises(ZeroDivisionError):
                posttroll.Publisher("tcp://*:0").start()

    def test_logger(self):
        original = posttroll.run_logger
        with mock.patch("posttroll.logger.run") as fake:
            assert posttroll.run_logger is fake
        assert posttroll.run_logger is original is posttroll.logger.run

    def test_messages(self):
        with mock.patch("posttroll.message.Message.encode", return_value="text"):
            assert str(Message("/a", "b")) == "text"
        with mock.patch("posttroll.publisher.Message") as fake:
            fake.return_value.encode.return_value = "text"
            with posttroll.Publisher("tcp://*:0", "name") as pub:
                pub.heartbeat()
        assert fake.call_args[0][:2] == ("/heartbeat/name", "beat")

    @pytest.mark.parametrize("name", ["get_pub_address", "NameServer"])
    def test_monkeypatch(self, name):
        """It restores by another way than `mock.patch`."""
        original = getattr(posttroll.ns, name)
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(f"posttroll.ns.{name}", "replaced")
            assert getattr(posttroll, name) == getattr(posttroll.backends.zmq.ns, name) == "replaced"
            patching.setattr(posttroll.ns, name, "replaced again")
            assert getattr(posttroll, name) == "replaced again"
        assert getattr(posttroll, name) is getattr(posttroll.ns, name) is original
        with pytest.MonkeyPatch.context() as patching:
            patching.delattr(f"posttroll.ns.{name}")
            assert not hasattr(posttroll.ns, name)
        assert getattr(posttroll, name) is original

    def test_patches_inside_each_other(self):
        original = posttroll.get_pub_address
        with mock.patch("posttroll.ns.get_pub_address") as outer:
            with mock.patch("posttroll.subscriber.get_pub_address") as inner:
                assert posttroll.ns.get_pub_address is inner
            assert posttroll.subscriber.get_pub_address is outer
        assert posttroll.get_pub_address is original

    def test_attributes_set_and_deleted_by_hand(self):
        posttroll.ns.of_a_test = 1
        assert posttroll.of_a_test == 1
        del posttroll.ns.of_a_test
        assert not hasattr(posttroll, "of_a_test")

    def test_a_user_s_module(self, tmp_path, monkeypatch):
        """`patch("trollthing.Subscriber")` replaces it there and nowhere else."""
        (tmp_path / "trollthing.py").write_text(
            "from posttroll.subscriber import Subscriber, create_subscriber_from_dict_config\n"
            "from posttroll.publisher import Publish\n"
            "def listen(): return list(Subscriber(['tcp://localhost:9000']).recv())\n"
            "class Mine(Subscriber):\n"
            "    def recv(self, timeout=None): yield 'mine'\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        trollthing = importlib.import_module("trollthing")
        with mock.patch("trollthing.Subscriber") as fake:
            fake.return_value.recv.return_value = ["a message"]
            assert trollthing.listen() == ["a message"]
            assert posttroll.Subscriber is not fake
        with mock.patch("posttroll.subscriber.Subscriber.recv", return_value=iter(["another"])):
            assert list(trollthing.Subscriber.recv()) == ["another"]
        mine = trollthing.Mine(["tcp://127.0.0.1:9"])
        assert next(mine.recv()) == "mine"
        mine.close()
        del sys.modules["trollthing"]


class TestSubclassesAndTypes:
    def test_subscribe_hands_out_a_subscriber(self):
        with posttroll.subscriber.Subscribe(addresses=["tcp://127.0.0.1:9"], nameserver=False) as sub:
            assert type(sub) is posttroll.subscriber.Subscriber
        with nameserver(), posttroll.subscriber.Subscribe("nobody", timeout=0) as sub:
            assert type(sub) is posttroll.subscriber.Subscriber

    def test_publish_hands_out_a_publisher(self):
        with posttroll.publisher.Publish("a", nameservers=["localhost"]) as pub:
            assert type(pub) is posttroll.publisher.NoisyPublisher
        with posttroll.publisher.Publish("a", port=free_port(), nameservers=False) as pub:
            assert type(pub) is posttroll.publisher.Publisher

    def test_subclasses_of_the_documented_classes(self):
        class MyListener(posttroll.listener.ListenerContainer):
            def __init__(self):
                super().__init__(addresses=[f"tcp://127.0.0.1:{pub.port_number}"], nameserver=False)

        class MyPublisher(posttroll.publisher.Publisher):
            def send(self, msg):
                super().send(str(Message("/wrapped", "info", msg)))

        with MyPublisher("tcp://*:0") as pub:
            listener = MyListener()
            assert pub.wait_for_subscribers(1, DEADLINE)
            pub.send("text")
            message = listener.output_queue.get(timeout=DEADLINE)
            assert (message.subject, message.data) == ("/wrapped", "text")
            listener.stop()


class TestSockets:
    """What programs use of `posttroll.backends.zmq.socket`."""

    def test_a_pair_over_tcp(self):
        sockets = posttroll.backends.zmq.socket
        server, port, authenticator = sockets.set_up_server_socket(zmq.REP, "tcp://127.0.0.1:0")
        assert authenticator is None
        assert config.get("pub_min_port") <= port < config.get("pub_max_port")
        client = sockets.set_up_client_socket(zmq.REQ, f"tcp://127.0.0.1:{port}", {zmq.LINGER: 5})
        assert client.getsockopt(zmq.LINGER) == 5
        receiver = sockets.SocketReceiver()
        receiver.register(server)
        client.send_string(str(Message("/a", "request", {"n": 1})))
        [(message, sock)] = receiver.receive(server, timeout=DEADLINE)
        assert (message.data, sock) == ({"n": 1}, server)
        server.send_string(str(Message("/a", "answer", "yes")))
        assert Message.decode(client.recv()).data == "yes"
        with pytest.raises(TimeoutError):
            next(receiver.receive(server, timeout=0.01))
        receiver.unregister(server)
        for sock in (client, server):
            sockets.close_socket(sock)
            assert sock.closed

    def test_inproc(self):
        sockets = posttroll.backends.zmq.socket
        server, port, _ = sockets.set_up_server_socket(zmq.PULL, "inproc://commands")
        assert port is None
        client = sockets.set_up_client_socket(zmq.PUSH, "inproc://commands")
        client.send_string(str(Message("/a", "command", "go")))
        receiver = sockets.SocketReceiver()
        receiver.register(server)
        [(message, _)] = receiver.receive(server, timeout=DEADLINE)
        assert message.data == "go"
        sockets.close_socket(client)
        sockets.close_socket(server)

    def test_several_sockets(self):
        sockets = posttroll.backends.zmq.socket
        servers = [sockets.set_up_server_socket(zmq.PULL, f"inproc://{name}")[0] for name in "abc"]
        clients = [sockets.set_up_client_socket(zmq.PUSH, f"inproc://{name}") for name in "abc"]
        receiver = sockets.SocketReceiver()
        for server in servers:
            receiver.register(server)
        for number in (0, 2):
            clients[number].send_string(str(Message("/a", "b", number)))
            assert servers[number].poll(DEADLINE * 1000)
        received = [(message.data, sock) for message, sock in receiver.receive(*servers, timeout=DEADLINE)]
        assert received == [(0, servers[0]), (2, servers[2])]
        for sock in (*servers, *clients):
            sockets.close_socket(sock)

    def test_port_interval(self):
        sockets = posttroll.backends.zmq.socket
        free = free_port()
        server, port, _ = sockets.set_up_server_socket(zmq.PUB, "tcp://*:0", port_interval=(free, free + 1))
        assert port == free
        with pytest.raises(zmq.ZMQError, match=str(free)):
            sockets.set_up_server_socket(zmq.PUB, "tcp://*:0", port_interval=(free, free + 1))
        sockets.close_socket(server)

    def test_unknown_backend(self):
        sockets = posttroll.backends.zmq.socket
        for set_up in (sockets.set_up_client_socket, sockets.set_up_server_socket):
            with pytest.raises(NotImplementedError, match="pigeon"):
                set_up(zmq.SUB, "tcp://127.0.0.1:9", backend="pigeon")
            with pytest.raises(sockets.ConfigurationError, match="secret_key_file"):
                set_up(zmq.SUB, "tcp://127.0.0.1:9", backend="secure_zmq")

    def test_context(self):
        context = posttroll.backends.zmq.get_context()
        assert context is posttroll.get_context()
        posttroll.backends.zmq.destroy_context()
        assert context.closed
        posttroll.backends.zmq.destroy_context()
        assert not posttroll.get_context().closed


def answer_messages(requests: Any, answers: Any) -> None:
    """Answer each message with one about its data, in another process."""
    for message in iter(requests.get, None):
        answers.put(Message("/answer", "info", {"got": message.data, "from": message.subject}))


class TestMultiprocessing:
    @pytest.mark.parametrize("method", ["spawn", "fork"])
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_messages_through_queues(self, method):
        context = multiprocessing.get_context(method)
        requests, answers = context.Queue(), context.Queue()
        worker = context.Process(target=answer_messages, args=(requests, answers))
        worker.start()
        moment = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
        requests.put(Message("/a", "info", [moment, "text"]))
        answer = answers.get(timeout=DEADLINE)
        requests.put(None)
        worker.join(DEADLINE)
        assert worker.exitcode == 0
        assert answer.data == {"got": [moment, "text"], "from": "/a"}
        for channel in (requests, answers):
            channel.close()
            channel.join_thread()


class TestFreezegun:
    """It reads and replaces attributes of every loaded module."""

    def test_time_of_messages(self):
        with freeze_time("2010-12-01 12:21:11"):
            message = Message("/a", "b", {"x": 1})
        assert message.time == dt.datetime(2010, 12, 1, 12, 21, 11, tzinfo=dt.timezone.utc)
        assert " 2010-12-01T12:21:11+00:00 v1.2 " in message.encode()

    def test_decoding_and_encoding_while_it_is_frozen(self):
        with freeze_time("2010-12-01 12:21:11"):
            data = {"at": dt.datetime.now(dt.timezone.utc), "then": dt.datetime(2000, 1, 1)}
            message = Message("/a", "b", data)
            again = Message.decode(message.encode())
            assert again.data == data
            assert again.time == dt.datetime.now(dt.timezone.utc)
            assert "2010-12-01T12:21:11+00:00" in message.encode()

    @staticmethod
    def everything() -> dict[str, dict[str, int]]:
        """Return what stands at all paths, by identity."""
        modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "posttroll"}
        return {
            path: {name: id(value) for name, value in vars(module).items() if not name.startswith("__")}
            for path, module in modules.items()
        }

    def test_all_of_it_stands_after(self):
        assert posttroll.ns.NameServer is not None
        before = self.everything()
        for _ in range(2):
            with freeze_time("2010-12-01"):
                assert posttroll.datetime.now().year == 2010
        assert self.everything() == before
        assert posttroll.datetime.now().year > 2010

    def test_with_a_tick_messages_go_through(self):
        with freeze_time("2010-12-01", tick=True), posttroll.Publisher("tcp://*:0") as pub:
            with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(Message("/a", "b", "text"))
                [message] = receive(sub)
        assert message.time.year == 2010

    def test_fake_publisher(self):
        with freeze_time("2010-12-01"), posttroll.testing.patched_publisher() as published:
            with posttroll.publisher.Publish("a_service") as pub:
                pub.send(str(Message("/a", "b")))
        assert "2010-12-01T00:00:00+00:00" in published[0]


class TestVendored:
    """The two files in a package of somebody's, under its name."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        vendor = tmp_path / "project" / "app" / "_vendor"
        vendor.mkdir(parents=True)
        for directory in (vendor.parent, vendor):
            (directory / "__init__.py").touch()
        for file in (LIBRARY, NAMESERVER):
            shutil.copy(file, vendor)
        return tmp_path / "project"

    @staticmethod
    def run_in(project: Path, code: str) -> tuple[int, str, str]:
        environment = {**os.environ, "PYTHONPATH": str(project)}
        with python(inspect.cleandoc(code), cwd=project, env=environment) as running:
            return finish(running)

    def test_a_message_goes_through_all_of_it(self, project):
        environment = {**os.environ, "PYTHONPATH": str(project)}
        command = [sys.executable, "-u", "-m", "app._vendor.posttroll_ns", "--no-multicast"]
        with process(*command, cwd=project, env=environment) as running:
            await_line(running, "answers on port")
            code = """
                import sys
                from app._vendor import posttroll
                from app._vendor.posttroll.publisher import Publish
                import app._vendor.posttroll.subscriber as subscriber
                import app._vendor.posttroll.backends.zmq.socket
                with Publish("a_service", nameservers=["localhost"]) as pub:
                    with subscriber.Subscribe("a_service", "/a") as sub:
                        assert pub.wait_for_subscribers(1, 20)
                        pub.send(posttroll.Message("/a", "info", {"n": 1}))
                        print(next(sub.recv(timeout=20)).data)
                print(sorted(name for name in sys.modules if name.split(".")[0].startswith("posttroll")))
                print(posttroll.Message.__module__, posttroll.ns.NameServer.__module__)
            """
            assert self.run_in(project, code) == (
                0, "{'n': 1}\n[]\napp._vendor.posttroll.message app._vendor.posttroll_ns\n", "",
            )  # fmt: skip
            running.send_signal(signal.SIGTERM)
            assert finish(running)[0] == 0

    def test_beside_another_posttroll(self, project):
        """A package of that name in the same process is not disturbed, and does not disturb."""
        other = project / "posttroll"
        (other / "backends").mkdir(parents=True)
        (other / "__init__.py").write_text("config = 'theirs'\n")
        (other / "publisher.py").write_text("class Publisher: pass\n")
        (other / "backends" / "__init__.py").touch()
        (project / "posttroll_ns.py").write_text("NameServer = 'theirs'\n")
        imports = [
            "import posttroll, posttroll.publisher, posttroll.backends, posttroll_ns",
            "import app._vendor.posttroll.publisher, app._vendor.posttroll.ns as our_ns",
        ]
        for first, second in (imports, imports[::-1]):
            code = (
                "\n".join([first, second])
                + "\n"
                + inspect.cleandoc("""
                from unittest import mock
                import sys
                ours = app._vendor.posttroll
                assert posttroll.config == "theirs" and posttroll_ns.NameServer == "theirs"
                assert posttroll.publisher.Publisher is not ours.publisher.Publisher
                assert our_ns.NameServer.__module__ == "app._vendor.posttroll_ns"
                with mock.patch("app._vendor.posttroll.publisher.Publisher") as fake:
                    assert ours.Publisher is fake and posttroll.publisher.Publisher is not fake
                with mock.patch("posttroll.publisher.Publisher") as fake:
                    assert ours.Publisher is not fake
                with ours.config.set(mc_ttl=3):
                    assert posttroll.config == "theirs"
                names = {name for name in sys.modules if name.split(".")[0] == "posttroll"}
                assert names == {"posttroll", "posttroll.publisher", "posttroll.backends"}, names
                import pickle
                message = ours.Message("/a", "b", [1])
                assert pickle.loads(pickle.dumps(message)).data == [1]
            """)
            )
            assert self.run_in(project, code) == (0, "", "")

    def test_command_line_of_the_vendored_file(self, project):
        environment = {**os.environ, "PYTHONPATH": str(project)}
        for command in (["-m", "app._vendor.posttroll"], ["app/_vendor/posttroll.py"]):
            with process(sys.executable, *command, "--version", cwd=project, env=environment) as running:
                assert finish(running)[:2] == (0, f"posttroll {posttroll.__version__}\n")

    def test_the_demo_needs_the_nameserver(self, project):
        (project / "app" / "_vendor" / "posttroll_ns.py").unlink()
        with process(sys.executable, "app/_vendor/posttroll.py", "demo", cwd=project) as demo:
            status, out, err = finish(demo)
        assert (status, out, err) == (1, "", "posttroll demo: it needs posttroll_ns.py beside this file.\n")

    def test_the_library_alone(self, project):
        """Without posttroll_ns.py, what is not in it says so clearly; all the rest works."""
        (project / "app" / "_vendor" / "posttroll_ns.py").unlink()
        code = """
            import app._vendor.posttroll as posttroll
            import app._vendor.posttroll.publisher
            import app._vendor.posttroll.ns as ns
            from app._vendor.posttroll.ns import get_pub_address
            with posttroll.publisher.Publisher("tcp://*:0") as pub:
                pub.send("text")
            for name in ("NameServer", "AddressReceiver", "main"):
                try:
                    getattr(ns, name)
                except AttributeError as error:
                    print(error)
            assert not hasattr(posttroll, "NameServer")
            try:
                from app._vendor.posttroll.ns import NameServer
            except ImportError as error:
                print(type(error).__name__)
            for name in dir(posttroll) + dir(ns):
                getattr(posttroll, name, None), getattr(ns, name, None)
        """
        status, out, err = self.run_in(project, code)
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert len(lines) == 4
        for name, line in zip(("NameServer", "AddressReceiver", "main"), lines):
            assert line.startswith(f"{name} is in posttroll_ns.py, which cannot be imported: ")
        assert lines[3] == "ImportError"

    def test_the_nameserver_command_of_the_library_alone(self, project):
        (project / "app" / "_vendor" / "posttroll_ns.py").unlink()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-m", "app._vendor.posttroll", "nameserver"]
        with process(*command, cwd=project, env=environment) as running:
            status, _, err = finish(running)
        assert status != 0
        assert "posttroll_ns" in err
        assert "Traceback" not in err

    def test_a_bare_copy(self, tmp_path):
        """`python posttroll_ns.py --no-multicast` beside posttroll.py, from anywhere."""
        for file in (LIBRARY, NAMESERVER):
            shutil.copy(file, tmp_path)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for command, directory in ((["posttroll_ns.py"], tmp_path), ([str(tmp_path / "posttroll_ns.py")], "/")):
            arguments = [sys.executable, "-u", *command, "--no-multicast"]
            with process(*arguments, cwd=directory, env=environment) as running:
                await_line(running, "answers on port")
                assert posttroll.get_pub_address("nobody") == []
                running.send_signal(signal.SIGTERM)
                assert finish(running)[0] == 0


PROGRAM = """
import ctypes, os, struct, sys

def is_writable(directory):
    try:
        os.close(os.open(os.path.join(directory, f"posttroll-{os.getpid()}"), os.O_CREAT | os.O_WRONLY))
    except OSError:
        return False
    return True

def refuse(*refused):
    # Have system calls fail with EPERM: each a number and what its arguments have to be; see seccomp(2).
    def instruction(code, value, if_true=0, if_false=0):
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = b""
    for number, arguments in refused:
        left = 2 * len(arguments) + 1
        program += instruction(0x20, 0) + instruction(0x15, number, 0, left)
        for position, value in arguments.items():
            left -= 2
            program += instruction(0x20, 16 + 8 * position) + instruction(0x15, value, 0, left)
        program += instruction(0x06, 0x50001)
    program += instruction(0x06, 0x7FFF0000)
    code = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None)
    assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 0, 0) == 0

sys.path.append(os.environ["SITE"])
if "LOCKED" in os.environ:
    assert os.getuid() == os.geteuid() == 54321 and os.path.expanduser("~") == "~"
    directories = [os.environ["SITE"], os.path.dirname(os.path.abspath(__file__)), "/tmp", "/var/tmp", "/dev/shm"]
    assert not any(map(is_writable, directories))
    socket, setsockopt, prlimit = {"x86_64": (41, 54, 302), "aarch64": (198, 208, 261)}[os.uname().machine]
    multicast_if, multicast_ttl, membership = [(setsockopt, {1: 0, 2: option}) for option in (32, 33, 35)]
    refuse((prlimit, {}), (socket, {0: 16}), multicast_if, multicast_ttl, membership)
import app.posttroll.publisher
import app.posttroll.ns
from app.posttroll.subscriber import Subscribe
if sys.argv[1] == "nameserver":
    sys.exit(app.posttroll.ns.main(sys.argv[2:]))
nameservers = ["localhost"] if sys.argv[1] == "registers" else None
with app.posttroll.publisher.Publish("a_service", nameservers=nameservers) as pub:
    with Subscribe("a_service", "/a", True) as sub:
        assert pub.wait_for_subscribers(1, 20) or sys.exit("Nobody has come")
        pub.send(app.posttroll.Message("/a", "info", {"n": 1}))
        print(next(sub.recv(timeout=20)).data, pub.__doc__ and "documented")
"""


class TestLockedDown:
    """A nameserver, a publisher and a subscriber where little is allowed."""

    @pytest.fixture
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A directory with a program that has the two files in its package."""
        app = tmp_path / "program" / "app"
        app.mkdir(parents=True)
        for file in (LIBRARY, NAMESERVER):
            shutil.copy(file, app)
        (app / "__init__.py").touch()
        (app.parent / "__main__.py").write_text(PROGRAM)
        monkeypatch.delenv("PYTHONPATH")
        monkeypatch.setenv("SITE", str(Path(zmq.__file__).parent.parent))
        return app.parent

    @staticmethod
    def talk(*command: Any, multicast: bool) -> str:
        """Run a nameserver, and beside it a publisher and a subscriber; return what these say."""
        with process(*command, "nameserver", *([] if multicast else ["--no-multicast"])) as server:
            await_line(server, "answers on port")
            with process(*command, "announces" if multicast else "registers") as running:
                status, out, err = finish(running)
            assert (status, err) == (0, "")
            server.send_signal(signal.SIGTERM)
            assert finish(server)[0] == 0
        return out

    @pytest.mark.parametrize("multicast", [True, False])
    def test_without_asserts_docstrings_environment_and_site(self, program, multicast):
        command = [sys.executable, "-OO", "-I", "-S", "-B", "-u", program]
        assert self.talk(*command, multicast=multicast) == "{'n': 1} None\n"
        assert not list(program.rglob("__pycache__"))

    def test_in_an_archive(self, program):
        archive = program.with_suffix(".pyz")
        zipapp.create_archive(program, archive)
        assert self.talk(sys.executable, "-u", archive, multicast=False) == "{'n': 1} documented\n"

    def test_on_a_host_that_allows_nothing(self, program, monkeypatch):
        """All file systems read-only, a user without name and home; netlink, multicast, limits of resources refused."""
        if sys.platform != "linux" or os.getuid() or os.uname().machine not in ("x86_64", "aarch64"):
            pytest.skip("It takes Linux, and root")
        monkeypatch.setenv("LOCKED", "1")
        monkeypatch.delenv("HOME", raising=False)
        read_only = "while read -r _ path _; do mount -o remount,bind,ro $path 2>&-; done < /proc/self/mounts"
        may_read = "-all,+dac_read_search"  # the interpreter may lie in the home directory of root
        user = f"--bounding-set={may_read} --inh-caps={may_read} --ambient-caps=+dac_read_search --no-new-privs"
        user += " --reuid 54321 --regid 54321 --clear-groups"
        script = f'mount --make-rprivate / && {{ {read_only}; exec setpriv {user} "$@"; }}'
        command = ["unshare", "--mount", "sh", "-c", script, "sh"]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"It may not make a namespace: {getattr(error, 'stderr', error)}")
        assert self.talk(*command, sys.executable, "-u", program, multicast=False) == "{'n': 1} documented\n"


# ======================================================================================================================
# posttroll_ns.py, 1. The address book
# ======================================================================================================================


def announcement(uri: Any = "tcp://h:1", services: Any = ("a",), name: str = "name", **data: Any) -> Any:
    """Return the announcement of a publisher; without what is None."""
    content = {"URI": uri, "service": list(services) if isinstance(services, tuple) else services, **data}
    content = {key: value for key, value in content.items() if value is not None}
    return posttroll.Message(f"/address/{name}", "info", content, version="v1.01")


class TestAddressBook:
    def add(self, book: Any, *args: Any, **kwargs: Any) -> bool:
        return book.add(book.parse(announcement(*args, **kwargs)))

    def addresses(self, book: Any, service: str = "") -> list[str]:
        return [entry.address for entry in book.find(service)]

    def test_finding_by_service(self):
        book = posttroll_ns.AddressBook(10)
        assert self.add(book, "tcp://h:1", ("a", "b"))
        assert self.add(book, "tcp://h:2", ("b", "c"))
        assert len(book) == 2
        assert self.addresses(book, "a") == ["tcp://h:1"]
        assert self.addresses(book, "b") == self.addresses(book) == ["tcp://h:1", "tcp://h:2"]
        assert self.addresses(book, "d") == []

    def test_what_is_new_or_changed(self):
        book = posttroll_ns.AddressBook(10)
        assert self.add(book)
        assert not self.add(book)
        assert self.add(book, services=("b",))
        assert (self.addresses(book, "a"), self.addresses(book, "b")) == ([], ["tcp://h:1"])
        assert self.add(book, services=("b",), backend="secure_zmq")
        assert self.add(book, services=("b",), backend="secure_zmq", name="other")
        assert len(book) == 1

    def test_removing(self):
        book = posttroll_ns.AddressBook(10)
        self.add(book)
        assert book.remove("tcp://h:1").name == "name"
        assert book.remove("tcp://h:1") is None
        assert (len(book), self.addresses(book, "a"), book._by_service) == (0, [], {})

    def test_expiring(self):
        book = posttroll_ns.AddressBook(0.05)
        assert book.next_expiry() is None
        self.add(book, "tcp://h:1")
        assert book.expire() == []
        assert book.next_expiry() > time.monotonic() - 1
        [expired] = wait_for(book.expire)
        assert (expired.address, len(book)) == ("tcp://h:1", 0)

    def test_a_repeated_announcement_puts_off_the_expiry(self):
        book = posttroll_ns.AddressBook(3600)
        self.add(book, "tcp://h:1")
        self.add(book, "tcp://h:2")
        before = book.next_expiry()
        self.add(book, "tcp://h:1")
        assert self.addresses(book) == ["tcp://h:2", "tcp://h:1"]
        assert book.next_expiry() >= before

    def test_there_is_a_limit(self):
        book = posttroll_ns.AddressBook(10, limit=3)
        for number in range(1, 4):
            self.add(book, f"tcp://h:{number}")
        with pytest.raises(posttroll_ns.AnnouncementError, match=r"there are 3 publishers already .see max_services."):
            self.add(book, "tcp://h:4")
        assert not self.add(book, "tcp://h:1")  # those that are known stay
        assert len(book) == 3

    def test_those_with_a_thousand_long_names_count_for_more(self):
        """Else the nameserver would take gigabytes before it reaches its limit."""
        book = posttroll_ns.AddressBook(10, limit=1000)
        many = [f"{number:_>511}\U0001f6f0" for number in range(book.MAX_SERVICES)]
        with pytest.raises(posttroll_ns.AnnouncementError, match=r"there are [1-3] publishers already"):
            for number in range(1, 5):
                self.add(book, f"tcp://h:{number}", many)  # takes over 2 MB
        for address in self.addresses(book):
            book.remove(address)
        for number in range(1000):  # there is room again for as many as before
            self.add(book, f"tcp://h:{number + 1}", tuple("abcdefgh"))
        with pytest.raises(posttroll_ns.AnnouncementError, match="there are 1000 publishers already"):
            self.add(book, "tcp://h:2000")
        with pytest.raises(posttroll_ns.AnnouncementError, match="there are 1000 publishers already"):
            self.add(book, "tcp://h:7", many)
        assert "tcp://h:7" in self.addresses(book, "a")  # it is as it was
        assert self.add(book, "tcp://h:7", ("b",))

    def test_silent_ones_make_room(self, monkeypatch):
        monkeypatch.setattr(posttroll_ns.AddressBook, "GRACE", 0.0)
        book = posttroll_ns.AddressBook(10, limit=2)
        for number in range(1, 5):
            self.add(book, f"tcp://h:{number}")
        assert self.addresses(book) == ["tcp://h:3", "tcp://h:4"]

    def test_the_limit_is_configurable(self):
        with config.set(max_services=7):
            assert posttroll_ns.AddressBook(10).limit == 7

    def test_without_service_it_is_found_by_its_name(self):
        book = posttroll_ns.AddressBook(10)
        self.add(book, services=None)
        assert self.addresses(book, "name") == ["tcp://h:1"]

    def test_what_it_describes(self):
        book = posttroll_ns.AddressBook(10)
        begin = datetime.now(timezone.utc)
        self.add(book, supported_message_version="v1.2", backend="unsecure_zmq", nonsense="left out")
        description = book.find("a")[0].describe(time.time() - time.monotonic())
        assert abs(description.pop("receive_time") - begin) < timedelta(seconds=DEADLINE)
        assert description == {
            "URI": "tcp://h:1",
            "service": ["a"],
            "supported_message_version": "v1.2",
            "backend": "unsecure_zmq",
            "status": True,
            "name": "name",
        }

    @pytest.mark.parametrize(
        "data",
        [
            *[{"uri": uri} for uri in (None, 5, "", "tcp://", "tcp://h", "tcp://h:0", "tcp://h:99999", "tcp://*:1")],
            *[{"uri": uri} for uri in ("foo://bar:1", "h:1", "tcp://h:1\n", "tcp://a b:1", ["tcp://h:1"], {})],
            {"uri": "ipc://" + "x" * 1000},
            *[{"services": services} for services in ("a", 5, (), (5,), ("",), (None,), {}, ("x" * 1000,))],
            {"services": tuple(map(str, range(2000)))},
            *[{"supported_message_version": version} for version in (5, "", "1.2", ["v1.2"], "v" * 1000)],
            *[{"backend": backend} for backend in (5, "", "pigeon", ["secure_zmq"], {})],
            {"name": ""},
            {"name": "x" * 1000},
        ],
        ids=lambda data: repr(data)[:40],
    )
    def test_what_it_refuses(self, data):
        book = posttroll_ns.AddressBook(10)
        with pytest.raises(posttroll_ns.AnnouncementError):
            self.add(book, **data)
        assert len(book) == 0

    @pytest.mark.parametrize("subject", ["/other/name", "/address", "address/name", "/addresses/name"])
    def test_what_is_no_announcement(self, subject):
        message = posttroll.Message(subject, "info", {"URI": "tcp://h:1", "service": ["a"]})
        with pytest.raises(posttroll_ns.AnnouncementError, match="subject"):
            posttroll_ns.AddressBook(10).parse(message)

    @pytest.mark.parametrize("data", ["text", 5, None, ["URI"]])
    def test_data_that_are_no_object(self, data):
        with pytest.raises(posttroll_ns.AnnouncementError, match="no object"):
            posttroll_ns.AddressBook(10).parse(posttroll.Message("/address/name", "info", data))


# ======================================================================================================================
# posttroll_ns.py, 2. Receiving announcements
# ======================================================================================================================


class TestAddressReceiver:
    def test_by_request(self):
        receiver = posttroll_ns.getaddress(multicast_enabled=False)
        assert not receiver.is_running()
        receiver.stop()
        receiver.start()
        try:
            assert receiver.is_running()
            assert receiver.start() is receiver
            port = config.get("broadcast_port")
            assert raw_request(port, announcement().encode().encode()) == [b"ok"]
            assert [entry["URI"] for entry in receiver.get("a")] == ["tcp://h:1"]
            assert receiver.get("b") == []
            [answer] = raw_request(port, announcement(uri="nonsense").encode().encode())
            assert answer.startswith(b"refused: its URI")
            assert len(receiver.get()) == 1
        finally:
            receiver.stop()
            receiver.stop()
        assert not receiver.is_running()

    def test_by_multicast_on_a_port_of_its_own(self):
        port = free_port()
        receiver = posttroll_ns.AddressReceiver(port=port).start()
        try:
            sender = posttroll.MulticastSender(port)
            sender(b"\xff nonsense")
            sender(announcement().encode())
            sender.close()
            wait_for(lambda: receiver.get("a"))
        finally:
            receiver.stop()

    def test_the_group_is_joined_again_and_again(self, monkeypatch):
        """Whatever that raises, the socket that works is kept, and it goes on; no socket is left behind."""
        made: list[Any] = []
        errors = [OSError(errno.EADDRINUSE, "x"), OSError(errno.ENODEV, "x"), RuntimeError("x")]

        class Receiver(posttroll.MulticastReceiver):
            def __init__(self, *args: Any) -> None:
                if len(made) == 3 and errors:
                    raise errors.pop()
                super().__init__(*args)
                made.append(self)

        monkeypatch.setattr(posttroll, "MulticastReceiver", Receiver)
        monkeypatch.setattr(posttroll_ns._MulticastSource, "RENEWAL", 0.01)
        monkeypatch.setattr(posttroll_ns._MulticastSource, "RETRY", 0.01)
        receiver = posttroll_ns.AddressReceiver().start()
        try:
            wait_for(lambda: len(made) > 10)
            assert sum(each.fileno() != -1 for each in list(made)[:-2]) == 0
            with contextlib.closing(posttroll.MulticastSender(config.get("broadcast_port"))) as sender:
                sender(announcement().encode())
            wait_for(lambda: receiver.get("a"))
        finally:
            receiver.stop()
        assert {each.fileno() for each in made} == {-1}

    def test_no_announcement_is_lost_when_the_group_is_joined_again(self, monkeypatch):
        monkeypatch.setattr(posttroll_ns._MulticastSource, "RENEWAL", 0)
        port, heard = free_port(), []
        source = posttroll_ns._MulticastSource(port, posttroll.AccessRules(False), posttroll.LimitedLogger("x"))
        loop = posttroll.Loop()
        with contextlib.closing(loop), contextlib.closing(source):
            source.watch(loop, heard.append)
            with contextlib.closing(posttroll.MulticastSender(port)) as sender:
                for number in range(120):
                    sender(str(number))
                old = source._receiver
                wait_for(lambda: select.select([old], [], [], 0)[0])
                loop.turn(time.monotonic())
                assert source._receiver is not old
                assert sum(timer.callback is not None for timer in loop._timers) == 1
                sender("120")
                wait_for(lambda: loop.turn(time.monotonic() + 0.1) or heard[-1] == b"120")
            source.close()
            assert [timer for timer in loop._timers if timer.callback is not None] == []
        assert [int(number) for number in heard] == list(range(121))

    @pytest.mark.parametrize("max_age", [0.2, dt.timedelta(seconds=0.2)])
    def test_new_and_lost_publishers_are_published(self, max_age):
        receiver = posttroll_ns.AddressReceiver(max_age=max_age, multicast_enabled=False).start()
        try:
            with posttroll.Subscriber([f"tcp://127.0.0.1:{config.get('address_publish_port')}"], "/address") as sub:
                request = announcement().encode().encode()
                # Until the subscription has arrived, the news are for nobody: a changed announcement is new again.
                wait_for(
                    lambda: (
                        raw_request(config.get("broadcast_port"), announcement(name="other").encode().encode())
                        and raw_request(config.get("broadcast_port"), request)
                        and next(sub.recv(timeout=0.05))
                    )
                )
                news = wait_for(lambda: next((m for m in receive(sub, 1) if m.data["status"] is False), None))
            assert (news.subject, news.version) == ("/address/name", "v1.01")
            assert news.data == {"URI": "tcp://h:1", "service": ["a"], "status": False}
            assert receiver.get() == []
        finally:
            receiver.stop()

    @pytest.mark.parametrize("do_heartbeat", [True, False])
    def test_heartbeats(self, do_heartbeat, monkeypatch):
        monkeypatch.setattr(posttroll_ns.AddressReceiver, "HEARTBEAT", 1.01)
        receiver = posttroll_ns.AddressReceiver(do_heartbeat=do_heartbeat, multicast_enabled=False).start()
        try:
            with posttroll.Subscriber([f"tcp://127.0.0.1:{config.get('address_publish_port')}"], "/heartbeat") as sub:
                beats = receive(sub, 1, timeout=DEADLINE if do_heartbeat else 1.5)
            assert [beat.subject for beat in beats] == ["/heartbeat/address_receiver"] * do_heartbeat
        finally:
            receiver.stop()

    def test_process_address_message(self):
        sent: list[str] = []

        class Collecting:
            send = staticmethod(sent.append)

        receiver = posttroll_ns.AddressReceiver(multicast_enabled=False)
        for text in (announcement().encode(), announcement().encode().encode()):
            receiver.process_address_message(text, Collecting)
        assert len(receiver.get("a")) == len(sent) == 1
        assert posttroll.Message.decode(sent[0]).data == {"URI": "tcp://h:1", "service": ["a"], "status": True}
        for broken in (b"\xff", "", "pytroll:/", text_message_of(5)):
            with pytest.raises(posttroll_ns.AnnouncementError):
                receiver.process_address_message(broken, Collecting)
        assert len(sent) == 1

    def test_what_is_new_is_published_when_its_sender_has_the_answer(self):
        order: list[str] = []

        class Telling(posttroll_ns._Server):
            def answer_all(self, answer: Any) -> None:
                super().answer_all(answer)
                order.append("answered")

        def publish(receiver: Any, entry: Any, is_new: bool, publisher: Any) -> None:
            order.append(f"published {entry.address}")

        with mock.patch("posttroll_ns._Server", Telling):
            with mock.patch("posttroll_ns.AddressReceiver._publish", publish):
                receiver = posttroll_ns.AddressReceiver(multicast_enabled=False).start()
                try:
                    answer = raw_request(config.get("broadcast_port"), announcement().encode().encode())
                    wait_for(lambda: len(order) == 2)
                finally:
                    receiver.stop()
        assert answer == [b"ok"]
        assert order == ["answered", "published tcp://h:1"]

    @pytest.mark.parametrize("taken", ["broadcast_port", "address_publish_port"])
    def test_a_port_in_use(self, taken):
        receiver = posttroll_ns.AddressReceiver(multicast_enabled=False)
        with socket.socket() as other:
            other.bind(("", config.get(taken)))
            other.listen()
            with pytest.raises(zmq.ZMQError, match=f"in use.*{config.get(taken)}"):
                receiver.start()
            assert not receiver.is_running()
        receiver.start()
        receiver.stop()


def text_message_of(data: Any) -> str:
    """Return a message whose data are no announcement."""
    return posttroll.Message("/address/name", "info", data).encode()


# ======================================================================================================================
# posttroll_ns.py, 3. Answering lookups
# ======================================================================================================================


@contextlib.contextmanager
def in_nameserver_thread(server: Any) -> Iterator[None]:
    """Run a nameserver in a thread, which ends with it."""
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"when_ready": ready.set})
    thread.start()
    try:
        assert ready.wait(DEADLINE)
        yield
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


class KnownAddresses:
    """What a `NameServer` asks, with fixed answers."""

    def __init__(self, **services: Any) -> None:
        self.services = services

    def get(self, name: str = "") -> list[dict[str, Any]]:
        return self.services.get(name, [])


class TestNameServer:
    def test_it_uses_only_what_the_library_has_for_others(self):
        nodes = [node for node in ast.walk(ast.parse(NAMESERVER.read_text())) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "posttroll"}
        assert len(used) > 10
        assert [name for name in used if name.startswith("_")] == ["__version__"]

    def test_get_active_address(self):
        known = KnownAddresses(a=[{"URI": "tcp://h:1"}])
        message = posttroll_ns.get_active_address("a", known)
        assert (message.subject, message.type, message.version) == ("/oper/ns", "info", "v1.2")
        assert message.data == [{"URI": "tcp://h:1"}]
        nothing = posttroll_ns.get_active_address("b", known, "v1.01")
        assert (nothing.data, nothing.version) == ("", "v1.01")

    def test_own_address_receiver_and_address(self):
        port = free_port()
        server = posttroll_ns.NameServer()
        ready = threading.Event()
        thread = threading.Thread(
            target=server.run,
            args=(KnownAddresses(a=[{"URI": "tcp://h:1"}]), f"tcp://127.0.0.1:{port}"),
            kwargs={"when_ready": ready.set},
        )
        thread.start()
        assert ready.wait(DEADLINE)
        assert posttroll.get_pub_address("a", DEADLINE, f"127.0.0.1:{port}") == [{"URI": "tcp://h:1"}]
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()

    def test_many_who_ask_for_the_same_get_one_answer_until_something_changes(self):
        """As all who follow everything do when a nameserver starts again; and the answer may be large."""
        made = mock.Mock(wraps=posttroll_ns.get_active_address)
        long = mock.patch.object(posttroll_ns._Answers, "SECONDS", 1e9)
        with (
            long,
            mock.patch("posttroll_ns.get_active_address", made),
            nameserver(),
            contextlib.ExitStack() as publishers,
        ):

            def found() -> list[str]:
                return sorted(entry["name"] for entry in posttroll.get_pub_addresses([""], DEADLINE))

            for name in ("a", "b"):
                publisher = publishers.enter_context(posttroll.Publish(name, nameservers=["localhost"]))
                wait_for(lambda publisher=publisher: publisher.name in found())
            made.reset_mock()
            assert [found() for _ in range(20)] == [["a", "b"]] * 20
            assert made.call_count <= 1
            publisher.stop()
            wait_for(lambda: found() == ["a"])

    def test_the_times_in_an_answer_are_of_this_second(self):
        answers, receiver = posttroll_ns._Answers(), mock.Mock(changes=1)
        receiver.get.side_effect = lambda service: [{"URI": service, "n": receiver.get.call_count}]
        with freeze_time() as clock:
            first = answers.get("a", receiver, "v1.2")
            assert answers.get("a", receiver, "v1.2") == first
            assert answers.get("b", receiver, "v1.2") != first
            assert answers.get("a", receiver, "v1.01") != first
            clock.tick(answers.SECONDS)
            assert answers.get("a", receiver, "v1.2") != first
            others = KnownAddresses(a=[])
            assert answers.get("a", others, "v1.2") != first
            others.services["a"] = [{"URI": "tcp://h:1"}]
            assert b"tcp://h:1" in answers.get("a", others, "v1.2")

    def test_start_stop_and_start_again(self):
        server = posttroll_ns.NameServer(multicast_enabled=False)
        for _ in range(3):
            ready = threading.Event()
            thread = threading.Thread(target=server.run, kwargs={"when_ready": ready.set})
            thread.start()
            assert ready.wait(DEADLINE)
            assert posttroll.get_pub_address("a", DEADLINE) == []
            server.stop()
            server.stop()
            thread.join(DEADLINE)
            assert not thread.is_alive()

    def test_a_stop_that_comes_before_the_run_ends_it_at_once(self):
        """As that of a signal that comes early; the next run is not concerned."""
        server = posttroll_ns.NameServer(multicast_enabled=False)
        server.stop()
        server.run()
        with in_nameserver_thread(server):
            assert posttroll.get_pub_address("a", DEADLINE) == []

    @pytest.mark.parametrize("version", ["v1.01", "v1.2"])
    def test_an_answer_has_the_version_of_its_request(self, version):
        with nameserver():
            request = posttroll.Message("/oper/ns", "request", {"service": ""}, version=version)
            [answer] = raw_request(config.get("nameserver_port"), request.encode().encode())
            assert posttroll.Message.decode(answer).version == version

    @pytest.mark.parametrize(
        ("multicast", "taken"),
        [
            (False, "nameserver_port"),
            (False, "broadcast_port"),
            (False, "address_publish_port"),
            (True, "nameserver_port"),
            (True, "address_publish_port"),
        ],
    )
    def test_a_port_in_use(self, multicast, taken):
        """An exception that names it; no thread and no socket is left (the fixture looks)."""
        with socket.socket() as other:
            other.bind(("", config.get(taken)))
            other.listen()
            with pytest.raises(zmq.ZMQError, match=f"in use.*{config.get(taken)}"):
                posttroll_ns.NameServer(multicast_enabled=multicast).run()

    def test_max_age_as_a_time_difference(self):
        with nameserver(max_age=dt.timedelta(seconds=0.2)):
            raw_request(config.get("broadcast_port"), announcement().encode().encode())
            wait_for(lambda: posttroll.get_pub_address("a") == [])


# ======================================================================================================================
# posttroll_ns.py, 4. and 5. Daemon and command line
# ======================================================================================================================


class TestNameserverCommand:
    def test_help(self):
        status, out, _ = run_here("-h", main=posttroll_ns.main)
        assert status == 0
        for text in ("-d {start,stop,status,restart}", "--daemon", "-l", "--log", "-v", "--verbose", "--no-multicast"):
            assert text in out
        assert "-L" in out
        assert "--local-only" in out

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("arguments", [[], ["--no-multicast"], ["-L", "-v"]])
    def test_a_signal_ends_it(self, number, arguments):
        with nameserver_process(*arguments) as running:
            assert posttroll.get_pub_address("a", DEADLINE) == []
            running.send_signal(number)
            status, _, err = finish(running)
            assert (status, err) == (0, "")

    def test_as_a_subcommand(self):
        with process(sys.executable, "-u", LIBRARY, "nameserver", "--no-multicast") as running:
            await_line(running, "answers on port")
            running.terminate()
            assert finish(running)[0] == 0

    @pytest.mark.parametrize("taken", ["nameserver_port", "broadcast_port", "address_publish_port"])
    def test_a_port_in_use_is_one_clear_line(self, taken):
        with socket.socket() as other:
            other.bind(("", config.get(taken)))
            other.listen()
            with process(sys.executable, NAMESERVER, "--no-multicast") as running:
                status, out, err = finish(running)
        assert status == 1
        [line] = err.splitlines()
        assert re.search(f"in use.*{config.get(taken)}", line)
        assert "Traceback" not in out

    @pytest.mark.parametrize(
        ("name", "value"),
        [("NAMESERVER_PORT", "often"), ("MC_GROUP", "10.0.0.1"), ("MAX_SERVICES", "1.5"), ("BACKEND", "pigeon")],
    )
    def test_a_wrong_setting_is_one_clear_line(self, name, value):
        with process(sys.executable, NAMESERVER, env={**os.environ, "POSTTROLL_" + name: value}) as running:
            status, out, err = finish(running)
        assert status == 1
        [line] = err.splitlines()
        assert value in line
        assert "Traceback" not in out

    def test_names_cannot_give_orders_to_the_terminal(self):
        with nameserver_process("--no-multicast") as running, zmq.Context() as context, context.socket(zmq.REQ) as sock:
            sock.connect(f"tcp://127.0.0.1:{config.get('broadcast_port')}")
            sock.send(announcement(name="\x1b]0;owned\x07").encode().encode())
            assert sock.recv() == b"ok"
            assert "New publisher \\u001b]0;owned\\u0007 at tcp://h:1" in await_line(running, "owned")

    def test_verbose(self):
        with nameserver_process("--no-multicast", "-v") as running:
            running.terminate()
            assert "[DEBUG: " in running.stdout.read()

    def test_a_log_file(self, tmp_path):
        log = tmp_path / "nameserver.log"
        with process(sys.executable, NAMESERVER, "--no-multicast", "-l", log) as running:
            wait_for(lambda: log.exists() and "answers on port" in log.read_text())
            running.terminate()
            assert finish(running) == (0, "", "")
        assert re.search(r"^\[INFO: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d : nameserver\] ", log.read_text(), re.MULTILINE)

    def test_the_log_is_rotated_at_midnight_and_7_are_kept(self, tmp_path):
        root = logging.getLogger()
        before, level = list(root.handlers), root.level
        try:
            options = argparse.Namespace(log=str(tmp_path / "log"), verbose=False)
            assert posttroll_ns.setup_logging(options).name == "nameserver"
            [handler] = [handler for handler in root.handlers if handler not in before]
            assert isinstance(handler, logging.handlers.TimedRotatingFileHandler)
            assert (handler.when, handler.backupCount) == ("MIDNIGHT", 7)
            assert root.level == logging.INFO
        finally:
            root.setLevel(level)
            for handler in [handler for handler in root.handlers if handler not in before]:
                root.removeHandler(handler)
                handler.close()

    def test_the_log_goes_on_where_it_cannot_be_rotated(self, tmp_path, monkeypatch):
        """The file may have been made by root for a user who may not write to its directory."""

        def refuse(*_: Any) -> None:
            raise PermissionError(errno.EACCES, "x")

        monkeypatch.setattr(os, "rename", refuse)
        monkeypatch.setattr(os, "replace", refuse)
        with contextlib.closing(posttroll.log_handler(str(tmp_path / "log"))) as handler:
            for text in ("first", "second"):
                handler.rolloverAt = 0  # it is midnight
                handler.handle(log_record(text))
                assert handler.rolloverAt > 0
        assert (tmp_path / "log").read_text() == "first\nsecond\n"

    def test_a_log_file_that_cannot_be_written(self, tmp_path):
        with process(sys.executable, NAMESERVER, "-l", tmp_path / "no" / "directory") as running:
            status, _, err = finish(running)
        assert status == 1
        assert "cannot write the log" in err
        assert len(err.splitlines()) == 1

    def test_local_only(self):
        """From this host, it answers as always; others are tried from a network namespace, see below."""
        with nameserver_process("--no-multicast", "--local-only"):
            with posttroll.Publish("a", nameservers=["localhost"]):
                wait_for(lambda: posttroll.get_pub_address("a"))

    def test_it_tells_systemd_that_it_is_ready(self, tmp_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(str(tmp_path / "notify"))
            systemd.settimeout(DEADLINE)
            env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
            with process(sys.executable, NAMESERVER, "--no-multicast", env=env):
                assert systemd.recv(100) == b"READY=1"
                assert posttroll.get_pub_address("a", DEADLINE) == []

    @pytest.mark.parametrize("case", ["terminal", "log", "nohup"])
    def test_sighup_in_the_foreground(self, case, tmp_path):
        """It ends with its terminal, in order; with a log file it opens that again, and nohup is obeyed."""
        log = tmp_path / "nameserver.log"
        words = ["-l", log] if case == "log" else []
        ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)} if case == "nohup" else {}
        with process(sys.executable, "-u", NAMESERVER, "--no-multicast", *words, **ignore) as running:
            if case == "log":
                wait_for(lambda: log.exists() and "answers on port" in log.read_text())
                log.unlink()
            else:
                await_line(running, "answers on port")
            running.send_signal(signal.SIGHUP)
            if case == "terminal":
                status, out, err = finish(running)
                assert (status, err) == (0, "")
                assert "The nameserver has ended" in out
                return
            if case == "log":
                wait_for(lambda: log.exists() and "opened again" in log.read_text())
            assert posttroll.get_pub_address("a", DEADLINE) == []
            running.terminate()
            assert finish(running)[::2] == (0, "")

    @pytest.mark.parametrize("kind", ["gone", "nobody listens", "not a socket", "abstract", "too long"])
    def test_a_stale_notification_socket_is_logged(self, kind, tmp_path):
        path = str(tmp_path / "notify")
        if kind == "nobody listens":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
                systemd.bind(path)
        elif kind == "not a socket":
            Path(path).write_text("")
        elif kind == "abstract":
            path = f"@posttroll-test-{os.getpid()}"
        elif kind == "too long":
            path += "x" * 200
        with nameserver_process("--no-multicast", env={**os.environ, "NOTIFY_SOCKET": path}) as running:
            assert posttroll.get_pub_address("a", DEADLINE) == []
            running.terminate()
            out = running.stdout.read()
            status, _, err = finish(running)
        assert (status, err) == (0, "")
        assert f"Cannot tell systemd at {path} that it is ready" in out


LOGS_NOWHERE = "nameserver: it logs nowhere; -l FILE gives it a log\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no daemons here")
class TestDaemon:
    @pytest.fixture
    def control(self, tmp_path):
        """Give what runs ``nameserver -d COMMAND``; no daemon runs at the end."""
        pid_file = tmp_path / "nameserver.pid"

        def control(command: str, *arguments: str) -> tuple[int, str, str]:
            words = ["--no-multicast", "--pid-file", pid_file, "-d", command, *arguments]
            if command in ("stop", "status"):
                return run_here(*words, main=posttroll_ns.main)
            with process(sys.executable, NAMESERVER, *words) as running:
                return finish(running)

        control.pid_file = pid_file
        control.pid = lambda: int(pid_file.read_text().splitlines()[0])
        yield control
        assert control("stop")[0] == 0

    def test_start_status_stop(self, control):
        assert control("status") == (3, "nameserver: not running\n", "")
        assert control("start") == (0, "", LOGS_NOWHERE)
        assert posttroll.get_pub_address("a", DEADLINE) == []  # when start has ended, it answers
        pid = control.pid()
        assert control("status") == (0, f"nameserver: running (process {pid})\n", "")
        assert control("stop") == (0, "", "")
        with pytest.raises(ProcessLookupError):
            wait_for(lambda: os.kill(pid, 0))
        assert control("status")[0] == 3
        assert not control.pid_file.exists()

    def test_a_second_start_is_refused(self, control):
        control("start")
        pid = control.pid()
        status, out, err = control("start")
        assert (status, out, err) == (1, "", f"nameserver: already running (process {pid})\n")
        assert control.pid() == pid

    def test_restart(self, control):
        assert control("restart")[0] == 0  # from nothing
        first = control.pid()
        assert control("restart") == (0, "", LOGS_NOWHERE)
        assert control.pid() != first
        assert posttroll.get_pub_address("a", DEADLINE) == []

    def test_a_restart_while_a_reader_of_news_does_not_read(self, control):
        """It may have gone with its host; what it has not read keeps no nameserver from ending."""
        assert control("start")[0] == 0
        with zmq.Context() as context, context.socket(zmq.SUB) as reader, context.socket(zmq.REQ) as sock:
            reader.rcvhwm = 1
            reader.setsockopt(zmq.RCVBUF, 4096)
            reader.subscribe(b"")
            reader.connect(f"tcp://127.0.0.1:{config.get('address_publish_port')}")
            sock.connect(f"tcp://127.0.0.1:{config.get('broadcast_port')}")
            assert reader.poll(0) == 0

            def register(number: int) -> None:
                sock.send(announcement(f"tcp://h:{number}", name="x" * 500).encode().encode())
                assert sock.recv() == b"ok"

            numbers = itertools.count(1)
            wait_for(lambda: register(next(numbers)) or reader.poll(0))  # it hears, but does not take it
            for _ in range(300):
                register(next(numbers))
            assert control("restart") == (0, "", LOGS_NOWHERE)
        assert posttroll.get_pub_address("a", DEADLINE) == []

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_started_without_standard_descriptors(self, control, closed):
        """Its pid file must not get one of their numbers, which would cost its lock."""
        words = [sys.executable, NAMESERVER, "--no-multicast", "--pid-file", control.pid_file, "-d", "start"]
        with process("sh", "-c", f'exec "$0" "$@" {closed}', *words) as running:
            assert finish(running)[0] == 0
        assert control("status") == (0, f"nameserver: running (process {control.pid()})\n", "")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this needs /dev/full")
    def test_a_full_disk_at_the_start_is_told_and_does_not_make_it_a_failure(self, control):
        status, out, err = control("start", "-l", "/dev/full")
        assert (status, out) == (0, "")
        assert "No space left on device" in err
        assert "\0" not in err
        assert control("status")[0] == 0

    def test_a_full_disk_for_the_pid_file(self, control):
        words = [sys.executable, NAMESERVER, "--no-multicast", "--pid-file", control.pid_file, "-d", "start"]
        with process("sh", "-c", 'ulimit -f 0; exec "$0" "$@"', *words) as running:
            status, out, err = finish(running)
        assert (status, out) == (1, "")
        assert "nameserver: cannot write the pid file: " in err
        assert "File too large" in err
        assert control("status")[0] == 3

    def test_a_restart_while_the_last_one_takes_leave(self, control):
        """It has no pid file any more when nothing is heard of it: the next one can have the lock of its own."""
        code = """
import os, sys, time, posttroll_ns
def slow(function):
    return lambda *args: (function(*args), time.sleep(0.3))
os.unlink, os.ftruncate = slow(os.unlink), slow(os.ftruncate)
sys.exit(posttroll_ns.main(sys.argv[1:]))
"""
        with python(code, "--no-multicast", "--pid-file", control.pid_file, "-d", "start") as running:
            assert finish(running) == (0, "", LOGS_NOWHERE)
        assert control("restart") == (0, "", LOGS_NOWHERE)
        assert posttroll.get_pub_address("a", DEADLINE) == []

    def test_after_a_crash_its_pid_file_is_no_trouble(self, control):
        control("start")
        pid = control.pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: control("status")[0] == 3)
        assert control.pid_file.exists()
        assert control("start") == (0, "", LOGS_NOWHERE)
        assert control.pid() != pid

    def test_the_pid_of_another_process_in_a_stale_file(self, control):
        """It is not taken for the daemon, and above all not killed."""
        with python("import time; print('up', flush=True); time.sleep(100)") as other:
            await_line(other, "up")
            control.pid_file.write_text(f"{other.pid}\n")
            assert control("status")[0] == 3
            assert control("stop")[0] == 0
            assert control("start")[0] == 0
            assert control.pid() != other.pid
            assert control("restart")[0] == 0
            assert control("stop")[0] == 0
            assert other.poll() is None

    @pytest.mark.parametrize("junk", ["", "junk", "-1", "0", "99999999999999999999"])
    def test_junk_in_the_pid_file(self, control, junk):
        control.pid_file.write_text(junk)
        assert control("status")[0] == 3
        assert control("stop")[0] == 0
        assert control("start")[0] == 0

    def test_a_port_in_use_is_told_by_start(self, control):
        with socket.socket() as other:
            other.bind(("", config.get("nameserver_port")))
            other.listen()
            status, out, err = control("start")
        assert (status, out) == (1, "")
        assert re.fullmatch(rf"nameserver: .*in use.*{config.get('nameserver_port')}.*\n", err)
        assert control("status")[0] == 3

    def test_its_log(self, control, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # a relative path is meant from where it is started
        control("start", "-l", "daemon.log")
        assert "answers on port" in (tmp_path / "daemon.log").read_text()

    def test_a_pid_file_that_cannot_be_written(self, tmp_path):
        call = [sys.executable, NAMESERVER, "-d", "start", "--pid-file", tmp_path / "no" / "directory"]
        with process(*call) as running:
            status, _, err = finish(running)
        assert status == 1
        assert "Traceback" not in err
        assert "no/directory" in err

    def test_it_lets_go_of_where_it_was_started(self, control, tmp_path, monkeypatch):
        """Of the directory, the session, the terminal, and of what its starter had open."""
        monkeypatch.chdir(tmp_path)
        assert control("start", "-l", "daemon.log") == (0, "", "")
        proc = Path(f"/proc/{control.pid()}")
        if not proc.exists():
            pytest.skip("this needs /proc")
        assert os.readlink(proc / "cwd") == "/"
        assert os.getsid(control.pid()) not in (os.getsid(0), control.pid())  # it can get no terminal again
        assert {os.readlink(proc / "fd" / str(number)) for number in range(3)} == {os.devnull}

    def test_its_keys(self, control, tmp_path, monkeypatch):
        """Relative paths are meant from where it is started; a restart from elsewhere that finds none stops nothing."""
        posttroll.write_key_pair("server", tmp_path)
        (tmp_path / "clients").mkdir()
        monkeypatch.setenv("POSTTROLL_BACKEND", "secure_zmq")
        monkeypatch.setenv("POSTTROLL_SERVER_SECRET_KEY_FILE", "server.key_secret")
        monkeypatch.setenv("POSTTROLL_CLIENTS_PUBLIC_KEYS_DIRECTORY", "clients")
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", os.environ["POSTTROLL_NAMESERVER_PORT"])
        monkeypatch.chdir(tmp_path)
        assert control("start") == (0, "", LOGS_NOWHERE)
        assert control("restart") == (0, "", LOGS_NOWHERE)
        pid = control.pid()
        monkeypatch.chdir("/")
        status, _, err = control("restart")
        assert (status, err.count("\n"), "server.key_secret" in err) == (1, 1, True), err
        assert control("status") == (0, f"nameserver: running (process {pid})\n", "")

    def test_its_pid_file_stays_young(self, control):
        """What is old in /tmp is cleaned away on many systems."""
        code = """
import posttroll_ns, sys
posttroll_ns.NameServer.HOUR = 0.05
sys.exit(posttroll_ns.main(sys.argv[1:]))
"""
        with python(code, "--no-multicast", "--pid-file", control.pid_file, "-d", "start") as running:
            assert finish(running) == (0, "", LOGS_NOWHERE)
        for _ in range(2):
            os.utime(control.pid_file, (0, 0))
            wait_for(lambda: control.pid_file.stat().st_mtime and control.pid_file.stat().st_atime)

    def test_the_pid_file_does_not_depend_on_the_environment(self):
        """cron, ssh and a desktop have other variables; port and user make the difference."""
        here = {key: value for key, value in os.environ.items() if key not in ("XDG_RUNTIME_DIR", "TMPDIR", "HOME")}
        elsewhere = {**here, "XDG_RUNTIME_DIR": str(HERE), "TMPDIR": str(HERE / "benchmarks"), "HOME": str(HERE)}

        def control(command: str, env: dict[str, str], *words: str) -> int:
            with process(sys.executable, NAMESERVER, "--no-multicast", "-d", command, *words, env=env) as running:
                return finish(running)[0]

        assert control("start", elsewhere) == 0
        try:
            assert control("status", here) == 0
            assert control("status", here, "--set", f"nameserver_port={free_port()}") == 3
            assert control("start", here) == 1
        finally:
            assert control("stop", here) == 0
        assert control("status", elsewhere) == 3
        assert control("start", here) == 0
        assert control("stop", elsewhere) == 0
        assert control("status", here) == 3

    @pytest.mark.parametrize("crashed", [False, True])
    def test_a_restart_keeps_the_options(self, tmp_path, monkeypatch, crashed):
        """Those of the daemon that runs, or has crashed; what is given with it comes in addition."""
        monkeypatch.chdir(tmp_path)
        pid_file = tmp_path / "nameserver.pid"
        log, other = tmp_path / "daemon.log", tmp_path / "other.log"

        def control(command: str, *words: Any) -> tuple[int, str, str]:
            if command in ("stop", "status"):
                return run_here("--pid-file", pid_file, "-d", command, *words, main=posttroll_ns.main)
            call = (sys.executable, NAMESERVER, "--pid-file", pid_file, "-d", command, *words)
            with process(*call, cwd=tmp_path if command == "start" else "/") as running:
                return finish(running)

        def registers() -> bool:
            """Whether publishers can register by request, which needs --no-multicast."""
            return raw_request(config.get("broadcast_port"), b"", timeout=1) is not None

        try:
            arguments = ("--no-multicast", "-v", "-l", "daemon.log", "--set", "max_services=7")
            assert control("start", *arguments) == (0, "", "")
            assert registers()
            if crashed:
                os.kill(int(pid_file.read_text().splitlines()[0]), signal.SIGKILL)
                wait_for(lambda: control("status")[0] == 3)
            written = log.read_text().count("answers on port")
            assert control("restart") == (0, "", "nameserver: not running\n" if crashed else "")
            assert log.read_text().count("answers on port") == written + 1
            assert registers()
            assert control("restart", "-l", other) == (0, "", "")
            assert log.read_text().count("answers on port") == written + 1
            assert "[DEBUG" in other.read_text()
            assert "answers on port" in other.read_text()
            assert registers()
            assert "('max_services', 7)" in pid_file.read_text()
            assert control("stop") == (0, "", "")
            assert control("restart") == (
                0,
                "",
                "nameserver: not running\n" + LOGS_NOWHERE,
            )  # from nothing, with nothing
            assert not registers()
        finally:
            assert control("stop")[0] == 0

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["-l", "/nonesuch/log"], "/nonesuch/log"),
            (["--set", "backend=secure_zmq"], "server_secret_key_file"),
            (["--set", "max_services=some"], "max_services is 'some'"),
            (["--set", "address_publish_port=some"], "address_publish_port is 'some'"),
        ],
    )
    def test_a_restart_that_cannot_succeed_stops_nothing(self, control, words, reason):
        control("start")
        pid = control.pid()
        status, _, err = control("restart", *words)
        assert (status, err.count("\n"), reason in err) == (1, 1, True), err
        assert control("status") == (0, f"nameserver: running (process {pid})\n", "")

    def test_a_restart_after_one_that_failed_keeps_the_options(self, control, tmp_path):
        log, port = tmp_path / "daemon.log", config.get("nameserver_port")
        assert control("start", "-l", log) == (0, "", "")
        with socket.socket() as other:
            other.bind(("", free_port()))
            other.listen()
            status, _, err = control("restart", "--set", f"nameserver_port={other.getsockname()[1]}")
        assert (status, "in use" in err) == (1, True)
        assert control("status")[0] == 3
        assert control("restart", "--set", f"nameserver_port={port}") == (0, "", "nameserver: not running\n")
        assert log.read_text().count("answers on port") == 2

    def test_what_it_logs_without_a_log_file_is_said(self, control):
        status, out, err = control("start")
        assert (status, out, err) == (0, "", LOGS_NOWHERE)
        with socket.socket() as other, config.set(nameserver_port=free_port()):
            other.bind(("", config.get("nameserver_port")))
            other.listen()
            status, _, err = control("restart", "--set", f"nameserver_port={config.get('nameserver_port')}")
        assert status == 1
        assert LOGS_NOWHERE not in err  # it does not run

    def test_sighup_opens_the_log_again(self, control, tmp_path):
        """As after a rotation by others; where that fails, the old one goes on."""
        log = tmp_path / "logs" / "daemon.log"
        log.parent.mkdir()
        assert control("start", "-l", log) == (0, "", "")
        log.rename(log.with_suffix(".1"))
        os.kill(control.pid(), signal.SIGHUP)
        wait_for(lambda: log.exists() and "opened again" in log.read_text())
        assert posttroll.get_pub_address("a", DEADLINE) == []
        raw_request(config.get("nameserver_port"), b"broken")
        wait_for(lambda: "Broken request" in log.read_text())
        assert "Broken request" not in log.with_suffix(".1").read_text()
        log.parent.rename(tmp_path / "moved")
        os.kill(control.pid(), signal.SIGHUP)
        wait_for(lambda: "cannot be opened again" in (tmp_path / "moved" / "daemon.log").read_text())
        assert control("status")[0] == 0
        assert posttroll.get_pub_address("a", DEADLINE) == []

    def test_sighup_without_a_log_does_not_end_it(self, control):
        control("start")
        os.kill(control.pid(), signal.SIGHUP)
        assert posttroll.get_pub_address("a", DEADLINE) == []
        assert control("status")[0] == 0


class TestDemoAndKeys:
    def test_the_demo(self):
        with process(sys.executable, LIBRARY, "demo") as running:
            status, out, err = finish(running, 60)
        assert (status, err) == (0, "")
        lines = out.splitlines()
        # They are sent again and again: it may hear of the publisher between two of them.
        received = [line.split()[1].partition("/demo/")[2] for line in lines if "received" in line]
        assert sorted(received) == ["file", "list", "text"]
        assert lines[-1].startswith("All 3 messages arrived")

    def test_the_demo_fails_if_a_message_does_not_arrive(self, tmp_path):
        """Tried with a copy whose publisher keeps the last message for itself."""
        text = LIBRARY.read_text()
        for before, after in (
            ("_DEMO_SECONDS = 20", "_DEMO_SECONDS = 6"),
            ("    for message in _demo_messages():\n", "    for message in _demo_messages()[:-1]:\n"),
        ):
            assert text.count(before) == 1
            text = text.replace(before, after)
        (tmp_path / "posttroll.py").write_text(text)
        (tmp_path / "posttroll_ns.py").write_text(NAMESERVER.read_text())
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        with process(sys.executable, tmp_path / "posttroll.py", "demo", env=env) as running:
            status, out, err = finish(running, 60)
        assert status != 0
        assert "subscriber: 2 of 3 messages arrived" in err
        assert "The demo failed: the subscriber ended with status 1." in err
        assert "All 3" not in out

    def test_the_demo_fails_if_a_program_cannot_start(self):
        env = {**os.environ, "POSTTROLL_RECEIVE_HIGH_WATER_MARK": "much"}
        with process(sys.executable, LIBRARY, "demo", env=env) as running:
            status, _, err = finish(running, 60)
        assert status != 0
        assert "receive_high_water_mark" in err
        assert "The demo failed" in err

    @pytest.mark.parametrize("command", [["generate-keys"], None])
    def test_generating_keys(self, command, tmp_path):
        code = "import posttroll, sys; sys.exit(posttroll.generate_keys())"
        start = [LIBRARY, *command] if command else ["-c", code]
        with process(sys.executable, *start, "server", "-d", tmp_path) as running:
            assert finish(running)[0] == 0
        assert sorted(path.name for path in tmp_path.glob("server*")) == ["server.key", "server.key_secret"]
        assert (tmp_path / "server.key_secret").stat().st_mode & 0o777 == 0o600
        secret = (tmp_path / "server.key_secret").read_bytes()
        with process(sys.executable, *start, "server", "-d", tmp_path) as running:
            status, _, err = finish(running)
        assert status != 0
        assert "server.key" in err
        assert "Traceback" not in err
        assert (tmp_path / "server.key_secret").read_bytes() == secret

    def test_the_help_of_generate_keys(self):
        with python("import posttroll; posttroll.generate_keys()", "-h") as running:
            status, out, _ = finish(running)
        assert status == 0
        words = " ".join(out.split())
        assert "posttroll-generate-keys [-h] [-d DIRECTORY] name" in words or "[-d DIRECTORY]" in words
        assert "Create a public/secret key pair for the secure zmq backend." in words


# ======================================================================================================================
# Several hosts: network namespaces
# ======================================================================================================================


def ip(*words: Any) -> None:
    """Run the command ``ip``."""
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Host:
    """A network namespace, as good as another host on the same network."""

    def __init__(self, name: str, device: str, address: str) -> None:
        self.name, self.device, self.address = name, device, address

    def ip(self, *words: Any) -> None:
        ip("-n", self.name, *words)

    def connect(self) -> None:
        """Give it its address, and its route for multicast."""
        self.ip("addr", "add", f"{self.address}/24", "dev", self.device)
        self.ip("route", "replace", "default", "dev", self.device)

    def environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key != "POSTTROLL_MULTICAST_INTERFACE"}

    def run(self, *words: Any, **settings: str) -> Any:
        """Run a Python program on this host."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-u", *words]
        return process(*command, env={**self.environment(), **settings})

    def say(self, code: str, **settings: str) -> str:
        """Return what Python *code* prints on this host."""
        with self.run("-c", code, **settings) as running:
            status, out, err = finish(running)
        assert status == 0, err
        return out.strip()

    def ask(self, service: str, nameserver: str = "localhost") -> list[str]:
        """Return the addresses of a service, as a program on this host sees them."""
        code = (
            "import posttroll, sys\n"
            "print(*[entry['URI'] for entry in posttroll.get_pub_address(sys.argv[1], 5, sys.argv[2])])"
        )
        with self.run("-c", code, service, nameserver) as running:
            status, out, err = finish(running)
        assert status == 0, err
        return out.split()


def plug_in(hosts: Sequence[Host]) -> None:
    """Connect two hosts by a cable."""
    one, two = hosts
    one.ip("link", "add", one.device, "type", "veth", "peer", "name", two.device, "netns", two.name)
    for host in hosts:
        host.ip("link", "set", host.device, "up")


@pytest.fixture
def two_hosts():
    """Give two hosts on a network of their own; skipped where one may not make them."""
    suffix = f"{os.getpid() % 100000}{random.randrange(1000):03}"
    names, devices = [f"pt{letter}{suffix}" for letter in "ab"], [f"v{letter}{suffix}" for letter in "ab"]
    made: list[str] = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"It may not make network namespaces: {getattr(error, 'stderr', error)}")
            made.append(name)
        hosts = [Host(name, device, f"10.77.1.{n}") for n, (name, device) in enumerate(zip(names, devices), 1)]
        for host in hosts:
            host.ip("link", "set", "lo", "up")
        try:
            plug_in(hosts)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"It may not make network devices: {error.stderr}")
        yield hosts
    finally:
        for name in made:
            ip("netns", "del", name)


PUBLISHING = """
import posttroll, sys
names = sys.argv[2].split(",") if len(sys.argv) > 2 else None
with posttroll.Publish("a_service", broadcast_interval=0.1, nameservers=names) as pub:
    print("port", pub.port_number, flush=True)
    assert pub.wait_for_subscribers(1, float(sys.argv[1]))
    pub.send(posttroll.Message("/a", "info", "across the network"))
    sys.stdin.read()
"""
SUBSCRIBING = """
import posttroll, sys
with posttroll.Subscribe("a_service", addr_listener=True, timeout=0) as sub:
    print("up", flush=True)
    for message in sub.recv(timeout=30):
        print("got", message and message.data, flush=True)
        break
"""


@pytest.mark.network
class TestSeveralHosts:
    def test_discovery_by_multicast_crosses_hosts(self, two_hosts):
        one, two = two_hosts
        one.connect()
        two.connect()
        with (
            one.run(NAMESERVER) as server,
            one.run("-c", SUBSCRIBING) as subscriber,
            two.run("-c", PUBLISHING, "60") as pub,
        ):
            await_line(server, "answers on port")
            assert await_line(subscriber, "got") == "got across the network\n"
            port = await_line(pub, "port").split()[1]
            assert one.ask("a_service") == [f"tcp://10.77.1.2:{port}"]

    def test_registration_without_multicast_crosses_hosts(self, two_hosts):
        one, two = two_hosts
        one.connect()
        two.connect()
        with one.run(NAMESERVER, "--no-multicast") as server, two.run("-c", PUBLISHING, "60", "10.77.1.1") as pub:
            await_line(server, "answers on port")
            port = await_line(pub, "port").split()[1]
            wait_for(lambda: one.ask("a_service") == [f"tcp://10.77.1.2:{port}"])
            assert two.ask("a_service", "10.77.1.1") == [f"tcp://10.77.1.2:{port}"]

    def test_local_only_refuses_other_hosts(self, two_hosts):
        one, two = two_hosts
        one.connect()
        two.connect()
        code = "import posttroll\ntry: posttroll.get_pub_address('a', 1, '10.77.1.1')\nexcept TimeoutError: print('no')"
        with one.run(NAMESERVER, "--no-multicast", "-L") as server, two.run("-c", PUBLISHING, "60", "10.77.1.1"):
            await_line(server, "answers on port")
            with two.run("-c", code) as asking:
                assert finish(asking)[:2] == (0, "no\n")
            assert one.ask("a_service") == []

    def test_an_address_that_comes_and_changes_is_announced(self, two_hosts):
        """A publisher that starts before the network, with nothing but the loopback interface."""
        one, _ = two_hosts
        with one.run(NAMESERVER, "--no-multicast") as server, one.run("-c", PUBLISHING, "60", "localhost") as pub:
            await_line(server, "answers on port")
            port = await_line(pub, "port").split()[1]
            wait_for(lambda: [address for address in one.ask("a_service") if address.startswith("tcp://127.")])
            one.connect()
            wait_for(lambda: f"tcp://10.77.1.1:{port}" in one.ask("a_service"))
            one.ip("addr", "flush", "dev", one.device)
            one.address = "10.77.1.99"
            one.connect()
            wait_for(lambda: f"tcp://10.77.1.99:{port}" in one.ask("a_service"))

    def test_publisher_and_nameserver_that_start_before_the_network(self, two_hosts):
        """By multicast: both try again until they have a route."""
        one, two = two_hosts
        with one.run(NAMESERVER) as server, two.run("-c", PUBLISHING, "60") as pub:
            await_line(server, "answers on port")
            port = await_line(pub, "port").split()[1]
            assert one.ask("a_service") == []
            one.connect()
            two.connect()
            wait_for(lambda: one.ask("a_service") == [f"tcp://10.77.1.2:{port}"])

    def test_an_interface_that_goes_away_and_comes_back(self, two_hosts):
        """It has forgotten the multicast group, and no error tells the nameserver."""
        one, two = two_hosts
        one.connect()
        code = "import posttroll_ns; posttroll_ns._MulticastSource.RENEWAL = 0.2; posttroll_ns.main([])"
        with one.run("-c", code) as server:
            await_line(server, "answers on port")
            one.ip("link", "del", one.device)
            plug_in(two_hosts)
            one.connect()
            two.connect()
            with two.run("-c", PUBLISHING, "60") as pub:
                port = await_line(pub, "port").split()[1]
                wait_for(lambda: one.ask("a_service") == [f"tcp://10.77.1.2:{port}"])


@pytest.fixture
def two_networks(two_hosts):
    """Give two hosts with two cables: 10.77.1.0/24, with the default route, and 10.77.2.0/24, with that for multicast.

    The second is the reception card of the first host: what is sent there, nobody hears.
    """
    one, two = two_hosts
    device = f"c{one.device}"
    one.ip("link", "add", device, "type", "veth", "peer", "name", device, "netns", two.name)
    for host in two_hosts:
        host.connect()
        host.ip("addr", "add", f"10.77.2.{host.address[-1]}/24", "dev", device)
        host.ip("link", "set", device, "up")
    one.ip("route", "add", "224.0.0.0/4", "dev", device)
    return two_hosts


@pytest.mark.network
class TestSeveralNetworks:
    def test_to_each_nameserver_the_address_of_the_interface_that_leads_there(self, two_networks):
        """One is on this host, two are on another one, each on a network of its own; a name leads to one of them."""
        one, two = two_networks
        names = ("NAMESERVER_PORT", "ADDRESS_PUBLISH_PORT", "BROADCAST_PORT")
        second = {f"POSTTROLL_{name}": str(free_port()) for name in names}
        with (
            one.run(NAMESERVER, "--no-multicast") as local,
            two.run(NAMESERVER, "--no-multicast") as first,
            two.run(NAMESERVER, "--no-multicast", **second) as other,
        ):
            for server in (local, first, other):
                await_line(server, "answers on port")
            other_host = f"10.77.2.2:{second['POSTTROLL_BROADCAST_PORT']}"
            with one.run("-c", PUBLISHING, "60", f"localhost,10.77.1.2,{other_host}") as pub:
                port = await_line(pub, "port").split()[1]
                main, card = [f"tcp://10.77.1.1:{port}"], [f"tcp://10.77.2.1:{port}"]
                wait_for(lambda: one.ask("a_service") == main)
                wait_for(lambda: one.ask("a_service", "10.77.1.2") == main)
                asked = f"10.77.2.2:{second['POSTTROLL_NAMESERVER_PORT']}"
                wait_for(lambda: one.ask("a_service", asked) == card)
                assert two.ask("a_service", asked) == card

    def test_a_goodbye_ends_what_was_announced_there(self, two_networks):
        one, two = two_networks
        code = """
import posttroll, time
with posttroll.Publish("a_service", nameservers=["10.77.2.2"]):
    while not posttroll.get_pub_address("a_service", nameserver="10.77.2.2"):
        time.sleep(0.01)
print(posttroll.get_pub_address("a_service", nameserver="10.77.2.2"))
"""
        with two.run(NAMESERVER, "--no-multicast") as server:
            await_line(server, "answers on port")
            assert one.say(code) == "[]"

    def test_multicast_that_leads_to_a_reception_card(self, two_networks):
        """Its address is announced only there; ``multicast_interface`` names another one."""
        one, two = two_networks
        assert one.say("import posttroll; print(posttroll.get_own_ip())") == "10.77.1.1"
        to_lan = {"POSTTROLL_MULTICAST_INTERFACE": one.device}
        with two.run(NAMESERVER, POSTTROLL_MULTICAST_INTERFACE="10.77.1.2") as lan:
            await_line(lan, "answers on port")
            with one.run("-c", PUBLISHING, "60", **to_lan) as pub:
                port = await_line(pub, "port").split()[1]
                wait_for(lambda: two.ask("a_service") == [f"tcp://10.77.1.1:{port}"])
        with two.run(NAMESERVER, POSTTROLL_MULTICAST_INTERFACE="10.77.2.2") as card:
            await_line(card, "answers on port")
            with one.run("-c", PUBLISHING, "60") as pub:
                port = await_line(pub, "port").split()[1]
                wait_for(lambda: two.ask("a_service") == [f"tcp://10.77.2.1:{port}"])

    @pytest.mark.parametrize(
        ("announced", "uri"),
        [
            ("some.name", "tcp://some.name:%s"),
            ("192.0.2.7:9999", "tcp://192.0.2.7:9999"),
            ("2001:db8::1", "tcp://[2001:db8::1]:%s"),
            ("[2001:db8::1]:7", "tcp://[2001:db8::1]:7"),
        ],
    )
    @pytest.mark.parametrize("multicast", [True, False])
    def test_an_announced_address_overrules_all(self, two_networks, announced, uri, multicast):
        """A name is passed on: nobody resolves it but who connects to it."""
        one, two = two_networks
        settings = {"POSTTROLL_ANNOUNCED_ADDRESS": announced, "POSTTROLL_MULTICAST_INTERFACE": one.device}
        with two.run(NAMESERVER, *([] if multicast else ["--no-multicast"])) as server:
            await_line(server, "answers on port")
            with one.run("-c", PUBLISHING, "60", *([] if multicast else ["10.77.2.2"]), **settings) as pub:
                port = await_line(pub, "port").split()[1]
                expected = uri % port if "%" in uri else uri
                wait_for(lambda: two.ask("a_service") == [expected])

    @pytest.mark.parametrize("announced", ["two words", "a:b:c", "tcp://", "[some.name]", ""])
    def test_what_cannot_be_announced(self, announced):
        with config.set(announced_address=announced):
            if announced:
                with pytest.raises(ValueError, match="Cannot connect to"):
                    posttroll.NoisyPublisher("a_service").start()
            else:
                posttroll.AddressBroadcaster("a_service", "tcp://*:9000", 1)


@pytest.fixture
def two_ipv6_hosts(two_hosts):
    """Give two hosts that have no IPv4 address, not even 127.0.0.1; and names for them."""
    directories = [Path("/etc/netns") / host.name for host in two_hosts]
    try:
        for number, (host, directory) in enumerate(zip(two_hosts, directories), 1):
            host.address = f"2001:db8:77::{number}"
            host.ip("addr", "del", "127.0.0.1/8", "dev", "lo")
            host.ip("addr", "add", f"{host.address}/64", "dev", host.device, "nodad")
            host.ip("route", "add", "default", "dev", host.device)
            directory.mkdir(parents=True)
            (directory / "hosts").write_text("::1 localhost\n2001:db8:77::1 one\n10.9.9.9 two\n2001:db8:77::2 two\n")
        yield two_hosts
    finally:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


IPV6_GROUP = f"ff15::{chance.randrange(1, 65536):x}:7"


@pytest.mark.network
class TestIPv6:
    @pytest.mark.parametrize("nameserver", ["2001:db8:77::1", "one", "[2001:DB8:77:0::1]"])
    def test_registration_lookup_news_and_messages(self, two_ipv6_hosts, nameserver):
        """With a subscriber on the nameserver's host and one on that of the publisher, by number and by name."""
        one, two = two_ipv6_hosts
        ask = {"POSTTROLL_NAMESERVER": nameserver}
        with (
            one.run(NAMESERVER, "--no-multicast") as server,
            one.run("-c", SUBSCRIBING) as local,
            two.run("-c", SUBSCRIBING, **ask) as remote,
        ):
            for running, line in ((server, "answers on port"), (local, "up"), (remote, "up")):
                await_line(running, line)
            with two.run("-c", PUBLISHING.replace("rs(1,", "rs(2,"), "60", nameserver) as pub:
                port = await_line(pub, "port").split()[1]
                for running in (local, remote):
                    assert await_line(running, "got") == "got across the network\n"
                assert one.ask("a_service") == [f"tcp://[2001:db8:77::2]:{port}"]
                assert two.ask("a_service", nameserver) == [f"tcp://[2001:db8:77::2]:{port}"]

    @pytest.mark.parametrize("interface", ["", "device", "address"])
    def test_by_multicast(self, two_ipv6_hosts, interface):
        one, two = two_ipv6_hosts
        group = [{"POSTTROLL_MC_GROUP": IPV6_GROUP} for _ in two_ipv6_hosts]
        for host, own in zip(two_ipv6_hosts, group):
            if interface:
                own["POSTTROLL_MULTICAST_INTERFACE"] = getattr(host, interface)
        with (
            one.run(NAMESERVER, **group[0]) as server,
            one.run("-c", SUBSCRIBING) as subscriber,
            two.run("-c", PUBLISHING, "60", **group[1]) as pub,
        ):
            await_line(server, "answers on port")
            assert await_line(subscriber, "got") == "got across the network\n"
            port = await_line(pub, "port").split()[1]
            assert one.ask("a_service") == [f"tcp://[2001:db8:77::2]:{port}"]

    def test_addresses_of_a_link(self, two_ipv6_hosts):
        """Without any other: both sides name the interface."""
        one, two = two_ipv6_hosts
        for host in two_ipv6_hosts:
            host.ip("addr", "flush", "dev", host.device)
        for host, address in ((one, "fe80::1"), (two, "fe80::2")):
            host.ip("addr", "add", f"{address}/64", "dev", host.device, "nodad")
        with one.run(NAMESERVER, "--no-multicast") as server:
            await_line(server, "answers on port")
            with two.run("-c", PUBLISHING, "60", f"fe80::1%{two.device}") as pub:
                port = await_line(pub, "port").split()[1]
                wait_for(lambda: one.ask("a_service") == [f"tcp://[fe80::2%{two.device}]:{port}"])
                code = f"import posttroll\nwith posttroll.Subscriber(['tcp://[fe80::2%{one.device}]:{port}']) as sub:\n"
                assert one.say(code + "    print(next(sub.recv(15)).data)") == "across the network"

    def test_fixed_addresses_and_names_of_hosts(self, two_ipv6_hosts):
        """``localhost`` is what there is of it; of a host with two numbers, that which can be reached."""
        code = """
import posttroll, sys
for host, seen in (("*", "localhost"), ("localhost", "localhost"), ("[::1]", "[::1]"), ("[2001:db8:77::2]", "two")):
    pub = posttroll.Publisher(f"tcp://{host}:0").start()
    with posttroll.Subscriber([f"tcp://{seen}:{pub.port_number}"]) as sub:
        while not pub.subscriber_count:
            next(sub.recv(0.01))  # it connects by name while it receives
        pub.send(posttroll.Message("/a", "info", host))
        print(next(sub.recv(15)).data)
    pub.stop()
"""
        _, two = two_ipv6_hosts
        assert two.say(code).split() == ["*", "localhost", "[::1]", "[2001:db8:77::2]"]

    @pytest.mark.parametrize(
        ("entries", "is_in"), [("2001:db8:77::/64", True), ("two", True), ("2001:db8:78::/64 10.0.0.0/8", False)]
    )
    def test_access(self, two_ipv6_hosts, entries, is_in):
        """Of the nameserver, and of registrations; the host itself is always let in."""
        one, two = two_ipv6_hosts
        settings = {"POSTTROLL_AUTHORIZED_CLIENT_ADDRESSES": entries}
        code = """
import posttroll
try:
    print(posttroll.get_pub_address("", 10 if IS_IN else 1, "one"))
except TimeoutError:
    print("refused")
""".replace("IS_IN", str(is_in))
        with one.run(NAMESERVER, "--no-multicast", **settings) as server:
            await_line(server, "answers on port")
            assert two.say(code) == ("[]" if is_in else "refused")
            assert one.say(code.replace("one", "2001:db8:77::1")) == "[]"

    def test_doctor_with_keys(self, two_ipv6_hosts, keys):
        """All of it, with CURVE."""
        one, _ = two_ipv6_hosts
        with one.run(NAMESERVER, "--no-multicast", POSTTROLL_BACKEND="secure_zmq") as server:
            await_line(server, "answers on port")
            doctor = one.run(LIBRARY, "doctor", "--no-multicast", POSTTROLL_BACKEND="secure_zmq")
            with doctor as running:
                status, out, err = finish(running)
            assert status == 0, out + err
            assert "own address: 2001:db8:77::1" in out

    def test_commands_for_this_host(self, two_ipv6_hosts):
        one, _ = two_ipv6_hosts
        with one.run(NAMESERVER, "--no-multicast") as server:
            await_line(server, "answers on port")
            with one.run(LIBRARY, "check", "--local") as running:
                status, out, err = finish(running)
            assert status == 0, out + err
            with one.run(LIBRARY, "exporter", "--port", "0") as running:
                assert "Metrics are at http://[::1]:" in running.stderr.readline()
                running.terminate()
                assert finish(running)[0] == 0

    def test_a_host_with_both_announces_ipv4(self, two_hosts):
        """And serves both, whoever comes; peers that know nothing else see what they have always seen."""
        one, two = two_hosts
        for host in two_hosts:
            host.connect()
            host.ip("addr", "add", f"2001:db8:77::{host.address[-1]}/64", "dev", host.device, "nodad")
        with one.run(NAMESERVER, "--no-multicast") as server:
            await_line(server, "answers on port")
            with two.run("-c", PUBLISHING, "60", "10.77.1.1") as pub:
                port = await_line(pub, "port").split()[1]
                wait_for(lambda: one.ask("a_service") == [f"tcp://10.77.1.2:{port}"])
                assert two.ask("a_service", "2001:db8:77::1") == [f"tcp://10.77.1.2:{port}"]
                code = f"import posttroll\nwith posttroll.Subscriber(['tcp://[2001:db8:77::2]:{port}']) as sub:\n"
                assert one.say(code + "    print(next(sub.recv(15)).data)") == "across the network"

    def test_a_host_without_ipv6(self, two_hosts):
        """Its kernel, or what it is locked into, refuses it."""
        code = """
import errno, socket, zmq
refused = {"number": 0}
bind, open_socket = zmq.Socket.bind, socket.socket
class Socket(socket.socket):
    def __init__(self, family=-1, *args, **kwargs):
        if family == socket.AF_INET6:
            raise OSError(errno.EPERM, "not permitted")
        super().__init__(family, *args, **kwargs)
def refusing(sock, address):
    if sock.get(zmq.IPV6):
        refused["number"] += 1
        raise zmq.ZMQError(errno.EPERM)
    return bind(sock, address)
socket.socket, zmq.Socket.bind = Socket, refusing
import posttroll
with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
    assert pub.wait_for_subscribers(1, 15)
print(refused["number"] > 0, posttroll.get_own_ip())
"""
        host, _ = two_hosts
        assert host.say(code) == "True 127.0.0.1"


# ======================================================================================================================
# Robustness: bad input, faults, ends, loss
#
# Fuzzing starts from a fixed seed.  FUZZ=20 in the environment gives twenty times as many inputs.
# ======================================================================================================================

FUZZ = int(os.environ.get("FUZZ", "1"))

ANNOUNCEMENT = (
    'pytroll://address/pub info me@host 2026-11-23T12:00:00.123456 v1.01 application/json {"URI": "%s", '
    '"service": ["pub", "alias"], "supported_message_version": "v1.2", "backend": "unsecure_zmq"}'
)
LOOKUP = 'pytroll://oper/ns request me@host 2026-11-23T12:00:00 v1.01 application/json {"service": "%s"}'
DEEP = "[" * 100000

SPLICES = (
    b"",
    b"\x00",
    b"\n",
    b"\xff\xfe\x80",
    b" ",
    b"  ",
    b"/",
    b"{",
    b"[" * 3000,
    b'{"a":' * 2000,
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"true",
    b'"',
    b"\\ud800",
    b"\\",
    b"v9.99",
    b"v1.01",
    b"2026-13-99T99:99:99",
    b"0001-01-01T00:00:00+23:59",
    b"application/json",
    b"binary/octet-stream",
    b"tcp://",
    b"tcp://*:0",
    b"tcp://256.1.1.1:99999",
    b"ipc://",
    b"foo://bar",
    b"x" * 2000,
    b"%s%n",
    b"pytroll:/",
    b"/heartbeat/",
    b"status",
    b"service",
)


def mutations(seeds: list[bytes], count: int, seed: int = 1) -> Iterator[bytes]:
    """Yield *count* broken versions of *seeds*, the same ones each time."""
    generator = random.Random(seed)
    for _ in range(count * FUZZ):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 5)):
            start = generator.randrange(len(data) + 1)
            end = min(start + generator.randrange(12), len(data))
            kind = generator.randrange(5)
            if kind == 0:
                data[start:end] = generator.choice(SPLICES)
            elif kind == 1:
                del data[start:end]
            elif kind == 2:
                data[start:start] = data[: generator.randrange(len(data) + 1)][-40:]
            elif kind == 3:
                del data[start:]
            else:
                data[start:end] = bytes(generator.randrange(256) for _ in range(generator.randrange(8)))
        yield bytes(data)


def memory_of(running: subprocess.Popen[str] | None = None) -> float:
    """Return the resident memory of a process in MB, by default of this one."""
    pid = "self" if running is None else running.pid
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors_of(running: subprocess.Popen[str] | None = None) -> int:
    """Return how many files a process has open, by default this one."""
    return len(os.listdir(f"/proc/{'self' if running is None else running.pid}/fd"))


def local_address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


@contextlib.contextmanager
def raw_socket(kind: int, port: int | None = None) -> Iterator[Any]:
    """Give a ZeroMQ socket that is none of ours, connected to a local port, or not connected."""
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 10000)
        with context.socket(kind) as sock:
            sock.linger = 0
            sock.sndhwm = sock.rcvhwm = 0
            if port is not None:
                sock.connect(local_address(port))
            yield sock


@contextlib.contextmanager
def connected_pair() -> Iterator[tuple[posttroll.Publisher, posttroll.Subscriber]]:
    """Give a publisher and its subscriber, so that the first message will arrive."""
    with posttroll.Publisher("tcp://*:0") as publisher:
        subscriber = posttroll.Subscriber([local_address(publisher.port_number)])
        with subscriber:
            assert publisher.wait_for_subscribers(1, DEADLINE)
            yield publisher, subscriber


@contextlib.contextmanager
def tcp_connections(count: int, *ports: int, data: bytes = b"") -> Iterator[None]:
    """Keep TCP connections to local ports open, on which *data* is sent, and nothing else."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            address = ("127.0.0.1", ports[number % len(ports)])
            connection = stack.enter_context(socket.create_connection(address, timeout=DEADLINE))
            connection.sendall(data)
        yield


def uris(service: str = "") -> list[str]:
    """Return the addresses of a service that the local nameserver knows."""
    return [entry["URI"] for entry in posttroll.get_pub_address(service, timeout=DEADLINE)]


def register(data: str | bytes) -> bytes:
    """Register at the local nameserver; return its answer."""
    answer = raw_request(config.get("broadcast_port"), data.encode() if isinstance(data, str) else data)
    assert answer is not None
    return answer[0]


def assert_still_serves() -> None:
    """A nameserver without multicast takes a new registration, publishes it, and tells of it."""
    address = local_address(free_port())
    with raw_socket(zmq.SUB, config.get("address_publish_port")) as news:
        news.subscribe(b"pytroll://address/survivor")
        text = ANNOUNCEMENT.replace("/address/pub", "/address/survivor").replace('"pub"', '"survivor"')

        def is_published() -> bool:
            answer = register(text % local_address(free_port()))  # a new one each time, as the subscription takes time
            assert answer == b"ok"
            return bool(news.poll(100))

        wait_for(is_published)
        assert register(text % address) == b"ok"
    assert address in uris("survivor")


# -- lookups --

BROKEN_LOOKUPS = {
    "no UTF-8": b"\xff\xfe\xfd",
    "empty": b"",
    "no message": b"hello",
    "wrong magic": LOOKUP.replace("pytroll:", "pitroll:").encode(),
    "unknown mime type": LOOKUP.replace("application/json", "application/x-nothing").encode(),
    "mime type without data": LOOKUP.partition(" {")[0].encode(),
    "bad timestamp": LOOKUP.replace("2026-11-23", "2026-99-99").encode(),
    "version above ours": LOOKUP.replace("v1.01", "v9.0").encode(),
    "no object": LOOKUP.replace('{"service": "%s"}', '["service"]').encode(),
    "nested deeply": LOOKUP.replace('{"service": "%s"}', DEEP).encode(),
    "object nested deeply": LOOKUP.replace('"%s"', DEEP).encode(),
    "no service": LOOKUP.replace("service", "sirvice").encode(),
    "service a number": LOOKUP.replace('"%s"', "17").encode(),
    "service a list": LOOKUP.replace('"%s"', '["a"]').encode(),
    "service null": LOOKUP.replace('"%s"', "null").encode(),
    "lone surrogate": LOOKUP.replace("%s", "\\ud800").encode(),
    "huge number": LOOKUP.replace('"%s"', "9" * 10000).encode(),
    "10 MB": b"x" * 10_000_000,
    "10 MB of service": LOOKUP.replace("%s", "x" * 10_000_000).encode(),
}


class TestBrokenLookups:
    @pytest.mark.parametrize("request_data", BROKEN_LOOKUPS.values(), ids=BROKEN_LOOKUPS.keys())
    def test_gets_an_empty_answer(self, request_data):
        with nameserver():
            register(ANNOUNCEMENT % "tcp://127.0.0.1:9")
            answer = raw_request(config.get("nameserver_port"), request_data)
            assert answer is not None
            message = posttroll.Message.decode(answer[0])
            assert message.data == ""
            assert uris("pub") == ["tcp://127.0.0.1:9"]

    def test_several_frames_get_an_empty_answer(self):
        with nameserver():
            answer = raw_request(config.get("nameserver_port"), (LOOKUP % "pub").encode(), b"more", b"")
            assert answer is not None
            assert posttroll.Message.decode(answer[0]).data == ""
            assert uris("pub") == []

    def test_the_answer_to_a_broken_request_has_its_version_if_it_is_readable(self):
        with nameserver():
            for version in ("v1.01", "v1.2"):
                text = LOOKUP.replace("v1.01", version).replace('"service"', '"x"')
                answer = raw_request(config.get("nameserver_port"), text.encode())
                assert answer is not None
                assert posttroll.Message.decode(answer[0]).version == version

    def test_more_than_the_limit_is_not_taken_and_harms_nobody(self):
        with nameserver(), raw_socket(zmq.REQ, config.get("nameserver_port")) as sock:
            sock.send(b"x" * (posttroll_ns._Server.MAX_REQUEST + 1))
            assert uris() == []
            assert not sock.poll(0)

    def test_malformed_envelopes(self):
        """A DEALER can leave out the empty frame, or send nothing but it; only whole requests are answered."""
        with nameserver(), raw_socket(zmq.DEALER, config.get("nameserver_port")) as sock:
            for frames in ([b"alone"], [b""], [b"", b""], [b"a", b"b"], [b"", b"a", b"", b"b"], [b"x"] * 50):
                sock.send_multipart(frames)
                assert uris() == []
            sock.send_multipart([b"last", b"", (LOOKUP % "pub").encode()])
            answers = []
            while not answers or answers[-1][0] != b"last":
                assert sock.poll(DEADLINE * 1000)
                answers.append(sock.recv_multipart())
            assert uris() == []

    def test_clients_that_go_away_before_the_answer(self):
        with nameserver():
            for _ in range(50):
                with raw_socket(zmq.DEALER, config.get("nameserver_port")) as sock:
                    for _ in range(20):
                        sock.send_multipart([b"", (LOOKUP % "").encode()])
                    sock.poll(1, zmq.POLLIN)
            assert uris() == []

    def test_thousand_clients_at_once(self):
        posttroll.raise_descriptor_limit()
        with nameserver_process("--no-multicast") as running, zmq.Context() as context:
            register(ANNOUNCEMENT % "tcp://127.0.0.1:9")
            context.set(zmq.MAX_SOCKETS, 5000)
            clients = []
            try:
                for _ in range(1000):
                    client = context.socket(zmq.REQ)
                    client.linger = 0
                    client.connect(local_address(config.get("nameserver_port")))
                    clients.append(client)
                for client in clients:
                    client.send((LOOKUP % "alias").encode())
                for client in clients:
                    assert client.poll(DEADLINE * 1000)
                    assert posttroll.Message.decode(client.recv()).data[0]["URI"] == "tcp://127.0.0.1:9"
            finally:
                for client in clients:
                    client.close()
            wait_for(lambda: descriptors_of(running) < 100)

    @pytest.mark.parametrize("setting", ["nameserver_port", "broadcast_port", "address_publish_port"])
    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
            b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + b"\xff" * 500,
            random.Random(2).getrandbits(8 * 10000).to_bytes(10000, "big"),
        ],
        ids=["HTTP", "TLS", "half a greeting", "random"],
    )
    def test_other_protocols_on_the_ports(self, setting, data):
        with nameserver():
            with tcp_connections(20, config.get(setting), data=data):
                assert_still_serves()
            assert_still_serves()

    def test_500_half_open_connections(self):
        """Connections on which nothing comes do not keep others from being served."""
        posttroll.raise_descriptor_limit()
        with nameserver_process("--no-multicast") as running:
            before = descriptors_of(running)
            ports = [config.get(name) for name in ("nameserver_port", "broadcast_port")]
            with tcp_connections(500, *ports, data=b"\xff"):
                wait_for(lambda: descriptors_of(running) >= before + 300)  # the kernel may keep some of them waiting
                assert_still_serves()
            wait_for(lambda: descriptors_of(running) < before + 50)

    def test_file_descriptors_run_out_as_it_starts(self):
        """What its first message needs has been imported before others can connect."""
        code = """
import resource, sys, types, posttroll, posttroll_ns
receiver = posttroll_ns.AddressReceiver(multicast_enabled=False, do_heartbeat=False).start()
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
receiver.process_address_message(sys.argv[1], types.SimpleNamespace(send=print))
"""
        with python(code, ANNOUNCEMENT % "tcp://127.0.0.1:9", cwd=HERE) as running:
            line = await_line(running, "/address/")
        assert Message.decode(line.strip()).host == socket.gethostname()

    def test_no_file_descriptors_left_at_the_end(self):
        """What has been sent still arrives."""
        port = free_port()
        code = f"""
import resource, posttroll
publisher = posttroll.Publisher("tcp://*:{port}").start()
assert publisher.wait_for_subscribers(1, {DEADLINE})
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
for number in range(1000):
    publisher.send(posttroll.Message("/a", "info", number))
publisher.stop()
"""
        with posttroll.Subscriber([local_address(port)], "") as subscriber, python(code, cwd=HERE) as running:
            messages = itertools.islice(subscriber.recv(timeout=DEADLINE), 1000)
            assert [message and message.data for message in messages] == list(range(1000))
            assert finish(running) == (0, "", "")

    def test_no_file_descriptors_left(self):
        """It waits until there are some again, and serves on."""
        import resource

        def few_descriptors() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

        with nameserver_process("--no-multicast", preexec_fn=few_descriptors) as running:
            ports = [config.get(name) for name in ("nameserver_port", "broadcast_port", "address_publish_port")]
            with raw_socket(zmq.REQ, ports[0]) as lookups, raw_socket(zmq.REQ, ports[1]) as registrations:
                for client, request in ((lookups, LOOKUP % "pub"), (registrations, "connect")):
                    client.send_string(request)
                    assert client.poll(DEADLINE * 1000)
                    client.recv()
                with tcp_connections(120, *ports, data=b"\xff"):
                    wait_for(lambda: descriptors_of(running) >= 60)
                    address = f"tcp://{posttroll.get_own_ip()}:9"
                    registrations.send_string(ANNOUNCEMENT % address)  # who is connected is served on
                    assert registrations.poll(DEADLINE * 1000)
                    assert registrations.recv() == b"ok"
                    lookups.send_string(LOOKUP % "pub")
                    assert lookups.poll(DEADLINE * 1000)
                    assert address in lookups.recv_string()
            assert running.poll() is None
            assert_still_serves()
            running.terminate()
            status, _, err = finish(running)
            assert (status, err) == (0, "")

    def test_fuzzed_lookups(self, tmp_path):
        """Each of thousands of mutated requests is answered by a message, at the end it still knows what it knew."""
        seeds = [(LOOKUP % service).encode() for service in ("pub", "", "alias")]
        log = tmp_path / "log"
        with running_nameserver("--no-multicast", log) as running:
            register(ANNOUNCEMENT % "tcp://127.0.0.1:9")
            before = memory_of(running)
            sent = 0
            with raw_socket(zmq.DEALER, config.get("nameserver_port")) as sock:
                for request in mutations(seeds, 5000):
                    sock.send_multipart([b"", request])
                    sent += 1
                    if sent % 100 == 0:
                        for _ in range(100):
                            assert sock.poll(DEADLINE * 1000)
                            _, answer = sock.recv_multipart()
                            assert posttroll.Message.decode(answer).subject == "/oper/ns"
            assert uris("pub") == uris("alias") == ["tcp://127.0.0.1:9"]
            assert memory_of(running) < before + 100
            assert log.stat().st_size < 100_000


@contextlib.contextmanager
def running_nameserver(option: str | None, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the nameserver with a log file; it is ready when this gives it."""
    options = [option] if option else []
    with process(sys.executable, NAMESERVER, *options, "-l", log) as running:
        wait_for(lambda: log.exists() and "answers on port" in log.read_text())
        yield running
        assert running.poll() is None


# -- announcements --


def registration_of(**data: Any) -> str:
    """Return a registration with other data; ``...`` leaves an entry out."""
    content = {"URI": "tcp://127.0.0.1:9", "service": ["pub"], **data}
    head, _, _ = ANNOUNCEMENT.partition("{")
    return head + json.dumps({key: value for key, value in content.items() if value is not ...})


BROKEN_ANNOUNCEMENTS = {
    **{key: value.replace(b"//oper/ns request", b"//address/pub info") for key, value in BROKEN_LOOKUPS.items()},
    "no URI": registration_of(URI=...),
    "URI a number": registration_of(URI=9),
    "URI null": registration_of(URI=None),
    "URI a list": registration_of(URI=["tcp://127.0.0.1:9"]),
    "URI foo://bar": registration_of(URI="foo://bar"),
    "URI tcp://": registration_of(URI="tcp://"),
    "URI empty": registration_of(URI=""),
    "URI without port": registration_of(URI="tcp://127.0.0.1"),
    "URI with port 0": registration_of(URI="tcp://127.0.0.1:0"),
    "URI with port 65536": registration_of(URI="tcp://127.0.0.1:65536"),
    "URI with a port that is no number": registration_of(URI="tcp://127.0.0.1:nine"),
    "URI with a newline": registration_of(URI="tcp://127.0.0.1:9\n"),
    "URI with a blank": registration_of(URI="tcp://127.0.0.1 :9"),
    "URI of everybody": registration_of(URI="tcp://*:9"),
    "URI too long": registration_of(URI=f"tcp://{'a.' * 5000}:9"),
    "service a text": registration_of(service="pub"),
    "service null": registration_of(service=None),
    "service with numbers": registration_of(service=["pub", 17]),
    "service an object": registration_of(service={"pub": 1}),
    "service empty": registration_of(service=[]),
    "service with an empty name": registration_of(service=[""]),
    "service with a long name": registration_of(service=["x" * 10000]),
    "too many services": registration_of(service=[str(i) for i in range(100000)]),
    "version a number": registration_of(supported_message_version=1.2),
    "version unknown": registration_of(supported_message_version="latest"),
    "backend a number": registration_of(backend=1),
    "backend unknown": registration_of(backend="carrier pigeon"),
    "backend a list": registration_of(backend=["unsecure_zmq"]),
    "no name": registration_of().replace("//address/pub", "//address/"),
    "no name at all": registration_of().replace("//address/pub", "//address"),
    "another subject": registration_of().replace("//address/pub", "//something/else"),
    "not whole": registration_of()[:-5],
}
BROKEN_ANNOUNCEMENTS = {
    key: value if isinstance(value, bytes) else value.encode() for key, value in BROKEN_ANNOUNCEMENTS.items()
}


class TestBrokenAnnouncements:
    @pytest.mark.parametrize("data", BROKEN_ANNOUNCEMENTS.values(), ids=BROKEN_ANNOUNCEMENTS.keys())
    def test_by_request_is_answered_but_not_acknowledged_stored_or_passed_on(self, data):
        with nameserver(), raw_socket(zmq.SUB, config.get("address_publish_port")) as news:
            news.subscribe(b"pytroll://address")
            assert register(data).startswith(b"refused: ")
            assert uris() == []
            good = registration_of(URI="tcp://127.0.0.1:10")
            assert register(good) == b"ok"
            assert uris() == ["tcp://127.0.0.1:10"]
            while news.poll(50):
                assert posttroll.Message.decode(news.recv()).data["URI"] == "tcp://127.0.0.1:10"

    def test_several_frames_are_refused(self):
        with nameserver():
            answer = raw_request(config.get("broadcast_port"), registration_of().encode(), b"more")
            assert answer is not None
            assert answer[0].startswith(b"refused: ")
            assert uris() == []

    def test_by_datagram(self):
        """None of them stops the nameserver, and none is found by a lookup."""
        with nameserver(multicast_enabled=True), multicast_sender() as send:
            for data in BROKEN_ANNOUNCEMENTS.values():
                if len(data) < 60000:
                    send(data)
            send(registration_of(URI="tcp://127.0.0.1:10"))
            wait_for(uris)
            assert uris() == ["tcp://127.0.0.1:10"]

    def test_a_datagram_longer_than_1024_bytes_is_taken_whole(self):
        aliases = [f"alias-{i:04}-of-many" for i in range(500)]
        with nameserver(multicast_enabled=True), multicast_sender() as send:
            send(registration_of(service=aliases))
            wait_for(lambda: uris(aliases[-1]))
            (entry,) = posttroll.get_pub_address(aliases[0])
            assert entry["service"] == aliases

    def test_a_publisher_with_many_aliases_is_found_by_all(self):
        aliases = [f"alias-{i:04}-of-many" for i in range(500)]
        publishing = posttroll.Publish("many", aliases=aliases, broadcast_interval=0.05)
        with nameserver(multicast_enabled=True), publishing:
            wait_for(lambda: uris(aliases[-1]))
            assert uris(aliases[-1]) == uris("many")

    def test_fuzzed_registrations(self, tmp_path):
        """Each is answered; what is stored can be used."""
        seeds = [(ANNOUNCEMENT % "tcp://127.0.0.1:9").encode(), registration_of(service=["x", "y"]).encode()]
        log = tmp_path / "log"
        with running_nameserver("--no-multicast", log) as running:
            before = memory_of(running)
            answers = []
            with raw_socket(zmq.DEALER, config.get("broadcast_port")) as sock:
                for number, request in enumerate(mutations(seeds, 5000), 1):
                    sock.send_multipart([b"", request])
                    if number % 100 == 0:
                        for _ in range(100):
                            assert sock.poll(DEADLINE * 1000)
                            answers.append(sock.recv_multipart()[1])
            assert {answer.partition(b":")[0] for answer in answers} == {b"ok", b"refused"}
            assert all(posttroll.is_connectable(uri) for uri in uris())
            assert_still_serves()
            assert memory_of(running) < before + 100
            assert log.stat().st_size < 2_000_000 * FUZZ

    def test_fuzzed_datagrams(self, tmp_path):
        seeds = [(ANNOUNCEMENT % "tcp://127.0.0.1:9").encode(), registration_of(service=["x", "y"]).encode()]
        log = tmp_path / "log"
        with running_nameserver(None, log) as running, multicast_sender() as send:
            before = memory_of(running)
            for number, data in enumerate(mutations(seeds, 5000, seed=3), 1):
                send(data[:60000])
                if number % 50 == 0:  # as fast as it takes them, so that the kernel drops none
                    mark = f"mark-{number}"
                    wait_for(lambda mark=mark: send(registration_of(service=[mark])) or uris(mark))
            assert all(posttroll.is_connectable(uri) for uri in uris())
            assert memory_of(running) < before + 100
            assert log.stat().st_size < 2_000_000 * FUZZ

    @pytest.mark.parametrize(
        "count", [30_000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
    )
    def test_many_made_up_services(self, tmp_path, count):
        """Memory and log are bounded, publishers that are known stay, and lookups are answered meanwhile."""
        log = tmp_path / "log"
        with running_nameserver("--no-multicast", log) as running:
            with raw_socket(zmq.DEALER, config.get("broadcast_port")) as sock:
                answered = 0
                for number in range(count):
                    if number % 500 == 0:  # as publishers do: who is silent for 10 s may have to make room
                        register(registration_of(URI="tcp://127.0.0.1:10", service=["real"]))
                        register(registration_of(URI="tcp://10.1.1.1:1", service=["s1"]))
                    text = registration_of(
                        URI=f"tcp://10.1.{number % 250}.1:{number // 250 + 1}", service=[f"s{number}"]
                    )
                    sock.send_multipart([b"", text.encode()])
                    if number % 5000 == 4999:
                        assert uris("real") == ["tcp://127.0.0.1:10"]
                        while answered <= number:
                            assert sock.poll(DEADLINE * 1000)
                            sock.recv_multipart()
                            answered += 1
            assert uris("s1") == ["tcp://10.1.1.1:1"]
            assert uris("real") == ["tcp://127.0.0.1:10"]
            assert memory_of(running) < 250
            assert log.stat().st_size < 6_000_000


@contextlib.contextmanager
def multicast_sender() -> Iterator[Callable[[str | bytes], None]]:
    sender = posttroll.MulticastSender(config.get("broadcast_port"))
    try:
        yield sender
    finally:
        sender.close()


# -- subscribers --


@contextlib.contextmanager
def raw_publisher(address: str = "tcp://127.0.0.1:*") -> Iterator[tuple[Any, str]]:
    """Give a publisher socket that is none of ours, to send anything, and its address."""
    with raw_socket(zmq.XPUB) as sock:
        sock.bind(address)
        yield sock, sock.last_endpoint.decode()


class TestBrokenMessagesToSubscribers:
    def test_good_ones_between_broken_ones_are_delivered(self):
        broken = [value.replace(b"//oper/ns", b"//good") for value in BROKEN_LOOKUPS.values() if len(value) < 1000]
        broken += [b"pytroll:/", b"pytroll://good", b"pytroll://good info me@host bad v1.01", b"pytroll://\xff\xfe"]
        with raw_publisher() as (sock, address), posttroll.Subscriber([address]) as subscriber:
            assert sock.poll(DEADLINE * 1000)
            for number, data in enumerate(broken):
                sock.send(data)
                sock.send_multipart([posttroll.Message("/good", "number", number).encode().encode()])
            numbers = []
            while not numbers or numbers[-1] != len(broken) - 1:
                (message,) = receive(subscriber)
                if message.type == "number":
                    numbers.append(message.data)
            assert numbers == list(range(len(broken)))

    def test_fuzzed_messages(self):
        data = {"start_time": "2026-11-23T12:00:00", "uri": "/a/b.nc", "list": [1, 2.5, None, {"x": "y"}]}
        seeds = [
            posttroll.Message("/good", "info", data).encode().encode(),
            posttroll.Message("/good", "info", "text").encode().encode(),
            posttroll.Message("/good", "info", b"\x00\xff" * 20, binary=True).encode().encode(),
        ]
        count = 0
        with raw_publisher() as (sock, address), posttroll.Subscriber([address]) as subscriber:
            assert sock.poll(DEADLINE * 1000)
            for data in mutations(seeds, 5000, seed=4):
                sock.send(b"pytroll:/" + data[9:])
                if count % 10 == 0:
                    sock.send(posttroll.Message("/good", "number", count).encode().encode())
                count += 1
            numbers = []
            while not numbers or numbers[-1] < count - 10:
                (message,) = receive(subscriber)
                if message.type == "number":
                    numbers.append(message.data)
            assert numbers == list(range(0, count, 10))

    def test_several_frames(self):
        """Frames after the first are messages of their own, as there is nothing else that they could be."""
        with raw_publisher() as (sock, address), posttroll.Subscriber([address]) as subscriber:
            assert sock.poll(DEADLINE * 1000)
            good = posttroll.Message("/good", "info", 1).encode().encode()
            sock.send_multipart([b"pytroll:/x", b"", b"\xff"])
            sock.send_multipart([good])
            assert [message.data for message in receive(subscriber)] == [1]

    def test_an_exception_in_the_loop_leaves_the_subscriber_usable(self):
        with connected_pair() as (publisher, subscriber):
            publisher.send(posttroll.Message("/a", "info", 1))
            publisher.send(posttroll.Message("/a", "info", 2))

            def fail_at_the_first() -> None:
                for message in subscriber.recv(timeout=DEADLINE):
                    raise LookupError(message)

            with pytest.raises(LookupError):
                fail_at_the_first()
            assert [message.data for message in receive(subscriber)] == [2]

    def test_a_host_that_does_not_resolve_does_not_hold_up_the_others(self):
        with posttroll.Publisher("tcp://*:0") as publisher:
            addresses = ["tcp://no-such-host.invalid:9", local_address(publisher.port_number), "tcp://x.invalid:1"]
            with posttroll.Subscriber(addresses) as subscriber:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info", 1))
                assert [message.data for message in receive(subscriber)] == [1]
                assert subscriber.addresses == addresses
        left = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("resolve")]  # noqa: E731
        wait_for(lambda: not left())

    def test_a_host_is_used_once_it_resolves(self, monkeypatch):
        real = socket.getaddrinfo
        resolvable = threading.Event()

        def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
            if host != "late.invalid":
                return real(host, *args, **kwargs)
            if not resolvable.is_set():
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return real("127.0.0.1", *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        monkeypatch.setattr(posttroll._Resolution, "RETRY", 0.05)
        with posttroll.Publisher("tcp://*:0") as publisher:
            with posttroll.Subscriber([f"tcp://late.invalid:{publisher.port_number}"]) as subscriber:
                next(subscriber.recv(timeout=0.2))
                assert publisher.subscriber_count == 0
                resolvable.set()
                wait_for(lambda: next(subscriber.recv(timeout=0.05)) or publisher.subscriber_count)
                publisher.send(posttroll.Message("/a", "info", "x"))
                assert receive(subscriber)[0].data == "x"


class FakeNameserver:
    """Answers each lookup by what it is told to, and publishes anything on the address port."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.answer: Any = lambda request: b""
        self.has_envelope = True
        self.asked = 0
        self.lookups = self.context.socket(zmq.ROUTER)
        self.lookups.bind(local_address(config.get("nameserver_port")))
        self.news = self.context.socket(zmq.XPUB)
        self.news.sndhwm = 0
        self.news.bind(local_address(config.get("address_publish_port")))
        self.lookups.linger = self.news.linger = 0
        self.is_stopping = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.is_stopping:
            if self.lookups.poll(20):
                *envelope, request = self.lookups.recv_multipart()
                answer = self.answer(request)
                self.asked += 1
                if not self.has_envelope:
                    envelope = envelope[:1]
                if answer is not None:
                    self.lookups.send_multipart([*envelope, *(answer if isinstance(answer, list) else [answer])])

    def __enter__(self) -> FakeNameserver:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.is_stopping = True
        self.thread.join()
        self.context.destroy(0)


def answer_of(*entries: Any) -> bytes:
    return posttroll.Message("/oper/ns", "info", list(entries), version="v1.01").encode().encode()


class TestBrokenAnswersToLookups:
    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"\xff\xfe",
            b"hello",
            [b"", b""],
            posttroll.Message("/oper/ns", "info", 17).encode().encode(),
            posttroll.Message("/oper/ns", "info", {"URI": "tcp://127.0.0.1:9"}).encode().encode(),
            answer_of(17, None, "tcp://127.0.0.1:9", {}, {"URI": 9}, {"URI": "foo://bar"}, {"URI": "tcp://x:0"}),
            b"pytroll://oper/ns info me@host 2026-11-23T12:00:00 v1.01 application/json " + DEEP.encode(),
            b"pytroll://oper/ns info me@host 2026-11-23T12:00:00 v9.99 application/json []",
        ],
        ids=range(9),
    )
    def test_nothing_is_found(self, answer):
        with FakeNameserver() as fake:
            fake.answer = lambda request: answer
            assert posttroll.get_pub_address("pub", timeout=DEADLINE) == []

    @pytest.mark.parametrize("faulty_hosts", ["localhost", ["localhost", "127.0.0.2"]], ids=["one", "several"])
    def test_an_answer_without_envelope_is_none(self, faulty_hosts):
        with FakeNameserver() as fake:
            fake.answer = lambda request: answer_of()
            fake.has_envelope = False
            with pytest.raises(TimeoutError):
                posttroll.get_pub_address("pub", timeout=0.5, nameserver=faulty_hosts)
            assert fake.asked

    def test_no_answer_is_a_timeout(self):
        with FakeNameserver() as fake:
            fake.answer = lambda request: None
            with pytest.raises(TimeoutError):
                posttroll.get_pub_address("pub", timeout=0.1)

    def test_no_nameserver_is_a_timeout(self):
        with pytest.raises(TimeoutError):
            posttroll.get_pub_address("pub", timeout=0.1)

    def test_the_good_entries_are_used(self):
        good = {"URI": "tcp://127.0.0.1:9", "service": ["pub"]}
        with FakeNameserver() as fake:
            fake.answer = lambda request: answer_of(17, {"URI": "tcp://"}, good, [], {"service": ["pub"]})
            assert posttroll.get_pub_address("pub", timeout=DEADLINE) == [good]

    def test_a_subscriber_uses_the_good_entries(self):
        with posttroll.Publisher("tcp://*:0") as publisher, FakeNameserver() as fake:
            good = {"URI": local_address(publisher.port_number), "service": ["pub"]}
            other = {"URI": "tcp://127.0.0.1:9", "service": ["pub"], "backend": 1}
            fake.answer = lambda request: answer_of({"URI": "tcp://:0"}, None, good, {**good, "URI": 9}, other)
            with posttroll.Subscribe("pub", timeout=DEADLINE) as subscriber:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(posttroll.Message("/a", "info", 1))
                assert [message.data for message in receive(subscriber)] == [1]

    def test_fuzzed_answers(self):
        """Lookups return nothing but usable entries, or raise what they document."""
        seeds = [answer_of({"URI": "tcp://127.0.0.1:9", "service": ["pub"], "backend": "unsecure_zmq"}, {"URI": "x"})]
        answers = mutations(seeds, 2000, seed=5)
        with FakeNameserver() as fake:
            fake.answer = lambda request: next(answers)
            for _ in range(2000 * FUZZ):
                for entry in posttroll.get_pub_address("pub", timeout=DEADLINE):
                    assert posttroll.is_connectable(entry["URI"])

    def test_fuzzed_answers_and_news_to_a_running_subscriber(self):
        """Nothing on the address port, and no answer, ends a subscriber; afterwards it still follows its service."""
        seeds = [
            (ANNOUNCEMENT % "tcp://127.0.0.1:9").encode(),
            (ANNOUNCEMENT % "tcp://127.0.0.1:9").replace("}", ', "status": false}').encode(),
        ]
        answers = mutations([answer_of({"URI": "tcp://127.0.0.1:9", "service": ["pub"]})], 100_000, seed=6)
        with posttroll.Publisher("tcp://*:0") as publisher, FakeNameserver() as fake:
            fake.answer = lambda request: next(answers)
            with posttroll.Subscribe("pub", addr_listener=True, timeout=0.1) as subscriber:
                wait_for(lambda: next(subscriber.recv(timeout=0.01)) or fake.news.poll(0))
                for data in mutations(seeds, 3000, seed=7):
                    fake.news.send(b"pytroll://address" + data[17:])
                for _ in range(50):
                    next(subscriber.recv(timeout=0.01))
                assert not [uri for uri in subscriber.addresses if not posttroll.is_connectable(uri)]
                fake.news.send((ANNOUNCEMENT % local_address(publisher.port_number)).encode())
                wait_for(lambda: next(subscriber.recv(timeout=0.01)) or publisher.subscriber_count)
                publisher.send(posttroll.Message("/a", "info", 1))
                assert [message.data for message in receive(subscriber)] == [1]
        left = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("resolve")]  # noqa: E731
        wait_for(lambda: not left())


# -- restarts --


class TestRegistrationsAndFailingNameservers:
    def test_a_nameserver_that_dies_before_it_acknowledges_holds_nobody_up(self):
        port = config.get("broadcast_port")
        context = zmq.Context()
        dying = context.socket(zmq.ROUTER)
        dying.bind(local_address(port))
        try:
            with posttroll.Publish("pub", nameservers=["localhost"], broadcast_interval=0.2):
                assert dying.poll(DEADLINE * 1000)
                assert b"//address/pub" in dying.recv_multipart()[-1]
                dying.close(0)
                context.term()
                with nameserver():
                    wait_for(lambda: uris("pub"))
        finally:
            context.destroy(0)

    def test_nothing_follows_the_goodbye_while_it_is_not_answered(self, monkeypatch):
        """It would be registered again, until it is too old."""
        monkeypatch.setattr(posttroll.MessageBroadcaster, "_GOODBYE_SECONDS", 0.3)
        with raw_socket(zmq.ROUTER) as server:
            server.bind(local_address(config.get("broadcast_port")))
            with posttroll.Publish("pub", nameservers=["localhost"], broadcast_interval=0.02):
                assert server.poll(DEADLINE * 1000)
            requests = []
            while not requests or requests[-1].get("status", True):
                assert server.poll(DEADLINE * 1000)
                requests.append(Message.decode(server.recv_multipart()[-1]).data)
            assert not server.poll(100)

    def test_one_that_never_answers_does_not_delay_another(self):
        faulty_hosts = ["localhost", "127.0.0.2", "192.0.2.1"]
        with posttroll.Publish("pub", nameservers=faulty_hosts, broadcast_interval=0.2), nameserver():
            wait_for(lambda: uris("pub"))

    @pytest.mark.parametrize("options", [["--no-multicast"], []], ids=["by request", "by multicast"])
    def test_killed_and_restarted(self, options):
        """Publishers are registered again, and running subscribers find new publishers."""
        settings = {"nameservers": ["localhost"] if options else None, "broadcast_interval": 0.2}
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(posttroll.Publish("pub", **settings))
            running = stack.enter_context(nameserver_process(*options))
            subscriber = stack.enter_context(posttroll.Subscribe("pub", addr_listener=True, timeout=DEADLINE))
            assert first.wait_for_subscribers(1, DEADLINE)
            running.kill()
            running.wait()
            stack.enter_context(nameserver_process(*options))
            second = stack.enter_context(posttroll.Publish("pub", **settings))
            wait_for(lambda: len(uris("pub")) == 2)
            wait_for(lambda: next(subscriber.recv(timeout=0.01)) or second.subscriber_count)
            for number, publisher in enumerate((first, second)):
                publisher.send(posttroll.Message("/a", "info", number))
            assert sorted(message.data for message in receive(subscriber, 2)) == [0, 1]

    def test_a_registration_that_fails_is_logged_and_ends_nothing(self):
        """It is answered, too: a client without an answer would wait for ever."""
        code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import posttroll_ns
process = posttroll_ns.AddressReceiver.process_address_message

def fail_once(self, data, pub):
    posttroll_ns.AddressReceiver.process_address_message = process
    raise OSError("the disk is on fire")

posttroll_ns.AddressReceiver.process_address_message = fail_once
sys.exit(posttroll_ns.main(["--no-multicast"]))
"""
        with python(code) as running:
            await_line(running, "answers on port")
            assert [register(registration_of()) for _ in range(2)] == [b"", b"ok"]
            await_line(running, "the disk is on fire")
            assert len(uris()) == 1
            running.send_signal(signal.SIGTERM)
            assert finish(running)[0] == 0

    def test_loopback_address_is_forgotten_when_the_real_one_is_known(self, monkeypatch):
        """Both are the same publisher: a subscriber must not get each message twice for ten minutes."""
        monkeypatch.setattr(posttroll_ns.AddressBook, "GRACE", 0.1)
        with nameserver():
            for host, port in (("127.0.0.1", 9), ("127.0.0.1", 10), ("127.0.0.2", 9)):
                assert register(registration_of(URI=f"tcp://{host}:{port}")) == b"ok"
            wait_for(lambda: len(uris()) == 2)
            assert sorted(uris()) == ["tcp://127.0.0.1:10", "tcp://127.0.0.2:9"]

    @pytest.mark.parametrize("no_multicast", [True, False])
    def test_any_order(self, no_multicast):
        """A subscriber without nameserver and publisher finds both."""
        faulty_hosts = ["localhost"] if no_multicast else None
        publish = posttroll.Publish("pub", nameservers=faulty_hosts, broadcast_interval=0.1)
        with posttroll.Subscribe("pub", timeout=0, addr_listener=True) as subscriber, publish as publisher:
            with nameserver(multicast_enabled=not no_multicast):  # the last one
                wait_for(lambda: next(subscriber.recv(timeout=0.01)) or publisher.subscriber_count)
            publisher.send(posttroll.Message("/a", "info", 1))
            assert [message.data for message in receive(subscriber)] == [1]


# -- networks that fail --

PUBLISH_ALWAYS = """
import os, sys, threading, posttroll
publisher = posttroll.Publisher("tcp://*:9000").start()
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
number = 0
while not end.wait(0.02):
    publisher.send(posttroll.Message("/a", sys.argv[1], number))
    number += 1
publisher.stop()
"""

PRINT_MESSAGES = """
import sys, posttroll
with posttroll.Subscriber([sys.argv[1]]) as subscriber:
    for message in subscriber.recv():
        print(message.type, message.data, flush=True)
"""


class TwoHosts:
    """Two faulty_hosts, that is network namespaces, and a cable between them."""

    ADDRESSES = ("10.203.77.1", "10.203.77.2")

    def __init__(self) -> None:
        self.names = [f"posttroll{os.getpid()}{letter}" for letter in "ab"]
        self.links = [f"pt{os.getpid() % 1000000}{letter}" for letter in "ab"]
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")

    @staticmethod
    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True, text=True)

    def plug_in(self) -> None:
        ends = ["type", "veth", "peer", "name", self.links[1], "netns", self.names[1]]
        self.ip("link", "add", self.links[0], "netns", self.names[0], *ends)
        for name, link, address in zip(self.names, self.links, self.ADDRESSES):
            self.ip("-n", name, "addr", "add", address + "/24", "dev", link)
            self.ip("-n", name, "link", "set", link, "up")

    def lose_power(self, host: int) -> None:
        """Take a host away: no packet of it is seen any more, and it forgets everything."""
        self.ip("-n", self.names[host], "link", "del", self.links[host])
        self.ip("netns", "del", self.names[host])

    def get_power(self, host: int) -> None:
        self.names[host] += "x"
        self.ip("netns", "add", self.names[host])
        self.plug_in()

    def python(self, host: int, code: str, *args: Any) -> Any:
        return process("ip", "netns", "exec", self.names[host], sys.executable, "-u", "-c", code, *args)

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def two_faulty_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
    try:
        created = TwoHosts()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make network namespaces: {error}")
    try:
        yield created
    finally:
        created.close()


@pytest.mark.network
class TestNetworkFaults:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_ZMTP_HEARTBEAT_INTERVAL", "0.3")
        monkeypatch.setenv("POSTTROLL_ZMTP_HEARTBEAT_TIMEOUT", "1")

    def test_publisher_host_loses_power_and_comes_back_on_the_same_address(self, two_faulty_hosts):
        two_faulty_hosts.plug_in()
        with two_faulty_hosts.python(0, PRINT_MESSAGES, f"tcp://{two_faulty_hosts.ADDRESSES[1]}:9000") as subscriber:
            with two_faulty_hosts.python(1, PUBLISH_ALWAYS, "before"):
                await_line(subscriber, "before")
                two_faulty_hosts.lose_power(1)
            two_faulty_hosts.get_power(1)
            with two_faulty_hosts.python(1, PUBLISH_ALWAYS, "after"):
                await_line(subscriber, "after")

    def test_silence_of_a_firewall_that_forgets(self, two_faulty_hosts):
        """Packets vanish, both hosts live on; then there are new rules, and another publisher on the same port."""
        two_faulty_hosts.plug_in()
        with two_faulty_hosts.python(0, PRINT_MESSAGES, f"tcp://{two_faulty_hosts.ADDRESSES[1]}:9000") as subscriber:
            with two_faulty_hosts.python(1, PUBLISH_ALWAYS, "before"):
                await_line(subscriber, "before")
                two_faulty_hosts.ip(
                    "-n", two_faulty_hosts.names[1], "route", "add", "blackhole", two_faulty_hosts.ADDRESSES[0] + "/32"
                )
            with two_faulty_hosts.python(1, PUBLISH_ALWAYS, "after"):
                two_faulty_hosts.ip(
                    "-n", two_faulty_hosts.names[1], "route", "del", "blackhole", two_faulty_hosts.ADDRESSES[0] + "/32"
                )
                await_line(subscriber, "after")

    @pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.long)])
    def test_link_goes_down_and_comes_back(self, two_faulty_hosts, seconds):
        two_faulty_hosts.plug_in()
        subscribing = two_faulty_hosts.python(0, PRINT_MESSAGES, f"tcp://{two_faulty_hosts.ADDRESSES[1]}:9000")
        with subscribing as subscriber, two_faulty_hosts.python(1, PUBLISH_ALWAYS, "message"):
            await_line(subscriber, "message")
            two_faulty_hosts.ip("-n", two_faulty_hosts.names[1], "link", "set", two_faulty_hosts.links[1], "down")
            time.sleep(seconds)  # the duration of the fault, not a wait for something
            two_faulty_hosts.ip("-n", two_faulty_hosts.names[1], "link", "set", two_faulty_hosts.links[1], "up")
            sent_at_least = 50 * seconds
            wait_for(lambda: int(await_line(subscriber, "message").split()[1]) > sent_at_least)

    def test_started_before_there_is_a_network(self, two_faulty_hosts):
        """All start without any network; then there is an address, later another one."""
        name = two_faulty_hosts.names[0]
        two_faulty_hosts.ip("-n", name, "link", "set", "lo", "down")
        publish = PUBLISH_ALWAYS.replace(
            'posttroll.Publisher("tcp://*:9000")', 'posttroll.NoisyPublisher("pub", broadcast_interval=0.2)'
        )
        subscribe = PRINT_MESSAGES.replace(
            "posttroll.Subscriber([sys.argv[1]])", "posttroll.Subscribe('pub', addr_listener=True, timeout=0)"
        )
        listing = """
import sys, time, posttroll
while True:
    try:
        addresses = [entry["URI"] for entry in posttroll.get_pub_address("pub", 1)]
    except TimeoutError:
        continue
    print(*addresses, flush=True)
    time.sleep(0.05)
"""
        serve = "import sys, posttroll_ns; sys.exit(posttroll_ns.main([]))"
        with (
            two_faulty_hosts.python(0, serve) as server,
            two_faulty_hosts.python(0, publish, "hello"),
            two_faulty_hosts.python(0, subscribe) as received,
        ):
            await_line(server, "answers on port")
            two_faulty_hosts.ip("-n", name, "link", "set", "lo", "up")
            with two_faulty_hosts.python(0, listing) as known:
                two_faulty_hosts.plug_in()
                two_faulty_hosts.ip("-n", name, "route", "add", "default", "via", two_faulty_hosts.ADDRESSES[1])
                await_line(known, f"tcp://{two_faulty_hosts.ADDRESSES[0]}:")
                await_line(received, "hello")
                two_faulty_hosts.ip("-n", name, "addr", "add", "10.203.79.1/24", "dev", two_faulty_hosts.links[0])
                two_faulty_hosts.ip(
                    "-n", name, "addr", "del", two_faulty_hosts.ADDRESSES[0] + "/24", "dev", two_faulty_hosts.links[0]
                )
                two_faulty_hosts.ip("-n", name, "route", "replace", "default", "dev", two_faulty_hosts.links[0])
                await_line(known, "tcp://10.203.79.1:")


# -- ends --

ENDS = {
    "nameserver": "import posttroll_ns, sys; sys.exit(posttroll_ns.main(['--no-multicast']))",
    "publisher": """
import time, posttroll
with posttroll.Publish("pub", nameservers=["localhost"]) as publisher:
    print("answers on port", flush=True)
    while True:
        publisher.send(posttroll.Message("/a", "info", 1))
        time.sleep(0.05)
""",
    "subscriber": """
import posttroll
with posttroll.Subscribe("pub", addr_listener=True, timeout=0) as subscriber:
    print("answers on port", flush=True)
    for message in subscriber.recv():
        print(message)
""",
    "subscriber of an address": """
import posttroll
with posttroll.Subscriber(["tcp://127.0.0.1:9"]) as subscriber:
    print("answers on port", flush=True)
    for message in subscriber:
        print(message)
""",
    "listener": """
import posttroll
with posttroll.ListenerContainer(["/a"], services="pub") as listener:
    print("answers on port", flush=True)
    while True:
        listener.output_queue.get()
""",
}
FORGETFUL = {
    "publisher": "publisher = posttroll.NoisyPublisher('pub', nameservers=['localhost']); publisher.start()",
    "publisher that has sent": "publisher = posttroll.Publisher('tcp://*:0'); publisher.send('x')",
    "subscriber": "subscriber = posttroll.Subscriber(['tcp://127.0.0.1:9', 'tcp://x.invalid:9'])",
    "subscriber of a service": "subscriber = posttroll.NSSubscriber('pub', addr_listener=True, timeout=0).start()",
    "iteration": "messages = posttroll.Subscriber(['tcp://127.0.0.1:9']).recv(timeout=0.01); next(messages)",
    "listener": "listener = posttroll.ListenerContainer(['/a'], services='pub')",
    "address receiver": "import posttroll_ns; receiver = posttroll_ns.AddressReceiver(); receiver.start()",
    "lookup": """
try:
    posttroll.get_pub_address('pub', timeout=0.01)
except TimeoutError:
    pass
""",
}


class TestEnds:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("code", ENDS.values(), ids=ENDS.keys())
    def test_signals(self, code, number):
        """SIGTERM of the nameserver is a clean end; elsewhere the signals mean what they mean in Python."""
        with python(code) as running:
            await_line(running, "answers on port")
            running.send_signal(number)
            status, _, err = finish(running)
            if code is ENDS["nameserver"]:
                assert (status, err) == (0, "")
            elif number == signal.SIGINT:
                assert "KeyboardInterrupt" in err
            else:
                assert status == -signal.SIGTERM

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_while_they_are_taken_over(self, number):
        """It may come when only one of the two handlers is there."""
        code = f"""
            import os, signal, posttroll
            take_over, calls, sent = signal.signal, [], []
            before = signal.getsignal({number})

            def interrupted(number, handler):
                previous = take_over(number, handler)
                if number == {number} and not sent:
                    sent.append(number)
                    os.kill(os.getpid(), number)
                return previous

            signal.signal = interrupted
            with posttroll.call_on_signals(lambda: calls.append("called")):
                print(*calls)
            assert signal.getsignal({number}) == before
        """
        with python(inspect.cleandoc(code)) as running:
            assert finish(running) == (0, "called\n", "")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_nested_in_each_other(self, number, monkeypatch):
        """Each takes one signal; what comes then is treated as before the first."""
        monkeypatch.setattr(posttroll, "_ECHO_SECONDS", 0)
        previous = signal.getsignal(number)
        calls, before = [], mock.Mock()
        signal.signal(number, before)
        try:
            with posttroll.call_on_signals(lambda: calls.append("outer")):
                with posttroll.call_on_signals(lambda: calls.append("inner")):
                    signal.raise_signal(number)
                    signal.raise_signal(number)
                assert calls == ["inner", "outer"]
                assert not before.called
                signal.raise_signal(number)
                assert before.called
            assert (calls, signal.getsignal(number)) == (["inner", "outer"], before)
        finally:
            signal.signal(number, previous)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_one_signal_that_is_sent_twice(self, number, monkeypatch):
        """`timeout` signals a program and then its group: that does not end it at once."""
        monkeypatch.setattr(posttroll, "_ECHO_SECONDS", 600)
        previous, calls, before = signal.getsignal(number), [], mock.Mock()
        signal.signal(number, before)
        try:
            with posttroll.call_on_signals(lambda: calls.append("called")):
                for _ in range(3):
                    signal.raise_signal(number)
            assert (calls, before.called, signal.getsignal(number)) == (["called"], False, before)
        finally:
            signal.signal(number, previous)

    def test_a_handler_that_the_program_sets_meanwhile_stays(self):
        previous, own = signal.getsignal(signal.SIGTERM), mock.Mock()
        try:
            with posttroll.call_on_signals(lambda: None):
                signal.signal(signal.SIGTERM, own)
            assert signal.getsignal(signal.SIGTERM) is own
        finally:
            signal.signal(signal.SIGTERM, previous)

    def test_control_c_while_they_are_given_back(self, monkeypatch):
        """It comes as soon as it is as before, and none of the two is kept."""
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        give_back = signal.signal

        def interrupted(number: int, handler: Any) -> Any:
            given = give_back(number, handler)
            if handler is signal.default_int_handler:
                signal.raise_signal(signal.SIGINT)
            return given

        with pytest.raises(KeyboardInterrupt), posttroll.call_on_signals(pytest.fail):
            monkeypatch.setattr(signal, "signal", interrupted)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_ends_as_ever(self):
        """What its parent does on signals is not for the child, as of `multiprocessing`."""
        code = """
import os, signal, time, posttroll
ready, is_ready = os.pipe()
with posttroll.call_on_signals(lambda: print("called")):
    child = os.fork()
    if not child:
        os.write(is_ready, b"!")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""
        with python(code) as running:
            assert finish(running) == (0, f"{int(signal.SIGTERM)}\n", "")

    def test_a_signal_that_does_not_end_the_poll(self):
        """One that another thread gets, or that comes just before the poll."""
        code = """
import logging, signal, sys, threading, posttroll_ns

def signal_myself():
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

class Logger(logging.Logger):
    def info(self, text, *args):
        if "answers" in text:
            threading.Timer(0.2, signal_myself).start()  # it polls by then; before that, it would end in any case

before = signal.set_wakeup_fd(-1)
status = posttroll_ns.run(posttroll_ns.NameServer(multicast_enabled=False), Logger("test"))
assert signal.set_wakeup_fd(-1) == before
sys.exit(status)
"""
        with python(code, cwd=HERE) as running:
            assert finish(running) == (0, "", "")

    @pytest.mark.parametrize("code", FORGETFUL.values(), ids=FORGETFUL.keys())
    def test_forgotten_stop(self, code):
        """A program that ends without stopping anything ends."""
        with python(f"import posttroll\n{code}\n") as running:
            assert finish(running)[0] == 0

    @pytest.mark.parametrize(("ending", "status"), [("raise SystemExit(3)", 3), ("raise RuntimeError('oh')", 1)])
    def test_everything_forgotten(self, ending, status):
        """A program that fails, with all of that at once, ends."""
        with python("\n".join(["import posttroll", *FORGETFUL.values(), ending])) as running:
            assert finish(running)[0] == status

    @pytest.mark.parametrize("nameservers", [["localhost"], None], ids=["registration", "multicast"])
    def test_a_forgotten_publisher_says_goodbye(self, nameservers):
        code = f"""
import sys, posttroll
publishers = [posttroll.NoisyPublisher(name, nameservers={nameservers}).start() for name in ("a", "b")]
sys.stdin.read()
"""
        with nameserver(multicast_enabled=nameservers is None), python(code) as running:
            wait_for(lambda: len(posttroll.get_pub_address("", timeout=DEADLINE)) == 2)
            assert finish(running) == (0, "", "")
            wait_for(lambda: posttroll.get_pub_address("", timeout=DEADLINE) == [])

    @pytest.mark.parametrize(
        ("kind", "how"),
        [
            ("Publisher('tcp://127.0.0.1:{port}')", "send()"),
            ("Publisher('tcp://127.0.0.1:{port}')", "send(); time.sleep(30)"),
            ("Publisher('tcp://127.0.0.1:{port}')", "run('fork')"),
            ("NoisyPublisher('pub', {port})", "run('fork', True)"),
        ],
    )
    def test_a_publisher_that_is_not_stopped(self, kind, how, tmp_path):
        """What it has sent still comes, as after `stop`: if it is out of scope, and in a child of multiprocessing."""
        port = free_port()
        code = f"""
import multiprocessing, sys, time, warnings, posttroll
warnings.simplefilter("ignore")

kept = []

def send(is_kept=False):
    publisher = posttroll.{kind.format(port=port)}.start()
    for number in range(5):
        publisher.send(posttroll.Message("/a", "info", number))
    kept.extend([publisher] * is_kept)

def run(method, *args):
    worker = multiprocessing.get_context(method).Process(target=send, args=args)
    worker.start()
    worker.join()
    sys.exit(worker.exitcode)

if __name__ == "__main__":
    {how}
"""
        script = tmp_path / "script.py"  # a file, as spawned children read it
        script.write_text(code)
        environment = {**os.environ, "POSTTROLL_DISCOVERY_SECONDS": "1.5"}
        with (
            posttroll.Subscriber([local_address(port)]) as sub,
            process(sys.executable, script, env=environment) as running,
        ):
            assert sorted(received_data(sub, 5)) == list(range(5))  # what is live may come first
            if "sleep" not in how:
                assert finish(running) == (0, "", "")

    def test_fork_after_use(self):
        """Parent and child can both work; what the parent has made stays the parent's."""
        code = """
import os, sys, posttroll
from posttroll import Message

def talk(publisher, subscriber, data):
    assert publisher.wait_for_subscribers(1, 20)
    publisher.send(Message("/a", "info", data))
    while True:
        message = next(subscriber.recv(timeout=20))
        if message.data == data:
            return

publisher = posttroll.NoisyPublisher("pub", nameservers=["localhost"]).start()
address = f"tcp://127.0.0.1:{publisher.port_number}"
subscriber = posttroll.Subscriber([address])
listener = posttroll.ListenerContainer(["/a"], addresses=[address], nameserver=False)
talk(publisher, subscriber, "before")
try:
    posttroll.get_pub_address("pub", timeout=0.01)
except TimeoutError:
    pass
child = os.fork()
if not child:
    for use in (lambda: publisher.send("x"), lambda: next(subscriber.recv(timeout=1))):
        try:
            use()
        except RuntimeError as error:
            assert "before the fork" in str(error)
        else:
            raise AssertionError("It can be used in the child")
    with posttroll.Publisher("tcp://*:0") as own:
        with posttroll.Subscriber([f"tcp://127.0.0.1:{own.port_number}"]) as own_subscriber:
            talk(own, own_subscriber, "child")
    listener.stop()
    subscriber.close()
    publisher.stop()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
talk(publisher, subscriber, "after")
while listener.output_queue.get(timeout=20).data != "after":
    pass
listener.stop()
subscriber.close()
publisher.stop()
print("done")
"""
        with python("import warnings; warnings.simplefilter('ignore')\n" + code) as running:
            status, out, err = finish(running)
            assert (status, out) == (0, "done\n"), err

    def test_nothing_is_left_open_by_starting_and_stopping(self):
        """Dozens of rounds leave no file descriptor, no thread and no socket behind."""

        def once() -> None:
            with posttroll.Publish("pub", nameservers=["localhost"]) as publisher:
                address = local_address(publisher.port_number)
                with posttroll.Subscriber([address]) as subscriber:
                    publisher.wait_for_subscribers(1, DEADLINE)
                    subscriber.add(local_address(9), ["/other"])
                    subscriber.remove(local_address(9))
                posttroll.ListenerContainer(["/a"], services="pub").stop()
                posttroll.NSSubscriber("pub", timeout=0, addr_listener=True).start().close()
            receiver = posttroll_ns.AddressReceiver().start()
            receiver.stop()
            with nameserver():
                uris()

        once()
        before = descriptors_of()
        for _ in range(20):
            once()
        wait_for(lambda: descriptors_of() <= before + 2)

    def test_stop_does_not_wait_for_a_stuck_subscriber(self):
        """What a subscriber does not take in time is left to the background."""
        with posttroll.Publisher("tcp://*:0") as publisher, raw_socket(zmq.SUB) as stuck:
            stuck.rcvhwm = 1
            stuck.subscribe(b"")
            stuck.connect(local_address(publisher.port_number))
            assert publisher.wait_for_subscribers(1, DEADLINE)
            for _ in range(20_000):
                publisher.send("x" * 2000)
            start = time.monotonic()
            publisher.stop()
            assert time.monotonic() - start < 10  # not the half minute that the rest may take


def interrupted(function: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
    """Return a function that does what *function* does, and then, once in this thread, has Control-C come."""
    calls, here = itertools.count(1), threading.get_ident()

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if threading.get_ident() == here and next(calls) == at:
            del result
            raise KeyboardInterrupt
        return result

    return interrupt


def _is_listening(address: str) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0


@pytest.mark.filterwarnings("ignore:unclosed :ResourceWarning")  # what is forgotten, in the order of the collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO")
class TestControlC:
    """Wherever it comes, no thread, no socket and no announcement is left (the fixture looks), and all can be used."""

    @staticmethod
    def talk(publisher: Any) -> None:
        """Let *publisher* send something to a new subscriber."""
        with publisher, posttroll.Subscriber([local_address(publisher.start().port_number)]) as subscriber:
            assert publisher.wait_for_subscribers(1, DEADLINE)
            publisher.send(posttroll.Message("/a", "info", "again"))
            assert receive(subscriber, 1)[0].data == "again"

    @pytest.mark.parametrize(
        "code",
        [
            "posttroll.Subscriber([address])",
            "posttroll.NSSubscriber('a', addr_listener=True, timeout=0).start()",
            "publisher.stop()",
            "posttroll.close_flushed(posttroll.set_up_server_socket(zmq.REP, 'tcp://127.0.0.1:0')[0], 1)",
            "posttroll.config.set(backend='secure_zmq'); posttroll.Publisher('tcp://*:0').start()",
        ],
    )
    def test_as_a_monitor_has_been_opened(self, keys, code, monkeypatch):
        """Were it closed before its socket, ZeroMQ would wait for ever."""
        program = f"""
            import gc, posttroll, zmq

            def interrupted(*args):
                posttroll._open_monitor = real
                real(*args)
                raise KeyboardInterrupt

            publisher = posttroll.Publisher("tcp://127.0.0.1:0").start()
            address = f"tcp://127.0.0.1:{{publisher.port_number}}"
            listening = posttroll.Subscriber([address])
            assert publisher.wait_for_subscribers(1, {DEADLINE})
            real, posttroll._open_monitor = posttroll._open_monitor, interrupted
            try:
                {code}
            except KeyboardInterrupt:
                print("interrupted")
            gc.collect()
            for _ in range(2):
                with posttroll.Publisher("tcp://127.0.0.1:0") as other:
                    with posttroll.Subscriber([f"tcp://127.0.0.1:{{other.port_number}}"]):
                        assert other.wait_for_subscribers(1, {DEADLINE})
                        other.send("x")
            listening.close()
            publisher.stop()
            print("done")
        """
        monkeypatch.setenv("POSTTROLL_BACKEND", "unsecure_zmq")
        with python(inspect.cleandoc(program)) as running:
            status, out, err = finish(running)
            assert (status, out) == (0, "interrupted\ndone\n"), err

    def test_subscribers_are_forgotten(self, monkeypatch, tmp_path):
        """Python ends what is forgotten in an order that its random seed decides; sockets go before their monitors."""
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(tmp_path))
        program = f"""
            import gc, posttroll

            posttroll.Publisher.LINGER_SECONDS = 3
            with posttroll.Publisher("tcp://127.0.0.1:0") as publisher:
                subscriber = posttroll.Subscriber([f"tcp://127.0.0.1:{{publisher.port_number}}"], durable="a")
                assert publisher.wait_for_subscribers(1, {DEADLINE})
                publisher.send(posttroll.Message("/a", "info"))
                for message in subscriber.recv({DEADLINE}):
                    break
                del subscriber
                gc.collect()
        """
        with contextlib.ExitStack() as stack:
            settings = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(8)]
            programs = [stack.enter_context(python(inspect.cleandoc(program), env=each)) for each in settings]
            assert [finish(running) for running in programs] == 8 * [(0, "", "")]

    def test_while_a_subscriber_is_made(self, monkeypatch):
        """What is half made can be forgotten."""
        monkeypatch.setattr(posttroll, "_Inbox", interrupted(posttroll._Inbox))
        with pytest.raises(KeyboardInterrupt):
            posttroll.Subscriber([local_address(9)])
        gc.collect()
        monkeypatch.setattr(posttroll._Link, "__init__", interrupted(posttroll._Link.__init__))
        with pytest.raises(KeyboardInterrupt):
            posttroll.Subscriber([local_address(9)])

    def test_while_a_subscriber_is_closed(self, monkeypatch):
        """The rest is closed when it is forgotten."""
        subscriber = posttroll.Subscriber([local_address(9)])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(subscriber._connections, "close", interrupted(lambda: None))
            subscriber.close()
        del subscriber
        gc.collect()

    def test_while_access_control_starts(self, monkeypatch):
        config.set(authorized_client_addresses=["127.0.0.1"])
        call = posttroll.Loop.call
        monkeypatch.setattr(posttroll.Loop, "call", interrupted(call))
        with pytest.raises(KeyboardInterrupt) as caught:
            posttroll.Publisher("tcp://127.0.0.1:0").start()
        self.talk(posttroll.Publisher("tcp://127.0.0.1:0"))
        del caught

    @pytest.mark.parametrize("name", ["_Pulse", "_Audience"])
    def test_while_a_publisher_starts(self, name, monkeypatch):
        """The port is free for the next attempt."""
        config.set(authorized_client_addresses=["127.0.0.1"], heartbeat_interval=3600)
        publisher = posttroll.Publisher(f"tcp://127.0.0.1:{free_port()}")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(posttroll, name, mock.Mock(side_effect=KeyboardInterrupt))
            publisher.start()
        wait_for(lambda: posttroll._access_control is None)
        wait_for(lambda: not _is_listening(publisher.address))
        self.talk(publisher)

    @pytest.mark.parametrize("key", ["history_messages", "heartbeat_interval", "discovery_seconds"])
    def test_a_setting_that_is_found_to_be_wrong_late(self, key):
        """The same goes for another exception than Control-C."""
        publisher = posttroll.Publisher(f"tcp://127.0.0.1:{free_port()}")
        with config.set({key: "nonsense"}, authorized_client_addresses=["127.0.0.1"]):
            for _ in range(2):
                with pytest.raises(ConfigurationError, match=key):
                    publisher.start()
        self.talk(publisher)

    def test_while_a_publisher_stops(self, monkeypatch):
        config.set(authorized_client_addresses=["127.0.0.1"])
        publisher = posttroll.Publisher("tcp://127.0.0.1:0").start()
        publisher.send("x")
        monkeypatch.setattr(posttroll._Ending, "_wait", interrupted(lambda *_: True))
        with pytest.raises(KeyboardInterrupt):
            publisher.stop()
        wait_for(lambda: posttroll._access_control is None)

    def test_while_the_last_messages_go_out(self, monkeypatch):
        publisher = posttroll.Publisher("tcp://127.0.0.1:0").start()
        publisher.send("x")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(posttroll, "_is_over", mock.Mock(side_effect=KeyboardInterrupt))
            publisher.stop()
        assert len(posttroll._lingering_monitors) == 1
        self.talk(publisher)
        assert posttroll._lingering_monitors == []

    def test_while_a_publisher_begins_to_announce_itself(self, monkeypatch):
        start = posttroll.AddressServiceBroadcaster.start
        monkeypatch.setattr(posttroll.AddressServiceBroadcaster, "start", interrupted(start))
        with pytest.raises(KeyboardInterrupt):
            posttroll.NoisyPublisher("pub", nameservers=["localhost"]).start()

    def test_while_a_publisher_says_goodbye(self, monkeypatch):
        """It is not announced any more."""
        publisher = posttroll.NoisyPublisher("pub", nameservers=["localhost"]).start()
        interrupt = mock.PropertyMock(side_effect=KeyboardInterrupt)
        monkeypatch.setattr(posttroll.AddressServiceBroadcaster, "_GOODBYE_SECONDS", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publisher.stop()

    @pytest.mark.parametrize(
        ("at", "make"),
        [
            (1, lambda: posttroll.Publisher("tcp://127.0.0.1:0").start()),
            (1, lambda: posttroll.ListenerContainer(["/a"], addresses=[local_address(9)], nameserver=False)),
            (2, lambda: posttroll_ns.AddressReceiver(multicast_enabled=False).start()),
        ],
        ids=["publisher", "listener", "address receiver"],
    )
    def test_while_a_thread_starts(self, at, make, monkeypatch):
        monkeypatch.setattr(threading.Thread, "start", interrupted(threading.Thread.start, at))
        with pytest.raises(KeyboardInterrupt):
            make()

    def test_while_an_address_receiver_stops(self, monkeypatch):
        config.set(authorized_client_addresses=["127.0.0.1"])
        receiver = posttroll_ns.AddressReceiver(multicast_enabled=False).start()
        monkeypatch.setattr(posttroll._Ending, "drain", interrupted(lambda *_: 0))
        with pytest.raises(KeyboardInterrupt):
            receiver.stop()
        wait_for(lambda: posttroll._access_control is None)

    def test_a_log_handler_that_cannot_be_made(self):
        """It is not one of those that are closed at the end of the program."""
        code = """
import sys, posttroll
try:
    posttroll.PytrollHandler("no name")
except ValueError as error:
    kept = error
"""
        with python(code) as running:
            assert finish(running) == (0, "", "")


# -- loss --


class TestNothingIsLostInSilence:
    def test_a_burst_to_a_busy_subscriber_arrives(self):
        """100,000 messages of 500 bytes, none of which is taken until all are sent; memory stays bounded."""
        send = """
import sys, posttroll
publisher = posttroll.Publisher("tcp://*:0").start()
print(publisher.port_number, flush=True)
publisher.wait_for_subscribers(1)
for number in range(100_000):
    publisher.send(posttroll.Message("/burst", "info", f"{number} ".ljust(420, "x")))
print("sent", flush=True)
sys.stdin.read()
print(publisher.dropped)
"""
        take = """
import sys, posttroll
with posttroll.Subscriber([sys.argv[1]]) as subscriber:
    sys.stdin.readline()
    for number, message in zip(range(100_000), subscriber.recv()):
        assert message.data.startswith(f"{number} "), (number, message.data)
    print("all", flush=True)
    sys.stdin.read()
"""
        with python(send) as sending:
            with python(take, local_address(int(sending.stdout.readline()))) as taking:
                await_line(sending, "sent")
                taking.stdin.write("\n")
                taking.stdin.flush()
                await_line(taking, "all")
                assert memory_of(sending) < 300
                assert memory_of(taking) < 300
                assert finish(taking)[::2] == (0, "")
            assert finish(sending)[1] == "0\n"

    def test_many_threads_send(self):
        """8 threads send 40,000 messages as fast as they can: all arrive, those of a thread in their order."""
        received: dict[int, list[int]] = {thread: [] for thread in range(8)}
        with connected_pair() as (publisher, subscriber):

            def send(thread: int) -> None:
                for number in range(5000):
                    publisher.send(posttroll.Message("/threads", "info", [thread, number]))

            threads = [threading.Thread(target=send, args=(thread,)) for thread in range(8)]
            for thread in threads:
                thread.start()
            for message in receive(subscriber, 40_000, 60):
                received[message.data[0]].append(message.data[1])
            for thread in threads:
                thread.join()
            assert publisher.dropped == 0
        assert received == {thread: list(range(5000)) for thread in range(8)}

    def test_all_that_was_sent_before_stop_arrives(self):
        with connected_pair() as (publisher, subscriber):
            for number in range(1000):
                publisher.send(posttroll.Message("/a", "info", number))
            publisher.stop()
            assert [message.data for message in receive(subscriber, 1000)] == list(range(1000))

    def test_loss_is_visible_and_only_of_the_slow(self, caplog):
        """A subscriber that never reads: counted, logged a few times, and no loss for another one."""
        config.set(send_high_water_mark=100)
        count = 20_000
        with posttroll.Publisher("tcp://*:0", name="pub") as publisher:
            address = local_address(publisher.port_number)
            with raw_socket(zmq.SUB) as stuck, posttroll.Subscriber([address]) as good:
                stuck.rcvhwm = 1
                stuck.subscribe(b"")
                stuck.connect(address)
                assert publisher.wait_for_subscribers(2, DEADLINE)
                arrived = []
                for number in range(count):
                    publisher.send(posttroll.Message("/a", "info", f"{number} ".ljust(2000)))
                    if number % 50 == 49:
                        arrived += [int(message.data.split()[0]) for message in receive(good, 50)]
                assert arrived == list(range(count))
                assert good.missed == 0
                assert 0 < publisher.dropped < count
        warnings = [record for record in caplog.records if "slow subscriber" in record.getMessage()]
        assert 0 < len(warnings) <= 5
        assert {record.name for record in warnings} == {"posttroll.publisher"}

    def test_a_busy_subscriber_is_not_taken_for_dead(self):
        """Its queue is full for several times the time after which silent peers are given up; it gets everything."""
        config.set(
            zmtp_heartbeat_interval=0.1,
            zmtp_heartbeat_timeout=0.3,
            receive_high_water_mark=100,
            send_high_water_mark=1_000_000,
        )
        with connected_pair() as (publisher, subscriber):
            for number in range(5000):
                publisher.send(posttroll.Message("/a", "info", f"{number} ".ljust(5000)))
            time.sleep(1.5)  # being busy
            arrived = [int(message.data.split()[0]) for message in receive(subscriber, 5000)]
            assert arrived == list(range(5000))

    @pytest.mark.parametrize("limit", [0, 100])
    def test_a_publisher_that_dies_while_its_subscriber_is_busy(self, limit):
        """The subscriber survives, and hears the next publisher on that port."""
        config.set(zmtp_heartbeat_interval=0.1, zmtp_heartbeat_timeout=0.3, receive_high_water_mark=limit)
        code = """
import sys, posttroll
publisher = posttroll.Publisher(f"tcp://*:{sys.argv[1]}").start()
publisher.wait_for_subscribers(1)
for number in range(5000):
    publisher.send(posttroll.Message("/a", sys.argv[2], "x" * 5000))
print("sent", flush=True)
sys.stdin.read()
"""
        port = free_port()
        with posttroll.Subscriber([local_address(port)]) as subscriber:
            with python(code, port, "first") as running:
                await_line(running, "sent")
            time.sleep(1)  # being busy
            with python(code, port, "second"):
                messages = subscriber.recv(timeout=DEADLINE)
                assert "second" in (message.type for message in messages if message is not None)

    def test_a_publisher_that_does_not_send_notes_who_comes_and_goes(self):
        """Else ZeroMQ keeps all of it in memory until the publisher sends again."""
        with posttroll.Publish("pub", nameservers=["localhost"], broadcast_interval=0.05) as noisy:
            publisher = noisy._publisher
            for _ in range(3):
                with raw_socket(zmq.SUB, publisher.port_number) as strange:
                    strange.subscribe(b"pytroll:/")
                    wait_for(lambda: publisher._audience.strangers == 1)
                wait_for(lambda: publisher._audience.strangers == 0)


# ======================================================================================================================
# Access control and keys: CURVE on every connection, allow lists, what strangers get
# ======================================================================================================================


LOOPBACK = "127.0.0.1"
TEXT = "pytroll://data info a@b 2026-01-01T00:00:00 v1.01 text/ascii "


class Keys:
    """Keys of a server, of a client that it knows, and of a stranger; this process and its children use them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory / "keys"
        self.clients = self.directory / "clients"
        for name in ("server", "friend", "stranger", "other_server"):
            posttroll.write_key_pair(name, self.directory)
        self.clients.mkdir()
        self.admit("friend")
        settings = {
            "BACKEND": "secure_zmq",
            "SERVER_SECRET_KEY_FILE": self.directory / "server.key_secret",
            "CLIENTS_PUBLIC_KEYS_DIRECTORY": self.clients,
            "CLIENT_SECRET_KEY_FILE": self.directory / "friend.key_secret",
            "SERVER_PUBLIC_KEY_FILE": self.directory / "server.key",
            # One secure port is enough, and 5558 may be in use.
            "SECURE_ZMQ_NAMESERVER_PORT": os.environ["POSTTROLL_NAMESERVER_PORT"],
        }
        for name, value in settings.items():
            monkeypatch.setenv("POSTTROLL_" + name, str(value))

    def admit(self, name: str) -> None:
        """Put the public key of a client into the directory, in one step, as an operator should."""
        new = self.clients / f"{name}.new"
        new.write_bytes((self.directory / f"{name}.key").read_bytes())
        new.rename(self.clients / f"{name}.key")

    def expel(self, name: str) -> None:
        (self.clients / f"{name}.key").unlink()

    def of(self, kind: str) -> dict[str, str]:
        """Return the settings of a client that must not get in."""
        return {
            "unknown key": {"client_secret_key_file": str(self.directory / "stranger.key_secret")},
            "no CURVE": {"backend": "unsecure_zmq"},
            "wrong server key": {"server_public_key_file": str(self.directory / "other_server.key")},
        }[kind]


@pytest.fixture
def keys(isolated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    return Keys(tmp_path, monkeypatch)


strangers = pytest.mark.parametrize("stranger", ["unknown key", "no CURVE", "wrong server key"])


@contextlib.contextmanager
def publishing(**settings: Any) -> Iterator[posttroll.Publisher]:
    with config.set(settings):
        publisher = posttroll.Publisher("tcp://*:0").start()
    with publisher:
        yield publisher


@contextlib.contextmanager
def subscribing(port: int | None, host: str = LOOPBACK, **settings: Any) -> Iterator[posttroll.Subscriber]:
    with config.set(settings):
        subscriber = posttroll.Subscriber([f"tcp://{host}:{port}"])
    with subscriber:
        yield subscriber


def is_known(name: str) -> bool:
    """Whether the nameserver knows a publisher of this name."""
    return bool(posttroll.get_pub_address(name, DEADLINE))


def deliver(publisher: Any, subscriber: posttroll.Subscriber, text: str, timeout: float = DEADLINE) -> bool:
    """Send *text* again and again until the subscriber gets it; return whether it did."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        publisher.send(TEXT + text)
        message = next(subscriber.recv(timeout=0.05))
        if message is not None and message.data == text:
            return True
    return False


def was_refused(caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    """Return the condition that a handshake has failed at one of our servers."""
    return lambda: "Refused a client at" in caplog.text or "A handshake of" in caplog.text


PUBLISHING_PROCESS = """
import sys, posttroll
with posttroll.Publish("chain", nameservers=sys.argv[1:] or None) as publisher:
    print("publishing", flush=True)
    while not publisher.wait_for_subscribers(1, 1):
        pass
    for word in ("one", "two", "three"):
        publisher.send(posttroll.Message("/chain", "info", word))
"""

SUBSCRIBING_PROCESS = """
import sys, posttroll
with posttroll.Subscribe("chain", "/chain", addr_listener=bool(sys.argv[1:]), timeout=20) as subscriber:
    for _, message in zip(range(3), subscriber.recv()):
        print(message.data, flush=True)
"""


class TestSecureChain:
    """Nameserver, publisher and subscriber in processes of their own, set up by the environment alone."""

    @pytest.mark.parametrize("listen", [True, False], ids=["addr_listener", "lookups"])
    @pytest.mark.parametrize("multicast", [True, False], ids=["multicast", "no-multicast"])
    def test_messages_arrive(self, keys, multicast, listen):
        with nameserver_process(*([] if multicast else ["--no-multicast"])):
            with python(SUBSCRIBING_PROCESS, *(["listen"] if listen else [])) as subscriber:
                with python(PUBLISHING_PROCESS, *([] if multicast else ["localhost"])) as publisher:
                    assert finish(subscriber) == (0, "one\ntwo\nthree\n", "")
                    assert finish(publisher)[0] == 0

    @pytest.mark.parametrize("setting", ["BACKEND", "CLIENT_SECRET_KEY_FILE"])
    def test_a_stranger_process_gets_nothing(self, keys, setting):
        value = {"BACKEND": "unsecure_zmq", "CLIENT_SECRET_KEY_FILE": str(keys.directory / "stranger.key_secret")}
        environment = {**os.environ, f"POSTTROLL_{setting}": value[setting]}
        code = "import posttroll; print(posttroll.get_pub_address('chain', 1))"
        with nameserver_process("--no-multicast"), python(PUBLISHING_PROCESS, "localhost"):
            wait_for(lambda: is_known("chain"))
            with python(code, env=environment) as stranger:
                status, out, err = finish(stranger)
            assert (status, out) == (1, "")
            assert "TimeoutError" in err

    def test_the_nameserver_answers_on_a_second_port_where_newer_peers_look(self, keys, monkeypatch):
        second = free_port()
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", str(second))
        with nameserver():
            for port in (second, config.get("nameserver_port")):
                with config.set(secure_zmq_nameserver_port=port):
                    assert posttroll.get_pub_address("nobody", DEADLINE) == []

    def test_an_unsecure_nameserver_with_keys_answers_secure_clients_too(self, keys, monkeypatch):
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", str(free_port()))
        with config.set(backend="unsecure_zmq"), nameserver():
            assert posttroll.get_pub_address("nobody", DEADLINE) == []
            with config.set(backend="secure_zmq"):
                assert posttroll.get_pub_address("nobody", DEADLINE) == []
                with config.set(keys.of("unknown key")), pytest.raises(TimeoutError):
                    posttroll.get_pub_address("nobody", 0.5)


class TestStrangers:
    """Clients without a key on the list, on each kind of connection, beside one that may."""

    @strangers
    def test_learn_nothing_of_those_who_listen(self, keys, stranger):
        with publishing() as pub, subscribing(pub.port_number) as sub:
            assert pub.wait_for_subscribers(1, DEADLINE)
            assert next(sub.recv(0.1)) is None
            address = local_address(pub.port_number)
            with contextlib.closing(posttroll.Inquiry(address)) as friend, config.set(keys.of(stranger)):
                assert friend.ask(DEADLINE)["subscribers"] == 1
                with contextlib.closing(posttroll.Inquiry(address)) as inquiry:
                    assert inquiry.ask(0.3) is None

    @strangers
    def test_receive_no_messages(self, keys, stranger, caplog):
        with publishing() as publisher, subscribing(publisher.port_number, **keys.of(stranger)) as outside:
            wait_for(was_refused(caplog))
            with subscribing(publisher.port_number) as inside:
                assert publisher.wait_for_subscribers(1, DEADLINE)
                publisher.send(TEXT + "secret")
                assert [message.data for message in receive(inside)] == ["secret"]
                assert receive(outside, timeout=0.3) == []
                assert publisher.subscriber_count == 1

    @strangers
    def test_get_no_answer_from_the_nameserver(self, keys, stranger):
        with nameserver():
            with config.set(keys.of(stranger)), pytest.raises(TimeoutError):
                posttroll.get_pub_address("", 0.5)
            assert posttroll.get_pub_address("", DEADLINE) == []

    @strangers
    def test_cannot_register(self, keys, stranger, caplog):
        with nameserver():
            with config.set(keys.of(stranger)):
                outside = posttroll.NoisyPublisher("outside", nameservers=["localhost"], broadcast_interval=0.1).start()
                wait_for(lambda: outside._broadcaster._targets[0]._socket)  # with these keys
            try:
                wait_for(was_refused(caplog))
                with posttroll.Publish("inside", nameservers=["localhost"]):
                    wait_for(lambda: is_known("inside"))
                assert not is_known("outside")
            finally:
                outside.stop()

    @strangers
    def test_hear_nothing_on_the_address_port(self, keys, stranger, caplog):
        port = config.get("address_publish_port")
        with nameserver(), subscribing(port, **keys.of(stranger)) as outside:
            wait_for(was_refused(caplog))
            with subscribing(port) as inside:
                with posttroll.Publish("service", nameservers=["localhost"]):
                    # The first news may come before the subscription has arrived; later there is more.
                    numbers = iter(range(1000))
                    with contextlib.ExitStack() as stack:

                        def hears_news() -> list[posttroll.Message]:
                            name = f"service{next(numbers)}"
                            stack.enter_context(posttroll.Publish(name, nameservers=["localhost"]))
                            return receive(inside, timeout=0.5)

                        wait_for(hears_news)
                assert receive(outside, timeout=0.3) == []

    def test_a_plain_publisher_injects_nothing_into_a_secure_subscriber(self, keys):
        with publishing(backend="unsecure_zmq") as outside, publishing() as inside:
            addresses = [f"tcp://{LOOPBACK}:{publisher.port_number}" for publisher in (outside, inside)]
            with posttroll.Subscriber(addresses) as subscriber:
                for _ in range(10):
                    outside.send(TEXT + "injected")
                    assert deliver(inside, subscriber, "good")
                assert outside.subscriber_count == 0

    @pytest.mark.parametrize("greeting", [b"\x01\x00", b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x02\0\0"], ids=["1.0", "2.0"])
    def test_peers_of_old_protocols_without_security_are_disconnected(self, keys, greeting):
        with publishing() as publisher, socket.create_connection((LOOPBACK, publisher.port_number)) as peer:
            peer.settimeout(DEADLINE)
            peer.sendall(greeting + b"\x01\x02\x01\x00")  # the subscription to everything, in either version
            publisher.send(TEXT + "secret")
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while True:
                    chunk = peer.recv(1000)
                    if not chunk:
                        break
                    received += chunk
                    publisher.send(TEXT + "secret")
            assert b"secret" not in received

    def test_do_not_slow_the_others_down(self, keys, caplog):
        kinds = ["unknown key", "no CURVE", "wrong server key"] * 5
        with publishing() as publisher, contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(subscribing(publisher.port_number, **keys.of(kind)))
            silent = [socket.create_connection((LOOPBACK, publisher.port_number)) for _ in range(50)]
            try:
                wait_for(was_refused(caplog))
                with subscribing(publisher.port_number) as inside:
                    assert publisher.wait_for_subscribers(1, DEADLINE)
                    for number in range(5000):
                        publisher.send(TEXT + str(number))
                    assert [message.data for message in receive(inside, 5000)] == [str(n) for n in range(5000)]
                assert publisher.dropped == 0
            finally:
                for connection in silent:
                    connection.close()


class TestOtherKeys:
    """Keys are exchanged while programs run."""

    @pytest.mark.parametrize("which", ["server", "friend"])
    def test_a_subscriber_connects_with_the_new_ones(self, keys, which, monkeypatch):
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.2)
        port = free_port()
        with subscribing(port) as sub:
            with posttroll.Publisher(f"tcp://*:{port}") as pub:
                assert deliver(pub, sub, "before")
            for file in (f"{which}.key", f"{which}.key_secret"):
                (keys.directory / file).unlink()
            posttroll.write_key_pair(which, keys.directory)
            keys.admit("friend")
            with posttroll.Publisher(f"tcp://*:{port}") as pub:
                assert deliver(pub, sub, "afterwards")


class TestKeyDirectory:
    """The directory of the clients' keys may change at any time."""

    @pytest.fixture(autouse=True)
    def soon_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that was refused tries again after this time."""
        monkeypatch.setattr(posttroll, "_HANDSHAKE_MILLISECONDS", 1000)

    def test_a_client_that_waits_gets_in_when_its_key_is_added(self, keys, caplog):
        with publishing() as publisher, subscribing(publisher.port_number, **keys.of("unknown key")) as waiting:
            wait_for(lambda: "is not in" in caplog.text)
            keys.admit("stranger")
            assert deliver(publisher, waiting, "welcome", 40)

    def test_without_its_key_a_client_keeps_its_connections_and_gets_no_new_ones(self, keys, caplog):
        with publishing() as publisher, subscribing(publisher.port_number) as standing:
            assert deliver(publisher, standing, "before")
            keys.expel("friend")
            with subscribing(publisher.port_number) as late:
                wait_for(lambda: "is not in" in caplog.text)
                assert deliver(publisher, standing, "after")
                assert receive(late, timeout=0.3) == []

    def test_a_key_that_is_exchanged_in_place_counts_at_once(self, keys, caplog):
        with publishing() as publisher:
            with subscribing(publisher.port_number) as friend:
                assert deliver(publisher, friend, "friend")
            new = keys.clients / "new"
            new.write_bytes((keys.directory / "stranger.key").read_bytes())
            new.rename(keys.clients / "friend.key")
            with subscribing(publisher.port_number, **keys.of("unknown key")) as exchanged:
                assert deliver(publisher, exchanged, "exchanged")
            with subscribing(publisher.port_number) as friend:
                wait_for(lambda: "is not in" in caplog.text)
                publisher.send(TEXT + "no more")
                assert receive(friend, timeout=0.3) == []

    def test_what_is_no_key_in_the_directory_locks_nobody_out(self, keys, caplog):
        (keys.clients / "dangling.key").symlink_to(keys.clients / "nothing")
        (keys.clients / "a_loop.key").symlink_to(keys.clients / "a_loop.key")
        (keys.clients / "z_loop.key").symlink_to(keys.clients / "z_loop.key")
        (keys.clients / "through_a_file.key").symlink_to(keys.clients / "friend.key" / "x")
        (keys.clients / "directory.key").mkdir()
        (keys.clients / "broken.key").write_text('curve\n    public-key = "too short"\n')
        (keys.clients / "blank.key").write_text("\n" * 60000)
        os.mkfifo(keys.clients / "pipe.key")
        with publishing() as publisher, subscribing(publisher.port_number) as friend:
            assert deliver(publisher, friend, "good")
            keys.admit("stranger")
            with subscribing(publisher.port_number, **keys.of("unknown key")) as stranger:
                assert deliver(publisher, stranger, "good too")
        for name in ("broken", "a_loop", "z_loop", "dangling", "through_a_file"):
            assert f"{keys.clients / name}.key is not used" in caplog.text

    def test_a_directory_in_place_of_a_key_lets_nobody_in(self, keys):
        known = posttroll.ClientKeys("clients_public_keys_directory")
        key = posttroll._read_keys(str(keys.clients / "friend.key"))["public"]
        assert key in known
        keys.expel("friend")
        (keys.clients / "friend.key").mkdir()
        assert key not in known

    def test_a_file_is_read_again_only_if_it_has_changed(self, keys):
        """However many there are, and whatever is wrong with one of them."""
        (keys.clients / "loop.key").symlink_to(keys.clients / "loop.key")
        for number in range(20):
            shutil.copy(keys.directory / "stranger.key", keys.clients / f"{number}.key")
        known = posttroll.ClientKeys("clients_public_keys_directory")
        key = posttroll._read_keys(str(keys.clients / "friend.key"))["public"]
        assert key in known
        keys.admit("other_server")
        other = posttroll._read_keys(str(keys.clients / "other_server.key"))["public"]
        with mock.patch("posttroll._read_keys", wraps=posttroll._read_keys) as read:
            assert other in known
        assert [call.args for call in read.call_args_list] == [(str(keys.clients / "other_server.key"),)]

    @staticmethod
    def settled(keys: Keys) -> tuple[Any, bytes, bytes]:
        """Return the directory, which has not changed for a long time, with a key in it and one that is not."""
        os.utime(keys.clients, (1e9, 1e9))
        known = posttroll.ClientKeys("clients_public_keys_directory")
        names = ("friend", "stranger")
        friend, stranger = (posttroll._read_keys(str(keys.directory / f"{name}.key"))["public"] for name in names)
        assert friend in known
        return known, friend, stranger

    def test_who_comes_again_costs_a_look_at_one_file(self, keys):
        for number in range(20):
            posttroll.write_key_pair(f"{number}", keys.clients)
        known, friend, _ = self.settled(keys)
        with mock.patch("os.scandir", side_effect=AssertionError("It reads the directory")):
            for _ in range(100):
                assert friend in known

    def test_who_is_refused_again_and_again_costs_little(self, keys):
        known, friend, stranger = self.settled(keys)
        with mock.patch("os.scandir", wraps=os.scandir) as read, mock.patch.object(known, "PAUSE", 1e9):
            for _ in range(100):
                assert stranger not in known
            assert read.call_count <= 1
            shutil.copy(
                keys.directory / "stranger.key", keys.clients / "friend.key"
            )  # this leaves the directory as it was
            for _ in range(100):
                assert friend not in known
            assert stranger in known
            assert read.call_count <= 2
            shutil.copy(keys.directory / "friend.key", keys.clients / "friend.key")
            later = time.monotonic() + 1e10
            with mock.patch("time.monotonic", return_value=later):
                assert friend in known

    def test_in_spite_of_that_all_that_changes_counts_at_once(self, keys):
        known, friend, stranger = self.settled(keys)
        with mock.patch.object(known, "PAUSE", 1e9):
            assert stranger not in known
            keys.admit("stranger")
            assert stranger in known
            shutil.copy(keys.clients / "stranger.key", keys.clients / "a copy.key")
            assert stranger in known
            os.utime(keys.clients, (1e9, 1e9))
            assert friend in known
            keys.expel("stranger")
            assert stranger in known  # each file stands for itself
            (keys.clients / "a copy.key").unlink()
            os.utime(keys.clients, (1e9, 1e9))
            assert stranger not in known
            keys.clients.rename(keys.directory / "moved")
            assert friend not in known
            (keys.directory / "moved").rename(keys.clients)
            assert friend in known

    def test_a_change_just_after_reading_is_seen(self, keys):
        """Also if the time of the directory is too coarse to show it."""
        known, _, stranger = self.settled(keys)
        os.utime(keys.clients)
        times = os.stat(keys.clients)
        with (
            mock.patch.object(known, "PAUSE", 1e9),
            mock.patch("posttroll._file_state", lambda status: status.st_mtime_ns),
        ):
            assert stranger not in known
            keys.admit("stranger")
            os.utime(keys.clients, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert stranger in known

    def test_what_stays_in_the_process_needs_no_keys(self, keys, monkeypatch):
        """Also beside connections that do."""
        for setting in (*SERVER_SETTINGS, "client_secret_key_file", "server_public_key_file"):
            monkeypatch.delenv("POSTTROLL_" + setting.upper())
        inside, no_port, rules = posttroll.set_up_server_socket(zmq.XPUB, "inproc://inside")
        pushing, _, _ = posttroll.set_up_server_socket(zmq.PUSH, "inproc://pushed")
        pulled: list[Any] = []
        assert (no_port, rules) == (None, None)
        with inside, pushing, posttroll.Subscriber(["inproc://inside"]) as subscriber:
            subscriber.add_hook_pull("inproc://pushed", pulled.append)
            for setting, name in (
                ("client_secret_key_file", "friend.key_secret"),
                ("server_public_key_file", "server.key"),
            ):
                monkeypatch.setenv("POSTTROLL_" + setting.upper(), str(keys.directory / name))
            settings = {
                "server_secret_key_file": str(keys.directory / "server.key_secret"),
                "clients_public_keys_directory": str(keys.clients),
            }
            with publishing(**settings) as publisher:
                subscriber.add(f"tcp://{LOOPBACK}:{publisher.port_number}")
                assert deliver(publisher, subscriber, "by CURVE")
                inside.send_string(TEXT + "inside")
                pushing.send_string(TEXT + "pushed")
                wait_for(lambda: received_data(subscriber) == ["inside"])  # "by CURVE" may come more than once
                wait_for(lambda: next(subscriber.recv(0.01)) or pulled)
        assert [message.data for message in pulled] == ["pushed"]

    def test_a_key_that_could_not_be_read_is_read_later(self, keys):
        known = posttroll.ClientKeys("clients_public_keys_directory")
        key = posttroll._read_keys(str(keys.clients / "friend.key"))["public"]
        with mock.patch("posttroll._read_keys", side_effect=OSError(errno.EMFILE, "Too many open files")):
            assert key not in known
        assert key in known

    def test_without_the_directory_nobody_gets_in(self, keys, caplog):
        with publishing() as publisher:
            keys.clients.rename(keys.directory / "moved")
            with subscribing(publisher.port_number) as friend:
                wait_for(lambda: "No client is let in" in caplog.text)
                publisher.send(TEXT + "nobody")
                assert receive(friend, timeout=0.3) == []
                (keys.directory / "moved").rename(keys.clients)
                assert deliver(publisher, friend, "back", 40)


class TestHandshakeLog:
    """Failed handshakes are logged with the address of the peer, a few times a minute."""

    @strangers
    def test_names_the_address(self, keys, stranger, caplog):
        text = "Refused a client at 127.0.0.1" if stranger == "unknown key" else "A handshake of 127.0.0.1 failed"
        with publishing() as publisher:

            def is_logged() -> bool:
                with subscribing(publisher.port_number, **keys.of(stranger)):
                    wait_for(was_refused(caplog))
                found = text in caplog.text  # one that has gone too soon has no address any more
                caplog.clear()
                return found

            # With the limit out of the way, as a lost race for the address uses it up.
            posttroll._access_control._log.BURST = 1000
            wait_for(is_logged)

    @staticmethod
    def intrude(port: int | None, address: str) -> None:
        """Greet a secure port without CURVE, from an address of this host, until it hangs up."""
        with socket.create_connection((LOOPBACK, port), DEADLINE, (address, 0)) as peer:
            with contextlib.suppress(ConnectionError):
                peer.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL".ljust(64, b"\0"))
                while peer.recv(100):
                    pass

    def test_one_peer_does_not_silence_another(self, keys, caplog):
        with publishing() as publisher:
            for address, count in (("127.0.0.2", posttroll.LimitedLogger.BURST), ("127.0.0.3", 1)):
                text = f"A handshake of {address} failed"
                wait_for(lambda: self.intrude(publisher.port_number, address) or caplog.text.count(text) >= count)  # noqa: B023

    def test_commands_that_look_in_are_no_intruders(self, keys, caplog, monkeypatch):
        monkeypatch.setattr(posttroll._Doctor, "check_round_trip", lambda doctor: None)  # which ends at once
        with nameserver(), posttroll.Publish("chain", nameservers=["localhost"]) as publisher:
            wait_for(lambda: is_known("chain"))
            for words in (["services", "chain"], ["check", "chain"], ["doctor", "--no-multicast"]):
                status, out, _ = run_here(*words)
                assert not status, out
            ports = publisher.port_number, config.get("nameserver_port")
            for port, address in zip(ports, ("127.0.0.2", "127.0.0.3")):  # what was before is logged before
                text = f"A handshake of {address} failed"
                wait_for(lambda: self.intrude(port, address) or text in caplog.text)  # noqa: B023
        assert set(re.findall(r"A handshake of (\S+)", caplog.text)) <= {"127.0.0.2", "127.0.0.3", "an"}

    def test_many_peers_fill_no_memory(self):
        log = posttroll.LimitedLogger("backends.zmq.socket")
        for number in range(1000):
            log.warning(f"handshake 10.0.{number}", "failed")
        assert 1 <= len(log._kinds) <= log.KINDS

    def test_is_limited(self, keys, caplog):
        with publishing() as publisher, publishing() as other:
            for _ in range(3 * posttroll.LimitedLogger.BURST):
                with subscribing(publisher.port_number, **keys.of("unknown key")) as outside:
                    # Of two in a row, the first has been refused when the second has been let in.
                    with subscribing(other.port_number) as inside:
                        assert deliver(other, inside, "in")
                    assert receive(outside, timeout=0.01) == []
            lines = [record.getMessage() for record in caplog.records if "Refused a client" in record.getMessage()]
            assert 1 <= len(lines) <= posttroll.LimitedLogger.BURST

    def test_a_flood_of_broken_handshakes_leaves_nothing_behind(self, keys):
        with publishing() as publisher, subscribing(publisher.port_number) as friend:
            assert deliver(publisher, friend, "before")
            descriptors = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
            before = descriptors()
            for _ in range(1000):
                with socket.create_connection((LOOPBACK, publisher.port_number)) as peer:
                    peer.sendall(b"GET / HTTP/1.0\r\n\r\n" * 5)
            assert deliver(publisher, friend, "after")
            wait_for(lambda: descriptors() <= before + 2)
            service = posttroll._access_control
            wait_for(lambda: all(len(peers) <= 2 for peers in list(service._monitors.values())))


class FakePublisher:
    """A plain TCP port that speaks ZMTP without security to whoever connects, and records what it gets."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.heard: list[bytes] = []
        self._listener = socket.socket()
        self._listener.bind((LOOPBACK, 0))
        self._listener.listen(100)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.heard.append(self._talk(connection))

    def _talk(self, connection: socket.socket) -> bytes:
        """Offer a message; return all that the other side said until it went."""
        heard = b""
        message = (TEXT + "injected").encode()
        frame = b"\x00" + bytes([len(message)]) + message
        connection.settimeout(DEADLINE)
        ready = b"\x05READY\x0bSocket-Type\0\0\0\x03PUB"
        offers = {
            "3.1": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL".ljust(64, b"\0") + b"\x04" + bytes([len(ready)]) + ready,
            "2.0": b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x01\0\0",
            "1.0": b"\x01\x00",
        }
        if self.version == "1.0":
            frame = bytes([len(message) + 1, 0]) + message
        with contextlib.suppress(OSError):
            connection.sendall(offers[self.version] + frame)
            while True:
                chunk = connection.recv(1000)
                if not chunk:
                    break
                heard += chunk
        return heard

    def __enter__(self) -> FakePublisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE)


def announce_falsely(name: str, **data: Any) -> None:
    """Send an announcement by multicast, as anybody can."""
    data.setdefault("service", [name])
    text = posttroll.Message(f"/address/{name}", "info", data, version="v1.01").encode()
    sender = posttroll.MulticastSender(config.get("broadcast_port"))
    try:
        sender(text)
    finally:
        sender.close()


class TestFalseAnnouncements:
    """Anybody can send a datagram; a secure process takes nothing from where it leads."""

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("version", ["3.1", "2.0", "1.0"])
    @pytest.mark.parametrize("backend", ["unsecure_zmq", "secure_zmq", None])
    @pytest.mark.parametrize("listen", [True, False], ids=["addr_listener", "lookups"])
    def test_no_plain_connection_is_made(self, keys, backend, listen, version):
        extras = {} if backend is None else {"backend": backend}
        with nameserver(multicast_enabled=True), FakePublisher(version) as fake:
            uri = f"tcp://{LOOPBACK}:{fake.port}"

            def announced() -> bool:
                announce_falsely("service", URI=uri, **extras)
                return is_known("service")

            wait_for(announced)
            with posttroll.Subscribe("service", "", addr_listener=listen) as subscriber:

                def has_tried() -> bool:
                    assert next(subscriber.recv(timeout=0.05)) is None
                    return bool(fake.heard)

                wait_for(has_tried)
                with posttroll.Publish("service") as genuine:
                    assert deliver(genuine, subscriber, "good", 40)
                rest = receive(subscriber, 1000, timeout=0.3)  # what was sent before the connection was made
                assert {message.data for message in rest} <= {"good"}
        for heard in fake.heard:  # the greeting of ZMTP 3 with CURVE, or its beginning, and nothing that follows it
            assert len(heard) <= 64
            assert heard[12:32].rstrip(b"\0") in (b"CURVE", b"")

    def test_a_false_backend_hides_no_secure_publisher(self, keys):
        with publishing() as publisher, nameserver(multicast_enabled=True):
            uri = f"tcp://{LOOPBACK}:{publisher.port_number}"

            def announced() -> bool:
                announce_falsely("service", URI=uri, backend="unsecure_zmq")
                return is_known("service")

            wait_for(announced)
            with posttroll.Subscriber(posttroll.get_pub_address("service", DEADLINE)) as subscriber:
                assert deliver(publisher, subscriber, "direct")
            with posttroll.Subscribe("service", "") as subscriber:
                assert deliver(publisher, subscriber, "followed")

    @pytest.mark.parametrize("uri", ["inproc://commands", "ipc:///tmp/somewhere", "udp://224.0.0.1:5", "tcp://*:9000"])
    def test_only_tcp_addresses_of_others_are_used(self, keys, uri, caplog):
        with nameserver(multicast_enabled=True):

            def refused() -> bool:
                announce_falsely("service", URI=uri)
                return "Refused an announcement from" in caplog.text

            wait_for(refused)
            assert not is_known("service")
        assert posttroll.addresses_in(posttroll.Message("/a", "info", [{"URI": uri}]).encode().encode()) == []
        with posttroll.Subscriber([]) as subscriber:
            follower = posttroll._Follower(subscriber, ["service"], [], listen=False)
            follower.add("localhost", {"URI": uri, "service": ["service"]}, "service")
            assert subscriber.addresses == []

    def test_the_nameserver_keeps_a_limited_number(self, keys):
        with config.set(max_services=10), nameserver(multicast_enabled=True):
            with posttroll.Publish("genuine", broadcast_interval=0.5):
                wait_for(lambda: is_known("genuine"))
                for number in range(100):
                    announce_falsely(f"false{number}", URI=f"tcp://{LOOPBACK}:{10000 + number}")
                wait_for(lambda: len(posttroll.get_pub_address("", DEADLINE)) == 10)
                assert is_known("genuine")

    def test_a_subscriber_connects_to_a_limited_number(self, keys, monkeypatch):
        monkeypatch.setattr(posttroll._Follower, "LIMIT", 10)
        with posttroll.Subscriber([]) as subscriber:
            follower = posttroll._Follower(subscriber, [""], [], listen=False)
            for number in range(100):
                follower.add("localhost", {"URI": f"tcp://{LOOPBACK}:{10000 + number}", "service": ["x"]}, "")
            assert len(subscriber.addresses) == 10

    def test_names_are_resolved_by_a_limited_number_of_threads(self, keys, monkeypatch):
        go_on = threading.Event()
        asked: list[str] = []

        def slow_getaddrinfo(host: str, *args: Any) -> Any:
            asked.append(host)
            go_on.wait(DEADLINE)
            raise socket.gaierror("unknown")

        monkeypatch.setattr(socket, "getaddrinfo", slow_getaddrinfo)
        try:
            with posttroll.Subscriber([]) as subscriber:
                follower = posttroll._Follower(subscriber, [""], [], listen=False)
                for number in range(200):
                    follower.add("localhost", {"URI": f"tcp://host{number}.example:9000", "service": ["x"]}, "")
                assert receive(subscriber, timeout=0.1) == []
                assert 1 <= len(asked) <= 20
        finally:
            go_on.set()
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("resolve")])


# -- who may connect from where --

# What a client gets on each port of a host: an answer where it asks, a finished handshake where it subscribes.
PROBE = """
import json, sys, time, posttroll, zmq
from posttroll import config
host, publisher_port, name, patience = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
uri = "tcp://%s:9999" % name
announcement = posttroll.Message("/address/" + name, "info", {"URI": uri, "service": [name]}, version="v1.01").encode()
ports = {
    "lookup": (zmq.REQ, config.get("nameserver_port"), posttroll.lookup_request("")),
    "registration": (zmq.REQ, config.get("broadcast_port"), announcement.encode()),
    "news": (zmq.SUB, config.get("address_publish_port"), None),
    "messages": (zmq.SUB, publisher_port, None),
}
poller, waiting = zmq.Poller(), {}
for what, (kind, port, request) in ports.items():
    sock = posttroll.set_up_client_socket(kind, "")
    source = sock if request else sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    sock.connect("tcp://%s:%d" % (host, port))
    if request:
        sock.send(request)
    poller.register(source, zmq.POLLIN)
    waiting[source] = what
    ports[what] = sock
try:
    sender = posttroll.MulticastSender(config.get("broadcast_port"))
except OSError as error:
    sender = None
reached, deadline = [], time.monotonic() + patience
while waiting and time.monotonic() < deadline:
    if sender:
        sender(announcement.replace(name, name + "_multicast"))
    for source, _ in poller.poll(100):
        poller.unregister(source)
        reached.append(waiting.pop(source))
print(json.dumps(sorted(reached)))
posttroll.destroy_context(0)
"""

PUBLISHER = """
import sys, posttroll
with posttroll.Publisher("tcp://*:%s" % sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""

EVERYTHING = ["lookup", "messages", "news", "registration"]


def may_make_namespaces() -> bool:
    """Whether this machine and user can make network namespaces."""
    if os.name != "posix" or os.getuid() != 0:
        return False
    name = f"posttroll-try-{os.getpid()}"
    try:
        if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
            return False
        subprocess.run(["ip", "netns", "delete", name], check=True)
    except OSError:
        return False
    return True


class Hosts:
    """Two network namespaces with a cable between them: *here* run the servers, *there* is another host."""

    HERE, THERE = "10.213.7.1", "10.213.7.2"

    def __init__(self) -> None:
        self.here, self.there = f"posttroll-here-{os.getpid()}", f"posttroll-there-{os.getpid()}"
        self.hosts_file = Path("/etc/netns") / self.here / "hosts"

    def _ip(self, *args: str) -> None:
        subprocess.run(["ip", *args], check=True)

    def __enter__(self) -> Hosts:
        for namespace in (self.here, self.there):
            self._ip("netns", "add", namespace)
            self._ip("-n", namespace, "link", "set", "lo", "up")
            if namespace == self.there:
                self._ip("-n", self.here, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", self.there)
        for namespace, address in ((self.here, self.HERE), (self.there, self.THERE)):
            self._ip("-n", namespace, "addr", "add", address + "/24", "dev", "cable")
            self._ip("-n", namespace, "link", "set", "cable", "up")
        # As on hosts that share an address: whoever asks the kernel by binding is told that every address is its own.
        self._ip("netns", "exec", self.here, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind")
        self.hosts_file.parent.mkdir(parents=True)
        self.hosts_file.write_text(f"127.0.0.1 localhost\n{self.THERE} neighbour\n")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hosts_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.hosts_file.parent.rmdir()
        for namespace in (self.here, self.there):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)

    def run(self, namespace: str, *args: Any, **settings: str) -> Any:
        """Run Python there, with multicast over the cable."""
        environment = {**os.environ, **settings}
        environment["POSTTROLL_MULTICAST_INTERFACE"] = self.HERE if namespace == self.here else self.THERE
        return process("ip", "netns", "exec", namespace, sys.executable, "-u", *args, env=environment)

    def probe(self, namespace: str, port: int, name: str, patience: float, **settings: str) -> list[str]:
        """Return what a client in *namespace* reaches of the servers here."""
        with self.run(namespace, "-c", PROBE, self.HERE, port, name, patience, **settings) as running:
            status, out, err = finish(running)
        assert status == 0, err
        return json.loads(out)

    def known(self, name: str) -> bool:
        """Whether the nameserver here knows a publisher of this name."""
        code = "import posttroll, sys; print(len(posttroll.get_pub_address(sys.argv[1], 15)))"
        with self.run(self.here, "-c", code, name) as running:
            status, out, err = finish(running)
        assert status == 0, err
        return out.strip() != "0"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not may_make_namespaces():
        pytest.skip("this needs network namespaces")
    with Hosts() as made:
        yield made


@pytest.mark.network
class TestFromElsewhere:
    """Clients on another host, with and without a place on the list of addresses."""

    @contextlib.contextmanager
    def servers(self, hosts: Hosts, *args: str, **settings: str) -> Iterator[int]:
        """Run a nameserver and a publisher here; give the port of the publisher."""
        port = free_port()
        with hosts.run(hosts.here, NAMESERVER, *args, **settings) as running:
            await_line(running, "answers on port")
            with hosts.run(hosts.here, "-c", PUBLISHER, port, **settings) as publisher:
                await_line(publisher, "ready")
                yield port

    @pytest.mark.parametrize(
        ("entries", "backend"),
        [
            ("10.213.7.2", "secure_zmq"),
            ("10.213.0.0/16", "unsecure_zmq"),
            ("nowhere.invalid neighbour", "unsecure_zmq"),
            ("nowhere.invalid neighbour", "secure_zmq"),
        ],
    )
    def test_those_on_the_list_get_in(self, keys, hosts, backend, entries, monkeypatch):
        monkeypatch.setenv("POSTTROLL_BACKEND", backend)
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", str(free_port()))
        with self.servers(hosts, "--no-multicast", POSTTROLL_AUTHORIZED_CLIENT_ADDRESSES=entries) as port:
            assert hosts.probe(hosts.there, port, "there", DEADLINE) == EVERYTHING

    @pytest.mark.parametrize(
        ("entries", "backend"),
        [
            ("192.0.2.0/24", "secure_zmq"),
            ("nowhere.invalid", "secure_zmq"),
            ("10.213.7.2/33", "unsecure_zmq"),
            ("[]", "unsecure_zmq"),
        ],
    )
    def test_all_others_stay_out(self, keys, hosts, backend, entries, monkeypatch):
        monkeypatch.setenv("POSTTROLL_BACKEND", backend)
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", str(free_port()))
        with self.servers(hosts, "--no-multicast", POSTTROLL_AUTHORIZED_CLIENT_ADDRESSES=entries) as port:
            assert hosts.probe(hosts.here, port, "here", DEADLINE) == EVERYTHING
            assert hosts.probe(hosts.there, port, "there", 1) == []
            assert not hosts.known("there")

    @pytest.mark.parametrize(("entries", "is_in"), [("10.213.7.0/24", True), ("nowhere.invalid", False)])
    def test_the_list_holds_for_multicast(self, hosts, entries, is_in):
        with self.servers(hosts, POSTTROLL_AUTHORIZED_CLIENT_ADDRESSES=entries) as port:
            reached = hosts.probe(hosts.there, port, "there", 1)
            assert reached == (["lookup", "messages", "news"] if is_in else [])
            hosts.probe(hosts.here, port, "here", 1)
            assert hosts.known("here_multicast")
            assert hosts.known("there_multicast") == is_in

    @pytest.mark.parametrize(("backend", "multicast"), [("unsecure_zmq", True), ("secure_zmq", False)])
    def test_local_only(self, keys, hosts, multicast, backend, monkeypatch):
        monkeypatch.setenv("POSTTROLL_BACKEND", backend)
        monkeypatch.setenv("POSTTROLL_SECURE_ZMQ_NAMESERVER_PORT", str(free_port()))
        arguments = ["--local-only"] + ([] if multicast else ["--no-multicast"])
        with self.servers(hosts, *arguments) as port:
            assert hosts.probe(hosts.there, port, "there", 1) == ["messages"]  # the publisher is not meant by it
            expected = [what for what in EVERYTHING if what != "registration" or not multicast]
            assert hosts.probe(hosts.here, port, "here", 1 if multicast else DEADLINE) == expected
            assert hosts.known("here_multicast" if multicast else "here")
            assert not hosts.known("there_multicast")
            assert not hosts.known("there")


class TestOwnAddresses:
    """The host itself is never locked out, whatever the list says."""

    @pytest.mark.parametrize("backend", ["unsecure_zmq", "secure_zmq"])
    def test_a_list_of_others_lets_the_host_itself_in(self, keys, backend):
        with config.set(backend=backend), publishing(authorized_client_addresses=["192.0.2.1"]) as publisher:
            for host in {"localhost", LOOPBACK, "127.0.0.9", posttroll.get_own_ip()}:
                with subscribing(publisher.port_number, host) as subscriber:
                    assert deliver(publisher, subscriber, host)

    def test_ipc_is_the_host_itself(self, tmp_path):
        address = f"ipc://{tmp_path / 'socket'}"
        with config.set(authorized_client_addresses=[]), posttroll.Publisher(address) as publisher:
            with posttroll.Subscriber([address]) as subscriber:
                assert deliver(publisher, subscriber, "here")

    def test_an_address_of_another_host_is_no_own_one(self):
        assert not posttroll.is_own_address("192.0.2.1")
        assert not posttroll.is_own_address("::ffff:192.0.2.1")
        assert not posttroll.is_own_address("2001:db8::1")
        assert posttroll.is_own_address("::ffff:127.0.0.1")

    def test_ipv6_mapped_addresses_are_found_on_the_list(self):
        with config.set(authorized_client_addresses=["10.1.0.0/16", "2001:db8::/32"]):
            rules = posttroll.AccessRules()
        assert not rules.refuses_address("::ffff:10.1.2.3")
        assert not rules.refuses_address("2001:db8::7")
        assert rules.refuses_address("10.2.0.1")
        assert rules.refuses_address("2001:db9::7")

    @pytest.mark.parametrize(
        ("entry", "let_in", "kept_out"),
        [
            ("::ffff:10.1.0.0/112", ["10.1.2.3", "::ffff:10.1.2.3"], ["10.2.0.1", "::ffff:10.2.0.1", "2001:db8::1"]),
            ("::ffff:10.1.0.9", ["10.1.0.9"], ["10.1.0.8"]),
            ("[2001:db8::7]", ["2001:db8::7"], ["2001:db8::8"]),
            ("fe80::/64", ["fe80::7%eth0", "fe80::8%eth1"], ["fe81::1%eth0"]),
            ("fe80::7%eth0", ["fe80::7%eth0"], ["fe80::7%eth1", "fe80::8%eth0", "fe80::7"]),
            ("fe80::%eth0/64", ["fe80::7%eth0", "fe80::8%eth0"], ["fe80::7%eth1"]),
        ],
    )
    def test_entries_of_all_forms(self, entry, let_in, kept_out):
        with config.set(authorized_client_addresses=["192.0.2.1", entry, "2001:db8:f::/48"]):
            rules = posttroll.AccessRules()
        assert not any(map(rules.refuses_address, let_in))
        assert all(map(rules.refuses_address, kept_out))

    def test_a_list_that_is_no_list_is_an_error(self):
        with pytest.raises(posttroll.ConfigurationError, match="authorized_client_addresses"):
            with publishing(authorized_client_addresses=7):
                pass


# -- keys --


class TestGenerateKeys:
    """``posttroll-generate-keys``."""

    @staticmethod
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    @pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
    def test_modes_do_not_depend_on_the_umask(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            posttroll.write_key_pair("host", tmp_path)
        finally:
            os.umask(before)
        assert self.mode(tmp_path / "host.key") == 0o644
        assert self.mode(tmp_path / "host.key_secret") == 0o600

    def test_a_new_directory_is_not_open_to_all(self, tmp_path):
        before = os.umask(0)
        try:
            posttroll.write_key_pair("host", tmp_path / "new")
        finally:
            os.umask(before)
        assert self.mode(tmp_path / "new") & 0o022 == 0

    @pytest.mark.parametrize("existing", ["host.key", "host.key_secret"])
    def test_existing_keys_are_not_overwritten(self, tmp_path, existing, capsys):
        (tmp_path / existing).write_text("precious")
        with pytest.raises(SystemExit, match="exists already"):
            posttroll.generate_keys(["host", "-d", str(tmp_path)])
        assert (tmp_path / existing).read_text() == "precious"
        assert [path.name for path in tmp_path.glob("host*")] == [existing]

    def test_force_overwrites(self, tmp_path, capsys):
        posttroll.generate_keys(["host", "-d", str(tmp_path)])
        old = (tmp_path / "host.key_secret").read_text()
        (tmp_path / "host.key_secret").chmod(0o666)
        posttroll.generate_keys(["host", "-d", str(tmp_path), "--force"])
        assert (tmp_path / "host.key_secret").read_text() != old
        assert self.mode(tmp_path / "host.key_secret") == 0o600
        assert sorted(path.name for path in tmp_path.glob("host*")) == ["host.key", "host.key_secret"]

    @pytest.mark.parametrize("force", [True, False])
    def test_links_are_not_followed(self, tmp_path, force):
        (tmp_path / "keys").mkdir()
        elsewhere = tmp_path / "elsewhere"
        (tmp_path / "keys" / "host.key_secret").symlink_to(elsewhere)
        if force:
            posttroll.write_key_pair("host", tmp_path / "keys", force=True)
            assert not (tmp_path / "keys" / "host.key_secret").is_symlink()
        else:
            with pytest.raises(FileExistsError):
                posttroll.write_key_pair("host", tmp_path / "keys")
        assert not elsewhere.exists()

    def test_the_script_writes_a_pair_that_fits(self, tmp_path):
        with process(sys.executable, LIBRARY, "generate-keys", "host", "-d", tmp_path) as running:
            status, out, _ = finish(running)
        assert (status, out.split()) == (0, [str(tmp_path / "host.key"), str(tmp_path / "host.key_secret")])
        keys = posttroll._read_keys(str(tmp_path / "host.key_secret"))
        assert zmq.curve_public(keys["secret"]) == keys["public"]
        assert posttroll._read_keys(str(tmp_path / "host.key")) == {"public": keys["public"]}

    def test_a_directory_that_cannot_be_written_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="posttroll-generate-keys: "):
            posttroll.generate_keys(["host", "-d", str(tmp_path / "file")])

    @pytest.mark.parametrize(
        ("mode", "is_warned_about"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)]
    )
    def test_a_secret_key_that_others_can_read_is_warned_about(self, keys, mode, is_warned_about, caplog):
        path = keys.directory / "server.key_secret"
        path.chmod(mode)
        with publishing():
            pass
        assert (f"server_secret_key_file: {path} is readable by others" in caplog.text) == is_warned_about

    def test_a_key_that_goes_as_it_is_read(self, keys, monkeypatch):
        """It is being replaced: the error is the same as just before and after."""
        read = posttroll._read_keys

        def read_and_remove(path: str) -> dict[str, bytes]:
            found = read(path)
            os.remove(path)
            return found

        monkeypatch.setattr(posttroll, "_read_keys", read_and_remove)
        with pytest.raises(ConfigurationError, match=r"client_secret_key_file: cannot read a key from .*friend"):
            posttroll.load_key("client_secret_key_file", "secret")


def start_publisher() -> None:
    posttroll.Publisher("tcp://*:0").start().stop()


def start_subscriber() -> None:
    posttroll.Subscriber([f"tcp://{LOOPBACK}:9"]).close()


def start_subscriber_by_name() -> None:
    posttroll.Subscriber(["tcp://nowhere.invalid:9"]).close()


def add_address() -> None:
    with posttroll.Subscriber([]) as subscriber:
        subscriber.add("tcp://nowhere.invalid:9")


def subscribe() -> None:
    posttroll.NSSubscriber("service", timeout=0).start().close()


def look_up_service() -> None:
    posttroll.get_pub_address("service", 1)


def run_nameserver() -> None:
    server = posttroll_ns.NameServer(multicast_enabled=False)
    server.run(when_ready=server.stop)


def register_service() -> None:
    posttroll.NoisyPublisher("service", nameservers=["localhost"]).start().stop()


def register_by_name() -> None:
    posttroll.NoisyPublisher("service", nameservers=["nowhere.invalid"]).start().stop()


SERVER_SETTINGS = ["server_secret_key_file", "clients_public_keys_directory"]
CLIENT_SETTINGS = ["client_secret_key_file", "server_public_key_file"]


class TestMissingKeys:
    """What is wrong with the keys is an error of the call, which names the setting and the file."""

    @pytest.mark.parametrize("fault", ["missing setting", "missing file", "unreadable", "malformed", "wrong kind"])
    @pytest.mark.parametrize(
        ("call", "setting"),
        [(call, setting) for call in (start_publisher, run_nameserver) for setting in SERVER_SETTINGS]
        + [
            (call, setting)
            for call in (start_subscriber, start_subscriber_by_name, add_address, subscribe, look_up_service)
            for setting in CLIENT_SETTINGS
        ]
        + [
            (call, setting)
            for call in (register_service, register_by_name)
            for setting in SERVER_SETTINGS + CLIENT_SETTINGS
        ],
    )
    def test_is_an_error_that_names_setting_and_file(self, keys, tmp_path, monkeypatch, call, setting, fault):
        path = tmp_path / "bad"
        if fault == "missing setting":
            monkeypatch.delenv("POSTTROLL_" + setting.upper())
        else:
            monkeypatch.setenv("POSTTROLL_" + setting.upper(), str(path))
        if fault == "malformed":
            path.write_text('curve\n    public-key = "{0}"\n    secret-key = "{0}"\n'.format("\\" * 40))
        elif fault == "wrong kind":
            path.write_text("curve\n    no-key = 7\n")
        elif fault == "unreadable" and setting != "clients_public_keys_directory":
            path.mkdir()
        with pytest.raises(posttroll.ConfigurationError, match=setting) as caught:
            call()
        assert fault == "missing setting" or str(path) in str(caught.value)

    def test_the_nameserver_script_says_so_and_ends(self, keys, monkeypatch):
        monkeypatch.delenv("POSTTROLL_SERVER_SECRET_KEY_FILE")
        with process(sys.executable, NAMESERVER, "--no-multicast") as running:
            status, _, err = finish(running)
        assert status == 1
        assert "server_secret_key_file" in err

    def test_keys_that_break_while_running_do_not_end_the_announcing(self, keys, monkeypatch, caplog):
        monkeypatch.setattr(posttroll._NameserverTarget, "RENEWAL", 0.2)
        publisher = posttroll.NoisyPublisher("service", nameservers=["localhost"], broadcast_interval=0.1).start()
        try:
            broken = keys.directory / "friend.key_secret"
            content = broken.read_text()
            broken.write_text("")
            wait_for(lambda: "client_secret_key_file" in caplog.text)
            broken.write_text(content)
            with nameserver():
                wait_for(lambda: is_known("service"), 40)
        finally:
            publisher.stop()


# -- one authenticator for all --


def threads_of_loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "posttroll loop"]


class TestAuthenticator:
    """One socket answers for all server sockets of the context, as long as there are any."""

    def test_nothing_runs_without_need(self):
        with publishing(), nameserver():
            assert posttroll._access_control is None

    def test_it_is_shared_and_ends_with_the_last(self, keys):
        with publishing() as first:
            control = posttroll._access_control
            with publishing() as second, nameserver():
                assert posttroll._access_control is control is not None
                assert len(threads_of_loops()) == 1
                with subscribing(second.port_number) as subscriber:
                    assert deliver(second, subscriber, "second")
            with subscribing(first.port_number) as subscriber:
                assert deliver(first, subscriber, "first")
            assert posttroll._access_control is control
        assert posttroll._access_control is None
        assert threads_of_loops() == []

    def test_one_that_stops_takes_nothing_from_the_others(self, keys):
        """Many times, with connections that stand and connections that fail on all of them."""
        with publishing() as lasting:
            for number in range(15):
                with publishing() as passing, subscribing(passing.port_number) as subscriber:
                    with subscribing(passing.port_number, **keys.of("no CURVE")):
                        assert deliver(passing, subscriber, "passing")
                with subscribing(lasting.port_number) as subscriber:
                    assert deliver(lasting, subscriber, str(number))

    def test_a_nameserver_that_stops_takes_nothing_from_the_publishers(self, keys):
        with publishing() as publisher:
            with nameserver():
                assert not is_known("service")
            with subscribing(publisher.port_number) as subscriber:
                assert deliver(publisher, subscriber, "still here")

    def test_a_new_one_works_after_all_have_stopped(self, keys):
        for number in range(5):
            with publishing() as publisher, subscribing(publisher.port_number) as subscriber:
                assert deliver(publisher, subscriber, str(number))
            assert posttroll._access_control is None
            assert threads_of_loops() == []

    def test_a_new_one_works_in_a_new_context(self, keys):
        publisher = posttroll.Publisher("tcp://*:0").start()
        posttroll.destroy_context(0)
        publisher.stop()
        with publishing() as publisher, subscribing(publisher.port_number) as subscriber:
            assert deliver(publisher, subscriber, "new")

    def test_publishers_stop_in_many_threads_at_once(self, keys):
        with publishing() as lasting:
            publishers = [posttroll.Publisher("tcp://*:0").start() for _ in range(8)]
            threads = [threading.Thread(target=publisher.stop) for publisher in publishers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE)
            with subscribing(lasting.port_number) as subscriber:
                assert deliver(lasting, subscriber, "still here")


class TestSocketsOfTheProgram:
    """A program's own sockets in our context behave as they do without us."""

    @pytest.fixture
    def access_control(self, keys: Keys) -> Iterator[None]:
        with publishing():
            yield

    @staticmethod
    def exchange(**options: Any) -> bool:
        """Whether a client of this kind gets an answer from a server of this kind."""
        context = posttroll.get_context()
        public, secret = zmq.curve_keypair()
        with context.socket(zmq.REP) as server, context.socket(zmq.REQ) as client:
            server.linger = client.linger = 0
            if options.pop("curve", False):
                server.curve_server, server.curve_secretkey = True, secret
                client.curve_serverkey = public
                client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
            if options.pop("plain", False):
                server.plain_server = True
                client.plain_username, client.plain_password = b"user", b"guess"
            for name, value in options.items():
                setattr(server, name, value)
            client.connect(f"tcp://{LOOPBACK}:{server.bind_to_random_port('tcp://' + LOOPBACK)}")
            client.send(b"question")
            return bool(server.poll(1000))

    def test_plain_ones(self, access_control):
        assert self.exchange()

    def test_plain_ones_with_a_domain(self, access_control):
        assert self.exchange(zap_domain=b"global")

    def test_curve_servers(self, access_control):
        assert self.exchange(curve=True)

    def test_passwords_that_nobody_checks_are_refused(self, access_control):
        assert not self.exchange(plain=True, zap_domain=b"global")


# -- the pid file of the daemon --


class TestPidFileOfOthers:
    """A pid file that somebody else has put into a shared directory makes nobody kill a foreign process."""

    @pytest.fixture
    def victim(self) -> Iterator[subprocess.Popen[str]]:
        with process(sys.executable, "-c", "import sys; sys.stdin.read()") as running:
            yield running

    @staticmethod
    def stop_daemon(path: Path) -> tuple[int, str]:
        with process(sys.executable, NAMESERVER, "-d", "stop", "--pid-file", path) as running:
            status, _, err = finish(running)
        return status, err

    def test_is_no_source_of_options(self, tmp_path):
        """What is in it is read only if it is ours; and it is data, whoever wrote it."""
        path = tmp_path / "pid"
        for content in (
            "1\n{'log': '/nonesuch/log', 'set': []}\n",
            "1\n__import__('os').abort()\n",
            "1\n[",
            "1\n[1]\n",
        ):
            path.write_text(content)
            path.chmod(0o666)
            call = (sys.executable, NAMESERVER, "--no-multicast", "-d", "restart", "--pid-file", path)
            with process(*call) as running:
                status, _, err = finish(running)
            assert status == 1
            assert "Not a pid file of this user" in err
            path.chmod(0o600)
            with process(*call) as running:
                status, _, err = finish(running)
            if "log" in content:
                assert (status, "/nonesuch/log" in err) == (1, True)
            else:
                assert (status, err) == (0, "nameserver: not running\n" + LOGS_NOWHERE)
            assert self.stop_daemon(path)[0] == 0

    @pytest.mark.parametrize("trick", ["writable by all", "of another user", "link"])
    def test_stops_nothing(self, victim, tmp_path, trick):
        if trick == "of another user" and os.getuid() != 0:
            pytest.skip("only root can give a file away")
        path = tmp_path / "pid"
        path.write_text(f"{victim.pid}\n")
        path.chmod(0o666 if trick == "writable by all" else 0o600)
        if trick == "of another user":
            os.chown(path, 65534, 65534)
        if trick == "link":
            path.rename(tmp_path / "target")
            path.symlink_to(tmp_path / "target")
        with path.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            status, err = self.stop_daemon(path)
        assert status == 1
        assert str(path) in err
        assert victim.poll() is None


# ======================================================================================================================
# The documentation: every example of it runs as printed
#
# The texts are those of the documentation, with their indentation restored and `print` as a function.  They run in
# processes of their own; only the port 9000, which may be taken, is replaced by a free one.
# ======================================================================================================================


DOCUMENTED_PUBLISHING = """
from posttroll.publisher import Publish
from posttroll.message import Message
import time

try:
    with Publish("a_service", 9000) as pub:
        counter = 0
        while True:
            counter += 1
            message = Message("/counter", "info", str(counter))
            print("publishing", message)
            pub.send(str(message))
            time.sleep(3)
except KeyboardInterrupt:
    print("terminating publisher...")
"""

DOCUMENTED_PUBLISHING_TO_NAMESERVERS = """
from posttroll.publisher import Publish
from posttroll.message import Message
import time

try:
    with Publish("a_service", 9000, nameservers=['localhost']) as pub:
        counter = 0
        while True:
            counter += 1
            message = Message("/counter", "info", str(counter))
            print("publishing", message)
            pub.send(str(message))
            time.sleep(3)
except KeyboardInterrupt:
    print("terminating publisher...")
"""

DOCUMENTED_PUBLISH_CONTEXT = """
from posttroll.publisher import Publish
from posttroll.message import Message
import time

try:
    with Publish("my_service", port=9000) as pub:
        counter = 0
        while True:
            counter += 1
            message = Message("/counter", "info", str(counter))
            print("publishing", message)
            pub.send(message.encode())
            time.sleep(3)
except KeyboardInterrupt:
    print("terminating publisher...")
"""

DOCUMENTED_PUBLISHER = """
from posttroll.publisher import Publisher, get_own_ip
from posttroll.message import Message
import time

pub_address = "tcp://" + str(get_own_ip()) + ":9000"
pub = Publisher(pub_address)

try:
    counter = 0
    while True:
        counter += 1
        message = Message("/counter", "info", str(counter))
        pub.send_string(message.encode())
        time.sleep(3)
except KeyboardInterrupt:
    print("terminating publisher...")
    pub.stop()
"""

DOCUMENTED_SUBSCRIBING = """
from posttroll.subscriber import Subscribe

with Subscribe("a_service", "counter",) as sub:
    for msg in sub.recv():
        print(msg)
"""

DOCUMENTED_SUBSCRIBE_CONTEXT = """
from posttroll.subscriber import Subscribe

with Subscribe("a_service", "my_topic",) as sub:
    for msg in sub.recv():
        print(msg)
"""

DOCUMENTED_SUBSCRIBER = """
from posttroll.subscriber import Subscriber, get_pub_address

addr = get_pub_address(service, timeout=2)
sub = Subscriber([addr], 'my_topic')
try:
    for msg in sub(timeout=2):
        print("Consumer got", msg)
except KeyboardInterrupt:
    print("terminating consumer...")
    sub.close()
"""

DOCUMENTED_LISTENER = """
from posttroll.publisher import NoisyPublisher
from posttroll.listener import ListenerContainer
from posttroll.message import Message
import time

pub = NoisyPublisher("test")
pub.start()
sub = ListenerContainer(topics=["/counter"])
# Wait that both sub and pub to register to nameserver
time.sleep(3)
for counter in range(5):
    msg_out = Message("/counter", "info", str(counter))
    pub.send(str(msg_out))
    print("published", str(msg_out))
    msg_in = sub.output_queue.get(True, 1)
    print("received", str(msg_in), "")
pub.stop()
sub.stop()
"""

DOCUMENTED_KEEP_ALIVE = """
import os
os.environ["POSTTROLL_TCP_KEEPALIVE"] = "1"
os.environ["POSTTROLL_TCP_KEEPALIVE_CNT"] = "10"
os.environ["POSTTROLL_TCP_KEEPALIVE_IDLE"] = "1"
os.environ["POSTTROLL_TCP_KEEPALIVE_INTVL"] = "1"
"""

DOCUMENTED_MESSAGE_VERSION = """
from posttroll import config
with config.set(message_version="v1.01"):
    ...
"""

DOCUMENTED_SECURE_SETTINGS = """
from posttroll import config
with config.set(backend="secure_zmq", server_public_key_file="..."):
    ...
"""

# Newer versions of argparse write "-l, --log LOG" for "-l LOG, --log LOG", older ones write "optional arguments".
DOCUMENTED_KEY_GENERATION = """
Create a public/secret key pair for the secure zmq backend. This will create two files (in the current directory if not
otherwise specified) with the suffixes '.key' and '.key_secret'. The name of the files will be the one provided.

positional arguments: name Name of the file.

-h, --help show this help message and exit

--directory DIRECTORY Directory to place the keys in.
"""

DOCUMENTED_NAMESERVER = """
usage: nameserver [-h] [-d {start,stop,status,restart}] [-l LOG] [-v]

-h, --help show this help message and exit

--daemon {start,stop,status,restart} Run as a daemon

--log LOG File to log to (defaults to stdout)

-v, --verbose print debug messages too

--no-multicast disable address broadcasting via multicasting
"""


def with_free_port(example: str) -> tuple[str, int]:
    """Return the example with a free port in place of 9000, and that port."""
    assert example.count("9000") == 1
    port = free_port()
    return example.replace("9000", str(port)), port


def end_by_keyboard(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Press ^C; return status, the rest of the output, and errors."""
    running.send_signal(signal.SIGINT)
    return finish(running)


def written_message(line: str) -> posttroll.Message:
    """Return the message in a line of output."""
    return posttroll.Message.decode(line[line.index("pytroll:/") :].rstrip("\n"))


class TestDocumentedExamples:
    """What they send arrives."""

    @pytest.mark.parametrize(
        ("example", "arguments"),
        [(DOCUMENTED_PUBLISHING, []), (DOCUMENTED_PUBLISHING_TO_NAMESERVERS, ["--no-multicast"])],
        ids=["multicast", "nameservers"],
    )
    def test_publishing_and_subscribing(self, example, arguments):
        example, port = with_free_port(example)
        with nameserver_process(*arguments), python(example) as publishing, python(DOCUMENTED_SUBSCRIBING) as receiving:
            message = written_message(await_line(receiving, "pytroll:/"))
            assert (message.subject, message.type) == ("/counter", "info")
            assert posttroll.get_pub_address("a_service")[0]["URI"].endswith(f":{port}")
            status, out, err = end_by_keyboard(publishing)
        assert (status, err) == (0, "")
        assert out.startswith("publishing pytroll://counter info ")
        assert out.endswith("terminating publisher...\n")
        assert message.encode() in out

    def test_publish_context(self):
        example, port = with_free_port(DOCUMENTED_PUBLISH_CONTEXT)
        with nameserver_process(), python(example) as publishing:
            with posttroll.Subscribe("my_service", "counter") as sub:
                assert receive(sub)[0].subject == "/counter"
                assert sub.addresses == [f"tcp://127.0.0.1:{port}"]
            status, out, err = end_by_keyboard(publishing)
        assert (status, err) == (0, "")
        assert out.endswith("terminating publisher...\n")

    def test_publisher_on_the_own_address(self):
        example, port = with_free_port(DOCUMENTED_PUBLISHER)
        addresses = [f"tcp://{posttroll.get_own_ip()}:{port}"]
        with python(example) as publishing, posttroll.Subscriber(addresses, "/counter") as sub:
            assert int(receive(sub)[0].data) > 0
            assert end_by_keyboard(publishing) == (0, "terminating publisher...\n", "")

    def test_subscriber_of_a_looked_up_address(self):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
            wait_for(lambda: posttroll.get_pub_address("a_service"))
            with python("service = 'a_service'\n" + DOCUMENTED_SUBSCRIBER) as consuming:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(posttroll.Message("/other_topic", "info", "not this one"))
                pub.send(posttroll.Message("/my_topic", "info", "this one"))
                assert written_message(await_line(consuming, "Consumer got pytroll:/")).data == "this one"
                await_line(consuming, "Consumer got None")  # after the timeout of two seconds
                status, out, err = end_by_keyboard(consuming)
        assert (status, err) == (0, "")
        assert out.endswith("terminating consumer...\n")

    def test_subscriber_of_an_address_that_nobody_has(self):
        """The nameserver knows no such service: nothing to receive, no error."""
        with nameserver(), python("service = 'nobody'\n" + DOCUMENTED_SUBSCRIBER) as consuming:
            await_line(consuming, "Consumer got None")
            assert end_by_keyboard(consuming)[0] == 0

    def test_subscribe_context(self):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
            with python(DOCUMENTED_SUBSCRIBE_CONTEXT) as receiving:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(posttroll.Message("/counter", "info", "not this one").encode())
                pub.send(posttroll.Message("/my_topic/sub", "info", "this one").encode())
                assert written_message(await_line(receiving, "pytroll:/")).data == "this one"

    def test_listener_container(self):
        with nameserver_process(), python(DOCUMENTED_LISTENER) as running:
            status, out, err = finish(running)
        assert status == 0
        assert err in ("", "Can't get any address for any service\n")  # it starts before its publisher is known
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == ["published", "received"] * 5
        for published, received in zip(lines[::2], lines[1::2]):
            assert written_message(published).encode() == written_message(received[:-1]).encode()
        assert [written_message(line).data for line in lines[::2]] == list("01234")

    def test_keep_alive_by_the_environment(self):
        code = DOCUMENTED_KEEP_ALIVE + textwrap.dedent("""
            import zmq
            from posttroll.publisher import Publisher
            from posttroll.subscriber import Subscriber
            names = ["TCP_KEEPALIVE", "TCP_KEEPALIVE_CNT", "TCP_KEEPALIVE_IDLE", "TCP_KEEPALIVE_INTVL"]
            with Publisher("tcp://*:0") as pub, Subscriber([f"tcp://127.0.0.1:{pub.port_number}"]) as sub:
                assert pub.wait_for_subscribers(1, 20)
                for sock in [pub._audience.socket, *sub.subscribers]:
                    print([sock.getsockopt(getattr(zmq, name)) for name in names])
        """)
        with python(code) as running:
            assert finish(running) == (0, "[1, 10, 1, 1]\n[1, 10, 1, 1]\n", "")

    def test_keep_alive_set_after_the_import(self):
        code = "import posttroll.publisher, posttroll.subscriber\n" + DOCUMENTED_KEEP_ALIVE
        code += "print(sorted(posttroll.get_tcp_keepalive_options().values()))"
        with python(code) as running:
            assert finish(running)[1] == "[1, 1, 1, 10]\n"

    def test_message_version(self):
        code = DOCUMENTED_MESSAGE_VERSION.replace("...", "print(Message('/a', 'b', {'at': moment}))")
        code += "print(Message('/a', 'b', {'at': moment}))"
        preface = "import datetime\nfrom posttroll.message import Message\n"
        preface += "moment = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)\n"
        with python(preface + code) as running:
            status, out, _ = finish(running)
        assert status == 0
        inside, after = out.splitlines()
        assert inside.endswith(' v1.01 application/json {"at": "2020-01-01T00:00:00"}')
        assert after.endswith(' v1.2 application/json {"at": "2020-01-01T00:00:00+00:00"}')

    def test_message_version_by_the_environment(self):
        code = "import os\nos.environ['POSTTROLL_MESSAGE_VERSION'] = 'v1.01'\n"
        code += "from posttroll.message import Message\nprint(Message('/a', 'b').encode())"
        with python(code) as running:
            assert finish(running)[1].endswith(" v1.01\n")

    def test_secure_settings(self):
        code = DOCUMENTED_SECURE_SETTINGS.replace(
            "    ...", "    print(config.get('backend'), config.get('server_public_key_file'))"
        )
        with python(code) as running:
            assert finish(running) == (0, "secure_zmq ...\n", "")


class TestDocumentedMigration:
    """The forms that programs of before version 0.2 were translated into."""

    def test_publish_with_aliases(self):
        with nameserver(), posttroll.publisher.Publish("a_service", 0, ["data_type1", "data_type2"], 2, ["localhost"]):
            for name in ("a_service", "data_type1", "data_type2"):
                assert wait_for(lambda name=name: posttroll.get_pub_address(name))[0]["name"] == "a_service"

    def test_publish_with_port_and_aliases(self):
        port = free_port()
        aliases = ["data_type1", "data_type2"]
        with nameserver_process(), posttroll.publisher.Publish("a_service", port, aliases) as pub:
            assert pub.port_number == port
            assert wait_for(lambda: posttroll.get_pub_address("data_type2"))[0]["URI"].endswith(f":{port}")

    def test_subscribe_to_everything_of_a_service_or_to_a_subject(self):
        with nameserver(), posttroll.Publish("a_service", nameservers=["localhost"]) as pub:
            wait_for(lambda: posttroll.get_pub_address("a_service"))
            everything_from = posttroll.subscriber.Subscribe("a_service")
            with everything_from as everything, posttroll.subscriber.Subscribe("a_service", "data_type1") as one_type:
                assert pub.wait_for_subscribers(2, DEADLINE)
                for subject in ("/data_type2", "/data_type1/x", "/end", "/data_type1"):
                    pub.send(posttroll.Message(subject, "info", "x").encode())
                subjects = [message.subject for message in receive(everything, 4)]
                assert subjects == ["/data_type2", "/data_type1/x", "/end", "/data_type1"]
                assert [message.subject for message in receive(one_type, 2)] == ["/data_type1/x", "/data_type1"]


class TestDocumentedCommands:
    """The help texts of the documentation are there; ours may have more options."""

    @pytest.mark.parametrize(
        ("arguments", "documented"),
        [
            (["-c", "import posttroll; posttroll.generate_keys(['-h'])"], DOCUMENTED_KEY_GENERATION),
            ([str(NAMESERVER), "-h"], DOCUMENTED_NAMESERVER),
        ],
        ids=["posttroll-generate-keys", "nameserver"],
    )
    def test_help(self, arguments, documented):
        with process(sys.executable, *arguments, env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}) as running:
            status, out, _ = finish(running)
        assert status == 0
        for text in documented.split("\n\n"):
            assert " ".join(text.split()) in " ".join(out.split())

    def test_usage_of_key_generation(self):
        with python("import posttroll; posttroll.generate_keys(['-h'])") as running:
            usage = finish(running)[1].split("\n")[0]
        assert usage.startswith("usage: posttroll-generate-keys [-h] [-d DIRECTORY] ")
        assert usage.endswith(" name")

    @pytest.mark.parametrize("directory", [None, "keys"])
    def test_key_generation(self, tmp_path, directory):
        code = "import posttroll, sys; posttroll.generate_keys(sys.argv[1:])"
        arguments = ["station"] if directory is None else ["station", "-d", str(tmp_path / directory)]
        (tmp_path / "keys").mkdir()
        with python(code, *arguments, cwd=tmp_path) as running:
            assert finish(running)[0] == 0
        where = tmp_path / (directory or ".")
        assert "public-key" in (where / "station.key").read_text()
        assert "secret-key" in (where / "station.key_secret").read_text()
        assert "secret-key" not in (where / "station.key").read_text()

    def test_the_console_scripts_are_those_of_the_documentation(self):
        project = (HERE / "pyproject.toml").read_text()
        for script, function in [
            ("posttroll", posttroll.main),
            ("nameserver", posttroll_ns.main),
            ("posttroll-generate-keys", posttroll.generate_keys),
            ("pytroll-logger", posttroll.run_logger),
        ]:
            assert f'{script} = "{function.__module__}:{function.__name__}"' in project
            assert len(inspect.signature(function).bind().arguments) == 0


# ======================================================================================================================
# The known package: the same programs, run with either library, talk to each other
#
# Its newest release, and 1.10.0, which knows only messages of v1.01, are installed from the registry, each into an
# environment of its own.  POSTTROLL_TEST_PEERS names a directory that keeps these environments for the next run.
# ======================================================================================================================


def interpreters() -> dict[tuple[int, int], str]:
    """Return the Python interpreters of this machine by version, the newest first."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = [shutil.which(f"python3.{minor}") for minor in range(8, 20)]
    candidates = [sys.executable, *filter(None, on_path), *sorted(pyenv.glob("versions/*/bin/python"))]
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        answer = subprocess.run([str(candidate), "-c", code], capture_output=True, text=True, check=False)
        if answer.returncode == 0:  # else it stands for a Python that is not there, or cannot make environments
            major, minor = map(int, answer.stdout.split())
            found.setdefault((major, minor), str(candidate))
    return dict(sorted(found.items(), reverse=True))


def without_ours() -> dict[str, str]:
    """Return the variables of the environment for a process that must not find our files."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other workers waiting."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install_known(directory: Path, requirement: str, pythons: list[str]) -> str:
    """Return the interpreter of an environment with the known package, made with the first Python that will do."""
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory / "lock"):
        return install_known_alone(directory / "environment", requirement, pythons)


def install_known_alone(directory: Path, requirement: str, pythons: list[str]) -> str:
    python = str(directory / "bin" / "python")
    complete = directory / "complete"
    if complete.exists():
        return python
    problems = [f"no suitable Python among {interpreters()}"]
    proof = "import posttroll, posttroll.ns; assert posttroll.__file__.endswith('__init__.py'), posttroll.__file__"
    for interpreter in pythons:
        for command in (
            [interpreter, "-m", "venv", "--clear", str(directory)],
            [python, "-m", "pip", "install", "--quiet", "setuptools<81", requirement],
            [python, "-c", proof],
        ):
            result = subprocess.run(
                command, cwd=directory.parent, env=without_ours(), capture_output=True, text=True, check=False
            )
            if result.returncode:
                problems.append(f"{' '.join(command)}:\n{(result.stderr or result.stdout)[-1500:]}")
                break
        else:
            complete.touch()
            return python
    problem = f"Cannot install {requirement}, the known package: " + "\n".join(problems)
    return str(pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem))


@pytest.fixture(scope="session")
def peers_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the environments with the known package, one for all workers."""
    kept, own = os.environ.get("POSTTROLL_TEST_PEERS"), tmp_path_factory.getbasetemp()
    return Path(kept).resolve() if kept else (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "peers"


@pytest.fixture(scope="session")
def newest(peers_directory: Path) -> str:
    """Return a Python with the newest release of the known package."""
    return install_known(peers_directory / "newest", "posttroll", list(interpreters().values()))


@pytest.fixture(scope="session")
def oldest(peers_directory: Path) -> str:
    """Return a Python with the release 1.10.0 of the known package."""
    pythons = [path for version, path in interpreters().items() if version <= (3, 9)]
    return install_known(peers_directory / "1.10.0", "posttroll==1.10.0", pythons)


PAYLOADS = {
    "text": "a text, with a comma and trailing blanks  ",
    "unicode": "é日本 \N{SATELLITE}",
    "lines": "two\nlines\tand a tab",
    "blanks": "  leading blanks",
    "nothing": "",
    "times": {
        "aware": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc),
        "naive": datetime(2026, 1, 2, 3, 4, 5),
        "nested": [[{"local": datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2)))}]],
    },
    "times-in-list": [datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)],
    "nested-lists": [1, [2.5, [None, True, {"x": [[]]}]]],
    "mapping": {"é": "日本", "uri": "/data/file.nc", "number": -12, "none": None},
    "empty-mapping": {},
    "empty-list": [],
    "zero": 0,
    "false": False,
    "null": None,
    "number": 1.5,
}
WITHOUT_TIMES = [kind for kind in PAYLOADS if "times" not in kind]


RUN_NAMESERVER = """
import datetime, sys
from posttroll.ns import NameServer
multicast, max_age = sys.argv[1:]
NameServer(max_age=datetime.timedelta(seconds=float(max_age)), multicast_enabled=multicast == "1").run()
"""

# It sends all payloads again and again, as theirs cannot wait for subscribers.
RUN_PUBLISHER = """
import base64, pickle, sys, time
from posttroll.message import Message
from posttroll.publisher import Publish
name, nameservers, versions, payloads = sys.argv[1:]
payloads = pickle.loads(base64.b64decode(payloads))
arguments = [{"version": version} if version else {} for version in versions.split(",")]
with Publish(name, 0, [name + "-alias"], broadcast_interval=0.5, nameservers=nameservers.split() or None) as publisher:
    while True:
        publisher.heartbeat()
        for version in arguments:
            for subject, data in payloads:
                subject = "/".join(["", name, version.get("version", "any"), subject])
                publisher.send(str(Message(subject, "info", data, **version)))
        time.sleep(0.05)
"""

# It tells of each subject once, of the addresses when they change, and ends when it has received nothing for a time.
RUN_SUBSCRIBER = """
import datetime, json, sys, time
from posttroll.subscriber import Subscribe
def plain(value):
    if isinstance(value, datetime.datetime):
        return {"datetime": value.isoformat()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
seen, addresses, deadline = set(), None, time.time() + 30
with Subscribe(**json.loads(sys.argv[1])) as subscriber:
    for message in subscriber.recv(timeout=0.2):
        if message is not None and message.subject not in seen:
            seen.add(message.subject)
            header = [message.type, message.version, message.sender, message.time.tzinfo is not None]
            print(json.dumps([message.subject, header, plain(message.data)]), flush=True)
        current = sorted(entry["URI"] if isinstance(entry, dict) else entry for entry in subscriber.addresses)
        if current != addresses:
            addresses = current
            print(json.dumps(["addresses", addresses]), flush=True)
        if time.time() > deadline:
            break
"""


class Side:
    """A library to run programs with: ours, or a release of theirs."""

    def __init__(self, name: str, interpreter: str, directory: Path) -> None:
        self.name = name
        self.is_ours = name == "ours"
        self._interpreter = interpreter
        self._directory = directory / name  # a place without posttroll.py
        self._directory.mkdir()
        self._errors = self._directory / "errors"

    @contextlib.contextmanager
    def run(self, code: str, *args: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a program; what it writes to stderr is in a file, so that it cannot get stuck in it."""
        environment = dict(os.environ) if self.is_ours else without_ours()
        command = (self._interpreter, "-u", "-c", code, *args)
        with self._errors.open("a") as errors:
            with process(*command, stderr=errors, env=environment, cwd=self._directory) as running:
                yield running

    def errors(self) -> str:
        """Return the end of what its programs have written to stderr."""
        return f"{self.name}: {self._errors.read_text()[-2000:]}"

    @contextlib.contextmanager
    def nameserver(self, multicast: bool = False, max_age: float = 600) -> Iterator[None]:
        """Run a nameserver; it answers when this starts."""
        with self.run(RUN_NAMESERVER, int(multicast), max_age) as running:
            wait_for(lambda: running.poll() is not None or lookup("") is not None, what="the nameserver")
            assert running.poll() is None, self.errors()
            yield
            assert running.poll() is None, self.errors()

    @contextlib.contextmanager
    def publisher(
        self, multicast: bool = False, name: str = "interop", versions: str = "", kinds: Sequence[str] = tuple(PAYLOADS)
    ) -> Iterator[str]:
        """Run a publisher; gives its address, once the nameserver knows it."""
        payloads = base64.b64encode(pickle.dumps([(kind, PAYLOADS[kind]) for kind in kinds], 4)).decode()
        with self.run(RUN_PUBLISHER, name, "" if multicast else "localhost", versions, payloads) as running:
            wait_for(lambda: running.poll() is not None or lookup(name), what=f"the registration of {name}")
            assert running.poll() is None, self.errors()
            [entry] = lookup(name) or []
            yield entry["URI"]
            assert running.poll() is None, self.errors()

    @contextlib.contextmanager
    def subscriber(self, services: str | list[str] = "interop", **arguments: Any) -> Iterator[Report]:
        """Run a subscriber; gives what it reports."""
        with self.run(RUN_SUBSCRIBER, json.dumps({"services": services, **arguments})) as running:
            yield Report(running, self)


class Report:
    """What a subscriber reports, as it comes."""

    def __init__(self, running: subprocess.Popen[str], side: Side) -> None:
        self._running = running
        self._side = side
        self.received: dict[str, tuple[list[Any], Any]] = {}
        self.addresses: list[str] = []

    def read_until(self, condition: Callable[[], Any], what: str) -> None:
        """Read what it reports until the condition holds."""
        while not condition():
            if not self._read():
                pytest.fail(f"No {what}; got {self.addresses} and {self.received}. {self._side.errors()}")

    def _read(self) -> bool:
        """Take one line of the report; return whether there was one."""
        assert self._running.stdout is not None
        line = self._running.stdout.readline()
        if line:
            subject, *rest = json.loads(line)
            if subject == "addresses":
                [self.addresses] = rest
            else:
                self.received[subject] = (rest[0], rest[1])
        return bool(line)

    def end(self) -> None:
        """End the subscriber, and read the rest of what it has reported."""
        assert self._running.poll() is None, self._side.errors()
        self._running.kill()
        while self._read():
            pass

    def await_subjects(self, *subjects: str) -> None:
        """Read until all of the subjects have been received."""
        self.read_until(lambda: set(subjects) <= set(self.received), f"messages of {subjects}")


@contextlib.contextmanager
def all_of(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
    """Enter the contexts one after another; gives what the last one gives."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(context) for context in contexts][-1]


def lookup(service: str) -> list[dict[str, Any]] | None:
    """Ask the nameserver of this host, as a third party; None if it does not answer."""
    try:
        return posttroll.get_pub_address(service, timeout=0.5)
    except TimeoutError:
        return None


def plain(value: Any) -> Any:
    """Return *value* as it looks after a way through JSON, with datetimes marked as such."""
    if isinstance(value, datetime):
        return {"datetime": value.isoformat()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def naive(value: Any) -> Any:
    """Return *value* with all time zones dropped."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if isinstance(value, dict):
        return {key: naive(item) for key, item in value.items()}
    return [naive(item) for item in value] if isinstance(value, list) else value


def expected(kind: str, version: str, sender: Side, receiver: Side) -> Any:
    """Return what should arrive, with the faults of theirs that ours cannot make good."""
    data = PAYLOADS[kind]
    if not sender.is_ours and not data:
        return ""  # they leave out what is false
    if version == "v1.01" and sender.name != "1.10.0":
        data = naive(data)
    if kind == "times-in-list" and not receiver.is_ours:
        return [data[0].isoformat()]  # they look for datetimes in mappings only
    return plain(data)


def check_payloads(report: Report, sender: Side, receiver: Side, version: str, kinds: Sequence[str]) -> None:
    """Check that the payloads arrive, in messages of *version* (empty: whatever the sender is configured for)."""
    subjects = {kind: f"/interop/{version or 'any'}/{kind}" for kind in kinds}
    report.await_subjects("/heartbeat/interop", *subjects.values())
    for kind, subject in subjects.items():
        (atype, used_version, user_and_host, is_aware), data = report.received[subject]
        assert atype == "info"
        assert used_version == (version or "v1.01")
        assert is_aware == (used_version != "v1.01")
        assert user_and_host == posttroll.Message("/a", "b").sender
        assert data == expected(kind, used_version, sender, receiver), kind
    assert report.received["/heartbeat/interop"][0][0] == "beat"


@pytest.fixture
def ours(tmp_path: Path) -> Side:
    return Side("ours", sys.executable, tmp_path)


@pytest.fixture
def theirs(newest: str, tmp_path: Path) -> Side:
    return Side("newest", newest, tmp_path)


@pytest.fixture
def old(oldest: str, peers_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """Give 1.10.0, which has some settings by other names, and some not at all."""
    with alone(peers_directory / "ports"):
        wait_for(lambda: all(is_free(port) for port in (16543, 21200)), what="the ports that 1.10.0 has built in")
        monkeypatch.setenv("NAMESERVER_PORT", os.environ["POSTTROLL_NAMESERVER_PORT"])
        monkeypatch.setenv("PYTROLL_MC_GROUP", os.environ["POSTTROLL_MC_GROUP"])
        monkeypatch.setenv("POSTTROLL_ADDRESS_PUBLISH_PORT", "16543")
        monkeypatch.setenv("POSTTROLL_BROADCAST_PORT", "21200")
        monkeypatch.delenv("POSTTROLL_MULTICAST_INTERFACE")
        yield Side("1.10.0", oldest, tmp_path)


def is_free(port: int) -> bool:
    """Tell whether nobody has the TCP port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
        return True


both_ways = pytest.mark.parametrize("way", ["ours to theirs", "theirs to ours"])
either_nameserver = pytest.mark.parametrize("nameserver_of", ["ours", "theirs"])
either_registration = pytest.mark.parametrize("multicast", [True, False], ids=["multicast", "explicit"])


@pytest.mark.interop
class TestNewestPeer:
    """The newest release."""

    @pytest.fixture
    def sides(self, ours: Side, theirs: Side) -> dict[str, Side]:
        return {"ours": ours, "theirs": theirs}

    @both_ways
    @either_nameserver
    @either_registration
    def test_messages_arrive_as_they_were_sent(
        self, sides: dict[str, Side], way: str, nameserver_of: str, multicast: bool
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with all_of(
            sides[nameserver_of].nameserver(multicast),
            sender.publisher(multicast, versions="v1.01,v1.2"),
            receiver.subscriber(),
        ) as report:
            for version in ("v1.01", "v1.2"):
                check_payloads(report, sender, receiver, version, list(PAYLOADS))

    @both_ways
    @pytest.mark.parametrize("service", ["interop-alias", ""], ids=["alias", "all"])
    def test_services_are_found_by_alias_and_all_at_once(self, sides: dict[str, Side], way: str, service: str) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with receiver.nameserver(), sender.publisher(kinds=["text"]), receiver.subscriber(service) as report:
            report.await_subjects("/interop/any/text")

    @both_ways
    def test_topics_filter(self, sides: dict[str, Side], way: str) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with all_of(
            sender.nameserver(),
            sender.publisher(kinds=["text", "lines", "number"]),
            receiver.subscriber(topics=["/interop/any/num", "interop/any/li"]),
        ) as report:
            report.await_subjects("/interop/any/lines", "/interop/any/number")
            assert sorted(report.received) == ["/interop/any/lines", "/interop/any/number"]

    @both_ways
    @either_nameserver
    @either_registration
    def test_a_listening_subscriber_hears_of_a_new_publisher(
        self, sides: dict[str, Side], way: str, nameserver_of: str, multicast: bool
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        kinds = ["text"]
        with all_of(
            sides[nameserver_of].nameserver(multicast),
            sender.publisher(multicast, "first", kinds=kinds),
            receiver.subscriber(["first", "second"], addr_listener=True, timeout=1),
        ) as report:
            report.await_subjects("/first/any/text")
            with sender.publisher(multicast, "second", kinds=kinds):
                report.await_subjects("/second/any/text")

    @both_ways
    @either_nameserver
    @either_registration
    def test_a_lost_publisher_is_removed(
        self, sides: dict[str, Side], way: str, nameserver_of: str, multicast: bool
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with sides[nameserver_of].nameserver(multicast, max_age=2), contextlib.ExitStack() as publisher:
            address = publisher.enter_context(sender.publisher(multicast, kinds=["text"]))
            with receiver.subscriber(addr_listener=True) as report:
                report.await_subjects("/interop/any/text")
                report.read_until(lambda: report.addresses == [address], "address")
                publisher.close()
                report.read_until(lambda: not report.addresses, "removal")
                wait_for(lambda: lookup("interop") == [], what="the end of the registration")

    @both_ways
    def test_pickles_are_loaded(self, sides: dict[str, Side], way: str) -> None:
        dump = """if True:
            import base64, pickle, sys
            from posttroll.message import Message
            payloads = pickle.loads(base64.b64decode(sys.argv[1]))
            messages = [Message("/a", "info", data, version="v1.2") for data in payloads]
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                print(base64.b64encode(pickle.dumps(messages, protocol)).decode(), str(messages[0]))
        """
        load = """if True:
            import base64, pickle, sys
            from posttroll.message import Message
            for line in sys.stdin:
                pickled, text = line.split(" ", 1)
                messages = pickle.loads(base64.b64decode(pickled))
                assert all(type(message) is Message for message in messages)
                assert str(messages[0]) == text.rstrip("\\n"), (str(messages[0]), text)
                print(repr([message.data for message in messages]))
        """
        dumper, loader = (sides[name] for name in way.split(" to "))
        payloads = [PAYLOADS[kind] for kind in ("text", "unicode", "times", "nested-lists")]
        with dumper.run(dump, base64.b64encode(pickle.dumps(payloads, 4)).decode()) as running:
            status, pickles, _ = finish(running)
        assert status == 0, dumper.errors()
        with loader.run(load) as running:
            loaded, _ = running.communicate(pickles, DEADLINE)
        assert running.returncode == 0, loader.errors()
        assert loaded.splitlines() == [repr(payloads)] * len(pickles.splitlines())
        assert len(pickles.splitlines()) >= 5


@pytest.mark.interop
class TestNewestPeerWithCurve:
    """The secure backend of the newest release.

    Theirs looks up on `secure_zmq_nameserver_port`; it cannot register with listed nameservers, only by multicast.
    """

    @pytest.fixture
    def sides(self, ours: Side, theirs: Side) -> dict[str, Side]:
        return {"ours": ours, "theirs": theirs}

    @pytest.fixture(params=["ours", "theirs"], ids=["our-keys", "their-keys"])
    def keys(
        self, request: pytest.FixtureRequest, newest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Make the keys with the program of either side, and configure all processes to use them."""
        directory = tmp_path / "keys"
        (directory / "clients").mkdir(parents=True)
        programs = {
            "ours": [sys.executable, str(LIBRARY), "generate-keys"],
            "theirs": [str(Path(newest).parent / "posttroll-generate-keys")],
        }
        for name in ("server", "client"):
            command = [*programs[request.param], "-d", str(directory), name]
            subprocess.run(command, env=without_ours(), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
            (directory / f"{name}.key_secret").chmod(0o600)
        shutil.copy(directory / "client.key", directory / "clients")
        for name, value in {
            "BACKEND": "secure_zmq",
            "SECURE_ZMQ_NAMESERVER_PORT": free_port(),
            "SERVER_SECRET_KEY_FILE": directory / "server.key_secret",
            "SERVER_PUBLIC_KEY_FILE": directory / "server.key",
            "CLIENT_SECRET_KEY_FILE": directory / "client.key_secret",
            "CLIENTS_PUBLIC_KEYS_DIRECTORY": directory / "clients",
        }.items():
            monkeypatch.setenv("POSTTROLL_" + name, str(value))

    @pytest.mark.usefixtures("keys")
    @both_ways
    @either_nameserver
    def test_messages_arrive(self, sides: dict[str, Side], way: str, nameserver_of: str) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        kinds = ["text", "times", "mapping"]
        with all_of(
            sides[nameserver_of].nameserver(multicast=True),
            sender.publisher(multicast=True, versions="v1.2", kinds=kinds),
            receiver.subscriber(),
        ) as report:
            check_payloads(report, sender, receiver, "v1.2", kinds)

    @pytest.mark.usefixtures("keys")
    @both_ways
    @either_nameserver
    def test_a_listening_subscriber_hears_of_a_new_publisher(
        self, sides: dict[str, Side], way: str, nameserver_of: str
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with all_of(
            sides[nameserver_of].nameserver(multicast=True),
            sender.publisher(True, "first", kinds=["text"]),
            receiver.subscriber(["first", "second"], addr_listener=True, timeout=1),
        ) as report:
            report.await_subjects("/first/any/text")
            with sender.publisher(True, "second", kinds=["text"]):
                report.await_subjects("/second/any/text")

    @pytest.mark.usefixtures("keys")
    def test_their_subscriber_hears_our_publisher_without_multicast(self, sides: dict[str, Side]) -> None:
        ours, theirs = sides["ours"], sides["theirs"]
        with ours.nameserver(), ours.publisher(versions="v1.2", kinds=["times"]), theirs.subscriber() as report:
            check_payloads(report, ours, theirs, "v1.2", ["times"])

    @pytest.mark.usefixtures("keys")
    @both_ways
    @either_nameserver
    def test_a_plain_nameserver_with_keys_serves_a_secure_pair(
        self, sides: dict[str, Side], way: str, nameserver_of: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        with contextlib.ExitStack() as running:
            with monkeypatch.context() as plain_backend:
                plain_backend.setenv("POSTTROLL_BACKEND", "unsecure_zmq")
                running.enter_context(sides[nameserver_of].nameserver(multicast=True))
            running.enter_context(sender.publisher(multicast=True, kinds=["text"]))
            report = running.enter_context(receiver.subscriber())
            report.await_subjects("/interop/any/text")

    @pytest.mark.usefixtures("keys")
    @both_ways
    def test_a_subscriber_with_an_unknown_key_receives_nothing(
        self, sides: dict[str, Side], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sender, receiver = (sides[name] for name in way.split(" to "))
        posttroll.write_key_pair("stranger", tmp_path)
        with contextlib.ExitStack() as running:
            running.enter_context(sender.nameserver(multicast=True))
            address = running.enter_context(sender.publisher(multicast=True, kinds=["text"]))
            with monkeypatch.context() as other_key:
                other_key.setenv("POSTTROLL_CLIENT_SECRET_KEY_FILE", str(tmp_path / "stranger.key_secret"))
                refused = running.enter_context(receiver.subscriber(None, addresses=[address]))
            refused.read_until(lambda: refused.addresses == [address], "address")
            known = running.enter_context(receiver.subscriber(None, addresses=[address]))
            known.await_subjects("/interop/any/text")
            refused.end()
            assert refused.received == {}


@pytest.mark.interop
class TestOldPeer:
    """1.10.0, which reads and writes v1.01 only."""

    @pytest.fixture
    def sides(self, ours: Side, old: Side) -> dict[str, Side]:
        return {"ours": ours, "theirs": old}

    @either_nameserver
    @either_registration
    def test_it_is_heard(self, sides: dict[str, Side], nameserver_of: str, multicast: bool) -> None:
        ours, old = sides["ours"], sides["theirs"]
        with sides[nameserver_of].nameserver(multicast), old.publisher(multicast), ours.subscriber() as report:
            check_payloads(report, old, ours, "", list(PAYLOADS))

    @either_nameserver
    @either_registration
    @pytest.mark.parametrize("version", ["v1.01", "auto"])
    def test_it_hears_us(
        self,
        sides: dict[str, Side],
        nameserver_of: str,
        multicast: bool,
        version: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        ours, old = sides["ours"], sides["theirs"]
        monkeypatch.setenv("POSTTROLL_MESSAGE_VERSION", version)
        kinds = list(PAYLOADS) if version == "v1.01" else WITHOUT_TIMES
        with all_of(
            sides[nameserver_of].nameserver(multicast), ours.publisher(multicast, kinds=kinds), old.subscriber()
        ) as report:
            check_payloads(report, ours, old, "", kinds)

    @either_registration
    def test_a_pair_of_it_uses_our_nameserver(self, sides: dict[str, Side], multicast: bool) -> None:
        ours, old = sides["ours"], sides["theirs"]
        with all_of(
            ours.nameserver(multicast),
            old.publisher(multicast, "first", kinds=["text"]),
            old.subscriber(["first", "second"], addr_listener=True, timeout=1),
        ) as report:
            report.await_subjects("/first/any/text")
            with old.publisher(multicast, "second", kinds=["text"]):
                report.await_subjects("/second/any/text")

    @both_ways
    def test_a_lost_publisher_is_removed(
        self, sides: dict[str, Side], way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("POSTTROLL_MESSAGE_VERSION", "v1.01")
        sender, receiver = (sides[name] for name in way.split(" to "))
        with sides["ours"].nameserver(max_age=2), contextlib.ExitStack() as publisher:
            publisher.enter_context(sender.publisher(kinds=["text"]))
            with receiver.subscriber(addr_listener=True) as report:
                report.await_subjects("/interop/any/text")
                publisher.close()
                report.read_until(lambda: not report.addresses, "removal")

    def test_it_reads_all_that_our_nameserver_publishes(
        self, sides: dict[str, Side], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(posttroll_ns.AddressReceiver, "HEARTBEAT", 1.2)
        with nameserver(max_age=2), contextlib.ExitStack() as publisher:
            with sides["theirs"].subscriber(None, addresses=["tcp://127.0.0.1:16543"]) as report:
                report.await_subjects("/heartbeat/address_receiver")
                publisher.enter_context(sides["ours"].publisher(kinds=["text"]))
                report.await_subjects("/address/interop")
                assert [version for (_, version, *_), _ in report.received.values()] == ["v1.01", "v1.01"]

    def test_its_pickles_are_loaded(self, sides: dict[str, Side]) -> None:
        code = """if True:
            import pickle, sys
            from posttroll.message import Message
            sys.stdout.buffer.write(pickle.dumps(Message("/a", "info", {"key": ["value"]})))
        """
        with sides["theirs"].run(code) as running:
            assert running.stdout is not None
            message = pickle.loads(running.stdout.buffer.read())
        assert type(message) is posttroll.Message
        assert (message.subject, message.type, message.data, message.version) == (
            "/a",
            "info",
            {"key": ["value"]},
            "v1.01",
        )


@pytest.mark.interop
class TestVendoredBesideKnownPackage:
    """Ours as app._vendor.posttroll, in one process with the known package under its own name."""

    @pytest.fixture
    def app(self, newest: str, tmp_path: Path) -> Callable[..., Any]:
        """Return what runs Python with such an application."""
        directory = tmp_path / "application"
        vendor = directory / "app" / "_vendor"
        vendor.mkdir(parents=True)
        for package in (directory / "app", vendor):
            (package / "__init__.py").touch()
        for file in (LIBRARY, NAMESERVER):
            shutil.copy(file, vendor)
        return lambda *args: process(newest, "-u", *args, cwd=directory, env=without_ours())

    @pytest.mark.parametrize("theirs_first", [True, False], ids=["theirs-first", "ours-first"])
    def test_neither_disturbs_the_other(self, app: Callable[..., Any], theirs_first: bool) -> None:
        code = """if True:
            import json, logging, sys, threading, time
            if sys.argv[1] == "True":
                import posttroll.publisher, posttroll.subscriber, posttroll.ns, posttroll.message
            import app._vendor.posttroll.publisher, app._vendor.posttroll.ns
            from app._vendor.posttroll.message import Message
            from app._vendor.posttroll.publisher import Publish
            from app._vendor.posttroll.subscriber import Subscribe, Subscriber
            import posttroll, posttroll.message, posttroll.ns, posttroll.publisher, posttroll.subscriber
            from app._vendor import posttroll as ours

            assert posttroll.__file__.endswith("__init__.py") and "_vendor" not in posttroll.__file__
            assert "_vendor" in ours.__file__
            assert Message is not posttroll.message.Message
            assert posttroll.message is sys.modules["posttroll.message"] is not ours.message
            with ours.config.set(nameserver_port=1):
                assert posttroll.config.get("nameserver_port") != 1
            with posttroll.config.set(nameserver_port=2):
                assert ours.config.get("nameserver_port") != 2
            assert ours.get_context() is not posttroll.get_context()

            def send_until(done, publisher, make):
                number = 0
                while not done.is_set():
                    publisher.send(str(make("/from/" + publisher_name(publisher), "info", {"n": number})))
                    number += 1
                    time.sleep(0.02)

            def publisher_name(publisher):
                return "theirs" if type(publisher).__module__.startswith("posttroll") else "ours"

            done = threading.Event()
            arguments = {"nameservers": ["localhost"], "broadcast_interval": 0.5}
            KnownPublish = posttroll.publisher.Publish
            with Publish("ours", 0, **arguments) as mine, KnownPublish("theirs", 0, **arguments) as known:
                senders = [
                    threading.Thread(target=send_until, args=(done, mine, Message)),
                    threading.Thread(target=send_until, args=(done, known, posttroll.message.Message)),
                ]
                for sender in senders:
                    sender.start()
                deadline = time.monotonic() + 30
                while not all(ours.get_pub_address(name, 1) for name in ("ours", "theirs")):
                    assert time.monotonic() < deadline, "not registered"
                    time.sleep(0.05)
                for subscribe, message_class in (
                    (Subscribe, Message),
                    (posttroll.subscriber.Subscribe, posttroll.message.Message),
                ):
                    with subscribe(["ours", "theirs"]) as subscriber:
                        seen = set()
                        for message in subscriber.recv(timeout=1):
                            assert time.monotonic() < deadline, seen
                            if message is not None:
                                assert type(message) is message_class
                                seen.add(message.subject)
                            if seen == {"/from/ours", "/from/theirs"}:
                                break
                    print(message_class.__module__, sorted(seen))
                done.set()
                for sender in senders:
                    sender.join()
        """
        with app("-m", "app._vendor.posttroll_ns", "--no-multicast") as running:
            await_line(running, "answers on port")
            with app("-c", code, theirs_first) as program:
                status, out, err = finish(program, 60)
            assert status == 0, err
            assert out.splitlines() == [
                "app._vendor.posttroll.message ['/from/ours', '/from/theirs']",
                "posttroll.message ['/from/ours', '/from/theirs']",
            ]
            assert running.poll() is None


# ======================================================================================================================
# Populated worlds: more than one of everything, processes that write down what they sent and handed out
# ======================================================================================================================

COUNTED_AT_THE_END = True  # a stopped publisher still says how many messages were dropped, its end included

NUMBERING_PUBLISHER = """
import json, logging, multiprocessing, os, select, signal, sys, time, posttroll
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
name, life, port, nameservers, pace, asked_at_the_end, record = json.loads(sys.argv[1])
record = open(record, "a", buffering=1)
ended = []
signal.signal(signal.SIGTERM, lambda *args: ended.append(True))
print("up", file=record)

def publish_something_else():
    with posttroll.Publisher("tcp://*:0") as other:
        other.send(posttroll.Message("/other", "info", "of a child"))

number = dropped = 0
with posttroll.Publish(name, port, broadcast_interval=0.5, nameservers=nameservers) as publisher:
    while not ended:
        wish, count = (os.read(0, 100).split() if select.select([0], [], [], pace)[0] else ("send", 1))
        if wish == b"fork":
            child = multiprocessing.get_context("fork").Process(target=publish_something_else)
            child.start()
            child.join(20)
            print("child", child.exitcode, file=record)
            child.kill()
        for _ in range(int(count)):
            print("sent", life, number, time.monotonic(), file=record)
            data = {"name": name, "life": life, "number": number, "padding": "x" * 500}
            publisher.send(posttroll.Message("/numbers/" + name, "info", data))
            number += 1
        if publisher.dropped != dropped:
            dropped = publisher.dropped
            print("dropped", dropped, file=record)
if asked_at_the_end:
    print("dropped", publisher.dropped, file=record)
"""

RECORDING_SUBSCRIBER = """
import json, logging, signal, sys, time, posttroll
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
settings, pace, record = json.loads(sys.argv[1])
record = open(record, "a", buffering=1)
with posttroll.create_subscriber_from_dict_config({"topics": "/numbers", "timeout": 0, **settings}) as subscriber:
    signal.signal(signal.SIGTERM, lambda *args: subscriber.stop())
    print("up", time.monotonic(), file=record)
    for message in subscriber.recv():
        print("got", message.data["name"], message.data["life"], message.data["number"], file=record)
        time.sleep(pace)
"""


class Part:
    """One of the programs of the world, at rest: where it runs and how; what it was in its lives."""

    def __init__(
        self,
        name: str,
        kind: str,
        host: str,
        pace: float = 0,
        wants: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.name, self.kind, self.host, self.pace, self.wants = name, kind, host, pace, wants
        self.settings, self.environment = settings, environment or {}
        self.lives: list[Life] = []

    @property
    def life(self) -> Life:
        return self.lives[-1]


class Life:
    """A process, from its start to its end, and what it wrote down."""

    def __init__(self, part: Part, number: int, running: subprocess.Popen[str], record: Path, log: Path) -> None:
        self.part, self.host, self.number, self.running, self.log = part, part.host, number, running, log
        self.record, self._position = record, 0
        self.started, self.ended = time.monotonic(), float("inf")
        self.signalled = float("inf")  # when it was told to end
        self.ending: int | None = None  # the signal that it got
        self.sent: dict[int, float] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.dropped = 0
        self.newest: collections.deque[tuple[str, int]] = collections.deque(maxlen=200)  # whose messages came last
        self.children: list[str] = []
        self.up = part.kind == "nameserver"  # whoever starts one waits until it answers

    def __str__(self) -> str:
        return f"{self.part.name}.{self.number}"

    def read(self) -> Life:
        """Read what has been written down since."""
        with self.record.open() as file:
            file.seek(self._position)
            lines = file.read()
        lines = lines[: lines.rfind("\n") + 1]
        self._position += len(lines)
        for what, *words in map(str.split, lines.splitlines()):
            if what == "sent":
                self.sent[int(words[1])] = float(words[2])
            elif what == "got":
                publisher = words[0], int(words[1])
                self.got.setdefault(publisher, []).append(int(words[2]))
                self.newest.append(publisher)
            elif what == "dropped":
                self.dropped = int(words[0])
            elif what == "up":
                self.up = True
                self.started = float(words[0]) if words else self.started  # a busy host takes its time until then
            else:
                self.children.append(words[0])
        return self

    def tell(self, wish: str) -> None:
        """Tell a publisher to do something: ``burst COUNT``, ``fork 1``."""
        assert self.running.stdin is not None
        self.running.stdin.write(wish + "\n")
        self.running.stdin.flush()

    def resources(self) -> dict[str, float]:
        """Return what it uses of the machine: threads, files, memory in MB."""
        threads = len(os.listdir(f"/proc/{self.running.pid}/task"))
        return {"threads": threads, "files": descriptors_of(self.running), "MB": memory_of(self.running)}


class Crowd:
    """Programs that run together on this host: nameservers, publishers that number, subscribers that write down."""

    def __init__(
        self,
        directory: Path,
        stack: contextlib.ExitStack,
        nameservers: list[Part],
        publishers: list[Part],
        subscribers: list[Part],
    ) -> None:
        self.directory, self.stack = directory, stack
        self.nameservers, self.publishers, self.subscribers = nameservers, publishers, subscribers
        self.command: list[str] = []  # the words of the command line before those that run Python

    @property
    def parts(self) -> list[Part]:
        return self.nameservers + self.publishers + self.subscribers

    def environment(self, part: Part) -> dict[str, str]:
        return {**os.environ, **part.environment}

    def prefix(self, part: Part) -> list[str]:
        return self.command

    def start(self, part: Part) -> None:
        name, settings = f"{part.name}.{len(part.lives)}", part.settings
        record, log = self.directory / f"{name}.record", self.directory / f"{name}.log"
        record.touch()
        if part.kind == "nameserver":
            words = [NAMESERVER, *settings["arguments"]]
        elif part.kind == "publisher":
            arguments = [part.name, len(part.lives), settings.get("port", 0), settings.get("nameservers"), part.pace]
            words = ["-c", NUMBERING_PUBLISHER, json.dumps([*arguments, COUNTED_AT_THE_END, str(record)])]
        else:
            words = ["-c", RECORDING_SUBSCRIBER, json.dumps([settings, part.pace, str(record)])]
        output = self.stack.enter_context(log.open("w"))
        command = [*self.prefix(part), sys.executable, "-u", *words]
        running = process(*command, env=self.environment(part), stdout=output, stderr=output)
        part.lives.append(Life(part, len(part.lives), self.stack.enter_context(running), record, log))

    def start_all(self) -> None:
        for part in self.parts:
            self.start(part)

    def send_signal(self, part: Part, number: int) -> None:
        part.life.ending, part.life.signalled = number, time.monotonic()
        part.life.running.send_signal(number)

    def has_ended(self, life: Life) -> bool:
        if life.running.poll() is not None:
            life.ended = min(life.ended, time.monotonic())
        return life.ended < float("inf")


def unheard(crowd: Crowd, since: dict[Part, int]) -> list[str]:
    """Return which subscribers have no message of a publisher that they want, later than number *since*."""
    heard = [(subscriber, subscriber.life.read().got) for subscriber in crowd.subscribers]
    return [
        f"{publisher.life} by {subscriber.life}"
        for publisher in crowd.publishers
        for subscriber, got in heard
        if publisher.name in subscriber.wants
        and got.get((publisher.name, publisher.life.number), [-1])[-1] <= since[publisher]
    ]


def hear_each_other(crowd: Crowd, when: str, timeout: float = 60) -> None:
    """Wait until all subscribers have got what all publishers send from now on."""
    last = {part: max(part.life.read().sent, default=-1) for part in crowd.publishers}
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        missing = unheard(crowd, last)
        if not missing:
            return
        time.sleep(0.02)
    pytest.fail(f"Not heard {when}: {', '.join(missing)}")


def read_to_the_end(crowd: Crowd, is_behind: bool = False) -> None:
    """Wait until the subscribers have what the publishers sent, or nothing comes any more.

    Those that are slow may still be behind with what publishers have sent that have ended long ago: *is_behind*.
    """
    last = {part: max(part.life.read().sent, default=0) - 1 for part in crowd.publishers}
    count, deadline = -1, time.monotonic() + 5
    while (unheard(crowd, last) or is_behind) and time.monotonic() < deadline:
        now = sum(len(numbers) for part in crowd.subscribers for numbers in part.life.got.values())
        if now > count:
            count, deadline = now, time.monotonic() + 5
        time.sleep(0.05)


def bad_ends(crowd: Crowd) -> list[str]:
    """Return which processes ended otherwise than they should (when they were up), and what they said."""
    faults = []
    for life in [life for part in crowd.parts for life in part.lives]:
        obeys = life.ending == signal.SIGTERM and life.read().up
        if life.running.returncode != (0 if obeys else -(life.ending or 0)) or "Traceback" in life.log.read_text():
            faults.append(f"{life} ended with {life.running.returncode}: {life.log.read_text()[-2000:]}")
    return faults


def is_in_order(numbers: Sequence[int]) -> bool:
    """Whether these are two sequences of increasing numbers, mixed: what came live, and what was caught up."""
    higher = lower = -1
    for number in numbers:
        if number > higher:
            higher = number
        elif number > lower:
            lower = number
        else:
            return False
    return True


def gaps(crowd: Crowd) -> list[str]:
    """Return which subscribers did not get all of a publisher, once and in order, from the earliest that they got.

    Who was killed, or ended before all had come, may lack some of the last ones.
    """
    found = []
    for publisher in [life.read() for part in crowd.publishers for life in part.lives]:
        for subscriber in [life.read() for part in crowd.subscribers for life in part.lives]:
            got = subscriber.got.get((publisher.part.name, publisher.number), [])
            expected = {number for number in publisher.sent if got and number >= min(got)}
            if publisher.ending == signal.SIGKILL or subscriber.ending:
                expected &= set(got)
            if len(got) != len(expected) or set(got) != expected or not is_in_order(got):
                found.append(f"{publisher} to {subscriber}: {len(got)} of {len(expected)}, {publisher.dropped} dropped")
    return found


@contextlib.contextmanager
def silent_name_server(crowd: Crowd) -> Iterator[None]:
    """Let the programs of a crowd live on a host where nobody answers when a host name is asked for."""
    name = f"posttroll-crowd-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"It may not make network namespaces: {getattr(error, 'stderr', error)}")
    settings = Path("/etc/netns", name)
    listen = "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.53', 53)); "
    listen += "print('bound', flush=True); sys.stdin.read()"
    ask = "import socket; socket.getaddrinfo('silent.example', 1)"
    try:
        settings.mkdir(parents=True)
        (settings / "resolv.conf").write_text("nameserver 127.0.0.53\noptions timeout:30 attempts:10\n")
        ip("-n", name, "link", "set", "lo", "up")
        crowd.command = ["ip", "netns", "exec", name]
        with process(*crowd.command, sys.executable, "-c", listen) as server:
            await_line(server, "bound")
            with process(*crowd.command, sys.executable, "-c", ask) as asking:
                yield
                assert asking.poll() is None, "somebody answered"
    finally:
        shutil.rmtree(settings, ignore_errors=True)
        ip("netns", "del", name)


def leave_few_files(life: Life, count: int) -> None:
    """Let a process open only *count* files more."""
    import resource

    limit = max(map(int, os.listdir(f"/proc/{life.running.pid}/fd"))) + 1 + count
    resource.prlimit(life.running.pid, resource.RLIMIT_NOFILE, (limit, limit))


class TestPopulatedWorlds:
    """A host with a nameserver, three publishers and five subscribers, of different speeds, wishes and topics."""

    @contextlib.contextmanager
    def living(self, directory: Path, silent: bool = False) -> Iterator[Crowd]:
        """Give such a world in which all hear each other; with names in the settings that nobody resolves."""
        with contextlib.ExitStack() as stack:
            everybody, name = ["fast", "medium", "slow"], ["silent.example"] * silent
            find: dict[str, Any] = {"nameserver": ["localhost", *name]}
            register = {"nameservers": ["localhost", *name]}
            elsewhere = {"addresses": ["tcp://silent.example:9000"]} if silent else {}
            medium = {"topics": "/numbers/medium", "addr_listener": True}
            crowd = Crowd(
                directory,
                stack,
                [Part("ns", "nameserver", "", arguments=["--no-multicast"])],
                [Part(name, "publisher", "", pace, **register) for name, pace in zip(everybody, (0.01, 0.05, 0.2))],
                [
                    Part("all", "subscriber", "", 0, everybody, services="", addr_listener=True, **find),
                    Part("busy", "subscriber", "", 0.002, everybody, services="", addr_listener=True, **find),
                    Part("looking", "subscriber", "", 0, everybody, services=everybody, **find, **elsewhere),
                    Part("two", "subscriber", "", 0.001, ["fast", "slow"], services=["fast", "slow"], **find),
                    Part("topic", "subscriber", "", 0, ["medium"], services="", **medium, **find),
                ],
            )
            if silent:
                stack.enter_context(silent_name_server(crowd))
            crowd.start_all()
            hear_each_other(crowd, "at the start")
            yield crowd

    @pytest.fixture(
        params=[
            "secure",
            "few files",
            "silent name server",
            "silent name server, names on the allow list",
        ]
    )
    def crowd(self, request, tmp_path, monkeypatch):
        if request.param == "secure":
            request.getfixturevalue("keys")
        if "allow list" in request.param:
            monkeypatch.setenv("POSTTROLL_AUTHORIZED_CLIENT_ADDRESSES", "silent.example 10.0.0.0/8")
        with self.living(tmp_path, "silent" in request.param) as crowd:
            if request.param == "few files":
                for part in crowd.parts:
                    leave_few_files(part.life, 4)
            yield crowd

    @staticmethod
    def end(crowd: Crowd, parts: list[Part], number: int = signal.SIGTERM) -> None:
        for part in parts:
            crowd.send_signal(part, number)
        for part in parts:
            wait_for(lambda: crowd.has_ended(part.life), 60, f"the end of {part.name}")  # noqa: B023

    def end_all(self, crowd: Crowd) -> None:
        """End the publishers, let the others read to the end; nothing may be missing, nobody may complain."""
        self.end(crowd, crowd.publishers)
        read_to_the_end(crowd)
        missing = gaps(crowd)
        self.end(crowd, crowd.subscribers + crowd.nameservers)
        assert missing + bad_ends(crowd) == []

    def test_every_message_reaches_every_subscriber(self, crowd):
        """A publisher is killed, then the nameserver; a subscriber goes; their successors find all and are found."""
        for part, number in (
            (crowd.publishers[0], signal.SIGKILL),
            (crowd.nameservers[0], signal.SIGKILL),
            (crowd.subscribers[1], signal.SIGTERM),
        ):
            self.end(crowd, [part], number)
            crowd.start(part)
        hear_each_other(crowd, "after restarts")
        for part in crowd.publishers:
            part.life.tell("burst 400")
        hear_each_other(crowd, "after a burst")
        self.end_all(crowd)

    def test_strangers_that_take_all_files(self, tmp_path):
        """They connect until nameserver and publishers have no files left; the others do not notice."""
        with self.living(tmp_path) as crowd:
            for part in crowd.nameservers + crowd.publishers:
                leave_few_files(part.life, 4)
            ports = [config.get(name) for name in ("nameserver_port", "broadcast_port", "address_publish_port")]
            ports += [int(uri.rpartition(":")[2]) for uri in uris("")]
            assert len(ports) == 6
            with tcp_connections(20 * len(ports), *ports):
                hear_each_other(crowd, "while strangers are connected")
            self.end(crowd, crowd.subscribers[:1])
            crowd.start(crowd.subscribers[0])
            hear_each_other(crowd, "after strangers have gone")
            self.end_all(crowd)


# ======================================================================================================================
# Catching up: links, processes and queues that fail, and each message comes once all the same
# ======================================================================================================================

NUMBERS_PROCESS = """
import sys, posttroll
address, life, *options = sys.argv[1:]
if address.startswith("tcp:"):
    publisher = posttroll.Publisher(address, "numbers")
else:
    publisher = posttroll.NoisyPublisher("numbers", int(address), broadcast_interval=0.1, nameservers=["localhost"])
number = 0
with publisher:
    print("port", publisher.port_number, flush=True)
    for line in sys.stdin:
        word, _, count = line.strip().partition(" ")
        if word == "await":
            assert publisher.wait_for_subscribers(int(count), 20)
        for _ in range(int(count) if word == "send" else 0):
            publisher.send(posttroll.Message("/numbers", "info", [life, number]))
            number += 1
        print("done", flush=True)
"""

COLLECTING_PROCESS = """
import sys, posttroll
with posttroll.Subscriber(sys.argv[1:]) as subscriber:
    for message in subscriber.recv():
        print(message.data, flush=True)
"""


needs_proxy = pytest.mark.skipif(
    not hasattr(zmq, "proxy_steerable") or zmq.zmq_version_info() >= (4, 3, 6), reason="no way to end it"
)


@contextlib.contextmanager
def proxy(port: int) -> Iterator[int]:
    """Run an XSUB-XPUB proxy before a publisher; gives the port of the proxy."""
    kinds = (zmq.XSUB, zmq.XPUB, zmq.PAIR, zmq.PAIR)
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        front, back, control, steer = (stack.enter_context(context.socket(kind)) for kind in kinds)
        for sock in (front, back, control, steer):
            sock.linger = 0
        front.connect(local_address(port))
        out = back.bind_to_random_port("tcp://127.0.0.1")
        control.bind("inproc://control")
        steer.connect("inproc://control")
        with in_thread(lambda: zmq.proxy_steerable(front, back, None, control)):
            try:
                yield out
            finally:
                steer.send(b"TERMINATE")


class Relay:
    """A TCP relay before a port of this host: a cable that can be cut, or go silent as if a host had vanished.

    What it passes on comes *delay* seconds late.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", own_port: int = 0, delay: float = 0) -> None:
        self._target = port
        self._delay = delay
        self._listener = socket.create_server((host, own_port))
        self.port = self._listener.getsockname()[1]
        self.address = f"tcp://{host}:{self.port}"
        self._is_cut = False
        self._is_half_open = False
        self._flows = threading.Event()
        self._flows.set()
        self._ends: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        self._acceptor = self._start(self._accept)

    def _start(self, function: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=function, args=args)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._is_cut:
                with contextlib.suppress(OSError):
                    far = socket.create_connection(("127.0.0.1", self._target))
                    self._ends += [near, far]
                    self._pumps += [self._start(self._pump, near, far), self._start(self._pump, far, near)]
                    continue
            near.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                time.sleep(self._delay)
                self._flows.wait()
                if not data:
                    break
                sink.sendall(data)
        for end in () if self._is_half_open else (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End all connections; what is under way is lost, and new ones are refused."""
        self._is_cut = True
        self._end_all()

    def cut_on_one_side(self) -> None:
        """End all connections, as `cut` does, but the other side does not notice."""
        self._is_cut = self._is_half_open = True
        for near in self._ends[::2]:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)

    def _end_all(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._flows.set()
        pumps, ends, self._pumps, self._ends = self._pumps, self._ends, [], []
        for pump in pumps:
            pump.join(DEADLINE)
        for end in ends:
            end.close()

    def silence(self) -> None:
        """Let nothing through any more, and tell nobody."""
        self._flows.clear()

    def mend(self) -> None:
        """Let new connections work; those that were silent are gone, and what they had under way."""
        if not self._flows.is_set():
            self._end_all()
        self._is_cut = False

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_cut = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(DEADLINE)
        self._listener.close()
        self._end_all()


def await_count(data: list[Any], count: int) -> None:
    """Wait until there are so many."""
    deadline = time.monotonic() + DEADLINE
    while len(data) < count:
        assert time.monotonic() < deadline, f"Only {len(data)} of {count} have come"
        time.sleep(0.005)


class Numbers:
    """Sends numbers, each once."""

    def __init__(self, publisher: Any, subject: str = "/numbers", padding: str = "") -> None:
        self.publisher, self.subject, self.padding = publisher, subject, padding
        self.count = 0

    def send(self, count: int, pause: float = 0) -> None:
        for _ in range(count):
            data = [self.count, self.padding] if self.padding else self.count
            self.publisher.send(posttroll.Message(self.subject, "info", data))
            self.count += 1
            time.sleep(pause)

    def check(self, data: list[Any]) -> None:
        """Wait until all has come, and look whether it came once."""
        await_count(data, self.count)
        wait_for(lambda: not self.publisher._audience.unserved())
        end = f"end {chance.random()}"
        self.publisher.send(posttroll.Message(self.subject, "info", end))
        wait_for(lambda: data[-1] == end or data[-1] == [end, self.padding])
        data.remove(end)
        assert sorted(each[0] if self.padding else each for each in data) == list(range(self.count))


@contextlib.contextmanager
def behind_relay(topics: Any = "", **settings: Any) -> Iterator[tuple[Any, Relay, Any]]:
    """Give a publisher, a relay, and a subscriber that is connected to the publisher by the relay, as by a cable.

    They have the same port, on two addresses: to the subscriber it is the publisher's own.
    """
    with posttroll.Publisher("tcp://127.0.0.1:0", "numbers") as publisher:
        port = publisher.port_number
        with Relay(port, "127.0.0.2", port) as relay, posttroll.Subscriber([relay.address], topics, **settings) as sub:
            assert publisher.wait_for_subscribers(1, DEADLINE)
            yield publisher, relay, sub


def positions_of(subscriber: posttroll.Subscriber) -> list[int | None]:
    """Return up to which number a subscriber knows that it has all, for each publisher."""
    return [source.position for stream in subscriber._streams.values() for source in list(stream._sources.values())]


def command_of(running: subprocess.Popen[str], *commands: str) -> None:
    """Have a process of `NUMBERS_PROCESS` obey."""
    for each in commands:
        running.stdin.write(each + "\n")
        running.stdin.flush()
        await_line(running, "done")


@pytest.fixture
def short_heartbeats(monkeypatch):
    """Let dead connections be noticed soon, by this process and by its children."""
    for name, value in {
        "ZMTP_HEARTBEAT_INTERVAL": "0.2", "ZMTP_HEARTBEAT_TIMEOUT": "0.6", "RECEIVE_HIGH_WATER_MARK": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv("POSTTROLL_" + name, value)


class TestHistory:
    def test_its_three_bounds(self):
        text = text_message("x" * 100)
        for bounds, kept in (
            ({"history_messages": 7}, 7),
            ({"history_bytes": 10 * (len(text) + posttroll.History.OVERHEAD)}, 10),
            ({"history_messages": 0}, 0),
            ({"history_bytes": 0}, 0),
            ({"history_seconds": 0}, 0),
        ):
            with config.set(bounds), posttroll.Publisher("tcp://*:0") as pub:
                for _ in range(50):
                    pub.send(text)
                assert pub.history_length == kept, bounds

    def test_the_newest_are_kept(self):
        history = posttroll.History(3, 10**6, 60)
        for number in range(5):
            history.append(b"%d" % number, 100.0 + number)
        assert history.after(0, 10) == [(3, b"2"), (4, b"3"), (5, b"4")]
        assert history.after(3, 1) == [(4, b"3")]
        assert history.after(5, 10) == history.after(10**9, 10) == []
        assert history.last_before(103.5) == 4
        assert history.has_lost_since(101.0)
        assert not history.has_lost_since(101.5)

    def test_what_is_too_old_is_forgotten_without_sending(self):
        """Memory is given back although the publisher is silent."""
        history = posttroll.History(100, 10**6, 5)
        for number in range(10):
            history.append(b"x" * 1000, 100.0 + number)
        assert history.expire(108.5) == 109.0
        assert (len(history), history.size) == (6, 6 * (1000 + history.OVERHEAD))
        assert history.expire(200) is None
        assert (len(history), history.size, history.first, history.number) == (0, 0, 11, 10)

    def test_a_message_larger_than_all_of_it(self):
        with config.set(history_bytes=1000), connected() as (pub, sub):
            pub.send(text_message("small"))
            pub.send(text_message("x" * 5000))
            pub.send(text_message("small again"))
            assert len(received_data(sub, 3)) == 3
            assert pub.history_length == 1


class TestCatchingUp:
    @pytest.mark.parametrize("kind", ["cut", "silence"])
    def test_a_link_that_fails_again_and_again(self, kind, short_heartbeats):
        """What was under way, and what was sent meanwhile, comes afterwards; nothing comes twice."""
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            for _ in range(4):
                numbers.send(50, 0.001)
                getattr(relay, kind)()
                numbers.send(200, 0.004)
                relay.mend()
                numbers.send(50, 0.001)
            numbers.check(data)
            assert sub.missed == pub.dropped == 0

    def test_a_burst_whose_connection_is_cut_at_any_moment(self, short_heartbeats):
        """A busy publisher, 20 cuts: much is under way each time."""
        config.set(history_messages=100_000, history_bytes=10**8)
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            ended = threading.Event()

            def cut() -> None:
                for _ in range(20):
                    number = numbers.count + chance.randrange(50, 200)
                    wait_for(lambda number=number: numbers.count >= number)
                    relay.cut()
                    relay.mend()
                ended.set()

            with in_thread(cut):
                while not ended.is_set():
                    numbers.send(20, 0.0002)
            numbers.check(data)

    def test_much_that_comes_before_all_is_caught_up(self, short_heartbeats, monkeypatch):
        """More live messages than are remembered, and the connection fails before the end, again and again."""
        monkeypatch.setattr(posttroll._LiveRecord, "SIZE", 100)
        monkeypatch.setattr(posttroll._Audience, "CHUNK", 1)
        monkeypatch.setattr(posttroll._Audience, "LOOK_SECONDS", 0.01)
        config.set(history_messages=100_000, history_bytes=10**8)
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(10)
            wait_for(lambda: len(data) == 10)
            relay.cut()
            wait_for(lambda: not pub.subscriber_count)
            numbers.send(2000)
            were_behind = []
            for _ in range(3):
                relay.mend()
                (peer,) = wait_for(lambda: list(pub._audience.peers.values()))
                wait_for(lambda peer=peer: peer.has_asked)
                numbers.send(300, 0.0003)
                were_behind.append(peer.after is not None)
                relay.cut()
                wait_for(lambda: not pub.subscriber_count)
            relay.mend()
            numbers.check(data)
            assert any(were_behind)
            assert sub.missed == pub.dropped == 0

    def test_those_that_are_caught_up_come_in_order(self, short_heartbeats):
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(1)
            wait_for(lambda: data == [0])
            relay.cut()
            numbers.send(3000)
            relay.mend()
            wait_for(lambda: len(data) == 3001)
            assert data == list(range(3001))

    @pytest.mark.parametrize("translate", [False, "origin"])
    def test_a_publisher_that_is_let_go_and_comes_again(self, translate, short_heartbeats):
        """As a nameserver may take it for lost while its network is: what came before does not come again."""
        with behind_relay(translate=translate) as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            for _ in range(3):
                numbers.send(20)
                await_count(data, numbers.count)
                relay.cut()
                sub.remove(relay.address)
                wait_for(lambda: sub._left)
                assert sum(len(left._live._frozen) for left in sub._left.values()) <= 20  # what may still be needed
                wait_for(lambda: not pub.subscriber_count)
                numbers.send(5)
                relay.mend()
                sub._add(relay.address, None, sub._begin)  # as those are that are found by their names
                await_count(data, numbers.count)
            numbers.check(data)
            assert (sub.caught_up, sub.missed) == (15, 0)

    @pytest.mark.parametrize("durable", [None, "name"])
    def test_topics_that_are_added_while_much_is_under_way(self, durable, monkeypatch, tmp_path):
        """One of two addresses gets more topics, as its publisher sends as fast as it can."""
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(tmp_path))
        with connected("/numbers", durable=durable) as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
            (address,) = sub.addresses
            sub.add(local_address(other.port_number))
            with serving(sub) as data:
                numbers = Numbers(pub)
                for topic in ("/a", "/b", "/c"):
                    numbers.send(500)
                    sub.add(address, topic)
                numbers.send(500)
                numbers.check(data)
                assert sub.missed == 0

    @pytest.mark.parametrize("is_alone", [True, False])
    @pytest.mark.parametrize("durable", [None, "name"])
    def test_an_address_that_gets_more_topics_and_less_again(self, durable, is_alone, monkeypatch, tmp_path):
        """It goes on where it was last, not where it was when it had these topics, alone or together with another."""
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(tmp_path))
        with contextlib.ExitStack() as stack:
            pub, sub = stack.enter_context(connected("/numbers", durable=durable))
            (address,) = sub.addresses
            if not is_alone:
                sub.add(local_address(stack.enter_context(posttroll.Publisher("tcp://*:0")).port_number))
            data = stack.enter_context(serving(sub))
            numbers = Numbers(pub)
            for turn in range(6):
                if turn % 2:
                    sub.remove(address)
                    wait_for(lambda: not pub.subscriber_count)
                    numbers.send(5)
                sub.add(address, None if turn % 2 else "/other")
                numbers.send(50)
                await_count(data, numbers.count)
                wait_for(lambda: not pub._audience.unserved())
            numbers.check(data)

    def test_a_second_address_with_more_topics_takes_nothing_from_the_first(self, monkeypatch):
        """The first one still hears the publisher, so nothing is to go on elsewhere."""
        taken = []
        monkeypatch.setattr(posttroll._LiveRecord, "hand_over", lambda *args: taken.append(args))
        with contextlib.ExitStack() as stack:
            pub = stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0"))
            relay = stack.enter_context(Relay(pub.port_number, "127.0.0.2", pub.port_number))
            sub = stack.enter_context(posttroll.Subscriber([local_address(pub.port_number)], "/few"))
            data = stack.enter_context(serving(sub))
            wait_for(lambda: sub.up_to_date == 1)
            sub.add(relay.address, ["/"])
            wait_for(lambda: sub.up_to_date == 2)
            pub.send(text_message("heard", "/more"))
            wait_for(lambda: data == ["heard"])
            assert not taken

    def test_topics_that_are_added_before_the_publisher_is_found(self):
        """What is wanted of the past comes all the same."""
        with posttroll.Publisher("tcp://*:0") as pub:
            Numbers(pub).send(3)
            with posttroll.Subscriber([local_address(pub.port_number)], "/numbers", since=60) as sub:
                sub.add(local_address(pub.port_number), "/other")
                assert received_data(sub, 3) == [0, 1, 2]

    def test_an_address_that_gets_more_topics_before_it_is_connected(self):
        """As somebody else who receives has been busy: what was sent since it was added comes."""
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Subscriber([], "/numbers") as sub:
            add = functools.partial(sub.add, local_address(pub.port_number))
            with sub._lock:
                with in_thread(add) as thread:
                    thread.join()
                Numbers(pub).send(3)
                added = posttroll.uptime()
                wait_for(lambda: posttroll.uptime() > added + 0.05)  # a request is in whole milliseconds
                with in_thread(lambda: add("/other")) as thread:
                    thread.join()
            assert received_data(sub, 3) == [0, 1, 2]

    def test_greetings_that_are_read_after_their_connection_was_closed(self):
        """What came between them is not taken for missing."""
        sock = types.SimpleNamespace(setsockopt=lambda *args: None, recv=None, closed=False)
        stream = posttroll._CatchUp([b"pytroll:/"], lambda *args: None, lambda *args: None, lambda: None, None, tuple)

        def take(text: bytes) -> bytes | None:
            return stream.take(stream._mark + b"\0" + text)

        def attach() -> None:
            sock.closed = False
            stream.attach(sock, lambda port, index, is_known: (0.0, index), lambda: None, lambda port: True)

        attach()
        take(b"H 0123456789abcdef 0 0 0 0 0 name")
        sock.closed = True
        stream.leave()
        stream.note(b"pytroll://1")
        take(b"H 0123456789abcdef 1 0 0 0 0 name")
        stream.note(b"pytroll://2")
        take(b"I 0123456789abcdef 2")
        attach()
        take(b"H 0123456789abcdef 3 0 0 0 0 name")
        past = [take(b"C 0123456789abcdef %d\0pytroll://%d" % (number, number)) for number in (1, 2, 3)]
        assert past == [None, None, b"pytroll://3"]

    def test_what_is_known_of_those_that_are_gone_is_not_kept_without_bound(self, monkeypatch):
        monkeypatch.setattr(posttroll.Subscriber, "LEFT", 2)
        with posttroll.Subscriber([], translate=True) as sub:
            for port in range(1, 6):
                sub.add(f"tcp://127.0.0.1:{port}")
            for port in range(1, 5):
                sub.remove(f"tcp://127.0.0.1:{port}")
            for topic in "abcdef":  # another one for the same address
                sub.add("tcp://127.0.0.1:5", topic)
            assert (len(sub.subscribers), len(sub._streams), len(sub._left)) == (1, 1, 2)

    def test_one_that_stays_while_many_come_and_go(self, monkeypatch):
        """What is known of it is not forgotten before what is known of those that are gone."""
        monkeypatch.setattr(posttroll._CatchUp, "SOURCES", 3)
        monkeypatch.setenv("POSTTROLL_SEND_HIGH_WATER_MARK", "20")
        monkeypatch.setenv("POSTTROLL_RECEIVE_HIGH_WATER_MARK", "20")
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            address = local_address(pub.port_number)
            with posttroll.Subscriber([address]) as sub, serving(sub) as data:
                assert pub.wait_for_subscribers(1, DEADLINE)
                numbers = Numbers(pub, padding="x" * 20_000)
                for _ in range(5):
                    with posttroll.Publisher("tcp://*:0", "short") as short:
                        sub.add(local_address(short.port_number))
                        assert short.wait_for_subscribers(1, DEADLINE)
                        wait_for(lambda: sub.up_to_date == min(len(positions_of(sub)), 3))
                        numbers.send(1)
                        (peer,) = pub._audience.peers.values()
                        wait_for(lambda peer=peer: peer.told == numbers.count)
                        sub.remove(local_address(short.port_number))
                with posttroll.Subscriber([address]):  # it reads nothing, so the other is served by its mark
                    assert pub.wait_for_subscribers(2, DEADLINE)
                    while not pub.dropped:
                        numbers.send(10, 0.001)
                    numbers.send(300, 0.001)
                    await_count(data, numbers.count)
            assert sorted(number for number, _ in data) == list(range(numbers.count))

    @pytest.mark.parametrize("lost", [None, 150, 950])
    def test_more_than_is_remembered_at_once(self, lost, monkeypatch):
        """It comes in parts, also if one of them is broken; and no part comes for ever."""
        monkeypatch.setattr(posttroll._Audience, "PART", 300)
        monkeypatch.setattr(posttroll._CatchUp, "PAST", 1200)
        take_past = posttroll._CatchUp._take_past
        lose = [lost]

        def take_some(stream: Any, source: Any, number: int, *args: Any) -> Any:
            if number in lose:
                lose.remove(number)
                return None
            return take_past(stream, source, number, *args)

        monkeypatch.setattr(posttroll._CatchUp, "_take_past", take_some)
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(4000 if lost is None else 1100)
            with posttroll.Subscriber([local_address(pub.port_number)], since=600) as sub, serving(sub) as data:
                numbers.check(data)
                wait_for(lambda: sub.up_to_date == 1)
            assert (sub.caught_up, sub.missed) == (numbers.count, 0)

    def test_nothing_is_looked_for_where_nothing_is_missing(self, monkeypatch, short_heartbeats):
        """To look at all that has come, for each of many publishers that come again at once, would take long."""
        looked_for = []
        count = posttroll._LiveRecord.count
        monkeypatch.setattr(
            posttroll._LiveRecord, "count", lambda record, *args: looked_for.append(args) or count(record, *args)
        )
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(10)
            wait_for(lambda: positions_of(sub) == [10])
            looked_for.clear()
            for missing in (0, 1):
                relay.cut()
                wait_for(lambda: not pub.subscriber_count)
                numbers.send(missing)
                relay.mend()
                assert pub.wait_for_subscribers(1, DEADLINE)
                (peer,) = wait_for(lambda: list(pub._audience.peers.values()))
                wait_for(lambda peer=peer: peer.has_asked and peer.after is None)
                await_count(data, numbers.count)
                assert bool(looked_for) == bool(missing)
            numbers.check(data)

    def test_a_request_that_comes_once_more_over_a_slower_connection(self, monkeypatch):
        """In the midst of the answer: it does not begin again, which would not be the last time."""
        monkeypatch.setattr(posttroll._Audience, "CHUNK", 10)
        requests = []
        take_request = posttroll._Audience._take_request

        def take_twice(audience: Any, mark: bytes, match: Any) -> None:
            requests.append(match[0])
            take_request(audience, mark, match)
            audience.later(0.0, lambda: take_request(audience, mark, match))

        monkeypatch.setattr(posttroll._Audience, "_take_request", take_twice)
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(2000)
            with posttroll.Subscriber([local_address(pub.port_number)], since=600) as sub, serving(sub) as data:
                numbers.check(data)
                wait_for(lambda: sub.up_to_date == 1)
            assert len(requests) == 1

    def test_the_same_request_after_its_answer_is_taken_again(self):
        """Also if meanwhile the queue was full: who asks again has not got all, and waits for an answer."""
        with connected() as (pub, sub):
            Numbers(pub).send(3)
            assert len(received_data(sub, 3)) == 3
            audience = pub._audience
            [peer] = audience.peers.values()
            wait_for(lambda: next(sub.recv(0)) is None and peer.told == 3 and not audience.unserved())
            assert peer.request
            with pub._lock:
                peer.miss()
                match = re.fullmatch(posttroll._MARK_PATTERN, peer.request)
                assert not peer.is_answer
                audience._take_request(peer.mark, match)
                assert peer.is_answer
            wait_for(lambda: next(sub.recv(0)) is None and not audience.unserved())
            assert peer.after is None

    def test_two_publishers_with_one_port_on_two_hosts(self):
        """Neither is taken for the other, also when one is connected again: what they repeat comes each time."""
        port = free_port()
        addresses = [f"tcp://127.0.0.{number}:{port}" for number in (1, 2)]
        with posttroll.Publisher(addresses[0]) as one, posttroll.Publisher(addresses[1]) as two:
            with posttroll.Subscriber(addresses) as sub, serving(sub) as data:
                assert one.wait_for_subscribers(1, DEADLINE)
                assert two.wait_for_subscribers(1, DEADLINE)
                texts = {publisher: text_message(name) for publisher, name in ((one, "one"), (two, "two"))}
                for _ in range(3):
                    for _ in range(10):
                        for publisher, text in texts.items():
                            publisher.send(text)
                    await_count(data, 20)
                    assert collections.Counter(data) == {"one": 10, "two": 10}
                    data.clear()
                    sub.remove(addresses[0])
                    wait_for(lambda: one.subscriber_count == 0)
                    sub.add(addresses[0])
                    assert one.wait_for_subscribers(1, DEADLINE)

    def test_by_which_connection_a_publisher_has_greeted(self):
        """By the oldest with its port that has come up lately, or of a forwarded port the oldest of all; each once."""
        ports = [free_port() for _ in range(3)]
        with contextlib.ExitStack() as stack, posttroll.Subscriber([]) as sub:
            hosts = [f"tcp://127.0.0.{number}:{port}" for port in ports for number in (1, 2)]
            for host in hosts:
                stack.enter_context(raw_socket(zmq.XPUB)).bind(host)
            for begin, host in enumerate(hosts):
                sub._add(host, None, begin)
            (sock,) = sub._streams
            links = sub._connections._links
            wait_for(lambda: next(sub.recv(0.01)) is None and all(link.is_up for link in links.values()))
            found = sorted(range(6), key=lambda begin: links[sock, hosts[begin]].changed)
            expected = [next(begin for begin in found if begin // 2 == 1)]
            expected += [begin for begin in found if begin not in expected]
            sub.remove(hosts[expected.pop()])
            links[sock, hosts[expected.pop()]].changed -= 5
            assert sub._connections.greet(sock, -1, 1, 7, True) == (-1, 7)  # who is known does not take another's
            greeted = [sub._connections.greet(sock, -1, port, 0, False)[0] for port in (ports[1], *[1] * 4)]
            assert greeted == [*expected, -1]

    def test_a_greeting_that_is_read_late(self, monkeypatch):
        """What was sent before the address was added does not come, however long something else took."""
        take_event = posttroll._Link.take_event

        def take_late(link: Any, event: int) -> None:
            take_event(link, event)
            link.changed -= 10

        with connected() as (_, sub), posttroll.Publisher("tcp://*:0") as other:
            monkeypatch.setattr(posttroll._Link, "take_event", take_late)
            other.send(text_message("before"))
            sent = posttroll.uptime()
            wait_for(lambda: posttroll.uptime() > sent + 0.05)  # a request is in whole milliseconds
            with serving(sub) as data:
                sub.add(local_address(other.port_number))
                wait_for(lambda: sub.up_to_date == 2)
                other.send(text_message("later"))
                wait_for(lambda: data[-1:] == ["later"])
                assert data == ["later"]

    def test_a_greeting_that_is_read_late_where_another_has_the_same_port(self):
        """The other has been silent for longer: it is none of ours."""
        new, links = posttroll._NewLinks(), []
        for host in ("127.0.0.1", "127.0.0.2"):
            link = posttroll._Link(0, {})
            link.take_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            link.changed -= 10
            new.note(None, f"tcp://{host}:9000", link)
            links.append(link)
        assert new.take(None, 9000, False) is links[1]
        assert new.take(None, 9000, False) is None

    def test_others_are_not_doubted_for_ever_when_one_comes_again(self, monkeypatch):
        """Those behind a forwarded port cannot be told from those behind a proxy."""
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.1)
        with contextlib.ExitStack() as stack:
            pubs = [stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0")) for _ in range(2)]
            relays = [stack.enter_context(Relay(pub.port_number)) for pub in pubs]
            sub = stack.enter_context(posttroll.Subscriber([relay.address for relay in relays]))
            stack.enter_context(serving(sub))
            wait_for(lambda: sub.up_to_date == 2)
            doubted = []
            doubt = posttroll._Source.doubt
            monkeypatch.setattr(posttroll._Source, "doubt", lambda source: (doubt(source), doubted.append(source)))
            relays[0].cut()
            wait_for(lambda: not pubs[0].subscriber_count)
            relays[0].mend()
            wait_for(lambda: len(doubted) == 2)
            wait_for(lambda: sub.up_to_date == 2)

    def test_from_where_on_a_connection_may_have_brought_something(self, short_heartbeats):
        """From where it came up, if it was greeted before it went down."""
        with behind_relay() as (pub, relay, sub), serving(sub) as data, posttroll.Publisher("tcp://*:0") as other:
            numbers = Numbers(pub)
            (link,) = sub._connections._links.values()
            sub.add(local_address(other.port_number))
            assert other.wait_for_subscribers(1, DEADLINE)
            for turn in range(3):
                wait_for(lambda: link.is_greeted)
                assert link.index == 6 * turn
                numbers.send(5)
                await_count(data, 6 * turn + 5)
                relay.cut()
                wait_for(lambda: not link.is_up and not pub.subscriber_count)
                other.send(text_message("of another"))
                await_count(data, 6 * turn + 6)
                relay.mend()

    @pytest.mark.parametrize("is_announced", [True, False])
    def test_a_publisher_behind_a_forwarded_port(self, is_announced):
        """It is found by the address that is forwarded, announced or fixed; the forwarding may fail for a while."""
        port = free_port()
        with nameserver(), Relay(port) as relay, config.set(announced_address=f"127.0.0.1:{relay.port}"):
            nameservers = ["localhost"] if is_announced else False
            fixed = {"addresses": [local_address(relay.port)], "nameserver": False}
            with posttroll.Publish("numbers", port, nameservers=nameservers) as pub:
                numbers = Numbers(pub)
                wanted = {} if is_announced else fixed
                with posttroll.Subscribe("numbers", timeout=DEADLINE, **wanted) as sub, serving(sub) as data:
                    assert sub.addresses == [local_address(relay.port)]
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    numbers.send(10)
                    relay.cut()
                    wait_for(lambda: pub.subscriber_count == 0)
                    numbers.send(10)
                    relay.mend()
                    await_count(data, 20)
                    assert sorted(data) == list(range(20))

    @pytest.mark.parametrize("durable", [None, "name"])
    def test_a_publisher_by_two_of_its_addresses(self, durable, tmp_path, monkeypatch):
        """As two nameservers know it, each by the address that leads there: each message counts once."""
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(tmp_path))
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Publisher("tcp://*:0") as other:
            first, second = (f"tcp://127.0.0.{number}:{pub.port_number}" for number in (1, 2))
            numbers, others = Numbers(pub), Numbers(other, "/others")
            with posttroll.Subscriber([first, local_address(other.port_number)], durable=durable) as sub:
                with serving(sub) as data:
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    assert other.wait_for_subscribers(1, DEADLINE)
                    numbers.send(50)
                    sub.add(second)
                    (peer,) = pub._audience.peers.values()
                    while peer.connections < 2:
                        numbers.send(5, 0.001)
                        assert pub.subscriber_count == 1
                    numbers.send(500)
                    others.send(500)
                    wait_for(lambda: len(data) >= numbers.count + others.count)
                    sub.remove(first)
                    wait_for(lambda: peer.connections == 1)
                    numbers.send(500)
                    wait_for(lambda: len(data) >= numbers.count + others.count)
                    others.send(1)
                    wait_for(lambda: data[-1] == 500)
                    sub.stop()
            assert sorted(data) == sorted([*range(numbers.count), *range(others.count)])

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
    @pytest.mark.parametrize("port", ["the same port", "another port"])
    def test_a_publisher_that_is_killed_and_restarted(self, port, host, impatient, monkeypatch):
        """All of its first life that has left it, and all of its second life, from its first message on."""
        port = free_port() if port == "the same port" else 0
        monkeypatch.setenv("POSTTROLL_ANNOUNCED_ADDRESS", "127.0.0.1")
        with nameserver(), posttroll.Subscribe("numbers", addr_listener=True, timeout=0) as sub, serving(sub) as data:
            for life in ("one", "two", "three"):
                with python(NUMBERS_PROCESS, port, life) as running:
                    command_of(running, "send 100", "await 1", "send 100")
                    wait_for(lambda life=life: len([each for each in data if each[0] == life]) >= 200)
                    running.kill()
                    running.wait()
                monkeypatch.setenv("POSTTROLL_ANNOUNCED_ADDRESS", host)
            sub.stop()
        # With the same port and another address it is reached by its old address, too.
        assert sorted(data) == sorted([life, number] for life in ("one", "two", "three") for number in range(200))

    def test_a_subscriber_that_is_stopped_for_a_while(self, short_heartbeats):
        """As if its host were suspended: the publisher sends meanwhile; then it goes on."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, Relay(pub.port_number) as relay:
            with python(COLLECTING_PROCESS, local_address(relay.port)) as running:
                assert pub.wait_for_subscribers(1, DEADLINE)
                numbers = Numbers(pub)
                numbers.send(100)
                for is_cut in (False, True):
                    running.send_signal(signal.SIGSTOP)
                    numbers.send(500, 0.003)
                    if is_cut:
                        relay.cut()
                        relay.mend()
                    running.send_signal(signal.SIGCONT)
                    numbers.send(10)
                numbers.send(1)
                got = [int(running.stdout.readline()) for _ in range(numbers.count)]
                assert sorted(got) == list(range(numbers.count))

    def test_the_same_text_again_and_again_around_an_outage(self, short_heartbeats):
        """Programs may send one encoded message as often as they like: each of them comes."""
        texts = [text_message(letter, "/numbers") for letter in "abc"]
        sent: list[str] = []
        with behind_relay() as (pub, relay, sub), serving(sub) as data:

            def send(count: int) -> None:
                for _ in range(count):
                    letter = chance.randrange(3)
                    pub.send(texts[letter])
                    sent.append("abc"[letter])
                    time.sleep(0.001)

            for kind in ("cut", "silence", "cut"):
                send(100)
                getattr(relay, kind)()
                send(100)
                relay.mend()
                send(100)
            await_count(data, len(sent))
            wait_for(lambda: not pub._audience.unserved())
            pub.send(text_message("end", "/numbers"))
            wait_for(lambda: data[-1] == "end")
            assert sorted(data) == sorted([*sent, "end"])

    def test_many_publishers_of_which_one_is_cut_off(self, short_heartbeats):
        """They share a socket; the others' messages are not touched."""
        with contextlib.ExitStack() as stack:
            pubs = [stack.enter_context(posttroll.Publisher("tcp://*:0", f"pub{n}")) for n in range(8)]
            relay = stack.enter_context(Relay(pubs[0].port_number))
            addresses = [local_address(port) for port in (relay.port, *(pub.port_number for pub in pubs[1:]))]
            sub = stack.enter_context(posttroll.Subscriber(addresses))
            data = stack.enter_context(serving(sub))
            assert all(pub.wait_for_subscribers(1, DEADLINE) for pub in pubs)

            def send(count: int) -> None:
                for _ in range(count):
                    for number, pub in enumerate(pubs):
                        pub.send(text_message([number, counts[number]]))
                        counts[number] += 1

            counts = [0] * len(pubs)
            for kind in ("cut", "silence", "cut"):
                send(100)
                getattr(relay, kind)()
                send(200)
                time.sleep(1)  # the duration of the fault
                relay.mend()
                send(100)
            await_count(data, sum(counts))
            wait_for(lambda: not any(pub._audience.unserved() for pub in pubs))
            assert sorted(data) == [[pub, number] for pub, count in enumerate(counts) for number in range(count)]

    def test_only_the_topics_that_are_wanted(self, short_heartbeats):
        """What others get is neither sent to it, nor counted as missed."""
        with behind_relay(["/wanted", "/also"]) as (pub, relay, sub):
            with serving(sub) as data:
                numbers, also, others = Numbers(pub, "/wanted"), Numbers(pub, "/also"), Numbers(pub, "/other")
                others.send(2000)
                numbers.send(1)
                wait_for(lambda: data == [0])
                relay.cut()
                for _ in range(200):
                    others.send(3)
                    numbers.send(1)
                relay.mend()
                others.send(5)
                numbers.send(5)
                numbers.check(data)
                assert (sub.missed, also.count) == (0, 0)

    def test_what_is_beyond_the_history_is_told(self, short_heartbeats, caplog):
        with config.set(history_messages=100), behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(50)
            wait_for(lambda: len(data) == 50)
            wait_for(lambda: positions_of(sub) == [50])  # what is on its way to it would count as missed
            relay.cut()
            wait_for(lambda: pub.subscriber_count == 0)
            numbers.send(312)
            relay.mend()
            wait_for(lambda: sub.missed)
            assert sub.missed == 212
            wait_for(lambda: data == [*range(50), *range(262, 362)])
        text = "212 messages of numbers are gone"
        [record] = [record for record in caplog.records if text in record.getMessage()]
        assert (record.name, record.levelname) == ("posttroll.subscriber", "WARNING")

    def test_without_history_what_is_gone_is_told(self, short_heartbeats):
        with config.set(history_messages=0), behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(10)
            wait_for(lambda: len(data) == 10)
            wait_for(lambda: positions_of(sub) == [10])  # what is on its way to it would count as missed
            relay.cut()
            wait_for(lambda: pub.subscriber_count == 0)
            numbers.send(5)
            relay.mend()
            wait_for(lambda: sub.missed == 5)
            numbers.send(5)
            wait_for(lambda: len(data) == 15)
            assert data == [*range(10), *range(15, 20)]

    def test_a_publisher_that_stops_waits_for_whoever_catches_up(self, short_heartbeats):
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            numbers = Numbers(pub)
            numbers.send(10)
            wait_for(lambda: len(data) == 10)
            relay.cut()
            numbers.send(4000)
            relay.mend()
            wait_for(lambda: pub.subscriber_count)
            pub.stop()
            await_count(data, numbers.count)
            assert sorted(data) == list(range(numbers.count))

    def test_two_connections_to_one_publisher(self, short_heartbeats):
        """By two addresses over one socket, also with different ports: each message comes once."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, Relay(pub.port_number) as relay:
            addresses = [local_address(relay.port), local_address(pub.port_number)]
            with posttroll.Subscriber(addresses) as sub, serving(sub) as data:
                wait_for(lambda: [peer.connections for peer in pub._audience.peers.values()] == [2])
                assert pub.subscriber_count == 1
                numbers = Numbers(pub)
                numbers.send(10)
                relay.cut()
                wait_for(lambda: [peer.connections for peer in pub._audience.peers.values()] == [1])
                numbers.send(10)
                relay.mend()
                wait_for(lambda: [peer.connections for peer in pub._audience.peers.values()] == [2])
                numbers.check(data)
                assert pub.dropped == sub.missed == 0

    def test_what_is_repeated_to_the_byte_over_two_connections(self, short_heartbeats):
        """It is no copy of itself, also while one of them fails."""
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            sub.add(local_address(pub.port_number))

            def are_two() -> bool:  # a busy host may lose both, and then it is another peer
                return [peer.connections for peer in list(pub._audience.peers.values())] == [2]

            wait_for(are_two)
            texts, sent = [text_message(text) for text in "abc"], 0
            for kind in ("cut", "silence"):
                for fail in (lambda: None, getattr(relay, kind), relay.mend):
                    fail()
                    for _ in range(50):
                        for text in texts:
                            pub.send(text)
                        time.sleep(0.004)
                    sent += 50
                wait_for(are_two)
            pub.send(text_message("end"))
            wait_for(lambda: data[-1:] == ["end"])
            wait_for(lambda: not pub._audience.unserved())
            assert collections.Counter(data) == {"a": sent, "b": sent, "c": sent, "end": 1}
            assert sub.missed == pub.dropped == 0

    @pytest.mark.parametrize("is_unread", [True, False])
    def test_a_second_connection_while_much_is_unread(self, is_unread):
        """What comes by the first, and was sent before, is not caught up by the second; it may be one of three."""
        with posttroll.Publisher("tcp://*:0") as pub:
            addresses = [f"tcp://127.0.0.{number}:{pub.port_number}" for number in (1, 2, 3)]
            numbers = Numbers(pub)
            with posttroll.Subscriber(addresses[:1]) as sub, contextlib.ExitStack() as stack:
                data = None if is_unread else stack.enter_context(serving(sub))
                assert pub.wait_for_subscribers(1, DEADLINE)
                (peer,) = pub._audience.peers.values()
                for count, address in enumerate(addresses[1:], 2):
                    numbers.send(1500)
                    sub.add(address)
                    while peer.connections < count:
                        numbers.send(1, 0.0002)
                numbers.send(500)
                data = data or stack.enter_context(serving(sub))
                numbers.check(data)
                sub.remove(addresses[1])
                numbers.send(500)
                wait_for(lambda: peer.connections == 2)
                sub.remove(addresses[2])
                wait_for(lambda: peer.connections == 1)
                numbers.send(500)
                numbers.check(data)
                wait_for(lambda: all(stream._merge is None for stream in sub._streams.values()))

    @pytest.mark.parametrize("others", [False, True])
    def test_a_second_connection_while_the_first_is_dead_and_its_queue_full(self, others):
        """As after a cut cable: the publisher does not know it for long, and sends by the second meanwhile."""
        config.set(send_high_water_mark=20, history_messages=100_000, history_bytes=10**9)
        with behind_relay() as (pub, relay, sub), serving(sub) as data, contextlib.ExitStack() as stack:
            if others:
                plain = stack.enter_context(raw_socket(zmq.SUB, pub.port_number))
                plain.subscribe("pytroll:/")
                assert pub.wait_for_subscribers(2, DEADLINE)
            numbers = Numbers(pub, padding="x" * 100_000)
            relay.silence()
            while not pub.dropped:
                numbers.send(10)
            sub.add(local_address(pub.port_number))
            (peer,) = pub._audience.peers.values()
            wait_for(lambda: peer.connections == 2)
            numbers.send(10, 0.01)
            numbers.check(data)
            assert sub.missed == 0

    @pytest.mark.parametrize("end", ["patience", "removed"])
    def test_a_second_connection_while_the_first_is_silent(self, end, monkeypatch):
        """What comes by the second waits for the first, but not for ever, and is not lost with a socket."""
        if end != "patience":
            monkeypatch.setattr(posttroll._Merge, "PATIENCE", 1000)
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            relay.silence()
            sub.add(local_address(pub.port_number))
            (peer,) = pub._audience.peers.values()
            wait_for(lambda: peer.connections == 2)
            numbers = Numbers(pub)
            numbers.send(10)
            if end != "patience":
                (stream,) = sub._streams.values()
                merge = wait_for(lambda: stream._merge)
                wait_for(lambda: [sum(raw[:1] == b"p" for raw in each) for _, each in merge._paused.values()] == [10])
                assert not data
            if end == "removed":
                sub.update([])
            await_count(data, 10)
            assert sorted(data) == list(range(10))

    @needs_proxy
    def test_a_proxy_beside_the_direct_way(self):
        """By both comes each message once, also if one of them ends."""
        with posttroll.Publisher("tcp://127.0.0.1:0") as pub, proxy(pub.port_number) as port:
            addresses = [local_address(pub.port_number), local_address(port)]
            numbers = Numbers(pub)
            with posttroll.Subscriber(addresses) as sub, serving(sub) as data:
                (mark,) = wait_for(lambda: pub._audience._early_marks.connections)
                wait_for(lambda: pub._audience._early_marks.connections[mark] == 2)
                for ended in addresses:
                    numbers.send(500)
                    sub.remove(ended)
                    wait_for(lambda: pub._audience._early_marks.connections[mark] == 1)
                    numbers.send(500)
                    sub.add(ended)
                    wait_for(lambda: pub._audience._early_marks.connections[mark] == 2)
                numbers.check(data)

    def test_two_connections_of_which_one_fails_again_and_again(self, short_heartbeats):
        """By two addresses with one port: whichever of them is up, each message comes once."""
        with behind_relay() as (pub, relay, sub), serving(sub) as data:
            sub.add(local_address(pub.port_number))
            (peer,) = pub._audience.peers.values()
            wait_for(lambda: peer.connections == 2)
            numbers = Numbers(pub)
            for kind in ("cut", "silence", "cut"):
                numbers.send(50, 0.001)
                getattr(relay, kind)()
                numbers.send(100, 0.004)
                relay.mend()
                numbers.send(50, 0.001)
                wait_for(lambda: peer.connections == 2)
            sub.remove(local_address(pub.port_number))
            wait_for(lambda: peer.connections == 1)
            relay.cut()
            wait_for(lambda: pub.subscriber_count == 0)
            numbers.send(50)
            relay.mend()
            numbers.check(data)
            assert sub.missed == pub.dropped == 0


DURABLE_PROCESS = """
import os, sys, posttroll
address, output = sys.argv[1:]
with open(output, "ab", buffering=0) as output, posttroll.Subscriber([address], durable="name") as subscriber:
    for message in subscriber.recv():
        output.write(b"%d\\n" % message.data)  # this is the handling
"""


class TestDurable:
    @pytest.fixture(autouse=True)
    def directory(self, monkeypatch, tmp_path):
        directory = tmp_path / "durable"
        monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(directory))
        return directory

    @pytest.fixture
    def kill(self, monkeypatch, tmp_path):
        """Give what lets subscribers that are made from now on find what a program that is killed now would leave."""

        def kill() -> None:
            now = tmp_path / f"{chance.random()}"
            shutil.copytree(config.get("durable_directory"), now)
            monkeypatch.setenv("POSTTROLL_DURABLE_DIRECTORY", str(now))

        return kill

    @pytest.fixture
    def numbers(self):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            yield Numbers(pub)

    def subscriber(self, numbers: Numbers, name: str = "name", **settings: Any) -> posttroll.Subscriber:
        """Return a durable subscriber to the numbers, which its publisher knows."""
        publisher = numbers.publisher.start()
        before = set(publisher._audience.peers)
        sub = posttroll.Subscriber([local_address(numbers.publisher.port_number)], durable=name, **settings)
        wait_for(lambda: set(publisher._audience.peers) - before)
        return sub

    def rest(self, numbers: Numbers, **settings: Any) -> list[Any]:
        """Return what the next program gets, up to now."""
        with self.subscriber(numbers, **settings) as sub:
            data: list[Any] = []
            end = ""
            for message in sub.recv(0.01):
                if message is not None:
                    data.append(message.data)
                elif not end and not numbers.publisher._audience.unserved():  # what is live comes before the past
                    end = f"end {chance.random()}"
                    numbers.publisher.send(text_message(end, "/numbers"))
                if data and data[-1] == end:
                    return sorted(data[:-1], key=str)
        return pytest.fail("It has ended.")

    # -- at any moment --

    @pytest.mark.parametrize("pause", [0, 0.001])
    def test_killed_at_any_moment_again_and_again(self, tmp_path, pause):
        """All once, and what was being handled at the end of a life once more at most."""
        config.set(history_messages=200_000, history_bytes=10**9)
        output = tmp_path / "output"
        output.touch()
        ended = threading.Event()
        lasts = []

        def send() -> None:
            while not ended.is_set():
                numbers.send(10, pause)
                time.sleep(0.002)

        def live(condition: Callable[[], bool]) -> None:
            begin = output.stat().st_size
            with python(DURABLE_PROCESS, local_address(pub.port_number), output) as running:
                wait_for(lambda: output.stat().st_size > begin or has_all() or running.poll() is not None)
                wait_for(condition)
                running.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                running.wait()
            with output.open("rb") as lines:
                lines.seek(begin)
                life = [int(line) for line in lines]
            lasts.extend(life[-1:])

        def has_all() -> bool:
            return ended.is_set() and len(set(output.read_bytes().split())) == numbers.count

        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(1)
            with config.set(durable_directory=os.environ["POSTTROLL_DURABLE_DIRECTORY"]):
                posttroll.Subscriber([local_address(pub.port_number)], durable="name", since=60).close()
            with in_thread(send):
                for _ in range(6):
                    end = time.monotonic() + chance.uniform(0, 0.4)
                    live(lambda end=end: time.monotonic() > end)
                ended.set()
            live(has_all)  # the last may have come before others
        counts = collections.Counter(map(int, output.read_text().split()))
        assert sorted(counts) == list(range(numbers.count))
        assert {number for number, count in counts.items() if count > 1} <= set(lasts)
        assert max(counts.values()) <= 2

    def test_what_is_being_handled_comes_once_more(self, numbers, kill):
        sub = self.subscriber(numbers)
        numbers.send(5)
        messages = sub.recv(DEADLINE)
        assert [next(messages).data for _ in range(3)] == [0, 1, 2]
        kill()
        assert self.rest(numbers) == [2, 3, 4]
        kill()
        assert self.rest(numbers) == []
        sub.close()

    # -- copies --

    @pytest.mark.parametrize("is_past", [False, True])
    def test_what_was_not_handled_is_no_copy_of_itself(self, numbers, is_past):
        """The same filter serves the next subscriber of the program; other copies are still held back."""
        is_new = posttroll.unique(lambda message: message.data if isinstance(message.data, int) else None)
        if is_past:
            numbers.send(3)
            sub = self.subscriber(numbers, since=60, message_filter=is_new)
        else:
            sub = self.subscriber(numbers, message_filter=is_new)
            numbers.send(3)
        with pytest.raises(ValueError, match="failed"), sub:
            for message in sub.recv(DEADLINE):
                if message.data == 1:
                    raise ValueError("failed")
        numbers.publisher.send(text_message(0, "/numbers"))
        assert self.rest(numbers, message_filter=is_new) == [1, 2]
        assert is_new.dropped == 1

    def test_a_copy_is_not_done_with_before_the_one_in_hand(self, numbers, kill):
        """The copy that was held back comes after a crash, if the other one is lost with its publisher."""
        is_new = posttroll.unique(lambda message: message.data)
        with posttroll.Publisher("tcp://*:0", "other") as other:
            addresses = [local_address(pub.port_number) for pub in (numbers.publisher, other)]
            with posttroll.Subscriber(addresses, "/numbers", is_new, durable="name") as sub:
                for pub in (numbers.publisher, other):
                    assert pub.wait_for_subscribers(1, DEADLINE)
                numbers.send(1)
                messages = sub.recv(DEADLINE)
                assert next(messages).data == 0
                other.send(text_message(0, "/numbers"))

                def has_all() -> bool:
                    """Read what is there, in the middle of handling a message; return whether that is all."""
                    sub._loop.turn(time.monotonic() + 0.05)
                    sub._inbox.begin_batch(time.monotonic())
                    assert sub._inbox.take(None) is None
                    (stream,) = sub._streams.values()
                    return bool(stream._sources[other._audience.instance].position)

                wait_for(has_all)
                assert is_new.dropped == 1
                kill()
                with posttroll.Subscriber(addresses[1:], durable="name") as after:
                    assert receive(after)[0].data == 0
                messages.close()

    # -- what counts as handled --

    @pytest.mark.parametrize(
        ("how", "rest"),
        [
            ("break", [3]),
            ("exception", [2, 3]),
            ("exception, then close", [2, 3]),
            ("no loop", [3]),
            ("stop", [3]),
            ("close in the loop", [3]),
            ("close in a signal handler, then killed", [2, 3]),
            pytest.param("forgotten", [2, 3], marks=pytest.mark.filterwarnings("ignore:unclosed :ResourceWarning")),
        ],
    )
    def test_how_a_loop_is_left(self, numbers, kill, how, rest):
        def handle(sub: Any) -> None:
            for message in sub.recv():
                if message.data == 2:
                    if how == "break":
                        break
                    if how.startswith("exception"):
                        raise KeyError
                    if how == "stop":
                        sub.stop()
                    if how == "close in the loop":
                        sub.close()
                    if how.startswith("close in a signal"):
                        signal.raise_signal(signal.SIGUSR1)
                        kill()
                        return

        sub = self.subscriber(numbers)
        numbers.send(4)
        if how == "no loop":
            with sub:
                assert received_data(sub, 3) == [0, 1, 2]
        elif how == "forgotten":
            assert received_data(sub, 3) == [0, 1, 2]
            del sub
            gc.collect()
        elif how == "exception, then close":
            with pytest.raises(KeyError):
                try:
                    handle(sub)
                finally:
                    sub.close()
        elif how.startswith("close in a signal"):
            before = signal.signal(signal.SIGUSR1, lambda *_: sub.close())
            try:
                handle(sub)
            finally:
                signal.signal(signal.SIGUSR1, before)
                sub.close()
        else:
            with contextlib.suppress(KeyError), sub:
                handle(sub)
        assert self.rest(numbers) == rest

    @pytest.mark.parametrize(("how", "rest"), [("break", [3]), ("exception", [2, 3]), ("receive", [3])])
    def test_in_asyncio(self, numbers, how, rest):
        async def handle() -> None:
            async with self.subscriber(numbers) as sub:
                numbers.send(4)
                if how == "receive":
                    assert [(await sub.receive(DEADLINE)).data for _ in range(3)] == [0, 1, 2]
                    return
                async for message in sub:
                    if message.data == 2:
                        if how == "exception":
                            raise KeyError
                        break

        with contextlib.suppress(KeyError):
            asyncio.run(handle())
        assert self.rest(numbers) == rest

    def test_two_threads_of_which_one_takes_long(self, numbers, kill):
        """What the slow one handles comes once more, however far the other one is, and nothing else."""
        sub = self.subscriber(numbers)
        numbers.send(1)
        slow = sub.recv(DEADLINE)
        assert next(slow).data == 0
        for _ in range(5):  # positions are told several times

            def work() -> None:
                numbers.send(20)
                assert received_data(sub, 20) == list(range(numbers.count - 20, numbers.count))
                wait_for(lambda: all(peer.told == numbers.count for peer in numbers.publisher._audience.peers.values()))
                assert receive(sub, 1, 0.01) == []

            with in_thread(work):
                pass
        kill()
        rest = self.rest(numbers)
        assert rest == [0]
        sub.close()

    def test_after_the_slow_thread_the_state_goes_on(self, numbers, kill, directory):
        sub = self.subscriber(numbers)
        numbers.send(1)
        slow = sub.recv(0.3)
        assert next(slow).data == 0
        numbers.send(50)

        def work() -> None:
            assert received_data(sub, 50) == list(range(1, 51))
            wait_for(lambda: all(peer.told == 51 for peer in numbers.publisher._audience.peers.values()))
            assert receive(sub, 1, 1) == []

        with in_thread(work):
            pass
        assert next(slow) is None
        places = re.findall(r"^@\w+ n(\d+) ", (directory / "name").read_text(), re.MULTILINE)
        assert places[-1] == "51"
        kill()
        assert self.rest(numbers) == []
        sub.close()

    # -- publishers --

    def test_publishers_that_came_and_went_meanwhile(self, impatient):
        """A publisher begins anew while the subscriber is away: all of its new life comes."""
        port = free_port()
        with nameserver():
            for life in ("one", "two"):
                with python(NUMBERS_PROCESS, port, life) as running:
                    command_of(running, "send 100")
                    with posttroll.Subscribe("numbers", addr_listener=True, since=60, durable="name") as sub:
                        data = received_data(sub, 100)
                    assert sorted(data) == [[life, number] for number in range(100)]
                    command_of(running, "send 10")
                    with posttroll.Subscribe("numbers", addr_listener=True, durable="name") as sub:
                        assert sorted(received_data(sub, 10)) == [[life, number] for number in range(100, 110)]
                    running.kill()

    def test_an_address_that_is_added_later(self, numbers):
        with posttroll.Subscriber([], durable="name"):
            pass
        numbers.send(10)
        with posttroll.Subscriber([], durable="name") as sub:
            sub.add(local_address(numbers.publisher.port_number))
            assert received_data(sub, 10) == list(range(10))

    def test_two_addresses_of_one_publisher_with_different_topics(self, numbers, kill, short_heartbeats):
        """What comes by the one says nothing of what comes by the other."""
        pub, other = numbers.publisher.start(), Numbers(numbers.publisher, "/other")
        with Relay(pub.port_number) as relay:

            def subscriber(count: int) -> posttroll.Subscriber:
                sub = posttroll.Subscriber([], durable="name")
                sub.add(local_address(pub.port_number), "/numbers")
                sub.add(local_address(relay.port), "/other")
                wait_for(lambda: next(sub.recv(0.01)) is None and pub.subscriber_count == count)
                return sub

            first = subscriber(2)
            other.send(1)
            assert received_data(first) == [0]
            wait_for(lambda: next(first.recv(0.01)) is None and not pub._audience.unserved())
            relay.cut()
            wait_for(lambda: pub.subscriber_count == 1)
            numbers.send(3)
            other.send(1)
            assert received_data(first, 3) == [0, 1, 2]
            wait_for(
                lambda: next(first.recv(0.01)) is None and all(peer.told == 5 for peer in pub._audience.peers.values())
            )
            kill()
            relay.mend()
            with posttroll.Subscriber([], durable="name") as sub:
                sub.add(local_address(pub.port_number), "/numbers")
                wait_for(lambda: next(sub.recv(0.01)) is None and sub.up_to_date == 1)
                wait_for(lambda: next(sub.recv(0.01)) is None and not pub._audience.unserved())
                sub.add(local_address(relay.port), "/other")
                assert received_data(sub) == [1]
                assert receive(sub, 1, 0.1) == []
            first.close()

    def test_more_of_the_past_than_lines_are_kept(self, numbers, kill, monkeypatch):
        """What has been handled of it is known until the publisher has told that all is there."""
        monkeypatch.setattr(posttroll._DurableState, "LINES", 10)
        with self.subscriber(numbers):
            pass
        numbers.send(300)
        with self.subscriber(numbers) as sub, monkeypatch.context() as broken:
            broken.setattr(posttroll._CatchUp, "_take_end", lambda *args: None)  # it does not come so far
            assert received_data(sub, 200) == list(range(200))
            kill()
        assert sorted(self.rest(numbers)) == list(range(199, 300))

    @pytest.mark.parametrize("translate", [False, "origin"])
    def test_the_same_publisher_by_another_socket_later(self, numbers, translate, directory):
        """With other topics, or by another address: nothing comes again, and its place goes on."""
        port = numbers.publisher.port_number
        first, second = (f"tcp://127.0.0.{number}:{port}" for number in (1, 2))
        with posttroll.Subscriber([first], durable="name", translate=translate) as sub, serving(sub) as data:
            assert numbers.publisher.wait_for_subscribers(1, DEADLINE)
            numbers.send(20)
            await_count(data, 20)
            wait_for(lambda: len(re.findall(rb"^[0-9a-f]{16}$", (directory / "name").read_bytes(), re.MULTILINE)) == 20)
            before = list(numbers.publisher._audience.peers)
            if translate:
                sub.remove(first)
                sub.add(second)
            else:
                sub.add(first, ["/numbers", "/other"])
            wait_for(lambda: list(numbers.publisher._audience.peers) not in ([], before) and sub.up_to_date == 1)
            numbers.send(20)
            numbers.check(data)
            (peer,) = numbers.publisher._audience.peers.values()
            wait_for(lambda: peer.told == 41 and b" n41 0\n" in (directory / "name").read_bytes())
            sub.stop()

    def test_a_clock_that_was_ahead_when_the_name_was_new(self, monkeypatch):
        """What a publisher sends that is new since then is not lost until the clock has come as far again."""
        with monkeypatch.context() as ahead:
            now = time.time
            ahead.setattr(time, "time", lambda: now() + 3600)
            posttroll.Subscriber([], durable="name").close()
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(5)
            with posttroll.Subscriber([local_address(pub.port_number)], durable="name") as sub, serving(sub) as data:
                numbers.check(data)

    def test_what_is_beyond_the_history_is_told(self, caplog):
        with config.set(history_messages=100), posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            with self.subscriber(numbers) as sub:
                numbers.send(1)
                assert received_data(sub) == [0]
                wait_for(lambda: all(peer.told == 1 for peer in pub._audience.peers.values()))
                assert receive(sub, 1, 0.01) == []
            numbers.send(150)
            with self.subscriber(numbers) as sub:
                assert received_data(sub, 100) == list(range(51, 151))
                assert receive(sub, 1, 0.01) == []
                assert sub.missed == 50
        assert "50 messages of numbers are gone" in caplog.text

    def test_since_counts_at_the_first_time_only(self, numbers):
        numbers.send(3)
        assert self.rest(numbers, since=60) == [0, 1, 2]
        assert self.rest(numbers, since=60) == []

    def test_the_same_text_again_and_again(self, kill):
        """Each of the messages counts, although they cannot be told apart."""
        text = text_message("text")
        with posttroll.Publisher("tcp://*:0") as pub:
            numbers = Numbers(pub)
            sub = self.subscriber(numbers)
            messages = sub.recv(DEADLINE)
            for _ in range(5):
                pub.send(text)
            assert [next(messages).data for _ in range(4)] == ["text"] * 4
            kill()
            assert self.rest(numbers) == ["text"] * 2
            sub.close()

    # -- the name --

    def test_two_programs_with_one_name(self, numbers, tmp_path):
        with python(DURABLE_PROCESS, local_address(numbers.publisher.port_number), tmp_path / "output") as running:
            assert numbers.publisher.wait_for_subscribers(1, DEADLINE)
            with pytest.raises(
                RuntimeError, match=rf"'name' is in use by process {running.pid} on {socket.gethostname()}"
            ):
                self.subscriber(numbers)
            self.subscriber(numbers, "another_name").close()
            running.kill()
            running.wait()
            self.subscriber(numbers).close()

    def test_twice_in_one_program(self, numbers):
        with self.subscriber(numbers):
            with pytest.raises(RuntimeError, match=f"process {os.getpid()} "):
                self.subscriber(numbers)
        self.subscriber(numbers).close()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    def test_a_forked_child_does_not_keep_the_name(self, numbers):
        sub = self.subscriber(numbers)
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(write_end)
            os.read(read_end, 1)  # until the parent lets go
            os._exit(0)
        try:
            sub.close()
            self.subscriber(numbers).close()
        finally:
            os.close(write_end)
            os.close(read_end)
            os.waitpid(child, 0)

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".name", "näme", "a" * 101, 5, b"name"])
    def test_names_that_are_none(self, name):
        with pytest.raises(ValueError, match="durable is a name"):
            posttroll.Subscriber([], durable=name)

    # -- the file --

    @pytest.mark.parametrize(
        "wrong",
        [b"zzzzzzzzzzzzzzzz 5 0 0 0", b"0123456789abcdef 1000000000000000 0 0 0", b"0123456789abcdef 1_0 0 0 0"],
    )
    def test_a_publisher_that_greets_wrongly(self, numbers, wrong, caplog):
        """What it says of itself stays out of the file, which is that of others, too."""
        numbers.send(1)
        with raw_socket(zmq.XPUB) as other:
            port = other.bind_to_random_port("tcp://127.0.0.1")
            addresses = [local_address(number) for number in (numbers.publisher.port_number, port)]
            with posttroll.Subscriber(addresses, "/numbers", durable="name", since=60) as sub:
                mark = b""
                while not mark.startswith(posttroll._MARK):
                    assert other.poll(DEADLINE * 1000)
                    mark = other.recv()[1:]
                other.send(mark + b"\0H " + wrong + b" name")
                data = []
                wait_for(lambda: data.append(next(sub.recv(0.02))) or "Skipped something broken" in caplog.text)
        numbers.send(1)
        assert self.rest(numbers) == [1]
        assert [message.data for message in data if message] == [0]
        assert "is damaged" not in caplog.text

    @pytest.mark.parametrize("damage", ["empty", "other", "line", "beginning"])
    def test_a_damaged_file(self, numbers, directory, damage, caplog):
        """It is not known what has been handled: begun anew, with what is sent from now on."""
        numbers.send(3)
        assert self.rest(numbers, since=60) == [0, 1, 2]
        numbers.send(2)
        content = (directory / "name").read_bytes()
        broken = {
            "empty": b"", "other": os.urandom(1000), "line": content.replace(b"@", b"@x", 1), "beginning": content[7:],
        }  # fmt: skip
        time.sleep(0.1)  # what is sent in the same milliseconds may count as sent before or afterwards
        (directory / "name").write_bytes(broken[damage])
        time.sleep(0.1)
        numbers.send(2)
        with self.subscriber(numbers) as sub:
            what = "empty (was the disk full?)" if damage == "empty" else "damaged"
            assert f"{directory / 'name'} is {what}: begun anew" in caplog.text
            assert received_data(sub, 2) == [5, 6]
        assert self.rest(numbers) == []
        assert caplog.text.count("begun anew") == 1

    def test_a_line_that_was_not_finished(self, numbers, directory, caplog):
        numbers.send(3)
        assert self.rest(numbers, since=60) == [0, 1, 2]
        with (directory / "name").open("ab") as file:
            file.write(b"0123")
        numbers.send(2)
        assert self.rest(numbers) == [3, 4]
        assert " is damaged:" not in caplog.text

    def test_it_is_small(self, numbers, directory, monkeypatch):
        monkeypatch.setattr(posttroll._StateFile, "GROWTH", 2000)
        monkeypatch.setattr(posttroll._DurableState, "LINES", 1000)
        sizes = []
        with self.subscriber(numbers) as sub:
            for _ in range(50):
                numbers.send(100)
                received_data(sub, 100)
                sizes.append((directory / "name").stat().st_size)
            # On a loaded host, more than these 1,000 lines may come before the publisher has told how far it is.
            wait_for(lambda: not next(sub.recv(timeout=0.01)) and b" n5000 " in (directory / "name").read_bytes())
        assert 17000 < max(sizes) < 42000  # 17 bytes a message; and as much again, until it is written anew
        numbers.send(3)
        assert self.rest(numbers) == [5000, 5001, 5002]

    def test_a_full_disk(self, numbers, directory):
        """The program goes on and warns a few times; when there is room again, all is known again."""
        code = """if True:
            import resource, sys, posttroll
            with posttroll.Subscriber(sys.argv[1:], durable="name") as subscriber:
                for message in subscriber.recv():
                    print(message.data, flush=True)
                    if message.data == 99:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                    if message.data == 999:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            """
        with python(code, local_address(numbers.publisher.port_number)) as running:
            assert numbers.publisher.wait_for_subscribers(1, DEADLINE)
            numbers.send(1000)
            assert [int(running.stdout.readline()) for _ in range(1000)] == list(range(1000))
            assert (directory / "name").stat().st_size <= 5000
            wait_for(lambda: self.goes_on(numbers, running) and (directory / "name").stat().st_size > 10000)
            running.kill()
            errors = running.stderr.read()
        assert 1 <= errors.count("Cannot write") <= 5
        assert "File too large" in errors
        assert self.rest(numbers) in ([], [numbers.count - 1])

    @pytest.mark.skipif(os.name != "posix", reason="there is no limit on the size of files")
    def test_a_new_name_while_the_disk_is_full(self, numbers, directory, caplog):
        """Nothing can be written, from the first program on: all since it began counts as not handled."""
        code = """if True:
            import resource, sys, posttroll
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            with posttroll.Subscriber(sys.argv[1:2], durable="name", since=float(sys.argv[2])) as subscriber:
                for message in subscriber.recv():
                    print(message.data, flush=True)
                    if message.data == int(sys.argv[3]):
                        break
            """
        numbers.send(3)
        for since, last in ((60, 2), (0, 4)):
            with python(code, local_address(numbers.publisher.port_number), since, last) as running:
                status, out, err = finish(running)
            assert (status, out.split()) == (0, [str(number) for number in range(last + 1)])
            assert f"Cannot write {directory / 'name'} (trying again): File too large" in err
            numbers.send(2)
        (directory / ".name.new").unlink()  # it tells nothing
        assert self.rest(numbers) == list(range(7))
        assert f"{directory / 'name'} is empty (was the disk full?): begun anew" in caplog.text
        caplog.clear()
        numbers.send(1)
        assert self.rest(numbers) == [7]
        assert not caplog.records

    def test_a_new_name_when_no_file_can_be_made(self, directory, monkeypatch):
        replace = os.replace

        def full(*paths: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(ConfigurationError, match=r"No space left on device.*: set durable_directory"):
            posttroll.Subscriber([], durable="name")
        monkeypatch.setattr(os, "replace", replace)
        posttroll.Subscriber([], durable="name").close()  # nobody holds it

    def goes_on(self, numbers: Numbers, running: Any) -> bool:
        numbers.send(1, 0.02)
        return int(running.stdout.readline()) == numbers.count - 1

    def test_a_directory_that_cannot_be_used(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        for unusable in ("file", "file/directory"):
            with config.set(durable_directory=str(tmp_path / unusable)):
                with pytest.raises(ConfigurationError, match="set durable_directory"):
                    posttroll.Subscriber([], durable="name")

    def test_without_a_home_directory(self, monkeypatch):
        for variable in ("POSTTROLL_DURABLE_DIRECTORY", "XDG_STATE_HOME", "HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as if the user were unknown
        with pytest.raises(ConfigurationError, match="no home directory"):
            posttroll.Subscriber([], durable="name")

    @pytest.mark.parametrize(("variable", "place"), [("XDG_STATE_HOME", ""), ("HOME", ".local/state")])
    def test_where_it_is(self, monkeypatch, tmp_path, variable, place):
        for name in ("POSTTROLL_DURABLE_DIRECTORY", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, str(tmp_path))
        posttroll.Subscriber([], durable="name").close()
        assert (tmp_path / place / "posttroll" / "name").read_text().startswith("posttroll-durable 1 ")

    # -- everywhere --

    @pytest.mark.parametrize("way", ["NSSubscriber", "Subscribe", "dictionary", "Listener", "ListenerContainer"])
    def test_all_that_subscribes(self, numbers, way):
        addresses = [local_address(numbers.publisher.port_number)]
        settings = {"addresses": addresses, "nameserver": False, "durable": "name", "services": ""}

        def receive_3() -> list[Any]:
            if way == "ListenerContainer":
                with posttroll.ListenerContainer(since=60, **settings) as container:
                    return [container.output_queue.get(timeout=DEADLINE).data for _ in range(3)]
            if way == "Listener":
                messages: queue.Queue[Any] = queue.Queue()
                listener = posttroll.Listener(queue=messages, since=60, **settings)
                with in_thread(listener.run):
                    data = [messages.get(timeout=DEADLINE).data for _ in range(3)]
                    listener.stop()
                return data
            if way == "NSSubscriber":
                with posttroll.NSSubscriber(None, addresses=addresses, since=60, durable="name") as sub:
                    return received_data(sub, 3)
            if way == "Subscribe":
                with posttroll.Subscribe(since=60, **settings) as sub:
                    return received_data(sub, 3)
            with posttroll.create_subscriber_from_dict_config({"since": 60, **settings}) as sub:
                return received_data(sub, 3)

        for first in (0, 3, 6):
            numbers.send(3)
            assert receive_3() == [first, first + 1, first + 2]

    def test_a_container_that_listens_to_other_topics(self, numbers):
        addresses = [local_address(numbers.publisher.port_number)]
        with posttroll.ListenerContainer(["/numbers"], addresses, False, durable="name") as container:
            assert numbers.publisher.wait_for_subscribers(1, DEADLINE)
            numbers.send(3)
            assert [container.output_queue.get(timeout=DEADLINE).data for _ in range(3)] == [0, 1, 2]
            container.restart_listener(["/num"])
            numbers.send(3)  # some of them are caught up, and may come after those that are live
            assert sorted(container.output_queue.get(timeout=DEADLINE).data for _ in range(3)) == [3, 4, 5]
            assert container.output_queue.empty()

    def test_on_the_command_line(self, numbers):
        address = local_address(numbers.publisher.port_number)
        words = ["subscribe", "--address", address, "--json", "-n", "3", "--durable", "name", "--since", "1m"]
        for first in (0, 3):
            numbers.send(3)
            status, out, err = run_command(*words)
            assert (status, [json.loads(line)["data"] for line in out.splitlines()]) == (
                0,
                [first, first + 1, first + 2],
            )
        with self.subscriber(numbers):
            status, out, err = run_command(*words)
            assert (status, out) == (1, "")
            assert "in use by process" in err
            assert "Traceback" not in err


class TestSince:
    @pytest.mark.parametrize("way", ["Subscribe", "dictionary", "Listener", "ListenerContainer", "command"])
    def test_all_that_subscribes(self, way):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            Numbers(pub).send(3)
            time.sleep(0.2)  # time is what tells old from new
            begin = datetime.now(timezone.utc)
            Numbers(pub).send(2)
            settings = {"addresses": [local_address(pub.port_number)], "nameserver": False}
            if way in ("Listener", "ListenerContainer"):
                with posttroll.ListenerContainer(since=begin, **settings) as container:
                    assert way == "ListenerContainer" or container.listener.since == begin
                    assert [container.output_queue.get(timeout=DEADLINE).data for _ in range(2)] == [0, 1]
            elif way == "command":
                words = ["--address", *settings["addresses"], "--json", "-n", "2", "--since", begin.isoformat()]
                status, out, _ = run_command("subscribe", *words)
                assert (status, [json.loads(line)["data"] for line in out.splitlines()]) == (0, [0, 1])
            else:
                make = posttroll.Subscribe if way == "Subscribe" else dictionary_subscriber
                with make(since=begin, **settings) as sub:
                    assert received_data(sub, 2) == [0, 1]

    @pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="it cannot be told how long it was suspended")
    def test_what_was_sent_while_the_host_was_suspended(self, monkeypatch):
        """That time is none for `time.monotonic`; to the publisher, it was long ago that the subscriber was made."""
        clock_gettime = time.clock_gettime
        with posttroll.Publisher("tcp://*:0") as pub:
            for number in range(3):
                pub.send(text_message(number))
            time.sleep(0.3)  # time is what tells old from new
            with posttroll.Subscriber([local_address(pub.port_number)]) as sub:
                monkeypatch.setattr(time, "clock_gettime", lambda clock: clock_gettime(clock) + 60)
                assert received_data(sub, 3) == [0, 1, 2]

    @pytest.mark.parametrize("durable", [None, "slow"])
    def test_time_that_passes_between_two_clocks_takes_no_message(self, durable, monkeypatch, tmp_path):
        """A busy host may stop a thread between any two lines."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

        def after_a_while(clock: Callable[..., float]) -> Callable[..., float]:
            return lambda *which: (time.sleep(0.02), clock(*which))[1]

        names = {"time", "monotonic", "clock_gettime"} & set(dir(time))
        clocks = {name: after_a_while(getattr(time, name)) for name in names}
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            Numbers(pub).send(3)
            time.sleep(0.5)
            begin = datetime.now(timezone.utc)
            Numbers(pub).send(2)
            monkeypatch.setattr(posttroll, "time", types.SimpleNamespace(**{**vars(time), **clocks}))
            with posttroll.Subscriber(local_address(pub.port_number), since=begin, durable=durable) as sub:
                assert received_data(sub, 2) == [0, 1]

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("90", timedelta(seconds=90)),
            ("1.5", timedelta(seconds=1.5)),
            ("30s", timedelta(seconds=30)),
            ("10m", timedelta(minutes=10)),
            ("2h", timedelta(hours=2)),
            ("1d", timedelta(days=1)),
            ("2024-04-19T11:14:11Z", datetime(2024, 4, 19, 11, 14, 11, tzinfo=timezone.utc)),
            ("2024-04-19 11:14", datetime(2024, 4, 19, 11, 14)),
        ],
    )
    def test_texts(self, text, value):
        assert posttroll._time(text) == value

    @pytest.mark.parametrize("text", ["", "m", "-5", "10 m", "10w", "1e9", "yesterday", "2024-13-01"])
    def test_texts_that_are_none(self, text):
        status, _, err = run_here("subscribe", f"--since={text}")
        assert status == 2
        assert "neither a time span such as 90, 10m, 2h nor an ISO date-time" in err


def dictionary_subscriber(**settings: Any) -> posttroll.Subscriber:
    return posttroll.create_subscriber_from_dict_config(settings)


class TestFullQueues:
    """Queues that are full for a while: who misses something catches up once there is room."""

    @pytest.fixture(autouse=True)
    def small_queues(self, monkeypatch):
        monkeypatch.setenv("POSTTROLL_SEND_HIGH_WATER_MARK", "20")
        monkeypatch.setenv("POSTTROLL_RECEIVE_HIGH_WATER_MARK", "20")
        monkeypatch.setenv("POSTTROLL_HISTORY_BYTES", str(10**8))

    @contextlib.contextmanager
    def crowd(self, pub: Any, count: int, strangers: int = 0) -> Iterator[tuple[list[Any], list[Any]]]:
        with contextlib.ExitStack() as stack:
            address = local_address(pub.port_number)
            subs = [stack.enter_context(posttroll.Subscriber([address])) for _ in range(count)]
            raw = [stack.enter_context(raw_socket(zmq.SUB)) for _ in range(strangers)]
            for sock in raw:
                sock.rcvhwm = 5
                sock.setsockopt(zmq.RCVBUF, 4096)
                sock.subscribe(b"pytroll:/")
                sock.connect(address)
            assert pub.wait_for_subscribers(count + strangers, DEADLINE)
            yield subs, raw

    @pytest.mark.parametrize("strangers", [0, 1])
    def test_busy_subscribers_beside_one_that_keeps_up(self, strangers):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 4, strangers) as (subs, _):
            numbers = Numbers(pub, padding="x" * 20_000)
            with serving(subs[0]) as quick:
                for _ in range(20):
                    numbers.send(50)
                    time.sleep(0.005)
                assert pub.dropped
                with serving(subs[1]) as one, serving(subs[2]) as two, serving(subs[3]) as three:
                    for data in (quick, one, two, three):
                        await_count(data, numbers.count)
                        assert sorted(number for number, _ in data) == list(range(numbers.count))
                    wait_for(lambda: not pub._audience.unserved())
                    numbers.send(1)
                    for data in (quick, one, two, three):
                        wait_for(lambda data=data: data[-1][0] == numbers.count - 1)
                        assert sorted(number for number, _ in data) == list(range(numbers.count))

    def test_a_stranger_that_never_reads_harms_nobody(self):
        """Again and again, while subscribers of ours keep up, or lag a little."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 3, 2) as (subs, _):
            numbers = Numbers(pub, padding="x" * 5000)
            with serving(subs[0]) as one, serving(subs[1]) as two, serving(subs[2]) as three:
                for _ in range(60):
                    numbers.send(chance.randrange(1, 60))
                    time.sleep(chance.choice([0, 0.002, 0.02]))
                for data in (one, two, three):
                    await_count(data, numbers.count)
                wait_for(lambda: not pub._audience.unserved())
                for data in (one, two, three):
                    assert sorted(number for number, _ in data) == list(range(numbers.count))

    def test_who_never_reads_is_tried_less_and_less_often(self):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 1) as ([sub], _):
            numbers = Numbers(pub, padding="x" * 20_000)
            numbers.send(1)
            assert len(received_data(sub)) == 1
            wait_for(lambda: next(sub.recv(0)) is None and not pub._audience.unserved())
            numbers.send(500)
            wait_for(lambda: pub._audience._pause == pub._audience.LONGEST_PAUSE)
            with serving(sub) as data:
                await_count(data, 500)
                wait_for(lambda: not pub._audience.unserved() and not pub._audience._pause)

    def test_who_catches_up_while_more_is_sent(self):
        """What finds the queue full of the past does not make it begin again."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 1) as ([sub], _):
            numbers = Numbers(pub, padding="x" * 20_000)
            audience = pub._audience
            [peer] = audience.peers.values()
            numbers.send(1)
            assert len(received_data(sub)) == 1
            wait_for(lambda: next(sub.recv(0)) is None and not audience.unserved())
            while not pub.dropped:
                numbers.send(100)
            room = numbers.count  # in the system's buffers
            numbers.send(room + 600)
            dropped = pub.dropped
            read = [number for number, _ in received_data(sub, room - 100)]
            reached = wait_for(lambda: peer.after > peer.told and peer.after)

            def finds_it_full() -> bool:
                nonlocal reached
                numbers.send(1)
                assert peer.after >= reached
                reached = peer.after
                return pub.dropped > dropped

            wait_for(finds_it_full)
            with serving(sub) as data:
                await_count(data, numbers.count - 1 - len(read))
                assert sorted([*read, *(number for number, _ in data)]) == list(range(1, numbers.count))

    def test_who_falls_behind_as_others_have_is_sent_the_past_once(self):
        """Also what it had got alone, as the queue of another was full, before its own was."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 2) as (subs, _):
            numbers = Numbers(pub, padding="x" * 20_000)
            with serving(subs[1]) as data:
                while not pub.dropped:
                    numbers.send(10, 0.001)
                    await_count(data, numbers.count)
            peer = next(peer for peer in pub._audience.peers.values() if peer.after is None)
            ends = peer.ends
            while peer.after is None:
                numbers.send(10, 0.0001)
            numbers.send(100)
            with serving(subs[1]) as more:
                await_count(more, numbers.count - len(data))
                wait_for(lambda: peer.after is None)
                assert peer.ends == ends + 1
                numbers.send(1)
                await_count(more, numbers.count - len(data))
                wait_for(lambda: peer.told == numbers.count)
                assert (peer.ends, peer.after) == (ends + 1, None)

    def test_the_same_text_while_a_queue_is_full(self):
        text = text_message("x" * 20_000)
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.crowd(pub, 2) as (subs, _):
            with serving(subs[0]) as quick:
                for _ in range(1000):
                    pub.send(text)
                with serving(subs[1]) as slow:
                    await_count(quick, 1000)
                    await_count(slow, 1000)
                    wait_for(lambda: not pub._audience.unserved())
                    pub.send(text_message("end"))
                    wait_for(lambda: quick[-1] == slow[-1] == "end")
                    assert (len(quick), len(slow)) == (1001, 1001)

    @pytest.mark.parametrize("kind", ["I %s 3", "P %s 3 0 0"])
    def test_the_same_text_once_it_was_told_what_came_live(self, kind):
        """What is known by number to have come live is no copy of what was missed after it."""
        with raw_socket(zmq.XPUB) as pub:
            port = pub.bind_to_random_port("tcp://127.0.0.1")
            with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
                mark = b""
                while not mark.startswith(posttroll._MARK):
                    assert pub.poll(DEADLINE * 1000)
                    mark = pub.recv()[1:]
                text, own = text_message("same").encode(), b"0123456789abcdef"
                pub.send(mark + b"\0H " + own + b" 0 0 0 0 numbers")
                for _ in range(3):
                    pub.send(text)
                pub.send(mark + b"\0" + kind.encode() % own)
                for number in range(1, 6):
                    pub.send(mark + b"\0C " + own + b" %d\0" % number + text)
                pub.send(mark + b"\0E " + own + b" 5 1 5 0 1")
                pub.send(text_message("end").encode())
                wait_for(lambda: data[-1:] == ["end"])
                assert data == ["same"] * 5 + ["end"]

    def test_what_comes_between_a_connection_and_its_greeting(self, monkeypatch):
        """Each once, also if that is read before the news that there is a connection."""
        watch, unwatched = posttroll.Loop.watch_quiet, []
        monkeypatch.setattr(posttroll.Loop, "watch_quiet", lambda *args: unwatched.append(args))
        with raw_socket(zmq.XPUB) as pub:
            port = pub.bind_to_random_port("tcp://127.0.0.1")
            with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
                marks: list[bytes] = []
                while not marks or not marks[-1].startswith(posttroll._MARK):
                    assert pub.poll(DEADLINE * 1000)
                    marks.append(pub.recv()[1:])
                own, texts = b"0123456789abcdef", [text_message(number).encode() for number in range(3)]
                pub.send(marks[0] + b"\0D " + own + b" 1 1")
                for text in texts:
                    pub.send(text)
                pub.send(marks[-1] + b"\0H " + own + b" 3 0 %d 0 numbers" % port)
                for number, text in enumerate(texts, 1):
                    pub.send(marks[-1] + b"\0C " + own + b" %d\0" % number + text)
                pub.send(marks[-1] + b"\0E " + own + b" 3 1 3 0 1")
                pub.send(text_message("end").encode())
                wait_for(lambda: data[-1:] == ["end"])
                sub._loop.call(lambda: watch(*unwatched[0]))
                wait_for(lambda: unwatched[0][1] in sub._loop._quiet)
                assert data == [0, 1, 2, "end"]

    def test_who_comes_and_has_no_room_for_the_greeting(self, monkeypatch):
        """It gets what was sent since, but nothing of before that it has not asked for."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            audience, is_full = pub._audience, [True]
            send, send_to = audience._send, audience._send_to

            def send_if_there_is_room(data: bytes, flags: int) -> None:
                if is_full:
                    raise zmq.Again
                send(data, flags)

            monkeypatch.setattr(audience, "_send", send_if_there_is_room)
            monkeypatch.setattr(audience, "_send_to", lambda *args: not is_full and send_to(*args))
            numbers = Numbers(pub)
            numbers.send(10)
            wait_for(lambda: audience.history.last_before(time.monotonic() - 0.2) == 10)
            with posttroll.Subscriber([local_address(pub.port_number)]) as sub, serving(sub) as data:
                assert pub.wait_for_subscribers(1, DEADLINE)
                numbers.send(10)
                is_full.clear()
                wait_for(lambda: data[-1:] == [19])
                assert data == list(range(10, 20))

    def test_a_queue_takes_only_so_many_bytes(self, monkeypatch):
        """Whatever the size of the messages; it is caught up, as far as the history reaches, or known to be missed."""
        monkeypatch.setenv("POSTTROLL_SEND_HIGH_WATER_MARK", "1000000")
        monkeypatch.setenv("POSTTROLL_HISTORY_BYTES", "1000000")
        with config.set(send_high_water_bytes=500_000), posttroll.Publisher("tcp://*:0", "numbers") as pub:
            with self.crowd(pub, 2) as (subs, _), serving(subs[0]) as quick:
                numbers = Numbers(pub, padding="x" * 2000)
                numbers.send(1)
                await_count(quick, 1)
                wait_for(lambda: pub._audience.socket.getsockopt(zmq.SNDHWM) < 1000)
                buffers = 8_000_000 // 2000  # of the system, for the loopback interface
                while numbers.count < 2 * buffers:
                    numbers.send(100)
                    await_count(quick, numbers.count)
                assert pub.dropped > numbers.count - buffers - 1000
                with serving(subs[1]) as slow:
                    wait_for(lambda: slow and slow[-1][0] == numbers.count - 1)
                    wait_for(lambda: not pub._audience.unserved())
                    numbers.send(100)
                    wait_for(lambda: slow[-1][0] == numbers.count - 1)
                    came = {number for number, _ in slow}
                    assert len(came) == len(slow)
                    assert {*range(numbers.count - 400, numbers.count)} <= came  # what the history reaches
                    assert subs[1].missed >= numbers.count - len(came) > 0
                await_count(quick, numbers.count)
                assert sorted(number for number, _ in quick) == list(range(numbers.count))

    def test_the_limit_follows_the_sizes(self):
        sock = mock.Mock(getsockopt=lambda option: 5000)
        with config.set(send_high_water_bytes=1_000_000):
            limit = posttroll._QueueLimit(sock)
        count = total = 0

        def after(messages: int, size: int) -> int:
            nonlocal count, total
            count, total = count + messages, total + messages * size
            limit.adapt(count, total)
            return limit._limit

        assert after(1000, 100) == 5000
        assert after(1, 10_000) == 100
        assert after(1, 10_000_000) == limit.LEAST
        assert after(1000, 1000) == limit.LEAST  # the large one may still be there
        assert [after(1000, 1000) for _ in range(100)][-1] == pytest.approx(1000, rel=0.2)
        assert [after(1000, 100) for _ in range(100)][-1] == 5000
        assert sock.setsockopt.call_args.args == (zmq.SNDHWM, 5000)

    def test_full_and_cut(self, monkeypatch):
        """A queue is full when its connection ends."""
        with behind_relay() as (pub, relay, sub):
            numbers = Numbers(pub, padding="x" * 20_000)
            numbers.send(1)
            assert received_data(sub) == [[0, numbers.padding]]
            wait_for(lambda: next(sub.recv(0)) is None and not pub._audience.unserved())
            numbers.send(400)
            relay.cut()
            numbers.send(100)
            relay.mend()
            numbers.send(100)
            with serving(sub) as data:
                await_count(data, numbers.count - 1)
                wait_for(lambda: not pub._audience.unserved())
                assert sorted(number for number, _ in data) == list(range(1, numbers.count))


class TestFirstMessages:
    """What a publisher sends in the line after its start."""

    @pytest.fixture(params=["registration", "multicast"])
    def way(self, request):
        return {"registration": ["localhost"], "multicast": None}[request.param]

    def check(self, way: Any, addr_listener: bool) -> None:
        with nameserver(multicast_enabled=way is None):
            with posttroll.Subscribe("first", addr_listener=addr_listener, timeout=0) as sub, serving(sub) as data:
                for life in range(3):
                    with posttroll.Publish("first", nameservers=way) as pub:
                        for number in range(3):
                            pub.send(text_message([life, number]))
                wait_for(lambda: len(data) >= 9)
                assert sorted(data) == [[life, number] for life in range(3) for number in range(3)]

    def test_three_at_once_arrive(self, way, monkeypatch):
        config.set(discovery_seconds=1.5)
        self.check(way, addr_listener=False)

    def test_with_curve(self, way, keys):
        config.set(discovery_seconds=1.5)
        self.check(way, addr_listener=True)

    def run_processes(self, way: Any, batches: int, size: int) -> None:
        """Let processes publish the same text, *size* of them at once, with what the configuration is by default."""
        code = f"""
import sys, posttroll
with posttroll.Publish("first", nameservers={way}) as pub:
    pub.send("pytroll://first info me@here 2020-01-01T00:00:00 v1.01 application/json %s" % sys.argv[1])
"""
        with nameserver(multicast_enabled=way is None):
            with posttroll.Subscribe("first", timeout=0) as sub, serving(sub) as data:
                wait_for(lambda: sub._loop)
                for batch in range(batches):
                    with contextlib.ExitStack() as stack:
                        running = [stack.enter_context(python(code, batch)) for _ in range(size)]
                        assert [finish(each)[0] for each in running] == [0] * size
                wait_for(lambda: len(data) >= batches * size)
                assert sorted(data) == sorted(list(range(batches)) * size)

    def test_a_process_for_each_message(self, monkeypatch):
        """As scripts do."""
        monkeypatch.delenv("POSTTROLL_DISCOVERY_SECONDS")
        self.run_processes(["localhost"], 3, 8)

    @pytest.mark.long
    @pytest.mark.parametrize("backend", ["plain", "secure"])
    def test_50_processes(self, way, backend, monkeypatch, request):
        monkeypatch.delenv("POSTTROLL_DISCOVERY_SECONDS")
        if backend == "secure":
            request.getfixturevalue("keys")
        self.run_processes(way, 10, 5)

    @pytest.mark.skipif(zmq.zmq_version_info() >= (4, 3, 5), reason="this libzmq knows who is gone")
    def test_topics_of_a_connection_that_is_gone(self):
        """A later connection may get what is sent before it has subscribed: that is no proof of anything any more."""
        with posttroll.Publisher("tcp://*:0") as pub:

            def leave_topics() -> bool:
                with pub._lock:
                    with raw_socket(zmq.SUB, pub.port_number) as sub:
                        sub.subscribe(b"pytroll:/")
                        time.sleep(0.01)
                    time.sleep(0.01)
                return pub.subscriber_count == 0 and pub._audience._has_ghosts

            wait_for(leave_topics)
            pub.send(text_message("x"))
            with posttroll.Subscriber([local_address(pub.port_number)]):
                assert pub.wait_for_subscribers(1, DEADLINE)
                assert [peer.before for peer in pub._audience.peers.values()] == [0]

    def test_the_same_as_another_publisher_sends_meanwhile(self):
        """It is live, while the other, which sent it before, is connected, but has not said hello."""
        text = text_message("the same to the byte")
        with posttroll.Publisher("tcp://*:0") as pub, posttroll.Publisher("tcp://*:0") as other:
            pub.send(text)
            addresses = [local_address(each.port_number) for each in (pub, other)]
            with contextlib.ExitStack() as stack:
                with pub._lock:
                    sub = stack.enter_context(posttroll.Subscriber(addresses, since=60))
                    data = stack.enter_context(serving(sub))
                    wait_for(lambda: all(link.is_up for link in sub._connections._links.values()))
                    wait_for(lambda: other.subscriber_count)
                    other.send(text)
                    wait_for(lambda: data)
                wait_for(lambda: len(data) == 2)

    @pytest.mark.parametrize(("topics", "before"), [((b"pytroll",), 1), ((), 0), ((b"pytroll", b"other"), 0)])
    def test_what_is_told_to_have_been_sent_before(self, topics, before):
        """Everything, but if messages may have come by topics that were here before the mark."""
        mark = posttroll._MARK + b"0123456789abcdef/1"

        def told() -> int:
            with raw_socket(zmq.SUB) as sub:
                for topic in (*topics, mark):
                    sub.setsockopt(zmq.SUBSCRIBE, topic)
                sub.connect(local_address(pub.port_number))
                assert sub.poll(DEADLINE * 1000)
                return int(sub.recv().split(b"\0H ")[1].split()[4])

        with posttroll.Publisher("tcp://*:0") as pub:
            pub.send(text_message("first"))
            wait_for(lambda: told() == before)  # once they come together

    def test_nobody_is_waited_for_when_nothing_was_sent(self):
        config.set(discovery_seconds=1000)
        with posttroll.Publish("first", nameservers=["localhost"]):
            pass

    def test_a_publisher_that_is_not_announced_waits_for_nobody(self):
        config.set(discovery_seconds=1000)
        with posttroll.Publisher("tcp://*:0") as pub:
            pub.send(text_message("nobody hears it"))

    def test_a_publisher_on_its_port_that_nobody_follows_by_a_nameserver(self):
        """A subscriber that waits for an address gets the first messages when it connects."""
        port = free_port()
        with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
            with posttroll.Publisher(f"tcp://*:{port}") as pub:
                for number in range(100):
                    pub.send(text_message(number))
                wait_for(lambda: len(data) >= 100)
            assert sorted(data) == list(range(100))


class TestNewcomers:
    """Subscribers that come later get what is sent from then on, unless they ask for more."""

    def test_nothing_old(self):
        with posttroll.Publisher("tcp://*:0") as pub:
            for _ in range(100):
                pub.send(text_message("old"))
            time.sleep(0.01)  # time is what tells old from new
            with posttroll.Subscriber([local_address(pub.port_number)]) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("new"))
                assert received_data(sub) == ["new"]
                with serving(sub) as data:
                    wait_for(lambda: not pub._audience.unserved())
                    pub.send(text_message("newer"))
                    wait_for(lambda: data == ["newer"])

    def test_an_address_that_is_added_later(self):
        """Also while the subscriber is busy with other publishers, and has one that is none of ours."""
        with posttroll.Publisher("tcp://*:0", "busy") as busy, raw_publisher() as (_, address):
            with posttroll.Subscriber([local_address(busy.port_number), address]) as sub, serving(sub) as data:
                ended = threading.Event()

                def send() -> None:
                    while not ended.wait(0.0002):
                        busy.send(text_message("busy"))

                try:
                    with in_thread(send):
                        wait_for(lambda: data)
                        for number in range(20):
                            with posttroll.Publisher(f"tcp://*:{free_port()}", f"pub{number}") as pub:
                                for _ in range(20):
                                    pub.send(text_message("old"))
                                time.sleep(0.01)
                                sub.add(local_address(pub.port_number))
                                assert pub.wait_for_subscribers(1, DEADLINE)
                                pub.send(text_message(number))
                                wait_for(lambda number=number: number in data)
                                wait_for(lambda pub=pub: not pub._audience.unserved())
                        ended.set()
                finally:
                    ended.set()
                assert "old" not in data
                assert [each for each in data if each != "busy"] == list(range(20))

    def test_those_that_come_while_a_publisher_sends(self):
        """What comes live before all their topics have arrived, and what is sent meanwhile: each once."""
        topics = ["/a", "/b", "/numbers", "/z"]
        with posttroll.Publisher("tcp://*:0") as pub:
            numbers, ended = Numbers(pub), threading.Event()

            def send() -> None:
                while not ended.is_set():
                    numbers.send(10, 0.00005)

            try:
                with in_thread(send):
                    for _ in range(40):
                        with posttroll.Subscriber([local_address(pub.port_number)], topics) as sub:
                            got = set()
                            deadline = time.monotonic() + DEADLINE
                            while not got or not set(range(min(got), min(got) + 250)) <= got:
                                assert time.monotonic() < deadline, f"a gap in {sorted(got)}"
                                more = received_data(sub, 10)  # what is caught up may come after what is live
                                assert len(got | set(more)) == len(got) + len(more), "came twice"
                                got.update(more)
                    ended.set()
            finally:
                ended.set()

    @pytest.mark.parametrize("form", [float, "timedelta", "datetime"])
    def test_since(self, form):
        with posttroll.Publisher("tcp://*:0") as pub:
            pub.send(text_message("too old"))
            entries = pub._audience.history._entries
            entries[0] = (entries[0][0] - 200, entries[0][1])  # so long ago
            pub.send(text_message("old"))
            since = {
                float: 100.0,
                "timedelta": timedelta(seconds=100),
                "datetime": datetime.now(timezone.utc) - timedelta(seconds=100),
            }[form]
            with posttroll.Subscriber([local_address(pub.port_number)], since=since) as sub, serving(sub) as data:
                wait_for(lambda: data)
                pub.send(text_message("new"))
                wait_for(lambda: len(data) == 2)
                assert data == ["old", "new"]

    @pytest.mark.parametrize("slow", ["hello", "request"])
    def test_what_is_asked_for_is_under_way_for_long(self, slow):
        """Neither does more come than what was asked for, nor less."""
        with posttroll.Publisher("tcp://*:0") as pub:
            pub.send(text_message("too old"))
            time.sleep(0.01)  # time is what tells old from new
            begin = datetime.now(timezone.utc)
            pub.send(text_message("old"))
            with posttroll.Subscriber([local_address(pub.port_number)], since=begin) as sub:
                wait_for(lambda: pub._audience.peers)
                with pub._lock if slow == "request" else contextlib.nullcontext():
                    if slow == "request":
                        wait_for(lambda: next(sub.recv(0)) is None and next(iter(sub._streams.values()))._requests)
                    time.sleep(0.1)  # that it is under way
                assert received_data(sub) == ["old"]
                wait_for(lambda: not pub._audience.unserved())
                pub.send(text_message("new"))
                assert received_data(sub) == ["new"]

    def test_clocks_of_two_hosts_that_differ(self):
        """It is as if the request had been under way since the hello: rather more comes than less."""
        with connected() as (pub, _):
            [peer] = pub._audience.peers.values()
            for hours in (-1, 1):
                assert pub._audience._when_asked(peer, time.time() + 3600 * hours) == peer.greeted
            between = (time.monotonic() - peer.greeted) / 2
            assert pub._audience._when_asked(peer, time.time() - between) > peer.greeted

    def test_since_before_what_is_kept(self, caplog):
        """What is gone of the time asked for is told; of a publisher that has not been there so long, nothing is."""
        with config.set(history_messages=10), posttroll.Publisher("tcp://*:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(10)
            with posttroll.Subscriber([local_address(pub.port_number)], since=100) as sub, serving(sub) as data:
                wait_for(lambda: len(data) == 10)
                assert sub.missed == 0
            numbers.send(5)
            with posttroll.Subscriber([local_address(pub.port_number)], since=100) as sub, serving(sub) as data:
                wait_for(lambda: sub.missed)
                assert sub.missed == 5
                wait_for(lambda: data == list(range(5, 15)))

    @pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), timedelta(days=-1), 1e300])
    def test_what_since_cannot_be(self, wrong):
        with pytest.raises(ValueError, match="since"):
            posttroll.Subscriber([], since=wrong)


def binds(sock: Any, port: int) -> bool:
    """Bind a socket to a port of this host, if it is free already."""
    try:
        sock.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


class TestProxiesAndNeighbours:
    @needs_proxy
    def test_through_a_proxy(self, short_heartbeats):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, Relay(pub.port_number) as relay:
            with proxy(relay.port) as port, posttroll.Subscriber([local_address(port)]) as one:
                with posttroll.Subscriber([local_address(port)], "/numbers") as two:
                    with serving(one) as first, serving(two) as second:
                        assert pub.wait_for_subscribers(2, DEADLINE)
                        assert pub.subscriber_count == 2
                        numbers = Numbers(pub)
                        for _ in range(3):
                            numbers.send(50, 0.001)
                            relay.cut()
                            numbers.send(50, 0.001)
                            relay.mend()
                            numbers.send(50, 0.001)
                            await_count(first, numbers.count)
                            await_count(second, numbers.count)
                        wait_for(lambda: not pub._audience.unserved())
                        assert sorted(first) == sorted(second) == list(range(numbers.count))

    def test_a_newer_publisher_may_tell_more_in_its_greeting(self, monkeypatch):
        send_to = posttroll._Audience._send_to

        def send_more(audience: Any, peer: Any, content: bytes) -> bool:
            if content[:2] == b"H ":
                head, _, name = content.rpartition(b" ")
                content = head + b" 1 2 " + name
            return bool(send_to(audience, peer, content))

        monkeypatch.setattr(posttroll._Audience, "_send_to", send_more)
        with posttroll.Publisher("tcp://127.0.0.1:0", "numbers") as pub:
            numbers = Numbers(pub)
            numbers.send(5)
            with posttroll.Subscriber([local_address(pub.port_number)], since=60) as sub, serving(sub) as data:
                numbers.check(data)

    @needs_proxy
    def test_who_hears_all_comes_and_goes_behind_a_proxy(self):
        """It shares the connection of the others, and must not take their topics along."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, proxy(pub.port_number) as port:
            with posttroll.Subscriber([local_address(port)]) as sub, serving(sub) as data:
                assert pub.wait_for_subscribers(1, DEADLINE)
                with raw_socket(zmq.SUB, port) as other:
                    other.subscribe(b"")
                    wait_for(lambda: pub.subscriber_count == 2)
                wait_for(lambda: pub.subscriber_count == 1)
                pub.send(text_message("heard"))
                wait_for(lambda: data == ["heard"])

    @needs_proxy
    @pytest.mark.parametrize("more", [0, 5])
    @pytest.mark.parametrize("has_same_port", [False, True])
    def test_a_proxy_that_holds_a_dead_connection_for_alive(self, has_same_port, more, monkeypatch):
        """It passes nothing on of the new one, so the publisher does not know that something was lost."""
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.3)
        with contextlib.ExitStack() as stack:
            pub = stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0", "numbers"))
            port = stack.enter_context(proxy(pub.port_number))
            own_port = pub.port_number if has_same_port else 0
            with (
                Relay(port, "127.0.0.2", own_port) as relay,
                posttroll.Subscriber([relay.address], "/numbers") as sub,
                serving(sub) as data,
            ):
                assert pub.wait_for_subscribers(1, DEADLINE)
                numbers = Numbers(pub)
                for _ in range(2):
                    numbers.send(5)
                    await_count(data, numbers.count)
                    (link,) = sub._connections._links.values()
                    relay.cut_on_one_side()
                    wait_for(lambda link=link: not link.is_up)
                    numbers.send(5)
                    relay.mend()
                    wait_for(lambda link=link: link.is_up)
                    for _ in range(more):
                        numbers.send(1, 0.05)
                    await_count(data, numbers.count)
                assert sorted(data) == list(range(numbers.count))
                assert pub.subscriber_count == 1

    @needs_proxy
    def test_an_answer_to_what_was_asked_before_the_connection_failed(self, monkeypatch):
        """It says nothing of what was lost while a proxy held the dead connection for alive."""
        take_request, held = posttroll._Audience._take_request, []
        monkeypatch.setattr(posttroll._Audience, "_take_request", lambda *request: held.append(request))
        with contextlib.ExitStack() as stack:
            pub = stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0", "numbers"))
            relay = stack.enter_context(Relay(stack.enter_context(proxy(pub.port_number))))
            sub = stack.enter_context(posttroll.Subscriber([relay.address], "/numbers"))
            data = stack.enter_context(serving(sub))
            wait_for(lambda: held)
            numbers = Numbers(pub)
            numbers.send(5)
            await_count(data, numbers.count)
            (link,) = sub._connections._links.values()
            relay.cut_on_one_side()
            wait_for(lambda: not link.is_up)
            numbers.send(5)
            relay.mend()
            wait_for(lambda: link.is_up)
            monkeypatch.setattr(posttroll._Audience, "_take_request", take_request)
            with pub._audience.lock:
                for request in held:
                    take_request(*request)
            for _ in range(5):
                numbers.send(1, 0.05)
            numbers.check(data)

    @needs_proxy
    def test_another_publisher_greets_us_while_one_is_hidden_by_its_proxy(self, monkeypatch):
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.3)
        with contextlib.ExitStack() as stack:
            pubs = [stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0", "numbers")) for _ in range(2)]
            ports = [stack.enter_context(proxy(pubs[0].port_number)), pubs[1].port_number]
            relays = [stack.enter_context(Relay(port, "127.0.0.2", port)) for port in ports]
            sub = stack.enter_context(posttroll.Subscriber([relay.address for relay in relays], "/numbers"))
            data = stack.enter_context(serving(sub))
            wait_for(lambda: sub.up_to_date == 2)
            numbers = Numbers(pubs[0])
            links = list(sub._connections._links.values())
            relays[0].cut_on_one_side()
            relays[1].cut()
            wait_for(lambda: not any(link.is_up for link in links))
            numbers.send(5)
            for relay in relays:
                relay.mend()
            numbers.check(data)

    @pytest.mark.parametrize("is_forwarded", [False, pytest.param(True, marks=needs_proxy)])
    @pytest.mark.parametrize("is_late", [False, True])
    def test_the_connection_fails_before_the_greeting_has_come(self, is_late, is_forwarded, monkeypatch):
        """What came before is recognised; a proxy that holds it for alive does not have the publisher greet anew.

        A busy subscriber may read it when there is a new connection: it says nothing of what was lost between the two.
        """
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.3)
        greetings = []

        def lose_the_first(stream: Any, raw: bytes) -> Any:
            if b"\0H " in raw:
                greetings.append(raw)
                if len(greetings) == 1:
                    return None
            return take(stream, raw)

        def find_the_first(stream: Any) -> None:
            begin_turn(stream)
            if len(greetings) == 1:
                take(stream, greetings[0])

        take, begin_turn = posttroll._CatchUp.take, posttroll._CatchUp.begin_turn
        monkeypatch.setattr(posttroll._CatchUp, "take", lose_the_first)
        if is_late:
            monkeypatch.setattr(posttroll._CatchUp, "begin_turn", find_the_first)
        with contextlib.ExitStack() as stack:
            pub = stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0", "numbers"))
            port = stack.enter_context(proxy(pub.port_number)) if is_forwarded else pub.port_number
            relay = stack.enter_context(Relay(port, "127.0.0.2", port))
            sub = stack.enter_context(posttroll.Subscriber([relay.address], "/numbers"))
            data = stack.enter_context(serving(sub))
            wait_for(lambda: greetings)
            numbers = Numbers(pub)
            for _ in range(2):
                numbers.send(5)
                await_count(data, numbers.count)
                (link,) = sub._connections._links.values()
                relay.cut_on_one_side()
                wait_for(lambda link=link: not link.is_up)
                numbers.send(5)
                relay.mend()
                wait_for(lambda link=link: link.is_up)
                for _ in range(5):
                    numbers.send(1, 0.05)
                await_count(data, numbers.count)
            wait_for(lambda: sub.up_to_date == 1)
            assert sorted(data) == list(range(numbers.count))
            assert (pub.subscriber_count, sub.missed) == (1, 0)

    @needs_proxy
    def test_a_publisher_that_starts_behind_a_proxy_when_another_has_come_again_is_believed(self, monkeypatch):
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.3)
        looks, look = [], posttroll._CatchUp.look_for_greeting
        monkeypatch.setattr(posttroll._CatchUp, "look_for_greeting", lambda *args: (look(*args), looks.append(args[1])))
        port = free_port()
        with contextlib.ExitStack() as stack:
            pub = stack.enter_context(posttroll.Publisher("tcp://127.0.0.1:0", "direct"))
            relay = stack.enter_context(Relay(pub.port_number, "127.0.0.2", pub.port_number))
            behind = local_address(stack.enter_context(proxy(port)))
            sub = stack.enter_context(posttroll.Subscriber([relay.address, behind], "/numbers"))
            data = stack.enter_context(serving(sub))
            wait_for(lambda: sub.up_to_date == 1)
            link = next(link for (_, address), link in sub._connections._links.items() if address == relay.address)
            relay.cut()
            wait_for(lambda: not link.is_up)
            relay.mend()
            wait_for(lambda: looks)
            assert looks == [True]
            with posttroll.Publisher(f"tcp://127.0.0.1:{port}", "numbers") as pub:
                wait_for(lambda: sub.up_to_date == 2)
                numbers = Numbers(pub)
                numbers.send(5)
                numbers.check(data)

    @needs_proxy
    def test_a_publisher_that_comes_while_its_proxy_holds_a_dead_connection_for_alive(self, monkeypatch):
        """Its greeting went to the dead one."""
        monkeypatch.setattr(posttroll._Connections, "GREETING", 0.3)
        port = free_port()
        with contextlib.ExitStack() as stack:
            relay = stack.enter_context(Relay(stack.enter_context(proxy(port))))
            sub = stack.enter_context(posttroll.Subscriber([relay.address], "/numbers"))
            data = stack.enter_context(serving(sub))
            with posttroll.Publisher(f"tcp://127.0.0.1:{port}", "numbers") as pub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                Numbers(pub).send(3)
                await_count(data, 3)
                wait_for(lambda: sub.up_to_date == 1)
                (link,) = sub._connections._links.values()
                relay.cut_on_one_side()
                wait_for(lambda: not link.is_up)
            data.clear()
            with posttroll.Publisher(f"tcp://127.0.0.1:{port}", "numbers") as pub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                wait_for(lambda: all(peer.hello is not None for peer in pub._audience.peers.values()))
                numbers = Numbers(pub)
                numbers.send(5)
                relay.mend()
                await_count(data, numbers.count)
                numbers.send(5)
                await_count(data, numbers.count)
                assert data == list(range(numbers.count))
                assert sub.missed == 0

    @pytest.mark.parametrize("first", [b"", b"pytroll:/"])
    def test_all_and_all_messages_are_two_topics(self, first):
        with posttroll.Publisher("tcp://*:0") as pub, raw_socket(zmq.SUB, pub.port_number) as sub:
            for topic in (b"", b"pytroll:/"):
                sub.subscribe(topic)
            assert pub.wait_for_subscribers(2, DEADLINE)
            sub.unsubscribe(first)
            wait_for(lambda: pub.subscriber_count == 1)
            pub.send(text_message("heard"))
            assert sub.poll(DEADLINE * 1000)

    @needs_proxy
    def test_those_behind_a_proxy_hide_nobody(self):
        """It passes on their topics as one, but each of their marks; others still get all when a queue is full."""
        config.set(send_high_water_mark=20)
        with posttroll.Publisher("tcp://*:0") as pub, proxy(pub.port_number) as port:
            with contextlib.ExitStack() as stack:
                for _ in range(3):
                    stack.enter_context(posttroll.Subscriber([local_address(port)], "/other"))
                assert pub.wait_for_subscribers(3, DEADLINE)
                fast, slow = (stack.enter_context(raw_socket(zmq.SUB, pub.port_number)) for _ in range(2))
                slow.rcvhwm = 1
                for sock in (fast, slow):
                    sock.subscribe(b"pytroll:/")
                wait_for(lambda: pub.subscriber_count and pub._audience._topics == 3)
                while not pub.dropped:
                    pub.send(text_message("x" * 100_000))
                    assert fast.poll(DEADLINE * 1000)
                    fast.recv()
                for _ in range(3):
                    pub.send(text_message("x"))
                    assert fast.poll(DEADLINE * 1000)
                    fast.recv()

    def test_the_topics_are_between_two_marks(self):
        """Also when a connection has come back, and when a proxy passes them on: else what comes between is lost."""
        port = free_port()
        topics = ["/a", "/z", "/\U0010ffff"]
        with posttroll.Subscriber([local_address(port)], topics) as sub, serving(sub):
            for _ in range(2):
                with raw_socket(zmq.XPUB) as publisher:
                    wait_for(partial(binds, publisher, port))
                    changes = []
                    while not changes or not changes[-1].startswith(b"\1" + posttroll._MARK):
                        assert publisher.poll(DEADLINE * 1000)
                        changes.append(publisher.recv())
                    assert len(changes) == 5
                    assert changes[0][2:] == changes[4][2:]
                    assert changes[0].startswith(b"\1" + posttroll._EARLY_MARK)
                    assert all(change.startswith(b"\1pytroll:/") for change in changes[1:4])

    def test_what_plain_sockets_see_while_others_catch_up(self, short_heartbeats):
        """Whole messages on their topics, each once: by an empty subscription, and as the known package subscribes."""
        prefixes = [b"", b"pytroll:/", b"pytroll://numbers", b"pytroll://other", b"p"]
        with behind_relay() as (pub, relay, sub), serving(sub) as data, contextlib.ExitStack() as stack:
            plain = [stack.enter_context(raw_socket(zmq.SUB, pub.port_number)) for _ in prefixes]
            for sock, prefix in zip(plain, prefixes):
                sock.subscribe(prefix)
            assert pub.wait_for_subscribers(1 + len(plain), DEADLINE)
            numbers = Numbers(pub)
            for _ in range(3):
                numbers.send(50)
                relay.cut()
                numbers.send(50)
                relay.mend()
                wait_for(lambda: pub.subscriber_count == 1 + len(plain))
            numbers.check(data)
            sent = [*range(numbers.count), mock.ANY]
            for sock, prefix in zip(plain, prefixes):
                expected = [] if b"other" in prefix else sent
                seen = [sock.recv_multipart() for _ in expected if sock.poll(DEADLINE * 1000)]
                assert [len(frames) for frames in seen] == [1] * len(expected)
                assert [posttroll.Message.decode(raw).data for [raw] in seen] == expected
                assert not sock.poll(50)


class TestMarks:
    """Bad input: marks that somebody made up, and answers that are none."""

    @staticmethod
    def mark(number: int = 1, topics: int = 1) -> bytes:
        return posttroll._MARK + b"%016x/%d" % (number, topics)

    @contextlib.contextmanager
    def stranger(self, pub: Any) -> Iterator[Any]:
        with raw_socket(zmq.XSUB, pub.port_number) as sock:
            yield sock

    def ask(self, pub: Any, number: int, request: str) -> bytes:
        return b"\1" + self.mark(number) + f"/{pub._audience.instance.decode()}/{request}".encode()

    def test_made_up_marks_and_requests(self):
        with connected() as (pub, sub), serving(sub) as data, self.stranger(pub) as sock:
            numbers = Numbers(pub)
            numbers.send(10)
            huge = "9" * 15
            instance = pub._audience.instance.decode()
            for junk in (
                posttroll._MARK,
                posttroll._MARK[:-3],
                posttroll._MARK + b"x" * 10_000,  # more is too much for the socket that sends it, with libzmq 4.3.4
                posttroll._MARK + b"0123456789abcdef/" + b"9" * 10_000,
                self.mark() + b"/" + b"f" * 16 + b"/1+0@0,1/pytroll:/",  # of another instance
                self.mark() + f"/{instance}/{huge}+{huge}@{huge},{huge}/".encode(),
                self.mark() + f"/{instance}/-1+0@0,5/".encode(),
                self.mark() + f"/{instance}/0+0@0,{'9' * 5000}/".encode(),
                self.mark() + f"/{instance}/0+0@0,5/".encode() + b"\n" * 1000,
                self.mark() + f"/{instance}/0+0@0,5/".encode() + b"\xff" * 1999,
                self.mark(7, 999_999),
                self.mark(0xFFFFFFFFFFFFFFFF, 0),
                b"!" + self.mark()[1:],
                b"!" + self.mark()[1:] + b"/0",
                b"!" + self.mark()[1:-1],
                b"!" + self.mark()[1:] + f"/{instance}/0+0@0,5/".encode(),
                b"!",
            ):
                for sign in (b"\1", b"\0", b"\1", b"\1"):
                    sock.send(sign + junk)
            numbers.send(10)
            numbers.check(data)
            assert len(pub._audience.peers) < 10
            wait_for(lambda: len(pub._audience._early_marks.connections) == 2)
            assert pub.dropped == 0

    def test_what_is_asked_of_another_publisher(self):
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.stranger(pub) as sock:
            Numbers(pub).send(3)
            sock.send(b"\1" + self.mark())
            for kind in (b"H", b"E"):
                assert sock.poll(DEADLINE * 1000)
                assert sock.recv().startswith(self.mark() + b"\0" + kind)
                sock.send(b"\1" + self.mark() + b"/" + b"f" * 16 + b"/0+0@0,3/")
                sock.send(self.ask(pub, 1, "3+0@0,3/"))

    def test_one_who_asks_late_is_told_the_last_position_once_more(self):
        """A position tells nothing to a subscriber whose request has not been answered yet."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.stranger(pub) as sock:

            def next_is(beginning: bytes) -> bool:
                return bool(sock.poll(DEADLINE * 1000)) and sock.recv().startswith(self.mark() + b"\0" + beginning)

            instance = pub._audience.instance
            sock.send(b"\1" + self.mark())
            assert next_is(b"H " + instance + b" 0 ")
            Numbers(pub).send(1)
            assert next_is(b"P " + instance + b" 1 ")
            wait_for(lambda: pub._audience._look_again not in pub._audience._timers)  # nothing more is to be told
            sock.send(self.ask(pub, 1, "0+0@0,0/pytroll:/"))
            assert next_is(b"E " + instance + b" 0 ")
            assert next_is(b"P " + instance + b" 1 ")

    def test_one_who_has_not_asked_yet_is_told_later(self, monkeypatch):
        monkeypatch.setattr(posttroll._Audience, "LOOK_SECONDS", 0.5)
        with posttroll.Publisher("tcp://*:0", "numbers") as pub, self.stranger(pub) as sock:
            monkeypatch.setattr(pub._audience, "_looked", 0.0)
            sock.send(b"\1" + self.mark())
            assert pub.wait_for_subscribers(1, DEADLINE)
            (peer,) = pub._audience.peers.values()
            monkeypatch.setattr(peer, "greeted", time.monotonic() + 10)  # it has been just now, however slow the test
            Numbers(pub).send(1)
            assert peer.told == 0
            peer.greeted = time.monotonic() - 1
            wait_for(lambda: peer.told == 1)

    def test_who_sends_seldom_tells_at_once(self, monkeypatch):
        """And wakes no other thread for it."""
        monkeypatch.setattr(posttroll._Audience, "LOOK_SECONDS", 0.0)  # it is always long ago
        with connected() as (pub, sub):
            audience = pub._audience
            wait_for(lambda: next(sub.recv(0.01)) is None and sub.up_to_date == 1)
            numbers = Numbers(pub)
            numbers.send(1)  # the loop is told when it will be too old
            assert received_data(sub) == [0]
            wait_for(lambda: audience._look_again not in audience._timers)
            call, wakes = audience.loop.call, []
            monkeypatch.setattr(audience.loop, "call", lambda callback: wakes.append(callback) or call(callback))
            for count in range(2, 6):
                numbers.send(1)
                assert [peer.told for peer in audience.peers.values()] == [count]
                assert received_data(sub) == [count - 1]
            assert wakes == []

    def test_thousands_of_marks(self, monkeypatch):
        """Each is a subscriber for its publisher; there is a limit, and others are served all the same."""
        monkeypatch.setattr(posttroll._Audience, "PEERS", 2000)
        with connected() as (pub, sub), serving(sub) as data, self.stranger(pub) as sock:
            numbers = Numbers(pub)
            before = memory_of()
            for number in range(5000):
                sock.send(b"\1!" + self.mark(number)[1:])
                sock.send(b"\1" + self.mark(number))
                if not number % 50:
                    numbers.send(1)
            wait_for(lambda: len(pub._audience.peers) == len(pub._audience._early_marks.connections) == 2000)
            numbers.send(10)
            numbers.check(data)
            assert memory_of() < before + 100

    def test_one_mark_that_connects_1000_times_and_asks_for_all(self):
        """The history is full; who asks again and again has only one turn after the other."""
        with connected() as (pub, sub), serving(sub) as data, self.stranger(pub) as sock:
            numbers = Numbers(pub, padding="x" * 500)
            numbers.send(4000)
            for number in range(1000):
                sock.send(b"\1" + self.mark())
                sock.send(self.ask(pub, 1, f"0+999999@0,{numbers.count}/pytroll:/{number}"))
                sock.send(b"\0" + self.mark())
                if not number % 50:
                    numbers.send(1)
            numbers.check(data)
            assert set(pub._audience.peers) == {peer.mark for peer in pub._audience.peers.values()}
            assert sum(peer.connections for peer in pub._audience.peers.values()) <= 1001

    def test_who_asks_and_does_not_read_holds_up_nobody(self):
        config.set(send_high_water_mark=100)
        with connected() as (pub, sub), serving(sub) as data, contextlib.ExitStack() as stack:
            numbers = Numbers(pub, padding="x" * 500)
            socks = [stack.enter_context(raw_socket(zmq.XSUB)) for _ in range(20)]
            for number, sock in enumerate(socks):
                sock.rcvhwm = 1
                sock.setsockopt(zmq.RCVBUF, 4096)
                sock.connect(local_address(pub.port_number))
                sock.send(b"\1" + self.mark(number))
            wait_for(lambda: len(pub._audience.peers) == 21)
            for _ in range(20):
                numbers.send(100, 0.0005)
                for number, sock in enumerate(socks):
                    sock.send(self.ask(pub, number, "0+999999@0,99999999/"))
            await_count(data, numbers.count)
            assert sorted(each for each, _ in data) == list(range(numbers.count))

    def test_what_is_injected_under_our_mark(self, caplog):
        """A publisher of a stranger, who knows our mark (he sees it): wrong fields, other instances, other topics."""
        with raw_socket(zmq.XPUB) as fake, posttroll.Publisher("tcp://*:0", "good") as good:
            port = fake.bind_to_random_port("tcp://127.0.0.1")
            with posttroll.Subscriber([local_address(port), local_address(good.port_number)], "/numbers") as sub:
                with serving(sub) as data:
                    marks: list[bytes] = []
                    while not marks or posttroll._MARK not in marks[-1]:
                        assert fake.poll(DEADLINE * 1000)
                        marks.append(fake.recv())
                    mark = marks[-1][1:]
                    assert good.wait_for_subscribers(1, DEADLINE)
                    real = good._audience.instance
                    text = text_message("injected", "/numbers").encode()
                    other = text_message("injected", "/other").encode()
                    own = b"a" * 16
                    for content in (
                        b"",
                        b"\0",
                        b"C",
                        b"C \0" + text,
                        b"C " + own + b" 1\0" + text,  # no hello of it
                        b"L " + own + b" 1\0" + text,
                        b"H " + own + b" w x y z name",
                        b"H " + own + b" 0 0 0 0 0 fake",
                        b"H " + own + b" 0 fake",
                        b"H " + own + b" fake",
                        b"C " + own + b" 1\0" + other,
                        b"L " + own + b" 2\0" + other,
                        b"C " + own + b" 3\0pytroll",
                        b"C " + own + b" 4\0\xff\xfe",
                        b"C " + own + b" " + b"9" * 4000 + b"\0" + other,
                        b"C " + own + b" -5\0" + other,
                        b"E " + own + b" -1 -1 -1 -1",
                        b"E " + own + b" 99999999999999999999 2 0 99999999999999999999",
                        b"E " + own + b" 1 2 3",
                        b"P " + own + b" 1 2 3 4 5",
                        b"X " + own + b" 1",
                        b"P " + real + b" 999999999999 0 0",
                        b"\xff" * 50_000,
                    ):
                        fake.send(mark + b"\0" + content)
                    early = b"!" + mark[1:] + b"\0"
                    for content in (
                        *(b"", b"N", b"D", b"D ", b"D x y z", b"D " + own + b" 1 0", b"D " + own + b" 1 x"),
                        *(b"D " + own + b" 1 " + b"9" * 4000, b"D " + own + b" 2 -1", b"D " + own + b" 3 2", b"N"),
                        *(b"D x 4 2", b"D " + own + b" 5 2", b"N", b"N", b"D " + own + b" 6 1", b"\xff", own),
                    ):
                        fake.send(early + content)
                    for number in range(20_000):
                        fake.send(early + b"D %016x 1 2" % number)
                        fake.send(mark + b"\0H %016x 0 0 0 0 n" % number)
                    fake.send(early + b"N")
                    fake.send(text_message("sent as any publisher can", "/numbers").encode())
                    wait_for(lambda: "sent as any publisher can" in data)
                    numbers = Numbers(good)
                    numbers.send(100)
                    wait_for(lambda: len(data) >= 101)
                    assert data == ["sent as any publisher can", *range(100)]
                    [catch_up] = sub._streams.values()
                    assert len(catch_up._sources) <= catch_up.SOURCES
                    assert len(catch_up._merge._lines) == 1
                    assert len(catch_up._merge._twins) <= catch_up._merge.KEPT
                    assert len(catch_up._requests) <= catch_up.SOURCES


class TestWhoComesAndGoes:
    def test_who_comes_while_the_last_message_is_sent(self):
        """Sending takes the news of the socket; it is not forgotten, although nothing follows."""
        with posttroll.Publisher("tcp://*:0") as pub:
            for _ in range(100):
                with posttroll.Subscriber([local_address(pub.port_number)]):
                    end = time.monotonic() + chance.uniform(0, 0.006)
                    while time.monotonic() < end:
                        pub.send(text_message("x"))
                    wait_for(lambda: pub._audience.peers)
                wait_for(lambda: not pub._audience.peers)


class TestNothingFallsBetween:
    """Restarts, ends, removals and moves, while messages lie unread and consumers are busy."""

    def test_a_nameserver_that_is_killed_under_load(self, impatient):
        """50 messages a second, by a service that listens and one that does not; the nameserver comes back empty."""
        with posttroll.Publish("numbers", nameservers=["localhost"], broadcast_interval=1) as pub:
            numbers = Numbers(pub)
            with contextlib.ExitStack() as stack:
                collected = []
                with nameserver_process("--no-multicast") as server:
                    for listen in (True, False):
                        following = posttroll.Subscribe("numbers", addr_listener=listen, timeout=DEADLINE)
                        collected.append(stack.enter_context(serving(stack.enter_context(following))))
                    assert pub.wait_for_subscribers(2, DEADLINE)
                    numbers.send(20, 0.02)
                    server.kill()
                    server.wait()
                for _ in range(3):
                    numbers.send(20, 0.02)
                    with nameserver_process("--no-multicast") as server:
                        numbers.send(75, 0.02)
                        server.kill()
                        server.wait()
                for data in collected:
                    await_count(data, numbers.count)
                    assert data == list(range(numbers.count))

    def test_unread_messages_of_a_publisher_that_has_ended(self, impatient):
        """It says goodbye; its consumer has 1,000 messages before it, and is in no hurry."""
        with nameserver(), posttroll.Subscribe("numbers", addr_listener=True, timeout=0) as sub:
            with python(NUMBERS_PROCESS, 0, "only") as running:
                with serving(sub) as data:
                    command_of(running, "await 1")
                assert data == []
                command_of(running, "send 1000")
                finish(running)
            wait_for(lambda: posttroll.get_pub_address("numbers", timeout=DEADLINE) == [])
            got = []
            for message in sub.recv(timeout=DEADLINE):
                assert message is not None, f"only {len(got)}"
                got.append(message.data[1])
                time.sleep(0.003)  # being busy
                if len(got) == 1000:
                    break
            assert got == list(range(1000))
            with serving(sub):
                wait_for(lambda: sub.addresses == [])

    def test_an_answer_from_before_a_goodbye_that_is_read_after_it(self, monkeypatch):
        """Who read nothing for a while finds both: it asks soon again, not after a minute."""
        monkeypatch.setattr(posttroll._Follower, "SELDOM", 0.2)
        take_news, news = posttroll._Follower._take_news, []

        def take_news_then_the_answer(self: Any, host: str, frames: list[bytes]) -> None:
            take_news(self, host, frames)
            entry = Message.decode(frames[0]).data
            news.append(entry)
            if not entry["status"]:
                self.add(host, entry, "numbers")
                self._run_in(self.RARELY)  # as it does while it knows of no doubt
                self._look_up(["numbers"])

        monkeypatch.setattr(posttroll._Follower, "_take_news", take_news_then_the_answer)
        with nameserver(), posttroll.Subscribe("numbers", addr_listener=True, timeout=0) as sub, serving(sub):
            with posttroll.Publish("numbers", nameservers=["localhost"], broadcast_interval=0.1) as pub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                wait_for(lambda: news)
            wait_for(lambda: sub.addresses == [])

    @pytest.mark.parametrize("addr_listener", [False, True])
    def test_without_the_news_of_publishers_lookups_find_them_soon(self, addr_listener, monkeypatch):
        """A firewall may let lookups through alone."""
        monkeypatch.setattr(posttroll._Follower, "SELDOM", 0.2)
        monkeypatch.setattr(posttroll._Follower, "SOON", 0.2)
        with nameserver(), config.set(address_publish_port=free_port()):
            with posttroll.Subscribe("numbers", addr_listener=addr_listener, timeout=0) as sub, serving(sub):
                for _ in range(2):
                    with posttroll.Publish("numbers", nameservers=["localhost"], broadcast_interval=0.1) as pub:
                        assert pub.wait_for_subscribers(1, DEADLINE)

    def test_a_publisher_that_is_lost_while_much_is_unread(self, impatient, monkeypatch):
        """Its address is kept until all is read: else what comes meanwhile would wait behind all of it."""
        monkeypatch.setattr(posttroll._Follower, "RARELY", 1)  # the news may be older than the connection for it
        with nameserver(), posttroll.Publish("numbers", nameservers=["localhost"]) as pub:
            with posttroll.Subscribe(["numbers", "lost"], addr_listener=True, timeout=0) as sub:
                messages = sub.recv(0.01)
                with posttroll.Publish("lost", nameservers=["localhost"], broadcast_interval=0.1) as lost:
                    wait_for(lambda: next(messages) is None and pub.subscriber_count and lost.subscriber_count)
                for number in range(1000):
                    pub.send(text_message(number))
                for number in range(200):  # in 2 s; it would be removed after 1.2 s
                    assert wait_for(lambda: next(messages)).data == number
                    time.sleep(0.01)
                assert len(sub.addresses) == 2
                assert len(sub._inbox._unread) == 0
                wait_for(lambda: next(messages) is None)
                wait_for(lambda: next(messages) is None and len(sub.addresses) == 1)

    def test_removing_an_address_with_unread_messages(self):
        with connected() as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
            sub.add(local_address(other.port_number))
            assert other.wait_for_subscribers(1, DEADLINE)
            for number in range(2000):
                pub.send(text_message(number))
            wait_for(lambda: posttroll._unsent_bytes(pub.port_number) in ([], None))
            sub.remove(local_address(pub.port_number))
            other.send(text_message("other"))
            data = received_data(sub, 2001)
            assert sorted(data, key=str) == sorted([*range(2000), "other"], key=str)
            assert [each for each in data if each != "other"] == list(range(2000))

    def test_the_last_publisher_goes_while_much_is_unread(self):
        """Its socket is closed; what it had sent, under the mark too, is handed out all the same."""
        with behind_relay() as (pub, relay, sub):
            numbers = Numbers(pub)
            numbers.send(10)
            assert received_data(sub, 10) == list(range(10))
            wait_for(lambda: next(sub.recv(0)) is None and not pub._audience.unserved())
            relay.cut()
            wait_for(lambda: pub.subscriber_count == 0)
            numbers.send(1000)
            relay.mend()
            wait_for(lambda: next(sub.recv(0.01)) is not None)
            numbers.send(1000)
            wait_for(lambda: not pub._audience.unserved())
            pub.stop()
            sub.remove(relay.address)
            assert sub.subscribers == []
            assert sorted(received_data(sub, 1999)) == list(range(11, 2010))
            for _ in range(10):
                sub.add("tcp://127.0.0.1:1")
                sub.remove("tcp://127.0.0.1:1")
            assert len(sub._streams) == 0

    def test_a_name_that_moves(self, monkeypatch):
        """First there is nobody at its address; later it leads to another one, and to a third."""
        port = free_port()
        where = ["127.0.0.9"]
        real = socket.getaddrinfo
        monkeypatch.setattr(posttroll._Resolution, "RETRY", 0.2)
        monkeypatch.setattr(posttroll._Link, "RENEWAL", 0.2)

        def moving(host, *args, **kwargs):
            return real(where[0] if host == "mover.example" else host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", moving)
        with posttroll.Subscriber([f"tcp://mover.example:{port}"]) as sub, serving(sub) as data:
            for number, address in enumerate(("127.0.0.2", "127.0.0.3", "127.0.0.4")):
                with posttroll.Publisher(f"tcp://{address}:{port}") as pub:
                    pub.send(text_message(["first", number]))
                    where[0] = address
                    assert pub.wait_for_subscribers(1, DEADLINE)
                    pub.send(text_message(["second", number]))
                    wait_for(lambda number=number: len(data) == 2 * number + 2)
            assert sorted(data) == [[word, number] for word in ("first", "second") for number in range(3)]

    @pytest.mark.parametrize("ahead", [1, 1000])
    def test_a_busy_consumer_connects_to_a_new_publisher_at_once(self, ahead, monkeypatch):
        """0.1 s for a message, and 400 of them before it, accepted already or not."""
        monkeypatch.setattr(posttroll._Inbox, "AHEAD", ahead)
        with nameserver(), posttroll.Publish("old", nameservers=["localhost"]) as old:
            services = ["old", "new"]
            with posttroll.Subscribe(services, addr_listener=True, timeout=0) as sub:
                next(sub.recv(0.1))
                assert old.wait_for_subscribers(1, DEADLINE) or next(sub.recv(1))
                for number in range(400):
                    old.send(text_message(number))
                handled, ended = [], threading.Event()

                def consume() -> None:
                    for message in sub.recv():
                        handled.append(message.data)
                        if ended.wait(0.1):
                            return

                with in_thread(consume):
                    wait_for(lambda: handled)
                    with posttroll.Publish("new", nameservers=["localhost"], broadcast_interval=0.1) as new:
                        assert new.wait_for_subscribers(1, DEADLINE)
                        assert len(handled) < 60
                        ended.set()

    def test_50_publishers_have_one_thread(self):
        before = threading.active_count()
        with contextlib.ExitStack() as stack:
            pubs = [
                stack.enter_context(posttroll.Publish(f"pub{n}", nameservers=["localhost"] if n % 2 else None))
                for n in range(50)
            ]
            for pub in pubs:
                pub.send(text_message("x"))
            assert threading.active_count() == before + 1

    def test_fork_while_publishers_run(self):
        """Threads send, subscribers come and go, and 20 children publish something of their own."""
        code = """
import os, sys, threading, time, posttroll
end = threading.Event()
def send(pub):
    while not end.wait(0.0005):
        pub.send(posttroll.Message("/numbers", "info", 1))
pubs = [posttroll.Publish("numbers", nameservers=["localhost"]).__enter__() for _ in range(5)]
threads = [threading.Thread(target=send, args=(pub,)) for pub in pubs]
[thread.start() for thread in threads]
for _ in range(20):
    with posttroll.Subscriber([f"tcp://127.0.0.1:{pub.port_number}" for pub in pubs]) as sub:
        next(sub.recv(0.05))
        pid = os.fork()
        if not pid:
            try:
                pubs[0].send("pytroll://a info me@h 2020-01-01T00:00:00 v1.01 text/ascii x")
            except RuntimeError:
                pass
            pubs[0].stop()
            own = posttroll.Publisher("tcp://*:0").start()
            mine = posttroll.Subscriber([f"tcp://127.0.0.1:{own.port_number}"])
            own.wait_for_subscribers(1, 10)
            own.send(posttroll.Message("/own", "info", "x"))
            os._exit(0 if next(mine.recv(10)).data == "x" else 1)
        assert os.waitpid(pid, 0)[1] == 0
end.set()
[thread.join() for thread in threads]
[pub.stop() for pub in pubs]
print("fine", flush=True)
"""
        with nameserver(), python(code) as running:
            status, out, err = finish(running, 60)
        assert (status, out) == (0, "fine\n"), err


class TestEndsOfPublishers:
    def test_forgotten_ones_end_in_the_background(self, monkeypatch):
        """Nothing waits where the last one lets go of it, with any lock; the next one gets its port."""
        port, before = free_port(), threading.active_count()
        is_free = threading.Event()
        drain = posttroll._Ending.drain
        monkeypatch.setattr(posttroll._Ending, "drain", lambda *args: is_free.wait(DEADLINE) and drain(*args))
        pub = posttroll.Publisher(f"tcp://127.0.0.1:{port}").start()
        pub.send(text_message("x"))
        with pub._lock, threading._active_limbo_lock:
            del pub
        wait_for(lambda: "posttroll end" in [thread.name for thread in threading.enumerate()])
        threading.Timer(0.05, is_free.set).start()
        posttroll.Publisher(f"tcp://127.0.0.1:{port}").start().stop()
        wait_for(lambda: threading.active_count() == before)
        assert not posttroll._forgotten

    def test_the_end_of_the_program_waits_for_a_thread_that_stops_it(self):
        code = """
import threading, time, posttroll
drain, stopping = posttroll._Ending.drain, threading.Event()
def drain_slowly(*args):
    stopping.set()
    time.sleep(0.5)
    drain(*args)
    print("drained")
posttroll._Ending.drain = drain_slowly
pub = posttroll.Publisher("tcp://127.0.0.1:0").start()
threading.Thread(target=pub.stop, daemon=True).start()
stopping.wait(20)
"""
        with python(code) as running:
            assert finish(running) == (0, "drained\n", "")

    def test_who_stops_it_too_waits_until_it_has_ended(self, monkeypatch):
        order, stopping, is_free = [], threading.Event(), threading.Event()

        def wait_and_drain(*args: Any) -> None:
            stopping.set()
            is_free.wait(DEADLINE)
            order.append("drained")
            drain(*args)

        drain = posttroll._Ending.drain
        monkeypatch.setattr(posttroll._Ending, "drain", wait_and_drain)
        pub = posttroll.Publisher("tcp://127.0.0.1:0").start()
        with in_thread(pub.stop):
            assert stopping.wait(DEADLINE)
            threading.Timer(0.05, is_free.set).start()
            pub.stop()
            order.append("stopped")
        assert order == ["drained", "stopped"]

    @pytest.mark.network
    def test_stop_on_a_slow_link(self, two_faulty_hosts):
        """8 Mbit/s: 3,000 messages of 1 kB, and an end: it waits as long as they drain."""
        two_faulty_hosts.plug_in()
        send = """
import sys, time, posttroll
pub = posttroll.Publisher("tcp://*:9000").start()
assert pub.wait_for_subscribers(1, 20)
for number in range(3000):
    pub.send(posttroll.Message("/a", "info", [number, "x" * 1000]))
pub.stop()
print("dropped", pub.dropped)
"""
        count = PRINT_MESSAGES.replace("message.data", "message.data[0]")
        rate = ["tbf", "rate", "8mbit", "burst", "16kb", "latency", "300ms"]
        name, link = two_faulty_hosts.names[1], two_faulty_hosts.links[1]
        subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", link, "root", *rate], check=True)
        with two_faulty_hosts.python(0, count, f"tcp://{two_faulty_hosts.ADDRESSES[1]}:9000") as sub:
            with two_faulty_hosts.python(1, send) as pub:
                got = [int(sub.stdout.readline().split()[1]) for _ in range(3000)]
                assert got == list(range(3000))
                assert finish(pub)[:2] == (0, "dropped 0\n")

    def test_stop_on_a_dead_link(self, monkeypatch, caplog):
        """Nothing goes on any more: it gives up after its time, counts and says so; for each of its subscribers."""
        monkeypatch.setattr(posttroll.Publisher, "LINGER_SECONDS", 1.0)
        with behind_relay() as (pub, relay, sub), posttroll.Subscriber([relay.address]) as other:
            assert pub.wait_for_subscribers(2, DEADLINE)
            for each in (sub, other):
                wait_for(lambda each=each: next(each.recv(0)) is None and not pub._audience.unserved())
            relay.silence()
            for number in range(2000):
                pub.send(text_message([number, "x" * 10_000]))
            with in_thread(pub.stop) as stopping:
                stopping.join(DEADLINE)
            assert 2000 < pub.dropped <= 4000
            assert sub.missed == 0
        [record] = [record for record in caplog.records if "did not reach a subscriber" in record.getMessage()]
        assert record.levelname == "WARNING"

    @pytest.mark.parametrize("is_dead", [True, False])
    def test_control_c_while_it_waits(self, is_dead, monkeypatch, caplog):
        """What is left then is counted, and told; nothing is, if all has been sent."""
        wait = posttroll._Ending._wait

        def interrupted_wait(self: Any) -> bool:
            while not is_dead and not (wait(self) and self._audience._are_told and not self._state()):
                pass
            raise KeyboardInterrupt

        monkeypatch.setattr(posttroll._Ending, "_wait", interrupted_wait)
        with behind_relay() as (pub, relay, sub):
            wait_for(lambda: next(sub.recv(0)) is None and not pub._audience.unserved())
            if is_dead:
                relay.silence()
            for number in range(1000 if is_dead else 1):
                pub.send(text_message([number, "x" * 10_000]))
            with pytest.raises(KeyboardInterrupt):
                pub.stop()
            assert pub.reached == 1
            assert (0 < pub.dropped <= 1000) if is_dead else pub.dropped == 0
        told = [record for record in caplog.records if "did not reach a subscriber" in record.getMessage()]
        assert [record.getMessage() for record in told] == [
            f"Publisher numbers: interrupted: {pub.dropped} messages did not reach a subscriber"
        ] * is_dead

    def test_a_subscriber_that_has_not_asked_until_the_end(self, caplog):
        """It came in the last moments of a publisher, and was busy: what it may have missed is counted and told."""
        with posttroll.Publisher("tcp://*:0", "numbers") as pub:
            Numbers(pub).send(5)
            with posttroll.Subscriber([local_address(pub.port_number)], since=60) as sub:
                assert pub.wait_for_subscribers(1, DEADLINE)
                pub.send(text_message("live"))
                pub.stop()
                assert pub.dropped == 5
                assert received_data(sub) == ["live"]
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "has asked for what it may have missed: 5 messages at most" in record.getMessage()


class TestAwaiting:
    def run(self, coroutine: Any) -> Any:
        return asyncio.run(asyncio.wait_for(coroutine, DEADLINE))

    def test_receive_after_break(self):
        async def check():
            with connected() as (pub, sub):
                for number in range(4):
                    pub.send(text_message(number))
                async for message in sub:
                    assert message.data == 0
                    break
                assert (await sub.receive(DEADLINE)).data == 1
                async for message in sub:
                    assert message.data == 2
                    break
                assert (await sub.receive()).data == 3
                assert await sub.receive(0.01) is None

        self.run(check())

    def test_two_who_receive_at_once(self):
        async def check():
            with connected() as (pub, sub):
                first, second = (asyncio.ensure_future(sub.receive(DEADLINE)) for _ in range(2))
                impatient = asyncio.ensure_future(sub.receive(0.02))
                assert await impatient is None
                pub.send(text_message("one"))
                pub.send(text_message("two"))
                assert sorted([(await first).data, (await second).data]) == ["one", "two"]

        self.run(check())

    def test_addresses_change_in_another_thread_meanwhile(self):
        async def check():
            with connected() as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
                address, ended = local_address(other.port_number), threading.Event()

                def change() -> None:
                    while not ended.wait(0.0005):
                        sub.add(address)
                        sub.remove(address)

                with in_thread(change):
                    try:
                        for number in range(500):
                            pub.send(text_message(number))
                            message = await sub.receive(DEADLINE)
                            assert message.data == number
                    finally:
                        ended.set()
                sub.add(address)
                receiving = asyncio.ensure_future(sub.receive(DEADLINE))
                while not other.subscriber_count:
                    await asyncio.sleep(0.01)
                other.send(text_message("other"))
                assert (await receiving).data == "other"

        self.run(check())

    def test_the_connection_changes_and_comes_again(self):
        """What comes over the new one waits for the old one, which brings nothing more."""

        async def check():
            with connected() as (pub, sub):
                ways = [f"tcp://127.0.0.{number}:{pub.port_number}" for number in (1, 2)]
                for number in range(10):
                    sub.add(ways[1 - number % 2])
                    sub.remove(ways[number % 2])
                    pub.send(text_message(number))
                    assert (await sub.receive(DEADLINE)).data == number

        self.run(check())

    def test_steady_load_starves_nobody(self):
        """One publisher without a pause; a second one, which is added meanwhile, is heard, and timers come."""

        async def check():
            with connected() as (pub, sub), posttroll.Publisher("tcp://*:0") as other:
                ended = threading.Event()

                def flood() -> None:
                    while not ended.is_set():
                        for _ in range(100):
                            pub.send(text_message("flood"))
                        time.sleep(0.0005)

                with in_thread(flood):
                    try:
                        assert (await sub.receive(DEADLINE)).data == "flood"
                        sub.add(local_address(other.port_number))
                        ticks = 0

                        async def tick():
                            nonlocal ticks
                            while True:
                                await asyncio.sleep(0.01)
                                ticks += 1

                        ticking = asyncio.ensure_future(tick())
                        has_sent = has_come = False
                        async for message in sub:
                            has_come = has_come or message.data == "other"
                            if has_come and ticks >= 5:
                                break
                            if not has_sent and other.subscriber_count:
                                other.send(text_message("other"))
                                has_sent = True
                        ticking.cancel()
                    finally:
                        ended.set()

        self.run(check())

    def test_a_loop_inside_a_loop(self):
        """A next() inside a for does not end the for; nor does an old iterator that is dropped."""
        with connected() as (pub, sub):
            for number in range(6):
                pub.send(text_message(number))
            got = []
            for message in sub.recv(DEADLINE):
                got.append(message.data)
                inner = next(sub.recv(0.2))
                got.append(inner.data)
                if len(got) == 6:
                    break
            assert got == list(range(6))
            old = sub.recv(0.01)
            assert next(old) is None
            with serving(sub) as data:
                del old
                pub.send(text_message("still"))
                wait_for(lambda: data == ["still"])


OUTAGE_PUBLISHER = """
import json, logging, os, select, signal, sys, posttroll
logging.basicConfig(format="%(levelname)s %(message)s")
address, name, life, padding, record = json.loads(sys.argv[1])
number = 0
with open(record, "a", buffering=1) as record, posttroll.Publisher(address, name) as publisher:
    print("started", flush=True)
    while True:
        is_told = bool(select.select([0], [], [], 0.1)[0])
        count = os.read(0, 100) if is_told else b"1"
        if not count:
            break  # the end of the input
        for _ in range(int(count)):
            print(name, life, number, file=record)
            publisher.send(posttroll.Message("/outage", "info", [name, life, number, "x" * padding]))
            number += 1
        if is_told:
            print("done", flush=True)
print("dropped", publisher.dropped, flush=True)
"""

OUTAGE_SUBSCRIBER = """
import json, logging, signal, sys, posttroll
logging.basicConfig(format="%(levelname)s %(message)s")
addresses, record = json.loads(sys.argv[1])
with open(record, "a", buffering=1) as record, posttroll.Subscriber(addresses, "/outage") as subscriber:
    signal.signal(signal.SIGTERM, lambda *args: subscriber.stop())
    print("started", flush=True)
    for message in subscriber.recv():
        print(*message.data[:3], file=record)
print("missed", subscriber.missed, flush=True)
"""


class Outage:
    """A plain publisher and one with CURVE on one host; on another one subscribers to the one, the other, and both."""

    PORTS = types.MappingProxyType({"plain": 9001, "secure": 9101})
    WISHES = (("plain",), ("secure",), ("plain", "secure"))

    def __init__(self, hosts: TwoHosts, keys: Keys, directory: Path, seconds: float, **environment: str) -> None:
        hosts.plug_in()
        hosts.ip("-n", hosts.names[1], "addr", "add", "10.203.77.3/32", "dev", hosts.links[1])
        self.hosts, self.keys, self.directory, self.seconds = hosts, keys, directory, seconds
        self.padding = int(environment.pop("padding", 0))
        self.environment = {
            **os.environ,
            "POSTTROLL_ZMTP_HEARTBEAT_INTERVAL": str(seconds / 20),
            "POSTTROLL_ZMTP_HEARTBEAT_TIMEOUT": str(seconds / 6),
            **environment,
        }
        self.killed: set[tuple[str, int]] = set()  # lives that ended so: their last messages are theirs to lose
        self.lives = dict.fromkeys(self.PORTS, -1)
        self.stack = contextlib.ExitStack()
        self.publishers: dict[str, Any] = {}
        self.subscribers: list[Any] = []

    def _start(self, host: int, code: str, backend: str, *settings: Any) -> Any:
        environment = {**self.environment, "POSTTROLL_BACKEND": backend}
        command = ["ip", "netns", "exec", self.hosts.names[host], sys.executable, "-u", "-c", code]
        log = self.stack.enter_context((self.directory / f"{settings[-1].stem}.log").open("a"))
        words = json.dumps([*settings[:-1], str(settings[-1])])
        running = self.stack.enter_context(process(*command, words, env=environment, stderr=log))
        await_line(running, "started")
        return running

    def publish(self, name: str, host: str = TwoHosts.ADDRESSES[1], port: int = 0) -> None:
        """Start the next life of a publisher."""
        self.lives[name] += 1
        backend = {"plain": "unsecure_zmq", "secure": "secure_zmq"}[name]
        address = f"tcp://{host}:{port or self.PORTS[name]}"
        record = self.directory / f"{name}.sent"
        self.publishers[name] = self._start(
            1, OUTAGE_PUBLISHER, backend, address, name, self.lives[name], self.padding, record
        )

    def kill(self, name: str) -> None:
        self.publishers[name].kill()
        self.publishers[name].wait()
        self.killed.add((name, self.lives[name]))

    def subscribe(self) -> None:
        for number, wishes in enumerate(self.WISHES):
            addresses = [
                {"URI": f"tcp://{host}:{port}", "backend": {"plain": "unsecure_zmq", "secure": "secure_zmq"}[name]}
                for name in wishes
                for host, port in (
                    (TwoHosts.ADDRESSES[1], self.PORTS[name]),
                    (TwoHosts.ADDRESSES[1], self.PORTS[name] + 1),
                    ("10.203.77.3", self.PORTS[name]),
                )
            ]
            backend = "unsecure_zmq" if "plain" in wishes else "secure_zmq"
            record = self.directory / f"{number}.got"
            self.subscribers.append(self._start(0, OUTAGE_SUBSCRIBER, backend, addresses, record))

    def read(self, file: str) -> list[tuple[str, int, int]]:
        """Return what a process has written down: name, life and number of messages."""
        lines = (self.directory / file).read_text().rpartition("\n")[0].splitlines()
        return [(name, int(life), int(number)) for name, life, number in map(str.split, lines)]

    def wanted(self, subscriber: int) -> set[tuple[str, int, int]]:
        return {message for name in self.WISHES[subscriber] for message in self.read(f"{name}.sent")}

    def missing(self, subscriber: int) -> set[tuple[str, int, int]]:
        """Return what has not come but what was the last of a publisher that was killed."""
        got = self.read(f"{subscriber}.got")
        newest = dict.fromkeys(self.killed, -1)
        for *life, number in got:
            if tuple(life) in newest:
                newest[tuple(life)] = max(number, newest[tuple(life)])
        return {
            (name, life, number)
            for name, life, number in self.wanted(subscriber) - set(got)
            if number < newest.get((name, life), float("inf"))
        }

    def reported(self, subscriber: int) -> int:
        """Return how many messages a subscriber says are gone."""
        return sum(map(int, REPORTED_LOSS.findall((self.directory / f"{subscriber}.log").read_text())))

    def has_connections(self) -> bool:
        """Whether a subscriber has a connection to a publisher, as far as its host knows."""
        rows = Path(f"/proc/{self.subscribers[0].pid}/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[3] == "01" for row in rows)

    def tell(self, count: str) -> None:
        """Have all publishers send so many messages at once."""
        for publisher in self.publishers.values():
            command_of(publisher, count)

    def hear_all(self) -> None:
        """Wait until all messages that have been sent until now have come, or are said to be gone."""
        for number in range(len(self.WISHES)):
            want = self.wanted(number)
            wait_for(
                lambda number=number, want=want: len(self.missing(number) & want) <= self.reported(number),
                self.seconds + DEADLINE,
                f"what subscriber {number} should have",
            )

    def finish(self) -> list[int]:
        """Let all end well, and judge what has come; return how many messages publishers counted as dropped."""
        dropped = []
        for publisher in self.publishers.values():
            status, out, _ = finish(publisher, self.seconds + DEADLINE)
            assert status == 0
            dropped.append(int(out.split()[-1]))
        self.hear_all()
        for number, subscriber in enumerate(self.subscribers):
            subscriber.terminate()
            status, out, _ = finish(subscriber)
            assert (status, out) == (0, f"missed {self.reported(number)}\n")
            got = self.read(f"{number}.got")
            assert max(collections.Counter(got).values()) == 1, "came twice"
            assert set(got) <= self.wanted(number)
            assert len(self.missing(number)) <= self.reported(number)
        for log in self.directory.glob("*.log"):
            assert "Traceback" not in log.read_text()
        return dropped


@pytest.mark.long
@pytest.mark.network
@pytest.mark.timeout(LONG + 300)
class TestOutages:
    """Every message exactly once, or counted and told, whatever has come between publishers and subscribers."""

    SECONDS = max(min(20, LONG / 20), 2)  # how long an outage lasts

    @pytest.fixture
    def world(self, two_faulty_hosts, keys, tmp_path):
        """Give what starts the world, with settings for all of its programs."""
        with contextlib.ExitStack() as stack:

            def start(seconds: float = self.SECONDS, **environment: str) -> Outage:
                outage = Outage(two_faulty_hosts, keys, tmp_path, seconds, **environment)
                stack.push(outage.stack)
                outage.subscribe()
                for name in Outage.PORTS:
                    outage.publish(name)
                outage.tell("20")
                outage.hear_all()
                return outage

            yield start

    @contextlib.contextmanager
    def cut(self, world: Outage) -> Iterator[None]:
        name, link = world.hosts.names[1], world.hosts.links[1]
        world.hosts.ip("-n", name, "link", "set", link, "down")
        yield
        world.hosts.ip("-n", name, "link", "set", link, "up")

    @pytest.mark.parametrize("seconds", [SECONDS, LONG / 2])
    def test_the_link_is_cut(self, world, seconds):
        running = world(seconds)
        with self.cut(running):
            time.sleep(running.seconds)  # the duration of the outage
        running.hear_all()
        running.finish()  # what is queued for a dead connection, which its publisher has not noticed, counts as dropped

    def test_the_link_is_cut_for_longer_than_the_history_reaches(self, world):
        running = world(POSTTROLL_HISTORY_MESSAGES="50")
        with self.cut(running):
            wait_for(lambda: not running.has_connections(), what="subscribers to notice that the link is dead")
            running.tell("400")
        running.hear_all()  # before publishers end: nobody can be told by one that is gone
        running.finish()
        for number, wishes in enumerate(Outage.WISHES):
            missing = running.missing(number)
            assert len(missing) > 300 * len(wishes)
            assert running.reported(number) <= len(missing) + 30 * len(wishes)  # what came just before may count, too

    def test_a_half_open_connection(self, world):
        """Packets vanish; meanwhile the publishers are killed, and have successors that know nothing of connections."""
        running = world()
        blackhole = ["blackhole", TwoHosts.ADDRESSES[0] + "/32"]
        running.hosts.ip("-n", running.hosts.names[1], "route", "add", *blackhole)
        for name in Outage.PORTS:
            running.kill(name)
            running.publish(name)
        time.sleep(running.seconds)  # the duration of the outage
        running.hosts.ip("-n", running.hosts.names[1], "route", "del", *blackhole)
        running.hear_all()
        assert running.finish() == [0, 0]

    @pytest.mark.parametrize("where", ["same port", "other port", "other address"])
    def test_a_publisher_is_killed_and_restarted(self, world, where):
        running = world()
        for name in Outage.PORTS:
            running.kill(name)
        time.sleep(running.seconds / 4)  # the duration of the outage
        for name, port in Outage.PORTS.items():
            host = "10.203.77.3" if where == "other address" else TwoHosts.ADDRESSES[1]
            running.publish(name, host, port + (where == "other port"))
        running.tell("100")
        running.hear_all()
        assert running.finish() == [0, 0]

    def test_the_host_of_the_subscribers_is_suspended(self, world):
        running = world()
        for subscriber in running.subscribers:
            subscriber.send_signal(signal.SIGSTOP)
        time.sleep(running.seconds)  # the duration of the outage
        for subscriber in running.subscribers:
            subscriber.send_signal(signal.SIGCONT)
        running.hear_all()
        assert running.finish() == [0, 0]

    def test_queues_are_full(self, world):
        small = {f"POSTTROLL_{side}_HIGH_WATER_MARK": "50" for side in ("SEND", "RECEIVE")}
        running = world(padding="20000", POSTTROLL_HISTORY_BYTES="100000000", **small)
        for subscriber in running.subscribers[1:]:
            subscriber.send_signal(signal.SIGSTOP)
        for _ in range(10):
            running.tell("100")
            time.sleep(running.seconds / 10)  # the duration of the outage
        for subscriber in running.subscribers[1:]:
            subscriber.send_signal(signal.SIGCONT)
        running.hear_all()
        assert all(running.finish())


# ======================================================================================================================
# Chaos: several hosts, everything that goes wrong at random, and not one message unaccounted for
#
# Every process of this world writes down what it sent or handed out, line by line.  Afterwards each message is looked
# for at each subscriber that wanted it.  POSTTROLL_CHAOS_SEED repeats the events of a run (not their exact timing).
# ======================================================================================================================

CHAOS_SEED = int(os.environ.get("POSTTROLL_CHAOS_SEED") or chance.randrange(10**6))
CAUGHT_UP = True  # what is demanded.  True: publishers have a history, and whoever was away gets what it missed
CONNECT = 15.0  # seconds in which a subscriber must hear a publisher, once nothing hinders it
NOTICED = 8.0  # seconds until both ends have noticed that a connection is dead (heartbeats: 1 s and 6 s)
LAG = 2.0  # seconds that a message may be under way where nothing is slow
BACKLOG = 30.0  # the same where something is
REPORTED_LOSS = re.compile(r"(\d+) messages of \S+ are gone")  # what a subscriber says of what it cannot get any more


class World(Crowd):
    """Four hosts at a switch; two nameservers, five publishers and eight subscribers on them."""

    HOSTS = types.MappingProxyType({letter: f"10.78.0.{n}" for n, letter in enumerate("abcd", 1)})

    def __init__(self, seed: int, directory: Path, stack: contextlib.ExitStack) -> None:
        self.chance = random.Random(seed)
        self.began = time.monotonic()
        self.events: list[str] = []
        self.hindrances: list[list[Any]] = []  # kind (cut, slow, nameserver), host, start, end
        self._pending: list[tuple[float, Callable[[], None]]] = []
        everybody, registering = ["p0", "p1", "p2", "p3", "mover"], {"nameservers": ["ns-a"]}
        nameservers = [
            Part("ns-a", "nameserver", "a", arguments=["--no-multicast"]),
            Part("ns-b", "nameserver", "b", arguments=[]),
        ]
        publishers = [
            Part("p0", "publisher", "a", 0.03, **registering),
            Part("p1", "publisher", "b", 0.05),
            Part("p2", "publisher", "c", 0.1, **registering),
            Part("p3", "publisher", "d", 0.05, environment={"POSTTROLL_SEND_HIGH_WATER_MARK": "100"}),
            Part("mover", "publisher", "c", 0.1, port=9104, **registering),
        ]
        following = {"nameserver": ["ns-a", "ns-b"], "addr_listener": True}
        by_name = {"nameserver": False, "addresses": ["tcp://mover:9104"]}
        throttled = {"POSTTROLL_RECEIVE_HIGH_WATER_MARK": "100"}
        subscribers = [
            Part("s0", "subscriber", "a", 0, everybody, services="", **following),
            Part("s1", "subscriber", "b", 0.004, everybody, services=everybody, **following),
            Part("s2", "subscriber", "c", 0, everybody, services="", **following),
            Part("s3", "subscriber", "d", 0, ["mover"], **by_name),
            Part("s4", "subscriber", "a", 0.005, everybody, services="", **following),
            Part("s5", "subscriber", "b", 0, ["p0", "p2"], services=["p0", "p2"], nameserver=["ns-a", "ns-b"]),
            Part("s6", "subscriber", "c", 0.02, ["p3"], throttled, services=["p3"], **following),
            Part("s7", "subscriber", "d", 0, ["mover"], services=["mover"], **following),
        ]  # fmt: skip
        super().__init__(directory, stack, nameservers, publishers, subscribers)
        self._build()

    # -- hosts, their names and links --

    def namespace(self, host: str) -> str:
        return f"posttroll-chaos-{os.getpid()}-{host}"

    def _build(self) -> None:
        for host in ("switch", *self.HOSTS):
            ip("netns", "add", self.namespace(host))
            self.stack.callback(ip, "netns", "del", self.namespace(host))
            ip("-n", self.namespace(host), "link", "set", "lo", "up")
        switch = self.namespace("switch")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge", "mcast_snooping", 0)
        ip("-n", switch, "link", "set", "bridge", "up")
        for host, address in self.HOSTS.items():
            name = self.namespace(host)
            ip("-n", switch, "link", "add", f"to-{host}", "type", "veth", "peer", "name", "cable", "netns", name)
            ip("-n", switch, "link", "set", f"to-{host}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "route", "add", "default", "dev", "cable")
            Path("/etc/netns", name).mkdir(parents=True)
            self.stack.callback(shutil.rmtree, Path("/etc/netns", name))
        self.write_host_names()

    def write_host_names(self) -> None:
        """Say to all hosts where the names lead; a file that is in use is written in place."""
        names = {part.name: self.HOSTS[part.host] for part in (*self.nameservers, self.publishers[-1])}
        text = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
        for host in self.HOSTS:
            Path("/etc/netns", self.namespace(host), "hosts").write_text(text)

    def hinder(self, kind: str, host: str) -> Callable[[], None]:
        """Note that something hinders messages of a host from now on; return what ends that."""
        hindrance = [kind, host, time.monotonic(), float("inf")]
        self.hindrances.append(hindrance)
        return lambda: hindrance.__setitem__(3, time.monotonic())

    # -- processes --

    def environment(self, part: Part) -> dict[str, str]:
        heartbeats = {"POSTTROLL_ZMTP_HEARTBEAT_INTERVAL": "1", "POSTTROLL_ZMTP_HEARTBEAT_TIMEOUT": "6"}
        here = {"POSTTROLL_MULTICAST_INTERFACE": self.HOSTS[part.host]}
        # Its hosts have all ports for themselves: few would often give a publisher that of one that has gone.
        shared = {key: value for key, value in super().environment(part).items() if "_PUB_M" not in key}
        return {**shared, **heartbeats, **here}

    def prefix(self, part: Part) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(part.host)]

    def end(self, part: Part, number: int, then: Callable[[], None] = lambda: None) -> None:
        """End a program by a signal, go on with *then* when it has ended."""
        deadline = time.monotonic() + 60  # a publisher waits until its queues are empty
        self.send_signal(part, number)

        def look() -> None:
            if self.has_ended(part.life):
                then()
            else:
                assert time.monotonic() < deadline, f"{part.life} does not end"
                self.later(0.02, look)

        look()

    # -- time --

    def note(self, text: str) -> None:
        self.events.append(f"{time.monotonic() - self.began:6.1f}  {text}")

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._pending.append((time.monotonic() + seconds, action))

    def run(self, seconds: float) -> None:
        """Let things happen for so many seconds, then let all be well again."""
        end = time.monotonic() + seconds
        following = 0.0
        while time.monotonic() < end or self._pending:
            now = time.monotonic()
            for moment, action in [pending for pending in self._pending if pending[0] <= now or now >= end]:
                self._pending.remove((moment, action))
                action()
            if following <= now < end:
                self.chance.choice(EVENTS)(self)
                following = now + self.chance.uniform(0.3, 2)
            time.sleep(0.02)


# -- what happens --


def restart(world: World, part: Part, seconds: float) -> None:
    """End a part, roughly or gently, and start it again after so many seconds."""
    number = world.chance.choice([signal.SIGKILL, signal.SIGTERM])
    if part.life.ending:
        return
    world.note(f"{part.life} on {part.host} gets {number.name}, and a successor after {seconds:.1f} s")
    back = world.hinder("nameserver", part.host) if part.kind == "nameserver" else None

    def start() -> None:
        world.start(part)
        if back:
            wait_for(lambda: "answers on port" in part.life.log.read_text(), what="a nameserver that comes back")
            back()

    world.end(part, number, lambda: world.later(seconds, start))


def restart_nameserver(world: World) -> None:
    restart(world, world.chance.choice(world.nameservers), world.chance.choice([0, world.chance.uniform(0, 8)]))


def restart_publisher(world: World) -> None:
    restart(world, world.chance.choice(world.publishers[1:]), world.chance.choice([0, world.chance.uniform(0, 3)]))


def restart_subscriber(world: World) -> None:
    restart(world, world.chance.choice(world.subscribers[2:]), world.chance.uniform(0, 5))


def move(world: World) -> None:
    """Let the publisher with a host name of its own go to another host, and its name with it."""
    mover = world.publishers[-1]
    if mover.life.ending:
        return

    def start() -> None:
        mover.host = "d" if mover.host == "c" else "c"
        world.write_host_names()
        world.start(mover)

    world.note(f"{mover.life} leaves {mover.host} for another host")
    world.end(mover, signal.SIGTERM, start)


def harm_link(world: World, kind: str, seconds: float, harm: Sequence[str], mend: Sequence[str]) -> None:
    host = world.chance.choice(list(world.HOSTS))
    if any(hindrance[1] == host and hindrance[3] == float("inf") for hindrance in world.hindrances):
        return
    world.note(f"the link of {host} is {kind} for {seconds:.1f} s")
    switch = world.namespace("switch")
    tool = "tc" if kind == "slow" else "ip"

    def change(words: Sequence[str]) -> None:
        subprocess.run([tool, "-n", switch, *(word.format(host) for word in words)], check=True)

    ended = world.hinder(kind, host)
    change(harm)

    def recover() -> None:
        change(mend)
        ended()

    world.later(seconds, recover)


def cut_link(world: World) -> None:
    seconds = world.chance.choice([world.chance.uniform(0.2, 3), world.chance.uniform(5, 12)])
    harm_link(world, "cut", seconds, ["link", "set", "to-{}", "down"], ["link", "set", "to-{}", "up"])


def slow_link(world: World) -> None:
    rate = ["tbf", "rate", "4mbit", "burst", "16kb", "latency", "300ms"]
    harm_link(
        world, "slow", world.chance.uniform(1, 6),
        ["qdisc", "add", "dev", "to-{}", "root", *rate], ["qdisc", "del", "dev", "to-{}", "root"],
    )  # fmt: skip


def tell(world: World, wish: str) -> None:
    life = world.chance.choice(world.publishers[:-1]).life  # a child would keep the port that the last one needs again
    if not life.ending:
        world.note(f"{life}: {wish}")
        life.tell(wish)


def fork(world: World) -> None:
    tell(world, "fork 1")


def burst(world: World) -> None:
    tell(world, f"burst {world.chance.choice([50, 200, 1000])}")


EVENTS = (
    restart_nameserver, restart_nameserver, restart_publisher, restart_publisher, restart_subscriber, move,
    cut_link, slow_link, fork, burst, burst,
)  # fmt: skip


# -- what must have happened --


class Oracle:
    """What may be missing of a publisher's life at a subscriber's life: the times in which it may have been sent."""

    def __init__(self, world: World, publisher: Life, subscriber: Life) -> None:
        self.publisher, self.subscriber = publisher, subscriber
        self._got = subscriber.got.get((publisher.part.name, publisher.number), [])
        self._arrived = [publisher.sent[number] for number in self._got if number in publisher.sent]
        apart = publisher.host != subscriber.host
        ends = {publisher.host, subscriber.host}
        between = [item for item in world.hindrances if item[0] in ("cut", "slow") and item[1] in ends and apart]
        self._cuts = [item[2:] for item in between if item[0] == "cut"]
        self._slow = [item[2:] for item in between if item[0] == "slow"]
        # Whoever looks for a publisher needs its nameserver, and the way there.
        nameservers = {part.host for part in world.nameservers}
        self._unfound = sorted(
            item[2:] for item in world.hindrances if item[0] != "slow" and item[1] in ends | nameservers
        )

    def connected(self, moment: float, patience: float = 0) -> float:
        """Return the time after which nothing may be missing, if they are not connected at *moment*.

        That is when something has arrived that was sent later (plus *patience*), or should have.
        """
        heard = min((sent for sent in self._arrived if sent > moment), default=float("inf"))
        for start, end in self._unfound:
            if start <= moment + CONNECT and end > moment:
                moment = end
        return min(heard + patience, moment + CONNECT)

    def under_way(self, moment: float, lag: float) -> float:
        """Return when the oldest message was sent that may have been under way at *moment*."""
        first = moment - lag
        for start, end in reversed(self._slow):
            if start < moment and end + BACKLOG / 3 > first:
                first = min(first, start - lag)
        return first

    def excuses(self) -> list[tuple[float, float]]:
        publisher, subscriber = self.publisher, self.subscriber
        throttled = BACKLOG if subscriber.part.environment else LAG
        begin = max(publisher.started, subscriber.started)
        known = publisher.started < subscriber.started or not CAUGHT_UP
        unfound = self.connected(begin)
        was_there_too_shortly = not self._got and publisher.ended < unfound
        end = min(subscriber.signalled, subscriber.ended)  # of taking messages; that it has ended is noticed later
        spans = [(float("-inf"), unfound)] if known or was_there_too_shortly else []
        for start, mended in self._cuts:  # nobody catches up once one of both has ended
            back = self.connected(mended, NOTICED)
            if not CAUGHT_UP or min(publisher.ended, end) < back:
                spans.append((self.under_way(start, throttled), back))
        if publisher.ending == signal.SIGKILL:
            spans.append((self.under_way(publisher.signalled, throttled), publisher.ended))
        if subscriber.ended < float("inf"):
            spans.append((self.under_way(end, BACKLOG if subscriber.part.pace else LAG), float("inf")))
            if subscriber.part.pace and (publisher.part.name, publisher.number) in subscriber.newest:
                spans.append((self._arrived[-1], float("inf")))  # it was in the midst of them, which come in order
        return spans

    def judge(self) -> tuple[list[str], list[int]]:
        """Return what is wrong whatever happened, and the numbers that are missing without an excuse."""
        sent = self.publisher.sent
        got = self._got
        pair = f"{self.publisher} to {self.subscriber}"
        faults = []
        if len(set(got)) < len(got):
            faults.append(f"{pair}: {len(got) - len(set(got))} came twice")
        if not CAUGHT_UP and sorted(got) != got:
            faults.append(f"{pair}: came in another order")
        if not sent.keys() >= set(got):
            faults.append(f"{pair}: came, but was not sent: {sorted(set(got) - sent.keys())}")
        spans = self.excuses()
        missing = [number for number, moment in sent.items() if not any(a <= moment <= b for a, b in spans)]
        return faults, sorted(set(missing) - set(got))


def runs(world: World, publisher: Life, numbers: list[int]) -> str:
    """Return which numbers these are, and when they were sent: ``5 to 9 (12.1 to 12.3 s), ...``."""
    begins = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    at = {number: publisher.sent[number] - world.began for number in begins + ends}
    return ", ".join(f"{a} to {b} ({at[a]:.1f} to {at[b]:.1f} s)" for a, b in zip(begins, ends))


def judge(world: World) -> tuple[list[str], str]:
    """Return which messages nobody accounts for, and a line of numbers about it all."""
    subscribers = [life.read() for part in world.subscribers for life in part.lives]
    publishers = [life.read() for part in world.publishers for life in part.lives]
    reported = {life: sum(map(int, REPORTED_LOSS.findall(life.log.read_text()))) for life in subscribers}
    faults = []
    for publisher in publishers:
        lost, text = 0, []
        for subscriber in subscribers:
            if publisher.part.name in subscriber.part.wants and subscriber.ended > publisher.started:
                wrong, missing = Oracle(world, publisher, subscriber).judge()
                faults += wrong
                known = min(len(missing), reported[subscriber])
                reported[subscriber] -= known
                lost += len(missing) - known
                if missing:
                    text.append(f"{publisher} to {subscriber}: {len(missing)} lost: {runs(world, publisher, missing)}")
        warned = "WARNING" in publisher.log.read_text()
        if lost > publisher.dropped or (publisher.dropped and not warned):
            faults += [*text, f"{publisher} counted {publisher.dropped} as dropped, and warned of it: {warned}"]
        if any(status != "0" for status in publisher.children):
            faults.append(f"{publisher}: its forked children ended with {publisher.children}")
    sent, dropped = sum(len(life.sent) for life in publishers), sum(life.dropped for life in publishers)
    delivered = sum(len(numbers) for life in subscribers for numbers in life.got.values())
    return faults, f"{sent} messages sent, {delivered} deliveries, {dropped} dropped"


def uses_no_more(life: Life, before: dict[str, float]) -> bool:
    """Whether it does; one that is slow had a long queue once, whose memory may not have been given back."""
    now = life.resources()
    megabytes = 60 if life.part.kind == "subscriber" and life.part.pace else 15
    return all(now[key] <= before[key] + more for key, more in (("threads", 0), ("files", 4), ("MB", megabytes)))


@pytest.mark.long
@pytest.mark.network
@pytest.mark.timeout(LONG + 600)
class TestChaos:
    @pytest.fixture
    def world(self, tmp_path):
        with contextlib.ExitStack() as stack:
            try:
                yield World(CHAOS_SEED, tmp_path, stack)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"It may not make networks: {getattr(error, 'stderr', error)}")

    def test_no_message_is_unaccounted_for(self, world, capsys):
        world.start_all()
        hear_each_other(world, "at the start")
        uses = {part.life: part.life.resources() for part in world.parts}
        world.run(LONG)
        world.note("all is well again")
        faults = []
        try:
            hear_each_other(world, "at the end", 120)  # slow ones have much before them
            for life, before in uses.items():
                if not life.ending:
                    with contextlib.suppress(pytest.fail.Exception):
                        wait_for(partial(uses_no_more, life, before))
                    if not uses_no_more(life, before):
                        faults.append(f"{life} uses {life.resources()}, before {before}")
        except pytest.fail.Exception as error:
            faults.append(str(error))
        for part in world.publishers:
            world.end(part, signal.SIGTERM)
        world.run(0)
        read_to_the_end(world, is_behind=True)
        unaccounted, numbers = judge(world)
        for part in world.subscribers + world.nameservers:
            world.end(part, signal.SIGTERM)
        world.run(0)
        faults += unaccounted + bad_ends(world)
        summary = f"chaos: seed {CHAOS_SEED}, {len(world.events)} events in {LONG:.0f} s, {numbers}"
        with capsys.disabled():
            print(f"\n{summary}")
        assert not faults, "\n".join([summary, *faults, "Events:", *world.events])
