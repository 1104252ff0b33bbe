"""Execute the notebooks into the site's tutorials.

    python notebooks/run.py --scale cpu               # all, what ``make notebooks SCALE=cpu`` does
    python notebooks/run.py                           # all in seconds, into out/notebooks/smoke: do they run?
    python notebooks/run.py 02 05 --scale full        # those whose names begin so
    python notebooks/run.py 03 --scale full --resume  # takes up runs, images and students of an earlier execution
    python notebooks/run.py --prose                   # changed prose goes into the copies, and records are read again

With ``--prose`` only cells tagged ``records`` are executed. They show what is in ``results/`` and use no other cell.

The executed copy has the outputs, a last cell that says where they come from, and in its metadata the checksum of the
notebook it was made of. A copy is written when its notebook has run to the end, whole or not at all. What notebooks
make on the way lies in ``out/notebooks`` and is made anew by every run, but for ``--resume``.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TUTORIALS = ROOT / "docs" / "tutorials"
SCALES = {
    "smoke": "seconds: it shows that everything runs, and the figures mean nothing",
    "cpu": "a few minutes on two cores: smaller than the table of results",
    "full": "the sizes of the table of results",
}
KEY = "zskd_nni"  # of the metadata of a copy
TAKEN_UP = "runs, images and students that an earlier execution had finished; the time above is without theirs"
# What JupyterLab folds: the code of a cell, its outputs, what is under a heading.
FOLDS = ("jupyter", "jp-MarkdownHeadingCollapsed")
# A notebook links to pages as seen from notebooks/; its copy lies beside the pages.
_LINK = re.compile(r"\]\(\.\./docs/")


def sources() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(HERE.glob("[0-9]*.ipynb"))


def chosen(names: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of ``names``; all without any."""
    found = [path for path in sources() if not names or path.stem.startswith(tuple(names))]
    for name in names:
        if not any(path.stem.startswith(name) for path in found):
            raise SystemExit(
                f"There is no notebook {name!r}; there are {', '.join(p.stem for p in sources())}."
            )
    return found


def checksum(source: Path) -> str:
    """SHA-256 of a notebook as it stands."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def problem(copy: Path) -> str | None:
    """Why an executed copy is not that of a notebook as it stands; None where it is."""
    about = read(copy).metadata.get(KEY)
    if about is None:
        return "no notebook here made it"
    source = HERE / f"{copy.stem}.ipynb"
    if not source.exists():
        return f"there is no {source.name} any more"
    if about["source_sha256"] != checksum(source):
        return f"{source.name} has changed since: python notebooks/run.py {copy.stem} --scale {about['scale']}"
    return None


def read(path: Path) -> Any:
    """A notebook file."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    """Write a notebook file, whole or not at all."""
    import nbformat

    from zskd_nni.runtime.files import make_folder, write_atomic

    nbformat.validate(notebook)
    make_folder(path.parent)
    write_atomic(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())


def execute(source: Path, copy: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Run one notebook in a kernel of its own."""
    import papermill

    from zskd_nni.runtime.files import make_folder

    scale, seed, device = arguments.scale, arguments.seed, arguments.device
    folder = work / f"{source.stem}-{scale}"
    resumed = arguments.resume and folder.is_dir()
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    inside = folder.is_relative_to(ROOT)
    parameters = {
        "scale": scale,
        "seed": seed,
        "device": device,
        "out": str(folder.relative_to(ROOT) if inside else folder),
    }
    started = time.monotonic()
    # What has run so far lies there too: where it fails, with the error.
    so_far = folder / source.name
    with tempfile.TemporaryDirectory() as private:
        papermill.execute_notebook(
            str(source),
            str(so_far),
            parameters,
            kernel_name="python3",
            cwd=str(HERE),
            progress_bar=False,
            kernel_manager_class=private_kernel_manager(private),
        )
    notebook = cleaned(read(so_far))
    about = described(source, scale, seed, device, time.monotonic() - started)
    if resumed:
        about["resumed"] = True
    notebook.metadata[KEY] = about
    notebook.cells.append(provenance_cell(about))
    write(notebook, copy)


def private_kernel_manager(folder: str) -> Any:
    """Starts a kernel that is talked to through files in ``folder``, not through ports that all users can reach."""
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class PrivateKernelManager(AsyncKernelManager):
        @default("transport")
        def _transport(self) -> str:
            return "ipc"

        @default("ip")
        def _ip(self) -> str:
            return f"{folder}/kernel"

    return PrivateKernelManager


def described(
    source: Path, scale: str, seed: int, device: str, seconds: float
) -> dict[str, Any]:
    """Where the outputs of a copy come from, JSON-able."""
    import torch

    from zskd_nni.runtime.provenance import provenance

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as the kernel has
    return {
        "source": f"notebooks/{source.name}",
        "source_sha256": checksum(source),
        "scale": scale,
        "seconds": round(seconds, 1),
        "executed": datetime.datetime.now(datetime.timezone.utc).strftime(
            "%Y-%m-%d %H:%M UTC"
        ),
        **provenance(device, seed),
    }


