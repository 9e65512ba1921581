"""Nice values of a process's threads: each test is a process of its own, as they last."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.root

AS_THE_DAEMON = """
import asyncio, contextlib, os, threading
from cri_shim.kernel import priority, process, threads
from cri_shim.kernel.lane import Lane

with contextlib.suppress(PermissionError):
    os.setpriority(os.PRIO_PROCESS, 0, 0)  # whatever the tests run at

def nice(): return os.getpriority(os.PRIO_PROCESS, 0)

def in_a_thread(call):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(call()))
    thread.start()
    thread.join()
    return seen[0]
"""


def output_of(body: str, *, prefix: tuple[str, ...] = ()) -> str:
    program = textwrap.dedent(AS_THE_DAEMON) + textwrap.dedent(body)
    argv = [*prefix, sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_threads_come_first_and_what_they_start_is_as_ever() -> None:
    seen = output_of("""
        end = threading.Event()
        earlier = threading.Thread(target=lambda: (end.wait(), print(nice(), in_a_thread(nice))))
        earlier.start()
        priority.favour()  # nobody has favoured the daemon yet
        before = nice()
        priority.favour_all()
        print(before - nice(), in_a_thread(nice), in_a_thread(lambda: (priority.favour(), nice())[1]))
        end.set()
        earlier.join()
    """)
    assert seen.splitlines() == ["10 0 -10", "-10 0"]


def test_no_process_inherits_it_from_whichever_thread_has_spawned_it() -> None:
    seen = output_of("""
        WORDS = ("sh", "-c", "nice; cat /proc/self/autogroup; cut -d' ' -f6 /proc/self/stat")

        async def main():
            asyncio.get_running_loop().set_default_executor(Lane(asyncio.get_running_loop()))
            priority.favour_all()
            for start in (on_the_loop, in_the_lane, in_a_new_thread):
                print(await start())
            said = (await process.run(WORDS, timeout=60)).stdout.decode().split()
            print(said[0], said[-2:-1] != ["-10"], said[-1] != str(os.getsid(0)))

        async def on_the_loop():
            return await process.spawn(["sh", "-c", "exit $(nice)"]).wait(), nice()

        def spawned():
            return process.spawn(["sh", "-c", "exit $(nice)"]), nice()

        async def in_the_lane():
            child, mine = await asyncio.to_thread(spawned)
            return await child.watched().wait(), mine

        async def in_a_new_thread():
            child, mine = await threads.await_in_new_thread(spawned)
            return await child.watched().wait(), mine

        asyncio.run(main())
    """)
    *spawned, whole = seen.splitlines()
    assert spawned == ["(0, -10)"] * 3
    assert whole == "0 True True", "where sessions have groups, the child's has a weight of its own"


def test_threads_of_a_library_pass_it_on_to_those_that_they_start() -> None:
    seen = output_of("""
        import grpc.aio, time

        async def main():
            server = grpc.aio.server()
            server.add_insecure_port("127.0.0.1:0")
            await server.start()
            priority.favour_all()
            ours = {thread.native_id for thread in threading.enumerate()}
            foreign = [int(entry) for entry in os.listdir("/proc/self/task") if int(entry) not in ours]
            policies = {(os.getpriority(os.PRIO_PROCESS, each), os.sched_getscheduler(each)) for each in foreign}
            print(len(foreign) > 0, policies)
            await server.stop(None)

        asyncio.run(main())
    """)
    assert seen == "True {(-10, 0)}", "SCHED_OTHER, without the flag that keeps it from what they start"


def test_a_daemon_that_may_not_is_one_among_its_equals() -> None:
    seen = output_of(
        """
        before = nice()
        priority.favour_all()
        print(nice() - before, in_a_thread(lambda: (priority.favour(), nice())[1]) - before)
        """,
        prefix=("setpriv", "--bounding-set=-sys_nice,-sys_resource", "--inh-caps=-sys_nice", "--"),
    )
    assert seen == "0 0"
