"""Find the Debian packages of the table on disk, or fetch them, and check that they are the right ones."""

import hashlib
import logging
import subprocess
from pathlib import Path

from allears.core.errors import CorpusError
from allears.data.archives import refuse_sealed
from allears.data.packages import Package

log = logging.getLogger(__name__)

PACKAGES_DIR = Path("~/.cache/allears/packages")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_package(package: Package, packages_dir: Path, allow_other_versions: bool = False) -> Path:
    """The ``.deb`` of ``package`` in ``packages_dir``, fetched with ``apt-get download`` if it is not there.

    Raises:
        CorpusError: it is sealed, cannot be downloaded, or has another checksum than the table says.
    """
    refuse_sealed(package.name)
    found = sorted(packages_dir.glob(f"{package.name}_*.deb"))
    if not found:
        _download(package, packages_dir, allow_other_versions)
        found = sorted(packages_dir.glob(f"{package.name}_*.deb"))
    sums = {path: sha256_of(path) for path in found}
    for path, digest in sums.items():
        if digest.startswith(package.sha256):
            return path
    if allow_other_versions and found:
        log.warning("%s: %s is not the version of the table (%s)", package.name, found[-1].name, package.version)
        return found[-1]
    came = ", ".join(f"{path.name} (sha256 {digest[:8]})" for path, digest in sums.items()) or "nothing"
    raise CorpusError(
        f"package {package.name!r} in {packages_dir}: wanted {package.version} (sha256 {package.sha256[:8]}...),"
        f" found {came}; put the wanted .deb there, or accept others with --allow-other-versions"
    )


def _download(package: Package, packages_dir: Path, allow_other_versions: bool) -> None:
    packages_dir.mkdir(parents=True, exist_ok=True)
    wanted = package.name if allow_other_versions else f"{package.name}={package.version}"
    try:
        done = subprocess.run(
            ["apt-get", "download", wanted], cwd=packages_dir, capture_output=True, text=True, check=False
        )
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    except OSError as error:
        problem = f"apt-get cannot be run ({error.strerror})"
    if problem:
        raise CorpusError(
            f"package {package.name!r} {package.version} is not in {packages_dir} and cannot be downloaded: {problem}; "
            "put the .deb there (Debian 12 'bookworm', main), or leave such packages out with --skip-missing"
        )
