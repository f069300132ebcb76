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
 3. multicast sockets         ``MulticastSender``, ``MulticastReceiver``
 4. ZeroMQ sockets            contexts, options, CURVE, access control
 5. asking the nameserver     ``get_pub_address``
 6. announcing an address     ``AddressServiceBroadcaster``
 7. publishing                ``Publisher``, ``NoisyPublisher``, ``Publish``
 8. subscribing               ``Subscriber``, ``NSSubscriber``, ``Subscribe``
 9. listening                 ``Listener``, ``ListenerContainer``
10. logging over messages     ``PytrollHandler``, ``Logger``
11. testing helpers           ``patched_publisher``, ``patched_subscriber_recv``
12. command line              ``main``
13. documented import paths   ``posttroll.publisher``, ``posttroll.ns``, ...

Copy it into any package; the only dependency is pyzmq.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import base64
import binascii
import errno
import getpass
import importlib
import io
import ipaddress
import json
import logging
import os
import queue
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import types
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, timezone
from datetime import time as time_of_day
from functools import partial
from itertools import chain, count
from typing import Any, Callable, Union, cast

import zmq
from zmq.utils import z85

if sys.platform != "win32":
    import pwd

__version__ = "2.0.0"


# ======================================================================================================================
# 1. Configuration
#
# Four layers, the first that has the key wins: what was set in code, the environment, files, defaults.
# ======================================================================================================================


class ConfigurationError(ValueError):
    """A setting is missing, or its value (or the file that it names) cannot be used."""


class _Option:
    """A row of the table of options: what a key means and what it may hold."""

    def __init__(self, default: Any, kind: str, meaning: str, old_name: str | None = None) -> None:
        self.default = default
        self.kind = kind  # "int", "number", "str", "path", "list", or the choices as "a|b|c"
        self.meaning = meaning
        self.old_name = old_name  # the environment variable of before POSTTROLL_*


OPTIONS: dict[str, _Option] = {
    "backend": _Option("unsecure_zmq", "unsecure_zmq|secure_zmq", "plain ZeroMQ, or CURVE on every connection"),
    "message_version": _Option("v1.2", "v1.2|v1.01|auto", "format of new messages; v1.01 drops time zones"),
    "nameserver_port": _Option(5557, "port", "where the nameserver answers lookups", "NAMESERVER_PORT"),
    "secure_zmq_nameserver_port": _Option(None, "port", "lookups with CURVE (nameserver: 5558 if unset)"),
    "address_publish_port": _Option(16543, "port", "where the nameserver publishes new and lost addresses"),
    "broadcast_port": _Option(21200, "port", "announcements: UDP multicast, or TCP to listed nameservers"),
    "mc_group": _Option("225.0.0.212", "str", "multicast group of the announcements", "PYTROLL_MC_GROUP"),
    "multicast_interface": _Option(None, "str", "address or name of the interface for multicast"),
    "mc_ttl": _Option(31, "int", "how many routers an announcement may pass", "PYTROLL_MC_TTL"),
    "pub_min_port": _Option(49152, "port", "lowest port that a publisher picks"),
    "pub_max_port": _Option(65536, "int", "end of the range that a publisher picks from (not included)"),
    "tcp_keepalive": _Option(None, "int", "ZMQ_TCP_KEEPALIVE: 1 on, 0 off, -1 the system's choice"),
    "tcp_keepalive_cnt": _Option(None, "int", "ZMQ_TCP_KEEPALIVE_CNT: lost probes until the end"),
    "tcp_keepalive_idle": _Option(None, "int", "ZMQ_TCP_KEEPALIVE_IDLE: seconds of silence until a probe"),
    "tcp_keepalive_intvl": _Option(None, "int", "ZMQ_TCP_KEEPALIVE_INTVL: seconds between probes"),
    "zmtp_heartbeat_interval": _Option(10, "number", "seconds of silence until a sign of life is asked for; 0 never"),
    "zmtp_heartbeat_timeout": _Option(30, "number", "seconds without a sign of life until a connection is given up"),
    "send_high_water_mark": _Option(200000, "int", "messages queued for a slow subscriber before they are dropped"),
    "receive_high_water_mark": _Option(
        200000, "int", "the same in a busy subscriber, for each publisher; 0 for no limit"
    ),
    "max_services": _Option(20000, "int", "publishers that the nameserver keeps at most"),
    "client_secret_key_file": _Option(None, "path", "CURVE: this host's secret key when it connects"),
    "server_public_key_file": _Option(None, "path", "CURVE: the public key that servers prove to have"),
    "server_secret_key_file": _Option(None, "path", "CURVE: the secret key of publishers and nameserver"),
    "clients_public_keys_directory": _Option(None, "path", "CURVE: the public keys that may connect"),
    "authorized_client_addresses": _Option(None, "list", "names, addresses, networks that may connect"),
}

_UNSET: Any = object()


def _log(path: str) -> logging.Logger:
    """Return the logger of a documented import path, such as ``publisher`` for ``posttroll.publisher``."""
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
    elif kind in ("int", "port", "number"):
        try:
            number = float(value) if kind == "number" else int(value)
            if number != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a number" if kind == "number" else "a whole number") from None
        if kind == "port" and not 0 < number < 65536:
            raise ValueError("a port from 1 to 65535")
        if kind == "number" and not 0 <= number < 1e6:
            raise ValueError("a number of seconds that is not negative")
        return number
    elif kind == "list":
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

    def __init__(self, name: str = "posttroll", options: Mapping[str, _Option] = OPTIONS) -> None:
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

    def _find(self, key: str, variable: str, text: str | None, option: _Option | None) -> tuple[Any, str]:
        """Return the unchecked value of *key* from the first layer that has it."""
        files = self._files()
        parts = key.split(".")
        value = _nested_get(self._assigned, parts)
        if value is not _UNSET and not isinstance(value, Mapping):
            return value, "code"
        if text is not None:
            return _literal(text), f"${variable}"
        if option is not None and option.old_name is not None:
            old_text = os.environ.get(option.old_name)
            if old_text is not None:
                warnings.warn(f"${option.old_name} is deprecated, use ${variable}.", PendingDeprecationWarning, 4)
                return _literal(old_text), f"${option.old_name}"
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
                node[last] = _literal(text)
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


def _literal(text: str) -> Any:
    """Return the Python literal that *text* is, else *text*."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _wrong_value(name: str, key: str, value: Any, source: str, option: _Option, expected: str) -> Exception:
    """Return the error for a value of the wrong type, saying what to change and where."""
    text = f"{name} configuration: {key} is {value!r} (from {source}), but must be {expected}."
    # An unknown backend is "not implemented", as in other implementations of this system.
    return NotImplementedError(text) if key == "backend" else ConfigurationError(text)


def _read_config_path(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a file, or the files of a directory in alphabetical order; raises ConfigurationError if one is unusable."""
    layers = []
    file = path
    try:
        files = [path] if os.path.exists(path) else []
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            files = [os.path.join(path, name) for name in names if name.endswith((".json", ".toml", ".yaml", ".yml"))]
        for file in files:
            layers.append((file, _normalised(_read_config_file(file))))
    except Exception as error:  # each parser has errors of its own
        raise ConfigurationError(f"The configuration in {file} cannot be used: {error}") from None
    return layers


def _read_config_file(file: str) -> Mapping[str, Any]:
    """Return the mapping that a configuration file holds; raises what its parser raises."""
    with open(file, "rb") as stream:
        text = stream.read().decode()
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
if hasattr(os, "register_at_fork"):  # another thread of the parent may have held it
    os.register_at_fork(after_in_child=lambda: setattr(config, "_lock", threading.RLock()))

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
_TIMEZONE_OF_VERSION = {"v1.01": False, "v1.2": True}  # the versions that we write; those that we read: _is_readable


class MessageError(Exception):
    """What was to be encoded or decoded is not a posttroll message."""


# -- datetimes --

# ISO 8601: date and time of day down to minutes, seconds or fractions, with or without zone, in extended or basic form
# with T or a blank between them; or a date alone in extended form.  The first pattern is what datetime.isoformat()
# writes, which every Python reads alike; in the second, what is separated in the date is separated in the time too.
_ISO_FORMAT = re.compile(r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d{6})?(?:[+-]\d\d:\d\d)?", re.ASCII)
_DATETIME = re.compile(
    r"(\d{4})(?P<dash>-)?(\d\d)(?(dash)-)(\d\d)"
    r"(?:[T ]([01]\d|2[0-3])(?(dash):)(\d\d)(?:(?(dash):)(\d\d)(?:[.,](\d+))?)?"
    r"(?:(Z)|([+-]\d\d)(?::?(\d\d)(?::?(\d\d(?:\.\d{6})?))?)?)?)?",
    re.ASCII,
)
_JSON_DATE = re.compile(r'"\d\d\d\d-?\d\d-?\d\d["T ]', re.ASCII)  # what may be one, quickly found


def _parse_datetime(text: str) -> datetime | None:
    """Return the datetime that *text* is in ISO 8601, None if it is none."""
    if _ISO_FORMAT.fullmatch(text) is None:
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
        return datetime.fromisoformat(text)
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
                        moment = _parse_datetime(value)
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
        return _TIMEZONE_OF_VERSION[version]
    except (KeyError, TypeError):
        raise MessageError(
            f"Invalid message version: {version!r}. Use one of {', '.join(_TIMEZONE_OF_VERSION)}."
        ) from None


def _is_readable(version: str) -> bool:
    """Whether a message of *version* can be decoded: any up to the newest that we write."""
    if version in _TIMEZONE_OF_VERSION:
        return True
    match = re.fullmatch(r"v(\d{1,9}\.\d{1,9})", version, re.ASCII)
    return match is not None and float(match[1]) <= 1.2


# -- data --

# No check for cycles: a structure that holds itself ends as a RecursionError, like one that is too deep.
_to_json = {
    True: json.JSONEncoder(check_circular=False, default=_isoformat).encode,
    False: json.JSONEncoder(check_circular=False, default=_isoformat_without_timezone).encode,
}
_from_json = json.JSONDecoder().decode


class _DatetimeFoundError(Exception):
    """There is a datetime, or a time of day with a time zone, in data that are encoded without one."""


def _refuse_datetime(obj: Any) -> str:
    if isinstance(obj, datetime) or (isinstance(obj, time_of_day) and obj.tzinfo):
        raise _DatetimeFoundError
    return _isoformat(obj)


_to_json_without_datetime = json.JSONEncoder(check_circular=False, default=_refuse_datetime).encode


def _dumps(data: Any, version: str) -> tuple[str, str]:
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
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def _encode_binary(data: str | bytes | bytearray | memoryview) -> tuple[str, str]:
    """Return the text that stands for binary *data*: a data URL's beginning (or nothing), and the rest."""
    if not isinstance(data, str):
        return _BYTES_URL, binascii.b2a_base64(data, newline=False).decode("ascii")
    if data and _travels_as_it_is(data) and not data.startswith((_BYTES_URL, _TEXT_URL)):
        return "", data
    return _TEXT_URL, binascii.b2a_base64(data.encode("utf-8", "surrogatepass"), newline=False).decode("ascii")


def _decode_binary(text: str) -> str | bytes:
    """Return the data that `_encode_binary` made the URL *text* of; another sender's is returned as it is."""
    if not text.startswith((_BYTES_URL, _TEXT_URL)):
        return text
    try:
        content = base64.b64decode(text[text.index(",") + 1 :], validate=True)
        return content if text.startswith(_BYTES_URL) else content.decode("utf-8", "surrogatepass")
    except ValueError:
        return text


def _encode_data(data: Any, binary: bool, version: str) -> tuple[str, str, str]:
    """Return what follows the header of a message, in two pieces, and the version, chosen if it was ``auto``.

    Raises:
        MessageError: The data cannot be encoded, or the version is not known.
    """
    if type(data) is not str and isinstance(data, str):
        data = str.__str__(data)  # a text may be an enum, whose name is what it would be formatted as
    if isinstance(data, str) and not binary:
        if not data:
            return "", "", _lowest(version)
        if _travels_as_it_is(data):
            return " text/ascii ", data, _lowest(version)
    elif isinstance(data, (bytes, bytearray, memoryview, str)):
        url, text = _encode_binary(data)
        return " binary/octet-stream " + url, text, _lowest(version)
    text, version = _dumps(data, version)
    return " application/json ", text, version


def _lowest(version: str) -> str:
    """Return the version of a message whose data are the same in all versions."""
    return "v1.01" if version == "auto" else version


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
        _dumps(obj, version)
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


def _get_sender() -> str:
    """Return ``user@host``, found out once: the account of the process, whatever the environment says it is."""
    global _sender
    if _sender is None:
        if sys.platform == "win32":
            user = getpass.getuser()
        else:
            try:
                user = pwd.getpwuid(os.getuid()).pw_name
            except KeyError:  # a container whose user id has no name
                user = str(os.getuid())
        _sender = "_".join(f"{user}@{socket.gethostname() or 'localhost'}".split())
    return _sender


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
            not given, the configuration's ``message_version`` decides, when the message is encoded.

    Attributes:
        subject, type, sender, data, binary, version: As above; they may be assigned.
        time: A datetime: when the message was made, in UTC.  Decoded from v1.01 it has no time zone.

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
    _raw: str | None

    def __init__(
        self,
        subject: str = "",
        atype: str = "",
        data: Any = "",
        binary: bool = False,
        rawstr: str | bytes | None = None,
        version: str = _DEFAULT_VERSION,
    ) -> None:
        if rawstr is not None:
            _decode_into(self, rawstr)
            return
        self.subject = subject
        self.type = atype
        self.sender = _sender or _get_sender()
        self.time = datetime.now(timezone.utc)
        self.data = data
        self.binary = binary
        self.version = version
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
        elif version not in _TIMEZONE_OF_VERSION and version != "auto" and _is_readable(version):
            version = "v1.01"  # decoded from something older
        prefix, text, version = _encode_data(self.data, self.binary, version)
        subject, atype, sender, moment = self.subject, self.type, self.sender, self.time
        are_texts = type(subject) is type(atype) is type(sender) is str
        if not (are_texts and subject in _checked_fields and atype in _checked_fields and sender in _checked_fields):
            _check_header(subject, atype, sender)
            subject, atype, sender = map(str.__str__, (subject, atype, sender))
        if not _keeps_timezone(version):
            moment = moment.replace(tzinfo=None)
        return f"{_MAGICK}{subject} {atype} {sender} {moment.isoformat()} {version}{prefix}{text}"

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
        return self.encode()

    def __setstate__(self, state: str) -> None:
        _decode_into(self, state)


def _decode_into(message: Message, raw: str | bytes) -> None:
    """Fill *message* with what *raw* says; raises MessageError if it is no message."""
    if type(raw) is not str:
        raw = _as_text(raw)
    fields = raw.split(None, 6)
    count = len(fields)
    if count < 5 or not raw.startswith(_MAGICK):
        raise MessageError(f"This is not a '{_MAGICK}' message: {raw[:80]!r}")
    if count < 7:
        fields = [*fields, "", ""][:7]
    magick_subject, message.type, message.sender, stamp, version, mime, text = fields
    if version not in _TIMEZONE_OF_VERSION and not _is_readable(version):
        raise MessageError(f"Invalid message version: {version[:80]!r}. This program reads versions up to v1.2.")
    message.subject = magick_subject[9:]
    if not message.subject:
        raise MessageError(f"Invalid subject: '' in {raw[:80]!r}")
    try:
        message.time = datetime.fromisoformat(stamp)
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
    moment = _parse_datetime(text)
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
    try:
        data = _from_json(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"Invalid JSON data: {str(error)[:200]}") from None
    if _JSON_DATE.search(text) is None:
        if text.count("[") + text.count("{") > _MAX_NESTING:
            _check_nesting(data)
        return data
    return (_parse_datetime(data) or data) if type(data) is str else datetime_decoder(data)


def _as_text(raw: Any) -> str:
    """Return the text of a raw message; raises MessageError if it is neither text nor bytes."""
    if isinstance(raw, str):
        return str(raw)
    if not isinstance(raw, (bytes, bytearray, memoryview)):
        raise MessageError(f"A raw message is str or bytes, not {type(raw).__name__}")
    content = bytes(raw)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("iso-8859-1")


# Pickles name the class by its documented path, so that both implementations load each other's.
for _class in (Message, MessageError):
    _class.__module__ = f"{__name__}.message"
del _class


# ======================================================================================================================
# 3. Multicast sockets
#
# UDP to a multicast group (RFC 1112), or to everybody on the local network with the group 0.0.0.0.
# ======================================================================================================================

SocketTimeout = socket.timeout  # TimeoutError itself from Python 3.10 on

_DATAGRAM_SIZE = 65535
_IP_MULTICAST_ALL = 49  # of Linux, see ip(7)
_BROADCAST_GROUPS = ("0.0.0.0", "255.255.255.255", "<broadcast>")


def _multicast_group(mcgroup: str | None) -> str:
    """Return the address of the group; raises OSError if it is no IPv4 multicast address."""
    group = config.get("mc_group") if mcgroup is None else mcgroup
    if group in _BROADCAST_GROUPS:
        return "<broadcast>"
    try:
        packed = socket.inet_aton(socket.gethostbyname(group))
    except OSError as error:
        raise OSError(
            error.errno, f"Invalid multicast address {group!r} (mc_group): {error.strerror or error}"
        ) from None
    if packed[0] >> 4 != 0xE:
        raise OSError(
            errno.EINVAL,
            f"Invalid multicast address {group!r} (mc_group): Invalid argument, not in 224.0.0.0 to 239.255.255.255",
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


def mcast_sender(mcgroup: str | None = None) -> tuple[socket.socket, str]:
    """Open a UDP socket to send to a multicast group.

    Args:
        mcgroup: The group; by default the configured `mc_group`.  ``0.0.0.0`` stands for broadcast.

    Returns:
        The socket and the address to send to.

    Raises:
        OSError: The group is no multicast address, or the socket cannot be set up.
    """
    group = _multicast_group(mcgroup)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if group == "<broadcast>":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        else:
            ttl = min(max(config.get("mc_ttl"), 0), 255)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            interface = _multicast_interface()
            if interface != b"\0\0\0\0":
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
    except BaseException:
        sock.close()
        raise
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
    group = _multicast_group(mcgroup)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform not in ("linux", "win32") and hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # BSD and macOS share ports by this one
        sock.bind(("", port))
        if group != "<broadcast>":
            if sys.platform == "linux":  # else it also gets what comes for the groups of other programs
                sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
            membership = socket.inet_aton(group) + _multicast_interface()
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except BaseException:
        sock.close()
        raise
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
        data, sender = self.socket.recvfrom(max(self.BUFSIZE, _DATAGRAM_SIZE))
        return data.decode("utf-8", "replace"), sender

    def fileno(self) -> int:
        """Return the file descriptor, for pollers."""
        return self.socket.fileno()

    def settimeout(self, tout: float | None = None) -> None:
        """Let calls raise `SocketTimeout` after *tout* seconds, or wait for ever (None)."""
        self.socket.settimeout(tout)

    def close(self) -> None:
        """Close the receiver."""
        with suppress(OSError):
            membership = socket.inet_aton(self.group) + _multicast_interface()
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, membership)
        self.socket.close()


