"""Nothing blocks the loop: under a watch that raises on blocking calls, all parts go on."""

import asyncio
import time

import httpx
import pytest
from blockbuster import BlockingError, blockbuster_ctx
from pipeline import live, now_ms, payment, running, until, world

from cerberus import producer
from cerberus.jobs import materializer

pytestmark = pytest.mark.anyio


async def test_no_part_makes_a_blocking_call_in_the_loop(environ):
    changes = {
        "CERBERUS_RATE": "50",
        "CERBERUS_PARTITIONS": "2",
        "CERBERUS_READ_TIMEOUT_MS": "10000",
    }
    async with world(environ | changes) as here:
        with blockbuster_ctx() as watch:
            for function in watch.functions.values():
                # Looks for the files of libpq, once a connection.
                function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args")
                # Asks the kernel about this process: no disk.
                function.can_block_in("prometheus_client/process_collector.py", "collect")
            with pytest.raises(BlockingError):
                time.sleep(0.01)  # noqa: ASYNC251 - the watch is awake
            kept = here.decision_log()
            async with (
                running(one := here.consumer()),
                running(payer := producer.Producer(here.config, here.postgres)),
                running(materializer.Materializer(here.config, here.online, here.postgres)),
                running(kept),
            ):
                await until(lambda: payer.sent > 100, "payments are made")
                at = now_ms()
                await here.publish([(1, b"{", at), (1, payment(1, 1, at), at)])
                await until(lambda: one.counts["rejected"], "a record is refused")
                await until(lambda: one.counts["accepted"] > 100, "they are seen")
                await until(lambda: live(one, partitions=2), "the end is reached")
                app = here.app(kept, {"postgres": here.postgres.schema.check}, one)
                transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://127.0.0.1"
                ) as http:
                    alone = [{"user_id": user} for user in range(1000, 1040)]
                    paid = [{**a, "transaction_id": "b", "amount": 1} for a in alone]
                    asked = [http.post("/predict", json=body) for body in alone + paid]
                    answers = await asyncio.gather(*asked)
                    await until(
                        lambda: not any(r["waiting"] for r in kept.report().values()),
                        "all is stored",
                    )
                    asked = answers[-1].json()
                    for path in (
                        f"/decisions/{asked['decision_id']}",
                        f"/decisions?user_id={asked['user_id']}",
                        f"/users/{asked['user_id']}",
                        "/health",
                        "/health/live",
                        "/metrics",
                        "/openapi.json",
                        "/docs",
                        "/docs/swagger-ui.css",
                    ):
                        answers.append(await http.get(path))
                await kept.close()
                assert {answer.status_code for answer in answers} == {200}
