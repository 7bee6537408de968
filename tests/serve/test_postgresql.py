"""What a server keeps, in PostgreSQL by its URL. Skipped where there is no PostgreSQL to start, or no driver."""

import concurrent.futures
import glob
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from perfusion.concept import Concept
from perfusion.serve.concepts import Library, NameTaken, QuotaReached
from perfusion.serve.keys import Keys
from perfusion.serve.state import open_database
from perfusion.serve.store import Store
from tests.stand_in import save_concept

pytestmark = pytest.mark.serve


def program(name):
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


class Cluster:
    """A PostgreSQL of this test alone, on a socket in a folder of its own."""

    def __init__(self, folder):
        # PostgreSQL does not run as root
        self.folder, self.user = Path(folder), {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        self.run("initdb", "--auth=trust", "--username=perfusion", "--encoding=UTF8", "--locale=C", "--no-sync")
        self.url = f"postgresql://perfusion@/postgres?host={folder}"

    def run(self, name, *arguments):
        subprocess.run(
            [program(name), "--pgdata", self.folder / "data", *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, **self.user
        )

    def start(self):
        options = f"-k {self.folder} -c listen_addresses=''"
        self.run("pg_ctl", "--wait", "--timeout=300", "--log", self.folder / "log", "--options", options, "start")

    def stop(self, how="fast"):
        self.run("pg_ctl", "--wait", "--timeout=300", "--mode", how, "stop")


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("psycopg")
    if os.name != "posix" or program("initdb") is None:
        pytest.skip("there is no PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # a socket's path is short
        try:
            found = Cluster(folder)
        except (LookupError, PermissionError):
            pytest.skip("there is no user to run PostgreSQL as")
        found.start()
        yield found
        found.stop("immediate")


@pytest.fixture(scope="module")
def concept(tmp_path_factory):
    path = tmp_path_factory.mktemp("postgresql") / "teddy.safetensors"
    save_concept(path, "teddy")
    return path.read_bytes()


def test_keys_and_concepts(cluster, concept, tmp_path):
    database = open_database(cluster.url)
    keys, library, bases = Keys(database), Library(database, Store(str(tmp_path))), {"toybox": Concept.from_bytes(concept).base}
    key = keys.add("alice", ["draw", "upload"], concepts=2)
    assert keys.find(key).name == "alice" and keys.find(key + "x") is None and key not in str(keys.list())
    with pytest.raises(ValueError, match="there is a key named 'alice' already"):
        keys.add("alice", ["draw"])
    row = library.add("alice", "bear", concept, bases, 2)
    assert library.find("alice", ["bear"]) == {"bear": row} and library.find("bob", ["bear"]) == {}
    with pytest.raises(NameTaken):
        library.add("alice", "bear", concept, bases, 2)
    library.add("alice", "other", concept, bases, 2)
    with pytest.raises(QuotaReached):
        library.add("alice", "third", concept, bases, 2)
    library.sweep([library.remove("alice", "bear")])
    assert library.store.get(row["digest"]) == concept, "another has the same file"
    library.sweep([library.remove("alice", "other")])
    assert library.store.digests() == [] and library.list("alice") == []
    assert keys.revoke("alice") and not keys.any()


def test_servers_of_one_database_begin_together_and_never_share_a_name(cluster, concept, tmp_path):
    """Of four that make the tables and add the same name at once, one has it."""
    import psycopg

    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE shared")
    url = cluster.url.replace("/postgres?", "/shared?")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        databases = list(threads.map(open_database, [url] * 4))
        libraries = [Library(database, Store(str(tmp_path))) for database in databases]
        bases = {"toybox": Concept.from_bytes(concept).base}

        def add(library):
            try:
                return library.add("together", "bear", concept, bases, 9)["name"]
            except NameTaken:
                return None

        assert sorted(map(str, threads.map(add, libraries))) == ["None"] * 3 + ["bear"]
    assert libraries[0].count("together") == 1


def test_a_database_that_dies_comes_back_with_everything(cluster, concept, tmp_path):
    """Ended without a chance to write, as by a power cut; the same server goes on with it."""
    database = open_database(cluster.url)
    keys, library = Keys(database), Library(database, Store(str(tmp_path)))
    key = keys.add("carol", ["draw"])
    row = library.add("carol", "bear", concept, {"toybox": Concept.from_bytes(concept).base}, 9)
    cluster.stop("immediate")
    cluster.start()
    assert keys.find(key).name == "carol" and library.find("carol", ["bear"]) == {"bear": row}


def test_urls_say_what_is_wrong():
    for wrong in ("nonsense", "nodatabase://x"):
        with pytest.raises(ValueError, match=r"cannot be used: .* postgresql://USER:PASSWORD@HOST/NAME"):
            open_database(wrong)
