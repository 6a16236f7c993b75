"""The command line: reads what the user wants and calls what does it. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json as jsonlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

from .. import __version__
from ..protocol.imports import importing
from . import logs
from .config import PeerConfig, PresetName, Role, default_data_dir
from .doctor.command import doctor
from .ending import as_a_peer, ended
from .errors import NoIdentity
from .peer.reviving import reap, reviving
from .plan import plan
from .run.runs import runs
from .settings_file import forget_empty_variables, inside_the_peers, settings_from
from .simulation.command import simulate
from .upcycling.command import branch, mix, upcycle

if TYPE_CHECKING:
    from .run.manifest import Manifest

RUN = Group("Run", sort_key=0)
GLOBAL = Group("Settings file", sort_key=9)

app = App(
    name="shoal",
    version=__version__,
    version_flags=["--version"],
    help_format="markdown",
    result_action="return_value",
    help="""Train a Mixture-of-Experts language model together with others, peer to peer.

    Found a run and get an invite, or join one with an invite. Peers come and go as they like; each keeps full weights
    of the experts it owns and light stand-ins of all others.

        shoal found --preset tiny --name my-run
        shoal join shoal://198.51.100.7:31337/my-run-0123456789ab?v=1
        shoal status

    Every setting of a peer can also stand in a TOML file (`--config peer.toml`, `log_level = "debug"`) or in the
    environment (`SHOAL_LOG_LEVEL=debug`). Flags win over the environment, the environment over the file.
    """,
)
app.meta.result_action = "return_value"
app["--help"].group = app["--version"].group = "About"
identity_app = App(name="identity", help="The key that names this peer.")
app.command(identity_app)
app.command(doctor)
app.command(runs)
app.command(branch)
app.command(mix)
app.command(plan)
app.command(simulate)
app.command(upcycle)

# Commands that take settings from file and environment too; so does `identity show`.
CONFIGURED = ("found", "join", "doctor", "status", "export")
PeerOptions = Annotated[PeerConfig | None, Parameter(name="*")]


@app.command
def found(
    *,
    preset: Annotated[PresetName, Parameter(group=RUN)] = "tiny",
    name: Annotated[str | None, Parameter(group=RUN)] = None,
    steps: Annotated[int | None, Parameter(group=RUN)] = None,
    min_composers: Annotated[int, Parameter(group=RUN)] = 1,
    lease_seconds: Annotated[float, Parameter(group=RUN)] = 20.0,
    private_layers: Annotated[int, Parameter(group=RUN)] = 0,
    sketch_budget: Annotated[int | None, Parameter(group=RUN, metavar="BYTES_PER_STEP")] = None,
    set_: Annotated[
        tuple[str, ...],
        Parameter(name="--set", group=RUN, metavar="PART.FIELD=VALUE", negative=(), show_default=False),
    ] = (),
    role: Annotated[Literal["bootstrap", "composer"], Parameter(group=RUN)] = "bootstrap",
    model: Annotated[Path | None, Parameter(group=RUN, metavar="CONFIG")] = None,
    seed: Annotated[Path | None, Parameter(group=RUN, metavar="FOLDER")] = None,
    peer: PeerOptions = None,
) -> int:
    """Start a new run and its first peer, and print the invite.

    The run's facts (model, schedule, codecs) are fixed and signed now. By default the first peer is a `bootstrap` peer:
    it trains nothing and needs no GPU, but it should stay up, since the invite leads to it.

        shoal found --preset tiny --steps 500
        shoal found --role composer --announce train.example.org --dht-port 31337

    Parameters
    ----------
    preset:
        What to train: `tiny` trains on one CPU core, `small` wants a GPU or patience. The others are for comparisons:
        `bench`, and `standard` (8 experts, 2 a token) beside `fine-grained` (64 narrow ones, 16 a token).
    name:
        Lower-case name of the run; it begins the run's id. By default the preset's.
    steps:
        Steps after which a composer is done, in place of the preset's.
    min_composers:
        How many composers must be there before the first step is taken.
    lease_seconds:
        How long a peer is believed to be there after its last sign of life; then others take over its experts. Short
        leases lose less when a peer dies, and cost more messages and false alarms on slow links.
    private_layers:
        How many Mixture-of-Experts layers, counted from the input, are not shared out: every composer holds all their
        experts in full, which takes memory, and no activations of these layers leave a composer.
    sketch_budget:
        How much a composer may send in one training step to teach the experts of others. As long as enough of it fits,
        that is said row by row, else in sums of gradients: docs/sketches.md. By default all rows.
    set_:
        Any other fact of the manifest, in place of the preset's: `--set sketch.budget_bytes=200000`,
        `--set standin.kind=narrow`. May be given several times; docs/sketches.md lists those of sketches.
    role:
        Whether the first peer trains too.
    model:
        A transformers config.json of a Mixture-of-Experts family, or a folder with one: train that model, from scratch
        and over bytes. The preset then only gives the schedule.
    seed:
        A Mixture-of-Experts checkpoint to start from, as `upcycle` and `export` write them; the preset then only gives
        the schedule. Peers fetch from each other what they need of it.
    """
    config = replace(peer or PeerConfig(), role=role)
    with importing():
        from .run.founding import new_manifest

    manifest = new_manifest(
        config,
        preset,
        name=name,
        steps=steps,
        min_composers=min_composers,
        lease_seconds=lease_seconds,
        private_layers=private_layers,
        sketch_budget=sketch_budget,
        settings=set_,
        model=model,
        seed=seed,
    )
    return _start(config, manifest)


@app.command
def join(
    invite: Annotated[str, Parameter(group=RUN)],
    *,
    role: Annotated[Role, Parameter(group=RUN)] = "composer",
    peer: PeerOptions = None,
) -> int:
    """Join a run.

    Fetches what the run has learned so far, claims experts that fit this machine, and trains. Stop it with Ctrl-C or
    SIGTERM: it hands its experts over first. Started again on the same data directory, it is the same peer.

        shoal join INVITE
        shoal join INVITE --data ~/texts --data-shard 0/4 --http-port 8470
        SHOAL_INVITE=INVITE SHOAL_DATA_DIR=/data shoal join

    Parameters
    ----------
    invite:
        The string that `shoal found` printed; every running peer's status page shows one too. In a network that you
        trust, the HTTP address of such a peer will do: http://HOST:8470.
    role:
        What to do there: `composer` trains on data, `worker` trains experts for composers and needs no data,
        `bootstrap` helps others to find the run, `observer` only looks.
    """
    config = replace(peer or PeerConfig(), role=role, invite=invite)
    return _start(config, None)


@app.command
def status(
    url: str | None = None, /, *, data_dir: Path | None = None, json: Annotated[bool, Parameter(negative=())] = False
) -> int:
    """Show how a running peer is, and the swarm as that peer sees it.

    It asks over HTTP, so it works from every machine that the peer's `--http-host` lets in.

        shoal status
        shoal status http://198.51.100.7:8470 --json

    Parameters
    ----------
    url:
        The peer's HTTP address. By default the peer that runs on the data directory.
    data_dir:
        The peer's data directory. $SHOAL_HOME changes the default, ~/.shoal.
    json:
        Print everything the peer says as JSON.
    """
    from .storage.presence import find_peer
    from .watching.status import SHOWN, fetch_status, render

    peer = url or find_peer(PeerConfig(data_dir=data_dir or default_data_dir()).data_dir)
    told = fetch_status(peer) if json else fetch_status(peer, needed=SHOWN)
    if json:
        print(jsonlib.dumps(told, indent=2))
    else:
        from rich.console import Console

        Console().print(render(told))
    return 0


@app.command
def export(invite: str, out: Path, *, data_dir: Path | None = None, log_level: logs.LogLevel = "info") -> int:
    """Gather a run's model from its peers and write it as a Hugging Face checkpoint.

    Backbone and experts come from the peers that hold them, checked against what the swarm has signed. The result loads
    with plain transformers: `AutoModelForCausalLM.from_pretrained(OUT)`.

        shoal export INVITE ./my-model

    Parameters
    ----------
    invite:
        The run's invite, or in a network that you trust the HTTP address of a peer.
    out:
        Folder to write; it must not exist yet.
    data_dir:
        Identity and temporary files of the exporting peer. By default `export` inside the data directory of the peer.
    log_level:
        The least important messages to log.
    """
    config = PeerConfig(
        invite=invite, role="observer", data_dir=data_dir or default_data_dir() / "export", log_level=log_level
    )
    logs.configure(format=config.log_format, level=config.log_level)
    with importing():
        from .run.gather import export_run

    export_run(invite, out, config)
    print(out)
    return 0


@app.command
def evaluate(
    checkpoint: Path,
    *,
    data: str = "stdlib",
    windows: int = 64,
    context_length: int = 256,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Measure an exported checkpoint's loss on the held-out part of a corpus, with plain transformers.

    The number says what another user of the checkpoint gets: no code of the swarm is involved.

        shoal evaluate ./my-model

    Parameters
    ----------
    checkpoint:
        A folder that `shoal export` wrote.
    data:
        A file, a folder, or `stdlib` for the sources of Python's own library.
    windows:
        How many stretches of held-out text to measure on.
    context_length:
        Tokens in each of them.
    json:
        Print the numbers as JSON.
    """
    logs.configure()
    with importing():
        from .learning.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(checkpoint, data=data, windows=windows, context_length=context_length)
    if json:
        told = {name: getattr(result, name) for name in ("nats_per_token", "bits_per_byte", "windows")}
        print(jsonlib.dumps(told))
    else:
        measured = f"{result.nats_per_token:.4f} nats a token, {result.bits_per_byte:.4f} bits a byte"
        print(f"{measured}, over {result.windows} windows of {result.context_length} tokens")
    return 0


