# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102 - what the methods of the workers do is said where they are called, in the class Worker
"""How fast posttroll is, measured against bare pyzmq with the standard library's json: the floor.

    python benchmarks/bench.py [section ...] [--quick] [--json FILE] [--peer PYTHON] [--soak SECONDS]

Every figure is measured for each *side* in turn, many times, within one run, so that whatever else the machine does
hits all sides alike: the floor, ours, with ``--peer PYTHON`` the package ``posttroll`` that this interpreter has
installed, and the brokers whose servers and Python clients are installed (NATS, MQTT, Redis).  A figure is the median
of the rounds; a ratio is the median of the ratios to the floor of the same round.

A side lives in processes of its own ("workers": this program, started with ``--worker``) that do what they are told
over a pipe, and say how long it took and how much CPU time the whole process used, the threads of ZeroMQ included.
Publisher and subscriber share a counter in memory: a publisher is never more than WINDOW messages ahead, so that no
side can lose messages by a full queue.  Everything runs on the loopback interface.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import mmap
import os
import queue
import random
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, NamedTuple

import zmq

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = "/segment/SEVIRI/0deg"
WINDOW = 800  # messages; ZeroMQ's own queues have 1,000
CHUNK = 100  # messages between two looks at the shared counter
DEADLINE = 120.0  # seconds that a worker may take for an answer
HIGH_WATER_MARK = 200000

# ======================================================================================================================
# What is sent
# ======================================================================================================================


def dictionary() -> dict[str, Any]:
    """Return the notification of a file, as a reception station sends it: 15 keys, 3 of them times."""
    start = datetime(2024, 5, 17, 12, 0, 10, 123456)
    return {
        "uri": "/data/incoming/seviri/H-000-MSG4__-MSG4________-IR_108___-000005___-202405171200-C_",
        "uid": "H-000-MSG4__-MSG4________-IR_108___-000005___-202405171200-C_",
        "platform_name": "Meteosat-11",
        "sensor": ["seviri"],
        "start_time": start,
        "end_time": start + timedelta(minutes=12, seconds=33),
        "nominal_time": start.replace(second=0, microsecond=0),
        "orbit_number": 42042,
        "segment": 5,
        "segments": 8,
        "format": "HRIT",
        "data_processing_level": "1b",
        "area": {"lon_0": 0.0, "height": 35785831.0, "shape": [3712, 3712]},
        "compressed": True,
        "variant": None,
    }


def data_set() -> dict[str, Any]:
    """Return the notification of 50 files that belong together."""
    content = dictionary()
    uid = content.pop("uid")
    del content["uri"]
    content["dataset"] = [{"uri": f"/data/incoming/seviri/{uid}{i:03}", "uid": f"{uid}{i:03}"} for i in range(50)]
    return content


def cases() -> dict[str, Any]:
    """Return the data of the sections encode and decode."""
    plain = {"uri": "/data/viirs/SVM05_npp_d20240517.h5", "uid": "SVM05_npp_d20240517.h5", "orbit": 62031, "gap": 0.85}
    start, cest = datetime(2024, 5, 17, 12, 0, 10, 85431), timezone(timedelta(hours=2))
    return {
        "dictionary": dictionary(),
        "50-file data set": data_set(),
        "short text": "jhuuuu !!!",
        "100 kB binary": random.Random(1).randbytes(75000).hex()[:100000],
        # None of these was looked at when the code was made faster.
        "words that are not ASCII": {
            **plain,
            "place": "Norrköping, Åland",
            "agency": "気象庁",
            "note": "größer als 5 µm",
        },
        "times with zones": {**plain, "start_time": start.astimezone(cest), "end_time": start.astimezone(timezone.utc)},
        "times with microseconds": {**plain, "start_time": start, "end_time": start + timedelta(microseconds=1)},
        "times without": {
            **plain,
            "start_time": start.replace(microsecond=0),
            "end_time": start.replace(microsecond=0),
        },
        "no times": plain,
        "100 kB not ASCII, binary": "Grüße aus Norrköping, 気象庁 " * 4000,
    }


# ======================================================================================================================
# The floor: bare pyzmq with the standard library's json, and no checks
#
# It writes and reads the same bytes as posttroll does.
# ======================================================================================================================

SENDER = f"{os.environ.get('USER', 'user')}@{socket.gethostname()}"
_looks_like_datetime = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d").match


class FloorMessage(NamedTuple):
    """What is in a message."""

    subject: str
    type: str
    sender: str
    time: datetime
    version: str
    data: Any


def _revive(dct: dict[str, Any]) -> dict[str, Any]:
    for key, value in dct.items():
        if type(value) is str and _looks_like_datetime(value):
            dct[key] = datetime.fromisoformat(value)
    return dct


def floor_encode(subject: str, kind: str, data: Any, binary: bool = False) -> str:
    """Return a message as text."""
    if isinstance(data, str):
        text = f"binary/octet-stream {data}" if binary else f"text/ascii {data}"
    else:
        text = f"application/json {json.dumps(data, default=datetime.isoformat)}"
    return f"pytroll:/{subject} {kind} {SENDER} {datetime.now(timezone.utc).isoformat()} v1.2 {text}"


def floor_decode(raw: str) -> FloorMessage:
    """Return what is in a message."""
    subject, kind, sender, moment, version, mime, text = raw.split(" ", 6)
    data = json.loads(text, object_hook=_revive) if mime == "application/json" else text
    return FloorMessage(subject[9:], kind, sender, datetime.fromisoformat(moment), version, data)


def floor_socket(kind: int, high_water_mark: int = HIGH_WATER_MARK) -> zmq.Socket[bytes]:
    """Return a socket that can hold as many messages as posttroll's."""
    sock = zmq.Context.instance().socket(kind)
    sock.linger = 0
    sock.set_hwm(high_water_mark)
    return sock


def port_of(setting: str) -> int:
    """Return the port that the environment gives."""
    return int(os.environ["POSTTROLL_" + setting])


def floor_announcement(name: str, address: str) -> str:
    """Return what a publisher tells a nameserver."""
    return floor_encode(f"/address/{name}", "info", {"URI": address, "service": [name]})


def floor_nameserver(multicast: bool) -> None:
    """Keep what publishers announce in a dictionary, publish what is new, and answer lookups from it."""
    services: dict[str, dict[str, dict[str, Any]]] = {}
    lookups, registrations, news = floor_socket(zmq.REP), floor_socket(zmq.REP), floor_socket(zmq.PUB)
    lookups.bind(f"tcp://*:{port_of('NAMESERVER_PORT')}")
    news.bind(f"tcp://*:{port_of('ADDRESS_PUBLISH_PORT')}")
    poller = zmq.Poller()
    poller.register(lookups, zmq.POLLIN)
    if multicast:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("", port_of("BROADCAST_PORT")))
        membership = socket.inet_aton(os.environ["POSTTROLL_MC_GROUP"]) + socket.inet_aton("127.0.0.1")
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        poller.register(udp, zmq.POLLIN)
    else:
        registrations.bind(f"tcp://*:{port_of('BROADCAST_PORT')}")
        poller.register(registrations, zmq.POLLIN)

    def register(raw: bytes) -> None:
        data = floor_decode(raw.decode()).data
        now = datetime.now(timezone.utc)
        for service in data["service"]:
            entries = services.setdefault(service, {})
            if data["URI"] not in entries:
                news.send(raw)
            entries[data["URI"]] = {**data, "status": True, "receive_time": now}

    while True:
        for sock, _ in poller.poll():
            if sock is lookups:
                service = floor_decode(lookups.recv_string()).data["service"]
                lookups.send_string(floor_encode("/oper/ns", "info", list(services.get(service, {}).values())))
            elif sock is registrations:
                register(registrations.recv())
                registrations.send(b"ok")
            else:
                register(udp.recv(65536))


def floor_publisher(name: str) -> None:
    """Register a publisher with the nameserver every two seconds, for ever."""
    publisher = floor_socket(zmq.PUB)
    address = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://*')}"
    threading.Thread(target=floor_announce, args=(name, address), daemon=True).start()
    print("ready", flush=True)
    while True:
        time.sleep(3600)


def floor_announce(name: str, address: str) -> None:
    """Register an address every two seconds, for ever."""
    sock = floor_socket(zmq.REQ)
    sock.connect(f"tcp://localhost:{port_of('BROADCAST_PORT')}")
    while True:
        sock.send_string(floor_announcement(name, address))
        sock.recv()
        time.sleep(2)


