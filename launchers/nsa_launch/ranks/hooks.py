"""The launcher's answers to the trainer: a STOP file for everyone."""

from typing import TYPE_CHECKING

from nsa_dist.train.hooks import Hooks
from nsa_launch.run_folder import RunFolder

if TYPE_CHECKING:
    from nsa_launch.hangs.pulse import Pulse  # which needs Megatron-core, and the driver imports this file


class FolderHooks(Hooks):
    """Stops when `STOP` appears in the run's folder, whoever put it there."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.pulse: Pulse | None = None

    def on_phase(self, phase: str, step: int) -> None:
        if self.pulse is not None:
            self.pulse.begins(phase, step)

    def should_stop(self) -> bool:
        return self._folder.stop.exists()

    def on_notice(self, text: str) -> None:
        self._folder.record("notice", text=text)  # which the console shows
