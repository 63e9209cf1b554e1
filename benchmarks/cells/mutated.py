"""Load and run bundles that were changed at random, one after the other; a line of JSON for each.

    python -m benchmarks.cells.mutated DIRECTORY KIND FIRST COUNT

A process of its own, because what is tried here may end it.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from benchmarks.common.mutations import mutated
from benchmarks.common.reference import Reference
from benchmarks.common.sample_bundles import SAMPLES, Sample
from piecework.bundle.bundle import Bundle
from piecework.bundle.format import CONSTANTS, PLAN
from piecework.bundle.manifest import FileEntry, Manifest, parse_manifest
from piecework.bundle.plan import Plan
from piecework.bundle.run import load
from piecework.errors import PieceworkError
from piecework.foundation.digests import canonical_json, digest_bytes, digest_json
from piecework.ops.ir.program import Program
from piecework.spec.compile_options import BackendName

_MEMORY_BYTES: Final = 24 << 30  # of addresses, of which torch takes many


@dataclass(frozen=True)
class Changed:
    """A bundle that was changed: its files' contents, and what was done."""

    plan: Any
    artifacts: Mapping[str, bytes]
    constants: bytes | None
    facts: Any
    done: list[str]


@final
class Mutator:
    """Changes the sample of a kind, writes it and runs it.

    Args:
        sample: the bundle as it was compiled.
        twin: the same of the eager backend, whose programs say what pieces mean.
        place: a directory to write to.
    """

    def __init__(self, sample: Sample, twin: Sample, *, place: Path) -> None:
        self._sample = sample
        self._place = place
        bundle = sample.bundle
        self._plan = bundle.plan()
        self._artifacts = {name: bundle.artifact_path(name).read_bytes() for name in bundle.artifacts}
        self._twins = dict(_programs({n: twin.bundle.artifact_path(n).read_bytes() for n in twin.bundle.artifacts}))
        self._constants = bundle.constants()
        self._right = sample.run(sample.load())
        (place / "artifacts").mkdir(parents=True, exist_ok=True)
        for name, data in self._artifacts.items():
            (place / "artifacts" / name).write_bytes(data)

    def outcome(self, number: int) -> dict[str, Any]:
        """Change the sample in the `number`-th way; returns what became of it."""
        changed = self._changed(random.Random(number))
        try:
            bundle = self._written(changed)
            model = load(bundle, weights=self._sample.weights, check_facts=bool(changed.facts != self._facts()))
            found = self._sample.run(model)
        except PieceworkError as error:
            return {"outcome": "refused", "by": type(error).__name__, "done": changed.done}
        except UnicodeEncodeError:  # no file can hold it
            return {"outcome": "refused", "by": "no JSON", "done": changed.done}
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:160]}"
            return {"outcome": "foreign", "error": said, "done": changed.done}
        if _same(found, self._right, exactly=True):
            return {"outcome": "same", "done": changed.done}
        return {"outcome": self._compared(changed, found), "done": changed.done}

    def _facts(self) -> Any:
        return [fact.to_json() for fact in self._sample.bundle.facts]

    def _compared(self, changed: Changed, found: list[Tensor]) -> str:
        """Compare results that are others than the original's with what the plan means."""
        programs = {**self._twins, **dict(_programs(changed.artifacts))}
        literals = load_bytes(changed.constants) if changed.constants else {}
        try:
            plan = Plan.from_json(changed.plan)
            reference: Any = Reference(plan, programs, weights=self._sample.weights, literals=literals)
            with torch.no_grad():
                meant = self._sample.run_reference(reference)
        except Exception as error:
            return f"wrong: no meaning, {type(error).__name__} {str(error)[:120]}"
        return "another model" if _same(found, meant, exactly=False) else "wrong"

    def _changed(self, chosen: random.Random) -> Changed:
        what = chosen.random()
        whole = Changed(self._plan, self._artifacts, self._constants, self._facts(), [])
        if what < 0.06 and len(self._artifacts) > 1:
            return self._exchanged(whole, chosen)
        if what < 0.18 and any(name.endswith(".json") for name in self._artifacts):
            return self._other_artifact(whole, chosen)
        if what < 0.22 and self._constants:
            return self._other_constants(whole, chosen)
        if what < 0.24:
            facts, done = mutated(whole.facts, chosen)
            return replace(whole, facts=facts, done=[f"facts: {text}" for text in done])
        plan, done = mutated(self._plan, chosen)
        return replace(whole, plan=plan, done=done)

    def _exchanged(self, whole: Changed, chosen: random.Random) -> Changed:
        one, other = chosen.sample(sorted(self._artifacts), 2)
        text = json.dumps(self._plan).replace(one, "?").replace(other, one).replace("?", other)
        return replace(whole, plan=json.loads(text), done=["exchange artifacts"])

    def _other_artifact(self, whole: Changed, chosen: random.Random) -> Changed:
        """Change a program of the eager backend; sometimes all that says what it is, too."""
        name = chosen.choice(sorted(n for n in self._artifacts if n.endswith(".json")))
        before = json.loads(self._artifacts[name])
        data, done = mutated(before, chosen)
        plan = self._plan
        try:
            if chosen.random() < 0.8:
                data["interface"]["program"] = digest_json(data["program"])
                if chosen.random() < 0.9:
                    for part in ("symbols", "inputs", "constants"):
                        data["interface"][part] = data["program"][part]
                    text = json.dumps(plan).replace(before["interface"]["program"], data["interface"]["program"])
                    plan = json.loads(text)
        except (KeyError, TypeError, ValueError):
            pass
        content = canonical_json(data)
        made = f"{digest_bytes(content)}.json"
        artifacts = {n: d for n, d in self._artifacts.items() if n != name} | {made: content}
        plan = json.loads(json.dumps(plan).replace(name, made))
        return replace(whole, plan=plan, artifacts=artifacts, done=[f"artifact: {text}" for text in done])

    @staticmethod
    def _other_constants(whole: Changed, chosen: random.Random) -> Changed:
        data = bytearray(whole.constants or b"")
        for _ in range(chosen.choice((1, 2, 8))):
            at = chosen.randrange(len(data))
            data[at] = chosen.randrange(256)
        end = len(data) if chosen.random() < 0.8 else chosen.randrange(len(data))
        return replace(whole, constants=bytes(data[:end]), done=["constants"])

    def _written(self, changed: Changed) -> Bundle:
        """Write what was changed, with digests that hold."""
        files = {f"artifacts/{name}": data for name, data in changed.artifacts.items()}
        files[PLAN] = json.dumps(changed.plan, sort_keys=True).encode()
        files["record.json"] = b"{}"
        if changed.constants is not None:
            files[CONSTANTS] = changed.constants
        before = self._sample.bundle.manifest
        entries = {name: FileEntry(digest_bytes(data), len(data)) for name, data in files.items()}
        for name, data in files.items():
            if not (name.startswith("artifacts/") and Path(name).name in self._artifacts):
                (self._place / name).write_bytes(data)
        text = json.loads(Manifest(before.facts, entries, before.identity).to_bytes())
        text = {**text, "facts": changed.facts}
        text["digest"] = digest_json({key: value for key, value in text.items() if key != "digest"})
        data = json.dumps(text, sort_keys=True, indent=1).encode("ascii") + b"\n"
        manifest = parse_manifest(data, bundle="mutated")
        return Bundle(path=self._place, root=self._place, manifest=manifest, digest=digest_bytes(data))


def _programs(artifacts: Mapping[str, bytes]) -> list[tuple[str, Program]]:
    found = []
    for name, data in artifacts.items():
        if name.endswith(".json"):
            value = copy.deepcopy(json.loads(data))
            found.append((str(value["interface"]["program"]), Program.from_json(value["program"])))
    return found


def _same(found: list[Tensor], other: list[Tensor], *, exactly: bool) -> bool:
    if len(found) != len(other):
        return False
    for a, b in zip(found, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not (torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)):
            return False
    return True


def main() -> None:
    """Be the process."""
    directory, kind, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    torch.set_num_threads(1)
    name, backend = kind.split("-")
    sample = SAMPLES[name](directory, BackendName(backend))
    twin = sample if backend == "eager" else SAMPLES[name](directory, BackendName.EAGER)
    mutator = Mutator(sample, twin, place=directory / f"mutated-{kind}-{first}")
    for number in range(first, first + count):
        print(json.dumps({"number": number, **mutator.outcome(number)}), flush=True)


if __name__ == "__main__":
    main()
