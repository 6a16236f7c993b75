"""One key file, one peer id: in our own code, in the Go daemon and in py-libp2p."""

import multiprocessing
import os
import secrets
import stat
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from shoal.protocol.errors import BadSignature, IdentityError
from shoal.protocol.identity import Identity, check_peer_id, verify


def test_a_created_file_is_private_and_loads_to_the_same_identity(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directories" / "identity.key"
    created = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == created.peer_id
    assert Identity.load(path).seed == created.seed
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]  # no draft left


def test_golden_peer_id_and_file() -> None:
    identity = Identity(bytes(range(32)))
    assert identity.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    assert identity.to_bytes().hex() == (
        "08011240000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    )


def _create(path: Path, results: "multiprocessing.SimpleQueue[str]") -> None:
    results.put(Identity.load_or_create(path).peer_id)


def test_processes_that_race_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_create, args=(tmp_path / "key", results)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert {results.get() for _ in children} == {Identity.load(tmp_path / "key").peer_id}


def test_go_daemon_reads_the_same_peer_id(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "key")
    daemon = subprocess.Popen(
        [
            str(files("hivemind.hivemind_cli") / "p2pd"),
            f"-id={tmp_path / 'key'}",
            f"-listen=/unix{tmp_path / 'daemon.sock'}",
            "-hostAddrs=/ip4/127.0.0.1/tcp/0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert daemon.stdout is not None
        lines = []
        for line in daemon.stdout:
            lines.append(line)
            if line.startswith("Peer ID:"):
                assert line.split()[-1] == identity.peer_id
                return
        pytest.fail("".join(lines))
    finally:
        daemon.kill()
        daemon.communicate()


def test_py_libp2p_derives_the_same_peer_id_and_signature(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "key")
    script = (
        "import sys\n"
        "from libp2p.crypto.ed25519 import create_new_key_pair\n"
        "from libp2p.peer.id import ID\n"
        "pair = create_new_key_pair(bytes.fromhex(sys.stdin.read()))\n"
        "print(ID.from_pubkey(pair.public_key), pair.private_key.sign(b'message').hex())\n"
    )
    # Its own interpreter: py-libp2p cannot be imported where hivemind may be.
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=identity.seed.hex(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert answer == [identity.peer_id, identity.sign(b"message").hex()]


def test_signatures() -> None:
    identity, other = Identity.generate(), Identity.generate()
    message = secrets.token_bytes(100)
    signature = identity.sign(message)
    verify(identity.peer_id, message, signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for peer_id, text, proof in [
        (other.peer_id, message, signature),
        (identity.peer_id, message + b"x", signature),
        (identity.peer_id, message, flipped),
        (identity.peer_id, message, signature[:-1]),
        (identity.peer_id, message, b""),
        ("12D3KooWnot", message, signature),
    ]:
        with pytest.raises(BadSignature):
            verify(peer_id, text, proof)


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKrPpY",  # an RSA key's: a hash, no key inside
        "1" * 52,
        "12D3KooW" + "z" * 44,
        "12D3KooW" + "0" * 44,
        "12D3KooW" + "é" * 44,
    ],
)
def test_peer_ids_of_other_forms_are_refused(peer_id: str) -> None:
    with pytest.raises(ValueError, match=r"peer id|base58"):
        check_peer_id(peer_id)


def test_damaged_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "key"
    good = Identity.load_or_create(path).to_bytes()
    damaged = {
        b"": "0 bytes do not form",
        good[:-1]: "67 bytes do not form",
        good + b"\0": "69 bytes do not form",
        b"\x08\x00" + good[2:]: "not an Ed25519 key",
        good[:-1] + bytes([good[-1] ^ 1]): "does not belong to the stored seed",
    }
    for content, complaint in damaged.items():
        path.write_bytes(content)
        with pytest.raises(IdentityError, match=complaint) as caught:
            Identity.load_or_create(path)
        assert str(path) in str(caught.value)
        assert caught.value.fix
        assert path.read_bytes() == content  # never replaced behind the user's back


def test_a_file_open_to_others_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="mode 0640") as caught:
        Identity.load(path)
    assert caught.value.fix == f"chmod 600 {path}"


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot read"):
        Identity.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="Not a directory"):
        Identity.load_or_create(tmp_path / "file" / "key")


def test_the_secret_is_not_printed() -> None:
    identity = Identity.generate()
    for text in (repr(identity), str(identity), f"{identity}"):
        assert identity.seed.hex() not in text
        assert repr(identity.seed) not in text


def test_the_module_needs_neither_network_stack() -> None:
    script = (
        "import sys, shoal.protocol.identity\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'hivemind', 'libp2p', 'torch', 'numpy'}))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert answer.stdout.strip() == "[]"
