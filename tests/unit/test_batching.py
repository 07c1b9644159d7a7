"""Together what comes together, nobody waits for others, nobody gets another's answer or error."""

import asyncio

import pytest

from serving.batching import Batcher


class Work:
    """Doubles numbers; a batch ends when it is let go."""

    def __init__(self, **options):
        self.batches, self.gates = [], []
        self.batcher = Batcher(self.work, **({"most": 100} | options))

    async def work(self, items):
        self.batches.append(items)
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        if "all" in items:
            raise ValueError("everybody's")
        return [ValueError(item) if item == "bad" else 2 * item for item in items]

    async def until(self, batches):
        while len(self.batches) < batches:
            await asyncio.sleep(0)


def test_what_comes_while_one_is_worked_on_makes_the_next_batch():
    async def run():
        work = Work()
        first = [asyncio.create_task(work.batcher.ask(n)) for n in (1, 2)]
        await work.until(1)
        later = [asyncio.create_task(work.batcher.ask(n)) for n in (3, 4, 5)]
        await asyncio.sleep(0)
        assert work.batches == [[1, 2]], "one at a time"
        work.gates[0].set()
        assert await asyncio.gather(*first) == [2, 4]
        await work.until(2)
        work.gates[1].set()
        assert await asyncio.gather(*later) == [6, 8, 10]
        assert work.batches == [[1, 2], [3, 4, 5]]

    asyncio.run(run())


def test_sizes_are_kept_and_several_batches_may_be_under_way():
    async def run():
        work = Work(most=3, limit=2, size=lambda n: n)
        tasks = [asyncio.create_task(work.batcher.ask(n)) for n in (1, 2, 7, 2, 1)]
        await work.until(2)
        assert work.batches == [[1, 2], [7]]
        work.gates[1].set()
        assert await tasks[2] == 14
        await work.until(3)
        assert work.batches[2] == [2, 1]
        for gate in work.gates:
            gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_errors_are_told_to_those_concerned():
    async def run():
        work = Work()
        tasks = [asyncio.create_task(work.batcher.ask(n)) for n in (1, "bad", 3)]
        await work.until(1)
        work.gates[0].set()
        one, bad, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert (one, str(bad), three) == (2, "bad", 6)
        tasks = [asyncio.create_task(work.batcher.ask(n)) for n in (1, "all")]
        await work.until(2)
        work.gates[1].set()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert str(error) == "everybody's"

    asyncio.run(run())


def test_whoever_gave_up_is_left_out_and_holds_nobody_up():
    async def run():
        work = Work()
        first = asyncio.create_task(work.batcher.ask(1))
        await work.until(1)
        hasty = asyncio.create_task(work.batcher.ask(2))
        patient = asyncio.create_task(work.batcher.ask(3))
        await asyncio.sleep(0)
        hasty.cancel()
        first.cancel()
        work.gates[0].set()
        await work.until(2)
        assert work.batches[1] == [3]
        work.gates[1].set()
        assert await patient == 6
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())


def test_closing_ends_those_who_wait():
    async def run():
        work = Work()
        tasks = [asyncio.create_task(work.batcher.ask(1))]
        await work.until(1)
        tasks.append(asyncio.create_task(work.batcher.ask(2)))
        await asyncio.sleep(0)
        await work.batcher.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError)

    asyncio.run(run())