def get_own_ip() -> str:
    """Return the IPv4 address of this host that other hosts see, ``127.0.0.1`` without a network."""
    for target in (config.get("mc_group"), "192.0.2.1"):  # no packet is sent; the kernel picks the route
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            interface = _multicast_interface() if target != "192.0.2.1" else b"\0\0\0\0"
            if interface != b"\0\0\0\0":
                return socket.inet_ntoa(interface)
            probe.connect((target, 9))
            address = str(probe.getsockname()[0])
            if address != "0.0.0.0":
                return address
    return next((address for address in get_local_ips() if not address.startswith("127.")), "127.0.0.1")


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


# ======================================================================================================================
# 4. ZeroMQ sockets
#
# One context for each process.  Server sockets bind, client sockets connect; with secure_zmq all of them use CURVE.
# Access control (ZAP, https://rfc.zeromq.org/spec/27) runs in one thread, only while a server socket needs it.
# ======================================================================================================================

_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)

# Milliseconds.  A signal that arrives just before a poll begins does not end it, and on Windows none does: without an
# end of its own, the handler (Ctrl-C, SIGTERM) would be called when the next message comes, perhaps never.
_LONGEST_POLL = 900

# -- contexts --

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}
_contexts_lock = threading.Lock()


def get_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the ZeroMQ context of this process; a forked child gets one of its own."""
    pid = os.getpid()
    with _contexts_lock:
        context = _contexts.get(pid)
        if context is None or context.closed:
            context = _contexts[pid] = zmq.Context()
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
        _authenticators.pop(os.getpid(), _no_authenticator).shut_down()
        for sock in list(context._sockets):
            if not sock.closed:
                sock.monitor(None, 0)
        _lingering_monitors.clear()
        context.destroy(linger)


def _renew_locks_in_child() -> None:
    """Replace what another thread of the parent may have held at the time of a fork."""
    global _contexts_lock, _authenticators_lock
    _contexts_lock = threading.Lock()
    _authenticators_lock = threading.RLock()
    _Resolution._free_threads = threading.Semaphore(8)
    _lingering_monitors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks_in_child)

# -- small tools for threads that wait on sockets --


class _Waker:
    """Ends a poll from another thread or a signal handler: a descriptor to poll, and `wake`."""

    def __init__(self) -> None:
        self._read_end: io.RawIOBase
        self._write_end: io.RawIOBase
        if os.name == "posix":
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            os.set_blocking(write_end, False)
            self._read_end, self._write_end = open(read_end, "rb", 0), open(write_end, "wb", 0)  # noqa: SIM115
        else:  # only sockets can be polled
            ends = socket.socketpair()
            for end in ends:
                end.setblocking(False)
            self._read_end, self._write_end = ends[0].makefile("rb", 0), ends[1].makefile("wb", 0)

    def fileno(self) -> int:
        return self._read_end.fileno()

    def write_fileno(self) -> int:
        return self._write_end.fileno()

    def wake(self) -> None:
        with suppress(OSError, ValueError):  # closed: nobody waits
            self._write_end.write(b"!")  # does nothing when the pipe is full: a wake-up is on its way

    def clear(self) -> None:
        with suppress(OSError, ValueError):
            while self._read_end.read(1024):
                pass

    def close(self) -> None:
        self._read_end.close()
        self._write_end.close()


class _LimitedLogger:
    """Logs the first few messages of a kind in each minute, and then how many more there were."""

    BURST = 5
    PERIOD = 60.0
    KINDS = 100

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kinds: dict[str, tuple[float, int]] = {}

    def log(self, level: int, kind: str, text: str, *args: Any) -> None:
        """Log *text* with *args*, unless there has been enough of this *kind*."""
        now = time.monotonic()
        with self._lock:
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
            _log(self._path).log(level, text, *args)

    def warning(self, kind: str, text: str, *args: Any) -> None:
        self.log(logging.WARNING, kind, text, *args)


# -- addresses --

_TCP_ADDRESS = re.compile(r"tcp://(\*|\[[0-9A-Za-z:.%_-]{1,253}\]|[0-9A-Za-z_.-]{1,253}):(\d{1,5})", re.ASCII)
_LOCAL_ADDRESS = re.compile(r"(?:ipc|inproc)://[^\s\x00-\x1f]{1,200}")


def _is_number(host: str) -> bool:
    """Whether *host* is an IPv4 address, or an IPv6 address in brackets, and no name that would have to be resolved."""
    try:
        return bool(ipaddress.IPv6Address(host[1:-1]) if host.startswith("[") else ipaddress.IPv4Address(host))
    except ValueError:
        return False


def _split_tcp(address: str) -> tuple[str, int] | None:
    """Return host and port of a ``tcp://`` address, None if it is something else."""
    match = _TCP_ADDRESS.fullmatch(address)
    if match is None or (match[1].startswith("[") and not _is_number(match[1])):
        return None
    return match[1], int(match[2])


def _is_remote(address: Any) -> bool:
    """Whether *address* may come from others: only TCP, as inproc and ipc lead into this process and this host."""
    tcp = _split_tcp(address) if isinstance(address, str) else None
    return tcp is not None and tcp[0] != "*" and 0 < tcp[1] < 65536


def _check_connectable(address: Any) -> str:
    """Return *address*; raises ValueError if no client socket could connect to it."""
    if not (_is_remote(address) or (isinstance(address, str) and _LOCAL_ADDRESS.fullmatch(address))):
        raise ValueError(f"Cannot connect to {address!r}: an address looks like 'tcp://hostname:9000'.")
    return cast(str, address)


class _Resolution:
    """Finds out in the background whether the host of an address has a name that resolves.

    ZeroMQ resolves names in the thread that serves all its sockets, where one dead name server would hold up everybody.
    So it is handed numbers only.

    Attributes:
        endpoint: What to connect to, the address with a number for the host; None as long as it is not known.
    """

    RETRY = 5.0
    _free_threads = threading.Semaphore(8)  # anybody can announce any number of names

    def __init__(self, address: str, on_success: Callable[[], None] = lambda: None) -> None:
        tcp = _split_tcp(address)
        self._host, self._port = tcp or ("", 0)
        self._on_success = on_success
        self._is_asking = False
        self._asked = -self.RETRY
        self.endpoint: str | None = None
        if self._host == "localhost":
            self.endpoint = f"tcp://127.0.0.1:{self._port}"
        elif tcp is None or _is_number(self._host):
            self.endpoint = address

    def check(self) -> str | None:
        """Return the endpoint; as long as it is not known, ask (again) in the background."""
        is_due = self.endpoint is None and not self._is_asking and time.monotonic() - self._asked > self.RETRY
        if is_due and self._free_threads.acquire(blocking=False):
            self._is_asking = True
            self._asked = time.monotonic()
            threading.Thread(target=self._resolve, name=f"resolve {self._host}", daemon=True).start()
        return self.endpoint

    def _resolve(self) -> None:
        try:
            found = socket.getaddrinfo(self._host, None, socket.AF_INET)
        except (OSError, UnicodeError) as error:
            _resolution_log.warning("name", "Host name %s does not resolve (%s), trying again", self._host, error)
        else:
            self.endpoint = f"tcp://{found[0][4][0]}:{self._port}"
            self._on_success()
        finally:
            self._is_asking = False
            self._free_threads.release()


_resolution_log = _LimitedLogger("backends.zmq")

# -- keys --


def generate_keys(args: Sequence[str] | None = None) -> None:
    """Run ``posttroll-generate-keys``: write a pair of CURVE keys, ``NAME.key`` and ``NAME.key_secret``.

    Args:
        args: The command-line arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="posttroll-generate-keys",
        description="Create a public/secret key pair for the secure zmq backend. This will create two files (in the "
        "current directory if not otherwise specified) with the suffixes '.key' and '.key_secret'. The name of the "
        "files will be the one provided.",
    )
    _add_key_arguments(parser)
    _run_generate_keys(parser.parse_args(args))


def _add_key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="Name of the file.")
    parser.add_argument("-d", "--directory", default=".", help="Directory to place the keys in.")
    parser.add_argument("--force", action="store_true", help="Overwrite existing keys.")


def _run_generate_keys(options: argparse.Namespace) -> int:
    try:
        paths = write_key_pair(options.name, options.directory, options.force)
    except OSError as error:
        raise SystemExit(f"posttroll-generate-keys: {error}") from None
    print("\n".join(paths))
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


_KEY_LINE = re.compile(rb'^[ \t]*(public|secret)-key[ \t]*=[ \t]*"([^"\s]{40})"[ \t\r]*$', re.MULTILINE)


def _read_keys(path: str) -> dict[str, bytes]:
    """Return the keys ``public`` and ``secret`` of a certificate; raises ValueError or OSError."""
    with open(path, "rb") as stream:
        text = stream.read(65536)
    keys = {kind.decode(): key for kind, key in _KEY_LINE.findall(text)}
    for key in keys.values():
        try:
            if len(z85.decode(key)) != 32:
                raise ValueError
        except (KeyError, ValueError, struct.error):
            raise ValueError("a key in it is no Z85 text of 40 characters") from None
    return keys


def _backend(name: str | None = None) -> str:
    """Return the backend to use; raises NotImplementedError if there is none of this name."""
    backend = config.get("backend") if name is None else name
    if backend not in ("unsecure_zmq", "secure_zmq"):
        raise NotImplementedError(f"Unknown backend {backend!r}: use 'unsecure_zmq' or 'secure_zmq'.")
    return cast(str, backend)


def _load_key(setting: str, kind: str) -> bytes:
    """Return the key in the file of a setting; raises ConfigurationError naming setting and file."""
    path = config.get(setting)
    if path is None:
        raise ConfigurationError(f"Missing config parameter '{setting}', which the backend secure_zmq needs.")
    path = os.path.expanduser(path)
    try:
        key = _read_keys(path)[kind]
    except KeyError:
        raise ConfigurationError(f"{setting}: there is no {kind} key in {path}.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{setting}: cannot read a key from {path}: {error}") from None
    if kind == "secret" and os.name == "posix":
        mode = os.stat(path).st_mode & 0o777
        if mode & 0o077:
            _key_log.warning(
                path, "%s: %s is readable by others (mode %o); run: chmod 600 %s", setting, path, mode, path
            )
    return key


def _load_client_keys(backend: str | None = None) -> dict[str, bytes]:
    """Return the socket options for the keys of a client, none for a plain one; raises ConfigurationError."""
    if _backend(backend) != "secure_zmq":
        return {}
    secret = _load_key("client_secret_key_file", "secret")
    server = _load_key("server_public_key_file", "public")
    return {"curve_secretkey": secret, "curve_publickey": zmq.curve_public(secret), "curve_serverkey": server}


_key_log = _LimitedLogger("backends.zmq.socket")


class _ClientKeys:
    """The public keys in a directory, which is read again when it changes."""

    def __init__(self, setting: str) -> None:
        path = config.get(setting)
        if path is None:
            raise ConfigurationError(f"Missing config parameter '{setting}', which the backend secure_zmq needs.")
        self.directory = os.path.expanduser(path)
        if not os.path.isdir(self.directory):
            raise ConfigurationError(f"{setting}: {self.directory} is not a directory.")
        self._keys: dict[str, tuple[Any, bytes]] = {}  # by path, each with what changes when the file does

    def __contains__(self, key: bytes) -> bool:
        known, self._keys = self._keys, {}
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".key"):
                        self._keys[entry.path] = self._read(entry, *known.get(entry.path, (None, b"")))
        except OSError as error:
            _key_log.warning("directory", "No client is let in: %s", error)
            return False
        return any(key == other for _, other in self._keys.values())

    @staticmethod
    def _read(entry: os.DirEntry[str], known_state: Any, known_key: bytes) -> tuple[Any, bytes]:
        """Return state and public key of a file, as known if it has not changed; no key if it is not to be used."""
        state = None
        try:
            state = (entry.stat().st_mtime_ns, entry.stat().st_ino)
            if state == known_state:
                return state, known_key
            return state, _read_keys(entry.path)["public"] if entry.is_file() else b""
        except (OSError, ValueError, KeyError) as error:
            _key_log.warning(
                entry.path, "The client key %s is not used: %s", entry.path, error or "no public key in it"
            )
            # No file descriptors left, or no permission yet: it is read again.
            return None if isinstance(error, OSError) else state, b""


# -- who may connect --


_IPC_PEER = re.compile(r"[^:]*:\d+:\d+:\d+", re.ASCII)  # "localhost" (or nothing), user, group, process


def _is_own_address(address: str) -> bool:
    """Whether *address* is one of this host; a name never is, as nobody here can wait until it is resolved."""
    address = address.removeprefix("::ffff:")
    if not address or _IPC_PEER.fullmatch(address):
        return True
    try:
        if ipaddress.ip_address(address).is_loopback:
            return True
    except ValueError:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # no packet is sent; a host talks to itself from the address that it talks to
            return str(probe.getsockname()[0]).partition("%")[0] == address.partition("%")[0]
    except OSError:
        return False


class _AddressList:
    """Addresses, networks and host names; the names are resolved again from time to time, in the background."""

    REFRESH = 30.0

    def __init__(self, entries: Sequence[str]) -> None:
        self._networks = []
        self._names = []
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.append(entry)
        self._resolved: frozenset[str] = frozenset()
        self._thread: threading.Thread | None = None
        self._resolve()

    def __contains__(self, address: str) -> bool:
        if self._names and time.monotonic() - self._resolved_at > self.REFRESH:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._resolve, name="resolve clients", daemon=True)
                self._thread.start()
        try:
            number = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        number = getattr(number, "ipv4_mapped", None) or number
        return str(number) in self._resolved or any(number in network for network in self._networks)

    def _resolve(self) -> None:
        found: set[str] = set()
        for name in self._names:
            try:
                found.update(str(info[4][0]) for info in socket.getaddrinfo(name, None))
            except (OSError, UnicodeError) as error:
                text = "authorized_client_addresses: %r does not resolve (%s), nobody is let in for it"
                _key_log.warning(name, text, name, error)
        self._resolved = frozenset(found)
        self._resolved_at = time.monotonic()


class _AccessRules:
    """Who may connect to a server socket: from which addresses, and with CURVE with which keys."""

    def __init__(self, local_only: bool = False, keys: _ClientKeys | None = None) -> None:
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
        return not _is_own_address(address)

    def refusal(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> str:
        """Return why a client is not let in, empty if it is."""
        if self.refuses_address(address):
            return "this address is not authorized"
        if self._keys is None:
            return ""
        if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return "it does not use CURVE"
        key = z85.encode(credentials[0])
        return "" if key in self._keys else f"its public key {key.decode()} is not in {self._keys.directory}"


_monitor_numbers = count()


def _open_monitor(sock: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """Return a new socket that receives the *events* of *sock*, and EVENT_MONITOR_STOPPED at the end.

    Unlike `zmq.Socket.get_monitor_socket`, it ends another monitor of *sock* (with EVENT_MONITOR_STOPPED), and it may
    be handed to another thread: closing *sock* does not close it.
    """
    endpoint = f"inproc://posttroll-monitor-{next(_monitor_numbers)}"
    sock.monitor(endpoint, events | zmq.EVENT_MONITOR_STOPPED)
    monitor: zmq.Socket[bytes] = sock.context.socket(zmq.PAIR)
    monitor.linger = 0
    monitor.rcvhwm = 100000  # when it is full, ZeroMQ's own thread waits
    monitor.connect(endpoint)
    return monitor


_lingering_monitors: list[zmq.Socket[bytes]] = []
_lingering_lock = threading.Lock()


def _close_monitor(monitor: zmq.Socket[bytes], timeout: float = 0) -> None:
    """Close a monitor, but not before its socket is gone: ZeroMQ's own thread would wait for ever to tell it so.

    Waits up to *timeout* seconds for that; if the socket lives on, the monitor is closed by a later call.
    """
    if _is_over(monitor, timeout):
        monitor.close(0)
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


class Authenticator:
    """The access rules of one server socket; `stop` it after the socket has been closed."""

    def __init__(self, service: _AuthenticatorThread, domain: bytes) -> None:
        self._service = service
        self.domain = domain

    def watch(self, sock: zmq.Socket[bytes]) -> None:
        """Log the handshakes that fail on *sock*, until it is closed."""
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._service.watch(_open_monitor(sock, events | zmq.EVENT_DISCONNECTED))

    def stop(self) -> None:
        """Drop the rules; the thread ends with the last ones."""
        self._service.release(self.domain)


class _AuthenticatorThread:
    """Answers the questions of ZeroMQ (ZAP 1.0) whether a client may connect, for all server sockets of a context."""

    ENDPOINT = "inproc://zeromq.zap.01"
    DOMAIN = b"posttroll-"

    def __init__(self) -> None:
        self._rules: dict[bytes, _AccessRules] = {}
        self._monitors: dict[zmq.Socket[bytes], dict[int, str]] = {}  # the addresses of the peers, by descriptor
        self._new_monitors: deque[zmq.Socket[bytes]] = deque()
        self._count = 0
        self._waker = _Waker()
        self._log = _LimitedLogger("backends.zmq.socket")
        self._context = get_context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        try:
            self._socket.linger = 0
            self._socket.bind(self.ENDPOINT)
        except BaseException:
            self._socket.close()
            self._waker.close()
            raise
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name="posttroll access control", daemon=True)
        self._thread.start()

    def add(self, rules: _AccessRules) -> Authenticator:
        """Start to apply *rules* to the sockets of a new domain."""
        self._count += 1
        domain = self.DOMAIN + b"%d" % self._count
        self._rules[domain] = rules
        return Authenticator(self, domain)

    def release(self, domain: bytes) -> None:
        """Stop to apply the rules of *domain*, and end with the last one."""
        with _authenticators_lock:
            if self._rules.pop(domain, None) is None:
                return
            if not self._rules:
                if _authenticators.get(os.getpid()) is self:
                    del _authenticators[os.getpid()]
                self.shut_down()

    def shut_down(self) -> None:
        """End the thread, and wait for it."""
        self._is_running = False
        self._waker.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(5)

    @property
    def is_alive(self) -> bool:
        """Whether it answers, in the context in use."""
        return self._context is get_context() and self._thread.is_alive()

    def watch(self, monitor: zmq.Socket[bytes]) -> None:
        """Follow what happens to the connections of a socket; its *monitor* now belongs to the thread."""
        self._new_monitors.append(monitor)
        self._waker.wake()

    def _run(self) -> None:
        try:
            while self._is_running:
                poller = zmq.Poller()
                for item in (self._waker, self._socket, *self._monitors):
                    poller.register(item, _POLLIN)
                for ready, _ in poller.poll():
                    if ready is self._socket:
                        self._answer(self._socket.recv_multipart())
                    elif ready in self._monitors:
                        self._follow(cast("zmq.Socket[bytes]", ready))
                self._waker.clear()
                self._take_new_monitors()
        except zmq.ZMQError as error:
            if self._is_running and error.errno not in (zmq.ETERM, zmq.ENOTSOCK):
                raise
        finally:
            self._take_new_monitors()
            for monitor in self._monitors:
                _close_monitor(monitor)
            with suppress(zmq.ZMQError):
                self._socket.unbind(self.ENDPOINT)  # at once: closing alone frees the name some time later
            self._socket.close(0)
            self._waker.close()

    def _take_new_monitors(self) -> None:
        while self._new_monitors:
            self._monitors[self._new_monitors.popleft()] = {}

    def _answer(self, request: list[bytes]) -> None:
        """Answer a question: version, request id, domain, address, routing id, mechanism, credentials."""
        if len(request) < 6 or request[0] != b"1.0":
            self._socket.send_multipart([b"1.0", b"", b"500", b"Not ZAP 1.0", b"", b""])
            return
        _, request_id, domain, address_bytes, _, mechanism, *credentials = request
        address = address_bytes.decode("utf-8", "replace")
        reason = self._refusal(domain, address, mechanism, credentials)
        if reason:
            self._log.warning("refused " + address, "Refused a client at %s: %s", address, reason)
            # 300: it is told nothing, and tries again later.  After a 400 it would never come back by itself.
            self._socket.send_multipart([b"1.0", request_id, b"300", b"Refused", b"", b""])
        else:
            self._socket.send_multipart([b"1.0", request_id, b"200", b"OK", b"", b""])

    def _refusal(self, domain: bytes, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> str:
        """Return why a client is not let in, empty if it is."""
        rules = self._rules.get(domain)
        if rules is not None:
            return rules.refusal(address, mechanism, credentials)
        if domain.startswith(self.DOMAIN):
            return "its server has stopped"
        # A socket of the program itself: what it would do without us.
        return "" if mechanism in (b"NULL", b"CURVE") else "nothing checks its credentials"

    def _follow(self, monitor: zmq.Socket[bytes]) -> None:
        """Take an event of a monitor, and log the peers whose handshake failed before ZAP was asked."""
        event, descriptor = struct.unpack("=Hi", monitor.recv_multipart()[0])
        peers = self._monitors[monitor]
        if event == zmq.EVENT_MONITOR_STOPPED:
            del self._monitors[monitor]
            monitor.close(0)
        elif event == zmq.EVENT_ACCEPTED:
            peers[descriptor] = _peer_of(descriptor)
        elif event == zmq.EVENT_DISCONNECTED:
            peer = peers.pop(descriptor, "an unknown address")
            if peers.pop(-1, ""):
                self._log.warning("handshake", "A handshake of %s failed: no CURVE, or the wrong server key", peer)
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
            return str(connection.getpeername()[0])
        finally:
            connection.detach()
    except (OSError, IndexError):
        return "an unknown address"
    finally:
        os.close(duplicate)


class _NoAuthenticator:
    def shut_down(self) -> None:
        """Nothing runs."""


_no_authenticator = _NoAuthenticator()
_authenticators: dict[int, Any] = {}
_authenticators_lock = threading.RLock()


_ZAP_ENFORCE_DOMAIN = 93  # of libzmq; pyzmq has no name for it before release 23


def _apply_access_rules(sock: zmq.Socket[bytes], rules: _AccessRules) -> Authenticator | None:
    """Let only those connect to *sock* whom *rules* let in, before it is bound."""
    if rules.lets_everybody_in:
        return None
    with _authenticators_lock:
        service = _authenticators.get(os.getpid())
        if service is None or not service.is_alive:
            service = _authenticators[os.getpid()] = _AuthenticatorThread()
        authenticator: Authenticator = service.add(rules)
    sock.setsockopt(zmq.ZAP_DOMAIN, authenticator.domain)
    sock.setsockopt(_ZAP_ENFORCE_DOMAIN, 1)  # nobody gets in while nobody answers
    return authenticator


# -- sockets --


def get_tcp_keepalive_options() -> dict[int, int]:
    """Return the configured ``tcp_keepalive`` options, as ZeroMQ socket options with their values."""
    names = ("tcp_keepalive", "tcp_keepalive_cnt", "tcp_keepalive_idle", "tcp_keepalive_intvl")
    values = {getattr(zmq, name.upper()): config.get(name) for name in names}
    return {option: value for option, value in values.items() if value is not None}


def _liveness_options(is_limited: bool) -> dict[int, int]:
    """Return the options by which peers are noticed that are gone without a word.

    These are ZMTP heartbeats, or, if the queue of received messages *is limited*, TCP keepalive with the same times: a
    socket whose queue is full reads nothing, so it takes its peer for dead, and libzmq (4.3.5) then aborts the process.
    """
    interval, timeout = config.get("zmtp_heartbeat_interval"), config.get("zmtp_heartbeat_timeout")
    if not interval:
        return {}
    if is_limited:
        seconds = max(int(interval), 1)
        probes = max(int(timeout / interval), 1)
        return {
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: seconds,
            zmq.TCP_KEEPALIVE_INTVL: seconds,
            zmq.TCP_KEEPALIVE_CNT: probes,
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
    try:
        sock.linger = 0
        limits = {zmq.SNDHWM: "send_high_water_mark", zmq.RCVHWM: "receive_high_water_mark"}
        own: dict[Any, Any] = {option: config.get(name) for option, name in limits.items()}
        own.update(options or {})
        general = {
            zmq.RECONNECT_IVL_MAX: 2000,
            # The system repeats a lost SYN ever more seldom: begin anew, so that a link that is back is used at once.
            zmq.CONNECT_TIMEOUT: 5000,
            **_liveness_options(own[zmq.RCVHWM] != 0),
            **get_tcp_keepalive_options(),
        }
        for option, value in {**general, **own}.items():
            sock.setsockopt(option, value)
    except BaseException:
        sock.close()
        raise
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
    try:
        for option, key in keys.items():
            setattr(sock, option, key)
        if address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
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
    is_secure = _backend(backend) == "secure_zmq" and not destination.startswith("inproc://")
    secret = _load_key("server_secret_key_file", "secret") if is_secure else b""
    rules = _AccessRules(local_only, _ClientKeys("clients_public_keys_directory") if is_secure else None)
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
    tcp = _split_tcp(destination)
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
    """Bind *sock*; the error names the address, as that of newer releases of pyzmq does."""
    try:
        sock.bind(address)
    except zmq.ZMQError as error:
        raise zmq.ZMQError(error.errno, f"{zmq.strerror(error.errno or 0)} (addr={address!r})") from None


def close_socket(sock: zmq.Socket[bytes]) -> None:
    """Close *sock* at once; what it has not sent yet is dropped."""
    if not sock.closed:
        sock.monitor(None, 0)  # now, as long as there is somebody to be told that it ends
        sock.close(linger=0)


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
# 5. Asking the nameserver
#
# A lookup is a request message on the nameserver's port, answered by a list of addresses.
# ======================================================================================================================


get_configured_nameserver_port = get_configured_unsecure_zmq_nameserver_port


def _nameserver_endpoint(nameserver: str, port: int) -> str:
    """Return the address of *nameserver*, given as ``host``, or as ``host:port`` for another port than *port*."""
    host = nameserver.strip()
    if "://" in host:
        return _check_connectable(host)
    name, _, own_port = host.rpartition(":")
    has_port = own_port.isdigit() and name and not name.endswith(":")
    return _check_connectable(f"tcp://{host}" if has_port else f"tcp://{host}:{port}")


def _lookup_endpoint(nameserver: str) -> str:
    """Return the address on which *nameserver* answers lookups."""
    secure_port = config.get("secure_zmq_nameserver_port") if _backend() == "secure_zmq" else None
    return _nameserver_endpoint(nameserver, secure_port or get_configured_nameserver_port())


def _request_for(service: str) -> bytes:
    """Return the lookup for the publishers of *service*, in the version that every nameserver understands."""
    return Message("/oper/ns", "request", {"service": service}, version="v1.01").encode().encode()


def _addresses_in(answer: bytes) -> list[dict[str, Any]]:
    """Return the entries of a nameserver's answer that can be used; a broken answer has none."""
    try:
        entries = Message.decode(answer).data
    except MessageError as error:
        _lookup_log.warning("answer", "Skipped an answer that is no message: %s", error)
        return []
    if not isinstance(entries, list):
        return []
    good = [entry for entry in entries if isinstance(entry, dict) and _is_remote(entry.get("URI"))]
    if len(good) < len(entries):
        _lookup_log.warning("entries", "Skipped %d broken entries of an answer", len(entries) - len(good))
    return good


