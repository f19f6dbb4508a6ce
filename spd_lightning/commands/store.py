"""store: describe, verify, compact or copy a harvest."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.commands import options
from spd_lightning.errors import BadInput, command, nearest, shown
from spd_lightning.store.compaction import compact
from spd_lightning.store.inspection import Description, TableSize, describe, findings
from spd_lightning.store.places import Folder, Place, is_address, place_of


def main(argv: Sequence[str]) -> None:
    """Describe, verify, compact or copy a harvest."""
    arguments = options.read("store", argv)
    place = harvest_place(arguments.harvest)
    ACTIONS[arguments.action](place, arguments)


def harvest_place(name: str) -> Place:
    """Return the harvest that a word names: a folder, RUN/HARVEST, or an address.

    Raises:
        BadInput: there is no such harvest; the error suggests the nearest names.
    """
    if is_address(name):
        return place_of(name)
    known = {}
    for run in runs.runs():
        for path in run.harvests:
            known[f"{run.name}/{path.name}"] = path
    if name in known:
        return Folder(known[name])
    of_run = [harvest for harvest in known if harvest.startswith(f"{name}/")]
    if len(of_run) == 1:
        return Folder(known[of_run[0]])
    if of_run:
        names = ", ".join(of_run)
        raise BadInput(f"harvest '{shown(name)}': the run has several; choose from: {names}")
    if (Path(name) / "manifest.json").exists():
        return Folder(Path(name))
    raise BadInput(f"harvest '{shown(name)}': not found; {nearest(name, known)}")


def _info(place: Place, arguments: argparse.Namespace) -> None:
    description = describe(place)
    if arguments.json:
        print(json.dumps(_facts(place, description), indent=1))
        return
    for line in _lines(place, description):
        print(line)


def _facts(place: Place, description: Description) -> dict[str, object]:
    """Return a description as JSON values."""
    return {
        "path": place.name,
        "state": description.state,
        "prompts": description.manifest["prompts"],
        "groups": description.manifest["shards"],
        "files": description.files,
        "bytes": description.bytes,
        "tables": {name: size._asdict() for name, size in description.sizes.items()},
    }


STATES = {
    "complete": "complete",
    "in progress": "in progress: a process is writing it, and more rows will follow",
    "incomplete": "incomplete: run the same predict command again to resume",
}


def _lines(place: Place, description: Description) -> Iterator[str]:
    """Yield the lines of a description."""
    manifest = description.manifest
    yield f"{place.name}: {STATES[description.state]}"
    yield (
        f"{manifest['prompts']:,} prompts in {manifest['shards']:,} groups; "
        f"{description.files:,} files, {_megabytes(description.bytes)}"
    )
    if not description.sizes:
        return
    width = max(len(name) for name in description.sizes)
    yield ""
    yield f"{'table':<{width}} {'rows':>14} {'size':>12} {'bytes per row':>14}"
    for name, size in description.sizes.items():
        per_row = f"{size.bytes / size.rows:.2f}" if size.rows else ""
        yield f"{name:<{width}} {size.rows:>14,} {_megabytes(size.bytes):>12} {per_row:>14}"
    edges = description.sizes.get("edges", TableSize(0, 0, 0))
    if edges.rows:
        whole = description.bytes / edges.rows
        yield ""
        yield (
            f"{edges.bytes / edges.rows:.2f} bytes per edge; {whole:.2f} with all other tables "
            "and the indices"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _verify(place: Place, arguments: argparse.Namespace) -> None:
    """Compare every file with its digest.

    Raises:
        BadInput: files are damaged.
    """
    found = list(findings(place))
    damaged = [finding for finding in found if finding is not None]
    if arguments.json:
        facts = {"files": len(found), "damaged": {f.file: f.why for f in damaged}}
        print(json.dumps(facts, indent=1))
    else:
        print(f"{place.name}: {STATES[describe(place).state]}")
        print(f"{len(found) - len(damaged):,} of {len(found):,} files are intact")
    if not damaged:
        return
    named = "; ".join(f"{finding.file} ({finding.why})" for finding in damaged[:5])
    more = f"; and {len(damaged) - 5:,} more" if len(damaged) > 5 else ""
    raise BadInput(
        f"harvest '{place.name}': {len(damaged):,} of {len(found):,} files are damaged: "
        f"{named}{more}; the rest is readable with Store(path, skip_damaged=True); to repair the "
        "harvest, run the same predict command again"
    )


def _compact(place: Place, arguments: argparse.Namespace) -> None:
    """Merge small groups into large ones.

    Raises:
        BadInput: the harvest is being written or is damaged, or the disk is full.
    """
    if not isinstance(place, Folder):
        raise BadInput(
            f"harvest '{place.name}': only harvests on this machine are compacted; compact the "
            "original, and push it again"
        )
    done = compact(place.path)
    if arguments.json:
        print(json.dumps(done._asdict(), indent=1))
        return
    if done.groups == done.groups_before:
        print(f"{place.name}: its {done.groups:,} groups are as large as they get")
    else:
        print(
            f"{place.name}: {done.groups_before:,} groups in {done.files_before:,} files became "
            f"{done.groups:,} in {done.files:,}"
        )
    if done.kept_for_readers:
        again = command(f"store compact {arguments.harvest}")
        print(
            f"{done.kept_for_readers:,} old files stay while readers need them; to delete them "
            f"later: {again}"
        )


def _push(place: Place, arguments: argparse.Namespace) -> None:
    """Copy a harvest to an object store.

    Raises:
        BadInput: the address is missing, a file is damaged, or the store rejects the request.
    """
    from spd_lightning.store.remote import Bucket, push

    address = arguments.to
    if address is None or not is_address(address):
        given = "" if address is None else f" '{shown(address)}'"
        raise BadInput(
            f"store: --to{given}: push needs an address; for example: --to s3://bucket/run/graphs"
        )
    if not isinstance(place, Folder):
        raise BadInput(f"harvest '{place.name}': only harvests on this machine can be pushed")
    bucket = Bucket(address)
    done = push(place.path, bucket)
    if arguments.json:
        print(json.dumps(done._asdict(), indent=1))
        return
    known = f"; {done.known:,} were there already" if done.known else ""
    print(f"{place.name}: sent {done.files:,} files ({_megabytes(done.bytes)}){known}")
    print(f"copy: {bucket.name}    read it: Store('{bucket.name}')")


Action = Callable[[Place, argparse.Namespace], None]
ACTIONS: dict[str, Action] = {"info": _info, "verify": _verify, "compact": _compact, "push": _push}
