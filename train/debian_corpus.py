#!/usr/bin/env python3
"""Collects documentation and source code from Debian packages, as works of the corpus's form.

    debian_corpus.py --out CORPUS [--cache DEBS]

Downloads the packages of SOURCES with apt-get where DEBS lacks them, takes the files that a source names
and writes CORPUS/train-debian-NN.txt and CORPUS/valid-debian.txt, each file followed by a line with only
<|endoftext|>. The texts are for training only: their licences are those of the packages.
"""
import argparse
import dataclasses
import hashlib
import io
import pathlib
import random
import re
import subprocess
import tarfile
import unicodedata

END_OF_WORK = "<|endoftext|>"
NUM_SHARDS = 6  # files are encoded in parallel
VALID_EVERY = 150
MIN_BYTES, MAX_BYTES = 1500, 120_000  # of a file: what is larger is a table or generated


@dataclasses.dataclass
class Source:
    package: str
    path: str  # regular expression
    max_bytes: int  # of all its files
    inner: str = ""  # archive inside the package that holds the files


SOURCES = [
    Source("python3.11-doc", r"_sources/.*\.rst\.txt$", 9_000_000),
    Source("linux-doc-6.1", r"_sources/.*\.rst\.txt$", 12_000_000),
    Source("git-doc", r"\.txt$", 4_000_000),
    Source("perl-doc", r"/pod/.*\.pod$", 7_000_000),
    Source("libpython3.11-stdlib", r"\.py$", 7_000_000),
    Source("python3-django", r"\.py$", 4_000_000),
    Source("python3-sympy", r"\.py$", 5_000_000),
    Source("golang-1.19-src", r"/src/[a-z]+/.*(?<!_test)\.go$", 9_000_000),
    Source("linux-source-6.1", r"^[^/]+/(kernel|mm|lib|block|ipc|fs/(ext4|btrfs|xfs|proc)|net/(core|ipv4))/.*\.c$",
           13_000_000, inner=r"linux-source-.*\.tar\.xz$"),
]


def download(packages, cache):
    cache.mkdir(parents=True, exist_ok=True)
    missing = [p for p in packages if not list(cache.glob(f"{p}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=cache, check=True)


def members(source, cache):
    """(path, bytes) of every file of the package, or of the archive in it."""
    deb = sorted(cache.glob(f"{source.package}_*.deb"))[-1]
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for item in archive:
            if not item.isfile():
                continue
            if not source.inner:
                if re.search(source.path, item.name):
                    yield item.name, archive.extractfile(item).read()
            elif re.search(source.inner, item.name):
                nested = io.BytesIO(archive.extractfile(item).read())
                with tarfile.open(fileobj=nested, mode="r|xz") as inner:
                    for file in inner:
                        if file.isfile() and re.search(source.path, file.name):
                            yield file.name, inner.extractfile(file).read()
    process.stdout.close()
    process.wait()


def text_of(data):
    """Normalised text, or None for what is no prose or code of a usual size."""
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = unicodedata.normalize("NFC", text).replace("\r", "")
    text = re.sub(r"[ \t]+\n", "\n", text).strip("\n")
    lines = text.split("\n")
    if max(map(len, lines)) > 1000 or sum(c > "\x7f" for c in text) > len(text) // 50:
        return None
    return None if END_OF_WORK in text else text


def collect(source, cache, seen):
    files = sorted(members(source, cache))
    random.Random(source.package).shuffle(files)
    works, size = [], 0
    for path, data in files:
        text = text_of(data)
        digest = hashlib.sha256(data).digest()
        if text is None or digest in seen or size + len(data) > source.max_bytes:
            continue
        seen.add(digest)
        works.append(text)
        size += len(data)
    print(f"{source.package}: {len(works)} of {len(files)} files, {size / 1e6:.1f} MB", flush=True)
    return works


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("debs"))
    args = parser.parse_args()
    download([s.package for s in SOURCES], args.cache)
    seen, works = set(), []
    for source in SOURCES:
        works += collect(source, args.cache, seen)
    random.Random(1).shuffle(works)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"valid-debian": works[::VALID_EVERY]}
    rest = [w for i, w in enumerate(works) if i % VALID_EVERY]
    parts |= {f"train-debian-{n:02d}": rest[n::NUM_SHARDS] for n in range(NUM_SHARDS)}
    for name, texts in parts.items():
        (args.out / f"{name}.txt").write_text("".join(f"{t}\n{END_OF_WORK}\n" for t in texts), encoding="utf-8")
    print(f"{len(rest)} works for training, {len(parts['valid-debian'])} held out")


if __name__ == "__main__":
    main()
