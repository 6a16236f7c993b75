"""Manifests: one name for one content, whoever encodes it; everything else is refused with its own error."""

import math
import secrets
from typing import Any

import msgspec
import pytest
from shoal.node.model.presets import preset
from shoal.node.run.manifest import (
    PROTOCOL_VERSION,
    Manifest,
    ManifestError,
    ManifestOversized,
    ManifestTampered,
    ModelSpec,
    OuterSpec,
    PrivacySpec,
    ProtocolMismatch,
    SketchSpec,
    StandInSpec,
    TrainSpec,
    UnknownFields,
    canonical_bytes,
    read_signed,
    run_id_of,
    sign,
    verify,
    with_settings,
)
from shoal.protocol.directory.records import open_manifest, open_signed_manifest, seal_manifest
from shoal.protocol.identity import Identity

FOUNDER = Identity(bytes(range(32)))


def manifest(founder: Identity = FOUNDER, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "demo",
        "founder": founder.peer_id,
        "created_at": 1_700_000_000,
        "model": ModelSpec(config={"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "num_experts": 8}),
    }
    return Manifest(**(fields | changes))


def signed_by(founder: Identity, fields: dict[str, Any]) -> bytes:
    """What other software, newer or malicious, may sign."""
    data = msgspec.msgpack.encode(fields, order="sorted")
    return seal_manifest(data, founder.sign(b"shoal/1 manifest" + data))


def fields_of(source: Manifest) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.msgpack.decode(canonical_bytes(source))
    return decoded


def test_golden_run_id() -> None:
    assert run_id_of(manifest()) == "demo-f2621e51a020"


def test_round_trip() -> None:
    founder = Identity.generate()
    original = manifest(founder, train=TrainSpec(learning_rate=0.1 + 0.2))
    signed = sign(founder, original)
    assert verify(signed) == original
    assert verify(signed, run_id_of(original)) == original
    assert read_signed(signed).run_id == run_id_of(original)
    open_manifest(signed, run_id_of(original))  # what DHT nodes check


def test_handle_keys_are_named_by_their_digest() -> None:
    hidden = manifest(privacy=PrivacySpec(handle_key_digest=secrets.token_hex(32)))
    assert verify(sign(FOUNDER, hidden)) == hidden
    assert run_id_of(hidden) != run_id_of(manifest())


def test_equal_content_gives_equal_bytes() -> None:
    config = {"b": 1, "a": {"d": 0.1, "c": [1, 2]}}
    shuffled = {"a": {"c": [1, 2], "d": 0.1}, "b": 1}
    one = manifest(model=ModelSpec(config=config), outer=OuterSpec(learning_rate=1.0))
    other = manifest(model=ModelSpec(config=shuffled), outer=OuterSpec(learning_rate=1))
    assert canonical_bytes(one) == canonical_bytes(other)
    assert canonical_bytes(verify(sign(FOUNDER, other))) == canonical_bytes(one)


@pytest.mark.parametrize("value", [0.1, 1e-45, 1e300, 5e-324, 1 / 3, math.pi, 3e-3, 2.0**-40, -0.0])
def test_floats_survive_to_the_bit(value: float) -> None:
    again = verify(sign(FOUNDER, manifest(model=ModelSpec(config={"value": value}))))
    assert again.model.config["value"].hex() == value.hex()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "demo2"},
        {"created_at": 1_700_000_001},
        {"train": TrainSpec(learning_rate=math.nextafter(3e-3, 1))},
        {"model": ModelSpec(config={"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "num_experts": 9})},
    ],
)
def test_any_change_is_another_run(change: dict[str, Any]) -> None:
    assert run_id_of(manifest(**change)) != run_id_of(manifest())
    with pytest.raises(ManifestTampered, match="not that of the run"):
        verify(sign(FOUNDER, manifest(**change)), run_id_of(manifest()))


def test_only_the_founder_signs() -> None:
    with pytest.raises(ManifestError, match="the founder is"):
        sign(Identity.generate(), manifest())
    record = open_signed_manifest(sign(FOUNDER, manifest()))
    stranger = Identity.generate()
    with pytest.raises(ManifestTampered, match="not signed by its founder"):
        verify(seal_manifest(record.manifest, stranger.sign(b"shoal/1 manifest" + record.manifest)))


def test_every_flipped_bit_is_noticed() -> None:
    signed = sign(FOUNDER, manifest())
    run_id = run_id_of(manifest())
    for _ in range(300):
        damaged = bytearray(signed)
        damaged[secrets.randbelow(len(signed))] ^= 1 << secrets.randbelow(8)
        with pytest.raises(ManifestError):
            verify(bytes(damaged), run_id)
        with pytest.raises(ManifestError):
            verify(bytes(damaged))


def test_another_protocol_names_both_versions_and_the_fix() -> None:
    # A newer one may have any fields besides; that must not be what the user reads about.
    fields = fields_of(manifest()) | {"protocol_version": PROTOCOL_VERSION + 1, "novelty": [1]}
    with pytest.raises(ProtocolMismatch) as caught:
        verify(signed_by(FOUNDER, fields))
    assert f"protocol {PROTOCOL_VERSION + 1}" in caught.value.cause
    assert f"protocol {PROTOCOL_VERSION}" in caught.value.cause
    assert f"protocol-{PROTOCOL_VERSION + 1}" in caught.value.fix


@pytest.mark.parametrize("path", [(), ("train",), ("model",)])
def test_unknown_fields(path: tuple[str, ...]) -> None:
    fields = fields_of(manifest())
    target = fields
    for name in path:
        target = target[name]
    target["novelty"] = 1
    with pytest.raises(UnknownFields, match="novelty"):
        verify(signed_by(FOUNDER, fields))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "Demo"}, "name"),
        ({"name": "demo\n"}, "name"),
        ({"created_at": -1}, "created_at"),
        ({"train": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"train": {"learning_rate": float("inf")}}, "learning_rate"),
        ({"train": {"steps": 0}}, "steps"),
        ({"data": {"tokenizer": "pickle"}}, "tokenizer"),
        ({"model": {}}, "config"),
        ({"model": {"config": {}, "private_layers": -1}}, "private_layers"),
        ({"privacy": {"handle_key_digest": "ab" * 31}}, "handle_key_digest"),
        ({"privacy": {"handle_key_digest": "AB" * 32}}, "handle_key_digest"),
        ({"privacy": {"handle_key_digest": "ab" * 32 + "\n"}}, "handle_key_digest"),
    ],
)
def test_out_of_bounds_fields_are_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        verify(signed_by(FOUNDER, fields_of(manifest()) | change))


