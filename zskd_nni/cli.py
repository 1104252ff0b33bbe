"""The command line. A user's mistake ends in one sentence and exit code 2; a stopped run in 130 or 143."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from typer import Argument, Option

from zskd_nni.runtime.allocator import keep_freed_memory
from zskd_nni.runtime.errors import UserError

if TYPE_CHECKING:
    from zskd_nni.recipes.load import LoadedRecipe

F = TypeVar("F", bound=Callable[..., None])

app = typer.Typer(
    name="zskd-nni",
    help="Compress a trained network without its training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="A recipe is a packaged name (zskd-nni recipes) or a YAML file. Run the same command again to resume.",
)
_DISTRIBUTED = ("synthesize", "distill", "compress")  # the commands that several processes can share
RECORDS = Path("results/reproduce")

# Options that several commands have.
OutOption = Annotated[Path, Option(help="Output folder; the same command continues there.")]
SeedOption = Annotated[int | None, Option(min=0, help="Seed, instead of the recipe's.")]
DataRootOption = Annotated[Path | None, Option(help="Folder of real test data, instead of ZSKD_NNI_DATA.")]
_threads = partial(Option, min=1, max=4096)  # the most that a store of impressions records
ThreadsOption = Annotated[int | None, _threads(help="CPU threads; by default all cores.")]
QuietOption = Annotated[bool, Option("--quiet", help="Show no progress.")]
ResultsOption = Annotated[Path, Option(help="Folder of the records.")]


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, what is changed in it, and the output folder."""

    recipe: Annotated[str, Argument(metavar="NAME|FILE", help="A packaged recipe, or a YAML file.")]
    out: OutOption
    seed: SeedOption = None
    changes: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY.PATH=VALUE", help="Change a key of the recipe; may be repeated."),
    ] = None
    scale: Annotated[
        str | None, Option(metavar="NAME", help="A scale of the recipe, such as cpu; by default full.")
    ] = None

    def load(self, *more: str) -> LoadedRecipe:
        """The recipe with its changes, and ``more`` after them."""
        from zskd_nni.recipes.load import load_recipe

        return load_recipe(self.recipe, [*(self.changes or ()), *more], self.seed, self.scale)


@dataclass(frozen=True)
class DataOptions:
    """Where real images are."""

    data_root: DataRootOption = None
    download: Annotated[bool, Option("--download", help="Let torchvision fetch test data that is missing.")] = False

    @property
    def where(self) -> dict[str, Any]:
        """As keyword arguments of the functions that read real data."""
        return {"root": self.data_root, "download": self.download}


@dataclass(frozen=True)
class MachineOptions:
    """What a command computes on, and whether it shows its progress."""

    device: Annotated[str, Option(help="cpu, cuda, or cuda:N.")] = "cpu"
    threads: ThreadsOption = None
    quiet: QuietOption = False

    def prepare(self) -> None:
        """Set up PyTorch.

        Raises:
            UserError: there is no such device.
        """
        import torch

        keep_freed_memory()
        torch.set_flush_denormal(True)  # denormals slow a CPU by a factor of up to a hundred
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise UserError(f"--device is cpu, cuda or cuda:N, not {self.device!r}.")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch finds no usable GPU.")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {self.device}: there are {torch.cuda.device_count()} GPUs, counted from 0.")


@dataclass(frozen=True)
class SearchMachineOptions(MachineOptions):
    """The same for each trial of a search."""

    threads: Annotated[int | None, _threads(help="CPU threads of a trial; by default a share of the cores.")] = None


@dataclass(frozen=True)
class RunOptions(MachineOptions, DataOptions, RecipeOptions):
    """All options of a command that runs a recipe."""


