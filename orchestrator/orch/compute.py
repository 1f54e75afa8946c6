"""What a Work runs on, as declared: machines and packages. Locally accepted and shown, not enforced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orch.errors import StateTypeError

__all__ = ["BuildConfig", "CloudCompute"]


class _Declared:
    """A value object: keyword fields, equality by value, stored in the state under `$kind`."""

    _kind: str
    _fields: tuple[str, ...]

    def to_state(self) -> dict[str, Any]:
        return {self._kind: {name: getattr(self, name) for name in self._fields}}

    @classmethod
    def from_state(cls, data: dict[str, Any]) -> Any:
        return cls(**data)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_state() == self.to_state()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"


def _positive(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise StateTypeError(f"{owner}({name}={value!r}): a number of at least 0 is needed")


class CloudCompute(_Declared):
    """A machine for a Work.

    Args:
        name: "cpu", "cpu-medium", "gpu", "gpu-fast", "gpu-fast-multi" (docs/compute.md) or an instance type.
        cpus, gpus: logical counts. memory, disk_size, shm_size: GiB. idle_timeout: seconds. count: machines for one
        Work.
    """

    _kind = "$compute"
    _fields = (
        "name", "instance_type", "cpus", "gpus", "memory", "disk_size", "shm_size", "idle_timeout", "interruptible",
        "count",
    )  # fmt: skip

    def __init__(
        self,
        name: str = "cpu",
        *,
        instance_type: str | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        memory: float | None = None,
        disk_size: float | None = None,
        shm_size: float | None = None,
        idle_timeout: float | None = None,
        interruptible: bool = False,
        count: int = 1,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise StateTypeError(f"CloudCompute(name={name!r}): a name such as 'cpu' or 'gpu' is needed")
        _positive("CloudCompute", cpus=cpus, gpus=gpus, memory=memory, disk_size=disk_size, shm_size=shm_size)
        _positive("CloudCompute", idle_timeout=idle_timeout)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise StateTypeError(f"CloudCompute(count={count!r}): a whole number of at least 1 is needed")
        self.name, self.instance_type = name, instance_type
        self.cpus, self.gpus, self.memory = cpus, gpus, memory
        self.disk_size, self.shm_size, self.idle_timeout = disk_size, shm_size, idle_timeout
        self.interruptible, self.count = bool(interruptible), count


class BuildConfig(_Declared):
    """The environment of a Work: packages or a requirements file, a Python version, an image.

    Subclasses may give `build_commands() -> list[str]`. Locally checked, not installed.
    """

    _kind = "$build"
    _fields = ("requirements", "python", "image")

    def __init__(
        self,
        requirements: str | Path | list[str] | tuple[str, ...] = (),
        *,
        python: str | None = None,
        image: str | None = None,
    ) -> None:
        if isinstance(requirements, str | Path):
            self.requirements: str | list[str] = str(requirements)
        else:
            for entry in requirements:
                if not isinstance(entry, str) or not entry.strip():
                    raise StateTypeError(
                        f"BuildConfig(requirements=...): {entry!r} is no requirement, give e.g. 'numpy>=2'"
                    )
            self.requirements = list(requirements)
        self.python, self.image = python, image

    def build_commands(self) -> list[str]:
        return []
