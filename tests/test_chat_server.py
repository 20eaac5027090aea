"""The fake chat server: its faults come as planned and look as real ones do, and a proxy changes nothing else."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest
from chat_server import ChatServer, FaultPlan, Reply, said


async def post(url: str, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/chat/completions", json=body) as response,
    ):
        return response.status, await response.read(), dict(response.headers)


def test_a_plan_faults_its_share_whatever_the_order() -> None:
    """Of 6,000 requests 1,800 are faulted, 300 a kind: within 5 standard deviations (35 and 17) of that."""
    plan = FaultPlan(seed=3)
    kinds = [plan.fault(f"sha {number}", attempt) for number in range(1500) for attempt in range(1, 5)]
    counts = Counter(kinds)
    assert abs(6000 - counts[None] - 1800) < 175
    assert len(counts) == 7 and all(abs(counts[kind] - 300) < 85 for kind in plan.kinds)
    assert kinds == [plan.fault(f"sha {number}", attempt) for number in range(1500) for attempt in range(1, 5)]
    assert kinds != [
        FaultPlan(seed=4).fault(f"sha {number}", attempt) for number in range(1500) for attempt in range(1, 5)
    ]


def test_every_fault_looks_as_it_should() -> None:
    expected = {
        "rate_limited": (429, "1"),
        "server_error": (500, None),
        "reset": aiohttp.ClientOSError,
        "stall": aiohttp.ClientOSError,
        "truncated": aiohttp.ClientPayloadError,
    }
    for kind, outcome in expected.items():
        plan = FaultPlan(0, share=1.0, kinds=(kind,), stall_s=0.2)  # type: ignore[arg-type]
        with ChatServer(lambda body: said("{}"), plan) as server:
            started = time.monotonic()
            if isinstance(outcome, tuple):
                status, _, headers = asyncio.run(post(server.base_url, {}))
                assert (status, headers.get("Retry-After")) == outcome
            else:
                with pytest.raises(outcome):
                    asyncio.run(post(server.base_url, {}))
            assert (time.monotonic() - started >= 0.2) == (kind == "stall")
            (record,) = server.records
            assert record.fault == kind and record.is_complete == isinstance(outcome, tuple)
    with ChatServer(lambda body: said("{}"), FaultPlan(0, share=1.0, kinds=("invalid",))) as server:
        status, body, _ = asyncio.run(post(server.base_url, {}))
        assert status == 200
        with pytest.raises(ValueError):
            json.loads(body)


def test_a_proxy_passes_on_what_it_does_not_fault_byte_by_byte() -> None:
    odd = Reply(b'{"odd":  "\xff\x00 body"}', 418, {"Content-Type": "application/odd", "Retry-After": "7"})
    plan = FaultPlan(seed=0, share=0.5, kinds=("server_error",))
    with ChatServer(lambda body: odd) as real, ChatServer(upstream=real.base_url, plan=plan) as proxy:
        for number in range(30):
            status, body, headers = asyncio.run(post(proxy.base_url, {"number": number}))
            if proxy.records[-1].fault is None:
                assert (status, body) == (418, odd.body)
                assert (headers["Content-Type"], headers["Retry-After"]) == ("application/odd", "7")
            else:
                assert status == 500
        passed = [record for record in proxy.records if record.fault is None]
        assert 0 < len(passed) < 30
        assert [record.sha for record in passed] == [record.sha for record in real.records]
        assert all(record.is_complete and record.arrived_s <= record.answered_s for record in proxy.records)


def test_a_client_that_goes_away_leaves_an_incomplete_record() -> None:
    async def give_up(url: str) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(url, {}), 0.1)

    with ChatServer(lambda body: said("{}", delay_s=0.2)) as server:
        asyncio.run(give_up(server.base_url))
        time.sleep(0.3)
        (record,) = server.records
        assert record.status == 0 and not record.is_complete