def provenance_cell(about: dict[str, Any]) -> Any:
    """The last cell of a copy."""
    import nbformat

    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    minutes, seconds = divmod(round(about["seconds"]), 60)
    rows = {
        "notebook": f"`{about['source']}`",
        "scale": f"`{about['scale']}` ({SCALES[about['scale']]})",
        "executed": f"{about['executed']}, in {minutes} min {seconds} s",
        **({"taken up": TAKEN_UP} if about.get("resumed") else {}),
        "commit": f"`{about['commit']}`",
        "device": f"{about['device']}, {about['threads']} thread{'' if about['threads'] == 1 else 's'}",
        "seed": str(about["seed"]),
        "versions": versions,
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    text = "\n".join(["## How this page was made", "", "| | |", "| --- | --- |", *lines])
    return nbformat.v4.new_markdown_cell(
        text, id="provenance", metadata={"tags": ["provenance"]}
    )


def cleaned(notebook: Any) -> Any:
    """Without what papermill and the kernel note for themselves; links as seen from the copy's place."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {
            key: cell.metadata[key] for key in ("tags", *FOLDS) if cell.metadata.get(key)
        }
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub("](../", cell.source)
    return notebook


def read_again(cell: Any, scale: str) -> bool:
    """Execute a cell that shows records, in the repository's folder; whether it shows others than before."""
    import nbformat

    known: dict[str, Any] = {"scale": scale}
    tree = ast.parse(cell.source)
    last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    exec(compile(tree, cell.id, "exec"), known)
    table = eval(compile(last, cell.id, "eval"), known)
    data = {"text/html": table._repr_html_(), "text/plain": repr(table)}
    shown = nbformat.v4.new_output(
        "execute_result", data, execution_count=cell.execution_count
    )
    changed = "".join(cell.outputs[0]["data"]["text/plain"]) != data["text/plain"]
    cell.outputs = [shown]
    return changed


def refresh_prose(source: Path, copy: Path) -> None:
    """Take over the prose of a notebook whose code is still that of its copy; the outputs stay, but for records."""
    fresh, old = cleaned(read(source)), read(copy)
    ran = [cell for cell in old.cells if cell.cell_type == "code"]
    injected = [
        cell for cell in ran if "injected-parameters" in cell.metadata.get("tags", [])
    ]
    ran = [cell for cell in ran if cell not in injected]
    if [cell.source for cell in ran] != [
        cell.source for cell in fresh.cells if cell.cell_type == "code"
    ]:
        raise SystemExit(
            f"{source.name}: its code has changed, not the prose alone; it must be executed again."
        )
    cells = []
    for cell in fresh.cells:
        cells.append(ran.pop(0) if cell.cell_type == "code" else cell)
        if "parameters" in cell.metadata.get("tags", []):
            cells += injected
    about = old.metadata[KEY]
    about["source_sha256"] = checksum(source)
    records = [cell for cell in cells if "records" in cell.metadata.get("tags", [])]
    last = old.cells[-1]
    if True in [read_again(cell, about["scale"]) for cell in records]:
        today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        lines = [
            line for line in last.source.splitlines() if not line.startswith("| records |")
        ]
        last.source = "\n".join(
            [*lines, f"| records | tables of earlier results read again on {today} |"]
        )
    old.cells = [*cells, last]
    write(old, copy)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", help="the beginnings of their names; all without"
    )
    parser.add_argument("--scale", choices=list(SCALES), default="smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of each notebook"
    )
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    parser.add_argument(
        "--to",
        type=Path,
        help="where executed copies go; the site's tutorials, for smoke out/notebooks/smoke",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "notebooks")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up what an earlier execution at this scale has made",
    )
    parser.add_argument(
        "--prose",
        action="store_true",
        help="take over changed prose, execute only tables of records",
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs is at least 1, not {arguments.jobs}")
    sys.path.insert(0, str(ROOT))
    found = chosen(arguments.notebooks)
    if arguments.to is None:  # figures that mean nothing are no tutorials
        smoke = arguments.scale == "smoke" and not arguments.prose
        arguments.to = arguments.work / "smoke" if smoke else TUTORIALS
    if arguments.prose:
        os.chdir(ROOT)  # records are found from there
        for source in found:
            if (arguments.to / source.name).exists():
                refresh_prose(source, arguments.to / source.name)
        return 0
    # The kernel takes the package from here, as few threads as it is told, and no debugger's warnings.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if arguments.jobs == 1:
        return max([one(source, arguments) for source in found])
    with ThreadPoolExecutor(
        arguments.jobs
    ) as pool:  # each has a kernel, which is a process
        return max(pool.map(lambda source: one(source, arguments), found))


def one(source: Path, arguments: argparse.Namespace) -> int:
    """Execute one notebook and say how it went."""
    from papermill.exceptions import PapermillExecutionError

    started = time.monotonic()
    work = arguments.work.resolve()
    try:
        execute(source, arguments.to / source.name, work, arguments)
    except PapermillExecutionError as error:
        print(
            f"{source.stem} failed in cell {error.exec_count}:\n{error.source}\n",
            file=sys.stderr,
        )
        print("\n".join(error.traceback), file=sys.stderr)
        return 1
    print(
        f"{source.stem} at {arguments.scale}: {time.monotonic() - started:.1f} s",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