def floor_subscriber() -> None:
    """Receive from all publishers that the nameserver makes known, for ever."""
    news, messages = floor_socket(zmq.SUB), floor_socket(zmq.SUB)
    news.subscribe(b"pytroll://address/")
    news.connect(f"tcp://localhost:{port_of('ADDRESS_PUBLISH_PORT')}")
    messages.subscribe(b"pytroll:/")
    poller = zmq.Poller()
    poller.register(news, zmq.POLLIN)
    poller.register(messages, zmq.POLLIN)
    print("ready", flush=True)
    while True:
        for sock, _ in poller.poll():
            message = floor_decode(sock.recv_string())
            if sock is news:
                messages.connect(message.data["URI"])


def floor_lookup(service: str) -> Any:
    """Ask the nameserver for the publishers of a service."""
    sock = floor_socket(zmq.REQ)
    sock.connect(f"tcp://localhost:{port_of('NAMESERVER_PORT')}")
    sock.send_string(floor_encode("/oper/ns", "request", {"service": service}))
    answer = floor_decode(sock.recv_string()).data
    sock.close()
    return answer


# ======================================================================================================================
# Tools
# ======================================================================================================================


def free_ports() -> Iterator[int]:
    """Yield ports that are free, and that the system does not give to outgoing connections before they are used."""
    for port in random.sample(range(10000, 32000), 22000):
        with socket.socket() as sock:
            is_free = sock.connect_ex(("127.0.0.1", port)) != 0
        if is_free:
            yield port


PORTS = free_ports()


class Counter:
    """A number in memory that two processes share: how many messages have arrived."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._view = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

    def set(self, value: int) -> None:
        """Set the number."""
        self._view[0] = value

    def get(self) -> int:
        """Return the number."""
        return self._view[0]

    def wait_for(self, value: int) -> None:
        """Wait until the number is at least *value*."""
        deadline = time.monotonic() + DEADLINE
        while self._view[0] < value:
            time.sleep(0.0005)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._view[0]} messages instead of {value} have arrived")


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Do *work*; return when it began and ended, and the CPU time of the process for it."""
    gc.collect()
    cpu, start = time.process_time(), time.monotonic()
    work()
    end = time.monotonic()
    return {"start": start, "end": end, "seconds": end - start, "cpu": time.process_time() - cpu}


def resident_memory(pid: int | str = "self") -> float:
    """Return the resident memory of a process in kB."""
    return float(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]


def wake_ups(pid: int) -> int:
    """Return how often the threads of a process have gone to sleep."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)", text)[1]) for text in texts)  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used; exact to nanoseconds, unlike /proc/PID/stat."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


# ======================================================================================================================
# Workers: what a side does in a process of its own
# ======================================================================================================================


class Worker:
    """What the workers of all sides can do.  A subclass says how a message is made, sent and received."""

    def __init__(self) -> None:
        self.cases = cases()
        self.raw: dict[str, str] = {}

    # -- messages --

    def time_encode(self, case: str, count: int) -> float:
        """Return the CPU time in microseconds that it takes to encode a message."""
        data, binary = self.cases[case], case.endswith("binary")
        cpu = time.thread_time()
        self.encode_many(data, binary, count)
        return (time.thread_time() - cpu) / count * 1e6

    def time_decode(self, case: str, count: int) -> float:
        """Return the CPU time in microseconds that it takes to decode a message."""
        data, binary = self.cases[case], case.endswith("binary")
        raw = self.raw.get(case) or self.raw.setdefault(case, self.encode(data, binary))
        if self.decode(raw) != data:
            raise AssertionError(f"{case}: what has been decoded differs from what has been encoded")
        cpu = time.thread_time()
        self.decode_many(raw, count)
        return (time.thread_time() - cpu) / count * 1e6

    def publish(self, count: int, counter: str) -> dict[str, float]:
        """Encode and send messages, as fast as they are received."""
        arrived, data = Counter(counter), self.cases["dictionary"]

        def work() -> None:
            for sent in range(0, count, CHUNK):
                arrived.wait_for(sent - WINDOW)
                self.send_many(data, CHUNK)

        return measured(work)

    def consume(self, count: int, counter: str) -> dict[str, float]:
        """Receive and decode messages."""
        arrived = Counter(counter)

        def work() -> None:
            for received in range(0, count, CHUNK):
                self.receive_many(CHUNK)
                arrived.set(received + CHUNK)

        return measured(work)

    def publish_slowly(self, count: int, rate: float) -> None:
        """Send messages that say when they began to be made."""
        due = time.monotonic()
        for _ in range(count):
            due += 1 / rate
            time.sleep(max(due - time.monotonic(), 0))
            self.send_one({**self.cases["dictionary"], "sent": time.monotonic()})

    def consume_slowly(self, count: int) -> list[float]:
        """Return how long messages were on their way, until decoded, in microseconds."""
        latencies = []
        for _ in range(count):
            data = self.receive_one()
            latencies.append((time.monotonic() - data["sent"]) * 1e6)
        return latencies

    def await_connection(self, counter: str) -> None:
        """Receive until a message has come: it is connected."""
        self.receive_one()
        Counter(counter).set(1)
        while self.receive_one() != "last":
            pass

    def greet(self, counter: str) -> None:
        """Send until a message has arrived."""
        arrived = Counter(counter)
        while not arrived.get():
            self.send_one("first")
            time.sleep(0.005)
        time.sleep(0.1)  # what it had missed before has come by then
        self.send_one("last")

    # -- the nameserver --

    def time_lookups(self, services: list[str]) -> list[float]:
        """Return how long each lookup took, in microseconds."""
        times = []
        for service in services:
            start = time.perf_counter()
            found = self.lookup(service)
            times.append((time.perf_counter() - start) * 1e6)
            if len(found) != 1:
                raise AssertionError(f"{service} has {len(found)} publishers")
        return times

    def register(self, first: int, count: int, each_connects: bool = False) -> dict[str, float]:
        """Register services by requests to the nameserver, made before; all sides send the same.

        With *each_connects* over a new request socket each time, as different publishers do; else over one.
        """
        sock = self._registration_socket()
        announcements = [
            floor_announcement(f"service_{i}", f"tcp://127.0.0.1:{1024 + i}").replace(" v1.2 ", " v1.01 ").encode()
            for i in range(first, first + count)
        ]

        def work() -> None:
            nonlocal sock
            for announcement in announcements:
                if each_connects:
                    sock.close()
                    sock = self._registration_socket()
                sock.send(announcement)
                sock.recv()

        result = measured(work)
        sock.close()
        return result

    @staticmethod
    def _registration_socket() -> zmq.Socket[bytes]:
        sock = floor_socket(zmq.REQ)
        sock.connect(f"tcp://localhost:{port_of('BROADCAST_PORT')}")
        sock.rcvtimeo = int(DEADLINE * 1000)
        return sock

    def time_to_first(self, name: str, counter: str) -> float:
        """Start a publisher and send until a message has arrived; return when it began."""
        arrived = Counter(counter)
        start = time.monotonic()
        self.start_publisher(name)
        while not arrived.get():
            self.send_one({"sent": start})
            time.sleep(0.0005)
        self.stop_publisher()
        return start

    def await_first(self, counter: str) -> float:
        """Return how long it took until the first message of a new publisher came, in milliseconds."""
        while True:
            data = self.receive_one()
            now = time.monotonic()
            if data["sent"] > getattr(self, "last_first", 0):
                self.last_first = data["sent"]
                Counter(counter).set(1)
                return (now - data["sent"]) * 1e3

    # -- senders and receivers of encoded messages, the same for all sides --

    def open_sources(self, count: int) -> list[str]:
        """Open publishers' sockets that send encoded messages; return their addresses."""
        zmq.Context.instance().set(zmq.MAX_SOCKETS, 10000)
        self.sources = [floor_socket(zmq.XPUB) for _ in range(count)]
        return [f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}" for sock in self.sources]

    def await_subscriptions(self) -> None:
        """Wait until each source has a subscriber."""
        for sock in self.sources:
            if not sock.poll(DEADLINE * 1000):
                raise TimeoutError("A publisher has no subscriber")
            while sock.poll(0):
                sock.recv()

    def send_encoded(self, count: int, counter: str, raw: str, burst: int) -> dict[str, float]:
        """Send an encoded message many times, *burst* times from each source in turn."""
        arrived, data, sources = Counter(counter), raw.encode(), itertools.cycle(self.sources)

        def work() -> None:
            sock = next(sources)
            for sent in range(count):
                if not sent % CHUNK:
                    arrived.wait_for(sent - WINDOW)
                if not sent % burst:
                    sock = next(sources)
                sock.send(data)

        return measured(work)

    def open_sinks(self, address: str, count: int) -> None:
        """Open subscribers' sockets that take messages without a look at them."""
        self.sinks = [floor_socket(zmq.SUB) for _ in range(count)]
        for sock in self.sinks:
            sock.subscribe(b"")
            sock.connect(address)
            sock.rcvtimeo = int(DEADLINE * 1000)

    def await_greeting(self, counter: str) -> None:
        """Receive until a message has come on each socket: all are connected."""
        for sock in self.sinks:
            sock.recv()
        Counter(counter).set(1)
        for sock in self.sinks:
            while not sock.recv().endswith(b" last"):
                pass

    def drain(self, count: int, counter: str) -> None:
        """Receive *count* messages on each socket."""
        arrived = Counter(counter)
        for received in range(count):
            for sock in self.sinks:
                sock.recv()
            arrived.set(received + 1)

    def memory(self) -> float:
        """Return the resident memory in kB."""
        return resident_memory()


