"""What can be wrong with a manifest.

ManifestError           it cannot be read: damaged, not canonical, or a field out of bounds
├── ManifestOversized   it exceeds 64 kB
├── ManifestTampered    its hash is not in the run id, or the founder did not sign it
├── UnknownFields       it has fields that this software does not know
└── ProtocolMismatch    it needs another protocol version
"""

from __future__ import annotations

from ...protocol.errors import ShoalError


class ManifestError(ShoalError):
    code = "SHOAL-240"


class ManifestOversized(ManifestError):
    code = "SHOAL-241"


class ManifestTampered(ManifestError):
    code = "SHOAL-242"


class UnknownFields(ManifestError):
    code = "SHOAL-243"


class ProtocolMismatch(ManifestError):
    code = "SHOAL-244"
