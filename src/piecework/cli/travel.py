"""`piecework store show | export | import | push | pull | keygen | sign`: bundles that travel, and who signed them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from piecework.cli import console
from piecework.errors import StoreError
from piecework.foundation.environment import Environment

if TYPE_CHECKING:
    from piecework.bundle.bundle import Bundle
    from piecework.bundle.signatures import Trust
    from piecework.bundle.store.interface import Store
    from piecework.bundle.store.remote import Remote

COMMANDS: Final = ("show", "export", "import", "push", "pull", "keygen", "sign")
_URL_HELP: Final = "s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH, oci://HOST/NAME or oci://HOST/NAME:TAG"


def add_parsers(commands: Any) -> Sequence[argparse.ArgumentParser]:
    """Register the commands and return their parsers."""
    key_help = "as `store ls` shows it, or its beginning"
    show = commands.add_parser("show", help="show what a bundle is of, its facts, files and signatures")
    show.add_argument("key", metavar="KEY", help=key_help)
    export = commands.add_parser("export", help="write a bundle to a file")
    export.add_argument("key", metavar="KEY", help=key_help)
    export.add_argument("file", type=Path, metavar="FILE", help="an archive if it ends in .pwb, else a directory")
    bring = commands.add_parser("import", help="put a bundle from a file or directory into the store")
    bring.add_argument("file", type=Path, metavar="FILE", help="an archive or a directory")
    push = commands.add_parser("push", help="put bundles where other machines find them")
    push.add_argument("url", metavar="URL", help=_URL_HELP)
    push.add_argument("keys", nargs="*", metavar="KEY", help="which (default: all)")
    pull = commands.add_parser("pull", help="get bundles from there")
    pull.add_argument("url", metavar="URL", help=_URL_HELP)
    pull.add_argument("keys", nargs="*", metavar="KEY", help="which (default: all)")
    for one in (bring, pull):
        one.add_argument(
            "--trust",
            type=Path,
            metavar="FILE",
            help="take only what is signed with a key of it, or of the default one with "
            "`require` (or $PIECEWORK_TRUST)",
        )
    make = commands.add_parser("keygen", help="make a key to sign with, and beside it FILE.pub, the key to trust")
    make.add_argument("file", type=Path, metavar="FILE", help="where to")
    sign = commands.add_parser("sign", help="sign a bundle")
    sign.add_argument("bundle", metavar="KEY|PATH", help="a bundle of the store, or an archive or a directory")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="made by `store keygen`")
    return show, export, bring, push, pull, make, sign


def run(args: argparse.Namespace, *, store: Store, environment: Environment) -> int:
    """Do it, and return the exit code. Raises StoreError, BundleError."""
    answer = _answer(args, store=store, environment=environment)
    if args.json:
        console.out_json({name: value for name, value in answer.items() if name != "lines"})
    elif args.store_command == "show":
        _show(answer)
    else:
        console.out("\n".join(answer["lines"]) or "nothing")
    return 0


def _answer(args: argparse.Namespace, *, store: Store, environment: Environment) -> dict[str, Any]:
    """Do what is asked for and return what `--json` prints, and "lines" for people."""
    match args.store_command:
        case "show":
            key = _one(store, args.key)
            return _described(_stored(store, key), key=key, store=store)
        case "export":
            from piecework.bundle.bundle import copy_bundle  # noqa: PLC0415  `piecework --help` must not pay for these

            key = _one(store, args.key)
            copy_bundle(_stored(store, key), to=args.file)
            return {"key": key, "file": str(args.file), "lines": [str(args.file)]}
        case "import":
            from piecework.bundle.store.travel import import_bundle  # noqa: PLC0415

            arrived = import_bundle(args.file, store=store, trust=_trust(args, store=store, environment=environment))
            word = "imported" if arrived.fresh else "was there already"
            return {"key": arrived.key, "fresh": arrived.fresh, "lines": [f"{arrived.key} {word}"]}
        case "push" | "pull":
            return _travel(args, store=store, environment=environment)
        case "keygen":
            from piecework.bundle.signatures import make_key  # noqa: PLC0415

            public = make_key(args.file)
            return {"file": str(args.file), "public_key": public, "lines": [f"{public}  (in {args.file}.pub)"]}
        case _:
            return _sign(args, store=store)


def _travel(args: argparse.Namespace, *, store: Store, environment: Environment) -> dict[str, Any]:
    from piecework.bundle.store.travel import open_remote, pull  # noqa: PLC0415

    with open_remote(args.url) as remote:
        if args.store_command == "push":
            done = _push(remote, args.keys, store=store)
        else:
            there, trust = remote.keys(), _trust(args, store=store, environment=environment)
            if not there:
                raise StoreError(asked=f"pull from {remote.url}", found="no bundle there", try_="another address")
            keys = [_chosen(there, beginning, where=remote.url) for beginning in args.keys] or there
            done = [{"key": key, "fresh": pull(remote, key, store=store, trust=trust).fresh} for key in keys]
    words = [f"{args.store_command}ed" if one["fresh"] else "was there already" for one in done]
    lines = [f"{one['key']} {word}" for one, word in zip(done, words, strict=True)]
    return {"url": args.url, "bundles": done, "lines": lines}


def _push(remote: Remote, beginnings: Sequence[str], *, store: Store) -> list[dict[str, Any]]:
    from piecework.bundle.store.travel import push  # noqa: PLC0415

    keys = [_one(store, beginning) for beginning in beginnings] or _keys(store)
    if remote.holds_one and len(keys) > 1:
        raise StoreError(
            asked=f"push {len(keys)} bundles to {remote.url}",
            found="an address for one bundle",
            try_="give one KEY, or an address without a tag",
        )
    return [{"key": key, "fresh": push(remote, key, store=store)} for key in keys]


def _sign(args: argparse.Namespace, *, store: Store) -> dict[str, Any]:
    from piecework.bundle.bundle import copy_bundle, open_bundle  # noqa: PLC0415
    from piecework.bundle.signatures import Head, add_signature, read_key  # noqa: PLC0415

    signer, path = read_key(args.key), Path(args.bundle)
    with store.scratch() as scratch:
        key = None if path.exists() else _one(store, args.bundle)
        bundle = open_bundle(path, extract_root=scratch) if key is None else _stored(store, key)
        head = bundle.head()
        signatures = add_signature(head, signer, bundle=args.bundle)
        if key is None:
            copy_bundle(bundle, to=path, head=Head(head.manifest, signatures))
        else:
            store.put_signatures(key, content=signatures)
    public = signer.public_key().public_bytes_raw().hex()
    return {"bundle": args.bundle, "public_key": public, "lines": [f"signed with {public}"]}


def _trust(args: argparse.Namespace, *, store: Store, environment: Environment) -> Trust | None:
    from piecework.bundle.signatures import read_trust  # noqa: PLC0415

    return read_trust(environment.keys_file(args.trust), is_own=store.made_here)


def _described(bundle: Bundle, *, key: str, store: Store) -> dict[str, Any]:
    from piecework.bundle.signatures import parse_signatures  # noqa: PLC0415

    signed = parse_signatures(bundle.head().signatures, bundle=str(bundle.path))
    return {
        "key": key,
        "path": str(bundle.path),
        "digest": bundle.digest,
        "made_here": store.made_here(bundle.digest),
        "identity": bundle.identity,
        "facts": [fact.to_json() for fact in bundle.facts],
        "files": {name: {"sha256": entry.sha256, "bytes": entry.size} for name, entry in bundle.manifest.files.items()},
        "signed_by": [one.key for one in signed],
    }


def _show(answer: dict[str, Any]) -> None:
    rows = [[name, str(answer[name])] for name in ("key", "path", "digest", "made_here")]
    rows += [[name, str(value)] for name, value in answer["identity"].items()]
    rows += [["signed by", key] for key in answer["signed_by"]] or [["signed by", "nobody"]]
    console.out(console.format_table(rows))
    console.out()
    files = [[name, f"{entry['bytes'] / 2**20:.2f} MiB"] for name, entry in answer["files"].items()]
    console.out(console.format_table(files, header=["file", "size"]))
    console.out()
    facts = [[kind, name, str(value)] for kind, name, value in answer["facts"]]
    console.out(console.format_table(facts, header=["fact", "name", "value"]))


def _stored(store: Store, key: str) -> Bundle:
    bundle = store.get_bundle(key)
    if bundle is None:
        raise StoreError(asked=f"the bundle {key}", found="it has gone from the store", try_="`piecework store ls`")
    return bundle


def _keys(store: Store) -> list[str]:
    return [item.key for item in store.items() if item.kind.value == "bundle" and not item.aside]


def _one(store: Store, beginning: str) -> str:
    return _chosen(_keys(store), beginning, where="the store")


def _chosen(keys: Sequence[str], beginning: str, *, where: str) -> str:
    """Return the one key that starts so. Raises StoreError where there is none, or several."""
    found = [key for key in keys if key.startswith(beginning)]
    if len(found) == 1 or beginning in found:
        return beginning if beginning in found else found[0]
    several = f"{len(found)} bundles whose keys start so: {', '.join(found[:4])}"
    raise StoreError(
        asked=f"the bundle {beginning}",
        found=f"{several if found else 'no such bundle'} in {where}",
        try_="give more of its key" if found else "another key, or the path of something that exists",
    )