class FloorWorker(Worker):
    """Bare pyzmq."""

    def encode(self, data: Any, binary: bool) -> str:
        return floor_encode(SUBJECT, "file", data, binary)

    def encode_many(self, data: Any, binary: bool, count: int) -> None:
        for _ in range(count):
            floor_encode(SUBJECT, "file", data, binary)

    def decode(self, raw: str) -> Any:
        return floor_decode(raw).data

    def decode_many(self, raw: str, count: int) -> None:
        for _ in range(count):
            floor_decode(raw)

    def open_publisher(self) -> str:
        self.publisher = floor_socket(zmq.PUB)
        return f"tcp://127.0.0.1:{self.publisher.bind_to_random_port('tcp://*')}"

    def send_many(self, data: Any, count: int) -> None:
        send = self.publisher.send_string
        for _ in range(count):
            send(floor_encode(SUBJECT, "file", data))

    def send_one(self, data: Any) -> None:
        self.publisher.send_string(floor_encode(SUBJECT, "file", data))

    def open_subscriber(self, addresses: list[str]) -> None:
        self.subscriber = floor_socket(zmq.SUB)
        self.subscriber.subscribe(b"pytroll:/")
        for address in addresses:
            self.subscriber.connect(address)

    def receive_many(self, count: int) -> None:
        receive = self.subscriber.recv_string
        for _ in range(count):
            floor_decode(receive())

    def receive_one(self) -> Any:
        return floor_decode(self.subscriber.recv_string()).data

    def lookup(self, service: str) -> Any:
        return floor_lookup(service)

    def start_publisher(self, name: str) -> None:
        """Open a publisher, and register it with the nameserver, in a thread as everywhere."""
        threading.Thread(target=self._register, args=(name, self.open_publisher())).start()

    def _register(self, name: str, address: str) -> None:
        sock = floor_socket(zmq.REQ)
        sock.connect(f"tcp://localhost:{port_of('BROADCAST_PORT')}")
        sock.send_string(floor_announcement(name, address))
        sock.recv()
        sock.close()

    def stop_publisher(self) -> None:
        self.publisher.close()

    def follow(self, name: str) -> None:
        """Subscribe to the publishers of a service, as the nameserver makes them known."""
        news = floor_socket(zmq.SUB)
        news.subscribe(f"pytroll://address/{name} ".encode())
        news.connect(f"tcp://localhost:{port_of('ADDRESS_PUBLISH_PORT')}")
        self.open_subscriber([])
        self.receive_one = lambda: self._receive_following(news)  # type: ignore[method-assign]

    def _receive_following(self, news: zmq.Socket[bytes]) -> Any:
        poller = zmq.Poller()
        poller.register(news, zmq.POLLIN)
        poller.register(self.subscriber, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if news in ready:
                self.subscriber.connect(floor_decode(news.recv_string()).data["URI"])
            if self.subscriber in ready:
                return floor_decode(self.subscriber.recv_string()).data


class LibraryWorker(Worker):
    """Posttroll: ours, or the known package, with the same calls."""

    def __init__(self) -> None:
        super().__init__()
        from posttroll.message import Message

        self.message = Message

    def encode(self, data: Any, binary: bool) -> str:
        return self.message(SUBJECT, "file", data, binary).encode()

    def encode_many(self, data: Any, binary: bool, count: int) -> None:
        message = self.message
        for _ in range(count):
            message(SUBJECT, "file", data, binary).encode()

    def decode(self, raw: str) -> Any:
        return self.message.decode(raw).data

    def decode_many(self, raw: str, count: int) -> None:
        decode = self.message.decode
        for _ in range(count):
            decode(raw)

    def open_publisher(self) -> str:
        from posttroll.publisher import Publisher

        self.publisher = Publisher("tcp://127.0.0.1:0", "bench")
        self.publisher.start()
        return f"tcp://127.0.0.1:{self.publisher.port_number}"

    def send_many(self, data: Any, count: int) -> None:
        message, send = self.message, self.publisher.send
        for _ in range(count):
            send(message(SUBJECT, "file", data).encode())

    def send_one(self, data: Any) -> None:
        self.publisher.send(self.message(SUBJECT, "file", data).encode())

    def open_subscriber(self, addresses: list[str]) -> None:
        from posttroll.subscriber import Subscriber

        self.messages = Subscriber(addresses, "").recv()

    def open_durable_subscriber(self, addresses: list[str], directory: str) -> None:
        from posttroll.subscriber import Subscriber

        os.environ["POSTTROLL_DURABLE_DIRECTORY"] = directory
        self.messages = Subscriber(addresses, "", durable="bench").recv()

    def receive_many(self, count: int) -> None:
        for _ in itertools.islice(self.messages, count):
            pass

    def receive_one(self) -> Any:
        return next(self.messages).data

    def lookup(self, service: str) -> Any:
        from posttroll.ns import get_pub_address

        return get_pub_address(service)

    def start_publisher(self, name: str) -> None:
        from posttroll.publisher import NoisyPublisher

        self.publisher = NoisyPublisher(name, nameservers=["localhost"])
        self.publisher.start()

    def stop_publisher(self) -> None:
        self.publisher.stop()

    def follow(self, name: str) -> None:
        from posttroll.subscriber import NSSubscriber

        subscriber = NSSubscriber(name, addr_listener=True, timeout=1).start()
        self.messages = subscriber.recv()

    def soak_publish(self, seconds: float, rate: float, publishers: int) -> int:
        """Send *rate* messages a second from publishers that come and go; return how many."""
        from posttroll.publisher import NoisyPublisher

        names, ticks, turns = itertools.count(), itertools.count(1), 0
        running: list[Any] = []

        def begin() -> None:
            publisher = NoisyPublisher(f"soak_{next(names)}", aliases=["soak"], nameservers=["localhost"])
            publisher.start()
            if not publisher.wait_for_subscribers(1, DEADLINE):
                raise TimeoutError("The subscriber does not come")
            running.append(publisher)

        for _ in range(publishers):
            begin()
        content = self.cases["dictionary"]
        start = last_change = time.monotonic()
        while time.monotonic() - start < seconds:
            for _ in range(int(rate / 100)):
                running[turns % publishers].send(self.message(SUBJECT, "file", {**content, "index": turns}).encode())
                turns += 1
            if time.monotonic() - last_change > 2:
                last_change = time.monotonic()
                running.pop(0).stop()
                begin()
            time.sleep(max(start + next(ticks) / 100 - time.monotonic(), 0))
        time.sleep(2)  # the last message overtakes none
        running[0].send(self.message(SUBJECT, "end").encode())
        for publisher in running:
            publisher.stop()
        return turns

    def soak_receive(self) -> int:
        """Receive until the last message; return how many have come."""
        messages = itertools.takewhile(lambda message: message.type != "end", self.messages)
        return sum(1 for _ in messages)


class NatsWorker(FloorWorker):
    """The floor's messages over NATS."""

    def open_publisher(self) -> str:
        import asyncio

        import nats

        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(nats.connect(f"nats://127.0.0.1:{port_of('BROKER_PORT')}"))
        return ""

    def send_many(self, data: Any, count: int) -> None:
        async def send() -> None:
            for _ in range(count):
                await self.client.publish("bench", floor_encode(SUBJECT, "file", data).encode())
            await self.client.flush()

        self.loop.run_until_complete(send())

    def send_one(self, data: Any) -> None:
        self.send_many(data, 1)

    def open_subscriber(self, addresses: list[str]) -> None:
        import asyncio

        self.open_publisher()
        self.decoded: list[Any] = []
        self.news = asyncio.Event()

        async def take(message: Any) -> None:
            self.decoded.append(floor_decode(message.data.decode()).data)
            self.news.set()

        self.loop.run_until_complete(self.client.subscribe("bench", cb=take))

    def receive_many(self, count: int) -> None:
        self._take(count)

    def receive_one(self) -> Any:
        return self._take(1)[0]

    def _take(self, count: int) -> list[Any]:
        async def wait() -> None:
            while len(self.decoded) < count:
                self.news.clear()
                await self.news.wait()

        self.loop.run_until_complete(wait())
        taken, self.decoded = self.decoded[:count], self.decoded[count:]
        return taken


class MqttWorker(FloorWorker):
    """The floor's messages over MQTT."""

    def open_publisher(self) -> str:
        import paho.mqtt.client

        self.client = paho.mqtt.client.Client(paho.mqtt.client.CallbackAPIVersion.VERSION2)
        self.client.connect("127.0.0.1", port_of("BROKER_PORT"))
        self.client.loop_start()
        return ""

    def send_many(self, data: Any, count: int) -> None:
        for _ in range(count):
            self.client.publish("bench", floor_encode(SUBJECT, "file", data))

    def send_one(self, data: Any) -> None:
        self.send_many(data, 1)

    def open_subscriber(self, addresses: list[str]) -> None:
        self.incoming: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.open_publisher()
        self.client.on_message = lambda client, userdata, message: self.incoming.put(message.payload)
        self.client.subscribe("bench")

    def receive_many(self, count: int) -> None:
        for _ in range(count):
            floor_decode(self.incoming.get().decode())

    def receive_one(self) -> Any:
        return floor_decode(self.incoming.get().decode()).data


class RedisWorker(FloorWorker):
    """The floor's messages over Redis."""

    def open_publisher(self) -> str:
        import redis

        self.client = redis.Redis(port=port_of("BROKER_PORT"))
        return ""

    def send_many(self, data: Any, count: int) -> None:
        for _ in range(count):
            self.client.publish("bench", floor_encode(SUBJECT, "file", data))

    def send_one(self, data: Any) -> None:
        self.send_many(data, 1)

    def open_subscriber(self, addresses: list[str]) -> None:
        self.open_publisher()
        subscription = self.client.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe("bench")
        self.incoming = subscription.listen()

    def receive_many(self, count: int) -> None:
        for message in itertools.islice(self.incoming, count):
            floor_decode(message["data"].decode())

    def receive_one(self) -> Any:
        return floor_decode(next(self.incoming)["data"].decode()).data


WORKERS: dict[str, type[Worker]] = {
    "floor": FloorWorker,
    "library": LibraryWorker,
    "nats": NatsWorker,
    "mqtt": MqttWorker,
    "redis": RedisWorker,
}
# The Python module of the client, and the command of the server up to the port.
BROKERS = {
    "nats": ("nats", ["nats-server", "-a", "127.0.0.1", "-p"]),
    "mqtt": ("paho", ["mosquitto", "-p"]),
    "redis": ("redis", ["redis-server", "--bind", "127.0.0.1", "--save", "", "--port"]),
}


def run_worker(kind: str) -> None:
    """Do what the lines on the standard input say, and answer each by a line."""
    worker = WORKERS[kind]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    for line in sys.stdin:
        name, args = json.loads(line)
        answers.write(json.dumps(getattr(worker, name)(*args)) + "\n")
        answers.flush()
    os._exit(0)  # publishers and subscribers are still open


# ======================================================================================================================
# Programs: what is started anew to measure its start, its memory, or its idleness
# ======================================================================================================================

FLOOR_START = """
import datetime, json, re
import zmq
context = zmq.Context()
publisher = context.socket(zmq.PUB)
port = publisher.bind_to_random_port("tcp://127.0.0.1")
subscriber = context.socket(zmq.SUB)
subscriber.subscribe(b"")
subscriber.connect(f"tcp://127.0.0.1:{port}")
"""
LIBRARY_START = """
import posttroll
from posttroll.publisher import Publisher
from posttroll.subscriber import Subscriber
publisher = Publisher("tcp://127.0.0.1:0", "bench")
publisher.start()
subscriber = Subscriber([f"tcp://127.0.0.1:{publisher.port_number}"], "")
"""
START = {
    "floor": FLOOR_START + "context.destroy(0)\n",
    "library": LIBRARY_START + "subscriber.close()\npublisher.stop()\n",
}

LIBRARY_PUBLISHER = """
import time
from posttroll.message import Message
from posttroll.publisher import NoisyPublisher
publisher = NoisyPublisher("bench", nameservers=["localhost"])
publisher.start()
print("ready", flush=True)
time.sleep(1e6)
"""

LIBRARY_SUBSCRIBER = """
from posttroll.subscriber import Subscribe
with Subscribe("bench", addr_listener=True, timeout=1) as subscriber:
    print("ready", flush=True)
    for message in subscriber.recv():
        pass
"""

# A process of the floor's consists of the floor's section of this file, and imports what that needs and nothing else.
FLOOR_PROGRAM = (
    "from __future__ import annotations\n"
    "import json, os, re, socket, threading, time\n"
    "from datetime import datetime, timezone\n"
    "from typing import Any, NamedTuple\n"
    "import zmq\n"
    "SUBJECT, HIGH_WATER_MARK = 'x', 200000\n"
    "# " + Path(__file__).read_text().partition("# The floor: ")[2].partition("# Tools\n")[0]
)
MANY_PUBLISHERS = {
    "floor": FLOOR_PROGRAM
    + """
for number in range(50):
    publisher = floor_socket(zmq.PUB)
    address = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
    threading.Thread(target=floor_announce, args=(f"bench_{number}", address), daemon=True).start()
print("ready", flush=True)
time.sleep(1e6)
""",
    "library": """
import time
from posttroll.publisher import NoisyPublisher
publishers = [NoisyPublisher(f"bench_{number}", nameservers=["localhost"]) for number in range(50)]
for publisher in publishers:
    publisher.start()
print("ready", flush=True)
time.sleep(1e6)
""",
}
PUBLISHER = {"floor": FLOOR_PROGRAM + "floor_publisher('bench')\n", "library": LIBRARY_PUBLISHER}
SUBSCRIBER = {"floor": FLOOR_PROGRAM + "floor_subscriber()\n", "library": LIBRARY_SUBSCRIBER}


# ======================================================================================================================
# Sides and rounds
# ======================================================================================================================


class WorkerProcess:
    """A worker, as seen from the program that measures."""

    def __init__(self, side: Side) -> None:
        command = [side.python, os.path.abspath(__file__), "--worker", side.kind]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, **side.surroundings)
        self.pid = self._process.pid

    def tell(self, name: str, *args: Any) -> None:
        """Have the worker begin with something; `answer` waits for the end of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, args]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Return the result of what the worker was told."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], DEADLINE)[0]:
            raise TimeoutError(f"No answer in {DEADLINE} s")
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError("A worker has failed; its error is above")
        return json.loads(line)

    def ask(self, name: str, *args: Any) -> Any:
        """Have the worker do something, and return the result."""
        self.tell(name, *args)
        return self.answer()

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.communicate()


class Side:
    """One of those that are compared: how to start its processes, and those that run."""

    def __init__(self, name: str, kind: str, python: str, path: str | None) -> None:
        self.name = name
        self.kind = kind
        self.python = python
        self.environment = {key: text for key, text in os.environ.items() if not key.startswith("POSTTROLL_")}
        for unwanted in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):  # modules are compiled once, not at each start
            self.environment.pop(unwanted, None)
        if path is not None:
            self.environment["PYTHONPATH"] = path
        keys = ("NAMESERVER_PORT", "ADDRESS_PUBLISH_PORT", "BROADCAST_PORT", "BROKER_PORT")
        ports = {key: str(port) for key, port in zip(keys, PORTS)}
        group = f"239.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        settings = {**ports, "MC_GROUP": group, "MULTICAST_INTERFACE": "127.0.0.1"}
        self.environment.update({"POSTTROLL_" + key: text for key, text in settings.items()})
        # Not in the directory of this program: Python would find our posttroll there, whatever is installed.
        self.surroundings: dict[str, Any] = {"env": self.environment, "cwd": tempfile.gettempdir()}
        self._running: list[Any] = []
        self._counters: list[str] = []

    def worker(self) -> WorkerProcess:
        """Start a worker."""
        worker = WorkerProcess(self)
        self._running.append(worker)
        return worker

    def program(self, *args: str, ready: str | None = "ready") -> subprocess.Popen[str]:
        """Start a Python program; with *ready*, wait for the line in which it says this."""
        command = [self.python, *args]
        out = subprocess.PIPE if ready else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, text=True, **self.surroundings)
        self._running.append(process)
        if ready:
            assert process.stdout is not None
            process.stdout.readline()
        return process

    def nameserver(self, multicast: bool = False, max_age: float | None = None) -> subprocess.Popen[str]:
        """Start the nameserver of this side, with *max_age* one that forgets sooner; return when it answers."""
        if self.name == "floor":
            process = self.program("-c", FLOOR_PROGRAM + f"floor_nameserver({multicast})\n", ready=None)
        elif max_age is not None:
            code = f"from posttroll.ns import NameServer; NameServer({max_age}, multicast_enabled={multicast}).run()"
            process = self.program("-c", code, ready=None)
        else:
            arguments = [] if multicast else ["--no-multicast"]  # started as the installed script `nameserver` does it
            process = self.program("-c", "from posttroll.ns import main; main()", *arguments, ready=None)
        request = floor_encode("/oper/ns", "request", {"service": "none"}).replace(" v1.2 ", " v1.01 ")
        for _ in range(100):
            sock = floor_socket(zmq.REQ)
            sock.connect(f"tcp://127.0.0.1:{self.environment['POSTTROLL_NAMESERVER_PORT']}")
            sock.send_string(request)
            is_ready = sock.poll(200)
            sock.close()
            if is_ready:
                return process
        raise TimeoutError(f"The nameserver of {self.name} does not answer")

    def broker(self) -> None:
        """Start the server of a broker, and wait until it takes connections."""
        port = self.environment["POSTTROLL_BROKER_PORT"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._running.append(subprocess.Popen([*BROKERS[self.kind][1], port], **quiet, **self.surroundings))
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", int(port))):
                return
            time.sleep(0.05)
        raise TimeoutError(f"The server of {self.name} does not start")

    def counter(self) -> str:
        """Return the file of a new counter."""
        descriptor, path = tempfile.mkstemp(prefix="posttroll-bench-")
        os.write(descriptor, bytes(8))
        os.close(descriptor)
        self._counters.append(path)
        return path

    def close(self) -> None:
        """End all processes."""
        for running in self._running:
            if isinstance(running, WorkerProcess):
                running.close()
            else:
                running.kill()
                running.communicate()
        for path in self._counters:
            os.unlink(path)
        self._running, self._counters = [], []


class Row:
    """A line of the table: a figure of all sides, round by round."""

    def __init__(self, what: str, unit: str, goal: float | None, higher_is_better: bool, absolute: bool) -> None:
        self.what = what
        self.unit = unit
        self.goal = goal
        self.higher_is_better = higher_is_better
        self.absolute = absolute
        self.samples: dict[str, list[float]] = {}

    def add(self, side: str, value: float) -> None:
        """Take note of the value of a round."""
        self.samples.setdefault(side, []).append(value)

    def median(self, side: str) -> float | None:
        """Return the median of a side, None if it could not be measured."""
        return statistics.median(self.samples[side]) if side in self.samples else None

    def ratio(self, side: str) -> float | None:
        """Return the median of the ratios to the floor."""
        pairs = zip(self.samples.get(side, []), self.samples.get("floor", []))
        ratios = [value / floor for value, floor in pairs if floor]
        return statistics.median(ratios) if ratios else None

    def is_reached(self) -> bool | None:
        """Whether ours is as good as the goal."""
        value = self.median("ours") if self.absolute else self.ratio("ours")
        if self.goal is None or value is None:
            return None
        return value >= self.goal if self.higher_is_better else value <= self.goal

    def as_text(self, sides: list[str]) -> str:
        """Return the line."""
        cells = [f"{self.what:58}{self.unit:>9}"]
        for side in sides:
            cells.append(f"{number(self.median(side)):>10}")
            if side != "floor":
                cells.append(f"{number(self.ratio(side)):>8}")
        mark = {True: "", False: "  <-- missed", None: ""}[self.is_reached()]
        unit = " " + self.unit if self.absolute and self.goal is not None else ""
        return "".join(cells) + f"{number(self.goal):>8}{unit}{mark}"

    def as_dict(self, sides: list[str]) -> dict[str, Any]:
        """Return the line for --json."""
        medians = {side: self.median(side) for side in sides}
        ratios = {side: self.ratio(side) for side in sides if side != "floor"}
        fields = {"what": self.what, "unit": self.unit, "goal": self.goal, "reached": self.is_reached()}
        return {**fields, "medians": medians, "ratios": ratios, "samples": self.samples}


def number(value: float | None) -> str:
    """Return three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