_lookup_log = _LimitedLogger("ns")


class _LookupSockets:
    """Request sockets that wait for the next lookup: connecting anew takes longer than asking."""

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
        """Return all that makes a connection to *endpoint* what it is."""
        settings = ("backend", "client_secret_key_file", "server_public_key_file")
        return (os.getpid(), endpoint, *map(config.get, settings))


_lookup_sockets = _LookupSockets()


def _ask(endpoint: str, request: bytes, timeout: float) -> bytes | None:
    """Return the answer to *request*, None if there is none in *timeout* seconds."""
    deadline = time.monotonic() + timeout
    key = _lookup_sockets.key(endpoint)
    sock = _lookup_sockets.take(key)
    is_fresh = sock is None
    while True:
        if sock is None:
            sock = set_up_client_socket(zmq.REQ, endpoint)
        # A kept connection may have died unnoticed: do not spend all the time on it.
        patience = deadline - time.monotonic() if is_fresh else min(timeout / 2, 1.0)
        answer = _answer_on(sock, request, patience)
        if answer is not None:
            _lookup_sockets.put(key, sock)
            return answer
        close_socket(sock)
        if is_fresh:
            return None
        sock, is_fresh = None, True


def _answer_on(sock: zmq.Socket[bytes], request: bytes, timeout: float) -> bytes | None:
    """Send *request* on a REQ socket and return its answer, None if it does not come in *timeout* seconds."""
    try:
        sock.send(request, _NOBLOCK)
        sock.setsockopt(zmq.RCVTIMEO, max(int(timeout * 1000), 0))
        return sock.recv_multipart()[0]
    except zmq.Again:
        pass
    except BaseException:
        close_socket(sock)
        raise
    return None


def get_pub_address(
    name: str, timeout: float = 10, nameserver: str | Sequence[str] = "localhost"
) -> list[dict[str, Any]]:
    """Get the addresses of the publishers of the service *name*.

    Args:
        name: Name or alias of the publisher, ``""`` for all publishers.
        timeout: How long to wait for the nameserver, in seconds.
        nameserver: The host of the nameserver, ``host:port`` if it answers on another port than configured, or a
            list of them: then the answers are merged, and one that answers is enough.

    Returns:
        A dictionary for each publisher, with its address as ``"URI"``; none if the nameserver knows none.

    Raises:
        TimeoutError: No nameserver answered in time.
        ConfigurationError: The secure backend is not set up.
    """
    request = _request_for(name)
    nameservers = [nameserver] if isinstance(nameserver, str) else list(nameserver)
    if len(nameservers) == 1:
        answers = [_ask(_lookup_endpoint(nameservers[0]), request, timeout)]
    else:
        answers = _ask_all([_lookup_endpoint(host) for host in nameservers], request, timeout)
    if all(answer is None for answer in answers):
        hosts = ", ".join(nameservers)
        raise TimeoutError(f"Didn't get an address after {timeout} seconds: no answer from the nameserver on {hosts}.")
    merged = {entry["URI"]: entry for answer in answers if answer is not None for entry in _addresses_in(answer)}
    return list(merged.values())


def _ask_all(endpoints: Sequence[str], request: bytes, timeout: float) -> list[bytes | None]:
    """Ask several nameservers at once; those that are down take no time from the others.

    Once one has answered, the rest have as long again as it took, and at least a quarter of a second.
    """
    sockets = {endpoint: set_up_client_socket(zmq.REQ, endpoint) for endpoint in dict.fromkeys(endpoints)}
    answers: list[bytes | None] = []
    poller = zmq.Poller()
    start = time.monotonic()
    deadline = start + timeout
    try:
        for sock in sockets.values():
            sock.send(request, _NOBLOCK)
            poller.register(sock, _POLLIN)
        while len(answers) < len(sockets) and time.monotonic() < deadline:
            for sock, _ in poller.poll(max(int((deadline - time.monotonic()) * 1000), 1)):
                answers.append(cast("zmq.Socket[bytes]", sock).recv_multipart(_NOBLOCK)[0])
                poller.unregister(sock)
                deadline = min(deadline, time.monotonic() + max(time.monotonic() - start, 0.25))
    finally:
        for sock in sockets.values():
            close_socket(sock)
    return answers or [None]


