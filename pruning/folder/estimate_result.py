"""What pruning a checkpoint takes: memory, disk and time, and what of it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """What pruning a checkpoint takes.

    Attributes:
        parameters: of the model; pruned: of the matrices to prune; matrices: their number.
        memory: bytes by use; they add up to the peak of one process.
        processes: that take this memory.
        disk: bytes by use.
        seconds: by use, at the measured rates of this machine as it is loaded now; empty for another device.
        free_memory, free_disk: bytes; None if the system does not report them.
        reads: bytes of weights read from the disk, if the model is larger than the free memory.
        device_memory: bytes by use on a device other than the CPU.
        free_device: bytes; None for the CPU, and for a device that is not here.
        recovery: bytes by use of recovery after pruning, on the device, with the dense model as teacher unless the
            settings have ``distill=False``.
        asked_to_distill: ``distill`` of these settings.
        not_counted: what the run takes besides, in words.
        left_dense: a sentence on weights that are bare parameters, which are not pruned; "" where they are few.
    """

    parameters: int
    pruned: int
    matrices: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    free_memory: int | None
    free_disk: int
    reads: int
    processes: int = 1
    device_memory: dict[str, int] = field(default_factory=dict)
    free_device: int | None = None
    recovery: dict[str, int] = field(default_factory=dict)
    asked_to_distill: bool | None = None
    not_counted: list[str] = field(default_factory=list)
    left_dense: str = ""

    def problems(self) -> list[str]:
        """Sentences about what does not fit."""
        problems = []
        memory, disk = self.processes * sum(self.memory.values()), sum(self.disk.values())
        if self.free_memory is not None and memory > self.free_memory:
            problems.append(
                f"it takes {memory / 1e9:.2f} GB of memory and {self.free_memory / 1e9:.2f} GB are free: fewer or "
                f"shorter samples, a smaller batch size, {'fewer processes, ' if self.processes > 1 else ''}or "
                "activations on disk take less"
            )
        on_device = sum(self.device_memory.values())
        if self.free_device is not None and on_device > self.free_device:
            problems.append(
                f"it takes {on_device / 1e9:.2f} GB on the device and {self.free_device / 1e9:.2f} GB are free there: "
                "fewer or shorter samples, a smaller batch size, or activations on disk take less"
            )
        recovering, free = sum(self.recovery.values()), self._free_for_recovery()
        if not self.distills:
            recovering -= self.recovery.get("dense model", 0)
        if free is not None and recovering > free:
            problems.append(
                f"recovery takes {recovering / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free: shorter "
                "samples and fewer in a step take less; or prune without it, and recover the folder (resume) on a "
                "larger machine"
            )
        if disk > self.free_disk:
            problems.append(
                f"it takes {disk / 1e9:.2f} GB and the disk has {self.free_disk / 1e9:.2f} GB free; make room, or name "
                "a folder on another disk"
            )
        return problems

    @property
    def distills(self) -> bool | None:
        """Whether recovery learns the dense model's outputs, not the next tokens; None if its memory is not known."""
        free = self._free_for_recovery()
        if not self.recovery:
            return None
        if self.asked_to_distill is not None or free is None:
            return self.asked_to_distill is not False
        # as the run decides, which has the libraries in memory
        return sum(self.recovery.values()) - self.recovery.get("libraries", 0) <= free

    def _free_for_recovery(self) -> int | None:
        return self.free_device if self.device_memory else self.free_memory
