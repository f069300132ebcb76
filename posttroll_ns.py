# SPDX-License-Identifier: Apache-2.0
"""The nameserver of the posttroll system: it learns where publishers are, and tells subscribers.

Publishers announce themselves every few seconds, by UDP multicast or (with ``--no-multicast``) by request.  What they
announce is kept in an address book until it has not been repeated for ten minutes.  Subscribers ask for the addresses
of a service, and can listen to a port on which new and lost publishers are published::

    python posttroll_ns.py --no-multicast

 1. the address book          ``AddressBook``
 2. receiving announcements   ``AddressReceiver``
 3. answering lookups         ``NameServer``
 4. running as a daemon
 5. command line              ``main``

It needs ``posttroll.py`` beside it; copy both into any package.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import errno
import logging
import operator
import os
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Callable, cast

import zmq

if TYPE_CHECKING:
    import posttroll
elif __package__ or "." in __name__:  # Python 3.9 does not set the first for what is imported from an archive
    from . import posttroll
else:
    import posttroll

_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_UTC = dt.timezone.utc


# ======================================================================================================================
# 1. The address book
#
# Publishers by address and by service, oldest announcement first; no sockets, no threads.
# ======================================================================================================================


class AnnouncementError(ValueError):
    """An announcement that cannot be used."""


class _Entry:
    """A publisher: what it announced, and when."""

    __slots__ = ("address", "extras", "heard", "name", "services")

    def __init__(self, address: str, name: str, services: tuple[str, ...], extras: dict[str, str]) -> None:
        self.address = address
        self.name = name
        self.services = services
        self.extras = extras
        self.heard = 0.0

    @property
    def weight(self) -> int:
        """How many ordinary publishers take as much memory; only long names, or dozens of them, make it more than 1."""
        names = (self.address, self.name, *self.services)
        return 1 + (sum(map(sys.getsizeof, names)) + 300 * len(self.services)) // 4096

    def describe(self, clock: float) -> dict[str, Any]:
        """Return the entry as it goes into an answer.

        Args:
            clock: How far `time.time` is ahead of `time.monotonic`.
        """
        return {
            "URI": self.address,
            "service": list(self.services),
            **self.extras,
            "status": True,
            "name": self.name,
            "receive_time": dt.datetime.fromtimestamp(self.heard + clock, _UTC),
        }


_content = operator.attrgetter("services", "extras", "name")


@lru_cache(maxsize=64)
def _extras(version: str | None, backend: str | None) -> dict[str, str]:
    """Return what else a publisher announced; most announce the same, which then takes memory once."""
    extras = {"supported_message_version": version, "backend": backend}
    return {key: value for key, value in extras.items() if value is not None}


class AddressBook:
    """The publishers that are known.

    Args:
        max_age: Seconds after which a publisher that is not announced any more is forgotten.
        limit: How many publishers are kept, fewer if they have many or long names; by default the configured
            `max_services`.
    """

    MAX_SERVICES = 1000  # of one publisher
    MAX_TEXT = 512  # characters of a name or an address
    GRACE = 10.0  # seconds without announcement after which a publisher may have to make room for a new one

    def __init__(self, max_age: float, limit: int | None = None) -> None:
        self.max_age = max_age
        self.limit = posttroll.config.get("max_services") if limit is None else limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._by_service: dict[str, dict[str, _Entry]] = {}
        self._weight = 0
        self.changes = 0  # how many times a publisher has come or gone

    def __len__(self) -> int:
        return len(self._entries)

    def parse(self, message: posttroll.Message) -> _Entry:
        """Return what a message announces.

        Raises:
            AnnouncementError: Something in it could not be used; the error says what.
        """
        prefix, name = message.subject[:9], message.subject[9:].rstrip("/")
        if prefix != "/address/" or not name or "/" in name:
            raise AnnouncementError(f"its subject {message.subject[:80]!r} is not '/address/NAME'")
        data = message.data
        if not isinstance(data, dict):
            raise AnnouncementError("its data are no object")
        address = data.get("URI")
        if not posttroll.is_connectable(address) or len(cast(str, address)) > self.MAX_TEXT:
            raise AnnouncementError(f"its URI {str(address)[:80]!r} is no TCP address to connect to")
        services = data.get("service", [name])
        if not isinstance(services, list) or not all(map(self._is_text, services)) or not services:
            raise AnnouncementError("its service is no list of names")
        if len(services) > self.MAX_SERVICES:
            raise AnnouncementError(f"it has more than {self.MAX_SERVICES} services")
        if not self._is_text(name):
            raise AnnouncementError("its name is too long")
        version = data.get("supported_message_version")
        if version is not None and not (self._is_text(version) and version.startswith("v")):
            raise AnnouncementError("its supported_message_version is no version")
        backend = data.get("backend")
        if backend not in (None, "unsecure_zmq", "secure_zmq"):
            raise AnnouncementError(f"its backend {str(backend)[:80]!r} is not known")
        interned = tuple(map(sys.intern, services))  # as the name, which in general is one of them
        return _Entry(cast(str, address), sys.intern(name), interned, _extras(version, backend))

    def _is_text(self, value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= self.MAX_TEXT

    def add(self, entry: _Entry) -> bool:
        """Add a publisher, or take note that it is still there.

        Returns:
            Whether it is new, or has changed.

        Raises:
            AnnouncementError: There are too many publishers.
        """
        entry.heard = time.monotonic()
        known = self._entries.get(entry.address)
        if known is not None and _content(known) == _content(entry):
            known.heard = entry.heard
            self._entries.move_to_end(entry.address)
            return False
        self._make_room_for(entry)
        if known is not None:
            self.remove(known.address)
        self.changes += 1
        self._weight += entry.weight
        self._entries[entry.address] = entry
        for service in entry.services:
            self._by_service.setdefault(service, {})[entry.address] = entry
        return True

    def _make_room_for(self, entry: _Entry) -> None:
        """Forget publishers that have been silent for long, the longest first, as long as there is no room."""
        while True:
            known = self._entries.get(entry.address)
            if self._weight - (0 if known is None else known.weight) + entry.weight <= self.limit:
                return
            oldest = next(iter(self._entries.values()), None)
            if oldest is None or time.monotonic() - oldest.heard < self.GRACE:
                raise AnnouncementError(f"there are {len(self._entries)} publishers already (see max_services)")
            self.remove(oldest.address)

    def remove(self, address: str) -> _Entry | None:
        """Forget the publisher at *address*."""
        self.changes += 1
        entry = self._entries.pop(address, None)
        if entry is None:
            return None
        self._weight -= entry.weight
        for service in entry.services:
            addresses = self._by_service.get(service, {})
            addresses.pop(address, None)
            if not addresses:
                self._by_service.pop(service, None)
        return entry

    def dismiss(self, message: posttroll.Message) -> _Entry | None:
        """Forget the publisher that says goodbye in *message*; return it, None if it is not known by this name."""
        address, name = message.data.get("URI"), message.subject[9:].rstrip("/")
        entry = self._entries.get(address) if isinstance(address, str) else None
        return self.remove(entry.address) if entry is not None and entry.name == name else None

    def retire(self, address: str, name: str) -> None:
        """Let the publisher *name* at *address*, if it is there, expire soon."""
        entry = self._entries.get(address)
        if entry is not None and entry.name == name:
            entry.heard = min(entry.heard, time.monotonic() - self.max_age + self.GRACE)
            self._entries.move_to_end(address, last=False)

    def find(self, service: str = "") -> list[_Entry]:
        """Return the publishers of *service*, all with ``""``."""
        if not service:
            return list(self._entries.values())
        return list(self._by_service.get(service, {}).values())

    def expire(self) -> list[_Entry]:
        """Forget the publishers that are too old, and return them."""
        oldest_allowed = time.monotonic() - self.max_age
        expired = []
        while self._entries:
            address, entry = next(iter(self._entries.items()))
            if entry.heard >= oldest_allowed:
                break
            self.remove(address)
            expired.append(entry)
        return expired

    def next_expiry(self) -> float | None:
        """Return the (monotonic) time at which the next publisher is too old, None if there is none."""
        oldest = next(iter(self._entries.values()), None)
        return None if oldest is None else oldest.heard + self.max_age


# ======================================================================================================================
# 2. Receiving announcements
# ======================================================================================================================


class _MulticastSource:
    """Announcements by UDP.

    It joins the group again and again: an interface that goes away takes the membership along, without any error, and
    as long as the network cannot be used, there is none.
    """

    RETRY = 2.0
    RENEWAL = 30.0

    def __init__(self, port: int, rules: posttroll.AccessRules, log: posttroll.LimitedLogger) -> None:
        self._port = port
        self._rules = rules
        self._log = log
        self._loop: posttroll.Loop | None = None
        self._timer: posttroll.Timer | None = None
        self._group = posttroll.multicast_group(None)  # a wrong group is an error now, a missing network is not
        self._receiver = self._open()

    def _open(self) -> posttroll.MulticastReceiver | None:
        """Return a new receiver, None if the network cannot be used."""
        try:
            receiver = posttroll.MulticastReceiver(self._port, self._group)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            self._log.warning("multicast", "Cannot receive multicast (trying again): %s", error)
            return None
        receiver.socket.setblocking(False)
        return receiver

    def watch(self, loop: posttroll.Loop, handle: Callable[[bytes], None]) -> None:
        """Have *handle* called with the announcements that come."""
        self._loop, self._handle = loop, handle
        if self._receiver is not None:
            loop.watch(self._receiver.fileno(), self._receive)
        pause = self.RETRY if self._receiver is None else self.RENEWAL
        self._timer = loop.at(time.monotonic() + pause, self._renew)

    def _renew(self) -> None:
        """Join the group again, and let go of the old socket when it is read empty; what comes to both is harmless."""
        assert self._loop is not None
        self._timer = self._loop.at(time.monotonic() + self.RETRY, self._renew)  # whatever happens here
        receiver = self._open()
        if receiver is None:
            return
        try:
            if self._receiver is not None:
                self._receive(1000)
        finally:
            self.close()
            self._receiver = receiver
            self.watch(self._loop, self._handle)

    def _receive(self, limit: int = 100) -> None:
        assert self._receiver is not None
        assert self._loop is not None
        for _ in range(limit):
            try:
                data, sender = self._receiver.socket.recvfrom(posttroll.DATAGRAM_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                self._log.warning("multicast", "Cannot receive multicast (trying again): %s", error)
                self.close()
                self.watch(self._loop, self._handle)
                return
            host = posttroll.number_of(sender)
            if self._rules.refuses_address(host):
                self._log.warning("refused", "Refused an announcement from %s: not authorized", host)
                continue
            try:
                self._handle(data)
            except AnnouncementError as error:
                self._log.warning("announcement", "Refused an announcement from %s: %s", host, error)

    def close(self) -> None:
        """Close the socket."""
        if self._timer is not None:
            self._timer.cancel()
        if self._receiver is not None:
            if self._loop is not None:
                self._loop.unwatch(self._receiver.fileno())
            self._receiver.close()
            self._receiver = None


class _RequestSource:
    """Announcements by request, each of which is answered: ``ok``, or why it was refused."""

    def __init__(self, port: int, local_only: bool, log: posttroll.LimitedLogger) -> None:
        self._log = log
        self._server = _Server(f"tcp://*:{port}", local_only)

    def watch(self, loop: posttroll.Loop, handle: Callable[[bytes], None]) -> None:
        """Have *handle* called with the announcements that come."""

        def answer(request: bytes) -> bytes:
            try:
                handle(request)
            except AnnouncementError as error:
                self._log.warning("announcement", "Refused a registration: %s", error)
                return f"refused: {error}".encode("utf-8", "replace")
            return b"ok"

        self._server.watch(loop, answer)

    def close(self) -> None:
        """Close the socket."""
        self._server.close()


class _Server:
    """A socket that answers requests; no request, however broken, stops it or stays without an answer."""

    MAX_REQUEST = 16 * 1024 * 1024  # bytes; whoever sends more is disconnected

    def __init__(self, address: str, local_only: bool = False, backend: str | None = None) -> None:
        options = {zmq.MAXMSGSIZE: self.MAX_REQUEST, zmq.RCVHWM: 1000, zmq.SNDHWM: 1000}
        self.socket, self.port, self._authenticator = posttroll.set_up_server_socket(
            zmq.REP, address, options, backend=backend, local_only=local_only
        )
        self._loop: posttroll.Loop | None = None

    def watch(self, loop: posttroll.Loop, answer: Callable[[bytes], bytes]) -> None:
        """Answer the requests that come by what *answer* returns."""
        self._loop = loop
        loop.watch(self.socket, lambda: self.answer_all(answer))

    def answer_all(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer the requests that have come, but not so many that others have to wait."""
        sock = self.socket
        for _ in range(100):
            try:
                frames = sock.recv_multipart(_NOBLOCK)
            except zmq.Again:  # what there was is no request: ZeroMQ has skipped it
                pass
            else:
                reply = b""
                try:
                    reply = answer(frames[0] if len(frames) == 1 else b"")
                finally:
                    sock.send(reply)
            if not int(sock.get(zmq.EVENTS)) & _POLLIN:
                return

    def close(self) -> None:
        """Close the socket."""
        if self._loop is not None:
            self._loop.unwatch(self.socket)
        try:
            posttroll.close_flushed(self.socket, 0.1)  # the last answers should still arrive
        finally:
            if self._authenticator is not None:
                self._authenticator.stop()