@pytest.mark.parametrize(
    ("sketch", "standin", "fix"),
    [
        ({"rank": 129}, "lowbit", "set sketch.rank to 128 at most"),  # of 128 columns and 256 rows
        ({"rank": 0}, "lowbit", "correct that field"),
        ({"rank": 128}, "narrow", "set standin.kind to lowbit or ternary, or sketch.kind to rows"),
    ],
)
def test_gradient_sketches_that_nobody_could_make(sketch: dict[str, int], standin: Any, fix: str) -> None:
    config = preset("small").model.config | {"hidden_size": 128}
    facts: dict[str, Any] = {"model": ModelSpec(config=config), "standin": StandInSpec(kind=standin)}
    assert sign(FOUNDER, manifest(**facts | {"sketch": SketchSpec(kind="rows", rank=max(1, sketch["rank"]))}))
    with pytest.raises(ManifestError) as caught:
        sign(FOUNDER, manifest(**facts | {"sketch": SketchSpec(kind="gradient", **sketch)}))
    assert fix in caught.value.fix
    for kind in ("lowbit", "ternary"):
        good = manifest(**facts | {"standin": StandInSpec(kind=kind), "sketch": SketchSpec(kind="gradient", rank=128)})
        assert verify(sign(FOUNDER, good)) == good


def test_sign_sketches_that_nobody_could_make_or_send() -> None:
    narrow = manifest(standin=StandInSpec(kind="narrow"), sketch=SketchSpec(kind="signs"))
    with pytest.raises(ManifestError, match="signs sketches need stand-ins as wide as the experts") as caught:
        sign(FOUNDER, narrow)
    assert "sketch.kind to rows" in caught.value.fix
    for size, fits in ((1 << 13, True), (1 << 14, False)):  # 24 and 96 MiB an expert
        config = preset("small").model.config | {"hidden_size": size, "moe_intermediate_size": size}
        large = manifest(model=ModelSpec(config=config), sketch=SketchSpec(kind="signs"))
        if fits:
            assert verify(sign(FOUNDER, large)) == large
        else:
            with pytest.raises(ManifestError, match="more than the 67100672 of a message"):
                sign(FOUNDER, large)


def test_gradient_sketches_of_a_model_that_cannot_be_built() -> None:
    with pytest.raises(ManifestError, match="the model cannot be built"):
        sign(FOUNDER, manifest(model=ModelSpec(config={}), sketch=SketchSpec(kind="gradient")))


