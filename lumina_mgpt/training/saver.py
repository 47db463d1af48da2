"""Writes the checkpoints of a run.

A checkpoint is a folder `checkpoints/step-N`. It gets this name when it is complete. Any number of processes can load
it.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_atomic
from lumina_mgpt.training import run_folder
from lumina_mgpt.training.checksums import write_checksums
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.state import STATE
from lumina_mgpt.training.tensors import quietly, reason


class Saver:
    """Writes checkpoints, and removes all but the newest. All processes call the same methods together.

    With `beside`, `save` copies the tensors to the CPU's memory, and a thread writes them while the training continues.
    The copy takes 12 bytes per trained weight, spread over the processes.

    `beside` is not the default. bench_checkpoint.py measured it for 1.05 GB on two cores that also train. The training
    loop waits 0.22 s with `beside` and 1.09 s without. The steps during the writing take longer, however: a checkpoint
    costs 1.46 s in total with `beside` and 1.17 s without. The option is intended for GPUs, where the CPU is idle; no
    measurement on a GPU exists.

    Args:
        output_dir: output folder of the run.
        keep: number of newest checkpoints to keep.
        beside: whether the training continues while a checkpoint is written.

    Attributes:
        last: the last written checkpoint; before the first one, the checkpoint that the run resumed from, or None.
    """

    def __init__(self, output_dir: Path, processes: Processes, keep: int, beside: bool = False) -> None:
        self.output_dir, self.folder, self.processes = output_dir, output_dir / "checkpoints", processes
        self.keep, self.beside = keep, beside
        self.last: Path | None = None
        if beside:  # the thread warns after `quietly` has returned
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            self.pool = ThreadPoolExecutor(1)
        # A separate group: its messages must not mix with those of the training steps.
        self.group = dist.new_group(backend="gloo") if beside and processes.world > 1 else None
        self.writing: tuple[Future, dict] | None = None

    def begin(self, start: Path | None, newest: Path | None) -> None:
        """Prepares the output folder for a run: sets aside the checkpoints after `start`.

        Args:
            start: checkpoint that the run resumes from; None for a new run.
            newest: checkpoint that was the newest in the folder when `start` was chosen; None if there was none.

        Raises:
            InputError: another run has changed the checkpoints since then, or later ones cannot be set aside.
        """
        self.last = start
        if not self.processes.first:
            return
        if run_folder.newest(self.output_dir) != newest:
            raise InputError(
                f"{self.output_dir}: another run has changed its checkpoints while this one started; start again",
                "output_dir",
            )
        if start is not None and run_folder.belongs(start, self.output_dir):
            run_folder.go_back(self.output_dir, start.resolve())

    def save(self, tensors: dict, state: dict) -> None:
        """Writes a checkpoint; with `beside`, returns as soon as the tensors are copied.

        Args:
            tensors: what `tensors_of` returns.
            state: contents of the state file, with the key "step".

        Raises:
            InputError: this or the previous checkpoint cannot be written. Earlier checkpoints are complete.
        """
        self.finish()
        partial = self._partial(state)
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")):
                shutil.rmtree(old)
        self.processes.barrier()
        options = {"checkpoint_id": partial, "no_dist": self.processes.world == 1}
        with self._readable_errors(state):
            if self.beside:
                written = quietly(dcp.async_save, tensors, process_group=self.group, **options)
                self.writing = self.pool.submit(self._complete, state, written), state
                return
            quietly(dcp.save, tensors, **options)
            self._complete(state)
            self._publish(state)
        self.processes.barrier()

    def poll(self) -> bool:
        """Renames the checkpoint of the thread to `step-N`, if the thread has finished it.

        Returns whether the writing has failed; `finish` then raises the error.
        """
        if self.writing is None or not self.writing[0].done():
            return False
        if self.writing[0].exception():
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Waits until the thread has finished its checkpoint, if there is one, and renames the checkpoint to `step-N`.

        Raises:
            InputError: the checkpoint cannot be written. Earlier checkpoints are complete.
        """
        if self.writing is None:
            return
        (future, state), self.writing = self.writing, None
        with self._readable_errors(state):
            future.result()
            self._publish(state)

    def _complete(self, state: dict, written: Future | None = None) -> None:
        """Writes state and checksums after the tensors are `written`."""
        if written is not None:
            written.result()
        if self.processes.first:
            partial = self._partial(state)
            write_atomic(partial / STATE, json.dumps(state | {"checksums": True}, indent=1))
            write_checksums(partial)

    def _publish(self, state: dict) -> None:
        """Gives a complete checkpoint its name, and removes the oldest ones."""
        if not self.processes.first:
            return
        final = self.folder / run_folder.name_of(state["step"])
        if final.exists():
            run_folder.remove(final)
        os.replace(self._partial(state), final)
        self.last = final
        for old in run_folder.checkpoints_of(self.output_dir)[: -self.keep]:
            if old != final:
                run_folder.remove(old)

    def _partial(self, state: dict) -> Path:
        return self.folder / f".partial-{run_folder.name_of(state['step'])}"

    @contextmanager
    def _readable_errors(self, state: dict) -> Iterator[None]:
        """Turns errors of the disk into InputError."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            raise InputError(
                f"{self.output_dir}: the checkpoint of step {state['step']} cannot be written ({reason(error)}); free "
                "some space, then use resume=auto",
                "output_dir",
            ) from None