def get_pub_addresses(
    names: Sequence[str] | str | None = None, timeout: float = 10, nameserver: str | Sequence[str] = "localhost"
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
# 6. Announcing an address
#
# A publisher tells where it is, again and again: by multicast to all nameservers, or by request to listed ones.
# ======================================================================================================================


class _MulticastTarget:
    """Announces by UDP; without a network it tries again the next time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sender: MulticastSender | None = None
        self._log = _LimitedLogger("message_broadcaster")
        _multicast_group(None)  # a wrong group is an error now, a missing network is not

    def announce(self, text: str) -> None:
        """Send *text* to the multicast group."""
        try:
            if self._sender is None:
                self._sender = MulticastSender(self._port)
            self._sender(text)
        except OSError as error:
            self._log.warning("send", "Cannot announce by multicast (trying again): %s", error)
            self.close()

    def close(self) -> None:
        """Close the socket."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class _NameserverTarget:
    """Announces to one nameserver by requests, each of which stands for itself, answered or not."""

    RENEWAL = 30.0  # seconds without an answer, after which the connection is made anew

    def __init__(self, endpoint: str, on_resolved: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._on_resolved = on_resolved
        self._log = _LimitedLogger("message_broadcaster")
        self._is_registered = False
        self.pending: bytes | None = None
        self.socket: zmq.Socket[bytes] | None = None
        self._resolution = _Resolution(endpoint, on_resolved)
        self._last_sign = time.monotonic()
        _load_client_keys()  # what is wrong with them is an error now, not in the thread
        self._open()

    def _open(self) -> None:
        """Connect, once the host name resolves."""
        endpoint = self._resolution.check()
        if self.socket is None and endpoint is not None:
            # REQ_RELAXED: a request may follow one that was never answered.  IMMEDIATE: none waits for a connection.
            options = {zmq.REQ_RELAXED: 1, zmq.REQ_CORRELATE: 1, zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL_MAX: 500}
            try:
                self.socket = set_up_client_socket(zmq.REQ, endpoint, options)
            except ConfigurationError as error:  # the keys are just being replaced
                self._log.warning("keys", "Cannot register with %s (trying again): %s", self._endpoint, error)

    def announce(self, text: str) -> None:
        """Have *text* sent as soon as there is a connection."""
        if time.monotonic() - self._last_sign > self.RENEWAL:
            self._log.warning("silence", "No answer from the nameserver at %s, trying again", self._endpoint)
            self.close()
            self._resolution = _Resolution(self._endpoint, self._on_resolved)
            self._last_sign = time.monotonic()
        self._open()
        self.pending = text.encode()

    @property
    def events(self) -> int:
        """What to poll the socket for."""
        return _POLLIN if self.pending is None else _POLLIN | _POLLOUT

    def handle(self, events: int) -> None:
        """Take an answer, send a request."""
        assert self.socket is not None
        if events & _POLLIN:
            with suppress(zmq.Again):
                self._take_answer(self.socket.recv_multipart(_NOBLOCK)[0])
        if self.pending is not None:
            with suppress(zmq.Again):
                self.socket.send(self.pending, _NOBLOCK)
                self.pending = None

    def _take_answer(self, answer: bytes) -> None:
        self._last_sign = time.monotonic()
        if answer == b"ok":
            if not self._is_registered:
                _log("message_broadcaster").debug("Registered with the nameserver at %s", self._endpoint)
            self._is_registered = True
        else:
            self._is_registered = False
            text = "The nameserver at %s did not register us: %s"
            self._log.warning("refused", text, self._endpoint, answer[:200].decode("utf-8", "replace"))

    def close(self) -> None:
        """Close the socket."""
        if self.socket is not None:
            close_socket(self.socket)
            self.socket = None


class MessageBroadcaster:
    """Sends a message again and again, in a thread of its own.

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

    def __init__(
        self, msg: Any, port: int, interval: float, designated_receivers: str | Iterable[str] | None = None
    ) -> None:
        self._message = str(msg)
        self._port = port
        self._interval = interval
        receivers = [designated_receivers] if isinstance(designated_receivers, str) else designated_receivers
        self._receivers = [_nameserver_endpoint(host, port) for host in dict.fromkeys(receivers or ())]
        if not self._receivers:
            _multicast_group(None)
        self.on_round: Callable[[], None] = lambda: None  # called after each announcement
        self._thread: threading.Thread | None = None
        self._waker: _Waker | None = None
        self._is_stopping = False
        self._lock = threading.RLock()

    def is_running(self) -> bool:
        """Whether messages are being sent."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> MessageBroadcaster:
        """Start the broadcasting."""
        with self._lock:
            if self._interval > 0 and not self.is_running():
                self._is_stopping = False
                self._waker = waker = _Waker()
                targets: list[Any] = []
                try:
                    for endpoint in self._receivers:
                        targets.append(_NameserverTarget(endpoint, waker.wake))
                    if not targets:
                        targets.append(_MulticastTarget(self._port))
                except BaseException:
                    self._close(targets, waker)
                    raise
                arguments = (targets, waker)
                self._thread = threading.Thread(
                    target=self._run, args=arguments, name="posttroll announce", daemon=True
                )
                self._thread.start()
        return self

    def stop(self) -> MessageBroadcaster:
        """Stop the broadcasting, and wait until it has ended."""
        self._is_stopping = True
        thread, waker = self._thread, self._waker
        if waker is not None:
            waker.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)
        return self

    def _text(self) -> str | None:
        """Return what to send now, None for nothing."""
        return self._message

    def _run(self, targets: list[Any], waker: _Waker) -> None:
        try:
            due = time.monotonic()
            while not self._is_stopping:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._interval
                    text = self._text()
                    for target in targets if text is not None else ():
                        target.announce(text)
                    self.on_round()
                self._wait(targets, waker, due)
        except zmq.ContextTerminated:
            _log("message_broadcaster").debug("The context was terminated")
        finally:
            self._close(targets, waker)

    @staticmethod
    def _wait(targets: list[Any], waker: _Waker, due: float) -> None:
        """Handle the answers that come until something is *due*."""
        poller = zmq.Poller()
        poller.register(waker, _POLLIN)
        by_socket = {}
        for target in targets:
            if isinstance(target, _NameserverTarget):
                target._open()
                if target.socket is not None:
                    poller.register(target.socket, target.events)
                    by_socket[target.socket] = target
        # One millisecond more: poll rounds down, and would return just before it is due.
        ready = poller.poll(max(int((due - time.monotonic()) * 1000) + 1, 0))
        waker.clear()
        for sock, events in ready:
            if sock in by_socket:
                by_socket[cast("zmq.Socket[bytes]", sock)].handle(events)

    @staticmethod
    def _close(targets: list[Any], waker: _Waker) -> None:
        for target in targets:
            target.close()
        waker.close()


class AddressBroadcaster(MessageBroadcaster):
    """Announces the address of a publisher, in a thread of its own.

    Args:
        name: The name of the publisher.
        address: Its address; ``tcp://*:PORT`` stands for the address of this host, looked up each time.
        interval: Seconds between two announcements.
        nameservers: Hosts to register with; without any, the announcement goes to the multicast group.

    Raises:
        OSError, ConfigurationError, ValueError: As for `MessageBroadcaster`.
    """

    def __init__(
        self, name: str, address: str, interval: float, nameservers: str | Iterable[str] | None = None
    ) -> None:
        self._name = name
        self._address = address
        self._text()  # a name that cannot be announced is an error now, not in the thread
        super().__init__("", config.get("broadcast_port"), interval, nameservers)

    def _content(self) -> dict[str, Any]:
        """Return the data of the announcement."""
        tcp = _split_tcp(self._address)
        uri = self._address if tcp is None or tcp[0] != "*" else f"tcp://{get_own_ip()}:{tcp[1]}"
        return {"URI": uri}

    def _text(self) -> str | None:
        # Every nameserver, however old, must be able to read it: v1.01.
        return Message(f"/address/{self._name}", "info", self._content(), version="v1.01").encode()


class AddressServiceBroadcaster(AddressBroadcaster):
    """Announces the address of a publisher with its services: its name and aliases.

    Args:
        name: The name of the publisher.
        address: Its address; ``tcp://*:PORT`` stands for the address of this host, looked up each time.
        data_type: The services that it can be found by.
        interval: Seconds between two announcements.
        nameservers: Hosts to register with; without any, the announcement goes to the multicast group.

    Raises:
        OSError, ConfigurationError, ValueError: As for `MessageBroadcaster`.
    """

    def __init__(
        self,
        name: str,
        address: str,
        data_type: str | Sequence[str],
        interval: float = 2,
        nameservers: str | Iterable[str] | None = None,
    ) -> None:
        self._services = [data_type] if isinstance(data_type, str) else list(data_type)
        super().__init__(name, address, interval, nameservers)

    def _content(self) -> dict[str, Any]:
        return {
            **super()._content(),
            "service": self._services,
            "supported_message_version": str(_DEFAULT_VERSION),
            "backend": _backend(),
        }


sendaddress = AddressBroadcaster
sendaddressservice = AddressServiceBroadcaster


# ======================================================================================================================
# 7. Publishing
#
# XPUB sockets: unlike PUB they tell who subscribes, and (XPUB_NODROP) that a queue is full.
# ======================================================================================================================


class Publisher:
    """Publishes messages on an address.

    Args:
        address: The address, for example ``tcp://*:9000``; port 0 is a free one.  With ``localhost`` or an address of
            this host it is reached by that address only, with anything else by all addresses of this host.
        name: The name of the publisher.
        min_port: Lowest port to choose from, by default the configured `pub_min_port`.
        max_port: End of the range to choose from (not included), by default the configured `pub_max_port`.

    It binds at `start`, or else when it is used for the first time.  Sending is thread-safe and never waits.

    Attributes:
        dropped: How many messages subscribers missed because their queues were full.
    """

    _FLUSH_SECONDS = 0.5  # that stop() waits until everything is sent
    _LINGER_SECONDS = 30.0  # that the rest may take in the background

    def __init__(self, address: str, name: str = "", min_port: int | None = None, max_port: int | None = None) -> None:
        _backend()  # an unknown one is an error now
        self._name = name
        self._address = _bind_address(address)
        self._port_interval = (min_port, max_port)
        self._local_only = False
        self._socket: zmq.Socket[bytes] | None = None
        self._port: int | None = None
        self._authenticator: Authenticator | None = None
        self._is_stopped = False
        self._lock = threading.RLock()
        self._last_beat: float | None = None
        self._subscriber_count = 0
        self._marks: set[bytes] = set()
        self._sends = 0
        self._pid = os.getpid()
        self._loss_log = _LimitedLogger("publisher")
        self.dropped = 0

    def start(self) -> Publisher:
        """Start the publisher: bind its address.

        Raises:
            zmq.ZMQError: The port is in use, or the address cannot be bound.
            ConfigurationError: The secure backend is not set up.
        """
        with self._lock:
            if self._socket is None:
                options = {
                    zmq.XPUB_VERBOSER: 1,
                    zmq.XPUB_NODROP: 1,
                    zmq.LINGER: int(self._LINGER_SECONDS * 1000),
                    zmq.RCVHWM: 0,
                    # A subscriber too busy to answer is not dead; to give it up would lose all that is queued for it.
                    zmq.HEARTBEAT_TIMEOUT: 0,
                    zmq.HEARTBEAT_TTL: 0,
                }
                sock, self._port, self._authenticator = set_up_server_socket(
                    zmq.XPUB, self._address, options, self._port_interval, local_only=self._local_only
                )
                self._socket = sock
                self._pid = os.getpid()
                self._is_stopped = False
                _live_publishers.add(self)
                _log("publisher").info("Publisher for %s started on port %s.", self._address, self._port)
        return self

    def _open_socket(self) -> zmq.Socket[bytes]:
        """Return the bound socket."""
        sock = self._socket
        if sock is None or self._pid != os.getpid():
            if self._is_stopped:
                raise RuntimeError(f"Cannot send: the publisher {self._name or self._address} has been stopped.")
            if sock is not None:
                raise RuntimeError("Cannot send: the publisher was started before the fork, by the parent process.")
            self.start()
            sock = cast("zmq.Socket[bytes]", self._socket)
        return sock

    def send(self, msg: str | bytes | Message) -> None:
        """Send a message.

        A subscriber whose queue is full (see `send_high_water_mark`) misses it; that is counted in `dropped`, and
        logged.  The other subscribers get it.

        Args:
            msg: An encoded message as str or bytes, or a `Message`.

        Raises:
            RuntimeError: The publisher has been stopped.
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
        with self._lock:
            sock = self._socket
            if sock is None or self._pid != os.getpid():
                sock = self._open_socket()
            self._sends += 1
            if not self._sends & 0xFF:
                self._note_subscriptions()
            try:
                sock.send(data, _NOBLOCK)
            except zmq.Again:
                self._send_one_by_one(sock, data)

    send_string = send

    def _send_one_by_one(self, sock: zmq.Socket[bytes], data: bytes) -> None:
        """Send to those subscribers whose queue is not full, and count the others.

        A message that begins with the mark of a subscriber goes to that one alone.  Strangers have no mark: with one of
        them it goes to all at once, and ZeroMQ drops it in silence where a queue is full, as it does what follows until
        half of that queue is read.  So what they miss is counted only once each time that their queue fills up.
        """
        self._note_subscriptions()
        missed = 0
        if self._subscriber_count == len(self._marks):
            for mark in self._marks:
                try:
                    sock.send(mark + b"\0" + data, _NOBLOCK)
                except zmq.Again:
                    missed += 1
        else:
            sock.setsockopt(zmq.XPUB_NODROP, 0)
            sock.send(data, _NOBLOCK)
            sock.setsockopt(zmq.XPUB_NODROP, 1)
            missed = 1
        if missed:
            self.dropped += missed
            text = "Publisher %s: the queue of a slow subscriber is full, it misses messages (%d so far)"
            self._loss_log.warning("full", text, self._name or self._address, self.dropped)

    def heartbeat(self, min_interval: float = 0) -> None:
        """Send a heartbeat, but only if *min_interval* seconds have passed since the last one."""
        now = time.monotonic()
        if self._last_beat is None or now - self._last_beat >= min_interval:
            self._last_beat = now
            _log("publisher").debug("Publish heartbeat (min_interval is %.1f sec)", min_interval)
            self.send(Message(f"/heartbeat/{self._name}", "beat", {"min_interval": min_interval}).encode())

    def _note_subscriptions(self) -> None:
        """Take note of who has subscribed and unsubscribed since the last time."""
        sock = self._socket
        while sock is not None and not sock.closed:
            try:
                change = sock.recv(_NOBLOCK)
            except zmq.Again:
                return
            mark = _SUBSCRIBER_MARK.fullmatch(change[1:])
            topics_to_come = int(mark[1]) if mark else 0
            if change[:1] == b"\x01":
                self._subscriber_count += 1 - topics_to_come
                self._marks.update([mark[0]] if mark else [])
            elif change[:1] == b"\x00":
                self._subscriber_count -= 1 - topics_to_come
                self._marks.difference_update([mark[0]] if mark else [])

    def tidy_up(self) -> None:
        """Let go of subscribers that have gone; ZeroMQ keeps them in memory until the socket is used."""
        with self._lock:
            self._note_subscriptions()

    @property
    def subscriber_count(self) -> int:
        """How many subscribers are connected; one of another implementation counts for each of its topics."""
        with self._lock:
            self._note_subscriptions()
            return max(self._subscriber_count, 0)

    def wait_for_subscribers(self, count: int = 1, timeout: float | None = None) -> bool:
        """Wait until subscribers are connected, so that they get the next message.

        Args:
            count: How many.
            timeout: How long to wait, in seconds; None for ever.

        Returns:
            Whether there are as many now.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._open_socket()
        pause = 0.001
        while self.subscriber_count < count:
            left = pause if deadline is None else min(deadline - time.monotonic(), pause)
            if left <= 0 or self._is_stopped:
                return False
            time.sleep(left)  # the socket may be polled only under the lock, which senders need
            pause = min(pause * 1.5, 0.02)
        return True

    def stop(self) -> None:
        """Stop the publisher; what has been sent until now still arrives."""
        with self._lock:
            sock, self._socket = self._socket, None
            self._is_stopped = True
            _live_publishers.discard(self)
            authenticator, self._authenticator = self._authenticator, None
            self._subscriber_count = 0
            self._marks.clear()
            if sock is None or sock.closed or self._pid != os.getpid():
                return
        _close_flushed(sock, self._FLUSH_SECONDS)
        if authenticator is not None:
            authenticator.stop()
        _log("publisher").debug("Publisher for %s stopped", self._address)

    def close(self) -> None:
        """Alias for stop."""
        self.stop()

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

    def __enter__(self) -> Publisher:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


# A subscriber also subscribes to a mark, which no message begins with; it says how many topics follow.  ZeroMQ sends
# them in alphabetical order, the mark first: with 1 for each topic and 1 - n for the mark, a publisher that adds them
# up counts the subscriber once, and only when the last of its topics has come.
_MARK = b"posttroll-subscriber/"
_SUBSCRIBER_MARK = re.compile(_MARK + rb"[0-9a-f]{16}/(\d{1,6})")


def _subscriber_mark(topics: int) -> bytes:
    """Return what a subscriber of so many *topics* subscribes to, so that publishers can count it."""
    return _MARK + f"{os.urandom(8).hex()}/{topics}".encode()


_live_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


def _stop_live_publishers() -> None:
    """At the end of the program: let those publishers that nobody stopped send what they have."""
    for publisher in list(_live_publishers):
        publisher.stop()


atexit.register(_stop_live_publishers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_live_publishers.clear)  # the parent stops its own


def _bind_address(address: str) -> str:
    """Return the address to bind for *address*; raises ValueError if there is none."""
    tcp = _split_tcp(address) if isinstance(address, str) else None
    if tcp is not None and tcp[1] < 65536:
        host = "127.0.0.1" if tcp[0].lower() == "localhost" else tcp[0]
        return f"tcp://{host if _is_own_address(host.strip('[]')) else '*'}:{tcp[1]}"
    if isinstance(address, str) and _LOCAL_ADDRESS.fullmatch(address):
        return address
    raise ValueError(f"Cannot publish on {address!r}: an address looks like 'tcp://*:9000'.")


def _close_flushed(sock: zmq.Socket[bytes], timeout: float) -> None:
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


class NoisyPublisher:
    """A `Publisher` that announces its own name and address.

    Args:
        name: The name of the publisher, by which subscribers find it.
        port: The port, 0 for a free one.
        aliases: Other names by which it can be found.
        broadcast_interval: Seconds between two announcements.
        nameservers: Hosts of nameservers to register with, each as ``host`` or ``host:port`` (by default the configured
            `broadcast_port`); without any, it announces itself by multicast.
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
        nameservers: str | Sequence[str] | bool | None = None,
        min_port: int | None = None,
        max_port: int | None = None,
    ) -> None:
        if not _is_field(name) or "/" in name:  # it is announced as the subject /address/NAME
            raise ValueError(f"A publisher needs a name without white space and '/' to be found by, not {name!r}.")
        self._name = name
        self._aliases = [name] + ([aliases] if isinstance(aliases, str) else list(aliases or []))
        self._port = int(port)
        self._broadcast_interval = broadcast_interval
        self._nameservers = None if isinstance(nameservers, bool) else nameservers or None
        self.min_port = min_port
        self.max_port = max_port
        self._publisher: Publisher | None = None
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
            try:
                publisher.start()
                port = publisher.port_number
                if port:
                    self._broadcaster = AddressServiceBroadcaster(
                        self._name, f"tcp://*:{port}", self._aliases, self._broadcast_interval, self._nameservers
                    )
                    self._broadcaster.on_round = publisher.tidy_up
                    self._broadcaster.start()
            except BaseException:
                self._broadcaster = None
                publisher.stop()
                raise
            self._publisher = publisher
        return self

    def _started(self) -> Publisher:
        if self._publisher is None:
            raise RuntimeError(f"The publisher {self._name} is not started.")
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

    def stop(self) -> None:
        """Stop to announce it, and stop the publisher."""
        broadcaster, self._broadcaster = self._broadcaster, None
        publisher, self._publisher = self._publisher, None
        if broadcaster is not None:
            broadcaster.stop()
        if publisher is not None:
            publisher.stop()

    def close(self) -> None:
        """Alias for stop."""
        self.stop()

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
        """How many messages a subscriber missed because its queue was full."""
        return self._started().dropped

    @property
    def subscriber_count(self) -> int:
        """How many subscribers are connected."""
        return self._started().subscriber_count

    def __enter__(self) -> NoisyPublisher:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


AnyPublisher = Union[Publisher, NoisyPublisher]


class Publish:
    """The publishing context: starts a publisher, and stops it at the end.

    Args:
        name: The name of the publisher.
        port: The port, 0 for a free one.
        aliases: Other names by which it can be found.
        broadcast_interval: Seconds between two announcements.
        nameservers: Hosts of nameservers to register with; without any (None), it announces itself by multicast; with
            False and a *port*, it is not announced at all.
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
        nameservers: str | Sequence[str] | bool | None = None,
        min_port: int | None = None,
        max_port: int | None = None,
    ) -> None:
        settings = {
            "name": name,
            "port": port,
            "aliases": aliases,
            "broadcast_interval": broadcast_interval,
            "nameservers": nameservers,
            "min_port": min_port,
            "max_port": max_port,
        }
        self.publisher = create_publisher_from_dict_config(settings)

    def __enter__(self) -> AnyPublisher:
        # The start of a replaced class may return anything.
        self.publisher.start()
        return self.publisher

    def __exit__(self, *exc_info: object) -> None:
        self.publisher.stop()