class AddressReceiver:
    """Receives announcements, keeps the addresses, and publishes which are new and which are lost.

    Args:
        max_age: After this time without announcement, a publisher is lost; ten minutes by default.
        port: Where announcements come in, by default the configured `broadcast_port`.
        do_heartbeat: Whether to publish heartbeats.
        multicast_enabled: Receive by UDP multicast; else by request on the TCP port.
        restrict_to_localhost: Take announcements, and readers, from this host only.

    Attributes:
        loop: The `posttroll.Loop` to be served in, set before `start`; by default it runs one in a thread of its own.
    """

    HEARTBEAT = 30.0  # seconds between two

    def __init__(
        self,
        max_age: dt.timedelta | float | None = dt.timedelta(seconds=600),
        port: int | None = None,
        do_heartbeat: bool = True,
        multicast_enabled: bool = True,
        restrict_to_localhost: bool = False,
    ) -> None:
        age = dt.timedelta(seconds=600) if max_age is None else max_age
        self._max_age = age.total_seconds() if isinstance(age, dt.timedelta) else float(age)
        self._port = port or posttroll.config.get("broadcast_port")
        self._do_heartbeat = do_heartbeat
        self._multicast_enabled = multicast_enabled
        self._local_only = restrict_to_localhost
        self._book = AddressBook(self._max_age)
        self._lock = threading.RLock()
        self._log = posttroll.LimitedLogger("address_receiver")
        self.loop: posttroll.Loop | None = None
        self._thread: threading.Thread | None = None
        self._is_running = False
        self._timers: list[posttroll.Timer] = []
        self._expiry: posttroll.Timer | None = None

    def start(self) -> AddressReceiver:
        """Start the receiver.

        Raises:
            zmq.ZMQError: A port is in use.
            OSError: The multicast group is not valid.
            posttroll.ConfigurationError: The secure backend is not set up.
        """
        if self.is_running():
            return self
        posttroll.get_sender()  # reads a file, and clients may have used up all file descriptors later
        self._source = self.set_up_address_receiver(self._port)
        with posttroll.on_failure(self._source.close):
            self._publisher = self._set_up_publisher()
            self._publisher.start()
        self._is_running = True
        with posttroll.on_failure(self.stop):
            self._begin()
        return self

    def _begin(self) -> None:
        if self.loop is None:
            self.loop = posttroll.Loop()
            self._thread = threading.Thread(target=self.loop.run, name="posttroll addresses", daemon=True)
        self._source.watch(self.loop, self._take)
        if self._do_heartbeat:
            self._beat(self.loop)
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> None:
        """Stop the receiver, and wait until it has ended; of a loop of others, only its thread may call it."""
        if not self._is_running:
            return
        self._is_running = False
        loop, thread = self.loop, self._thread
        assert loop is not None
        if thread is not None:
            loop.stop()
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5)
        for timer in (*self._timers, self._expiry):
            if timer is not None:
                timer.cancel()
        try:
            self._publisher.stop()
        finally:
            self._source.close()
            if thread is not None:
                loop.close()
                self.loop, self._thread = None, None

    def is_running(self) -> bool:
        """Whether the receiver runs."""
        return self._is_running and (self._thread is None or self._thread.is_alive())

    def get(self, name: str = "") -> list[dict[str, Any]]:
        """Return the addresses of the publishers of the service *name*, of all with ``""``."""
        with self._lock:
            clock = time.time() - time.monotonic()
            return [entry.describe(clock) for entry in self._book.find(name)]

    @property
    def changes(self) -> int:
        """How many times a publisher has come or gone, since the start."""
        return self._book.changes

    def set_up_address_receiver(self, port: int) -> Any:
        """Return the source of announcements: UDP multicast, or requests on the TCP *port*."""
        if self._multicast_enabled:
            return _MulticastSource(port, posttroll.AccessRules(self._local_only), self._log)
        return _RequestSource(port, self._local_only, self._log)

    def _set_up_publisher(self) -> Any:
        """Return the publisher of new and lost addresses."""
        port = posttroll.config.get("address_publish_port")
        publisher = posttroll.Publish("address_receiver", port, ["addresses"], nameservers=False).publisher
        if isinstance(publisher, posttroll.Publisher):
            publisher.local_only = self._local_only
            publisher.keeps_history = False  # who was away asks for the addresses
            publisher.heartbeat_interval = 0  # it has its own, which readers of any age understand
            publisher.LINGER_SECONDS = 1.0  # so a reader that is gone does not hold up a restart
        return publisher

    # -- taking announcements --

    def _take(self, data: bytes) -> None:
        """Take an announcement; what is new is published when its sender has its answer."""
        assert self.loop is not None
        news: list[tuple[_Entry, bool]] = []
        self.process_address_message(data, news)
        for entry, is_new in news:
            self.loop.at(time.monotonic(), partial(self._publish, entry, is_new, self._publisher))
        if news or self._expiry is None:
            self.loop.at(time.monotonic(), self._plan_expiry)

    def process_address_message(self, data: str | bytes, pub: Any) -> None:
        """Take an announcement, and publish it with *pub* if it is new; or a goodbye, which ends one.

        Args:
            data: The announcement, an encoded message.
            pub: The publisher, anything with the method ``send``; or a list, to which pairs of entries and whether they
                are new or lost are added.

        Raises:
            AnnouncementError: The announcement cannot be used.
        """
        try:
            message = posttroll.Message.decode(data)
        except posttroll.MessageError as error:
            raise AnnouncementError(str(error)) from None
        news = pub if isinstance(pub, list) else []
        with self._lock:
            if isinstance(message.data, dict) and message.data.get("status") is False:
                entry = self._book.dismiss(message)
                news += [] if entry is None else [(entry, False)]
            else:
                entry = self._book.parse(message)
                if self._book.add(entry):
                    news.append((entry, True))
        if not isinstance(pub, list):
            for each, is_new in news:
                self._publish(each, is_new, pub)

    def _publish(self, entry: _Entry, is_new: bool, publisher: Any) -> None:
        """Tell those who listen that *entry* is new, or lost; in a version that readers of any age understand."""
        data = {"URI": entry.address, "service": list(entry.services), **entry.extras, "status": is_new}
        publisher.send(posttroll.Message(f"/address/{entry.name}", "info", data, version="v1.01").encode())
        kind, text = ("new", "New publisher %s at %s") if is_new else ("lost", "Lost publisher %s at %s")
        self._log.log(logging.INFO, kind, text, entry.name, entry.address)
        if is_new:
            self._retire_loopback(entry)

    def _retire_loopback(self, entry: _Entry) -> None:
        """Forget the loopback address of a publisher of this host that has found the host's real address meanwhile.

        Who is connected to both gets every message twice; not at once, so that nobody misses one.
        """
        host, port = posttroll.split_tcp_address(entry.address) or ("", 0)
        loopback = ("127.0.0.1", "[::1]")
        if host not in loopback and posttroll.is_own_address(host.strip("[]")):
            with self._lock:
                for own in loopback:
                    self._book.retire(f"tcp://{own}:{port}", entry.name)

    # -- as time goes by --

    def _beat(self, loop: posttroll.Loop) -> None:
        """Publish a heartbeat, for readers of any age, again and again."""
        self._timers = [loop.at(time.monotonic() + self.HEARTBEAT, lambda: self._beat(loop))]
        data = {"min_interval": self.HEARTBEAT - 1}
        self._publisher.send(posttroll.Message("/heartbeat/address_receiver", "beat", data, version="v1.01").encode())

    def _plan_expiry(self) -> None:
        """Have the next publisher that falls silent expire in time; who is heard again in the meantime does not."""
        with self._lock:
            due = self._book.next_expiry()
        if self._expiry is not None and (due is None or due < self._expiry.when):
            self._expiry.cancel()
            self._expiry = None
        if self._expiry is None and due is not None and self.loop is not None:
            self._expiry = self.loop.at(due, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        with self._lock:
            expired = self._book.expire()
        for entry in expired:
            self._publish(entry, False, self._publisher)
        self._plan_expiry()


getaddress = AddressReceiver


# ======================================================================================================================
# 3. Answering lookups
# ======================================================================================================================


def get_active_address(name: str, arec: Any, message_version: str = "v1.2") -> posttroll.Message:
    """Get the addresses of the active publishers of a service.

    Args:
        name: The name of the service, ``""`` for all.
        arec: The `AddressReceiver` that knows them, anything with the method ``get``.
        message_version: The version of the answer.

    Returns:
        The answer to a lookup, a message with the list of addresses.
    """
    return posttroll.Message("/oper/ns", "info", arec.get(name) or "", version=message_version)


class _Answers:
    """The answers to lookups; those of a moment ago if nobody has come or gone.

    They may be large, and when a nameserver starts again, all who follow everything ask for the same at once.
    """

    SECONDS = 1.0  # that the times in an answer may be old
    LIMIT = 8  # answers

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], bytes] = {}
        self._state: tuple[Any, int | None] = (None, None)  # of what they were made from
        self._end = 0.0

    def get(self, service: str, address_receiver: Any, version: str) -> bytes:
        """Return the answer to a lookup of *service*."""
        state = address_receiver, getattr(address_receiver, "changes", None)  # others than ours do not count them
        now = time.monotonic()
        if state[1] is None or state != self._state or now >= self._end or len(self._answers) >= self.LIMIT:
            self._answers, self._state, self._end = {}, state, now + self.SECONDS
        answer = self._answers.get((service, version))
        if answer is None:
            answer = get_active_address(service, address_receiver, version).encode().encode()
            self._answers[service, version] = answer
        return answer


