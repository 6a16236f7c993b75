"""Checkpoints beside training: one at a time, whoever asks for them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch
from shoal.node.storage.checkpoint import PARTIAL, TENSORS, CheckpointError, CheckpointStore
from shoal.node.storage.checkpoint_writer import CheckpointWriter
from shoal.node.watching.state import PeerState


def state_of(step: int, numel: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((numel,), float(step))}


def test_a_peer_that_leaves_while_a_checkpoint_is_written_keeps_both(tmp_path: Path) -> None:
    """A large one takes longer than handing slots over does."""
    state = PeerState("composer")
    writer = CheckpointWriter(CheckpointStore(tmp_path), state)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        writer.write_soon(state_of(1, 1 << 25), {"step": 1}, loop)
        deadline = time.monotonic() + 20
        while not (tmp_path / PARTIAL / TENSORS).exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        await asyncio.to_thread(writer.write, state_of(2, 1000), {"step": 2})
        await asyncio.to_thread(writer.finish)

    asyncio.run(scenario())
    assert state.snapshot()["last_error"] is None
    found = list(CheckpointStore(tmp_path).newest())
    assert [checkpoint.step for checkpoint in found] == [2, 1]
    assert [float(checkpoint.tensors["weight"].mean()) for checkpoint in found] == [2.0, 1.0]


def test_what_cannot_be_written_at_the_end_is_an_error_where_nobody_else_has_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    state = PeerState("composer")
    writer = CheckpointWriter(CheckpointStore(tmp_path / "file" / "checkpoints"), state)
    writer.write_last(state_of(1, 10), {"step": 1}, untaken=())
    assert (state.snapshot()["last_error"] or {}).get("code") == "SHOAL-232"
    with pytest.raises(CheckpointError):
        writer.write_last(state_of(1, 10), {"step": 1}, untaken={3})