def create_publisher_from_dict_config(settings: Mapping[str, Any]) -> AnyPublisher:
    """Create a publisher (not started) from a dictionary of settings.

    - an ``address`` or a non-zero ``port``, and ``nameservers`` False: a `Publisher` there, not announced anywhere;
    - ``nameservers`` a list of hosts: a `NoisyPublisher` that registers with them;
    - otherwise: a `NoisyPublisher` that announces itself by multicast.

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
        _refuse_unknown(
            settings, "Publisher", "address port nameservers name aliases broadcast_interval min_port max_port"
        )
        return Publisher(
            settings.get("address") or f"tcp://*:{port}",
            name=settings.get("name", ""),
            **{key: settings[key] for key in ("min_port", "max_port") if settings.get(key) is not None},
        )
    if not settings.get("name"):
        raise KeyError("NoisyPublisher requires a name")
    return NoisyPublisher(
        settings["name"],
        port=port,
        aliases=settings.get("aliases"),
        broadcast_interval=settings.get("broadcast_interval", 2),
        nameservers=settings.get("nameservers"),
        min_port=settings.get("min_port"),
        max_port=settings.get("max_port"),
    )


def _refuse_unknown(settings: Mapping[str, Any], kind: str, known: str) -> None:
    """Raise TypeError for a key that is none of the *known* ones."""
    unknown = sorted(set(settings) - set(known.split()))
    if unknown:
        raise TypeError(f"{kind} got an unexpected setting {unknown[0]!r}: known are {', '.join(known.split())}.")


# ======================================================================================================================
# 8. Subscribing
#
# Addresses with the same topics share one SUB socket, so a message costs the same however many publishers there are.
# All sockets of a subscriber, and those by which it follows its services, are served by whoever receives.
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


def _backend_towards(announced: Any) -> str | None:
    """Return the backend to connect with to a publisher that announced a backend, None if it cannot be used.

    Anybody can announce anything, so a secure process uses CURVE whatever it is told: the worst that a false
    announcement causes is an attempt to connect that fails.
    """
    own = _backend()
    if own == "secure_zmq" or announced in (None, own):
        return own
    has_keys = config.get("client_secret_key_file") and config.get("server_public_key_file")
    return "secure_zmq" if announced == "secure_zmq" and has_keys else None


class Subscriber:
    """Subscribes to message streams.

    Args:
        addresses: The publishers' addresses, as text, or as `get_pub_address` returns them.
        topics: The beginnings of the subjects to subscribe to; by default everything.
        message_filter: Called with each message; those for which it returns a false value are skipped.
        translate: Put the host of the publisher's address in place of the host of the sender.

    Raises:
        ValueError: An address cannot be used.

    It can be iterated over, also with ``async for``, and is a context manager that closes it.  `stop` and `close` may
    be called from other threads and from signal handlers, `add`, `remove` and `update` from other threads.
    """

    _BATCH = 1000  # messages from one socket until the others have their turn

    def __init__(
        self,
        addresses: str | Iterable[Any],
        topics: str | Iterable[str] | None = "",
        message_filter: Callable[[Message], Any] | None = None,
        translate: bool = False,
    ) -> None:
        _backend()  # an unknown one is an error now
        self._topics = _topic_prefixes(topics)
        self._filter = message_filter
        self._translate = translate
        self._lock = threading.RLock()  # whoever holds it may use the sockets
        self._waker = _Waker()
        self._changes: deque[Callable[[], None]] = deque()
        self._wanted: dict[str, tuple[tuple[str, ...], str | None]] = {}
        self._connected: dict[str, tuple[zmq.Socket[bytes], str]] = {}  # address: socket and endpoint
        self._down: dict[tuple[zmq.Socket[bytes], str], tuple[float, float]] = {}  # when to renew, and the pause after
        self._unresolved: dict[str, _Resolution] = {}
        self._groups: dict[tuple[Any, ...], zmq.Socket[bytes]] = {}
        self._hooks: dict[zmq.Socket[bytes], Callable[[list[bytes]], None]] = {}
        self._timers: list[_Follower] = []
        self._ready: list[zmq.Socket[bytes]] = []
        self._unused: list[zmq.Socket[bytes]] = []
        self._poller: zmq.Poller | None = None
        self._bad_log = _LimitedLogger("subscriber")
        self._is_receiving = False
        self._is_awaited = False  # an asyncio loop waits on the sockets: only it may close them
        self._is_closed = False
        self._pid = os.getpid()
        try:
            self.update(addresses)
        except BaseException:
            self.close()
            raise

    # -- addresses --

    def add(self, address: Any, topics: str | Iterable[str] | None = None) -> None:
        """Add an address.

        Args:
            address: A publisher's address, as text or as `get_pub_address` returns it.
            topics: The topics to subscribe to there; None for those of the subscriber.

        Raises:
            ValueError: The address cannot be used.
            ConfigurationError: The secure backend is not set up.
        """
        announced = address.get("backend") if isinstance(address, Mapping) else None
        address = _check_connectable(address.get("URI") if isinstance(address, Mapping) else address)
        # What stays in the process needs no keys.
        backend = "unsecure_zmq" if address.startswith("inproc://") else _backend_towards(announced)
        if backend is None:
            raise ValueError(f"{address} uses the backend {announced!r}, this program {_backend()!r}: not connected.")
        prefixes = self._topics if topics is None else _topic_prefixes(topics)
        if self._wanted.get(address) != (prefixes, backend):
            _load_client_keys(backend)  # what is wrong with them is an error now, not where the messages are received
            self._wanted[address] = (prefixes, backend)
            self._change(lambda: self._connect(address))

    def remove(self, address: Any) -> None:
        """Remove an address; one that is not there is ignored."""
        address = address.get("URI") if isinstance(address, Mapping) else address
        if self._wanted.pop(address, None) is not None:
            self._change(lambda: self._connect(address))

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
    def subscribers(self) -> list[zmq.Socket[bytes]]:
        """The sockets that messages come from; many addresses share one."""
        return list(self._groups.values())

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
                self._bad_log.warning("hook", "Skipped a bad message from %s: %s", address, error)
            else:
                callback(message)

        def open_socket() -> None:
            sock = set_up_client_socket(kind, address)
            for topic in topics:
                sock.setsockopt(zmq.SUBSCRIBE, topic.encode())
            self._register(sock, handle)

        self._change(open_socket)

    # -- sockets: whoever calls these holds the lock --

    def _change(self, change: Callable[[], None]) -> None:
        """Apply *change* to the sockets: now if nobody waits on them, else by who does."""
        self._changes.append(change)
        if self._lock.acquire(blocking=False):
            try:
                self._apply_changes()
            finally:
                self._lock.release()
        else:
            self._waker.wake()

    def _apply_changes(self) -> None:
        while self._changes and not self._is_closed:
            self._changes.popleft()()

    def _register(self, sock: zmq.Socket[bytes], callback: Callable[[list[bytes]], None]) -> None:
        """Have *callback* called with what comes on *sock*."""
        self._hooks[sock] = callback
        self._poller = None

    def _unregister(self, sock: zmq.Socket[bytes]) -> None:
        """Close a socket that was registered."""
        if self._hooks.pop(sock, None) is not None:
            self._poller = None
            close_socket(sock)

    def _connect(self, address: str) -> None:
        """Connect to *address*, or disconnect, so that it is as wanted."""
        key = self._key_of(address)
        current = self._connected.get(address)
        if current is not None and (key is None or current[0] is not self._groups.get(key)):
            self._disconnect(address)
            self._close_unused()
            current = None
        if key is None:
            self._unresolved.pop(address, None)
        elif current is None:
            resolution = self._unresolved.get(address) or _Resolution(address, self._waker.wake)
            endpoint = resolution.check()
            if endpoint is None:
                self._unresolved[address] = resolution
                return
            self._unresolved.pop(address, None)
            sock = self._groups.get(key) or self._new_group(key)
            sock.connect(endpoint)
            self._connected[address] = (sock, endpoint)
            _warn_of_descriptors(len(self._connected))
            _log("subscriber").debug("Subscribed to %s", address)

    def _disconnect(self, address: str) -> None:
        """Disconnect from *address*, unless another address is another name for the same endpoint."""
        current = sock, endpoint = self._connected.pop(address)
        if current not in self._connected.values():
            self._down.pop(current, None)
            with suppress(zmq.ZMQError):  # it may be gone already (inproc)
                sock.disconnect(endpoint)
        _log("subscriber").debug("No longer subscribed to %s", address)

    def _close_unused(self) -> None:
        """Close the sockets without a connection, later: somebody may be in the middle of receiving from one."""
        used = {sock for sock, _ in self._connected.values()}
        for key, sock in list(self._groups.items()):
            if sock not in used and not any(self._key_of(address) == key for address in self._unresolved):
                del self._groups[key]
                self._unused.append(sock)
                self._poller = None

    def _key_of(self, address: str) -> tuple[Any, ...] | None:
        """Return the key of the group that *address* belongs to, None if it is not wanted."""
        wanted = self._wanted.get(address)
        return None if wanted is None else (*wanted, address if self._translate else None)

    # ZeroMQ gives a connection up for good when the other side breaks the protocol: another program on the port, for
    # a moment, or a publisher with another backend.  So what has been down for a while is connected anew.

    _RENEWAL, _LONGEST_RENEWAL = 5.0, 60.0  # seconds until a connection that is down is renewed, at first and at last

    def _watch(self, sock: zmq.Socket[bytes]) -> None:
        """Take note of which connections of *sock* go down and come up."""
        failures = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | failures
        monitor = _open_monitor(sock, events)
        self._register(monitor, partial(self._take_event, sock, monitor))

    def _take_event(self, sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes], frames: list[bytes]) -> None:
        event, _ = struct.unpack("=HI", frames[0])
        connection = (sock, frames[1].decode("utf-8", "replace"))
        if event == zmq.EVENT_MONITOR_STOPPED:
            self._unregister(monitor)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._down.pop(connection, None)
        elif connection in self._connected.values():
            if event != zmq.EVENT_DISCONNECTED:
                text = "%s does not speak our protocol, or has another backend or key (trying again)"
                self._bad_log.warning("handshake", text, connection[1])
            self._down.setdefault(connection, (time.monotonic() + self._RENEWAL, self._RENEWAL))

    def _renew(self) -> None:
        """Make those connections anew that have been down for a while, with host names resolved again."""
        now = time.monotonic()
        for connection, (due, pause) in list(self._down.items()):
            if now < due:
                continue
            del self._down[connection]
            for address in [name for name, current in self._connected.items() if current == connection]:
                self._disconnect(address)
                self._connect(address)
                if address in self._connected:
                    longer = min(2 * pause, self._LONGEST_RENEWAL)
                    self._down[self._connected[address]] = (now + longer, longer)
        self._close_unused()

    def _new_group(self, key: tuple[Any, ...]) -> zmq.Socket[bytes]:
        """Return a new SUB socket for all the addresses with the same topics and backend."""
        prefixes, backend, _ = key
        sock = set_up_client_socket(zmq.SUB, "", None, backend)
        for topic in (_subscriber_mark(len(prefixes)), *map(str.encode, prefixes)):
            sock.setsockopt(zmq.SUBSCRIBE, topic)
        self._groups[key] = sock
        self._poller = None
        self._watch(sock)
        return sock

    # -- receiving --

    def recv(self, timeout: float | None = None) -> Iterator[Message | None]:
        """Receive messages until the subscriber is stopped.

        Args:
            timeout: Seconds without a message after which None is yielded; None to wait for ever.

        Yields:
            The messages; None each time that *timeout* has passed without one.
        """
        self._check_process()
        lock = self._lock
        accept = self._accept
        deadline = None  # it holds until something is yielded: refused and broken messages do not put it off
        lock.acquire()
        self._is_receiving = not self._is_closed
        try:
            while self._is_receiving:
                if timeout is not None and deadline is None:
                    deadline = time.monotonic() + timeout
                self._wait(deadline)
                for sock in self._ready:
                    receive = sock.recv
                    for _ in range(self._BATCH):
                        try:
                            raw = receive(_NOBLOCK)
                        except zmq.Again:
                            break
                        message = accept(raw, sock)
                        if message is None:
                            continue
                        deadline = None
                        lock.release()
                        try:
                            yield message
                        finally:
                            lock.acquire()
                        if not self._is_receiving:
                            break
                    if not self._is_receiving:
                        break
                if self._is_receiving and deadline is not None and time.monotonic() >= deadline:
                    deadline = None
                    lock.release()
                    try:
                        yield None
                    finally:
                        lock.acquire()
        except zmq.ZMQError:
            if not self._is_closed:  # by a signal handler, say
                raise
        finally:
            self._is_receiving = False
            if self._is_closed:
                self._close_sockets()
            lock.release()

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked child: a ZeroMQ socket works only in the process that made it."""
        if self._pid != os.getpid():
            raise RuntimeError("Cannot receive: the subscriber was made before the fork, by the parent process.")

    def __call__(self, **kwargs: Any) -> Iterator[Message | None]:
        """Receive, as `recv` does."""
        return self.recv(**kwargs)

    def __iter__(self) -> Iterator[Message]:
        return cast("Iterator[Message]", self.recv())

    async def receive(self, timeout: float | None = None) -> Message | None:
        """Receive one message, in an asyncio program.

        Args:
            timeout: How long to wait, in seconds; None for ever.

        Returns:
            The message; None after *timeout*, or when the subscriber is stopped.
        """
        with self._receiving():
            return await self._receive(None if timeout is None else time.monotonic() + timeout)

    async def __aiter__(self) -> AsyncIterator[Message]:
        with self._receiving():
            while True:
                message = await self._receive(None)
                if message is None:
                    return
                yield message

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        """The time during which an asyncio program receives."""
        self._check_process()
        self._is_receiving = not self._is_closed
        try:
            yield
        finally:
            self._is_receiving = False
            if self._is_closed:
                with self._lock:
                    self._close_sockets()

    async def _receive(self, deadline: float | None) -> Message | None:
        """Return the next message, None at the *deadline* or when the subscriber is stopped."""
        import zmq.asyncio

        while self._is_receiving:
            with self._lock:
                message = self._take()
                if message is not None:
                    return message
                milliseconds = self._prepare(deadline)
                poller: Any = zmq.asyncio.Poller()
                for item, events in cast(zmq.Poller, self._poller).sockets:
                    poller.register(item, events)
                self._is_awaited = True
            try:
                found = await poller.poll(milliseconds)
            finally:
                self._is_awaited = False
            with self._lock:
                if self._is_receiving:
                    self._dispatch(found)
                    if deadline is not None and time.monotonic() >= deadline:
                        return self._take()
        return None

    def _take(self) -> Message | None:
        """Return the next message of the ready sockets, without waiting."""
        while self._ready:
            try:
                raw = self._ready[0].recv(_NOBLOCK)
            except zmq.Again:
                self._ready.pop(0)
                continue
            message = self._accept(raw, self._ready[0])
            if message is not None:
                return message
        return None

    def _accept(self, raw: bytes, sock: zmq.Socket[bytes]) -> Message | None:
        """Return the message in *raw*, None if it is none, or not wanted."""
        try:
            message = Message.decode(raw)
        except MessageError as error:
            if raw.startswith(_MARK):
                return self._accept_personal(raw, sock)
            self._bad_log.warning("message", "Skipped a bad message: %s", error)
            return None
        if self._translate:
            self._translate_sender(message, sock)
        if self._filter is not None and not self._filter(message):
            return None
        return message

    def _accept_personal(self, raw: bytes, sock: zmq.Socket[bytes]) -> Message | None:
        """Return the message behind our mark, sent to us alone whatever our topics are; None if it is not wanted."""
        content = raw.partition(b"\0")[2]
        topics = chain.from_iterable(key[0] for key, other in self._groups.items() if other is sock)
        return self._accept(content, sock) if content.startswith(tuple(map(str.encode, topics))) else None

    def _translate_sender(self, message: Message, sock: zmq.Socket[bytes]) -> None:
        """Put the host that the message came from in place of the one that its sender says."""
        for (_, _, address), other in self._groups.items():
            tcp = _split_tcp(address) if other is sock else None
            if tcp is not None:
                message.sender = f"{message.sender.partition('@')[0]}@{tcp[0]}"

    def _wait(self, deadline: float | None) -> None:
        """Serve hooks and changes until there is something to receive, or the *deadline* has passed."""
        while True:
            milliseconds = self._prepare(deadline)
            self._dispatch(cast(zmq.Poller, self._poller).poll(milliseconds))
            if self._ready or not self._is_receiving or (deadline is not None and time.monotonic() >= deadline):
                return

    def _prepare(self, deadline: float | None) -> int:
        """Do all that is due before a poll, so that nothing holds up what it finds; return its milliseconds."""
        for timer in self._timers:
            if time.monotonic() >= timer.due:
                timer.run()
        for address in list(self._unresolved):
            self._connect(address)
        if self._down:
            self._renew()
        self._apply_changes()
        while self._unused:
            close_socket(self._unused.pop())
        if self._poller is None:
            self._poller = zmq.Poller()
            for sock in (*self._groups.values(), *self._hooks):
                self._poller.register(sock, _POLLIN)
            self._poller.register(self._waker.fileno(), _POLLIN)
        due = [deadline] if deadline is not None else []
        due += [timer.due for timer in self._timers]
        due += [when for when, _ in self._down.values()]
        if self._unresolved:
            due.append(time.monotonic() + _Resolution.RETRY)
        # One millisecond more: poll rounds down, and would return just before it is due.
        milliseconds = int((min(due) - time.monotonic()) * 1000) + 1 if due else _LONGEST_POLL
        return min(max(milliseconds, 0), _LONGEST_POLL)

    def _dispatch(self, events: Iterable[tuple[Any, int]]) -> None:
        """Serve what a poll found: collect the sockets that have messages, call the hooks of the others."""
        self._ready = ready = []
        for item, _ in events:
            callback = self._hooks.get(item)
            if callback is not None:
                with suppress(zmq.Again):
                    callback(item.recv_multipart(_NOBLOCK))
            elif isinstance(item, int):
                self._waker.clear()
            else:
                ready.append(item)

    @property
    def running(self) -> bool:
        """Whether somebody is receiving."""
        return self._is_receiving

    def stop(self) -> None:
        """End the receiving."""
        self._is_receiving = False
        if self._pid == os.getpid():
            self._waker.wake()

    def close(self) -> None:
        """End the receiving, and close the sockets."""
        self._is_closed = True
        if self._pid != os.getpid():
            return  # they belong to the parent, whose thread may have held the lock at the time of the fork
        self.stop()
        # Whoever receives in another thread closes them; this thread waits for it, but not for ever.
        if self._lock.acquire(timeout=1):
            try:
                if not self._is_awaited:
                    self._close_sockets()
            finally:
                self._lock.release()

    def _close_sockets(self) -> None:
        for sock in (*self._groups.values(), *self._unused, *self._hooks):  # each before its monitor
            close_socket(sock)
        self._groups, self._hooks, self._timers, self._ready, self._unused = {}, {}, [], [], []
        self._connected, self._unresolved, self._down = {}, {}, {}
        self._poller = None
        self._waker.close()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not left to chance: a socket must be closed before its monitor.
        if hasattr(self, "_waker") and not self._is_closed:
            self.close()


def _warn_of_descriptors(count: int) -> None:
    """Say what to do when so many connections come near the limit on open files."""
    if count % 100:
        return
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and count > 0.8 * limit:
        text = "%d connections, but at most %d open files: raise the limit (ulimit -n, LimitNOFILE= in systemd)"
        _key_log.warning("descriptors", text, count, limit)


