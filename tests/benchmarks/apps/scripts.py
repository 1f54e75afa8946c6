"""Scripts one after another: how late the flow sees an end, and what a script costs beside a bare process."""

import time

from orch import App, Flow, ScriptWork

ENDING = "import os, time\nwith open('ended', 'w') as f: f.write(repr(time.time()))\nos._exit(0)"


class Scripts(Flow):
    def __init__(self):
        super().__init__()
        self.ending = ScriptWork(["python", "-c", ENDING], parallel=True, cache_calls=False)
        self.nothing = ScriptWork(["python", "-c", "pass"], parallel=True, cache_calls=False)
        self.round = 0
        self.finished = 0
        self.seen_after = 0.0
        self.cost = 0.0
        self._asked = 0
        self._at = 0.0

    def run(self):
        if self.round == self.finished:
            return
        if self._asked != self.round:
            self._asked = self.round
            self._at = time.time()
        work = self.ending if self.round % 2 else self.nothing
        if work.run().done:
            now = time.time()
            if self.round % 2:
                with open("ended") as file:
                    self.seen_after = now - float(file.read())
            else:
                self.cost = now - self._at
            self.finished = self.round


app = App(Scripts())
