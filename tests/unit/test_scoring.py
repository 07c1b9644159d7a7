"""The client of the predictor on a real gRPC server that can be told to misbehave."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from model.errors import InputError
from model.query import Event, Query
from serving.kserve_api import pb, pb_grpc
from serving.scoring import CALLS_WITH_LISTS, PredictorClient, PredictorError
from serving.settings import ServeSettings
from serving.wire import (
    ANSWERS,
    Asked,
    ItemList,
    Limits,
    Part,
    Scored,
    read_asks,
    write_answers,
    write_missing,
)

LIMITS = Limits(instances=100, history=100, items=100, listed=100)
LIST = ItemList(["a", "b"], np.array([-0.5, -1.5]), -3.0)


class Server(pb_grpc.GRPCInferenceServiceServicer):
    """Answers with the first item of the history; fails at poison, whoever asks beside it."""

    def __init__(self):
        self.calls = []
        self.lists = {}
        self.forgetful = False
        self.poison = "error"
        self.gate = None

    async def ModelInfer(self, request, context):
        (message,) = request.inputs[0].contents.bytes_contents
        read = read_asks(message, LIMITS)
        self.calls.append(len(read.asked))
        if self.gate is not None:
            await self.gate.wait()
        if not self.forgetful:
            self.lists |= {items.name: items for items in read.lists}
        names = [one.query.history[0].item_id for one in read.asked]
        answer = write_answers([self.answer(name) for name in names])
        if "poison" in names and self.poison == "error":
            raise RuntimeError("cannot digest it")
        if "poison" in names and self.poison == "garbage":
            answer = b"garbage"
        if missing := {part[0] for part in read.parts if part} - self.lists.keys():
            answer = write_missing(sorted(missing))
        output = pb.ModelInferResponse.InferOutputTensor(
            name=ANSWERS, contents=pb.InferTensorContents(bytes_contents=[answer])
        )
        return pb.ModelInferResponse(outputs=[output])

    @staticmethod
    def answer(name):
        if name == "refused":
            return InputError("no")
        return Scored("v", 1.0, [name], np.zeros(1, np.float32), affinity_T=np.zeros(0, np.float32))


@asynccontextmanager
async def running():
    server, servicer = grpc.aio.server(), Server()
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = PredictorClient(ServeSettings(predictor_host=f"127.0.0.1:{port}"))
    await client.open()
    try:
        yield servicer, client
    finally:
        await client.close()
        await server.stop(0)


def asked(name, part=None):
    return Asked("score", Query([Event(name, 1.0)], 9.0), 1, part=part)


async def together(servicer, client, *names):
    """Ask while two calls are held, so that these make the next one."""
    servicer.gate = asyncio.Event()
    holding = []
    for n in range(2):
        holding.append(asyncio.create_task(client.score([asked("x")], 30.0)))
        while len(servicer.calls) <= n:
            await asyncio.sleep(0.005)
    tasks = [asyncio.create_task(client.score([asked(name)], 30.0)) for name in names]
    await asyncio.sleep(0)
    servicer.gate.set()
    await asyncio.gather(*holding)
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_requests_share_a_call_and_get_their_own_answers():
    async def run():
        async with running() as (servicer, client):
            answers = await together(servicer, client, "a", "b", "refused", "c")
            assert [a[0].item_ids for a in (answers[0], answers[1], answers[3])] == [
                ["a"],
                ["b"],
                ["c"],
            ]
            assert isinstance(answers[2][0], InputError)
            assert servicer.calls == [1, 1, 4]

    asyncio.run(run())


@pytest.mark.parametrize(("poison", "kind"), [("error", "error"), ("garbage", "invalid_answer")])
def test_one_that_the_predictor_fails_with_does_not_spoil_its_neighbours(poison, kind):
    async def run():
        async with running() as (servicer, client):
            servicer.poison = poison
            first, failed, last = await together(servicer, client, "a", "poison", "b")
            assert (first[0].item_ids, last[0].item_ids) == (["a"], ["b"])
            assert isinstance(failed, PredictorError) and failed.kind == kind
            assert servicer.calls == [1, 1, 3, 1, 1, 1]

    asyncio.run(run())


def test_a_list_is_sent_once_and_again_to_one_that_does_not_hold_it():
    async def run():
        async with running() as (servicer, client):
            part = Part(LIST, 0, 0)
            for calls in range(2, CALLS_WITH_LISTS + 4):
                await client.score([asked("a", part)], 30.0)
                assert len(servicer.calls) == calls
            servicer.lists.clear()  # another predictor
            await client.score([asked("a", part)], 30.0)
            assert len(servicer.calls) == calls + 2
            servicer.forgetful = True
            servicer.lists.clear()
            with pytest.raises(PredictorError, match="invalid_answer"):
                await client.score([asked("a", part)], 30.0)

    asyncio.run(run())


def test_replicas_that_answer_in_turn_all_get_the_lists():
    """Of each pair of calls the second went to the other replica, which held the list already."""

    async def run():
        servers = [grpc.aio.server() for _ in range(3)]
        servicers = [Server() for _ in servers]
        ports = []
        for server, servicer in zip(servers, servicers, strict=True):
            pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
            ports.append(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        client = PredictorClient(ServeSettings(predictor_host=f"ipv4:{addresses}"))
        await client.open()
        part = Part(LIST, 0, 0)
        try:
            for _ in range(200):
                await client.score([asked("a", part)], 30.0)
                if all(servicer.lists for servicer in servicers):
                    break
            assert all(servicer.lists for servicer in servicers)
        finally:
            await client.close()
            for server in servers:
                await server.stop(0)

    asyncio.run(run())


def test_each_request_waits_no_longer_than_its_own_deadline():
    async def run():
        async with running() as (servicer, client):
            servicer.gate = asyncio.Event()
            hasty = asyncio.create_task(client.score([asked("a")], 0.2))
            patient = asyncio.create_task(client.score([asked("b")], 30.0))
            with pytest.raises(PredictorError, match="deadline"):
                await hasty
            assert not patient.done()
            servicer.gate.set()
            assert (await patient)[0].item_ids == ["b"]

    asyncio.run(run())
