"""What a compile leaves: its format, the facts that it holds under, and where it lives. Needs no torch."""

from piecework.bundle.bundle import Bundle, BundleContent, open_bundle, write_bundle
from piecework.bundle.facts import (
    Asked,
    Difference,
    Fact,
    check,
    config_facts,
    environment_facts,
    option_facts,
    require,
    source_facts,
)
from piecework.bundle.manifest import FileEntry, Manifest
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Artifact, Kind, MemoryStore, Store, StoredItem
from piecework.bundle.store.lookup import find_artifact, find_bundle

__all__ = [
    "Artifact",
    "Asked",
    "Bundle",
    "BundleContent",
    "Difference",
    "DirectoryStore",
    "Fact",
    "FileEntry",
    "Kind",
    "Manifest",
    "MemoryStore",
    "Store",
    "StoredItem",
    "check",
    "config_facts",
    "environment_facts",
    "find_artifact",
    "find_bundle",
    "open_bundle",
    "option_facts",
    "require",
    "source_facts",
    "write_bundle",
]
