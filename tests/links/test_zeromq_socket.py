"""ZeroMQ sockets on an event loop."""

from __future__ import annotations

import asyncio

import zmq

from broker.links.zeromq_socket import Monitor
from tests.links.harness import run, until


def test_a_monitor_tells_of_a_connection_over_which_nothing_is_said() -> None:
    """libzmq wakes only a reader that has found its queue empty before: the monitor has to look once by itself."""

    async def main() -> None:
        told: list[int] = []
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        events = int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        monitor = Monitor(asyncio.get_running_loop(), router, lambda event, _: told.append(event), events)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.connect(f"tcp://127.0.0.1:{port}")
        await until(lambda: told == [zmq.EVENT_ACCEPTED], "it was told of the connection")
        dealer.close(0)
        await until(lambda: told == [zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED], "and of its end")
        monitor.close()
        context.destroy(linger=0)

    run(main)
