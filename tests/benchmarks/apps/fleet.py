"""Many Works asked for in one pass, until the flow sees all of them running."""

import sys
import time

from orch import App, Flow, ScriptWork, Work

KIND, COUNT = sys.argv[1], int(sys.argv[2])


class Sleeper(Work):
    def run(self, number):
        while True:
            time.sleep(60)


def make():
    if KIND == "python":
        return Sleeper(parallel=True, cache_calls=False, grace=1)
    return ScriptWork("sleep 60000", parallel=True, cache_calls=False, grace=1)


class Fleet(Flow):
    def __init__(self):
        super().__init__()
        self.fleet = [make() for _ in range(COUNT)]
        self.round = 0
        self.halted = 0
        self.running = 0
        self.seconds = 0.0
        self._asked = self._halted = 0
        self._at = 0.0

    def run(self):
        if self.round != self._asked:
            self._asked = self.round
            self._at = time.time()
            for work in self.fleet:
                work.run(str(self.round))
        if self.running != self._asked and all(work.is_running for work in self.fleet):
            self.seconds = time.time() - self._at
            self.running = self._asked
        if self.halted != self._halted:
            self._halted = self.halted
            for work in self.fleet:
                work.stop()


app = App(Fleet())