class Bench:
    """The sides, how long to measure, and the rows that come out."""

    def __init__(self, sides: list[Side], brokers: list[Side], quick: bool) -> None:
        self.sides = sides
        self.brokers = brokers
        self.quick = quick
        self.rows: list[Row] = []
        self.names = [side.name for side in sides + brokers]

    def row(
        self, what: str, unit: str, goal: float | None = None, higher_is_better: bool = False, absolute: bool = False
    ) -> Row:
        """Begin a row of the table."""
        row = Row(what, unit, goal, higher_is_better, absolute)
        self.rows.append(row)
        return row

    def rounds(self, count: int, quick: int, brokers: bool = False) -> Iterator[Side]:
        """Yield the sides (with *brokers*, these too) in turn, round by round; each round in another order."""
        sides = self.sides + (self.brokers if brokers else [])
        for index in range(quick if self.quick else count):
            shift = index % len(sides)
            yield from sides[shift:] + sides[:shift]

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Print what a section has found, and end its processes."""
        known = len(self.rows)
        try:
            yield
        finally:
            for side in self.sides + self.brokers:
                side.close()
        print(f"-- {name}", flush=True)
        for row in self.rows[known:]:
            print(row.as_text(self.names), flush=True)

    def print_head(self) -> None:
        """Print the names of the columns."""
        titles = "".join(f"{name:>10}" + ("" if name == "floor" else f"{'ratio':>8}") for name in self.names)
        print(f"{'':67}{titles}{'goal':>8}")


# ======================================================================================================================
# Sections
# ======================================================================================================================


def connected(side: Side) -> tuple[WorkerProcess, WorkerProcess, str]:
    """Return a publisher and a subscriber that are connected, and their counter."""
    if side.kind in BROKERS:
        side.broker()
    publisher, subscriber, counter = side.worker(), side.worker(), side.counter()
    subscriber.ask("open_subscriber", [publisher.ask("open_publisher")])
    subscriber.tell("await_connection", counter)
    publisher.ask("greet", counter)
    subscriber.answer()
    return publisher, subscriber, counter


def measure_messages(bench: Bench) -> None:
    """Two processes, from encode to decode."""
    rate = bench.row("two processes, encode to decode, nothing lost", "msgs/s", 0.93, higher_is_better=True)
    sending = bench.row("  CPU of the publisher", "us/msg", 1.3)
    receiving = bench.row("  CPU of the subscriber", "us/msg", 1.15)
    pairs = {side.name: connected(side) for side in bench.sides + bench.brokers}
    for side in bench.rounds(21, 11, brokers=True):
        publisher, subscriber, counter = pairs[side.name]
        count = 20000 if side.name in ("floor", "ours") else 3000
        Counter(counter).set(0)
        subscriber.tell("consume", count, counter)
        sent = publisher.ask("publish", count, counter)
        received = subscriber.answer()
        rate.add(side.name, count / (received["end"] - sent["start"]))
        sending.add(side.name, sent["cpu"] / count * 1e6)
        receiving.add(side.name, received["cpu"] / count * 1e6)


def measure_sources(bench: Bench, count: int, burst: int, rounds: tuple[int, int], size: int) -> Iterator[Any]:
    """Yield side, seconds and CPU seconds a message of a subscriber to *count* addresses, from which one sends."""
    sources, subscribers = {}, {}
    raw = floor_encode(SUBJECT, "file", dictionary())
    for side in bench.sides:
        source, subscriber, counter = side.worker(), side.worker(), side.counter()
        try:
            subscriber.ask("open_subscriber", source.ask("open_sources", count))
            source.ask("await_subscriptions")
        except (ChildProcessError, TimeoutError) as error:
            print(f"{side.name} cannot subscribe to {count} addresses: {error}", file=sys.stderr)
            continue
        sources[side.name], subscribers[side.name] = (source, counter), subscriber
    for side in bench.rounds(*rounds):
        if side.name in sources:
            (source, counter), subscriber = sources[side.name], subscribers[side.name]
            messages = size // 5 if side.name == "known" else size
            Counter(counter).set(0)
            subscriber.tell("consume", messages, counter)
            sent = source.ask("send_encoded", messages, counter, raw, burst)
            received = subscriber.answer()
            yield side.name, (received["end"] - sent["start"]) / messages, received["cpu"] / messages


def measure_receive(bench: Bench) -> None:
    """Receiving what has been encoded before."""
    rate = bench.row("receiving pre-encoded messages", "msgs/s", 0.95, higher_is_better=True)
    receiving = bench.row("  CPU of the subscriber", "us/msg")
    for name, seconds, cpu in measure_sources(bench, 1, 10**9, (21, 11), 20000):
        rate.add(name, 1 / seconds)
        receiving.add(name, cpu * 1e6)


def measure_durable(bench: Bench) -> None:
    """What it costs to write down what has been handled."""
    row = bench.row("durable against not: CPU of the subscriber, more", "us/msg", 5, absolute=True)
    [side] = [side for side in bench.sides if side.name == "ours"]
    raw, messages = floor_encode(SUBJECT, "file", dictionary()), 20000
    with tempfile.TemporaryDirectory() as directory:
        pairs = []
        for opening in (("open_subscriber",), ("open_durable_subscriber", directory)):
            source, subscriber, counter = side.worker(), side.worker(), side.counter()
            subscriber.ask(opening[0], source.ask("open_sources", 1), *opening[1:])
            source.ask("await_subscriptions")
            pairs.append((source, subscriber, counter))
        for _ in range(5 if bench.quick else 21):
            seconds = []
            for source, subscriber, counter in pairs:
                Counter(counter).set(0)
                subscriber.tell("consume", messages, counter)
                source.ask("send_encoded", messages, counter, raw, 10**9)
                seconds.append(subscriber.answer()["cpu"])
            row.add("ours", (seconds[1] - seconds[0]) / messages * 1e6)
        side.close()


def measure_latency(bench: Bench) -> None:
    """One-way latency."""
    row = bench.row("one-way latency at 100 msgs/s, median", "us", 1.05)
    pairs = {side.name: connected(side) for side in bench.sides + bench.brokers}
    for side in bench.rounds(21, 9, brokers=True):
        publisher, subscriber, _ = pairs[side.name]
        subscriber.tell("consume_slowly", 100)
        publisher.ask("publish_slowly", 100, 100)
        row.add(side.name, statistics.median(subscriber.answer()))


def measure_codec(bench: Bench, name: str, goals: tuple[float | None, ...]) -> None:
    """Encoding or decoding, in one thread; CPU time."""
    workers = {side.name: side.worker() for side in bench.sides}
    counts = dict.fromkeys(cases(), 500)
    counts.update({"50-file data set": 100, "short text": 3000, "100 kB not ASCII, binary": 50})
    rows = {}
    for case, goal in itertools.zip_longest(cases(), goals):
        rows[case] = bench.row(f"{name}, {case}", "msgs/s", goal, higher_is_better=True)
    for side in bench.rounds(100, 30):
        for case, count in counts.items():
            microseconds = workers[side.name].ask(f"time_{name}", case, count // 5 if side.name == "known" else count)
            rows[case].add(side.name, 1e6 / microseconds)


def measure_encode(bench: Bench) -> None:
    """Encoding."""
    measure_codec(bench, "encode", (0.8, 0.75, 0.5, 0.75))


def measure_decode(bench: Bench) -> None:
    """Decoding."""
    measure_codec(bench, "decode", (0.95, 1.0, 0.55, 0.9))


def percentile_99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[int(len(values) * 0.99)]


def measure_lookup(bench: Bench) -> None:
    """Lookups with few and with many services."""
    clients = {}
    for side in bench.sides:
        side.nameserver()
        clients[side.name] = side.worker()
    for size, first in ((10, 0), (10000, 10)):
        what = f"lookups with {size:,} services"
        rate = bench.row(what, "1/s", 3.2, higher_is_better=True)
        slowest = bench.row("  99th percentile", "us", 0.3)
        for side in bench.sides:
            clients[side.name].ask("register", first, size - first)
            clients[side.name].ask("time_lookups", ["service_1"] * 10)
        for side in bench.rounds(21, 11):
            names = [f"service_{random.randrange(size)}" for _ in range(300)]
            times = clients[side.name].ask("time_lookups", names)
            rate.add(side.name, 1e6 / statistics.fmean(times))
            slowest.add(side.name, percentile_99(times))


def measure_register(bench: Bench) -> None:
    """Registrations of new services, until there are 10,000."""
    what = "registering up to 10,000 services"
    connecting = bench.row(f"{what}, each over a new socket", "1/s", 0.95, higher_is_better=True)
    connected = bench.row(f"{what}, all over one socket", "1/s", higher_is_better=True)
    memory = bench.row("  memory of the nameserver a service", "bytes", 880, absolute=True)
    for _, (rate, each_connects) in itertools.product(
        range(1 if bench.quick else 3), ((connecting, True), (connected, False))
    ):
        servers = {side.name: side.nameserver() for side in bench.sides}
        clients = {side.name: side.worker() for side in bench.sides}
        before = {name: resident_memory(server.pid) for name, server in servers.items()}
        for first in range(0, 10000, 500):
            for side in bench.sides:
                rate.add(side.name, 500 / clients[side.name].ask("register", first, 500, each_connects)["seconds"])
        for name, server in servers.items() if rate is connected else ():  # else that of 10,000 connections is in it
            memory.add(name, (resident_memory(server.pid) - before[name]) * 1024 / 10000)
        for side in bench.sides:
            side.close()


def measure_addresses(bench: Bench) -> None:
    """One subscriber and many publishers."""
    one_busy = bench.row("1,000 addresses, one busy at a time: CPU of the subscriber", "us/msg", 1.1)
    for name, _, cpu in measure_sources(bench, 1000, 1000, (21, 7), 10000):
        one_busy.add(name, cpu * 1e6)
    for side in bench.sides:
        side.close()
    all_busy = bench.row("1,000 addresses, all busy", "msgs/s", 0.95, higher_is_better=True)
    for name, seconds, _ in measure_sources(bench, 1000, 1, (21, 7), 10000):
        all_busy.add(name, 1 / seconds)


def measure_fanout(bench: Bench) -> None:
    """One publisher and ten subscribers."""
    row = bench.row("1 publisher to 10 subscribers: CPU of the publisher", "us/msg", 1.25)
    pairs = {}
    for side in bench.sides:
        publisher, sinks, counter = side.worker(), side.worker(), side.counter()
        sinks.ask("open_sinks", publisher.ask("open_publisher"), 10)
        sinks.tell("await_greeting", counter)
        publisher.ask("greet", counter)
        sinks.answer()
        pairs[side.name] = (publisher, sinks, counter)
    for side in bench.rounds(21, 9):
        publisher, sinks, counter = pairs[side.name]
        count = 2000 if side.name == "known" else 5000
        Counter(counter).set(0)
        sinks.tell("drain", count, counter)
        row.add(side.name, publisher.ask("publish", count, counter)["cpu"] / count * 1e6)
        sinks.answer()


def measure_idle(bench: Bench) -> None:
    """What processes do while there is nothing to do."""
    seconds = 10 if bench.quick else 60
    for multicast in (True, False):
        label = "with" if multicast else "without"
        whole = bench.row(f"idle nameserver {label} multicast, {seconds} s with its start: CPU", "ms")
        idle = bench.row("  without its start", "ms/s")
        woken = bench.row("  wake-ups", "1/s", None if multicast else 2, absolute=True)
        servers = {side.name: side.nameserver(multicast) for side in bench.sides}
        time.sleep(2)
        before = {name: (cpu_seconds(server.pid), wake_ups(server.pid)) for name, server in servers.items()}
        time.sleep(seconds)
        for name, server in servers.items():
            cpu = cpu_seconds(server.pid)
            whole.add(name, cpu * 1e3)
            idle.add(name, (cpu - before[name][0]) * 1e3 / seconds)
            woken.add(name, (wake_ups(server.pid) - before[name][1]) / seconds)
        if not multicast:
            measure_idle_publisher(bench, seconds)
        for side in bench.sides:
            side.close()


def measure_idle_publisher(bench: Bench, seconds: int) -> None:
    """A publisher that does nothing but announce itself."""
    woken = bench.row("idle publisher without multicast: wake-ups", "1/s", 3, absolute=True)
    cpu = bench.row("  CPU", "ms/s")
    publishers = {side.name: side.program("-c", PUBLISHER[side.kind]).pid for side in bench.sides}
    time.sleep(2)
    before = {name: (cpu_seconds(pid), wake_ups(pid)) for name, pid in publishers.items()}
    time.sleep(seconds)
    for name, pid in publishers.items():
        cpu.add(name, (cpu_seconds(pid) - before[name][0]) * 1e3 / seconds)
        woken.add(name, (wake_ups(pid) - before[name][1]) / seconds)


def measure_many_publishers(bench: Bench) -> None:
    """A process with 50 publishers that do nothing but announce themselves."""
    seconds = 5 if bench.quick else 30
    memory = bench.row("50 publishers in a process: resident memory", "kB")
    threads = bench.row("  threads", "")
    cpu = bench.row("  CPU, idle", "ms/s")
    for side in bench.rounds(3, 1):
        side.nameserver()
        pid = side.program("-c", MANY_PUBLISHERS[side.kind]).pid
        time.sleep(2.5)
        before = cpu_seconds(pid)
        time.sleep(seconds)
        cpu.add(side.name, (cpu_seconds(pid) - before) * 1e3 / seconds)
        memory.add(side.name, resident_memory(pid))
        threads.add(side.name, len(list(Path(f"/proc/{pid}/task").iterdir())))
        side.close()


def measure_first(bench: Bench) -> None:
    """The first message of a publisher that starts while its subscriber waits."""
    row = bench.row("first message after a publisher starts", "ms", 1.1)
    workers = {}
    for side in bench.sides:
        side.nameserver()
        workers[side.name] = (side.worker(), side.worker())
        workers[side.name][1].ask("follow", "bench")
    time.sleep(1)
    for side in bench.rounds(41, 21):
        publisher, subscriber = workers[side.name]
        counter = side.counter()
        subscriber.tell("await_first", counter)
        publisher.ask("time_to_first", "bench", counter)
        row.add(side.name, subscriber.answer())


def measure_start(bench: Bench) -> None:
    """A whole process: import, a first publisher and subscriber, end."""
    wall = bench.row("import, first publisher and subscriber, whole process", "ms", 1.3)
    cpu = bench.row("  CPU", "ms")
    for side in bench.rounds(41, 21):
        start = time.perf_counter()
        process = subprocess.Popen([side.python, "-c", START[side.kind]], **side.surroundings)
        usage = os.wait4(process.pid, 0)[2]
        wall.add(side.name, (time.perf_counter() - start) * 1e3)
        cpu.add(side.name, (usage.ru_utime + usage.ru_stime) * 1e3)
        process.returncode = 0
    nameserver = bench.row("start of a nameserver: CPU", "ms", 1.2)
    for side in bench.rounds(21, 11):
        nameserver.add(side.name, cpu_seconds(side.nameserver().pid) * 1e3)
        side.close()


def measure_memory(bench: Bench) -> None:
    """Resident memory of processes that do nothing yet."""
    rows = {
        name: bench.row(f"resident memory: {name}", "kB", 1.02) for name in ("nameserver", "publisher", "subscriber")
    }
    for side in bench.rounds(5, 2):
        pids = {
            "nameserver": side.nameserver().pid,
            "publisher": side.program("-c", PUBLISHER[side.kind]).pid,
            "subscriber": side.program("-c", SUBSCRIBER[side.kind]).pid,
        }
        time.sleep(2.5)
        for name, pid in pids.items():
            rows[name].add(side.name, resident_memory(pid))
        side.close()


def measure_dead_nameservers(bench: Bench) -> None:
    """What a publisher costs whose nameservers are down: nothing while it sends, a little for each attempt."""
    seconds = 5 if bench.quick else 20
    side = bench.sides[1]
    for count in (1, 10, 100):
        cpu = bench.row(f"idle publisher, {count} nameservers down: CPU", "ms/s")
        woken = bench.row("  wake-ups", "1/s", 3, absolute=True)
        hosts = [f"127.0.1.{number}" for number in range(1, count + 1)]
        pid = side.program("-c", PUBLISHER[side.kind].replace('["localhost"]', repr(hosts))).pid
        time.sleep(3)
        before = cpu_seconds(pid), wake_ups(pid)
        time.sleep(seconds)
        cpu.add(side.name, (cpu_seconds(pid) - before[0]) * 1e3 / seconds)
        woken.add(side.name, (wake_ups(pid) - before[1]) / seconds)
        side.close()


def measure_growth(bench: Bench) -> None:
    """What more addresses cost, and nameservers that are down; the lookup section tells the same of services."""
    measure_dead_nameservers(bench)
    for count in (1, 1000, 4000) if bench.quick else (1, 10, 100, 1000, 2000, 4000):
        row = bench.row(f"{count:,} addresses, one busy at a time: CPU of the subscriber", "us/msg")
        for name, _, cpu in measure_sources(bench, count, 1000, (11, 5), 10000):
            row.add(name, cpu * 1e6)
        for side in bench.sides:
            side.close()


HISTORY_PROGRAM = """
import subprocess, sys, time, posttroll
count = int(sys.argv[1])
listen = "import sys, zmq; sock = zmq.Context().socket(zmq.SUB); sock.rcvhwm = 0; sock.subscribe(b'pytroll:/'); "
listen += "sock.connect(sys.argv[1]); [sock.recv() for _ in range(int(sys.argv[2]))]"
with posttroll.Publisher("tcp://*:0") as publisher:
    address = f"tcp://127.0.0.1:{publisher.port_number}"
    listening = subprocess.Popen([sys.executable, "-c", listen, address, str(count)])
    publisher.wait_for_subscribers(1)
    before = time.process_time()
    for number in range(count):
        publisher.send(posttroll.Message("/a", "info", {"number": number, "padding": "x" * 300}))
    listening.wait()
    print((time.process_time() - before) / count * 1e6)
    with posttroll.Subscriber([address], since=600) as subscriber:
        start = time.perf_counter()
        for _ in range(publisher.history_length):
            next(subscriber.recv(5))
        print((time.perf_counter() - start) * 1e3)
