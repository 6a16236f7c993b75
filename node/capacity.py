"""How many slots fit into a peer's memory.

A slot's experts cost, for each weight, the master, moments and a gradient in float32. Low-rank factors cost that too,
and are few; the 4-bit weights beside them, and weights that are frozen, have neither moments nor gradients.

A stand-in costs a copy's bits, or a narrow one's weights twice, with two moments, and the inputs that it is fitted to.
While that is fitted beside training, it and its inputs are there twice, and a copy of the experts.

Where experts are trained on the CPU, a checkpoint being written is another copy of all but the gradients in the same
memory. A composer holds the backbone and all stand-ins beside its slots, sketches that wait for owners, and what a
batch leaves behind for the backward pass, of which the largest tensors, the logits, are counted.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import psutil
import torch

from ..kernels.bases import Bases
from ..kernels.copies import JUDGED_ROWS
from ..kernels.lora import lora_bytes
from ..protocol.directory.records import MAX_OWNED
from .config import DEVICE, PeerConfig
from .errors import ConfigError
from .learning.expert_mode import ExpertMode
from .logs import get_logger
from .model.init import backbone_shapes, expert_shape
from .run.manifest import ExpertShape, Manifest, ModelSpec, StandInSpec, TrainSpec
from .sketches.row_memory import collected_bytes
from .standins.standin_menu import menu_of

log = get_logger(__name__)

MOMENTS = {"adamw": 2, "adamw8bit": 2, "muon": 1}  # float32 numbers a weight; small tensors have no 8-bit ones
FITTED_TO_BYTES = 4  # a weight: the copy that a narrow one is fitted to
COPY_BYTES = 1  # a weight: a stand-in that is a copy
BACKBONE_BYTES = 6 * 4  # a weight: master, two moments (Muon: at most), gradient, the state last merged, its momentum
BASE_BYTES = 2 + 4  # a weight of a base
LOGITS_BYTES = 3 * 4  # one: itself, its softmax, its gradient
NARROW_BYTES = 4 * 4  # a weight of a narrow stand-in: published, fitted, two moments
DENSE_COPIES = 24  # of one expert at once, with what the allocator does not give back: measured, 10 to 22
SLACK = 1.15  # dense copies of one expert while it is stepped or published, the allocator, snapshots being packed
FREE_SHARE = 0.8  # of what is free now
CGROUP = Path("/sys/fs/cgroup")
# Of both versions: the folder; files of the limit and of what is used; what is idle of it, by its name in memory.stat.
CGROUP_FILES = (
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def device_of(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one. ConfigError if there is no such device."""
    if re.fullmatch(DEVICE, name) is None:
        raise ConfigError(f"device = {name!r} is not possible", fix="give cpu, cuda or auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device = {name!r}: this machine has {gpus} GPUs that torch can use", fix="give cpu or auto")
    return device


def devices_of(name: str, processes: int) -> list[torch.device]:
    """By rank in an island: the device called `name`, then the GPUs after it, or the same CPU. ConfigError likewise."""
    first = device_of(name)
    if first.type == "cpu":
        return [first] * processes
    return [device_of(f"cuda:{index}") for index in range(first.index or 0, (first.index or 0) + processes)]