@identity_app.command
def show(*, data_dir: Path | None = None) -> int:
    """Print this peer's id and where its key is. The key itself is never printed.

    Parameters
    ----------
    data_dir:
        The peer's data directory. $SHOAL_HOME changes the default, ~/.shoal.
    """
    from ..protocol.identity import Identity

    path = PeerConfig(data_dir=data_dir or default_data_dir()).identity_path
    if not path.exists():
        raise NoIdentity(f"there is no identity at {path}", fix="it is made when a peer first starts there")
    print(f"{Identity.load(path).peer_id}\n{path}")
    return 0


@app.command
def version() -> int:
    """Print the versions that matter in a bug report."""
    from .run.manifest import PROTOCOL_VERSION

    print(
        f"shoal {__version__}, protocol {PROTOCOL_VERSION}, Python {platform.python_version()}, {platform.platform()}"
    )
    for package in ("torch", "hivemind", "libp2p", "transformers", "bitsandbytes", "numpy"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    return 0


def _start(config: PeerConfig, manifest: Manifest | None) -> int:
    logs.configure(format=config.log_format, level=config.log_level)

    def live() -> int:
        with importing():
            from .peer.peer import run_peer

        code: int = run_peer(config, manifest)
        return code

    if config.hours is None:
        reap()
        return as_a_peer(lambda: reviving(live))
    from .peer.hours import Hours
    from .peer.resting import ByHours

    return as_a_peer(ByHours(config, Hours.parse(config.hours), live).run)


@app.meta.default
def _with_settings(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=GLOBAL, env_var="SHOAL_CONFIG")] = None,
) -> int:
    """Read the settings file, if there is one, and run the command.

    Parameters
    ----------
    config:
        TOML file with settings of a peer, named like the flags with underscores. Each command takes what it knows.
    """
    commands = {name: app[name] for name in CONFIGURED} | {"show": identity_app["show"]}
    with settings_from(config, commands, {"export": [inside_the_peers("export")]}):
        code: int | None = app(tokens, exit_on_error=False, print_error=True)
    return code or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for what went wrong, 2 for what was asked wrongly."""
    given = sys.argv[1:] if argv is None else argv
    forget_empty_variables()
    return ended(lambda: app.meta(given, exit_on_error=False, print_error=True))


if __name__ == "__main__":
    sys.exit(main())
