"""Two processes of a run played by two threads, for tests that look inside."""

import threading


class _Member:
    """Exchanges through lists that both threads see; an error of one ends the other's waiting."""

    count = 2

    def __init__(self, index, slots, barrier):
        self.index, self._slots, self._barrier = index, slots, barrier

    def _exchange(self, data):
        self._slots[self.index] = data
        self._barrier.wait()
        told = list(self._slots)
        self._barrier.wait()
        return told

    def collect(self, data):
        told = self._exchange(data)
        return None if self.index else told

    def broadcast(self, data):
        return self._exchange(data)[0]


def run(work):
    """``work(team)`` on both; returns both results, or raises the first error."""
    barrier, slots = threading.Barrier(2), [None, None]
    results, errors = [None, None], []

    def play(index):
        try:
            results[index] = work(_Member(index, slots, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=play, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
