"""Apply, check and revert the patches to FastVideo that lie in `patches/`.

The patches are unified diffs, applied in the order of their names, each line of context exactly as in the file.
`manifest.json` beside them has the FastVideo version and, for each file, the SHA-256 before and after. A file that is
neither is somebody's own work and is never overwritten.

Two things about writing:

- Installed files can be hard links into a package manager's cache. A new file is therefore written beside the old one
  and renamed over it; writing in place would patch the cache, and with it every other environment.
- The originals are kept in `fastvideo/.fastvideo_grpo/`, with the hashes of what was written. So `revert` gives back
  the same bytes, and a newer set of patches can replace an older one without FastVideo being installed again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastvideo_grpo.errors import UserError
from fastvideo_grpo.resources import patches_dir

APPLY_COMMAND = "fastvideo-grpo patch apply"
_MANIFEST_COMMAND = "fastvideo-grpo patch manifest"
_KEPT = Path("fastvideo") / ".fastvideo_grpo"
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(UserError):
    """FastVideo is missing, of another version, changed by somebody else, or not patched."""


@dataclass(frozen=True)
class FileStatus:
    """One file that the patches touch.

    Attributes:
        path: relative to the folder that contains `fastvideo/`, with forward slashes.
        state: `original`, `patched`, `outdated` (as another set of this project's patches left it), `foreign` (changed
            by somebody else) or `missing`.
    """

    path: str
    state: str


@dataclass(frozen=True)
class _Hunk:
    start: int
    lines: list[str] = field(default_factory=list)


# ---- the diffs


def _read_patch(path: Path) -> dict[str, list[_Hunk]]:
    """The hunks of one unified diff by file. Text before the first `---` line is its head."""
    files: dict[str, list[_Hunk]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    i, name = 0, None
    while i < len(lines):
        line = lines[i]
        hunk = _HUNK.match(line)
        if line.startswith("--- ") and i + 1 < len(lines) and lines[i + 1].startswith("+++ "):
            old, new = line[4:].strip(), lines[i + 1][4:].strip()
            if old[:2] != "a/" or new[:2] != "b/" or old[2:] != new[2:]:
                raise PatchError(
                    f"{path.name}: line {i + 1}: expected the same file as a/PATH and b/PATH, not {old} and {new}."
                )
            name = new[2:]
            files[name] = []
            i += 2
        elif hunk and name is not None:
            old_left, new_left = (int(hunk[g]) if hunk[g] else 1 for g in (2, 4))
            body: list[str] = []
            i += 1
            while old_left or new_left:
                # An editor that strips trailing blanks turns an empty context line " " into "".
                text = (lines[i] or " ") if i < len(lines) else "?"
                if text[0] not in " +-":
                    raise PatchError(f"{path.name}: line {i + 1}: the hunk {line!r} ends too early.")
                old_left -= text[0] != "+"
                new_left -= text[0] != "-"
                body.append(text)
                i += 1
            files[name].append(_Hunk(int(hunk[1]), body))
        elif name is not None and line.strip():
            raise PatchError(f"{path.name}: line {i + 1}: {line!r} belongs to no hunk.")
        else:
            i += 1
    if not files:
        raise PatchError(f"{path.name} has no '--- a/PATH' line: it changes nothing.")
    return files


def _apply_hunks(text: str, hunks: list[_Hunk], what: str) -> str:
    """`text` with the hunks applied; every context and removed line must be where the hunk says."""
    lines = text.split("\n")
    result: list[str] = []
    at = 0
    for hunk in hunks:
        start = hunk.start - 1
        if not at <= start <= len(lines):
            raise PatchError(f"{what}: line {hunk.start} is out of order or beyond the end of the file.")
        result += lines[at:start]
        at = start
        for line in hunk.lines:
            if line[0] == "+":
                result.append(line[1:])
                continue
            if at >= len(lines) or lines[at] != line[1:]:
                found = repr(lines[at]) if at < len(lines) else "the end of the file"
                raise PatchError(f"{what}: line {at + 1} should be {line[1:]!r} and is {found}.")
            if line[0] == " ":
                result.append(line[1:])
            at += 1
    return "\n".join(result + lines[at:])


def _patched_contents(originals: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the patches make of the original files."""
    contents = {path: data.decode("utf-8") for path, data in originals.items()}
    for patch in _patch_files():
        for path, hunks in _read_patch(patch).items():
            if path not in contents:
                raise PatchError(f"{patch.name} changes {path}, which manifest.json does not name. Run `{_MANIFEST_COMMAND}`.")
            contents[path] = _apply_hunks(contents[path], hunks, f"{patch.name} on {path}")
    return {path: text.encode("utf-8") for path, text in contents.items()}


def _patch_files() -> list[Path]:
    return sorted(patches_dir().glob("*.patch"))


def read_manifest() -> dict:
    """The FastVideo version that the patches are for, and each file's hashes before and after them."""
    return json.loads((patches_dir() / "manifest.json").read_text(encoding="utf-8"))


# ---- FastVideo's files