class _Follower:
    """Keeps a subscriber connected to the publishers of its services, as nameservers know them.

    With *listen* it hears of new and lost publishers on the nameservers' address ports.  Lookups fill the gaps: soon
    again while a service has no publisher, when the connection to an address port has been made (anew), and now and
    then.  All of it runs in the thread that receives.
    """

    SOON = 2.0  # seconds until the next lookup while something is missing
    SELDOM = 10.0  # otherwise, without listening
    RARELY = 60.0  # otherwise
    PATIENCE = 3  # lookups without a publisher until it is taken for lost
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
        self._services = services
        self._listen = listen
        self._address_port = address_port or config.get("address_publish_port")
        self._resolutions = {host: self._resolution(host) for host in nameservers}
        self._sockets: dict[str, list[zmq.Socket[bytes]]] = {}  # the first is that for lookups
        self._last_answer: dict[str, float] = {}
        self._last_seen: dict[str, dict[str, float]] = {}  # address, nameserver: time
        self._found: set[str] = set()
        self._log = _LimitedLogger("subscriber")
        self._has_warned = False
        self._interval = 0.0
        self.due = time.monotonic() + self.SOON

    def open(self) -> None:
        """Connect to those nameservers whose names resolve; anew to those that have not answered for a long time."""
        now = time.monotonic()
        for host in self._resolutions:
            if host in self._sockets and now - self._last_answer[host] > self.PATIENCE * max(
                self._interval, self.SELDOM
            ):
                for sock in self._sockets.pop(host):
                    self._subscriber._unregister(sock)
                self._resolutions[host] = self._resolution(host)
            endpoint = self._resolutions[host].check()
            if host not in self._sockets and endpoint is not None:
                self._last_answer[host] = now
                self._sockets[host] = [self._open_lookups(host, endpoint)]
                if self._listen:
                    self._sockets[host] += self._open_news(host, endpoint)

    def _resolution(self, host: str) -> _Resolution:
        return _Resolution(_lookup_endpoint(host), self._subscriber._waker.wake)

    def _open_lookups(self, host: str, endpoint: str) -> zmq.Socket[bytes]:
        """Return a socket for lookups at *host*."""
        lookups = set_up_client_socket(zmq.DEALER, endpoint, {zmq.SNDHWM: 2 * len(self._services) + 10})
        self._subscriber._register(lookups, partial(self._take_answer, host))
        return lookups

    def _open_news(self, host: str, endpoint: str) -> list[zmq.Socket[bytes]]:
        """Return sockets that listen to the address port of *host*, and to whether there is a connection."""
        news = set_up_client_socket(zmq.SUB, "")
        news.setsockopt(zmq.SUBSCRIBE, f"{_MAGICK}/address".encode())
        monitor = _open_monitor(news, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._subscriber._register(news, partial(self._take_news, host))
        self._subscriber._register(monitor, self._catch_up)
        news.connect(f"{endpoint.rpartition(':')[0]}:{self._address_port}")
        return [news, monitor]

    def _catch_up(self, frames: list[bytes]) -> None:
        """After a connection to an address port: learn by lookups what was published before.

        A second one follows soon, as the subscription arrives a little later than the connection.
        """
        if struct.unpack("=HI", frames[0])[0] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        self._look_up(self._services)
        self._interval = self.SOON / 2
        self.due = time.monotonic() + self._interval

    def run(self) -> None:
        """Look up what is missing or may have changed; called when it is `due`."""
        self.open()
        missing = self.missing
        if missing and not self._has_warned and self._interval == self.SOON:
            self.warn_of_missing()
        wants_all = "" in self._services
        if missing or self._listen or not wants_all:
            self._look_up(missing if wants_all and not self._listen else self._services)
        self._interval = self.SOON if missing else self.RARELY if self._listen else self.SELDOM
        self.due = time.monotonic() + self._interval

    def warn_of_missing(self) -> None:
        """Warn, once, of services without a publisher; they are looked for all the same."""
        for service in self.missing:
            _log("subscriber").warning("Can't get any address for %s", service or "any service")
        self._has_warned = True

    @property
    def missing(self) -> list[str]:
        """The services that have no publisher yet."""
        return [service for service in self._services if not self._has_publisher(service)]

    def _has_publisher(self, service: str) -> bool:
        return bool(self._last_seen) if service == "" else service in self._found

    def _look_up(self, services: Iterable[str]) -> None:
        """Ask the nameservers; their answers come by and by, behind the first frame of the request (not empty)."""
        for lookup, *_ in self._sockets.values():
            for service in services:
                with suppress(zmq.Again):  # it is down, and enough requests wait for it
                    lookup.send_multipart([b"=" + service.encode(), b"", _request_for(service)], _NOBLOCK)

    def _take_answer(self, host: str, frames: list[bytes]) -> None:
        """Take the answer to a lookup; the first frame comes back as we sent it."""
        if len(frames) != 3:
            self._log.warning("answer", "Skipped an answer of %d frames from the nameserver %s", len(frames), host)
            return
        self._last_answer[host] = time.monotonic()
        service = frames[0][1:].decode("utf-8", "replace")
        entries = _addresses_in(frames[2])
        for entry in entries:
            self.add(host, entry)
        if service in self._services and not entries:
            self._found.discard(service)
        self._forget_lost(host)

    def _forget_lost(self, host: str) -> None:
        """Remove the addresses that *host* has not mentioned for a long time."""
        oldest = time.monotonic() - self.PATIENCE * max(self.SELDOM, self._interval)
        for address, seen in list(self._last_seen.items()):
            if host in seen and seen[host] < oldest:
                self._remove(host, address)

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
        if "" in self._services or any(service in self._services for service in entry["service"]):
            if entry.get("status", True):
                self.add(host, entry)
            else:
                self._remove(host, entry.get("URI"))

    def add(self, host: str, entry: Mapping[str, Any]) -> None:
        """Connect the subscriber to a publisher that *host* told of."""
        address = entry.get("URI")
        backend = entry.get("backend")
        if not _is_remote(address) or _backend_towards(backend) is None:
            self._log.warning("address", "Skipped the address %.200r with the backend %.200r", address, backend)
            return
        assert isinstance(address, str)
        services = entry.get("service")
        self._found.update(item for item in services if isinstance(item, str)) if isinstance(services, list) else None
        if address not in self._last_seen:
            if len(self._last_seen) >= self.LIMIT:
                self._log.warning("limit", "More than %d publishers: %s is not used", self.LIMIT, address)
                return
            if address in self._subscriber.addresses:
                return  # one that the program itself has added, and may remove
            try:
                self._subscriber.add({"URI": address, "backend": backend})
            except ConfigurationError as error:  # the keys are just being replaced
                self._log.warning("keys", "Cannot connect to %s (trying again): %s", address, error)
                return
            _log("subscriber").info("New publisher at %s", address)
        self._last_seen.setdefault(address, {})[host] = time.monotonic()

    def _remove(self, host: str, address: Any) -> None:
        """Take note that *host* no longer knows *address*, and remove it if nobody does."""
        if not isinstance(address, str):
            return
        seen = self._last_seen.get(address)
        if seen is not None and seen.pop(host, None) is not None and not seen:
            del self._last_seen[address]
            _log("subscriber").info("The publisher at %s is gone", address)
            self._subscriber.remove(address)


class NSSubscriber:
    """Subscribes to services: asks the nameserver for their addresses, and follows them.

    Args:
        services: The names of the services; ``""`` for all, None for none.
        topics: The beginnings of the subjects to subscribe to.
        addr_listener: Add publishers as they appear on the network, and remove those that vanish.  Without it,
            named services are looked up again from time to time.
        addresses: Addresses to subscribe to in addition.
        timeout: How long to wait for the addresses at the start, in seconds.
        translate: Put the host of the publisher's address in place of the host of the sender.
        nameserver: The host to ask, or a list of them (their answers are merged, one that is down is left out).
            ``host:port`` for one that answers on another port than configured.
        message_filter: Called with each message; those for which it returns a false value are skipped.
    """

    def __init__(
        self,
        services: str | Sequence[str] | None = "",
        topics: str | Sequence[str] | None = _MAGICK,
        addr_listener: bool = False,
        addresses: str | Sequence[Any] | None = None,
        timeout: float = 10,
        translate: bool = False,
        nameserver: str | Sequence[str] = "localhost",
        message_filter: Callable[[Message], Any] | None = None,
    ) -> None:
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
            subscriber = Subscriber(
                self._addresses, self._topics, message_filter=self._filter, translate=self._translate
            )
            try:
                if self._services and self._nameserver:
                    self._follow(subscriber)
            except BaseException:
                subscriber.close()
                raise
            self._subscriber = subscriber
        return self._subscriber

    def _follow(self, subscriber: Subscriber) -> None:
        """Have *subscriber* follow the services, and wait until they are found."""
        _load_client_keys()  # what is wrong with them is an error now, not where the messages are received
        hosts = [self._nameserver] if isinstance(self._nameserver, str) else list(self._nameserver)
        follower = _Follower(subscriber, self._services, hosts, self._addr_listener, self._address_port)
        deadline = time.monotonic() + self._timeout
        while follower.missing and time.monotonic() < deadline:
            for service in follower.missing:
                try:
                    left = max(deadline - time.monotonic(), 0.001)
                    for entry in get_pub_addresses([service], left, self._nameserver):
                        follower.add(hosts[0], entry)
                        if service:
                            follower._found.add(service)
                except TimeoutError as error:
                    _log("subscriber").warning("%s", error)
                    break
            if follower.missing:
                time.sleep(max(min(0.1, deadline - time.monotonic()), 0))
        if self._timeout > 0:
            follower.warn_of_missing()
        follower.open()
        if follower.missing:
            follower.run()
        subscriber._timers.append(follower)

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
        self.stop()


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
        translate: bool = False,
        nameserver: str | Sequence[str] | bool | None = "localhost",
        message_filter: Callable[[Message], Any] | None = None,
    ) -> None:
        settings = {
            "services": services,
            "topics": topics,
            "addr_listener": addr_listener,
            "addresses": addresses,
            "timeout": timeout,
            "translate": translate,
            "nameserver": nameserver,
            "message_filter": message_filter,
        }
        self.subscriber = create_subscriber_from_dict_config(settings)

    def __enter__(self) -> Subscriber:
        return self.subscriber

    def __exit__(self, *exc_info: object) -> None:
        self.subscriber.close()


def create_subscriber_from_dict_config(settings: Mapping[str, Any]) -> Subscriber:
    """Create a subscriber from a dictionary of settings.

    - ``addresses`` a non-empty list and ``nameserver`` False: subscribes to these addresses only;
    - otherwise: asks ``nameserver`` (a host, by default localhost) for the ``services``.

    Args:
        settings: ``services``, ``topics``, ``addr_listener``, ``addresses``, ``timeout``, ``translate``,
            ``nameserver``, ``message_filter``, as documented for the classes.

    Raises:
        TypeError: There is another key, and no nameserver is to be asked.
        ValueError: An address cannot be used.
    """
    nameserver = settings.get("nameserver")
    if nameserver is False and settings.get("addresses"):
        known = "addresses topics message_filter translate nameserver services addr_listener timeout port"
        _refuse_unknown(settings, "Subscriber", known)
        return Subscriber(
            settings["addresses"],
            topics=settings.get("topics", ""),
            message_filter=settings.get("message_filter"),
            translate=settings.get("translate", False),
        )
    return NSSubscriber(
        services=settings.get("services", ""),
        topics=settings.get("topics", _MAGICK),
        addr_listener=settings.get("addr_listener", False),
        addresses=settings.get("addresses"),
        timeout=settings.get("timeout", 10),
        translate=settings.get("translate", False),
        nameserver=nameserver or "localhost",
        message_filter=settings.get("message_filter"),
    ).start()


# ======================================================================================================================
# 9. Listening
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
    """

    def __init__(
        self,
        topics: str | Sequence[str] | None = None,
        queue: Any = None,
        addresses: str | Sequence[Any] | None = None,
        nameserver: str | Sequence[str] | bool | None = "localhost",
        services: str | Sequence[str] | None = "",
    ) -> None:
        self.topics = topics
        self.queue = queue
        self.addresses = addresses
        self.nameserver = nameserver
        self.services = services
        self.subscriber: Subscriber | None = None
        self.running = False
        self._lock = threading.RLock()
        self._is_stopped = False
        self.logger = logging.getLogger(f"{__name__}.listener.Listener")

    def create_subscriber(self) -> None:
        """Create the subscriber; what it does not find at once, it finds while it receives."""
        if self.subscriber is None:
            settings = {
                "services": self.services,
                "topics": self.topics or "",
                "addr_listener": True,
                "addresses": self.addresses,
                "timeout": 0,
                "nameserver": self.nameserver,
            }
            subscriber = create_subscriber_from_dict_config(settings)
            with self._lock:
                self.subscriber = subscriber
                if self._is_stopped:
                    self._close()

    def add_to_queue(self, msg: Message) -> None:
        """Put a message into the queue."""
        self.queue.put(msg)

    def run(self) -> None:
        """Receive messages, until `stop` is called."""
        self.logger.debug("Starting to listen to %s", self.topics)
        self.running = True
        try:
            self.create_subscriber()
            subscriber = self.subscriber
            for message in subscriber.recv() if subscriber is not None else ():
                if message is not None:
                    self.add_to_queue(message)
        finally:
            self.running = False
            with self._lock:
                self._close()

    def _close(self) -> None:
        subscriber, self.subscriber = self.subscriber, None
        if subscriber is not None:
            subscriber.close()

    def stop(self) -> None:
        """End `run`."""
        with self._lock:
            self._is_stopped = True
            subscriber = self.subscriber
        if subscriber is not None:
            subscriber.close()  # for good: run() may be about to receive

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
        nameserver: str | Sequence[str] | bool | None = "localhost",
        services: str | Sequence[str] | None = "",
    ) -> None:
        self.logger = logging.getLogger(f"{__name__}.listener.ListenerContainer")
        self.output_queue: queue.Queue[Message] = queue.Queue()
        self.listener: Listener
        self.thread: threading.Thread | None = None
        self._settings = {"addresses": addresses, "nameserver": nameserver, "services": services}
        self._start(topics)

    def _start(self, topics: str | Sequence[str] | None) -> None:
        self.listener = Listener(topics=topics, queue=self.output_queue, **cast(Any, self._settings))
        self.listener.create_subscriber()  # here, so that a wrong argument is an error of this call
        self.thread = threading.Thread(target=self.listener.run, name="posttroll listener", daemon=True)
        self.thread.start()

    def restart_listener(self, topics: str | Sequence[str] | None) -> None:
        """Listen to other topics; the queue stays."""
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
# 10. Logging over messages
# ======================================================================================================================

BLACK, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE = range(8)
COLORS = {"WARNING": YELLOW, "INFO": GREEN, "DEBUG": BLUE, "CRITICAL": MAGENTA, "ERROR": RED}
RESET_SEQ = "\033[0m"
COLOR_SEQ = "\033[1;%dm"


def _colored(text: str, color: int) -> str:
    """Return *text* in a colour, by ANSI escape sequences."""
    return COLOR_SEQ % (30 + color) + text + RESET_SEQ


class PytrollFormatter(logging.Formatter):
    """Formats log records as messages: subject ``/log/LEVEL/NAME``, type ``log.level``, data the text.

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
        return Message(f"/log/{record.levelname}/{name}", f"log.{record.levelname.lower()}", text).encode()


class PytrollHandler(logging.Handler):
    """Publishes log records.

    Args:
        name: The name of the publisher.
        port: Its port, 0 for a free one.
    """

    def __init__(self, name: str, port: int = 0) -> None:
        super().__init__()
        self._publisher = NoisyPublisher(name, port)
        self._publisher.start()
        self.setFormatter(PytrollFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Publish *record*."""
        try:
            self._publisher.send(self.format(record))
        except Exception:  # a log handler must not stop the program that logs; this prints the error
            self.handleError(record)

    def close(self) -> None:
        """Stop the publisher."""
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
            record.levelname = _colored(record.levelname, COLORS[record.levelname])
        return super().format(record)


class Logger:
    """Logs the messages of all publishers, in a thread of its own.

    Args:
        nameserver_address: The host of the nameserver.
        nameserver_port: The port on which it publishes new addresses.
    """

    def __init__(self, nameserver_address: str = "localhost", nameserver_port: int = 16543) -> None:
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
            if kind == "log" and level.upper() in COLORS:
                number = cast(int, getattr(logging, level.upper()))
                logging.getLogger(message.subject.rpartition("/")[2]).log(
                    number, "%s: %s", message.sender, message.data
                )
            else:
                number = logging.DEBUG if message.type == "beat" else logging.INFO
                _log("logger").log(number, "%s", message)

    def stop(self) -> None:
        """Stop to log."""
        subscriber, self._subscriber = self._subscriber, None
        thread, self._thread = self._thread, None
        if subscriber is not None:
            subscriber.close()
        if thread is not None:
            thread.join(5)


def run_logger(args: Sequence[str] | None = None) -> int:
    """Run ``pytroll-logger``: log the messages of all publishers.

    Args:
        args: The command-line arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="pytroll-logger", description="Log the messages of all publishers.")
    _add_logger_arguments(parser)
    return _run_logger(parser.parse_args(args))


def _add_logger_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-r", "--rotated", help="Time rotated log file")
    parser.add_argument("-v", "--verbose", action="store_true", help="print debug messages too")
    parser.add_argument("-s", "--server", default="localhost", help="server to listen to")
    parser.add_argument("-p", "--port", type=int, default=None, help="port to listen to")


def _run_logger(options: argparse.Namespace) -> int:
    text = "[%(levelname)s: %(asctime)s : %(name)s] %(message)s"
    if options.rotated:
        from logging.handlers import TimedRotatingFileHandler

        handler: logging.Handler = TimedRotatingFileHandler(options.rotated, when="midnight", backupCount=7)
        handler.setFormatter(logging.Formatter(text))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(ColoredFormatter(text, use_color=_wants_color(sys.stdout)))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    logger = Logger(options.server, options.port or config.get("address_publish_port"))
    try:
        logger.start()
        waker = _Waker()
        with _signals_call(waker.wake), _signals_wake(waker):
            zmq.select([waker.fileno()], [], [])
        waker.close()
    finally:
        logger.stop()
        root.removeHandler(handler)
        handler.close()
    return 0


def _wants_color(stream: Any) -> bool:
    """Whether to colour what goes to *stream*: it is a terminal, and NO_COLOR (https://no-color.org) is not set."""
    return bool(not os.environ.get("NO_COLOR") and hasattr(stream, "isatty") and stream.isatty())


