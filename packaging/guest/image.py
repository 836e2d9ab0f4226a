"""Makes the guest: image.py PACKAGES MODULES DIRECTORY.

PACKAGES has the Debian packages it is made of (`fetch`), MODULES has cc_proxy and msgspec for Python 3.11.
DIRECTORY gets the kernel, the initramfs, a list of what they consist of (SPDX), the licences of all that, and
the sources as a package's Built-Using has them.
The same bytes come out every time: no clock, no user and no file system of this machine has a say in them.
Needs dpkg-deb and no rights. Runs programs of the guest, so it needs a machine of its kind, amd64.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).parent
PYTHON = "usr/lib/python3.11"

#: Of the kernel's modules: what the init script loads.
MODULES = (
    "drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci", "drivers/virtio/virtio_mmio",
    "drivers/char/virtio_console", "fs/fuse/fuse", "fs/fuse/virtiofs",
)  # fmt: skip
#: What nobody needs in there, or what would need libraries that are not.
LEFT_OUT = (
    "etc/*", "usr/share/*", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/audit",
    *(f"{PYTHON}/{name}" for name in (
        "__pycache__", "_pyrepl", "config-*", "curses", "dbm", "encodings/cp[0-9]*", "encodings/mac_*",
        "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "test", "tkinter", "turtle*", "unittest",
        "venv", "*/*.pyi",
    )),
    *(f"{PYTHON}/lib-dynload/{name}.*" for name in (
        "*test*", "_bz2", "_codecs_*", "_crypt", "_curses*", "_dbm", "_hashlib", "_lzma", "_sqlite3", "_ssl",
        "_uuid", "nis", "ossaudiodev", "readline", "xx*", "_xx*",
    )),
)  # fmt: skip
DIRECTORIES = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}
#: Of what is not Debian's.
LICENCES = {"cc_proxy": "Apache-2.0", "msgspec": "BSD-3-Clause"}


@dataclass(frozen=True)
class Package:
    """A Debian package, as its control file describes it."""

    path: Path
    name: str
    version: str
    #: What it was built from: its source package first, then those of which it has parts.
    sources: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Package":
        show = "${Package}\n${Version}\n${source:Package} (= ${source:Version})\n${Built-Using}"
        name, version, source, others = _output("dpkg-deb", "--show", f"--showformat={show}", path).split(
            "\n"
        )
        return cls(path, name, version, (source, *filter(None, others.split(", "))))

    def extract(self, directory: Path) -> None:
        """Unpack what would be installed."""
        _run("dpkg-deb", "--extract", self.path, directory)


def main(packages: Path, modules: Path, out: Path) -> None:
    """Make everything anew."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    found = [Package.read(path) for path in sorted(packages.glob("*.deb"))]
    with tempfile.TemporaryDirectory() as work:
        kernel, root = Path(work, "kernel"), Path(work, "root")
        (out / "licences").mkdir()
        shutil.copyfile(HERE.parent / "debian/copyright", out / "licences/cc-proxy.copyright")
        for package in found:
            package.extract(kernel if package.name.startswith("linux-image-") else root)
        for package in found:
            # Packages of one source may have nothing but a link to the directory of one of them.
            (licence,) = Path(work).glob(f"*/usr/share/doc/{package.name}/copyright")
            shutil.copyfile(licence, out / "licences" / f"{package.name}.copyright")
        (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
        shutil.copyfile(vmlinuz, out / "vmlinuz")
        furnish(root, kernel, modules)
        with (
            open(out / "initramfs", "wb") as file,
            gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed,
        ):
            for piece in archive(root):
                packed.write(piece)
    sources = {source for package in found for source in package.sources}
    (out / "built-using").write_text(", ".join(sorted(sources)) + "\n")
    (out / "sbom.spdx.json").write_text(json.dumps(bill_of_materials(found, modules), indent=1) + "\n")


def furnish(root: Path, kernel: Path, modules: Path) -> None:
    """Make of the unpacked packages what the guest is to have."""
    shutil.copytree(modules, root / PYTHON, dirs_exist_ok=True)
    for pattern in LEFT_OUT:
        for path in sorted(root.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (root / name).write_text(text)
    shutil.copyfile(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    (root / "lib/modules").mkdir()
    (found,) = kernel.glob("lib/modules/*/kernel")
    for module in MODULES:
        shutil.copy(found / f"{module}.ko", root / "lib/modules")
    _compile(root)
    _install_applets(root)


def _compile(root: Path) -> None:
    """Have the guest's Python compile all modules, and remove their sources: the guest boots faster without.

    What comes out depends on no file's time, as it usually does, nor on the seed of hashes.
    """
    interpreter = (root / "lib64/ld-linux-x86-64.so.2", "--library-path", root / "lib/x86_64-linux-gnu")
    _run(
        *interpreter, root / "usr/bin/python3.11", "-S", "-s", "-m", "compileall", "-q", "-b",
        "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/", root / PYTHON,
        env={"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    for source in sorted((root / PYTHON).rglob("*.py")):
        source.unlink()
    (root / "usr/bin/python3").symlink_to("python3.11")


def _install_applets(root: Path) -> None:
    for name in _output(root / "bin/busybox", "--list-full").split():
        link = root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() and not link.exists():
            link.symlink_to("/bin/busybox")


# An archive as the kernel unpacks it: cpio, newc ---


def archive(root: Path) -> Iterator[bytes]:
    """Give the bytes of an archive of a directory, in which everything is root's."""
    inode = 1
    for path in sorted(root.rglob("*")):
        yield from _member(str(path.relative_to(root)), inode, *_content(path))
        inode += 1
    # Before the agent mounts /dev, the kernel gives init its console, and Python takes random numbers from
    # there if the CPU has none.
    yield from _member("dev/console", inode, stat.S_IFCHR | 0o600, device=(5, 1))
    yield from _member("dev/urandom", inode + 1, stat.S_IFCHR | 0o666, device=(1, 9))
    yield from _member("TRAILER!!!", 0, 0)


def _content(path: Path) -> tuple[int, bytes]:
    """Return a file's mode and its content. Of modes only what git would keep counts, no umask."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return stat.S_IFLNK | 0o777, os.fsencode(os.readlink(path))
    if stat.S_ISDIR(mode):
        return stat.S_IFDIR | (0o1777 if path.name == "tmp" else 0o755), b""
    return stat.S_IFREG | (0o755 if mode & stat.S_IXUSR else 0o644), path.read_bytes()


def _member(
    name: str, inode: int, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
) -> Iterator[bytes]:
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    yield _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
    yield _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


# What is in it ---


def bill_of_materials(packages: list[Package], modules: Path) -> dict[str, object]:
    """Return what the guest is made of, as SPDX 2.3 has it."""
    described = [_described(package) for package in packages]
    described += [_python_module(path) for path in sorted(modules.iterdir())]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": "cc-proxy-guest",
        "documentNamespace": f"https://cc-proxy.invalid/guest/{digest}",
        "creationInfo": {"created": _date(), "creators": ["Tool: cc-proxy packaging/guest"]},
        "packages": described,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": entry["SPDXID"],
            }
            for entry in described
        ],
    }


def _described(package: Package) -> dict[str, object]:
    return {
        "SPDXID": f"SPDXRef-{package.name.replace('_', '-')}",
        "name": package.name,
        "versionInfo": package.version,
        "supplier": "Organization: Debian",
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "checksums": [_checksum(package.path.read_bytes())],
        "sourceInfo": f"Debian's source packages: {', '.join(package.sources)}",
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "licenseComments": f"licences/{package.name}.copyright",
        "externalRefs": [_purl(f"deb/debian/{package.name}@{package.version}?arch=amd64&distro=bookworm")],
    }


def _python_module(path: Path) -> dict[str, object]:
    """Describe one of ours: its licence is in the file of our own package, which names what is vendored."""
    text = "".join(file.read_text() for file in (path / "__init__.py", path / "_version.py") if file.exists())
    found = re.search(r"""^__version__\b.*= ['"](.+)['"]$""", text, re.MULTILINE)
    version = found[1] if found else "NOASSERTION"
    return {
        "SPDXID": f"SPDXRef-{path.name.replace('_', '-')}",
        "name": path.name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": LICENCES[path.name],
        "licenseComments": "licences/cc-proxy.copyright",
        "externalRefs": [_purl(f"pypi/{path.name.replace('_', '-')}@{version}")],
    }


def _checksum(content: bytes) -> dict[str, str]:
    return {"algorithm": "SHA256", "checksumValue": hashlib.sha256(content).hexdigest()}


def _purl(rest: str) -> dict[str, str]:
    locator = f"pkg:{quote(rest, safe='/@?=&')}"
    return {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator}


def _date() -> str:
    return datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC).strftime("%FT%TZ")


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env=env)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
