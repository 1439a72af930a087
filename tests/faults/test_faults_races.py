"""Things that happen at the same time, and things that happen very often: nothing is lost, doubled or piled up."""

from __future__ import annotations

from fault_scene import STRESS, Scene


def test_cancel_races_with_completion(scene: Scene) -> None:
    out = scene.run(
        """
        import concurrent.futures, os, random, sys, threading, time
        import flowfn as flow

        @flow.function(max_workers=3)
        def nap(n, seconds):
            time.sleep(seconds)
            return n

        @flow.function(max_workers=3)
        def echo(n):
            return n

        nap.remote(-1, 0)
        stop = threading.Event()
        innocent = []
        def others():
            # Calls that nobody cancels share the workers: none of them may suffer.
            while not stop.is_set():
                for n in range(20):
                    assert echo.remote(n) == n
                innocent.append(1)
        threads = [threading.Thread(target=others) for _ in range(2)]
        for thread in threads:
            thread.start()
        counts = {"cancelled": 0, "done": 0}
        for n in range(int(sys.argv[1])):
            future = nap.spawn(n, random.choice((0, 0.0005, 0.001)))
            time.sleep(random.random() * 0.003)
            if future.cancel():
                counts["cancelled"] += 1
                assert future.cancelled() and future.status == "cancelled"
                try:
                    future.result(10)
                    raise SystemExit("a cancelled future has a result")
                except concurrent.futures.CancelledError:
                    pass
            else:
                counts["done"] += 1
                assert future.result() == n and future.status == "completed"
            assert not concurrent.futures.wait([future], 10).not_done
        stop.set()
        for thread in threads:
            thread.join()
        assert counts["cancelled"] and counts["done"] and innocent, (counts, len(innocent))
        # Many at a time, most of which wait for a worker.
        for turn in range(10):
            futures = [nap.spawn(n, 0.001) for n in range(30)]
            chosen = random.sample(futures, 20)
            hit = [future for future in chosen if future.cancel()]
            done, left = concurrent.futures.wait(futures, 30)
            assert not left
            assert all(future.cancelled() for future in hit)
            assert all(future.result() == n for n, future in enumerate(futures) if future not in hit)
        assert sorted(echo.map(range(100))) == list(range(100))
        print("whole")
        """,
        150 * STRESS,
    ).out
    assert out == "whole\n"


def test_threads_submit_from_everywhere(scene: Scene) -> None:
    out = scene.run(
        """
        import asyncio, threading
        import flowfn as flow
        import numpy as np

        @flow.function(max_workers=3)
        def double(x):
            return 2 * x

        @flow.function(max_workers=2)
        def count(n):
            yield from range(n)

        shared = flow.put(np.arange(100_000))

        @flow.function(max_workers=3)
        def total(array, plus):
            return int(array.sum()) + plus

        def calls(seed):
            for n in range(60):
                assert double.remote(seed + n) == 2 * (seed + n)

        def futures(seed):
            for future, n in [(double.spawn(seed + n), seed + n) for n in range(60)]:
                assert future.result() == 2 * n

        def maps(seed):
            assert list(double.map(range(seed, seed + 3000))) == list(range(2 * seed, 2 * seed + 6000, 2))

        def slow_consumers(seed):
            for n, value in enumerate(double.map(range(seed, seed + 200))):
                assert value == 2 * (seed + n) == double.remote(seed + n)

        def left(seed):
            for turn in range(5):
                for n, _ in enumerate(double.map(range(10**9))):
                    if n == 50:
                        break

        def generators(seed):
            for n in range(5):
                assert sum(count.remote(50 + n)) == sum(range(50 + n))

        def bigs(seed):
            for n in range(10):
                array = np.full(60_000, seed + n)
                assert (double.remote(array) == 2 * array).all()
                assert total.remote(shared, n) == 4999950000 + n

        def executors(seed):
            with flow.Executor(2) as executor:
                assert list(executor.map(pow, range(20), [2] * 20)) == [n * n for n in range(20)]

        def asynchronous(seed):
            async def main():
                values = await asyncio.gather(*(double.spawn(seed + n) for n in range(20)))
                assert values == [2 * (seed + n) for n in range(20)]
                assert [value async for value in double.map(range(100))] == list(range(0, 200, 2))
            asyncio.run(main())

        def own_options(seed):
            other = double.options(max_workers=1, env={"SEED": str(seed % 3)})
            assert [other.remote(n) for n in range(10)] == list(range(0, 20, 2))

        failures = []
        def run(work, seed):
            try:
                work(seed)
            except BaseException as error:
                import traceback
                failures.append(traceback.format_exc())

        kinds = [calls, futures, maps, slow_consumers, left, generators, bigs, executors, asynchronous, own_options]
        threads = [threading.Thread(target=run, args=(kinds[n % len(kinds)], 1000 * n)) for n in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, "\\n".join(failures)
        print("whole")
        """
    ).out
    assert out == "whole\n"


def test_shutting_down_while_threads_call(scene: Scene) -> None:
    out = scene.run(
        """
        import random, threading, time
        import flowfn as flow

        @flow.function(max_workers=2)
        def double(x):
            return 2 * x

        stop = threading.Event()
        good = bad = 0
        failures = []
        def calling():
            global good, bad
            while not stop.is_set():
                try:
                    assert double.remote(3) == 6
                    assert list(double.map(range(50))) == list(range(0, 100, 2))
                    assert double.spawn(4).result() == 8
                    good += 1
                except (flow.CallCancelled, flow.BackendUnavailable) as error:
                    bad += 1
                except BaseException as error:
                    if type(error).__name__ == "CancelledError":
                        bad += 1
                        continue
                    failures.append(error)
                    raise
        threads = [threading.Thread(target=calling) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(8):
            time.sleep(random.random() * 0.2)
            flow.shutdown()
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert double.remote(3) == 6
        print("whole")
        """
    ).out
    assert out == "whole\n"


def test_a_hundred_thousand_calls_pile_nothing_up(scene: Scene) -> None:
    out = scene.run(
        """
        import gc, os, sys, threading
        import flowfn as flow
        import numpy as np

        @flow.function(max_workers=2)
        def same(x):
            return x

        @flow.function(max_workers=2)
        def count():
            yield from range(20)

        @flow.function(max_workers=2)
        def fail(x):
            raise ValueError(x)

        def state():
            gc.collect()
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            maps = open("/proc/self/maps").read().count("memfd")
            return len(os.listdir("/proc/self/fd")), threading.active_count(), maps, pages * 4096 >> 20

        def some(times):
            for n in range(times):
                same.remote(n)
            for _ in range(times // 50):
                assert sum(count.remote()) == 190
                list(same.map(range(50)))
                [future.result() for future in [same.spawn(n) for n in range(5)]]
                same.remote(np.ones(50_000))
                same.remote(flow.put(np.ones(50_000)))
                same.spawn(1).cancel()
                try:
                    fail.remote(1)
                except ValueError:
                    pass
                for _ in fail.map(range(3), return_exceptions=True):
                    pass
            sum(same.map(range(times * 50)))

        some(500)
        before = state()
        some(int(sys.argv[1]))
        after = state()
        print(before, after)
        assert after[0] <= before[0] + 4, (before, after)
        assert after[1] <= before[1] + 4, (before, after)
        assert after[2] <= before[2] + 8, (before, after)
        assert after[3] <= before[3] + 24, (before, after)
        """,
        2500 * STRESS,
    ).out
    assert out.startswith("(")
