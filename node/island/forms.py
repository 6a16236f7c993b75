"""The forms that an island can have, and both sides of each."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..capacity import devices_of
from ..config import PeerConfig
from ..errors import ConfigError
from ..model.stages import spans
from ..run.manifest import Manifest
from .leader import Island
from .learners import LearnerReplica, Learners
from .merging import DataParallel, DataReplica
from .orders import Form, Setup
from .pipeline import Pipeline, StageReplica
from .replica import Replica

REPLICAS: dict[Form, Callable[[Setup], Replica]] = {
    "data": DataReplica, "learners": LearnerReplica, "pipeline": StageReplica
}  # fmt: skip


def island_of(config: PeerConfig, manifest: Manifest) -> Island:
    """The island that a peer's settings ask for; each process has a GPU of its own, or its part of the cores.

    Raises ConfigError if there are fewer GPUs, or the run's model does not make as many stages.
    """
    size = config.island
    devices = [str(device) for device in devices_of(config.device, size)]
    cores = config.threads or len(os.sched_getaffinity(0))
    threads = max(1, cores // size)
    if config.island_form == "data":
        if config.island_every > 1:
            return Learners(size, devices, threads, every=config.island_every)
        return DataParallel(size, devices, threads)
    try:
        return Pipeline(size, devices, threads, spans=spans(manifest.model, size))
    except ValueError as error:
        raise ConfigError(
            f"island = {size}: {error}", fix="give fewer processes, or leave --island-form out"
        ) from error


def replica_of(setup: Setup) -> Replica:
    """A member's side of it."""
    return REPLICAS[setup.form](setup)
