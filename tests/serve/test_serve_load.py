"""The benchmark's clients: every frame is timed, one more is told, and sessions end in every way."""

import asyncio

from benchmarks.echo_load import come_and_go, live, one_more
from tests.serve.stubs import Subtract, make_hall, running, wait_for


def test_streams_are_live_and_timed():
    hall, told = make_hall(most=2, steps=Subtract(slow_s=0.002)), []
    with running(hall) as address:
        host, port = address.split(":")

        async def ask():
            told.append(await one_more(host, int(port)))

        heard = asyncio.run(live(host, int(port), 2, 0.4, ask))
    assert [one.code for one in heard] == [1000, 1000] and [one.sent for one in heard] == [40, 40]
    for one in heard:  # five hops of 2 ms in each frame; the first frame only fills the window
        assert len(one.times_ms) in (39, 40) and min(one.times_ms) > 4
    assert told[0].code == 1013 and told[0].message == "all 2 places are taken: try again later"
    assert 0 < told[0].times_ms[0] < 5000


def test_sessions_come_and_go_in_every_way():
    hall = make_hall(most=20)
    with running(hall) as address:
        host, port = address.split(":")
        ended = asyncio.run(come_and_go(host, int(port), 20, at_once=3))
        wait_for(lambda: hall.running == 0)
    assert ended == dict.fromkeys(("end", "close", "vanish", "nonsense", "text"), 4)
    assert hall.metrics.sessions["echo"] == 20 == hall.metrics.closed.total()
    closed = hall.metrics.closed
    assert closed[4001] == 4 and closed[1003] == 4
    # Who closes while a reply is on its way to him may be seen to go (1005, 1006) before his goodbye is read.
    assert closed[1000] >= 4 and closed[1000] + closed[1005] + closed[1006] == 12
