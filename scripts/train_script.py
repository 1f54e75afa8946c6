"""Train a small convolutional network on handwritten digits.

    python scripts/train_script.py --trainer.max_epochs=3
    python scripts/train_script.py fit --trainer.max_epochs=3      # the same; validate, test, predict exist too

Every training writes `lightning_logs/version_N/`: events for TensorBoard, metrics.csv, checkpoints, and model.pt2,
which `torch.export.load` reads without this file.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DIGITS = Path(__file__).parent / "data" / "digits.npz"
SUBCOMMANDS = {"fit", "validate", "test", "predict"}

warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # 5,000 images in memory need none
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists.*")  # shared by both loggers
warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")  # torch's own, at torch.export


class Digits(pl.LightningDataModule):
    """Greyscale 28x28 images with their label.

    Args:
        path: .npz file with x_train, y_train, x_test, y_test (uint8; 0 = background, 255 = ink)
        batch_size: images a step
    """

    def __init__(self, path: str = str(DIGITS), batch_size: int = 64) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        with np.load(self.path) as arrays:
            self.train_set = self._dataset(arrays["x_train"], arrays["y_train"])
            self.test_set = self._dataset(arrays["x_test"], arrays["y_test"])

    @staticmethod
    def _dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        pixels = torch.from_numpy(images).float().div_(255).unsqueeze(1)
        return TensorDataset(pixels, torch.from_numpy(labels).long())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True, num_workers=0)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_set, batch_size=self.batch_size, num_workers=0)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class DigitClassifier(pl.LightningModule):
    """Two convolutions and two dense layers: images (batch, 1, 28, 28) in 0..1 -> logits (batch, 10).

    Args:
        lr: highest learning rate of Adam, reached after a third of the steps
        hidden: width of the dense layer
    """

    def __init__(self, lr: float = 5e-3, hidden: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{name}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{name}_acc", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):  # max_epochs=-1
            return optimizer
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}


class DigitsCLI(LightningCLI):
    """LightningCLI with both loggers on one folder, a plain progress bar, and an exported model after each fit."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        if trainer.logger in (None, True):
            root = trainer.default_root_dir or "."
            where = {"save_dir": root, "version": _next_version(Path(root, "lightning_logs"))}
            # TensorBoard's writer keeps points for two minutes otherwise: too long to watch a short training
            trainer.logger = [
                {"class_path": "TensorBoardLogger", "init_args": where, "dict_kwargs": {"flush_secs": 1}},
                {"class_path": "CSVLogger", "init_args": {**where, "flush_logs_every_n_steps": 10}},
            ]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.progress_bar_callback is not None:  # one that also tells something in a file
            trainer.callbacks.remove(trainer.progress_bar_callback)
            trainer.callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 5))
        return trainer

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and self.trainer.log_dir and not self.trainer.interrupted:
            path = Path(self.trainer.log_dir, "model.pt2")
            export(self.model, path)
            accuracy = self.trainer.callback_metrics.get("val_acc")
            print(f"saved {path}" + ("" if accuracy is None else f" (val_acc {accuracy:.4f})"))


def export(model: nn.Module, path: Path) -> None:
    """Write `model` so that `torch.export.load(path).module()` is all that is needed to use it, for any batch size."""
    images = torch.zeros(2, 1, 28, 28)
    program = torch.export.export(
        model.cpu().eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine, which are nobody's business
    part = path.with_name(f".part-{path.name}")
    torch.export.save(program, part)
    os.replace(part, path)  # who lists models sees whole ones only


def _next_version(logs: Path) -> int:
    numbers = [int(p.name[8:]) for p in logs.glob("version_*") if p.name[8:].isdecimal()]
    return max(numbers, default=-1) + 1


def main() -> None:
    if not SUBCOMMANDS.intersection(sys.argv[1:]):
        sys.argv.insert(1, "fit")
    DigitsCLI(
        DigitClassifier,
        Digits,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_epochs": 3, "log_every_n_steps": 5, "num_sanity_val_steps": 0},
    )


if __name__ == "__main__":
    main()
