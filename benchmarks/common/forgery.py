"""Bundles that lie: parts of one are exchanged, and all digests are computed anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from piecework.bundle.bundle import Bundle, BundleContent, write_bundle
from piecework.foundation.digests import digest_bytes


def content_of(bundle: Bundle) -> BundleContent:
    """Return what a bundle is made of."""
    return BundleContent(
        plan=bundle.plan(),
        artifacts={name: bundle.artifact_path(name) for name in bundle.artifacts},
        facts=bundle.facts,
        record=bundle.record(),
        constants=bundle.constants(),
        identity=bundle.identity,
        explanation=bundle.explanation(),
    )


def forge(bundle: Bundle, to: Path, **parts: Any) -> Path:
    """Write a bundle with other parts (fields of BundleContent) to a new path, which is returned."""
    return write_bundle(to, replace(content_of(bundle), **parts)).path


def forge_artifact(bundle: Bundle, to: Path, name: str, data: bytes) -> Path:
    """Write a bundle in which an artifact has another content: it is named by that in the plan too."""
    to.parent.mkdir(parents=True, exist_ok=True)
    made = f"{digest_bytes(data)}{Path(name).suffix}"
    place = to.parent / made
    place.write_bytes(data)
    content = content_of(bundle)
    artifacts: Mapping[str, Path] = {n: path for n, path in content.artifacts.items() if n != name} | {made: place}
    plan = json.loads(json.dumps(content.plan).replace(name, made))
    return write_bundle(to, replace(content, plan=plan, artifacts=artifacts)).path
