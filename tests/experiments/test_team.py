import contextlib
import itertools
import json
import os
import queue
import re
import socket
import struct
import threading
import time
from functools import partial

import jax
import pytest
from jax._src import clusters

from fedmd_jax.cli import main
from fedmd_jax.experiments import together
from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.experiments.relay import relay
from fedmd_jax.experiments.team import LOST_CODE, News, Team, TeamError, free_port, meet, split_address
from fedmd_jax.experiments.together import Processes
from fedmd_jax.options import parse_processes

SECONDS = 20


class Members:
    """All processes of a team, in this one; what they hear is kept."""

    def __init__(self, num_processes):
        pairs = {peer: socket.socketpair() for peer in range(1, num_processes)}
        self.sockets = [{peer: first for peer, (first, _) in pairs.items()}]
        self.sockets += [{0: other} for _, other in pairs.values()]
        self.news = [queue.SimpleQueue() for _ in range(num_processes)]
        self.signals = queue.SimpleQueue()
        others = set(threading.enumerate())
        self.teams = [
            Team(own, i, num_processes, on_news=self.news[i].put, on_signal=self.signals.put)
            for i, own in enumerate(self.sockets)
        ]
        self.listeners = set(threading.enumerate()) - others

    def join(self):
        """Until everybody has heard the end of all others."""
        for thread in self.listeners:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def die(self, which):
        for connection in self.sockets[which].values():
            connection.shutdown(socket.SHUT_WR)  # only the others hear it: the dead have no more news to pass on

    def close(self):
        for connection in itertools.chain(*(own.values() for own in self.sockets)):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@pytest.fixture
def members():
    with contextlib.closing(Members(3)) as members:
        yield members


def at_once(*functions):
    """What they return; all of them run at the same time."""
    results = [None] * len(functions)

    def run(number):
        try:
            results[number] = functions[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return results


def test_the_first_finds_and_all_are_told(members):
    def look(team):
        return lambda: [team.tell(f"{team.process_id} {turn}".encode) for turn in range(50)]

    assert at_once(*map(look, members.teams)) == [[f"0 {turn}".encode() for turn in range(50)]] * 3


def test_everybody_knows_what_each_has(members):
    def give(team):
        return lambda: [team.collect({"id": team.process_id, "text": "ä\n"}), team.collect(None)]

    assert at_once(*map(give, members.teams)) == [[[{"id": i, "text": "ä\n"} for i in range(3)], [None] * 3]] * 3


@pytest.mark.parametrize("dead", [0, 2])
def test_who_dies_without_a_word_is_missed_by_all(members, dead):
    members.die(dead)
    for survivor in {0, 1, 2} - {dead}:
        assert members.news[survivor].get(timeout=SECONDS) == News(dead, "has ended without a word", LOST_CODE)
        assert members.news[survivor].empty()


@pytest.mark.parametrize("first", [0, 1])
def test_who_leaves_says_why(members, first):
    def end(i):  # as a process does that hears news
        def wait():
            news = members.news[i].get(timeout=SECONDS)
            members.die(i)
            return news

        return wait

    others = [i for i in range(3) if i != first]
    done, *heard = at_once(lambda: members.teams[first].leave("has failed: disk full", 3), *map(end, others))
    assert done is None
    assert heard == [News(first, "has failed: disk full", 3)] * 2


def test_who_is_about_to_leave_does_so_with_its_own_reason(members):
    """All complain of the same bad input, each in its own words and with its own exit code."""
    at_once(*(lambda team=team: team.leave("has failed: no such data", 3) for team in members.teams))
    assert all(news.empty() for news in members.news)


def test_a_signal_is_handed_to_the_first(members):
    members.teams[2].signal(15)
    assert members.signals.get(timeout=SECONDS) == 15


def test_all_part_when_all_are_done_and_nobody_misses_them(members):
    at_once(*(team.part for team in members.teams))
    for which in range(3):
        members.die(which)
    members.join()
    assert all(news.empty() for news in members.news)


def come(address, process_id, num_processes=3, seconds=SECONDS, known="1"):
    def wait():
        with contextlib.ExitStack() as stack:
            found = meet(address, process_id, num_processes, seconds=seconds, known=known)
            for connection in found.values():
                stack.enter_context(connection)
            return sorted(found)

    return wait


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port('127.0.0.1')}"


def knock(address, content):
    """Connects as soon as somebody listens, sends this, and waits until it is let go."""
    for _ in range(1000):
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection(split_address(address), timeout=SECONDS) as connection:
                connection.sendall(content)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
            return
        time.sleep(0.01)


def message(content):
    return struct.pack(">cQ", b"V", len(content)) + content


def test_all_meet_and_strangers_are_let_go(address):
    strangers = [b"GET / HTTP/1.1\r\n\r\n", message(b"[]"), message(b'{"process": 1}'), message(b"\xff"), b""]
    no_ids = ([], "1", 0, -1, 3, 99, None, True)
    strangers += [message(json.dumps({"process": i, "of": 3, "known": "1"}).encode()) for i in no_ids]
    strangers += [message(b"[" * 4000)]
    first = threading.Thread(target=at_once, args=[partial(knock, address, each) for each in strangers])

    def others_later(process_id):
        first.join()
        return come(address, process_id)()

    first.start()
    assert at_once(come(address, 0), partial(others_later, 1), partial(others_later, 2)) == [[1, 2], [0], [0]]