def find_fastvideo() -> Path:
    """The folder that contains the installed `fastvideo/`, found without importing it (that takes 10 seconds and more).

    Raises:
        PatchError: FastVideo is not installed.
    """
    spec = importlib.util.find_spec("fastvideo")
    if spec is None or spec.origin is None:
        version = read_manifest()["fastvideo"]
        raise PatchError(
            f"FastVideo is not installed in {sys.prefix}. Install it with `make env` or "
            f"`pip install --no-deps fastvideo=={version}`, then run `{APPLY_COMMAND}`."
        )
    return Path(spec.origin).resolve().parent.parent


def fastvideo_version(root: Path) -> str | None:
    """The version of the FastVideo in `root`, as its version.py says, without importing it; None if it does not say."""
    file = root / "fastvideo" / "version.py"
    found = (
        re.search(r"""^__version__\s*=\s*["']([^"']+)""", file.read_text(encoding="utf-8"), re.MULTILINE)
        if file.is_file()
        else None
    )
    return found[1] if found else None


def _resolve(root: str | Path | None) -> Path:
    """The folder that contains `fastvideo/`, of the version that the patches are for."""
    wanted = read_manifest()["fastvideo"]
    folder = find_fastvideo() if root is None else Path(root).resolve()
    if not (folder / "fastvideo").is_dir():
        raise PatchError(f"--to {folder}: expected a FastVideo checkout, a folder that contains fastvideo/.")
    version = fastvideo_version(folder)
    if version != wanted:
        way_out = f"`pip install --no-deps fastvideo=={wanted}`" if root is None else f"a checkout of the tag v{wanted}"
        raise PatchError(
            f"FastVideo in {folder} is {version or 'of an unknown version'}; the patches are for {wanted}. "
            f"The way out: {way_out}, then `{APPLY_COMMAND}`."
        )
    return folder


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _written(folder: Path) -> dict[str, list[str]]:
    """For each file ever patched in this copy, the hashes that were written."""
    path = folder / _KEPT / "written.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _kept_original(folder: Path, path: str) -> Path:
    return folder / _KEPT / "originals" / path


def _file_status(folder: Path, path: str, manifest: dict, written: Mapping[str, list[str]]) -> FileStatus:
    file = folder / path
    if not file.is_file():
        return FileStatus(path, "missing")
    digest = _sha256(file.read_bytes())
    known = manifest["files"].get(path)
    if known is None:  # touched by an earlier set of patches only
        kept = _kept_original(folder, path)
        if kept.is_file() and _sha256(kept.read_bytes()) == digest:
            return FileStatus(path, "original")
    elif digest == known["patched"]:
        return FileStatus(path, "patched")
    elif digest == known["original"]:
        return FileStatus(path, "original")
    return FileStatus(path, "outdated" if digest in written.get(path, ()) else "foreign")


def _original(folder: Path, status: FileStatus, manifest: dict) -> bytes:
    """The original bytes of a file in any state that `_refuse_foreign` lets through."""
    source = folder / status.path if status.state == "original" else _kept_original(folder, status.path)
    known = manifest["files"].get(status.path)
    data = source.read_bytes() if source.is_file() else None
    if data is None or (known is not None and _sha256(data) != known["original"]):
        raise PatchError(f"The original of {folder / status.path} was not kept. {_reinstall(manifest)}")
    return data


def _reinstall(manifest: dict) -> str:
    version = manifest["fastvideo"]
    return (
        f"Install FastVideo again (`pip install --force-reinstall --no-deps fastvideo=={version}`; in a checkout, "
        f"`git checkout -- fastvideo`), then run `{APPLY_COMMAND}`."
    )


def _refuse_foreign(folder: Path, statuses: list[FileStatus], manifest: dict) -> None:
    for status in statuses:
        if status.state == "missing":
            raise PatchError(f"{folder / status.path} is missing. {_reinstall(manifest)}")
        if status.state == "foreign":
            raise PatchError(
                f"{folder / status.path} is neither FastVideo {manifest['fastvideo']}'s nor as this project "
                f"patches it; it was left alone. {_reinstall(manifest)}"
            )


