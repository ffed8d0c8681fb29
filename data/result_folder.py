"""The folder that a command makes: never half a result in it, whenever it dies.

Everything is written to FOLDER/.partial. When all is there, publish.json lists it, and from then on it is only renamed into
place. FOLDER/.prepared.json, the stamp, remembers what the folder was made from and which files in it are this program's.
"""

import fcntl
import glob
import json
import os
import shutil
import sys
from pathlib import Path

from data.shards import PrepareError, ResumableError, sync_folder, write_synced

STAMP = ".prepared.json"
WORK, DONE = ".partial", ".partial.done"


def read_stamp(out: Path) -> dict:
    """What DIR was made from and which files (name: size) this program put there."""
    try:
        return json.loads((out / STAMP).read_bytes())
    except (FileNotFoundError, ValueError):
        return {"inputs": None, "files": {}}


def write_stamp(out: Path, inputs: str | None, files: dict) -> None:
    write_synced(out / (STAMP + ".new"), json.dumps({"inputs": inputs, "files": files}, indent=1).encode())
    os.replace(out / (STAMP + ".new"), out / STAMP)
    sync_folder(out)


def is_done(out: Path, inputs: str) -> bool:
    stamp = read_stamp(out)
    return inputs is not None and stamp["inputs"] == inputs and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in stamp["files"].items())  # fmt: skip


def refuse_foreign_shards(out: Path, work: Path) -> None:
    """Shards that this program did not write are neither replaced nor left to be trained on by mistake."""
    own = read_stamp(out)["files"]
    if (work / "publish.json").exists():  # a run that died while renaming
        own |= json.loads((work / "publish.json").read_bytes())
    for split in ("train", "val"):
        for path in sorted(glob.glob(f"{glob.escape(str(out))}/{split}*_*.bin")):
            if os.path.basename(path) not in own:
                raise ResumableError(f"{path}: exists, and data.prepare did not write it; move it away or choose another --out")


def lock(out: Path) -> int:
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PrepareError(f"--out {out}: another data.prepare is writing there; wait for it or choose another folder") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def begin(out: Path, work: Path, inputs: str) -> None:
    """An empty folder, or what an unfinished run of the same inputs and options left in it."""
    shutil.rmtree(out / DONE, ignore_errors=True)
    if (work / "inputs").exists() and (work / "inputs").read_text() == inputs:
        print(f"{work.parent}: going on with an unfinished run", file=sys.stderr)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_synced(work / "inputs.new", inputs.encode())
    os.replace(work / "inputs.new", work / "inputs")


def ready(work: Path, names: set[str]) -> None:
    """The files of these names are the result: from here on they are only renamed."""
    sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir()) if path.name in names}
    sync_folder(work)
    write_synced(work / "publish.new", json.dumps(sizes).encode())
    os.replace(work / "publish.new", work / "publish.json")


def is_ready(work: Path) -> bool:
    return (work / "publish.json").exists()


def publish(work: Path, out: Path, inputs: str) -> None:
    """Renames everything into place. The stamp owns old and new files meanwhile, so a crash leaves nothing unaccounted for."""
    old, new = read_stamp(out)["files"], json.loads((work / "publish.json").read_bytes())
    write_stamp(out, None, old | new)
    for name in new:
        if (work / name).exists():  # else an earlier run came this far
            os.replace(work / name, out / name)
    for name in old.keys() - new.keys():
        (out / name).unlink(missing_ok=True)
    write_stamp(out, inputs, new)
    os.replace(work, out / DONE)  # renamed, so that nobody goes on with half of it
    shutil.rmtree(out / DONE)


def remove_leftovers(out: Path, inputs: str) -> None:
    """Of a run that died in its last moment, after the stamp said that it was done"""
    shutil.rmtree(out / DONE, ignore_errors=True)
    if (out / WORK / "inputs").exists() and (out / WORK / "inputs").read_text() == inputs:
        shutil.rmtree(out / WORK, ignore_errors=True)