class NameServer:
    """The nameserver.

    Args:
        max_age: After this time without announcement, a publisher is lost; ten minutes by default.
        multicast_enabled: Receive announcements by UDP multicast; else by request.
        restrict_to_localhost: Serve this host only.

    Attributes:
        hourly: What is called again and again while it runs, None for nothing.
    """

    HOUR = 3600.0
    KEYS = ("server_secret_key_file", "clients_public_keys_directory")  # the settings that lead to what it reads

    def __init__(
        self,
        max_age: dt.timedelta | float | None = None,
        multicast_enabled: bool = True,
        restrict_to_localhost: bool = False,
    ) -> None:
        posttroll.configured_backend()  # an unknown one is an error now
        self._max_age = dt.timedelta(minutes=10) if max_age is None else max_age
        self._multicast_enabled = multicast_enabled
        self._local_only = restrict_to_localhost
        self.hourly: Callable[[], object] | None = None
        self._loop: posttroll.Loop | None = None
        self._is_stopping = False
        self._has_ended = False
        self._answers = _Answers()
        self._log = posttroll.LimitedLogger("ns")

    def run(
        self,
        address_receiver: Any = None,
        nameserver_address: str | None = None,
        when_ready: Callable[[], None] | None = None,
    ) -> None:
        """Answer lookups until `stop` is called.

        Args:
            address_receiver: What knows the addresses, anything with the method ``get``; by default an
                `AddressReceiver` is started, and stopped at the end.
            nameserver_address: The address to answer on, by default ``tcp://*:PORT`` with the configured port.
            when_ready: Called when all ports are open.

        Raises:
            zmq.ZMQError: A port is in use.
            OSError: The multicast group is not valid.
            posttroll.ConfigurationError: The secure backend is not set up.
        """
        self._has_ended = False
        self._loop = loop = posttroll.Loop()
        servers: list[_Server] = []
        with ExitStack() as stack:
            stack.callback(loop.close)
            stack.callback(self._end)
            for address, backend in self._addresses(nameserver_address):
                servers.append(_Server(address, self._local_only, backend))
                stack.callback(servers[-1].close)
            if address_receiver is None:
                address_receiver = receiver = AddressReceiver(
                    max_age=self._max_age,
                    multicast_enabled=self._multicast_enabled,
                    restrict_to_localhost=self._local_only,
                )
                receiver.loop = loop
                stack.callback(receiver.stop)
                receiver.start()
            for server in servers:
                server.watch(loop, partial(self._answer, address_receiver))
            if when_ready is not None:
                when_ready()
            if self.hourly is not None:
                loop.at(time.monotonic(), partial(self._repeat, self.hourly, loop))
            if not self._is_stopping:
                with posttroll.signals_wake(loop):
                    loop.run()

    def _repeat(self, task: Callable[[], object], loop: posttroll.Loop) -> None:
        loop.at(time.monotonic() + self.HOUR, partial(self._repeat, task, loop))
        task()

    def _end(self) -> None:
        self._has_ended = True
        self._is_stopping = False
        self._loop = None

    def _addresses(self, nameserver_address: str | None) -> Iterator[tuple[str, str]]:
        """Yield the addresses to answer on, each with its backend."""
        own = posttroll.configured_backend()
        port = posttroll.get_configured_nameserver_port()
        yield nameserver_address or f"tcp://*:{port}", own
        if nameserver_address is None:
            has_keys = all(posttroll.config.get(setting) for setting in self.KEYS)
            secure_port = posttroll.get_configured_secure_zmq_nameserver_port()
            if has_keys and secure_port != port:
                yield f"tcp://*:{secure_port}", "secure_zmq"

    def check(self) -> None:
        """Raise what `run` would raise of the configuration, while somebody else has the ports."""
        for _, backend in self._addresses(None):
            if backend == "secure_zmq":
                posttroll.load_key("server_secret_key_file", "secret")
                posttroll.ClientKeys("clients_public_keys_directory")
        AddressReceiver()
        posttroll.config.get("address_publish_port")

    def _answer(self, address_receiver: Any, request: bytes) -> bytes:
        """Return the answer to a lookup: of its version, and empty if it is broken."""
        version = "v1.01"
        try:
            message = posttroll.Message.decode(request)
            if message.version in posttroll.WRITTEN_VERSIONS:
                version = message.version
            service = message.data.get("service") if isinstance(message.data, dict) else None
            if not isinstance(service, str):
                raise posttroll.MessageError("It does not say which service it asks for.")
            if message.data.get("about") is True:
                about = {"version": posttroll.__version__}
                return posttroll.Message("/oper/ns", "info", about, version=version).encode().encode()
            return self._answers.get(service, address_receiver, version)
        except (posttroll.MessageError, UnicodeEncodeError) as error:
            self._log.warning("request", "Broken request: %s", str(error)[:300])
            return posttroll.Message("/oper/ns", "info", "", version=version).encode().encode()

    def stop(self) -> None:
        """Stop the nameserver; may be called from other threads and signal handlers, and also before it runs."""
        if self._has_ended:
            return
        self._is_stopping = True
        loop = self._loop
        if loop is not None:
            loop.stop()