def test_numbers_beyond_64_bits_have_no_canonical_bytes() -> None:
    with pytest.raises(ManifestError, match="64 bits"):
        run_id_of(manifest(train=TrainSpec(steps=10**20)))


def test_own_mistakes_show_when_signing() -> None:
    with pytest.raises(ManifestError, match="steps"):
        sign(FOUNDER, manifest(train=TrainSpec(steps=0)))


def test_oversized() -> None:
    with pytest.raises(ManifestOversized):
        sign(FOUNDER, manifest(model=ModelSpec(config={"x": "y" * 65536})))
    with pytest.raises(ManifestOversized):
        verify(bytes(1 << 20))


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x92\xc4\x01x\xc4\x00", b"\x91" * 60_000])
def test_junk(junk: bytes) -> None:
    with pytest.raises(ManifestError):
        verify(junk)


def test_depth_is_no_crash() -> None:
    data = msgspec.msgpack.encode(fields_of(manifest()))
    deep = b"\x81\xa1x" * 20_000 + b"\xc0"
    for payload in (deep, data.replace(b"\xa6config\x83", b"\xa6config\x81\xa1y" + b"\x91" * 50_000, 1)):
        with pytest.raises(ManifestError):
            verify(seal_manifest(payload, FOUNDER.sign(b"shoal/1 manifest" + payload)))


def test_other_encodings_of_the_same_content_are_refused() -> None:
    fields = fields_of(manifest())
    data = msgspec.msgpack.encode(dict(reversed(fields.items())))
    with pytest.raises(ManifestError, match="canonical"):
        verify(seal_manifest(data, FOUNDER.sign(b"shoal/1 manifest" + data)))


def test_errors_have_codes_of_their_own() -> None:
    kinds = [ManifestError, ManifestOversized, ManifestTampered, UnknownFields, ProtocolMismatch]
    assert len({kind.code for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.expert_weights=ternary", "standin.kind=lowbit"),
        ("ownership.snapshot_format=standin", "standin.kind=narrow"),
    ],
)
def test_what_travels_must_make_an_expert(settings: tuple[str, ...]) -> None:
    founder = Identity.generate()
    with pytest.raises(ManifestError):
        sign(founder, with_settings(manifest(founder), settings))
    sign(founder, with_settings(manifest(founder), (settings[0], "standin.kind=ternary")))


def test_a_fragment_cannot_be_due_at_two_times() -> None:
    settings = ["outer.embeddings_every=48", "outer.router_every=4"]
    with pytest.raises(ManifestError, match="3 cadences") as refused:
        sign(FOUNDER, with_settings(manifest(), [*settings, "outer.fragments=2"]))
    assert "outer.fragments" in refused.value.fix
    sign(FOUNDER, with_settings(manifest(), [*settings, "outer.fragments=3"]))
    sign(FOUNDER, with_settings(manifest(), ["outer.embeddings_every=48", "outer.fragments=2"]))


def test_no_fragment_is_merged_more_than_once_a_step() -> None:
    sign(FOUNDER, with_settings(manifest(), ["outer.every_steps=4", "outer.growth=0.25"]))
    with pytest.raises(ManifestError, match="more than one merge") as refused:
        sign(FOUNDER, with_settings(manifest(), ["outer.every_steps=4", "outer.growth=0.2"]))
    assert "0.25" in refused.value.fix
    with pytest.raises(ManifestError, match="more than one merge") as refused:
        sign(FOUNDER, with_settings(manifest(), ["outer.every_steps=3", "outer.growth=0.333"]))
    assert "0.334" in refused.value.fix
    sign(FOUNDER, with_settings(manifest(), ["outer.every_steps=3", "outer.growth=0.334"]))


def test_radial_merges_of_fragments_whose_norms_fit_in_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = preset("tiny").model
    good = manifest(model=model, outer=OuterSpec(merge="radial", fragments=1))
    assert verify(sign(FOUNDER, good)) == good
    assert run_id_of(good) != run_id_of(manifest(model=model, outer=OuterSpec(fragments=1)))
    monkeypatch.setattr("shoal.protocol.averaging.facts.MAX_NORMS", 20)
    with pytest.raises(ManifestError, match="28 tensors, more than 20") as refused:
        sign(FOUNDER, good)
    assert "outer.fragments" in refused.value.fix
    more = manifest(model=model, outer=OuterSpec(merge="radial", fragments=2))
    assert verify(sign(FOUNDER, more)) == more
    for wrong in (manifest(model=ModelSpec(config={}), outer=more.outer), with_settings(good, ["outer.fragments=200"])):
        with pytest.raises(ManifestError, match="cannot be cut"):
            sign(FOUNDER, wrong)