"""


def measure_history(bench: Bench) -> None:
    """What it costs a publisher to keep its newest messages, and how soon a subscriber has all of them."""
    side = bench.sides[1]
    rows = {
        "5000": bench.row("send, 5,000 messages kept: CPU", "us/msg"),
        "0": bench.row("send, none kept: CPU", "us/msg"),
    }
    more = bench.row("  with history in relation to without", "", 1.03, absolute=True)
    caught_up = bench.row("a subscriber catches up with 5,000 messages", "ms")
    for _ in range(4 if bench.quick else 15):
        costs = {}
        for kept, row in rows.items():
            environment = {**side.surroundings["env"], "POSTTROLL_HISTORY_MESSAGES": kept}
            command = [side.python, "-c", HISTORY_PROGRAM, "50000"]
            surroundings = {**side.surroundings, "env": environment}
            out = subprocess.run(command, check=True, capture_output=True, text=True, **surroundings).stdout.split()
            costs[kept] = float(out[0])
            row.add(side.name, costs[kept])
            if kept != "0":
                caught_up.add(side.name, float(out[1]))
        more.add(side.name, costs["5000"] / costs["0"])


CLIENTS_PROGRAM = """
import sys, time, zmq
ready, keys = [], [line.split() for line in sys.stdin]
context = zmq.Context()
for public, secret, server, address in keys:
    sock = context.socket(zmq.SUB)
    sock.curve_publickey, sock.curve_secretkey, sock.curve_serverkey = public.encode(), secret.encode(), server.encode()
    sock.subscribe(b"pytroll:/")
    sock.connect(address)
    ready.append(sock)
