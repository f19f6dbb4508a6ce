"""Object stores: a harvest is read where it lies, and every request that fails is one line.

The S3 server is moto's, which this file starts; nothing leaves the machine.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from test_store_compaction import same, tables, with_sums
from test_store_scale import SETTINGS, check_components, check_prompts, check_search, harvest

from spd_lightning import cli
from spd_lightning.errors import BadInput
from spd_lightning.store import SCHEMA_VERSION, Store, Writer
from spd_lightning.store.compaction import compact
from spd_lightning.store.remote import Bucket, push

SECRET = "an-example-of-a-secret"
KEY = "AKIAEXAMPLEKEY"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server that lives as long as this module."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server, monkeypatch) -> str:
    """The address of an empty bucket."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid4().hex[:8]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


def copied(path: Path, address: str) -> Store:
    """Push a harvest, and open the copy."""
    push(path, Bucket(address))
    return Store(address)


@pytest.fixture(params=["s3", "memory", "file"])
def address(request, tmp_path) -> str:
    """Addresses of three protocols."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/run/graphs"
    if request.param == "memory":
        return f"memory://{uuid4().hex}/graphs"
    return f"file://{tmp_path}/copy/graphs"


def test_a_copy_has_the_rows_of_the_harvest(tmp_path, address):
    store = with_sums(tmp_path / "graphs", [3] * 4)
    copy = copied(store.path, address)
    assert copy.manifest == store.manifest
    assert same(tables(copy), tables(store))
    check_prompts(copy)
    check_components(copy)
    check_search(copy, [("a", 1), ("b", 2)], "all", 0.3)
    copy.check()


def test_only_the_blocks_of_a_prompt_are_read(tmp_path, s3, monkeypatch):
    """Opening reads no shard; a prompt reads its group's index and some blocks of one file."""
    store = harvest(tmp_path / "graphs", [4] * 3)
    copied(store.path, f"{s3}/graphs")
    prompt_id = int(store.scan("prompts").collect()["prompt_id"][5])
    seen = set[str]()
    for name in ("read", "read_range"):
        method = getattr(Bucket, name)

        def watched(place, file, *rest, method=method):
            seen.add(file)
            return method(place, file, *rest)

        monkeypatch.setattr(Bucket, name, watched)
    copy = Store(f"{s3}/graphs")
    assert not [file for file in seen if "/" in file]
    assert copy.scan("edges", prompt_id).collect().height
    assert {file for file in seen if "/" in file} == {
        "index/part-0-1.safetensors",
        "edges/part-0-1.parquet",
    }


def test_a_push_sends_what_is_new(tmp_path, s3):
    path = tmp_path / "graphs"
    harvest(path, [2] * 3)
    address = f"{s3}/graphs"
    first = push(path, Bucket(address))
    assert first.known == 0
    assert first.files == len(list(path.glob("*/*")))
    assert push(path, Bucket(address)) == (0, 0, first.files)
    writer = Writer(path, SETTINGS)
    from test_store_scale import batch, np

    writer.write(batch(np.random.default_rng(5), [1, 2]))
    second = push(path, Bucket(address))  # while it is being written
    assert second.known == first.files
    assert Store(address).manifest["prompts"] == 8
    assert not Store(address).manifest["complete"]
    writer.complete()
    compact(path)
    push(path, Bucket(address))
    copy = Store(address)
    assert copy.manifest["complete"]
    assert copy.manifest["shards"] == 1
    check_prompts(copy)


def test_a_copy_that_is_fetched_again_resumes(tmp_path, s3):
    """Other tools can copy the files back; the folder is a harvest like any other."""
    store = harvest(tmp_path / "graphs", [2] * 3)
    copied(store.path, f"{s3}/graphs")
    system, root = fsspec.url_to_fs(f"{s3}/graphs", skip_instance_cache=True)
    system.get(root, str(tmp_path / "back"), recursive=True)
    back = Store(tmp_path / "back")
    assert back.scan("edges").collect().equals(store.scan("edges").collect())
    assert len(Writer(tmp_path / "back", SETTINGS).finished) == 6


# ---- errors --------------------------------------------------------------------------------------


def line_of(capsys, *words: str) -> str:
    """Run the verb, which fails with one line that names no credentials; return the line."""
    capsys.readouterr()
    assert cli.run(["store", *words]) == 2
    out = capsys.readouterr()
    (line,) = out.err.splitlines()
    assert line.startswith("error: ")
    assert SECRET not in line + out.out
    assert KEY not in line + out.out
    return line


