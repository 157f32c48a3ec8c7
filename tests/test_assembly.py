"""The parts of a process, put together without any server."""

import dataclasses

import pytest

from cerberus import assembly, errors, settings

pytestmark = pytest.mark.anyio
NOWHERE = {
    "KAFKA_BROKER": "127.0.0.1:1",
    "REDIS_URL": "redis://127.0.0.1:1",
    "DATABASE_URL": "postgres://127.0.0.1:1/x",
}
PARTS = ("predictor", "lookups", "consumer", "label_consumer", "outbox", "meter", "supervisor")


async def test_making_every_part_speaks_to_no_server():
    async with assembly.open(settings.load(NOWHERE)) as service:
        service.check()
        for name in PARTS:
            assert getattr(service, name) is getattr(service, name)
        assert service.tasks().keys() == {
            "labels",
            "decisions",
            "consumer",
            "producer",
            "materializer",
            "retention",
        }


async def test_a_process_runs_the_tasks_that_it_is_told_and_makes_no_other():
    config = settings.load(NOWHERE | {"CERBERUS_TASKS": "retention,labels"})
    async with assembly.open(config) as service:
        assert set(service.tasks()) == {"retention", "labels"}
        assert "consumer" not in vars(service)
        assert "outbox" not in vars(service)


async def test_what_needs_no_model_is_there_without_one():
    config = settings.load(NOWHERE | {"CERBERUS_MODEL": "/nowhere/m.json"})
    async with assembly.open(config) as service:
        assert service.postgres.ledger
        with pytest.raises(errors.ModelMismatch, match="cannot read"):
            service.check()


async def test_every_part_is_at_the_clock_that_is_given():
    async with assembly.open(settings.load(NOWHERE), clock=lambda: 1_790_000_000_000) as service:
        assert service.predictor.parse({"user_id": 1}).as_of_ms == 1_790_000_000_000
        parts = (service.claims, service.label_consumer, service.producer, service.consumer._sink)
        assert {part._clock() for part in parts} == {1_790_000_000_000}


async def test_another_process_on_the_same_pools_has_parts_of_its_own():
    async with assembly.open(settings.load(NOWHERE)) as service:
        other = dataclasses.replace(service)
        assert other.redis is service.redis
        assert other.consumer is not service.consumer
