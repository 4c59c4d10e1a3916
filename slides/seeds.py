"""Seeds that are the same in every process and on every machine."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: int | str) -> int:
    """Return a 128-bit seed from numbers and names, the same in every process (unlike `hash`)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