def test_the_verb_pushes_describes_and_verifies(tmp_path, s3, capsys):
    harvest(tmp_path / "graphs", [2] * 3)
    address = f"{s3}/graphs"
    words = ["push", str(tmp_path / "graphs"), "--to", address]
    assert cli.run(["store", *words]) == 0
    assert f"copy: {address}" in capsys.readouterr().out
    assert cli.run(["store", "info", address]) == 0
    assert "6 prompts in 3 groups" in capsys.readouterr().out
    assert cli.run(["store", "verify", address]) == 0
    assert "files are intact" in capsys.readouterr().out
    assert "only harvests on this machine" in line_of(capsys, "compact", address)
    assert "only harvests on this machine" in line_of(capsys, "push", address, "--to", address)
    assert "push needs an address" in line_of(capsys, *words[:2])
    assert "push needs an address" in line_of(capsys, *words[:2], "--to", "bucket/graphs")


def test_no_harvest_no_bucket_no_protocol(tmp_path, s3, capsys):
    harvest(tmp_path / "graphs", [1])
    assert "manifest.json not found" in line_of(capsys, "info", f"{s3}/nothing")
    missing = line_of(capsys, "push", str(tmp_path / "graphs"), "--to", "s3://no-such-bucket/x")
    assert "object store 's3://no-such-bucket/x': its bucket does not exist" in missing
    assert "did you mean 's3'?" in line_of(capsys, "info", "s33://bucket/graphs")
    assert "address 's3://': it names no bucket" in line_of(capsys, "info", "s3:///graphs")


def test_a_password_in_an_address_is_not_accepted_and_not_shown(capsys):
    line = line_of(capsys, "info", f"s3://{KEY}:{SECRET}@bucket/graphs")
    assert "it contains a password" in line


@pytest.mark.parametrize("status", [403, 500])
def test_a_store_that_rejects_the_request(tmp_path, s3, capsys, monkeypatch, status):
    """A server that answers every request with an error."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Rejecting(BaseHTTPRequestHandler):
        def answer(self):
            body = (
                f"<Error><Code>AccessDenied</Code><Message>no {SECRET} {KEY}</Message></Error>"
            ).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Rejecting)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        harvest(tmp_path / "graphs", [1])
        for words in (["info", "s3://bucket/x"],
                      ["push", str(tmp_path / "graphs"), "--to", "s3://bucket/x"]):  # fmt: skip
            assert "it rejected the request" in line_of(capsys, *words)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_damaged_copy_is_named_and_the_rest_is_shown(tmp_path, s3, capsys, harm):
    store = harvest(tmp_path / "graphs", [2] * 2)
    prompts = store.scan("prompts").collect()["prompt_id"].to_list()
    address = f"{s3}/graphs"
    copied(store.path, address)
    system, root = fsspec.url_to_fs(address, skip_instance_cache=True)
    path = f"{root}/edges/part-0-0.parquet"
    content = system.cat_file(path)
    if harm == "missing":
        system.rm_file(path)
    elif harm == "truncated":
        system.pipe_file(path, content[:-5])
    else:
        system.pipe_file(path, content[:30] + bytes([content[30] ^ 1]) + content[31:])
    copy = Store(address)
    for scan in (lambda: copy.scan("edges"), lambda: copy.scan("edges", prompts[0])):
        with pytest.raises(BadInput, match=r"edges/part-0-0\.parquet is damaged"):
            scan()
    assert copy.scan("edges", prompts[2]).collect().height
    assert "edges/part-0-0.parquet" in line_of(capsys, "verify", address)


def test_another_harvest_or_schema_at_the_address(tmp_path, s3, capsys):
    harvest(tmp_path / "graphs", [1])
    address = f"{s3}/graphs"
    copied(tmp_path / "graphs", address)
    Writer(tmp_path / "other", SETTINGS | {"threshold": 0.5}).complete()
    with pytest.raises(BadInput, match="another harvest, made with another 'threshold'"):
        push(tmp_path / "other", Bucket(address))
    system, root = fsspec.url_to_fs(address, skip_instance_cache=True)
    newer = SETTINGS | {"schema_version": SCHEMA_VERSION + 1}
    system.pipe_file(f"{root}/manifest.json", json.dumps(newer).encode())
    assert "update spd_lightning" in line_of(capsys, "info", address)


def test_a_damaged_harvest_is_not_pushed(tmp_path, s3):
    harvest(tmp_path / "graphs", [2] * 2)
    path = tmp_path / "graphs/nodes/part-0-1.parquet"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadInput, match=r"nodes/part-0-1\.parquet is damaged"):
        push(tmp_path / "graphs", Bucket(f"{s3}/graphs"))
    with pytest.raises(BadInput, match=r"manifest\.json not found"):
        Store(f"{s3}/graphs")