# ======================================================================================================================
# 4. Running as a daemon
#
# The running daemon holds a lock on its pid file, so a file left behind by a crash is never taken for a daemon.  The
# file also holds the options that it was started with.
# ======================================================================================================================


def setup_logging(opts: Any) -> logging.Logger:
    """Set up logging.

    Args:
        opts: The options of the command line: `log` (a file, rotated at midnight, 7 kept; None for stdout) and
            `verbose` (debug messages too).

    Returns:
        The logger of the nameserver.
    """
    handler = posttroll.log_handler(opts.log)
    handler.setFormatter(logging.Formatter(posttroll.LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(posttroll.make_printable)  # names come from anybody
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if opts.verbose else logging.INFO)
    return logging.getLogger("nameserver")


def run(ns: NameServer, logger: logging.Logger) -> int:
    """Run a nameserver process, until SIGINT or SIGTERM.

    Args:
        ns: The nameserver.
        logger: Where to log its start, end and failure.

    Returns:
        The exit status: 0 after a clean end, 1 after a failure, which is told in a line on stderr.
    """
    return _run(ns, logger, _tell_systemd_ready)


def _run(ns: NameServer, logger: logging.Logger, when_ready: Callable[[], None]) -> int:
    def tell_ready() -> None:
        logger.info("The nameserver answers on port %d", posttroll.get_configured_nameserver_port())
        when_ready()

    try:
        with posttroll.call_on_signals(ns.stop):
            ns.run(when_ready=tell_ready)
    except (OSError, zmq.ZMQError, posttroll.ConfigurationError, NotImplementedError) as error:
        logger.error("The nameserver has failed: %s", error)
        print(f"nameserver: {error}", file=sys.stderr)
        return 1
    logger.info("The nameserver has ended")
    return 0


def _handle_hangup(stop: Callable[[], None], is_daemon: bool) -> None:
    """Have SIGHUP reopen the log file; without one, what runs in the foreground ends with its terminal."""
    log = logging.getLogger("nameserver")
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]

    def handle(*_: object) -> None:
        if not files and not is_daemon:
            stop()
            return
        try:
            for file in files:
                file.stream = file._open()  # the old one is closed when nobody is in the midst of writing to it
            log.info("SIGHUP: the log has been opened again")
        except OSError as error:
            log.error("SIGHUP: the log cannot be opened again: %s", error)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as with nohup
        signal.signal(signal.SIGHUP, handle)


