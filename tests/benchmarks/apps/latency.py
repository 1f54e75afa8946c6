"""Diffs between Works, the flow and the outside. A delay is taken where the change is seen; one host, one clock."""

import sys
import time

from orch import App, Flow, Work

KEYS = int(sys.argv[1]) if len(sys.argv) > 1 else 0


class Stamper(Work):
    """Writes the time, `count` times, `pause` seconds apart: into one variable, or into one key of a large dict."""

    def __init__(self):
        super().__init__(parallel=True, cache_calls=False)
        self.stamp = 0.0
        self.table = {str(key): 0.0 for key in range(KEYS)}

    def run(self, count, pause):
        for _ in range(count):
            time.sleep(pause)
            if KEYS:
                self.table["5"] = time.time()
            else:
                self.stamp = time.time()


class Listener(Work):
    """Quiet, but running: looks at what the flow writes and returns the delays."""

    def __init__(self):
        super().__init__(parallel=True, cache_calls=False)
        self.sent = 0.0
        self.end = False

    def run(self):
        seen, delays = self.sent, []
        while not self.end:
            if self.sent != seen:
                seen = self.sent
                delays.append(time.time() - seen)
            time.sleep(0.0003)
        return delays


class Latency(Flow):
    def __init__(self):
        super().__init__()
        self.stamper = Stamper()
        self.listener = Listener()
        self.round = 0
        self.click = 0.0
        self.poke = 0
        self.listen = False
        self.work_delays = []
        self.click_delays = []
        self.listener_delays = []
        self._round = self._poke = 0
        self._stamp = self._click = 0.0
        self._work_delays, self._click_delays = [], []
        self._waiting = False

    def run(self):
        now = time.time()
        stamp = self.stamper.table["5"] if KEYS else self.stamper.stamp
        if stamp != self._stamp:
            self._stamp = stamp
            self._work_delays.append(now - stamp)
        if self.click != self._click:
            self._click = self.click
            if self.click < 0:
                self.click_delays = self._click_delays
                self._click_delays = []
            else:
                self._click_delays.append(now - self.click)
        if self.round != self._round:
            call = self.stamper.run(100, 0.008)
            if call.done:
                self._round = self.round
                self.work_delays = self._work_delays
                self._work_delays = []
        if self.listen:
            call = self.listener.run()
            if call.done:
                self.listener_delays = call.result
                self.listener.end = False
                self.listen = False
        if self.poke != self._poke:
            self._poke = self.poke
            if self.poke < 0:
                self.listener.end = True
            else:
                self.listener.sent = time.time()


app = App(Latency())
