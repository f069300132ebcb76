# SPDX-License-Identifier: Apache-2.0
"""Tests of posttroll.py and posttroll_ns.py, in the order of their sections: real sockets, real processes.

Each test has ports and a multicast group of its own, on the loopback interface, and must leave nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import zmq

import posttroll
import posttroll_ns
from posttroll import config

HERE = Path(posttroll.__file__).resolve().parent
LIBRARY = HERE / "posttroll.py"
NAMESERVER = HERE / "posttroll_ns.py"
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


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a port that is free for TCP and UDP."""
    while True:
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("", 0))
            try:
                udp.bind(("", tcp.getsockname()[1]))
            except OSError:
                continue
            return tcp.getsockname()[1]


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give each test settings of its own (subprocesses inherit them), and look for what it leaves behind."""
    for name in [name for name in os.environ if name.startswith(("POSTTROLL_", "PYTROLL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NAMESERVER_PORT", raising=False)
    settings = {
        "ROOT_CONFIG": str(tmp_path / "etc"),
        "CONFIG": str(tmp_path / "config"),
        "NAMESERVER_PORT": str(free_port()),
        "ADDRESS_PUBLISH_PORT": str(free_port()),
        "BROADCAST_PORT": str(free_port()),
        "MC_GROUP": f"239.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}",
        "MULTICAST_INTERFACE": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv("POSTTROLL_" + name, value)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    config.refresh()
    threads = set(threading.enumerate())
    yield
    config.refresh()
    posttroll._lookup_sockets.clear()
    left = lambda: [thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()]  # noqa: E731
    wait_for(lambda: not left(), 5, f"the end of {left()}")
    assert [sock for sock in posttroll.get_context()._sockets if not sock.closed] == []
    posttroll.destroy_context(0)


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
    thread = threading.Thread(target=server.run, kwargs={"when_ready": ready.set})
    thread.start()
    try:
        assert ready.wait(DEADLINE)
        yield server
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


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

import copy
import datetime as dt
import io
import json
import pickle
import pickletools
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttroll import ConfigurationError
from posttroll.message import Message, MessageError


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
        config.refresh()
        config.update_defaults({"chain": {"a": "default", "d": "default"}})
        monkeypatch.setenv("POSTTROLL_CHAIN__B", "environment")
        monkeypatch.setenv("POSTTROLL_CHAIN__C", "environment")
        config.set(chain__c="code")
        expected = {"a": "file", "b": "environment", "c": "code", "d": "default"}
        assert config.get("chain") == expected
        assert {key: config.get(f"chain.{key}") for key in "abcd"} == expected

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
        config.update_defaults({"own": 1, "sub": {"a": 1}})
        config.set(own=2, sub__b=2)
        assert config["own"] == 2
        assert config["sub"] == {"a": 1, "b": 2}
        config.refresh()
        assert config["own"] == 1

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
    """JSON always, TOML from Python 3.11 on, YAML if PyYAML is there; what cannot be used is a warning."""

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
    def test_toml_without_a_reader_is_a_warning(self, tmp_path):
        path = write(tmp_path / "config", "a.toml", "mc_ttl = 3\n")
        config.refresh()
        with pytest.warns(RuntimeWarning, match=rf"{path} is not used: TOML needs Python 3.11"):
            assert config["mc_ttl"] == 31

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

    def test_yaml_without_a_reader_is_a_warning(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        path = write(tmp_path / "config", "a.yaml", "mc_ttl: 3\n")
        config.refresh()
        with pytest.warns(RuntimeWarning, match=rf"{path} is not used: YAML needs PyYAML"):
            assert config["mc_ttl"] == 31

    @pytest.mark.parametrize(
        "content", [b"{", b"[1, 2]", b"3", b"\xff\xfe", b"[" * 100_000, b'"text"'], ids=lambda content: repr(content[:9])
    )
    def test_a_broken_file_is_a_warning_and_the_others_are_used(self, tmp_path, content):
        write(tmp_path / "config", "a.json", '{"own": 1}')
        broken = write(tmp_path / "config", "b.json", "")
        broken.write_bytes(content)
        config.refresh()
        with pytest.warns(RuntimeWarning, match=rf"Configuration file {broken} is not used: ."):
            assert config["own"] == 1
        assert config["own"] == 1  # said once, not at each look-up

    def test_an_empty_file_of_nothing_is_fine(self, tmp_path):
        write(tmp_path / "config", "a.json", "null")
        config.refresh()
        assert config["mc_ttl"] == 31

    def test_other_files_are_left_alone(self, tmp_path):
        write(tmp_path / "config", "notes.txt", "{")
        write(tmp_path / "config", "old.json.bak", "{")
        config.refresh()
        assert config["mc_ttl"] == 31

    def test_a_broken_file_does_not_stop_a_program(self, tmp_path):
        """Not at import, nor later; the warning names the file."""
        broken = write(tmp_path / "config", "b.json", "{")
        code = "import posttroll; print(posttroll.config['mc_ttl'])"
        with python(code) as running:
            status, out, err = finish(running)
        assert (status, out) == (0, "31\n")
        assert str(broken) in err

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
            ("nameserver_port", 70000, "a port from 1 to 65535"),
            ("broadcast_port", 0, "a port from 1 to 65535"),
            ("address_publish_port", None, "a whole number"),
            ("pub_min_port", [], "a whole number"),
            ("pub_max_port", float("inf"), "a whole number"),
            ("tcp_keepalive", "yes", "a whole number"),
            ("mc_ttl", {}, "a whole number"),
            ("mc_group", 4, "a text"),
            ("mc_group", None, "a text"),
            ("multicast_interface", 1, "a text"),
            ("message_version", "v7", "one of v1.2, v1.01, auto"),
            ("message_version", [], "one of v1.2, v1.01, auto"),
            ("zmtp_heartbeat_interval", -1, "a number of seconds that is not negative"),
            ("zmtp_heartbeat_interval", float("nan"), "a number of seconds that is not negative"),
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
        with (
            pytest.warns(PendingDeprecationWarning),
            pytest.raises(ConfigurationError, match=r"mc_ttl is 'abc' \(from \$PYTROLL_MC_TTL\)"),
        ):
            config.get("mc_ttl")

    def test_an_unknown_backend_is_not_implemented(self):
        with config.set(backend="carrier_pigeon"), pytest.raises(NotImplementedError, match="carrier_pigeon"):
            config.get("backend")

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
