"""One host process, seen from the trainer: spawn it, talk to it, notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections import deque
from collections.abc import Callable

from ..errors import TransportError
from . import ipc

logger = logging.getLogger(__name__)

_MODULE = "shoal.protocol.transport.host"
_READ_BYTES = 1024 * 1024
_STOP_SECONDS = 5.0
_LINE_BYTES = 400
_LAST_LINES = 5


class HostLost(Exception):
    """The host process died before it answered."""


class HostProcess:
    """Spawned, never forked: py-libp2p must not meet what the trainer has imported."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._listening = asyncio.create_task(self._listen_to_stderr())
        self.pid = process.pid
        self.last_heard = asyncio.get_running_loop().time()

    @classmethod
    async def spawn(cls, start: ipc.Start) -> tuple[HostProcess, ipc.Ready]:
        """Start a host and wait until it listens. Raises TransportError with the host's own reason."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the working directory is no place to import from
                "-m",
                _MODULE,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                process_group=0,  # out of the terminal's reach: on Ctrl-C slots are handed over through it
            )
        except OSError as error:
            ours.close()
            raise TransportError(f"cannot start the py-libp2p host: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        self = cls(process, reader, writer)
        try:
            async with asyncio.timeout(start.limits.start_seconds):
                self.send(start)
                first = await self._first_frame()
        except TimeoutError as error:
            await self.kill()
            raise TransportError(
                f"the py-libp2p host was not ready within {start.limits.start_seconds:g} s",
                fix="see what else this machine is busy with; then start this peer again",
            ) from error
        except (ConnectionError, EOFError) as error:
            raise TransportError(f"the py-libp2p host ended while starting: {await self.ended()}") from error
        except asyncio.CancelledError:
            await self.kill()
            raise
        if isinstance(first, ipc.Ready):
            return self, first
        await self.kill()
        assert isinstance(first, ipc.Failed)
        raise TransportError(f"the py-libp2p host could not start: {first.cause}", fix=first.fix)

    def send(self, frame: ipc.Frame) -> None:
        """Queue a frame. Frames to a dead host vanish; whoever waits for an answer learns from the supervisor."""
        if not self._writer.is_closing():
            self._writer.write(ipc.pack(frame))

    async def flush(self) -> None:
        """Wait until the host has caught up with what was sent. Returns if it is dead."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def read(self, handle: Callable[[ipc.Event], None]) -> None:
        """Pass on the host's frames until its end."""
        splitter = ipc.Splitter()
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return
            if not data:
                return
            self.last_heard = asyncio.get_running_loop().time()
            for body in splitter.feed(data):
                handle(ipc.event_decoder.decode(body))

    async def ended(self) -> str:
        """Wait for the process, release everything, and say why it ended."""
        code = await self._process.wait()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        await self._listening
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return how + (f"; it said: {self._said[-1]}" if self._said else "")

    async def wait(self) -> None:
        await self._process.wait()

    async def stop(self) -> None:
        """Let it send what is queued; then be sure that it is gone."""
        self.send(ipc.Stop())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self.ended()

    async def _first_frame(self) -> ipc.Event:
        prefix = await self._reader.readexactly(4)
        size = int.from_bytes(prefix)
        if size > ipc.MAX_FRAME_BYTES:
            raise EOFError("not a frame")
        return ipc.event_decoder.decode(await self._reader.readexactly(size))

    async def _listen_to_stderr(self) -> None:
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:  # a line longer than the reader's limit; asyncio has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()[:_LINE_BYTES]
            self._said.append(text)
            logger.warning("host %d: %s", self.pid, text)
