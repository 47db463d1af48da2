"""Writes checkpoints of a run, by torch.distributed.checkpoint.

A checkpoint is a folder `checkpoints/step-N` that is renamed into place when all of it is written; it loads on any
number of processes.
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

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_atomic
from lumina_mgpt.training import lineage
from lumina_mgpt.training.checkpoint import quietly, reason
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.state import STATE, write_checksums


class Saver:
    """Writes the checkpoints of a run and keeps the `keep` newest; all processes call the same methods together.

    With `beside`, `save` only copies what is to be written (in the CPU's memory: 12 bytes a trained weight, spread over
    the processes), and a thread writes it while the training goes on; a checkpoint has its name when it is whole, here
    too. Not the default: for 1.05 GB, on two cores that train as well, the loop was held 0.22 s and not 1.09, but the
    steps beside the writing took longer: 1.46 s lost in all and not 1.17 (bench_checkpoint.py). Meant for GPUs,
    where the CPU has time; not measured there.
    """

    def __init__(self, output_dir: Path, processes: Processes, keep: int, beside: bool = False) -> None:
        self.output_dir, self.folder, self.processes = output_dir, output_dir / "checkpoints", processes
        self.keep, self.beside = keep, beside
        self.last: Path | None = None  # the checkpoint that holds the run's state: the last written, or the one resumed
        if beside:  # the thread warns, like `quietly` says, when that has long returned
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            self.pool = ThreadPoolExecutor(1)
        # Its messages must not meet those of the steps that are made meanwhile.
        self.group = dist.new_group(backend="gloo") if beside and processes.world > 1 else None
        self.writing: tuple[Future, dict] | None = None

    def begin(self, start: Path | None, newest: Path | None) -> None:
        """Readies the folder for a run that goes on from `start`; `newest` was the newest checkpoint when it loaded.

        Raises:
            InputError: another run has written a checkpoint since; or later ones cannot be set aside.
        """
        self.last = start
        if not self.processes.first:
            return
        if lineage.newest(self.output_dir) != newest:
            raise InputError(f"--output_dir {self.output_dir}: another run has changed its checkpoints while this one "
                             "started; start again")  # fmt: skip
        if start is not None and lineage.belongs(start, self.output_dir):
            lineage.go_back(self.output_dir, start.resolve())

    def save(self, tensors: dict, state: dict) -> None:
        """Writes a checkpoint, or begins to.

        Raises:
            InputError: the disk does not take it, or did not take the last one; the checkpoints before it are whole.
        """
        self.finish()
        partial = self._partial(state)
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")):
                shutil.rmtree(old)
        self.processes.barrier()
        options = {"checkpoint_id": partial, "no_dist": self.processes.world == 1}
        with self._one_line(state):
            if self.beside:
                written = quietly(dcp.async_save, tensors, process_group=self.group, **options)
                self.writing = self.pool.submit(self._complete, state, written), state
                return
            quietly(dcp.save, tensors, **options)
            self._complete(state)
            self._publish(state)
        self.processes.barrier()

    def poll(self) -> bool:
        """Gives what is whole by now its name; says whether writing has ended badly instead."""
        if self.writing is None or not self.writing[0].done():
            return False
        if self.writing[0].exception():
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Waits until nothing is being written.

        Raises:
            InputError: as `save`.
        """
        if self.writing is None:
            return
        (future, state), self.writing = self.writing, None
        with self._one_line(state):
            future.result()
            self._publish(state)

    def _complete(self, state: dict, written: Future | None = None) -> None:
        """Adds the state and the checksums when the tensors are `written`."""
        if written is not None:
            written.result()
        if self.processes.first:
            partial = self._partial(state)
            write_atomic(partial / STATE, json.dumps(state | {"checksums": True}, indent=1))
            write_checksums(partial)

    def _publish(self, state: dict) -> None:
        if not self.processes.first:
            return
        final = self.folder / lineage.name_of(state["step"])
        if final.exists():
            lineage.remove(final)
        os.replace(self._partial(state), final)
        self.last = final
        for old in lineage.checkpoints_of(self.output_dir)[: -self.keep]:
            if old != final:
                lineage.remove(old)

    def _partial(self, state: dict) -> Path:
        return self.folder / f".partial-{lineage.name_of(state['step'])}"

    @contextmanager
    def _one_line(self, state: dict) -> Iterator[None]:
        try:
            yield
        except (OSError, dcp.api.CheckpointException) as error:
            raise InputError(f"--output_dir {self.output_dir}: the checkpoint of step {state['step']} cannot be "
                             f"written ({reason(error)}); free some space, then --resume auto") from None  # fmt: skip
