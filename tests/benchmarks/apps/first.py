"""The smallest app: imports only orch (and the clock that it is measured with)."""

import time

from orch import App, Flow


class First(Flow):
    def __init__(self):
        super().__init__()
        self.first_pass = 0.0

    def run(self):
        if not self.first_pass:
            self.first_pass = time.time()


app = App(First())
