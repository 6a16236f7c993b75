"""What holds for every kind of stand-in: bit-equal copies, refused damage, exact bytes, resumable publishers."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from shoal.kernels.bases import Bases
from shoal.kernels.experts import DenseExpert
from shoal.kernels.interface import LARGEST_WEIGHT, MARK_BYTES
from shoal.kernels.routed import apply_experts
from shoal.kernels.shared import SharedStandIn
from shoal.kernels.standin import (
    KINDS,
    Form,
    Menu,
    Publisher,
    StandIn,
    initial_standin,
    make_publisher,
    standin_from_bytes,
)
from torch import Tensor

kinds = pytest.mark.parametrize("kind", KINDS)


def new_expert(hidden: int | None = None, full: int | None = None) -> DenseExpert:
    hidden, full = hidden or random.randint(3, 20), full or random.randint(2, 20)
    return DenseExpert(torch.randn(2 * full, hidden) / hidden**0.5, torch.randn(hidden, full) / full**0.5)


def moved(expert: DenseExpert, by: float = 0.02) -> DenseExpert:
    return DenseExpert(*(w + by * torch.randn_like(w) for w in expert.dense()))


def initial(kind: str, expert: DenseExpert, size: int) -> StandIn:
    """That of an expert; a shared one on a base of its own."""
    bases = Bases([(expert.gate_up + 0.1, expert.down - 0.1)]) if kind == "shared" else Bases()
    return initial_standin(kind, *expert.dense(), size, bases=bases)


def read(data: bytes, like: StandIn) -> StandIn:
    return standin_from_bytes(data, bases=like.bases if isinstance(like, SharedStandIn) else Bases())


def publisher(kind: str, expert: DenseExpert, published: StandIn | None = None) -> Publisher:
    return make_publisher(
        published or initial(kind, expert, (expert.down.shape[1] + 1) // 2),
        rank=3,
        replay_rows=64,
        refit_steps=3,
        generator=torch.Generator().manual_seed(random.randrange(1 << 30)),
    )


def step(owner: Publisher, expert: DenseExpert) -> bytes:
    owner.observe(torch.randn(20, expert.down.shape[0]), torch.rand(20))
    owner.refit(expert)
    return owner.delta(expert)


@kinds
@settings(max_examples=15)
@given(data=st.data())
def test_copies_stay_equal_to_the_bit(kind: str, data: st.DataObject) -> None:
    """Whoever starts from the seed, from an early or from a late snapshot ends with the owner's bytes."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    expert = new_expert(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24)))
    owner = publisher(kind, expert)
    copies = [read(owner.published.to_bytes(), owner.published)]
    for size in data.draw(st.lists(st.sampled_from([0.0, 1e-4, 0.03, 3.0]), min_size=1, max_size=6)):
        copies.append(read(owner.published.to_bytes(), owner.published))
        expert = moved(expert, size)
        delta = step(owner, expert)
        for copy in copies:
            copy.apply(delta)
    for copy in copies:
        assert copy.to_bytes() == owner.published.to_bytes()
        assert copy.digest() == owner.published.digest()
        for mine, theirs in zip(copy.dense(), owner.published.dense(), strict=True):
            assert torch.equal(mine, theirs)


