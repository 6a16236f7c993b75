"""The card of an exported model, read by the hub's own parser."""

import msgspec
import tiny
from huggingface_hub import ModelCard
from shoal.node.run.model_card import model_card
from shoal.protocol.directory.records import PeerRecord
from shoal.protocol.identity import Identity


def record(peer: str, role: str, **more: object) -> PeerRecord:
    facts = {
        "issued_at": 1.0, "expires_at": 2.0, "peer_id": peer, "role": role, "phase": "training", "capacity": 4,
        "transport_addrs": [], "dht_addrs": [], "metrics_url": "", "version": "0.1.0", "protocol_version": 1, "step": 0,
        "tokens": 0, "tokens_per_second": 0.0, "loss": 0.0, "slots": [], "round": 0, "fidelity": 0.0,
    }  # fmt: skip
    return PeerRecord(**facts | more)  # type: ignore[arg-type]


def test_it_states_the_run_its_peers_and_figures() -> None:
    manifest = tiny.manifest_of(sketch={"kind": "rows"})
    data = msgspec.structs.replace(manifest.data, corpus="wiki | `dump`\n# mine")
    manifest = msgspec.structs.replace(manifest, name="fish", created_at=1_790_000_000, data=data)
    a, b, c, d = (Identity.generate().peer_id for _ in range(4))
    peers = {
        a: record(a, "composer", step=70, tokens=1000, loss=2.5, slots=[0, 3]),
        b: record(b, "composer", step=64, tokens=2000, loss=2.25),
        c: record(c, "worker", slots=[1]),
        d: record(d, "observer"),
    }
    card = ModelCard(model_card(manifest, "fish-0123456789ab", [7, -1], peers))
    assert card.data.library_name == "transformers"
    assert "shoal" in card.data.tags
    text = card.text
    assert "# fish\n" in text
    assert "`fish-0123456789ab`, since 2026-09-21" in text
    assert "| tokens | 3,000 by 2 composers |" in text
    assert "| tokens | 1,000 by 1 composer |" in model_card(manifest, "fish-0123456789ab", [7, -1], {a: peers[a]})
    assert "| steps | 70 of 100 planned |" in text
    assert "7, none" in text
    assert f"| `{a}` | composer | 0.1.0 | 70 | 1,000 | 2.500 | 2 |" in text
    assert f"| `{c}` | worker | 0.1.0 | 0 | 0 |  | 1 |" in text
    assert d not in text
    assert "| text | what each composer named, else wiki / 'dump' # mine |" in text, (
        "what a founder writes stays within its cell"
    )