def test_who_does_not_come_is_named(address):
    first, second = at_once(come(address, 0, 4, seconds=2), come(address, 2, 4, seconds=2))
    assert str(first) == f"2 s are over, and of 4 processes these have not come to {address}: 1, 3"
    assert str(second) == f"process 0 at {address} has ended before all processes had come"
    with pytest.raises(TeamError, match=rf"^0\.1 s are over, and there is no process 0 at {address}: .*$"):
        meet(address, 1, 2, seconds=0.1)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"num_processes": 2}, "process 1 is one of 2, but process 0 one of 3"),
        ({"known": "2"}, "process 1 has 2, but process 0 has 1"),
    ],
)
def test_who_does_not_belong_here_is_told_so(address, others, message):
    assert list(map(str, at_once(come(address, 0), come(address, 1, **others)))) == [message] * 2


@pytest.mark.parametrize("one_has_died", [False, True])
def test_a_second_one_of_the_same_number_is_sent_away_unless_the_first_has_died(address, one_has_died):
    at_the_door, sent_away = threading.Event(), threading.Event()

    def die():
        for _ in range(1000):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(split_address(address)) as dead:
                dead.sendall(message(json.dumps({"process": 1, "of": 3, "known": "1"}).encode()))
                return
            time.sleep(0.01)
        raise AssertionError("nobody listens")

    def be_first():
        if one_has_died:
            die()
        at_the_door.set()

    def be_one():
        assert at_the_door.wait(SECONDS)
        try:
            return come(address, 1)()
        except TeamError:
            sent_away.set()
            raise

    def be_last():  # or process 0 would be gone before both have knocked
        assert sent_away.wait(SECONDS)
        return come(address, 2)()

    first, _, *ones, last = at_once(come(address, 0), be_first, be_one, be_one, be_last)
    assert (first, last) == ([1, 2], [0])
    assert sorted(map(str, ones)) == ["[0]", "there is a process 1 already"]


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TeamError, match=rf"^process 0 cannot listen on port {port} of 127\.0\.0\.1: .*in use"):
            meet(f"127.0.0.1:{port}", 0, 2, seconds=1)


def test_a_relay_carries_both_ways_and_stays_open_when_the_other_end_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = relay("127.0.0.1", server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as here:
            there, _ = server.accept()
            with there:
                here.sendall(b"there")
                assert there.recv(5) == b"there"
                there.sendall(b"here")
                assert here.recv(4) == b"here"
            here.settimeout(0.1)
            with pytest.raises(TimeoutError):
                here.recv(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator host:1", "processes started by hand need all of --coordinator HOST:PORT .*"),
        ("--process-id 0 --num-processes 2", "processes started by hand need all of --coordinator HOST:PORT .*"),
        ("--coordinator host:1 --num-processes 2 --process-id 2", "process_id must be from 0 to 1, .* got 2"),
        ("--coordinator host:1 --num-processes 2 --process-id -1", "process_id must be from 0 to 1, .* got -1"),
        ("--coordinator host:1 --num-processes 0 --process-id 0", "num_processes must be .* at least 1, got 0"),
        ("--coordinator host --num-processes 2 --process-id 0", "the coordinator must be HOST:PORT, .* got 'host'"),
        ("--coordinator host:70000 --num-processes 2 --process-id 0", "the coordinator must be HOST:PORT, .*"),
        ("--distributed --wait 0", "wait must be positive .*, got 0.0"),
        ("--distributed --devices 2", "many processes use all their devices, got --devices 2"),
        ("--distributed", "many processes must find each other before JAX is used, but it is in use in this process"),
    ],
)
def test_bad_usage_is_one_line(options, message, capsys, tmp_path):
    jax.devices()
    assert main(["run", "--out", str(tmp_path / "run"), *options.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"fedmd-jax: error: {message}", line), line
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_one_process(capsys):
    assert main(["sweep", "--distributed"]) == 2
    assert "--distributed is of run" in capsys.readouterr().err


def test_where_nothing_says_which_process_this_is(monkeypatch):
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
    with pytest.raises(UsageError, match=r"^--distributed finds neither Slurm nor .*; by hand it is --coordinator "):
        together._who(Processes(distributed=True))


def test_slurm_says_which_process_this_is(monkeypatch):
    slurm = {"JOB_ID": 70001, "STEP_NODELIST": "node[3-4]", "NTASKS": 8, "PROCID": 5, "LOCALID": 1, "STEP_NUM_NODES": 2}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    address, num_processes, process_id, local_devices = together._who(Processes(distributed=True))
    assert split_address(address)[0] == "node3"
    assert (num_processes, process_id, local_devices) == (8, 5, [1])


def test_options_come_back_and_others_stay():
    words = ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "1"]
    processes, rest = parse_processes(["--resume", "DIR", *words])
    assert (processes.coordinator, processes.num_processes, processes.process_id) == ("host:1", 2, 1)
    assert rest == ["--resume", "DIR"]
    assert processes.options().split() == words
    assert Processes(distributed=True).options() == "--distributed"
    assert not Processes().wanted


def test_alone_nothing_is_told():
    assert together.is_first()
    assert not together.are_many()
    assert together.tell(lambda: os.getpid()) == os.getpid()
    assert together.collect([1]) == [[1]]
    together.check_same("settings", json.loads("{}"))


@pytest.mark.parametrize("how", ["leave", "die"])
def test_who_is_done_still_hears_of_the_end_of_process_0(members, how):
    parting = threading.Thread(target=members.teams[1].part, daemon=True)
    parting.start()
    if how == "leave":
        threading.Thread(target=members.teams[0].leave, args=("has failed: disk full", LOST_CODE), daemon=True).start()
    else:
        members.die(0)
    news = members.news[1].get(timeout=SECONDS)
    assert (news.process, news.code) == (0, LOST_CODE)


def test_a_relay_waits_for_who_does_not_listen_yet():
    port = free_port("127.0.0.1")
    with socket.create_connection(("127.0.0.1", relay("127.0.0.1", port))) as here:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as server:
            there, _ = server.accept()
            with there:
                here.sendall(b"hello")
                assert there.recv(5) == b"hello"