def _replace_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write new files and rename them over the old ones; when one cannot be, put back those that were."""
    staged: dict[Path, Path] = {}
    old: dict[Path, bytes] = {}
    try:
        for path, data in contents.items():
            target = folder / path
            staged[target] = _stage(target, data)
            old[target] = target.read_bytes()
        done: list[Path] = []
        try:
            for target, new in staged.items():
                os.replace(new, target)
                done.append(target)
        except BaseException:
            for target in done:
                os.replace(_stage(target, old[target]), target)
            raise
    except OSError as error:
        raise PatchError(f"Cannot write {error.filename}: {error.strerror}. FastVideo was left as it was.") from error
    finally:
        for new in staged.values():
            new.unlink(missing_ok=True)


def _stage(target: Path, data: bytes) -> Path:
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    new.write_bytes(data)
    shutil.copymode(target, new)
    return new


def _keep(folder: Path, originals: Mapping[str, bytes], written: Mapping[str, list[str]]) -> None:
    """Keep the originals and the hashes about to be written: before the first rename, so that a kill is harmless."""
    kept = folder / _KEPT
    try:
        kept.mkdir(exist_ok=True)
        # Keeps the folder out of `git status` in a checkout.
        (kept / ".gitignore").write_text("*\n", encoding="utf-8")
        for path, data in originals.items():
            file = _kept_original(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        new = kept / "written.json.new"
        new.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(new, kept / "written.json")
    except OSError as error:
        raise PatchError(f"Cannot write {error.filename}: {error.strerror}. FastVideo was left as it was.") from error


# ---- what others call


def status(root: str | Path | None = None) -> list[FileStatus]:
    """The state of each file that the patches touch, or touched before.

    Args:
        root: a folder that contains `fastvideo/`; None is the installed copy.

    Raises:
        PatchError: FastVideo is missing there, or of another version.
    """
    folder, manifest = _resolve(root), read_manifest()
    written = _written(folder)
    return [_file_status(folder, path, manifest, written) for path in sorted({*manifest["files"], *written})]


def is_done(item: FileStatus, manifest: dict) -> bool:
    """Whether a file is as the patches want it."""
    return item.state == ("patched" if item.path in manifest["files"] else "original")


def apply(root: str | Path | None = None) -> list[str]:
    """Patch FastVideo: all files or none. Patching a patched copy changes nothing.

    Args:
        root: a folder that contains `fastvideo/`; None is the installed copy.

    Returns:
        The files that were changed.

    Raises:
        PatchError: FastVideo is missing or of another version, or a file was changed by somebody else or cannot be
            written.
    """
    statuses = status(root)
    folder, manifest = _resolve(root), read_manifest()
    _refuse_foreign(folder, statuses, manifest)
    todo = [item for item in statuses if not is_done(item, manifest)]
    if not todo:
        return []
    originals = {item.path: _original(folder, item, manifest) for item in statuses}
    patched = _patched_contents({path: originals[path] for path in manifest["files"]})
    for path, data in patched.items():
        if _sha256(data) != manifest["files"][path]["patched"]:
            raise PatchError(f"patches/manifest.json does not fit the patches: {path} differs. Run `{_MANIFEST_COMMAND}`.")
    # A file that an earlier set patched and this one does not goes back to its original.
    contents = {item.path: patched.get(item.path, originals[item.path]) for item in todo}
    written = _written(folder)
    for path, data in contents.items():
        digest = _sha256(data)
        written[path] = [*(old for old in written.get(path, []) if old != digest), digest]
    _keep(folder, originals, written)
    _replace_all(folder, contents)
    return sorted(contents)


def revert(root: str | Path | None = None) -> list[str]:
    """Give FastVideo back its original files, byte for byte: all or none.

    Args:
        root: a folder that contains `fastvideo/`; None is the installed copy.

    Returns:
        The files that were changed.

    Raises:
        PatchError: as for `apply`, or the originals are gone.
    """
    statuses = status(root)
    folder, manifest = _resolve(root), read_manifest()
    _refuse_foreign(folder, statuses, manifest)
    contents = {item.path: _original(folder, item, manifest) for item in statuses if item.state != "original"}
    _replace_all(folder, contents)
    shutil.rmtree(folder / _KEPT, ignore_errors=True)
    return sorted(contents)


def require_patched() -> None:
    """Stop unless the installed FastVideo is the patched one. Called before `import fastvideo`; takes milliseconds.

    Raises:
        PatchError: with the command that repairs it.
    """
    manifest = read_manifest()
    statuses = status()
    _refuse_foreign(find_fastvideo(), statuses, manifest)
    bad = [item for item in statuses if not is_done(item, manifest)]
    if bad:
        raise PatchError(
            f"The installed FastVideo {manifest['fastvideo']} is not patched ({bad[0].path} is {bad[0].state}). "
            f"Run `{APPLY_COMMAND}`."
        )


def write_manifest(root: str | Path | None = None) -> Path:
    """Make `patches/manifest.json` anew, after a patch was added or changed.

    Args:
        root: a folder that contains `fastvideo/`, its files original or patched by an earlier set; None is the
            installed copy.

    Returns:
        The manifest's path.

    Raises:
        PatchError: a patch does not apply, or the version is not known.
    """
    folder = find_fastvideo() if root is None else Path(root).resolve()
    version = fastvideo_version(folder)
    if version is None:
        raise PatchError(f"{folder / 'fastvideo' / 'version.py'} does not say which FastVideo this is.")
    originals: dict[str, bytes] = {}
    for patch in _patch_files():
        for path in _read_patch(patch):
            kept = _kept_original(folder, path)
            source = kept if kept.is_file() else folder / path
            if not source.is_file():
                raise PatchError(f"{patch.name} changes {path}, which is not in {folder}.")
            originals[path] = source.read_bytes()
    patched = _patched_contents(originals)
    files = {path: {"original": _sha256(originals[path]), "patched": _sha256(patched[path])} for path in sorted(originals)}
    target = patches_dir() / "manifest.json"
    target.write_text(json.dumps({"fastvideo": version, "files": files}, indent=2) + "\n", encoding="utf-8")
    return target
