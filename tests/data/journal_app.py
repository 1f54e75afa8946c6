from orch import App, Flow, List, ScriptWork, Work


class Child(Flow):
    def __init__(self):
        super().__init__()
        self.inner = 1


class Adds(Work):
    def __init__(self):
        super().__init__(parallel=True)
        self.total = 0

    def run(self, number):
        self.total += number
        return {"total": self.total}


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = 0
        self.rows = []
        self.wanted = 0
        self.seen = []
        self.adds = Adds()
        self.bad = ScriptWork("false", parallel=True, raise_exception=False)
        self.children_ = List(Child())

    def run(self):
        self.schedule("@daily", key="day")
        self.bad.run()
        call = self.adds.run(self.wanted)
        if call.done and call.id not in self.seen:
            self.seen.append(call.id)
        if len(self.children_) < self.wanted:
            self.children_.append(Child())


app = App(Root())
