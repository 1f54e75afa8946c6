"""Assignments and appends as fast as the Works can make them, until the flow sees the last one."""

import sys
import time

from orch import App, Flow, Work

WORKS, COUNT = int(sys.argv[1]), int(sys.argv[2])


class Writer(Work):
    def __init__(self):
        super().__init__(parallel=True, cache_calls=False)
        self.started = 0.0
        self.value = -1
        self.rows = []

    def run(self, appends):
        self.rows = []
        self.started = time.time()
        for number in range(COUNT):
            self.value = number
            if number < appends:
                self.rows.append(number)


class Throughput(Flow):
    def __init__(self):
        super().__init__()
        self.writers = [Writer() for _ in range(WORKS)]
        self.round = 0
        self.finished = 0
        self.seconds = 0.0
        self.complete = False
        self._ended = {}
        self._done = set()

    def run(self):
        if self.round == self.finished:
            return
        now = time.time()
        for index, writer in enumerate(self.writers):
            if index not in self._done and writer.run(100).done:  # a finished call is handed over in one pass only
                self._done.add(index)
            if writer.value == COUNT - 1 and writer.started and index not in self._ended:
                self._ended[index] = now
        if len(self._done) == WORKS:
            started = min(writer.started for writer in self.writers)
            self.seconds = max(self._ended.values()) - started
            self.complete = all(list(writer.rows) == list(range(100)) for writer in self.writers)
            self._ended, self._done = {}, set()
            for writer in self.writers:
                writer.value = -1
            self.finished = self.round


app = App(Throughput())