def device_to_use(name: str) -> torch.device:
    """The same, made ready: float32 products take a GPU's tensor cores (TF32, 10 bits of mantissa going in)."""
    device = device_of(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(device.index or 0)
    return device


def slot_bytes(shape: ExpertShape, standin: StandInSpec, device: torch.device, mode: ExpertMode | None = None) -> int:
    """Memory that one owned slot takes, trained in full or in the way of `mode`."""
    weights = 3 * shape.hidden * shape.width
    fitted = not standin.whole
    if standin.kind == "chosen":  # narrow ones that take all of the budget
        beside = weights * max(COPY_BYTES, standin.bytes_per_weight / 4 * NARROW_BYTES)
    else:
        beside = weights * (NARROW_BYTES * standin.width_fraction if fitted else COPY_BYTES)
    rows = 2 * standin.replay_rows if fitted else min(standin.replay_rows, JUDGED_ROWS)
    trained, kept = weights, 0
    if mode is not None and mode.mode == "lora":
        kept, trained = lora_bytes(shape.hidden, shape.width, mode.rank)
    elif mode is not None and mode.mode == "frozen":
        kept, trained = 4 * weights, 0
    copied = 4 * (1 + MOMENTS[TrainSpec().optimizer if mode is None else mode.train.optimizer])  # master, moments
    each = kept + (copied + 4) * trained + beside
    if device.type == "cpu":
        each += kept + copied * trained + beside
    if fitted:
        each += FITTED_TO_BYTES * weights + beside
    return int(SLACK * shape.num_layers * (each + rows * (2 * shape.hidden + 4)))


def working_bytes(shape: ExpertShape, mode: ExpertMode | None) -> int:
    """Memory that is taken once, whatever number of slots is owned: one expert's weights and gradients, dense, while it
    is stepped, published or handed on. Beside slots that are trained in full that is little, and `SLACK` has it."""
    if mode is None or mode.mode == "full":
        return 0
    return DENSE_COPIES * 4 * 3 * shape.hidden * shape.width


def free_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Memory that is free on a device now; of the CPU's, no more than this container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    for folder, most, taken, idle in CGROUP_FILES:
        try:
            limit = (cgroup / folder / most).read_text().strip()
            used = int((cgroup / folder / taken).read_text())
        except FileNotFoundError:
            continue
        if limit != "max":  # the older kind says a number larger than any memory
            return min(available, max(0, int(limit) - max(0, used - _idle_cache(cgroup / folder, idle))))
    return available  # not in a container


def _idle_cache(cgroup: Path, name: str) -> int:
    """Cache of files that the kernel takes back as soon as memory is wanted. A checkpoint just written leaves as much
    of it as it is large, and the cgroup has it as used."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def usable_bytes(device: torch.device, max_memory_gib: float | None) -> float:
    """What a peer takes of the memory that is free, or `max_memory_gib` if that is less."""
    usable = FREE_SHARE * free_bytes(device)
    return usable if max_memory_gib is None else min(usable, max_memory_gib * (1 << 30))


def slots_that_fit(
    shape: ExpertShape, standin: StandInSpec, device: torch.device, usable: float, mode: ExpertMode | None = None
) -> int:
    """Slots that a peer can own with so many bytes, and name in its records."""
    usable = max(0.0, usable - working_bytes(shape, mode))
    return min(shape.num_experts, MAX_OWNED, int(usable // slot_bytes(shape, standin, device, mode)))


def standin_bytes(shape: ExpertShape, standin: StandInSpec) -> int:
    """Memory that the stand-in of one slot takes in a composer that does not own it."""
    weights = 3 * shape.hidden * shape.width
    if standin.kind == "chosen":
        each = standin.bytes_per_weight * weights
    else:
        (form,) = menu_of(standin, shape.hidden, shape.width, Bases()).forms
        each = form.nbytes(shape.hidden, shape.width)
    return int(each * shape.num_layers)


def bases_bytes(model: ModelSpec, standin: StandInSpec) -> int:
    """Memory of what shared stand-ins are corrections of, as it came and as it is computed with."""
    if standin.kind not in ("shared", "chosen"):
        return 0
    shape = expert_shape(model)
    return BASE_BYTES * 3 * shape.hidden * shape.width * shape.num_layers * model.bases


def composer_bytes(manifest: Manifest) -> int:
    """Memory of a composer that owns nothing, libraries not counted: backbone, stand-ins, logits, and sketches, of
    which many come together while owners are away."""
    model, train = manifest.model, manifest.train
    shape = expert_shape(model)
    backbone = sum(math.prod(size) for size in backbone_shapes(model).values())
    logits = train.batch_size * manifest.data.context_length * int(model.config.get("vocab_size") or 0)
    standins = standin_bytes(shape, manifest.standin) * shape.num_experts
    bases = bases_bytes(model, manifest.standin)
    return BACKBONE_BYTES * backbone + LOGITS_BYTES * logits + standins + bases + collected_bytes(manifest)


def capacity_of(config: PeerConfig, manifest: Manifest) -> tuple[int, int]:
    """The slots of a run, and how many of them this peer can own by its memory and its settings.

    Raises ConfigError if a worker can own none: it would be of no use.
    """
    shape, mode = expert_shape(manifest.model), ExpertMode.of(config, manifest.train)
    mode.require_rank(shape.hidden, shape.width)
    device = devices_of(config.device, config.island)[0]
    usable = usable_bytes(device, config.max_memory)
    if device.type == "cpu":
        usable /= config.island  # members have weights and gradients too
    if config.role == "composer":
        usable -= composer_bytes(manifest)
    fit = slots_that_fit(shape, manifest.standin, device, usable, mode)
    if config.role == "worker" and not fit:
        raise ConfigError(
            "not one slot of this run's experts fits the memory",
            fix="give --max-memory more, or use a machine that has more",
        )
    wanted = 0 if config.own == "none" else shape.num_experts if config.max_slots is None else config.max_slots
    if fit < min(wanted, shape.num_experts):
        log.warning("capacity.limited", slots=fit, of=shape.num_experts, usable_gib=round(usable / (1 << 30), 1))
    return shape.num_experts, min(wanted, fit)
