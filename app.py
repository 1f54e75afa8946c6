"""The studio: three scripts, unchanged, as one app. `orch run --local` starts it and prints its address.

A Flow orchestrates, Works compute, their attributes are the app's state. `Studio.run` is called whenever something
changed: a click in the page, a script that starts, reports or ends.
"""

import re

from orch import App, Drive, Flow, ScriptWork, ServiceWork, StreamlitFrontend

BASE_MODEL = "scripts/data/base_model.pt2"
TRAIN_ARGS = (
    "--trainer.max_epochs=2 --trainer.limit_train_batches=12 --trainer.limit_val_batches=4 "
    "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.monitor=val_acc"
)


class StudioUI(Flow):
    """The page: its attributes are what the user asks for and what the user sees."""

    def __init__(self):
        super().__init__()
        self.train_args = TRAIN_ARGS  # asked for
        self.train_start = False
        self.model = "base"
        self.models = ["base"]  # seen
        self.training = {}
        self.serving = {}

    def configure_layout(self):
        return StreamlitFrontend("scripts/ui_script.py:main_ui")

    def show(self, train, serving, models):
        """Assigning an equal value is no change, so this may be said in every pass."""
        self.models = models
        self.training = {
            "stage": train.status.stage,
            "reason": train.status.reason,
            "message": train.status.message,
            "progress": train.progress,
            "metrics": train.metrics,
            "last_lines": train.last_lines if train.has_failed else [],
        }
        self.serving = serving


class Studio(Flow):
    def __init__(self):
        super().__init__()
        self.ui = StudioUI()
        # parallel: the pass goes on while it runs. Without a cache the same arguments train again; without
        # raise_exception a failed training is something to show, not the end of the app.
        self.train = ScriptWork(
            "scripts/train_script.py",
            outputs=["lightning_logs"],
            parallel=True,
            cache_calls=False,
            raise_exception=False,
        )
        # A ServiceWork stays up. reload: what others publish on the Drive arrives while it runs.
        self.diag = ServiceWork(
            "tensorboard --logdir lightning_logs --load_fast=false --reload_interval 2 --host {host} --port {port} "
            "--path_prefix {base_path}",
            reload=["lightning_logs"],
        )
        # vars: state that the script itself may read and write; its Retrain button does.
        self.eval = ServiceWork(
            "scripts/gradio_script.py --host {host} --port {port}",
            reload=["lightning_logs"],
            vars={"retrain": False},
            grace=2.0,
        )
        self.drive = Drive("app")

    def run(self):
        self.diag.run()
        server = self.eval.run(["--model_path", self.path_of(self.ui.model)])  # other arguments replace what is up

        if self.eval.retrain:
            self.eval.retrain = False
            self.ui.train_start = True
        if self.ui.train_start:
            call = self.train.run(self.ui.train_args)
            if call.done:
                self.ui.train_start = False

        ready = self.eval.is_ready and server.stage == "running"
        serving = {"ready": ready, "stage": server.stage, "message": server.message}
        self.ui.show(self.train, serving, self.models())

    def models(self):
        """Every finished training's model, the newest first, then the one that came with the studio."""
        found = re.findall(r"lightning_logs/(version_\d+)/model\.pt2", "\n".join(self.published()))
        return [*sorted(set(found), key=lambda name: -int(name[8:])), "base"]

    def published(self):
        return [str(path) for path in self.drive.list("lightning_logs/*/model.pt2")]

    @staticmethod
    def path_of(model):
        return BASE_MODEL if model == "base" else f"lightning_logs/{model}/model.pt2"

    def configure_layout(self):
        return [
            {"name": "APP", "content": self.ui},
            {"name": "TRAIN DIAG", "content": self.diag},
            {"name": "EVAL", "content": self.eval},
        ]


app = App(Studio(), name="studio")