@contextmanager
def _signals_wake(waker: _Waker) -> Iterator[None]:
    """Have every signal wake *waker*: one that comes just before a poll begins (on Windows: any) does not end it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    previous = signal.set_wakeup_fd(waker.write_fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)


@contextmanager
def _signals_call(end: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call *end*, which must be safe to call from a signal handler."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: end()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ======================================================================================================================
# 11. Testing helpers
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

    def fake_follow(self: NSSubscriber, subscriber: Subscriber) -> None:
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
# 12. Command line
#
# Results go to stdout, talk goes to stderr, and the exit status is 0 only on success.
# ======================================================================================================================


class _CommandError(Exception):
    """What went wrong with a command, and what to do about it; ends it with exit status 1."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``posttroll COMMAND``.

    Args:
        args: The command-line arguments; by default those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["nameserver"]:
        try:
            nameserver = _nameserver_module()
        except ImportError as error:
            print(f"posttroll: the nameserver needs posttroll_ns.py beside this file: {error}", file=sys.stderr)
            return 1
        return cast(int, nameserver.main(words[1:]))
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    # argparse takes no more words of a list after an option between them.
    if any(word.startswith("-") and word != "-" for word in rest) or (rest and not hasattr(options, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(options, options.words).extend(rest)
    try:
        with config.set(dict(options.set)):
            return cast(int, options.run(options))
    except (_CommandError, ConfigurationError, NotImplementedError, MessageError, zmq.ZMQError, TimeoutError) as error:
        _talk(f"posttroll {options.command}: {error}")
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        _talk(f"posttroll {options.command}: {error}")
    return 1


def _nameserver_module() -> Any:
    """Return the module ``posttroll_ns``, imported when it is used for the first time."""
    return importlib.import_module(f"{__name__}_ns")


def _talk(text: str) -> None:
    """Tell something that is not a result."""
    print(text, file=sys.stderr, flush=True)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """Return what formats help, with the width given: to find it, argparse imports more than it is itself."""
    import argparse

    try:
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (ValueError, OSError):  # no number, no terminal
        width = 0
    return argparse.RawDescriptionHelpFormatter(prog, width=(width or 80) - 2)


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="posttroll",
        description="Messages between programs over ZeroMQ.",
        formatter_class=_help_formatter,
    )
    parser.add_argument("--version", action="version", version=f"posttroll {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[Any], int], help_text: str, examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog="examples:\n" + examples if examples else None,
            formatter_class=_help_formatter,
        )
        command.add_argument("--nameserver", metavar="HOST", action="append", help="nameserver to use (localhost)")
        command.add_argument("--no-color", action="store_true", help="no colours (also with NO_COLOR set)")
        command.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], type=_assignment, help="set a configuration key"
        )
        command.set_defaults(run=run)
        return command

    publish = add("publish", _run_publish, "publish messages", _PUBLISH_EXAMPLES)
    publish.add_argument("subject", nargs="?", metavar="SUBJECT", help="for example /segment/hrit")
    publish.add_argument("type", nargs="?", metavar="TYPE", help="for example file")
    publish.add_argument("data", nargs="*", metavar="DATA", help="text, KEY=VALUE pairs, or - for stdin")
    publish.set_defaults(words="data")
    form = publish.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="DATA is JSON")
    form.add_argument("--text", action="store_true", help="DATA is text, even if it looks like KEY=VALUE")
    publish.add_argument("--file", metavar="FILE", help="read DATA from a file")
    publish.add_argument("--lines", action="store_true", help="each line of the file or stdin is a message of its own")
    publish.add_argument("--service", default="posttroll", help="name of the publisher (posttroll)")
    publish.add_argument("--port", type=int, default=0, help="port to publish on (a free one)")
    publish.add_argument("--nameservers", metavar="HOST", nargs="+", help="register there; 'none': announce nowhere")
    publish.add_argument("--wait", metavar="SECONDS", type=float, default=10.0, help="for subscribers (10)")
    publish.add_argument("--subscribers", metavar="N", type=int, default=1, help="how many to wait for (1)")
    publish.add_argument("--replay", metavar="FILE", help="publish what 'subscribe --raw' has recorded (- for stdin)")
    publish.add_argument("--speed", type=float, default=1.0, metavar="X", help="of the replay; 0 without pauses (1)")

    subscribe = add("subscribe", _run_subscribe, "print messages as they come", _SUBSCRIBE_EXAMPLES)
    subscribe.add_argument("topics", nargs="*", metavar="TOPIC", help="beginning of the subjects (all)")
    subscribe.add_argument("--service", action="append", help="name of a publisher (all)")
    subscribe.add_argument("--address", action="append", help="address of a publisher, no nameserver is asked")
    subscribe.add_argument("--type", action="append", help="only messages of this type")
    subscribe.add_argument("-n", "--count", type=int, help="end after so many messages")
    subscribe.add_argument("--timeout", metavar="SECONDS", type=float, help="end after so long without a message")
    subscribe.set_defaults(words="topics")
    form = subscribe.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--raw", action="store_true", help="one encoded message a line, for 'publish --replay'")

    services = add("services", _run_services, "list what the nameserver knows", _SERVICES_EXAMPLES)
    services.add_argument("names", nargs="*", metavar="NAME", help="only these services")
    services.add_argument("--json", action="store_true", help="as JSON")
    services.add_argument("--watch", nargs="?", const=2.0, type=float, metavar="SECONDS", help="again and again (2)")
    services.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for the nameserver (5)")

    top = add("top", _run_top, "show who publishes how much, live; q quits", _TOP_EXAMPLES)
    top.add_argument("topics", nargs="*", metavar="TOPIC", help="beginning of the subjects (all)")
    top.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two views (2)")
    top.add_argument("-n", "--count", type=int, help="end after so many views (1 without a terminal)")

    doctor = add("doctor", _run_doctor, "find out why programs do not hear each other", _DOCTOR_EXAMPLES)
    doctor.add_argument("--no-multicast", action="store_true", help="the nameserver here runs with --no-multicast")

    settings = add("config", _run_config, "show the configuration: value, source, default, meaning", _CONFIG_EXAMPLES)
    settings.add_argument("keys", nargs="*", metavar="KEY", help="only these keys")
    settings.add_argument("--json", action="store_true", help="as JSON")

    demo = add(
        "demo", _run_demo, "run a nameserver, a publisher and a subscriber on this machine", "  posttroll demo\n"
    )
    demo.add_argument("--role", choices=["publisher", "subscriber"], help=argparse.SUPPRESS)
    _add_key_arguments(
        add("generate-keys", _run_generate_keys, "make a pair of keys for the secure backend", _KEY_EXAMPLES)
    )
    _add_logger_arguments(add("logger", _run_logger, "log the messages of all publishers", _LOGGER_EXAMPLES))
    commands.add_parser("nameserver", help="run the nameserver ('nameserver --help' tells more)", add_help=False)
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``, for argparse."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if key.replace("-", "_") not in OPTIONS:
        raise argparse.ArgumentTypeError(f"there is no key {key!r}; 'posttroll config' shows all")
    return key, _literal(value)


_PUBLISH_EXAMPLES = """\
  posttroll publish /alarm info "disk is full"
  posttroll publish /segment file uri=/data/a.nc size=1200 --service receiver --nameservers localhost
  posttroll publish /segment file --json '{"uri": "/data/a.nc"}'
  tail -f log | posttroll publish /log info - --lines
  posttroll publish --replay recorded --speed 10
"""
_SUBSCRIBE_EXAMPLES = """\
  posttroll subscribe /segment --service receiver
  posttroll subscribe --json | jq .data.uri
  posttroll subscribe -n 1 --timeout 60 /alarm || echo nothing
  posttroll subscribe --raw > recorded
"""
_SERVICES_EXAMPLES = """\
  posttroll services
  posttroll services --nameserver otherhost --json
  posttroll services --watch
"""
_TOP_EXAMPLES = """\
  posttroll top
  posttroll top /segment --interval 10 -n 6 > load.txt
"""
_DOCTOR_EXAMPLES = """\
  posttroll doctor
  posttroll doctor --nameserver otherhost
  POSTTROLL_BACKEND=secure_zmq posttroll doctor --no-multicast
"""
_KEY_EXAMPLES = """\
  posttroll generate-keys server -d ~/keys
"""
_LOGGER_EXAMPLES = """\
  posttroll logger
  posttroll logger -s otherhost -r /var/log/posttroll.log
"""
_CONFIG_EXAMPLES = """\
  posttroll config
  posttroll config backend mc_group
  posttroll config --set nameserver_port=5600 --json
"""


def _nameservers(options: argparse.Namespace) -> list[str]:
    """Return the nameservers to ask."""
    return options.nameserver or ["localhost"]