@kinds
def test_a_delta_for_another_state_is_refused(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    late = read(owner.published.to_bytes(), owner.published)
    first = step(owner, moved(expert))
    second = step(owner, moved(expert))
    before = late.to_bytes()
    with pytest.raises(ValueError, match="another state"):
        late.apply(second)  # a gap
    assert late.to_bytes() == before
    late.apply(first)
    with pytest.raises(ValueError, match="another state"):
        late.apply(first)  # a duplicate
    late.apply(second)
    assert late.digest() == owner.published.digest()


@kinds
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_deltas_change_nothing(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    expert = new_expert(12, 8)
    owner = publisher(kind, expert)
    copy = read(owner.published.to_bytes(), owner.published)
    before = copy.to_bytes()
    delta = step(owner, moved(expert))
    how = data.draw(st.sampled_from(["flip", "cut", "extend", "noise"]))
    if how == "flip":
        position = data.draw(st.integers(0, len(delta) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        damaged = delta[:position] + bytes([delta[position] ^ bit]) + delta[position + 1 :]
    elif how == "cut":
        damaged = delta[: data.draw(st.integers(0, len(delta) - 1))]
    elif how == "extend":
        damaged = delta + data.draw(st.binary(min_size=1, max_size=40))
    else:
        damaged = delta[: data.draw(st.sampled_from([0, MARK_BYTES]))] + data.draw(st.binary(max_size=200))
    with pytest.raises(ValueError, match=r"delta|rank|scale|code|row|bytes|values"):
        copy.apply(damaged)
    assert copy.to_bytes() == before
    copy.apply(delta)
    assert copy.digest() == owner.published.digest()


@kinds
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_snapshots_are_refused_or_valid(kind: str, data: st.DataObject) -> None:
    """A flipped bit may give another valid state (its digest tells), but never one that is not finite or misshapen."""
    torch.manual_seed(0)
    like = initial(kind, new_expert(6, 4), 2)
    whole = like.to_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        standin = read(bytes(damaged), like)
    except ValueError:
        pass
    else:
        gate_up, down = standin.dense()
        assert gate_up.shape == (2 * standin.width, standin.hidden)
        assert down.shape == (standin.hidden, standin.width)
        assert bool(gate_up.isfinite().all() & down.isfinite().all())
    with pytest.raises(ValueError, match="not safetensors"):
        standin_from_bytes(whole[:position])


@kinds
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, -torch.inf, 2 * LARGEST_WEIGHT])
def test_values_that_are_not_sane_are_refused_everywhere(kind: str, spoil: float) -> None:
    expert = new_expert()
    standin = initial(kind, expert, 1)
    name = next(n for n, t in standin.tensors.items() if t.is_floating_point())
    spoilt = {n: t.clone() for n, t in standin.tensors.items()}
    spoilt[name].view(-1)[0] = spoil
    with pytest.raises(ValueError, match="finite"):
        read(save(spoilt), standin)

    expert.down[0, 0] = spoil
    with pytest.raises(ValueError, match="finite"):
        initial(kind, expert, 1)


@kinds
@pytest.mark.parametrize("change", ["missing", "extra", "dtype", "shape", "garbage"])
def test_snapshots_of_the_wrong_form_are_refused(kind: str, change: str) -> None:
    like = initial(kind, new_expert(), 2)
    tensors = dict(like.tensors)
    name = random.choice(list(tensors))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["more"] = torch.zeros(1)
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.float16)
    elif change == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    data = random.randbytes(200) if change == "garbage" else save(tensors)
    with pytest.raises(ValueError, match=r"holds|is \(|not safetensors"):
        read(data, like)


@kinds
def test_a_snapshot_that_is_not_on_the_menu_is_refused(kind: str) -> None:
    expert = new_expert(6, 5)
    standin = initial(kind, expert, 3)
    bases = standin.bases if isinstance(standin, SharedStandIn) else Bases()
    menu = Menu(6, 5, [Form("lowbit" if kind == "ternary" else "ternary"), Form.of(standin)], bases)
    assert menu.load(standin.to_bytes()).digest() == standin.digest()
    assert menu.load(initial_standin(menu.forms[0].kind, *expert.dense(), 3).to_bytes()).kind == menu.forms[0].kind
    for wrong in (
        initial_standin("narrow", *expert.dense(), 4),
        initial_standin("lowbit", *new_expert(7, 5).dense(), 3),
        initial_standin("ternary", *new_expert(6, 4).dense(), 2),
        initial("shared", expert, 2),
        initial("shared", new_expert(6, 4), 3),
    ):
        with pytest.raises(ValueError, match=r"expected|base"):
            menu.load(wrong.to_bytes())


@kinds
def test_the_memory_that_a_form_is_said_to_take(kind: str) -> None:
    hidden, width = 64 * random.randint(1, 3), 64 * random.randint(1, 3)
    standin = initial(kind, new_expert(hidden, width), random.randint(1, 32))
    form = Form.of(standin)
    # Beside its numbers a state has sizes, a digest, or the scales of its rows.
    assert form.nbytes(hidden, width) <= standin.nbytes <= form.nbytes(hidden, width) * 1.05 + 16 + 8 * (hidden + width)


def test_a_header_with_an_unknown_dtype_is_refused() -> None:
    header = b'{"down":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(ValueError, match="not safetensors"):
        standin_from_bytes(struct.pack("<Q", len(header)) + header + b"\0")


@kinds
def test_state_continues_to_the_bit(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    for _ in range(random.randint(0, 3)):
        expert = moved(expert)
        step(owner, expert)
    heir = publisher(kind, expert, owner.published)
    heir.load_state_dict(owner.state_dict())
    for _ in range(3):
        expert = moved(expert)
        x, gate = torch.randn(9, expert.down.shape[0]), torch.rand(9)
        deltas = []
        for one in (owner, heir):
            one.observe(x, gate)
            one.refit(expert)
            deltas.append(one.delta(expert))
        assert deltas[0] == deltas[1]
        assert owner.fidelity(expert) == heir.fidelity(expert)
    states = owner.state_dict(), heir.state_dict()
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@kinds
def test_a_successor_does_the_same_and_changes_nothing(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    for _ in range(2):
        step(owner, expert)
    before = {name: tensor.clone() for name, tensor in owner.state_dict().items()}
    rows, expert = owner.replay.taken(), moved(expert)
    owner.observe(torch.randn(9, owner.published.hidden), torch.ones(9))  # the copy has none of these
    successor = owner.successor(rows)
    deltas = []
    for _ in range(2):
        successor.refit(expert)
        deltas.append(successor.delta(expert))
    assert successor.published.digest() != owner.published.digest()
    assert all(torch.equal(now, before[n]) for n, now in owner.state_dict().items() if not n.startswith("replay"))
    owner.replay = rows
    for delta in deltas:
        owner.refit(expert)
        assert owner.delta(expert) == delta


@kinds
def test_a_state_is_a_copy_and_may_leave_out_the_rows(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    step(owner, expert)
    state = owner.state_dict(replay=False)
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    assert not any(name.startswith("replay") for name in state)
    step(owner, moved(expert))
    assert all(torch.equal(state[name], frozen[name]) for name in state)
    heir = publisher(kind, expert)
    heir.load_state_dict(state)
    assert heir.published.digest() != owner.published.digest()


@kinds
def test_bad_states_are_refused_and_leave_the_publisher_as_it_was(kind: str) -> None:
    expert = new_expert(8, 6)
    owner = publisher(kind, expert)
    step(owner, expert)
    good = owner.state_dict()
    before = {name: tensor.clone() for name, tensor in good.items()}
    for name, tensor in good.items():
        bad: list[dict[str, Tensor]] = [{**good, f"{name}.more": tensor}, {**good, name: tensor.to(torch.complex64)}]
        if tensor.is_floating_point():
            bad.append({**good, name: torch.full_like(tensor, torch.nan)})
        if tensor.dim():
            bad.append({**good, name: torch.cat([tensor, tensor])})
        bad.append({key: value for key, value in good.items() if key != name})
        for state in bad:
            with pytest.raises(ValueError, match=r"."):
                owner.load_state_dict(state)
    after = owner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@kinds
def test_a_successor_goes_on_from_what_is_published(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    step(owner, moved(expert))
    copy = read(owner.published.to_bytes(), owner.published)
    heir = publisher(kind, moved(expert), published=copy)
    assert heir.published is not copy
    copy.apply(step(heir, moved(expert)))
    assert copy.digest() == heir.published.digest()


@kinds
def test_an_expert_that_diverged_publishes_nothing(kind: str) -> None:
    expert = new_expert()
    owner = publisher(kind, expert)
    digest = owner.published.digest()
    broken = DenseExpert(expert.gate_up * torch.nan, expert.down)
    if kind != "narrow":
        with pytest.raises(ValueError, match="finite"):
            step(owner, broken)
        assert owner.published.digest() == digest
    else:  # nothing was fitted to it, so what is published is what was fitted before
        step(owner, broken)
        assert all(bool(w.isfinite().all()) for w in owner.published.dense())
    assert owner.fidelity(broken) == 0.0
    step(owner, moved(expert))


@kinds
def test_gradients_pass_through_a_standin(kind: str) -> None:
    expert = new_expert()
    standin = initial(kind, expert, 2)
    dense = DenseExpert(*standin.dense())
    index, gates = torch.zeros(7, 1, dtype=torch.int64), torch.rand(7, 1)
    x = torch.randn(7, standin.hidden, requires_grad=True)
    got = torch.autograd.grad(apply_experts(x, index, gates, [standin]).square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(apply_experts(x, index, gates, [dense]).square().sum(), x))


@kinds
def test_fidelity_before_any_row_is_finite_and_one_for_nothing_to_do(kind: str) -> None:
    expert = new_expert()
    assert 0.0 <= publisher(kind, expert).fidelity(expert) <= 1.0
    silent = DenseExpert(torch.zeros(8, 4), torch.zeros(4, 4))
    size = 4 if kind == "narrow" else 1
    owner = publisher(kind, silent, initial_standin(kind, *silent.dense(), size, bases=Bases([silent.dense()])))
    assert owner.fidelity(silent) == 1.0
    step(owner, silent)
    assert owner.fidelity(new_expert(4, 4)) == 0.0  # a stand-in that says nothing


def test_golden_bytes() -> None:
    """The state on the wire. A change here means that peers of two versions no longer understand each other."""
    gate_up = torch.arange(8, dtype=torch.float32).view(4, 2) / 8 - 0.5
    down = torch.arange(4, dtype=torch.float32).view(2, 2) / 4
    lowbit, narrow = (initial_standin(kind, gate_up, down, 1) for kind in ("lowbit", "narrow"))
    assert lowbit.to_bytes() == (
        b"\xb8" + bytes(7) + b'{"size":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        b'"absmax":{"dtype":"F32","shape":[1],"data_offsets":[16,20]},'
        b'"codes":{"dtype":"U8","shape":[32],"data_offsets":[20,52]}}       '
        + struct.pack("<2q1f", 2, 2, 0.75)
        + bytes.fromhex("124579bc7bef")
        + 26 * b"\x77"
    )
    assert narrow.to_bytes() == (
        b"\x80" + bytes(7) + b'{"down":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"gate_up":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]}}       '
        + struct.pack("<6f", 0.25, 0.75, -0.25, -0.125, 0.25, 0.375)
    )


def test_unknown_kinds_and_sizes_are_refused() -> None:
    expert = new_expert(4, 4)
    with pytest.raises(ValueError, match="unknown kind"):
        initial_standin("binary", *expert.dense(), 2)
    for width in (0, 5):
        with pytest.raises(ValueError, match="width"):
            initial_standin("narrow", *expert.dense(), width)
