"""Where bundles and artifacts live, and what makes them valid. Needs no torch."""

from piecework.store.bundle import Bundle, open_bundle, write_bundle
from piecework.store.directory_store import DirectoryStore
from piecework.store.facts import (
    Difference,
    Fact,
    check,
    config_fact,
    environment_facts,
    option_facts,
    require,
    source_facts,
)
from piecework.store.lookup import find_artifact, find_bundle
from piecework.store.manifest import FileEntry, Manifest
from piecework.store.stores import Artifact, BundleContent, Kind, MemoryStore, Store, StoredItem

__all__ = [
    "Artifact",
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
    "config_fact",
    "environment_facts",
    "find_artifact",
    "find_bundle",
    "open_bundle",
    "option_facts",
    "require",
    "source_facts",
    "write_bundle",
]
