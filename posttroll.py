# SPDX-License-Identifier: Apache-2.0
"""Messages between programs over ZeroMQ publish/subscribe: the posttroll system in one file.

A *publisher* sends short messages ("file X has arrived") on a port.  A *nameserver* on each host
(``posttroll_ns.py``, beside this file) learns who publishes what.  A *subscriber* asks the nameserver where its
publishers are and connects to them directly; there is no broker in between::

    with Publish("my_service") as publisher:
        publisher.send(Message("/counter", "info", {"value": 1}))

    with Subscribe("my_service", "/counter") as subscriber:
        for message in subscriber.recv():
            print(message.data)

The file is read from top to bottom, each section uses only what stands above it:

 1. configuration             ``config``
 2. messages                  ``Message``, ``MessageError``
 3. the loop                  ``Loop``, ``call_on_signals``
 4. multicast sockets         ``MulticastSender``, ``MulticastReceiver``
 5. ZeroMQ sockets            ``get_context``; addresses and host names
 6. keys and access           CURVE, access control; binding and connecting
 7. asking the nameserver     ``get_pub_address``
 8. announcing an address     ``AddressServiceBroadcaster``
 9. publishing                ``Publisher``, ``NoisyPublisher``, ``Publish``; their history; ``Inquiry``
10. connections               which addresses, alive or not; what has come, and what was handled
11. subscribing               ``Subscriber``, ``NSSubscriber``, ``Subscribe``; ``unique``
12. listening                 ``Listener``, ``ListenerContainer``
13. logging over messages     ``PytrollHandler``, ``Logger``
14. testing helpers           ``patched_publisher``, ``patched_subscriber_recv``
15. command line              ``main``
16. documented import paths   ``posttroll.publisher``, ``posttroll.ns``, ...

Copy it into any package; the only dependency is pyzmq.
"""

from __future__ import annotations

import ast
import atexit
import errno
import importlib
import io
import json
import logging
import math
import operator
import os
import random
import re
import socket
import string
import struct
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref
from bisect import bisect_left, insort_left
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import copy
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from functools import cache, lru_cache, partial
from itertools import accumulate, chain, count, islice, takewhile
from typing import TYPE_CHECKING, Any, AnyStr, Callable, NoReturn, TypeVar, Union, cast

import zmq

# What brings along much (OpenSSL, three kinds of compression), and few programs need, is imported where it is used:
# argparse, asyncio, base64, fcntl, glob, hashlib, ipaddress, pwd, queue, shutil, signal, subprocess, z85.
if TYPE_CHECKING:
    import argparse
    import subprocess

__version__ = "2.0.0"


# ======================================================================================================================
# 1. Configuration
#
# Four layers, the first that has the key wins: what was set in code, the environment, files, defaults.
# ======================================================================================================================


class ConfigurationError(ValueError):
    """A setting is missing, or its value (or the file that it names) cannot be used."""


class Option:
    """A row of the table of options: what a key means and what it may hold."""

    def __init__(self, default: Any, kind: str, meaning: str, old_name: str | None = None) -> None:
        self.default = default
        # "number" (of seconds), "str", "path", "list", "hosts", whole numbers as "LOW..HIGH", or choices as "a|b|c".
        self.kind = kind
        self.meaning = meaning
        self.old_name = old_name  # the environment variable of before POSTTROLL_*


_PORT = "1..65535"
_COUNT = f"0..{2**31 - 1}"  # what ZeroMQ can take
_BYTES = f"0..{2**63 - 1}"

OPTIONS: dict[str, Option] = {
    "backend": Option("unsecure_zmq", "unsecure_zmq|secure_zmq", "plain ZeroMQ, or CURVE on every connection"),
    "message_version": Option("v1.2", "v1.2|v1.01|auto", "format of new messages; v1.01 drops time zones"),
    "nameserver": Option(None, "hosts", "nameservers to ask in place of the default localhost; none for nobody"),
    "nameservers": Option(None, "hosts", "nameservers to register with in place of multicast; none for nowhere"),
    "announced_address": Option(None, "str", "host or host:port that publishers announce in place of this host's own"),
    "nameserver_port": Option(5557, _PORT, "where the nameserver answers lookups", "NAMESERVER_PORT"),
    "secure_zmq_nameserver_port": Option(None, _PORT, "lookups with CURVE (nameserver: 5558 if unset)"),
    "address_publish_port": Option(16543, _PORT, "where the nameserver publishes new and lost addresses"),
    "broadcast_port": Option(21200, _PORT, "announcements: UDP multicast, or TCP to listed nameservers"),
    "mc_group": Option("225.0.0.212", "str", "multicast group of the announcements", "PYTROLL_MC_GROUP"),
    "multicast_interface": Option(None, "str", "address or name of the interface for multicast"),
    "mc_ttl": Option(31, _COUNT, "how many routers an announcement may pass", "PYTROLL_MC_TTL"),
    "pub_min_port": Option(49152, _PORT, "lowest port that a publisher picks"),
    "pub_max_port": Option(65536, "2..65536", "end of the range that a publisher picks from (not included)"),
    "tcp_keepalive": Option(None, "-1..1", "ZMQ_TCP_KEEPALIVE: 1 on, 0 off, -1 the system's choice"),
    "tcp_keepalive_cnt": Option(None, "-1..127", "ZMQ_TCP_KEEPALIVE_CNT: lost probes until the end"),
    "tcp_keepalive_idle": Option(None, "-1..32767", "ZMQ_TCP_KEEPALIVE_IDLE: seconds of silence until a probe"),
    "tcp_keepalive_intvl": Option(None, "-1..32767", "ZMQ_TCP_KEEPALIVE_INTVL: seconds between probes"),
    "zmtp_heartbeat_interval": Option(10, "number", "seconds of silence until a sign of life is asked for; 0 never"),
    "zmtp_heartbeat_timeout": Option(30, "number", "seconds without a sign of life until a connection is given up"),
    "send_high_water_mark": Option(200000, _COUNT, "messages queued for a slow subscriber before they are dropped"),
    "send_high_water_bytes": Option(None, _BYTES, "bytes that they may take, roughly (an eighth of the usable memory)"),
    "receive_high_water_mark": Option(
        None, _COUNT, "messages in a busy subscriber, for each publisher (200000, fewer below 2 GiB); 0 no limit"
    ),
    "history_messages": Option(5000, _COUNT, "messages that a publisher keeps for subscribers that were away; 0 none"),
    "history_bytes": Option(4194304, _BYTES, "bytes that they may take"),
    "history_seconds": Option(600, "number", "how old they may be"),
    "durable_directory": Option(
        None, "path", "the state of durable subscribers (default: posttroll in $XDG_STATE_HOME or ~/.local/state)"
    ),
    "heartbeat_interval": Option(0, "number", "seconds between heartbeats that publishers send by themselves; 0 none"),
    "discovery_seconds": Option(1.5, "number", "how old a publisher is at least when it stops, to be found before"),
    "max_services": Option(20000, _COUNT, "publishers that the nameserver keeps at most"),
    "client_secret_key_file": Option(None, "path", "CURVE: this host's secret key when it connects"),
    "server_public_key_file": Option(None, "path", "CURVE: the public key that servers prove to have"),
    "server_secret_key_file": Option(None, "path", "CURVE: the secret key of publishers and nameserver"),
    "clients_public_keys_directory": Option(None, "path", "CURVE: the public keys that may connect"),
    "authorized_client_addresses": Option(None, "list", "names, addresses, networks that may connect"),
}

_UNSET: Any = object()


@contextmanager
def on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Call *undo* if what follows does not end well, for whatever reason: Control-C is one, too."""
    try:
        yield
    except BaseException:
        undo()
        raise


_Callback = TypeVar("_Callback", bound=Callable[[], object])


def in_forked_child(function: _Callback) -> _Callback:
    """Have the decorated function called in every forked child, where threads of the parent are gone for good."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


@cache
def _log(path: str) -> logging.Logger:
    """Return the logger of a documented import path, such as ``publisher`` for ``posttroll.publisher``.

    It is remembered: to ask for it takes a lock, which whoever sets up logging holds as it closes a `PytrollHandler`.
    """
    return logging.getLogger(f"{__name__}.{path}")


def _nested_get(tree: Mapping[str, Any], parts: Sequence[str]) -> Any:
    """Return what *tree* holds at the path *parts*, ``_UNSET`` if nothing."""
    node: Any = tree
    for part in parts:
        if not isinstance(node, Mapping) or part not in node:
            return _UNSET
        node = node[part]
    return node


def _merged(base: Any, top: Any) -> Any:
    """Merge two values of a configuration: mappings key by key, of anything else *top* wins."""
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return _normalised(top)
    merged = dict(base)
    for key, value in _normalised(top).items():
        merged[key] = _merged(merged[key], value) if key in merged else value
    return merged


def _assigned(tree: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of *tree* that holds *value* at *path*, in place of what was there."""
    if not path:
        return _normalised(value)
    copy = dict(tree) if isinstance(tree, Mapping) else {}
    copy[path[0]] = _assigned(copy.get(path[0]), path[1:], value)
    return copy


def _normalised(value: Any) -> Any:
    """Copy *value* with its keys in the canonical form: lower case words joined by ``_``."""
    if isinstance(value, Mapping):
        return {str(key).replace("-", "_"): _normalised(item) for key, item in value.items()}
    return value


def _as_kind(value: Any, kind: str) -> Any:
    """Return *value* as an option of *kind*; raises ValueError with what was expected."""
    if "|" in kind:
        if value not in kind.split("|"):
            raise ValueError(f"one of {', '.join(kind.split('|'))}")
    elif kind == "number" or ".." in kind:
        convert, what, limits = (float, "a number", "0..1000000") if kind == "number" else (int, "a whole number", kind)
        low, high = map(int, limits.split(".."))
        try:
            number = convert(value)
            if number != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(what) from None
        if not low <= number <= high:
            raise ValueError(f"{what} from {low} to {high}")
        return number
    elif kind == "hosts" and (value is False or str(value).strip().lower() in ("none", "false", "")):
        return []
    elif kind in ("list", "hosts"):
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(items, (list, tuple, set)) or not all(isinstance(item, str) for item in items):
            raise ValueError("a list of strings")
        return list(items)
    elif not isinstance(value, (str, os.PathLike)):
        raise ValueError("a text")
    else:
        return os.fspath(value)
    return value


class Config:
    """Settings from code, the environment, files and defaults, as in donfig (https://donfig.readthedocs.io).

    A key is a name such as ``nameserver_port``; ``-`` and ``_`` are alike, and ``"a.b"`` (in keyword arguments and
    the environment ``a__b``) is key ``b`` in the mapping ``a``.  The environment variable of a key is
    ``POSTTROLL_<KEY>``; its value is read as a Python literal if it is one, and it is read when the key is asked for.

    Files are read once, when the first key is asked for.  If one of them cannot be used, every use of any key raises
    `ConfigurationError` until `refresh` has read them again: what they might say must not be taken for not said.
    """

    def __init__(self, name: str = "posttroll", options: Mapping[str, Option] = OPTIONS) -> None:
        self.name = name
        self._options = options
        self._prefix = name.upper() + "_"
        self._lock = threading.RLock()
        self._changes: list[_Change] = []  # of code, the oldest first
        self._assigned: dict[str, Any] = {}  # what they make together
        self._defaults: dict[str, Any] = {key: option.default for key, option in options.items()}
        self._file_layers: list[tuple[str, dict[str, Any]]] | None = None
        self._file_error = ""
        self._cache: dict[str, tuple[Any, Any, Any, Any]] = {}  # what was found, as long as the environment is the same

    # -- reading --

    def get(self, key: str, default: Any = _UNSET, override_with: Any = None) -> Any:
        """Return the value of *key*.

        Args:
            key: The name of the setting, for example ``"nameserver_port"`` or ``"a.b"``.
            default: What to return if no layer has the key.
            override_with: Returned instead, unless it is None.

        Raises:
            KeyError: No layer has the key, and there is no *default*.
            ConfigurationError: The value is of the wrong type; the error names the key, the value and its source.  Or a
                configuration file cannot be used; the error names the file and the reason.
        """
        if override_with is not None:
            return override_with
        cached = self._cache.get(key)
        if cached is not None:
            variable, text, old_variable, value = cached
            environment = _raw_environment()
            is_current = environment.get(variable) == text and old_variable not in environment
            if is_current and (value is not None or default is _UNSET):
                return value
        value, source = self.lookup(key)
        if value is None and default is not _UNSET and source == "default":  # the None of the table of options
            return default
        if value is not _UNSET:
            return value
        if default is not _UNSET:
            return default
        raise KeyError(f"{key!r} is not in the {self.name} configuration")

    def lookup(self, key: str, check: bool = True) -> tuple[Any, str]:
        """Return the value of *key* and where it came from: ``code``, a variable, a file, or ``default``.

        Args:
            key: The name of the setting.
            check: Whether a value of the wrong type is an error; else it is returned as it is.

        Raises:
            ConfigurationError: The value is of the wrong type, or a configuration file cannot be used.
        """
        key = key.replace("-", "_")
        option = self._options.get(key)
        variable = self._prefix + key.upper().replace(".", "__")
        cache = self._cache  # before anything is read: if something changes meanwhile, this one is not in use any more
        raw_variable = _raw_variable(variable)
        raw_text = _raw_environment().get(raw_variable)
        value, source = self._find(key, variable, os.environ.get(variable), option)
        if option is None or not check:
            return value, source
        if value is not None or option.default is not None:
            try:
                value = _as_kind(value, option.kind)
            except ValueError as expected:
                raise _wrong_value(self.name, key, value, source, option, str(expected)) from None
        old_variable = _raw_variable(option.old_name or "")  # there is never one without a name
        cache[key] = (raw_variable, raw_text, old_variable, value)
        return value, source

    def _find(self, key: str, variable: str, text: str | None, option: Option | None) -> tuple[Any, str]:
        """Return the unchecked value of *key* from the first layer that has it."""
        files = self._files()
        parts = key.split(".")
        value = _nested_get(self._assigned, parts)
        if value is not _UNSET and not isinstance(value, Mapping):
            return value, "code"
        if text is not None:
            return parse_literal(text), f"${variable}"
        if option is not None and option.old_name is not None:
            old_text = os.environ.get(option.old_name)
            if old_text is not None:
                warnings.warn(f"${option.old_name} is deprecated, use ${variable}.", PendingDeprecationWarning, 4)
                return parse_literal(old_text), f"${option.old_name}"
        found: Any = _UNSET
        source = "default"
        layers = [("default", self._defaults), *files]
        if option is None:  # an option is no mapping, of which variables could set a part
            layers.append(("environment", self._environment(variable)))
        for origin, layer in layers:
            candidate = _nested_get(layer, parts)
            if candidate is not _UNSET:
                found, source = (_merged(found, candidate) if found is not _UNSET else candidate), origin
        if value is not _UNSET:
            found, source = (_merged(found, value) if found is not _UNSET else value), "code"
        return found, source

    def _environment(self, prefix: str) -> dict[str, Any]:
        """Return the variables below *prefix*, ``PREFIX__KEY``, as a nested mapping."""
        tree: dict[str, Any] = {}
        for name, text in list(os.environ.items()):
            if name.startswith(prefix + "__"):
                node = tree
                *path, last = name[len(self._prefix) :].lower().split("__")
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = parse_literal(text)
        return tree

    def __getitem__(self, key: str) -> Any:
        return self.get(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.lookup(key, check=False)[0] not in (_UNSET, None)

    def to_dict(self) -> dict[str, Any]:
        """Return all keys with the values in force; raises ConfigurationError if a file cannot be used."""
        keys = set(self._defaults) | set(self._assigned)
        for _, layer in self._files():
            keys |= set(layer)
        for name in list(os.environ):
            if name.startswith(self._prefix):
                keys.add(name[len(self._prefix) :].lower().split("__")[0])
        keys -= {"config", "root_config"}
        return {key: self.lookup(key, check=False)[0] for key in sorted(keys)}

    def pprint(self, **kwargs: Any) -> None:
        """Print all keys and values, with the arguments of `pprint.pprint`."""
        from pprint import pprint

        pprint(self.to_dict(), **kwargs)

    # -- changing --

    def set(self, mapping: Mapping[str, Any] | None = None, **kwargs: Any) -> _Assignment:
        """Set values from code; used as a context manager, it takes them back at the end.

        Then its keys have the values of before; but what somebody else has set meanwhile stays.

        Args:
            mapping: Keys and values, ``{"a.b": 1}`` or ``{"a": {"b": 1}}``.
            **kwargs: The same, with ``__`` for a dot: ``a__b=1``.
        """
        values = {**(mapping or {}), **{key.replace("__", "."): value for key, value in kwargs.items()}}
        assignment = _Assignment(self)
        paths = {tuple(key.replace("-", "_").split(".")): _normalised(value) for key, value in values.items()}
        with self._lock:
            self._change(_without_hidden(self._changes) + [(weakref.ref(assignment), *item) for item in paths.items()])
        return assignment

    def _change(self, changes: list[_Change]) -> None:
        assigned: dict[str, Any] = {}
        for _, path, value in changes:
            assigned = _assigned(assigned, path, value)
        with self._lock:
            self._changes = changes
            self._assigned = assigned
            self._cache = {}  # last: who looks a value up just now fills the one of before

    def update(self, new: Mapping[str, Any], priority: str = "new") -> None:
        """Merge *new* into what was set in code; with priority ``"old"``, only keys that have no value yet."""
        if priority == "old":
            new = {key: value for key, value in new.items() if key not in self}
        self.set(_flattened(new))

    def merge(self, *mappings: Mapping[str, Any]) -> None:
        """Merge mappings into what was set in code, the last one wins."""
        for mapping in mappings:
            self.update(mapping)

    def update_defaults(self, new: Mapping[str, Any]) -> None:
        """Merge *new* into the layer of defaults."""
        with self._lock:
            self._defaults = _merged(self._defaults, new)
            self._cache = {}

    def clear(self) -> None:
        """Forget what was set in code and read from files; environment and defaults stay."""
        with self._lock:
            self._file_layers, self._file_error = [], ""
            self._change([])

    def refresh(self) -> None:
        """Forget what was set in code and read the files again."""
        with self._lock:
            self._file_layers, self._file_error = None, ""
            self._change([])

    # -- files --

    @property
    def paths(self) -> list[str]:
        """The directories (or files) that are read, the last one wins."""
        paths = [
            os.environ.get(self._prefix + "ROOT_CONFIG", os.path.join("/etc", self.name)),
            os.path.join(sys.prefix, "etc", self.name),
            os.path.join(os.path.expanduser("~"), ".config", self.name),
        ]
        own = os.environ.get(self._prefix + "CONFIG")
        return [*paths, own] if own else paths

    def _files(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the contents of the files, read at the first use; raises ConfigurationError if one cannot be used."""
        with self._lock:
            if self._file_layers is None and not self._file_error:
                try:
                    own = os.environ.get(self._prefix + "CONFIG")
                    if own and not os.path.exists(own):
                        raise ConfigurationError(f"${self._prefix}CONFIG names {own}, but there is no such file.")
                    self._file_layers = [
                        layer for path in dict.fromkeys(self.paths) for layer in _read_config_path(path)
                    ]
                except ConfigurationError as error:
                    self._file_error = str(error)
            if self._file_error:
                raise ConfigurationError(self._file_error)
            return self._file_layers or []


class _Assignment:
    """What `Config.set` returns: leaving it as a context takes back what it has set."""

    def __init__(self, configuration: Config) -> None:
        self._configuration = configuration

    def __enter__(self) -> Config:
        return self._configuration

    def __exit__(self, *exc_info: object) -> None:
        with self._configuration._lock:
            others = [change for change in self._configuration._changes if change[0]() is not self]
            self._configuration._change(others)


# Whose assignment it is, the path of the key, its value.  One whose assignment nobody holds any more is there to stay.
_Change = tuple["weakref.ref[_Assignment]", tuple[str, ...], Any]


def _without_hidden(changes: Sequence[_Change]) -> list[_Change]:
    """Return *changes* without those that can never be seen again, behind a later one that is there to stay."""
    lasting: set[tuple[str, ...]] = set()
    kept = []
    for owner, path, value in reversed(changes):
        if not any(path[:length] in lasting for length in range(1, len(path) + 1)):
            kept.append((owner, path, value))
            if owner() is None:
                lasting.add(path)
    return kept[::-1]


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted keys to what are no mappings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _raw_environment() -> Mapping[Any, Any]:
    """Return what is below `os.environ`, which raises and catches an exception for each variable that is not there.

    That takes too long for something that is asked for with each message.
    """
    return getattr(os.environ, "_data", os.environ)


def _raw_variable(name: str) -> Any:
    """Return the key of a variable in `_raw_environment`."""
    return os.environ.encodekey(name) if hasattr(os.environ, "_data") else name


def parse_literal(text: str) -> Any:
    """Return the Python literal that *text* is, else *text*."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _wrong_value(name: str, key: str, value: Any, source: str, option: Option, expected: str) -> Exception:
    """Return the error for a value of the wrong type, saying what to change and where."""
    text = f"{name} configuration: {key} is {value!r} (from {source}), but must be {expected}."
    # An unknown backend is "not implemented", as in other implementations of this system.
    return NotImplementedError(text) if key == "backend" else ConfigurationError(text)


def _read_config_path(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a file, or the files of a directory in alphabetical order; raises ConfigurationError if one is unusable.

    Hidden ones are not configuration, but what editors and systems leave beside it (``.#a.json``, ``._a.json``).
    """
    layers = []
    file = path
    try:
        files = [path] if os.path.exists(path) else []
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            files = [os.path.join(path, name) for name in names if name.endswith((".json", ".toml", ".yaml", ".yml"))]
        for file in files:
            layers.append((file, _normalised(_read_config_file(file))))
    except Exception as error:  # each parser has errors of its own
        raise ConfigurationError(f"The configuration in {file} cannot be used: {error}") from None
    return layers


def _read_config_file(file: str) -> Mapping[str, Any]:
    """Return the mapping that a configuration file holds; raises what its parser raises."""
    with open(file, "rb") as stream:
        text = stream.read().decode("utf-8-sig")  # editors of Windows begin a file with a mark
    if file.endswith(".json"):
        content = json.loads(text)
    elif file.endswith(".toml"):
        try:
            import tomllib
        except ImportError:
            raise ValueError("TOML needs Python 3.11 or newer; use JSON") from None
        content = tomllib.loads(text)
    else:
        try:
            import yaml  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ValueError("YAML needs PyYAML, which is not installed; use JSON") from None
        content = yaml.safe_load(text)
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError("it holds no mapping of keys to values")
    return content


config = Config()


@in_forked_child
def _renew_config_lock() -> None:
    config._lock = threading.RLock()  # another thread of the parent may have held it


# -- defaults and ports, by the names that existing programs know --

DEFAULT_MC_GROUP = OPTIONS["mc_group"].default
DEFAULT_BROADCAST_PORT = OPTIONS["broadcast_port"].default
DEFAULT_ADDRESS_PUBLISH_PORT = OPTIONS["address_publish_port"].default
DEFAULT_UNSECURE_ZMQ_NAMESERVER_PORT = OPTIONS["nameserver_port"].default
DEFAULT_SECURE_ZMQ_NAMESERVER_PORT = 5558


def get_configured_broadcast_port() -> int:
    """Return the port of announcements: the configured `broadcast_port`, else 21200."""
    return cast(int, config.get("broadcast_port"))


def get_configured_address_port() -> int:
    """Return the port on which nameservers publish addresses: the configured `address_publish_port`, else 16543."""
    return cast(int, config.get("address_publish_port"))


def get_configured_unsecure_zmq_nameserver_port() -> int:
    """Return the port on which nameservers answer lookups: the configured `nameserver_port`, else 5557."""
    return cast(int, config.get("nameserver_port"))


def get_configured_secure_zmq_nameserver_port() -> int:
    """Return the port of lookups with CURVE: the configured `secure_zmq_nameserver_port`, else 5558."""
    return cast(int, config.get("secure_zmq_nameserver_port") or DEFAULT_SECURE_ZMQ_NAMESERVER_PORT)


# ======================================================================================================================
# 2. Messages
#
#     pytroll:/<subject> <type> <sender> <timestamp> <version>[ <mime type> <data>]
#
# Version v1.01 has timestamps without time zone, v1.2 keeps it.
# ======================================================================================================================

_MAGICK = "pytroll:/"
_MAX_DEPTH = 50  # of data whose types are checked; deeper ones are tried with the real encoder
_MAX_NESTING = 200  # of data in a message: what one program has decoded, any other can print, pickle and encode


class _DefaultVersion(str):
    """A version that nobody chose: the configuration decides when the message is encoded."""

    __slots__ = ()


_DEFAULT_VERSION = _DefaultVersion("v1.2")
WRITTEN_VERSIONS = {"v1.01": False, "v1.2": True}  # the versions that we write; those that we read: _is_readable


class MessageError(Exception):
    """What was to be encoded or decoded is not a posttroll message."""


# -- datetimes --

# ISO 8601: date and time of day down to minutes, seconds or fractions, with or without zone, in extended or basic form
# with T or a blank between them; or a date alone in extended form.  The first pattern is what datetime.isoformat()
# writes, which every Python reads alike; in the second, what is separated in the date is separated in the time too.
_is_iso_format = re.compile(
    r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d{6})?(?:[+-]\d\d:\d\d)?", re.ASCII
).fullmatch
_from_iso_format = datetime.fromisoformat
_DATETIME = re.compile(
    r"(\d{4})(?P<dash>-)?(\d\d)(?(dash)-)(\d\d)"
    r"(?:[T ]([01]\d|2[0-3])(?(dash):)(\d\d)(?:(?(dash):)(\d\d)(?:[.,](\d+))?)?"
    r"(?:(Z)|([+-]\d\d)(?::?(\d\d)(?::?(\d\d(?:\.\d{6})?))?)?)?)?",
    re.ASCII,
)
_JSON_DATE = re.compile(r'"\d\d\d\d-?\d\d-?\d\d["T ]', re.ASCII)  # what may be one, quickly found


def parse_datetime(text: str) -> datetime | None:
    """Return the datetime that *text* is in ISO 8601, None if it is none."""
    if _is_iso_format(text) is None:
        match = _DATETIME.fullmatch(text)
        if match is None:
            return None
        year, dash, month, day, hour, minute, second, fraction, is_utc, zone, zone_minutes, zone_seconds = (
            match.groups()
        )
        if not (dash or hour):  # digits alone are as often a number
            return None
        text = f"{year}-{month}-{day}T{hour or '00'}:{minute or '00'}:{second or '00'}"
        if fraction:
            text += "." + fraction[:6].ljust(6, "0")
        if is_utc or zone:
            text += f"{zone or '+00'}:{zone_minutes or '00'}" + (f":{zone_seconds}" if zone_seconds else "")
    try:
        return _from_iso_format(text)
    except ValueError:  # the 31st of February, an offset of 99 hours
        return None


def datetime_decoder(dct: Any) -> Any:
    """Turn the ISO 8601 date-times in freshly decoded JSON into datetimes, in place.

    Args:
        dct: A dictionary or list; anything else is returned as it is.

    Raises:
        MessageError: It is nested too deep.
    """
    level = [dct] if type(dct) is dict or type(dct) is list else []
    for _ in range(_MAX_NESTING):
        if not level:
            return dct
        deeper = []
        for container in level:
            for key, value in container.items() if type(container) is dict else enumerate(container):
                kind = type(value)
                if kind is str:
                    if "0" <= value < ":" and len(value) > 9 and (value[4] == "-" or value[8] in "T "):
                        moment = parse_datetime(value)
                        if moment is not None:
                            container[key] = moment
                elif kind is dict or kind is list:
                    deeper.append(value)
        level = deeper
    raise _nested_too_deep()


def _nested_too_deep() -> MessageError:
    return MessageError(f"Invalid data: nested deeper than {_MAX_NESTING} levels")


def datetime_encoder(obj: Any, encoder: Callable[[Any], str]) -> str:
    """Encode *obj* with *encoder*, which takes datetimes.

    Raises:
        TypeError: *obj* is no datetime, and so cannot be encoded in JSON.
    """
    try:
        return encoder(obj)
    except (AttributeError, TypeError):
        raise TypeError(f"{obj!r} is not JSON serializable") from None


def _isoformat(obj: Any) -> str:
    if isinstance(obj, (date, time_of_day)):  # a datetime is a date
        return obj.isoformat()
    raise TypeError(f"{type(obj).__name__} is not JSON serializable")


def _isoformat_without_timezone(obj: Any) -> str:
    return _isoformat(obj.replace(tzinfo=None) if isinstance(obj, (datetime, time_of_day)) else obj)


def create_datetime_encoder_for_version(version: str = "v1.2") -> Callable[[Any], str]:
    """Return the function that encodes datetimes in messages of *version*.

    Raises:
        MessageError: The version is not known.
    """
    return _isoformat if _keeps_timezone(version) else _isoformat_without_timezone


def create_datetime_json_encoder_for_version(version: str = "v1.2") -> Callable[[Any], str]:
    """Return the function to pass to `json.dumps` as *default*, for messages of *version*.

    Raises:
        MessageError: The version is not known.
    """
    encoder = create_datetime_encoder_for_version(version)
    return lambda obj: datetime_encoder(obj, encoder)


def _keeps_timezone(version: str) -> bool:
    """Whether timestamps of *version* have a time zone; raises MessageError for a version that we do not write."""
    try:
        return WRITTEN_VERSIONS[version]
    except (KeyError, TypeError):
        raise MessageError(f"Invalid message version: {version!r}. Use one of {', '.join(WRITTEN_VERSIONS)}.") from None


def _is_readable(version: str) -> bool:
    """Whether a message of *version* can be decoded: any up to the newest that we write."""
    if version in WRITTEN_VERSIONS:
        return True
    match = re.fullmatch(r"v(\d{1,9}\.\d{1,9})", version, re.ASCII)
    return match is not None and float(match[1]) <= 1.2


# -- data --


def _json_encoder(default: Callable[[Any], Any]) -> Callable[[Any], str]:
    """Return what `json.JSONEncoder(default=default).encode` is, but make the encoder in C that it uses only once.

    There is no check for cycles: a structure that holds itself ends as a RecursionError, like one that is too deep.
    """
    try:
        to_pieces = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
            None, default, json.encoder.encode_basestring_ascii, None, ": ", ", ", False, False, True
        )
    except (AttributeError, TypeError):  # a Python without it
        return json.JSONEncoder(check_circular=False, default=default).encode
    return lambda data: "".join(to_pieces(data, 0))


_to_json = {True: _json_encoder(_isoformat), False: _json_encoder(_isoformat_without_timezone)}
_read_json = json.JSONDecoder().raw_decode


class _DatetimeFoundError(Exception):
    """There is a datetime, or a time of day with a time zone, in data that are encoded without one."""


def _refuse_datetime(obj: Any) -> str:
    if isinstance(obj, datetime) or (isinstance(obj, time_of_day) and obj.tzinfo):
        raise _DatetimeFoundError
    return _isoformat(obj)


_to_json_without_datetime = _json_encoder(_refuse_datetime)


def dump_data(data: Any, version: str) -> tuple[str, str]:
    """Serialise *data* for a message of *version*; return the text and the version, chosen if it was ``auto``."""
    try:
        if version == "auto":
            try:
                return _to_json_without_datetime(data), "v1.01"
            except _DatetimeFoundError:
                version = "v1.2"
        return _to_json[_keeps_timezone(version)](data), version
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise MessageError(f"Invalid data: data is not JSON serializable ({reason})") from None


def _check_nesting(data: Any) -> None:
    """Raise MessageError if *data* are nested deeper than `_MAX_NESTING`."""
    level = [data]
    for _ in range(_MAX_NESTING + 1):
        containers = {id(item): item for item in level if isinstance(item, (dict, list, tuple))}.values()
        if not containers:
            return
        level = list(chain.from_iterable(item.values() if isinstance(item, dict) else item for item in containers))
    raise _nested_too_deep()


_ATOMS = frozenset((str, int, float, bool, type(None), datetime, date, time_of_day))


def _is_plainly_json(data: Any, depth: int = _MAX_DEPTH) -> bool:
    """Whether *data* can be encoded for sure, found out faster than by encoding them; False when in doubt."""
    kind = type(data)
    if kind is dict:
        for key, value in data.items():
            if type(key) is not str:
                return False
            if type(value) not in _ATOMS and not (depth and _is_plainly_json(value, depth - 1)):
                return False
        return True
    if kind is list or kind is tuple:
        for value in data:
            if type(value) not in _ATOMS and not (depth and _is_plainly_json(value, depth - 1)):
                return False
        return True
    return kind in _ATOMS


# Bytes, and text that could not travel as it is (old receivers strip leading blanks), go as a data URL (RFC 2397).
_BYTES_URL = "data:application/octet-stream;base64,"
_TEXT_URL = "data:text/plain;charset=utf-8;base64,"


def _travels_as_it_is(text: str) -> bool:
    """Whether *text* arrives unchanged as the last field of a message, at old receivers too."""
    if text[:1].isspace():
        return False
    if text.isascii():
        return True
    try:
        text.encode("utf-16-le")  # which refuses what UTF-8 refuses, in a quarter of the time
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def encode_binary(data: str | bytes | bytearray | memoryview) -> tuple[str, str]:
    """Return the text that stands for binary *data*: a data URL's beginning (or nothing), and the rest."""
    if isinstance(data, str) and data and _travels_as_it_is(data) and not data.startswith((_BYTES_URL, _TEXT_URL)):
        return "", data
    import base64

    if isinstance(data, str):
        return _TEXT_URL, base64.b64encode(data.encode("utf-8", "surrogatepass")).decode("ascii")
    return _BYTES_URL, base64.b64encode(data).decode("ascii")


def _decode_binary(text: str) -> str | bytes:
    """Return the data that `encode_binary` made the URL *text* of; another sender's is returned as it is."""
    if not text.startswith((_BYTES_URL, _TEXT_URL)):
        return text
    import base64

    try:
        content = base64.b64decode(text[text.index(",") + 1 :], validate=True)
        return content if text.startswith(_BYTES_URL) else content.decode("utf-8", "surrogatepass")
    except ValueError:
        return text


def _encode_data(data: Any, binary: bool, version: str) -> tuple[str, str, str]:
    """Return what follows the header of a message, in two pieces, and the version, chosen for JSON if it was ``auto``.

    Raises:
        MessageError: The data cannot be encoded, or the version is not known.
    """
    if type(data) is not str and isinstance(data, str):
        data = str.__str__(data)  # a text may be an enum, whose name is what it would be formatted as
    if isinstance(data, str) and not binary:
        if not data:
            return "", "", version
        if _travels_as_it_is(data):
            return " text/ascii ", data, version
    elif isinstance(data, (bytes, bytearray, memoryview, str)):
        url, text = encode_binary(data)
        return " binary/octet-stream " + url, text, version
    text, version = dump_data(data, version)
    return " application/json ", text, version


# -- checks --


def _is_field(obj: Any) -> bool:
    """Whether *obj* can be a field of the header: a text that is not empty and has no white space."""
    return isinstance(obj, str) and obj.split(None, 1) == [obj]


def is_valid_subject(obj: Any) -> bool:
    """Whether *obj* can be the subject of a message: a text, not empty, without white space."""
    return _is_field(obj)


def is_valid_type(obj: Any) -> bool:
    """Whether *obj* can be the type of a message: a text, not empty, without white space."""
    return _is_field(obj)


def is_valid_sender(obj: Any) -> bool:
    """Whether *obj* can be the sender of a message: a text, not empty, without white space."""
    return _is_field(obj)


def is_valid_data(obj: Any, version: str = "v1.2") -> bool:
    """Whether *obj* can be encoded as JSON, datetimes included."""
    try:
        _check_nesting(obj)
        dump_data(obj, version)
    except MessageError:
        return False
    return True


_checked_fields: set[Any] = set()


def _check_header(*fields: Any) -> None:
    """Raise MessageError if a field would break the header, or forge the field after it."""
    for name, field in zip(("subject", "type", "sender"), fields):
        if not _is_field(field):
            raise MessageError(f"Invalid {name}: {field!r}. It must be text, not empty and without white space.")
        if len(_checked_fields) > 10000:
            _checked_fields.clear()
        _checked_fields.add(field)  # most programs send the same few again and again


# -- the sender --

_sender: str | None = None


def get_sender() -> str:
    """Return ``user@host``, found out once: the account of the process, whatever the environment says it is."""
    global _sender
    if _sender is None:
        if sys.platform == "win32":
            import getpass

            user = getpass.getuser()
        else:
            import pwd

            try:
                user = pwd.getpwuid(os.getuid()).pw_name
            except KeyError:  # a container whose user id has no name
                user = str(os.getuid())
        _sender = "_".join(f"{user}@{socket.gethostname() or 'localhost'}".split())
    return _sender


# -- timestamps --

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@lru_cache(maxsize=16)
def _second(days: int, seconds: int) -> str:
    """Return the text of a second in UTC, by the time since 1970; many messages share one."""
    return (_EPOCH.replace(tzinfo=None) + timedelta(days, seconds)).isoformat()


def _timestamp(moment: datetime, keeps_timezone: bool) -> str:
    """Return *moment* as it stands in the header."""
    if type(moment) is datetime and moment.tzinfo is timezone.utc and moment.microsecond:
        since = moment - _EPOCH
        zone = "+00:00" if keeps_timezone else ""  # half the time of isoformat, for nearly all that are sent
        return f"{_second(since.days, since.seconds)}.{str(since.microseconds).zfill(6)}{zone}"
    return (moment if keeps_timezone else moment.replace(tzinfo=None)).isoformat()


# -- the message --


class Message:
    """A message: subject, type, sender, time and data.

    Args:
        subject: What it is about, for example ``"/segment/hrit"``; no white space.
        atype: What kind of message it is, for example ``"file"``; no white space.
        data: A text, anything that JSON can hold (with datetimes anywhere in it), or bytes.
        binary: Send text as ``binary/octet-stream``; bytes always are.
        rawstr: An encoded message to decode; then nothing else may be given.
        version: ``"v1.2"``, ``"v1.01"`` (drops time zones) or ``"auto"`` (the lowest that loses nothing).  If it is
            not given, or None, the configuration's ``message_version`` decides, when the message is encoded.

    Attributes:
        subject, type, sender, data, binary, version: As above; they may be assigned.
        time: A datetime: when the message was made, in UTC.  Decoded from v1.01 it has no time zone.
        origin: The address of the publisher that it came from, told by subscribers with *translate*; else empty.

    Raises:
        MessageError: The fields or the data cannot be encoded, or *rawstr* is not a message.
    """

    subject: str
    type: str
    sender: str
    time: datetime
    data: Any
    binary: bool
    version: str
    origin = ""
    _raw: str | None

    def __init__(
        self,
        subject: str = "",
        atype: str = "",
        data: Any = "",
        binary: bool = False,
        rawstr: str | bytes | None = None,
        version: str | None = _DEFAULT_VERSION,
    ) -> None:
        if rawstr is not None:
            _decode_into(self, rawstr)
            return
        self.subject = subject
        self.type = atype
        self.sender = _sender or get_sender()
        self.time = datetime.now(timezone.utc)
        self.data = data
        self.binary = binary
        self.version = version = _DEFAULT_VERSION if version is None else version
        self._raw = None
        if not (type(subject) is type(atype) is str and subject in _checked_fields and atype in _checked_fields):
            _check_header(subject, atype)
        if version is not _DEFAULT_VERSION and version != "auto":
            _keeps_timezone(version)
        kind = type(data)
        if kind is not str and kind is not bytes and not _is_plainly_json(data):
            _check_nesting(data)
            _encode_data(data, binary, version)

    @staticmethod
    def decode(rawstr: str | bytes) -> Message:
        """Decode a message from *rawstr*: str, or bytes in UTF-8 (else ISO-8859-1).

        Raises:
            MessageError: It is not a message, however it is broken.
        """
        message = object.__new__(Message)
        _decode_into(message, rawstr)
        return message

    from_string = decode

    def encode(self) -> str:
        """Return the message as text, as it is now.

        A decoded message that nobody changed gives the text that it was decoded from, to the letter.

        Raises:
            MessageError: A field or the data have been changed to something that cannot be encoded.
        """
        if self._raw is None:
            return self._encode()
        original = Message.decode(self._raw)
        original._raw = None
        now = self._encode()
        return self._raw if original._encode() == now else now

    def _encode(self) -> str:
        """Return the message as it is now, made anew."""
        version = self.version
        if version is _DEFAULT_VERSION:
            version = config.get("message_version")
        elif version not in WRITTEN_VERSIONS and version != "auto" and _is_readable(version):
            version = "v1.01"  # decoded from something older
        prefix, text, version = _encode_data(self.data, self.binary, version)
        subject, atype, sender = self.subject, self.type, self.sender
        are_texts = type(subject) is type(atype) is type(sender) is str
        if not (are_texts and subject in _checked_fields and atype in _checked_fields and sender in _checked_fields):
            _check_header(subject, atype, sender)
            subject, atype, sender = map(str.__str__, (subject, atype, sender))
        if version == "auto":  # the data are the same in all versions
            version = "v1.01"
        stamp = _timestamp(self.time, WRITTEN_VERSIONS.get(version) or _keeps_timezone(version))
        return f"{_MAGICK}{subject} {atype} {sender} {stamp} {version}{prefix}{text}"

    @property
    def raw(self) -> str | None:
        """The text that it was decoded from, whatever has been assigned since; None if it was not decoded."""
        return self._raw

    @property
    def head(self) -> str:
        """The header: the encoded message without the data."""
        text = self._encode()
        return " ".join(text.split(" ", 5)[:5])

    @property
    def user(self) -> str:
        """The user in the sender ``user@host``, empty if there is none."""
        return self.sender.partition("@")[0] if "@" in self.sender else ""

    @property
    def host(self) -> str:
        """The host in the sender ``user@host``, empty if there is none."""
        return self.sender.partition("@")[2]

    def __str__(self) -> str:
        return self.encode()

    def __repr__(self) -> str:
        return self.encode()

    def __getstate__(self) -> str:
        return str.__str__(self.encode())

    def __setstate__(self, state: str) -> None:
        _decode_into(self, state)


def _decode_into(message: Message, raw: str | bytes) -> None:
    """Fill *message* with what *raw* says; raises MessageError if it is no message."""
    if type(raw) is bytes:
        raw = _utf_8_or_latin(raw)
    elif type(raw) is not str:
        raw = _as_text(raw)
    fields = raw.split(None, 6)
    count = len(fields)
    if count < 5 or not raw.startswith(_MAGICK):
        raise MessageError(f"This is not a '{_MAGICK}' message: {raw[:80]!r}")
    if count < 7:
        fields = [*fields, "", ""][:7]
    magick_subject, message.type, message.sender, stamp, version, mime, text = fields
    if version not in WRITTEN_VERSIONS and not _is_readable(version):
        raise MessageError(f"Invalid message version: {version[:80]!r}. This program reads versions up to v1.2.")
    message.subject = magick_subject[9:]
    if not message.subject:
        raise MessageError(f"Invalid subject: '' in {raw[:80]!r}")
    try:
        message.time = _from_iso_format(stamp)
    except ValueError:
        message.time = _parse_timestamp(stamp)
    message.version = version
    message.binary = False
    message._raw = raw
    if mime and (not text or raw[-len(text) - 2].isspace()):
        text = _text_with_blanks(raw, len(raw) - len(text), mime)
    if mime == "text/ascii" or not mime:
        message.data = text
    elif mime == "application/json":
        message.data = _decode_json(text)
    elif mime == "binary/octet-stream":
        message.binary = True
        message.data = _decode_binary(text) if text.startswith("data:") else text
    else:
        raise MessageError(f"Unknown mime type: {mime[:80]!r}")


def _parse_timestamp(text: str) -> datetime:
    """Return the time in a header; raises MessageError if it is none."""
    moment = parse_datetime(text)
    if moment is None:
        raise MessageError(f"Invalid time: {text[:80]!r}")
    return moment


def _text_with_blanks(raw: str, start: int, mime: str) -> str:
    """Return the data, of which splitting has taken the leading blanks: all after one blank behind the mime type."""
    end_of_mime = len(raw[:start].rstrip())
    if end_of_mime == len(raw):
        raise MessageError(f"Mime type {mime[:80]!r} without data")
    return raw[end_of_mime + 1 :]


def _decode_json(text: str) -> Any:
    """Return the data in *text*; raises MessageError if it is no JSON."""
    text = text.strip(" \t\n\r")
    try:
        data, end = _read_json(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"Invalid JSON data: {str(error)[:200]}") from None
    if _JSON_DATE.search(text) is None:
        if text.count("[") + text.count("{") > _MAX_NESTING:
            _check_nesting(data)
        return data
    return (parse_datetime(data) or data) if type(data) is str else datetime_decoder(data)


class _Latin1Text(str):
    """The text of a message that did not come in UTF-8; it is sent on as it came."""

    __slots__ = ()

    def encode(self, encoding: str = "iso-8859-1", errors: str = "strict") -> bytes:
        return super().encode(encoding, errors)


def _utf_8_or_latin(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _Latin1Text(raw.decode("iso-8859-1"))


def _as_text(raw: Any) -> str:
    """Return the text of a raw message; raises MessageError if it is neither text nor bytes."""
    if isinstance(raw, str):
        return str(raw)
    if not isinstance(raw, (bytes, bytearray, memoryview)):
        raise MessageError(f"A raw message is str or bytes, not {type(raw).__name__}")
    return _utf_8_or_latin(bytes(raw))


# Pickles name the class by its documented path, so that both implementations load each other's.
for _class in (Message, MessageError):
    _class.__module__ = f"{__name__}.message"
del _class


# ======================================================================================================================
# 3. The loop
#
# All waiting is done here: for sockets, for descriptors, for times, for calls from other threads and signal handlers.
# ======================================================================================================================

_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)


class LimitedLogger:
    """Logs the first few messages of a kind in each minute, and then how many more there were.

    Args:
        path: The documented import path that the logger is named after, such as ``publisher``.
    """

    BURST = 5
    PERIOD = 60.0
    KINDS = 100

    def __init__(self, path: str) -> None:
        self._path = path
        self._kinds: dict[str, tuple[float, int]] = {}

    def log(self, level: int, kind: str, text: str, *args: Any, exc_info: bool = False) -> None:
        """Log *text* with *args*, unless there has been enough of this *kind*."""
        now = time.monotonic()
        start, count = self._kinds.get(kind, (now, 0))
        suppressed = 0
        if now - start > self.PERIOD:
            suppressed = max(count - self.BURST, 0)
            start, count = now, 0
        if len(self._kinds) >= self.KINDS and kind not in self._kinds:
            self._kinds.clear()
        self._kinds[kind] = (start, count + 1)
        if suppressed:
            _log(self._path).log(level, "%d more messages of the kind '%s' were not logged", suppressed, kind)
        if count < self.BURST:
            _log(self._path).log(level, text, *args, exc_info=exc_info)

    def warning(self, kind: str, text: str, *args: Any) -> None:
        """Log a warning, unless there has been enough of this *kind*."""
        self.log(logging.WARNING, kind, text, *args)


class _Waker:
    """Ends a poll from another thread or a signal handler: a descriptor to poll, and `wake`."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()  # Windows polls nothing but sockets
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)

    def fileno(self) -> int:
        return self._read_end.fileno()

    def write_fileno(self) -> int:
        return self._write_end.fileno()

    def wake(self) -> None:
        with suppress(OSError):  # closed: nobody waits; full: a wake-up is on its way
            self._write_end.send(b"!")

    def clear(self) -> None:
        with suppress(OSError):
            while self._read_end.recv(1024):
                pass

    def close(self) -> None:
        self._read_end.close()
        self._write_end.close()


def close_socket(sock: zmq.Socket[bytes]) -> None:
    """Close *sock* at once; what it has not sent yet is dropped."""
    if not sock.closed:
        sock.monitor(None, 0)  # now, as long as there is somebody to be told that it ends
        sock.close(linger=0)


class Timer:
    """A call at a time, as `Loop.at` returns it."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return self.when > other.when  # in a list, the next one is the last

    def cancel(self) -> None:
        """Let it not be called; one that has been is left alone."""
        self.callback = None


class Loop:
    """Waits for sockets, times and calls at once, and calls what belongs to each.

    Whoever runs the loop, by `turn` or `run`, is the only one to call `watch`, `unwatch` and `at`; others hand it what
    is to be done with `call`.  A callback that raises is logged, and ends neither the loop nor its other callbacks.
    """

    LONGEST_POLL = 3600_000  # milliseconds; poll takes an int, and a clock that is frozen by a test leads far away

    def __init__(self) -> None:
        self._callbacks: dict[Any, Callable[[], object]] = {}
        self._quiet: dict[zmq.Socket[bytes], int] = {}  # their descriptors
        self._poller = zmq.Poller()
        self._timers: list[Timer] = []  # the next one last
        self._calls: deque[Callable[[], object]] = deque()
        self._waker = _Waker()
        self._poller.register(self._waker.fileno(), _POLLIN)
        self._log = LimitedLogger("backends.zmq")
        self.is_stopped = False

    def watch(self, item: Any, callback: Callable[[], object], events: int = _POLLIN) -> None:
        """Have *callback* called whenever *item*, a socket or a descriptor, is ready for *events*."""
        if getattr(item, "closed", False):
            return  # by whom Control-C interrupted, who had handed over this call
        self._callbacks[item] = callback
        self._poller.register(item, events)

    def watch_quiet(self, sock: zmq.Socket[bytes], callback: Callable[[], object]) -> None:
        """Have *callback* called now, and whenever something has come on *sock*, of which it must leave nothing.

        For a socket of which one only receives, and seldom.  To ask ZeroMQ at each turn whether it has something would
        take as long as to receive a message; its descriptor tells, but only once.
        """
        self._quiet[sock] = descriptor = int(cast(int, sock.get(zmq.FD)))
        self.watch(descriptor, callback)
        self._guard(callback)

    def unwatch(self, item: Any) -> None:
        """Watch *item* no longer; one that is not watched is ignored."""
        item = self._quiet.pop(item, item)
        if self._callbacks.pop(item, None) is not None:
            self._poller.unregister(item)

    def at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Have *callback* called at *when*, a time of `time.monotonic`."""
        timer = Timer(when, callback)
        insort_left(self._timers, timer)
        return timer

    def call(self, callback: Callable[[], object]) -> None:
        """Have *callback* called soon; may be used in any thread and in signal handlers."""
        self._calls.append(callback)
        self._waker.wake()

    def wake(self) -> None:
        """End a wait; may be used in any thread and in signal handlers."""
        self._waker.wake()

    def stop(self) -> None:
        """End `run`; may be used in any thread and in signal handlers."""
        self.is_stopped = True
        self._waker.wake()

    def run(self) -> None:
        """Serve until `stop`."""
        while not self.is_stopped:
            self.turn()

    def settle(self) -> None:
        """Call what has been handed over until now."""
        for _ in range(len(self._calls)):  # what these hand over has its turn later
            self._guard(self._calls.popleft())

    def turn(self, deadline: float | None = None) -> None:
        """Call what is due, wait until something is ready, at most until *deadline*, and serve it."""
        self._dispatch(self._poller.poll(self._prepare(deadline)))

    async def turn_async(self, deadline: float | None = None) -> None:
        """Do what `turn` does, in an asyncio program.

        Raises:
            RuntimeError: The event loop cannot wait for descriptors (the default one of Windows).
        """
        import zmq.asyncio  # asyncio takes as long to import as all the rest of a small program

        poller: Any = zmq.asyncio.Poller()
        milliseconds = self._prepare(deadline)
        for item, events in self._poller.sockets:
            poller.register(item, events)
        try:
            ready = await poller.poll(milliseconds)
        except NotImplementedError:
            raise RuntimeError(
                "This event loop cannot wait for sockets: on Windows, first call "
                "asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())."
            ) from None
        self._dispatch(ready)

    def _prepare(self, deadline: float | None) -> int | None:
        """Call what is due, and return for how many milliseconds to wait, None for ever."""
        self.settle()
        now, has_called = time.monotonic(), False
        while self._timers and (self._timers[-1].callback is None or self._timers[-1].when <= now):
            callback = self._timers.pop().callback
            if callback is not None:
                self._guard(callback)
                has_called = True
        if self._calls or self.is_stopped:
            return 0
        if has_called:
            deadline = time.monotonic()  # soon, as whoever runs the loop may have been told of something
        if self._timers and (deadline is None or self._timers[-1].when < deadline):
            deadline = self._timers[-1].when
        if deadline is None:
            return None
        # One millisecond more: poll rounds down, and would return just before it is due.
        return min(max(int((deadline - time.monotonic()) * 1000) + 1, 0), self.LONGEST_POLL)

    def _dispatch(self, ready: Iterable[tuple[Any, int]]) -> None:
        for item, _ in ready:
            callback = self._callbacks.get(item)
            if callback is not None:
                self._guard(callback)
            elif isinstance(item, int):
                self._waker.clear()

    def _guard(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except zmq.ContextTerminated:
            raise
        except Exception as error:  # whatever it is, the others must be served
            self._log.log(logging.ERROR, repr(error), "A callback has failed: %s", error, exc_info=True)

    def close(self) -> None:
        """Let go of everything, and close the sockets that are watched."""
        self.is_stopped = True
        for item in (*self._callbacks, *self._quiet):
            if isinstance(item, zmq.Socket):
                close_socket(item)
        self._callbacks, self._quiet, self._timers = {}, {}, []
        self._calls.clear()
        self._waker.close()


class Background:
    """The loop that serves all publishers of this process, in a thread that lives as long as it has duties."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._duties: list[object] = []
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None

    def join(self, duty: object) -> Loop:
        """Return the loop, which runs until *duty* leaves it."""
        with self._lock:
            if self._loop is None or self._loop.is_stopped or self._thread is None or not self._thread.is_alive():
                self._duties = []
                self._loop = loop = Loop()
                self._thread = threading.Thread(target=self._run, args=(loop,), name="posttroll loop", daemon=True)
                with on_failure(loop.stop):  # no more threads, for example
                    self._thread.start()
            self._duties.append(duty)
            return self._loop

    def leave(self, duty: object, loop: Loop) -> None:
        """Let the loop end with its last duty; it is waited for, but not by its own thread."""
        with self._lock:
            if loop is not self._loop or duty not in self._duties:
                return
            self._duties.remove(duty)
            if self._duties:
                return
            thread, self._loop = self._thread, None
        loop.stop()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    @property
    def is_here(self) -> bool:
        """Whether this is the thread of the loop."""
        return threading.current_thread() is self._thread

    def finish(self, callback: Callable[[], object], loop: Loop) -> None:
        """Have *callback* called in the thread of *loop*, and wait until it has been; at once if the loop is over."""
        done = threading.Event()

        def call() -> None:
            try:
                callback()
            finally:
                done.set()

        thread = self._thread
        if thread is threading.current_thread() or loop is not self._loop or thread is None:
            call()
            return
        loop.call(call)
        while not done.wait(0.05) and thread.is_alive():
            pass
        if not done.is_set():
            call()

    def dismiss(self, duty: object, loop: Loop, callback: Callable[[], object]) -> None:
        """Have *callback* called as the last thing that *duty* does in *loop*, and wait until it has been."""
        try:
            self.finish(callback, loop)
        finally:
            self.leave(duty, loop)

    def shut_down(self) -> None:
        """End the loop, whatever duties it has."""
        with self._lock:
            loop, thread, self._loop, self._duties = self._loop, self._thread, None, []
        if loop is not None and thread is not None:
            loop.stop()
            if thread is not threading.current_thread():
                thread.join(5)

    @staticmethod
    def _run(loop: Loop) -> None:
        try:
            loop.run()
        except zmq.ContextTerminated:
            _log("backends.zmq").debug("The context was terminated")
        finally:
            loop.close()


_background = Background()


@in_forked_child
def _renew_background() -> None:
    global _background
    _background = Background()  # the thread runs in the parent only, and may have held the lock


# -- signals --


@contextmanager
def signals_wake(loop: Loop) -> Iterator[None]:
    """Have every signal wake *loop*: one that comes just before a poll begins (on Windows: any) does not end it.

    In other threads than the main thread, which do not get signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import signal

    previous = -1
    try:
        previous = signal.set_wakeup_fd(loop._waker.write_fileno(), warn_on_full_buffer=False)
        yield
    finally:
        signal.set_wakeup_fd(previous)


_ECHO_SECONDS = 0.1  # after a signal, in which the next one is the same once more


@contextmanager
def call_on_signals(callback: Callable[[], object], *more: int) -> Iterator[None]:
    """Have SIGINT and SIGTERM call *callback*, so that a loop over messages ends cleanly.

    For example::

        with Subscribe("a_service") as subscriber, call_on_signals(subscriber.stop):
            for message in subscriber.recv():
                ...

    A second such signal is treated as it was before: in general, it ends the program at once.  So is the first one in a
    child that was forked meanwhile.  One within a tenth of a second is no second one: ``timeout`` of the coreutils, for
    example, signals a program and then its group, and means one.

    Args:
        callback: What to call; it must be safe to call in a signal handler, as `Subscriber.stop`, `Subscriber.close`
            and `Publisher.stop` are.  In other threads than the main thread it is never called.
        more: The numbers of other signals that shall call it, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import signal

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *more)}
    pid, first = os.getpid(), math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if os.getpid() != pid or time.monotonic() >= first + _ECHO_SECONDS:
            restore()
            os.kill(os.getpid(), number)
        elif first == math.inf:
            first = time.monotonic()
            callback()

    def restore() -> None:
        with ExitStack() as stack:  # all of them, even if one that comes just now raises
            for number, handler in previous.items():
                if signal.getsignal(number) is handle:  # else it is restored, or somebody else's by now
                    stack.callback(signal.signal, number, signal.SIG_DFL if handler is None else handler)

    try:
        for number in previous:
            signal.signal(number, handle)
        yield
    finally:
        restore()


@contextmanager
def loop_until_signal() -> Iterator[Loop]:
    """A loop that SIGINT and SIGTERM stop, and that is closed at the end."""
    with closing(Loop()) as loop, signals_wake(loop), call_on_signals(loop.stop):
        yield loop


# ======================================================================================================================
# 4. Multicast sockets
#
# UDP to a multicast group (RFC 1112), or to everybody on the local network with the group 0.0.0.0.
# ======================================================================================================================

SocketTimeout = socket.timeout  # TimeoutError itself from Python 3.10 on

DATAGRAM_SIZE = 65535
_IP_MULTICAST_ALL, _IPV6_MULTICAST_ALL = 49, 29  # of Linux, see ip(7) and ipv6(7)
_NO_ADDRESS = ("0.0.0.0", "::")  # of an interface that has none
_MAPPED = b"\0" * 10 + b"\xff\xff"  # what an IPv6 address begins with that stands for one of IPv4
_BROADCAST_GROUPS = ("0.0.0.0", "255.255.255.255", "<broadcast>")


def plain_number(number: str) -> str:
    """Return an IP address as ZeroMQ would write it; one of IPv4 in the clothes of IPv6 as what it is.

    Raises:
        ValueError: It is no IP address, but perhaps a name.
    """
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    host, percent, zone = number.partition("%")
    try:
        packed = socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"{number!r} is no IP address") from None
    if percent and (len(packed) == 4 or not zone or "%" in zone):
        raise ValueError(f"{number!r} has a zone that cannot be")
    if len(packed) == 16 and packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed) + percent + zone


def multicast_group(mcgroup: str | None) -> str:
    """Return the address of the group; raises OSError if it is no multicast address."""
    group = config.get("mc_group") if mcgroup is None else mcgroup
    if group in _BROADCAST_GROUPS:
        return "<broadcast>"
    with suppress(ValueError):
        if re.match("ff[0-9a-f]{2}:", plain_number(group)):
            return cast(str, group)
    try:
        packed = socket.inet_aton(socket.gethostbyname(group))
    except OSError as error:
        raise OSError(
            error.errno, f"Invalid multicast address {group!r} (mc_group): {error.strerror or error}"
        ) from None
    if packed[0] >> 4 != 0xE:
        raise OSError(
            errno.EINVAL,
            f"Invalid multicast address {group!r} (mc_group): Invalid argument, not in 224.0.0.0/4 or ff00::/8",
        )
    return socket.inet_ntoa(packed)


def _multicast_interface() -> bytes:
    """Return the packed address of the interface for multicast, zeros to leave the choice to the routing table.

    Raises:
        OSError: The configured interface does not exist (perhaps not yet).
    """
    interface = config.get("multicast_interface")
    if not interface:
        return b"\0\0\0\0"
    try:
        return socket.inet_aton(interface)
    except OSError:
        pass
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.encode()[:15])
            return fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]  # SIOCGIFADDR of Linux, see netdevice(7)
    except (ImportError, OSError) as error:
        raise OSError(errno.ENODEV, f"multicast_interface {interface!r} has no address here: {error}") from None


def _multicast_index(group: str) -> int:
    """Return the index of the interface for the IPv6 *group*, 0 to leave the choice to the routing table.

    Raises:
        OSError: The configured interface does not exist (perhaps not yet).
    """
    interface = group.partition("%")[2] or config.get("multicast_interface")
    if not interface:
        return 0
    known = {address.partition("%")[0]: index for address, index in _local_ipv6()}
    try:
        number, _, zone = interface.partition("%")
        return known.get(number) or socket.if_nametoindex(zone or number)
    except OSError as error:
        raise OSError(errno.ENODEV, f"multicast_interface {interface!r} has no IPv6 here: {error}") from None


def _membership(group: str) -> tuple[int, int, bytes]:
    """Return level, option and value that make a socket a member of *group*."""
    if ":" in group:
        packed = socket.inet_pton(socket.AF_INET6, group.partition("%")[0])
        return socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed + struct.pack("@I", _multicast_index(group))
    return socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + _multicast_interface()


def _udp_socket(group: str) -> socket.socket:
    """Return a socket for *group* that shares its port."""
    sock = socket.socket(socket.AF_INET6 if ":" in group else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def mcast_sender(mcgroup: str | None = None) -> tuple[socket.socket, str]:
    """Open a UDP socket to send to a multicast group.

    Args:
        mcgroup: The group; by default the configured `mc_group`.  ``0.0.0.0`` stands for broadcast.

    Returns:
        The socket and the address to send to.

    Raises:
        OSError: The group is no multicast address, or the socket cannot be set up.
    """
    group = multicast_group(mcgroup)
    ttl = min(max(config.get("mc_ttl"), 0), 255)
    sock = _udp_socket(group)
    with on_failure(sock.close):
        if group == "<broadcast>":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        elif ":" in group:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, _multicast_index(group))
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            interface = _multicast_interface()
            if interface != b"\0\0\0\0":
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
    return sock, group


def mcast_receiver(port: int, mcgroup: str | None = None) -> tuple[socket.socket, str]:
    """Open a UDP socket that receives what is sent to *port* of a multicast group.

    Args:
        port: The UDP port; several receivers on a host can share it.
        mcgroup: The group; by default the configured `mc_group`.  ``0.0.0.0`` stands for broadcast.

    Returns:
        The socket and the group.

    Raises:
        OSError: The group is no multicast address, the port is taken, or no interface can receive multicast.
    """
    group = multicast_group(mcgroup)
    sock = _udp_socket(group)
    with on_failure(sock.close):
        if sys.platform not in ("linux", "win32") and hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # BSD and macOS share ports by this one
        if ":" in group:  # another socket may have the same port for IPv4
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("", port))
        if group != "<broadcast>":
            level, option, value = _membership(group)
            if sys.platform == "linux":  # else it also gets what comes for the groups of other programs
                with suppress(OSError):  # IPv6: from Linux 4.20 on
                    all_groups = _IPV6_MULTICAST_ALL if level == socket.IPPROTO_IPV6 else _IP_MULTICAST_ALL
                    sock.setsockopt(level, all_groups, 0)
            sock.setsockopt(level, option, value)
    return sock, group


class MulticastSender:
    """Sends to *port* of a multicast group; call it with a str or bytes.

    Raises:
        OSError: As `mcast_sender`, and on a call if the network is not reachable.
    """

    def __init__(self, port: int, mcgroup: str | None = None) -> None:
        self.port = port
        self.socket, self.group = mcast_sender(mcgroup)

    def __call__(self, data: str | bytes) -> None:
        """Send *data* in one datagram."""
        self.socket.sendto(data.encode() if isinstance(data, str) else data, (self.group, self.port))

    def own_address(self) -> str | None:
        """Return the address of the interface that it sends over, None if that has none; raises OSError without one."""
        probe, group = mcast_sender(self.group)
        with probe:
            probe.connect((group, self.port))  # no packet is sent; the kernel picks the route
            address = number_of(probe.getsockname())
        return None if address in _NO_ADDRESS else address

    def close(self) -> None:
        """Close the sender."""
        self.socket.close()


class MulticastReceiver:
    """Receives from *port* of a multicast group; a call returns the next datagram and its sender's address.

    Raises:
        OSError: As `mcast_receiver`, and `SocketTimeout` from a call after the time of `settimeout`.
    """

    BUFSIZE = 1024  # the documented size; datagrams are received whole all the same

    def __init__(self, port: int, mcgroup: str | None = None) -> None:
        self.port = port
        self.socket, self.group = mcast_receiver(port, mcgroup)

    def __call__(self) -> tuple[str, tuple[str, int]]:
        """Return the next datagram as text, and the address and port that it came from."""
        data, sender = self.socket.recvfrom(max(self.BUFSIZE, DATAGRAM_SIZE))
        return data.decode("utf-8", "replace"), sender[:2]

    def fileno(self) -> int:
        """Return the file descriptor, for pollers."""
        return self.socket.fileno()

    def settimeout(self, tout: float | None = None) -> None:
        """Let calls raise `SocketTimeout` after *tout* seconds, or wait for ever (None)."""
        self.socket.settimeout(tout)

    def close(self) -> None:
        """Close the receiver."""
        self.socket.close()


def source_address(number: str) -> str | None:
    """Return the address from which this host talks to the host *number*, None if nothing leads there.

    It is that of the interface that leads there.
    """
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        host, _, zone = number.partition("%")
        # Connecting sends no packet, the kernel picks the route.
        probe.connect((host, 9, 0, socket.if_nametoindex(zone)) if zone else (host, 9))
        address = number_of(probe.getsockname())
        return None if address in _NO_ADDRESS else address
    return None


def number_of(socket_address: Sequence[Any]) -> str:
    """Return the number of the host in what `socket` calls an address, with the zone if it is for one link only."""
    host, _, _, index = (*socket_address, 0, 0)[:4]
    return f"{host}%{socket.if_indextoname(index)}" if index else cast(str, host)


def get_own_ip() -> str:
    """Return the address of this host that leads to others, that of loopback without a network.

    It is that of the default route, or, if there is none, that of an interface; IPv4 before IPv6.
    """
    addresses = (address for address in _own_addresses() if address and "%" not in address)  # that is for one link only
    return next((address for address in addresses if not is_loopback(address)), loopback_address())


def _own_addresses() -> Iterator[str | None]:
    yield source_address("192.0.2.1")
    yield from get_local_ips()
    yield source_address("2001:db8::1")
    yield from (address for address, _ in _local_ipv6())


def loopback_address() -> str:
    """Return ``127.0.0.1``, or ``::1`` on a host that has only that."""
    return "::1" if source_address("127.0.0.1") is None and source_address("::1") is not None else "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Whether *address*, a number, is one by which only this host itself can be reached."""
    number = plain_number(address)
    return number.startswith("127.") or number.partition("%")[0] == "::1"


def get_local_ips() -> list[str]:
    """Return the IPv4 addresses of this host."""
    try:
        with open("/proc/net/fib_trie") as routes:
            found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", routes.read())
    except OSError:  # this is no Linux
        found = ["127.0.0.1"]
        with suppress(OSError):
            found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys(found))


def _local_ipv6() -> list[tuple[str, int]]:
    """Return the IPv6 addresses of this host, each with the index of its interface; those of a link only at the end."""
    try:
        with open("/proc/net/if_inet6") as lines:
            rows = [line.split() for line in lines]
    except OSError:  # this is no Linux, or there is no IPv6
        return []
    found = []
    for packed, index, _, scope, _, name in sorted(rows, key=lambda row: row[3]):
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed))
        found.append((f"{address}%{name}" if scope == "20" else address, int(index, 16)))
    return found


# ======================================================================================================================
# 5. ZeroMQ sockets
#
# One context for each process; monitors, addresses, and host names, which ZeroMQ itself must never resolve.
# ======================================================================================================================

# -- monitors --

_monitor_numbers = count()


def _open_monitor(sock: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """Return a new socket that receives the *events* of *sock*, and EVENT_MONITOR_STOPPED at the end.

    Unlike `zmq.Socket.get_monitor_socket`, it ends another monitor of *sock* (with EVENT_MONITOR_STOPPED), and it may
    be handed to another thread: closing *sock* does not close it.
    """
    endpoint = f"inproc://posttroll-monitor-{next(_monitor_numbers)}"
    monitor: zmq.Socket[bytes] = sock.context.socket(zmq.PAIR)
    _keep_monitor(monitor, sock)
    monitor.linger = 0
    monitor.rcvhwm = 100000  # when it is full, ZeroMQ's own thread waits
    monitor.connect(endpoint)
    # Only now: had no descriptor been left for this end, whoever told the other one of an event would wait for ever.
    try:
        sock.monitor(endpoint, events | zmq.EVENT_MONITOR_STOPPED)
    except BaseException:
        sock.monitor(None, 0)  # first, as it may have begun to tell
        monitor.close(0)
        raise
    return monitor


_kept_monitors: deque[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = deque()


def _keep_monitor(monitor: zmq.Socket[bytes], sock: zmq.Socket[bytes]) -> None:
    """Keep a monitor and its socket until somebody closes them; if they are forgotten, it would be in any order.

    If the monitor is closed first, ZeroMQ's own threads, and whoever closes the socket, wait for ever to tell it of an
    event; no socket of the process would end any more.
    """
    for _ in range(min(len(_kept_monitors), 2)):  # so those that are closed do not pile up
        with suppress(IndexError):  # another thread was faster
            oldest = _kept_monitors.popleft()
            if not oldest[0].closed:
                _kept_monitors.append(oldest)
    _kept_monitors.append((monitor, sock))


_lingering_monitors: list[zmq.Socket[bytes]] = []
_lingering_lock = threading.RLock()  # a signal handler may stop a publisher in the middle of another's stop


def _close_monitor(monitor: zmq.Socket[bytes], timeout: float = 0) -> bool:
    """Close a monitor, but not before its socket is gone (see `_keep_monitor`).

    Waits up to *timeout* seconds for that, and returns whether it is; if not, the monitor is closed by a later call.
    """
    try:
        is_over = _is_over(monitor, timeout)
        if is_over:
            monitor.close(0)
        return is_over
    finally:
        with _lingering_lock:
            for other in [other for other in _lingering_monitors if _is_over(other, 0)]:
                other.close(0)
                _lingering_monitors.remove(other)
            if not monitor.closed:
                _lingering_monitors.append(monitor)


def _is_over(monitor: zmq.Socket[bytes], timeout: float) -> bool:
    """Whether the socket of *monitor* is gone, or goes in *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not monitor.closed:
        if not monitor.poll(max(int((deadline - time.monotonic()) * 1000), 0)):
            return False
        if struct.unpack("=HI", monitor.recv_multipart(_NOBLOCK)[0])[0] == zmq.EVENT_MONITOR_STOPPED:
            return True
    return True


# -- contexts --


class _Context(zmq.Context):  # type: ignore[type-arg]
    """A context that ends although request sockets are kept for the next lookup."""

    def term(self) -> None:
        _idle_sockets.clear()
        super().term()


_contexts: dict[int, _Context] = {}
_contexts_lock = threading.Lock()


def get_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the ZeroMQ context of this process; a forked child gets one of its own."""
    pid = os.getpid()
    with _contexts_lock:
        context = _contexts.get(pid)
        if context is None or context.closed:
            context = _contexts[pid] = _Context()
            context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
            _log("backends.zmq").debug("New ZeroMQ context for process %d", pid)
        return context


def destroy_context(linger: int | None = None) -> None:
    """Close the ZeroMQ context of this process and all its sockets; the next use makes a new one.

    Args:
        linger: Milliseconds that unsent messages may still take; None for what is set on each socket.
    """
    with _contexts_lock:
        context = _contexts.pop(os.getpid(), None)
    if context is not None:
        for sock in list(context._sockets):
            if not sock.closed:
                sock.monitor(None, 0)  # before those who listen to it are gone
        _background.shut_down()
        _lingering_monitors.clear()
        _kept_monitors.clear()
        context.destroy(linger)


class _IdleSockets:
    """Request sockets that wait for the next request: connecting anew takes longer than asking."""

    LIMIT = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[Any, ...], zmq.Socket[bytes]]] = []

    def take(self, key: tuple[Any, ...]) -> zmq.Socket[bytes] | None:
        """Return an idle socket that was put under *key*, if there is one."""
        with self._lock:
            for index, (idle_key, sock) in enumerate(self._idle):
                if idle_key == key and not sock.closed:
                    del self._idle[index]
                    return sock
        return None

    def put(self, key: tuple[Any, ...], sock: zmq.Socket[bytes]) -> None:
        """Keep *sock*, whose last request has been answered, under *key*."""
        with self._lock:
            self._idle.append((key, sock))
            surplus = [self._idle.pop(0)[1] for _ in range(len(self._idle) - self.LIMIT)]
        for old in surplus:
            close_socket(old)

    def clear(self) -> None:
        """Close the sockets of this process; those of a parent are forgotten."""
        with self._lock:
            idle, self._idle = self._idle, []
        for key, sock in idle:
            if key[0] == os.getpid():
                close_socket(sock)

    @staticmethod
    def key(endpoint: str) -> tuple[Any, ...]:
        """Return all that makes a connection to *endpoint* what it is; the place of a name for some seconds only."""
        settings = ("backend", "client_secret_key_file", "server_public_key_file")
        while_it_stays = time.monotonic() // _Resolution.RETRY if _has_name(endpoint) else 0
        return (os.getpid(), endpoint, while_it_stays, *map(config.get, settings))


_idle_sockets = _IdleSockets()


@atexit.register
def _close_idle_sockets() -> None:
    _idle_sockets.clear()


# -- addresses --

_TCP_ADDRESS = re.compile(r"tcp://(\*|\[[0-9A-Za-z:.%_-]{1,253}\]|[0-9A-Za-z_.-]{1,253}):(\d{1,5})", re.ASCII)
_LOCAL_ADDRESS = r"ipc://[^\s\x00-\x1f]{1,107}|inproc://[^\s\x00-\x1f]{1,200}"  # ipc: see unix(7)


def _is_number(host: str) -> bool:
    """Whether *host* is an IPv4 address, or an IPv6 address in brackets, and no name that would have to be resolved."""
    is_bracketed = host.startswith("[")
    with suppress(ValueError):
        return bool(plain_number(host[1:-1] if is_bracketed else host)) and (":" in host) == is_bracketed
    return False


def tcp_address(number: str, port: int) -> str:
    """Return the address of *port* at a host, given as a number."""
    return f"tcp://[{number}]:{port}" if ":" in number else f"tcp://{number}:{port}"


# Of each socket: at which side it has which addresses.
_endpoints: weakref.WeakKeyDictionary[zmq.Socket[bytes], set[tuple[str, str]]] = weakref.WeakKeyDictionary()


def connect(sock: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect *sock* to *endpoint*, by IPv6 if it is such an address."""
    sock.setsockopt(zmq.IPV6, int("[" in endpoint))  # of the next connection only
    sock.connect(endpoint)
    _endpoints.setdefault(sock, set()).add(("getpeername", endpoint))


def disconnect(sock: zmq.Socket[bytes], endpoint: str) -> None:
    """Disconnect *sock* from *endpoint*; if it is not connected, that is ignored."""
    _endpoints.get(sock, set()).discard(("getpeername", endpoint))
    with suppress(zmq.ZMQError):
        sock.disconnect(endpoint)


def _endpoints_of(descriptor: int) -> Iterator[tuple[str, str]]:
    """Yield at which side a socket of the system has which address; raises OSError if it is none."""
    sock = socket.socket(fileno=descriptor)
    try:
        for side in ("getsockname", "getpeername"):
            with suppress(OSError):  # it has no such side
                name = getattr(sock, side)()
                if isinstance(name, str):
                    yield side, f"ipc://{name}"
                elif sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    yield side, tcp_address(name[0].removeprefix("::ffff:"), name[1])
                    yield side, f"tcp://*:{name[1]}"
    finally:
        sock.detach()


@in_forked_child
def _close_inherited() -> None:
    """Close, in a forked child, the connections and ports of the parent, where the system tells of them (Linux).

    They would last as long as the child: the port stays taken, and others do not hear that the parent has closed them.
    """
    ours = {each for sock, endpoints in _endpoints.items() if not sock.closed for each in endpoints}
    _endpoints.clear()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # any other would be set on all sockets that are looked at, for the parent, too
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd") if ours else ():
            with suppress(OSError):  # no socket
                if not ours.isdisjoint(list(_endpoints_of(int(name)))):
                    os.close(int(name))
    socket.setdefaulttimeout(timeout)


def split_tcp_address(address: str) -> tuple[str, int] | None:
    """Return host and port of a ``tcp://`` address, None if it is something else."""
    match = _TCP_ADDRESS.fullmatch(address)
    if match is None or (match[1].startswith("[") and not _is_number(match[1])):
        return None
    return match[1], int(match[2])


@lru_cache(maxsize=64)
def _has_name(address: str) -> bool:
    """Whether the host of *address* has to be asked for, and may be another one tomorrow."""
    tcp = split_tcp_address(address)
    return tcp is not None and tcp[0] != "localhost" and not _is_number(tcp[0])


def is_connectable(address: Any) -> bool:
    """Whether *address* may come from others: only TCP, as inproc and ipc lead into this process and this host."""
    tcp = split_tcp_address(address) if isinstance(address, str) else None
    return tcp is not None and tcp[0] != "*" and 0 < tcp[1] < 65536


def _check_connectable(address: Any) -> str:
    """Return *address*; raises ValueError if no client socket could connect to it."""
    if not (is_connectable(address) or (isinstance(address, str) and re.fullmatch(_LOCAL_ADDRESS, address))):
        raise ValueError(f"Cannot connect to {address!r}: an address looks like 'tcp://hostname:9000'.")
    return cast(str, address)


class _Resolution:
    """Finds out in the background whether the host of an address has a name that resolves.

    ZeroMQ resolves names in the thread that serves all its sockets, where one dead name server would hold up everybody.
    So it is handed numbers only.

    Attributes:
        endpoint: What to connect to, the address with a number for the host; None as long as it is not known.
        endpoints: All that the name stands for just now, that one among them.
        asked: When the name was asked for last.
    """

    RETRY = 5.0
    _free_threads = threading.Semaphore(8)  # anybody can announce any number of names

    def __init__(self, address: str, on_success: Callable[[], None] = lambda: None) -> None:
        tcp = split_tcp_address(address)
        self._host, self._port = tcp or ("", 0)
        self._on_success = on_success
        self._is_asking = False
        self.asked = -self.RETRY
        self.endpoint: str | None = None
        if self._host == "localhost":
            self._host, self.endpoint = "", tcp_address(loopback_address(), self._port)
        elif tcp is None:
            self.endpoint = address
        elif _is_number(self._host):
            self._host, self.endpoint = "", tcp_address(plain_number(self._host.strip("[]")), self._port)
        self.endpoints: tuple[str, ...] = () if self.endpoint is None else (self.endpoint,)
        self.is_name = self.endpoint is None

    def check(self) -> str | None:
        """Return the endpoint; as long as it is not known, ask (again) in the background."""
        if self.endpoint is None:
            self.ask()
        return self.endpoint

    def ask(self, pause: float | None = None) -> bool:
        """Ask (again) in the background, but not *pause* (`RETRY`) seconds after the last time; no number needs it.

        Returns:
            Whether that is done, or not due; False if too many are being asked for just now.
        """
        pause = self.RETRY if pause is None else pause
        is_due = bool(self._host) and not self._is_asking and time.monotonic() - self.asked >= pause
        is_free = is_due and self._free_threads.acquire(blocking=False)
        if is_free:
            self._is_asking = True
            self.asked = time.monotonic()
            try:
                threading.Thread(target=self._resolve, name=f"resolve {self._host}", daemon=True).start()
            except RuntimeError:  # no more threads: asked again later
                self._is_asking = False
                self._free_threads.release()
        return is_free or not is_due

    def _resolve(self) -> None:
        try:
            numbers = _numbers_of(self._host)
        except (OSError, UnicodeError) as error:
            _resolution_log.warning("name", "Host name %s does not resolve (%s), trying again", self._host, error)
        else:
            # Of IPv4 and IPv6 that which is to be preferred: both lead to the same hosts.
            endpoints = tuple(tcp_address(each, self._port) for each in numbers if (":" in each) == (":" in numbers[0]))
            if set(endpoints) != set(self.endpoints):  # they come in another order each time
                self.endpoints = endpoints
                self.endpoint = self.endpoint if self.endpoint in endpoints else endpoints[0]
                self._on_success()
        finally:
            self._is_asking = False
            self._free_threads.release()


_resolution_log = LimitedLogger("backends.zmq")


def _numbers_of(name: str) -> list[str]:
    """Return the addresses of the host *name*, first those that a route leads to, IPv4 before IPv6.

    Raises:
        OSError, UnicodeError: The name does not resolve.
    """
    numbers = {number_of(info[4]) for info in socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)}
    return sorted(numbers, key=lambda number: (source_address(number) is None, ":" in number, number))


# ======================================================================================================================
# 6. Keys and access
#
# Server sockets bind, client sockets connect; with secure_zmq all of them use CURVE.  Who may connect is decided by ZAP
# (https://rfc.zeromq.org/spec/27) in the background loop, as long as a server socket needs it.
# ======================================================================================================================


def generate_keys(args: Sequence[str] | None = None) -> None:
    """Run ``posttroll-generate-keys``: write a pair of CURVE keys, ``NAME.key`` and ``NAME.key_secret``.

    Args:
        args: The command-line arguments; by default those of the process.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="posttroll-generate-keys",
        description="Create a public/secret key pair for the secure zmq backend. This will create two files (in the "
        "current directory if not otherwise specified) with the suffixes '.key' and '.key_secret'. The name of the "
        "files will be the one provided.",
    )
    add_key_arguments(parser)
    try:
        run_generate_keys_command(parser.parse_args(args))
    except OSError as error:
        raise SystemExit(f"posttroll-generate-keys: {error}") from None


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``posttroll-generate-keys``."""
    parser.add_argument("name", help="Name of the file.")
    parser.add_argument("-d", "--directory", default=".", help="Directory to place the keys in.")
    parser.add_argument("--force", action="store_true", help="Overwrite existing keys.")


def run_generate_keys_command(options: argparse.Namespace) -> int:
    """Make a pair of keys for the secure backend.

    Examples:
      posttroll generate-keys server -d ~/keys
    """
    print("\n".join(write_key_pair(options.name, options.directory, options.force)))
    return 0


def write_key_pair(name: str, directory: str | os.PathLike[str] = ".", force: bool = False) -> tuple[str, str]:
    """Write a new pair of CURVE keys in the format of CZMQ certificates.

    Args:
        name: The name of the files, without suffix.
        directory: Where to place them; made if it is not there.
        force: Overwrite existing files.

    Returns:
        The paths of the public (mode 0644) and of the secret file (mode 0600).

    Raises:
        FileExistsError: One of the files exists, and *force* is not set.
        OSError: The files cannot be written.
    """
    public_key, secret_key = (key.decode("ascii") for key in zmq.curve_keypair())
    os.makedirs(directory, mode=0o755, exist_ok=True)
    base = os.path.join(os.fspath(directory), name)
    public_path, secret_path = base + ".key", base + ".key_secret"
    for path in (public_path, secret_path):
        if os.path.lexists(path) and not force:
            raise FileExistsError(errno.EEXIST, "A key exists already, not overwritten without --force", path)
    stamp = f"#   Generated on {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC by posttroll\n"
    public = f'{stamp}#   ZeroMQ CURVE public key, to be given to others\n\ncurve\n    public-key = "{public_key}"\n'
    secret = (
        f"{stamp}#   ZeroMQ CURVE **secret** key: do not give it to anybody\n\n"
        f'curve\n    public-key = "{public_key}"\n    secret-key = "{secret_key}"\n'
    )
    for path, text, mode in ((secret_path, secret, 0o600), (public_path, public, 0o644)):
        target = f"{path}.new-{os.getpid()}" if force else path
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as stream:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)  # whatever the umask
            stream.write(text)
        if force:
            os.replace(target, path)  # a program that reads it just now finds the old key or the new one
    return public_path, secret_path


_KEY_LINE = rb'(?m)^[ \t]*(public|secret)-key[ \t]*=[ \t]*"([^"\s]{40})"[ \t\r]*$'


def _read_keys(path: str) -> dict[str, bytes]:
    """Return the keys ``public`` and ``secret`` of a certificate; raises ValueError or OSError."""
    with open(path, "rb") as stream:
        text = stream.read(65536)
    from zmq.utils import z85

    keys = {kind.decode(): key for kind, key in re.findall(_KEY_LINE, text)}
    for key in keys.values():
        try:
            if len(z85.decode(key)) != 32:
                raise ValueError
        except (KeyError, ValueError, struct.error):
            raise ValueError("a key in it is no Z85 text of 40 characters") from None
    return keys


def configured_backend(name: str | None = None) -> str:
    """Return the backend to use; raises NotImplementedError if there is none of this name."""
    backend = config.get("backend") if name is None else name
    if backend not in ("unsecure_zmq", "secure_zmq"):
        raise NotImplementedError(f"Unknown backend {backend!r}: use 'unsecure_zmq' or 'secure_zmq'.")
    return cast(str, backend)


def load_key(setting: str, kind: str) -> bytes:
    """Return the key in the file of a setting; raises ConfigurationError naming setting and file."""
    path = config.get(setting)
    if path is None:
        raise ConfigurationError(f"Missing config parameter '{setting}', which the backend secure_zmq needs.")
    path = os.path.expanduser(path)
    try:
        key = _read_keys(path)[kind]
        mode = os.stat(path).st_mode & 0o777
    except KeyError:
        raise ConfigurationError(f"{setting}: there is no {kind} key in {path}.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{setting}: cannot read a key from {path}: {error}") from None
    if kind == "secret" and os.name == "posix":
        if mode & 0o077:
            _key_log.warning(
                path, "%s: %s is readable by others (mode %o); run: chmod 600 %s", setting, path, mode, path
            )
    return key


@lru_cache(maxsize=16)
def _public_key(secret: bytes) -> bytes:
    """Return the public key that belongs to *secret*.

    It is remembered, as computing it makes old releases of libzmq (that of pyzmq 22.0) close the source of random
    numbers; if another thread of ZeroMQ needs some just then, for a handshake, the process aborts.
    """
    return zmq.curve_public(secret)


def _load_client_keys(backend: str | None = None) -> dict[str, bytes]:
    """Return the socket options for the keys of a client, none for a plain one; raises ConfigurationError."""
    if configured_backend(backend) != "secure_zmq":
        return {}
    secret = load_key("client_secret_key_file", "secret")
    server = load_key("server_public_key_file", "public")
    return {"curve_secretkey": secret, "curve_publickey": _public_key(secret), "curve_serverkey": server}


def _are_keys_exchanged(keys: Mapping[str, bytes]) -> bool:
    """Whether a client has others than *keys* by now; not while they are just being replaced."""
    with suppress(ConfigurationError):
        return _load_client_keys() != keys
    return False


_key_log = LimitedLogger("backends.zmq.socket")


class ClientKeys:
    """The public keys in a directory, which may change at any time.

    To let a client in takes a look at the one file that has its key, however many there are.  Before one is refused,
    the directory is read again, unless it has been just now: whoever may not come in keeps nobody busy.
    """

    PAUSE = 9  # times as long as the last reading took, until the next
    GRANULARITY = 2.0  # seconds; of the times of files, at worst (FAT)

    def __init__(self, setting: str) -> None:
        path = config.get(setting)
        if path is None:
            raise ConfigurationError(f"Missing config parameter '{setting}', which the backend secure_zmq needs.")
        self.directory = os.path.expanduser(path)
        if not os.path.isdir(self.directory):
            raise ConfigurationError(f"{setting}: {self.directory} is not a directory.")
        self._files: dict[str, tuple[Any, bytes]] = {}  # by path: what changes when the file does, and its key
        self._paths: dict[bytes, str] = {}  # by key: a file that has it
        self._state: Any = None  # what changes when a file is added or removed
        self._next_reading = 0.0

    def __contains__(self, key: bytes) -> bool:
        if self._is_confirmed(key):
            return True
        if key in self._paths or self._state != self._directory_state() or time.monotonic() >= self._next_reading:
            self._read_directory()
        return self._is_confirmed(key)

    def _is_confirmed(self, key: bytes) -> bool:
        """Whether the file in which *key* was found is still the same."""
        path = self._paths.get(key)
        with suppress(OSError):
            return path is not None and _file_state(os.stat(path)) == self._files[path][0]
        return False

    def _directory_state(self) -> Any:
        """Return what changes when a file is added or removed; something new each time, if that cannot be told."""
        with suppress(OSError):
            state = os.stat(self.directory)
            if time.time() - state.st_mtime > self.GRANULARITY:
                return _file_state(state)
        return object()

    def _read_directory(self) -> None:
        begin = time.monotonic()
        self._state = self._directory_state()
        known, self._files, self._paths = self._files, {}, {}
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".key"):
                        _, key = self._files[entry.path] = self._read(entry, *known.get(entry.path, (None, b"")))
                        self._paths[key] = entry.path
        except OSError as error:
            self._paths = {}
            _key_log.warning("directory", "No client is let in: %s", error)
        end = time.monotonic()
        self._next_reading = end + self.PAUSE * (end - begin)

    @staticmethod
    def _read(entry: os.DirEntry[str], known_state: Any, known_key: bytes) -> tuple[Any, bytes]:
        """Return state and public key of a file, as known if it has not changed; no key if it is not to be used."""
        state = None
        try:
            state = _file_state(entry.stat())
            if state == known_state:
                return state, known_key
            return state, _read_keys(entry.path)["public"] if entry.is_file() else b""
        except (OSError, ValueError, KeyError) as error:
            _key_log.warning(
                entry.path, "The client key %s is not used: %s", entry.path, error or "no public key in it"
            )
            # No file descriptors left, or no permission yet: it is read again.
            return None if isinstance(error, OSError) else state, b""


def _file_state(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


# -- who may connect --


_IPC_PEER = r"(?a)[^:]*:\d+:\d+:\d+"  # "localhost" (or nothing), user, group, process


def is_own_address(address: str) -> bool:
    """Whether *address* is one of this host; a name never is, as nobody here can wait until it is resolved."""
    address = address.removeprefix("::ffff:")  # an IPv4 client of a socket for both
    try:
        if is_loopback(address):
            return True
    except ValueError:
        return not address or re.fullmatch(_IPC_PEER, address) is not None
    # A host talks to itself from the address that it talks to.
    return (source_address(address) or "").partition("%")[0] == address.partition("%")[0]


class _AddressList:
    """Addresses, networks and host names.

    The names are resolved in the background, again and again; nobody is let in for one that is not resolved yet.
    """

    REFRESH = 5.0
    PATIENCE = 0.5  # seconds that a server that starts waits for them

    def __init__(self, entries: Sequence[str]) -> None:
        self._networks: list[tuple[Any, str]] = []  # each with its zone, "" for any
        self._names: dict[str, frozenset[str]] = {}
        for entry in entries:
            number, _, rest = entry.partition("%")
            zone, slash, size = rest.partition("/")
            try:
                self._networks.append((self._network((number + slash + size).strip("[]")), zone.strip("]")))
            except ValueError:
                self._names[entry] = frozenset()
        if self._names:
            self._resolve_in_background().join(self.PATIENCE)

    @staticmethod
    def _network(text: str) -> Any:
        """Return the network that *text* is, one of IPv4 in the clothes of IPv6 as what it is."""
        import ipaddress

        network = ipaddress.ip_network(text, strict=False)
        mapped = getattr(network.network_address, "ipv4_mapped", None)
        return network if mapped is None else ipaddress.ip_network(f"{mapped}/{max(network.prefixlen - 96, 0)}")

    def __contains__(self, address: str) -> bool:
        if self._names and not self._thread.is_alive() and time.monotonic() - self._asked > self.REFRESH:
            self._resolve_in_background()
        import ipaddress

        text, _, zone = address.partition("%")
        try:
            number = ipaddress.ip_address(text)
        except ValueError:
            return False
        number = getattr(number, "ipv4_mapped", None) or number
        is_named = any(str(number) in numbers for numbers in self._names.values())
        return is_named or any(number in network and wanted in ("", zone) for network, wanted in self._networks)

    def _resolve_in_background(self) -> threading.Thread:
        self._asked = time.monotonic()
        self._thread = threading.Thread(target=self._resolve, name="resolve clients", daemon=True)
        self._thread.start()
        return self._thread

    def _resolve(self) -> None:
        for name in self._names:
            try:
                self._names[name] = frozenset(str(info[4][0]) for info in socket.getaddrinfo(name, None))
            except (OSError, UnicodeError) as error:
                if getattr(error, "errno", None) == socket.EAI_AGAIN and self._names[name]:
                    continue  # no name server answers just now: what it last said holds
                self._names[name] = frozenset()
                text = "authorized_client_addresses: %r does not resolve (%s), nobody is let in for it"
                _key_log.warning(name, text, name, error)


class AccessRules:
    """Who may connect to a server socket: from which addresses, and with CURVE with which keys."""

    def __init__(self, local_only: bool = False, keys: ClientKeys | None = None) -> None:
        allowed = config.get("authorized_client_addresses")
        self._addresses = None if allowed is None else _AddressList(allowed)
        self._local_only = local_only
        self._keys = keys

    @property
    def lets_everybody_in(self) -> bool:
        """Whether there is nothing to check."""
        return self._addresses is None and not self._local_only and self._keys is None

    def refuses_address(self, address: str) -> bool:
        """Whether nobody may connect from *address*; this host itself always may."""
        if self._addresses is None and not self._local_only:
            return False
        if self._addresses is not None and not self._local_only and address in self._addresses:
            return False
        return not is_own_address(address)

    def refusal(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> str:
        """Return why a client is not let in, empty if it is."""
        if self.refuses_address(address):
            return "this address is not authorized"
        if self._keys is None:
            return ""
        if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return "it does not use CURVE"
        from zmq.utils import z85

        key = z85.encode(credentials[0])
        return "" if key in self._keys else f"its public key {key.decode()} is not in {self._keys.directory}"


class Authenticator:
    """The access rules of one server socket; `stop` it after the socket has been closed."""

    EVENTS = (
        zmq.EVENT_ACCEPTED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(self, control: _AccessControl, domain: bytes) -> None:
        self._control = control
        self._peers: dict[int, str] = {}  # the addresses of those that connect, by descriptor
        self.domain = domain

    def watch(self, sock: zmq.Socket[bytes]) -> None:
        """Log the handshakes that fail on *sock*, until it is closed, or has another monitor."""
        self._control.watch(_open_monitor(sock, self.EVENTS), self._peers)

    def take_event(self, event: int, descriptor: int) -> None:
        """Take an event that another monitor of the socket tells."""
        self._control.take_event_later(self._peers, event, descriptor)

    def stop(self) -> None:
        """Drop the rules."""
        self._control.release(self.domain)


class _AccessControl:
    """Answers the questions of ZeroMQ (ZAP 1.0) whether a client may connect, for all server sockets of a context."""

    ENDPOINT = "inproc://zeromq.zap.01"
    DOMAIN = b"posttroll-"

    def __init__(self) -> None:
        self._rules: dict[bytes, AccessRules] = {}
        self._monitors: set[zmq.Socket[bytes]] = set()
        self._count = 0
        self._log = LimitedLogger("backends.zmq.socket")
        self._context = get_context()
        with ExitStack() as undo:
            self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REP)
            undo.callback(close_socket, self._socket)
            self._loop = _background.join(self)
            undo.callback(_background.dismiss, self, self._loop, self._close)
            self._socket.linger = 0
            self._socket.bind(self.ENDPOINT)
            self._loop.call(partial(self._loop.watch, self._socket, self._take_requests))
            undo.pop_all()

    def add(self, rules: AccessRules) -> Authenticator:
        """Start to apply *rules* to the sockets of a new domain."""
        self._count += 1
        domain = self.DOMAIN + b"%d" % self._count
        self._rules[domain] = rules
        return Authenticator(self, domain)

    def release(self, domain: bytes) -> None:
        """Stop to apply the rules of *domain*, and end with the last one."""
        global _access_control
        with ExitStack() as stack, _access_lock:
            if self._rules.pop(domain, None) is None or self._rules:
                return
            if _access_control is self:
                _access_control = None
            stack.callback(_background.leave, self, self._loop)
            # Still under the lock: the next one can bind the endpoint only when this one has let go of it.
            _background.finish(self._close, self._loop)

    @property
    def is_alive(self) -> bool:
        """Whether it answers, in the context in use."""
        return self._context is get_context() and not self._socket.closed

    def watch(self, monitor: zmq.Socket[bytes], peers: dict[int, str]) -> None:
        """Follow what happens to the connections of a socket; its *monitor* and *peers* now belong to the loop."""
        self._monitors.add(monitor)
        self._loop.call(partial(self._loop.watch, monitor, partial(self._follow, monitor, peers)))

    def take_event_later(self, peers: dict[int, str], event: int, descriptor: int) -> None:
        """Have the loop take an event of a monitor of somebody else."""
        self._loop.call(partial(self._take_event, peers, event, descriptor))

    def _close(self) -> None:
        for sock in (self._socket, *self._monitors):
            self._loop.unwatch(sock)
        for monitor in self._monitors:
            _close_monitor(monitor)
        if not self._socket.closed:
            with suppress(zmq.ZMQError):
                self._socket.unbind(self.ENDPOINT)  # at once: closing alone frees the name some time later
            self._socket.close(0)

    def _take_requests(self) -> None:
        with suppress(zmq.Again):
            for _ in range(100):
                self._answer(self._socket.recv_multipart(_NOBLOCK))

    def _answer(self, request: list[bytes]) -> None:
        """Answer a question: version, request id, domain, address, routing id, mechanism, credentials."""
        if len(request) < 6 or request[0] != b"1.0":
            self._socket.send_multipart([b"1.0", b"", b"500", b"Not ZAP 1.0", b"", b""])
            return
        _, request_id, domain, address_bytes, _, mechanism, *credentials = request
        address = address_bytes.decode("utf-8", "replace").removeprefix("::ffff:")
        reason = "an error, see the log"
        try:
            reason = self._refusal(domain, address, mechanism, credentials)
        finally:  # whatever happens: a question without an answer would hold up all that follow
            # 300: it is told nothing, and tries again later.  After a 400 it would never come back by itself.
            verdict = [b"300", b"Refused"] if reason else [b"200", b"OK"]
            self._socket.send_multipart([b"1.0", request_id, *verdict, b"", b""])
        if reason:
            self._log.warning("refused " + address, "Refused a client at %s: %s", address, reason)

    def _refusal(self, domain: bytes, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> str:
        """Return why a client is not let in, empty if it is."""
        rules = self._rules.get(domain)
        if rules is not None:
            return rules.refusal(address, mechanism, credentials)
        if domain.startswith(self.DOMAIN):
            return "its server has stopped"
        # A socket of the program itself: what it would do without us.
        return "" if mechanism in (b"NULL", b"CURVE") else "nothing checks its credentials"

    def _follow(self, monitor: zmq.Socket[bytes], peers: dict[int, str]) -> None:
        event, descriptor = struct.unpack("=Hi", monitor.recv_multipart()[0])
        if event == zmq.EVENT_MONITOR_STOPPED:
            self._monitors.discard(monitor)
            self._loop.unwatch(monitor)
            monitor.close(0)
        else:
            self._take_event(peers, event, descriptor)

    def _take_event(self, peers: dict[int, str], event: int, descriptor: int) -> None:
        """Take an event of a monitor, and log the peers whose handshake failed before ZAP was asked."""
        if event == zmq.EVENT_ACCEPTED:
            peers[descriptor] = _peer_of(descriptor)
        elif event == zmq.EVENT_DISCONNECTED:
            peer = peers.pop(descriptor, "an unknown address")
            if peers.pop(-1, ""):
                reason = "no CURVE, or the wrong server key"
                self._log.warning("handshake " + peer, "A handshake of %s failed: %s", peer, reason)
        else:
            peers[-1] = "failed"  # the event of the disconnection, which tells whose it was, comes next


def _peer_of(descriptor: int) -> str:
    """Return the address at the other end of a connection, by its file descriptor."""
    try:
        duplicate = os.dup(descriptor)
    except OSError:  # it has been closed already
        return "an unknown address"
    try:
        connection = socket.socket(fileno=duplicate)
        try:
            return number_of(connection.getpeername()).removeprefix("::ffff:")
        finally:
            connection.detach()
    except (OSError, ValueError):
        return "an unknown address"
    finally:
        os.close(duplicate)


_access_control: _AccessControl | None = None
_access_lock = threading.RLock()


_ZAP_ENFORCE_DOMAIN = 93  # of libzmq; pyzmq has no name for it before release 23


@in_forked_child
def _renew_locks_in_child() -> None:
    """Replace what another thread of the parent may have held at the time of a fork."""
    global _contexts_lock, _access_lock, _access_control, _idle_sockets, _lingering_lock
    _lingering_lock = threading.RLock()
    _contexts_lock, _access_lock, _access_control = threading.Lock(), threading.RLock(), None
    _idle_sockets = _IdleSockets()
    _Resolution._free_threads = threading.Semaphore(8)
    _lingering_monitors.clear()
    _kept_monitors.clear()


def _apply_access_rules(sock: zmq.Socket[bytes], rules: AccessRules) -> Authenticator | None:
    """Let only those connect to *sock* whom *rules* let in, before it is bound."""
    global _access_control
    if rules.lets_everybody_in:
        return None
    with _access_lock:
        if _access_control is None or not _access_control.is_alive:
            _access_control = _AccessControl()
        authenticator = _access_control.add(rules)
    sock.setsockopt(zmq.ZAP_DOMAIN, authenticator.domain)
    sock.setsockopt(_ZAP_ENFORCE_DOMAIN, 1)  # nobody gets in while nobody answers
    return authenticator


# -- sockets --


def get_tcp_keepalive_options() -> dict[int, int]:
    """Return the configured ``tcp_keepalive`` options, as ZeroMQ socket options with their values."""
    names = ("tcp_keepalive", "tcp_keepalive_cnt", "tcp_keepalive_idle", "tcp_keepalive_intvl")
    values = {name: config.get(name) for name in names}
    # No system takes zero seconds or probes, and nobody could connect: it is left the choice.
    given = {name: value for name, value in values.items() if value or (value == 0 and name == "tcp_keepalive")}
    return {getattr(zmq, name.upper()): value for name, value in given.items()}


@cache
def _usable_memory() -> int:
    """Return how many bytes of memory this program may use: those of its container, or of the host."""
    paths = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    with suppress(OSError), open("/proc/self/cgroup") as file:
        for group in (line.rstrip("\n").split(":", 2)[2] for line in file):
            paths += [f"/sys/fs/cgroup{group}/memory.max", f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"]
    limits = [2**40]
    for path in dict.fromkeys(paths):
        with suppress(OSError, ValueError), open(path) as file:  # "max" is no number
            limits.append(int(file.read()))
    with suppress(ImportError, OSError, ValueError):
        import resource

        limits += [resource.getrlimit(resource.RLIMIT_AS)[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    return min(limit for limit in limits if limit > 0)  # -1 is no limit


def _default_receive_limit() -> int:
    """Return how many messages of a publisher may lie unread: an eighth of the memory, if they have a kilobyte."""
    return min(200000, _usable_memory() // 8 // 1024)


def _liveness_options(is_limited: bool) -> dict[int, int]:
    """Return the options by which peers are noticed that are gone without a word.

    These are ZMTP heartbeats, or, if the queue of received messages *is limited*, TCP keepalive with the same times: a
    socket whose queue is full reads nothing, so it takes its peer for dead, and libzmq (4.3.5) then aborts the process.
    """
    interval, timeout = config.get("zmtp_heartbeat_interval"), config.get("zmtp_heartbeat_timeout")
    if not interval:
        return {}
    if is_limited:
        # What Linux takes; with more, nobody could connect: 32,767 seconds, 127 probes.
        seconds = min(max(int(interval), math.ceil(timeout / 127), 1), 32767)
        return {
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: seconds,
            zmq.TCP_KEEPALIVE_INTVL: seconds,
            zmq.TCP_KEEPALIVE_CNT: max(int(timeout / seconds), 1),
            zmq.TCP_MAXRT: int(1000 * timeout),  # the same while something sent is not acknowledged
        }
    milliseconds = int(1000 * timeout)
    return {
        zmq.HEARTBEAT_IVL: int(1000 * interval),
        zmq.HEARTBEAT_TIMEOUT: milliseconds,
        zmq.HEARTBEAT_TTL: min(milliseconds, 6553500),
    }


def _new_socket(socket_type: int, options: Mapping[Any, Any] | None) -> zmq.Socket[bytes]:
    """Return a socket with the options that all of ours have, and *options*."""
    sock = get_context().socket(socket_type)
    with on_failure(sock.close):
        # Now: connections to a port keep what is set when it is bound, and with any other value one that ends together
        # with the socket may keep the context from ever ending (libzmq, issue 3252).  `close` says what is to linger.
        sock.linger = 0
        receive_limit = config.get("receive_high_water_mark", None)
        own: dict[Any, Any] = {
            # What a SUB socket sends are subscriptions, and it drops in silence those that are too many.
            zmq.SNDHWM: 0 if socket_type == zmq.SUB else config.get("send_high_water_mark"),
            zmq.RCVHWM: _default_receive_limit() if receive_limit is None else receive_limit,
        }
        own.update(options or {})
        general = {
            zmq.RECONNECT_IVL_MAX: 1000,  # less than discovery_seconds
            # The system repeats a lost SYN ever more seldom: begin anew, so that a link that is back is used at once.
            zmq.CONNECT_TIMEOUT: 5000,
            **_liveness_options(own[zmq.RCVHWM] != 0),
            **get_tcp_keepalive_options(),
        }
        for option, value in {**general, **own}.items():
            sock.setsockopt(option, value)
    return sock


def set_up_client_socket(
    socket_type: int, address: str, options: Mapping[Any, Any] | None = None, backend: str | None = None
) -> zmq.Socket[bytes]:
    """Return a new socket that is connected to *address*.

    Args:
        socket_type: For example ``zmq.SUB``.
        address: For example ``"tcp://localhost:9000"``; ``""`` for a socket that is not connected yet.
        options: Socket options and their values.
        backend: ``"unsecure_zmq"`` or ``"secure_zmq"``; by default as configured.

    Raises:
        ConfigurationError: A key for the secure backend is missing or cannot be read.
        NotImplementedError: There is no such backend.
        zmq.ZMQError: The address cannot be used.
    """
    keys = {} if address.startswith("inproc://") else _load_client_keys(backend)
    sock = _new_socket(socket_type, options)
    with on_failure(sock.close):
        for option, key in keys.items():
            setattr(sock, option, key)
        if address:
            connect(sock, address)
    return sock


_HANDSHAKE_MILLISECONDS = 10000  # until a server closes a connection that has not been let in


def set_up_server_socket(
    socket_type: int,
    destination: str,
    options: Mapping[Any, Any] | None = None,
    port_interval: tuple[int | None, int | None] = (None, None),
    backend: str | None = None,
    local_only: bool = False,
) -> tuple[zmq.Socket[bytes], int | None, Authenticator | None]:
    """Return a new socket that is bound to *destination*.

    Args:
        socket_type: For example ``zmq.PUB``.
        destination: For example ``"tcp://*:9000"``; port 0 for a free one.
        options: Socket options and their values.
        port_interval: Lowest and highest (not included) port to choose from, by default as configured.
        backend: ``"unsecure_zmq"`` or ``"secure_zmq"``; by default as configured.
        local_only: Refuse clients from other hosts.

    Returns:
        The socket, its port (None if it is not TCP) and what checks its clients: an object to `stop` after the
        socket has been closed, or None if everybody may connect.

    Raises:
        ConfigurationError: A key for the secure backend is missing or cannot be read.
        NotImplementedError: There is no such backend.
        zmq.ZMQError: The port is taken, or the address cannot be used.
    """
    is_secure = configured_backend(backend) == "secure_zmq" and not destination.startswith("inproc://")
    secret = load_key("server_secret_key_file", "secret") if is_secure else b""
    rules = AccessRules(local_only, ClientKeys("clients_public_keys_directory") if is_secure else None)
    sock = _new_socket(socket_type, options)
    authenticator = None
    try:
        sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MILLISECONDS)
        if is_secure:
            sock.curve_secretkey = secret
            sock.curve_server = True
        authenticator = _apply_access_rules(sock, rules)
        if is_secure and authenticator is not None:
            authenticator.watch(sock)
        port = _bind(sock, destination, port_interval)
    except BaseException:
        close_socket(sock)
        if authenticator is not None:
            authenticator.stop()
        raise
    return sock, port, authenticator


def _bind(sock: zmq.Socket[bytes], destination: str, port_interval: tuple[int | None, int | None]) -> int | None:
    """Bind *sock*, to a free port if that of *destination* is 0; return the port."""
    tcp = split_tcp_address(destination)
    if tcp is None or tcp[1]:
        _bind_to(sock, destination)
        return tcp[1] if tcp else None
    low = config.get("pub_min_port") if port_interval[0] is None else port_interval[0]
    high = config.get("pub_max_port") if port_interval[1] is None else port_interval[1]
    if not 0 < low < high <= 65536:
        raise ConfigurationError(f"No port from {low} up to (not including) {high}: see pub_min_port and pub_max_port.")
    start = random.randrange(low, high)
    for port in chain(range(start, high), range(low, start)):
        try:
            _bind_to(sock, f"tcp://{tcp[0]}:{port}")
            return port
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EADDRINUSE, errno.EACCES):
                raise
    raise zmq.ZMQError(zmq.EADDRINUSE, f"All ports from {low} to {high - 1} are in use (for {destination})")


def _bind_to(sock: zmq.Socket[bytes], address: str) -> None:
    """Bind *sock*, for IPv4 and IPv6; the error names the address, as that of newer releases of pyzmq does."""
    is_for_both = address.startswith("tcp://*")
    sock.setsockopt(zmq.IPV6, int(is_for_both or "[" in address))
    try:
        if os.name == "posix":  # for the names of the interfaces libzmq needs a descriptor, without one it aborts
            os.close(os.dup(cast(int, sock.get(zmq.FD))))
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            if not is_for_both or error.errno in (zmq.EADDRINUSE, errno.EACCES):
                raise
            sock.setsockopt(zmq.IPV6, 0)  # this host may not use IPv6
            sock.bind(address)
        _endpoints[sock] = {("getsockname", address)}
    except (OSError, zmq.ZMQError) as error:
        raise zmq.ZMQError(error.errno, f"{zmq.strerror(error.errno or 0)} (addr={address!r})") from None


class SocketReceiver:
    """Receives messages from several sockets."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def register(self, sock: zmq.Socket[bytes]) -> None:
        """Start to listen to *sock*."""
        self._poller.register(sock, _POLLIN)

    def unregister(self, sock: zmq.Socket[bytes]) -> None:
        """Stop to listen to *sock*."""
        self._poller.unregister(sock)

    def receive(
        self, *sockets: zmq.Socket[bytes], timeout: float | None = None
    ) -> Iterator[tuple[Message, zmq.Socket[bytes]]]:
        """Wait for messages on the registered sockets, and yield one from each of *sockets* that has one.

        Args:
            *sockets: The sockets to receive from.
            timeout: How long to wait, in seconds; None for ever.

        Yields:
            The message and the socket that it came from.

        Raises:
            TimeoutError: Nothing came in time.
            MessageError: What came is not a message.
        """
        ready = dict(self._poller.poll(None if timeout is None else max(int(timeout * 1000), 0)))
        if not ready:
            raise TimeoutError("Did not receive anything on sockets.")
        for sock in sockets:
            if ready.get(sock, 0) & _POLLIN:
                yield Message.decode(sock.recv(_NOBLOCK)), sock


# ======================================================================================================================
# 7. Asking the nameserver
#
# A lookup is a request message on the nameserver's port, answered by a list of addresses.
# ======================================================================================================================


get_configured_nameserver_port = get_configured_unsecure_zmq_nameserver_port


Hosts = Union[str, Sequence[str], bool, None]


def hosts_to_ask(nameserver: Hosts) -> list[str]:
    """Return the nameservers to ask, none for False.

    The default (None, or the text ``localhost``) stands for the configured `nameserver`, else for this host.
    """
    return _hosts_or_configured(nameserver, "nameserver", ["localhost"]) or []


def hosts_to_register_with(nameservers: Hosts) -> list[str] | None:
    """Return the nameservers to register a publisher with: None for multicast, an empty list for nowhere.

    The default (nothing, or the text ``localhost``) stands for the configured `nameservers`, else for multicast (or
    this host).  Only False is multicast whatever is configured.
    """
    return None if nameservers is False else _hosts_or_configured(nameservers or None, "nameservers", None)


def _hosts_or_configured(given: Hosts, key: str, default: list[str] | None) -> list[str] | None:
    """Return the hosts *given*; if that is the default, those that are configured under *key*, else *default*."""
    if given is None or given is True or given == "localhost":
        configured = config.get(key)
        if configured is not None:
            return cast("list[str]", configured)
        return ["localhost"] if given == "localhost" else default
    return [] if given is False else [given] if isinstance(given, str) else list(given)


@lru_cache(maxsize=64)
def _endpoint_at(host: str, port: int) -> str:
    """Return the address at *host*, given as ``host``, or as ``host:port`` for another port than *port*."""
    host = host.strip()
    if "://" in host:
        return _check_connectable(host)
    if host.count(":") > 1 and _is_number(f"[{host}]"):
        return f"tcp://[{host}]:{port}"
    name, _, own_port = host.rpartition(":")
    has_port = own_port.isdigit() and name and not name.endswith(":")
    return _check_connectable(f"tcp://{host}" if has_port else f"tcp://{host}:{port}")


def lookup_endpoint(nameserver: str) -> str:
    """Return the address on which *nameserver* answers lookups."""
    secure_port = config.get("secure_zmq_nameserver_port") if configured_backend() == "secure_zmq" else None
    return _endpoint_at(nameserver, secure_port or get_configured_nameserver_port())


@lru_cache(maxsize=64)
def lookup_request(service: str) -> bytes:
    """Return the lookup for the publishers of *service*, in the version that every nameserver understands.

    It is made once (so its time is an old one, of which no nameserver takes note), as that takes long beside the rest.
    """
    return Message("/oper/ns", "request", {"service": service}, version="v1.01").encode().encode()


def addresses_in(answer: bytes) -> list[dict[str, Any]]:
    """Return the entries of a nameserver's answer that can be used; a broken answer has none."""
    try:
        entries = Message.decode(answer).data
    except MessageError as error:
        _lookup_log.warning("answer", "Skipped an answer that is no message: %s", error)
        return []
    if not isinstance(entries, list):
        return []
    good = [entry for entry in entries if isinstance(entry, dict) and is_connectable(entry.get("URI"))]
    if len(good) < len(entries):
        _lookup_log.warning("entries", "Skipped %d broken entries of an answer", len(entries) - len(good))
    # A nameserver of the known package keeps a goodbye as one without services.
    good = [entry for entry in good if entry.get("service") != []]
    for entry in good:
        heard = entry.get("receive_time")
        if isinstance(heard, datetime) and not heard.tzinfo:  # in UTC, but an answer of version v1.01 cannot tell
            entry["receive_time"] = heard.replace(tzinfo=timezone.utc)
    return good


_lookup_log = LimitedLogger("ns")


def ask_nameserver(endpoint: str, request: bytes, timeout: float) -> bytes | None:
    """Return the answer to *request*, None if there is none in *timeout* seconds."""
    deadline = time.monotonic() + timeout
    key = _idle_sockets.key(endpoint)
    sock = _idle_sockets.take(key)
    is_fresh = sock is None
    while True:
        if sock is None:
            number = _await_number(endpoint, deadline)
            if number is None:
                return None
            sock = set_up_client_socket(zmq.REQ, number)
        # A kept connection may have died unnoticed: do not spend all the time on it.
        patience = deadline - time.monotonic() if is_fresh else min(timeout / 2, 1.0)
        answer = _answer_on(sock, request, patience)
        if answer is not None:
            _idle_sockets.put(key, sock)
            return answer
        close_socket(sock)
        if is_fresh:
            return None
        sock, is_fresh = None, True


def _await_number(endpoint: str, deadline: float) -> str | None:
    """Return *endpoint* with the number of its host, None if its name does not resolve until *deadline*."""
    is_known = threading.Event()
    resolution = _Resolution(endpoint, is_known.set)
    while resolution.check() is None and time.monotonic() < deadline:
        is_known.wait(max(min(deadline - time.monotonic(), _Resolution.RETRY), 0))
    return resolution.endpoint


def _answer_on(sock: zmq.Socket[bytes], request: bytes, timeout: float) -> bytes | None:
    """Send *request* on a REQ socket and return its answer, None if it does not come in *timeout* seconds."""
    with on_failure(partial(close_socket, sock)), suppress(zmq.Again):
        sock.send(request, _NOBLOCK)
        sock.setsockopt(zmq.RCVTIMEO, max(int(timeout * 1000), 0))
        return sock.recv_multipart()[0]
    return None


def get_pub_address(name: str, timeout: float = 10, nameserver: Hosts = "localhost") -> list[dict[str, Any]]:
    """Get the addresses of the publishers of the service *name*.

    Args:
        name: Name or alias of the publisher, ``""`` for all publishers.
        timeout: How long to wait for the nameserver, in seconds.
        nameserver: The host of the nameserver, ``host:port`` if it answers on another port than configured, or a
            list of them: then the answers are merged, and one that answers is enough (the log tells of the others).
            The default stands for the configured `nameserver`.

    Returns:
        A dictionary for each publisher, with its address as ``"URI"``; none if the nameserver knows none.

    Raises:
        TimeoutError: No nameserver answered in time.
        ConfigurationError: The secure backend is not set up.
    """
    request = lookup_request(name)
    endpoints = {host: lookup_endpoint(host) for host in hosts_to_ask(nameserver)}
    if len(endpoints) == 1:
        [endpoint] = endpoints.values()
        answer = ask_nameserver(endpoint, request, timeout)
        answers = {} if answer is None else {endpoint: answer}
    else:
        answers = _ask_all(endpoints.values(), request, timeout)
    silent = ", ".join(host for host, endpoint in endpoints.items() if endpoint not in answers)
    if endpoints and not answers:
        raise TimeoutError(f"Didn't get an address after {timeout} seconds: no answer from the nameserver on {silent}.")
    if silent:
        _lookup_log.warning("silent", "No answer from the nameserver on %s: what is known is what others know", silent)
    return list({entry["URI"]: entry for answer in answers.values() for entry in addresses_in(answer)}.values())


def describe_nameserver(nameserver: str = "localhost", timeout: float = 10) -> dict[str, Any]:
    """Ask a nameserver about itself.

    Args:
        nameserver: Its host, or ``host:port`` if it answers on another port than configured.
        timeout: How long to wait for it, in seconds.

    Returns:
        Its ``"version"``; nothing if it tells nothing, as other implementations.

    Raises:
        TimeoutError: It did not answer in time.
        ConfigurationError: The secure backend is not set up.
    """
    question = {"service": "about the nameserver", "about": True}  # for others, a service that nobody has
    request = Message("/oper/ns", "request", question, version="v1.01").encode().encode()
    answer = ask_nameserver(lookup_endpoint(nameserver), request, timeout)
    if answer is None:
        raise TimeoutError(f"no answer from the nameserver on {nameserver} after {timeout:g} s.")
    about = Message.decode(answer).data
    return about if isinstance(about, dict) else {}


def _ask_all(endpoints: Iterable[str], request: bytes, timeout: float) -> dict[str, bytes]:
    """Ask several nameservers at once, and return the answers; those that are down take no time from the others.

    Once one has answered, the rest have as long again as it took, and at least a second: a far one needs some four
    round trips for a new connection and its answer.
    """
    unresolved = {endpoint: _Resolution(endpoint) for endpoint in endpoints}
    sockets: dict[zmq.Socket[bytes], str] = {}
    answers: dict[str, bytes] = {}
    poller = zmq.Poller()
    start = time.monotonic()
    deadline = start + timeout
    try:
        while len(answers) < len(sockets) + len(unresolved) and time.monotonic() < deadline:
            for endpoint in [each for each, resolution in unresolved.items() if resolution.check() is not None]:
                sock = set_up_client_socket(zmq.REQ, cast(str, unresolved.pop(endpoint).endpoint))
                sockets[sock] = endpoint
                sock.send(request, _NOBLOCK)
                poller.register(sock, _POLLIN)
            left = deadline - time.monotonic()
            for sock, _ in cast("Any", poller.poll(max(int((min(left, 0.02) if unresolved else left) * 1000), 1))):
                answers[sockets[sock]] = sock.recv_multipart(_NOBLOCK)[0]
                poller.unregister(sock)
                deadline = min(deadline, time.monotonic() + max(time.monotonic() - start, 1.0))
    finally:
        for sock in sockets:
            close_socket(sock)
    return answers


def get_pub_addresses(
    names: Sequence[str] | str | None = None, timeout: float = 10, nameserver: Hosts = "localhost"
) -> list[dict[str, Any]]:
    """Get the addresses of the publishers of several services.

    Args:
        names: Names or aliases of the publishers, by default all publishers.
        timeout: How long to wait for the nameserver, in seconds, for each name.
        nameserver: As for `get_pub_address`.

    Raises:
        TimeoutError: No nameserver answered in time.
    """
    services = [""] if names is None else [names] if isinstance(names, str) else list(names)
    found: list[dict[str, Any]] = []
    for service in services:
        found += get_pub_address(service, timeout=timeout, nameserver=nameserver)
    return found


# ======================================================================================================================
# 8. Announcing an address
#
# A publisher tells where it is, again and again: by multicast to all nameservers, or by request to listed ones.  When
# it stops, it tells that too.  All of it runs in the background loop.
# ======================================================================================================================


class _MulticastTarget:
    """Announces by UDP; without a network it tries again the next time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._group = multicast_group(None)  # a wrong group is an error now, a missing network is not
        self._sender: MulticastSender | None = None
        self._log = LimitedLogger("message_broadcaster")

    def open(self, loop: Loop) -> None:
        """Do nothing: the socket is opened when it is used."""

    def own_address(self) -> str | None:
        """Return the address of the interface that is used; None if it leads nowhere, but for a configured one."""
        with suppress(OSError):
            address = self._opened().own_address()
            if address is not None and (config.get("multicast_interface") or not is_loopback(address)):
                return address
        return None

    def _opened(self) -> MulticastSender:
        if self._sender is None:
            self._sender = MulticastSender(self._port, self._group)
        return self._sender

    def announce(self, text: str) -> None:
        """Send *text* to the multicast group."""
        try:
            self._opened()(text)
        except OSError as error:
            self._log.warning("send", "Cannot announce by multicast (trying again): %s", error)
            self.close()

    def say_goodbye(self, text: str, when_done: Callable[[], None]) -> None:
        """Send *text* as the last thing."""
        self.announce(text)
        when_done()

    def close(self) -> None:
        """Close the socket."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class _NameserverTarget:
    """Announces to one nameserver by requests, each of which stands for itself, answered or not."""

    RENEWAL = 30.0  # seconds without an answer, after which the connection is made anew

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._log = LimitedLogger("message_broadcaster")
        self._is_registered = False
        self._pending: bytes | None = None
        self._when_done: Callable[[], None] | None = None  # set once there is a last request
        self._socket: zmq.Socket[bytes] | None = None
        self._connected = ""  # the endpoint
        self._is_closed = False
        self._last_sign = time.monotonic()
        self._is_answered = False  # the last announcement
        self._keys = _load_client_keys()  # what is wrong with them is an error now, not in the loop

    def open(self, loop: Loop) -> None:
        """Use *loop*, and connect once the host name resolves."""
        self._loop = loop
        self._resolution = _Resolution(self._endpoint, partial(loop.call, self._connect))
        self._connect()

    def own_address(self) -> str | None:
        """Return the address of the interface that leads to the nameserver, None if it is on this host, or unknown."""
        tcp = split_tcp_address(self._resolution.endpoint or "")
        address = source_address(tcp[0].strip("[]")) if tcp is not None else None
        return None if address is None or is_loopback(address) else address

    def _connect(self) -> None:
        """Connect to where the nameserver is now, with the keys that there are now; not in the middle of a goodbye."""
        endpoint = None if self._is_closed else self._resolution.check()
        if endpoint is None or self._when_done is not None:
            return
        if endpoint == self._connected and (self._is_answered or not _are_keys_exchanged(self._keys)):
            return
        # REQ_RELAXED: a request may follow one that was never answered.  IMMEDIATE: none waits for a connection.
        options = {zmq.REQ_RELAXED: 1, zmq.REQ_CORRELATE: 1, zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL_MAX: 500}
        try:
            keys = _load_client_keys()
            sock = set_up_client_socket(zmq.REQ, endpoint, options)
        except (ConfigurationError, zmq.ZMQError) as error:  # the keys are being replaced, or no descriptors left
            self._log.warning("open", "Cannot register with %s (trying again): %s", self._endpoint, error)
            return
        self._disconnect()
        self._socket, self._connected, self._keys = sock, endpoint, keys
        self._watch()

    def _disconnect(self) -> None:
        """Close the socket; what was not answered is announced again by the next one."""
        if self._socket is not None:
            self._loop.unwatch(self._socket)
            close_socket(self._socket)
        self._socket, self._connected, self._is_registered = None, "", False

    def _watch(self) -> None:
        if self._socket is not None:
            self._loop.watch(self._socket, self._serve, _POLLIN if self._pending is None else _POLLIN | _POLLOUT)

    def announce(self, text: str) -> None:
        """Have *text* sent as soon as there is a connection."""
        if time.monotonic() - self._last_sign > self.RENEWAL:
            self._log.warning("silence", "No answer from the nameserver at %s, trying again", self._endpoint)
            self._disconnect()
            self._last_sign = time.monotonic()
        self._pending = text.encode()
        self._resolution.ask()  # it may have moved
        self._connect()
        self._is_answered = False
        self._watch()

    def say_goodbye(self, text: str, when_done: Callable[[], None]) -> None:
        """Send *text* as the last thing, and call *when_done* when it has been answered; now if nobody is there."""
        if self._socket is not None and int(cast(int, self._socket.get(zmq.EVENTS))) & _POLLOUT:
            self._when_done = when_done
            self.announce(text)
        else:
            when_done()

    def _serve(self) -> None:
        """Take an answer, send a request."""
        sock = cast("zmq.Socket[bytes]", self._socket)
        if int(cast(int, sock.get(zmq.EVENTS))) & _POLLIN:
            with suppress(zmq.Again):  # it was the answer to an earlier request, which ZeroMQ skips
                self._take_answer(sock.recv_multipart(_NOBLOCK)[0])
        if self._pending is not None:
            with suppress(zmq.Again):
                sock.send(self._pending, _NOBLOCK)
                self._pending = None
                self._watch()

    def _take_answer(self, answer: bytes) -> None:
        self._last_sign = time.monotonic()
        self._is_answered = True
        if self._when_done is not None and self._pending is None:
            self._when_done()
        elif answer == b"ok":
            if not self._is_registered:
                _log("message_broadcaster").debug("Registered with the nameserver at %s", self._endpoint)
            self._is_registered = True
        else:
            self._is_registered = False
            text = "The nameserver at %s did not register us: %s"
            self._log.warning("refused", text, self._endpoint, answer[:200].decode("utf-8", "replace"))

    def close(self) -> None:
        """Close the socket, for good: its name may still be asked for."""
        self._is_closed = True
        self._disconnect()


class MessageBroadcaster:
    """Sends a message again and again, in the background.

    Args:
        msg: The message, as text.
        port: The port to send to: UDP for multicast, TCP for designated receivers.
        interval: Seconds between two messages; with 0 or less nothing is sent.
        designated_receivers: Host names to send requests to; without any, it goes to the multicast group.

    Raises:
        OSError: The multicast group is not valid.
        ConfigurationError: A key for the secure backend is missing or cannot be read.
        ValueError: A receiver is no host name.
    """

    _GOODBYE_SECONDS = 1.0  # that nameservers have to answer the last message

    def __init__(
        self, msg: Any, port: int, interval: float, designated_receivers: str | Iterable[str] | None = None
    ) -> None:
        self._message = str(msg)
        self._port = port
        self._interval = interval
        receivers = [designated_receivers] if isinstance(designated_receivers, str) else designated_receivers
        self._receivers = [_endpoint_at(host, port) for host in dict.fromkeys(receivers or ())]
        if not self._receivers:
            multicast_group(None)
        self._targets: list[Any] = []
        self._loop: Loop | None = None
        self._timer: Timer | None = None
        self._pid = 0
        self._lock = threading.RLock()

    def is_running(self) -> bool:
        """Whether messages are being sent."""
        loop = self._loop
        return loop is not None and not loop.is_stopped and self._pid == os.getpid()

    def start(self) -> MessageBroadcaster:
        """Start the broadcasting."""
        with self._lock:
            if self._interval > 0 and not self.is_running():
                targets: list[Any] = [_NameserverTarget(endpoint) for endpoint in self._receivers]
                self._targets = targets or [_MulticastTarget(self._port)]
                self._pid = os.getpid()
                self._loop = loop = _background.join(self)
                loop.call(partial(self._begin, loop))
        return self

    def _begin(self, loop: Loop) -> None:
        for target in self._targets:
            target.open(loop)
        self._announce(loop)

    def _announce(self, loop: Loop) -> None:
        self._timer = loop.at(time.monotonic() + self._interval, partial(self._announce, loop))
        for target in self._targets:
            target.announce(self._text(target))

    def _text(self, target: Any = None) -> str:
        """Return what to send to *target* now."""
        return self._message

    def _goodbye(self, target: Any) -> str | None:
        """Return what to send to *target* as the last thing, if anything."""
        return None

    def _say_goodbye(self, done: Sequence[threading.Event]) -> None:
        if self._timer is not None:
            self._timer.cancel()  # nothing may follow, however long that takes
        for target, event in zip(self._targets, done):
            text = self._goodbye(target)
            if text is None:
                event.set()
            else:
                target.say_goodbye(text, event.set)

    def stop(self) -> MessageBroadcaster:
        """Stop the broadcasting, and wait until it has ended."""
        if self._pid != os.getpid():
            return self  # the parent stops its own
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is None:
                return self
        try:
            if not loop.is_stopped and not _background.is_here:
                done = [threading.Event() for _ in self._targets]
                loop.call(partial(self._say_goodbye, done))
                deadline = time.monotonic() + self._GOODBYE_SECONDS
                all(event.wait(max(deadline - time.monotonic(), 0)) for event in done)
        finally:  # also after Control-C: else it would be announced on and on
            _background.dismiss(self, loop, self._end)
        return self

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for target in self._targets:
            target.close()
        self._targets = []

    def abandon(self) -> None:
        """Do what `stop` does, without waiting for it and without a goodbye."""
        loop, self._loop = self._loop, None
        if loop is not None and self._pid == os.getpid():
            loop.call(self._end)
            loop.call(partial(_background.leave, self, loop))


class AddressBroadcaster(MessageBroadcaster):
    """Announces the address of a publisher, in the background.

    Args:
        name: The name of the publisher.
        address: Its address; ``tcp://*:PORT`` stands for the configured `announced_address`, else that of the interface
            that leads to whom it is told, looked up each time.
        interval: Seconds between two announcements.
        nameservers: Hosts to register with; without any, those that are configured (`nameservers`), else the
            announcement goes to the multicast group.

    Raises:
        OSError, ConfigurationError, ValueError: As for `MessageBroadcaster`.
    """

    def __init__(self, name: str, address: str, interval: float, nameservers: Hosts = None) -> None:
        self._name = name
        self._address = address
        self._hosts: dict[Any, str] = {}  # of this host, as they were told to the targets
        self._text()  # a name that cannot be announced is an error now, not in the loop
        hosts = hosts_to_register_with(nameservers)
        super().__init__("", config.get("broadcast_port"), 0 if hosts == [] else interval, hosts)

    def _content(self, target: Any) -> dict[str, Any]:
        """Return the data of the announcement to *target*."""
        tcp = split_tcp_address(self._address)
        if tcp is None or tcp[0] != "*":
            return {"URI": self._address}
        host = config.get("announced_address")
        if not host:  # without a target it is only to be seen whether it can be announced
            host = "127.0.0.1" if target is None else self._own_host(target)
        return {"URI": _endpoint_at(host, tcp[1])}

    def _own_host(self, target: Any) -> str:
        """Return the address of this host that leads to *target*, that of before if no descriptors are left to look."""
        host: str = target.own_address() or get_own_ip()
        try:
            socket.socket().close()
        except OSError:
            return self._hosts.get(target, host)
        self._hosts[target] = host
        return host

    def _text(self, target: Any = None) -> str:
        return self._encoded(self._content(target))

    def _goodbye(self, target: Any) -> str | None:
        # No services: so a nameserver that does not know of goodbyes lists it for none either.
        return self._encoded({**self._content(target), "service": [], "status": False})

    def _encoded(self, content: Any) -> str:
        # Every nameserver, however old, must be able to read it: v1.01.
        return Message(f"/address/{self._name}", "info", content, version="v1.01").encode()


class AddressServiceBroadcaster(AddressBroadcaster):
    """Announces the address of a publisher with its services: its name and aliases.

    Args:
        name: The name of the publisher.
        address: Its address; ``tcp://*:PORT`` stands for the configured `announced_address`, else that of the interface
            that leads to whom it is told, looked up each time.
        data_type: The services that it can be found by.
        interval: Seconds between two announcements.
        nameservers: Hosts to register with; without any, those that are configured (`nameservers`), else the
            announcement goes to the multicast group.

    Raises:
        OSError, ConfigurationError, ValueError: As for `MessageBroadcaster`.
    """

    def __init__(
        self,
        name: str,
        address: str,
        data_type: str | Sequence[str],
        interval: float = 2,
        nameservers: Hosts = None,
    ) -> None:
        self._services = [data_type] if isinstance(data_type, str) else list(data_type)
        super().__init__(name, address, interval, nameservers)

    def _content(self, target: Any) -> dict[str, Any]:
        return {
            **super()._content(target),
            "service": self._services,
            "supported_message_version": str(_DEFAULT_VERSION),
            "backend": configured_backend(),
        }


sendaddress = AddressBroadcaster
sendaddressservice = AddressServiceBroadcaster


# ======================================================================================================================
# 9. Publishing
#
# XPUB sockets: unlike PUB they tell who subscribes, and (XPUB_NODROP) that a queue is full.  With XPUB_MANUAL it is us
# who apply the subscriptions, so that it is certain what comes before and after them.
#
# Catching up: a subscriber of ours also subscribes to its mark, which no message begins with.  What is sent under the
# mark goes to that one subscriber alone, wherever the mark has come from (through a proxy, too):
#
#     hello      H <instance> <number> <ends> <port> <before> <turn> <name>  all after number will come
#     live       L <instance> <number>\0<message>            a message that others get otherwise, or not at all
#     caught up  C <instance> <number>\0<message>            a message of the past, which may be there already
#     end        E <instance> <number> <ends> <sent> <gone> <kind>  what was missed up to number has come
#     position   P <instance> <number> <ends> <sent>         all up to number has been sent
#     intact     I <instance> <number>                       all from the hello up to number was sent live
#
# ends: how many ends there were; sent: how many messages were sent under the mark since the last one; gone: how many
# are not in the history any more; kind: 1 if a request had been taken, and 2 more if more is to come;
# port: where it is bound, 0 if not TCP, or behind a proxy; before: what was sent up to that number cannot have come
# over the connection; turn: that of the last request to be greeted again, see below.
# So a subscriber knows what it has, and asks for what it has not.  It answers a hello by a request: it subscribes to
# <mark>/<instance>/<number>+<age>@<time>,<until>/<topics>, for what follows that number, and also (if there is an age)
# for what was not older at that time; all times in milliseconds; until: the number of the hello.
#
# It may be connected more than once over one socket (by two addresses), and then all comes as often.  So there is a
# second mark, the same but for its first character, which comes before the topics; each time that such a connection has
# begun or ended, all of them are told at the same place between the messages, behind which all is sent over each:
#
#     connections  D <instance> <turn> <number>    so many there are now; the turn is another one each time
#     new          N                               this one is new, when there are several
#
# If there are several the first is sent twice: it makes a subscriber look over which connection each message comes.
#
# A proxy that holds a dead connection for alive passes nothing on of the one that took its place, as nothing of it is
# new.  So whoever was not greeted when his connection came up again, or hears publishers through a proxy, subscribes
# to <mark>/again/<turn>, and is greeted once more by all whom that reaches.  How often a connection has come up again
# is the turn: a hello with an older one may have been sent before.
#
# Whoever subscribes to <mark>/? asks who the publisher is and who listens, and is not taken for a subscriber: he gets
# one message under it, <mark>/?\0<JSON>.
# ======================================================================================================================

_MARK = b"~posttroll-subscriber/"  # in alphabetical order behind all topics: so ZeroMQ sends it behind them
_EARLY_MARK = b"!" + _MARK[1:]  # before all topics
_MARK_PATTERN = (
    _MARK + rb"([0-9a-f]{16})/(\d{1,6})"
    rb"(?:/([0-9a-f]{16})/(\d{1,15})\+(\d{1,15})@(\d{1,15}),(\d{1,15})/([^\0]{0,2000}))?"
)
_AGAIN_PATTERN = _MARK + rb"[0-9a-f]{16}/\d{1,6}/again/(\d{1,15})"
_QUESTION_PATTERN = _MARK + rb"[0-9a-f]{16}/\?"


class PublisherStoppedError(RuntimeError, zmq.ZMQError):
    """Sending with a publisher that has been stopped, or needs to be started."""

    def __init__(self, text: str) -> None:
        zmq.ZMQError.__init__(self, zmq.ENOTSOCK, text)


class History:
    """The newest messages of a publisher: at most so many, of so many bytes, and not older.

    Args:
        messages: How many messages to keep; 0 in any of the three for none.
        size: How many bytes they may take.
        seconds: How old they may be.
    """

    OVERHEAD = 170  # bytes that a message takes besides its own
    SUBJECTS = 1000  # that are told apart among messages that are not kept any more

    def __init__(self, messages: int, size: int, seconds: float) -> None:
        self._messages = messages if size and seconds else 0
        self._size = size
        self._seconds = seconds
        self._entries: deque[tuple[float, bytes]] = deque()
        self._limit = self._messages + self._messages // 16  # they are dropped many at once, which costs less
        self.number = 0  # of the newest message
        self.size = 0
        self._gone = 0  # the size of those that are not kept any more
        # How many, by subject and the space behind it, and the newest's number and time.
        self._lost: dict[bytes, tuple[int, int, float]] = {}

    def __len__(self) -> int:
        return min(len(self._entries), self._messages)

    @property
    def first(self) -> int:
        """The number of the oldest message that is kept."""
        return self.number - len(self) + 1

    @property
    def total(self) -> int:
        """The size of all messages that there have been."""
        return self.size + self._gone

    def append(self, data: bytes, now: float) -> None:
        """Keep a message, which was sent *now*."""
        self.number += 1
        entries = self._entries
        entries.append((now, data))
        self.size += len(data) + self.OVERHEAD
        if self.size > self._size or len(entries) > self._limit:
            self._drop(self._messages, self._size)

    def _drop(self, messages: int, size: int) -> None:
        """Forget the oldest, until there are not more, and not larger ones."""
        entries, left, kept = self._entries, len(self._entries), self.size
        number, start, count, when = self.number - left, b"\0", 0, 0.0
        while left and (left > messages or kept > size):
            sent, data = entries.popleft()
            left -= 1
            kept -= len(data) + self.OVERHEAD
            if not data.startswith(start):  # those of one subject that follow each other are counted at once
                self._note_lost(start, count, number, when)
                start, count = data[: data.find(b" ", 0, 256) + 1] or data[:256], 0
            number, count, when = number + 1, count + 1, sent
        self._note_lost(start, count, number, when)
        self._gone += self.size - kept
        self.size = kept

    def _note_lost(self, start: bytes, count: int, number: int, when: float) -> None:
        """Take note of *count* that begin so and are not kept any more; of the newest, its number and time."""
        if count:
            if start not in self._lost and len(self._lost) >= self.SUBJECTS:
                start = b""
            self._lost[start] = self._lost.get(start, (0,))[0] + count, number, when

    def expire(self, now: float) -> float | None:
        """Forget what is too old; return when the next message is, None if there is none."""
        old = sum(1 for _ in takewhile(lambda entry: entry[0] < now - self._seconds, self._entries))
        self._drop(len(self._entries) - old, self._size)
        return self._entries[0][0] + self._seconds if self._entries else None

    def after(self, number: int, count: int) -> list[tuple[int, bytes]]:
        """Return at most *count* messages after the one with *number*, oldest first, with their numbers."""
        first = max(number + 1, self.first)
        start = first - self.number + len(self._entries) - 1
        entries = islice(self._entries, start, start + count)
        return [(first + index, data) for index, (_, data) in enumerate(entries)]

    def last_before(self, when: float) -> int:
        """Return the number of the last message that was sent before *when*."""
        return self.number - sum(1 for _ in takewhile(lambda entry: entry[0] >= when, reversed(self._entries)))

    def _lost_of(self, prefixes: tuple[bytes, ...]) -> list[tuple[int, int, float]]:
        """Return what is known of those that are not kept any more and may begin with one of *prefixes*."""
        return [
            lost
            for start, lost in self._lost.items()
            if start.startswith(prefixes) or any(prefix.startswith(start) for prefix in prefixes)
        ]

    def count_lost(self, after: int, until: int, prefixes: tuple[bytes, ...]) -> int:
        """Return how many between these numbers are not kept any more: those that begin so, or a few more."""
        most = min(self.first - 1, until) - after
        if most <= 0:
            return 0
        spare = len(self._entries) - len(self)  # those are dropped next
        numbered = enumerate(islice(self._entries, spare), self.number - len(self._entries) + 1)
        count = sum(1 for number, (_, data) in numbered if number > after and data.startswith(prefixes))
        count += sum(count for count, number, _ in self._lost_of(prefixes) if number > after)
        return min(count, most)

    def newest_lost_since(self, when: float, prefixes: tuple[bytes, ...]) -> int | None:
        """Return the number of the newest that was sent since *when* and is not kept any more; None if all are kept."""
        return max((number for _, number, sent in self._lost_of(prefixes) if sent >= when), default=None)


class _Departures:
    """Whether connections of a server socket are just ending: then no limit of its queues may be changed.

    libzmq (4.3.5) tells the other end of each connection of the new limit, also of one that the socket has acknowledged
    as ending: its memory is free by then, and the process crashes.  But a monitor is told of a disconnection first.
    The end then takes commands one after another: to the listener, to the session, to the socket (the end of the pipe),
    and its acknowledgement, after which the socket forgets it.  As they are done in order, one more has been done each
    time that libzmq's thread has closed an endpoint that was bound since.  Those within the process (inproc) are not
    told of.

    Args:
        sock: The socket.
        watch: Called with its monitor, when there is one; whenever that has something, `take_events` is to be called.
        authenticator: Who had the monitor of the socket until then, of which there can only be one; None: nobody.
    """

    COMMANDS = 4  # that the end of a connection takes
    TRIES = 5  # as more may end meanwhile
    PATIENCE = 200  # milliseconds for libzmq's thread

    def __init__(
        self, sock: zmq.Socket[bytes], watch: Callable[[zmq.Socket[bytes]], object], authenticator: Authenticator | None
    ) -> None:
        self._socket = sock
        self._watch = watch
        self._authenticator = authenticator
        self._ended, self._over = 1, 0  # how many have been told of (one stands for those of before); how many are over
        self._closed = b""  # the endpoint that was closed last
        self.monitor: zmq.Socket[bytes] | None = None
        self.is_stopped = False  # the monitor, as another one takes its place, or the socket is gone

    def are_over(self) -> bool:
        """Wait until no connection is ending; return False if that takes too long, or cannot be known."""
        if zmq.zmq_version_info() >= (4, 3, 6):
            return True
        with suppress(zmq.ZMQError):  # no descriptor is left
            if self.monitor is None:
                events = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CLOSE_FAILED
                events |= 0 if self._authenticator is None else Authenticator.EVENTS
                self.monitor = _open_monitor(self._socket, events)
                self._watch(self.monitor)
            self.take_events()
            for _ in range(self.TRIES):
                if self._over == self._ended or self.is_stopped:
                    break
                ended = self._ended
                if not all(self._is_thread_through() for _ in range(self.COMMANDS)):
                    break
                if self._ended == ended:
                    self._over = ended
        return self._over == self._ended and not self.is_stopped

    def _is_thread_through(self) -> bool:
        """Wait until libzmq's thread has done what it was told until now; return whether it has."""
        is_linux = sys.platform.startswith("linux")
        self._socket.bind(f"ipc://@posttroll-{os.urandom(8).hex()}" if is_linux else "tcp://127.0.0.1:*")
        endpoint = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0")
        self._socket.unbind(endpoint.decode())
        deadline = time.monotonic() + self.PATIENCE / 1000
        while self._closed != endpoint:
            left = math.ceil(1000 * (deadline - time.monotonic()))
            if left <= 0 or self.monitor is None or not self.monitor.poll(left):
                return False
            self.take_events()
        self._socket.get(zmq.EVENTS)  # has it do what libzmq's thread has told
        self.take_events()
        return True

    def take_events(self) -> None:
        """Take note of what the monitor tells."""
        while self.monitor is not None and not self.is_stopped:
            try:
                data, endpoint = self.monitor.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            event, value = struct.unpack("=Hi", data)
            if event == zmq.EVENT_MONITOR_STOPPED:
                self.is_stopped = True
            elif event in (zmq.EVENT_CLOSED, zmq.EVENT_CLOSE_FAILED):
                self._closed = endpoint
            else:
                if event == zmq.EVENT_DISCONNECTED:
                    self._ended += 1
                if self._authenticator is not None:
                    self._authenticator.take_event(event, value)


class _QueueLimit:
    """How many messages a queue of a publisher may hold, so that they take only so many bytes.

    ZeroMQ counts messages.  So the limit is that of messages of a recent average size; when they get smaller, it
    follows slowly, as the larger ones may still be in a queue.

    Args:
        sock: The socket of the publisher.
        may_change: Called before the limit is changed; whether it may be just now.
    """

    LEAST = 10  # messages

    def __init__(self, sock: zmq.Socket[bytes], may_change: Callable[[], bool]) -> None:
        self._socket = sock
        self._may_change = may_change
        self.is_off = False  # it could not be changed back
        self._most = cast(int, sock.getsockopt(zmq.SNDHWM)) or 2**31 - 1
        self._bytes = config.get("send_high_water_bytes") or _usable_memory() // 8
        self._average = 1.0
        self._count = self._total = 0
        self.limit = self._most

    def adapt(self, count: int, total: int) -> None:
        """Take note that there have been *count* messages of *total* bytes until now."""
        if count > self._count:
            recent = (total - self._total) / (count - self._count)
            self._average = max(recent, 0.9 * self._average)
            self._count, self._total = count, total
        limit = min(self._most, max(int(self._bytes / self._average), self.LEAST))
        if not 0.9 * self.limit <= limit <= 1.1 * self.limit or limit == self._most != self.limit:
            if self._set(limit):
                self.limit, self.is_off = limit, False
        elif self.is_off:
            self.is_off = not self._set(self.limit)

    @contextmanager
    def changed_to(self, limit: int) -> Iterator[bool]:
        """The time in which a queue may hold *limit* messages; whether it could be changed."""
        is_changed = self._set(limit)
        try:
            yield is_changed
        finally:
            self.is_off = self.is_off or is_changed  # first, as Control-C may come in between
            if self.is_off:
                self.is_off = not self._set(self.limit)

    def _set(self, limit: int) -> bool:
        is_free = self._may_change()
        if is_free:
            self._socket.setsockopt(zmq.SNDHWM, limit)
        return is_free


class _Peer:
    """A subscriber of ours, as its publisher sees it."""

    def __init__(self, mark: bytes, topics: int, host: str, before: int) -> None:
        self.mark = mark
        self.before = before  # the number of the last message that was sent before it was here
        self.host = host  # where its connection comes from
        self.topics = topics
        self.connections = 0
        self.is_forwarded = False  # by a proxy
        self.newest = b""  # what is sent under this goes over the newest connection alone; empty: over all
        self.turn = 0  # in which it has asked to be greeted again
        self.greeted = 0.0  # when
        self.has_asked = False  # since then, for what it has not
        self.request = b""  # the last one
        self.hello: int | None = None  # the number that the last hello has told, None: a hello is still to be sent
        self.prefixes: tuple[bytes, ...] = (b"",)
        self.intact = 0  # the number up to which it was told last that all has come since the hello
        self.is_heard = True  # False: what is sent to it may be dropped in silence
        self.is_intact = True  # since the hello its queue was not full
        self.begin()
        self.tell(0)  # the publisher may know better
        self.ends = 0

    def begin(self) -> None:
        """Be up to date: there is nothing to be caught up."""
        self.after: int | None = None  # the number after which to catch up, None: it is up to date
        self.until: int | None = 0  # the last number to catch up, None: as many as there are by then
        self.sent = self.gone = 0
        self.is_answer = False  # to a request of its own, not only to a full queue

    def tell(self, number: int) -> None:
        """Take note that it was told that all up to *number* has been sent."""
        self.told, self._told_sent = number, self.sent

    def fall_behind(self, after: int, until: int | None) -> None:
        """Take note of what is to be caught up."""
        if self.after is None or after < self.after:
            self.after, self.gone = after, 0
        self.until = None if until is None or self.until is None else max(self.until, until)
        self.is_intact = self.is_intact and until is not None

    def miss(self) -> None:
        """Take note that it misses the newest message: that is behind all else to be caught up.

        It catches up from what it was told on: so it can tell copies from messages that were sent several times.
        """
        if self.after is None:
            self.sent = self._told_sent  # what was since comes once more, and counts once
        self.fall_behind(self.told if self.after is None else self.after, None)


def _send_once(sock: zmq.Socket[bytes], topic: bytes, content: bytes) -> None:
    """Send something under a topic to whoever has just subscribed to something, and to nobody else."""
    sock.setsockopt(zmq.SUBSCRIBE, topic)
    with suppress(zmq.Again):
        sock.send(topic + content, _NOBLOCK)
    sock.setsockopt(zmq.UNSUBSCRIBE, topic)


class _EarlyMarks:
    """How many connections subscribers of ours have; they are told when that changes.

    Args:
        sock: The socket of the publisher.
        instance: Its instance.
        is_heard: Called with an early mark; returns whether what is sent under it arrives, or is refused.
        most: How many marks are taken note of.
    """

    def __init__(self, sock: zmq.Socket[bytes], instance: bytes, is_heard: Callable[[bytes], bool], most: int) -> None:
        self._socket = sock
        self._instance = instance
        self._is_heard = is_heard
        self._most = most
        self._turns = count(1)
        self._untold: set[bytes] = set()  # those of which the number has changed, and was not told yet
        self.connections: Counter[bytes] = Counter()

    def take(self, mark: bytes, option: int) -> None:
        """Take note that a connection has begun or ended."""
        if option == zmq.SUBSCRIBE:
            if mark not in self.connections and len(self.connections) >= self._most:
                return
            self._socket.setsockopt(option, mark + b"\0D")
        self.connections[mark] += 1 if option == zmq.SUBSCRIBE else -1
        if self.connections[mark] > 0:
            self._untold.add(mark)
            self.tell()
            if option == zmq.SUBSCRIBE and self.connections[mark] > 1 and mark not in self._untold:
                _send_once(self._socket, mark + b"\0N", b"")
        else:
            del self.connections[mark]
            self._untold.discard(mark)

    def tell_again(self, mark: bytes) -> None:
        """Tell a subscriber once more, if it has several connections: by one of them it may not have come."""
        if self.connections[mark] > 1:
            self._untold.add(mark)
            self.tell()

    def tell(self) -> None:
        """Tell subscribers what is still to be told; once there is room, if a queue is full."""
        for mark in list(self._untold):
            if self._is_heard(mark):
                number = self.connections[mark]
                content = b"%s\0D %s %d %d" % (mark, self._instance, next(self._turns), number)
                with suppress(zmq.Again):
                    for _ in range(min(number, 2)):
                        self._socket.send(content, _NOBLOCK)
                    self._untold.discard(mark)


def _plain_send(sock: zmq.Socket[bytes]) -> Callable[[bytes, int], object]:
    """Return the send of a socket, without what pyzmq adds for other types of sockets: that is half of its time."""
    return super(zmq.Socket, sock).send if type(sock) is zmq.Socket else sock.send


def _property(frame: zmq.Frame, name: str) -> str:
    """Return what is known of the connection that *frame* has come by, empty if nothing is."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # it has not come by TCP
        return ""


class _Listeners:
    """The socket of a publisher and those who listen to it.

    The background loop serves them, and so does whoever sends; the lock says whose turn it is.
    """

    PEERS = 10000
    TOPICS = 1000  # that are told apart
    TURN = 2000  # subscriptions that are taken at once

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        port: int | None,
        lock: Any,
        name: str,
        keeps_history: bool,
        authenticator: Authenticator | None = None,
    ) -> None:
        bounds = [config.get(f"history_{bound}") for bound in ("messages", "bytes", "seconds")]
        self.history = History(*bounds) if keeps_history else History(0, 0, 0)
        self.lock = lock
        self.socket = sock
        self._send = _plain_send(sock)
        self.instance = os.urandom(8).hex().encode()
        self.started = time.monotonic()
        self.dropped = 0
        self.peers: dict[bytes, _Peer] = {}
        self._seen: set[bytes] = set()  # the marks of all that there have been
        self._early_marks = _EarlyMarks(sock, self.instance, self._is_heard, self.PEERS)
        self._serials = count(1)  # of connections
        self._topics = 0
        self._by_topic: Counter[bytes] = Counter()
        self._other_topics = 0  # that are not told apart
        self._arrived = 0  # how many topics have been subscribed to just now, without a mark behind them
        self._begun: set[bytes] = set()  # just now
        self._is_mixed_up = False  # libzmq applies what waits to the connections of others
        self._has_ghosts = False  # somebody may get what it has not subscribed to yet: new ones are taken for gone ones
        self._answering = 0.0  # since when answers are counted
        self._answers = 0
        self._name = "_".join(name.split()).encode() or b"-"
        self._port = port or 0
        self._looked = self._next_look = 0.0
        self._departures = _Departures(sock, self._watch_departures, authenticator)
        self._queue_limit = _QueueLimit(sock, self._departures.are_over)
        self._patience = max(config.get("discovery_seconds"), 0.5)  # seconds that a busy subscriber has to ask
        self._timers: dict[Callable[[], None], Timer | None] = {}
        self._waiting: list[tuple[int, Callable[[], object]]] = []
        self._log = LimitedLogger("publisher")
        self._descriptor = int(cast(int, sock.get(zmq.FD)))
        self.loop = _background.join(self)
        self.loop.call(self._begin)

    def _begin(self) -> None:
        if not self.socket.closed:
            self.loop.watch(self._descriptor, self._take_turn)

    def _watch_departures(self, monitor: zmq.Socket[bytes]) -> None:
        def take_events() -> None:
            with self.lock:
                self._departures.take_events()
                if self._departures.is_stopped:
                    self.loop.unwatch(monitor)
                    monitor.close(0)

        self.loop.call(partial(self.loop.watch_quiet, monitor, take_events))

    @property
    def strangers(self) -> int:
        """How many topics others than subscribers of ours have subscribed to."""
        return max(self._topics - self._own_topics, 0)

    @property
    def _own_topics(self) -> int:
        return sum(peer.topics * peer.connections for peer in self.peers.values())

    @property
    def may_have_strangers(self) -> bool:
        """Whether others may listen, too: a proxy passes on equal topics as one, which may be those of strangers."""
        return self._topics != self._own_topics or any(peer.is_forwarded for peer in self.peers.values())

    @property
    def count(self) -> int:
        """How many subscribers there are now; one of another implementation counts for each of its topics."""
        self._take_subscriptions()
        return len(self.peers) + self.strangers

    @property
    def reached(self) -> int:
        """How many subscribers there have been; of other implementations the topics that are subscribed to now."""
        self._take_subscriptions()
        return len(self._seen) + self.strangers

    def when_there_are(self, count: int, callback: Callable[[], object]) -> Callable[[], None]:
        """Have *callback* called once there are *count* subscribers; return what cancels that."""
        waiting = (count, callback)

        def cancel() -> None:
            with suppress(ValueError):
                self._waiting.remove(waiting)

        self._waiting.append(waiting)
        self._take_subscriptions()
        return cancel

    def _tell_waiting(self) -> None:
        if self._waiting:
            found = len(self.peers) + self.strangers
            for waiting in [waiting for waiting in self._waiting if waiting[0] <= found]:
                with suppress(ValueError):
                    self._waiting.remove(waiting)
                waiting[1]()

    def release_waiting(self) -> None:
        """Call all that waits for subscribers: there will not be any more."""
        waiting, self._waiting = self._waiting, []
        for _, callback in waiting:
            callback()

    def _take_turn(self) -> None:
        """Do what the socket has to be done; called by the loop.

        Whatever uses the socket takes the news of the descriptor: so this follows all other uses, soon.
        """
        with self.lock:
            if self.socket.closed:  # by whom Control-C interrupted as he started
                self.loop.unwatch(self._descriptor)
                return
            self._take_subscriptions()

    def _take_subscriptions(self) -> None:
        """Apply the subscriptions and the ends of subscriptions that have come; tell who waits for them."""
        sock = self.socket
        self._arrived, self._begun = 0, set()
        # Not until zmq.Again: if Control-C comes just then, pyzmq forgets the KeyboardInterrupt.
        for _ in range(self.TURN):
            if not int(cast(int, sock.get(zmq.EVENTS))) & _POLLIN:
                self._is_mixed_up = False
                break
            if self._is_mixed_up:
                sock.setsockopt(zmq.SUBSCRIBE, b"")
                self._has_ghosts = True
            frame = sock.recv(_NOBLOCK, copy=False)
            change = frame.bytes
            if change[:1] in (b"\0", b"\1"):
                self._take_subscription(zmq.SUBSCRIBE if change[:1] == b"\1" else zmq.UNSUBSCRIBE, change[1:], frame)
            else:
                # A message of an XSUB socket.  libzmq (4.3.5) takes it for a subscription when it looks up whose turn
                # it is.  So the turn of each connection that waits behind it comes too early, and the last one's again:
                # they get everything, of which a SUB socket leaves what it has not subscribed to, until none waits.
                self._is_mixed_up = True
        else:
            self.later(0, self._take_subscriptions)  # the rest, which may have no end: whoever sends waits
        self._tell_waiting()

    def _take_subscription(self, option: int, topic: bytes, frame: zmq.Frame) -> None:
        """Apply a subscription or the end of one."""
        if topic.startswith(_MARK):
            match = re.fullmatch(_MARK_PATTERN, topic)
            if match is not None and match[3] is None:
                self._take_mark(topic, int(match[2]), option, frame)
                self._arrived = 0
            elif match is not None and option == zmq.SUBSCRIBE:
                self._take_request(topic[: match.end(2)], match)
            elif option == zmq.SUBSCRIBE and (again := re.fullmatch(_AGAIN_PATTERN, topic)):
                self._greet_again(topic.rpartition(b"/again/")[0], int(again[1]))
            elif option == zmq.SUBSCRIBE and re.fullmatch(_QUESTION_PATTERN, topic):
                self._answer(topic)
            return
        if topic.startswith(_EARLY_MARK):
            match = re.fullmatch(_MARK_PATTERN, _MARK[:1] + topic[1:])
            if match is not None and match[3] is None:
                self._early_marks.take(topic, option)
                self._arrived = 0
            return
        if option == zmq.SUBSCRIBE:
            self._arrived += 1
            self._begun.add(topic)
        elif topic in self._begun and zmq.zmq_version_info() < (4, 3, 5):  # the connection had ended before it was read
            self._has_ghosts = True
        self._count_topic(topic, 1 if option == zmq.SUBSCRIBE else -1)
        if self._is_mixed_up and option == zmq.UNSUBSCRIBE:
            return  # it would be another one's
        if not topic:  # all messages, but not what is sent under the marks of others
            self.socket.setsockopt(option, _MAGICK[:-1].encode())  # with "/" it would end together with just that topic
        elif not _MARK.startswith(topic) and not _EARLY_MARK.startswith(topic):
            self.socket.setsockopt(option, topic)

    def _count_topic(self, topic: bytes, difference: int) -> None:
        if topic in self._by_topic or (difference > 0 and len(self._by_topic) < self.TOPICS):
            self._by_topic[topic] += difference
            if not self._by_topic[topic]:
                del self._by_topic[topic]
        elif self._other_topics + difference < 0:
            return  # the end of what has never begun
        else:
            self._other_topics += difference
        self._topics += difference

    def _take_mark(self, mark: bytes, topics: int, option: int, frame: zmq.Frame) -> None:
        """Take note that a subscriber of ours has come (again), or gone."""
        peer = self.peers.get(mark)
        if option == zmq.UNSUBSCRIBE:
            if peer is not None:
                peer.connections -= 1
                peer.newest = b""  # it may be this that has ended
                if peer.connections <= 0:
                    del self.peers[mark]
            return
        if peer is None:
            if len(self.peers) >= self.PEERS:
                self._log.warning("peers", "More than %d subscribers: one of them will not catch up", self.PEERS)
                return
            host = _property(frame, "Peer-Address").removeprefix("::ffff:")
            # Nothing was sent between its topics and its mark, if they are all here at once, as they mostly are.
            before = self.history.number if self._arrived == topics and not self._has_ghosts else 0
            peer = self.peers[mark] = _Peer(mark, topics, host, before)
            peer.tell(self.history.number)
        if len(self._seen) < self.PEERS:
            self._seen.add(mark)
        peer.connections += 1
        peer.is_forwarded = peer.is_forwarded or _property(frame, "Socket-Type") == "XSUB"
        peer.begin()  # it will ask for what it has not
        self.socket.setsockopt(option, mark + b"\0")
        if peer.connections > 1:
            peer.newest = b"%s/%d" % (mark, next(self._serials))
            self.socket.setsockopt(option, peer.newest + b"\0")
        self._greet(peer)

    def _greet_again(self, mark: bytes, turn: int) -> None:
        peer = self.peers.get(mark)
        if peer is not None:
            peer.turn = turn
            peer.begin()
            self._early_marks.tell_again(_EARLY_MARK[:1] + mark[1:])
            self._greet(peer)

    def _is_heard(self, early_mark: bytes) -> bool:
        peer = self.peers.get(_MARK[:1] + early_mark[1:])
        return peer is None or peer.is_heard

    def _send_to(self, peer: _Peer, content: bytes) -> bool:
        """Send to one subscriber of ours alone; return False if its queue is full.

        If it has several connections, and one of them cannot take it, that may be dead: then only by the newest.
        """
        for topic in filter(None, (peer.mark, peer.newest)):
            with suppress(zmq.Again):
                self.socket.send(topic + b"\0" + content, _NOBLOCK)
                peer.is_intact = peer.is_intact and topic == peer.mark  # else by another it may be told before
                return True
        return False

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Have *callback* called by the loop under the lock in some seconds, unless it is to be already."""

        def call() -> None:
            with self.lock:
                self._timers.pop(callback, None)
                if not self.socket.closed:
                    callback()
                    self._take_turn()

        def schedule() -> None:
            self._timers[callback] = self.loop.at(time.monotonic() + seconds, call)

        if callback not in self._timers:
            try:
                self._timers[callback] = None
                if _background.is_here:
                    schedule()
                else:
                    self.loop.call(schedule)
            except BaseException:  # Control-C: else it would be taken to be due for ever
                self._timers.pop(callback, None)
                raise

    def close(self, linger: int) -> None:
        """Close the socket, if it is not closed; what is queued may still take *linger* milliseconds."""
        if self.socket.closed:
            _background.leave(self, self.loop)
        else:
            _background.dismiss(self, self.loop, partial(self._close, linger))

    def abandon(self, linger: int, authenticator: Authenticator | None) -> None:
        """Do what `close` does, without waiting for it: this thread may hold the lock of another publisher."""

        def close() -> None:
            self._close(linger)
            if authenticator is not None:
                authenticator.stop()
            _background.leave(self, self.loop)

        self.loop.call(close)

    def _close(self, linger: int) -> None:
        with self.lock:
            for timer in self._timers.values():
                if timer is not None:
                    timer.cancel()
            if not self.socket.closed:  # else its descriptor may be another one's by now
                self.loop.unwatch(self._descriptor)
                self.socket.close(linger)
                if self._departures.monitor is not None:
                    self.loop.unwatch(self._departures.monitor)
                    _close_monitor(self._departures.monitor)

    def _greet(self, peer: _Peer) -> None:
        """Greet a subscriber of ours that has come."""
        raise NotImplementedError

    def _take_request(self, mark: bytes, match: re.Match[bytes]) -> None:
        """Take what a subscriber of ours asks for."""
        raise NotImplementedError

    def _answer(self, question: bytes) -> None:
        """Answer somebody who asks about this publisher."""
        raise NotImplementedError


class _Audience(_Listeners):
    """What those who listen to a publisher get, have, and have missed."""

    CHUNK = 200  # messages that one subscriber catches up before the next has its turn
    HOLD_SECONDS = 0.02  # that they keep those waiting who send
    PART = 50000  # messages that it catches up until it is told how many they were
    ANSWERS = 100  # to questions in a second, and what is listed in each
    LOOK_SECONDS = 0.1  # of sending, until subscribers are told what they should have
    LONGEST_PAUSE = 0.1  # seconds until it is tried again whether a full queue has room

    _pause = 0.0

    def __init__(self, *args: Any) -> None:
        self.unsent: deque[bytes] = deque()
        super().__init__(*args)

    def send_soon(self, data: bytes) -> None:
        """Send a message as soon as what this thread does with the socket, and this has interrupted, is done."""
        self.unsent.append(data)
        self.loop.call(self.send_unsent)

    def send_unsent(self) -> None:
        with self.lock:
            while self.unsent and not self.socket.closed:
                self.send(self.unsent.popleft())

    def send(self, data: bytes) -> None:
        """Send a message to those who have subscribed to it."""
        now = time.monotonic()
        if not self._topics and int(cast(int, self.socket.get(zmq.EVENTS))) & _POLLIN:
            self._take_subscriptions()  # to send takes the news that somebody has come: the loop would not hear of it
        if len(data) > 16384:  # a few of them are a lot
            self._queue_limit.adapt(self.history.number, self.history.total)
        self.history.append(data, now)
        try:
            self._send(data, _NOBLOCK)
        except zmq.Again:
            self._send_around_full_queues(data)
        if now > self._next_look:
            self._see_to_look(now)

    def _send_around_full_queues(self, data: bytes) -> None:
        """Send to those whose queue is not full, and count the others.

        Subscribers of ours are asked one by one, by their marks; those that miss it catch up when there is room.
        Strangers have no mark: it goes to all at once, and ZeroMQ drops it in silence where a queue is full, as it does
        what follows until half of that queue is read.  So what they miss is counted only once each time that their
        queue fills up.
        """
        self._take_subscriptions()
        number, missed = self.history.number, 0
        if self.may_have_strangers:
            limit, with_room = self._queue_limit.limit, set()
            # So what follows the probe has room, too:
            with self._queue_limit.changed_to(max(limit - 1, 1)) as is_changed:
                for peer in self.peers.values() if is_changed and limit > 1 else ():
                    if peer.after is None and self._send_to(peer, b"P %s 0 0 0" % self.instance):
                        with_room.add(peer.mark)
            for peer in self.peers.values():
                if peer.mark not in with_room or self._queue_limit.is_off:
                    peer.miss()  # it may be dropped for this one too, and what follows it
                    peer.is_heard = False
            if not self._queue_limit.is_off:  # else it would be dropped for good where nothing is to be read any more
                try:
                    self.socket.setsockopt(zmq.XPUB_NODROP, 0)
                    self.socket.send(data, _NOBLOCK)
                finally:
                    self.socket.setsockopt(zmq.XPUB_NODROP, 1)
            missed = 1
        else:
            content = b"L %s %d\0%s" % (self.instance, number, data)
            for peer in self.peers.values():
                if not data.startswith(peer.prefixes):
                    continue
                if peer.after is None and self._send_to(peer, content):
                    peer.sent += 1
                else:
                    peer.miss()
                    missed += 1
        self.later(0.02, self._catch_up)
        if missed:
            self.dropped += missed
            text = "Publisher %s: the queue of a slow subscriber is full, it misses messages (%d so far)"
            self._log.warning("full", text, self._name.decode(), self.dropped)

    def _hears(self, peer: _Peer) -> bool:
        """Whether what is sent to *peer* arrives, or is refused.

        When a queue was full and its message dropped, ZeroMQ drops what follows, too, until half of the queue is read,
        and does not say so.  Only a queue that it uses again can be full: so make them short, and fill this one.
        """
        if not peer.is_heard:
            with self._queue_limit.changed_to(1) as is_changed:
                probes = (self._send_to(peer, b"P %s 0 0 0" % self.instance) for _ in range(100))
                peer.is_heard = is_changed and not all(probes)
        return peer.is_heard

    def _greet(self, peer: _Peer) -> None:
        """Say hello; later if the queue of *peer* is full."""
        peer.greeted, peer.has_asked = time.monotonic(), False
        peer.hello, number = None, self.history.number
        port = 0 if peer.is_forwarded else self._port
        fields = (self.instance, number, peer.ends, port, peer.before, peer.turn, self._name)
        if self._hears(peer) and self._send_to(peer, b"H %s %d %d %d %d %d %s" % fields):
            peer.hello = peer.intact = number
            peer.is_intact = True
            peer.tell(number)
        else:
            self.later(self.LONGEST_PAUSE, self._catch_up)

    def _see_to_look(self, now: float) -> None:
        """Look now, if the last time was long ago, so that the loop has nothing to do; else have it look soon."""
        if now > self._looked + self.LOOK_SECONDS:
            self._look(now)
            if self._are_told:
                return
        self._look_later()

    def _look_later(self) -> None:
        self._next_look = math.inf  # what is sent until then does not look
        self.later(self.LOOK_SECONDS, self._look_again)

    def _look(self, now: float) -> None:
        """Take note of who has come, and tell subscribers of ours up to which message they should have all."""
        self._looked = now
        self._queue_limit.adapt(self.history.number, self.history.total)
        self._take_subscriptions()
        self._early_marks.tell()
        self._tell_positions(now)
        self._expire()

    def _tell_positions(self, now: float) -> None:
        number = self.history.number
        for peer in self.peers.values():
            if peer.hello is None or number == peer.told:
                continue
            if peer.after is None:
                if not peer.has_asked and now - peer.greeted < self.LOOK_SECONDS:
                    continue  # its request is on its way, and it does not listen to this before that is answered
                if self._send_to(peer, b"P %s %d %d %d" % (self.instance, number, peer.ends, peer.sent)):
                    peer.tell(number)
            elif peer.is_intact and peer.intact != number:  # it catches up, but has missed nothing meanwhile
                if self._send_to(peer, b"I %s %d" % (self.instance, number)):
                    peer.intact = number

    @property
    def _are_told(self) -> bool:
        """Whether all subscribers of ours know up to which message they should have all."""
        return all(peer.told == self.history.number for peer in self.peers.values())

    def _look_again(self) -> None:
        if self._are_told:
            self._next_look = 0.0  # what is sent next sees to it
        else:
            self._look(time.monotonic())
            self._look_later()

    def _expire(self) -> None:
        now = time.monotonic()
        due = self.history.expire(now)
        if due is not None:
            self.later(max(due - now, 10), self._expire)  # many at once

    def _take_request(self, mark: bytes, match: re.Match[bytes]) -> None:
        """Let a subscriber of ours catch up with what it asks for."""
        peer, history = self.peers.get(mark), self.history
        if peer is None or match[3] != self.instance:
            return  # somebody else is asked
        after, age, asked, until = map(int, match.groups()[3:7])
        until = min(until, history.number)
        if peer.hello is None or until < peer.hello:
            return  # that was over an earlier connection; it asks again when it has our hello
        if peer.is_answer and peer.request == match[0]:
            return  # the same over a second, slower connection
        peer.request = match[0]
        peer.prefixes = tuple(match[8].split(b"\n"))
        if age:
            since = self._when_asked(peer, asked / 1000) - age / 1000
            after = min(after, history.last_before(since))
            lost = history.newest_lost_since(since, peer.prefixes)
            if lost is not None:
                after = min(after, 0 if self.started >= since else lost - 1)
        peer.has_asked = True
        peer.fall_behind(min(after, until), until)
        peer.is_answer = True
        self.later(0, self._catch_up)

    def _when_asked(self, peer: _Peer, asked: float) -> float:
        """Return when a request was sent that has come just now, and says it was *asked* then, by its host's clock.

        It was after the hello.  If it cannot have been then, the clocks differ: it may have been as early as that.
        """
        now = time.monotonic()
        sent = now - (time.time() - asked)
        return sent if peer.greeted <= sent <= now else min(peer.greeted, now)

    def _answer(self, question: bytes) -> None:
        now = time.monotonic()
        if now > self._answering + 1:
            self._answering, self._answers = now, 0
        self._answers += 1
        if self._answers > self.ANSWERS:
            return
        known = [(peer.host, peer.prefixes) for peer in islice(self.peers.values(), self.ANSWERS)]
        about = {
            "version": __version__,
            "name": self._name.decode(),
            "subscribers": len(self.peers) + self.strangers,
            "known": [{"host": host, "topics": list(map(_topic_of, prefixes))} for host, prefixes in known],
            "topics": {_topic_of(topic): times for topic, times in self._by_topic.most_common(self.ANSWERS)},
            "sent": self.history.number,
            "kept": len(self.history),
        }
        _send_once(self.socket, question, b"\0" + json.dumps(about).encode())

    def _catch_up(self) -> None:
        """Send to each subscriber a part of what it has to catch up."""
        for peer in self.peers.values():
            if peer.hello is None:
                self._greet(peer)
        behind = [peer for peer in self.peers.values() if peer.after is not None and peer.has_asked]
        is_stuck, deadline = bool(behind), time.monotonic() + self.HOLD_SECONDS
        for peer in behind:
            self.peers[peer.mark] = self.peers.pop(peer.mark)  # so the others come first the next time
            if self._hears(peer) and self._send_past(peer):
                is_stuck = False
            if time.monotonic() > deadline:
                break
        self._pause = min(self._pause + 0.02, self.LONGEST_PAUSE) if is_stuck else 0
        if any(peer.after is not None for peer in behind):
            self.later(self._pause, self._catch_up)

    def _send_past(self, peer: _Peer) -> bool:
        """Send a part of what *peer* has to catch up; return False if there was no room for any of it."""
        history, sent = self.history, peer.sent
        after = cast(int, peer.after)
        until = history.number if peer.until is None else peer.until
        peer.gone += history.count_lost(after, until, peer.prefixes)
        peer.after = max(after, min(history.first - 1, until))
        for number, data in history.after(peer.after, self.CHUNK):
            if number > until:
                break
            if data.startswith(peer.prefixes):
                if not self._send_to(peer, b"C %s %d\0%s" % (self.instance, number, data)):
                    return peer.sent > sent
                peer.sent += 1
            peer.after = number
        if peer.after < until:
            return peer.sent < self.PART or self._end_part(peer)
        fields = (self.instance, until, peer.ends + 1, peer.sent, peer.gone, peer.is_answer)
        if not self._send_to(peer, b"E %s %d %d %d %d %d" % fields):
            return peer.sent > sent
        peer.ends += 1
        peer.begin()
        peer.tell(until)
        self._look_later()  # if more was sent meanwhile, that is still to be told
        return True

    def _end_part(self, peer: _Peer) -> bool:
        """Tell *peer* how much it has got until now; return False if there is no room for that.

        It remembers what has come under its mark, one by one, until it is told how much it was.
        """
        fields = (self.instance, cast(int, peer.after), peer.ends + 1, peer.sent, peer.gone, peer.is_answer + 2)
        if not self._send_to(peer, b"E %s %d %d %d %d %d" % fields):
            return False
        peer.ends += 1
        peer.sent = peer.gone = 0
        return True

    def unserved(self) -> list[tuple[bytes, int | None]]:
        """Return who has to catch up, from where, and who has come so recently that its request is on its way."""
        with self.lock:
            self.send_unsent()
            self._take_subscriptions()
            if any(peer.after is not None for peer in self.peers.values()):
                self.later(0, self._catch_up)  # unless it is to be already, which a Control-C may have prevented
            now = time.monotonic()
            return [
                (mark, peer.after)
                for mark, peer in self.peers.items()
                if peer.after is not None or (not peer.has_asked and now - peer.greeted < self._patience)
            ]

    def count_unasked(self) -> int:
        """Return how many messages subscribers of ours may miss that have not asked for them since they came."""
        with self.lock:
            unasked = [peer for peer in self.peers.values() if not peer.has_asked]
            numbers = [self.history.number if peer.hello is None else peer.hello for peer in unasked]
            return sum(min(number, len(self.history)) for number in numbers)

    def count_left(self) -> int:
        """Return how many messages are queued for subscribers of ours, for all together; some of them may have left."""
        with self.lock:
            return sum(map(self._count_queued, self.peers.values()))

    def _count_queued(self, peer: _Peer) -> int:
        """Return how many messages are queued for a subscriber of ours: try how many it has room for."""
        low, high = 0, max(self.history.number, 1)
        while low < high:
            middle = (low + high) // 2
            with self._queue_limit.changed_to(middle + 1) as is_changed:
                has_room = self._send_to(peer, b"P %s 0 0 0" % self.instance)
            if not is_changed:
                break
            low, high = (low, middle) if has_room else (middle + 1, high)
        return low + (0 if peer.after is None else self.history.number - peer.after)


def _topic_of(prefix: bytes) -> str:
    """Return the beginning of the subjects of what begins with *prefix*."""
    return prefix.decode("utf-8", "replace").removeprefix(_MAGICK)[:200]


class Inquiry:
    """Asks a publisher about itself, without being taken for a subscriber; others than ours do not notice it.

    Args:
        address: The publisher's address.
        backend: ``"unsecure_zmq"`` or ``"secure_zmq"``; by default as configured.

    Raises:
        ConfigurationError: A key for the secure backend is missing or cannot be read.
        zmq.ZMQError: The address cannot be used.
    """

    def __init__(self, address: str, backend: str | None = None) -> None:
        self._socket = set_up_client_socket(zmq.SUB, address, None, backend)

    def ask(self, timeout: float) -> dict[str, Any] | None:
        """Ask, and wait for the answer, at most *timeout* seconds.

        Returns:
            ``version`` and ``name``, how many ``subscribers`` there are, and of those ``known`` (the first 100 of ours)
            ``host`` and ``topics``; how many times each of the ``topics`` is subscribed to, by whomever; how many
            messages were ``sent``, and are ``kept``.  None if there is no answer: it is not there, or is not of ours.
        """
        question = _MARK + os.urandom(8).hex().encode() + b"/?"
        deadline = time.monotonic() + timeout
        self._socket.setsockopt(zmq.SUBSCRIBE, question)
        try:
            while self._socket.poll(max(int(1000 * (deadline - time.monotonic())), 0)):
                answer = self._socket.recv(_NOBLOCK)
                if answer.startswith(question + b"\0"):  # else it is a late one to an earlier question
                    return _read_about(answer[len(question) + 1 :])
        finally:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, question)
        return None

    def close(self) -> None:
        """Close the connection."""
        close_socket(self._socket)


def _read_about(text: bytes) -> dict[str, Any] | None:
    """Return what a publisher tells about itself, None if that cannot be: anybody may be there."""
    try:
        about = json.loads(text)
        known = [{"host": str(each["host"]), "topics": list(map(str, each["topics"]))} for each in about["known"]]
        topics = {topic: int(times) for topic, times in about["topics"].items()}
        numbers = {key: int(about[key]) for key in ("subscribers", "sent", "kept")}
        names = {key: str(about[key]) for key in ("version", "name")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return {**names, **numbers, "known": known, "topics": topics}


def tcp_sockets(port: int | None, state: str) -> Iterator[list[str]]:
    """Yield the fields of /proc/net/tcp (see proc(5)) for the sockets of this host that have a port and a state.

    Raises:
        OSError: This is no Linux, or it does not tell.
    """
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if table == "/proc/net/tcp" or os.path.exists(table):
            with open(table) as lines:
                for fields in map(str.split, lines):
                    if fields[3] == state and int(fields[1].rpartition(":")[2], 16) == port:
                        yield fields


def _unsent_bytes(port: int | None) -> list[str] | None:
    """Return what the system has queued for the connections of a port, None where it does not tell."""
    try:
        queues = [f"{fields[2]} {fields[4][:8]}" for fields in tcp_sockets(port, "01")]
    except (OSError, ValueError, IndexError):
        return None
    return [queue for queue in queues if not queue.endswith(" 00000000")]


class _Ending:
    """The end of a publisher, which waits as long as its queues drain.

    Args:
        audience: Those who listen to it.
        port: Its port, None if it is not TCP.
        name: What to call it in the log.
        patience: Seconds without progress after which it gives up.
    """

    RETURN = 2.0  # seconds that who has lost its connection has to come again

    def __init__(self, audience: _Audience, port: int | None, name: str, patience: float) -> None:
        self._audience = audience
        self._port = port
        self._name = name
        self._patience = patience
        # Since when, and until when, something has been under way to a subscriber, by its mark.
        self._under_way: dict[bytes, tuple[float, float]] = {}
        self.reached = 0  # how many subscribers there have been
        self.left = 0  # how many messages (that is known of) will not arrive

    def drain(self, young: float) -> None:
        """Close the socket when all is sent.

        Args:
            young: Seconds in the life of a publisher in which subscribers may be just finding it.
        """
        audience = self._audience
        if audience.socket.closed:
            audience.close(0)
            return
        self._state()  # who has been there, even if nothing was sent
        if audience.history.number:
            try:
                while time.monotonic() < audience.started + young:
                    time.sleep(min(0.02, max(audience.started + young - time.monotonic(), 0)))
                is_sent = self._wait()
            except BaseException:  # Control-C, once more
                if self._state():
                    self._give_up("interrupted")
                raise
            if not is_sent:
                self._give_up(f"gave up after {self._patience:.0f} s without progress")
                return
        self.left = unasked = audience.count_unasked()
        lost = self._lost(set(audience.peers))
        if lost:
            text = "Publisher %s: ends without %d subscribers whose connections ended while something was under way"
            _log("publisher").warning(text, self._name, len(lost))
        if unasked:
            text = "Publisher %s: ends before a subscriber has asked for what it may have missed: %d messages at most"
            _log("publisher").warning(text, self._name, unasked)
        monitor = None
        with suppress(zmq.ZMQError):  # no descriptors left: what is queued is sent all the same, but not waited for
            monitor = _open_monitor(audience.socket, 0)  # its end tells when the socket is really gone
        audience.close(int(self._patience * 1000))
        if monitor is not None and not _close_monitor(monitor, self._patience):
            _log("publisher").warning("Publisher %s: the last messages are still not sent", self._name)

    def _wait(self) -> bool:
        """Wait until all is sent; return False if nothing goes on any more."""
        state, since = self._state(), time.monotonic()
        while True:
            time.sleep(0.003 if time.monotonic() - since < 0.1 else 0.05)
            before, state = state, self._state()
            if not (state or before):
                return True  # twice nothing: what was sent last has come as far as the system's queue
            if state != before:
                since = time.monotonic()
            elif time.monotonic() - since > self._patience:
                return False

    def _state(self) -> Any:
        """Return what changes as long as the queues drain, something empty when they are."""
        audience = self._audience
        behind = audience.unserved()
        with audience.lock:
            self.reached = audience.reached
            here = set(audience.peers)
        may_be_unsent = self._port and self.reached and audience.history.number
        unsent = _unsent_bytes(self._port) if may_be_unsent else None  # takes a while on a host with many connections
        self._note_under_way(here, here if unsent else {mark for mark, after in behind if after is not None})
        lost = self._lost(here, time.monotonic() - min(self.RETURN, self._patience / 2))
        return (behind, unsent, lost) if behind or unsent or lost else None

    def _note_under_way(self, here: set[bytes], late: set[bytes]) -> None:
        """Take note of those that have not got all; of the others only once that is no sign of a failing connection."""
        now = time.monotonic()
        for mark in late:
            since, _ = self._under_way.get(mark, (now, now))
            self._under_way[mark] = since, now
        for mark in here & self._under_way.keys():
            if now - self._under_way[mark][1] > 0.1:
                del self._under_way[mark]

    def _lost(self, here: set[bytes], start: float = 0) -> list[bytes]:
        """Return who has lost its connection since *start*, when something had been under way to it for a second.

        Who has what it wants may leave at once, with something more on the way.
        """
        under_way = self._under_way.items()
        return [mark for mark, (since, until) in under_way if mark not in here and until > max(since + 1, start)]

    def _give_up(self, reason: str) -> None:
        self.left = self._audience.count_left() or 1
        text = "Publisher %s: %s: %d messages did not reach a subscriber"
        _log("publisher").warning(text, self._name, reason, self.left)
        self._audience.close(0)


def _publisher_options() -> dict[int, Any]:
    """Return the options of a publisher's socket."""
    return {
        zmq.XPUB_MANUAL: 1,
        zmq.XPUB_NODROP: 1,
        zmq.RCVHWM: 0,
        # A subscriber too busy to answer is not dead; to give it up would lose all that is queued for it.  So it is not
        # asked for signs of life.  Nor may it be: if its queue is full, it finds what it was asked when its connection
        # is gone, and libzmq (4.3.5) aborts the process as it tries to answer.
        **_liveness_options(True),
        zmq.HEARTBEAT_IVL: 0,
        zmq.TCP_MAXRT: 0,
        **get_tcp_keepalive_options(),
    }


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Await the end of *function* in another thread."""
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(None, function)


_Self = TypeVar("_Self", bound="_Stoppable")


class _Stoppable:
    """What is started and stopped, by itself or as a context manager; its stop may wait."""

    def start(self: _Self) -> _Self:
        """Start it, and return it."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop it."""
        raise NotImplementedError

    def close(self) -> None:
        """Alias for stop."""
        self.stop()

    def __enter__(self: _Self) -> _Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def __aenter__(self: _Self) -> _Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.stop)


class _Pulse:
    """Sends the heartbeats of a publisher, from the background loop.

    One is sent when there has been none for *interval* seconds.  It does not keep alive a publisher that is dropped.
    """

    def __init__(self, publisher: Publisher, audience: _Audience, interval: float) -> None:
        self._publisher = weakref.ref(publisher)
        self._audience = audience
        self._interval = interval
        self._plan(publisher)

    def _plan(self, publisher: Publisher) -> None:
        due = max(publisher._last_beat or 0, self._audience.started) + self._interval
        self._audience.later(due - time.monotonic(), self._beat)

    def _beat(self) -> None:
        """Send the heartbeat that is due, but not while the publisher stops; called by the loop under the lock."""
        publisher = self._publisher()
        if publisher is not None and not publisher._is_stopped:
            try:
                publisher.heartbeat(self._interval)
            finally:
                self._plan(publisher)


class Publisher(_Stoppable):
    """Publishes messages on an address.

    Args:
        address: The address, for example ``tcp://*:9000``; port 0 is a free one.  With ``localhost`` or an address of
            this host it is reached by that address only, with anything else by all addresses of this host.
        name: The name of the publisher.
        min_port: Lowest port to choose from, by default the configured `pub_min_port`.
        max_port: End of the range to choose from (not included), by default the configured `pub_max_port`.

    It binds at `start`, or else when it is used for the first time.  Sending is thread-safe and never waits.  Its
    newest messages are kept (see the configuration's ``history_messages``), for subscribers that were away.

    Attributes:
        local_only: Refuse subscribers from other hosts; set it before `start`.
        keeps_history: Whether to keep messages at all; set it before `start`.
        heartbeat_interval: Seconds between the heartbeats that it sends by itself, 0 for none; by default (None) the
            configured ones.  Set it before `start`.
        reached: How many subscribers there had been when it stopped, those that had gone again included; of other
            implementations the topics that were subscribed to at the end.
    """

    LINGER_SECONDS = 30.0  # that `stop` waits without progress

    def __init__(self, address: str, name: str = "", min_port: int | None = None, max_port: int | None = None) -> None:
        configured_backend()  # an unknown one is an error now
        self._name = name
        self._address = _bind_address(address)
        self._port_interval = (min_port, max_port)
        self.local_only = False
        self.keeps_history = True
        self.heartbeat_interval: float | None = None
        self._is_announced = False
        self._audience: _Audience | None = None
        self._port: int | None = None
        self._authenticator: Authenticator | None = None
        self._is_stopped = False
        self._stop_due = 0  # the thread that is to stop when it has done what a signal handler has interrupted
        self._lock = threading.RLock()
        self._last_beat: float | None = None
        self._inherited: _Audience | None = None  # that of the parent process, before the fork
        self._ending = threading.RLock()  # held by who stops it
        self._at_end: Callable[[], object] = lambda: None  # called by `stop`, when what was sent has arrived
        self._dropped = 0
        self.reached = 0

    def start(self) -> Publisher:
        """Start the publisher: bind its address.

        Raises:
            zmq.ZMQError: The port is in use, or the address cannot be bound.
            ConfigurationError: The secure backend is not set up.
        """
        with self._lock:
            if self._audience is None and self._inherited is None:
                self._is_stopped = False
                _await_forgotten(self._address)
                self._bind()
                _live_publishers.add(self)
                _stop_at_the_end(os.getpid())
                _log("publisher").info("Publisher for %s started on port %s.", self._address, self._port)
        return self

    def _bind(self) -> None:
        """Bind the address, and let go of it again if anything else is wrong."""
        with ExitStack() as undo:
            interval = config.get("heartbeat_interval") if self.heartbeat_interval is None else self.heartbeat_interval
            sock, port, authenticator = set_up_server_socket(
                zmq.XPUB, self._address, _publisher_options(), self._port_interval, local_only=self.local_only
            )
            if authenticator is not None:
                undo.callback(authenticator.stop)
            undo.callback(close_flushed, sock, 1)  # so the port is free for the next attempt
            audience = _Audience(sock, port, self._lock, self._name or self._address, self.keeps_history, authenticator)
            undo.pop_all()
            undo.callback(audience.abandon, 0, authenticator)
            if interval > 0:
                _Pulse(self, audience, interval)
            self._audience, self._port, self._authenticator = audience, port, authenticator
            undo.pop_all()

    def _open_audience(self) -> _Audience:
        """Return those who listen, after a start if there was none."""
        audience = self._audience
        if audience is None:
            if self._is_stopped:
                text = f"Cannot send: the publisher {self._name or self._address} has been stopped."
                raise PublisherStoppedError(text)
            if self._inherited is not None:
                text = "Cannot send: the publisher was started before the fork, by the parent process."
                raise PublisherStoppedError(text)
            self.start()
            audience = cast(_Audience, self._audience)
        return audience

    def send(self, msg: str | bytes | Message) -> None:
        """Send a message.

        A subscriber whose queue is full (see `send_high_water_mark`) misses it; that is counted in `dropped`, and
        logged; one of ours catches up when it has room.  The other subscribers get it.

        Args:
            msg: An encoded message as str or bytes, or a `Message`.

        Raises:
            PublisherStoppedError: The publisher has been stopped, or was started before a fork, by the parent process;
                it is a RuntimeError and a zmq.ZMQError.
            TypeError: *msg* is something else.
            MessageError: A `Message` that cannot be encoded.
        """
        if type(msg) is str:
            data = msg.encode()
        elif isinstance(msg, Message):
            data = msg.encode().encode()
        elif isinstance(msg, (str, bytes)):
            data = msg.encode() if isinstance(msg, str) else msg
        else:
            raise TypeError(f"send() takes str, bytes or a Message, not {type(msg).__name__}")
        is_within = self._lock._is_owned()  # type: ignore[attr-defined]  # a signal handler, a __del__, a heartbeat
        with self._lock:  # acquire() takes half the time, but a KeyboardInterrupt just behind it would leave it locked
            audience = self._audience
            if audience is None:
                audience = self._open_audience()
            if is_within:
                audience.send_soon(data)
            else:
                if audience.unsent:
                    audience.send_unsent()
                audience.send(data)
        if self._stop_due:
            self._stop_if_due()

    send_string = send

    def heartbeat(self, min_interval: float = 0) -> None:
        """Send a heartbeat, but only if *min_interval* seconds have passed since the last one.

        Those count, too, that it sends by itself (see `heartbeat_interval`).  Whoever listens expects the next one
        within *min_interval* seconds.
        """
        with self._lock:
            now = time.monotonic()
            is_due = self._last_beat is None or now - self._last_beat >= min_interval
            if is_due:
                self._last_beat = now
        if is_due:
            _log("publisher").debug("Publish heartbeat (min_interval is %.1f sec)", min_interval)
            name = "_".join(self._name.split())
            self.send(Message(f"/heartbeat/{name}", "beat", {"min_interval": min_interval}).encode())
        else:
            self._stop_if_due()

    # -- who listens --

    @property
    def dropped(self) -> int:
        """How many times a message found the queue of a subscriber full, or was still queued when `stop` gave up."""
        audience = self._audience
        return self._dropped + (0 if audience is None else audience.dropped)

    @property
    def history_length(self) -> int:
        """How many messages are kept for subscribers that were away."""
        audience = self._audience
        return 0 if audience is None else len(audience.history)

    @property
    def subscriber_count(self) -> int:
        """How many subscribers are connected now; one of another implementation counts for each of its topics."""
        if self._audience is None:
            return 0
        return cast(int, self._use(lambda audience: audience.count))

    def _use(self, function: Callable[[_Audience], Any]) -> Any:
        """Return what *function* does under the lock; a signal handler that stops meanwhile does so after it."""
        with self._lock:
            result = function(self._open_audience())
        self._stop_if_due()
        return result

    def wait_for_subscribers(self, count: int = 1, timeout: float | None = None) -> bool:
        """Wait until subscribers are connected, so that they get the next message.

        Args:
            count: How many.
            timeout: How long to wait, in seconds; None for ever.

        Returns:
            Whether there are as many now.
        """
        found = threading.Event()
        cancel = self._use(lambda audience: audience.when_there_are(count, found.set))
        try:
            found.wait(timeout)
        finally:
            cancel()
        return self.subscriber_count >= count

    async def wait_for_subscribers_async(self, count: int = 1, timeout: float | None = None) -> bool:
        """Do what `wait_for_subscribers` does, in an asyncio program."""
        import asyncio

        loop = asyncio.get_running_loop()
        found = asyncio.Event()

        def there_are() -> None:
            with suppress(RuntimeError):  # its event loop has been closed meanwhile
                loop.call_soon_threadsafe(found.set)

        cancel = self._use(lambda audience: audience.when_there_are(count, there_are))
        try:
            await asyncio.wait_for(found.wait(), timeout)
        except asyncio.TimeoutError:
            pass
        finally:
            cancel()
        return self.subscriber_count >= count

    # -- the end --

    def stop(self) -> None:
        """Stop the publisher; what has been sent until now still arrives.

        It waits as long as the queues drain, and in the first seconds of a publisher's life (`discovery_seconds`) for
        subscribers that are just finding it.  What is left after `LINGER_SECONDS` without progress, or when Control-C
        ends the waiting, is counted in `dropped`, and logged; so is what a subscriber may have missed that came at the
        end, too busy to ask for it.  A publisher that is dropped without it is stopped in the background, which the end
        of the program, and the next publisher on its port, wait for.
        """
        if self._inherited is not None:
            self._inherited, self._is_stopped = None, True  # the parent stops its own
            return
        self._is_stopped = True
        if self._lock._is_owned():  # type: ignore[attr-defined]
            self._stop_due = threading.get_ident()
            return  # in a signal handler, in the middle of something that stops it then
        self._stop_due = 0
        with self._ending, ExitStack() as stack:
            stack.callback(_live_publishers.discard, self)  # last: until then the end of the program waits for it
            stack.callback(self._at_end)
            with self._lock:
                audience = self._audience
                if self._authenticator is not None:
                    stack.callback(self._authenticator.stop)
                if audience is not None:
                    stack.callback(audience.close, 0)  # at once, if it is not yet: Control-C, once more
                self._audience = self._authenticator = None
            if audience is not None:
                self._drain(audience)

    def _stop_if_due(self) -> None:
        if self._stop_due == threading.get_ident():
            self.stop()

    def _drain(self, audience: _Audience) -> None:
        """Wait until what was sent has arrived."""
        audience.release_waiting()
        is_findable = self._is_announced or not self._address.endswith(":0")
        young = config.get("discovery_seconds") if is_findable else 0
        ending = _Ending(audience, self._port, self._name or self._address, self.LINGER_SECONDS)
        try:
            ending.drain(young)
            _log("publisher").debug("Publisher for %s stopped", self._address)
        finally:
            self.reached = ending.reached
            self._dropped += audience.dropped + ending.left

    def __del__(self) -> None:
        # What it has sent arrives all the same.  Nothing may wait here: any thread comes by, whatever locks it holds.
        audience = getattr(self, "_audience", None)
        if audience is not None and not audience.loop.is_stopped:
            heir = object.__new__(Publisher)
            vars(heir).update(vars(self), LINGER_SECONDS=self.LINGER_SECONDS)
            _forgotten.add(heir)
            audience.loop.call(partial(_start_to_end, heir))

    @property
    def name(self) -> str:
        """The name of the publisher."""
        return self._name

    @property
    def address(self) -> str:
        """The address that it binds."""
        return self._address

    @property
    def port_number(self) -> int | None:
        """The port, None as long as it is not bound (or if it is not TCP)."""
        return self._port


_live_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()
_forgotten: set[Publisher] = set()  # what is left of those that were dropped without a stop


def _start_to_end(forgotten: Publisher) -> None:
    with suppress(RuntimeError):  # no more threads: seen to at the end of the program
        threading.Thread(target=_end, args=(forgotten,), name="posttroll end", daemon=True).start()


def _end(publisher: Publisher) -> None:
    """Stop a publisher that nobody has stopped, or wait for the thread that does."""
    with publisher._ending:
        publisher.stop()
        _forgotten.discard(publisher)


def _await_forgotten(address: str) -> None:
    """Wait until forgotten publishers have let go of *address*."""
    for forgotten in list(_forgotten):
        if address.endswith(f":{forgotten._port}" if forgotten._port else forgotten._address):
            _end(forgotten)


@atexit.register
def _stop_live_publishers() -> None:
    """At the end of the program: let those publishers that nobody stopped send what they have, and say goodbye."""
    for publisher in list(_live_publishers):
        _end(publisher)  # another thread may be just stopping it
    for forgotten in list(_forgotten):
        _end(forgotten)


@cache
def _stop_at_the_end(pid: int) -> None:
    """See to it also in a child of `multiprocessing`, which ends without what is registered with `atexit`."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        _stop_with_process(util)
        util.register_after_fork(util, _stop_with_process)  # one that is still being prepared will forget the first


def _stop_with_process(util: Any) -> None:
    if sys.modules["multiprocessing.process"].parent_process() is not None:  # else `atexit` sees to it, in its order
        util.Finalize(None, _stop_live_publishers, exitpriority=-1)


@in_forked_child
def _leave_publishers_to_parent() -> None:
    """In a forked child: the parent stops its own; what is asked of them here must not wait for a thread of its."""
    for publisher in [*_live_publishers, *_forgotten]:
        publisher._lock, publisher._ending = threading.RLock(), threading.RLock()
        publisher._inherited, publisher._audience = publisher._audience, None
    _live_publishers.clear()
    _forgotten.clear()


def _bind_address(address: str) -> str:
    """Return the address to bind for *address*; raises ValueError if there is none."""
    tcp = split_tcp_address(address) if isinstance(address, str) else None
    if tcp is not None and tcp[1] < 65536:
        host = loopback_address() if tcp[0].lower() == "localhost" else tcp[0].strip("[]")
        return tcp_address(host if is_own_address(host) else "*", tcp[1])
    if isinstance(address, str) and re.fullmatch(_LOCAL_ADDRESS, address):
        return address
    raise ValueError(f"Cannot publish on {address!r}: an address looks like 'tcp://*:9000'.")


def close_flushed(sock: zmq.Socket[bytes], timeout: float) -> None:
    """Close *sock*, and wait until what it has queued is sent, or *timeout* seconds."""
    try:
        monitor = _open_monitor(sock, 0)  # its end tells when the socket is really gone
    except zmq.ZMQError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        sock.close()  # what is queued is sent all the same, but not waited for
        return
    sock.close()
    _close_monitor(monitor, timeout)


class NoisyPublisher(_Stoppable):
    """A `Publisher` that announces its own name and address.

    Args:
        name: The name of the publisher, by which subscribers find it.
        port: The port, 0 for a free one.
        aliases: Other names by which it can be found.
        broadcast_interval: Seconds between two announcements.
        nameservers: Hosts of nameservers to register with, each as ``host`` or ``host:port`` (by default the configured
            `broadcast_port`); without any, those of the configuration, else it announces itself by multicast.
        min_port: Lowest port to choose from, by default the configured `pub_min_port`.
        max_port: End of the range to choose from (not included), by default the configured `pub_max_port`.

    Raises:
        ValueError: The name is empty, or has white space or ``/`` in it.
    """

    def __init__(
        self,
        name: str,
        port: int = 0,
        aliases: str | Sequence[str] | None = None,
        broadcast_interval: float = 2,
        nameservers: Hosts = None,
        min_port: int | None = None,
        max_port: int | None = None,
    ) -> None:
        if not _is_field(name) or "/" in name:  # it is announced as the subject /address/NAME
            raise ValueError(f"A publisher needs a name without white space and '/' to be found by, not {name!r}.")
        self._name = name
        self._aliases = [name] + ([aliases] if isinstance(aliases, str) else list(aliases or []))
        self._port = int(port)
        self._broadcast_interval = broadcast_interval
        self._nameservers = nameservers
        self.min_port = min_port
        self.max_port = max_port
        self._publisher: Publisher | None = None
        self._stopped: Publisher | None = None  # the last one
        self._broadcaster: AddressServiceBroadcaster | None = None

    def start(self) -> NoisyPublisher:
        """Start the publisher, and to announce it.

        Raises:
            zmq.ZMQError: The port is in use.
            OSError: The multicast group is not valid.
            ConfigurationError: The secure backend is not set up.
        """
        if self._publisher is None:
            address = f"tcp://*:{self._port}"
            publisher = Publisher(address, name=self._name, min_port=self.min_port, max_port=self.max_port)
            publisher._is_announced = hosts_to_register_with(self._nameservers) != []
            try:
                publisher.start()
                port = publisher.port_number
                if port:
                    self._broadcaster = AddressServiceBroadcaster(
                        self._name, f"tcp://*:{port}", self._aliases, self._broadcast_interval, self._nameservers
                    )
                    self._broadcaster.start()
                    publisher._at_end = self._broadcaster.stop
            except BaseException:
                broadcaster, self._broadcaster = self._broadcaster, None
                if broadcaster is not None:
                    broadcaster.abandon()
                publisher.stop()
                raise
            self._publisher = publisher
        return self

    def _started(self) -> Publisher:
        if self._publisher is None:
            raise PublisherStoppedError(f"The publisher {self._name} is not started.")
        return self._publisher

    def send(self, msg: str | bytes | Message) -> None:
        """Send a message, as `Publisher.send` does; raises RuntimeError before `start`."""
        self._started().send(msg)

    send_string = send

    def heartbeat(self, min_interval: float = 0) -> None:
        """Send a heartbeat, but only if *min_interval* seconds have passed since the last one."""
        self._started().heartbeat(min_interval)

    def wait_for_subscribers(self, count: int = 1, timeout: float | None = None) -> bool:
        """Wait until *count* subscribers are connected, as `Publisher.wait_for_subscribers` does."""
        return self._started().wait_for_subscribers(count, timeout)

    async def wait_for_subscribers_async(self, count: int = 1, timeout: float | None = None) -> bool:
        """Do what `wait_for_subscribers` does, in an asyncio program."""
        return await self._started().wait_for_subscribers_async(count, timeout)

    def stop(self) -> None:
        """Stop the publisher, as `Publisher.stop` does, and then tell the nameservers that it is gone."""
        publisher, self._publisher = self._publisher, None
        broadcaster, self._broadcaster = self._broadcaster, None
        if publisher is None:
            return
        self._stopped = publisher
        try:
            publisher.stop()
        finally:  # if it is due only later, in a signal handler, so is this: `_at_end`
            if broadcaster is not None and publisher._stop_due != threading.get_ident():
                broadcaster.stop()

    @property
    def name(self) -> str:
        """The name of the publisher."""
        return self._name

    @property
    def port_number(self) -> int | None:
        """The port; raises RuntimeError before `start`."""
        return self._started().port_number

    @property
    def dropped(self) -> int:
        """How many messages subscribers missed, as `Publisher.dropped`; after `stop` it tells the last number."""
        publisher = self._publisher or self._stopped
        return 0 if publisher is None else publisher.dropped

    @property
    def reached(self) -> int:
        """How many subscribers there had been when it stopped, as `Publisher.reached`."""
        return 0 if self._stopped is None else self._stopped.reached

    @property
    def subscriber_count(self) -> int:
        """How many subscribers are connected."""
        return self._started().subscriber_count

    @property
    def history_length(self) -> int:
        """How many messages are kept for subscribers that were away."""
        return self._started().history_length


AnyPublisher = Union[Publisher, NoisyPublisher]


class Publish:
    """The publishing context: starts a publisher, and stops it at the end.

    Args:
        name: The name of the publisher.
        port: The port, 0 for a free one.
        aliases: Other names by which it can be found.
        broadcast_interval: Seconds between two announcements.
        nameservers: Hosts of nameservers to register with; without any (None), those of the configuration, else it
            announces itself by multicast; with False and a *port*, it is not announced at all.
        min_port: Lowest port to choose from, by default the configured `pub_min_port`.
        max_port: End of the range to choose from (not included), by default the configured `pub_max_port`.

    Example::

        with Publish("my_service", port=9000) as pub:
            pub.send(Message("/counter", "info", "1").encode())
    """

    def __init__(
        self,
        name: str,
        port: int = 0,
        aliases: str | Sequence[str] | None = None,
        broadcast_interval: float = 2,
        nameservers: Hosts = None,
        min_port: int | None = None,
        max_port: int | None = None,
    ) -> None:
        settings = dict(locals())
        del settings["self"]
        self.publisher = create_publisher_from_dict_config(settings)

    def __enter__(self) -> AnyPublisher:
        # The start of a replaced class may return anything.
        self.publisher.start()
        return self.publisher

    def __exit__(self, *exc_info: object) -> None:
        self.publisher.stop()

    async def __aenter__(self) -> AnyPublisher:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.publisher.stop)


def create_publisher_from_dict_config(settings: Mapping[str, Any]) -> AnyPublisher:
    """Create a publisher (not started) from a dictionary of settings.

    - an ``address`` or a non-zero ``port``, and ``nameservers`` False: a `Publisher` there, not announced anywhere;
    - ``nameservers`` a list of hosts: a `NoisyPublisher` that registers with them;
    - otherwise: a `NoisyPublisher` that registers with the configured `nameservers`, or announces itself by multicast.

    Args:
        settings: ``name`` (needed for the last two), ``port``, ``nameservers``, ``aliases``, ``broadcast_interval``,
            ``min_port``, ``max_port``, as documented for the classes; ``address`` for the first.

    Raises:
        KeyError: There is no name, and the publisher needs one.
        TypeError: There is another key, for a `Publisher`.
        ValueError: The name or the address cannot be used.
    """
    port = settings.get("port") or 0
    if settings.get("nameservers") is False and (port or settings.get("address")):
        known = "address port nameservers name aliases broadcast_interval min_port max_port"
        _refuse_unknown(settings, "Publisher", known)
        own = {key: settings[key] for key in ("min_port", "max_port") if settings.get(key) is not None}
        return Publisher(settings.get("address") or f"tcp://*:{port}", name=settings.get("name", ""), **own)
    if not settings.get("name"):
        raise KeyError("NoisyPublisher requires a name")
    defaults = {"aliases": None, "broadcast_interval": 2, "nameservers": None, "min_port": None, "max_port": None}
    return NoisyPublisher(settings["name"], port=port, **_with_defaults(settings, defaults))


def _with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return those *settings* that have *defaults*."""
    return {key: settings.get(key, default) for key, default in defaults.items()}


def _refuse_unknown(settings: Mapping[str, Any], kind: str, known: str) -> None:
    """Raise TypeError for a key that is none of the *known* ones."""
    unknown = sorted(set(settings) - set(known.split()))
    if unknown:
        raise TypeError(f"{kind} got an unexpected setting {unknown[0]!r}: known are {', '.join(known.split())}.")


# ======================================================================================================================
# 10. Connections
#
# Which addresses are wanted, resolved, connected, alive, and over which socket.  Addresses with the same topics share
# one SUB socket, so a message costs the same however many publishers there are.  And what it has of each publisher.
# ======================================================================================================================


def uptime() -> float:
    """Return the seconds since the host was started; those in which it was suspended count, where that can be told."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _Link:
    """A connection to an endpoint over a socket.

    ZeroMQ itself connects again, but for good gives up a connection whose other side breaks the protocol: another
    program on the port, for a moment, or a publisher with another backend.

    Args:
        begin: Since when its messages are wanted.
        keys: The socket options for the keys that it is made with.
    """

    RENEWAL, LONGEST_RENEWAL = 5.0, 60.0  # seconds until one that ZeroMQ gave up is made anew, first and last

    def __init__(self, begin: float, keys: dict[str, bytes]) -> None:
        self.is_up = False
        self.is_tried = True  # by ZeroMQ itself
        self.may_be_unread = False  # something that has come by it
        self.changed = time.monotonic()
        self.pause = self.RENEWAL
        self.begin = begin
        self.keys = keys
        self.was_up = False
        self.is_greeted = False
        self.index: int | None = None  # of the first message that may have come by it since it was greeted last
        self.descriptor = -1  # of the file, once it is connected

    def take_event(self, event: int) -> None:
        """Take note of what ZeroMQ says of it."""
        if event == zmq.EVENT_CONNECT_RETRIED:
            self.is_tried = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_up = self.is_tried = self.may_be_unread = True
            self.pause = self.RENEWAL
            self.changed = time.monotonic()
        else:
            if self.is_up or self.is_tried:
                self.changed = time.monotonic()
            if self.is_greeted:
                self.index = None
            self.is_up = self.is_tried = self.is_greeted = False

    @property
    def is_given_up(self) -> bool:
        """Whether ZeroMQ has given it up, long enough ago to make it anew."""
        return not self.is_tried and time.monotonic() - self.changed >= self.pause

    def note_renewal(self, keys: dict[str, bytes]) -> None:
        """Take note that it is made anew, with these keys."""
        self.keys = keys
        self.changed = time.monotonic()
        self.pause = min(2 * self.pause, self.LONGEST_RENEWAL)


class _Twins:
    """What has come over several streams of one publisher, each with the same messages: each of them counts once.

    The messages of a stream are in order, so the second that looks the same is the second in all: it is not the copy of
    the first, whichever stream is ahead, and wherever a stream ends.

    Args:
        streams: How many there are, 0 if that is not known.
    """

    LIMIT = 16384  # messages that are recognised when they come once more

    def __init__(self, streams: int = 0) -> None:
        self.streams = streams
        # By message, oldest first: how many times it came over which stream.
        self._counts: OrderedDict[int, dict[Any, int]] = OrderedDict()

    def is_new(self, raw: bytes, stream: Any) -> bool:
        """Whether *raw*, which came over *stream*, has not come as many times over another."""
        digest = _digest(raw)
        counts = self._counts.setdefault(digest, {})
        most = max(counts.values(), default=0)
        counts[stream] = times = counts.get(stream, 0) + 1
        if len(counts) == self.streams and all(other == times for other in counts.values()):
            del self._counts[digest]  # all have it
        elif len(self._counts) > self.LIMIT:
            self._counts.popitem(last=False)
        return times > most


def _without_own_twins(endpoints: Sequence[str]) -> Sequence[str]:
    """Leave out all but the first of this host's own endpoints: a host knows its name by all its addresses."""
    if len(endpoints) < 2:
        return endpoints
    own = [endpoint for endpoint in endpoints if is_own_address(endpoint[6:].rpartition(":")[0].strip("[]"))]
    return [endpoint for endpoint in endpoints if endpoint not in own[1:]]


class _NewLinks:
    """Connections that are up, and of which the publisher has not greeted us yet."""

    def __init__(self) -> None:
        self._links: dict[Any, OrderedDict[str, _Link]] = {}  # by socket and port, and all of a socket; oldest first

    def note(self, sock: zmq.Socket[bytes], endpoint: str, link: _Link) -> None:
        """Take note of what has happened to *link*."""
        for place in ((sock, endpoint.rpartition(":")[2]), (sock, "")):
            links = self._links.setdefault(place, OrderedDict())
            links.pop(endpoint, None)
            if link.is_up and not link.is_greeted:
                links[endpoint] = link
            elif not links:
                del self._links[place]

    def take(self, sock: zmq.Socket[bytes], port: int, is_known: bool) -> _Link | None:
        """Return the oldest of the last 5 s with this port, else the oldest of all of them: it is greeted now.

        If all with this port are older it is the newest of them, whose greeting was read late; the others are not of
        ours, as nobody has greeted us.  One by a publisher that *is_known* has this port, or we have no connection of
        our own to it.
        """
        for place in ((sock, str(port)),) if is_known else ((sock, str(port)), (sock, "")):
            while self._links.get(place):
                endpoint, link = next(iter(self._links[place].items()))
                link.is_greeted = True
                self.note(sock, endpoint, link)
                if time.monotonic() - link.changed < 5 or (place[1] and place not in self._links):
                    return link
        return None


class _MonitoredSockets:
    """SUB sockets, each with a monitor of its connections, and with the keys for those that it makes next.

    There is one for each slot: a group, "" and 0; or, for a single address of a group whose name stands for several
    endpoints, that group, the address, and a number from 1.

    Args:
        loop: The loop in which the monitors are read.
        open_socket: Called with a slot; returns a new SUB socket for it.
        on_event: Called with a socket, the endpoint of a connection of it, and the event and value of ZeroMQ's monitor.
        on_close: Called with the slot of a socket that is closed, and the socket.
        load_keys: Called with a group; returns the socket options for the keys of its connections.
    """

    def __init__(
        self,
        loop: Loop,
        open_socket: Callable[[Any], Any],
        on_event: Callable[[Any, str, int, int], object],
        on_close: Callable[[Any, Any], object],
        load_keys: Callable[[Any], dict[str, bytes]],
    ) -> None:
        self._loop = loop
        self._open_socket = open_socket
        self._on_event = on_event
        self._on_close = on_close
        self._load_keys = load_keys
        self.by_slot: dict[tuple[Any, str, int], zmq.Socket[bytes]] = {}
        self._monitors: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}
        self._keys: dict[zmq.Socket[bytes], dict[str, bytes]] = {}

    def open(self, slot: tuple[Any, str, int]) -> zmq.Socket[bytes]:
        """Return the socket for *slot*, which there is none for yet."""
        sock = cast("zmq.Socket[bytes]", self._open_socket(slot))
        events = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
        events |= zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CONNECT_RETRIED
        failures = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        try:
            monitor = _open_monitor(sock, events | failures)
        except BaseException:  # no descriptors left, or Control-C
            self._end(slot, sock)
            raise
        self.by_slot[slot] = sock
        self._loop.watch_quiet(monitor, partial(self._take_events, sock, monitor))
        self._monitors[sock] = monitor
        return sock

    def close(self, slot: tuple[Any, str, int]) -> None:
        """Close the socket for *slot*."""
        sock = self.by_slot.pop(slot)
        self._monitors.pop(sock, None)
        self._keys.pop(sock, None)
        self._end(slot, sock)

    def _end(self, slot: tuple[Any, str, int], sock: zmq.Socket[bytes]) -> None:
        self._loop.unwatch(sock)
        close_socket(sock)
        self._on_close(slot, sock)

    def close_all(self) -> None:
        """Close all sockets, at the end: nobody is told."""
        for sock in self.by_slot.values():
            close_socket(sock)
        self.by_slot = {}

    def renew_keys(self, sock: zmq.Socket[bytes], group: Any) -> dict[str, bytes]:
        """Have new connections of *sock* use the keys that there are now; return them."""
        with suppress(ConfigurationError):  # they are just being replaced
            keys = self._load_keys(group)
            if keys != self._keys.get(sock):
                for option, value in keys.items():
                    setattr(sock, option, value)
                self._keys[sock] = keys
        return self._keys.get(sock, {})

    def take_pending_events(self, sock: zmq.Socket[bytes]) -> None:
        """Take note of what has happened to the connections of *sock* until now."""
        self._take_events(sock, self._monitors[sock])

    def _take_events(self, sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        while True:
            try:
                data, endpoint = monitor.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            event, value = struct.unpack("=HI", data)
            if event == zmq.EVENT_MONITOR_STOPPED:
                self._loop.unwatch(monitor)
                monitor.close(0)
                return
            self._on_event(sock, endpoint.decode("utf-8", "replace"), event, value)


class _Connections:
    """Keeps connected what is wanted.

    Args:
        loop: The loop to use; whoever runs it is the only one to call the methods.
        begin: Since when messages are wanted that have come by no connection that is new.
        streams: What each socket has of its publishers.
        open_socket: Called with a slot (see `_MonitoredSockets`); returns a new SUB socket for it, one of *streams*.
        read_all: Called with what a socket has, before a connection of it is closed, to take all that lies unread.
        on_close: Called with the slot of a socket that is closed, and the socket.
        load_keys: Called with the key of a group; returns the socket options for the keys of its connections.

    A name may stand for several endpoints (all pods of a service, all addresses of a host): all are connected, each
    over a socket of its own but for the first, so that it is known which of them a message came from.  One that the
    name does not stand for any more is left alone as long as it is connected.
    """

    LOOK_AGAIN = 10.0  # seconds until the names of what is connected are asked for again
    GREETING = 1.0  # seconds after which nobody will greet a connection any more
    ASK_SOON = 0.5  # seconds until what could not be asked for, as there are so many, has its turn
    # Milliseconds until a connection that failed is tried again, at most: one of the first few, and any other.  So
    # 1,000 to hosts that are up take 8 % of a core, in place of 27.
    FEW, SOON, LATER = 100, 200, 1000
    LEFT = 4096  # connections, and closed sockets, of whose publishers it is remembered what has come

    def __init__(
        self,
        loop: Loop,
        begin: float,
        streams: Mapping[zmq.Socket[bytes], _CatchUp],
        open_socket: Callable[[Any], Any],
        read_all: Callable[[_CatchUp], None],
        on_close: Callable[[Any, Any], object],
        load_keys: Callable[[Any], dict[str, bytes]],
    ) -> None:
        self._loop = loop
        self._begin = begin
        self._streams = streams
        self._read_all = read_all
        self._sockets = _MonitoredSockets(loop, open_socket, self._take_event, on_close, load_keys)
        self.take_pending_events = self._sockets.take_pending_events
        self._wanted: dict[str, tuple[Any, float]] = {}
        self._connected: dict[str, dict[str, zmq.Socket[bytes]]] = {}  # by address and endpoint
        self._links: dict[tuple[zmq.Socket[bytes], str], _Link] = {}
        self._let_go: OrderedDict[tuple[str, _CatchUp], None] = OrderedDict()  # which endpoint was left by whom
        self._new = _NewLinks()
        self._twins = _Twins()
        self._names: dict[str, _Resolution] = {}  # of the addresses
        self._log = LimitedLogger("subscriber")
        self._timer: Timer | None = None

    def want(self, address: str, key: Any, begin: float) -> None:
        """Connect to *address* over the socket of the group *key*; its messages are wanted since *begin*."""
        if self._wanted.get(address, (key,))[0] != key:
            self._disconnect_all(address)
        self._wanted[address] = (key, begin)
        with on_failure(partial(self.drop, address)):
            self._connect(address)

    def drop(self, address: str) -> None:
        """Disconnect from *address*."""
        self._names.pop(address, None)
        self._disconnect_all(address)

    def is_up(self, address: str) -> bool:
        """Whether *address* is connected, or was until a moment ago: what it sent last may still be on its way."""
        links = [self._links[sock, endpoint] for endpoint, sock in self._connected.get(address, {}).items()]
        return any(link.is_up or time.monotonic() - link.changed < 1 for link in links)

    def greet(self, sock: zmq.Socket[bytes], port: int, index: int, is_known: bool) -> tuple[float, int]:
        """Return since when the messages are wanted of the publisher that has just greeted us on *sock*.

        And the index of the first that has come from it; *index*, that of the next, if no connection is new.  Which one
        it is can be told by the *port*, but for one that is forwarded: then it is that which has waited longest, unless
        the publisher *is_known*, as then it does not matter.
        """
        self.take_pending_events(sock)
        link = self._new.take(sock, port, is_known)
        if link is not None and link.index is not None:
            return link.begin, link.index
        # Or one that is down, by which nobody has greeted us until now, and nobody may ever.
        others = [other for (its, _), other in self._links.items() if its is sock and not other.is_up]
        return self._begin, min((other.index for other in others if other.index is not None), default=index)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The sockets that there are."""
        return list(self._sockets.by_slot.values())

    def _connect_again(self, address: str) -> None:
        try:
            self._connect(address)
        except (ConfigurationError, zmq.ZMQError) as error:  # keys that are being replaced, no descriptors left
            self._log.warning("connect", "Cannot connect to %s (trying again): %s", address, error)

    def _connect(self, address: str) -> None:
        """Connect to all that *address* stands for, no longer to what it does not stand for if that is down."""
        if address not in self._wanted:
            return
        self._tend_later(_Link.RENEWAL)
        resolution = self._names.get(address)
        if resolution is None:
            resolution = _Resolution(address, lambda: self._loop.call(partial(self._connect_again, address)))
            self._names[address] = resolution
        resolution.check()
        endpoints = sorted(_without_own_twins(resolution.endpoints))  # so each has the socket that it had before
        connected = self._connected.setdefault(address, {})
        for endpoint, sock in list(connected.items()):
            if endpoint not in endpoints and not self._links[sock, endpoint].is_up:
                self._disconnect(address, endpoint)
        for endpoint in endpoints:
            if endpoint not in connected:
                self._connect_to(address, endpoint)

    def _connect_to(self, address: str, endpoint: str) -> None:
        """Connect *address* to one of its endpoints, over the first socket of its own that is free."""
        key, begin = self._wanted[address]
        connected = self._connected[address]
        used = list(connected.values())
        slots = chain([(key, "", 0)], ((key, address, number) for number in count(1)))
        sockets = self._sockets.by_slot
        slot = next(slot for slot in slots if sockets.get(slot) not in used)
        sock = sockets.get(slot) or self._sockets.open(slot)
        keys = self._sockets.renew_keys(sock, key)
        # Publishers of the known package keep nothing: who is late when they start misses what they send.
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, self.SOON if len(self._links) < self.FEW else self.LATER)
        connect(sock, endpoint)
        self._links.setdefault((sock, endpoint), _Link(begin, keys)).keys = keys
        connected[endpoint] = sock
        for each in connected.values() if used else ():
            self._streams[each].twins = self._twins
        _log("subscriber").debug("Subscribed to %s at %s", address, endpoint)

    def _disconnect(self, address: str, endpoint: str) -> None:
        """Disconnect *address* from one of its endpoints, unless another address is another name for that."""
        sock = self._connected[address].pop(endpoint)
        if not any(others.get(endpoint) is sock for others in self._connected.values()):
            self._read_all(self._streams[sock])  # first, as the greetings in it are of the connections that there are
            link = self._links.pop((sock, endpoint))
            link.is_up = False
            self._new.note(sock, endpoint, link)
            disconnect(sock, endpoint)  # it may be gone already (inproc)
            self._streams[sock].note_change(link.descriptor)
            place = endpoint, self._streams[sock]
            self._let_go[place] = None
            self._let_go.move_to_end(place)
            if len(self._let_go) > self.LEFT:
                self._let_go.popitem(last=False)
        _log("subscriber").debug("No longer subscribed to %s at %s", address, endpoint)

    def _disconnect_all(self, address: str) -> None:
        """Disconnect from *address*, which is not wanted any more, and close the sockets that nobody else uses."""
        for endpoint in list(self._connected.get(address, ())):
            self._disconnect(address, endpoint)
        self._connected.pop(address, None)
        key, _ = self._wanted.pop(address, (None, 0.0))
        sockets = self._sockets.by_slot
        unused = [slot for slot in sockets if slot[1] == address]
        if (key, "", 0) in sockets and all(other != key for other, _ in self._wanted.values()):
            unused.append((key, "", 0))
        for slot in unused:
            self._sockets.close(slot)

    def _take_event(self, sock: zmq.Socket[bytes], endpoint: str, event: int, value: int) -> None:
        """Take note of what has happened to a connection."""
        link = self._links.get((sock, endpoint))
        if link is None:
            return
        if event == zmq.EVENT_CONNECTED:
            link.descriptor = value
            self._streams[sock].note_change(value)
            return
        if event == zmq.EVENT_CONNECT_RETRIED:
            self._look_for_descriptors(endpoint)
        elif event not in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED):
            text = "%s does not speak our protocol, or has another backend or key (trying again)"
            self._log.warning("handshake", text, endpoint)
        was_up = link.is_up
        link.take_event(event)
        if not link.is_tried:
            self._tend_later(link.RENEWAL)
        if was_up != link.is_up:
            index = self._streams[sock].note_change(link.descriptor)
            if link.is_up and link.index is None:
                link.index = index
            self._new.note(sock, endpoint, link)
            self._look_for_greeting(sock, link)

    def _look_for_descriptors(self, endpoint: str) -> None:
        """Say so if a connection could not be made for want of descriptors: ZeroMQ does not tell why it could not."""
        try:
            socket.socket().close()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                text = "Cannot connect to %s (trying again): %s (at most %d): raise the limit (ulimit -n, LimitNOFILE=)"
                self._log.warning("descriptors", text, endpoint, error.strerror, get_descriptor_limit())

    def _look_for_greeting(self, sock: zmq.Socket[bytes], link: _Link) -> None:
        """If *link* has come up, look whether a publisher greets us: a proxy may not have noticed that it was down.

        Nor that an earlier one is, by another endpoint, or to an address that was removed and is added again.
        """
        if not link.is_up or not (link.was_up or self._streams[sock].has_forwarded):
            link.was_up = link.was_up or link.is_up
            return

        def look() -> None:
            if sock in self._streams:  # still
                self._streams[sock].look_for_greeting(link.is_greeted)

        self._streams[sock].begin_turn()
        self._loop.at(time.monotonic() + self.GREETING, look)

    def before(self, stream: _CatchUp, instance: bytes) -> list[_CatchUp]:
        """Return who knows a publisher, let go of what *stream* is connected to, and is not connected to it again."""
        left = [(endpoint, other) for endpoint, other in self._let_go if other.knows(instance)]
        if not left:  # as at the start, when many are found at once
            return []
        ends = {(endpoint, self._streams[sock]) for sock, endpoint in self._links}
        return [other for endpoint, other in left if (endpoint, stream) in ends and (endpoint, other) not in ends]

    def beside(self, stream: _CatchUp) -> list[_CatchUp]:
        """Return who may hear the same publishers as *stream* does, by other endpoints of one name."""
        several = self._streams.values() if stream.twins is not None else ()
        return [other for other in several if other is not stream and other.twins is not None]

    def has_port(self, sock: zmq.Socket[bytes], port: int) -> bool:
        """Whether *sock* is connected to an endpoint with this port."""
        end = f":{port}"
        return any(other is sock and endpoint.endswith(end) for other, endpoint in self._links)

    def _tend_later(self, seconds: float) -> None:
        when = time.monotonic() + seconds
        if self._timer is not None and self._timer.when > when:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.at(when, self._tend)

    def _tend(self) -> None:
        """Renew connections that ZeroMQ gave up, and ask again for the names, often for those that are down."""
        self._timer = None
        for address in sorted(self._wanted, key=self._last_asked):
            connected = self._connected.get(address)
            resolution = self._names.get(address)
            if not connected or resolution is None:
                self._connect_again(address)
                continue
            for endpoint, sock in connected.items():
                self._renew(sock, endpoint, self._wanted[address][0])
            if set(connected) - set(resolution.endpoints):
                self._connect_again(address)
            if resolution.is_name:
                is_up = all(self._links[sock, endpoint].is_up for endpoint, sock in connected.items())
                is_asked = resolution.ask(self.LOOK_AGAIN - 1 if is_up else resolution.RETRY)
                self._tend_later(self.LOOK_AGAIN if is_asked else self.ASK_SOON)

    def _last_asked(self, address: str) -> float:
        return self._names[address].asked if address in self._names else float("-inf")

    def _renew(self, sock: zmq.Socket[bytes], endpoint: str, key: Any) -> None:
        """Make a connection anew if ZeroMQ has given it up some time ago, or if there are other keys by now."""
        link = self._links[sock, endpoint]
        if link.is_up:
            return
        self._tend_later(link.RENEWAL)
        keys = self._sockets.renew_keys(sock, key)
        if link.keys != keys or link.is_given_up:
            self.take_pending_events(sock)  # it may have come up while nobody ran the loop
            if link.is_up or (link.is_tried and link.keys == keys):
                return
            link.note_renewal(keys)
            if link.may_be_unread:  # else it would be read again and again, for nothing, all that others send
                self._read_all(self._streams[sock])
                link.may_be_unread = False
            disconnect(sock, endpoint)
            connect(sock, endpoint)

    def close(self) -> None:
        """Close all sockets."""
        self._sockets.close_all()
        self._wanted, self._connected, self._links = {}, {}, {}


def get_descriptor_limit() -> int:
    """Return how many files this process may have open."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):  # Windows has no such limit, a locked-down host does not tell it
        return sys.maxsize
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


class _Source:
    """What a subscriber has of a publisher of ours."""

    PATIENCE, LONGEST_PATIENCE = 5.0, 60.0  # seconds until it is asked once more, first and last

    def __init__(self) -> None:
        self.is_left = False  # heard by no socket any more
        self.name = ""
        self.is_forwarded = False  # by a proxy: we have no connection of our own to it
        self.position: int | None = None  # it has all up to this number, None: it has just found the publisher
        self.since: Any = None  # since when its messages are wanted
        self.found = 0  # the number of the first hello
        self.before = 0  # that of the last message that cannot have come live
        self.was_handled: Callable[[int, bytes], bool] | None = None  # what an earlier program had behind the position
        self.hello_lines = 0  # of the durable state
        self.known: set[int] = set()  # numbers behind the position that came under the mark
        self.intact: list[tuple[int, int, int]] = []  # what came live behind it: after a number, up to one, its index
        self.unconfirmed: Counter[int] = Counter()  # digests of what else came live between the position and the hello
        self.checked = 0  # the index up to which they are
        self.index = 0  # how many messages had come live when the position was told
        self.is_doubted = False
        self.patience = self.PATIENCE
        self.begin(0, 0, 0)

    def begin(self, hello: int, ends: int, index: int) -> None:
        """Begin anew after a hello: what comes under the mark is counted from here."""
        self.hello = hello
        self.hello_index = index
        self.ends = ends
        self.is_asked = True
        self.asked = self.begun = time.monotonic()
        self.came: set[int] = set()  # numbers that came under the mark since the last end
        self.counted: float = 0  # those before the last position
        self.live: Counter[int] | None = None  # of what came live since, while it matters

    @property
    def place(self) -> tuple[int, float]:
        """How much of the publisher is here; of two that have as much, that which has begun later has more."""
        return -1 if self.position is None else self.position, self.begun

    def advance(self, number: int, index: int) -> None:
        """Take note that all messages up to *number* are here, *index* messages having come live."""
        self.position = max(number, self.position or 0)
        self.index = index
        for after, until, end in self.intact:
            if after <= self.position < until:
                self.position, self.index = until, end
        self.intact = []
        self.unconfirmed = Counter()  # it may have been large
        self.was_handled = None
        self.known = {other for other in self.known if other > self.position}

    def end_part(self, number: int, ends: int, is_whole: bool) -> None:
        """Take note that what comes under the mark has come up to *number*; it does not count if not *is_whole*."""
        self.ends = ends
        if not is_whole:
            self.counted = -math.inf  # so it will not be whole at the end either, and is asked for again
            return
        self.position, self.counted = max(number, self.position or 0), 0
        self.came.clear()
        self.known = {other for other in self.known if other > self.position}

    def note_intact(self, number: int, index: int) -> None:
        """Take note that all from the hello up to *number* has come live, and nothing behind it."""
        if self.is_asked and not self.is_doubted and number > self.hello:
            self.intact = [place for place in self.intact if place[0] != self.hello]
            self.intact.append((self.hello, number, index))
            self.checked = index

    def doubt(self) -> None:
        """Until it greets us do not take its word for what has come: it may not know of all that was lost."""
        self.is_asked = self.is_doubted = True
        self.asked = time.monotonic()

    @property
    def missing(self) -> bytes:
        """What is to be asked for: what follows a number, and what is not older at a time."""
        asked = time.time() * 1000  # before the age: in between time may pass, and the age is what counts
        if self.position is not None:
            return b"%d+0@%d" % (self.position, asked)  # not as before: a proxy would not pass on the same again
        age = max(math.ceil((uptime() - self.since) * 1000), 1)
        return b"%d+%d@%d" % (self.found, age, asked)

    def came_live(self, number: int) -> bool:
        """Whether it is known that the message with this *number* came live."""
        return any(after < number <= until for after, until, _ in self.intact)


class _Merge:
    """Reads a SUB socket that is connected to a publisher more than once, so that each message comes once (see 9).

    ZeroMQ does not tell which connection a message has come by; but the frame of it does, which takes longer to get.

    A new connection begins with a hello, which is about what was sent before it; some of that may still come by another
    connection.  So what comes by the new one waits until the same hello has come by another; or a later one by one that
    is newer still: of an endpoint ZeroMQ returns all that has come by one connection before what comes by the next.

    Args:
        sock: The socket.
        mark: Its mark.
        take_events: Called to take note of connections that have begun, or ended.
        wake_at: Called with a time when `recv` is to be called, even if there is nothing in the socket.
        on_end: Called when no publisher is connected more than once any more.
    """

    PATIENCE = 0.3  # seconds for the others, which may only be believed to be there by the publisher
    LONGEST_PATIENCE = 5.0  # more seconds, if there is always something to be read
    KEPT = 64  # what is behind by more connections that began or ended may come twice

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        mark: bytes,
        take_events: Callable[[], None],
        wake_at: Callable[[float], object],
        on_end: Callable[[], None],
    ) -> None:
        self._socket = sock
        self._hello = re.compile(re.escape(mark) + rb"(?:/\d+)?\0H ([0-9a-f]{16}) (\d{1,15}) ")
        self._take_events = take_events
        self._wake_at = wake_at
        self._on_end = on_end
        self._twins: OrderedDict[bytes, _Twins] = OrderedDict()  # by what has told the connections
        self._lines: dict[Any, _Twins] = {}  # by connection; None: that which has told it first
        self._stale: set[str] = set()  # the descriptors of those that are not the same any more, once all is read
        self._is_changed = False
        self._paused: dict[Any, tuple[float, list[bytes]]] = {}  # the new ones: until when, and what waits
        self._hellos: deque[bytes] = deque(maxlen=self.KEPT)  # that have come by others
        self._ready: deque[bytes] = deque()

    def begin_line(self, raw: bytes, line: Any = None) -> None:
        """Compare what comes by *line* from here on with what comes by others behind the same *raw*.

        Raises:
            ValueError: *raw* does not tell how many connections there are.
        """
        number = number_of_connections(raw)
        if number:
            self._lines[line] = self._twins.setdefault(raw, _Twins(number))
            if len(self._twins) > self.KEPT:
                self._twins.popitem(last=False)
        elif line in self._lines:
            until = time.monotonic() + self.PATIENCE
            self._paused[line] = until, []
            self._wake_at(until)

    def note_change(self, descriptor: int) -> None:
        """Take note that a connection with this descriptor has begun or ended: the next one by it is another one."""
        self._stale.add(str(descriptor))
        self._is_changed = True

    def recv(self, flags: int) -> bytes:
        """Receive a message, something empty if it does not count; raises zmq.Again if there is none."""
        if self._paused:
            self._resume_until(time.monotonic() - self.LONGEST_PATIENCE)
        if not self._ready:
            try:
                frame = self._socket.recv(flags, copy=False)
            except zmq.Again:
                self._resume_until(time.monotonic())
                self._forget_stale()
                if not self._ready:
                    raise
            else:
                self._take_frame(frame)
        return self._ready.popleft() if self._ready else b""

    def _take_frame(self, frame: zmq.Frame) -> None:
        raw = frame.bytes
        try:
            line = frame.get("Peer-Address"), frame.get("__fd")
        except zmq.ZMQError:  # it comes from this process
            self._ready.append(raw)
            return
        if raw[:1] == _EARLY_MARK[:1]:
            self._take_events()
            self._stale.discard(line[1])
            self._lines.pop(None, None)
            self._is_changed = True
        self._take(raw, line)

    def _take(self, raw: bytes, line: Any) -> None:
        """Have *raw*, which has come by *line*, returned if it is new; but later if *line* is to wait."""
        if line in self._paused:
            self._paused[line][1].append(raw)
            if raw in self._hellos:
                self._resume(line)
        elif raw[:1] == _EARLY_MARK[:1]:
            try:
                self.begin_line(raw, line)
            except ValueError:
                self._ready.append(raw)  # whoever takes it will complain
        else:
            hello = self._hello.match(raw)
            while hello and (older := self._greeted_before(hello)) is not None:
                self._resume(older)
            twins = self._lines.get(line)
            if twins is None or twins.is_new(raw, line):
                self._ready.append(raw)
            if twins is not None and hello:
                self._hellos.append(raw)
                for other in [other for other, (_, waiting) in self._paused.items() if raw in waiting]:
                    self._resume(other)

    def _greeted_before(self, hello: re.Match[bytes]) -> Any:
        """Return a connection that waits, and has brought an earlier hello of the same publisher; None: none has."""
        for line, (_, waiting) in self._paused.items():
            others = filter(None, map(self._hello.match, waiting))
            if any(other[1] == hello[1] and int(other[2]) < int(hello[2]) for other in others):
                return line
        return None

    def _resume(self, line: Any) -> None:
        _, waiting = self._paused.pop(line, (0, []))
        for raw in waiting:
            self._take(raw, line)

    def _resume_until(self, when: float) -> None:
        for line in [line for line, (until, _) in self._paused.items() if until <= when]:
            self._resume(line)

    def release(self) -> bool:
        """Have what waits returned next; return whether there is something."""
        self._resume_until(math.inf)
        return bool(self._ready)

    def _forget_stale(self) -> None:
        """Forget connections that have ended, as all is read; and end if there are not several to any publisher."""
        if self._is_changed:
            for line in [line for line in self._lines if line and line[1] in self._stale]:
                self._resume(line)
                del self._lines[line]
            self._stale.clear()
            self._is_changed = bool(self._paused or self._ready)
            if not self._is_changed and all(twins.streams < 2 for twins in self._lines.values()):
                self._on_end()


def number_of_connections(raw: bytes) -> int:
    """Return how many connections there are, as *raw* tells; 0: it tells that one is new.

    Raises:
        ValueError: It does not tell that.
    """
    content = raw.partition(b"\0")[2]
    if content == b"N":
        return 0
    kind, instance, turn, number = content.split(b" ")
    if kind != b"D" or len(instance) != 16 or int(turn) < 0 or int(number) < 1:
        raise ValueError("not about connections")
    return int(number)


class _LiveRecord:
    """What came live over a socket, in order: it is recognised when it comes once more."""

    SIZE = 16384  # messages
    PATIENCE = 4 * SIZE  # that come until a publisher of which nothing more comes under the mark has ended

    def __init__(self) -> None:
        self.index = 0  # of what comes next
        self._recent: deque[int] = deque(maxlen=self.SIZE)  # digests
        self._frozen: deque[tuple[int, int]] = deque(maxlen=2 * self.SIZE)  # with their indices, before an outage
        self._open: dict[_Source, int] = {}  # who sends live and under the mark, and the index when it last did

    def note(self, raw: bytes) -> bytes:
        """Take note of a message, and return it."""
        self.index += 1
        digest = hash(raw[:256])  # `_digest`, which as a call of its own would take as long again
        self._recent.append(digest)
        if self._open:
            for source in self._open:
                source.live[digest] += 1  # type: ignore[index]
            if self.index % self.SIZE == 0:
                for source in [each for each, last in self._open.items() if self.index - last > self.PATIENCE]:
                    self.close(source)
        return raw

    def freeze(self) -> None:
        """Remember what came until now, as a connection is down: its end may not have been confirmed."""
        first = self.index - len(self._recent)
        start = max(self._frozen[-1][0] + 1 - first, 0) if self._frozen else 0
        self._frozen.extend((first + start + i, digest) for i, digest in enumerate(islice(self._recent, start, None)))

    def count(self, since: int, until: int | None = None) -> Counter[int]:
        """Return the digests of what came, from one index to another."""
        self.freeze()
        end = self.index if until is None else until
        newest_first = takewhile(lambda entry: entry[0] >= since, reversed(self._frozen))
        return Counter(digest for index, digest in newest_first if index < end)

    def forget_before(self, index: int) -> None:
        """Keep what came from *index* on; nothing more comes, for now."""
        self.freeze()
        self._recent.clear()
        while self._frozen and self._frozen[0][0] < index:
            self._frozen.popleft()

    def hand_over(self, source: _Source) -> _Source:
        """Have *source* go on over another socket, the hello of which is to be taken next; return a copy to keep."""
        self.close(source)
        left = copy(source)
        left.is_left = True
        self._go_on(source)
        return left

    def share(self, source: _Source) -> _Source:
        """Return what another socket begins with, the hello of which is to be taken next; *source* stays as it is."""
        shared = copy(source)
        shared.known, shared.live = set(source.known), None
        self._go_on(shared)
        return shared

    def _go_on(self, source: _Source) -> None:
        source.unconfirmed = source.unconfirmed + self.count(max(source.index, source.checked))
        source.intact = [(after, until, 0) for after, until, _ in source.intact]
        source.hello = -1

    def has(self, source: _Source, number: int, digest: int) -> bool:
        """Whether a message of the past has come live before, as far as can be told: from any publisher."""
        seen = source.unconfirmed
        if not source.is_asked or number > source.hello:
            behind = max(source.hello_index, source.checked) if source.is_asked else 0
            if source.live is None:
                source.live = self.count(max(source.index, behind))
            seen = source.live
            self._open[source] = self.index
        if seen[digest] <= 0:
            return False
        seen[digest] -= 1
        return True

    def close(self, source: _Source) -> None:
        """Have *source* forget what came, all of which is confirmed."""
        self._open.pop(source, None)
        source.live = None


class _CatchUp:
    """What one SUB socket has of the publishers of ours that it hears, and what it asks them for (see 9).

    It outlives the socket: the next one for the same, when they come again, goes on with what is known of them.

    Args:
        prefixes: What it has subscribed to.
        on_gone: Called with the name of a publisher and how many of its messages are gone.
        wake_at: Called with it, and a time when there will be something to be received.
        on_past: Called when a message is caught up.
        durable: What earlier programs have handled, and where to write down what this one has; None: nowhere.
        later: Called with what is to be written down when all that has come until now is handed out.
        connections: Those of all sockets.
    """

    SOURCES = 20000
    PAST = 1000000  # messages that come under the mark until there is an end

    def __init__(
        self,
        prefixes: Sequence[bytes],
        on_gone: Callable[[str, int], None],
        wake_at: Callable[[_CatchUp, float], object],
        on_past: Callable[[], None],
        durable: _DurableState | None,
        later: Callable[[Callable[[], None]], None],
        connections: _Connections,
    ) -> None:
        self.twins: _Twins | None = None  # what has come over others that may be connected to the same publisher
        self.origin = ""  # the only address that it is connected to, if that is known
        self.is_later = False  # others had brought something before
        self.has_forwarded = False  # it has heard publishers behind a proxy
        self._prefixes = tuple(prefixes)
        self._on_gone = on_gone
        self._wake_at = partial(wake_at, self)
        self._on_past = on_past
        self._durable = durable
        self._later = later
        self._connections = connections
        self._topics = b"\n".join(prefixes) if sum(map(len, prefixes)) < 1000 else b""
        self._sources: OrderedDict[bytes, _Source] = OrderedDict()
        self._requests: dict[bytes, bytes] = {}
        self._live = _LiveRecord()
        self.note: Callable[[bytes], bytes] = self._live.note  # to be called with each message that comes live

    def attach(self, sock: zmq.Socket[bytes]) -> None:
        """Subscribe with a new socket."""
        self._socket = sock
        self._take_events = partial(self._connections.take_pending_events, sock)
        self._requests.clear()
        self._turn = 0  # how often a connection has come up again
        self._again = b""  # what it asks to be greeted again by, in this turn
        self._mark = _MARK + f"{os.urandom(8).hex()}/{len(self._prefixes)}".encode()
        for topic in (_EARLY_MARK[:1] + self._mark[1:], *self._prefixes, self._mark):
            sock.setsockopt(zmq.SUBSCRIBE, topic)
        self.recv: Callable[[int], bytes] = sock.recv
        self._merge: _Merge | None = None  # while it is connected to a publisher more than once

    def leave(self) -> None:
        """Keep what may still be needed, when the socket is closed."""
        sources = self._sources.values()
        for source in sources:
            source.is_left = True
        oldest = min((max(source.index, source.checked) for source in sources), default=self._live.index)
        self._live.forget_before(oldest)

    def note_change(self, descriptor: int) -> int:
        """Take note that a connection has begun, come up or gone down; return the index of what comes next."""
        if self._merge is not None:
            self._merge.note_change(descriptor)
        self._live.freeze()
        return self._live.index

    def begin_turn(self) -> None:
        """Doubt whether all has come of publishers behind a proxy, as a connection has come up again."""
        self._turn += 1
        if self._again:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, self._again)
            self._again = b""
        for source in self._sources.values():
            if source.is_forwarded:
                source.doubt()

    def look_for_greeting(self, is_greeted: bool) -> None:
        """Ask to be greeted again, if somebody may not know that there is a new connection."""
        if not is_greeted or any(source.is_doubted for source in self._sources.values()):
            self._ask_for_greeting()

    def _ask_for_greeting(self) -> None:
        if not self._again:
            self._again = b"%s/again/%d" % (self._mark, self._turn)
            self._socket.setsockopt(zmq.SUBSCRIBE, self._again)

    def _take_connections(self, raw: bytes) -> None:
        """Take what tells how many connections to a publisher there are: the first that comes by a new one."""
        self._take_events()  # now, as what follows may be messages of it
        if number_of_connections(raw) > 1 and self._merge is None:
            merge = _Merge(self._socket, self._mark, self._take_events, self._wake_at, self._end_merge)
            merge.begin_line(raw)
            self._merge, self.recv = merge, merge.recv

    def _end_merge(self) -> None:
        self._merge, self.recv = None, self._socket.recv

    def knows(self, instance: bytes) -> bool:
        """Whether it has heard this publisher."""
        return instance in self._sources

    @property
    def is_merging(self) -> bool:
        """Whether it may hold something that is not in its socket any more."""
        return self._merge is not None

    def release(self) -> bool:
        """Have what waits for something received next; return whether there is something."""
        return self._merge is not None and self._merge.release()

    @property
    def up_to_date(self) -> int:
        """How many publishers of ours have sent all that is wanted of the past."""
        return sum(1 for source in list(self._sources.values()) if not source.is_asked)

    def take(self, raw: bytes) -> bytes | None:
        """Take what came under a mark, or nothing; return the message in it, if it is one that is not here yet."""
        if not raw:
            return None
        head, _, content = raw.partition(b"\0")[2].partition(b"\0")
        try:
            if raw[:1] == _EARLY_MARK[:1]:
                self._take_connections(raw)
                return None
            kind, instance, *fields = head.split(b" ")
            if len(instance) == 16 and kind in (b"H", b"L", b"C", b"E", b"P", b"I"):
                name = fields.pop().decode("utf-8", "replace") if kind == b"H" else ""
                numbers = [int(field) for field in fields]
                if not b"".join(fields).isdigit() or max(numbers) >= 10**15:
                    raise ValueError(f"no numbers: {head[:200]!r}")
                if kind == b"H":
                    self._go_on(instance)
                elif instance not in self._sources:
                    return None
                source = self._source(instance)
                if kind in (b"P", b"E", b"I") and source.is_forwarded:
                    self._take_events()  # a proxy may not have told the publisher that what it speaks of was lost
                if kind in (b"L", b"C"):
                    (number,) = numbers
                    return self._take_past(source, number, content, kind == b"L")
                if kind == b"H":
                    self._take_hello(instance, source, name, *numbers)
                elif kind == b"I":
                    (number,) = numbers
                    source.note_intact(number, self._live.index)
                else:
                    (self._take_end if kind == b"E" else self._take_position)(instance, source, *numbers)
        except (ValueError, TypeError) as error:
            _catch_up_log.warning("mark", "Skipped something broken sent to us alone: %s", error)
        return None

    def _go_on(self, instance: bytes) -> None:
        """Go on where a socket was left that was connected to the same before, with some of the topics at least."""
        own = self._sources.get(instance)
        if own is None or own.is_left:
            others = self._connections.before(self, instance)
            alike = [other for other in others if _overlap(other._prefixes, self._prefixes)]
            newest = max(alike, key=lambda other: other._sources[instance].place, default=self)
            if newest is not self and (own is None or own.place <= newest._sources[instance].place):
                self._sources[instance] = source = newest._sources[instance]
                newest._sources[instance] = newest._live.hand_over(source)
            elif own is None and self._durable is None:  # a durable state is one for all sockets
                for other in self._connections.beside(self):
                    if other.knows(instance) and other._prefixes == self._prefixes:
                        self._sources[instance] = other._live.share(other._sources[instance])
                        break

    def _source(self, instance: bytes) -> _Source:
        source = self._sources.get(instance)
        if source is None:
            if not re.fullmatch(rb"[0-9a-f]{16}", instance):
                raise ValueError(f"no instance: {instance!r}")
            source = self._sources[instance] = _Source()
            if self._durable is not None:
                self._durable.restore(instance, source, self.is_later)
        source.is_left = False
        self._sources.move_to_end(instance)
        if len(self._sources) > self.SOURCES:
            forgotten, old = self._sources.popitem(last=False)
            self._cancel_request(forgotten)
            self._live.close(old)
        return source

    def _take_hello(self, instance: bytes, source: _Source, name: str, *numbers: int) -> None:
        number, ends, port, before, turn, *_ = *numbers, 0  # older versions tell no turn, newer ones may tell more
        source.name, source.is_forwarded = name, not self._connections.has_port(self._socket, port)
        self.has_forwarded = self.has_forwarded or source.is_forwarded
        since, index = self._connections.greet(self._socket, port, self._live.index, source.since is not None)
        if source.since is None:
            source.found, source.before = number, before
            source.since, source.index = since, index
            if self._durable is not None and source.position is None:
                self._later(partial(self._durable.begin_with, instance, source, self._live.index - source.index))
        elif source.hello < 0:  # it was heard by another socket until now
            source.index = source.checked = index
        self._live.close(source)
        if number < source.hello:
            return  # of a connection that is behind another one, which has had a later hello
        source.is_doubted = source.is_forwarded and turn != self._turn  # it may be of before
        self._begin(source, number, ends)
        self._ask(instance, source)

    def _begin(self, source: _Source, number: int, ends: int) -> None:
        is_later = number > source.hello
        source.begin(number, ends, self._live.index if is_later else source.hello_index)
        if self._durable is not None and is_later:
            self._later(partial(self._durable.note_hello, source))

    def _ask(self, instance: bytes, source: _Source) -> None:
        """Ask for what is missing, up to the hello."""
        if source.position is None or source.position < source.hello:  # else nothing is missing
            source.unconfirmed += self._live.count(max(source.index, source.checked), source.hello_index)
            source.checked = max(source.hello_index, source.checked)
        self._cancel_request(instance)
        request = b"%s/%s/%s,%d/%s" % (self._mark, instance, source.missing, source.hello, self._topics)
        self._requests[instance] = request
        self._socket.setsockopt(zmq.SUBSCRIBE, request)

    def _cancel_request(self, instance: bytes) -> None:
        request = self._requests.pop(instance, None)
        if request is not None:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, request)

    def _take_past(self, source: _Source, number: int, content: bytes, is_live: bool) -> bytes | None:
        if len(source.came) >= self.PAST:
            raise ValueError(f"more than {self.PAST} messages without an end")
        source.came.add(number)
        if number <= (source.position or 0) or number in source.known or source.came_live(number):
            return None
        if not content.startswith(self._prefixes):
            return None
        source.known.add(number)
        if is_live:
            return content
        if source.was_handled is not None and source.was_handled(number, content):
            return None
        if number > source.before and self._live.has(source, number, _digest(content)):
            return None
        self._on_past()
        return content

    def _take_end(
        self, instance: bytes, source: _Source, number: int, ends: int, sent: int, gone: int, kind: int
    ) -> None:
        if ends <= source.ends:
            return  # the same over a second connection
        is_whole = sent == source.counted + len(source.came)
        is_answer, is_part = kind & 1, kind & 2
        if is_part and (is_answer or not source.is_asked):
            source.end_part(number, ends, is_whole)
            if is_whole and gone > 0:
                self._on_gone(source.name, gone)
            return
        self._live.close(source)
        # A full queue came between, or it answers an earlier request: what was asked for last is still to come.
        if source.is_asked and (not is_answer or number < source.hello):
            source.ends, source.counted = ends, 0
            source.came.clear()
            return
        if is_whole:
            self._advance(instance, source, number)
        self._begin(source, number, ends)
        if not is_whole:
            self._ask(instance, source)
            return
        self._cancel_request(instance)
        source.is_asked, source.patience = source.is_doubted, source.PATIENCE
        if source.is_doubted:
            self._ask_for_greeting()
        if gone > 0:
            self._on_gone(source.name, gone)

    def _advance(self, instance: bytes, source: _Source, number: int) -> None:
        is_before_hello = number <= source.hello
        source.advance(number, source.hello_index if is_before_hello else self._live.index)
        if self._durable is not None:
            self._later(partial(self._durable.advance, instance, source, number, is_before_hello))

    def _take_position(self, instance: bytes, source: _Source, number: int, ends: int, sent: int) -> None:
        is_whole = ends == source.ends and sent == source.counted + len(source.came)
        if not number or (source.is_asked and time.monotonic() - source.asked < source.patience):
            if is_whole:
                source.note_intact(number, self._live.index)
            return
        self._live.close(source)
        if not source.is_asked and is_whole:
            self._advance(instance, source, number)
            source.counted += len(source.came)
            source.came.clear()
        else:  # something was dropped on the way, because a queue was full; or the answer lies unread, behind much else
            if source.is_asked:
                source.patience = min(2 * source.patience, source.LONGEST_PATIENCE)
            self._begin(source, max(number, source.hello), ends)
            source.counted = sent
            self._ask(instance, source)


_catch_up_log = LimitedLogger("subscriber")


def _overlap(prefixes: tuple[AnyStr, ...], others: tuple[AnyStr, ...]) -> bool:
    """Whether there are topics that both stand for."""
    return any(prefix.startswith(others) for prefix in prefixes) or any(each.startswith(prefixes) for each in others)


def _digest(raw: bytes) -> int:
    """Return what a message is recognised by: its header, with the microsecond, and the beginning of its data."""
    return hash(raw[:256])


@cache
def get_blake2b() -> Any:
    """Return the hash function for what outlives the process, or must not be mistaken on a system of 32 bits."""
    from hashlib import blake2b

    return blake2b


_DURABLE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"


def try_to_lock(descriptor: int) -> bool:
    """Lock a file for this process; return whether nobody else has. Raises OSError if the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**16, os.SEEK_SET)  # what is locked cannot be read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True


class _StateFile:
    """A file of lines that one process has at a time: it appends to it, and writes it anew when it has become long.

    There is no fsync: the system keeps what has been written whatever happens to the program.  A full disk is warned
    of, and all is written as soon as there is room.

    A new one is made at once, empty, which needs no room for data: so however long the disk is full, the file system
    keeps since when it is there.

    Args:
        name: The name of the file, in the ``durable_directory``.
        since: The time of a new file, in seconds since the epoch.
    """

    GROWTH = 2**18  # bytes after which it is written anew
    PAUSE = 1.0  # seconds after a failure until the next attempt

    def __init__(self, name: str, since: float) -> None:
        if not isinstance(name, str) or re.fullmatch(_DURABLE_NAME, name) is None:
            raise ValueError(f"durable is a name of at most 100 letters, digits and '_.-', not {name!r}.")
        self._name = name
        self._log = LimitedLogger("subscriber")
        self._file: io.FileIO | None = None
        self._growth = self._size = 0  # since it was written anew, and then
        self._next_attempt = 0.0
        default = os.path.join(os.environ.get("XDG_STATE_HOME") or "~/.local/state", "posttroll")
        directory = os.path.expanduser(config.get("durable_directory") or default)
        try:
            if directory.startswith("~"):
                raise FileNotFoundError(errno.ENOENT, "there is no home directory")
            os.makedirs(directory, exist_ok=True)
            self.path = os.path.join(os.path.abspath(directory), name)
            self._new_path = os.path.join(os.path.dirname(self.path), f".{name}.new")
            for path in (directory, self.path):
                if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._lock = self._locked(os.path.join(directory, f".{name}.lock"))
            self.is_new = not os.path.exists(self.path)
            if self.is_new:
                with on_failure(self._lock.close):
                    self._make(since)
        except OSError as error:
            raise ConfigurationError(
                f"The state of the durable subscriber {name!r} cannot be kept in {directory} ({error.strerror}): "
                "set durable_directory (or $POSTTROLL_DURABLE_DIRECTORY) to a directory that can be written."
            ) from None

    def _locked(self, path: str) -> io.FileIO:
        """Open *path*, and keep others from doing so as long as this process lives."""
        lock = io.FileIO(path, "a+")
        deadline = time.monotonic() + 1  # a child that was forked just now may not have let go of it
        with on_failure(lock.close):
            while not try_to_lock(lock.fileno()):
                if time.monotonic() > deadline:
                    lock.seek(0)
                    first = lock.read(300).decode("utf-8", "replace") or "another process"
                    what = f"The durable name {self._name!r} is in use by {first}"
                    raise RuntimeError(f"{what}: each running subscriber needs one of its own.")
                time.sleep(0.02)
        with suppress(OSError):  # the disk is full
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        _state_files.add(self)
        return lock

    def _make(self, since: float) -> None:
        with open(self._new_path, "wb"):
            pass
        with suppress(OSError):  # not everywhere one may choose it: then it is now
            os.utime(self._new_path, (since, since))
        os.replace(self._new_path, self.path)

    def read(self) -> tuple[list[bytes], float]:
        """Return the lines of earlier programs, and when they were written last, or since when there are none."""
        with open(self.path, "rb") as file:
            changed = os.fstat(file.fileno()).st_mtime
            lines = file.read(2**25).splitlines(keepends=True)
        if lines[1:] and not lines[-1].endswith(b"\n"):
            lines.pop()  # it was being written when the disk was full
        return lines, changed

    def append(self, line: bytes, all_lines: Callable[[], Iterable[bytes]]) -> None:
        """Write *line*, or, if that is due, all lines that still count (*line* among them)."""
        if self._file is None and time.monotonic() < self._next_attempt:
            return
        try:
            if self._file is None or self._growth > max(self.GROWTH, self._size):
                self._rewrite(all_lines())
            elif self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._growth += len(line)
        except OSError as error:
            self._close_file()  # a line may be half written: it is written anew the next time
            self._next_attempt = time.monotonic() + self.PAUSE
            text = "Cannot write %s (trying again): %s; until then what is handled may come again after a restart"
            self._log.warning("write", text, self.path, error.strerror)

    def _rewrite(self, lines: Iterable[bytes]) -> None:
        self._close_file()
        with open(self._new_path, "wb") as file:
            file.writelines(lines)
        os.replace(self._new_path, self.path)
        self._file = io.FileIO(self.path, "a")
        self._growth, self._size = 0, os.fstat(self._file.fileno()).st_size

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        """Let go of the file, and let others have it."""
        self._close_file()
        self._next_attempt = float("inf")
        self._lock.close()


_state_files: weakref.WeakSet[_StateFile] = weakref.WeakSet()


@in_forked_child
def _leave_state_files_to_parent() -> None:
    """Let go, in a forked child, of the locks, which else would outlive the parent."""
    for file in _state_files:
        file._lock.close()


def _current_owner() -> Any:
    """Return the asyncio task, else the thread, that runs this."""
    task = None
    if "asyncio" in sys.modules:
        with suppress(RuntimeError):  # no event loop runs in this thread
            task = sys.modules["asyncio"].current_task()
    return task or threading.current_thread()


_DURABLE_HEAD = rb"posttroll-durable 1 (\d{1,15})\n"
_DURABLE_LINE = (
    rb"([0-9a-f]{16})\n|\+([0-9a-f]{16}) (\d{1,15})\n|@([0-9a-f]{16}) (n\d{1,15}|a\d{1,15},\d{1,15}) (\d{1,15})\n"
)


class _DurableState:
    """What the subscribers with one durable name have handled, in a file, so that the next one knows.

    The file is a log: a line is written when something has been handled, and the system keeps it whatever happens to
    the program.  It is written anew when it has become long.  The first line tells since when (in milliseconds, as all
    times here) messages are wanted; then come lines of these kinds::

        <digest>                       a message that came live has been handled
        +<instance> <number>           a message of the past has been handled
        @<instance> n<number> <lines>  all messages of a publisher up to this number have been handled; the last so many
                                       lines of the first kind may be about later ones
        @<instance> a<time>,<number> <lines>
                                       a publisher has been found when it was at this number; what it sent after that
                                       number, or since that time, is wanted

    Args:
        name: The durable name; the file is called so.
        since: If the name is new: since when messages are wanted, in seconds since the epoch.
    """

    LINES = 16384  # of the first kind
    PUBLISHERS = 5000

    def __init__(self, name: str, since: float) -> None:
        self._since = max(since, 0)
        self._file = _StateFile(name, self._since)
        self.lines = 0  # how many of the first kind there have been
        self._handled: deque[bytes] = deque(maxlen=self.LINES)  # the newest of them
        self._numbers: dict[bytes, set[int]] = {}  # of the messages of the past that are handled, behind the places
        # What is written after "@", and how many lines of the first kind belong to what is before it.
        self._places: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()
        # The same for each of the sockets that hear one publisher; that which is behind the others counts.
        self._sources: dict[bytes, weakref.WeakKeyDictionary[_Source, tuple[int, bytes, int]]] = {}
        self._handed: dict[Any, tuple[int, bytes]] = {}  # who has what in hand, and when he got it
        self._waiting: dict[
            bytes, list[tuple[int, _Source, int, int]]
        ] = {}  # places, until all is handled that came before
        self._count = 0  # of what has been handed out
        self.on_unhandled: Callable[[bytes], object] = lambda content: None  # called with a message that comes again
        self._guard = threading.RLock()
        self._is_set_back = False  # the clock, since the last program
        if not self._file.is_new:
            self._read()
        # As earlier programs have left them:
        self._earlier = dict(self._places)
        self._earlier_handled = self._index_handled()
        self._earlier_numbers = {instance: set(numbers) for instance, numbers in self._numbers.items()}
        self._file.append(b"", self._all)

    @property
    def seconds(self) -> float:
        """How long ago it is since when messages are wanted."""
        return max(time.time() - self._since, 0)

    def _read(self) -> None:
        """Read what earlier programs have handled."""
        lines, changed = self._file.read()
        head = re.fullmatch(_DURABLE_HEAD, lines[0]) if lines else None
        entries = [re.fullmatch(_DURABLE_LINE, line) for line in lines[1:]]
        if head is None or None in entries:
            text = "%s is empty (was the disk full?): begun anew, with what was sent since %s"
            if lines:
                text = "%s is damaged: begun anew, with what was sent since %s, when it was written last"
            when = datetime.fromtimestamp(changed).isoformat(" ", "seconds")
            _log("subscriber").warning(text, self._file.path, when)
            entries, self._since = [], changed
        else:
            self._since = int(head[1]) / 1000
        self._is_set_back = max(changed, self._since) > time.time()
        if self._is_set_back:  # by how much cannot be told: rather too much of the past than too little
            self._since = 0.0
        for entry in cast("list[re.Match[bytes]]", entries):
            if entry[1] is not None:
                self._handled.append(entry[0])
                self.lines += 1
            elif entry[2] is not None:
                self._numbers.setdefault(entry[2], set()).add(int(entry[3]))
            else:
                self._places[entry[4]] = (entry[5], self.lines - int(entry[6]))
                self._forget_numbers(entry[4])

    def _index_handled(self) -> dict[bytes, list[int]]:
        """Return for each of the newest lines how many there were up to it, each time that it was written."""
        index: dict[bytes, list[int]] = {}
        for number, line in enumerate(self._handled, self.lines - len(self._handled) + 1):
            index.setdefault(line, []).append(number)
        return index

    def _place(self, instance: bytes, source: _Source, number: int, lines: int, found: bytes = b"") -> None:
        """Keep a line about a publisher, and write it; *found* is what it tells as long as there is no number."""
        sources = self._sources.setdefault(instance, weakref.WeakKeyDictionary())
        sources[source] = (-1, found, lines) if found else (number, b"n%d" % number, lines)
        current = [value for other, value in sources.items() if not other.is_left] or list(sources.values())
        _, place, lines = min(current)
        if len(current) > 1 and instance in self._places:  # what others have brought behind it may be among the lines
            lines = min(lines, self._places[instance][1])
        self._places[instance] = (place, lines)
        self._forget_numbers(instance)
        self._places.move_to_end(instance)
        if len(self._places) > self.PUBLISHERS:
            forgotten, _ = self._places.popitem(last=False)
            self._sources.pop(forgotten, None)
            self._numbers.pop(forgotten, None)
        self._file.append(self._place_line(instance), self._all)

    def _forget_numbers(self, instance: bytes) -> None:
        place, _ = self._places[instance]
        if place[:1] == b"n" and instance in self._numbers:
            self._numbers[instance] = {number for number in self._numbers[instance] if number > int(place[1:])}

    def _all(self) -> Iterable[bytes]:
        """Return all lines that still count."""
        head = b"posttroll-durable 1 %d\n" % int(self._since * 1000)
        numbers = (b"+%s %d\n" % (instance, number) for instance, each in self._numbers.items() for number in each)
        return chain([head], self._handled, map(self._place_line, self._places), numbers)

    def _place_line(self, instance: bytes) -> bytes:
        place, lines = self._places[instance]
        return b"@%s %s %d\n" % (instance, place, self.lines - lines)

    def restore(self, instance: bytes, source: _Source, is_later: bool) -> None:
        """Let *source*, the publisher *instance* that has just been found, begin where it ended the last time.

        If it *is_later* than others have brought something, it begins where they are.
        """
        with self._guard:
            # By another socket, which has other topics.
            is_heard = any(not other.is_left for other in self._sources.get(instance, ()))
            if is_later:
                places: Mapping[bytes, tuple[bytes, int]] = self._places
                handled, numbers = self._index_handled(), self._numbers
            else:
                places = self._earlier if is_heard else self._places
                handled, numbers = self._earlier_handled, self._earlier_numbers
            place, lines = places.get(instance, (b"", 0))
            known = set(numbers.get(instance, ()))
            if place:  # from now on: others must not go ahead of it
                number = int(place[1:]) if place[:1] == b"n" else -1
                self._sources.setdefault(instance, weakref.WeakKeyDictionary())[source] = (number, place, lines)
        if place:
            source.was_handled = partial(_was_handled, handled, known, lines)
            if place[:1] == b"n":
                source.position = number
            else:
                milliseconds, source.found = map(int, place[1:].split(b","))
                source.since = uptime() - max(time.time() - (0 if self._is_set_back else milliseconds / 1000), 0)

    def begin_with(self, instance: bytes, source: _Source, came: int) -> None:
        """Take note that *source*, a publisher, has just been found; so many messages may have come from it already."""
        with self._guard:
            milliseconds = max(int((time.time() - uptime() + source.since) * 1000), 0)
            found = b"a%d,%d" % (milliseconds, source.found)
            self._place(instance, source, 0, max(self.lines - came, 0), found)

    def note_hello(self, source: _Source) -> None:
        """Take note that what comes live from *source* from here on is behind its hello."""
        source.hello_lines = self.lines

    def advance(self, instance: bytes, source: _Source, number: int, is_before_hello: bool) -> None:
        """Take note that all up to *number* of a publisher is here, and was at its hello if *is_before_hello*."""
        with self._guard:
            lines = source.hello_lines if is_before_hello else self.lines
            if self._handed:
                waiting = self._waiting.setdefault(instance, [])
                waiting[1:] = [(self._count, source, number, lines)]  # the first, and the newest
            else:
                self._place(instance, source, number, lines)

    def hand_out(self, owner: Any, raw: bytes) -> None:
        """Take note that a thread or task gets the message in *raw*, as it came."""
        with self._guard:
            self._count += 1
            self._handed[owner] = (self._count, raw)

    def ask(self, owner: Any) -> None:
        """Take note that a thread or task asks for the next message, so it has handled the last one."""
        with self._guard:
            if owner in self._handed:
                self._note_handled(owner)
            if self._handed:
                for other in [other for other in self._handed if _has_ended(other)]:
                    self._note_handled(other)
            if self._waiting:
                oldest = min((count for count, _ in self._handed.values()), default=self._count + 1)
                for instance, waiting in self._waiting.items():
                    while waiting and waiting[0][0] < oldest:
                        self._place(instance, *waiting.pop(0)[1:])
                self._waiting = {instance: waiting for instance, waiting in self._waiting.items() if waiting}

    def _note_handled(self, owner: Any) -> None:
        raw = self._handed.pop(owner)[1]
        if raw[:1] == b"~":
            instance, number = raw.split(b"\0", 2)[1].split(b" ")[1:]
            line = b"+%s %s\n" % (instance, number)
            self._numbers.setdefault(instance, set()).add(int(number))
        else:
            line = _digest_line(raw)
            self._handled.append(line)
            self.lines += 1
        self._file.append(line, self._all)

    def leave(self, receiving: Sequence[Any], is_handled: bool, is_left: bool) -> None:
        """Take note that this thread or task closes the subscriber.

        Args:
            receiving: The threads and tasks in their loops; an asyncio task is for a while after it has left its loop.
            is_handled: Whether what has been received is handled, by this thread or task and by those that have ended.
            is_left: Whether this thread is not in its loop; else it may be in a signal handler.
        """
        me = _current_owner()
        is_left = is_left or not isinstance(me, threading.Thread)
        busy = [owner for owner in receiving if owner is not me or not is_left]
        with self._guard:
            if me not in busy:
                self.ask(me) if is_handled else self._take_back(me)
            if not busy:
                self.close()

    def close(self) -> None:
        """Let go of the file and of the name."""
        with self._guard:
            for owner in list(self._handed):
                self._note_handled(owner) if _has_ended(owner) else self._take_back(owner)
            self._file.close()

    def _take_back(self, owner: Any) -> None:
        """Take note that *owner* has not handled what it has in hand, if it has something."""
        _, raw = self._handed.pop(owner, (0, b""))
        if raw:
            self.on_unhandled(raw.split(b"\0", 2)[2] if raw[:1] == b"~" else raw)


def _was_handled(handled: dict[bytes, list[int]], numbers: set[int], lines: int, number: int, content: bytes) -> bool:
    """Whether a message is among those *handled*, according to what came after so many *lines*."""
    if number in numbers:
        return True
    found = handled.get(_digest_line(content))
    if not found or found[-1] <= lines:
        return False
    found.pop()  # the same text once more is another message
    return True


def _has_ended(owner: Any) -> bool:
    return not owner.is_alive() if isinstance(owner, threading.Thread) else bool(owner.done())


def _digest_line(raw: bytes) -> bytes:
    line: bytes = get_blake2b()(raw, digest_size=8).hexdigest().encode() + b"\n"
    return line


# ======================================================================================================================
# 11. Subscribing
#
# All that a subscriber has, sockets, connections, and what follows its services, is served by whoever receives from it.
# ======================================================================================================================


def _topic_prefixes(topics: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the beginnings of the messages that belong to *topics*, the subjects' beginnings."""
    names = [topics] if isinstance(topics, str) else list(topics or [""])
    prefixes = []
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"A topic is a text, the beginning of a subject, not {name!r}.")
        if name.startswith(_MAGICK):
            prefixes.append(name)
        else:
            prefixes.append(_MAGICK + ("" if not name or name.startswith("/") else "/") + name)
    return tuple(dict.fromkeys(prefixes))


def _single_addresses(addresses: Any) -> Iterator[Any]:
    """Yield the addresses one by one: of one, of several, or of answers of `get_pub_address` among several."""
    if isinstance(addresses, (str, Mapping)) or not isinstance(addresses, Iterable):
        yield addresses
    else:
        for entry in addresses:
            yield from _single_addresses(entry)


def backend_towards(announced: Any) -> str | None:
    """Return the backend to connect with to a publisher that announced a backend, None if it cannot be used.

    Anybody can announce anything, so a secure process uses CURVE whatever it is told: the worst that a false
    announcement causes is an attempt to connect that fails.
    """
    own = configured_backend()
    if own == "secure_zmq" or announced in (None, own):
        return own
    has_keys = config.get("client_secret_key_file") and config.get("server_public_key_file")
    return "secure_zmq" if announced == "secure_zmq" and has_keys else None


def value_at(data: Any, path: str) -> Any:
    """Return what *data* hold at *path*, a key, or several with dots between (numbers for lists); None if nothing."""
    if isinstance(data, Mapping) and path in data:
        return data[path]
    for part in path.split("."):
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, list) and part.isdecimal():
            data = data[int(part)] if int(part) < len(data) else None
        else:
            return None
    return data


def sent_at(message: Message) -> float:
    """Return when *message* was made, in seconds since 1970; without time zone, its time is in UTC."""
    return message.time.replace(tzinfo=message.time.tzinfo or timezone.utc).timestamp()


class unique:  # noqa: N801 - it is used as if it were a function
    """A ``message_filter`` that lets only one of several copies through, such as those of redundant receivers.

    Copies have the same *key*, and were made at most *seconds* apart, by the times in their headers: so what is sent
    anew later is no copy, also when both are caught up at once.  The first that comes is let through::

        with Subscribe(["antenna_1", "antenna_2"], message_filter=unique("uid")) as subscriber: ...

    Args:
        key: A key of the data, with dots for one further inside (``"granule.uid"``); or a function that is called with
            the message, and returns what copies have in common.  Messages without it (None) are all let through.
        seconds: How far apart in time copies are made at most.
        limit: How many messages it remembers, the newest, each for *seconds* and another hour (for copies that are
            caught up late).  Beyond that copies may be let through, never held back what is none.

    Attributes:
        dropped: How many copies it has held back.

    One object may serve several subscribers and threads.  It keeps nothing when the program ends: afterwards a durable
    subscriber may get another copy, never none.  What a durable subscriber gets once more, as it was not handled, is
    let through again: the subscriber tells that to the method ``forget`` of its filter, if it has one.  In a condition
    of several, ask this one last: what it lets through it takes for received.
    """

    LATE = 3600.0  # seconds that copies may come later than they were made

    def __init__(self, key: str | Callable[[Message], Any], seconds: float = 300, limit: int = 100000) -> None:
        self._key = key if callable(key) else lambda message: value_at(message.data, key)
        self._seconds = seconds
        self._limit = limit
        self._passed: dict[bytes, list[float]] = {}  # when those were made that were let through
        self._order: deque[tuple[float, bytes, float]] = deque()  # when they came, whose they are, when they were made
        self._lock = threading.Lock()
        self.dropped = 0

    def __call__(self, message: Message) -> bool:
        """Return whether *message* is the first of its copies."""
        digest = self._digest(message)
        if digest is None:
            return True
        made, now = sent_at(message), time.monotonic()
        with self._lock:
            while self._order and (len(self._order) >= self._limit or self._order[0][0] < now):
                self._remove(*self._order.popleft()[1:])
            if any(abs(made - other) <= self._seconds for other in self._passed.get(digest, ())):
                self.dropped += 1
                return False
            self._passed.setdefault(digest, []).append(made)
            self._order.append((now + self._seconds + self.LATE, digest, made))
        return True

    def forget(self, message: Message) -> None:
        """Let *message* through when it comes again: it has been received, but not handled."""
        digest = self._digest(message)
        if digest is not None:
            with self._lock:
                self._remove(digest, sent_at(message))

    def _digest(self, message: Message) -> bytes | None:
        """Return what stands for the key of *message*, None if it has none."""
        value = self._key(message)
        if value is None:
            return None
        text = json.dumps(value, sort_keys=True, default=repr)
        return cast(bytes, get_blake2b()(text.encode(), digest_size=16).digest())

    def _remove(self, digest: bytes, made: float) -> None:
        times = self._passed.get(digest, [])
        with suppress(ValueError):  # it has been forgotten already
            times.remove(made)
        if not times:
            self._passed.pop(digest, None)


class _Receiver:
    """Somebody who receives from a subscriber, until the next `Subscriber.stop`."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        self.owner = None if subscriber._durable is None else _current_owner()
        self.stops = subscriber._stops  # how many there were when it began

    @property
    def is_on(self) -> bool:
        return self.stops == self._subscriber._stops and not self._subscriber._is_closed


class _Inbox:
    """The messages that are there for a subscriber: lying in its sockets, read from them, or accepted already.

    Whoever calls its methods holds the subscriber's lock; `accepted` can be used without.
    """

    AHEAD = 16  # messages that are accepted at once
    BATCH_SECONDS = 0.05  # of receiving, until all else has its turn
    SILENCE = 0.001  # seconds without a message, after which one that comes is mostly alone

    def __init__(
        self, message_filter: Callable[[Message], Any] | None, translate: bool | str, durable: _DurableState | None
    ) -> None:
        self._filter = message_filter
        self._translate = translate
        self._durable = durable
        self._streams: list[_CatchUp] = []  # of which the socket has something
        # Of sockets from which a connection was taken, as it came and what is in it; and what to do between.
        self._unread: deque[tuple[bytes, bytes | None, _CatchUp] | Callable[[], None]] = deque()
        self.accepted: deque[Message] = deque()  # but not handed out
        self.batch_end = 0.0
        self._is_alone = False  # the next message, most likely: look for more only after it has been handed out
        self._heard: float | None = None  # the end of the batch in which the last message came
        self.limited_log = LimitedLogger("subscriber")
        forget = getattr(message_filter, "forget", None)
        if durable is not None and forget is not None:
            durable.on_unhandled = lambda content: forget(Message.decode(content))

    def note_ready(self, stream: _CatchUp) -> None:
        """Take note that there is something in the socket of *stream*."""
        if stream not in self._streams:
            self._streams.append(stream)

    @property
    def last_heard(self) -> float | None:
        """When the last message came, as `Subscriber.last_heard`."""
        return None if self._heard is None else self._heard - self.BATCH_SECONDS

    @property
    def is_ready(self) -> bool:
        """Whether there may be a message without any waiting."""
        return bool(self._streams or self._unread or self.accepted)

    def read_all(self, stream: _CatchUp) -> None:
        """Take what lies unread in the socket of *stream*; the messages are handed out later."""
        is_all = False
        while not is_all:
            with suppress(zmq.Again):
                while True:
                    raw = stream.recv(_NOBLOCK)
                    content = (stream.note if raw[:1] == b"p" else stream.take)(raw)
                    if content is not None:
                        self._unread.append((raw, content, stream))
            is_all = not stream.release()

    def later(self, note: Callable[[], None]) -> None:
        """Call *note* when all is handed out that has been read until now."""
        if self._unread:
            self._unread.append(note)
        else:
            note()

    def begin_batch(self, since: float) -> None:
        """Take note that all else has had its turn, for which one has waited *since* then."""
        now = time.monotonic()
        self.batch_end = now + self.BATCH_SECONDS
        self._is_alone = now - since > self.SILENCE

    def take(self, owner: Any) -> Message | None:
        """Return the next message, for *owner* to handle; None also if all else is to have its turn."""
        if time.monotonic() >= self.batch_end:
            self._streams = self._streams[-1:] + self._streams[:-1]  # the next has its turn
            return None
        if not self.accepted:
            self._accept_some(owner)
        try:
            return self.accepted.popleft()
        except IndexError:
            return None

    def _accept_some(self, owner: Any) -> None:
        """Accept messages of those that are there; only one if it is then to be known who handles which."""
        accepted, durable, is_alone = self.accepted, self._durable, self._is_alone
        self._is_alone = False
        count = self.AHEAD if durable is None and self._filter is None and not is_alone else 1
        while time.monotonic() < self.batch_end:
            for _ in range(count):
                if self._unread:
                    entry = self._unread.popleft()
                    if callable(entry):
                        entry()
                        continue
                    raw, content, stream = entry
                elif self._streams:
                    stream = self._streams[-1]
                    try:
                        raw = stream.recv(_NOBLOCK)
                    except zmq.ZMQError:  # nothing more, or closed meanwhile
                        self._streams = self._streams[:-1]
                        continue
                    if is_alone and not stream.is_merging:
                        # To find nothing takes as long as to receive several; if there is more, poll says so.
                        self._streams = self._streams[:-1]
                    content = (stream.note if raw[:1] == b"p" else stream.take)(raw)
                else:
                    return
                if content is None or (stream.twins is not None and not stream.twins.is_new(content, stream)):
                    continue
                message = self._accept(content, stream)
                if message is not None:
                    accepted.append(message)
            if accepted:
                if durable is not None:
                    durable.hand_out(owner, raw)
                return

    def _accept(self, content: bytes, stream: _CatchUp) -> Message | None:
        """Return the message in *content*, None if it is none, or not wanted."""
        try:
            message = Message.decode(content)
        except MessageError as error:
            self.limited_log.warning("message", "Skipped a bad message: %s", error)
            return None
        self._heard = self.batch_end
        if self._translate:
            message.origin = stream.origin
            tcp = split_tcp_address(stream.origin) if self._translate != "origin" else None
            if tcp is not None:  # the host that it came from, in place of the one that its sender says
                message.sender = f"{message.sender.partition('@')[0]}@{tcp[0]}"
        if self._filter is not None and not self._filter(message):
            return None
        return message

    def clear(self) -> None:
        """Forget all; the sockets are closed."""
        self._streams = []
        self._unread.clear()
        self.accepted.clear()


class _SubscriberSockets:
    """Where the messages of a subscriber come from: its addresses and hooks, and the sockets for them."""

    def __init__(
        self,
        topics: str | Iterable[str] | None,
        message_filter: Callable[[Message], Any] | None,
        translate: bool | str,
        since: float | timedelta | datetime | None,
        durable: str | None,
    ) -> None:
        configured_backend()  # an unknown one is an error now
        self._topics = _topic_prefixes(topics)
        self._translate = translate
        # Time that passes between two clocks must not make it later: rather too much of the past than too little.
        wall, now = time.time(), uptime()
        seconds = _seconds_since(since)
        self._durable = None if durable is None else _DurableState(durable, wall - seconds)
        self._begin = now - seconds if self._durable is None else uptime() - self._durable.seconds
        self._is_begun = False
        self._lock = threading.RLock()  # whoever holds it may run the loop and use the sockets
        self._loop = Loop()
        self._owner = 0  # the thread that uses the sockets just now
        self._turning: Any = None  # the asyncio task that waits for all who await
        self._streams: dict[zmq.Socket[bytes], _CatchUp] = {}
        self._left: OrderedDict[Any, _CatchUp] = OrderedDict()  # by slot: those without a socket
        self._inbox = _Inbox(message_filter, translate, self._durable)
        self._connections = _Connections(
            self._loop,
            self._begin,
            self._streams,
            self._open_socket,
            self._inbox.read_all,
            self._leave_stream,
            lambda key: _load_client_keys(key[1]),
        )
        self._wanted: dict[str, tuple[tuple[str, ...], str | None, float]] = {}  # the topics, backend, and since when
        self.missed = self.caught_up = 0
        self._is_closed = False  # last: there is something to be closed

    def add(self, address: Any, topics: str | Iterable[str] | None = None) -> None:
        """Add an address; one that was removed goes on where it was left.

        Args:
            address: A publisher's address, as text or as `get_pub_address` returns it.
            topics: The topics to subscribe to there, besides those that it is subscribed to there already; None for
                those of the subscriber, if there are no others.  With more topics it is connected anew: nothing is
                lost and nothing comes twice, but of the new ones what was sent a moment before may come, too.

        Raises:
            ValueError: The address cannot be used.
            ConfigurationError: The secure backend is not set up.
        """
        self._add(address, topics, uptime() if self._is_begun else self._begin)

    def _add(self, address: Any, topics: str | Iterable[str] | None, begin: float) -> None:
        announced = address.get("backend") if isinstance(address, Mapping) else None
        address = _check_connectable(address.get("URI") if isinstance(address, Mapping) else address)
        # What stays in the process needs no keys.
        backend = "unsecure_zmq" if address.startswith("inproc://") else backend_towards(announced)
        if backend is None:
            raise ValueError(
                f"{address} uses the backend {announced!r}, this program {configured_backend()!r}: not connected."
            )
        # Not since now if it is there already: its publisher may not have been found yet.
        prefixes, _, begin = self._wanted.get(address, ((), None, begin))
        if topics is not None or not prefixes:  # what it was subscribed to before, it stays subscribed to
            new = self._topics if topics is None else _topic_prefixes(topics)
            prefixes = tuple(dict.fromkeys((*prefixes, *new)))
        wanted, is_new = (prefixes, backend, begin), address not in self._wanted
        if self._wanted.get(address) != wanted:
            if not address.startswith("inproc:"):
                _load_client_keys(backend)  # what is wrong with them is an error now, not where messages are received
            self._wanted[address] = wanted
            want = partial(self._want, address, wanted)
            if is_new:
                with on_failure(partial(self._wanted.pop, address, None)):
                    self._change(want)
            else:
                self._change(partial(self._change_later, want))  # nothing that worked is lost if it cannot be just now

    def _want(self, address: str, wanted: tuple[tuple[str, ...], str | None, float]) -> None:
        if self._wanted.get(address) == wanted:  # still
            prefixes, backend, begin = wanted
            self._connections.want(address, (prefixes, backend, address if self._translate else None), begin)

    def change_topics(self, topics: str | Iterable[str] | None) -> None:
        """Subscribe to other topics, at all addresses.

        What has been received is still handed out.  Of what is within the topics of before and after nothing is lost,
        and nothing comes twice; but if they are changed once more before a publisher has answered, what it has just
        sent may.  Of new topics what was sent a moment before may come, too, unless all of them are new.

        Args:
            topics: The topics, in place of all those of before.
        """
        self._topics = new = _topic_prefixes(topics)
        for address, (prefixes, backend, begin) in list(self._wanted.items()):
            if prefixes != new:
                wanted = (new, backend, begin if _overlap(prefixes, new) else uptime())
                self._wanted[address] = wanted
                self._change(partial(self._change_later, partial(self._want, address, wanted)))

    def remove(self, address: Any) -> None:
        """Remove an address; one that is not there is ignored.  What has been received from it is still handed out."""
        address = address.get("URI") if isinstance(address, Mapping) else address
        if self._wanted.pop(address, None) is not None:
            self._change(partial(self._connections.drop, address))

    def update(self, addresses: str | Iterable[Any]) -> bool:
        """Subscribe to *addresses*, and no longer to others; return whether anything changed."""
        entries = list(_single_addresses(addresses or ()))
        before = dict(self._wanted)
        for entry in entries:
            self.add(entry)
        wanted = {entry.get("URI") if isinstance(entry, Mapping) else entry for entry in entries}
        for address in before:
            if address not in wanted:
                self.remove(address)
        return before != self._wanted

    @property
    def addresses(self) -> list[str]:
        """The addresses."""
        return list(self._wanted)

    @property
    def up_to_date(self) -> int:
        """How many publishers of ours have sent all that they keep and that was wanted of the past."""
        return sum(stream.up_to_date for stream in list(self._streams.values()))

    @property
    def subscribers(self) -> list[zmq.Socket[bytes]]:
        """The sockets that messages come from; many addresses share one."""
        return self._connections.sockets

    def add_hook_sub(self, address: str, topics: str | Iterable[str], callback: Callable[[Message], Any]) -> None:
        """Subscribe to *address*, and have *callback* called with its messages, in the thread that receives.

        Args:
            address: The address to connect to.
            topics: The topics to subscribe to there.
            callback: Called with each message, while `recv` waits.
        """
        self._add_hook(zmq.SUB, address, _topic_prefixes(topics), callback)

    def add_hook_pull(self, address: str, callback: Callable[[Message], Any]) -> None:
        """Connect a PULL socket to *address*; *callback* is called with what it gets, in the thread that receives.

        Args:
            address: The address to connect to, for example ``"inproc://commands"`` of another thread.
            callback: Called with each message, while `recv` waits.
        """
        self._add_hook(zmq.PULL, address, (), callback)

    def _add_hook(self, kind: int, address: str, topics: Sequence[str], callback: Callable[[Message], Any]) -> None:
        _check_connectable(address)

        def handle(frames: list[bytes]) -> None:
            try:
                message = Message.decode(frames[0])
            except MessageError as error:
                self._inbox.limited_log.warning("hook", "Skipped a bad message from %s: %s", address, error)
            else:
                callback(message)

        def open_socket() -> None:
            sock = set_up_client_socket(kind, address)
            for topic in topics:
                sock.setsockopt(zmq.SUBSCRIBE, topic.encode())
            self._loop.watch(sock, partial(_take_frames, sock, handle))

        self._change(open_socket)

    # -- sockets: whoever calls these holds the lock --

    def _change(self, change: Callable[[], None]) -> None:
        """Apply *change* to the sockets: now if nobody else waits on them, else by who does."""
        if self._lock.acquire(blocking=False):
            before, self._owner = self._owner, threading.get_ident()
            try:
                if not self._is_awaited:
                    self._loop.settle()
                    if not self._is_closed:
                        change()
                    return
            finally:
                self._owner = before
                self._lock.release()
                if self._is_closed:
                    self._close()
        self._loop.call(partial(self._change_later, change))

    def _close(self) -> None:
        """Close the sockets; if it interrupts this thread, which uses them just now, that does so when it is done."""
        raise NotImplementedError

    def _change_later(self, change: Callable[[], None]) -> None:
        """Apply *change*, which nobody waits for, once it can be: it may be that no descriptor is left."""
        try:
            change()
        except (ConfigurationError, zmq.ZMQError) as error:
            self._inbox.limited_log.warning("change", "Cannot connect (trying again): %s", error)
            self._loop.at(time.monotonic() + _Link.RENEWAL, partial(self._change_later, change))

    def _open_socket(self, slot: tuple[Any, str, int]) -> zmq.Socket[bytes]:
        """Return a new SUB socket for all the addresses with the same topics and backend."""
        prefixes, backend, origin = slot[0]
        sock = set_up_client_socket(zmq.SUB, "", None, backend)
        stream = self._left.pop(slot, None)
        if stream is None:
            topics = [prefix.encode() for prefix in prefixes]
            notes = self._note_missed, self._wake_at, self._note_past
            stream = _CatchUp(topics, *notes, self._durable, self._inbox.later, self._connections)
            stream.origin = origin or ""
            stream.is_later = self._inbox.last_heard is not None
        stream.attach(sock)
        self._streams[sock] = stream
        self._loop.watch(sock, partial(self._inbox.note_ready, stream))
        return sock

    def _wake_at(self, stream: _CatchUp, when: float) -> None:
        self._loop.at(when, partial(self._inbox.note_ready, stream))

    def _leave_stream(self, slot: tuple[Any, str, int], sock: zmq.Socket[bytes]) -> None:
        """Keep what is known of those that were heard by a socket, which is closed: they may come again."""
        self._left[slot] = stream = self._streams.pop(sock)
        stream.leave()
        if len(self._left) > self._connections.LEFT:
            self._left.popitem(last=False)

    def _note_past(self) -> None:
        self.caught_up += 1

    def _note_missed(self, publisher: str, count: int) -> None:
        self.missed += count
        text = "%d messages of %s are gone: it keeps less than it sent while there was no connection"
        _log("subscriber").warning(text, count, publisher)

    @property
    def _is_awaited(self) -> bool:
        """Whether an asyncio program waits on the sockets; not if its event loop has ended in the middle of it."""
        turning = self._turning
        return turning is not None and not turning.done() and not turning.get_loop().is_closed()


class Subscriber(_SubscriberSockets):
    """Subscribes to message streams.

    Args:
        addresses: The publishers' addresses, as text, or as `get_pub_address` returns them.
        topics: The beginnings of the subjects to subscribe to; by default everything.
        message_filter: Called with each message; those for which it returns a false value are skipped; see `unique`.
        translate: Put the host of the publisher's address in place of the host of the sender; with ``"origin"``, only
            tell that address, as `Message.origin`.  It takes a socket for each address.
        since: Begin with the messages that publishers of ours have sent before: in the last so many seconds, in the
            last `timedelta`, or since a `datetime`; as far as they keep them (see ``history_messages``).
        durable: A name under which is written down what has been handled.  The next program with this name gets what
            came in between, as far as the publishers keep it, and what this one had received, but not handled.

    Attributes:
        missed: How many messages are gone, of publishers that could not be heard for a while: they were more than those
            keep.  Each time that is also logged as a warning.  It is rather too large than too small: messages of all
            subjects count, and those that came just before the connection was lost, after the publisher had last told
            how many it had sent (it does so ten times a second).
        caught_up: How many messages of the past have come: of before the subscriber (see *since* and *durable*), or of
            the time when a publisher could not be heard.

    Raises:
        ValueError: An address cannot be used, or *durable* is no name for a file.
        ConfigurationError: The ``durable_directory`` cannot be used.
        RuntimeError: Another subscriber uses the name *durable* just now.

    A message counts as handled when the thread or asyncio task that received it asks for the next one, has ended, or
    closes the subscriber: by leaving its ``with`` block without an exception, or by `close` (not while an exception is
    being handled, and not in a signal handler, as its loop goes on).  So does, after `stop`, the last one of a loop.
    With *durable*, *since* counts only when the name is used for the first time.

    It can be iterated over, also with ``async for``, and is a context manager that closes it.  `stop` and `close` may
    be called from other threads and from signal handlers, `add`, `remove` and `update` from other threads.  What a
    publisher of ours has sent while there was no connection to it comes as soon as there is one again.
    """

    _LONGEST_WAIT = 0.9  # a signal that arrives just before a poll begins does not end it, and on Windows none does

    def __init__(
        self,
        addresses: str | Iterable[Any],
        topics: str | Iterable[str] | None = "",
        message_filter: Callable[[Message], Any] | None = None,
        translate: bool | str = False,
        since: float | timedelta | datetime | None = None,
        durable: str | None = None,
    ) -> None:
        self._receivers: list[_Receiver] = []
        self._failure: BaseException | None = None  # of that task
        self._stops = 0
        self._pid = os.getpid()
        super().__init__(topics, message_filter, translate, since, durable)
        with on_failure(self.close):
            self.update(addresses)
        self._is_begun = durable is None  # else what was sent before an address was added is wanted, too

    # -- receiving --

    def recv(self, timeout: float | None = None) -> Iterator[Message | None]:
        """Receive messages until the subscriber is stopped.

        Args:
            timeout: Seconds without a message after which None is yielded; None to wait for ever.

        Yields:
            The messages; None each time that *timeout* has passed without one.
        """
        with self._receiving() as receiver:
            inbox = self._inbox
            accepted = inbox.accepted if self._durable is None else deque()
            while True:
                message = None
                # Without a lock, and without a call:
                if accepted and receiver.stops == self._stops and time.monotonic() < inbox.batch_end:
                    try:
                        message = accepted.popleft()
                    except IndexError:  # another thread was faster
                        continue
                else:
                    message = self._next(receiver, timeout)
                    if message is None and not receiver.is_on:
                        return
                yield message

    @contextmanager
    def _receiving(self) -> Iterator[_Receiver]:
        """The time in which somebody receives."""
        if self._pid != os.getpid():
            raise RuntimeError("Cannot receive: the subscriber was made before the fork, by the parent process.")
        receiver = _Receiver(self)
        self._receivers.append(receiver)
        try:
            yield receiver
        finally:
            self._receivers.remove(receiver)
            if not self._receivers and self._is_awaited:
                self._turning.cancel()
            if self._is_closed:
                self._close()

    def _next(self, receiver: _Receiver, timeout: float | None) -> Message | None:
        """Return the next message; None after *timeout*, or when the receiver is to end."""
        with self._lock:
            before, self._owner = self._owner, threading.get_ident()
            try:
                if self._durable is not None:
                    self._durable.ask(receiver.owner)
                if receiver.stops == self._stops:
                    message = self._inbox.take(receiver.owner)
                    if message is not None:
                        return message
                if self._is_awaited:
                    raise RuntimeError("An asyncio program receives from this subscriber: a thread cannot do so too.")
                deadline = None if timeout is None else time.monotonic() + timeout
                while receiver.is_on:
                    now = time.monotonic()
                    longest = now + self._LONGEST_WAIT
                    until = 0.0 if self._inbox.is_ready else longest if deadline is None else min(deadline, longest)
                    self._loop.turn(until)
                    self._inbox.begin_batch(now)
                    message = self._inbox.take(receiver.owner)
                    if message is not None or (deadline is not None and time.monotonic() >= deadline):
                        return message
            finally:
                self._owner = before
        return None

    def __call__(self, **kwargs: Any) -> Iterator[Message | None]:
        """Receive, as `recv` does."""
        return self.recv(**kwargs)

    def __iter__(self) -> Iterator[Message]:
        return cast("Iterator[Message]", self.recv())

    async def receive(self, timeout: float | None = None) -> Message | None:
        """Receive one message, in an asyncio program.

        With *durable*, await it in the task that handles the message, and with its own *timeout*: `asyncio.create_task`
        and (before Python 3.12) `asyncio.wait_for` make a task that ends with the message, which so counts as handled.

        Args:
            timeout: How long to wait, in seconds; None for ever.

        Returns:
            The message; None after *timeout*, or when the subscriber is stopped.

        Raises:
            RuntimeError: The event loop cannot wait for sockets (the default one of Windows); it says what to do.
        """
        with self._receiving() as receiver:
            return await self._next_async(receiver, None if timeout is None else time.monotonic() + timeout)

    async def __aiter__(self) -> AsyncIterator[Message]:
        with self._receiving() as receiver:
            while True:
                message = await self._next_async(receiver, None)
                if message is None:
                    return
                yield message

    async def _next_async(self, receiver: _Receiver, deadline: float | None) -> Message | None:
        """Do what `_next` does, in an asyncio program; all who await share one task that waits."""
        import asyncio

        if self._durable is not None:
            self._durable.ask(receiver.owner)
        is_last = False
        while receiver.is_on:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            with self._lock:
                before, self._owner = self._owner, threading.get_ident()
                try:
                    message = self._inbox.take(receiver.owner)
                    if message is not None or is_last:
                        return message
                    now = time.monotonic()
                    is_last = deadline is not None and now >= deadline
                    if not self._is_awaited:
                        if is_last:
                            self._loop.turn(now)  # without a wait, nobody has looked
                        else:
                            wait = self._loop.turn_async(now if self._inbox.is_ready else None)
                            self._turning = asyncio.ensure_future(wait)
                            self._turning.add_done_callback(self._end_turning)
                finally:
                    self._owner = before
            if is_last:
                await asyncio.sleep(0)  # whoever asks again and again lets others run
            else:
                await asyncio.wait({self._turning}, timeout=None if deadline is None else deadline - now)
            self._inbox.begin_batch(now)
        return None

    def _end_turning(self, turning: Any) -> None:
        if self._turning is turning:  # else somebody has begun the next one
            self._turning = None
        if not turning.cancelled() and turning.exception() is not None:
            self._failure = turning.exception()
        if self._is_closed and not self._receivers:
            self._close()

    @property
    def _has_unread(self) -> bool:
        """Whether there is something to receive without any waiting."""
        sockets = self._connections.sockets
        return self._inbox.is_ready or any(cast(int, sock.get(zmq.EVENTS)) & zmq.POLLIN for sock in sockets)

    @property
    def last_heard(self) -> float | None:
        """When a message came last, a heartbeat or another one on its topics; None before the first.

        It is a time of `time.monotonic`, in seconds, at most 0.05 s too early.  What the *message_filter* skips counts,
        what lies unread (as nobody receives) does not::

            if time.monotonic() - subscriber.last_heard > 60: ...
        """
        return self._inbox.last_heard

    @property
    def running(self) -> bool:
        """Whether somebody is receiving."""
        return any(receiver.is_on for receiver in self._receivers)

    def stop(self) -> None:
        """End the receiving of all who receive now."""
        self._stops += 1
        if self._pid == os.getpid():
            self._loop.wake()

    def close(self) -> None:
        """End the receiving, and close the sockets."""
        self._leave(is_handled=sys.exc_info()[0] is None)

    def _leave(self, is_handled: bool, is_left: bool = False) -> None:
        """Close it; what this thread or task received last *is_handled* or not, and its loop *is_left* for sure."""
        if self._durable is not None and self._pid == os.getpid():
            self._durable.leave([receiver.owner for receiver in self._receivers], is_handled, is_left)
        self._close()

    def _close(self) -> None:
        self._is_closed = True
        if self._pid != os.getpid():
            return  # they belong to the parent, whose thread may have held the lock at the time of the fork
        self.stop()
        if self._owner == threading.get_ident():
            return  # in a signal handler or a callback: who receives closes them
        # Whoever receives in another thread closes them; this thread waits for it, but not for ever.
        if self._lock.acquire(timeout=1):
            try:
                is_suspended = self._is_awaited and not self._turning.get_loop().is_running()
                if is_suspended:
                    self._turning.cancel()  # its event loop may never run again, and nobody else would close them
                elif self._is_awaited:
                    return
                self._connections.close()
                self._loop.close()
                self._inbox.clear()
                if self._durable is not None and (is_suspended or not self._receivers):
                    self._durable.close()
            finally:
                self._lock.release()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, kind: object = None, *exc_info: object) -> None:
        self._leave(kind is None, is_left=True)

    async def __aenter__(self) -> Subscriber:
        return self

    async def __aexit__(self, kind: object = None, *exc_info: object) -> None:
        self._leave(kind is None, is_left=True)

    def __del__(self) -> None:
        if hasattr(self, "_is_closed"):  # also if it is closed: that may have been interrupted
            self._close()


def _take_frames(sock: zmq.Socket[bytes], handle: Callable[[list[bytes]], object]) -> None:
    """Call *handle* with the frames of the next messages of *sock*, but not so many that others have to wait."""
    with suppress(zmq.Again):
        for _ in range(100):
            handle(sock.recv_multipart(_NOBLOCK))


def _seconds_since(since: float | timedelta | datetime | None) -> float:
    """Return how many seconds ago *since* is; raises ValueError if it is no such time."""
    if isinstance(since, datetime):
        with suppress(ValueError, OverflowError, OSError):  # at the ends of the calendar, local time is none
            since = since if since.tzinfo else since.astimezone()
            return max((datetime.now(timezone.utc) - since).total_seconds(), 0.0)
        raise ValueError(f"since has no local time: {since}")
    seconds = since.total_seconds() if isinstance(since, timedelta) else float(since or 0)
    if not 0 <= seconds < 1e9:
        raise ValueError(f"since is a number of seconds, a timedelta or a datetime of the past, not {since!r}.")
    return seconds


class _Publisher:
    """A publisher that a subscriber follows: which of its services, and which nameservers know it."""

    def __init__(self, is_ours: bool) -> None:
        self.services: set[str] = set()
        self.hosts: set[str] = set()
        self.is_ours = is_ours  # we add it, not the program
        self.replaced_at: set[str] = set()  # nameservers that told of one that has none of the services at its address
        self.backends: dict[str, str] = {}  # as nameservers told
        self.denials: dict[str, list[float]] = {}  # when a nameserver that knew it first said no, and how many times

    def is_changed(self, host: str | None, backend: str | None) -> bool:
        """Whether *host* told of another backend before; other implementations do not always tell of one."""
        return host is not None and backend is not None and self.backends.get(host, backend) != backend


class _Follower:
    """Keeps a subscriber connected to the publishers of its services, as nameservers know them.

    With *listen* it hears of new and lost publishers on the nameservers' address ports.  Lookups fill the gaps: soon
    again while a service has no publisher, when the connection to an address port has been made (anew), and now and
    then.  A publisher is let go when all nameservers that knew it have said no, several times and over some time (one
    that has just started knows nothing yet), and when there is no connection to it either.
    """

    SOON = 2.0  # seconds until the next lookup while something is missing
    SELDOM = 10.0  # otherwise, as long as it does not listen, or while a publisher is in doubt
    RARELY = 60.0  # otherwise
    PATIENCE = 3  # answers without a publisher until it is taken for lost
    LIMIT = 20000  # addresses

    def __init__(
        self,
        subscriber: Subscriber,
        services: Sequence[str],
        nameservers: Sequence[str],
        listen: bool,
        address_port: int | None = None,
    ) -> None:
        self._subscriber = subscriber
        self._loop = subscriber._loop
        self._services = services
        self._listen = listen
        self._address_port = address_port or config.get("address_publish_port")
        self._resolutions = {host: self._resolution(host) for host in nameservers}
        self._sockets: dict[str, list[zmq.Socket[bytes]]] = {}  # the first is that for lookups
        self._endpoints: dict[str, str] = {}  # what they are connected to
        self._keys: dict[str, dict[str, bytes]] = {}  # with which
        self._heard: set[str] = set()  # those whose address port is connected
        self._last_answer: dict[str, float] = {}
        self._known: dict[str, _Publisher] = {}
        self._log = LimitedLogger("subscriber")
        self._has_warned = False
        self._timer = Timer(math.inf, self._run)
        self._interval = self.SOON
        self._letting_go = Timer(-math.inf, self._let_go_of_lost)

    def begin(self) -> None:
        """Start to follow."""
        self._ask_for_names()
        self._open()
        self._look_up(self.missing)
        self._run_in(self.SOON)

    def _run_in(self, seconds: float) -> None:
        self._interval = seconds
        self._timer.cancel()
        self._timer = self._loop.at(time.monotonic() + seconds, self._run)

    def _run_within(self, seconds: float) -> None:
        if self._timer.when > time.monotonic() + seconds:
            self._run_in(seconds)

    def _ask_for_names(self) -> None:
        """Ask again and again where nameservers are that have names."""
        for resolution in self._resolutions.values():
            resolution.ask()
        if any(resolution.is_name for resolution in self._resolutions.values()):
            self._loop.at(time.monotonic() + _Resolution.RETRY, self._ask_for_names)

    def _open(self) -> None:
        """Connect to those nameservers whose names resolve; anew to those that are silent for long, or have moved.

        Also to those that are not heard and were asked with other keys than there are now.
        """
        now = time.monotonic()
        patience = self.PATIENCE * max(self._interval, self.SELDOM)
        for host, resolution in self._resolutions.items():
            endpoint = resolution.check()
            is_open = host in self._sockets and endpoint == self._endpoints[host]
            is_open = is_open and (host in self._heard or not _are_keys_exchanged(self._keys[host]))
            if endpoint is None or (is_open and now - self._last_answer[host] <= patience):
                continue
            self._close(host)
            self._last_answer[host] = now
            self._endpoints[host] = endpoint
            try:
                self._connect(host, endpoint)
            except (ConfigurationError, zmq.ZMQError) as error:  # keys that are replaced, no descriptors left
                self._log.warning("open", "Cannot ask the nameserver at %s (trying again): %s", host, error)
                self._close(host)

    def _close(self, host: str) -> None:
        """Close the sockets to *host*; what is unread is asked for again."""
        self._heard.discard(host)
        for sock in self._sockets.pop(host, ()):
            self._loop.unwatch(sock)
            close_socket(sock)

    def _resolution(self, host: str) -> _Resolution:
        return _Resolution(lookup_endpoint(host), lambda: self._loop.call(self._open_and_look_up))

    def _open_and_look_up(self) -> None:
        self._open()
        self._look_up(self._services)

    def _connect(self, host: str, endpoint: str) -> None:
        """Open a socket for lookups at *host*, and listen to its address port, and to whether there is a connection."""
        sockets = self._sockets[host] = []
        self._keys[host] = _load_client_keys()

        def take(sock: zmq.Socket[bytes], handle: Callable[[list[bytes]], object]) -> None:
            sockets.append(sock)
            self._loop.watch(sock, partial(_take_frames, sock, handle))

        lookups = set_up_client_socket(zmq.DEALER, endpoint, {zmq.SNDHWM: 2 * len(self._services) + 10})
        take(lookups, partial(self._take_answer, host))
        if self._listen:
            news = set_up_client_socket(zmq.SUB, "")
            take(news, partial(self._take_news, host))
            news.setsockopt(zmq.SUBSCRIBE, f"{_MAGICK}/address".encode())
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            take(_open_monitor(news, events), partial(self._note_connection, host))
            connect(news, f"{endpoint.rpartition(':')[0]}:{self._address_port}")

    def _note_connection(self, host: str, frames: list[bytes]) -> None:
        """After a connection to the address port of *host*: learn by lookups what was published before.

        A second one follows soon, as the subscription arrives a little later than the connection.  Once it is lost,
        there may be other keys; what fails from then on, ten times a second, does not put off the next look at them.
        """
        event = struct.unpack("=HI", frames[0])[0]
        if event == zmq.EVENT_DISCONNECTED and host in self._heard:
            self._heard.discard(host)
            self._run_within(self.SOON)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._heard.add(host)
            self._look_up(self._services)
            self._loop.at(time.monotonic() + self.SOON / 2, partial(self._look_up, self._services))

    def _run(self) -> None:
        """Look up what is missing or may have changed, again and again."""
        missing = self.missing
        try:
            if missing or self._listen:
                self._open()
                self._look_up(self._services if self._listen else missing)
        finally:
            is_cut_off = len(self._heard) < len(self._resolutions)  # always, without listening
            is_in_doubt = is_cut_off or any(publisher.denials for publisher in self._known.values())
            self._run_in(self.SOON if missing else self.SELDOM if is_in_doubt else self.RARELY)
        if missing:  # if nobody has received for a while, the answers are read before that
            self._loop.at(time.monotonic() + self.SOON / 20, self.warn_of_missing)
        self._let_go_of_lost()

    def warn_of_missing(self) -> None:
        """Warn, once, of services without a publisher; they are looked for all the same."""
        missing = [] if self._has_warned else self.missing
        for service in missing:
            _log("subscriber").warning("Can't get any address for %s", service or "any service")
        self._has_warned = self._has_warned or bool(missing)

    @property
    def missing(self) -> list[str]:
        """The services that have no publisher yet."""
        found: set[str] = set().union(*(publisher.services for publisher in self._known.values()))
        return [service for service in self._services if service not in found]

    def _look_up(self, services: Iterable[str]) -> None:
        """Ask the nameservers; their answers come by and by, behind the first frame of the request (not empty)."""
        for lookup, *_ in self._sockets.values():
            for service in services:
                with suppress(zmq.Again):  # it is down, and enough requests wait for it
                    lookup.send_multipart([b"=" + service.encode(), b"", lookup_request(service)], _NOBLOCK)

    def _take_answer(self, host: str, frames: list[bytes]) -> None:
        """Take the answer to a lookup; the first frame comes back as we sent it."""
        if len(frames) != 3:
            self._log.warning("answer", "Skipped an answer of %d frames from the nameserver %s", len(frames), host)
            return
        self._last_answer[host] = time.monotonic()
        service = frames[0][1:].decode("utf-8", "replace")
        entries = addresses_in(frames[2])
        for entry in entries:
            self.add(host, entry, service)
        found = {entry["URI"] for entry in entries}
        for address, publisher in self._known.items():
            if host in self._informants(publisher) and service in publisher.services and address not in found:
                self._note_denial(publisher, host)
        self._let_go_of_lost()

    def _take_news(self, host: str, frames: list[bytes]) -> None:
        """Take what a nameserver publishes: a new publisher, or one that is lost."""
        try:
            message = Message.decode(frames[0])
        except MessageError as error:
            self._log.warning("news", "Skipped a bad message from the nameserver %s: %s", host, error)
            return
        entry = message.data
        if not isinstance(entry, dict) or not isinstance(entry.get("service"), list):
            self._log.warning("news", "Skipped an announcement without service: %.200r", entry)
            return
        publisher = self._known.get(str(entry.get("URI")))
        if entry.get("status", True):
            wanted = [service for service in self._services if service in ("", *entry["service"])]
            for service in wanted:
                self.add(host, entry, service)
            if publisher is not None and not wanted:  # lookups are to confirm it
                publisher.replaced_at.add(host)
                self._look_up(publisher.services)
        elif publisher is not None and host in self._informants(publisher):
            publisher.denials[host] = [float("-inf"), self.PATIENCE]  # it is sure
            self._loop.at(time.monotonic() + 1.2, self._let_go_of_lost)  # its last messages have come by then
            self._let_go_of_lost()

    def _informants(self, publisher: _Publisher) -> Iterable[str]:
        """Return the nameservers that know *publisher*; all, as long as that is not known."""
        return publisher.hosts or self._resolutions

    def add(self, host: str | None, entry: Mapping[str, Any], service: str) -> None:
        """Connect the subscriber to a publisher of *service* that *host*, or one of several (None), told of."""
        address = entry.get("URI")
        backend = entry.get("backend")
        if not is_connectable(address) or backend_towards(backend) is None:
            self._log.warning("address", "Skipped the address %.200r with the backend %.200r", address, backend)
            return
        assert isinstance(address, str)
        is_new = address not in self._known
        if is_new and len(self._known) >= self.LIMIT:
            self._log.warning("limit", "More than %d publishers: %s is not used", self.LIMIT, address)
            return
        # What the program itself has added, it may remove.
        publisher = self._known.get(address) or _Publisher(is_ours=address not in self._subscriber.addresses)
        if publisher.is_ours and (is_new or publisher.is_changed(host, backend)):
            try:
                self._subscriber._add({"URI": address, "backend": backend}, None, self._subscriber._begin)
            except (ConfigurationError, zmq.ZMQError) as error:  # keys that are replaced, no descriptors left
                self._log.warning("keys", "Cannot connect to %s (trying again): %s", address, error)
                return
            _log("subscriber").info("New publisher at %s", address)
        self._known[address] = publisher
        announced = entry.get("service")
        services = announced if isinstance(announced, list) else []
        publisher.services.update([service], (each for each in self._services if each in services))
        if host is not None:
            publisher.replaced_at.discard(host)
            if not publisher.hosts:
                publisher.denials.clear()
            publisher.hosts.add(host)
            publisher.backends.update({host: backend} if backend else {})
            publisher.denials.pop(host, None)

    def _note_denial(self, publisher: _Publisher, host: str) -> None:
        denial = publisher.denials.setdefault(host, [time.monotonic(), 0])
        denial[1] += 1
        self._run_within(self.SELDOM)

    def _let_go_of_lost(self) -> None:
        """Remove the publishers that no nameserver knows any more, if they are not connected either, or others are.

        Not while messages wait: all would be read from the socket, so that others that come wait behind all of them.
        """
        long_ago = time.monotonic() - self.PATIENCE * self.SELDOM * 0.6
        for address, publisher in list(self._known.items()):
            denials = [publisher.denials.get(host, [0.0, 0]) for host in self._informants(publisher)]
            is_lost = all(count >= self.PATIENCE and first < long_ago for first, count in denials)
            is_up = self._subscriber._connections.is_up(address) and not publisher.replaced_at
            if not publisher.denials or not is_lost or is_up:
                continue
            if self._subscriber._has_unread:
                if self._letting_go.when <= time.monotonic():
                    self._letting_go = self._loop.at(time.monotonic() + 1.2, self._let_go_of_lost)
            else:
                del self._known[address]
                if publisher.is_ours:
                    _log("subscriber").info("The publisher at %s is gone", address)
                    self._subscriber.remove(address)


class NSSubscriber:
    """Subscribes to services: asks the nameserver for their addresses, and follows them.

    Args:
        services: The names of the services; ``""`` for all, None for none.
        topics: The beginnings of the subjects to subscribe to.
        addr_listener: Add publishers as they appear on the network, and remove those that vanish; those of
            named services are, whatever it says.
        addresses: Addresses to subscribe to in addition.
        timeout: How long to wait for the addresses at the start, in seconds.
        translate: Put the host of the publisher's address in place of the host of the sender.
        nameserver: The host to ask, or a list of them (their answers are merged, one that is down is left out).
            ``host:port`` for one that answers on another port than configured.  The default stands for the configured
            `nameserver`.
        message_filter: Called with each message; those for which it returns a false value are skipped.
        since, durable: As for `Subscriber`: what was sent before, and what was not handled yet.
    """

    def __init__(
        self,
        services: str | Sequence[str] | None = "",
        topics: str | Sequence[str] | None = _MAGICK,
        addr_listener: bool = False,
        addresses: str | Sequence[Any] | None = None,
        timeout: float = 10,
        translate: bool | str = False,
        nameserver: Hosts = "localhost",
        message_filter: Callable[[Message], Any] | None = None,
        since: float | timedelta | datetime | None = None,
        durable: str | None = None,
    ) -> None:
        begin = {"since": since, "durable": durable}
        self._begin: dict[str, Any] = {key: value for key, value in begin.items() if value is not None}
        self._services = [services] if isinstance(services, str) else list(services or [])
        self._topics = topics
        self._addr_listener = addr_listener
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses or [])
        self._timeout = timeout
        self._translate = translate
        self._nameserver = nameserver
        self._filter = message_filter
        self._subscriber: Subscriber | None = None
        self._address_port: int | None = None

    def start(self) -> Subscriber:
        """Start the subscriber, and return it.

        If a service has no publisher yet, or no nameserver answers, that is a warning: the subscriber finds them when
        they are there.

        Raises:
            ValueError: An address cannot be used.
            ConfigurationError: The secure backend is not set up.
        """
        if self._subscriber is None:
            _log("subscriber").debug("Subscribing to topics %s", self._topics)
            hooks: dict[str, Any] = {"message_filter": self._filter, "translate": self._translate}
            subscriber = Subscriber(self._addresses, self._topics, **hooks, **self._begin)
            with on_failure(subscriber.close):
                hosts = hosts_to_ask(self._nameserver)
                if self._services and hosts:
                    self._follow(subscriber, hosts)
                elif self._services and not self._addresses:
                    _log("subscriber").warning("No nameserver is asked for %s, and there is no address", self._services)
            self._subscriber = subscriber
        return self._subscriber

    def _follow(self, subscriber: Subscriber, hosts: list[str]) -> None:
        """Have *subscriber* follow the services, and wait until they are found."""
        _load_client_keys()  # what is wrong with them is an error now, not where the messages are received
        listen = self._addr_listener or "" not in self._services  # lookups are too slow for who is there for seconds
        follower = _Follower(subscriber, self._services, hosts, listen, self._address_port)
        deadline = time.monotonic() + self._timeout
        while follower.missing and time.monotonic() < deadline:
            for service in follower.missing:
                try:
                    left = max(deadline - time.monotonic(), 0.001)
                    for entry in get_pub_addresses([service], left, hosts):
                        follower.add(hosts[0] if len(hosts) == 1 else None, entry, service)
                except TimeoutError as error:
                    _log("subscriber").warning("%s", error)
                    break
            if follower.missing:
                time.sleep(max(min(0.1, deadline - time.monotonic()), 0))
        if self._timeout > 0:
            follower.warn_of_missing()
        subscriber._change(follower.begin)

    def stop(self) -> None:
        """Stop the subscriber."""
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            subscriber.close()

    def close(self) -> None:
        """Alias for stop."""
        self.stop()

    def __enter__(self) -> Subscriber:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            subscriber.__exit__(*exc_info)

    async def __aenter__(self) -> Subscriber:
        self._timeout = 0  # what is not found at once is found while it receives
        return self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)


class Subscribe:
    """The subscribing context: gives a `Subscriber`, and closes it at the end.

    Args:
        services: The names of the services; ``""`` for all, None for none.
        topics: The beginnings of the subjects to subscribe to.
        addr_listener: Add publishers as they appear on the network, and remove those that vanish.
        addresses: Addresses to subscribe to in addition; with *nameserver* False, only these.
        timeout: How long to wait for the addresses at the start, in seconds.
        translate: Put the host of the publisher's address in place of the host of the sender.
        nameserver: The host to ask, a list of them, or False to ask none.
        message_filter: Called with each message; those for which it returns a false value are skipped.
        since, durable: As for `Subscriber`: what was sent before, and what was not handled yet.

    Example::

        with Subscribe("a_service", "my_topic") as sub:
            for msg in sub.recv():
                print(msg)
    """

    def __init__(
        self,
        services: str | Sequence[str] | None = "",
        topics: str | Sequence[str] | None = _MAGICK,
        addr_listener: bool = False,
        addresses: str | Sequence[Any] | None = None,
        timeout: float = 10,
        translate: bool | str = False,
        nameserver: Hosts = "localhost",
        message_filter: Callable[[Message], Any] | None = None,
        since: float | timedelta | datetime | None = None,
        durable: str | None = None,
    ) -> None:
        self._settings: dict[str, Any] = dict(locals())
        del self._settings["self"]
        self._subscriber: Subscriber | None = None
        asyncio = sys.modules.get("asyncio")
        if asyncio is None or asyncio._get_running_loop() is None:
            self._create()  # else where it is used: with ``async with``, nothing waits in the thread of the event loop

    def _create(self) -> Subscriber:
        if self._subscriber is None:
            self._subscriber = create_subscriber_from_dict_config(self._settings)
        return self._subscriber

    @property
    def subscriber(self) -> Subscriber:
        """The subscriber."""
        return self._create()

    def __enter__(self) -> Subscriber:
        return self.subscriber

    def __exit__(self, *exc_info: object) -> None:
        self.subscriber.__exit__(*exc_info)
        self.subscriber.close()  # a replaced class may do nothing at its exit

    async def __aenter__(self) -> Subscriber:
        self._settings["timeout"] = 0  # what is not found at once is found while it receives
        return self.subscriber

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)


def create_subscriber_from_dict_config(settings: Mapping[str, Any]) -> Subscriber:
    """Create a subscriber from a dictionary of settings.

    - ``addresses`` a non-empty list and ``nameserver`` False: subscribes to these addresses only;
    - otherwise: asks ``nameserver`` (a host, by default the configured one, else localhost) for the ``services``.

    Args:
        settings: ``services``, ``topics``, ``addr_listener``, ``addresses``, ``timeout``, ``translate``,
            ``nameserver``, ``message_filter``, ``since``, ``durable``, as documented for the classes.

    Raises:
        TypeError: There is another key, and no nameserver is to be asked.
        ValueError: An address cannot be used.
    """
    begin = {key: settings[key] for key in ("since", "durable") if settings.get(key) is not None}
    hooks = {"message_filter": None, "translate": False}
    nameserver = settings.get("nameserver")
    if nameserver is False and settings.get("addresses"):
        known = "addresses topics message_filter translate nameserver services addr_listener timeout port since durable"
        _refuse_unknown(settings, "Subscriber", known)
        return Subscriber(settings["addresses"], **_with_defaults(settings, {"topics": "", **hooks}), **begin)
    defaults = {"services": "", "topics": _MAGICK, "addr_listener": False, "addresses": None, "timeout": 10, **hooks}
    return NSSubscriber(nameserver=nameserver or None, **_with_defaults(settings, defaults), **begin).start()


# ======================================================================================================================
# 12. Listening
#
# A subscriber in a thread of its own, which puts the messages into a queue.
# ======================================================================================================================


class Listener:
    """Receives messages and puts them into a queue, until it is stopped; `run` is to be run in a thread.

    Args:
        topics: The beginnings of the subjects to subscribe to.
        queue: Where to put the messages, anything with the methods of `queue.Queue`.
        addresses: Addresses to subscribe to in addition to the services.
        nameserver: The host to ask for the services, a list of them, or False to ask none.
        services: The names of the services, ``""`` for all.
        since, durable: As for `Subscriber`.  A message counts as handled when it is in the queue: who takes it out is
            not known here.
    """

    def __init__(
        self,
        topics: str | Sequence[str] | None = None,
        queue: Any = None,
        addresses: str | Sequence[Any] | None = None,
        nameserver: Hosts = "localhost",
        services: str | Sequence[str] | None = "",
        since: float | timedelta | datetime | None = None,
        durable: str | None = None,
    ) -> None:
        self.since = since
        self.durable = durable
        self.topics = topics
        self.queue = queue
        self.addresses = addresses
        self.nameserver = nameserver
        self.services = services
        self.subscriber: Subscriber | None = None
        self.running = False
        self._lock = threading.RLock()
        self._run_lock = threading.RLock()
        self._is_stopped = False
        self._stops = 0
        self.logger = logging.getLogger(f"{__name__}.listener.Listener")

    def create_subscriber(self) -> None:
        """Create the subscriber; what it does not find at once, it finds while it receives."""
        if self.subscriber is None:
            own = ("services", "addresses", "nameserver", "since", "durable")
            settings = {"topics": self.topics or "", **{key: getattr(self, key) for key in own}}
            subscriber = create_subscriber_from_dict_config({**settings, "addr_listener": True, "timeout": 0})
            with self._lock:
                if not self._is_stopped:
                    self.subscriber = subscriber
                    return
            subscriber.close()

    def add_to_queue(self, msg: Message) -> None:
        """Put a message into the queue."""
        self.queue.put(msg)

    def run(self) -> None:
        """Receive messages, until `stop` is called."""
        stops = self._stops
        with self._run_lock:  # one after the other: that of before a `restart` may not have ended yet
            self.logger.debug("Starting to listen to %s", self.topics)
            self.running = True
            try:
                self.create_subscriber()
                subscriber = self.subscriber if self._stops == stops else None
                for message in subscriber.recv() if subscriber is not None else ():
                    if message is not None:
                        self.add_to_queue(message)
            finally:
                self.running = False
                if self._stops == stops:
                    self._close()

    def _close(self) -> None:
        with self._lock:
            subscriber, self.subscriber = self.subscriber, None
        if subscriber is not None:
            subscriber.close()  # for good: run() may be about to receive

    def stop(self) -> None:
        """End `run`."""
        self._is_stopped = True
        self._stops += 1
        self._close()

    def restart(self) -> None:
        """Stop it; `run` may be called again after that."""
        self.stop()
        self._is_stopped = False


class ListenerContainer:
    """A running `Listener`, with its queue and thread.

    Args:
        topics: The beginnings of the subjects to subscribe to.
        addresses: Addresses to subscribe to in addition to the services.
        nameserver: The host to ask for the services, a list of them, or False to ask none.
        services: The names of the services, ``""`` for all.
        since, durable: As for `Subscriber`.  A message counts as handled when it is in the queue: who takes it out is
            not known here.

    Attributes:
        output_queue: A `queue.Queue` with the received messages.
        listener: The `Listener`; after `stop`, the one that has ended.
        thread: The thread that it runs in, None after `stop`.

    Raises:
        ValueError: An address cannot be used.
        ConfigurationError: The secure backend is not set up.
    """

    def __init__(
        self,
        topics: str | Sequence[str] | None = None,
        addresses: str | Sequence[Any] | None = None,
        nameserver: Hosts = "localhost",
        services: str | Sequence[str] | None = "",
        since: float | timedelta | datetime | None = None,
        durable: str | None = None,
    ) -> None:
        arguments = locals()
        self._settings = {key: arguments[key] for key in ("addresses", "nameserver", "services", "since", "durable")}
        self.logger = logging.getLogger(f"{__name__}.listener.ListenerContainer")
        import queue

        self.output_queue: queue.Queue[Message] = queue.Queue()
        self.listener: Listener
        self.thread: threading.Thread | None = None
        self._start(topics)

    def _start(self, topics: str | Sequence[str] | None) -> None:
        self.listener = Listener(topics=topics, queue=self.output_queue, **self._settings)
        self.listener.create_subscriber()  # here, so that a wrong argument is an error of this call
        self.thread = threading.Thread(target=self.listener.run, name="posttroll listener", daemon=True)
        with on_failure(self.listener.stop):
            self.thread.start()

    def restart_listener(self, topics: str | Sequence[str] | None) -> None:
        """Listen to other topics, as `Subscriber.change_topics`; the queue stays.  One that has ended begins anew."""
        subscriber = self.listener.subscriber
        if subscriber is not None and self.thread is not None and self.thread.is_alive():
            self.listener.topics = topics
            subscriber.change_topics(topics or "")
        else:
            self.stop()
            self._start(topics)

    def stop(self) -> None:
        """Stop listening, and wait until it has ended."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.logger.debug("Stopping listener.")
            self.listener.stop()
            if thread is not threading.current_thread():
                thread.join(5)

    def __enter__(self) -> ListenerContainer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


# ======================================================================================================================
# 13. Logging over messages
# ======================================================================================================================

BLACK, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE = range(8)
COLORS = {"WARNING": YELLOW, "INFO": GREEN, "DEBUG": BLUE, "CRITICAL": MAGENTA, "ERROR": RED}
RESET_SEQ = "\033[0m"
COLOR_SEQ = "\033[1;%dm"


def colored(text: str, color: int) -> str:
    """Return *text* in a colour, by ANSI escape sequences."""
    return COLOR_SEQ % (30 + color) + text + RESET_SEQ


def printable(value: Any) -> str:
    """Return a value on one line, without characters that a terminal would obey: they are escaped as in JSON."""
    text = value if isinstance(value, str) else value.isoformat() if isinstance(value, datetime) else repr(value)
    return "".join(character if character.isprintable() else json.dumps(character)[1:-1] for character in text)


class PytrollFormatter(logging.Formatter):
    """Formats log records as messages: subject ``log/LEVEL/NAME``, type ``log.level``, data the text.

    Args:
        fmt: The format of the text, as for `logging.Formatter`; by default the log message alone.
        datefmt: The format of its date.
    """

    def __init__(self, fmt: str | None = None, datefmt: str | None = None) -> None:
        super().__init__(fmt, datefmt)

    def format(self, record: logging.LogRecord) -> str:
        """Return the message for *record*."""
        text = super().format(record)
        name = "_".join(record.name.split()) or "root"
        level = "_".join(record.levelname.split()) or str(record.levelno)  # one without a name is "Level 15"
        return Message(f"log/{level}/{name}", f"log.{level.lower()}", text).encode()


class PytrollHandler(logging.Handler):
    """Publishes log records.

    Args:
        name: The name of the publisher.
        port: Its port, 0 for a free one.
    """

    def __init__(self, name: str, port: int = 0) -> None:
        self._publisher = NoisyPublisher(name, port)
        self._publisher.start()
        super().__init__()  # now: at the end of the program, logging closes all handlers that have begun
        self.setFormatter(PytrollFormatter())

    def handle(self, record: logging.LogRecord) -> Any:
        """Publish *record*, unless a filter refuses it.

        Without the lock of other handlers: it is held around `close`, which waits for a thread that may log, too.
        """
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        """Publish *record*."""
        try:
            self._publisher.send(self.format(record))
        except PublisherStoppedError:
            pass  # at the end of the program, or in a forked child: it has no publisher, and that is no error
        except Exception:  # a log handler must not stop the program that logs; this prints the error
            self.handleError(record)

    def close(self) -> None:
        """Stop the publisher."""
        self.setLevel(sys.maxsize)  # what is logged from now on, by the publisher itself too, is not for it any more
        self._publisher.stop()
        super().close()


class ColoredFormatter(logging.Formatter):
    """Formats log records for a terminal, the level in colour.

    Args:
        msg: The format, as for `logging.Formatter`.
        use_color: Whether the level is coloured.
    """

    def __init__(self, msg: str, use_color: bool = True) -> None:
        super().__init__(msg)
        self.use_color = use_color

    def format(self, record: logging.LogRecord) -> str:
        """Return the text for *record*."""
        if self.use_color and record.levelname in COLORS:
            record = logging.makeLogRecord(record.__dict__)
            record.levelname = colored(record.levelname, COLORS[record.levelname])
        return super().format(record)


class Logger:
    """Logs the messages of all publishers, in a thread of its own.

    Args:
        nameserver_address: The host of the nameserver, or a list of them.
        nameserver_port: The port on which it publishes new addresses.
    """

    def __init__(self, nameserver_address: Hosts = "localhost", nameserver_port: int = 16543) -> None:
        self._address = nameserver_address
        self._port = nameserver_port
        self._subscriber: Subscriber | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to log."""
        if self._thread is None:
            following = NSSubscriber("", "", addr_listener=True, timeout=0, nameserver=self._address)
            following._address_port = self._port
            self._subscriber = following.start()
            self._thread = threading.Thread(target=self.log, name="posttroll logger", daemon=True)
            self._thread.start()

    def log(self) -> None:
        """Log the messages that come, until `stop` is called."""
        if self._subscriber is None:
            return
        for message in self._subscriber:
            kind, _, level = message.type.partition(".")
            number = _level_number(level) if kind == "log" else None
            if number is not None:
                self._log_as(message.subject.rpartition("/")[2][:200], number, message)
            else:
                number = logging.DEBUG if message.type == "beat" else logging.INFO
                _log("logger").log(number, "%s", message)

    @staticmethod
    def _log_as(name: str, level: int, message: Message) -> None:
        """Log *message* by the logger *name*, or by the nearest above: logging would keep each new one for ever."""
        loggers, nearest = logging.root.manager.loggerDict, name
        while nearest and not isinstance(loggers.get(nearest), logging.Logger):
            nearest = nearest.rpartition(".")[0]
        logger = logging.getLogger(nearest)
        if logger.isEnabledFor(level):
            args = (message.sender, message.data)
            logger.handle(logger.makeRecord(name, level, __file__, 0, "%s: %s", args, None))

    def stop(self) -> None:
        """Stop to log."""
        subscriber, self._subscriber = self._subscriber, None
        thread, self._thread = self._thread, None
        if subscriber is not None:
            subscriber.close()
        if thread is not None:
            thread.join(5)


def _level_number(level: str) -> int | None:
    """Return the number of a level in a message: that of a name known here, or what ``level_15`` says; else None."""
    known = logging.getLevelName(level.upper())
    nameless = re.fullmatch(r"level_(\d{1,9})", level)
    return int(nameless[1]) if nameless else known if isinstance(known, int) else None


LOG_FORMAT = "[%(levelname)s: %(asctime)s : %(name)s] %(message)s"


def log_handler(file: str | None) -> logging.Handler:
    """Return what writes a log to *file*, rotated at midnight (7 are kept), or to stdout if there is none."""
    if not file:
        return logging.StreamHandler(sys.stdout)
    from logging.handlers import TimedRotatingFileHandler

    handler = TimedRotatingFileHandler(file, when="midnight", backupCount=7)
    handler.rotator = _rename_if_allowed
    return handler


def _rename_if_allowed(old: str, new: str) -> None:
    """Rename a log; where its directory is not ours, it goes on in the same file."""
    with suppress(OSError):
        os.replace(old, new)


class _OutputHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a log to stdout, until that fails.

    Args:
        on_failure: Called when it has failed; may be called in any thread.
    """

    def __init__(self, on_failure: Callable[[], object]) -> None:
        super().__init__(sys.stdout)
        self._on_failure = on_failure
        self.failure: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging calls it so
        """Take note of an error."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.failure = error
            self._on_failure()
        else:
            super().handleError(record)


def _settle(stream: Any) -> OSError | None:
    """Write what *stream* still holds; what cannot be written is not tried again when Python ends, but returned."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def run_logger(args: Sequence[str] | None = None) -> int:
    """Run ``pytroll-logger``: log the messages of all publishers.

    Args:
        args: The command-line arguments; by default those of the process.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="pytroll-logger", description="Log the messages of all publishers.")
    parser.add_argument("--nameserver", metavar="HOST", action="append", help="the same as --server")
    add_logger_arguments(parser)
    try:
        return run_logger_command(parser.parse_args(args))
    except BrokenPipeError:  # whoever reads has had enough
        return 0
    except (OSError, ValueError, NotImplementedError, zmq.ZMQError) as error:
        print(f"pytroll-logger: {error}", file=sys.stderr)
        return 1


def add_logger_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pytroll-logger``."""
    parser.add_argument("-r", "--rotated", help="Time rotated log file")
    parser.add_argument("-v", "--verbose", action="store_true", help="print debug messages too")
    parser.add_argument("-s", "--server", dest="nameserver", action="append", help="server to listen to")
    parser.add_argument("-p", "--port", type=int, default=None, help="port to listen to")


def run_logger_command(options: argparse.Namespace) -> int:
    """Log the messages of all publishers.

    Examples:
      posttroll logger
      posttroll logger -s otherhost -r /var/log/posttroll.log
    """
    is_colored = not options.rotated and wants_color(sys.stdout)
    root = logging.getLogger()
    with loop_until_signal() as loop:
        handler = log_handler(options.rotated) if options.rotated else _OutputHandler(loop.stop)
        handler.setFormatter(ColoredFormatter(LOG_FORMAT, use_color=is_colored))
        if not options.rotated:
            handler.addFilter(make_printable)
        root.addHandler(handler)
        root.setLevel(logging.DEBUG if options.verbose else logging.INFO)
        logger = Logger(options.nameserver or "localhost", options.port or config.get("address_publish_port"))
        try:
            logger.start()
            loop.run()
        finally:
            logger.stop()
            root.removeHandler(handler)
            handler.close()
    if isinstance(handler, _OutputHandler) and handler.failure is not None:
        _settle(sys.stdout)
        raise handler.failure
    return 0


def make_printable(record: logging.LogRecord) -> bool:
    """Escape in a record what a terminal would obey; for `logging.Handler.addFilter`."""
    record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    record.name = printable(record.name)
    return True


def wants_color(stream: Any) -> bool:
    """Whether to colour what goes to *stream*: it is a terminal, and NO_COLOR (https://no-color.org) is not set."""
    return bool(not os.environ.get("NO_COLOR") and hasattr(stream, "isatty") and stream.isatty())


# ======================================================================================================================
# 14. Testing helpers
# ======================================================================================================================


@contextmanager
def patched_subscriber_recv(messages: Iterable[Any]) -> Iterator[None]:
    """Let all subscribers receive *messages*, without sockets to receive from and without asking a nameserver.

    Args:
        messages: What `Subscriber.recv` yields; the iteration ends after them.
    """
    from unittest import mock

    def fake_recv(self: Subscriber, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from messages

    def fake_follow(self: NSSubscriber, subscriber: Subscriber, hosts: list[str]) -> None:
        """There is nobody to ask."""

    patch_recv = mock.patch.multiple(Subscriber, recv=fake_recv, __call__=fake_recv)
    with patch_recv, mock.patch.object(NSSubscriber, "_follow", fake_follow):
        yield


@contextmanager
def patched_publisher() -> Iterator[list[str]]:
    """Let no publisher send anything; gives the list of the strings that would have been sent.

    Sending by a publisher that was not started raises RuntimeError, sending of anything but str TypeError.
    """
    from unittest import mock

    published: list[str] = []
    started: weakref.WeakSet[Publisher] = weakref.WeakSet()

    def fake_start(self: Publisher) -> Publisher:
        started.add(self)
        return self

    def fake_send(self: Publisher, msg: Any) -> None:
        if self not in started:
            raise RuntimeError("Cannot 'send' before the publisher is started.")
        if not isinstance(msg, str):
            raise TypeError(f"`send` takes a str, not a {type(msg)}")
        published.append(msg)

    def fake_stop(self: Publisher) -> None:
        """Nothing was started."""

    fakes: dict[str, Any] = {
        "start": fake_start,
        "send": fake_send,
        "send_string": fake_send,
        "stop": fake_stop,
        "close": fake_stop,
    }
    with mock.patch.multiple(Publisher, **fakes):
        yield published


# ======================================================================================================================
# 15. Command line
#
# Results go to stdout, talk goes to stderr, and the exit status is 0 only on success.  A command is a function in the
# table of commands, with its arguments.
# ======================================================================================================================


class _CommandError(Exception):
    """What went wrong with a command, and what to do about it; ends it with its exit status for failures."""


_AddTo = Callable[[Any], object]  # adds arguments to a parser, or to a group of one
_Run = Callable[[Any], int]  # gets the options


# Commands by name: what adds the arguments, what runs it, and its exit status if that fails.
_commands: dict[str, tuple[Sequence[_AddTo], _Run, int]] = {}


def _command(name: str, *arguments: _AddTo, failure: int = 1) -> Callable[[_Run], _Run]:
    """Make the decorated function a command: it gets the options, returns the exit status; its docstring is the help.

    Args:
        name: The name of the command.
        arguments: What adds its arguments.
        failure: Its exit status if something fails; also for wrong arguments, if it is not 1.
    """

    def enter(run: _Run) -> _Run:
        _commands[name] = arguments, run, failure
        return run

    return enter


def _option(*names: str, **settings: Any) -> _AddTo:
    """Describe an argument, as `argparse.ArgumentParser.add_argument` does; without *help*, none that is shown."""

    def add_to(parser: argparse.ArgumentParser) -> None:
        import argparse

        parser.add_argument(*names, **{"help": argparse.SUPPRESS, **settings})

    return add_to


_flag = partial(_option, action="store_true")
_repeated = partial(_option, action="append")
_words = partial(_option, nargs="*")


def _either(*options: _AddTo) -> _AddTo:
    """Describe options of which only one can be given."""

    def add_to(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for add in options:
            add(group)

    return add_to


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and those of the commands."""
    import argparse

    parser = argparse.ArgumentParser(prog="posttroll", description="Messages between programs over ZeroMQ.")
    parser.add_argument("--version", action="version", version=f"posttroll {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (arguments, run, _) in _commands.items():
        first, _, rest = (run.__doc__ or ".").partition("\n")  # python -OO has none
        more, _, examples = textwrap.dedent(rest).partition("Examples:\n")
        subparser = subparsers.add_parser(
            name,
            help=first[0].lower() + first[1:].rstrip("."),
            description=f"{first}\n{more}".rstrip(),
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # what a command has of its own comes before what all have
        )
        for add_to in (*_FOR_ALL, *arguments):
            add_to(subparser)
        subparser.set_defaults(command=name)
    subparsers.add_parser("nameserver", help="run the nameserver ('nameserver --help' tells more)", add_help=False)
    return parser, dict(subparsers.choices)


def _unusable(text: str) -> Exception:
    """Return the error that tells argparse what is wrong with a word."""
    import argparse

    return argparse.ArgumentTypeError(text)


def assignment(text: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``, for argparse."""
    key, equals, value = text.partition("=")
    if not (key and equals) or key.replace("-", "_") not in OPTIONS:
        is_pair = key and equals
        what = f"there is no key {key!r}, see 'posttroll config'" if is_pair else f"{text!r} is not KEY=VALUE"
        raise _unusable(what)
    return key, parse_literal(value)


def _number(kind: type, least: float, most: float = 1e6) -> Callable[[str], Any]:
    """Return what reads a number from *least* to *most*, for argparse."""

    def read(text: str) -> Any:
        with suppress(ValueError):
            number = kind(text)
            if least <= number <= most:
                return number
        raise _unusable(f"{text!r} is no {'whole ' * (kind is int)}number from {least:g} to {most:g}")

    return read


def _name(text: str) -> str:
    """Read a name, for argparse: an empty one is a variable of a script that is not set, and would mean all."""
    if not text.strip():
        raise _unusable("is a name missing? it is empty")
    return text


_names = partial(_words, "names", metavar="NAME", type=_name)


def _seconds(name: str, least: float, default: float | None, help: str, **settings: Any) -> _AddTo:
    """Describe an option that takes a number of seconds."""
    shown = "" if default is None else f" ({default:g})"
    kind = {"metavar": "SECONDS", "type": _number(float, least), "default": default, "help": help + shown}
    return _option(name, **{**kind, **settings})


def _setting(name: str, of: str = "") -> _AddTo:
    """Describe an option that sets configuration keys."""
    form = {"metavar": "KEY=VALUE", "default": [], "type": assignment}
    return _repeated(name, help=f"set a configuration key{of}", **form)


_FOR_ALL = (
    _repeated("--nameserver", metavar="HOST", help="nameserver to use (the configured, or localhost); may be repeated"),
    _flag("--no-color", help="no colours (also with NO_COLOR set)"),
    _setting("--set"),
    _either(
        _flag("-q", "--quiet", help="tell nothing but results and errors"),
        _option("-v", "--verbose", action="count", default=0, help="tell more; -vv all that is logged"),
    ),
)
_TOPICS = _words("topics", metavar="TOPIC", help="beginning of the subjects (all)")
_JSON = _flag("--json", help="as JSON")
_PUBLISH_PORT = _option("--port", type=_number(int, 0, 65535), default=0, help="port to publish on (a free one)")
_PUBLISHER_ADDRESS = _repeated("--address", default=[], help="address of a publisher, no nameserver is asked")


def main(args: Sequence[str] | None = None) -> int:
    """Run ``posttroll COMMAND``.

    Args:
        args: The command-line arguments; by default those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        status = _run_nameserver(words[1:]) if words[:1] == ["nameserver"] else _run(words)
    except SystemExit as end:  # help was shown, or the arguments are wrong
        status = cast(int, end.code)
    except KeyboardInterrupt:
        status = 130
    error = _settle(sys.stdout)
    if not (error is None or isinstance(error, BrokenPipeError)):  # whoever reads may have had enough
        _talk(f"posttroll: {error}")
        status = status or 1
    _settle(sys.stderr)
    return status


def _run(words: Sequence[str]) -> int:
    """Run the command that the words on the command line tell."""
    parser, commands = _parsers()
    if not words or words[0] not in commands:
        parser.parse_args(words)  # shows help, or what is wrong
    _, run, failure = _commands[words[0]]
    try:
        options = commands[words[0]].parse_intermixed_args(words[1:])
    except SystemExit as end:  # help was shown, or the arguments are wrong
        return max(failure, 2) if end.code else 0
    try:
        _prepare_output(options)
        _prepare_log(options)
        with config.set(dict(options.set)):
            return run(options)
    except BrokenPipeError:
        return 0
    except (_CommandError, NotImplementedError, MessageError, zmq.ZMQError, OSError, ValueError) as error:
        _talk(f"posttroll {options.command}: {error}")
    return failure


def _run_nameserver(words: list[str]) -> int:
    try:
        nameserver = _nameserver_module()
    except ImportError as error:
        _talk(f"posttroll: the nameserver needs posttroll_ns.py beside this file: {error}")
        return 1
    return cast(int, nameserver.main(words))


def _prepare_output(options: argparse.Namespace) -> None:
    """Let stdout take any message: what a terminal cannot show is escaped, files and pipes get UTF-8."""
    if sys.stdout is None and options.command != "publish":
        raise _CommandError("there is no standard output to print to.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
        raw = sys.stdout.buffer
        if isinstance(raw, io.RawIOBase):  # python -u: of a write that a signal cuts short, the rest would be lost
            buffer = io.BufferedWriter(io.FileIO(raw.fileno(), "w", closefd=False))
            sys.stdout = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=raw.isatty())


def _prepare_log(options: argparse.Namespace) -> None:
    """Let as much of what the library logs be seen as is wanted: by default its warnings."""
    if options.quiet:
        logging.getLogger().setLevel(logging.ERROR)
    elif options.verbose and options.command != "logger":  # which sets that up itself
        level = logging.INFO if options.verbose == 1 else logging.DEBUG
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _nameserver_module() -> Any:
    """Return the module ``posttroll_ns``, imported when it is used for the first time."""
    return importlib.import_module(f"{__name__}_ns")


def _talk(text: str, options: argparse.Namespace | None = None) -> None:
    """Tell something that is not a result; with *options*, it is no error either, and is not told if they say so."""
    if sys.stderr is not None and not (options and options.quiet):
        with suppress(OSError):  # nobody is there to be told
            print(text, file=sys.stderr, flush=True)


def _nameservers(options: argparse.Namespace) -> list[str]:
    """Return the nameservers to ask."""
    hosts = hosts_to_ask(options.nameserver)
    if not hosts:
        raise _CommandError("nobody is to be asked (nameserver = none): say --nameserver HOST.")
    return hosts


def _colors(options: argparse.Namespace) -> bool:
    """Whether what is printed is coloured."""
    return wants_color(sys.stdout) and not options.no_color


def _view_size() -> tuple[int, int]:
    """Return columns and lines of the terminal that is printed to; 0 for as many as there are."""
    import shutil

    size = shutil.get_terminal_size((100, 24))  # for a terminal that does not know its size
    return (size.columns or 100, size.lines or 24) if sys.stdout.isatty() else (0, 0)


def _show(lines: Sequence[str]) -> None:
    """Print a view that is followed by others: on a terminal in place of the one before, as much as fits."""
    _, height = _view_size()
    if height:  # the last line is for what there is to say
        print("\033[H\033[J" + "\n".join(lines[: max(height - 2, 1)]), flush=True)
    else:
        print("\n".join(lines) + "\n" * (len(lines) > 1), flush=True)


def _table(
    rows: Sequence[Sequence[str]], headings: Sequence[str], width: int = 0, elastic: Sequence[int] = ()
) -> list[str]:
    """Return the lines of a table with aligned columns.

    Args:
        rows: Their cells.
        headings: Those of the columns.
        width: What has to be enough for a line; 0 for no limit.
        elastic: The columns, numbered from 0, whose cells are shortened for that, the widest first.
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    surplus = sum(widths) + 2 * (len(widths) - 1) - (width or sys.maxsize)
    for _ in range(surplus):
        widest = max(elastic, key=widths.__getitem__)
        widths[widest] -= widths[widest] > 12
    padded = ([_shortened(cell, size).ljust(size) for cell, size in zip(line, widths)] for line in lines)
    return ["  ".join(cells)[: width or None].rstrip() for cells in padded]


def _shortened(text: str, width: int) -> str:
    """Return *text*, without its middle if it is longer than *width*."""
    end = (width - 3) // 2
    return text if len(text) <= width else f"{text[: width - 3 - end]}...{text[-end:]}"


# -- publish --


@_command(
    "publish",
    _option("subject", nargs="?", metavar="SUBJECT", help="for example /segment/hrit"),
    _option("type", nargs="?", metavar="TYPE", help="for example file"),
    _words("data", metavar="DATA", help="text, KEY=VALUE pairs, or - for stdin"),
    _either(
        _flag("--json", help="DATA is JSON"),
        _flag("--text", help="DATA is text, even if it looks like KEY=VALUE"),
        _flag("--binary", help="the file or stdin is sent as bytes"),
    ),
    _option("--file", metavar="FILE", help="read DATA from a file"),
    _flag("--lines", help="each line of the file or stdin is a message of its own"),
    _option("--service", "--name", default="posttroll", help="name of the publisher (posttroll)"),
    _PUBLISH_PORT,
    _repeated("--nameservers", dest="nameserver"),  # its old name
    _seconds("--wait", 0, 10, "for subscribers"),
    _option("--subscribers", metavar="N", type=_number(int, 0), default=1, help="how many to wait for at least (1)"),
    _option("--replay", metavar="FILE", help="publish what 'subscribe --raw' has recorded (- for stdin)"),
    _option("--speed", metavar="X", type=_number(float, 0), default=1.0, help="of the replay; 0 without pauses (1)"),
)
def _run_publish(options: argparse.Namespace) -> int:
    """Publish messages.

    Examples:
      posttroll publish /alarm info "disk is full"
      posttroll publish /segment file uri=/data/a.nc size=1200 --service receiver --nameserver localhost
      posttroll publish /segment file --json '{"uri": "/data/a.nc"}'
      tail -f log | posttroll publish /log info - --lines
      posttroll publish /image file --binary --file quicklook.png
      posttroll publish --replay recorded --speed 10
    """
    publishing = _publishing(options.service, options.port, options.nameserver)
    if options.file and options.data:
        raise _CommandError("DATA are given twice: on the command line and by --file.")
    path = options.replay or options.file or ("-" if options.data == ["-"] else None)
    if path == "-" and sys.stdin is None:
        raise _CommandError("there is no standard input to read from.")
    if path == "-" and os.name == "posix":
        os.set_blocking(sys.stdin.fileno(), True)  # else it would end where whoever writes to it pauses
    with closing(Loop()) as loop, signals_wake(loop), ExitStack() as stack:
        stream = None if path is None else stack.enter_context(io.BufferedReader(_Input(path, loop)))
        messages = _messages_to_publish(options, stream, loop)
        with publishing as publisher, call_on_signals(loop.stop):
            if options.subscribers > 0:
                with call_on_signals(_interrupt):
                    _await_subscribers(publisher, options)
            sent = _send_all(publisher, messages, options, loop)
    # Leaving the block has waited for those that were just finding it, and until all is sent.
    reached = publisher.reached
    _talk(f"{sent} message{'s' * (sent != 1)} to {reached} subscriber{'s' * (reached != 1)}", options)
    if publisher.dropped:
        raise _CommandError(f"{publisher.dropped} messages were lost: a subscriber was too slow, or out of reach.")
    return 0


def _interrupt() -> NoReturn:
    """End what the main thread does, so that the publisher says goodbye: also for SIGTERM."""
    raise KeyboardInterrupt


def _interrupt_if_stopped(loop: Loop) -> None:
    """Do so if a signal has stopped *loop*: where it came, pyzmq might have forgotten the KeyboardInterrupt."""
    if loop.is_stopped:
        raise KeyboardInterrupt


def _publishing(name: str, port: int, hosts: Sequence[str] | None) -> Publish:
    """Return what publishes under a *name*, and registers with the nameservers *hosts*."""
    if not name:
        raise _CommandError("--service needs a name.")
    nameservers: Any = False if hosts == ["none"] else hosts or None
    if not port and (nameservers is False or hosts_to_register_with(nameservers) == []):
        raise _CommandError("without a nameserver (none), it needs --port, else nobody could find the publisher.")
    return Publish(name, port, nameservers=nameservers)


def _await_subscribers(publisher: AnyPublisher, options: argparse.Namespace) -> None:
    """Wait for as many subscribers as were asked for."""
    if not publisher.wait_for_subscribers(options.subscribers, options.wait):
        found = f"{publisher.subscriber_count} of {options.subscribers} subscribers after {options.wait:g} s"
        remedy = "nameservers that run with --no-multicast hear of it only if they are named: --nameserver HOST"
        is_named = options.nameserver or config.get("nameservers")
        raise _CommandError(f"{found}: nothing was sent.{'' if is_named else f' Note: {remedy}'}")


def _send_all(publisher: AnyPublisher, messages: Iterable[Message], options: argparse.Namespace, loop: Loop) -> int:
    """Send messages until *loop* is stopped, and return how many."""
    sent = 0
    try:
        for message in messages:
            _interrupt_if_stopped(loop)
            publisher.send(message)
            sent += 1
    except BaseException:
        _talk(f"{sent} message{'s' * (sent != 1)} sent until then", options)
        raise
    return sent


class _Input(io.FileIO):
    """A file to read, ``-`` for stdin; a signal ends a wait for it, even one that comes just before that begins."""

    def __init__(self, path: str, loop: Loop) -> None:
        is_stdin = path == "-"
        super().__init__(sys.stdin.fileno() if is_stdin else path, closefd=not is_stdin)
        self._loop = loop

    def readinto(self, buffer: Any) -> Any:
        """Wait until there is something, and read it into *buffer*."""
        is_ready = threading.Event()
        if os.name == "posix":  # Windows can wait for sockets only; there Control-C ends any reading
            self._loop.watch(self.fileno(), is_ready.set)
            try:
                while not is_ready.is_set():
                    _interrupt_if_stopped(self._loop)
                    self._loop.turn()
            finally:
                self._loop.unwatch(self.fileno())
        return super().readinto(buffer)

    read, readall = io.RawIOBase.read, io.RawIOBase.readall  # type: ignore[assignment]  # by `readinto`


def _messages_to_publish(options: argparse.Namespace, stream: Any, loop: Loop) -> Iterable[Message]:
    """Return the messages that the command line describes.

    Args:
        options: What it says.
        stream: Where it says to read from, None if nowhere.
        loop: What waits between messages.
    """
    if options.replay:
        if options.subject or options.file:
            raise _CommandError("--replay takes neither SUBJECT nor --file: the messages are in the recording.")
        return _paced(_read_recording(stream, options), options.speed, loop)
    if options.subject is None or options.type is None:
        raise _CommandError("SUBJECT and TYPE are needed (or --replay FILE).")
    if stream is None:
        if options.lines:
            raise _CommandError("--lines needs a file or stdin.")
        return [Message(options.subject, options.type, _data_of_words(options))]
    Message(options.subject, options.type)  # what is wrong with them is an error now, not when subscribers have come
    parts = stream if options.lines else [stream.read()]
    messages = (Message(options.subject, options.type, _data_of_part(part, options)) for part in parts)
    return messages if options.lines else list(messages)


def _data_of_part(part: bytes, options: argparse.Namespace) -> Any:
    """Return the data that a line of a file, or all of it, stands for."""
    if options.lines:
        part = part.rstrip(b"\n" if options.binary else b"\r\n")
    if options.binary:
        return part
    try:
        text = part.decode()
    except UnicodeDecodeError as error:
        raise _CommandError(f"DATA is no text in UTF-8 ({error}); --binary sends bytes.") from None
    return _parse_json(text) if options.json else text


def _data_of_words(options: argparse.Namespace) -> Any:
    """Return the data that the words on the command line stand for."""
    words = options.data
    if options.binary:
        raise _CommandError("--binary needs a file or stdin.")
    if options.json:
        return _parse_json(" ".join(words))
    if words and not options.text and all(re.match(r"[A-Za-z_][\w.-]*=", word) for word in words):
        return {key: _json_or_text(value) for key, _, value in (word.partition("=") for word in words)}
    return " ".join(words)


def _finite(text: str) -> float:
    """Return a number of JSON, which has neither infinities nor NaN."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number in JSON")
    return number


_from_strict_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode


def _parse_json(text: str) -> Any:
    try:
        return datetime_decoder(_from_strict_json(text.strip()))
    except (ValueError, RecursionError) as error:
        raise _CommandError(f"DATA is no JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    """Return what *text* is in JSON; but a number only if it is written like that (``1.10`` may be a version)."""
    try:
        value = _from_strict_json(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, (int, float)) and json.dumps(value) != text else value


def _recorded(message: Message) -> str:
    """Return a message as one line; one with line breaks in it is escaped, and begins with a backslash."""
    text = message.encode()
    if "\n" not in text and "\r" not in text:
        return text
    return "\\" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


_ESCAPES = {b"n": b"\n", b"r": b"\r", b"\\": b"\\"}


def _read_recording(stream: Any, options: argparse.Namespace) -> Iterator[Message]:
    """Yield the messages that were recorded, one a line, up to a broken one; show on a terminal how far it is."""
    total = 0
    if sys.stderr is not None and sys.stderr.isatty() and stream.seekable() and not options.quiet:
        start = stream.tell()
        total = sum(1 for _ in stream)
        stream.seek(start)
    try:
        for number, line in enumerate(stream, 1):
            text = line.rstrip(b"\n")
            if text.startswith(b"\\"):
                text = re.sub(rb"\\([nr\\])", lambda match: _ESCAPES[match[1]], text[1:])
            try:
                message = Message.decode(text)
                if not line.endswith(b"\n"):
                    raise MessageError("It is cut off, as it does not end with a line break.")
            except MessageError as error:
                raise _CommandError(f"{options.replay}, line {number}: {error}") from None
            yield message
            if total and 100 * number // total > 100 * (number - 1) // total:
                bar = "#" * (30 * number // total)
                print(f"\r[{bar:.<30}] {number}/{total}", end="", file=sys.stderr, flush=True)
    finally:
        if total:
            _talk("")


def _paced(messages: Iterable[Message], speed: float, loop: Loop) -> Iterator[Message]:
    """Yield messages as far apart in time as they were sent, at *speed* times the speed; with 0 without pauses."""
    start = None
    for message in messages:
        sent, now = sent_at(message), time.monotonic()
        start = start or (now, sent)
        due = min(start[0] + (sent - start[1]) / speed, now + 1e6) if speed > 0 else now
        while time.monotonic() < due:
            _interrupt_if_stopped(loop)
            loop.turn(due)  # unlike a sleep, it is ended also by a signal that comes just before it begins
        yield message


# -- subscribe --


def _time(text: str) -> timedelta | datetime:
    """Read a time of the past, for argparse."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text, re.ASCII)
    if match is not None:
        return timedelta(seconds=float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])
    moment = parse_datetime(text)
    if moment is None:
        raise _unusable(f"{text!r} is neither a time span such as 90, 10m, 2h nor an ISO date-time")
    return moment


# What can be said of any message: name and how to get it.
_FIELDS: dict[str, Callable[[Message], Any]] = {
    **{name: operator.attrgetter(name) for name in ("subject", "type", "sender", "user", "host", "version", "origin")},
    "time": lambda message: _local_time(message.time),
    "age": lambda message: round(time.time() - sent_at(message), 3),
    "data": lambda message: message.data,
}


def _local_time(moment: datetime) -> datetime:
    moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc)
    try:
        return moment.astimezone()
    except (ValueError, OverflowError, OSError):  # at the ends of the calendar
        return moment


def _field_of(message: Message, name: str) -> Any:
    """Return what is called *name* in a message: one of its fields, else in its data (``data.type`` is there, too)."""
    if name in _FIELDS:
        return _FIELDS[name](message)
    return value_at(message.data, name.removeprefix("data."))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


def _condition(text: str) -> Callable[[Message], bool]:
    """Read a condition on messages, for argparse."""
    match = re.fullmatch(r"\s*([^=!<>]*[^=!<>\s])\s*([=!]=|[<>]=?(?![<>])|=(?![<>]))\s*(.*?)\s*", text, re.DOTALL)
    if match is None:
        raise _unusable(f"{text!r} is not KEY=VALUE (or with != < > <= >= in place of =)")
    name, sign, wanted = match.groups()

    def compared(message: Message, compare: Callable[[Any, Any], Any]) -> Any:
        return compare(*_comparable(_field_of(message, name), wanted))

    def holds(message: Message) -> bool:
        try:
            return bool(compared(message, _COMPARISONS[sign]))
        except TypeError:  # neither is less than the other
            return False

    if name in ("time", "age"):
        try:
            compared(Message("/any", "any"), operator.lt)
        except TypeError:
            what = "an ISO date-time" if name == "time" else "a number of seconds"
            raise _unusable(f"{text!r} can never hold: {wanted!r} is not {what}") from None
    return holds


def _comparable(value: Any, text: str) -> tuple[Any, Any]:
    """Return *value* and what *text* stands for next to it: a text, a time, or something of JSON."""
    if isinstance(value, datetime):
        moment = parse_datetime(text)
        return _local_time(value), text if moment is None else _local_time(moment)
    if isinstance(value, str):
        return value, text
    try:
        return value, _from_strict_json(text)
    except (ValueError, RecursionError):
        return value, text


class _Format(string.Formatter):
    """Makes lines of messages by a format such as ``{subject} {data[uri]}``; what a message has not is left out."""

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self.names = {re.split(r"[.\[]", name)[0] for _, name, _, _ in self.parse(text) if name is not None}
            self(Message("/any", "any"))
        except ValueError as error:
            raise _unusable(f"{text!r} cannot be used: {error}") from None
        unknown = ", ".join(sorted(self.names - set(_FIELDS)))
        if not self.names <= set(_FIELDS):
            raise _unusable(f"there is no {{{unknown}}}, but {{{'}, {'.join(_FIELDS)}}}")

    def __call__(self, message: Message) -> str:
        return self.vformat(self._text, (), {"message": message})

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return a field of the message."""
        return _FIELDS[cast(str, key)](kwargs["message"])

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the message has under a name such as ``data[uri]``."""
        try:
            return super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, AttributeError):
            return "", field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a value in its format, or as it is if that is for another kind of value, or for smaller ones."""
        try:
            return cast(str, super().format_field(_shown(value), format_spec))
        except (ValueError, TypeError, OverflowError):
            return str(value)


def _as_json(value: Any) -> str:
    """Return what can be in a message in JSON, which has neither infinities nor NaN: they become null."""
    text = dump_data(value, "v1.2")[0]
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda name: None))
    return text


def _shown(value: Any) -> Any:
    """Return a value of a message as people read it: what holds others in JSON, its datetimes in ISO form."""
    return _as_json(value) if isinstance(value, (dict, list)) else value


_WHERE = "only messages like that; also != < > <= >=, for numbers and times, and a.b for b in a; may be repeated"
_SOURCE = (  # what says which messages are wanted
    _TOPICS,
    _repeated("--service", help="name of a publisher (all)"),
    _PUBLISHER_ADDRESS,
    _repeated("--type", help="only messages of this type"),
    _repeated("--where", metavar="KEY=VALUE", default=[], type=_condition, help=_WHERE),
    _option("--since", metavar="TIME", type=_time, help="also what was sent since (90 seconds, 10m, 2h, 1d, a date)"),
    _option("--durable", metavar="NAME", help="also what was sent since the last time with this name"),
    _option("--unique", metavar="KEY", help="only one of several copies: of messages with the same KEY in 5 minutes"),
)


@_command(
    "subscribe",
    *_SOURCE,
    _option("-n", "--count", type=_number(int, 1), help="end after so many messages"),
    _seconds("--timeout", 0, None, "end after so long without a message"),
    _option("--sample", metavar="N", type=_number(int, 1), default=1, help="only one of N messages"),
    _either(
        _flag("--json", help="one JSON object a line"),
        _flag("--raw", help="one encoded message a line, for 'publish --replay'"),
        _option("--format", metavar="TEXT", type=_Format, help=f"a line of your own: {{{'}, {'.join(_FIELDS)}}}"),
        _option("--count-by", metavar="KEY", help="only how many messages there are, by type, subject, a.b ..."),
    ),
)
def _run_subscribe(options: argparse.Namespace) -> int:
    """Print messages as they come.

    Examples:
      posttroll subscribe /segment --service receiver
      posttroll subscribe --json | jq .data.uri
      posttroll subscribe -n 1 --timeout 60 /alarm || echo nothing
      posttroll subscribe --raw --since 10m > recorded
      posttroll subscribe --json --durable archive >> archive.json
      posttroll subscribe --where platform=Metop-C --where 'size>1000' --format '{time:%H:%M} {data[uri]}'
      posttroll subscribe --timeout 60 --count-by data.platform
    """
    display = _Display(options)
    received = 0
    with _following(options, display.shows_origin) as subscriber, call_on_signals(subscriber.close):
        for message in subscriber.recv(options.timeout):
            if message is None:
                break
            received += 1
            if received % options.sample == 0:
                display.show(message)
            if received // options.sample == options.count:
                break
    display.finish()
    shown = received // options.sample
    expected = options.count or (1 if options.timeout is not None else 0)
    if shown < expected:
        raise _CommandError(f"{shown} of {expected} messages came.")
    return 0


def _following(options: argparse.Namespace, tells_origin: bool = False) -> Subscribe:
    """Return what subscribes to what `_SOURCE` describes."""
    if tells_origin:
        raise_descriptor_limit()  # it takes a connection and a socket for each publisher
    is_new = unique(options.unique) if options.unique else lambda message: True

    def is_wanted(message: Message) -> bool:
        has_type = not options.type or message.type in options.type
        return has_type and all(holds(message) for holds in options.where) and is_new(message)

    try:
        return Subscribe(
            options.service or "",
            options.topics or "",
            addr_listener=True,
            addresses=options.address,
            timeout=0,
            translate="origin" if tells_origin else False,
            nameserver=not options.address and _nameservers(options),
            message_filter=is_wanted,
            since=options.since,
            durable=options.durable,
        )
    except RuntimeError as error:  # the durable name is in use
        raise _CommandError(str(error)) from None


class _Display:
    """Shows messages on stdout, each of them, or only how many there are."""

    KINDS = 10000  # that are told apart

    def __init__(self, options: argparse.Namespace) -> None:
        self._by = options.count_by
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        form: Callable[[Message], str] = options.format or (_as_json_line if options.json else _recorded)
        is_readable = sys.stdout.isatty() and not (options.json or options.raw or options.format)
        names = options.format.names if options.format else [self._by]
        self.shows_origin = "origin" in names or bool(options.verbose and (is_readable or options.json))
        self._form = form
        if is_readable:
            self._form = partial(_as_readable, color=_colors(options))
        elif sys.stdout.isatty():
            self._form = lambda message: printable(form(message))
        if self._by and sys.stdout.isatty():
            threading.Thread(target=self._draw, daemon=True).start()

    def show(self, message: Message) -> None:
        """Show a message."""
        if not self._by:
            print(self._form(message), flush=True)
            return
        value = _field_of(message, self._by)
        kind = "" if value is None else str(_shown(value))
        with self._lock:
            self._counts[kind if kind in self._counts or len(self._counts) < self.KINDS else "(others)"] += 1

    def _draw(self) -> None:
        """Show again and again how many there are, also when no more come."""
        while not self._is_over.wait(1):
            _show(self._lines())

    def _lines(self) -> list[str]:
        with self._lock:
            rows = [[str(count), printable(kind)] for kind, count in self._counts.most_common()]
        return _table(rows, ("MESSAGES", self._by.upper()), _view_size()[0], elastic=[1])

    def finish(self) -> None:
        """Show what there is at the end."""
        self._is_over.set()
        if self._by:
            _show(self._lines()) if sys.stdout.isatty() else print("\n".join(self._lines()), flush=True)


def _as_json_line(message: Message) -> str:
    """Return a message as a JSON object on one line; bytes as a base64 data URL."""
    data = "".join(encode_binary(message.data)) if isinstance(message.data, bytes) else message.data
    fields = {"subject": message.subject, "type": message.type, "sender": message.sender, "time": message.time}
    more = {"age": _FIELDS["age"](message), "origin": message.origin} if message.origin else {}
    return _as_json({**fields, "version": message.version, "data": data, **more})


def _as_readable(message: Message, color: bool) -> str:
    """Return a message as lines for people: when it was made, how old it is, and where it came from if that is told."""
    moment = _local_time(message.time)
    day = "" if moment.date() == date.today() else f"{moment:%Y-%m-%d} "
    paint = colored if color else lambda text, _: text
    subject, kind = paint(printable(message.subject), GREEN), paint(printable(message.type), YELLOW)
    origin = f", from {message.origin}" if message.origin else ""
    age = f"({_span(_FIELDS['age'](message))} old{origin})"
    head = f"{day}{moment:%H:%M:%S} {subject} {kind} {printable(message.sender)} {age}"
    data = message.data
    if isinstance(data, dict):
        width = max(map(len, map(printable, data)), default=0)
        names = (paint(printable(name).ljust(width), CYAN) for name in data)
        lines = (f"    {name}  {printable(_shown(value))}" for name, value in zip(names, data.values()))
        return "\n".join([head, *lines])
    return f"{head} {printable(_shown(data))}" if data != "" else head


def _span(seconds: float) -> str:
    """Return a time span for people: as exact as one needs it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3f} s"


# -- relay --


@_command(
    "relay",
    *_SOURCE,
    _option("--name", default="relay", help="of its publisher (relay)"),
    _PUBLISH_PORT,
    _repeated("--out-nameserver", metavar="HOST", help="where to register; may be repeated; none: nowhere (multicast)"),
    _setting("--in-set", " for the end that subscribes"),
    _setting("--out-set", " for the end that publishes"),
    _option("--role", choices=["publisher"]),
)
def _run_relay(options: argparse.Namespace) -> int:
    """Subscribe here, and publish the same there: between sites, networks, backends.

    Each end is a process, with a configuration of its own.  With --durable, a relay that comes back passes on what was
    sent meanwhile.  What comes back over another relay is not passed on once more.

    Examples:
      posttroll relay --out-nameserver otherhost --name site_a --durable site_a
      posttroll relay /segment --service receiver --unique uid --port 9010 --out-nameserver none
      posttroll relay --in-set backend=unsecure_zmq --out-set backend=secure_zmq --port 9010 --out-nameserver none
    """
    if options.role:
        return _run_publishing_end(options)
    echoes = _Echoes()
    relayed = 0
    try:
        with ExitStack() as stack:
            stack.enter_context(config.set(dict(options.in_set)))
            out = stack.enter_context(_PublishingEnd(options))
            subscriber = stack.enter_context(_following(options, tells_origin=True))
            stack.enter_context(call_on_signals(subscriber.close))
            out.when_ended(subscriber.close)
            for message in subscriber:
                raw = cast(str, message.raw).encode()
                if not echoes.is_echo(raw, message.origin):
                    out.send(raw)
                    relayed += 1
    finally:
        _talk(f"{relayed} message{'s' * (relayed != 1)} relayed", options)
    if subscriber.missed or out.dropped:
        lost = f"{subscriber.missed} messages were gone before they could be relayed, {out.dropped} on their way"
        raise _CommandError(f"{lost}: a subscriber was too slow, or out of reach.")
    return 0


class _Echoes:
    """Recognises messages that have come from elsewhere before, as they do where relays make a loop.

    One that comes from the same publisher again is none: programs may send the same text several times.
    """

    LIMIT = 50000  # messages that are recognised, the newest; an older one makes the round once more

    def __init__(self) -> None:
        self._origins: OrderedDict[bytes, str] = OrderedDict()

    def is_echo(self, raw: bytes, origin: str) -> bool:
        """Whether *raw* has come from another publisher than *origin* before."""
        first = self._origins.setdefault(get_blake2b()(raw, digest_size=16).digest(), origin)
        if len(self._origins) > self.LIMIT:
            self._origins.popitem(last=False)
        return first != origin


class _PublishingEnd:
    """The end of a relay that publishes: a process that is told what to send, and says when it has done so.

    It publishes as long as it is told something, whatever happens to this process, and then until all is sent.

    Attributes:
        dropped: How many messages did not reach a subscriber; known at the end.
    """

    LENGTH = struct.Struct("!I")  # comes before each message
    PATIENCE = 60.0  # seconds that it waits for its port
    DONE, WAITING = b"\n", b"."  # what it says

    def __init__(self, options: argparse.Namespace) -> None:
        import subprocess

        words = ["--role=publisher", f"--name={options.name}", f"--port={options.port}", *["-q"] * options.quiet]
        words += ["-v"] * options.verbose
        words += [f"--nameserver={host}" for host in options.out_nameserver or []]
        words += [f"--set={key}={value!r}" for key, value in [*options.set, *options.out_set]]
        command = [sys.executable, os.path.abspath(__file__), "relay", *words]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # no Control-C reaches it
        )
        self._input, self._output = cast(Any, self._process.stdin), cast(Any, self._process.stdout)
        self.dropped = 0

    def __enter__(self) -> _PublishingEnd:
        self._await_done()
        return self

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Have *callback* called, in another thread, when the process has ended."""

        def wait() -> None:
            self._process.wait()
            callback()

        threading.Thread(target=wait, name="posttroll relay", daemon=True).start()

    def send(self, raw: bytes) -> None:
        """Have a message sent; raises _CommandError if it cannot be."""
        with suppress(BrokenPipeError):  # then nothing is said either
            self._input.write(self.LENGTH.pack(len(raw)) + raw)
            self._input.flush()
        self._await_done()

    def _await_done(self) -> None:
        answer = self.WAITING
        while answer == self.WAITING:
            answer = self._output.read(1)
        if answer != self.DONE:
            raise _CommandError(f"the end that publishes has ended, with status {self._process.wait()}.")

    def __exit__(self, kind: object = None, *exc_info: object) -> None:
        if kind is KeyboardInterrupt:
            self._process.kill()  # at once
        with suppress(BrokenPipeError):
            self._input.close()
        with self._process:
            self.dropped = int(self._output.readline() or 0) if kind is None else 0
        if kind is None and self._process.returncode:
            raise _CommandError(f"the end that publishes has ended, with status {self._process.returncode}.")


def _run_publishing_end(options: argparse.Namespace) -> int:
    """Send what stdin tells, until its end; say on stdout when it is done, and how many messages were lost."""
    import signal

    source, report = sys.stdin.buffer, sys.stdout.buffer
    length = _PublishingEnd.LENGTH
    with ExitStack() as stack:
        publishing = _publishing(options.name, options.port, options.nameserver)
        publisher = _when_port_is_free(options.port, partial(stack.enter_context, publishing), report)
        for number in (signal.SIGINT, signal.SIGTERM):  # which everybody in a terminal or a service gets
            signal.signal(number, signal.SIG_IGN)
        while True:
            report.write(_PublishingEnd.DONE)
            report.flush()
            head = source.read(length.size)
            size = length.unpack(head)[0] if len(head) == length.size else 1
            raw = source.read(size)
            if len(raw) < size:
                break
            publisher.send(raw)
    with suppress(BrokenPipeError):  # the other end has been killed
        report.write(b"%d\n" % publisher.dropped)
        report.flush()
    return 0


def _when_port_is_free(port: int, start: Callable[[], AnyPublisher], report: Any) -> AnyPublisher:
    """Return what *start* returns; while *port* is in use, as by a relay that was killed and still sends, wait for it.

    Meanwhile *report* is told so, which fails, and so ends this, once nobody is there to be told.
    """
    deadline = time.monotonic() + _PublishingEnd.PATIENCE
    has_warned = False
    while True:
        try:
            return start()
        except zmq.ZMQError as error:
            if not port or error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
        if not has_warned:
            text = "Port %d is in use, perhaps by a relay before this one that still sends: waiting for it"
            _log("publisher").warning(text, port)
            has_warned = True
        report.write(_PublishingEnd.WAITING)
        report.flush()
        time.sleep(0.5)


# -- publishers that nameservers know --


class _Service:
    """A publisher, as a nameserver tells of it.

    Args:
        entry: What the nameserver tells; at least the address, as ``"URI"``.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self.address: str = entry["URI"]
        told = entry.get("service")
        self._names = list(map(str, filter(None, told))) if isinstance(told, list) else []

    @property
    def name(self) -> str:
        """Its name; the first of its services where a nameserver calls every publisher ``address``."""
        name = self.entry.get("name")
        return name if isinstance(name, str) and name != "address" else next(iter(self._names), "")

    @property
    def row(self) -> dict[str, Any]:
        """What is known of it, for a table."""
        received, age = self.entry.get("receive_time"), None
        if isinstance(received, datetime):
            age = round(time.time() - _local_time(received).timestamp(), 1)
        aliases = [name for name in self._names if name != self.name]
        how = {"backend": self.entry.get("backend"), "version": self.entry.get("supported_message_version"), "age": age}
        return {"name": self.name, "aliases": aliases, "address": self.address, **how}

    def greets(self, timeout: float = 1.0) -> bool:
        """Whether a ZeroMQ socket answers at its address.

        One of ours that wants CURVE is asked with it: it takes a mere greeting for a handshake that failed.
        """
        if backend_towards(self.entry.get("backend")) == "secure_zmq":
            timeout /= 2  # for each of the two ways
            if self.about(timeout) is not None:
                return True
        return bool(_mechanism_at(self.address, timeout)[0])

    def about(self, timeout: float = 1.0) -> dict[str, Any] | None:
        """Return what it tells about itself; None if it tells nothing, as those that are not of ours."""
        backend = backend_towards(self.entry.get("backend"))
        with suppress(ConfigurationError, zmq.ZMQError):
            if backend is not None:
                with closing(Inquiry(self.address, backend)) as inquiry:
                    return inquiry.ask(timeout)
        return None


def _look_up(name: str, timeout: float, hosts: list[str]) -> list[_Service]:
    """Return the publishers of a service that nameservers know; of all for an empty name."""
    return list(map(_Service, get_pub_address(name, timeout, hosts)))


_Answer = TypeVar("_Answer")


def _ask_each(
    ask: Callable[[_Service], _Answer], services: Iterable[_Service], timeout: float = 1e6, workers: int = 128
) -> Iterator[tuple[str, _Answer]]:
    """Ask publishers, so many *workers* at once, and yield addresses and answers as they come, until *timeout*.

    Whoever does not answer in time, or cannot even be asked, is left out.
    """
    import queue

    deadline = time.monotonic() + timeout
    waiting = deque(services)
    answers: queue.SimpleQueue[tuple[str, _Answer] | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with suppress(IndexError):
                while True:
                    service = waiting.popleft()
                    answers.put((service.address, ask(service)))
        finally:
            answers.put(None)  # also if it has failed

    running = min(len(waiting), workers)
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()  # nobody waits for one whose name does not resolve
    with suppress(queue.Empty):
        while running:
            answer = answers.get(timeout=max(deadline - time.monotonic(), 0))
            if answer is not None:
                yield answer
            running -= answer is None


def _mechanism_at(address: str, timeout: float = 1.0) -> tuple[str, bytes]:
    """Return the security mechanism of the ZeroMQ socket at *address*, ``""`` if there is none, and what was received.

    A greeting (https://rfc.zeromq.org/spec/23) is 64 bytes: signature (10), version (2), mechanism (20), and others.
    Each side sends one part when it has received the part before, and hangs up if the mechanism is not its own.  So
    ours is never sent.
    """
    host, port = split_tcp_address(address) or ("", 0)
    received = b""
    with suppress(OSError, UnicodeError), socket.create_connection((host.strip("[]"), port), timeout) as connection:
        for part, size in ((b"\xff\0\0\0\0\0\0\0\1\x7f", 11), (b"\3\0", 32)):
            connection.sendall(part)
            while len(received) < size:
                more = connection.recv(size - len(received))
                if not more or (received + more)[:1] != b"\xff":
                    return "", received + more
                received += more
    return received[12:].rstrip(b"\0").decode("ascii", "replace") if len(received) == 32 else "", received


# -- services --


@_command(
    "services",
    _names(help="only these services; the status is 1 if one of them does not answer"),
    _JSON,
    _seconds("--watch", 0.1, None, "again and again (2)", nargs="?", const=2.0),
    _seconds("--timeout", 0, 5, "for the nameserver"),
)
def _run_services(options: argparse.Namespace) -> int:
    """List what the nameserver knows, and who answers (?, in JSON null: not known within the time).

    Examples:
      posttroll services
      posttroll services --nameserver otherhost --json
      posttroll services --watch
    """
    if options.watch:
        _watch_services(options)
        return 0
    rows, missing = _find_services(options)
    print("\n".join(_services_lines(rows, options)))
    if missing:
        raise _CommandError(f"no publisher of {', '.join(missing)} answers.")
    return 0


def _watch_services(options: argparse.Namespace) -> None:
    """List them again and again, until a signal comes; what was known last while no nameserver answers."""
    rows: list[dict[str, Any]] = []
    is_set_up = False
    end = threading.Event()
    with call_on_signals(end.set):
        while not end.is_set():
            problem = ""
            try:
                rows, _ = _find_services(options)
            except TimeoutError as error:  # the nameserver may come back
                problem = str(error)
            except (ConfigurationError, zmq.ZMQError) as error:  # keys that are being replaced, no descriptors left
                if not is_set_up:
                    raise
                problem = str(error)
            is_set_up = True
            _show(_services_lines(rows, options))
            if problem:
                _talk(problem)
            end.wait(options.watch)


def _find_services(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what is known of the publishers, and those of the wanted names for which none of them answers."""
    hosts = _nameservers(options)
    found = {name: _look_up(name, options.timeout, hosts) for name in options.names or [""]}
    services = {service.address: service for each in found.values() for service in each}
    answers = dict(_ask_each(_Service.greets, services.values(), max(options.timeout, 2)))
    rows = [{**service.row, "answers": answers.get(address)} for address, service in services.items()]
    rows.sort(key=lambda row: (row["name"], row["address"]))
    missing = [name for name in options.names if not any(answers.get(each.address) for each in found[name])]
    return rows, missing


def _services_lines(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return the lines that list them: as a table, in the colours of the word at their end."""
    if options.json:
        return [_as_json(rows)]
    cells = []
    for row in rows:
        age = "" if row["age"] is None else f"{row['age']:.0f} s"
        line = [row["name"], ",".join(row["aliases"]), row["address"], row["backend"] or "", row["version"] or "", age]
        cells.append([*map(printable, line), {True: "yes", False: "no", None: "?"}[row["answers"]]])
    headings = ("NAME", "ALIASES", "ADDRESS", "BACKEND", "VERSION", "AGE", "ANSWERS")
    head, *lines = _table(cells, headings, _view_size()[0], elastic=[0, 1])
    if _colors(options):
        ends = {"yes": colored("yes", GREEN), "no": colored("no", RED)}
        lines = [re.sub("(yes|no)$", lambda word: ends[word[0]], line) for line in lines]
    return [head, *lines]


# -- ping --


class _Pinged:
    """A peer that is asked again and again, and how long it took to answer.

    Args:
        name: What to call it.
        ask: Asks it, and waits so many seconds for the answer; returns what is known of it then, else nothing.

    Attributes:
        asked: How many times it was.
        times: In seconds, those of the answers.
    """

    def __init__(self, name: str, ask: Callable[[float], str]) -> None:
        self.name = printable(name)
        self.ask = ask
        self.times: list[float] = []
        self.asked = 0

    def measure(self, timeout: float) -> str:
        """Ask; return a line that tells how that went."""
        self.asked += 1
        start = time.monotonic()
        is_answered = ""
        with suppress(ConfigurationError, zmq.ZMQError):  # keys that are being replaced, no descriptors left
            is_answered = self.ask(timeout)
        if is_answered:
            self.times.append(time.monotonic() - start)
        what = f"time={1000 * self.times[-1]:.3f} ms" if is_answered else f"no answer after {timeout:g} s"
        return f"{self.name}: seq={self.asked} {what}"

    @property
    def summary(self) -> str:
        """How often it was asked, how often it answered, and how fast."""
        lost = 100 * (self.asked - len(self.times)) / max(self.asked, 1)
        text = f"--- {self.name}: {self.asked} asked, {len(self.times)} answered, {lost:.0f}% lost"
        if not self.times:
            return text
        mean = sum(self.times) / len(self.times)
        deviation = math.sqrt(sum((time - mean) ** 2 for time in self.times) / len(self.times))
        figures = "/".join(f"{1000 * each:.3f}" for each in (min(self.times), mean, max(self.times), deviation))
        return f"{text}, min/avg/max/mdev = {figures} ms"


def _ask_about_nameserver(host: str, timeout: float) -> str:
    """Ask a nameserver by a lookup; return what is known of it, nothing if it does not answer."""
    try:
        version = describe_nameserver(host, timeout).get("version")
    except (TimeoutError, MessageError):
        return ""
    return f"posttroll {printable(version)}" if version else "version unknown"


class _PublisherAsker:
    """Asks a publisher of ours about itself; of others it awaits the greeting on a new connection."""

    def __init__(self, service: _Service) -> None:
        self._service = service
        self._is_ours: bool | None = None  # not known yet
        self._inquiry: Inquiry | None = None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._inquiry is not None:
            self._inquiry.close()
            self._inquiry = None

    def _ask(self, timeout: float) -> dict[str, Any] | None:
        if self._inquiry is None:
            self._inquiry = Inquiry(self._service.address, backend_towards(self._service.entry.get("backend")))
        about = self._inquiry.ask(timeout)
        if about is None:
            self.close()  # the next one has the keys that there are then
        return about

    def __call__(self, timeout: float) -> str:
        if self._is_ours is None:
            timeout /= 2  # for each of the two ways
        about = None if self._is_ours is False else self._ask(timeout)
        if about is not None:
            self._is_ours = True
            counts = f"{about['subscribers']} subscribers, {about['kept']} messages kept"
            return f"posttroll {printable(about['version'])}, {counts}"
        greets = partial(_Service.greets, timeout=timeout)
        if self._is_ours or not any(answer for _, answer in _ask_each(greets, [self._service], timeout)):
            return ""
        self._is_ours = False
        return "version unknown (time until ZeroMQ greets)"


@_command(
    "ping",
    _names(help="publishers to ask, besides the nameserver"),
    _PUBLISHER_ADDRESS,
    _option("-c", "--count", metavar="N", type=_number(int, 1), help="ask so many times (until Control-C)"),
    _seconds("--interval", 0.01, 1, "between two questions"),
    _seconds("--timeout", 0.01, 2, "for an answer"),
)
def _run_ping(options: argparse.Namespace) -> int:
    """Measure how fast nameservers and publishers answer.

    Examples:
      posttroll ping
      posttroll ping receiver -c 5 --nameserver otherhost
      posttroll ping --address tcp://otherhost:9000 -q -c 100 --interval 0.1
    """
    end = threading.Event()
    with ExitStack() as stack:
        peers = _pinged(options, stack)
        stack.enter_context(call_on_signals(end.set))
        for peer in peers:
            about = peer.ask(options.timeout)  # connects, and is not counted
            print(f"PING {peer.name}: {about or 'no answer yet'}", flush=True)
        for number in count(1):
            for peer in peers:
                if not end.is_set():
                    line = peer.measure(options.timeout)
                    if not options.quiet:
                        print(line, flush=True)
            if number == options.count or end.wait(options.interval):
                break
    print("\n".join(peer.summary for peer in peers))
    silent = [peer.name for peer in peers if peer.asked and not peer.times]
    if silent:
        raise _CommandError(f"no answer from {', '.join(silent)}.")
    return 0


def _pinged(options: argparse.Namespace, stack: ExitStack) -> list[_Pinged]:
    """Return whom to ask; *stack* closes what is opened for that."""
    services = [("", _Service({"URI": address})) for address in options.address]
    hosts = _nameservers(options) if options.names or not options.address else []
    for name in options.names:
        found = _look_up(name, options.timeout, hosts)
        if not found:
            raise _CommandError(f"the nameserver on {', '.join(hosts)} knows no publisher {name}.")
        services += [(f"{name} ", service) for service in found]
    peers = [_Pinged(f"nameserver {host}", partial(_ask_about_nameserver, host)) for host in hosts]
    for name, service in services:
        peers.append(_Pinged(name + service.address, stack.enter_context(closing(_PublisherAsker(service)))))
    return peers


# -- what top, check and exporter know --


def raise_descriptor_limit() -> int:
    """Allow this process as many open files, that is connections, as the system lets it have; return how many."""
    with suppress(ImportError, ValueError, OSError):  # macOS says "unlimited" and means something else
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return get_descriptor_limit()


class _Heartbeats:
    """When heartbeats of a publisher came, and how many of those that it promised by them did not.

    A heartbeat tells how long it is until the next one, its ``min_interval``; without (or with 0) it promises nothing,
    and what an earlier one promised holds.

    Attributes:
        last: When the last one came, a time of `time.monotonic`; None before the first.
        interval: How many seconds after it the next one is expected, None if none is.
    """

    SLACK = 0.5  # intervals that one may be late

    def __init__(self) -> None:
        self.last: float | None = None
        self.interval: float | None = None
        self._missed = 0  # until the last one

    def take(self, message: Message, when: float) -> None:
        """Take note of a message that came at a time, if it is a heartbeat (and not older than the last one)."""
        if message.type == "beat" and (self.last is None or when >= self.last):
            self._missed += self.overdue(when)
            interval = message.data.get("min_interval") if isinstance(message.data, dict) else None
            if isinstance(interval, (int, float)) and interval > 0:
                self.interval = float(max(1.0, min(1e6, interval)))
            self.last = when

    def overdue(self, now: float) -> int:
        """Return how many should have come since the last one."""
        if self.last is None or self.interval is None:
            return 0
        return max(int((now - self.last) / self.interval - self.SLACK), 0)

    def missed(self, now: float) -> int:
        """Return how many did not come, all in all."""
        return self._missed + self.overdue(now)


def _age(message: Message) -> float:
    """Return how many seconds ago a message was made, by the clocks of its host and this one; 0 if it is to come."""
    return max(time.time() - sent_at(message), 0.0)


class _Traffic:
    """The messages of one publisher, subject and type.

    Attributes:
        messages, size: How many there were, and of how many bytes.
        ages: How many were, when they came, at most as old as each of `AGES`, and older than the one before; and older.
        age_sum: How old all of them together were, in seconds.
        last, last_time: When the last one came, by `time.monotonic` and by `time.time`.
        heartbeats: Those among them.
    """

    AGES = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0)
    BEATS = ("heartbeat_interval", "heartbeats_overdue", "heartbeats_missed")
    SECONDS = 60  # of which it is known how many came in each

    def __init__(self) -> None:
        self.messages = self.size = 0
        self.ages = [0] * (len(self.AGES) + 1)
        self.age_sum = self.last = self.last_time = 0.0
        self.heartbeats = _Heartbeats()
        self._counts: Counter[int] = Counter()  # by second

    def count(self, size: int, age: float, now: float) -> None:
        """Count a message of *size* bytes that comes *now*, *age* seconds old."""
        self.messages += 1
        self.size += size
        self.ages[bisect_left(self.AGES, age)] += 1
        self.age_sum += age
        self.last, self.last_time = now, time.time()
        self._counts[int(now)] += 1
        if len(self._counts) > 2 * self.SECONDS:
            del self._counts[min(self._counts)]

    def beats(self, now: float) -> dict[str, float | None]:
        """Return what is known of heartbeats; nothing if there are none to be expected."""
        beats = self.heartbeats
        if beats.interval is None:
            return dict.fromkeys(self.BEATS)
        return dict(zip(self.BEATS, (beats.interval, beats.overdue(now), beats.missed(now))))

    def minute(self, now: float) -> list[int]:
        """Return how many came in each second of the last minute, this one included."""
        return [self._counts[second] for second in range(int(now) - self.SECONDS + 1, int(now) + 1)]


class _Tally:
    """A publisher that is listened to, and its traffic by subject and type."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard = time.monotonic()
        self.traffic: dict[tuple[str, str], _Traffic] = {}


class _Meter:
    """Counts the messages of publishers, in a thread that does nothing else.

    Args:
        topics: The beginnings of the subjects.
    """

    KINDS = 500  # of messages, by publisher, subject and type; what exceeds is counted as of the subject OTHER
    OTHER = "other"

    def __init__(self, topics: Sequence[str]) -> None:
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._tallies: dict[str, _Tally] = {}  # by address
        self._kinds = 0
        self._subscriber = Subscriber([], topics, self._count, translate="origin")
        self._thread = threading.Thread(target=self._receive, name="posttroll meter", daemon=True)
        self._thread.start()

    @property
    def is_counting(self) -> bool:
        """Whether it still counts."""
        return self._thread.is_alive()

    def _receive(self) -> None:
        for _ in self._subscriber.recv():  # it takes none of them, but counts them as they pass its filter
            pass

    def _count(self, message: Message) -> bool:
        """Count a message; return that nobody wants to have it."""
        now, age, size = time.monotonic(), _age(message), len((message.raw or "").encode())
        with self._lock:
            tally = self._tallies.get(message.origin)
            if tally is not None:
                tally.heard = now
                kind = _shortened(message.subject, 200), _shortened(message.type, 60)
                if kind not in tally.traffic:
                    kind = kind if self._kinds < self.KINDS else (self.OTHER, self.OTHER)
                    self._kinds += kind not in tally.traffic
                traffic = tally.traffic.setdefault(kind, _Traffic())
                traffic.count(size, age, now)
                if kind[1] == message.type:
                    traffic.heartbeats.take(message, now)
        return False

    def add(self, service: _Service) -> bool:
        """Count the messages of a publisher; return whether that is possible."""
        with self._lock:
            self._tallies.setdefault(service.address, _Tally(_shortened(service.name, 200)))
        try:
            # What it has sent until it was found counts, too: it may have come and gone between two lookups.
            self._subscriber._add(service.entry, None, self._subscriber._begin)
        except (ValueError, zmq.ZMQError):  # another backend
            self.remove(service.address)
            return False
        return True

    def remove(self, address: str) -> None:
        """Forget a publisher."""
        self._subscriber.remove(address)
        with self._lock:
            tally = self._tallies.pop(address, None)
            self._kinds -= 0 if tally is None else len(tally.traffic)

    def forget(self, before: float) -> None:
        """Make room, if there is none: forget the kinds of messages that came last *before* a time."""
        with self._lock:
            for tally in self._tallies.values() if self._kinds >= self.KINDS else ():
                tally.traffic = {kind: traffic for kind, traffic in tally.traffic.items() if traffic.last > before}
            self._kinds = sum(len(tally.traffic) for tally in self._tallies.values())

    def last_heard(self) -> dict[str, float]:
        """Return when each of the publishers was heard last, or was added, by their addresses."""
        with self._lock:
            return {address: tally.heard for address, tally in self._tallies.items()}

    def view(self) -> dict[str, Any]:
        """Return all that was counted until now, as JSON can hold it."""
        with self._lock:
            now = time.monotonic()
            publishers, traffic = [], []
            for address, tally in self._tallies.items():
                labels = {"publisher": tally.name, "address": address}
                publishers.append({**labels, "ago": round(now - tally.heard, 3)})
                for (subject, kind), each in tally.traffic.items():
                    row = {**labels, "subject": subject, "type": kind, "messages": each.messages, "bytes": each.size}
                    times = {"last": each.last_time, "ago": round(now - each.last, 3), "last_minute": each.minute(now)}
                    traffic.append({**row, **times, "age_sum": each.age_sum, "ages": each.ages[:], **each.beats(now)})
        counts = {"caught_up": self._subscriber.caught_up, "missed": self._subscriber.missed}
        bounds = [*_Traffic.AGES, None]
        view = {"seconds": now - self._start, **counts, "publishers": publishers}
        return {**view, "age_bounds": bounds, "traffic": traffic}

    def close(self) -> None:
        """End the counting."""
        self._subscriber.close()
        self._thread.join()


class _Keepers:
    """Asks publishers how many messages they keep, in a thread that does nothing else.

    Attributes:
        kept: The answers by address; publishers that are not of ours give none.
    """

    PAUSE, PATIENCE = 2.0, 0.5  # seconds between two rounds, and for an answer
    WORKERS = 4  # as each needs open files

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self._services: list[_Service] = []
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, services: Iterable[_Service]) -> None:
        """Ask these publishers from now on."""
        self._services = list(services)
        if self._thread is None and self._services:
            self._thread = threading.Thread(target=self._run, name="posttroll keepers", daemon=True)
            self._thread.start()

    def _ask(self, service: _Service) -> int | None:
        about = None if self._is_closed.is_set() else service.about(self.PATIENCE)
        return None if about is None else cast(int, about["kept"])

    def _run(self) -> None:
        while True:
            for address, kept in _ask_each(self._ask, self._services, workers=self.WORKERS):
                if kept is not None:
                    self.kept = {**self.kept, address: kept}
                else:
                    self.kept.pop(address, None)
            if self._is_closed.wait(self.PAUSE):
                return

    def close(self) -> None:
        """End the asking."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()


class _Network:
    """All publishers that the nameservers know, and what they send.

    Args:
        topics: The beginnings of the subjects.
        nameservers: Their hosts.
        loop: What is run while nothing is to be looked up.

    Attributes:
        problem: Why it does not see everything, and what to do; empty if it does.
    """

    LOOKUP, PATIENCE = 1.0, 1.0  # seconds between two (a publisher is there for longer), and for an answer
    KEEP = 300.0  # seconds of silence after which a subject is forgotten, or a publisher that no nameserver knows
    OWN_FILES, FILES = 60, 4  # open files at most, and those of each address

    def __init__(self, topics: Sequence[str], nameservers: Sequence[str], loop: Loop) -> None:
        self._limit = (raise_descriptor_limit() - self.OWN_FILES) // self.FILES
        self._loop = loop
        self._lookup_due = time.monotonic()
        self._is_set_up = False  # that it can ask is shown
        self._up = dict.fromkeys(nameservers, False)
        self._known: dict[str, _Service] = {}  # by address
        self._counted: dict[str, tuple[str, Any]] = {}  # by address: its name and backend
        self.problem = ""
        self._meter = _Meter(topics)
        self._keepers = _Keepers()

    def run(self, until: float = math.inf) -> bool:
        """Follow the publishers *until* a time of `time.monotonic`; return False if the loop was stopped before."""
        while not self._loop.is_stopped and time.monotonic() < until:
            if time.monotonic() >= self._lookup_due:
                self._look_up()
                self._lookup_due = time.monotonic() + self.LOOKUP
            self._loop.turn(min(until, self._lookup_due))
        return not self._loop.is_stopped

    def _look_up(self) -> None:
        """Ask where the publishers are, begin to count new ones, and forget what has been silent for long."""
        if not self._meter.is_counting:  # nobody must take numbers for true that stand still
            raise _CommandError("the counting has failed, see above.")
        known: dict[str, _Service] = {}
        problems = []
        for host in self._up:
            try:
                known.update((service.address, service) for service in _look_up("", self.PATIENCE, [host]))
                self._up[host] = True
            except (TimeoutError, ConfigurationError, zmq.ZMQError) as error:
                if not self._is_set_up and not isinstance(error, TimeoutError):
                    raise  # else keys are being replaced, or no descriptors are left
                self._up[host] = False
                problems.append(str(error))
        self._is_set_up = True
        if any(self._up.values()):
            self._known = known  # else they may still be there
            self._keepers.follow(known.values())
        for address, service in known.items():
            identity = service.name, service.entry.get("backend")
            if self._counted.get(address, identity) != identity:  # another publisher has its address now
                self._forget(address)
            if address not in self._counted and len(self._counted) < self._limit and self._meter.add(service):
                self._counted[address] = identity
        if len(known) > self._limit:
            problems.append(f"Only {self._limit} of {len(known)} publishers: allow more open files (ulimit -n).")
        self.problem = " ".join(problems)
        oldest = time.monotonic() - self.KEEP
        self._meter.forget(oldest)
        for address, heard in self._meter.last_heard().items():
            if address not in self._known and heard <= oldest:
                self._forget(address)

    def _forget(self, address: str) -> None:
        self._meter.remove(address)
        self._counted.pop(address, None)

    def view(self) -> dict[str, Any]:
        """Return all that is known now, as JSON can hold it."""
        now, kept = datetime.now(timezone.utc).isoformat(), self._keepers.kept
        view = {"time": now, "nameservers": dict(self._up), "services": len(self._known), **self._meter.view()}
        for publisher in view["publishers"]:
            publisher["kept"] = kept.get(publisher["address"])
        for row in view["traffic"] if all(self._up.values()) else ():
            if row["address"] not in self._known:  # it has said goodbye: nothing is expected of it any more
                row.update(dict.fromkeys(_Traffic.BEATS))
        return view

    def close(self) -> None:
        """End the counting."""
        self._keepers.close()
        self._meter.close()


# -- top --

_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def _sparkline(counts: Sequence[int], width: int) -> str:
    """Return *width* characters that show how *counts* rose and fell; the highest is as high as it can be."""
    blocks = _BLOCKS
    try:
        _BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        blocks = _ASCII_BLOCKS
    ends = [len(counts) * (place + 1) // width for place in range(width)]
    heights = [sum(counts[start:end]) / max(end - start, 1) for start, end in zip([0, *ends], ends)]
    highest = max(heights, default=0) or 1
    return "".join(blocks[math.ceil(height / highest * (len(blocks) - 1))] for height in heights)


def _top_lines(view: Mapping[str, Any], before: Mapping[str, Any], problem: str, width: int) -> list[str]:
    """Return the lines that show what was counted since the view *before*, the busiest first."""
    old = {(row["address"], row["subject"], row["type"]): (row["messages"], row["bytes"]) for row in before["traffic"]}
    seconds, total, shown = view["seconds"] - before["seconds"], 0.0, []
    for row in view["traffic"]:
        messages_before, size_before = old.get((row["address"], row["subject"], row["type"]), (0, 0))
        messages, size = (row["messages"] - messages_before) / seconds, (row["bytes"] - size_before) / seconds
        total += messages
        overdue = row["heartbeats_overdue"]
        texts = [printable(row[label]) for label in ("publisher", "address", "subject", "type")]
        numbers = [f"{messages:.1f}", f"{size:.0f}", f"{row['ago']:.0f} s ago", "" if overdue is None else str(overdue)]
        if row["ago"] < _Network.KEEP or overdue:
            shown.append((messages, texts + numbers, row["last_minute"]))
    shown.sort(key=lambda item: -item[0])
    headings = ["PUBLISHER", "ADDRESS", "SUBJECT", "TYPE", "MSG/S", "BYTES/S", "SEEN", "OVERDUE"]
    if 0 < width < 110:  # there is no room for the addresses
        for cells in (headings, *(cells for _, cells, _ in shown)):
            del cells[1]
    has_picture = not 0 < width < 70
    room = width and width - 14 * has_picture
    elastic = list(map(headings.index, ("PUBLISHER", "SUBJECT", "TYPE")))
    lines = _table([cells for _, cells, _ in shown], headings, room, elastic)
    if has_picture:
        longest = max(map(len, lines))
        room = min(width - longest - 2, _Traffic.SECONDS) if width else _Traffic.SECONDS // 2
        pictures = ["LAST MINUTE", *(_sparkline(minute, room) for _, _, minute in shown)]
        lines = [f"{line.ljust(longest)}  {picture}".rstrip() for line, picture in zip(lines, pictures)]
    what = f"{len(view['publishers'])} publishers  {total:.1f} messages/s"
    kept = sum(publisher["kept"] or 0 for publisher in view["publishers"])
    gone = f"{view['caught_up']} caught up, {view['missed']} missed, {kept} kept"
    lines = [f"posttroll top - {datetime.now():%H:%M:%S}  {what}  {gone}", problem, *lines]
    return [line[: width or None] for line in lines]


@_command(
    "top",
    _TOPICS,
    _seconds("--interval", 0.1, 2, "between two views"),
    _option("-n", "--count", type=_number(int, 1), help="end after so many views (1 without a terminal)"),
    _flag("--json", help="one JSON object a line, with the numbers of 'exporter'"),
)
def _run_top(options: argparse.Namespace) -> int:
    """Show who publishes how much, live; q quits.

    Examples:
      posttroll top
      posttroll top /segment --interval 10 -n 6 > load.txt
      posttroll top --json | jq '.traffic[] | select(.heartbeats_overdue > 0)'
    """
    views = options.count or (None if sys.stdout.isatty() else 1)
    with ExitStack() as stack:
        keyboard = stack.enter_context(_single_keys())
        loop = stack.enter_context(loop_until_signal())
        network = stack.enter_context(closing(_Network(options.topics, _nameservers(options), loop)))
        if keyboard is not None:
            loop.watch(keyboard, lambda: loop.stop() if os.read(keyboard, 1) in (b"q", b"") else None)
        before: Mapping[str, Any] = {"seconds": 0.0, "traffic": []}
        for number in count(1):
            if not network.run(time.monotonic() + options.interval):
                break
            view = network.view()
            if options.json:
                print(json.dumps(view), flush=True)
            else:
                _show(_top_lines(view, before, network.problem, _view_size()[0]))
            if number == views:
                if not any(view["nameservers"].values()):
                    raise _CommandError(network.problem)
                break
            before = view
    return 0


@contextmanager
def _single_keys() -> Iterator[int | None]:
    """Let single keys be read, without Enter; gives the descriptor to read from, None if no keys are for us."""
    if os.name != "posix" or not _has_keyboard():  # on Windows, Control-C ends it
        yield None
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _has_keyboard() -> bool:
    """Whether there is a terminal, and we are seen there: in its background, we would be stopped if we set it up."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # it is not that of our session, and stops nobody
        return True


# -- check --

_VERDICTS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")  # in the order of the exit statuses that monitors know


class _Listener:
    """Listens to the publishers of a service, whose last messages come at once if they keep them.

    Args:
        name: That of the service, empty for all.
        services: Its publishers.
        topic: The beginning of the subjects.
        seconds: How long ago the last message may be.

    Attributes:
        age: How old the newest message is, in seconds; None if there is none.

    Raises:
        ValueError: A publisher has another backend.
    """

    def __init__(self, name: str, services: Iterable[_Service], topic: str, seconds: float) -> None:
        self.name = name or "all"
        self.age: float | None = None
        self._topic = topic
        self._seconds = seconds
        self._start = time.monotonic()
        self._heartbeats: dict[tuple[str, str], _Heartbeats] = {}
        self._subscriber = Subscriber([service.entry for service in services], topic, since=seconds)
        self._has_more = True

    def listen(self, seconds: float) -> None:
        """Take what comes within so many seconds."""
        deadline = time.monotonic() + seconds
        self._has_more = True
        while self._has_more and time.monotonic() < deadline:
            message = next(self._subscriber.recv(0.01))
            self._has_more = message is not None
            if message is not None:
                age = _age(message)
                self.age = min(age, self._seconds if self.age is None else self.age)
                beats = self._heartbeats.setdefault((message.subject, message.sender), _Heartbeats())
                beats.take(message, time.monotonic() - age)

    @property
    def _knows_past(self) -> bool:
        """Whether all publishers have told what they had sent before; only ours do, of what they keep."""
        if self._topic and self._subscriber.missed:  # of whatever subject it was
            return False
        return not self._has_more and self._subscriber.up_to_date >= len(self._subscriber.addresses)

    @property
    def is_done(self) -> bool:
        """Whether no more is to be learned."""
        waited = time.monotonic() - self._start
        return self._knows_past or waited >= self._seconds or (self.age is not None and waited > 1)

    @property
    def overdue(self) -> int | None:
        """How many heartbeats are overdue, at that publisher where it is most; None if none are expected."""
        beats = [each for each in self._heartbeats.values() if each.interval is not None]
        return max((each.overdue(time.monotonic()) for each in beats), default=None)

    def finding(self) -> tuple[int, str]:
        """Return a status, and why."""
        waited = time.monotonic() - self._start
        if self.age is not None:
            return 0, f"{self.name} heard {self.age:.0f} s ago"
        if self._subscriber.missed and not self._topic:
            return 0, f"{self.name} sent something in the last {self._seconds:g} s"
        if self._knows_past or waited >= self._seconds:
            return 2, f"nothing from {self.name} in {self._seconds:g} s"
        remedy = "it may keep no history: raise --timeout above --silent"
        if self._subscriber.missed:
            less = f"what it keeps does not reach back {self._seconds:g} s"
            remedy = f"{less}: raise its history_seconds or history_messages"
        return 3, f"nothing from {self.name} in {waited:.0f} s ({remedy})"

    def close(self) -> None:
        """End the listening."""
        self._subscriber.close()


class _Check:
    """Asks what a monitor wants to know, and collects the answers.

    Attributes:
        status: The worst that was found.
    """

    WEIGHT = (0, 2, 3, 1)  # of the statuses: what is known to be wrong is worse than what is not known

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self._options = options
        self._deadline = deadline
        self.status = 0
        self._findings: list[tuple[int, str]] = []
        self._data: list[str] = []

    def find(self, status: int, text: str) -> None:
        """Take note of something that was found."""
        self._findings.append((status, text))
        self.status = max(self.status, status, key=self.WEIGHT.__getitem__)

    def measure(self, name: str, value: str, warn: str = "", critical: str = "") -> None:
        """Take note of a number."""
        label = re.sub(r"['=|\s]", "_", printable(name))
        self._data.append(f"'{label}'={value};{warn};{critical}")

    def line(self) -> str:
        """Return all that was found in one line, the worst first, with performance data."""
        findings = sorted(self._findings, key=lambda finding: -self.WEIGHT[finding[0]])
        text = printable("; ".join(text for _, text in findings)).replace("|", "/")
        return f"POSTTROLL {_VERDICTS[self.status]} - {text}" + (f" | {' '.join(self._data)}" if self._data else "")

    @property
    def left(self) -> float:
        """How many seconds there are until the deadline."""
        return max(self._deadline - time.monotonic(), 0.01)

    def share(self, others: int) -> float:
        """Return how many seconds something may take if as many *others* are still to be done after it."""
        return self.left / (1 + others)

    def run(self) -> None:
        """Check everything."""
        names = self._options.names
        services = [name for name in names if "://" not in name]
        found = self._look_up(services) if services or not names else {}
        found.update((name, [_Service({"URI": name})]) for name in names if name not in services)
        if names:  # if no nameserver has answered, nothing is known of services
            all_found = {service.address: service for each in found.values() for service in each}
            patience = self.share(self._options.silent is not None)
            answers = dict(_ask_each(_Service.greets, all_found.values(), patience))
            found = {name: self._reachable(name, each, answers) for name, each in found.items()}
        if self._options.silent is not None:
            self._listen({name: each for name, each in found.items() if each})

    def _look_up(self, services: Sequence[str]) -> dict[str, list[_Service]]:
        """Return what the nameservers know of the services, of all (by the name "") if there are none but wanted."""
        silent = self._options.silent is not None
        wanted = services or ([""] if silent else ["posttroll-check"])  # any answer is one
        hosts = [loopback_address()] if self._options.local else _nameservers(self._options)
        found: dict[str, dict[str, _Service]] = {name: {} for name in wanted}
        down, start = [], time.monotonic()
        for index, host in enumerate(hosts):
            try:
                for name in wanted:
                    patience = self.share(len(hosts) - index - 1 + bool(self._options.names) + silent)
                    found[name].update((service.address, service) for service in _look_up(name, patience, [host]))
            except TimeoutError:
                down.append(host)
        if down:
            self.find(2 if len(down) == len(hosts) else 1, f"no answer from the nameserver on {', '.join(down)}")
        else:
            taken = time.monotonic() - start
            self.find(0, f"the nameserver answers in {taken * 1000:.0f} ms")
            self.measure("nameserver", f"{taken:.4f}s", critical=f"{self._options.timeout:.9g}")
        if len(down) == len(hosts):
            return {}
        if silent and not services and not found[""]:
            self.find(2, "no publisher is registered")
        return {name: list(each.values()) for name, each in found.items()}

    def _reachable(self, name: str, services: Sequence[_Service], answers: Mapping[str, bool]) -> list[_Service]:
        """Return those publishers of *name* that answer; *answers*: which addresses do."""
        if not services:
            self.find(2, f"{name} is not registered")
            return []
        good = [service for service in services if answers.get(service.address)]
        silent = [service.address for service in services if service not in good]
        if silent:
            where = "" if "://" in name else f" at {', '.join(silent)}"
            self.find(1 if good else 2, f"{name} does not answer{where}")
        else:
            self.find(0, f"{name} answers")
        self.measure(name, str(len(good)), f"{len(services)}:", "1:")
        return good

    def _listen(self, found: Mapping[str, Sequence[_Service]]) -> None:
        """Find out whether something came from each of the services in the last seconds, or comes now."""
        topic, seconds = self._options.topic, self._options.silent
        with ExitStack() as stack:
            listeners = []
            for name, services in found.items():
                try:
                    listeners.append(stack.enter_context(closing(_Listener(name, services, topic, seconds))))
                except ValueError as error:
                    self.find(3, str(error))
            while time.monotonic() < self._deadline and not all(listener.is_done for listener in listeners):
                for listener in listeners:
                    listener.listen(min(0.05, self.left))
            for listener in listeners:
                status, text = listener.finding()
                self.find(status, text)
                age = "U" if listener.age is None else f"{listener.age:.1f}s"
                self.measure(f"{listener.name}_silent", age, critical=f"{seconds:.9g}")
                overdue = listener.overdue  # now: all that is said of it is the same
                if overdue is not None:
                    self.measure(f"{listener.name}_heartbeats_overdue", str(overdue), warn="0")
                if overdue:
                    self.find(1, f"{listener.name}: {overdue} heartbeats are overdue")


@_command(
    "check",
    _names(help="a service that has to answer; or an address, no nameserver is asked"),
    _seconds("--silent", 0.1, None, "something has to come from each within that time"),
    _option("--topic", default="", help="that is: a message whose subject begins so (also a heartbeat)"),
    _flag("--local", help="ask the nameserver of this host, whatever is configured"),
    _seconds("--timeout", 0.1, 10, "of all together"),
    failure=3,
)
def _run_check(options: argparse.Namespace) -> int:
    """Tell monitors and probes whether all is well: exit status 0 if it is, 1 warning, 2 critical, 3 unknown.

    Examples:
      posttroll check --local --timeout 2
      posttroll check receiver gatherer --silent 300
      posttroll check receiver --silent 300 --topic /segment
      posttroll check tcp://localhost:9010
    """
    if options.topic and options.silent is None:
        raise _CommandError("--topic says what has to come within --silent SECONDS, which is not given.")
    logging.getLogger().addHandler(logging.NullHandler())  # what the library has to say, the line says better
    check = _Check(options, time.monotonic() + options.timeout - min(0.2, options.timeout / 4))
    over = threading.Event()

    def run() -> None:
        try:
            check.run()
        except Exception as error:  # whatever it is, monitors want to have it in the line
            check.find(3, str(error) or repr(error))
        over.set()

    threading.Thread(target=run, daemon=True).start()  # a name server that is down could hold it up
    if not over.wait(options.timeout):
        check.find(2, f"no result after {options.timeout:g} s")
    with suppress(BrokenPipeError):  # who does not read it may see the status
        print(check.line(), flush=True)
    return check.status


# -- exporter --

EXPORTER_PORT = 9077  # none of the list of Prometheus' exporters, which have all from 9100 to 9999


def _labelled(labels: Mapping[str, str]) -> str:
    """Return labels as Prometheus reads them."""
    escaped = (each.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"") for each in labels.values())
    text = ",".join(f'{name}="{value}"' for name, value in zip(labels, escaped))
    return f"{{{text}}}" if text else ""


_Samples = Sequence[tuple[Mapping[str, str], Any]]  # labels, and a number (None if there is none)


def _metric(name: str, kind: str, meaning: str, samples: _Samples) -> list[str]:
    """Return the lines about a metric; samples without a number are left out."""
    name = f"posttroll_{name}"
    values = [f"{name}{_labelled(labels)} {value!r}" for labels, value in samples if value is not None]
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *values]


def _age_histogram(bounds: Sequence[float | None], traffic: _Samples) -> list[str]:
    """Return the lines about how old messages were when they came."""
    lines = _metric("message_age_seconds", "histogram", "How old messages were when they came.", [])
    name = "posttroll_message_age_seconds"
    for labels, row in traffic:
        for bound, number in zip(bounds, accumulate(row["ages"])):
            le = "+Inf" if bound is None else repr(bound)
            lines.append(f"{name}_bucket{_labelled({**labels, 'le': le})} {number}")
        lines.append(f"{name}_sum{_labelled(labels)} {row['age_sum']!r}")
        lines.append(f"{name}_count{_labelled(labels)} {row['messages']}")
    return lines


def _exposition(view: Mapping[str, Any]) -> str:
    """Return a view in Prometheus' text format."""
    traffic = [({key: row[key] for key in ("publisher", "address", "subject", "type")}, row) for row in view["traffic"]]

    def of_traffic(key: str) -> _Samples:
        return [(labels, row[key]) for labels, row in traffic]

    up = [({"nameserver": host}, int(is_up)) for host, is_up in view["nameservers"].items()]
    metrics: Sequence[tuple[str, str, str, _Samples]] = (
        ("build_info", "gauge", "The version of posttroll.", [({"version": __version__}, 1)]),
        ("nameserver_up", "gauge", "Whether the nameserver answers.", up),
        ("known_services", "gauge", "Publishers that the nameservers know.", [({}, view["services"])]),
        ("followed_publishers", "gauge", "Publishers listened to.", [({}, len(view["publishers"]))]),
        ("caught_up_messages_total", "counter", "Messages of times without a connection.", [({}, view["caught_up"])]),
        ("missed_messages_total", "counter", "Messages gone in an outage.", [({}, view["missed"])]),
        ("messages_total", "counter", "Messages.", of_traffic("messages")),
        ("message_bytes_total", "counter", "Bytes of messages.", of_traffic("bytes")),
        ("last_message_timestamp_seconds", "gauge", "When the last message came.", of_traffic("last")),
        ("heartbeat_interval_seconds", "gauge", "How often heartbeats are to come.", of_traffic("heartbeat_interval")),
        ("heartbeats_overdue", "gauge", "Heartbeats overdue now.", of_traffic("heartbeats_overdue")),
        ("heartbeats_missed_total", "counter", "Heartbeats that did not come.", of_traffic("heartbeats_missed")),
    )
    lines = chain.from_iterable(_metric(*metric) for metric in metrics)
    return "\n".join([*lines, *_age_histogram(view["age_bounds"], traffic), ""])


class _Page:
    """What is answered to HTTP requests: made anew at most once a second, however many ask for it."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made = -math.inf
        self._content = b""

    def content(self) -> bytes:
        """Return the page."""
        with self._lock:
            if time.monotonic() - self._made >= 1:
                self._content = self._make().encode("utf-8", "backslashreplace")
                self._made = time.monotonic()
            return self._content


def _handler_of(page: _Page) -> Callable[..., object]:
    """Return the class that answers HTTP requests with *page*."""
    import http.server  # takes as long to import as all the rest of a small program

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10
        server_version = f"posttroll/{__version__}"

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, explain="The metrics are at /metrics.")
                return
            content = page.content()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


class _PageServer:
    """Answers HTTP requests with a page.

    Each connection has a thread of its own; what comes too fast waits, and of too many connections the oldest goes.  So
    requests that are many, slow or broken hold up neither others nor what this process has to do besides.
    """

    CONNECTIONS = 32
    PAUSE = 0.01  # seconds until the next one

    def __init__(self, host: str, port: int, page: _Page) -> None:
        self._handler = _handler_of(page)
        self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = int(self._socket.getsockname()[1])
        self._connections: deque[socket.socket] = deque()
        self._loop = Loop()
        self._loop.watch(self._socket.fileno(), self._accept)
        self._thread = threading.Thread(target=self._loop.run, name="posttroll exporter", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # it has gone again, or there are no descriptors left
            connection, address = self._socket.accept()
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()
            if len(self._connections) > self.CONNECTIONS:
                self._connections.popleft().shutdown(socket.SHUT_RDWR)
        time.sleep(self.PAUSE)

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with connection, suppress(OSError):  # whoever asked has gone
            self._handler(connection, address, self)
        with suppress(ValueError):
            self._connections.remove(connection)

    def close(self) -> None:
        """Take no more requests."""
        self._loop.stop()
        self._thread.join()
        self._loop.close()
        self._socket.close()


@_command(
    "exporter",
    _TOPICS,
    _option("--port", type=_number(int, 0, 65535), default=EXPORTER_PORT, help=f"for HTTP ({EXPORTER_PORT}; 0 any)"),
    _option("--bind", metavar="ADDRESS", help="to be asked on (that of this host alone; 0.0.0.0 all)"),
)
def _run_exporter(options: argparse.Namespace) -> int:
    """Give Prometheus the numbers of 'top', at http://localhost:9077/metrics.

    Examples:
      posttroll exporter
      posttroll exporter --bind 0.0.0.0 --nameserver otherhost /segment /heartbeat
    """
    with ExitStack() as stack:
        loop = stack.enter_context(loop_until_signal())
        network = stack.enter_context(closing(_Network(options.topics, _nameservers(options), loop)))
        page = _Page(lambda: _exposition(network.view()))
        address = options.bind or loopback_address()
        try:
            server = stack.enter_context(closing(_PageServer(address, options.port, page)))
        except OSError as error:
            raise _CommandError(f"cannot be asked on {address}, port {options.port}: {error}") from None
        host = f"[{address}]" if ":" in address else address
        _talk(f"Metrics are at http://{host}:{server.port}/metrics", options)
        network.run()
    return 0


# -- map --


@_command(
    "map",
    _TOPICS,
    _seconds("--seconds", 0, 5, "how long to listen to what is sent"),
    _either(_flag("--dot", help="as input for Graphviz"), _flag("--mermaid", help="as input for Mermaid"), _JSON),
)
def _run_map(options: argparse.Namespace) -> int:
    """Draw who publishes what for whom.

    The publishers are those that nameservers know, their subjects what is heard of them meanwhile.  Who listens to a
    publisher of ours, that one tells: the hosts of its subscribers and their topics, of others (not of ours) only the
    topics.  Of publishers that are not of ours it is not known.

    Examples:
      posttroll map
      posttroll map --seconds 60 --dot | dot -Tsvg > map.svg
      posttroll map /segment --mermaid
    """
    hosts = _nameservers(options)
    services = _look_up("", 5, hosts)
    answers = dict(_ask_each(_Service.about, services))  # before we listen to them ourselves
    with loop_until_signal() as loop, closing(_Network(options.topics, hosts, loop)) as network:
        network.run(time.monotonic() + options.seconds)
        traffic = network.view()["traffic"]
    rows = []
    for service in services:
        subjects = sorted({row["subject"] for row in traffic if row["address"] == service.address})
        listeners = _listeners(answers.get(service.address))
        rows.append({"name": service.name, "address": service.address, "subjects": subjects, "listeners": listeners})
    rows.sort(key=lambda row: (row["name"], row["address"]))
    if options.json:
        print(_as_json(rows))
    else:
        language = "dot" if options.dot else "mermaid" if options.mermaid else None
        lines = _as_graph(rows, language) if language else _as_map(rows, _colors(options))
        print("\n".join(lines))
    return 0


def _listeners(about: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """Return who listens to a publisher: hosts, topics, and how many there are of these; None if it does not tell."""
    if about is None:
        return None
    known: Counter[tuple[str, tuple[str, ...]]] = Counter()
    others: Counter[str] = Counter(about["topics"])
    for each in about["known"]:
        known[each["host"], tuple(each["topics"])] += 1
        others -= Counter(each["topics"])
    known.update({("", (topic,)): times for topic, times in others.items()})
    return [{"host": host, "topics": list(topics), "count": times} for (host, topics), times in sorted(known.items())]


def _topics_text(listener: Mapping[str, Any]) -> str:
    times = f" ({listener['count']} times)" if listener["count"] > 1 else ""
    return ", ".join(topic or "everything" for topic in listener["topics"]) + times


def _as_map(rows: Sequence[Mapping[str, Any]], color: bool) -> list[str]:
    """Return the map as lines for people."""
    paint = colored if color else lambda text, _: text
    lines = []
    for row in rows:
        lines.append(f"{paint(printable(row['name']), GREEN)}  {printable(row['address'])}")
        lines += [f"  sends  {printable(subject)}" for subject in row["subjects"] or ["nothing while we listened"]]
        for listener in row["listeners"] or ():
            host = paint(printable(listener["host"] or "somebody"), CYAN)
            lines.append(f"  to     {host}  {printable(_topics_text(listener))}")
        if not row["listeners"]:
            lines.append("  to     nobody" if row["listeners"] is not None else "  to     (it does not tell)")
    return lines


def _dot_text(text: str) -> str:
    return re.sub(r'([\\"])', r"\\\1", text).replace("&", "&amp;").replace("\n", "\\n")


def _mermaid_text(text: str) -> str:
    return re.sub('[#"<>&|`]', lambda match: f"#{ord(match[0])};", text).replace("\n", "<br/>")


# How languages of diagrams have texts, and their lines: the first, a publisher, a listener, what goes where, the last.
_LANGUAGES: dict[str, tuple[Callable[[str], str], str, str, str, str, str]] = {
    "dot": (
        _dot_text,
        "digraph posttroll {\n  rankdir=LR;",
        '  publisher{} [shape=box, label="{}"];',
        '  listener{} [label="{}"];',
        '  publisher{} -> listener{} [label="{}"];',
        "\n}",
    ),
    "mermaid": (
        _mermaid_text,
        "graph LR",
        '  publisher{}["{}"]',
        '  listener{}(["{}"])',
        '  publisher{0} -->|"{2}"| listener{1}',
        "",
    ),
}


def _as_graph(rows: Sequence[Mapping[str, Any]], language: str) -> list[str]:
    """Return the map in a language of diagrams."""
    quoted, first, publisher, node, edge, last = _LANGUAGES[language]
    publishers, edges = [], []
    nodes: dict[str, int] = {}
    for number, row in enumerate(rows):
        text = "\n".join(map(printable, [row["name"], row["address"], *row["subjects"]]))
        publishers.append(publisher.format(number, quoted(text)))
        for listener in row["listeners"] or ():
            end = nodes.setdefault(listener["host"] or "somebody", len(nodes))
            edges.append(edge.format(number, end, quoted(printable(_topics_text(listener)))))
    listeners = [node.format(number, quoted(printable(host))) for host, number in nodes.items()]
    return ["\n".join([first, *publishers, *listeners, *edges]) + last]


# -- config --


@_command("config", _words("keys", metavar="KEY", help="only these keys"), _JSON)
def _run_config(options: argparse.Namespace) -> int:
    """Show the configuration: value, source, default, meaning.

    Examples:
      posttroll config
      posttroll config backend mc_group
      posttroll config --set nameserver_port=5600 --json
    """
    known = [*OPTIONS, *sorted(set(config.to_dict()) - set(OPTIONS))]
    keys = [key.replace("-", "_") for key in options.keys] or known
    if not set(keys) <= set(known):
        raise _CommandError(f"there is no key {', '.join(sorted(set(keys) - set(known)))}.")
    rows = []
    for key in keys:
        value, source = config.lookup(key, check=False)
        option = OPTIONS.get(key, Option(None, "", "not a key of posttroll"))
        about = {"default": option.default, "meaning": option.meaning}
        rows.append({"key": key, "value": value, "source": source, **about})
    if options.json:
        print(json.dumps(rows, default=str))
    else:
        cells = [["" if cell is None else printable(str(cell)) for cell in row.values()] for row in rows]
        print("\n".join(_table(cells, ("KEY", "VALUE", "SOURCE", "DEFAULT", "MEANING"))))
    return 0


# -- doctor --


class _Doctor:
    """Runs checks, and tells of each in a line what it found and, if something is wrong, what to do."""

    PATIENCE = 5.0  # seconds until a message has to come back

    def __init__(self, nameservers: Hosts, multicast: bool, color: bool) -> None:
        self._nameservers = nameservers
        self._multicast = multicast
        self._color = color
        self.failures = 0
        self._answering: list[str] = []  # nameservers

    def say(self, verdict: str, check: str, finding: str, remedy: str = "") -> None:
        """Print the line of a check; *verdict* is ``ok``, ``note`` or ``FAIL``."""
        self.failures += verdict == "FAIL"
        word = verdict.ljust(4)
        if self._color:
            word = colored(word, {"ok": GREEN, "note": YELLOW}.get(verdict, RED))
        print(f"{word}  {printable(f'{check}: {finding}')}{'  -> ' + remedy if verdict != 'ok' else ''}", flush=True)

    def run(self) -> None:
        """Run all the checks."""
        checks = [self.check_configuration, self.check_own_address, self.check_multicast, self.check_keys]
        for check in [*checks, self.check_ports, self.check_nameservers, self.check_round_trip]:
            try:
                check()
            except (ValueError, NotImplementedError, OSError, zmq.ZMQError) as error:
                is_setting = isinstance(error, (ValueError, NotImplementedError))
                remedy = "correct this setting" if is_setting else "see the other lines"
                self.say("FAIL", check.__name__[6:].replace("_", " "), str(error), remedy)

    @property
    def multicast(self) -> bool:
        """Whether publishers here announce themselves by multicast."""
        return self._multicast and hosts_to_register_with(None) is None

    def check_configuration(self) -> None:
        """Say what is configured and where, and what cannot be used."""
        for key in config.to_dict():
            value, source = config.lookup(key, check=False)
            text = f"{key} = {value!r} (from {source})"
            try:
                config.lookup(key)
            except (ConfigurationError, NotImplementedError) as error:
                self.say("FAIL", "configuration", str(error), "correct this setting")
            else:
                if key not in OPTIONS:
                    self.say("note", "configuration", f"{text} is no key of posttroll", "misspelt?")
                elif source != "default":
                    self.say("ok", "configuration", text)
        if not any(config.lookup(key, check=False)[1] != "default" for key in OPTIONS):
            self.say("ok", "configuration", "all defaults")

    def check_own_address(self) -> None:
        """Say which address publishers here announce."""
        announced, address = config.get("announced_address"), get_own_ip()
        if announced:
            self.say("ok", "own address", f"{announced} (announced_address)")
        elif is_loopback(address):
            remedy = "fine on a single host; else bring up the network, or set multicast_interface"
            self.say("note", "own address", f"{address}: other hosts cannot reach publishers here", remedy)
        else:
            self.say("ok", "own address", address)

    def check_multicast(self) -> None:
        """Send to the multicast group, and receive it."""
        verdict = "FAIL" if self.multicast else "note"
        try:
            with closing(MulticastSender(config.get("broadcast_port"))) as sender:
                route = f"to group {sender.group} from {sender.own_address() or get_own_ip()}"
        except OSError as error:
            route = "ip route add 224.0.0.0/4 dev INTERFACE, or set multicast_interface, or use --no-multicast"
            device = "set multicast_interface to the name of a device here, or its address"
            remedies = {errno.ENODEV: device, errno.ENETUNREACH: route, errno.EHOSTUNREACH: route}
            group = "set mc_group to an address from 224.0.0.0 to 239.255.255.255, or ff15::..."
            self.say(verdict, "multicast route", str(error), remedies.get(error.errno or 0, group))
            return
        self.say("ok", "multicast route", route)
        token = os.urandom(8).hex()
        try:
            port = _free_ports(1)[0]
            with closing(MulticastReceiver(port)) as receiver, closing(MulticastSender(port)) as sender:
                receiver.settimeout(1)
                sender(token)
                while receiver()[0] != token:
                    pass
        except OSError as error:
            remedy = "allow UDP multicast in the firewall of this host (ip link set multicast on dev INTERFACE)"
            self.say(verdict, "multicast loop-back", f"nothing came back: {error}", remedy)
        else:
            self.say("ok", "multicast loop-back", "a datagram came back")

    def check_keys(self) -> None:
        """Read the key files."""
        settings = ("server_secret_key_file", "server_public_key_file", "client_secret_key_file")
        if configured_backend() != "secure_zmq" and not any(map(config.get, settings)):
            self.say("ok", "keys", "the backend unsecure_zmq needs none")
            return
        for setting in settings:
            path, kind = config.get(setting), setting.split("_")[1]
            if path is None:
                self.say("note", "keys", f"{setting} is not set", "needed by servers or clients with secure_zmq")
                continue
            try:
                load_key(setting, kind)
                mode = os.stat(os.path.expanduser(path)).st_mode & 0o777
            except ConfigurationError as error:
                self.say("FAIL", "keys", str(error), "posttroll generate-keys makes a pair; see the README")
                continue
            if kind == "secret" and os.name == "posix" and mode & 0o077:
                self.say("FAIL", "keys", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
            else:
                self.say("ok", "keys", f"{setting} = {path} (mode {mode:o})")
        if config.get("clients_public_keys_directory") is not None:
            directory = ClientKeys("clients_public_keys_directory").directory
            count = len([name for name in os.listdir(directory) if name.endswith(".key")])
            finding = f"{count} clients may connect ({directory})"
            self.say("ok" if count else "FAIL", "keys", finding, "copy .key files there")

    def check_ports(self) -> None:
        """Say which of the system's ports are taken, and by whom."""
        for setting in ("nameserver_port", "address_publish_port", "broadcast_port"):
            port = config.get(setting)
            with socket.socket() as probe:
                if os.name == "posix":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", port))
                    text = "free"
                except OSError as error:
                    text = f"taken by {_owner_of_port(port)}" if error.errno == errno.EADDRINUSE else str(error)
            self.say("ok", f"port {port}", f"{text} ({setting})")

    def check_nameservers(self) -> None:
        """Ask the nameservers, look at how they answer, and at their clocks."""
        for host in hosts_to_ask(self._nameservers):
            endpoint = lookup_endpoint(host)
            name = f"nameserver {host}"
            try:
                socket.getaddrinfo(cast("tuple[str, int]", split_tcp_address(endpoint))[0].strip("[]"), None)
            except (OSError, UnicodeError) as error:
                self.say("FAIL", name, f"the name does not resolve: {error}", "correct it, or add it to /etc/hosts")
                continue
            answer = ask_nameserver(endpoint, lookup_request(""), 3)
            if answer is None:
                self.say("FAIL", name, *_why_silent(endpoint))
            else:
                self._check_answer(host, endpoint, answer)

    def _check_answer(self, host: str, endpoint: str, answer: bytes) -> None:
        name = f"nameserver {host}"
        try:
            message = Message.decode(answer)
        except MessageError as error:
            finding = f"what answers at {endpoint} is no message: {error}"
            self.say("FAIL", name, finding, "another program has this port")
            return
        count = len(addresses_in(answer))
        self._answering.append(host)
        self.say("ok", name, f"answers at {endpoint} with {count} publishers")
        lead = sent_at(message) - time.time()
        finding = f"that of {name} differs by {lead:+.1f} s"
        self.say("ok" if abs(lead) <= 2 else "FAIL", "clocks", finding, "synchronise them (NTP)")

    def check_round_trip(self) -> None:
        """Publish a message that announces itself, find it through the nameservers, receive it."""
        hosts = hosts_to_register_with(None)
        if not self._answering or hosts == []:
            finding = "without a nameserver that answers" if hosts != [] else "as publishers are announced nowhere"
            remedy = "fine if all subscribers have addresses; else see nameserver and nameservers in posttroll config"
            self.say("note", "round trip", f"not tried, {finding}", remedy)
            return
        own_keys = ("server_secret_key_file", "clients_public_keys_directory")
        if configured_backend() == "secure_zmq" and not all(map(config.get, own_keys)):
            remedy = f"fine if none is to run here; else set {' and '.join(own_keys)}"
            self.say("note", "round trip", "not tried, a publisher has no keys here", remedy)
            return
        name = f"posttroll-doctor-{os.getpid()}"
        with Publish(name, nameservers=None if self.multicast else hosts or self._answering) as publisher:
            for host in self._answering:
                self._travel(publisher, name, host)

    def _travel(self, publisher: AnyPublisher, name: str, host: str) -> None:
        """Find our publisher through a nameserver, and send until something comes back: others may listen, too."""
        with NSSubscriber(name, "/doctor", True, timeout=4, nameserver=[host]) as subscriber:
            if not subscriber.addresses:
                way = f"multicast to {config.get('mc_group')}" if self.multicast else "registration"
                hint = "then: doctor --no-multicast" if self.multicast else "else leave it out here too"
                finding = f"the nameserver {host} did not hear of a publisher by {way}"
                self.say("FAIL", "round trip", finding, f"is it started with --no-multicast? {hint}")
                return
            deadline = time.monotonic() + self.PATIENCE
            while time.monotonic() < deadline:
                publisher.send(Message("/doctor", "info", name))
                message = next(subscriber.recv(0.1))
                if message is not None and message.data == name:
                    heard = "publisher, nameserver and subscriber hear each other"
                    self.say("ok", "round trip", f"{heard} (by {host})")
                    return
            finding = f"nothing comes from {', '.join(subscriber.addresses)}, as the nameserver {host} has it"
            self.say("FAIL", "round trip", finding, "open the publishers' ports; check that the address is this host's")


def _why_silent(endpoint: str) -> tuple[str, str]:
    """Return why a nameserver does not answer, and what to do about it."""
    mechanism, received = _mechanism_at(endpoint)
    wanted = "CURVE" if configured_backend() == "secure_zmq" else "NULL"
    if not received:
        return f"nobody answers at {endpoint}", "start it (nameserver), or open the port in the firewall"
    if not mechanism:
        return f"what answers at {endpoint} is not ZeroMQ", "another program has this port"
    if mechanism != wanted:
        return f"it speaks {mechanism}, this program {wanted}", "set the same backend for both (POSTTROLL_BACKEND)"
    remedy = "check its authorized_client_addresses, --local-only and keys (its log names refused clients)"
    return f"it lets us connect to {endpoint}, but does not answer", remedy


def _owner_of_port(port: int) -> str:
    """Return which process listens on a TCP port, as far as Linux tells this user."""
    import glob

    inodes = set()
    with suppress(OSError):
        inodes = {f"socket:[{fields[9]}]" for fields in tcp_sockets(port, "0A")}
    for path in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(path) in inodes:
                pid = path.split("/")[2]
                with open(f"/proc/{pid}/cmdline", "rb") as stream:
                    command = stream.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                return f"process {pid} ({printable(command)[:80]})"
    return "another user's process"


@_command("doctor", _flag("--no-multicast", help="the nameserver here runs with --no-multicast"))
def _run_doctor(options: argparse.Namespace) -> int:
    """Find out why programs do not hear each other.

    Examples:
      posttroll doctor
      posttroll doctor --nameserver otherhost
      POSTTROLL_BACKEND=secure_zmq posttroll doctor --no-multicast
    """
    logging.getLogger().addHandler(logging.NullHandler())  # what the library has to say, the checks say better
    doctor = _Doctor(options.nameserver, not options.no_multicast, _colors(options))
    doctor.run()
    if doctor.failures:
        raise _CommandError(f"{doctor.failures} check{'s' * (doctor.failures > 1)} failed.")
    return 0


# -- demo --

_DEMO_SECONDS = 20


def _demo_messages() -> list[Message]:
    start = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
    granule = {"platform": "Metop-C", "start_time": start, "end_time": start.replace(minute=3), "uri": "/data/a.nc"}
    return [
        Message("/demo/text", "info", "Hello from the publisher"),
        Message("/demo/file", "file", granule),
        Message("/demo/list", "collection", [1, "two", {"three": [3.0, None, True]}]),
    ]


@_command("demo", _option("--role", choices=["subscriber"]))
def _run_demo(options: argparse.Namespace) -> int:
    """Run a nameserver, a publisher and a subscriber on this machine.

    Examples:
      posttroll demo
      posttroll demo --nameserver localhost
    """
    hosts = options.nameserver or ["localhost"]  # whatever is configured: without the option, it runs one of its own
    if options.role:
        return _run_demo_subscriber(hosts)
    changes = dict(options.set)
    this_file = os.path.abspath(__file__)
    commands = [[this_file, "demo", "--role=subscriber", *(f"--nameserver={host}" for host in hosts)]]
    if not options.nameserver:
        names = ("nameserver_port", "address_publish_port", "broadcast_port")
        changes.update(zip(names, _free_ports(3)), backend="unsecure_zmq", message_version="v1.2")
        nameserver = os.path.join(os.path.dirname(this_file), "posttroll_ns.py")
        if not os.path.exists(nameserver):
            raise _CommandError("it needs posttroll_ns.py beside this file.")
        commands.append([nameserver, "--no-multicast", "-l", os.devnull])
    where = ", ".join(options.nameserver or [f"port {changes['nameserver_port']} (without multicast)"])
    print(f"Nameserver on {where}, a publisher and a subscriber, three processes.", flush=True)
    environment = {**os.environ, **{f"POSTTROLL_{key.upper()}": str(value) for key, value in changes.items()}}
    import signal
    import subprocess

    processes: list[subprocess.Popen[bytes]] = []
    try:
        ended = threading.Event()
        with call_on_signals(ended.set, getattr(signal, "SIGHUP", signal.SIGTERM)):  # else the others would go on
            for command in commands:
                processes.append(subprocess.Popen([sys.executable, *command], env=environment))
            with config.set(changes), Publish("demo", nameservers=hosts) as publisher:
                while processes[0].poll() is None and not ended.is_set():
                    _feed_demo(publisher)
            if ended.is_set():
                raise KeyboardInterrupt
            if processes[0].wait():
                raise _CommandError(f"The demo failed: the subscriber ended with status {processes[0].returncode}.")
    except (OSError, ValueError, zmq.ZMQError) as error:
        raise _CommandError(f"The demo failed: {error}") from None
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    print(f"All {len(_demo_messages())} messages arrived: posttroll works on this machine.")
    return 0


def _feed_demo(publisher: AnyPublisher) -> None:
    """Send the messages: again and again, as the subscriber is not the only one that listens perhaps."""
    for message in _demo_messages():
        publisher.send(message)
    time.sleep(0.1)


def _run_demo_subscriber(nameservers: Sequence[str]) -> int:
    expected = [message.data for message in _demo_messages()]
    received: list[Any] = []
    deadline = time.monotonic() + _DEMO_SECONDS
    with NSSubscriber("demo", "/demo", True, timeout=_DEMO_SECONDS, nameserver=nameservers) as subscriber:
        while len(received) < len(expected) and time.monotonic() < deadline:
            message = next(subscriber.recv(0.1))
            if message is not None and message.data in expected and message.data not in received:
                print("received", message, flush=True)
                received.append(message.data)
    if len(received) < len(expected):
        _talk(f"subscriber: {len(received)} of {len(expected)} messages arrived unchanged in {_DEMO_SECONDS} seconds")
    return int(len(received) < len(expected))


def _free_ports(count: int) -> list[int]:
    """Return TCP ports that are free just now, none of those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
    return found


# -- help, completion --


def _command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands, that of the nameserver among them if it is there."""
    parsers = _parsers()[1]
    with suppress(ImportError):
        parsers["nameserver"] = _nameserver_module()._parser()
    return parsers


_EXIT_STATUS = """\
0 on success, also when Control-C ends what else would not end; 1 if something failed (stderr tells what, and what to
do), 2 for wrong arguments, 130 if Control-C came before it was done."""


def _add_about(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("about", nargs="?", choices=[*_commands, "nameserver"], metavar="COMMAND", help="which one")


@_command("help", _add_about)
def _run_help(options: argparse.Namespace) -> int:
    """Show all that is known of a command.

    Examples:
      posttroll help
      posttroll help subscribe | less
    """
    if options.about is None:
        _parsers()[0].print_help()
        return 0
    command = _command_parsers()[options.about]
    text, _, examples = (command.epilog or "").partition("examples:\n")
    about = command.description or ""
    sections = {
        "NAME": f"posttroll {options.about} - {about[:1].lower()}{about.partition(chr(10))[0][1:].rstrip('.')}",
        "SYNOPSIS": " ".join(command.format_usage().split()).removeprefix("usage: "),
        "DESCRIPTION": about.partition("\n\n")[2] + text,
        "ARGUMENTS": _manual_entries(command, are_options=False),
        "OPTIONS": _manual_entries(command, are_options=True),
        "EXAMPLES": textwrap.dedent(examples).rstrip(),
        "EXIT STATUS": "" if options.about == "check" else _EXIT_STATUS,
        "CONFIGURATION": "What --set sets, see 'posttroll config'.",
    }
    for heading, content in sections.items():
        if content:
            wrapped = heading in ("NAME", "SYNOPSIS", "EXIT STATUS")
            lines = textwrap.fill(content, 92, break_on_hyphens=False) if wrapped else content
            print(f"{heading}\n{textwrap.indent(lines, '    ')}\n")
    return 0


def _shown_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options of a command and its other arguments, but for those that are hidden."""
    import argparse

    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


def _manual_entries(command: argparse.ArgumentParser, are_options: bool) -> str:
    """Return what the options of a command, or its other arguments, are."""
    entries = []
    for action in _shown_arguments(command):
        if bool(action.option_strings) == are_options:
            value = "" if action.nargs == 0 else _value_name(action)
            names = ", ".join(f"{name} {value}".rstrip() for name in action.option_strings) or value
            meaning = (action.help or "") % {**vars(action), "prog": command.prog}
            if action.choices and action.option_strings:
                meaning += f" ({', '.join(action.choices)})"
            entries.append(f"{names}\n{textwrap.indent(textwrap.fill(meaning, 84), '    ')}")
    return "\n".join(entries)


def _value_name(action: argparse.Action) -> str:
    """Return what an argument is called where its value stands."""
    return cast(str, action.metavar or (action.dest.upper() if action.option_strings else action.dest))


def _values(action: argparse.Action) -> tuple[str, ...] | None:
    """Return what the value of an argument can be, None if that is a file or not known."""
    if action.type is assignment:
        return tuple(f"{key}=" for key in OPTIONS)
    if action.metavar == "KEY" and action.dest == "keys":
        return tuple(OPTIONS)
    return tuple(action.choices) if action.choices else None


def _bash_completion(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return a script that completes commands, options, and values as far as they are known; else files."""
    cases = []
    for name, parser in parsers.items():
        shown = _shown_arguments(parser)
        by_values: dict[str, list[str]] = {}
        for action in shown:
            if action.option_strings and action.nargs != 0:
                by_values.setdefault(" ".join(_values(action) or ()), []).extend(action.option_strings)
        for values, flags in by_values.items():
            pattern = "|".join(f"'{name} {flag}'" for flag in flags)
            cases.append(f"    {pattern}) words='{values}' ;;")
        words = [flag for action in shown for flag in action.option_strings]
        words += [value for action in shown if not action.option_strings for value in _values(action) or ()]
        cases.append(f"    '{name} '*) words='{' '.join(words)}' ;;")
    return f"""# bash completion for posttroll, made by 'posttroll completion bash'
_posttroll() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words
  if [ "$COMP_CWORD" -eq 1 ]; then words='{" ".join([*parsers, "--help", "--version"])}'
  else case "${{COMP_WORDS[1]}} $previous" in
{chr(10).join(cases)}
  esac fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace ;; esac
}}
complete -o default -F _posttroll posttroll
"""


def _zsh_completion(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return a script that completes the same, and tells what options mean."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def escaped(text: str) -> str:
        return re.sub(r"([\[\]:\\])", r"\\\1", text)

    def specification(action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
        meaning = escaped((action.help or "") % {**vars(action), "prog": parser.prog})
        values = _values(action)
        what = f"({' '.join(values)})" if values else "_files"
        value = f":{escaped(_value_name(action))}:{what}"
        if not action.option_strings:
            return [quoted(("*" if action.nargs in ("*", "+") else "") + value)]
        return [quoted(f"*{flag}[{meaning}]{'' if action.nargs == 0 else value}") for flag in action.option_strings]

    cases = []
    for name, parser in parsers.items():
        words = [word for action in _shown_arguments(parser) for word in specification(action, parser)]
        cases.append(f"    {name}) _arguments -S {' '.join(words)} ;;")
    briefs = [f"{name}:{escaped((parser.description or name).splitlines()[0])}" for name, parser in parsers.items()]
    return f"""#compdef posttroll
# zsh completion for posttroll, made by 'posttroll completion zsh'
_posttroll() {{
  local -a commands=({" ".join(map(quoted, briefs))})
  if (( CURRENT == 2 )); then _describe command commands; return; fi
  shift words; (( CURRENT-- ))
  case $words[1] in
{chr(10).join(cases)}
  esac
}}
if [ "$funcstack[1]" = _posttroll ]; then _posttroll "$@"; else compdef _posttroll posttroll; fi
"""


_COMPLETIONS = {"bash": _bash_completion, "zsh": _zsh_completion}


@_command("completion", _option("shell", choices=list(_COMPLETIONS), help="whose script to print"))
def _run_completion(options: argparse.Namespace) -> int:
    """Print a script by which a shell completes commands, options and keys.

    Examples:
      source <(posttroll completion bash)
      posttroll completion bash > /etc/bash_completion.d/posttroll
      posttroll completion zsh > ~/.zfunc/_posttroll
    """
    print(_COMPLETIONS[options.shell](_command_parsers()), end="")
    return 0


# -- commands that are scripts of their own, too --


_command("generate-keys", add_key_arguments)(run_generate_keys_command)
_command("logger", add_logger_arguments)(run_logger_command)


# ======================================================================================================================
# 16. Documented import paths
#
# posttroll.publisher, posttroll.ns and so on, below whatever name this file was imported by.  Python looks into
# sys.modules for a submodule after it has imported the parent, so an entry there is all that it takes.  Most entries
# are this module itself; the others look a name up where it lives, so that patching it reaches the code that runs.
# ======================================================================================================================

_NAMESERVER_NAMES = frozenset(("AddressReceiver", "getaddress", "NameServer", "get_active_address", "setup_logging"))


def __getattr__(name: str) -> Any:
    if name not in _NAMESERVER_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(_nameserver_module(), name)
    except ImportError as error:
        raise AttributeError(f"{name} is in posttroll_ns.py, which cannot be imported: {error}") from error


class _Path(types.ModuleType):
    """An import path whose names live elsewhere: what is read, set and deleted here is read, set and deleted there."""

    _children: Mapping[str, types.ModuleType]
    _aliases: Mapping[str, str]
    _of_nameserver: frozenset[str]

    def __init__(
        self,
        name: str,
        children: Mapping[str, types.ModuleType] | None = None,
        aliases: Mapping[str, str] | None = None,
        of_nameserver: Sequence[str] = (),
    ) -> None:
        super().__init__(name, __doc__)
        own = {"_children": children or {}, "_aliases": aliases or {}, "_of_nameserver": frozenset(of_nameserver)}
        for key, value in {**own, **(children or {})}.items():
            object.__setattr__(self, key, value)

    def _find(self, name: str) -> tuple[Any, str]:
        """Return the module where *name* lives, and its name there."""
        if name in self._of_nameserver:
            try:
                return _nameserver_module(), name
            except ImportError as error:
                raise AttributeError(f"{name} is in posttroll_ns.py, which cannot be imported: {error}") from error
        return sys.modules[__name__], self._aliases.get(name, name)

    def __getattr__(self, name: str) -> Any:
        module, name = self._find(name)
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        module, name = self._find(name)
        setattr(module, name, value)

    def __delattr__(self, name: str) -> None:
        module, name = self._find(name)
        delattr(module, name)

    def __dir__(self) -> list[str]:
        return sorted({*globals(), *self._children, *self._aliases, *self._of_nameserver})

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What can be read here: tools that replace an attribute look here for what to put back."""
        found = {name: getattr(self, name, _UNSET) for name in dir(self)}
        return {name: value for name, value in found.items() if value is not _UNSET}


def _register_import_paths() -> None:
    """Enter the documented import paths into `sys.modules`."""
    this = sys.modules[__name__]
    nameserver = _Path(f"{__name__}.ns", of_nameserver=(*_NAMESERVER_NAMES, "run", "main"))
    zmq_children = {
        "socket": this,
        "publisher": this,
        "subscriber": this,
        "message_broadcaster": this,
        "ns": nameserver,
        "address_receiver": nameserver,
    }
    zmq_path = _Path(f"{__name__}.backends.zmq", zmq_children)
    paths: dict[str, types.ModuleType] = {
        **dict.fromkeys(("message", "publisher", "subscriber", "listener"), this),
        **dict.fromkeys(("message_broadcaster", "bbmcast", "testing"), this),
        **dict.fromkeys(("ns", "address_receiver"), nameserver),
        "logger": _Path(f"{__name__}.logger", aliases={"run": "run_logger"}),
        "backends": _Path(f"{__name__}.backends", {"zmq": zmq_path}),
    }
    globals().update(paths)
    for name, module in paths.items():
        sys.modules[f"{__name__}.{name}"] = module
    sys.modules[f"{__name__}.backends.zmq"] = zmq_path
    for name, module in zmq_children.items():
        sys.modules[f"{__name__}.backends.zmq.{name}"] = module


if __name__ == "__main__":
    # Run as a script, this is not the module that posttroll_ns imports: hand over to that one.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    _package = f"{__package__}." if __package__ else ""
    sys.exit(importlib.import_module(_package + os.path.splitext(os.path.basename(__file__))[0]).main())

_register_import_paths()