time.sleep(60)
"""

KEYS_PROGRAM = """
import os, subprocess, sys, tempfile, time, posttroll, zmq
count, clients, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with tempfile.TemporaryDirectory() as directory:
    pairs = []
    for number in range(count):
        pairs.append([key.decode() for key in zmq.curve_keypair()])
        with open(f"{directory}/{number}.key", "w") as file:
            file.write(f'curve\\n    public-key = "{pairs[-1][0]}"\\n')
    posttroll.write_key_pair("server", directory + "/secret")
    server = posttroll.config.set(backend="secure_zmq", clients_public_keys_directory=directory,
        server_secret_key_file=directory + "/secret/server.key_secret")
    with open(directory + "/secret/server.key") as file:
        key = file.read().split('"')[1]
    with posttroll.Publisher("tcp://*:0") as publisher:
        lines = [[*pairs[n % count], key, f"tcp://127.0.0.1:{publisher.port_number}"] for n in range(clients)]
        connecting = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True)
        before = time.process_time()
        connecting.stdin.write("\\n".join(map(" ".join, lines)))
        connecting.stdin.close()
        publisher.wait_for_subscribers(clients, 60)
        print((time.process_time() - before) / clients * 1e3)
        connecting.kill()
        connecting.wait()
"""


def measure_scale(bench: Bench) -> None:
    """What grows faster than the work: it should cost the same however many there are."""
    side = bench.sides[1]
    announcement = bench.row("an announcement by multicast of one of 10,000: nameserver CPU", "us")
    more_publishers = bench.row("  in relation to one of 1,000", "", 1.1, absolute=True)
    answer = bench.row("all of 10,000 publishers, 200 ask at once: nameserver CPU each", "ms")
    more_askers = bench.row("  in relation to 10 at once", "", 1.1, absolute=True)
    client = bench.row("a CURVE client connects, 500 keys: CPU of the publisher", "ms")
    more_keys = bench.row("  in relation to 10 keys", "", 1.1, absolute=True)
    for _ in range(2 if bench.quick else 7):
        process = side.nameserver(multicast=True)
        few = announce_all(side, process.pid, 1000, 20000)
        announcement.add(side.name, announce_all(side, process.pid, 10000, 20000))
        more_publishers.add(side.name, announcement.samples[side.name][-1] / few)
        few = ask_for_all(side, process.pid, 10)
        answer.add(side.name, ask_for_all(side, process.pid, 200))
        more_askers.add(side.name, answer.samples[side.name][-1] / few)
        side.close()
        costs = []
        for keys in ("10", "500"):
            command = [side.python, "-c", KEYS_PROGRAM, keys, "200", CLIENTS_PROGRAM]
            run = subprocess.run(command, check=True, capture_output=True, text=True, **side.surroundings)
            costs.append(float(run.stdout))
        client.add(side.name, costs[1])
        more_keys.add(side.name, costs[1] / costs[0])


def announce_all(side: Side, pid: int, publishers: int, count: int) -> float:
    """Announce so many publishers by multicast, again and again; return the CPU time of an announcement in us."""
    names = [f"publisher_{number}" for number in range(publishers)]
    texts = [floor_announcement(name, f"tcp://192.0.2.1:{9000 + n}").encode() for n, name in enumerate(names)]
    target = side.environment["POSTTROLL_MC_GROUP"], int(side.environment["POSTTROLL_BROADCAST_PORT"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for first, number in ((True, publishers), (False, count)):
            before = cpu_seconds(pid)
            for index in range(number):
                sock.sendto(texts[index % publishers], target)
                if index % 20 == 19:
                    time.sleep(0.002)  # for the buffer of its socket
            time.sleep(0.5 if first else 0.1)
    return (cpu_seconds(pid) - before) / count * 1e6


def ask_for_all(side: Side, pid: int, askers: int) -> float:
    """Ask the nameserver for all publishers, so many at once; return the CPU time of an answer in ms."""
    request = floor_encode("/oper/ns", "request", {"service": ""}).replace(" v1.2 ", " v1.01 ")
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        socks = [stack.enter_context(context.socket(zmq.REQ)) for _ in range(askers)]
        before = cpu_seconds(pid)
        for sock in socks:
            sock.connect(f"tcp://127.0.0.1:{side.environment['POSTTROLL_NAMESERVER_PORT']}")
            sock.send_string(request)
        for sock in socks:
            sock.recv()
        return (cpu_seconds(pid) - before) / askers * 1e3


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "messages": measure_messages,
    "receive": measure_receive,
    "durable": measure_durable,
    "latency": measure_latency,
    "encode": measure_encode,
    "decode": measure_decode,
    "lookup": measure_lookup,
    "register": measure_register,
    "addresses": measure_addresses,
    "fanout": measure_fanout,
    "history": measure_history,
    "scale": measure_scale,
    "idle": measure_idle,
    "many": measure_many_publishers,
    "first": measure_first,
    "start": measure_start,
    "memory": measure_memory,
    "growth": measure_growth,
}


# ======================================================================================================================
# A long run: nothing may grow, nothing may be lost
# ======================================================================================================================


def usage(pid: int) -> dict[str, float]:
    """Return what a process holds: memory in kB, open files (sockets among them), threads."""
    process = Path(f"/proc/{pid}")
    files, threads = list((process / "fd").iterdir()), list((process / "task").iterdir())
    return {"memory": resident_memory(pid), "files": len(files), "threads": len(threads)}


def soak(side: Side, seconds: float, rate: float = 5000, publishers: int = 5) -> bool:
    """Run for a long time with publishers that come and go; return whether nothing grew and nothing was lost.

    A publisher that has gone is remembered, and its subscriber keeps trying to reach it, for the nameserver's max_age.
    Here that is half a minute instead of ten, so that what is there after a minute is all that there will be.
    """
    global DEADLINE
    DEADLINE = seconds + 60
    try:
        server, subscriber, publisher = side.nameserver(max_age=30), side.worker(), side.worker()
        subscriber.ask("follow", "soak")
        subscriber.tell("soak_receive")
        publisher.tell("soak_publish", seconds, rate, publishers)
        pids = {"nameserver": server.pid, "subscriber": subscriber.pid, "publishers": publisher.pid}
        samples: list[dict[str, dict[str, float]]] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(5, seconds / 20))
            samples.append({name: usage(pid) for name, pid in pids.items()})
        sent, received = publisher.answer(), subscriber.answer()
    finally:
        side.close()
    print(f"{sent:,} messages sent, {received:,} received, in {seconds:.0f} s")
    settled = samples[min(12, len(samples) // 2) :]  # after the first minute
    quarter = max(len(settled) // 4, 1)
    is_flat = True
    for name in pids:
        for what, allowed in (("memory", 1.05), ("files", 1.0), ("threads", 1.0)):
            # A publisher may be there twice for a moment: compare the highest of the beginning and of the end.
            first = max(sample[name][what] for sample in settled[:quarter])
            last = max(sample[name][what] for sample in settled[-quarter:])
            is_flat &= last <= first * allowed + (0 if what == "memory" else 2)
            print(f"  {name:12}{what:10}{first:12,.0f} after the start{last:12,.0f} at the end")
    return sent == received and is_flat


# ======================================================================================================================
# Command line
# ======================================================================================================================


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us have: a connection needs one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description="Measure posttroll against bare pyzmq.")
    parser.add_argument("section", nargs="*", help=f"what to measure, by default all of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", metavar="FILE", help="write all values to FILE")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has the known package installed")
    parser.add_argument("--soak", metavar="SECONDS", type=float, help="a long run instead: does anything grow?")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    raise_descriptor_limit()
    if options.worker:
        run_worker(options.worker)
    unknown = set(options.section) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    sides = [Side("floor", "floor", sys.executable, None), Side("ours", "library", sys.executable, str(ROOT))]
    if options.peer:
        sides.append(Side("known", "library", options.peer, None))
    if options.soak:
        return 0 if soak(sides[1], options.soak) else 1
    for side in sides:  # modules are compiled when they are imported for the first time
        modules = (
            "posttroll.publisher, posttroll.subscriber, posttroll.ns; posttroll.ns.main"
            if side.kind == "library"
            else "zmq"
        )
        subprocess.run([side.python, "-c", f"import {modules}"], check=True, **side.surroundings)
    brokers = [
        Side(name, name, sys.executable, None)
        for name, (module, command) in BROKERS.items()
        if importlib.util.find_spec(module) and shutil.which(command[0])
    ]
    bench = Bench(sides, brokers, options.quick)
    bench.print_head()
    for name in options.section or SECTIONS:
        with bench.section(name):
            SECTIONS[name](bench)
    if options.json:
        Path(options.json).write_text(json.dumps([row.as_dict(bench.names) for row in bench.rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