def _tell_systemd_ready() -> None:
    """Tell systemd, if it asks for it, that the nameserver is ready (see sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notification:
            notification.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:  # it may be left over from the environment of something else
        logging.getLogger("nameserver").warning("Cannot tell systemd at %s that it is ready: %s", address, error)


def _fill_standard_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed, so that no other file gets one of these numbers."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return


_Serve = Callable[[Callable[[], None], Callable[[], object]], int]


class _Daemon:
    """The nameserver in the background, found again by its pid file."""

    STOP_SECONDS = 10
    READY = "\0"  # what it tells its starter when it serves; text before that is not for the program, but its user

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.path = os.path.abspath(options.pid_file) if options.pid_file else self._default_path()

    @staticmethod
    def _default_path() -> str:
        """Return a path of its own for each user and port, the same in every environment (cron's, ssh's, ...)."""
        directory = "/run" if os.getuid() == 0 and os.path.isdir("/run") else "/tmp"
        port = posttroll.get_configured_nameserver_port()
        return os.path.join(directory, f"posttroll-nameserver-{os.getuid()}-{port}.pid")

    def _open(self, flags: int) -> int:
        """Return a descriptor of the pid file; raises OSError if somebody else has put it there, or can change it."""
        descriptor = os.open(self.path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            os.close(descriptor)
            raise PermissionError(errno.EPERM, "Not a pid file of this user; remove it, or use --pid-file", self.path)
        return descriptor

    def pid(self) -> int | None:
        """Return the process id of the running daemon, None if none runs."""
        return self._read()[0]

    def _read(self) -> tuple[int | None, dict[str, Any]]:
        """Return the process id of the running daemon, None if none runs, and the options of the last one."""
        try:
            descriptor = self._open(os.O_RDWR)
        except FileNotFoundError:
            return None, {}
        with os.fdopen(descriptor, "rb") as stream:
            runs = not posttroll.try_to_lock(descriptor)
            first, _, rest = stream.read().partition(b"\n")
        try:
            options = dict(ast.literal_eval(rest.decode()))
        except (ValueError, SyntaxError, TypeError):  # there are none
            options = {}
        return int(first) if runs and first.isdigit() else None, options

    def keep_options(self) -> None:
        """Take over the options of the daemon that runs (or has crashed), where no other is given."""
        _, kept = self._read()
        given = {key: value for key, value in vars(self._options).items() if value}
        vars(self._options).update({**kept, **given, "set": [*kept.get("set", []), *self._options.set]})

    def start(self, serve: _Serve) -> int:
        """Run *serve* in the background; return 0 when it is ready, 1 if it failed to start.

        Args:
            serve: Called in the daemon, with what to call when it is ready, and what every hour; returns the exit
                status.
        """
        pid = self.pid()
        if pid is not None:
            print(f"nameserver: already running (process {pid})", file=sys.stderr)
            return 1
        _fill_standard_descriptors()
        read_end, write_end = os.pipe()
        child = os.fork()
        if child:
            os.close(write_end)
            with os.fdopen(read_end, "rb") as stream:
                text, ready, _ = stream.read().decode(errors="replace").partition(self.READY)
            os.waitpid(child, 0)
            if text.strip() or not ready:
                print(text.strip() or "nameserver: the daemon has not started", file=sys.stderr)
            return 0 if ready else 1
        status = 1
        try:
            os.close(read_end)
            os.setsid()
            if os.fork():
                os._exit(0)
            status = self._run_in_background(serve, write_end)
        finally:
            os._exit(status)

    def _run_in_background(self, serve: _Serve, write_end: int) -> int:
        """Be the daemon: write the pid file, let go of the terminal, serve."""
        try:
            descriptor = self._open(os.O_RDWR | os.O_CREAT)
            if not posttroll.try_to_lock(descriptor):
                os.write(write_end, b"nameserver: already running")
                return 1
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n{vars(self._options)!r}\n".encode())
        except OSError as error:
            os.write(write_end, f"nameserver: cannot write the pid file: {error}".encode())
            return 1
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(write_end, 2)  # until it is ready, what it has to say goes to whoever started it

        def when_ready() -> None:
            os.write(write_end, self.READY.encode())
            os.close(write_end)
            os.dup2(null, 2)

        os.chdir("/")
        status = serve(when_ready, partial(os.utime, descriptor))  # what is old in /tmp may be cleaned away
        if status:
            os.close(descriptor)  # the options stay for a restart, as after a crash
            return status
        try:
            os.unlink(self.path)  # first, as what is there, empty and locked, keeps the next one from starting
        finally:
            os.ftruncate(descriptor, 0)
        return 0

    def stop(self) -> int:
        """Stop the daemon, and wait until it has ended; return the exit status."""
        pid = self.pid()
        if pid is None:
            print("nameserver: not running", file=sys.stderr)
            return 0
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self.STOP_SECONDS
        while self.pid() == pid:
            if time.monotonic() > deadline:
                print(f"nameserver: process {pid} has not ended in {self.STOP_SECONDS} seconds", file=sys.stderr)
                return 1
            time.sleep(0.02)
        return 0

    def status(self) -> int:
        """Print whether the daemon runs; return 0 if it does, else 3 (as LSB scripts do)."""
        pid = self.pid()
        print("nameserver: not running" if pid is None else f"nameserver: running (process {pid})")
        return 3 if pid is None else 0


# ======================================================================================================================
# 5. Command line
# ======================================================================================================================


def _parser() -> argparse.ArgumentParser:
    description = "Tell subscribers where publishers are."
    # To ask for the width of the terminal, with each argument, argparse imports much that a nameserver never needs.
    width = partial(argparse.HelpFormatter, width=80)
    parser = argparse.ArgumentParser("nameserver", None, description, allow_abbrev=False, formatter_class=width)
    parser.epilog = """examples:
  nameserver --no-multicast
  nameserver -d start -l /var/log/nameserver.log
  nameserver --set nameserver_port=5600 --local-only"""
    add = parser.add_argument
    add("-d", "--daemon", choices=["start", "stop", "status", "restart"], help="Run as a daemon")
    add("-l", "--log", help="File to log to (defaults to stdout)")
    add("-v", "--verbose", action="store_true", help="print debug messages too")
    add("--no-multicast", action="store_true", help="disable address broadcasting via multicasting")
    add("-L", "--local-only", action="store_true", help="accept connections only from localhost")
    add("--pid-file", help="file with the process id of the daemon (one for each user and port)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], type=posttroll.assignment, help="set a key")
    add("--version", action="version", version=f"nameserver of posttroll {posttroll.__version__}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # as wide as the terminal, when help is shown
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the nameserver script.

    Args:
        args: The command-line arguments; by default those of the process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(args)
    posttroll.config.set(dict(options.set))
    if options.log:
        options.log = os.path.abspath(options.log)

    def serve(when_ready: Callable[[], None], hourly: Callable[[], object] | None = None) -> int:
        try:
            logger = setup_logging(options)
        except OSError as error:
            print(f"nameserver: cannot write the log: {error}", file=sys.stderr)
            return 1
        posttroll.raise_descriptor_limit()
        ns = NameServer(multicast_enabled=not options.no_multicast, restrict_to_localhost=options.local_only)
        ns.hourly = hourly
        _handle_hangup(ns.stop, is_daemon=options.daemon is not None)
        return _run(ns, logger, when_ready)

    try:
        if options.daemon in (None, "start", "restart"):
            posttroll.config.get("backend")  # what cannot be read is an error before anything is started or stopped
        if options.daemon is None:
            return serve(_tell_systemd_ready)
        return _control_daemon(options, serve)
    except (OSError, posttroll.ConfigurationError, NotImplementedError) as error:
        print(f"nameserver: {error}", file=sys.stderr)
        return 1


def _control_daemon(options: Any, serve: _Serve) -> int:
    """Start, stop or restart the daemon, or tell its status."""
    if not hasattr(os, "fork"):
        print("nameserver: this system has no daemons; run it as a service without -d", file=sys.stderr)
        return 1
    daemon = _Daemon(options)
    if options.daemon == "status":
        return daemon.status()
    if options.daemon == "stop":
        return daemon.stop()
    if options.daemon == "restart":
        daemon.keep_options()
        posttroll.config.set(dict(options.set))
    paths = {key: posttroll.config.get(key) for key in NameServer.KEYS}  # which are meant from here, as that of the log
    posttroll.config.set({key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if path})
    if options.daemon == "restart":
        NameServer().check()  # what is wrong is an error while the one before still runs
        posttroll.log_handler(options.log).close()
        status = daemon.stop()
        if status:
            return status
    status = daemon.start(serve)
    if status == 0 and not options.log:
        print("nameserver: it logs nowhere; -l FILE gives it a log", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