def command(name: str | None = None, hidden: bool = False) -> Callable[[F], F]:
    """Make a command of a function; a parameter that is one of the dataclasses above means one option per field."""

    def register(function: F) -> F:
        own = inspect.signature(function, eval_str=True).parameters
        groups: dict[str, Any] = {key: each.annotation for key, each in own.items() if is_dataclass(each.annotation)}
        fields = {key: inspect.signature(kind, eval_str=True).parameters for key, kind in groups.items()}
        parameters = [option for key in own for option in fields.get(key, {key: own[key]}).values()]

        def run(**given: Any) -> None:
            from zskd_nni.runtime.progress import stage

            quiet = hidden or bool(given.get("quiet")) or not _speaks()
            grouped = {key: kind(**{field: given.pop(field) for field in fields[key]}) for key, kind in groups.items()}
            with stage(name or function.__name__, quiet, told=False):
                function(**given, **grouped)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in parameters]
        )
        app.command(name or function.__name__, help=inspect.getdoc(function), hidden=hidden)(run)
        return function

    return register


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zskd-nni {importlib.metadata.version('zskd_nni')}")
        raise typer.Exit


@app.callback()
def _refuse_torchrun_where_one_process_works(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from zskd_nni.runtime.torchrun import launched

    here = launched()
    if here is not None and here.size > 1 and context.invoked_subcommand not in _DISTRIBUTED:
        raise UserError(
            f"{context.invoked_subcommand} is one process; under torchrun several processes can share "
            f"{', '.join(_DISTRIBUTED[:-1])} and {_DISTRIBUTED[-1]}."
        )


def _speaks() -> bool:
    """Whether this process was started alone, or is the first of those that torchrun started."""
    from zskd_nni.runtime.torchrun import launched

    here = launched()
    return here is None or here.rank == 0


def _echo(text: str) -> None:
    """Print, in the first process of those that torchrun started."""
    if _speaks():
        typer.echo(text)


@command()
def demo(
    out: OutOption = Path("out/demo"),
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compress a digit classifier without data, in a minute.

    It is the same as compress digits-prune50: everything at once.
    """
    compress(RunOptions("digits-prune50", out, seed, threads=threads, quiet=quiet))


@command()
def compress(
    options: RunOptions,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, measure the teacher, forecast the time; write nothing.")
    ] = False,
    impressions: Annotated[
        Path | None, Option(help="The impressions of another run or of synthesize, instead of making them.")
    ] = None,
    twin: Annotated[
        Path | None, Option(help="A finished run of the recipe on real images, for the report to compare with.")
    ] = None,
) -> None:
    """Run a whole recipe, from its teacher to its report.

    Makes impressions, the student, its controls, the exports and the report. The teacher is measured first where test
    data is named.
    """
    if dry_run:
        _try_out(options.load(), options, impressions, twin)
        return
    _work_through(options.load(), options, impressions, twin)
    out = options.out
    _echo(f"\nreport: {out / 'report.html'}\nnetwork: {out / 'student.onnx'}, {out / 'student.safetensors'}")


def _try_out(loaded: LoadedRecipe, options: RunOptions, impressions: Path | None, twin: Path | None) -> None:
    from zskd_nni.pipeline import Run

    options.prepare()
    given = {"impressions": impressions, "twin": twin, **options.where}
    run = Run(loaded, options.out, device=options.device, quiet=options.quiet, **given)
    run.require_a_teacher()
    run.require_own_folder()
    _echo(run.foresee().line())
    transfer = loaded.recipe.transfer
    images = f"{transfer.size:,} images of {transfer.method} ({transfer.preset}) would be made"
    if run.given is not None:
        images = f"the {len(run.given):,} impressions in {impressions} would be taken"
    _echo(f"dry run: the recipe can be run; {images}, and {run.out} be written. Nothing was written.")


def _work_through(
    loaded: LoadedRecipe, options: RunOptions, impressions: Path | None = None, twin: Path | None = None
) -> None:
    from zskd_nni.pipeline import Run
    from zskd_nni.pipeline.report_html import render_table
    from zskd_nni.runtime.distributed import joined

    options.prepare()
    with joined(options.device) as device:
        given = {"impressions": impressions, "twin": twin, **options.where}
        run = Run(loaded, options.out, device=device, quiet=options.quiet, **given)
        run.require_a_teacher()
        report = run.compress()
    _echo(render_table(report))


@command()
def synthesize(
    options: RunOptions, size: Annotated[int | None, Option(min=1, help="Impressions, instead of the recipe's.")] = None
) -> None:
    """Make a store of data impressions of a recipe's teacher.

    A recipe with another method gets that method's transfer set.
    """
    from zskd_nni.runtime.distributed import joined, team

    loaded = options.load(*([f"transfer.size={size}"] if size else []))
    options.prepare()
    out, method = options.out, loaded.recipe.transfer.method
    with joined(options.device) as device:
        teacher = loaded.teacher().to(device)
        _echo(f"teacher: {teacher.num_classes} classes, classifier {teacher.classifier_path}")
        if (out / "run.json").exists():
            raise UserError(f"{out} is the folder of a run of compress or distill; choose another --out.")
        source = loaded.transfer_source(teacher, out, quiet=options.quiet, **options.where)
        _echo(_describe_transfer_set(method, source.size, out, team().size))


def _describe_transfer_set(method: str, size: int | None, out: Path, processes: int) -> str:
    from zskd_nni.synthesis import ImpressionStore

    if method == "real":
        return f"{method} stores nothing: its {size:,} images are read while a student is trained"
    if size is None:
        return f"{method} stores nothing: its images are made while a student is trained"
    if not (out / "manifest.json").exists():  # an arbitrary transfer set, not impressions
        return f"{size:,} images of {method} in {out}"
    summary = ImpressionStore.open(out).summary()
    rate = summary["impressions_per_second"]
    speed = "" if rate is None else f", {rate:,.0f} a second{' and process' if processes > 1 else ''}"
    return (
        f"{summary['impressions']:,} impressions in {out}: mean divergence {summary['mean_fit']:.4f} after "
        f"{summary['mean_steps']:.1f} steps{speed}"
    )


@command()
def distill(
    options: RunOptions,
    impressions: Annotated[Path | None, Option(help="A store made by synthesize, instead of making one.")] = None,
) -> None:
    """Train a recipe's student network on impressions alone.

    There are no controls, and NNI's compression is left out.
    """
    if options.load().recipe.student is None:
        raise UserError(f"The recipe {options.recipe} names no student network to train; use zskd-nni compress for it.")
    _work_through(options.load("controls=[]", "compression={}"), options, impressions)


@command()
def search(
    options: RecipeOptions,
    machine: SearchMachineOptions,
    data_root: DataRootOption = None,
    portal: Annotated[
        bool, Option("--portal", help="Open NNI's web portal to the network; it has no password.")
    ] = False,
    port: Annotated[
        int | None, Option(min=1, max=65535, help="Port of NNI's web server; by default a free one.")
    ] = None,
) -> None:
    """Search a recipe's settings with an NNI experiment.

    No data is needed; docs/experiments.md.
    """
    from zskd_nni.data.datasets import data_root as find_root
    from zskd_nni.pipeline.search.experiment import BEST, Search
    from zskd_nni.pipeline.search.trial_table import render_trials

    loaded, out = options.load(), options.out
    machine.prepare()
    table = Search(loaded, out, root=find_root(data_root), portal=portal, port=port, **asdict(machine)).run()
    typer.echo(render_trials(table))
    words = ["zskd-nni", "compress", str(out / BEST), "--out", str((out / BEST).with_suffix(""))]
    words += [] if data_root is None else ["--data-root", str(data_root)]
    words += [] if machine.device == "cpu" else ["--device", machine.device]
    typer.echo(f"\nbest: trial {table['best']}; its recipe: {shlex.join(words)}")


@command(hidden=True)
def trial(job: Annotated[Path, Argument(metavar="FOLDER", help="As a search wrote it.")]) -> None:
    """One trial of a search; NNI starts it."""
    from zskd_nni.pipeline.search.trial import JOB, run_trial
    from zskd_nni.runtime.files import read_json

    settings = read_json(job / JOB)
    MachineOptions(settings["device"], settings["threads"]).prepare()
    run_trial(job)


@command()
def evaluate(
    network: Annotated[
        Path, Argument(metavar="FILE", help="A student.json (or the folder it lies in), or an .onnx file.")
    ],
    data: Annotated[str, Option(help="digits, mnist, fashion-mnist, cifar10, an .npz or a folder.")],
    where: DataOptions,
    split: Annotated[str, Option(help="train or test.")] = "test",
    fit: Annotated[
        str | None, Option(help="exact, pad, resize or crop: how images of another size are made to fit.")
    ] = None,
) -> None:
    """Measure a saved network or ONNX file on labelled images.

    Of a saved network the ONNX files beside it are measured as well.
    """
    from zskd_nni.data.datasets import Fit, load_images
    from zskd_nni.pipeline.evaluate import evaluate_network, evaluate_onnx

    MachineOptions().prepare()
    measure = evaluate_onnx if network.suffix == ".onnx" else evaluate_network
    if fit not in (None, *get_args(Fit)):
        raise UserError(f"--fit is {', '.join(get_args(Fit))}, not {fit!r}.")
    how: Any = fit
    for line in measure(network, lambda: load_images(data, split, where.data_root, where.download), how):
        typer.echo(line)


@command()
def show(
    store: Annotated[Path, Argument(metavar="FOLDER", help="A store of impressions.")],
    out: Annotated[Path, Option(help="The picture, .png.")] = Path("impressions.png"),
    count: Annotated[int, Option(min=1, max=1000, help="How many impressions at most, equally many of a class.")] = 60,
) -> None:
    """Draw the impressions of a store.

    Each is labelled with the teacher's predicted class and its confidence.
    """
    from zskd_nni.pipeline.evaluate import saved_input
    from zskd_nni.synthesis import ImpressionStore
    from zskd_nni.synthesis.image_grid import impressions_picture, some_of_each, spread

    if out.suffix != ".png":
        raise UserError(f"--out must be a .png file, not {out}.")
    opened = ImpressionStore.open(store)
    finished = [index for index in range(len(opened.shard_sizes)) if opened.shard_problem(index) is None]
    if not finished:
        raise UserError(f"{store} holds no finished impressions yet.")
    spec = saved_input(opened.manifest["identity"], store / "manifest.json")
    shards = (opened.read(finished[index]) for index in spread(len(finished)))
    images, logits = some_of_each(((shard.images, shard.logits) for shard in shards), count)
    impressions_picture(images[:count], logits[:count], spec, out, title=str(store))
    typer.echo(f"{out}: {len(images[:count])} of {len(opened):,} impressions")


@command()
def recipes(name: Annotated[str | None, Argument(metavar="[NAME]", help="Print this recipe's YAML.")] = None) -> None:
    """List the packaged recipes, or print one."""
    import yaml

    from zskd_nni.recipes.load import packaged_names, recipe_text

    if name is not None:
        typer.echo(recipe_text(name)[0], nl=False)
        return
    width = max(map(len, packaged_names()))
    for each in packaged_names():
        typer.echo(f"{each:<{width}}  {yaml.safe_load(recipe_text(each)[0])['description']}")


@command("train-teacher")
def train_teacher_command(
    name: Annotated[str, Argument(metavar="NAME", help="One of the names above.")],
    out: OutOption,
    data: DataOptions,
    machine: MachineOptions,
    seed: Annotated[int, Option(min=0, help="Seed of the initial weights and of the order of images.")] = 0,
    epochs: Annotated[int | None, Option(min=1, help="Instead of the recipe's.")] = None,
    validation: Annotated[
        bool, Option("--validation", help="Measure on the last 5,000 training images, held back.")
    ] = False,
) -> None:
    """Train one of the zoo's teachers on real data.

    NAME is lenet5-digits, lenet5-mnist, lenet5-fashion-mnist, alexnet-cifar10, vgg-cifar10,
    resnet20-cifar10, wrn-16-2-cifar10 or wrn-40-2-cifar10. The shipped teachers were made by it.
    Beside the baselines of reproduce it is the one command that trains on real data. The same
    command again resumes a training that was stopped, and leaves one that is finished in OUT
    as it is.
    """
    from zskd_nni.models.zoo.trained import trained_names
    from zskd_nni.research.train_teacher import TeacherTraining, train_teacher

    machine.prepare()
    if name in trained_names():
        typer.echo(
            f"{name} comes with the package, and recipes use that one. To use the new one, name its file as "
            "teacher.weights.",
            err=True,
        )
    training = TeacherTraining(seed, epochs, validation, data.data_root, data.download, machine.device, machine.quiet)
    result = train_teacher(name, out, training)
    typer.echo(f"{out / name}.safetensors: {result['accuracy']:.2f} % on {result['measured_on']} of {result['data']}")


@dataclass(frozen=True)
class ReproduceOptions:
    """The selected runs of the papers' tables."""

    table: Annotated[str | None, Argument(metavar="[TABLE]", help="A table; all for every cell.")] = None
    cells: Annotated[
        list[str] | None,
        Option("--cell", metavar="SUBSTRING", help="Only cells with this in their name; may be repeated."),
    ] = None
    seeds: Annotated[
        list[int] | None, Option("--seed", min=0, help="Instead of the table's seeds; may be repeated.")
    ] = None
    scale: Annotated[str, Option(metavar="NAME", help="full, cpu or smoke.")] = "full"


@command()
def reproduce(
    options: ReproduceOptions,
    data: DataOptions,
    machine: MachineOptions,
    out: Annotated[Path, Option(help="Transfer sets and students; a later run resumes there.")] = Path(
        "runs/reproduce"
    ),
    results: ResultsOption = RECORDS,
    list_only: Annotated[bool, Option("--list", help="Show tables, or a table's cells and their state.")] = False,
) -> None:
    """Run the papers' tables; each run leaves a record.

    A run that is finished is not run again, one that was stopped is resumed. The same command in a second process takes
    the cells that the first is not working on. Without a TABLE the tables are listed.
    """
    from zskd_nni.research.reproduction.context import Workspace
    from zskd_nni.research.reproduction.session import Selection, list_cells, list_tables, run_table

    if options.table is None:
        if options.cells:
            raise UserError("--cell needs a table; reproduce all --cell finds it in any.")
        typer.echo(list_tables())
        return
    machine.prepare()
    workspace = Workspace(out, results, data.data_root, data.download, machine.device, machine.quiet)
    selection = Selection(options.table, options.cells or (), options.seeds or (), options.scale)
    if list_only:
        typer.echo(list_cells(selection, workspace))
    else:
        run_table(selection, workspace, typer.echo)


@command("results")
def results_command(
    results: ResultsOption = RECORDS, out: Annotated[Path, Option(help="The page.")] = Path("docs/results.md")
) -> None:
    """Write the page of results from the records of reproduce."""
    from zskd_nni.research.reproduction.context import available_teachers
    from zskd_nni.research.reproduction.page import render_page
    from zskd_nni.research.reproduction.pairs import PAIRS
    from zskd_nni.research.reproduction.records import read_records
    from zskd_nni.runtime.files import make_folder, write_atomic

    records = read_records(results)
    if not records:
        raise UserError(f"--results: there is no record in {results}; {out} is left as it is.")
    make_folder(out.parent)
    teachers = available_teachers({record["pair"] for record in records} & set(PAIRS))
    write_atomic(out, render_page(records, teachers))
    typer.echo(f"{out}: {len(records)} records")


def main() -> None:
    """Entry point of ``zskd-nni``."""
    # Threads that spin while they wait slow a shared CPU by a factor of up to seven.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from zskd_nni.runtime.signals import Interrupted, stoppable

    try:
        with stoppable():
            try:
                app()  # exits with code 2 after wrong usage
            except Interrupted as stop:
                for signum in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(signum, signal.SIG_IGN)
                print(
                    f"{stop}; what was finished is kept, the same command continues from there.",
                    file=sys.stderr,
                    flush=True,
                )
                sys.stdout.flush()
                os._exit(128 + stop.signum)  # nothing is left to do, and a further signal must not change the exit code
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        sentence = _sentence_about(error)
        if sentence is None:
            raise
        sentence = " ".join(sentence.split())  # an exception of other code may have line breaks
        print(f"Error: {sentence}" + ("" if sentence.endswith((".", "?", "!")) else "."), file=sys.stderr)
        sys.exit(2)


def _sentence_about(error: Exception) -> str | None:
    """The sentence that a user sees for an error; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a file of the user's that cannot be read, a name that no file can have
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    import torch

    # The CPU's allocator has no exception of its own.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            "There is not enough memory for this. Smaller batches (distillation.batch, transfer.synthesis.slots) or "
            "fewer images (transfer.size) need less; what was finished is kept"
        )
    return None
