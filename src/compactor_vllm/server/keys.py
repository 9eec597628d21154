"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from compactor_vllm.errors import ConfigError

ENVIRONMENT = "COMPACTOR_API_KEYS"
"""Variable with `name:key` entries, separated by commas or line ends."""


class KeyRing:
    """Names and digests of keys; the keys themselves are not kept.

    Args:
        keys: name -> key.
    """

    def __init__(self, keys: Mapping[str, str] | None = None):
        self._digests = {name: _digest(key) for name, key in (keys or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing({len(self._digests)} keys)"

    def owner(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header, or None. Takes the same time whichever key it is."""
        scheme, _, key = authorization.partition(" ")
        digest, found = _digest(key.strip()), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == "bearer" else None

    @classmethod
    def load(cls, file: Path | None, environment: Mapping[str, str]) -> KeyRing:
        """The keys of a file (a line each; "#" begins a comment) and of `COMPACTOR_API_KEYS`.

        Raises:
            ConfigError: the file cannot be read, or an entry is malformed or given twice. No message shows a key.
        """
        keys: dict[str, str] = {}
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--api-key-file {file} cannot be read: {type(error).__name__}") from None
            entries = [(f"{file}, line {number}", line) for number, line in enumerate(lines, 1)]
            _add(keys, [(place, line) for place, line in entries if not line.lstrip().startswith("#")])
            if not keys:
                raise ConfigError(f"--api-key-file {file} holds no key")
        entries = [
            (f"{ENVIRONMENT}, entry {number}", entry)
            for number, entry in enumerate(re.split(r"[,\n]", environment.get(ENVIRONMENT, "")), 1)
        ]
        _add(keys, entries)
        return cls(keys)


def _add(keys: dict[str, str], entries: list[tuple[str, str]]) -> None:
    for place, entry in entries:
        if not entry.strip():
            continue
        name, colon, key = (part.strip() for part in entry.partition(":"))
        if not colon or not name or not key or re.search(r"\s", key):
            raise ConfigError(f"{place}: an entry is name:key, and a key has no spaces")
        if name in keys:
            raise ConfigError(f"{place}: the name {name!r} is given twice")
        keys[name] = key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