def _table(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


# -- publish --


def _run_publish(options: argparse.Namespace) -> int:
    if options.replay:
        messages: Iterable[Message] = _read_recording(options.replay)
    elif options.subject is None or options.type is None:
        raise _CommandError("SUBJECT and TYPE are needed (or --replay FILE).")
    else:
        messages = _messages_to_publish(options)
    hosts = [*(options.nameservers or []), *(options.nameserver or [])]
    nameservers: Any = False if hosts == ["none"] else hosts or None
    if nameservers is False and not options.port:
        raise _CommandError("--nameservers none needs --port, else nobody could find the publisher.")
    count = 0
    with Publish(options.service, options.port, nameservers=nameservers) as publisher, _progress(messages) as following:
        if options.subscribers > 0 and not publisher.wait_for_subscribers(options.subscribers, options.wait):
            found = publisher.subscriber_count
            raise _CommandError(
                f"{found} of {options.subscribers} subscribers after {options.wait:g} s: nothing was sent."
            )
        subscribers = publisher.subscriber_count
        for message in following:
            if options.replay:
                _keep_pace(message, options.speed)
            publisher.send(message)
            count += 1
        # Those that came later count too, and those that have left after they got what they wanted.
        subscribers, dropped = max(subscribers, publisher.subscriber_count), publisher.dropped
    _talk(f"{count} message{'s' * (count != 1)} to {subscribers} subscriber{'s' * (subscribers != 1)}")
    if dropped:
        raise _CommandError(f"{dropped} messages were lost: a subscriber was too slow.")
    return 0


def _messages_to_publish(options: argparse.Namespace) -> Iterator[Message]:
    """Yield the messages that the command line describes."""
    from_stdin = options.data == ["-"]
    if not from_stdin and not options.file:
        yield Message(options.subject, options.type, _data_of_words(options))
        return
    if options.file and options.data:
        raise _CommandError("DATA are given twice: on the command line and by --file.")
    stream = sys.stdin if from_stdin else open(options.file, encoding="utf-8")  # noqa: SIM115
    with stream:
        texts = (line.rstrip("\n") for line in stream) if options.lines else iter([stream.read()])
        for text in texts:
            yield Message(options.subject, options.type, _parse_json(text) if options.json else text)


def _data_of_words(options: argparse.Namespace) -> Any:
    """Return the data that the words on the command line stand for."""
    words = options.data
    if options.json:
        return _parse_json(" ".join(words))
    if words and not options.text and all(re.match(r"[A-Za-z_][\w.-]*=", word) for word in words):
        return {key: _json_or_text(value) for key, _, value in (word.partition("=") for word in words)}
    return " ".join(words)


def _parse_json(text: str) -> Any:
    try:
        return datetime_decoder(_from_json(text.strip()))
    except (ValueError, RecursionError) as error:
        raise _CommandError(f"DATA is no JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    try:
        return _from_json(text)
    except (ValueError, RecursionError):
        return text


def _recorded(message: Message) -> str:
    """Return a message as one line; one with line breaks in it is escaped, and begins with a backslash."""
    text = message.encode()
    if "\n" not in text and "\r" not in text:
        return text
    return "\\" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _read_recording(path: str) -> list[Message]:
    """Return the messages that were recorded, one a line."""
    escapes = {"\\n": "\n", "\\r": "\r", "\\\\": "\\"}
    with sys.stdin if path == "-" else open(path, encoding="utf-8", newline="\n") as stream:
        messages = []
        for number, line in enumerate(stream, 1):
            text = line.rstrip("\n")
            if text.startswith("\\"):
                text = re.sub(r"\\[nr\\]", lambda match: escapes[match[0]], text[1:])
            try:
                messages.append(Message.decode(text))
            except MessageError as error:
                raise _CommandError(f"{path}, line {number}: {error}") from None
    return messages


_replay_start: list[float] = []


def _keep_pace(message: Message, speed: float) -> None:
    """Wait as long after the first message of a replay as it was then, at *speed* times the speed."""
    if speed <= 0:
        return
    sent = message.time.replace(tzinfo=message.time.tzinfo or timezone.utc).timestamp()
    if not _replay_start:
        _replay_start[:] = [time.monotonic(), sent]
    delay = _replay_start[0] + (sent - _replay_start[1]) / speed - time.monotonic()
    if delay > 0:
        time.sleep(delay)


@contextmanager
def _progress(messages: Iterable[Message]) -> Iterator[Iterable[Message]]:
    """Show a progress bar on a terminal, if it is known how many messages there are."""
    if not isinstance(messages, list) or not sys.stderr.isatty():
        yield messages
        return
    total = len(messages)

    def shown() -> Iterator[Message]:
        last = 0.0
        for number, message in enumerate(cast("list[Message]", messages), 1):
            yield message
            if time.monotonic() - last > 0.1 or number == total:
                last = time.monotonic()
                filled = 30 * number // total
                bar = "#" * filled + "." * (30 - filled)
                print(f"\r[{bar}] {number}/{total}", end="", file=sys.stderr, flush=True)

    try:
        yield shown()
    finally:
        print(file=sys.stderr)


# -- subscribe --


def _run_subscribe(options: argparse.Namespace) -> int:
    color = _wants_color(sys.stdout) and not options.no_color
    if options.json:
        form: Callable[[Message], str] = _as_json_line
    elif options.raw or not sys.stdout.isatty():
        form = _recorded
    else:
        form = partial(_as_readable, color=color)

    def is_wanted(message: Message) -> bool:
        return not options.type or message.type in options.type

    if options.address:
        subscriber = Subscriber(options.address, options.topics or "", message_filter=is_wanted)
    else:
        services = options.service or [""]
        following = NSSubscriber(services, options.topics or "", True, None, 0, False, _nameservers(options), is_wanted)
        subscriber = following.start()
    received = 0
    with subscriber, _signals_call(subscriber.close):
        for message in subscriber.recv(options.timeout):
            if message is None:
                break
            print(form(message), flush=True)
            received += 1
            if received == options.count:
                break
    wanted = options.count or (1 if options.timeout is not None else 0)
    if received < wanted:
        _talk(f"posttroll subscribe: {received} of {wanted} messages came")
        return 1
    return 0


def _as_json_line(message: Message) -> str:
    """Return a message as a JSON object on one line; bytes as a base64 data URL."""
    data = message.data
    if isinstance(data, bytes):
        data = "".join(_encode_binary(data))
    fields = {"subject": message.subject, "type": message.type, "sender": message.sender, "time": message.time}
    return _dumps({**fields, "version": message.version, "data": data}, "v1.2")[0]


def _as_readable(message: Message, color: bool) -> str:
    """Return a message as lines for people."""
    moment = message.time.astimezone() if message.time.tzinfo else message.time
    subject, kind = message.subject, message.type
    if color:
        subject, kind = _colored(subject, GREEN), _colored(kind, YELLOW)
    head = f"{moment:%H:%M:%S} {subject} {kind} {message.sender}"
    data = message.data
    if isinstance(data, dict):
        width = max((len(key) for key in data), default=0)
        names = ((key, _colored(key.ljust(width), CYAN) if color else key.ljust(width)) for key in data)
        return "\n".join([head, *(f"    {name}  {_printable(data[key])}" for key, name in names)])
    return f"{head} {_printable(data)}" if data != "" else head


def _printable(value: Any) -> str:
    """Return a value on one line, without characters that a terminal would obey."""
    text = value if isinstance(value, str) else value.isoformat() if isinstance(value, datetime) else repr(value)
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# -- services --


def _run_services(options: argparse.Namespace) -> int:
    while True:
        found: dict[str, dict[str, Any]] = {}
        for name in options.names or [""]:
            for entry in get_pub_address(name, options.timeout, _nameservers(options)):
                found[entry["URI"]] = entry
        answers = _check_publishers(list(found))
        rows = [_describe_service(entry, answers[address]) for address, entry in found.items()]
        rows.sort(key=lambda row: (row["name"], row["address"]))
        if options.watch and sys.stdout.isatty():
            print("\033[H\033[J", end="")
        if options.json:
            print(_dumps(rows, "v1.2")[0], flush=True)
        else:
            color = _wants_color(sys.stdout) and not options.no_color
            print("\n".join(_services_table(rows, color)), flush=True)
        if not options.watch:
            return 0
        time.sleep(options.watch)


def _describe_service(entry: Mapping[str, Any], answers: bool) -> dict[str, Any]:
    """Return what is known of a publisher, from an entry of a nameserver's answer."""
    services = [str(service) for service in entry.get("service", []) if service]
    name = entry.get("name")
    if not isinstance(name, str) or name == "address":  # which other nameservers say of every publisher
        name = services[0] if services else ""
    received = entry.get("receive_time")
    age = None
    if isinstance(received, datetime):
        received = received.replace(tzinfo=received.tzinfo or timezone.utc)
        age = round((datetime.now(timezone.utc) - received).total_seconds(), 1)
    return {
        "name": name,
        "aliases": [service for service in services if service != name],
        "address": entry["URI"],
        "backend": entry.get("backend"),
        "version": entry.get("supported_message_version"),
        "age": age,
        "answers": answers,
    }


def _services_table(rows: Sequence[Mapping[str, Any]], color: bool) -> list[str]:
    """Return the lines of the table; its last column is the only one in colour, so the widths stay right."""
    cells = []
    for row in rows:
        age = "" if row["age"] is None else f"{row['age']:.0f} s"
        line = [row["name"], ",".join(row["aliases"]), row["address"], row["backend"] or "", row["version"] or "", age]
        word = "yes" if row["answers"] else "no"
        cells.append([*map(_printable, line), _colored(word, GREEN if row["answers"] else RED) if color else word])
    return _table(cells, ("NAME", "ALIASES", "ADDRESS", "BACKEND", "VERSION", "AGE", "ANSWERS"))


def _check_publishers(addresses: Sequence[str]) -> dict[str, bool]:
    """Return which of the addresses are answered by a ZeroMQ socket, all of them asked at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=32) as pool:
        return dict(zip(addresses, pool.map(lambda address: _greeting_of(address)[:1] == b"\xff", addresses)))


def _greeting_of(address: str, timeout: float = 1.0) -> bytes:
    """Return the beginning of the ZMTP greeting at *address*, empty if nobody answers.

    A greeting (https://rfc.zeromq.org/spec/23) is 64 bytes: signature, version, mechanism; the first part of it comes
    at once, the mechanism after we have greeted too.
    """
    tcp = _split_tcp(address)
    if tcp is None:
        return b""
    greeting = b""
    try:
        with socket.create_connection(tcp, timeout) as connection:
            connection.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL".ljust(64, b"\0"))
            while len(greeting) < 64:
                part = connection.recv(64 - len(greeting))
                if not part:
                    break
                greeting += part
    except OSError:
        pass  # what has come so far tells enough
    return greeting


# -- top --


class _Traffic:
    """What one publisher sent under one subject since the last view."""

    def __init__(self) -> None:
        self.messages = self.size = 0
        self.last = 0.0


class _CountingSubscriber(Subscriber):
    """Counts messages by the address that they came from, for which it has a socket for each address."""

    def __init__(self, topics: Sequence[str]) -> None:
        super().__init__([], topics or "", translate=True)
        self.traffic: dict[tuple[str, str], _Traffic] = {}
        self.beats: dict[str, tuple[float, float]] = {}

    def _translate_sender(self, message: Message, sock: zmq.Socket[bytes]) -> None:
        address = next((key[2] for key, other in self._groups.items() if other is sock), "")
        traffic = self.traffic.setdefault((address, message.subject), _Traffic())
        traffic.messages += 1
        traffic.size += len(message._raw or "")
        traffic.last = time.monotonic()
        interval = message.data.get("min_interval") if isinstance(message.data, dict) else None
        if message.type == "beat" and isinstance(interval, (int, float)):
            self.beats[address] = (traffic.last, max(float(interval), 1.0))

    def count(self, seconds: float) -> bool:
        """Count what comes in so many seconds; return False if it was stopped before."""
        for traffic in self.traffic.values():
            traffic.messages = traffic.size = 0
        deadline = time.monotonic() + seconds
        return any(time.monotonic() >= deadline for _ in self.recv(0.1))

    def missed_beats(self, address: str) -> str:
        """Return how many heartbeats of a publisher are overdue, empty if it sends none."""
        if address not in self.beats:
            return ""
        last, interval = self.beats[address]
        return str(max(int((time.monotonic() - last) / interval - 0.5), 0))


def _run_top(options: argparse.Namespace) -> int:
    on_terminal = sys.stdout.isatty()
    views = options.count or (None if on_terminal else 1)
    subscriber = _CountingSubscriber(options.topics)
    follower = _Follower(subscriber, [""], _nameservers(options), listen=True)
    names: dict[str, str] = {}
    with subscriber, _signals_call(subscriber.close), _keys_call({"q": subscriber.close}, subscriber):
        follower.open()
        follower.run()
        subscriber._timers.append(follower)
        while subscriber.count(options.interval):
            with suppress(TimeoutError):
                for entry in get_pub_address("", 1, _nameservers(options)):
                    names[entry["URI"]] = _describe_service(entry, True)["name"]
            _show(_top_lines(subscriber, names, options.interval), on_terminal)
            views = None if views is None else views - 1
            if views == 0:
                break
    return 0


def _show(lines: list[str], on_terminal: bool) -> None:
    """Print a view: on a terminal in place of the one before, as much as fits."""
    if on_terminal:
        import shutil

        size = shutil.get_terminal_size()
        width, height = size.columns or 80, size.lines or 24  # a terminal may not know its size
        lines = [line[: width - 1] for line in lines[: height - 1]]
        print("\033[H\033[J" + "\n".join(lines), flush=True)
    else:
        print("\n".join(lines) + "\n", flush=True)


@contextmanager
def _keys_call(actions: Mapping[str, Callable[[], None]], subscriber: Subscriber) -> Iterator[None]:
    """Have single keys, without Enter, call something while *subscriber* receives; if there is a terminal for it."""
    try:
        import termios
        import tty
    except ImportError:  # Windows: Control-C ends it
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def watch() -> None:
        while not subscriber._is_closed:
            if zmq.select([descriptor], [], [], 0.1)[0]:
                actions.get(os.read(descriptor, 1).decode("ascii", "replace"), lambda: None)()

    watcher = threading.Thread(target=watch, name="posttroll keys", daemon=True)
    try:
        tty.setcbreak(descriptor)
        watcher.start()
        yield
    finally:
        subscriber.close()
        watcher.join(1)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _top_lines(subscriber: _CountingSubscriber, names: Mapping[str, str], seconds: float) -> list[str]:
    """Return the lines of a view, the busiest first."""
    now = time.monotonic()
    rows = []
    for (address, subject), traffic in sorted(subscriber.traffic.items(), key=lambda item: -item[1].messages):
        rates = f"{traffic.messages / seconds:.1f}", f"{traffic.size / seconds:.0f}"
        cells = [names.get(address, ""), address, subject, *rates, f"{now - traffic.last:.0f} s ago"]
        rows.append([*map(_printable, cells), subscriber.missed_beats(address)])
    total = sum(traffic.messages for traffic in subscriber.traffic.values()) / seconds
    count = len(subscriber.addresses)
    head = f"posttroll top - {datetime.now():%H:%M:%S}  {count} publishers  {total:.1f} messages/s"
    headings = ("PUBLISHER", "ADDRESS", "SUBJECT", "MSG/S", "BYTES/S", "LAST SEEN", "BEATS MISSED")
    return [head, "", *_table(rows, headings)]


# -- config --


def _run_config(options: argparse.Namespace) -> int:
    known = [*OPTIONS, *sorted(set(config.to_dict()) - set(OPTIONS))]
    unknown = [key for key in options.keys if key.replace("-", "_") not in known]
    if unknown:
        raise _CommandError(f"there is no key {', '.join(unknown)}.")
    rows = []
    for key in [key.replace("-", "_") for key in options.keys] or known:
        value, source = config.lookup(key, check=False)
        option = OPTIONS.get(key, _Option(None, "", "not a key of posttroll"))
        rows.append(
            {"key": key, "value": value, "source": source, "default": option.default, "meaning": option.meaning}
        )
    if options.json:
        print(json.dumps(rows, default=str))
    else:
        cells = [["" if cell is None else str(cell) for cell in row.values()] for row in rows]
        print("\n".join(_table(cells, ("KEY", "VALUE", "SOURCE", "DEFAULT", "MEANING"))))
    return 0


# -- doctor --


class _Doctor:
    """Runs checks, and tells of each in a line what it found and, if something is wrong, what to do."""

    def __init__(self, nameservers: Sequence[str], multicast: bool, color: bool) -> None:
        self.nameservers = nameservers
        self.multicast = multicast
        self._color = color
        self.failures = 0
        self._is_answered = False

    def say(self, verdict: str, check: str, finding: str, remedy: str = "") -> None:
        """Print the line of a check; *verdict* is ``ok``, ``note`` or ``FAIL``."""
        self.failures += verdict == "FAIL"
        word = verdict.ljust(4)
        if self._color:
            word = _colored(word, {"ok": GREEN, "note": YELLOW}.get(verdict, RED))
        print(f"{word}  {check}: {finding}{'  -> ' + remedy if remedy else ''}", flush=True)

    def run(self) -> None:
        """Run all the checks."""
        for check in (
            self.check_configuration,
            self.check_own_address,
            self.check_multicast,
            self.check_keys,
            self.check_ports,
            self.check_nameservers,
            self.check_round_trip,
        ):
            try:
                check()
            except (ConfigurationError, NotImplementedError) as error:
                self.say("FAIL", check.__name__[6:].replace("_", " "), str(error), "correct this setting")

    def check_configuration(self) -> None:
        """Say what is configured and where, and what cannot be used."""
        for key in config.to_dict():
            value, source = config.lookup(key, check=False)
            if key not in OPTIONS:
                self.say(
                    "note", "configuration", f"{key} = {value!r} (from {source}) is no key of posttroll", "misspelt?"
                )
                continue
            try:
                config.lookup(key)
            except (ConfigurationError, NotImplementedError) as error:
                self.say("FAIL", "configuration", str(error), "correct this setting")
            else:
                if source != "default":
                    self.say("ok", "configuration", f"{key} = {value!r} (from {source})")
        if not any(config.lookup(key, check=False)[1] != "default" for key in OPTIONS):
            self.say("ok", "configuration", "all defaults")

    def check_own_address(self) -> None:
        """Say which address publishers here announce."""
        address = get_own_ip()
        if address.startswith("127."):
            remedy = "fine on a single host; else bring up the network, or set multicast_interface"
            self.say("note", "own address", f"{address}: other hosts cannot reach publishers here", remedy)
        else:
            self.say("ok", "own address", address)

    def check_multicast(self) -> None:
        """Send to the multicast group, and receive it."""
        try:
            group = _multicast_group(None)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                if group != "<broadcast>" and not config.get("multicast_interface"):
                    probe.connect((group, 9))
        except OSError as error:
            remedy = "set mc_group to an address from 224.0.0.0 to 239.255.255.255"
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                remedy = "ip route add 224.0.0.0/4 dev INTERFACE, or set multicast_interface, or use --no-multicast"
            self.say("FAIL" if self.multicast else "note", "multicast route", str(error), remedy)
            return
        self.say("ok", "multicast route", f"to group {group}")
        token = os.urandom(8).hex()
        receiver = sender = None
        try:
            port = _free_ports(1)[0]
            receiver, sender = MulticastReceiver(port), MulticastSender(port)
            receiver.settimeout(1)
            sender(token)
            while receiver()[0] != token:
                pass
            self.say("ok", "multicast loop-back", "a datagram came back")
        except OSError as error:
            remedy = "allow UDP multicast in the firewall of this host (ip link set multicast on dev INTERFACE)"
            self.say("FAIL" if self.multicast else "note", "multicast loop-back", f"nothing came back: {error}", remedy)
        finally:
            for end in (receiver, sender):
                if end is not None:
                    end.close()

    def check_keys(self) -> None:
        """Read the key files."""
        settings = {
            "server_secret_key_file": "secret",
            "server_public_key_file": "public",
            "client_secret_key_file": "secret",
        }
        is_secure = _backend() == "secure_zmq"
        if not is_secure and not any(map(config.get, settings)):
            self.say("ok", "keys", "the backend unsecure_zmq needs none")
            return
        for setting, kind in settings.items():
            path = config.get(setting)
            if path is None:
                self.say("note", "keys", f"{setting} is not set", "needed by servers or clients with secure_zmq")
                continue
            try:
                _load_key(setting, kind)
                mode = os.stat(os.path.expanduser(path)).st_mode & 0o777
            except ConfigurationError as error:
                self.say("FAIL", "keys", str(error), "posttroll generate-keys makes a pair; see the README")
                continue
            if kind == "secret" and os.name == "posix" and mode & 0o077:
                self.say("FAIL", "keys", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
            else:
                self.say("ok", "keys", f"{setting} = {path} (mode {mode:o})")
        if config.get("clients_public_keys_directory") is not None:
            directory = _ClientKeys("clients_public_keys_directory").directory
            count = len([name for name in os.listdir(directory) if name.endswith(".key")])
            verdict = "ok" if count else "FAIL"
            self.say(
                verdict, "keys", f"{count} clients may connect ({directory})", "" if count else "copy .key files there"
            )

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
        for host in self.nameservers:
            endpoint = _lookup_endpoint(host)
            name = f"nameserver {host}"
            try:
                socket.getaddrinfo(cast("tuple[str, int]", _split_tcp(endpoint))[0], None)
            except OSError as error:
                self.say("FAIL", name, f"the name does not resolve: {error}", "correct it, or add it to /etc/hosts")
                continue
            greeting = _greeting_of(endpoint)
            if not greeting:
                remedy = "start it (nameserver), or open the port in the firewall"
                self.say("FAIL", name, f"nobody answers at {endpoint}", remedy)
                continue
            if greeting[:1] != b"\xff":
                self.say("FAIL", name, f"what answers at {endpoint} is not ZeroMQ", "another program has this port")
                continue
            mechanism = greeting[12:32].rstrip(b"\0").decode("ascii", "replace") or "unknown"
            wanted = "CURVE" if _backend() == "secure_zmq" else "NULL"
            if mechanism not in (wanted, "unknown"):
                finding = f"it speaks {mechanism}, this program {wanted}"
                self.say("FAIL", name, finding, "set the same backend for both (POSTTROLL_BACKEND)")
                continue
            self._check_answer(name, endpoint)

    def _check_answer(self, name: str, endpoint: str) -> None:
        answer = _ask(endpoint, _request_for(""), 3)
        if answer is None:
            remedy = (
                "check authorized_client_addresses and --local-only there, and the keys (its log names refused clients)"
            )
            self.say("FAIL", name, f"it lets us connect to {endpoint}, but does not answer", remedy)
            return
        message = Message.decode(answer)
        count = len(_addresses_in(answer))
        self._is_answered = True
        self.say("ok", name, f"answers at {endpoint} with {count} publishers")
        sent = message.time.replace(tzinfo=message.time.tzinfo or timezone.utc)
        lead = (sent - datetime.now(timezone.utc)).total_seconds()
        if abs(lead) > 2:
            self.say("FAIL", "clocks", f"that of {name} differs by {lead:+.1f} s", "synchronise them (NTP)")
        else:
            self.say("ok", "clocks", f"that of {name} differs by {abs(lead):.1f} s")

    def check_round_trip(self) -> None:
        """Publish a message that announces itself, find it through the nameserver, receive it."""
        if not self._is_answered:
            self.say("note", "round trip", "not tried without a nameserver")
            return
        name = f"posttroll-doctor-{os.getpid()}"
        hosts = None if self.multicast else list(self.nameservers)
        try:
            with Publish(name, nameservers=hosts) as publisher:
                following = NSSubscriber(name, "/doctor", True, timeout=4, nameserver=self.nameservers[0])
                with following as subscriber:
                    if not subscriber.addresses:
                        way = f"multicast to {config.get('mc_group')}" if self.multicast else "registration"
                        remedy = "is the nameserver started with --no-multicast? then: doctor --no-multicast"
                        if not self.multicast:
                            remedy = "is the nameserver started with --no-multicast? else leave it out here too"
                        self.say("FAIL", "round trip", f"the nameserver did not hear of a publisher by {way}", remedy)
                        return
                    if not publisher.wait_for_subscribers(1, 5):
                        address = subscriber.addresses[0]
                        self.say("FAIL", "round trip", f"cannot connect to {address}", "open the publishers' ports")
                        return
                    publisher.send(Message("/doctor", "info", name))
                    message = next(subscriber.recv(5))
        except (OSError, zmq.ZMQError) as error:
            self.say("FAIL", "round trip", str(error), "see the lines above")
            return
        if message is None:
            self.say("FAIL", "round trip", "the message did not arrive", "see the lines above")
        else:
            self.say("ok", "round trip", "publisher, nameserver and subscriber hear each other")


def _owner_of_port(port: int) -> str:
    """Return which process listens on a TCP port, as far as Linux tells this user."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(table) as lines:
            for fields in (line.split() for line in lines):
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    with suppress(OSError):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                for descriptor in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{descriptor}") in inodes:
                        with open(f"/proc/{pid}/cmdline", "rb") as stream:
                            command = stream.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                        return f"process {pid} ({_printable(command)[:80]})"
    return "another user's process"


def _run_doctor(options: argparse.Namespace) -> int:
    color = _wants_color(sys.stdout) and not options.no_color
    logging.getLogger().addHandler(logging.NullHandler())  # what the library has to say, the checks say better
    doctor = _Doctor(_nameservers(options), not options.no_multicast, color)
    doctor.run()
    if doctor.failures:
        _talk(f"{doctor.failures} check{'s' * (doctor.failures > 1)} failed")
    return 1 if doctor.failures else 0


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


def _run_demo(options: argparse.Namespace) -> int:
    if options.role == "publisher":
        return _run_demo_publisher()
    if options.role == "subscriber":
        return _run_demo_subscriber()
    import subprocess

    ports = _free_ports(3)
    names = ("NAMESERVER_PORT", "ADDRESS_PUBLISH_PORT", "BROADCAST_PORT")
    environment = {**os.environ, "POSTTROLL_BACKEND": "unsecure_zmq", "POSTTROLL_MESSAGE_VERSION": "v1.2"}
    environment.update({f"POSTTROLL_{name}": str(port) for name, port in zip(names, ports)})
    nameserver_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "posttroll_ns.py")
    this_file = os.path.abspath(__file__)
    print(
        f"Nameserver on port {ports[0]} (without multicast), a publisher and a subscriber, three processes.", flush=True
    )
    commands = {
        "nameserver": [sys.executable, nameserver_file, "--no-multicast", "-l", os.devnull],
        "subscriber": [sys.executable, this_file, "demo", "--role", "subscriber"],
        "publisher": [sys.executable, this_file, "demo", "--role", "publisher"],
    }
    processes = {}
    problem = ""
    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, env=environment)
        for name in ("subscriber", "publisher"):
            if processes[name].wait(_DEMO_SECONDS + 10):
                problem = problem or f"the {name} ended with status {processes[name].returncode}"
        if processes["nameserver"].poll() is not None:
            problem = f"the nameserver ended with status {processes['nameserver'].returncode}"
    except (subprocess.TimeoutExpired, OSError) as error:
        problem = str(error)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait(10)
    if problem:
        print(f"The demo failed: {problem}.", file=sys.stderr)
        return 1
    print(f"All {len(_demo_messages())} messages arrived: posttroll works on this machine.")
    return 0


def _run_demo_publisher() -> int:
    with Publish("demo", nameservers=["localhost"]) as publisher:
        if not publisher.wait_for_subscribers(1, _DEMO_SECONDS):
            print("publisher: no subscriber came", file=sys.stderr)
            return 1
        for message in _demo_messages():
            publisher.send(message)
    return 0


def _run_demo_subscriber() -> int:
    expected = [message.data for message in _demo_messages()]
    received: list[Any] = []
    deadline = time.monotonic() + _DEMO_SECONDS
    with Subscribe("demo", "/demo", addr_listener=True, timeout=_DEMO_SECONDS) as subscriber:
        while len(received) < len(expected) and time.monotonic() < deadline:
            message = next(subscriber.recv(timeout=1))
            if message is not None:
                print("received", message, flush=True)
                received.append(message.data)
    if received != expected:
        text = f"subscriber: {len(received)} of {len(expected)} messages arrived in {_DEMO_SECONDS} seconds"
        print(
            text if len(received) < len(expected) else "subscriber: messages have changed on the way", file=sys.stderr
        )
        return 1
    return 0


def _free_ports(count: int) -> list[int]:
    """Return TCP ports that are free just now, none of those that the system gives to outgoing connections."""
    import random

    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
    return found


# ======================================================================================================================
# 13. Documented import paths
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
